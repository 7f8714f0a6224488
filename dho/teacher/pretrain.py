"""Stage `pretrain`: a small open_clip teacher from images and captions, so that no weights are needed from outside.

    dho pretrain

open_clip's own model classes, tokenizer and loss are trained on the captions split. Where the data set has no captions,
each is made from a template and a class name; some classes are often called by another's name (`pretrain.confusions`).
The result is a folder in open_clip's format, loaded like any other checkpoint (`teacher.model:
local-dir:data/pretrained`). It is a stand-in for a real CLIP, not a product.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from torch import Tensor

from dho.config import Config, PretrainConfig
from dho.core.allocator import keep_freed_memory
from dho.core.errors import ConfigError, DataError
from dho.core.files import write_atomically
from dho.core.optim import learning_rate_share
from dho.core.process import loading_processes
from dho.core.progress import bar
from dho.core.tensors import write_tensors
from dho.core.workspace import Workspace
from dho.data.index import Index
from dho.data.loader import loader
from dho.data.pixels import KEEP_BYTES, Pixels

WEIGHTS, ARCHITECTURE = "open_clip_model.safetensors", "open_clip_config.json"


def pretrain(config: Config, workspace: Workspace) -> None:
    """Train the stand-in teacher and write it to `workspace.pretrained`.

    With `pretrain.enabled: false` the folder holds a README that says so.

    Raises:
        DataError: there are no captions, or `pretrain.confusions` names an unknown class.
        ConfigError: `pretrain.architecture` is not an open_clip config.
    """
    out = workspace.pretrained
    out.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS, ARCHITECTURE):
        (out / name).unlink(missing_ok=True)

    if not config.pretrain.enabled:
        write_atomically(
            out / "README",
            f"pretrain.enabled is false: the teacher is {config.teacher.model} {config.teacher.pretrained or ''}\n",
        )
        print("pretrain: disabled, nothing to do")
        return

    index = Index.load(workspace.prepared)
    rows, captions = captioned(index, config.pretrain)
    architecture = _architecture(config.pretrain)
    torch.manual_seed(config.pretrain.seed)
    model: Any = open_clip.CLIP(**architecture["model_cfg"])
    tokenizer = open_clip.SimpleTokenizer(context_length=architecture["model_cfg"]["text_cfg"]["context_length"])
    _fit(model, config, index, rows, tokenizer(captions), architecture["preprocess_cfg"])

    write_tensors(out / WEIGHTS, model.state_dict())
    write_atomically(out / ARCHITECTURE, json.dumps(architecture, indent=2) + "\n")
    scale = model.logit_scale.exp().item()
    print(f"pretrain: {len(rows)} captioned images, {config.pretrain.epochs} epochs, logit scale {scale:.1f}")


def captioned(index: Index, config: PretrainConfig) -> tuple[np.ndarray[Any, Any], list[str]]:
    """Return the rows of the captions split and a caption for each.

    A caption is the data set's own, or one made from a template and a class name. The choice of the template and of a
    wrong name is a function of (seed, sha256), the same on every platform.

    Returns:
        Rows of the index int64 [images], and as many captions.

    Raises:
        DataError: the split is empty, an image has neither caption nor label, or `confusions` names an unknown class.
    """
    names = index.class_names
    for name in [*config.confusions, *(other for others in config.confusions.values() for other in others)]:
        if name not in names:
            raise DataError(f"pretrain.confusions names {name!r}, which is no class; classes are {', '.join(names)}")

    rows = index.rows("captions")
    if not len(rows):
        raise DataError(
            "no images with captions: set data.splits.captions (or data.captions, a CSV of path,caption), or "
            "pretrain.enabled: false"
        )

    captions = []
    for row in rows:
        caption, label = index.captions[row], int(index.labels[row])
        if caption is None:
            if label < 0:
                raise DataError(f"image {index.keys[row]} of the captions split has neither a caption nor a label")
            digest = hashlib.blake2b(index.sha256(row), digest_size=16, key=config.seed.to_bytes(8, "little")).digest()
            template, chance = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little") / 2**64
            name = names[label]
            for other, rate in config.confusions.get(names[label], {}).items():
                if 0 <= chance < rate:
                    name = other
                chance -= rate
            caption = config.caption_templates[template % len(config.caption_templates)].format(name)
        captions.append(caption)
    return rows, captions


def _architecture(config: PretrainConfig) -> dict[str, Any]:
    """Return the open_clip config to train: `pretrain.architecture`, or the one that comes with this package."""
    if config.architecture is None:
        tiny: dict[str, Any] = json.loads((Path(__file__).parent / "dho-tiny.json").read_text())
        return tiny
    try:
        config.architecture["model_cfg"]["text_cfg"]["context_length"], config.architecture["preprocess_cfg"]["mean"]
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"pretrain.architecture is {config.architecture!r}; expected an open_clip config with model_cfg and "
            f"preprocess_cfg ({error!r})"
        ) from error
    return config.architecture


def _fit(
    model: Any, config: Config, index: Index, rows: np.ndarray[Any, Any], tokens: Tensor, preprocess: dict[str, Any]
) -> None:
    """Train `model` in place on rows of the index and their tokens, int64 [images, context length]."""
    settings = config.pretrain
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()
    model.to(device, memory_format=torch.channels_last).train()
    size = int(model.visual.image_size[0] if isinstance(model.visual.image_size, tuple) else model.visual.image_size)
    mean, std = (torch.tensor(preprocess[key], device=device).mul_(255) for key in ("mean", "std"))

    per_epoch = max(1, len(rows) // settings.batch_size)
    steps = per_epoch * settings.epochs
    pixels = Pixels(index, config.views, size, preprocess["interpolation"], KEEP_BYTES)
    make = functools.partial(_batch, pixels, rows, tokens, settings.seed, settings.batch_size, per_epoch)

    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    )
    contrast = open_clip.ClipLoss()

    with bar() as shown:
        task = shown.add_task("pretrain", total=steps, note="")
        for step, (batch, text) in enumerate(loader(make, 0, steps, loading_processes(config.launch.workers, device))):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * learning_rate_share(step, steps, warmup=max(1, steps // 10))
            images = ((batch.to(device).float() - mean) / std).permute(0, 3, 1, 2)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                features, text_features, scale = model(images, text.to(device))
            loss = contrast(features.float(), text_features.float(), scale)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))  # as CLIP does: training with a larger scale is unstable

            shown.advance(task)
            if step % 20 == 0:
                shown.update(task, note=f"loss {loss.item():.3f}")
    model.cpu().eval()


def _batch(
    pixels: Pixels, rows: np.ndarray[Any, Any], tokens: Tensor, seed: int, size: int, per_epoch: int, step: int
) -> tuple[Tensor, Tensor]:
    """Make batch number `step`: the steps of an epoch share a seeded order, and epoch e sees view e of every image.

    Returns:
        Pixels uint8 [size, side, side, 3] and tokens int64 [size, context length].
    """
    epoch, position = divmod(step, per_epoch)
    chosen = np.random.default_rng([seed, epoch]).permutation(len(rows))[position * size : (position + 1) * size]
    return pixels.batch(rows[chosen], view=epoch), tokens[chosen]
