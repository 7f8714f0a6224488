"""Stage `register`: a package that answers like the student, without torch, and is registered once."""

import base64
import dataclasses
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server
from PIL import Image

from dho.config import Config, StudentConfig, from_dict, to_dict
from dho.core.errors import DataError, DhoError, TrackingError
from dho.registry import onnx_export as export
from dho.registry.batch_predict import score
from dho.registry.onnx_export import export_onnx
from dho.runtime import dho_runtime
from dho.student.model import Student
from dho.student.saved import StudentCard, save_student

STUDENT = StudentConfig(
    model="resnet18", model_args={"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 32]}, input_size=32
)
CLASSES = [f"class {i}" for i in range(7)]
ALPHA, BETA = 0.4, 0.3
FILES = [
    "MLmodel",
    "artifacts/card.json",
    "artifacts/evidence/measured.json",
    "artifacts/lineage/lineage.json",
    "artifacts/model_card/model_card.md",
    "artifacts/student.onnx",
    "code/dho_runtime.py",
    "conda.yaml",
    "input_example.json",
    "pyfunc_model.py",
    "python_env.yaml",
    "requirements.txt",
    "serving_input_example.json",
]


@dataclasses.dataclass
class House:
    """One MLflow server (SQLite) with one registered student."""

    folder: Path
    config: Config
    client: MlflowClient
    student: Student
    result: dict
    images: list[bytes]
    model: mlflow.pyfunc.PyFuncModel

    def predict(self, images: list, **params: object) -> pd.DataFrame:
        return self.model.predict(pd.DataFrame({"image": images}), params=params)


@pytest.fixture(scope="module")
def registry():
    return importlib.import_module("dho.registry.register")


@pytest.fixture(scope="module")
def house(registry, tmp_path_factory):
    folder = tmp_path_factory.mktemp("register")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(folder)  # MLflow makes a folder mlruns where it is started
        config = from_dict({"tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"}})
        client = registry.connect(config.tracking)
        client.create_experiment("served", (folder / "artifacts").as_uri())
        student = _student(folder / "student", _run(client), ("ce", "kd"))
        _metrics(folder / "metrics.json", ALPHA, BETA)
        images = _images()
        result = registry.register(
            config, folder / "student", folder / "metrics.json", folder / "out.json", example=images[0]
        )
        model = mlflow.pyfunc.load_model(f"models:/{config.registry.name}@candidate")
        yield House(folder, config, client, student, result, images, model)


def _run(client: MlflowClient) -> str:
    experiment = client.get_experiment_by_name("served")
    run = client.create_run(experiment.experiment_id, run_name="a training that ended")
    client.log_metric(run.info.run_id, "test/combined/top1", 0.75, step=90)
    client.log_param(run.info.run_id, "train.eta", 2.0)
    client.set_terminated(run.info.run_id, "FAILED", end_time=1_700_000_000_000)
    return run.info.run_id


def _student(folder: Path, run_id: str, heads: tuple[str, ...], seed: int = 0) -> Student:
    torch.manual_seed(seed)
    student = Student(STUDENT, len(CLASSES), heads).eval()
    for head in (student.ce_head, student.kd_head):
        if head is not None:
            # Heads of a fresh network answer the same to every image; these have opinions.
            torch.nn.init.normal_(head.weight, std=3.0)
    method = "dho" if len(heads) == 2 else heads[0]
    fingerprints = {"data": "d" * 64, "parameters": "p" * 64}
    save_student(
        folder, student, StudentCard(to_dict(STUDENT), list(heads), CLASSES, method, run_id, 100, fingerprints)
    )
    return student


def _metrics(path: Path, alpha: float | None, beta: float | None) -> None:
    per_class = {"a (b) & c": 0.5, "never seen": None}
    test = {
        "combined": {"top1": 0.75, "ece": 0.1, "per_class": per_class},
        "ce_head": {"top1": 0.5},
        "teacher": {},
        "images": 100,
    }
    path.write_text(json.dumps({"alpha": alpha, "beta": beta, "val": {}, "test": test}))


def _images() -> list[bytes]:
    """Encoded images of many formats, modes and sizes; photographs are smooth, and so are these."""
    generator = np.random.default_rng(0)

    def picture(width: int, height: int, bands: int) -> np.ndarray:
        coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 4), np.uint8), "RGBA").resize(
            (width, height), Image.Resampling.BICUBIC
        )
        return np.asarray(coarse)[..., :bands]

    def encode(image: Image.Image, kind: str, **options: object) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    rotated = Image.Exif()
    rotated[0x0112] = 6
    dark = picture(40, 40, 3).copy()
    dark[:20] = 0  # the first rows come last in a BMP file, which then ends in zero bytes
    grey16 = (picture(50, 30, 1)[..., 0].astype(np.uint16) << 8) + 77
    return [
        encode(Image.fromarray(picture(64, 48, 3)), "JPEG"),
        encode(Image.fromarray(picture(20, 90, 3)), "JPEG", exif=rotated),
        encode(Image.fromarray(picture(80, 60, 4), "CMYK"), "JPEG"),
        encode(Image.fromarray(picture(33, 32, 4)), "PNG"),
        encode(Image.fromarray(picture(28, 28, 1)[..., 0]), "PNG"),
        encode(Image.fromarray(picture(100, 45, 3)).quantize(16), "GIF"),
        encode(Image.fromarray(grey16), "PNG"),
        encode(Image.fromarray(picture(200, 150, 3)), "WEBP"),
        encode(Image.fromarray(picture(47, 53, 3)).convert("1"), "TIFF"),
        encode(Image.fromarray(dark), "BMP"),
        encode(Image.fromarray(picture(1, 7, 3)), "PNG"),
    ]


def _pixels(images: list[bytes]) -> torch.Tensor:
    views = [dho_runtime.decode(data) for data in images]
    pixels = np.stack([dho_runtime.render(view, dho_runtime.centre_box(*view.size), 32, "bilinear") for view in views])
    return torch.from_numpy(dho_runtime.normalise(pixels, STUDENT.mean, STUDENT.std))


def _versions(house: House, name: str) -> list:
    return house.client.search_model_versions(f"name = '{name}'")


def test_the_package_answers_like_torch_on_images_of_every_kind(house):
    assert house.images[9].endswith(b"\0")
    expected = house.student.predict(_pixels(house.images), ALPHA, BETA)
    answers = house.predict(house.images, top_k=3)
    assert len(set(answers["label"])) > 1
    assert list(answers["label"]) == [CLASSES[i] for i in expected.argmax(-1)]
    np.testing.assert_allclose(answers["probability"], expected.max(-1).values, atol=1e-5)
    top = expected.topk(3)
    assert list(answers["top_labels"]) == [[CLASSES[i] for i in row] for row in top.indices]
    np.testing.assert_allclose(np.stack(answers["top_probabilities"]), top.values, atol=1e-5)
    assert answers["error"].isna().all()


def test_answers_do_not_depend_on_the_batch_size_and_keep_the_index(house):
    index = [f"photo {i}" for i in range(len(house.images))]
    table = pd.DataFrame({"image": house.images}, index=index)
    one, all_ = (house.model.predict(table, params={"batch_size": n}) for n in (1, 64))
    assert list(one.index) == index
    assert list(one["label"]) == list(all_["label"])
    np.testing.assert_allclose(one["probability"], all_["probability"], atol=1e-6)
    assert list(house.model.predict(table[:0]).columns) == list(one.columns)


@pytest.mark.parametrize("alpha", [0, 1])
def test_alpha_0_and_1_give_the_single_heads(house, alpha):
    with torch.inference_mode():
        logits = house.student(_pixels(house.images))
    expected = logits["ce"].softmax(-1) if alpha else (logits["kd"] / 0.7).softmax(-1)
    answers = house.predict(house.images, alpha=float(alpha), beta=0.7)
    assert list(answers["label"]) == [CLASSES[i] for i in expected.argmax(-1)]
    np.testing.assert_allclose(answers["probability"], expected.max(-1).values, atol=1e-5)


def test_candidate_predicts_where_torch_and_dho_cannot_be_imported(house, tmp_path):
    image = tmp_path / "image"
    image.write_bytes(house.images[0])
    script = f"""
        import sys
        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("torch", "torchvision", "timm", "onnx", "dho"):
                    raise ImportError(f"{{name}} is not on this machine")
        sys.meta_path.insert(0, Block())
        import mlflow, pandas, pathlib
        mlflow.set_tracking_uri({house.config.tracking.uri!r})
        model = mlflow.pyfunc.load_model("models:/{house.config.registry.name}@candidate")
        answer = model.predict(pandas.DataFrame({{"image": [pathlib.Path({str(image)!r}).read_bytes()]}}))
        print(answer.to_json(orient="records"))
    """
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MLFLOW_TRACKING_URI")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (answer,) = json.loads(done.stdout.splitlines()[-1])
    here = house.predict(house.images[:1])
    assert answer["label"] == here["label"][0]
    assert answer["probability"] == pytest.approx(here["probability"][0], abs=1e-6)


BAD = {
    b"hello": "not an image of a known format",
    _images()[0][:-100]: "truncated or broken",
    b"": "empty file",
    None: "nothing where the bytes of an image were expected",
    "no base 64!": "text that is not base64",
    7: "int where the bytes of an image were expected",
}


@pytest.mark.parametrize(("bad", "reason"), BAD.items(), ids=BAD.values())
def test_a_bad_image_stops_the_call_and_names_its_row(house, bad, reason):
    with pytest.raises(MlflowException, match=f"^row 2: {reason}") as caught:
        house.predict([*house.images[:2], bad, house.images[3]], batch_size=2)
    assert "\n" not in str(caught.value)


def test_with_on_error_null_bad_images_get_a_reason_and_the_others_an_answer(house):
    mixed = pd.DataFrame({"image": [b"", house.images[0], *BAD, house.images[1]]}, dtype=object)
    answers = house.model.predict(mixed, params={"on_error": "null", "batch_size": 3})
    good = house.predict(house.images[:2])
    assert [answers["label"][i] for i in (1, 8)] == list(good["label"])
    assert [answers["error"][i] for i in (1, 8)] == [None, None]
    bad = answers.drop(index=[1, 8])
    assert all(
        error.startswith(reason) for error, reason in zip(bad["error"], ["empty file", *BAD.values()], strict=True)
    )
    assert all(
        value is None for name in ("label", "probability", "top_labels", "top_probabilities") for value in bad[name]
    )


@pytest.mark.parametrize("form", ["dataframe_split", "dataframe_records", "instances", "inputs"])
def test_a_server_takes_base64_in_each_of_mlflows_forms_and_answers_in_strict_json(house, form):
    texts = [base64.b64encode(data).decode() for data in (house.images[9], b"no image", house.images[0])]
    body = {"dataframe_split": {"columns": ["image"], "data": [[text] for text in texts]}, "inputs": {"image": texts}}
    request = {
        form: body.get(form, [{"image": text} for text in texts]),
        "params": {"on_error": "null", "alpha": 1, "top_k": 2},
    }
    answer = scoring_server.invocations(
        json.dumps(request), "application/json", house.model, house.model.metadata.get_input_schema()
    )

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    predictions = json.loads(answer.response, parse_constant=refuse)["predictions"]
    here = house.predict([house.images[9], house.images[0]], alpha=1.0)
    assert [row["label"] for row in predictions] == [here["label"][0], None, here["label"][1]]
    assert predictions[1]["error"] == "not an image of a known format" and len(predictions[0]["top_labels"]) == 2


@pytest.mark.parametrize("kind", [bytes, str])
def test_base64_in_the_column_is_taken_too(house, kind):
    text = base64.encodebytes(house.images[3])
    value = text if kind is bytes else text.decode()
    assert house.predict([value])["probability"][0] == house.predict([house.images[3]])["probability"][0]


def test_paths_and_arrays_are_taken_as_the_same_image_in_a_table_or_a_list(house, tmp_path):
    data = house.images[3]
    (tmp_path / "image.png").write_bytes(data)
    array = np.asarray(Image.open(io.BytesIO(data)))
    expected = house.predict([data])["probability"][0]
    assert array.shape[2] == 4
    answers = house.predict([data, tmp_path / "image.png", array, np.asarray(dho_runtime.decode(data))])
    assert list(answers["probability"]) == [expected] * 4
    assert list(house.model.predict({"image": [data, array]})["probability"]) == [expected] * 2
    texts = [base64.b64encode(data).decode()] * 3
    assert list(house.model.predict({"image": texts})["probability"]) == [expected] * 3
    grey = Image.open(io.BytesIO(house.images[4]))
    assert house.predict([np.asarray(grey)])["probability"][0] == house.predict([house.images[4]])["probability"][0]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Path("nowhere.png"), "nowhere.png: No such file"),
        ("/etc/hostname", "text that is not base64"),
        (np.zeros((4, 4, 3), np.float32), "array float32"),
        (np.zeros((4, 4, 2), np.uint8), "array uint8"),
        (np.zeros((0, 4, 3), np.uint8), "array uint8"),
    ],
    ids=["no file", "path as text", "floats", "two bands", "nothing"],
)
def test_a_path_or_an_array_that_is_no_image_is_an_error_of_its_row(house, bad, reason):
    answers = house.predict([house.images[0], bad], on_error="null")
    assert answers["label"][0] is not None and answers["error"][1].startswith(reason)


def test_both_heads_are_answered_when_asked_for(house):
    answers = house.predict([*house.images, b""], heads=True, on_error="null", beta=0.7)
    with torch.inference_mode():
        logits = house.student(_pixels(house.images))
    for column, expected in (("ce_head", logits["ce"].softmax(-1)), ("kd_head", (logits["kd"] / 0.7).softmax(-1))):
        np.testing.assert_allclose(np.stack(answers[column][:-1]), expected, atol=1e-5)
        assert answers[column].iloc[-1] is None
    assert house.model.metadata.metadata["class_names"] == CLASSES
    assert "ce_head" not in house.predict(house.images[:1])


def test_more_images_than_a_call_may_hold_are_refused(house):
    with pytest.raises(MlflowException, match="10001 images in one call; send at most 10000"):
        house.predict([b""] * 10_001, on_error="null")


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
    assert score(house.config.tracking, uri, [tmp_path / "photos"], tmp_path / "out.parquet") == (2, 1)
    table = pd.read_parquet(tmp_path / "out.parquet").set_index("path")
    assert list(table.index) == [str(tmp_path / "photos" / name) for name in ("b.jpg", "broken.png", "deep/a.PNG")]
    assert table["label"].iloc[0] == house.predict(house.images[:1])["label"][0]
    assert table["error"].iloc[1] == "not an image of a known format" and set(table["model"]) == {house.result["uri"]}
    with pytest.raises(DataError, match="no image here"):
        score(house.config.tracking, uri, [tmp_path / "photos/notes.txt"][:0], tmp_path / "none.parquet")


@pytest.mark.parametrize(
    "params",
    [{"alpha": 1.5}, {"alpha": float("nan")}, {"beta": 0.0}, {"top_k": 0}, {"batch_size": 0}, {"on_error": "ignore"}],
    ids=str,
)
def test_a_parameter_that_is_not_allowed_is_named(house, params):
    with pytest.raises(MlflowException, match=f"{next(iter(params))} is .*; expected "):
        house.predict(house.images[:1], **params)


def test_the_package_holds_no_pickle_and_pins_what_it_needs(house):
    folder = Path(mlflow.artifacts.download_artifacts(house.result["uri"]))
    files = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    )
    # The registry adds its own note when a version is downloaded.
    assert [name for name in files if name != "registered_model_meta"] == FILES
    assert not any(
        path.read_bytes()[:1] == b"\x80" for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"
    )
    lines = (folder / "requirements.txt").read_text().splitlines()
    assert sorted(line.split("==")[0] for line in lines) == [
        "mlflow-skinny",
        "numpy",
        "onnxruntime",
        "pandas",
        "pillow",
    ]
    card = json.loads((folder / "artifacts/card.json").read_text())
    assert (card["class_names"], card["heads"], card["alpha"], card["beta"]) == (CLASSES, ["ce", "kd"], ALPHA, BETA)
    assert card["run_id"] == house.result["run_id"] and card["fingerprints"]["data"] == "d" * 64


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


def test_the_same_package_is_registered_once_and_other_weights_or_alpha_make_a_version(house, registry, tmp_path):
    config = from_dict({**to_dict(house.config), "registry": {"name": "twice"}})
    arguments = (config, house.folder / "student", tmp_path / "metrics.json", tmp_path / "out.json")
    _metrics(tmp_path / "metrics.json", ALPHA, BETA)
    first = registry.register(*arguments)
    _metrics(tmp_path / "metrics.json", 0.9, BETA)
    other = registry.register(*arguments)
    _metrics(tmp_path / "metrics.json", ALPHA, BETA)
    again = registry.register(*arguments)
    assert first == again and (first["version"], other["version"]) == (1, 2)
    assert first["sha256"] == other["sha256"] == house.result["sha256"]
    assert len(_versions(house, "twice")) == 2
    assert int(house.client.get_model_version_by_alias("twice", "candidate").version) == 1


@pytest.mark.parametrize(("head", "alpha"), [("ce", 1.0), ("kd", 0.0)])
def test_a_student_with_one_head_is_served(house, registry, tmp_path, head, alpha):
    config = from_dict({**to_dict(house.config), "registry": {"name": f"only-{head}"}})
    student = _student(tmp_path / "student", house.result["run_id"], (head,), seed=1)
    _metrics(tmp_path / "metrics.json", None if head == "ce" else alpha, None if head == "ce" else BETA)
    result = registry.register(config, tmp_path / "student", tmp_path / "metrics.json", tmp_path / "out.json")
    model = mlflow.pyfunc.load_model(result["uri"])
    expected = student.predict(_pixels(house.images), alpha, BETA)
    answers = model.predict(pd.DataFrame({"image": house.images}))
    assert list(answers["label"]) == [CLASSES[i] for i in expected.argmax(-1)]
    np.testing.assert_allclose(answers["probability"], expected.max(-1).values, atol=1e-5)
    with pytest.raises(MlflowException, match=r"alpha 0\.5 gives weight to a head"):
        model.predict(pd.DataFrame({"image": house.images[:1]}), params={"alpha": 0.5})


def test_two_packages_in_one_process_keep_their_own_pixels(house, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(mlflow.artifacts.download_artifacts(house.result["uri"]), folder)
    with (folder / "code/dho_runtime.py").open("a") as file:
        file.write("\ndef centre_box(width, height):\n    return (0, 0, 1, 1)\n")
    before = house.predict(house.images)["probability"]
    other = mlflow.pyfunc.load_model(str(folder)).predict(pd.DataFrame({"image": house.images}))["probability"]
    assert (np.abs(other - before) > 1e-3).any()
    assert (house.predict(house.images)["probability"] == before).all()


def test_the_alias_stays_where_the_package_does_not_answer_like_the_student(house, registry, tmp_path, monkeypatch):
    config = from_dict({**to_dict(house.config), "registry": {"name": "wrong"}})
    _metrics(tmp_path / "metrics.json", 0.8, BETA)
    monkeypatch.setattr(registry, "expected_answer", lambda *_: np.array([0.99, 0.01]))
    with pytest.raises(DhoError, match="not registered"):
        registry.register(config, house.folder / "student", tmp_path / "metrics.json", tmp_path / "out.json")
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
def test_metrics_that_cannot_be_used_are_one_line(house, registry, tmp_path, text, reason):
    if text is not None:
        (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(DataError, match=reason) as caught:
        registry.register(house.config, house.folder / "student", tmp_path / "metrics.json", tmp_path / "out.json")
    assert "\n" not in str(caught.value)


def test_an_unknown_run_a_refused_name_and_a_bad_example_are_one_line(house, registry, tmp_path):
    good, metrics, out = house.folder / "student", house.folder / "metrics.json", tmp_path / "out.json"
    _student(tmp_path / "stray", "0" * 32, ("ce", "kd"))
    with pytest.raises(TrackingError, match="is not on this MLflow server"):
        registry.register(house.config, tmp_path / "stray", metrics, out)
    with pytest.raises(DataError, match="the input example is not usable"):
        registry.register(house.config, good, metrics, out, example=b"no image")
    config = from_dict({**to_dict(house.config), "registry": {"name": "a/b:c"}})
    with pytest.raises(TrackingError, match="cannot look up or make") as caught:
        registry.register(config, good, metrics, out)
    assert "\n" not in str(caught.value) and not out.exists()


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
