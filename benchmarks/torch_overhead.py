"""What the tuner costs a PyTorch training: per step outside rounds, per decision, on import, and in memory.

A step with the tuner is timed beside a plain one of a twin, one after the other in one process, and the difference of
their percentiles is taken: what disturbs the machine disturbs both. "quiet" is at the tenth percentile, where least
does. Times are processor time of the training's own thread, which other programs disturb less, and on the clock.

Run: python -m benchmarks.torch_overhead
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch

from autotunenet_torch import AutoTuneNet

# Steps of a run by when its last round is over.
WARM_STEPS, TOTAL_STEPS = 1600, 8000

_RESIDENT = """
def resident():
    with open("/proc/self/status") as file:
        return int(file.read().split("VmRSS:")[1].split()[0]) / 1024
"""
_IMPORT = """
import time, torch
held, start = resident(), time.process_time()
from autotunenet_torch import AutoTuneNet, Trainer
print(time.process_time() - start, resident() - held)
"""
_RUN = """
import time, torch
from autotunenet_torch import AutoTuneNet
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
model(torch.randn(8, 4)).square().mean().backward()
optimizer.step()
held, begun = resident(), time.process_time()
tuner = AutoTuneNet({"learning_rate": (1e-5, 1e-1)}, total_steps=1000)
made = time.process_time()
tuner.attach(model, optimizer)
attached, longest, at = time.process_time(), 0.0, 0
for step in range(120):
    start = time.process_time()
    tuner.step(1.0 / (step + 1))
    took = time.process_time() - start
    first = took if step == 0 else first
    longest, at = max((longest, at), (took if step else 0.0, step))
print(made - begun, attached - made, first, longest, resident() - held)
"""


def pair():
    """A training to be tuned and its plain twin, as functions that take one step each."""

    def make():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

    x, y = torch.randn(32, 64), torch.randint(10, (32,))
    (model, optimizer), twin = make(), make()
    tuner = AutoTuneNet({"learning_rate": (1e-5, 1e-1)}, total_steps=TOTAL_STEPS)
    tuner.attach(model, optimizer)

    def step(model, optimizer, tuner=None):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if tuner is not None:
            tuner.step(loss)

    return tuner, lambda: step(model, optimizer, tuner), lambda: step(*twin)


def timed(function):
    start = time.thread_time(), time.perf_counter()
    function()
    return time.thread_time() - start[0], time.perf_counter() - start[1]


def per_step(steps):
    """Milliseconds of plain steps and of tuned ones, on both clocks."""
    tuner, tuned, plain = pair()
    controller = tuner._session.controller
    while controller.step < WARM_STEPS:
        tuned()
    plains, tunes = [], []
    while len(plains) < steps:
        is_training = controller.phase == 0
        took, own = timed(tuned), timed(plain)
        if is_training and controller.phase == 0:
            plains.append(own)
            tunes.append(took)
    return 1e3 * np.array(plains), 1e3 * np.array(tunes)


def in_new_process(program, **environment):
    """The numbers that a program prints, the least of three."""
    runs = [
        subprocess.run(
            [sys.executable, "-c", _RESIDENT + program],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=True,
        )
        for _ in range(3)
    ]
    return np.min([[float(number) for number in run.stdout.split()] for run in runs], axis=0)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--out", default=None, help="where to write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    plain, tuned = per_step(args.steps)
    figures = {}
    for column, clock in enumerate(("processor", "clock")):
        quiet, median = (np.percentile(tuned[:, column], q) - np.percentile(plain[:, column], q) for q in (10, 50))
        more = {"quiet": quiet, "median": median, "mean": tuned[:, column].mean() - plain[:, column].mean()}
        shown = ", ".join(f"{name} {value:.3f}" for name, value in more.items())
        print(f"{clock}: a step of {np.median(plain[:, column]):.3f} ms takes longer by, in ms: {shown}")
        figures[f"more_ms_{clock}"] = more
    seconds, megabytes = in_new_process(_IMPORT)
    print(f"import beyond torch: {seconds:.2f} CPU seconds, {megabytes:.0f} MB")
    figures["import"] = {"cpu_seconds": seconds, "megabytes": megabytes}
    with tempfile.TemporaryDirectory() as folder:
        stored = {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        in_new_process(_RUN, **stored)
        for name, environment in (("cold", {"JAX_COMPILATION_CACHE_DIR": ""}), ("warm", stored)):
            made, attached, first, longest, megabytes = in_new_process(_RUN, **environment)
            seconds = {"tuner": made, "attach": attached, "first step": first, "first decision": longest}
            shown = ", ".join(f"{part} {value:.2f}" for part, value in seconds.items())
            print(f"{name}, CPU seconds: {shown}; {megabytes:.0f} MB more with the tuner running")
            figures[name] = {**seconds, "megabytes": megabytes}
    if args.out:
        with open(args.out, "w") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
