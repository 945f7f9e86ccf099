"""torchrun for the processes of one machine, as train.py starts it; reports failures in one line, without traceback.

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
"""Time for the other processes to end when one has died; most of them wait for it in vain."""


def give_time() -> None:
    """Give processes TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds to end after a signal, which torch before 2.12 ignores.

    After the death of a process, the others get only SECONDS_AFTER_DEATH; torch passes no signal in that case.
    """
    usual = PContext.close

    def close(context: PContext, death_sig: signal.Signals | None = None, timeout: int | None = None) -> None:
        if timeout is None:
            said = int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SECONDS_AFTER_DEATH))
            timeout = said if death_sig else SECONDS_AFTER_DEATH
        usual(context, death_sig, timeout)

    PContext.close = close  # type: ignore[method-assign, assignment]


def told(failed: ChildFailedError) -> str:
    """Which process failed first and how, in words."""
    rank, failure = failed.get_first_failure()
    if failure.exitcode >= 0:
        return f"rank {rank} ended with status {failure.exitcode}"
    return f"rank {rank} was ended by {signal_name(-failure.exitcode)}"


if __name__ == "__main__":
    give_time()
    try:
        with TemporaryDirectory(prefix="branchmerge-torchrun-") as folder:  # torchrun's own folder would stay
            main(["--log-dir", folder, *sys.argv[1:]])
    except SignalException as end:
        sys.exit(128 + end.sigval)
    except ChildFailedError as error:
        sys.exit(f"error: {told(error)}")
