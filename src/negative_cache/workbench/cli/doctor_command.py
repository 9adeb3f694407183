"""`negative-cache doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from negative_cache.workbench.cli import next_steps
from negative_cache.workbench.cli import options as opt
from negative_cache.workbench.cli.tables import bytes_table
from negative_cache.workbench.cli.terminal import Terminal
from negative_cache.workbench.counting import counted
from negative_cache.workbench.training.config import RunConfig, parse_num_samples

if TYPE_CHECKING:
    from rich.table import Table


def doctor(
    dim: Annotated[int, typer.Option(help="Dimensions of an embedding.")] = 768,
    cache_size: opt.CacheSize = 131_072,
    batch_size: Annotated[int, typer.Option(help="Queries per step, on all ranks together.")] = RunConfig.batch_size,
    embedding_dtype: opt.EmbeddingDtype = RunConfig.embedding_dtype,
    mean_tokens: Annotated[float, typer.Option(help="Mean number of tokens of a document.")] = 128,
    max_tokens: Annotated[int, typer.Option(help="Maximum number of tokens of a document.")] = 512,
    num_samples: opt.NumSamples = str(RunConfig.num_samples),
    shared: opt.Shared = RunConfig.shared,
    guide_dim: Annotated[int, typer.Option(help="Dimensions of a guide's embeddings; 0 without a guide.")] = 0,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks that share the cache.")] = 1,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    """Check the installation, the devices and the memory.

    Shows versions, missing packages, and how a cache would be searched and how much memory it needs.
    """
    given = {name: value for name, value in locals().items() if name not in ("quiet", "as_json")}
    terminal = Terminal(quiet, as_json)
    with terminal.running():
        with terminal.waiting("Loading libraries ..."):
            from negative_cache.workbench import environment
        with terminal.waiting("Examining the environment ..."):
            documents = parse_num_samples(num_samples, shared)
            sizes = environment.predict(**{**given, "num_samples": documents})
            found = environment.describe()
            found["devices"] = environment.devices(dim, embedding_dtype, documents, shared)
        terminal.result({**found, "memory": sizes})
        for line in _lines(found):
            terminal.say(line)
        terminal.out.print(_devices_table(found["devices"]))
        title = f"Memory of {counted(cache_size, 'document')}, {dim} x {embedding_dtype}"
        terminal.out.print(bytes_table(title if ranks == 1 else f"{title}, on each of {ranks} ranks", sizes))
        terminal.inform(next_steps.after_doctor(found["extras"]))


def _lines(found: dict[str, Any]) -> list[str]:
    """The environment as lines of text."""
    versions = [f"{name} {version}" for name, version in found["versions"].items() if version]
    absent = [name for name, version in found["versions"].items() if not version]
    threads = found["threads"]
    lines = [
        f"Python {found['python']} on {found['platform']}",
        f"Installed: {', '.join(versions)}",
        f"Not installed: {', '.join(absent) or '- (nothing is missing)'}",
        f"CUDA version of torch: {found['cuda'] or 'none, this is a CPU build'}",
        f"Threads: torch uses {threads['torch']} of {threads['cores']} cores; OMP_NUM_THREADS is "
        f"{threads['OMP_NUM_THREADS'] or 'not set'}",
        f"Backends of torch.distributed: {', '.join(found['distributed']) or 'none'}",
    ]
    for extra, unmet in found["extras"].items():
        needs = f"missing {', '.join(unmet)}: pip install 'negative-cache[{extra}]'" if unmet else "complete"
        lines.append(f"Extra {extra}: {needs}")
    lines += [f"Search on {device['device']}: {device['retrieval']}" for device in found["devices"]]
    return lines


def _devices_table(devices: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(title="Devices")
    for heading in ("device", "memory", "free"):
        table.add_column(heading, overflow="fold")
    for device in devices:
        sizes = (device["memory_bytes"], device["free_bytes"])
        cells = ("unknown" if size is None else f"{size / 1e9:.1f} GB" for size in sizes)
        table.add_row(f"{device['device']}: {device['name']}", *cells)
    return table
