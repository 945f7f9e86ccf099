"""What another program on one of the cores costs a training on a CPU.

    python benchmarks/busy_core.py --repeats 3

Trains four rows of the demo study in turn with OpenMP's usual spinning (GOMP_SPINCOUNT=300000) and with that of
`cli.run`, on quiet cores and beside a process that keeps one of them busy. Prints one JSON line: seconds of the
training, and `ratio_busy` and `ratio_quiet`, the median of usual over ours (above 1: ours is faster).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import measure

from branchmerge.cli import SPINS

USUAL = "300000"
SHORT = ("debug=fast", "optim.max_steps=4", "trainer.progress=false")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    facts: dict[str, object] = {"benchmark": "busy_core", "usual": USUAL, "ours": SPINS}
    with tempfile.TemporaryDirectory() as folder:
        seconds(Path(folder), SPINS)  # makes the backbone, and is not counted
        for name, beside in (("quiet", False), ("busy", True)):
            with busy(beside):
                pairs = [(seconds(Path(folder), USUAL), seconds(Path(folder), SPINS)) for _ in range(repeats)]
            facts[f"seconds_{name}"] = pairs
            facts[f"ratio_{name}"] = round(statistics.median(usual / ours for usual, ours in pairs), 2)
    print(json.dumps({**facts, "versions": measure.versions(), "date": measure.today()}))


def seconds(folder: Path, spins: str) -> float:
    """Of the training alone, as its manifest tells."""
    command = [sys.executable, "train.py", *SHORT, f"outputs={folder}"]
    environment = {**os.environ, "GOMP_SPINCOUNT": spins}
    subprocess.run(command, cwd=measure.ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)
    manifest = json.loads((folder / "demo" / "debug" / "math" / "manifest.json").read_text())
    return float(manifest["training"]["seconds"])


@contextmanager
def busy(wanted: bool) -> Iterator[None]:
    """One core does something else, where `wanted`."""
    if not wanted:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


if __name__ == "__main__":
    main()
