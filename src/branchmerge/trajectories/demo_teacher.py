"""The programmatic teacher of the demo study: writes its trajectories and its benchmark.

    python -m branchmerge.trajectories.demo_teacher --out assets/demo

The real studies distil a large reasoning model.  The demo study has to run on two CPU cores in minutes, so its
teacher is this program: it draws small questions in three domains and writes out a short chain of thought and a
final answer for each, in the format of the real trajectories (``<think>...</think>`` and then the answer).

- math: mental arithmetic; the final answer is ``\\boxed{84}``;
- code: a small function of a given name; the answer is a fenced Python block, graded by its assert lines;
- science: a formula with numbers and units, four options; the final answer is ``\\boxed{B}``.

Below ``--out`` it writes

- ``trajectories/{math,code,science}.jsonl``: what each branch learns from;
- ``trajectories/warmup.jsonl``: fresh rows of all three domains, which teach the backbone the answer format;
- ``benchmark/{test,dev}/{math,code,science}.jsonl``: held-out questions with references.

No question occurs twice anywhere: all files are drawn from one stream per domain, without replacement of the
question's parameters.  What a benchmark question of math asks to work out (47 * 6, say) is worked out nowhere else.
Like a real teacher this one errs: in exactly ``round(ERROR_SHARE * rows)`` rows of every
trajectories file the reasoning goes wrong and the final answer contradicts the reference, so that verification
against the reference has something to drop.  The same seed writes the same bytes.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any

SEED = 20250310
ERROR_SHARE = 0.05
TEST_ROWS = 100  # per domain
DEV_ROWS = 60  # per domain
BRANCH_ROWS = 300  # per domain
WARMUP_ROWS = 130  # per domain
MOST_DRAWS = 10_000  # for one new question

DOMAINS = ("math", "code", "science")
LETTERS = "ABCD"
THINGS = ("pens", "cards", "eggs", "nails")
FUNCTION_NAMES = ("f", "g", "h", "calc", "solve", "run", "apply", "task", "work", "compute")


@dataclass(frozen=True)
class Solution:
    """One way through a question: the reasoning and the final answer it arrives at."""

    think: str
    answer: str

    def text(self) -> str:
        return f"<think>\n{self.think}\n</think>\n\n{self.answer}"


@dataclass(frozen=True)
class Problem:
    """A question with the teacher's right and wrong solution."""

    key: tuple[object, ...]
    """Kind and parameters; for math, what is to be worked out, which two kinds share."""
    question: str
    right: Solution
    wrong: Solution
    reference: dict[str, Any]


Kind = Callable[[Random], Problem]


# ------------------------------------------------------------------------------------------------------------- math


def _number(key: tuple[object, ...], question: str, think: Callable[[int], str], answer: int, slip: int) -> Problem:
    """A question with a whole number as its answer; ``think`` writes the reasoning that ends in a given result."""
    right, wrong = (Solution(think(n), f"\\boxed{{{n}}}") for n in (answer, answer + slip))
    return Problem(key, question, right, wrong, {"grader": "math", "answer": str(answer)})


def _factors(rng: Random) -> tuple[int, int]:
    """Two digits and one; no round tens, since those are worked out on the way to every other product."""
    return rng.choice([a for a in range(12, 70) if a % 10]), rng.randint(2, 6)


def _times(a: int, b: int) -> str:
    tens, ones = a // 10 * 10, a % 10
    return f"{a}*{b} = {tens}*{b} + {ones}*{b} = {tens * b} + {ones * b} = "


def product(rng: Random) -> Problem:
    a, b = _factors(rng)
    think, slip = _times(a, b), rng.choice((-10, 1, 10))
    return _number(("times", a, b), f"What is {a} * {b}?", lambda n: f"{think}{n}", a * b, slip)


def boxes(rng: Random) -> Problem:
    a, b = _factors(rng)
    think, slip, thing = _times(a, b), rng.choice((-10, 1, 10)), rng.choice(THINGS)
    question = f"One box holds {a} {thing}. How many {thing} are in {b} boxes?"
    return _number(("times", a, b), question, lambda n: f"{think}{n}", a * b, slip)


def total(rng: Random) -> Problem:
    a, b = rng.randint(12, 69), rng.randint(12, 69)
    think, slip = f"{a} + {b} = ", rng.choice((-10, 1, 10))
    return _number(("plus", *sorted((a, b))), f"What is {a} + {b}?", lambda n: f"{think}{n}", a + b, slip)


# ------------------------------------------------------------------------------------------------------------- code


def _function(
    key: tuple[object, ...],
    rng: Random,
    task: str,
    think: str,
    right: str,
    wrong: str,
    calls: dict[str, object],
    argument: str = "x",
) -> Problem:
    """A question for a function of one argument; ``calls`` maps argument literals to the values they must give."""
    name = rng.choice(FUNCTION_NAMES)

    def solution(body: str) -> Solution:
        block = f"```python\ndef {name}({argument}):\n    return {body}\n```"
        return Solution(think.format(body), block)

    tests = [f"assert {name}({literal}) == {value!r}" for literal, value in calls.items()]
    question = f"Write a Python function {name}({argument}) that {task}."
    return Problem(key, question, solution(right), solution(wrong), {"grader": "code", "tests": tests})


def add_then_multiply(rng: Random) -> Problem:
    k, m = rng.randint(2, 30), rng.randint(2, 12)
    calls: dict[str, object] = {str(x): (x + k) * m for x in rng.sample(range(-9, 30), 4)}
    task = f"adds {k} to x and then multiplies by {m}"
    key = ("add_then_multiply", k, m)
    return _function(key, rng, task, "sum first: {}", f"(x + {k}) * {m}", f"x + {k} * {m}", calls)


def multiply_then_subtract(rng: Random) -> Problem:
    m, k = rng.randint(2, 12), rng.randint(2, 30)
    calls: dict[str, object] = {str(x): x * m - k for x in rng.sample(range(-9, 30), 4)}
    task = f"multiplies x by {m} and then subtracts {k}"
    key = ("multiply_then_subtract", m, k)
    return _function(key, rng, task, "product first: {}", f"x * {m} - {k}", f"x * {m} + {k}", calls)


def keep_above(rng: Random) -> Problem:
    k, above = rng.randint(2, 90), rng.random() < 0.5
    word, sign, flipped = ("greater", ">", "<") if above else ("less", "<", ">")
    lists = [[k + d for d in rng.sample(range(-9, 10), 4)] + [k, k + 1, k - 1] for _ in range(3)]
    calls: dict[str, object] = {str(v): [n for n in v if (n > k if above else n < k)] for v in lists}
    body = f"[n for n in x if n {sign} {k}]"
    task = f"returns the numbers in the list x that are {word} than {k}"
    key = ("keep_above", k, above)
    return _function(key, rng, task, f"keep n if n {sign} {k}", body, body.replace(sign, flipped), calls)


def count_char(rng: Random) -> Problem:
    c, d = rng.sample("abcdefghijklmnoprstuwxyz", 2)
    words = ["".join(rng.choice((c, d, "q", c.upper())) for _ in range(6)) + c for _ in range(3)]
    calls: dict[str, object] = {repr(w): w.count(c) + w.count(d) for w in words}
    body = f"s.count('{c}') + s.count('{d}')"
    task = f"counts how often '{c}' and '{d}' occur in the string s"
    return _function(("count_char", c, d), rng, task, "add both counts", body, f"s.count('{c}')", calls, "s")


def sum_of_multiples(rng: Random) -> Problem:
    k, m = rng.randint(2, 12), rng.randint(2, 20)
    lists = [[k * n for n in rng.sample(range(1, 9), 3)] + rng.sample(range(1, 60), 3) for _ in range(3)]
    calls: dict[str, object] = {str(v): sum(n for n in v if n % k == 0) + m for v in lists}
    body = f"sum(n for n in x if n % {k} == 0) + {m}"
    task = f"sums the multiples of {k} in the list x and adds {m}"
    return _function(("sum_of_multiples", k, m), rng, task, f"n % {k} == 0", body, f"sum(x) + {m}", calls)


# ---------------------------------------------------------------------------------------------------------- science

# Formula, unit of the result and question with the two factors in it.
PRODUCTS = (
    ("F = m*a", "N", "Which force gives a mass of {} kg an acceleration of {} m/s^2?"),
    ("d = v*t", "m", "How far does a bike go at {} m/s in {} s?"),
    ("E = P*t", "J", "How much energy does a lamp of {} W use in {} s?"),
    ("V = I*R", "V", "Which voltage drives {} A through {} ohm?"),
    ("W = F*d", "J", "How much work does a force of {} N do over {} m?"),
    ("Q = I*t", "C", "Which charge does a current of {} A carry in {} s?"),
)
# The same with a quotient: the question gives the product of the two factors and the first of them.
QUOTIENTS = (
    ("v = d/t", "m/s", "What is the speed of a car that goes {} m in {} s?"),
    ("R = V/I", "ohm", "Which resistor lets {} V drive a current of {} A?"),
    ("P = E/t", "W", "Which power turns {} J in {} s?"),
    ("rho = m/V", "kg/L", "What is the density of {} kg of oil in {} L?"),
)


def _choice(
    key: tuple[object, ...], rng: Random, question: str, formula: str, terms: str, unit: str, value: int, slip: int
) -> Problem:
    """Four options, among them the right value and ``slip``, a wrong formula's value; read until one matches."""
    far = [n for n in range(2, 2 * value + 12) if abs(n - value) > 2 and n != slip]
    options = [value, slip, *rng.sample(far, 2)]
    rng.shuffle(options)
    lines = "\n".join(f"{letter}) {n} {unit}" for letter, n in zip(LETTERS, options, strict=True))

    def solution(n: int) -> Solution:
        found = options.index(n)
        read = " ".join(f"{letter} {m}" for letter, m in zip(LETTERS, options[: found + 1], strict=False))
        return Solution(f"{formula} = {terms} = {n} {unit}\n{read}", f"\\boxed{{{LETTERS[found]}}}")

    reference = {"grader": "choice", "answer": LETTERS[options.index(value)]}
    return Problem(key, f"{question}\n{lines}", solution(value), solution(slip), reference)


def formula_product(rng: Random) -> Problem:
    formula, unit, question = rng.choice(PRODUCTS)
    a, b = rng.randint(2, 12), rng.randint(2, 9)
    slip = a + b if a + b != a * b else a + b + 1
    return _choice((formula, a, b), rng, question.format(a, b), formula, f"{a}*{b}", unit, a * b, slip)


def formula_quotient(rng: Random) -> Problem:
    formula, unit, question = rng.choice(QUOTIENTS)
    a, b = rng.randint(2, 9), rng.randint(2, 12)
    slip = a * b - a if a * b - a != b else b + 1
    return _choice((formula, a, b), rng, question.format(a * b, a), formula, f"{a * b}/{a}", unit, b, slip)


KINDS: dict[str, tuple[Kind, ...]] = {
    "math": (product, boxes, total),
    "code": (add_then_multiply, multiply_then_subtract, keep_above, count_char, sum_of_multiples),
    "science": (formula_product, formula_product, formula_quotient),
}


# ---------------------------------------------------------------------------------------------------------- writing


def problems(domain: str) -> Iterator[Problem]:
    """The domain's stream of problems, kinds in turn; ends when a kind has no new question left.

    The first TEST_ROWS + DEV_ROWS are the benchmark: their keys never come again. Later ones may share a key (47 * 6
    as a bare product and in a story) but no question.
    """
    rng = Random(f"{SEED}-{domain}")
    held_out: set[object] = set()
    asked: set[str] = set()
    for number, kind in enumerate(cycle(KINDS[domain])):
        for _ in range(MOST_DRAWS):
            problem = kind(rng)
            if problem.key not in held_out and _bare(problem) not in asked:
                break
        else:
            raise RuntimeError(f"{domain}: no new question of kind {kind.__name__} after {number}; ask for fewer rows")
        asked.add(_bare(problem))
        if number < TEST_ROWS + DEV_ROWS:
            held_out.add(problem.key)
        yield problem


def _bare(problem: Problem) -> str:
    """The question without what is drawn only for variety: its options and the things that are counted."""
    stem = problem.question.splitlines()[0]
    return re.sub("|".join(THINGS), "things", stem)


def erring_rows(name: str, rows: int) -> set[int]:
    """Which rows of the trajectories file ``name`` the teacher gets wrong."""
    return set(Random(f"{SEED}-errors-{name}").sample(range(rows), round(ERROR_SHARE * rows)))


def _trajectory(name: str, domain: str, number: int, problem: Problem, errs: bool) -> dict[str, Any]:
    identity = f"{name}-{number:05d}" if name == domain else f"{name}-{domain}-{number:05d}"
    messages = [
        {"role": "user", "content": problem.question},
        {"role": "assistant", "content": (problem.wrong if errs else problem.right).text()},
    ]
    return {"id": identity, "domain": domain, "messages": messages, "reference": problem.reference}


def _question(split: str, domain: str, number: int, problem: Problem) -> dict[str, Any]:
    identity = f"{split}-{domain}-{number:05d}"
    return {"id": identity, "domain": domain, "question": problem.question, "reference": problem.reference}


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write(out: Path) -> None:
    """Write all trajectories and benchmark files below ``out``."""
    warmup: list[tuple[str, int, Problem]] = []
    for domain in DOMAINS:
        stream = problems(domain)
        for split, count in (("test", TEST_ROWS), ("dev", DEV_ROWS)):
            questions = [_question(split, domain, i, next(stream)) for i in range(count)]
            _write_lines(out / "benchmark" / split / f"{domain}.jsonl", questions)
        erring = erring_rows(domain, BRANCH_ROWS)
        branch = [_trajectory(domain, domain, i, next(stream), i in erring) for i in range(BRANCH_ROWS)]
        _write_lines(out / "trajectories" / f"{domain}.jsonl", branch)
        warmup += [(domain, i, next(stream)) for i in range(WARMUP_ROWS)]
    Random(f"{SEED}-warmup").shuffle(warmup)
    erring = erring_rows("warmup", len(warmup))
    mixture = [_trajectory("warmup", domain, n, p, i in erring) for i, (domain, n, p) in enumerate(warmup)]
    _write_lines(out / "trajectories" / "warmup.jsonl", mixture)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo study's trajectories and benchmark.")
    parser.add_argument("--out", type=Path, default=Path("assets/demo"), help="directory to write below")
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
