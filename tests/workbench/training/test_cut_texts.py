"""What is said before training about texts that the model cuts."""

from __future__ import annotations

from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer

from command_line import DOCUMENTS, NOUNS, VERBS, invoke
from negative_cache.workbench.compare.running import OPTIONS
from negative_cache.workbench.data import RetrievalData
from negative_cache.workbench.models import load_model, set_prompts
from negative_cache.workbench.training import cut_texts
from negative_cache.workbench.training.cut_texts import note_on_cut_texts
from text_models import make_router

WORDS = [*NOUNS, *VERBS]


def data_of(lengths_of_documents: list[int], lengths_of_queries: list[int]) -> RetrievalData:
    """Texts of so many words. The queries of the test split are longer than any limit."""
    documents = {f"d{at}": " ".join(WORDS[:count]) for at, count in enumerate(lengths_of_documents)}
    queries = {f"q{at}": " ".join(WORDS[:count]) for at, count in enumerate(lengths_of_queries)}
    qrels = {"train": {query: ["d0"] for query in queries}, "test": {"long": ["d0"]}}
    return RetrievalData("set", documents, {**queries, "long": " ".join(500 * WORDS)}, qrels)


@pytest.fixture
def model() -> SentenceTransformer:
    """A token for each word, and two special ones for each text."""
    return load_model("tiny", 10 * WORDS, seed=0)


def test_the_share_of_cut_texts_and_the_length_of_nearly_all_are_said(model: SentenceTransformer):
    data = data_of([6] * 80 + [7] * 18 + [9] * 2, [6] * 100)
    model.max_seq_length = 8  # with the special tokens, as the model cuts
    assert len(model.tokenizer(data.corpus["d0"])["input_ids"]) == 8
    assert note_on_cut_texts(model, data, 8) == (
        "--max-seq-length 8 cuts 20 % of the documents (99 % have at most 11 tokens), counted in 100 documents and 100 "
        "queries."
    )
    set_prompts(model, "apple ", None)
    said = note_on_cut_texts(model, data, None)
    assert said is not None
    assert said.startswith(
        "The model's limit of 8 tokens cuts 20 % of the documents (99 % have at most 11 tokens) and "
    )
    assert "and 100 % of the queries (99 % have at most 9 tokens), counted" in said


def test_nothing_is_said_if_hardly_a_text_is_cut(model: SentenceTransformer):
    data = data_of([6] * 99 + [9], [3] * 10)
    model.max_seq_length = 8
    assert note_on_cut_texts(model, data, 8) is None
    static = load_model("static", 10 * WORDS, seed=0)
    assert note_on_cut_texts(static, data, None) is None
    assert note_on_cut_texts(make_router(), data, None) is None  # queries and documents have other limits


def test_only_a_sample_is_tokenized(model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch):
    model.max_seq_length = 8
    data = data_of([9] * 1500, [9] * 5)
    assert str(note_on_cut_texts(model, data, 8)).endswith("counted in 1,000 documents and 5 queries.")
    monkeypatch.setattr(cut_texts, "MAX_CHARACTERS", 10 * len(data.corpus["d0"]))
    assert str(note_on_cut_texts(model, data, 8)).endswith("counted in 10 documents and 5 queries.")


@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_command_says_it_once_before_training(
    command: str, beir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    load_model("tiny", DOCUMENTS.values(), seed=0).save_pretrained(str(tmp_path / "model"), create_model_card=False)
    options: list[object] = ["--data", beir, "--model", tmp_path / "model", "--output", tmp_path / "out"]
    options += ["--max-seq-length", 6, "--batch-size", 8, "--max-steps", 2]
    if command == "compare":
        assert not OPTIONS.count_cut_texts  # in the processes of the runs
        options += ["--losses", "in-batch", "--seeds", 2, "--learning-rates", "1e-3"]
    ended = invoke(command, *options)
    assert ended.exit_code == 0, ended.output
    assert (ended.stderr + caplog.text).count("--max-seq-length 6 cuts 100 % of the documents (99 % have at most ") == 1
