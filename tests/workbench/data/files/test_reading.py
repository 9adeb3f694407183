"""Rows of files: types, compression, encodings, delimiters, quotes, and columns that are not used."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from negative_cache.workbench.data import DataError, load_data
from negative_cache.workbench.data.files import reading
from negative_cache.workbench.data.files.reading import file_rows


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
        ("a.csv", "sep=;\nquery;positive\nq;d\n", "line 1: 'sep=;' is for Excel alone"),
        ("a.csv", "query,positive\nq,d,e\n", "line 2: expected 2 columns as in the first line, got 3. Write a value"),
        ("a.csv", "query,positive,positive\nq,d,e\n", "line 1: several columns have the name 'positive'"),
        ("a.jsonl", '{"query": "q", "positive": "d", "positive": "e"}\n', "line 1: not JSON: a key occurs twice"),
        ("a.jsonl", '{"query": "q", "positive": "\\ud800"}\n', "line 1: 'positive' has the lone surrogate"),
    ],
)
def test_rows_that_cannot_be_used_are_reported_with_place_and_key(
    tmp_path: Path, name: str, content: str, message: str
):
    with pytest.raises(DataError, match=rf"{name}, {message}"):
        pairs_of(tmp_path / name, content)


def test_repeated_columns_in_parquet_are_refused(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table([["q"], ["d"], ["e"]], names=["query", "positive", "positive"]), path)
    with pytest.raises(DataError, match=r"a\.parquet: several columns have the name 'positive'"):
        load_data(str(path))


@pytest.mark.parametrize(
    ("name", "content", "unused"),
    [
        ("a.jsonl", '{"query": "q", "positive": "d"}\n{"query": "r", "positive": "d", "url": 3}', "'url'"),
        ("a.csv", "query,question,positive\nq,r,d", "'question'"),
    ],
)
def test_columns_that_are_not_used_are_named_in_one_note(tmp_path: Path, name: str, content: str, unused: str):
    (tmp_path / name).write_text(content)
    (note,) = load_data(str(tmp_path / name)).notes
    assert note == f"a: columns that are read: 'positive', 'query'; not used: {unused}."


def test_there_is_no_note_if_all_columns_are_used(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"query": "q", "positive": "d"}\n{"question": "r", "answer": "e"}\n')
    assert load_data(str(tmp_path / "a.jsonl")).notes == ()


# Types of files

ROWS = [{"query": f"query {n}", "positive": f"é{n}", "negatives": ["x", "y"]} for n in range(5)]


def rows_in(path: Path, encoding: str | None = None, notes: list[str] | None = None) -> list[Any]:
    return [row for _, row in file_rows(path, encoding, notes)]


def compressed(name: str, content: bytes) -> bytes:
    if name.endswith(".zst"):
        return pyarrow.compress(content, codec="zstd", asbytes=True)
    compress: Any = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}.get(name.rsplit(".")[-1], bytes)
    return compress(content)


@pytest.mark.parametrize("ending", ["", ".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_files_may_be_compressed(tmp_path: Path, kind: str, ending: str):
    path = tmp_path / f"a.{kind}{ending}"
    pairs = [{"query": row["query"], "positive": row["positive"]} for row in ROWS]
    text = {
        "jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in pairs),
        "json": json.dumps(pairs, ensure_ascii=False),
        "csv": "query,positive\n" + "".join(f"{row['query']},{row['positive']}\n" for row in pairs),
    }[kind]
    path.write_bytes(compressed(path.name, text.encode()))
    assert rows_in(path) == pairs
    if ending:
        path.write_bytes(path.read_bytes()[:-12])
        with pytest.raises(DataError, match=re.escape(path.name)):
            rows_in(path)
        path.write_bytes(b"query,positive\nq,a\n")
        with pytest.raises(DataError, match=rf"{re.escape(path.name)}: not readable"):
            rows_in(path)


@pytest.mark.parametrize("indent", [None, 2])
def test_arrays_are_read_piece_by_piece_with_the_line_and_the_number(
    tmp_path: Path, indent: int | None, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS, indent=indent, ensure_ascii=False))
    expected = rows_in(path)
    assert expected == ROWS
    places = [place for place, _ in file_rows(path)]
    assert places[3] == f"{path}, line {26 if indent else 1}, element 4"
    for size in range(1, 40):
        monkeypatch.setattr(reading, "_CHARS_AT_ONCE", size)
        assert list(file_rows(path)) == list(zip(places, ROWS, strict=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1},\n{"a": 2},\n{"a": \n]', "line 4: not JSON: Expecting value"),
        ('[{"a": 1},\n{"a": 2}\n{"a": 3}]', "line 3: not JSON: expected ',' or ']', got '{'"),
        ('[{"a": 1},\n{"a": 2}', "line 2: not JSON: expected .* got 'the end of the file'"),
        ('[{"a": 1},\n{"a": "b', "line 2: not JSON: Unterminated string"),
        ('[{"a": 1},\n{"a": 1, "a": 2}]', "line 2: not JSON: a key occurs twice"),
        ('{"a": 1}\n{"a": 1, "a": 2}', "line 2: not JSON: a key occurs twice"),
        ('{\n"a": 1}', "line 1: not JSON"),
        ("a", "line 1: not JSON"),
    ],
)
def test_malformed_json_is_reported_with_its_line(tmp_path: Path, content: str, message: str):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=rf"a\.json, {message}"):
        rows_in(tmp_path / "a.json")


def test_a_long_array_is_read_in_constant_memory(tmp_path: Path):
    path = tmp_path / "a.json"
    row = json.dumps({"query": "q", "positive": "word " * 2000})
    path.write_text("[" + ", ".join([row] * 4000) + "]")
    assert path.stat().st_size > 36 << 20
    tracemalloc.start()
    assert sum(1 for _ in file_rows(path)) == 4000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12 << 20


@pytest.mark.parametrize("rows", [[], [{}]])
def test_an_array_may_have_few_elements(tmp_path: Path, rows: list[Any]):
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert rows_in(tmp_path / "a.json") == rows


def test_parquet_and_both_kinds_of_arrow_files_are_read(tmp_path: Path):
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    with pyarrow.ipc.new_file(str(tmp_path / "file.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    with pyarrow.ipc.new_stream(str(tmp_path / "stream.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    for name in ("a.parquet", "file.arrow", "stream.arrow"):
        assert rows_in(tmp_path / name) == ROWS
        assert [place for place, _ in file_rows(tmp_path / name)][4] == f"{tmp_path / name}, row 4"
    (tmp_path / "file.arrow").write_text("no arrow")
    with pytest.raises(DataError, match="not readable as Arrow"):
        rows_in(tmp_path / "file.arrow")


# Delimiters and headings


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("query;positive\nwhat, then;this, that\n", "semicolons"),
        ("what is a, b;this, that\nwho;he\n", "semicolons"),
        ("query\tpositive\nwhat, then\tthis\n", "tabs"),
        ("query|positive\nwhat|this\n", "vertical bars"),
    ],
)
def test_the_delimiter_of_csv_is_found_and_noted(tmp_path: Path, content: str, named: str):
    path = tmp_path / "a.csv"
    path.write_text(content)
    notes: list[str] = []
    assert [len(row) for row in rows_in(path, notes=notes)] == [2] * (1 + (named not in content and "is a" in content))
    assert notes[0] == f"{path}: the columns are separated by {named}."


@pytest.mark.parametrize(
    ("first", "is_heading"),
    [
        ("query\twhat is this all about", True),
        ("Search query\tRelevant document", True),
        ("one\ttwo", True),
        ("d0\tpassage 0", False),
        ("12\ttext", False),
        ("one two\tthree", False),
        ("one\t", False),
        ("the query of a user\tanswer it", False),
    ],
)
def test_a_heading_has_a_known_name_or_looks_like_names(tmp_path: Path, first: str, is_heading: bool):
    (tmp_path / "a.tsv").write_text(f"{first}\nx\ty\n")
    notes: list[str] = []
    assert rows_in(tmp_path / "a.tsv", notes=notes)[-1] == (
        dict(zip(first.split("\t"), "xy", strict=True)) if is_heading else ["x", "y"]
    )
    is_sure = "query" in first.lower()
    assert len(notes) == (not (is_heading and is_sure))
    if is_heading and not is_sure:
        assert "the first line is read as names of columns" in notes[0]


@pytest.mark.parametrize(
    ("rows", "is_heading"),
    [
        (["OPS-1,2025-01-01,show the sizes of all directories,du -sk"] * 3, True),
        (["OPS-1,2025-01-01,show the sizes of all directories,du -sk"] * 2, False),  # too few to tell
        (["OPS-1,2025-01-01,show the sizes of all directories,du -sk"] * 3 + ["a,b,list files,ls -l"], False),
    ],
)
def test_a_first_line_of_few_words_is_a_heading_if_no_row_looks_like_it(
    tmp_path: Path, rows: list[str], is_heading: bool
):
    (tmp_path / "a.csv").write_text("\n".join(["ticket,created,Task,Command line", *rows]) + "\n")
    notes: list[str] = []
    last = rows_in(tmp_path / "a.csv", notes=notes)[-1]
    assert (isinstance(last, dict) and last["Command line"] == "du -sk") == is_heading
    assert ("the first line is read as names of columns" in notes[0]) == is_heading


def test_empty_columns_without_a_name_at_the_end_are_no_columns(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text("query,positive,,\nq,a,,\nr,b, ,\n")
    assert rows_in(path) == [{"query": "q", "positive": "a"}, {"query": "r", "positive": "b"}]
    path.write_text("query,positive,,\nq,a,,\nr,b,,c\n")
    with pytest.raises(DataError, match="line 3: the first line has no name for the column of 'c'"):
        rows_in(path)


@pytest.mark.parametrize("name", ["a.txt", "a.tsv"])
def test_a_file_without_tabs_is_refused_with_its_right_name(tmp_path: Path, name: str):
    (tmp_path / name).write_text("query,positive\nq,a\n")
    with pytest.raises(DataError, match=r"line 1: there is no tab.*'query,positive'. If .* name the file .csv"):
        rows_in(tmp_path / name)


def test_a_wrong_row_of_csv_with_semicolons_is_reported_with_its_line(tmp_path: Path):
    (tmp_path / "a.csv").write_text("query;positive\nq;a\nq;a;b\n")
    with pytest.raises(
        DataError, match=r"line 3: expected 2 columns as in the first line, got 3.*a semicolon, a quote"
    ):
        rows_in(tmp_path / "a.csv")


def test_commas_are_the_delimiter_where_others_are_in_texts(tmp_path: Path):
    (tmp_path / "a.csv").write_text("query,positive\na;b,c;d\ne|f,g\n")
    notes: list[str] = []
    assert rows_in(tmp_path / "a.csv", notes=notes)[0] == {"query": "a;b", "positive": "c;d"}
    assert notes == []


# Encodings

GERMAN = "Größe der Straßen in Köln, für Österreich"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (GERMAN, "cp1252"),
        ("Где находится библиотека имени Ленина в Москве", "cp1251"),
        ("図書館はどこですか。東京の図書館について教えてください", "cp932"),
        ("图书馆在哪里请问北京图书馆怎么走", "gb18030"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_another_encoding_is_detected_and_noted(tmp_path: Path, text: str, encoding: str, kind: str):
    path = tmp_path / f"a.{kind}"
    lines = [f'plain,"{n}"' if kind == "csv" else json.dumps(["plain", str(n)]) for n in range(3)]
    lines.append(f'"{text}",answer' if kind == "csv" else json.dumps([text, "answer"], ensure_ascii=False))
    path.write_bytes("\n".join(["query,positive", *lines] if kind == "csv" else lines).encode(encoding))
    notes: list[str] = []
    last = rows_in(path, notes=notes)[-1]
    assert (last["query"] if kind == "csv" else last[0]) == text
    assert f"not UTF-8; read as {encoding}, in which line {5 if kind == 'csv' else 4} is" in notes[0]
    assert text[:20] in notes[0]


def test_an_encoding_that_is_named_is_used(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_bytes("query,positive\nжизнь,é".encode("cp1251", "replace"))
    assert rows_in(path, "cp1251")[0]["query"] == "жизнь"
    with pytest.raises(DataError, match="there is no encoding 'latin-99'"):
        rows_in(path, "latin-99")
    with pytest.raises(DataError, match=r"a\.csv is not utf-8 .* with --encoding"):
        rows_in(path, "utf8")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_byte_order_marks_are_read(tmp_path: Path, encoding: str):
    path = tmp_path / "a.csv"
    path.write_bytes(f"query,positive\r\n{GERMAN[:5]},a\r\n".encode(encoding))
    notes: list[str] = []
    assert rows_in(path, notes=notes) == [{"query": GERMAN[:5], "positive": "a"}]
    assert len(notes) == (encoding == "utf-16")


def test_an_encoding_that_cannot_be_told_is_refused(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"query,positive\n\xa4\xac\xb8\xbe\xd7\xf7,a\n")
    with pytest.raises(DataError, match=r"line 2: not UTF-8 .* cannot be detected. Name it with --encoding"):
        rows_in(path)


def test_an_encoding_that_is_uncertain_is_refused_with_a_word_in_each(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_bytes("query,positive\nJak otworzyć drzwi bez klucza?,a\n".encode("cp1250"))
    with pytest.raises(DataError, match=r"line 2: .* not certain.*'otworzyæ' in cp1252, 'otworzyć' in cp1250.*--enc"):
        rows_in(path)
    assert rows_in(path, "cp1250")[0]["query"] == "Jak otworzyć drzwi bez klucza?"


def test_the_excerpt_is_the_text_around_the_first_character_beyond_ascii(tmp_path: Path):
    path = tmp_path / "a.csv"
    text = f"{'plain ' * 40}{GERMAN}"
    path.write_bytes(f'query,positive\n"{text}",a\n'.encode("cp1252"))
    notes: list[str] = []
    assert rows_in(path, notes=notes)[0]["query"] == text
    assert "plain Größe der Straßen" in notes[0]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_utf_16_without_a_byte_order_mark_is_refused_with_its_name(tmp_path: Path, encoding: str):
    path = tmp_path / "a.csv"
    path.write_bytes(f'query,positive\n"{GERMAN}",a\n'.encode(encoding))
    with pytest.raises(DataError, match=rf"a\.csv seems to be {encoding} without .*--encoding {encoding}"):
        rows_in(path)
    assert rows_in(path, encoding)[0]["query"] == GERMAN
    with pytest.raises(DataError, match=rf"a\.csv has no byte order mark, .*--encoding {encoding[:6]}-le or"):
        rows_in(path, encoding[:6])


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (gzip.compress(b"query,positive\nq,a\n", mtime=0), ".gz"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\r", ".png"),
        (b"PK\x03\x04\0", ".zip"),
    ],
    ids=[".gz", ".png", ".zip"],
)
def test_a_file_that_is_not_text_is_refused(tmp_path: Path, content: bytes, kind: str):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.csv is not text: it begins as a \{kind}"):
        rows_in(path)
    path.write_bytes(bytes(range(8)) + bytes(100))
    with pytest.raises(DataError, match=r"a\.csv is not text: many of its bytes are 0"):
        rows_in(path)


def test_one_wrong_line_of_a_utf8_file_is_an_error_and_no_other_encoding(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"query,positive\n" + f"{GERMAN[:5]},a\n".encode() * 5 + b"Gr\xf6,a\n")
    with pytest.raises(DataError, match=r"line 7: not UTF-8 .* although other lines .* Repair the line"):
        rows_in(path)
