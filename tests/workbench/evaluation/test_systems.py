from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from negative_cache.workbench.data import RetrievalData
from negative_cache.workbench.data.texts import Texts
from negative_cache.workbench.evaluation import judge, parse_measures
from negative_cache.workbench.evaluation.defaults import COMPARISON
from negative_cache.workbench.evaluation.systems import PER_QUERY, corpus_of, parse_systems, read_systems
from negative_cache.workbench.evaluation.trec import read_run, write_run

MEASURES = parse_measures("MRR@10 R@1")
QRELS = {"q": {"a": 1.0}, "r": {"b": 2.0}, "s": {"c": 1.0}}


def judge_run(path: Path) -> dict[str, dict[str, float]]:
    return judge(QRELS, read_run(path), MEASURES)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs of train, a file of evaluate, and two TREC runs, in the working directory."""
    values = {"MRR@10": {"q": 1.0, "r": 0.5, "s": 0.0}, "R@1": {"q": 1.0, "r": 0.0, "s": 0.0}, "AP": {"q": 1.0}}
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    (tmp_path / "first" / PER_QUERY).write_text(
        json.dumps({"before": values, "after": {**values, "R@1": {"q": 1.0, "r": 1.0, "s": 0.0}}})
    )
    (tmp_path / "second" / PER_QUERY).write_text(json.dumps({"after": values}))
    (tmp_path / "evaluated.json").write_text(json.dumps(values, indent=2))
    write_run(tmp_path / "bm25.run.gz", {"q": {"a": 2.0, "b": 1.0}, "r": {"a": 2.0, "b": 1.0}})
    write_run(tmp_path / "x=1.txt", {"other": {"a": 2.0}})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_systems_are_named_by_their_files_or_as_given(runs: Path):
    found = parse_systems(["first", "mine = first, second", "bm25.run.gz", "x=1.txt", "evaluated.json"])
    assert list(found) == ["first", "mine", "bm25", "x=1", "evaluated"]
    assert found["mine"] == [Path("first", PER_QUERY), Path("second", PER_QUERY)]
    assert list(parse_systems([f"second/{PER_QUERY}"])) == ["second"]
    assert list(parse_systems(["first/../second"])) == ["second"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["first", "absent"], "'absent' does not exist"),
        (["a=first,absent"], "'absent' does not exist"),
        (["first", "first/queries.json"], "Two systems have the name 'first'"),
        (["a=first,second,first/queries.json"], "The system 'a' has the run first twice"),
        (["unfinished"], "unfinished has results of fewer than two losses"),
        (["damaged"], "damaged/compare.json is damaged: expected an object, got list"),
    ],
)
def test_unknown_paths_and_equal_names_are_refused(texts: list[str], message: str, runs: Path):
    losses = {"in-batch": {"runs": []}, "bm25": {"runs": [{"folder": "bm25"}]}}
    for folder, content in (("unfinished", {"losses": losses}), ("damaged", [])):
        (runs / folder).mkdir()
        (runs / folder / COMPARISON).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        parse_systems(texts)


def test_a_comparison_stands_for_its_losses(runs: Path):
    losses = {
        "bm25": {"runs": [{"folder": "bm25"}]},
        "in-batch": {"runs": []},
        "nc:shared=false": {"runs": [{"folder": "0"}, {"folder": "1"}]},
    }
    (runs / "all").mkdir()
    (runs / "all" / COMPARISON).write_text(json.dumps({"losses": losses}))
    assert parse_systems(["first", "all"]) == {
        "first": [Path("first", PER_QUERY)],
        "bm25": [Path("all/runs/bm25", PER_QUERY)],
        "nc:shared=false": [Path("all/runs/0", PER_QUERY), Path("all/runs/1", PER_QUERY)],
    }
    with pytest.raises(ValueError, match=r"all is a comparison\. Give it without a name"):
        parse_systems(["first", "mine=all"])


def test_runs_with_other_queries_are_named(runs: Path):
    (runs / "other.json").write_text('{"R@1": {"q": 1, "r": 0, "t": 0}}')
    for texts in (["second", "a=evaluated.json,other.json"], ["a=second,other.json", "evaluated.json"]):
        message = (
            r"'other.json' lacks 1 query \('s'\) of '\S+' and has 1 query \('t'\) that 'second/queries.json' lacks"
        )
        with pytest.raises(ValueError, match=message):
            read_systems(parse_systems(texts), parse_measures("R@1"))
    (runs / "other.json").write_text('{"before": {"R@1": {"q": 1, "r": 0}}, "after": {"R@1": {"q": 1}}}')
    with pytest.raises(ValueError, match=r"'other\.json, after training' lacks 1 query"):
        read_systems(parse_systems(["other.json"]), parse_measures("R@1"))


def test_values_of_different_corpora_are_refused(runs: Path):
    data = RetrievalData("a", {"a": "x", "b": "y"}, {"q": "x"}, {"test": {"q": ["a"]}})
    reordered = replace(data, corpus=Texts.of({"2": "y", "1": "x"}))
    larger = replace(data, corpus=Texts.of({"a": "x", "b": "y", "c": "z"}))
    values = json.loads(Path("evaluated.json").read_text())
    for name, of in (("same", data), ("reordered", reordered), ("larger", larger)):
        Path(name).write_text(json.dumps({"corpus": corpus_of(of, "test"), **values}))
    found = read_systems(parse_systems(["same", "reordered", "second", "bm25.run.gz"]), MEASURES, judge_run)
    assert found["same"] == found["reordered"] == [{name: values[name] for name in MEASURES}]
    message = "same is of a corpus of 2 documents, larger of another one of 3. .*--eval-documents of the other"
    with pytest.raises(ValueError, match=message):
        read_systems(parse_systems(["second", "same", "larger"]), MEASURES)


def test_values_are_read_or_judged_for_each_seed(runs: Path):
    found = read_systems(parse_systems(["both=second,evaluated.json", "bm25.run.gz"]), MEASURES, judge_run)
    assert found == {
        "both": [{"MRR@10": {"q": 1, "r": 0.5, "s": 0}, "R@1": {"q": 1, "r": 0, "s": 0}}] * 2,
        "bm25": [{"MRR@10": {"q": 1, "r": 0.5, "s": 0}, "R@1": {"q": 1, "r": 0, "s": 0}}],  # s has no results
    }


def test_a_single_run_is_compared_with_itself_before_training(runs: Path):
    found = read_systems(parse_systems(["first"]), MEASURES)
    assert list(found) == ["before", "after"]
    assert found["before"][0]["R@1"] == {"q": 1, "r": 0, "s": 0}
    assert found["after"][0]["R@1"] == {"q": 1, "r": 1, "s": 0}


@pytest.mark.parametrize(
    ("texts", "metrics", "message"),
    [
        (["second"], "R@1", "second/queries.json has no values of the model before training"),
        (["evaluated.json"], "R@1", "has the values of one system"),
        (["bm25.run.gz"], "R@1", "Only one system is given, 'bm25'"),
        (["first", "second"], "nDCG@10", "first/queries.json has no nDCG@10. It has MRR@10, R@1, AP"),
        (["first", "empty"], "R@1", "empty has no queries.json"),
        (["first", "damaged.json"], "R@1", "damaged.json is damaged"),
        (["first", "texts.json"], "R@1", "expected a number for each query in 'R@1'"),
    ],
)
def test_files_that_cannot_be_compared_are_refused(texts: list[str], metrics: str, message: str, runs: Path):
    (runs / "empty").mkdir()
    (runs / "damaged.json").write_text('{"R@1": ')
    (runs / "texts.json").write_text('{"R@1": {"q": "high"}}')
    with pytest.raises(ValueError, match=message):
        read_systems(parse_systems(texts), parse_measures(metrics), judge_run)


def test_search_results_need_judgements(runs: Path):
    with pytest.raises(ValueError, match="Give --data with their judgements"):
        read_systems(parse_systems(["first", "bm25.run.gz"]), MEASURES)
