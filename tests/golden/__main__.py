"""Writes the records anew: ``python -m tests.golden``, on the commit whose behaviour is to be kept."""

from tests import conftest as conftest  # isort: skip  (the environment is set before JAX reads it)

import json
import pathlib
import time

from tests.golden import runs

found = {}
for name, run in runs.RUNS.items():
    began = time.monotonic()
    found[name] = run()
    print(f"{name}: {time.monotonic() - began:.1f} s")
path = pathlib.Path(__file__).with_name("recorded.json")
path.write_text(json.dumps({"machine": runs.machine(), "runs": found}, indent=1) + "\n")
