"""The documentation builds."""

import subprocess
import sys

import pytest

from tests.docs.pages import ROOT

pytest.importorskip("sphinx")
pytest.importorskip("furo")
pytest.importorskip("lightning")
pytest.importorskip("transformers")


@pytest.mark.timeout(600)  # half of it is importing what the pages document
def test_it_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", "-d", tmp_path / "doctrees", "docs", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "fit.html").is_file()
