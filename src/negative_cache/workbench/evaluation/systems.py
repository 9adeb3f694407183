"""The systems that are compared query by query: files of search results, or of values of measures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from negative_cache.workbench.data import RetrievalData, fingerprints
from negative_cache.workbench.evaluation.significance import PerQuery

PER_QUERY = "queries.json"
"""The file of a run with the values of queries: "before" and "after" -> name of a measure -> query id -> value; and
"corpus", see `corpus_of`."""

_BEFORE, _AFTER, _CORPUS = "before", "after", "corpus"
_SUFFIXES = {".gz", ".json", ".run", ".trec", ".tsv", ".txt"}

PerMeasure = Mapping[str, PerQuery]
"""Name of a measure -> query id -> value."""

JudgeRun = Callable[[Path], PerMeasure]


def corpus_of(data: RetrievalData, split: str) -> dict[str, Any]:
    """What a file of values says about the corpus that was searched: num_documents, and fingerprint, of its texts.

    Values can be compared if they are of the same corpus.
    """
    corpus = data.part(split).corpus
    return {"num_documents": len(corpus), "fingerprint": fingerprints.of_texts(corpus)}


def parse_systems(texts: Sequence[str]) -> dict[str, list[Path]]:
    """The paths of each system by its name, from texts such as `RUN` or `NAME=RUN,RUN`, with a path for each seed.

    Without a name, a system has that of its folder or file, without the suffix.

    Raises:
        ValueError: A path does not exist, or two systems have the same name.
    """
    systems: dict[str, list[Path]] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        is_named = bool(name and equals) and not Path(text).exists()
        paths = [Path(part.strip()) for part in rest.split(",")] if is_named else [Path(text)]
        for path in paths:
            if not path.exists():
                raise ValueError(f"{str(path)!r} does not exist. Give RUN, or NAME=RUN,RUN for several seeds.")
        name = name.strip() if is_named else _name_of(paths[0])
        if name in systems:
            raise ValueError(f"Two systems have the name {name!r}. Give them names: NAME=RUN. Seeds are NAME=RUN,RUN.")
        systems[name] = paths
    return systems


def are_trec_runs(systems: Mapping[str, Sequence[Path]]) -> bool:
    """Whether some of the paths are search results, which need judgements."""
    return any(path.is_file() and not _is_json(path) for paths in systems.values() for path in paths)


def read_systems(
    systems: Mapping[str, Sequence[Path]], measures: Mapping[str, Any], judge_run: JudgeRun | None = None
) -> dict[str, list[PerMeasure]]:
    """Read the values of each system, for each of its seeds.

    Args:
        systems: Name -> paths. A path is a folder that `train` wrote, a file such as its `queries.json`, a file that
            `evaluate --per-query` wrote, or a TREC run. A single system stands for two, its models before and after
            training.
        measures: See `parse_measures`.
        judge_run: Returns the values of the TREC run with a path; None if there are no judgements.

    Raises:
        ValueError: A file lacks a measure or is damaged, a TREC run is given without judgements, or the values are of
            different corpora.
    """
    _check_corpora(path for paths in systems.values() for path in paths)
    if len(systems) > 1:
        return {name: [_values(path, _AFTER, measures, judge_run) for path in paths] for name, paths in systems.items()}
    ((name, paths),) = systems.items()
    if not all(path.is_dir() or _is_json(path) for path in paths):
        raise ValueError(f"Only one system is given, {name!r}. Give at least two, or one folder that train wrote.")
    return {when: [_values(path, when, measures, judge_run) for path in paths] for when in (_BEFORE, _AFTER)}


def _name_of(path: Path) -> str:
    path = path.resolve()
    if path.name == PER_QUERY:
        return path.parent.name
    while path.suffix in _SUFFIXES:
        path = path.with_suffix("")
    return path.name


def _is_json(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).lstrip().startswith(b"{")


def _values(path: Path, when: str, measures: Mapping[str, Any], judge_run: JudgeRun | None) -> PerMeasure:
    """The values of one run."""
    path = _file_of(path)
    if _is_json(path):
        return _read_values(path, when, measures)
    if judge_run is None:
        raise ValueError(f"{path} has search results. Give --data with their judgements.")
    return judge_run(path)


def _read_values(path: Path, when: str, measures: Mapping[str, Any]) -> PerMeasure:
    """Values from a JSON file."""
    content = _read(path)
    content.pop(_CORPUS, None)
    if content.keys() <= {_BEFORE, _AFTER}:
        if not content.get(when):
            raise ValueError(f"{path} has no values of the model {when} training.")
        content = content[when]
    elif when == _BEFORE:
        raise ValueError(f"{path} has the values of one system. Give another one to compare it with.")
    for name in measures:
        values = content.get(name)
        if values is None:
            raise ValueError(f"{path} has no {name}. It has {', '.join(content)}. Choose among them with --metrics.")
        if not isinstance(values, dict) or not all(isinstance(value, int | float) for value in values.values()):
            raise ValueError(f"{path} is damaged: expected a number for each query in {name!r}.")
    return {name: content[name] for name in measures}


def _file_of(path: Path) -> Path:
    """The file with the values or results of a run, which may be a folder."""
    if not path.is_dir():
        return path
    if not (path / PER_QUERY).is_file():
        raise ValueError(f"{path} has no {PER_QUERY}. Give the --output of train, whose data had a test split.")
    return path / PER_QUERY


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    return content


def _check_corpora(paths: Iterable[Path]) -> None:
    """Refuse values of different corpora, as far as files say which corpus was searched."""
    found = {}
    for path in map(_file_of, paths):
        if _is_json(path) and (corpus := _read(path).get(_CORPUS)) is not None:
            found[path] = corpus
    for path, corpus in found.items():
        first = next(iter(found))
        if corpus["fingerprint"] != found[first]["fingerprint"]:
            raise ValueError(
                f"Systems must be compared on the same corpus. {first} is of a corpus of "
                f"{found[first]['num_documents']:,} documents, {path} of another one of {corpus['num_documents']:,}. "
                "Measure both on the same data."
            )
