"""The memory of a training step on one device, asked for before anything runs; what was simulated once is kept.

What simulates is `simulation.py`, in a process of its own; nothing here loads torch.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from branchmerge.config import TrainConfig
from branchmerge.errors import UserError
from branchmerge.files import write_json

KINDS = ("weights", "gradients", "optimizer", "gathered", "activations", "logits")
SHARES = ("weights", "gradients", "optimizer")
EIGHT_BIT = (1 + 4 / 256) / 4
"""Bytes of torchao's 8-bit moments for one of float32's: a byte a number, and a float32 scale for 256 of them"""
WEIGHT, MOMENTS = 4, 8
"""Bytes of a parameter in training, and in a checkpoint of it"""
DECIDING = (
    "attention.py", "autocast.py", "chunked_loss.py", "context_parallel.py", "flops.py", "loss.py", "memory_log.py",
    "sharding.py", "simulation.py", "stored.py",
)  # fmt: skip
"""Files beside this one that a simulation runs."""


def bytes_of_training(config: TrainConfig) -> float:
    """Of a parameter, in a checkpoint of a branch in training."""
    return WEIGHT + MOMENTS * (EIGHT_BIT if config.optim.optimizer == "adamw_8bit" else 1)


@dataclass(frozen=True)
class Setting:
    """What decides the memory of a step on one device."""

    shape: dict[str, Any]
    """The model's config.json"""
    world: int
    """Devices"""
    seq_len: int
    """Tokens of a packed row"""
    rows: int = 1
    """Packed rows of one device in a step, one after the other; with `context` those of which it has a part"""
    sharded: bool = True
    """FSDP2; else one device under autocast"""
    replicate: int = 1
    context: int = 1
    """Devices that share a row"""
    cpu_offload: bool = False
    checkpointing: bool = False
    """Activations are computed again in the backward pass."""
    bf16: bool = True
    """bfloat16 products; else float32"""
    eight_bit: bool = False
    """AdamW's moments in 8 bits; reckoned from the simulation of those in float32"""
    gpu: bool = True
    """Attention and the chunks of the loss as on a GPU; else as on a CPU"""

    @property
    def device(self) -> str:
        """In words"""
        return "GPU" if self.gpu else "process"

    @property
    def devices(self) -> str:
        return "GPUs" if self.gpu else "processes"


@dataclass
class Memory:
    """Bytes on one device at the moment when it holds most."""

    weights: int
    """Its share, in float32; so are the next two."""
    gradients: int
    optimizer: int
    """AdamW's moments"""
    gathered: int
    """Layers put together out of all shares, their gradients before they are cut again, and what is sent."""
    activations: int
    logits: int
    """Of a chunk of tokens, and the head's gradient"""
    shares: dict[str, int] = field(default_factory=dict)
    """Weights, gradients and moments of a device, whether or not all are there at that moment, and wherever they lie"""
    parameters: int = 0
    work: dict[str, int] = field(default_factory=dict)
    """`flops.Shapes` of the model; empty where it is more than matrices and attention"""

    @property
    def total(self) -> int:
        return sum(getattr(self, kind) for kind in KINDS)


def forecast(settings: Sequence[Setting], folder: Path) -> list[Memory]:
    """The memory of each setting; what is not in `folder` yet is simulated and put there."""
    simulated = [replace(setting, eight_bit=False) for setting in settings]
    places = [folder / f"{_key(setting)}.json" for setting in simulated]
    missing = {place: setting for place, setting in zip(places, simulated, strict=True) if not place.is_file()}
    if missing:
        print(f"simulating {len(missing)} settings, half a minute in all or some; kept in {folder}", flush=True)
        _simulate(missing)
    memories = [Memory(**json.loads(place.read_text())["memory"]) for place in places]
    return [_in_8_bits(m) if setting.eight_bit else m for m, setting in zip(memories, settings, strict=True)]


def _in_8_bits(memory: Memory) -> Memory:
    """The moments are there throughout a step, so its peak stays where it is."""
    shares = {**memory.shares, "optimizer": round(EIGHT_BIT * memory.shares["optimizer"])}
    return replace(memory, optimizer=round(EIGHT_BIT * memory.optimizer), shares=shares)


def _key(setting: Setting) -> str:
    """Changes with whatever may change the answer."""
    here = Path(__file__).parent
    files = {name: hashlib.sha256((here / name).read_bytes()).hexdigest() for name in DECIDING}
    packages = {name: version(name) for name in ("torch", "transformers")}
    text = json.dumps([asdict(setting), files, packages], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _simulate(missing: dict[Path, Setting]) -> None:
    """One process for all; each answer is kept as soon as it is there."""
    command = [sys.executable, "-m", "branchmerge.student.simulation"]
    with (
        TemporaryFile("w+") as traces,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=traces, text=True) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps([asdict(setting) for setting in missing.values()]))
        process.stdin.close()
        for place, setting in missing.items():
            line = process.stdout.readline()
            answer = json.loads(line) if line else {"error": f"its process ended ({process.wait()}; -9: out of memory)"}
            if "error" in answer:
                process.kill()
                process.wait()
                traces.seek(0)
                trace = RuntimeError(traces.read())
                kind, why = setting.shape.get("model_type"), answer["error"]
                raise UserError(f"plan=true: a step of this model ({kind}) cannot be simulated: {why}") from trace
            write_json(place, {"setting": asdict(setting), "memory": answer})
