"""Label image files with a trained student and torch, on this machine; downstream teams use the registered model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from dho.core.errors import DataError
from dho.core.workspace import Workspace
from dho.runtime.dho_runtime import ImageRejected, centre_box, decode, render
from dho.student.saved import load_student

Answer = list[tuple[str, float]]
"""(label, probability) pairs, most likely first."""


def predict(
    workspace: Workspace, images: list[Path], alpha: float | None = None, beta: float | None = None
) -> Iterator[tuple[Path, Answer | str]]:
    """Label image files one by one.

    Args:
        workspace: with what stages `train` and `evaluate` wrote.
        images: files.
        alpha, beta: of Eq. 8; None takes what `evaluate` chose on val.

    Yields:
        Each file with its answer, or with the reason why it cannot be read.

    Raises:
        DataError: there is no trained, evaluated student.
    """
    student, info = load_student(workspace.student)
    try:
        tuned = json.loads(workspace.metrics.read_text())
    except OSError as error:
        raise DataError(f"{workspace.metrics}: {error.strerror}; run the evaluate stage") from error
    alpha, beta = tuned["alpha"] if alpha is None else alpha, tuned["beta"] if beta is None else beta

    for path in images:
        try:
            image = decode(path.read_bytes())
        except OSError as error:
            yield path, error.strerror or "cannot be read"
            continue
        except ImageRejected as reason:
            yield path, str(reason)
            continue
        pixels = render(
            image, centre_box(image.width, image.height), student.config.input_size, student.config.interpolation
        )
        probabilities = student.predict(student.normalise(torch.tensor(pixels)[None]), alpha, beta)[0]
        order = probabilities.argsort(descending=True).tolist()
        yield path, [(info.class_names[number], float(probabilities[number])) for number in order]
