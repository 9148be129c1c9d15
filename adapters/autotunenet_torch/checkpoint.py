"""A run as tensors and plain data, for files."""

from collections.abc import Mapping
from typing import Any

import torch

from autotunenet_jax.hosting import TRAIN, Session

from . import distributed
from .host import TorchHost

_FORMAT = 10


def _check(session: Session, host: TorchHost, state: Mapping[str, Any], *, extend: bool) -> None:
    """Refuses a saved state of another format, split, search space or, unless it is to be extended, budget."""
    tuner = session.controller.tuner
    if state["format"] != _FORMAT:
        raise ValueError(f"the state has format {state['format']}; this version of the library reads {_FORMAT}.")
    parts, here = state["parts"], distributed.size() if host.is_sharded else 1
    if parts != here:
        raise ValueError(
            f"the state is one of {parts} parts of a training, and here there are {here}. Go on with as many processes "
            "as it was saved with, each with its own part."
        )
    if state["space"] != tuner.space.fingerprint():
        raise ValueError(
            f"the state is of another search space: {state['space']} in the state, {tuner.space.fingerprint()} here. "
            "Make the AutoTuneNet with the param_space, bounds included, that it had when the state was saved."
        )
    if state["total_steps"] != tuner.total_steps and not extend:
        raise ValueError(
            f"the state is of a run of {state['total_steps']} steps, and this one has {tuner.total_steps}. Train with "
            "the same budget, go on to this one with Trainer.fit(..., resume='extend'), load_state_dict(..., "
            "extend=True) or AutoTuneCallback(..., extend=True), or start afresh elsewhere."
        )


def _apart(copy: dict[str, Any] | None) -> dict[str, Any] | None:
    """A copy that keeps the scale it has now, whatever the next step notes in the one that is held."""
    return None if copy is None else {**copy, "training": dict(copy["training"])}


def state_dict(session: Session, host: TorchHost, *, is_whole: bool = False) -> dict[str, Any]:
    """The tuner's own state, with those copies of the training that are part of what is being decided.

    Args:
      session: Of the run.
      host: Likewise.
      is_whole: Whether the training itself is to be part of it, between two steps, and all copies.
    """
    controller = session.controller
    in_round, seen = controller.phase != TRAIN, controller.state.validation
    has_best = bool(seen.is_kept | seen.keeps)
    state = {
        "format": _FORMAT,
        "space": controller.tuner.space.fingerprint(),
        "total_steps": controller.tuner.total_steps,
        "controller": torch.from_numpy(controller.to_bytes()),
        "books": session.books(),
        "warm_up_end": host.warm_up.end,
        # Processes that share a model out each save their part of it.
        "parts": distributed.size() if host.is_sharded else 1,
        "saved": _apart(session.saved) if is_whole or in_round else None,
        "kept": _apart(session.kept) if is_whole or in_round or has_best else None,
        "behind": list(host.behind),
        "standings": host.standings(),
    }
    return {**state, "now": _apart(host.copy()), "best": session.best} if is_whole else state


def load_state_dict(session: Session, host: TorchHost, state: Mapping[str, Any], *, extend: bool) -> None:
    """Goes on from what `state_dict` gave, on request with another budget; what it does not hold is there already."""
    _check(session, host, state, extend=extend)
    host.loaded(state.get("standings", {}))
    now = _apart(state.get("now"))
    for held in (now, state["saved"], state["kept"]):
        if held is not None:
            host.state.check(held["training"])
    session.controller.from_bytes(state["controller"].numpy(), extend=extend)
    session.load(state["books"])
    host.warm_up.load(state["warm_up_end"])
    host.warm_up.in_round = session.controller.phase != TRAIN
    if now is not None:
        host.put_back(now)
        session.best = state["best"]
    host.values, host.behind = {}, list(state["behind"])
    session.write()
    for name in ("saved", "kept"):
        held = _apart(state[name])
        if held is not None:
            host.state.follow(held["training"])
        setattr(session, name, host.copy() if held is None else held)
