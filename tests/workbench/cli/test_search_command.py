"""`search`: in documents without queries, with kept embeddings, and what it prints."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from command_line import DOCUMENTS, invoke, write_beir
from negative_cache.workbench.cli import app
from negative_cache.workbench.cli.search_command import _preview
from negative_cache.workbench.models import load_model

TEXTS = list(DOCUMENTS.values())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "negative-cache" / "index"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search") / "model"
    load_model("tiny", TEXTS, seed=0).save_pretrained(str(folder))
    return folder


def best(*args: object) -> dict:
    ended = invoke("search", TEXTS[7], *args, "-n", 1, "--json")
    assert ended.exit_code == 0, ended.output
    return json.loads(ended.stdout)[0]["documents"][0]


def write_corpora(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files of the same documents, each with the id of the eighth one."""
    (folder / "lines.txt").write_text("\n\n".join(TEXTS))
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text, "more": 1}) + "\n" for text in TEXTS))
    (folder / "beir").mkdir()
    with (folder / "beir" / "corpus.jsonl").open("w") as file:
        file.writelines(json.dumps({"_id": key, "title": "", "text": text}) + "\n" for key, text in DOCUMENTS.items())
    with (folder / "answers.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["number", "ID", "Answer"], *([1, f"a{key}", t] for key, t in DOCUMENTS.items())])
    pyarrow.parquet.write_table(pyarrow.table({"passage": TEXTS}), folder / "shard.parquet")
    (folder / "msmarco.tsv").write_text("".join(f"{key}\t{text}\n" for key, text in DOCUMENTS.items()))
    return {
        "lines.txt": (folder / "lines.txt", "15"),
        "rows.jsonl": (folder / "rows.jsonl", "8"),
        "beir": (folder / "beir", "d7"),
        "answers.csv": (folder / "answers.csv", "ad7"),
        "shard.parquet": (folder / "shard.parquet", "8"),
        "msmarco.tsv": (folder / "msmarco.tsv", "d7"),
    }


def test_documents_without_queries_are_searched(model: Path, tmp_path: Path):
    for name, (path, key) in write_corpora(tmp_path).items():
        column = ["--positive-column", "Answer"] if name == "answers.csv" else []
        found = best("--model", model, "--corpus", path, *column)
        assert (found["document_id"], found["text"]) == (key, TEXTS[7]), name
        assert found["score"] == pytest.approx(1, abs=1e-5)


def test_a_paragraph_is_shown_in_several_lines_and_code_keeps_its_indent():
    paragraph = " ".join(f"word{number}" for number in range(40))
    shown = _preview(paragraph, 60).splitlines()
    assert " ".join(line.strip() for line in shown) == paragraph
    assert all(line.startswith("    word") and len(line) <= 60 for line in shown)
    shown = _preview(f"def f():\n    return g({paragraph})", 60).splitlines()
    assert shown[:2] == ["    def f():", "        return g(word0 word1 word2 word3 word4 word5 word6"]
    assert shown[2].startswith("        word7")
    assert shown[-1] == "    ..."
    assert len(shown) == 7
    assert _preview(" " * 80 + "deep", 60).splitlines() == ["    " + " " * 80 + "deep"]


def test_a_later_search_says_that_it_encodes_nothing(model: Path, tmp_path: Path, cache: Path):
    write_corpora(tmp_path)
    given = ["search", TEXTS[3], "--model", model, "-n", 3]
    first, second, other = (
        invoke(*given, "--corpus", tmp_path / name) for name in ("lines.txt", "rows.jsonl", "lines.txt")
    )
    (file,) = cache.iterdir()
    kept = f"{file} (41 kB)."
    assert f"Note: The embeddings of the documents are kept for later searches, in {kept}\n" in first.stderr
    for later in (second, other):
        assert f"Note: The embeddings of the documents are those of an earlier search, from {kept}\n" in later.stderr
    assert other.stdout == first.stdout
    assert [line[:2].strip() for line in first.stdout.splitlines()[1::2]] == ["1", "2", "3"]
    noted = [line for ended in (first, second) for line in ended.stderr.splitlines()]
    assert all(line.startswith("Note: ") for line in noted), noted


def test_queries_come_from_a_file_or_from_standard_input(model: Path, tmp_path: Path):
    write_corpora(tmp_path)
    (tmp_path / "queries").write_text(f"{TEXTS[1]}\n\n  {TEXTS[2]}\n")
    given = ["search", "--model", str(model), "--corpus", str(tmp_path / "beir"), "-n", "1", "--json"]
    wanted = json.loads(invoke(*given, TEXTS[1], TEXTS[2]).stdout)
    assert [row["documents"][0]["document_id"] for row in wanted] == ["d1", "d2"]
    assert json.loads(invoke(*given, "--queries", tmp_path / "queries").stdout) == wanted
    text = (tmp_path / "queries").read_text()
    assert json.loads(CliRunner().invoke(app, [*given, "--queries", "-"], input=text).stdout) == wanted
    both = json.loads(invoke(*given, "--queries", tmp_path / "queries", TEXTS[4]).stdout)
    assert [row["query"] for row in both] == [TEXTS[4], TEXTS[1], TEXTS[2]]


def test_what_cannot_be_searched_is_refused(model: Path, tmp_path: Path):
    write_beir(tmp_path / "set")
    (tmp_path / "pairs.csv").write_text("query,positive\na,b\n")
    (tmp_path / "empty.txt").write_text("\n")
    for given, message in (
        ([], "There is no query. Give one or more, or a file of queries with --queries."),
        (["--queries", "nowhere"], "--queries nowhere is not a file."),
        (["a"], "Give the documents to search in: --corpus FILE"),
        (["a", "--corpus", "nowhere"], "The corpus 'nowhere' is not a file or folder."),
        (["a", "--corpus", tmp_path / "empty.txt"], "has no documents."),
        (["a", "--corpus", tmp_path / "pairs.csv"], "no column of texts is known, only 'positive', 'query'. Name"),
        (["a", "--corpus", tmp_path / "pairs.csv", "--positive-column", "b"], "there is no column 'b', only"),
        (["a", "--corpus", tmp_path / "pairs.csv", "--query-column", "b"], "--query-column has no effect without"),
    ):
        ended = invoke("search", "--model", model, *given)
        assert ended.exit_code == 2, ended.output
        assert message in " ".join(ended.stderr.split())
