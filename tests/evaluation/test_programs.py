"""What is taken for the program in responses of many shapes."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from branchmerge.evaluation.programs import last_program, official_program

PROGRAM = "import sys\n\nprint(1)"
BLOCK = f"```python\n{PROGRAM}\n```\n"


@pytest.mark.parametrize(
    "answer",
    [
        BLOCK,
        f"```python\n{PROGRAM}\n```",
        f"```\n{PROGRAM}\n```",
        *[BLOCK.replace("python", label) for label in ("py", "py3", "Python3", "pypy3", "python3.11", "Python 3")],
        BLOCK.replace("python", 'python title="a.py"'),
        BLOCK.replace("python", "{.python}"),
        BLOCK.replace("```", "````"),
        f"Solution: {BLOCK}",
        f"1. {BLOCK}",
        "1. First\n\n   " + BLOCK.replace("\n", "\n   "),
        f"Wrap it in ``` fences, and ```inline``` too.\n{BLOCK}",
        f"Input: ```text\n1 2\n```\n{BLOCK}",
        f"```markdown\n{BLOCK}\n```\n",
        f"```\nnever closed\n\n{BLOCK}",
        f"```python\nprint(2)\n\nNo, again:\n{BLOCK}",
        f"```python\nprint(2)\n```\nBetter:\n{BLOCK}",
        *[f"{BLOCK}\nIt prints\n```{label}\n1\n```\n" for label in ("", "text", "bash", "json", "pycon", "c++")],
        f"```text\n1\n```\n{BLOCK}",
    ],
)
def test_program_is_found(answer: str) -> None:
    program = last_program(answer)
    assert program is not None and program.strip() == PROGRAM


@pytest.mark.parametrize(
    "answer",
    ["", PROGRAM, "``` and ```", f"```python\n{PROGRAM}\n", "```text\n1\n```", "```c++\nint x;\n```", "`python`"],
)
def test_what_is_no_program(answer: str) -> None:
    assert last_program(answer) is None


@pytest.mark.parametrize(
    "program",
    [
        "print('```')\nprint('```python')\n",
        'def f():\n    """As in\n\n    ```\n    f()\n    ```\n    """\nprint(1)\n',
        'def f():\n    """As in\n\n    ```python\n    f()\n    ```\n    """\nprint(1)\n',
        "if True:\n    x = 1\n",
        "x = 1\r\n",
    ],
)
def test_a_program_is_taken_whole(program: str) -> None:
    assert last_program(f"Here:\n```python\n{program}```\n") == program
    assert last_program(f"Here you are: ```python\n{program}```\n") == program


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        (BLOCK, PROGRAM),
        (f"{BLOCK}Sample:\n```\n1\n```\n", "1"),
        (f"{BLOCK}It has\nno ```x```.", "It has"),
        (f"x ```python y\n{PROGRAM}\nz```", PROGRAM),
        ("```python\nprint(1)```\n", ""),
        ("```python\nprint(1)\n", None),
        ("```\n```", ""),
        ("", None),
    ],
)
def test_official_program_is_what_is_between_the_last_two_lines_with_fences(answer: str, program: str | None) -> None:
    assert official_program(answer) == program


@given(st.text("`python \n1.-x", max_size=60))
def test_any_text_is_survived(text: str) -> None:
    assert last_program(text) is None or text.count("```") >= 2


@pytest.mark.parametrize("text", ["`" * 200_000, "`" * 200_000 + "x", "``` " * 50_000, "```\n" * 50_000, " " * 200_000])
def test_long_texts_take_no_time(text: str) -> None:
    begin = time.monotonic()
    last_program(text)
    assert time.monotonic() - begin < 5
