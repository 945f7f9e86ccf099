"""Programs with test cases, right and wrong, to compare graders of LiveCodeBench solutions.

`right` is what a judge says who runs the program as a program: strict mode must say the same. Where LiveCodeBench's own
grader says otherwise, `why` tells the reason. Everything is deterministic.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from branchmerge.evaluation.livecodebench.cases import Case

NOT_ITERABLE = "its sys.stdin is an object with neither __iter__ nor __next__"
NOT_REGISTERED = "its module is not in sys.modules, where dataclasses look for it"
BUFFER = "its sys.stdin.buffer has only read and readline, and readline always gives the first line"
READ_TWICE = "its sys.stdin.read and readlines give everything each time, also what was read before"
REAL_INPUT = "the real standard input is empty there, only sys.stdin and input() are replaced"
FUNCTION_BODY = "the program is the body of a function there, so top-level names are not global"
NO_BUFFER = "its sys.stdout has no buffer, and only what is written to sys.stdout counts"
EARLY_NAME = "`stdout` imported from sys there is the one before output is captured"
ONE_PROCESS = "one process runs all cases there, so they share what a solution keeps"
EXIT_CODE = "it takes no notice of an exit code"
NOT_LAST = "`if __name__ == '__main__'` counts there only as the last statement and spelled like this"
FUTURE = "a __future__ import comes after other imports there, which is a syntax error"
GUARD = "it sets that function or module to None"
OWN_EQUALITY = "it compares with the solution's own objects, which may say that they equal everything"
PEEKING = "expected results are in the process that runs the solution there"
NESTED_TUPLE = "it takes a tuple for a list only at the top"
CLASS_TEXT = "it creates Solution wherever the text `class Solution` occurs"
BLANK_LINE = "a blank line at the end of the arguments is no JSON there"
EMPTY_PROGRAM = "a program without statements becomes a function without a body there, a syntax error"

COMPARED = "compared"
"""Official mode must say what LiveCodeBench's grader says."""
PEEKS = "peeks"
"""Passes there by looking at the expected results, which official mode does not hand out either."""
BREAKS = "breaks"
"""Would break the pipes of LiveCodeBench's process pool, and hang it: not run there."""


@dataclass(frozen=True)
class Probe:
    name: str
    program: str
    cases: tuple[Case, ...]
    right: bool
    function: str = ""
    why: str = ""
    """Why LiveCodeBench's verdict is the other one; empty: it is the same."""
    slow: bool = False
    """Takes seconds: it runs into the limit of time."""
    compared: str = COMPARED
    """COMPARED, PEEKS or BREAKS"""


def probes() -> list[Probe]:
    """All probes; their names are unique."""
    from grading_probe_functions import functions, slow_functions, tricks, values

    found = [
        *formats(),
        *prints(),
        *readers(),
        *shapes(),
        *slow(),
        *values(),
        *functions(),
        *tricks(),
        *slow_functions(),
    ]
    assert len({probe.name for probe in found}) == len(found), "names must be unique"
    return found


def stdin(name: str, program: str, pairs: list[tuple[str, str]], right: bool, why: str = "") -> Probe:
    return Probe(name, program, tuple(Case(given, output, "stdin") for given, output in pairs), right, why=why)


TEXTS = {
    "number": "6", "numbers": "1 2 3", "lines": "1\n-2\n3", "float": "0.5 2.25",
    "word": "Yes", "words": "ab Cd", "mixed": "x 1\ny 2", "nothing": "",
}  # fmt: skip
NUMBERS = ("number", "numbers", "lines", "float")
CHANGES: dict[str, tuple[Callable[[str], str], str]] = {
    # What is done to the output, and for which texts it stays right: all, numbers (and nothing), none.
    "same": (lambda text: text, "all"),
    "newline": (lambda text: f"{text}\n", "all"),
    "blank_lines_around": (lambda text: f"\n\n{text}\n \n", "all"),
    "space_at_line_ends": (lambda text: text.replace("\n", "  \n") + " \t", "all"),
    "space_at_line_starts": (lambda text: "  " + text.replace("\n", "\n "), "all"),
    "carriage_returns": (lambda text: text.replace("\n", "\r\n") + "\r\n", "all"),
    "two_spaces": (lambda text: text.replace(" ", "  "), "numbers"),
    "tabs": (lambda text: text.replace(" ", "\t"), "numbers"),
    "as_float": (lambda text: " ".join(f"{token}0" if "." in token else f"{token}.0" for token in text.split(" ")), ""),
    "plus_sign": (lambda text: f"+{text}", "numbers"),
    "leading_zero": (lambda text: f"0{text}", "numbers"),
    "exponent": (lambda text: text.replace("1", "10e-1", 1), "numbers"),
    "upper": (str.upper, "none"),
    "lower": (str.lower, "none"),
    "more_lines": (lambda text: f"{text}\n7", "none"),
    "more_tokens": (lambda text: f"{text} 7", "none"),
    "blank_line_inside": (lambda text: text.replace("\n", "\n\n"), "none"),
    "on_one_line": (lambda text: text.replace("\n", " "), "none"),
    "each_on_a_line": (lambda text: text.replace(" ", "\n"), "none"),
    "slightly_off": (lambda text: text.replace("6", "6.0000001").replace("5", "50000001"), "none"),
    "quoted": (lambda text: repr(text), "none"),
    "nothing": (lambda text: "", "none"),
}


def formats() -> Iterator[Probe]:
    """The same answer, or not quite, written in many ways."""
    for kind, text in TEXTS.items():
        for change, (changed, stays) in CHANGES.items():
            printed = changed(text)
            if printed == text and change != "same":
                continue
            if change == "as_float":
                right = kind in NUMBERS and kind != "lines"
                if kind == "lines":
                    continue
            else:
                right = stays == "all" or (stays == "numbers" and kind in NUMBERS)
            program = f"import sys\nsys.stdout.write({printed!r})"
            yield stdin(f"format-{kind}-{change}", program, [("1\n", f"{text}\n")], right)


def prints() -> Iterator[Probe]:
    """Numbers that are equal or look so."""
    for number, (printed, expected, right) in enumerate([
        ("1e3", "1000", True), ("1000", "1e3", True), ("1.0", "1", True), ("-0", "0", True), ("-0.0", "0", True),
        ("0.1", "0.10", True), ("0.30000000000000004", "0.3", False), ("1_000", "1000", True), ("1,000", "1000", False),
        ("50000000000000001", "50000000000000000", False), ("nan", "nan", True), ("nan 1.0", "nan 1", False),
        ("inf", "Infinity", True), ("sNaN 1", "sNaN 1.0", False), ("0x10", "16", False), ("True", "1", False),
        ("None", "", False), ("1/2", "0.5", False), ("٣", "3", True), (
         "[1, 2]", "[1,2]", False), ("a\x0cb", "a\nb", False),
        ("1\x0b2", "1 2", True), ("1\u2028 2", "1 2", True), ("é", "é", True), ("e\u0301", "é", False),
        ("\ufeff1", "1", False),
        ("9" * 5000, "9" * 5000, True), ("9" * 5000, "9" * 4999 + "8", False), ("1 2\n3", "1\n2 3", False),
    ]):  # fmt: skip
        yield stdin(f"print-{number}", f"print({printed!r})", [("", expected)], right)


SUMS = [("3\n1 2 3\n", "6\n"), ("2\n10 -4\n", "6\n"), ("1\n7", "7\n")]
READERS = {
    "input": ("input(); a = input().split()", ""),
    "input_of_builtins": ("import builtins\nbuiltins.input(); a = builtins.input().split()", ""),
    "readline": ("import sys\nsys.stdin.readline()\na = sys.stdin.readline().split()", ""),
    "readline_as_input": ("import sys\ninput = sys.stdin.readline\ninput()\na = input().split()", ""),
    "readlines": ("import sys\na = sys.stdin.readlines()[1].split()", ""),
    "read": ("import sys\na = sys.stdin.read().split()[1:]", ""),
    "read_size": ("import sys\na = sys.stdin.read(-1).split()[1:]", ""),
    "read_then_nothing": ("import sys\na = sys.stdin.read().split()[1:] + sys.stdin.read().split()", READ_TWICE),
    "input_then_read": ("import sys\ninput()\na = sys.stdin.read().split()", READ_TWICE),
    "input_then_readlines": ("import sys\ninput()\na = sys.stdin.readlines()[0].split()", READ_TWICE),
    "for_line": ("import sys\na = [line.split() for line in sys.stdin][1]", NOT_ITERABLE),
    "next": ("import sys\nnext(sys.stdin)\na = next(sys.stdin).split()", NOT_ITERABLE),
    "iter_input": ("a = list(iter(sys.stdin.readline, ''))[1].split()", ""),
    "until_end": (
        "a = []\ntry:\n    while True:\n        a.append(input())\nexcept EOFError:\n    a = a[1].split()",
        "",
    ),
    "buffer_read": ("import sys\na = sys.stdin.buffer.read().split()[1:]", ""),
    "buffer_readline": ("import sys\nr = sys.stdin.buffer.readline\nr()\na = r().split()", BUFFER),
    "buffer_readlines": ("import sys\na = sys.stdin.buffer.readlines()[1].split()", BUFFER),
    "for_line_in_buffer": ("import sys\na = [line.split() for line in sys.stdin.buffer][1]", BUFFER),
    "open_0": ("a = open(0).read().split()[1:]", REAL_INPUT),
    "open_0_lines": ("a = [line.split() for line in open(0)][1]", REAL_INPUT),
    "open_builtins": ("import builtins\na = builtins.open(0).read().split()[1:]", ""),
    "os_read": ("import os\na = os.read(0, 9999).split()[1:]", REAL_INPUT),
    "stdin_imported_read": ("from sys import stdin\na = stdin.read().split()[1:]", ""),
    "stdin_imported_readline": ("from sys import stdin\nstdin.readline()\na = stdin.readline().split()", ""),
    "stdin_imported_for": ("from sys import stdin\na = [line.split() for line in stdin][1]", REAL_INPUT),
    "stdin_imported_buffer": ("from sys import stdin\na = stdin.buffer.read().split()[1:]", REAL_INPUT),
    "stdin_of_preamble": ("stdin.readline()\na = stdin.readline().split()", ""),
    "stdin_replaced": ("import io, sys\nsys.stdin = io.StringIO(sys.stdin.read())\ninput()\na = input().split()", ""),
    "file_input": ("import fileinput\na = list(fileinput.input())[1].split()", ""),
    "prompt": ("input(''); a = input('').split()", ""),
    "json": ("import json, sys\na = [json.loads(x) for x in sys.stdin.read().split()][1:]", ""),
}


def readers() -> Iterator[Probe]:
    """Ways to read numbers and print their sum; right, wrong, and wrong in the last case only."""
    for name, (program, why) in READERS.items():
        for variant, value, right in [
            ("right", "sum(map(int, a))", True),
            ("wrong", "sum(map(int, a)) + 1", False),
            ("wrong_last", "sum(map(int, a)) - (len(a) == 1)", False),
        ]:
            yield stdin(f"read-{name}-{variant}", f"{program}\nprint({value})\n", SUMS, right, why if right else "")


READ = "a = list(map(int, sys.stdin.read().split()[1:]))\n"
SHAPES: list[tuple[str, str, bool, str]] = [
    ("main_guard",
     "def main():\n    input()\n    print(sum(map(int, input().split())))\nif __name__ == '__main__':\n"
     "    main()", True, ""),
    ("main_guard_double_quotes", f'import sys\nif __name__ == "__main__":\n    {READ}    print(sum(a))', True, ""),
    ("main_guard_else",
     f"import sys\nif __name__ == '__main__':\n    {READ}    print(sum(a))\nelse:\n    print(0)", True, ""),
    ("main_guard_reversed", f"import sys\nif '__main__' == __name__:\n    {READ}    print(sum(a))", True, NOT_LAST),
    ("main_guard_not_last",
     f"import sys\nif __name__ == '__main__':\n    {READ}    print(sum(a))\nx = 1", True, NOT_LAST),
    ("not_main", f"import sys\nif __name__ != '__main__':\n    {READ}    print(sum(a))", False, NOT_LAST),
    ("global_in_function",
     f"{READ}t = 0\ndef f():\n    global t\n    for x in a:\n        t += x\nf()\nprint(t)", True, FUNCTION_BODY),
    ("global_made_in_function", f"{READ}def f():\n    global t\n    t = sum(a)\nf()\nprint(t)", True, ""),
    ("global_at_top", f"global t\n{READ}t = sum(a)\nprint(t)", True, ""),
    ("globals_by_name", f"{READ}t = sum(a)\nprint(globals()['t'])", True, FUNCTION_BODY),
    ("main_module", f"{READ}t = sum(a)\nimport __main__\nprint(__main__.t)", True, FUNCTION_BODY),
    ("eval_in_comprehension", f"{READ}t = sum(a)\nprint([eval('t') for _ in range(1)][0])", True, FUNCTION_BODY),
    ("exec_assigns", f"{READ}exec('t = sum(a)')\nprint(t)", True, FUNCTION_BODY),
    ("nonlocal_at_top", f"{READ}t = 0\ndef f():\n    nonlocal t\n    t = sum(a)\nf()\nprint(t)", False, FUNCTION_BODY),
    ("return_at_top", f"{READ}print(sum(a))\nreturn", False, FUNCTION_BODY),
    ("class_scope",
     f"{READ}class A:\n    n = len(a)\n    def total(self):\n        return sum(a)\nprint(A().total())", True, ""),
    ("shadowed_builtin", f"def f():\n    return max(1, 2)\n{READ}f()\nmax = 3\nprint(sum(a))", True, FUNCTION_BODY),
    ("late_name", f"def f():\n    return g()\ndef g():\n    return sum(a)\n{READ}print(f())", True, ""),
    ("star_import", f"from math import *\n{READ}print(floor(fsum(a)))", True, ""),
    ("import_in_try",
     f"try:\n    from math import gcd\nexcept ImportError:\n    pass\n{READ}print(sum(a) * gcd(1, 2))", True, ""),
    ("import_after_use", f"{READ}print(fsum(a))\nfrom math import fsum", True, ""),
    ("import_in_function",
     "def f():\n    import sys\n    a = sys.stdin.read().split()\n    return sum(map(int, a[1:]))\nprint(f())", True, ""),
    ("no_imports",
     f"{READ}c = Counter(a)\nh = []\nfor k, v in c.items():\n    heappush(h, k * v)\nprint(reduce(add, h))", True, ""),
    ("no_imports_2",
     f"{READ}d = defaultdict(list)\nx: List[int] = list(accumulate(a))\nprint(x[bisect_left([0], 1) * -1])", True, ""),
    ("future_import", f"from __future__ import annotations\nimport sys\n{READ}print(sum(a))", True, FUTURE),
    ("missing_import", f"import no_such_module\n{READ}print(sum(a))", False, ""),
    ("missing_import_caught",
     f"try:\n    import no_such_module\nexcept ImportError:\n    pass\n{READ}print(sum(a))", True, ""),
    ("import_resource", f"import resource\n{READ}print(sum(a))", True, GUARD),
    ("getcwd", f"import os\n{READ}os.getcwd()\nprint(sum(a))", True, GUARD),
    ("quit", f"{READ}print(sum(a))\nquit()", True, GUARD),
    ("dataclass",
     f"from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n{READ}print(P(sum(a)).x)", True, ""),
    ("generator", f"def g():\n    yield from a\n{READ}print(sum(g()))", True, ""),
    ("lru_cache",
     f"@lru_cache(None)\ndef f(i):\n    return 0 if i == len(a) else a[i] + f(i + 1)\n{READ}print(f(0))", True, ""),
    ("recursion",
     f"def f(n):\n    return 0 if n == 0 else 1 + f(n - 1)\n{READ}print(sum(a) + f(20000) - 20000)", True, ""),
    ("endless_recursion", f"def f(n):\n    return f(n + 1)\n{READ}print(sum(a), f(0))", False, ""),
    ("recursion_caught",
     f"def f(n):\n    return f(n + 1)\n{READ}try:\n    f(0)\nexcept RecursionError:\n    print(sum(a))", True, ""),
    ("thread",
     f"import threading\ndef f():\n    {READ}    print(sum(a))\nt = threading.Thread(target=f)\nt.start()\n"
     "t.join()", True, ""),
    ("raises", f"{READ}print(sum(a))\nraise ValueError('x')", False, ""),
    ("raises_before", "1 / 0", False, ""),
    ("raises_last", f"{READ}print(sum(a))\nassert len(a) > 1", False, ""),
    ("name_error", f"{READ}print(total(a))", False, ""),
    ("end_of_file", f"{READ}input()\ninput()\ninput()\ninput()\nprint(sum(a))", False, ""),
    ("base_exception", f"{READ}print(sum(a))\nraise BaseException", False, ""),
    ("keyboard_interrupt", f"{READ}print(sum(a))\nraise KeyboardInterrupt", False, ""),
    ("sys_exit", f"{READ}print(sum(a))\nsys.exit()\nprint(1)", True, ""),
    ("sys_exit_0", f"{READ}print(sum(a))\nsys.exit(0)", True, ""),
    ("exit", f"{READ}print(sum(a))\nexit()\nprint(1)", True, ""),
    ("exit_in_function", f"def f():\n    {READ}    print(sum(a))\n    exit(0)\nf()\nprint(1)", True, ""),
    ("system_exit", f"{READ}print(sum(a))\nraise SystemExit", True, ""),
    ("sys_exit_1", f"{READ}print(sum(a))\nsys.exit(1)", False, EXIT_CODE),
    ("sys_exit_text", f"{READ}print(sum(a))\nsys.exit('bye')", False, EXIT_CODE),
    ("exit_before", "import sys\nsys.exit(0)\nprint(6)", False, ""),
    ("os_exit", f"import os\n{READ}print(sum(a), flush=True)\nos._exit(0)", True, ONE_PROCESS),
    ("segfault", f"import ctypes\n{READ}print(sum(a), flush=True)\nctypes.string_at(0)", False, ""),
    ("syntax_error", "print(", False, ""),
    ("indentation_error", f"{READ}  print(sum(a))", False, ""),
    ("python_2", "print sum(map(int, raw_input().split()))", False, ""),
    ("prints_nothing", f"{READ}", False, ""),
    ("prints_more", f"print('debug')\n{READ}print(sum(a))", False, ""),
    ("prompts", "input('n = ')\nprint(sum(map(int, input('a = ').split())))", False, ""),
    ("stderr", f"{READ}print('debug', file=sys.stderr)\nprint(sum(a))", True, ""),
    ("stdout_write", f"{READ}sys.stdout.write(str(sum(a)) + '\\n')", True, ""),
    ("stdout_imported", f"from sys import stdout\n{READ}stdout.write(str(sum(a)))", True, EARLY_NAME),
    ("stdout_of_preamble", f"{READ}stdout.write(str(sum(a)))", True, EARLY_NAME),
    ("stdout_buffer", f"{READ}sys.stdout.buffer.write(str(sum(a)).encode())", True, NO_BUFFER),
    ("os_write", f"import os\n{READ}os.write(1, str(sum(a)).encode())", True, NO_BUFFER),
    ("print_to_file", f"{READ}print(sum(a), file=sys.__stdout__)", True, NO_BUFFER),
    ("stdout_flush", f"{READ}print(sum(a), flush=True)\nsys.stdout.flush()", True, ""),
    ("stdout_replaced",
     f"import io\n{READ}o = sys.stdout\nsys.stdout = io.StringIO()\nprint(1)\nsys.stdout = o\nprint(sum(a))", True, ""),
    ("floats", f"{READ}print(float(sum(a)))", True, ""),
    ("big_integer", f"{READ}x = 7 ** 10000\nprint(sum(a) + len(str(x)) - 8451)", True, ""),
    ("docstring", f'"""Sums."""\n{READ}print(sum(a))', True, ""),
    ("comment_class", f"# class Solution\n{READ}print(sum(a))", True, ""),
    ("class_solution",
     f"class Solution:\n    def f(self, a):\n        return sum(a)\n{READ}print(Solution().f(a))", True, CLASS_TEXT),
    ("solution_text", f"s = 'class Solution'\n{READ}print(sum(a))", True, CLASS_TEXT),
    ("keeps_state_in_module",
     f"import math\n{READ}print(sum(a) + len(vars(math).get('seen', '')))\nmath.seen = 'x'", True, ONE_PROCESS),
    ("needs_state_of_module",
     f"import math\n{READ}n = vars(math).setdefault('n', [0])\nn[0] += 1\nprint([0, 6, 6, 7][n[0]])", False, ONE_PROCESS),
    ("f_strings", f"{READ}x = sum(a)\nprint(f'{{x}}', f\"{{'':>1}}\")", True, ""),
    ("walrus", f"{READ}if (x := sum(a)) or True:\n    print(x)", True, ""),
    ("match", f"{READ}match a:\n    case [x]:\n        print(x)\n    case _:\n        print(sum(a))", True, ""),
    ("star_unpacking", "n, *a = map(int, sys.stdin.read().split())\nprint(*[sum(a)], sep='')", True, ""),
    ("lambda_default", f"f = lambda a=None: sum(a)\n{READ}print(f(a))", True, ""),
    ("pass_only", "pass", False, ""),
    ("windows_lines", f"import sys\r\n{READ}print(sum(a))\r\n", True, ""),
    ("tab_indented", f"import sys\nif True:\n\t{READ}\tprint(sum(a))", True, ""),
    ("type_hints",
     f"def f(a: List[int], b: Optional[Dict[str, int]] = None) -> int:\n    return sum(a)\n{READ}print(f(a))", True, ""),
]  # fmt: skip


def shapes() -> Iterator[Probe]:
    """Programs of many shapes; READ needs `sys`, which is there without an import."""
    for name, program, right, why in SHAPES:
        yield stdin(f"shape-{name}", program, SUMS, right, why)
    yield stdin("empty-program", "", [("", "")], True, EMPTY_PROGRAM)
    yield stdin("only-imports", "import math", [("", "\n")], True, EMPTY_PROGRAM)
    yield stdin("empty-program-wrong", "", [("", "1")], False)
    yield stdin("nothing-expected", "x = 1", [("", ""), ("1", "\n")], True)


def slow() -> Iterator[Probe]:
    """Programs that run into the limit of time; they cost it."""
    loop = "while True:\n    pass"
    for probe in [
        stdin("slow-loop", loop, SUMS, False),
        stdin("slow-last", f"{READ}print(sum(a))\nif len(a) == 1:\n    import time\n    time.sleep(60)", SUMS, False),
        stdin(
            "slow-catches",
            f"try:\n    {loop.replace(chr(10), chr(10) + '    ')}\nexcept:\n    print(6)",
            SUMS[:1],
            False,
        ),
    ]:
        yield replace(probe, slow=True)
