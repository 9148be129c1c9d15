"""The engine, loaded when the first tuner is made: importing this package takes neither JAX's time nor its memory.

JAX is kept on the CPU, and off the accelerator's memory, before it is imported. A process that is forked after JAX has
begun to work has none of its threads, and would wait for them for ever.

Attributes of this module are `autotunenet_jax`, its `hosting`, and the modules of this package that are built on their
classes. Other modules reach them through here; what they need for annotations alone they import for type checkers.
"""

import importlib
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import autotunenet_jax as atn
    from autotunenet_jax import hosting

    from . import checkpoint, host, notices, serialization, sound_session

__all__ = ["atn", "check_process", "checkpoint", "host", "hosting", "notices", "serialization", "sound_session"]

# JAX reads the variable once, on import: whoever imported JAX earlier, or set the variable, has made the choice.
if "jax" not in sys.modules:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

_MODULES = {
    "atn": "autotunenet_jax",
    "hosting": "autotunenet_jax.hosting",
    **{name: f"{__package__}.{name}" for name in ("checkpoint", "host", "notices", "serialization", "sound_session")},
}


_is_forked = False


def _has_begun() -> bool:
    """Whether JAX has begun to work in this process, or had in the one that this was forked from."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bool(getattr(bridge, "_backends", None))


def _after_fork() -> None:
    global _is_forked
    _is_forked = _has_begun()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


def check_process() -> None:
    """Refuses to tune in a process whose threads have stayed in its parent.

    Raises:
      RuntimeError: The process was forked from one in which JAX had begun to work.
    """
    if _is_forked:
        raise RuntimeError(
            "this process was forked from one that had trained with a tuner, or used JAX, and JAX's threads have "
            "stayed there: it would wait for them for ever. Start processes with "
            "multiprocessing.get_context('spawn') or 'forkserver', or train in the parent only after they have begun."
        )


def _prepare() -> None:
    """To be called before JAX is used here: processes that are forked later never call it, and are not warned."""
    if _has_begun():
        return
    warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
    # A user's own filters would show the warning again.
    from jax._src import xla_bridge

    if hasattr(xla_bridge, "_at_fork_handler_installed"):
        xla_bridge._at_fork_handler_installed = True


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _prepare()
    module = globals()[name] = importlib.import_module(_MODULES[name])
    return module
