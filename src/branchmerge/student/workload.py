"""How much a branch trains on: steps, tokens, and the lengths of the documents that attention is computed in.

Counted from the rows if they and the tokenizer are on this machine, else estimated from `study.expected`.
"""

import hashlib
import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from branchmerge.config import TrainConfig
from branchmerge.data import held_out
from branchmerge.evaluation.graders import GRADING
from branchmerge.files import write_json
from branchmerge.student import backbone
from branchmerge.student.flops import Shapes
from branchmerge.trajectories import sources
from branchmerge.versions import package_versions


@dataclass(frozen=True)
class Workload:
    """The work of a whole branch."""

    steps: int
    rows: int
    """Packed rows, over all steps and devices"""
    tokens: int
    learned: int
    documents: list[tuple[int, float]]
    """Lengths of documents, each with the number of documents that have it, over all epochs"""
    said: str
    """Where these numbers are from, in words"""

    def flops(self, work: dict[str, int]) -> float:
        """FLOPs of the whole branch for a model with these `Shapes`."""
        return Shapes(**work).flops(self.tokens, self.learned, self.documents)


def workload(config: TrainConfig, checkpoint: Path | None, folder: Path) -> Workload | None:
    """The workload of a branch; None if nothing is known about it.

    Args:
        checkpoint: the backbone, if it is on this machine
        folder: where counts are cached
    """
    others = held_out.other_sources(config) if config.data.validation_rows else {}
    read = [*sources.of_branch(config).values(), *others.values()]
    if checkpoint is not None and all(sources.is_local(source) for source in read):
        return _counted(config, checkpoint, folder)
    return _expected(config)


def _counted(config: TrainConfig, checkpoint: Path, folder: Path) -> Workload:
    """The workload of the rows on this machine, by the functions that training itself uses."""
    rows = [sources.described(source) for source in sources.of_branch(config).values()]
    facts = [
        rows, held_out.identity(config), asdict(config.data), asdict(config.optim), config.seed,
        backbone.identity(checkpoint), package_versions(), GRADING,
    ]  # fmt: skip
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    place = folder / f"rows-{key}.json"
    if place.is_file():
        kept = json.loads(place.read_text())
        return Workload(**{**kept, "documents": [(length, number) for length, number in kept["documents"]]})
    from branchmerge.data.datamodule import prepare

    tokenizer = backbone.load_tokenizer(checkpoint)
    backbone.check_tokenizer(tokenizer, checkpoint)
    corpus = prepare(config, sources.read_branch(config), tokenizer, backbone.context_length(checkpoint))
    packed = corpus.plan.rows
    lengths = Counter(len(corpus.documents[number]) for row in packed for number in row)
    found = Workload(
        steps=len(corpus.plan.steps), rows=len(packed), tokens=corpus.tokens, learned=corpus.supervised,
        documents=sorted(lengths.items()), said="rows and tokens are those of the data here",
    )  # fmt: skip
    write_json(place, asdict(found))
    return found


def _expected(config: TrainConfig) -> Workload | None:
    """An estimate that assumes full rows, documents of one length, only learned tokens, and limits that are reached."""
    expected, capacity, optim = config.study.expected, config.data.seq_len, config.optim
    read = sources.of_branch(config)
    if any(name not in expected for name in read):
        return None
    lengths = {name: min(expected[name].tokens or capacity // 2, capacity) for name in read}
    counts = {name: min(expected[name].trajectories, read[name].limit or math.inf) for name in read}
    tokens = sum(counts[name] * lengths[name] for name in read)
    rows = math.ceil(tokens / capacity)
    rows = min(rows, config.data.packed_rows or rows) * optim.epochs
    steps = math.ceil(rows / optim.global_batch)
    if optim.max_steps is not None and optim.max_steps < steps:
        steps = optim.max_steps
        rows = min(rows, steps * optim.global_batch)
    trained = rows * capacity
    documents = [(lengths[name], counts[name] * trained / tokens) for name in read]
    assumed = ", ".join(
        f"{counts[name]:,} of {name} with {lengths[name]:,} tokens each"
        + ("" if expected[name].tokens else f" (half a packed row; study.expected.{name}.tokens= says better)")
        for name in read
    )
    said = f"the rows are not here; assumed are trajectories: {assumed}"
    return Workload(steps, rows, trained, trained, documents, said)
