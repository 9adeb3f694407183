"""`--config`: options of a command from a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from negative_cache.workbench.suggestions import did_you_mean
from negative_cache.workbench.training.config import flag_of

_NESTED = "data_options"  # of a configuration in run.json or compare.json


def _use(context: typer.Context, path: Path | None) -> Path | None:
    """Take the options in a file as the defaults of a command."""
    if path is not None:
        names = [param.name for param in context.command.params if param.name not in ("config_file", "help", None)]
        try:
            context.default_map = _options(path, [str(name) for name in names])
        except (OSError, ValueError) as error:
            raise typer.BadParameter(str(error)) from error
    return path


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=_use,
        is_eager=True,
        help="YAML file of options, or run.json or compare.json of an earlier call. The command overrides it.",
    ),
]


def _options(path: Path, names: list[str]) -> dict[str, Any]:
    """The options in a file, by their names in Python.

    Args:
        path: YAML or JSON; the record of a run or a comparison, whose output is left out.
        names: The options of the command.

    Raises:
        ValueError: The file is not a mapping of options of the command.
    """
    content = _read(path)
    if isinstance(content.get("configuration"), Mapping):
        content = {key: value for key, value in content["configuration"].items() if key != "output"}
        if "save_steps" in content:
            content["save_steps"] = content["save_steps"] or 0
    content |= content.pop(_NESTED, None) or {}
    options: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in names:
            hint = did_you_mean(name, names) or f" The options are {', '.join(names)}."
            raise ValueError(f"{path} has {key!r}, which is not an option of this command.{hint}")
        if isinstance(value, Mapping):
            raise ValueError(f"{path}: the value of {key!r} is a mapping; expected that of {flag_of(name)}.")
        if value is not None:
            options[name] = ",".join(map(str, value)) if isinstance(value, list) else value
    return options


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} has no options: expected lines such as `batch_size: 64`.")
    return content
