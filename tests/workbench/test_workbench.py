"""The applied half on small data that the tests make, through the command line where a user would use it."""

import gzip
import io
import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from rich.console import Console
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from negative_cache.workbench import evaluation, python_code, training
from negative_cache.workbench.cli import app
from negative_cache.workbench.cli.terminal import Terminal
from negative_cache.workbench.cli.train_command import _training_bar
from negative_cache.workbench.data import DataError, load_data
from negative_cache.workbench.models import load_model

NOUNS = ["apple", "river", "engine", "violin", "castle", "planet", "garden", "rocket", "mirror", "candle"]
VERBS = ["paints", "breaks", "finds", "sells", "moves", "holds", "cleans", "hides"]
DOCUMENTS = {
    f"d{i}": f"the {n} that someone {v} every {i} days" for i, (n, v) in enumerate((n, v) for n in NOUNS for v in VERBS)
}

# What `NegativeCacheLoss.metrics` has without margins, under the tags of the contract where those differ.
CACHE_METRICS = (
    "interpretable_prediction_loss", "positive_probability", "cache_share", "fill", "staleness", "staleness_youngest",
    "staleness_oldest", "age", "effective_negatives", "near_duplicates", "gradient_norm_ratio",
)  # fmt: skip


def write_beir(folder: Path, compress: bool = False) -> Path:
    folder.mkdir()

    def opened(name):
        return gzip.open(folder / f"{name}.gz", "wt") if compress else (folder / name).open("w")

    with opened("corpus.jsonl") as file:
        for key, text in DOCUMENTS.items():
            file.write(json.dumps({"_id": key, "title": "A title", "text": text}) + "\n")
    with opened("queries.jsonl") as file:
        for key, text in DOCUMENTS.items():
            file.write(json.dumps({"id": "q" + key, "text": " ".join(text.split()[1:5])}) + "\n")
    (folder / "qrels").mkdir()
    keys = list(DOCUMENTS)
    for split, part in {"train": keys[:60], "dev": keys[60:70], "test": keys[70:]}.items():
        rows = ["query-id\tcorpus-id\tscore", *(f"q{key}\t{key}\t1" for key in part)]
        if split == "train":
            rows += [f"q{part[0]}\t{part[1]}\t1", f"q{part[2]}\t{part[3]}\t0"]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def beir(tmp_path):
    return write_beir(tmp_path / "set")


def invoke(*args: object):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.mark.parametrize("compress", [False, True])
def test_beir_folder(tmp_path, compress):
    data = load_data(str(write_beir(tmp_path / "set", compress)))
    assert data.corpus["d0"] == "A title\n" + DOCUMENTS["d0"]
    assert {split: len(qrels) for split, qrels in data.qrels.items()} == {"train": 60, "dev": 10, "test": 10}
    assert data.qrels["train"]["qd0"] == ["d0", "d1"]  # several positives
    assert data.qrels["train"]["qd2"] == ["d2"]  # a score of 0 is no positive
    columns = data.training_columns()
    assert len(columns["anchor"]) == 61
    assert columns["label"][:3] == [[0, 1], [1, 0], [1, -1]]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet", "csv.gz"])
def test_files_of_pairs_give_the_same_set(tmp_path, kind):
    rows = [{"question": f"who {text[4:]}", "answer": text} for text in DOCUMENTS.values()]
    rows.append({"question": rows[0]["question"], "answer": rows[1]["answer"]})
    path = tmp_path / f"pairs.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        tab = "\t" if kind == "tsv" else ","
        text = f"question{tab}answer\n" + "".join(f'"{row["question"]}"{tab}"{row["answer"]}"\n' for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    data = load_data(str(path))
    assert len(data.corpus) == 80
    assert sum(len(qrels) for qrels in data.qrels.values()) == 80
    assert all(data.qrels[split] for split in ("train", "dev", "test"))
    owner = {document: split for split, q in data.qrels.items() for ds in q.values() for document in ds}
    for split, qrels in data.qrels.items():
        assert all(owner[document] == split for documents in qrels.values() for document in documents)
    assert any(len(documents) == 2 for qrels in data.qrels.values() for documents in qrels.values())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"query": "x", "positive": "y"}\n{broken\n', "line 2: not JSON"),
        ("a.jsonl", '{"query": "x", "positive": "y"}\n[1]\n', "line 2: expected a JSON object"),
        ("a.jsonl", '{"query": "x", "text": "y"}\n', "line 1: no column positive"),
        ("a.jsonl", '{"query": "x", "positive": 3}\n', "line 1: the column 'positive' is empty or no text"),
        ("a.csv", "query,positive\nx,y\nz\n", "line 3: expected 2 columns"),
        ("a.csv", "", "no pairs"),
        ("a.parquet", "no parquet", "not readable as parquet"),
        ("a.csv.gz", "no gzip", "not readable|gzip"),
        ("a.doc", "text", "unknown kind of file"),
    ],
)
def test_malformed_files_are_named_with_the_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_data(str(path))


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_files_in_another_encoding_are_refused(tmp_path, name):
    (tmp_path / name).write_text('query,positive\ncafé,"é"\n', encoding="latin-1")
    with pytest.raises(DataError, match=r"is not UTF-8 .* Save it as UTF-8"):
        load_data(str(tmp_path / name))


def test_all_splits_together(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"query": "q{n}", "positive": "d{n}"}}\n' for n in range(300)))
    data = load_data(str(tmp_path / "a.jsonl"))
    assert len(data.judged("test")) < 60
    assert data.judged("all") == {
        query: documents for qrels in data.qrels.values() for query, documents in qrels.items()
    }
    assert len(data.judged("all")) == 300


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("qrels/test.tsv", "qd0\tnowhere\t1", "line 12: the id 'nowhere' is not in the corpus"),
        ("qrels/test.tsv", "nobody\td0\t1", "line 12: the id 'nobody' is not in queries"),
        ("qrels/test.tsv", "qd0 d0 1", "line 12: expected query id, document id and integer score"),
        ("corpus.jsonl", '{"_id": "d0", "text": "again"}', "line 81: the id 'd0' occurs twice"),
        ("queries.jsonl", '{"_id": "new"}', "line 81: expected the keys"),
    ],
)
def test_malformed_beir_folders_are_named_with_the_line(beir, file, line, message):
    with (beir / file).open("a") as opened:
        opened.write(line + "\n")
    with pytest.raises(DataError, match=message):
        load_data(str(beir))


def test_windows_files_and_byte_order_marks_are_read(beir, tmp_path):
    expected = load_data(str(beir))
    for path in [*beir.glob("*.jsonl"), *beir.glob("qrels/*.tsv")]:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_data(str(beir)) == expected
    path = tmp_path / "PAIRS.CSV"
    path.write_bytes(b"\xef\xbb\xbfquery,positive\r\nwho,me\r\n")
    assert list(load_data(str(path)).queries.values()) == ["who"]


def test_ids_that_are_no_text_or_number_or_differ_only_in_kind_are_refused(beir):
    path = beir / "corpus.jsonl"
    good = path.read_text()
    path.write_text(good + '{"_id": ["x"], "text": "a"}\n')
    with pytest.raises(DataError, match="line 81: expected the keys"):
        load_data(str(beir))
    path.write_text(good + '{"_id": 1, "text": "a"}\n{"_id": "1", "text": "b"}\n')
    with pytest.raises(DataError, match="line 82: the id '1' occurs twice"):
        load_data(str(beir))


def test_train_evaluate_and_search_from_the_command_line(beir, tmp_path):
    output = tmp_path / "model"
    result = invoke("train", "--data", beir, "--output", output, "--cache-size", 64, "--batch-size", 8, "--epochs", 8,
                    "--learning-rate", 0.05, "--eval-steps", 20, "--num-samples", 2)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "after" in result.output
    record = json.loads((output / "run.json").read_text())
    assert record["configuration"]["loss"] == "negative-cache"
    assert record["after"]["num_documents"] == 80
    assert record["after"]["mrr@10"] >= record["before"]["mrr@10"]
    assert record["peak_memory_bytes"] > 0
    steps = [row["step"] for row in record["history"] if "loss" in row]
    assert len(steps) >= 30
    assert steps[-1] == record["steps"]
    assert any("dev_cosine_mrr@10" in key for row in record["history"] for key in row)
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    staleness = [event.value for event in events.Scalars("train/cache/staleness")]
    assert staleness[-1] > 0
    assert events.Scalars("train/cache/fill")[-1].value > 0.5
    logged = {key: value for row in record["history"] for key, value in row.items() if key.startswith("cache/")}
    assert {f"cache/{name}" for name in CACHE_METRICS} == set(logged)
    for name, last in logged.items():
        assert events.Scalars(f"train/{name}")[-1].value == pytest.approx(last, rel=1e-5), name
    assert not list(tmp_path.glob("*.partial*"))

    result = invoke("evaluate", "--model", output, "--data", beir, "--split", "test", "--json")
    assert result.exit_code == 0, result.output
    metrics = json.loads(result.stdout)
    assert set(metrics) == {"mrr@10", "ndcg@10", "recall@1", "recall@10", "recall@100", "num_queries", "num_documents"}
    assert metrics["mrr@10"] == pytest.approx(record["after"]["mrr@10"], abs=1e-6)

    result = invoke("search", "--model", output, "--data", beir, "-n", 2, DOCUMENTS["d5"])
    assert result.exit_code == 0, result.output
    assert "d5" in result.output
    assert SentenceTransformer(str(output)).encode("a text").shape == (256,)


def test_seconds_are_of_training_alone(beir, tmp_path, monkeypatch):
    class Slow(SentenceEvaluator):
        def __call__(self, *args, **kwargs):
            time.sleep(3)
            return {}

    monkeypatch.setattr(training, "make_evaluator", lambda *_: Slow())
    given = ["--data", beir, "--output", tmp_path / "model", "--batch-size", 8, "--cache-size", 64, "--max-steps", 4]
    assert invoke("train", *given, "--eval-steps", 2).exit_code == 0
    record = json.loads((tmp_path / "model" / "run.json").read_text())
    seconds = [row["seconds"] for row in record["history"] if "loss" in row]
    assert len(seconds) == 4
    assert max(later - earlier for earlier, later in pairwise([*seconds, record["seconds"]])) < 3


def test_documents_are_encoded_in_parts_that_are_told_of(monkeypatch):
    monkeypatch.setattr(evaluation, "ENCODED_AT_ONCE", 3)
    texts = ["one", "a much longer one than that", "three or so", "", "five", "a six", "seven is it"]
    model, told = load_model("static", texts, seed=0), []
    found = evaluation.encode_documents(model, texts, lambda *done: told.append(done))
    torch.testing.assert_close(found, model.encode_document(texts, convert_to_tensor=True))
    assert told == [(3, 7), (6, 7), (7, 7)]


def test_the_bar_shows_all_steps_on_80_columns():
    terminal = Terminal()
    terminal.progress = Console(file=io.StringIO(), width=80, force_terminal=True, no_color=True)
    with _training_bar(terminal, "negative-cache") as (progress, told):
        told(5, 20)
        progress(93, 20_000, {"loss": 0.1341, "cache/staleness": 0.003812, "cache/fill": 0.07744})
    shown = terminal.progress.file.getvalue()
    assert "93/20000 loss 0.134 " in shown
    assert "…" not in shown


def test_a_cache_of_narrow_embeddings(beir, tmp_path):
    options = ["--data", beir, "--cache-size", 64, "--batch-size", 8, "--max-steps", 3, "--embedding-dtype", "int8"]
    result = invoke("train", "--output", tmp_path / "model", *options)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "model" / "run.json").read_text())
    assert record["configuration"]["embedding_dtype"] == "int8"


def test_memory_is_predicted_per_rank():
    sizes = {}
    for ranks in (1, 4):
        result = invoke("memory", "--dim", 100, "--cache-size", 8000, "--embedding-dtype", "int8", "--ranks", ranks)
        assert result.exit_code == 0, result.output
        rows = [line.split("│")[1:3] for line in result.output.splitlines() if line.startswith("│")]
        sizes[ranks] = {name.strip(): float(value) for name, value in rows}
    assert sizes[1]["embeddings"] == 0.8  # 8000 rows of 100 bytes and a float32
    assert sizes[4]["embeddings"] == 0.2
    assert sizes[1]["step"] > 0
    assert invoke("memory", "--dim", 100, "--embedding-dtype", "int4").exit_code == 2


@pytest.mark.parametrize("loss", ["in-batch", "gradcache"])
def test_the_tiny_transformer_trains_with_the_other_losses(beir, tmp_path, loss):
    output = tmp_path / "model"
    result = invoke("train", "--data", beir, "--output", output, "--model", "tiny", "--loss", loss, "--max-steps", 2)
    assert result.exit_code == 0, result.output
    assert json.loads((output / "run.json").read_text())["steps"] == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--loss", "triplet"], "expected one of"),
        (["--batch-size", "0"], "must be positive"),
        (["--epochs", "nan"], "must be positive"),
        (["--scale", "-5"], "must be positive"),
        (["--seed", "-1"], "must be from 0"),
        (["--batch-size", "64", "--cache-size", "32"], "larger than --cache-size"),
        (["--top-k", "999999"], "larger than --cache-size"),
        (["--data", "nowhere"], "is no file"),
        (["--model", "no/such/model"], "Cannot load the model"),
        (["--model", "no-such/model"], "the Hugging Face hub does not give it"),
    ],
)
def test_mistakes_end_with_one_message_and_nothing_written(beir, tmp_path, args, message):
    given = ["--data", str(beir), *args] if "--data" not in args else args
    result = invoke("train", "--output", tmp_path / "out", *given)
    assert result.exit_code == 2
    assert message in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


def test_an_output_folder_that_exists_is_left_alone(beir, tmp_path):
    (tmp_path / "out").mkdir()
    result = invoke("train", "--data", beir, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "exists" in result.output
    assert not list((tmp_path / "out").iterdir())


def test_extraction_takes_the_first_paragraph_and_drops_the_docstring(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        'class Box:\n    def area(self, x):\n        """Compute the area of\n'
        '        a box.\n\n        More.\n        """\n'
        '        return x * x\n\n\ndef short():\n    """Too short."""\n    return 1\n\n\ndef empty():\n'
        '    """Nothing but a docstring in here."""\n'
    )
    assert python_code.extract("module", path) == [
        python_code.Pair("module:Box.area", "Compute the area of a box.", "def area(self, x):\n    return x * x")
    ]
    path.write_text("def broken(:\n    '''x'''")
    assert python_code.extract("module", path) == []


def test_near_copies_do_not_cross_splits():
    body = "\n".join(f"    value_{i} = compute(value_{i - 1}, {i})" for i in range(1, 12))
    train = python_code.Pair("a:f", "one", f"def f(value_0):\n{body}\n    return value_11")
    near = python_code.Pair("b:g", "two", f"def g(value_0):\n{body}\n    return value_11")
    other = python_code.Pair(
        "c:h", "three", "def h(path):\n    with open(path) as file:\n        return file.read().split(',')"
    )
    kept = python_code._without_near_copies({"train": [train], "dev": [], "test": [near, other]})
    assert kept == {"train": [train], "dev": [], "test": [other]}


def test_builtin_data_of_this_environment_is_large_and_its_splits_are_disjoint(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = load_data("python-code")
    assert len(data.corpus) >= 20_000
    modules = {split: {name.split(":")[0] for name in qrels} for split, qrels in data.qrels.items()}
    assert modules["train"].isdisjoint(modules["test"] | modules["dev"])
    assert len(data.qrels["test"]) > 500
    written = next((tmp_path / "negative-cache").iterdir())
    first = written.read_bytes()
    assert load_data("python-code") == data  # from the file
    assert written.read_bytes() == first


def test_builtin_data_is_reproducible(monkeypatch):
    modules = [module for module in python_code.module_paths() if module[0].startswith("rich.")]
    monkeypatch.setattr(python_code, "module_paths", lambda: modules)
    built = python_code.build()
    monkeypatch.setattr(python_code, "module_paths", lambda: modules[::-1])
    assert built == python_code.build()
    assert len(built["train"]) > 100


def test_the_core_imports_torch_alone():
    code = "import sys, negative_cache; print([m for m in {names} if m in sys.modules])"
    names = ["sentence_transformers", "transformers", "datasets", "typer", "rich", "triton", "lightning"]
    found = subprocess.run([sys.executable, "-c", code.format(names=names)], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    # the same check finds a package that is imported
    code = code.replace("negative_cache;", "negative_cache, typer;")
    found = subprocess.run([sys.executable, "-c", code.format(names=names)], capture_output=True, text=True, check=True)
    assert "typer" in found.stdout
