"""`distill`: a compressed model is trained to predict what the dense one predicts; it stays in PIFA form."""

import functools
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .device import has_bfloat16_units
from .distillation.activations import fit_memory
from .distillation.config import DistillConfig
from .distillation.objective import Call, HiddenStates, Predictions, predicts_next_token
from .distillation.student import Student, copied, mesh_over, shard, trained_names
from .distillation.teacher import LiveTeacher, StoredTeacher, Teacher
from .distillation.training import Progress, Training
from .errors import CalibrationError, ConfigError
from .experts import PifaGroupedLinear
from .graph.capture import Batch
from .linear import PifaLinear
from .modules import count_numbers
from .numerics import own_numerics
from .processes import Processes
from .report import DistillReport, LayerReport, Report
from .run_folder import RunFolder, hash_of

_HELD_OUT_SHARE, _MOST_HELD_OUT = 0.05, 8
"""Of the batches, where none are given: the last ones."""


@own_numerics()
def distill(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Batch],
    config: DistillConfig,
    *,
    held_out: Iterable[Batch] | None = None,
    report: Report | None = None,
    folder: Path | None = None,
    resume: bool = False,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Report:
    """Trains the factors of a compressed model until its predictions are close to those of the dense one.

    What is trained is a copy, in float32 and with products in bfloat16 where the device has units for it. The model
    takes the best state at the end, in its own dtypes, all of it or nothing: an error leaves it as it was. An interrupt
    (Ctrl-C) ends the run early, with the best state so far. The best state is the one of least loss on `held_out`.

    Processes that torchrun has started together share the batches of every step. Each has both models in memory; with
    `DistillConfig.shard` that may be the CPU's, and each has a part of them on `device`.

    Args:
        model: with layers in PIFA form; changed in place.
        teacher: the dense model, for the same batches; it is not changed.
        batches: as in `compress`. More is better: a million tokens, or all the text that there is.
        config: how long, and how.
        held_out: batches that are not trained on; None takes the last twentieth of `batches`, 8 at most.
        report: of the model, as `compress` returned it; the result goes on from it.
        folder: where states for `resume` are kept, yours to delete once the model is saved; None keeps none.
        resume: whether a run that was stopped is gone on with.
        device: where to train; None is where the model is.
        progress: called as progress(done, total, what).

    Returns:
        The report of the model, with `distillation`. Errors of layers, which were measured before, are no longer in it.

    Raises:
        ConfigError: nothing in the model is to be trained, or the configuration does not fit it.
        CalibrationError: the batches are too few or do not fit both models, or a loss is not finite.
        OffloadError: the folder cannot be written, is in use, damaged, or another run's.
    """
    calls, kept_out = _calls(model, batches, held_out)
    processes, place = Processes(), device or next(model.parameters()).device
    bfloat16 = config.bfloat16 and has_bfloat16_units(place)
    autocast = functools.partial(torch.autocast, place.type, torch.bfloat16) if bfloat16 else nullcontext
    names = trained_names(model, config.train)
    dense = copied(teacher, place).eval()
    mesh = mesh_over(processes, place) if config.shard else None
    if mesh is not None:
        shard(dense, mesh)
    objective = _objective(dense, calls[0].to(place), config)
    notes = []
    with ExitStack() as stack:
        if folder is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            run = _fingerprint(model, teacher, calls, kept_out, config, place)
            opened = RunFolder(folder, run, resume=resume, processes=processes)
            stack.callback(opened.close, finished=False)
            work = folder
        student = stack.enter_context(Student(model, names, place, work, None if config.shard else dense))
        if mesh is not None:
            student.shard(mesh)
        live = LiveTeacher(dense, objective, autocast)
        asked: Teacher = live
        if config.top_k is not None:
            asked = StoredTeacher(
                work / "teacher",
                [*calls, *kept_out],
                live,
                k=config.top_k,
                temperature=config.temperature,
                device=place,
                processes=processes,
                tell=progress or _tell_nobody,
            )
        if config.memory is not None and fit_memory(
            student, dense if asked is live else None, objective, max(calls, key=_size), config.memory, autocast
        ):
            notes.append("values inside of a block were computed twice, to fit the memory")
        training = Training(
            student,
            asked,
            objective,
            calls,
            kept_out,
            config,
            work,
            durable=folder is not None,
            processes=processes,
            autocast=autocast,
            progress=progress,
        )
        found = training.run()
        found.notes = [*notes, *found.notes]
        student.give_back(training.best_values())
    return _report(model, report, found)


def _calls(
    model: nn.Module, batches: Iterable[Batch], held_out: Iterable[Batch] | None
) -> tuple[list[Call], list[Call]]:
    """The calls to train on, and those to look at."""
    found = [Call.of_batch(model, batch) for batch in batches]
    if held_out is not None:
        kept_out = [Call.of_batch(model, batch) for batch in held_out]
    else:
        count = min(max(round(_HELD_OUT_SHARE * len(found)), 1), _MOST_HELD_OUT)
        found, kept_out = found[:-count], found[-count:]
    if not found or not kept_out:
        raise CalibrationError(
            f"wanted batches to train on and at least one held out, got {len(found)} and {len(kept_out)}; give more"
        )
    return found, kept_out


def _objective(teacher: nn.Module, call: Call, config: DistillConfig) -> Predictions | HiddenStates:
    """What is compared.

    Raises:
        ConfigError: predictions are asked for, or what goes with them, of a model that makes none.
    """
    predicts = predicts_next_token(teacher, call)
    if config.loss == "hidden-states" or (config.loss is None and not predicts):
        if config.top_k is not None or config.text_share:
            raise ConfigError("top_k and text_share are about predictions; hidden states are compared here")
        return HiddenStates()
    if not predicts:
        raise ConfigError(
            f"{type(teacher).__name__} gives no logits that predict the next token; take hidden-states as loss"
        )
    return Predictions(config)


def _report(model: nn.Module, known: Report | None, found: DistillReport) -> Report:
    """What is known of the model, without what training has changed."""
    settings = dict(getattr(getattr(model, "config", None), "quantization_config", None) or {})
    if known is None:
        known = Report(settings.get("method") or "unknown", settings.get("density_requested"))
        for name, layer in model.named_modules():
            if isinstance(layer, PifaLinear | PifaGroupedLinear):
                shape = (*layer.w_pivot.shape[:-2], layer.out_features, layer.in_features)
                known.layers.append(LayerReport.of_factors(name, shape, layer.rank, None))
        known.params_after = count_numbers(model)
        known.params_before = known.params_after + sum(
            layer.stored_before - layer.stored_after for layer in known.layers
        )
        known.describe_rest(model)
    layers = [replace(layer, error=None, quality=None) for layer in known.layers]
    return replace(known, layers=layers, distillation=found)


def _fingerprint(
    model: nn.Module,
    teacher: nn.Module,
    calls: Sequence[Call],
    held_out: Sequence[Call],
    config: DistillConfig,
    device: torch.device,
) -> dict[str, Any]:
    """What has to be the same for a run that goes on."""
    return {
        "options": asdict(config),
        "model": hash_of(model.state_dict()),
        "teacher": hash_of(teacher.state_dict()),
        "data": hash_of([(call.args, call.kwargs) for call in calls]),
        "held-out data": hash_of([(call.args, call.kwargs) for call in held_out]),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("pifa-compiler", "torch")},
    }


def _size(call: Call) -> int:
    return sum(value.numel() for value in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(value, Tensor))


def _tell_nobody(done: int, total: int, what: str) -> None:
    """No progress is asked for."""
