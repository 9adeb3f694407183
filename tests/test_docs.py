"""The Python snippets of README and docs run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SNIPPETS = [
    (path.relative_to(ROOT), snippet)
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for snippet in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    if "all-MiniLM-L6-v2" not in snippet  # needs a download; tests of the integration run the same lines
]


@pytest.mark.parametrize(("path", "snippet"), SNIPPETS, ids=[str(path) for path, _ in SNIPPETS])
def test_snippet_runs(path, snippet, tmp_path):
    subprocess.run([sys.executable, "-c", snippet], check=True, cwd=tmp_path)


def test_there_are_snippets():
    assert len(SNIPPETS) >= 2
