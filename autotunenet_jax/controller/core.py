"""The controller's compiled functions, and what they depend on besides their arguments."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..compiler.one_turn import when
from ..compiler.precision import in_float32
from ..compiler.seldom_run import seldom_run
from ..compiler.sequential_vmap import sequential_vmap
from ..space.search_space import SearchSpace
from . import decision, outlook, schedule, tick, validation_monitor
from .loss_monitor import Guard
from .roles import roles_of
from .state import Directive, Round, TunerState


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Core:
    """Everything static that the compiled functions depend on; tuners with equal cores share compilations."""

    space: SearchSpace
    guard: Guard
    shape: schedule.Shape
    warmup_steps: int

    @in_float32
    def hyperparams(self, ts: TunerState) -> dict[str, Array]:
        """Values in force for the next step, by name."""
        return schedule.in_force(self.space, self.shape, self.warmup_steps, ts)

    @in_float32
    def schedule(self, ts: TunerState) -> Float[Array, ""]:
        """The factor on the rates outside forks."""
        return schedule.factor(self.shape, self.warmup_steps, ts)

    def tick(self, ts: TunerState, loss: Any) -> tuple[TunerState, Directive, Array]:
        """Takes one loss in; also says whether a decision is due."""
        return tick.tick(self.guard, self.space, ts, jnp.asarray(loss, jnp.float32))

    def outlook(self, ts: TunerState) -> outlook.Outlook:
        """Losses to come that will need no answer."""
        return outlook.outlook(self.guard, self.space, self.shape, self.warmup_steps, ts)

    @in_float32
    @sequential_vmap(static_argnums=(0,))
    def decide(self, ts: TunerState) -> tuple[TunerState, Directive, Round]:
        """The decision; also the round as it was decided on."""
        return decision.decide(self.space, ts)

    def update(self, ts: TunerState, loss: Array) -> tuple[TunerState, Directive]:
        """`tick`, and the decision where one is due."""
        ts, directive, due = self.tick(ts, loss)

        def decided(ts: TunerState, first: Directive) -> tuple[TunerState, Directive]:
            ts, second, _ = self.decide(ts)
            return ts, second._replace(verdict=first.verdict)

        return when(due, decided, ts, directive)

    def is_wrecked(self, ts: TunerState, loss: Any) -> Array:
        """Whether the loss of a state, in ordinary training, says that the state is not worth keeping."""
        return tick.is_wrecked(self.guard, ts, loss)

    @in_float32
    def observe_eval(self, ts: TunerState, metric: Array) -> TunerState:
        """Takes a validation metric in, to be minimised."""
        return validation_monitor.observe(roles_of(self.space), ts, jnp.asarray(metric, jnp.float32))


@functools.partial(seldom_run, static_argnums=0, donate_argnums=1)
def decide_jit(core: Core, ts: TunerState) -> tuple[TunerState, Directive, Round, Bool[Array, ""]]:
    """`Core.decide` and `kept_at_once`, compiled once per core and donated."""
    ts, directive, held = core.decide(ts)
    ts, keeps = validation_monitor.kept_at_once(ts)
    return ts, directive, held, keeps


@functools.partial(jax.jit, static_argnums=0)
def hyperparams_jit(core: Core, ts: TunerState) -> dict[str, Array]:
    """`Core.hyperparams`, compiled once per core."""
    return core.hyperparams(ts)
