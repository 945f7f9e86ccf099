"""The files that a merged model copies from one parent: tokenizer, chat template, end tokens."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from branchmerge.files import file_sha256
from branchmerge.merge.recipe import Recipe
from branchmerge.student.backbone import read_config
from branchmerge.student.export import TOKENIZER_FILES
from branchmerge.study import fingerprint


def fingerprint_of(recipe: Recipe) -> str:
    """Fingerprint of the files that may be copied: Left's; those of all leaves where vocabularies may differ."""
    folders = [recipe.folders[leaf] for leaf in recipe.tree.leaves]
    taken = folders if recipe.vocab != "same" else folders[:1]
    return fingerprint({
        f"{place}/{name}": _sha256(folder / name, (folder / name).stat().st_mtime_ns)
        for place, folder in enumerate(taken)
        for name in (*TOKENIZER_FILES, "config.json")
        if (folder / name).is_file()
    })  # fmt: skip


@cache
def _sha256(path: Path, _: int) -> str:
    """Cached for all members of a sweep."""
    return file_sha256(path)


def differences(taken: Path, leaves: Mapping[str, Path]) -> list[str]:
    """One line for each difference between the leaves' files and those that the merged model copies."""
    name = next((leaf for leaf, folder in leaves.items() if folder == taken), taken.name)
    lines = []
    for what, of in (("chat template", _template), ("end-of-sequence tokens", _end_tokens)):
        others = [leaf for leaf, folder in leaves.items() if of(folder) != of(taken)]
        if others:
            lines.append(f"{', '.join(others)}: {what} other than of {name}, whose the merged model gets")
    return lines


def _template(folder: Path) -> Any:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(errors="replace")
    return _entry(folder / "tokenizer_config.json", "chat_template")


def _end_tokens(folder: Path) -> set[Any]:
    ends = _entry(folder / "generation_config.json", "eos_token_id")
    ends = read_config(folder).get("eos_token_id") if ends is None else ends
    return set(ends) if isinstance(ends, list) else {ends}


def _entry(file: Path, key: str) -> Any:
    """An entry of a JSON file; None if there is no such file or entry. A broken file is reported when it is loaded."""
    try:
        return json.loads(file.read_text()).get(key)
    except (OSError, ValueError, AttributeError):
        return None
