"""Stage "quality": a fine-tuned pretrained encoder, with each loss on the same pairs.

Fine-tuning of a small encoder is bound by one CPU core per process, so several runs share the GPU. A worker process
keeps the model, loads a data set once, and gets one run at a time. Runs are given out in order of value: for each data
set the sweep of learning rates with the first seed, then the other seeds at the rate that is best on the dev split.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer

from benchmarks.gpu.finetuning import (
    KINDS,
    REHEARSAL,
    UNTRAINED,
    Dataset,
    Encoder,
    Job,
    Plan,
    evaluate,
    make_dataset,
    train,
)
from benchmarks.gpu.machine import DATA, MODEL
from benchmarks.gpu.results import Results, Row, write_json
from benchmarks.gpu.summary import Ranks, chosen_rate
from negative_cache.workbench.data import load_data

RANKS_FILE = "quality_ranks.json"
ORDER = ("nl2bash", "medquad", "squad")
BEYOND = {2e-5: 6e-6, 2e-4: 6e-4}  # the rate to try too if the best is at an edge of the sweep


class Answer(NamedTuple):
    """What a worker has to say of a job.

    Attributes:
        row: Of the results.
        reciprocal: Reciprocal ranks of the test queries.
        work: Of `UNTRAINED`: pairs times tokens, for estimates of time.
        error: What went wrong; empty if nothing did.
    """

    row: Row
    reciprocal: list[float]
    work: float = 0.0
    error: str = ""


def run(results: Results, prepared: Path, device: torch.device, seconds: float, is_rehearsal: bool) -> None:
    """Measure as many runs as end in time; each row is written as soon as it is there.

    Beside the results, `quality_ranks.json` has the reciprocal ranks of the test queries, see `Ranks`. Training times
    of runs that share the GPU do not compare with each other: see the field `runs_at_once`.

    Args:
        results: Where rows go.
        prepared: The folder that `prepare` wrote.
        device: Where to train.
        seconds: When to end, from now.
        is_rehearsal: Whether to do a few steps with little data, one run at a time.

    Raises:
        ValueError: `prepared` has no model or no data.
    """
    deadline = time.monotonic() + seconds
    names = _names(prepared)
    plan = REHEARSAL if is_rehearsal else Plan() if device.type == "cuda" else Plan(processes=1, is_bf16=False)
    if seconds <= 0:
        return
    book = _Book(results, names, plan)
    with tempfile.TemporaryDirectory() as work, _Pool((prepared, Path(work), str(device), plan)) as pool:
        while (left := deadline - time.monotonic()) > 0:
            for job in book.waiting():
                if pool.has_free and book.estimate(job) <= left:
                    pool.hand_out(job)
                    book.started.add(job)
            if not pool.jobs:
                return
            for done in pool.wait(left):
                book.note(*done)
        for job in pool.jobs:
            book.note(job, Answer({}, [], error="It did not end before the deadline."), 0.0, len(pool.jobs))


def _names(prepared: Path) -> list[str]:
    """Of the data sets, in order of value."""
    there = [path for path in (prepared / MODEL, prepared / DATA) if path.is_dir()]
    names = sorted(path.name for path in (prepared / DATA).iterdir() if path.is_dir()) if len(there) == 2 else []
    if not names:
        raise ValueError(
            f"{prepared} has {[path.name for path in there]}; expected {MODEL} and a data set in {DATA}. "
            "Make the folder with `python -m benchmarks gpu-prepare`."
        )
    return sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


class _Book:
    """What has been done and what is next."""

    def __init__(self, results: Results, names: Sequence[str], plan: Plan) -> None:
        self.started: set[Job] = set()
        self._ended: set[Job] = set()
        self._results = results
        self._names = names
        self._plan = plan
        self._work: dict[str, float] = {}
        self._seconds: dict[tuple[str, str], float] = {}
        self._reciprocal: dict[Job, list[float]] = {}

    def waiting(self) -> list[Job]:
        """Jobs that may start now, in order of value."""
        jobs = [Job(name, UNTRAINED) for name in self._names]
        jobs += [
            job for name in self._names[: self._plan.num_trained] if name in self._work for job in self._runs(name)
        ]
        return [job for job in jobs if job not in self.started]

    def estimate(self, job: Job) -> float:
        """Seconds that a job takes, by those that have ended; 0 if nothing is known."""
        same = self._seconds.get((job.data, job.loss))
        if same is not None or job.loss == UNTRAINED:
            return same or 0.0
        speeds = [seconds / self._units(*key) for key, seconds in self._seconds.items()]
        return max(speeds, default=0.0) * self._units(job.data, job.loss)

    def note(self, job: Job, answer: Answer, seconds: float, runs_at_once: int) -> None:
        """Write what became of a job."""
        self._ended.add(job)
        told: Row = {"data": job.data, "loss": job.loss, "rate": job.rate, "seed": job.seed, "is_sweep": job.is_sweep}
        if answer.error:
            self._results.add(**told, error=answer.error)
            return
        self._results.add(**told, **answer.row, runs_at_once=runs_at_once)
        self._reciprocal[job] = answer.reciprocal
        write_json(self._results.path.with_name(RANKS_FILE), self._ranks())
        if job.loss == UNTRAINED:
            self._work[job.data] = answer.work
        else:
            key = (job.data, job.loss)
            self._seconds[key] = max(seconds, self._seconds.get(key, 0.0))

    def _units(self, data: str, loss: str) -> float:
        return self._work[data] * KINDS[loss].cost

    def _runs(self, data: str) -> Iterator[Job]:
        first, *others = self._plan.seeds
        sweep = {loss: [Job(data, loss, rate, first, True) for rate in self._plan.rates] for loss in KINDS}
        for at in range(len(self._plan.rates)):
            yield from (jobs[at] for jobs in sweep.values())
        for loss, jobs in sweep.items():
            if len(jobs) > 1 and self._ended.issuperset(jobs):
                best = chosen_rate([row for row in self._results.rows if row["rate"] in self._plan.rates], data, loss)
                beyond = [Job(data, loss, BEYOND[best], first, True)] if best in BEYOND else []
                yield from beyond
                jobs += beyond
            if self._ended.issuperset(jobs):
                best = chosen_rate(self._results.rows, data, loss)
                yield from (Job(data, loss, best, seed) for seed in others if best is not None)

    def _ranks(self) -> Ranks:
        ranks: Ranks = {}
        for job, reciprocal in self._reciprocal.items():
            if job.rate == chosen_rate(self._results.rows, job.data, job.loss):
                ranks.setdefault(job.data, {}).setdefault(job.loss, {})[str(job.seed)] = reciprocal
        return ranks


class _Process:
    """A worker process and what it does now."""

    def __init__(self, arguments: tuple[Path, Path, str, Plan]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()
        self.job: Job | None = None
        self.began = 0.0
        self.at_once = 0

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    def answer(self) -> Answer:
        """What it sent; an error if it is gone."""
        try:
            answer: Answer = self.pipe.recv()
        except (EOFError, OSError):
            self._process.join(5)
            return Answer({}, [], error=f"The process ended with exit code {self._process.exitcode}.")
        return answer

    def end(self) -> None:
        self.pipe.close()  # by which it knows, unless it is busy
        if self.job is not None:
            self._process.terminate()
        self._process.join(5)
        self._process.kill()


class _Pool:
    """Worker processes; one that had an error is ended, for the GPU may refuse it from then on."""

    def __init__(self, arguments: tuple[Path, Path, str, Plan]) -> None:
        self._arguments = arguments
        self._processes = [_Process(arguments) for _ in range(arguments[3].processes)]

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.end()

    @property
    def has_free(self) -> bool:
        return len(self.jobs) < self._arguments[3].processes

    @property
    def jobs(self) -> list[Job]:
        """Jobs that are being done."""
        return [process.job for process in self._processes if process.job is not None]

    def hand_out(self, job: Job) -> None:
        process = next((process for process in self._processes if process.job is None), None)
        if process is None:  # one that had an error is gone
            process = _Process(self._arguments)
            self._processes.append(process)
        process.job, process.began = job, time.monotonic()
        with contextlib.suppress(OSError):  # if it is gone, `wait` finds that
            process.pipe.send(job)
        for other in self._processes:
            other.at_once = max(other.at_once if other is not process else 0, len(self.jobs))

    def wait(self, seconds: float) -> list[tuple[Job, Answer, float, int]]:
        """Jobs that ended, their answers, seconds, and with how many at a time; empty after `seconds`."""
        busy: dict[Any, _Process] = {process.pipe: process for process in self._processes if process.job is not None}
        done = []
        for pipe in wait(list(busy), seconds):
            process = busy[pipe]
            answer, job = process.answer(), process.job
            assert job is not None
            done.append((job, answer, time.monotonic() - process.began, process.at_once))
            process.job = None
            if answer.error and not (process.is_alive and self._arguments[2] == "cpu"):
                process.end()
                self._processes.remove(process)
        return done


def _work(pipe: Connection, prepared: Path, work: Path, device: str, plan: Plan) -> None:
    """Do jobs until the parent ends this process."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // (2 * plan.processes)))  # autograd has a thread of its own
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    worker: _Worker | None = None
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            worker = worker or _Worker(prepared, work, torch.device(device), plan)
            pipe.send(worker.do(job))
        except Exception as error:
            lines = traceback.format_exception(error)
            pipe.send(Answer({}, [], error="".join(lines)[-2000:]))


class _Worker:
    """Does jobs with one model."""

    def __init__(self, prepared: Path, work: Path, device: torch.device, plan: Plan) -> None:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self._prepared, self._folder, self._plan = prepared, work, plan
        model = SentenceTransformer(str(prepared / MODEL), device=str(device)).float()
        self._encoder = Encoder(model, plan.is_bf16)
        self._untrained = {name: value.clone() for name, value in model.state_dict().items()}
        self._dataset: Dataset | None = None

    def do(self, job: Job) -> Answer:
        self._encoder.model.load_state_dict(self._untrained)
        path = self._folder / f"{job.data}.pt"
        if job.loss == UNTRAINED:
            dataset = make_dataset(load_data(str(self._prepared / DATA / job.data)), self._encoder, self._plan)
            torch.save(dataset, path)
            trained: Row = {"epochs": 0, "steps": 0, "pairs_seen": 0, "documents_encoded": 0, "train_seconds": 0.0}
        else:
            if self._dataset is None or self._dataset.name != job.data:
                self._dataset = torch.load(path, weights_only=False)  # written by a process of this stage
            dataset = self._dataset
            trained = train(self._encoder, dataset, job, self._plan)
        began = time.monotonic()
        metrics, reciprocal = evaluate(self._encoder, dataset)
        row: Row = {"pairs": len(dataset.pairs), "cache_size": dataset.cache_size, **trained, **metrics}
        row["eval_seconds"] = round(time.monotonic() - began, 3)
        return Answer(row, reciprocal, dataset.work(self._plan))
