"""Training runs on data with given negatives: every loss uses them, and they count as encoded documents."""

from __future__ import annotations

from pathlib import Path

import pytest

from negative_cache.workbench.data import RetrievalData
from negative_cache.workbench.models import load_model
from negative_cache.workbench.training import processes
from negative_cache.workbench.training.config import GUIDED, LOSSES, RunConfig, RunError
from negative_cache.workbench.training.driver import RunOptions, run

NUM_PAIRS, NUM_NEGATIVES = 24, 36
CORPUS = {f"d{number}": f"document {number} says {number * number}" for number in range(NUM_PAIRS + NUM_NEGATIVES)}
QUERIES = {f"q{number}": f"what says {number}" for number in range(NUM_PAIRS)}
QRELS = {f"q{number}": [f"d{number}"] for number in range(NUM_PAIRS)}
# 0 to 3 of each query, each a negative of one query alone
STARTS = [NUM_PAIRS + sum(range(4)) * (number // 4) + sum(range(number % 4)) for number in range(NUM_PAIRS)]
NEGATIVES = {f"q{at}": [f"d{start + other}" for other in range(at % 4)] for at, start in enumerate(STARTS) if at % 4}


def data(negatives: dict[str, list[str]]) -> RetrievalData:
    return RetrievalData("set", CORPUS, QUERIES, {"train": QRELS, "test": QRELS}, negatives=negatives)


def configuration(folder: Path, loss: str, output: str) -> RunConfig:
    if not (folder / "model").exists():
        kind = "tiny" if loss in GUIDED else "static"
        load_model(kind, CORPUS.values(), 0).save_pretrained(str(folder / "model"))
    return RunConfig(
        data="set", model=str(folder / "model"), loss=loss, output=str(folder / output), batch_size=8, epochs=2,
        learning_rate=0.05, save_steps=None,
    )  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_with_given_negatives_and_the_record_counts_them(loss: str, tmp_path: Path):
    documents, weights = [], []
    for name, negatives in (("with", NEGATIVES), ("without", {})):
        options = RunOptions(measure_before=False)
        record = run(configuration(tmp_path, loss, name), data(negatives), options)
        assert record is not None
        assert record.training_pairs == NUM_PAIRS
        documents.append(record.documents_encoded)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] != weights[1]
    if loss == "mined":  # also finds some of them itself
        assert documents[0] > documents[1] > 2 * NUM_PAIRS + len(CORPUS) + len(QUERIES)
        return
    assert documents[0] - documents[1] >= 2 * NUM_NEGATIVES  # two epochs
    if loss != "negative-cache":  # which re-encodes documents in addition
        passes = {"gist": 2, "cached-gist": 3}.get(loss, 1)  # of the model and of the guide
        assert documents == [2 * passes * (NUM_PAIRS + NUM_NEGATIVES), 2 * passes * NUM_PAIRS]


@pytest.mark.parametrize("loss", ["in-batch", "gradcache"])
def test_losses_that_need_equal_numbers_are_refused_on_several_ranks(
    loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = configuration(tmp_path, loss, "ranks")
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(RunError, match=f"--loss {loss} uses the negatives of set in one process only"):
        run(config, data(NEGATIVES))
    assert not (tmp_path / "ranks.partial").exists()
