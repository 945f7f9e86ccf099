"""Strict mode against what a judge says, official mode against stored verdicts of LiveCodeBench's own grader.

The verdicts come from `python benchmarks/grading.py --official PATH --write-goldens FILE`.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from branchmerge.evaluation.livecodebench.grading import OFFICIAL, STRICT, CodeVerdict, grade_program

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
sys.path.append(str(BENCHMARKS))
from grading_probes import COMPARED, PEEKS, Probe, probes  # noqa: E402

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "livecodebench_verdicts.json").read_text())["verdicts"]
QUICK = [probe for probe in probes() if not probe.slow]


def graded(found: list[Probe], mode: str) -> list[tuple[Probe, CodeVerdict]]:
    with ThreadPoolExecutor(2) as pool:
        verdicts = pool.map(lambda probe: grade_program(probe.program, probe.cases, probe.function, mode), found)
        return list(zip(found, verdicts, strict=True))


def test_every_compared_probe_has_a_golden_verdict() -> None:
    assert {probe.name for probe in probes() if probe.compared == COMPARED} == set(GOLDENS)
    assert len(GOLDENS) >= 200
    assert 100 < sum(GOLDENS.values()) < len(GOLDENS) - 100


def test_official_mode_gives_the_official_verdicts() -> None:
    found = graded([probe for probe in QUICK if probe.compared == COMPARED], OFFICIAL)
    assert {probe.name: said for probe, said in found if said.correct != GOLDENS[probe.name]} == {}


def test_strict_mode_gives_the_right_verdicts() -> None:
    found = graded(QUICK, STRICT)
    assert {probe.name: said for probe, said in found if said.correct != probe.right} == {}


@pytest.mark.parametrize("mode", [STRICT, OFFICIAL])
def test_endless_program_times_out(mode: str) -> None:
    probe = next(probe for probe in probes() if probe.name == "slow-loop")
    assert grade_program(probe.program, probe.cases, mode=mode).reason == "timeout"


def test_official_mode_hands_out_no_expected_results() -> None:
    for _, said in graded([probe for probe in QUICK if probe.compared == PEEKS], OFFICIAL):
        assert not said.correct


def test_every_difference_has_a_reason_and_every_reason_a_difference() -> None:
    for probe in probes():
        if probe.compared == COMPARED:
            assert bool(probe.why) == (GOLDENS[probe.name] != probe.right), probe.name
