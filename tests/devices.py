"""Programs on several devices, in a process of their own: the number of devices is fixed as JAX starts."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def environment(count, *folders, threads=None):
    """What a process needs that has so many CPU devices, and finds modules in those folders first.

    Steps may be queued: XLA runs programs, and what waits for room to queue more, on as many threads as there are
    devices or cores. With two for each device, as here by default, there is one left for every program, whatever waits.
    """
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}".strip()
    own = {"XLA_FLAGS": flags, "PJRT_NPROC": str(threads or 2 * count), "PYTHONPATH": path}
    return {**os.environ, "JAX_PLATFORMS": "cpu", **own}


def run(code, *arguments, count, folders=(), timeout=100, threads=None):
    """Runs a program on so many devices, and returns what its last line says in JSON."""
    command = [sys.executable, "-c", code, *arguments]
    env = environment(count, *folders, threads=threads)
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=timeout)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])
