"""merge.py with its arithmetic on a GPU against the same machine's CPU: seconds, memory, and whether they agree.

    python benchmarks/merge_cuda.py --work outputs/bench [--shape 32b-slice]

Makes the experts of merge_vs_mergekit.py, or those of --shape, and merges them in turns with device=cpu and
device=cuda, whole commands from start to exit. `gpu_mb` is the most that nvidia-smi saw in use on the device, less
what was in use before. `differing` is the share of coordinates in which the two results differ. `load` is Python with
torch imported and a first tensor on the device, which a command that uses CUDA cannot go below.
"""

import argparse
import json
import subprocess
import sys
import threading
from pathlib import Path

import measure
from merge_vs_mergekit import parents

LOAD = "import torch; torch.zeros(1, device='cuda')"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=lambda path: Path(path).absolute(), required=True, help="folder for all files")
    parser.add_argument("--repeats", type=int, default=1)
    options, shape = parser.parse_known_args()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    measure.make_experts(work / "experts", shape)
    costs: dict[str, list[measure.Cost]] = {"cpu": [], "cuda": [], "load": []}
    merge(work, "cpu")  # compiles
    before, most = used_mb(), 0
    for _ in range(options.repeats):
        costs["cpu"].append(merge(work, "cpu"))
        with Watch() as watch:
            costs["cuda"].append(merge(work, "cuda"))
        most = max(most, watch.most)
        costs["load"].append(measure.run([sys.executable, "-c", LOAD]))
    facts = {
        "benchmark": "merge_cuda",
        "experts": shape or ["--shape", "0.43b"],
        "bytes_of_a_model": sum(measure.tensor_bytes(work / "experts" / "code").values()),
        "seconds": {name: round(min(cost.seconds for cost in all_), 2) for name, all_ in costs.items()},
        "peak_rss_mb": {name: round(max(cost.rss_mb for cost in costs[name])) for name in ("cpu", "cuda")},
        "gpu_mb": most - before,
        "differing": differing(work / "out" / "cpu", work / "out" / "cuda"),
        "gpu": smi("name"),
        "cpu": measure.cpu(),
        "cores": measure.use_cores(None),
        "versions": measure.versions(),
        "date": measure.today(),
    }
    print(json.dumps(facts))


def merge(work: Path, device: str) -> measure.Cost:
    science, math, code = parents(work / "experts")
    measure.read([science, math, code])
    arguments = ("anatomy=false", f"device={device}")
    return measure.branchmerge(f"[{code},[{science},{math}]]", work / "out" / device, work, arguments)


class Watch:
    """The most memory in use on the device while the block runs, asked for every tenth of a second."""

    def __enter__(self) -> "Watch":
        self.most, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.1):
            self.most = max(self.most, used_mb())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def used_mb() -> int:
    return int(smi("memory.used"))


def smi(what: str) -> str:
    """What nvidia-smi says of the first device."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits", "-i", "0"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def differing(one: Path, other: Path) -> float:
    """Share of the elements that differ, compared by their bits."""
    import numpy as np

    from branchmerge.merge.checkpoint import Reader

    count = elements = 0
    with Reader(one) as a, Reader(other) as b:
        for name in a.tensors:
            x, y = (np.ascontiguousarray(reader.read(name)) for reader in (a, b))
            width = np.dtype(f"u{x.dtype.itemsize}")
            count += int((x.view(width) != y.view(width)).sum())
            elements += x.size
    return count / elements


if __name__ == "__main__":
    main()
