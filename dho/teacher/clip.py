"""The teacher: a frozen open_clip model that embeds images and class names.

    teacher = Teacher.load(config.teacher, device)
    embeddings = teacher.embed(pixels)                             # [n, dim], L2-normalised
    weights = teacher.text_weights(class_names, templates)         # [classes, dim]
    logits = teacher.logit_scale * embeddings @ weights.T          # CosSim / zeta

Its weights never change, so whatever it says of an image is computed once, by stage `teach`.
"""

from __future__ import annotations

import hashlib
import logging
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from dho.config import TeacherConfig
from dho.core.errors import DataError


class Teacher:
    """A loaded open_clip model in eval mode.

    Attributes:
        dim: width of the embeddings.
        input_size: side of the square input, pixels.
        interpolation: "bilinear" or "bicubic", as the model's own preprocessing has it.
        logit_scale: 1 / zeta, the factor between cosine similarity and logits.
        mean, std: of the input normalisation, per channel, for values in 0-1.
        weights_sha256: digest over all weights, whatever file they came from.
    """

    def __init__(self, model: Any, tokenizer: Any, config: TeacherConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        model = model.to(device).eval()
        self.model: Any = model
        self.model.requires_grad_(False)
        self.tokenizer = tokenizer
        preprocess = open_clip.get_model_preprocess_cfg(model)
        size = preprocess["size"]
        self.input_size = int(size[0] if isinstance(size, tuple | list) else size)
        self.mean, self.std = list(preprocess["mean"]), list(preprocess["std"])
        self.interpolation = "bilinear" if preprocess["interpolation"] == "bilinear" else "bicubic"
        self.logit_scale = float(self.model.logit_scale.exp())
        self.weights_sha256 = weights_sha256(model)
        self.dim = int(self.embed(torch.zeros(1, self.input_size, self.input_size, 3, dtype=torch.uint8)).shape[1])

    @classmethod
    def load(cls, config: TeacherConfig, device: torch.device) -> Teacher:
        """Load `teacher.model` with `teacher.pretrained`.

        The weights of a tag or an hf-hub name are downloaded once.

        Raises:
            DataError: there is no such model, tag or file, or a download failed.
        """
        level = logging.root.level
        try:
            logging.root.setLevel(logging.CRITICAL)  # open_clip logs what is raised here as well
            model = open_clip.create_model(config.model, pretrained=config.pretrained, require_pretrained=True)
            tokenizer = open_clip.get_tokenizer(config.model)
        except Exception as error:  # open_clip, its hub client and the file readers each raise their own kinds
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"teacher.model {config.model!r} with teacher.pretrained {config.pretrained!r} cannot be loaded: "
                f"{reason}"
            ) from error
        finally:
            logging.root.setLevel(level)
        return cls(model, tokenizer, config, device)

    @torch.inference_mode()
    def embed(self, pixels: Tensor) -> Tensor:
        """Embed pixels uint8 [n, size, size, 3]: L2-normalised, float32 [n, dim], on the teacher's device."""
        scaled = pixels.to(self.device, non_blocking=True).to(torch.float32).div_(255)
        images = scaled.sub_(scaled.new_tensor(self.mean)).div_(scaled.new_tensor(self.std)).permute(0, 3, 1, 2)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            embeddings = self.model.encode_image(images)
        return nn.functional.normalize(embeddings.float(), dim=-1)

    @torch.inference_mode()
    def text_weights(self, class_names: list[str], templates: list[str]) -> Tensor:
        """Embed classes as text weights: the normalised mean over the templates of normalised prompt embeddings.

        Args:
            class_names: as they appear in a prompt.
            templates: prompts with {} where the class name goes.

        Returns:
            float32 [classes, dim] on the CPU, L2-normalised.
        """
        weights = []
        for name in class_names:
            tokens = self.tokenizer([template.format(name) for template in templates]).to(self.device)
            embeddings = nn.functional.normalize(self.model.encode_text(tokens).float(), dim=-1)
            weights.append(nn.functional.normalize(embeddings.mean(dim=0), dim=-1))
        return torch.stack(weights).cpu()

    def describe(self) -> dict[str, Any]:
        """Return what identifies this teacher and its preprocessing, for a store's `meta.json`."""
        return {
            "model": self.config.model,
            "pretrained": self.config.pretrained,
            "weights_sha256": self.weights_sha256,
            "precision": self.config.precision,
            "preprocessing": {
                "input_size": self.input_size,
                "mean": self.mean,
                "std": self.std,
                "interpolation": self.interpolation,
            },
        }


def weights_sha256(model: nn.Module) -> str:
    """Return the SHA-256 (hex) over name, dtype, shape and bytes of every weight, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
