"""Whether an ONNX file computes what the PyTorch model computes."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import ExportError

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
    import onnxruntime

    program = isinstance(module, torch.export.ExportedProgram)
    expected = pytree.tree_leaves((module.module(check_guards=False) if program else module)(*args, **kwargs))
    values = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        results = session.run(None, {name: value.cpu().numpy() for name, value in zip(names, values, strict=True)})
    except Exception as error:  # its errors share no base class
        raise ExportError(f"onnxruntime does not run {path.name}: {error}") from error
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


def _relative(result: Tensor, expected: Tensor) -> float:
    if result.shape != expected.shape:
        raise ExportError(f"the file returns {list(result.shape)} where PyTorch returns {list(expected.shape)}")
    largest = float(expected.double().abs().max()) if expected.numel() else 0.0
    difference = float((result.double() - expected.double()).abs().max()) if expected.numel() else 0.0
    return difference / (largest or 1.0)
