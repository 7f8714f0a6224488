"""Promotion: a better student is promoted, others are refused with the reason, and the story can be read and undone."""

from __future__ import annotations

import copy
import dataclasses
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from dho.cli import main
from dho.config import Config, RulesConfig, StudentConfig, from_dict, to_dict
from dho.core.errors import DataError, TrackingError
from dho.core.workspace import Workspace
from dho.data.fetch import fetch
from dho.data.index import Index
from dho.data.prepare import prepare
from dho.registry import lease as claims
from dho.registry import promote as promotion
from dho.registry.evidence import Evidence, TestSet
from dho.registry.lineage import Sources, lineage
from dho.registry.listing import listing
from dho.registry.promote import PromotionRefused, history, promote, rollback
from dho.registry.register import register
from dho.registry.rules import Facts, against, floors, interval
from dho.runtime.dho_runtime import centre_box, decode, mix, render
from dho.student.model import Student
from dho.student.saved import StudentCard, save_student

STUDENT = StudentConfig(model="resnet18", model_args={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 32]}, input_size=32)
COLOURS = {"blue": (40, 60, 200), "green": (40, 190, 60), "red": (200, 50, 40)}
ALPHA, BETA = 0.4, 0.5


def paint(folder: Path, seed: int, each: int) -> None:
    """Noisy squares of one colour, a folder a class."""
    generator = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(each):
            noise = generator.normal(0, 25, (12, 12, 3)) + generator.normal(0, 10, 3)
            pixels = np.clip(np.asarray(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:03d}.png")


@dataclasses.dataclass
class Shop:
    """An MLflow server (SQLite), two prepared data sets, and one registered version a kind of student."""

    folder: Path
    config: Config
    client: MlflowClient
    versions: dict[str, Any]

    @property
    def prepared(self) -> Path:
        return self.folder / "data"

    def named(self, name: str, *kinds: str, **rules: Any) -> Config:
        """A registered model of its own with these versions, numbered from 1; the last one is the candidate."""
        self.client.create_registered_model(name)
        for kind in kinds:
            made = self.versions[kind]
            number = self.client.create_model_version(
                name, made.source, run_id=made.run_id, tags=made.tags, model_id=made.model_id
            ).version
            self.client.set_registered_model_alias(name, "candidate", number)
        tree = to_dict(self.config)
        tree["registry"] = {"name": name, "rules": rules}
        return from_dict(tree)

    def aliases(self, name: str) -> dict[str, str]:
        return {
            alias: str(number)
            for alias, number in self.client.get_registered_model(name).aliases.items()
            if alias != "candidate"
        }

    def state(self, name: str) -> Any:
        model = self.client.get_registered_model(name)
        return (
            model.tags,
            model.aliases,
            [version.tags for version in self.client.search_model_versions(f"name = '{name}'")],
        )


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("shop")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tree: dict[str, Any] = {"tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"}, "registry": {"name": "shop"}}
        for number, place in enumerate(("data", "other")):
            paint(folder / f"{place}-images", number, each=90)
            splits = {"shots": 4, "val_per_class": 5, "test_per_class": 60}
            config = from_dict(
                tree | {"data": {"name": "folder", "source": str(folder / f"{place}-images"), "splits": splits}}
            )
            workspace = Workspace(folder, raw=folder / f"{place}-raw", prepared=folder / place)
            fetch(config, workspace)
            prepare(config, workspace)
        config = from_dict(tree)
        client = promotion.connect(config.tracking)
        made = {
            kind: _register(config, client, folder, kind, student)
            for kind, student in _students(Index.load(folder / "data")).items()
        }
        yield Shop(folder, config, client, made)


def _students(index: Index) -> dict[str, Student]:
    """`good` knows the colours; `poor` is a noisy copy of it; `broken` never says blue; `elsewhere` is good, but measured on other data."""
    torch.manual_seed(0)
    good = Student(STUDENT, len(COLOURS)).eval()
    rows = index.rows("labelled", "val", "unlabelled")
    with torch.inference_mode():
        z = good(_images(index, rows))["z"]
        scale = z.std(0).clamp_min(1e-3)
        centred = torch.cat([(z - z.mean(0)) / scale, torch.ones(len(z), 1)], 1)
        names = [key.split("/")[0] for key in _sources(index)]
        truth = torch.tensor([index.class_names.index(names[row]) for row in rows])
        weights = (
            torch.linalg.lstsq(
                centred, torch.nn.functional.one_hot(truth, len(COLOURS)).float(), driver="gelsd"
            ).solution
            * 8
        )
        for head in (good.ce_head, good.kd_head):
            assert head is not None
            head.weight.copy_((weights[:-1] / scale[:, None]).T)
            head.bias.copy_(weights[-1] - (weights[:-1] / scale[:, None]).T @ z.mean(0))
    poor, broken, elsewhere = (copy.deepcopy(good) for _ in range(3))
    with torch.inference_mode():
        for student, change in ((poor, [0.0, 5.0, 0.0]), (broken, [-40.0, 0.0, 0.0]), (elsewhere, [0.0, 1e-5, 0.0])):
            for head in (student.ce_head, student.kd_head):
                assert head is not None
                head.bias.add_(torch.tensor(change))
    return {"poor": poor, "good": good, "broken": broken, "elsewhere": elsewhere}


def _sources(index: Index) -> list[str]:
    import pyarrow.parquet as pq

    return [str(source) for source in pq.read_table(index.folder / "index.parquet")["source"].to_pylist()]


def _images(index: Index, rows: Any) -> torch.Tensor:
    views = [decode(index.read(int(row))) for row in rows]
    pixels = np.stack([render(view, centre_box(*view.size), STUDENT.input_size, "bilinear") for view in views])
    return Student.normalise(Student(STUDENT, 2), torch.from_numpy(pixels))


def _register(config: Config, client: MlflowClient, folder: Path, kind: str, student: Student) -> Any:
    place = "other" if kind == "elsewhere" else "data"
    index = Index.load(folder / place)
    experiment = client.get_experiment_by_name("shop")
    number = (
        experiment.experiment_id if experiment else client.create_experiment("shop", (folder / "artifacts").as_uri())
    )
    run = client.create_run(
        number, tags={"mlflow.source.git.commit": "c" * 40, "git.dirty": "true", "hardware": "2 x test"}
    )
    client.log_param(run.info.run_id, "train.seed", 7)
    client.log_param(run.info.run_id, "teacher.model", "ViT-B-16")
    prints = {"dataset": index.fingerprint, "teacher_store": "s" * 64}
    card = StudentCard(to_dict(STUDENT), ["ce", "kd"], index.class_names, "dho", run.info.run_id, 9, prints)
    save_student(folder / kind, student, card)
    right = (
        student.predict(_images(index, index.rows("test")), ALPHA, BETA).argmax(1).numpy()
        == index.labels[index.rows("test")]
    )
    (folder / "metrics.json").write_text(
        json.dumps({"alpha": ALPHA, "beta": BETA, "test": {"combined": {"top1": float(right.mean())}}})
    )
    sources = Sources(folder / place, folder / "no store", folder / "no plots", folder / "no repository")
    done = register(config, folder / kind, folder / "metrics.json", folder / f"{kind}.json", sources)
    version = client.get_model_version(done["name"], str(done["version"]))
    assert float(version.tags["test/combined/top1"]) == round(float(right.mean()), 4)
    return version


def test_the_package_measures_the_same_accuracy_as_torch_exactly(shop: Shop) -> None:
    test = TestSet.of(Index.load(shop.prepared))
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
    trained = json.loads((shop.folder / "metrics.json").read_text())  # of the last one registered
    assert trained["test"]["combined"]["top1"] > 0.9
    assert evidence.metrics["top1"] == evidence.right.mean()


def test_a_first_student_is_promoted_on_its_own_merits_and_the_tags_say_so(shop: Shop) -> None:
    config = shop.named("first", "good", min_top1=0.8, max_size_mb=50)
    decision = promote(config, shop.prepared)
    assert decision.promoted and decision.champion is None and not decision.reasons
    assert shop.aliases("first") == {"champion": "1"}
    tags = shop.client.get_model_version("first", "1").tags
    assert (
        tags["promoted.by"]
        and tags["promoted.run_id"] == shop.versions["good"].run_id
        and tags["promoted.from"] == "none"
    )
    assert json.loads(tags["promoted.evidence"])["top1"] > 0.9
    again = promote(config, shop.prepared)
    assert again.promoted and not again.checks and len(history(shop.client, "first")) == 1


def test_a_better_student_takes_over_and_rollback_restores_with_the_story_in_order(shop: Shop) -> None:
    config = shop.named("story", "poor", "good", max_class_drop=0.5)
    assert promote(config, shop.prepared, source="1").promoted
    decision = promote(config, shop.prepared)
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
    assert not [key for key in shop.client.get_registered_model("story").tags if key.startswith(claims.PREFIX)]
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
    decision = promote(config, shop.prepared)
    assert not decision.promoted and any(reason in line for line in decision.reasons), decision.reasons
    assert shop.state(name) == before


def test_a_champion_measured_elsewhere_is_measured_again_on_this_test_set(shop: Shop) -> None:
    config = shop.named("moved", "elsewhere", "good")
    shop.client.set_registered_model_alias("moved", "champion", "1")
    decision = promote(config, shop.prepared)
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
        decision = promote(config, shop.prepared)
    finally:
        path.write_bytes(content)
    assert decision.reasons[0].startswith("files as registered (SHA-256): ") and "changed" in decision.reasons[0]
    assert shop.aliases(name) == {}
    assert promote(config, shop.prepared).promoted


def test_of_two_promotions_at_once_one_wins_and_the_other_says_so(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    config = shop.named("twice", "poor", "good", "good", max_class_drop=0.5)
    promote(config, shop.prepared, source="1")
    both, compare = threading.Barrier(2), promotion._compare

    def compare_together(*arguments: Any) -> Any:
        found = compare(*arguments)
        both.wait(60)
        return found

    monkeypatch.setattr(promotion, "_compare", compare_together)
    monkeypatch.setattr(claims, "PAUSE_S", 0.05)

    def attempt(source: str) -> str:
        try:
            return "promoted" if promote(config, shop.prepared, source=source).promoted else "refused"
        except PromotionRefused as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        ends = dict(zip("23", pool.map(attempt, "23"), strict=True))
    (winner,) = [source for source, end in ends.items() if end == "promoted"]
    (loser,) = set("23") - {winner}
    assert f"version {winner} became champion while version {loser} was compared with 1 (by " in ends[loser]
    assert shop.aliases("twice") == {"champion": winner, "previous": "1"} and len(history(shop.client, "twice")) == 2


@pytest.mark.parametrize("moment", ["before the alias moved", "after the alias moved"])
def test_a_promotion_that_died_half_way_is_finished_or_dropped_by_the_next(
    shop: Shop, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"died {moment}".replace(" ", "-")
    config = shop.named(name, "poor", "good", max_class_drop=0.5)
    promote(config, shop.prepared, source="1")

    class Killed(BaseException):
        pass

    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(claims.Claim, "still_valid", die) if moment.startswith("before") else patch.setattr(
            promotion, "_record", die
        )
        promote(config, shop.prepared)
    assert len(history(shop.client, name)) == 1
    monkeypatch.setattr(claims, "PAUSE_S", 0.02)
    monkeypatch.setattr(claims, "SKEW_S", -claims.LEASE_S)  # the claim of the dead one has run out
    with monkeypatch.context() as patch:
        patch.setattr(claims.Claim, "still_valid", lambda _: None)
        assert promote(config, shop.prepared).promoted
    assert shop.aliases(name) == {"champion": "2", "previous": "1"}
    assert [entry["to"] for entry in history(shop.client, name)] == ["1", "2"]
    assert shop.client.get_model_version(name, "2").tags["promoted.from"] == "1"
    assert not [key for key in shop.client.get_registered_model(name).tags if key.startswith(claims.PREFIX)]


def test_a_claim_lets_one_in_at_a_time(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.client.create_registered_model("counted", tags={"count": "0"})
    monkeypatch.setattr(claims, "PAUSE_S", 0.02)

    def add(number: int) -> None:
        for _ in range(3):
            with claims.claim(shop.client, "counted", "count", str(number), lambda _: None):
                count = int(shop.client.get_registered_model("counted").tags["count"])
                shop.client.set_registered_model_tag("counted", "count", str(count + 1))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(add, range(3)))
    assert shop.client.get_registered_model("counted").tags == {"count": "9"}


def test_an_int8_version_is_smaller_and_stands_or_falls_with_its_own_accuracy(shop: Shop) -> None:
    """The heads were solved for, with large weights that cancel each other, so 8 bits cost this student much; trained ones lose little."""
    config = from_dict(
        to_dict(shop.config) | {"registry": {"name": "int8", "precision": "int8", "rules": {"min_top1": 0.9}}}
    )
    sources = Sources(shop.prepared, shop.folder / "no store", shop.folder / "no plots", shop.folder / "no repository")
    # What training measured says nothing of this package, so it must not be found on it.
    claimed = {source: {"top1": 0.123} for source in ("combined", "ce_head")}
    (shop.folder / "claimed.json").write_text(json.dumps({"alpha": ALPHA, "beta": BETA, "test": claimed}))
    arguments = (shop.folder / "good", shop.folder / "claimed.json", shop.folder / "int8.json")
    with pytest.raises(DataError, match="calibrated on val images"):
        register(config, *arguments)
    done = register(config, *arguments, sources)
    assert register(config, *arguments, sources) == done
    version, whole = shop.client.get_model_version("int8", str(done["version"])), shop.versions["good"]
    assert (
        version.tags["precision"] == "int8"
        and whole.tags["precision"] == "float32"
        and "test/ce_head/top1" not in version.tags
    )
    assert "8-bit integers" in version.description and "8-bit integers" not in whole.description
    folder = Path(mlflow.artifacts.download_artifacts(done["uri"])) / "artifacts"
    measured = json.loads((folder / "evidence/measured.json").read_text())["test"]["metrics"]
    session, index = onnxruntime.InferenceSession(folder / "student.onnx"), Index.load(shop.prepared)
    logits = session.run(["ce", "kd"], {"images": _images(index, index.rows("test")).numpy()})
    right = mix(*logits, ALPHA, BETA).argmax(1) == index.labels[index.rows("test")]
    assert measured["top1"] == right.mean() and version.tags["test/combined/top1"] == f"{right.mean():.4f}"
    float32 = Path(mlflow.artifacts.download_artifacts(f"models:/shop/{whole.version}")) / "artifacts/student.onnx"
    assert (folder / "student.onnx").stat().st_size < 0.8 * float32.stat().st_size
    assert {node.op_type for node in onnx.load(folder / "student.onnx").graph.node} >= {
        "QuantizeLinear",
        "DequantizeLinear",
    }
    decision = promote(config, shop.prepared)
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
    (tmp_path / "data/prepared").symlink_to(shop.prepared)
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

    def verdicts(candidate: Evidence) -> list[bool | None]:
        return [check.passed for check in against(rules, candidate, champion)]

    assert verdicts(slightly)[2] is True and verdicts(much)[2] is False


def test_a_rule_that_is_null_asks_nothing() -> None:
    facts = Facts(_evidence([0.5, 0.1], 0), 1e6, 10**12)
    assert {check.passed for check in floors(RulesConfig(), facts)} == {None}
