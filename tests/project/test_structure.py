"""The structure of the code: how much of it a training step runs through, and limits that keep it readable."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import negative_cache
from negative_cache import NegativeCacheLoss

PACKAGE = Path(negative_cache.__file__).parent
KERNELS = "retrieval/fused/kernels.py"  # in Triton's language, which has no records
MOST_LINES, MOST_POSITIONAL, MOST_MODULES = 60, 6, 20
MOST_FILES, MOST_FUNCTIONS = 21, 160  # that one step enters
COLLECTIVES = {
    "P2POp",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "irecv",
    "isend",
    "monitored_barrier",
    "recv",
    "recv_object_list",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
    "send",
    "send_object_list",
}


def sources(without: str = "") -> dict[str, str]:
    """The text of every file of the package but those below `without`, by its path in the package."""
    paths = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
    return {
        name: path.read_text("utf-8") for name, path in paths.items() if not without or not name.startswith(without)
    }


def problems(find: Callable[[str], list[str]], files: dict[str, str]) -> list[str]:
    """What `find` returns for each file, with the file's name."""
    return [f"{name}: {found}" for name, source in files.items() for found in find(source)]


# One step


def entered_by(act: Callable[[], Any]) -> set[CodeType]:
    """The code of the package's functions that a call enters."""
    entered: set[CodeType] = set()

    def record(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            entered.add(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(record)
    try:
        act()
    finally:
        sys.setprofile(before)
    return entered


def files_of(entered: set[CodeType]) -> set[str]:
    return {Path(code.co_filename).relative_to(PACKAGE).as_posix() for code in entered}


def test_a_step_runs_through_few_files_and_functions_and_none_about_ranks():
    torch.manual_seed(0)
    words = nn.EmbeddingBag(1000, 16)

    def encode(features: dict[str, Tensor]) -> Tensor:
        return normalize(words(features["words"]), dim=-1)

    loss_fn = NegativeCacheLoss(encode, cache_size=512, num_samples=1, seed=0)

    def step(number: int) -> Tensor:
        documents = torch.randint(1000, (8, 12))
        queries = normalize(words(documents[:, :4]), dim=-1)
        ids = torch.arange(8) + 8 * number
        loss: Tensor = loss_fn(queries, encode({"words": documents}), {"words": documents}, document_ids=ids)
        return loss

    first = entered_by(lambda: step(0))
    for number in range(1, 4):
        step(number).backward()
    entered = entered_by(lambda: step(4))
    files = files_of(entered)
    assert "negative_cache_loss.py" in files  # what it counts
    assert first - entered  # the first step does more: it creates the cache
    assert not [name for name in files if name.startswith("distributed/")]
    assert len(files) <= MOST_FILES, sorted(files)
    assert len(entered) <= MOST_FUNCTIONS, sorted(f"{code.co_name}:{code.co_firstlineno}" for code in entered)


# Limits


def number_of_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """From the first statement after the docstring to the end."""
    body = function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def long_functions(source: str) -> list[str]:
    return [
        f"{node.name} has {number_of_lines(node)} lines"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and number_of_lines(node) > MOST_LINES
    ]


def long_calls(source: str) -> list[str]:
    """Calls with many positional arguments; launches of kernels, `kernel[grid](...)`, do not count."""
    return [
        f"line {node.lineno}: {ast.unparse(node.func)} gets {len(node.args)} positional arguments"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and not isinstance(node.func, ast.Subscript) and len(node.args) > MOST_POSITIONAL
    ]


def distributed_names(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(line, full name) of everything that a module takes from `torch.distributed`."""
    modules = {"torch.distributed": "torch.distributed"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            yield from ((str(node.lineno), f"{node.module}.{alias.name}") for alias in node.names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            yield str(node.lineno), f"{modules.get(owner, owner)}.{node.attr}"


def messages(source: str) -> list[str]:
    """Uses of collectives and other messages between ranks."""
    return [
        f"line {line}: {name}"
        for line, name in distributed_names(ast.parse(source))
        if name.startswith("torch.distributed") and name.rsplit(".", 1)[1] in COLLECTIVES
    ]


def test_no_function_is_long():
    assert problems(long_functions, sources(without=KERNELS)) == []


def test_the_check_sees_a_long_function_and_leaves_its_docstring_out():
    lines = "\n".join("    x = 1" for _ in range(MOST_LINES))
    docstring = '    """' + "\n" * MOST_LINES + '    """\n'
    assert long_functions(f"def f():\n{docstring}{lines}") == []
    assert long_functions(f"class A:\n  def f():\n{docstring}{lines}\n    x = 2") == ["f has 61 lines"]
    assert long_functions(f"def f():\n{docstring}") == []


def test_no_call_has_many_positional_arguments():
    assert problems(long_calls, sources(without=KERNELS)) == []


def test_the_check_sees_a_call_with_many_positional_arguments():
    few = "f(1, 2, 3, 4, 5, 6, g=7, h=8)\nkernel[grid](1, 2, 3, 4, 5, 6, 7)"
    assert long_calls(few) == []
    assert long_calls(f"{few}\na.f(1, 2, 3, 4, 5, 6, *b)") == ["line 3: a.f gets 7 positional arguments"]


def test_the_top_level_has_few_modules():
    modules = sorted(name for name in sources() if "/" not in name)
    assert "negative_cache_loss.py" in modules
    assert len(modules) <= MOST_MODULES, modules


def test_all_messages_between_ranks_are_sent_in_one_folder():
    assert problems(messages, sources(without="distributed/")) == []
    assert problems(messages, sources()) != []


def test_the_check_sees_a_message_however_it_is_imported():
    silent = [
        "import torch.distributed as dist\ndist.get_rank()\ndist.group.WORLD",
        "import torch.distributed.checkpoint as dcp\ndcp.save(x)",
        "import torch\ntorch.gather(x, 1, y)\nx.scatter(1, y, z)\nx.gather(1, y)",
    ]
    loud = {
        "import torch\ntorch.distributed.barrier()": "line 2: torch.distributed.barrier",
        "import torch.distributed as dist\ndist.all_reduce(x)": "line 2: torch.distributed.all_reduce",
        "from torch import distributed\ndistributed.send(x)": "line 2: torch.distributed.send",
        "from torch.distributed import all_gather as a": "line 1: torch.distributed.all_gather",
        "import torch.distributed.nn as d\nd.all_gather(x)": "line 2: torch.distributed.nn.all_gather",
    }
    assert [messages(source) for source in silent] == [[], [], []]
    assert [messages(source) for source in loud] == [[found] for found in loud.values()]


# Devices

CREATE_TENSORS = {
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "tensor",
    "zeros",
}  # fmt: skip


def tensors_without_device(source: str) -> list[str]:
    """Calls that would create a tensor on the default device of torch, which the user may have set."""
    return [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in CREATE_TENSORS}
        if all(keyword.arg != "device" for keyword in node.keywords)
    ]


def test_every_tensor_is_created_on_a_named_device():
    engine = {name: source for name, source in sources().items() if not name.startswith("workbench/")}
    scale = "torch.full([1], math.log(self._fixed_scale))"  # a parameter of the user's module
    assert [found for found in problems(tensors_without_device, engine) if scale not in found] == []


def test_the_check_sees_a_tensor_without_a_device():
    assert tensors_without_device("torch.zeros(3, device=x.device)\nx.new_zeros(3)\ntorch.zeros_like(x)") == []
    assert tensors_without_device("torch.zeros(3)") == ["line 1: torch.zeros(3)"]
