"""Row orders move only where the code shows that the layers behind are all that reads the hidden features."""

from typing import Any

import pytest
import torch
from graphs import low_rank
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import pifa_compiler as pc
from pifa_compiler.exchange.absorb import enclosed_sites, layer_sites
from pifa_compiler.exchange.allowed import Exchangeable
from pifa_compiler.exchange.enclosure import Enclosure
from pifa_compiler.graph.capture import capture


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.aux = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(24, 3)
        self.act: Any = nn.ReLU()
        self.scale = 0.5
        self.mask = nn.Parameter(torch.rand(24))
        self.flag = False

    def forward(self, x: Tensor) -> Any:
        return self.fc2(self.act(self.fc1(x)))


def why_open(model: nn.Module, x: Tensor | None = None) -> str | None:
    """Why the order of the model's first layers stays, as compress and compact see it; None if it is absorbed."""
    graph = capture(model, [torch.randn(3, 16) if x is None else x]).graph
    enclosed, reasons = enclosed_sites(layer_sites(graph), Exchangeable(model, graph), Enclosure(model))
    assert len(enclosed) + len(reasons) == 1
    return None if enclosed else next(iter(reasons.values()))


class OneStatement(Mlp):
    pass


class StatementByStatement(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        residual = x
        hidden = self.fc1(x)
        hidden = F.dropout(F.gelu(hidden) * self.scale, p=0.1, training=self.training).contiguous()
        x = self.fc2(hidden)
        return residual + x


class CastsOnOneBranch(Mlp):
    """As T5 does."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.fc1(x))
        if isinstance(self.fc2.weight, Tensor) and h.dtype != self.fc2.weight.dtype:
            h = h.to(self.fc2.weight.dtype)
        else:
            x = x + 1
        return self.fc2(h) + x


class OneNameForAll(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = torch.tanh(x) * 2
        x = self.fc2(x)
        return x + 1


class InAMethodOfItsOwn(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)

    def block(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.fc2(torch.relu(self.fc1(x)))


class OnOneBranch(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        if not self.flag:
            return self.fc2(self.fc1(x).relu())
        return x


class InALoopAround(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([OneStatement()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def sequence() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Dropout(), nn.Linear(24, 16))


class HoldsASequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.flag = sequence(), False

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class HoldsSequencesInAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList([sequence()])

    def forward(self, x: Tensor) -> Tensor:
        for _, net in enumerate(self.nets[:1]):
            x = net(x)
        return x


def traced() -> nn.Module:
    return torch.fx.symbolic_trace(sequence())


class Widens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.act, self.flag = nn.Linear(16, 24), nn.GELU(), False

    def forward(self, x: Tensor) -> Any:
        x = self.dense(x)
        return self.act(x)


class Narrows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.dropout, self.norm = nn.Linear(24, 16), nn.Dropout(0.1), nn.LayerNorm(16)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        hidden = self.dense(hidden)
        return self.norm(self.dropout(hidden) + residual)


class InTwoModules(nn.Module):
    """As BERT does."""

    def __init__(self, widens: nn.Module | None = None, narrows: nn.Module | None = None) -> None:
        super().__init__()
        self.wide, self.narrow = widens or Widens(), narrows or Narrows()

    def feed_forward(self, x: Tensor) -> Any:
        wide = self.wide(x)
        return self.narrow(wide, x)

    def forward(self, x: Tensor) -> Any:
        return self.feed_forward(x + 1)


class HandsOnTwice(InTwoModules):
    def feed_forward(self, x: Tensor) -> Any:
        wide = self.wide(x)
        return self.narrow(wide, wide[..., :16] if self.training else x)


class HandsOnAndReturns(InTwoModules):
    def feed_forward(self, x: Tensor) -> Any:
        wide = self.wide(x)
        narrow = self.narrow(wide, x)
        return (narrow, wide) if self.training else narrow


class HandsOnByName(InTwoModules):
    def feed_forward(self, x: Tensor) -> Any:
        return self.narrow(residual=x, hidden=self.wide(x))


class HandsOnRolled(InTwoModules):
    def forward(self, x: Tensor) -> Any:
        return self.feed_forward(x) if not self.training else self.wide(x)


def which_returns_on_two_paths() -> nn.Module:
    class Returns(Widens):
        def forward(self, x: Tensor) -> Any:
            if self.flag:
                return x.repeat(1, 2)[:, :24]
            x = self.dense(x)
            return self.act(x)

    return InTwoModules(Returns())


def which_returns_more() -> nn.Module:
    class Returns(Widens):
        def forward(self, x: Tensor) -> Any:
            x = self.act(self.dense(x))
            return x.flip(-1) if self.training else x

    return InTwoModules(Returns())


def which_looks_at_what_it_is_given() -> nn.Module:
    class Looks(Narrows):
        def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
            kept = hidden
            hidden = self.dense(hidden)
            return self.norm(self.dropout(hidden) + residual + (kept.sum() * 0 if self.training else 0))

    return InTwoModules(None, Looks())


def which_is_watched() -> nn.Module:
    model = InTwoModules()
    model.wide.register_forward_hook(lambda *_: None)
    return model


ENCLOSED = (
    *(OneStatement, StatementByStatement, OneNameForAll, InAMethodOfItsOwn, OnOneBranch, InALoopAround),
    *(CastsOnOneBranch, InTwoModules),
    *(sequence, HoldsASequence, HoldsSequencesInAList, traced),
)


@pytest.mark.parametrize("make", ENCLOSED, ids=lambda make: make.__name__)
def test_an_order_is_absorbed_where_the_code_shows_every_reader(make: Any) -> None:
    assert why_open(make()) is None


class AuxInTraining(Mlp):
    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.fc1(x))
        y = self.fc2(h)
        if self.training:
            return y, self.aux(h)
        return y


class ReturnsHidden(Mlp):
    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.fc1(x))
        y = self.fc2(h)
        return (y, h) if self.flag else y


class KeepsHidden(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.hidden = self.fc1(x)
        return self.fc2(torch.relu(self.fc1(x)))


class ChoosesBetween(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.fc1(x))
        if self.training:
            h = h.roll(1, dims=-1)
        return self.fc2(h)


class BranchesOnValues(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.fc1(x))
        if h.shape[0] > 1000:
            h = h.float()
        return self.fc2(h)


class BranchesOnWeights(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.fc1(x))
        if self.fc2.weight.shape[0] > 1000:
            h = h.float()
        return self.fc2(h)


class SetsItOnOneBranch(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.fc1(x))
        if self.training:
            self.act = h = h.float()
        return self.fc2(h)


class NamesItOnOneBranch(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.fc1(x))
        if self.training:
            kept = h.float()  # noqa: F841
        return self.fc2(h)


class KeepsOnOneBranch(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.fc1(x))
        if self.training:
            self.kept = h.float()
        return self.fc2(h)


class LoopsBetween(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.fc1(x))
        for _ in range(2):
            h = h * 2
        return self.fc2(h)


class ChoosesInAnExpression(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)) * (self.mask if self.training else 1.0))


class MeetsWhatWasChosen(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        factor = self.mask if self.training else 1.0
        return self.fc2(torch.relu(self.fc1(x)) * factor)


class MeetsAProperty(Mlp):
    @property
    def factor(self) -> Any:
        return self.mask if self.training else 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)) * self.factor)


class Encodes(Mlp):
    def encode(self, x: Tensor) -> Tensor:
        return self.fc1(x)


class EncodesByName(Mlp):
    def encode(self, x: Tensor) -> Tensor:
        return getattr(self, "fc1")(x)  # noqa: B009


class EncodesByNumber(Mlp):
    def encode(self, x: Tensor, number: int) -> Tensor:
        return getattr(self, f"fc{number}")(x)


class EncodesByChildren(Mlp):
    def encode(self, x: Tensor) -> Tensor:
        return next(self.children())(x)


class EncodesByAWrapper(Mlp):
    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        return self.fc1(x)


class EncodesByAProperty(Mlp):
    @property
    def encoder(self) -> nn.Module:
        return self.fc1


def first_of(mlp: Mlp, x: Tensor) -> Tensor:
    return mlp.fc1(x)


class EncodesByAHelper(Mlp):
    def encode(self, x: Tensor) -> Tensor:
        return first_of(self, x)


def all_of(mlp: Mlp) -> list[nn.Module]:
    return list(mlp.children())


class EncodesByAHelperWithoutNames(Mlp):
    def encode(self, x: Tensor) -> Tensor:
        return all_of(self)[0](x)


class CustomActivation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x.roll(1, dims=-1) if self.training else x)


class CallsAModuleOfItsOwn(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.act = CustomActivation()


class WatchesTheActivation(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.act.register_forward_hook(lambda module, x, y: None)


class IsInALoop(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(1):
            x = self.fc2(torch.relu(self.fc1(x)))
        return x


class NamesItAgain(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc2(torch.relu(self.fc1(x)))
        return y + 0 * self.fc1.weight.sum() if self.flag else y


class ReadsByAClosure(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        self.later = lambda: h
        h = torch.relu(self.fc1(x))
        return self.fc2(h)


class ReadsItsVariables(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.fc1(x))
        y = self.fc2(h)
        self.seen = locals() if self.training else None
        return y


class ReachesFromAbove(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.flag = OneStatement(), False

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp.fc1(x) if self.flag else self.mlp(x)


class IndexesTheSequence(HoldsASequence):
    def encode(self, x: Tensor) -> Tensor:
        return self.net[0](x)


class SlicesTheSequence(HoldsASequence):
    def forward(self, x: Tensor) -> Tensor:
        return self.net[:2](x) if self.flag else self.net(x)


class WalksTheSequence(HoldsASequence):
    def forward(self, x: Tensor) -> Any:
        if self.flag:
            return [x := layer(x) for layer in self.net]
        return self.net(x)


class IndexesTheSequencesOfAList(HoldsSequencesInAList):
    def forward(self, x: Tensor) -> Tensor:
        for net in self.nets:
            x = net(x)
        return x + 0 * net[0](x).sum() if self.training else x


class CallsThePartsOfASequence(HoldsASequence):
    def forward(self, x: Tensor) -> Tensor:
        return self.net[3](torch.relu(self.net[0](x)))


def set_on_the_instance() -> nn.Module:
    model = OneStatement()
    model.encode = lambda x: model.fc1(x)
    return model


def forward_set_on_the_instance() -> nn.Module:
    model = OneStatement()
    usual = model.forward
    model.forward = lambda x: usual(x)
    return model


def without_source() -> nn.Module:
    space: dict[str, Any] = {"Mlp": Mlp}
    exec("class Made(Mlp):\n    def forward(self, x):\n        return self.fc2(self.fc1(x).relu())\n", space)  # noqa: S102
    return space["Made"]()


OPEN = {
    AuxInTraining: "reads h, which holds what is between them, again",
    ReturnsHidden: "reads h, which holds what is between them, again",
    KeepsHidden: "calls fc1 twice",
    HandsOnTwice: "does not hand what is between them on as the first",
    HandsOnAndReturns: "reads wide, which holds what is between them, again",
    HandsOnByName: "does not hand what is between them on as the first argument alone",
    HandsOnRolled: "HandsOnRolled.forward and InTwoModules.feed_forward use narrow, wide",
    which_returns_on_two_paths: "returns on several paths",
    which_returns_more: "chooses or gathers what is between them",
    which_looks_at_what_it_is_given: "reads kept, which holds what is between them, again",
    which_is_watched: "wide has forward hooks",
    ChoosesBetween: "does more than cast what is between them on one branch",
    BranchesOnValues: "branches on what is between them",
    BranchesOnWeights: "uses fc2 otherwise than by calling it",
    SetsItOnOneBranch: "keeps what is between them",
    NamesItOnOneBranch: "has something else between them on one branch",
    KeepsOnOneBranch: "keeps what is between them",
    LoopsBetween: "has a block between them (for)",
    ChoosesInAnExpression: "may differ on another path",
    MeetsWhatWasChosen: "factor, which meets what is between them, may differ",
    MeetsAProperty: "self.factor, which meets what is between them, may differ",
    Encodes: "Encodes.encode and Mlp.forward use fc1, fc2",
    EncodesByName: "EncodesByName.encode and Mlp.forward use fc1, fc2",
    EncodesByNumber: "EncodesByNumber.encode may reach them by getattr",
    EncodesByChildren: "EncodesByChildren.encode may reach them by children",
    EncodesByAWrapper: "EncodesByAWrapper.encode and Mlp.forward use fc1, fc2",
    EncodesByAProperty: "EncodesByAProperty.encoder and Mlp.forward use fc1, fc2",
    EncodesByAHelper: "Mlp.forward and first_of use fc1, fc2",
    EncodesByAHelperWithoutNames: "all_of may reach them by children",
    CallsAModuleOfItsOwn: "self.act (CustomActivation) is not known",
    WatchesTheActivation: "self.act has forward hooks",
    IsInALoop: "in a loop",
    NamesItAgain: "uses fc1 otherwise than by calling it",
    ReadsByAClosure: "reads h, which holds what is between them, again",
    ReadsItsVariables: "may read its variables by locals",
    ReachesFromAbove: "Mlp.forward and ReachesFromAbove.forward use fc1, fc2",
    IndexesTheSequence: "IndexesTheSequence.encode may use parts of net",
    SlicesTheSequence: "SlicesTheSequence.forward may use parts of net",
    WalksTheSequence: "WalksTheSequence.forward may use parts of net",
    IndexesTheSequencesOfAList: "IndexesTheSequencesOfAList.forward may use parts of nets",
    CallsThePartsOfASequence: "not called by the module that holds them",
    set_on_the_instance: "Mlp.forward and set_on_the_instance.<locals>.<lambda> use fc1, fc2",
    forward_set_on_the_instance: "forward of forward_set_on_the_instance is replaced on the instance",
    without_source: "the source of Made.forward is not to be had",
}


@pytest.mark.parametrize("make", OPEN, ids=lambda make: make.__name__)
def test_an_order_stays_where_another_may_read_the_features_and_says_why(make: Any) -> None:
    reason = why_open(make())
    assert reason is not None
    assert reason.startswith("row order stays: ")
    assert OPEN[make].replace("forward_set_on_the_instance is", "OneStatement is") in reason


def test_a_source_that_was_edited_since_is_not_believed(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "edited_mlp.py"
    text = f"from {__name__} import Mlp\n\nclass Edited(Mlp):\n    def forward(self, x):\n"
    file.write_text(text + "        h = self.fc1(x).relu()\n        y = self.fc2(h)\n        return (y, h)[0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    import edited_mlp  # type: ignore[import-not-found]

    model = edited_mlp.Edited()
    file.write_text(text + "        h = self.fc1(x).relu()\n        y = self.fc2(h)\n        return y\n")
    assert "the source of Edited.forward is not to be had" in str(why_open(model))


def paths(model: Any, x: Tensor) -> list[Tensor]:
    """What a model computes on its paths: as it is called, in training, under its flag, and by its methods."""
    found = []
    torch.manual_seed(0)
    for training in (False, True):
        model.train(training)
        for flag in (False, True):
            model.flag = flag
            outputs = model(x)
            found += list(outputs) if isinstance(outputs, tuple | list) else [outputs]
    model.flag = False
    return [*found, model.eval().encode(x)] if hasattr(model, "encode") else found


@pytest.mark.parametrize("door", ["compress", "compact"])
@pytest.mark.parametrize(
    "make", [AuxInTraining, ReturnsHidden, ChoosesBetween, ChoosesInAnExpression, Encodes, SlicesTheSequence]
)
def test_every_path_computes_what_it_did(make: Any, door: str) -> None:
    model, x = make().double(), torch.randn(60, 16).double()
    first = model.fc1 if isinstance(model, Mlp) else model.net[0]
    first.weight.data = low_rank(24, 16, 4, torch.float64)
    name = "fc1" if isinstance(model, Mlp) else "net.0"
    wanted = paths(model, x)
    model.eval()
    if door == "compact":
        report = pc.compact(model, x)
    else:  # at the weight's own rank nothing is lost either
        options: dict[str, Any] = {"method": "optimal", "damping": 0, "gradients": False}
        report = pc.compress(model, [x], pc.CompressConfig(ranks={name: 4}, density=1, **options))
    assert [layer.name for layer in report.factorized] == [name]
    assert "row order stays" in report.factorized[0].notes[-1]
    # compress sums in float32; an order that is lost would be an error of the size of the outputs.
    assert_close(paths(model, x), wanted, rtol=1e-4, atol=1e-4)
