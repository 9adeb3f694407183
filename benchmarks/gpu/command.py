"""`gpu`: everything that needs a GPU, most valuable first, with every number on disk as soon as it is measured.

  python -m benchmarks gpu-prepare DIR [--data FOLDER ...]   files that travel to the machine with the GPU
  python -m benchmarks gpu --output DIR [--prepared DIR]     works, pass, step, quality; DIR/gpu.json and DIR/gpu.md
  python -m benchmarks gpu-docs DIR                          put the numbers of DIR/gpu.json into the documentation

Each stage is a process of its own with its own time limit. One that fails or is cut off keeps the rows that it wrote,
and the next one runs. What a stage does not use of its time is for the later ones. Without a GPU it is a rehearsal:
small sizes, the kernels in Triton's interpreter. It runs from a source tree, with torch, sentence-transformers and
pytest alone.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.machine import describe
from benchmarks.gpu.markdown import report
from benchmarks.gpu.results import Results, Row, write_json

POLL_SECONDS = 0.5
LOG, JSON, MARKDOWN = "log.txt", "gpu.json", "gpu.md"
LAST_LINES = 25  # of the log of a stage that failed


class Stage(NamedTuple):
    """A stage.

    Attributes:
        name: Also of its module in this package.
        weight: Of the time that is left, it and the later ones have parts in proportion to these.
        about: What it measures.
    """

    name: str
    weight: float
    about: str


STAGES = (
    Stage("works", 2.0, "the tests marked `gpu`"),
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
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--prepared", type=Path, default=Path(".gpu"), help="what gpu-prepare wrote; default: .gpu")
    parser.add_argument("--minutes", type=float, default=9, help="for all stages together; default: 9")
    parser.add_argument("--only", help="stages, separated by commas: " + ", ".join(stage.name for stage in STAGES))
    parser.add_argument("--stage", help=argparse.SUPPRESS)  # the process of one stage
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(rest)
    known = [stage.name for stage in STAGES]
    wanted = known if options.only is None else [name.strip() for name in options.only.split(",")]
    if unknown := sorted(set(wanted) - set(known)):
        parser.error(f"--only names {', '.join(unknown)}; the stages are {', '.join(known)}.")
    if options.minutes <= 0:
        parser.error(f"--minutes is {options.minutes:g}; expected a positive number.")
    if options.stage is not None:
        run_stage(options.stage, options.output, options.prepared, options.seconds)
        return 0
    return run_all([stage for stage in STAGES if stage.name in wanted], options)


def run_all(stages: Sequence[Stage], options: argparse.Namespace) -> int:
    """Run stages one after the other; 0 if none of them failed."""
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    (output / LOG).unlink(missing_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    found: dict[str, Any] = {"machine": describe(options.prepared), "minutes": options.minutes, "stages": {}}
    for number, stage in enumerate(stages):
        weight = stage.weight / sum(later.weight for later in stages[number:])
        limit = weight * (deadline - time.monotonic())
        record = {"about": stage.about, "state": "running", "limit": round(limit), "rows": []}
        found["stages"][stage.name] = record
        if limit < 1:
            record["state"] = "no time left"
            continue
        print(f"{stage.name}: {stage.about}; at most {limit:.0f} s", flush=True)
        _watch(stage, limit, options, found)
        error = f": {record['error'].splitlines()[-1]}" if record.get("error") else ""
        print(f"{stage.name}: {record['state']} after {record['seconds']:.0f} s{error}", flush=True)
    _write(output, found)
    print(f"Written: {output / JSON} {output / MARKDOWN} {output / LOG}")
    return int(any(record["state"] == "failed" for record in found["stages"].values()))


def run_stage(name: str, output: Path, prepared: Path, seconds: float) -> None:
    """Runs in the process of one stage."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = importlib.import_module(f"benchmarks.gpu.{name}")
    module.run(Results(_part(output, name)), prepared, device, seconds, device.type != "cuda")


def _watch(stage: Stage, limit: float, options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Run a stage's process, and take its rows over as they come."""
    output: Path = options.output
    record, part = found["stages"][stage.name], _part(output, stage.name)
    part.unlink(missing_ok=True)
    started = time.monotonic()
    command = [sys.executable, "-u", "-m", "benchmarks", "gpu", "--stage", stage.name, "--seconds", f"{limit:.0f}"]
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
        said = (output / LOG).read_bytes()[begin:].decode(errors="replace").splitlines()
        record["error"] = "\n".join(said[-LAST_LINES:])
    _write(output, found)


def _take_rows(record: dict[str, Any], part: Path) -> bool:
    """Read what a stage has written; whether there is more than before."""
    if not part.exists():
        return False
    rows: list[Row] = json.loads(part.read_text(encoding="utf-8"))
    is_more = len(rows) > len(record["rows"])
    record["rows"] = rows
    return is_more


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a stage and every process that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _part(output: Path, name: str) -> Path:
    return output / f"{name}.json"


def _write(output: Path, found: dict[str, Any]) -> None:
    write_json(output / JSON, found)
    beside = output / f"{MARKDOWN}.part"
    beside.write_text(report(found), encoding="utf-8")
    os.replace(beside, output / MARKDOWN)


def _parser(command: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        f"python -m benchmarks {command}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def _prepare(arguments: Sequence[str]) -> int:
    parser = _parser("gpu-prepare")
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--data", type=Path, nargs="*", default=[], help="BEIR folders for the stage quality; default: built-in"
    )
    options = parser.parse_args(arguments)
    from benchmarks.gpu.prepare import prepare

    try:
        prepare(options.folder, options.data)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    return 0


def _docs(arguments: Sequence[str]) -> int:
    parser = _parser("gpu-docs")
    parser.add_argument("folder", type=Path, help="with gpu.json")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    options = parser.parse_args(arguments)
    from benchmarks.gpu.docs import update

    try:
        changed = update(options.folder / JSON, options.docs)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print("Changed:", *changed)
    return 0
