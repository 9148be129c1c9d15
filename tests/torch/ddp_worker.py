"""One process of two that train together; writes what it decided."""

import json
import sys

import torch
import torch.distributed as dist

import autotunenet_jax as atn
from autotunenet_torch import AutoTuneNet, Trainer


def train(rank, world, out):
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(
        torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Dropout(0.1), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    )
    x = torch.randn(256, 6)
    data = torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))
    sampler = torch.utils.data.DistributedSampler(data, world, rank)
    loader = torch.utils.data.DataLoader(data, batch_size=16, sampler=sampler)
    torch.manual_seed(rank)  # each process draws its own dropout
    tuner = AutoTuneNet({"learning_rate": (1e-4, 1.0), "dropout": (0.0, 0.5)}, max_share=0.6)
    trainer = Trainer(torch.nn.functional.cross_entropy, epochs=32, progress=False)
    with atn.Snapshots(f"{out}/run/rank{rank}", space=tuner.space, keep=20) as snapshots:
        snapshots.is_due = lambda: True
        history = trainer.fit(model, loader, loader, tuner=tuner, snapshots=snapshots)
        snapshots.wait()
        if rank == 1:  # as if this process had been killed before its last snapshot was written
            snapshots.abandon(after_step=255)
    return {
        "rounds": history.rounds,
        "evals": history.evals,
        "values": [row["learning_rate"] for row in history.records],
        "losses": [row["loss"] for row in history.records],
        "model": [p.detach().double().sum().item() for p in model.parameters()],
        "accuracy": trainer.validate()["accuracy"],
        "resumed": [event["step"] for event in history.events if event["kind"] == "resume"],
    }


def main(rank, world, store, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    result = [train(rank, world, out) for _ in range(2)]  # the second goes on where the first was saved
    with open(f"{out}/rank{rank}.json", "w") as file:
        json.dump(result, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
