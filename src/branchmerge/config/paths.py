"""The checkout, and paths that are given relative to it."""

from pathlib import Path

PROJECT = Path(__file__).resolve().parents[3]
"""The checkout: where assets/ and conf/ lie."""


def project_path(path: str) -> Path:
    """Resolve `project:assets/x` against the checkout, anything else against the current folder."""
    return PROJECT / path.removeprefix("project:") if path.startswith("project:") else Path(path).expanduser()
