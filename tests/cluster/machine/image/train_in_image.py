"""A whole workflow inside the image (test.sh): drawn pictures, teacher, 20 training steps, evaluation, a prediction."""

import csv
import subprocess
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

generator = np.random.default_rng(0)
for folder, count, brightness in (("dark", 40, 60), ("light", 40, 190), ("unlabelled", 60, 125)):
    Path("images", folder).mkdir(parents=True)
    for number in range(count):
        pixels = generator.normal(brightness, 30, (36, 40, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(f"images/{folder}/{number:03d}.png")

parameters = {
    "data": {
        "name": "folder",
        "source": "images",
        "splits": {"shots": 4, "val_per_class": 5, "test_per_class": 5, "captions": 24},
    },
    "teacher": {"batch_size": 16},
    "pretrain": {"epochs": 1, "batch_size": 8},
    "student": {
        "model": "resnet18",
        "model_args": {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 32]},
        "input_size": 32,
    },
    "train": {"epochs": 4, "batch_labelled": 8, "batch_unlabelled": 8},
    "launch": {"workers": 1, "processes": 1},
}
Path("params.yaml").write_text(yaml.safe_dump(parameters))
for stage in ("fetch", "prepare", "pretrain", "teach", "train", "evaluate"):
    subprocess.run(["dho", stage], check=True)

with Path("outputs/train/history.csv").open() as history:
    steps = max(int(row["step"]) for row in csv.DictReader(history))
assert steps >= 20, f"{steps} steps"
answer = subprocess.run(["dho", "predict", "images/dark/000.png"], check=True, capture_output=True, text=True).stdout
assert answer.startswith("images/dark/000.png\t"), answer
print(f"{steps} steps, prediction {answer.strip()!r}")
