"""Pairs from the installed packages: what is extracted, and that splits share nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from negative_cache.workbench.data import load_data, python_code


def test_extraction_takes_the_first_paragraph_and_drops_the_docstring(tmp_path: Path):
    path = tmp_path / "module.py"
    path.write_text(
        'class Box:\n    def area(self, x):\n        """Compute the area of\n'
        '        a box.\n\n        More.\n        """\n'
        '        return x * x\n\n\ndef short():\n    """Too short."""\n    return 1\n\n\ndef empty():\n'
        '    """Nothing but a docstring in here."""\n'
    )
    assert python_code.extract("module", path) == [
        python_code.Pair("module:Box.area", "Compute the area of a box.", "def area(self, x):\n    return x * x")
    ]
    path.write_text("def broken(:\n    '''x'''")
    assert python_code.extract("module", path) == []


def test_near_copies_do_not_cross_splits():
    body = "\n".join(f"    value_{i} = compute(value_{i - 1}, {i})" for i in range(1, 12))
    train = python_code.Pair("a:f", "one", f"def f(value_0):\n{body}\n    return value_11")
    near = python_code.Pair("b:g", "two", f"def g(value_0):\n{body}\n    return value_11")
    other = python_code.Pair(
        "c:h", "three", "def h(path):\n    with open(path) as file:\n        return file.read().split(',')"
    )
    kept = python_code._without_near_copies({"train": [train], "dev": [], "test": [near, other]})
    assert kept == {"train": [train], "dev": [], "test": [other]}


def test_the_pairs_of_this_environment_are_many_and_the_splits_share_no_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sample = python_code.module_paths()[::20]  # building from all modules takes half a minute
    monkeypatch.setattr(python_code, "module_paths", lambda: sample)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = load_data("python-code")
    assert 20 * len(data.corpus) >= 20_000
    assert 20 * len(data.qrels["test"]) > 500
    modules = {split: {name.split(":")[0] for name in qrels} for split, qrels in data.qrels.items()}
    assert modules["train"].isdisjoint(modules["test"] | modules["dev"])
    written = next((tmp_path / "negative-cache").iterdir())
    first = written.read_bytes()
    assert load_data("python-code") == data  # from the file
    assert written.read_bytes() == first


def test_the_pairs_do_not_depend_on_the_order_of_modules(monkeypatch: pytest.MonkeyPatch):
    modules = [module for module in python_code.module_paths() if module[0].startswith("rich.")]
    monkeypatch.setattr(python_code, "module_paths", lambda: modules)
    built = python_code.build()
    monkeypatch.setattr(python_code, "module_paths", lambda: modules[::-1])
    assert built == python_code.build()
    assert len(built["train"]) > 100
