"""Other people's trainers on the rows of train_vs_trl.py, which calls this with the interpreter that has them.

Each reads `rows.json` and the checkpoint, trains a row a step, and writes what `report` makes of it. No branchmerge
here, and nothing of torch at the head: train_vs_trl.py, which must stay small, imports the settings.
"""

import argparse
import json
import resource
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

LR, BETAS, EPS, WEIGHT_DECAY, GRAD_CLIP = 1e-3, (0.9, 0.95), 1e-8, 0.01, 1.0
"""AdamW of all sides; the rate falls by half a cosine, from the first step on."""
IGNORE = -100


class Clock:
    """Wall and CPU time at the end of every step but the first ones; CPU time is that of all threads of the process."""

    def __init__(self, warm_up: int, shares: "Shares | None") -> None:
        self.warm_up = warm_up
        self.shares = shares
        self.stamps: list[tuple[float, float]] = []
        self._steps = 0

    def tick(self) -> None:
        self._steps += 1
        if self.shares and self._steps == self.warm_up:
            self.shares.seconds.clear()
        if self._steps >= self.warm_up:
            self.stamps.append((time.perf_counter(), time.process_time()))


class Shares:
    """Where the time of training steps goes, by hooks on whatever trains a transformers model on a CPU.

    A module's time is that between its call and its result, and backwards that between the gradient of its result
    and the gradient of its input; autograd does one after the other there. `loss` begins where the last layer ends and
    ends where its gradient is known, so it holds the head, forward and backward. `optimizer` is what follows the last
    gradient: clipping and AdamW's step; `data` what the loader takes for a batch. The rest (embedding, norms, masks,
    the trainer's own) is `other`.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._began: dict[Any, float] = {}

    def watch(self, model: Any) -> None:
        """Hooks on a transformers model, the optimizers and the loaders of this process."""
        from torch.optim.optimizer import register_optimizer_step_post_hook
        from torch.utils.data import dataloader

        for module in model.base_model.modules():
            name = type(module).__name__.lower()
            part = next((part for part in ("attention", "mlp") if name.endswith(part)), None)
            if part:
                self._watch_module(module, part)
        model.base_model.register_forward_hook(self._watch_loss)
        # The last gradient that is known; AdamW's own start will not do, since Lightning runs the whole step inside it.
        model.get_input_embeddings().weight.register_post_accumulate_grad_hook(lambda _: self._begin("optimizer"))
        register_optimizer_step_post_hook(lambda *_: self._end("optimizer", "optimizer"))
        batches: Any = dataloader._BaseDataLoaderIter
        following = batches.__next__

        def timed(loader: Any) -> Any:
            self._begin("data")
            try:
                return following(loader)
            finally:
                self._end("data", "data")

        batches.__next__ = timed

    def of(self, seconds: float) -> dict[str, float]:
        """Shares of so much time of all steps."""
        parts = {name: self.seconds[name] for name in ("attention", "mlp", "loss", "optimizer", "data")}
        parts["other"] = seconds - sum(parts.values())
        return {name: round(part / seconds, 3) for name, part in parts.items()}

    def _begin(self, key: Any) -> None:
        self._began[key] = time.perf_counter()

    def _end(self, key: Any, part: str) -> None:
        self.seconds[part] += time.perf_counter() - self._began.pop(key)

    def _watch_module(self, module: Any, part: str) -> None:
        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entering = args[0] if args else kwargs["hidden_states"]
            if entering.requires_grad:
                entering.register_hook(lambda _: self._end((module, "backward"), part))
            self._begin(module)

        def after(_: Any, args: tuple[Any, ...], result: Any) -> None:
            self._end(module, part)
            result = result[0] if isinstance(result, tuple) else result
            if result.requires_grad:
                result.register_hook(lambda _: self._begin((module, "backward")))

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)

    def _watch_loss(self, _: Any, args: tuple[Any, ...], result: Any) -> None:
        hidden = result.last_hidden_state
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self._end("loss", "loss"))
            self._begin("loss")


def report(out: Path, clock: Clock, rows: list[Any], losses: list[float]) -> None:
    """Write one side's result: speed after the warm-up, memory, losses."""
    tokens = sum(len(row["input_ids"]) for row in rows[clock.warm_up :])
    (wall, busy), (wall_end, busy_end) = clock.stamps[0], clock.stamps[-1]
    facts: dict[str, Any] = {
        "tokens_per_cpu_s": round(tokens / (busy_end - busy), 1),
        "tokens_per_s": round(tokens / (wall_end - wall), 1),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "losses": losses,
    }
    if clock.shares:
        facts["shares"] = clock.shares.of(wall_end - wall)
    out.write_text(json.dumps(facts))


def by_trl(options: argparse.Namespace, rows: list[Any], clock: Clock) -> list[float]:
    """SFTTrainer. `padding_free` makes its collator hand on where documents begin, so that none sees another."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    arguments = SFTConfig(
        **trainer_arguments(options, len(rows)),
        padding_free=True,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="sequential",
    )
    history: list[float] = []
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        callbacks=[ticking(clock, history)],
    )
    if clock.shares:
        clock.shares.watch(model)
    trainer.train()
    return history


def by_trl_with_our_products(options: argparse.Namespace, rows: list[Any], clock: Clock) -> list[float]:
    """The same with branchmerge's bfloat16 products; by its file alone, as TRL's environment has no branchmerge."""
    import importlib.util

    file = Path(__file__).parents[1] / "src" / "branchmerge" / "student" / "bf16_products.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    ours = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ours)
    with ours.products_in_float32():
        return by_trl(options, rows, clock)


def trainer_arguments(options: argparse.Namespace, steps: int) -> dict[str, Any]:
    """Of transformers' Trainer. Its `adamw_torch_fused` is the default; recomputing is TRL's, and costs time."""
    return {
        "output_dir": str(options.out.with_suffix("")),
        "max_steps": steps,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": LR,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_epsilon": EPS,
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": GRAD_CLIP,
        "gradient_checkpointing": False,
        "bf16": options.precision == "bf16",
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }


def ticking(clock: Clock, history: list[float]) -> Any:
    """The clock for transformers' Trainer, which also keeps its losses."""
    from transformers import TrainerCallback

    class Ticking(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

        def on_log(self, *_: Any, **given: Any) -> None:
            if "loss" in given["logs"]:
                history.append(float(given["logs"]["loss"]))

    return Ticking()


def by_litgpt(options: argparse.Namespace, rows: list[Any], clock: Clock) -> list[float]:
    """litgpt's full finetuning loop, on a model of the same shape with weights of its own.

    It knows no documents in a row (attention is causal over all of it, by torch's fast kernel) and clips no gradients.
    """
    import lightning
    import litgpt.finetune.full as full
    import torch
    from litgpt import GPT, Config
    from litgpt.args import EvalArgs, TrainArgs
    from torch.utils.data import DataLoader

    shape = json.loads((options.model / "config.json").read_text())
    config = Config(
        name="qwen2",
        block_size=4096,
        vocab_size=shape["vocab_size"],
        padded_vocab_size=shape["vocab_size"],
        n_layer=shape["num_hidden_layers"],
        n_embd=shape["hidden_size"],
        n_head=shape["num_attention_heads"],
        n_query_groups=shape["num_key_value_heads"],
        intermediate_size=shape["intermediate_size"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        attn_bias=True,
        norm_class_name="RMSNorm",
        norm_eps=1e-6,
        mlp_class_name="LLaMAMLP",
    )
    precision: Any = {"fp32": "32-true", "bf16": "bf16-mixed"}[options.precision]
    fabric: Any = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
    fabric.seed_everything(0)
    model = GPT(config)
    model.lm_head.weight = model.transformer.wte.weight
    for weights in model.parameters():
        if weights.ndim == 2:
            torch.nn.init.normal_(weights, std=0.02)
    model = fabric.setup(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
    )
    optimizer = fabric.setup_optimizers(optimizer)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=len(rows))
    batches: Any = [
        {
            "input_ids": torch.tensor([row["input_ids"]]),
            "labels": torch.tensor([row["labels"]]),
            "token_counts": {
                "raw": torch.tensor([len(row["input_ids"])]),
                "raw_plus_prompt_template": torch.tensor([len(row["input_ids"])]),
            },
        }
        for row in rows
    ]
    history: list[float] = []

    def told(metrics: dict[str, Any], step: int) -> None:
        history.append(float(metrics["loss"]))
        clock.tick()

    fabric.log_dict = told
    full.Tokenizer = lambda _: None
    full.get_longest_seq_length = lambda _: (max(len(row["input_ids"]) for row in rows), 0)
    full.fit(
        fabric,
        {"model": model, "optimizer": optimizer, "scheduler": scheduler, "iter_num": 0, "step_count": 0},
        fabric.setup_dataloaders(DataLoader(batches, batch_size=None)),
        fabric.setup_dataloaders(DataLoader(batches[:1], batch_size=None)),
        1,
        False,
        options.model,
        options.out.with_suffix(""),
        TrainArgs(
            global_batch_size=1, micro_batch_size=1, log_interval=1, max_steps=len(rows), save_interval=None, epochs=2
        ),
        EvalArgs(interval=10**9, initial_validation=False, final_validation=False),
        None,
    )
    return history


SIDES: dict[str, Callable[[argparse.Namespace, list[Any], Clock], list[float]]] = {
    "trl": by_trl,
    "trl_our_products": by_trl_with_our_products,
    "litgpt": by_litgpt,
}


def main() -> None:
    options = arguments(SIDES).parse_args()
    rows = json.loads(options.rows.read_text())
    clock = Clock(options.warm_up, Shares() if options.shares else None)
    losses = SIDES[options.side](options, rows, clock)
    report(options.out, clock, rows, losses)


def arguments(sides: Any) -> argparse.ArgumentParser:
    """Of a side's process, whichever script it runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=sides, required=True)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint to begin with")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the result")
    parser.add_argument("--precision", choices=("fp32", "bf16"), required=True)
    parser.add_argument("--warm-up", type=int, required=True, help="steps that do not count")
    parser.add_argument("--shares", action="store_true", help="also where the time goes; slows it")
    return parser


if __name__ == "__main__":
    main()
