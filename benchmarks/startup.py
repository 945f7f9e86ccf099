"""From the command to the first optimizer step: how long a user waits before training begins.

    python benchmarks/startup.py --repeats 3                     the demo study from its pretrained student
    python benchmarks/startup.py --fresh                         the very command, each time into a new outputs folder
    python benchmarks/startup.py backbone.path=/my/model

Runs `python train.py domain=math` for two steps of one short row, and looks for the first line of its curve; what the
step itself took (tokens / tokens per second) is taken off: `seconds`. With it: `ended`. With --fresh nothing is
shortened: the first step is the warm-up's, and before it the student is taken out of its package; then the command is
killed. Prints one JSON line.
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
    parser.add_argument(
        "--fresh", action="store_true", help="the command as it is, into a new outputs folder each time"
    )
    parser.add_argument("overrides", nargs="*", help="of train.py, such as backbone.path=/my/model")
    options = parser.parse_args()
    once = fresh if options.fresh else shortened
    with tempfile.TemporaryDirectory() as folder:
        # the first run also makes Python's and the backbone's files, and is not counted
        found = [once(Path(folder), number, options.overrides) for number in range(options.repeats + 1)][1:]
    begun, ended = zip(*found, strict=True)
    facts = {"benchmark": "startup", "fresh": options.fresh, "seconds": begun, "ended": ended}
    print(
        json.dumps({**facts, "overrides": options.overrides, "versions": measure.versions(), "date": measure.today()})
    )


def shortened(folder: Path, number: int, overrides: list[str]) -> tuple[float, float]:
    """Of a short training from the pretrained student, which lies ready after the first call."""
    out = folder / f"expert-{number}"
    return to_first_step([*SHORT, f"outputs={folder}", f"out={out}", *overrides], folder / f"{out.name}-logs", False)


def fresh(folder: Path, number: int, overrides: list[str]) -> tuple[float, float]:
    """Of the whole command, cut off after its first step."""
    outputs = folder / f"outputs-{number}"
    return to_first_step([f"outputs={outputs}", *overrides], outputs, True)


def to_first_step(overrides: list[str], logs: Path, cut: bool) -> tuple[float, float]:
    """Seconds from the start of the process to the start and to the end of its first step.

    Args:
        logs: the folder that its curve will lie somewhere in
        cut: whether to kill it then
    """
    command = [sys.executable, "train.py", "domain=math", *overrides]
    began = time.perf_counter()
    with subprocess.Popen(command, cwd=measure.ROOT, stdout=subprocess.DEVNULL) as process:
        while not (rows := read(logs)):
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)}: ended with status {process.returncode} before its first step")
            time.sleep(0.01)
        ended = time.perf_counter() - began
        if cut:
            process.kill()
    return round(ended - float(rows[0]["tokens"]) / float(rows[0]["tokens_per_second"]), 1), round(ended, 1)


def read(logs: Path) -> list[dict[str, str]]:
    """The rows of steps that are whole, of the first curve below a folder."""
    curve = next(logs.rglob("metrics.csv"), None)
    if curve is None:
        return []
    lines = [line for line in curve.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [row for row in csv.DictReader(lines) if row.get("tokens")]


if __name__ == "__main__":
    main()
