"""Settings as fields of dataclasses, and nested dicts checked against them.

    from dataclasses import dataclass

    @dataclass(frozen=True)
    class ViewsConfig:
        count: int = setting(5, "Random views of every training image.", low=1)

    build(ViewsConfig, {"count": 0}, "views.", "params.yaml")

The last line raises `ConfigError`: "params.yaml: views.count is 0; expected a whole number >= 1".
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from dataclasses import field
from typing import Any

from dho.core.errors import ConfigError

OWN_CLASS = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""A class of the user's own: "module:Class"."""


def setting(
    default: Any,
    doc: str,
    *,
    choices: tuple[Any, ...] | None = None,
    names: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> Any:
    """Return a documented dataclass field.

    Args:
        default: value of an absent key; lists and dicts are copied for each instance.
        doc: one sentence, with the unit where there is one.
        choices: the allowed values.
        names: rows of the catalogue that may be chosen by name; "module:Class" chooses a class of the user's own.
        low, high: inclusive bounds of a number (for a list: of each element).
        above: exclusive lower bound.
    """
    metadata = {"doc": doc, "choices": choices, "names": names, "low": low, "high": high, "above": above}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def build(cls: Any, tree: Any, prefix: str, where: str) -> Any:
    """Build a dataclass of settings from nested dicts.

    Args:
        cls: dataclass whose fields are settings, or such dataclasses themselves.
        tree: what YAML holds; absent keys take their defaults.
        prefix: of keys in messages, with a dot at its end.
        where: file, for messages.

    Raises:
        ConfigError: a key is unknown, or a value is not allowed.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: {prefix.rstrip('.') or 'the file'} is {tree!r}; expected a mapping of settings")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in fields:
            raise ConfigError(f"{where}: unknown key {prefix}{key}; allowed here: {', '.join(fields)}")

    values = {}
    for name, value in tree.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            values[name] = build(hint, value if value is not None else {}, f"{prefix}{name}.", where)
        else:
            values[name] = _checked(f"{prefix}{name}", value, hint, fields[name].metadata, where)
    return cls(**values)


def _checked(key: str, value: Any, hint: Any, limits: Any, where: str) -> Any:
    def refuse(expected: str) -> ConfigError:
        return ConfigError(f"{where}: {key} is {value!r}; expected {expected}")

    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None:
        if type(None) in options:
            return None
        raise refuse(_describe(hint, limits))

    kind = next(option for option in options if option is not type(None))
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is float and isinstance(value, str | int) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-3 as text
            value = float(value)
        except (ValueError, OverflowError):
            raise refuse(_describe(hint, limits)) from None
    if not isinstance(value, origin) or (isinstance(value, bool) and origin is not bool):
        raise refuse(_describe(hint, limits))

    if origin is list:
        return [_checked(f"{key}[{i}]", element, arguments[0], limits, where) for i, element in enumerate(value)]
    if origin is dict and not all(isinstance(name, str) for name in value):
        raise refuse("a mapping with text as keys (put numbers in quotes)")
    if origin is dict and arguments[1] is not Any:
        return {
            name: _checked(f"{key}.{name}", element, arguments[1], limits, where) for name, element in value.items()
        }

    if limits["choices"] is not None and value not in limits["choices"]:
        raise refuse(_describe(hint, limits))
    if limits["names"] is not None and value not in limits["names"] and not OWN_CLASS.fullmatch(value):
        raise refuse(_describe(hint, limits))
    if isinstance(value, float) and not math.isfinite(value):
        raise refuse(_describe(hint, limits))
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high, above = limits["low"], limits["high"], limits["above"]
        if not ((low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)):
            raise refuse(_describe(hint, limits))
    return value


def _describe(hint: Any, limits: Any) -> str:
    if limits["choices"] is not None:
        return "one of " + ", ".join(str(choice) for choice in limits["choices"])
    if limits["names"] is not None:
        return "one of " + ", ".join(limits["names"]) + ", or module:Class"
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    words = " or ".join(
        names.get(option) or ("a list" if typing.get_origin(option) is list else "a mapping") for option in options
    )
    bounds = [
        f"{sign} {limits[key]}"
        for key, sign in (("above", ">"), ("low", ">="), ("high", "<="))
        if limits[key] is not None
    ]
    return " ".join([words, *([" and ".join(bounds)] if bounds else [])])


def mapping_keys(cls: Any, prefix: str = "") -> frozenset[str]:
    """Return the dotted keys of the settings whose value is a mapping of the user's own keys and not a section."""
    keys: set[str] = set()
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            keys |= mapping_keys(hint, f"{prefix}{name}.")
        elif any(typing.get_origin(option) is dict for option in (hint, *typing.get_args(hint))):
            keys.add(f"{prefix}{name}")
    return frozenset(keys)
