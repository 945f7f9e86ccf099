"""What the merge benchmarks share: a command's time and memory, the two sides' commands, and the machine in words.

Keep torch out of here: Linux counts the memory of the process that starts a command as the command's own until it
is executed, so the one that measures must be small.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SYNTHETIC = ROOT / "benchmarks" / "synthetic_experts.py"


@dataclass(frozen=True)
class Cost:
    """Wall time from start to exit; the peak RSS of the largest process among the command and its children; CPU time.

    CPU time of all of them, to tell whether others were busy on the same cores. RSS counts pages of mapped files that
    happen to be in memory, for all alike.
    """

    seconds: float
    rss_mb: float
    cpu_seconds: float


def run(command: Sequence[str | Path], log: Path | None = None, env: dict[str, str] | None = None) -> Cost:
    """Run a command from the repository's root; what it prints goes to `log`, or nowhere.

    Raises:
        RuntimeError: it failed; with the end of its log.
    """
    with Path(log or os.devnull).open("w") as output:
        began = time.perf_counter()
        child = subprocess.Popen(
            [str(part) for part in command], cwd=ROOT, env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        said = log.read_text()[-2000:] if log else ""
        raise RuntimeError(f"exit status {child.returncode}: {' '.join(map(str, command))}\n{said}")
    return Cost(seconds, usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime)


def make_experts(folder: Path, arguments: Sequence[str] = ()) -> None:
    """Call synthetic_experts.py as a process of its own."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    run([sys.executable, SYNTHETIC, folder, *arguments], folder.parent / "synthetic_experts.log")


def branchmerge(
    tree: str, out: Path | None, work: Path, arguments: Sequence[str] = (), prefix: Sequence[str] = ()
) -> Cost:
    """`python merge.py` by Arcee Fusion with lambda 1.5; compiled code is cached in `work`.

    Args:
        tree: of absolute paths
        out: where the result goes; None: `arguments` say it
        arguments: more of merge.py's
        prefix: a command that starts the merge, such as prlimit
    """
    if out is not None:
        shutil.rmtree(out, ignore_errors=True)
        arguments = ("operator.lam=1.5", f"out={out}", *arguments)
    command = [*prefix, sys.executable, str(ROOT / "merge.py"), *arguments, f"tree={tree}",
               "operator=arcee_fusion", "progress=false", f"outputs={work / 'outputs'}"]  # fmt: skip
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {"PYTHONPATH": os.pathsep.join(paths), "NUMBA_CACHE_DIR": str(work / "numba"), "HF_HUB_OFFLINE": "1"}
    return run(command, work / "branchmerge.log", env)


def mergekit(
    program: Path, left: Path, right: Path, out: Path, work: Path, dtype: str = "bfloat16", out_dtype: str | None = None
) -> Cost:
    """`mergekit-yaml` with its Arcee Fusion of two models, computed in `dtype`."""
    shutil.rmtree(out, ignore_errors=True)
    config = {"merge_method": "arcee_fusion", "base_model": str(left), "models": [{"model": str(right)}],
              "dtype": dtype, **({"out_dtype": out_dtype} if out_dtype else {})}  # fmt: skip
    path = work / "mergekit.yaml"
    path.write_text(json.dumps(config, indent=2))  # JSON is YAML
    return run([program, path, out], work / "mergekit.log", {"HF_HUB_OFFLINE": "1"})


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def tensor_bytes(folder: Path) -> dict[str, int]:
    """The size of each tensor of a checkpoint, from its headers."""
    sizes: dict[str, int] = {}
    for path in weights(folder):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                sizes[name] = end - begin
    return sizes


def read(folders: Sequence[Path]) -> Cost:
    """Read all weights to nowhere, after what was written before is on the disk."""
    os.sync()
    return run(["cat", *(path for folder in folders for path in weights(folder))])


def use_cores(count: int | None) -> int:
    """Bind this process and those it starts to the first `count` cores; returns how many they have."""
    cores = sorted(os.sched_getaffinity(0))[:count]
    os.sched_setaffinity(0, cores)
    return len(cores)


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def versions(mergekit_bin: Path | None = None) -> dict[str, str]:
    """The packages' versions; mergekit's from the environment that its program lies in."""
    found = {name: importlib.metadata.version(name) for name in ("branchmerge", "torch")}
    if mergekit_bin:
        ask = "from importlib.metadata import version as v; print(v('mergekit'), v('torch'))"
        told = subprocess.run([mergekit_bin.parent / "python", "-c", ask], check=True, capture_output=True, text=True)
        found["mergekit"], found["mergekit_torch"] = told.stdout.split()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {**found, "commit": commit.stdout.strip()}


def today() -> str:
    return datetime.now(UTC).date().isoformat()
