"""Our AIME grader against lm-eval's own (lm_eval.tasks.aime) on responses in many forms.

They agree but for the differences that are listed here, each with its reason and on purpose.
"""

from itertools import product

import pytest
from lm_eval.tasks.aime.utils import process_results

from branchmerge.evaluation.graders import grade
from branchmerge.trajectories.schema import Reference

ANSWERS = ["204", "25", "0", "7", "999", "110"]
"""References; each is asked with itself and with the next one as what a response says."""

SAME = {
    "box": "\\boxed{{{}}}",
    "box in a sentence": "So the answer is \\boxed{{{}}}.",
    "box in dollars": "so $\\boxed{{{}}}$",
    "box with spaces": "\\boxed{{ {} }}",
    "two boxes": "first \\boxed{{1}}, in the end \\boxed{{{}}}",
    "after reasoning": "<think>\nIt is 1 + 1.\n</think>\n\n\\boxed{{{}}}",
    "box in the reasoning too": "<think>\n\\boxed{{3}}?\n</think>\n\nNo, \\boxed{{{}}}.",
    "more after the box": "\\boxed{{{}}}\n\nI have checked it.",
    "display": "\\[\n\\boxed{{{}}}\n\\]",
    "degrees": "\\boxed{{{}^\\circ}}",
    "no number": "I could not find it, not {}." + " Sorry.",
    "empty box": "{} \\boxed{{}}",
    "a fraction": "\\boxed{{\\frac{{{}}}{{2}}}}",
    "a sum": "\\boxed{{{}+1}}",
    "an equation": "\\boxed{{m={}}}",
}

DIFFERENT = {
    # name: (response, why ours is another, what is right)
    "leading zero": ("\\boxed{{0{}}}", "AIME writes answers with three digits", True),
    "decimal": ("\\boxed{{{}.0}}", "the same integer", True),
    "text": ("\\boxed{{\\text{{{}}}}}", "the same integer", True),
    "bold": ("\\boxed{{\\mathbf{{{}}}}}", "the same integer", True),
    "full stop in the box": ("\\boxed{{{}.}}", "the same integer", True),
    "a long equation": ("\\boxed{{m + n = {}}}", "lm-eval drops a left side of two letters at most", True),
    "statement": ("The answer is {}.", "an explicit statement counts where there is no box", True),
    "bold statement": ("**The answer is {}**", "an explicit statement counts where there is no box", True),
    "unclosed reasoning": ("<think>\nPerhaps \\boxed{{{}}}", "reasoning that never ended is no answer", False),
    "box in the reasoning alone": ("<think>\n\\boxed{{{}}}\n</think>\n\nSo it is.", "reasoning is no answer", False),
    "bare": ("{}", "a number without a box or a statement is no answer", False),
    "dollars": ("It is ${}$", "a number in dollars is not said to be the answer", False),
}


def ours(response: str, answer: str) -> bool:
    return grade(response, Reference("integer", answer=answer)).correct


def theirs(response: str, answer: str) -> bool:
    return bool(process_results({"Answer": answer}, [response])["exact_match"])


PAIRS = [(answer, said) for n, answer in enumerate(ANSWERS) for said in (answer, ANSWERS[(n + 1) % len(ANSWERS)])]


@pytest.mark.parametrize("form", sorted(SAME))
def test_both_say_the_same(form: str) -> None:
    for answer, said in PAIRS:
        response = SAME[form].format(said)
        assert ours(response, answer) == theirs(response, answer), response


@pytest.mark.parametrize("form", sorted(DIFFERENT))
def test_intended_differences_are_differences_and_ours_is_meant(form: str) -> None:
    template, _, right = DIFFERENT[form]
    differ = 0
    for answer, said in PAIRS:
        response = template.format(said)
        meant = right and said == answer
        assert ours(response, answer) == meant, response
        differ += theirs(response, answer) != meant
    assert differ


def test_nothing_else_differs() -> None:
    """Every form around every box: 2,592 responses."""
    boxes = ["\\boxed{{{}}}", "\\boxed{{ {}}}", "$\\boxed{{{}}}$", "\\boxed{{x={}}}"]
    before = ["", "So ", "We get $x$ and $y$. ", "\\boxed{{1}} ", "<think>\nhm\n</think>\n\n", "The answer is 5. "]
    after = ["", ".", "\n", " That is all.", " $z$", "\n\n**Done**", " (checked)", "!", " QED"]
    for (answer, said), (start, box, end) in product(PAIRS, product(before, boxes, after)):
        response = f"{start}{box}{end}".format(said)
        assert ours(response, answer) == theirs(response, answer), response
