"""`eval_documents`: the sample of the corpus that evaluations search."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from negative_cache.workbench.data import DataError, DataOptions, RetrievalData, load_data
from negative_cache.workbench.data.retrieval_data import notes_on_judged

CORPUS = {f"d{number}": f"text {number}" for number in range(200)}
QUERIES = {f"q{number}": f"query {number}" for number in range(40)}
QRELS = {
    "train": {f"q{number}": [f"d{number}"] for number in range(30)},
    "test": {f"q{number}": [f"d{2 * number}"] for number in range(30, 40)},
}


def data(**fields: object) -> RetrievalData:
    return RetrievalData("set", CORPUS, QUERIES, QRELS, **fields)  # type: ignore[arg-type]


def by_hash(ids: list[str]) -> list[str]:
    return sorted(ids, key=lambda key: hashlib.sha256(key.encode()).digest()[:8])


def expected(corpus: dict[str, str], judged: set[str], number: int) -> dict[str, str]:
    others = by_hash([key for key in corpus if key not in judged])
    chosen = judged.union(others[: max(0, number - len(judged))])
    return {key: text for key, text in corpus.items() if key in chosen}


def test_the_judged_documents_and_those_with_the_lowest_hashes_are_searched_in_the_order_of_the_corpus():
    grades = {"test": {"q30": {"d60": 2.0, "d7": 0.0}}}
    found = data(grades=grades).with_eval_documents(50)
    judged = {document for documents in QRELS["test"].values() for document in documents} | {"d7"}
    wanted = expected(CORPUS, judged, 50)
    assert list(found.part("test").corpus.items()) == list(wanted.items())
    assert len(wanted) == 50
    assert found.part("test").graded("test") == found.graded("test") == data(grades=grades).graded("test")
    assert found.part("test").grades == {"test": {"q30": {"d60": 2.0, "d7": 0.0}}}
    assert dict(found.part("train").corpus) == expected(CORPUS, {f"d{number}" for number in range(30)}, 50)
    assert dict(found.part("all").corpus) == expected(CORPUS, judged | {f"d{number}" for number in range(30)}, 50)


def test_the_sample_is_made_once_and_a_larger_one_contains_it():
    found = data().with_eval_documents(50)
    assert found.part("test") is found.part("test")
    assert found.part("test").corpus == data().with_eval_documents(50).part("test").corpus
    assert found.part("test").corpus.items() < data().with_eval_documents(51).part("test").corpus.items()


def test_training_has_the_whole_corpus():
    found = data().with_eval_documents(50)
    assert dict(found.corpus) == CORPUS
    assert len(found.labels()) == 200
    assert found.training_set()[:] == data().training_set()[:]


def test_a_dev_split_that_is_held_out_is_searched_in_a_sample():
    found = data().with_eval_documents(20).with_dev()
    judged = {document for documents in found.judged("dev").values() for document in documents}
    assert dict(found.part("dev").corpus) == expected(CORPUS, judged, 20)


def test_a_split_with_its_own_corpus_is_searched_in_a_sample_of_that():
    others = {f"e{number}": f"other {number}" for number in range(90)}
    part = RetrievalData("other", others, {"x": "query"}, {"test": {"x": ["e89"]}})
    whole = replace(data(), qrels={**QRELS, "test": {}}, elsewhere={"test": part})
    found = whole.with_eval_documents(100)
    assert found.part("test").corpus is part.corpus
    assert [note.split(":")[0] for note in found.notes] == ["set"]
    found = whole.with_eval_documents(8)
    assert dict(found.part("test").corpus) == expected(others, {"e89"}, 8)
    assert found.has("test")
    assert [note.split(":")[0] for note in found.notes] == ["set", "other"]


def test_notes_say_what_is_searched():
    (note,) = data().with_eval_documents(50).notes
    assert note == (
        "set: evaluations search the documents that are judged for a query of the split, such as its positives, and "
        "others up to 50 of the 200, chosen by the hash of their ids. The quality is higher than in all documents."
    )
    found = data().with_eval_documents(4)
    assert found.notes[1:] == (
        "set: the test split has 10 judged documents, more than --eval-documents 4. All of them are searched, and no "
        "others.",
    )
    assert len(found.part("test").corpus) == 10
    many = {**QRELS, "train": {f"q{number}": [f"d{number}", f"d{number + 99}"] for number in range(30)}}
    held_out = replace(data(), qrels=many).with_eval_documents(1).with_dev().notes
    assert "set: the dev split has 2 judged documents, more than --eval-documents 1." in held_out[-1]
    assert notes_on_judged(found, "all") == [
        "set: all splits together have 40 judged documents, more than --eval-documents 4. All of them are searched, "
        "and no others."
    ]
    whole = data().with_eval_documents(200)
    assert whole.notes == ("--eval-documents 200 has no effect: set has 200 documents.",)
    assert whole.part("test") is whole


@pytest.mark.parametrize("number", [0, -3])
def test_a_number_below_1_is_refused_before_the_data_is_read(number: int, tmp_path: Path):
    with pytest.raises(DataError, match=f"--eval-documents is {number}; it must be at least 1"):
        load_data(str(tmp_path / "none"), DataOptions(eval_documents=number))
