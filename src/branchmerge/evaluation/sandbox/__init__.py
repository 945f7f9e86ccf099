"""Run programs that models wrote: no network, no files, no other processes, limits on time, memory and output.

    with Sandbox() as sandbox:
        outcome = sandbox.run(Job("print(int(input()) + 1)", stdin="1\\n", seconds=6.0))

Works as root and as an ordinary user, without Docker. `Sandbox.level` is the level in force on this machine
(`isolation` lists the levels). Reading order: client, collector, zygote, isolation, syscalls, program, kernel.

It does not protect against a fault of the kernel itself. A program can still learn from the time, from the files it may
read (the interpreter, its packages, the system's libraries), and from its process id, which counts the processes and
threads of earlier jobs. Without namespaces it may also see names and sizes of files elsewhere, and write as many files
of up to 16 MiB to its folder as its time allows.
"""

from branchmerge.evaluation.sandbox.client import Sandbox, shared, use
from branchmerge.evaluation.sandbox.collector import Job, Outcome
from branchmerge.evaluation.sandbox.unit_tests import CRASHED, FAILED, PASSED, TIMEOUT, run_tests

__all__ = ["CRASHED", "FAILED", "PASSED", "TIMEOUT", "Job", "Outcome", "Sandbox", "run_tests", "shared", "use"]
