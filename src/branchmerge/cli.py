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
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from branchmerge.config_checks import no_such_key
from branchmerge.errors import UserError
from branchmerge.machine import end_with_parent

SHOW = "BRANCHMERGE_FULL_ERROR"
"""Environment variable in which `run` keeps the user's HYDRA_FULL_ERROR."""
SPINS = "1000"
"""Rounds that a thread of GNU's OpenMP spins before it yields its core (300,000 by default). On a machine that runs
other programs, a spinning thread occupies the core that the thread it waits for needs: a training took from 1.6 to
fourteen times as long (docs/log.md, 2026-11-27; benchmarks/busy_core.py)."""


_TOGETHER: dict[Callable[[list[Any]], object], list[Any]] = {}
"""Tasks that members of a multirun left for its end, each with the members' items."""


_BEGUN: list[bool] = []
"""Not empty while a job runs. An OSError outside of a job, or between the members of a multirun, comes from Hydra,
which makes folders for its logs below outputs."""


class _Lenient:
    """An output stream whose errors are ignored: a closed pipe or a full disk of a log must not end hours of work."""

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
        except BrokenPipeError:  # else the buffered text would be flushed again, and fail again, at the exit
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
    output: Any = sys.stdout
    output.reconfigure(errors="backslashreplace")  # as stderr does: a name that a terminal cannot show ends nothing
    sys.stdout, sys.stderr = _Lenient(output), _Lenient(sys.stderr)
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
            with _permitted():
                task(items)
    except (UserError, HydraException, OmegaConfBaseException) as error:
        if os.environ[SHOW] not in ("", "0"):
            raise
        _end(error)
    except OSError as error:
        if _BEGUN or os.environ[SHOW] not in ("", "0"):
            raise
        place = error.filename or "the log of this call"  # a failed write, as on a full disk, has no file name
        _end(UserError(f"{place}: cannot be made or read ({error.strerror}); give an outputs= of your own"))
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C during Python's exit ends it without a traceback
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        gc.freeze()  # as in `importing`: the garbage collection at the exit would take a second


def job(task: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """Wrap what `hydra.main` calls: end a single run at a user's mistake, before Hydra adds a line of its own.

    In a multirun the error is raised through Hydra, which runs the other members first and then names the failed one.
    One of several processes of a training ends at once, as the others may be waiting for it in the failed member.
    """

    @functools.wraps(task)
    def wrapped(cfg: DictConfig) -> None:
        _BEGUN.append(True)
        try:
            with _permitted():
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


@contextmanager
def _permitted() -> Iterator[None]:
    """A file or folder that is not this user's is told as a mistake, wherever it is met."""
    try:
        yield
    except PermissionError as error:
        if error.filename is None:
            raise
        raise UserError(f"{error.filename}: {error.strerror}; change its permissions, or give another") from error


def _is_one_of_several() -> bool:
    """Whether this process is one of several that train together."""
    ranks: Any = sys.modules.get("branchmerge.student.ranks")
    return ranks is not None and ranks.world() > 1


def _end(mistake: BaseException) -> NoReturn:
    """Print the mistake and exit with 1; of several processes that train together only one prints it."""
    said = one_line(mistake)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from branchmerge.student import ranks

        if not ranks.is_first_to_tell(said):
            sys.exit(1)
    sys.exit(f"error: {said}")


def only(*keys: str) -> None:
    """Refuse overrides of any other keys, because the first of `keys` replaces them."""
    for override in HydraConfig.get().overrides.task:
        key = override.lstrip("+~").split("=")[0].split(".")[0]
        if key not in keys:
            raise UserError(f"{override}: cannot stand beside {keys[0]}=; change the file, or leave {keys[0]}= out")


@contextmanager
def importing() -> Iterator[None]:
    """Import large libraries without garbage collection, and exempt their objects from later collections."""
    gc.disable()
    known = len(sys.modules)
    try:
        yield
    finally:
        if len(sys.modules) > known:  # not for a multirun's next member: it would keep the last one's garbage for ever
            gc.freeze()
        gc.enable()


def is_member() -> bool:
    """Whether this job is one of several that Hydra runs in this process, one after the other."""
    running = HydraConfig.get()
    return running.mode == RunMode.MULTIRUN and str(running.launcher._target_).endswith("BasicLauncher")


def together(task: Callable[[list[Any]], object], item: Any) -> None:
    """Call `task([item])`; in a multirun of this process, once at its end with the items of all members.

    So a mistake in any member is found before the work of the first one begins. Members that a launcher runs in other
    processes call `task` on their own.
    """
    if is_member():
        _TOGETHER.setdefault(task, []).append(item)
    else:
        task([item])


def one_line(error: BaseException) -> str:
    """An exception in one line; with the choices, if a config file was not found."""
    root: BaseException = error
    while isinstance(root, HydraException) and root.__cause__ is not None:
        root = root.__cause__
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        group = group.removeprefix("file://")
        return f"{group}={name}: there is no conf/{group}/{name}.yaml; choose one of {', '.join(sorted(error.options))}"
    if isinstance(root, ConfigKeyError | ConfigAttributeError):
        prefix, _, name = str(root.full_key).rpartition(".")
        if is_dataclass(root.object_type):
            return no_such_key(prefix and f"{prefix}.", name, [item.name for item in fields(root.object_type)])
        if prefix == "operator":  # conf/operator/ has all parameters
            return no_such_key("operator.", name, [str(key) for key in root.parent_node or ()])
    said = " ".join(str(error).split())
    cause = " ".join(str(root).split() if root is error else str(root).partition("\n")[0].split())
    return said if cause in said else f"{said} ({cause})"


def compose_domain(domain: str) -> DictConfig:
    """Compose train.yaml for another domain of the running job's study.

    Keeps the overrides of study, backbone, machine and seed; drops those of the branch itself.
    """
    about = ("study", "backbone", "trainer", "logger", "seed", "outputs")
    of_branch = "trainer.validate_every_n_steps"  # refers to the branch's own data.validation_rows
    keys = {o: o.lstrip("+~").split("=")[0] for o in HydraConfig.get().overrides.task}
    kept = [o for o, key in keys.items() if key.split(".")[0] in about and key != of_branch]
    return compose(config_name="train", overrides=[*kept, f"domain={domain}"])
