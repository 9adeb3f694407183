"""Data sets from folders and files: what is read, and how malformed files are reported."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from command_line import DOCUMENTS, write_beir
from negative_cache.workbench.data import DataError, DataOptions, load_data


@pytest.mark.parametrize("compress", [False, True])
def test_a_beir_folder_is_read_with_its_judgements(tmp_path: Path, compress: bool):
    data = load_data(str(write_beir(tmp_path / "set", compress)))
    assert data.corpus["d0"] == "A title\n" + DOCUMENTS["d0"]
    assert {split: len(qrels) for split, qrels in data.qrels.items()} == {"train": 60, "dev": 10, "test": 10}
    assert data.qrels["train"]["qd0"] == ["d0", "d1"]  # several positives
    assert data.qrels["train"]["qd2"] == ["d2"]  # a score of 0 is not a positive
    rows = data.training_set()
    assert len(rows) == 61
    assert rows["label"][:3] == [[0, 1], [1, 0], [1]]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet", "csv.gz"])
def test_files_of_pairs_give_the_same_data_and_splits_share_no_document(tmp_path: Path, kind: str):
    rows = [{"question": f"who {text[4:]}", "answer": text} for text in DOCUMENTS.values()]
    rows.append({"question": rows[0]["question"], "answer": rows[1]["answer"]})
    path = tmp_path / f"pairs.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        tab = "\t" if kind == "tsv" else ","
        text = f"question{tab}answer\n" + "".join(f'"{row["question"]}"{tab}"{row["answer"]}"\n' for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    data = load_data(str(path))
    assert len(data.corpus) == 80
    assert sum(len(qrels) for qrels in data.qrels.values()) == 80
    assert all(data.qrels[split] for split in ("train", "dev", "test"))
    owner = {document: split for split, q in data.qrels.items() for ds in q.values() for document in ds}
    for split, qrels in data.qrels.items():
        assert all(owner[document] == split for documents in qrels.values() for document in documents)
    assert any(len(documents) == 2 for qrels in data.qrels.values() for documents in qrels.values())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"query": "x", "positive": "y"}\n{broken\n', "line 2: not JSON"),
        ("a.jsonl", '{"query": "x", "positive": "y"}\n[1]\n', "line 2: expected a JSON object"),
        ("a.jsonl", '{"query": "x", "a": "y", "b": "z"}\n', "line 1: no column positive"),
        ("a.jsonl", '{"query": "x", "positive": 3}\n', "line 1: 'positive' is of type int; expected a text"),
        ("a.csv", "query,positive\nx,y\nz\n", "line 3: expected 2 columns as in the first line, got 1"),
        ("a.csv", "", "no pairs"),
        ("a.parquet", "no parquet", "not readable as parquet"),
        ("a.csv.gz", "no gzip", "not readable|gzip"),
        ("a.doc", "text", "unknown file type"),
    ],
)
def test_malformed_files_are_reported_with_the_line(tmp_path: Path, name: str, content: str, message: str):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_data(str(path))


def test_the_split_all_has_the_judgements_of_all_splits(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"query": "q{n}", "positive": "d{n}"}}\n' for n in range(300)))
    data = load_data(str(tmp_path / "a.jsonl"))
    assert len(data.judged("test")) < 60
    assert data.judged("all") == {
        query: documents for qrels in data.qrels.values() for query, documents in qrels.items()
    }
    assert len(data.judged("all")) == 300


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("qrels/test.tsv", "qd0 d0 1", "line 12: expected 3 columns .* got 1: 'qd0 d0 1'"),
        (
            "corpus.jsonl",
            '{"_id": "d0", "text": "again"}',
            r"line 81: the id 'd0' occurs twice, first in .*corpus.jsonl, line 1\.",
        ),
        ("queries.jsonl", '{"_id": "new"}', "line 81: there is no 'text', only '_id'"),
    ],
)
def test_malformed_beir_folders_are_reported_with_the_line(beir: Path, file: str, line: str, message: str):
    with (beir / file).open("a") as opened:
        opened.write(line + "\n")
    with pytest.raises(DataError, match=message):
        load_data(str(beir))


def test_windows_files_and_byte_order_marks_are_read(beir: Path, tmp_path: Path):
    expected = load_data(str(beir))
    for path in [*beir.glob("*.jsonl"), *beir.glob("qrels/*.tsv")]:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_data(str(beir)) == expected
    path = tmp_path / "PAIRS.CSV"
    path.write_bytes(b"\xef\xbb\xbfquery,positive\r\nwho,me\r\n")
    assert list(load_data(str(path)).queries.values()) == ["who"]


def test_ids_that_are_lists_or_differ_only_in_type_are_refused(beir: Path):
    path = beir / "corpus.jsonl"
    good = path.read_text()
    path.write_text(good + '{"_id": ["x"], "text": "a"}\n')
    with pytest.raises(DataError, match="line 81: '_id' is of type list"):
        load_data(str(beir))
    path.write_text(good + '{"_id": 1, "text": "a"}\n{"_id": "1", "text": "b"}\n')
    with pytest.raises(DataError, match="line 82: the id '1' occurs twice"):
        load_data(str(beir))


@pytest.mark.parametrize(
    ("documents", "is_warned"),
    [
        ([f"note_{name}.txt" for name in "abcde"], True),
        ([f"d{number}" for number in range(5)], True),
        (["d0", "d1"], True),
        (list("12345"), True),
        (["19", "4", "is 5"], False),
        (["d0"], False),
        (["ls -l", *(f"note_{name}.txt" for name in "abcde")], False),
        (list("abcde"), False),
    ],
)
def test_documents_that_look_like_names_give_a_warning(tmp_path: Path, documents: list[str], is_warned: bool):
    rows = [f"how to {number},{document}\n" for number, document in enumerate(documents)]
    (tmp_path / "a.csv").write_text("query,positive\n" + "".join(rows))
    warnings = [note for note in load_data(str(tmp_path / "a.csv")).notes if note.startswith("Warning: ")]
    assert len(warnings) == is_warned
    assert all("such as" in note and "--corpus" in note for note in warnings)


@pytest.mark.parametrize(
    ("queries", "is_warned"), [(["1", "20"], True), (["1", "20", "size 5"], False), (["A1", "B2"], False)]
)
def test_queries_that_are_numbers_give_a_warning(tmp_path: Path, queries: list[str], is_warned: bool):
    rows = [f"{query},the answer to {query}\n" for query in queries]
    (tmp_path / "a.csv").write_text("query,positive\n" + "".join(rows))
    said = "Warning: each query is a number, such as '1'. Check --query-column."
    assert (said in load_data(str(tmp_path / "a.csv")).notes) == is_warned


def test_a_division_that_leaves_no_pair_to_train_on_is_named(tmp_path: Path):
    path = tmp_path / "a.csv"
    for number in range(100):
        path.write_text(f"query,positive\nwhere,in box {number}\n")
        data = load_data(str(path))
        if not data.has("train"):
            break
    with pytest.raises(DataError, match="a has 1 pair, and its division into splits by document has left none to trai"):
        data.judged("train")
    assert load_data(str(path), DataOptions(test=str(path))).num_pairs("train") == 1
