"""Generate with transformers: batches of prompts of similar length, each row drawn with a seed of its own."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from branchmerge import machine
from branchmerge.config import BackendConfig
from branchmerge.errors import UserError
from branchmerge.evaluation.decode_attention import DECODE_SDPA
from branchmerge.evaluation.encoding import Encoder
from branchmerge.evaluation.requests import Request, Response, Sampling
from branchmerge.student.backbone import load_model, loading

Pairs = list[tuple[Request, Response]]


def dtype_of(backend: BackendConfig) -> str:
    """float32 or bfloat16; `auto` is bfloat16 if the device is faster at it."""
    if backend.dtype != "auto":
        return backend.dtype
    return "bfloat16" if machine.computes_bf16(machine.device_of(backend.device)) else "float32"


class SeededSampling(LogitsProcessor):
    """Leaves each row one token, drawn from its warped distribution by the row's own generator.

    transformers draws a whole batch from one generator, so that a sample would depend on the others. Greedy search on
    the output of this processor is sampling: the token at which the cumulative probability passes a uniform random
    number.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
        if sampling.top_k:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V] -> [B, V], minus infinity for all tokens but one."""
        warped = self.warpers(input_ids, scores.float())  # type: ignore[arg-type]
        cumulated = warped.double().softmax(dim=-1).cumsum(dim=-1)
        uniform = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in self.generators])
        # Rounding may leave the last sum below 1.
        reached = torch.searchsorted(cumulated, uniform.to(cumulated.device) * cumulated[:, -1:], right=True)
        chosen = reached.clamp_max(scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def _choose_attention(model: PreTrainedModel, device: torch.device) -> None:
    """Use the fastest attention that computes the model exactly; a model without SDPA keeps transformers' choice."""
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")  # SDPA would silently ignore the caps of scores
    elif device.type == "cpu" and model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        model.set_attn_implementation(DECODE_SDPA)


def _check_numbers(model: PreTrainedModel, folder: Path) -> None:
    """Refuse weights that are NaN or infinite: every answer would be the first token, the argmax of NaN logits."""
    for name, weight in model.named_parameters():
        if weight.dtype.itemsize > 1 and not weight.isfinite().all():  # codes of quantised weights are always finite
            raise UserError(f"{folder}: the tensor {name} holds NaN or infinity; that model is broken")


class Transformers:
    """A checkpoint that generates in this process."""

    def __init__(self, backend: BackendConfig, folder: Path) -> None:
        device = machine.device_of(backend.device)
        self.batch_size = backend.batch_size
        self.failures: list[str] = []  # always empty: an error in this process ends the run
        self.encoder = Encoder(folder)
        with loading(folder):
            self.model = cast(Any, load_model(folder, getattr(torch, dtype_of(backend)), None))
        _choose_attention(self.model, device)
        self.model.to(device).eval()
        _check_numbers(self.model, folder)
        told = self.model.generation_config.eos_token_id
        ends = [*(told if isinstance(told, list) else [told]), self.encoder.tokenizer.eos_token_id]
        self.ends = [token for token in dict.fromkeys(ends) if token is not None]
        """Tokens that end a response: those of the checkpoint's generation config, and the tokenizer's own"""
        pad = self.encoder.tokenizer.pad_token_id
        self.pad = pad if pad is not None else self.ends[0]
        # Penalties or a top_k of that config must not apply: a request states all sampling parameters.
        self.model.generation_config = GenerationConfig()

    def close(self) -> None:
        """Give the model's memory back."""
        del self.model

    def generate(self, requests: Sequence[Request]) -> Iterator[Pairs]:
        """Yield responses, a batch at a time, longest prompts first, so that memory runs out at once or not at all."""
        ordered = sorted(
            requests, key=lambda request: (str(request.sampling), -len(self.encoder.ids(request.messages)))
        )
        for sampling, group in groupby(ordered, key=lambda request: request.sampling):
            members = list(group)
            for start in range(0, len(members), self.batch_size):
                yield self._batch(members[start : start + self.batch_size], sampling)

    @torch.inference_mode()
    def _batch(self, requests: Sequence[Request], sampling: Sampling) -> Pairs:
        rows = [self.encoder.ids(request.messages) for request in requests]
        T = max(map(len, rows))
        tokens = torch.tensor([[self.pad] * (T - len(row)) + row for row in rows], device=self.model.device)
        kept = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows], device=self.model.device)
        processors = LogitsProcessorList()
        if sampling.temperature > 0:
            processors.append(SeededSampling(sampling, [request.seed for request in requests]))
        settings = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens, do_sample=False, eos_token_id=self.ends, pad_token_id=self.pad
        )
        stop = {"stop_strings": list(sampling.until), "tokenizer": self.encoder.tokenizer} if sampling.until else {}
        out = self.model.generate(
            tokens, attention_mask=kept, generation_config=settings, logits_processor=processors, **stop
        )
        return [
            (request, self._response(request, row, sampling))
            for request, row in zip(requests, out[:, T:].tolist(), strict=True)
        ]

    def _response(self, request: Request, tokens: list[int], sampling: Sampling) -> Response:
        end = next((n for n, token in enumerate(tokens) if token in self.ends), None)
        if end is not None:
            tokens = tokens[: end + 1]
        text = str(self.encoder.tokenizer.decode(tokens, skip_special_tokens=True))
        cut = min((place for place in map(text.find, sampling.until) if place >= 0), default=None)
        stopped = end is not None or cut is not None
        # A row that one of those texts ended is padded while longer ones go on; it never ends with such a token itself.
        while cut is not None and tokens[-1:] == [self.pad]:
            tokens.pop()
        text = self.encoder.opening(request.messages) + text[:cut]
        return Response(text, len(tokens), "stop" if stopped else "length")
