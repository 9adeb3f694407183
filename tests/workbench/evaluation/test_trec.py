"""TREC files, as ir_measures reads them."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import ir_measures
import pytest

from negative_cache.workbench.evaluation.measures import judge, parse_measures
from negative_cache.workbench.evaluation.trec import TrecError, read_run, write_qrels, write_run


@pytest.mark.parametrize("name", ["run.txt", "run.trec.gz"])
def test_a_run_is_read_as_it_was_written(tmp_path: Path, name: str):
    chance = random.Random(0)
    run = {
        f"q{number}": {
            f"d{at}": chance.choice([chance.gauss(0, 1e-3), 1.0, 0.1]) for at in chance.sample(range(99), 20)
        }
        for number in range(5)
    }
    path = tmp_path / name
    write_run(path, run)
    assert read_run(path) == run
    text = gzip.decompress(path.read_bytes()).decode() if name.endswith("gz") else path.read_text()
    others = list(ir_measures.read_trec_run(text))
    assert {(row.query_id, row.doc_id, row.score) for row in others} == {
        (query, document, score) for query, found in run.items() for document, score in found.items()
    }
    lines = [line.split() for line in text.splitlines()]
    assert [int(line[3]) for line in lines] == 5 * list(range(1, 21))
    keys = [(line[0], -float(line[4])) for line in lines]
    assert keys == sorted(keys)


def test_a_byte_order_mark_is_no_part_of_the_first_id(tmp_path: Path):
    (tmp_path / "run").write_text("q Q0 d 1 0.5 tag\n", encoding="utf-8-sig")
    assert read_run(tmp_path / "run") == {"q": {"d": 0.5}}


def test_qrels_are_read_by_ir_measures_as_they_were_written(tmp_path: Path):
    qrels = {"q": {"a": 1.0, "b": 0.0, "é": 3.0}, "p": {"a": -1.0}}
    write_qrels(tmp_path / "qrels", qrels)
    assert (tmp_path / "qrels").read_text(encoding="utf-8").splitlines()[0] == "q 0 a 1"
    rows = ir_measures.read_trec_qrels(str(tmp_path / "qrels"))
    assert {(row.query_id, row.doc_id, row.relevance) for row in rows} == {
        (query, document, grade) for query, grades in qrels.items() for document, grade in grades.items()
    }
    write_qrels(tmp_path / "qrels", {"q": {"a": 0.5}})
    assert (tmp_path / "qrels").read_text() == "q 0 a 0.5\n"


def test_a_run_is_ranked_by_its_scores_and_not_by_its_lines(tmp_path: Path):
    path = tmp_path / "run"
    path.write_text("q Q0 a 1 1e-3 x\n\nq\tQ0\tb\t2\t2\tx\np Q0 a 0 inf x\n", encoding="utf-8")
    run = read_run(path)
    assert run == {"q": {"a": 0.001, "b": 2.0}, "p": {"a": float("inf")}}
    assert judge({"q": {"b": 1}}, run, parse_measures("MRR"))["MRR"] == {"q": 1.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no results"),
        (b"q Q0 d 1 0.5 tag\nq Q0 e 2 0.4\n", r"run, line 2: expected 6 columns .* got 5: 'q Q0 e 2 0.4'"),
        (b"q 0 d 1\n", "line 1: expected 6 columns"),
        (b"q Q0 d 1 high tag\n", "line 1: expected a number as score, got 'high'"),
        (b"q Q0 d 1 2 t\nq Q0 d 2 1 t\n", "line 2: the query 'q' has the document 'd' twice"),
        (b"\xff\xfe q", "no TREC file in UTF-8"),
        (gzip.compress(b"q Q0 d 1 2 t\n", mtime=0)[:-9], "no TREC file"),
    ],
)
def test_a_file_that_is_no_run_is_an_error(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "run").write_bytes(content)
    with pytest.raises(TrecError, match=message):
        read_run(tmp_path / "run")


@pytest.mark.parametrize("name", ["", "a b", "a\n", "a\u2003b"])
def test_an_id_with_white_space_is_not_written(tmp_path: Path, name: str):
    with pytest.raises(TrecError, match="contains white space"):
        write_run(tmp_path / "run", {"q": {"a": 2.0, name: 1.0}})
    with pytest.raises(TrecError, match="contains white space"):
        write_qrels(tmp_path / "qrels", {name: {"a": 1.0}})
    assert not list(tmp_path.iterdir())
