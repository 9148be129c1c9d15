"""The random number generators that a training step draws from."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """The states of PyTorch's generators (CPU, and CUDA where it is in use), NumPy's global one and Python's."""
    state = _capture_host()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _capture_host() -> dict[str, Any]:
    numpy_state = np.random.get_state(legacy=False)
    return {"torch": torch.get_rng_state(), "numpy": numpy_state, "python": random.getstate()}


def restore(state: dict[str, Any]) -> None:
    """Puts back what `capture` gave."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
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


def to_plain(state: dict[str, Any]) -> dict[str, Any]:
    """As tensors and plain data, for a file."""
    numpy_state = state["numpy"]
    version, words, gauss = state["python"]
    return {
        "torch": state["torch"],
        "cuda": list(state.get("cuda", [])),
        "numpy_key": torch.from_numpy(np.asarray(numpy_state["state"]["key"], np.int64)),
        "numpy": [
            int(numpy_state["state"]["pos"]),
            int(numpy_state["has_gauss"]),
            float(numpy_state["gauss"]),
        ],
        "python": [version, list(words), gauss],
    }


def from_plain(plain: dict[str, Any]) -> dict[str, Any]:
    """What `to_plain` was given."""
    pos, has_gauss, gauss = plain["numpy"]
    version, words, python_gauss = plain["python"]
    state: dict[str, Any] = {
        "torch": plain["torch"],
        "numpy": {
            "bit_generator": "MT19937",
            "state": {"key": plain["numpy_key"].numpy().astype(np.uint32), "pos": pos},
            "has_gauss": has_gauss,
            "gauss": gauss,
        },
        "python": (version, tuple(words), python_gauss),
    }
    if plain["cuda"]:
        state["cuda"] = plain["cuda"]
    return state
