"""Random histories of updates leave a cache in the state of a model in plain Python."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from negative_cache.cache.rows import NegativeCache
from negative_cache.cache.specs import FixedLenFeature, RaggedFeature
from negative_cache.cache.update import RowUpdates, check_new_items, update_rows
from support import as_on_a_gpu

SPECS = {
    "embedding": FixedLenFeature([2], torch.float32),
    "tokens": RaggedFeature(torch.int64, max_length=5),
    "label": FixedLenFeature([], torch.int32),
}

tokens = st.lists(st.integers(1, 9), max_size=5)
new_items = st.lists(st.tuples(st.integers(-99, 99), tokens), min_size=1, max_size=4)
flags = st.lists(st.booleans(), min_size=4, max_size=4)


@dataclass
class Row:
    number: int = 0
    tokens: list[int] = field(default_factory=list)
    label: int = 0
    written: int = 0
    is_filled: bool = False
    document_id: int = -1


class Model:
    """What the documentation says, row by row."""

    def __init__(self, num_rows: int) -> None:
        self.rows = [Row() for _ in range(num_rows)]
        self.step = 0

    def put(self, row: int, item: tuple[int, list[int]], document_id: int) -> None:
        self.rows[row] = Row(item[0], item[1], item[0], self.step, True, document_id)

    def update(self, updates: list[tuple[int, int]], mask: list[bool], resets_age: bool) -> None:
        for (row, number), is_allowed in zip(updates, mask, strict=False):
            if is_allowed:
                self.rows[row].number = number
                if resets_age:
                    self.rows[row].written = self.step

    def insert(self, items: list[tuple[int, list[int]]], mask: list[bool], ids: list[int] | None) -> None:
        ids = [-1] * len(items) if ids is None else ids[: len(items)]
        entries = [entry for entry, is_allowed in zip(zip(items, ids, strict=True), mask, strict=False) if is_allowed]
        place = {row.document_id: at for at, row in enumerate(self.rows) if row.is_filled and row.document_id >= 0}
        for item, document_id in entries:
            if document_id in place:
                self.put(place[document_id], item, document_id)
        oldest = iter(sorted(range(len(self.rows)), key=lambda at: (self.rows[at].written, at)))
        for item, document_id in entries:
            if document_id not in place:
                self.put(next(oldest), item, document_id)
                if document_id >= 0:
                    place[document_id] = -1


class CacheMachine(RuleBasedStateMachine):
    use_lru = True

    @initialize(num_rows=st.integers(4, 9))
    def start(self, num_rows: int) -> None:
        self.cache = NegativeCache.empty(SPECS, num_rows)
        self.model = Model(num_rows)

    @rule(items=new_items)
    def insert(self, items: list[Any]) -> None:
        self._step(items=items)

    @rule(items=new_items, mask=flags)
    def insert_masked(self, items: list[Any], mask: list[bool]) -> None:
        self._step(items=items, mask=mask)

    @rule(items=new_items, mask=flags, ids=st.lists(st.integers(-1, 6), min_size=4, max_size=4))
    def insert_documents(self, items: list[Any], mask: list[bool], ids: list[int]) -> None:
        self._step(items=items, mask=mask, ids=ids)

    @rule(data=st.data(), mask=flags)
    def update(self, data: st.DataObject, mask: list[bool]) -> None:
        self._step(updates=self._draw_updates(data), update_mask=mask)

    @rule(data=st.data(), items=new_items, ids=st.lists(st.integers(-1, 6), min_size=4, max_size=4))
    def update_and_insert(self, data: st.DataObject, items: list[Any], ids: list[int]) -> None:
        self._step(items=items, ids=ids, updates=self._draw_updates(data))

    @rule(data=st.data(), items=new_items)
    def update_and_reinsert(self, data: st.DataObject, items: list[Any]) -> None:
        self._step(items=items, updates=self._draw_updates(data), reinserted=self._draw_updates(data))

    @rule(items=new_items)
    def update_of_a_copy_changes_nothing(self, items: list[Any]) -> None:
        update_rows(copy.deepcopy(self.cache), use_lru=self.use_lru, new_items=self._check(items))

    @rule()
    def save_and_load(self) -> None:
        file = io.BytesIO()
        torch.save(self.cache.state_dict(), file)
        file.seek(0)
        self.cache = NegativeCache.empty(SPECS, self.cache.num_rows)
        self.cache.load_state_dict(torch.load(file, weights_only=True))

    @rule()
    def copy(self) -> None:
        self.cache = copy.deepcopy(self.cache)

    @invariant()
    def cache_equals_model(self) -> None:
        if not hasattr(self, "cache"):
            return
        assert_equal(self.cache, self.model)

    def _draw_updates(self, data: st.DataObject) -> list[tuple[int, int]]:
        rows = st.integers(0, self.cache.num_rows - 1)
        return data.draw(st.lists(st.tuples(rows, st.integers(-99, 99)), min_size=1, max_size=4))

    def _check(self, items: list[Any]) -> Any:
        return check_new_items(self.cache, SPECS, _tensors(items))

    def _step(
        self,
        items: list[Any] | None = None,
        mask: list[bool] | None = None,
        ids: list[int] | None = None,
        updates: list[tuple[int, int]] | None = None,
        update_mask: list[bool] | None = None,
        reinserted: list[tuple[int, int]] | None = None,
    ) -> None:
        call: dict[str, Any] = {}
        self.model.step += 1
        if updates is not None:
            self.model.update(updates, update_mask or [True] * 4, self.use_lru)
            call["updates"] = _row_updates(updates, update_mask)
        if reinserted is not None:
            self.model.update(reinserted, [True] * 4, True)
            call["reinserted"] = _row_updates(reinserted, None)
        if items is not None:
            self.model.insert(items, mask or [True] * 4, ids)
            call["new_items"] = self._check(items)
            call["new_items_mask"] = torch.tensor(mask[: len(items)]) if mask else None
            call["document_ids"] = torch.tensor(ids[: len(items)]) if ids else None
        self._update(call)

    def _update(self, call: dict[str, Any]) -> None:
        update_rows(self.cache, use_lru=self.use_lru, **call)


class FifoMachine(CacheMachine):
    use_lru = False


class WithoutReadsMachine(CacheMachine):
    """Updates in which the host reads no value, as on a GPU."""

    def _update(self, call: dict[str, Any]) -> None:
        with as_on_a_gpu():
            super()._update(call)


def _row_updates(updates: list[tuple[int, int]], mask: list[bool] | None) -> RowUpdates:
    numbers = torch.tensor([number for _, number in updates]).float()
    rows = torch.tensor([row for row, _ in updates])
    chosen = None if mask is None else torch.tensor(mask[: len(updates)])
    return RowUpdates(rows, {"embedding": torch.stack([numbers, -numbers], dim=1)}, chosen)


def _tensors(items: list[tuple[int, list[int]]]) -> dict[str, Any]:
    numbers = torch.tensor([number for number, _ in items])
    return {
        "embedding": torch.stack([numbers, -numbers], dim=1).float(),
        "tokens": [torch.tensor(row, dtype=torch.int64) for _, row in items],
        "label": numbers,
    }


def assert_equal(cache: NegativeCache, model: Model) -> None:
    data = cache.data
    longest = max(len(row.tokens) for row in model.rows)
    assert data["embedding"].tolist() == [[row.number, -row.number] for row in model.rows]
    assert data["tokens"].tolist() == [row.tokens + [0] * (longest - len(row.tokens)) for row in model.rows]
    assert data["label"].tolist() == [row.label for row in model.rows]
    assert cache.age.tolist() == [model.step - row.written for row in model.rows]
    assert cache.filled.tolist() == [row.is_filled for row in model.rows]
    assert cache.document_ids.tolist() == [row.document_id for row in model.rows]
    ids = torch.arange(7)
    places = {row.document_id: at for at, row in enumerate(model.rows) if row.document_id >= 0}
    assert cache.find(ids).tolist() == [places.get(number, -1) for number in range(7)]


CacheMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
FifoMachine.TestCase.settings = CacheMachine.TestCase.settings
WithoutReadsMachine.TestCase.settings = settings(CacheMachine.TestCase.settings, max_examples=20)
TestLru = CacheMachine.TestCase
TestFifo = FifoMachine.TestCase
TestWithoutReads = WithoutReadsMachine.TestCase
