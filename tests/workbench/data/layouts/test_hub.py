"""Datasets of the hub, from local folders in the same layout, and folders that the datasets library saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from negative_cache.workbench.data import DataError, DataOptions, load_data

CORPUS = [{"_id": f"d{number}", "title": "T", "text": f"passage {number}"} for number in range(4)]
QUERIES = [{"_id": f"q{number}", "text": f"query {number}"} for number in range(3)]
TRAIN = [{"query-id": "q0", "corpus-id": "d0", "score": 1}]
TEST = [{"query-id": "q1", "corpus-id": "d1", "score": 2}, {"query-id": "q1", "corpus-id": "d2", "score": 0}]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder: Path, configurations: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """Write configurations with their splits, and the README.md that lists them, as `push_to_hub` does."""
    lines = ["---", "configs:"]
    for name, splits in configurations.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, rows in splits.items():
            path = folder / name / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
            lines += [f"  - split: {split}", f"    path: {name}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return f"hf:{folder}"


@pytest.mark.parametrize("qrels", ["qrels", "default"])
def test_a_collection_is_read(tmp_path: Path, qrels: str):
    source = write(
        tmp_path / "set",
        {"corpus": {"corpus": CORPUS}, "queries": {"queries": QUERIES}, qrels: {"train": TRAIN, "test": TEST}},
    )
    data = load_data(source)
    assert data.form == "collection of the hub"
    assert data.corpus["d3"] == "T\npassage 3"
    assert data.qrels == {"train": {"q0": ["d0"]}, "dev": {}, "test": {"q1": ["d1"]}}
    assert data.grades == {"test": {"q1": {"d1": 2.0, "d2": 0.0}}}
    local = load_data(source.removeprefix("hf:"))
    assert (local.corpus, local.queries, local.qrels) == (data.corpus, data.queries, data.qrels)


def test_judgements_may_be_in_a_dataset_of_their_own(tmp_path: Path):
    source = write(tmp_path / "set", {"corpus": {"corpus": CORPUS}, "queries": {"queries": QUERIES}})
    with pytest.raises(DataError, match=r"cannot load .*set-qrels"):
        load_data(source)
    write(tmp_path / "set-qrels", {"default": {"validation": TEST}})
    assert load_data(source).judged("dev") == {"q1": ["d1"]}


def test_a_part_or_a_collection_is_chosen_by_its_name(tmp_path: Path):
    parts = {
        part: dict.fromkeys(("NanoOne", "NanoTwo"), rows)
        for part, rows in (("corpus", CORPUS), ("queries", QUERIES), ("qrels", [{"query-id": "q0", "corpus-id": "d0"}]))
    }
    source = write(tmp_path / "nano", parts)
    assert load_data(source).elsewhere.keys() == {"NanoTwo"}
    data = load_data(f"{source}:NanoTwo")
    assert data.judged("NanoTwo") == {"q0": ["d0"]}
    assert not data.elsewhere
    with pytest.raises(DataError, match="has no part 'NanoThree'; its parts are: NanoOne, NanoTwo"):
        load_data(f"{source}:NanoThree")
    tables = (("corpus", CORPUS), ("queries", QUERIES), ("qrels", TEST))
    source = write(
        tmp_path / "languages", {f"{code}-{part}": {"test": rows} for code in ("de", "en") for part, rows in tables}
    )
    assert load_data(f"{source}:de").judged("test") == {"q1": ["d1"]}
    with pytest.raises(DataError, match=r"has several collections: de, en. Choose one: hf:.*languages:en"):
        load_data(source)


def rows(prefix: str, count: int) -> list[dict[str, Any]]:
    return [{"anchor": f"{prefix} q{n}", "positive": f"{prefix} d{n}"} for n in range(count)]


def test_rows_are_read_from_the_configuration_that_is_named(tmp_path: Path):
    source = write(
        tmp_path / "set",
        {"pair": {"train": rows("a", 3), "dev": rows("b", 2)}, "other": {"train": rows("c", 300)}},
    )
    with pytest.raises(DataError, match=r"has several configurations: pair, other. Choose one: hf:.*:pair"):
        load_data(source)
    with pytest.raises(DataError, match="has no configuration 'x'; it has pair, other"):
        load_data(f"{source}:x")
    data = load_data(f"{source}:pair")
    assert {split: len(qrels) for split, qrels in data.qrels.items()} == {"train": 3, "dev": 2, "test": 0}
    data = load_data(f"{source}:other")
    assert all(data.qrels[split] for split in ("train", "dev", "test"))
    assert any("divided by document, 85 : 5 : 10" in note for note in data.notes)


def test_what_save_to_disk_wrote_is_read(tmp_path: Path):
    train, test = (datasets.Dataset.from_list(rows(name, 300)) for name in ("a", "b"))
    datasets.DatasetDict({"train": train, "validation": test.select([5, 2])}).save_to_disk(tmp_path / "both")
    data = load_data(str(tmp_path / "both"))
    assert [len(data.qrels[split]) for split in ("train", "dev", "test")] == [300, 2, 0]
    assert [data.queries[query] for query in data.qrels["dev"]] == ["b q5", "b q2"]
    train.save_to_disk(tmp_path / "one")
    data = load_data(f"hf:{tmp_path / 'one'}")
    assert all(data.qrels[split] for split in ("train", "dev", "test"))
    data = load_data(str(tmp_path / "one"), DataOptions(dev=str(tmp_path / "both")))
    assert [len(data.qrels[split]) for split in ("train", "dev", "test")] == [300, 2, 0]
    assert not any("divided" in note for note in data.notes)


def test_an_unknown_dataset_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="The datasets library cannot load 'no/such-set'"):
        load_data("hf:no/such-set")
