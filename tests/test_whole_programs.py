"""Whole programs as people write them, compiled by the backend, against what they do by themselves.

In each of them the low-rank part is rewritten where it may be; else the comparison would say nothing. In the quick
suite AOTAutograd and its decompositions stand in for Inductor, in the slow one Inductor itself generates code.
"""

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import low_rank
from pifa_compiler.passes import Record, Skip
from programs import Program, difference, observe, quiet, rewrites, without_code_generation
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.nn import functional as F
from torch.testing import assert_close
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from pifa_compiler.factors import factorize
from pifa_compiler.linear import PifaLinear

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums of some dozen terms of unit scale, in another order

Compile = Callable[..., Callable[..., Any]]


@pytest.fixture(params=["aot", pytest.param("inductor", marks=pytest.mark.slow)])
def compile(request: pytest.FixtureRequest) -> Iterator[Compile]:
    """`torch.compile` by the backend; `report` receives the passes' records."""

    def compile_by_pifa(function: Callable[..., Any], report: list[Record], **options: Any) -> Callable[..., Any]:
        return torch.compile(function, backend="pifa", options={"report": report}, **options)

    with quiet(), without_code_generation() if request.param == "aot" else nullcontext():
        yield compile_by_pifa


class Network(nn.Module):
    """A PIFA layer, a weight of deficient rank, a low-rank pair and a dense head, with functions between them."""

    def __init__(self, trainable: bool = False) -> None:
        super().__init__()
        self.pifa = PifaLinear.from_factors(factorize(torch.randn(16, 12) / 4, rank=6), torch.randn(16), trainable)
        self.deficient = nn.Linear(16, 16)
        self.deficient.weight.data = low_rank(16, 16, 4)
        self.v, self.u = nn.Linear(16, 4, bias=False), nn.Linear(4, 16)
        self.head = nn.Linear(16, 8)
        if not trainable:
            self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.pifa(x))
        x = self.deficient(x) + x
        return self.head(F.gelu(self.u(self.v(F.relu(x)))))


def same(compile: Compile, run: Callable[..., Any], *args: Any, rewritten: int = 1, **options: Any) -> list[Record]:
    """Asserts that the compiled program does what the program does, twice, and how many weights were rewritten."""
    report: list[Record] = []
    program = Program("", run, args)
    want = observe(program, run)
    compiled = compile(run, report, **options)
    for _ in range(2):
        assert difference(program, observe(program, compiled), want, **CLOSE) is None
    found = rewrites(report, "FactorizeLinear", "FactorizePair")
    assert found >= rewritten, report
    return report


# --- transforms of torch.func ------------------------------------------------------------------------------------

TRANSFORMS: dict[str, Callable[[Any], Callable[[Tensor], Any]]] = {
    "vmap": lambda f: vmap(f),
    "vmap over features": lambda f: lambda x: vmap(f, in_dims=1, out_dims=1)(x.T),
    "grad": lambda f: grad(lambda x: f(x).square().sum()),
    "vjp": lambda f: lambda x: vjp(f, x)[1](torch.ones(*x.shape[:-1], 8)),
    "jvp": lambda f: lambda x: jvp(f, (x,), (torch.cos(x),)),
    "jacrev": lambda f: jacrev(f),
    "jacfwd": lambda f: jacfwd(f),
    "hessian": lambda f: lambda x: hessian(lambda y: f(y).square().sum())(x[0]),
    "vmap of grad": lambda f: vmap(grad(lambda x: f(x).square().sum())),
    "vmap of vmap": lambda f: lambda x: vmap(vmap(f))(torch.stack((x, 2 * x))),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_functions(compile: Compile, transform: str, request: pytest.FixtureRequest):
    if transform == "hessian" and request.node.callspec.params["compile"] == "inductor":
        pytest.skip("the code that Inductor makes of it crashes or is wrong, without this backend as well (torch 2.13)")
    model = Network()
    same(compile, TRANSFORMS[transform](model), torch.randn(3, 12), rewritten=0)


def test_ensembles_of_stacked_modules(compile: Compile):
    models = [Network() for _ in range(3)]
    base = copy.deepcopy(models[0]).to("meta")
    state = stack_module_state(models)

    def run(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
        return vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)

    same(compile, run, *state, torch.randn(3, 12), rewritten=0)


def test_a_transform_beside_an_ordinary_call(compile: Compile):
    model = Network()
    same(compile, lambda x: (model(x), vmap(model)(x), grad(lambda y: model(y).sum())(x)), torch.randn(3, 12))


# --- training ----------------------------------------------------------------------------------------------------

OPTIMIZERS = [
    *("Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "LBFGS", "Muon", "NAdam", "RAdam"),
    *("RMSprop", "Rprop", "SGD"),
]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_compiled_steps_of_optimizers(compile: Compile, name: str):
    torch.manual_seed(1)
    weights = [low_rank(6, 5, 2), torch.randn(6, 6)]
    gradients = [torch.randn(3, *w.shape) for w in weights]

    def train(wrap: Callable[[Any], Any]) -> list[Tensor]:
        parameters = [nn.Parameter(w.clone()) for w in weights]
        optimizer = getattr(torch.optim, name)(parameters, lr=0.1)

        def step() -> None:
            optimizer.step(lambda: sum((p * g).sum() for p, g in zip(parameters, now, strict=True)))

        run = wrap(step) if name == "LBFGS" else wrap(optimizer.step)
        for i in range(3):
            now = [g[i] for g in gradients]
            for p, g in zip(parameters, now, strict=True):
                p.grad = g.clone()
            run()
        return parameters

    report: list[Record] = []
    # Muon orthogonalises in bfloat16: three steps of 0.1, each good to a few of its eps.
    close = {"rtol": 0, "atol": 3 * 0.1 * 8 * torch.finfo(torch.bfloat16).eps} if name == "Muon" else CLOSE
    assert_close(train(lambda f: compile(f, report)), train(lambda f: f), **close)


def test_a_compiled_training_step_with_clipped_gradients(compile: Compile):
    x = torch.randn(5, 12)

    def train(wrap: Callable[[Any], Any]) -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(1)
        model = Network(trainable=True)
        model.deficient.requires_grad_(False)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        clip = wrap(lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1))
        forward, norms = wrap(model), []
        for _ in range(3):
            optimizer.zero_grad()
            forward(x).square().mean().backward()
            norms.append(clip())
            optimizer.step()
        return list(model.parameters()), norms

    report: list[Record] = []
    assert_close(train(lambda f: compile(f, report)), train(lambda f: f), **CLOSE)
    assert rewrites(report, "FactorizeLinear") >= 1


def test_checkpointed_blocks(compile: Compile):
    first, model = nn.Linear(12, 12).requires_grad_(False), Network()
    first.weight.copy_(low_rank(12, 12, 3))
    x, report = torch.randn(3, 12), []

    def run(x: Tensor) -> Tensor:
        return checkpoint(model, first(x), use_reentrant=False)

    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    compile(run, report)(ours).square().sum().backward()
    run(theirs).square().sum().backward()
    assert_close(ours.grad, theirs.grad, **CLOSE)
    assert rewrites(report, "FactorizeLinear") == 1  # what is inside of the block is left alone


def test_batch_norm_in_training_whose_result_nobody_reads(compile: Compile):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.norm = Network(), nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.network(x)
            self.norm(y)
            F.batch_norm(y, self.norm.running_mean, self.norm.running_var, training=True)
            return y

    same(compile, lambda model, x: model(x), Model(), torch.randn(4, 12))


# --- mutation and aliasing ---------------------------------------------------------------------------------------


def relu_as_a_statement(model: nn.Module, x: Tensor) -> Tensor:
    torch.relu_(x)
    return model(x) * 2


def functional_relu_in_place(model: nn.Module, x: Tensor) -> Tensor:
    F.relu(x, inplace=True)
    return model(x)


def added_to_the_input(model: nn.Module, x: Tensor) -> Tensor:
    x += 1
    return model(x)


def module_relu_in_place(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    nn.ReLU(inplace=True)(y)
    return y


def written_view_of_the_input(model: nn.Module, x: Tensor) -> Tensor:
    x[1:].mul_(3)
    x.view(-1)[0] = 5.0
    return model(x)


def written_view_of_the_result(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    y = model(x)
    y[:, ::2].zero_()
    y.t()[1] = x.sum()
    return y, y[0]


def written_after_it_was_read(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    y = model(x)
    x.zero_()
    return y, model(x)


def foreach_in_place(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    torch._foreach_add_([x, y], 1.0)
    torch._foreach_mul_([x], [y.sum()])
    return y


def out_arguments(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    buffer = torch.empty(x.shape[0], 8)
    torch.add(y, 1, out=buffer)
    torch.mul(x, 2, out=x)
    return buffer


def product_into_a_buffer(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    buffer, other = torch.zeros(x.shape[0], 16), torch.zeros(x.shape[0], 16)
    hidden = model.pifa(x)
    torch.mm(hidden, model.deficient.weight, out=buffer)
    torch.addmm(model.deficient.bias, hidden, model.deficient.weight.t(), out=other)
    return buffer, other + model.deficient(hidden).sum() + model(x).sum()


def copied_into_the_input(model: nn.Module, x: Tensor) -> Tensor:
    x[:, :8].copy_(model(x))
    x.index_add_(0, torch.tensor([0]), torch.ones(1, 12))
    return x


def alias_as_result(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x, x.view(-1), model(x)


MUTATIONS = [
    *(relu_as_a_statement, functional_relu_in_place, added_to_the_input, module_relu_in_place),
    *(written_view_of_the_input, written_view_of_the_result, written_after_it_was_read, foreach_in_place),
    *(out_arguments, product_into_a_buffer, copied_into_the_input, alias_as_result),
]


@pytest.mark.parametrize("run", MUTATIONS, ids=[run.__name__ for run in MUTATIONS])
def test_writes_are_kept(compile: Compile, run: Callable[..., Any]):
    same(compile, run, Network(), torch.randn(4, 12))


def test_a_buffer_that_is_a_view_of_a_low_rank_weight_and_is_written(compile: Compile):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = Network()
            self.register_buffer("alias", self.network.deficient.weight.data)

        def forward(self, x: Tensor) -> Tensor:
            self.alias[3].mul_(2)
            return self.network(x)

    models, x, report = [], torch.randn(4, 12), []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(Model())
    compiled = compile(models[0], report)
    for _ in range(3):
        assert_close(compiled(x), models[1](x), **CLOSE)
    assert_close(models[0].state_dict(), models[1].state_dict(), **CLOSE)
    assert rewrites(report, "FactorizePair") == 1  # the weights that nobody writes are rewritten all the same
    assert rewrites(report, "FactorizeLinear") == 0


def test_one_changed_weight_costs_its_own_layer_alone_pifa(compile: Compile):
    layers = [nn.Linear(16, 16).requires_grad_(False) for _ in range(3)]
    for rank, layer in enumerate(layers):
        layer.weight.copy_(low_rank(16, 16, 3 + rank))
    report: list[Record] = []
    compiled = [compile(layer, report) for layer in layers]
    x = torch.randn(4, 16)
    for layer, run in zip(layers, compiled, strict=True):
        assert_close(run(x), F.linear(x, layer.weight, layer.bias), **CLOSE)
    assert rewrites(report, "FactorizeLinear") == 3
    layers[1].weight.mul_(2)
    report.clear()
    for layer, run in zip(layers * 2, compiled * 2, strict=True):
        with torch.profiler.profile() as profile:
            got = run(x)
        assert_close(got, F.linear(x, layer.weight, layer.bias), **CLOSE)
        in_pifa_form = any("pifa::" in event.key for event in profile.key_averages())
        assert in_pifa_form == (layer is not layers[1])
    assert rewrites(report, "FactorizeLinear") == 0  # none of the other two was compiled again
    assert len([record for record in report if record.rule == "pifa"]) == 1  # the one warning


def test_two_threads_in_one_compiled_function(compile: Compile):
    layers = [nn.Linear(16, 16).requires_grad_(False) for _ in range(2)]
    for layer in layers:
        layer.weight.copy_(low_rank(16, 16, 4))
    report: list[Record] = []
    run = compile(lambda layer, x: F.linear(x, layer.weight, layer.bias), report)
    x = torch.randn(4, 16)
    wants = [F.linear(x, layer.weight, layer.bias) for layer in layers]
    for layer, want in zip(layers, wants, strict=True):
        assert_close(run(layer, x), want, **CLOSE)
    assert rewrites(report, "FactorizeLinear") >= 2
    wrong: list[float] = []

    def alternate(first: int) -> None:
        for i in range(300):
            which = (first + i) % 2
            error = (run(layers[which], x) - wants[which]).abs().max().item()
            if error > 1e-3:
                wrong.append(error)

    threads = [threading.Thread(target=alternate, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- precision, sizes, subclasses --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16 layers", "float32 layers"])
def test_autocast(compile: Compile, dtype: torch.dtype):
    model = Network()
    model.load_state_dict({**model.state_dict()})
    model, x = model.to(dtype), torch.randn(4, 12)
    exact = copy.deepcopy(model).double()
    exact_result = exact(x.double())
    report: list[Record] = []
    compiled = compile(model, report)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want, got = model(x), compiled(x)
    assert got.dtype is want.dtype is torch.bfloat16
    assert rewrites(report, "FactorizeLinear", "FactorizePair") >= 1
    eager_error = (want - exact_result).abs().max()
    eps = torch.finfo(torch.bfloat16).eps
    assert (got - exact_result).abs().max() <= 2 * eager_error + 4 * eps * exact_result.abs().max()


def test_autocast_inside_the_program(compile: Compile):
    model = Network()

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
        return y.float() + model(x)

    report: list[Record] = []
    x = torch.randn(4, 12)
    want = run(x)
    assert_close(compile(run, report)(x), want, rtol=0, atol=0.05 * want.abs().max().item())  # some ulps of bfloat16
    assert rewrites(report, "FactorizeLinear", "FactorizePair") >= 1


def test_sizes_marked_dynamic(compile: Compile):
    model, report = Network(), []
    compiled = compile(model, report)
    for tokens in (5, 3, 1, 9):
        x = torch.randn(tokens, 12)
        if tokens == 5:
            torch._dynamo.mark_dynamic(x, 0)
        assert_close(compiled(x), model(x), **CLOSE)
    assert rewrites(report, "FactorizeLinear") >= 1


def test_sizes_that_depend_on_values(compile: Compile):
    model = Network()

    def run(x: Tensor, mask: Tensor) -> Tensor:
        chosen = x[torch.nonzero(mask).squeeze(1)]
        return torch.zeros(x.shape[0], 8).index_copy(0, torch.nonzero(mask).squeeze(1), model(chosen))

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        report = same(compile, run, torch.randn(5, 12), torch.tensor([1, 0, 1, 1, 0]).bool(), fullgraph=True)
    assert {record.rule for record in report} >= {"Lower"}


def test_tensor_subclasses_as_weights_are_left_alone(compile: Compile):
    first, model = nn.Linear(12, 12).requires_grad_(False), Network()
    first.weight.copy_(low_rank(12, 12, 3))
    weight = model.deficient.weight.data
    model.deficient.weight = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
    report: list[Record] = []
    x = torch.randn(4, 12)
    got, want = compile(lambda x: model(first(x)), report)(x), model(first(x))
    assert_close(got.a, want.a, **CLOSE)
    assert_close(got.b, want.b, **CLOSE)
    assert rewrites(report, "FactorizeLinear") == 1
    assert any(isinstance(r.outcome, Skip) and "subclass" in r.outcome.reason for r in report)


def test_tensor_subclasses_as_inputs(compile: Compile):
    model, report = Network(), []
    x = torch.randn(4, 12)
    got = compile(model, report)(TwoTensor(x, 2 * x))
    assert_close(got.a, model(x), **CLOSE)
    assert_close(got.b, model(2 * x), **CLOSE)


# --- processes, copies and packages ------------------------------------------------------------------------------


def test_distributed_data_parallel(compile: Compile, tmp_path: Path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        results = []
        report: list[Record] = []
        for wrap in (lambda f: f, lambda f: compile(f, report)):
            torch.manual_seed(1)
            model = Network()
            model.head.requires_grad_(True)
            model.head.weight.data.mul_(1.0)
            parallel = wrap(nn.parallel.DistributedDataParallel(model))
            x = torch.randn(4, 12)
            y = parallel(x)
            y.square().mean().backward()
            results.append((y.detach(), model.head.weight.grad, model.head.bias.grad))
        assert_close(results[1], results[0], **CLOSE)
        assert rewrites(report, "FactorizeLinear", "FactorizePair") >= 1
    finally:
        dist.destroy_process_group()


def test_copies_and_pickles_of_a_compiled_model(compile: Compile):
    model, x, report = Network(), torch.randn(4, 12), []
    compiled = compile(model, report)
    want = model(x)
    assert_close(compiled(x), want, **CLOSE)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(compiled)):  # noqa: S301
        again = compile(again, report)
        assert_close(again(x), want, **CLOSE)
    other = copy.deepcopy(model)
    other.deficient.weight.mul_(2)
    assert_close(compile(other, report)(x), other(x), **CLOSE)
    assert_close(compiled(x), want, **CLOSE)


def test_exported_programs_of_pifa_models_run_and_compile(compile: Compile, tmp_path: Path):
    model, x = Network(), torch.randn(4, 12)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "network.pt2")
    loaded = torch.export.load(tmp_path / "network.pt2").module()
    report: list[Record] = []
    y = torch.randn(7, 12)
    assert_close(loaded(y), model(y), **CLOSE)
    assert_close(compile(loaded, report)(y), model(y), **CLOSE)
    assert rewrites(report, "FactorizeLinear", "FactorizePair") >= 1
    assert_close(program.run_decompositions().module()(y), model(y), **CLOSE)


@pytest.mark.slow
def test_packages_of_aot_inductor(tmp_path: Path):
    model, x = Network(), torch.randn(4, 12)
    with quiet():
        program = torch.export.export(model, (x,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "network.pt2"))
        assert_close(torch._inductor.aoti_load_package(path)(x), model(x), **CLOSE)
