"""Peak memory of `merge.py` on three experts shaped as a slice of a 32B model; one JSON line.

    python benchmarks/merge_memory.py --work outputs/bench
    python benchmarks/merge_memory.py --work outputs/bench --limit-gb 16

Needs 17 GB of disk. The largest tensor of R1-Distill-Qwen-32B is in the slice, so the whole model takes no more.

`--limit-gb` starts the merge by `prlimit --data`: all memory that only the process itself can hold (heap, stacks,
private writable mappings) is limited, and an allocation beyond ends the merge. It counts what is reserved, touched or
not, so it is stricter than RSS; pages of mapped files, which the kernel drops at will, are not in it. That needs no
rights, whereas a control group does.

Arguments that are not listed go to synthetic_experts.py (`--vocab 512` for a try).
"""

import argparse
import json
from pathlib import Path

import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=lambda path: Path(path).absolute(), required=True, help="folder for all files")
    parser.add_argument("--limit-gb", type=float, help="in 1e9 bytes")
    parser.add_argument("--cores", type=int, help="use only so many")
    options, shape = parser.parse_known_args()

    cores = measure.use_cores(options.cores)
    experts = options.work / "slice"
    measure.make_experts(experts, ["--shape", "32b-slice", *shape])
    science, math, code = (experts / name for name in ("science", "math", "code"))
    prefix = ["prlimit", f"--data={int(options.limit_gb * 1e9)}", "--"] if options.limit_gb else []
    tree, out = f"[{code},[{science},{math}]]", options.work / "branchmerge-slice"
    cost = measure.branchmerge(tree, out, options.work, prefix=prefix)
    tensors = measure.tensor_bytes(code)
    largest = max(tensors.values())
    facts = {
        "benchmark": "merge_memory",
        "peak_rss_mb": round(cost.rss_mb),
        "peak_rss_over_largest_tensor": round(cost.rss_mb * 2**20 / largest, 2),
        "seconds": round(cost.seconds, 2),
        "cpu_seconds": round(cost.cpu_seconds, 2),
        "limit": {"gb": options.limit_gb, "by": "RLIMIT_DATA"} if options.limit_gb else None,
        "largest_tensor_bytes": largest,
        "model_bytes": sum(tensors.values()),
        "models": 3,
        "cores": cores,
        "cpu": measure.cpu(),
        "versions": measure.versions(),
        "date": measure.today(),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
