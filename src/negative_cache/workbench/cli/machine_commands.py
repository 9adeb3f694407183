"""`negative-cache memory` and `negative-cache doctor`: what a cache takes, and what is here for it."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from negative_cache.workbench.cli import options as opt
from negative_cache.workbench.cli.tables import bytes_table
from negative_cache.workbench.cli.terminal import Terminal

Dim = Annotated[int, typer.Option(help="Dimensions of an embedding.")]
AllQueries = Annotated[int, typer.Option(help="Queries per step, of all ranks.")]
MeanTokens = Annotated[float, typer.Option(help="Mean tokens of a document.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens of a document.")]
GuideDim = Annotated[int, typer.Option(help="Dimensions of a guide's embeddings; 0 without a guide.")]
Ranks = Annotated[int, typer.Option(min=1, help="Ranks that share the cache.")]
OnDisk = Annotated[bool, typer.Option("--features-on-disk", help="Tokens are in a feature_folder.")]


def memory(
    dim: Dim,
    cache_size: opt.CacheSize = 131_072,
    batch_size: AllQueries = 64,
    embedding_dtype: opt.EmbeddingDtype = "float32",
    mean_tokens: MeanTokens = 128,
    max_tokens: MaxTokens = 512,
    num_samples: opt.NumSamples = 1,
    num_candidates: opt.NumCandidates = None,
    shared: opt.Shared = True,
    guide_dim: GuideDim = 0,
    ranks: Ranks = 1,
    features_on_disk: OnDisk = False,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    """Predict the memory of a cache of texts. And of a step beside it; both on each rank."""
    given = dict(locals())
    terminal = Terminal(quiet, as_json)
    with terminal.running():
        sizes = _predict(terminal, given)
        terminal.result(sizes)
        terminal.out.print(bytes_table(_title(given), sizes))


def doctor(
    dim: Dim = 768,
    cache_size: opt.CacheSize = 131_072,
    batch_size: AllQueries = 64,
    embedding_dtype: opt.EmbeddingDtype = "float32",
    mean_tokens: MeanTokens = 128,
    max_tokens: MaxTokens = 512,
    num_samples: opt.NumSamples = 1,
    num_candidates: opt.NumCandidates = None,
    shared: opt.Shared = True,
    guide_dim: GuideDim = 0,
    ranks: Ranks = 1,
    features_on_disk: OnDisk = False,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    """Show versions, devices and missing packages. Also what would search a cache, and the memory it would take."""
    given = dict(locals())
    terminal = Terminal(quiet, as_json)
    with terminal.running():
        sizes = _predict(terminal, given)
        with terminal.waiting("Looking around ..."):
            from negative_cache.workbench import machine

            found = machine.look()
            found["devices"] = machine.devices(dim, embedding_dtype, num_samples, num_candidates, shared)
        terminal.result({**found, "memory": sizes})
        for line in _lines(found):
            terminal.out.print(line, soft_wrap=True, markup=False, highlight=False)
        terminal.out.print(_devices_table(found["devices"]))
        terminal.out.print(bytes_table(_title(given), sizes))


def _predict(terminal: Terminal, given: dict[str, Any]) -> dict[str, int]:
    with terminal.waiting("Loading libraries ..."):
        from negative_cache.workbench.machine import predict
    return predict(**{name: value for name, value in given.items() if name not in ("quiet", "as_json")})


def _title(given: dict[str, Any]) -> str:
    rows = f"{given['cache_size']:,} documents, {given['dim']} x {given['embedding_dtype']}"
    return rows if given["ranks"] == 1 else f"{rows}, on each of {given['ranks']} ranks"


def _lines(found: dict[str, Any]) -> list[str]:
    """What `look` found, in words."""
    versions = [f"{name} {version}" for name, version in found["versions"].items() if version]
    absent = [name for name, version in found["versions"].items() if not version]
    threads = found["threads"]
    lines = [
        f"Python {found['python']} on {found['platform']}",
        f"Installed: {', '.join(versions)}",
        f"Not installed: {', '.join(absent) or 'nothing that this command looks for'}",
        f"CUDA of this torch: {found['cuda'] or 'none, it is built for CPUs'}",
        f"Threads: torch uses {threads['torch']} of {threads['cores']} cores; OMP_NUM_THREADS is "
        f"{threads['OMP_NUM_THREADS'] or 'not set'}",
        f"Backends of torch.distributed: {', '.join(found['distributed']) or 'none'}",
    ]
    for extra, unmet in found["extras"].items():
        needs = f"misses {', '.join(unmet)}: pip install 'negative-cache[{extra}]'" if unmet else "complete"
        lines.append(f"Extra {extra}: {needs}")
    return lines


def _devices_table(devices: list[dict[str, Any]]) -> Table:
    table = Table(title="Devices, and what would search the cache")
    for heading in ("device", "memory", "free", "search"):
        table.add_column(heading, overflow="fold")
    for device in devices:
        sizes = (device["memory_bytes"], device["free_bytes"])
        cells = ("unknown" if size is None else f"{size / 1e9:.1f} GB" for size in sizes)
        table.add_row(f"{device['device']}: {device['name']}", *cells, device["retrieval"])
    return table
