"""Training curves: always a CSV file; in addition W&B, TensorBoard or MLflow if configured."""

import csv
import io
import math
import netrc
import os
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger

from branchmerge.config import TrainConfig
from branchmerge.errors import UserError
from branchmerge.files import UNWRITABLE, write_text
from branchmerge.student import ranks
from branchmerge.student.samples import SAMPLES

METRICS = "metrics.csv"
RUN_ID, MLFLOW_RUN_ID = "wandb-run.txt", "mlflow-run.txt"
WORK = "work.txt"
KEPT = "metrics.csv.kept"
TOLD = (METRICS, KEPT, RUN_ID, MLFLOW_RUN_ID, SAMPLES)
"""Files that a resumed run reads"""
PAUSE = 300.0
"""Seconds after which a failed tracker is tried again"""


@contextmanager
def loggers_of(config: TrainConfig, folder: Path, first_step: int = 0) -> Iterator[list[Logger]]:
    """The loggers of a branch while it trains; the CSV file is `<folder>/metrics.csv`.

    Args:
        first_step: the step at which this run resumes; logs of an earlier run are kept up to there.
    """
    failed = True
    try:
        yield _make(config, folder, first_step)
        failed = False
    finally:
        if config.logger.kind == "wandb":
            import wandb

            try:
                wandb.finish(exit_code=int(failed))  # or the next branch in this process would log to the same run
            except Exception as error:
                ranks.say(f"warning: W&B: {_said(error)}")


def claim(folder: Path, work: str) -> None:
    """Assign a folder of logs to a work: remove logs of another work, so that no run continues them.

    Also removes what killed runs left half-written (`write_text`).
    """
    for left in folder.glob(".*.partial-*"):
        left.unlink(missing_ok=True)
    mark = folder / WORK
    if mark.is_file() and mark.read_text() != work:
        for name in TOLD:
            (folder / name).unlink(missing_ok=True)
    write_text(mark, work)


def _make(config: TrainConfig, folder: Path, first_step: int) -> list[Logger]:
    curve = _curve(folder, first_step)
    kind = config.logger.kind
    make = {"wandb": _wandb, "tensorboard": _tensorboard, "mlflow": _mlflow}.get(kind)
    if make is None:
        return [curve]
    try:
        tracker = make(config, folder, first_step)
        _ = tracker.experiment  # type: ignore[attr-defined]  # starts it, so that its errors show now
    except Exception as error:
        if not first_step:
            raise UserError(f"logger={kind}: cannot be begun ({_said(error)}); mend that, or leave it out") from error
        ranks.say(f"warning: logger={kind}: cannot be begun ({_said(error)}); training goes on without it")
        return [curve]
    return [curve, _lenient(tracker)]


def _curve(folder: Path, first_step: int) -> CSVLogger:
    """The logger of the CSV file, with its rows of earlier steps.

    Lightning's writer starts by removing the file, so the rows are kept beside it until then: a kill at any moment
    loses none.
    """
    path, kept = folder / METRICS, folder / KEPT
    rows = _rows_before(kept if kept.is_file() else path, first_step)
    columns = sorted({name for row in rows for name in row})
    _write_rows(kept, columns, rows)
    curve = _Curve(folder, name="", version="", flush_logs_every_n_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Experiment logs directory")  # warns of other logs there, which are intended
        writer = curve.experiment
    if rows:
        writer.metrics_keys = columns
        kept.replace(path)
    else:
        kept.unlink()
    return curve


class _Curve(CSVLogger):
    """A CSV logger whose rows wait in memory while the disk is full, so that the training continues."""

    _told = False

    def save(self) -> None:
        path = Path(self.log_dir) / METRICS
        size = path.stat().st_size if path.is_file() else None
        try:
            self._make_columns(path)
            super().save()
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            with suppress(OSError):  # the disk may be read-only by now
                if size is None:
                    path.unlink()  # Lightning's writer would append rows to an empty file without a header
                else:
                    os.truncate(path, size)  # removes a partial row
            if not self._told:
                ranks.say(f"warning: {path}: cannot be written ({error.strerror}); training goes on")
            self._told = True

    def _make_columns(self, path: Path) -> None:
        """Add columns for new metrics; Lightning's writer would empty the file first, and a kill then would lose it."""
        writer = self.experiment
        columns = sorted({*writer.metrics_keys, *(name for row in writer.metrics for name in row)})
        if path.is_file() and columns != writer.metrics_keys:
            with path.open(newline="") as lines:
                rows = list(csv.DictReader(lines))
            _write_rows(path, columns, rows)
            writer.metrics_keys = columns


def _write_rows(path: Path, columns: Sequence[str], rows: Sequence[dict[str, str]]) -> None:
    """Write the CSV file, completely or not at all."""
    said = io.StringIO()
    table = csv.DictWriter(said, columns)
    table.writeheader()
    table.writerows(rows)
    write_text(path, said.getvalue())


def _lenient(logger: Logger) -> Logger:
    """Make a tracker's failures (server unreachable, disk full) not end the training; the CSV file has the curve."""
    failed_at = -math.inf

    def guarded(name: str, call: Callable[..., None]) -> Callable[..., None]:
        def tried(*given: Any, **named: Any) -> None:
            nonlocal failed_at
            if name != "finalize" and time.monotonic() < failed_at + PAUSE:
                return
            try:
                call(*given, **named)
            except Exception as error:  # from any library
                if failed_at == -math.inf:
                    ranks.say(
                        f"warning: {type(logger).__name__}: {_said(error)}; training goes on, with rows left out there"
                        f" for {PAUSE:.0f} s at a time; {METRICS} has all"
                    )
                failed_at = time.monotonic()

        return tried

    for name in ("log_metrics", "save", "finalize"):
        setattr(logger, name, guarded(name, getattr(logger, name)))
    return logger


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _rows_before(path: Path, step: int) -> list[dict[str, str]]:
    """Rows of a CSV file before a step; without a truncated last line, and none if the file is damaged."""
    if not path.is_file():
        return []
    try:
        whole = path.read_text()
        rows = csv.DictReader(whole[: whole.rfind("\n") + 1].splitlines())
        # Validation has separate rows, in which the columns of training are empty, and vice versa.
        kept = [{name: value for name, value in row.items() if value} for row in rows]
        return [row for row in kept if _step_of(row) < step]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        ranks.say(f"warning: {path}: damaged ({error}); the curve begins anew")
        return []


def _step_of(row: dict[str, str]) -> float:
    """The step of a row; raises ValueError if a value is not a number."""
    return {name: float(value) for name, value in row.items()}["step"]


def _wandb(config: TrainConfig, folder: Path, first_step: int) -> Logger:
    """W&B; offline without a key, so that it never prompts, and if its server cannot be reached.

    `wandb sync` uploads an offline run later. A resumed training continues the same run.
    """
    from wandb.errors import Error as WandbError

    kept = folder / RUN_ID
    run = kept.read_text() if first_step and kept.is_file() else secrets.token_hex(4)
    write_text(kept, run)
    if not os.environ.get("WANDB_MODE", "offline"):
        del os.environ["WANDB_MODE"]  # W&B does not accept an empty value
    mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
    try:
        return _wandb_run(config, folder, run, mode)
    except WandbError as error:
        said = " ".join(str(error).split())
        ranks.say(f"warning: W&B: {said}; the curve is kept in {folder}/wandb, for wandb sync to upload later")
        run = secrets.token_hex(4)  # the failed run has taken the other id
        write_text(kept, run)
        return _wandb_run(config, folder, run, "offline")


def _wandb_run(config: TrainConfig, folder: Path, run: str, mode: str) -> Logger:
    """A W&B logger, started at once so that its errors show now."""
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(
        project=config.logger.project,
        entity=config.logger.entity,
        name=f"{config.study.name}-{config.domain.name}",
        version=run,
        save_dir=folder,
        mode=mode,  # not `offline=`, which Lightning would set in the environment for all later runs
    )
    _ = logger.experiment  # starts it
    return logger


def _has_wandb_key() -> bool:
    """Whether W&B could log in without asking: a key in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False


def _tensorboard(_: TrainConfig, folder: Path, first_step: int) -> Logger:
    """TensorBoard, which hides values of earlier runs from `purge_step` on."""
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(folder, name="", version="tensorboard", purge_step=first_step)


def _mlflow(config: TrainConfig, folder: Path, first_step: int) -> Logger:
    """MLflow: to a server if one is configured, else into `<folder>/mlflow.db`, which `mlflow ui` reads.

    A training that goes on does so in the same run, if it goes on at the same server.
    """
    from lightning.pytorch.loggers import MLFlowLogger

    folder.mkdir(parents=True, exist_ok=True)
    server = config.logger.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    place = server or f"sqlite:///{folder}/mlflow.db"
    kept = folder / MLFLOW_RUN_ID
    run, _, of = kept.read_text().partition(" ") if first_step and kept.is_file() else ("", "", "")
    logger = MLFlowLogger(
        config.study.name,
        run_name=config.domain.name,
        tracking_uri=place,
        artifact_location=None if server else str(folder / "mlflow"),
        run_id=run if run and of == place else None,
    )
    write_text(kept, f"{logger.run_id} {place}")  # reading run_id begins the run
    return logger
