"""The folders of the workflow, in one place.

    workspace = Workspace("projects/shoes")
    workspace.prepared                           # Path("projects/shoes/data/prepared")
    workspace.cell("ce_kd-16-0").trained         # a place of its own for one run of a comparison
    workspace.at(teacher="/volumes/teacher")     # the same workspace with one folder elsewhere

Every stage reads and writes through a `Workspace`; nothing else spells a path.
"""

from __future__ import annotations

from pathlib import Path

FOLDERS = {
    "raw": "data/raw",
    "prepared": "data/prepared",
    "pretrained": "data/pretrained",
    "teacher": "data/teacher",
    "trained": "outputs/train",
    "evaluated": "outputs/evaluate",
    "registered": "outputs/register.json",
    "checkpoints": "checkpoints",
}
"""Attribute of a workspace -> path relative to its root, as `dvc.yaml` names it."""


class Workspace:
    """A project's folder and what the stages keep in it.

    Args:
        root: the folder that holds `params.yaml`.
        elsewhere: folders that are not at their usual place under the root, by the names in `FOLDERS`.

    Attributes:
        root, elsewhere: as given.
        raw: raw files, written by `fetch`.
        prepared: tar shards and the index, written by `prepare`.
        pretrained: the stand-in teacher, written by `pretrain`.
        teacher: the teacher store, written by `teach`.
        trained: student, head outputs and history, written by `train`.
        evaluated: metrics and plots, written by `evaluate`.
        registered: the file that says which model version was registered, written by `register`.
        checkpoints: checkpoints, unsent metrics and, on a cluster, what the pods of a job share; no output of a stage.

    Raises:
        TypeError: `elsewhere` names a folder that is not in `FOLDERS`.
    """

    raw: Path
    prepared: Path
    pretrained: Path
    teacher: Path
    trained: Path
    evaluated: Path
    registered: Path
    checkpoints: Path

    def __init__(self, root: Path | str = ".", **elsewhere: Path | str) -> None:
        if unknown := sorted(set(elsewhere) - set(FOLDERS)):
            raise TypeError(f"a workspace has no folder {unknown[0]!r}; its folders are {', '.join(FOLDERS)}")
        self.root = Path(root)
        self.elsewhere = {name: Path(path) for name, path in elsewhere.items()}
        for name, path in FOLDERS.items():
            setattr(self, name, self.elsewhere.get(name, self.root / path))

    @property
    def params(self) -> Path:
        """Return the parameter file."""
        return self.root / "params.yaml"

    @property
    def student(self) -> Path:
        """Return the trained student's folder."""
        return self.trained / "student"

    @property
    def head_outputs(self) -> Path:
        """Return the folder of the student's logits on val and test."""
        return self.trained / "head_outputs"

    @property
    def history(self) -> Path:
        """Return the CSV file with one row per epoch of the training."""
        return self.trained / "history.csv"

    @property
    def metrics(self) -> Path:
        """Return the file of what `evaluate` measured."""
        return self.evaluated / "metrics.json"

    @property
    def plots(self) -> Path:
        """Return the folder of what `evaluate` drew."""
        return self.evaluated / "plots"

    @property
    def unsent(self) -> Path:
        """Return the folder of metrics that MLflow does not have yet."""
        return self.checkpoints / "unsent"

    def at(self, **elsewhere: Path | str) -> Workspace:
        """Return the same workspace with some folders elsewhere; raises `TypeError` as the constructor does."""
        return Workspace(self.root, **{**self.elsewhere, **elsewhere})

    def cell(self, name: str) -> Workspace:
        """Return the workspace of one run of a comparison.

        It shares data and teacher with this one and has its own `trained`, `evaluated` and `registered`.
        """
        folder = self.root / "outputs" / "cells" / name
        return self.at(trained=folder / "train", evaluated=folder / "evaluate", registered=folder / "register.json")

    def __repr__(self) -> str:
        return f"Workspace({str(self.root)!r})"
