"""A student on disk: a folder with two files.

`model.safetensors` holds the weights, `student.json` what is needed to build the student and to name its classes.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from dho.config import StudentConfig
from dho.core.errors import DataError
from dho.core.files import write_atomically
from dho.core.tensors import write_tensors
from dho.student.model import Student


@dataclass(frozen=True)
class StudentInfo:
    """Content of `student.json`."""

    student: dict[str, Any]
    """The `student` section of the parameters."""
    heads: list[str]
    class_names: list[str]
    method: str
    run_id: str
    """MLflow run that trained it."""
    steps: int
    fingerprints: dict[str, str]
    """SHA-256 of the data set, the teacher store and the parameters it was trained with."""


def save_student(folder: Path, student: Student, info: StudentInfo) -> None:
    """Write the two files of a student; `student.json` comes last, so a folder that holds it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(
        folder / "model.safetensors", {name: value.detach().cpu() for name, value in student.state_dict().items()}
    )
    write_atomically(folder / "student.json", json.dumps(dataclasses.asdict(info), indent=2) + "\n")


def load_student(folder: Path) -> tuple[Student, StudentInfo]:
    """Read a student, in eval mode on the CPU, and its `student.json`.

    Raises:
        DataError: the folder holds no student.
    """
    try:
        info = StudentInfo(**json.loads((folder / "student.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{folder}: no student here ({error}); run the train stage first") from error
    config = StudentConfig(**{**info.student, "pretrained": False})
    student = Student(config, len(info.class_names), tuple(info.heads))
    student.load_state_dict(load_file(folder / "model.safetensors"))
    return student.eval(), info
