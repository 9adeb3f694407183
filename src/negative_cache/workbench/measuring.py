"""One run of a comparison: trained and evaluated in a process of its own, of which only a record stays."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model as save_weights
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from torch import Tensor, nn
from transformers import TrainerCallback

from negative_cache.workbench import samples
from negative_cache.workbench.config import RunConfig, RunError, RunFailedError
from negative_cache.workbench.data import RetrievalData, load_data
from negative_cache.workbench.evaluation import CountFn, encode_corpus, evaluate, metrics_of
from negative_cache.workbench.models import load_model, remember_tokens
from negative_cache.workbench.run_trainer import RunTrainer, peak_memory_bytes, train_to_the_end
from negative_cache.workbench.training import RECORD, make_trainer, write_json

# Shares of the steps after which the quality is measured for a curve; that after the last step is measured anyway.
POINTS = (0.04, 0.12, 0.25, 0.45, 0.7)

LAST_SECONDS = 30  # that a process may take to end once it has sent its record


@dataclass(frozen=True)
class Job:
    """A run of a comparison.

    Attributes:
        config: What to train; the record goes to the folder `config.output`.
        query_column: See `load_data`.
        positive_column: See `load_data`.
        has_curve: Whether the quality is measured on the way, too.
    """

    config: RunConfig
    query_column: str | None = None
    positive_column: str | None = None
    has_curve: bool = False


def measure_apart(job: Job, on_step: CountFn | None = None) -> dict[str, Any]:
    """`measure` in a new process, which is forked, where the system has that, from one that imported the libraries.

    Raises:
        RunFailedError: The run failed, or its process was killed.
    """
    is_forking = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if is_forking else "spawn")
    if is_forking:
        context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_and_send, args=(sender, job), daemon=True)
    process.start()
    sender.close()
    try:
        while (message := receiver.recv())[0] == "step":
            if on_step is not None:
                on_step(*message[1:])
        process.join(LAST_SECONDS)
    except EOFError:
        process.join()
        message = ("error", f"its process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()
        receiver.close()
    if message[0] == "error":
        raise RunFailedError(f"The run {job.config.output} failed: {message[1]}")
    record: dict[str, Any] = message[1]
    return record


def measure(job: Job, on_step: CountFn | None = None) -> dict[str, Any]:
    """Train, evaluate on the dev and test splits, and leave `run.json` and `samples.json` in the folder of the run.

    Returns:
        The content of `run.json`. If training failed it has no metrics, but says why as `failed`.
    """
    config = job.config
    data = load_data(config.data, job.query_column, job.positive_column)
    columns = data.training_columns()
    output = Path(config.output)
    folder = output.with_name(f"{output.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = load_model(config.model, columns["positive"], config.seed)
    remember_tokens(model, [*data.queries.values(), *data.corpus.values()])
    trainer = make_trainer(folder, config, columns, model, _step_of(on_step), report_to=[])
    watch = _Watch(folder, model, trainer.loss, POINTS if job.has_curve else ())
    trainer.add_callback(watch)
    watch.start()
    failed = None
    try:
        train_to_the_end(trainer)
    except RunFailedError as error:
        failed = str(error)
    seconds, peak = watch.seconds(), peak_memory_bytes()
    documents = watch.documents
    record = {
        "configuration": asdict(config),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 3),
        "documents_encoded": documents,
        "peak_memory_bytes": peak,
        "history": trainer.state.log_history,
    }
    if failed is None:
        record |= _quality(folder, trainer, data)
    else:
        record["failed"] = failed
    if job.has_curve and failed is None:
        last = {"step": record["steps"], "seconds": record["seconds"], "documents_encoded": documents}
        record["curve"] = [*watch.curve(data), {**last, "test": record["test"]}]
    watch.clear()
    write_json(folder / RECORD, record)
    folder.rename(output)
    return record


def _quality(folder: Path, trainer: RunTrainer, data: RetrievalData) -> dict[str, Any]:
    """Metrics on the dev and test splits; also writes what is to be looked at."""
    model = trainer.model
    corpus = encode_corpus(model, data)
    looked_at = {"after": samples.hits(model, data, "test", corpus), **samples.of_cache(trainer.loss, model, data)}
    write_json(folder / samples.SAMPLES, looked_at)
    return {split: metrics_of(model, data, split, corpus) for split in ("dev", "test")}


def saved_record(job: Job) -> dict[str, Any] | None:
    """What a finished run of this job left; None if there is none, or none with the curve that is asked for.

    Raises:
        RunError: Its folder has the record of another run.
    """
    path = Path(job.config.output) / RECORD
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if record["configuration"] != asdict(job.config):
        raise RunError(f"{path} is of another configuration. Remove its folder, or choose another --output.")
    if job.has_curve and "curve" not in record and "failed" not in record:
        shutil.rmtree(path.parent)
        return None
    return record


def _step_of(on_step: CountFn | None) -> Callable[[int, int, dict[str, float]], None] | None:
    return None if on_step is None else lambda step, steps, _: on_step(step, steps)


def _measure_and_send(sender: Connection, job: Job) -> None:
    """Runs in the new process: send ("step", step, steps) now and then; last ("record", ...) or ("error", text)."""
    last = 0.0

    def on_step(step: int, steps: int) -> None:
        nonlocal last
        if time.monotonic() > last + 0.2 or step == steps:
            last = time.monotonic()
            sender.send(("step", step, steps))

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        message: tuple[str, Any] = ("record", measure(job, on_step))
    except (ValueError, OSError) as error:
        message = ("error", str(error))
    except Exception:
        message = ("error", traceback.format_exc())
    with contextlib.suppress(BrokenPipeError):  # the comparison was killed: `on_step` met that, and ended the run
        sender.send(message)


class _Watch(TrainerCallback):
    """Counts documents and seconds, and keeps the weights at some steps, to be evaluated when training is over.

    Documents are counted where the model encodes them: all rows that it is given, less the queries. Gradient caching
    encodes both twice.
    """

    def __init__(self, folder: Path, model: SentenceTransformer, loss: nn.Module, shares: tuple[float, ...]) -> None:
        self.folder = folder
        self.model = model
        self.shares = shares
        self.points: list[dict[str, Any]] = []
        self.spent = 0.0
        self._rows = 0
        self._queries = 0
        self._passes = 2 if isinstance(loss, CachedMultipleNegativesRankingLoss) else 1
        count_rows = model.register_forward_pre_hook(self._count_rows)
        self._hooks = [count_rows, loss.register_forward_pre_hook(self._count_queries)]

    @property
    def documents(self) -> int:
        """Documents that were encoded so far."""
        return self._rows - self._passes * self._queries

    def start(self) -> None:
        """From now on time counts."""
        self._started = time.perf_counter()

    def seconds(self) -> float:
        """Of training alone, so far."""
        return time.perf_counter() - self._started - self.spent

    def curve(self, data: RetrievalData) -> list[dict[str, Any]]:
        """The points with their quality on the test split; the model then has the weights of the last of them."""
        for hook in self._hooks:
            hook.remove()
        for point in self.points:
            load_weights(self.model, self._weights(point["step"]))
            point["test"] = evaluate(self.model, data, "test")
        return self.points

    def clear(self) -> None:
        """Remove all weights."""
        for point in self.points:
            self._weights(point["step"]).unlink()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step not in {max(1, round(share * state.max_steps)) for share in self.shares}:
            return
        seconds, before = self.seconds(), time.perf_counter()
        save_weights(self.model, str(self._weights(state.global_step)))
        self.points.append(
            {"step": state.global_step, "seconds": round(seconds, 3), "documents_encoded": self.documents}
        )
        self.spent += time.perf_counter() - before

    def _weights(self, step: int) -> Path:
        return self.folder / f"{step}.safetensors"

    def _count_rows(self, model: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._rows += _num_rows(arguments[0])

    def _count_queries(self, loss: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._queries += _num_rows(next(iter(arguments[0])))


def _num_rows(features: dict[str, Tensor]) -> int:
    """Texts in a model's input."""
    return len(features["offsets"] if "offsets" in features else features["input_ids"])
