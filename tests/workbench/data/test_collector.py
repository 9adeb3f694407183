"""`Collector`: rows become a data set."""

from __future__ import annotations

import pytest

from negative_cache.workbench.data import DataError, RetrievalData
from negative_cache.workbench.data.rows import Collector, Document, Row
from negative_cache.workbench.data.texts import Texts


def row(query: str, positives: str, negatives: str = "", **others: str) -> Row:
    """A row with one-letter texts."""
    return Row("f, line 1", query, [*map(Document, positives)], [*map(Document, negatives)], **others)


def collected(*rows: Row, split: str | None = "train", corpus: Texts | None = None) -> RetrievalData:
    collector = Collector(corpus)
    for given in rows:
        collector.add(given, split)
    return collector.finish("f", "pairs")


def test_rows_of_a_query_are_one_query_with_all_their_documents():
    data = collected(row("p", "ab", "xy"), row("q", "c"), row("p", "bd", "yz"))
    assert list(data.queries.values()) == ["p", "q"]
    assert list(data.corpus.values()) == list("abxycdz")

    def texts(ids: list[str]) -> str:
        return "".join(data.corpus[key] for key in ids)

    assert [texts(ids) for ids in data.qrels["train"].values()] == ["abd", "c"]
    assert [texts(ids) for ids in data.negatives.values()] == ["xyz"]


def test_a_positive_of_any_row_and_split_is_not_a_negative_of_the_query():
    collector = Collector()
    collector.add(row("p", "a", "bcd"), "train")
    collector.add(row("p", "b", "c"), "train")
    collector.add(row("p", "c"), "test")
    data = collector.finish("f", "triplets")
    assert [[data.corpus[key] for key in ids] for ids in data.negatives.values()] == [["d"]]


def test_the_first_negatives_of_a_query_are_kept_over_its_rows():
    collector = Collector(most_negatives=3)
    for given in (row("p", "a", "wx"), row("q", "b", "c"), row("p", "a", "yz"), row("p", "d", "v")):
        collector.add(given, "train")
    data = collector.finish("f", "triplets")
    assert ["".join(data.corpus[key] for key in ids) for ids in data.negatives.values()] == ["wxy", "c"]
    assert data.notes == ("f: negatives beyond the first 3 of their query, which are not used: 2.",)
    assert "z" not in data.corpus.values()


def test_documents_that_share_a_query_fall_into_one_split():
    rows = [Row("f", f"q{n}", [Document(f"d{n}"), Document(f"d{n + 1}")]) for n in range(0, 600, 3)]
    data = collected(*rows, split=None)
    splits = {document: name for name, qrels in data.qrels.items() for found in qrels.values() for document in found}
    assert {name: len(qrels) for name, qrels in data.qrels.items() if len(qrels) > 2}.keys() == {"train", "dev", "test"}
    for number in range(0, 600, 3):
        first, second = (key for key, text in data.corpus.items() if text in (f"d{number}", f"d{number + 1}"))
        assert splits[first] == splits[second]


def test_ids_of_rows_are_kept_and_must_have_one_text():
    first = Row("f, line 1", "p", [Document("a", "7")], query_id="3")
    data = collected(first, Row("f, line 2", "p", [Document("a", "8")], query_id="4"))
    assert dict(data.queries) == {"3": "p", "4": "p"}
    assert dict(data.corpus) == {"7": "a", "8": "a"}
    with pytest.raises(DataError, match="f, line 2: the id '7' has another text than before: 'b'"):
        collected(first, Row("f, line 2", "q", [Document("b", "7")]))
    with pytest.raises(DataError, match="f, line 2: the id '3' has another text than before: 'q'"):
        collected(first, Row("f, line 2", "q", [Document("a", "7")], query_id="3"))


def test_documents_given_by_id_come_from_the_corpus():
    corpus = Texts.of({"1": "one", "2": "two", "3": "three"})
    by_id = Row("f, line 1", "p", [Document(None, "2")], [Document(None, "3")])
    data = collected(by_id, corpus=corpus)
    assert data.corpus == corpus
    assert data.qrels["train"] == {"q0": ["2"]}
    assert data.negatives == {"q0": ["3"]}
    with pytest.raises(DataError, match="f, line 1: the corpus has no document with the id or the text '2'"):
        collected(by_id, corpus=Texts.of({"1": "one"}))
    with pytest.raises(DataError, match=r"f, line 1: the document '2' is given by its id alone.*--corpus"):
        collected(by_id)


def test_texts_without_an_id_get_ids_that_no_text_has():
    given = Row("f, line 1", "p", [Document("a", "d0"), Document("b")], query_id="q0")
    data = collected(given, Row("f, line 2", "r", [Document("c")]))
    assert dict(data.queries) == {"q0": "p", "q1": "r"}
    assert dict(data.corpus) == {"d0": "a", "d1": "b", "d2": "c"}
    with pytest.raises(DataError, match=r"f, line 2: the id 'd0' was given to an earlier text that has no id"):
        collected(row("p", "a"), Row("f, line 2", "q", [Document("b", "d0")]))


def test_a_query_of_all_rows_has_each_of_its_many_documents_once():
    rows = (Row("f", "the same", [Document(f"d{number % 20_000}")]) for number in range(40_000))
    data = collected(*rows)
    assert data.qrels["train"] == {"q0": list(data.corpus)}
