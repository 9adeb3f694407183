"""The help of a command with many options, in groups."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from typer.core import TyperCommand

from negative_cache.workbench.data.options import DataOptions
from negative_cache.workbench.training.config import FIELDS_OF, TrainingSettings

_EVALUATION = {
    "no_eval", "eval_documents", "eval_steps", "load_best_model_at_end", "early_stopping_patience", "save_steps",
    "resume", "export_negatives", "report_to",
}  # fmt: skip
_TRAINING = {field.name for field in fields(TrainingSettings)} - {"query_prompt", "document_prompt"} - _EVALUATION
_GROUPS = {
    "Data": {field.name for field in fields(DataOptions)} - _EVALUATION,
    "Loss": {"scale", "gradcache_factor"}.union(*FIELDS_OF.values()),
    "Training": {"epochs", "max_steps", "batch_size", "learning_rate", "learning_rates", "seed", "seeds", *_TRAINING},
    "Evaluation and checkpoints": _EVALUATION,
}


class GroupedCommand(TyperCommand):
    """A command that shows its options in groups, after those that are in none."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the help of the options."""
        groups: dict[str, list[tuple[str, str]]] = {name: [] for name in ("Options", *_GROUPS)}
        for param in self.get_params(ctx):
            name = next((group for group, names in _GROUPS.items() if param.name in names), "Options")
            if (record := param.get_help_record(ctx)) is not None:
                groups[name].append(record)
        for name, records in groups.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)
