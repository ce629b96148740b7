"""`AttentionEnclosure`: whether the heads of an attention go from its linears to its linears only, on any path.

A captured graph shows what one call does with them. Here the code says that no other call does more: what is done on
every path is what the graph shows, and what depends on a condition only moves numbers, stores heads in a cache and
reads them from there, or calls one of transformers' attention functions, which are linear in the values and know
queries and keys by their products. Code outside the model, which reaches in from there, is not seen.
"""

import ast
import inspect
import sys
from collections.abc import Collection, Sequence
from types import FunctionType

from torch import Tensor, nn
from torch.fx import GraphModule

from .allowed import why_marked
from .enclosed_window import is_of_torch
from .enclosure import Enclosure
from .module_code import resolve

_MOVES = {
    *("view", "reshape", "transpose", "permute", "contiguous", "flatten", "unflatten", "unsqueeze", "squeeze"),
    *("expand", "to", "clone", "split", "chunk", "unbind", "type_as", "float", "half", "bfloat16"),
}
_ABOUT = {"shape", "dtype", "device", "ndim", "layout", "size", "dim", "numel", "get_device", "new_empty", "new_zeros"}
_OBSERVERS = {"register_hook", "retain_grad", "backward", "register_post_accumulate_grad_hook", "share_memory_"}
_BRANCHES = (ast.If, ast.IfExp, ast.For, ast.While, ast.Try, ast.Match, ast.Lambda, ast.comprehension)


class AttentionEnclosure(Enclosure):
    """The enclosures of the attentions of one model."""

    def why_heads_open(
        self, makers: Sequence[str], readers: Sequence[str], called_by: Collection[str | None]
    ) -> str | None:
        """Why heads may have other readers; None if they have not.

        Args:
            makers: names of the layers that make values, or keys and queries.
            readers: of those that read mixed values.
            called_by: names of the modules in whose code the captured graph shows them called.
        """
        if isinstance(self.model, GraphModule):
            return "they lie in a graph; run the pass BasisAttention on it"
        parents = {name.rpartition(".")[0] for name in (*makers, *readers)}
        if set(called_by) != parents:
            return "they are not called by the module that holds them"
        made, read = ({name.rpartition(".")[2] for name in names} for names in (makers, readers))
        if len(parents) == 1:
            (place,) = parents
            return self._why_open_at(place, made, read)
        first, second = ({name.rpartition(".")[0] for name in names} for names in (makers, readers))
        place = min(first).rpartition(".")[0]
        if len(first | second) != 2 or len(first) != 1 or min(second).rpartition(".")[0] != place or not place:
            return "they lie in different modules"
        (inner,), (outer,) = first, second
        for name in (inner, outer):
            marked = why_marked(self.model.get_submodule(name))
            if marked is not None:
                return marked.replace("layer", name, 1)
        children = [{name.rpartition(".")[2]} for name in (inner, outer)]
        return (
            self._why_open_at(place, *children)
            or self._why_open_at(inner, made, set(), gives=True)
            or self._why_open_at(outer, set(), read, given=True)
        )

    def _why_open_at(
        self, place: str, made: set[str], read: set[str], *, gives: bool = False, given: bool = False
    ) -> str | None:
        """By the code of the module at `place`, whose children they are.

        Args:
            place: of the module.
            made, read: names of children.
            gives: whether the module returns the mixed values, alone or as the first of several.
            given: whether its first argument is the mixed values.
        """
        parent, names = self.model.get_submodule(place), made | read
        reason = self._why_no_code(place)
        if reason is not None:
            return reason
        own = self._code.functions(parent)
        around, helpers = self._functions_around(place)
        standard = sys.stdlib_module_names  # which knows no models
        for function in (*around, *(each for each in helpers if each.__module__.partition(".")[0] not in standard)):
            named = self._names_of_others(function, names)
            if named:
                return f"{function.__qualname__} uses {', '.join(sorted(named))}"
        naming = [function for function in own if self._names(function, names)]
        unknown = self._why_reaches((*own, *around), helpers)
        if unknown is not None:
            return unknown
        forward = inspect.unwrap(type(parent).forward)
        carriers = {function.__name__ for function in naming if function is not forward}
        if forward not in own:
            return f"the code of {place} is not what runs there"
        for function in dict.fromkeys((*naming, forward)):
            tree = self._code.tree(function)
            if tree is None:
                return f"the source of {function.__qualname__} is not to be had"
            is_forward = function is forward
            mixed = bool(read) or gives
            flow = _Flow(parent, function, made, read, carriers, gives=gives or not is_forward, mixed=mixed)
            reason = flow.why_open(tree, given=given and is_forward, first_only=gives and is_forward)
            if reason is not None:
                return f"{function.__qualname__} {reason}"
        return None

    def _names_of_others(self, function: FunctionType, names: set[str]) -> set[str]:
        """Which of `names` a function of another module names, but for children of its own that are called so."""
        found = self._names(function, names)
        tree = self._code.tree(function) if found else None
        if tree is None or not tree.args.args:
            return found
        own = tree.args.args[0].arg
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in found]
        of_others = {n.attr for n in nodes if not (isinstance(n.value, ast.Name) and n.value.id == own)}
        return of_others | (found - {node.attr for node in nodes})


class _OpenError(Exception):
    """The reason why heads are not known to stay where they are."""


class _Flow:
    """Follows heads through the code of one function, by the names that are bound to them."""

    def __init__(
        self,
        parent: nn.Module,
        function: FunctionType,
        made: set[str],
        read: set[str],
        carriers: set[str],
        *,
        gives: bool,
        mixed: bool,
    ) -> None:
        self.parent, self.function = parent, function
        self.made, self.read, self.carriers, self.gives, self.mixed = made, read, carriers, gives, mixed
        self._heads: set[str] = set()
        self._attention: set[str] = set()  # names of attention functions
        self._self, self._depth, self._first_only = "", 0, False

    def why_open(self, tree: ast.FunctionDef, *, given: bool, first_only: bool) -> str | None:
        """Why heads may go elsewhere; None if they go to the layers behind only."""
        arguments = [*tree.args.posonlyargs, *tree.args.args]
        self._self, self._first_only = (arguments[0].arg if arguments else ""), first_only
        self._heads = {argument.arg for argument in arguments[1:2]} if given else set()
        try:
            self._block(tree.body)
        except _OpenError as reason:
            return str(reason)
        return None

    def _block(self, statements: Sequence[ast.stmt]) -> None:
        for statement in statements:
            self._statement(statement)

    def _statement(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.If):
            self._branch(statement)
        elif isinstance(statement, ast.With):
            self._block(statement.body)
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            if statement.value is not None:
                self._bind(targets, statement.value)
        elif isinstance(statement, ast.Return):
            self._give(statement.value)
        elif isinstance(statement, ast.Expr):
            self._is_head(statement.value)
        elif isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name) and not self._depth:
            if self._is_head(statement.value):
                self._heads.add(statement.target.id)
        elif self._mentions(statement):
            raise _OpenError(f"has a block around them ({type(statement).__name__.lower()})")

    def _branch(self, statement: ast.If) -> None:
        if self._mentions(statement.test):
            raise _OpenError("branches on them")
        known = self._known(statement.test)
        branches = [
            branch
            for branch, taken in ((statement.body, True), (statement.orelse, False))
            if known in (None, taken) and not self._cannot_run(branch)
        ]
        if len(branches) == 1:
            self._block(branches[0])
            return
        before, ends = set(self._heads), []
        self._depth += 1
        for branch in branches:
            self._heads = set(before)
            self._block(branch)
            ends.append(self._heads)
        self._depth -= 1
        stored = [
            {n.id for s in b for n in ast.walk(s) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            for b in branches
        ]
        self._heads = set().union(*ends)
        for end, names in zip(ends, stored, strict=True):
            if (self._heads - end) & names:
                raise _OpenError(f"has something else than heads in {min((self._heads - end) & names)} on one branch")

    def _bind(self, targets: Sequence[ast.expr], value: ast.expr) -> None:
        called = value.func if isinstance(value, ast.Call) else None
        if isinstance(called, ast.Attribute) and called.attr == "get_interface":
            self._attention |= {target.id for target in targets if isinstance(target, ast.Name)}
        held = self._is_head(value)
        # Attention gives what it mixed and its probabilities, and so do modules that are an attention.
        mixes = (isinstance(called, ast.Name) and called.id in self._attention) or self._is_child(called, self.made)
        for target in targets:
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
                for each, part in zip(target.elts, value.elts, strict=True):
                    self._set(each, self._is_head(part))
            elif isinstance(target, ast.Tuple):
                for index, each in enumerate(target.elts):
                    self._set(each, held and (index == 0 or not mixes))
            else:
                self._set(target, held)

    def _set(self, target: ast.expr, held: bool) -> None:
        if isinstance(target, ast.Name):
            self._heads = self._heads | {target.id} if held else self._heads - {target.id}
        elif held:
            raise _OpenError("keeps them")

    def _give(self, value: ast.expr | None) -> None:
        parts = value.elts if isinstance(value, ast.Tuple) else [] if value is None else [value]
        held = [self._is_head(part) for part in parts]
        if any(held) and not (self.gives and not (self._first_only and any(held[1:]))):
            raise _OpenError("returns them")
        if self._first_only and not any(held):
            raise _OpenError("returns something else")

    def _is_head(self, node: ast.expr) -> bool:
        """Whether an expression is, or is made from, heads."""
        if isinstance(node, ast.Name):
            return node.id in self._heads
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.Attribute):
            if self._is_own(node):
                if node.attr in self.made | self.read:
                    raise _OpenError(f"uses {node.attr} otherwise than by calling it")
                return False
            if node.attr in ("keys", "values") and isinstance(node.value, ast.Subscript):
                return True  # of a layer of a cache, which gives back what it was given
            return self._is_head(node.value) and node.attr not in _ABOUT
        if isinstance(node, ast.Tuple | ast.List):
            return any([self._is_head(part) for part in node.elts])
        if isinstance(node, ast.Starred):
            return self._is_head(node.value)
        if not self._mentions(node):
            return False
        if self._depth or not isinstance(node, ast.Subscript | ast.BinOp | ast.UnaryOp):
            raise _OpenError("does more than move them on one branch" if self._depth else "chooses among them")
        if isinstance(node, ast.Subscript):
            return self._is_head(node.value)
        parts = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.operand]
        return any([self._is_head(part) for part in parts])

    def _call(self, node: ast.Call) -> bool:
        function = node.func
        values = [*node.args, *(keyword.value for keyword in node.keywords)]
        held = any([self._is_head(value) for value in values])
        if self._is_child(function, self.made | self.carriers):
            return True
        if self._is_child(function, self.read):
            if not held or self._depth:
                raise _OpenError(f"calls {ast.unparse(function)} with something else, or on one branch only")
            return False
        if (
            isinstance(function, ast.Attribute)
            and not self._is_own(function)
            and resolve(function, self.function) is None
        ):
            return self._method(function, held)
        if not held:
            return False
        if isinstance(function, ast.Name) and function.id in self._attention:
            return self.mixed  # of keys and queries only their products go into what it gives
        called = resolve(function, self.function)
        if called is isinstance:
            return False
        if not self._depth and is_of_torch(called) and "dropout" not in ast.unparse(function):
            return True
        if not self._depth and isinstance(called, FunctionType) and _has_no_branch(called):
            return True
        raise _OpenError(f"hands them to {ast.unparse(function)}")

    def _method(self, function: ast.Attribute, held: bool) -> bool:
        of_heads = self._is_head(function.value)
        if of_heads:
            if function.attr in _ABOUT:
                return False
            if function.attr in _OBSERVERS or not hasattr(Tensor, function.attr):
                raise _OpenError(f"calls {function.attr} of them")
            if self._depth and function.attr not in _MOVES:
                raise _OpenError("does more than move them on one branch")
            return True
        if held and function.attr == "copy_" and not self._depth:
            root = function.value
            while isinstance(root, ast.Subscript):
                root = root.value
            self._set(root, True)
            return True
        if held and function.attr != "update":
            raise _OpenError(f"hands them to {ast.unparse(function)}")
        return held  # a cache gives back what it was given, now or before

    def _mentions(self, tree: ast.AST) -> bool:
        """Whether code names the layers or heads, and more of heads than their sizes and dtype."""
        about = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in _ABOUT}
        return any(
            (isinstance(node, ast.Name) and node.id in self._heads and id(node) not in about)
            or (self._is_child(node, self.made | self.read | self.carriers))
            for node in ast.walk(tree)
        )

    def _known(self, test: ast.expr) -> bool | None:
        """What a condition is by the module's own settings; None where it is not known."""
        if isinstance(test, ast.BoolOp):
            parts = [self._known(part) for part in test.values]
            decisive = isinstance(test.op, ast.Or)
            return decisive if decisive in parts else (None if None in parts else not decisive)
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            known = self._known(test.operand)
            return None if known is None else not known
        if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Is | ast.IsNot) and len(test.ops) == 1:
            left, right = test.left, test.comparators[0]
            setting = self._setting(left)
            if setting is not None and isinstance(right, ast.Constant) and right.value is None:
                return (setting[0] is None) == isinstance(test.ops[0], ast.Is)
        setting = self._setting(test)
        return setting[0] if setting is not None and isinstance(setting[0], bool) else None

    def _setting(self, node: ast.expr) -> tuple[object] | None:
        """The value of `self.name` or `self.config.name`, with which the module was built; None for anything else."""
        if not isinstance(node, ast.Attribute) or node.attr == "training":
            return None
        owner: object = self.parent if isinstance(node.value, ast.Name) and node.value.id == self._self else None
        if isinstance(node.value, ast.Attribute) and node.value.attr == "config" and self._is_own(node.value):
            owner = getattr(self.parent, "config", None)
        held = {**vars(owner), **getattr(owner, "_modules", {})} if hasattr(owner, "__dict__") else {}
        return (held[node.attr],) if node.attr in held else None

    def _cannot_run(self, branch: Sequence[ast.stmt]) -> bool:
        """Whether a branch calls a child that the module does not have."""
        calls = [
            node.value.func for node in branch if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        ]
        return any(
            isinstance(call, ast.Attribute) and self._is_own(call) and not hasattr(self.parent, call.attr)
            for call in calls
        )

    def _is_child(self, node: ast.AST | None, names: Collection[str]) -> bool:
        return isinstance(node, ast.Attribute) and self._is_own(node) and node.attr in names

    def _is_own(self, node: ast.Attribute) -> bool:
        return isinstance(node.value, ast.Name) and node.value.id == self._self


def _has_no_branch(function: FunctionType) -> bool:
    """Whether a function does the same whenever it is called, so that a captured graph shows all it does."""
    try:
        tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return False
    return not any(isinstance(node, _BRANCHES) for node in ast.walk(tree))
