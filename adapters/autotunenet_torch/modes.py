"""Whether modules are in training mode, each by itself."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Whatever is done inside, every module ends in the mode it was in: a frozen backbone stays in evaluation mode."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training
