"""Where the stages' files are, as `dvc.yaml` names them; relative to the folder that holds `params.yaml`."""

from __future__ import annotations

from pathlib import Path

RAW = Path("data/raw")
PREPARED = Path("data/prepared")
PRETRAINED = Path("data/pretrained")
STORE = Path("data/teacher")
TRAINED = Path("outputs/train")
EVALUATED = Path("outputs/evaluate")
REGISTERED = Path("outputs/register.json")
CHECKPOINTS = Path("checkpoints")
"""Not an output: checkpoints, metrics that MLflow has not got yet, and in a cluster what the pods of a job share."""
UNSENT = CHECKPOINTS / "unsent"
