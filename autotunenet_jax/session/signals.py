"""Signals that ask a run to end."""

import signal
import threading
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the current step; a second one raises.

    Only the main thread can take signals over; elsewhere nothing is changed. A signal that the process ignores, as one
    started in the background does Ctrl-C, stays ignored.
    """

    def __init__(self):
        self.is_requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # A handler that was not set from Python cannot be put back.
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, signum: int, frame: Any) -> None:
        if self.is_requested:
            raise KeyboardInterrupt
        self.is_requested = True

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
