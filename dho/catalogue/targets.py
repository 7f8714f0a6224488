"""Where stages run, by the name that `launch.target` gives."""

from __future__ import annotations

from dho.catalogue import Row

TARGETS = {
    "local": Row("dho.stages:run_here", "this machine"),
    "kubernetes": Row("dho.cluster.launcher:run_stage", "a job on a cluster, for the stages that can be one"),
}
"""Each is a function (stage name, config, workspace, **options)."""
