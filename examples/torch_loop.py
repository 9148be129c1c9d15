"""A PyTorch loop of your own, with a scheduler, a validation on demand and a checkpoint.

Run: python examples/torch_loop.py
"""

import argparse

import torch

from autotunenet_torch import AutoTuneNet


def batch(size=64):
    x = torch.randn(size, 16)
    return x, torch.sin(2.0 * x[:, :1]) + x[:, 1:2] * x[:, 2:3] + 0.1 * torch.randn(size, 1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--checkpoint", default=None)
    args = parser.parse_args()

    torch.manual_seed(0)
    validation = batch(1024)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=20)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps - 20)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], milestones=[20])

    def validate():
        with torch.no_grad():
            return torch.nn.functional.mse_loss(model(validation[0]), validation[1])

    tuner = AutoTuneNet({"learning_rate": (1e-5, 1e-1), "weight_decay": (1e-4, 1.0)})
    tuner.attach(model, optimizer, scheduler, total_steps=args.steps, validate=validate)
    for step in range(args.steps):
        x, y = batch()
        loss = torch.nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        tuner.step(loss)  # forks, restores, guards, and sets the hyperparameters for the next step
        if step % 100 == 0:
            print(f"step {step:4d}  loss {loss.item():.3f}  rate {tuner.hyperparams['learning_rate']:.2e}")
    print(f"validation loss {validate().item():.3f} with {tuner.best_hyperparams}")
    if args.checkpoint:
        torch.save({"model": model.state_dict(), "tuner": tuner.state_dict()}, args.checkpoint)


if __name__ == "__main__":
    main()
