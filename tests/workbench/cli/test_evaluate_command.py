"""`evaluate` and `search`: what they judge, write and refuse."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import ir_measures
import pytest

from command_line import DOCUMENTS, invoke, write_beir
from negative_cache.workbench.data import load_data
from negative_cache.workbench.evaluation import evaluate
from negative_cache.workbench.models import load_model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, graded, with a query that is not searched well, and a model."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_beir(folder / "set")
    with (folder / "set" / "qrels" / "test.tsv").open("a") as qrels:
        qrels.write("qd70\td1\t3\nqd70\td2\t0\nqd71\td5\t2\n")
    load_model("static", DOCUMENTS.values(), seed=0).save_pretrained(str(folder / "model"))
    with (folder / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["query", "positive"], *([" ".join(text.split()[1:5]), text] for text in DOCUMENTS.values())]
        )
    return folder


def run(*args: object) -> Any:
    ended = invoke("evaluate", "--json", *args)
    assert ended.exit_code == 0, ended.output
    return json.loads(ended.stdout)


def test_a_run_that_evaluate_writes_is_judged_alike_by_it_and_by_ir_measures(place: Path, tmp_path: Path):
    model = ["--model", place / "model", "--data", place / "set", "--metrics", "ndcg@5,map mrr@3 P(rel=2)@5"]
    outputs = ["--run-out", tmp_path / "run.gz", "--qrels-out", tmp_path / "qrels", "--per-query", tmp_path / "each"]
    found = run(*model, *outputs)
    assert list(found) == ["nDCG@5", "AP", "MRR@3", "P(rel=2)@5", "num_queries", "num_documents"]
    assert 0 < found["AP"] < 1
    assert (found["num_queries"], found["num_documents"]) == (10, 80)
    again = run("--run", tmp_path / "run.gz", "--data", place / "set", *model[4:], "--per-query", tmp_path / "again")
    assert again == found
    assert (tmp_path / "again").read_text() == (tmp_path / "each").read_text()

    names = {"nDCG@5": ir_measures.nDCG @ 5, "AP": ir_measures.AP, "P(rel=2)@5": ir_measures.P(rel=2) @ 5}
    qrels = list(ir_measures.read_trec_qrels(str(tmp_path / "qrels")))
    assert sum(row.relevance > 0 for row in qrels) == 12
    rows = list(ir_measures.read_trec_run(str(tmp_path / "run.gz")))
    assert ir_measures.calc_aggregate(names.values(), qrels, rows) == pytest.approx(
        {measure: found[name] for name, measure in names.items()}
    )
    each = json.loads((tmp_path / "each").read_text())
    assert each.pop("corpus")["num_documents"] == 80
    assert {name: sum(values.values()) / 10 for name, values in each.items()} == pytest.approx(
        {name: found[name] for name in each}
    )


def test_queries_and_documents_that_a_run_lacks_count_0_and_are_said(place: Path, tmp_path: Path):
    lines = ["qd70 Q0 d70 1 3 x", "qd70 Q0 unknown 2 2 x", "qd71 Q0 d3 1 1 x", "other Q0 d3 1 1 x"]
    (tmp_path / "run").write_text("\n".join(lines) + "\n")
    given = ["evaluate", "--run", tmp_path / "run", "--data", place / "set"]
    ended = invoke(*given, "--metrics", "MRR", "--json")
    assert json.loads(ended.stdout)["MRR"] == pytest.approx(0.1)
    assert "Queries of the run without judgements: 1 of 3, such as 'other'. They are not used." in ended.stderr
    assert "Judged queries without results in the run: 8 of 10, such as 'qd72'. They count 0." in ended.stderr
    unknown = "Documents of the run that the corpus lacks: 1 of 3, such as 'unknown'. They count as not relevant."
    assert unknown in ended.stderr
    for line, missing in (("qd Q0 d70 1 3 x", "query"), ("qd70 Q0 D70 1 3 x", "document")):
        (tmp_path / "run").write_text(line)
        ended = invoke(*given)
        assert ended.exit_code == 2
        assert f"The run has no {missing} of set, test: it has ids such as" in ended.stderr


def test_a_run_is_not_overwritten(place: Path, tmp_path: Path):
    (tmp_path / "run").write_text("qd70 Q0 d70 1 3 x\n")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for output in ("run", "link"):
        given = ["--run", tmp_path / "run", "--data", place / "set", "--run-out", tmp_path / output]
        ended = invoke("evaluate", *given)
        assert ended.exit_code == 2
        assert "--run-out and --run are the same file" in ended.stderr
    assert (tmp_path / "run").read_text() == "qd70 Q0 d70 1 3 x\n"


def test_documents_with_the_id_of_the_query_are_left_out_of_a_run(tmp_path: Path):
    write_beir(tmp_path / "set")
    with (tmp_path / "set" / "corpus.jsonl").open("a") as corpus:
        corpus.write(json.dumps({"_id": "qd70", "text": "the query"}) + "\n")
    (tmp_path / "run").write_text("qd70 Q0 qd70 1 9 x\nqd70 Q0 d70 1 3 x\n")
    given = ["--run", tmp_path / "run", "--data", tmp_path / "set", "--metrics", "MRR"]
    assert run(*given)["MRR"] == pytest.approx(0.05)
    assert run(*given, "--ignore-identical-ids")["MRR"] == pytest.approx(0.1)


def test_rows_without_splits_are_all_evaluated_and_this_is_said(place: Path):
    given = ["--model", place / "model", "--data", place / "pairs.csv"]
    ended = invoke("evaluate", *given, "--json")
    assert json.loads(ended.stdout)["num_queries"] == 80
    said = f"Measured on all 80 pairs of {place / 'pairs.csv'}. --split test measures the tenth that"
    assert ended.stderr.count(said) == 1
    held_out = invoke("evaluate", *given, "--split", "test", "--json")
    assert 0 < json.loads(held_out.stdout)["num_queries"] < 40
    assert "Measured" not in held_out.stderr
    assert run("--model", place / "model", "--data", place / "set")["num_queries"] == 10


def test_a_model_is_evaluated_on_what_its_training_held_out(place: Path, tmp_path: Path):
    """Also if it was trained further with other data, if the file is a copy, or if rows were added to the file."""

    def train(output: str, *args: object) -> Path:
        steps = ["--max-steps", 1, "--batch-size", 8, "--loss", "in-batch", "--report-to", "none"]
        ended = invoke("train", "--output", tmp_path / output, *steps, *args)
        assert ended.exit_code == 0, ended.output
        return tmp_path / output

    def sizes(model: Path, data: Path) -> tuple[int, str]:
        ended = invoke("evaluate", "--model", model, "--data", data, "--json")
        return json.loads(ended.stdout)["num_queries"], ended.stderr

    pairs, copied, longer = place / "pairs.csv", tmp_path / "copied.csv", tmp_path / "longer.csv"
    for path in (copied, longer):
        path.write_bytes(pairs.read_bytes())
    held_out = run("--model", place / "model", "--data", pairs, "--split", "test")["num_queries"]
    trained = train("trained", "--data", longer, "--model", place / "model")
    further = train("further", "--data", place / "set", "--model", trained)
    for model in (trained, further):
        number, said = sizes(model, copied)
        assert number == held_out
        assert f"Measured on the test split of {copied}, {held_out} of its 80 pairs, because {model} was" in said
    assert sizes(place / "model", copied)[0] == sizes(trained, place / "set")[0] + 70 == 80
    with longer.open("a") as file:
        file.write("".join(f"a new query {number},a new document {number}\n" for number in range(40)))
    number, said = sizes(trained, longer)
    assert held_out < number < 40
    assert f"{number} of its 120 pairs" in said


def test_a_file_whose_pairs_were_all_trained_with_gives_a_warning(place: Path, tmp_path: Path):
    given = ["--data", place / "pairs.csv", "--test", place / "set", "--model", place / "model", "--max-steps", 1]
    ended = invoke("train", *given, "--output", tmp_path / "trained", "--loss", "in-batch", "--report-to", "none")
    assert ended.exit_code == 0, ended.output
    given = ["--model", tmp_path / "trained", "--data", place / "pairs.csv"]
    ended = invoke("evaluate", *given, "--json")
    assert json.loads(ended.stdout)["num_queries"] == 80
    assert "Warning: Measured on all 80 pairs of" in ended.stderr
    assert "Measured" not in invoke("evaluate", *given, "--test", place / "set").stderr


def test_options_of_the_encoding_reach_the_model(place: Path):
    given = ["--model", place / "model", "--data", place / "set"]
    options = ["--query-prompt", "apple ", "--document-prompt", "river ", "--truncate-dim", 8, "--batch-size", 7]
    found = run(*given, *options, "--dtype", "float32", "--device", "cpu")
    assert found["MRR@10"] < run(*given)["MRR@10"]
    model, data = load_model(str(place / "model"), [], 0), load_data(str(place / "set"))
    model.prompts, model.truncate_dim = {"query": "apple ", "document": "river "}, 8
    assert found == pytest.approx(evaluate(model, data, ("test",))["test"].metrics(), abs=1e-6)
    ended = invoke("search", *given, *options, "-n", 1, "--json", "river breaks")
    prompted = model.similarity(model.encode_query("river breaks"), model.encode_document(list(data.corpus.values())))
    assert json.loads(ended.stdout)[0]["documents"][0]["score"] == pytest.approx(float(prompted.max()), abs=1e-6)


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"])
@pytest.mark.parametrize("option", ["--run-out", "--qrels-out", "--per-query"])
def test_the_data_are_not_overwritten(option: str, name: str, place: Path):
    before = (place / "set" / name).read_bytes()
    ended = invoke("evaluate", "--model", "m", "--data", place / "set", option, place / "set" / name)
    assert ended.exit_code == 2
    assert "would be overwritten" in " ".join(ended.stderr.split())
    assert (place / "set" / name).read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "m"], "Give --model and --data; or --run and --data for a TREC run; or --model and --nanobeir."),
        (["--model", "m", "--data", "d", "--run", "r"], "Got --data and --model and --run."),
        ([], "Got none of them."),
        (
            ["--data", "d", "--model", "m", "--run-out", "x", "--qrels-out", "x"],
            "--qrels-out and --run-out are the same",
        ),
        (["--data", "d", "--run", "r", "--dtype", "float16"], "--dtype has no effect with --run"),
        (["--data", "d", "--run", "nowhere"], "--run nowhere is not a file. Give a TREC run"),
        (["--model", "m", "--nanobeir", "nq", "--split", "dev"], "--split has no effect with --nanobeir"),
        (["--model", "m", "--nanobeir", "nq", "--corpus", "c"], "options of --data have no effect"),
        (["--model", "m", "--nanobeir", "nq", "--device", "cpu,cpu"], "--nanobeir runs on one device"),
        (["--model", "m", "--nanobeir", "trec"], "no dataset of NanoBEIR"),
        (["--model", "m", "--data", "d", "--metrics", "R"], "needs a cut-off, such as R@10"),
        (["--model", "m", "--data", "d", "--metrics", ""], "No measure is given"),
        (["--model", "m", "--data", "d", "--batch-size", 0], "--batch-size is 0"),
        (["--model", "m", "--data", "d", "--per-query", "."], "--per-query . cannot be written"),
        (["--model", "m", "--data", "d", "--run-out", "no/where"], "--run-out no/where cannot be written"),
    ],
)
def test_options_that_cannot_be_used_are_refused_before_anything_is_read(options: list[str], message: str):
    ended = invoke("evaluate", *options)
    assert ended.exit_code == 2, ended.output
    assert message in ended.stderr


def test_ids_that_a_trec_file_cannot_contain_are_refused_before_the_search(place: Path, tmp_path: Path):
    write_beir(tmp_path / "set")
    with (tmp_path / "set" / "corpus.jsonl").open("a") as corpus:
        corpus.write(json.dumps({"_id": "a b", "text": "a text"}) + "\n")
    (tmp_path / "empty").mkdir()
    given = ["evaluate", "--model", tmp_path / "empty", "--data", tmp_path / "set"]
    ended = invoke(*given, "--run-out", tmp_path / "run")
    assert ended.exit_code == 2
    assert "The id 'a b' is empty or contains white space" in ended.stderr
