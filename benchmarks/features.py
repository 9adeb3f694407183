"""Reads and writes of document features that are in a file, under a memory limit below its size, and in plain memory.

A cache of `--items` documents with `--length` tokens each is filled in batches; then `--batch-size` random rows are
read, and as many written, `--repeats` times, each with the OS's cache as it is, and after the OS had to drop the file's
pages from it ("disk"). The limit is RLIMIT_DATA, which is on memory that the process itself allocates, not on pages of
a mapped file: those are the OS's, which takes them back when it needs them. Sizes are the largest that
/proc/self/status showed. The same in plain memory runs without the limit, and once more with it, which is to fail.
Linux only.

python -m benchmarks.features --items 1048576 --length 512 --dtype int32 --memory-limit-mb 1024
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from negative_cache import FixedLenFeature
from negative_cache.cache.rows import NegativeCache

FILL, EMBEDDING_DIM = 4096, 8
COLUMNS = ("fill s", "read ms", "write ms", "read, disk", "write, disk", "RssAnon MB", "RssFile MB")


class Peaks:
    """The most memory that this process has been seen to use, in MB: what it allocated, and mapped files."""

    def __init__(self) -> None:
        self.anonymous = self.file = 0.0

    def look(self) -> None:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        self.anonymous = max(self.anonymous, int(status["RssAnon"].split()[0]) / 1024)
        self.file = max(self.file, int(status["RssFile"].split()[0]) / 1024)


def show(message: str) -> None:
    """Progress on one line of the terminal."""
    if sys.stderr.isatty():
        print(f"\r{message:60}", end="", file=sys.stderr, flush=True)


def files_in(folder: str) -> list[str]:
    """Open files of a folder, as paths that can be opened though the files have no name."""
    descriptors = Path("/proc/self/fd").iterdir()
    return [str(path) for path in descriptors if path.is_symlink() and os.readlink(path).startswith(folder + "/")]


def forget(cache: NegativeCache, folder: str) -> None:
    """Have the OS write the files of a cache to disk and drop them from its memory."""
    for column in cache.children():
        file = getattr(column, "_file", None)
        if file is not None:
            file.release()
    for path in files_in(folder):
        descriptor = os.open(path, os.O_RDWR)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def items(rows: Tensor, length: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Documents whose tokens are all the number of their row."""
    return {
        "tokens": rows[:, None].expand(-1, length).to(dtype),
        "embedding": torch.zeros(len(rows), EMBEDDING_DIM),
    }


def median_ms(name: str, call: Callable[[Tensor], None], options: argparse.Namespace, peaks: Peaks) -> float:
    """Median time of a call with random rows."""
    times = []
    for repeat in range(options.repeats):
        rows = torch.randperm(options.items)[: options.batch_size]
        started = time.perf_counter()
        call(rows)
        times.append(time.perf_counter() - started)
        if repeat % 16 == 0:
            peaks.look()
            show(f"{name}, {repeat} of {options.repeats}")
    return 1000 * statistics.median(times)


def measure(options: argparse.Namespace) -> list[float]:
    """What the table shows of one kind of storage."""
    torch.manual_seed(0)
    dtype, peaks = getattr(torch, options.dtype), Peaks()
    folder = os.path.realpath(options.folder) if options.child == "file" else None
    specs = {
        "tokens": FixedLenFeature([options.length], dtype),
        "embedding": FixedLenFeature([EMBEDDING_DIM], torch.float32),
    }
    cache = NegativeCache.empty(specs, options.items, scored_keys=["embedding"], feature_folder=folder)
    started = time.perf_counter()
    for number, rows in enumerate(torch.split(torch.arange(options.items), FILL)):
        cache.write(rows, items(rows, options.length, dtype))
        if number % 16 == 0:
            peaks.look()
            show(f"{options.child}: filling, {100 * number * FILL // options.items} %")
    seconds = time.perf_counter() - started

    def read(rows: Tensor) -> None:
        tokens = cache.read(rows, ["tokens"])["tokens"]
        assert torch.equal(tokens[:, -1], rows.to(dtype))

    def write(rows: Tensor) -> None:
        cache.write(rows, items(rows, options.length, dtype))

    results = [seconds]
    for state in ("cached", "from disk"):
        for name, call in (("read", read), ("write", write)):
            if state == "from disk" and folder is not None:
                forget(cache, folder)
            results.append(median_ms(f"{options.child}: {name}, {state}", call, options, peaks))
    peaks.look()
    show("")
    return [*results, peaks.anonymous, peaks.file]


def run_child(child: str, limit_mb: int) -> list[float] | None:
    """Measure in a process of its own; None if it did not get the memory."""
    command = [sys.executable, "-m", "benchmarks.features", *sys.argv[1:], "--child", child]

    def limit() -> None:
        if limit_mb:
            resource.setrlimit(resource.RLIMIT_DATA, (limit_mb << 20, limit_mb << 20))

    # Before it runs, the child is a copy of this process, which has one thread that could hold a lock: this one.
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=limit, check=False)
    if ended.returncode == 3:
        return None
    ended.check_returncode()
    parsed: list[float] = json.loads(ended.stdout)
    return parsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_048_576)
    parser.add_argument("--length", type=int, default=512, help="tokens per item")
    parser.add_argument("--dtype", choices=["int16", "int32", "int64"], default="int32")
    parser.add_argument("--memory-limit-mb", type=int, default=1024, help="what the process may allocate; 0: no limit")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the file is; on a disk")
    parser.add_argument("--child", choices=["file", "memory"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        try:
            print(json.dumps(measure(options)))
        except RuntimeError as error:
            if "allocate memory" not in str(error):
                raise
            sys.exit(3)
        return
    size = options.items * options.length * getattr(torch, options.dtype).itemsize
    print(
        f"{options.dtype} [{options.items}, {options.length}]: {size / 1e6:.1f} MB, limit {options.memory_limit_mb} MB"
    )
    print(f"{options.batch_size} rows, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':16}" + "".join(f"{name:>12}" for name in COLUMNS))
    rows = {"file, limited": run_child("file", options.memory_limit_mb), "memory": run_child("memory", 0)}
    if options.memory_limit_mb:
        rows["memory, limited"] = run_child("memory", options.memory_limit_mb)
    for name, values in rows.items():
        shown = ["the memory is not enough"] if values is None else [f"{value:12.2f}" for value in values]
        print(f"{name:16}" + "".join(shown))
    in_file, in_memory = rows["file, limited"], rows["memory"]
    if in_file is not None and in_memory is not None:
        ratios = [a / b for a, b in zip(in_file[:5], in_memory[:5], strict=True)]
        print(f"{'ratio':16}" + "".join(f"{ratio:12.2f}" for ratio in ratios))


if __name__ == "__main__":
    main()
