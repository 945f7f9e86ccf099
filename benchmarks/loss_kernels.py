"""The loss outside its products on a GPU: ways from a chunk of logits to the summed loss and the logits' gradient.

    python benchmarks/loss_kernels.py

`chunked` is what training does without trainer.compile, `compiled` what it does with it; `quack` the kernel of
quack-kernels, which comes with FlashAttention 4: on Hopper 16 processors hold a row together, so it is read once;
`a_row_each` a Triton kernel
in which a program walks twice over one row of logits, the second time, it is hoped, out of the cache: a row of 151,936
is 304 KB, so 132 of them are 40 of an H100's 50 MB. Milliseconds of all rows, and the share of the card's bandwidth if
every logit was read once and its gradient written once; errors against float64. `--interpreted` compares the errors
without a GPU, by Triton's interpreter.
"""

import argparse
import importlib.util
import json
import os
from collections.abc import Callable

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rows", type=int, default=16_384)
parser.add_argument("--words", type=int, default=151_936)
parser.add_argument("--repeats", type=int, default=5)
parser.add_argument("--interpreted", action="store_true")
options = parser.parse_args()
if options.interpreted:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton looks at it when it is imported

import measure  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402

from branchmerge.student import chunked_loss  # noqa: E402

BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.04e12}
"""Bytes a second, by NVIDIA's data sheets (SXM, 80 GB)."""
Way = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def main() -> None:
    device = torch.device("cpu" if options.interpreted else "cuda")
    ways: dict[str, Way] = {"chunked": chunked_loss._loss_and_gradient}
    if not options.interpreted:
        ways["compiled"] = chunked_loss._by_compiled
        if importlib.util.find_spec("quack"):
            ways["quack"] = by_quack
    for block in (4096, 8192, 16_384):
        for warps in (8, 16, 32):
            ways[f"a_row_each, {block} words, {warps} warps"] = rows_by_programs(block, warps)
    found = {name: {**errors(way, device), **({} if options.interpreted else timed(way))} for name, way in ways.items()}
    gpu = None if options.interpreted else torch.cuda.get_device_name()
    facts = {"benchmark": "loss_kernels", **vars(options), "results": found, "gpu": gpu}
    print(json.dumps({**facts, "versions": measure.versions(), "date": measure.today()}))


def timed(way: Way) -> dict[str, float]:
    """The chunks that training has, of as many rows; what it overwrites is not made anew."""
    held = max(1, chunked_loss.COMPILED_CHUNK // options.words)
    logits = torch.randn(min(held, options.rows), options.words, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(options.words, (len(logits), 1), device="cuda")
    sizes = [min(held, options.rows - start) for start in range(0, options.rows, held)]
    for size in set(sizes):
        way(logits[:size], labels[:size])
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    best = float("inf")
    for _ in range(options.repeats):
        begin.record()
        for size in sizes:
            way(logits[:size], labels[:size])
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end))
    peak = next((value for name, value in BANDWIDTH.items() if name in torch.cuda.get_device_name()), float("nan"))
    least = 2 * options.rows * options.words * logits.element_size() / peak
    return {"ms": round(best, 2), "of_bandwidth": round(least / (best / 1000), 3)}


def errors(way: Way, device: torch.device) -> dict[str, float]:
    """Relative, of the loss and of the gradient's norm; logits as large as a trained model's."""
    draw = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(19, options.words, generator=draw)).to(device, torch.bfloat16)
    labels = torch.randint(options.words, (19, 1), generator=draw).to(device)
    labels[0], labels[1] = 0, options.words - 1
    exact = logits.double()
    loss = (exact.logsumexp(dim=-1, keepdim=True) - exact.gather(1, labels)).sum()
    gradient = exact.softmax(dim=-1).scatter_add_(1, labels, torch.full_like(labels, -1, dtype=torch.float64))
    loss_found, gradient_found = way(logits, labels)
    off = (gradient_found.double() - gradient).norm() / gradient.norm()
    return {"loss_error": float((loss_found - loss).abs() / loss), "gradient_error": float(off)}


def by_quack(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    from quack.cross_entropy import cross_entropy_fwd

    losses, gradient = cross_entropy_fwd(logits, labels[:, 0], return_dx=True, inplace_backward=True)
    return losses.sum(), gradient


def rows_by_programs(block: int, warps: int) -> Way:
    def of_chunk(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        _row[(len(logits),)](logits, labels, losses, logits.shape[1], BLOCK=block, num_warps=warps)
        return losses.sum(), logits

    return of_chunk


@triton.jit
def _row(logits, labels, losses, words, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Loss of one row, whose logits become their gradient.

    Each place of a block keeps its own maximum and sum of exponentials, which are put together at the end.
    """
    number = tl.program_id(0).to(tl.int64)
    row = logits + number * words
    label = tl.load(labels + number)
    of_label = tl.load(row + label).to(tl.float32)
    places = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), -3.0e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, words, BLOCK):
        inside = start + places < words
        x = tl.load(row + start + places, mask=inside, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, x)
        total = total * tl.exp(top - higher) + tl.exp(x - higher)
        top = higher
    highest = tl.max(top, axis=0)
    norm = highest + tl.log(tl.sum(total * tl.exp(top - highest), axis=0))
    tl.store(losses + number, norm - of_label)
    for start in range(0, words, BLOCK):
        inside = start + places < words
        x = tl.load(row + start + places, mask=inside).to(tl.float32)
        gradient = tl.exp(x - norm) - tl.where(start + places == label, 1.0, 0.0)
        tl.store(row + start + places, gradient.to(logits.dtype.element_ty), mask=inside)


if __name__ == "__main__":
    main()
