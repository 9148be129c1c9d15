"""Forks of one run on Ray actors."""

import itertools
import logging
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import ray
import ray.exceptions

from autotunenet_jax.hosting import MAX_FORKS, ForkExecutor, TrainedFork, pack, unpack, whole_number

from .member import Member

_log = logging.getLogger("autotunenet")

# How often a fork is given to members before the run trains it itself.
_ATTEMPTS = 2


class Population(ForkExecutor):
    """Members of one run: Ray actors that train the forks of a round at the same time.

    All members of a round begin from one snapshot of the training state and see the same batches, each at
    hyperparameters of its own; the run's one surrogate judges them by these paired scores, and what the best of them
    became is the snapshot that all begin from next. Between rounds the run trains by itself and members wait.

    A member that dies loses its fork and nothing else: another member trains the fork again, or the run itself where
    there is none, and Ray starts the member anew.

    Example::

        with Population(4, actor_options={"num_gpus": 1}) as members:
            result = atn.fit(train_step, state, batches, tuner=tuner, parallel_forks=members)

    Args:
      members: How many, 2 to 8. More than three are seldom all of use.
      actor_options: Options of ``ray.remote`` for each member, as ``{"num_gpus": 1}``; by default one CPU each, and
        as many restarts as it takes.
      patience: Seconds that the first round waits for members to come up. Those that find no place by then are waited
        for no longer, and the others train their forks too.

    Attributes:
      lost_forks: How many forks no member could train.

    Raises:
      ValueError: ``members`` is out of range.

    Cost:
      A state is sent to each member and back for a fork, the batches of a fork once for a round; the last step of each
      fork that is asked for is trained by the run. Decisions are those of one fork after the other, up to rounding.

    Source: population based training, Jaderberg et al. 2017, whose exploit is to copy the best member's state, and PB2,
      Parker-Holder et al. 2020, whose explore step asks a Gaussian process.
    """

    def __init__(self, members: int = 4, *, actor_options: Mapping[str, Any] | None = None, patience: float = 120.0):
        # A round has no more forks.
        self.count, self.lost_forks = whole_number("members", members, least=2, most=MAX_FORKS), 0
        self._options = {"num_cpus": 1, "max_restarts": -1, **(actor_options or {})}
        self._patience, self._waits = patience, 0.0
        self._actors: list[Any] = []
        # Members that are still to come up, by what says that they have.
        self._awaited: dict[Any, Any] = {}
        self._up: list[Any] = []

    @property
    def description(self) -> str:
        """How many actors there are."""
        return f"by {self.count} Ray actors"

    def start(self, train_step: Callable[..., Any], state: Any, *, has_aux: bool) -> None:
        """Starts the members; those of an earlier run end. Ray is started on this machine where it does not run yet.

        Raises:
          TypeError: ``train_step`` or a node of ``state`` cannot be sent to another process.
        """
        self.close()
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        structure = jax.tree.map(lambda _: 0, state)
        _check_sendable(train_step, structure)
        actor = ray.remote(**self._options)(Member)
        self._actors = [actor.remote(train_step, structure, has_aux=has_aux) for _ in range(self.count)]
        self._awaited = {actor.__ray_ready__.remote(): actor for actor in self._actors}
        self._waits = self._patience

    def train(
        self,
        state: Any,
        hyperparams: Mapping[str, Any],
        batch: Callable[[int], Any],
        *,
        steps: int,
        count: int,
    ) -> list[TrainedFork | None]:
        """Forks, dealt out to the members that are up; None where two of them died of one, or where it failed."""
        begun = ray.put(pack(state))
        batches = ray.put([jax.device_get(batch(pos)) for pos in range(steps)])
        values = {name: np.asarray(rows)[:steps] for name, rows in hyperparams.items()}
        forks: dict[int, TrainedFork] = {}
        for _ in range(_ATTEMPTS):
            members = self._members()
            missing = [number for number in range(count) if number not in forks]
            # Nothing of this waits.
            asked = [
                (number, member, member.train.remote(begun, {k: v[:, number] for k, v in values.items()}, batches))
                for number, member in zip(missing, itertools.cycle(members), strict=False)
            ]
            for number, member, answer in asked:
                fork = self._answer(member, answer, state)
                if fork is not None:
                    forks[number] = fork
        self.lost_forks += count - len(forks)
        return [forks.get(number) for number in range(count)]

    def close(self) -> None:
        """Ends the members; the next run starts others. Ray itself runs on."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._awaited, self._up = [], {}, []

    def __enter__(self) -> "Population":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _members(self) -> list[Any]:
        """Those that are up."""
        if self._awaited:
            is_up, _ = ray.wait(list(self._awaited), num_returns=len(self._awaited), timeout=self._waits)
            self._up += [self._awaited.pop(answer) for answer in is_up]
            if self._awaited and self._waits:
                _log.warning(
                    "%d of %d members are up after %g s; the cluster may have no room for more",
                    len(self._up), self.count, self._waits,
                )  # fmt: skip
            # Once is enough: from here on those are taken that are there.
            self._waits = 0.0
        return self._up

    def _answer(self, member: Any, answer: Any, like: Any) -> TrainedFork | None:
        try:
            heard, parcel = ray.get(answer)
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            _log.warning("a member lost a fork, which is trained again: %s", reason)
            if isinstance(error, ray.exceptions.RayActorError) and member in self._up:
                # Ray starts it anew.
                self._up.remove(member)
                self._awaited[member.__ray_ready__.remote()] = member
            return None
        return TrainedFork(heard, unpack(parcel, like))


def _check_sendable(train_step: Callable[..., Any], structure: Any) -> None:
    for name, value in (("train_step", train_step), ("the state's structure", structure)):
        try:
            ray.cloudpickle.dumps(value)
        except (TypeError, ValueError, AttributeError, pickle.PicklingError) as error:
            raise TypeError(
                f"{name} cannot be sent to the members of a population, which are processes of their own: {error}. "
                "Leave locks, files, loaders and the like out of what it refers to."
            ) from error
