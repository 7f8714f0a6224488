"""Print the accuracy over a folder of images whose names start with their label, as a downstream team would.

    python predict.py models:/dho-student@champion FOLDER EXPECTED

Neither torch nor dho may be installed here.
"""

import importlib.util
import json
import sys
from pathlib import Path

import mlflow
import pandas as pd

uri, folder, expected = sys.argv[1], Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text())
for name in ("torch", "torchvision", "timm", "dho"):
    assert importlib.util.find_spec(name) is None, f"{name} is installed here, so this proves nothing"

model = mlflow.pyfunc.load_model(uri)
names = model.metadata.metadata["class_names"]
files = sorted(folder.iterdir())
truth = [names[int(path.name.split("-")[0])] for path in files]
answers = pd.concat(
    [model.predict(pd.DataFrame({"image": files[start : start + 1000]})) for start in range(0, len(files), 1000)]
)
right = [label == answer for label, answer in zip(truth, answers["label"], strict=True)]
first = sum(right[i] for i in expected["first"]) / len(expected["first"])
print(f"{len(expected['first'])} images: {first:.4f}, all {len(right)} images: {sum(right) / len(right):.4f}")
assert first == expected["first_accuracy"], f"the first images: {first}, torch {expected['first_accuracy']}"
assert sum(right) / len(right) == expected["accuracy"], (
    f"all images: {sum(right) / len(right)}, metrics.json {expected['accuracy']}"
)
