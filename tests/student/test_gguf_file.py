"""Students that come in a GGUF file."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from branches import branch
from transformers import AutoModelForCausalLM, AutoTokenizer

from branchmerge.student import gguf_file
from branchmerge.student.backbone import import_gguf, load_model, load_tokenizer

HIDDEN, INNER, LAYERS, HEADS, PAIRS = 64, 96, 2, 4, 2
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefgh", "ab", "cd", "abcd"]
MERGES = ["a b", "c d", "ab cd"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
Q4_1, F32 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.F32


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A package of Python, tmp_path/carrier, with a tiny Llama in a GGUF file."""
    folder = tmp_path / "carrier"
    folder.mkdir()
    (folder / "__init__.py").touch()
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(PAIRS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, shape in shapes().items():
        values = np.random.default_rng(len(name)).normal(size=shape).astype(np.float32)
        kind = F32 if len(shape) == 1 else Q4_1
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "tiny.gguf"


def shapes() -> dict[str, tuple[int, ...]]:
    """Of the weights, by their names in GGUF."""
    of_layer = {
        "attn_norm": (HIDDEN,), "attn_q": (HIDDEN, HIDDEN), "attn_k": (HIDDEN // 2, HIDDEN),
        "attn_v": (HIDDEN // 2, HIDDEN), "attn_output": (HIDDEN, HIDDEN), "ffn_norm": (HIDDEN,),
        "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER),
    }  # fmt: skip
    layers = {f"blk.{layer}.{name}.weight": shape for layer in range(LAYERS) for name, shape in of_layer.items()}
    return {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,), **layers}


def test_the_checkpoint_is_what_transformers_reads_from_the_file(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    gguf_file.convert(file, out)
    expected = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    weights = load_model(out, torch.float32).state_dict()
    assert weights.keys() == expected.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for path in (tmp_path / "tokenizer").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert load_tokenizer(out)("abcd")["input_ids"] == [TOKENS.index("abcd")]


def test_the_file_is_read_once_and_the_table_of_names_made_once(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, tables = [], []
    table_of = gguf.get_tensor_name_map

    class Counted(gguf_file.PlainReader):
        def __init__(self, path: str) -> None:
            reads.append(path)
            super().__init__(path)

    def counted(*given: Any) -> gguf.TensorNameMap:
        tables.append(given)
        return table_of(*given)

    monkeypatch.setattr(gguf_file, "PlainReader", Counted)
    monkeypatch.setattr(gguf, "get_tensor_name_map", counted)
    gguf_file.convert(file, tmp_path / "out")
    assert len(reads) == len(tables) == 1
    assert gguf.get_tensor_name_map is counted


def test_the_library_is_as_it_was_after_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    usual = gguf.GGUFReader, gguf.get_tensor_name_map
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(Exception, match=r"."):
        gguf_file.convert(tmp_path / "broken.gguf", tmp_path / "out")
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == usual


def test_the_plain_reader_finds_what_the_usual_one_finds(file: Path) -> None:
    plain, usual = gguf_file.PlainReader(file), gguf.GGUFReader(file)
    assert type(plain.tensors[0].data) is type(plain.fields["tokenizer.ggml.tokens"].parts[-1]) is np.ndarray
    assert plain.fields.keys() == usual.fields.keys()
    for name, field in plain.fields.items():
        assert field.contents() == usual.fields[name].contents()
    for mine, theirs in zip(plain.tensors, usual.tensors, strict=True):
        assert (mine.name, mine.tensor_type) == (theirs.name, theirs.tensor_type)
        assert np.array_equal(mine.data, theirs.data)


def test_a_student_is_taken_out_of_its_package_once_and_the_wait_is_told_before(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    config = branch(file, tmp_path / "outputs")
    convert, said = gguf_file.convert, []
    monkeypatch.setattr(gguf_file, "convert", lambda *paths: (said.append(capsys.readouterr().out), convert(*paths)))
    folder = import_gguf(config, "carrier")
    assert said == [f"{folder}: taking the model out of carrier's tiny.gguf, once\n"]
    assert import_gguf(config, "carrier") == folder
    assert len(said) == 1
    assert capsys.readouterr().out == ""
