"""What the tuner costs on the device at hand, as a table in Markdown: unattended, in five minutes on an accelerator.

Plain and wrapped AdamW train the same network in one process, in turn and donated, at steps of .2, 2 and 20 ms; then
compilation, memory, a run of `fit` with its rounds, a decision on the device and on the host, and copies in both.

    python -m benchmarks.gpu [--out gpu.md] [--minutes 5]
    python -m benchmarks.gpu --short     # small, to see that it works
"""

import argparse
import dataclasses
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np

import autotunenet_jax as atn
from autotunenet_jax.checkpoint.memory_copies import copy_tree, copy_tree_to_host
from benchmarks.overhead import BATCH, ROUND_OVER, make_params, make_step, optimizers, temp_bytes

SPACE = {"learning_rate": (1e-5, 1e-1)}
MEGABYTE = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is measured.

    Args:
      steps_ms: Times of a plain step to aim at.
      widths: Widths of a hidden layer that may make such a step.
      seconds: For the pairs of one step time.
      pairs: Most pairs of chunks.
      fit_steps: Steps of the run of `fit`.
      decisions: Decisions that are timed.
      copy_mb: Size of the state that is copied.
    """

    steps_ms: tuple[float, ...] = (0.2, 2.0, 20.0)
    widths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192)
    seconds: float = 8.0
    pairs: int = 40
    fit_steps: int = 400
    decisions: int = 20
    copy_mb: int = 1024


SHORT = Scale(steps_ms=(0.2,), widths=(32, 64), seconds=0.5, pairs=3, fit_steps=160, decisions=2, copy_mb=4)


def timed(function, repeats=1):
    """Median seconds of a call whose result is waited for."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return float(np.median(times))


class Training:
    """One network with one optimizer, advanced in chunks."""

    def __init__(self, width, optimizer, *, passes_loss):
        widths = (width, width, width, 64)
        self.batch = (jnp.ones((BATCH, width)), jnp.zeros((BATCH, 64)))
        params = make_params(widths, jax.random.key(0))
        self.carry = (params, optimizer.init(params))
        step = make_step(optimizer, passes_loss=passes_loss)
        start = time.perf_counter()
        self.step = step.lower(*self.carry, self.batch).compile()
        self.compile_s = time.perf_counter() - start
        self.temp_mb = temp_bytes(self.step) / MEGABYTE

    def seconds(self, steps):
        """Of some steps, dispatched without waiting and waited for at the end."""
        start = time.perf_counter()
        for _ in range(steps):
            params, opt_state, _ = self.step(*self.carry, self.batch)
            self.carry = (params, opt_state)
        jax.block_until_ready(self.carry)
        return time.perf_counter() - start


def width_for(step_ms, scale):
    """The first width of those at hand whose plain step takes long enough, and the plain training."""
    (plain, _), _ = optimizers("keep-winner")
    for width in scale.widths:
        training = Training(width, plain, passes_loss=False)
        training.seconds(3)
        if 1e3 * training.seconds(10) / 10 >= step_ms:
            break
    return width, training


def step_rows(step_ms, scale):
    """A plain step beside a wrapped one outside rounds: their times, what they compile to and how long that takes."""
    width, plain = width_for(step_ms, scale)
    _, (tuned, passes_loss) = optimizers("keep-winner")
    wrapped = Training(width, tuned, passes_loss=passes_loss)
    wrapped.seconds(ROUND_OVER)
    alone = plain.seconds(5) / 5
    steps = max(int(scale.seconds / scale.pairs / 2 / alone), 1)
    pairs = np.array([(plain.seconds(steps), wrapped.seconds(steps)) for _ in range(scale.pairs)]) / steps
    plain_ms, wrapped_ms = 1e3 * np.median(pairs, axis=0)
    ratio = float(np.median(pairs[:, 1] / pairs[:, 0]))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(plain.carry[0]))
    held = [sum(leaf.nbytes for leaf in jax.tree.leaves(run.carry)) / MEGABYTE for run in (plain, wrapped)]
    what = f"step aimed at {step_ms:g} ms ({parameters / 1e6:.2f}M parameters)"
    return [
        (what, f"plain {plain_ms:.3f} ms, wrapped {wrapped_ms:.3f} ms, ratio {ratio:.3f}"),
        ("its compilation", f"plain {plain.compile_s:.1f} s, wrapped {wrapped.compile_s:.1f} s"),
        ("its state, parameters included", f"plain {held[0]:.1f} MiB, wrapped {held[1]:.1f} MiB"),
        ("its temporary memory", f"plain {plain.temp_mb:.1f} MiB, wrapped {wrapped.temp_mb:.1f} MiB"),
    ]


def fit_rows(scale):
    """A run of `fit` with its rounds of forks, beside the same number of plain steps."""
    width, plain = width_for(scale.steps_ms[min(1, len(scale.steps_ms) - 1)], scale)
    (optimizer, _), _ = optimizers("keep-winner")
    step = make_step(optimizer, passes_loss=False)
    batch = plain.batch

    def train_step(state, batch, hp):
        params, opt_state = state
        params, opt_state, loss = step(params, atn.set_hyperparams(opt_state, hp), batch)
        return (params, opt_state), loss

    def run():
        tuner = atn.AutoTuneNet(SPACE, total_steps=scale.fit_steps, initial={"learning_rate": 1e-3})
        params = make_params((width, width, width, 64), jax.random.key(0))
        state = (params, optimizer.init(params))
        return atn.fit(train_step, state, lambda step, hp: batch, tuner=tuner, progress=False)

    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    alone = plain.seconds(scale.fit_steps)
    start = time.perf_counter()
    history = run().history
    second = time.perf_counter() - start
    rounds, forks = len(history.rounds), sum(len(row["forks"]) for row in history.rounds)
    return [
        (f"{scale.fit_steps} plain steps", f"{alone:.2f} s"),
        (f"`fit` of as many, with {rounds} rounds of {forks} forks", f"{second:.2f} s, the first time {first:.2f} s"),
        ("what it takes beyond the steps, divided by forks", f"{1e3 * (second - alone) / max(forks, 1):.1f} ms"),
    ]


def decision_seconds(scale):
    """Of one decision in four dimensions, compiled, and of its compilation."""
    space = {"learning_rate": (1e-5, 1e-1), "weight_decay": (1e-6, 1e-1), "b1": (0.8, 0.99), "b2": (0.9, 0.999)}
    tuner = atn.AutoTuneNet(space, 10_000)
    ts = tuner.init(jax.random.key(0))._replace(phase=jnp.int32(2), segment_left=jnp.int32(0))
    start = time.perf_counter()
    decide = jax.jit(lambda ts: tuner.core.decide(ts)).lower(ts).compile()
    compile_s = time.perf_counter() - start
    decide(ts)
    return timed(lambda: decide(ts), scale.decisions), compile_s


def decision_rows(scale):
    """A decision on the device, and on the host where that is another one."""
    rows = []
    places = dict.fromkeys((jax.devices()[0].platform, "cpu"))
    for place in places:
        with jax.default_device(jax.devices(place)[0]):
            seconds, compile_s = decision_seconds(scale)
        rows.append((f"a decision on {place}", f"{1e3 * seconds:.1f} ms, compiled in {compile_s:.1f} s"))
    return rows


def copy_rows(scale):
    """Copies of a state on the device and in host memory, and the way back."""
    state = [jnp.full((MEGABYTE // 4,), n, jnp.float32) for n in range(scale.copy_mb)]
    jax.block_until_ready(copy_tree(state))
    on_device = timed(lambda: copy_tree(state), 5)
    held = copy_tree_to_host(state)
    start = time.perf_counter()
    held = copy_tree_to_host(state, reuse=held)
    to_host = time.perf_counter() - start
    back = timed(held.to_device, 3)
    rows = [
        (f"a copy of {scale.copy_mb} MiB on the device", f"{1e3 * on_device:.1f} ms"),
        ("the same in host memory", f"{1e3 * to_host:.0f} ms, and back {1e3 * back:.0f} ms"),
    ]
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        rows.append(("most device memory in use", f"{stats['peak_bytes_in_use'] / MEGABYTE:.0f} MiB"))
    return rows


def table(scale, minutes):
    """All rows, section after section; what does not fit into the time is named."""
    deadline = time.monotonic() + 60 * minutes
    sections = [(f"step of {ms:g} ms", lambda ms=ms: step_rows(ms, scale)) for ms in scale.steps_ms]
    sections += [("a decision", lambda: decision_rows(scale)), ("copies", lambda: copy_rows(scale))]
    sections += [("a run of fit", lambda: fit_rows(scale))]
    rows = []
    for name, section in sections:
        late = time.monotonic() > deadline
        found = [(name, "left out: the time is up")] if late else section()
        rows += found
        for what, value in found:
            print(f"{what}: {value}", flush=True)
    return rows


def markdown(rows, seconds):
    device = jax.devices()[0]
    head = (
        f"{jax.device_count()} x {device.device_kind} ({device.platform}), jax {jax.__version__}, {platform.machine()}"
    )
    lines = [f"`python -m benchmarks.gpu` on {head}; {seconds:.0f} s.", "", "| what | measured |", "|---|---|"]
    return "\n".join([*lines, *(f"| {what} | {value} |" for what, value in rows)]) + "\n"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="gpu.md", help="file of the table")
    parser.add_argument("--minutes", type=float, default=5.0, help="no section begins after these")
    parser.add_argument("--short", action="store_true", help="small shapes and few repeats")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    # What is compiled here is compiled, not found.
    jax.config.update("jax_enable_compilation_cache", False)
    rows = table(SHORT if options.short else Scale(), options.minutes)
    pathlib.Path(options.out).write_text(markdown(rows, time.monotonic() - start))


if __name__ == "__main__":
    main()
