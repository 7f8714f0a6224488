"""Measure how long dho takes to start.

    python benchmarks/startup.py

In turns, in processes of their own: an empty Python, `import dho` and `dho --help`. Prints the median seconds of each;
the last line is the ratio of `dho --help` to an empty Python.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

ROUNDS = 9
COMMANDS = {
    "empty Python": ["-c", "pass"],
    "import dho": ["-c", "import dho"],
    "dho --help": ["-m", "dho", "--help"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="starts of each")
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, words in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{name}: {median:.3f} s")
    print(f"ratio {medians['dho --help'] / medians['empty Python']:.1f}")


if __name__ == "__main__":
    main()
