"""Files that are either complete or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from negative_cache.workbench.files import replacing, write_text


def write_half(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half of the ne")
        raise RuntimeError("enough")


def write_half_a_folder(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.mkdir()
        (temporary / "part").write_text("part")
        raise RuntimeError("enough")


def test_an_error_leaves_the_old_content_and_nothing_else(tmp_path: Path):
    path = write_text(tmp_path / "file", "old")
    with pytest.raises(RuntimeError, match="enough"):
        write_half(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_in_a_folder_leaves_nothing(tmp_path: Path):
    with pytest.raises(RuntimeError, match="enough"):
        write_half_a_folder(tmp_path / "folder")
    assert not list(tmp_path.iterdir())
