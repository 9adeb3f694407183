"""Fingerprints of data."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from negative_cache.workbench.data import RetrievalData, fingerprints
from negative_cache.workbench.data.texts import Texts

DATA = RetrievalData(
    "mine",
    {"a": "x", "b": "y", "c": "z"},
    {"q": "x", "r": "y"},
    {"train": {"q": ["a", "b"]}, "test": {"r": ["c"]}},
    negatives={"q": ["c"]},
    grades={"test": {"r": {"c": 2.0}}},
)
CODE = """
from negative_cache.workbench.data import fingerprints
from negative_cache.workbench.data.texts import Texts
print(fingerprints.of_texts(Texts.of({"1": "z", "2": "x", "3": "y"})))
"""


def test_texts_in_any_order_and_with_any_ids_have_one_fingerprint_in_every_process():
    own = fingerprints.of_texts(DATA.corpus)
    ended = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == own
    assert len(own) == 32
    for others in ({"a": "x", "b": "y"}, {"a": "x", "b": "y", "c": "Z"}, {"a": "x", "b": "y", "c": "z", "d": "z"}):
        assert fingerprints.of_texts(Texts.of(others)) != own


@pytest.mark.parametrize(
    "changed",
    [
        {"corpus": Texts.of({"a": "x", "b": "y", "c": "z!"})},
        {"corpus": Texts.of({"b": "y", "a": "x", "c": "z"})},
        {"queries": Texts.of({"q": "x", "r": "y!"})},
        {"qrels": {"train": {"q": ["b", "a"]}, "test": {"r": ["c"]}}},
        {"qrels": {"dev": {"q": ["a", "b"]}, "test": {"r": ["c"]}}},
        {"negatives": {}},
        {"grades": {"test": {"r": {"c": 3.0}}}},
        {"ignores_identical_ids": True},
        {"elsewhere": {"dev": DATA}},
    ],
)
def test_every_part_of_the_data_changes_its_fingerprint(changed: dict[str, object]):
    same = replace(DATA, name="other", notes=("a note",))
    assert fingerprints.of_data(same) == fingerprints.of_data(DATA)
    assert fingerprints.of_data(replace(DATA, **changed)) != fingerprints.of_data(DATA)
