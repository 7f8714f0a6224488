"""Judge a candidate: floors for itself alone, and comparisons with the champion on the same test images.

    from dho.config import RulesConfig
    rules = RulesConfig(min_top1=0.8)
    checks = floors(rules, performance) + against(rules, candidate.evidence, champion.evidence)
    promoted = all(check.passed is not False for check in checks)

A rule is one row of `FLOORS` or `COMPARISONS` and one setting of `registry.rules`, which holds its limit. The table
that `dho promote` prints and the audit trail loop over the rows and take each by its name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from dho.config import RulesConfig
from dho.registry.evidence import Evidence

Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Check:
    """One rule's outcome.

    Attributes:
        name: the rule's name in the audit trail.
        rule: its title.
        value: what was measured, as text.
        limit: what is allowed, as text.
        passed: whether that holds; None where the rule asks nothing.
    """

    name: str
    rule: str
    value: str
    limit: str
    passed: bool | None

    @property
    def verdict(self) -> str:
        """The verdict as a word."""
        return "-" if self.passed is None else "ok" if self.passed else "REFUSED"


@dataclass(frozen=True)
class Performance:
    """What was measured on a package."""

    evidence: Evidence
    latency_ms: float
    """p99 of one image on one thread, milliseconds."""
    bytes: int


class Interval(NamedTuple):
    """A change and its bootstrap interval, shares from -1 to 1."""

    change: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A candidate beside the champion, on the same test images."""

    better: int
    """Images that only the candidate answers correctly."""
    worse: int
    gain: Interval
    """Of top-1."""
    classes: dict[str, Interval]
    """Of the recall of each class that has test images."""

    @classmethod
    def of(cls, rules: RulesConfig, candidate: Evidence, champion: Evidence) -> Comparison:
        """Compare two packages that were measured on the same test set."""
        # One generator for all, before any rule is asked: a rule that is added or removed leaves the numbers of the
        # others as they are.
        generator = np.random.default_rng(rules.seed)
        better, worse = candidate.right & ~champion.right, champion.right & ~candidate.right

        def change(images: npt.NDArray[np.bool_]) -> Interval:
            up, down = better[images], worse[images]
            low, high = interval(up, down, rules, generator)
            return Interval(float(up.mean() - down.mean()), low, high)

        gain = change(np.ones(len(better), bool))
        present = ((name, candidate.labels == number) for number, name in enumerate(candidate.class_names))
        classes = {name: change(images) for name, images in present if images.any()}
        return cls(int(better.sum()), int(worse.sum()), gain, classes)

    @property
    def worst_class(self) -> str:
        """The class whose recall falls most, at the upper end of its interval."""
        return min(self.classes, key=lambda name: (self.classes[name].high, self.classes[name].change, name))


class Finding(NamedTuple):
    """The value that a rule judges, and how people read it."""

    value: float
    shown: str


@dataclass(frozen=True)
class Rule(Generic[Subject]):
    """One rule of promotion.

    Attributes:
        name: under which the audit trail keeps what was measured.
        title: what people read; `{confidence}` in it becomes that of the intervals, percent.
        setting: field of `RulesConfig` that holds the limit; where that is None, the rule asks nothing.
        found: takes the value out of what is judged.
        holds: (value, limit) -> whether the rule is kept.
        allowed: how the limit is shown.
    """

    name: str
    title: str
    setting: str
    found: Callable[[Subject], Finding]
    holds: Callable[[float, float], bool]
    allowed: Callable[[float], str]

    def check(self, rules: RulesConfig, subject: Subject) -> Check:
        """Judge what the rule is about: a candidate's `Performance` or its `Comparison` with the champion."""
        value, shown = self.found(subject)
        limit: float | None = getattr(rules, self.setting)
        title = self.title.format(confidence=f"{100 * rules.confidence:g}")
        if limit is None:
            return Check(self.name, title, shown, "no limit", None)
        return Check(self.name, title, shown, self.allowed(limit), self.holds(value, limit))


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _points(share: float) -> str:
    return f"{100 * share:+.2f} points" if share else "0 points"


def _top1(performance: Performance) -> Finding:
    value = performance.evidence.metrics["top1"]
    return Finding(value, _percent(value))


def _worst_recall(performance: Performance) -> Finding:
    recalls = performance.evidence.recalls
    worst = min(recalls, key=lambda name: recalls[name])
    return Finding(recalls[worst], f"{_percent(recalls[worst])} ({worst})")


def _ece(performance: Performance) -> Finding:
    value = performance.evidence.metrics["ece"]
    return Finding(value, f"{value:.3f}")


def _latency(performance: Performance) -> Finding:
    return Finding(performance.latency_ms, f"{performance.latency_ms:.1f} ms")


def _size(performance: Performance) -> Finding:
    megabytes = performance.bytes / 1e6
    return Finding(megabytes, f"{megabytes:.1f} MB")


def _gain(comparison: Comparison) -> Finding:
    return Finding(comparison.gain.change, _points(comparison.gain.change))


def _interval(comparison: Comparison) -> Finding:
    between = f"{_points(comparison.gain.low)} to {_points(comparison.gain.high)}"
    return Finding(comparison.gain.low, f"{between}; {comparison.better} better, {comparison.worse} worse")


def _classes(comparison: Comparison) -> Finding:
    name = comparison.worst_class
    change, _, high = comparison.classes[name]
    return Finding(high, f"{name}: {_points(change)}, at best {_points(high)}")


FLOORS: tuple[Rule[Performance], ...] = (
    Rule("top1", "top-1", "min_top1", _top1, operator.ge, lambda limit: f">= {_percent(limit)}"),
    Rule(
        "worst_recall",
        "recall of the worst class",
        "min_class_recall",
        _worst_recall,
        operator.ge,
        lambda limit: f">= {_percent(limit)}",
    ),
    Rule("ece", "ECE", "max_ece", _ece, operator.le, lambda limit: f"<= {limit:g}"),
    Rule(
        "latency",
        "latency (p99, one image, one thread)",
        "max_latency_ms",
        _latency,
        operator.le,
        lambda limit: f"<= {limit:g} ms",
    ),
    Rule("size", "size", "max_size_mb", _size, operator.le, lambda limit: f"<= {limit:g} MB"),
)
"""What a candidate has to show by itself."""

COMPARISONS: tuple[Rule[Comparison], ...] = (
    Rule(
        "gain",
        "gain in top-1 over the champion",
        "min_gain",
        _gain,
        operator.ge,
        lambda limit: f">= {_points(limit)}",
    ),
    # Where min_gain allows a loss, the loss has to be smaller than that beyond chance; else the gain has to be one
    # beyond chance.
    Rule(
        "interval",
        "its {confidence} % interval (paired bootstrap)",
        "min_gain",
        _interval,
        lambda low, limit: low > min(limit, 0.0),
        lambda limit: f"above {_points(min(limit, 0.0))}",
    ),
    # A class is refused only when its whole interval lies below the drop that is allowed.
    Rule(
        "classes",
        "class that loses most",
        "max_class_drop",
        _classes,
        lambda high, limit: high >= -limit,
        lambda limit: f"at best >= {_points(-limit)}",
    ),
)
"""What a candidate has to show beside the champion, image by image; the audit trail keeps what each measured."""


def floors(rules: RulesConfig, performance: Performance) -> list[Check]:
    """Check the rules that a candidate has to keep by itself."""
    return [rule.check(rules, performance) for rule in FLOORS]


def against(rules: RulesConfig, candidate: Evidence, champion: Evidence) -> list[Check]:
    """Check the rules that compare a candidate with the champion.

    Args:
        candidate, champion: measured on the same test set.
    """
    comparison = Comparison.of(rules, candidate, champion)
    return [rule.check(rules, comparison) for rule in COMPARISONS]


def interval(
    better: npt.NDArray[np.bool_], worse: npt.NDArray[np.bool_], rules: RulesConfig, generator: np.random.Generator
) -> tuple[float, float]:
    """Return the bootstrap interval of (share better - share worse), both bool [images] and of the same images.

    Drawing images with replacement is drawing the counts of the three outcomes, so no image is drawn one by one.
    """
    images = len(better)
    shares = np.array([better.sum(), worse.sum(), images - better.sum() - worse.sum()]) / images
    counts = generator.multinomial(images, shares, size=rules.resamples)
    differences = (counts[:, 0] - counts[:, 1]) / images
    tail = (1 - rules.confidence) / 2
    low, high = np.quantile(differences, [tail, 1 - tail])
    return float(low), float(high)
