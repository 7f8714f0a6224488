"""The rules of promotion, on answers whose shares are known."""

from __future__ import annotations

import dataclasses

import numpy as np

from dho.config import RulesConfig
from dho.registry.evidence import Evidence
from dho.registry.rules import COMPARISONS, FLOORS, Comparison, Performance, against, floors, interval


def _evidence(right: list[float], seed: int, images: int = 400) -> Evidence:
    """Answers of which about these shares are right, class by class."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(right)), images)
    correct = generator.random(len(labels)) < np.asarray(right)[labels]
    guesses = np.where(correct, labels, (labels + 1) % len(right))
    return Evidence(
        "f", [f"class {i}" for i in range(len(right))], labels, guesses, {"top1": float(correct.mean()), "ece": 0.05}
    )


def test_the_interval_covers_the_true_difference_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    rules = RulesConfig(resamples=400)
    covered = []
    for _ in range(400):
        draws = generator.random(300)
        low, high = interval(draws < 0.12, draws > 0.95, rules, generator)
        covered.append(low <= 0.07 <= high)
    assert 0.91 <= np.mean(covered) <= 0.99


def test_a_class_is_refused_only_when_its_drop_is_significant() -> None:
    champion, slightly, much = _evidence([0.8, 0.8], 0), _evidence([0.9, 0.76], 1), _evidence([0.95, 0.6], 2)
    rules = RulesConfig(max_class_drop=0.05)

    def verdicts(candidate: Evidence) -> dict[str, bool | None]:
        return {check.name: check.passed for check in against(rules, candidate, champion)}

    assert verdicts(slightly)["classes"] is True and verdicts(much)["classes"] is False


def test_a_rule_that_is_null_asks_nothing() -> None:
    performance = Performance(_evidence([0.5, 0.1], 0), 1e6, 10**12)
    assert {check.passed for check in floors(RulesConfig(), performance)} == {None}


def test_rules_have_names_of_their_own_and_every_limit_has_a_rule() -> None:
    names = [rule.name for rule in (*FLOORS, *COMPARISONS)]
    # The audit trail keeps these beside what the comparisons measured.
    assert len({*names, "test", "images", "champion_top1"}) == len(names) + 3
    limits = {field.name for field in dataclasses.fields(RulesConfig) if field.name.startswith(("min_", "max_"))}
    assert {rule.setting for rule in (*FLOORS, *COMPARISONS)} == limits


def test_the_comparison_is_worked_out_once_and_names_the_class_that_loses_most() -> None:
    champion, candidate = _evidence([0.8, 0.8, 0.8], 0), _evidence([0.9, 0.5, 0.7], 1)
    comparison = Comparison.of(RulesConfig(), candidate, champion)
    assert comparison.worst_class == "class 1" and set(comparison.classes) == set(candidate.class_names)
    assert abs(comparison.gain.change - (candidate.right.mean() - champion.right.mean())) < 1e-12
    assert comparison.better - comparison.worse == candidate.right.sum() - champion.right.sum()
    for interval_ in (comparison.gain, *comparison.classes.values()):
        assert interval_.low <= interval_.change <= interval_.high
