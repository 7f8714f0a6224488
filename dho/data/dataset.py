"""What `data.name` stands for: the catalogue's row, and the class names and prompts that params.yaml may replace."""

from __future__ import annotations

from collections.abc import Sequence

from dho.catalogue.datasets import DataSet, find_data_set
from dho.config import DataConfig
from dho.core.errors import ConfigError


def data_set(config: DataConfig) -> DataSet:
    """Return the row of the catalogue, or of the user's own, that `data.name` names; raises `ConfigError`."""
    return find_data_set(config.name)


def templates(config: DataConfig) -> list[str]:
    """Return the prompt templates: `data.templates`, or the catalogue's."""
    return config.templates if config.templates is not None else list(data_set(config).templates)


def class_names(config: DataConfig, from_images: Sequence[str] = ()) -> list[str]:
    """Return the class names in label order: `data.class_names`, or the catalogue's, or those `from_images`.

    Raises:
        ConfigError: `data.class_names` has another number of names than the data set has classes.
    """
    row = data_set(config)
    if config.class_names is None:
        return list(row.class_names or from_images)
    if row.class_names and len(config.class_names) != len(row.class_names):
        raise ConfigError(
            f"data.class_names has {len(config.class_names)} names; {row.name} has {len(row.class_names)} classes"
        )
    return config.class_names
