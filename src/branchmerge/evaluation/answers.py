"""What a text gives for its answer: an integer, or the letter of a choice. None is better than a guess.

The text is what follows a model's reasoning. The last \\boxed{...} decides; where there is none, the last sentence that
says "the answer is ...".
"""

import re

from branchmerge.trajectories.schema import MOST_DIGITS

WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|boldsymbol)\{([^{}]*)\}")
STATED = re.compile(r"\b(?:answer|choice|option)\b[^.\n]{0,40}?(?:\bis\b|:|=)[\s*_$(\\]*", re.IGNORECASE)
"""The beginning of a statement, up to what is stated"""
INTEGER = re.compile(r"[+-]?\d+(?:\.0*)?")
LETTER = re.compile(r"\(?([A-J])\)?(?:[.:,)].*)?", re.DOTALL)


def integer(text: str) -> int | None:
    """An integer as AIME asks for: `0204`, `\\text{204}`, `204.0`, `n = 204`, "The answer is 204"; no arithmetic."""
    given = _given(text)
    if given is None:
        return None
    right = _plain(given).rpartition("=")[2].strip()
    right = re.sub(r"(?<=\d)(?:,|\\,|\\!|\{,\})(?=\d{3}\b)", "", right.removesuffix("^\\circ"))
    found = INTEGER.fullmatch(right.rstrip(". "))
    digits = found[0].partition(".")[0] if found else ""
    return int(digits) if 0 < len(digits.lstrip("+-")) <= MOST_DIGITS else None


def letter(text: str, letters: str = "ABCD") -> str | None:
    """A choice by its letter: `B`, `(B)`, `\\text{B}`, `B. 204`, "The answer is B"; never an ordinary word."""
    given = _given(text)
    found = LETTER.fullmatch(_plain(given)) if given is not None else None
    return found[1] if found and found[1] in letters else None


def last_box(text: str) -> str | None:
    """Content of the last \\boxed{...}, its braces matched; None if there is none or it is never closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin = start + len("\\boxed{")
    depth = 1
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin:position].strip()
    return None


def _given(text: str) -> str | None:
    """What the last box holds, or else what the last statement states, to the end of its sentence."""
    boxed = "\\boxed{" in text
    if boxed:
        box = last_box(text)
        if box is None:
            return None
        text = _plain(box)
    statements = list(STATED.finditer(text))
    if not statements:
        return text if boxed else None
    return re.split(r"\n|[.!?](?:\s|$)", text[statements[-1].end() :], maxsplit=1)[0]


def _plain(text: str) -> str:
    """Without the marks around it: dollars, bold, \\text{...}, spaces."""
    while WRAPPED.search(text):
        text = WRAPPED.sub(r"\1", text)
    return text.strip(" \t\n$*_`~\\;")
