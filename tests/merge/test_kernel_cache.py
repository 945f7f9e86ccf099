"""Compiled kernels are kept, and compiled anew where one that they call has changed in another file."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from branchmerge.merge import kernels

SOURCES = Path(kernels.__file__).parent
MEASURED = """
import numpy as np
from branchmerge.merge.selection_kernels import measure
kl, row = np.empty(1), np.ones((1, 8), np.float32)
measure(row, row, False, False, False, kl, np.zeros(0, np.int32))
print(kl[0])
"""


def test_a_change_in_one_file_reaches_what_another_was_compiled_to(tmp_path: Path) -> None:
    """`measure` of selection_kernels.py compiles `kl_of_row` of kl_kernels.py into itself; in a copy of the package."""
    package = tmp_path / "branchmerge"
    shutil.copytree(SOURCES.parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    assert measured(tmp_path) == "0.0"
    assert len(list(package.rglob("selection_kernels.measure*.nbc"))) == 1
    kl_of_row = package / "merge" / "kl_kernels.py"
    source = kl_of_row.read_text()
    assert source.count("return 0.0") == 1  # of equal rows
    kl_of_row.write_text(source.replace("return 0.0", "return 2.0"))
    assert measured(tmp_path) == "2.0"


def measured(path: Path) -> str:
    """KL of two equal rows by the package in that folder."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run([sys.executable, "-c", MEASURED], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()
