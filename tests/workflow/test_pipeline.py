"""The whole workflow through DVC, on a folder of the user's own images: JPEGs of mixed sizes and modes, some broken.

Nothing differs from a fresh clone but `params.yaml`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from backends import KEYS, s3
from conftest import CLASSES, change, draw_image, tiny_tree, write_folder
from PIL import Image

ROOT = Path(__file__).parents[2]
STAGES = ["fetch", "prepare", "pretrain", "teach", "train", "evaluate", "register"]
pytestmark = pytest.mark.timeout(600)


def run(folder: Path, *command: str, ok: bool = True, **environment: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        check=False,
    )
    assert (result.returncode == 0) == ok, f"{command} ended with {result.returncode}:\n{result.stdout}"
    return result.stdout


def ran(output: str) -> list[str]:
    """Stages that a `dvc repro` ran."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def own_images(root: Path) -> None:
    """What people really have: sizes and modes of all kinds, and a few files that are no images any more."""
    write_folder(root, each=28, unlabelled=20)
    for number, mode in enumerate(("CMYK", "L", "L", "1")):
        draw_image("circle", 500 + number, (60 + 9 * number, 48)).convert(mode).save(
            root / "circle" / f"mode{number}.jpg"
        )
    draw_image("square", 600, (200, 150)).convert("RGBA").save(root / "square" / "alpha.PNG")
    draw_image("square", 601, (31, 90)).convert("P").save(root / "square" / "palette.gif")
    turned = draw_image("stripes", 602, (90, 60))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(root / "stripes" / "turned ä.jpeg", exif=exif)
    (root / "circle" / "empty.jpg").write_bytes(b"")
    whole = (root / "circle" / "000.jpg").read_bytes()
    (root / "square" / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "unlabelled" / "page.png").write_text("<html>not found</html>")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of this checkout with another `params.yaml`, after its first `dvc repro`."""
    folder = tmp_path_factory.mktemp("clone")
    names = run(ROOT, "git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    for name in names:
        if (ROOT / name).is_file() and not name.startswith("tests/") and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    images = tmp_path_factory.mktemp("shop") / "photos of the shop"
    own_images(images)
    tree = yaml.safe_load((ROOT / "params.yaml").read_text())
    for section, values in tiny_tree(images, folder).items():
        tree[section] |= values
    tree["data"]["splits"] = {"seed": 0, "shots": 4, "val_per_class": 5, "test_per_class": 5, "captions": 24}
    tree["data"]["max_rejected"] = 0.05
    tree["pretrain"]["confusions"] = {"circle": {"square": 0.2}}
    tree["teacher"]["model"] = "local-dir:data/pretrained"
    tree["tracking"]["uri"] = "sqlite:///mlflow.db"
    tree["registry"] |= {"promote": "auto", "rules": {}}
    (folder / "params.yaml").write_text(yaml.safe_dump(tree))
    for command in (
        ["init", "-q"],
        ["config", "user.name", "a"],
        ["config", "user.email", "a@b.example"],
        ["add", "-A"],
        ["commit", "-qm", "."],
    ):
        run(folder, "git", *command)
    output = run(folder, "dvc", "repro")
    assert ran(output) == STAGES
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-qm", "first")
    return folder


def test_a_second_repro_does_nothing(project: Path) -> None:
    assert ran(run(project, "dvc", "repro")) == []


def test_broken_files_are_listed_and_the_others_converted(project: Path) -> None:
    rejected = (project / "data/prepared/rejected.csv").read_text().splitlines()[1:]
    assert [line.split(",")[0] for line in rejected] == [
        "circle/empty.jpg",
        "square/truncated.jpg",
        "unlabelled/page.png",
    ]
    card = json.loads((project / "data/prepared/dataset.json").read_text())
    assert card["rejected"] == 3 and card["class_names"] == list(CLASSES)
    assert card["images"]["labelled"] == 12


def test_metrics_have_every_source_and_measure(project: Path) -> None:
    metrics = json.loads((project / "outputs/evaluate/metrics.json").read_text())
    assert set(metrics["test"]) == {"ce_head", "kd_head", "combined", "teacher"}
    for values in metrics["test"].values():
        assert set(values) == {"top1", "top5", "nll", "ece", "per_class"}
        assert set(values["per_class"]) == set(CLASSES)
    assert metrics["alpha"] in yaml.safe_load((project / "params.yaml").read_text())["evaluate"]["alphas"]


def test_dvc_shows_metrics_and_plots(project: Path) -> None:
    assert "combined" in run(project, "dvc", "metrics", "show")
    run(project, "dvc", "plots", "show", "--out", "plots")
    page = (project / "plots" / "index.html").read_text()
    assert "surface.png" in page and "val_ce_head_top1" in page and "confusion" in page
    for name in ("surface", "confusion", "reliability", "curves"):
        with Image.open(project / f"outputs/evaluate/plots/{name}.png") as picture:
            assert min(picture.size) > 300


def test_predict_labels_images_and_says_which_it_cannot_read(project: Path, tmp_path: Path) -> None:
    draw_image("circle", 9_000).save(tmp_path / "one.jpg")
    (tmp_path / "two.jpg").write_bytes(b"no image")
    assert str(tmp_path / "one.jpg") in run(project, "dho", "predict", str(tmp_path / "one.jpg"))
    output = run(project, "dho", "predict", str(tmp_path / "one.jpg"), str(tmp_path / "two.jpg"), ok=False)
    assert "two.jpg: not an image" in output and "one.jpg\t" in output
    label, probability = output.split("one.jpg\t")[1].split("\t")[0].rsplit(" ", 1)
    assert label in CLASSES and 1 / 3 <= float(probability) <= 1


def test_the_registered_student_predicts_from_image_bytes(project: Path, tmp_path: Path) -> None:
    registered = json.loads((project / "outputs/register.json").read_text())
    picture = tmp_path / "one.png"
    draw_image("square", 9_001).save(picture)
    script = (
        "import mlflow, pandas, sys; mlflow.set_tracking_uri('sqlite:///mlflow.db');"
        f"model = mlflow.pyfunc.load_model('models:/{registered['name']}@candidate');"
        "print(model.predict(pandas.DataFrame({'image': [open(sys.argv[1], 'rb').read()]})).iloc[0]['label'])"
    )
    served = run(project, sys.executable, "-c", script, str(picture), MLFLOW_DISABLE_TELEMETRY="true").splitlines()[-1]
    local = run(project, "dho", "predict", str(picture)).split("one.png\t")[1].rsplit("\t")[0].rsplit(" ", 1)[0]
    assert served == local


def test_the_first_student_was_promoted_by_dvc_repro_and_labels_a_folder(project: Path, tmp_path: Path) -> None:
    output = run(project, "dho", "registry")
    assert "champion" in output and "promote, champion nobody -> 1" in output
    draw_image("circle", 9_002).save(tmp_path / "one.jpg")
    out = str(tmp_path / "labels.parquet")
    answer = run(project, "dho", "predict", str(tmp_path), "--model", "models:/dho-student@champion", "--out", out)
    assert "holds 1 images" in answer and Path(out).stat().st_size > 0


def test_another_grid_reruns_evaluate_and_register_only(project: Path) -> None:
    change(project, "evaluate", betas=[0.3, 0.5, 0.9])
    assert set(ran(run(project, "dvc", "repro"))) <= {"evaluate", "register"}
    assert ran(run(project, "dvc", "repro")) == []


def test_other_prompts_keep_the_embeddings(project: Path) -> None:
    def shards() -> dict[str, bytes]:
        return {path.name: path.read_bytes()[-64:] for path in (project / "data/teacher").glob("*-*.npy")}

    before, weights = shards(), np.load(project / "data/teacher/text_weights.npy")
    inodes = {path.name: path.stat().st_ino for path in (project / "data/teacher").glob("*-*.npy")}
    change(project, "data", templates=["a drawing of a {}"])
    output = run(project, "dvc", "repro", "teach")
    assert ran(output) == ["teach"] and "replacing" not in output
    assert shards() == before
    assert {path.name: path.stat().st_ino for path in (project / "data/teacher").glob("*-*.npy")} == inodes
    assert not np.allclose(np.load(project / "data/teacher/text_weights.npy"), weights)
    run(project, "git", "checkout", "params.yaml")


def test_an_experiment_with_another_method_runs(project: Path) -> None:
    run(project, "git", "checkout", "params.yaml", "dvc.lock")
    run(project, "dvc", "checkout")
    output = run(project, "dvc", "exp", "run", "-S", "train.method=ce_kd", "-S", "train.epochs=1")
    assert ran(output) == ["train", "evaluate", "register"]
    metrics = json.loads((project / "outputs/evaluate/metrics.json").read_text())
    assert set(metrics["test"]) == {"ce_head", "combined", "teacher"}
    assert "ce_kd" in run(project, "dvc", "exp", "show", "--md")


def test_an_int8_version_is_an_experiment_that_runs_register_only(project: Path) -> None:
    run(project, "git", "checkout", "params.yaml", "dvc.lock")
    run(project, "dvc", "checkout", "--force")
    assert ran(run(project, "dvc", "exp", "run", "-S", "registry.precision=int8")) == ["register"]
    assert "int8" in run(project, "dho", "registry")


def test_an_unknown_parameter_is_one_line_and_stops_the_stage(project: Path) -> None:
    change(project, "train", epocs=3)
    output = run(project, "dvc", "repro", ok=False)
    assert "unknown key train.epocs" in output and "Traceback" not in output
    run(project, "git", "checkout", "params.yaml")


@pytest.fixture(scope="module")
def storage(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The project, back at its first commit, with an S3 server as its default DVC remote; the server's address."""
    run(project, "git", "checkout", "params.yaml", "dvc.lock")
    run(project, "dvc", "checkout", "--force")
    with s3(tmp_path_factory.mktemp("storage") / "s3", "dho") as address:
        run(project, "dvc", "remote", "add", "--default", "storage", "s3://dho/cache")
        run(project, "dvc", "remote", "modify", "storage", "endpointurl", address)
        yield address


@pytest.mark.usefixtures("storage")
def test_data_teacher_store_and_student_travel_by_s3(project: Path, tmp_path: Path) -> None:
    run(project, "dvc", "push", **KEYS)
    other = tmp_path / "other"
    run(tmp_path, "git", "clone", "-q", str(project), str(other))
    shutil.copy(project / ".dvc/config", other / ".dvc/config")
    run(other, "dvc", "pull", "data/prepared", "data/teacher", "outputs/train/student", **KEYS)
    for name in ("data/prepared/index.parquet", "data/teacher/meta.json", "outputs/train/student/model.safetensors"):
        assert (other / name).read_bytes() == (project / name).read_bytes()
    run(other, "dvc", "pull", **KEYS)
    # What is left to do elsewhere is only that place's own registry.
    assert ran(run(other, "dvc", "repro", "evaluate")) == []


def pod(storage: str, revision: str, **more: str) -> dict[str, str]:
    """What a pod's ConfigMap and Secret say."""
    return KEYS | {"DHO_REMOTE": "s3://dho/cache", "AWS_ENDPOINT_URL": storage, "DHO_REVISION": revision} | more


@pytest.mark.parametrize("stage", ["teach", "train"])
def test_a_pod_makes_from_a_pinned_revision_what_the_stage_makes_here(
    project: Path, storage: str, stage: str, tmp_path: Path
) -> None:
    from dho.cluster.revision import collect
    from dho.core.workspace import Workspace

    revision = run(project, "dho", "publish", "--for", stage, **KEYS).splitlines()[-1]
    assert run(project, "dho", "publish", "--for", stage, **KEYS).splitlines()[-1] == revision
    work = tmp_path / "work"
    work.mkdir()
    environment = pod(storage, revision, MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path / 'mlflow.db'}", GIT_COMMIT="0" * 40)
    run(work, "dho", "job", "pull", "--for", stage, **environment)
    run(work, "dho", "job", "pull", "--for", stage, **environment)
    output = run(work, "dho", "job", stage, **environment)
    if stage == "train":
        metrics = json.loads((project / "outputs/evaluate/metrics.json").read_text())
        assert f"models:/dho-student/1, top-1 {100 * metrics['test']['combined']['top1']:.2f} % on test" in output
        assert "train: step" in output
    else:
        assert [path.suffix for path in (work / "checkpoints").iterdir()] == [".in-remote"]
        again = run(work, "dho", "job", stage, **environment)
        assert again == output.splitlines()[-1] + "\n" and "teach: the store is in the remote" in again
    out = tmp_path / "collected"
    with pytest.MonkeyPatch.context() as patched:
        for name, value in KEYS.items():
            patched.setenv(name, value)
        collect(Workspace(project, teacher=out, trained=out), revision, stage)
    made = {"teach": project / "data/teacher", "train": project / "outputs/train"}[stage]
    same = [
        path.relative_to(made)
        for path in made.rglob("*")
        if path.is_file() and path.suffix in (".npy", ".safetensors", ".csv", ".npz")
    ]
    assert len(same) >= 3
    for path in same:
        if path.suffix == ".npz":  # a zip holds the time of writing
            mine, theirs = np.load(made / path), np.load(out / path)
            assert all(np.array_equal(mine[key], theirs[key]) for key in mine.files)
        else:
            assert (out / path).read_bytes() == (made / path).read_bytes(), path


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"DHO_REVISION": "0" * 64}, "NoSuchKey"),
        ({"DHO_REVISION": "latest"}, "expected 64 hex digits"),
        ({"DHO_REMOTE": "/mnt/data"}, "s3://bucket/prefix"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "check the S3 credentials"),
    ],
)
def test_a_pod_that_cannot_pull_says_why_in_one_line(
    storage: str, tmp_path: Path, changed: dict[str, str], words: str
) -> None:
    output = run(tmp_path, "dho", "job", "pull", ok=False, **(pod(storage, "0" * 64) | changed))
    assert words in output and output.count("\n") == 1 and output.startswith("dho: ")


@pytest.mark.usefixtures("storage")
def test_pin_writes_the_revision_into_a_manifest_and_nothing_else(project: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "job.yaml"
    manifest.write_text('data:\n  DHO_REVISION: ""  \n  other: "1"\n')
    revision = run(project, "dho", "publish", "--pin", str(manifest), **KEYS).splitlines()[-1]
    assert manifest.read_text() == f'data:\n  DHO_REVISION: "{revision}"\n  other: "1"\n'
