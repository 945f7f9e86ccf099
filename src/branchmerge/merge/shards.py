"""Which files of a folder hold a checkpoint's weights, and which tensors its index places in them."""

import json
import re
from pathlib import Path, PurePath

from branchmerge.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
AGAIN = "copy or download it again"

Shards = dict[Path, set[str] | None]
"""File -> names of the tensors that the index places in it; None where there is no index."""


def weight_files(folder: Path) -> Shards:
    """The files of a checkpoint, by its index where it has one; raises UserError if one is missing or it is not
    clear."""
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file():
        shards = _read_index(index)
        if single.is_file() and single not in shards:  # transformers would load one of the two, vLLM the other
            raise UserError(f"{folder}: holds {SINGLE} and an index of other files; remove those that are not meant")
        return shards
    paths = [single] if single.is_file() else sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not paths:
        raise UserError(f"{folder}: no safetensors file in it can be opened (a broken link?); {AGAIN}")
    _check_count(folder, paths)
    return dict.fromkeys(paths)


def _read_index(index: Path) -> Shards:
    try:
        places = json.loads(index.read_text())["weight_map"]
        shards: Shards = {index.parent / file: set() for file in sorted(set(places.values()))}
        for name, file in places.items():
            _check_name(index, file)
            named = shards[index.parent / file]
            assert named is not None
            named.add(name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: not an index of shards ({type(error).__name__}: {error}); {AGAIN}") from error
    lost = [path for path in shards if not path.is_file()]
    if lost:
        raise UserError(f"{lost[0]}: named in {index.name} but not there; {AGAIN}")
    return shards


def _check_name(index: Path, file: str) -> None:
    """A shard lies beside its index; anything else would read files that are not the checkpoint's."""
    if PurePath(file).name != file or "\\" in file or file in ("", ".."):
        raise UserError(f"{index}: names {file!r}, which is not a file beside it; {AGAIN}")
    if not file.endswith(".safetensors"):
        raise UserError(f"{index}: names {file}, which is no safetensors file; save the model with safetensors")


def _check_count(folder: Path, paths: list[Path]) -> None:
    """Without an index, names such as model-00002-of-00003 still say how many there must be."""
    for path in paths:
        found = re.search(r"-of-(\d+)\.safetensors$", path.name)
        if found and len(paths) != int(found[1]):
            raise UserError(f"{folder}: {path.name} is one of {int(found[1])} shards, {len(paths)} are there; {AGAIN}")
