"""Adds pages from outside `docs` to the site: pages of the repository root, and source files that pages link to.

Links such as `../CONTRIBUTING.md` and `../examples/recommender.py` then work both on GitHub and on the site.
"""

from __future__ import annotations

import posixpath
import re
import shutil
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parent.parent
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "AGENTS.md": "agents.md",
}  # in the repository root -> on the site
LINK = re.compile(r"\]\(([\w./-]+)")
SOURCE = "---\nsearch:\n  exclude: true\nhide: [toc]\n---\n# {name}\n\n````python\n{text}````\n"


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the repository root, and a page for every file outside `docs` that a page links to."""
    pages = [file for file in files if file.src_uri.endswith(".md") and file.abs_src_path]
    texts = {file.src_uri: Path(file.abs_src_path).read_text(encoding="utf-8") for file in pages}
    for name, page in PAGES.items():
        texts[page] = _of_the_root(name)
        files.append(File.generated(config, page, content=texts[page]))
    linked = {_outside(page, link) for page, text in texts.items() for link in LINK.findall(text)}
    for name in sorted(name for name in linked if name and name not in PAGES):
        text = (ROOT / name).read_text(encoding="utf-8")
        page = File.generated(
            config,
            f"source/{name}.md",
            content=SOURCE.format(name=name, text=text),
            inclusion=InclusionLevel.NOT_IN_NAV,
        )
        files.append(page)
    return files


def on_post_build(config: Any) -> None:
    """Copy the sources of the pages, to which llms.txt links."""
    for source in (ROOT / "docs").rglob("*.md"):
        target = Path(config["site_dir"]) / source.relative_to(ROOT / "docs")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links to files outside `docs` to the pages generated from them."""
    folder = posixpath.dirname(page.file.src_uri) or "."

    def moved(found: re.Match[str]) -> str:
        name = _outside(page.file.src_uri, found[1])
        if not name:
            return found[0]
        return f"]({posixpath.relpath(PAGES.get(name, f'source/{name}.md'), folder)}"

    return LINK.sub(moved, markdown)


def _of_the_root(name: str) -> str:
    """The text of a page in the repository root, with its links relative to `docs`."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return LINK.sub(lambda found: f"]({posixpath.relpath(found[1], 'docs')}", text)


def _outside(page: str, link: str) -> str:
    """The repository file outside `docs` that a link on a page points to; an empty string if there is none."""
    target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return "" if target.startswith("docs/") or not (ROOT / target).is_file() else target
