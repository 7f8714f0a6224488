"""Methods of training, by the name that `train.method` gives."""

from __future__ import annotations

from dataclasses import dataclass

from dho.catalogue import Row


@dataclass(frozen=True)
class MethodRow(Row):
    """One method: a subclass of `dho.methods.base.Method`."""

    arguments: str | None = None
    """Frozen dataclass of the method's own settings (`train.method_args`), as "module:Class"."""


METHODS = {
    "dho": MethodRow("dho.methods.dual_head:DualHead", "two heads"),
    "ce": MethodRow("dho.methods.single_head:LabelledOnly", "labelled only"),
    "kd": MethodRow("dho.methods.single_head:TeacherOnly", "teacher only"),
    "ce_kd": MethodRow("dho.methods.single_head:SingleHead", "both losses on one head"),
}


def list_methods() -> dict[str, str]:
    """Return the methods by name, each with what it is."""
    return {name: row.doc for name, row in METHODS.items()}
