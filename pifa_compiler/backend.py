"""The `torch.compile` backend: `torch.compile(model, backend="pifa")`, found by name without importing this package.

It rewrites the captured graph by passes, in the order of `passes.DEFAULT_PASSES`, and hands it to Inductor. Layers that
are in PIFA form already are lowered; pairs of low-rank factors and single weights of deficient rank are brought into
PIFA form first, without loss. Factors made here are constants of the compiled code, so every call checks that the
weights they were made from are still the same tensors, unchanged (see `_Compiled`).
"""

import copy
import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch.fx import GraphModule
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

from . import kernels
from .errors import ConfigError, PassError
from .linear import WithRowOrder
from .passes import (
    DEFAULT_PASSES,
    FOR_DEVICE,
    FOR_GRAPH,
    FOR_WEIGHTS,
    FactorizeLinear,
    Lower,
    Record,
    Skip,
    run_passes,
)
from .passes.effects import is_plain
from .passes.factorize_linear import FULL_RANK
from .passes.weights import SUBCLASS, bind_inputs, linear_weights, tensor_at, unbind_inputs, withhold

log = logging.getLogger(__name__)

MAX_VARIANTS = 256
"""Sets of weights that one captured graph is rewritten for, such as the layers of a model compiled one by one."""

REQUIRES_GRAD = Skip("weight requires grad; call requires_grad_(False) or pifa_compiler.compact")
UNVERSIONED = Skip("weight is an inference tensor, whose changes go unseen; create it outside of inference_mode")
LIVE = Skip("weight belongs to a layer that may change")
UPDATED = Skip("weight was changed after compilation")

_COMPILED: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""What the backend returned and is still there; values mean nothing."""

_ABOUT_SPEED_ONLY = {rule.__name__ for rule in DEFAULT_PASSES if rule.is_about_speed_only}


@dataclass(frozen=True)
class _Options:
    """The options of the backend.

    Attributes:
        rank_check: look for single weights of deficient rank; costs one LU a frozen weight at compile time.
        strict: raise a `PassError` for any weight left alone other than for its full rank, and for any fallback.
        report: receives the records of all passes.
        inductor: what Inductor is configured with.
    """

    rank_check: bool = True
    strict: bool = False
    report: list[Record] = field(default_factory=list)
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode: str | None) -> "_Options":
        from torch._inductor import config, list_mode_options

        own: dict[str, Any] = {}
        inductor: dict[str, Any] = {}
        if mode is not None:
            try:
                inductor.update(list_mode_options(mode))
            except RuntimeError as error:
                raise ConfigError(f"mode {mode!r} is unknown to Inductor: {error}") from error
        known = config.get_config_copy()
        types = {"rank_check": bool, "strict": bool, "report": list}
        for name, value in (options or {}).items():
            if name in types:
                if not isinstance(value, types[name]):
                    raise ConfigError(f"option {name!r} must be a {types[name].__name__}, got {value!r}")
                own[name] = value
            elif name.replace("-", "_") in known:
                inductor[name.replace("-", "_")] = value
            else:
                raise ConfigError(f"option {name!r} is unknown; known are {sorted(types)} and Inductor's own options")
        return cls(inductor=inductor, **own)


def pifa(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compiles a captured graph by Inductor, its low-rank linears in PIFA form; a backend of `torch.compile`.

    Weights that require grad are left as they are, and so are tensors of subclasses, weights that the graph may write
    to, and whatever runs within a transform of `torch.func`; layers that are in PIFA form already can be trained. Where
    no weight is rewritten the graph goes to Inductor as it came. A weight that is changed in place after compilation
    falls back to the code without it, with a warning. In-place writes through `.data`, `.numpy()`, a storage or DLPack
    leave no trace that could be checked: call `pifa_compiler.refresh(model)` after those.

    Args:
        gm: the graph; it is not changed.
        example_inputs: what it is called with, parameters included.
        options: "rank_check" (bool, True: look for single weights of deficient rank), "strict" (bool, False: raise
            where a weight is left alone for another reason than full rank), "report" (a list that receives the passes'
            records); all others go to Inductor.
        mode: as in `torch.compile` for Inductor.

    Raises:
        ConfigError: an option is unknown, or of the wrong type.
        PassError: under "strict".
    """
    from torch._dynamo.convert_frame import compile_lock

    parsed = _Options.parse(options, mode)
    with compile_lock:  # Dynamo holds it already, others do not
        return _Compiled(gm, example_inputs, parsed)


def refresh(model: nn.Module) -> None:
    """Has PIFA layers and compiled code look at a model's weights anew, after writes that they cannot see.

    `weight.copy_(...)`, `weight.data = ...` and optimizers leave a trace, and need no refresh. In-place writes through
    `weight.data`, `weight.numpy()`, its storage or DLPack leave none, and compiled code does not see that
    `PifaLinear.pivots` were written to, in whatever way. The row order of every PIFA layer is derived again, and code
    that the backend "pifa" compiled for weights of the model is compiled again when it is called. Programs of
    `torch.export` have copies, and so has code with Inductor's option "freezing": make these again.

    Args:
        model: the module that was written to, or one that contains it.
    """
    from torch._dynamo.convert_frame import compile_lock

    for module in model.modules():
        if isinstance(module, WithRowOrder):
            module.restore_order()
    addresses = {tensor._cdata for tensor in (*model.parameters(), *model.buffers())}
    with compile_lock:
        for compiled in list(_COMPILED):
            compiled.forget(addresses)


@dataclass(frozen=True)
class _Binding:
    """A weight that a variant was compiled for.

    It is known by its address and by its storage, which is referred to weakly: another tensor may get the address of
    one that is gone, but not with the same numbers. A weak reference to the tensor itself would be simpler, but
    `torch.utils.swap_tensors` refuses tensors that have one.

    Attributes:
        position: of the graph input that holds it; None if the graph itself does.
        held: the weight if the graph itself holds it.
        address: of the weight.
        storage: of the weight.
        state: what changes when its values do; None if the variant reads them at every call.
    """

    position: int | None
    held: Tensor | None
    address: int
    storage: StorageWeakRef
    state: tuple[int, int] | None

    @classmethod
    def of(cls, tensor: Tensor, position: int | None, *, with_state: bool) -> "_Binding":
        held, storage = tensor if position is None else None, StorageWeakRef(tensor.untyped_storage())
        return cls(position, held, tensor._cdata, storage, _state(tensor) if with_state else None)

    def is_gone(self) -> bool:
        """Whether nothing has the weight's numbers any more."""
        gone: bool = self.storage.expired()
        return gone

    def tensor(self, args: Sequence[Any]) -> Tensor | None:
        """The weight, if it is the one that a call with `args` reads."""
        tensor: Tensor = args[self.position] if self.held is None else self.held  # type: ignore[index]
        return tensor if tensor._cdata == self.address and not self.is_gone() else None

    def fits(self, args: Sequence[Any]) -> bool:
        tensor = self.tensor(args)
        return tensor is not None and (self.state is None or self.state == _state(tensor))

    def is_stale(self, args: Sequence[Any]) -> bool:
        """Whether a call with `args` reads the weight, with other values."""
        return self.tensor(args) is not None and not self.fits(args)


@dataclass(frozen=True)
class _Variant:
    """The graph compiled for one set of weights."""

    bindings: tuple[_Binding, ...]
    run: Callable[..., Any]

    def fits(self, args: Sequence[Any]) -> bool:
        return all(binding.fits(args) for binding in self.bindings)

    def may_fit_again(self, args: Sequence[Any]) -> bool:
        """Whether all weights are still there; those that a call with `args` reads, with the values compiled in."""
        return not any(binding.is_gone() or binding.is_stale(args) for binding in self.bindings)


class _Compiled:
    """What the backend returns: runs the variant that was compiled for the weights it is called with.

    Dynamo shares one captured graph among all modules with the same code, such as the layers of a model compiled one by
    one, and it does not see when a weight's values change. So a call with other weights, or with changed ones, gets a
    variant of its own, where those are looked at anew. Where no weight is rewritten the graph is compiled as it came.
    Several threads may call at once: each runs the variant that it found, and only one of them compiles at a time.
    """

    def __init__(self, gm: GraphModule, example_inputs: Sequence[Any], settings: _Options) -> None:
        self._settings = settings
        self._updated: dict[int, StorageWeakRef] = {}  # of weights that were changed, as `_Binding` knows them
        self._shared: Callable[..., Any] | None = None
        self._captured, self._gm = _copy_module(gm), _copy_module(gm)
        self._fakes = [node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder")]
        bind_inputs(self._gm, example_inputs)
        self._record(run_passes(self._gm, [rule() for rule in FOR_GRAPH]))
        unbind_inputs(self._gm)
        self._current: _Variant | None = self._build(example_inputs, example_inputs)
        self._variants = [self._current]
        _COMPILED[self] = None

    def __call__(self, *args: Any) -> Any:
        variant = self._current  # read once: another thread may put its own there
        if variant is None or not variant.fits(args):
            variant = self._current = self._select(args)
        return variant.run(*args)

    def _select(self, args: Sequence[Any]) -> _Variant:
        from torch._dynamo.convert_frame import compile_lock

        with compile_lock:
            for variant in self._variants:
                if variant.fits(args):
                    return variant
            return self._add_variant(args)

    def forget(self, addresses: Collection[int]) -> None:
        """Drops what was compiled for the weights at `addresses`, or noted of them."""
        self._variants = [
            variant
            for variant in self._variants
            if not any(binding.state is not None and binding.address in addresses for binding in variant.bindings)
        ]
        self._updated = {address: each for address, each in self._updated.items() if address not in addresses}
        self._current = None

    def _add_variant(self, args: Sequence[Any]) -> _Variant:
        stale = [binding for variant in self._variants for binding in variant.bindings if binding.is_stale(args)]
        self._variants = [variant for variant in self._variants if variant.may_fit_again(args)]
        for binding in stale:
            self._fall_back(binding)
        if len(self._variants) >= MAX_VARIANTS:
            reason = Skip(f"called with more than {MAX_VARIANTS} sets of weights; further ones stay as they are")
            self._warn("graph", reason)
            positions = [i for i, arg in enumerate(args) if isinstance(arg, nn.Parameter) and is_plain(arg)]
            bindings = tuple(_Binding.of(args[i], i, with_state=False) for i in positions)
            variant = _Variant(bindings, self._dense(args))
        else:
            variant = self._build(args, self._example_inputs(args))
        self._variants.append(variant)
        return variant

    def _build(self, args: Sequence[Any], example_inputs: Sequence[Any]) -> _Variant:
        """Rewrites a copy of the graph for the weights among `args`, and compiles it."""
        gm = _copy_module(self._gm)
        bind_inputs(gm, args)
        placeholders = gm.graph.find_nodes(op="placeholder")
        position = {node: i for i, node in enumerate(placeholders)}
        before = linear_weights(gm)
        weights = {node: tensor for node in before if (tensor := tensor_at(gm, node)) is not None}
        for node, tensor in weights.items():
            if (reason := self._reason_to_leave(tensor)) is not None:
                withhold(node, reason)
        for node in gm.graph.find_nodes(op="get_attr"):
            if node not in weights:  # factors of a live layer: no binding would see them change
                withhold(node, LIVE)
        rules = [rule for rule in FOR_WEIGHTS if self._settings.rank_check or rule is not FactorizeLinear]
        self._record(run_passes(gm, [rule() for rule in rules]))
        after = linear_weights(gm)
        rewritten = {node for node, uses in before.items() if after.get(node, 0) < uses}
        bindings = tuple(
            _Binding.of(tensor, position.get(node), with_state=node in rewritten)
            for node, tensor in weights.items()
            if node in rewritten or (node in position and self._reason_to_leave(tensor) in (None, UPDATED))
        )
        if not rewritten:
            return _Variant(bindings, self._dense(args, example_inputs))
        return _Variant(bindings, self._compile(gm, args, example_inputs))

    def _dense(self, args: Sequence[Any], example_inputs: Sequence[Any] | None = None) -> Callable[..., Any]:
        """The graph with no weight rewritten; one serves all weights."""
        if self._shared is None:
            self._shared = self._compile(self._unrewritten(), args, example_inputs or self._example_inputs(args))
        return self._shared

    def _unrewritten(self) -> GraphModule:
        """The graph as it came: nothing is spelled differently for no gain."""
        return _copy_module(self._captured)

    def _compile(self, gm: GraphModule, args: Sequence[Any], example_inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._dynamo.source import SyntheticLocalSource
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx

        sources = getattr(gm, "_param_name_to_source", None)
        if sources is not None:
            for name in {**dict(gm.named_parameters()), **dict(gm.named_buffers())}:
                sources.setdefault(name, SyntheticLocalSource(f"pifa_{name}"))
        gradients = _may_need_gradients(gm, example_inputs)
        with config.patch(dict(self._settings.inductor)):  # `Lower` reads max_autotune, as Inductor will
            rules = [Lower(gradients=gradients) if rule is Lower else rule() for rule in FOR_DEVICE]
            bind_inputs(gm, args)
            self._record(run_passes(gm, rules))
        unbind_inputs(gm)
        fake_mode = detect_fake_mode(example_inputs)
        # Behind Dynamo its own context is there; a variant compiled later gets a new one with the same symbolic sizes.
        alone = TracingContext.try_get() is None and fake_mode is not None
        settings = torch.compiler.config
        tag = f"{settings.cache_key_tag}pifa-{_digest_of_kernels()}"
        tagged = settings.patch(cache_key_tag=tag)  # type: ignore[attr-defined]  # torch puts it into the module
        with tracing(TracingContext(fake_mode)) if alone else nullcontext(), tagged:
            compiled: Any = compile_fx(gm, example_inputs, config_patches=dict(self._settings.inductor))
        run: Callable[..., Any] = compiled
        return run

    def _example_inputs(self, args: Sequence[Any]) -> list[Any]:
        """Inputs to compile a further variant with: what Dynamo traced with, so that symbolic sizes stay symbolic."""
        return [arg if fake is None else fake for arg, fake in zip(args, self._fakes, strict=True)]

    def _reason_to_leave(self, tensor: Tensor) -> Skip | None:
        if not is_plain(tensor):
            return SUBCLASS
        if tensor.requires_grad:
            return REQUIRES_GRAD
        if tensor.is_inference():
            return UNVERSIONED
        storage = self._updated.get(tensor._cdata)
        return UPDATED if storage is not None and not storage.expired() else None

    def _fall_back(self, binding: _Binding) -> None:
        self._updated = {address: storage for address, storage in self._updated.items() if not storage.expired()}
        if binding.address in self._updated:
            return
        self._updated[binding.address] = binding.storage
        placeholders = self._gm.graph.find_nodes(op="placeholder")
        name = "weight" if binding.position is None else placeholders[binding.position].name
        self._warn(name, UPDATED)

    def _record(self, records: Iterable[Record]) -> None:
        for record in records:
            self._settings.report.append(record)
            if not isinstance(record.outcome, Skip):
                log.debug("%s: %s is now %s", record.rule, record.node, record.outcome)
            elif record.outcome != FULL_RANK:
                log.info("%s left %s: %s", record.rule, record.node, record.outcome.reason)
                if self._settings.strict and record.rule not in _ABOUT_SPEED_ONLY:
                    raise PassError(f"{record.rule} left {record.node}: {record.outcome.reason}; or drop strict=True")

    def _warn(self, node: str, reason: Skip) -> None:
        self._settings.report.append(Record("pifa", node, reason))
        log.warning("%s falls back to the code without PIFA: %s", node, reason.reason)
        if self._settings.strict:
            raise PassError(f"{node} falls back to the code without PIFA: {reason.reason}; or drop strict=True")


def _state(tensor: Tensor) -> tuple[int, int]:
    """What tells changed values: in-place writes count the version up, `tensor.data = other` moves the pointer."""
    return tensor._version, tensor.data_ptr()


def _may_need_gradients(gm: GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Whether anything that a graph reads requires grad while gradients are, or may be switched, on."""
    switches = gm.graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled)
    if not torch.is_grad_enabled() and not any(node.args[:1] == (True,) for node in switches):
        return False
    read = [*example_inputs, *gm.parameters(), *gm.buffers()]
    return any(isinstance(value, Tensor) and value.requires_grad for value in read)


@cache
def _digest_of_kernels() -> str:
    """Of the code of our operators. torch's caches of compiled code see their names, not how they launch kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(kernels.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _copy_module(gm: GraphModule) -> GraphModule:
    """A module of its own for passes to rewrite: the graph is copied, weights are shared."""
    new: Any = GraphModule(gm, copy.deepcopy(gm.graph))
    # What AOTAutograd reads off Dynamo's modules: where every input comes from, and which of them never move.
    new.meta = dict(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        sources: Any = gm._param_name_to_source
        new._param_name_to_source = dict(sources)
    for old, node in zip(gm.graph.find_nodes(op="placeholder"), new.graph.find_nodes(op="placeholder"), strict=True):
        # Dynamo's note of the value that it traced with, which it takes off its own graph in the end.
        node.meta.pop("grapharg", None)
        if hasattr(old, "_dynamo_source"):
            node._dynamo_source = old._dynamo_source
    module: GraphModule = new
    return module
