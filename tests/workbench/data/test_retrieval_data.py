"""Documents with the id of a query, and the rows of training."""

from __future__ import annotations

from dataclasses import replace

import pytest

from negative_cache.workbench.data import DataError, RetrievalData, retrieval_data

CORPUS = {"a": "text a", "b": "text b", "c": "text c"}


def data(queries: dict[str, str], train: dict[str, list[str]]) -> RetrievalData:
    return RetrievalData("set", CORPUS, queries, {"train": train, "test": {}})


def test_a_document_with_the_id_of_its_query_is_not_a_negative():
    given = data({"a": "text a", "x": "other"}, {"a": ["b", "c"], "x": ["c"]})
    assert given.training_set()["label"][:] == [[1, 2], [2, 1], [2]]
    assert given.ignored("a") is None
    found = given.ignoring_identical_ids()
    assert (found.ignored("a"), found.ignored("x")) == ("a", None)
    assert found.training_set()["label"][:] == [[1, 2, 0], [2, 1, 0], [2]]
    assert found.notes == ("set: for 1 of 2 queries, the document with the same id is ignored.",)
    assert found.ignoring_identical_ids() == found


def test_judgements_of_ignored_documents_are_skipped_and_counted():
    found = data({"a": "q", "b": "q"}, {"a": ["a", "c"], "b": ["b"]}).ignoring_identical_ids()
    assert found.qrels == {"train": {"a": ["c"]}, "test": {}}
    assert found.notes[-1].endswith("; skipped judgements of such documents: 2.")


def test_a_query_that_is_judged_for_its_ignored_document_alone_is_no_longer_judged():
    grades = {"train": {"a": {"a": 2.0}, "b": {"b": 2.0, "c": 0.0}}}
    given = RetrievalData("set", CORPUS, {"a": "q", "b": "r"}, {"train": {"a": ["a"], "b": ["b", "a"]}}, grades=grades)
    found = given.ignoring_identical_ids()
    assert found.graded("train") == {"b": {"a": 1.0, "c": 0.0}}


def test_splits_with_corpora_of_their_own_have_no_judgements_in_common():
    part = data({"y": "r"}, {"y": ["a"]})
    found = replace(data({"x": "q"}, {"x": ["a"]}), elsewhere={"test": part})
    with pytest.raises(DataError, match=r"set has splits with a corpus of their own: test.*Name one split"):
        found.graded("all")


@pytest.mark.parametrize(
    ("queries", "train", "message"),
    [
        ({"x": "q"}, {"x": ["a"]}, "has no effect on set: no query has the id of a document. .*'x'.*'a'"),
        ({"a": "q"}, {"a": ["a"]}, "leaves no judgement of set"),
    ],
)
def test_ignoring_ids_that_never_meet_or_always_do_is_refused(queries: dict, train: dict, message: str):
    with pytest.raises(DataError, match=f"--ignore-identical-ids {message}"):
        data(queries, train).ignoring_identical_ids()


def test_a_query_with_many_documents_does_not_take_the_square_of_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Each names those after it, in a circle, so that all are named equally often; the ignored document always is."""
    monkeypatch.setattr(retrieval_data, "MAX_LABELS", 3)
    corpus = {str(number): f"text {number}" for number in range(6)} | {"x": "text x"}
    train = {"x": ["0", "1", "2", "3", "4"], "y": ["5", "0", "1"]}
    found = RetrievalData("set", corpus, {"x": "q", "y": "r"}, {"train": train}).ignoring_identical_ids()
    assert found.training_set()["label"][:] == [
        [0, 1, 2, 6], [1, 2, 3, 6], [2, 3, 4, 6], [3, 4, 0, 6], [4, 0, 1, 6], [5, 0, 1], [0, 5, 1], [1, 5, 0],
    ]  # fmt: skip
    (record,) = caplog.records
    assert record.getMessage().startswith("set: 1 training queries have more than 3 relevant documents. Each of these")


def test_documents_with_equal_texts_have_one_label():
    found = RetrievalData("set", CORPUS | {"d": "text b"}, {"x": "q"}, {"train": {"x": ["d", "a", "b"]}, "test": {}})
    columns = found.training_set()[:]
    assert columns["positive"] == ["text b", "text a", "text b"]
    assert columns["label"] == [[1, 0], [0, 1], [1, 0]]


def test_a_tokenizer_is_trained_on_each_text_of_the_training_split_or_on_evenly_spaced_ones(
    monkeypatch: pytest.MonkeyPatch,
):
    found = data({"x": "q", "y": "r", "z": "s"}, {"x": ["a", "c"], "y": ["c"]})
    texts = found.training_texts()
    assert list(texts) == list(texts) == ["q", "r", "text a", "text c"]
    monkeypatch.setattr(retrieval_data, "MAX_TRAINING_TEXTS", 6)
    queries = {f"q{number}": f"query {number}" for number in range(9)}
    many = RetrievalData("set", {"a": "text"}, queries, {"train": {key: ["a"] for key in queries}})
    assert list(many.training_texts()) == ["query 0", "query 3", "query 6", "text"]


def test_rows_of_training_have_the_negatives_of_their_query():
    corpus = CORPUS | {"d": "text b"}
    queries = {"x": "q", "y": "r", "z": "s"}
    splits = {"train": {"x": ["a", "c"], "y": ["b"]}, "test": {"z": ["a"]}}
    found = RetrievalData("set", corpus, queries, splits, negatives={"x": ["d", "b"], "z": ["c"]})
    rows = found.training_set()
    assert rows.column_names == ["anchor", "positive", "label", "negative", "negative_label"]
    assert rows["anchor"][:] == ["q", "q", "r"]
    assert rows["label"][:] == [[0, 2], [2, 0], [1]]
    assert rows["negative"][:] == [["text b", "text b"], ["text b", "text b"], []]
    assert rows["negative_label"][:] == [[1, 1], [1, 1], []]  # equal texts have the position of the first
    only_tested = RetrievalData("set", corpus, queries, splits, negatives={"z": ["c"]})
    assert only_tested.training_set().column_names == ["anchor", "positive", "label"]


def test_a_dataset_is_shown_in_a_line():
    data = RetrievalData("set", CORPUS, {"a": "q"}, {"train": {"a": ["b"]}, "test": {}})
    assert repr(data) == f"<RetrievalData 'set': {len(CORPUS)} documents; queries: train 1, test 0>"
