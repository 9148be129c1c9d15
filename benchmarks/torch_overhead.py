"""What the tuner costs a PyTorch training: per step outside rounds, per decision, and on import.

Times are those on the clock, and processor time of all threads together, which other programs disturb less.

Run: python -m benchmarks.torch_overhead
"""

import subprocess
import sys
import time

import numpy as np
import torch

from autotunenet_torch import AutoTuneNet

STEPS_S = (5e-3, 10e-3)


def per_step(steps):
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tuner = AutoTuneNet({"learning_rate": (1e-5, 1e-1)}, total_steps=100_000)
    tuner.attach(model, optimizer)
    level, trained, decisions = 1.0, [], []
    while len(trained) < steps:
        was_training = tuner._session.controller.phase == 0
        level *= 0.9999
        loss = level + 1e-3 * torch.rand(())
        rounds = len(tuner._session.recorder.history.rounds), tuner._session.controller.phase
        start = time.perf_counter(), time.process_time()
        tuner.step(loss)
        took = time.perf_counter() - start[0], time.process_time() - start[1]
        if was_training:
            trained.append(took)
        elif rounds != (len(tuner._session.recorder.history.rounds), tuner._session.controller.phase):
            decisions.append(took)
    return np.array(trained), np.array(decisions)


def import_seconds(code):
    """CPU seconds of an import in a new process; the least of three."""
    program = f"import time; {code[0]}; a = time.process_time(); {code[1]}; print(time.process_time() - a)"
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True) for _ in range(3)]
    return min(float(run.stdout) for run in runs)


def main():
    torch.set_num_threads(1)
    per_step(100)  # compiles
    runs = [per_step(1000) for _ in range(5)]
    trained, decisions = (np.concatenate(times) for times in zip(*runs, strict=True))
    for name, times in (("step outside rounds", trained), ("decision", decisions)):
        for clock, column in zip(("clock", "processor"), times.T, strict=True):
            least, median, high = 1e3 * np.percentile(column, [1, 50, 95])
            print(f"{name}, {clock}: {least:.3f} / {median:.3f} / {high:.3f} ms (1st, 50th, 95th percentile)")
    for step in STEPS_S:
        print(f"a step of {1e3 * step:.0f} ms becomes {1 + np.median(trained[:, 0]) / step:.3f} times as long")
    base = "import torch, jax"
    print(f"import beyond torch and jax: {import_seconds((base, 'import autotunenet_torch')):.2f} CPU seconds")


if __name__ == "__main__":
    main()
