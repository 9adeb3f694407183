"""Benchmarks of negative-cache.

  step        a step, compared with the dense algorithm of the earlier PyTorch port and with the bare product
  peers       time and memory of other libraries' losses with the same number of negatives per query
  scale       time against the number of rows
  memory      peak extra memory against the number of rows
  end-to-end  a training step of a transformer, compared with plain in-batch negatives
  budget      the same for each number of documents to re-encode per query
  variance    distance of the gradient of one step from the exact gradient, for each estimator
  data        time and peak memory of reading, describing, training on and evaluating a large dataset
  gpu         everything that needs a GPU, within a time limit, with gpu-prepare and gpu-docs: see `gpu --help`

Prints a table, and writes it to a CSV file beside a plot. The operations are first checked against the dense
reference; if a check fails, nothing is measured and the exit code is 1. `python -m benchmarks.ranks` and
`python -m benchmarks.two_hosts` measure several processes.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

COMMANDS = ("step", "peers", "scale", "memory", "end-to-end", "budget", "variance", "data")
GPU_COMMANDS = ("gpu", "gpu-prepare", "gpu-docs")


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in GPU_COMMANDS:  # they run without the packages that the others need
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
    parser.add_argument("--sizes", choices=list(SETS), help="default: gpu if there is a GPU, else full")
    parser.add_argument("--output", type=Path, default=Path("benchmark-results"), help="folder of CSV files and plots")
    parser.add_argument("--data", help="data set of variance, as for `negative-cache train`; default: python-code")
    parser.add_argument("--documents", type=int, help="documents of data; default: 1,000,000")
    options = parser.parse_args(arguments)
    if options.data is not None and options.command != "variance":
        parser.error("--data is an option of variance.")
    if options.documents is not None and (options.command != "data" or options.documents < 100):
        parser.error("--documents is an option of data, and at least 100.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.sizes == "gpu" and device.type != "cuda":
        parser.error("--sizes gpu needs a GPU; full is for a CPU.")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {options.output} cannot be created: {error}")
    sizes = SETS[options.sizes or ("gpu" if device.type == "cuda" else "full")]
    if options.data is not None:
        sizes = replace(sizes, variance=replace(sizes.variance, data=options.data))
    if options.documents is not None:
        few = min(sizes.data.test_queries, options.documents // 10)
        sizes = replace(sizes, data=replace(sizes.data, documents=options.documents, test_queries=few))
    progress("Checking the operations against the dense reference ...")
    problems = checks.failures(sizes.step, device)
    if problems:
        print("\nNothing was measured, because the operations are wrong:", *problems, sep="\n  ", file=sys.stderr)
        return 1
    if device.type == "cuda":
        torch.cuda.empty_cache()  # for the processes that commands start
    module = importlib.import_module(f"benchmarks.{options.command.replace('-', '_')}")
    report = module.run(sizes, device)
    progress("")
    report.show(device)
    paths = report.save(options.output, device)
    print("\nWritten:", *paths)
    return 0


if __name__ == "__main__":
    multiprocessing.set_forkserver_preload(["benchmarks.peers"])  # imported once for all child processes
    sys.exit(main())
