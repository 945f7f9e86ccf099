"""A sweep over lambda against a single merge: `merge.py -m operator.lam=...` reads and measures the experts once.

    python benchmarks/merge_sweep.py --work outputs/bench

Makes the experts of merge_vs_mergekit.py and merges them, in turns, with one lambda and with four. Writing is no part
of the claim, so the writing of three models is taken from the seconds of the four. `ratio_without_cp` counts what `cp`
needs for it; `ratio_without_writing` what the engine's own writers (SHA-256, past the system's cache) need for four
models more than for one (`writing_4`, `writing_1`: from memory, side by side, when nothing else is done).
"""

import argparse
import json
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import measure
from merge_vs_mergekit import copy, parents

from branchmerge.merge.checkpoint import Reader, Writer

LAMBDAS = ("0.5", "1.0", "1.5", "2.0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=lambda path: Path(path).absolute(), required=True, help="folder for all files")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--steps", type=int, choices=(1, 2), default=2, help="of the tree: two experts, or all three")
    options, shape = parser.parse_known_args()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    measure.make_experts(work / "experts", shape)
    merge(work, LAMBDAS[:1], options.steps)  # compiles
    costs: dict[str, list[measure.Cost]] = {"one": [], "four": [], "cp": []}
    writing: dict[int, list[float]] = {1: [], 4: []}
    for _ in range(options.repeats):
        costs["one"].append(merge(work, LAMBDAS[:1], options.steps))
        costs["four"].append(merge(work, LAMBDAS, options.steps))
        costs["cp"].append(copy(work / "experts" / "code", work / "copy"))
        for models, seconds in writing.items():
            with ProcessPoolExecutor(1, get_context("spawn")) as process:  # its memory is not to count for the others
                seconds.append(process.submit(write, work / "experts" / "code", work / "written", models).result())
    best = {name: min(cost.seconds for cost in all_) for name, all_ in costs.items()}
    best |= {f"writing_{models}": min(seconds) for models, seconds in writing.items()}
    facts = {
        "benchmark": "merge_sweep",
        "lambdas": len(LAMBDAS),
        "steps": options.steps,
        "seconds": {name: round(value, 2) for name, value in best.items()},
        "ratio": round(best["four"] / best["one"], 2),
        "ratio_without_cp": round((best["four"] - (len(LAMBDAS) - 1) * best["cp"]) / best["one"], 2),
        "ratio_without_writing": round((best["four"] - best["writing_4"] + best["writing_1"]) / best["one"], 2),
        "all_seconds": {name: [round(cost.seconds, 2) for cost in all_] for name, all_ in costs.items()},
        "all_cpu_seconds": {name: [round(cost.cpu_seconds, 2) for cost in all_] for name, all_ in costs.items()},
        "peak_rss_mb": {name: round(max(cost.rss_mb for cost in costs[name])) for name in ("one", "four")},
        "cpu": measure.cpu(),
        "versions": measure.versions(),
        "date": measure.today(),
    }
    print(json.dumps(facts))


def merge(work: Path, lambdas: tuple[str, ...], steps: int) -> measure.Cost:
    """A multirun, also of one."""
    science, math, code = parents(work / "experts")
    measure.read([science, math, code])
    shutil.rmtree(work / "sweep", ignore_errors=True)
    arguments = ("-m", "anatomy=false", f"operator.lam={','.join(lambdas)}", f"out={work}/sweep/${{operator.lam}}")
    tree = f"[{science},{math}]" if steps == 1 else f"[{code},[{science},{math}]]"
    return measure.branchmerge(tree, None, work, arguments)


def write(model: Path, out: Path, models: int) -> float:
    """Seconds to write a model, which is in memory, so many times at once."""

    def one(number: int) -> None:
        (out / str(number)).mkdir()
        with Writer(out / str(number), reader.tensors, 1 << 40) as writer:
            for name in reader.tensors:
                writer.write(name, reader.read(name))

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    measure.read([model])
    with Reader(model) as reader, ThreadPoolExecutor(models) as pool:
        began = time.perf_counter()
        list(pool.map(one, range(models)))
        seconds = time.perf_counter() - began
    shutil.rmtree(out)
    return seconds


if __name__ == "__main__":
    main()
