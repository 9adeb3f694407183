from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from command_line import invoke
from negative_cache.workbench.evaluation.trec import write_run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Judgements of 40 queries, and runs whose first document is relevant for 5, 30 and 32 of them; and a seed more."""
    (tmp_path / "qrels").mkdir()
    ids = [f"{n:02d}" for n in range(40)]
    for name, letter in (("corpus", "d"), ("queries", "q")):
        rows = (json.dumps({"_id": letter + number, "text": f"text {number}"}) for number in ids)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    rows = ["query-id\tcorpus-id\tscore", *(f"q{number}\td{number}\t1" for number in ids)]
    (tmp_path / "qrels" / "test.tsv").write_text("\n".join(rows))
    for name, hits in {"weak": 5, "good": 30, "better": 32, "seed": 32}.items():
        order = random.Random(name).sample(ids, len(ids))
        run = {f"q{n}": {f"d{n}": 1.0} for n in order[:hits]}
        write_run(tmp_path / f"{name}.run", run)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_pair_is_shown_with_its_difference_and_a_sentence(folder: Path):
    ended = invoke("significance", "weak.run", "good.run", "top=better.run,seed.run", "--data", folder)
    assert ended.exit_code == 0, ended.output
    text = " ".join(ended.stdout.split())
    assert "40 queries" in text
    assert "good.run: Judged queries without results in the run: 10 of 40" in " ".join(ended.stderr.split())
    assert "top - weak" in text
    assert "+0.6750" in text
    assert "0.8000 ± 0.0000" in text
    assert "MRR@10: top is better than weak by 0.6750 (95 % interval" in text
    assert "MRR@10: No significant difference between top and good (p =" in text
    assert "weak and" not in text  # sentences are about the best system


def test_the_baseline_and_the_measures_are_chosen(folder: Path):
    given = ["significance", "weak.run", "good.run", "better.run", "--data", folder, "--json", "--metrics", "r@1"]
    ended = invoke(*given, "--baseline", "good")
    assert ended.exit_code == 0, ended.output
    found = json.loads(ended.stdout)["measures"]
    assert list(found) == ["R@1"]
    weak, better = found["R@1"]["differences"]
    assert (weak["system"], weak["baseline"], weak["difference"]) == ("weak", "good", pytest.approx(-0.625))
    assert weak["high"] < 0
    assert weak["p_holm"] < 0.05 < better["p_holm"]
    every = json.loads(invoke(*given).stdout)["measures"]["R@1"]["differences"]
    assert len(every) == 3
    ended = invoke(*given[:-3], "--baseline", "good", "--alpha", "1e-9")
    assert "No significant difference between weak and good" in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["weak.run", "good.run"], "Give --data with their judgements"),
        (
            ["weak.run", "good.run", "--data", ".", "--baseline", "best"],
            "--baseline is 'best'; expected one of weak, good",
        ),
        (["weak.run", "good.run", "--data", ".", "--alpha", "5"], "--alpha is 5; expected a number between 0 and 1"),
        (["weak.run", "good.run", "--data", ".", "--metrics", "nope"], "The measure 'nope' is unknown"),
        (["weak.run", "good.run", "--data", ".", "--split", "dev"], "no queries in the split 'dev'"),
        (["weak.run", "good.run", "--split", "dev"], "have no effect without --data"),
        (["values.json", "b=values.json", "--data", "."], "--data has no effect"),
        (["weak.run", "none.run", "--data", "."], "'none.run' does not exist"),
        (["weak.run", "other.run", "--data", "."], "other.run: The run has no query of"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments: list[str], message: str, folder: Path):
    write_run(folder / "other.run", {"other": {"d00": 1.0}})
    (folder / "values.json").write_text('{"R@1": {"q": 1}}')
    ended = invoke("significance", *arguments)
    assert ended.exit_code == 2, ended.output
    assert message in " ".join(ended.stderr.split())
