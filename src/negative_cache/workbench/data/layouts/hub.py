"""What a dataset on the Hugging Face hub holds, or one that the datasets library saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from negative_cache.workbench.data.layouts.folder import find_in_folder
from negative_cache.workbench.data.layouts.sources import (
    CORPUS,
    QRELS,
    QUERIES,
    Collection,
    RowTables,
    Table,
    by_split,
    narrowed,
    parts_of,
)
from negative_cache.workbench.data.options import DataOptions
from negative_cache.workbench.data.retrieval_data import DataError

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS_AT_ONCE = 1000
_T = TypeVar("_T")


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of the datasets library."""
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def find_saved(folder: Path) -> RowTables:
    """The rows of a folder that was written by `save_to_disk`."""
    import datasets

    loaded = _called(datasets.load_from_disk, str(folder))
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    return _row_tables(folder.resolve().name, splits)


def find_on_hub(name: str, options: DataOptions) -> Collection | RowTables:
    """What a dataset holds that the datasets library can load.

    Args:
        name: Its name on the hub or its path, and, if it has several configurations or collections, a colon and the
            one to take.
        options: How the text files of a local folder are read.

    Raises:
        DataError: It cannot be loaded, or has several configurations or collections, and none is named.
    """
    import datasets

    name, chosen = _name_and_choice(name)
    folder = Path(name)
    if folder.is_dir() and is_saved(folder):
        return find_saved(folder)
    configs = _called(datasets.get_dataset_config_names, name)
    if parts := parts_of(configs, name, chosen):
        return _collection(name, parts, chosen)
    if folder.is_dir() and configs == ["default"] and chosen != "default":
        return find_in_folder(folder, options, chosen)
    if chosen is None and len(configs) > 1:
        raise DataError(f"{name} has several configurations: {', '.join(configs)}. Choose one: hf:{name}:{configs[0]}.")
    if chosen is not None and chosen not in configs:
        raise DataError(f"{name} has no configuration {chosen!r}; it has {', '.join(configs)}.")
    return _row_tables(name, _called(datasets.load_dataset, name, chosen or configs[0]))


def _name_and_choice(name: str) -> tuple[str, str | None]:
    if ":" not in name or Path(name).exists():
        return name, None
    name, _, chosen = name.rpartition(":")
    return name, chosen


def _collection(name: str, parts: dict[str, str], chosen: str | None) -> Collection:
    """A collection of configurations."""
    import datasets

    tables: dict[str, dict[str, list[Table]]] = {}
    for part in (CORPUS, QUERIES, QRELS):
        # BEIR's own datasets have the judgements in a dataset of their own.
        place = (name, parts[part]) if part in parts else (f"{name}-qrels", None)
        loaded = _called(datasets.load_dataset, *place)
        label = ", ".join(filter(None, place))
        tables[part] = _tables(label, loaded)
    found = Collection(name, "collection of the hub", tables[CORPUS], tables[QUERIES], tables[QRELS])
    return narrowed(found, parts, chosen)


def _row_tables(name: str, splits: Mapping[str, Dataset]) -> RowTables:
    """Rows of the splits; a dataset with the split train alone is split by hash."""
    tables = _tables(name, splits)
    return RowTables(name, {None if list(tables) == ["train"] else split: found for split, found in tables.items()})


def _tables(name: str, splits: Mapping[str, Dataset]) -> dict[str, list[Table]]:
    return {split: [_table(f"{name}, {split}", dataset)] for split, dataset in by_split(splits, name).items()}


def _table(name: str, dataset: Dataset) -> Table:
    return Table(name, partial(_rows, name, dataset))


def _rows(name: str, dataset: Dataset) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for batch in dataset.with_format("arrow").iter(_ROWS_AT_ONCE):
        for row in batch.to_pylist():
            yield f"{name}, row {number}", row
            number += 1


def _called(function: Callable[..., _T], *args: Any) -> _T:
    """The result of a function of the datasets library, whose errors may be of any type."""
    try:
        return function(*args)
    except Exception as error:
        name = args[0]
        raise DataError(f"The datasets library cannot load {name!r}: {error}") from error
