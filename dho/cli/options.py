"""Options that several commands share, and the groups that `dho --help` shows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

WORKFLOW, MODELS, CLUSTER, SHOW = "Workflow", "Models", "Cluster", "Show"

PARAMS = Path("params.yaml")
Params = Annotated[Path, typer.Option("--params", help="Parameter file.")]
Namespace = Annotated[
    str | None, typer.Option("--namespace", "-n", help="Namespace of the jobs; default: launch.kubernetes.namespace.")
]
