import copy
import dataclasses
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from uuid import uuid4

import pytest
import torch
from graphs import low_rank
from pifa_compiler.passes import DEFAULT_PASSES, Record, Skip
from pifa_compiler.passes.weights import SUBCLASS
from tiny_models import tiny_llama
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.testing import assert_close
from torch.testing._internal.two_tensor import TwoTensor

from pifa_compiler import backend as backend_module
from pifa_compiler.backend import REQUIRES_GRAD, UPDATED, _Binding, pifa, refresh
from pifa_compiler.errors import ConfigError
from pifa_compiler.factors import factorize
from pifa_compiler.linear import PifaLinear

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums of some dozen terms of unit scale, in another order


class Block(nn.Module):
    """Residual block: a dense weight, a weight of deficient rank, a low-rank pair, a PIFA layer."""

    def __init__(self, rank: int = 6) -> None:
        super().__init__()
        self.dense = nn.Linear(32, 32)
        self.deficient = nn.Linear(32, 40)
        self.deficient.weight.data = low_rank(40, 32, rank)
        self.v, self.u = nn.Linear(40, 5, bias=False), nn.Linear(5, 24)
        self.pifa = PifaLinear.from_factors(factorize(torch.randn(32, 24) / 5, rank=12), torch.randn(32))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.deficient(torch.relu(self.dense(x))))
        return x + self.pifa(torch.relu(self.u(self.v(hidden))))


def compiled(model: nn.Module, **options: object) -> tuple[Callable[..., Tensor], list[Record]]:
    report: list[Record] = []
    return torch.compile(model, backend="pifa", options={"report": report, **options}), report


def rewrites(report: list[Record], rule: str) -> int:
    return sum(record.rule == rule and not isinstance(record.outcome, Skip) for record in report)


def reasons(report: list[Record]) -> set[str]:
    return {record.outcome.reason for record in report if isinstance(record.outcome, Skip)}


def test_the_backend_rewrites_low_rank_weights_without_loss():
    model, x = Block().requires_grad_(False), torch.randn(4, 32)
    fast, report = compiled(model)
    assert_close(fast(x), model(x), **CLOSE)
    assert (rewrites(report, "FactorizePair"), rewrites(report, "FactorizeLinear")) == (1, 1)
    assert "weight has full rank" in reasons(report)


def test_the_backend_runs_the_default_passes_in_their_order(monkeypatch: pytest.MonkeyPatch):
    ran, run = [], backend_module.run_passes
    monkeypatch.setattr(backend_module, "run_passes", lambda gm, rules: ran.extend(map(type, rules)) or run(gm, rules))
    compiled(Block().requires_grad_(False))[0](torch.randn(4, 32))
    assert tuple(ran) == DEFAULT_PASSES


def test_the_backend_is_found_by_name_without_an_import():
    code = (
        "import torch; m = torch.nn.Linear(4, 4).requires_grad_(False); x = torch.ones(2, 4);"
        "torch.testing.assert_close(torch.compile(m, backend='pifa')(x), m(x))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_pifa_model_is_lowered_and_never_stale():
    layer = PifaLinear.from_factors(factorize(torch.randn(24, 16), rank=5), torch.randn(24), requires_grad=False)
    model, x = nn.Sequential(layer, nn.Tanh()), torch.randn(3, 16)
    fast, report = compiled(model)
    assert_close(fast(x), model(x), **CLOSE)
    assert any(record.rule == "Lower" for record in report)
    layer.coeff.mul_(2)
    layer.w_pivot.data = torch.randn(5, 16)
    assert_close(fast(x), model(x), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models_err_no_more_than_eagerly(dtype: torch.dtype):
    model = Block().requires_grad_(False)
    x = torch.randn(4, 32)
    low = copy.deepcopy(model).to(dtype)
    low.load_state_dict(model.state_dict())  # restores the row order's dtype
    exact = copy.deepcopy(low).double()(x.to(dtype).double())
    eager_error = (low(x.to(dtype)) - exact).abs().max()
    got = torch.compile(low, backend="pifa")(x.to(dtype))
    assert got.dtype is dtype
    assert (got - exact).abs().max() <= 2 * eager_error + 2 * torch.finfo(dtype).eps * exact.abs().max()


def test_weights_that_require_grad_are_left_and_trained():
    model, x = Block(), torch.randn(4, 32)
    other = copy.deepcopy(model)
    fast, report = compiled(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other)]
    for _ in range(3):
        for run, optimizer in zip((fast, other), optimizers, strict=True):
            optimizer.zero_grad()
            run(x).square().mean().backward()
            optimizer.step()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(ours, theirs, **CLOSE)
    assert REQUIRES_GRAD.reason in reasons(report)
    assert (rewrites(report, "FactorizePair"), rewrites(report, "FactorizeLinear")) == (0, 0)
    assert "plain subgraph: gradients are needed" in reasons(report)


def test_gradients_flow_through_rewritten_frozen_weights():
    model = Block().requires_grad_(False)
    x, x_ref = (torch.randn(4, 32, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    fast, report = compiled(model)
    fast(x).sum().backward()
    model(x_ref).sum().backward()
    assert_close(x.grad, x_ref.grad, **CLOSE)
    assert rewrites(report, "FactorizeLinear") == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.weight.mul_(2),
        lambda layer: layer.weight.copy_(torch.randn(40, 32)),
        lambda layer: setattr(layer.weight, "data", torch.randn(40, 32)),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(40, 32), requires_grad=False)),
        lambda layer: setattr(layer, "weight", nn.Parameter(low_rank(40, 32, 3), requires_grad=False)),
        lambda layer: layer.load_state_dict({"weight": low_rank(40, 32, 8), "bias": torch.zeros(40)}),
    ],
    ids=["mul", "copy", "data", "swapped", "swapped-low-rank", "load-state-dict"],
)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_changed_weight_is_never_replaced_by_a_stale_copy(change: Callable[[nn.Linear], object], dynamic: bool):
    model = Block().requires_grad_(False)
    report: list[Record] = []
    fast = torch.compile(model, backend="pifa", dynamic=dynamic, options={"report": report})
    x = torch.randn(4, 32)
    assert_close(fast(x), model(x), **CLOSE)
    assert rewrites(report, "FactorizeLinear") == 1
    with torch.no_grad():
        change(model.deficient)
    for rows in (4, 4, 7):
        x = torch.randn(rows, 32)
        assert_close(fast(x), model(x), **CLOSE)


def test_a_changed_weight_falls_back_with_a_warning_and_a_record(caplog: pytest.LogCaptureFixture):
    model, x = Block().requires_grad_(False), torch.randn(4, 32)
    fast, report = compiled(model)
    fast(x)
    model.deficient.weight.mul_(2)
    report.clear()
    with caplog.at_level(logging.WARNING, "pifa_compiler.backend"):
        fast(x)
        fast(x)
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "deficient" in warning.getMessage()
    assert report[0].outcome == UPDATED
    assert (rewrites(report, "FactorizePair"), rewrites(report, "FactorizeLinear")) == (1, 0)  # the pair did not change


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_layers_compiled_one_by_one_get_their_own_weights(dynamic: bool):
    layers = nn.ModuleList(Block(rank) for rank in (4, 6, 6, 32)).requires_grad_(False)
    reference = copy.deepcopy(layers)
    report: list[Record] = []
    for layer in layers:
        layer.compile(backend="pifa", dynamic=dynamic, options={"report": report})
    for rows in (3, 5, 3):
        x = y = torch.randn(rows, 32)
        for layer, plain in zip(layers, reference, strict=True):
            x, y = layer(x), plain(y)
        assert_close(x, y, **CLOSE)
    graphs = sum(record.rule == "Canonicalize" for record in report) // 4
    assert graphs <= (1 if dynamic else 2)  # all layers share a captured graph, and its recompilation for new sizes
    assert rewrites(report, "FactorizeLinear") == 3 * graphs


def test_too_many_sets_of_weights_stay_as_they_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend_module, "MAX_VARIANTS", 2)
    layers = nn.ModuleList(Block(rank) for rank in (4, 5, 6)).requires_grad_(False)
    reference = copy.deepcopy(layers)
    report: list[Record] = []
    x = torch.randn(3, 32)
    for layer, plain in zip(layers, reference, strict=True):
        layer.compile(backend="pifa", options={"report": report})
        assert_close(layer(x), plain(x), **CLOSE)
    assert any("more than 2 sets of weights" in reason for reason in reasons(report))


def test_graph_breaks_and_new_sizes_are_compiled():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Block(), Block()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    model = Broken().requires_grad_(False)
    fast, report = compiled(model)
    for rows in (2, 5, 9, 1):
        x = torch.randn(rows, 32)
        assert_close(fast(x), model(x), **CLOSE)
    assert rewrites(report, "FactorizeLinear") >= 2


def test_a_weight_that_the_model_changes_is_left():
    class Decaying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", low_rank(32, 32, 4))

        def forward(self, x: Tensor) -> Tensor:
            self.weight.mul_(0.5)
            return nn.functional.linear(x, self.weight)

    model = Decaying()
    plain, x = copy.deepcopy(model), torch.randn(3, 32)
    fast, report = compiled(model)
    for _ in range(3):
        assert_close(fast(x), plain(x), **CLOSE)
    assert "weight may be changed in the graph" in reasons(report)


def test_weights_of_shape_in_out_are_rewritten():
    class Conv1D(nn.Module):  # as in transformers' GPT-2
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(low_rank(32, 48, 5), requires_grad=False)
            self.bias = nn.Parameter(torch.randn(48), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
            return y.view(*x.shape[:-1], 48)

    model, x = Conv1D(), torch.randn(2, 3, 32)
    fast, report = compiled(model)
    assert_close(fast(x), model(x), **CLOSE)
    assert rewrites(report, "FactorizeLinear") == 1


def test_inference_tensors_are_left():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(32, 32)).requires_grad_(False)
        model[0].weight = nn.Parameter(low_rank(32, 32, 4), requires_grad=False)
        fast, report = compiled(model)
        x = torch.randn(3, 32)
        assert_close(fast(x), model(x), **CLOSE)
    assert backend_module.UNVERSIONED.reason in reasons(report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strcit": True}, "option 'strcit' is unknown"),
        ({"strict": 1}, "option 'strict' must be a bool"),
        ({"report": ()}, "option 'report' must be a list"),
    ],
    ids=["unknown", "strict", "report"],
)
def test_options_are_validated(options: dict[str, object], message: str):
    gm = torch.fx.symbolic_trace(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match=message):
        pifa(gm, [torch.ones(1, 4)], options=options)
    with pytest.raises(BackendCompilerFailed, match=message):
        torch.compile(nn.Linear(4, 4), backend="pifa", options=options)(torch.ones(1, 4))


def test_an_unknown_mode_is_refused():
    gm = torch.fx.symbolic_trace(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="mode 'fastest' is unknown"):
        pifa(gm, [torch.ones(1, 4)], mode="fastest")


def test_other_options_and_the_mode_go_to_inductor(monkeypatch: pytest.MonkeyPatch):
    from torch._inductor import compile_fx

    seen: list[dict[str, object]] = []
    original = compile_fx.compile_fx

    def spy(*args, **kwargs):
        seen.extend([dict(kwargs["config_patches"])] if "config_patches" in kwargs else [])  # it calls itself
        return original(*args, **kwargs)

    monkeypatch.setattr(compile_fx, "compile_fx", spy)
    model, x = nn.Linear(4, 4), torch.ones(1, 4)
    torch.compile(model, backend="pifa", options={"cpp.threads": 1, "epilogue-fusion": False})(x)
    torch._dynamo.reset()
    torch.compile(model, backend="pifa", mode="reduce-overhead")(x)
    assert seen == [{"cpp.threads": 1, "epilogue_fusion": False}, {"triton.cudagraphs": True}]


def test_inductor_is_told_which_inputs_never_move(monkeypatch: pytest.MonkeyPatch):
    """Without that, CUDA graphs copy every weight at every call."""
    from torch._inductor import compile_fx

    moving: list[int] = []
    original, inner = compile_fx.compile_fx, compile_fx.compile_fx_inner

    def count(gm, example_inputs, **kwargs):
        moving.append(len(example_inputs) - len(kwargs["static_input_idxs"]))
        return inner(gm, example_inputs, **kwargs)

    monkeypatch.setattr(compile_fx, "compile_fx", lambda *a, **kw: original(*a, **{"inner_compile": count, **kw}))
    model, x = Block().requires_grad_(False), torch.randn(4, 32)
    uncached = {"fx_graph_cache": False, "fx_graph_remote_cache": False}  # a cached graph is not handed to `count`
    with torch._functorch.config.patch(enable_autograd_cache=False):
        assert_close(torch.compile(model, backend="pifa", options=uncached)(x), model(x), **CLOSE)
    assert moving == [1]  # x alone


def test_compiled_code_is_not_taken_from_a_release_with_other_kernels(monkeypatch: pytest.MonkeyPatch):
    from torch._dynamo.utils import counters

    model, x = Block().requires_grad_(False), torch.randn(4, 32)
    taken = []
    first, second = uuid4().hex, uuid4().hex  # the caches outlive this run
    for digest in (first, second, second):
        torch._dynamo.reset()
        monkeypatch.setattr(backend_module, "_digest_of_kernels", lambda digest=digest: digest)
        before = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
        torch.compile(model, backend="pifa")(x)
        taken.append(
            counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"] > before
        )
    assert taken == [False, False, True]


def test_rank_check_can_be_switched_off():
    model, x = Block().requires_grad_(False), torch.randn(4, 32)
    fast, report = compiled(model, rank_check=False)
    assert_close(fast(x), model(x), **CLOSE)
    assert (rewrites(report, "FactorizePair"), rewrites(report, "FactorizeLinear")) == (1, 0)


def test_strict_raises_on_a_weight_left_for_another_reason_than_full_rank():
    with pytest.raises(BackendCompilerFailed, match=r"FactorizePair left .*weight requires grad"):
        compiled(Block(), strict=True)[0](torch.randn(4, 32))
    torch._dynamo.reset()
    compiled(Block().requires_grad_(False), strict=True)[0](torch.randn(4, 32))


def test_a_graph_can_be_compiled_without_dynamo():
    model, x = nn.Sequential(nn.Linear(32, 32)).requires_grad_(False), torch.randn(3, 32)
    model[0].weight.copy_(low_rank(32, 32, 4))
    gm = torch.export.export(model, (x,), strict=False).module(check_guards=False)
    report: list[Record] = []
    run = pifa(gm, [x], options={"report": report})
    (got,) = run(x) if isinstance(run(x), (tuple, list)) else (run(x),)
    assert_close(got, model(x), **CLOSE)
    assert rewrites(report, "FactorizeLinear") == 1
    model[0].weight.mul_(2)
    (got,) = run(x) if isinstance(run(x), (tuple, list)) else (run(x),)
    assert_close(got, model(x), **CLOSE)


def test_generation_gives_the_tokens_of_the_eager_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.copy_(low_rank(48, 32, 6))
        layer.mlp.down_proj = PifaLinear.from_factors(factorize(torch.randn(32, 48) / 7, rank=8))
    model.requires_grad_(False)
    prompt = torch.randint(0, 64, (2, 5))
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(prompt, **settings)
    report: list[Record] = []
    model.compile(backend="pifa", options={"report": report})
    assert torch.equal(model.generate(prompt, **settings), expected)
    assert rewrites(report, "FactorizeLinear") >= 1
    assert any(record.rule == "Lower" for record in report)


class OwnLinear(nn.Linear):
    """Dynamo compiles modules outside of torch only."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def low_rank_layers(count: int) -> list[nn.Linear]:
    """Layers [24, 32] of rank 4, frozen, that share their code."""
    layers = [OwnLinear(32, 24).requires_grad_(False) for _ in range(count)]
    for layer in layers:
        layer.weight.data = low_rank(24, 32, 4)
    return layers


def test_a_changed_weight_takes_no_other_layer_out_of_pifa_form():
    layers, x = low_rank_layers(3), torch.randn(4, 32)
    report: list[Record] = []
    for layer in layers:
        layer.compile(backend="pifa", options={"report": report})
        layer(x)
    layers[1].weight.mul_(2)
    before = rewrites(report, "FactorizeLinear")
    for layer in (*layers, *layers):
        assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), **CLOSE)
    updated = [record for record in report if record.outcome == UPDATED and record.rule == "pifa"]
    assert (before, rewrites(report, "FactorizeLinear"), len(updated)) == (3, 3, 1)


def test_layers_past_the_limit_take_no_other_out_of_pifa_form(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend_module, "MAX_VARIANTS", 2)
    example = low_rank_layers(1)[0]
    graphs: list[tuple[torch.fx.GraphModule, list[object]]] = []
    capture = torch.compile(example, backend=lambda gm, inputs: graphs.append((gm, list(inputs))) or gm, fullgraph=True)
    x = torch.randn(4, 32)
    capture(x)
    ((gm, inputs),) = graphs
    compiled_graph = pifa(gm, inputs)
    layers = [example, *low_rank_layers(3)]
    takes = {id(example.weight): "weight", id(example.bias): "bias", id(x): "x"}

    def run(layer: nn.Linear) -> Tensor:
        values = {"weight": layer.weight, "bias": layer.bias, "x": x}
        (result,) = compiled_graph(*(values[takes[id(value)]] for value in inputs))
        return result

    for layer in (*layers, *layers):
        assert_close(run(layer), layer(x), **CLOSE)
    run(layers[0])
    assert compiled_graph._current.bindings[0].state is not None  # compiled for its low rank, not the way of all others


def test_threads_do_not_get_each_others_constants():
    layers = [*low_rank_layers(4)]
    x = torch.randn(4, 32)
    wanted = [layer(x) for layer in layers]
    for layer in layers:
        layer.compile(backend="pifa")
        layer(x)
    wrong: list[int] = []

    def call_often(index: int) -> None:
        for _ in range(200):
            if not torch.allclose(layers[index](x), wanted[index], **CLOSE):
                wrong.append(index)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=call_often, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_in_pifa_form_run_under_autocast(dtype: torch.dtype):
    layer = PifaLinear.from_factors(factorize(torch.randn(24, 16), rank=5), torch.randn(24), requires_grad=False)
    layer, x = layer.to(dtype), torch.randn(3, 16)
    fast, report = compiled(layer)
    with torch.autocast("cpu", torch.bfloat16):
        got, eager = fast(x), layer(x)
    exact = copy.deepcopy(layer).double()(x.double())
    assert got.dtype is eager.dtype is torch.bfloat16
    assert (got - exact).abs().max() <= 2 * (eager - exact).abs().max() + 2**-8 * exact.abs().max()
    assert any("as under autocast" in reason for reason in reasons(report))


def test_a_number_of_tokens_that_depends_on_values_is_lowered():
    layer = PifaLinear.from_factors(factorize(torch.randn(24, 16), rank=5), torch.randn(24), requires_grad=False)

    def routed(x: Tensor, mine: Tensor) -> Tensor:
        return layer(x[torch.nonzero(mine).squeeze(1)])

    x, mine = torch.randn(6, 16), torch.tensor([1, 0, 1, 1, 0, 0])
    report: list[Record] = []
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        fast = torch.compile(routed, backend="pifa", fullgraph=True, options={"report": report})
        assert_close(fast(x, mine), routed(x, mine), **CLOSE)
    assert rewrites(report, "Lower") == 1


def test_tensor_subclasses_are_left_with_a_record():
    layer = nn.Linear(32, 24, bias=False)
    layer.weight = nn.Parameter(TwoTensor(low_rank(24, 32, 4), low_rank(24, 32, 4)), requires_grad=False)
    fast, report = compiled(layer)
    x = torch.randn(4, 32)
    got, wanted = fast(x), layer(x)
    assert_close(got.a, wanted.a, **CLOSE)
    assert_close(got.b, wanted.b, **CLOSE)
    assert SUBCLASS.reason in reasons(report)


# torch's own, of what it calls for these transforms (torch 2.13)
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch._prims_common.check. is deprecated:FutureWarning")
@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd, torch.func.hessian, torch.vmap])
@pytest.mark.parametrize("form", ["weight", "layer"])
def test_transforms_of_torch_func(transform: Callable[..., Callable[..., Tensor]], form: str):
    layer = PifaLinear.from_factors(factorize(torch.randn(24, 16), rank=5), torch.randn(24), requires_grad=False)
    if form == "layer" and transform is torch.func.hessian:
        pytest.skip("needs an Inductor that compiles hessian of a gather: torch 2.13's stops at an assertion on CPUs")
    if form == "weight":
        layer, factors = nn.Linear(16, 24).requires_grad_(False), layer
        layer.weight.data = factors.weight.detach().clone()

    def program(x: Tensor) -> Tensor:
        return transform(lambda row: torch.tanh(layer(row)))(x)

    x = torch.randn(16) if transform is not torch.vmap else torch.randn(3, 16)
    fast, report = compiled(program)
    assert_close(fast(x), program(x), **CLOSE)
    assert "it runs within a transform of torch.func" in reasons(report)


def test_a_graph_in_which_nothing_is_rewritten_is_compiled_as_it_came(monkeypatch: pytest.MonkeyPatch):
    from torch._inductor import compile_fx

    seen: list[set[object]] = []
    usual = compile_fx.compile_fx

    def watch(gm: torch.fx.GraphModule, *args: object, **kwargs: object) -> object:
        seen.append({node.target for node in gm.graph.nodes if node.op == "call_function"})
        return usual(gm, *args, **kwargs)

    monkeypatch.setattr(compile_fx, "compile_fx", watch)
    weight = nn.Parameter(torch.randn(16, 24), requires_grad=False)
    fast, _ = compiled(lambda x: torch.mm(x, weight))
    x = torch.randn(3, 16)
    assert_close(fast(x), x @ weight)
    assert seen == [{torch.mm}]


def exported(seed: int) -> tuple[nn.Module, torch.fx.GraphModule, Tensor]:
    """A frozen model of low rank, its graph, and what to call both with."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(32, 24).requires_grad_(False)
    layer.weight.copy_(torch.randn(24, 4, generator=generator) @ torch.randn(4, 32, generator=generator) / 11)
    x = torch.randn(4, 32, generator=generator)
    return layer, torch.export.export(layer, (x,), strict=False).module(check_guards=False), x


def only(result: Tensor | tuple[Tensor]) -> Tensor:
    """The one result of a graph."""
    return result if isinstance(result, Tensor) else result[0]


def run_threads(work: Callable[[int], None], count: int) -> list[Exception]:
    """What `work(0)` to `work(count - 1)` raised, each in a thread of its own."""
    raised: list[Exception] = []

    def watched(index: int) -> None:
        try:
            work(index)
        except Exception as error:  # noqa: BLE001  the test is told
            raised.append(error)

    threads = [threading.Thread(target=watched, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_threads_that_compile_at_once_wait_for_each_other():
    """Inductor by itself stops at an assertion there."""
    programs = [exported(seed) for seed in range(3)]
    shared_model, graph, x = exported(3)
    shared = pifa(graph, [x])
    shared_model.weight.mul_(2)

    def compile_and_call(index: int) -> None:
        model, gm, x = programs[index]
        assert_close(only(pifa(gm, [x], options={"fx_graph_cache": False})(x)), model(x), **CLOSE)

    def call_shared(index: int) -> None:
        assert_close(only(shared(x)), shared_model(x), **CLOSE)

    assert run_threads(compile_and_call, 3) == []
    assert run_threads(call_shared, 3) == []


def test_swapped_tensors_are_seen():
    layers, x = low_rank_layers(2), torch.randn(4, 32)
    fast, report = compiled(layers[0])
    assert_close(fast(x), layers[0](x), **CLOSE)
    for _ in range(2):
        torch.utils.swap_tensors(layers[0].weight, layers[1].weight)
        assert_close(fast(x), nn.functional.linear(x, layers[0].weight, layers[0].bias), **CLOSE)
    assert rewrites(report, "FactorizeLinear") == 2  # swapped back, the first code fits again


def test_a_weight_at_the_address_of_one_that_is_gone_is_another():
    weight = torch.randn(24, 32)
    binding = _Binding.of(weight, 0, with_state=True)
    assert binding.fits([weight])
    del weight
    other = torch.randn(24, 32)  # which often gets both addresses; here it has them
    binding = dataclasses.replace(binding, address=other._cdata, state=backend_module._state(other))
    assert not binding.fits([other])


def write_through_data(tensor: Tensor) -> None:
    tensor.data.mul_(2)


def write_through_numpy(tensor: Tensor) -> None:
    tensor.detach().numpy()[:] *= 2


def write_through_dlpack(tensor: Tensor) -> None:
    torch.from_dlpack(tensor.detach()).data.mul_(2)


def write_through_storage(tensor: Tensor) -> None:
    doubled = (tensor * 2).untyped_storage()
    tensor.untyped_storage().copy_(doubled)


@pytest.mark.parametrize(
    "write", [write_through_data, write_through_numpy, write_through_dlpack, write_through_storage]
)
def test_refresh_sees_writes_that_leave_no_trace(write: Callable[[Tensor], None]):
    model, x = Block().requires_grad_(False), torch.randn(4, 32)
    fast, report = compiled(model)
    fast(x)
    write(model.deficient.weight)
    refresh(model)
    assert_close(fast(x), model(x), **CLOSE)
    assert (rewrites(report, "FactorizePair"), rewrites(report, "FactorizeLinear")) == (2, 2)  # all anew, and again


def test_refresh_shows_compiled_code_the_pivots():
    layer = PifaLinear.from_factors(factorize(torch.randn(24, 16), rank=5), torch.randn(24), requires_grad=False)
    x = torch.randn(3, 16)
    fast, _ = compiled(layer)
    for pivots in (fast(x), torch.arange(5), torch.arange(5) * 2)[1:]:
        layer.pivots.copy_(pivots)
        refresh(layer)
        assert_close(fast(x), layer(x), **CLOSE)
        assert_close(fast(x), nn.functional.linear(x, layer.weight, layer.bias), **CLOSE)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("reduce-overhead", {"triton.cudagraphs": True}),
        ("max-autotune", {"triton.cudagraphs": True, "max_autotune": True, "coordinate_descent_tuning": True}),
    ],
)
def test_modes_hand_inductor_what_torch_compile_does(
    mode: str, options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
):
    seen: list[dict[str, object]] = []

    def compile_fx(gm, example_inputs, config_patches):
        seen.append(config_patches)
        return gm

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    model, x = Block().requires_grad_(False), torch.randn(4, 32)
    assert_close(torch.compile(model, backend="pifa", mode=mode)(x), model(x), **CLOSE)
    assert seen == [options]


@pytest.mark.slow
def test_a_model_generates_with_a_static_cache_under_cuda_graphs_as_it_does_eagerly():
    """On CPUs Inductor leaves the graphs out; all else is the same."""
    model = tiny_llama(num_hidden_layers=1)
    attention = model.model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        factors = factorize(attention.get_submodule(name).weight.data, rank=8)
        attention.set_submodule(name, PifaLinear.from_factors(factors))
    model.requires_grad_(False)
    prompt = torch.arange(2, 7)[None]
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static", "pad_token_id": 1}
    wanted = model.generate(prompt, **options, disable_compile=True)
    model.forward = torch.compile(model.forward, backend="pifa", mode="reduce-overhead")
    assert torch.equal(model.generate(prompt, **options, disable_compile=True), wanted)
