"""A loop of your own under accelerate: gradient accumulation, and any number of processes.

Run: pip install accelerate, then python examples/torch_accelerate.py, or start it by accelerate launch.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset

from autotunenet_torch import AutoTuneNet


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--accumulate", type=int, default=2)
    args = parser.parse_args()

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=args.accumulate)
    set_seed(0)
    x = torch.randn(1280, 20)
    data = TensorDataset(x, (x[:, :3] + 0.5 * x[:, 3:6]).argmax(1))
    train, val = torch.utils.data.random_split(data, [1024, 256])
    model = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)  # far too small
    model, optimizer, loader, val_loader = accelerator.prepare(
        model, optimizer, DataLoader(train, 32, shuffle=True), DataLoader(val, 256)
    )

    def validate():
        model.eval()
        with torch.no_grad():
            losses = [torch.nn.functional.cross_entropy(model(x), y) for x, y in val_loader]
        model.train()
        return torch.stack(losses).mean()

    # What prepare made is taken as it is. The loader's length is that of this process's share.
    tuner = AutoTuneNet({"learning_rate": (1e-5, 1e-1), "weight_decay": (1e-4, 1.0)})
    total_steps = args.epochs * -(-len(loader) // args.accumulate)
    tuner.attach(model, optimizer, scaler=accelerator.scaler, total_steps=total_steps, validate=validate)
    losses = []
    for _ in range(args.epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = torch.nn.functional.cross_entropy(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
            if accelerator.sync_gradients:  # an optimizer step was made: tell its loss, averaged over its batches
                tuner.step(torch.stack(losses).mean())
                losses.clear()
    accelerator.print(f"validation loss {validate().item():.3f} with {tuner.best_hyperparams}")


if __name__ == "__main__":
    main()
