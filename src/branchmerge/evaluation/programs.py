"""The program in a response: the last fenced block of Python.

A fence is a line that begins with ```, possibly after a list marker. After other words it counts only if a label ends
the line, as in "Solution: ```python", since prose may contain backticks, too.
"""

import re
import textwrap
from collections.abc import Iterator

FENCE = "```"
PYTHON = re.compile(r"(?:py|pypy|python)\d*", re.IGNORECASE)
"""Labels of Python programs; blocks without a label count if no block has one of these."""
BEGINNING = re.compile(r"\s*(?:(?:[-*+]|\d+[.)])\s+)?")
LABEL = re.compile(r"[ \t{.]*(\w*)")
LABEL_ALONE = re.compile(r"\w+\s*")
DEEPER = 3
"""Columns by which a closing fence may be indented more than the opening one; a deeper one is in a docstring."""


def last_program(answer: str) -> str | None:
    """The last closed block labelled as Python; if there is none, the last one without a label; None if none."""
    blocks = list(_blocks(answer))
    programs = [text for label, text in blocks if PYTHON.fullmatch(label)]
    programs = programs or [text for label, text in blocks if not label]
    return programs[-1] if programs else None


def official_program(answer: str) -> str | None:
    """The program as LiveCodeBench extracts it: the lines between the last two lines with a fence."""
    lines = answer.split("\n")
    fences = [number for number, line in enumerate(lines) if FENCE in line]
    return "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) > 1 else None


def _blocks(answer: str) -> Iterator[tuple[str, str]]:
    """Label and text of each closed block.

    Fences are paired from the top, so that the end of one block is not taken for the beginning of another; but a block
    that is labelled Python begins one, also where the block before it was never closed.
    """
    opened: str | None = None
    column, lines = 0, list[str]()
    for line in answer.split("\n"):
        label, before = _fence(line) or (None, "")
        if opened is not None and (before.strip() or len(before) > column + DEEPER):
            label = None
        if label is None:
            lines.append(line)
        elif opened is None or PYTHON.fullmatch(label):
            column = len(before) if BEGINNING.fullmatch(before) else 0
            opened, lines = label, []
        else:
            yield opened, _text(lines)
            opened = None


def _fence(line: str) -> tuple[str, str] | None:
    """The label of the fence on a line, and what is before it; None if there is none."""
    before, fence, behind = line.rpartition(FENCE)
    before = before.rstrip("`")
    if not fence or FENCE in before or not (BEGINNING.fullmatch(before) or LABEL_ALONE.fullmatch(behind)):
        return None
    return LABEL.findall(behind)[0], before


def _text(lines: list[str]) -> str:
    """The block's text; without its indentation, where the whole block stands in a list."""
    text = "".join(f"{line}\n" for line in lines)
    return textwrap.dedent(text) if text.startswith((" ", "\t")) else text
