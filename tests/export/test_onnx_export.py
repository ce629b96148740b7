import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from expert_models import put_experts_in_pifa_form, tiny_mixtral
from graphs import low_rank
from onnx.reference import ReferenceEvaluator
from onnx_models import node_types, pifa_llama
from pifa_compiler.export import generate_greedily, onnx_check, onnx_export, session, to_onnx
from pifa_compiler.export.causal_lm import CausalLmWithCache
from tiny_models import tiny_llama
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from pifa_compiler import PifaLinear, factorize
from pifa_compiler.errors import CaptureError, ExportError
from pifa_compiler.graph.capture import capture


def pifa_mlp() -> nn.Sequential:
    """16 -> 24 -> 8, the first layer in PIFA form, with a bias."""
    first = PifaLinear.from_factors(factorize(low_rank(24, 16, rank=5)), torch.randn(24))
    return nn.Sequential(first, nn.ReLU(), nn.Linear(24, 8)).eval()


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return pifa_llama()


@pytest.fixture(scope="module")
def with_cache(llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    exported = to_onnx(llama, path, kv_cache=True, check=True)
    assert (exported.layers, exported.layers_in_order) == (14, 4)
    assert exported.tokens_checked == 2 * onnx_check.NEW_TOKENS
    return path


def run(path: Path, x: Tensor, *, native: bool) -> Tensor:
    opened = session(path, native=native, strict=native)
    return torch.from_numpy(opened.run(None, {opened.get_inputs()[0].name: x.numpy()})[0])


def test_a_module_computes_the_same_in_stock_onnxruntime_with_the_native_operator_and_in_the_reference(
    tmp_path: Path,
) -> None:
    model, x = pifa_mlp(), torch.randn(3, 16)
    tokens = torch.export.Dim("tokens")
    exported = to_onnx(model, tmp_path / "m.onnx", x, dynamic_shapes=({0: tokens},), check=True)
    assert (exported.layers, exported.layers_in_order, exported.opset) == (1, 0, 23)
    wide = torch.randn(70, 16)  # another number of tokens than the example has
    exact = model.double()(wide.double())
    model.float()
    functions, native = run(tmp_path / "m.onnx", wide, native=False), run(tmp_path / "m.onnx", wide, native=True)
    reference = ReferenceEvaluator(onnx.load(tmp_path / "m.onnx"))
    by_reference = reference.run(None, {reference.input_names[0]: wide.numpy()})[0]
    for result in (functions, native, torch.from_numpy(by_reference)):
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5)  # float32 sums of 16 and 24 terms
    assert torch.equal(functions, native)  # the same products; only what copies them differs


@pytest.mark.parametrize("shape", [(16,), (2, 0, 16), (1, 2, 3, 16)], ids=str)
def test_functions_take_any_number_of_dimensions(tmp_path: Path, shape: tuple[int, ...]) -> None:
    layer = PifaLinear.from_factors(factorize(low_rank(24, 16, rank=5))).eval()
    x = torch.randn(shape)
    to_onnx(layer, tmp_path / "m.onnx", torch.ones(shape) if x.numel() else x, check=True)
    native = run(tmp_path / "m.onnx", x, native=True)
    assert torch.equal(run(tmp_path / "m.onnx", x, native=False), native)
    torch.testing.assert_close(native, layer(x).detach(), rtol=1e-5, atol=1e-5)


def test_weights_are_stored_as_a_matmul_reads_them(tmp_path: Path) -> None:
    model = pifa_mlp()
    to_onnx(model, tmp_path / "m.onnx", torch.randn(3, 16))
    file = onnx.load(tmp_path / "m.onnx")
    (node,) = (node for node in file.graph.node if node.op_type == "PifaLinear")
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in file.graph.initializer}
    assert np.array_equal(constants[node.input[1]], model[0].w_pivot.detach().numpy().T)
    assert np.array_equal(constants[node.input[2]], model[0].coeff.detach().numpy().T)
    assert [list(array.shape) for array in constants.values() if 5 in array.shape] == [[16, 5], [5, 19]]  # once each


def test_without_functions_there_are_standard_operators_only(tmp_path: Path) -> None:
    model, x = pifa_mlp(), torch.randn(3, 16)
    to_onnx(model, tmp_path / "m.onnx", x, functions=False, external_data=False, check=True)
    file = onnx.load(tmp_path / "m.onnx")
    assert not file.functions
    assert {node.domain for node in file.graph.node} == {""}
    assert [entry.domain for entry in file.opset_import] == [""]
    assert [child.name for child in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("opset", [18])
def test_older_opsets_are_written(tmp_path: Path, opset: int) -> None:
    exported = to_onnx(pifa_mlp(), tmp_path / "m.onnx", torch.randn(3, 16), opset=opset, check=True)
    file = onnx.load(tmp_path / "m.onnx")
    assert exported.opset == opset
    versions = [
        entry.version for holder in (file, *file.functions) for entry in holder.opset_import if not entry.domain
    ]
    assert set(versions) == {opset}


def test_float16_is_exported(tmp_path: Path) -> None:
    exported = to_onnx(pifa_mlp().half(), tmp_path / "m.onnx", torch.randn(3, 16).half(), check=True)
    assert exported.error is not None
    x = torch.randn(3, 16).half()
    functions, native = run(tmp_path / "m.onnx", x, native=False), run(tmp_path / "m.onnx", x, native=True)
    # Through functions onnxruntime keeps y_p in float32 on its way; the native operator is handed float16.
    torch.testing.assert_close(native, functions, rtol=4e-3, atol=4e-3)


def test_a_captured_graph_and_an_exported_program_are_exported(tmp_path: Path) -> None:
    model, x = pifa_mlp(), torch.randn(3, 16)
    graph = capture(model, [x]).graph
    assert to_onnx(graph, tmp_path / "graph.onnx", x, check=True).layers == 1
    program = torch.export.export(model, (x,), strict=False)
    assert to_onnx(program, tmp_path / "program.onnx", check=True).layers == 1


def test_an_absorbed_order_leaves_no_gather(llama: LlamaForCausalLM, with_cache: Path) -> None:
    types = node_types(with_cache)
    assert types["PifaLinearInOrder"] == 4  # gate and up of two layers
    assert types["PifaLinear"] == 10
    bodies = {function.name: {node.op_type for node in function.node} for function in onnx.load(with_cache).functions}
    assert "Gather" not in bodies["PifaLinearInOrder"] | bodies["PifaLinear"]
    assert "Gather" in bodies["PifaScatter"]


def test_the_file_passes_the_checker_of_a_process_that_knows_nothing_of_the_domain(with_cache: Path) -> None:
    code = f"import onnx; onnx.checker.check_model({str(with_cache)!r}, full_check=True)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_inputs_and_outputs_have_the_names_that_runtimes_expect(with_cache: Path) -> None:
    opened = session(with_cache, native=False)
    parts = [f"{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert [value.name for value in opened.get_inputs()] == [
        "input_ids",
        "attention_mask",
        *(f"past_key_values.{part}" for part in parts),
    ]
    assert [value.name for value in opened.get_outputs()] == ["logits", *(f"present.{part}" for part in parts)]
    for value in opened.get_inputs()[2:]:
        assert [isinstance(size, str) for size in value.shape] == [True, False, True, False]


@pytest.mark.parametrize("native", [False, True], ids=["functions", "native"])
def test_the_cache_generates_what_the_model_does_with_left_padding(
    llama: LlamaForCausalLM, with_cache: Path, native: bool
) -> None:
    tokens = torch.randint(2, 64, (3, 6))
    mask = torch.ones_like(tokens)
    mask[0, :4], mask[1, :1] = 0, 0
    wanted = llama.generate(
        input_ids=tokens, attention_mask=mask, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(generate_greedily(session(with_cache, native=native), tokens, mask, 40), wanted)


def test_a_causal_lm_without_a_cache_gives_the_logits(tmp_path: Path) -> None:
    llama = pifa_llama(num_hidden_layers=1)
    assert to_onnx(llama, tmp_path / "m.onnx", check=True).tokens_checked is None
    tokens = torch.randint(2, 64, (1, 9))
    opened = session(tmp_path / "m.onnx")
    (logits,) = opened.run(None, {"input_ids": tokens.numpy(), "attention_mask": np.ones((1, 9), np.int64)})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), llama(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_failed_check_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export.onnx_ops, "_transpose_tensor", _twice(onnx_export.onnx_ops._transpose_tensor))
    with pytest.raises(ExportError, match="does not compute what the model does"):
        to_onnx(pifa_mlp(), tmp_path / "m.onnx", torch.randn(3, 16), check=True)
    assert list(tmp_path.iterdir()) == []


def test_the_check_refuses_a_file_that_generates_other_tokens(llama: LlamaForCausalLM, with_cache: Path) -> None:
    other = copy.deepcopy(llama)
    assert onnx_check.check_tokens(with_cache, CausalLmWithCache(other)) == 2 * onnx_check.NEW_TOKENS
    other.lm_head.weight = nn.Parameter(other.lm_head.weight.roll(1, 0))  # every token's number is one off
    with pytest.raises(ExportError, match=r"16 of 16 greedily chosen tokens are not PyTorch's most likely ones"):
        onnx_check.check_tokens(with_cache, CausalLmWithCache(other))


def test_the_check_sees_a_cache_that_is_not_read(
    llama: LlamaForCausalLM, with_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = onnx_check.generate_greedily

    def forgetful(opened: Any, tokens: Tensor, mask: Tensor, new_tokens: int) -> Tensor:
        for _ in range(new_tokens):
            tokens = torch.cat((tokens, generate(opened, tokens[:, -1:], mask[:, -1:], 1)[:, -1:]), dim=1)
        return tokens

    monkeypatch.setattr(onnx_check, "generate_greedily", forgetful)
    with pytest.raises(ExportError, match="does not generate what the model does"):
        onnx_check.check_tokens(with_cache, CausalLmWithCache(llama))


def _twice(transpose):
    import onnx_ir

    return lambda stored: onnx_ir.tensor(2 * transpose(stored).numpy())


def test_a_model_in_training_is_written_as_in_evaluation_and_stays_in_training(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    to_onnx(model, tmp_path / "m.onnx", torch.ones(1, 4), check=True)
    assert all(part.training for part in model.modules())
    assert "Dropout" not in node_types(tmp_path / "m.onnx")
    language_model = tiny_llama(num_hidden_layers=1).train()
    to_onnx(language_model, tmp_path / "n.onnx")
    assert all(part.training for part in language_model.modules())


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "options", "refused"),
    [
        (nn.Linear(4, 4).bfloat16(), {"example": torch.ones(1, 4)}, "bfloat16.*cast the model first"),
        (nn.Linear(4, 4), {"example": torch.ones(1, 4), "opset": 11}, "opset 11 is too old; choose one from 18 to 23"),
        (nn.Linear(4, 4), {"example": torch.ones(1, 4), "opset": 99}, "opset 99 is too new"),
        (nn.Linear(4, 4), {}, "no causal language model: give an example"),
        (nn.Linear(4, 4), {"example": torch.ones(1, 4), "kv_cache": True}, "kv_cache is for causal language models"),
        (nn.Linear(4, 4, device="meta"), {"example": torch.ones(1, 4)}, "meta device"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, model: nn.Module, options: dict, refused: str) -> None:
    with pytest.raises(ExportError, match=refused):
        to_onnx(model, tmp_path / "m.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_no_single_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="could not capture Branching"):
        to_onnx(Branching(), tmp_path / "m.onnx", torch.ones(1, 4))


def test_a_sliding_window_is_refused_with_a_cache(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = MistralForCausalLM(MistralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, sliding_window=4))
    with pytest.raises(ExportError, match="sliding window"):
        to_onnx(model.eval(), tmp_path / "m.onnx", kv_cache=True)


def test_an_encoder_and_decoder_is_refused(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 16, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    with pytest.raises(ExportError, match="has an encoder and a decoder"):
        to_onnx(T5ForConditionalGeneration(T5Config(**sizes)).eval(), tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("name", "made", "refused"),
    [
        ("m.onnx", "m.onnx", "exists already"),
        ("m.onnx", "m.onnx.data", "exists already"),
        ("m.bin", None, "named \\*.onnx"),
        ("file/m.onnx", "file", "is a file"),
    ],
)
def test_a_bad_path_is_refused_and_what_is_there_stays(
    tmp_path: Path, name: str, made: str | None, refused: str
) -> None:
    if made is not None:
        (tmp_path / made).write_text("mine")
    with pytest.raises(ExportError, match=refused):
        to_onnx(tiny_llama(), tmp_path / name)
    assert made is None or (tmp_path / made).read_text() == "mine"


@pytest.mark.parametrize("names", [None, ["down_proj"]], ids=["all", "down"])
def test_experts_in_pifa_form_are_refused(names: list[str] | None, tmp_path: Path) -> None:
    model = tiny_mixtral()
    put_experts_in_pifa_form(model, names=names)
    with pytest.raises(ExportError, match="has experts in PIFA form, which cannot be written as ONNX"):
        to_onnx(model, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []
