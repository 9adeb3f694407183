"""`Collector`: rows become a data set."""

from __future__ import annotations

import pytest

from negative_cache.workbench.data import DataError, RetrievalData
from negative_cache.workbench.data.rows import Collector, Document, Row, most_negatives
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


@pytest.mark.parametrize(
    ("given", "kept", "num_left_out"), [("all", ["wxyv", "c"], 0), ("3", ["wxy", "c"], 1), ("ignore", [], 5)]
)
def test_the_number_of_negatives_of_a_query_does_not_change_the_corpus(given: str, kept: list[str], num_left_out: int):
    collector = Collector(most_negatives=most_negatives(given))
    for added in (row("p", "a", "wxd"), row("q", "b", "c"), row("p", "a", "wyv"), row("p", "d", "")):
        collector.add(added, "train")
    data = collector.finish("f", "triplets")
    assert ["".join(data.corpus[key] for key in ids) for ids in data.negatives.values()] == kept
    note = f"f: negatives that are not used (--negatives {given}): {num_left_out}."
    assert data.notes == ((note,) if num_left_out else ())
    assert list(data.corpus.values()) == list("awxdbcyv")


@pytest.mark.parametrize("given", ["none", "0", "-1", "1.5", ""])
def test_another_number_of_negatives_is_refused(given: str):
    with pytest.raises(DataError, match=r"--negatives is .*expected all, ignore or a number"):
        most_negatives(given)


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
    assert list(data.qrels["train"].values()) == [["2"]]
    assert list(data.negatives.values()) == [["3"]]
    with pytest.raises(DataError, match="f, line 1: the corpus has no document with the id or the text '2'"):
        collected(by_id, corpus=Texts.of({"1": "one"}))
    with pytest.raises(DataError, match=r"f, line 1: the document '2' is given by its id alone.*--corpus"):
        collected(by_id)


def test_texts_without_an_id_have_the_same_id_in_any_order_and_any_file():
    rows = [row("p", "ab", "x"), row("q", "c"), row("r", "bd", "yz"), row("s", "dae")]
    first, second = (collected(*given, split=None) for given in (rows, rows[::-1]))
    assert dict(first.corpus) == dict(second.corpus)
    assert dict(first.queries) == dict(second.queries)
    assert len(first.corpus) == 8
    for qrels in (first.qrels, second.qrels):
        assert sorted(qrels) == ["dev", "test", "train"]
    assert {split: set(found) for split, found in first.qrels.items()} == {
        split: set(found) for split, found in second.qrels.items()
    }
    alone = collected(row("r", "d"))
    assert alone.queries.items() <= first.queries.items()
    assert alone.corpus.items() <= first.corpus.items()


def test_a_text_with_the_id_of_another_is_refused():
    (own,) = collected(row("p", "a")).corpus
    given = Row("f, line 2", "q", [Document("b", own)])
    with pytest.raises(DataError, match=f"f, line 2: the id '{own}' has another text than before: 'b'"):
        collected(row("p", "a"), given)


def test_a_query_of_all_rows_has_each_of_its_many_documents_once():
    rows = (Row("f", "the same", [Document(f"d{number % 20_000}")]) for number in range(40_000))
    data = collected(*rows)
    assert list(data.qrels["train"].values()) == [list(data.corpus)]
