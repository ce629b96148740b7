import operator

import pytest
import torch
from graphs import Capture, call, capture_by_dynamo, capture_by_export, op_counts
from pifa_compiler.passes import Canonicalize, Skip, run_passes
from pifa_compiler.passes.weights import CHANGED, COMPUTED, Weight, read_weight
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

aten = torch.ops.aten


class Spelling(nn.Module):
    """A linear from 6 to 4 features, spelled by `forward`; `w` is [4, 6], `m` is [6, 4]."""

    def __init__(self, spell) -> None:
        super().__init__()
        self.w, self.m, self.b = (nn.Parameter(torch.randn(*s)) for s in ((4, 6), (6, 4), (4,)))
        self.fc = nn.Linear(6, 4)
        self.spell = spell

    def forward(self, x: Tensor) -> Tensor:
        return self.spell(self, x)


SPELLINGS = {
    "module": lambda s, x: s.fc(x),
    "functional": lambda s, x: F.linear(x, s.w, s.b),
    "functional-keywords": lambda s, x: F.linear(input=x, weight=s.w, bias=s.b),
    "functional-transposed": lambda s, x: F.linear(x, s.m.t()),
    "aten": lambda s, x: aten.linear.default(x, s.w, s.b),
    "addmm": lambda s, x: torch.addmm(s.b, x, s.m),
    "addmm-one": lambda s, x: torch.addmm(s.b, x, s.m, beta=1, alpha=1),
    "aten-addmm-t": lambda s, x: aten.addmm.default(s.b, x, s.w.t()),
    "mm": lambda s, x: torch.mm(x, s.m),
    "aten-mm": lambda s, x: aten.mm.default(x, s.m),
    "matmul": lambda s, x: torch.matmul(x, s.m),
    "aten-matmul": lambda s, x: aten.matmul.default(x, s.m),
    "operator": lambda s, x: x @ s.m,
    "T": lambda s, x: x @ s.w.T,
    "mT": lambda s, x: x @ s.w.mT,
    "transpose": lambda s, x: x @ s.w.transpose(0, 1),
    "transpose-negative": lambda s, x: x @ s.w.transpose(-1, -2),
    "permute": lambda s, x: x @ s.w.permute(1, 0),
    "permute-identity": lambda s, x: x @ s.m.permute(0, 1),
    "twice": lambda s, x: x @ s.m.t().t(),
    "thrice": lambda s, x: x @ torch.transpose(s.w.t().T, 0, 1),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_canonicalize_makes_every_spelling_one(spelling: str, capture: Capture):
    model, x = Spelling(SPELLINGS[spelling]), torch.randn(3, 6)
    gm = capture(model, (x,))
    run_passes(gm, [Canonicalize()])
    counts = op_counts(gm)
    assert counts.pop(aten.linear.default) == 1
    assert counts.pop(aten.t.default, 1) == 1
    assert counts == {}
    (linear,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    weight = read_weight(gm, linear.args[1])
    assert isinstance(weight, Weight)
    assert weight.tensor.shape == (4, 6)
    assert weight.node.op in ("get_attr", "placeholder")
    assert_close(call(gm, x), model(x))
    assert run_passes(gm, [Canonicalize()]) == []  # a second run finds nothing


class Apart(nn.Linear):
    """Adds its bias by itself, as Falcon's linears do."""

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else self.bias + y if self.out_features == 5 else y + self.bias


class AddsMore(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.first = Apart(6, 4, bias=False), Apart(6, 5)
        self.more, self.wide = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4).double())
        self.all = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        # Of another's code, of another dtype, for every row, scaled, and read by others too.
        y = x @ self.fc.weight.T
        others = y + self.all, self.fc(x) + self.wide, torch.add(x @ self.fc.weight.T, self.more, alpha=2)
        return self.first(x), self.fc(x) + self.more, *others, y + self.more


def test_a_bias_that_a_layers_own_code_adds_is_the_linears():
    model, x = AddsMore(), torch.randn(3, 6)
    gm = capture_by_export(model, (x,))
    run_passes(gm, [Canonicalize()])
    linears = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert [str(linear.args[2]) for linear in linears if len(linear.args) > 2] == ["first_bias"]
    assert op_counts(gm)[aten.add.Tensor] == 5
    for got, wanted in zip(call(gm, x), model(x), strict=True):
        assert_close(got, wanted)


def test_canonicalize_keeps_batch_dimensions(capture: Capture):
    model, x = Spelling(lambda s, x: x @ s.m), torch.randn(2, 3, 6)
    gm = capture(model, (x,))
    run_passes(gm, [Canonicalize()])
    assert op_counts(gm) == {aten.t.default: 1, aten.linear.default: 1}
    assert_close(call(gm, x), model(x))


@pytest.mark.parametrize(
    ("spell", "reason"),
    [
        (lambda s, x: torch.addmm(s.b, x, s.m, alpha=2), "addmm scales its terms: beta=None, alpha=2"),
        (lambda s, x: torch.addmm(s.b, x, s.m, beta=0.5), "addmm scales its terms: beta=0.5, alpha=None"),
        (lambda s, x: torch.addmm(x @ s.m, x, s.m), "addmm's first argument is not known to be a bias vector"),
    ],
    ids=["alpha", "beta", "bias"],
)
def test_canonicalize_leaves_near_misses(spell, reason: str):
    model, x = Spelling(spell), torch.randn(3, 6)
    gm = symbolic_trace(model)
    records = run_passes(gm, [Canonicalize()])
    assert Skip(reason) in [record.outcome for record in records]
    assert_close(gm(x), model(x))


def test_canonicalize_leaves_a_module_with_hooks():
    model = nn.Sequential(nn.Linear(6, 4))
    model[0].register_forward_hook(lambda module, args, output: output + 1)
    gm = symbolic_trace(model)
    (record,) = run_passes(gm, [Canonicalize()])
    assert record.outcome == Skip("module has hooks or a forward of its own, which would no longer run")


def test_canonicalize_leaves_products_of_activations(capture: Capture):
    model, x = Spelling(lambda s, x: (x @ s.m) @ (x @ s.m).t()), torch.randn(3, 6)
    gm = capture(model, (x,))
    run_passes(gm, [Canonicalize()])
    assert op_counts(gm)[aten.linear.default] in (1, 2)  # both inner products, shared or not
    assert_close(call(gm, x), model(x))


def test_canonicalize_leaves_a_subclass_of_linear():
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return True

    model = nn.Sequential(Doubled(6, 4))
    gm = torch.fx.GraphModule(model, Tracer().trace(model))
    assert run_passes(gm, [Canonicalize()]) == []


def test_read_weight_reads_weights_as_rows_of_outputs(capture: Capture):
    model, x = Spelling(lambda s, x: x @ s.m), torch.randn(3, 6)
    gm = capture(model, (x,))
    run_passes(gm, [Canonicalize()])
    (linear,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    weight = read_weight(gm, linear.args[1])
    assert isinstance(weight, Weight)
    assert torch.equal(weight.tensor, model.m.t())


def test_read_weight_refuses_what_the_graph_computes():
    gm = capture_by_export(Spelling(lambda s, x: F.linear(x, s.w * 2)), (torch.randn(3, 6),))
    (linear,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert read_weight(gm, linear.args[1]) == COMPUTED


def test_read_weight_never_reads_a_fake_tensor():
    with torch._subclasses.FakeTensorMode():
        model = nn.Sequential(nn.Linear(6, 4))
    gm = symbolic_trace(model)
    run_passes(gm, [Canonicalize()])
    (linear,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert read_weight(gm, linear.args[1]) == COMPUTED


@pytest.mark.parametrize(
    "write",
    [
        lambda graph, w: graph.call_method("mul_", (w, 2)),
        lambda graph, w: graph.call_function(operator.imul, (w, 2)),
        lambda graph, w: graph.call_function(operator.setitem, (w, 0, 0.0)),
        lambda graph, w: graph.call_function(torch.mul, (w, 2), {"out": w}),
        lambda graph, w: graph.call_function(aten.mul_.Tensor, (w, 2)),
        lambda graph, w: graph.call_method("mul_", (graph.call_method("t", (w,)), 2)),
    ],
    ids=["method", "operator", "setitem", "out", "aten", "view"],
)
def test_read_weight_refuses_what_the_graph_changes(write):
    graph = torch.fx.Graph()
    x, w = graph.placeholder("x"), graph.get_attr("w")
    write(graph, w)
    again = graph.get_attr("w")  # captures make one node a use
    graph.output(graph.call_function(aten.linear.default, (x, again)))
    gm = torch.fx.GraphModule({"w": torch.randn(4, 6)}, graph)
    assert read_weight(gm, again) == CHANGED


@pytest.mark.parametrize(
    "read",
    [
        lambda graph, w: graph.call_method("sum", (w,)),
        lambda graph, w: graph.call_function(F.embedding, (graph.placeholder("ids"), w)),
        lambda graph, w: graph.call_method("__getitem__", (w, 0)),
    ],
    ids=["sum", "embedding", "getitem"],
)
def test_read_weight_lets_others_read_the_weight(read):
    graph = torch.fx.Graph()
    w = graph.get_attr("w")
    read(graph, w)
    gm = torch.fx.GraphModule({"w": torch.randn(4, 6)}, graph)
    assert isinstance(read_weight(gm, w), Weight)


def test_canonicalize_leaves_calls_with_further_arguments():
    def write(s: Spelling, x: Tensor) -> Tensor:
        s.seen = torch.empty(3, 4)
        torch.mm(x, s.m, out=s.seen)
        return torch.addmm(s.b, x, s.m, out=s.seen) + torch.matmul(x, s.m)

    gm = symbolic_trace(Spelling(write).requires_grad_(False))
    reasons = [record.outcome for record in run_passes(gm, [Canonicalize()]) if isinstance(record.outcome, Skip)]
    assert reasons == [Skip("the call has arguments that a linear does not have, such as out=")] * 2
    assert op_counts(gm)[torch.mm] == op_counts(gm)[torch.addmm] == op_counts(gm)[aten.linear.default] == 1


@pytest.mark.parametrize("spell", [lambda s, x: x @ s.w.H, lambda s, x: x @ s.w.adjoint(), lambda s, x: x @ s.w.mH])
def test_a_complex_weight_is_not_taken_for_its_conjugate(spell, capture: Capture):
    model, x = Spelling(spell), torch.randn(3, 6, dtype=torch.complex64)
    model.w = nn.Parameter(torch.randn(4, 6, dtype=torch.complex64))
    gm = capture(model, (x,))
    run_passes(gm, [Canonicalize()])
    assert_close(call(gm, x), model(x))


@pytest.mark.parametrize("spell", [lambda s, x: x @ s.w.H, lambda s, x: x @ s.w.adjoint()])
def test_a_real_weight_is(spell):
    model, x = Spelling(spell), torch.randn(3, 6)
    gm = symbolic_trace(model)
    run_passes(gm, [Canonicalize()])
    assert op_counts(gm)[aten.linear.default] == 1
    assert_close(call(gm, x), model(x))


def test_a_bias_that_is_spread_over_the_outputs_is_none():
    model = Spelling(lambda s, x: torch.addmm(s.one, x, s.m))
    model.one = nn.Parameter(torch.ones(1))
    (record,) = run_passes(symbolic_trace(model), [Canonicalize()])
    assert record.outcome == Skip("addmm's first argument is not known to be a bias vector")


def test_a_weight_in_whose_memory_another_buffer_is_written_is_changed():
    class Overlapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 6), requires_grad=False)
            self.row = nn.Parameter(self.w[0], requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            self.row.mul_(2)
            return F.linear(x, self.w)

    gm = symbolic_trace(Overlapping())
    run_passes(gm, [Canonicalize()])
    (linear,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert read_weight(gm, linear.args[1]) == CHANGED


def test_linears_in_a_graph_within_the_graph_are_told_of():
    model, x = nn.Linear(6, 4), torch.randn(3, 6, requires_grad=True)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=False)

    gm = capture_by_dynamo(Checkpointed(), (x,))
    (record,) = run_passes(gm, [Canonicalize()])
    assert record.outcome == Skip("linears in the graph that tag_activation_checkpoint calls are left as they are")
    assert_close(call(gm, x), model(x))
