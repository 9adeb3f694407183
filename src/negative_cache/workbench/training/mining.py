"""Hard negatives that the model finds in the corpus, before or during training: the loss `mined`."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import mine_hard_negatives
from torch import Tensor
from torch.nn.functional import normalize
from transformers import TrainerCallback

from negative_cache.workbench.counting import counted
from negative_cache.workbench.data import RetrievalData
from negative_cache.workbench.evaluation.encoding import OnProgress, encoding
from negative_cache.workbench.evaluation.encoding_options import EncodingOptions
from negative_cache.workbench.files import write_json
from negative_cache.workbench.training.config import MINED_RELATIVE_MARGIN, RunConfig, mining_start
from negative_cache.workbench.training.meter import Meter
from negative_cache.workbench.training.record import read_json

logger = logging.getLogger("negative_cache")

SCORES_PER_BLOCK = 1 << 24

Negatives = dict[str, list[str]]
"""Query id -> ids of documents, the most similar one first."""


@dataclass(frozen=True)
class Mined:
    """A round of mining.

    Attributes:
        step: The training step after which it was done.
        seconds: Its time.
        texts_encoded: Number of documents and queries that it encoded.
        pairs_with_fewer: Number of training pairs whose query has fewer than `num_negatives`.
        negatives: The negatives.
    """

    step: int
    seconds: float
    texts_encoded: int
    pairs_with_fewer: int
    negatives: Negatives

    def summary(self) -> dict[str, Any]:
        """All but the negatives."""
        return {key: value for key, value in asdict(self).items() if key != "negatives"}


class Mining:
    """The rounds of mining of a run. They are files in its folder, so that a resumed run has the same negatives.

    Args:
        config: The configuration. Losses other than mined have no rounds.
        data: The data.
        folder: Folder of the unfinished run.
        on_progress: Called with (done, total) documents while the corpus is encoded.
    """

    def __init__(self, config: RunConfig, data: RetrievalData, folder: Path, on_progress: OnProgress | None) -> None:
        self._config = config
        self._data = data
        self._folder = folder
        self._on_progress = on_progress

    def begins_before_training(self) -> bool:
        """Whether a round is due before the first step."""
        return 0.0 in self._points()

    def steps(self, num_steps: int) -> set[int]:
        """The steps after which a round is due, except before the first step and after the last one."""
        return {max(1, round(point * num_steps)) for point in self._points() if point} - {num_steps}

    def mine(self, model: SentenceTransformer, step: int) -> Mined:
        """Do the round that is due after a step, and save it."""
        began = time.perf_counter()
        negatives, texts_encoded = mine(model, self._data, self._config, self._on_progress)
        few = [
            len(relevant)
            for query, relevant in self._data.judged("train").items()
            if len(negatives[query]) < self._config.num_negatives
        ]
        mined = Mined(step, round(time.perf_counter() - began, 3), texts_encoded, sum(few), negatives)
        write_json(self._folder / f"mined-{step}.json", asdict(mined))
        if mined.pairs_with_fewer:
            logger.warning(self._note(mined))
        return mined

    def until(self, step: int) -> list[Mined]:
        """The rounds that were done until a step, the first one first."""
        paths = {int(path.stem.removeprefix("mined-")): path for path in self._folder.glob("mined-*.json")}
        return [Mined(**read_json(paths[done])) for done in sorted(paths) if done <= step]

    def data_with_negatives(self, step: int) -> RetrievalData:
        """The data with the latest negatives that were mined until a step, after those of the data."""
        rounds = self.until(step)
        if not rounds:
            return self._data
        given = self._data.negatives
        together = {
            query: list(dict.fromkeys([*given.get(query, ()), *mined])) for query, mined in rounds[-1].negatives.items()
        }
        return replace(self._data, negatives={**given, **together})

    def notes(self, step: int) -> list[str]:
        """What is to be known about the rounds until a step, one line each."""
        rounds, wanted = self.until(step), len(self._points())
        notes = [self._note(mined) for mined in rounds if mined.pairs_with_fewer]
        if len(rounds) < wanted:
            notes.append(
                f"Negatives were mined {counted(len(rounds), 'time')} instead of {wanted}: training ended before."
            )
        return notes

    def _note(self, mined: Mined) -> str:
        pairs = self._data.num_pairs("train")
        return (
            f"{self._data.name}: mining after step {mined.step:,} found fewer negatives than --num-negatives, "
            f"{self._config.num_negatives}, for {mined.pairs_with_fewer:,} of {pairs:,} pairs. They are trained with "
            "those that there are."
        )

    def _points(self) -> list[float]:
        """The fractions of the steps after which a round is due."""
        if self._config.loss != "mined":
            return []
        start, rounds = mining_start(self._config), self._config.mining_rounds
        return [start + (1 - start) * done / rounds for done in range(rounds)]


class StopToMine(TrainerCallback):
    """Mines negatives at the steps at which that is due, saves a checkpoint and stops training.

    The caller continues from the checkpoint with the new negatives. The order of the pairs does not depend on them.
    """

    def __init__(self, mining: Mining, meter: Meter) -> None:
        self._mining = mining
        self._meter = meter

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step not in self._mining.steps(state.max_steps):
            return
        with self._meter.paused():
            mined = self._mining.mine(model, state.global_step)
        self._meter.add(mined.seconds, mined.texts_encoded)
        control.should_save = control.should_training_stop = True


@torch.no_grad()
def mine(
    model: SentenceTransformer, data: RetrievalData, config: RunConfig, on_progress: OnProgress | None = None
) -> tuple[Negatives, int]:
    """Mine negatives of each training query from the corpus with `mine_hard_negatives`, by cosine similarity.

    Texts that are equal count as one. Documents that are never negatives of a query count as its positives. The
    embeddings and texts of the whole corpus are in memory.

    Args:
        model: The model.
        data: The data.
        config: Sets the number of negatives, the range, the margin and the strategy.
        on_progress: Called with (done, total) documents.

    Returns:
        The negatives, empty lists included; and the number of documents and queries that were encoded.
    """
    train, ids = data.judged("train"), dict[str, str]()
    for key, text in data.corpus.items():
        ids.setdefault(text, key)
    pairs: dict[str, list[str]] = {"anchor": [], "positive": []}
    for query, relevant in train.items():
        for document in data.never_negative(query, relevant):
            pairs["anchor"].append(data.queries[query])
            pairs["positive"].append(data.corpus[document])
    embedded = _Embedded(model, list(ids), list(dict.fromkeys(pairs["anchor"])), on_progress)
    margin = MINED_RELATIVE_MARGIN if config.relative_margin is None else config.relative_margin
    with contextlib.redirect_stderr(io.StringIO()), _seeded(config.seed):  # its progress bar cannot be disabled
        found = mine_hard_negatives(
            Dataset.from_dict(pairs),
            embedded,
            corpus=list(ids),
            range_min=config.range_min,
            range_max=config.range_max,
            relative_margin=margin,
            num_negatives=config.num_negatives,
            sampling_strategy=config.sampling_strategy,
            output_format="labeled-pair",
            faiss_batch_size=max(1, SCORES_PER_BLOCK // len(ids)),
            verbose=False,
        )
    by_text: dict[str, list[str]] = defaultdict(list)
    for row in found:
        if row["label"] == 0:
            by_text[row["anchor"]].append(ids[row["positive"]])
    return {query: by_text[data.queries[query]] for query in train}, embedded.num_texts


class _Embedded:
    """What `mine_hard_negatives` uses of a model, with embeddings that are computed with progress and less padding.

    Args:
        model: The model.
        documents: Different texts. All positives are among them.
        queries: Different texts.
        on_progress: Called with (done, total) documents.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        documents: list[str],
        queries: list[str],
        on_progress: OnProgress | None,
    ) -> None:
        self.device = model.device
        self.similarity = model.similarity
        self.similarity_pairwise = model.similarity_pairwise
        self.num_texts = len(documents) + len(queries)

        def report(done: int) -> None:
            if on_progress is not None:
                on_progress(done, len(documents))

        with encoding(model, EncodingOptions()) as encoder:
            self._documents = normalize(encoder.documents(documents, report), dim=-1)
            self._queries = normalize(encoder.queries(queries), dim=-1)

    def encode_document(self, texts: list[str], **_: Any) -> Tensor:
        """The embeddings of the documents."""
        return self._documents

    def encode_query(self, texts: list[str], **_: Any) -> Tensor:
        """The embeddings of the queries."""
        return self._queries


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed Python's random numbers in this context."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
