"""D. What comes back is what was: a run goes on exactly, or is refused at the start with the reason."""

import copy
import enum
import json
import os
import pathlib
import pickle
import tempfile
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

import autotunenet_jax as atn
import autotunenet_torch as att

from . import frameworks, tasks, torch_tasks
from .kind_c import same
from .registry import Outcome, case
from .scratch import folder

TOTAL = 240


def _fit(path: str, total: int, **options: Any) -> atn.FitResult:
    return atn.fit(
        tasks.train_step(),
        tasks.new_state(),
        tasks.feed(tasks.no_faults),
        tuner=tasks.tuner(total, **options),
        eval_step=tasks.eval_step,
        progress=False,
        snapshots=path,
        resume=True,
    )


def _resumed_otherwise(changes: dict[str, Any]) -> Outcome:
    """A finished run is resumed with another tuner: refused, or it goes on at rates that train."""
    with folder() as path:
        _fit(path, TOTAL)
        options = dict(changes)
        total = options.pop("total", TOTAL)
        try:
            result = _fit(path, total, **options)
        except ValueError as error:
            text = " ".join(str(error).split())
            return "refused with the reason", f"refused: {text[:90]}", True
        rates = [row["learning_rate"] for row in result.history.records if row["step"] > TOTAL]
    return "refused with the reason", f"taken; rates after the old end: {max(rates, default=None)}", False


@case("D", "fit", short=("fit",))
def resumed_with_a_longer_budget(way: str) -> Outcome:
    return _resumed_otherwise({"total": 2 * TOTAL})


@case("D", "fit", short=("fit",))
def resumed_with_the_other_mode(way: str) -> Outcome:
    return _resumed_otherwise({"mode": "max"})


@case("D", "fit")
def resumed_with_another_decay(way: str) -> Outcome:
    return _resumed_otherwise({"decay": "cosine"})


@case("D", "fit")
def resumed_with_another_guard(way: str) -> Outcome:
    return _resumed_otherwise({"guard": atn.Guard(sigmas=9.0)})


@case("D", "fit")
def resumed_without_its_validation(way: str) -> Outcome:
    """The snapshot holds the best state by a metric that is not given any more."""
    with folder() as path:
        _fit(path, TOTAL)
        try:
            atn.fit(
                tasks.train_step(),
                tasks.new_state(),
                tasks.feed(tasks.no_faults),
                tuner=tasks.tuner(TOTAL),
                progress=False,
                snapshots=path,
                resume=True,
            )
        except (ValueError, OSError) as error:
            return "refused, and eval_step is named", f"refused: {str(error)[:90]}", "eval_step" in str(error)
    return "refused, and eval_step is named", "taken", False


@case("D", "Trainer")
def resumed_with_other_epochs_or_the_other_mode(way: str) -> Outcome:
    said = []
    for epochs, mode in ((9, "min"), (6, "max")):
        with folder() as path:
            for number, (e, m) in enumerate(((6, "min"), (epochs, mode))):
                trainer = att.Trainer(torch.nn.functional.cross_entropy, torch.optim.Adam, epochs=e, progress=False)
                x, y = torch_tasks.tensors()[0]
                loader = [(x[i : i + 48], y[i : i + 48]) for i in range(0, 960, 48)]
                try:
                    tuner = att.AutoTuneNet(torch_tasks.SPACE, mode=m)  # pyright: ignore[reportArgumentType]
                    trainer.fit(torch_tasks.new_model(), loader, loader[:3], tuner=tuner, snapshots=path)
                    said += ["taken"] * number
                except ValueError as error:
                    said.append(f"refused: {str(error)[:50]}")
    return "both refused", "; ".join(said), len(said) == 2 and "taken" not in said


@case("D", "loop")
def a_state_of_the_other_mode(way: str) -> Outcome:
    first = torch_tasks.run_loop(total=120).tuner.state_dict()
    model = torch_tasks.new_model()
    tuner = att.AutoTuneNet(torch_tasks.SPACE, mode="max")
    tuner.attach(model, torch.optim.Adam(model.parameters(), tasks.START), total_steps=120)
    try:
        tuner.load_state_dict(first)
    except ValueError as error:
        return "refused", f"refused: {str(error)[:80]}", True
    return "refused", "taken", False


@case("D", "autotune")
def a_state_of_another_budget(way: str) -> Outcome:
    """A state of 300 steps in an optimizer of 900 would train at rate 0 from step 300 on."""
    one, two = (atn.autotune(tasks.OPTIMIZERS["adam"], tasks.SPACE, total) for total in (300, 900))
    p = tasks.new_params()
    with folder() as path, atn.Snapshots(path) as store:
        store.save(1, one.init(p), wait=True)
        try:
            _, state = store.restore(two.init(p))
            two.update(p, state, p, value=jnp.float32(1.0))
        except (ValueError, TypeError) as error:
            return "refused", f"refused: {type(error).__name__}: {str(error)[:60]}", True
    return "refused", "taken", False


@case("D", "autotune")
def saved_and_restored_at_any_step(way: str) -> Outcome:
    total, wrong = 400, []
    tx, step, _ = tasks.wrapped(total, "adam", ())
    reference = tasks.run_autotune(total=total, validates=False).result
    for at in (3, 31, 77, 222, 390):
        p = tasks.new_params()
        state = tx.init(p)
        with folder() as path, atn.Snapshots(path) as store:
            for k in range(total):
                if k == at:
                    store.save(k, (p, state), wait=True)
                    _, (p, state) = store.restore((p, state))
                p, state, *_ = step(p, state, tasks.batch_of(tasks.no_faults, k, k))
        wrong += [] if same((p, state), reference) else [at]
    return "the same to the bit, five places", f"different after {wrong}" if wrong else "the same", not wrong


_MOVE = """
import sys, jax, jax.numpy as jnp, optax, numpy as np, autotunenet_jax as atn
path, what = sys.argv[1:]
opt = atn.autotune(optax.adam, {"learning_rate": (1e-4, 1.0)}, 200, learning_rate=1e-2)
@jax.jit
def step(p, s, x):
    loss, g = jax.value_and_grad(lambda p: jnp.mean((x @ p["w"] - x.sum(1)) ** 2))(p)
    u, s = opt.update(g, s, p, value=loss)
    return optax.apply_updates(p, u), s, loss
p = {"w": jnp.zeros(6)}
s = opt.init(p)
k = 0
with atn.Snapshots(path) as store:
    if what == "go on":
        k, (p, s) = store.restore((p, s))
    while k < (90 if what == "begin" else 200):
        p, s, loss = step(p, s, np.random.default_rng(k).normal(size=(8, 6)).astype(np.float32))
        k += 1
    store.save(k, (p, s), wait=True)
print(len(jax.devices()), float(jnp.abs(p["w"] - 1).max()))
"""


@case("D", "autotune")
def moved_between_one_and_two_devices(way: str) -> Outcome:
    got = []
    for before, after in ((1, 2), (2, 1)):
        with folder() as path:
            for number, what in ((before, "begin"), (after, "go on")):
                done = frameworks.python(
                    _MOVE, path, what, XLA_FLAGS=f"--xla_force_host_platform_device_count={number}"
                )
                if done.returncode:
                    break
        last = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["?"]
        got.append(f"{before} to {after}: {last[-1][:90]}")
        is_ok = done.returncode == 0 and float(last[-1].split()[1]) < 0.05
        if not is_ok:
            break
    return "trained to the end, both ways", "; ".join(got), is_ok


# A loader's own order.


class _Seen(torch.utils.data.Dataset):
    def __init__(self, stop: int | None):
        self.seen: list[int] = []
        self.stop = stop

    def __len__(self) -> int:
        return 300

    def __getitem__(self, index: int) -> Any:
        self.seen.append(index)
        if self.stop is not None and len(self.seen) == self.stop:
            raise KeyboardInterrupt
        x, y = torch_tasks.tensors()[0]
        return x[index], y[index]


def _ordered(stop: int | None, path: str | None, own: bool) -> Any:
    torch.manual_seed(9)
    generator = torch.Generator().manual_seed(123) if own else None
    model = torch_tasks.new_model()
    loader = torch.utils.data.DataLoader(_Seen(stop), 20, shuffle=True, generator=generator)
    trainer = att.Trainer(torch.nn.functional.cross_entropy, torch.optim.Adam, epochs=14, progress=False)
    tuner = att.AutoTuneNet(torch_tasks.SPACE)
    store = None if path is None else atn.Snapshots(path, interval_s=0.0, overhead=0.9)
    try:
        trainer.fit(model, loader, [torch_tasks.tensors()[1]], tuner=tuner, snapshots=store)
    except KeyboardInterrupt:
        pass
    finally:
        if store is not None:
            store.close()
    return model


def _resumed_order(own: bool) -> Outcome:
    reference, wrong = _ordered(None, None, own), []
    for stop in (1130, 1840, 2710):
        with folder() as path:
            _ordered(stop, path, own)
            model = _ordered(None, path, own)
        if not torch_tasks.states_equal(dict(model.state_dict()), dict(reference.state_dict())):
            wrong.append(stop)
    return "the same to the bit, three places", f"different after samples {wrong}" if wrong else "the same", not wrong


@case("D", "Trainer", short=("Trainer",))
def a_loader_with_a_generator_of_its_own(way: str) -> Outcome:
    return _resumed_order(own=True)


@case("D", "Trainer")
def a_loader_without_one(way: str) -> Outcome:
    return _resumed_order(own=False)


# Batches that are written over.


class _OneBuffer:
    """Gives the same two arrays each time, filled again: ``copies`` gives fresh ones."""

    def __init__(self, total: int, *, copies: bool, torches: bool):
        self.total, self.copies, self.torches = total, copies, torches

    def __iter__(self) -> Iterator[Any]:
        x, y = (column.copy() for column in tasks.rows(0))
        buffers = (torch.from_numpy(x), torch.from_numpy(y)) if self.torches else (x, y)
        for k in range(self.total):
            x[:], y[:] = tasks.rows(k)
            yield copy.deepcopy(buffers) if self.copies else buffers


@case("D", "fit", "Trainer")
def a_loader_that_fills_its_arrays_again(way: str) -> Outcome:
    sources = [_OneBuffer(400, copies=copies, torches=way == "Trainer") for copies in (True, False)]
    if way == "Trainer":
        return _alike([_of_tensors(source, in_place=False) for source in sources])
    # JAX may read an array while the step runs, in any loop: not to the bit.
    ratio = _of_arrays(sources[1]) / _of_arrays(sources[0])
    return "<= 1.05 x that of fresh arrays", f"{ratio:.3f}", ratio <= 1.05


@case("D", "Trainer")
def a_forward_pass_that_changes_its_batch_in_place(way: str) -> Outcome:
    """Where every pass gives a batch of its own, that does no harm."""
    fresh = _OneBuffer(400, copies=True, torches=True)
    return _alike([_of_tensors(fresh, in_place=in_place) for in_place in (False, True)])


def _alike(ends: list[Any]) -> Outcome:
    return "the same to the bit", "the same" if ends[0] == ends[1] else "different", ends[0] == ends[1]


def _of_arrays(source: Any) -> float:
    def step(state: Any, batch: Any, hp: Any) -> Any:
        return tasks.train_step()(state, (*batch, np.int32(0), np.float32(1)), hp)

    result = atn.fit(step, tasks.new_state(), source, tuner=tasks.tuner(400), eval_step=tasks.eval_step, progress=False)
    return float(tasks.test_loss(result.state["p"]))


def _of_tensors(source: Any, *, in_place: bool) -> list[bytes]:
    def forward(model: Any, batch: Any) -> Any:
        x, y = batch
        if not model.training:
            return model(x), y
        return model(x.mul_(0.5) if in_place else x * 0.5), y.long()

    model = torch_tasks.new_model()
    trainer = att.Trainer(
        torch.nn.functional.cross_entropy, torch_tasks.MAKERS["adam"], steps=400, progress=False, forward=forward
    )
    trainer.fit(model, source, [torch_tasks.tensors()[1]], tuner=att.AutoTuneNet(torch_tasks.SPACE))
    return [tensor.numpy().tobytes() for tensor in model.state_dict().values()]


# Objects of the user.


@case("D", "loop", "fit", short=("loop",))
def an_unattached_tuner_is_pickled_and_copied(way: str) -> Outcome:
    space = {"learning_rate": (1e-5, 1e-1), "b1": atn.Float(0.5, 0.95), "batch_size": atn.Choice([16, 32])}
    tuner = att.AutoTuneNet(space, 300, seed=4) if way == "loop" else atn.AutoTuneNet(space, 300)
    for again in (pickle.loads(pickle.dumps(tuner)), copy.deepcopy(tuner)):
        if repr(again) != repr(tuner):
            return "the same tuner", repr(again)[:80], False
    return "the same tuner", "the same", True


class _Mode(enum.Enum):
    A = "a"
    B = "b"


def _one() -> None: ...


def _two() -> None: ...


OPTIONS: dict[str, list[Any]] = {
    "int64": [np.int64(3), np.int64(7)],
    "uint8": [np.uint8(3), np.uint8(7)],
    "float32": [np.float32(0.25), np.float32(0.75)],
    "float64": [np.float64(0.1), np.float64(0.7)],
    "bool": [True, False],
    "str": ["relu", "tanh"],
    "np.str": [np.str_("relu"), np.str_("tanh")],
    "bytes": [b"a", b"b"],
    "tuple": [(3, 3), (5, 5)],
    "None": [None, "x"],
    "enum": [_Mode.A, _Mode.B],
    "function": [_one, _two],
    "np.dtype": [np.dtype("float32"), np.dtype("float64")],
    "torch.dtype": [torch.float32, torch.bfloat16],
    "path": [pathlib.Path("a"), pathlib.Path("b")],
    "mixed": [1, "one"],
}


def _options_loop(options: list[Any]) -> str:
    model = torch.nn.Linear(3, 1)
    used: list[Any] = []
    tuner = att.AutoTuneNet(
        {"learning_rate": (1e-4, 1e-1), "what": atn.Choice(options, role="fast")},
        targets={"what": lambda model, value: used.append(value)},
    )
    opt = torch.optim.SGD(model.parameters(), 1e-2)
    tuner.attach(model, opt, total_steps=200)
    for _ in range(200):
        x = torch.randn(8, 3)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        tuner.step(loss)
    if not all(any(value is option or value == option for option in options) for value in used):
        return "other values"
    json.dumps(tuner.history.to_dict())
    with tempfile.TemporaryFile() as file:
        torch.save(tuner.state_dict(), file)
        file.seek(0)
        tuner.load_state_dict(torch.load(file, weights_only=True))
    best = tuner.best_hyperparams["what"]
    # NumPy's options become Python's.
    plain = [option.item() if isinstance(option, np.generic) else option for option in options]
    return "" if any(best == option and type(best) is type(option) for option in plain) else "another type"


@case("D", "loop")
def options_of_any_type(way: str) -> Outcome:
    wrong = []
    for name, options in OPTIONS.items():
        try:
            atn.Choice(options)
        except (TypeError, ValueError):
            continue  # refused at construction
        try:
            if name not in ("None", "mixed"):
                pickle.loads(pickle.dumps(atn.SearchSpace({"what": atn.Choice(options)})))
            wrong += [f"{name}: {text}" for text in [_options_loop(options)] if text]
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}")
    return f"{len(OPTIONS)} kinds work or are refused", "; ".join(wrong) or "so it is", not wrong


@case("D", "SearchSpace")
def fingerprints_are_the_same_in_every_process(way: str) -> Outcome:
    """A function's or an object's repr holds its address; what is compared across processes must not."""
    code = (
        "import autotunenet_jax as atn\ndef f(): ...\ndef g(): ...\n"
        "print(atn.SearchSpace({'learning_rate': (1e-4, 1.0), 'what': [f, g]}).fingerprint())"
    )
    runs = [frameworks.python(f"x = [object() for _ in range({n})]\n{code}") for n in (1, 70_000)]
    if any(run.returncode for run in runs):
        is_refused = all("TypeError" in run.stderr or "ValueError" in run.stderr for run in runs)
        return "the same, or refused", "refused" if is_refused else "an error", is_refused
    prints = [run.stdout.strip() for run in runs]
    return "the same, or refused", " / ".join(prints), prints[0] == prints[1]


@case("D", "SearchSpace", short=("SearchSpace",))
def whole_numbers_over_wide_ranges(way: str) -> Outcome:
    worst, where = 0, ""
    rng = np.random.default_rng(2)
    ranges = [(0, 3_000_000, False), (1, 2**22, False), (1, 2**23, False), (1, 10**7, True), (-(10**6), 10**6, False)]
    for lo, hi, log in ranges:
        try:
            space = atn.SearchSpace({"n": atn.Int(lo, hi, log=log)})
        except ValueError:
            continue  # refused: neighbours could not be told apart
        values = np.unique(np.concatenate([rng.integers(lo, hi, 400), [lo, hi, lo + 1, hi - 1]]))
        back = np.asarray(space.decode(space.encode({"n": values.astype(np.int32)}))["n"], np.int64)
        off = int(np.abs(back - values).max())
        if off > worst:
            worst, where = off, f" for Int({lo}, {hi}, log={log})"
    return "0, or refused", f"off by {worst}{where}", worst == 0


# Frameworks.


@case("D", "transformers")
def resumed_from_folder_A_writing_to_B(way: str) -> Outcome:  # noqa: N802
    with folder() as one, folder() as two:
        frameworks.run_transformers(one, max_steps=160, save_steps=60)
        checkpoint = os.path.join(one, "checkpoint-120")
        ended = frameworks.run_transformers(two, max_steps=160, save_steps=60, resume=checkpoint)
        steps = ended.tuner.history.summary["steps"]
        starts = [row["start"] for row in ended.tuner.history.rounds]
    return "160 steps, one first round", f"{steps} steps, rounds from {starts}", steps == 160 and starts.count(0) <= 1


@case("D", "Lightning")
def resumed_with_more_epochs(way: str) -> Outcome:
    with folder() as path:
        frameworks.run_lightning(path, epochs=6, saves=True)
        try:
            ended = frameworks.run_lightning(path, epochs=9, resume=os.path.join(path, "last.ckpt"))
        except (ValueError, RuntimeError) as error:
            return "goes on, or refused", f"refused: {str(error)[:80]}", True
        rates = ended.rates[-40:]
    return "goes on, or refused", f"went on, rates up to {max(rates):.1e}", max(rates) > 1e-5
