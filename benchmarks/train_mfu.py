"""Training speed and memory on a GPU: packed documents against the same loop with a dense attention mask.

    python benchmarks/train_mfu.py --shape 0.5b --tokens 16384

Random Qwen2 models of the usual shapes; weights and AdamW in float32, products in bfloat16 (autocast), `--rows` packed
rows a step, one after the other, the losses of every token. `packed` is what train.py does; `whole` the same with the
logits of all tokens at once; `liger` has liger-kernel's loss; `dense` moreover gives the model a T x T mask, as
trainers do that know no packing. `--compile` compiles layers and chunked loss, as trainer.compile does; `--attn` names
other attention, where it is installed (`packed_sdpa_fa4`: FlashAttention 4); `--sharded` is trainer=fsdp on this one
card: FSDP2's casts in place of autocast's, and hidden states that stay bfloat16 from layer to layer; `--profile` tells
the milliseconds of a step by kernel. `mfu` counts the products' FLOPs (6 N a token for weights in products, and causal
attention inside the documents) over what the card does at best in dense bfloat16; recomputing by activation
checkpointing is not counted, so it lowers the MFU. `mfu_palm` is by PaLM's formula (arXiv 2204.02311, appendix B), as
most others report it: there scores that the causal mask hides count too; inside the documents here, not between them.
"""

import argparse
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import measure
import torch
from torch import Tensor, distributed
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from branchmerge.data.batch import Batch, make_batch
from branchmerge.data.template import Document
from branchmerge.student import attention
from branchmerge.student.loss import PackedLoss, fused_loss, summed_loss
from branchmerge.student.sharding import Sharding, compile_layers, shard

SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "tie_word_embeddings": True},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "tie_word_embeddings": True},
}  # fmt: skip
VOCAB = 151_936
PEAK = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}
"""FLOPs a second in dense bfloat16, by NVIDIA's data sheets (SXM)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--rows", type=int, default=1, help="of a step; the 32B recipe has three a GPU on 32 GPUs")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=("packed", "whole", "liger", "dense"), default=["packed", "dense"])
    parser.add_argument("--attn", default=attention.PACKED_SDPA, help="of all but dense, such as packed_sdpa_fa4")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="layers and chunked loss by torch.compile")
    parser.add_argument("--sharded", action="store_true", help="by FSDP2, a process group of one")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="the N kernels that take longest")
    options = parser.parse_args()
    if options.sharded:
        distributed.init_process_group("nccl", rank=0, world_size=1, store=distributed.HashStore())
    found = {way: train(options, way) for way in options.ways}
    facts = {
        "benchmark": "train_mfu",
        **vars(options),
        "results": found,
        "gpu": torch.cuda.get_device_name(),
        "versions": measure.versions(),
        "date": measure.today(),
    }
    if {"packed", "dense"} <= found.keys():
        facts["ratio"] = round(found["packed"]["tokens_per_s"] / found["dense"]["tokens_per_s"], 2)
    print(json.dumps(facts))


def train(options: argparse.Namespace, way: str) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    kind = "sdpa" if way == "dense" else options.attn
    config = AutoConfig.for_model(
        "qwen2", **SHAPES[options.shape], vocab_size=VOCAB, max_position_embeddings=32_768, attn_implementation=kind
    )
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.train()
    if options.checkpointing:
        model.gradient_checkpointing_enable()
    if options.compile:
        compile_layers(model)
    batch = row(options.tokens, options.documents)
    root = PackedLoss(model, compiled=options.compile) if way != "dense" else Dense(model)
    if isinstance(root, PackedLoss):
        root.loss = {"packed": root.chunked, "whole": summed_loss, "liger": fused_loss}[way]
    weights, scores = (options.rows * flops for flops in step_flops(model, batch))
    if options.sharded:
        sharding = Sharding(torch.bfloat16)
        shard(root, model, sharding, sharding.mesh("cuda", 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> float:
        for _ in range(options.rows):
            with torch.autocast("cuda", torch.bfloat16, enabled=not options.sharded):
                loss = root(batch)
            (loss / batch.supervised_in_step / options.rows).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        read = loss.item()  # here, with the norm, as student/module.py does
        optimizer.step()
        optimizer.zero_grad()
        return read

    losses = [step() for _ in range(3)]
    torch.cuda.synchronize()
    began = time.perf_counter()
    losses += [step() for _ in range(options.steps)]
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / options.steps
    peak = next(value for name, value in PEAK.items() if name in torch.cuda.get_device_name())
    return {
        "tokens_per_s": round(options.rows * options.tokens / seconds),
        "mfu": round((weights + scores) / seconds / peak, 4),
        "mfu_palm": round((weights + 2 * scores) / seconds / peak, 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "losses": [round(loss / batch.supervised_in_step, 5) for loss in (losses[0], losses[-1])],
        "parameters": sum(p.numel() for p in model.parameters()),
        **({"ms_of_a_step": kernels(step, options.profile)} if options.profile else {}),
    }


def kernels(step: Callable[[], float], longest: int) -> dict[str, float]:
    """Milliseconds of one step by kernel, the longest first, and of all together."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
    taken: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        name = re.sub(r"^void |at::native::|\(anonymous namespace\)::", "", event.key)[:90]
        taken[name] += event.self_device_time_total / 1000
    first = sorted(taken, key=lambda name: -taken[name])[:longest]
    return {"all": round(sum(taken.values()), 1), **{name: round(taken[name], 1) for name in first}}


def row(tokens: int, documents: int) -> Batch:
    """One packed row of documents of random tokens, with lengths in the ratio 1 : 2 : 3 : ..."""
    draw = torch.Generator().manual_seed(0)
    shares = range(1, documents + 1)
    lengths = [tokens * share // sum(shares) for share in shares]
    lengths[-1] += tokens - sum(lengths)
    made = [
        Document(str(i), torch.randint(0, VOCAB, (length,), generator=draw).numpy(), 1)
        for i, length in enumerate(lengths)
    ]
    return make_batch(made, tokens - documents).to(torch.device("cuda"))


def dense_mask(batch: Batch) -> Tensor:
    """bool [1, 1, T, T]: which token sees which."""
    bounds = batch.cu_seq_lens.long()
    numbers = torch.repeat_interleave(torch.arange(len(bounds) - 1, device=bounds.device), bounds.diff())
    return (numbers[:, None] == numbers[None]).tril_()[None, None]


class Dense(torch.nn.Module):
    """The sum that `summed_loss` gives, with a mask and logits for the whole row; `PackedLoss` takes no mask."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        mask = dense_mask(batch)
        output = self.model(batch.input_ids, position_ids=batch.position_ids, attention_mask=mask, use_cache=False)
        return cross_entropy(output.logits[0].float(), batch.labels[0], reduction="sum")


def step_flops(model: Any, batch: Batch) -> tuple[float, float]:
    """Of one row's products, forward and backward: weights; and attention inside each document, half of it masked."""
    config = model.config
    tokens = batch.input_ids.shape[1]
    layers = sum(p.numel() for name, p in model.model.layers.named_parameters() if p.ndim == 2)
    head = config.vocab_size * config.hidden_size
    squares = float((batch.cu_seq_lens.diff().double() ** 2).sum())
    return 6 * (layers + head) * tokens, 6 * config.num_hidden_layers * config.hidden_size * squares


if __name__ == "__main__":
    main()
