"""`python-code`: pairs of a docstring and source code, from the Python packages installed in this environment.

Each function with a docstring gives a pair: the first paragraph of the docstring is the query, the source without the
docstring is the document. Exact copies are dropped and modules are assigned to splits. A document that resembles one of
an earlier split is dropped.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import json
import os
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

import numpy as np

from negative_cache.workbench.data import minhash
from negative_cache.workbench.data import splits as splitting
from negative_cache.workbench.data.retrieval_data import SPLITS, RetrievalData
from negative_cache.workbench.data.texts import Texts
from negative_cache.workbench.files import cache_folder, write_text

NAME = "python-code"
MAX_PAIRS = 25_000
MODULES_AT_ONCE = 1_000
MAX_CHARS = 2_000
MIN_WORDS = 4
DEV_PERCENT = 4


class Pair(NamedTuple):
    """One function: `name` is `module:qualified.name`."""

    name: str
    query: str
    document: str


def load() -> RetrievalData:
    """The dataset, which is built on first use and then kept in the user's cache folder."""
    folder = cache_folder()
    path = folder / f"{NAME}-{fingerprint()}.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(build()), suffix=f".{os.getpid()}.tmp")
    splits = json.loads(path.read_text(encoding="utf-8"))
    return RetrievalData(
        name=NAME,
        corpus=Texts.of({name: document for pairs in splits.values() for name, _, document in pairs}),
        queries=Texts.of({name: query for pairs in splits.values() for name, query, _ in pairs}),
        qrels={split: {name: [name] for name, _, _ in pairs} for split, pairs in splits.items()},
        form=NAME,
    )


def fingerprint() -> str:
    """A name for this dataset, which depends on the installed packages and on the rules in this file."""
    installed = sorted({f"{d.metadata['Name']}=={d.version}" for d in distributions()})
    rules = [Path(path).read_bytes() for path in (__file__, splitting.__file__, minhash.__file__)]
    return hashlib.sha256("\n".join(installed).encode() + b"".join(rules)).hexdigest()[:16]


def module_paths() -> list[tuple[str, Path]]:
    """Pairs of a module name and its file, for all Python modules in site-packages, sorted."""
    found = {}
    for root in sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}):
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = sorted(name for name in subfolders if name.isidentifier() and name != "__pycache__")
            for file in files:
                if file.endswith(".py"):
                    path = Path(folder) / file
                    found[".".join(path.relative_to(root).with_suffix("").parts)] = path
    return sorted(found.items())


def extract(module: str, path: Path) -> list[Pair]:
    """The pairs of one module, or none if it cannot be read or parsed."""
    try:
        source = path.read_text(encoding="utf-8")
        if '"""' not in source and "'''" not in source:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return []
    lines = source.splitlines()
    return [pair for name, node in _functions(tree, "") if (pair := _pair(f"{module}:{name}", node, lines))]


def build() -> dict[str, list[Pair]]:
    """Pairs by split, at most `MAX_PAIRS` in total. The same environment gives the same pairs."""
    modules = sorted(module_paths(), key=lambda module: splitting.hash_of(module[0]))
    pairs: list[Pair] = []
    # Syntax trees have millions of objects and no cycles: scanning them for cycles would take half of the time.
    with ProcessPoolExecutor(max_workers=min(os.cpu_count() or 1, 8), initializer=gc.disable) as pool:
        for start in range(0, len(modules), MODULES_AT_ONCE):
            names, paths = zip(*modules[start : start + MODULES_AT_ONCE], strict=True)
            for found in pool.map(extract, names, paths, chunksize=32):
                pairs.extend(found)
            pairs = _without_copies(pairs)
            if len(pairs) >= MAX_PAIRS:
                break
    pairs = sorted(pairs[:MAX_PAIRS])
    splits: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    for pair in pairs:
        splits[splitting.split_of(f"split {pair.name.split(':')[0]}", DEV_PERCENT)].append(pair)
    return _without_near_copies(splits)


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + child.name, child
            yield from _functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")


def _pair(name: str, node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> Pair | None:
    docstring = ast.get_docstring(node)
    if not docstring or len(node.body) < 2:
        return None
    query = " ".join(docstring.split("\n\n")[0].split())
    if len(query.split()) < MIN_WORDS or len(query) > MAX_CHARS or not query.isascii():
        return None
    inside = node.body[0]
    kept = lines[node.lineno - 1 : inside.lineno - 1] + lines[inside.end_lineno : node.end_lineno]
    document = textwrap.dedent("\n".join(line for line in kept if line.strip()))
    return Pair(name, query, document) if len(document) <= MAX_CHARS else None


def _without_copies(pairs: Iterable[Pair]) -> list[Pair]:
    """Drop pairs whose query or document occurred before, up to white space, and case and punctuation of queries."""
    seen: set[str] = set()
    kept = []
    for pair in pairs:
        keys = {
            "q" + "".join(re.findall(r"\w+", pair.query.lower())),
            "d" + "".join(pair.document.split()),
        }
        if seen.isdisjoint(keys):
            seen |= keys
            kept.append(pair)
    return kept


def _without_near_copies(splits: dict[str, list[Pair]]) -> dict[str, list[Pair]]:
    """Drop pairs whose document resembles one of an earlier split."""
    rows = minhash.signatures(pair.document for pairs in splits.values() for pair in pairs)
    sizes = [len(pairs) for pairs in splits.values()]
    is_copy = minhash.resembles_earlier(rows, np.repeat(np.arange(len(sizes)), sizes))
    parts = np.split(is_copy, np.cumsum(sizes)[:-1])
    return {
        split: [pair for pair, copy in zip(pairs, part, strict=True) if not copy]
        for (split, pairs), part in zip(splits.items(), parts, strict=True)
    }
