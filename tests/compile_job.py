"""Compiles the fused pass's kernels for GPUs, with the tiles they would get there, on a machine without one.

Prints a line per kernel. `python tests/compile_job.py all` takes some 200 combinations, in minutes.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from negative_cache.retrieval import kernels
from negative_cache.retrieval.tiling import Tiling, gpu_tiling, power_of_two, precision

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8"}
MEMORY = {80: 166_912, 86: 101_376, 90: 232_448}  # bytes of shared memory that a program may have
TENSORS = {
    "candidates": "*u8",
    "excluded": "*i64",
    "seed": "*i64",
    "best_out": "*fp32",
    "total_out": "*fp32",
    "chosen_out": "*i32",
    "maxima_out": "*fp32",
    "starts": "*i64",
    "stops": "*i64",
    "uniforms": "*fp64",
    "rows_out": "*i64",
    "scores_out": "*fp32",
}
MODES = {
    "scan": {
        "plain": {"SAMPLES": 1, "EXCLUDED": 0, "absent": ("excluded", "maxima_out")},
        "full": {"SAMPLES": 4, "EXCLUDED": 16, "absent": ()},
        "lse": {"SAMPLES": 0, "EXCLUDED": 1, "absent": ("maxima_out",)},
        "groups": {"GROUPED": True, "SAMPLES": 0, "EXCLUDED": 1, "absent": ("total_out", "maxima_out", "seed")},
    },
    "pick": {
        "draw": {"absent": ("scores_out",)},
        "best": {"absent": ("scores_out", "uniforms", "excluded")},
        "scores": {"absent": ("rows_out", "uniforms")},
    },
}


def source(kernel: Any, dtype: torch.dtype, constants: dict[str, Any], absent: tuple[str, ...]) -> ASTSource:
    """A kernel with the types of its arguments; pointers and row strides are multiples of 16, as they mostly are."""
    types = {**TENSORS, "queries": TYPES[dtype], "rows": TYPES[dtype]}
    if dtype in (torch.int8, torch.float16):
        types["query_scales"] = "*fp32"
    if dtype == torch.int8:
        types["row_scales"] = "*fp32"
    values = {"row_step": 1, "scale_stride": 1, "candidate_stride": 1, **constants}
    pointers = [name for name in kernel.arg_names if name.islower() and ("*" in types.get(name, ""))]
    none = [*absent, *({"query_scales", "row_scales"} - set(types))]
    values |= {name: None for name in none if name in kernel.arg_names}
    signature = {name: "constexpr" if name in values else types.get(name, "i32") for name in kernel.arg_names}
    aligned = [name for name in (*pointers, "row_stride") if name not in values]
    positions = {name: (kernel.arg_names.index(name),) for name in kernel.arg_names}
    return ASTSource(
        kernel,
        signature,
        {positions[name]: value for name, value in values.items()},
        {positions[name]: [["tt.divisibility", 16]] for name in aligned},
    )


def resources(binary: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes that are spilled to its stack."""
    tool = Path(nvidia.__file__).with_name("bin") / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def build(name: str, mode: str, arch: int, dtype: torch.dtype, batch: int, dim: int, group: int) -> str:
    settings = dict(MODES[name][mode])
    absent = settings.pop("absent")
    tiling: Tiling = gpu_tiling(batch, dim, group, dtype, True, MEMORY[arch], 108)
    constants = {"DIM": dim, "BLOCK_N": tiling.block_n, **settings}
    if name == "scan":
        constants = {"GROUPED": False, "PRECISION": precision(), "UPCAST": False, **constants}
        constants |= {"BLOCK_M": tiling.block_m, "BLOCK_K": tiling.block_k}
        options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
    else:
        constants |= {"BLOCK_P": 1, "BLOCK_K": min(64, power_of_two(dim))}
        options = {"num_warps": 4}
    kernel = source(getattr(kernels, name), dtype, constants, absent)
    compiled = triton.compile(kernel, target=GPUTarget("cuda", arch, 32), options=options)
    registers, stack = resources(compiled.asm["cubin"])
    assert compiled.metadata.shared <= MEMORY[arch], (name, mode, arch, dtype, compiled.metadata.shared)
    line = f"sm_{arch} {name} {mode} {dtype} batch {batch} dim {dim} group {group} {tuple(tiling)}"
    line = f"{line}: {registers} registers, {stack} bytes of stack, {compiled.metadata.shared} bytes shared"
    assert stack <= 64 or "all" in sys.argv, line
    return line


def combinations() -> list[tuple[Any, ...]]:
    if "all" in sys.argv:
        scans = itertools.product(["scan"], MODES["scan"], MEMORY, TYPES, (64, 512), (256, 768), (2**17,))
        picks = itertools.product(["pick"], MODES["pick"], (80, 90), TYPES, (512,), (256,), (2**17,))
        return [*scans, *picks]
    few = [("scan", "full", 90, dtype, 512, 256, 2**17) for dtype in (torch.bfloat16, torch.int8)]
    few += [("scan", "groups", 80, torch.float32, 16, 768, 20)]
    few += [
        ("pick", mode, 80, dtype, 512, 20, 2**17) for mode, dtype in (("draw", torch.float16), ("scores", torch.int8))
    ]
    return few


if __name__ == "__main__":
    for combination in combinations():
        print(build(*combination), flush=True)
    print("compiled")
