"""torchrun, for the processes of one machine, as train.py starts it: it tells its end in a line, not in a traceback.

python -m branchmerge.student.local_processes --standalone --nproc-per-node=8 train.py ...
"""

import os
import signal
import sys
from tempfile import TemporaryDirectory

from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from branchmerge.machine import signal_name

SECONDS_AFTER_DEATH = 30
"""For the others when a process dies: they mostly wait for it in vain."""


def give_time() -> None:
    """To processes that are told to end: what TORCH_ELASTIC_SHUTDOWN_TIMEOUT says, which torch before 2.12 ignores.

    Not to those that end because another died, which torch tells no signal for.
    """
    usual = PContext.close

    def close(context: PContext, death_sig: signal.Signals | None = None, timeout: int | None = None) -> None:
        if timeout is None:
            said = int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SECONDS_AFTER_DEATH))
            timeout = said if death_sig else SECONDS_AFTER_DEATH
        usual(context, death_sig, timeout)

    PContext.close = close  # type: ignore[method-assign, assignment]


def told(failed: ChildFailedError) -> str:
    """Which process failed first, and how."""
    rank, failure = failed.get_first_failure()
    if failure.exitcode >= 0:
        return f"rank {rank} ended with status {failure.exitcode}"
    return f"rank {rank} was ended by {signal_name(-failure.exitcode)}"


if __name__ == "__main__":
    give_time()
    try:
        with TemporaryDirectory(prefix="branchmerge-torchrun-") as folder:  # its own would stay
            main(["--log-dir", folder, *sys.argv[1:]])
    except SignalException as end:
        sys.exit(128 + end.sigval)
    except ChildFailedError as error:
        sys.exit(f"error: {told(error)}")
