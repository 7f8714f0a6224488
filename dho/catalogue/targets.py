"""Where stages run, by the name that `launch.target` gives."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TargetRow:
    """One place where a stage can run."""

    implementation: str
    """A function (stage name, config, workspace, **options), as "module:function"."""
    doc: str


TARGETS = {
    "local": TargetRow("dho.stages:run_here", "this machine"),
    "kubernetes": TargetRow("dho.cluster.launcher:run_stage", "a job on a cluster, for the stages that can be one"),
}
