"""`params.yaml`: what is wrong is said in one line that names the key, the value and what is allowed."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest

from dho.config import Config, digest, flatten, from_dict, load, to_dict
from dho.core.errors import ConfigError

ROOT = Path(__file__).parents[2]


def complaint(tree: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        from_dict(tree, "params.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("params.yaml: ")
    return message


def sections(cls: type = Config) -> list[type]:
    hints = typing.get_type_hints(cls).values()
    return [
        cls,
        *(below for hint in hints if dataclasses.is_dataclass(hint) for below in sections(typing.cast(type, hint))),
    ]


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        ({"trian": {}}, ["unknown key trian", "train", "data"]),
        ({"train": {"lr": 0.1}}, ["unknown key train.lr", "learning_rate", "epochs"]),
        ({"data": {"splits": {"shot": 4}}}, ["unknown key data.splits.shot", "shots"]),
        ({True: {}}, ["unknown key True"]),
    ],
)
def test_an_unknown_key_is_named_with_the_keys_that_are_allowed_there(tree: Any, names: list[str]) -> None:
    message = complaint(tree)
    assert all(name in message for name in names)


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        ({"train": 3}, "train is 3; expected a mapping of settings"),
        (["train"], "the file is ['train']; expected a mapping of settings"),
        ({"train": {"epochs": 2.5}}, "train.epochs is 2.5; expected a whole number >= 1"),
        ({"train": {"epochs": True}}, "train.epochs is True; expected a whole number >= 1"),
        ({"train": {"epochs": None}}, "train.epochs is None; expected a whole number >= 1"),
        ({"train": {"epochs": "five"}}, "train.epochs is 'five'; expected a whole number >= 1"),
        ({"train": {"eta": "warm"}}, "train.eta is 'warm'; expected a number > 0"),
        ({"train": {"compile": "yes please"}}, "train.compile is 'yes please'; expected true or false"),
        ({"data": {"source": 7}}, "data.source is 7; expected text or null"),
        ({"data": {"class_names": "cat"}}, "data.class_names is 'cat'; expected a list or null"),
        ({"data": {"class_names": ["cat", 9]}}, "data.class_names[1] is 9; expected text"),
        ({"student": {"model_args": []}}, "student.model_args is []; expected a mapping"),
        ({"pretrain": {"confusions": {"a": {"b": "often"}}}}, "pretrain.confusions.a.b is 'often'; expected a number"),
        ({"pretrain": {"confusions": {1: {}}}}, "pretrain.confusions is {1: {}}; expected a mapping with text as keys"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(tree: Any, line: str) -> None:
    assert complaint(tree).startswith(f"params.yaml: {line}")


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        ({"train": {"epochs": 0}}, "train.epochs is 0; expected a whole number >= 1"),
        ({"train": {"lambda_ce": 1.5}}, "train.lambda_ce is 1.5; expected a number >= 0 and <= 1"),
        ({"train": {"eta": 0}}, "train.eta is 0.0; expected a number > 0"),
        ({"train": {"method": "magic"}}, "train.method is 'magic'; expected one of dho, ce, kd, ce_kd"),
        ({"data": {"name": "cifar"}}, "data.name is 'cifar'; expected one of fashion_mnist, folder, coop, imagefolder"),
        ({"data": {"on_leak": "ignore"}}, "data.on_leak is 'ignore'; expected one of error, drop"),
        ({"data": {"splits": {"shots": 0}}}, "data.splits.shots is 0; expected a whole number or null >= 1"),
        (
            {"data": {"max_pixels": 10**9}},
            "data.max_pixels is 1000000000; expected a whole number >= 1 and <= 178956970",
        ),
        ({"views": {"scale": [0.0, 1.0]}}, "views.scale[0] is 0.0; expected a number > 0 and <= 1"),
        ({"views": {"seed": 2**70}}, f"views.seed is {2**70}; expected a whole number >= 0 and <= {2**63 - 1}"),
        ({"train": {"learning_rate": float("inf")}}, "train.learning_rate is inf; expected a number > 0"),
        ({"train": {"learning_rate": float("nan")}}, "train.learning_rate is nan; expected a number > 0"),
        ({"train": {"learning_rate": 10**400}}, "train.learning_rate is 1000"),
    ],
)
def test_a_value_out_of_range_is_refused(tree: Any, line: str) -> None:
    assert complaint(tree).startswith(f"params.yaml: {line}")


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        (
            {"data": {"splits": {"shots": 4, "labelled_fraction": 0.1}}},
            "data.splits.labelled_fraction is 0.1; expected null while",
        ),
        ({"views": {"scale": [0.9, 0.5]}}, "views.scale is [0.9, 0.5]; expected two numbers, the smaller first"),
        ({"views": {"scale": [0.9]}}, "views.scale is [0.9]; expected two numbers"),
        ({"student": {"mean": [0.5]}}, "student.mean is [0.5]; expected three numbers"),
        ({"evaluate": {"alphas": [0.5]}}, "evaluate.alphas is [0.5]; expected a list that holds 0 and 1"),
        ({"evaluate": {"betas": [0.3, 1.0]}}, "evaluate.betas is [0.3, 1.0]; expected a list that holds 0.3 and 0.5"),
        ({"data": {"templates": ["a photo"]}}, "data.templates is 'a photo'; expected each template to hold {} once"),
        ({"data": {"templates": []}}, "data.templates is []; expected one template or more"),
        ({"pretrain": {"caption_templates": []}}, "pretrain.caption_templates is []; expected one template or more"),
        (
            {"data": {"class_names": ["cat", "cat"]}},
            "data.class_names is ['cat', 'cat']; expected two or more different names",
        ),
        ({"data": {"name": "folder"}}, "data.source is None; expected the folder of images"),
        ({"data": {"val": "val.csv"}}, "data.val is 'val.csv'; expected null while data.name is fashion_mnist"),
        (
            {"pretrain": {"confusions": {"a": {"b": 0.7, "c": 0.7}}}},
            "pretrain.confusions.a is {'b': 0.7, 'c': 0.7}; expected rates",
        ),
        ({"pretrain": {"confusions": {"a": {"b": -0.1}}}}, "pretrain.confusions.a is {'b': -0.1}; expected rates"),
    ],
)
def test_rules_between_settings_are_checked(tree: Any, line: str) -> None:
    assert complaint(tree).startswith(f"params.yaml: {line}")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"train: [", "not valid YAML"),
        (b"train:\n\tepochs: 2\n", "not valid YAML"),
        ("data: {source: Büro}".encode("cp1252"), "not UTF-8"),
    ],
)
def test_a_file_that_is_not_yaml_is_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "params.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        load(tmp_path / "params.yaml")
    assert str(tmp_path / "params.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_says_where_to_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"params.yaml: cannot be read .*--params"):
        load(tmp_path / "params.yaml")


@pytest.mark.parametrize("content", ["", "# nothing\n", "train:\n", "\ufefftrain: {}\n"])
def test_an_empty_file_or_section_means_the_defaults(tmp_path: Path, content: str) -> None:
    (tmp_path / "params.yaml").write_text(content, encoding="utf-8")
    assert load(tmp_path / "params.yaml") == Config()


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(
        "train:\n  learning_rate: 1e-3\n  weight_decay: 5E-2\n  eta: 2\nviews:\n  scale: [8e-2, 1]\n"
    )
    config = load(tmp_path / "params.yaml")
    assert (config.train.learning_rate, config.train.weight_decay, config.train.eta) == (0.001, 0.05, 2.0)
    assert config.views.scale == [0.08, 1.0]
    assert isinstance(config.train.eta, float)


def test_the_repositorys_params_yaml_loads_and_survives_a_round_trip() -> None:
    config = load(ROOT / "params.yaml")
    assert from_dict(to_dict(config)) == config


def test_every_setting_has_a_sentence() -> None:
    for section in sections():
        assert section.__doc__ and not section.__doc__.startswith(section.__name__)  # what a dataclass gets without one
        for field in dataclasses.fields(section):
            if not dataclasses.is_dataclass(typing.get_type_hints(section)[field.name]):
                assert field.metadata.get("doc", "").endswith((".", ")")), f"{section.__name__}.{field.name}"


def test_every_default_is_allowed() -> None:
    assert from_dict(to_dict(Config())) == Config()


def test_instances_do_not_share_lists() -> None:
    Config().views.scale.append(3.0)
    assert Config().views.scale == [0.5, 1.0]


def test_settings_cannot_be_changed_after_loading() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.epochs = 3  # type: ignore[misc]


def test_flatten_names_settings_by_dots_and_keeps_free_mappings_whole() -> None:
    flat = flatten(to_dict(from_dict({"student": {"model_args": {"layers": [1]}}})))
    assert flat["data.splits.shots"] == 16
    assert flat["student.model_args"] == {"layers": [1]}
    assert not any(isinstance(value, dict) and value and key != "student.model_args" for key, value in flat.items())


def test_the_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [2, 3]}) == digest({"b": [2, 3], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
