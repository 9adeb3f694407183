"""Models that are built from texts."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
import torch
from model2vec.distill import distill_from_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from sentence_transformers.util import cos_sim

from command_line import invoke
from negative_cache.workbench import models
from negative_cache.workbench.data import load_data
from negative_cache.workbench.model_names import ModelError, learning_rate_of
from negative_cache.workbench.models import load_model, load_trained, prepare_for_training, train_tokenizer
from support import random_pairs


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_can_tokenize(monkeypatch: pytest.MonkeyPatch):
    """As the workers of a data loader do. The threads of the tokenizers library do not survive the fork."""
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    texts = [f"text number {number}" for number in range(64)]
    tokenizer = train_tokenizer(texts)
    tokenizer.encode_batch(texts)  # starts the threads
    process = multiprocessing.get_context("fork").Process(target=tokenizer.encode_batch, args=(texts,))
    process.start()
    process.join(timeout=10)
    is_hanging = process.is_alive()
    process.kill()
    assert not is_hanging
    assert process.exitcode == 0


def test_what_training_does_differently_from_evaluation_is_said():
    model = load_model("tiny", ["a text", "another text"], seed=0)
    assert prepare_for_training(model) == []
    model.bfloat16()
    model.similarity_fn_name = "dot"
    model.prompts = {"query": "query: ", "document": ""}
    half, similarity, prompts = prepare_for_training(model)
    assert "trained and saved as float32" in half
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert "cosine similarity, evaluation that of the model, dot" in similarity
    assert prompts == "Training and evaluation use the prompts 'query: ' before queries and '' before documents."


def test_a_static_model_is_made_of_a_transformer_or_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    texts = [f"word{number} is number {number}" for number in range(100)]
    load_model("tiny", texts, seed=0).save_pretrained(str(tmp_path / "tiny"))
    first, again = (load_model(f"static:{tmp_path / 'tiny'}", [], seed) for seed in (0, 1))
    assert f"Distilling {tmp_path / 'tiny'} into a static model: each of its " in caplog.text
    caplog.clear()
    assert isinstance(first[0], StaticEmbedding)
    assert torch.equal(first[0].embedding.weight, again[0].embedding.weight)
    assert first.encode("word7 is number 7").shape == (128,)  # the width of the transformer, which is below 256
    first.save_pretrained(str(tmp_path / "made"))
    with pytest.raises(ModelError, match="Give the --output of train"):
        load_trained(f"static:{tmp_path / 'tiny'}")
    loaded = load_model(f"static:{tmp_path / 'made'}", [], seed=0)
    assert torch.equal(loaded[0].embedding.weight, first[0].embedding.weight)
    assert "Distilling" not in caplog.text
    names = (f"static:{tmp_path / 'tiny'}", str(tmp_path / "made"), str(tmp_path / "tiny"), "static")
    assert [learning_rate_of(name) for name in names] == [1e-2, 1e-2, 2e-5, 5e-2]


def test_a_static_model_weighs_tokens_as_model2vec_does(tmp_path: Path):
    texts = [f"word{number} is number {number}" for number in range(100)]
    load_model("tiny", texts, seed=0).save_pretrained(str(tmp_path / "tiny"))
    source = SentenceTransformer(str(tmp_path / "tiny"))
    expected = distill_from_model(source[0].model, source[0].tokenizer, pca_dims=256, quantize_to="float32")
    made, wanted = load_model(f"static:{tmp_path / 'tiny'}", [], seed=0), expected.encode(texts[:8]).astype("float32")
    assert cos_sim(made.encode(texts[:8]), wanted).diagonal().min() > 0.9999
    plain = SentenceTransformer(modules=[StaticEmbedding(expected.tokenizer, embedding_weights=expected.embedding)])
    assert cos_sim(plain.encode(texts[:8]), wanted).diagonal().min() < 0.999  # the test can fail


def test_the_same_texts_give_the_same_tokenizer(tmp_path: Path):
    """The tokens of the random pairs are equally frequent, so most merges are chosen between equals."""
    random_pairs(tmp_path / "pairs.jsonl", 100)
    texts = load_data(str(tmp_path / "pairs.jsonl")).training_texts()
    first = train_tokenizer(texts)
    assert {train_tokenizer(given).to_str() for given in (texts, list(texts), iter(texts))} == {first.to_str()}
    plain = {json.dumps(models._vocabulary_of(texts, models._SPECIALS, models.VOCABULARY)) for _ in range(4)}
    assert len(plain) > 1  # the test can fail
    assert first.get_vocab_size() > 500
    assert [first.id_to_token(number) for number in range(5)] == list(models._SPECIALS)
    assert first.encode("[CLS] ##a").tokens == ["[CLS]", "[UNK]", "[UNK]", "a"]  # "##a" is no special token
    for text in texts:
        assert "[UNK]" not in first.encode(text).tokens


def test_a_comparison_makes_a_static_model_once(tmp_path: Path):
    random_pairs(tmp_path / "pairs.jsonl", 100)
    texts = load_data(str(tmp_path / "pairs.jsonl")).training_texts()
    load_model("tiny", texts, seed=0).save_pretrained(str(tmp_path / "tiny"))
    given = ["--data", tmp_path / "pairs.jsonl", "--model", f"static:{tmp_path / 'tiny'}", "--losses"]
    given += ["zero-shot,in-batch", "--seeds", 2, "--epochs", 1, "--learning-rates", "0.01", "--batch-size", 16]
    ended = invoke("compare", *given, "--output", tmp_path / "out")
    assert ended.exit_code == 0, ended.output
    assert [path.name for path in (tmp_path / "out" / "untrained").iterdir()] == ["static"]
    losses = json.loads((tmp_path / "out" / "compare.json").read_text())["losses"]
    assert [len(loss["runs"]) for loss in losses.values()] == [1, 2]
