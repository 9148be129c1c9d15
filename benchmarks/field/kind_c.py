"""C. What is saved is what it says it is: a directive is a transaction, and a resumed run goes on to the bit."""

import contextlib
import copy
import functools
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import autotunenet_jax as atn
import autotunenet_torch as att
from autotunenet_jax import faults as injected

from . import folder_cases as folder_cases
from . import tasks, torch_tasks
from .registry import Outcome, case
from .scratch import folder

TOTAL = 240


def raw(leaf: Any) -> np.ndarray:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def same(one: Any, two: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return all(np.array_equal(raw(a), raw(b), equal_nan=raw(a).dtype.kind in "fc") for a, b in pairs)


def interrupt() -> None:
    """Ctrl-C, twice."""
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


def _fit(**more: Any) -> atn.FitResult:
    options: dict[str, Any] = {"eval_step": tasks.eval_step, "batches": tasks.feed(tasks.no_faults), **more}
    batches = options.pop("batches")
    return atn.fit(
        options.pop("step", tasks.train_step()),
        tasks.new_state(),
        batches,
        tuner=tasks.tuner(TOTAL),
        progress=False,
        eval_every=12,
        **options,
    )


@functools.cache
def _reference() -> atn.FitResult:
    return _fit()


def _differs(result: atn.FitResult, reference: atn.FitResult) -> list[str]:
    """In what two runs differ."""
    out = [name for name in ("state", "tuner_state") if not same(getattr(result, name), getattr(reference, name))]
    evals = [[(e["step"], e["value"]) for e in r.history.evals] for r in (result, reference)]
    out += ["evals"] if evals[0] != evals[1] else []
    return out + (["rounds"] if len(result.history.rounds) != len(reference.history.rounds) else [])


def _broken_and_resumed(
    broken: Sequence[Callable[[str], Any]], resume: Callable[[str], atn.FitResult], reference: atn.FitResult
) -> Outcome:
    """Runs that are broken off and resumed end as one that never was."""
    wrong = []
    for number, run in enumerate(broken):
        with folder() as path:
            with contextlib.suppress(KeyboardInterrupt, Exception):
                run(path)
            differs = _differs(resume(path), reference)
            if differs:
                wrong.append(f"{number}: {', '.join(differs)}")
    got = f"{len(broken) - len(wrong)} of {len(broken)} the same{'; ' if wrong else ''}{'; '.join(wrong[:3])}"
    return f"{len(broken)} the same to the bit", got, not wrong


def _resume(path: str) -> atn.FitResult:
    return _fit(snapshots=path, resume=True)


def _at(number: int, act: Callable[[], None]) -> Callable[..., None]:
    """A function that acts at one of its calls, counted from 1."""
    calls = iter(range(1, 10**9))

    def called(*_: Any) -> None:
        if next(calls) == number:
            act()

    return called


def _fail() -> None:
    raise OSError("the file is gone (injected)")


@case("C", "fit", short=("fit",))
def a_second_signal_while_a_decision_is_recorded(way: str) -> Outcome:
    runs = [lambda path, n=n: _fit(snapshots=path, callbacks=[_at(n, interrupt)]) for n in (1, 2, 3)]
    return _broken_and_resumed(runs, _resume, _reference())


@case("C", "fit")
def an_error_in_a_callback(way: str) -> Outcome:
    runs = [lambda path, n=n: _fit(snapshots=path, callbacks=[_at(n, _fail)]) for n in (1, 2)]
    return _broken_and_resumed(runs, _resume, _reference())


@case("C", "fit")
def two_signals_while_a_batch_is_made(way: str) -> Outcome:
    def run(path: str, number: int) -> None:
        act, data = _at(number, interrupt), tasks.feed(tasks.no_faults)

        def batches(position: int, hp: Any) -> Any:
            act()
            return data(position, hp)

        _fit(snapshots=path, batches=batches)

    return _broken_and_resumed([lambda p, n=n: run(p, n) for n in (5, 22, 50, 131, 239)], _resume, _reference())


@case("C", "fit")
def two_signals_at_random_moments(way: str) -> Outcome:
    rng = np.random.default_rng(8)
    _reference()
    start = time.monotonic()
    _fit()
    length = time.monotonic() - start

    def run(path: str, after: float) -> None:
        timer = threading.Timer(after, interrupt)
        try:
            timer.start()
            _fit(snapshots=path)
        finally:
            timer.cancel()
            timer.join()

    moments = rng.uniform(0.02, length, 24)
    return _broken_and_resumed([lambda p, s=s: run(p, float(s)) for s in moments], _resume, _reference())


def _watched_eval(act: Callable[..., None]) -> Callable[[Any], Any]:
    """A validation that calls the host."""

    def look(value: Any) -> Any:
        act()
        return value

    return lambda state: jax.pure_callback(look, jax.ShapeDtypeStruct((), jnp.float32), tasks.eval_step(state))


@functools.cache
def _watched_reference() -> atn.FitResult:
    return _fit(eval_step=_watched_eval(lambda: None))


@case("C", "fit")
def an_error_in_eval_step(way: str) -> Outcome:
    quiet = _watched_eval(lambda: None)
    runs = [lambda path, n=n: _fit(snapshots=path, eval_step=_watched_eval(_at(n, _fail))) for n in (1, 3, 7, 15, 23)]
    return _broken_and_resumed(
        runs, lambda path: _fit(snapshots=path, resume=True, eval_step=quiet), _watched_reference()
    )


@case("C", "fit")
def two_signals_during_a_slow_validation(way: str) -> Outcome:
    quiet = _watched_eval(lambda: None)

    def slowly() -> None:
        interrupt()
        time.sleep(0.15)

    runs = [lambda path, n=n: _fit(snapshots=path, eval_step=_watched_eval(_at(n, slowly))) for n in (2, 4, 9, 16)]
    return _broken_and_resumed(
        runs, lambda path: _fit(snapshots=path, resume=True, eval_step=quiet), _watched_reference()
    )


@case("C", "fit")
def out_of_memory_in_a_step(way: str) -> Outcome:
    """The step's inputs are gone: what is resumed is an earlier snapshot, or the beginning."""

    def run(path: str, at: int, plan: bool) -> atn.FitResult:
        faults: dict[int, Any] = {at if plan else 10**6: "oom"}
        step, batches = injected.inject(tasks.train_step(), tasks.feed(tasks.no_faults), faults)
        with atn.Snapshots(path, interval_s=0.0, overhead=0.9) as store:
            return _fit(step=step, batches=batches, snapshots=store, resume=True)

    with folder() as path:
        reference = run(path, 0, False)
    runs = [lambda path, at=at: run(path, at, True) for at in (30, 128, 190)]
    return _broken_and_resumed(runs, lambda path: run(path, 0, False), reference)


class _Eager(atn.Snapshots):
    """Saves whenever it may."""

    def is_due(self) -> bool:
        return True

    def save(self, *args: Any, **more: Any) -> int:
        return super().save(*args, **{**more, "wait": True})


@case("C", "fit")
def every_snapshot_of_a_run(way: str) -> Outcome:
    """The run is resumed from each of its snapshots in turn."""
    wrong, steps = [], []
    with folder() as path:
        with _Eager(path, keep=100) as store:
            _fit(snapshots=store)
            steps = [record.step for record in store.records()]
        for step in steps:
            with folder() as copied:
                shutil.copytree(path, copied, dirs_exist_ok=True)
                with atn.Snapshots(copied, keep=100) as store:
                    store.abandon(after_step=step)
                differs = _differs(_resume(copied), _reference())
            wrong += [f"{step}: {', '.join(differs)}"] if differs else []
    return f"{len(steps)} the same to the bit", f"{len(wrong)} differ {wrong[:2]}", len(steps) > 10 and not wrong


@case("C", "fit", short=("fit",))
def the_last_snapshot_of_a_run_whose_last_step_broke(way: str) -> Outcome:
    last = tasks.at_call(TOTAL - 1, "nan_grad")
    with folder() as path:
        first = _fit(snapshots=path, batches=tasks.feed(last))
        with atn.Snapshots(path, read_only=True) as store:
            record = store.records()[-1]
        again = _fit(snapshots=path, resume=True)
    is_ok = tasks.is_finite(again.state) and again.eval is not None and again.eval <= 1.01 * (first.best_eval or 0)
    got = f"status {record.status}, metric {record.metric}, resumed: eval {again.eval}, best was {first.best_eval}"
    return "finite, and the metric is the state's", got, is_ok


@case("C", "fit")
def the_metric_of_a_snapshot_is_that_of_its_state(way: str) -> Outcome:
    act = _at(151, lambda: os.kill(os.getpid(), signal.SIGTERM))

    def batches(position: int, hp: Any) -> Any:
        act()
        return tasks.batch_of(tasks.no_faults, int(position), 0)

    with folder() as path:
        result = _fit(snapshots=path, batches=batches)
        with atn.Snapshots(path, read_only=True) as store:
            record = store.records()[-1]
    measured = {e["step"]: e["value"] for e in result.history.evals}
    here = float(jax.jit(tasks.eval_step)(result.state))
    got = f"step {record.step}: metric {record.metric}, state's {here:.4f}, measured at {record.step in measured}"
    return "none, or that of the state", got, record.metric is None or abs(record.metric - here) < 1e-4


@contextlib.contextmanager
def _heard() -> Iterator[list[str]]:
    """All warnings and log lines."""
    texts: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    root, before = logging.getLogger("autotunenet_jax"), logging.root.manager.disable
    logging.disable(logging.NOTSET)
    root.addHandler(handler)
    try:
        with torch_tasks.collected() as warned:
            yield texts
        texts.extend(warned)
    finally:
        root.removeHandler(handler)
        logging.disable(before)


@case("C", "fit", "Trainer")
def SIGTERM_is_not_silent(way: str) -> Outcome:  # noqa: N802
    act = _at(100, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with _heard() as said:
        if way == "fit":
            result = _fit(batches=lambda k, hp: (act(), tasks.batch_of(tasks.no_faults, int(k), 0))[1])
            events, is_told = result.history.events, result.is_interrupted
        else:
            before = signal.signal(signal.SIGTERM, signal.default_int_handler)
            try:
                ended = torch_tasks.run_trainer(lambda position, call: (act(), ("none", 1.0))[1], total=TOTAL)
                events, is_told = ended.tuner.history.events, ended.result.is_interrupted
                said += ended.said
            except KeyboardInterrupt:
                events, is_told = [], False
            finally:
                signal.signal(signal.SIGTERM, before)
    texts = [text for text in [*said, *(e["message"] for e in events)] if "stop" in text.lower() or "SIGTERM" in text]
    return "ends early and says why", f"early {is_told}, said {texts[:1]}", is_told and bool(texts)


# PyTorch.


class _Failing(torch.utils.data.Dataset):
    """A data set whose disk fails once."""

    def __init__(self, at: int | None, act: Callable[[], None]):
        self.data, self.act = torch_tasks.tensors()[0], _at(at, act) if at else lambda: None

    def __len__(self) -> int:
        return 960

    def __getitem__(self, index: int) -> Any:
        self.act()
        return self.data[0][index], self.data[1][index]


def _train(at: int | None, act: Callable[[], None], path: str | None) -> tuple[Any, Any]:
    model = torch_tasks.new_model()
    torch.manual_seed(3)
    loader = torch.utils.data.DataLoader(_Failing(at, act), 48, shuffle=True)
    trainer = att.Trainer(torch.nn.functional.cross_entropy, torch.optim.Adam, epochs=12, progress=False)
    tuner = att.AutoTuneNet(torch_tasks.SPACE)
    trainer.fit(model, loader, [torch_tasks.tensors()[1]], tuner=tuner, snapshots=path)
    return model, tuner


def _broken_trainer(ats: tuple[int, ...], act: Callable[[], None]) -> Outcome:
    reference, _ = _train(None, act, None)
    got = []
    for at in ats:
        with folder() as path:
            with contextlib.suppress(KeyboardInterrupt, OSError):
                _train(at, act, path)
            with atn.Snapshots(path, read_only=True) as store:
                step = store.latest()
            model, _ = _train(None, act, path)
        is_same = torch_tasks.states_equal(dict(model.state_dict()), dict(reference.state_dict()))
        got.append(f"{'none' if step is None else f'step {step}'}, {'same' if is_same else 'DIFFERENT'}")
    is_ok = all("none" not in one and "DIFFERENT" not in one for one in got)
    return "a snapshot, and the same to the bit", "; ".join(got), is_ok


@case("C", "Trainer", short=("Trainer",))
def a_loader_that_raises(way: str) -> Outcome:
    return _broken_trainer((960 * 3 + 100, 960 * 6 + 480), _fail)


@case("C", "Trainer")
def two_signals_in_the_loader(way: str) -> Outcome:
    return _broken_trainer((960 * 5 + 240, 960 * 7 + 10), interrupt)


@case("C", "loop")
def a_checkpoint_at_any_step(way: str) -> Outcome:
    """Model, optimizer and tuner are saved by hand, also inside a round, and a new process goes on."""
    reference = torch_tasks.run_loop(total=TOTAL, validates=False).result
    wrong = []
    for at in (5, 23, 40, 77, 140):
        kept: dict[str, Any] = {}

        def keep(k: int, model: Any, opt: Any, tuner: Any, at: int = at, kept: Any = kept) -> None:
            if k == at:
                with tempfile.TemporaryFile() as file:
                    torch.save({"model": model.state_dict(), "tuner": tuner.state_dict()}, file)
                    file.seek(0)
                    kept.update(torch.load(file, weights_only=True), rng=torch.get_rng_state())
                kept["optimizer"] = copy.deepcopy(opt.state_dict())

        torch_tasks.run_loop(total=TOTAL, validates=False, each=keep)
        model = torch_tasks.new_model(5)
        opt = torch.optim.Adam(model.parameters(), tasks.START)
        model.load_state_dict(kept["model"])
        opt.load_state_dict(kept["optimizer"])
        tuner = att.AutoTuneNet(torch_tasks.SPACE)
        tuner.attach(model, opt, total_steps=TOTAL)
        tuner.load_state_dict(kept["tuner"])
        for k in range(at + 1, TOTAL):
            x, y = tasks.rows(k)
            loss = torch.nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y).long())
            opt.zero_grad()
            loss.backward()
            opt.step()
            tuner.step(loss)
        if not torch_tasks.states_equal(dict(model.state_dict()), dict(reference.state_dict())):
            wrong.append(at)
    return "the same to the bit, five places", f"different after {wrong}" if wrong else "the same", not wrong
