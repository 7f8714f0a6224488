"""Measure what `registry.precision: int8` changes.

    python benchmarks/int8.py

In one process: the trained student as ONNX in float32 and in int8, its top-1 on test with both, and its time for one
image on one thread, measured in turns. The last lines are the ratios float32 / int8 of file size and of median time.
Needs what `make repro` made.
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
from dho.runtime.dho_runtime import HEADS, mix, only_alpha
from dho.student.saved import load_student

ROUNDS, CALLS = 5, 200


def main() -> None:
    workspace = Workspace()
    student, info = load_student(workspace.student)
    tuned = json.loads(workspace.metrics.read_text())
    index = Index.load(workspace.prepared)
    rows = index.rows("test")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as temporary:
        files = {name: Path(temporary) / f"{name}.onnx" for name in ("float32", "int8")}
        export_onnx(student, files["float32"])
        quantise_onnx(files["float32"], files["int8"], calibration_batches(index, info.student))
        sessions = {name: onnxruntime.InferenceSession(file, options) for name, file in files.items()}
        size = files["float32"].stat().st_size / files["int8"].stat().st_size

    only = only_alpha(info.heads)
    alpha, beta = tuned["alpha"] if only is None else only, tuned["beta"] or 1.0
    for name, session in sessions.items():
        right = 0
        for images, batch in seen_by(info.student, index, rows):
            logits = dict(zip(info.heads, session.run(info.heads, {"images": images}), strict=True))
            ce, kd = (logits.get(head) for head in HEADS)
            right += int((mix(ce, kd, alpha, beta).argmax(1) == index.labels[batch]).sum())
        print(f"{name}: top-1 {100 * right / len(rows):.2f} % on {len(rows):,} test images")

    image, ratios = images[:1], []
    for _ in range(ROUNDS):
        medians = {}
        for name, session in sessions.items():
            times = []
            for _ in range(CALLS):
                start = time.perf_counter()
                session.run(None, {"images": image})
                times.append(time.perf_counter() - start)
            medians[name] = float(np.median(times))
        ratios.append(medians["float32"] / medians["int8"])

    print(f"one image, one thread: float32 {1000 * medians['float32']:.3f} ms, int8 {1000 * medians['int8']:.3f} ms")
    print(f"ratio of sizes {size:.2f}")
    print(f"ratio of times {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
