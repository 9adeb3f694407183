"""What README and docs show runs: Python as it stands, commands in a small form or at least their options."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import typer
from torch.distributed.run import get_args_parser
from typer.testing import CliRunner

from negative_cache.workbench.cli import app
from negative_cache.workbench.models import load_model

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "AGENTS.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODEL = "sentence-transformers/all-MiniLM-L6-v2"

# Names that a snippet takes from the page around it, and what has happened there before.
GIVEN = """
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss

model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
dataset = Dataset.from_dict({"anchor": ["one", "two"] * 4, "positive": ["1", "2"] * 4})
args = SentenceTransformerTrainingArguments("run", max_steps=1, save_steps=1, per_device_train_batch_size=4)
loss = NegativeCacheRankingLoss(model, cache_size=32)
"""
STOPPED = """
from negative_cache.integrations.trainer import NegativeCacheTrainer
NegativeCacheTrainer(model=model, args=args, train_dataset=dataset, loss=loss).train()
args.max_steps = 2
"""

# Commands that no test runs or parses, each with the reason.
NOT_RUN = {
    "tensorboard --logdir my-model/tensorboard": "a server that does not end",
    "tensorboard --logdir my-model.partial/tensorboard": "a server that does not end",
    "python -m http.server --directory site": "a server that does not end",
}


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """Page and text of every fenced block of a language."""
    for page in PAGES:
        for text in re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            yield str(page.relative_to(ROOT)), text


def sides() -> Iterator[tuple[str, str]]:
    """The code before and after each `diff`; what comes before from TensorFlow has no package here to run it."""
    for page, text in blocks("diff"):
        for name, other in (("before", "+"), ("after", "-")):
            code = "".join(line[1:] for line in text.splitlines(keepends=True) if not line.startswith(other))
            if "import tensorflow" not in code:
                yield f"{page}-{name}", code


SNIPPETS = [*blocks("python"), *sides()]
COMMANDS = [
    (page, line.partition("  #")[0].strip())
    for page, text in blocks("console")
    for line in text.replace("\\\n", " ").splitlines()
    if line.strip()
]
INLINE = [
    (str(page.relative_to(ROOT)), " ".join(span.split()))
    for page in PAGES
    for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", page.read_text(encoding="utf-8"))
    if re.match(r"(negative-cache|python|make|tensorboard) \S|torchrun .*-m ", span) and "..." not in span
]


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """A transformer that takes the place of the one that would have to be downloaded."""
    folder = tmp_path_factory.mktemp("model")
    load_model("tiny", ["how do I open box number", "the key of that number opens it"], seed=0).save(str(folder))
    return str(folder)


@pytest.fixture
def sandbox(tmp_path, monkeypatch, small_model):
    """A folder of its own, with a dataset, a file of pairs and a trained model; afterwards the log is as it was."""
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "my-dataset")
    rows = [f"how do I open box {number},the key of number {number} opens it" for number in range(64)]
    Path("my-pairs.csv").write_text("\n".join(["query,positive", *rows]), encoding="utf-8")
    shutil.copytree(small_model, "my-model")
    root, own = logging.getLogger(), logging.getLogger("negative_cache")
    handlers, level = list(root.handlers), own.level
    yield
    root.handlers[:] = handlers
    own.setLevel(level)


def write_dataset(folder: Path) -> None:
    """A few pairs in the layout of BEIR."""
    (folder / "qrels").mkdir(parents=True)
    for name, text in (("corpus", "the key of number {} opens it"), ("queries", "how do I open box number {}")):
        lines = [json.dumps({"_id": f"{name}_{i}", "text": text.format(i)}) for i in range(8)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for split, rows in (("train", range(6)), ("test", range(6, 8))):
        lines = ["query-id\tcorpus-id\tscore", *(f"queries_{i}\tcorpus_{i}\t1" for i in rows)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize(("page", "code"), SNIPPETS, ids=[page for page, _ in SNIPPETS])
def test_snippet_runs(page, code, small_model):
    """As it stands, but for the model that would have to be downloaded."""
    used = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)]
    stored = {node.id for node in used if isinstance(node.ctx, ast.Store)}
    is_part = not {node.id for node in used}.isdisjoint({"model", "dataset", "args", "loss"} - stored)
    before = GIVEN + (STOPPED if "resume_from_checkpoint=True" in code else "") if is_part else ""
    names: dict[str, object] = {"__name__": "__main__"}
    for part in (before, code):
        exec(compile(part.replace(MODEL, small_model), page, "exec"), names)


def test_snippets_import_public_names_alone():
    internal = re.compile(r"negative_cache\.(workbench|cache|objective|sampling|distributed)\b")
    assert [(page, found[0]) for page, code in SNIPPETS if (found := internal.search(code))] == []


def test_there_are_snippets():
    assert len(SNIPPETS) >= 20
    assert len(COMMANDS) >= 15
    assert len(INLINE) >= 8


def test_llms_txt_lists_every_page_of_the_site():
    listed = re.findall(r"\]\(([\w/-]+\.md)\)", (ROOT / "docs" / "llms.txt").read_text(encoding="utf-8"))
    in_site = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    generated = {"contributing.md", "changelog.md", "agents.md"}
    assert {page for page in in_site if not page.startswith("api/")} - generated <= set(listed)
    assert all((ROOT / "docs" / page).is_file() for page in listed)


@pytest.mark.parametrize(("page", "command"), COMMANDS + INLINE, ids=[page for page, _ in COMMANDS + INLINE])
def test_command_is_known(page, command):
    """Every option of a command exists, and its values are of the right type."""
    if command not in NOT_RUN:
        check(shlex.split(command))


def check(words: list[str]) -> None:
    """Raise unless the program takes these words, up to where its output goes."""
    words = words[: words.index(">")] if ">" in words else words
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    program, *rest = words
    if program == "negative-cache":
        check_cli(rest)
    elif program == "torchrun":
        options = get_args_parser().parse_args(rest)
        assert not options.module or options.training_script == "negative_cache"
        (check_cli if options.module else check_script)(
            [*([] if options.module else [options.training_script]), *options.training_script_args]
        )
    elif program == "python" and rest[0] == "-m":
        check_module(rest[1], rest[2:])
    elif program == "python":
        check_script(rest)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(rest) <= set(targets)
    elif words[:2] == ["pip", "install"]:
        extras = importlib.metadata.metadata("negative-cache").get_all("Provides-Extra")
        assert re.fullmatch(rf"(\.|negative-cache)(\[({'|'.join(extras)})\])?", rest[-1])
    else:
        pytest.fail(f"Nothing checks {shlex.join(words)!r}. Add a check, or name it in NOT_RUN with the reason.")


def check_cli(words: list[str]) -> None:
    """Parse as the command line does, which may lack what must be given: a sentence names a few options only."""
    name, *options = words
    if words == ["--help"]:
        return
    command = typer.main.get_command(app).commands[name]
    for param in command.params:
        param.required = False
    if "--help" not in options:
        command.make_context(name, options)


def check_module(name: str, words: list[str]) -> None:
    """A module that is started with `python -m`; one of this repository has to parse the words."""
    spec = importlib.util.find_spec(f"{name}.__main__" if name in ("benchmarks", "negative_cache") else name)
    assert spec is not None
    if name.startswith("benchmarks") and "argparse" in Path(spec.origin).read_text(encoding="utf-8"):
        parse_only(importlib.import_module(spec.name), words)


def check_script(words: list[str]) -> None:
    """A script of this repository, which test_examples runs: its options exist."""
    text = (ROOT / words[0]).read_text(encoding="utf-8")
    assert all(f'"{word}"' in text for word in words[1:] if word.startswith("--"))


class ParsedError(Exception):
    """The words were parsed; nothing more is to be done."""


def parse_only(module: ModuleType, words: list[str]) -> None:
    """Call a module's `main` until its parser is through; what must be given may lack."""

    def parse_and_stop(self: argparse.ArgumentParser, args: object = None, namespace: object = None) -> None:
        for action in self._actions:
            action.required = False
        _, rest = self.parse_known_args(args, namespace)
        assert not rest, f"unknown: {rest}"
        raise ParsedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [module.__name__, *words])
        with pytest.raises(ParsedError):
            module.main()


def test_readme_commands_run(tmp_path, monkeypatch, small_model):
    """The commands for data of one's own, one after the other, on a few pairs; `compare` has tests of its own."""
    monkeypatch.chdir(tmp_path)
    pairs = [
        f"how do I open box {i} {word},box {i} opens with the {word}" for i in range(60) for word in ("key", "code")
    ]
    Path("my-pairs.csv").write_text("\n".join(["query,positive", *pairs]) + "\n", encoding="utf-8")
    Path("notes.txt").write_text("the key of box 1\nthe key of box 2\n", encoding="utf-8")
    lines = [command for page, command in COMMANDS if page == "README.md" and command.startswith("negative-cache ")]
    lines = [line for line in lines if not re.search("compare|python-code", line)]
    assert len(lines) >= 3
    for line in lines:
        said = CliRunner().invoke(app, shlex.split(line.replace("all-MiniLM-L6-v2", small_model))[1:])
        assert said.exit_code == 0, said.output
        assert "search" not in line or "box" in said.output
    assert os.path.exists("my-model/run.json")


QUOTED_FROM_OTHERS = ("look like ID columns", "Trying to backward through the graph")


def test_quoted_messages_are_those_of_the_source():
    """What the pages of symptoms quote is what a user sees."""
    sources = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "src").rglob("*.py")))
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)
    pages = sorted((ROOT / "docs").glob("troubleshooting*.md"))
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    quoted = re.findall(r"^> (.*)$", text, re.MULTILINE) + re.findall(r'^#+ .*?"(.*)"$', text, re.MULTILINE)
    assert len(quoted) >= 24
    for message in quoted:
        if not any(other in message for other in QUOTED_FROM_OTHERS):
            parts = re.split(r"\.\.\.|[\d.]+\d|\d|`[^`]*`|'[^']*'|torch\.\w+|\[|\]", message)
            assert all(part in sources for part in parts if len(part) > 12), message
