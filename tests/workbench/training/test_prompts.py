"""Prompts: training, evaluation and samples encode the same texts, and the saved model has them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from torch import nn

from command_line import DOCUMENTS, invoke
from negative_cache.integrations.sentence_transformers.tokens import TOKENS, to_tokens
from negative_cache.workbench.data import RetrievalData
from negative_cache.workbench.evaluation import evaluate
from negative_cache.workbench.models import load_model, prepare_for_training, prompts_of, set_prompts
from negative_cache.workbench.training.config import GUIDED, LOSSES, RunConfig
from negative_cache.workbench.training.driver import run

QUERY_PROMPT, DOCUMENT_PROMPT = "someone asks: ", "days of the "
QUERIES = {f"q{key}": " ".join(text.split()[1:5]) for key, text in DOCUMENTS.items()}
QRELS = {f"q{key}": [key] for key in DOCUMENTS}
NEGATIVES = {"qd0": ["d7"], "qd1": ["d9"]}


def make_model(kind: str, folder: Path, **prompts: str) -> str:
    model = load_model(kind, [*DOCUMENTS.values(), *QUERIES.values(), QUERY_PROMPT], seed=0)
    model.prompts |= prompts
    if kind == "tiny":
        model[1].include_prompt = False
    model.save_pretrained(str(folder / kind), create_model_card=False)
    return str(folder / kind)


@contextmanager
def recorded() -> Iterator[dict[bool, set[tuple[int, ...]]]]:
    """The token ids of each text that any model encodes, by whether the model is training."""
    found: dict[bool, set[tuple[int, ...]]] = {True: set(), False: set()}

    def record(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if isinstance(module, SentenceTransformer):
            inputs = {key: value for key, value in arguments[0].items() if isinstance(value, torch.Tensor)}
            for key in ("prompt_length", "token_embeddings", "sentence_embedding"):  # a guide has added embeddings
                inputs.pop(key, None)
            for row in to_tokens(inputs)[TOKENS].tolist():
                found[module.training].add(tuple(token for token in row if token))

    handle = nn.modules.module.register_module_forward_pre_hook(record)
    try:
        yield found
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("kind", "loss"),
    [(kind, loss) for kind in ("static", "tiny") for loss in LOSSES if kind == "tiny" or loss not in GUIDED],
)
def test_training_encodes_the_texts_that_evaluation_encodes(
    kind: str, loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The tokens of every query and document, with the prompts; also of given negatives and of the samples."""
    monkeypatch.setattr(SentenceTransformer, "_create_model_card", lambda *_, **__: None)  # which encodes its examples
    model = make_model(kind, tmp_path, query=QUERY_PROMPT, document=DOCUMENT_PROMPT)
    data = RetrievalData("set", DOCUMENTS, QUERIES, {"train": QRELS, "dev": QRELS}, negatives=NEGATIVES)
    config = RunConfig(
        data="set", model=model, loss=loss, output=str(tmp_path / "out"), batch_size=16, epochs=1, eval_steps=3,
        save_steps=None, **({"cache_size": 64} if loss in ("negative-cache", "memory-bank") else {}),
    )  # fmt: skip
    with recorded() as in_run:
        run(config, data)
    with recorded() as in_evaluation:
        evaluate(SentenceTransformer(str(tmp_path / "out")), data, ("train",))
    assert len(in_evaluation[False]) == len(DOCUMENTS) + len(set(QUERIES.values()))
    assert in_run[True] == in_evaluation[False]
    assert in_run[False] == in_evaluation[False]  # the evaluator on dev, the evaluation at the end, the samples


def test_prompts_that_are_given_are_used_and_stored(beir: Path, tmp_path: Path):
    model = make_model("static", tmp_path, query="apple ", document="river ")
    given = ["--data", beir, "--model", model, "--batch-size", 8, "--max-steps", 4, "--cache-size", 64]
    output = tmp_path / "out"
    prompts = ["--query-prompt", QUERY_PROMPT, "--document-prompt", ""]
    ended = invoke("train", *given, *prompts, "--output", output)
    assert ended.exit_code == 0, ended.output
    trained = SentenceTransformer(str(output))
    assert prompts_of(trained) == (QUERY_PROMPT, "")
    record = json.loads((output / "run.json").read_text())
    for more in ((), prompts):
        ended = invoke("evaluate", "--model", output, "--data", beir, "--split", "test", "--json", *more)
        assert json.loads(ended.stdout) == record["after"]
    ended = invoke("evaluate", "--model", model, "--data", beir, "--split", "test", "--json", *prompts)
    assert json.loads(ended.stdout) == record["before"]


def test_compare_uses_prompts_in_training_and_without(beir: Path, tmp_path: Path):
    model = make_model("static", tmp_path)
    given = ["--data", beir, "--model", model, "--query-prompt", QUERY_PROMPT, "--document-prompt", DOCUMENT_PROMPT]
    sizes = ["--batch-size", 8, "--epochs", 1, "--seeds", 1, "--learning-rates", 0.05]
    ended = invoke("compare", *given, *sizes, "--losses", "zero-shot,in-batch", "--output", tmp_path / "out", "--json")
    assert ended.exit_code == 0, ended.output
    losses = json.loads(ended.stdout)["losses"]
    assert losses["in-batch"]["configuration"]["query_prompt"] == QUERY_PROMPT
    ended = invoke("evaluate", *given, "--split", "test", "--json")
    assert json.loads(ended.stdout)["MRR@10"] == losses["zero-shot"]["runs"][0]["after"]["MRR@10"]


@pytest.mark.parametrize(
    ("stored", "default", "expected"),
    [
        ({}, None, ("", "")),
        ({"query": "q: ", "document": "d: ", "passage": "p: "}, None, ("q: ", "d: ")),
        ({"query": "q: ", "document": "", "passage": "p: "}, "query", ("q: ", "")),
        ({"query": "", "document": "d: "}, "document", ("", "d: ")),
    ],
)
def test_the_prompts_are_those_that_sentence_transformers_chooses(
    stored: dict[str, str], default: str | None, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch
):
    model = load_model("static", ["a text"], seed=0)
    model.prompts, model.default_prompt_name = stored, default
    assert prompts_of(model) == expected
    seen = []
    monkeypatch.setattr(StaticEmbedding, "_prepend_prompt", lambda self, texts, prompt: seen.append(prompt) or texts)
    model.encode_query(["a text"])
    model.encode_document(["a text"])
    assert seen == [prompt for prompt in expected if prompt]


def test_one_note_names_the_prompts_and_those_that_are_not_used():
    model = load_model("tiny", ["a text"], seed=0)
    assert isinstance(model[1], Pooling)
    assert prepare_for_training(model) == []
    set_prompts(model, "query: ", None)
    model.prompts["passage"] = "passage: "
    (note,) = prepare_for_training(model)
    assert note == (
        "Training and evaluation use the prompts 'query: ' before queries and '' before documents. The model also has "
        "passage ('passage: '), not used; --query-prompt and --document-prompt set others."
    )
