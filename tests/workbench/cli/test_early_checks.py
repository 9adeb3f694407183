"""What can be refused early is refused before torch is imported, which takes seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from negative_cache import __main__
from negative_cache.workbench import cli
from support import random_pairs

TRAIN = ["train", "--data", "pairs.jsonl", "--output", "new"]
COMPARE = ["compare", "--data", "pairs.jsonl", "--output", "new"]
SEARCH = ["search", "--model", "model", "--corpus", "notes.txt"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*TRAIN[:-1], "full"], "The output folder 'full' exists and is not empty. Choose another --output."),
        ([*TRAIN[:-1], "half"], "'half.partial' has an unfinished run. If it does not run any more, continue it with"),
        ([*TRAIN[:-1], "full", "--resume"], "'full' exists and is not empty."),  # it has no run
        (["train", "--data", "pair.jsonl", "--output", "new"], "'pair.jsonl' is not a file"),
        ([*TRAIN, "--model", "./nowhere"], "Cannot load the model './nowhere': it is not a directory."),
        ([*TRAIN, "--model", "a/folder/nowhere"], "Cannot load the model 'a/folder/nowhere': it is not a directory."),
        ([*TRAIN, "--model", "static:pairs.jsonl"], "Cannot load the model 'pairs.jsonl': it is not a directory."),
        ([*TRAIN, "--model", "statc"], "Did you mean static?"),
        ([*COMPARE, "--model", "statc"], "Did you mean static?"),
        (["compare", "--data", "nowhere", "--output", "new"], "'nowhere' is not a file"),
        ([*SEARCH, "--queries", "nowhere"], "--queries nowhere is not a file."),
        ([*SEARCH[:-1], "nowhere", "a"], "The corpus 'nowhere' is not a file or folder."),
        (["search", "a", "--model", "model", "--data", "nowhere"], "'nowhere' is not a file"),
        (["search", "a", "--model", "./nowhere", "--corpus", "notes.txt"], "it is not a directory."),
        ([*SEARCH, "a", "--dtype", "float8"], "--dtype is 'float8'; expected one of float32, bfloat16, float16."),
        (["evaluate", "--model", "./nowhere", "--data", "pairs.jsonl"], "it is not a directory."),
        (["evaluate", "--model", "model", "--data", "nowhere"], "'nowhere' is not a file"),
        (["report", "first-mdel"], "first-mdel is not a directory. Did you mean first-model? Give the --output"),
        (["report", "."], ". has neither run.json nor compare.json"),
        (["report", "half"], "The run in half.partial is not finished. Continue it with the same train command and"),
        (["report", "half.partial"], "The run in half.partial is not finished."),
        (["report", "saved"], "Measure it with: negative-cache evaluate --model saved --data DATA"),
        (["report", "first-model", "saved"], "saved holds a model, but no run of negative-cache train (run.json)."),
    ],
    ids=lambda value: "_".join(value).replace("/", "") if isinstance(value, list) else "",
)
def test_wrong_paths_and_names_are_refused_before_torch_is_imported(words: list[str], message: str, tmp_path: Path):
    random_pairs(tmp_path / "pairs.jsonl", 30)
    (tmp_path / "notes.txt").write_text("a text\n")
    for name in ("full", "half.partial", "model", "first-model", "saved"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / "first-model" / "run.json").write_text("{}")
    (tmp_path / "saved" / "modules.json").write_text("[]")
    code = (
        f"import sys\nsys.argv[1:] = {words}\nfrom negative_cache.__main__ import main\ntry: main()\n"
        "finally: print([name for name in ('torch', 'sentence_transformers') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    said = " ".join(ended.stderr.split())
    assert ended.returncode == 2, said
    assert message in said
    assert "Training takes" not in said
    assert ended.stdout.split() == ["[]"]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("error", "is_hint"),
    [
        (ModuleNotFoundError("No module named 'no_such_package'", name="no_such_package.part"), True),
        (ModuleNotFoundError("No module named 'torch.nowhere'", name="torch.nowhere"), False),  # torch is there
        (ModuleNotFoundError("No module named 'negative_cache.nowhere'", name="negative_cache.nowhere"), False),
        (ModuleNotFoundError("No module named '_lzma'", name="_lzma"), False),  # a Python that was built without it
        (ModuleNotFoundError("no name"), False),
        (ImportError("cannot import name 'x' from 'torch'", name="torch"), False),
    ],
)
def test_only_a_package_that_is_not_installed_is_to_be_installed(
    error: ImportError, is_hint: bool, monkeypatch: pytest.MonkeyPatch
):
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit if is_hint else type(error)) as found:
        __main__.main()
    hint = "The command line needs more packages (no_such_package.part): pip install 'negative-cache[train]'"
    assert str(found.value) == (hint if is_hint else str(error))
