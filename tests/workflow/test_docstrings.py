"""Examples in docstrings are real: Python parses and its calls bind to the signatures, commands exist."""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import inspect
import pkgutil
import re
import shlex
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import typer

import dho
from dho.cli import app

ROOT = Path(__file__).parents[2]
PROGRAMS = ("dho", "python", "torchrun", "make", "dvc", "kubectl")
KNOWN = {
    "client": "mlflow:MlflowClient",
    "cluster": "dho.cluster.api:Cluster",
    "config": "dho.config:Config",
    "index": "dho.data.index:Index",
    "method": "dho.methods.base:Method",
    "process": "dho.core.process:Process",
    "store": "dho.teacher.store:TeacherStore",
    "student": "dho.student.model:Student",
    "workspace": "dho.core.workspace:Workspace",
}
"""Variables that examples use without making them, and of which class they are."""
LOOSE = (object, Any, inspect.Parameter.empty, inspect.Signature.empty)


@dataclass(frozen=True)
class Example:
    """One indented block of a docstring."""

    module: str
    owner: str
    text: str

    def __str__(self) -> str:
        return f"{self.owner}: {self.text.splitlines()[0].strip()[:50]}"


def blocks(docstring: str) -> Iterator[str]:
    """Indented blocks that follow a blank line; Google's sections (Args: ...) follow their heading at once."""
    lines = inspect.cleandoc(docstring).splitlines()
    number = 0
    while number < len(lines):
        if lines[number].startswith("    ") and not lines[number - 1].strip():
            end = number
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            yield textwrap.dedent("\n".join(lines[number:end])).strip()
            number = end
        number += 1


def examples() -> Iterator[Example]:
    names = [module.name for module in pkgutil.walk_packages(dho.__path__, "dho.")]
    for name in ["dho", *names]:
        path = Path(str(importlib.util.find_spec(name).origin))  # type: ignore[union-attr]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                owner = name if isinstance(node, ast.Module) else f"{name}.{node.name}"
                for text in blocks(ast.get_docstring(node, clean=False) or ""):
                    yield Example(name, owner, text)


EXAMPLES = list(examples())
COMMANDS = [example for example in EXAMPLES if example.text.split()[0] in PROGRAMS]
PYTHON = [example for example in EXAMPLES if example not in COMMANDS]


def test_there_are_examples_of_both_kinds() -> None:
    assert len(PYTHON) > 20 and len(COMMANDS) > 3


@pytest.mark.parametrize("example", PYTHON, ids=str)
def test_python_in_a_docstring_parses_and_its_calls_bind(example: Example) -> None:
    tree = ast.parse(example.text)
    names = vars(builtins) | vars(module_of(example.module))
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), example.owner, "exec"), names)  # its imports only
    Binder(names).visit(tree)


@pytest.mark.parametrize("example", COMMANDS, ids=str)
def test_a_command_in_a_docstring_is_one_that_exists(example: Example) -> None:
    for line in example.text.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            check_command(line)


def test_commands_in_the_first_line_of_a_benchmark_are_its_own() -> None:
    for path in (ROOT / "benchmarks").glob("*.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert f"python benchmarks/{path.name}" in docstring, path


def module_of(name: str) -> types.ModuleType:
    """A module that examples are of; the one that runs inside a registered model only is read as it is there."""
    if name == "dho.runtime.pyfunc_model":
        from dho.registry.evidence import serving_imports

        with serving_imports():
            return importlib.import_module(name)
    return importlib.import_module(name)


def check_command(line: str) -> None:
    """A command exists, and takes the options that it is given."""
    words = shlex.split(line, comments=True)
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
    if words[:2] == ["python", "-m"]:
        words = words[2:]
    if words[0] == "python":
        assert (ROOT / words[1]).is_file(), line
        return
    assert words[0] == "dho", f"{line}: what is {words[0]}?"
    command: Any = typer.main.get_command(app)
    rest = words[1:]
    while isinstance(command, click.Group) or hasattr(command, "commands"):
        assert rest and rest[0] in command.commands, f"dho has no command {' '.join(rest[:1])!r}"
        command, rest = command.commands[rest[0]], rest[1:]
    options = {option for parameter in command.params for option in parameter.opts}
    assert {word.partition("=")[0] for word in rest if word.startswith("-")} <= options, line


class Binder(ast.NodeVisitor):
    """Follows the classes of an example's variables and binds every call to the signature that it means."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names
        self.classes: dict[str, Any] = {}

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            if isinstance(target, ast.Tuple):
                kind = self.class_of(node.value)
                kinds = typing.get_args(kind) if typing.get_origin(kind) is tuple else ()
                values = node.value.elts if isinstance(node.value, ast.Tuple) else None
                for number, element in enumerate(target.elts):
                    assert isinstance(element, ast.Name)
                    known = self.class_of(values[number]) if values else (kinds[number] if len(kinds) > number else Any)
                    self.classes[element.id] = known
            elif isinstance(target, ast.Name):
                self.classes[target.id] = self.class_of(node.value)

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            self.visit(item.context_expr)
            if isinstance(item.optional_vars, ast.Name):
                kind = self.class_of(item.context_expr)
                if typing.get_origin(kind) is not None and typing.get_args(kind):
                    kind = typing.get_args(kind)[0]
                elif hasattr(kind, "__enter__"):
                    kind = typing.get_type_hints(kind.__enter__).get("return", kind)
                self.classes[item.optional_vars.id] = kind
        for statement in node.body:
            self.visit(statement)

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        for name in ast.walk(node.target):
            if isinstance(name, ast.Name):
                self.classes[name.id] = Any
        for statement in node.body:
            self.visit(statement)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.names[node.name] = lambda *_, **__: None

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.names[node.name] = type(node.name, (), {})

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        function = self.value_of(node.func)
        if function is Any:
            return
        assert callable(function), f"{ast.unparse(node.func)} cannot be called"
        with contextlib.suppress(ValueError):  # a builtin without a signature
            signature = inspect.signature(function)
            splat = any(isinstance(argument, ast.Starred) for argument in node.args)
            if not splat and all(keyword.arg for keyword in node.keywords):
                signature.bind(*node.args, **{str(keyword.arg): keyword for keyword in node.keywords})

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        self.value_of(node)

    def value_of(self, node: ast.expr) -> Any:
        """The object that an expression means: a function bound as far as it goes, a class, or Any."""
        if isinstance(node, ast.Name):
            if node.id in self.classes or (node.id in KNOWN and node.id not in self.names):
                kind = self.class_of(node)
                return lambda_without_self(kind.__call__) if kind is not Any and "__call__" in vars(kind) else Any
            assert node.id in self.names or node.id in self.loose_names(), f"{node.id} is not defined"
            return self.names.get(node.id, Any)
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and self.is_object(node.value.id):
                owner = self.names[node.value.id]
                assert hasattr(owner, node.attr), f"{ast.unparse(node)}: there is no {node.attr}"
                return getattr(owner, node.attr)
            kind = self.class_of(node.value)
            if kind in LOOSE or not isinstance(kind, type) or not kind.__module__.startswith("dho"):
                return Any
            hints = typing.get_type_hints(kind)
            attributes = hints.keys() | attributes_set(kind)
            assert hasattr(kind, node.attr) or node.attr in attributes, f"{kind.__name__} has no {node.attr}"
            found = getattr(kind, node.attr, Any)
            if isinstance(found, types.FunctionType):
                return lambda_without_self(found)
            return found if callable(found) else Any
        return Any

    def class_of(self, node: ast.expr) -> Any:
        """The class of an expression's value, or Any."""
        if isinstance(node, ast.Name):
            if node.id in self.classes:
                return self.classes[node.id]
            if node.id in KNOWN:
                module, _, name = KNOWN[node.id].partition(":")
                return getattr(importlib.import_module(module), name)
            return Any
        if isinstance(node, ast.Attribute):
            kind = self.class_of(node.value)
            if isinstance(kind, type) and kind.__module__.startswith("dho"):
                return typing.get_type_hints(kind).get(node.attr, Any)
            return Any
        if isinstance(node, ast.Call):
            function = self.value_of(node.func)
            if isinstance(function, type):
                return function
            if isinstance(function, types.FunctionType | types.MethodType):
                with contextlib.suppress(NameError, TypeError, AttributeError):
                    return typing.get_type_hints(function).get("return", Any)
        return Any

    def is_object(self, name: str) -> bool:
        return name in self.names and name not in self.classes

    def loose_names(self) -> set[str]:
        """Data that examples take for granted: arrays, tensors and texts under the names of design.md."""
        names = """
        action alpha answers batch beta build card checks champion candidate classes class_names
        colour content counts criteria data device documents embeddings evidence files folder
        fingerprint generator image images items job labels launch logits name namespace network
        optimizer outputs package params path pixels prepared probabilities remote revision rows
        rules sha256 source stage state templates test text_weights tracker uri values version view
        views
        """
        return set(names.split())


def attributes_set(kind: type) -> set[str]:
    """Attributes that a class sets on itself."""
    with contextlib.suppress(OSError, TypeError):
        return set(re.findall(r"self\.(\w+)", inspect.getsource(kind)))
    return set()


def lambda_without_self(function: Any) -> Any:
    """A method as it is called on an instance."""
    signature = inspect.signature(function)

    def bound(*_: Any, **__: Any) -> Any:
        return None

    bound.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])  # type: ignore[attr-defined]
    with contextlib.suppress(NameError, TypeError):
        bound.__annotations__ = {"return": typing.get_type_hints(function).get("return", Any)}
    return bound


def test_no_example_hides_from_this_test_at_the_left_margin() -> None:
    code = re.compile(r"\w[\w., ]* = \w+\(|with \w+\(|from [\w.]+ import |import \w+$|@\w+|\w+\(.*\)\s*(#.*)?$")
    for name in ["dho", *(module.name for module in pkgutil.walk_packages(dho.__path__, "dho."))]:
        path = Path(str(importlib.util.find_spec(name).origin))  # type: ignore[union-attr]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                lines = (ast.get_docstring(node) or "").splitlines()
                assert not [line for line in lines if code.match(line)], name
