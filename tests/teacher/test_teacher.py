"""The teacher and its store.

Any open_clip checkpoint is loaded; a store is interrupted and continued, on one rank or two, and refused when it does
not match.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import yaml
from conftest import ALONE, CLASSES, Tiny, changed
from PIL import Image

from dho.config import TeacherConfig
from dho.core.errors import DataError, StoreMismatch
from dho.data.pixels import Pixels
from dho.teacher.classifier import open_classifier
from dho.teacher.clip import Teacher
from dho.teacher.pretrain import captioned
from dho.teacher.store import TeacherStore
from dho.teacher.teach import teach


@pytest.fixture
def store_copy(tiny: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.store_folder, tmp_path / "store"))


def test_the_store_holds_what_the_teacher_says_of_the_same_pixels(tiny: Tiny) -> None:
    index, store = tiny.index, tiny.store
    teacher = Teacher.load(tiny.config.teacher, torch.device("cpu"))
    rows = index.rows("labelled", "unlabelled")[[0, 5, 17, 40]]
    pixels = Pixels(index, tiny.config.views, teacher.input_size, teacher.interpolation)
    for view in range(tiny.config.views.count):
        expected = teacher.embed(pixels.batch(rows, view)).numpy()
        np.testing.assert_allclose(store.embeddings(rows, view).astype(np.float32), expected, atol=1e-3)
        np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, rtol=1e-5)
    test = index.rows("test")
    expected = teacher.embed(pixels.batch(test, None)).numpy()
    np.testing.assert_allclose(store.embeddings(test, part_name="eval").astype(np.float32), expected, atol=1e-3)


def test_text_weights_are_the_mean_over_templates_of_normalised_prompts(tiny: Tiny) -> None:
    teacher = Teacher.load(tiny.config.teacher, torch.device("cpu"))
    weights = teacher.text_weights(["circle", "square"], ["a photo of a {}.", "{}"])
    with torch.inference_mode():
        tokens = teacher.tokenizer(["a photo of a square.", "square"])
        one = teacher.model.encode_text(tokens, normalize=True).mean(0)
    torch.testing.assert_close(weights[1], one / one.norm())
    np.testing.assert_allclose(
        open_classifier("zero_shot", tiny.store).logits(np.eye(64)[:1]),
        tiny.store.logit_scale * tiny.store.text_weights[:, :1].T,
        rtol=1e-5,
    )


def test_meta_says_where_the_store_comes_from(tiny: Tiny) -> None:
    meta = json.loads((tiny.store_folder / "meta.json").read_text())
    assert meta["dataset"]["fingerprint"] == tiny.index.fingerprint
    assert len(meta["teacher"]["weights_sha256"]) == 64
    assert len(meta["views"].pop("rendering")) == 64
    assert meta["views"] == {"seed": 0, "count": 2, "scale": [0.5, 1.0], "flip": True}
    assert meta["parts"]["train"]["shape"] == [len(tiny.index.rows("labelled", "unlabelled")), 2, 64]
    assert meta["text"]["class_names"] == list(CLASSES)
    shard = np.load(tiny.store_folder / "train-00000.npy", mmap_mode="r")
    assert shard.dtype == np.float16 and shard.shape[1:] == (2, 64)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"views": {"count": 3}}, "views.count is 2 in the store and 3 here"),
        ({"views": {"scale": [0.4, 1.0]}}, "views.scale"),
        ({"teacher": {"model": "ViT-B-16", "pretrained": "openai"}}, "teacher.model"),
    ],
)
def test_a_store_that_does_not_match_is_refused_by_name(
    tiny: Tiny, sections: dict[str, dict[str, object]], words: str
) -> None:
    with pytest.raises(StoreMismatch, match="does not match") as refused:
        TeacherStore.open(tiny.store_folder, tiny.index, changed(tiny, **sections))
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_store_of_other_data_is_refused_by_name(tiny: Tiny) -> None:
    index = tiny.index
    index.fingerprint = "0" * 64
    with pytest.raises(StoreMismatch, match=r"dataset\.fingerprint"):
        TeacherStore.open(tiny.store_folder, index, tiny.config)


def test_other_weights_under_the_same_name_are_refused_and_replaced_only_when_told(
    tiny: Tiny, store_copy: Path
) -> None:
    meta = json.loads((store_copy / "meta.json").read_text())
    meta["teacher"]["weights_sha256"] = "f" * 64
    (store_copy / "meta.json").write_text(json.dumps(meta))
    before = (store_copy / "train-00000.npy").stat().st_mtime_ns
    with pytest.raises(StoreMismatch, match=r"teacher\.weights_sha256"):
        teach(tiny.config, tiny.workspace.at(teacher=store_copy), ALONE)
    assert (store_copy / "train-00000.npy").stat().st_mtime_ns == before
    assert (
        teach(tiny.config, tiny.workspace.at(teacher=store_copy), ALONE, rebuild=True).fingerprint
        == tiny.store.fingerprint
    )


def test_new_prompts_make_new_text_weights_and_leave_the_embeddings_alone(tiny: Tiny, store_copy: Path) -> None:
    def shards() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in store_copy.glob("*-*.npy")}

    before = shards()
    store = teach(changed(tiny, data={"templates": ["one {} drawn"]}), tiny.workspace.at(teacher=store_copy), ALONE)
    assert shards() == before
    assert not np.allclose(store.text_weights, tiny.store.text_weights)
    assert store.fingerprint != tiny.store.fingerprint
    assert store.meta["text"]["templates"] == ["one {} drawn"]


def test_a_store_that_is_not_complete_is_refused_and_continued_where_it_stopped(tiny: Tiny, store_copy: Path) -> None:
    meta = json.loads((store_copy / "meta.json").read_text())
    (store_copy / "meta.json").write_text(json.dumps({**meta, "complete": False}))
    (store_copy / "train-00002.npy").unlink()
    kept = (store_copy / "train-00001.npy").stat().st_mtime_ns
    with pytest.raises(StoreMismatch, match="not complete"):
        TeacherStore.open(store_copy, tiny.index, tiny.config)
    assert teach(tiny.config, tiny.workspace.at(teacher=store_copy), ALONE).fingerprint == tiny.store.fingerprint
    assert (store_copy / "train-00001.npy").stat().st_mtime_ns == kept


def test_killed_in_the_middle_and_run_again_on_two_ranks_gives_the_same_store(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prepared").symlink_to(tiny.prepared)
    tree = copy.deepcopy(tiny.tree)
    tree["launch"]["processes"] = 2
    tree["teacher"]["batch_size"] = 2
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "dho", "teach"]
    first = subprocess.Popen(
        command, cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    store = tmp_path / "data" / "teacher"
    deadline = time.monotonic() + 120
    while not list(store.glob("train-*.npy")):
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.002)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120, capture_output=True)
    for path in tiny.store_folder.glob("*.npy"):
        np.testing.assert_allclose(
            np.load(store / path.name).astype(np.float32), np.load(path).astype(np.float32), atol=2e-3
        )


def test_any_open_clip_checkpoint_file_is_loaded_with_its_own_preprocessing_and_scale(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-S-32-alt", load_weights=False)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    teacher = Teacher.load(
        TeacherConfig(model="ViT-S-32-alt", pretrained=str(tmp_path / "weights.pt")), torch.device("cpu")
    )
    assert teacher.input_size == 224 and teacher.interpolation == "bicubic"
    assert teacher.mean == pytest.approx(list(open_clip.OPENAI_DATASET_MEAN))
    assert teacher.logit_scale == pytest.approx(float(model.logit_scale.exp()))
    transform = open_clip.image_transform(224, is_train=False)
    from PIL import Image

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8))
    with torch.inference_mode():
        expected = model.eval().encode_image(transform(image)[None], normalize=True)
    torch.testing.assert_close(
        teacher.embed(torch.from_numpy(np.asarray(image).copy())[None]), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("model", "pretrained"),
    [("no-such-model", "openai"), ("ViT-B-32", "no-such-tag"), ("local-dir:/nowhere", None), ("ViT-B-32", None)],
)
def test_a_teacher_that_cannot_be_loaded_is_one_line(model: str, pretrained: str | None) -> None:
    with pytest.raises(DataError, match="cannot be loaded") as refused:
        Teacher.load(TeacherConfig(model=model, pretrained=pretrained), torch.device("cpu"))
    assert model in str(refused.value) and "\n" not in str(refused.value)


def test_made_captions_are_wrong_as_often_as_configured_and_always_the_same(tiny: Tiny) -> None:
    index = tiny.index
    settings = dataclasses.replace(
        tiny.config.pretrain, caption_templates=["{}"], confusions={"circle": {"square": 0.5, "stripes": 0.25}}
    )
    rows, captions = captioned(index, settings)
    assert captioned(index, settings)[1] == captions
    assert set(rows) == set(index.rows("captions"))
    truth = [CLASSES[label] for label in index.labels[rows]]
    assert all(caption == true for caption, true in zip(captions, truth, strict=True) if true != "circle")
    assert any(caption != true for caption, true in zip(captions, truth, strict=True))
    with pytest.raises(DataError, match="'blob'"):
        captioned(index, dataclasses.replace(settings, confusions={"blob": {"circle": 0.1}}))


def test_a_store_of_pixels_that_the_code_renders_otherwise_now_is_refused_by_name(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dho.data import pixels

    def nearest(image: Image.Image, box: Any, size: int, interpolation: str, flip: bool = False) -> Any:
        del interpolation
        view = np.asarray(image.resize((size, size), Image.Resampling.NEAREST, box=box))
        return view[:, ::-1] if flip else view

    assert tiny.store.meta["views"]["rendering"]
    monkeypatch.setattr(pixels, "render", nearest)
    with pytest.raises(StoreMismatch, match=r"views\.rendering is [0-9a-f]{12}\.\.\. in the store and"):
        TeacherStore.open(tiny.store_folder, tiny.index, tiny.config)
