"""Every benchmark but the server's (`make serving-test`) runs to its last line, a ratio that is not judged here."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ALONE, Tiny

from dho.core.workspace import Workspace
from dho.evaluation import evaluate as report
from dho.training.train import train

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[str]]:
    """Return a function: `run("int8", ROUNDS=1)` runs one with a constant changed and returns the lines it prints."""
    monkeypatch.chdir(tiny.workplace(tmp_path))
    monkeypatch.syspath_prepend(BENCHMARKS)

    def run(name: str, *arguments: str, **constants: Any) -> list[str]:
        module = importlib.import_module(name)
        for constant, value in constants.items():
            monkeypatch.setattr(module, constant, value)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        module.main()
        return capsys.readouterr().out.splitlines()

    return run


def ratio(line: str) -> float:
    match = re.fullmatch(r"ratio (?:of \w+ )?([0-9.]+)", line)
    assert match, line
    return float(match[1])


def test_train_step_measures_every_epoch(benchmark: Callable[..., list[str]]) -> None:
    *epochs, last = benchmark("train_step")
    assert [line.split(":")[0] for line in epochs if line.startswith("epoch")] == ["epoch 1", "epoch 2"]
    assert 0 < ratio(last) < 2


def test_allocator_measures_in_processes_of_their_own(benchmark: Callable[..., list[str]]) -> None:
    first, last = benchmark("allocator", ROUNDS=1, WARM_UP=1, STEPS=4)
    assert first.startswith("round 1: returned: ") and first.count("page faults per step") == 2
    assert ratio(last) > 0


@pytest.mark.parametrize(
    "arguments", [("--steps", "2"), ("--teacher", "ViT-B-32", "--steps", "1")], ids=["own", "ViT-B-32"]
)
def test_teacher_store_measures_with_and_without_it(
    benchmark: Callable[..., list[str]], arguments: tuple[str, ...]
) -> None:
    first, last = benchmark("teacher_store", *arguments, ROUNDS=1)
    assert re.fullmatch(r"round 1: an epoch with the store [0-9.]+ s, with the teacher online [0-9.]+ s", first)
    assert ratio(last) > (1 if "ViT-B-32" in arguments else 0)


def test_startup_measures_help_against_an_empty_python(benchmark: Callable[..., list[str]]) -> None:
    *medians, last = benchmark("startup", "--rounds", "1")
    assert [line.split(":")[0] for line in medians] == ["empty Python", "import dho", "dho --help"]
    assert ratio(last) > 1


def test_int8_measures_size_and_time(benchmark: Callable[..., list[str]], tiny: Tiny) -> None:
    assert train(tiny.config, Workspace(), ALONE)
    report.evaluate(tiny.config, Workspace())
    lines = benchmark("int8", CALLS=5)
    assert [line.split(":")[0] for line in lines if ": top-1 " in line] == ["float32", "int8"]
    size, time = (ratio(line) for line in lines[-2:])
    assert size > 1 and time > 0


def test_compare_methods_prints_a_row_a_method(benchmark: Callable[..., list[str]]) -> None:
    lines = benchmark("compare_methods", "--seeds", "1")
    table = [line for line in lines if "│" in line]
    assert [row.split("│")[1].strip() for row in table] == [
        "teacher, zero-shot", "ce student", "ce_kd student", "dho ce_head", "dho kd_head", "dho combined",
    ]  # fmt: skip
    assert re.match(r"dho combined - ce_kd student: [+-][0-9.]+ points", lines[-1])
