"""Which launches overlap, and when; what they compile to is in test_linear_triton_compile.py."""

from typing import Any

import pytest
import torch
from pifa_compiler.kernels import linear
from torch import Tensor
from triton_interpreter import interpreted, run_without_interpreter

pytest.importorskip("triton", reason="needs the package triton")

from pifa_compiler.kernels import linear_triton_decode, linear_triton_siblings_decode, linear_triton_tiles


class Launches(list):
    """Stands in for a kernel, and keeps what it is launched with."""

    def __getitem__(self, grid):
        return lambda *_, **options: self.append(options)


def operands(d_out: int, d_in: int, rank: int, tokens: int) -> list[Tensor]:
    w_pivot, coeff = torch.randn(rank, d_in), torch.randn(d_out - rank, rank)
    return [torch.randn(tokens, d_in), w_pivot, coeff, torch.randperm(d_out), torch.randn(d_out)]


def launches_of(monkeypatch: pytest.MonkeyPatch, run: str, *values: Any, dependent: bool) -> list[dict[str, Any]]:
    found = Launches()
    for module in (linear_triton_decode, linear_triton_siblings_decode):
        monkeypatch.setattr(module, "wrap_triton", lambda kernel: kernel)
        for kernel in ("decode_kernel", "add_parts_kernel", "siblings_decode_kernel"):
            monkeypatch.setattr(module, kernel, found, raising=False)
    decode = getattr(linear_triton_decode, run, None) or getattr(linear_triton_siblings_decode, run)
    decode(*values, precision="ieee", tune=False, dependent=dependent)
    return list(found)


@pytest.mark.parametrize(
    ("size", "count"),
    [((40, 24, 8, 1), 2), ((40, 2500, 8, 5), 3), ((2200, 30, 2100, 5), 3), ((2200, 2500, 1100, 5), 4)],
    ids=["one-token", "shared-first-sum", "shared-second-sum", "shared-sums"],
)
def test_every_launch_but_the_first_begins_early_and_waits(size, count: int, monkeypatch: pytest.MonkeyPatch):
    launches = launches_of(monkeypatch, "decode", *operands(*size), dependent=True)
    assert [each.get("launch_pdl", False) for each in launches] == [False] + [True] * (count - 1)
    assert [each["WAIT"] for each in launches] == [False] + [True] * (count - 1)
    assert [each["SIGNAL"] for each in launches] == [True] * (count - 1) + [False]


def test_no_launch_adds_parts_where_the_last_program_does(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linear_triton_tiles, "LAST_ADDS", True)
    launches = launches_of(monkeypatch, "decode", *operands(2200, 2500, 1100, 5), dependent=True)
    # Only those of the first product; nothing in front of it could leave zeros to count from.
    assert [each.get("PARTS") for each in launches] == [None, 3, None]
    assert [(each["SIGNAL"], each["WAIT"]) for each in launches] == [(True, False), (True, True), (False, True)]


def test_siblings_of_two_launches_each_overlap_by_twos(monkeypatch: pytest.MonkeyPatch):
    x, *weights = operands(40, 24, 8, 1)
    launches = launches_of(monkeypatch, "decode_siblings", x, *([each] * 4 for each in weights), dependent=True)
    assert [each.get("launch_pdl", False) for each in launches] == [False, True] * 2
    assert [(each["SIGNAL"], each["WAIT"]) for each in launches] == [(True, False), (False, True)] * 2


def test_without_overlap_no_launch_has_the_attribute(monkeypatch: pytest.MonkeyPatch):
    for each in launches_of(monkeypatch, "decode", *operands(2200, 2500, 1100, 5), dependent=False):
        assert "launch_pdl" not in each
        assert not each["SIGNAL"]
        assert not each["WAIT"]


@interpreted
def test_values_and_registration(monkeypatch: pytest.MonkeyPatch):
    from pifa_compiler.kernels.linear_triton_dependent import decode_dependently, decode_siblings_dependently

    for module in (linear_triton_decode, linear_triton_siblings_decode):  # the interpreter knows no overlap
        monkeypatch.setattr(module, "overlap", lambda *_, **__: {"SIGNAL": False, "WAIT": False})
    x, *weights = operands(40, 24, 8, 3)
    wanted = linear(x, *weights)
    torch.testing.assert_close(decode_dependently(x, *weights, "ieee", False), wanted)
    for y in decode_siblings_dependently(x, *([each] * 2 for each in weights), "ieee", False):
        torch.testing.assert_close(y, wanted)
    torch.library.opcheck(decode_dependently, (x, *weights, "ieee", False))
    torch.library.opcheck(decode_siblings_dependently, (x, *([each] * 2 for each in weights), "ieee", False))


TRACE = """
import torch
from torch._subclasses import FakeTensorMode
from torch._functorch.aot_autograd import aot_export_module
from pifa_compiler.kernels import linear_triton_siblings as _registers, linear_triton_tiles as tiles
class Layer(torch.nn.Module):
    def forward(self, *values):
        x, *weights = values
        return torch.ops.pifa.linear_triton(*values), *torch.ops.pifa.linear_siblings_triton(x, *([w] for w in weights))
for tiles.DEPENDENT_LAUNCH, capability, tokens in (
    (False, (9, 0), 1), (True, (8, 9), 1), (True, (9, 0), 1), (True, (10, 0), 16), (True, (9, 0), 17)
):
    torch.cuda.get_device_capability = lambda device=None: capability
    with FakeTensorMode():
        h = dict(device="cuda", dtype=torch.bfloat16)
        order, bias = torch.empty(96, device="cuda", dtype=torch.int64), torch.empty(96, **h)
        values = (torch.empty(tokens, 64, **h), torch.empty(32, 64, **h), torch.empty(64, 32, **h), order, bias)
        gm, _ = aot_export_module(Layer(), values, trace_joint=False)
    targets = [str(node.target) for node in gm.graph.nodes]
    print(*(sum(name in target for target in targets) for name in ("triton_kernel_wrapper", "triton_dependent")))
"""


def test_decode_is_opaque_to_inductor_only_where_launches_overlap():
    done = run_without_interpreter("-c", TRACE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["4 0", "4 0", "0 2", "0 2", "4 0"]
