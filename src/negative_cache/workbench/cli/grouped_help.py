"""The help of a command: its options in groups, and examples."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from typer.core import TyperCommand

from negative_cache.workbench.cli.examples import EXAMPLES
from negative_cache.workbench.data.options import DataOptions
from negative_cache.workbench.training.config import FIELDS_OF, TrainingSettings

_EVALUATION = {
    "no_eval", "eval_documents", "eval_steps", "load_best_model_at_end", "early_stopping_patience", "save_steps",
    "resume", "export_negatives", "report_to",
}  # fmt: skip
_PROMPTS = {"query_prompt", "document_prompt"}
_TRAINING = {field.name for field in fields(TrainingSettings)} - _PROMPTS - _EVALUATION
_GROUPS = {
    "Data": {field.name for field in fields(DataOptions)} - _EVALUATION,
    "Loss": {"scale", "gradcache_factor"}.union(*FIELDS_OF.values()),
    "Training": {"epochs", "max_steps", "batch_size", "learning_rate", "learning_rates", "seed", "seeds", *_TRAINING},
    "Evaluation and checkpoints": _EVALUATION,
}
_GROUPS_WITHOUT_TRAINING = {
    "Data": {field.name for field in fields(DataOptions)},
    "Encoding": {*_PROMPTS, "max_seq_length", "truncate_dim", "batch_size", "dtype", "device"},
}


# Names of options in other programs -> what they are here, in one command or another.
_ALIASES = {
    "--lr": ("--learning-rate", "--learning-rates"),
    "--bs": ("--batch-size",),
    "--per-device-train-batch-size": ("--batch-size",),
    "--num-train-epochs": ("--epochs",),
    "--max-length": ("--max-seq-length",),
    "--temperature": ("--scale",),
    "--output-dir": ("--output",),
    "--top-k": ("--num-results",),
    "-k": ("--num-results",),
}


class GroupedCommand(TyperCommand):
    """A command that shows its options in groups, after those that are in none, and ends with examples.

    Of an option that it does not have, it says what other programs mean by it; of a missing one, what it is for.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # both errors are in click or, as typer's own copy, in another module
            known = {name for param in self.get_params(ctx) for name in param.opts}
            given = str(getattr(error, "option_name", "")).replace("_", "-")
            if meant := [name for name in _ALIASES.get(given, ()) if name in known]:
                error.possibilities = meant  # type: ignore[attr-defined]
            if type(error).__name__ == "MissingParameter":
                error.message = error.param.help  # type: ignore[attr-defined]
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the help of the options."""
        params = self.get_params(ctx)
        names = {param.name for param in params}
        groups = _GROUPS if "epochs" in names else _GROUPS_WITHOUT_TRAINING if "corpus" in names else {}
        records: dict[str, list[tuple[str, str]]] = {name: [] for name in ("Arguments", "Options", *groups)}
        for param in params:
            name = next((group for group, names in groups.items() if param.name in names), "Options")
            if (record := param.get_help_record(ctx)) is not None:
                records["Arguments" if param.param_type_name == "argument" else name].append(record)
        for name, own in records.items():
            if own:
                with formatter.section(name):
                    formatter.write_dl(own)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples, each on one line that can be copied."""
        with formatter.section("Examples"):
            for example in EXAMPLES[str(self.name)]:
                formatter.write(f"{'':{formatter.current_indent}}{example}\n")
