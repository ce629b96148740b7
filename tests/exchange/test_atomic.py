"""All or nothing: an error or an interrupt at any step leaves a model as it was."""

import functools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from graphs import low_rank
from pifa_compiler.passes import AbsorbOrder
from tiny_models import tiny_llama
from torch import Tensor, nn

import pifa_compiler as pc
from pifa_compiler.exchange.atomic import Exchange

# The package's `compact` and `compress` are the functions.
compact_module, compress_module = (sys.modules[f"pifa_compiler.{name}"] for name in ("compact", "compress"))
CONFIG = pc.CompressConfig(density=0.6, method="svd", rank_multiple=1)
FILES = {"compact.py", "compress.py", "exchange/atomic.py", "exchange/absorb.py", "exchange/pairs.py"} | {
    "exchange/attention_layers.py",
    "checkpoint/__init__.py",
    "checkpoint/quantizer.py",
}


class Interrupt:
    """Raises KeyboardInterrupt at the line `at` of those executed in `files` of the package, once."""

    def __init__(self, at: int, files: set[str]) -> None:
        self.at, self.files, self.lines = at, files, 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.endswith(tuple(f"/pifa_compiler/{name}" for name in self.files)):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self

    def run(self, action: Callable[[], Any]) -> bool:
        """Whether `action` was interrupted."""
        usual = sys.gettrace()
        sys.settrace(self)
        try:
            action()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(usual)
        return False


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that an exchange could change: objects by identity, values bit by bit."""
    config = getattr(model, "config", None)
    found: dict[str, Any] = {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "training": [module.training for module in model.modules()],
        "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "config": None if config is None else {key: str(value) for key, value in vars(config).items()},
        "code": getattr(model, "code", None),
        "values": [(name, value.clone()) for name, value in model.state_dict().items()],
    }
    return found


def assert_same(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    values, others = got.pop("values"), wanted["values"]
    assert [name for name, _ in values] == [name for name, _ in others]
    assert all(torch.equal(value, other) for (_, value), (_, other) in zip(values, others, strict=True))
    assert got == {key: value for key, value in wanted.items() if key != "values"}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Sequential(nn.Linear(16, 4, bias=False), nn.Linear(4, 24))
        self.v, self.u = nn.Linear(24, 4, bias=False), nn.Linear(4, 16)
        self.single = nn.Linear(16, 16)
        self.single.weight.data = low_rank(16, 16, 3)
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        x = self.u(self.v(torch.relu(self.pair(x))))
        return self.single(x)


def compact_mlp() -> tuple[nn.Module, Callable[[nn.Module], Any]]:
    return Mlp(), lambda model: pc.compact(model, torch.randn(3, 16))


def compress_llama() -> tuple[nn.Module, Callable[[nn.Module], Any]]:
    calls = [torch.arange(8)[None]]
    return tiny_llama(num_hidden_layers=1), lambda model: pc.compress(model, calls, CONFIG)


def compress_attention() -> tuple[nn.Module, Callable[[nn.Module], Any]]:
    model, x = (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 1).eval(),
        torch.randn(1, 30, 16),
    )
    return model, lambda model: pc.compress(model, [x], CONFIG)


def compress_graph() -> tuple[nn.Module, Callable[[nn.Module], Any]]:
    model, x = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)), torch.randn(30, 16)
    graph = torch.export.export(model, (x,), strict=False).module(check_guards=False)
    return graph, lambda model: pc.compress(model, [x], CONFIG)


@pytest.fixture
def captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is put back is the model that was captured: capturing it again tells nothing new."""
    for module, name in ((compress_module, "capture_whole_or_in_parts"), (compact_module, "capture")):
        usual, known = getattr(module, name), {}

        def once(model: nn.Module, batches: Any, usual: Any = usual, known: Any = known) -> Any:
            if id(model) not in known:
                trace = sys.gettrace()
                sys.settrace(None)  # torch.export is slow where every call is traced
                known[id(model)] = usual(model, batches)
                sys.settrace(trace)
            return known[id(model)]

        monkeypatch.setattr(module, name, once)


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize(
    ("make", "strides"),
    [
        (compact_mlp, (7, 211)),
        (compress_llama, (19, 211)),
        (compress_graph, (11, 29)),
        (compress_attention, (11, 29)),
        *(
            pytest.param(make, (1, 11), marks=pytest.mark.slow)
            for make in (compact_mlp, compress_llama, compress_graph)
        ),
    ],
)
def test_an_interrupt_at_any_line_leaves_the_model_as_it_was_or_complete(make: Any, strides: tuple[int, int]) -> None:
    """At one in so many lines of the exchange itself, and one in so many of all."""
    interrupted = 0
    for files, step in (({"exchange/atomic.py"}, strides[0]), (FILES, strides[1])):
        model, action = make()
        wanted, at, run = state_of(model), 1, functools.partial(action, model)
        while Interrupt(at, files).run(run):
            if any(isinstance(module, pc.PifaLinear) for module in model.modules()) or pifa_nodes(model):
                break  # the last lines, with nothing left to do
            assert_same(state_of(model), wanted)
            at += step
            interrupted += 1
    assert interrupted > 5


def pifa_nodes(model: nn.Module) -> bool:
    return "pifa" in str(getattr(model, "code", ""))


def test_an_error_inside_order_absorption_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    (model, action), (graph, rewrite) = compress_llama(), compress_graph()
    for module, act in ((model, action), (graph, rewrite)):
        wanted = state_of(module)
        with monkeypatch.context() as context:
            context.setattr(compress_module, "absorb_orders", _fail)
            context.setattr(AbsorbOrder, "match", _fail)
            with pytest.raises(ZeroDivisionError):
                act(module)
        assert_same(state_of(module), wanted)


def _fail(*arguments: Any) -> Any:
    raise ZeroDivisionError


def test_an_error_in_what_is_written_into_the_config_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, action = compress_llama()
    wanted, usual, calls = state_of(model), Exchange.attribute, []

    def third(self: Exchange, *arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise ZeroDivisionError
        usual(self, *arguments)

    monkeypatch.setattr(Exchange, "attribute", third)
    with pytest.raises(ZeroDivisionError):
        action(model)
    assert_same(state_of(model), wanted)


def test_an_interrupt_while_things_are_put_back_does_not_stop_it() -> None:
    class Owner:
        kept = 1

    for at in range(1, 40):
        model, owner = nn.Sequential(nn.ReLU(), nn.Tanh()), Owner()
        before = list(model)

        def fail(model: nn.Module = model, owner: Owner = owner, at: int = at) -> None:
            with Exchange() as exchange:
                exchange.module(model, "0", nn.Identity())
                exchange.attribute(owner, "kept", 2)
                exchange.attribute(owner, "new", 3)
                exchange.module(model, "1", nn.Identity())
                sys.settrace(Interrupt(at, {"exchange/atomic.py"}))
                # Lines of this function are traced from its next call on, those of the exchange from now.
                raise ZeroDivisionError

        usual = sys.gettrace()
        try:
            with pytest.raises((ZeroDivisionError, KeyboardInterrupt)):
                fail()
        finally:
            sys.settrace(usual)
        assert at <= 2 or list(model) == before
        assert at <= 2 or (vars(owner), owner.kept) == ({}, 1)


def test_what_an_exchange_adds_to_a_graph_module_is_gone_again() -> None:
    graph, _ = compress_graph()
    wanted = state_of(graph)

    def change() -> None:
        with Exchange() as exchange:
            assert isinstance(graph, torch.fx.GraphModule)
            exchange.graph(graph)
            graph.register_buffer("more", torch.ones(2))
            del graph.get_submodule("0").bias
            graph.graph.erase_node(graph.graph.find_nodes(op="output")[0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        change()
    assert_same(state_of(graph), wanted)
