"""The folder of MS MARCO."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from negative_cache.workbench.data import DataError, DataOptions, load_data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Documents 0 to 5 and queries 10 to 13, of which 10 and 11 are for training."""
    (tmp_path / "collection.tsv").write_text("".join(f'{number}\tthe "passage {number}\n' for number in range(6)))
    (tmp_path / "queries.train.tsv").write_text("10\tquery 10\n11\tquery 11\n")
    (tmp_path / "queries.dev.tsv").write_text("12\tquery 12\n13\tquery 13\n")
    (tmp_path / "queries.dev.small.tsv").write_text("12\tquery 12\n")
    (tmp_path / "qrels.train.tsv").write_text("10\t0\t0\t1\n11\t0\t1\t1\n")
    (tmp_path / "qrels.dev.small.tsv").write_text("12\t0\t2\t1\n")
    return tmp_path


def test_texts_and_judgements_are_read(folder: Path):
    data = load_data(str(folder))
    assert data.form == "MS MARCO folder"
    assert data.corpus["3"] == 'the "passage 3'
    assert list(data.queries) == ["12", "13", "10", "11"]
    assert data.qrels == {"train": {"10": ["0"], "11": ["1"]}, "dev": {"12": ["2"]}, "test": {}}
    assert data.notes == ()


def test_the_small_dev_split_has_its_name_beside_the_whole_one(folder: Path):
    (folder / "qrels.dev.tsv").write_text("12\t0\t2\t1\n13\t0\t3\t1\n")
    (folder / "2019qrels-pass.txt").write_text("13 Q0 3 2\n13 Q0 4 0\n")
    data = load_data(str(folder))
    assert data.judged("dev") == {"12": ["2"], "13": ["3"]}
    assert data.judged("dev.small") == {"12": ["2"]}
    assert data.graded("2019-pass") == {"13": {"3": 2.0, "4": 0.0}}


@pytest.mark.parametrize(("negatives", "found"), [("all", ["4", "3"]), ("1", ["4"]), ("ignore", None)])
def test_triples_of_ids_give_negatives(folder: Path, negatives: str, found: list[str] | None):
    with gzip.open(folder / "qidpidtriples.train.small.tsv.gz", "wt") as file:
        file.write("10\t0\t4\n10\t0\t3\n10\t0\t0\n10\t0\t4\n99\t0\t3\n")
    data = load_data(str(folder), DataOptions(negatives=negatives))
    assert data.qrels["train"] == {"10": ["0"], "11": ["1"]}
    assert data.negatives.get("10") == found
    if found:
        assert data.skipped == {"triples of a query or a document that the folder has no text of": 1}


def test_triples_of_texts_give_positives_if_nothing_else_does(folder: Path):
    (folder / "qrels.train.tsv").unlink()
    rows = [("query 10", 0, 4), ("query 11", 1, 5), ("query 10", 5, 0)]
    text = "".join(f'{query}\tthe "passage {a}\tthe "passage {b}\n' for query, a, b in rows)
    (folder / "triples.train.small.tsv").write_text(text)
    data = load_data(str(folder))
    assert data.qrels["train"] == {"10": ["0", "5"], "11": ["1"]}
    assert data.negatives == {"10": ["4"], "11": ["5"]}
    assert data.notes == (
        f"{folder.name}: the training split has no judgements; its positives are those of the triples.",
    )


def test_the_encoding_that_is_detected_is_said(folder: Path):
    with (folder / "collection.tsv").open("ab") as file:
        file.write("6\tCafé à la crème, déjà vu à Orléans\n".encode("cp1252"))
    data = load_data(str(folder))
    assert data.corpus["6"].startswith("Café à la crème")
    (note,) = data.notes
    assert note.startswith(f"{folder / 'collection.tsv'}: not UTF-8; read as cp1252")


def test_two_files_of_judgements_of_a_split_are_refused(folder: Path):
    for name in ("qrels.dev.tsv", "qrels.validation.tsv"):
        (folder / name).write_text("12\t0\t2\t1\n")
    with pytest.raises(DataError, match=r"qrels.dev.tsv and .*qrels.validation.tsv are of the same split. Remove one"):
        load_data(str(folder))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("collection.tsv", "7\ta\tb\n", "collection.tsv, line 7: expected 2 columns, separated by tabs, got 3"),
        ("collection.tsv", "0\tagain\n", "collection.tsv, line 7: the id '0' occurs twice, first in .*tsv, line 1."),
        ("queries.dev.tsv", "10\tother\n", "queries.train.tsv, line 1: the id '10' has another text than before"),
        ("triples.train.tsv", "a\tb\n", "triples.train.tsv, line 1: expected 3 columns"),
    ],
)
def test_malformed_lines_are_reported(folder: Path, name: str, text: str, message: str):
    with (folder / name).open("a") as file:
        file.write(text)
    with pytest.raises(DataError, match=message):
        load_data(str(folder))
