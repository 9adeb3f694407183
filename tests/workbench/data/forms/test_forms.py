"""Rows of each form, in files as the projects that define the forms write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from negative_cache.workbench.data import DataError, DataOptions, load_data
from negative_cache.workbench.data.files.reading import file_rows
from negative_cache.workbench.data.forms.reader import RowReader
from negative_cache.workbench.data.rows import Row


def reader_of(path: Path, content: str | list[Any], **options: Any) -> RowReader:
    """A reader of a file with this text, or with these rows as JSON lines."""
    text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(text, encoding="utf-8", newline="")
    given = DataOptions(**options)
    return RowReader(path.name, file_rows(path, given.encoding, [], given.columns()), given)


def texts(row: Row) -> tuple[str, list[str | None], list[str | None]]:
    """The query, the positives and the negatives of a row."""
    return row.query, [document.text for document in row.positives], [document.text for document in row.negatives]


def ids(row: Row) -> tuple[str | None, list[str | None], list[str | None]]:
    return row.query_id, [document.id for document in row.positives], [document.id for document in row.negatives]


def passage(number: int) -> dict[str, str]:
    return {"docid": f"{number}#0", "title": f"Title {number}", "text": f"passage {number}"}


FLAG = {
    "query": "q", "pos": ["a", "b"], "neg": ["c", "d"], "pos_scores": [0.9, 0.8], "neg_scores": [0.1, 0.2],
    "prompt": "Represent this: ", "type": "normal",
}  # fmt: skip
TEVATRON = {
    "query_id": 7, "query": "q", "positive_passages": [passage(1)], "negative_passages": [passage(2), passage(3)],
}  # fmt: skip
DPR = {
    "dataset": "nq_train_psgs_w100", "question": "q", "answers": ["x", "y"],
    "positive_ctxs": [
        {"title": "T", "text": "a", "score": 1000, "title_score": 1, "passage_id": "11"},
        {"title": "", "text": "b", "score": 0, "psg_id": 12},
    ],
    "negative_ctxs": [{"title": "T", "text": "d", "passage_id": "14"}],
    "hard_negative_ctxs": [{"title": "U", "text": "c", "passage_id": "13"}],
}  # fmt: skip
SWIFT = {
    "messages": [{"role": "system", "content": "Find answers."}, {"role": "user", "content": "q"}],
    "positive_messages": [[{"role": "user", "content": "a"}]],
    "negative_messages": [[{"role": "user", "content": "c"}], [{"role": "user", "content": "d"}]],
}


@pytest.mark.parametrize(
    ("row", "form", "expected"),
    [
        ({"query": "q", "positive": "a"}, "pairs", ("q", ["a"], [])),
        ({"anchor": "q", "positive": "a", "negative": "c"}, "triplets", ("q", ["a"], ["c"])),
        ({"question": "q", "answer": "a", "negative_1": "c", "negative_2": "d"}, "n-tuples", ("q", ["a"], ["c", "d"])),
        ({"query": "q", "positive": "a", "negatives": ["c", "d"]}, "n-tuples", ("q", ["a"], ["c", "d"])),
        ({"query": "q", "positive": ["a", "b"], "hard_negatives": ["c"]}, "n-tuples", ("q", ["a", "b"], ["c"])),
        ({"sentence1": "q", "sentence2": "a"}, "pairs", ("q", ["a"], [])),
        ({"sentence1": "q", "sentence2": "a", "sentence3": "c"}, "triplets", ("q", ["a"], ["c"])),
        ({"sentence_A": "q", "sentence_B": "a"}, "pairs", ("q", ["a"], [])),
        ({"question1": "q", "question2": "a", "qid1": "3"}, "pairs", ("q", ["a"], [])),
        ({"question": "q", "answer": "a", "rejected": "c"}, "triplets", ("q", ["a"], ["c"])),
        ({"query": "q", "positive_doc": "a"}, "pairs", ("q", ["a"], [])),
        ({"query": "q", "positive_1": "a", "positive_2": "b", "negative": "c"}, "triplets", ("q", ["a", "b"], ["c"])),
        ({"query": "q", "positive": "a", "positive_2": ["b"]}, "pairs", ("q", ["a", "b"], [])),
        ({"Query": "q", " Document ": "a"}, "pairs", ("q", ["a"], [])),
        ({"query": "q", "response": "a", "rejected_response": ["c"]}, "n-tuples", ("q", ["a"], ["c"])),
        (FLAG, "FlagEmbedding", ("Represent this: q", ["a", "b"], ["c", "d"])),
        ({"query": "q", "pos": "a", "neg": "c"}, "FlagEmbedding", ("q", ["a"], ["c"])),
        (TEVATRON, "Tevatron", ("q", ["Title 1\npassage 1"], ["Title 2\npassage 2", "Title 3\npassage 3"])),
        (DPR, "DPR", ("q", ["T\na", "b"], ["U\nc", "T\nd"])),
        ({"question": "q", "pos_doc": "a", "neg_doc": ["c"]}, "NeMo", ("q", ["a"], ["c"])),
        ({"query": "q", "pos_doc": [{"text": "a"}], "neg_doc": [{"text": "c"}]}, "NeMo", ("q", ["a"], ["c"])),
        (SWIFT, "ms-swift", ("Find answers.\nq", ["a"], ["c", "d"])),
        (
            SWIFT | {"positive_messages": [{"role": "user", "content": "a"}]},
            "ms-swift",
            ("Find answers.\nq", ["a"], ["c", "d"]),
        ),
        (["q", "a"], "pairs", ("q", ["a"], [])),
        (["q", "a", "c"], "triplets", ("q", ["a"], ["c"])),
        (["q", "a", "c", "d"], "n-tuples", ("q", ["a"], ["c", "d"])),
        ({"set": ["q", "a", "b"]}, "embedding-training-data sets", ("q", ["a", "b"], [])),
        (
            {"query": "q", "docs": ["c", "a", "d"], "labels": [0, 1, 0.0]},
            "sentence-transformers lists",
            ("q", ["a"], ["c", "d"]),
        ),
        (
            {"query": "q", "passages": {"is_selected": [0, 1], "passage_text": ["c", "a"], "url": ["u", "v"]}},
            "sentence-transformers lists",
            ("q", ["a"], ["c"]),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("is_array", [False, True])
def test_a_row_of_each_form_is_read(tmp_path: Path, row: Any, form: str, expected: Any, is_array: bool):
    content = json.dumps([row, row], indent=1) if is_array else [row, row]
    reader = reader_of(tmp_path / "train.json", content)
    assert [texts(read) for read in reader] == [expected, expected]
    assert reader.form == form
    assert reader.skipped == {}


def test_ids_of_tevatron_and_dpr_are_kept(tmp_path: Path):
    assert [ids(row) for row in reader_of(tmp_path / "t.jsonl", [TEVATRON])] == [("7", ["1#0"], ["2#0", "3#0"])]
    assert [ids(row) for row in reader_of(tmp_path / "d.jsonl", [DPR])] == [(None, ["11", "12"], ["13", "14"])]


@pytest.mark.parametrize("query", ["query_text", "query"])
def test_tevatron_rows_may_refer_to_documents_by_id(tmp_path: Path, query: str):
    row = {"query_id": "7", query: "q", "positive_document_ids": ["1"], "negative_document_ids": [2, "3"]}
    (read,) = reader_of(tmp_path / "t.jsonl", [row])
    assert ids(read) == ("7", ["1"], ["2", "3"])
    assert texts(read) == ("q", [None], [None, None])


@pytest.mark.parametrize("indent", [None, 4])
def test_nemo_files_name_their_corpus_and_refer_to_documents_by_id(tmp_path: Path, indent: int | None):
    rows = [
        {"question_id": f"q{n}", "question": f"who {n}", "corpus_id": "c", "pos_doc": [{"id": f"d{n}"}],
         "neg_doc": [{"id": "d8"}, {"id": "d9"}]}
        for n in range(3)
    ]  # fmt: skip
    corpus = {"path": "corpus/"} if indent else [{"path": "corpus/"}]
    content = json.dumps({"corpus": corpus, "data": rows}, indent=indent)
    reader = reader_of(tmp_path / "train.json", content)
    assert reader.corpus_paths == ["corpus/"]
    assert reader.form == "NeMo"
    assert [ids(row) for row in reader] == [(f"q{n}", [f"d{n}"], ["d8", "d9"]) for n in range(3)]
    assert [row.text for row in next(iter(reader_of(tmp_path / "a.json", content))).positives] == [None]


def test_what_is_put_before_a_query_and_what_is_not_used_is_noted(tmp_path: Path):
    reader = reader_of(tmp_path / "f.jsonl", [FLAG, FLAG | {"prompt": ""}])
    assert [row.query for row in reader] == ["Represent this: q", "q"]
    columns, prompt = reader.notes
    assert columns == (
        "f.jsonl: columns that are read: 'neg', 'pos', 'prompt', 'query'; not used: 'neg_scores', 'pos_scores', 'type'."
    )
    assert prompt == "f.jsonl: the prompt is put before the query; rows with a prompt: 1."
    reader = reader_of(tmp_path / "s.jsonl", [SWIFT])
    assert len(list(reader)) == 1
    assert reader.notes == ["s.jsonl: the system message is put before the query, with a line break; rows with one: 1."]


# Columns


@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
def test_a_table_without_a_heading_is_read_by_order(tmp_path: Path, name: str):
    tab = "\t" if name == "a.tsv" else ","
    path = tmp_path / name
    reader = reader_of(path, "".join(tab.join((f"who is {n}", f"it is {n}", f"not {n} 5")) + "\n" for n in range(3)))
    assert [texts(row) for row in reader] == [(f"who is {n}", [f"it is {n}"], [f"not {n} 5"]) for n in range(3)]
    assert reader.notes == [f"{name}: the values of a row are taken by order: query, positive, negatives."]
    notes: list[str] = []
    file_rows(path, notes=notes)
    assert "the first line is read as data" in notes[0]


def test_options_name_columns_before_usual_names(tmp_path: Path):
    content = "my query,my answer,wrong one,query,positive,negative\nq,a,c,x,y,z\n"
    named = {"query_column": "my query", "positive_column": "my answer"}
    reader = reader_of(tmp_path / "a.csv", content, negative_column="wrong one", **named)
    assert [texts(row) for row in reader] == [("q", ["a"], ["c"])]
    assert "not used: 'negative', 'positive', 'query'" in reader.notes[0]


@pytest.mark.parametrize(
    ("option", "remedy"),
    [("query_column", "--query-column"), ("positive_column", "--positive-column"), ("negative_column", "--neg")],
)
def test_a_column_that_is_asked_for_and_missing_is_reported(tmp_path: Path, option: str, remedy: str):
    with pytest.raises(DataError, match=rf"line 2: there is no column 'typo', which {remedy}.* are 'a', 'b'"):
        reader_of(tmp_path / "a.csv", "a,b\nq,d\n", **{option: "typo"})


def test_all_missing_columns_are_reported_in_one_error(tmp_path: Path):
    asked = {"query_column": "serch", "positive_column": "paeg", "label_column": "nothing"}
    with pytest.raises(DataError) as caught:
        reader_of(tmp_path / "a.csv", "search,page\nq,d\n", **asked)
    said = str(caught.value)
    for flag, name in (
        ("--query-column", "serch"),
        ("--positive-column", "paeg"),
        ("--label-column", "nothing"),
    ):
        assert f"no column {name!r}, which {flag} names" in said
    assert said.endswith("the columns are 'page', 'search'. Did you mean --query-column search --positive-column page?")


def test_the_column_that_is_proposed_is_not_one_that_is_used(tmp_path: Path):
    with pytest.raises(DataError, match=r"no column positive .* for example: --positive-column right\."):
        reader_of(tmp_path / "a.csv", "left,right,more\nq,d,e\n", query_column="left")


def test_a_column_cannot_be_query_and_document(tmp_path: Path):
    path = tmp_path / "pairs.csv"
    path.write_text("query,answer\na,b\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"'query' is the column of the queries and.*--positive-column answer"):
        load_data(str(path), DataOptions(positive_column="query"))


def test_the_right_case_of_a_column_is_proposed(tmp_path: Path):
    with pytest.raises(DataError, match=r"no column 'my query'.* Did you mean --query-column 'My query'\?"):
        reader_of(tmp_path / "a.csv", "My query,page\nq,d\n", query_column="my query", positive_column="page")


def test_columns_may_differ_from_row_to_row(tmp_path: Path):
    rows = [
        {"query": "q", "positive": "a"},
        {"question": "r", "answer": "b"},
        {"query": "s", "positive": "a", "negatives": ["c"]},
        {"query": "t"},
    ]
    reader = reader_of(tmp_path / "a.jsonl", rows)
    assert [texts(row) for row in reader] == [("q", ["a"], []), ("r", ["b"], []), ("s", ["a"], ["c"])]
    assert reader.skipped == {"rows without a relevant document": 1}
    assert reader.notes == []
    with pytest.raises(DataError, match="line 2: no column 'query' and no column 'positive', only 'other', 'text'"):
        list(reader_of(tmp_path / "a.jsonl", [rows[0], {"text": "q", "other": "a"}]))


def test_the_index_that_pandas_writes_has_no_meaning(tmp_path: Path):
    reader = reader_of(tmp_path / "a.csv", ",query,pos\n0,q,a\n")
    assert [(texts(row), row.query_id) for row in reader] == [(("q", ["a"], []), None)]
    assert reader.notes == ["a.csv: columns that are read: 'pos', 'query'; not used: ''."]


def test_a_list_in_a_cell_is_several_documents(tmp_path: Path):
    rows = ['q\t["a"]\t["c", "d"]', "r\tb\t[c", """s\t['a']\t['it\\'s', "d"]""", "t\tb\t[1, 2]"]
    reader = reader_of(tmp_path / "a.tsv", "\n".join(["query\tpositive\tnegatives", *rows]))
    assert [texts(row) for row in reader] == [
        ("q", ['["a"]'], ["c", "d"]),
        ("r", ["b"], ["[c"]),
        ("s", ["['a']"], ["it's", "d"]),
        ("t", ["b"], ["[1, 2]"]),
    ]
    assert reader.notes == ["a.tsv: values that are lists, each text of which is a document: 2."]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"query": "q", "a": "y", "b": "z"}], "line 1: no column positive or .*only 'a', 'b', 'query'.*--positive-c"),
        ([{"a": "q", "b": "z", "answer": "y"}], "line 1: no column query or .*--query-column"),
        ([{"number": 3}], "line 1: rows of an unknown form, with the columns 'number'.*Known forms: pairs, .*DPR"),
        ([3], "line 1: expected a JSON object or a list of texts, got int"),
        ([["q"]], "line 1: expected a list of a query, a positive and any negatives"),
        ([["q", "a"], {"query": "q"}], "line 2: expected a list"),
        ([{"query": "q", "positive": "a"}, ["q", "a"]], "line 2: expected a JSON object as in the first row"),
        ([{"query": "q", "positive": 3}], "line 1: 'positive' is of type int; expected a text"),
        ([{"query": ["q"], "positive": "a"}], "line 1: 'query' is of type list"),
        ([{"query": "q", "pos": ["a", 3]}], "line 1: 'pos' is of type int"),
        ([{"set": ["q"]}], r"line 1: 'set' is \['q'\]; expected a list of two or more"),
        ([{"query": "q", "positive_passages": [{"url": "a"}]}], "line 1: 'positive_passages' has an object without a"),
        ([{"query": "q", "docs": ["a", "b"], "labels": [0.3, 7]}], "line 1: 'labels' is .* expected 0 or 1 for each"),
        ([{"query": "q", "docs": ["a", "b"], "labels": [1]}], "line 1: 'labels' is .* for 2 documents"),
        ([{"query": "q", "positive": "\ud800"}], "line 1: 'positive' has the lone surrogate"),
        ([["12", "a"]], "line 1: value 1 of a row is not a text: such values are numbers, such as '12'.*name the col"),
    ],
)
def test_rows_of_another_form_or_type_are_refused_with_their_place(tmp_path: Path, rows: list[Any], message: str):
    with pytest.raises(DataError, match=message):
        list(reader_of(tmp_path / "a.jsonl", rows))


@pytest.mark.parametrize("content", ["", "query,positive\n"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: str):
    with pytest.raises(DataError, match=r"a\.csv has no pairs"):
        reader_of(tmp_path / "a.csv", content)


# Missing texts


MISSING = [
    {"query": " ", "positive": "a"},
    {"query": None, "positive": "a"},
    {"query": "q", "positive": ""},
    {"query": "q", "positive": []},
    {"query": "q", "positive": ["", None]},
]


def test_rows_without_a_text_are_skipped_and_counted(tmp_path: Path):
    rows = [{"query": "q", "positive": ["a", " "], "negative": ["c", None, float("nan")]}, *MISSING]
    reader = reader_of(tmp_path / "a.jsonl", rows)
    assert [texts(row) for row in reader] == [("q", ["a"], ["c"])]
    assert reader.skipped == {
        "rows with an empty query": 2,
        "rows without a relevant document": 3,
        "empty positives": 1,
        "empty negatives": 2,
    }


MARKED = "query,positive,label,more\nq,NaN,1,NaN\nnull,a,1,NaN\nr,b,NULL,NaN\nnan or none,NaN is no number,1,NaN\n"


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_markers_of_missing_values_in_a_table_are_skipped_as_empty_cells_are(tmp_path: Path, delimiter: str):
    reader = reader_of(tmp_path / ("a.csv" if delimiter == "," else "a.tsv"), MARKED.replace(",", delimiter))
    assert [texts(row) for row in reader] == [("nan or none", ["NaN is no number"], [])]
    assert reader.skipped == {
        "rows without a relevant document (the cell is 'NaN')": 1,
        "rows with an empty query (the cell is 'null')": 1,
        "rows without a label (the cell is 'NULL')": 1,
    }
    with pytest.raises(DataError, match=r"line 2: 'positive' is empty \(the cell is 'NaN'\); expected a text"):
        list(reader_of(tmp_path / "b.csv", MARKED, strict=True))


def test_markers_of_missing_values_in_json_are_texts(tmp_path: Path):
    (row,) = reader_of(tmp_path / "a.jsonl", [{"query": "what is falsy", "positive": "None"}])
    assert texts(row) == ("what is falsy", ["None"], [])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text\na text of three words\n", "line 2: only one column may have texts; the columns are 'text'"),
        ("a.csv", "document,label\nsome text,1\n", "line 2: only one column may have texts"),
        ("a.csv", "id,question\n1,who\n", "line 2: only one column may have texts"),
        ("a.csv", "a text of 3 words\nanother text\n", "line 1: expected a list of a query"),
        ("a.txt", "a text of three words\nanother text\n", "line 1: there is no tab"),
        ("a.md", "a text\n", "unknown file type"),
    ],
)
def test_a_file_of_documents_alone_is_refused_with_the_command_to_search_in_it(
    tmp_path: Path, name: str, content: str, message: str
):
    with pytest.raises(DataError, match=message + ".* Documents alone can be searched: negative-cache se"):
        reader_of(tmp_path / name, content)


@pytest.mark.parametrize("row", [*MISSING, {"query": "q", "positive": "a", "negative": ""}])
def test_a_missing_text_is_an_error_with_its_place_in_strict_reading(tmp_path: Path, row: dict[str, Any]):
    first = {"query": "q", "positive": "a", "negative": "c"}
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: '.*' is (null|empty|missing)"):
        list(reader_of(tmp_path / "a.jsonl", [first, row], strict=True))
