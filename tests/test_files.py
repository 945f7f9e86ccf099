"""Files are written whole or not at all."""

import json
from pathlib import Path

import pytest

from branchmerge.files import write_json


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "score.json"
    write_json(path, {"value": 1})
    with pytest.raises(TypeError):
        write_json(path, {"value": object()})
    assert json.loads(path.read_text()) == {"value": 1}
    assert list(tmp_path.iterdir()) == [path]
