"""Durable state of a training: all that is needed to resume it bit for bit, and nothing that is half-written.

A checkpoint is a folder `step-00000200/` with `model.safetensors`, `optimizer.safetensors`, `rng.safetensors`,
`state.json` (step, MLflow run id, epochs so far) and, written last, `manifest.json` with the SHA-256 of the others. It
is written under another name, flushed and renamed. One that fails its manifest is skipped with a warning, and the one
before it is used. No pickle anywhere.

Checkpoints of one training share a folder named by the digest of what makes it that training (parameters, data, store),
so with a changed parameter training starts from the beginning and never resumes from something else.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from dho.core.errors import CheckpointError
from dho.core.files import sha256_file, sync, write_atomically
from dho.core.process import Process, barrier
from dho.core.tensors import write_tensors

MANIFEST = "manifest.json"
MODEL, OPTIMIZER, RNG, STATE = "model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"


@dataclass
class State:
    """How far a training is; the position of both streams and of the schedules follows from `step`."""

    step: int = 0
    """Steps done."""
    run_id: str = ""
    """MLflow run, the same however often the training is restarted."""
    world_size: int = 1
    """Number of ranks that wrote it."""
    interval: dict[str, float] = field(default_factory=dict)
    """Sums of losses (mean over ranks) since the last logged step, so that their mean survives a restart."""
    interval_steps: int = 0
    """Number of steps in those sums."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One row per epoch: step and val metrics."""


class Checkpoints:
    """The checkpoints of one training.

    Args:
        folder: where they are; made if need be.
        keep: number of the newest ones that stay.

    Attributes:
        failing: whether the disk was full or away at the last save (rank 0).
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.failing = False

    def save(
        self,
        state: State,
        trainable: nn.Module,
        optimizer: torch.optim.Optimizer,
        process: Process,
        needed: bool = False,
    ) -> None:
        """Write the state after `state.step` steps; every rank must call, rank 0 writes.

        A disk that is full or away does not end the training: a warning says so once, the older checkpoints stay, and
        the next call tries again.

        Args:
            state: of the training.
            trainable, optimizer: whose tensors are written.
            process: this rank.
            needed: whether training cannot continue without this checkpoint.

        Raises:
            CheckpointError: the disk does not take a checkpoint that is `needed` (rank 0).
        """
        rng = _gather_rng(process)
        if process.is_main:
            try:
                self._write(state, trainable, optimizer, rng)
            except OSError as error:
                if needed:
                    raise CheckpointError(
                        f"{self.folder} cannot take a checkpoint ({error}); make room there and start again"
                    ) from error
                if not self.failing:
                    print(
                        f"warning: no checkpoint at step {state.step} ({error}); training continues, the next one will "
                        "be tried",
                        file=sys.stderr,
                    )
                self.failing = True
            else:
                if self.failing:
                    print(f"checkpoints are written again, from step {state.step}", file=sys.stderr)
                self.failing = False
        barrier()

    def _write(
        self, state: State, trainable: nn.Module, optimizer: torch.optim.Optimizer, rng: dict[str, Tensor]
    ) -> None:
        final = self.folder / f"step-{state.step:08d}"
        unfinished = self.folder / f".step-{state.step:08d}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            unfinished.mkdir(parents=True)
            write_tensors(
                unfinished / MODEL, {name: value.detach().cpu() for name, value in trainable.state_dict().items()}
            )
            write_tensors(unfinished / OPTIMIZER, _optimizer_tensors(optimizer, trainable))
            write_tensors(unfinished / RNG, rng)
            write_atomically(unfinished / STATE, json.dumps(asdict(state), indent=2) + "\n")
            digests = {name: sha256_file(unfinished / name) for name in (MODEL, OPTIMIZER, RNG, STATE)}
            write_atomically(unfinished / MANIFEST, json.dumps({"sha256": digests}, indent=2) + "\n")
            shutil.rmtree(final, ignore_errors=True)
            unfinished.replace(final)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise

        sync(self.folder)
        for old in self._all()[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)

    def latest(self) -> Path | None:
        """Return the newest checkpoint whose manifest holds; standard error names the broken ones."""
        for path in self._all():
            problem = broken(path)
            if problem is None:
                return path
            print(f"warning: checkpoint {path} is skipped: {problem}", file=sys.stderr)
        return None

    def load(self, path: Path, trainable: nn.Module, optimizer: torch.optim.Optimizer, process: Process) -> State:
        """Restore trainable, optimizer and this rank's random numbers from a checkpoint; every rank must call."""
        state = State(**json.loads((path / STATE).read_text()))
        trainable.load_state_dict(load_file(path / MODEL))
        _restore_optimizer(optimizer, trainable, load_file(path / OPTIMIZER))
        if state.world_size == process.world_size:
            _set_rng(load_file(path / RNG), process)
        elif process.is_main:
            print(
                f"note: {path} was written by {state.world_size} ranks, now there are {process.world_size}: "
                "random numbers start again",
                file=sys.stderr,
            )
        return state

    def remove(self) -> None:
        """Delete all of them; the training has finished and its results are elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), reverse=True)


def broken(path: Path) -> str | None:
    """Return why a checkpoint cannot be trusted, or None."""
    try:
        digests = json.loads((path / MANIFEST).read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return "it has no readable manifest"
    for name in (MODEL, OPTIMIZER, RNG, STATE):
        if name not in digests or not (path / name).exists():
            return f"{name} is missing"
        if sha256_file(path / name) != digests[name]:
            return f"{name} is not what the manifest says"
    return None


def _names(trainable: nn.Module) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in trainable.named_parameters()}


def _optimizer_tensors(optimizer: torch.optim.Optimizer, trainable: nn.Module) -> dict[str, Tensor]:
    names = _names(trainable)
    return {
        f"{names[parameter]}|{key}": torch.as_tensor(value).detach().cpu()
        for parameter, entries in optimizer.state.items()
        for key, value in entries.items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, trainable: nn.Module, tensors: dict[str, Tensor]) -> None:
    parameters = dict(trainable.named_parameters())
    for full_name, value in tensors.items():
        name, key = full_name.split("|")
        # AdamW keeps its step count on the host, the moments beside the parameter and in its memory order.
        parameter = parameters[name]
        if key != "step":
            value = torch.empty_like(parameter).copy_(value)
        optimizer.state[parameter][key] = value


def _gather_rng(process: Process) -> dict[str, Tensor]:
    """Return the random states of all ranks, uint8, by device and rank; every rank must call."""
    own_state = torch.get_rng_state()
    states = [torch.empty_like(own_state) for _ in range(process.world_size)]
    if process.world_size > 1:
        dist.all_gather(states, own_state)
    else:
        states = [own_state]
    result = {f"cpu.{rank}": state for rank, state in enumerate(states)}

    if process.device.type == "cuda":
        own_state = torch.cuda.get_rng_state(process.device)
        states = [torch.empty_like(own_state) for _ in range(process.world_size)]
        if process.world_size > 1:
            dist.all_gather(states, own_state)
        else:
            states = [own_state]
        result |= {f"cuda.{rank}": state for rank, state in enumerate(states)}
    return result


def _set_rng(states: dict[str, Tensor], process: Process) -> None:
    torch.set_rng_state(states[f"cpu.{process.rank}"])
    if process.device.type == "cuda" and f"cuda.{process.rank}" in states:
        torch.cuda.set_rng_state(states[f"cuda.{process.rank}"], process.device)
