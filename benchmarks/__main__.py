"""Benchmarks of negative-cache.

  step        a step against the dense algorithm of the earlier port and the bare product
  peers       the same number of negatives per query with other libraries' losses: time and memory
  scale       time against the number of rows
  memory      peak extra memory against the number of rows
  end-to-end  a training step of a transformer against plain in-batch negatives
  variance    how far the gradient of one step is from the exact one, for each estimator
  gpu         all that needs a GPU, within minutes; gpu-prepare and gpu-docs belong to it: `gpu --help` says more

Prints a table, and writes it as CSV beside a plot. First the operations are checked against the dense reference; if
a check fails, nothing is measured and the exit code is 1. Several processes are measured by
`python -m benchmarks.ranks` and `python -m benchmarks.two_hosts`.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

COMMANDS = ("step", "peers", "scale", "memory", "end-to-end", "variance")
GPU_COMMANDS = ("gpu", "gpu-prepare", "gpu-docs")


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in GPU_COMMANDS:  # they must run where nothing of the others is installed
        from benchmarks.gpu import command

        return command.main(arguments)
    return _measure(arguments)


def _measure(arguments: Sequence[str]) -> int:
    import torch

    from benchmarks import checks
    from benchmarks.sizes import SETS
    from benchmarks.timing import progress

    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--sizes", choices=list(SETS), help="default: gpu where there is one, else full")
    parser.add_argument("--output", type=Path, default=Path("benchmark-results"), help="folder of CSV files and plots")
    parser.add_argument("--data", help="of variance: a data set, as of `negative-cache train`; default: python-code")
    options = parser.parse_args(arguments)
    if options.data is not None and options.command != "variance":
        parser.error("--data is for variance.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.sizes == "gpu" and device.type != "cuda":
        parser.error("--sizes gpu needs a GPU; full is for a CPU.")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {options.output} cannot be made: {error}")
    sizes = SETS[options.sizes or ("gpu" if device.type == "cuda" else "full")]
    if options.data is not None:
        sizes = replace(sizes, variance=replace(sizes.variance, data=options.data))
    progress("Checking the operations against the dense reference ...")
    problems = checks.failures(sizes.step, device)
    if problems:
        print("\nNo numbers, because the operations are not right:", *problems, sep="\n  ", file=sys.stderr)
        return 1
    if device.type == "cuda":
        torch.cuda.empty_cache()  # processes of their own need it
    module = importlib.import_module(f"benchmarks.{options.command.replace('-', '_')}")
    report = module.run(sizes, device)
    progress("")
    report.show(device)
    paths = report.save(options.output, device)
    print("\nWritten:", *paths)
    return 0


if __name__ == "__main__":
    multiprocessing.set_forkserver_preload(["benchmarks.peers"])  # imported once for all processes that are started
    sys.exit(main())
