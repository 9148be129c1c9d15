"""Several processes of one training, as a launcher starts them."""

import contextlib
import os
import pathlib
import subprocess
import sys

WORKERS = pathlib.Path(__file__).parent
TIMEOUT_S = 240


def launch(worker, out, *arguments, world=2):
    """Return codes and what was said, by rank."""
    out.mkdir(exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as running:
        processes = []
        for rank in range(world):
            command = [sys.executable, str(WORKERS / worker), *map(str, (rank, world, out / "store", out)), *arguments]
            options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            processes.append(subprocess.Popen(command, env=environment, **options))
            running.enter_context(processes[-1])
            running.callback(processes[-1].kill)
        said = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
    return [process.returncode for process in processes], said
