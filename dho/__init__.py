"""Dual-Head Optimization (arXiv 2505.07675): few labels, many unlabelled images, a large teacher, a small fast student.

    import dho

    config, workspace = dho.load("params.yaml"), dho.Workspace(".")
    dho.run_all(config, workspace)                # every stage; or one: dho.run("train", config, workspace)
    student, info = dho.load_student(workspace.student)
    decision = dho.promote(config, workspace)

Importing this package imports neither torch nor MLflow and changes nothing in the environment: each name is imported
when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Config": "dho.config:Config",
    "DhoError": "dho.core.errors:DhoError",
    "Workspace": "dho.core.workspace:Workspace",
    "from_dict": "dho.config:from_dict",
    "load": "dho.config:load",
    "load_student": "dho.student.saved:load_student",
    "list_classifiers": "dho.catalogue.teachers:list_classifiers",
    "list_data_sets": "dho.catalogue.datasets:list_data_sets",
    "list_methods": "dho.catalogue.methods:list_methods",
    "predict": "dho.evaluation.predict:predict",
    "promote": "dho.registry.promote:promote",
    "rollback": "dho.registry.promote:rollback",
    "run": "dho.stages:run",
    "run_all": "dho.stages:run_all",
    # The stages themselves, for callers who are a process of a job already; `run` chooses where a stage runs.
    "fetch": "dho.data.fetch:fetch",
    "prepare": "dho.data.prepare:prepare",
    "pretrain": "dho.teacher.pretrain:pretrain",
    "teach": "dho.teacher.teach:teach",
    "train": "dho.training.train:train",
    "evaluate": "dho.evaluation.evaluate:evaluate",
    "register": "dho.registry.register:register",
}
"""Name -> "module:name"."""

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dho' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
