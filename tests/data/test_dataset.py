"""What `data.name` stands for: every row of the catalogue is complete, and a row of the user's own is as good."""

from __future__ import annotations

import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
from conftest import CLASSES, write_folder
from prepared import run

from dho.catalogue import resolve
from dho.catalogue.datasets import DATASETS, LAYOUTS, DataSet, class_list
from dho.config import DataConfig, from_dict
from dho.core.errors import ConfigError
from dho.data.dataset import class_names, data_set, templates
from dho.data.sources import Record, open_source
from dho.data.sources.folder import Folder


class Reversed(Folder):
    """A layout of the user's own: a folder whose images are read last first."""

    def __init__(self, config: DataConfig, raw: Path) -> None:
        super().__init__(config, raw)
        self.records: list[Record] = self.records[::-1]


OWN_LAYOUT = DataSet(name="own", doc="with a layout of its own", layout="test_dataset:Reversed", templates=("one {}.",))
NOT_A_ROW = "text"


def test_every_row_is_found_by_its_name_and_has_a_layout_that_can_be_imported() -> None:
    for name, row in DATASETS.items():
        assert row.name == name and row.doc and row.licence
        assert all(template.count("{}") == 1 for template in row.templates)
        assert len(set(row.class_names)) == len(row.class_names) != 1
    for layout in LAYOUTS.values():
        source = resolve(layout)
        assert callable(source.list_images) and callable(source.read)
    assert {row.layout for row in DATASETS.values()} == set(LAYOUTS)


def test_every_class_list_is_one_of_a_row() -> None:
    used = {row.class_names for row in DATASETS.values()}
    names = [path.name.removesuffix(".txt") for path in (resources.files("dho.catalogue") / "classes").iterdir()]
    assert "fashion_mnist" in names
    assert all(class_list(name) in used for name in names)
    assert class_list("fashion_mnist")[0] == "T-shirt" and class_list("fashion_mnist")[9] == "ankle boot"


def test_the_catalogue_imports_no_torch() -> None:
    program = "import sys, dho.catalogue.datasets\nassert not {'torch', 'dho.config', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_class_names_and_templates_come_from_the_parameters_or_the_row() -> None:
    config = DataConfig()
    assert class_names(config) == list(DATASETS["fashion_mnist"].class_names)
    assert templates(config) == list(DATASETS["fashion_mnist"].templates)
    assert class_names(DataConfig(name="folder"), ["cat", "dog"]) == ["cat", "dog"]
    assert class_names(DataConfig(name="folder", class_names=["dog", "cat"]), ["cat", "dog"]) == ["dog", "cat"]
    assert templates(DataConfig(templates=["a {}"])) == ["a {}"]
    with pytest.raises(ConfigError, match=r"data\.class_names has 2 names; fashion_mnist has 10 classes"):
        class_names(DataConfig(class_names=["dog", "cat"]))


def test_a_layout_of_the_users_own_is_used(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", each=6, unlabelled=1)
    index = run(tmp_path / "images", name="test_dataset:OWN_LAYOUT")
    assert index.name == "own" and index.class_names == list(CLASSES)
    config = from_dict({"data": {"name": "test_dataset:OWN_LAYOUT", "source": str(tmp_path / "images")}}).data
    assert templates(config) == ["one {}."] and data_set(config) is OWN_LAYOUT
    source = open_source(config, tmp_path / "raw")
    assert isinstance(source, Reversed) and source.records[-1].path == "circle/000.jpg"
    assert source.read(len(source.records) - 1) == (tmp_path / "images" / "circle" / "000.jpg").read_bytes()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"name": "no_such_module:ROW"}, r"no_such_module:ROW: no module 'no_such_module' to import"),
        ({"name": "test_dataset:ABSENT"}, r"test_dataset:ABSENT: module 'test_dataset' has no 'ABSENT'"),
        ({"name": "test_dataset:NOT_A_ROW"}, r"data\.name is 'test_dataset:NOT_A_ROW', a str; expected a .*DataSet"),
        (
            {"name": "test_dataset:OWN_LAYOUT"},
            r"data\.source is None; expected the folder of images when data\.name is",
        ),
        ({"name": "coop"}, r"data\.source is None; expected the folder of images when data\.name is coop"),
        (
            {"name": "coop", "source": ".", "labels": "a.csv"},
            r"data\.labels is 'a\.csv'; expected null while data\.name",
        ),
        ({"name": "imagefolder", "source": ".", "test": "a.csv"}, r"data\.test is 'a\.csv'; expected null while"),
    ],
)
def test_a_name_or_setting_that_cannot_be_is_one_line(data: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        from_dict({"data": data})
    assert "\n" not in str(caught.value)
