"""`gpu.md`: the content of `gpu.json` as tables, and which targets are met."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.gpu.results import Row, Value

# Highest allowed values; LEAST_OF_PEAK is a lowest one.
PASS_OF_PRODUCT, PASS_OF_COMPILED_FEW, PASS_OF_COMPILED_MANY = 1.15, 0.75, 1.0
LEAST_OF_PEAK, PASS_MEGABYTES, STEP_OF_IN_BATCH = 0.5, 24.0, 1.6
COMPILED = "product + logsumexp + Gumbel argmax, compiled"
PORT = "dense algorithm of the port"


def report(found: dict[str, Any]) -> str:
    """The page of all stages."""
    machine = "; ".join(f"{key} {value}" for key, value in found["machine"].items())
    lines = ["# On a GPU", "", machine, ""]
    if found["machine"]["device"] == "cpu":
        lines += ["A rehearsal on a CPU: small sizes, kernels in an interpreter. The numbers have no meaning.", ""]
    lines += table(STAGES, [_stage(name, record) for name, record in found["stages"].items()])
    rows = {name: record["rows"] for name, record in found["stages"].items()}
    if found["machine"]["device"] != "cpu" and (rows.get("passes") or rows.get("step")):
        lines += table(TARGETS, targets(rows), "## Targets")
    for name, record in found["stages"].items():
        if record["rows"] or record.get("error"):
            lines += [f"## {name}: {record['about']}", ""]
            lines += SECTIONS[name](record["rows"]) if record["rows"] else []
            lines += ["```", record["error"], "```", ""] if record.get("error") else []
    return "\n".join(lines)


STAGES = {"stage": "stage", "state": "state", "seconds": "seconds", "limit": "limit", "date": "begun", "next": "next"}


def _stage(name: str, record: dict[str, Any]) -> Row:
    """The state of a stage, and what to do about it."""
    known = {key: record.get(key) for key in ("state", "seconds", "limit", "date")}
    if record["state"] in ("done", "running"):
        return {"stage": name, **known}
    advice = "see the error below" if record["state"] == "failed" else "rows are missing below"
    return {"stage": name, **known, "next": f"{advice}; to run it again: --only {name}"}


TARGETS = {"what": "target", "measured": "measured", "allowed": "allowed", "verdict": "verdict"}


def targets(rows: dict[str, list[Row]]) -> list[Row]:
    """Each target with the measured value, the worst one if the target applies to several sizes."""
    fused = {_size(row): row for row in rows.get("passes", []) if row["way"] == "fused" and "ms" in row}
    compiled = {_size(row): row for row in rows.get("passes", []) if row["way"] == COMPILED and "ms" in row}
    narrow = [row for row in fused.values() if row["dtype"] == "bfloat16"]
    many = [row for row in narrow if number(row["batch"]) >= 128]
    against = [
        (row, number(row["ms"]) / number(compiled[_size(row)]["ms"])) for row in narrow if _size(row) in compiled
    ]
    made = [
        _worst("pass, bfloat16 / product, B >= 128", [(row, row.get("of_product")) for row in many], PASS_OF_PRODUCT),
        _worst(
            f"pass, bfloat16 / {COMPILED}, B <= 128",
            [pair for pair in against if number(pair[0]["batch"]) <= 128],
            PASS_OF_COMPILED_FEW,
        ),
        _worst(
            f"pass, bfloat16 / {COMPILED}, B > 128",
            [pair for pair in against if number(pair[0]["batch"]) > 128],
            PASS_OF_COMPILED_MANY,
        ),
        _worst(
            "pass, share of the card's bfloat16 peak, B=4,096 N=131,072 D=768",
            [(row, row.get("of_peak")) for row in narrow if _size(row)[:3] == (4096, 131_072, 768)],
            LEAST_OF_PEAK,
            is_least=True,
        ),
        _worst("pass, extra memory, MB", [(row, row.get("extra_mb")) for row in fused.values()], PASS_MEGABYTES),
        _worst(
            "pass, int8 / bfloat16",
            [
                (row, number(row["ms"]) / number(fused[(*_size(row)[:3], "bfloat16")]["ms"]))
                for row in fused.values()
                if row["dtype"] == "int8" and (*_size(row)[:3], "bfloat16") in fused
            ],
            1.0,
        ),
    ]
    ours = [row for row in rows.get("step", []) if str(row["loss"]).startswith("negative cache, bf")]
    first = [row for row in ours if row["batch"] == 64]
    made.append(_worst("step / in-batch, B=64", [(row, row["of_in_batch"]) for row in first], STEP_OF_IN_BATCH))
    made.append(_worst("waits of the library in a step", [(r, r.get("waits_of_the_library")) for r in ours], 0.0))
    return [row for row in made if row]


def table(columns: dict[str, str], rows: Sequence[Row], title: str = "") -> list[str]:
    """A Markdown table, without columns that are empty in all rows."""
    kept = {key: heading for key, heading in columns.items() if any(row.get(key) is not None for row in rows)}
    lines = [title, ""] if title else []
    lines.append("| " + " | ".join(kept.values()) + " |")
    lines.append("|" + "---|" * len(kept))
    lines += ["| " + " | ".join(_text(row.get(key)) for key in kept) + " |" for row in rows]
    return [*lines, ""]


def _works(rows: list[Row]) -> list[str]:
    counts = {kind: sum(row["outcome"] == kind for row in rows) for kind in ("passed", "failed", "skipped")}
    lines = [", ".join(f"{count} {kind}" for kind, count in counts.items()), ""]
    other = [row for row in rows if row["outcome"] != "passed"]
    return [*lines, *(table({"test": "test", "outcome": "outcome", "message": "why"}, other) if other else [])]


def _passes(rows: list[Row]) -> list[str]:
    columns = {
        "batch": "B",
        "rows": "N",
        "dim": "D",
        "dtype": "dtype of rows",
        "way": "way",
        "ms": "ms",
        "of_product": "/ product",
    }
    columns |= {"teraflops": "TFLOP/s", "of_peak": "of peak", "extra_mb": "extra MB", "lse_error": "error of lse"}
    return table(columns | {"failed": "failed"}, rows)


def _step(rows: list[Row]) -> list[str]:
    columns = {"model": "model", "batch": "B", "loss": "loss", "pairs": "pairs a step", "ms": "ms"}
    columns |= {"of_in_batch": "/ in-batch", "pairs_per_second": "pairs/s", "extra_mb": "extra MB"}
    columns |= {"launches": "launches", "busy_ms": "device busy, ms"}
    return table(columns | {"waits_of_the_library": "waits: library", "waits_of_others": "waits: others"}, rows)


def _quality(rows: list[Row]) -> list[str]:
    columns = {"data": "data", "loss": "loss", "rate": "rate", "seed": "seed", "steps": "steps"}
    columns |= {"documents_encoded": "documents encoded", "dev_MRR@10": "dev MRR@10", "test_MRR@10": "test MRR@10"}
    columns |= {"test_nDCG@10": "test nDCG@10", "train_seconds": "seconds", "error": "error"}
    return table(columns, rows)


SECTIONS: dict[str, Callable[[list[Row]], list[str]]] = {
    "works": _works,
    "passes": _passes,
    "step": _step,
    "quality": _quality,
}


def _worst(what: str, measured: Iterable[tuple[Row, Value | float]], allowed: float, *, is_least: bool = False) -> Row:
    """The row of a target; empty if nothing was measured."""
    known = [(number(value), row) for row, value in measured if value is not None]
    if not known:
        return {}
    value, row = (min if is_least else max)(known, key=lambda pair: pair[0])
    where = ", ".join(
        f"{name}={row[key]:,}" for name, key in (("B", "batch"), ("N", "rows"), ("D", "dim")) if key in row
    )
    is_met = value >= allowed if is_least else value <= allowed
    text = f"{value:.3g}" + (f" ({where})" if len(known) > 1 else "")
    sign = ">=" if is_least else "<="
    return {"what": what, "measured": text, "allowed": f"{sign} {allowed:g}", "verdict": "met" if is_met else "NOT MET"}


def _size(row: Row) -> tuple[Value, ...]:
    return row["batch"], row["rows"], row["dim"], row["dtype"]


def number(value: Value) -> float:
    """A value that is known to be a number."""
    assert isinstance(value, int | float)
    return float(value)


def _text(value: Value) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value.replace("\n", " ").replace("|", "\\|")
