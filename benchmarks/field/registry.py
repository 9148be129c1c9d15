"""The list of cases, and what runs one of them."""

import dataclasses
import signal
import time
import traceback
import warnings
from collections.abc import Callable

Outcome = tuple[str, str, bool]
"""What is expected, what was got, and whether that will do."""

_LIMIT_S = 240


@dataclasses.dataclass(frozen=True)
class Case:
    """One small run.

    Attributes:
      kind: Letter of the kind of fault.
      name: Of the function.
      way: Way into the library, as the function is told.
      is_short: Whether it is part of the short form.
      function: Runs it.
    """

    kind: str
    name: str
    way: str
    is_short: bool
    function: Callable[[str], Outcome]


CASES: list[Case] = []


def case(kind: str, *ways: str, short: tuple[str, ...] = ()) -> Callable[[Callable[[str], Outcome]], Callable]:
    """Registers ``function(way)`` once for each way in."""

    def register(function: Callable[[str], Outcome]) -> Callable[[str], Outcome]:
        name = function.__name__.strip("_").replace("_", " ")
        CASES.extend(Case(kind, name, way, way in short, function) for way in ways)
        return function

    return register


class CaseTimeoutError(BaseException):
    """A case took too long; no handler of the library's takes it for an error of training."""


def _time_out(*_: object) -> None:
    raise CaseTimeoutError


def run(one: Case) -> tuple[str, str, bool, float]:
    """Runs a case: what was expected, what was got, whether that will do, and seconds."""
    start = time.monotonic()
    before = signal.signal(signal.SIGALRM, _time_out)
    signal.alarm(_LIMIT_S)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected, got, is_ok = one.function(one.way)
    except CaseTimeoutError:
        expected, got, is_ok = f"an end within {_LIMIT_S} s", "none", False
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:160]
        expected, got = (
            "no error",
            f"{type(error).__name__}: {text} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})",
        )
        is_ok = False
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return expected, got, bool(is_ok), time.monotonic() - start
