"""Columns of unknown names, which are taken by their order if they have texts."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from negative_cache.workbench.data import DataError, DataOptions, RetrievalData, load_data

NUM_ROWS = 12
TEXTS = [f"how do I open the box of {name}" for name in "abcdefghijkl"]
COLUMNS: dict[str, Iterable[Any]] = {
    "date": [f"2024-05-{n + 10}" for n in range(NUM_ROWS)],
    "day": [f"{n + 1}.5.24" for n in range(NUM_ROWS)],
    "when": [f"May {n + 1}, 2024" for n in range(NUM_ROWS)],
    "time": [f"10:{n + 10} am" for n in range(NUM_ROWS)],
    "price": [f"${n}.50" for n in range(NUM_ROWS)],
    "views": [f"1,{n + 100}" for n in range(NUM_ROWS)],
    "ticket": [f"HELP-{n}" for n in range(NUM_ROWS)],
    "url": [f"https://example.com/{chr(97 + n)}" for n in range(NUM_ROWS)],
    "status": ["in progress", "done"] * (NUM_ROWS // 2),
    "clicked": ["no"] * NUM_ROWS,
    "subject": TEXTS,
    "body": [f"Lift the lid. {text}" for text in TEXTS],
    "reply": [f"Close it, {text}" for text in TEXTS],
    "notes": [f"Whatever is noted, {text}" for text in TEXTS],
    "wrong_1": [f"not {text}" for text in TEXTS],
    "wrong_2": [f"also not {text}" for text in TEXTS],
    "search": ["laptop", "mouse", "laptop", "key", "key", "box", "cat", "dog", "lid", "red hat", "tin", "hat"],
    "id": range(NUM_ROWS),
    "": range(NUM_ROWS),
}


def table(path: Path, names: str, has_heading: bool = True) -> Path:
    """Write a table with these columns."""
    given = ["" if name == "index" else name for name in names.split()]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([given] if has_heading else [])
        writer.writerows(zip(*(COLUMNS[name] for name in given), strict=True))
    return path


def negatives(data: RetrievalData) -> list[list[str]]:
    return [[data.corpus[key] for key in keys] for keys in data.negatives.values()]


@pytest.mark.parametrize(
    ("names", "note"),
    [
        ("subject body", "query 'subject', positive 'body', negatives none"),
        ("search body", "query 'search', positive 'body', negatives none"),
        ("id subject body reply", "query 'subject', positive 'body', negatives 'reply'"),
        ("index subject body wrong_1 wrong_2", "query 'subject', positive 'body', negatives 'wrong_1', 'wrong_2'"),
    ],
)
def test_columns_of_texts_are_taken_by_order_with_a_note(tmp_path: Path, names: str, note: str):
    data = load_data(str(table(tmp_path / "a.csv", names)))
    assert len(data.judged("all")) == len(set(COLUMNS["subject" if "subject" in names else "search"]))
    assert any("no known name of a column" in text and note in text for text in data.notes)


@pytest.mark.parametrize(
    ("heading", "columns", "note"),
    [
        ("question,command", {}, "no known name of a column: 'command'.* query 'question', positive 'command'"),
        ("id,answer,topic", {}, "no known name of a column: 'topic'.* query 'topic', positive 'answer'"),
        ("topic,solution", {"query_column": "topic"}, "no known name of a column: 'solution'.* query 'topic'"),
    ],
)
def test_the_only_other_column_of_texts_is_taken_with_a_note(
    tmp_path: Path, heading: str, columns: dict[str, str], note: str
):
    path = tmp_path / "a.csv"
    first = "id" in heading
    rows = (f"{number}," * first + f"how to open {text},lift the lid of {text}" for number, text in enumerate(TEXTS))
    path.write_text("\n".join([heading, *rows]))
    data = load_data(str(path), DataOptions(**columns))
    assert len(data.judged("all")) == NUM_ROWS
    assert any(re.search(note, text) for text in data.notes)
    assert all(text.startswith("how to open" if not first else "lift") for text in data.queries.values())


@pytest.mark.parametrize(
    ("heading", "what"),
    [
        ("question,price", "'price' is no known name of a column, and its values are numbers"),
        ("question,url", "'url' is no known name of a column, and its values are addresses"),
        ("question,price,url", "no column positive .*--positive-column price"),
        ("question,subject,body", "no column positive .*--positive-column subject"),
        ("status,answer", "'status' is no known name .* are few and short"),
    ],
)
def test_the_only_other_column_is_refused_if_it_has_no_texts_or_there_are_several(
    tmp_path: Path, heading: str, what: str
):
    path = table(tmp_path / "a.csv", heading.replace("question", "search").replace("answer", "body").replace(",", " "))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([heading, *lines[1:]]))
    with pytest.raises(DataError, match=f"line 2: {what}"):
        load_data(str(path))


def test_a_row_without_the_only_other_column_is_skipped_or_has_a_known_name(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    rows = [{"query": "q 1", "command": "d 1"}, {"query": "q 2", "other": "x"}, {"query": "q 3", "positive": "d 3"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = load_data(str(path))
    assert set(data.corpus.values()) == {"d 1", "d 3"}
    assert data.skipped == {"rows without a relevant document": 1}


def test_a_column_of_negatives_is_not_taken_as_the_only_other_one(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text("question,wrong\nhow to open,close it\n")
    with pytest.raises(DataError, match="no column positive"):
        load_data(str(path), DataOptions(negative_column="wrong"))


@pytest.mark.parametrize(
    ("names", "what", "proposed"),
    [
        ("date status subject body", "'date' .* are dates or times, such as '2024-05-10'", "subject .*column body"),
        ("day subject body", "'day' .* are dates or times", "subject .*column body"),
        ("when subject body", "'when' .* are dates or times", "subject .*column body"),
        ("subject time body", "'time' .* are dates or times", "subject .*column body"),
        ("ticket subject body", "'ticket' .* are ids, such as 'HELP-0'", "subject .*column body"),
        ("search clicked price", "'clicked' .* are few and short, such as 'no'", "search .*column NAME"),
        ("subject body price", r"'price' .* are numbers, such as '\$0.50'", "subject .*column body"),
        ("subject body views", "'views' .* are numbers", "subject .*column body"),
        ("status subject body", "'status' .* are few and short, such as 'in progress'", "subject .*column body"),
        ("subject body status", "'status' .* are shared by queries, such as .* by 6 of them", "subject .*column body"),
        ("search url", "'url' .* are addresses of web pages", "search .*column NAME"),
        ("subject body reply notes", "'reply' .* may be no negatives, .* 'notes'", "subject .*column body"),
    ],
)
def test_columns_of_other_values_are_refused_with_what_to_type(tmp_path: Path, names: str, what: str, proposed: str):
    path = table(tmp_path / "a.csv", names)
    with pytest.raises(DataError, match=rf"line 2: {what}.*--query-column {proposed}"):
        load_data(str(path))


def test_columns_that_are_named_are_not_judged_by_their_values(tmp_path: Path):
    path = table(tmp_path / "a.csv", "date status subject body")
    data = load_data(str(path), DataOptions(query_column="subject", positive_column="status"))
    assert set(data.corpus.values()) == {"in progress", "done"}
    path = table(tmp_path / "b.csv", "subject body status price")
    data = load_data(str(path), DataOptions(negative_column="status"))
    assert sorted(negatives(data)) == [["done"]] * 6 + [["in progress"]] * 6


def test_numbers_that_are_no_texts_are_refused_too(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"price": 3, "search": "a box", "page": "a lid"}\n')
    with pytest.raises(DataError, match=r"'price' .* are numbers, such as '3'.*--query-column search .*column page"):
        load_data(str(path))


def test_tables_without_a_heading_are_judged_by_their_values(tmp_path: Path):
    path = table(tmp_path / "a.csv", "subject body date", has_heading=False)
    with pytest.raises(DataError, match=r"line 1: value 3 of a row is not a text: .* are dates or times"):
        load_data(str(path))
    data = load_data(str(table(tmp_path / "b.csv", "subject body reply", has_heading=False)))
    assert len(negatives(data)) == NUM_ROWS


def test_ids_of_a_corpus_need_not_be_texts(tmp_path: Path):
    (tmp_path / "corpus.jsonl").write_text("".join(f'{{"_id": "HELP-{n}", "text": "text {n}"}}\n' for n in range(20)))
    path = table(tmp_path / "a.csv", "subject ticket", has_heading=False)
    data = load_data(str(path), DataOptions(corpus=str(tmp_path / "corpus.jsonl")))
    assert len(data.judged("all")) == NUM_ROWS


def test_only_the_first_thousand_rows_are_judged(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text("search,page\n" + "".join(f"a box {n},text {n}\n" for n in range(1000)) + "3,4\n" * 2)
    data = load_data(str(path))
    assert len(data.judged("all")) == 1001
    assert any("pairs that repeat an earlier one, and count once: 1." in note for note in data.notes)


def test_a_table_with_labels_has_no_negatives_by_order(tmp_path: Path):
    path = tmp_path / "log.csv"
    rows = [f"{text},title {number},about {text},{number % 3}" for number, text in enumerate(TEXTS)]
    path.write_text("\n".join(["search_term,product_title,product_description,relevance", *rows]))
    data = load_data(str(path))
    assert data.form == "labelled pairs"
    given = {data.corpus[key] for keys in data.negatives.values() for key in keys}
    assert all(text.startswith("title") for text in (*given, *data.corpus.values()))
    graded = {grade for split in data.grades.values() for of in split.values() for grade in of.values()}
    assert 2.0 in graded
