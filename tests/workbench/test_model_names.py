"""What the name of a model says, without loading it."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from negative_cache.workbench.model_names import ModelError, about_begin, base_on_hub, check_model


def test_a_model_of_the_local_cache_is_suggested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "models--some-owner--a-small-model-v2").mkdir()
    for given, meant in (
        ("a-small-model-v3", "a-small-model-v2"),
        ("static:a-small-model", "a-small-model-v2"),
        ("some-owner/a-small-model", "some-owner/a-small-model-v2"),
    ):
        with pytest.raises(ModelError, match=f"Did you mean {meant}\\?"):
            check_model(given)
    with pytest.raises(ModelError, match=r"^((?!Did you mean).)*$"):
        check_model("another/thing")


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("owner/model", "owner/model"),
        ("static:owner/model", "owner/model"),
        ("known", "sentence-transformers/known"),
        ("static:known", "sentence-transformers/known"),
        ("owner/other", None),
        ("static", None),
        ("my-model", None),  # a folder
        ("static:my-model", None),
    ],
)
def test_the_base_of_a_model_is_its_id_on_the_hub(
    name: str, base: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for repository in ("owner--model", "sentence-transformers--known"):
        folder = tmp_path / "hub" / f"models--{repository}"
        for file, text in (("refs/main", "1"), ("snapshots/1/modules.json", "[]")):
            (folder / file).parent.mkdir(parents=True)
            (folder / file).write_text(text)
    (tmp_path / "my-model").mkdir()
    assert base_on_hub(name) == base


@pytest.mark.parametrize(
    ("name", "about"),
    [
        ("static", "random weights (--model static)"),
        ("static:x/y", "the static model made from x/y, not x/y itself"),
        ("x/y", ""),
    ],
)
def test_what_a_model_begins_with_is_said_if_its_name_does_not(name: str, about: str):
    assert about_begin(name) == about
