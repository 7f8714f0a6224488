"""Write the model card of a version: Markdown with plots in its package, and shortened as the version's description."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dho.config import RegistryConfig
from dho.core.files import write_atomically
from dho.evaluation.metrics import METRICS, table
from dho.registry.evidence import Evidence
from dho.registry.package import Trained

PLOTS = {
    "confusion.png": "Confusion matrix, test",
    "reliability.png": "Calibration, test",
    "surface.png": "alpha and beta on val",
    "curves.png": "Both heads while training",
}
MAX_DESCRIPTION = 5000
"""Characters that MLflow's SQL store takes."""
WORST = 5
"""Classes that the card names as the worst."""


@dataclass(frozen=True)
class ModelCard:
    """What a card speaks of.

    Attributes:
        registry: intended use, licences, precision.
        facts: what made the version, by the name of its tag.
        evidence: None where the package was not measured on test.
        dataset: content of `dataset.json`; empty where the data are not at hand.
        speed: milliseconds, as `dho.registry.evidence.measure_speed` returns them.
        network_bytes: size of the ONNX file.
    """

    registry: RegistryConfig
    trained: Trained
    facts: dict[str, str]
    evidence: Evidence | None
    dataset: dict[str, Any]
    speed: dict[str, float]
    network_bytes: int


def write_card(folder: Path, card: ModelCard, plots: Path) -> str:
    """Write `model_card.md` and a copy of those plots that exist.

    Args:
        folder: receives them.
        plots: folder of the plots of stage `evaluate`.

    Returns:
        The version's description: the card without plots, shortened to what MLflow takes.
    """
    pictures = []
    for name, title in PLOTS.items():
        if (plots / name).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(plots / name, folder / name)
            pictures.append(f"![{title}]({name})")

    short = _sections(card, full=False)
    write_atomically(folder / "model_card.md", "\n\n".join([_sections(card, full=True), "## Plots", *pictures]) + "\n")
    note = "\n\nThe whole card with its plots is artifact `artifacts/model_card/model_card.md` of this version."
    return short[: MAX_DESCRIPTION - len(note)] + note


def _sections(card: ModelCard, full: bool) -> str:
    info, facts = card.trained.info, card.facts
    sections = [
        f"# {card.registry.name}: {info.student['model']}, {len(info.class_names)} classes, method {info.method}",
        f"**Intended use.** {card.registry.intended_use}",
        _data(card),
        _results(card),
        _classes(card, full),
        _speed(card),
        _limits(card),
        _origin(card),
    ]
    if full:
        sections.append("## Lineage\n\n" + "\n".join(f"- `{key}`: {value}" for key, value in sorted(facts.items())))
    return "\n\n".join(section for section in sections if section)


def _data(card: ModelCard) -> str:
    data, facts = card.dataset, card.facts
    images = ", ".join(f"{count} {split}" for split, count in data.get("images", {}).items())
    licence = card.registry.data_licence or data.get("licence") or "not known"
    name = data.get("name", "data set")
    return (
        f"## Data\n\n{name}" + (f": {images} images. " if images else ". ") + f"Licence: {licence}. "
        f"Fingerprint `{facts.get('fingerprint.dataset', 'not known')[:16]}`."
    )


def _results(card: ModelCard) -> str:
    trained = card.trained
    results = {"alpha": trained.alpha, "beta": trained.beta, "test": trained.metrics.get("test") or {}}
    _, rows = table(results)
    if not rows and card.evidence is None:
        return ""
    titles = [f"{metric.title} {'↑' if metric.higher_is_better else '↓'}" for metric in METRICS]
    lines = [["source", *titles], ["---"] * (1 + len(titles)), *rows]
    text = "## Results on test\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
    if card.evidence is None:
        return text

    served = card.evidence.metrics
    if card.registry.precision == "int8":
        numbers = ", ".join(f"{metric.title} {metric.show(served[metric.name])}" for metric in METRICS)
        text += (
            "\n\n**int8.** The table is of the trained student. This version computes in 8-bit integers, calibrated on "
            f"val, and was measured by itself: {numbers}."
        )
    return text + (
        f"\n\n**Calibration.** The expected calibration error of what is served is {served['ece']:.3f}: "
        "probabilities are off by that much on average."
    )


def _classes(card: ModelCard, full: bool) -> str:
    if card.evidence is None:
        return ""
    recalls = sorted(card.evidence.recalls.items(), key=lambda item: item[1])
    worst = "\n".join(
        f"- {name}: {100 * value:.1f} %, {_taken_for(card.evidence, name)}" for name, value in recalls[:WORST]
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


def _speed(card: ModelCard) -> str:
    speed = card.speed
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
        f"## Size and speed\n\nThe network is {card.network_bytes / 1e6:.2f} MB. From encoded images to "
        "answers, on the machine that registered it:\n\n| images per call | threads | p50 | p99 |\n|---|---|---|---|\n"
        + "\n".join(rows)
    )


def _limits(card: ModelCard) -> str:
    size = card.trained.info.student["input_size"]
    return (
        "## Limits\n\n"
        f"- It always answers with one of its {len(card.trained.info.class_names)} classes, whatever the image shows.\n"
        f"- It sees the largest square in the middle of an image, at {size} x {size} pixels.\n"
        "- The measured accuracy holds for images like those of the test set; "
        "other cameras, backgrounds or crops were not measured.\n"
        "- The KD head repeats a teacher that was trained on other data, with that data's mistakes."
    )


def _origin(card: ModelCard) -> str:
    facts = card.facts
    licence = card.registry.teacher_licence or "not known; see where its weights come from"
    weights = facts.get("teacher.weights_sha256", "not known")[:16]
    return (
        f"## Teacher and origin\n\nTeacher {facts.get('teacher.model', 'not known')}, weights `{weights}`, "
        f"licence: {licence}. Commit `{facts.get('git.commit', 'not known')[:12]}`. "
        "`dho lineage` prints all of it and the commands that make it again."
    )
