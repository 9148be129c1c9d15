"""What the documentation names exists, and what exists is named: links, tests, the reference."""

import importlib
import re
import types

import pytest

from tests.docs.pages import PAGES, ROOT

_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.S | re.M)
_FENCE = re.compile(r"^```.*?^```", re.S | re.M)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def slug(heading):
    """The anchor of a heading, as GitHub and MyST make it."""
    kept = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower())
    return kept.strip().replace(" ", "-")


def anchors(page):
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.M)}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in _LINK.findall(_CODE.sub("", page.read_text())):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.is_file(), f"{page.name} links {target}"
        if anchor:
            assert anchor in anchors(place), f"{page.name} links {target}; there are {sorted(anchors(place))}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_files_and_modules_named_exist(page):
    text = page.read_text()
    for name in re.findall(r"\b((?:examples|benchmarks|tests|docs)/[\w./]+\.(?:py|md|json|ipynb))", text):
        assert (ROOT / name).is_file(), f"{page.name} names {name}"
    for name in re.findall(r"python -m (benchmarks(?:\.\w+)+)", text):
        place = ROOT / name.replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), f"{page.name} names {name}"


def test_promises_name_tests_that_exist():
    promises = re.findall(r"^\| (.+?) \| (.+) \|$", (ROOT / "docs" / "promises.md").read_text(), re.M)
    rows = [(promise, held_by) for promise, held_by in promises if promise != "promise" and set(promise) != {"-"}]
    assert len(rows) > 30
    for promise, held_by in rows:
        tests = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", held_by)
        assert tests, promise
        for file, name in tests:
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.M), f"{file} has no {name}"


def public(module):
    """The names of a package that are its users'."""
    names = {name for name, value in vars(module).items() if not isinstance(value, types.ModuleType)}
    return sorted(name for name in names if not name.startswith("_"))


def documented(package):
    """The names of a package in the directives of all pages; a whole module brings all of its names."""
    names, current = set(), ""
    for page in PAGES:
        for kind, name in re.findall(r"^\.\. (currentmodule|auto\w+|py:data):: ([\w.]+)", page.read_text(), re.M):
            if kind == "currentmodule":
                current = name
            elif kind != "automodule":
                names.add(name.removeprefix(f"{package}.") if current == package or name.startswith(package) else "")
            elif name == package:
                names |= set(public(importlib.import_module(name)))
    return names


@pytest.mark.parametrize("package", ["autotunenet_jax", "autotunenet_torch", "autotunenet_flax", "autotunenet_ray"])
def test_the_reference_has_every_public_name(package):
    if package in ("autotunenet_torch", "autotunenet_ray"):
        pytest.importorskip(package.removeprefix("autotunenet_"))
    missing = set(public(importlib.import_module(package))) - documented(package)
    assert not missing
