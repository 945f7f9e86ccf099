"""Simulate one training step with fake tensors, which have sizes and no contents, to predict its memory.

The step runs the code of a training: `sharding.shard`, `PackedLoss`, gradient clipping, AdamW. One process stands for
all, by torch's "fake" process group; therefore the simulation is a separate program:

    echo '[{"shape": {...}, "world": 32, "seq_len": 16384}]' | python -m branchmerge.student.simulation

prints a line of JSON for each setting. The fake tensors are on the CPU, as a torch without CUDA supports no other
device, but attention and the chunks of the loss are chosen by `Setting.gpu`. Not simulated: torch.compile (which needs
less memory), streams, gaps in the allocator, and with `cpu_offload` a layer's share on its way to the GPU.

Shapes: H heads, G key/value heads, T tokens, E head size.
"""

import gc
import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.optim import AdamW
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, PreTrainedModel

from branchmerge.data.batch import Batch
from branchmerge.errors import UserError
from branchmerge.student import attention, chunked_loss
from branchmerge.student.context_parallel import ContextGroup
from branchmerge.student.flops import Shapes
from branchmerge.student.forecast import KINDS, SHARES, Memory, Setting
from branchmerge.student.loss import PackedLoss
from branchmerge.student.memory_log import MemoryLog, Piece, peak
from branchmerge.student.sharding import Sharding, check_shardable, give_memory, layers, shard
from branchmerge.student.stored import empty_model

FEW, MORE = 4, 6
"""Numbers of layers of the two models from which a deeper one is extrapolated"""
Span = dict[str, int]
"""Bytes of each kind of memory at the peak of one part of the step"""


def simulate(setting: Setting, whole: bool = False) -> Memory:
    """The memory of a step.

    If all layers have the same shapes, memory at any moment of a step is linear in their number. So a deep model is
    extrapolated from the peaks of two shallow ones, separately for each part of the step.

    Args:
        whole: simulate all layers, without extrapolation
    """
    model = _model(setting)
    depth = len(layers(model))
    alike = len({tuple(p.shape for p in layer.parameters()) for layer in layers(model)}) == 1
    if whole or depth <= MORE or not alike:
        spans, shares = _spans(setting, model)
    else:
        few, more = (_spans(setting, _model(setting, count)) for count in (FEW, MORE))
        spans = [_extrapolate(a, b, depth) for a, b in zip(few[0], more[0], strict=True)]
        shares = _extrapolate(few[1], more[1], depth)
    elsewhere = SHARES if setting.cpu_offload else ()
    here = [{kind: span.get(kind, 0) for kind in KINDS if kind not in elsewhere} for span in spans]
    most = max(here, key=lambda span: sum(span.values()))
    work = Shapes.of(model)
    return Memory(
        **{**dict.fromkeys(KINDS, 0), **most},
        shares=shares,
        parameters=sum(p.numel() for p in model.parameters()),
        work=asdict(work) if work else {},
    )


def _extrapolate(few: Span, more: Span, depth: int) -> Span:
    """Extrapolate linearly from FEW and MORE layers to `depth`."""
    kinds = sorted({*few, *more})
    steps = (depth - FEW) / (MORE - FEW)
    return {kind: round(few.get(kind, 0) + steps * (more.get(kind, 0) - few.get(kind, 0))) for kind in kinds}


def _model(setting: Setting, depth: int | None = None) -> PreTrainedModel:
    """The model on the meta device; with only `depth` of its layers if that is given."""
    shape = dict(setting.shape)
    if depth is not None:
        shape["num_hidden_layers"] = depth
        if shape.get("layer_types"):
            shape["layer_types"] = shape["layer_types"][:depth]
    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.for_model(**shape).save_pretrained(folder)
        model = empty_model(Path(folder), attention.PACKED_SDPA)
    if setting.checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    return model


def _spans(setting: Setting, model: PreTrainedModel) -> tuple[list[Span], Span]:
    """The peaks of the parts of a step, and the bytes of weights, gradients and moments on a device."""
    chunked_loss.CHUNK = chunked_loss.DEVICE_CHUNK if setting.gpu else CPU_CHUNK
    replaced: Any = attention  # chooses by device, and fake tensors are on the CPU
    replaced._attend = _as_on_a_gpu if setting.gpu else _as_on_a_cpu
    products: Any = nullcontext()
    if setting.sharded:
        dist.init_process_group("fake", rank=0, world_size=setting.world, store=FakeStore())
    packed = PackedLoss(model, ContextGroup.join(setting.context))
    if setting.sharded:
        check_shardable(model)
        compute = torch.bfloat16 if setting.bf16 else torch.float32
        sharding = Sharding(compute, setting.replicate, setting.cpu_offload)
        shard(packed, model, sharding, sharding.mesh("cpu", setting.world))
    elif setting.bf16:
        products = torch.autocast("cpu", torch.bfloat16)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), MemoryLog() as log:
            return _step(setting, packed, products, log)
    finally:
        if setting.sharded:
            dist.destroy_process_group()


CPU_CHUNK = chunked_loss.CHUNK


def _step(setting: Setting, packed: PackedLoss, products: Any, log: MemoryLog) -> tuple[list[Span], Span]:
    """Simulate the last row of a later step, when AdamW's moments and gradients of earlier rows take memory."""
    give_memory(packed.model, torch.device("cpu"))
    parameters = list(packed.parameters())
    optimizer = AdamW(parameters, lr=1e-5, fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    _update(parameters, optimizer)  # so that DTensor has inferred the shapes, for which it makes whole tensors
    of = {
        "weights": log.pieces([*parameters, *packed.buffers()]),
        "optimizer": log.pieces(t for state in optimizer.state.values() for t in state.values()),
    }
    if setting.rows == 1:
        optimizer.zero_grad()
    of["gradients"] = log.pieces(p.grad for p in parameters if p.grad is not None)
    batch = _row(setting.seq_len)
    marks: list[int] = []
    _watch(packed.model, log, marks)
    log.begin(set().union(*of.values()))

    log.phase = "activations"
    with products:
        loss = packed(batch)
    (loss / setting.seq_len).backward()
    begins, ends = marks[-1], len(log.events)
    marks += [
        (begins + ends) // 2,
        ends,
    ]  # a span for each end of the backward pass: its peak is at one of them
    of["gradients"] |= log.pieces(p.grad for p in parameters if p.grad is not None)
    _update(parameters, optimizer)
    marks.append(len(log.events))

    kinds = {piece: kind for kind, pieces in of.items() for piece in pieces}
    spans = peak(log.events, marks, _kind_of(kinds), SHARES if setting.cpu_offload else ())
    return spans, {kind: sum(piece.size for piece in of[kind]) for kind in SHARES}


def _update(parameters: list[nn.Parameter], optimizer: AdamW) -> None:
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def _kind_of(known: dict[Piece, str]) -> Callable[[Piece], str]:
    def kind(piece: Piece) -> str:
        if piece in known:
            return known[piece]
        return "gathered" if piece.gathered and piece.phase != "logits" else piece.phase

    return kind


def _watch(model: PreTrainedModel, log: MemoryLog, marks: list[int]) -> None:
    """Attribute memory to the logits from the last layer's output to the return of its gradient."""

    def loss_begins(_: nn.Module, __: Any, output: Any) -> None:
        marks.append(len(log.events))
        log.phase = "logits"
        output.last_hidden_state.register_hook(loss_ends)

    def loss_ends(_: Tensor) -> None:
        marks.append(len(log.events))
        log.phase = "activations"

    model.base_model.register_forward_hook(loss_begins)


def _row(tokens: int) -> Batch:
    """A row of one document whose tokens are all learned; memory does not depend on the number of documents."""
    ids = torch.zeros((1, tokens), dtype=torch.int64)
    bounds = torch.zeros(2, dtype=torch.int32)
    return Batch(ids, ids.clone(), torch.arange(tokens), ids.clone(), bounds, (tokens,), tokens, [])


def _as_on_a_gpu(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None, **_: Any
) -> Tensor:
    """FlashAttention, as on a GPU; it saves its result, and one number for each head and token.

    [1, H, T, E] and [1, G, T, E] -> [1, T, H, E].
    """
    return attention._varlen(query, key, value, bounds, longest, scale, window=None)


def _as_on_a_cpu(query: Tensor, key: Tensor, value: Tensor, scale: float | None, **_: Any) -> Tensor:
    """SDPA of one document, as on a CPU."""
    grouped = key.shape[1] != query.shape[1]
    attend = partial(scaled_dot_product_attention, is_causal=True, scale=scale, enable_gqa=grouped)
    return torch.cat([attention._document(attend, query, key, value)], dim=2).transpose(1, 2).contiguous()


def _answer(setting: Setting) -> dict[str, Any]:
    """The memory of a step, or the error: some kinds of models cannot be simulated."""
    try:
        return asdict(simulate(setting))
    except Exception as error:
        traceback.print_exc()
        said = " ".join(str(error).split())
        return {"error": said if isinstance(error, UserError) else f"{type(error).__name__}: {said}"}


if __name__ == "__main__":
    for asked in json.load(sys.stdin):
        print(json.dumps(_answer(Setting(**asked))), flush=True)
    gc.freeze()  # as in `cli.run`
