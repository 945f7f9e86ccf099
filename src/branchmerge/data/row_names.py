"""The rows that an error came with: the error itself tells them, also where a worker of the DataLoader raised it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

ROWS = "on the rows "
"""What a note begins with"""


def on_rows(ids: Sequence[str]) -> str:
    """Their names for a message, empty where there are none."""
    return ROWS + ", ".join(ids) if ids else ""


@contextmanager
def naming(ids: Sequence[str]) -> Iterator[None]:
    """Add a note of these rows, as they are when it is raised, to an error of the block."""
    try:
        yield
    except Exception as error:
        if ids:
            error.add_note(on_rows(ids))
        raise


def rows_named(error: BaseException) -> str:
    """The note that `naming` added, empty where there is none.

    Of a worker's error the main process has only the printed traceback, as its text; notes are lines of it.
    """
    lines = [*str(error).splitlines(), *getattr(error, "__notes__", ())]
    return next((line for line in reversed(lines) if line.startswith(ROWS)), "")
