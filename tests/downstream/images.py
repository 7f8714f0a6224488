"""Write the test images as files, `<label>-<key>.png`, and what is expected of them.

    python tests/downstream/images.py FOLDER EXPECTED [--first 1000]

Run it with the repository's Python, from its root.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from dho.core.workspace import Workspace
from dho.data.index import Index
from dho.evaluation.head_outputs import HeadOutputs
from dho.runtime.dho_runtime import mix

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path)
parser.add_argument("expected", type=Path)
parser.add_argument("--first", type=int, default=1000)
options = parser.parse_args()

workspace = Workspace()
index = Index.load(workspace.prepared)
metrics = json.loads(workspace.metrics.read_text())
outputs = HeadOutputs.load(workspace.head_outputs / "test.npz")
guesses = mix(outputs.ce, outputs.kd, metrics["alpha"], metrics["beta"]).argmax(1)
options.folder.mkdir(parents=True)
names = []
for row in index.rows("test"):
    data = index.read(int(row))
    ending = "png" if data.startswith(b"\x89PNG") else "jpg"
    names.append(f"{index.labels[row]}-{index.keys[row]}.{ending}".replace("/", "_"))
    (options.folder / names[-1]).write_bytes(data)
order = {name: place for place, name in enumerate(sorted(names))}
first = np.arange(min(options.first, len(names)))
options.expected.write_text(
    json.dumps(
        {
            "first": [order[names[i]] for i in first],
            "first_accuracy": float((guesses[first] == outputs.labels[first]).mean()),
            "accuracy": metrics["test"]["combined"]["top1"],
        }
    )
)
