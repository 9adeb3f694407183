"""`quality`: a pretrained encoder, fine-tuned with each loss on the same pairs.

Fine-tuning of a small encoder is bound by one CPU core per process, so several runs share the GPU. A worker process
keeps the model, loads a data set once, and runs one job at a time. Jobs are started in order of importance: for each
data set, the sweep of learning rates with the first seed, then the other seeds at the rate that is best on the dev
split.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer

from benchmarks.child import new_context
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
    rates_of,
    train,
)
from benchmarks.gpu.machine import DATA, MODEL
from benchmarks.gpu.results import Results, Row
from benchmarks.gpu.summary import Ranks, chosen_rate
from negative_cache.workbench.data import load_data
from negative_cache.workbench.files import write_json

RANKS_FILE = "quality_ranks.json"
ORDER = ("nl2bash", "medquad", "squad")
BEYOND = {2e-5: 6e-6, 2e-4: 6e-4}  # a further rate to try if the best one is at an edge of the sweep


class Outcome(NamedTuple):
    """The result of a job.

    Attributes:
        row: Its row of the results.
        reciprocal: Reciprocal ranks of the test queries.
        work: Pairs times tokens of the data set, for estimates of time.
        error: The error that ended it; empty if it succeeded.
    """

    row: Row
    reciprocal: list[float]
    work: float = 0.0
    error: str = ""


def run(results: Results, prepared: Path, device: torch.device, seconds: float, is_rehearsal: bool) -> None:
    """Run as many jobs as end in time; each row is written as soon as its job has ended.

    `quality_ranks.json`, beside the results, has the reciprocal ranks of the test queries, see `Ranks`. Training times
    of runs that share the GPU are not comparable: see the field `runs_at_once`.

    Args:
        results: The rows are added to it.
        prepared: The folder that `prepare` wrote.
        device: Where to train.
        seconds: Time limit.
        is_rehearsal: Run a few steps with little data, one job at a time.

    Raises:
        ValueError: `prepared` has no model or no data.
    """
    deadline = time.monotonic() + seconds
    names = _names(prepared)
    plan = REHEARSAL if is_rehearsal else Plan() if device.type == "cuda" else Plan(processes=1, is_bf16=False)
    if seconds <= 0:
        return
    schedule = _Schedule(results, names, plan)
    with tempfile.TemporaryDirectory() as work, _Pool((prepared, Path(work), str(device), plan)) as pool:
        while (left := deadline - time.monotonic()) > 0:
            for job in schedule.waiting():
                if pool.has_free and schedule.estimate(job) <= left:
                    pool.start(job)
                    schedule.started.add(job)
            if not pool.jobs:
                return
            for done in pool.wait(left):
                schedule.record(*done)
        for job in pool.jobs:
            schedule.record(job, Outcome({}, [], error="It did not end before the deadline."), 0.0, len(pool.jobs))


def _names(prepared: Path) -> list[str]:
    """Names of the data sets, in order of importance."""
    there = [path for path in (prepared / MODEL, prepared / DATA) if path.is_dir()]
    names = sorted(path.name for path in (prepared / DATA).iterdir() if path.is_dir()) if len(there) == 2 else []
    if not names:
        raise ValueError(
            f"{prepared} has {[path.name for path in there]}; expected {MODEL} and a data set in {DATA}. "
            "Create the folder with `python -m benchmarks gpu-prepare`."
        )
    return sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


class _Schedule:
    """The jobs that have been started and ended, and those that may start next."""

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
        """Jobs that may start now, in order of importance."""
        jobs = [Job(name, UNTRAINED) for name in self._names]
        trained = [name for name in self._names[: self._plan.num_trained] if name in self._work]
        runs = [job for name in trained for job in self._runs(name)]
        jobs += sorted(runs, key=lambda job: KINDS[job.loss].is_extra)
        return [job for job in jobs if job not in self.started]

    def estimate(self, job: Job) -> float:
        """Estimated seconds of a job, from jobs that have ended; 0 if there are none."""
        same = self._seconds.get((job.data, job.loss))
        if same is not None or job.loss == UNTRAINED:
            return same or 0.0
        speeds = [seconds / self._units(*key) for key, seconds in self._seconds.items()]
        return max(speeds, default=0.0) * self._units(job.data, job.loss)

    def record(self, job: Job, outcome: Outcome, seconds: float, runs_at_once: int) -> None:
        """Record the result of a job."""
        self._ended.add(job)
        row: Row = {"data": job.data, "loss": job.loss, "rate": job.rate, "seed": job.seed, "is_sweep": job.is_sweep}
        if outcome.error:
            self._results.add(**row, error=outcome.error)
            return
        self._results.add(**row, **outcome.row, runs_at_once=runs_at_once)
        self._reciprocal[job] = outcome.reciprocal
        write_json(self._results.path.with_name(RANKS_FILE), self._ranks())
        if job.loss == UNTRAINED:
            self._work[job.data] = outcome.work
        else:
            key = (job.data, job.loss)
            self._seconds[key] = max(seconds, self._seconds.get(key, 0.0))

    def _units(self, data: str, loss: str) -> float:
        return self._work[data] * KINDS[loss].cost

    def _runs(self, data: str) -> Iterator[Job]:
        first, *others = self._plan.seeds
        rates = {loss: rates_of(data, loss, self._plan) for loss in KINDS}
        sweep = {loss: [Job(data, loss, rate, first, True) for rate in rates[loss]] for loss in KINDS}
        for of_loss in zip_longest(*sweep.values()):
            yield from (job for job in of_loss if job is not None)
        for loss, jobs in sweep.items():
            if len(jobs) > 1 and self._ended.issuperset(jobs):
                best = chosen_rate([row for row in self._results.rows if row["rate"] in rates[loss]], data, loss)
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
    """A worker process and its current job."""

    def __init__(self, arguments: tuple[Path, Path, str, Plan]) -> None:
        context = new_context()
        self.pipe, child_pipe = context.Pipe()
        self._process = context.Process(target=_work, args=(child_pipe, *arguments), daemon=True)
        self._process.start()
        child_pipe.close()
        self.job: Job | None = None
        self.began = 0.0
        self.at_once = 0

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    def outcome(self) -> Outcome:
        """The result that it sent; an error if the process has ended."""
        try:
            outcome: Outcome = self.pipe.recv()
        except (EOFError, OSError):
            self._process.join(5)
            return Outcome({}, [], error=f"The process ended with exit code {self._process.exitcode}.")
        return outcome

    def end(self) -> None:
        self.pipe.close()  # ends the process, unless it is busy
        if self.job is not None:
            self._process.terminate()
        self._process.join(5)
        self._process.kill()


class _Pool:
    """Worker processes. One that had an error on a GPU is ended, as the GPU may no longer work in it."""

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
        """Jobs that are running."""
        return [process.job for process in self._processes if process.job is not None]

    def start(self, job: Job) -> None:
        """Start a job in a free process."""
        process = next((process for process in self._processes if process.job is None), None)
        if process is None:  # a process that had an error was ended
            process = _Process(self._arguments)
            self._processes.append(process)
        process.job, process.began = job, time.monotonic()
        with contextlib.suppress(OSError):  # if the process has ended, `wait` reports it
            process.pipe.send(job)
        for other in self._processes:
            other.at_once = max(other.at_once if other is not process else 0, len(self.jobs))

    def wait(self, seconds: float) -> list[tuple[Job, Outcome, float, int]]:
        """Jobs that ended, their results, their seconds, and how many ran at once; empty after `seconds`."""
        busy: dict[Any, _Process] = {process.pipe: process for process in self._processes if process.job is not None}
        done = []
        for pipe in wait(list(busy), seconds):
            process = busy[pipe]
            outcome, job = process.outcome(), process.job
            assert job is not None
            done.append((job, outcome, time.monotonic() - process.began, process.at_once))
            process.job = None
            if outcome.error and not (process.is_alive and self._arguments[2] == "cpu"):
                process.end()
                self._processes.remove(process)
        return done


def _work(pipe: Connection, prepared: Path, work: Path, device: str, plan: Plan) -> None:
    """Run jobs until the parent ends this process."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // (2 * plan.processes)))  # autograd has its own threads
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    worker: _Worker | None = None
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            worker = worker or _Worker(prepared, work, torch.device(device), plan)
            pipe.send(worker.run(job))
        except Exception as error:
            lines = traceback.format_exception(error)
            pipe.send(Outcome({}, [], error="".join(lines)[-2000:]))


class _Worker:
    """Runs jobs with one model."""

    def __init__(self, prepared: Path, work: Path, device: torch.device, plan: Plan) -> None:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self._prepared, self._folder, self._plan = prepared, work, plan
        model = SentenceTransformer(str(prepared / MODEL), device=str(device)).float()
        self._encoder = Encoder(model, plan.is_bf16)
        self._dataset: Dataset | None = None

    def run(self, job: Job) -> Outcome:
        self._encoder.model.load_state_dict(self._encoder.untrained.state_dict())
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
        return Outcome(row, reciprocal, dataset.work(self._plan))
