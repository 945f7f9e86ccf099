from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from branchmerge.data.template import Document, opening, render_prompt, tokenise
from branchmerge.evaluation.graders import final_part
from branchmerge.trajectories.schema import Message, Trajectory

RESPONSE = "<think>\n12 x 7 = 84\n</think>\n\n\\boxed{84}"
MESSAGES = (Message("system", "Be brief."), Message("user", "What is 12 x 7?"), Message("assistant", RESPONSE))
TRAJECTORY = Trajectory("t", "math", MESSAGES)


@pytest.fixture
def tokenizer(tiny_student: Path) -> PreTrainedTokenizerBase:
    """A fresh one for each test, which may change it."""
    return AutoTokenizer.from_pretrained(tiny_student)


PREFILL = "<think>\n"


def prefilled(tokenizer: PreTrainedTokenizerBase, opened: str) -> PreTrainedTokenizerBase:
    """Its template opens the reasoning."""
    opening = "<|im_start|>assistant\n"
    template = str(tokenizer.chat_template)
    tokenizer.chat_template = template.replace(f"'{opening}'", f"'{opening}{opened}'")
    assert tokenizer.chat_template != template
    return tokenizer


@pytest.fixture
def prefilling(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """As R1-Distill's does."""
    return prefilled(tokenizer, PREFILL)


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def document_of(tokenizer: PreTrainedTokenizerBase, trajectory: Trajectory) -> Document:
    (document,) = tokenise(tokenizer, [trajectory])
    return document


def test_document_is_prompt_response_and_end(tokenizer: PreTrainedTokenizerBase) -> None:
    document = document_of(tokenizer, TRAJECTORY)
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 12 x 7?"}]
    prompt = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    assert document.tokens[: document.prompt_len].tolist() == ids(tokenizer, prompt)
    assert document.tokens[document.prompt_len :].tolist() == [*ids(tokenizer, RESPONSE), tokenizer.eos_token_id]
    assert document.id == "t"


def test_prompt_ids_are_those_of_the_template_itself(tokenizer: PreTrainedTokenizerBase) -> None:
    document = document_of(tokenizer, TRAJECTORY)
    conversation = [message.as_dict() for message in TRAJECTORY.prompt]
    rendered = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)
    assert document.tokens[: document.prompt_len].tolist() == rendered["input_ids"]


def test_document_reads_as_the_conversation(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.decode(document_of(tokenizer, TRAJECTORY).tokens) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 12 x 7?<|im_end|>\n"
        f"<|im_start|>assistant\n{RESPONSE}<|im_end|>"
    )


def test_length_counts_all_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    document = document_of(tokenizer, TRAJECTORY)
    assert len(document) == len(document.tokens) == document.prompt_len + len(ids(tokenizer, RESPONSE)) + 1


def test_earlier_assistant_turns_belong_to_the_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    more = (Message("user", "And 12 x 8?"), Message("assistant", "\\boxed{96}"))
    document = document_of(tokenizer, Trajectory("t", "math", (*MESSAGES, *more)))
    assert RESPONSE in tokenizer.decode(document.tokens[: document.prompt_len])
    assert tokenizer.decode(document.tokens[document.prompt_len :]) == "\\boxed{96}<|im_end|>"


def test_reasoning_that_the_template_cuts_from_turns_is_kept(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = str(tokenizer.chat_template).replace(
        "message['content']", "message['content'].split('</think>')[-1]"
    )
    document = document_of(tokenizer, TRAJECTORY)
    assert tokenizer.decode(document.tokens[document.prompt_len :]) == f"{RESPONSE}<|im_end|>"


def test_reasoning_opened_by_the_template_is_not_opened_twice(prefilling: PreTrainedTokenizerBase) -> None:
    document = document_of(prefilling, TRAJECTORY)
    prompt = prefilling.decode(document.tokens[: document.prompt_len])
    assert prompt.endswith(f"<|im_start|>assistant\n{PREFILL}")
    assert prefilling.decode(document.tokens).count("<think>") == 1
    assert prompt + prefilling.decode(document.tokens[document.prompt_len :]) == (
        render_prompt(prefilling, TRAJECTORY.prompt) + RESPONSE.removeprefix(PREFILL) + "<|im_end|>"
    )


@pytest.mark.parametrize(
    ("opened", "response", "learned"),
    [
        (PREFILL, "<think>\nhm\n</think>\n\n1", "hm\n</think>\n\n1"),
        (PREFILL, "<think>hm</think>1", "hm</think>1"),
        (PREFILL, "\n <think>\nhm</think>1", "hm</think>1"),
        (PREFILL, "<think>\n\nhm</think>1", "\nhm</think>1"),
        ("<think>", "<think>\nhm\n</think>\n\n1", "\nhm\n</think>\n\n1"),
        (PREFILL, "hm\n</think>\n\n1", "hm\n</think>\n\n1"),  # as DeepSeek's own server gives it
        (PREFILL, "<think>\nhm", "hm"),  # cut off by the teacher: no answer
        (PREFILL, "1", "\n</think>\n\n1"),
        ("", "<think>\nhm\n</think>\n\n1", "<think>\nhm\n</think>\n\n1"),
        ("", "1", "1"),
    ],
)
def test_what_is_learned_is_graded_as_the_row_was(
    opened: str, response: str, learned: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """What a student that has learned it by heart says is stored with what the template opened."""
    if opened:
        prefilled(tokenizer, opened)
    document = document_of(tokenizer, Trajectory("t", "math", (MESSAGES[1], Message("assistant", response))))
    said = tokenizer.decode(document.tokens[document.prompt_len :])
    assert said == f"{learned}<|im_end|>"
    stored = opening(render_prompt(tokenizer, MESSAGES[1:2])) + learned
    answer = final_part(stored)
    assert (answer and answer.strip()) == (None if response == "<think>\nhm" else "1")


def test_a_response_has_one_end(tokenizer: PreTrainedTokenizerBase) -> None:
    def document(response: str) -> Document:
        return document_of(tokenizer, Trajectory("t", "math", (MESSAGES[1], Message("assistant", response))))

    for ended in ("1<|im_end|>", "1<|im_end|>\n"):
        assert tokenizer.decode(document(ended).tokens).endswith("assistant\n1<|im_end|>")
        assert not document(ended).flaw
    assert tokenizer.decode(document("1 \n").tokens).endswith("assistant\n1 \n<|im_end|>")
    assert document("By <|im_end|> it ends.").ends_early


@pytest.mark.parametrize(
    ("asked", "response", "flaw"),
    [
        ("Why <|im_end|>\n<|im_start|>assistant\n2", "1", "control_token"),  # a turn that is none
        ("Why?", "As <|im_start|>user\nso", "control_token"),
        ("Why?", "1<|endoftext|>", "control_token"),
        ("Why?", "1<|im_end|>2", "ends_early"),
        ("Why?", "<|im_end|>", "empty"),
        ("Why <think>?", "<think>\nSo <tool_call>.\n</think>\n\n1<|im_end|>", ""),
    ],
)
def test_text_is_not_taken_for_the_frame_of_a_turn(
    asked: str, response: str, flaw: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>", "<think>", "</think>"]})
    prefilled(tokenizer, PREFILL)
    document = document_of(tokenizer, Trajectory("t", "", (Message("user", asked), Message("assistant", response))))
    assert document.flaw == (flaw if response != "<|im_end|>" else "")  # the reasoning that it closes is something
    tokenizer.chat_template = str(tokenizer.chat_template).replace(PREFILL, "")
    document = document_of(tokenizer, Trajectory("t", "", (Message("user", asked), Message("assistant", response))))
    assert document.flaw == flaw


def test_templates_that_tell_the_date_tell_the_same_one_every_day(tokenizer: PreTrainedTokenizerBase) -> None:
    template = "{{ strftime_now('%d %b %Y') }}" + str(tokenizer.chat_template)
    tokenizer.chat_template = template
    assert render_prompt(tokenizer, MESSAGES[1:2]).startswith("26 Jul 2024<|im_start|>user")
