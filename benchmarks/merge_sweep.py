"""A sweep over lambda against a single merge: `merge.py -m operator.lam=...` reads and measures the experts once.

    python benchmarks/merge_sweep.py --work outputs/bench

Makes the experts of merge_vs_mergekit.py and merges them, in turns, with one lambda and with four. Writing is no part
of the claim: `ratio_without_writing` takes three times what `cp` needs for one model from the seconds of the four.
"""

import argparse
import json
import shutil
from pathlib import Path

import measure
from merge_vs_mergekit import copy, parents

LAMBDAS = ("0.5", "1.0", "1.5", "2.0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=lambda path: Path(path).absolute(), required=True, help="folder for all files")
    parser.add_argument("--repeats", type=int, default=1)
    options, shape = parser.parse_known_args()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    measure.make_experts(work / "experts", shape)
    merge(work, LAMBDAS[:1])  # compiles
    costs: dict[str, list[measure.Cost]] = {"one": [], "four": [], "cp": []}
    for _ in range(options.repeats):
        costs["one"].append(merge(work, LAMBDAS[:1]))
        costs["four"].append(merge(work, LAMBDAS))
        costs["cp"].append(copy(work / "experts" / "code", work / "copy"))
    best = {name: min(cost.seconds for cost in all_) for name, all_ in costs.items()}
    facts = {
        "benchmark": "merge_sweep",
        "lambdas": len(LAMBDAS),
        "seconds": {name: round(value, 2) for name, value in best.items()},
        "ratio": round(best["four"] / best["one"], 2),
        "ratio_without_writing": round((best["four"] - (len(LAMBDAS) - 1) * best["cp"]) / best["one"], 2),
        "all_seconds": {name: [round(cost.seconds, 2) for cost in all_] for name, all_ in costs.items()},
        "all_cpu_seconds": {name: [round(cost.cpu_seconds, 2) for cost in all_] for name, all_ in costs.items()},
        "peak_rss_mb": {name: round(max(cost.rss_mb for cost in costs[name])) for name in ("one", "four")},
        "cpu": measure.cpu(),
        "versions": measure.versions(),
        "date": measure.today(),
    }
    print(json.dumps(facts))


def merge(work: Path, lambdas: tuple[str, ...]) -> measure.Cost:
    """A multirun, also of one."""
    science, math, code = parents(work / "experts")
    measure.read([science, math, code])
    shutil.rmtree(work / "sweep", ignore_errors=True)
    arguments = ("-m", "anatomy=false", f"operator.lam={','.join(lambdas)}", f"out={work}/sweep/${{operator.lam}}")
    return measure.branchmerge(f"[{code},[{science},{math}]]", None, work, arguments)


if __name__ == "__main__":
    main()
