"""The documentation builds."""

import importlib.util
import subprocess
import sys

import pytest

from tests.docs.pages import ROOT

# Looked for without importing them here: the process that builds does.
NEEDED = ("sphinx", "furo", "lightning", "transformers")
pytestmark = pytest.mark.skipif(not all(map(importlib.util.find_spec, NEEDED)), reason=f"needs {', '.join(NEEDED)}")


@pytest.mark.timeout(600)  # half of it is importing what the pages document
def test_it_builds_without_a_warning(tmp_path):
    """All but the writing of files: every page is read, every reference resolved."""
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "dummy", "docs", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
