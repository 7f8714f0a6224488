"""What a candidate has to show before it becomes champion: floors of its own, and a paired comparison on the same test images.

checks = floors(rules, candidate) + against(rules, candidate.evidence, champion.evidence)
all(check.passed is not False for check in checks)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dho.config import RulesConfig
from dho.registry.evidence import Evidence


@dataclass(frozen=True)
class Check:
    """One rule, what was found, what is allowed, and whether that holds; None where the rule asks nothing."""

    rule: str
    value: str
    limit: str
    passed: bool | None

    @property
    def verdict(self) -> str:
        """The verdict as a word."""
        return "-" if self.passed is None else "ok" if self.passed else "REFUSED"


@dataclass(frozen=True)
class Facts:
    """A package with what was measured on it."""

    evidence: Evidence
    latency_ms: float
    """p99 of one image on one thread."""
    bytes: int


def floors(rules: RulesConfig, facts: Facts) -> list[Check]:
    """The rules that a candidate has to hold by itself."""
    top1, ece = facts.evidence.metrics["top1"], facts.evidence.metrics["ece"]
    worst = min(facts.evidence.recalls, key=lambda name: facts.evidence.recalls[name])
    recall, megabytes = facts.evidence.recalls[worst], facts.bytes / 1e6
    return [
        _limit(
            "top-1",
            _percent(top1),
            ">=",
            rules.min_top1,
            None if rules.min_top1 is None else top1 >= rules.min_top1,
            _percent,
        ),
        _limit(
            "recall of the worst class",
            f"{_percent(recall)} ({worst})",
            ">=",
            rules.min_class_recall,
            None if rules.min_class_recall is None else recall >= rules.min_class_recall,
            _percent,
        ),
        _limit("ECE", f"{ece:.3f}", "<=", rules.max_ece, None if rules.max_ece is None else ece <= rules.max_ece),
        _limit(
            "latency (p99, one image, one thread)",
            f"{facts.latency_ms:.1f} ms",
            "<=",
            rules.max_latency_ms,
            None if rules.max_latency_ms is None else facts.latency_ms <= rules.max_latency_ms,
            lambda value: f"{value:g} ms",
        ),
        _limit(
            "size",
            f"{megabytes:.1f} MB",
            "<=",
            rules.max_size_mb,
            None if rules.max_size_mb is None else megabytes <= rules.max_size_mb,
            lambda value: f"{value:g} MB",
        ),
    ]


def against(rules: RulesConfig, candidate: Evidence, champion: Evidence) -> list[Check]:
    """The rules that compare with the champion, image by image: the gain, that it is no chance, and every class.

    With `min_gain` >= 0 the gain has to reach it and the lower end of its paired bootstrap interval has to be above 0; a negative
    `min_gain` asks only that the lower end is above it (not worse by more than that). No class may have an interval of its change in
    recall that lies below -`max_class_drop` as a whole.

    Args:
        candidate, champion: measured on the same test set.
    """
    generator = np.random.default_rng(rules.seed)
    better, worse = candidate.right & ~champion.right, champion.right & ~candidate.right
    gain = float(better.mean() - worse.mean())
    low, high = interval(better, worse, rules, generator)
    floor = min(rules.min_gain, 0.0)
    between = f"{_points(low)} to {_points(high)}"
    checks = [
        Check(
            "gain in top-1 over the champion", _points(gain), f">= {_points(rules.min_gain)}", gain >= rules.min_gain
        ),
        Check(
            f"its {100 * rules.confidence:g} % interval (paired bootstrap)",
            f"{between}; {int(better.sum())} better, {int(worse.sum())} worse",
            f"above {_points(floor)}",
            low > floor,
        ),
    ]
    drops = []
    for number, name in enumerate(candidate.class_names):
        images = candidate.labels == number
        if images.any():
            change = float(better[images].mean() - worse[images].mean())
            drops.append((interval(better[images], worse[images], rules, generator)[1], change, name))
    top, change, name = min(drops)
    checks.append(
        Check(
            "class that loses most",
            f"{name}: {_points(change)}, at best {_points(top)}",
            f"at best >= {_points(-rules.max_class_drop)}",
            top >= -rules.max_class_drop,
        )
    )
    return checks


def interval(
    better: npt.NDArray[np.bool_], worse: npt.NDArray[np.bool_], rules: RulesConfig, generator: np.random.Generator
) -> tuple[float, float]:
    """The bootstrap interval of (share better - share worse), both measured on the same images.

    Drawing images with replacement is drawing the counts of the three outcomes, so no image is drawn one by one.
    """
    images = len(better)
    shares = np.array([better.sum(), worse.sum(), images - better.sum() - worse.sum()]) / images
    counts = generator.multinomial(images, shares, size=rules.resamples)
    differences = (counts[:, 0] - counts[:, 1]) / images
    tail = (1 - rules.confidence) / 2
    low, high = np.quantile(differences, [tail, 1 - tail])
    return float(low), float(high)


def _limit(rule: str, value: str, sign: str, limit: float | None, passed: bool | None, shown: object = None) -> Check:
    text = "no limit" if limit is None else f"{sign} {shown(limit) if callable(shown) else f'{limit:g}'}"
    return Check(rule, value, text, passed)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _points(share: float) -> str:
    return f"{100 * share:+.2f} points" if share else "0 points"
