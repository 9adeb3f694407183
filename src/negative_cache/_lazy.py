"""Attributes of a package that are imported on first use (PEP 562): torch alone takes more than a second to import."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def lazy_attributes(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package, which find its names in its modules.

    The modules of the package are attributes, too, as if they had been imported.

    Args:
        package: `__name__` of the package.
        names: Module of the package -> names that the package has from it.
    """
    module_of = {name: module for module, own in names.items() for name in own}
    found = vars(sys.modules[package])

    def get_attribute(name: str) -> Any:
        if name in module_of:
            found[name] = getattr(import_module(f"{package}.{module_of[name]}"), name)
        elif name.startswith("_") or find_spec(f"{package}.{name}") is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package])
        else:
            found[name] = import_module(f"{package}.{name}")
        return found[name]

    def names_of_all() -> list[str]:
        return sorted({*found, *module_of, *found.get("__all__", ())})

    return get_attribute, names_of_all
