"""The systems that are compared query by query: files of search results, or of values of measures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from negative_cache.workbench.counting import counted
from negative_cache.workbench.data import RetrievalData, fingerprints
from negative_cache.workbench.evaluation.defaults import COMPARISON
from negative_cache.workbench.evaluation.significance import PerQuery, check_same_queries
from negative_cache.workbench.suggestions import did_you_mean_path

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
    """The files of each system by its name, from texts such as `RUN` or `NAME=RUN,RUN`, with a file for each seed.

    A run is a file, or a folder that `train` wrote, which stands for its `queries.json`. Without a name, a system has
    that of its folder or file, without the suffix. The folder of a comparison stands for its losses.

    Raises:
        ValueError: A path does not exist or has no values, two systems have the same name, or a system has the same run
            twice.
    """
    systems: dict[str, list[Path]] = {}
    for text in texts:
        for name, files in _parse(text).items():
            if name in systems:
                raise ValueError(
                    f"Two systems have the name {name!r}. Give them names: NAME=RUN. Seeds are NAME=RUN,RUN."
                )
            systems[name] = files
    return systems


def systems_of_comparison(folder: Path, losses: Mapping[str, Any]) -> dict[str, list[Path]]:
    """The files of the runs of each loss of a comparison, without losses that have none.

    Args:
        folder: Folder of the comparison.
        losses: The entry `losses` of its `compare.json`.
    """
    return {
        name: [folder / "runs" / run["folder"] / PER_QUERY for run in loss["runs"]]
        for name, loss in losses.items()
        if loss["runs"]
    }


def are_trec_runs(systems: Mapping[str, Sequence[Path]]) -> bool:
    """Whether some of the files are search results, which need judgements."""
    return not all(_is_json(file) for files in systems.values() for file in files)


def read_systems(
    systems: Mapping[str, Sequence[Path]], measures: Mapping[str, Any], judge_run: JudgeRun | None = None
) -> dict[str, list[PerMeasure]]:
    """Read the values of each system, for each of its seeds.

    Args:
        systems: Name -> files. A file is the `queries.json` of a run, a file that `evaluate --per-query` wrote, or a
            TREC run. A single system stands for two, its models before and after training.
        measures: See `parse_measures`.
        judge_run: Returns the values of a TREC run; None if there are no judgements.

    Raises:
        ValueError: A file lacks a measure or is damaged, a TREC run is given without judgements, or two runs have
            values for different queries or corpora.
    """
    contents = {file: _read_json(file) if _is_json(file) else None for files in systems.values() for file in files}
    _check_corpora(contents)
    runs = {name: [(file, _AFTER) for file in files] for name, files in systems.items()}
    if len(systems) == 1:
        ((name, files),) = systems.items()
        if None in contents.values():
            raise ValueError(f"Only one system is given, {name!r}. Give at least two, or one folder that train wrote.")
        runs = {when: [(file, when) for file in files] for when in (_BEFORE, _AFTER)}
    values = {
        name: [_values(file, contents[file], when, measures, judge_run) for file, when in own]
        for name, own in runs.items()
    }
    for measure in measures:
        check_same_queries(
            (f"{file}, {when} training" if len(systems) == 1 else str(file), found[measure])
            for name, own in runs.items()
            for (file, when), found in zip(own, values[name], strict=True)
        )
    return values


def _parse(text: str) -> dict[str, list[Path]]:
    """The systems that one text stands for."""
    name, equals, rest = text.partition("=")
    is_named = bool(name and equals) and not Path(text).exists()
    paths = [Path(part.strip()) for part in rest.split(",")] if is_named else [Path(text)]
    for path in paths:
        if not path.exists():
            raise ValueError(
                f"{str(path)!r} does not exist.{did_you_mean_path(str(path))} Give RUN, or NAME=RUN,RUN for several "
                "seeds."
            )
    if not is_named and (paths[0] / COMPARISON).is_file():
        systems = systems_of_comparison(paths[0], _read_json(paths[0] / COMPARISON).get("losses", {}))
        if len(systems) < 2:
            raise ValueError(f"{text} has results of fewer than two losses. Continue the comparison.")
        return systems
    files = [_file_of(path) for path in paths]
    resolved = [file.resolve() for file in files]
    for path, file in zip(paths, resolved, strict=True):
        if resolved.count(file) > 1:
            raise ValueError(f"The system {name.strip()!r} has the run {path} twice. Give the run of each seed once.")
    return {name.strip() if is_named else _name_of(paths[0]): files}


def _file_of(path: Path) -> Path:
    """The file with the values or results of a run, which may be a folder."""
    if not path.is_dir():
        return path
    if (path / COMPARISON).is_file():
        raise ValueError(f"{path} is a comparison. Give it without a name; or give its runs, which are in {path}/runs.")
    if not (path / PER_QUERY).is_file():
        raise ValueError(
            f"{path} has no {PER_QUERY}: it is no --output of train with a test split. Measure a model with evaluate "
            "--model MODEL --data DATA --per-query FILE.json, and give that file."
        )
    return path / PER_QUERY


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


def _values(
    file: Path, content: dict[str, Any] | None, when: str, measures: Mapping[str, Any], judge_run: JudgeRun | None
) -> PerMeasure:
    """The values of one run; `content` is that of its JSON file, or None for a TREC run."""
    if content is None:
        if judge_run is None:
            raise ValueError(f"{file} has search results. Give --data with their judgements.")
        return judge_run(file)
    found = {name: values for name, values in content.items() if name != _CORPUS}
    if found.keys() <= {_BEFORE, _AFTER}:
        if not found.get(when):
            raise ValueError(
                f"{file} has no values of the model {when} training: train measured none. "
                "Give another run to compare it with, or train without --no-eval."
            )
        found = found[when]
    elif when == _BEFORE:
        raise ValueError(f"{file} has the values of one system. Give another one to compare it with.")
    for name in measures:
        values = found.get(name)
        if values is None:
            raise ValueError(f"{file} has no {name}. It has {', '.join(found)}. Choose among them with --metrics.")
        if not isinstance(values, dict) or not all(isinstance(value, int | float) for value in values.values()):
            raise ValueError(f"{file} is damaged: expected a number for each query in {name!r}.")
    return {name: found[name] for name in measures}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: expected an object, got {type(content).__name__}.")
    return content


def _check_corpora(contents: Mapping[Path, dict[str, Any] | None]) -> None:
    """Refuse values of different corpora, as far as files say which corpus was searched."""
    found = {file: content[_CORPUS] for file, content in contents.items() if content and _CORPUS in content}
    for file, corpus in found.items():
        first = next(iter(found))
        if corpus["fingerprint"] != found[first]["fingerprint"]:
            raise ValueError(
                f"Systems must be compared on the same corpus. {first} is of a corpus of "
                f"{counted(found[first]['num_documents'], 'document')}, {file} of another one of "
                f"{corpus['num_documents']:,}. Measure one again with evaluate --per-query, on the data and with the "
                "--eval-documents of the other."
            )
