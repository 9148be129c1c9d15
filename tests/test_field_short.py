"""A few of the cheapest field cases of each kind, as `python -m benchmarks.field` runs them."""

import importlib
import logging

import pytest

CHOSEN = [
    ("A", "mode max without a metric", "Trainer"),
    ("A", "12 percent of batches all NaN", "fit"),
    ("B", "two collapses soon after each other", "fit"),
    ("C", "opening deletes nothing that is not its own", "Snapshots"),
    ("C", "a folder copied while the run went on", "Snapshots"),
    ("D", "an unattached tuner is pickled and copied", "loop"),
    ("E", "the examples hand it over", "autotune"),
    ("F", "two numbers as a list", "SearchSpace"),
    ("F", "two names of one number", "loop"),
    ("F", "two paths to one dropout", "loop"),
    ("G", "a result that can be looked at", "fit"),
    ("H", "a folder that holds itself", "Snapshots"),
    ("H", "pipes folders and links in the place of files", "Snapshots"),
]
KINDS = sorted({kind for kind, _, _ in CHOSEN})


@pytest.fixture(scope="module")
def registry():
    for name in ("torch", "lightning", "transformers"):
        pytest.importorskip(name)
    return importlib.import_module("benchmarks.field.registry")


@pytest.fixture(scope="module")
def cases(registry):
    for letter in KINDS:
        importlib.import_module(f"benchmarks.field.kind_{letter.lower()}")
    return {(one.kind, one.name, one.way): one for one in registry.CASES}


def test_every_kind_is_here():
    assert "".join(KINDS) == "ABCDEFGH"


@pytest.mark.parametrize("chosen", CHOSEN, ids=" ".join)
def test_a_case_is_met(registry, cases, chosen):
    logging.disable(logging.CRITICAL)
    try:
        expected, got, is_ok, _ = registry.run(cases[chosen])
    finally:
        logging.disable(logging.NOTSET)
    assert is_ok, f"expected {expected}, got {got}"
