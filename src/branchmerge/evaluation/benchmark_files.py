"""Where a benchmark's questions come from: the hub at a pinned revision, or a folder with the files as downloaded.

hub          repository + revision -> huggingface_hub's cache
data_dir=D   D/<task>/<file>, as `hf download <repository> --repo-type dataset --local-dir D/<task>` leaves it
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from branchmerge.errors import UserError


@dataclass(frozen=True)
class HubFiles:
    """Files of one dataset repository."""

    task: str
    repository: str
    revision: str
    """A commit: what a benchmark asks must not change under its name."""
    files: tuple[str, ...]


AIME24 = HubFiles(
    "aime24", "Maxwell-Jia/AIME_2024", "8d88b2876a82a080e2f172cc9b25d0d9d2cb4792", ("aime_2024_problems.parquet",)
)
AIME25 = HubFiles("aime25", "math-ai/aime25", "563bb8404243c5f09de6ec262f2db674fe5bce9b", ("test.jsonl",))
MATH500 = HubFiles("math500", "HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", ("test.jsonl",))
GPQA = HubFiles("gpqa_diamond", "Idavidrein/gpqa", "633f5ee89ab8ad4522a9f850766b73f62147ffdd", ("gpqa_diamond.csv",))
LIVECODEBENCH_REVISION = "0fe84c3912ea0c4d4a78037083943e8f0c4dd505"
LIVECODEBENCH_RELEASES = {f"release_v{n}": n for n in range(1, 7)}
"""A release's number of files: each adds one to the release before."""


def livecodebench(release: str) -> HubFiles:
    """The files of a release; read as they are, because the repository's loading script is refused by datasets 4."""
    if release not in LIVECODEBENCH_RELEASES:
        known = ", ".join(LIVECODEBENCH_RELEASES)
        raise UserError(f"livecodebench_release={release}: there is no such release; use one of {known}")
    last = LIVECODEBENCH_RELEASES[release]
    files = tuple("test.jsonl" if number == 1 else f"test{number}.jsonl" for number in range(1, last + 1))
    return HubFiles("livecodebench", "livecodebench/code_generation_lite", LIVECODEBENCH_REVISION, files)


def rows(source: HubFiles, data_dir: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row with where it stands ("file:number"), file by file.

    Raises:
        UserError: a file is missing, cannot be downloaded or cannot be read
    """
    for name in source.files:
        path = _local(source, name, data_dir) if data_dir is not None else _download(source, name)
        try:
            for number, row in enumerate(_read(path), start=1):
                if not isinstance(row, dict):
                    raise ValueError(f"row {number} is no object")
                yield f"{path}:{number}", row
        except (ValueError, csv.Error, OSError) as error:  # JSON, Unicode and Arrow errors are ValueErrors
            raise UserError(
                f"{path} cannot be read ({error}); download it again: {_command(source, data_dir)}"
            ) from error


def _local(source: HubFiles, name: str, data_dir: str) -> Path:
    path = Path(data_dir) / source.task / name
    if not path.is_file():
        raise UserError(f"data_dir={data_dir} has no {source.task}/{name}; get it by: {_command(source, data_dir)}")
    return path


def _download(source: HubFiles, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source.repository, name, repo_type="dataset", revision=source.revision))
    except GatedRepoError as error:
        raise UserError(
            f"{source.repository} asks for your consent: accept its terms on https://huggingface.co/datasets/"
            f"{source.repository}, then run `hf auth login` with an account that did"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        why = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{name} of {source.repository} cannot be downloaded ({type(error).__name__}: {why}); where the hub cannot "
            f"be reached, bring the files and pass data_dir=<folder>: {_command(source, '<folder>')}"
        ) from error


def _command(source: HubFiles, data_dir: str | None) -> str:
    """The command that downloads the files; into the cache where there is no folder."""
    where = f"--local-dir {data_dir}/{source.task}" if data_dir is not None else "--force-download"
    files = " ".join(source.files)
    return f"hf download {source.repository} {files} --repo-type dataset --revision {source.revision} {where}"


def _read(path: Path) -> Iterator[Any]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        yield from pyarrow.parquet.read_table(path).to_pylist()
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as lines:
            yield from csv.DictReader(lines)
    else:
        with path.open(encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.strip())
