"""Which code made a result: versions of packages, and the commit of the checkout."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

from branchmerge.config import PROJECT

PACKAGES = (
    "branchmerge", "torch", "transformers", "tokenizers", "lightning", "lm-eval", "math-verify",
    "latex2sympy2_extended", "sympy", "safetensors", "datasets",
)  # fmt: skip


def package_versions() -> dict[str, str]:
    """Versions of what can change a result, of those that are installed; Python's own too."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str:
    """Commit of the checkout, with `+changes` where the tree differs from it; empty outside git."""
    git = ["git", "-C", str(PROJECT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+changes" if status.strip() else "")
