"""backend=hf: what a real model is fed, and that a sample depends on its seed and on nothing beside it."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_student
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from branchmerge.config import BackendConfig
from branchmerge.data.template import tokenise
from branchmerge.evaluation.backends.hf import SeededSampling, Transformers
from branchmerge.evaluation.requests import Request, Response, Sampling, requests_for
from branchmerge.student.backbone import load_tokenizer
from branchmerge.trajectories.schema import Message, Trajectory

QUESTIONS = ["What is 12 * 7?", "A much longer question, for another length of the prompt.", "?"]
GREEDY = Sampling(max_new_tokens=8)
DRAWN = Sampling(max_new_tokens=8, temperature=1.0, top_p=0.95)


def backend(student: Path, batch_size: int = 4) -> Transformers:
    return Transformers(BackendConfig(batch_size=batch_size, dtype="float32", device="cpu"), student)


def asked(sampling: Sampling, samples: int = 1, seed: int = 42) -> list[Request]:
    turns = [(question, (Message("user", question),)) for question in QUESTIONS]
    return requests_for("task", turns, samples, sampling, seed)


def responses(model: Transformers, requests: list[Request]) -> dict[tuple[str, int], Response]:
    found = {(r.question, r.sample): response for pairs in model.generate(requests) for r, response in pairs}
    assert len(found) == len(requests)
    return found


def edited(student: Path, folder: Path, **changes: str) -> Path:
    """A copy whose tokenizer differs: `bos` (a token that it puts in front), or its `chat_template`."""
    shutil.copytree(student, folder)
    tokenizer = load_tokenizer(folder)
    if "bos" in changes:
        bos = changes["bos"]
        tokenizer.bos_token = bos
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))]
        )
    template = str(tokenizer.chat_template)
    tokenizer.chat_template = changes.get("front", "") + template + changes.get("end", "")
    tokenizer.save_pretrained(folder)
    return folder


THINKING = {"end": "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"}


@pytest.fixture(params=["as it is", "bos in the template", "bos by the tokenizer only", "thinking"])
def student(request: pytest.FixtureRequest, tiny_student: Path, tmp_path: Path) -> Iterator[Path]:
    """The tiny student with tokenizers of several habits."""
    changes = {
        "as it is": {},
        "bos in the template": {"bos": "<|endoftext|>", "front": "{{ bos_token }}"},
        "bos by the tokenizer only": {"bos": "<|endoftext|>"},
        "thinking": THINKING,
    }
    yield edited(tiny_student, tmp_path / "student", **changes[request.param])


def test_the_model_is_fed_the_ids_it_was_trained_on(student: Path) -> None:
    model = backend(student)
    fed: list[list[int]] = []

    def watch(module: torch.nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        if not fed:
            rows = zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True)
            fed.extend(row[kept.bool()].tolist() for row, kept in rows)

    model.model.register_forward_pre_hook(watch, with_kwargs=True)
    requests = asked(GREEDY)
    responses(model, requests)
    expected = []
    for question in QUESTIONS:
        row = Trajectory("x", "math", (Message("user", question), Message("assistant", "<think>\nhm\n</think>\n\n1")))
        (document,) = tokenise(load_tokenizer(student), [row])
        expected.append(document.tokens[: document.prompt_len].tolist())
    assert sorted(fed) == sorted(expected)
    assert [model.encoder.ids(r.messages) for r in requests] == expected


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_a_response_does_not_depend_on_its_batch(tiny_student: Path, sampling: Sampling) -> None:
    requests = asked(sampling, samples=3)
    alone = responses(backend(tiny_student, batch_size=1), requests)
    assert responses(backend(tiny_student, batch_size=9), requests) == alone
    assert responses(backend(tiny_student, batch_size=2), requests[::-1]) == alone


OWN_ATTENTION: dict[str, dict[str, Any]] = {
    "gemma2": {"attn_logit_softcapping": 0.2, "query_pre_attn_scalar": 1, "head_dim": 8},  # SDPA knows no caps
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16,
        "num_key_value_heads": 4, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
    },
    "bloom": {"n_layer": 2, "n_head": 4},  # transformers lets it have no SDPA
}  # fmt: skip


@pytest.mark.parametrize("model_type", OWN_ATTENTION)
def test_responses_are_those_of_the_models_own_formula(model_type: str, tmp_path: Path) -> None:
    folder = make_student(tmp_path / model_type, model_type=model_type, **OWN_ATTENTION[model_type])
    requests = asked(GREEDY)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    model = backend(folder)
    found = responses(model, requests)
    for request in requests:
        ids = torch.tensor([model.encoder.ids(request.messages)])
        settings = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=model.ends, pad_token_id=model.pad)
        out = plain.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        expected = model.encoder.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert found[request.question, request.sample].text == expected


def test_samples_differ_by_their_seeds(tiny_student: Path) -> None:
    model = backend(tiny_student)
    one, other = (responses(model, asked(DRAWN, samples=4, seed=seed)) for seed in (1, 2))
    assert len({response.text for response in one.values()}) > 8
    assert one != other
    assert responses(model, asked(DRAWN, samples=4, seed=1)) == one


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1, 1.0),
        Sampling(1, 0.6, 0.95),
        Sampling(1, 1.3, 0.5),
        Sampling(1, 0.8, 1.0, 3),
        Sampling(1, 0.7, 0.9, 5),
    ],
)
def test_tokens_are_drawn_from_the_distribution_that_transformers_defines(sampling: Sampling) -> None:
    scores = torch.tensor([[2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -2.0, -30.0]])
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    expected = warpers(torch.zeros(1, 1, dtype=torch.long), scores.clone()).softmax(-1)[0]
    draws, rounds = 500, 20
    processor = SeededSampling(sampling, range(draws))
    counts: Counter[int] = Counter()
    for _ in range(rounds):
        chosen = processor(torch.zeros(draws, 1, dtype=torch.long), scores.expand(draws, -1))
        assert (chosen > -torch.inf).sum(-1).eq(1).all()
        counts.update(chosen.argmax(-1).tolist())
    n = draws * rounds
    for token, p in enumerate(expected.tolist()):
        assert abs(counts[token] / n - p) <= 5 * (p * (1 - p) / n) ** 0.5 + 1e-9
        assert p > 0 or counts[token] == 0


def test_responses_begin_with_the_reasoning_that_the_template_opened(tiny_student: Path, tmp_path: Path) -> None:
    thinking = edited(tiny_student, tmp_path / "thinking", **THINKING)
    assert all(
        response.text.startswith("<think>\n") for response in responses(backend(thinking), asked(GREEDY)).values()
    )
    bare = responses(backend(tiny_student), asked(GREEDY)).values()
    assert not any(response.text.startswith("<think>\n") for response in bare)


def test_tokens_are_counted_as_generated_and_a_cut_is_told(tiny_student: Path) -> None:
    for response in responses(backend(tiny_student), asked(GREEDY)).values():
        assert response.tokens == 8 if response.finish == "length" else response.tokens <= 8


def test_a_text_that_ends_a_response_is_not_part_of_it(tiny_student: Path) -> None:
    model = backend(tiny_student)
    (request, *_) = asked(replace(GREEDY, max_new_tokens=40))
    ((_, whole),) = next(iter(model.generate([request])))
    end = whole.text[len(whole.text) // 2 :][:3]
    stopped = replace(request, sampling=replace(request.sampling, until=(end,)))
    ((_, part),) = next(iter(model.generate([stopped])))
    assert part.text == whole.text[: whole.text.index(end)]
    assert part.finish == "stop" and part.tokens < whole.tokens


@pytest.mark.parametrize("pad", ["<|endoftext|>", "<|im_end|>"])  # a token of its own, and one that ends responses
def test_a_response_that_a_text_ended_is_counted_without_the_padding_of_its_batch(
    tiny_student: Path, tmp_path: Path, pad: str
) -> None:
    folder = shutil.copytree(tiny_student, tmp_path / "student")
    tokenizer = load_tokenizer(folder)
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(folder)
    requests = asked(replace(DRAWN, max_new_tokens=60, until=("e", "t")), samples=3)
    alone = responses(backend(folder, batch_size=1), requests)
    assert len({response.tokens for response in alone.values()}) > 2
    assert responses(backend(folder, batch_size=9), requests) == alone


def test_a_models_own_generation_config_only_says_where_it_ends(tiny_student: Path, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    shutil.copytree(tiny_student, folder)
    path = folder / "generation_config.json"
    own = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(own | {"repetition_penalty": 5.0, "top_k": 1, "do_sample": True, "temperature": 0.01}))
    for sampling in (GREEDY, DRAWN):
        requests = asked(sampling)
        assert responses(backend(folder), requests) == responses(backend(tiny_student), requests)
