"""`BasisLinear`: the module that stands where a linear stood that makes heads of attention, in a basis of inputs."""

import math

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .kernels.basis_linear import basis_linear, dense_weight


class BasisLinear(nn.Module):
    """A linear layer whose last outputs are heads that each add a product to d inputs, the same for several heads.

        y = [x w_plain^T, x_inputs + x_others w_rest_1^T, x_inputs + x_others w_rest_2^T, ...] + bias

    `compact(model, attention=True)` makes them; see `pifa_compiler.head_basis`. Heads lie in groups of equal size, one
    behind the other, and each group has inputs of its own. The state dict holds `w_rest` [heads * d, in - d], `order`
    [groups, in] (int32), and where there are any `w_plain` [plain, in] and `bias` [out].

    Args:
        in_features, out_features: the shape of the dense weight is [out, in].
        head_features: d, the width of a head; 1 <= d < in.
        heads: how many; those outputs in front that belong to none are plain.
        groups: of heads.
        bias: whether there is one.
        device, dtype: of the parameters, as in `nn.Linear`.

    Raises:
        ConfigError: the sizes do not fit together.
    """

    order: Tensor
    w_plain: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        head_features: int,
        heads: int,
        groups: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        plain = out_features - heads * head_features
        if not 1 <= head_features < in_features or heads < 1 or plain < 0 or groups < 1 or heads % groups:
            raise ConfigError(
                f"{heads} heads of {head_features} outputs in {groups} groups do not fit into a weight "
                f"[{out_features}, {in_features}]; a head is narrower than the input, groups are of equal size"
            )
        self.in_features, self.out_features = in_features, out_features
        self.head_features, self.heads, self.groups = head_features, heads, groups

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.register_parameter("w_plain", parameter(plain, in_features) if plain else None)
        self.w_rest = parameter(heads * head_features, in_features - head_features)
        self.register_parameter("bias", parameter(out_features) if bias else None)
        self.register_buffer("order", torch.empty(groups, in_features, device=device, dtype=torch.int32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters as those of `nn.Linear` are drawn; the basis becomes the first inputs."""
        bound = 1 / math.sqrt(self.in_features)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        with torch.no_grad():
            self.order.copy_(torch.arange(self.in_features, device=self.order.device).expand_as(self.order))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return basis_linear(x, self.w_plain, self.w_rest, self.order, self.bias)

    @property
    def weight(self) -> Tensor:
        """The dense weight [out, in], put together at each call; differentiable."""
        return dense_weight(self.w_plain, self.w_rest, self.order)

    def extra_repr(self) -> str:
        """The shape, as `nn.Linear` shows it."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, head_features={self.head_features}, "
            f"heads={self.heads}, groups={self.groups}, bias={self.bias is not None}"
        )
