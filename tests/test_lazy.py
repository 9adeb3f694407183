"""`import negative_cache` imports nothing more, and every name is there when it is used."""

from __future__ import annotations

import ast
import inspect
import pickle
import subprocess
import sys

import pytest

import negative_cache
from negative_cache.workbench import data, evaluation

PACKAGES = (negative_cache, data, evaluation)


def run(code: str) -> str:
    """What a new process prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_package_imports_no_torch_and_using_a_name_does():
    code = (
        "import sys, negative_cache; print('torch' in sys.modules); negative_cache.CacheLoss; print(len(sys.modules))"
    )
    first, number = run(code).splitlines()
    assert first == "False"
    assert int(number) > 500  # torch


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_public_name_is_found_and_listed(package):
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name) is vars(package)[name]  # kept after the first use


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_type_checkers_see_the_same_names(package):
    tree = ast.parse(inspect.getsource(package))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert names - {"TYPE_CHECKING", "lazy_attributes"} == set(package.__all__)


def test_modules_are_attributes_as_if_they_had_been_imported():
    attributes = "negative_cache.losses.CacheLoss.__name__, negative_cache.checkpoint.save_checkpoint.__name__"
    assert run(f"import negative_cache; print({attributes})") == "CacheLoss save_checkpoint"
    code = "import negative_cache.losses; from negative_cache import NegativeCacheLoss, losses; "
    assert run(f"{code}print(losses is negative_cache.losses, NegativeCacheLoss.__name__)") == "True NegativeCacheLoss"


def test_an_unknown_name_is_an_attribute_error_with_a_suggestion():
    with pytest.raises(AttributeError, match="module 'negative_cache' has no attribute 'NegativeCacheLos'") as caught:
        negative_cache.NegativeCacheLos  # noqa: B018
    assert (caught.value.name, caught.value.obj) == ("NegativeCacheLos", negative_cache)
    assert not hasattr(negative_cache, "__wrapped__")
    with pytest.raises(ImportError, match="cannot import name 'NegativeCacheLos'"):
        from negative_cache import NegativeCacheLos  # noqa: F401


def test_public_classes_are_pickled_by_name():
    assert pickle.loads(pickle.dumps(negative_cache.NegativeCacheLoss)) is negative_cache.NegativeCacheLoss
