"""Every example of the pages "Your data" is written to files and read by the command that is shown below it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from command_line import invoke

PAGES = sorted((Path(__file__).parents[2] / "docs").glob("your-data*.md"))


class Example(NamedTuple):
    """Files, and the command that reads them."""

    files: dict[str, str]
    command: list[str]


def examples() -> dict[str, Example]:
    """Each command that follows one or more files, by its first argument."""
    found: dict[str, Example] = {}
    files: dict[str, str] = {}
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for heading, text in re.findall(r"^```(.+)\n((?:.*\n)*?)```$", pages, re.MULTILINE):
        if title := re.search(r'title="(.+)"', heading):
            files[title[1]] = text
        elif heading == "console" and files:
            program, name, source, *options = shlex.split(text)
            assert (program, name) == ("negative-cache", "data")
            found[source] = Example(files, [source, *options])
            files = {}
    assert not files, "no command reads these files"
    return found


# Documents, queries, positives and negatives.
EXPECTED = {
    "my-pairs.csv": (2, 2, 2, 0),
    "my-labels.csv": (2, 2, 2, 1),
    "my-clicks.csv": (2, 2, 2, 0),
    "triplets.jsonl": (4, 2, 2, 2),
    "lists.jsonl": (4, 2, 2, 1),
    "flag.jsonl": (5, 2, 3, 2),
    "tevatron.jsonl": (3, 2, 2, 1),
    "dpr.json": (3, 2, 2, 1),
    "embedding-training-data.jsonl": (3, 2, 2, 1),
    "swift.jsonl": (3, 2, 2, 1),
    "nemo.jsonl": (4, 2, 2, 2),
    "rows.jsonl": (3, 2, 2, 1),
    "scifact": (2, 2, 2, 0),
    "msmarco": (3, 2, 2, 2),
    "my-folder": (3, 3, 3, 0),
}


def test_all_examples_are_tested():
    assert examples().keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_an_example_is_read_as_its_project_means_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    example = examples()[name]
    for path, text in example.files.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")
    ended = invoke("data", *example.command, "--json")
    assert ended.exit_code == 0, ended.output
    found = json.loads(ended.stdout)
    sums = [sum(split[key] for split in found["splits"].values()) for key in ("positives", "negatives")]
    assert (found["documents"], found["queries"], *sums) == EXPECTED[name]
    assert found["form"]
    assert found["skipped"] == {}
