"""One process of two that share a model out among themselves; writes what it decided, or is killed before it can.

The one that is killed has trained to the end once before. "whole" is that alone, and "again" what comes after.
"""

import itertools
import json
import os
import signal
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import autotunenet_jax as atn
from autotunenet_torch import AutoTuneNet, Trainer

STEPS, KILLED_AT = 200, 165


class Kill(atn.Callback):
    """Ends the process as the kernel would."""

    def on_step(self, step):
        if step.step >= KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)


def train(rank, world, folder, *, is_killed, fault_at):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 17), torch.nn.Dropout(0.1), torch.nn.ReLU(), torch.nn.Linear(17, 3))
    for layer in (model[0], model[3], model):
        fully_shard(layer)
    x = torch.randn(256, 6)
    data = torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))
    sampler = torch.utils.data.DistributedSampler(data, world, rank)
    loader = torch.utils.data.DataLoader(data, batch_size=16, sampler=sampler)
    torch.manual_seed(rank)

    def optimizer(parameters):
        """Adam, whose gradients are once not finite in the part of one process."""
        made, counts = torch.optim.Adam(parameters, 1e-3), itertools.count()

        def spoil(*_):
            if next(counts) == fault_at and rank == 0:
                made.param_groups[0]["params"][0].grad.to_local().view(-1)[0] = float("nan")

        made.register_step_pre_hook(spoil)
        return made

    tuner = AutoTuneNet({"learning_rate": (1e-4, 1.0)})
    killer = (Kill(),) if is_killed and rank == 1 else ()
    options = {"callbacks": killer, "log_every": 1, "eval_every": 20}
    trainer = Trainer(torch.nn.functional.cross_entropy, optimizer, steps=STEPS, progress=False, **options)
    with atn.Snapshots(f"{folder}/rank{rank}", space=tuner.space, keep=20) as snapshots:
        snapshots.is_due = lambda: True
        history = trainer.fit(model, loader, loader, tuner=tuner, snapshots=snapshots)
    held = {name: list(p.to_local().shape) for name, p in model.named_parameters()}
    return {
        "rounds": history.rounds,
        "evals": history.evals,
        "rates": [row["learning_rate"] for row in history.records],
        "model": [p.full_tensor().double().sum().item() for p in model.parameters()],
        "accuracy": trainer.validate()["accuracy"],
        "held": held,
        "skipped": int(tuner._attached().controller.state.health.bad_steps),
        "resumed": [event["step"] for event in history.events if event["kind"] == "resume"],
    }


def main(rank, world, store, out, how):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    if how in ("whole", "killed"):
        whole = train(rank, world, f"{out}/a", is_killed=False, fault_at=120)
        with open(f"{out}/whole{rank}.json", "w") as file:
            json.dump(whole, file)
    if how != "whole":
        result = train(rank, world, f"{out}/b", is_killed=how == "killed", fault_at=120)
        with open(f"{out}/rank{rank}.json", "w") as file:
            json.dump(result, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
