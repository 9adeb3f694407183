"""What the name of a model says, without loading it."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from negative_cache.workbench.model_names import ModelError, about_begin, check_model


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
    ("name", "about"),
    [
        ("static", "random weights (--model static)"),
        ("static:x/y", "the static model made from x/y, not x/y itself"),
        ("x/y", ""),
    ],
)
def test_what_a_model_begins_with_is_said_if_its_name_does_not(name: str, about: str):
    assert about_begin(name) == about
