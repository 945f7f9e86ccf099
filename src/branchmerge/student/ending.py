"""Signals that end a training: SIGTERM, as from a scheduler that needs the machine, and Ctrl-C."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from branchmerge.student import ranks


class ToldToEndError(Exception):
    """Interrupts work between two steps because a signal to end came; the next run repeats that work."""


class Ending:
    """From `listen` on, records a signal to end, so that callbacks can end the training at a point that loses nothing.

    If it comes too late for them, the program exits with the signal's status at the end of this context.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        """Number of the signal that came"""
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # With several processes, Ctrl-C also goes to the program that started them, which signals them itself. A
            # process that a script started in the background ignores Ctrl-C, and must continue to do so.
            alone = ranks.world() == 1 and signal.getsignal(signal.SIGINT) != signal.SIG_IGN
            numbers = (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGTERM,)
            self._former = {number: signal.getsignal(number) for number in numbers}
        return self

    def listen(self) -> None:
        for number in self._former:
            signal.signal(number, self._take_note)

    def told(self) -> bool:
        """Whether any process got a signal to end; all processes call this together."""
        return ranks.summed(self.signal is not None) != [0]

    def check(self, steps_left: int) -> None:
        """Raise ToldToEndError if any process was told to end; not after the last step, which no run would repeat."""
        if steps_left and self.told():
            raise ToldToEndError

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)
        if kind is None and self.signal is not None:
            raise SystemExit(self.status)

    @property
    def status(self) -> int:
        """Exit status of this process; SIGTERM's if another process got the signal."""
        return 128 + (self.signal or signal.SIGTERM)

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        """Record the signal; a second Ctrl-C then has its usual effect."""
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._former[signal.SIGINT])
            ranks.say("\ninterrupted: ending when nothing is lost by it; once more to end at once")
