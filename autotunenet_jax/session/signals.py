"""What happens on SIGTERM and Ctrl-C: the step under way is finished, the run saved, and its loop left.

`Stop` only notes the signal; the loops, `_train` of ``loop/fit.py`` and `_run` of PyTorch's ``trainer.py``, look at
`Stop.is_requested` after each step.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Turns the first Ctrl-C or SIGTERM into a request to end after the step under way; a second one raises.

    Inside `shielded` a second one raises only where the run is `exposed`: in the user's own code and while something is
    awaited, where all that is known of the run fits together.

    Only the main thread can take signals over; elsewhere nothing is changed. A signal that the process ignores, as one
    started in the background does Ctrl-C, stays ignored.

    Attributes:
      is_requested: Whether the run is to end.
      name: Of the signal that asked first, such as ``"SIGTERM"``; empty before.
    """

    def __init__(self):
        self.is_requested, self.name = False, ""
        self._is_shielded = self._is_urgent = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # A handler that was not set from Python cannot be put back.
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, signum: int, frame: Any) -> None:
        if not self.is_requested:
            self.is_requested, self.name = True, signal.Signals(signum).name
        elif self._is_shielded:
            self._is_urgent = True
        else:
            raise KeyboardInterrupt

    def _set(self, is_shielded: bool) -> None:
        self._is_shielded = is_shielded
        if self._is_urgent and not is_shielded:
            self._is_urgent = False
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """Inside, a second signal waits until the run is exposed, or the shield is left."""
        self._set(True)
        try:
            yield
        finally:
            self._set(False)

    @contextlib.contextmanager
    def exposed(self) -> Iterator[None]:
        """Inside a shield, a stretch in which a second signal raises at once."""
        was_shielded = self._is_shielded
        self._set(False)
        try:
            yield
        finally:
            self._is_shielded = was_shielded

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
