"""backend=hf on a GPU; skipped where there is none (benchmarks/cuda_checks.sh runs it)."""

from pathlib import Path

import pytest
import torch

from branchmerge.config import BackendConfig
from branchmerge.evaluation.backends.hf import Transformers
from branchmerge.evaluation.requests import Response, Sampling, requests_for
from branchmerge.trajectories.schema import Message

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("sampling", [Sampling(16), Sampling(16, temperature=1.0, top_p=0.95)], ids=["greedy", "drawn"])
def test_a_gpu_draws_the_same_samples(tiny_student: Path, sampling: Sampling) -> None:
    turns = [(question, (Message("user", question),)) for question in ("What is 12 * 7?", "A longer question?", "?")]
    requests = requests_for("task", turns, 4 if sampling.temperature else 1, sampling, 42)

    def responses(device: str) -> dict[tuple[str, int], Response]:
        model = Transformers(BackendConfig(batch_size=4, dtype="float32", device=device), tiny_student)
        assert model.model.device.type == device
        return {(r.question, r.sample): response for pairs in model.generate(requests) for r, response in pairs}

    here, there = responses("cpu"), responses("cuda")
    assert len(there) == len(requests)
    # In float32 only a number within rounding of a border between two tokens may fall to the other one.
    assert sum(here[key] != there[key] for key in here) <= 1
