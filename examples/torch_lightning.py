"""Lightning's Trainer with the tuner as a callback.

Run: pip install lightning, then python examples/torch_lightning.py
"""

import argparse
import tempfile

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from autotunenet_torch import AutoTuneNet
from autotunenet_torch.lightning import AutoTuneCallback


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))

    def loss(self, batch):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch, index):
        return self.loss(batch)

    def validation_step(self, batch, index):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-5)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()

    pl.seed_everything(0, verbose=False)
    x = torch.randn(1024, 20)
    data = TensorDataset(x, (x[:, :3] + 0.5 * x[:, 3:6]).argmax(1))
    train, val = torch.utils.data.random_split(data, [768, 256])
    val_batch = next(iter(DataLoader(val, batch_size=256)))

    def validate(module):
        module.eval()
        with torch.no_grad():
            loss = module.loss(val_batch)
        module.train()
        return loss

    tuner = AutoTuneNet({"learning_rate": (1e-5, 1e-1), "weight_decay": (1e-4, 1.0)})
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=args.epochs,
            accelerator="cpu",
            callbacks=[AutoTuneCallback(tuner, validate=validate)],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(), DataLoader(train, 32, shuffle=True), DataLoader(val, 256))
    print(f"validation loss {tuner.history.evals[-1]['value']:.3f} with {tuner.best_hyperparams}")


if __name__ == "__main__":
    main()
