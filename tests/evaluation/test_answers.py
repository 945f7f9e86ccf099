"""Answers in the forms that models give them, and texts that give none."""

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
