"""Folders: layouts of BEIR, of the hub, and of files of rows for each split."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from negative_cache.workbench.data import DataError, DataOptions, RetrievalData, load_data

CORPUS = [{"_id": f"d{number}", "title": "", "text": f"passage {number}"} for number in range(5)]
QUERIES = [{"_id": f"q{number}", "text": f"query {number}"} for number in range(4)]
QRELS = {
    "train": [("q0", "d0", 1), ("q1", "d1", 1), ("q1", "d2", 1)],
    "dev": [("q2", "d3", 1)],
    "test": [("q3", "d4", 2), ("q3", "d0", 0)],
}
TEXT = "".join(json.dumps(row) + "\n" for row in CORPUS)


def judged(split: str) -> list[dict[str, Any]]:
    return [{"query-id": query, "corpus-id": document, "score": grade} for query, document, grade in QRELS[split]]


def write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write rows as .parquet or .jsonl."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def check(data: RetrievalData, has_notes: bool = False) -> None:
    """Check that data is the one of this file."""
    assert dict(data.corpus) == {row["_id"]: row["text"] for row in CORPUS}
    assert dict(data.queries) == {row["_id"]: row["text"] for row in QUERIES}
    assert data.qrels == {
        "train": {"q0": ["d0"], "q1": ["d1", "d2"]},
        "dev": {"q2": ["d3"]},
        "test": {"q3": ["d4"]},
    }
    assert data.grades == {"test": {"q3": {"d4": 2.0, "d0": 0.0}}}
    assert len(data.notes) == has_notes


def test_a_folder_of_parquet_shards_is_read_as_on_the_hub(tmp_path: Path):
    write(tmp_path / "corpus" / "corpus-00000-of-00002.parquet", CORPUS[:2])
    write(tmp_path / "corpus" / "corpus-00001-of-00002.parquet", CORPUS[2:])
    write(tmp_path / "queries" / "queries-00000-of-00001.parquet", QUERIES)
    for split, name in (("train", "train"), ("dev", "validation"), ("test", "test")):
        write(tmp_path / "data" / f"{name}-00000-of-00001.parquet", judged(split))
    (tmp_path / "README.md").write_text("about")
    check(load_data(str(tmp_path)))


def test_shards_that_are_numbered_have_the_split_of_their_folder(tmp_path: Path):
    write(tmp_path / "corpus" / "test" / "0000.parquet", CORPUS[:2])
    write(tmp_path / "corpus" / "test" / "0001.parquet", CORPUS[2:])
    write(tmp_path / "queries" / "test" / "0000.parquet", QUERIES)
    for split in QRELS:
        write(tmp_path / "qrels" / split / "0000.parquet", judged(split))
    check(load_data(str(tmp_path)))


@pytest.mark.parametrize("part", ["corpus", "queries", "qrels"])
def test_parts_of_a_beir_folder_may_be_of_any_type_of_file(tmp_path: Path, part: str):
    files = {"corpus": "corpus.jsonl", "queries": "queries.jsonl", "qrels": "jsonl"}
    files |= {part: {"corpus": "corpus.parquet", "queries": "queries.parquet", "qrels": "parquet"}[part]}
    write(tmp_path / files["corpus"], CORPUS)
    write(tmp_path / files["queries"], QUERIES)
    for split in QRELS:
        write(tmp_path / "qrels" / f"{split}.{files['qrels']}", judged(split))
    check(load_data(str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("corpus.jsonl.gz", gzip.compress(TEXT.encode(), mtime=0)),
        ("corpus.jsonl.bz2", bz2.compress(TEXT.encode())),
        ("corpus.jsonl.xz", lzma.compress(TEXT.encode())),
        ("corpus.json", json.dumps(CORPUS).encode()),
        ("corpus.tsv", "".join(f"{r['_id']}\t{r['text']}\n" for r in CORPUS).encode()),
        ("corpus.csv", ("docid,title,text\n" + "".join(f"{r['_id']},,{r['text']}\n" for r in CORPUS)).encode()),
    ],
)
def test_a_corpus_may_be_compressed_or_a_table(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    write(tmp_path / "queries.jsonl", QUERIES)
    for split in QRELS:
        write(tmp_path / "qrels" / f"{split}.jsonl", judged(split))
    check(load_data(str(tmp_path)), has_notes=name.endswith("tsv"))


def test_judgements_without_a_grade_are_relevant_and_one_file_of_them_is_the_test_split(tmp_path: Path):
    write(tmp_path / "corpus.jsonl", CORPUS)
    write(tmp_path / "queries.jsonl", QUERIES)
    write(tmp_path / "qrels.parquet", [{"query-id": "q3", "corpus-id": "d4"}])
    data = load_data(str(tmp_path))
    assert data.judged("test") == {"q3": ["d4"]}
    assert data.grades == {}
    assert [note.partition(": ")[2] for note in data.notes] == [
        "the judgements of 'qrels.parquet' are taken for the split 'test'."
    ]


def test_splits_with_corpora_of_their_own_are_searched_in_these(tmp_path: Path):
    for split, number in (("NanoFirst", 0), ("NanoSecond", 2)):
        write(tmp_path / "corpus" / f"{split}-00000-of-00001.parquet", CORPUS[number : number + 2])
        write(tmp_path / "queries" / f"{split}-00000-of-00001.parquet", QUERIES[:1])  # of the same id
        row = {"query-id": "q0", "corpus-id": f"d{number}"}
        write(tmp_path / "qrels" / f"{split}-00000-of-00001.parquet", [row])
    data = load_data(str(tmp_path))
    assert data.judged("NanoFirst") == {"q0": ["d0"]}
    assert data.judged("NanoSecond") == {"q0": ["d2"]}
    assert list(data.part("NanoFirst").corpus) == ["d0", "d1"]
    assert list(data.part("NanoSecond").corpus) == ["d2", "d3"]
    assert data.notes[0].endswith("searched in a corpus of its own: 'NanoFirst', 'NanoSecond'.")


def test_one_of_several_collections_in_a_folder_must_be_named(tmp_path: Path):
    for language in ("de", "en"):
        write(tmp_path / f"{language}-corpus" / "test-00000-of-00001.parquet", CORPUS)
        write(tmp_path / f"{language}-queries" / "test-00000-of-00001.parquet", QUERIES)
        write(tmp_path / f"{language}-qrels" / "test-00000-of-00001.parquet", judged("test"))
    with pytest.raises(DataError, match=r"several collections: de, en. Choose one: hf:.*:en"):
        load_data(str(tmp_path))
    assert load_data(f"hf:{tmp_path}:de").judged("test") == {"q3": ["d4"]}


def test_files_of_rows_for_each_split_are_the_splits(tmp_path: Path):
    for number, name in enumerate(("train.jsonl", "validation.jsonl", "test.jsonl")):
        write(tmp_path / name, [{"query": f"q {number} {n}", "positive": f"d {number} {n}"} for n in range(3)])
    write(tmp_path / "notes.jsonl", [])
    data = load_data(str(tmp_path))
    assert {split: [data.queries[query] for query in qrels] for split, qrels in data.qrels.items()} == {
        "train": ["q 0 0", "q 0 1", "q 0 2"],
        "dev": ["q 1 0", "q 1 1", "q 1 2"],
        "test": ["q 2 0", "q 2 1", "q 2 2"],
    }
    assert any(note.endswith("files that are not read: 'notes.jsonl'.") for note in data.notes)


def test_a_folder_with_training_rows_alone_is_a_training_split(tmp_path: Path):
    write(tmp_path / "data" / "train-00000-of-00002.parquet", [{"query": "a", "positive": "b"}])
    write(tmp_path / "data" / "train-00001-of-00002.parquet", [{"query": "c", "positive": "d"}])
    data = load_data(str(tmp_path))
    assert [len(qrels) for qrels in data.qrels.values()] == [2, 0, 0]
    with pytest.raises(DataError, match=r"no queries in the split 'test'; it has train.*or give it with --test"):
        data.judged("test")


BY_ID = [{"query_id": "1", "query": "who", "positive_document_ids": ["d1"], "negative_document_ids": ["d4"]}]


def test_a_corpus_beside_files_of_rows_has_the_documents_that_they_refer_to(tmp_path: Path):
    write(tmp_path / "corpus.jsonl", CORPUS)
    write(tmp_path / "train.jsonl", BY_ID)
    data = load_data(str(tmp_path))
    assert len(data.corpus) == 5
    assert list(data.qrels["train"].values()) == [["d1"]]


@pytest.mark.parametrize("place", ["corpus.jsonl", "documents/corpus.jsonl", "documents/part-0.jsonl"])
def test_the_corpus_of_rows_may_be_given(tmp_path: Path, place: str):
    write(tmp_path / place, CORPUS)
    rows = write(tmp_path / "rows.jsonl", BY_ID)
    with pytest.raises(DataError, match="--corpus"):
        load_data(str(rows))
    options = DataOptions(corpus=str(tmp_path / Path(place).parts[0]), test=str(rows))
    data = load_data(str(rows), options)
    assert list(data.qrels["train"].values()) == list(data.qrels["test"].values()) == [["d1"]]
    assert len(data.corpus) == 5


def test_pairs_may_have_the_ids_of_a_corpus(tmp_path: Path):
    corpus = write(tmp_path / "corpus.jsonl", CORPUS)
    rows = tmp_path / "clicks.csv"
    rows.write_text("query,document\nwho,d1\nwho,d3\n")
    data = load_data(str(rows), DataOptions(corpus=str(corpus)))
    assert list(data.judged("all").values()) == [["d1", "d3"]]
    rows.write_text("query,document\nwho,d9\n")
    with pytest.raises(
        DataError, match=r"line 2: the corpus has no document with the id or the text 'd9'.* leave out --corpus"
    ):
        load_data(str(rows), DataOptions(corpus=str(corpus)))


def test_rows_may_have_the_texts_of_a_corpus(tmp_path: Path):
    options = DataOptions(corpus=str(write(tmp_path / "corpus.jsonl", CORPUS)))
    rows = tmp_path / "clicks.csv"
    rows.write_text("query,document,negative\nwho,passage 1,passage 2\nwhat,d3,passage 4\n")
    data = load_data(str(rows), options)
    assert sorted(data.judged("all").values()) == [["d1"], ["d3"]]
    assert list(data.negatives.values()) == [["d2"], ["d4"]]
    assert len(data.corpus) == 5
    assert "clicks: documents that rows give by their text in the corpus: 3." in data.notes
    rows.write_text("query,document\nwho,another passage\n")
    with pytest.raises(DataError, match=r"no document with the id or the text 'another passage'.* leave out --corpus"):
        load_data(str(rows), options)


def test_ids_of_a_corpus_may_be_numbers(tmp_path: Path):
    corpus = write(tmp_path / "corpus.jsonl", [{"_id": number, "text": f"text {number}"} for number in range(3)])
    options = DataOptions(corpus=str(corpus))
    rows = write(tmp_path / "rows.jsonl", [{"query": "who", "pos": [2, "0"], "neg": [1]}])
    data = load_data(str(rows), options)
    assert list(data.judged("all").values()) == [["2", "0"]]
    assert list(data.negatives.values()) == [["1"]]
    clicks = tmp_path / "clicks.tsv"
    clicks.write_text("who is it\t2\nwhat is it\t0\n")
    assert list(load_data(str(clicks), options).judged("all").values()) == [["2"], ["0"]]


def test_the_corpus_that_is_given_takes_the_place_of_the_own_one(tmp_path: Path):
    given = write(tmp_path / "given.jsonl", CORPUS)
    options = DataOptions(corpus=str(given))
    write(tmp_path / "set" / "corpus.jsonl", CORPUS[:1])
    write(tmp_path / "set" / "train.jsonl", BY_ID)
    data = load_data(str(tmp_path / "set"), options)
    assert len(data.corpus) == 5
    assert "set: its own corpus is not read, because --corpus names another one." in data.notes
    path = tmp_path / "train.json"
    row = {"question": "who", "pos_doc": [{"id": "d1"}], "neg_doc": []}
    for corpus in ([{"path": "is/missing"}], {"path": "is/missing"}):
        path.write_text(json.dumps({"corpus": corpus, "data": [row]}))
        assert list(load_data(str(path), options).judged("all").values()) == [["d1"]]
        with pytest.raises(DataError, match=r"'.*is/missing' is not a file or folder"):
            load_data(str(path))


def test_the_corpus_that_a_file_of_rows_names_is_read(tmp_path: Path):
    write(tmp_path / "corpus" / "wiki" / "train.parquet", [{"id": row["_id"], "text": row["text"]} for row in CORPUS])
    (tmp_path / "corpus" / "wiki" / "merlin_metadata.json").write_text('{"class": "TextQADataset"}')
    row = {"question_id": "q", "question": "who", "corpus_id": "wiki", "pos_doc": [{"id": "d1"}], "neg_doc": ["d4"]}
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"corpus": [{"path": "corpus/wiki"}], "data": [row]}))
    data = load_data(str(path))
    assert data.judged("all") == {"q": ["d1"]}
    assert data.negatives == {"q": ["d4"]}
    assert len(data.corpus) == 5


def test_two_names_of_a_split_are_refused(tmp_path: Path):
    for name in ("validation.jsonl", "dev.jsonl"):
        write(tmp_path / name, [{"query": "a", "positive": "b"}])
    with pytest.raises(DataError, match=f"{tmp_path}: 'dev' and 'validation' are the same split"):
        load_data(str(tmp_path))


def test_two_formats_of_a_split_are_refused(tmp_path: Path):
    write(tmp_path / "train.jsonl", [{"query": "a", "positive": "b"}])
    (tmp_path / "train.csv").write_text("query,positive\nc,d\n")
    with pytest.raises(DataError, match=r"train.csv and .*train.jsonl are of the same split, in two formats"):
        load_data(str(tmp_path))


def test_a_part_of_a_collection_is_refused_with_its_folder(beir: Path):
    for name in ("corpus.jsonl", "qrels"):
        with pytest.raises(DataError, match=rf"{name} is a part of a dataset. Give its folder: {beir}"):
            load_data(str(beir / name))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no dataset. Expected a BEIR folder.* It has: nothing."),
        (["set/corpus.jsonl", "set/queries.jsonl"], "Did you mean .*set.$"),
        (["set/train.jsonl"], "Did you mean .*set.$"),
        (["pairs.jsonl"], "Give one of the files: .*pairs.jsonl.$"),
        (["corpus.jsonl", "queries.jsonl"], "no judgements. Expected files such as qrels/train.tsv"),
        (["queries.jsonl", "train.jsonl"], "has queries, but no corpus.jsonl"),
        (["notes.md", "more/a.txt"], r"has 2 text files and no dataset. Training .* --corpus \S+$"),
        (["collection.tsv"], "no queries; expected files such as queries.train.tsv"),
        (["collection.tsv", "queries.dev.tsv"], "no judgements; expected qrels.train.tsv"),
    ],
)
def test_a_folder_without_a_dataset_is_refused_with_advice(tmp_path: Path, files: list[str], message: str):
    for file in files:
        write(tmp_path / file, [])
    with pytest.raises(DataError, match=message):
        load_data(str(tmp_path))
