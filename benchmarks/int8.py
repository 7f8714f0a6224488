"""What `registry.precision: int8` changes: `python benchmarks/int8.py`

In one process: the trained student as ONNX in float32 and in int8, its top-1 on test with both, and its time for one image on one thread,
measured in turns. The last lines are the ratios float32 / int8 of file size and of median time. Needs what `make repro` made.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime

from dho.core.workspace import Workspace
from dho.data.index import Index
from dho.registry.onnx_export import export_onnx
from dho.registry.onnx_int8 import calibration_batches, quantise_onnx, seen_by
from dho.runtime.dho_runtime import mix
from dho.student.saved import load_student

ROUNDS, CALLS = 5, 200


def main() -> None:
    workspace = Workspace()
    student, card = load_student(workspace.student)
    tuned = json.loads(workspace.metrics.read_text())
    index = Index.load(workspace.prepared)
    rows = index.rows("test")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as temporary:
        files = {name: Path(temporary) / f"{name}.onnx" for name in ("float32", "int8")}
        export_onnx(student, files["float32"])
        quantise_onnx(files["float32"], files["int8"], calibration_batches(index, card.student))
        sessions = {name: onnxruntime.InferenceSession(file, options) for name, file in files.items()}
        size = files["float32"].stat().st_size / files["int8"].stat().st_size
    alpha, beta = tuned["alpha"] if len(card.heads) == 2 else float(card.heads == ["ce"]), tuned["beta"] or 1.0
    for name, session in sessions.items():
        right = 0
        for images, part in seen_by(card.student, index, rows):
            logits = dict(zip(card.heads, session.run(card.heads, {"images": images}), strict=True))
            right += int((mix(logits.get("ce"), logits.get("kd"), alpha, beta).argmax(1) == index.labels[part]).sum())
        print(f"{name}: top-1 {100 * right / len(rows):.2f} % on {len(rows):,} test images")
    image, ratios = images[:1], []
    for _ in range(ROUNDS):
        medians = {}
        for name, session in sessions.items():
            taken = []
            for _ in range(CALLS):
                start = time.perf_counter()
                session.run(None, {"images": image})
                taken.append(time.perf_counter() - start)
            medians[name] = float(np.median(taken))
        ratios.append(medians["float32"] / medians["int8"])
    print(f"one image, one thread: float32 {1000 * medians['float32']:.3f} ms, int8 {1000 * medians['int8']:.3f} ms")
    print(f"ratio of sizes {size:.2f}")
    print(f"ratio of times {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
