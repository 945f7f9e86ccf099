"""Arcee Fusion of three experts: `merge.py` against mergekit, side by side in one run; one JSON line.

    python benchmarks/merge_vs_mergekit.py --mergekit-bin MERGEKIT_VENV/bin/mergekit-yaml --work outputs/bench

mergekit (`pip install mergekit==0.1.5` into an environment of its own) merges as TinyR1's authors do, by two
commands: science with math, then code with that, `dtype: bfloat16`. Its results are then float32 files of twice the
bytes, so it also runs with `out_dtype: bfloat16` (`mergekit_out_bf16`), which writes what `merge.py` writes. That
does the tree [code, [science, math]] in one command: `branchmerge` from experts with manifests, as train.py writes
them, `branchmerge_foreign` from such without, whose SHA-256 it takes, and `branchmerge_anatomy` with figures, of which
mergekit has none. `cp` copies one model's bytes, `cat` reads those of the three parents.
All are timed from start to exit, in turns, `--repeats` times; before each the disk is synced and what it will read
is read once, so all find their parents in the page cache if memory allows. The best counts, all are reported.

Before, a tiny merge by each: the first in its life, so it may compile and cache (`first_run_seconds`; bytecode of
installed packages may be there already).

Arguments that are not listed go to synthetic_experts.py (`--layers 2 --vocab 512` for a try).
"""

import argparse
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import measure

TINY = ["--hidden", "64", "--intermediate", "1024", "--layers", "1", "--heads", "4", "--kv-heads", "2", "--vocab", "64"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit-bin", type=lambda path: Path(path).absolute(), required=True)
    parser.add_argument("--work", type=lambda path: Path(path).absolute(), required=True, help="folder for all files")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--cores", type=int, help="use only so many")
    options, shape = parser.parse_known_args()

    cores = measure.use_cores(options.cores)
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work / "numba", ignore_errors=True)
    measure.make_experts(work / "tiny", TINY)
    first = {name: merge(work / "tiny", work, options.mergekit_bin).seconds for name, merge in SIDES.items()}
    measure.make_experts(work / "experts", shape)
    costs: dict[str, list[measure.Cost]] = {name: [] for name in [*SIDES, "cp", "read"]}
    for _ in range(options.repeats):
        for name, merge in SIDES.items():
            costs[name].append(merge(work / "experts", work, options.mergekit_bin))
        costs["cp"].append(copy(work / "experts" / "code", work / "copy"))
        costs["read"].append(measure.read(parents(work / "experts")))

    seconds = {name: [round(cost.seconds, 2) for cost in all_] for name, all_ in costs.items()}
    busy = {name: [round(cost.cpu_seconds, 2) for cost in costs[name]] for name in SIDES}
    rss = {name: [round(cost.rss_mb) for cost in costs[name]] for name in SIDES}
    best, least = ({name: min(values) for name, values in each.items()} for each in (seconds, rss))
    facts = {
        "benchmark": "merge_vs_mergekit",
        "seconds": {name: best[name] for name in SIDES},
        "ratio": {name: round(best[name] / best["branchmerge"], 2) for name in THEIRS},
        "peak_rss_mb": least,
        "rss_ratio": {name: round(least[name] / least["branchmerge"], 2) for name in THEIRS},
        "cp_seconds": best["cp"],
        "read_seconds": best["read"],
        "first_run_seconds": {name: round(value, 2) for name, value in first.items()},
        "all_seconds": seconds,
        "all_cpu_seconds": busy,
        "all_peak_rss_mb": rss,
        "parent_bytes": size(work / "experts" / "code"),
        "output_bytes": {name: size(work / name) for name in SIDES},
        "cores": cores,
        "cpu": measure.cpu(),
        "versions": measure.versions(options.mergekit_bin),
        "date": measure.today(),
    }
    print(json.dumps(facts))


def by_mergekit(experts: Path, work: Path, program: Path, name: str, out_dtype: str | None) -> measure.Cost:
    science, math, code = parents(experts)
    step1 = work / f"{name}-step1"
    measure.read([science, math])
    one = measure.mergekit(program, science, math, step1, work, out_dtype=out_dtype)
    measure.read([code, step1])
    two = measure.mergekit(program, code, step1, work / name, work, out_dtype=out_dtype)
    return measure.Cost(one.seconds + two.seconds, max(one.rss_mb, two.rss_mb), one.cpu_seconds + two.cpu_seconds)


def by_branchmerge(
    experts: Path, work: Path, program: Path, name: str, arguments: tuple[str, ...] = ("anatomy=false",)
) -> measure.Cost:
    science, math, code = parents(foreign(experts) if name == "branchmerge_foreign" else experts)
    measure.read([science, math, code])
    return measure.branchmerge(f"[{code},[{science},{math}]]", work / name, work, arguments)


THEIRS = {
    "mergekit": partial(by_mergekit, name="mergekit", out_dtype=None),
    "mergekit_out_bf16": partial(by_mergekit, name="mergekit_out_bf16", out_dtype="bfloat16"),
}
SIDES: dict[str, Callable[[Path, Path, Path], measure.Cost]] = {
    **THEIRS,
    "branchmerge": partial(by_branchmerge, name="branchmerge"),
    "branchmerge_foreign": partial(by_branchmerge, name="branchmerge_foreign"),
    "branchmerge_anatomy": partial(by_branchmerge, name="branchmerge_anatomy", arguments=()),
}


def foreign(experts: Path) -> Path:
    """The same experts without their manifests, by links."""
    folder = experts.with_name(f"{experts.name}-foreign")
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("science", "math", "code"):
        (folder / name).mkdir(parents=True)
        for path in (experts / name).iterdir():
            if path.name != "manifest.json":
                (folder / name / path.name).symlink_to(path)
    return folder


def copy(source: Path, target: Path) -> measure.Cost:
    shutil.rmtree(target, ignore_errors=True)
    measure.read([source])
    return measure.run(["cp", "-r", "--reflink=never", source, target])


def parents(experts: Path) -> list[Path]:
    return [experts / name for name in ("science", "math", "code")]


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in measure.weights(folder))


if __name__ == "__main__":
    main()
