"""Starting a stage under torchrun: one process per GPU, or as many as `launch.processes` says.

In a pod the training operator has already set how many nodes and processes there are (PET_* variables, which torchrun
reads); the manifest sets the number of CPUs that the pod requests (CPUS).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

import yaml

from dho.config import Config, to_dict
from dho.core.errors import INTERRUPTED, STOPPED, DhoError
from dho.core.workspace import Workspace

RESTARTS = "3"
"""How often torchrun restarts a node's processes in place; after that the pod ends, and Kubernetes restarts it."""


def exec_torchrun(config: Config, words: list[str]) -> None:
    """Replace this process by torchrun running `python -m dho <words>`; signals then reach torchrun itself."""
    sys.stdout.flush()
    os.execv(sys.executable, [*_torchrun(config), "-m", "dho", *words])


def run_torchrun(config: Config, workspace: Workspace, words: list[str]) -> bool:
    """Run `python -m dho <words>` with this config and workspace under torchrun, and wait for its end.

    Returns:
        False when it was stopped by a signal, True when it finished.

    Raises:
        DhoError: it failed; its standard error says why.
    """
    with tempfile.TemporaryDirectory() as folder:
        params = Path(folder) / "params.yaml"
        params.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
        places = [word for name, path in workspace.elsewhere.items() for word in ("--at", f"{name}={path.resolve()}")]
        command = [*_torchrun(config), "-m", "dho", *words, "--params", str(params), *places]
        status = subprocess.run(command, cwd=workspace.root, check=False).returncode
    if status in (STOPPED, INTERRUPTED):
        return False
    if status:
        raise DhoError(f"{words[0]} ended with status {status} under torchrun; its error is above")
    return True


def processes(config: Config) -> int:
    """Return the number of processes on this machine: `launch.processes`, else one per GPU, else 1."""
    if config.launch.processes is not None:
        return config.launch.processes
    import torch

    return max(1, torch.cuda.device_count())


def _torchrun(config: Config) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run"]
    if "PET_NNODES" in os.environ:
        _in_pod(os.environ)
        return command
    return [*command, "--standalone", "--nproc-per-node", str(processes(config))]


def _in_pod(environment: MutableMapping[str, str]) -> None:
    """Choose the settings of torchrun in a pod that the training operator leaves open."""
    if master := environment.get("PET_MASTER_ADDR"):
        # torchrun's default is a static rendezvous, which happens once: a pod that restarts before the others have
        # noticed joins the old round and waits for ever. This one can be repeated.
        environment.setdefault("PET_RDZV_BACKEND", "c10d")
        environment.setdefault("PET_RDZV_ENDPOINT", f"{master}:{environment['PET_MASTER_PORT']}")
        environment.setdefault("PET_RDZV_ID", master)
        environment.setdefault("PET_MAX_RESTARTS", RESTARTS)
        environment.pop("PET_NODE_RANK", None)  # the members of a rendezvous agree on that themselves
    # Otherwise a node that comes back ends the job (DistStoreError).
    environment.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if cpus := environment.get("CPUS"):
        # By default torch starts a thread for each core of the node, however few of them this pod was given.
        per_node = int(environment.get("PET_NPROC_PER_NODE", "1"))
        environment.setdefault("OMP_NUM_THREADS", str(max(1, int(cpus) // per_node)))
