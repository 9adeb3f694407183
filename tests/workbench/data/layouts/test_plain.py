"""Documents alone: their ids, their texts, and folders of text files."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from negative_cache.workbench.data import DataError, DataOptions, load_data, load_documents


@pytest.mark.parametrize("name", ["_id", "ID", "doc-id", "document_id", "corpus-id", "Passage ID"])
def test_a_column_of_ids_has_the_ids_that_a_search_shows(tmp_path: Path, name: str):
    path = tmp_path / "a.csv"
    path.write_text(f"{name},text,url\na7,Lift the lid.,x\nb9,Turn the key.,y\n")
    corpus, notes = load_documents(str(path))
    assert dict(corpus) == {"a7": "Lift the lid.", "b9": "Turn the key."}
    assert notes == [f"{path}: columns that are not used: 'url'."]


def test_a_column_of_ids_in_parquet_may_have_numbers(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"doc_id": [7, 9], "text": ["a", "b"], "url": ["x", "y"]}), path)
    corpus, notes = load_documents(str(path))
    assert dict(corpus) == {"7": "a", "9": "b"}
    assert notes == [f"{path}: columns that are not used: 'url'."]


def test_a_table_of_one_column_needs_no_heading(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text("Lift the lid of 1 box.\nTurn the key.\n")
    assert dict(load_documents(str(path))[0]) == {"1": "Lift the lid of 1 box.", "2": "Turn the key."}


def test_documents_that_are_markers_of_missing_values_are_skipped(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text("id,title,text\nNA,NaN,Lift the lid.\n2,,NaN\n3,Door,NaN\n")  # an id may be NA, such as Namibia
    corpus, notes = load_documents(str(path))
    assert dict(corpus) == {"NA": "Lift the lid.", "3": "Door"}
    assert notes == [f"{path}: skipped documents without a text (the cell is 'NaN'): 1 (first: {path}, line 3)."]
    with pytest.raises(DataError, match="line 3: 'text' is 'NaN', a missing value; expected a text"):
        load_documents(str(path), DataOptions(strict=True))


def write_notes(folder: Path) -> None:
    for name, text in {
        "printer.md": "# Printer\n\nIt needs toner.\n",
        "office/door.txt": "Turn the key.\nPush it.\n",
        "empty.txt": "\n",
        ".hidden/a.md": "no document",
        "picture.png": "no text",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_each_text_file_of_a_folder_is_a_document(tmp_path: Path):
    write_notes(tmp_path)
    corpus, notes = load_documents(str(tmp_path))
    assert dict(corpus) == {
        "office/door.txt": "Turn the key.\nPush it.",
        "printer.md": "# Printer\n\nIt needs toner.",
    }
    assert notes == [
        f"{tmp_path}: each of the 3 .txt and .md files is a document, and its path is the id.",
        f"{tmp_path}: skipped documents without a text: 1 (first: {tmp_path / 'empty.txt'}).",
    ]


def test_text_files_beside_files_of_rows_are_no_documents(tmp_path: Path):
    write_notes(tmp_path)
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d1", "text": "Lift the lid."}\n')
    corpus, notes = load_documents(str(tmp_path))
    assert dict(corpus) == {"d1": "Lift the lid."}
    assert notes == [f"{tmp_path}: its files of rows are read. Not read: 3 .txt and .md files."]


def test_an_unknown_type_of_file_is_refused_with_what_can_be_searched(tmp_path: Path):
    (tmp_path / "a.md").write_text("a text")
    with pytest.raises(DataError, match=r"a\.md: unknown file type; .* a \.txt file with a document per line, a table"):
        load_documents(str(tmp_path / "a.md"))


@pytest.mark.parametrize("kind", ["folder", "lines"])
def test_pairs_name_notes_by_path_or_line(tmp_path: Path, kind: str):
    write_notes(tmp_path / "notes")
    (tmp_path / "lines.txt").write_text("Lift the lid.\n\nTurn the key.\n")
    corpus, ids = {"folder": ("notes", ["printer.md", "office/door.txt"]), "lines": ("lines.txt", ["1", "3"])}[kind]
    (tmp_path / "pairs.csv").write_text(f"query,positive\nprinter is empty,{ids[0]}\nlocked out,{ids[1]}\n")
    data = load_data(str(tmp_path / "pairs.csv"), DataOptions(corpus=str(tmp_path / corpus)))
    assert sorted(document for found in data.judged("all").values() for document in found) == sorted(ids)
    assert dict(data.corpus) == dict(load_documents(str(tmp_path / corpus))[0])
    (tmp_path / "wrong.csv").write_text("query,positive\nprinter is empty,printer\n")
    with pytest.raises(DataError, match="printer"):
        load_data(str(tmp_path / "wrong.csv"), DataOptions(corpus=str(tmp_path / corpus)))
