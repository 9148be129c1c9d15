"""How close does a tuned run from a bad start come to the best of a sweep that costs seven runs?

The model, data and budget of examples/torch_quickstart.py. The sweep trains with seven rates under a linear decay, for
as many steps; the tuned runs start at five rates. Final validation losses, and their ratios to the best of the sweep.

Run: python -m benchmarks.torch_quickstart
"""

import argparse
import importlib.util
import json
import math
import pathlib

import torch

from autotunenet_torch import AutoTuneNet, Trainer

_EXAMPLE = pathlib.Path(__file__).resolve().parent.parent / "examples" / "torch_quickstart.py"
SWEEP = [1e-5, 3.16e-5, 1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2]
STARTS = [1e-5, 1e-4, 1e-3, 3e-3, 1e-2]


def example():
    spec = importlib.util.spec_from_file_location("torch_quickstart", _EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plain(rate, epochs, seed, quickstart):
    torch.manual_seed(seed)
    train_loader, val_loader = quickstart.digits()
    model = quickstart.make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    steps = epochs * len(train_loader)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    for _ in range(epochs):
        for x, y in train_loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()
    model.eval()
    with torch.no_grad():
        x, y = next(iter(val_loader))
        return torch.nn.functional.cross_entropy(model(x), y).item()


def tuned(start, epochs, seed, quickstart):
    torch.manual_seed(seed)
    train_loader, val_loader = quickstart.digits()
    tuner = AutoTuneNet(
        {"learning_rate": (1e-5, 1e-2), "dropout": (0.1, 0.5)}, initial={"learning_rate": start}, seed=seed
    )
    trainer = Trainer(torch.nn.functional.cross_entropy, torch.optim.AdamW, epochs=epochs, progress=False)
    history = trainer.fit(quickstart.make_model(), train_loader, val_loader, tuner=tuner)
    return trainer.validate()["loss"], tuner.best_hyperparams, history.summary["share_discarded"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", default=None, help="where to write the figures as JSON")
    args = parser.parse_args()
    quickstart = example()
    seeds = range(args.seeds)
    sweep = {rate: [plain(rate, args.epochs, seed, quickstart) for seed in seeds] for rate in SWEEP}
    means = {rate: math.exp(sum(map(math.log, losses)) / len(losses)) for rate, losses in sweep.items()}
    best = min(means, key=means.get)
    for rate, loss in means.items():
        print(f"linear decay from {rate:.0e}: {loss:.4f}{'  <- best' if rate == best else ''}")
    logs = []
    for start in STARTS:
        ratios = []
        for seed in seeds:
            loss, chosen, share = tuned(start, args.epochs, seed, quickstart)
            ratios.append(loss / sweep[best][seed])
            print(f"tuned from {start:.0e}, seed {seed}: {loss:.4f} = {ratios[-1]:.3f} x best; {chosen}; {share:.2f}")
        logs += [math.log(ratio) for ratio in ratios]
    result = {"best_rate": best, "best_loss": means[best], "ratio": math.exp(sum(logs) / len(logs))}
    print(f"geometric mean over {len(logs)} tuned runs: {result['ratio']:.3f} x the best of the sweep")
    if args.out:
        pathlib.Path(args.out).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
