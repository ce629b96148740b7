"""`Enclosure`: whether the values between layers are read by the layers behind and by nothing else, on any path.

A captured graph shows the path that one call takes. Whether another reads the hidden features too (a head used in
training only, a flag, a method beside `forward`) is in the code. So the layers have to be children of one module whose
code calls each of them once, in a row of plain statements that let the values go nowhere else, and no other code of
that module or of those around it may name them. Or the layers in front are children of one module, which returns the
values, and those behind of another, which is called with them (BERT). Code outside the model, which reaches in from
there, is not seen.
"""

import ast
import inspect
from collections.abc import Collection, Sequence
from types import FunctionType

import torch
from torch import nn
from torch.fx import GraphModule

from .allowed import why_marked
from .enclosed_window import Window, is_elementwise, is_of_torch
from .module_code import ModuleCode, parents, resolve

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Enclosure:
    """The enclosures of one model; code is read once."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._code = ModuleCode()
        self._around: dict[str, tuple[list[FunctionType], list[FunctionType]]] = {}

    def why_open(self, sources: Sequence[str], readers: Sequence[str], called_by: Collection[str | None]) -> str | None:
        """Why the outputs of `sources` may have other readers than `readers`; None if they have not.

        Args:
            sources, readers: names of layers.
            called_by: names of the modules in whose code the captured graph shows them called.
        """
        parent_names = {name.rpartition(".")[0] for name in (*sources, *readers)}
        if isinstance(self.model, GraphModule):
            return self._why_open_in_graph(sources, readers)
        if set(called_by) != parent_names:
            return f"{_list(sources)} and {_list(readers)} are not called by the module that holds them"
        if len(parent_names) > 1:
            return self._why_open_between(sources, readers)
        (place,) = parent_names
        parent = self.model.get_submodule(place)
        traced = self._why_no_code(place)
        if traced is not None:
            return traced
        children = [[name.rpartition(".")[2] for name in names] for names in (sources, readers)]
        if type(parent) is nn.Sequential:
            return self._why_open_in_sequence(parent, *children) or self._why_reached(place)
        return self._why_open_in_code(place, *children)

    def _why_open_between(self, sources: Sequence[str], readers: Sequence[str]) -> str | None:
        """Of sources in one module, which returns their values, and readers in another, which is called with them."""
        (first, *more), (second, *others) = (
            sorted({name.rpartition(".")[0] for name in names}) for names in (sources, readers)
        )
        place = first.rpartition(".")[0]
        if more or others or not first or second.rpartition(".")[0] != place:
            return f"{_list(sources)} and {_list(readers)} lie in different modules"
        for name in (first, second):
            marked = why_marked(self.model.get_submodule(name))
            if marked is not None:
                return marked.replace("layer", name, 1)
        inner, outer = [name.rpartition(".")[2] for name in (*sources, *readers)], (first, second)
        children = [name.rpartition(".")[2] for name in outer]
        return (
            next((reason for name in outer if (reason := self._why_no_code(name)) is not None), None)
            or self._why_open_in_code(place, children[:1], children[1:], hands_on=True)
            or self._why_open_in_code(first, inner[: len(sources)], [])
            or self._why_open_in_code(second, [], inner[len(sources) :])
        )

    def _why_no_code(self, place: str) -> str | None:
        """Why the code of the module at `place` is not what runs there."""
        parent = self.model.get_submodule(place)
        parts = place.split(".") if place else []
        for depth in range(len(parts) + 1):
            if isinstance(self.model.get_submodule(".".join(parts[:depth])), GraphModule | torch.jit.ScriptModule):
                return "they lie in a module that was traced, which has no code to read"
        if "forward" in vars(parent):
            return f"the forward of {_called(place, parent)} is replaced on the instance"
        return None

    def _why_open_in_graph(self, sources: Sequence[str], readers: Sequence[str]) -> str | None:
        """A traced graph is all the code there is; only the modules that it calls have code of their own."""
        assert isinstance(self.model, GraphModule)  # noqa: S101  `why_open` has looked
        graph = self.model.graph
        for name in (*sources, *readers):
            mentions = [node for node in graph.nodes if f"{node.target}.".startswith(f"{name}.")]
            if [node.op for node in mentions] != ["call_module"]:
                return f"{name} is used {len(mentions)} times in the graph"
        pending = [node for node in graph.nodes if node.op == "call_module" and node.target in sources]
        while pending:
            for user in pending.pop().users:
                if user.op == "call_module" and user.target in readers:
                    continue
                if user.op == "call_module" and not is_elementwise(self.model.get_submodule(str(user.target))):
                    return f"the code of {user.target} is not known to treat all features alike"
                if user.op == "call_function" and not is_of_torch(user.target):
                    return f"the code of {user.name} is not known to treat all features alike"
                pending.append(user)
        return None

    def _why_open_in_sequence(self, parent: nn.Module, sources: list[str], readers: list[str]) -> str | None:
        names = list(parent._modules)
        first, last = min(map(names.index, sources)), max(map(names.index, readers))
        for name in names[first:last]:
            module = parent._modules[name]
            if name not in sources and module is not None and not is_elementwise(module):
                return f"{type(module).__name__} between them is not known to treat all features alike"
            if name not in sources and module is not None and (mark := why_marked(module)) is not None:
                return f"{mark.replace('layer', type(module).__name__, 1)} between them"
        return None

    def _why_open_in_code(
        self, place: str, sources: Sequence[str], readers: Sequence[str], *, hands_on: bool = False
    ) -> str | None:
        """By the code of the module at `place`; see `Window` for what it means if there are no sources or readers."""
        parent, names = self.model.get_submodule(place), {*sources, *readers}
        own = self._code.functions(parent)
        around, helpers = self._functions_around(place)
        naming = [function for function in (*own, *around, *helpers) if self._names(function, names)]
        if not naming:
            return f"the code of {_called(place, parent)} does not name them"
        if naming[0] not in own or len(naming) > 1:
            users = " and ".join(sorted(function.__qualname__ for function in naming[:2]))
            return f"{users} use {_list(sorted(set().union(*(self._names(function, names) for function in naming))))}"
        unknown = self._why_reaches((*own, *around), helpers)
        if unknown is not None:
            return unknown
        tree = self._code.tree(naming[0])
        if tree is None:
            return f"the source of {naming[0].__qualname__} is not to be had"
        if not (sources and readers) and naming[0] is not inspect.unwrap(type(parent).forward):
            return f"{naming[0].__qualname__} is not what runs when {place} is called"
        return Window(parent, naming[0], tree, sources, readers, hands_on=hands_on).why_open()

    def _why_reached(self, place: str) -> str | None:
        """Which code may reach into the sequence at `place` by an index; calls of the whole are what it is for."""
        kinds: list[nn.Module] = []
        name = place
        while name:
            kinds.insert(0, self.model.get_submodule(name))
            above, _, child = name.rpartition(".")
            parent = self.model.get_submodule(above)
            if type(parent) not in _CONTAINERS:
                around, helpers = self._functions_around(name)
                unknown = self._why_reaches(around, helpers)
                if unknown is not None:
                    return unknown
                for function in (*around, *helpers):
                    if self._names(function, {child}) and not self._only_calls(function, child, kinds):
                        return f"{function.__qualname__} may use parts of {name}"
                return None
            name = above
        return None  # the model itself is a sequence

    def _only_calls(self, function: FunctionType, name: str, kinds: Sequence[nn.Module]) -> bool:
        """Whether a function does nothing with the attribute `name`, or with what is in it, but call it as a whole."""
        tree = self._code.tree(function)
        if tree is None or name in _strings(tree):
            return False
        above = parents(tree)
        found = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == name]
        return all(_is_called(node, 0, above, tree, kinds) for node in found if resolve(node, function) is None)

    def _why_reaches(self, functions: Sequence[FunctionType], helpers: Sequence[FunctionType]) -> str | None:
        """Which function may get at modules without naming them; of helpers, those beside the modules' own code."""
        files = {function.__module__ for function in functions}
        for function in (*functions, *(helper for helper in helpers if helper.__module__ in files)):
            word = self._code.reach(function)
            if word is not None:
                return f"{function.__qualname__} may reach them by {word}"
        return None

    def _names(self, function: FunctionType, names: set[str]) -> set[str]:
        """Which of `names` a function names, but for attributes of Python modules (`F.linear`)."""
        found = names & self._code.words(function)
        tree = self._code.tree(function) if found else None
        if tree is None:
            return set(found)
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and resolve(node, function) is None]
        return found & ({node.attr for node in nodes} | _strings(tree))

    def _functions_around(self, place: str) -> tuple[list[FunctionType], list[FunctionType]]:
        """Functions of the modules around the one at `place`, and those that they and its own code call by name."""
        if place not in self._around:
            parts = place.split(".") if place else []
            modules = [self.model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
            around = [function for module in modules for function in self._code.functions(module)]
            own = self._code.functions(self.model.get_submodule(place))
            around = [function for function in dict.fromkeys(around) if function not in own]
            self._around[place] = (around, self._code.helpers([*around, *own]))
        return self._around[place]


def _is_called(
    node: ast.AST, level: int, above: dict[ast.AST, ast.AST], tree: ast.AST, kinds: Sequence[nn.Module]
) -> bool:
    """Whether an expression for `kinds[level]`, or for an element of it, is called as a whole wherever it is used."""
    user = above[node]
    if isinstance(user, ast.Call) and user.func is node:
        return type(kinds[level]) is nn.Sequential
    deeper = level + 1 < len(kinds)
    if isinstance(user, ast.Subscript) and user.value is node:
        if isinstance(user.slice, ast.Slice):
            return type(kinds[level]) is nn.ModuleList and _is_called(user, level, above, tree, kinds)
        return deeper and _is_called(user, level + 1, above, tree, kinds)
    target: ast.AST | None = None
    if isinstance(user, ast.For) and user.iter is node:
        target = user.target
    elif isinstance(user, ast.Call) and isinstance(user.func, ast.Name) and user.func.id == "enumerate":
        loop = above[user]
        if isinstance(loop, ast.For) and isinstance(loop.target, ast.Tuple) and len(loop.target.elts) == 2:
            target = loop.target.elts[1]
    if not deeper or not isinstance(target, ast.Name):
        return False
    uses = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == target.id and isinstance(n.ctx, ast.Load)]
    return all(_is_called(use, level + 1, above, tree, kinds) for use in uses)


def _strings(tree: ast.AST) -> set[str]:
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return {part for text in texts for part in text.split(".")}


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)


def _called(place: str, module: nn.Module) -> str:
    return f"{place} ({type(module).__name__})" if place else type(module).__name__
