"""What training and evaluation cost on this machine, measured with a few steps and texts."""

from __future__ import annotations

import itertools
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import TrainerCallback

from negative_cache.sampling.config import AUTO_SAMPLES, is_auto
from negative_cache.workbench.compare.comparison import Comparison
from negative_cache.workbench.counting import percent
from negative_cache.workbench.data import RetrievalData, load_data
from negative_cache.workbench.evaluation import DEFAULT_MEASURES, OnProgress, judge, parse_measures
from negative_cache.workbench.evaluation.encoding import encoding
from negative_cache.workbench.evaluation.encoding_options import EncodingOptions
from negative_cache.workbench.evaluation.searching import BestDocuments
from negative_cache.workbench.models import cache_tokens, load_trained
from negative_cache.workbench.training.config import RunConfig, mining_start
from negative_cache.workbench.training.cut_texts import note_on_cut_texts
from negative_cache.workbench.training.memory_bank import MemoryBankLoss
from negative_cache.workbench.training.preparation import add_lora, prepare
from negative_cache.workbench.training.trainer import RunTrainer, make_trainer, train_to_the_end

TRAINING_SECONDS, ENCODING_SECONDS = 10.0, 2.0  # of all losses together, and of the documents
MAX_STEPS, MIN_STEPS = 12, 3  # of a loss, unless they take too long
MIN_BATCH, MIN_TEXTS, MAX_DOCUMENTS, MAX_QUERIES = 8, 32, 16_384, 512
SECONDS_OF_SHARE, SHARE_IF_ALONE = 0.3, 0.75  # of the time of the processors
FORWARD_PASSES = 6  # that a query and its document take, with the backward passes

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class TrainingCost:
    """The cost of training with a loss.

    Attributes:
        seconds: Time per query.
        seconds_per_step: Time of the optimizer per step.
        documents: Number of documents that are encoded per query, as `Meter` counts them.
    """

    seconds: float
    seconds_per_step: float
    documents: float


@dataclass(frozen=True)
class Costs:
    """Seconds that the parts of a comparison take, and documents that training encodes.

    Attributes:
        start: Loading the data and the model.
        tokens: Tokenizing a document before training; 0 for a transformer, which tokenizes when it encodes.
        document: Encoding a document.
        query: Encoding a query.
        score: Searching a document for a query, without the encoding.
        judgement: Judging the results of a query.
        training: Loss with its settings -> its cost, without mining and without filling the cache from the corpus.
        notes: What the user should know about the texts and the machine, a line each.
    """

    start: float
    tokens: float
    document: float
    query: float
    score: float
    judgement: float
    training: dict[str, TrainingCost]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Probe:
    """Measures the costs, as a task of `run_isolated`.

    Attributes:
        comparison: The comparison. The model before training with seed 0 exists.
        losses: The losses to measure, with their settings.
    """

    comparison: Comparison
    losses: tuple[str, ...]

    def __call__(self, on_progress: OnProgress) -> Costs:
        """Measure them. `on_progress` is called with (done, total) losses."""
        rate = self.comparison.rates()[0]
        configs = {spec: self.comparison.run_config(spec, rate, 0) for spec in self.losses}
        began = time.perf_counter()
        data = load_data(self.comparison.data, self.comparison.data_options).with_dev()
        model = _load(next(iter(configs.values())))
        start = time.perf_counter() - began
        of_evaluation = _evaluation(model, data)
        seconds, training = TRAINING_SECONDS / len(configs), dict[str, TrainingCost]()
        per_query = FORWARD_PASSES * of_evaluation["document"]
        for done, (spec, config) in enumerate(configs.items()):
            on_progress(done, len(configs))
            training[spec] = _training(config, data, seconds, per_query)
            per_query = training[spec].seconds
        notes = (
            note_on_cut_texts(model, data, self.comparison.max_seq_length),
            note_on_other_programs(_share_of_processors()) if model.device.type == "cpu" else None,
        )
        return Costs(start, **of_evaluation, training=training, notes=tuple(note for note in notes if note is not None))


def note_on_other_programs(share: float) -> str | None:
    """A sentence if this program gets a small share of the time of the processors that it uses."""
    if share > SHARE_IF_ALONE:
        return None
    return (
        f"Other programs use the processors: this one gets {percent(share)} of their time. Without them, the "
        "comparison takes a fraction of the estimate."
    )


def _share_of_processors() -> float:
    """The share of the time of the processors that this process gets in a computation that could use all of it."""
    matrix = torch.rand(1024, 1024)
    began, used = time.perf_counter(), time.process_time()
    while (seconds := time.perf_counter() - began) < SECONDS_OF_SHARE:
        matrix @ matrix
    return (time.process_time() - used) / (seconds * torch.get_num_threads())


def _load(config: RunConfig) -> SentenceTransformer:
    """The model of a run before training."""
    model = load_trained(config.model)
    prepare(model, config)
    if config.lora is not None:
        add_lora(model, config.lora, config.seed)
    return model


def _evaluation(model: SentenceTransformer, data: RetrievalData) -> dict[str, float]:
    """The fields of `Costs` that an evaluation on the test split has."""
    part, graded = data.part("test"), data.graded("test")
    documents, queries = _sample(list(part.corpus), MAX_DOCUMENTS), _sample(list(graded), MAX_QUERIES)
    texts, of_queries = [part.corpus[key] for key in documents], [part.queries[key] for key in queries]
    with encoding(model, EncodingOptions()) as encoder:
        encoder.queries(of_queries[:MIN_TEXTS])  # the first call takes longer
        _, seconds = _timed(lambda: encoder.documents(texts[:MIN_TEXTS], lambda _: None))
        count = max(MIN_TEXTS, int(len(texts[:MIN_TEXTS]) * ENCODING_SECONDS / seconds))
        texts, of_queries = texts[:count], of_queries[: max(MIN_TEXTS, count // 8)]
        _, tokens = _timed(lambda: cache_tokens(model, texts))
        embeddings, of_documents = _timed(lambda: encoder.documents(texts, lambda _: None))
        embedded, of_query = _timed(lambda: encoder.queries(of_queries))
    run = {query: {document: -float(rank) for rank, document in enumerate(documents[:100])} for query in queries}
    judged = {query: graded[query] for query in queries}
    _, judging = _timed(lambda: judge(judged, run, parse_measures(DEFAULT_MEASURES)))
    return {
        "tokens": tokens / len(texts),
        "document": of_documents / len(texts),
        "query": of_query / len(of_queries),
        "score": _searching(model, embedded, embeddings),
        "judgement": judging / len(queries),
    }


@torch.no_grad()
def _searching(model: SentenceTransformer, queries: Tensor, documents: Tensor) -> float:
    """Seconds to search a document for a query, measured with copies of these embeddings."""
    queries, documents = (
        every[torch.arange(count, device=every.device) % len(every)]
        for every, count in ((queries, MAX_QUERIES), (documents, MAX_DOCUMENTS))
    )
    best = BestDocuments(queries, model.similarity, 100, torch.full((len(queries),), -1))
    _, seconds = _timed(lambda: best.add(documents, torch.arange(len(documents)), 0))
    return seconds / (len(queries) * len(documents))


def _timed(work: Callable[[], _Result]) -> tuple[_Result, float]:
    """The result of a piece of work, and its seconds."""
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began


def _training(config: RunConfig, data: RetrievalData, seconds: float, per_query: float) -> TrainingCost:
    """The cost of a loss; of mined, the mean over all steps of those before and after negatives are mined.

    Args:
        config: The configuration of a run with the loss.
        data: The data.
        seconds: Time of the steps that are timed.
        per_query: Expected time of a query in training, which limits the batch size.
    """
    early = mining_start(config) if config.loss == "mined" else 1.0
    parts = [(early, 0), (1 - early, config.num_negatives)]
    found = [
        (share, _train(config, _rows(data, config, num_mined), seconds, per_query))
        for share, num_mined in parts
        if share
    ]
    means = (sum(share * getattr(cost, field.name) for share, cost in found) for field in fields(TrainingCost))
    return TrainingCost(*means)


def _train(config: RunConfig, rows: Dataset, seconds: float, per_query: float) -> TrainingCost:
    """The cost of a few steps, with a smaller batch if the model is slow."""
    batch_size = min(config.batch_size, len(rows), max(MIN_BATCH, int(seconds / MIN_STEPS / per_query)))
    model = _load(config)
    cache_tokens(model, (text for name in ("anchor", "positive") for text in rows[name]))
    with tempfile.TemporaryDirectory() as folder:
        few = replace(
            config,
            output=folder,
            batch_size=batch_size,
            max_steps=MAX_STEPS,
            gradient_accumulation_steps=1,
            num_samples=_num_samples(config),
            torch_compile=False,  # which takes minutes
            eval_steps=None,
            load_best_model_at_end=False,
            early_stopping_patience=None,
        )
        trainer = make_trainer(Path(folder), few, rows, model)
        if isinstance(trainer.loss, MemoryBankLoss):  # as in the middle of training
            trainer.loss.num_written.fill_(min(config.cache_size, len(rows)) // 2)
        timer = _Timer(trainer, seconds)
        trainer.add_callback(timer)
        train_to_the_end(trainer)
    return timer.cost(_padding(trainer, rows, config.batch_size, batch_size))


def _num_samples(config: RunConfig) -> float | Literal["auto"]:
    """The number of samples once the cache counts: "auto" waits for that."""
    is_waiting = is_auto(config.num_samples, config.shared, config.in_batch) and config.loss == "negative-cache"
    return AUTO_SAMPLES if is_waiting else config.num_samples


class _Timer(TrainerCallback):
    """Times the steps after the first one, and stops training."""

    def __init__(self, trainer: RunTrainer, seconds: float) -> None:
        self._trainer = trainer
        self._seconds = seconds
        self._points: list[tuple[float, float, int, int]] = []  # after each step
        self._optimizing = 0.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._optimizing -= time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._optimizing += time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        meter = self._trainer.meter
        self._points.append((meter.seconds, self._optimizing, meter.documents, meter.state()["queries"]))
        is_enough = meter.seconds - self._points[0][0] > self._seconds
        control.should_training_stop |= is_enough  # never after the first step

    def cost(self, padding: float) -> TrainingCost:
        """The cost, if the time of the queries is multiplied by `padding`."""
        seconds, optimizing, documents, queries = (
            end - begin for begin, end in zip(self._points[0], self._points[-1], strict=True)
        )
        steps = len(self._points) - 1
        return TrainingCost(padding * (seconds - optimizing) / queries, optimizing / steps, documents / queries)


def _padding(trainer: RunTrainer, rows: Dataset, size: int, measured: int) -> float:
    """Tokens of a batch, with its padding, in relation to those of the same rows in batches of the measured size."""
    chosen = [rows[at] for at in range(min(size, len(rows)))]

    def tokens(part: list[dict[str, Any]]) -> int:
        features = trainer.data_collator(part)
        return sum(value.numel() for name, value in features.items() if name.endswith("input_ids"))

    return tokens(chosen) / sum(tokens(chosen[at : at + measured]) for at in range(0, len(chosen), measured))


def _rows(data: RetrievalData, config: RunConfig, num_mined: int) -> Dataset:
    """The training set of a sample of the queries, each with this number of negatives that stand for mined ones."""
    train, rng = data.judged("train"), random.Random(0)
    queries = _sample(list(train), config.batch_size * (MAX_STEPS if config.batch_size <= MAX_QUERIES else MIN_STEPS))
    negatives = dict(data.negatives)
    if num_mined:
        documents = list(itertools.islice(data.corpus, MAX_DOCUMENTS))
        for query in queries:
            negatives[query] = [*negatives.get(query, ()), *rng.choices(documents, k=num_mined)]
    return replace(
        data, qrels={"train": {query: train[query] for query in queries}}, negatives=negatives
    ).training_set()


def _sample(keys: list[str], count: int) -> list[str]:
    """Up to `count` of the keys, in a random order that is always the same."""
    return random.Random(0).sample(keys, min(count, len(keys)))
