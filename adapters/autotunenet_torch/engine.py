"""The engine, loaded when the first tuner is made: importing this package takes neither JAX's time nor its memory.

Attributes of this module are `autotunenet_jax`, its `hosting`, and the modules of this package that are built on their
classes. Other modules reach them through here; what they need for annotations alone they import for type checkers.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import jax_platform

if TYPE_CHECKING:
    import autotunenet_jax as atn
    from autotunenet_jax import hosting

    from . import checkpoint, host, notices, serialization, sound_session

__all__ = ["atn", "checkpoint", "host", "hosting", "notices", "serialization", "sound_session"]

_MODULES = {
    "atn": "autotunenet_jax",
    "hosting": "autotunenet_jax.hosting",
    **{name: f"{__package__}.{name}" for name in ("checkpoint", "host", "notices", "serialization", "sound_session")},
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    jax_platform.prepare()
    module = globals()[name] = importlib.import_module(_MODULES[name])
    return module
