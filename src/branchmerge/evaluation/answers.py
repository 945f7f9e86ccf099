"""Extract the answer from a text: an integer, or the letter of a choice. No answer is better than a guess.

The text is what follows a model's reasoning. The last \\boxed{...} decides; where there is none, the last sentence that
says "the answer is ..." and gives one, or else "the option is ...".
"""

import re
from collections.abc import Iterator

from branchmerge.trajectories.schema import MOST_DIGITS

BOX = re.compile(r"\\boxed\s*\{")
UPRIGHT = r"\\(?:text|textrm|textnormal|mbox|mathrm)\s*"
WRAPPED = re.compile(r"\\(?:text\w*|emph|mbox|math(?:rm|sf|tt|it|bf|normal)|boldsymbol|bm)\s*\{([^{}]*)\}")
SWITCH = re.compile(
    r"\\(?:displaystyle|textstyle|rm|bf|it|sf|tt|small|normalsize|large|Large|LARGE|huge|Huge|left|right|q?quad)(?![A-Za-z])"
    r"|\\[,;:!()\[\] ]|[$~]"
)
"""LaTeX commands that only affect the layout: fonts, sizes, spaces, delimiters of mathematics"""
THOUSANDS = re.compile(r"(?<=\d)(?:,(?:\\!)?|\\,|\\!|\{,\})(?=\d{3}\b)")
DEGREES = re.compile(r"(?:\^\s*\{?\s*(?:\\circ|\\degree|°)\s*\}?|\\degree(?:\{\})?|\\textdegree|°)$")
UNIT = re.compile(rf"(?<=[\d)}}\s]){UPRIGHT}\{{\s*([A-Za-z][A-Za-z ./]*[A-Za-z])\s*(?:\.\s*)?\}}(?:\^\{{?[23]\}}?)?$")
"""Upright words after a number, such as a unit; a single letter may be a variable."""
ANOTHER = re.compile(
    r"\b(?:and|or|not|is|if|mod|modulo|base|plus|minus|times|over|percent|hal(?:f|ves)|thirds?|quarters?|factorial|"
    r"(?:four|fif|six|seven|eigh|nin|ten|twelf|hundred|thousand|million)ths?|(?:dozen|hundred|thousand|million|billion)s?"
    r"|squared|cubed)\b",
    re.IGNORECASE,
)
"""Words after a number that change its value, or leave it open"""
STATED = re.compile(r"\b(answer|choice|option)\b[^.\n]{0,40}?(?:\bis\b|:|=)[\s*_]*", re.IGNORECASE)
"""The beginning of a statement, up to what is stated"""
END = re.compile(r"\n|[.!?](?:\s|$)")
LONGEST = 300
"""Longest statement that is read, in characters, so that an endless sentence takes no time"""
INTEGER = re.compile(r"[+-]?\d+(?:\.0*)?")
BRACKETS = re.compile(r"\(([^()]*)\)|\{([^{}]*)\}")
NAMED = r"(?:(?i:option|choice|answer)\s+)?"
LETTER = re.compile(rf"{NAMED}(?:\(([A-J])\).*|([A-J])(?:(?:[.:;,)]|\s+[-–—]\s).*)?)", re.DOTALL)
SEVERAL = re.compile(
    rf"{NAMED}\(?[A-J]\)?\s*(?:(?:,?\s*(?:and|or)\b|[/&])\s*{NAMED}\(?[A-J]\b"
    r"|[,;–—-]\s*\(?[A-J]\)?\s*(?:$|[,.;:/&)–—-]|and\b|or\b))"
)
"""More than one letter: no choice was made, and earlier statements are not searched for one"""


def integer(text: str) -> int | None:
    """An integer as AIME asks for: `0204`, `\\text{204}`, `204.0`, `204^\\circ`, `n = 204`; no arithmetic."""
    return next((number for given in _given(text) if (number := _integer(given)) is not None), None)


def letter(text: str, letters: str = "ABCD") -> str | None:
    """A choice by its letter: `B`, `(B)`, `\\text{Option B}`, `B. 204`, "The answer is B"; never an ordinary word."""
    found = next((found for given in _given(text) if (found := _letter(given)) is not None), None)
    return found if found and found in letters else None


def last_box(text: str) -> str | None:
    """Content of the last \\boxed{...}, its braces matched; None if there is none or it is never closed."""
    boxes = list(BOX.finditer(text))
    if not boxes:
        return None
    begin = boxes[-1].end()
    depth = 1
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin:position].strip()
    return None


def _given(text: str) -> Iterator[str]:
    """Candidate answers, the likeliest first: from the last box or, without a box, from the statements."""
    if not BOX.search(text):
        yield from _stated(text)
        return
    box = last_box(text)
    if box is not None:
        yield from _stated(_plain(box))
        yield box


def _stated(text: str) -> Iterator[str]:
    """Statements, each to the end of its sentence: the last first, but an answer before any option.

    Explanations are full of options.
    """
    text = SWITCH.sub(" ", text)
    latest = list(STATED.finditer(text))[::-1]
    for statement in sorted(latest, key=lambda found: found[1].lower() != "answer"):
        stated = END.split(text[statement.end() : statement.end() + LONGEST], maxsplit=1)[0]
        # What was cut off is marked: a number is not all of it.
        yield stated if len(stated) < LONGEST else f"{stated}…"


def _integer(given: str) -> int | None:
    text = SWITCH.sub(" ", THOUSANDS.sub("", given)).strip(" \n.")
    unit = UNIT.search(text)
    if unit and text[: unit.start()].rstrip()[-1:] in ("}", ")", *"0123456789") and not ANOTHER.search(unit[1]):
        text = text[: unit.start()]
    right = DEGREES.sub("", _plain(text)).rpartition("=")[2]
    found = INTEGER.fullmatch(_bare(right).rstrip(". "))
    digits = found[0].partition(".")[0] if found else ""
    return int(digits) if 0 < len(digits.lstrip("+-")) <= MOST_DIGITS else None


def _letter(given: str) -> str | None:
    """The letter; empty if there are several, None if there is none."""
    text = _bare(_plain(SWITCH.sub(" ", given)))
    if SEVERAL.match(text):
        return ""
    found = LETTER.fullmatch(text)
    return found[1] or found[2] if found else None


def _plain(text: str) -> str:
    """Without the marks around it: dollars, bold, \\text{...}, spaces."""
    while WRAPPED.search(text):
        text = WRAPPED.sub(r"\1", text)
    return text.strip(" \t\r\n$*_`~\\;")


def _bare(text: str) -> str:
    """Without brackets that enclose all of it."""
    text = text.strip()
    while found := BRACKETS.fullmatch(text):
        text = (found[1] or found[2] or "").strip()
    return text
