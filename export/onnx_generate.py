"""Greedy text from a KV-cache export in onnxruntime: `pifa export --check` compares it with PyTorch's."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import onnxruntime


def generate_greedily(
    session: "onnxruntime.InferenceSession", input_ids: Tensor, attention_mask: Tensor, new_tokens: int
) -> Tensor:
    """Appends `new_tokens` tokens to every row, each the most likely one; the first pass has an empty past.

    Args:
        session: of a file that `to_onnx(..., kv_cache=True)` wrote.
        input_ids: [batch, tokens]; `attention_mask` of the same shape is 0 where a row is padded on its left.

    Returns:
        [batch, tokens + new_tokens], int64.
    """
    import numpy as np

    names = [value.name for value in session.get_outputs()]
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
    batch = input_ids.shape[0]
    past: dict[str, Any] = {
        value.name: np.zeros((batch, value.shape[1], 0, value.shape[3]), kinds[value.type])
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    tokens, mask, newest = input_ids, attention_mask, input_ids
    for _ in range(new_tokens):
        results = session.run(names, {"input_ids": newest.numpy(), "attention_mask": mask.numpy(), **past})
        past = dict(zip(past, results[1:], strict=True))
        newest = torch.from_numpy(results[0][:, -1:].argmax(-1))
        tokens = torch.cat((tokens, newest), dim=1)
        mask = torch.cat((mask, torch.ones_like(newest)), dim=1)
    return tokens
