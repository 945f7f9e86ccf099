"""From the command to the first optimizer step: how long a user waits before training begins.

    python benchmarks/startup.py --repeats 3                     the demo study from its pretrained student
    python benchmarks/startup.py backbone.path=/my/model

Runs `python train.py domain=math` for two steps of one short row, and looks for the first line of its curve; what the
step itself took (tokens / tokens per second) is taken off. Prints one JSON line.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure

SHORT = (
    "study.warmup=false",
    "data.seq_len=256",
    "optim.global_batch=1",
    "optim.max_steps=2",
    "trainer.progress=false",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help="of train.py, such as backbone.path=/my/model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # the first run also makes Python's and the backbone's files, and is not counted
        found = [to_first_step(Path(folder), number, options.overrides) for number in range(options.repeats + 1)][1:]
    facts = {"benchmark": "startup", "seconds": found, "overrides": options.overrides}
    print(json.dumps({**facts, "versions": measure.versions(), "date": measure.today()}))


def to_first_step(folder: Path, number: int, overrides: list[str]) -> float:
    """Seconds from the start of the process to the start of its first step."""
    out = folder / f"expert-{number}"
    command = [sys.executable, "train.py", "domain=math", *SHORT, f"outputs={folder}", f"out={out}", *overrides]
    curve = folder / f"{out.name}-logs" / "metrics.csv"
    began = time.perf_counter()
    with subprocess.Popen(command, cwd=measure.ROOT, stdout=subprocess.DEVNULL) as process:
        while not (rows := read(curve)):
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)}: ended with status {process.returncode} before its first step")
            time.sleep(0.01)
        seconds = time.perf_counter() - began
    return round(seconds - float(rows[0]["tokens"]) / float(rows[0]["tokens_per_second"]), 1)


def read(curve: Path) -> list[dict[str, str]]:
    """The rows of steps that are whole."""
    if not curve.is_file():
        return []
    lines = [line for line in curve.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [row for row in csv.DictReader(lines) if row.get("tokens")]


if __name__ == "__main__":
    main()
