"""Numbers with their nouns."""

from __future__ import annotations

from negative_cache.workbench.counting import counted, counted_queries


def test_the_noun_agrees_with_its_number():
    assert [counted(number, "run") for number in (0, 1, 2, 2403)] == ["0 runs", "1 run", "2 runs", "2,403 runs"]
    assert [counted(number, "loss", "losses") for number in (1, 2)] == ["1 loss", "2 losses"]
    assert [counted_queries(number) for number in (1, 2)] == ["1 query", "2 queries"]
    assert [counted_queries(number, "test") for number in (1, 2)] == ["1 test query", "2 test queries"]
