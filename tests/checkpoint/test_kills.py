"""Processes killed at random moments lose nothing that was committed; the benchmark kills more of them."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_kill_9_at_random_moments():
    command = [
        sys.executable,
        "benchmarks/faults.py",
        "snapshots",
        "--kills",
        "5",
        "--flips",
        "0",
        "--cost-seconds",
        "0",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| trials | 5 |" in done.stdout
    assert "| acknowledged snapshots lost | 0 |" in done.stdout
    assert "| restored wrong | 0 |" in done.stdout
