"""Distillation as users call it: on tiny models, alone, killed, interrupted, and shared by two processes."""

import copy
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llama
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaForCausalLM

import pifa_compiler as pc
from pifa_compiler.distillation.training import Training
from pifa_compiler.errors import CalibrationError, ConfigError, OffloadError

CONFIG = pc.DistillConfig(steps=12, learning_rate=1e-2, warmup=0.2, batches_per_step=3, evaluations=4, bfloat16=False)


def tokens(count: int = 16) -> list[Tensor]:
    """The same windows every time; the last is held out."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 64, (8, 24), generator=generator) for _ in range(count)]


@pytest.fixture(scope="module")
def dense() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def start(dense: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same in PIFA form."""
    model = copy.deepcopy(dense)
    pc.compress(model, tokens(1), pc.CompressConfig(density=0.5, rank_multiple=1))
    return model


@pytest.fixture
def model(start: LlamaForCausalLM) -> LlamaForCausalLM:
    return copy.deepcopy(start)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def divergence(model: nn.Module, dense: nn.Module, windows: list[Tensor]) -> float:
    with torch.no_grad():
        q, p = (torch.cat([each(ids).logits for ids in windows]).log_softmax(dim=-1) for each in (model, dense))
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


def test_distillation_brings_predictions_closer_and_changes_nothing_else(
    model: LlamaForCausalLM, dense: LlamaForCausalLM
) -> None:
    before, teacher = values(model), values(dense)
    was = divergence(model, dense, tokens()[-1:])
    pivots = [each.pivots.clone() for each in model.modules() if isinstance(each, pc.PifaLinear)]
    report = pc.distill(model, dense, tokens(), CONFIG)
    found = report.distillation
    assert found is not None
    assert found.held_out_before == pytest.approx(was, rel=1e-4)
    assert found.held_out_after == pytest.approx(divergence(model, dense, tokens()[-1:]), rel=1e-4)
    assert found.held_out_after < 0.9 * was
    assert len(found.steps) == 12
    assert found.held_out_after == min(row.held_out for row in found.steps if row.held_out is not None)
    names = changed(model, before)
    assert {name.rpartition(".")[2] for name in names} == {"w_pivot", "coeff", "weight"}
    assert all("norm" in name for name in names if name.endswith(".weight"))
    assert not changed(dense, teacher)
    after = [each.pivots for each in model.modules() if isinstance(each, pc.PifaLinear)]
    assert all(torch.equal(*each) for each in zip(pivots, after, strict=True))
    assert report.method == "two-sided"
    assert len(report.factorized) == len(pivots)
    assert "trained in 12 steps" in str(report)
    assert pc.Report.from_dict(report.to_dict()).distillation == found


def test_the_compress_report_goes_on(dense: LlamaForCausalLM) -> None:
    model = copy.deepcopy(dense)
    made = pc.compress(model, tokens(1), pc.CompressConfig(density=0.5, rank_multiple=1))
    report = pc.distill(model, dense, tokens(), replace(CONFIG, steps=2), report=made)
    assert (report.density, report.params_before, report.others) == (made.density, made.params_before, made.others)
    assert [layer.skipped for layer in report.layers] == [layer.skipped for layer in made.layers]
    assert all(layer.error is None and layer.quality is None for layer in report.layers)


@pytest.mark.parametrize(
    "changes",
    [{"top_k": 8}, {"text_share": 0.5, "temperature": 2.0}, {"loss": "hidden-states"}, {"memory": "1GB"}],
    ids=str,
)
def test_the_options_train_too(changes: dict[str, object], model: LlamaForCausalLM, dense: LlamaForCausalLM) -> None:
    found = pc.distill(model, dense, tokens(), replace(CONFIG, **changes)).distillation
    assert found is not None
    assert found.held_out_after < found.held_out_before


def test_minutes_end_in_time_and_at_learning_rate_zero(model: LlamaForCausalLM, dense: LlamaForCausalLM) -> None:
    found = pc.distill(model, dense, tokens(), replace(CONFIG, steps=None, minutes=0.05)).distillation
    assert found is not None
    assert found.seconds < 6  # of 3, and a step or an evaluation on a busy machine
    assert found.steps[-1].learning_rate < 0.1 * max(row.learning_rate for row in found.steps)
    assert found.steps[-1].held_out is not None


def test_minutes_say_how_many_batches_a_step_has(model: LlamaForCausalLM, dense: LlamaForCausalLM) -> None:
    config = replace(CONFIG, steps=None, minutes=1e-3, batches_per_step=None)
    found = pc.distill(model, dense, tokens(), config).distillation
    assert found is not None
    assert found.notes[0] == "6 batches for a step"  # 60 ms do not do for 100 steps of 1024 tokens, in batches of 192


def test_an_encoder_is_trained_by_its_hidden_states() -> None:
    torch.manual_seed(0)
    sizes: dict[str, object] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    sizes["initializer_range"] = 1.0  # far from the same states for all tokens
    dense = BertModel(BertConfig(vocab_size=64, max_position_embeddings=32, **sizes)).eval()
    model = copy.deepcopy(dense)
    pc.compress(model, tokens(1), pc.CompressConfig(density=0.5, rank_multiple=1))
    found = pc.distill(model, dense, tokens(), CONFIG).distillation
    assert found is not None
    assert found.loss == "hidden-states"
    assert found.held_out_after < 0.9 * found.held_out_before
    with pytest.raises(ConfigError, match="no logits that predict the next token"):
        pc.distill(model, dense, tokens(), replace(CONFIG, loss="logits"))
    with pytest.raises(ConfigError, match="about predictions"):
        pc.distill(model, dense, tokens(), replace(CONFIG, top_k=4))


def test_a_model_in_bfloat16_stays_so(model: LlamaForCausalLM, dense: LlamaForCausalLM) -> None:
    model.to(torch.bfloat16)
    found = pc.distill(model, dense, tokens(), CONFIG).distillation
    assert found is not None
    assert found.held_out_after < found.held_out_before
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}


def test_an_error_leaves_the_model_as_it_was(
    model: LlamaForCausalLM, dense: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = values(model)
    with pytest.raises(CalibrationError, match=r"the loss is .*lower the learning rate \(1e\+20\)"):
        pc.distill(model, dense, tokens(), replace(CONFIG, learning_rate=1e20, clip=1e30))
    assert not changed(model, before)
    stop_at(monkeypatch, 5, MemoryError())
    with pytest.raises(MemoryError):
        pc.distill(model, dense, tokens(), CONFIG)
    assert not changed(model, before)


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
def test_of_what_is_trained_four_copies_are_in_memory(bfloat16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["pifa_compiler.distill"], "has_bfloat16_units", lambda device: bfloat16)
    dense = tiny_llama(hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    model = copy.deepcopy(dense)
    pc.compress(model, tokens(1), pc.CompressConfig(density=0.5, method="svd"))
    windows = [ids[:1, :4] for ids in tokens(3)]  # so few tokens that weights count alone
    config = replace(CONFIG, steps=2, batches_per_step=2, learning_rate=1e-4, bfloat16=bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        found = pc.distill(model, dense, windows, config).distillation
    assert found is not None
    assert found.best_step
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = list(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    # What was there before is not counted, so that the model counts once, by the file that it is mapped from. The copy,
    # its gradient and two moments remain, and half a copy of casts for the way back.
    mapped = sum(each.nbytes for each in model.parameters())
    copies = (max(live) - mapped) / (4 * found.trained)
    assert 3.5 < copies < 4.4 + 0.5 * bfloat16


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, stop: BaseException) -> None:
    """Raises in the place of a step."""
    usual: Callable[..., tuple[float, float]] = Training._step

    def instead(self: Training, number: int, rate: float) -> tuple[float, float]:
        if number == step:
            raise stop
        return usual(self, number, rate)

    monkeypatch.setattr(Training, "_step", instead)


def test_an_interrupt_keeps_the_best_state(
    model: LlamaForCausalLM, dense: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 8, KeyboardInterrupt())
    found = pc.distill(model, dense, tokens(), CONFIG).distillation
    assert found is not None
    assert found.interrupted
    assert found.notes == ["interrupted after 8 steps; the best state until then was kept"]
    assert found.best_step in (3, 6)
    assert found.held_out_after == pytest.approx(divergence(model, dense, tokens()[-1:]), rel=1e-4)


def test_without_a_better_state_the_first_is_kept(model: LlamaForCausalLM, dense: LlamaForCausalLM) -> None:
    before = values(model)
    found = pc.distill(model, dense, tokens(), replace(CONFIG, learning_rate=3.0, clip=1e9, patience=2)).distillation
    assert found is not None
    assert not changed(model, before)
    assert found.best_step == 0
    assert found.held_out_after == found.held_out_before
    assert [note.partition(" ")[0] for note in found.notes] == ["stopped", "no"]
    assert len(found.steps) < 12


def test_too_little_memory_is_refused_with_what_would_do(model: LlamaForCausalLM, dense: LlamaForCausalLM) -> None:
    with pytest.raises(ConfigError, match=r"1000.0 bytes|1000 bytes do not suffice.*give .* \(--memory\)"):
        pc.distill(model, dense, tokens(), replace(CONFIG, memory=1000))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": None}, "say how long"),
        ({"minutes": 1.0}, "say how long"),
        ({"steps": 0}, "steps must be an integer of 1 or more"),
        ({"top_k": 1.5}, "top_k must be"),
        ({"learning_rate": -1.0}, "learning_rate must be a number above 0"),
        ({"warmup": 1.0}, "warmup must be"),
        ({"text_share": 2.0}, "text_share must be"),
        ({"loss": "mse"}, "loss must be"),
        ({"train": "factors"}, "train must be a tuple"),
        ({"memory": "much"}, "wanted a size"),
        ({"shard": True}, None),
    ],
    ids=str,
)
def test_odd_options_are_refused(
    changes: dict[str, object], said: str | None, model: LlamaForCausalLM, dense: LlamaForCausalLM
) -> None:
    if said is None:  # known only where it runs
        with pytest.raises(ConfigError, match="start them by torchrun"):
            pc.distill(model, dense, tokens(), replace(CONFIG, **changes))
        return
    with pytest.raises(ConfigError, match=said):
        replace(CONFIG, **changes)


def test_one_batch_is_too_few(model: LlamaForCausalLM, dense: LlamaForCausalLM) -> None:
    with pytest.raises(CalibrationError, match="got 0 and 1"):
        pc.distill(model, dense, tokens(1), CONFIG)


SHARED = replace(CONFIG, save_minutes=1e-9)
"""Of the runs that several processes have a part in; there is a state after every step."""

SCRIPT = """
import copy, os, signal, sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
import pifa_compiler as pc
from dataclasses import replace
from pathlib import Path
from pifa_compiler.processes import joined
from pifa_compiler.distillation.training import Training

if __name__ == "__main__":
    folder, kill = Path(sys.argv[1]), int(sys.argv[2])
    usual = Training._step

    def step(self, number, rate):
        if number == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return usual(self, number, rate)

    Training._step = step
    with joined(os.environ, torch.device("cpu")) as processes:
        start, dense, windows, config = torch.load(folder / "models.pt", weights_only=False)
        for name in ("run", "sharded") if processes.size > 1 else ("run",):
            model, config = copy.deepcopy(start), replace(config, shard=name == "sharded")
            report = pc.distill(model, dense, windows, config, folder=folder / name)
            if processes.is_first:
                torch.save((model.state_dict(), report.to_dict()), folder / f"{name}.pt")
"""


@pytest.fixture(scope="module")
def whole(start: LlamaForCausalLM, dense: LlamaForCausalLM) -> tuple[dict[str, Tensor], pc.DistillReport]:
    """What one process makes without a stop."""
    model = copy.deepcopy(start)
    found = pc.distill(model, dense, tokens(), SHARED).distillation
    assert found is not None
    return model.state_dict(), found


def run(folder: Path, models: tuple[nn.Module, nn.Module], kill: int, processes: int = 1) -> int:
    """Runs the script; its exit code."""
    torch.save((*models, tokens(), SHARED), folder / "models.pt")
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    command = [sys.executable, *(launch if processes > 1 else []), str(folder / "script.py"), str(folder), str(kill)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


@pytest.mark.timeout(280)
def test_a_run_that_is_killed_goes_on_to_the_same_end(
    model: LlamaForCausalLM, dense: LlamaForCausalLM, whole: tuple[dict[str, Tensor], pc.DistillReport], tmp_path: Path
) -> None:
    assert run(tmp_path, (model, dense), 7) == -signal.SIGKILL
    found = pc.distill(model, dense, tokens(), SHARED, folder=tmp_path / "run", resume=True).distillation
    assert found is not None
    assert all(torch.equal(value, whole[0][name]) for name, value in model.state_dict().items())
    assert [row.loss for row in found.steps] == [row.loss for row in whole[1].steps]
    assert [row.held_out for row in found.steps] == [row.held_out for row in whole[1].steps]
    assert (found.held_out_before, found.best_step) == (whole[1].held_out_before, whole[1].best_step)


def test_a_run_of_something_else_does_not_go_on(
    start: LlamaForCausalLM, model: LlamaForCausalLM, dense: LlamaForCausalLM, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    config = replace(CONFIG, steps=2, save_minutes=1e-9)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    pc.distill(copy.deepcopy(model), dense, tokens(), config, folder=folder)
    with pytest.raises(OffloadError, match="resume it"):
        pc.distill(model, dense, tokens(), config, folder=folder)
    changes: list[tuple[str, tuple[nn.Module, nn.Module, list[Tensor], pc.DistillConfig]]] = [
        (
            r"another options: learning_rate was 0.01, is 0.5",
            (model, dense, tokens(), replace(config, learning_rate=0.5)),
        ),
        ("another model", (other, dense, tokens(), config)),
        ("another teacher", (model, other, tokens(), config)),
        ("another data", (model, dense, [*tokens()[1:], tokens()[0]], config)),
    ]
    for said, arguments in changes:
        with pytest.raises(OffloadError, match=said):
            pc.distill(*arguments, folder=folder, resume=True)
    before = values(model)
    found = pc.distill(model, dense, tokens(), config, folder=folder, resume=True).distillation
    assert found is not None
    assert len(found.steps) == 2  # it was at its end
    assert changed(model, before)
    model = copy.deepcopy(start)
    (folder / "state.safetensors").write_bytes(b"not a state")
    with pytest.raises(OffloadError, match=r"state.safetensors is damaged"):
        pc.distill(model, dense, tokens(), config, folder=folder, resume=True)


@pytest.fixture(scope="module")
def by_two(start: LlamaForCausalLM, dense: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two processes make, replicated and sharded, one after the other."""
    folder = tmp_path_factory.mktemp("two")
    assert run(folder, (start, dense), -1, processes=2) == 0
    return folder


@pytest.mark.timeout(280)
@pytest.mark.parametrize("name", ["run", "sharded"], ids=["replicated", "sharded"])
def test_two_processes_do_what_one_does(
    name: str, by_two: Path, whole: tuple[dict[str, Tensor], pc.DistillReport]
) -> None:
    state, report = torch.load(by_two / f"{name}.pt", weights_only=False)
    found = pc.Report.from_dict(report).distillation
    assert found is not None
    # Gradients are sums of three batches in another order, 1e-7 apart; AdamW divides them by their own size, so that
    # of single numbers with hardly a gradient more is left of that, and less on the whole.
    losses = torch.tensor([[row.loss for row in each.steps] for each in (whole[1], found)])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)
    assert found.held_out_after == pytest.approx(whole[1].held_out_after, rel=1e-4)
    assert found.best_step == whole[1].best_step
    for name, value in whole[0].items():
        if value.is_floating_point():
            assert float((state[name] - value).norm()) < 1e-3 * float(value.norm())
