"""F. The frameworks as people use them: Lightning, transformers, schedulers, processes, optax."""

import math
import traceback
from typing import Any

import numpy as np
import optax
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import autotunenet_jax as atn
import autotunenet_torch as att

from . import frameworks, tasks, torch_tasks
from . import optax_cases as optax_cases
from .frameworks import run_lightning, run_transformers
from .registry import Outcome, case
from .scratch import folder


def _or_refused(run: Any, limit: float) -> Outcome:
    """A run ends well, or is refused before it begins."""
    expected = f"<= {limit:.3f}, or refused at the start"
    with folder() as path:
        try:
            ended = run(path)
        except (ValueError, TypeError, RuntimeError) as error:
            # Refused by us, in words of ours, before there was a step; not merely broken on the way.
            place = traceback.extract_tb(error.__traceback__)[-1].filename
            is_ours = "autotunenet" in place and isinstance(error, ValueError)
            return expected, f"{type(error).__name__}: {' '.join(str(error).split())[:90]}", is_ours
        loss = ended.loss
    return expected, f"{loss:.3f}", loss <= limit


# Lightning.


@case("F", "Lightning", short=("Lightning",))
def manual_optimisation_that_returns_nothing(way: str) -> Outcome:
    def step(module: Any, batch: Any) -> None:
        loss = F.cross_entropy(module.net(batch[0]), batch[1])
        opt = module.optimizers()
        opt.zero_grad()
        module.manual_backward(loss)
        opt.step()

    plain = _lightning_plain(10)
    make = frameworks.lightning_module
    return _or_refused(lambda p: run_lightning(p, module=make(step=step, manual=True)), 1.1 * plain)


def _lightning_plain(epochs: int, rate: float = 6e-3) -> float:
    with folder() as path:
        return run_lightning(path, epochs=epochs, tuned=False, module=frameworks.lightning_module(start=rate)).loss


@case("F", "Lightning")
def manual_optimisation_that_returns_a_dictionary_of_its_own(way: str) -> Outcome:
    def step(module: Any, batch: Any) -> Any:
        loss = F.cross_entropy(module.net(batch[0]), batch[1])
        opt = module.optimizers()
        opt.zero_grad()
        module.manual_backward(loss)
        opt.step()
        return {"my_loss": loss.detach()}

    make = frameworks.lightning_module
    return _or_refused(lambda p: run_lightning(p, module=make(step=step, manual=True)), 1.1 * _lightning_plain(10))


def _run_unfrozen(path: str, *, tuned: bool, rate: float = 1e-3, seed: int = 0) -> Any:
    import lightning.pytorch as pl
    from lightning.pytorch import callbacks

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(tasks.INPUTS, tasks.HIDDEN), nn.ReLU())
            self.head = nn.Linear(tasks.HIDDEN, tasks.CLASSES)
            self.rates: list[float] = []

        def forward(self, x: Any) -> Any:
            return self.head(self.backbone(x))

        def training_step(self, batch: Any, index: int) -> Any:
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], rate)

    torch.manual_seed(seed)
    unfreeze = callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=4)
    return run_lightning(path, epochs=12, module=Module(), callbacks=(unfreeze,), tuned=tuned)


@case("F", "Lightning")
def a_backbone_unfrozen_later(way: str) -> Outcome:
    """Against a good rate under the same unfreezing; the rate is found while there is but a head to train."""
    ratios = []
    for seed in range(3):
        with folder() as path:
            plain = _run_unfrozen(path, tuned=False, rate=3e-3, seed=seed).loss
            ratios.append(_run_unfrozen(path, tuned=True, seed=seed).loss / plain)
    return tasks.of_seeds(ratios, typical=1.1, worst=1.2)


@case("F", "Lightning")
def early_stopping_and_checkpoints_see_no_fork(way: str) -> Outcome:
    """What other callbacks monitor is the training that lives on: the early stop comes no sooner than without forks."""
    from lightning.pytorch import callbacks

    tuner = att.AutoTuneNet(torch_tasks.SPACE)
    with folder() as path:
        stopping = callbacks.EarlyStopping("val_loss", patience=2)
        keeper = callbacks.ModelCheckpoint(dirpath=path, monitor="val_loss")
        both = (stopping, keeper)
        ended = run_lightning(path, epochs=20, tuner=tuner, callbacks=both, val_check_interval=8)
        settled = [e["value"] for e in tuner.history.evals if e["is_settled"]]
        best = float(keeper.best_model_score) if keeper.best_model_score is not None else math.nan
    steps = ended.trainer.global_step
    is_ok = steps >= 200 and any(abs(best - value) < 1e-4 for value in settled)
    return "no stop within the first rounds, best of training", f"stopped at {steps} of 800, best {best:.3f}", is_ok


@case("F", "Lightning", "transformers", short=("Lightning",))
def a_typo_in_monitor(way: str) -> Outcome:
    with folder() as path:
        try:
            if way == "Lightning":
                ended = run_lightning(path, epochs=6, options={"monitor": "val_los"})
            else:
                ended = run_transformers(path, callback_options={"monitor": "eval_los"}, eval_strategy="epoch")
        except (ValueError, KeyError, RuntimeError) as error:
            return "refused, or said", f"refused: {str(error)[:80]}", "los" in str(error)
    said = [text for text in ended.said if "val_los" in text or "eval_los" in text]
    return "refused, or said", f"said {[text[:60] for text in said]}", bool(said)


# transformers.


def _transformers_plain(rate: float = 1e-2) -> float:
    with folder() as path:
        return run_transformers(path, tuned=False, learning_rate=rate).loss


def _bare(net: Any) -> Any:
    """A model that has no loss of its own."""

    class Bare(frameworks.Labelled):
        def forward(self, x: Any, labels: Any = None, **kwargs: Any) -> dict[str, Any]:
            return {"logits": self.net(x)}

    return Bare(net)


@case("F", "transformers", short=("transformers",))
def label_smoothing(way: str) -> Outcome:
    return _or_refused(lambda p: run_transformers(p, label_smoothing_factor=0.05), 1.15 * _transformers_plain())


@case("F", "transformers")
def a_loss_function_of_ones_own(way: str) -> Outcome:
    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        return F.cross_entropy(outputs["logits"], labels)

    options = {"compute_loss_func": loss}
    return _or_refused(
        lambda p: run_transformers(p, model=_bare(None), trainer_options=options), 1.15 * _transformers_plain()
    )


@case("F", "transformers")
def an_overridden_compute_loss(way: str) -> Outcome:
    import transformers

    class Own(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            outputs = model(inputs["x"])
            loss = F.cross_entropy(outputs["logits"], inputs["labels"])
            return (loss, outputs) if return_outputs else loss

    return _or_refused(
        lambda p: run_transformers(p, model=_bare(None), trainer_class=Own), 1.15 * _transformers_plain()
    )


@case("F", "transformers", short=("transformers",))
def remainders_of_an_accumulation(way: str) -> Outcome:
    """Seven batches an epoch, four to a step: every second step has three. Nothing is learned at such rates."""
    net = torch_tasks.new_model()
    with torch.no_grad():
        for p in net[2].parameters():
            p.zero_()
    tuner = att.AutoTuneNet({"learning_rate": (1e-12, 1e-10)})
    with folder() as path:
        run_transformers(
            path,
            model=frameworks.Labelled(net),
            tuner=tuner,
            samples=7 * 24,
            max_steps=60,
            gradient_accumulation_steps=4,
            learning_rate=1e-11,
        )
    losses = [row["loss"] for row in tuner.history.records]
    expected = math.log(tasks.CLASSES)
    got = f"{min(losses):.3f} to {max(losses):.3f}"
    return f"{expected:.3f} in every step", got, max(losses) - min(losses) < 0.02 and abs(max(losses) - expected) < 0.02


@case("F", "transformers")
def an_early_stop_that_sees_no_fork(way: str) -> Outcome:
    """It counts the user's evaluations of the training that lives on, and nothing else."""
    import transformers

    every, patience = 20, 3
    tuner = att.AutoTuneNet(torch_tasks.SPACE)
    with folder() as path:
        ended = run_transformers(
            path,
            max_steps=600,
            tuner=tuner,
            callbacks=(transformers.EarlyStoppingCallback(patience),),
            eval_strategy="steps",
            eval_steps=every,
            save_steps=every,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
        )
        state = ended.trainer.state
    seen = [e["value"] for e in tuner.history.evals if e["is_settled"] and e["step"] % every == 0]
    best = min(seen)
    is_due = state.global_step == 600 or best == min(seen[:-patience])
    is_ok = is_due and abs(best - state.best_metric) < 1e-6
    got = f"stopped at {state.global_step}, best {state.best_metric:.4f} of {len(seen)} settled"
    return f"best {best:.4f}, a stop {patience} evaluations after it", got, is_ok


# Schedulers.


def _with_scheduler(make: Any, *, before: bool, pass_it: bool) -> tuple[float, list[float], list[float], list[str]]:
    model = torch_tasks.new_model()
    opt = torch.optim.Adam(model.parameters(), 1e-4)
    plan = make(opt)
    tuner = att.AutoTuneNet(torch_tasks.SPACE)
    told, used = [], []
    with torch_tasks.collected() as said:
        tuner.attach(model, opt, plan if pass_it else None, total_steps=500)
        for k in range(500):
            told.append(float(tuner.hyperparams["learning_rate"]))
            used.append(opt.param_groups[0]["lr"])
            x, y = tasks.rows(k)
            loss = F.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y).long())
            opt.zero_grad()
            loss.backward()
            opt.step()
            if before:
                plan.step()
            tuner.step(loss)
            if not before:
                plan.step()
    return torch_tasks.loss_on(model, 2), told, used, said


@case("F", "loop", short=("loop",))
def a_scheduler_that_was_not_handed_over(way: str) -> Outcome:
    """Found, or refused: what is told to be in force is what the next step uses."""
    worst = 0.0
    lr = torch.optim.lr_scheduler
    for make in (lambda o: lr.LambdaLR(o, lambda k: 1.0 - k / 500), lambda o: lr.StepLR(o, 60, 0.5)):
        for before in (True, False):
            try:
                _, told, used, said = _with_scheduler(make, before=before, pass_it=False)
            except (ValueError, RuntimeError):
                continue
            if any("scheduler" in text for text in said):
                continue
            apart = [abs(math.log10(max(a, 1e-12) / max(b, 1e-12))) for a, b in zip(told[1:], used[1:], strict=True)]
            worst = max(worst, float(np.median(apart)))
    return "refused, said or found", f"told and used {worst:.2f} decades apart", worst < 0.05


@case("F", "Trainer", short=("Trainer",))
def a_scheduler_that_needs_the_metric(way: str) -> Outcome:
    def run(path: str) -> Any:
        return torch_tasks.run_trainer(
            total=300, scheduler=lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=5)
        )

    return _or_refused(run, 1.12 * torch_tasks.plain(total=300))


@case("F", "loop", "autotune", short=("loop",))
def two_names_of_one_number(way: str) -> Outcome:
    space = {"learning_rate": (1e-5, 1e-1), "lr": (1e-5, 1e-1)}
    try:
        if way == "loop":
            torch_tasks.run_loop(total=60, space=space)
        else:
            atn.autotune(optax.adam, space, 200, learning_rate=1e-3).init(tasks.new_params())
    except (ValueError, TypeError) as error:
        return "refused", f"refused: {str(error)[:70]}", True
    return "refused", "taken", False


@case("F", "loop")
def two_paths_to_one_dropout(way: str) -> Outcome:
    model = torch_tasks.new_model(dropout=0.2)
    try:
        torch_tasks.run_loop(total=60, model=model, space={"dropout": (0.0, 0.5), "2/dropout": (0.0, 0.5)})
    except (ValueError, TypeError) as error:
        return "refused", f"refused: {str(error)[:70]}", True
    return "refused", "taken", False


@case("F", "loop")
def validate_that_forgets_train(way: str) -> Outcome:
    model = torch_tasks.new_model(dropout=0.2)
    opt = torch.optim.Adam(model.parameters(), 1e-3)
    tuner = att.AutoTuneNet(torch_tasks.SPACE)
    trained = 0

    def validate() -> float:
        model.eval()
        with torch.no_grad():
            return float(F.cross_entropy(model(torch_tasks.tensors()[1][0]), torch_tasks.tensors()[1][1]))

    with torch_tasks.collected() as said:
        tuner.attach(model, opt, total_steps=300, validate=validate)
        for k in range(300):
            trained += model.training
            x, y = tasks.rows(k)
            loss = F.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y).long())
            opt.zero_grad()
            loss.backward()
            opt.step()
            tuner.step(loss)
    is_said = any("train" in text and "eval" in text for text in said)
    return "300 steps in training mode, or said", f"{trained}, said {is_said}", trained == 300 or is_said


_WORKERS = """
import sys, warnings, torch, autotunenet_torch as att
if __name__ == "__main__":
    warnings.simplefilter("always")
    x = torch.randn(160, 3)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :1]), 16, num_workers=2)
    model = torch.nn.Linear(3, 1)
    opt = torch.optim.Adam(model.parameters(), 1e-3)
    tuner = att.AutoTuneNet({"learning_rate": (1e-5, 1e-1)})
    tuner.attach(model, opt, total_steps=40)
    for epoch in range(4):
        for x, y in loader:
            loss = (model(x) - y).square().mean()
            opt.zero_grad(); loss.backward(); opt.step(); tuner.step(loss)
    print("done")
"""


@case("F", "loop")
def loader_workers_without_fork_warnings(way: str) -> Outcome:
    done = frameworks.python(_WORKERS)
    count = done.stderr.count("os.fork()")
    return "done, no warning of forks", f"{done.stdout.strip()}, {count} warnings", "done" in done.stdout and not count


_UNEVEN = """
import datetime, os, sys, torch, torch.distributed as dist, autotunenet_torch as att
rank, port = int(sys.argv[1]), sys.argv[2]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
dist.init_process_group("gloo", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=20))
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1))
opt = torch.optim.SGD(model.parameters(), 1e-2)
tuner = att.AutoTuneNet({"learning_rate": (1e-4, 1.0)})
tuner.attach(model.module, opt, total_steps=90)
with model.join():
    for k in range((80, 65)[rank]):
        x = torch.randn(8, 3)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        opt.zero_grad(); loss.backward(); opt.step(); tuner.step(loss.detach())
print("done", float(model.module.weight.detach().sum()))
"""


@case("F", "loop")
def uneven_ranks_under_join(way: str) -> Outcome:
    import concurrent.futures
    import subprocess

    with concurrent.futures.ThreadPoolExecutor() as pool:
        runs = [pool.submit(frameworks.python, _UNEVEN, str(rank), "29611", limit_s=75) for rank in (0, 1)]
        got = []
        for run in runs:
            try:
                done = run.result()
                last = (done.stderr.strip().splitlines() or ["?"])[-1]
                got.append("done" if "done" in done.stdout else last[:70])
            except subprocess.TimeoutExpired:
                got.append("HANGS")
    # The rank that has ended waits inside torch's own join, and is told by torch that the other is gone.
    is_clear = "HANGS" not in got and (all(t == "done" for t in got) or any("AutoTuneNet" in t for t in got))
    return "done, or a clear error", "; ".join(got), is_clear
