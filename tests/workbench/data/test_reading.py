"""Rows of files of pairs: quotes, column names, missing texts, and columns that are not used."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from negative_cache.workbench.data import DataError, load_data


def pairs_of(path: Path, content: str) -> list[tuple[str, str]]:
    """The pairs that are read from a file with this content."""
    path.write_text(content, newline="")
    data = load_data(str(path))
    qrels = {query: documents for split in data.qrels.values() for query, documents in split.items()}
    return [(text, data.corpus[document]) for query, text in data.queries.items() for document in qrels[query]]


QUOTED = [('"who said hi', "d1"), ("q2", '"d2" or d3'), ('q3"', '"d4')]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_quotes_are_plain_characters_in_tsv(tmp_path: Path, end: str):
    rows = [("query", "positive"), *QUOTED, ("q5", "d5,d6")]
    content = "".join(f"{query}\t{positive}{end}" for query, positive in rows)
    assert pairs_of(tmp_path / "a.tsv", content) == rows[1:]


def test_quotes_enclose_values_in_csv(tmp_path: Path):
    content = 'query,positive\n"""who, me",d1\n"two\nlines",d2\nq3",d3\n'
    assert pairs_of(tmp_path / "a.csv", content) == [('"who, me', "d1"), ("two\nlines", "d2"), ('q3"', "d3")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.tsv",
            'query\tpositive\n"two\nlines"\td\n',
            "line 2: expected 2 columns as in the first line, got 1. Quotes are plain",
        ),
        ("a.tsv", "query\tpositive\nq\td\te\n", "line 2: expected 2 columns .* got 3"),
        ("a.tsv", "query\tpositive\nq\rq\td\n", "line 2: expected 2 columns .* got 1"),
        ("a.csv", 'query,positive\n"who,d\n"the "best",d\n', "after line 3: .* each quote inside it twice"),
        ("a.csv", "query,positive\nq,d,e\n", "line 2: expected 2 columns as in the first line, got 3. Write a value"),
        ("a.csv", "query,positive,positive\nq,d,e\n", "line 1: several columns have the name 'positive'"),
        ("a.tsv", "who\td1\nwhat\td2\n", "line 2: no column query .* only 'd1', 'who'.* names of the columns"),
        ("a.jsonl", '{"query": "q", "positive": "d", "positive": "e"}\n', "line 1: not JSON: a key occurs twice"),
        ("a.jsonl", '{"query": null, "positive": "d"}\n', "line 1: 'query' is null"),
        ("a.jsonl", '{"query": "q", "positive": " "}\n', "line 1: 'positive' is empty"),
        ("a.jsonl", '{"query": "q", "positive": "\\ud800"}\n', "line 1: 'positive' has the lone surrogate"),
        ("a.csv", "query,positive\nq,\n", "line 2: 'positive' is empty"),
    ],
)
def test_rows_that_cannot_be_used_are_reported_with_place_and_key(
    tmp_path: Path, name: str, content: str, message: str
):
    with pytest.raises(DataError, match=rf"{name}, {message}"):
        pairs_of(tmp_path / name, content)


def test_a_null_and_repeated_columns_in_parquet_are_refused(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"query": ["q", None], "positive": ["d", "e"]}), path)
    with pytest.raises(DataError, match=r"a\.parquet, row 1: 'query' is null"):
        load_data(str(path))
    pyarrow.parquet.write_table(pyarrow.table([["q"], ["d"], ["e"]], names=["query", "positive", "positive"]), path)
    with pytest.raises(DataError, match=r"a\.parquet: .*positive"):
        load_data(str(path))


@pytest.mark.parametrize(
    ("name", "content", "unused", "about_negatives"),
    [
        ("a.jsonl", '{"query": "q", "positive": "d", "negatives": ["e"]}', "'negatives'", True),
        ("a.jsonl", '{"query": "q", "positive": "d"}\n{"query": "r", "positive": "d", "url": 3}', "'url'", False),
        ("a.tsv", "query\tpositive\tnegative_1\tnegative_2\nq\td\te\tf", "'negative_1', 'negative_2'", True),
        ("a.csv", "query,question,positive\nq,r,d", "'question'", False),
    ],
)
def test_columns_that_are_not_used_are_named_in_one_note(
    tmp_path: Path, name: str, content: str, unused: str, about_negatives: bool
):
    (tmp_path / name).write_text(content)
    (note,) = load_data(str(tmp_path / name)).notes
    assert note.startswith(f"a: columns that are read: 'positive', 'query'; not used: {unused}.")
    assert ("No command trains with negatives" in note) == about_negatives


def test_there_is_no_note_if_all_columns_are_used(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"query": "q", "positive": "d"}\n{"question": "r", "answer": "e"}\n')
    assert load_data(str(tmp_path / "a.jsonl")).notes == ()
