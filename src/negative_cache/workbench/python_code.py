"""`python-code`: docstring -> source pairs from the Python packages installed in this environment.

For every function with a docstring in an installed distribution: the docstring's first paragraph is the
query, the function's source without the docstring is the document. Exact copies are dropped, modules are
assigned to splits, and what looks like a copy of something in an earlier split is dropped from the later one.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import sysconfig
import textwrap
import warnings
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAX_PAIRS = 25_000
MODULES_AT_ONCE = 1_000
MAX_CHARS = 2_000
MIN_WORDS = 4
SPLITS = ("train", "dev", "test")

_NUM_HASHES, _BAND = 16, 2
_MIN_SIMILARITY = 0.5
_WORD = re.compile(r"[A-Za-z_]\w*|\d+|[^\s\w]")


class Pair(NamedTuple):
    """One function: `name` is `module:qualified.name`."""

    name: str
    query: str
    document: str


def fingerprint() -> str:
    """A name for what is installed: it changes when a distribution or this file's rules change."""
    installed = sorted({f"{d.metadata['Name']}=={d.version}" for d in distributions()})
    rules = Path(__file__).read_bytes()
    return hashlib.sha256("\n".join(installed).encode() + rules).hexdigest()[:16]


def module_paths() -> list[tuple[str, Path]]:
    """(module name, file) of all Python modules in site-packages, sorted."""
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
    """The pairs of one module; none if it cannot be read or parsed."""
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
    """All pairs by split, at most `MAX_PAIRS` of them; the same for the same environment."""
    modules = sorted(module_paths(), key=lambda module: _number(module[0]))
    pairs: list[Pair] = []
    with ProcessPoolExecutor(max_workers=min(os.cpu_count() or 1, 8)) as pool:
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
        splits[_split_of(pair.name.split(":")[0])].append(pair)
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
    """Drop pairs whose query or document, up to case and spelling of white space, came before."""
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


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _split_of(module: str) -> str:
    share = _number("split " + module) % 100
    return "test" if share < 10 else "dev" if share < 14 else "train"


def _without_near_copies(splits: dict[str, list[Pair]]) -> dict[str, list[Pair]]:
    """Drop from each split what is nearly a copy of something in a split before it."""
    seen: dict[tuple[int, int, int], list[np.ndarray]] = {}
    kept: dict[str, list[Pair]] = {}
    for split, pairs in splits.items():
        signatures = [_signature(pair.document) for pair in pairs]
        is_copy = [any(_is_near(s, other) for key in _bands(s) for other in seen.get(key, ())) for s in signatures]
        kept[split] = [pair for pair, copy in zip(pairs, is_copy, strict=True) if not copy]
        for signature in signatures:
            for key in _bands(signature):
                seen.setdefault(key, []).append(signature)
    return kept


def _signature(document: str) -> np.ndarray:
    """MinHash of the runs of three tokens."""
    tokens = _WORD.findall(document)
    runs = {" ".join(tokens[i : i + 3]).encode() for i in range(max(len(tokens) - 2, 1))}
    hashes = np.array([zlib.crc32(run) for run in runs], dtype=np.uint64)
    rng = np.random.default_rng(0)
    factors = rng.integers(1, 2**32, size=(_NUM_HASHES, 1), dtype=np.uint64) | np.uint64(1)
    signature: np.ndarray = ((hashes * factors) >> np.uint64(32)).min(axis=1)
    return signature


def _bands(signature: np.ndarray) -> list[tuple[int, int, int]]:
    return [(i, int(signature[i]), int(signature[i + 1])) for i in range(0, _NUM_HASHES, _BAND)]


def _is_near(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a == b).mean() >= _MIN_SIMILARITY)
