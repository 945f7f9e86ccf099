"""Grading of LiveCodeBench solutions: how fast it is, and whether it agrees with LiveCodeBench's own grader.

    git clone https://github.com/LiveCodeBench/LiveCodeBench /tmp/lcb
    python benchmarks/grading.py --official /tmp/lcb

prints one JSON line. Speed: right solutions of a few lines, each with its own inputs, on all cores this process may
use (`--cores`); an execution is one program on one case, compared. Ours (`executions_per_s`) starts a process for each
case, as strict mode does; LiveCodeBench's own (`official_executions_per_s`, by its `codegen_metrics`, a pool of as many
processes) starts one or two for each program and runs all its cases there, so it gains with the number of cases: both
are measured in turns for each number in `--cases`, and the best of `--repeats` counts. Without imports and start-up of
either side.

Agreement: the share of probes (`grading_probes.py`) where official mode says what LiveCodeBench's grader says, run here
and now. `peeks` are the probes that pass there by reading the expected results; official mode fails them by design, and
they do not count. `strict_differs` lists, by reason, the probes where strict mode says otherwise than LiveCodeBench.

`--write-goldens FILE` stores LiveCodeBench's verdicts for tests/evaluation, which need no checkout of it.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import measure
from grading_probe_functions import function
from grading_probes import BREAKS, COMPARED, Probe, probes, stdin

from branchmerge.evaluation.livecodebench.grading import OFFICIAL, STRICT, grade_program
from branchmerge.evaluation.sandbox import shared

GRADER = """
import json, sys, time
from lcb_runner.evaluation import codegen_metrics, extract_instance_results
tasks, out, processes = json.load(open(sys.argv[1])), sys.argv[2], int(sys.argv[3])
samples = [{"input_output": json.dumps(task["tests"])} for task in tasks]
begin = time.perf_counter()
_, results, _ = codegen_metrics(samples, [[task["program"]] for task in tasks], [1], processes, 6)
seconds = time.perf_counter() - begin
verdicts = [bool(verdict) for verdict, in extract_instance_results(results)]
json.dump({"seconds": seconds, "verdicts": verdicts}, open(out, "w"))
"""
"""Run by a process that finds LiveCodeBench; what it prints goes nowhere."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True, help="checkout of LiveCodeBench's repository")
    parser.add_argument("--cores", type=int, help="use only so many")
    parser.add_argument("--cases", type=int, nargs="+", default=[1, 3, 10, 30], help="numbers of cases per program")
    parser.add_argument("--executions", type=int, default=600, help="per measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write-goldens", type=Path, metavar="FILE")
    options = parser.parse_args()
    cores = measure.use_cores(options.cores)
    checkout = options.official.absolute()
    facts = {
        "benchmark": "grading",
        **speeds(checkout, options.cases, options.executions, options.repeats, cores),
        **agreement(checkout, cores, options.write_goldens),
        "sandbox": shared().level,
        "cores": cores,
        "cpu": measure.cpu(),
        "versions": {**measure.versions(), "livecodebench": commit(checkout)},
        "date": measure.today(),
    }
    print(json.dumps(facts))


def speeds(checkout: Path, numbers: Sequence[int], executions: int, repeats: int, cores: int) -> dict[str, Any]:
    """Executions per second of both sides, by the number of cases per program."""
    ours, theirs = {}, {}
    for number in numbers:
        work = workload(max(1, executions // number), number)
        best = [float("inf"), float("inf")]
        for _ in range(repeats):
            for side, (seconds, verdicts) in enumerate(
                [graded(work, STRICT, cores), officially(checkout, work, cores)]
            ):
                assert all(verdicts), "the workload's programs are right"
                best[side] = min(best[side], seconds)
        ours[number], theirs[number] = (round(len(work) * number / seconds, 1) for seconds in best)
    return {
        "executions_per_s": ours,
        "official_executions_per_s": theirs,
        "ratio": {number: round(ours[number] / theirs[number], 2) for number in numbers},
    }


def workload(programs: int, cases: int) -> list[Probe]:
    """Right solutions, half of them of functions; inputs and outputs of some ten numbers."""
    found = []
    for index in range(programs):
        pairs = []
        for case in range(cases):
            numbers = [(index * 31 + case * 17 + place * place) % 97 for place in range(10 + case % 5)]
            if index % 2:
                pairs.append((json.dumps(numbers), json.dumps(sorted(numbers))))
            else:
                pairs.append((f"{len(numbers)}\n{' '.join(map(str, numbers))}\n", " ".join(map(str, sorted(numbers)))))
        if index % 2:
            program = "class Solution:\n    def solve(self, a: List[int]) -> List[int]:\n        return sorted(a)\n"
            found.append(function(f"work-{index}", program, pairs, True))
        else:
            program = "n = int(input())\na = sorted(map(int, input().split()))\nassert len(a) == n\nprint(*a)\n"
            found.append(stdin(f"work-{index}", program, pairs, True))
    return found


def agreement(checkout: Path, cores: int, goldens: Path | None) -> dict[str, Any]:
    """Official mode, strict mode and LiveCodeBench on the probes."""
    given = [probe for probe in probes() if probe.compared != BREAKS]
    _, theirs = officially(checkout, given, cores)
    _, ours = graded(given, OFFICIAL, cores)
    _, strict = graded(given, STRICT, cores)
    names = [probe.name for probe in given]
    compared = [number for number, probe in enumerate(given) if probe.compared == COMPARED]
    differ = [names[number] for number in compared if ours[number] != theirs[number]]
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for probe, said, official in zip(given, strict, theirs, strict=True):
        if said != official:
            reasons[probe.why or "unexplained"].append(probe.name)
    if goldens:
        verdicts = {names[number]: theirs[number] for number in compared}
        about = {"livecodebench": commit(checkout), "date": measure.today(), "verdicts": verdicts}
        goldens.parent.mkdir(parents=True, exist_ok=True)
        goldens.write_text(json.dumps(about, indent=0) + "\n")
    return {
        "agreement": round(1 - len(differ) / len(compared), 4),
        "probes": len(compared),
        "disagreements": differ,
        "peeks": [probe.name for probe in given if probe.compared not in (COMPARED, BREAKS)],
        "strict_wrong": [probe.name for probe, said in zip(given, strict, strict=True) if said != probe.right],
        "strict_differs": reasons,
    }


def graded(work: Sequence[Probe], mode: str, cores: int) -> tuple[float, list[bool]]:
    """Seconds and verdicts of this package, as many programs at once as there are cores."""
    shared()  # started before the clock
    begin = time.perf_counter()
    with ThreadPoolExecutor(cores) as pool:
        found = pool.map(lambda probe: grade_program(probe.program, probe.cases, probe.function, mode).correct, work)
        verdicts = list(found)
    return time.perf_counter() - begin, verdicts


def officially(checkout: Path, work: Sequence[Probe], cores: int, limit: float = 600) -> tuple[float, list[bool]]:
    """Seconds and verdicts of LiveCodeBench's grader.

    Raises:
        RuntimeError: it failed, or took longer than `limit` seconds
    """
    tasks = [{"program": probe.program, "tests": official_tests(probe)} for probe in work]
    with tempfile.TemporaryDirectory() as folder:
        given, found, log = (Path(folder) / name for name in ("tasks.json", "found.json", "log"))
        given.write_text(json.dumps(tasks))
        with log.open("w") as output:
            child = subprocess.Popen(
                [sys.executable, "-c", GRADER, str(given), str(found), str(cores)], cwd=folder,
                env={**os.environ, "PYTHONPATH": str(checkout)}, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                status = child.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                status = child.wait()
        if status:
            raise RuntimeError(f"LiveCodeBench's grader ended with {status}: {log.read_text(errors='replace')[-2000:]}")
        answer = json.loads(found.read_text())
        return answer["seconds"], answer["verdicts"]


def official_tests(probe: Probe) -> dict[str, Any]:
    """A problem's tests as LiveCodeBench's grader takes them."""
    inputs, outputs = [case.input for case in probe.cases], [case.output for case in probe.cases]
    return {"inputs": inputs, "outputs": outputs, "fn_name": probe.function or None}


def commit(checkout: Path) -> str:
    """The checkout's commit; unknown if it is not one of git."""
    asked = subprocess.run(["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return asked.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
