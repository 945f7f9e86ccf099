"""Training on a CPU: branchmerge against TRL's SFTTrainer, same packed rows and schedule; one JSON line.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install torch==2.13.0 trl==1.16.0
    python benchmarks/train_vs_trl.py --trl-python /tmp/trl/bin/python --work outputs/bench-train

Both start from one random Qwen2 and train a packed row of 1,024 tokens a step, each in a process of its own:
`branchmerge` is what train.py calls, with a clock in it, and records the rows as it trained on them; TRL gets these, as
train_by_others.py says. Both take the mean loss over a row's learned tokens, and TRL too keeps documents apart
(transformers makes a T x T mask of the position ids), so `loss_curve_max_difference` should be rounding; activation
checkpointing, TRL's default, is off. AdamW in float32, products in float32 (`fp32`) or bfloat16 (`bf16`, autocast).

The first `--warm-up` steps do not count. Sides run in turns, `--repeats` times; the best counts, all are reported.
`ratio_fp32` and `ratio_bf16` are of tokens per CPU-second, `wall_ratio_*` of tokens per second. One core is used: with
more, threads that wait for each other on a busy machine burn CPU time. `shares` of the time come from runs of their
own, by hooks (see `Shares`).

On a CPU without bf16 instructions (`bf16_instructions`) torch's bf16 products are ten times slower than those in
float32, and ours are made of the latter (`bf16_products.py`), which decides `ratio_bf16` there. So another side joins,
`trl_our_products`: TRL with the same products, to show what remains without that difference.

`--shape 8m` has about the share of weights in its head that a Qwen2 0.5B has; in `8m_wide`, with a large vocabulary for
so small a model, most work is in the loss; `135m` has the shape of SmolLM2, the demo's student. litgpt joins where
`--litgpt-python` names an interpreter that has it (`pip install torch==2.13.0 litgpt`); it knows no documents in a row,
so its losses are others. LLaMA-Factory 0.9.5 installs, but does not start without a torchaudio that fits its torch, and
the registry had none for a CPU build.
"""

import argparse
import importlib.metadata
import json
import os
import random
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import measure
import train_by_others as others

SHAPES = {
    "8m": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 8,
           "num_key_value_heads": 2, "vocab_size": 8192},
    "8m_wide": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 8, "num_attention_heads": 4,
                "num_key_value_heads": 2, "vocab_size": 49_152},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49_152},
}  # fmt: skip
TOKENS = 1024
PEERS = ("litgpt",)
LENT = "trl_our_products"
LIBRARY = {"trl": "transformers", "litgpt": "lightning"}
"""What else the speed of the others depends on."""
SPARE = 8
"""Ids without a word, for special tokens that tokenizers add."""
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}


def main() -> None:
    if "--side" in sys.argv:
        return run_side()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", type=Path, required=True, help="interpreter that has TRL")
    for peer in PEERS:
        parser.add_argument(f"--{peer}-python", type=Path, help=f"interpreter that has {peer}; without, it is left out")
    parser.add_argument("--work", type=lambda path: Path(path).absolute(), required=True, help="folder for all files")
    parser.add_argument("--shape", choices=SHAPES, default="8m")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--cores", type=int, default=1)
    options = parser.parse_args()

    cores = measure.use_cores(options.cores)
    options.work.mkdir(parents=True, exist_ok=True)
    made = side("make", sys.executable, options, "fp32")
    pythons = interpreters(options)
    lent = {} if made["bf16_instructions"] else {LENT: pythons["trl"]}
    found: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    shares: dict[str, dict[str, Any]] = defaultdict(dict)
    for precision in options.precisions:
        for _ in range(options.repeats):
            for name, python in (pythons | (lent if precision == "bf16" else {})).items():
                found[precision][name].append(side(name, python, options, precision))
        for name in ("branchmerge", "trl"):
            shares[precision][name] = side(name, pythons[name], options, precision, ["--shares"])["shares"]
    print(json.dumps(facts(options, found) | {"shares": shares, **made, "cores": cores}))


def interpreters(options: argparse.Namespace) -> dict[str, Path]:
    """By side; ours comes first, since it records the rows for the others."""
    given = {name: getattr(options, f"{name}_python") for name in ("trl", *PEERS)}
    return {"branchmerge": Path(sys.executable)} | {name: path.absolute() for name, path in given.items() if path}


def side(name: str, python: str | Path, options: argparse.Namespace, precision: str, more: Any = ()) -> dict[str, Any]:
    """Run one side in a process of its own."""
    work = options.work
    out = work / f"{name}-{precision}.json"
    out.unlink(missing_ok=True)
    script = "train_vs_trl.py" if name in OURS else "train_by_others.py"
    command = [python, measure.ROOT / "benchmarks" / script, "--side", name, "--model", work / f"model-{options.shape}",
               "--rows", work / f"rows-{options.shape}.json", "--out", out, "--precision", precision,
               "--warm-up", str(options.warm_up), *more]  # fmt: skip
    if name in OURS:
        command += ["--shape", options.shape, "--steps", str(options.steps)]
    paths = os.pathsep.join([str(measure.ROOT / "src")] if name in OURS else [])
    measure.run(command, out.with_suffix(".log"), {"HF_HUB_OFFLINE": "1", "PYTHONPATH": paths})
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def facts(options: argparse.Namespace, found: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    """What the runs of all sides say, by precision and side."""
    told: dict[str, Any] = {"benchmark": "train_vs_trl", "shape": options.shape}
    for name, of in (("ratio", "tokens_per_cpu_s"), ("wall_ratio", "tokens_per_s")):
        for precision, sides in found.items():
            best = {side: max(run[of] for run in runs) for side, runs in sides.items()}
            told[f"{name}_{precision}"] = round(best["branchmerge"] / best["trl"], 2)
            told.setdefault(f"{name}_to_peers", {})[precision] = {
                peer: round(best["branchmerge"] / best[peer], 2) for peer in (*PEERS, LENT) if peer in best
            }
            told.setdefault(of, {})[precision] = best
    for key in ("tokens_per_cpu_s", "tokens_per_s", "peak_rss_mb"):
        told[f"all_{key}"] = {
            precision: {side: [run[key] for run in runs] for side, runs in sides.items()}
            for precision, sides in found.items()
        }
    losses = {p: {side: runs[0]["losses"] for side, runs in sides.items()} for p, sides in found.items()}
    told["loss_curve_max_difference"] = {
        precision: max(abs(a - b) for a, b in zip(curves["branchmerge"], curves["trl"], strict=True))
        for precision, curves in losses.items()
    }
    return told | {
        "losses": losses,
        "steps": options.steps,
        "warm_up": options.warm_up,
        "cpu": measure.cpu(),
        "versions": versions(interpreters(options)),
        "date": measure.today(),
    }


def versions(pythons: dict[str, Path]) -> dict[str, str]:
    """Of all sides' packages; the others' torch and library bear the side's name in front."""
    found = measure.versions() | {"transformers": importlib.metadata.version("transformers")}
    ask = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"
    for name, library in LIBRARY.items():
        if name not in pythons:
            continue
        command = [str(pythons[name]), "-c", ask, name, "torch", library]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        found |= dict(zip((name, f"{name}_torch", f"{name}_{library}"), told, strict=True))
    return found


OURS = ("make", "branchmerge")


def run_side() -> None:
    """What a process of ours does; it leaves its result in `--out`."""
    parser = others.arguments(OURS)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    if options.side == "make":
        options.out.write_text(json.dumps(make(options)))
        return
    clock = others.Clock(options.warm_up, others.Shares() if options.shares else None)
    rows, losses = by_branchmerge(options, clock)
    options.rows.write_text(json.dumps(rows))
    others.report(options.out, clock, rows, losses)


def by_branchmerge(options: argparse.Namespace, clock: others.Clock) -> tuple[list[Any], list[float]]:
    """`train.py` with a clock in it; returns the rows as it trained on them, and its losses."""
    import csv

    from hydra import compose, initialize_config_dir

    from branchmerge import config
    from branchmerge.config_checks import typed
    from branchmerge.student.module import Student
    from branchmerge.student.training import train

    rows: list[Any] = []
    end, configure = Student.on_train_batch_end, Student.configure_optimizers

    def ending(student: Any, outputs: Any, batch: Any, number: int) -> None:
        end(student, outputs, batch, number)
        clock.tick()
        rows.append(batch)

    def configuring(student: Any) -> Any:
        if clock.shares:
            clock.shares.watch(student.model)
        return configure(student)

    observed: Any = Student
    observed.on_train_batch_end, observed.configure_optimizers = ending, configuring
    out = options.out.with_suffix("")
    shutil.rmtree(out, ignore_errors=True)
    config.register()
    with initialize_config_dir(str(measure.ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", [
            "domain=math", f"backbone.path={options.model}", f"data.path={options.rows.with_suffix('.jsonl')}",
            "data.verify=false", f"data.seq_len={TOKENS}", "optim.epochs=1", f"optim.max_steps={options.steps}",
            "optim.global_batch=1", f"optim.lr={others.LR}", "optim.schedule=cosine", "optim.warmup_ratio=0",
            f"optim.betas=[{others.BETAS[0]},{others.BETAS[1]}]", f"optim.eps={others.EPS}",
            f"optim.weight_decay={others.WEIGHT_DECAY}", f"optim.grad_clip={others.GRAD_CLIP}", "trainer=cpu",
            f"trainer.precision={PRECISIONS[options.precision]}", "trainer.progress=false", f"out={out}",
        ])  # fmt: skip
        train(typed(cfg, config.TrainConfig))
    with (out.parent / f"{out.name}-logs" / "metrics.csv").open(newline="") as lines:
        losses = [float(line["loss"]) for line in csv.DictReader(lines)]
    return [recorded(batch) for batch in rows], losses


def recorded(batch: Any) -> dict[str, list[int]]:
    """A row for the others: labels as they are in input_ids, not shifted."""
    return {
        "input_ids": batch.input_ids[0].tolist(),
        "labels": [others.IGNORE, *batch.labels[0, :-1].tolist()],
        "seq_lengths": batch.cu_seq_lens.diff().tolist(),
    }


def make(options: argparse.Namespace) -> dict[str, Any]:
    """A random Qwen2 with a tokenizer whose words are numbers, and documents of such words."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from branchmerge import machine

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2", **SHAPES[options.shape], tie_word_embeddings=True, max_position_embeddings=4096,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(options.model)
    words = Tokenizer(
        WordLevel({"<pad>": 0, "<end>": 1} | {str(i): i for i in range(2, config.vocab_size - SPARE)}, "2")
    )
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(options.model)
    draw = random.Random(0)
    documents = [document(draw, config.vocab_size) for _ in range(options.steps * 6)]
    options.rows.with_suffix(".jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bf16_instructions": machine.computes_bf16(torch.device("cpu")),
    }


def document(draw: random.Random, vocabulary: int) -> dict[str, Any]:
    """64 to 448 words, a quarter of them prompt; a few of them are frequent, so that there is something to learn."""
    length = draw.randint(64, 448)
    words = [str(2 + int(draw.paretovariate(0.7)) % (vocabulary - SPARE - 2)) for _ in range(length)]
    prompt = int(length * draw.uniform(0.1, 0.4))
    texts = {"user": " ".join(words[:prompt]), "assistant": " ".join(words[prompt:])}
    return {"messages": [{"role": role, "content": text} for role, text in texts.items()]}


if __name__ == "__main__":
    main()
