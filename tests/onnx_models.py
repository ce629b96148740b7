"""Small ONNX files and PIFA models for the tests of export."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import torch
from graphs import low_rank
from onnx import TensorProto, helper, numpy_helper
from tiny_models import tiny_llama
from torch import nn
from transformers import LlamaForCausalLM

from pifa_compiler import compact


def pifa_llama(**changes: object) -> LlamaForCausalLM:
    """A tiny Llama whose linears, the tied head aside, are in PIFA form; gate and up have their order absorbed."""
    model = tiny_llama(**changes)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            layer.weight.data = low_rank(*layer.weight.shape, rank=10)
    compact(model, {"input_ids": torch.randint(2, 64, (1, 4))})
    return model


def node_types(path: Path) -> Counter[str]:
    """How often each operator is in a file's graph, functions not opened."""
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def matrix(name: str, *shape: int, dtype: type = np.float32) -> onnx.TensorProto:
    """A random constant that keeps values at about their size."""
    values = np.random.default_rng(len(name) + sum(map(ord, name))).standard_normal(shape) / shape[0] ** 0.5
    return numpy_helper.from_array(values.astype(dtype), name)


def save_graph(
    path: Path,
    nodes: list[onnx.NodeProto],
    constants: list[onnx.TensorProto],
    d_in: int,
    outputs: dict[str, int],
    *,
    opset: int = 17,
    external: bool = False,
) -> Path:
    """A checked model from x [n, d_in] to outputs [n, size]."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", d_in])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name, size in outputs.items()],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(
        model,
        path,
        save_as_external_data=external,
        location=path.name + ".data" if external else None,
        size_threshold=0,
    )
    onnx.checker.check_model(str(path), full_check=True)
    return path


def low_rank_file(path: Path, **options: bool) -> Path:
    """y = x V U + c, with V [24, 8] and U [8, 32]."""
    nodes = [
        helper.make_node("MatMul", ["x", "V"], ["a"]),
        helper.make_node("MatMul", ["a", "U"], ["b"]),
        helper.make_node("Add", ["b", "c"], ["y"]),
    ]
    return save_graph(path, nodes, [matrix("V", 24, 8), matrix("U", 8, 32), matrix("c", 32)], 24, {"y": 32}, **options)
