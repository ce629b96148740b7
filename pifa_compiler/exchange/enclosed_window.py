"""`Window`: the row of statements between the first call of one layer and the last call of another, and what leaves it.

The values between are followed through it by name. They may be used by arithmetic, by functions and methods of tensors
and by modules known to treat all features alike; whatever else is done with them is a reason to leave them as they are.
"""

import ast
import operator
from collections.abc import Sequence
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..passes.effects import ELEMENTWISE_MODULES
from .allowed import why_marked
from .module_code import parents, resolve

_NAMESPACES = (torch, F, torch._C._nn, torch.special, operator)
_OBSERVERS = {"register_hook", "retain_grad", "backward", "register_post_accumulate_grad_hook", "share_memory_"}
_CASTS = {"to", "type_as", "type", "float", "half", "double", "bfloat16", "contiguous", "clone"}
_VALUES = (bool, int, float, str, torch.dtype, torch.device)
_ABOUT = {"dtype", "device", "ndim"}
"""What code may look at of a layer's weight, or of what is between the layers: it is the same for any order."""

_PLAIN = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr, ast.Assert, ast.Pass, ast.Delete)


def is_elementwise(module: nn.Module) -> bool:
    """Whether a module does the same to every feature, in training too: an activation or a dropout that is known."""
    return type(module) in ELEMENTWISE_MODULES or type(module).__module__ == "transformers.activations"


def is_of_torch(function: object) -> bool:
    """Whether a function is one of torch's own on tensors."""
    if isinstance(function, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return True
    if not isinstance(function, FunctionType | BuiltinFunctionType | MethodDescriptorType):
        return False
    return any(getattr(space, function.__name__, None) is function for space in _NAMESPACES)


class _OpenError(Exception):
    """The reason why the values between the layers are not known to stay there."""


class Window:
    """The statements of `function`, a method of `parent`, from the first call of a source to the last of a reader.

    Args:
        parent: the module whose children the layers are.
        function: the one function that names them.
        tree: its source.
        sources, readers: the names of the children. Without sources the values are the function's first argument;
            without readers they are what it returns.
        hands_on: whether the readers are modules that take the values as their first argument, and others beside.
    """

    def __init__(
        self,
        parent: nn.Module,
        function: FunctionType,
        tree: ast.FunctionDef,
        sources: Sequence[str],
        readers: Sequence[str],
        *,
        hands_on: bool = False,
    ) -> None:
        self.parent, self.function, self.tree = parent, function, tree
        self.sources, self.readers = set(sources), set(readers)
        arguments = [*tree.args.posonlyargs, *tree.args.args]
        self._self = arguments[0].arg if arguments else ""
        self._above, self._hands_on = parents(tree), hands_on
        self._hidden: set[str] = set() if sources else {argument.arg for argument in arguments[1:2]}

    def why_open(self) -> str | None:
        """Why a value between the layers may go elsewhere; None if it goes to the readers only."""
        try:
            statements = self._statements()
            for statement in statements:
                self._follow(statement)
            self._check_rest(statements)
        except _OpenError as reason:
            return str(reason)
        return None

    def _statements(self) -> list[ast.stmt]:
        """The row of statements, all in one block."""
        calls: dict[str, ast.Call] = {}
        names = self.sources | self.readers
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and names & {*node.value.split(".")}:
                raise _OpenError(f"{self._where()} names a layer in a string")
            if isinstance(node, ast.Attribute) and node.attr in names and resolve(node, self.function) is None:
                call = self._above[node]
                if self._is_own(node) and self._only_asks(call):
                    continue
                if not self._is_own(node) or not isinstance(call, ast.Call) or call.func is not node:
                    raise _OpenError(f"{self._where()} uses {node.attr} otherwise than by calling it")
                if node.attr in calls:
                    raise _OpenError(f"{self._where()} calls {node.attr} twice")
                calls[node.attr] = call
        if calls.keys() != names:
            raise _OpenError(f"{self._where()} does not call all of them")
        blocks = [self._block(call) for call in calls.values()]
        body = blocks[0][0]
        if any(block is not body for block, _ in blocks):
            raise _OpenError(f"{self._where()} calls them on different branches")
        places = [place for _, place in blocks]
        if not (self.sources and self.readers) and body is not self.tree.body:
            raise _OpenError(f"{self._where()} calls them on a branch")
        if not self.readers:
            returned = [node for node in ast.walk(self.tree) if isinstance(node, ast.Return)]
            if returned != body[-1:]:
                raise _OpenError(f"{self._where()} returns on several paths")
            return body[min(places) :]
        return body[min(places) if self.sources else 0 : max(places) + 1]

    def _only_asks(self, weight: ast.AST) -> bool:
        """Whether `self.layer.weight` is there only to ask for its dtype or device, or whether it is a tensor."""
        if not isinstance(weight, ast.Attribute) or weight.attr != "weight":
            return False
        user = self._above[weight]
        if isinstance(user, ast.Attribute):
            return user.attr in _ABOUT
        if not (isinstance(user, ast.Call) and isinstance(user.func, ast.Name) and user.func.id == "isinstance"):
            return False
        return user.args[0] is weight and self._object(user.args[1]) is Tensor

    def _block(self, node: ast.AST) -> tuple[list[ast.stmt], int]:
        """The list of statements that a node is in, and where; no loop may run it again."""
        while not isinstance(node, ast.stmt):
            if isinstance(node, ast.comprehension | ast.Lambda):
                raise _OpenError(f"{self._where()} calls them in a loop or function of its own")
            node = self._above[node]
        owner = self._above[node]
        lists = [getattr(owner, field, []) for field in ("body", "orelse")]
        found = [block for block in lists if isinstance(block, list) and node in block]
        outer = owner
        while outer is not self.tree:
            if not isinstance(outer, ast.If | ast.With):
                raise _OpenError(f"{self._where()} calls them in a loop, a try or a function of its own")
            outer = self._above[outer]
        if not found:
            raise _OpenError(f"{self._where()} calls them in a condition")
        return found[0], found[0].index(node)

    def _follow(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.If):
            self._follow_branches(statement)
            return
        if not isinstance(statement, _PLAIN):
            kind = type(statement).__name__.lower()
            raise _OpenError(f"{self._where()} has a block between them ({kind})")
        if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            hidden = statement.value is not None and self._is_hidden(statement.value)
            for target in targets:
                self._assign(target, hidden, again=isinstance(statement, ast.AugAssign))
        elif isinstance(statement, ast.Return):
            hidden = statement.value is not None and self._is_hidden(statement.value)
            if hidden == bool(self.readers):
                what = "what is" if hidden else "something else than what is"
                raise _OpenError(f"{self._where()} returns {what} between them")
        elif isinstance(statement, ast.Expr):
            if self._is_hidden(statement.value):
                raise _OpenError(f"{self._where()} does something else with what is between them")
        elif self._mentions_hidden(statement):
            raise _OpenError(f"{self._where()} looks at what is between them")

    def _follow_branches(self, statement: ast.If) -> None:
        """Follows both branches of a condition; the captured graph may show neither, so that both may only cast.

        Both have to bind the same names to what is between the layers.
        """
        if self._mentions_hidden(statement.test, but_about=True):
            raise _OpenError(f"{self._where()} branches on what is between them")
        before, ends = set(self._hidden), []
        for branch in (statement.body, statement.orelse):
            self._hidden = set(before)
            for each in branch:
                self._follow_in_branch(each)
            ends.append(self._hidden)
        if ends[0] != ends[1]:
            raise _OpenError(f"{self._where()} has something else between them on one branch")

    def _follow_in_branch(self, statement: ast.stmt) -> None:
        value = statement.value if isinstance(statement, ast.Assign) else None
        while isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr in _CASTS:
            value = value.func.value
        casts = isinstance(value, ast.Name) and value.id in self._hidden
        if not casts and self._mentions_hidden(statement):
            raise _OpenError(f"{self._where()} does more than cast what is between them on one branch")
        self._follow(statement)

    def _assign(self, target: ast.expr, hidden: bool, *, again: bool) -> None:
        names = {node.id for node in ast.walk(target) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        if hidden and not isinstance(target, ast.Name):
            raise _OpenError(f"{self._where()} keeps what is between them")
        if not hidden and not isinstance(target, ast.Name) and self._mentions_hidden(target):
            raise _OpenError(f"{self._where()} writes to what is between them")
        if hidden:
            self._hidden |= names
        elif not again:
            self._hidden -= names

    def _is_hidden(self, node: ast.expr) -> bool:
        """Whether an expression is, or is made from, what is between the layers."""
        if isinstance(node, ast.Constant):
            return False
        if isinstance(node, ast.Name):
            return node.id in self._hidden
        if isinstance(node, ast.Call):
            return self._call_is_hidden(node)
        if isinstance(node, ast.Attribute):
            return not self._is_own(node) and self._is_hidden(node.value)
        if isinstance(node, ast.BinOp):
            return self._is_mixed(node.left, node.right)
        if isinstance(node, ast.UnaryOp):
            return self._is_hidden(node.operand)
        if self._mentions_hidden(node):
            raise _OpenError(f"{self._where()} chooses or gathers what is between them")
        return False

    def _is_mixed(self, *parts: ast.expr) -> bool:
        """Whether some of the operands are hidden; the others must then be the same for all features, on every path."""
        hidden = [self._is_hidden(part) for part in parts]
        for part, is_hidden in zip(parts, hidden, strict=True):
            if any(hidden) and not is_hidden and not self._is_number(part):
                raise _OpenError(f"{ast.unparse(part)}, which meets what is between them, may differ on another path")
        return any(hidden)

    def _is_number(self, node: ast.expr) -> bool:
        """Whether an expression is surely a number, a name or a type, not a tensor of features."""
        if isinstance(node, ast.BinOp):
            return self._is_number(node.left) and self._is_number(node.right)
        if isinstance(node, ast.UnaryOp):
            return self._is_number(node.operand)
        if isinstance(node, ast.Constant):
            return True
        return isinstance(self._object(node), _VALUES)

    def _object(self, node: ast.expr) -> object:
        """The object that `self.a.b` or a chain of global names stands for; None for anything else."""
        if isinstance(node, ast.Attribute) and self._is_own(node):
            tables = (self.parent._modules, self.parent._parameters, vars(self.parent))
            found = next((table[node.attr] for table in tables if node.attr in table), None)
            return 0 if isinstance(found, Tensor) and found.numel() == 1 else found
        if isinstance(node, ast.Attribute) and (owner := self._object(node.value)) is not None:
            return vars(owner).get(node.attr) if hasattr(owner, "__dict__") else None
        return resolve(node, self.function)

    def _call_is_hidden(self, node: ast.Call) -> bool:
        values = [argument.value if isinstance(argument, ast.Starred) else argument for argument in node.args]
        values += [keyword.value for keyword in node.keywords]
        function = node.func
        if isinstance(function, ast.Attribute) and self._is_own(function) and function.attr in self.sources:
            for value in values:
                self._is_hidden(value)
            return True
        if isinstance(function, ast.Attribute) and self._is_own(function) and function.attr in self.readers:
            self._hand_on(node) if self._hands_on else self._is_mixed(*values)
            return False
        if isinstance(function, ast.Attribute) and not self._is_own(function) and self._is_hidden(function.value):
            if not hasattr(Tensor, function.attr) or function.attr in _OBSERVERS:
                raise _OpenError(f"{function.attr} is called on what is between them")
            if function.attr not in _CASTS:
                self._is_mixed(function.value, *values)
            return True
        if not self._is_mixed(*values):
            if self._mentions_hidden(function):
                raise _OpenError(f"{self._where()} calls what is between them")
            return False
        self._check_called(function)
        return True

    def _hand_on(self, call: ast.Call) -> None:
        """The first argument is what is between, and no other is made from it."""
        others = [*call.args[1:], *(keyword.value for keyword in call.keywords)]
        first = call.args[0] if call.args else None
        hidden = first is not None and not isinstance(first, ast.Starred) and self._is_hidden(first)
        if not hidden or any(self._mentions_hidden(other) for other in others):
            raise _OpenError(f"{self._where()} does not hand what is between them on as the first argument alone")

    def _check_called(self, function: ast.expr) -> None:
        """What is called with a value from between the layers has to treat all features alike."""
        text, called = ast.unparse(function), self._object(function)
        if isinstance(called, nn.Module):
            if not is_elementwise(called):
                raise _OpenError(f"{text} ({type(called).__name__}) is not known to treat all features alike")
            mark = why_marked(called)
            if mark is not None:
                raise _OpenError(mark.replace("layer", text, 1))
        elif not is_of_torch(called):
            raise _OpenError(f"{text} is not known to treat all features alike")

    def _check_rest(self, statements: Sequence[ast.stmt]) -> None:
        """Nothing behind the row of statements, or in a function inside, may read what is still bound to a name."""
        inside = {id(node) for statement in statements for node in ast.walk(statement)}
        last = statements[-1]
        end = (last.end_lineno or last.lineno, last.end_col_offset or 0)
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Global | ast.Nonlocal):
                raise _OpenError(f"{self._where()} sets variables outside it")
            if not isinstance(node, ast.Name) or not isinstance(node.ctx, ast.Load) or id(node) in inside:
                continue
            if node.id in ("locals", "vars", "eval", "exec", "globals"):
                raise _OpenError(f"{self._where()} may read its variables by {node.id}")
            if node.id in self._hidden and ((node.lineno, node.col_offset) >= end or self._is_in_function(node)):
                raise _OpenError(f"{self._where()} reads {node.id}, which holds what is between them, again")

    def _is_in_function(self, node: ast.AST) -> bool:
        while node is not self.tree:
            if isinstance(node, ast.Lambda | ast.FunctionDef | ast.AsyncFunctionDef | ast.comprehension):
                return True
            node = self._above[node]
        return False

    def _mentions_hidden(self, tree: ast.AST, *, but_about: bool = False) -> bool:
        """Whether code names the layers or what is between them, or, `but_about`, more of it than dtype and device."""
        for node in ast.walk(tree):
            user = self._above[node]
            if isinstance(node, ast.Name) and node.id in self._hidden:
                asks = isinstance(user, ast.Attribute) and user.attr in _ABOUT
            elif isinstance(node, ast.Attribute) and self._is_own(node) and node.attr in self.sources | self.readers:
                asks = self._only_asks(user)
            else:
                continue
            if not (but_about and asks):
                return True
        return False

    def _is_own(self, node: ast.Attribute) -> bool:
        return isinstance(node.value, ast.Name) and node.value.id == self._self

    def _where(self) -> str:
        return self.function.__qualname__
