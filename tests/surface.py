"""Public names with their arguments, and the options of the command line, as text.

    python tests/surface.py

regenerates tests/surface.txt and docs/api/names.md; test_surface.py compares.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import typer

import negative_cache
from negative_cache import integrations
from negative_cache.workbench.cli import app

FILE = Path(__file__).with_name("surface.txt")
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api" / "names.md"
HEAD = """# All public names

This page can be read without building the site. It says what each name is for, and shows its arguments and defaults.
The links lead to the docstrings, which have shapes, types, gradients and errors. `python tests/surface.py` writes it.
"""

# Public names of modules, beside those that `negative_cache` exports and all of the integrations.
NAMES = {
    "negative_cache.checkpoint": (
        "CheckpointError",
        "full_state_dict",
        "load_checkpoint",
        "load_full_state_dict",
        "save_checkpoint",
    ),
    "negative_cache.data": ("DataError", "DataOptions", "RetrievalData", "load_data"),
    "negative_cache.losses": ("RetrievalReturn",),
    "negative_cache.memory": ("Bytes",),
    "negative_cache.retrieval": ("Ceilings", "Retrieved", "RowPool", "Scale", "Search", "retrieve"),
}
WHOLE = ("negative_cache.estimators",)


def public_names() -> dict[str, Any]:
    """Name with its module -> class or function, for all that is public."""
    found = {f"negative_cache.{name}": getattr(negative_cache, name) for name in negative_cache.__all__}
    for name, chosen in NAMES.items():
        found |= {f"{name}.{key}": getattr(importlib.import_module(name), key) for key in chosen}
    modules = [info.name for info in pkgutil.iter_modules(integrations.__path__, "negative_cache.integrations.")]
    for name in [*WHOLE, *modules]:
        found |= own_names(importlib.import_module(name))
    return {name: value for name, value in found.items() if inspect.isclass(value) or inspect.isfunction(value)}


def own_names(module: ModuleType) -> dict[str, Any]:
    """What a module offers: what it says, or else what it defines itself and does not hide."""
    own = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    return {f"{module.__name__}.{name}": getattr(module, name) for name in getattr(module, "__all__", own)}


def lines() -> Iterator[str]:
    """One line for each name, member of a class, and option of a command."""
    for name, value in sorted(public_names().items()):
        yield name + arguments(value)
        for member, function in members(value):
            yield f"{name}.{member}{'' if isinstance(function, property) else arguments(function)}"
    for name, command in sorted(typer.main.get_command(app).commands.items()):
        for flags in sorted("/".join([*param.opts, *param.secondary_opts]) for param in command.params):
            yield f"negative-cache {name} {flags}"


def members(value: Any) -> Iterator[tuple[str, Any]]:
    """Name and function, or property, of the public members that a class defines itself."""
    for member, function in sorted(vars(value).items()) if inspect.isclass(value) else ():
        function = function.__func__ if isinstance(function, classmethod | staticmethod) else function
        is_public = member == "__call__" or not member.startswith("_")
        if is_public and (inspect.isfunction(function) or isinstance(function, property)):
            yield member, function


def page() -> Iterator[str]:
    """The lines of docs/api/names.md: a section per module."""
    yield from HEAD.splitlines()
    module = ""
    for name, value in sorted(public_names().items(), key=lambda item: (item[0].rpartition(".")[0], item[0])):
        above, _, own = name.rpartition(".")
        if above != module:
            module = above
            yield from ("", f"## {module}", "")
        source = Path(inspect.getsourcefile(inspect.unwrap(value)) or "").relative_to(ROOT)
        yield f"- [`{own}{arguments(value)}`](../../{source}): {summary(value)}"
        for member, function in members(value):
            given = (
                ""
                if isinstance(function, property)
                else arguments(function).replace("(self, ", "(").replace("(self)", "()")
            )
            yield f"    - `{member}{given}`: {summary(function)}"


def summary(value: Any) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((inspect.getdoc(value) or "").partition("\n\n")[0].split())


def arguments(value: Any) -> str:
    """Names and defaults, without types: `(scores, k=1)`."""
    parameters = inspect.signature(value).parameters.values() if takes_arguments(value) else ()
    plain = [parameter.replace(annotation=parameter.empty, default=shown(parameter)) for parameter in parameters]
    return str(inspect.Signature(plain))


def takes_arguments(value: Any) -> bool:
    """Whether a signature is its own: that of an exception, or of a module without `__init__`, is another package's."""
    return not inspect.isclass(value) or "__init__" in vars(value) or hasattr(value, "_fields")


class Default:
    """Shows a default without its address in memory."""

    def __init__(self, value: Any) -> None:
        self.text = getattr(value, "__name__", repr(value))

    def __repr__(self) -> str:
        return self.text


def shown(parameter: inspect.Parameter) -> Any:
    return parameter.empty if parameter.default is parameter.empty else Default(parameter.default)


if __name__ == "__main__":
    FILE.write_text("".join(f"{line}\n" for line in lines()), encoding="utf-8")
    PAGE.write_text("".join(f"{line}\n" for line in page()), encoding="utf-8")
    print(f"Written: {FILE}, {PAGE}")
