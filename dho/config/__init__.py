"""`params.yaml` as frozen dataclasses: the record of the experiment.

    config = load("params.yaml")
    config.train.lambda_ce

A value that is not allowed stops the program at load, with one line that names the key, the value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from dho.config.checks import check_together
from dho.config.schema import (
    Config,
    DataConfig,
    EvaluateConfig,
    KubernetesConfig,
    LaunchConfig,
    PretrainConfig,
    RegistryConfig,
    RulesConfig,
    SplitsConfig,
    StudentConfig,
    TeacherConfig,
    TrackingConfig,
    TrainConfig,
    ViewsConfig,
)
from dho.config.settings import build, mapping_keys
from dho.core.errors import ConfigError

__all__ = [
    "Config",
    "DataConfig",
    "EvaluateConfig",
    "KubernetesConfig",
    "LaunchConfig",
    "PretrainConfig",
    "RegistryConfig",
    "RulesConfig",
    "SplitsConfig",
    "StudentConfig",
    "TeacherConfig",
    "TrackingConfig",
    "TrainConfig",
    "ViewsConfig",
    "digest",
    "flatten",
    "from_dict",
    "load",
    "to_dict",
]

_MAPPINGS = mapping_keys(Config)


def load(path: str | Path = "params.yaml") -> Config:
    """Read and validate a parameter file.

    Raises:
        ConfigError: the file is missing or not YAML, or a key or value is not allowed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); run dho in the folder that holds params.yaml, or give --params"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    return from_dict(tree, where=str(path))


def from_dict(tree: Any, where: str = "params") -> Config:
    """Validate a nested dict of parameters.

    Args:
        tree: as `params.yaml` holds them; absent keys take their defaults.
        where: file, for messages.

    Raises:
        ConfigError: a key or value is not allowed, or settings contradict each other.
    """
    config: Config = build(Config, tree, "", where)
    check_together(config, where)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config, or one of its sections, as nested plain dicts."""
    return dataclasses.asdict(config)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested parameters under dotted names, by which MLflow and error messages know them.

        flatten({"train": {"eta": 2}})                       # {"train.eta": 2}

    A setting whose value is a mapping of the user's own keys (`student.model_args`) stays whole.
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and name not in _MAPPINGS:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def digest(tree: Any) -> str:
    """Return the SHA-256 (hex) of any JSON-serialisable value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
