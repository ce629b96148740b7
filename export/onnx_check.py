"""Whether an ONNX file computes what the PyTorch model computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import ExportError
from .causal_lm import CausalLm, CausalLmWithCache
from .onnx_generate import generate_greedily

if TYPE_CHECKING:
    import onnxruntime

NEW_TOKENS = 8
"""Generated in every row of the example; from the second on each reads the cache that the file itself has filled."""

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2}
"""Largest difference allowed over the largest result, by the dtype of the results; a wrong layer is off by about 1.

Sums in another order differ by more than the dtype's eps: on random tokens behind a random cache, as the example has
them, PyTorch's own float32 logits of a SmolLM2 at density 0.5 lie up to 1e-4 off those in float64.
"""


@torch.no_grad()
def largest_error(path: Path, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Runs the file in stock onnxruntime beside the module on the same arguments.

    Returns:
        The largest difference of a result from PyTorch's over the largest result, the worst of all outputs.

    Raises:
        ExportError: it is more than `TOLERANCE`, or onnxruntime refuses the file.
    """
    program = isinstance(module, torch.export.ExportedProgram)
    expected = pytree.tree_leaves((module.module(check_guards=False) if program else module)(*args, **kwargs))
    values = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    with _running(path) as session:
        names = [value.name for value in session.get_inputs()]
        results = session.run(None, {name: value.cpu().numpy() for name, value in zip(names, values, strict=True)})
    tensors = [value.cpu() for value in expected if isinstance(value, Tensor)]
    worst = 0.0
    for result, value in zip(results, tensors, strict=True):
        difference = _relative(torch.from_numpy(result), value)
        if difference > TOLERANCE.get(value.dtype, 0.0):
            raise ExportError(
                f"{path.name} does not compute what the model does: largest difference {difference:.3g} of the largest "
                f"result, wanted at most {TOLERANCE.get(value.dtype, 0.0):.3g}"
            )
        worst = max(worst, difference)
    return worst


@torch.no_grad()
def check_tokens(path: Path, module: CausalLmWithCache) -> int:
    """Generates `NEW_TOKENS` tokens greedily by the file, in stock onnxruntime and by its cache, from the example.

    Each has to be the most likely one to PyTorch's model, which reads all tokens before it at once, without a cache.
    `TOLERANCE` of the largest logit is allowed below the best: rounding decides between tokens that are as likely.

    Returns:
        Number of tokens compared, of all rows.

    Raises:
        ExportError: a token is another one, or onnxruntime does not run the file.
    """
    tokens, mask = (value.cpu() for value in module.empty_example()[:2])
    with _running(path) as session:
        generated = generate_greedily(session, tokens, mask, NEW_TOKENS)
    new = generated[:, tokens.shape[1] :]
    full_mask = torch.cat((mask, torch.ones_like(new)), dim=1)
    device = module.model.device
    logits = CausalLm(module.model)(generated.to(device), full_mask.to(device)).cpu()[:, tokens.shape[1] - 1 : -1]
    below = logits.max(-1).values - logits.gather(-1, new[..., None])[..., 0]
    allowed = TOLERANCE[logits.dtype] * logits.abs().max()
    if wrong := int((below > allowed).sum()):
        raise ExportError(
            f"{path.name} does not generate what the model does: {wrong} of {new.numel()} greedily chosen tokens are "
            f"not PyTorch's most likely ones, up to {below.max():.3g} off in the logits, wanted at most {allowed:.3g}"
        )
    return new.numel()


@contextmanager
def _running(path: Path) -> "Iterator[onnxruntime.InferenceSession]":
    """A session of stock onnxruntime; what it raises in the block is an `ExportError`."""
    import onnxruntime

    try:
        yield onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors share no base class
        raise ExportError(f"onnxruntime does not run {path.name}: {error}") from error


def _relative(result: Tensor, expected: Tensor) -> float:
    if result.shape != expected.shape:
        raise ExportError(f"the file returns {list(result.shape)} where PyTorch returns {list(expected.shape)}")
    largest = float(expected.double().abs().max()) if expected.numel() else 0.0
    difference = float((result.double() - expected.double()).abs().max()) if expected.numel() else 0.0
    return difference / (largest or 1.0)
