"""The fast wing: each of its operators and its decoder compute what the readable code does."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from edu.model.gpt import relu_squared, rms_norm
from edu.model.linear import Linear, product

WITHOUT = """
import sys
sys.modules["edu.fast"] = sys.modules["numba"] = None
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_without_the_fast_wing_and_without_numba_everything_works() -> None:
    """A few of the others' laws, in a process where neither can be imported."""
    laws = "cached_decode or join_and_leave or log_probs_equal"
    files = ["tests/test_05_engine.py", "tests/test_04_model.py"]
    command = [sys.executable, "-c", WITHOUT, "-q", "-p", "no:cacheprovider", "-n", "0", "-k", laws, *files]
    found = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    assert "passed" in found.stdout


@pytest.mark.parametrize("how", ["EDU_FAST=0", "--fast off"])
def test_the_fast_path_is_switched_off_and_its_name_says_so(how: str) -> None:
    code = """
import dataclasses, sys
from edu.config.cli import parse
@dataclasses.dataclass(frozen=True)
class Args:
    n: int = 1
parse(Args)
from edu.model.fast_path import path_in_use
from edu.model.gpt import rms_norm
print(path_in_use(), hasattr(rms_norm, "__wrapped__"))
"""
    flags, env = (how.split(), {}) if how.startswith("--") else ([], dict([how.split("=")]))
    command = [sys.executable, "-c", code, *flags]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, env=os.environ | env)
    assert found.stdout.split() == ["readable", "False"]


def test_torch_is_between_the_bounds_and_the_upper_one_follows_the_newest_that_was_tested() -> None:
    """Raise NEWEST and the bound together, once the suite has passed with a newer torch."""
    (requirement,) = [
        r
        for r in tomllib.loads(Path("pyproject.toml").read_text())["project"]["dependencies"]
        if r.startswith("torch>")
    ]
    newest = (2, 13)
    assert requirement.endswith(f",<{newest[0]}.{newest[1] + 1}")
    installed = tuple(map(int, torch.__version__.split(".")[:2]))
    assert (2, 11) <= installed <= newest


operators = pytest.importorskip("edu.fast.operators")  # what follows are laws of the fast wing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("fast", [lambda x: rms_norm(x, 0.1), relu_squared], ids=["rms_norm", "relu_squared"])
def test_a_fast_operator_has_the_values_and_derivatives_of_its_readable_namesake(fast: Any, dtype: torch.dtype) -> None:
    x, slope = torch.randn(3, 5, 16, dtype=dtype, requires_grad=True), torch.randn(3, 5, 16, dtype=dtype)
    readable = {"rms_norm": lambda x: rms_norm.__wrapped__(x, 0.1), "relu_squared": relu_squared.__wrapped__}
    found = []
    for function in (fast, readable["relu_squared" if fast is relu_squared else "rms_norm"]):
        y = function(x)
        found.append((y, *torch.autograd.grad(y, x, slope)))
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        torch.testing.assert_close(ours, theirs, atol=4 * torch.finfo(dtype).eps * 4, rtol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [(256, 32), (255, 32), (3, 256, 32), (4, 64, 32)])
def test_the_fast_product_is_torchs_own(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for weight in (torch.randn(24, 32), torch.randn(*shape[:-2], 24, 32)):
        torch.testing.assert_close(product(x, weight), product.__wrapped__(x, weight), atol=1e-4, rtol=1e-5)


def test_a_linear_layer_of_many_rows_has_the_values_and_derivatives_of_torchs_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, calls = Linear(48, 80, bias=False), []
    real = operators._Linear.apply
    monkeypatch.setattr(operators._Linear, "apply", lambda *args: calls.append(1) or real(*args))
    for rows, faster in ((2 * operators.ROWS, operators.ONEDNN), (operators.ROWS + 1, False)):
        calls.clear()
        x, slope = (torch.randn(2, rows // 2, size) if rows % 2 == 0 else torch.randn(rows, size) for size in (48, 80))
        exact = [t.double().requires_grad_() for t in (x, layer.weight.detach())]
        expected = torch.nn.functional.linear(*exact)
        expected.backward(slope.double())
        layer.weight.grad = None
        found = layer(x.requires_grad_())
        found.backward(slope)
        assert bool(calls) == faster
        for ours, theirs in ((found, expected), (x.grad, exact[0].grad), (layer.weight.grad, exact[1].grad)):
            torch.testing.assert_close(ours.double(), theirs, atol=1e-4, rtol=1e-5)
