"""`gpu`: everything that needs a GPU, in order of importance.

  python -m benchmarks gpu-prepare DIR [--data FOLDER ...]   write the files that are copied to the machine with the GPU
  python -m benchmarks gpu --output DIR [--prepared DIR]     measure; writes DIR/gpu.json and DIR/gpu.md
  python -m benchmarks gpu-docs DIR                          replace the tables in the documentation by those of DIR

The stages are works, passes, step and quality. Each stage is a process with its own time limit. Each row is on disk
within a second. A stage that fails or is cut off keeps its rows, and the next one runs. Later stages get the time that
earlier ones leave. Stages of an earlier run in DIR are kept if source and machine are the same. The exit code is 0 if
all stages are done, 1 if one failed or was cut off, 130 after Ctrl-C.

Needs a source tree, torch, sentence-transformers and pytest; with pytest-xdist, tests run in parallel. Without a GPU
this is a rehearsal: small sizes, with the kernels in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.machine import MODEL, describe
from benchmarks.gpu.markdown import report
from benchmarks.gpu.results import PROFILE, Results, Row, load, read_json
from negative_cache.workbench.files import write_json, write_text

POLL_SECONDS = 0.5
LOG, JSON, MARKDOWN = "log.txt", "gpu.json", "gpu.md"
LAST_LINES = 25  # of the log of a stage that failed
LAST_SECONDS = 5  # between the deadline that a stage is given and the end of its time limit


class Stage(NamedTuple):
    """A stage.

    Attributes:
        name: Its name, and that of its module in this package.
        weight: The remaining time is divided among a stage and the later ones in proportion to their weights.
        about: What it measures.
    """

    name: str
    weight: float
    about: str


STAGES = (
    Stage("works", 3.0, "the tests marked `gpu`"),
    Stage("passes", 2.0, "time and memory of one pass over the cached rows"),
    Stage("step", 1.5, "a training step of MiniLM"),
    Stage("quality", 4.0, "MiniLM fine-tuned with each loss"),
)


def main(arguments: Sequence[str]) -> int:
    """Run one of the three commands."""
    command, *rest = arguments
    if command == "gpu-prepare":
        return _prepare(rest)
    if command == "gpu-docs":
        return _docs(rest)
    parser = _parser(command)
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--prepared", type=Path, default=Path(".gpu"), help="folder that gpu-prepare wrote; default: .gpu"
    )
    parser.add_argument("--minutes", type=float, default=9, help="time limit of all stages together; default: 9")
    parser.add_argument("--only", help="stages, separated by commas: " + ", ".join(stage.name for stage in STAGES))
    parser.add_argument("--stage", help=argparse.SUPPRESS)  # the process of one stage
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(rest)
    known = [stage.name for stage in STAGES]
    wanted = known if options.only is None else [name.strip() for name in options.only.split(",")]
    if unknown := sorted(set(wanted) - set(known)):
        parser.error(f"--only names {', '.join(unknown)}; the stages are {', '.join(known)}.")
    if not 0 < options.minutes < math.inf:
        parser.error(f"--minutes is {options.minutes:g}; expected a positive number.")
    if options.stage is not None:
        run_stage(options.stage, options.output, options.prepared, options.seconds)
        return 0
    if "quality" in wanted and not (options.prepared / MODEL).is_dir():
        parser.error(
            f"{options.prepared} has no model, which the stage quality needs. Create it with `python -m benchmarks "
            f"gpu-prepare {options.prepared}`, or skip the stage: --only works,passes,step."
        )
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {options.output} cannot be created: {error}")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    return run_all([stage for stage in STAGES if stage.name in wanted], options)


def run_all(stages: Sequence[Stage], options: argparse.Namespace) -> int:
    """Run stages one after the other, and return the exit code."""
    output: Path = options.output
    for name in (LOG, PROFILE) if len(stages) == len(STAGES) else (LOG,):
        (output / name).unlink(missing_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    machine = describe(options.prepared)
    found: dict[str, Any] = {"machine": machine, "stages": _earlier(output, machine)}
    found["stages"] |= {stage.name: {"about": stage.about, "state": "not started", "rows": []} for stage in stages}
    try:
        _run(stages, deadline, options, found)
    except KeyboardInterrupt:
        print(f"Interrupted. The results so far are in {output / JSON}.")
        return 130
    finally:
        _write(output, found)
    print(f"Written: {output / JSON} {output / MARKDOWN}")
    return int(any(found["stages"][stage.name]["state"] != "done" for stage in stages))


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _earlier(output: Path, machine: dict[str, str]) -> dict[str, Any]:
    """The stages of an earlier run, if its machine, versions and commit were the same."""
    path = output / JSON
    if not path.exists():
        return {}
    found = load(path)
    if found["machine"] == machine:
        return found["stages"]
    print(f"{path} is from another machine, version or commit: its stages are replaced.")
    return {}


def _run(stages: Sequence[Stage], deadline: float, options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Run stages, and record their states."""
    for number, stage in enumerate(stages):
        weight = stage.weight / sum(later.weight for later in stages[number:])
        limit, record = weight * (deadline - time.monotonic()), found["stages"][stage.name]
        if limit < 1:
            record["state"] = "no time left"
            continue
        record |= {"state": "running", "limit": round(limit), "date": time.strftime("%Y-%m-%d %H:%M")}
        _write(options.output, found)
        print(f"{stage.name}: {stage.about}; at most {limit:.0f} s", flush=True)
        try:
            _watch(stage, limit, options, found)
        except KeyboardInterrupt:
            record["state"] = "interrupted"
            raise
        failed = sum(row.get("outcome") == "failed" for row in record["rows"])
        details = f", {failed} tests failed" if failed else ""
        details += f": {record['error'].splitlines()[-1]}" if record.get("error") else ""
        print(f"{stage.name}: {record['state']} after {record['seconds']:.0f} s{details}", flush=True)


def run_stage(name: str, output: Path, prepared: Path, seconds: float) -> None:
    """Run a stage in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = importlib.import_module(f"benchmarks.gpu.{name}")
    module.run(Results(_part(output, name)), prepared, device, seconds, device.type != "cuda")


def _watch(stage: Stage, limit: float, options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Run the process of a stage, and collect its rows as they are written."""
    output: Path = options.output
    record, part = found["stages"][stage.name], _part(output, stage.name)
    part.unlink(missing_ok=True)
    started = time.monotonic()
    seconds = max(limit - LAST_SECONDS, 0.8 * limit)
    command = [sys.executable, "-u", "-m", "benchmarks", "gpu", "--stage", stage.name, "--seconds", f"{seconds:.1f}"]
    command += ["--output", str(output), "--prepared", str(options.prepared)]
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment.setdefault("TRITON_INTERPRET", "1")
    with (output / LOG).open("ab") as log:
        begin = log.seek(0, os.SEEK_END)
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            while process.poll() is None and time.monotonic() < started + limit:
                time.sleep(POLL_SECONDS)
                record["seconds"] = round(time.monotonic() - started, 1)
                if _take_rows(record, part):
                    _write(output, found)
        finally:
            is_cut_off = process.poll() is None
            _kill(process)
            _take_rows(record, part)
            part.unlink(missing_ok=True)
    record["seconds"] = round(time.monotonic() - started, 1)
    record["state"] = "cut off" if is_cut_off else "failed" if process.returncode else "done"
    if record["state"] == "failed":
        lines = (output / LOG).read_bytes()[begin:].decode(errors="replace").splitlines()
        record["error"] = "\n".join(lines[-LAST_LINES:])
    _write(output, found)


def _take_rows(record: dict[str, Any], part: Path) -> bool:
    """Read the rows of a stage, and return whether there are new ones."""
    if not part.exists():
        return False
    rows: list[Row] = read_json(part)
    is_more = len(rows) > len(record["rows"])
    record["rows"] = rows
    return is_more


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a stage and every process that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _part(output: Path, name: str) -> Path:
    return output / f"{name}.json"


def _write(output: Path, found: dict[str, Any]) -> None:
    write_json(output / JSON, found)
    write_text(output / MARKDOWN, report(found))


def _parser(command: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        f"python -m benchmarks {command}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def _prepare(arguments: Sequence[str]) -> int:
    parser = _parser("gpu-prepare")
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--data",
        type=Path,
        nargs="*",
        default=[],
        help="BEIR folders for the stage quality; default: the built-in data set",
    )
    options = parser.parse_args(arguments)
    from benchmarks.gpu.prepare import prepare

    try:
        print(f"Written: {options.folder}, {prepare(options.folder, options.data):.1f} MiB")
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    return 0


def _docs(arguments: Sequence[str]) -> int:
    parser = _parser("gpu-docs")
    parser.add_argument("folder", type=Path, help="the output folder of gpu")
    parser.add_argument(
        "--docs", type=Path, default=Path("docs"), help="folder of pages with marked tables; default: docs"
    )
    options = parser.parse_args(arguments)
    from benchmarks.gpu.docs import update

    try:
        changed = update(options.folder / JSON, options.docs)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    print("Changed:", *changed if changed else ("nothing",))
    return 0
