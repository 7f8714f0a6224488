"""Start this same command again under torchrun: one process a GPU, or as many as `launch.processes` says.

In a pod the training operator has already said how many nodes and processes there are (PET_* variables, which torchrun reads); the manifest
says how many CPUs it asks for (CPUS).
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

from dho.config import Config

RESTARTS = "3"
"""How often torchrun starts a node's processes again in place, before the pod ends and Kubernetes starts that again."""


def under_torchrun() -> bool:
    """Whether this process is one that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def exec_torchrun(config: Config, arguments: list[str]) -> None:
    """Replace this process by torchrun running `python -m dho <arguments>`; signals then reach torchrun itself."""
    command = [sys.executable, "-m", "torch.distributed.run"]
    if "PET_NNODES" in os.environ:
        _in_pod(os.environ)
    else:
        command += ["--standalone", "--nproc-per-node", str(config.launch.processes or _devices())]
    sys.stdout.flush()
    os.execv(sys.executable, [*command, "-m", "dho", *arguments])


def _in_pod(environment: MutableMapping[str, str]) -> None:
    """Settings of torchrun in a pod, where the training operator's leave them open."""
    if master := environment.get("PET_MASTER_ADDR"):
        # The static rendezvous that torchrun would take meets once: a pod that starts again before the others have noticed talks to
        # the old round and waits for ever. This one meets anew, however often.
        environment.setdefault("PET_RDZV_BACKEND", "c10d")
        environment.setdefault("PET_RDZV_ENDPOINT", f"{master}:{environment['PET_MASTER_PORT']}")
        environment.setdefault("PET_RDZV_ID", master)
        environment.setdefault("PET_MAX_RESTARTS", RESTARTS)
        environment.pop("PET_NODE_RANK", None)  # its members agree on that
    environment.setdefault(
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1"
    )  # else a node that comes back ends the job (DistStoreError)
    if cpus := environment.get("CPUS"):
        # Left to itself torch starts a thread for each core of the node, however few of them this pod was given.
        processes = int(environment.get("PET_NPROC_PER_NODE", "1"))
        environment.setdefault("OMP_NUM_THREADS", str(max(1, int(cpus) // processes)))


def _devices() -> int:
    import torch

    return max(1, torch.cuda.device_count())
