"""The model card of a registered version: Markdown with plots, in its package and (shortened) as the version's description."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dho.config import RegistryConfig
from dho.core.files import write_atomically
from dho.evaluation.evaluate import table
from dho.registry.evidence import Evidence
from dho.student.saved import StudentCard

PLOTS = {
    "confusion.png": "Confusion matrix, test",
    "reliability.png": "Calibration, test",
    "surface.png": "alpha and beta on val",
    "curves.png": "Both heads while training",
}
DESCRIPTION_LENGTH = 5000
"""Characters that MLflow's SQL store takes."""
WORST = 5


@dataclass(frozen=True)
class Subject:
    """What a card speaks of."""

    registry: RegistryConfig
    student: StudentCard
    facts: dict[str, str]
    metrics: dict[str, Any]
    """Content of `metrics.json`."""
    evidence: Evidence | None
    dataset: dict[str, Any]
    """Content of `dataset.json`; empty where the data are not at hand."""
    speed: dict[str, float]
    onnx_bytes: int


def write_card(folder: Path, subject: Subject, plots: Path | None) -> str:
    """Write `model_card.md` and its plots to `folder`; returns the version's description."""
    pictures = []
    for name, title in PLOTS.items():
        if plots is not None and (plots / name).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(plots / name, folder / name)
            pictures.append(f"![{title}]({name})")
    short = _sections(subject, full=False)
    write_atomically(
        folder / "model_card.md", "\n\n".join([_sections(subject, full=True), "## Plots", *pictures]) + "\n"
    )
    note = "\n\nThe whole card with its plots is artifact `artifacts/model_card/model_card.md` of this version."
    return short[: DESCRIPTION_LENGTH - len(note)] + note


def _sections(subject: Subject, full: bool) -> str:
    student, facts = subject.student, subject.facts
    parts = [
        f"# {subject.registry.name}: {student.student['model']}, {len(student.class_names)} classes, method {student.method}",
        f"**Intended use.** {subject.registry.intended_use}",
        _data(subject),
        _results(subject),
        _classes(subject, full),
        _speed(subject),
        _limits(subject),
        _origin(subject),
    ]
    if full:
        parts.append("## Lineage\n\n" + "\n".join(f"- `{key}`: {value}" for key, value in sorted(facts.items())))
    return "\n\n".join(part for part in parts if part)


def _data(subject: Subject) -> str:
    data, facts = subject.dataset, subject.facts
    images = ", ".join(f"{count} {split}" for split, count in data.get("images", {}).items())
    licence = subject.registry.data_licence or data.get("licence") or "not known"
    name = data.get("name", "data set")
    return (
        f"## Data\n\n{name}" + (f": {images} images. " if images else ". ") + f"Licence: {licence}. "
        f"Fingerprint `{facts.get('fingerprint.dataset', 'not known')[:16]}`."
    )


def _results(subject: Subject) -> str:
    head = "## Results on test\n\n| source | top-1 | top-5 | NLL | ECE |\n|---|---|---|---|---|"
    rows = _rows(subject.metrics)
    if not rows and subject.evidence is None:
        return ""
    calibration = ""
    if subject.evidence is not None:
        calibration = (
            f"\n\n**Calibration.** The expected calibration error of what is served is {subject.evidence.metrics['ece']:.3f}: "
            "probabilities are off by that much on average."
        )
        if subject.registry.precision == "int8":
            calibration = (
                "\n\n**int8.** The table is of the trained student. This version computes in 8-bit integers, calibrated on val, and its "
                f"own top-1 is {100 * subject.evidence.metrics['top1']:.2f} %, its NLL {subject.evidence.metrics['nll']:.3f}.{calibration}"
            )
    return "\n".join([head, *(f"| {' | '.join(row)} |" for row in rows)]) + calibration


def _rows(metrics: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    complete = {
        source: values
        for source, values in metrics.get("test", {}).items()
        if isinstance(values, dict) and {"top1", "top5", "nll", "ece"} <= set(values)
    }
    return table({"alpha": _tuned(metrics, "alpha"), "beta": _tuned(metrics, "beta"), "test": complete})


def _tuned(metrics: dict[str, Any], key: str) -> float:
    """alpha or beta of `metrics.json`; a single head has 1."""
    value = metrics.get(key)
    return 1.0 if value is None else float(value)


def _classes(subject: Subject, full: bool) -> str:
    if subject.evidence is None:
        return ""
    recalls = sorted(subject.evidence.recalls.items(), key=lambda item: item[1])
    worst = "\n".join(
        f"- {name}: {100 * value:.1f} %, {_taken_for(subject.evidence, name)}" for name, value in recalls[:WORST]
    )
    text = f"## Worst classes (share of a class's images that is recognised)\n\n{worst}"
    if full:
        rows = "\n".join(f"| {name} | {100 * value:.1f} % |" for name, value in recalls)
        text += f"\n\n## Every class\n\n| class | recall |\n|---|---|\n{rows}"
    return text


def _taken_for(evidence: Evidence, name: str) -> str:
    wrong = evidence.guesses[(evidence.labels == evidence.class_names.index(name)) & ~evidence.right]
    if not len(wrong):
        return "never mistaken"
    numbers = wrong.tolist()
    most = max(set(numbers), key=numbers.count)
    return f"most often taken for {evidence.class_names[most]}"


def _speed(subject: Subject) -> str:
    speed = subject.speed
    if not speed:
        return ""
    settings = ((batch, threads) for batch in (1, 32) for threads in (1, 2))
    rows = [
        " | ".join(
            [
                f"| {batch}",
                str(threads),
                *(f"{speed[f'batch{batch}/threads{threads}/{q}']:.1f} ms" for q in ("p50", "p99")),
            ]
        )
        + " |"
        for batch, threads in settings
    ]
    return (
        f"## Size and speed\n\nThe network is {subject.onnx_bytes / 1e6:.2f} MB. From encoded images to answers, on the machine that "
        "registered it:\n\n| images a call | threads | p50 | p99 |\n|---|---|---|---|\n" + "\n".join(rows)
    )


def _limits(subject: Subject) -> str:
    size = subject.student.student["input_size"]
    return (
        "## Limits\n\n"
        f"- It always answers with one of its {len(subject.student.class_names)} classes, whatever the image shows.\n"
        f"- It sees the largest square in the middle of an image, at {size} x {size} pixels.\n"
        "- The measured accuracy holds for images like those of the test set; other cameras, backgrounds or crops were not measured.\n"
        "- The KD head repeats a teacher that was trained on other data, with that data's mistakes."
    )


def _origin(subject: Subject) -> str:
    facts = subject.facts
    licence = subject.registry.teacher_licence or "not known; see where its weights come from"
    weights = facts.get("teacher.weights_sha256", "not known")[:16]
    return (
        f"## Teacher and origin\n\nTeacher {facts.get('teacher.model', 'not known')}, weights `{weights}`, licence: {licence}. "
        f"Commit `{facts.get('git.commit', 'not known')[:12]}`. `dho lineage` prints all of it and the commands that make it again."
    )
