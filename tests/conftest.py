"""Fixtures: a tiny random student with a real tokenizer, and the three scripts run as a user runs them."""

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# The processes of the tests share the cores: OpenMP threads that spin while they wait for each other there made a test
# of training take fifteen times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import upstream

# Started in the background, the tests and what they start would ignore Ctrl-C, which some of them try.
signal.signal(signal.SIGINT, signal.default_int_handler)

PROJECT = Path(__file__).resolve().parents[1]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def demo_texts() -> list[str]:
    """Text of the demo trajectories, to train the tiny tokenizer on."""
    rows = []
    for part in ("math", "code", "science"):
        with (PROJECT / "assets" / "demo" / "trajectories" / f"{part}.jsonl").open() as lines:
            rows += [turn["content"] for line in lines for turn in json.loads(line)["messages"]]
    return rows


LONG = ("tests/pipeline/", "tests/evaluation/test_sandbox_as_nobody.py")
"""Take minutes and mostly wait, or cannot be split"""


# As the scripts import (`cli.importing`): collecting garbage among a million objects that stay takes seconds.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first, so that no process is alone with one at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


def make_student(folder: Path, seed: int = 0, model_type: str = "llama", **changes: float) -> Path:
    """Write a random causal LM of about 60 thousand parameters, with tokenizer and chat template, as a checkpoint."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(demo_texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    shape = {
        "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True,
    }  # fmt: skip
    config = AutoConfig.for_model(model_type, **{**shape, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    # Larger than the usual initialisation, so that the tests' differences stand far above rounding.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folder of a tiny random Llama; do not write into it."""
    return make_student(tmp_path_factory.mktemp("student") / "tiny")


@pytest.fixture
def thinking_student(tmp_path: Path) -> Path:
    """One whose template opens the reasoning, as R1's does."""
    folder = make_student(tmp_path / "thinking")
    with (folder / "chat_template.jinja").open("a") as template:
        template.write("{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}")
    return folder


@pytest.fixture(scope="session")
def student_factory() -> Callable[..., Path]:
    """`make_student`, for tests that need another student than the tiny one."""
    return make_student


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published benchmarks' files, with made-up rows; not to be written to."""
    folder = tmp_path_factory.mktemp("data")
    for task, rows in upstream.ROWS.items():
        upstream.write(folder, task, rows())
    return folder


Script = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def script() -> Script:
    """Run `python <name>.py <overrides>` in the checkout, as a user does; returns what it printed and its exit code."""

    def run(name: str, *overrides: str, timeout: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, f"{name}.py", *overrides], cwd=PROJECT, capture_output=True, text=True, timeout=timeout,
            env={**os.environ, **env},
        )  # fmt: skip

    return run
