"""Compile the kernels of the fused pass for GPUs, with the tiles they get there, on a machine without a GPU.

Prints one line per kernel. `python tests/compile_job.py all` compiles all combinations, which takes minutes.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from negative_cache.retrieval.fused import kernels
from negative_cache.retrieval.fused.launch import PICKED_ELEMENTS
from negative_cache.retrieval.fused.tile_sizes import Device, Tiling, gpu_tiling, power_of_two, precision

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8"}
MEMORY = {80: 166_912, 86: 101_376, 90: 232_448}  # bytes of shared memory per program
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
    "best": "*fp32",
    "total": "*fp32",
    "chosen": "*i32",
    "lse_out": "*fp32",
    "rows_out": "*i64",
    "scores_out": "*fp32",
}
MODES = {
    "scan": {
        "plain": {"SAMPLES": 1, "EXCLUDED": 0, "absent": ("excluded", "maxima_out")},
        "default": {"SAMPLES": 8, "EXCLUDED": 1, "absent": ("maxima_out",)},  # of `NegativeCacheLoss` with ids
        "full": {"SAMPLES": 4, "EXCLUDED": 16, "absent": ()},
        "lse": {"SAMPLES": 0, "EXCLUDED": 1, "absent": ("maxima_out",)},
        "groups": {"GROUPED": True, "SAMPLES": 0, "EXCLUDED": 1, "absent": ("total_out", "maxima_out", "seed")},
    },
    "draw": {
        "draws": {"absent": (), "SEGMENTS": 1024, "SAMPLES": 8},
        "lse": {"absent": ("rows_out", "chosen", "excluded"), "SEGMENTS": 16, "SAMPLES": 0},
    },
    "pick": {
        "best": {"absent": ("scores_out", "excluded")},
        "scores": {"absent": ("rows_out",)},
    },
}


def source(
    kernel: Any, dtype: torch.dtype, constants: dict[str, Any], absent: tuple[str, ...], descriptors: dict[str, str]
) -> ASTSource:
    """A kernel with the types of its arguments; pointers and row strides are multiples of 16, as they mostly are."""
    types = {**TENSORS, "queries": TYPES[dtype], "rows": TYPES[dtype], **descriptors}
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


class Combination(NamedTuple):
    """A kernel, and the problem that its tiles are chosen for.

    Attributes:
        kernel: A function of `kernels`.
        mode: A key of `MODES[kernel]`.
        arch: The GPU's compute capability: 80 for 8.0.
        dtype: Of the rows.
        batch: Number of queries.
        dim: Of the embeddings.
        group_size: Rows of a group.
    """

    kernel: str
    mode: str
    arch: int
    dtype: torch.dtype
    batch: int = 512
    dim: int = 256
    group_size: int = 2**17


def scan_settings(tiling: Tiling, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, str]]:
    """Constants of `scan`, and the types of its tensor descriptors."""
    constants: dict[str, Any] = {"GROUPED": False, "PRECISION": precision(), "UPCAST": False}
    constants |= {"BLOCK_M": tiling.block_m, "BLOCK_N": tiling.block_n, "BLOCK_K": tiling.block_k}
    constants |= {"BLOCK_S": tiling.block_s, "INTEGER": dtype == torch.int8, "COPIED": tiling.is_copied}
    if not tiling.is_copied:
        return constants, {}
    element = TYPES[dtype].removeprefix("*")
    lengths = {"queries": tiling.block_m, "rows": tiling.block_n}
    return constants, {name: f"tensordesc<{element}[{length}, {tiling.block_k}]>" for name, length in lengths.items()}


def build(combination: Combination) -> str:
    """Compile a kernel, check its resources, and describe them in a line."""
    name, mode, arch, dtype, batch, dim, group_size = combination
    settings = dict(MODES[name][mode])
    absent = settings.pop("absent")
    tiling = gpu_tiling(batch, dim, group_size, dtype, True, Device(MEMORY[arch], 108, arch >= 90))
    if name == "scan":
        constants, descriptors = scan_settings(tiling, dtype)
        options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
    else:
        length = tiling.block_n if name == "pick" else tiling.block_s
        constants = {"BLOCK_N" if name == "pick" else "BLOCK_S": length}
        constants |= {"BLOCK_P": 1, "BLOCK_K": min(PICKED_ELEMENTS // length, power_of_two(dim))}
        options, descriptors = {"num_warps": 4}, {}
    constants |= {"DIM": dim, **settings}
    kernel = source(getattr(kernels, name), dtype, constants, absent, descriptors)
    compiled = triton.compile(kernel, target=GPUTarget("cuda", arch, 32), options=options)
    registers, stack = resources(compiled.asm["cubin"])
    assert compiled.metadata.shared <= MEMORY[arch], (combination, compiled.metadata.shared)
    line = f"sm_{arch} {name} {mode} {dtype} batch {batch} dim {dim} group {group_size} {tuple(tiling)}"
    line = f"{line}: {registers} registers, {stack} bytes of stack, {compiled.metadata.shared} bytes shared"
    assert stack == 0 or "all" in sys.argv, line  # spills only with many excluded rows and samples
    return line


def few_combinations() -> list[Combination]:
    """What a test compiles in seconds."""
    narrow = [Combination("scan", "default", 90, dtype) for dtype in (torch.bfloat16, torch.float16, torch.int8)]
    return [
        *narrow,
        Combination("scan", "default", 90, torch.bfloat16, batch=4096, dim=768),
        Combination("scan", "default", 90, torch.float32, dim=768),
        Combination("scan", "default", 80, torch.float32, dim=768),
        Combination("scan", "groups", 80, torch.float32, batch=16, dim=768, group_size=20),
        Combination("draw", "draws", 90, torch.bfloat16, dim=768),
        Combination("pick", "scores", 80, torch.int8, dim=20),
    ]


def all_combinations() -> list[Combination]:
    scans = itertools.product(["scan"], MODES["scan"], MEMORY, TYPES, (64, 512), (256, 768))
    others = [itertools.product([name], MODES[name], (80, 90), TYPES) for name in ("draw", "pick")]
    return [Combination(*values) for values in itertools.chain(scans, *others)]


if __name__ == "__main__":
    for combination in all_combinations() if "all" in sys.argv else few_combinations():
        print(build(combination), flush=True)
    print("compiled")
