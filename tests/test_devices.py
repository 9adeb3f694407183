"""A step on a GPU: it does not synchronize the device, and `torch.compile` makes one graph of it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import embedding, normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import negative_cache
from negative_cache import NegativeCacheLoss
from support import as_on_a_gpu, needs_compiling_of_whole_steps, snapshot

KINDS = (
    "plain",
    "ids",
    "bfloat16",
    "evaluation",
    "int8",
    "float64",
    "samples and scale",
    "given negatives",
    "handler",
    "handler with top_k",
)
SHARED_KINDS = ("own draws", "margins", "guide", "correction", "refresh", "matryoshka", "fraction", "automatic")

registration = pytest.importorskip("torch.utils.backend_registration")


@pytest.fixture(scope="module")
def steps_on_a_fake_gpu() -> dict[str, dict[str, Any]]:
    """Lines of the library that synchronize or make float64 tensors, for each kind of step."""
    if not hasattr(registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot define a device in Python")
    job = Path(__file__).with_name("fake_gpu_job.py")
    ended = subprocess.run([sys.executable, str(job)], text=True, capture_output=True, timeout=200)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout)


def test_a_step_does_not_synchronize_the_device(steps_on_a_fake_gpu: dict[str, dict[str, Any]]):
    waits = dict(steps_on_a_fake_gpu["waits"])
    assert sum(waits.pop("three waits").values()) == 3  # they are detected
    assert len(waits.pop("ragged")) == 1  # the width of the sampled documents
    assert list(waits.pop("waiting").values()) == [1]  # whether the cache counts from this step on
    on_the_host = waits.pop("features on the host")
    assert sum(on_the_host.values()) <= 5, on_the_host
    assert waits == {kind: {} for kind in (*KINDS, *SHARED_KINDS)}


def test_a_step_makes_no_float64_tensor(steps_on_a_fake_gpu: dict[str, dict[str, Any]]):
    """Apple's MPS has neither float64 nor complex128."""
    wide = dict(steps_on_a_fake_gpu["wide"])
    assert sum(wide.pop("float64").values()) > 5  # they are detected
    assert set(wide) >= {*KINDS, *SHARED_KINDS, "waiting"} - {"float64"}
    assert not any(wide.values()), wide


class Float64(TorchDispatchMode):
    """Counts float64 tensors."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += sum(isinstance(x, Tensor) and x.dtype == torch.float64 for x in tree_leaves(result))
        return result


@pytest.mark.parametrize(
    "options", [{}, {"shared": False}, {"num_samples": 3}, {"num_samples": 0.5}, {"embedding_dtype": torch.bfloat16}]
)
def test_a_step_on_the_cpu_makes_no_float64_tensor_either(options: dict[str, Any]):
    torch.manual_seed(0)
    table = torch.nn.EmbeddingBag(100, 8)

    def encode(features: dict[str, Tensor]) -> Tensor:
        return normalize(table(features["words"]), dim=-1)

    def steps(**options: Any) -> int:
        loss_fn = NegativeCacheLoss(encode, cache_size=64, **{"num_samples": 1, **options})
        with Float64() as found:
            for step in range(3):
                words = torch.randint(100, (8, 5))
                documents, ids = encode({"words": words}), torch.arange(8) + 8 * step
                loss_fn(encode({"words": words[:, :2]}), documents, {"words": words}, ids).backward()
        return found.count

    assert steps(**options) == 0
    assert steps(embedding_dtype=torch.float64) > 20  # they are detected


def is_number(node: ast.expr) -> bool:
    """Whether an expression is plainly a Python number: a literal, an infinity, a name of a constant."""
    match node:
        case ast.Constant():
            return isinstance(node.value, int | float)
        case ast.UnaryOp():
            return is_number(node.operand)
        case ast.IfExp():
            return is_number(node.body) or is_number(node.orelse)
        case ast.Attribute():
            return node.attr in ("inf", "nan")
        case ast.Name():
            return node.id.isupper()
    return False


def is_plain_index(node: ast.expr) -> bool:
    """Whether an index is made of slices and constants."""
    parts = node.elts if isinstance(node, ast.Tuple) else [node]
    return all(isinstance(part, ast.Slice | ast.Constant) for part in parts)


def assignments_of_numbers(source: str) -> list[str]:
    """Assignments of Python numbers to what something else than slices and constants picks."""
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assign) and is_number(node.value)
        if any(isinstance(target, ast.Subscript) and not is_plain_index(target.slice) for target in node.targets)
    ]


def test_no_number_is_assigned_at_an_index_that_is_a_tensor():
    """`tensor[rows] = 0` copies the number from pageable memory and synchronizes a GPU; `index_fill_` does not."""
    wrong = ["a[b] = False", "a[:, b] = -torch.inf", "a.b[c > 0] = NO_ID", "a[b] = 1 if c else d"]
    right = ["a[1:] = 0", "a['b'] = 0", "a[b] = c", "a[b] += 1", "a = 0"]
    assert assignments_of_numbers("\n".join(wrong + right)) == wrong
    package = Path(negative_cache.__file__).parent
    files = [path for path in package.rglob("*.py") if "workbench" not in path.parts]
    found = {str(path.relative_to(package)): assignments_of_numbers(path.read_text("utf-8")) for path in files}
    assert len(found.pop("retrieval/tile_scores.py")) == 1  # on the CPU alone
    assert {name: lines for name, lines in found.items() if lines} == {}


EVERYTHING = {"absolute_margin": 0.1, "guide_margin": 0.1, "refresh_per_step": 3, "matryoshka_dims": (8,)}


def make_step(dtype: torch.dtype, is_everything: bool):
    torch.manual_seed(0)
    table = torch.randn(1000, 16).requires_grad_()

    def encode(features: dict[str, Tensor]) -> Tensor:
        return normalize(embedding(features["row"], table), dim=1)

    settings = EVERYTHING if is_everything else {}
    loss_fn = NegativeCacheLoss(encode, 256, num_samples=1, embedding_dtype=dtype, seed=0, **settings)

    def step(rows: Tensor) -> Tensor:
        given = {"document_ids": rows}
        if is_everything:
            guide = encode({"row": rows}).detach()
            given = {"log_q": -rows / 900, "guide_queries": guide.roll(1), "guide_documents": guide}
        return loss_fn(encode({"row": rows + 1}), encode({"row": rows}), {"row": rows}, **given)

    return table, loss_fn, step


def train(table: Tensor, step, count: int) -> list[float]:
    losses = []
    for number in range(count):
        loss = step((torch.arange(8) + 5 * number) % 900)
        (gradient,) = torch.autograd.grad(loss, table)
        with torch.no_grad():
            table -= 0.1 * gradient
        losses.append(float(loss.detach()))
    return losses


@needs_compiling_of_whole_steps
@pytest.mark.parametrize(
    ("dtype", "is_everything"),
    [(torch.float32, False), (torch.int8, False), (torch.bfloat16, False), (torch.float32, True)],
)
def test_a_compiled_step_is_one_graph_and_equals_the_plain_one(dtype: torch.dtype, is_everything: bool):
    torch.compiler.reset()
    results = []
    for is_compiled in (False, True):
        table, loss_fn, step = make_step(dtype, is_everything)
        train(table, step, 1)  # the first step makes the cache
        if is_compiled:
            losses = train(table, torch.compile(step, fullgraph=True, backend="aot_eager"), 40)
        else:
            with as_on_a_gpu():  # the branches that a compiled step takes
                losses = train(table, step, 40)
        results.append((losses, snapshot(loss_fn), table))
    (plain, plain_state, plain_table), (compiled, compiled_state, compiled_table) = results
    assert plain == pytest.approx(compiled, rel=1e-5)
    torch.testing.assert_close(plain_table, compiled_table)
    for key, value in plain_state.items():
        torch.testing.assert_close(value, compiled_state[key], msg=key)
