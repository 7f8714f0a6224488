"""Data sets, by the name that `data.name` gives: their layout, classes, prompts, licence and files.

A new data set is one row here and, unless the images' folders name the classes, one file `classes/<name>.txt`, a class
per line:

    DataSet(
        name="oxford_pets",
        doc="37 breeds of cats and dogs",
        layout="coop",
        class_names=class_list("oxford_pets"),
        split_file="split_zhou_OxfordPets.json",
        image_folders=("images",),
    )
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources

from dho.catalogue import resolve
from dho.core.errors import ConfigError

LAYOUTS = {
    "folder": "dho.data.sources.folder:Folder",
    "arrays": "dho.data.sources.arrays:Arrays",
    "coop": "dho.data.sources.coop:Coop",
    "imagefolder": "dho.data.sources.imagefolder:ImageFolder",
}
"""Layout -> the `Source` that reads it, as "module:Class"."""
COOP_IMAGE_FOLDERS = ("", "images", "jpg", "101_ObjectCategories", "SUN397", "2750", "UCF-101-midframes")
"""Where CoOp's data sets keep their images, below the folder that holds the split file; "" is that folder itself."""


@dataclass(frozen=True)
class DataSet:
    """One data set."""

    name: str
    doc: str
    layout: str
    """A key of `LAYOUTS`, or a `Source` of the user's own as "module:Class"."""
    class_names: tuple[str, ...] = ()
    """In label order; empty where the user's images name them."""
    templates: tuple[str, ...] = ("a photo of a {}.",)
    """Prompt templates for zero-shot text weights, one {} each."""
    licence: str = "the user's own"
    home: str = ""
    """Address that the files' names are appended to."""
    debian_package: str = ""
    debian_folder: str = ""
    """Folder inside the package that holds the files."""
    files: dict[str, str] = field(default_factory=dict)
    """Name without `.gz` -> SHA-256 of the uncompressed content; empty where the images lie in `data.source`."""
    split_file: str = "split_zhou_*.json"
    """Layout `coop`: name, or pattern, of the one file in `data.source` that lists train, val and test."""
    image_folders: tuple[str, ...] = COOP_IMAGE_FOLDERS
    """Layout `coop`: folders below `data.source` that the listed paths may start from."""

    @property
    def reads_users_folder(self) -> bool:
        """Whether the images stay where the user has them, in `data.source`."""
        return not self.files


def class_list(name: str) -> tuple[str, ...]:
    """Read `classes/<name>.txt`, one class name per line, in label order; raises `OSError` where there is none."""
    text = (resources.files(__package__) / "classes" / f"{name}.txt").read_text(encoding="utf-8")
    return tuple(line.strip() for line in text.splitlines() if line.strip())


FASHION_MNIST = DataSet(
    name="fashion_mnist",
    doc="70,000 grey pictures of clothes, 28 x 28",
    layout="arrays",
    class_names=class_list("fashion_mnist"),
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

FOLDER = DataSet(name="folder", doc="your own images, one sub-folder per class", layout="folder")

COOP = DataSet(name="coop", doc="a data set of CoOp's, by its split_zhou_*.json", layout="coop")

IMAGEFOLDER = DataSet(
    name="imagefolder", doc="torchvision's train/<class>, val/<class>, test/<class>", layout="imagefolder"
)

DATASETS = {row.name: row for row in (FASHION_MNIST, FOLDER, COOP, IMAGEFOLDER)}


def find_data_set(name: str) -> DataSet:
    """Return the row of that name, or the user's own that "module:OBJECT" names.

    Raises:
        ConfigError: there is no such module or object, or it is not a `DataSet`.
    """
    if name in DATASETS:
        return DATASETS[name]
    row = resolve(name)
    if not isinstance(row, DataSet):
        raise ConfigError(f"data.name is {name!r}, a {type(row).__name__}; expected a dho.catalogue.datasets.DataSet")
    return row
