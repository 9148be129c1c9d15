"""PyTorch in a few lines: digits, from a learning rate a hundred times too small.

Run: python examples/torch_quickstart.py
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from autotunenet_torch import AutoTuneNet, Trainer


def digits(batch_size=32):
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32)[order] / 16.0
    y = torch.tensor(labels)[order]
    train, val = TensorDataset(x[:1300], y[:1300]), TensorDataset(x[1300:], y[1300:])
    return DataLoader(train, batch_size=batch_size, shuffle=True, drop_last=True), DataLoader(val, batch_size=512)


def make_model():
    return torch.nn.Sequential(
        torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(128, 10)
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--start", type=float, default=1e-5)
    parser.add_argument("--quiet", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(0)
    train_loader, val_loader = digits()
    model = make_model()

    tuner = AutoTuneNet(
        param_space={"learning_rate": (1e-5, 1e-2), "dropout": (0.1, 0.5)}, initial={"learning_rate": args.start}
    )
    trainer = Trainer(
        loss_fn=torch.nn.functional.cross_entropy,
        optimizer=torch.optim.AdamW,
        epochs=args.epochs,
        progress=not args.quiet,
    )
    history = trainer.fit(model, train_loader, val_loader, tuner=tuner)

    for row in history.rounds:
        print(f"step {row['end']:4d}: {row['kind']} round of {len(row['forks'])} forks -> {row['chosen']}")
    values = trainer.validate()
    print(f"validation loss {values['loss']:.3f}, accuracy {100 * values['accuracy']:.1f} %")
    print(f"{100 * history.summary['share_discarded']:.0f} % of the steps went into forks that were not kept")


if __name__ == "__main__":
    main()
