"""A method's own settings: a frozen dataclass, checked at load like every other setting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from conftest import Tiny, changed

from dho.config import from_dict
from dho.config.settings import setting
from dho.core.errors import ConfigError
from dho.methods.base import create_method
from dho.methods.dual_head import DualHead
from dho.teacher.classifier import open_classifier


@dataclass(frozen=True)
class Sharpness:
    """Settings of the method below."""

    sharpness: float = setting(2.0, "How sharp the teacher is.", above=0)


class Sharp(DualHead):
    """A method of the user's own that has settings."""

    arguments = Sharpness


NAME = f"{__name__}:Sharp"


@pytest.mark.parametrize(("given", "expected"), [({}, 2.0), ({"sharpness": 3}, 3.0)])
def test_a_method_has_its_settings_or_their_defaults(tiny: Tiny, given: dict[str, Any], expected: float) -> None:
    config = changed(tiny, train={"method": NAME, "method_args": given})
    method = create_method(config, open_classifier(config.teacher.classifier, tiny.store))
    assert isinstance(method, Sharp) and method.settings == Sharpness(expected)


@pytest.mark.parametrize(
    ("train", "line"),
    [
        (
            {"method": NAME, "method_args": {"sharpness": 0}},
            "train.method_args.sharpness is 0.0; expected a number > 0",
        ),
        ({"method": NAME, "method_args": {"sharp": 1}}, "unknown key train.method_args.sharp; allowed here: sharpness"),
        ({"method": "dho", "method_args": {"sharpness": 1}}, "train.method_args is {'sharpness': 1}; expected {}"),
        ({"method": f"{__name__}:Blunt"}, f"{__name__}:Blunt: module '{__name__}' has no 'Blunt'"),
        ({"method": "no_such_module:Sharp"}, "no_such_module:Sharp: no module 'no_such_module' to import"),
    ],
)
def test_settings_that_a_method_does_not_have_are_refused_at_load(train: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        from_dict({"train": train}, "params.yaml")
    assert line in str(refused.value) and "\n" not in str(refused.value)


def test_a_class_that_is_no_method_is_refused_by_name(tiny: Tiny) -> None:
    config = changed(tiny, train={"method": f"{__name__}:Sharpness"})
    with pytest.raises(
        ConfigError, match=r"Sharpness: not a Method; expected a subclass of dho\.methods\.base\.Method"
    ):
        create_method(config, open_classifier(config.teacher.classifier, tiny.store))
