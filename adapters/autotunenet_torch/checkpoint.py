"""A run as tensors and plain data, for files."""

from collections.abc import Mapping
from typing import Any

import torch

from autotunenet_jax.hosting import TRAIN, Session

from . import distributed, random_state
from .host import TorchHost

_FORMAT = 7


def to_plain(copy: Mapping[str, Any]) -> dict[str, Any]:
    """A copy made by a host, with the random generators' states as tensors and numbers."""
    training = copy["training"]
    return {**copy, "training": {**training, "rng": random_state.to_plain(training["rng"])}}


def from_plain(copy: Mapping[str, Any]) -> dict[str, Any]:
    """What `to_plain` was given."""
    training = copy["training"]
    return {**copy, "training": {**training, "rng": random_state.from_plain(training["rng"])}}


def _common(session: Session, host: TorchHost) -> dict[str, Any]:
    tuner = session.controller.tuner
    return {
        "format": _FORMAT,
        "space": tuner.space.fingerprint(),
        "total_steps": tuner.total_steps,
        "controller": torch.from_numpy(session.controller.to_bytes()),
        "books": session.books(),
        "warm_up_end": host.warm_up.end,
        # Processes that share a model out each save their part of it.
        "parts": distributed.size() if host.is_sharded else 1,
    }


def _load_common(session: Session, host: TorchHost, state: Mapping[str, Any], *, extend: bool) -> None:
    session.controller.from_bytes(state["controller"].numpy(), extend=extend)
    session.load(state["books"])
    host.warm_up.load(state["warm_up_end"])
    host.warm_up.in_round = session.controller.phase != TRAIN


def _check(session: Session, host: TorchHost, state: Mapping[str, Any], *, extend: bool) -> None:
    """Refuses a saved state of another format, split, search space or, unless it is to be extended, budget."""
    tuner = session.controller.tuner
    if state["format"] != _FORMAT:
        raise ValueError(f"the state has format {state['format']}; this version of the library reads {_FORMAT}.")
    parts, here = state.get("parts", 1), distributed.size() if host.is_sharded else 1
    if parts != here:
        raise ValueError(
            f"the state is one of {parts} parts of a training, and here there are {here}. Go on with as many processes "
            "as it was saved with, each with its own part."
        )
    if state["space"] != tuner.space.fingerprint():
        raise ValueError(
            "the state is of another search space. Make the AutoTuneNet with the param_space, bounds included, that it "
            "had when the state was saved."
        )
    if state["total_steps"] != tuner.total_steps and not extend:
        raise ValueError(
            f"the state is of a run of {state['total_steps']} steps, and this one has {tuner.total_steps}. Train with "
            "the same budget, go on to this one with Trainer.fit(..., resume='extend'), load_state_dict(..., "
            "extend=True) or AutoTuneCallback(..., extend=True), or start afresh elsewhere."
        )


def state_dict(session: Session, host: TorchHost) -> dict[str, Any]:
    """The tuner's own state, with those copies of the training that are part of what is being decided."""
    in_round = session.controller.phase != TRAIN
    seen = session.controller.state.validation
    has_best = bool(seen.is_kept | seen.keeps)
    return {
        **_common(session, host),
        "saved": to_plain(session.saved) if in_round else None,
        "kept": to_plain(session.kept) if in_round or has_best else None,
        "behind": list(host.behind),
    }


def load_state_dict(session: Session, host: TorchHost, state: Mapping[str, Any], *, extend: bool) -> None:
    """Goes on from what `state_dict` gave; the training state is there already."""
    _check(session, host, state, extend=extend)
    _load_common(session, host, state, extend=extend)
    host.values, host.behind = {}, list(state["behind"])
    session.write()
    for name in ("saved", "kept"):
        setattr(session, name, host.copy() if state[name] is None else from_plain(state[name]))


def snapshot(session: Session, host: TorchHost) -> dict[str, Any]:
    """The whole training with the tuner, between two steps."""
    copies = {"now": host.copy(), "saved": session.saved, "kept": session.kept}
    plain = {name: to_plain(copy) for name, copy in copies.items()}
    return {**_common(session, host), **plain, "best": session.best, "behind": list(host.behind)}


def resume(session: Session, host: TorchHost, tree: Mapping[str, Any], *, extend: bool) -> None:
    """Goes on from what `snapshot` gave, on request with another budget."""
    _check(session, host, tree, extend=extend)
    now = from_plain(tree["now"])
    host.state.check(now["training"])
    session.saved, session.kept, session.best = from_plain(tree["saved"]), from_plain(tree["kept"]), tree["best"]
    _load_common(session, host, tree, extend=extend)
    host.load(now)
    if session.controller.phase != TRAIN:
        host.behind = list(tree["behind"])
    session.write()
