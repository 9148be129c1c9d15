"""Runs the cases and prints a table; exit status 1 when one fails."""

import argparse
import importlib
import logging
import os
import pathlib
import sys
import tempfile

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# The program of the controller is the same in most cases and their child processes: compiled once.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(tempfile.gettempdir(), "autotunenet_field_cache")))

KINDS = "ABCDEFGH"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.field", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"letters among {KINDS}; all by default")
    parser.add_argument("--short", action="store_true", help="a subset of about a minute")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--way", default="", help="one way in")
    given = parser.parse_args()
    wanted = sorted({letter for text in given.kinds for letter in text.upper()}) or list(KINDS)
    if not set(wanted) <= set(KINDS):
        parser.error(f"a KIND is one of {', '.join(KINDS)}")
    logging.disable(logging.CRITICAL)
    for letter in wanted:
        importlib.import_module(f"benchmarks.field.kind_{letter.lower()}")
    from . import registry

    chosen = [
        one
        for one in sorted(registry.CASES, key=lambda one: one.kind)
        if one.kind in wanted and (one.is_short or not given.short)
        if given.only in one.name and given.way in ("", one.way)
    ]
    print("| kind | case | way in | expected | got | verdict | s |\n|---|---|---|---|---|---|---|", flush=True)
    failed, total = 0, 0.0
    for one in chosen:
        expected, got, is_ok, seconds = registry.run(one)
        failed, total = failed + (not is_ok), total + seconds
        verdict = "ok" if is_ok else "FAILED"
        cells = (one.kind, one.name, one.way, expected, got, verdict, f"{seconds:.1f}")
        print(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |", flush=True)
    print(f"\n{len(chosen)} cases, {failed} failed, {total:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
