"""Vocabularies that differ: refused with the reason, padded or cut on demand; and matrices that are stored twice."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from branchmerge.errors import UserError
from branchmerge.merge import Recipe, merge, merge_all, recipe_file
from branchmerge.merge.checkpoint import Reader
from branchmerge.merge.operators import make_operator
from branchmerge.merge.tree import parse
from branchmerge.merge.vocabulary import unify
from branchmerge.study import read_manifest

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
ABC = ["a", "b", "c", "d"]
Weights = dict[str, Tensor]


def model(folder: Path, value: float, rows: int, tokens: Sequence[str] = ABC, head: bool = True, **config: Any) -> Path:
    """A checkpoint whose rows are value + their number; `tokens` are its tokenizer's."""
    folder.mkdir(parents=True)
    matrix = (value + torch.arange(float(rows)))[:, None].repeat(1, 3)
    weights = {EMBED: matrix, NORM: torch.full((3,), float(value))} | ({HEAD: 2 * matrix} if head else {})
    save_file(weights, folder / "model.safetensors")
    whole = {"model_type": "llama", "vocab_size": rows, "tie_word_embeddings": not head, "eos_token_id": 3, **config}
    (folder / "config.json").write_text(json.dumps(whole))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def merged(
    out: Path, vocab: str, base: Path | None = None, operator: str = "linear", shard: int = 1 << 20, **folders: Path
) -> Path:
    tree = parse(list(folders))
    made = make_operator(operator, {})
    return merge(Recipe(operator, made, tree, folders, out, base, shard, progress=False, vocab=vocab))


def rows_of(folder: Path, name: str = EMBED) -> list[float]:
    return load_file(folder / "model.safetensors")[name][:, 0].tolist()


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def said(**folders: Path) -> str:
    out = next(iter(folders.values())).parent / "refused"
    with pytest.raises(UserError) as raised:
        merged(out, "same", **folders)
    assert not out.exists() and "\n" not in str(raised.value)
    return str(raised.value)


def test_padding_is_told_from_tokens(tmp_path: Path) -> None:
    a, b = model(tmp_path / "a", 0, 4), model(tmp_path / "b", 10, 8)
    for first, second, rows in (({"a": a}, {"b": b}, "4 and 8"), ({"b": b}, {"a": a}, "8 and 4")):
        text = said(**first, **second)
        assert f"their tokenizers are the same, but the embedding of b has 4 more rows ({rows})" in text
        assert "vocab=pad" in text and "vocab=intersect" in text


@pytest.mark.parametrize("rows", [5, 8])
def test_more_tokens_are_counted_and_named(tmp_path: Path, rows: int) -> None:
    a, b = model(tmp_path / "a", 0, 8), model(tmp_path / "b", 10, rows, [*ABC, "e"])
    text = said(a=a, b=b)
    assert "0 of 4 tokens are in a only, 1 of 5 in b only; the first is 'e' with id 4" in text
    assert "vocab=pad" in text and "vocab=intersect" in text


@pytest.mark.parametrize(
    ("tokens", "why"),
    [
        (["a", "c", "b", "d"], "id 1 is token 'b' in a and 'c' in b; 2 of 4 tokens are in a only, 2 of 4 in b only"),
        (["a", "b", "c", "x", "e"], "id 3 is token 'd' in a and 'x' in b"),
    ],
)
def test_ids_with_two_meanings_are_refused_whatever_is_asked_for(tmp_path: Path, tokens: list[str], why: str) -> None:
    folders = {"a": model(tmp_path / "a", 0, 8), "b": model(tmp_path / "b", 10, 8, tokens)}
    text = said(**folders)
    assert why in text and "vocab=" not in text
    for vocab in ("pad", "intersect"):
        with pytest.raises(UserError, match=f"vocab={vocab}: their vocabularies differ"):
            merged(tmp_path / vocab, vocab, **folders)


def test_ids_with_two_meanings_are_found_between_any_two(tmp_path: Path) -> None:
    """The first model knows neither."""
    folders = {name: model(tmp_path / name, 1, 5 if more else 4, [*ABC, *more]) for name, more in
               (("x", []), ("y", ["foo"]), ("z", ["bar"]))}  # fmt: skip
    for vocab in ("pad", "intersect"):
        with pytest.raises(UserError, match="id 4 is token 'foo' in y and 'bar' in z"):
            merged(tmp_path / "out", vocab, **folders)


def test_a_token_with_two_ids_is_refused(tmp_path: Path) -> None:
    """No id has two meanings here: the token has moved to one that the other model does not know."""
    a, b = model(tmp_path / "a", 0, 8), model(tmp_path / "b", 10, 8)
    moved = {"model": {"type": "BPE", "vocab": {"b": 1, "c": 2, "d": 3, "a": 4}, "merges": []}}
    (b / "tokenizer.json").write_text(json.dumps(moved))
    assert "token 'a' has id 0 in a and 4 in b" in said(a=a, b=b)
    for vocab in ("pad", "intersect"):
        with pytest.raises(UserError, match="token 'a' has id 0 in a and 4 in b"):
            merged(tmp_path / vocab, vocab, a=a, b=b)


def test_ids_that_are_left_out_are_no_end(tmp_path: Path) -> None:
    """Added tokens may begin beyond the last one of the model's own; what lies between is padding."""
    a, b = model(tmp_path / "a", 0, 8), model(tmp_path / "b", 10, 8)
    tokenizer = json.loads((a / "tokenizer.json").read_text())
    (a / "tokenizer.json").write_text(json.dumps({**tokenizer, "added_tokens": [{"id": 6, "content": "<new>"}]}))
    out = merged(tmp_path / "out", "pad", b=b, a=a)
    assert rows_of(out)[6] == 6.0  # of a alone, which knows it
    assert (out / "tokenizer.json").read_bytes() == (a / "tokenizer.json").read_bytes()


def test_the_ids_of_special_tokens_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    special = {"bos_token_id": 1, "eos_token_id": 4, "pad_token_id": 2}
    a = model(tmp_path / "a", 0, 4, bos_token_id=0, pad_token_id=3)
    b = model(tmp_path / "b", 10, 5, [*ABC, "e"], **special)
    out = config_of(merged(tmp_path / "out", "pad", a=a, b=b))
    assert {key: out[key] for key in special} == special


def test_a_language_model_inside_another_config_is_padded_too(tmp_path: Path) -> None:
    a, b = model(tmp_path / "a", 0, 4), model(tmp_path / "b", 10, 6)
    for folder in (a, b):
        inner = config_of(folder)
        (folder / "config.json").write_text(json.dumps({"model_type": inner["model_type"], "text_config": inner}))
    out = merged(tmp_path / "out", "pad", a=a, b=b)
    assert rows_of(out) == [5, 6, 7, 8, 14, 15]
    assert (config_of(out)["text_config"]["vocab_size"], config_of(out).keys()) == (6, config_of(a).keys())


def test_padding_takes_rows_from_the_first_model_that_has_them(tmp_path: Path) -> None:
    a, b, c = (model(tmp_path / name, value, rows) for name, value, rows in (("a", 0, 4), ("b", 10, 6), ("c", 40, 8)))
    out = merged(tmp_path / "out", "pad", a=a, b=b, c=c)
    # Rows 0-3 of all; 4-5 of b, which a takes over, and c; 6-7 of c alone.
    own = [(i + 10 + i + 40 + i) / 3 for i in range(4)] + [(2 * (10 + i) + 40 + i) / 3 for i in (4, 5)] + [46, 47]
    assert rows_of(out) == pytest.approx(own)
    assert rows_of(out, HEAD) == pytest.approx([2 * value for value in own])
    assert config_of(out) == {**config_of(a), "vocab_size": 8}
    turned = merged(tmp_path / "turned", "pad", c=c, b=b, a=a)
    assert rows_of(turned)[4:] == pytest.approx([(2 * (40 + i) + 10 + i) / 3 for i in (4, 5)] + [46, 47])
    assert load_file(out / "model.safetensors")[NORM].tolist() == pytest.approx([50 / 3] * 3)


def test_intersection_keeps_the_rows_that_all_have(tmp_path: Path) -> None:
    a, b = model(tmp_path / "a", 0, 8), model(tmp_path / "b", 10, 6)
    out = merged(tmp_path / "out", "intersect", a=a, b=b)
    assert rows_of(out) == [5, 6, 7, 8, 9, 10]
    assert config_of(out)["vocab_size"] == 6


def test_a_token_that_is_padding_elsewhere_is_taken_from_who_knows_it(tmp_path: Path) -> None:
    a = model(tmp_path / "a", 0, 8)
    b = model(tmp_path / "b", 10, 6, [*ABC, "e"], eos_token_id=4)
    padded = merged(tmp_path / "padded", "pad", a=a, b=b)
    # Row 4 is b's token e; row 5 is padding of both, rows 6 and 7 padding of a.
    assert rows_of(padded) == [5, 6, 7, 8, 14, 10, 6, 7]
    assert (padded / "tokenizer.json").read_bytes() == (b / "tokenizer.json").read_bytes()
    assert (config_of(padded)["vocab_size"], config_of(padded)["eos_token_id"]) == (8, 4)
    cut = merged(tmp_path / "cut", "intersect", b=b, a=a)
    assert rows_of(cut) == [5, 6, 7, 8]
    assert (cut / "tokenizer.json").read_bytes() == (a / "tokenizer.json").read_bytes()
    assert (config_of(cut)["vocab_size"], config_of(cut)["eos_token_id"]) == (4, 3)


def test_the_backbones_rows_are_adapted_too(tmp_path: Path) -> None:
    a, b, base = model(tmp_path / "a", 1, 6), model(tmp_path / "b", 2, 4), model(tmp_path / "base", 0, 4)
    out = merged(tmp_path / "out", "pad", base, "task_arithmetic", a=a, b=b)
    # Task vectors are 1 and 2 where all have rows; where only a has one, all agree on it.
    assert rows_of(out) == [3, 4, 5, 6, 5, 6]
    cut = merged(tmp_path / "cut", "intersect", base, "task_arithmetic", a=a, b=b)
    assert rows_of(cut) == [3, 4, 5, 6]


@pytest.mark.parametrize("vocab", ["pad", "intersect"])
def test_equal_vocabularies_are_not_touched(tmp_path: Path, vocab: str) -> None:
    folders = {name: model(tmp_path / name, value, 6) for name, value in (("a", 0.0), ("b", 1.0))}
    with Reader(folders["a"]) as a, Reader(folders["b"]) as b:
        assert unify({"a": a, "b": b}, vocab) == ({"a": a, "b": b}, folders["a"], 6)
    same, other = (merged(tmp_path / way, way, **folders) for way in ("same", vocab))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (same / name).read_bytes() == (other / name).read_bytes()


def test_a_cut_is_a_view_and_a_padding_is_made_once(tmp_path: Path) -> None:
    with Reader(model(tmp_path / "a", 0, 8)) as a, Reader(model(tmp_path / "b", 1, 6)) as b:
        cut = unify({"a": a, "b": b}, "intersect")[0]["a"]
        assert np.shares_memory(cut.read(EMBED), a.read(EMBED))
        padded = unify({"a": a, "b": b}, "pad")[0]["b"]
        made = padded.read(EMBED)
        assert padded.read(EMBED) is made
        padded.release(EMBED)  # an embedding takes gigabytes
        assert padded.read(EMBED) is not made and np.array_equal(padded.read(EMBED), made)
        assert np.shares_memory(padded.read(NORM), b.read(NORM))


def test_the_choice_is_part_of_what_was_done(tmp_path: Path) -> None:
    folders = {"a": model(tmp_path / "a", 0, 4), "b": model(tmp_path / "b", 1, 8)}
    out = merged(tmp_path / "out", "pad", **folders)
    manifest = read_manifest(out)
    assert manifest is not None and manifest.work["vocab"] == "pad"
    with pytest.raises(UserError, match='vocab: "pad" there, "intersect" now'):
        merged(out, "intersect", **folders)
    same = read_manifest(merged(tmp_path / "same", "same", a=folders["a"], b=model(tmp_path / "c", 2, 4)))
    assert same is not None and "vocab" not in same.work


def test_a_recipe_file_keeps_the_choice(tmp_path: Path) -> None:
    out = merged(tmp_path / "out", "pad", a=model(tmp_path / "a", 0, 4), b=model(tmp_path / "b", 1, 8))
    again = merge(recipe_file.load(out / recipe_file.NAME, tmp_path / "again", progress=False))
    for name in ("model.safetensors", "config.json", "tokenizer.json", recipe_file.NAME):
        assert (again / name).read_bytes() == (out / name).read_bytes()


def test_a_sweep_over_orders_pads_each_by_its_own(tmp_path: Path) -> None:
    folders = {name: model(tmp_path / name, v, rows) for name, v, rows in (("a", 0, 4), ("b", 10, 6), ("c", 40, 6))}
    operator = make_operator("linear", {})
    trees = (["a", "b", "c"], ["a", "c", "b"])
    recipes = [
        Recipe("linear", operator, parse(tree), folders, tmp_path / "".join(tree), progress=False, vocab="pad")
        for tree in trees
    ]
    one, other = merge_all(recipes)
    assert rows_of(one)[4] == pytest.approx((14 + 14 + 44) / 3)
    assert rows_of(other)[4] == pytest.approx((44 + 44 + 14) / 3)


@pytest.mark.parametrize("vocab", ["pad", "intersect"])
def test_rows_without_a_tokenizer_are_not_matched(tmp_path: Path, vocab: str) -> None:
    folders = {"a": model(tmp_path / "a", 0, 4), "b": model(tmp_path / "b", 1, 8)}
    (folders["b"] / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"b has no tokenizer\.json"):
        merged(tmp_path / "out", vocab, **folders)
    assert "have 4 and 8 entries" in said(**folders)


def test_a_tokenizer_larger_than_its_model_is_refused(tmp_path: Path) -> None:
    folders = {"a": model(tmp_path / "a", 0, 4), "b": model(tmp_path / "b", 1, 4, [*ABC, "e"])}
    with pytest.raises(UserError, match="has 5 tokens, its model only 4"):
        merged(tmp_path / "out", "pad", **folders)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"model": {"vocab": 3}}'])
def test_a_broken_tokenizer_is_named(tmp_path: Path, text: str) -> None:
    folders = {"a": model(tmp_path / "a", 0, 4), "b": model(tmp_path / "b", 1, 4)}
    (folders["b"] / "tokenizer.json").write_text(text)
    assert f"{folders['b'] / 'tokenizer.json'}: not a tokenizer" in said(**folders)


def test_a_broken_row_that_was_taken_over_names_its_owner(tmp_path: Path) -> None:
    folders = {"a": model(tmp_path / "a", 0, 4), "b": model(tmp_path / "b", 1, 8)}
    weights = load_file(folders["b"] / "model.safetensors")
    weights[EMBED][6, 0] = float("nan")
    save_file(weights, folders["b"] / "model.safetensors")
    with pytest.raises(UserError, match=rf"^{folders['b']}: the tensor {EMBED} holds NaN"):
        merged(tmp_path / "out", "pad", **folders)


@pytest.mark.parametrize(("vocab", "size"), [("pad", 544), ("intersect", 512)])
def test_a_padded_student_merges_loads_and_speaks(
    tiny_student: Path, student_factory: Any, tmp_path: Path, vocab: str, size: int
) -> None:
    other = student_factory(tmp_path / "other", seed=3, vocab_size=544)
    out = merged(tmp_path / "out", vocab, operator="arcee_fusion", left=tiny_student, right=other)
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert loaded.get_input_embeddings().weight.shape[0] == loaded.config.vocab_size == size
    ids = tokenizer("What is 12 * 7?", return_tensors="pt")["input_ids"]
    assert loaded(ids).logits.shape[-1] == size


def twice(folder: Path, factor: float = 1.0, rows: int | None = None) -> Path:
    """Store the tied embedding as lm_head too, as some trainers do."""
    weights = load_file(folder / "model.safetensors")
    weights[HEAD] = factor * weights[EMBED][:rows].clone()
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("flag", [True, None], ids=["said", "by default"])
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_tied_matrix_that_one_model_stores_twice_is_ignored(tmp_path: Path, flag: bool | None, order: str) -> None:
    kind = {"model_type": "gemma"} if flag is None else {}
    folders = {name: model(tmp_path / name, value, 4, head=False, **kind) for name, value in (("a", 0), ("b", 2))}
    if flag is None:  # Gemma is tied where its config does not say
        for folder in folders.values():
            config = config_of(folder)
            del config["tie_word_embeddings"]
            (folder / "config.json").write_text(json.dumps(config))
    twice(folders["b"])
    out = merged(tmp_path / "out", "same", **{name: folders[name] for name in order})
    assert load_file(out / "model.safetensors").keys() == {EMBED, NORM}
    assert rows_of(out) == [1, 2, 3, 4]


def test_a_matrix_stored_twice_in_all_is_ignored_and_cut_with_the_rest(tmp_path: Path) -> None:
    folders = {name: twice(model(tmp_path / name, 1, rows, head=False)) for name, rows in (("a", 4), ("b", 6))}
    out = merged(tmp_path / "out", "pad", **folders)
    assert load_file(out / "model.safetensors").keys() == {EMBED, NORM}
    assert rows_of(out) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("factor", "rows", "why"), [(2.0, None, "differs from"), (1.0, 3, r"\[4, 3\] and \[3, 3\]")])
def test_a_matrix_that_is_no_copy_is_not_dropped(tmp_path: Path, factor: float, rows: int | None, why: str) -> None:
    a, b = (model(tmp_path / name, 1, 4, head=False) for name in "ab")
    twice(b, factor, rows)
    with pytest.raises(UserError, match=rf"b \({b}\): tie_word_embeddings is true, but {HEAD} differs .*{why}|{why}"):
        merged(tmp_path / "out", "same", a=a, b=b)


def test_untied_and_tied_are_two_architectures(tmp_path: Path) -> None:
    a, b = model(tmp_path / "a", 1, 4, head=True), model(tmp_path / "b", 1, 4, head=False)
    assert "tie_word_embeddings false and true" in said(a=a, b=b)
