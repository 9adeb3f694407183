"""The `negative-cache` command, also available as `python -m negative_cache`."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def main() -> None:
    """Run the command line, or exit with an install hint if a package that it needs is missing."""
    try:
        from negative_cache.workbench.cli import app

        app()  # which imports rich when a command begins
    except ModuleNotFoundError as error:
        if not _is_package_to_install(error.name):
            raise
        sys.exit(f"The command line needs more packages ({error.name}): pip install 'negative-cache[train]'")
    except KeyboardInterrupt:
        sys.exit(130)


def _is_package_to_install(module: str | None) -> bool:
    """Whether a module that was not found is of a package that is not installed, neither of this one nor of Python."""
    package = (module or "").partition(".")[0]
    is_other = package not in ("", "negative_cache") and package not in sys.stdlib_module_names
    return is_other and find_spec(package) is None


if __name__ == "__main__":
    main()
