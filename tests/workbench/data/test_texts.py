"""`Texts` and `ArrowWriter`."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pyarrow
import pytest

from negative_cache.workbench.data.texts import ROWS_PER_BATCH, ArrowWriter, RepeatedIdError, Texts

COUNT = 2 * ROWS_PER_BATCH + 3  # in several record batches


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    numbers = random.Random(0).sample(range(10 * COUNT), COUNT)
    return {f"id {number}": f"text {number % 100} ü" for number in numbers}


def test_texts_are_a_mapping_in_the_order_in_which_they_were_added(expected: dict[str, str]):
    texts = Texts.of(expected)
    assert isinstance(texts, Mapping)
    assert texts == expected
    assert list(texts) == list(expected)
    assert list(texts.values()) == list(expected.values())
    assert list(texts.items()) == list(expected.items())
    assert len(texts) == len(texts.values()) == len(texts.items()) == COUNT
    assert texts.keys() & {"id 0", next(iter(expected))} >= {next(iter(expected))}


def test_texts_are_found_by_id_and_by_position(expected: dict[str, str]):
    texts = Texts.of(expected.items())
    for position, (key, text) in enumerate(expected.items()):
        assert texts[key] == text
        assert texts.position(key) == position
        assert texts.key(position) == key
    assert "no id" not in texts
    assert 3 not in texts
    assert texts.get("no id") is None
    with pytest.raises(KeyError):
        texts.position("no id")


def test_some_of_the_texts_are_copied_in_the_order_of_the_positions(expected: dict[str, str]):
    texts, positions = Texts.of(expected), [COUNT - 1, 0, ROWS_PER_BATCH]
    assert list(texts.at(positions).items()) == [list(expected.items())[position] for position in positions]
    assert len(texts.at([])) == 0


def test_many_ids_are_found_at_once(expected: dict[str, str]):
    texts = Texts.of(expected)
    assert texts.positions(list(expected)[::-7]).tolist() == list(range(COUNT))[::-7]
    assert texts.positions(iter([])).tolist() == []
    with pytest.raises(KeyError, match="there is no text for id number 2"):
        texts.positions([next(iter(expected)), "no id"])


def test_each_text_has_the_position_of_the_first_one_that_is_equal(expected: dict[str, str]):
    first: dict[str, int] = {}
    wanted = [first.setdefault(text, position) for position, text in enumerate(expected.values())]
    assert Texts.of(expected).first_of_equal().tolist() == wanted


def test_no_texts_are_texts_too():
    texts = Texts.of({})
    assert not texts
    assert list(texts.items()) == []
    assert "a" not in texts
    assert texts.first_of_equal().tolist() == []
    with pytest.raises(KeyError, match="there is no text for id number 1"):
        texts.positions(["a"])


def test_pickled_texts_are_found_in_another_process(expected: dict[str, str], tmp_path: Path):
    (tmp_path / "texts").write_bytes(pickle.dumps(Texts.of(expected)))
    key, text = next(iter(expected.items()))
    code = f"import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb'))[{key!r}])"
    ended = subprocess.run([sys.executable, "-c", code, tmp_path / "texts"], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == text


def test_an_id_that_occurs_twice_is_refused_with_its_positions():
    with pytest.raises(RepeatedIdError, match="the id 'b' occurs twice, in the entries 2 and 4") as caught:
        Texts.of([("a", "x"), ("b", "x"), ("c", "x"), ("b", "y")])
    assert (caught.value.key, caught.value.first, caught.value.second) == ("b", 1, 3)


def test_a_table_outlives_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    writer = ArrowWriter({"number": pyarrow.int64(), "list": pyarrow.list_(pyarrow.int64())})
    rows = [(number, list(range(number % 4))) for number in range(COUNT)]
    for row in rows:
        writer.add(*row)
    assert len(list(tmp_path.iterdir())) == 1
    table = writer.finish()
    assert not list(tmp_path.iterdir())
    assert [tuple(row.values()) for row in table.to_pylist()] == rows
