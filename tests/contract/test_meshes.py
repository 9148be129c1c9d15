"""On meshes a tuned run decides as on one device, is compiled as often, and nowhere keeps more than its share."""

import functools
import pathlib

import pytest

from tests import devices

pytestmark = pytest.mark.timeout(300)

RUN = """
import json, sys
import conftest as toy
import jax, jax.numpy as jnp, numpy as np, optax
import autotunenet_jax as atn
from autotunenet_jax.wrapper import trees
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
toy.lighten()
jax.config.update("jax_disable_most_optimizations", True)
compiled = []
note = lambda event, _, fun_name="", **rest: "backend_compile" in event and "step" in fun_name and compiled.append(1)
jax.monitoring.register_event_duration_secs_listener(note)
# Shape and axes of a mesh, and what of it hidden weights, output weights and the batch are spread over.
MESHES = {
    "sharded": ((8,), ("data",), P("data"), P("data"), P("data")),
    "tensor": ((4, 2), ("data", "model"), P(None, "model"), P("model"), P("data")),
    "both": ((2, 2, 2), ("data", "shard", "model"), P("shard", "model"), P("model"), P(("data", "shard"))),
}
x = jax.random.normal(jax.random.key(1), (64, 16))
y = jnp.tanh(x @ jnp.linspace(-1.0, 1.0, 16))

def loss_fn(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["hidden"]) @ params["out"] - y) ** 2)

def places(tree):
    return [str(leaf.sharding) for leaf in jax.tree.leaves(tree)]

def run(name):
    optimizer, batch = toy.wrapped(), (x, y)
    keys = jax.random.split(jax.random.key(2))
    params = {"hidden": 0.3 * jax.random.normal(keys[0], (16, 32)), "out": 0.3 * jax.random.normal(keys[1], (32,))}
    if name in MESHES:
        shape, axes, hidden, out, rows = MESHES[name]
        mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes))
        put = lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec))
        params = {"hidden": put(params["hidden"], hidden), "out": put(params["out"], out)}
        batch = put(x, rows), put(y, rows)
    opt_state = optimizer.init(params)
    first, losses = places((params, opt_state)), []
    compiled.clear()

    @jax.jit
    def step(params, opt_state, x, y):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, opt_state = optimizer.update(grads, opt_state, params, value=loss)
        return optax.apply_updates(params, updates), opt_state, loss

    for _ in range(100):
        params, opt_state, loss = step(params, opt_state, *batch)
        losses.append(loss)
    part = lambda tree: [leaf.addressable_shards[0].data.shape for leaf in jax.tree.leaves(tree)]
    copies = [opt_state.saved, opt_state.kept]
    own = part(params)
    return {
        "compiled": len(compiled),
        "gathers": jax.jit(trees.squared_norm).lower(params).compile().as_text().count("all-gather"),
        "moved": places((params, opt_state)) != first,
        "chosen": [row["chosen"]["learning_rate"] for row in atn.history(opt_state).to_dict()["rounds"]],
        "rate": float(atn.hyperparams(opt_state)["learning_rate"]),
        "losses": np.asarray(losses).tolist(),
        "own": own,
        "copies": [part(copy.params) for copy in copies],
        "moments": [part(getattr(copy.inner.inner_state[0], name)) for copy in copies for name in ("mu", "nu")],
    }

print(json.dumps({name: run(name) for name in sys.argv[1:]}))
"""


# Each is a program; "both" spreads over an axis of the model as well.
TENSOR = pytest.param("tensor", marks=pytest.mark.soak)


@functools.cache
def outcomes(*names):
    return devices.run(RUN, *names, count=8, folders=[pathlib.Path(__file__).parent], timeout=280)


@pytest.fixture
def outcome(mesh):
    return outcomes("one", "tensor") if mesh == "tensor" else outcomes("one", "sharded", "both")


@pytest.mark.parametrize("mesh", ["sharded", TENSOR, "both"])
def test_decisions_are_those_of_one_device(outcome, mesh):
    one, run = outcome["one"], outcome[mesh]
    assert one["chosen"] and run["chosen"] == pytest.approx(one["chosen"], rel=1e-3)
    assert run["rate"] == pytest.approx(one["rate"], rel=1e-3)
    assert run["losses"] == pytest.approx(one["losses"], rel=1e-3)


@pytest.mark.parametrize("mesh", ["one", "sharded", TENSOR, "both"])
def test_it_is_compiled_once_and_stays_where_it_began(outcome, mesh):
    assert (outcome[mesh]["compiled"], outcome[mesh]["moved"]) == (1, False)


@pytest.mark.parametrize(
    ("mesh", "parts"),
    [
        ("sharded", [[2, 32], [4]]),
        pytest.param("tensor", [[16, 16], [16]], marks=pytest.mark.soak),
        ("both", [[8, 16], [16]]),
    ],
)
def test_no_device_holds_more_of_a_copy_than_of_the_parameters(outcome, mesh, parts):
    run = outcome[mesh]
    assert run["own"] == parts
    assert run["gathers"] == 0
    assert run["copies"] == [parts] * 2
    assert run["moments"] == [parts] * 4
