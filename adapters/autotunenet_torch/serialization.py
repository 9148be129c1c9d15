"""A training on disk, without pickle: one run of bytes and a description of what lies where in it."""

import collections
import json
import math
import os
from typing import Any

import jax
import numpy as np
import torch

import autotunenet_jax as atn

from . import distributed

_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


class _Writer:
    """Turns a tree into JSON and a list of byte strings."""

    def __init__(self):
        self.parts: list[np.ndarray] = []
        self.size = 0

    def encode(self, value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, np.ndarray):
            return {"numpy": self._tensor(torch.from_numpy(np.ascontiguousarray(value)))}
        if isinstance(value, np.generic):
            return value.item()
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, collections.Counter):
            return {"counter": [[self.encode(k, path), v] for k, v in value.items()]}
        if isinstance(value, dict):
            return {"dict": [[self.encode(k, path), self.encode(v, f"{path}/{k}")] for k, v in value.items()]}
        if isinstance(value, collections.deque):
            return {"deque": [[self.encode(inner, path) for inner in value], value.maxlen]}
        if isinstance(value, tuple):
            return {"tuple": [self.encode(inner, path) for inner in value]}
        if isinstance(value, list):
            return [self.encode(inner, path) for inner in value]
        raise TypeError(
            f"{path} holds a {type(value).__name__}, which cannot be stored without pickle. Snapshots take tensors, "
            "numbers, text, and dictionaries, lists and tuples of them."
        )

    def _tensor(self, tensor: torch.Tensor) -> dict[str, Any]:
        if tensor.is_meta:
            return {"meta": [str(tensor.dtype), list(tensor.shape)]}
        if tensor.layout == torch.sparse_coo:
            indices, values = tensor.detach()._indices(), tensor.detach()._values()
            return {"coo": [self._tensor(indices), self._tensor(values), list(tensor.shape)]}
        if tensor.layout == torch.sparse_csr:
            parts = (tensor.crow_indices(), tensor.col_indices(), tensor.detach().values())
            return {"csr": [*map(self._tensor, parts), list(tensor.shape)]}
        host = tensor.detach().to("cpu").contiguous()
        data = host.reshape(-1).view(torch.uint8).numpy() if host.numel() else np.zeros(0, np.uint8)
        spec = {"tensor": [self.size, data.size, str(tensor.dtype), list(tensor.shape)]}
        self.parts.append(data)
        self.size += data.size
        return spec


def _decode(value: Any, data: np.ndarray) -> Any:
    if isinstance(value, list):
        return [_decode(inner, data) for inner in value]
    if not isinstance(value, dict):
        return value
    ((kind, body),) = value.items()
    if kind == "tensor":
        offset, size, dtype, shape = body
        raw = torch.from_numpy(data[offset : offset + size].copy())
        empty = torch.empty(shape, dtype=_DTYPES[dtype])
        return raw.view(_DTYPES[dtype]).reshape(shape) if size else empty
    if kind == "meta":
        return torch.empty(body[1], dtype=_DTYPES[body[0]], device="meta")
    if kind == "coo":
        return torch.sparse_coo_tensor(_decode(body[0], data), _decode(body[1], data), body[2])
    if kind == "csr":
        return torch.sparse_csr_tensor(*(_decode(part, data) for part in body[:3]), size=body[3])
    if kind == "numpy":
        return _decode(body, data).numpy()
    if kind == "counter":
        return collections.Counter({_decode(k, data): v for k, v in body})
    if kind == "deque":
        return collections.deque((_decode(inner, data) for inner in body[0]), body[1])
    if kind == "dict":
        return {_decode(k, data): _decode(v, data) for k, v in body}
    return tuple(_decode(inner, data) for inner in body)


def save(store: atn.Snapshots, step: int, tree: Any, *, metric: float | None = None, wait: bool = False) -> int:
    """Saves a tree of tensors and plain data, in the background; returns the snapshot's id.

    Cost: two copies to host memory.
    """
    writer = _Writer()
    skeleton = json.dumps(writer.encode(tree, "state"))
    data = np.concatenate(writer.parts) if writer.parts else np.zeros(0, np.uint8)
    return store.save(step, {"data": data, "skeleton": skeleton}, metric=metric, wait=wait)


def restore(store: atn.Snapshots, *, at_most: float = math.inf) -> tuple[int, Any] | None:
    """The step and the tree of the latest sound snapshot up to a step; None when there are none.

    Raises:
      SnapshotDamagedError: There were some, and all are damaged.
      SnapshotMismatchError: They are of another search space.
    """
    records = [record for record in reversed(store.records()) if not record.is_abandoned and record.step <= at_most]
    for record in records:
        like = {"data": np.zeros(0, np.uint8), "skeleton": ""}
        like["data"] = jax.ShapeDtypeStruct((record.size_bytes,), np.uint8)
        try:
            step, tree = store.restore(like, which=record.id)
        except (atn.SnapshotDamagedError, atn.NoSnapshotError):
            continue
        return step, _decode(json.loads(str(tree["skeleton"])), np.asarray(tree["data"]))
    if records:
        raise atn.SnapshotDamagedError(f"No sound snapshot is left in {store.folder}; see the warnings.")
    return None


def restore_together(store: atn.Snapshots) -> tuple[int, Any] | None:
    """`restore` on every process of a distributed training: the latest step that all of them have.

    Processes write on their own, so one that is killed may be a snapshot behind the others.

    Raises:
      SnapshotDamagedError, SnapshotMismatchError: As `restore`, on every process where it is so on one.
    """
    at_most = math.inf
    while True:
        found, failure = None, None
        try:
            found = restore(store, at_most=at_most)
        except (atn.SnapshotDamagedError, atn.SnapshotMismatchError) as error:
            failure = error
        told = distributed.gather(-1 if found is None else found[0], failure is not None)
        if failure is not None:
            raise failure
        if lost := [rank for rank, (_, has_failed) in enumerate(told) if has_failed]:
            raise atn.SnapshotDamagedError(f"Rank {lost[0]} has no sound snapshot to go on from; see its error.")
        steps = [int(step) for step, _ in told]
        if len(set(steps)) == 1:
            return found
        at_most = min(steps)


def open_store(snapshots: Any, tuner: Any) -> tuple[atn.Snapshots | None, bool]:
    """The folder of snapshots, one per process, and whether it was opened here."""
    if snapshots is None or isinstance(snapshots, atn.Snapshots):
        return snapshots, False
    folder = os.fspath(snapshots)
    if distributed.is_distributed():
        folder = os.path.join(folder, f"rank{distributed.rank()}")
    return atn.Snapshots(folder, mode=tuner.mode, space=tuner.space), True
