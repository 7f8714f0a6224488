"""A registered package answers like the student, without torch, whatever it is sent."""

import base64
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
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server
from PIL import Image
from served import ALPHA, BETA, CLASSES, draw_images, network_input, registered_house

from dho.runtime import dho_runtime

FILES = [
    "MLmodel",
    "artifacts/evidence/measured.json",
    "artifacts/lineage/lineage.json",
    "artifacts/model_card/model_card.md",
    "artifacts/package.json",
    "artifacts/student.onnx",
    "code/dho_runtime.py",
    "conda.yaml",
    "input_example.json",
    "pyfunc_model.py",
    "python_env.yaml",
    "requirements.txt",
    "serving_input_example.json",
]


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    with registered_house(tmp_path_factory.mktemp("register")) as house:
        yield house


def test_the_package_answers_like_torch_on_images_of_every_kind(house):
    assert house.images[9].endswith(b"\0")
    expected = house.student.predict(network_input(house.images), ALPHA, BETA)
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
        logits = house.student(network_input(house.images))
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
    draw_images()[0][:-100]: "truncated or broken",
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
        logits = house.student(network_input(house.images))
    for column, expected in (("ce_head", logits["ce"].softmax(-1)), ("kd_head", (logits["kd"] / 0.7).softmax(-1))):
        np.testing.assert_allclose(np.stack(answers[column][:-1]), expected, atol=1e-5)
        assert answers[column].iloc[-1] is None
    assert house.model.metadata.metadata["class_names"] == CLASSES
    assert "ce_head" not in house.predict(house.images[:1])


def test_more_images_than_a_call_may_hold_are_refused(house):
    with pytest.raises(MlflowException, match="10001 images in one call; send at most 10000"):
        house.predict([b""] * 10_001, on_error="null")


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
    package = json.loads((folder / "artifacts/package.json").read_text())
    content = tuple(package[key] for key in ("class_names", "heads", "alpha", "beta"))
    assert content == (CLASSES, ["ce", "kd"], ALPHA, BETA)
    assert package["run_id"] == house.result["run_id"] and package["fingerprints"]["data"] == "d" * 64


def test_two_packages_in_one_process_keep_their_own_pixels(house, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(mlflow.artifacts.download_artifacts(house.result["uri"]), folder)
    with (folder / "code/dho_runtime.py").open("a") as file:
        file.write("\ndef centre_box(width, height):\n    return (0, 0, 1, 1)\n")
    before = house.predict(house.images)["probability"]
    other = mlflow.pyfunc.load_model(str(folder)).predict(pd.DataFrame({"image": house.images}))["probability"]
    assert (np.abs(other - before) > 1e-3).any()
    assert (house.predict(house.images)["probability"] == before).all()
