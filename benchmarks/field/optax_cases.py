"""F, the part of optax: wrappers, kinds of parameters, flags of JAX, and what a space may be written as."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import autotunenet_jax as atn

from . import frameworks, tasks, torch_tasks
from .registry import Outcome, case

SPACE = {"learning_rate": (1e-4, 1.0)}
TOTAL = 300


def _regression(opt: Any, p: Any, *, wrap: Any = jax.jit) -> tuple[float, Any]:
    """Trains a linear model; the parameters may be pairs of lookahead, or complex."""

    def fast(p: Any) -> Any:
        return p.fast if isinstance(p, optax.LookaheadParams) else p

    @wrap
    def step(p: Any, state: Any, x: Any) -> Any:
        loss, grad = jax.value_and_grad(lambda q: jnp.mean(jnp.abs(x @ q["w"] - x @ jnp.arange(5.0)) ** 2))(fast(p))
        updates, state = opt.update(jax.tree.map(jnp.conj, grad), state, p, value=loss)
        return optax.apply_updates(p, updates), state, loss

    state, loss = opt.init(p), jnp.inf
    for k in range(TOTAL):
        x = np.random.default_rng(k).normal(size=(16, 5)).astype(np.float32)
        p, state, loss = step(p, state, x)
    return float(loss), (p, state)


def _trained(opt: Any, p: Any, **more: Any) -> Outcome:
    try:
        loss, _ = _regression(opt, p, **more)
    except (ValueError, TypeError) as error:
        text = " ".join(str(error).split())
        # optax.lookahead takes no arguments but its own, and says which one it was given.
        is_ours = "autotune" in text or "Wrap" in text or "Use" in text or "argument 'value'" in text
        return "loss <= 0.1, or refused with the reason", f"{type(error).__name__}: {text[:90]}", is_ours
    return "loss <= 0.1, or refused with the reason", f"{loss:.2g}", loss <= 0.1


ZEROS = {"w": jnp.zeros(5)}


@case("F", "autotune", short=("autotune",))
def lookahead_around_it(way: str) -> Outcome:
    opt = optax.lookahead(atn.autotune(optax.adam, SPACE, TOTAL, learning_rate=1e-2), 5, 0.5)
    return _trained(opt, optax.LookaheadParams.init_synced(ZEROS))


@case("F", "autotune")
def lookahead_inside_it(way: str) -> Outcome:
    inner = optax.lookahead(optax.inject_hyperparams(optax.adam)(learning_rate=1e-2), 5, 0.5)
    return _trained(atn.autotune(inner, SPACE, TOTAL), optax.LookaheadParams.init_synced(ZEROS))


@case("F", "autotune", short=("autotune",))
def complex_parameters(way: str) -> Outcome:
    got, is_ok = [], True
    for opt in (
        atn.autotune(optax.adam, SPACE, TOTAL, learning_rate=1e-2),
        atn.autotune(optax.inject_hyperparams(optax.adam)(learning_rate=1e-2), SPACE, TOTAL),
    ):
        with torch_tasks.collected() as said:
            loss, (_, state) = _regression(opt, {"w": jnp.zeros(5, jnp.complex64)})
        rate = atn.hyperparams(state)["learning_rate"]
        is_ok &= loss <= 0.1 and rate.dtype == jnp.float32 and not any("omplex" in text for text in said)
        got.append(f"loss {loss:.2g}, rate {rate.dtype}, {len(said)} warnings")
    return "loss <= 0.1, rate float32, no warning", "; ".join(got), is_ok


_DEBUG = """
import jax, jax.numpy as jnp, optax, autotunenet_jax as atn, sys
jax.config.update(sys.argv[1], True)
opt = atn.autotune(optax.adam, {"learning_rate": (1e-4, 1.0)}, 200, learning_rate=1e-2)
@jax.jit
def step(p, s):
    loss, g = jax.value_and_grad(lambda p: jnp.sum((p - 1) ** 2))(p)
    u, s = opt.update(g, s, p, value=loss)
    return optax.apply_updates(p, u), s, atn.wants_eval(s)
p = jnp.zeros(4)
s = opt.init(p)
for k in range(200):
    p, s, wants = step(p, s)
    if wants: s = atn.observe_eval(s, jnp.sum((p - 1) ** 2))
def train(w, x, hp): return w - hp["learning_rate"] * 2 * (w - 1), jnp.sum((w - 1) ** 2)
tuner = atn.AutoTuneNet({"learning_rate": (1e-4, 1.0)}, 200)
atn.fit(train, jnp.zeros(4), lambda k, hp: 0.0, tuner=tuner, eval_step=lambda w: jnp.sum((w - 1) ** 2), progress=False)
print("done")
"""


@case("F", "autotune")
def flags_that_look_for_NaN(way: str) -> Outcome:  # noqa: N802
    got = []
    for flag in ("jax_debug_nans", "jax_debug_infs", "jax_enable_x64"):
        done = frameworks.python(_DEBUG, flag)
        last = (done.stderr.strip().splitlines() or ["?"])[-1]
        got.append(f"{flag}: {'done' if 'done' in done.stdout else last[:70]}")
    is_ok = all("done" in text or ("ValueError" in text and "would stop the tuner" in text) for text in got)
    return "done, or refused with the reason", "; ".join(got), is_ok


_PMAP = """
import jax, jax.numpy as jnp, numpy as np, optax, autotunenet_jax as atn
opt = atn.autotune(optax.adam, {"learning_rate": (1e-4, 1.0)}, 200, learning_rate=1e-2)
n = jax.local_device_count()
def step(p, s, x):
    loss, g = jax.value_and_grad(lambda p: jnp.mean((x @ p - x.sum(1)) ** 2))(p)
    loss, g = jax.lax.pmean((loss, g), "i")
    u, s = opt.update(g, s, p, value=loss)
    return optax.apply_updates(p, u), s
p = jnp.zeros(4)
p, s = jax.tree.map(lambda a: jnp.stack([a] * n), (p, opt.init(p)))
step = jax.pmap(step, "i")
for k in range(200):
    p, s = step(p, s, np.random.default_rng(k).normal(size=(n, 8, 4)).astype(np.float32))
hp = atn.hyperparams(s)["learning_rate"]
print(n, float(abs(p - 1).max()), np.shape(hp))
one = jax.tree.map(lambda a: a[0], s)
print(float(atn.hyperparams(one)["learning_rate"]))
"""


@case("F", "autotune")
def a_state_stacked_for_pmap(way: str) -> Outcome:
    # Steps are queued without a wait, which needs these threads, tuned or not.
    flags = "--xla_force_host_platform_device_count=2"
    done = frameworks.python(_PMAP, XLA_FLAGS=flags, PJRT_NPROC="4")
    lines = done.stdout.strip().splitlines()
    last = (done.stderr.strip().splitlines() or ["?"])[-1]
    is_ok = len(lines) == 2 and float(lines[0].split()[1]) < 0.05
    return "trained, hyperparams readable", " / ".join(lines) if is_ok else last[:100], is_ok


_CACHED = """
import logging, sys, jax, jax.numpy as jnp, optax, autotunenet_jax as atn
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
count = 0
class Count(logging.Handler):
    def emit(self, record):
        global count
        count += "Finished XLA compilation of jit(step)" in record.getMessage()
logging.getLogger("jax").addHandler(Count()); logging.getLogger("jax").setLevel(logging.DEBUG)
jax.config.update("jax_log_compiles", True)
opt = atn.autotune(optax.adam, {"learning_rate": (1e-4, 1.0)}, 300, learning_rate=1e-2)
@jax.jit
def step(p, s):
    loss, g = jax.value_and_grad(lambda p: jnp.sum((p - 1) ** 2))(p)
    u, s = opt.update(g, s, p, value=loss)
    return optax.apply_updates(p, u), s
p = jnp.zeros(4)
s = opt.init(p)
for k in range(8): p, s = step(p, s)
print(step._cache_size(), count)
"""


@case("F", "autotune")
def the_persistent_cache_compiles_a_step_once(way: str) -> Outcome:
    import tempfile

    with tempfile.TemporaryDirectory() as path:
        runs = [frameworks.python(_CACHED, JAX_COMPILATION_CACHE_DIR=path) for _ in range(2)]
    got = [(run.stdout.strip().splitlines() or [run.stderr.strip()[-60:]])[-1] for run in runs]
    return "1 trace, at most 1 compilation, twice", " / ".join(got), all(re.match(r"1 [01]$", text) for text in got)


@case("F", "autotune")
def the_nnx_example_donates(way: str) -> Outcome:
    text = (frameworks.ROOT / "examples" / "flax_nnx.py").read_text()
    return "donate in examples/flax_nnx.py", str("donate" in text), "donate" in text


@case("F", "SearchSpace", short=("SearchSpace",))
def two_numbers_as_a_list(way: str) -> Outcome:
    """YAML knows no tuples: [1e-5, 1e-1] may be a range or two options, and is asked about."""
    taken = []
    for spec in ([1e-5, 1e-1], [0.0, 0.5], [1, 8], [np.float32(1e-4), np.float32(1.0)]):
        try:
            atn.SearchSpace({"learning_rate": spec})
            taken.append(str(spec))
        except (TypeError, ValueError):
            pass
    fine = [[32, 64, 128], ["a", "b"], [True, False], [2, 1]]
    for spec in fine:
        atn.SearchSpace({"what": spec})
    return "refused", f"taken: {', '.join(taken)}" if taken else "refused", not taken


@case("F", "autotune")
def a_plateau_after_it_and_inside(way: str) -> Outcome:
    """Behind it the plateau's factor shortens the ways back to snapshots as well: that is told; inside it trains."""
    plateau = optax.contrib.reduce_on_plateau(patience=5, cooldown=5, accumulation_size=5)
    total, got, is_ok = 400, [], True
    for name in ("after", "inside"):
        inner = tasks.OPTIMIZERS["adam"]
        inner = optax.chain(inner, plateau) if name == "inside" else inner
        opt = atn.autotune(inner, tasks.SPACE, total)
        opt = optax.chain(opt, plateau) if name == "after" else opt

        @jax.jit
        def step(p: Any, state: Any, batch: Any, opt: Any = opt) -> Any:
            loss, grads = jax.value_and_grad(tasks.loss_of)(p, *batch)
            updates, state = opt.update(grads, state, p, value=loss)
            return optax.apply_updates(p, updates), state

        p = tasks.new_params()
        state = opt.init(p)
        with torch_tasks.collected() as said:
            for k in range(total):
                p, state = step(p, state, tasks.rows(k))
                if k % 20 == 19:
                    atn.hyperparams(jax.block_until_ready(state))
        ratio = float(tasks.test_loss(p)) / tasks.plain(total=total)
        is_told = any("after autotune in the chain" in text for text in said)
        is_ok &= ratio <= 1.1 or (name == "after" and is_told)
        got.append(f"{name} {ratio:.3f}{', told' if is_told else ''}")
    return "<= 1.1 x plain, or told", "; ".join(got), is_ok
