"""Where a run comes from: commit, lock file, machine, versions."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

from dho.core.files import sha256_file

log = logging.getLogger(__name__)


def provenance_tags(root: Path) -> dict[str, str]:
    """Return the tags that say what made a run.

    They are the git commit, whether the tree differs from it, the hash of `dvc.lock`, hardware and versions. The commit
    is that of the repository at `root`; in an image, which has none, environment variable GIT_COMMIT holds it.
    `dvc.lock` alone does not make the tree dirty: `dvc repro` rewrites it between stages, and its own hash is a tag.
    """
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    tags = {
        "hardware": ", ".join(f"{gpus.count(name)} x {name}" for name in sorted(set(gpus)))
        or f"{os.cpu_count()} x {_cpu_name()}",
        "version.dho": version("dho"),
        "version.torch": str(torch.__version__),
        "version.python": platform.python_version(),
    }

    commit = _git(root, "rev-parse", "HEAD") or os.environ.get("GIT_COMMIT")
    if commit:
        tags["mlflow.source.git.commit"] = commit
    else:
        log.warning(
            "%s: no git commit is known for this run; set GIT_COMMIT where there is no repository", root.resolve()
        )

    if (changes := _git(root, "status", "--porcelain", "--", ".", ":!dvc.lock")) is not None:
        tags["git.dirty"] = "true" if changes else "false"
    if (lock := root / "dvc.lock").is_file():
        tags["dvc.lock.sha256"] = sha256_file(lock)
    return tags


def _git(root: Path, *arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        if match := re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return match[1]
    return platform.processor() or platform.machine()
