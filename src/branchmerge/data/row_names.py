"""Name the rows that caused an error in a note of the error, even if it was raised in a worker of the DataLoader."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

ROWS = "on the rows "
"""Prefix of a note"""


def on_rows(ids: Sequence[str]) -> str:
    """The rows' names for a message, empty if there are none."""
    return ROWS + ", ".join(ids) if ids else ""


@contextmanager
def naming(ids: Sequence[str]) -> Iterator[None]:
    """Add a note of these rows to an error in the block; `ids` is read when the error is raised."""
    try:
        yield
    except Exception as error:
        if ids:
            error.add_note(on_rows(ids))
        raise


def rows_named(error: BaseException) -> str:
    """The note that `naming` added, empty if there is none.

    For an error in a worker, the main process has only the printed traceback, as the message; notes are lines of it.
    """
    lines = [*str(error).splitlines(), *getattr(error, "__notes__", ())]
    return next((line for line in reversed(lines) if line.startswith(ROWS)), "")
