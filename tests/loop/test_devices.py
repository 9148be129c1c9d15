"""Runs whose batches are spread over several devices."""

from tests import devices

RUN = """
import json
import jax, jax.numpy as jnp
import autotunenet_jax as atn
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

jax.config.update("jax_disable_most_optimizations", False)
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
x = jax.device_put(jax.random.normal(jax.random.key(0), (64, 4)), NamedSharding(mesh, P("data")))
params = jax.device_put(jnp.zeros(4), NamedSharding(mesh, P()))

def loss_of(params, x):
    return jnp.mean((x @ params - x.sum(1)) ** 2)

def step(params, x, hp):
    loss, grads = jax.value_and_grad(loss_of)(params, x)
    return params - hp["learning_rate"] * grads, loss

tuner = atn.AutoTuneNet({"learning_rate": (1e-4, 1.0)}, total_steps=200)
result = atn.fit(step, params, [x], tuner=tuner, eval_step=lambda params: loss_of(params, x), progress=False)
print(json.dumps([result.eval, len(result.history.rounds), len(result.state.sharding.device_set)]))
"""


def test_a_decision_needs_no_more_threads_than_there_are_devices():
    """Where XLA has one for each, whatever a program waits for must not need another."""
    loss, rounds, spread = devices.run(RUN, count=2, threads=2, timeout=60)
    assert loss < 1e-4 and rounds == 2 and spread == 2
