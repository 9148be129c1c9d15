"""`flax.serialization` of a tuned state, which goes by the fields of a state and not by its leaves."""

import sys

from ..compiler import packing
from .state import Settings


def register() -> None:
    """Tells it, where the user's program has it, that what is static is no data: it is that of the state restored to.

    Whether the arrays are of the same run is seen at the next update, see `budget.check`.
    """
    serialization = sys.modules.get("flax.serialization")
    if serialization is None:
        return
    for kind in (Settings, packing.Layout):
        serialization.register_serialization_state(kind, lambda _: {}, lambda like, _: like, override=True)
