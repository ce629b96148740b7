"""The linear layers of a model as modules: what is one, its weight and bias, and how one is replaced."""

from typing import Any

from torch import Tensor, nn

from .basis_linear import BasisLinear
from .experts import PifaGroupedLinear
from .factors import PifaFactors
from .linear import PifaLinear
from .linear_proof import computes_linear


def is_plain_linear(module: nn.Module | None) -> bool:
    """Whether a module is a linear layer and nothing else.

    That is `nn.Linear` itself, the [in, out] `Conv1D` of GPT-2, and a subclass of `nn.Linear` whose code is shown to
    compute the same (`computes_linear`; Falcon has one). Other subclasses do more: adapters, quantized weights.
    """
    return type(module) is nn.Linear or _is_conv1d(module) or (module is not None and computes_linear(module))


_ATTRIBUTES = {*vars(nn.Linear(1, 1, device="meta")), *vars(PifaLinear(1, 1, 1, device="meta")), "nx", "nf"}


def _is_conv1d(module: nn.Module | None) -> bool:
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def weight_of(module: nn.Module) -> Tensor:
    """The weight [out, in] of a plain linear layer, detached; a view of its own."""
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"a plain linear layer was wanted, {type(module).__name__} came")
    return weight.detach().T if _is_conv1d(module) else weight.detach()


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias [out] of a linear layer, dense or in PIFA form: the parameter itself, or None."""
    bias = module.bias
    return bias if isinstance(bias, Tensor) else None


def layer_of(factors: PifaFactors, dense: nn.Module) -> PifaLinear:
    """A `PifaLinear` for the place of a plain linear layer; the bias and what was set on the layer go along."""
    weight = dense.weight
    trainable = isinstance(weight, Tensor) and weight.requires_grad
    layer = PifaLinear.from_factors(factors, bias_of(dense), trainable).train(dense.training)
    vars(layer).update({key: value for key, value in attributes_of_its_own(dense).items() if key not in vars(layer)})
    return layer


def attributes_of_its_own(layer: nn.Module) -> dict[str, Any]:
    """What was set on a linear layer beyond what every such layer has."""
    return {key: value for key, value in vars(layer).items() if key not in _ATTRIBUTES}


def replace_linear(model: nn.Module, name: str, factors: PifaFactors) -> None:
    """Puts a `PifaLinear` where the plain linear layer `name` of `model` is; its bias stays the same parameter."""
    model.set_submodule(name, layer_of(factors, model.get_submodule(name)))


def module_at(model: nn.Module, name: str) -> nn.Module | None:
    """The submodule called `name`, or None."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def storage_of(tensor: Tensor) -> tuple[str, int]:
    """What is the same for tensors that share memory."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return "object", id(tensor)  # a subclass need not have memory of its own
    storage = tensor.untyped_storage()
    return str(tensor.device), storage.data_ptr() or storage._cdata


def embedding_storages(model: nn.Module) -> set[tuple[str, int]]:
    """What `storage_of` says of the weights that embeddings read: a linear whose weight lies there is tied to one."""
    return {storage_of(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def count_numbers(model: nn.Module) -> int:
    """Parameters of a model, shared ones once, and what its layers store of pivots and orders."""
    pifa = (module for module in model.modules() if isinstance(module, PifaLinear | PifaGroupedLinear))
    pivots = sum(module.pivots.numel() for module in pifa)
    orders = sum(module.order.numel() for module in model.modules() if isinstance(module, BasisLinear))
    return sum(parameter.numel() for parameter in model.parameters()) + pivots + orders
