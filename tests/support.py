"""What several test modules share: snapshots, an encoder, a recorder of operations, processes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from packaging.version import Version
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

needs_resuming_on_ranks_of_a_cpu = pytest.mark.skipif(
    Version(version("transformers")) < Version("5.18"),
    reason="transformers before 5.18 cannot load an optimizer on several ranks of a CPU",
)
needs_compiling_of_whole_steps = pytest.mark.skipif(
    Version(version("torch")) < Version("2.13"),
    reason="torch.compile of 2.9 fails with a whole step; it was tried with 2.13 next",
)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of everything that `state_dict` holds."""
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same_state(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert value.dtype == second[key].dtype, key
        assert torch.equal(value, second[key]), key


class Encoder(nn.Module):
    """Embeddings of two integer features, summed and normalised; records the inputs of each call."""

    def __init__(self, num_values: int = 50, dim: int = 8) -> None:
        super().__init__()
        self.first = nn.Embedding(num_values, dim)
        self.second = nn.Embedding(num_values, dim)
        self.calls: list[dict[str, Tensor]] = []

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        self.calls.append(features)
        return nn.functional.normalize(self.first(features["a"]) + self.second(features["b"]), dim=1)


class Recorder(TorchDispatchMode):
    """Counts operations, and keeps their names and the sizes of the tensors that they allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.num_ops = 0
        self.names: set[str] = set()
        self.allocated: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.num_ops += 1
        self.names.add(func.overloadpacket.__name__)
        known = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            if tensor.untyped_storage().data_ptr() not in known:
                self.allocated.append((str(func), tensor.numel()))
        return result

    @property
    def largest(self) -> int:
        return max((numel for _, numel in self.allocated), default=0)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Run what runs where values cannot be looked at for free, on the CPU."""
    name = "reads_without_sync"
    modules = [
        module for key, module in sys.modules.items() if key.startswith("negative_cache") and name in vars(module)
    ]
    originals = [getattr(module, name) for module in modules]
    for module in modules:
        setattr(module, name, lambda value: False)
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            setattr(module, name, original)


def run_ranks(fn: Callable[..., None], world_size: int, folder: Path, seconds: float = 120) -> None:
    """Run `fn(rank, world_size, folder)` in processes joined by gloo; any failure or hang raises."""
    arguments = (fn, world_size, str(folder))
    context = mp.start_processes(_rank, arguments, nprocs=world_size, join=False, start_method="forkserver")
    deadline = time.monotonic() + seconds
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"The ranks did not finish within {seconds} seconds.")


def _rank(rank: int, fn: Callable[..., None], world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    fn(rank, world_size, Path(folder))
    dist.barrier()  # who leaves early breaks the connections of the others
    # The group is not taken apart. After an error that would make gloo abort the others before the error is seen; and
    # gloo may wait for ever for a thread that waits for Python to free a tensor.
    sys.stdout.flush()
    os._exit(0)


def random_pairs(path: Path, count: int) -> None:
    """A file of pairs: a document of ten made-up words, and a query of three of them."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghij", k=5)) for _ in range(200)]
    lines = []
    for _ in range(count):
        document = chance.sample(words, 10)
        lines.append(json.dumps({"query": " ".join(chance.sample(document, 3)), "positive": " ".join(document)}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


TOPICS = ["rain", "bread", "music", "trains", "stars", "rivers", "chess", "wool", "glass", "salt", "bees", "paper"]
ANCHORS = [f"what is known about {topic}" for topic in TOPICS]
POSITIVES = [
    f"{topic} has been studied by people who like {topic} " + "very " * i + "much" for i, topic in enumerate(TOPICS)
]
HARD = [f"an essay that mentions {topic} once" for topic in TOPICS]


def columns(model: Any, *texts: list[str]) -> list[dict[str, Any]]:
    """The inputs of a sentence-transformers model for columns of texts."""
    return [model.preprocess(column) for column in texts]


class TableEncoder:
    """The embedding of a document is its row of a table; keeps the last output, whose gradient is per draw."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def __call__(self, features: dict[str, Tensor]) -> Tensor:
        self.rows = features["row"]
        self.output = self.table[self.rows].clone().requires_grad_()
        return self.output
