"""Answer images with the registered student, as MLflow runs it; neither torch nor `dho` is imported here.

    import mlflow
    model = mlflow.pyfunc.load_model("models:/dho-student@candidate")
    model.predict(pd.DataFrame({"image": [Path("cat.jpg").read_bytes()]}), params={"top_k": 3})

MLflow keeps this file as code, not as a pickled object, beside `code/dho_runtime.py`, `artifacts/student.onnx` and
`artifacts/package.json`; it is run by path (`dho/registry/package.py` packs it), never imported as
`dho.runtime.pyfunc_model`. Environment variable DHO_THREADS sets ONNX Runtime's threads (unset: all cores).
"""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel
from PIL import Image

# Two versions loaded into one process (candidate beside champion) must not share the first one's pixels: MLflow puts
# each package's code folder in front of sys.path, but Python would not look there again for a name that it already
# knows.
sys.modules.pop("dho_runtime", None)
import dho_runtime  # noqa: E402

COLUMNS = ("label", "probability", "top_labels", "top_probabilities", "error")
HEAD_COLUMNS = {dho_runtime.head_source(head): head for head in dho_runtime.HEADS}
ON_ERROR = ("raise", "null")
MAX_IMAGES = 10_000
"""Most images in one call: a server holds a whole request in memory."""


class StudentModel(PythonModel):
    """Decode, crop the centre, resize, normalise, run both heads, mix them (Eq. 8)."""

    def load_context(self, context: Any) -> None:
        """Read `package.json` and open the network on the CPU."""
        self.package: dict[str, Any] = json.loads(Path(context.artifacts["package"]).read_text(encoding="utf-8"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ.get("DHO_THREADS", "0"))
        self.session = onnxruntime.InferenceSession(
            context.artifacts["student"], options, providers=["CPUExecutionProvider"]
        )

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:  # noqa: ARG002
        """Classify encoded images.

        Args:
            context: MLflow's; unused, `load_context` has read it.
            model_input: column `image`, one image per row: its encoded bytes, their base64 as text or bytes, a
                `pathlib.Path`, or an array uint8 [height, width] (grey) or [height, width, 3 or 4] (RGB, RGBA). Text is
                never taken for a path: whoever may send a request could then read the server's files.
            params: `alpha` in 0-1, `beta` > 0 (default: the tuned values), `top_k` (more than there are classes means
                all), `batch_size` (images decoded and run at a time), `on_error` ("raise" or "null"), `heads` (True
                adds each head alone).

        Returns:
            One row per image, with `model_input`'s index: label (str), probability (float64), top_labels (list of str)
            and top_probabilities (list of float), most probable first, and error (str, None where the image was
            answered). A refused image has None everywhere else; `probability` is then of dtype object, since NaN is not
            JSON. With `heads` also ce_head and kd_head, each head's own probabilities (list of float, in the order of
            the metadata's `class_names`; kd_head at temperature beta; None for a head that the student does not have).

        Raises:
            MlflowException: a parameter is not allowed, alpha gives weight to a head that this student does not have,
                more than `MAX_IMAGES` images, or an image cannot be used and on_error is "raise" (the message names the
                row, counted from 0). A server answers status 400.
        """
        settings = self._settings(params or {})
        if len(model_input) == 1 and isinstance(model_input["image"].iloc[0], list):
            # {"image": [text, text]} reaches us as one cell that holds the list.
            model_input = pd.DataFrame({"image": pd.Series(model_input["image"].iloc[0], dtype=object)})
        images = list(model_input["image"])
        if len(images) > MAX_IMAGES:
            raise MlflowException.invalid_parameter_value(
                f"{len(images)} images in one call; send at most {MAX_IMAGES} at a time"
            )
        rows: list[dict[str, Any]] = []
        for start in range(0, len(images), settings["batch_size"]):
            rows += self._answer(images[start : start + settings["batch_size"]], start, settings)
        columns = (*COLUMNS, *HEAD_COLUMNS) if settings["heads"] else COLUMNS
        table = pd.DataFrame({name: pd.Series([row[name] for row in rows], dtype=object) for name in columns})
        if not table["probability"].isna().any():
            table["probability"] = table["probability"].astype("float64")
        return table.set_index(model_input.index)

    def _settings(self, params: dict[str, Any]) -> dict[str, Any]:
        defaults = {
            "alpha": self.package["alpha"],
            "beta": self.package["beta"],
            "top_k": 5,
            "batch_size": 64,
            "on_error": "raise",
            "heads": False,
        }
        settings = defaults | params
        checks = (
            ("alpha", 0 <= settings["alpha"] <= 1, "a number from 0 to 1"),
            ("beta", 0 < settings["beta"] < float("inf"), "a number > 0"),
            ("top_k", settings["top_k"] >= 1, "a whole number >= 1"),
            ("batch_size", settings["batch_size"] >= 1, "a whole number >= 1"),
            ("on_error", settings["on_error"] in ON_ERROR, "one of " + ", ".join(ON_ERROR)),
        )
        for name, allowed, expected in checks:
            if not allowed:
                raise MlflowException.invalid_parameter_value(f"{name} is {settings[name]!r}; expected {expected}")
        return settings

    def _answer(self, images: list[Any], start: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
        """Rows for one batch, of which the first image is row `start`."""
        rows: list[dict[str, Any]] = [dict.fromkeys((*COLUMNS, *HEAD_COLUMNS)) for _ in images]
        good: list[int] = []
        pixels: list[npt.NDArray[np.uint8]] = []
        for i, value in enumerate(images):
            try:
                pixels.append(self._pixels(value))
                good.append(i)
            except dho_runtime.ImageRejected as error:
                if settings["on_error"] == "raise":
                    raise MlflowException.invalid_parameter_value(
                        f"row {start + i}: {error}; with params on_error='null' the other rows are answered"
                    ) from error
                rows[i]["error"] = str(error)
        if not good:
            return rows
        logits = self._logits(np.stack(pixels))
        try:
            ce, kd = (logits.get(head) for head in dho_runtime.HEADS)
            probabilities = dho_runtime.mix(ce, kd, settings["alpha"], settings["beta"])
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        names = self.package["class_names"]
        for i, row in zip(good, probabilities, strict=True):
            top = np.argsort(-row, kind="stable")[: settings["top_k"]]
            labels, values = [names[k] for k in top], [float(row[k]) for k in top]
            rows[i] |= {"label": labels[0], "probability": values[0], "top_labels": labels, "top_probabilities": values}
        if settings["heads"]:
            for column, head in HEAD_COLUMNS.items():
                if head in logits:
                    alone = dho_runtime.head_probabilities(head, logits[head], settings["beta"])
                    for i, row in zip(good, alone, strict=True):
                        rows[i][column] = row.tolist()
        return rows

    def _pixels(self, value: Any) -> npt.NDArray[np.uint8]:
        """One cell of the column `image` -> uint8 [size, size, 3]; raises `ImageRejected`."""
        image = (
            _from_array(value)
            if isinstance(value, np.ndarray)
            else dho_runtime.decode(_encoded(value), self.package["max_pixels"])
        )
        box = dho_runtime.centre_box(*image.size)
        return dho_runtime.render(image, box, self.package["input_size"], self.package["interpolation"])  # type: ignore[no-any-return]

    def _logits(self, pixels: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
        """uint8 [n, size, size, 3] -> float32 [n, classes] of every head."""
        heads = self.package["heads"]
        images = dho_runtime.normalise(pixels, self.package["mean"], self.package["std"])
        return dict(zip(heads, self.session.run(heads, {"images": images}), strict=True))


def _encoded(value: Any) -> bytes:
    """The bytes of an encoded image, from bytes, base64 or a `Path`."""
    if isinstance(value, Path):
        try:
            return value.read_bytes()
        except OSError as error:
            raise dho_runtime.ImageRejected(f"{value}: {error.strerror}") from error
    if not isinstance(value, str | bytes | bytearray | memoryview):
        kind = "nothing" if value is None or value is pd.NA or isinstance(value, float) else type(value).__name__
        raise dho_runtime.ImageRejected(f"{kind} where the bytes of an image were expected")
    data = value if isinstance(value, str) else bytes(value)
    # MLflow's server undoes base64 in `dataframe_records` and `dataframe_split`, but not in `inputs` and `instances`.
    # No image is valid base64: the header of every format has bytes outside its alphabet.
    try:
        text = data if isinstance(data, str) else data.decode("ascii")
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        if isinstance(data, str):
            raise dho_runtime.ImageRejected("text that is not base64 (a path is given as pathlib.Path)") from error
        return data


def _from_array(array: npt.NDArray[Any]) -> Image.Image:
    """An upright RGB image from pixels."""
    if (
        array.dtype != np.uint8
        or array.size == 0
        or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4)))
    ):
        raise dho_runtime.ImageRejected(
            f"array {array.dtype} {list(array.shape)}; expected uint8 [height, width] or [height, width, 3 or 4]"
        )
    return dho_runtime.to_rgb(Image.fromarray(array))  # type: ignore[no-any-return]


set_model(StudentModel())
