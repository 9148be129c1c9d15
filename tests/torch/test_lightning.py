"""The callback in Lightning's own Trainer."""

import logging
import warnings

import pytest

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pl = pytest.importorskip("lightning.pytorch")

from autotunenet_torch import AutoTuneNet  # noqa: E402
from autotunenet_torch.lightning import AutoTuneCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
SPACE = {"learning_rate": (1e-4, 1.0)}


class Module(pl.LightningModule):
    def __init__(self, optimizers=1):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Dropout(0.0), torch.nn.Linear(16, 3)
        )
        self.optimizers_wanted = optimizers

    def training_step(self, batch, index):
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


def make(tmp_path, tuner, *, epochs=10, **kwargs):
    callback = AutoTuneCallback(tuner, **{k: kwargs.pop(k) for k in ("validate", "total_steps") if k in kwargs})
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[callback], default_root_dir=tmp_path, logger=False,
        enable_progress_bar=False, enable_model_summary=False, **kwargs,
    )  # fmt: skip


def test_tunes_and_records(tmp_path, loader):
    tuner, module = AutoTuneNet(SPACE), Module()
    trainer = make(tmp_path, tuner, enable_checkpointing=False, accumulate_grad_batches=2, epochs=30)
    trainer.fit(module, loader, loader)
    history = tuner.history
    assert history.summary["steps"] == 180 == trainer.global_step
    assert history.rounds and tuner.best_hyperparams["learning_rate"] > 1e-2
    assert len(history.evals) == 30  # once per epoch, without the sanity check
    assert history.evals[-1]["value"] < 0.6
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(tuner.hyperparams["learning_rate"])


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
