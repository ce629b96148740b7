"""`compress_checkpoint`: a model's files are compressed into others, block by block, and are never in memory whole."""

import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from .checkpoint.format import read_report
from .checkpoint.shards import write_model
from .compress import check_token_ids
from .errors import CalibrationError, CheckpointError, OffloadError
from .exchange.absorb import LayerSite, absorb_orders
from .exchange.expert_layers import FoundExperts, Projection, experts_as_layers, of_rank
from .experts import PifaExperts, layer_name
from .files import check_destination
from .graph.capture import Batch, capture
from .graph.linears import weight_name
from .hf.stored_model import StoredModel, open_model
from .linear import PifaLinear
from .memory import format_bytes, parse_bytes
from .modules import count_numbers
from .numerics import own_numerics
from .processes import Processes
from .reconstruction.config import CompressConfig
from .reconstruction.needs import SHARES, Needs, fit_blocks
from .reconstruction.reconstruct import Reconstruction
from .reconstruction.selection import RankedLinear, left_dense, select_linears
from .reconstruction.solver import Solved
from .reconstruction.sweep import Group, Progress, groups
from .reconstruction.value_store import Room
from .reconstruction.working_folder import WorkingFolder
from .report import LayerReport, Report
from .run_folder import hash_of

_SHARE_OF_BLOCK = SHARES[0]
"""The weights of a block, and of a shard of the output, take at most this part of the memory."""

_LEAST_SHARD = 1 << 24
"""Bytes of a shard of the output, however little memory there is."""


_SLACK = 1.05
"""Of what is said to suffice: what libraries hold is not the same every time."""


@dataclass(frozen=True)
class Plan:
    """What a run will take, known before it starts.

    Attributes:
        memory: bytes asked for.
        needs: what the steps take.
        values_in_memory: bytes that values between two steps may take of it.
        working_folder: bytes on the disk of the working folder, at the most.
        output: bytes on the disk of the output, about.
        seconds: about how long it will take, by a short measurement of this machine.
    """

    memory: int
    needs: Needs
    values_in_memory: int
    working_folder: int
    output: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "least_memory": self.needs.least}


class _Job:
    """One run over a model's files."""

    def __init__(
        self,
        stored: StoredModel,
        output: Path,
        calls: list[Batch],
        config: CompressConfig,
        memory: int,
        offload: str | os.PathLike[str] | None,
        device: torch.device | None,
        experts: FoundExperts,
    ) -> None:
        self.experts = experts
        stored.weights.add_views(experts.views())
        self.processes = Processes()
        if len(calls) < self.processes.size:
            raise CalibrationError(
                f"{len(calls)} calibration batches cannot be split over {self.processes.size} processes; give more"
            )
        self.stored, self.config, self.memory = stored, config, memory
        self.output = output.expanduser().resolve()
        beside = self.output.with_name(f".{self.output.name}.run")
        self.folder = beside if offload is None else Path(offload).expanduser().resolve()
        if self.output in (source := stored.folder.resolve(), *source.parents):
            raise CheckpointError(f"{output} holds the model to compress; choose another name for the output")
        if self.output in (self.folder, *self.folder.parents) or self.folder in self.output.parents:
            raise OffloadError(f"the working folder {offload} and the output {output} lie in each other; take another")
        self.device = torch.device("cpu") if device is None else device
        check_token_ids(stored.model, calls)
        self.captured = capture(
            stored.model,
            calls,
            weights=stored.weights,
            device=self.device,
            block_bytes=max(memory // _SHARE_OF_BLOCK, 1),
        )
        self.selection = select_linears(stored.model, self.captured.graph, config.skip, config.ranks, in_files=True)

    def plan(self) -> Plan:
        """What the run will take.

        Raises:
            OffloadError: the memory does not suffice, or the disk of the working folder or of the output.
        """
        needs, self.captured = fit_blocks(self.captured, self.selection.found, self.config, self.memory)
        if needs.least > self.memory:
            enough = needs.least
            # More memory makes for larger blocks.
            while (least := fit_blocks(self.captured, self.selection.found, self.config, enough)[0].least) > enough:
                enough = least
            raise OffloadError(
                f"{format_bytes(self.memory)} of memory do not suffice for this model and these windows: {needs}; give "
                f"{format_bytes(_SLACK * enough, up=True)} or more (--memory), or shorter windows (--seqlen)"
            )
        values_in_memory = self.memory - needs.least
        folder = needs.kept + max(needs.values - values_in_memory, 0)
        output = int(self.stored.bytes * (1 - (1 - self.config.density) * needs.share))
        plan = Plan(self.memory, needs, values_in_memory, folder, output, needs.seconds(self.device))
        for place, wanted in ((self.folder, folder), (self.output, output)):
            above = next(parent for parent in (place, *place.parents) if parent.exists())
            free = shutil.disk_usage(above).free
            if free < wanted:
                raise OffloadError(
                    f"{place} needs about {format_bytes(wanted)}, and {format_bytes(free)} are free on its disk; make "
                    "room, or name another place"
                )
        return plan

    def fingerprint(self) -> dict[str, Any]:
        """What has to be the same for a run that goes on."""
        files = {}
        for path in self.stored.weights.paths:
            stat = path.stat()
            files[path.name] = [stat.st_size, stat.st_mtime_ns]
        packages = ("pifa-compiler", "torch", "transformers")
        return {
            "model": {
                "folder": str(self.stored.folder),
                "config": json.loads(self.stored.model.config.to_json_string()),
            },
            "files": files,
            "options": asdict(self.config),
            "memory": self.memory,
            "dtype": str(self.stored.model.dtype),
            "device": self.device.type,
            "data": hash_of(self.captured.inputs),
            "versions": {name: version(name) for name in packages},
            "threads": torch.get_num_threads(),
        }

    def reconstruct(
        self, work: WorkingFolder, plan: Plan, report: Report, progress: Progress | None
    ) -> dict[Node, RankedLinear]:
        """Makes the factors, in the working folder; the rank of every linear."""
        work.bind(self.captured.graph)
        reconstruction = Reconstruction(
            self.captured,
            self.selection.found,
            self.selection.one_order,
            self.config,
            work,
            room=Room(plan.values_in_memory, work.values, torch.device("cpu")),
            progress=progress,
            processes=self.processes,
        )
        ranked = reconstruction.run()
        reconstruction.tell(report)
        report.planned_bytes = plan.memory
        return ranked

    def assemble(self, work: WorkingFolder, ranked: Mapping[Node, RankedLinear], report: Report) -> "_Layers":
        """Puts layers without values into the model, and completes the report."""
        model, graph = self.stored.model, self.captured.graph
        active = [node for node, linear in ranked.items() if linear.rank is not None]
        projections = {linear.projection for linear in self.selection.found.values() if linear.projection is not None}
        layers = _Layers(self.stored, work, groups(graph.graph, active), projections)
        absorbed = layers.absorb(self.selection.sites) if self.processes.is_first else {}
        report.layers = self.selection.layers(graph, (*left_dense(ranked), *layers.reports()), absorbed)
        report.layers += self.experts.reports(model)
        factorized = {layer.name: layer for layer in report.factorized}
        for place, found in self.experts.layers.items():
            names = {name: layer_name(place, name) for name in found.projections}
            held = {
                name: found.without_values(name, rank)
                for name, path in names.items()
                if path in factorized and (rank := factorized.pop(path).rank) is not None
            }
            model.set_submodule(place, PifaExperts.of(found.experts, held) if held else found.experts)
        for layer in factorized.values():
            model.set_submodule(layer.name, _without_values(layer, model.get_submodule(layer.name)))
        report.params_after = count_numbers(model)
        report.describe_rest(model)
        return layers


class _Layers:
    """The layers of the compressed model, by name: one at a time, from the working folder or the model's own files."""

    def __init__(
        self, stored: StoredModel, work: WorkingFolder, found: Sequence[Group], projections: Iterable[Projection]
    ) -> None:
        self._projections = {projection.path: projection for projection in projections}
        modules = stored.model.named_modules()
        self._biased = {name for name, module in modules if getattr(module, "bias", None) is not None}
        self._stored, self._work = stored, work
        self._group = {weight_name(node): (group, node) for group in found for node in group.members}
        self._groups = found
        self._last: tuple[str, dict[str, Tensor] | None] = ("", None)

    def reports(self) -> list[LayerReport]:
        """One of each layer in PIFA form."""
        return [each.report for group in self._groups for each in (self._work.solved(group) or {}).values()]

    def _solved(self, name: str) -> Solved | None:
        found = self._group.get(f"{name}.weight")
        return None if found is None else (self._work.solved(found[0]) or {}).get(found[1])

    def tensors(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of the layer `name`, by their names in it; None if it is as it was, or its experts are."""
        if self._last[0] != name:
            self._last = name, self._read(name)
        return self._last[1]

    def _read(self, name: str) -> dict[str, Tensor] | None:
        if name in self._projections:
            return self._of_experts(self._projections[name])
        changed = self._work.layer(name)
        if changed is not None:
            return changed
        solved = self._solved(name)
        if solved is None:
            return None
        factors = solved.factors
        own = {"w_pivot": factors.w_pivot, "coeff": factors.coeff, "pivots": factors.pivots.to(torch.int32)}
        return {**own, **self._bias(name)}

    def _of_experts(self, projection: Projection) -> dict[str, Tensor]:
        """The tensors of the layer that a projection of all experts becomes."""
        found = [self._read(layer) or {} for layer in projection.layers]
        rank = max(len(own["w_pivot"]) for own in found)
        made = [of_rank(own, rank) for own in found]
        self._stored.weights.give_back()
        return {key: torch.stack([own[key] for own in made]) for key in made[0]}

    def read(self, name: str) -> Tensor:
        """A tensor of the compressed model, by its name in the state dict."""
        owner, _, part = name.rpartition(".")
        changed = self.tensors(owner)
        if changed is not None:
            return changed[part]
        found = self._stored.weights.read(name).clone()
        self._stored.weights.give_back()
        return found

    def _bias(self, name: str) -> dict[str, Tensor]:
        if name not in self._biased:
            return {}
        return {"bias": self._stored.weights.read(f"{name}.bias")}

    def _module(self, name: str) -> nn.Module:
        """The layer `name` with its values."""
        found = self.tensors(name)
        dense = self._stored.model.get_submodule(name)
        layer: nn.Module
        if found is None:
            found = {"weight": self._stored.weights.read(f"{name}.weight"), **self._bias(name)}
        if "w_pivot" in found:
            rank, d_in = found["w_pivot"].shape
            layer = PifaLinear(d_in, rank + len(found["coeff"]), rank, "bias" in found, device="meta")
            layer.pivots = found["pivots"]
        else:
            layer = type(dense).__new__(type(dense))
            vars(layer).update({key: value for key, value in vars(dense).items() if key != "_parameters"})
            vars(layer)["_parameters"] = {}
        for key, tensor in found.items():
            if key != "pivots":
                layer._parameters[key] = nn.Parameter(tensor, requires_grad=False)
        if isinstance(layer, PifaLinear):
            layer.restore_order()
        return layer

    def absorb(self, sites: Sequence[LayerSite]) -> dict[str, str]:
        """Moves row orders into the layers behind, site by site; those that change are kept in the working folder."""
        absorbed: dict[str, str] = {}
        for number, site in enumerate(sites):
            changed = self._work.site(number)
            if changed is None:
                layers = {name: self._module(name) for name in (*site.sources, *site.readers)}
                before = dict(layers)
                absorb_orders(self._stored.model, [site], layers)
                new = {name: _tensors_of(layer) for name, layer in layers.items() if layer is not before[name]}
                self._work.add_site(number, new)
                self._last = ("", None)
                self._stored.weights.give_back()
                changed = tuple(new)
            if changed:
                absorbed.update(dict.fromkeys(site.sources, ", ".join(site.readers)))
        return absorbed


def _without_values(layer: LayerReport, dense: nn.Module) -> PifaLinear:
    """A layer in PIFA form, on the meta device, for the place of a dense one."""
    assert layer.rank is not None  # noqa: S101  it is in PIFA form
    assert isinstance(dense.weight, Tensor)  # noqa: S101  of a linear
    (d_out, d_in), bias = layer.shape, getattr(dense, "bias", None) is not None
    return PifaLinear(d_in, d_out, layer.rank, bias, device="meta", dtype=dense.weight.dtype).eval()


def _tensors_of(layer: nn.Module) -> dict[str, Tensor]:
    own = {key: tensor.detach() for key, tensor in layer._parameters.items() if tensor is not None}
    return own | ({"pivots": layer.pivots} if isinstance(layer, PifaLinear) else {})


@own_numerics()
def compress_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    batches: Iterable[Batch],
    config: CompressConfig | None = None,
    *,
    memory: str | int = "8GiB",
    offload: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dtype: str | None = None,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Compresses a model that lies in files into another, within a given memory.

    The weights of one block of the model, its sums, and one batch are held at a time; the rest lies in the files of the
    model and in a working folder. What is done stays there if the run is stopped, by whatever, and `resume` goes on
    with it; on one machine the result is then the same bit by bit. The output appears whole, at the end.

    Processes that torchrun has started together (`torch.distributed` is initialized) share the batches and the linears;
    all read the same files, and the first writes.

    Args:
        source: a folder with config.json and safetensors files, sharded or not, or a name on the Hugging Face Hub.
        output: the folder to write; it loads like one that `save_pretrained` has written.
        batches: calibration calls, as in `compress`.
        config: what to do; None takes the defaults.
        memory: what the process may hold, as "8GiB" or in bytes; on a GPU also what it may hold there.
        offload: the working folder, on a disk with room for it (see `Plan`); None is one beside the output. It is
            deleted at the end.
        resume: whether a run that was stopped is gone on with.
        overwrite: whether a saved model at `output` may be replaced.
        dtype: of the weights, "float32", "bfloat16" or "float16"; None keeps what is stored.
        device: where to compute; None is the CPU.
        trust_remote_code: whether Python code that comes with the model may run.
        progress: called as progress(done, total, what).

    Returns:
        What was done, layer by layer.

    Raises:
        OffloadError: memory or disk do not suffice, or the working folder is in use, damaged or another run's.
        CheckpointError: the model cannot be read, or the output cannot be written.
        ConfigError, RankError, CaptureError, CalibrationError: as in `compress`.
    """
    started = time.perf_counter()
    if not resume:
        check_destination(output, overwrite=overwrite)
    stored = open_model(os.fspath(source), dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    with experts_as_layers(stored.model, in_files=True) as experts:
        calls, size = list(batches), parse_bytes(memory)
        job = _Job(stored, Path(output), calls, config or CompressConfig(), size, offload, device, experts)
        plan = job.plan()
        work = WorkingFolder(job.folder, job.fingerprint(), resume=resume, processes=job.processes)
        finished = False
        try:
            if work.has_written(job.output) and (known := read_report(job.output)) is not None:
                job.processes.wait()
                finished = True
                return Report.from_dict(known)
            check_destination(output, overwrite=overwrite)
            report = Report(job.config.method, job.config.density, params_before=count_numbers(stored.model))
            ranked = job.reconstruct(work, plan, report, progress)
            job.processes.wait()
            layers = job.assemble(work, ranked, report)
            report.seconds = time.perf_counter() - started
            job.processes.wait()  # the first deletes at the end what the others have read now
            if not job.processes.is_first:
                return report
            shard_bytes = max(plan.memory // _SHARE_OF_BLOCK, _LEAST_SHARD)
            write_model(
                stored.model,
                job.output,
                layers.read,
                report,
                source=stored.folder,
                shard_bytes=shard_bytes,
                overwrite=overwrite,
                complete=work.add_output,
            )
            finished = True
            return report
        finally:
            work.close(finished=finished)


@own_numerics()
def plan_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    batches: Iterable[Batch],
    config: CompressConfig | None = None,
    *,
    memory: str | int = "8GiB",
    offload: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """What `compress_checkpoint` with these arguments would take; nothing is written.

    Raises:
        PifaError: as there, where it would refuse to start.
    """
    stored = open_model(os.fspath(source), dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    with experts_as_layers(stored.model, in_files=True) as experts:
        calls, size = list(batches), parse_bytes(memory)
        return _Job(stored, Path(output), calls, config or CompressConfig(), size, offload, device, experts).plan()
