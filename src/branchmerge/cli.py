"""What the three entry points share: start Hydra, and turn a user's mistake into one line and exit code 1."""

import functools
import gc
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from branchmerge.errors import UserError
from branchmerge.machine import end_with_parent

SHOW = "BRANCHMERGE_FULL_ERROR"
"""Where `run` keeps what the user said of tracebacks."""
SPINS = "1000"
"""Rounds in which a thread of OpenMP waits for others before it lets go of its core (GNU's; 300,000 where nothing says
otherwise). Where another program runs, such waiting keeps the core from the very thread that is waited for: a training
took from 1.6 to fourteen times as long (docs/log.md, 2026-11-27; benchmarks/busy_core.py)."""


_TOGETHER: dict[Callable[[list[Any]], object], list[Any]] = {}
"""What the members of a multirun left to be done at its end."""


_BEGUN: list[bool] = []
"""Not empty while a job is under way; what fails before it, or between the members of a multirun, is Hydra's, which
makes folders for its logs below outputs."""


class _Lenient:
    """Output that may get lost, as when its reader has gone or the disk of a log is full: hours of work go on."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._tried(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._tried(self._stream.flush)

    def _tried(self, step: Callable[..., object], *given: str) -> None:
        try:
            step(*given)
        except BrokenPipeError:  # what it still holds would be told again, and fail again, at the end
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)
        except OSError:
            pass


def run(main: Callable[[], None]) -> None:
    """Call a `hydra.main` function; a user's mistake ends in one line, a bug in a traceback.

    Hydra prints its own version of every exception unless HYDRA_FULL_ERROR is set, so it is set here and the
    user's own setting decides below whether a mistake shows its traceback too.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    sys.stdout, sys.stderr = _Lenient(sys.stdout), _Lenient(sys.stderr)
    os.environ[SHOW] = os.environ.get("HYDRA_FULL_ERROR", "0")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is imported
    # Our dependencies' notes about their own future are of no use to a user, who cannot act on them.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        main()
        _BEGUN.append(True)
        for task, items in _TOGETHER.items():
            task(items)
    except (UserError, HydraException, OmegaConfBaseException) as error:
        if os.environ[SHOW] not in ("", "0"):
            raise
        _end(error)
    except OSError as error:
        if _BEGUN or os.environ[SHOW] not in ("", "0"):
            raise
        place = error.filename or "the log of this call"  # one that finds no room when it is written says no name
        _end(UserError(f"{place}: cannot be made or read ({error.strerror}); give an outputs= of your own"))
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # once more, and Python's own end is cut short without a traceback
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        gc.freeze()  # as in `importing`: the last collection of all takes a second


def job(task: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """Wrap what `hydra.main` calls: end a single run at a user's mistake before Hydra adds a line of its own.

    In a multirun the mistake goes through Hydra, which runs the other members first and then names the failed one; but
    one of several processes ends, as the others may still wait for it in the member that failed.
    """

    @functools.wraps(task)
    def wrapped(cfg: DictConfig) -> None:
        _BEGUN.append(True)
        try:
            task(cfg)
            _BEGUN.clear()
        except Exception as error:
            multirun, several = HydraConfig.get().mode == RunMode.MULTIRUN, _is_one_of_several()
            if multirun and not several:
                raise
            if isinstance(error, UserError | OmegaConfBaseException) and os.environ.get(SHOW, "1") in ("", "0"):
                _end(error)
            if not multirun:
                raise
            traceback.print_exc()
            sys.exit(1)

    return wrapped


def _is_one_of_several() -> bool:
    """Whether this process trains with others."""
    ranks: Any = sys.modules.get("branchmerge.student.ranks")
    return ranks is not None and ranks.world() > 1


def _end(mistake: BaseException) -> NoReturn:
    """Tell it and end with 1; the processes of one training tell it once."""
    said = one_line(mistake)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from branchmerge.student import ranks

        if not ranks.is_first_to_tell(said):
            sys.exit(1)
    sys.exit(f"error: {said}")


def only(*keys: str) -> None:
    """Refuse other overrides than of these keys, as the first of them says all that they would say."""
    for override in HydraConfig.get().overrides.task:
        key = override.lstrip("+~").split("=")[0].split(".")[0]
        if key not in keys:
            raise UserError(f"{override}: cannot stand beside {keys[0]}=; change the file, or leave {keys[0]}= out")


@contextmanager
def importing() -> Iterator[None]:
    """Import large libraries without collecting garbage meanwhile, and leave what they made alone from then on."""
    gc.disable()
    known = len(sys.modules)
    try:
        yield
    finally:
        if len(sys.modules) > known:  # not for a multirun's next member, which would keep what the last one left
            gc.freeze()
        gc.enable()


def is_member() -> bool:
    """Whether this job is one of several that Hydra runs in this process, one after the other."""
    running = HydraConfig.get()
    return running.mode == RunMode.MULTIRUN and str(running.launcher._target_).endswith("BasicLauncher")


def together(task: Callable[[list[Any]], object], item: Any) -> None:
    """Call `task([item])`; in a multirun of this process, once at its end with the items of all members.

    So a mistake in any member is found before the first one's work begins. Members that a launcher sends elsewhere
    work alone.
    """
    if is_member():
        _TOGETHER.setdefault(task, []).append(item)
    else:
        task([item])


def one_line(error: BaseException) -> str:
    """Say an exception in one line, with the choices where a config file was not found."""
    root: BaseException = error
    while isinstance(root, HydraException) and root.__cause__ is not None:
        root = root.__cause__
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        group = group.removeprefix("file://")
        return f"{group}={name}: there is no conf/{group}/{name}.yaml; choose one of {', '.join(sorted(error.options))}"
    said = " ".join(str(error).split())
    cause = " ".join(str(root).split())
    return said if cause in said else f"{said} ({cause})"


def compose_domain(domain: str) -> DictConfig:
    """Compose train.yaml for another domain of the running job's study.

    Takes over what was said about study, backbone, machine and seed; not what was said about the branch itself.
    """
    about = ("study", "backbone", "trainer", "logger", "seed", "outputs")
    of_branch = "trainer.validate_every_n_steps"  # what it validates on is said with the branch's data
    keys = {o: o.lstrip("+~").split("=")[0] for o in HydraConfig.get().overrides.task}
    kept = [o for o, key in keys.items() if key.split(".")[0] in about and key != of_branch]
    return compose(config_name="train", overrides=[*kept, f"domain={domain}"])
