"""The public surface: what users call stays as it is, has a docstring, and is in the site's API pages."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import surface

ROOT = Path(__file__).parents[2]


def test_names_and_options_are_those_that_were_reviewed():
    """If a change is meant: `python tests/surface.py`, and a line in the changelog."""
    assert list(surface.lines()) == surface.FILE.read_text(encoding="utf-8").splitlines()


def test_the_page_of_names_is_current():
    """`python tests/surface.py` writes it."""
    assert list(surface.page()) == surface.PAGE.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", sorted(surface.public_names()))
def test_public_name_has_a_docstring(name):
    value = surface.public_names()[name]
    assert (value.__doc__ or "").strip()
    assert not value.__doc__.startswith(f"{value.__name__}(")  # what NamedTuple makes by itself
    for member, function in vars(value).items() if inspect.isclass(value) else ():
        if not member.startswith("_") and inspect.isfunction(function) and member not in ("forward", "select"):
            assert (function.__doc__ or "").strip(), member


def test_the_site_builds_with_every_public_name_and_loads_nothing_from_elsewhere(tmp_path):
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    documented = inventory(site / "objects.inv")
    for name, value in surface.public_names().items():
        assert {name, f"{value.__module__}.{value.__qualname__}"} & documented, f"{name} is on no page of docs/api"
    assert "negative_cache.estimators.no_such_name" not in documented
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="([^"]*)"', page.read_text(encoding="utf-8"))
        loaded += re.findall(r'<link[^>]*rel="(?:stylesheet|preconnect)"[^>]*href="([^"]*)"', page.read_text("utf-8"))
        assert not [address for address in loaded if address.startswith(("http", "//"))], page


def test_the_build_fails_for_a_link_to_nowhere(tmp_path):
    """The strict mode is on: a wrong anchor is no mere warning."""
    for name in ("mkdocs.yml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs/hooks.py", tmp_path / "docs")
    for name in ("AGENTS.md", "CONTRIBUTING.md"):
        (tmp_path / name).write_text("# A page\n", encoding="utf-8")
    (tmp_path / "docs/index.md").write_text("[here](#nowhere)\n", encoding="utf-8")
    text = (tmp_path / "mkdocs.yml").read_text(encoding="utf-8")
    text = text.split("nav:")[0] + "nav: [index.md, agents.md, contributing.md, changelog.md]\n"
    (tmp_path / "mkdocs.yml").write_text(text.replace("stylesheets/extra.css", "hooks.py"), encoding="utf-8")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build"], cwd=tmp_path, text=True, capture_output=True, timeout=300
    )
    assert built.returncode != 0
    assert "#nowhere" in built.stderr


def inventory(path: Path) -> set[str]:
    """Names in a Sphinx inventory: four lines of text, then a compressed table."""
    data = path.read_bytes().split(b"\n", 4)[4]
    return {line.split(" ")[0] for line in zlib.decompress(data).decode().splitlines()}
