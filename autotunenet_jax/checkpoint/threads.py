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
        self._thread: threading.Thread | None = None
        self._all.add(self)

    def start(self, work: Callable[..., None], *args: Any, name: str) -> None:
        """Starts a thread; the one before must have been joined."""
        self._thread = threading.Thread(target=work, args=args, name=name, daemon=False)
        self._thread.start()

    def join(self) -> None:
        """Waits for the thread, if there is one."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @property
    def is_running(self) -> bool:
        """Whether the thread is at work."""
        thread = self._thread
        return thread is not None and thread.is_alive()

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
