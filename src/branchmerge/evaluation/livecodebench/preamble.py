"""The names that a solution may use without importing them, limited to those that occur in its text.

In full this would be `harness.PREAMBLE`, eighteen `from ... import *`. Importing a name touches its object, and in a
fresh fork each touched page is copied, which cost a fifth of the time of a small case. A name that does not occur in
the text, not even in a string, is left out.
"""

import builtins
import importlib
import keyword
import re
import typing
from functools import cache

from branchmerge.evaluation.livecodebench.harness import LIMITS, MODULES


def preamble(program: str) -> str:
    """A program text: imports in the order of `harness.PREAMBLE`, of equal names the last one's, and its limits."""
    words = set(re.findall(r"\w+", program)) - set(keyword.kwlist)
    stars = [(module, sorted(words & exported)) for module, exported in _exports()]
    lines = [f"from {module} import {', '.join(names)}" for module, names in stars if names]
    lines += [f"import {module}" for module in MODULES if module in words or module == "sys"]
    return "\n".join([*lines, LIMITS])


@cache
def _exports() -> list[tuple[str, frozenset[str]]]:
    """What `from module import *` gives; the sandbox runs the interpreter that runs this."""
    modules = [*map(importlib.import_module, MODULES), builtins, typing]
    found = []
    for module in modules:
        public = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
        found.append((module.__name__, frozenset(public)))
    return found
