"""Warnings that point at the user's line."""

import sys
import warnings

_PACKAGES = ("autotunenet_jax", "autotunenet_torch", "autotunenet_flax", "autotunenet_ray")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns, pointing at the line outside the library, however deep in it this is called."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).split(".")[0] in _PACKAGES:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
