"""One process of two whose data end at different times; writes what it decided."""

import contextlib
import json
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from autotunenet_torch import AutoTuneNet

STEPS = (160, 130)


def main(rank, world, store, out, how):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(0)
    x = torch.randn(256, 6)
    y = x[:, :3].argmax(1)
    model = DistributedDataParallel(torch.nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    loss_fn = torch.nn.functional.cross_entropy

    def validate():
        with torch.no_grad():
            return loss_fn(model.module(x), y)

    tuner = AutoTuneNet({"learning_rate": (1e-4, 1.0)})
    total = STEPS[rank] if how == "other budgets" else max(STEPS)
    tuner.attach(model, optimizer, total_steps=total, validate=validate)
    torch.manual_seed(rank)
    with model.join() if how == "join" else contextlib.nullcontext():
        for _ in range(STEPS[rank]):
            rows = torch.randint(256, (16,))
            loss = loss_fn(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            tuner.step(loss)
    history = tuner.history
    result = {
        "rounds": history.rounds,
        "evals": [entry["step"] for entry in history.evals],
        "rates": [row["learning_rate"] for row in history.records],
        "steps": history.summary["steps"],
        "model": [p.detach().double().sum().item() for p in model.parameters()],
        "loss": float(validate()),
        "is_free": "join_hook" in vars(model),
    }
    tuner.finish()
    result["is_free"] = result["is_free"] and "join_hook" not in vars(model)
    with open(f"{out}/rank{rank}.json", "w") as file:
        json.dump(result, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
