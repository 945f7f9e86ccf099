"""Answers in the forms that models give them, and texts that give none."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from branchmerge.evaluation.answers import integer, letter


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{204}",
        r"\boxed{0204}",
        r"\boxed{\text{204}}",
        r"\boxed{\mathbf{204}}.",
        r"\boxed{204.0}",
        r"\boxed{204.}",
        r"\boxed{ 204 }",
        r"\boxed{$204$}",
        r"\boxed{m+n=204}",
        r"\boxed{204^\circ}",
        r"\boxed{204^{\circ}}",
        r"\boxed{204°}",
        r"\boxed{204^{\text{°}}}",
        r"\boxed{204\,^\circ}",
        r"\boxed{204\degree}",
        r"\boxed{204^\degree}",
        r"\boxed{\mathbf{204^\circ}}",
        r"\boxed{204 \text{ degrees}}",
        r"\boxed{204\text{ units}.}",
        r"\boxed{204\text{ paths}}",
        r"\boxed{204~\mathrm{cm}^{2}}",
        r"\boxed{n = \mathbf{204}\text{ square units}}",
        r"\boxed{\,204\,}",
        r"\boxed{\displaystyle 204}",
        r"\boxed{\rm 204}",
        r"\boxed{{\large 204}}",
        r"\boxed{\mathsf{204}}",
        r"\boxed{(204)}",
        r"\boxed{\left(204\right)}",
        r"\boxed {204}",
        r"The answer is \(204\).",
        r"The answer is **\(204\)**.",
        "The final answer is\n\\[\n204\n\\]",
        "Answer: 204\n\nExplanation: a tempting option is 7, but no.",
        r"\boxed{\text{The answer is 204}}",
        r"first \boxed{7}, so \boxed{204}",
        "The answer is 204",
        "The answer is 204.",
        "The answer is **204**. It was hard.",
        "Answer: $204$",
        "The answer is 7. No: the final answer is 204.",
        "so the answer to the question is x = 204",
    ],
)
def test_integers(text: str) -> None:
    assert integer(text) == 204


@pytest.mark.parametrize(("text", "number"), [(r"\boxed{-5}", -5), (r"\boxed{0}", 0), (r"\boxed{1,024}", 1024)])
def test_other_integers(text: str, number: int) -> None:
    assert integer(text) == number


@pytest.mark.parametrize(
    "text",
    [
        "",
        "204",
        r"\boxed{}",
        r"\boxed{204.5}",
        r"\boxed{\frac{408}{2}}",
        r"\boxed{204 or 205}",
        r"\boxed{204\text{ or }205}",
        r"\boxed{204\text{ or more}}",
        r"\boxed{204\text{ is too large}}",
        r"\boxed{204\text{ thousand}}",
        r"\boxed{204\text{ tenths}}",
        r"\boxed{204\text{ percent}}",
        r"\boxed{204\%}",
        r"\boxed{204\text{ mod }1000}",
        r"\boxed{204_\text{eight}}",
        r"\boxed{204_{8}}",
        r"\boxed{204\mathrm{i}}",
        r"\boxed{204 * \text{ten}}",
        r"\boxed{204 x}",
        r"\boxed{204^2}",
        r"\boxed{204!}",
        r"\boxed{204^\circ 30'}",
        r"\boxed{20\,4}",
        r"\boxed{20 4}",
        r"\boxed{(204, 205)}",
        r"\boxed{(20)(4)}",
        r"\boxed{\{204\}}",
        r"\boxed{\approx 204}",
        r"\boxed{\pm 204}",
        r"\boxed{204",
        r"The answer is 204. \boxed{\text{none}}",
        "The answer is near 204",
        "I do not know the answer.",
    ],
)
def test_no_integer(text: str) -> None:
    assert integer(text) is None


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{B}",
        r"\boxed{(B)}",
        r"\boxed{\text{B}}",
        r"\boxed{\text{(B)}}",
        r"\boxed{B.}",
        r"\boxed{B. 204 kJ}",
        r"\boxed{B) the second}",
        r"\boxed{A}, or rather \boxed{B}",
        "The answer is B",
        "The answer is (B).",
        "**Answer: B**",
        "Answer: **B**",
        "The correct choice is B.",
        "The answer is A? No, the answer is B.",
        "The correct answer is B: the second law.",
        "Answer: B\n\nExplanation: a tempting option is A, but it is too small.",
        "The correct answer is B.\n\nOption A is incorrect because it ignores spin.",
        "The correct answer is B.\n\nWhy not the others?\n- Option A: too small.\n- Option C = 7.",
        "The correct answer is **option B**.",
        "Of these the answer is B; option C is wrong.",
        "The correct choice is (B) because it is larger.",
        "Of A and C, the better option is B.",
        r"The answer is \(B\).",
        r"The answer is \textbf{B}.",
        r"\boxed{\text{Option B}}",
        r"\boxed{\text{The answer is choice (B)}}",
        r"\boxed{B - the second}",
        r"\boxed{B, the second}",
        r"\boxed{B. A gas}",
        r"\boxed{{B}}",
        r"\boxed{{\rm B}}",
        r"\boxed{\mathsf{B}}",
        r"\boxed{\left(B\right)}",
        r"\boxed {B}",
    ],
)
def test_letters(text: str) -> None:
    assert letter(text) == "B"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "B",
        "This completes a proof.",
        "A proof follows. As A is larger than B, we are done.",
        "The answer is a matter of taste.",
        "The answer is A matter of taste",
        "The answer is Believed to be large",
        r"\boxed{AB}",
        r"\boxed{E}",
        r"\boxed{A cat}",
        r"\boxed{b}",
        "Option A and option B differ.",
        "Option A is incorrect.",
        r"\boxed{B, C}",
        r"\boxed{(B), (C)}",
        r"\boxed{B or C}",
        r"\boxed{B/C}",
        r"\boxed{B - C}",
        r"\boxed{B-type}",
        r"\boxed{\text{B}\text{ and }\text{C}}",
        r"\boxed{\text{Option B or option C}}",
        "The answer is (B) or (C).",
        "The answer is B. No, the answer is B or C.",
        "The answer is Bob - I think",
    ],
)
def test_no_letter(text: str) -> None:
    assert letter(text) is None


@given(st.text("ABCD ().,\n", max_size=40))
def test_letters_alone_state_nothing(text: str) -> None:
    assert letter(text) is None and integer(text) is None


@given(st.text(max_size=60))
def test_any_text_is_survived(text: str) -> None:
    assert letter(text) in (None, "A", "B", "C", "D")
    assert letter(f"\\boxed{{{text}}}") in (None, "A", "B", "C", "D")
    assert isinstance(integer(f"\\boxed{{{text}}}"), int | None)


def test_an_integer_of_thousands_of_digits_is_no_answer() -> None:
    assert integer("\\boxed{" + "7" * 5000 + "}") is None


@pytest.mark.parametrize(
    "text",
    ["204\\text{" + "a  " * 50_000, "204" + " " * 200_000 + "x", "\\text" * 30_000, "answer: " * 20_000, "(" * 200_000],
)
def test_long_texts_take_no_time(text: str) -> None:
    begin = time.monotonic()
    for response in (text, f"\\boxed{{{text}}}", f"The answer is {text}"):
        assert letter(response) is None and integer(response) is None
    assert time.monotonic() - begin < 20
