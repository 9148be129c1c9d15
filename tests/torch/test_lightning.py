"""The callback in Lightning's own Trainer."""

import logging
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pl = pytest.importorskip("lightning.pytorch")

import autotunenet_jax as atn  # noqa: E402
from autotunenet_torch import AutoTuneNet  # noqa: E402
from autotunenet_torch.lightning import AutoTuneCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
SPACE = {"learning_rate": (1e-4, 1.0)}


class Module(pl.LightningModule):
    def __init__(self, optimizers=1, manual=None):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Dropout(0.0), torch.nn.Linear(16, 3)
        )
        self.optimizers_wanted, self.manual = optimizers, manual
        self.automatic_optimization = manual is None

    def training_step(self, batch, index):
        if self.manual is not None:
            loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
            return self.manual(loss.detach())
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("val_loss", torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        if self.optimizers_wanted == 2:
            self.automatic_optimization = False
            return [torch.optim.SGD(self.parameters(), lr=1e-4) for _ in range(2)], []
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-4, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=200)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


OPTIONS = ("validate", "total_steps", "monitor", "callbacks", "loggers", "log_every")


def make(tmp_path, tuner, *, epochs=10, **kwargs):
    callback = AutoTuneCallback(tuner, **{name: kwargs.pop(name) for name in OPTIONS if name in kwargs})
    others = kwargs.pop("others", ())
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[*others, callback], default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False, **{"logger": False, **kwargs},
    )  # fmt: skip


def test_tunes_and_records(tmp_path, loader):
    tuner, module = AutoTuneNet(SPACE), Module()
    trainer = make(tmp_path, tuner, enable_checkpointing=False, accumulate_grad_batches=2, epochs=30)
    trainer.fit(module, loader, loader)
    history = tuner.history
    assert history.summary["steps"] == 180 == trainer.global_step
    assert history.rounds and tuner.best_hyperparams["learning_rate"] > 1e-2
    # Once per epoch and whenever the tuner asks, without the sanity check.
    assert len(history.evals) > 30 and history.rounds[0]["scored_by"] == "validation"
    assert history.evals[-1]["value"] < 0.6 and trainer.val_check_batch == 12
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(tuner.hyperparams["learning_rate"])


def test_forks_are_validated_in_epochs_that_lightning_leaves_out(tmp_path, loader):
    tuner = AutoTuneNet(SPACE)
    trainer = make(tmp_path, tuner, enable_checkpointing=False, check_val_every_n_epoch=3, epochs=30)
    trainer.fit(Module(), loader, loader)
    ended = [fork["status"] for row in tuner.history.rounds for fork in row["forks"]]
    assert len(ended) > 3 and set(ended) == {"kept", "lost"}, ended
    assert (trainer.check_val_every_n_epoch, trainer.val_check_batch) == (3, 12)


@pytest.mark.skipif(not hasattr(pl.callbacks, "WeightAveraging"), reason="this version of Lightning has none")
def test_an_average_of_the_weights_goes_back_with_losing_forks(tmp_path, loader):
    averaging = pl.callbacks.WeightAveraging()
    trainer = make(tmp_path, AutoTuneNet(SPACE), others=[averaging], enable_checkpointing=False, epochs=30)
    trainer.fit(Module(), loader, loader)
    assert 0 < int(averaging._average_model.n_averaged) < 0.9 * trainer.global_step


@pytest.mark.parametrize("factors", [{0: 4, 5: 1}, {0: 1, 5: 4}])
def test_a_loss_is_that_of_a_batch_however_many_make_a_step(tmp_path, loader, factors):
    class Told(Module):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            found.append(float(loss))
            return loss

    found, tuner = [], AutoTuneNet(SPACE)
    scheduler = pl.callbacks.GradientAccumulationScheduler(factors)
    trainer = make(tmp_path, tuner, others=[scheduler], enable_checkpointing=False, epochs=20)
    trainer.fit(Told(), loader)
    early, late = (
        np.reshape(part, (-1, count)).mean(1)
        for part, count in zip((found[:60], found[60:]), factors.values(), strict=True)
    )
    losses = [row["loss"] for row in tuner.history.records]
    np.testing.assert_allclose(losses, [*early, *late], rtol=1e-5)
    assert all(event["kind"] != "rollback" for event in tuner.history.events)


def test_the_budget_where_later_epochs_accumulate_more(tmp_path, loader):
    tuner = AutoTuneNet(SPACE)
    scheduler = pl.callbacks.GradientAccumulationScheduler({0: 1, 4: 2})
    trainer = make(tmp_path, tuner, others=[scheduler], enable_checkpointing=False, epochs=20)
    trainer.fit(Module(), loader)
    assert tuner.history.summary["steps"] == tuner.history.summary["total_steps"] == 4 * 12 + 16 * 6


@pytest.mark.parametrize("has_statistics", [False, True])
def test_what_lightning_averages_at_the_end_is_what_the_run_ends_with(tmp_path, loader, has_statistics):
    """With BatchNorm it adds an epoch without training, after which the tuner must not go back to its best state."""
    module, tuner, averaging = Module(), AutoTuneNet(SPACE), pl.callbacks.StochasticWeightAveraging(1e-2)
    if has_statistics:
        module.net = torch.nn.Sequential(torch.nn.BatchNorm1d(6), module.net)
    trainer = make(tmp_path, tuner, others=[averaging], enable_checkpointing=False, epochs=20)
    trainer.fit(module, loader, loader)
    for mine, average in zip(module.parameters(), averaging._average_model.parameters(), strict=True):
        torch.testing.assert_close(mine.detach(), average.detach())
    summary = tuner.history.summary
    assert summary["steps"] == summary["total_steps"] == 20 * 12
    assert "budget spent" not in {event["kind"] for event in tuner.history.events}


def test_a_smoke_test_runs_all_that_a_program_calls(tmp_path, loader):
    tuner = AutoTuneNet(SPACE)
    trainer = make(tmp_path, tuner, fast_dev_run=True)
    trainer.fit(Module(), loader, loader)
    assert trainer.global_step == 1 and tuner.history.summary["steps"] == 1
    assert list(tuner.best_hyperparams) == list(SPACE) and not tuner.history.rounds


def test_slow_hyperparameters_by_a_validation_of_ones_own(tmp_path, loader):
    batch = next(iter(loader))
    tuner = AutoTuneNet({**SPACE, "dropout": (0.0, 0.5)}, max_share=0.6)

    def validate(module):
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(module.net(batch[0]), batch[1])

    make(tmp_path, tuner, epochs=25, validate=validate, enable_checkpointing=False).fit(Module(), loader)
    assert [row["kind"] for row in tuner.history.rounds][-1] == "slow"


def test_resumes_from_lightnings_checkpoint(tmp_path, loader):
    tuner, path = AutoTuneNet(SPACE), str(tmp_path / "last.ckpt")
    trainer = make(tmp_path, tuner, epochs=7, total_steps=180)
    trainer.fit(Module(), loader)
    trainer.save_checkpoint(path)
    before = tuner.history.to_dict()
    again = AutoTuneNet(SPACE)
    make(tmp_path, again, epochs=15, total_steps=180).fit(Module(), loader, ckpt_path=path)
    after = again.history.to_dict()
    assert before["summary"]["steps"] == 84 and after["summary"]["steps"] == 180
    assert after["rounds"] == before["rounds"] and after["records"][:84] == before["records"]
    with pytest.raises(ValueError, match="run of 180 steps"):
        make(tmp_path, AutoTuneNet(SPACE), epochs=15, total_steps=179).fit(Module(), loader, ckpt_path=path)


def test_two_optimizers_are_refused(tmp_path, loader):
    with pytest.raises(ValueError, match="gave 2"):
        make(tmp_path, AutoTuneNet(SPACE), enable_checkpointing=False).fit(Module(optimizers=2), loader)


@pytest.mark.parametrize("result, given", [(lambda loss: None, "nothing"), (lambda loss: {"my_loss": loss}, "dict")])
def test_manual_optimisation_has_to_return_its_loss(tmp_path, loader, result, given):
    trainer = make(tmp_path, AutoTuneNet(SPACE), enable_checkpointing=False)
    with pytest.raises(ValueError, match=rf"returns no loss.*under 'loss'; got {given}"):
        trainer.fit(Module(manual=result), loader, loader)


def test_manual_optimisation_that_returns_its_loss(tmp_path, loader):
    tuner = AutoTuneNet(SPACE)
    make(tmp_path, tuner, enable_checkpointing=False, epochs=5).fit(Module(manual=lambda loss: {"loss": loss}), loader)
    assert tuner.history.summary["steps"] == 60


def test_a_metric_that_is_not_logged_is_refused_with_what_there_is(tmp_path, loader):
    trainer = make(tmp_path, AutoTuneNet(SPACE), enable_checkpointing=False, monitor="val_acc")
    with pytest.raises(ValueError, match=r"monitor='val_acc'.*val_loss"):
        trainer.fit(Module(), loader, loader)


@pytest.mark.parametrize("is_first", [False, True])
def test_callbacks_that_monitor_see_no_fork(tmp_path, loader, is_first):
    seen = []

    class Watch(pl.callbacks.EarlyStopping):
        def on_validation_end(self, trainer, pl_module):
            seen.append(float(trainer.callback_metrics["val_loss"]))
            super().on_validation_end(trainer, pl_module)

    tuner = AutoTuneNet(SPACE)
    stopping = Watch("val_loss", patience=50)
    keeper = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", save_top_k=-1)
    trainer = make(tmp_path, tuner, others=(stopping, keeper), epochs=10, val_check_interval=5, num_sanity_val_steps=0)
    if not is_first:
        trainer.callbacks.reverse()
    trainer.fit(Module(), loader, loader)
    settled = [row["value"] for row in tuner.history.evals if row["is_settled"]]
    assert 1 < len(seen) < len(tuner.history.evals)
    assert all(any(value == pytest.approx(v) for v in settled) for value in seen)
    assert all(any(float(v) == pytest.approx(s) for s in settled) for v in keeper.best_k_models.values())
    assert "on_validation_end" not in vars(stopping)


def test_a_batch_that_is_skipped_counts_for_nothing(tmp_path, loader):
    class Skipping(Module):
        def training_step(self, batch, index):
            return None if index % 6 == 2 else super().training_step(batch, index)

    tuner = AutoTuneNet(SPACE)
    make(tmp_path, tuner, enable_checkpointing=False, epochs=8).fit(Skipping(), loader, loader)
    assert tuner.history.summary["steps"] == 96 and tuner.history.summary["rollbacks"] == 0
    assert int(tuner._session.controller.state.health.bad_steps) == 16


def test_a_checkpoint_without_the_tuner_is_refused(tmp_path, loader):
    path = str(tmp_path / "bare.ckpt")
    bare = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    bare.fit(Module(), loader)
    bare.save_checkpoint(path)
    with pytest.raises(ValueError, match="holds no state of AutoTuneCallback"):
        make(tmp_path, AutoTuneNet(SPACE), enable_checkpointing=False).fit(Module(), loader, ckpt_path=path)


class Naming(Module):
    """Logs its validation metric under a name."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def validation_step(self, batch, index):
        self.log("other", 0.5)
        self.log(self.name, torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))


def warned(tuner):
    return {event["kind"]: event["message"] for event in tuner.history.events}


@pytest.mark.parametrize("name", ["val/loss", "valid_loss"])
def test_the_usual_names_are_found(tmp_path, loader, name):
    tuner = AutoTuneNet(SPACE)
    make(tmp_path, tuner, enable_checkpointing=False, epochs=4).fit(Naming(name), loader, loader)
    assert tuner.history.evals and "unknown metric" not in warned(tuner)


def test_metrics_none_of_which_is_known_are_named(tmp_path, loader, caplog):
    tuner = AutoTuneNet({**SPACE, "dropout": (0.0, 0.5)})
    with caplog.at_level(logging.WARNING, "lightning.pytorch.autotunenet"):
        make(tmp_path, tuner, enable_checkpointing=False, epochs=5).fit(Naming("elbo"), loader, loader)
    assert not tuner.history.evals
    assert [m for m in caplog.messages if "elbo, other" in m and "monitor=" in m] == [warned(tuner)["unknown metric"]]
    assert "dropout stays as it starts" in warned(tuner)["no metric"] and "self.log" in warned(tuner)["no metric"]


@pytest.mark.parametrize(("name", "mode", "is_doubted"), [("val_acc", "min", True), ("val_acc", "max", False)])
def test_a_metric_of_the_other_direction_is_told_of(tmp_path, loader, name, mode, is_doubted):
    tuner = AutoTuneNet(SPACE, mode=mode)
    make(tmp_path, tuner, enable_checkpointing=False, epochs=4, monitor=name).fit(Naming(name), loader, loader)
    assert ("direction" in warned(tuner)) == is_doubted


def test_a_training_that_is_stopped_early_ends_in_its_best_state(tmp_path, loader):
    class Worse(Module):
        """Loses a fifth of its weights after each batch of the last epochs."""

        def on_train_batch_end(self, *args):
            if self.current_epoch >= 10:
                with torch.no_grad():
                    self.net[3].weight.mul_(0.8)

    held_out = torch.utils.data.DataLoader(loader.dataset, 16)
    tuner, module, stopping = AutoTuneNet(SPACE), Worse(), pl.callbacks.EarlyStopping("val_loss", patience=2)
    trainer = make(tmp_path, tuner, others=[stopping], enable_checkpointing=False, epochs=30)
    trainer.fit(module, loader, held_out)
    assert trainer.global_step < 180 and "ends in its best state" in tuner.history.events[-1]["message"]
    with torch.no_grad():
        end = sum(torch.nn.functional.cross_entropy(module.net(x), y).item() for x, y in held_out) / len(held_out)
    best = min(row["value"] for row in tuner.history.evals if row["is_settled"])
    assert end <= best + 1e-6 < tuner.history.evals[-1]["value"]


@pytest.mark.parametrize("steps", [10, 48])
def test_a_plan_that_the_clock_cuts_short_is_told(tmp_path, loader, monkeypatch, steps):
    tuner = AutoTuneNet(SPACE)
    trainer = make(tmp_path, tuner, enable_checkpointing=False, epochs=4, max_time={"hours": 1})

    def elapsed(timer, stage=None):
        return 3600.0 * trainer.global_step / steps

    monkeypatch.setattr(pl.callbacks.Timer, "time_elapsed", elapsed)
    trainer.fit(Module(), loader, loader)
    assert trainer.global_step == steps
    told = warned(tuner).get("time", "")
    assert (f"after {steps} of 48 steps" in told and "total_steps" in told) == bool(told) == (steps < 48)


def test_callbacks_loggers_and_the_tuned_values(tmp_path, loader):
    class Stops(atn.Callback):
        def on_decision(self, decision):
            raise atn.StopTraining("enough")

        def on_end(self, history):
            self.ended = True

    rows = []

    class Logger(pl.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step=None):
            rows.append((step, metrics))

    stops, seen = Stops(), []
    tuner = AutoTuneNet(SPACE)
    trainer = make(
        tmp_path, tuner, enable_checkpointing=False, logger=Logger(), callbacks=[stops],
        loggers=[lambda row, step: seen.append((step, row))], log_every=7, epochs=30,
    )  # fmt: skip
    trainer.fit(Module(), loader, loader)
    [decision] = tuner.history.rounds
    assert decision["end"] <= trainer.global_step < 180 and stops.ended
    steps = [step for step, row in seen if "train/loss" in row]
    assert steps[-1] == decision["forks"][decision["best"]]["end"] and sum(step % 7 == 0 for step in steps) > 1
    told = [(step, row["tuner/learning_rate"]) for step, row in rows if "tuner/learning_rate" in row]
    assert [step for step, _ in told] == [1, decision["end"]]
    assert told[1][1] == pytest.approx(decision["chosen"]["learning_rate"])
