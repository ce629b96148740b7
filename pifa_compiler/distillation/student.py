"""`Student`: a copy of a model to train, in float32, and what of it comes back into the model at the end."""

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError
from ..linear import WithRowOrder
from ..modules import storage_of
from ..processes import Processes
from ..run_folder import mapped

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
    """A copy of a model that is trained, while the values of the model itself lie on disk.

    The model has the same values all the time. What it shares with the teacher, or with itself, stays where it is. As a
    context manager it brings the model's values back at the end, if `give_back` has not.

    Args:
        model: stays as it is until `give_back`.
        names: parameters that are trained.
        device: where to train.
        folder: where the model's values lie meanwhile.
        teacher: is on the device; what is not trained, and has the same values there, is not held twice.

    Raises:
        OffloadError: the folder cannot hold them.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str],
        device: torch.device,
        folder: Path,
        teacher: nn.Module | None = None,
    ) -> None:
        self.original, self.device = model, device
        chosen = dict.fromkeys(names)
        apart = _apart(model, teacher)
        self.copy = copied(model, device, trained=chosen, apart=apart, teacher=teacher)
        self.copy.eval()  # no dropout: teacher and student are compared value by value
        parameters = dict(self.copy.named_parameters())
        self.parameters: dict[str, nn.Parameter] = {name: parameters[name] for name in chosen}
        self._devices = {name: tensor.device for name, tensor in apart.items()}
        values = mapped([tensor.detach() for tensor in apart.values()], folder)
        for tensor, value in zip(apart.values(), values, strict=True):
            tensor.data = value

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.copy.zero_grad()  # for room
        self.give_back({})

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
        """Puts values into the model, each in its parameter's own dtype: all of them, or none if anything comes up.

        Its other values are in memory again then.
        """
        tensors = _tensors(self.original)
        old = {name: tensors[name].data for name in (*self._devices, *values)}
        new = {
            name: values.get(name, value).to(self._devices.get(name, value.device), value.dtype, copy=True).contiguous()
            for name, value in old.items()
        }
        try:
            for name, value in new.items():
                tensors[name].data = value
        except BaseException:
            for name, value in old.items():
                tensors[name].data = value
            raise
        self._devices = {}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _apart(model: nn.Module, teacher: nn.Module | None) -> dict[str, Tensor]:
    """What has all of a piece of memory to itself, which is free when it goes elsewhere."""
    tensors = _tensors(model)
    others = [] if teacher is None else _tensors(teacher).values()
    holders = Counter(map(storage_of, (*tensors.values(), *others)))
    return {
        name: tensor
        for name, tensor in tensors.items()
        if type(tensor) in (Tensor, nn.Parameter)
        and holders[storage_of(tensor)] == 1
        and tensor.is_contiguous()
        and tensor.untyped_storage().nbytes() == tensor.nbytes
    }


def copied(
    model: nn.Module,
    device: torch.device,
    *,
    trained: Iterable[str] = (),
    apart: Iterable[str] = (),
    teacher: nn.Module | None = None,
) -> nn.Module:
    """A copy on a device: what is `trained` or `apart` is new, all else shares memory where it can.

    With nothing to train all keep their dtypes, else they take float32. What is not trained is the teacher's
    where that holds the same.
    """
    chosen, new = set(trained), {*trained, *apart}
    known = {} if teacher is None else _tensors(teacher)
    memo: dict[int, Any] = {}
    for name, tensor in _tensors(model).items():
        data = tensor.detach()
        dtype = torch.float32 if chosen and data.is_floating_point() else data.dtype
        moved = None if name in chosen else _same(known.get(name), data.to(device, dtype))
        if moved is None:
            moved = data.to(device, dtype, copy=name in new)
        if isinstance(tensor, nn.Parameter):
            moved = nn.Parameter(moved, requires_grad=name in chosen)
        memo[id(tensor)] = moved
    return copy.deepcopy(model, memo)


def _same(known: Tensor | None, data: Tensor) -> Tensor | None:
    """The values of `known` if they are those of `data`."""
    if known is None or (known.dtype, known.device, known.shape) != (data.dtype, data.device, data.shape):
        return None
    return known.detach() if torch.equal(known, data) else None


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
