"""BEIR folders: forms of judgements, what is skipped with a note, and texts that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from negative_cache.workbench.data import DataError, DataOptions, RetrievalData, load_data

DOCUMENTS = [{"_id": str(number), "text": f"passage {number}"} for number in range(5)]
QUERIES = [{"_id": f"{100 + number}", "text": f"query {number}"} for number in range(3)]


def write(folder: Path, judgements: str, documents: list[dict] = DOCUMENTS, queries: list[dict] = QUERIES) -> str:
    """A folder with these judgements in train.tsv."""
    (folder / "qrels").mkdir()
    for name, rows in (("corpus.jsonl", documents), ("queries.jsonl", queries)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels" / "train.tsv").write_text(judgements)
    return str(folder)


def load(folder: Path, judgements: str, **rows: list[dict]) -> RetrievalData:
    return load_data(write(folder, judgements, **rows))


@pytest.mark.parametrize(
    "judgements",
    [
        "100\t0\t3\t1\n100\t0\t4\t2\n101\t0\t4\t0\n102\t0\t0\t1\n",  # TREC, as in MS MARCO
        "100 Q0 3 1\n100 Q0   4 2\n101 Q0 4 -1\n102 Q0 0 1 \r\n",  # TREC with blanks
        "100\t3\t1\n100\t4\t2\n101\t4\t0\n102\t0\t1\n",  # BEIR without a heading
        "qid\tpid\tscore\r\n100\t3\t1\r\n100\t4\t2\r\n102\t0\t1\r\n",
        "qid iteration docid grade\n100 0 3 1\n100 0 4 1\n102 0 0 1\n",
        "query\tdocument\tscore\n100\t3\t1.0\n100\t4\t2e0\n102\t0\t1\n",
        "100\t3\t1\r100\t4\t2\r102\t0\t1",
    ],
)
def test_judgements_with_three_and_with_four_columns_mean_the_same(tmp_path: Path, judgements: str):
    data = load(tmp_path, judgements)
    assert data.qrels["train"] == {"100": ["3", "4"], "102": ["0"]}
    assert data.form == "BEIR folder"
    assert data.notes == ()


def test_all_grades_of_a_query_are_kept_if_one_is_not_1(tmp_path: Path):
    data = load(tmp_path, "100\t0\t1\n100\t1\t0.5\n100\t2\t0\n100\t3\t-1\n101\t0\t1\n101\t1\t1\n102\t4\t0\n")
    assert data.qrels["train"] == {"100": ["0", "1"], "101": ["0", "1"]}
    assert data.grades == {"train": {"100": {"0": 1.0, "1": 0.5, "2": 0.0, "3": -1.0}, "102": {"4": 0.0}}}
    assert data.graded("train") == data.grades["train"] | {"101": {"0": 1.0, "1": 1.0}}


def test_the_last_of_two_grades_of_a_document_counts_and_the_other_is_noted(tmp_path: Path):
    data = load(tmp_path, "100\t0\t1\n100\t1\t2\n100\t0\t0\n101\t0\t1\n101\t0\t1\n")
    assert data.qrels["train"] == {"100": ["1"], "101": ["0"]}
    assert data.skipped == {"judgements of a document that has another grade in a later line": 1}


@pytest.mark.parametrize(
    ("judgements", "message"),
    [
        ("100\t3\n", r"train.tsv, line 1: expected 3 columns .* got 2: '100\\t3'"),
        ("100\n", "line 1: .* got 1: "),
        ("100\t0\t3\t1\textra\n", "line 1: .* got 5: "),
        ("100\t3\t1\n101\t0\t4\t1\n", "line 2: .* got 4: "),  # another form than in the first line
        ("100\t0\t3\t1\n101\t4\t1\n", "line 2: .* got 3: "),
        ("100\t3\t1\t0\n", "line 1: .* 0 or Q0.* got 4: "),  # not TREC: an additional column
        ("100\t3\thigh\n", "line 1: .* a number as grade; got 3: "),
        ("100\t3\tnan\n", "line 1: .* a number as grade; got 3: "),
        ("query\tdocument\tmark\n", "line 1: .* heading is query-id"),
    ],
)
def test_judgements_of_another_form_are_refused(tmp_path: Path, judgements: str, message: str):
    with pytest.raises(DataError, match=message):
        load(tmp_path, judgements)


def test_judgements_of_unknown_documents_and_queries_are_counted_in_one_note(tmp_path: Path):
    folder = write(tmp_path, "100\t3\t1\n100\t77\t1\n101\t78\t1\n102\t79\t0\n")
    (tmp_path / "qrels" / "test.tsv").write_text("999\t3\t1\n102\t4\t1\n")
    data = load_data(folder)
    assert {split: qrels for split, qrels in data.qrels.items() if qrels} == {
        "train": {"100": ["3"]},
        "test": {"102": ["4"]},
    }
    assert data.skipped == {
        "judgements of documents that are not in the corpus": 2,
        "judgements of queries that have no text": 1,
    }
    (note,) = data.notes
    assert ": skipped judgements of documents that are not in the corpus: 2 (first: " in note
    assert "train.tsv, line 2); judgements of queries that have no text: 1 (first: " in note
    assert "test.tsv, line 1)" in note


def test_an_error_without_usable_judgements_says_why_they_were_skipped(tmp_path: Path):
    with pytest.raises(DataError, match=r"no judgements .* skipped judgements of documents"):
        load(tmp_path, "100\tx\t1\n101\ty\t1\n")


def test_files_and_keys_that_are_not_read_are_named(tmp_path: Path):
    folder = write(tmp_path, "100\t3\t1\n", documents=[*DOCUMENTS, {"id": 9, "text": "a", "url": "b", "metadata": {}}])
    (tmp_path / "qrels" / "run.sh").write_text("")
    qrels, corpus = load_data(folder).notes
    assert corpus.endswith("corpus.jsonl: columns that are not used: 'url'.")
    assert qrels.endswith("files that are not read: 'qrels/run.sh'.")


def test_splits_have_the_names_of_their_files(tmp_path: Path):
    folder = write(tmp_path, "100\t3\t1\n")
    for name in ("validation.trec", "NanoSet.jsonl", "dl-2019.txt"):
        row = '{"query-id": 101, "corpus-id": "3", "score": 1}\n' if name.endswith("jsonl") else "101\t0\t3\t1\n"
        (tmp_path / "qrels" / name).write_text(row)
    data = load_data(folder)
    assert {split: qrels for split, qrels in data.qrels.items() if qrels} == {
        "train": {"100": ["3"]},
        "dev": {"101": ["3"]},
        "NanoSet": {"101": ["3"]},
        "dl-2019": {"101": ["3"]},
    }
    (tmp_path / "qrels" / "dev.tsv").write_text("101\t3\t1\n")
    with pytest.raises(DataError, match="'dev' and 'validation' are the same split"):
        load_data(folder)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"_id": "9", "text": None}, "'text' is null"),
        ({"_id": "9", "text": " "}, "'text' is empty"),
        ({"_id": "9", "text": "", "title": ""}, "'text' is empty"),
        ({"_id": "9", "text": "a\ud800"}, r"'text' has the lone surrogate '\\ud800' at character 1"),
        ({"_id": "9", "text": "a", "title": "\udfff"}, "'title' has the lone surrogate"),
        ({"_id": "9", "text": "a", "title": ["b"]}, "'title' is of type list"),
        ({"_id": None, "text": "a"}, "'_id' is null"),
        ({"_id": "", "text": "a"}, "'_id' is empty"),
        ({"id": True, "text": "a"}, "'id' is of type bool"),
        ({"text": "a"}, "there is no '_id', only 'text'"),
    ],
)
@pytest.mark.parametrize("file", ["corpus.jsonl", "queries.jsonl"])
def test_a_missing_text_is_reported_with_file_line_and_key(tmp_path: Path, file: str, row: dict, message: str):
    rows = {"documents": [*DOCUMENTS, row]} if file == "corpus.jsonl" else {"queries": [*QUERIES, row]}
    line = 6 if file == "corpus.jsonl" else 4
    with pytest.raises(DataError, match=rf"{file}, line {line}: {message}"):
        load_data(write(tmp_path, "100\t3\t1\n", **rows), DataOptions(strict=True))


def test_entries_without_a_text_are_skipped_and_counted(tmp_path: Path):
    empty = [{"_id": "8", "text": " ", "title": ""}, {"_id": "9", "text": None}]
    data = load(tmp_path, "100\t3\t1\n100\t9\t1\n", documents=[*DOCUMENTS, *empty], queries=[*QUERIES, empty[0]])
    assert list(data.corpus) == [row["_id"] for row in DOCUMENTS]
    assert data.qrels["train"] == {"100": ["3"]}
    assert data.skipped == {
        "documents without a text": 2,
        "queries without a text": 1,
        "judgements of documents that are not in the corpus": 1,
    }
    (note,) = data.notes
    assert "skipped documents without a text: 2 (first: " in note
    assert "corpus.jsonl, line 6)" in note


def test_a_text_may_be_empty_beside_a_title_and_other_characters_are_kept(tmp_path: Path):
    texts = [{"text": "", "title": "T"}, {"text": "é \U0001f600", "title": None}, {"text": "a", "title": " "}]
    texts.append({"text": None, "title": "U"})
    data = load(tmp_path, "100\t3\t1\n", documents=DOCUMENTS + [{"_id": f"n{n}"} | row for n, row in enumerate(texts)])
    assert [data.corpus[f"n{number}"] for number in range(4)] == ["T", "é \U0001f600", "a", "U"]
