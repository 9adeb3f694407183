"""The settings with the names of sentence-transformers' arguments: each has its effect in a real run."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaModel
from transformers.models.bert.modeling_bert import BertIntermediate

from command_line import DOCUMENTS, invoke
from negative_cache.workbench.compare.comparison import Comparison
from negative_cache.workbench.data import RetrievalData
from negative_cache.workbench.evaluation import evaluate
from negative_cache.workbench.model_names import ModelError
from negative_cache.workbench.models import load_model
from negative_cache.workbench.training import trainer
from negative_cache.workbench.training.config import RunConfig, RunError, TrainingSettings
from negative_cache.workbench.training.driver import RunOptions, run
from negative_cache.workbench.training.preparation import prepare
from negative_cache.workbench.training.record import RunRecord

STEPS, RATE = 6, 1e-3
QUERIES = {f"q{key}": " ".join(text.split()[1:5]) for key, text in DOCUMENTS.items()}
QRELS = {f"q{key}": [key] for key in DOCUMENTS}
DATA = RetrievalData("set", DOCUMENTS, QUERIES, {"train": QRELS, "test": QRELS})


class Trained:
    def __init__(self, folder: Path, record: RunRecord) -> None:
        self.folder = folder
        self.record = record
        self.model = SentenceTransformer(str(folder))
        logs = [row for row in record.history if "loss" in row]
        self.losses = torch.tensor([row["loss"] for row in logs])
        self.rates = [row["learning_rate"] for row in logs]

    def change(self, start: Path) -> float:
        """The distance of the weights from those before training."""
        return float((weights(self.model) - weights(SentenceTransformer(str(start)))).norm())


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model before training."""
    folder = tmp_path_factory.mktemp("start") / "model"
    load_model("tiny", DOCUMENTS.values(), seed=0).save_pretrained(str(folder), create_model_card=False)
    return folder


@pytest.fixture(scope="module")
def trained(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """With the default settings."""
    return train(start, tmp_path_factory.mktemp("default"))


def weights(model: SentenceTransformer) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def train(start: Path, folder: Path, loss: str = "negative-cache", **settings: Any) -> Trained:
    config = RunConfig(
        data="set", model=str(start), loss=loss,
        output=str(folder / "out"), batch_size=8, max_steps=STEPS, learning_rate=RATE, save_steps=None,
        **({"cache_size": 64, "num_samples": 1} if loss == "negative-cache" else {}), **settings,
    )  # fmt: skip
    record = run(config, DATA, RunOptions(measure_before=False))
    assert record is not None
    return Trained(folder / "out", record)


@pytest.mark.parametrize(
    ("schedule", "ratio", "expected"),
    [
        ("linear", 0.1, [0, 1, 0.8, 0.6, 0.4, 0.2]),
        ("linear", 0.0, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("cosine", 0.5, [0, 1 / 3, 2 / 3, 1, 0.75, 0.25]),
        ("constant_with_warmup", 0.5, [0, 1 / 3, 2 / 3, 1, 1, 1]),
        ("constant", 0.1, [1] * 6),
    ],
)
def test_the_learning_rate_has_its_schedule(
    start: Path, tmp_path: Path, schedule: str, ratio: float, expected: list[float]
):
    found = train(start, tmp_path, "in-batch", lr_scheduler_type=schedule, warmup_ratio=ratio)
    assert found.rates == pytest.approx([RATE * factor for factor in expected])


def test_weight_decay_shrinks_the_weights(start: Path, trained: Trained, tmp_path: Path):
    found = train(start, tmp_path, weight_decay=100.0)
    words, others = (each.model[0].model.embeddings.word_embeddings.weight for each in (found, trained))
    assert words.norm() < 0.8 * others.norm()


def test_a_small_norm_of_the_gradient_trains_less(start: Path, trained: Trained, tmp_path: Path):
    assert train(start, tmp_path / "small", max_grad_norm=1e-9).change(start) < 0.2 * trained.change(start)
    assert train(start, tmp_path / "none", max_grad_norm=0.0).change(start) > 0.5 * trained.change(start)


@pytest.mark.parametrize("loss", ["in-batch", "gradcache", "memory-bank", "negative-cache"])
def test_accumulation_uses_more_batches_per_step(start: Path, tmp_path: Path, loss: str):
    found = train(start, tmp_path, loss, gradient_accumulation_steps=2, max_grad_norm=0.0)
    assert (found.record.steps, len(found.losses)) == (STEPS, STEPS)
    documents = found.record.documents_encoded / (2 if loss == "gradcache" else 1)
    assert documents >= 2 * 8 * STEPS
    if loss != "negative-cache":  # which re-encodes documents in addition
        assert documents == 2 * 8 * STEPS


def test_accumulated_gradients_are_means_over_the_batches(start: Path, trained: Trained, tmp_path: Path):
    norms = [
        train(start, tmp_path / str(count), "in-batch", gradient_accumulation_steps=count).record.history[0]
        for count in (1, 4)
    ]
    assert norms[1]["loss"] == pytest.approx(norms[0]["loss"], rel=0.1)
    assert 0.4 * norms[0]["grad_norm"] < norms[1]["grad_norm"] < 1.2 * norms[0]["grad_norm"]


@contextmanager
def counted_layers() -> Iterator[list[int]]:
    """How often a layer is computed with gradient."""
    count = [0]

    def hook(module: nn.Module, arguments: Any) -> None:
        count[0] += isinstance(module, BertIntermediate) and module.training and torch.is_grad_enabled()

    handle = nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        yield count
    finally:
        handle.remove()


@pytest.mark.parametrize("loss", ["gradcache", "negative-cache"])
def test_gradient_checkpointing_computes_layers_twice_with_the_same_result(start: Path, tmp_path: Path, loss: str):
    runs, counts = [], []
    for uses_it in (False, True):
        with counted_layers() as count:
            runs.append(train(start, tmp_path / str(uses_it), loss, gradient_checkpointing=uses_it))
        counts += count
    assert counts[1] == 2 * counts[0] > 0
    torch.testing.assert_close(weights(runs[1].model), weights(runs[0].model), atol=1e-4, rtol=0)


@pytest.mark.parametrize("loss", ["in-batch", "gradcache", "memory-bank", "negative-cache"])
def test_bf16_is_close_to_float32_and_the_model_is_evaluated_without_it(start: Path, tmp_path: Path, loss: str):
    exact = train(start, tmp_path / "exact", loss)
    dtypes: dict[bool, set[torch.dtype]] = {True: set(), False: set()}  # of the outputs, by whether the model trains

    def record(module: nn.Module, arguments: Any, output: Any) -> None:
        if isinstance(module, nn.Linear):
            dtypes[module.training].add(output.dtype)

    handle = nn.modules.module.register_module_forward_hook(record)
    try:
        found = train(start, tmp_path / "found", loss, bf16=True)
    finally:
        handle.remove()
    assert dtypes == {True: {torch.bfloat16}, False: {torch.float32}}
    difference = (found.losses - exact.losses).abs()
    assert 0 < difference.max() < 0.3
    assert {parameter.dtype for parameter in found.model.parameters()} == {torch.float32}
    assert found.record.after == evaluate(found.model, DATA, ("test",))["test"].metrics()


def test_a_compiled_model_trains_alike_and_its_documents_are_counted(
    start: Path, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = functools.partial(trainer.SentenceTransformerTrainingArguments, torch_compile_backend="eager")
    monkeypatch.setattr(trainer, "SentenceTransformerTrainingArguments", arguments)  # the default takes minutes
    compiled = []
    compile_model = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compiled.append(1) or compile_model(*args, **kwargs))
    found = train(start, tmp_path, torch_compile=True)
    assert compiled
    torch.testing.assert_close(found.losses, trained.losses, atol=1e-3, rtol=1e-3)
    assert found.record.documents_encoded == trained.record.documents_encoded
    assert found.record.after == evaluate(found.model, DATA, ("test",))["test"].metrics()


def test_the_saved_model_has_the_length_limit(start: Path, trained: Trained, tmp_path: Path):
    found = train(start, tmp_path, max_seq_length=6)
    assert (trained.model.max_seq_length, found.model.max_seq_length) == (128, 6)
    assert found.model.preprocess(list(DOCUMENTS.values()))["input_ids"].shape[1] == 6
    assert found.record.after == evaluate(found.model, DATA, ("test",))["test"].metrics()
    with pytest.raises(ModelError, match="--max-seq-length is 129; the model has positions for 128 tokens"):
        train(start, tmp_path / "long", max_seq_length=129)
    assert not list((tmp_path / "long").glob("*"))


def test_without_dropout_a_text_has_one_embedding_in_training(start: Path, trained: Trained, tmp_path: Path):
    def varies(model: SentenceTransformer) -> bool:
        features = model.train().preprocess(["a text of some words"])
        first, second = (model(dict(features))["sentence_embedding"] for _ in range(2))
        return not torch.equal(first, second)

    found = train(start, tmp_path, dropout=0.0)
    assert varies(trained.model)
    assert not varies(found.model)
    assert found.record.history[1]["cache/staleness"] < trained.record.history[1]["cache/staleness"]
    assert varies(train(tmp_path / "out", tmp_path / "again", dropout=0.5).model)


def test_a_model_without_dropout_is_refused(tmp_path: Path):
    model = SentenceTransformer(modules=[nn.Embedding(4, 2)])
    with pytest.raises(RunError, match="--dropout has no effect: the model has no dropout"):
        prepare(model, TrainingSettings(dropout=0.1))


def test_a_model_of_the_kind_of_roberta_has_positions_for_fewer_tokens_than_its_configuration_says(tmp_path: Path):
    start = tmp_path / "start"
    tiny = load_model("tiny", DOCUMENTS.values(), seed=0)[0]
    config = RobertaConfig(
        vocab_size=len(tiny.tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=18, pad_token_id=tiny.tokenizer.pad_token_id,
    )  # fmt: skip
    for part in (RobertaModel(config), tiny.tokenizer):
        part.save_pretrained(str(tmp_path / "parts"))
    body = Transformer(str(tmp_path / "parts"))
    model = SentenceTransformer(modules=[body, Pooling(body.get_embedding_dimension())], device="cpu")
    model.save_pretrained(str(start), create_model_card=False)
    text = " ".join(DOCUMENTS.values())
    data = replace(DATA, corpus={**DOCUMENTS, "d0": text})
    found = run(at(start, tmp_path, 17), data, RunOptions(measure_before=False))
    assert found is not None
    assert found.after == evaluate(SentenceTransformer(str(tmp_path / "out 17")), data, ("test",))["test"].metrics()
    model.max_seq_length = 18
    with pytest.raises((IndexError, RuntimeError), match="index"):
        model.encode([text])
    for length in (18, 19):
        with pytest.raises(ModelError, match=f"--max-seq-length is {length}; the model has positions for 17 tokens"):
            run(at(start, tmp_path, length), data)


def at(start: Path, folder: Path, length: int) -> RunConfig:
    return RunConfig(
        data="set", model=str(start), loss="in-batch", output=str(folder / f"out {length}"), batch_size=8, max_steps=2,
        save_steps=None, max_seq_length=length,
    )  # fmt: skip


@pytest.mark.parametrize("loss", ["gradcache", "negative-cache"])
def test_lora_trains_adapters_and_saves_them_merged(
    start: Path, tmp_path: Path, loss: str, caplog: pytest.LogCaptureFixture
):
    found = train(start, tmp_path, loss, lora=4, gradient_checkpointing=True)
    before, after = (dict(model.named_parameters()) for model in (SentenceTransformer(str(start)), found.model))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layers = {f"0.model.encoder.layer.{n}." for n in (0, 1)}
    kinds = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    kinds += ("intermediate.dense", "output.dense")
    assert changed == {f"{layer}{kind}.weight" for layer in layers for kind in kinds}
    assert max(torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) for name in changed) <= 4
    assert found.record.after == evaluate(found.model, DATA, ("test",))["test"].metrics()
    trained = 2 * 4 * (4 * (128 + 128) + 2 * (128 + 512))
    assert f"LoRA of rank 4 trains {trained:,} parameters, and keeps " in caplog.text


def test_a_run_with_lora_resumes_and_keeps_its_best_model(start: Path, tmp_path: Path):
    data = replace(DATA, qrels={**DATA.qrels, "dev": QRELS})
    results = []
    for name in ("whole", "stopped"):
        config = RunConfig(
            data="set", model=str(start), loss="negative-cache", output=str(tmp_path / name), batch_size=8, lora=4,
            cache_size=64, max_steps=6, save_steps=2, eval_steps=2, load_best_model_at_end=True, learning_rate=1e-2,
        )  # fmt: skip

        def stop(step: int, steps: int, logs: dict[str, float]) -> None:
            if step == 5:
                raise RuntimeError("enough")

        if name == "stopped":
            with pytest.raises(RuntimeError, match="enough"):
                run(config, data, on_step=stop)
        record = run(config, data, resume=True)
        assert record is not None
        results.append((record.best_step, weights(SentenceTransformer(str(tmp_path / name)))))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-5, rtol=0)


def test_logs_go_where_they_are_wanted(start: Path, trained: Trained, tmp_path: Path):
    assert (trained.folder / "tensorboard").is_dir()
    assert not (train(start, tmp_path, report_to="none").folder / "tensorboard").exists()
    with pytest.raises(RunError, match="--report-to has 'tensorbord'; expected none, or some of"):
        train(start, tmp_path / "other", report_to="tensorbord")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bf16": True, "fp16": True}, "--bf16 and --fp16 are both given"),
        ({"warmup_ratio": 1.0}, "--warmup-ratio is 1.0; it is a share of the steps"),
        ({"warmup_ratio": 0.3, "lr_scheduler_type": "constant"}, "Use constant_with_warmup"),
        ({"lr_scheduler_type": "cosin"}, "--lr-scheduler-type is 'cosin'; expected one of linear, cosine"),
        ({"dropout": 1.0}, "--dropout is 1.0; it is a probability, from 0 to below 1"),
        ({"dropout": 0.0}, "--dropout has no effect on static embeddings, which have none"),
        ({"weight_decay": -1.0}, "--weight-decay is -1.0; it must be 0 or positive"),
        ({"gradient_accumulation_steps": 0}, "--gradient-accumulation-steps is 0; it must be positive"),
        ({"gradient_checkpointing": True}, "--gradient-checkpointing has no effect on static embeddings, which store"),
        ({"bf16": True}, "--bf16 has no effect on static embeddings"),
        ({"torch_compile": True}, "--torch-compile has no effect on static embeddings"),
        ({"lora": 4}, "--lora has no effect on static embeddings"),
        ({"max_seq_length": 64}, "--max-seq-length has no effect on static embeddings"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_train_and_compare(settings: dict[str, Any], message: str):
    with pytest.raises(RunError, match=message):
        RunConfig(data="d", model="static", loss="in-batch", output="o", **settings)
    with pytest.raises(RunError, match=message):
        Comparison(data="d", model="static", losses=("in-batch",), output="o", **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_fp16_needs_a_gpu():
    with pytest.raises(RunError, match="--fp16 needs a GPU"):
        RunConfig(data="d", model="tiny", loss="in-batch", output="o", fp16=True)


def test_a_static_model_in_a_folder_is_refused_before_training(beir: Path, tmp_path: Path):
    load_model("static", DOCUMENTS.values(), seed=0).save_pretrained(str(tmp_path / "model"))
    given = ["--data", beir, "--model", tmp_path / "model", "--output", tmp_path / "out", "--bf16"]
    ended = invoke("train", *given)
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert "--bf16 has no effect on static embeddings" in ended.stderr
    assert not list(tmp_path.glob("out*"))
