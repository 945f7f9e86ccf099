"""What tells a training to end: SIGTERM, as from a scheduler that wants the machine back, and Ctrl-C."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from branchmerge.student import ranks


class ToldToEndError(Exception):
    """Leaves what is done between two steps; the next run does it again."""


class Ending:
    """From `listen` on such a signal is noted, for others to end the training when nothing is lost by it.

    One that came too late for them ends the program where this context ends, with the status that the signal has.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        """The one that came"""
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # Of several processes, whoever started them gets Ctrl-C too, and tells them in its way. What a script
            # started in the background ignores it, and goes on to do so.
            alone = ranks.world() == 1 and signal.getsignal(signal.SIGINT) != signal.SIG_IGN
            numbers = (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGTERM,)
            self._former = {number: signal.getsignal(number) for number in numbers}
        return self

    def listen(self) -> None:
        for number in self._former:
            signal.signal(number, self._take_note)

    def told(self) -> bool:
        """Whether any process was; all of them ask this together."""
        return ranks.summed(self.signal is not None) != [0]

    def check(self, steps_left: int) -> None:
        """Raise ToldToEndError where one was; after the last step there is no run that would do it again."""
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
        """To end with; perhaps another process was told."""
        return 128 + (self.signal or signal.SIGTERM)

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        """Whoever presses Ctrl-C twice does not want to wait."""
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._former[signal.SIGINT])
            ranks.say("\ninterrupted: ending when nothing is lost by it; once more to end at once")
