import pytest

from branchmerge.evaluation.answers import last_box
from branchmerge.evaluation.graders import NO_ANSWER, WRONG_ANSWER, final_part, grade
from branchmerge.trajectories.schema import Reference


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("no tags at all", "no tags at all"),
        ("<think>\nhm\n</think>\n\n84", "\n\n84"),
        ("hm\n</think>84", "84"),  # the template had opened the reasoning
        ("<think>a</think>84<think>b</think>96", "96"),
        ("<think>hm", None),
        ("84 <think>hm", None),
        ("", ""),
    ],
)
def test_answer_is_what_follows_the_last_reasoning(response: str, answer: str | None) -> None:
    assert final_part(response) == answer


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("\\boxed{84}", "84"),
        ("\\boxed{ 84 }.", "84"),
        ("first \\boxed{1}, then \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}} is it", "\\frac{1}{2}"),
        ("\\boxed{1} and \\boxed{\\frac{\\sqrt{3}}{x^{2}}}", "\\frac{\\sqrt{3}}{x^{2}}"),
        ("\\boxed{}", ""),
        ("\\boxed{\\frac{1}{2}", None),
        ("\\boxed{1} and \\boxed{2", None),
        ("84", None),
        ("", None),
    ],
)
def test_last_box(text: str, box: str | None) -> None:
    assert last_box(text) == box


@pytest.mark.parametrize("grader", ["math", "choice", "code"])
def test_unclosed_reasoning_is_no_answer(grader: str) -> None:
    response = "<think>\n\\boxed{B}\n```python\nx = 1\n```\n"
    verdict = grade(response, Reference(grader, answer="B", tests=("assert x == 1",)))
    assert (verdict.correct, verdict.reason) == (False, NO_ANSWER)


@pytest.mark.parametrize("grader", ["math", "choice", "code"])
def test_answer_inside_the_reasoning_does_not_count(grader: str) -> None:
    response = "<think>\n\\boxed{B}\n```python\nx = 1\n```\n</think>\nI don't know."
    verdict = grade(response, Reference(grader, answer="B", tests=("assert x == 1",)))
    assert (verdict.correct, verdict.reason) == (False, NO_ANSWER)


@pytest.mark.parametrize(
    ("box", "answer"),
    [
        ("84", "84"),
        ("84.0", "84"),
        ("1,200", "1200"),
        ("1200", "1,200"),
        ("\\frac{1}{2}", "0.5"),
        ("0.5", "\\frac{1}{2}"),
        ("1/2", "\\frac{2}{4}"),
        ("\\dfrac{3}{4}", "0.75"),
        ("2\\sqrt{2}", "\\sqrt{8}"),
        ("x+1", "1+x"),
        ("\\{1,2\\}", "\\{2,1\\}"),
        ("\\$18", "18"),
        ("-3", "-3"),
    ],
)
def test_equal_mathematics_is_correct(box: str, answer: str) -> None:
    verdict = grade(f"<think>\nhm\n</think>\n\n\\boxed{{{box}}}", Reference("math", answer=answer))
    assert (verdict.correct, verdict.reason, verdict.answer) == (True, "", box)


@pytest.mark.parametrize(
    ("box", "answer"),
    [("85", "84"), ("-3", "3"), ("0.333", "\\frac{1}{3}"), ("(1,2)", "(2,1)"), ("x", "84"), ("12", "1200")],
)
def test_other_mathematics_is_wrong(box: str, answer: str) -> None:
    verdict = grade(f"\\boxed{{{box}}}", Reference("math", answer=answer))
    assert (verdict.correct, verdict.reason, verdict.answer) == (False, WRONG_ANSWER, box)


def test_only_the_last_box_counts() -> None:
    reference = Reference("math", answer="84")
    assert grade("\\boxed{85}, no: \\boxed{84}", reference).correct
    assert not grade("\\boxed{84}, no: \\boxed{85}", reference).correct


@pytest.mark.parametrize("response", ["84", "The answer is 84.", "\\boxed{}", "\\boxed{84", ""])
def test_mathematics_outside_a_box_is_no_answer(response: str) -> None:
    verdict = grade(response, Reference("math", answer="84"))
    assert (verdict.correct, verdict.reason) == (False, NO_ANSWER)


@pytest.mark.parametrize("box", ["B", " B ", "(B)", "B.", "\\text{B}", "\\text{(B)}", "(B).", "\\text{B.}"])
def test_letter_in_any_dress(box: str) -> None:
    verdict = grade(f"<think>\nhm\n</think>\n\n\\boxed{{{box}}}", Reference("choice", answer="B"))
    assert (verdict.correct, verdict.answer) == (True, "B")


@pytest.mark.parametrize("response", ["The answer is (B).", "hm\n</think>Answer: **B**", "A or C? The answer is B."])
def test_a_stated_letter_counts_where_there_is_no_box(response: str) -> None:
    verdict = grade(response, Reference("choice", answer="B"))
    assert (verdict.correct, verdict.answer) == (True, "B")


def test_other_letter_is_wrong() -> None:
    verdict = grade("\\boxed{C}", Reference("choice", answer="B"))
    assert (verdict.correct, verdict.reason, verdict.answer) == (False, WRONG_ANSWER, "C")


@pytest.mark.parametrize("response", ["B", "I choose B.", "\\boxed{}", "\\boxed{AB}", "\\boxed{Z}", "\\boxed{12}"])
def test_no_letter_in_a_box_is_no_answer(response: str) -> None:
    verdict = grade(response, Reference("choice", answer="B"))
    assert (verdict.correct, verdict.reason) == (False, NO_ANSWER)


ONE = Reference("code", tests=("assert f() == 1",))
RIGHT = "```python\ndef f():\n    return 1\n```"
WRONG = "```python\ndef f():\n    return 2\n```"


@pytest.mark.parametrize("fence", ["```python\n", "```py\n", "```\n", "```python \n"])
def test_fenced_program_is_run(fence: str) -> None:
    block = RIGHT.replace("```python\n", fence)
    verdict = grade(f"<think>\nhm\n</think>\n\nHere it is:\n{block}\nDone.", ONE)
    assert (verdict.correct, verdict.reason, verdict.answer) == (True, "", "def f():\n    return 1\n")


def test_only_the_last_fenced_block_counts() -> None:
    assert grade(f"{WRONG}\nBetter:\n{RIGHT}", ONE).correct
    assert grade(f"{RIGHT}\nBetter:\n{WRONG}", ONE).reason == "failed_test"


@pytest.mark.parametrize("response", ["def f():\n    return 1", "```python\ndef f():\n    return 1", ""])
def test_program_without_closed_fence_is_no_answer(response: str) -> None:
    verdict = grade(response, ONE)
    assert (verdict.correct, verdict.reason) == (False, NO_ANSWER)


def test_program_that_does_not_compile_crashes() -> None:
    assert grade("```python\ndef f(:\n```", ONE).reason == "crashed"


@pytest.mark.parametrize("language", ["text", "bash", "json"])
def test_block_in_another_language_before_the_program_is_skipped(language: str) -> None:
    assert grade(f"For example:\n```{language}\nf() -> 1\n```\nThe program:\n{RIGHT}", ONE).correct


def test_livecodebench_grades_the_program_and_its_official_mode_the_last_block() -> None:
    public = '[{"input": "", "output": "1\\n", "testtype": "stdin"}]'
    response = "```python\nprint(1)\n```\nIt prints\n```\nas text\n```\n"
    assert grade(response, Reference("livecodebench", public=public)).correct
    official = grade(response, Reference("livecodebench_official", public=public))
    assert (official.correct, official.reason, official.answer) == (False, "crashed", "as text")
