"""Rules between settings, and the settings of a method, whose dataclass its row in the catalogue names."""

from __future__ import annotations

from typing import Any

from dho.catalogue import resolve
from dho.catalogue.datasets import find_data_set
from dho.catalogue.methods import METHODS
from dho.config.schema import Config
from dho.config.settings import build
from dho.core.errors import ConfigError


def check_together(config: Config, where: str) -> None:
    """Check the rules that hold between settings; raises `ConfigError` with one line."""

    def refuse(key: str, value: Any, expected: str) -> ConfigError:
        return ConfigError(f"{where}: {key} is {value!r}; expected {expected}")

    splits, views, student, evaluate = config.data.splits, config.views, config.student, config.evaluate

    if splits.shots is not None and splits.labelled_fraction is not None:
        raise refuse(
            "data.splits.labelled_fraction",
            splits.labelled_fraction,
            "null while data.splits.shots is set (choose one)",
        )
    if len(views.scale) != 2 or views.scale[0] > views.scale[1]:
        raise refuse("views.scale", views.scale, "two numbers, the smaller first")
    for key in ("mean", "std"):
        if len(getattr(student, key)) != 3:
            raise refuse(f"student.{key}", getattr(student, key), "three numbers, one per channel")
    for key, must in (("alphas", (0.0, 1.0)), ("betas", (0.3, 0.5))):
        grid = getattr(evaluate, key)
        if not set(must) <= set(grid):
            raise refuse(f"evaluate.{key}", grid, f"a list that holds {must[0]:g} and {must[1]:g}")

    for key, templates in (
        ("data.templates", config.data.templates),
        ("pretrain.caption_templates", config.pretrain.caption_templates),
    ):
        if templates == []:
            raise refuse(key, templates, "one template or more")
        for template in templates or []:
            if template.count("{}") != 1:
                raise refuse(key, template, "each template to hold {} once, where the class name goes")

    names = config.data.class_names
    if names is not None and (len(names) < 2 or len(set(names)) != len(names)):
        raise refuse("data.class_names", names, "two or more different names")
    data_set = find_data_set(config.data.name)
    if data_set.reads_users_folder and config.data.source is None:
        raise refuse("data.source", None, f"the folder of images when data.name is {config.data.name}")
    for key in ("labels", "val", "test", "captions"):
        value = getattr(config.data, key)
        if data_set.layout != "folder" and value is not None:
            raise refuse(f"data.{key}", value, f"null while data.name is {config.data.name}")

    for name, others in config.pretrain.confusions.items():
        if min(others.values(), default=0) < 0 or sum(others.values()) > 1:
            raise refuse(f"pretrain.confusions.{name}", others, "rates >= 0 that add up to at most 1")

    method_args(config, where)


def method_args(config: Config, where: str = "params") -> Any:
    """Return `train.method_args` as the dataclass that the method's row, or a class of the user's own, names.

    Returns:
        An instance of that dataclass; None for a method without settings of its own.

    Raises:
        ConfigError: a key or value is not allowed, or the method has no settings.
    """
    train = config.train
    if train.method in METHODS:
        arguments = METHODS[train.method].arguments
        settings = None if arguments is None or not train.method_args else resolve(arguments)
    else:
        settings = getattr(resolve(train.method), "arguments", None)
    if settings is None:
        if train.method_args:
            raise ConfigError(
                f"{where}: train.method_args is {train.method_args!r}; expected {{}}: "
                f"method {train.method} has no settings of its own"
            )
        return None
    return build(settings, train.method_args, "train.method_args.", where)
