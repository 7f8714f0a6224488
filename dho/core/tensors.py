"""Safetensors files that are whole or absent; not in `dho/core/files.py`, which is used where torch is not imported."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dho.core.files import replacing


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all.

    Args:
        path: the file; its folder is made if need be.
        tensors: on the CPU, of any shape and dtype; stored contiguous.
        metadata: text beside them.

    Raises:
        OSError: the disk is full, or the system refuses.
    """
    with replacing(path) as temporary:
        try:
            save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: {error}") from error
