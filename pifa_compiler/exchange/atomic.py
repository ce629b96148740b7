"""`Exchange`: parts of a model are exchanged all together, or not at all."""

import copy
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import nn
from torch.fx import GraphModule

_ABSENT = object()


class Exchange:
    """A block in which a model is changed; an error or an interrupt in it leaves everything as it was before.

        with Exchange() as exchange:
            exchange.module(model, "mlp.up", layer)
            exchange.attribute(model.config, "quantization_config", settings)

    Every old value is noted before it is replaced. If the block is left by an exception, whatever it is, all old values
    are put back, the last first, and an interrupt while that goes on does not stop it: it is raised afterwards.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def module(self, model: nn.Module, name: str, new: nn.Module) -> None:
        """Puts `new` where the submodule `name` of `model` is.

        Raises:
            AttributeError: there is no such submodule.
        """
        parent_name, _, child = name.rpartition(".")
        modules = model.get_submodule(parent_name)._modules
        if child not in modules:
            raise AttributeError(f"{type(model).__name__} has no submodule {name}")
        old = modules[child]
        # An entry of its own, not set_submodule: a model's own __setattr__ has no say here, and its place stays.
        self._undo.append(lambda: modules.__setitem__(child, old))
        modules[child] = new

    def attribute(self, owner: object, name: str, value: Any) -> None:
        """Sets an attribute of any object, as `setattr` does; undone, one that was not there is gone again."""
        state = vars(owner)
        old = state.get(name, _ABSENT)
        if old is _ABSENT:
            self._undo.append(lambda: _forget(state, name))
        else:
            self._undo.append(lambda: state.__setitem__(name, old))
        setattr(owner, name, value)

    def graph(self, model: GraphModule) -> None:
        """Gives `model` a copy of its graph; what is then done to it and to the modules under `model` is undone too."""
        old = model.graph
        self._undo.append(lambda: setattr(model, "graph", old))
        for module in list(model.modules()):
            for table in (module._parameters, module._buffers, module._modules, vars(module)):
                self._remember_table(table)
        model.graph = copy.deepcopy(old)

    def _remember_table(self, table: dict[str, Any]) -> None:
        before = dict(table)

        def restore() -> None:
            # The old values first: a table that an interrupt leaves half restored is restored again.
            table.update(before)
            for key in [key for key in table if key not in before]:
                del table[key]
            for key in before:  # and the old order, which names parameters in a state dict
                table[key] = table.pop(key)

        self._undo.append(restore)

    def __enter__(self) -> "Exchange":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            try:
                self._put_back()
            finally:
                self._put_back()  # what an interrupt of the first left; nothing otherwise

    def undo(self) -> None:
        """Puts back what was there, though the block is not left by an exception."""
        self._put_back()  # what an interrupt of it leaves, leaving the block puts back

    def _put_back(self) -> None:
        interrupt: KeyboardInterrupt | None = None
        while self._undo:
            try:
                self._undo[-1]()  # can be done twice: it sets a value
                self._undo.pop()
            except KeyboardInterrupt as came:
                interrupt = came
        if interrupt is not None:
            raise interrupt


def _forget(state: dict[str, Any], name: str) -> None:
    state.pop(name, None)
