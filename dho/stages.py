"""The story as a table: the stages of the workflow, what each reads and writes, and where it may run.

    run("train", load("params.yaml"), Workspace("."))

`dvc.yaml`, the command line, pipelines/ and what a cluster's job needs follow from this table or are tested against it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from dho.catalogue import resolve
from dho.catalogue.targets import TARGETS
from dho.config import Config, load
from dho.core.environment import under_torchrun
from dho.core.errors import STOPPED, one_line_errors
from dho.core.workspace import Workspace


@dataclass(frozen=True)
class Stage:
    """One stage."""

    name: str
    title: str
    """What it makes, in one line."""
    function: str
    """`(config, workspace)`, and with `torchrun` also `process`, as "module:function"."""
    reads: tuple[str, ...]
    """What of the workspace it reads: attributes of `Workspace`."""
    writes: tuple[str, ...]
    code: tuple[str, ...]
    """Rooms of dho/ whose change makes it run again."""
    params: tuple[str, ...]
    """Settings, or sections of them, whose change makes it run again."""
    torchrun: bool = False
    """Whether it runs as several processes, one per GPU."""
    cluster: bool = False
    """Whether it can be a job on a cluster."""


_BASE = ("catalogue", "config", "core")

STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "fetch",
            "Raw files of the data set, by whichever way works, checked by SHA-256",
            "dho.data.fetch:fetch",
            reads=(),
            writes=("raw",),
            code=(*_BASE, "data", "runtime"),
            params=(
                "data.captions",
                "data.class_names",
                "data.labels",
                "data.name",
                "data.source",
                "data.test",
                "data.val",
            ),
        ),
        Stage(
            "prepare",
            "Every image checked, splits drawn, tar shards and one index",
            "dho.data.prepare:prepare",
            reads=("raw",),
            writes=("prepared",),
            code=(*_BASE, "data", "runtime"),
            params=(
                "data.class_names",
                "data.max_pixels",
                "data.max_rejected",
                "data.name",
                "data.on_leak",
                "data.shard_images",
                "data.source",
                "data.splits",
            ),
        ),
        Stage(
            "pretrain",
            "The stand-in teacher, from images and captions; nothing where a real teacher is set",
            "dho.teacher.pretrain:pretrain",
            reads=("prepared",),
            writes=("pretrained",),
            code=(*_BASE, "data", "runtime", "teacher"),
            params=("pretrain", "views"),
        ),
        Stage(
            "teach",
            "The teacher store: embeddings of every (image, view), and text weights",
            "dho.teacher.teach:teach",
            reads=("prepared", "pretrained"),
            writes=("teacher",),
            code=(*_BASE, "data", "runtime", "teacher"),
            params=("data.templates", "teacher", "views"),
            torchrun=True,
            cluster=True,
        ),
        Stage(
            "train",
            "The student, on both streams",
            "dho.training.train:train",
            reads=("prepared", "teacher"),
            writes=("student", "head_outputs", "history"),
            code=(
                *_BASE,
                "data",
                "evaluation",
                "methods",
                "runtime",
                "student",
                "teacher",
                "tracking",
                "training",
            ),
            params=("student", "teacher.classifier", "teacher.model", "teacher.pretrained", "train", "views"),
            torchrun=True,
            cluster=True,
        ),
        Stage(
            "evaluate",
            "alpha and beta on val, metrics of both heads, plots",
            "dho.evaluation.evaluate:evaluate",
            reads=("prepared", "teacher", "student", "head_outputs", "history"),
            writes=("metrics", "plots"),
            code=(*_BASE, "data", "evaluation", "runtime", "student", "teacher", "tracking"),
            params=("evaluate", "teacher.classifier"),
        ),
        Stage(
            "register",
            "A version in the model registry, alias candidate",
            "dho.registry.register:register",
            reads=("prepared", "teacher", "student", "metrics", "plots"),
            writes=("registered",),
            code=(
                *_BASE,
                "data",
                "evaluation",
                "registry",
                "runtime",
                "student",
                "teacher",
                "tracking",
            ),
            params=("data.max_pixels", "evaluate.ece_bins", "registry"),
        ),
    )
}
"""Name -> stage, in the order of the story."""


def run(name: str, config: Config, workspace: Workspace, **options: Any) -> Any:
    """Run a stage where `launch.target` says.

    Args:
        name: of the stage.
        config: all parameters.
        workspace: where it reads and writes.
        options: of the stage's function, and those of `run_here`.

    Returns:
        What the stage's function returns; False for a training that was stopped by a signal.

    Raises:
        DhoError: something the user can fix.
    """
    target = config.launch.target if STAGES[name].cluster else "local"
    return resolve(TARGETS[target].implementation)(name, config, workspace, **options)


def run_all(config: Config, workspace: Workspace) -> None:
    """Run every stage in the order of the story, whether out of date or not; `dvc repro` runs what is out of date.

    Raises:
        DhoError: something the user can fix, or a training was stopped.
    """
    for name in STAGES:
        if run(name, config, workspace) is False:
            raise KeyboardInterrupt(f"{name} was stopped")


def run_here(name: str, config: Config, workspace: Workspace, again: list[str] | None = None, **options: Any) -> Any:
    """Run a stage on this machine: in this process, or under torchrun with one process per GPU.

    Args:
        name, config, workspace: as `run`.
        again: the words after `dho` that run this very stage again; for a stage under torchrun, torchrun then replaces
            this process to run them. Without them a stage of one process runs in this one, and more are waited for.
        options: of the stage's function.

    Raises:
        DhoError: as `run`.
    """
    stage = STAGES[name]
    function = resolve(stage.function)
    if not stage.torchrun:
        return function(config, workspace, **options)

    from dho.training.torchrun import exec_torchrun, processes, run_torchrun

    if not under_torchrun() and again is not None:
        exec_torchrun(config, again)
    if not under_torchrun() and processes(config) > 1:
        return run_torchrun(config, workspace, words(name, options))

    from dho.core.process import process_group

    with process_group() as process:
        return function(config, workspace, process, **options)


def words(name: str, options: dict[str, Any]) -> list[str]:
    """Return the words after `dho` that run a stage with options of its function, which are switches."""
    return [name, *(f"--{option}" for option, on in options.items() if on)]


def script(name: str, **options: Any) -> None:
    """Run a stage of the project in the present folder, as `dvc repro` does by pipelines/; errors are one line.

    Exits with `STOPPED` after a training that was told to stop.
    """
    with one_line_errors():
        if run(name, load(), Workspace(), again=words(name, options), **options) is False:
            sys.exit(STOPPED)
