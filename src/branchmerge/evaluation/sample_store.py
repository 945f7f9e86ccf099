"""Responses on disk as they come: JSON lines that are only ever appended to, so that a killed run loses none.

A line answers a request if it has the request's key (see `Request.key`) and the same files beside the weights.
Responses drawn with other parameters, from another model or for another task stay in the file and are not used.
A last line that was cut off, by a kill or a full disk, is removed.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from branchmerge.errors import UserError
from branchmerge.evaluation.requests import Request, Response
from branchmerge.files import writing


class SampleStore:
    """The responses of one model to one task; one process at a time may add to it (see `study.locked`)."""

    def __init__(self, path: Path, facts: Mapping[str, Any], model_files: str = "", read_only: bool = False) -> None:
        """
        Args:
            facts: what decides a response besides the request: model, backend, task version
            model_files: see `Model.files`; not part of the key, so that lines older than this field stay valid
            read_only: do not repair the file, as another process may be appending to it

        Raises:
            UserError: it cannot be opened or read
        """
        self.path = path
        self.facts = dict(facts)
        self.model_files = model_files
        flags = os.O_RDONLY if read_only else os.O_RDWR | os.O_APPEND
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, flags | os.O_CREAT, 0o644)
        self._responses = self._load(read_only)

    def __enter__(self) -> "SampleStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def get(self, request: Request) -> Response | None:
        """The stored response to this request; None if there is none."""
        return self._responses.get(request.key(self.facts))

    def add(self, pairs: Sequence[tuple[Request, Response]]) -> None:
        """Append responses and wait until they are on the disk.

        Raises:
            UserError: the disk is full; what was stored before stays
        """
        keyed = [(request.key(self.facts), request, response) for request, response in pairs]
        lines = b"".join(self._line(key, request, response) for key, request, response in keyed)
        end = os.fstat(self._descriptor).st_size
        try:
            written = 0
            while written < len(lines):
                written += os.write(self._descriptor, lines[written:])
            os.fsync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, end)
            raise UserError(
                f"{self.path}: cannot store responses ({error.strerror}); make room on that disk"
            ) from error
        self._responses |= {key: response for key, _, response in keyed}

    def _load(self, read_only: bool) -> dict[str, Response]:
        found = {}
        whole = 0
        with self.path.open("rb") as lines:  # one by one, as the file may have gigabytes
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                try:
                    row = json.loads(line)
                    if row.get("model_files", self.model_files) == self.model_files:
                        found[row["key"]] = Response(row["text"], row["tokens"], row["finish"])
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise UserError(
                        f"{self.path}: line {number} is damaged ({error}); remove that line, its sample is drawn again"
                    ) from error
        if not read_only and whole < os.fstat(self._descriptor).st_size:
            os.ftruncate(self._descriptor, whole)
        return found

    def _line(self, key: str, request: Request, response: Response) -> bytes:
        row = {"key": key, "model_files": self.model_files, "question": request.question, "sample": request.sample,
               "seed": request.seed, "tokens": response.tokens, "finish": response.finish,
               "text": response.text}  # fmt: skip
        return json.dumps(row, ensure_ascii=True).encode() + b"\n"
