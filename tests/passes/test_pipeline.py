import torch
from graphs import Capture, call, low_rank, op_counts
from pifa_compiler.passes import DEFAULT_PASSES, Canonicalize, FactorizeLinear, Skip, run_passes
from torch import nn
from torch.fx import symbolic_trace
from torch.testing import assert_close

pifa = torch.ops.pifa


def test_the_default_passes_bring_every_low_rank_form_into_pifa(capture: Capture):
    pair = nn.Sequential(nn.Linear(16, 5, bias=False), nn.Linear(5, 24))
    single = nn.Linear(24, 16)
    single.weight.data = low_rank(16, 24, rank=4)
    model, x = nn.Sequential(pair, nn.ReLU(), single, nn.Tanh()).requires_grad_(False), torch.randn(3, 16)
    gm = capture(model, (x,))
    run_passes(gm, [rule() for rule in DEFAULT_PASSES])
    native = gm.graph.find_nodes(op="call_function", target=pifa.linear_cpu.default)
    assert [node.args[3] is None for node in native] == [True, False]  # the first order is absorbed by the second
    assert pifa.linear.default not in op_counts(gm)
    assert_close(call(gm, x), model(x), rtol=1e-4, atol=1e-5)  # lossless up to float32 rounding


def test_what_runs_is_the_rewritten_graph_and_what_is_not_rewritten_is_not_compiled_again():
    model = nn.Linear(24, 16).requires_grad_(False)
    gm = symbolic_trace(model)
    run_passes(gm, [Canonicalize()])
    assert "aten.linear" in gm.code
    code = gm.forward.__code__
    (record,) = run_passes(gm, [FactorizeLinear()])  # of full rank
    assert isinstance(record.outcome, Skip)
    assert gm.forward.__code__ is code
