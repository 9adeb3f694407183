"""Numbers of things in messages."""

from __future__ import annotations

from collections.abc import Sequence


def counted(number: int, one: str, several: str | None = None) -> str:
    """A number with its noun, such as "1 query" or "2,403 queries".

    Args:
        number: The number.
        one: The noun in the singular.
        several: The noun in the plural; None for the singular with an s.
    """
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


def counted_queries(number: int, kind: str = "") -> str:
    """A number of queries, such as "1 test query" with the kind "test"."""
    kind = kind and f"{kind} "
    return counted(number, f"{kind}query", f"{kind}queries")


def listed(words: Sequence[str]) -> str:
    """Words as a list in a sentence, such as "a, b and c"; empty without words."""
    *first, last = words or [""]
    return f"{', '.join(first)} and {last}" if first else last


def percent(share: float) -> str:
    """A share, such as "12 %" or "1.5 %"."""
    return f"{100 * share:.0f} %" if share >= 0.095 else f"{100 * share:.1f} %"
