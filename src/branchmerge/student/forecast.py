"""Predict the memory of a training step on one device before anything runs; simulations are cached on disk.

`simulation.py` simulates, in a separate process; this module does not import torch.
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
"""Size of torchao's 8-bit moments relative to float32: a byte per number, and a float32 scale for 256 of them"""
WEIGHT, MOMENTS = 4, 8
"""Bytes of a parameter and of its moments, in training and in a checkpoint of it"""
DECIDING = (
    "attention.py", "autocast.py", "chunked_loss.py", "context_parallel.py", "flops.py", "loss.py", "memory_log.py",
    "sharding.py", "simulation.py", "stored.py",
)  # fmt: skip
"""Files beside this one whose code a simulation runs"""


def bytes_of_training(config: TrainConfig) -> float:
    """Bytes per parameter in a checkpoint of a branch in training."""
    return WEIGHT + MOMENTS * (EIGHT_BIT if config.optim.optimizer == "adamw_8bit" else 1)


@dataclass(frozen=True)
class Setting:
    """Everything that decides the memory of a step on one device."""

    shape: dict[str, Any]
    """The model's config.json"""
    world: int
    """Devices"""
    seq_len: int
    """Tokens of a packed row"""
    rows: int = 1
    """Packed rows of one device in a step, one after the other; with `context`, rows of which it has a part"""
    sharded: bool = True
    """By FSDP2; else one device with autocast"""
    replicate: int = 1
    context: int = 1
    """Devices that share a row"""
    cpu_offload: bool = False
    checkpointing: bool = False
    """Recompute activations in the backward pass"""
    bf16: bool = True
    """Matrix products in bfloat16; else in float32"""
    eight_bit: bool = False
    """AdamW's moments in 8 bits; computed from the simulation with moments in float32"""
    gpu: bool = True
    """Attention and the chunks of the loss as on a GPU; else as on a CPU"""

    @property
    def device(self) -> str:
        """Name of one device in messages"""
        return "GPU" if self.gpu else "process"

    @property
    def devices(self) -> str:
        return "GPUs" if self.gpu else "processes"


@dataclass
class Memory:
    """Bytes on one device at the peak of a step."""

    weights: int
    """The device's share, in float32; likewise the next two"""
    gradients: int
    optimizer: int
    """AdamW's moments"""
    gathered: int
    """Layers gathered from all shares, their gradients before they are scattered, and communication buffers"""
    activations: int
    logits: int
    """Logits of a chunk of tokens, and the head's gradient"""
    shares: dict[str, int] = field(default_factory=dict)
    """Weights, gradients and moments of a device, even if not all are allocated at the peak, on GPU or CPU"""
    parameters: int = 0
    work: dict[str, int] = field(default_factory=dict)
    """`flops.Shapes` of the model; empty if it is more than matrices and attention"""

    @property
    def total(self) -> int:
        return sum(getattr(self, kind) for kind in KINDS)


def forecast(settings: Sequence[Setting], folder: Path) -> list[Memory]:
    """The memory of each setting; simulates those that are not in `folder` yet, and saves them there."""
    simulated = [replace(setting, eight_bit=False) for setting in settings]
    places = [folder / f"{_key(setting)}.json" for setting in simulated]
    missing = {place: setting for place, setting in zip(places, simulated, strict=True) if not place.is_file()}
    if missing:
        print(f"simulating {len(missing)} settings, half a minute in all or some; kept in {folder}", flush=True)
        _simulate(missing)
    memories = [Memory(**json.loads(place.read_text())["memory"]) for place in places]
    return [_in_8_bits(m) if setting.eight_bit else m for m, setting in zip(memories, settings, strict=True)]


def _in_8_bits(memory: Memory) -> Memory:
    """The memory with moments in 8 bits; as moments are allocated throughout a step, its peak stays where it is."""
    shares = {**memory.shares, "optimizer": round(EIGHT_BIT * memory.shares["optimizer"])}
    return replace(memory, optimizer=round(EIGHT_BIT * memory.optimizer), shares=shares)


def _key(setting: Setting) -> str:
    """A hash of everything that may change the result: the setting, the code and the versions of packages."""
    here = Path(__file__).parent
    files = {name: hashlib.sha256((here / name).read_bytes()).hexdigest() for name in DECIDING}
    packages = {name: version(name) for name in ("torch", "transformers")}
    text = json.dumps([asdict(setting), files, packages], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _simulate(missing: dict[Path, Setting]) -> None:
    """Simulate all settings in one process; each result is saved as soon as it arrives."""
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
