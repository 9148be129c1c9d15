"""Taking turns, and not losing the snapshot under way when the program ends."""

import concurrent.futures.thread  # noqa: F401  # registers its own exit hook before ours, which must run first
import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar

_Self = TypeVar("_Self", bound=Any)
_Result = TypeVar("_Result")
_Arguments = ParamSpec("_Arguments")


def in_turn(
    method: Callable[Concatenate[_Self, _Arguments], _Result],
) -> Callable[Concatenate[_Self, _Arguments], _Result]:
    """Lets one thread at a time into those methods of an object that are marked so; the lock is its ``_turn``."""

    @functools.wraps(method)
    def wrapper(self: _Self, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with self._turn:
            return method(self, *args, **kwargs)

    return wrapper


class ThreadHolder:
    """Holds at most one background thread at a time, and has it finished when the program ends.

    At exit, thread pools (Orbax uses several) take no more work before ordinary ``atexit`` hooks run: what is being
    written then would be lost without a word.
    """

    _all: ClassVar["weakref.WeakSet[ThreadHolder]"] = weakref.WeakSet()

    def __init__(self):
        # An event of our own: a `Thread.join` that a signal interrupts takes the thread for ended.
        self._ended: threading.Event | None = None
        self._all.add(self)

    def start(self, work: Callable[..., None], *args: Any, name: str) -> None:
        """Starts a thread; the one before must have been joined."""
        ended = threading.Event()

        def run() -> None:
            try:
                work(*args)
            finally:
                ended.set()

        threading.Thread(target=run, name=name, daemon=False).start()
        self._ended = ended

    def join(self) -> None:
        """Waits for the work under way, if there is any."""
        if self._ended is not None:
            self._ended.wait()
            self._ended = None

    @property
    def is_running(self) -> bool:
        """Whether work is under way."""
        return self._ended is not None and not self._ended.is_set()

    @classmethod
    def join_all(cls) -> None:
        """Waits for the threads of all holders."""
        for holder in list(cls._all):
            holder.join()


def _join_all_at_exit() -> None:
    # Python has no public hook that runs before thread pools close; without this one, a program should wait itself.
    register = getattr(threading, "_register_atexit", None)
    if register is not None:
        register(ThreadHolder.join_all)


_join_all_at_exit()
