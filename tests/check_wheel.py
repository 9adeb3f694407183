"""What a wheel and an sdist have to contain, and what not: `python tests/check_wheel.py FOLDER`."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = {
    str(path.relative_to(ROOT / "src"))
    for path in (ROOT / "src/negative_cache").rglob("*")
    if path.is_file() and path.suffix != ".pyc"
}
IN_THE_SDIST = {
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "constraints.txt",
    "docs/index.md",
    "examples/demo.py",
    "mkdocs.yml",
    "pyproject.toml",
    "tests/stats.py",
    "tests/surface.txt",
    "tests/project/test_docs.py",
}


def check_wheel(path: Path) -> None:
    """Raise unless the wheel has the package, all of it, and nothing else."""
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        (metadata_name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(metadata_name).decode())
        folder = metadata_name.rpartition("/")[0]
        scripts = wheel.read(f"{folder}/entry_points.txt").decode()
    inside = {name for name in names if not name.startswith(folder)}
    assert "negative_cache/py.typed" in inside
    assert inside == SOURCES, f"missing {sorted(SOURCES - inside)}, unexpected {sorted(inside - SOURCES)}"
    assert f"{folder}/licenses/LICENSE" in names
    assert "negative-cache = negative_cache.__main__:main" in scripts
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
    required = [name for name in metadata.get_all("Requires-Dist") if "extra ==" not in name]
    assert len(required) == 1, f"The core needs torch alone, the wheel {required}."
    assert required[0].startswith("torch>=")


def check_sdist(path: Path) -> None:
    """Raise unless the tests can be run from the sdist, too."""
    with tarfile.open(path) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    missing = IN_THE_SDIST - names
    assert not missing, f"missing {sorted(missing)}"
    left = [name for name in names if name.endswith(".pyc") or name.startswith((".venv", "site/", "dist/"))]
    assert not left, f"unexpected {left}"


def main(folder: Path) -> None:
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    check_wheel(wheel)
    check_sdist(sdist)
    print(f"{wheel.name} and {sdist.name} have what they should.")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
