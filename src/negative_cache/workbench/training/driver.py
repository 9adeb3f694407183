"""The driver of training runs: train, evaluate, and write the model and the record."""

from __future__ import annotations

import gc
import logging
import platform
import shutil
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from negative_cache.integrations.trainer import last_complete_checkpoint
from negative_cache.workbench.counting import counted
from negative_cache.workbench.data import DataError, RetrievalData, fingerprints
from negative_cache.workbench.evaluation import OnProgress, evaluate, make_evaluator
from negative_cache.workbench.evaluation.encoding import encoding_arguments
from negative_cache.workbench.evaluation.systems import PER_QUERY, corpus_of
from negative_cache.workbench.files import check_output, write_json
from negative_cache.workbench.models import cache_tokens, freeze_unused, load_model, load_trained, prompts_of
from negative_cache.workbench.suggestions import unfinished_folder
from negative_cache.workbench.training import processes, samples
from negative_cache.workbench.training.before import quality_before
from negative_cache.workbench.training.best import BestWeights
from negative_cache.workbench.training.config import (
    GUIDED,
    RunConfig,
    RunError,
    RunFailedError,
    changed_options,
    check_guide,
)
from negative_cache.workbench.training.curve import Curve
from negative_cache.workbench.training.cut_texts import note_on_cut_texts
from negative_cache.workbench.training.hard_negatives import write_hard_negatives
from negative_cache.workbench.training.losses import load_guide
from negative_cache.workbench.training.meter import peak_memory_bytes
from negative_cache.workbench.training.mining import Mining, StopToMine
from negative_cache.workbench.training.preparation import add_lora, merge_lora, prepare
from negative_cache.workbench.training.record import (
    RECORD,
    RunRecord,
    check_output_folder,
    read_json,
    versions_of,
)
from negative_cache.workbench.training.trainer import (
    OnStep,
    RunTrainer,
    make_trainer,
    train_to_the_end,
    used_learning_rate,
)

_INITIAL, _BEFORE, _CURVE, _BEST = "initial", "before.json", "curve", "best"  # in the folder of an unfinished run
DOCUMENTS_AT_ONCE = 4096  # when a cache is filled, between two reports of progress
_PACKAGES = ("torch", "sentence-transformers", "transformers", "datasets")

logger = logging.getLogger("negative_cache")


@dataclass(frozen=True)
class RunOptions:
    """What a run measures and keeps, in addition to its configuration.

    Attributes:
        measure_before: Evaluate the untrained model on the test split, if there is one, or take its quality from an
            earlier run; see `quality_before`.
        measure_after: Evaluate the trained model on the test split, or on the dev split if there is no test split.
        measure_dev: Evaluate the trained model on the dev split, too.
        curve: Fractions of the steps after which the quality on the test split is measured.
        keep_model: Write the trained model and TensorBoard events.
        record_failure: If training fails, write a record with the reason instead of raising an error.
        cache_tokens: Tokenize each text only once, if the model is static.
        export_negatives: File for the hard negatives of the training queries; see `write_hard_negatives`. None for
            none.
        count_cut_texts: Say how many texts the model cuts; see `note_on_cut_texts`.
    """

    measure_before: bool = True
    measure_after: bool = True
    measure_dev: bool = False
    curve: tuple[float, ...] = ()
    keep_model: bool = True
    record_failure: bool = False
    cache_tokens: bool = False
    export_negatives: Path | None = None
    count_cut_texts: bool = True


def run(
    config: RunConfig,
    data: RetrievalData,
    options: RunOptions | None = None,
    *,
    resume: bool = False,
    on_step: OnStep | None = None,
    on_progress: OnProgress | None = None,
) -> RunRecord | None:
    """Train and evaluate a model; write the model, `samples.json`, `queries.json` and `run.json`.

    A dataset needs no test split: then the quality is measured on the dev split, if there is one. `queries.json` has
    the values of each query of the test split: "before" (null if not measured) and "after" -> name of a measure ->
    query id -> value; and "corpus", see `corpus_of`.

    An unfinished run is in `OUTPUT.partial`, with its checkpoints. The folder is renamed when the run is complete.
    Under `torchrun` or `accelerate launch`, call this function on all ranks; rank 0 evaluates and writes.

    Args:
        config: The configuration.
        data: The data that `config.data` names, read with `config.data_options`.
        options: What to measure and keep; None for the defaults.
        resume: Continue an unfinished run of the same configuration, if there is one.
        on_step: Called with (step, steps, latest logs) after each training step.
        on_progress: Called with (done, total) documents while a corpus is encoded.

    Returns:
        The record; None on ranks other than 0, unless the run was already finished.

    Raises:
        DataError: The data lacks a training split, or a split that the options or the configuration need.
        RunError: The configuration or the output folder is invalid.
        ModelError: The model cannot be loaded.
        RunFailedError: Training failed.
    """
    if record := finished_run(config, resume):
        _check_same_data(f"{config.output!r} has a finished run", record.data_fingerprint, config, data)
        return record
    task = _Run(config, data, options or RunOptions(), on_step, on_progress)
    task.check()
    is_first = processes.start() == 0
    if processes.count() > 1:
        _check_ranks(task)
    folder, output = task.folder, Path(config.output)
    if is_first and folder.exists():
        _check_unfinished(folder, task)
        if not _can_resume(folder):
            logger.warning("The run in %s has no checkpoint yet: training begins at step 0. See --save-steps.", folder)
    elif is_first and resume:
        logger.warning("There is no unfinished run in %s: training begins at step 0.", folder)
    is_trained = (folder / RECORD).exists()
    processes.wait()
    try:
        if not is_trained:
            task.train(is_first)
        if is_first:
            _clear(folder)
            if output.exists():
                output.rmdir()  # it was empty when the run began
            folder.rename(output)
    except BaseException as error:
        if is_first and not _can_resume(folder):
            shutil.rmtree(folder, ignore_errors=True)
        elif is_first and not isinstance(error, KeyboardInterrupt):  # then the caller says how to continue
            logger.warning("The run stopped; --resume continues it from its last checkpoint in %s.", folder)
        raise
    processes.wait()
    return RunRecord.read(output) if is_first else None


def finished_run(config: RunConfig, resume: bool) -> RunRecord | None:
    """The record of a finished run that `resume` would continue; None if the output folder is empty or does not exist.

    Raises:
        RunError: The output folder has something else than a finished run of this configuration; or it has files or an
            unfinished run, and `resume` is False.
    """
    check_output_folder(config.output, resume)
    output = Path(config.output)
    if not (output / RECORD).is_file():
        return None
    record = RunRecord.read(output)
    length = {name: getattr(config, name) for name in ("epochs", "max_steps")}
    if changed := changed_options(record.configuration, length):
        raise RunError(
            f"{config.output!r} has a finished run of another length: {changed}. It cannot be prolonged, as its "
            f"learning rate has reached its end. To train its model further, give --model {config.output} and another "
            "--output."
        )
    _check_same(f"{config.output!r} has a finished run", record.configuration, config)
    return record


@dataclass(frozen=True)
class _Run:
    """One call of `run`."""

    config: RunConfig
    data: RetrievalData
    options: RunOptions
    on_step: OnStep | None
    on_progress: OnProgress | None

    @property
    def folder(self) -> Path:
        """Folder of the unfinished run."""
        return unfinished_folder(self.config.output)

    def check(self) -> None:
        """Raise unless the loss has a guide, if it needs one, and the data has the splits that the run needs."""
        check_guide(self.config)
        needed = {"train": True, "dev": self.options.measure_dev, "test": bool(self.options.curve)}
        for split in [split for split, is_needed in needed.items() if is_needed]:
            self.data.judged(split)
        _check_programs(_programs(self.config))
        self._check_export()
        distinct = len(np.unique(self.data.labels())) if self.config.fill_from_corpus else 0
        if distinct > self.config.cache_size:
            raise DataError(
                f"--fill-from-corpus needs a row for each of the {distinct:,} documents of {self.data.name} with "
                f"different texts; --cache-size is {self.config.cache_size:,}. Set --cache-size {distinct}."
            )
        if self.config.eval_steps is not None and not self.data.has("dev"):
            raise DataError(f"{self.data.name} has no dev split to evaluate on. Leave --eval-steps out.")

    def _check_export(self) -> None:
        path = self.options.export_negatives
        if path is None:
            return
        if self.config.loss != "negative-cache":
            raise RunError(f"--export-negatives has no effect with --loss {self.config.loss}, which has no cache.")
        check_output("--export-negatives", path, (self.config.data, *self.config.data_options.sources()))

    def train(self, is_first: bool) -> None:
        """Train on all ranks; prepare, evaluate and write on the first one."""
        if is_first and not (self.folder / _BEFORE).exists():
            self._begin()
        processes.wait()
        resumed_from = last_complete_checkpoint(self.folder)
        mining = Mining(self.config, self.data, self.folder, self.on_progress)
        trainer, failed = self._train_from(resumed_from, mining, is_first)
        while failed is None and trainer.state.global_step in mining.steps(trainer.state.max_steps):
            del trainer
            gc.collect()  # it refers to itself, and its optimizer would stay in memory
            trainer, failed = self._train_from(last_complete_checkpoint(self.folder), mining, is_first)
        if is_first:
            steps = trainer.state.global_step
            found = {
                "resumed_from_step": _step_of(resumed_from),
                "training_pairs": len(trainer.train_dataset),
                "peak_memory_bytes": peak_memory_bytes(),
                "mining": [mined.summary() for mined in mining.until(steps)],
                "data_notes": [*self.data.notes, *mining.notes(steps)],
            }
            self._finish(trainer, found, failed)

    def _train_from(self, checkpoint: str | None, mining: Mining, is_first: bool) -> tuple[RunTrainer, str | None]:
        """Train from a checkpoint or from the beginning, to the end or until negatives are mined.

        Returns:
            The trainer; and why training failed, or None.
        """
        if checkpoint is None and mining.begins_before_training() and not mining.until(0):
            mining.mine(self._load_initial(is_first=False), 0)
        step = _step_of(checkpoint)
        trainer = self._make_trainer(mining.data_with_negatives(step).training_set(), is_first)
        if checkpoint is None:
            for mined in mining.until(0):
                trainer.meter.add(mined.seconds, mined.texts_encoded)
        trainer.add_callback(Curve(trainer, self.folder / _CURVE, self.options.curve))
        trainer.add_callback(StopToMine(mining, trainer.meter))
        try:
            train_to_the_end(trainer, checkpoint, begin=lambda: self._fill(trainer))
        except RunFailedError as error:
            if not self.options.record_failure:
                raise
            return trainer, str(error)
        return trainer, None

    def _begin(self) -> None:
        """Create the folder with the untrained model and its metrics. `before.json` is written last."""
        shutil.rmtree(self.folder, ignore_errors=True)  # left by a run that was stopped in this function
        self.folder.mkdir(parents=True)
        model = load_model(self.config.model, self.data.training_texts(), self.config.seed)
        if self.config.loss in GUIDED:
            load_guide(self.config, model)  # an error is raised before the evaluation
        for note in prepare(model, self.config):
            logger.warning("%s: %s", self.config.model, note)
        if self.options.count_cut_texts and (cut := note_on_cut_texts(model, self.data, self.config.max_seq_length)):
            logger.warning("%s", cut)
        model.save_pretrained(str(self.folder / _INITIAL), create_model_card=False)
        measured: dict[str, Any] = {"before": None, "per_query": None, "results": None}
        if not self.data.has("test") and self.options.measure_after:
            quality = "is measured on the dev split" if self.data.has("dev") else "is not measured"
            logger.warning("%s has no test split: the quality %s.", self.data.name, quality)
        elif self.data.has("test") and self.options.measure_before:
            measured = quality_before(model, self.folder / _INITIAL, self.data, self.on_progress)
        content = {
            "configuration": _configuration(self.config),
            "ranks": processes.count(),
            "data_fingerprint": fingerprints.of_data(self.data),
        }
        write_json(self.folder / _BEFORE, {**content, **measured})

    def _load_initial(self, is_first: bool) -> SentenceTransformer:
        model = load_trained(str(self.folder / _INITIAL))  # with the same tokenizer on all ranks and after a restart
        if self.config.lora is not None:
            note = add_lora(model, self.config.lora, self.config.seed)
            if is_first:
                logger.warning("%s: %s", self.config.model, note)
        elif processes.count() > 1:
            freeze_unused(model)
        if self.options.cache_tokens:
            prompts = prompts_of(model)
            queries = (prompts.query + text for text in self.data.queries.values())
            cache_tokens(model, chain(queries, (prompts.document + text for text in self.data.corpus.values())))
        return model

    def _make_trainer(self, training_set: Dataset, is_first: bool) -> RunTrainer:
        model = self._load_initial(is_first)
        return make_trainer(
            self.folder,
            self.config,
            training_set,
            model,
            on_step=self.on_step if is_first else None,
            evaluator=None if self.config.eval_steps is None else make_evaluator(model, self.data, "dev"),
            report_to=_programs(self.config) if self.options.keep_model else (),
            best=self._best() if self.config.load_best_model_at_end else None,
        )

    def _best(self) -> BestWeights:
        return BestWeights(self.folder / _BEST, self.config.early_stopping_patience)

    def _fill(self, trainer: RunTrainer) -> None:
        """Fill the cache from the corpus, if the configuration says so."""
        if not self.config.fill_from_corpus:
            return
        positions = np.unique(self.data.labels())  # of the first document with each text
        prompt = prompts_of(trainer.model).document or None
        for start in range(0, len(positions), DOCUMENTS_AT_ONCE):
            part = positions[start : start + DOCUMENTS_AT_ONCE].tolist()
            texts = [self.data.corpus.text(position) for position in part]
            batch_size = encoding_arguments(trainer.model)["batch_size"]
            trainer.loss.fill_from(texts, part, batch_size, show_progress_bar=False, prompt=prompt)
            if self.on_progress is not None:
                self.on_progress(start + len(part), len(positions))

    def _finish(self, trainer: RunTrainer, found: dict[str, Any], failed: str | None) -> None:
        """Evaluate, and write the model, the samples and, last, the record."""
        began = read_json(self.folder / _BEFORE)
        quality = {} if failed else self._evaluate(trainer, began)
        seconds, documents = round(trainer.meter.seconds, 3), trainer.meter.documents
        points = []
        if self.options.curve and not failed:
            end = trainer.state.global_step
            last = {"step": end, "seconds": seconds, "documents_encoded": documents, "test": quality["after"]}
            points = [*Curve(trainer, self.folder / _CURVE).measure(self.data, end), last]
        RunRecord(
            configuration=_configuration(self.config),
            versions={"python": platform.python_version(), **versions_of(_PACKAGES)},
            device=str(trainer.model.device),
            threads=torch.get_num_threads(),
            ranks=processes.count(),
            steps=trainer.state.global_step,
            seconds=seconds,
            documents_encoded=documents,
            before=began["before"],
            curve=points,
            failed=failed,
            data_fingerprint=began["data_fingerprint"],
            history=trainer.state.log_history,
            **found,
            **quality,
        ).write(self.folder)

    def _evaluate(self, trainer: RunTrainer, began: dict[str, Any]) -> dict[str, Any]:
        """Quality of the trained model, as fields of the record. Also writes the model, and the results of queries."""
        model, best_step = trainer.model, None
        shown: dict[str, Any] = {"before": [], "after": [], "changes": None}
        if self.options.export_negatives is not None:
            write_hard_negatives(self.options.export_negatives, trainer.loss, model, self.data)
        of_cache = samples.of_cache(trainer.loss, model, self.data)  # with the last weights, as the cache
        if self.config.load_best_model_at_end:
            best_step = self._best().load(model)
        if self.options.keep_model:
            merge_lora(model)
            model.save_pretrained(str(self.folder))
        has_test = self.data.has("test") and self.options.measure_after
        is_fallback = self.options.measure_after and not has_test and self.data.has("dev")
        needs_dev = self.options.measure_dev or is_fallback
        fields = {**({"test": "after"} if has_test else {}), **({"dev": "dev"} if needs_dev else {})}
        found = evaluate(model, self.data, tuple(fields), on_progress=self.on_progress)
        if has_test:
            results = samples.results_of(self.data, "test", found["test"].run)
            shown = samples.before_and_after(self.data, "test", began["results"], results)
            values = {"before": began["per_query"], "after": found["test"].per_query}
            write_json(self.folder / PER_QUERY, {"corpus": corpus_of(self.data, "test"), **values})
        write_json(self.folder / samples.SAMPLES, {**shown, **of_cache})
        return {"best_step": best_step, **{fields[split]: quality.metrics() for split, quality in found.items()}}


def _programs(config: RunConfig) -> tuple[str, ...]:
    """The programs that `report_to` names."""
    names = tuple(name.strip() for name in config.report_to.split(","))
    return () if names == ("none",) else names


def _check_programs(names: tuple[str, ...]) -> None:
    """Raise RunError unless transformers can log to these programs."""
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise RunError(f"--report-to has {name!r}; expected none, or some of {', '.join(INTEGRATION_TO_CALLBACK)}.")
        if name not in get_available_reporting_integrations():
            raise RunError(
                f"--report-to has {name!r}, whose package is not installed. Install it, for example with pip install "
                f"{name}, or leave it out."
            )


def _check_ranks(task: _Run) -> None:
    """Raise unless a run can be done on several ranks."""
    loss, data = task.config.loss, task.data
    if task.options.export_negatives is not None:
        raise RunError("--export-negatives runs in one process only: each rank has a part of the cache. Leave it out.")
    if loss == "memory-bank":
        raise RunError("--loss memory-bank runs in one process only: ranks do not share its queue.")
    if loss == "mined":
        raise RunError(
            "--loss mined runs in one process only: ranks need equal numbers of negatives. Mine negatives with "
            "mine_hard_negatives of sentence-transformers, and train with --loss negative-cache on that data."
        )
    if loss != "negative-cache" and data.negatives:
        raise RunError(
            f"--loss {loss} uses the negatives of {data.name} in one process only: it needs equal numbers of them on "
            "all ranks. Start one process, use --loss negative-cache, or leave them out with --negatives ignore."
        )


def _step_of(checkpoint: str | None) -> int:
    """The step of a checkpoint; 0 if there is none."""
    return 0 if checkpoint is None else int(checkpoint.rsplit("-", 1)[1])


def _can_resume(folder: Path) -> bool:
    """Whether an unfinished run has a checkpoint or is already trained."""
    return last_complete_checkpoint(folder) is not None or (folder / RECORD).exists()


def _clear(folder: Path) -> None:
    """Remove the files that only an unfinished run needs."""
    for path in (*folder.glob("checkpoint-*"), folder / _INITIAL, folder / _CURVE, folder / _BEST, folder / "eval"):
        shutil.rmtree(path, ignore_errors=True)
    for path in (folder / _BEFORE, *folder.glob("mined-*.json")):
        path.unlink(missing_ok=True)


def _check_unfinished(folder: Path, task: _Run) -> None:
    """Raise unless the unfinished run in a folder may be continued with this configuration and this data."""
    what = f"{str(folder)!r} has an unfinished run"
    for path in (folder / RECORD, folder / _BEFORE):
        if path.exists():
            saved = read_json(path)
            _check_same(what, saved["configuration"], task.config)
            _check_same_data(what, saved["data_fingerprint"], task.config, task.data)
            if saved["ranks"] != processes.count():
                ranks = counted(saved["ranks"], "rank")
                raise RunError(
                    f"{str(folder)!r} has an unfinished run on {ranks}, and this run has {processes.count()}, so its "
                    f"batches differ. Start {ranks}, or remove the folder."
                )


def _check_same_data(what: str, saved: str, config: RunConfig, data: RetrievalData) -> None:
    """Raise RunError unless the data has the fingerprint that was saved."""
    if saved != fingerprints.of_data(data):
        raise RunError(
            f"{what}, and {config.data!r} has changed since it began. Restore the data, or remove the folder to begin "
            "again."
        )


def _check_same(what: str, saved: dict[str, Any], config: RunConfig) -> None:
    if changed := changed_options(saved, _configuration(config), ignored=("output", "save_steps", "report_to")):
        raise RunError(f"{what} of another configuration: {changed}. Give the same options, or remove the folder.")


def _configuration(config: RunConfig) -> dict[str, Any]:
    """The configuration with the learning rate that is used."""
    return {**asdict(config), "learning_rate": used_learning_rate(config)}
