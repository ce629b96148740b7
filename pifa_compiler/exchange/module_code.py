"""The code of modules: the functions through which a module can be used, what they name, and their syntax trees."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

_TABLES = ("_parameters", "_buffers", "_modules")
_BUILDERS = {"__init__", "_init_weights", "init_weights", "reset_parameters", "__repr__", "extra_repr"}
"""Functions that run before a model is used, or print it; what a model computes does not come from them."""

_FRAMEWORK = (
    *("abc", "typing", "torch.nn.modules.module", "torch.nn.modules.container"),
    *("torch.fx.graph_module", "transformers.modeling_utils", "transformers.generation", "transformers.integrations"),
    *("transformers.utils", "transformers.core_model_loading", "transformers.modeling_layers", "huggingface_hub"),
    *("transformers.distributed", "transformers.models.whisper.generation_whisper"),
)
"""Where code comes from that knows no single model's layers. What it does to all modules, it does to new ones too."""

_REACHES_ALL = {"modules", "children", "named_modules", "named_children", "_modules", "get_submodule", "__dict__"}


class ModuleCode:
    """The functions of modules, read once for each class."""

    def __init__(self) -> None:
        self._of_class: dict[type, dict[str, list[FunctionType]]] = {}
        self._words: dict[CodeType, frozenset[str]] = {}
        self._trees: dict[FunctionType, ast.FunctionDef | None] = {}

    def functions(self, module: nn.Module) -> list[FunctionType]:
        """What the module's class and its bases define, and functions that were set on the module itself."""
        found = list(_functions(value for key, value in vars(module).items() if key not in _TABLES))
        overridden: list[tuple[type, list[FunctionType]]] = []
        known: set[str] = set()
        for base in type(module).__mro__:
            if base not in self._of_class:
                parts = {} if _is_framework(base.__module__) else vars(base)
                self._of_class[base] = {name: list(_functions([part])) for name, part in parts.items()}
            for name, functions in self._of_class[base].items():
                if name in known:
                    overridden.append((base, functions))
                elif name not in _BUILDERS:
                    found += functions
            known |= vars(base).keys()
        words = frozenset().union(*map(self.words, found))
        for base, functions in overridden:
            if words & {"super", base.__name__}:  # nobody else can call it
                found += functions
        return list(dict.fromkeys(found))

    def helpers(self, functions: Iterable[FunctionType]) -> list[FunctionType]:
        """The functions of the same program that `functions` call by a global name, and what those call."""
        seen = set(functions)
        found: list[FunctionType] = []
        pending = list(seen)
        while pending:
            function = pending.pop()
            for other in _functions(_named_globals(function, self.words(function))):
                if other not in seen:
                    seen.add(other)
                    found.append(other)
                    pending.append(other)
        return found

    def words(self, function: FunctionType) -> frozenset[str]:
        """Names of attributes and globals in a function's code, and the dotted parts of its strings."""
        code = function.__code__
        if code not in self._words:
            self._words[code] = frozenset(_words(code))
        return self._words[code]

    def tree(self, function: FunctionType) -> ast.FunctionDef | None:
        """The syntax tree of a function; None if its source is not to be had, or is no longer what runs."""
        if function not in self._trees:
            self._trees[function] = _tree(function)
        return self._trees[function]

    def reach(self, function: FunctionType) -> str | None:
        """The word by which a function may reach modules that it does not name; None if it has none."""
        words = self.words(function)
        found = words & _REACHES_ALL
        if found:
            return min(found)
        if words & {"getattr", "attrgetter", "vars", "eval", "exec"}:
            tree = self.tree(function)
            if tree is None or words & {"attrgetter", "vars", "eval", "exec"}:
                return "getattr"
            for call in ast.walk(tree):
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "getattr":
                    constant = len(call.args) > 1 and isinstance(call.args[1], ast.Constant)
                    if not constant and "config" not in ast.unparse(call.args[0]):
                        return "getattr"
        return None


def parents(tree: ast.AST) -> dict[ast.AST, ast.AST]:
    """The parent of every node of a syntax tree."""
    return {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}


def resolve(expression: ast.expr, function: FunctionType) -> object:
    """The object that a chain of global names stands for (`F.relu`); None for anything else."""
    if isinstance(expression, ast.Name):
        if expression.id in function.__code__.co_varnames or expression.id in function.__code__.co_cellvars:
            return None
        found: object = function.__globals__.get(expression.id)
        return found
    if isinstance(expression, ast.Attribute):
        base = resolve(expression.value, function)
        return getattr(base, expression.attr, None) if isinstance(base, ModuleType) else None
    return None


def _is_framework(module: str | None) -> bool:
    return any(str(module) == name or str(module).startswith(f"{name}.") for name in _FRAMEWORK)


def _functions(values: Iterable[Any]) -> Iterator[FunctionType]:
    """The Python functions in what classes and objects hold: methods, properties, wrappers and what they wrap."""
    pending, seen = list(values), set()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, FunctionType):
            yield value
            pending += [cell.cell_contents for cell in value.__closure__ or () if _is_function_cell(cell)]
        elif isinstance(value, property):
            pending += [value.fget, value.fset, value.fdel]
        elif isinstance(value, staticmethod | classmethod | MethodType):
            pending.append(value.__func__)
        elif isinstance(value, functools.partial | functools.partialmethod | functools.cached_property):
            pending.append(value.func)
        elif isinstance(value, dict):
            pending += [part for part in value.values() if isinstance(part, FunctionType | MethodType)]
        if callable(value) and not isinstance(value, type | nn.Module):
            pending.append(getattr(value, "__wrapped__", None))


def _is_function_cell(cell: Any) -> bool:
    try:
        return isinstance(cell.cell_contents, FunctionType | MethodType | functools.partial)
    except ValueError:  # not filled yet
        return False


def _named_globals(function: FunctionType, words: frozenset[str]) -> Iterator[Any]:
    for word in words:
        value = function.__globals__.get(word)
        if isinstance(value, FunctionType) and not (_is_of_torch(value) or _is_framework(value.__module__)):
            yield value
        elif isinstance(value, ModuleType) and value.__name__.partition(".")[0] not in ("torch", "numpy"):
            yield from (part for name in words if isinstance(part := vars(value).get(name), FunctionType))
        elif isinstance(value, type) and value.__module__ == function.__module__ and not issubclass(value, nn.Module):
            yield from vars(value).values()


def _is_of_torch(function: FunctionType) -> bool:
    return str(function.__module__).partition(".")[0] == "torch"


def _words(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield from constant.split(".")
        elif isinstance(constant, tuple):
            yield from (part for text in constant if isinstance(text, str) for part in text.split("."))
        elif isinstance(constant, CodeType):
            yield from _words(constant)


def _tree(function: FunctionType) -> ast.FunctionDef | None:
    try:
        source = textwrap.dedent("".join(inspect.getsourcelines(function.__code__)[0]))
        (tree,) = ast.parse(source).body
    except (OSError, TypeError, ValueError, SyntaxError, IndexError):
        return None
    if not isinstance(tree, ast.FunctionDef) or tree.name != function.__code__.co_name:
        return None
    return tree if _is_what_runs(tree, function) else None


def _is_what_runs(tree: ast.FunctionDef, function: FunctionType) -> bool:
    """Whether the source is still that of the code: a file may have been edited since it was imported."""
    bare = ast.FunctionDef(tree.name, tree.args, tree.body, [], None, None, lineno=1, col_offset=0)
    name = next((part for part in reversed(function.__qualname__.split(".")[:-1]) if part.isidentifier()), "Module")
    owner = ast.ClassDef(name, [], [], [bare], [], lineno=1, col_offset=0)
    future = function.__code__.co_flags & 0xFFF0000
    module = ast.fix_missing_locations(ast.Module([owner], []))
    compiled = compile(module, "source", "exec", flags=future, dont_inherit=True)
    bodies = [code for part in compiled.co_consts if isinstance(part, CodeType) for code in part.co_consts]
    found = [code for code in bodies if isinstance(code, CodeType) and code.co_name == tree.name]
    if len(found) != 1:
        return False
    closed = set(function.__code__.co_freevars) <= {"__class__"}  # otherwise what is captured there is global here
    return _fingerprint(found[0], names=closed) == _fingerprint(function.__code__, names=closed)


def _fingerprint(code: CodeType, *, names: bool) -> tuple[object, ...]:
    """What two compilations of one source share; the instructions differ by what the file has imported."""
    lines = {line for _, _, line in code.co_lines() if line is not None} - {code.co_firstlineno}
    first = min(lines, default=0)
    plain = [constant for constant in code.co_consts if not isinstance(constant, CodeType)]
    constants = [repr(constant) for constant in plain if "\n" not in str(constant)]  # docstrings are indented
    return code.co_varnames, code.co_names if names else (), constants, sorted(line - first for line in lines)
