"""G. Tell the user: one warning, once, with what to do, through the framework's own logger."""

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
import torch

import autotunenet_jax as atn
import autotunenet_torch as att

from . import frameworks, tasks, torch_tasks
from .registry import Outcome, case
from .scratch import folder

LOGGERS = ("", "autotunenet", "autotunenet_jax", "autotunenet_torch", "lightning.pytorch", "transformers")


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """All warnings and log lines, with the logger's name before the latter."""
    texts: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(f"{record.name}: {record.getMessage()}")

    handler, before = Handler(logging.INFO), logging.root.manager.disable
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels, others = [logger.level for logger in loggers], [list(logger.handlers) for logger in loggers]
    logging.disable(logging.NOTSET)
    for logger in loggers:
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO)
    try:
        with torch_tasks.collected() as warned:
            yield texts
        texts.extend(warned)
    finally:
        logging.disable(before)
        for logger, level, handlers in zip(loggers, levels, others, strict=True):
            logger.handlers[:] = handlers
            logger.setLevel(level)


def _once(texts: list[str], pattern: str, expected: str) -> Outcome:
    found = list(dict.fromkeys(text for text in texts if re.search(pattern, text, re.IGNORECASE)))
    # The same text with a logger's name or an event's kind before it.
    found = [text for text in found if not any(other != text and other in text for other in found)]
    got = f"{len(found)}{': ' + ' '.join(found[0].split())[:90] if found else ''}"
    return f"1 warning: {expected}", got, len(found) == 1


LOUD: dict[str, Any] = {"log_level": "warning"}
"""A Trainer sets the level of its library's loggers; these cases are run at "error"."""

NARROW = {"learning_rate": (1e-5, 4e-4)}


@case("G", "fit", "autotune", "loop", "Lightning", "transformers", short=("fit",))
def the_choice_lies_at_a_bound(way: str) -> Outcome:
    with heard() as texts, folder() as path:
        if way == "fit":
            result = atn.fit(
                tasks.train_step(),
                tasks.new_state(),
                tasks.feed(tasks.no_faults),
                tuner=atn.AutoTuneNet(NARROW, 400, initial={"learning_rate": 1e-4}),
                eval_step=tasks.eval_step,
                progress=False,
            )
            texts += [e["message"] for e in result.history.events]
        elif way == "autotune":
            _narrow_autotune()
        elif way == "loop":
            ended = torch_tasks.run_loop(total=400, space=NARROW)
            texts += ended.said
        elif way == "Lightning":
            texts += frameworks.run_lightning(path, tuner=att.AutoTuneNet(NARROW)).said
        else:
            # As there, with evaluations.
            clear: dict[str, Any] = {
                "max_steps": 400,
                "eval_strategy": "epoch",
                "per_device_train_batch_size": 480,
                **LOUD,
            }
            texts += frameworks.run_transformers(path, tuner=att.AutoTuneNet(NARROW), **clear).said
    return _once(texts, r"learning_rate.*(bound|end of (its|the) range|edge)", "the rate is at the bound of its range")


def _narrow_autotune() -> None:
    # Half a decade apart, rates differ by more than fresh batches do.
    space = {"learning_rate": atn.Float(1e-6, NARROW["learning_rate"][1], log=True)}
    opt = atn.autotune(optax.adam, space, 400, learning_rate=1e-4)

    @jax.jit
    def step(p: Any, state: Any, x: Any, y: Any) -> Any:
        loss, grads = jax.value_and_grad(tasks.loss_of)(p, x, y)
        updates, state = opt.update(grads, state, p, value=loss)
        return optax.apply_updates(p, updates), state

    p = tasks.new_params()
    state = opt.init(p)
    for k in range(400):
        # Forks see fresh batches: large ones tell small rates apart.
        p, state = step(p, state, *tasks.rows(k, size=480))
        if k % 50 == 49:
            atn.hyperparams(state)


@case("G", "loop", "Trainer", short=("loop",))
def a_start_outside_of_the_range_was_moved(way: str) -> Outcome:
    space = {"learning_rate": (1e-4, 1e-2), "weight_decay": (1e-5, 1e-1)}
    with heard() as texts:
        ended = torch_tasks.run(way, total=60, space=space, optimizer=lambda p: torch.optim.SGD(p, 0.7))
        texts += ended.said
    # Each is told of by its own name.
    _, got, is_told = _once(texts, r"learning_rate.*0\.7.*(outside|range)", "0.7 lies outside")
    return "1 warning for 0.7 and 1 for 0.0", got, is_told and _once(texts, r"weight_decay.*(outside|range)", "")[2]


@case("G", "fit", "loop", "Trainer", short=("loop",))
def a_share_of_batches_is_bad(way: str) -> Outcome:
    """One warning names the share; one in eight is bad."""

    with heard() as texts:
        ended = torch_tasks.run(way, _one_in_eight, total=480)
        texts += [text for text in ended.said if not text.startswith(("rollback", "retry"))]
    return _once(texts, r"1[0-5](\.\d)? ?%|\d+ of \d+ (batches|steps|losses)", "some 12 % of batches are not finite")


def _one_in_eight(position: int, call: int) -> tuple[str, float]:
    return ("nan_both" if position % 8 == 5 else "none"), 1.0


@case("G", "fit", "loop")
def many_rollbacks(way: str) -> Outcome:
    """The state breaks again and again, whatever the rate."""
    with heard() as texts:
        ended = torch_tasks.run(way, _again, total=600)
        texts += [text for text in ended.said if not text.startswith(("rollback", "retry", "budget"))]
    # That the guard gives up is a line of the log, later.
    texts = [text for text in texts if "guard's rollbacks" not in text]
    return _once(texts, r"\d+ (times|rollbacks)|rollbacks.*(\d+|used up)|went back", "the run went back N times")


def _again(position: int, call: int) -> tuple[str, float]:
    # After the rounds: in a fork it is the fork's failure.
    return ("long", 30.0) if call > 200 and call % 40 == 0 else ("none", 1.0)


_FIRST = {
    "fit": """
import jax.numpy as jnp, autotunenet_jax as atn
def step(w, x, hp): return w - hp["learning_rate"] * w, jnp.sum(w**2)
tuner = atn.AutoTuneNet({"learning_rate": (1e-4, 1.0)}, 60)
atn.fit(step, jnp.ones(3), lambda k, hp: 0.0, tuner=tuner, progress=False)
""",
    "loop": """
import torch, autotunenet_torch as att
m = torch.nn.Linear(2, 1); o = torch.optim.SGD(m.parameters(), 1e-2)
t = att.AutoTuneNet({"learning_rate": (1e-4, 1.0)}); t.attach(m, o, total_steps=60)
for _ in range(60):
    l = m(torch.ones(3, 2)).square().mean(); o.zero_grad(); l.backward(); o.step(); t.step(l)
""",
}


@case("G", "fit", "loop")
def the_first_compilation(way: str) -> Outcome:
    import tempfile

    with tempfile.TemporaryDirectory() as path:
        head = "import logging, warnings\nlogging.basicConfig(level=logging.INFO)\nwarnings.simplefilter('always')\n"
        done = frameworks.python(head + _FIRST[way], JAX_COMPILATION_CACHE_DIR=path)
    lines = [line for line in (done.stderr + done.stdout).splitlines() if "autotune" in line.lower()]
    return _once(lines, r"compil", "compiling the tuner, once, about N s")


SLOW = {"learning_rate": (1e-4, 1e-1), "weight_decay": (1e-5, 1e-1)}


@case("G", "autotune", "loop", "Lightning", "transformers", short=("loop",))
def metrics_that_never_came(way: str) -> Outcome:
    with heard() as texts, folder() as path:
        if way == "autotune":
            _unmeasured_autotune()
        elif way == "loop":
            texts += torch_tasks.run_loop(
                total=400, space=SLOW, validates=False, optimizer=lambda p: torch.optim.AdamW(p, 1e-3)
            ).said
        elif way == "Lightning":
            module = frameworks.lightning_module(optimizer=lambda m: torch.optim.AdamW(m.parameters(), 1e-3))
            module.validation_step = lambda *_: None
            texts += frameworks.run_lightning(path, module=module, tuner=att.AutoTuneNet(SLOW)).said
        else:
            texts += frameworks.run_transformers(path, tuner=att.AutoTuneNet(SLOW), weight_decay=1e-3, **LOUD).said
    pattern = r"weight_decay.*(validation|metric|observe_eval|eval)|no (metric|validation)"
    return _once(texts, pattern, "weight_decay stays: no metric came")


def _unmeasured_autotune() -> None:
    opt = atn.autotune(optax.adamw, SLOW, 400, learning_rate=1e-3, weight_decay=1e-3)

    @jax.jit
    def step(p: Any, state: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda p: jnp.sum((p - 1) ** 2))(p)
        updates, state = opt.update(grads, state, p, value=loss)
        return optax.apply_updates(p, updates), state

    p = jnp.zeros(3)
    state = opt.init(p)
    for k in range(400):
        p, state = step(p, state)
        if k % 50 == 49:
            atn.hyperparams(state)


@case("G", "loop")
def mode_max_and_a_metric_that_never_came(way: str) -> Outcome:
    with heard() as texts:
        texts += torch_tasks.run_loop(total=300, validates=False, options={"mode": "max"}).said
    return _once(texts, r"metric|validat", "nothing to maximise was told")


@case("G", "Lightning", "transformers")
def through_the_loggers_of_the_framework(way: str) -> Outcome:
    name = "lightning" if way == "Lightning" else "transformers"
    with heard() as texts, folder() as path:
        if way == "Lightning":
            frameworks.run_lightning(path, tuner=att.AutoTuneNet(NARROW))
        else:
            frameworks.run_transformers(path, tuner=att.AutoTuneNet(NARROW), **LOUD)
    lines = [text for text in texts if text.startswith(name) and re.search("tun|learning_rate", text, re.IGNORECASE)]
    return f"a line in the log of {name}", f"{len(lines)} {lines[:1]}", bool(lines)


@case("G", "fit", short=("fit",))
def a_result_that_can_be_looked_at(way: str) -> Outcome:
    text = repr(tasks.run_fit(total=240).result)
    lines = text.splitlines()
    is_ok = len(lines) <= 10 and len(text) <= 1500 and "learning_rate" in text
    return "at most 10 lines and 1,500 characters", f"{len(lines)} lines, {len(text)} characters", is_ok
