"""The `negative-cache` command, also available as `python -m negative_cache`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or exit with an install hint if its dependencies are missing."""
    try:
        from negative_cache.workbench.cli import app

        app()  # which imports rich when a command begins
    except ImportError as error:
        sys.exit(f"The command line needs more packages ({error.name}): pip install 'negative-cache[train]'")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
