"""The pages of the documentation and the notebooks, and the programs on them."""

import json
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])

# What a reader is to see; and, in a comment, what makes a fragment a whole program.
_BLOCK = re.compile(r"^```python\n(.*?)^```|^<!-- run\n(.*?)^-->", re.S | re.M)


def cells(book):
    """The cells of a notebook that hold Python."""
    return [cell for cell in json.loads(book.read_text())["cells"] if cell["cell_type"] == "code"]


def blocks(page):
    """The Python on a page, in order: the line before each block, or the number of a notebook's cell, and its text."""
    if page.suffix == ".ipynb":
        return [(number, "".join(cell["source"])) for number, cell in enumerate(cells(page))]
    text = page.read_text()
    return [(text.count("\n", 0, block.start()) + 1, block[1] or block[2]) for block in _BLOCK.finditer(text)]


def run(page):
    """Runs all blocks of a page in one namespace, which it returns; tracebacks point into the page."""
    names = {"__name__": "__page__"}
    for line, source in blocks(page):
        exec(compile("\n" * line + source, str(page), "exec"), names)
    return names
