"""Comparisons through the command line: real runs on small data, each in its own process."""

from __future__ import annotations

import json
import random
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from command_line import DOCUMENTS, invoke, write_beir
from negative_cache.workbench.compare.baselines import Baseline
from negative_cache.workbench.compare.comparison import BASELINES, Comparison, parse_losses, parse_rates
from negative_cache.workbench.compare.running import best_rate, extensions, summary
from negative_cache.workbench.compare.table import command_of_best, verdict
from negative_cache.workbench.data import DataOptions, load_data
from negative_cache.workbench.evaluation import evaluate
from negative_cache.workbench.models import load_trained
from negative_cache.workbench.training.config import RunError
from negative_cache.workbench.training.record import RunRecord

WORDS = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in "nrst"]
SIZES = {"train": 72, "dev": 24, "test": 24}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A query has some words of its document."""
    rng, folder = random.Random(0), tmp_path_factory.mktemp("data")
    documents = {f"d{n}": rng.sample(WORDS, 12) for n in range(sum(SIZES.values()))}
    lines = [json.dumps({"_id": key, "text": " ".join(words)}) for key, words in documents.items()]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    lines = [json.dumps({"_id": f"q{key}", "text": " ".join(words[:2])}) for key, words in documents.items()]
    (folder / "queries.jsonl").write_text("\n".join(lines))
    (folder / "qrels").mkdir()
    names = iter(documents)
    for split, size in SIZES.items():
        rows = [f"q{name}\t{name}\t1" for name in (next(names) for _ in range(size))]
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(rows))
    return folder


def options(data: Path, output: Path, losses: str, *more: str) -> list[str]:
    given = ["--data", str(data), "--losses", losses, "--output", str(output), "--batch-size", "8", "--epochs", "2"]
    return ["compare", *given, "--cache-size", "64", "--learning-rates", "0.05", *more]


def test_a_comparison_runs_reports_and_goes_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    output = tmp_path / "out"
    losses = "bm25,in-batch,gradcache:batch_size=24,memory-bank,mined,negative-cache:num_samples=2,zero-shot"
    monkeypatch.setattr(sys, "argv", ["negative-cache", "compare", "--losses", losses])  # what the report names
    first = invoke(*options(data, output, losses, "--seeds", "2"))
    assert first.exit_code == 0, first.output
    result = json.loads((output / "compare.json").read_text())
    assert list(result["losses"]) == list(parse_losses(losses))
    steps = {"in-batch": 18, "gradcache:batch_size=24": 6, "memory-bank": 18, "mined": 18}
    steps["negative-cache:num_samples=2"] = 18
    trained = {name: loss for name, loss in result["losses"].items() if name in steps}
    assert result["losses"].keys() - trained.keys() == {"bm25", "zero-shot"}
    for name, loss in trained.items():
        assert [run["seed"] for run in loss["runs"]] == [0, 1]
        assert {run["steps"] for run in loss["runs"]} == {steps[name]}
        scores = [run["after"]["MRR@10"] for run in loss["runs"]]
        assert loss["summary"]["MRR@10"]["mean"] == pytest.approx(sum(scores) / 2)
        assert loss["summary"]["MRR@10"]["mean"] > 0.3  # of 120 documents; by chance 0.02
        assert loss["curve"][-1]["test"] == loss["runs"][-1]["after"]
        assert [point["step"] for point in loss["curve"]] == sorted({point["step"] for point in loss["curve"]})
        if name.startswith("negative-cache"):  # from the second step on, two more documents per query
            assert loss["runs"][0]["documents_encoded"] > 2 * 144
            assert loss["runs"][0]["documents_encoded"] <= 3 * 144
        elif name == "mined":  # after an epoch, the corpus and the training queries, then up to one negative per query
            assert 144 + 120 + 72 < loss["runs"][0]["documents_encoded"] <= 144 + 120 + 72 + 72
            record = RunRecord.read(output / "runs" / loss["runs"][0]["folder"])
            assert [found["step"] for found in record.mining] == [9]
        else:
            assert loss["runs"][0]["documents_encoded"] == 144
    text = (output / "compare.md").read_text()
    assert all(f"| {name} |" in text for name in result["losses"])
    assert f"negative-cache compare --losses {losses}" in text
    untrained = result["losses"]["zero-shot"]
    scores = [run["after"]["MRR@10"] for run in untrained["runs"]]
    assert [run["seed"] for run in untrained["runs"]] == [0, 1]
    assert len(set(scores)) == 2  # each seed has other weights
    assert untrained["summary"]["MRR@10"]["mean"] == pytest.approx(sum(scores) / 2)
    model, split = load_trained(str(output / "untrained" / "seed-1")), load_data(str(data))
    assert evaluate(model, split, ("test",))["test"].metrics() == pytest.approx(
        {**untrained["runs"][1]["after"], "num_queries": 24, "num_documents": 120}
    )
    for name in ("quality-seconds.png", "quality-documents.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    assert not list(output.rglob("*.safetensors")) or all("untrained" in str(p) for p in output.rglob("*.safetensors"))

    ended = invoke("report", output, "--json")
    assert ended.exit_code == 0, ended.output
    assert json.loads(ended.stdout)["runs"] == list(trained)
    page = (output / "report.html").read_text()
    assert "MRR@10 on the test split</h3>" in page  # the curve of the last seed
    row = next(line for line in text.splitlines() if line.startswith("| negative-cache"))
    assert row.split(" | ")[-1].strip(" |") in page  # a cell of the table

    assert verdict(result) in text
    ranked = sorted(trained, key=lambda name: -result["losses"][name]["summary"]["MRR@10"]["mean"])
    assert f"To train with {ranked[0]}, the best of the losses:\n\n    negative-cache train" in text
    assert f"To train with {ranked[0]}, the best of the losses: negative-cache train" in first.stderr
    assert f"To see curves and examples: negative-cache report {output}\n" in first.stderr
    assert "To " not in first.stdout
    assert "not significant" in text
    assert "no difference" not in text
    words = shlex.split(next(line for line in text.splitlines() if line.startswith("    negative-cache train")))
    assert words[-2:] == ["--output", "MODEL"]
    ended = invoke(*words[1:-1], tmp_path / "model", "--max-steps", 1, "--json")
    assert ended.exit_code == 0, ended.output
    best = max(trained.values(), key=lambda loss: loss["summary"]["MRR@10"]["mean"])
    found = json.loads(ended.stdout)["configuration"]
    assert found["learning_rate"] == best["learning_rate"]
    assert found["batch_size"] == best["configuration"]["batch_size"]

    check_significance(output, result)

    before = {path: path.stat().st_mtime_ns for path in output.glob("runs/*/queries.json")}
    assert len(before) == 13
    again = invoke(*options(data, output, losses + ",negative-cache:shared=false", "--seeds", "2"))
    assert again.exit_code == 0, again.output
    after = {path: path.stat().st_mtime_ns for path in output.glob("runs/*/queries.json")}
    assert {path: after[path] for path in before} == before  # what was there was not run again
    assert len(after) == 15
    assert "bm25: MRR@10 test" in again.output
    changed = ["--scale", "10", "--learning-rates", "0.1,1", "--negatives", "ignore"]
    other = invoke(*options(data, output, losses), *changed)
    assert other.exit_code == 2
    said = "--scale was 20, is 10; --learning-rates was 0.05, is 0.1,1; --negatives was all, is ignore."
    assert f"has another comparison: {said} Give the same options" in " ".join(other.output.split())
    fewer = invoke(*options(data, output, "bm25,in-batch", "--seeds", "3"))
    assert fewer.exit_code == 2
    assert "so that all have the same seeds" in " ".join(fewer.output.split())
    queries = (data / "queries.jsonl").read_text()
    (data / "queries.jsonl").write_text(queries.replace('"text": "', '"text": "other ', 1))
    other = invoke(*options(data, output, losses))
    (data / "queries.jsonl").write_text(queries)
    assert other.exit_code == 2
    assert f"'{data}' has changed since it began" in " ".join(other.output.split())


def check_significance(output: Path, result: dict[str, Any]) -> None:
    """The differences are those of the measured runs, and the table and `significance` show the same."""
    for measure in ("MRR@10", "nDCG@10"):
        found = result["significance"][measure]
        assert found["num_queries"] == 24
        assert len(found["differences"]) == 21
        for name, system in found["systems"].items():
            assert system["mean"] == pytest.approx(result["losses"][name]["summary"][measure]["mean"])
    spec = "negative-cache:num_samples=2"
    runs = [str(output / "runs" / run["folder"]) for run in result["losses"][spec]["runs"]]
    untrained = ",".join(str(output / "runs" / f"zero-shot_seed-{seed}") for seed in range(2))
    ended = invoke("significance", f"zero-shot={untrained}", f"nc={','.join(runs)}", "--json")
    assert ended.exit_code == 0, ended.output
    (one,) = json.loads(ended.stdout)["measures"]["MRR@10"]["differences"]
    pairs = {(pair["system"], pair["baseline"]): pair for pair in result["significance"]["MRR@10"]["differences"]}
    same = pairs["zero-shot", spec]
    assert (one["system"], one["p"]) == ("nc", same["p"])
    assert one["difference"] == pytest.approx(-same["difference"], abs=1e-12)  # the order of a sum differs
    assert same["p_holm"] >= same["p"]
    ended = invoke("significance", output, "--metrics", "MRR@10 nDCG@10", "--json")
    assert ended.exit_code == 0, ended.output
    assert json.loads(ended.stdout)["measures"] == result["significance"]
    text = (output / "compare.md").read_text()
    assert f"| zero-shot - {spec} | {same['difference']:+.4f} |" in text
    unbeaten = set(result["losses"]) - {
        pair["baseline"] if pair["difference"] > 0 else pair["system"]
        for pair in pairs.values()
        if pair["p_holm"] < 0.05
    }
    rows = {line.split(" | ")[0][2:]: line for line in text.splitlines() if line.count("|") == 9}
    assert {name for name in result["losses"] if " *" in rows[name].split(" | ")[2]} == unbeaten
    assert rows["bm25"].split(" | ")[5:] == ["-", "0", "- |"]


def test_baselines_alone_are_compared_without_training(data: Path, tmp_path: Path):
    output = tmp_path / "out"
    ended = invoke(*options(data, output, "zero-shot,bm25"), "--json")
    assert ended.exit_code == 0, ended.output
    result = json.loads(ended.stdout)
    assert sorted(path.name for path in (output / "runs").iterdir()) == [
        "bm25", "zero-shot_seed-0", "zero-shot_seed-1", "zero-shot_seed-2"
    ]  # fmt: skip
    values = json.loads((output / "runs" / "bm25" / "queries.json").read_text())["after"]["MRR@10"]
    assert result["losses"]["bm25"]["runs"][0]["after"]["MRR@10"] == pytest.approx(sum(values.values()) / 24)
    text = (output / "compare.md").read_text()
    assert "Best: zero-shot, MRR@10" in text
    assert "No loss" not in text
    assert "negative-cache train" not in text
    assert "batch size" not in text
    assert "learning rate" not in text
    assert not list(output.glob("*.png"))
    ended = invoke("report", output)
    assert ended.exit_code == 2
    said = "Measured without training: zero-shot, bm25; compare.json has the results. To train, too: the same compare"
    assert said in " ".join(ended.stderr.split())


def test_the_report_of_an_unfinished_comparison_says_how_to_continue_it(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    output = tmp_path / "out"
    given = options(data, output, "bm25,in-batch", "--seeds", "1", "--max-steps", "1")
    ended = invoke(*given)
    assert ended.exit_code == 0, ended.output
    assert "batch size 8, 1 step, 72 pairs; 24 test queries, 120 documents" in " ".join(ended.stdout.split())
    assert "over 1 seed on the test split" in (output / "compare.md").read_text()
    path = output / "compare.json"
    result = json.loads(path.read_text())
    del result["losses"]["in-batch"]  # as if the comparison had ended after bm25
    path.write_text(json.dumps(result))
    ended = invoke("report", output)
    assert ended.exit_code == 2
    words = " ".join(ended.stderr.split())
    assert "Measured without training: bm25; compare.json has the results." in words
    assert "Not done: in-batch. To continue: negative-cache compare" in words
    ended = invoke(*shlex.split(words.partition("To continue: negative-cache ")[2]))
    assert ended.exit_code == 0, ended.output
    ended = invoke("report", output)
    assert ended.exit_code == 0
    assert "Not finished" not in caplog.text
    assert "Best: " in (output / "report.html").read_text()
    result = json.loads(path.read_text())
    result["configuration"]["losses"].append("negative-cache")  # as if the comparison had ended after in-batch
    path.write_text(json.dumps(result))
    ended = invoke("report", output)
    assert ended.exit_code == 0
    assert "Not finished, negative-cache left. If it does not run any more, the same compare command" in caplog.text
    page = (output / "report.html").read_text()
    assert "Not finished, negative-cache left" in page
    assert "Best: " not in page


def test_the_documents_of_a_comparison_are_those_that_the_test_split_is_searched_in(data: Path, tmp_path: Path):
    other = write_beir(tmp_path / "other")
    with (other / "qrels" / "test.tsv").open("a") as file:  # a query without a relevant document, which counts 0
        file.write(f"q{next(iter(DOCUMENTS))}\t{next(iter(DOCUMENTS))}\t0\n")
    ended = invoke(*options(data, tmp_path / "out", "bm25", "--test", str(other)), "--json")
    assert ended.exit_code == 0, ended.output
    result = json.loads(ended.stdout)
    assert (result["data"]["documents"], result["data"]["train_queries"]) == (80, 72)
    assert result["data"]["test_queries"] == 11
    values = json.loads((tmp_path / "out" / "runs" / "bm25" / "queries.json").read_text())["after"]["MRR@10"]
    assert len(values) == 11


@pytest.mark.parametrize(
    ("losses", "more", "message"),
    [
        ("in-batch,unknown", [], "unknown"),
        ("in-batch,in-batch", [], "none twice"),
        ("bm25:batch_size=3", [], "bm25 is not trained and has no settings"),
        ("negative-cache:cache_sise=3", [], "field=value"),
        ("negative-cache:cache_size=many", [], "must be int"),
        ("negative-cache:shared=maybe", [], "must be bool"),
        ("negative-cache:learning_rate=3", [], "field=value"),
        ("in-batch:epochs=0", [], "--epochs is 0.0; it must be positive"),
        ("in-batch:epochs=3", ["--max-steps", "9"], "epochs have no effect with --max-steps"),
        ("in-batch", ["--load-best-model-at-end"], "--load-best-model-at-end needs --eval-steps"),
        ("in-batch", ["--early-stopping-patience", "2"], "needs --load-best-model-at-end"),
        ("in-batch", ["--seeds", "0"], "must be positive"),
        ("in-batch", ["--learning-rates", "0.1,fast"], "expected numbers"),
        ("in-batch", ["--learning-rates", "0.1,0.05"], "in increasing order"),
    ],
)
def test_invalid_options_are_refused_up_front(losses: str, more: list[str], message: str, data: Path, tmp_path: Path):
    ended = invoke(*options(data, tmp_path / "out", losses), *more)
    assert ended.exit_code == 2
    assert message in " ".join(ended.output.split())
    assert not (tmp_path / "out").exists()


def test_a_failed_run_does_not_end_the_comparison(data: Path, tmp_path: Path):
    output = tmp_path / "out"
    given = [*options(data, output, "negative-cache", "--seeds", "1"), "--learning-rates", "0.05,1e38"]
    ended = invoke(*given)
    assert ended.exit_code == 0, ended.output
    assert "rate 1e+38, seed 0: failed: Training failed after step" in " ".join(ended.output.split())
    loss = json.loads((output / "compare.json").read_text())["losses"]["negative-cache"]
    assert loss["learning_rate"] < 1  # the best rate is an edge, and lower ones were tried
    assert loss["sweep"][-1]["failed"]
    assert len(loss["runs"]) == 1
    text = (output / "compare.md").read_text()
    assert "- negative-cache, rate 1e+38, seed 0: Training failed" in text
    again = invoke(*given)
    assert "(already done)" in again.output

    output = tmp_path / "none"
    ended = invoke(*options(data, output, "negative-cache"), "--learning-rates", "1e38")
    assert ended.exit_code == 1
    assert "Training failed in every run" in " ".join(ended.stderr.split())
    ended = invoke("report", output)
    assert ended.exit_code == 2
    assert (
        f"{output} has no loss with finished runs to report. Finished: 1 training run of losses that are not complete. "
        "Training failed with negative-cache: try other --learning-rates, with another --output."
    ) in " ".join(ended.stderr.split())


def test_a_folder_with_other_content_is_not_touched(data: Path, tmp_path: Path):
    (tmp_path / "mine.txt").write_text("keep")
    ended = invoke(*options(data, tmp_path, "in-batch"))
    assert ended.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_without_a_dev_split_some_training_queries_are_held_out(data: Path, tmp_path: Path):
    for path in (*data.glob("*.jsonl"), *data.glob("qrels/t*.tsv")):
        target = tmp_path / "data" / path.relative_to(data)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    ended = invoke(*options(tmp_path / "data", tmp_path / "out", "in-batch", "--seeds", "1"), "--json")
    assert ended.exit_code == 0, ended.output
    assert "data has no dev split: 3 of its 72 training queries are held out" in " ".join(ended.stderr.split())
    result = json.loads(ended.stdout)
    assert (result["data"]["train_queries"], result["data"]["dev_queries"]) == (69, 3)
    assert result["losses"]["in-batch"]["runs"][0]["dev"]["num_queries"] == 3
    assert result["significance"] == {}


def record(score: float, seconds: float = 1.0) -> RunRecord:
    metrics = {"MRR@10": score, "nDCG@10": score, "R@100": score}
    return RunRecord(
        configuration={}, versions={}, device="cpu", threads=1, ranks=1, steps=1, resumed_from_step=0,
        training_pairs=1, seconds=seconds, documents_encoded=3, peak_memory_bytes=4, after=metrics, dev=metrics,
        curve=[], data_fingerprint="", history=[],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("scores", "p", "said"),
    [
        (
            {"a": [0.50, 0.52], "b": [0.40, 0.42]},
            0.001,
            "Best: a, MRR@10 0.5100, 24.4% above b (0.4100). In MRR@10, it is significantly better than b (p = 0.001).",
        ),
        (
            {"a": [0.40, 0.42], "b": [0.50, 0.52]},
            0.2,
            "Best: b, MRR@10 0.5100, 24.4% above a (0.4100). "
            "In MRR@10, it is not significantly better than a (p = 0.2).",
        ),
        (
            {"a": [0.50], "b": [0.40]},
            0.00001,
            "Best: a, MRR@10 0.5000, 25.0% above b (0.4000). "
            "In MRR@10, it is significantly better than b (p < 0.0001). One seed "
            "does not show how much training varies.",
        ),
        (
            {"a": [0.40, 0.42], "bm25": [0.50]},
            0.001,
            "Best: bm25, MRR@10 0.5000, 22.0% above a (0.4100). "
            "In MRR@10, it is significantly better than a (p = 0.001). No loss is "
            "above bm25; the best one is a, 0.4100.",
        ),
        (
            {"a": [0.40, 0.42], "zero-shot": [0.30]},
            0.001,
            "Best: a, MRR@10 0.4100, 36.7% above zero-shot (0.3000). "
            "In MRR@10, it is significantly better than zero-shot (p = 0.001).",
        ),
        ({"a": [0.50, 0.52], "b": []}, 1, ""),
    ],
)
def test_the_verdict_names_the_best_loss_its_lead_and_whether_it_is_significant(
    scores: dict[str, list[float]], p: float, said: str
):
    losses = {}
    for name, values in scores.items():
        runs = [record(value) for value in values]
        losses[name] = {"runs": runs, "summary": summary(runs) if runs else None}
    first, second = scores
    lead = sum(scores[second]) - sum(scores[first])
    pair = {"system": second, "baseline": first, "difference": lead, "low": -1, "high": 1, "p": p / 2, "p_holm": p}
    shared = {"losses": losses, "significance": {"MRR@10": {"differences": [pair]}}}
    result = {**shared, "learning_rates": [0.1, 0.2], "configuration": {"model": "x/y", "losses": list(losses)}}
    assert verdict(result) == said
    assert ("and each may have a better one" in verdict({**result, "learning_rates": [0.1]})) == (
        set(scores) == {"a", "b"} and bool(said)
    )
    distilled = verdict({**result, "configuration": {"model": "static:x/y", "losses": list(losses)}})
    assert ("zero-shot: the static model made from x/y, not x/y itself." in distilled) == ("zero-shot" in scores)


def test_the_verdict_names_all_that_the_best_loss_was_compared_with():
    means = {"c": 0.4, "a": 0.5, "d": 0.1, "b": 0.49}
    losses = {
        name: {"runs": [record(mean)] * 2, "summary": summary([record(mean)] * 2)} for name, mean in means.items()
    }
    pairs = [("a", "b", 0.2), ("b", "c", 0.03), ("a", "c", 0.03), ("d", "a", 0.0), ("d", "b", 0.0), ("d", "c", 0.0)]
    tested = [
        {"system": x, "baseline": y, "difference": means[x] - means[y], "low": -1, "high": 1, "p": p, "p_holm": p}
        for x, y, p in pairs
    ]
    result = {
        "losses": losses,
        "significance": {"MRR@10": {"differences": tested}},
        "learning_rates": [0.1, 0.2],
        "configuration": {"model": "x/y", "losses": list(losses)},
    }
    said = "In MRR@10, it is significantly better than c (p = 0.03) and d (p < 0.0001), but not significantly better "
    assert verdict(result) == f"Best: a, MRR@10 0.5000, 2.0% above b (0.4900). {said}than b (p = 0.2)."


@pytest.mark.parametrize(
    ("scores", "extended"),
    [
        ([1, 3, 2], []),
        ([1, 2, 3], [0.8, 1.6]),  # still increasing after two more
        ([3, 2, 1], [0.05, 0.025]),
        ([2], []),
    ],
)
def test_the_sweep_is_extended_while_the_best_rate_is_at_its_edge(scores: list[float], extended: list[float]):
    sweep = {0.1 * 2**n: record(score) for n, score in enumerate(scores)}
    found = []
    for rate in extensions(sweep):
        found.append(rate)
        sweep[rate] = record(max(scores) + len(found))
    assert found == pytest.approx(extended)


def test_of_equally_good_rates_the_smallest_one_is_chosen():
    assert best_rate({0.2: record(1.0), 0.1: record(1.0), 0.4: record(0.5)}) == 0.1


def test_the_spread_is_the_sample_standard_deviation():
    found = summary([record(0.1, 1), record(0.3, 2), record(0.2, 3)])
    assert found["MRR@10"] == {"mean": pytest.approx(0.2), "std": pytest.approx(0.1)}
    assert found["seconds"]["mean"] == 2
    assert summary([record(0.1)])["MRR@10"]["std"] is None


def test_configurations_differ_only_in_the_loss_and_its_settings():
    comparison = Comparison("d", "static", ("in-batch", "gradcache", "negative-cache:refresh_per_step=4"), "out")
    plain, large, refreshed = (comparison.config(name) for name in comparison.losses)
    assert large == replace(plain, loss="gradcache", batch_size=16 * plain.batch_size)
    assert refreshed == replace(plain, loss="negative-cache", refresh_per_step=4)
    assert comparison.rates() == [0.02, 0.05, 0.125]


def test_only_the_untrained_model_of_a_seed_is_measured_for_each_seed():
    found = {}
    for model in ("static", "org/pretrained"):
        comparison = Comparison("d", model, ("bm25",), "out", seeds=2)
        for name in BASELINES:
            baselines = Baseline.all_of(comparison, name)
            found[model, name] = [(one.seed, one.model, one.output.name) for one in baselines]
    assert found["org/pretrained", "zero-shot"] == [(None, "org/pretrained", "zero-shot")]
    assert found["static", "zero-shot"] == [
        (seed, str(Path("out/untrained", f"seed-{seed}")), f"zero-shot_seed-{seed}") for seed in range(2)
    ]
    assert [len(found[model, "bm25"]) for model in ("static", "org/pretrained")] == [1, 1]


def test_identical_ids_are_ignored_in_every_run_and_in_the_command_of_the_best():
    comparison = Comparison("d", "static", ("in-batch",), "out", data_options=DataOptions(ignore_identical_ids=True))
    config = comparison.run_config("in-batch", 0.1, 0)
    assert config.data_options.ignore_identical_ids
    runs = [record(0.5)]
    loss = {"configuration": asdict(config), "learning_rate": 0.1, "runs": runs, "summary": summary(runs)}
    command = command_of_best({"configuration": asdict(comparison), "losses": {"in-batch": loss}})
    assert "--ignore-identical-ids" in shlex.split(command)
    with pytest.raises(RunError, match="field=value"):
        Comparison("d", "static", ("in-batch:ignore_identical_ids=true",), "out")
    assert parse_rates("0.1, 0.2") == (0.1, 0.2)
    with pytest.raises(RunError, match="positive"):
        Comparison("d", "static", ("in-batch",), "out", gradcache_factor=0)


def test_each_loss_gets_the_options_that_have_an_effect():
    losses = ("in-batch", "memory-bank", "negative-cache")
    given = Comparison("d", "static", losses, "o", cache_size=99, num_samples=3)
    found = [given.config(spec) for spec in given.losses]
    assert [config.cache_size for config in found] == [16_384, 99, 99]
    assert [config.num_samples for config in found] == ["auto", "auto", 3]


def test_the_number_of_steps_is_that_of_equally_many_queries_and_is_in_the_command_of_the_best():
    comparison = Comparison(
        data="d",
        model="tiny",
        losses=("in-batch", "gradcache"),
        output="o",
        batch_size=8,
        max_steps=40,
        weight_decay=0.1,
    )
    configs = [comparison.config(name) for name in comparison.losses]
    assert [(config.batch_size, config.max_steps) for config in configs] == [(8, 40), (128, 3)]
    assert {config.weight_decay for config in configs} == {0.1}
    loss = {"runs": [{}], "learning_rate": 0.1, "summary": {"MRR@10": {"mean": 0.5}}}
    result = {
        "losses": {"in-batch": {**loss, "configuration": asdict(configs[0])}},
        "configuration": asdict(comparison),
    }
    command = command_of_best(result)
    assert "--max-steps 40" in command
    assert "--weight-decay 0.1" in command
    with pytest.raises(RunError, match="--max-steps is 0; it must be positive"):
        replace(comparison, max_steps=0)


def test_a_loss_may_train_longer_than_the_others(data: Path, tmp_path: Path):
    output = tmp_path / "out"
    ended = invoke(*options(data, output, "in-batch,in-batch:epochs=4,negative-cache", "--seeds", "1"), "--json")
    assert ended.exit_code == 0, ended.output
    losses = json.loads(ended.stdout)["losses"]
    assert [loss["runs"][0]["steps"] for loss in losses.values()] == [18, 36, 18]
    assert [loss["runs"][0]["documents_encoded"] for loss in losses.values()][:2] == [144, 288]
    assert "| in-batch:epochs=4 | 0.05 |" in (output / "compare.md").read_text()
    best = {"losses": {"in-batch:epochs=4": losses["in-batch:epochs=4"]}, "configuration": asdict(comparison_of(data))}
    assert "--epochs 4" in command_of_best(best)


def comparison_of(data: Path) -> Comparison:
    return Comparison(str(data), "static", ("in-batch",), "out", batch_size=8, epochs=2, cache_size=64)


def test_each_loss_keeps_its_best_model_and_stops_early(data: Path, tmp_path: Path):
    given = ["--eval-steps", "2", "--load-best-model-at-end", "--early-stopping-patience", "2", "--seeds", "1"]
    given += ["--gradcache-factor", "3"]
    output = tmp_path / "out"
    ended = invoke(*options(data, output, "in-batch,gradcache", *given), "--epochs", "40", "--json")
    assert ended.exit_code == 0, ended.output
    for loss, every in zip(json.loads(ended.stdout)["losses"].values(), (2, 1), strict=True):
        (run,) = loss["runs"]
        record = RunRecord.read(output / "runs" / run["folder"])
        found = {row["step"]: row[key] for row in record.history for key in row if key == "eval_dev_cosine_mrr@10"}
        assert list(found) == list(range(every, record.steps + 1, every))
        assert record.best_step == max(found, key=found.get)
        assert record.steps == record.best_step + 2 * every
        assert record.steps < 40 * 3
        assert record.dev["MRR@10"] == pytest.approx(found[record.best_step])
        assert record.documents_encoded == record.steps * record.configuration["batch_size"]  # none in evaluations
        steps = [point["step"] for point in loss["curve"]]
        assert steps == sorted(set(steps))
        assert loss["curve"][-1]["test"] == record.after
    words = shlex.split(command_of_best(json.loads(ended.stdout)))
    assert "--load-best-model-at-end" in words
    assert words[words.index("--early-stopping-patience") + 1] == "2"
