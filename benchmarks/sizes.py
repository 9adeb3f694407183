"""The sizes that are measured and their targets: `full` for a CPU, `gpu` for a GPU, `tiny` for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

MEMORY_TARGET_MB = 24  # a step at batch 128, for any number of rows
SLOPE_TARGET = 1.2  # time per row, relative to the bare product
PASS_TARGET = 1.15  # the fused pass on a GPU, relative to the bare product
END_TO_END_TARGET = 1.6  # a training step with num_samples=1, relative to plain in-batch
BUDGET_TARGETS = {"1/4": 1.2, "auto": 1.25}  # by num_samples: a training step, relative to plain in-batch
DATA_TARGET_MB = 2000  # peak memory of a process that reads, describes, trains on or evaluates 1,000,000 documents
VARIANCE_TARGETS = {64: 0.4, 256: 0.25}  # by batch: the gradient with num_samples=1, relative to the paper's


@dataclass(frozen=True)
class Size:
    """One step of a cache.

    Attributes:
        batch: Queries, each with one document.
        rows: Rows of the cache.
        dim: Dimensions of embeddings.
        top_k: Restrict the softmax to the best row of each of top_k groups; None for all rows.
        dtype: Stored dtype of embeddings.
        length: Values of each of the two int32 features of a document.
        target: Highest ratio to the time of the dense step; None for no target.
    """

    batch: int
    rows: int
    dim: int
    top_k: int | None
    dtype: str
    length: int = 128
    target: float | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def mode(self) -> str:
        return "all rows" if self.top_k is None else f"top_k={self.top_k}"

    @property
    def num_bytes(self) -> int:
        """Size of a full cache."""
        return self.rows * (self.dim * self.torch_dtype.itemsize + 8 * self.length)


@dataclass(frozen=True)
class PeerSizes:
    """The same number of negatives per query for several losses.

    Attributes:
        batch: Queries of a step of a loss with a memory; mini-batch of gradient caching.
        negatives: Numbers of negatives per query.
        hidden: Width of the encoder.
        layers: Layers of the encoder.
        length: Tokens of each text.
        seconds: Time limit of one measurement.
    """

    batch: int
    negatives: tuple[int, ...]
    hidden: int
    layers: int
    length: int
    seconds: float


@dataclass(frozen=True)
class TrainingSizes:
    """A training step with a transformer.

    Attributes:
        batch: Pairs of a step.
        length: Tokens of each text.
        hidden: Width of the transformer with random weights.
        layers: Layers of that transformer.
        rows: Rows of the cache.
        dtypes: Stored dtypes of embeddings.
        use_minilm: Measure MiniLM, if the package with its weights is installed.
    """

    batch: int
    length: int
    hidden: int
    layers: int
    rows: int
    dtypes: tuple[str, ...]
    use_minilm: bool


@dataclass(frozen=True)
class Case:
    """A setting in which estimators are compared.

    Attributes:
        stage: Stage of the training.
        batch: Number of queries.
        rows: Rows of the cache.
        scale: Factor of the dot products.
        is_stale: Whether the rows are as training left them; if False, they are re-encoded.
        is_complete: Whether all estimators are measured, or only the main ones.
    """

    stage: str
    batch: int
    rows: int
    scale: float = 20.0
    is_stale: bool = False
    is_complete: bool = False


@dataclass(frozen=True)
class VarianceSizes:
    """Errors of gradients at several stages of a training.

    Attributes:
        data: A data set of `load_data`; None for synthetic texts.
        batch: Pairs of a training step.
        stages: Name -> number of training steps before it.
        cases: The settings to measure.
        batches: Batches of each case, with different pairs.
        repeats: Steps of each estimator on each batch.
    """

    data: str | None
    batch: int
    stages: dict[str, int]
    cases: tuple[Case, ...]
    batches: int
    repeats: int

    @property
    def rows(self) -> int:
        """Rows of the cache in training."""
        return max(case.rows for case in self.cases)


@dataclass(frozen=True)
class DataSizes:
    """A large dataset of synthetic texts.

    Attributes:
        documents: Number of documents, each with a query.
        words: Words of a document.
        test_queries: Queries of the test split; the others are of the training split.
        steps: Training steps.
    """

    documents: int
    words: int
    test_queries: int
    steps: int


@dataclass(frozen=True)
class SizeSet:
    """The sizes of each command.

    Attributes:
        step: Sizes of `step`.
        scale: Sizes of `scale`.
        memory: Sizes of `memory`.
        peers: Sizes of `peers`.
        end_to_end: Sizes of `end-to-end`.
        budget: Sizes of `budget`.
        variance: Sizes of `variance`.
        data: Sizes of `data`.
        repeats: Rounds whose median is taken.
        is_judged: Whether the targets of scale, memory, end-to-end, budget, variance and data apply to these sizes.
    """

    step: tuple[Size, ...]
    scale: tuple[Size, ...]
    memory: tuple[Size, ...]
    peers: PeerSizes
    end_to_end: TrainingSizes
    budget: TrainingSizes
    variance: VarianceSizes
    data: DataSizes
    repeats: int
    is_judged: bool = True


def over(size: Size, rows: Sequence[int], dtypes: Sequence[str]) -> tuple[Size, ...]:
    """A size for each dtype, mode and number of rows."""
    return tuple(
        replace(size, dtype=dtype, top_k=top_k, rows=n)
        for dtype in dtypes
        for top_k in (size.top_k, None)
        for n in rows
    )


def variance_sizes(batches: Sequence[int], rows: int, stages: dict[str, int]) -> VarianceSizes:
    """All stages with re-encoded and with stale rows; more rows at the last stage, other scales at the middle one."""
    early, middle, late = stages
    return VarianceSizes(
        data="python-code",
        batch=64,
        stages=stages,
        cases=(
            *(Case(stage, batch, rows, is_complete=True) for stage in (early, middle, late) for batch in batches),
            *(Case(stage, batch, rows, is_stale=True) for stage in (early, middle, late) for batch in batches),
            *(Case(late, batch, 2 * rows) for batch in batches),
            *(Case(middle, batches[0], rows, scale) for scale in (5.0, 50.0)),
        ),
        batches=4,
        repeats=8,
    )


_DATA = DataSizes(documents=1_000_000, words=50, test_queries=1_000, steps=50)
_DTYPES = ("float32", "bfloat16", "int8")
_POWERS = tuple(2**n for n in range(14, 21))
_TOP_K_TARGETS = {"float32": 0.6, "bfloat16": 0.35, "int8": 0.3}
_ALL_ROWS_TARGETS = {"float32": 0.5, "bfloat16": None, "int8": 0.3}
_STAGES = {"early": 130, "middle": 340, "late": 1000}  # one epoch of python-code has 339 steps; 130 fill 8,192 rows
_CPU = Size(batch=128, rows=2**17, dim=768, top_k=64, dtype="float32")
_GPU = replace(_CPU, dtype="bfloat16", target=0.15)
_TINY = Size(batch=32, rows=1024, dim=64, top_k=16, dtype="float32", length=8)

SETS = {
    "full": SizeSet(
        step=(
            *(replace(_CPU, dtype=dtype, target=target) for dtype, target in _TOP_K_TARGETS.items()),
            *(replace(_CPU, dtype=dtype, top_k=None, target=target) for dtype, target in _ALL_ROWS_TARGETS.items()),
        ),
        scale=over(_CPU, _POWERS, _DTYPES),
        memory=over(_CPU, _POWERS, _DTYPES),
        peers=PeerSizes(batch=32, negatives=(2**10, 2**14, 2**17), hidden=128, layers=2, length=16, seconds=600),
        end_to_end=TrainingSizes(
            batch=32, length=64, hidden=256, layers=4, rows=2**17, dtypes=("float32", "int8"), use_minilm=True
        ),
        budget=TrainingSizes(
            batch=32, length=64, hidden=256, layers=4, rows=2**17, dtypes=("float32",), use_minilm=True
        ),
        variance=variance_sizes((64, 256), 8192, _STAGES),
        data=_DATA,
        repeats=7,
    ),
    "gpu": SizeSet(
        step=tuple(
            replace(_GPU, batch=batch, rows=rows, top_k=top_k)
            for rows in (2**17, 2**20)
            for batch in (128, 1024, 4096)
            for top_k in (64, None)
        ),
        scale=over(_GPU, _POWERS, ("bfloat16", "int8")),
        memory=over(_GPU, _POWERS, ("bfloat16", "int8")),
        peers=PeerSizes(batch=128, negatives=(2**10, 2**14, 2**17), hidden=384, layers=6, length=32, seconds=300),
        end_to_end=TrainingSizes(
            batch=128, length=64, hidden=768, layers=12, rows=2**17, dtypes=("bfloat16", "int8"), use_minilm=True
        ),
        budget=TrainingSizes(
            batch=128, length=64, hidden=768, layers=12, rows=2**17, dtypes=("bfloat16",), use_minilm=True
        ),
        variance=variance_sizes((64, 256), 8192, _STAGES),
        data=_DATA,
        repeats=15,
    ),
    "tiny": SizeSet(
        step=over(_TINY, (1024,), _DTYPES),
        scale=over(_TINY, (256, 512, 1024), ("float32", "int8")),
        memory=over(_TINY, (256, 1024), ("int8",))[:2],
        peers=PeerSizes(batch=8, negatives=(32,), hidden=32, layers=1, length=8, seconds=60),
        end_to_end=TrainingSizes(
            batch=8, length=8, hidden=32, layers=1, rows=256, dtypes=("float32", "int8"), use_minilm=False
        ),
        budget=TrainingSizes(batch=8, length=8, hidden=32, layers=1, rows=256, dtypes=("float32",), use_minilm=False),
        variance=VarianceSizes(
            data=None,
            batch=16,
            stages={"early": 6, "late": 12},
            cases=(
                Case("early", 8, 64, is_complete=True),
                Case("late", 16, 64, is_complete=True),
                Case("late", 8, 96, is_stale=True),
            ),
            batches=2,
            repeats=3,
        ),
        data=DataSizes(documents=300, words=20, test_queries=20, steps=3),
        repeats=2,
        is_judged=False,
    ),
}
