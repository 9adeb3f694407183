"""Texts are stored without padding, and read with the padding on the side on which they came."""

from __future__ import annotations

import io
import itertools
import json
import random
from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from negative_cache.cache.columns import RaggedColumn, make_column
from negative_cache.cache.rows import NegativeCache
from negative_cache.cache.specs import FeatureSpec, FixedLenFeature, RaggedFeature, spec_to_json
from negative_cache.cache.update import check_new_items, update_rows
from negative_cache.cache.validation import RaggedRows, check_features, concatenate, pad_rows, select
from support import as_on_a_gpu

PAD = 7  # a tokenizer's padding id; it also occurs as a token
SPECS: dict[str, FeatureSpec] = {
    "input_ids": RaggedFeature(torch.int32, default_value=PAD),
    "attention_mask": RaggedFeature(torch.int8),
    "token_type_ids": RaggedFeature(torch.uint8),
}
Text = list[tuple[int, int]]  # tokens and their types


def tokenized(texts: Sequence[Text], side: str) -> dict[str, Tensor]:
    """What a tokenizer returns for a batch."""
    width = max(map(len, texts), default=0)
    values: dict[str, list[list[int]]] = {key: [] for key in SPECS}
    for text in texts:
        padding = width - len(text)
        before, after = (padding, 0) if side == "left" else (0, padding)
        values["input_ids"].append([PAD] * before + [token for token, _ in text] + [PAD] * after)
        values["attention_mask"].append([0] * before + [1] * len(text) + [0] * after)
        values["token_type_ids"].append([0] * before + [kind for _, kind in text] + [0] * after)
    return {
        key: torch.tensor(value, dtype=SPECS[key].dtype).reshape(len(texts), width) for key, value in values.items()
    }


def random_texts(rng: random.Random, count: int, longest: int) -> list[Text]:
    lengths = [rng.randint(1, longest) for _ in range(count)]
    return [[(rng.choice([0, PAD, 1, 2, 3]), rng.randint(0, 1)) for _ in range(length)] for length in lengths]


def insert(cache: NegativeCache, features: dict[str, Tensor], first: int) -> None:
    items = check_new_items(cache, cache.specs, features)
    update_rows(cache, use_lru=True, new_items=items, document_ids=first + torch.arange(len(features["input_ids"])))


def read(cache: NegativeCache, ids: Sequence[int]) -> dict[str, Tensor]:
    return cache.read(cache.find(torch.tensor(ids)), list(SPECS))


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert {key: value.tolist() for key, value in first.items()} == {
        key: value.tolist() for key, value in second.items()
    }


@pytest.mark.parametrize("max_length", [None, 9])
@pytest.mark.parametrize("is_gpu", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_any_rows_are_read_as_the_tokenizer_pads_them(side: str, is_gpu: bool, max_length: int | None):
    rng = random.Random(0)
    specs = {key: spec._replace(max_length=max_length) for key, spec in SPECS.items()}  # type: ignore[call-arg]
    cache = NegativeCache.empty(specs, 40)
    texts: list[Text] = []
    with as_on_a_gpu() if is_gpu else nullcontext():
        for step in range(12):
            new = [*random_texts(rng, 3, 1 + step % 7), random_texts(rng, 1, 1)[0] * (1 + step % 9)]
            insert(cache, tokenized(new, side), first=len(texts))
            texts += new
            for _ in range(4):
                ids = rng.choices(range(max(0, len(texts) - 40), len(texts)), k=rng.randint(1, 6))
                assert_equal(read(cache, ids), tokenized([texts[i] for i in ids], side))
    assert int(cache.lengths(torch.arange(40), "input_ids").sum()) == sum(map(len, texts[-40:]))  # without padding
    assert_equal(
        {key: value[:, : max(map(len, texts[-40:]))] for key, value in cache.data.items()},
        tokenized([texts[int(i)] for i in cache.document_ids], side),
    )


@pytest.mark.parametrize("is_gpu", [False, True])
@pytest.mark.parametrize("sides", list(itertools.product(["left", "right"], repeat=3)), ids="-".join)
def test_one_padding_on_the_left_decides_for_all_texts(sides: tuple[str, ...], is_gpu: bool):
    """Batches of both sides, and one without padding."""
    rng = random.Random(1)
    cache = NegativeCache.empty(SPECS, 12)
    texts = [[(5, 0)], [(6, 1)]]
    with as_on_a_gpu() if is_gpu else nullcontext():
        insert(cache, tokenized(texts, "left"), first=0)  # fits either side
        for position, side in enumerate(sides):
            new = [*random_texts(rng, 2, 6), [(1, 1)] * (7 + position)]
            insert(cache, tokenized(new, side), first=len(texts))
            texts += new
            expected = "left" if "left" in sides[: position + 1] else "right"
            assert_equal(read(cache, range(len(texts))), tokenized(texts, expected))


def test_the_side_is_known_before_the_batch_that_shows_it_is_written():
    cache = NegativeCache.empty(SPECS, 4)
    texts: list[Text] = [[(1, 0)], [(2, 0), (3, 0)]]
    for number, text in enumerate(texts):  # each without padding
        insert(cache, tokenized([text], "left"), first=number)
    assert_equal(read(cache, [0, 1]), tokenized(texts, "right"))
    check_new_items(cache, cache.specs, tokenized(texts, "left"))
    assert_equal(read(cache, [0, 1]), tokenized(texts, "left"))


def test_a_spec_sets_the_side_before_any_padding_is_seen():
    cache = NegativeCache.empty({key: spec._replace(padding_side="left") for key, spec in SPECS.items()}, 4)  # type: ignore[call-arg]
    texts: list[Text] = [[(1, 0)], [(2, 0), (PAD, 0)]]
    for number, text in enumerate(texts):
        insert(cache, tokenized([text], "left"), first=number)
    assert_equal(read(cache, [0, 1]), tokenized(texts, "left"))


@pytest.mark.parametrize("is_gpu", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_without_a_mask_the_spec_decides_where_the_padding_is(side: str, is_gpu: bool):
    """A token that equals the padding is kept at the other end."""
    texts: list[Text] = [[(PAD, 0), (1, 0)], [(1, 0), (PAD, 0)], [(3, 0)] * 4, []]
    inside = {"left": [[1], [1, PAD], [3] * 4, []], "right": [[PAD, 1], [1], [3] * 4, []]}[side]
    specs = {"input_ids": RaggedFeature(torch.int32, 4, PAD, side)}  # type: ignore[arg-type]
    given = tokenized(texts, side)["input_ids"]
    with as_on_a_gpu() if is_gpu else nullcontext():
        rows = check_features("items", {"input_ids": given}, specs)["input_ids"]
        assert isinstance(rows, RaggedRows)
        assert [row[:n].tolist() for row, n in zip(rows.values, rows.lengths.tolist(), strict=True)] == inside
        assert pad_rows(rows).tolist() == given.tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_without_any_1_shows_no_side(side: str):
    texts: list[Text] = [[], [(1, 0)], [(2, 0), (3, 0)]]
    cache = NegativeCache.empty(SPECS, 4)
    insert(cache, tokenized(texts, side), first=0)
    assert_equal(read(cache, [0, 1, 2]), tokenized(texts, side))
    only = NegativeCache.empty(SPECS, 4)
    insert(only, {key: value[:1] for key, value in tokenized(texts, side).items()}, first=0)
    assert not bool(only.pads_left("input_ids"))


def test_an_empty_batch_and_texts_without_tokens_are_accepted():
    for features in (tokenized([], "left"), tokenized([[], []], "left")):
        rows = check_features("items", features, SPECS)["input_ids"]
        assert isinstance(rows, RaggedRows)
        assert pad_rows(rows).shape == (len(features["input_ids"]), 0)


@pytest.mark.parametrize(
    "mask", [[[0, 1, 0]], [[0, 1, 1], [1, 1, 0]], [[1, 1, 1], [0, 0, 1], [0, 1, 0]]], ids=["a row", "rows", "both"]
)
def test_padding_on_both_sides_is_refused(mask: list[list[int]]):
    features = {"input_ids": torch.ones(len(mask), 3).int(), "attention_mask": torch.tensor(mask)}
    with pytest.raises(ValueError, match=r"`items\['attention_mask'\]` has zeros at the start.*tokenizer.padding_side"):
        check_features("items", features, SPECS)


def test_zeros_inside_a_mask_are_values():
    mask = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 1]])
    rows = check_features("items", {"attention_mask": mask}, SPECS)["attention_mask"]
    assert isinstance(rows, RaggedRows)
    assert rows.lengths.tolist() == [3, 4]
    assert pad_rows(rows).tolist() == mask.tolist()


def test_features_of_another_width_are_not_moved():
    specs = {**SPECS, "title": RaggedFeature(torch.int64)}
    features = {**tokenized([[(1, 0)], [(2, 0), (3, 0)]], "left"), "title": torch.tensor([[0, 4, 0], [5, 0, 0]])}
    rows = check_features("items", features, specs)["title"]
    assert isinstance(rows, RaggedRows)
    assert (rows.values.tolist(), rows.lengths.tolist(), bool(rows.pads_left)) == (
        [[0, 4, 0], [5, 0, 0]],
        [2, 1],
        False,
    )


def test_a_list_beside_a_mask_keeps_its_values():
    ids = [torch.tensor([1, 2], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)]
    mask = torch.tensor([[1, 1], [0, 1]])
    checked = check_features("items", {"input_ids": ids, "attention_mask": mask}, SPECS)
    assert [pad_rows(rows).tolist() for rows in checked.values() if isinstance(rows, RaggedRows)] == [
        [[1, 2], [PAD, 3]],
        [[1, 1], [0, 1]],
    ]


@pytest.mark.parametrize("side", ["left", "right"])
def test_items_are_limited_without_their_padding(side: str):
    specs = {key: spec._replace(max_length=2) for key, spec in SPECS.items()}  # type: ignore[call-arg]
    features = tokenized([[(1, 0), (2, 0)], [(3, 0)]], side)
    wide = {
        key: torch.nn.functional.pad(
            value, (3, 0) if side == "left" else (0, 3), value=PAD if key == "input_ids" else 0
        )
        for key, value in features.items()
    }
    for context in (nullcontext(), as_on_a_gpu()):
        with context:
            rows = check_features("items", wide, specs)["input_ids"]
        assert isinstance(rows, RaggedRows)
        assert pad_rows(rows).tolist() == features["input_ids"].tolist()
    long = tokenized([[(1, 0), (2, 0), (4, 0)], [(3, 0)]], side)
    with pytest.raises(ValueError, match="items of 3 values; the spec's max_length is 2"):
        check_features("items", long, specs)
    with as_on_a_gpu():
        rows = check_features("items", long, specs)["input_ids"]
    assert isinstance(rows, RaggedRows)
    assert (rows.values.tolist(), rows.lengths.tolist()) == ([[1, 2], [3, PAD]], [2, 1])


def test_a_mask_of_fixed_shape_is_not_padded_on_both_sides():
    specs = {"attention_mask": FixedLenFeature([4], torch.int64)}
    with pytest.raises(ValueError, match=r"shape \[1, 3\] and starts with 0.*RaggedFeature"):
        check_features("items", {"attention_mask": torch.tensor([[0, 1, 1]])}, specs)
    for mask in ([[0, 0, 1, 1]], [[1, 1, 0]]):
        assert isinstance(check_features("items", {"attention_mask": torch.tensor(mask)}, specs), dict)


@pytest.mark.parametrize("is_gpu", [False, True])
@pytest.mark.parametrize("sides", itertools.product(["left", "right"], repeat=2), ids="-".join)
@pytest.mark.parametrize("widths", [(2, 4), (4, 2)], ids=str)
def test_batches_of_any_widths_and_sides_are_concatenated(
    widths: tuple[int, int], sides: tuple[str, str], is_gpu: bool
):
    texts = [[*random_texts(random.Random(width), 2, width - 1), [(1, 1)] * width] for width in widths]
    batches = {name: tokenized(part, side) for name, part, side in zip("ab", texts, sides, strict=True)}
    with as_on_a_gpu() if is_gpu else nullcontext():
        joined = check_features("new_items", concatenate(batches, SPECS), SPECS)
        result = {key: pad_rows(rows) for key, rows in joined.items() if isinstance(rows, RaggedRows)}
    assert_equal(result, tokenized([*texts[0], *texts[1]], "left" if "left" in sides else "right"))


def test_selected_rows_keep_their_side():
    items = check_features("items", tokenized([[(1, 0)], [(2, 0), (3, 0)]], "left"), SPECS)
    rows = select(items, torch.tensor([1, 0, 0]))["input_ids"]
    assert isinstance(rows, RaggedRows)
    assert pad_rows(rows).tolist() == [[2, 3], [PAD, 1], [PAD, 1]]


# State


def saved(cache: NegativeCache) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(cache.state_dict(), file)
    file.seek(0)
    state: dict[str, Tensor] = torch.load(file, weights_only=True)
    return state


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_is_saved(side: str):
    texts: list[Text] = [[(1, 0)], [(2, 0), (3, 0)]]
    cache = NegativeCache.empty(SPECS, 4)
    insert(cache, tokenized(texts, side), first=0)
    other = NegativeCache.empty(SPECS, 4)
    other.load_state_dict(saved(cache))
    assert_equal(read(other, [0, 1]), tokenized(texts, side))


def test_a_state_of_an_earlier_version_is_padded_on_the_right():
    """It has neither the side nor the spec's `padding_side`."""
    texts: list[Text] = [[(1, 0)], [(2, 0), (3, 0)]]
    cache = NegativeCache.empty(SPECS, 4)
    insert(cache, tokenized(texts, "right"), first=0)
    state = {key: value for key, value in saved(cache).items() if not key.endswith(".pads_left")}
    specs = {key: spec_to_json(spec) for key, spec in cache.specs.items()}
    for spec in specs.values():
        del spec["padding_side"]
    state["_extra_state"] = torch.tensor(list(json.dumps({"num_rows": 4, "specs": specs}).encode()), dtype=torch.uint8)
    other = NegativeCache.empty(SPECS, 4)
    other.load_state_dict(state)
    assert_equal(read(other, [0, 1]), tokenized(texts, "right"))


def test_the_side_moves_with_the_cache_even_if_the_column_is_pinned():
    cpu = torch.device("cpu")
    column = make_column(RaggedFeature(torch.int64), 3, torch.device("meta"), cpu)
    assert isinstance(column, RaggedColumn)
    assert (column.device.type, column.pads_left.device.type) == ("cpu", "meta")
    column = make_column(RaggedFeature(torch.int64), 3, cpu, cpu)
    assert isinstance(column, RaggedColumn)
    column.to("meta")
    assert (column.device.type, column.pads_left.device.type) == ("cpu", "meta")
