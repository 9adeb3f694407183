"""The stage "quality" of the GPU benchmark, and the files that are prepared for it."""

from __future__ import annotations

import gzip
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu import finetuning, quality
from benchmarks.gpu import prepare as preparing
from benchmarks.gpu.finetuning import (
    BASELINE,
    GRADIENT_CACHE,
    KINDS,
    METRICS,
    NUM_MINED,
    UNTRAINED,
    Encoder,
    Job,
    Plan,
    make_batches,
    make_dataset,
    metrics_of,
    mine,
    ranks_of,
    rate_factor,
    rates_of,
)
from benchmarks.gpu.prepare import prepare
from benchmarks.gpu.quality import RANKS_FILE, run
from benchmarks.gpu.results import Results
from benchmarks.gpu.summary import chosen_rate, read_ranks, summary
from sentence_transformers import SentenceTransformer

from negative_cache.workbench.data import load_data
from negative_cache.workbench.evaluation import evaluate
from negative_cache.workbench.models import load_model

CPU = torch.device("cpu")
WORDS = ("red", "blue", "green", "old", "new", "small", "large", "round", "flat", "warm")
NUM_TRAIN, NUM_TEST = 40, 20


def write_beir(folder: Path, is_gzipped: bool = False, splits: tuple[str, ...] = ("train", "dev", "test")) -> Path:
    """80 documents of two words and a number, each with one query; the last ones are for dev and test."""
    names = [f"{first} {second} thing {at}" for at, (first, second) in enumerate(_word_pairs())]
    (folder / "qrels").mkdir(parents=True)
    for name, prefix in (("corpus", "the "), ("queries", "find ")):
        rows = [json.dumps({"id": f"{name[0]}{at:02}", "text": prefix + text}) for at, text in enumerate(names)]
        content = ("\n".join(rows) + "\n").encode()
        path = folder / f"{name}.jsonl{'.gz' if is_gzipped else ''}"
        path.write_bytes(gzip.compress(content) if is_gzipped else content)
    bounds = {"train": (0, NUM_TRAIN), "dev": (NUM_TRAIN, 60), "test": (60, 80)}
    for split in splits:
        rows = [f"q{at:02}\tc{at:02}\t1\n" for at in range(*bounds[split])]
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows))
    (folder / "README.md").write_text("not to be copied")
    return folder


def _word_pairs() -> list[tuple[str, str]]:
    return [(first, second) for first in WORDS for second in WORDS if first != second][:80]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder with a tiny model with random weights in the place of MiniLM."""
    folder = tmp_path_factory.mktemp("prepared")
    data = load_data(str(write_beir(folder / "data" / "things")))
    load_model("tiny", [*data.corpus.values(), *data.queries.values()], seed=0).save_pretrained(
        str(folder / "minilm"), create_model_card=False
    )
    return folder


@pytest.fixture
def encoder(prepared: Path) -> Encoder:
    return Encoder(SentenceTransformer(str(prepared / "minilm"), device="cpu"), is_bf16=False)


def test_prepared_files_are_those_of_the_sources(tmp_path: Path):
    plain, zipped = write_beir(tmp_path / "plain"), write_beir(tmp_path / "zipped", is_gzipped=True)
    target = tmp_path / "target"
    prepare(target, [plain, zipped])
    prepare(target, [plain, zipped])  # again, over what is there
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "target", "zipped"]
    for source in (plain, zipped):
        copy = target / "data" / source.name
        files = sorted(str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file())
        assert files == ["corpus.jsonl.gz", "qrels/dev.tsv", "qrels/test.tsv", "qrels/train.tsv", "queries.jsonl.gz"]
        assert load_data(str(copy)) == load_data(str(source))
    model = SentenceTransformer(str(target / "minilm"), device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert not (target / "minilm" / "README.md").exists()


def test_prepare_refuses_wrong_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data, target = write_beir(tmp_path / "data"), tmp_path / "target"
    with pytest.raises(ValueError, match="not a directory; expected a BEIR folder"):
        prepare(target, [tmp_path / "absent"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no dataset"):
        prepare(target, [tmp_path / "empty"])
    with pytest.raises(ValueError, match="different names"):
        prepare(target, [data, data])
    with pytest.raises(FileExistsError, match="Choose another"):
        prepare(data, [])
    monkeypatch.setattr(preparing, "minilm", lambda device: None)
    with pytest.raises(ImportError, match="pip install"):
        prepare(target, [data])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "empty"]


def test_prepare_refuses_what_is_too_large(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(preparing, "minilm", lambda device: SentenceTransformer(str(prepared / "minilm"), device="cpu"))
    monkeypatch.setattr(preparing, "LIMIT_MIB", 0.001)
    with pytest.raises(ValueError, match=r"minilm \d.*, data 0.*at most 0.001.*Omit"):
        prepare(tmp_path / "target", [write_beir(tmp_path / "data")])
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_rehearsal_runs_every_loss_and_seed(prepared: Path, tmp_path: Path):
    results = Results(tmp_path / "quality.json")
    run(results, prepared, CPU, 120.0, is_rehearsal=True)
    rows = results.rows
    assert json.loads((tmp_path / "quality.json").read_text()) == rows
    assert not [row for row in rows if "error" in row], rows
    assert (rows[0]["loss"], rows[0]["rate"], rows[0]["steps"]) == (UNTRAINED, None, 0)
    assert [(row["loss"], row["seed"], row["is_sweep"]) for row in rows[1:]] == [
        (loss, seed, seed == 0) for loss, seed in in_order([0, 1])
    ]
    for row in rows:
        assert row["runs_at_once"] == 1
        assert all(0 <= row[f"{split}_{metric}"] <= 1 for split in ("dev", "test") for metric in METRICS)
    check_documents_encoded(rows[1:])
    check_ranks(rows, tmp_path)


def in_order(seeds: list[int]) -> list[tuple[str, int]]:
    """Losses and seeds in the order of their runs, where one runs at a time."""
    losses = [[loss for loss, kind in KINDS.items() if kind.is_extra == is_extra] for is_extra in (False, True)]
    return [(loss, seed) for group in losses for seed in seeds for loss in group]


def check_documents_encoded(rows: list[dict[str, Any]]) -> None:
    num_pairs, batch = quality.REHEARSAL.max_pairs, quality.REHEARSAL.batch
    for row in rows:
        loss, seen, encoded = row["loss"], row["pairs_seen"], row["documents_encoded"]
        assert row["epochs"] == KINDS[loss].epochs
        num_batches = math.ceil(num_pairs / batch * row["epochs"])
        # A few pairs may find no batch. Where mined negatives repeat, an epoch and its part have more, smaller batches.
        assert batch * num_batches - 4 <= seen <= batch * (num_batches + (row["epochs"] % 1 > 0))
        if loss.startswith((BASELINE, "GIST", "gradient cache")):
            assert encoded == (KINDS[loss].num_mined + KINDS[loss].passes) * seen
        elif loss == "negative cache, paper":
            assert 0 < 2 * seen - encoded <= batch  # the cache is empty at first
        elif loss == "negative cache":
            assert seen <= encoded < 1.5 * seen  # at most a quarter, as soon as the cache counts
        else:
            assert seen < encoded < 2 * seen  # and fewer where draws are equal


def check_ranks(rows: list[dict[str, Any]], folder: Path) -> None:
    ranks = read_ranks(folder / RANKS_FILE)
    assert list(ranks) == ["things"]
    for row in rows:
        reciprocal = ranks["things"][row["loss"]][str(row["seed"])]
        assert len(reciprocal) == 8
        assert sum(reciprocal) / 8 == pytest.approx(row["test_MRR@10"], abs=1e-5)
    summed = summary(rows, ranks)
    assert [row["loss"] for row in summed] == [UNTRAINED, *KINDS]
    assert [row["seeds"] for row in summed] == [1, *[2] * len(KINDS)]


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_nothing_starts_after_the_deadline(prepared: Path, tmp_path: Path, seconds: float):
    results = Results(tmp_path / "quality.json")
    began = time.monotonic()
    run(results, prepared, CPU, seconds, is_rehearsal=True)
    assert results.rows == []
    assert time.monotonic() - began < 1
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_end_in_time_is_not_started(tmp_path: Path):
    schedule = quality._Schedule(Results(tmp_path / "quality.json"), ["data", "squad"], Plan())
    untrained = [Job("data", UNTRAINED), Job("squad", UNTRAINED)]
    assert schedule.waiting() == untrained
    schedule.started.update(untrained)
    for job, work in zip(untrained, (1000.0, 3000.0), strict=True):
        schedule.record(job, quality.Outcome(metrics(0.1), [], work), 1.0, 1)
    first = schedule.waiting()[0]
    assert (first.data, first.loss, first.rate, first.seed) == ("data", BASELINE, 6e-5, 0)
    assert schedule.estimate(first) == 0  # nothing is known yet
    schedule.record(first, quality.Outcome(metrics(0.2), []), 8.0, 1)
    assert schedule.estimate(first) == 8
    assert schedule.estimate(first._replace(loss="in-batch, twice the epochs")) == pytest.approx(16)
    assert schedule.estimate(first._replace(data="squad")) == pytest.approx(24)


@pytest.mark.parametrize(("best", "beyond"), [(6e-5, None), (2e-5, 6e-6), (2e-4, 6e-4)])
def test_seeds_follow_the_sweep(tmp_path: Path, best: float, beyond: float | None):
    schedule = quality._Schedule(Results(tmp_path / "quality.json"), ["data"], Plan())

    def do(job: Job) -> None:
        schedule.started.add(job)
        is_best = job.rate == (best if beyond is None else beyond) or job.rate == best
        schedule.record(job, quality.Outcome(metrics(0.5 + (job.rate == beyond) if is_best else 0.1), [1.0]), 1.0, 1)

    do(Job("data", UNTRAINED))
    sweep = [job for job in schedule.waiting() if job.loss == BASELINE]
    assert [(job.rate, job.seed) for job in sweep] == [(6e-5, 0), (2e-5, 0), (2e-4, 0)]
    for job in sweep:
        do(job)
    if beyond is not None:
        (job,) = (job for job in schedule.waiting() if job.loss == BASELINE)
        assert (job.rate, job.seed, job.is_sweep) == (beyond, 0, True)
        do(job)
    seeds = [job for job in schedule.waiting() if job.loss == BASELINE]
    assert [(job.rate, job.seed, job.is_sweep) for job in seeds] == [(beyond or best, seed, False) for seed in (1, 2)]
    assert list(read_ranks(tmp_path / RANKS_FILE)["data"][BASELINE]) == ["0"]


def test_a_job_that_fails_is_recorded_and_others_run(prepared: Path, tmp_path: Path):
    broken = tmp_path / "prepared"
    (broken / "data").mkdir(parents=True)
    (broken / "minilm").symlink_to(prepared / "minilm")
    write_beir(broken / "data" / "medquad", splits=("train",))
    write_beir(broken / "data" / "nl2bash", splits=("dev", "test"))
    results = Results(tmp_path / "quality.json")
    run(results, broken, CPU, 60.0, is_rehearsal=True)
    assert [(row["data"], row["loss"]) for row in results.rows] == [("nl2bash", UNTRAINED), ("medquad", UNTRAINED)]
    assert all("DataError" in str(row["error"]) for row in results.rows)


def test_a_process_that_is_killed_is_reported(prepared: Path, tmp_path: Path):
    job = Job("things", UNTRAINED)
    with quality._Pool((prepared, tmp_path, "cpu", quality.REHEARSAL)) as pool:
        pool.start(job)
        assert pool.jobs == [job]
        assert not pool.has_free
        pool._processes[0]._process.kill()
        ((ended, outcome, _, runs_at_once),) = pool.wait(30)
        assert (ended, outcome.error, runs_at_once) == (job, "The process ended with exit code -9.", 1)
        assert pool.has_free


def test_a_folder_that_is_not_prepared_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="gpu-prepare"):
        run(Results(tmp_path / "quality.json"), tmp_path, CPU, 60.0, is_rehearsal=True)


def test_without_a_dev_split_training_queries_are_held_out(encoder: Encoder, tmp_path: Path):
    data = load_data(str(write_beir(tmp_path / "things", splits=("train", "test"))))
    dataset = make_dataset(data, encoder, Plan())
    assert len(dataset.dev.queries) == NUM_TRAIN // 10
    assert len(dataset.pairs) == NUM_TRAIN - NUM_TRAIN // 10
    assert not set(dataset.dev.queries.tolist()) & set(dataset.pairs[:, 0].tolist())
    assert dataset.cache_size == 64
    assert (dataset.pairs[:, 2] != dataset.pairs[:, 1]).all()


def test_metrics_are_those_of_the_workbench(encoder: Encoder, tmp_path: Path):
    data = load_data(str(write_beir(tmp_path / "things")))
    data.qrels["test"]["q60"] += ["c03", "c71"]
    row, reciprocal = finetuning.evaluate(encoder, make_dataset(data, encoder, Plan()))
    expected = evaluate(encoder.model, data, ("test",))["test"].metrics()
    assert len(reciprocal) == NUM_TEST
    for metric in METRICS:
        assert row[f"test_{metric}"] == pytest.approx(expected[metric], abs=1e-9)


def test_ranks_and_metrics_equal_the_formulas():
    documents = torch.eye(4)
    queries = torch.tensor([[0.5, 0.5, 0.9, 0.1], [0.0, 0.0, 0.0, 1.0]])
    ranks = ranks_of(queries, documents, torch.tensor([[1, 3], [3, -1]]))
    assert ranks.tolist() == [[3, 4], [1, 0]]  # document 0 has the score of document 1 and comes first
    found = {metric: values.tolist() for metric, values in metrics_of(torch.tensor([[3, 40], [11, 0]])).items()}
    assert found["MRR@10"] == pytest.approx([1 / 3, 0])
    assert found["nDCG@10"] == pytest.approx([(1 / 2) / (1 + 1 / math.log2(3)), 0])
    assert found["R@100"] == [1, 1]


def test_mined_negatives_are_hard_and_no_positives():
    documents = torch.nn.functional.normalize(torch.randn(100, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    identity = torch.arange(100)
    identity[1] = 0  # an equal text
    pairs = torch.tensor([[0, 0]] * 400)
    labels = torch.tensor([[0, 7]] * 400)
    mined = mine(documents[:1], documents, identity, pairs, labels)
    order = [at for at in (documents @ documents[0]).argsort(descending=True).tolist() if at not in (0, 1, 7)]
    for column in mined.T:
        assert set(column.tolist()) == set(order[9:50])
    assert all(len(set(row)) == NUM_MINED for row in mined.tolist())
    few = mine(documents[:1], documents[:5], identity[:5], pairs, labels)
    assert set(few.flatten().tolist()) <= {2, 3, 4}


def test_rates_are_swept_where_none_was_chosen():
    plan = Plan(rates=(1e-5, 1e-4))
    assert [rates_of("nl2bash", loss, plan) for loss in (BASELINE, GRADIENT_CACHE)] == [(2e-4,), (6e-4,)]
    assert rates_of("other", GRADIENT_CACHE, plan) == (1e-5, 1e-4)


def test_no_value_occurs_twice_in_a_batch():
    identities = torch.stack([-1 - torch.arange(100) // 2, torch.arange(100) // 5], dim=1)
    batches = make_batches(identities, 16, seed=1, epoch=0)
    for rows in batches:
        values = [set(row) for row in identities[rows].tolist()]
        assert len(set().union(*values)) == sum(map(len, values))
    rows = torch.cat(batches).tolist()
    assert len(set(rows)) == len(rows) > 90
    assert all(2 <= len(rows) <= 16 for rows in batches)
    again = make_batches(identities, 16, seed=1, epoch=0)
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))
    assert torch.cat(make_batches(identities, 16, seed=2, epoch=0)).tolist() != rows


def test_the_rate_rises_and_falls_linearly():
    factors = [rate_factor(step, 21) for step in range(22)]
    assert factors[:2] == [0.5, 1]
    assert factors[11] == pytest.approx(0.5)
    assert factors[20] == pytest.approx(1 / 20)
    assert factors[21] == 0
    assert rate_factor(0, 1) == 1


def metrics(value: float) -> dict[str, float]:
    return {f"{split}_{metric}": value for split in ("dev", "test") for metric in METRICS}


def made_up(loss: str, rate: float, seed: int, dev: float, test: float, **more: Any) -> dict[str, Any]:
    job = {"data": "things", "loss": loss, "rate": rate, "seed": seed, "is_sweep": seed == 0}
    return {**job, "documents_encoded": 100, **metrics(test), "dev_MRR@10": dev, **more}


def test_the_summary_compares_means_over_seeds():
    rows = [
        {**made_up(UNTRAINED, 0.0, 0, 0.1, 0.1), "rate": None, "seed": None, "is_sweep": False},
        made_up(BASELINE, 1e-5, 0, dev=0.5, test=0.40),
        made_up(BASELINE, 2e-5, 0, dev=0.4, test=0.90),
        made_up(BASELINE, 1e-5, 1, dev=0.1, test=0.50),
        made_up("negative cache", 1e-5, 0, dev=0.6, test=0.55, documents_encoded=200),
        {
            "data": "things",
            "loss": "negative cache",
            "rate": 2e-5,
            "seed": 0,
            "is_sweep": True,
            "error": "out of memory",
        },
    ]
    # Means over seeds: .25, .5, .5 against .5, .5, 1. Differences 1/4, 0, 1/2 have mean 1/4 and deviation 1/4, so that
    # t = sqrt(3); with two degrees of freedom p = 1 - t / sqrt(t^2 + 2) = 1 - sqrt(3 / 5).
    ranks = {
        "things": {
            BASELINE: {"0": [0.5, 0.0, 0.5], "1": [0.0, 1.0, 0.5]},
            "negative cache": {"0": [0.5, 0.5, 1.0]},
        }
    }
    assert chosen_rate(rows, "things", BASELINE) == 1e-5
    untrained, baseline, cache = summary(rows, ranks)
    assert (untrained["loss"], untrained["seeds"], untrained["p_value"]) == (UNTRAINED, 1, None)
    assert untrained["difference"] == pytest.approx(0.1 - 0.45)
    assert (baseline["rate"], baseline["seeds"], baseline["difference"], baseline["p_value"]) == (1e-5, 2, None, None)
    assert baseline["test_MRR@10"] == pytest.approx(0.45)
    assert baseline["test_MRR@10_std"] == pytest.approx(0.1 / math.sqrt(2))
    assert (cache["rate"], cache["seeds"], cache["documents_encoded"]) == (1e-5, 1, 200)
    assert cache["test_nDCG@10_std"] is None
    assert cache["difference"] == pytest.approx(0.1)
    assert cache["p_value"] == pytest.approx(1 - math.sqrt(3 / 5))


def test_summary_without_ranks_or_differences():
    rows = [made_up(BASELINE, 1e-5, 0, 0.5, 0.5), made_up("negative cache", 1e-5, 0, 0.5, 0.5)]
    assert [row["p_value"] for row in summary(rows)] == [None, None]
    same = {"things": {loss: {"0": [0.5, 1.0]} for loss in (BASELINE, "negative cache")}}
    assert summary(rows, same)[1]["p_value"] is None
