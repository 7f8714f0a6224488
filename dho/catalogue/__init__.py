"""What can be chosen by name: one row each, with the "module:Class" that implements it, imported when it is needed.

    resolve("dho.methods.dual_head:DualHead")

A user may name a class of their own in the same way; its module must be importable where dho runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from dho.core.errors import ConfigError

T = TypeVar("T")


class Described(Protocol):
    """What every row of a catalogue has."""

    @property
    def doc(self) -> str:
        """One short phrase that says what it is."""


@dataclass(frozen=True)
class Row:
    """A row that names what it stands for and says what that is."""

    implementation: str
    """As "module:Class"; which class is expected is said at the table."""
    doc: str
    """One short phrase that says what it is."""


def resolve(name: str) -> Any:
    """Import what "module:Name" names; raises `ConfigError` where there is no such module or name."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
            raise  # it is there, and one of its own imports is not
        raise ConfigError(f"{name}: no module {module!r} to import; install it, or set PYTHONPATH") from error
    except AttributeError as error:
        raise ConfigError(f"{name}: module {module!r} has no {attribute!r}") from error


def implementation(name: str, rows: Mapping[str, Row], base: type[T]) -> type[T]:
    """Return the class that a row, or "module:Class", names.

    Args:
        name: of a row of `rows`, or "module:Class" of the user's own.
        rows: a catalogue.
        base: what the class must be a subclass of.

    Raises:
        ConfigError: there is no such class, or it is not a subclass of `base`.
    """
    cls = resolve(rows[name].implementation if name in rows else name)
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ConfigError(f"{name}: not a {base.__name__}; expected a subclass of {base.__module__}.{base.__name__}")
    return cls


def listed(rows: Mapping[str, Described]) -> str:
    """Names and phrases of a catalogue's rows in one line, for the documentation of a setting."""
    return "; ".join(f"{name}: {row.doc}" for name, row in rows.items())
