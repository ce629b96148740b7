"""Where the weights of a captured graph come from."""

from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Protocol

from torch import Tensor
from torch.fx import GraphModule


@dataclass(frozen=True)
class EntryView:
    """A part of one entry of a tensor along its first dimension: of the experts' weights those of one.

    Attributes:
        of: the name of the tensor.
        index: of the entry.
        shape, stride, offset: of the part, in numbers of the entry.
    """

    of: str
    index: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def between(cls, part: Tensor, whole: Tensor, name: str) -> "EntryView":
        """Of `part`, a view of `whole`, whose name is `name`; both may be on the meta device."""
        index, offset = divmod(int(part.storage_offset() - whole.storage_offset()), whole[0].numel())
        return cls(name, index, tuple(part.shape), part.stride(), offset)


class Weights(Protocol):
    """Gives the values of a graph's weights when they are asked for, so that not all need be in memory at once."""

    def read(self, name: str) -> Any:
        """What a `get_attr` node of target `name` reads: a weight, which needs no gradient here, or a buffer."""
        ...

    def expect(self, names: Iterable[str]) -> None:
        """Says what will be read soon, so that it can be on its way meanwhile."""
        ...

    def give_back(self) -> None:
        """Says that what was read so far is not needed any more, or can be read again."""
        ...


class WeightsInMemory:
    """The weights that a graph holds itself."""

    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm

    def read(self, name: str) -> Any:
        """See `Weights`."""
        found = attrgetter(name)(self._gm)
        return found.detach() if isinstance(found, Tensor) else found

    def expect(self, names: Iterable[str]) -> None:
        """Nothing: they are there."""

    def give_back(self) -> None:
        """Nothing: they belong to the model."""


class WeightsBesideConstants:
    """The weights of a model that is not in memory, beside the constants that its graph holds itself."""

    def __init__(self, constants: WeightsInMemory, weights: Weights) -> None:
        self._constants, self._weights = constants, weights

    def read(self, name: str) -> Any:
        """See `Weights`."""
        found = self._constants.read(name)
        return self._weights.read(name) if isinstance(found, Tensor) and found.is_meta else found

    def expect(self, names: Iterable[str]) -> None:
        """See `Weights`."""
        self._weights.expect(names)

    def give_back(self) -> None:
        """See `Weights`."""
        self._weights.give_back()
