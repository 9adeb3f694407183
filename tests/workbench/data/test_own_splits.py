"""Dev and test splits from sources of their own, held-out dev splits, and a part of the training pairs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import write_beir
from negative_cache.workbench.data import DataError, DataOptions, RetrievalData, load_data
from negative_cache.workbench.data.own_splits import with_rows


def write(path: Path, *pairs: tuple[str, str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"query": query, "positive": text}) + "\n" for query, text in pairs))
    return str(path)


def texts(data: RetrievalData, split: str) -> dict[str, list[str]]:
    """Judgements as texts."""
    return {data.queries[query]: [data.corpus[key] for key in keys] for query, keys in data.qrels[split].items()}


def test_with_a_test_file_the_whole_data_file_is_for_training(tmp_path: Path):
    train = write(tmp_path / "train.jsonl", *((f"q{n}", f"d{n}") for n in range(100)))
    test = write(tmp_path / "mine.jsonl", ("new", "d7"), ("q3", "d3"), ("other", "new d"))
    data = load_data(train, DataOptions(test=test))
    assert texts(data, "train") == {f"q{n}": [f"d{n}"] for n in range(100)}
    assert texts(data, "test") == {"new": ["d7"], "q3": ["d3"], "other": ["new d"]}
    assert data.qrels["dev"] == {}
    assert len(set(data.corpus.values())) == len(data.corpus) == 101
    assert len(set(data.queries.values())) == len(data.queries) == 102
    both = load_data(train, DataOptions(test=test, dev=train))
    assert texts(both, "dev") == texts(data, "train")
    assert texts(both, "test") == texts(data, "test")


def test_the_same_file_given_twice_is_said(beir: Path, tmp_path: Path):
    train = write(tmp_path / "train.jsonl", *((f"q{n}", f"d{n}") for n in range(100)))
    test = write(tmp_path / "mine.jsonl", ("new", "d7"), ("q3", "d3"))
    (tmp_path / "link.jsonl").symlink_to(test)
    for options, name in (
        (DataOptions(dev=str(tmp_path / "link.jsonl"), test=test), "--dev and --test are the same file, "),
        (DataOptions(dev=train, test=test), "--data and --dev are the same file, "),
    ):
        assert [note.startswith(name) for note in load_data(train, options).notes].count(True) == 1
    for options in (DataOptions(test=test), DataOptions(dev=str(beir), test=str(beir))):
        assert not [note for note in load_data(train, options).notes if "same file" in note]


def test_texts_and_ids_of_two_sources_that_meet_stay_apart():
    corpus = {"d0": "zero", "test-d0": "other"}
    first = RetrievalData("first", corpus, {"q0": "p", "q1": "r"}, {"train": {"q0": ["d0"]}})
    rows = RetrievalData(
        "rows",
        {"d0": "new", "e": "zero", "f": "last"},
        {"q0": "p", "other": "p", "q1": "new query"},
        {"test": {"q0": ["d0"], "other": ["f", "d0"], "q1": ["e"]}},
        negatives={"q0": ["e"], "q1": ["d0"]},
    )
    data = with_rows(first, "test", rows)
    assert texts(data, "train") == {"p": ["zero"]}
    assert texts(data, "test") == {"p": ["new", "last"], "new query": ["zero"]}
    assert dict(data.corpus) == {**corpus, "test-test-d0": "new", "f": "last"}
    assert data.negatives == {"test-q1": ["test-test-d0"]}  # "zero" is relevant to "p" in the training split


def test_a_file_of_rows_joins_a_beir_folder_in_place_of_its_split(beir: Path, tmp_path: Path):
    folder = load_data(str(beir))
    document = folder.corpus["d3"]
    test = write(tmp_path / "mine.jsonl", ("who", document), ("what", "new"))
    data = load_data(str(beir), DataOptions(test=test))
    assert data.corpus["d3"] == document
    assert list(data.corpus)[:-1] == list(folder.corpus)
    assert data.qrels["train"] == folder.qrels["train"]
    assert data.qrels["dev"] == folder.qrels["dev"]
    assert texts(data, "test") == {"who": [document], "what": ["new"]}
    rows = [{"query_id": "1", "query": "who", "positive_document_ids": ["d3"]}]
    (tmp_path / "ids.jsonl").write_text(json.dumps(rows[0]))
    data = load_data(str(beir), DataOptions(dev=str(tmp_path / "ids.jsonl")))
    assert list(data.qrels["dev"].values()) == [["d3"]]
    assert data.corpus == folder.corpus


def test_a_dataset_with_a_corpus_of_its_own_is_searched_in_it(beir: Path, tmp_path: Path):
    train = write(tmp_path / "train.jsonl", ("q", "d"))
    data = load_data(train, DataOptions(test=str(beir), dev=str(beir)))
    folder = load_data(str(beir))
    for split in ("dev", "test"):
        assert data.part(split).corpus == folder.corpus
        assert data.judged(split) == data.part(split).judged(split) == folder.qrels[split]
    assert list(data.corpus.values()) == ["d"]
    assert "The test split is that of set; it is searched in its own corpus of 80 documents." in data.notes
    for split in ("train", "dev"):
        (beir / "qrels" / f"{split}.tsv").unlink()
    data = load_data(train, DataOptions(dev=str(beir)))
    assert data.judged("dev") == folder.qrels["test"]


def test_a_source_of_a_split_with_several_others_is_refused(beir: Path, tmp_path: Path):
    (beir / "qrels" / "test.tsv").unlink()
    train = write(tmp_path / "train.jsonl", ("q", "d"))
    with pytest.raises(DataError, match="--test set has several splits, and none of the name 'test': dev, train"):
        load_data(train, DataOptions(test=str(beir)))
    rows = tmp_path / "rows"
    for name in ("train", "dev"):
        write(rows / f"{name}.jsonl", ("q", "d"))
    with pytest.raises(DataError, match=r"--test .*rows has several splits"):
        load_data(train, DataOptions(test=str(rows)))
    assert texts(load_data(train, DataOptions(dev=str(rows))), "dev") == {"q": ["d"]}


def test_documents_that_are_relevant_in_a_split_are_not_negatives(tmp_path: Path):
    (tmp_path / "train.jsonl").write_text('{"query": "q", "positive": "a", "negative": "b"}\n')
    test = write(tmp_path / "test.jsonl", ("q", "b"))
    assert not any(load_data(str(tmp_path / "train.jsonl"), DataOptions(test=test)).negatives.values())


def test_a_part_of_the_training_pairs_is_the_same_each_time(beir: Path):
    whole = load_data(str(beir))
    parts = {n: load_data(str(beir), DataOptions(max_train_pairs=n)) for n in (10, 20, 1000)}
    assert {n: sum(map(len, part.qrels["train"].values())) for n, part in parts.items()} == {10: 10, 20: 20, 1000: 61}
    assert parts[10].qrels["train"].items() <= whole.qrels["train"].items()
    assert len(parts[20].qrels["train"].keys() & parts[10].qrels["train"].keys()) >= 9
    assert parts[10].corpus == whole.corpus
    assert parts[10].qrels["test"] == whole.qrels["test"]
    assert parts[10].notes[-1].startswith("set: the training split has 10 of its 61 pairs")
    assert parts[1000] == whole
    for number in (0, -1):
        with pytest.raises(DataError, match=f"--max-train-pairs is {number}; it must be at least 1"):
            load_data(str(beir), DataOptions(max_train_pairs=number))


def test_all_positives_of_a_query_are_kept_together():
    data = RetrievalData("set", {"a": "x", "b": "y"}, {"1": "q", "2": "r"}, {"train": {"1": ["a", "b"], "2": ["a"]}})
    assert data.with_train_pairs(1).qrels["train"] == {"2": ["a"]}
    with pytest.raises(DataError, match="each training query of set has more pairs"):
        RetrievalData("set", data.corpus, data.queries, {"train": {"1": ["a", "b"]}}).with_train_pairs(1)


def test_a_dev_split_is_held_out_of_the_training_queries(beir: Path):
    whole = load_data(str(beir))
    assert whole.with_dev() is whole
    (beir / "qrels" / "dev.tsv").unlink()
    data = load_data(str(beir)).with_dev()
    assert len(data.qrels["dev"]) == 3
    assert data.qrels["train"] | data.qrels["dev"] == whole.qrels["train"]
    assert not data.qrels["train"].keys() & data.qrels["dev"].keys()
    assert "3 of its 60 training queries are held out" in data.notes[-1]
    graded = RetrievalData(
        "set", {"a": "x"}, {"1": "q", "2": "r"}, {"train": {"1": ["a"], "2": ["a"]}},
        grades={"train": {"1": {"a": 2.0}, "2": {"a": 3.0}}},
    ).with_dev()  # fmt: skip
    assert [len(graded.grades[split]) for split in ("train", "dev")] == [1, 1]
    assert graded.grades["dev"].keys() == graded.qrels["dev"].keys()


@pytest.mark.parametrize(
    ("option", "value"),
    [("corpus", "c.jsonl"), ("query_column", "q"), ("positive_column", "p"), ("negative_column", "n")],
)
@pytest.mark.parametrize("source", ["beir", "python-code"])
def test_options_of_rows_are_refused_for_other_data(tmp_path: Path, source: str, option: str, value: str):
    if source == "beir":
        source = str(write_beir(tmp_path / "set"))
    with pytest.raises(DataError, match=f"--{option.replace('_', '-')} '{value}' is for files of rows; .* has none"):
        load_data(source, DataOptions(**{option: value}))


def test_an_unknown_source_is_refused_with_what_is_supported():
    with pytest.raises(DataError, match=r"'nothing' is not a file.*BEIR folder.*MS MARCO.*hf:NAME.*python-code"):
        load_data("nothing")
