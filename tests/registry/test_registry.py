"""Stage `register`: the student becomes a version that says where it comes from, and is registered once."""

import json

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from served import (
    ALPHA,
    BETA,
    CLASSES,
    House,
    make_student,
    make_workspace,
    network_input,
    registered_house,
    write_metrics,
)

from dho.config import from_dict, to_dict
from dho.core.errors import DataError, DhoError, TrackingError
from dho.registry import onnx_export as export
from dho.registry import package
from dho.registry.batch_predict import batch_predict
from dho.registry.onnx_export import export_onnx
from dho.registry.register import register


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    with registered_house(tmp_path_factory.mktemp("register")) as house:
        yield house


def _versions(house: House, name: str) -> list:
    return house.client.search_model_versions(f"name = '{name}'")


def test_a_folder_is_labelled_into_a_parquet_file(house, tmp_path):
    (tmp_path / "photos/deep").mkdir(parents=True)
    for name, data in (
        ("b.jpg", house.images[0]),
        ("deep/a.PNG", house.images[3]),
        ("broken.png", b"no image"),
        ("notes.txt", b"text"),
    ):
        (tmp_path / "photos" / name).write_bytes(data)
    uri = f"models:/{house.config.registry.name}@candidate"
    assert batch_predict(house.config.tracking, uri, [tmp_path / "photos"], tmp_path / "out.parquet") == (2, 1)
    table = pd.read_parquet(tmp_path / "out.parquet").set_index("path")
    assert list(table.index) == [str(tmp_path / "photos" / name) for name in ("b.jpg", "broken.png", "deep/a.PNG")]
    assert table["label"].iloc[0] == house.predict(house.images[:1])["label"][0]
    assert table["error"].iloc[1] == "not an image of a known format" and set(table["model"]) == {house.result["uri"]}
    with pytest.raises(DataError, match="no image here"):
        batch_predict(house.config.tracking, uri, [tmp_path / "photos/notes.txt"][:0], tmp_path / "none.parquet")


def test_the_version_says_where_it_comes_from_and_leaves_the_run_as_it_was(house):
    result = json.loads((house.folder / "out.json").read_text())
    assert result == house.result
    version = house.client.get_model_version_by_alias(result["name"], "candidate")
    assert (int(version.version), version.status, version.run_id) == (1, "READY", result["run_id"])
    expected = {
        "method": "dho",
        "alpha": "0.4",
        "beta": "0.3",
        "test/combined/top1": "0.7500",
        "test/ce_head/top1": "0.5000",
    }
    assert expected.items() <= version.tags.items()
    assert version.tags["fingerprint.data"] == "d" * 64 and version.tags["onnx.sha256"] == result["sha256"]
    run = house.client.get_run(result["run_id"])
    assert (run.info.status, run.info.end_time) == ("FAILED", 1_700_000_000_000)
    assert len(house.client.get_metric_history(result["run_id"], "test/combined/top1")) == 1
    model = house.client.get_logged_model(result["model_id"])
    assert (model.experiment_id, model.source_run_id, model.status) == (
        run.info.experiment_id,
        run.info.run_id,
        "READY",
    )
    assert model.artifact_location.startswith((house.folder / "artifacts").as_uri()) and model.params == {
        "train.eta": "2.0"
    }
    assert (model.model_id, 100) in [(output.model_id, output.step) for output in run.outputs.model_outputs]
    assert {metric.key: metric.value for metric in model.metrics} == {
        "test/combined/top1": 0.75,
        "test/combined/ece": 0.1,
        "test/ce_head/top1": 0.5,
    }
    signature = house.model.metadata.signature
    assert [(p.name, p.default) for p in signature.params] == [
        ("alpha", 0.4),
        ("beta", 0.3),
        ("top_k", 5),
        ("batch_size", 64),
        ("on_error", "raise"),
        ("heads", False),
    ]
    assert house.model.input_example["image"][0] == house.images[0]


def test_the_same_package_is_registered_once_and_other_weights_or_alpha_make_a_version(house, tmp_path):
    config = from_dict({**to_dict(house.config), "registry": {"name": "twice"}})
    arguments = (config, house.workspace(tmp_path))
    write_metrics(tmp_path / "metrics.json", ALPHA, BETA)
    first = register(*arguments)
    write_metrics(tmp_path / "metrics.json", 0.9, BETA)
    other = register(*arguments)
    write_metrics(tmp_path / "metrics.json", ALPHA, BETA)
    again = register(*arguments)
    assert first == again and (first["version"], other["version"]) == (1, 2)
    assert first["sha256"] == other["sha256"] == house.result["sha256"]
    assert len(_versions(house, "twice")) == 2
    assert int(house.client.get_model_version_by_alias("twice", "candidate").version) == 1


@pytest.mark.parametrize(("head", "alpha"), [("ce", 1.0), ("kd", 0.0)])
def test_a_student_with_one_head_is_served(house, tmp_path, head, alpha):
    config = from_dict({**to_dict(house.config), "registry": {"name": f"only-{head}"}})
    student = make_student(tmp_path / "student", house.result["run_id"], (head,), seed=1)
    write_metrics(tmp_path / "metrics.json", None if head == "ce" else alpha, None if head == "ce" else BETA)
    result = register(config, make_workspace(tmp_path))
    model = mlflow.pyfunc.load_model(result["uri"])
    expected = student.predict(network_input(house.images), alpha, BETA)
    answers = model.predict(pd.DataFrame({"image": house.images}))
    assert list(answers["label"]) == [CLASSES[i] for i in expected.argmax(-1)]
    np.testing.assert_allclose(answers["probability"], expected.max(-1).values, atol=1e-5)
    with pytest.raises(MlflowException, match=r"alpha 0\.5 gives weight to a head"):
        model.predict(pd.DataFrame({"image": house.images[:1]}), params={"alpha": 0.5})


def test_the_alias_stays_where_the_package_does_not_answer_like_the_student(house, tmp_path, monkeypatch):
    config = from_dict({**to_dict(house.config), "registry": {"name": "wrong"}})
    write_metrics(tmp_path / "metrics.json", 0.8, BETA)
    monkeypatch.setattr(package, "expected_answer", lambda *_: np.array([0.99, 0.01]))
    with pytest.raises(DhoError, match="not registered"):
        register(config, house.workspace(tmp_path))
    assert _versions(house, "wrong") == [] and not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "no metrics here"),
        ("{", "no metrics here"),
        ("[]", "no metrics here"),
        ('{"beta": 0.3}', "alpha is None"),
        ('{"alpha": 2, "beta": 0.3}', "alpha is 2"),
        ('{"alpha": 0.5, "beta": 0}', "beta is 0"),
    ],
)
def test_metrics_that_cannot_be_used_are_one_line(house, tmp_path, text, reason):
    if text is not None:
        (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(DataError, match=reason) as caught:
        register(house.config, house.workspace(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_unknown_run_a_refused_name_and_a_bad_example_are_one_line(house, tmp_path):
    write_metrics(tmp_path / "metrics.json", ALPHA, BETA)
    good = house.workspace(tmp_path)
    make_student(tmp_path / "student", "0" * 32, ("ce", "kd"))
    with pytest.raises(TrackingError, match="is not on this MLflow server"):
        register(house.config, make_workspace(tmp_path))
    with pytest.raises(DataError, match="the input example is not usable"):
        register(house.config, good, example=b"no image")
    config = from_dict({**to_dict(house.config), "registry": {"name": "a/b:c"}})
    with pytest.raises(TrackingError, match="cannot look up or make") as caught:
        register(config, good)
    assert "\n" not in str(caught.value) and not good.registered.exists()


def test_without_a_data_set_speed_alone_is_measured_and_that_is_printed(house, tmp_path, capsys):
    config = from_dict({**to_dict(house.config), "registry": {"name": "speed"}})
    write_metrics(tmp_path / "metrics.json", ALPHA, BETA)
    workspace = house.workspace(tmp_path)
    done = register(config, workspace)
    note, line = capsys.readouterr().out.splitlines()
    assert note.startswith(f"register: {workspace.prepared} holds no data set, so only speed is measured")
    assert line == "register: models:/speed@candidate is version 1"
    tags = house.client.get_model_version("speed", str(done["version"])).tags
    assert "latency_ms/batch1/threads1/p99" in tags and "fingerprint.test" not in tags


def test_an_export_gives_the_same_bytes_each_time_and_leaves_the_student_alone(house, tmp_path):
    student = house.student.train()
    try:
        export_onnx(student, tmp_path / "a.onnx")
        assert student.training
    finally:
        student.eval()
    export_onnx(student, tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_an_export_that_answers_differently_leaves_no_file(house, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(DhoError, match="ONNX Runtime's logits differ from torch's by"):
        export_onnx(house.student, tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []
