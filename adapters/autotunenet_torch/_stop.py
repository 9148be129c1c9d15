"""Ctrl-C as a request."""

import signal
import threading
from typing import Any


class Stop:
    """Turns the first Ctrl-C into a request to stop after the current step; the second one raises."""

    def __init__(self):
        self.is_requested = False
        self._previous: Any = None

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.getsignal(signal.SIGINT)
            if callable(self._previous):
                signal.signal(signal.SIGINT, self._handle)
        return self

    def _handle(self, signum: int, frame: Any) -> None:
        if self.is_requested:
            raise KeyboardInterrupt
        self.is_requested = True

    def __exit__(self, *exception: object) -> None:
        if callable(self._previous):
            signal.signal(signal.SIGINT, self._previous)
