"""The data sets dho knows by name: their classes, prompts, licence and files. A new data set is a new entry here."""

from __future__ import annotations

from dataclasses import dataclass, field

from dho.config import DataConfig
from dho.core.errors import ConfigError


@dataclass(frozen=True)
class Entry:
    """One data set of the catalogue."""

    name: str
    class_names: tuple[str, ...]
    """In label order; empty where the user's folder names them."""
    templates: tuple[str, ...]
    """Prompt templates for zero-shot text weights, one {} each."""
    licence: str
    home: str = ""
    """Address that the files' names are appended to."""
    debian_package: str = ""
    debian_folder: str = ""
    """Folder inside the package that holds the files."""
    files: dict[str, str] = field(default_factory=dict)
    """Name of each file without `.gz` -> SHA-256 of its uncompressed content."""


FASHION_MNIST = Entry(
    name="fashion_mnist",
    class_names=("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    templates=("a photo of a {}.", "a product photo of a {}.", "a picture of a {}."),
    licence="MIT (Zalando Research)",
    home="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    debian_package="dataset-fashion-mnist",
    debian_folder="usr/share/datasets/fashion-mnist",
    files={
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
)

FOLDER = Entry(name="folder", class_names=(), templates=("a photo of a {}.",), licence="the user's own")

CATALOGUE = {entry.name: entry for entry in (FASHION_MNIST, FOLDER)}


def entry(config: DataConfig) -> Entry:
    """The catalogue entry that `data.name` names."""
    return CATALOGUE[config.name]


def templates(config: DataConfig) -> list[str]:
    """Prompt templates: `data.templates`, or the catalogue's."""
    return config.templates if config.templates is not None else list(entry(config).templates)


def class_names(config: DataConfig, found: list[str] | None = None) -> list[str]:
    """Class names in label order: `data.class_names`, or the catalogue's, or (for `folder`) those `found` in the images' labels.

    Raises:
        ConfigError: `data.class_names` has another number of names than the data set has classes.
    """
    known = list(entry(config).class_names)
    if config.class_names is None:
        return known or sorted(found or [])
    if known and len(config.class_names) != len(known):
        raise ConfigError(
            f"data.class_names has {len(config.class_names)} names; {config.name} has {len(known)} classes"
        )
    return config.class_names
