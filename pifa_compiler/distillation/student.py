"""`Student`: a copy of a model to train, in float32, and what of it comes back into the model at the end."""

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError
from ..linear import WithRowOrder
from ..processes import Processes

KINDS = ("factors", "norms", "biases")


def trained_names(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    """Names of the parameters that kinds and patterns mean, in the model's order; see `DistillConfig.train`.

    Raises:
        ConfigError: a pattern means none, or all together do.
    """
    kinds: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for place, module in model.named_modules():
        for name, parameter in module.named_parameters(place, recurse=False):
            if not parameter.is_floating_point():
                continue
            own = name.rpartition(".")[2]
            if isinstance(module, WithRowOrder) and own in ("w_pivot", "coeff"):
                kinds["factors"].add(name)
            elif "bias" in own:
                kinds["biases"].add(name)
            elif "norm" in type(module).__name__.lower():
                kinds["norms"].add(name)
    names = [name for name, parameter in model.named_parameters() if parameter.is_floating_point()]
    found: set[str] = set()
    for each in wanted:
        matching = kinds.get(each, {name for name in names if fnmatchcase(name, each)})
        if not matching and each not in KINDS:
            raise ConfigError(f"no parameter of {type(model).__name__} is called {each!r}; {names[-1]} is one of it")
        found |= matching
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has none of {', '.join(wanted)} to train: compress() it first, or name parameters"
        )
    return [name for name in names if name in found]


class Student:
    """A copy of a model that is trained; of the model itself it shares what it does not change.

    Args:
        model: stays as it is until `give_back`.
        names: parameters that are trained.
        device: where to train.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], device: torch.device) -> None:
        self.original, self.device = model, device
        chosen = dict.fromkeys(names)
        self.copy = copied(model, device, trained=chosen)
        self.copy.eval()  # no dropout: teacher and student are compared value by value
        parameters = dict(self.copy.named_parameters())
        self.parameters: dict[str, nn.Parameter] = {name: parameters[name] for name in chosen}

    @property
    def numbers(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def shard(self, mesh: Any) -> None:
        """Spreads all weights over processes; what is trained is then a part of each parameter."""
        shard(self.copy, mesh)
        parameters = dict(self.copy.named_parameters())
        self.parameters = {name: parameters[name] for name in self.parameters}

    def compute_twice(self) -> None:
        """Has values of a block's inside be computed again on the way back, and not be kept."""
        for block in blocks_of(self.copy):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)

    def values(self) -> dict[str, Tensor]:
        """What is trained, whole, by name; the tensors themselves unless they are spread over processes."""
        return {name: whole(parameter.detach()) for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def set(self, values: Mapping[str, Tensor]) -> None:
        """Takes values as `values` gave them."""
        for name, parameter in self.parameters.items():
            put(parameter, values[name])

    def give_back(self, values: Mapping[str, Tensor]) -> None:
        """Puts values into the model, each in its parameter's own dtype: all of them, or none if anything comes up."""
        parameters = dict(self.original.named_parameters())
        new = {
            name: value.to(parameters[name].device, parameters[name].dtype, copy=True).contiguous()
            for name, value in values.items()
        }
        old = {name: parameters[name].data for name in new}
        try:
            for name, value in new.items():
                parameters[name].data = value
        except BaseException:
            for name, value in old.items():
                parameters[name].data = value
            raise


def copied(model: nn.Module, device: torch.device, *, trained: Iterable[str] = ()) -> nn.Module:
    """A copy on a device: parameters `trained` are new, in float32, and all others share memory where they can.

    With nothing to train each parameter keeps its dtype, else all take float32.
    """
    chosen = set(trained)
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        data = parameter.detach()
        floating = chosen and data.is_floating_point()
        moved = data.to(device, torch.float32 if floating else data.dtype, copy=name in chosen)
        memo[id(parameter)] = nn.Parameter(moved, requires_grad=name in chosen)
    for buffer in model.buffers():
        floating = chosen and buffer.is_floating_point()
        memo[id(buffer)] = buffer.detach().to(device, torch.float32 if floating else buffer.dtype)
    return copy.deepcopy(model, memo)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The layers that a model repeats: the members of its outermost lists of modules."""
    found: list[nn.Module] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{each}.") for each in inside):
            inside.append(name)
            found += module
    return found


def shard(model: nn.Module, mesh: Any) -> None:
    """Spreads a model's weights over processes (FSDP2), block by block; gradients are means over the processes."""
    from torch.distributed.fsdp import fully_shard

    for module in (*blocks_of(model), model):
        fully_shard(module, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over processes, put together; all of them call it."""
    full: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def put(place: Tensor, value: Tensor) -> None:
    """Writes a whole tensor to one that may be spread over processes."""
    mesh = getattr(place, "device_mesh", None)
    if mesh is None:
        place.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor

    place.copy_(distribute_tensor(value.to(place.device), mesh, place.placements, src_data_rank=None))  # type: ignore[attr-defined]


def mesh_over(processes: Processes, device: torch.device) -> Any:
    """All processes of a run, in a row.

    Raises:
        ConfigError: there is one only.
    """
    if processes.size == 1:
        raise ConfigError("weights are spread over several processes: start them by torchrun, or leave shard out")
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (processes.size,))
