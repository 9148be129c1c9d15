"""The random number generators that a training step draws from."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """The states of PyTorch's generators (CPU, and CUDA where it is in use), NumPy's global one and Python's.

    Tensors and plain data: they go into files as they are.
    """
    state = _capture_host()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _capture_host() -> dict[str, Any]:
    drawn = np.random.get_state(legacy=False)
    words = {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in drawn["state"].items()}
    return {"torch": torch.get_rng_state(), "numpy": {**drawn, "state": words}, "python": random.getstate()}


def restore(state: dict[str, Any]) -> None:
    """Puts back what `capture` gave."""
    torch.set_rng_state(state["torch"])
    drawn = state["numpy"]
    words = {name: v.numpy() if isinstance(v, torch.Tensor) else v for name, v in drawn["state"].items()}
    np.random.set_state({**drawn, "state": words})
    random.setstate(state["python"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


@contextlib.contextmanager
def untouched(*, seed: int | None = None) -> Iterator[None]:
    """Whatever is drawn inside leaves the CPU generators as they were; with a seed, they start from it inside."""
    before = _capture_host()
    if seed is not None:
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
    try:
        yield
    finally:
        restore(before)
