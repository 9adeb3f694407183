"""One training run: sentence-transformers' trainer with one of the losses, and a record of what happened."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss
from negative_cache.integrations.trainer import last_complete_checkpoint
from negative_cache.workbench import processes, samples
from negative_cache.workbench.config import RunConfig, RunError
from negative_cache.workbench.data import DataError, RetrievalData
from negative_cache.workbench.evaluation import CountFn, encode_corpus, make_evaluator, metrics_of
from negative_cache.workbench.memory_bank import MemoryBankLoss
from negative_cache.workbench.models import learning_rate_of, load_model, load_trained
from negative_cache.workbench.run_trainer import (
    Progress,
    ProgressCallback,
    RunTrainer,
    peak_memory_bytes,
    train_to_the_end,
)

GRADCACHE_MINI_BATCH = 32
LOG_STEPS, MIN_LOGS = 10, 30  # every so many steps, or more often if that is less than so many times

RECORD = "run.json"
_INITIAL, _BEFORE = "initial", "before.json"

logger = logging.getLogger("negative_cache")


def finished_run(config: RunConfig, resume: bool) -> dict[str, Any]:
    """The record of a run that has ended already, which `resume` finds complete; empty if the output is free.

    Raises:
        RunError: The output folder exists and is not that of a run of this configuration that is to be resumed.
    """
    output = Path(config.output)
    if not output.exists():
        return {}
    if not (resume and (output / RECORD).is_file()):
        raise RunError(f"The output folder {config.output!r} exists. Choose another, or remove it.")
    record: dict[str, Any] = json.loads((output / RECORD).read_text(encoding="utf-8"))
    _check_same(f"{config.output!r} has a finished run", record["configuration"], config)
    return record


def run(
    config: RunConfig,
    data: RetrievalData,
    progress: Progress | None = None,
    resume: bool = False,
    told: CountFn | None = None,
) -> dict[str, Any]:
    """Train, evaluate before and after on the test split, and write model, `samples.json` and `run.json`.

    Until it is done the run lives in `OUTPUT.partial`, with its checkpoints; then that is renamed. Under `torchrun`
    or `accelerate launch` all ranks call this; rank 0 evaluates and writes.

    Args:
        config: What to do.
        data: The data that `config.data` names.
        progress: Called with (step, steps, latest metrics) while training.
        resume: Continue an unfinished run of the same configuration, if there is one.
        told: Called with the number of documents that are encoded, and of all, while evaluating.

    Returns:
        The content of `run.json`; on other ranks than 0 an empty dict, unless the run had ended already.

    Raises:
        DataError: The data has no training or test split.
        RunError, ModelError: The configuration or model does not work.
        RunFailedError: Training met values that are not finite.
    """
    if record := finished_run(config, resume):
        return record
    data.judged("test")
    columns = data.training_columns()
    if config.eval_steps is not None and not data.qrels.get("dev"):
        raise DataError(f"{data.name} has no dev split to evaluate on; leave --eval-steps out.")
    is_first = processes.start() == 0
    if config.loss == "memory-bank" and processes.count() > 1:
        raise RunError("--loss memory-bank works in one process alone: ranks do not share its queue.")
    output = Path(config.output)
    folder = output.with_name(f"{output.name}.partial")
    if is_first and folder.exists():
        _check_same_run(folder, config, resume)
    is_trained = (folder / RECORD).exists()  # stopped between the last step and the end
    processes.wait()
    try:
        if not is_trained:
            if is_first and not (folder / _BEFORE).exists():
                _begin(folder, config, data, columns, told)
            processes.wait()
            trainer = _train(folder, config, data, columns, progress if is_first else None)
            if is_first:
                _finish(folder, config, data, columns, trainer, told)
        if is_first:
            _clear(folder)
            folder.rename(output)
    except BaseException as error:
        is_lost = last_complete_checkpoint(folder) is None and not (folder / RECORD).exists()
        if is_first and is_lost:
            shutil.rmtree(folder, ignore_errors=True)
        elif is_first and not isinstance(error, KeyboardInterrupt):  # of which the caller says how to go on
            logger.warning("The run stopped; --resume continues it from its last checkpoint in %s.", folder)
        raise
    processes.wait()
    return finished_run(config, True) if is_first else {}


def _begin(
    folder: Path, config: RunConfig, data: RetrievalData, columns: dict[str, list[Any]], told: CountFn | None
) -> None:
    """Make the folder of the run, with the untrained model, its quality and what it finds."""
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped before it began
    folder.mkdir(parents=True)
    model = load_model(config.model, [*columns["anchor"], *columns["positive"]], config.seed)
    model.save_pretrained(str(folder / _INITIAL), create_model_card=False)
    corpus = encode_corpus(model, data, told)
    write_json(
        folder / _BEFORE,
        {
            "configuration": _configuration(config),
            "ranks": processes.count(),
            "before": metrics_of(model, data, "test", corpus),
            "hits": samples.hits(model, data, "test", corpus),
        },
    )


def _check_same_run(folder: Path, config: RunConfig, resume: bool) -> None:
    """Raise unless the unfinished run in the folder may be continued with this configuration."""
    if not resume:
        raise RunError(f"{str(folder)!r} has an unfinished run. Continue it with --resume, or remove the folder.")
    for path in (folder / RECORD, folder / _BEFORE):
        if path.exists():
            saved = json.loads(path.read_text(encoding="utf-8"))
            _check_same(f"{str(folder)!r} has an unfinished run", saved["configuration"], config)
            if saved["ranks"] != processes.count():
                raise RunError(
                    f"{str(folder)!r} has an unfinished run on {saved['ranks']} ranks; here are {processes.count()}, "
                    "whose batches would be others. Start as many, or remove the folder."
                )


def _check_same(what: str, saved: dict[str, Any], config: RunConfig) -> None:
    differing = [
        f"{key} was {saved.get(key)!r}, is {value!r}"
        for key, value in _configuration(config).items()
        if key not in ("output", "save_steps") and saved.get(key) != value
    ]
    if differing:
        raise RunError(
            f"{what} of another configuration: {'; '.join(differing)}. Give the same options, or remove the folder."
        )


def _configuration(config: RunConfig) -> dict[str, Any]:
    """The configuration with the learning rate that is used."""
    rate = learning_rate_of(config.model) if config.learning_rate is None else config.learning_rate
    return {**asdict(config), "learning_rate": rate}


def _train(
    folder: Path,
    config: RunConfig,
    data: RetrievalData,
    columns: dict[str, list[Any]],
    progress: Progress | None,
) -> RunTrainer:
    model = load_trained(str(folder / _INITIAL))  # with the same tokenizer on all ranks and after a restart
    evaluator = make_evaluator(model, data, "dev") if config.eval_steps is not None else None
    trainer = make_trainer(folder, config, columns, model, progress, evaluator)
    checkpoint = last_complete_checkpoint(folder)
    trainer.resumed_from = 0 if checkpoint is None else int(checkpoint.rsplit("-", 1)[1])
    train_to_the_end(trainer, checkpoint)
    return trainer


def _finish(
    folder: Path,
    config: RunConfig,
    data: RetrievalData,
    columns: dict[str, list[Any]],
    trainer: RunTrainer,
    told: CountFn | None,
) -> None:
    """Evaluate, write the model, what is to be looked at and, last, `run.json`."""
    model = trainer.model
    began = json.loads((folder / _BEFORE).read_text(encoding="utf-8"))
    corpus = encode_corpus(model, data, told)
    model.save_pretrained(str(folder))
    looked_at = {
        "before": began.get("hits", []),
        "after": samples.hits(model, data, "test", corpus),
        **samples.of_cache(trainer.loss, model, data),
    }
    write_json(folder / samples.SAMPLES, looked_at)
    record = {
        "configuration": _configuration(config),
        "versions": _versions(),
        "device": str(model.device),
        "ranks": processes.count(),
        "steps": trainer.state.global_step,
        "resumed_from_step": trainer.resumed_from,
        "training_pairs": len(columns["anchor"]),
        "seconds": round(trainer.seconds, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "before": began["before"],
        "after": metrics_of(model, data, "test", corpus),
        "history": trainer.state.log_history,
    }
    write_json(folder / RECORD, record)


def _clear(folder: Path) -> None:
    """Remove what only an unfinished run needs."""
    for path in (*folder.glob("checkpoint-*"), folder / _INITIAL, folder / "eval"):
        shutil.rmtree(path, ignore_errors=True)
    (folder / _BEFORE).unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write a file that is there whole or not at all."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    beside.replace(path)


def make_trainer(
    folder: Path,
    config: RunConfig,
    columns: dict[str, list[Any]],
    model: SentenceTransformer,
    progress: Progress | None = None,
    evaluator: Any = None,
    report_to: Sequence[str] = ("tensorboard",),
) -> RunTrainer:
    """The trainer of a run, which writes to `folder` and tells `progress` of its steps."""
    model.model_card_data.widget = [
        {"source_sentence": columns["anchor"][0], "sentences": list(dict.fromkeys(columns["positive"][:8]))[:3]}
    ]
    trainer = RunTrainer(
        model=model,
        args=_arguments(folder, config, report_to, len(columns["anchor"])),
        train_dataset=_dataset(columns),
        loss=make_loss(config, model),
        evaluator=evaluator,
        callbacks=[ProgressCallback(progress)] if progress else None,
    )
    _silence(trainer)
    return trainer


def make_loss(config: RunConfig, model: SentenceTransformer) -> Any:
    """The loss that a configuration names.

    The embeddings of a static model are nothing to recompute: its gradient cache is the plain loss of the large batch.
    """
    if config.loss == "memory-bank":
        return MemoryBankLoss(model, config.cache_size, config.scale)
    if config.loss == "in-batch" or (config.loss == "gradcache" and isinstance(model[0], StaticEmbedding)):
        return MultipleNegativesRankingLoss(model, scale=config.scale, gather_across_devices=processes.count() > 1)
    if config.loss == "gradcache":
        return CachedMultipleNegativesRankingLoss(
            model,
            scale=config.scale,
            mini_batch_size=GRADCACHE_MINI_BATCH,
            gather_across_devices=processes.count() > 1,
        )
    return NegativeCacheRankingLoss(
        model,
        cache_size=config.cache_size,
        scale=config.scale,
        top_k=config.top_k,
        num_samples=config.num_samples,
        in_batch=config.in_batch,
        shared=config.shared,
        num_candidates=config.num_candidates,
        absolute_margin=config.absolute_margin,
        relative_margin=config.relative_margin,
        symmetric=config.symmetric,
        refresh_per_step=config.refresh_per_step,
        use_lru=config.use_lru,
        embedding_dtype=getattr(torch, config.embedding_dtype),
        seed=config.seed,
        gather_across_devices=processes.count() > 1,
    )


def _arguments(
    folder: Path, config: RunConfig, report_to: Sequence[str], num_pairs: int
) -> SentenceTransformerTrainingArguments:
    per_step = config.batch_size * processes.count()
    num_steps = config.epochs * num_pairs / per_step if config.max_steps is None else config.max_steps
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    return SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        # the batches of all ranks are parts of one, so that it has no duplicates and is the batch of one process
        per_device_train_batch_size=per_step,
        accelerator_config={"split_batches": processes.count() > 1},
        num_train_epochs=config.epochs,
        max_steps=-1 if config.max_steps is None else config.max_steps,
        learning_rate=_configuration(config)["learning_rate"],
        warmup_steps=0.1,
        seed=config.seed,
        data_seed=config.seed,
        batch_sampler="no_duplicates",
        save_strategy="no" if config.save_steps is None else "steps",
        save_steps=config.save_steps or 500,
        save_total_limit=2,
        eval_strategy="no" if config.eval_steps is None else "steps",
        eval_steps=config.eval_steps,
        logging_steps=max(1, min(LOG_STEPS, int(num_steps) // MIN_LOGS)),
        report_to=list(report_to),
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        dataloader_drop_last=processes.count() > 1,  # as the trainer does by itself then, with a warning
        ddp_find_unused_parameters=False,
    )


def _dataset(columns: dict[str, list[Any]]) -> Dataset:
    disable_progress_bars()
    return Dataset.from_dict(columns)


def _silence(trainer: RunTrainer) -> None:
    """Logs go to our progress bar, not to the terminal."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)


def _versions() -> dict[str, str]:
    packages = ("negative-cache", "torch", "sentence-transformers", "transformers", "datasets")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
