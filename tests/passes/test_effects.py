import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pifa_compiler.passes.effects import inside_transforms, is_plain, is_removable, may_write, remove_unread
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor

aten, pifa = torch.ops.aten, torch.ops.pifa

Build = Callable[[Graph, Node], Node]


def function(target: Callable[..., Any], *args: object, **kwargs: object) -> Build:
    return lambda graph, x: graph.call_function(target, (x, *args), kwargs)


def method(name: str, *args: object) -> Build:
    return lambda graph, x: graph.call_method(name, (x, *args))


WRITES = {
    "method": method("relu_"),
    "unknown-method": method("append", 1),
    "requires-grad": method("requires_grad_"),
    "function": function(torch.relu_),
    "inplace-keyword": function(F.relu, inplace=True),
    "inplace-positional": function(F.relu, True),
    "out": lambda graph, x: graph.call_function(torch.add, (x, 1), {"out": x}),
    "packet-out": lambda graph, x: graph.call_function(aten.add, (x, 1), {"out": x}),
    "operator": function(operator.iadd, 1),
    "setitem": function(operator.setitem, 0, 1.0),
    "schema": function(aten.relu_.default),
    "foreach": lambda graph, x: graph.call_function(torch._foreach_add_, ([x], 1)),
    "batch-norm": function(F.batch_norm, None, None, None, None, True),
    "batch-norm-schema": function(aten.native_batch_norm.default, None, None, None, None, True, 0.1, 1e-5),
    "embedding-max-norm": lambda graph, x: graph.call_function(F.embedding, (x, x), {"max_norm": 1.0}),
    "grad-mode": lambda graph, x: graph.call_function(torch._C._set_grad_enabled, (False,)),
    "transform": lambda graph, x: graph.call_function(torch._C._functorch._grad_increment_nesting),
    "anybody's": function(lambda x: x),
}
READS = {
    "method": method("relu"),
    "view": method("view", -1),
    "cast": method("float"),
    "function": function(torch.relu),
    "python-function": function(F.silu),
    "builtin": function(F.gelu),
    "linear": function(F.linear, torch.ones(2, 2)),
    "operator": function(operator.add, 1),
    "attribute": function(getattr, "T"),
    "schema": function(aten.relu.default),
    "ours": function(pifa.linear.default, None, None, None, None),
    "embedding": lambda graph, x: graph.call_function(F.embedding, (x, x)),
    "foreach": lambda graph, x: graph.call_function(torch._foreach_add, ([x], 1)),
}


def built(build: Build) -> Node:
    graph = Graph()
    return build(graph, graph.placeholder("x"))


@pytest.mark.parametrize("build", WRITES.values(), ids=WRITES)
def test_what_may_write_is_never_removed(build: Build):
    node = built(build)
    assert may_write(node)
    remove_unread(node.graph, [node])
    assert not node._erased


@pytest.mark.parametrize("build", READS.values(), ids=READS)
def test_what_only_reads_is_removed_when_nobody_reads_it(build: Build):
    node = built(build)
    assert not may_write(node)
    remove_unread(node.graph, [node])
    assert node._erased


@pytest.mark.parametrize(
    "build", [function(F.dropout), function(torch.dropout, 0.5, True), function(aten.bernoulli.default)], ids=range(3)
)
def test_a_random_number_that_is_drawn_stays_drawn(build: Build):
    node = built(build)
    assert not may_write(node)
    assert not is_removable(node)


def test_modules_are_known_by_their_class_and_have_no_hooks():
    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda module, args, output: output + 1)
    patched = nn.Linear(2, 2)
    patched.forward = lambda x: x + 1
    modules = [nn.Linear(2, 2), nn.ReLU(), nn.ReLU(inplace=True), nn.BatchNorm1d(2), hooked, patched]
    graph = Graph()
    x = graph.placeholder("x")
    calls = [graph.call_module(str(index), (x,)) for index in range(len(modules))]
    owning = GraphModule({str(index): module for index, module in enumerate(modules)}, graph)
    found = [node for node in owning.graph.nodes if node.op == "call_module"]
    assert [may_write(node) for node in found] == [False, False, True, True, True, True]
    assert len(calls) == len(found)


def test_nodes_between_the_ends_of_a_transform_are_inside_it():
    graph = Graph()
    x = graph.placeholder("x")
    before = graph.call_function(torch.relu, (x,))
    graph.call_function(torch._C._functorch._grad_increment_nesting)
    inside = graph.call_function(torch.relu, (before,))
    graph.call_function(torch._C._functorch._grad_decrement_nesting)
    after = graph.call_function(torch.relu, (inside,))
    found = inside_transforms(graph)
    assert inside in found
    assert not found & {x, before, after}


def test_a_plain_tensor_is_of_no_subclass_and_strided():
    values = [torch.ones(2), nn.Parameter(torch.ones(2)), TwoTensor(torch.ones(2), torch.ones(2))]
    assert [is_plain(value) for value in (*values, torch.ones(2, 2).to_sparse(), None)] == [True, True, *[False] * 3]
