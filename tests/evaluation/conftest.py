"""Fixtures of the evaluation's tests."""

from pathlib import Path

import pytest
import upstream


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published benchmarks' files, with made-up rows; not to be written to."""
    folder = tmp_path_factory.mktemp("data")
    for task, rows in upstream.ROWS.items():
        upstream.write(folder, task, rows())
    return folder
