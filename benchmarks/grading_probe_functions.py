"""The probes of `grading_probes` that call a function: what it may return, how it may be written, and tricks."""

from collections.abc import Iterator
from dataclasses import replace

from grading_probes import (
    BLANK_LINE,
    BREAKS,
    CLASS_TEXT,
    EXIT_CODE,
    FUTURE,
    GUARD,
    NESTED_TUPLE,
    NOT_REGISTERED,
    ONE_PROCESS,
    OWN_EQUALITY,
    PEEKING,
    PEEKS,
    Probe,
    stdin,
)  # fmt: skip

from branchmerge.evaluation.livecodebench.cases import Case


def function(name: str, program: str, pairs: list[tuple[str, str]], right: bool, why: str = "") -> Probe:
    cases = tuple(Case(given, output, "functional") for given, output in pairs)
    return Probe(name, program, cases, right, "solve", why)


VALUES: list[tuple[str, str, bool, str]] = [
    ("6", "6", True, ""), ("6.0", "6", True, ""), ("6", "6.0", True, ""), ("'6'", "6", False, ""),
    ("6", '"6"', False, ""),
    ("7", "6", False, ""), ("True", "true", True, ""), ("1", "true", True, ""), ("True", "1", True, ""),
    ("'true'", "true", False, ""), ("False", "true", False, ""), ("None", "null", True, ""), ("None", "0", False, ""),
    ("None", "[]", False, ""), ("0", "null", False, ""), ("''", '""', True, ""), ("' '", '""', False, ""),
    ("'a'", '"a"', True, ""), ("'A'", '"a"', False, ""), ("'a\\n'", '"a"', False, ""), (
     "'\\ud800'", '"\\ud800"', True, ""),
    ("'\\u00e9'", '"é"', True, ""), ("b'a'", '"a"', False, ""), ("[]", "[]", True, ""), ("()", "[]", True, ""),
    ("[1, 2]", "[1,2]", True, ""), ("[2, 1]", "[1,2]", False, ""), ("(1, 2)", "[1, 2]", True, ""),
    ("[1.0, 2]", "[1, 2]", True, ""), ("[(1, 2)]", "[[1, 2]]", True, NESTED_TUPLE),
    ("([1], [2])", "[[1], [2]]", True, ""),
    ("((1,), (2,))", "[[1], [2]]", True, NESTED_TUPLE), ("[[1, 2]]", "[[1, 2]]", True, ""), ("[1]", "1", False, ""),
    ("1", "[1]", False, ""), ("{1, 2}", "[1, 2]", False, ""), ("frozenset([1])", "[1]", False, ""),
    ("range(2)", "[0, 1]", False, ""), ("deque([1, 2])", "[1, 2]", False, ""), ("iter([1])", "[1]", False, ""),
    ("(x for x in [1])", "[1]", False, ""), ("map(int, '12')", "[1, 2]", False, ""), ("{'a': 1}", '{"a": 1}', True, ""),
    ("{1: 1}", '{"1": 1}', False, ""), ("{'b': 1, 'a': [2]}", '{"a": [2], "b": 1}', True, ""),
    ("defaultdict(int, a=1)", '{"a": 1}', True, ""), ("Counter('a')", '{"a": 1}', True, ""),
    ("OrderedDict(a=1)", '{"a": 1}', True, ""), ("{}.keys()", "[]", False, ""),
    ("['a', None, True]", '["a", null, true]', True, ""),
    ("0.1 + 0.2", "0.3", False, ""), ("0.30000000000000004", "0.3", False, ""), ("1e3", "1000", True, ""),
    ("float('nan')", "NaN", False, ""), ("float('inf')", "Infinity", True, ""), ("-0.0", "0", True, ""),
    ("10 ** 30", "1" + "0" * 30, True, ""), ("10 ** 30 + 1", "1e30", False, ""),
    ("10 ** 4500", "1" + "0" * 4500, True, ""),
    ("10 ** 4500 + 1", "1" + "0" * 4500, False, ""), ("2 ** 53 + 1", "9007199254740992", False, ""),
    ("__import__('fractions').Fraction(1, 2)", "0.5", True, ""),
    ("__import__('decimal').Decimal('0.5')", "0.5", True, ""),
    ("__import__('decimal').Decimal('nan')", "0.5", False, ""), ("complex(1)", "2", False, ""), ("int", "0", False, ""),
    ("__import__('enum').IntEnum('E', 'a b').a", "1", True, ""), ("solve", "1", False, ""),
    ("object()", "1", False, ""),
    ("type('L', (list,), {})([1])", "[1]", True, ""), ("type('S', (str,), {})('a')", '"a"', True, ""),
    ("type('T', (tuple,), {})([1])", "[1]", True, ""), ("namedtuple('N', 'x y')(1, 2)", "[1, 2]", True, ""),
    ("NotImplemented", "1", False, ""), ("...", "null", False, ""),
    ("[[[[[[[[1]]]]]]]]", "[[[[[[[[1]]]]]]]]", True, ""),
    ("(lambda x: x.append(x) or x)([])", "[[]]", False, ""), ("[True, False]", "[1, 0]", True, ""),
]  # fmt: skip


def values() -> Iterator[Probe]:
    """What a function returns, and what is expected."""
    for number, (value, expected, right, why) in enumerate(VALUES):
        yield function(f"value-{number}", f"def solve(n):\n    return {value}", [("1", expected)], right, why)


SUMS = [("[1, 2, 3]\n0", "6"), ("[10, -4]\n1", "7"), ("[]\n5", "5")]
METHOD = "class Solution:\n    def solve(self, a: List[int], b: int) -> int:\n"
FUNCTIONS: list[tuple[str, str, bool, str]] = [
    ("method", f"{METHOD}        return sum(a) + b", True, ""),
    ("method_wrong", f"{METHOD}        return sum(a)", False, ""),
    ("method_wrong_last", f"{METHOD}        return sum(a) + b if a else 0", False, ""),
    ("function", "def solve(a, b):\n    return sum(a) + b", True, ""),
    ("lambda", "solve = lambda a, b: sum(a) + b", True, ""),
    ("static_method", "class Solution:\n    @staticmethod\n    def solve(a, b):\n        return sum(a) + b", True, ""),
    ("class_method",
     "class Solution:\n    @classmethod\n    def solve(cls, a, b):\n        return sum(a) + b", True, ""),
    ("inherited",
     "class Base:\n    def solve(self, a, b):\n        return sum(a) + b\nclass Solution(Base):\n    pass", True, ""),
    ("with_init",
     "class Solution:\n    def __init__(self):\n        self.b = 0\n    def solve(self, a, b):\n"
     "        return sum(a) + b", True, ""),
    ("init_with_argument",
     "class Solution:\n    def __init__(self, x):\n        pass\n    def solve(self, a, b):\n"
     "        return sum(a) + b", False, ""),
    ("init_raises",
     "class Solution:\n    def __init__(self):\n        1 / 0\n    def solve(self, a, b):\n"
     "        return sum(a) + b", False, ""),
    ("helper_class",
     f"class Node:\n    pass\n{METHOD}        n = Node()\n        n.x = sum(a)\n        return n.x + b", True, ""),
    ("other_name", "class Solution:\n    def answer(self, a, b):\n        return sum(a) + b", False, ""),
    ("other_class", "class Answer:\n    def solve(self, a, b):\n        return sum(a) + b", False, ""),
    ("function_beside_class", "class Solution:\n    pass\ndef solve(a, b):\n    return sum(a) + b", True, CLASS_TEXT),
    ("class_in_comment", "# class Solution\ndef solve(a, b):\n    return sum(a) + b", True, CLASS_TEXT),
    ("no_function", "x = 1", False, ""), ("empty", "", False, ""), ("not_callable", "solve = 6", False, ""),
    ("syntax_error", "class Solution:\n    def solve(self, a, b)\n        return sum(a) + b", False, ""),
    ("future_import", f"from __future__ import annotations\n{METHOD}        return sum(a) + b", True, FUTURE),
    ("too_few_parameters", "def solve(a):\n    return sum(a)", False, ""),
    ("default_parameter", "def solve(a, b, c=0):\n    return sum(a) + b + c", True, ""),
    ("any_parameters", "def solve(*a):\n    return sum(a[0]) + a[1]", True, ""),
    ("raises", "def solve(a, b):\n    raise ValueError", False, ""),
    ("raises_last", "def solve(a, b):\n    return a[0] + sum(a[1:]) + b", False, ""),
    ("raises_at_top", "def solve(a, b):\n    return sum(a) + b\n1 / 0", False, ""),
    ("exits", "def solve(a, b):\n    exit()", False, ""), ("exits_at_top", "exit()", False, ""),
    ("os_exit", "import os\ndef solve(a, b):\n    os._exit(0)", False, ""),
    ("base_exception", "def solve(a, b):\n    raise BaseException", False, ""),
    ("returns_none", "def solve(a, b):\n    a.append(b)", False, ""),
    ("prints", f"{METHOD}        print(sum(a) + b)\n        return sum(a) + b", True, ""),
    ("prints_only", f"{METHOD}        print(sum(a) + b)", False, ""),
    ("writes",
     f"import os\n{METHOD}        os.write(1, b'9')\n        sys.stdout.write('9')\n        return sum(a) + b", True, ""),
    ("reads", "def solve(a, b):\n    return len(sys.stdin.read()) + sum(a) + b", True, ""),
    ("inputs", "def solve(a, b):\n    return sum(map(int, input().split()))", False, ""),
    ("mutates", "def solve(a, b):\n    a.append(b)\n    return sum(a)", True, ""),
    ("generator", "def solve(a, b):\n    yield sum(a) + b", False, ""),
    ("coroutine", "async def solve(a, b):\n    return sum(a) + b", False, ""),
    ("main_guard",
     f"{METHOD}        return sum(a) + b\nif __name__ == '__main__':\n    print(Solution().solve(input()))", True, ""),
    ("runs_at_top", f"{METHOD}        return sum(a) + b\nprint(Solution().solve([1], 2))", True, ""),
    ("global", "t = 0\ndef solve(a, b):\n    global t\n    t = sum(a) + b\n    return t", True, ""),
    ("keeps_state", "seen = []\ndef solve(a, b):\n    seen.extend(a)\n    return sum(seen) + b", True, ONE_PROCESS),
    ("keeps_state_in_self",
     "class Solution:\n    t = 0\n    def solve(self, a, b):\n        self.t += sum(a)\n"
     "        return self.t + b", True, ONE_PROCESS),
    ("needs_state", "n = []\ndef solve(a, b):\n    n.append(1)\n    return [6, 7, 5][len(n) - 1]", False, ONE_PROCESS),
    ("recursion",
     f"{METHOD}        f = lambda n: n and 1 + f(n - 1)\n        return sum(a) + b + f(20000) - 20000", True, ""),
    ("cache",
     f"{METHOD}        @cache\n        def f(i):\n            return a[i] + f(i + 1) if i < len(a) else b\n"
     "        return f(0)", True, ""),
    ("imports", f"import numbers\nfrom queue import Queue\n{METHOD}        return math.floor(sum(a)) + b", True, ""),
    ("dataclass",
     "from dataclasses import dataclass\n@dataclass(order=True)\nclass P:\n    x: 'int'\n"
     f"{METHOD}        return P(sum(a)).x + b", True, NOT_REGISTERED),
    ("getcwd", f"import os\n{METHOD}        os.getcwd()\n        return sum(a) + b", True, GUARD),
    ("nested_result", "def solve(a, b):\n    return [[sum(a) + b]]", False, ""),
    ("float_result", "def solve(a, b):\n    return float(sum(a) + b)", True, ""),
]  # fmt: skip
NAMED = [("count", "def count(a):\n    return a", "5", True), ("search", "x = 1", '"a"\n"a"', False)]


def functions() -> Iterator[Probe]:
    """Ways to write a function of a list and a number, their sum expected."""
    for name, program, right, why in FUNCTIONS:
        yield function(f"function-{name}", program, SUMS, right, why)
    body = "class Solution:\n    def solve(self, a):\n        return a\n"
    yield function("arguments-text", body, [('"a\\nb"', '"a\\nb"'), ('" "', '" "')], True)
    yield function("arguments-deep", body, [('{"a": [1, {"b": null}]}', '{"a": [1, {"b": null}]}')], True)
    yield function("arguments-blank-line", body, [("1\n", "1")], True, BLANK_LINE)
    yield function("arguments-none", "def solve():\n    return 1", [("", "1")], True, BLANK_LINE)
    for name, program, given, right in NAMED:
        yield replace(function(f"named-{name}", program, [(given, "5")], right), function=name)


EQUAL = "    def __eq__(self, other):\n        return True\n    def __ne__(self, other):\n        return False\n"
RETURN = "def solve(a, b):\n    return "
TRICKS: list[tuple[str, str, bool, str]] = [
    ("equal_object", f"class E:\n{EQUAL}{RETURN}E()", False, OWN_EQUALITY),
    ("equal_text", f"class E(str):\n{EQUAL}{RETURN}E('x')", False, OWN_EQUALITY),
    ("equal_list", f"class E(list):\n{EQUAL}{RETURN}E()", False, OWN_EQUALITY),
    ("equal_number", f"class E(int):\n{EQUAL}{RETURN}E(1)", False, OWN_EQUALITY),
    ("equal_float", f"class E(float):\n{EQUAL}{RETURN}E(1)", False, OWN_EQUALITY),
    ("equal_dictionary", f"class E(dict):\n{EQUAL}{RETURN}E()", False, OWN_EQUALITY),
    ("equal_mock", f"from unittest.mock import ANY\n{RETURN}ANY", False, OWN_EQUALITY),
    ("right_text_unequal",
     f"class E(int):\n    def __eq__(self, other):\n        return False\n{RETURN}E(sum(a) + b)", True, OWN_EQUALITY),
    ("frames", "def solve(a, b):\n    f = sys._getframe()\n    while f:\n        for n in ('gt_out', 'expected', 'all_outputs'):\n"
     "            if n in f.f_locals:\n                return f.f_locals[n]\n        f = f.f_back", False, PEEKING),
    ("dumps", "json.dumps = lambda *a, **k: '6'\ndef solve(a, b):\n    return 1", False, ""),
    ("encoder", "json.JSONEncoder.encode = lambda *a: '6'\ndef solve(a, b):\n    return 1", False, ""),
    ("builtins", "import builtins\nbuiltins.isinstance = lambda *a: True\nbuiltins.all = lambda *a: True\n"
     "def solve(a, b):\n    return object()", False, ""),
    ("prints_json", 'def solve(a, b):\n    print(\'{"value": 6}\', flush=True)\n    return 1', False, ""),
]  # fmt: skip
FORGE = """
import gc, os
def solve(a, b):
    tokens = [v for f in gc.get_objects() if isinstance(f, dict) for v in [f.get("token")] if isinstance(v, str)]
    for fd in range(3, 20):
        for answer in ANSWERS:
            try:
                os.write(fd, (tokens + [""])[0].encode() + answer)
            except OSError:
                pass
    os._exit(0)
"""
MAIN = """
import __main__
def solve(a, b):
    __main__.encode = lambda *a, **k: 6
    __main__.reporter = None
    for name in list(vars(__main__)):
        setattr(__main__, name, lambda *a, **k: 6)
    return 1
"""


def tricks() -> Iterator[Probe]:
    """Wrong programs that try to look right: their own equality, the grader's frames, files and functions."""
    for name, program, right, why in TRICKS:
        probe = function(f"trick-{name}", program, SUMS, right, why)
        yield replace(probe, compared=PEEKS) if why == PEEKING else probe
    anything, many, wrong = b'{"value": {"anything": true}}', [b'{"value": %d}' % n for n in (6, 7, 5)], b'{"value": 1}'
    for name, answers in [("anything", [anything]), ("many", many), ("wrong", [wrong]), ("empty", [b""])]:
        yield replace(function(f"trick-forge-{name}", f"ANSWERS = {answers!r}{FORGE}", SUMS, False), compared=BREAKS)
    yield function("trick-main", MAIN, SUMS, False)
    yield stdin("trick-text", "class E(str):\n    __eq__ = lambda *a: True\nprint(E('x'))", [("", "6")], False)
    yield stdin("trick-strip", "class E(str):\n    strip = lambda *a: '6'\nprint(E('x'))", [("", "6")], False)
    code = "import gc\nfor o in gc.get_objects():\n    if isinstance(o, dict) and 'outputs' in o:\n        print(o['outputs'])"
    yield stdin("trick-objects", code, [("1", "6")], False)
    code = "f = sys._getframe()\nwhile f:\n    if 'gt_out' in f.f_locals:\n        print(f.f_locals['gt_out'])\n    f = f.f_back"
    yield replace(stdin("trick-frames-text", code, [("1", "6"), ("2", "7")], False, PEEKING), compared=PEEKS)
    yield stdin("exit-code-only", "sys.exit(3)", [("", "")], False, EXIT_CODE)


def slow_functions() -> Iterator[Probe]:
    probe = function(
        "slow-function", "def solve(a, b):\n    while b == 5:\n        pass\n    return sum(a) + b", SUMS, False
    )
    yield replace(probe, slow=True)
