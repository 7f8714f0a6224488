"""Promotion: a better student is promoted, others are refused with the reason, and the story can be read and undone."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import onnx
import onnxruntime
import pytest
from shop import ALPHA, BETA, COLOURS, Shop, network_inputs, open_shop, write_metrics

from dho.cli import main
from dho.config import from_dict, to_dict
from dho.core.errors import DataError, TrackingError
from dho.data.index import Index
from dho.registry import lease as leases
from dho.registry import promote as promotion
from dho.registry import rules as promotion_rules
from dho.registry.evidence import Evidence, TestSet
from dho.registry.lineage import lineage
from dho.registry.listing import listing
from dho.registry.promote import PromotionRefused, history, promote, rollback
from dho.registry.register import register
from dho.registry.rules import Finding, Rule
from dho.runtime.dho_runtime import mix


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with open_shop(tmp_path_factory.mktemp("shop")) as opened:
        yield opened


def test_the_package_measures_the_same_accuracy_as_torch_exactly(shop: Shop) -> None:
    test = TestSet.of(Index.load(shop.workspace.prepared))
    folder = (
        Path(mlflow.artifacts.download_artifacts(f"models:/shop/{shop.versions['good'].version}"))
        / "artifacts/evidence"
    )
    measured = json.loads((folder / "measured.json").read_text())
    assert measured["test"]["fingerprint"] == test.fingerprint == shop.versions["good"].tags["fingerprint.test"]
    evidence = Evidence.load(
        folder / "test.parquet", test.fingerprint, measured["class_names"], measured["test"]["metrics"]
    )
    assert (evidence.labels == test.labels).all() and len(evidence.labels) == 180
    trained = json.loads(shop.at("data", "good").metrics.read_text())
    assert trained["test"]["combined"]["top1"] > 0.9
    assert evidence.metrics["top1"] == evidence.right.mean()


def test_a_first_student_is_promoted_on_its_own_merits_and_the_tags_say_so(shop: Shop) -> None:
    config = shop.named("first", "good", min_top1=0.8, max_size_mb=50)
    decision = promote(config, shop.workspace)
    assert decision.promoted and decision.champion is None and not decision.reasons
    assert shop.aliases("first") == {"champion": "1"}
    tags = shop.client.get_model_version("first", "1").tags
    assert (
        tags["promoted.by"]
        and tags["promoted.run_id"] == shop.versions["good"].run_id
        and tags["promoted.from"] == "none"
    )
    assert json.loads(tags["promoted.evidence"])["top1"] > 0.9
    again = promote(config, shop.workspace)
    assert again.promoted and not again.checks and len(history(shop.client, "first")) == 1


def test_a_better_student_takes_over_and_rollback_restores_with_the_story_in_order(shop: Shop) -> None:
    config = shop.named("story", "poor", "good", max_class_drop=0.5)
    assert promote(config, shop.workspace, candidate="1").promoted
    decision = promote(config, shop.workspace)
    assert decision.promoted and decision.champion == "1"
    assert shop.aliases("story") == {"champion": "2", "previous": "1"}
    assert rollback(config, "answers too slowly") == ("2", "1")
    assert shop.aliases("story") == {"champion": "1"}
    with pytest.raises(PromotionRefused, match="no earlier version"):
        rollback(config, "again")
    story = history(shop.client, "story")
    assert [(entry["action"], entry["from"], entry["to"]) for entry in story] == [
        ("promote", None, "1"),
        ("promote", "1", "2"),
        ("rollback", "2", "1"),
    ]
    assert [entry["at"] for entry in story] == sorted(entry["at"] for entry in story)
    assert (
        story[2]["reason"] == "answers too slowly"
        and story[1]["evidence"]["champion_top1"] < story[1]["evidence"]["top1"]
    )
    assert shop.client.get_model_version("story", "2").tags["rolled_back.reason"] == "answers too slowly"
    assert not [key for key in shop.client.get_registered_model("story").tags if key.startswith(leases.PREFIX)]
    columns, rows, lines = listing(config)
    assert [row[:2] for row in rows] == [["2", "candidate"], ["1", "champion"]] and len(columns) == len(rows[0])
    assert "rollback, champion 2 -> 1, because: answers too slowly" in lines[2]


@pytest.mark.parametrize(
    ("champion", "candidate", "rules", "reason"),
    [
        ("good", "poor", {}, "gain in top-1 over the champion: -"),
        ("good", "good", {}, "interval (paired bootstrap): 0 points to 0 points"),
        ("good", "broken", {"min_gain": -1.0, "max_class_drop": 0.5}, "class that loses most: blue: -"),
        (
            "good",
            "broken",
            {"min_gain": -1.0, "max_class_drop": 1.0, "min_class_recall": 0.2},
            "recall of the worst class: 0.00 % (blue)",
        ),
        ("poor", "elsewhere", {}, "measured on this test set"),
        (None, "good", {"min_top1": 1.0, "max_ece": 0.0}, "ECE: "),
        (None, "good", {"max_latency_ms": 0.001}, "latency (p99, one image, one thread): "),
        (None, "good", {"max_size_mb": 0.01}, "size: "),
    ],
    ids=["worse", "no better", "class that drops", "broken class", "other data", "floor", "slow", "large"],
)
def test_what_a_rule_refuses_changes_nothing_and_says_why(
    shop: Shop, champion: str | None, candidate: str, rules: dict[str, Any], reason: str, request: pytest.FixtureRequest
) -> None:
    name = f"refused {request.node.callspec.id}".replace(" ", "-")
    config = shop.named(name, *([champion] if champion else []), candidate, **rules)
    if champion:
        shop.client.set_registered_model_alias(name, "champion", "1")
    before = shop.state(name)
    decision = promote(config, shop.workspace)
    assert not decision.promoted and any(reason in line for line in decision.reasons), decision.reasons
    assert shop.state(name) == before


def test_a_champion_measured_elsewhere_is_measured_again_on_this_test_set(shop: Shop) -> None:
    config = shop.named("moved", "elsewhere", "good")
    shop.client.set_registered_model_alias("moved", "champion", "1")
    decision = promote(config, shop.workspace)
    compared = {check.rule: check for check in decision.checks}
    assert not decision.promoted and compared["gain in top-1 over the champion"].value == "0 points"


@pytest.mark.parametrize(
    "file", ["artifacts/student.onnx", "code/dho_runtime.py", "MLmodel", "artifacts/evidence/test.parquet"]
)
def test_a_package_that_was_changed_after_registration_is_refused(shop: Shop, file: str) -> None:
    name = f"changed-{Path(file).name}"
    config = shop.named(name, "good")
    location = shop.client.get_logged_model(shop.versions["good"].source.removeprefix("models:/")).artifact_location
    path = Path(location.removeprefix("file://")) / file
    content = path.read_bytes()
    try:
        path.write_bytes(content + b"\n")
        decision = promote(config, shop.workspace)
    finally:
        path.write_bytes(content)
    assert decision.reasons[0].startswith("files as registered (SHA-256): ") and "changed" in decision.reasons[0]
    assert shop.aliases(name) == {}
    assert promote(config, shop.workspace).promoted


def test_of_two_promotions_at_once_one_wins_and_the_other_says_so(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    config = shop.named("twice", "poor", "good", "good", max_class_drop=0.5)
    promote(config, shop.workspace, candidate="1")
    both, compare = threading.Barrier(2), promotion._compare

    def compare_together(*arguments: Any) -> Any:
        outcome = compare(*arguments)
        both.wait(60)
        return outcome

    monkeypatch.setattr(promotion, "_compare", compare_together)
    monkeypatch.setattr(leases, "PAUSE_S", 0.05)

    def attempt(candidate: str) -> str:
        try:
            return "promoted" if promote(config, shop.workspace, candidate=candidate).promoted else "refused"
        except PromotionRefused as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        ends = dict(zip("23", pool.map(attempt, "23"), strict=True))
    (winner,) = [number for number, end in ends.items() if end == "promoted"]
    (loser,) = set("23") - {winner}
    assert f"version {winner} became champion while version {loser} was compared with 1 (by " in ends[loser]
    assert shop.aliases("twice") == {"champion": winner, "previous": "1"} and len(history(shop.client, "twice")) == 2


def test_a_rule_put_before_the_others_leaves_each_its_own_text_in_the_audit_trail(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    inserted: Rule[Any] = Rule(
        "lost",
        "images lost",
        "max_class_drop",
        lambda comparison: Finding(comparison.worse, f"{comparison.worse} images"),
        lambda value, limit: value <= 1000 * limit,
        lambda limit: f"<= {1000 * limit:g}",
    )
    monkeypatch.setattr(promotion_rules, "COMPARISONS", (inserted, *promotion_rules.COMPARISONS))
    config = shop.named("inserted", "poor", "good", max_class_drop=0.5)
    promote(config, shop.workspace, candidate="1")
    decision = promote(config, shop.workspace)
    assert decision.promoted
    (check,) = [check for check in decision.checks if check.rule == "images lost"]
    assert (check.limit, check.verdict) == ("<= 500", "ok")
    audited = history(shop.client, "inserted")[-1]["evidence"]
    tagged = json.loads(shop.client.get_model_version("inserted", "2").tags["promoted.evidence"])
    for evidence in (audited, tagged):
        assert evidence["lost"] == check.value and evidence["lost"].endswith(" images")
        assert evidence["interval"].endswith(" worse") and " better, " in evidence["interval"]
        assert "at best" in evidence["classes"] and evidence["gain"].endswith(" points")
    assert f"({audited['interval']})" in listing(config)[2][-1]


def test_register_promotes_by_itself_where_params_say_so_and_prints_the_decision(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    def registered(kind: str) -> str:
        config = from_dict(tree)
        register(config, shop.at("data", kind).at(registered=shop.folder / "auto.json"))
        return capsys.readouterr().out

    tree = to_dict(shop.config) | {"registry": {"name": "auto", "promote": "auto", "rules": {}}}
    lines = registered("good").splitlines()
    assert lines[0] == "register: models:/auto@candidate is version 1" and any("verdict" in line for line in lines)
    assert lines[-1] == "promote: models:/auto@champion is version 1"
    assert "promote: version 2 of auto is refused, nothing was changed: gain in top-1" in registered("poor")
    assert shop.aliases("auto") == {"champion": "1"}
    assert json.loads((shop.folder / "auto.json").read_text())["version"] == 2


@pytest.mark.parametrize("moment", ["before the alias moved", "after the alias moved"])
def test_a_promotion_that_died_half_way_is_finished_or_dropped_by_the_next(
    shop: Shop, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"died {moment}".replace(" ", "-")
    config = shop.named(name, "poor", "good", max_class_drop=0.5)
    promote(config, shop.workspace, candidate="1")

    class Killed(BaseException):
        pass

    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(leases.Lease, "check_valid", die) if moment.startswith("before") else patch.setattr(
            promotion, "_record", die
        )
        promote(config, shop.workspace)
    assert len(history(shop.client, name)) == 1
    monkeypatch.setattr(leases, "PAUSE_S", 0.02)
    monkeypatch.setattr(leases, "SKEW_S", -leases.LEASE_S)  # the lease of the dead one has run out
    with monkeypatch.context() as patch:
        patch.setattr(leases.Lease, "check_valid", lambda _: None)
        assert promote(config, shop.workspace).promoted
    assert shop.aliases(name) == {"champion": "2", "previous": "1"}
    assert [entry["to"] for entry in history(shop.client, name)] == ["1", "2"]
    assert shop.client.get_model_version(name, "2").tags["promoted.from"] == "1"
    assert not [key for key in shop.client.get_registered_model(name).tags if key.startswith(leases.PREFIX)]


def test_a_claim_lets_one_in_at_a_time(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.client.create_registered_model("counted", tags={"count": "0"})
    monkeypatch.setattr(leases, "PAUSE_S", 0.02)

    def add(number: int) -> None:
        for _ in range(3):
            with leases.lease(shop.client, "counted", "count", str(number), lambda _: None):
                count = int(shop.client.get_registered_model("counted").tags["count"])
                shop.client.set_registered_model_tag("counted", "count", str(count + 1))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(add, range(3)))
    assert shop.client.get_registered_model("counted").tags == {"count": "9"}


def test_an_int8_version_is_smaller_and_stands_or_falls_with_its_own_accuracy(shop: Shop) -> None:
    """Its heads were solved for: large weights that cancel each other, so 8 bits cost it more than a trained one."""
    config = from_dict(
        to_dict(shop.config) | {"registry": {"name": "int8", "precision": "int8", "rules": {"min_top1": 0.9}}}
    )
    # What training measured says nothing of this package, so it must not be found on it.
    made = shop.at("data", "good", evaluated=shop.folder / "claimed", registered=shop.folder / "int8.json")
    write_metrics(made.metrics, {source: {"top1": 0.123} for source in ("combined", "ce_head")})
    with pytest.raises(DataError, match="calibrated on val images"):
        register(config, made.at(prepared=shop.folder / "nowhere"))
    done = register(config, made)
    assert register(config, made) == done
    version, whole = shop.client.get_model_version("int8", str(done["version"])), shop.versions["good"]
    assert (
        version.tags["precision"] == "int8"
        and whole.tags["precision"] == "float32"
        and "test/ce_head/top1" not in version.tags
    )
    assert "8-bit integers" in version.description and "8-bit integers" not in whole.description
    folder = Path(mlflow.artifacts.download_artifacts(done["uri"])) / "artifacts"
    measured = json.loads((folder / "evidence/measured.json").read_text())["test"]["metrics"]
    session, index = onnxruntime.InferenceSession(folder / "student.onnx"), Index.load(shop.workspace.prepared)
    logits = session.run(["ce", "kd"], {"images": network_inputs(index, index.rows("test")).numpy()})
    right = mix(*logits, ALPHA, BETA).argmax(1) == index.labels[index.rows("test")]
    assert measured["top1"] == right.mean() and version.tags["test/combined/top1"] == f"{right.mean():.4f}"
    float32 = Path(mlflow.artifacts.download_artifacts(f"models:/shop/{whole.version}")) / "artifacts/student.onnx"
    assert (folder / "student.onnx").stat().st_size < 0.8 * float32.stat().st_size
    assert {node.op_type for node in onnx.load(folder / "student.onnx").graph.node} >= {
        "QuantizeLinear",
        "DequantizeLinear",
    }
    decision = promote(config, shop.workspace)
    assert decision.promoted == (right.mean() >= 0.9) and right.mean() > 1 / len(COLOURS)


def test_lineage_says_what_made_a_version_and_how_to_make_it_again(shop: Shop) -> None:
    facts, commands = lineage(shop.config.tracking, f"models:/shop/{shop.versions['good'].version}")
    expected = {
        "git.commit": "c" * 40,
        "train.seed": "7",
        "teacher.model": "ViT-B-16",
        "alpha": "0.4",
        "beta": "0.5",
        "hardware": "2 x test",
    }
    assert expected.items() <= facts.items() and facts["run_id"] == shop.versions["good"].run_id
    assert (
        commands[0] == f"git checkout {'c' * 40}" and "differed" in commands[1] and commands[-1] == "dvc repro register"
    )
    with pytest.raises(DataError, match="expected models:/NAME@ALIAS"):
        lineage(shop.config.tracking, "runs:/x/y")
    with pytest.raises(TrackingError, match="has no models:/shop@nobody"):
        lineage(shop.config.tracking, "models:/shop@nobody")


def test_the_model_card_speaks_of_use_data_classes_calibration_and_limits(shop: Shop) -> None:
    version = shop.versions["good"]
    for words in (
        "Intended use",
        "## Data",
        "Licence",
        "## Worst classes",
        "Calibration",
        "## Limits",
        "## Size and speed",
        "model_card.md",
    ):
        assert words in version.description
    assert len(version.description) <= 5000
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/shop/{version.version}"))
    assert "## Every class" in (folder / "artifacts/model_card/model_card.md").read_text()


def test_the_command_line_prints_the_table_and_ends_with_3_when_refused(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = shop.named("words", "good", min_top1=1.0)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/prepared").symlink_to(shop.workspace.prepared)
    monkeypatch.chdir(tmp_path)

    def ended(*arguments: str) -> int:
        with pytest.raises(SystemExit) as end:
            main(*arguments)
        return int(end.value.code or 0)

    (tmp_path / "params.yaml").write_text(json.dumps(to_dict(config)))
    assert ended("promote") == 3
    out = capsys.readouterr().out
    assert "REFUSED" in out and "top-1" in out and "nothing was changed" in out
    assert ended("rollback", "--reason", "x") == 3
    assert ended("promote", "--from", "nobody") == 1
    assert "no version has the alias nobody" in capsys.readouterr().err
    assert ended("registry") == 0
