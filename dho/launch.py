"""Start this same command again under torchrun: one process a GPU, or as many as `launch.processes` says.

In a pod the training operator has already said how many nodes and processes there are (PET_* variables, which torchrun reads); the manifest
says how many CPUs it asks for (CPUS).
"""

from __future__ import annotations

import os
import sys

from dho.config import Config


def under_torchrun() -> bool:
    """Whether this process is one that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def exec_torchrun(config: Config, arguments: list[str]) -> None:
    """Replace this process by torchrun running `python -m dho <arguments>`; signals then reach torchrun itself."""
    command = [sys.executable, "-m", "torch.distributed.run"]
    if "PET_NNODES" not in os.environ:
        command += ["--standalone", "--nproc-per-node", str(config.launch.processes or _devices())]
    elif cpus := os.environ.get("CPUS"):
        # Left to itself torch starts a thread for each core of the node, however few of them this pod was given.
        processes = int(os.environ.get("PET_NPROC_PER_NODE", "1"))
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, int(cpus) // processes)))
    sys.stdout.flush()
    os.execv(sys.executable, [*command, "-m", "dho", *arguments])


def _devices() -> int:
    import torch

    return max(1, torch.cuda.device_count())
