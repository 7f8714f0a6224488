"""Metrics against numbers worked out by hand, and alpha and beta where the best answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ALONE, Tiny

from dho.config import EvaluateConfig, StudentConfig
from dho.core.errors import DataError
from dho.evaluation.head_outputs import HeadOutputs, head_outputs
from dho.evaluation.metrics import (
    METRICS,
    SOURCES,
    confusion,
    measure,
    only_alpha,
    per_class,
    quick,
    reliability,
    sources,
    table,
)
from dho.evaluation.tuning import search
from dho.runtime.dho_runtime import mix
from dho.student.model import Student
from dho.student.saved import StudentInfo, load_student, save_student

PROBABILITIES = np.array([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7]])
LABELS = np.array([0, 1, 1, 2])


def outputs(ce: np.ndarray | None, kd: np.ndarray | None, labels: np.ndarray) -> HeadOutputs:
    return HeadOutputs(ce, kd, labels, np.array([f"{i:08d}" for i in range(len(labels))]))


def test_metrics_are_those_worked_out_by_hand() -> None:
    metrics = measure(PROBABILITIES, LABELS, bins=15)
    assert metrics["top1"] == 0.75
    assert metrics["top5"] == 1.0  # three classes
    assert metrics["nll"] == pytest.approx(-np.log([0.8, 0.3, 0.5, 0.7]).mean())
    # Each image falls into a bin of its own: the mean of |confidence - right|.
    assert metrics["ece"] == pytest.approx((0.2 + 0.6 + 0.5 + 0.3) / 4, abs=1e-6)
    assert per_class(PROBABILITIES, LABELS, ["a", "b", "c"]) == {"a": 1.0, "b": 0.5, "c": 1.0}
    assert confusion(PROBABILITIES, LABELS).tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]


def test_every_row_is_measured_in_its_order_and_two_of_them_while_training() -> None:
    assert list(measure(PROBABILITIES, LABELS)) == [metric.name for metric in METRICS] == ["top1", "top5", "nll", "ece"]
    logits = np.log(PROBABILITIES)
    both = outputs(logits, logits, LABELS)
    assert list(sources(both, 0.5, 1.0, logits)) == [source.name for source in SOURCES]
    assert list(quick(both)) == [
        f"val/{source}/{metric}" for source in ("ce_head", "kd_head", "combined") for metric in ("top1", "nll")
    ]


def test_the_table_shows_each_source_that_was_measured_and_a_dash_for_a_metric_that_was_not() -> None:
    test = {
        "ce_head": {"top1": 0.5, "top5": 1.0, "nll": 0.25, "ece": 0.0625, "per_class": {}},
        "combined": {"top1": 0.12345},
        "teacher": {"ece": 0.5},
        "images": 100,
    }
    columns, rows = table({"alpha": 0.4, "beta": 0.5, "test": test})
    assert columns == ["test", "top-1", "top-5", "NLL", "ECE"]
    assert rows == [
        ["teacher, zero-shot", "-", "-", "-", "0.500"],
        ["CE head", "50.00 %", "100.00 %", "0.250", "0.062"],
        ["combined (alpha 0.4, beta 0.5)", "12.35 %", "-", "-", "-"],
    ]


def test_a_class_without_images_has_no_accuracy_rather_than_zero() -> None:
    assert per_class(PROBABILITIES[:1], LABELS[:1], ["a", "b", "c"]) == {"a": 1.0, "b": None, "c": None}


def test_reliability_bins_hold_all_images() -> None:
    bins = reliability(PROBABILITIES, LABELS, 15)
    assert sum(point["share"] for point in bins) == pytest.approx(1)
    assert [point["accuracy"] for point in bins] == [1.0, 0.0, 1.0, 1.0]


def test_the_search_finds_the_pair_that_mends_the_teachers_bias() -> None:
    # The KD head is sure and right but calls class 1 class 0; the CE head is unsure everywhere and right on class 1.
    generator = np.random.default_rng(0)
    labels = np.arange(300) % 3
    kd = np.eye(3)[np.where(labels == 1, 0, labels)] * 2 + np.eye(3)[labels] * 1.5 + generator.normal(0, 0.1, (300, 3))
    ce = np.eye(3)[labels] * 3 * (labels == 1)[:, None] + generator.normal(0, 1.0, (300, 3))
    best, surface = search(outputs(ce, kd, labels), EvaluateConfig())
    single = [point for point in surface if point.alpha in (0.0, 1.0)]
    assert 0 < best.alpha < 1
    assert best.top1 > max(point.top1 for point in single) + 0.05
    assert len(surface) == 21 * len(EvaluateConfig().betas)
    mixed = mix(ce, kd, best.alpha, best.beta)
    assert best.top1 == (mixed.argmax(1) == labels).mean()


def test_ties_in_accuracy_go_to_the_lower_nll() -> None:
    labels = np.arange(30) % 3
    logits = np.eye(3)[labels] * 2.0
    best, surface = search(outputs(logits, logits, labels), EvaluateConfig())
    assert best.nll == min(point.nll for point in surface)


def test_alpha_one_and_zero_are_the_single_heads() -> None:
    generator = np.random.default_rng(1)
    ce, kd = generator.normal(size=(2, 50, 4))
    np.testing.assert_allclose(mix(ce, kd, 1, 0.3), torch.softmax(torch.from_numpy(ce), -1))
    np.testing.assert_allclose(mix(ce, kd, 0, 0.3), torch.softmax(torch.from_numpy(kd) / 0.3, -1))


@pytest.mark.parametrize(("head", "alpha"), [("ce", 1.0), ("kd", 0.0)])
def test_a_single_head_answers_alone(head: str, alpha: float) -> None:
    labels = np.arange(12) % 3
    logits = np.eye(3)[labels]
    single = outputs(logits if head == "ce" else None, logits if head == "kd" else None, labels)
    assert only_alpha(single) == alpha
    best, _ = search(single, EvaluateConfig())
    assert (best.alpha, best.top1) == (alpha, 1.0)
    assert set(sources(single, best.alpha, best.beta)) == {f"{head}_head", "combined"}
    with pytest.raises(ValueError, match="does not have"):
        mix(single.ce, single.kd, 0.5, 1.0)


def test_head_outputs_come_back_as_they_were_written(tmp_path: Path) -> None:
    written = outputs(np.ones((2, 3), np.float32), None, np.array([0, 2]))
    written.save(tmp_path / "val.npz")
    read = HeadOutputs.load(tmp_path / "val.npz")
    assert read.kd is None and np.array_equal(read.ce, written.ce) and read.keys.tolist() == ["00000000", "00000001"]
    (tmp_path / "val.npz").write_bytes(b"PK broken")
    with pytest.raises(DataError, match=r"val\.npz"):
        HeadOutputs.load(tmp_path / "val.npz")


def test_head_outputs_cover_every_image_once_in_index_order(tiny: Tiny) -> None:
    student = Student(tiny.config.student, 3)
    index = tiny.index
    rows = index.rows("val")
    small, whole = (
        head_outputs(student, index, rows, ALONE, batch_size, workers) for batch_size, workers in ((4, 1), (64, 0))
    )
    assert small is not None and whole is not None
    assert small.keys.tolist() == index.keys[rows].tolist() and small.labels.tolist() == index.labels[rows].tolist()
    np.testing.assert_allclose(small.ce, whole.ce, atol=1e-5)
    assert student.training, "the mode it was in"


def test_the_students_torch_answer_is_the_shipped_numpy_answer() -> None:
    torch.manual_seed(0)
    student = Student(StudentConfig(model="test_resnet", input_size=32), 5).eval()
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    images = student.normalise(pixels)
    logits = student(images)
    expected = mix(logits["ce"].detach().numpy(), logits["kd"].detach().numpy(), 0.3, 0.5)
    np.testing.assert_allclose(student.predict(images, 0.3, 0.5).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("heads", [("ce", "kd"), ("ce",), ("kd",)])
def test_a_saved_student_answers_as_before(tmp_path: Path, heads: tuple[str, ...]) -> None:
    config = StudentConfig(model="mobilenetv3_small_050", input_size=32)
    student = Student(config, 3, heads).eval()
    from dho.config import to_dict

    info = StudentInfo(to_dict(config), list(heads), ["a", "b", "c"], "dho", "run", 7, {"dataset": "0"})
    save_student(tmp_path / "student", student, info)
    loaded, read = load_student(tmp_path / "student")
    images = torch.rand(2, 3, 32, 32)
    assert read == info
    torch.testing.assert_close(loaded.predict(images, 0.5, 0.5), student.predict(images, 0.5, 0.5))
    assert {path.name for path in (tmp_path / "student").iterdir()} == {"model.safetensors", "student.json"}
