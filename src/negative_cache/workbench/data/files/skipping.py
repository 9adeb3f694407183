"""`Skipped`: what was skipped when data was read."""

from __future__ import annotations

from collections.abc import Mapping


class Skipped:
    """Counts what was skipped, by reason, with the place of the first."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._first: dict[str, str] = {}

    def add(self, what: str, place: str) -> None:
        """Count one."""
        self._first.setdefault(what, place)
        self.add_counts({what: 1})

    def add_counts(self, counts: Mapping[str, int]) -> None:
        """Count several by reason."""
        for what, number in counts.items():
            self.counts[what] = self.counts.get(what, 0) + number

    def notes(self, name: str) -> list[str]:
        """One note of all that was skipped in the dataset of this name; none if nothing was."""
        if not self.counts:
            return []
        parts = []
        for what, number in sorted(self.counts.items()):
            first = f" (first: {self._first[what]})" if what in self._first else ""
            parts.append(f"{what}: {number:,}{first}")
        return [f"{name}: skipped {'; '.join(parts)}."]
