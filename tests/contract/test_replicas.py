"""Replicas whose losses differ decide alike, and stay the same bit for bit."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from tests import devices

pytestmark = pytest.mark.timeout(300)

RUN = """
import json, sys
import conftest as toy
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import PartitionSpec as P
toy.lighten()
optimizer, count = toy.wrapped(axis_name="data"), jax.device_count()

def step(carry, key):
    params, opt_state = carry
    # Each replica has a batch, and so a loss, of its own.
    loss, grads = jax.value_and_grad(toy.loss_fn)(params, jax.random.fold_in(key, jax.lax.axis_index("data")))
    updates, opt_state = optimizer.update(jax.lax.pmean(grads, "data"), opt_state, params, value=loss)
    return (optax.apply_updates(params, updates), opt_state), loss[None]

params = toy.make_params()
carry = (params, optimizer.init(params))
if sys.argv[1] == "pmap":
    run, carry = jax.pmap(step, "data", in_axes=(0, None)), jax.tree.map(lambda leaf: jnp.stack([leaf] * count), carry)
else:
    mesh = jax.make_mesh((count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P()), out_specs=(P(), P("data")), check_vma=False))
for key in toy.draws():
    carry, losses = run(carry, key)
if sys.argv[1] == "pmap":
    states = [jax.tree.map(lambda leaf: leaf[number], carry) for number in range(count)]
else:
    states = [jax.tree.map(lambda leaf: leaf.addressable_shards[number].data, carry) for number in range(count)]

def bits(tree):
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    leaves = [jax.random.key_data(leaf) if is_key(leaf) else leaf for leaf in jax.tree.leaves(tree)]
    return b"".join(np.asarray(leaf).tobytes() for leaf in leaves)

print(json.dumps({
    "replicas": len({bits(state) for state in states}),
    "losses": len(set(np.asarray(losses).ravel().tolist())),
    "rounds": toy.rounds_begun(states[0][1].tuner),
}))
"""


@pytest.mark.parametrize("kind", [pytest.param("pmap", marks=pytest.mark.soak), "shard_map"])
def test_losses_that_differ_are_averaged(kind):
    out = devices.run(RUN, kind, count=4, folders=[pathlib.Path(__file__).parent], timeout=280)
    assert (out["replicas"], out["losses"]) == (1, 4)
    assert out["rounds"] >= 1


@pytest.mark.parametrize("axis_name", [None, "data", ("data",)])
def test_a_loss_known_to_differ_is_refused_unless_it_is_averaged(toy, axis_name):
    optimizer, params = toy.wrapped(axis_name=axis_name), toy.make_params()
    whole, part = PartitionSpec(), PartitionSpec("data")

    def step(params, opt_state, losses):
        return optimizer.update(params, opt_state, params, value=losses[0])

    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(whole, whole, part), out_specs=whole)
    arguments = params, optimizer.init(params), jnp.ones(1)
    if axis_name is None:
        with pytest.raises(ValueError, match=r"along 'data'.*axis_name='data'"):
            jax.eval_shape(mapped, *arguments)
    else:
        updates, _ = jax.eval_shape(mapped, *arguments)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
