"""PIFA models through transformers' own `from_pretrained` and `save_pretrained`."""

import json
import os
import subprocess
import sys
import tempfile
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pifa_compiler.checkpoint import load_pretrained, save_pretrained
from pifa_compiler.checkpoint.quantizer import PifaConfig, describe
from pifa_compiler.errors import CheckpointError
from pifa_compiler.factors import factorize
from pifa_compiler.linear import PifaLinear

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

TEXT = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = {"input_ids": torch.arange(14).reshape(2, 7)}
IMAGE = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)}
MODELS = {
    "llama-tied": ("LlamaForCausalLM", {**TEXT, "intermediate_size": 48, "tie_word_embeddings": True}, IDS),
    "llama-untied": ("LlamaForCausalLM", {**TEXT, "intermediate_size": 48, "num_key_value_heads": 1}, IDS),
    "qwen2-bias": ("Qwen2ForCausalLM", {**TEXT, "intermediate_size": 40, "num_key_value_heads": 1}, IDS),
    "gpt2-conv1d": ("GPT2LMHeadModel", {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 2}, IDS),
    "mixtral-experts": (
        "MixtralForCausalLM",
        {**TEXT, "intermediate_size": 40, "num_key_value_heads": 1, "num_local_experts": 2},
        IDS,
    ),
    "bert": ("BertForMaskedLM", {**TEXT, "intermediate_size": 48}, IDS),
    "vit": (
        "ViTForImageClassification",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        | {"image_size": 16, "patch_size": 8},
        IMAGE,
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 96, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2},
        {**IDS, "decoder_input_ids": IDS["input_ids"]},
    ),
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Matrices this small cost more to share among threads than to multiply."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def dense(name, dtype=torch.float32):
    architecture, options, inputs = MODELS[name]
    torch.manual_seed(0)
    cls = getattr(transformers, architecture)
    model = cls._from_config(cls.config_class(**options), dtype=dtype).eval()
    return model, {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}


def compressed(model, skip=("lm_head", "predictions.decoder", "classifier"), rank=9):
    """Puts `PifaLinear` in place of every linear layer but those whose name holds a word of `skip`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | transformers.pytorch_utils.Conv1D) and not any(s in name for s in skip):
            weight = module.weight.data if isinstance(module, nn.Linear) else module.weight.data.T.contiguous()
            factors = factorize(weight, rank=min(rank, *weight.shape))
            model.set_submodule(name, PifaLinear.from_factors(factors, module.bias))
    return model


@torch.no_grad()
def output(model, inputs):
    return next(iter(model(**inputs).values()))


def assert_same(loaded, model, inputs):
    """Bit-equal tensors, of the same dtypes and shared alike, and bit-equal outputs."""
    got, wanted = loaded.state_dict(), model.state_dict()
    assert got.keys() == wanted.keys()
    assert [key for key in got if got[key].dtype != wanted[key].dtype or not torch.equal(got[key], wanted[key])] == []
    assert len({t.data_ptr() for t in loaded.parameters()}) == len({t.data_ptr() for t in model.parameters()})
    assert torch.equal(output(loaded, inputs), output(model, inputs))


def run(code, *arguments):
    """Runs Python on `code` in a process of its own, offline and outside the repository; (exit status, its output)."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        cwd=tempfile.gettempdir(),
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("name", MODELS)
def test_save_load_save_is_bit_equal(name, tmp_path):
    model, inputs = dense(name)
    before = output(model, inputs)
    compressed(model)
    assert not torch.equal(output(model, inputs), before)  # the layers were in use
    save_pretrained(model, tmp_path / "first")
    loaded = load_pretrained(tmp_path / "first")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert_same(loaded, model, inputs)
    save_pretrained(loaded, tmp_path / "second")
    for file in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama-tied", "gpt2-conv1d", "vit"])
def test_half_precision_keeps_its_dtype(name, dtype, tmp_path):
    model, inputs = dense(name, dtype)
    save_pretrained(compressed(model), tmp_path / "m")
    loaded = load_pretrained(tmp_path / "m")
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert_same(loaded, model, inputs)


@pytest.mark.parametrize(
    ("auto", "name"),
    [
        ("AutoModelForCausalLM", "llama-tied"),
        ("AutoModelForCausalLM", "gpt2-conv1d"),
        ("AutoModelForMaskedLM", "bert"),
        ("AutoModelForImageClassification", "vit"),
        ("AutoModelForSeq2SeqLM", "t5"),
    ],
)
def test_auto_model_from_pretrained(auto, name, tmp_path):
    model, inputs = dense(name)
    save_pretrained(compressed(model), tmp_path / "m")
    assert_same(getattr(transformers, auto).from_pretrained(tmp_path / "m"), model, inputs)


def test_from_pretrained_with_dtype_and_device_map(tmp_path):
    model, inputs = dense("llama-tied")
    save_pretrained(compressed(model), tmp_path / "m")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16, device_map="cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    layer, original = loaded.model.layers[1].mlp.up_proj, model.model.layers[1].mlp.up_proj
    assert layer.pivots.dtype == torch.int32
    assert torch.equal(layer.w_pivot, original.w_pivot.bfloat16())
    assert torch.equal(layer.order, original.order)
    assert torch.isfinite(output(loaded, inputs)).all()
    assert {p.dtype for p in load_pretrained(tmp_path / "m", dtype="float16").parameters()} == {torch.float16}


def test_from_pretrained_with_layers_left_on_disk(tmp_path):
    pytest.importorskip("accelerate")
    model, inputs = dense("llama-tied")
    save_pretrained(compressed(model), tmp_path / "m")
    on_cpu = ("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    options = {
        "device_map": {**dict.fromkeys(on_cpu, "cpu"), "model.layers.0": "disk"},
        "offload_folder": tmp_path / "o",
    }
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", **options)
    assert loaded.model.layers[0].mlp.up_proj.w_pivot.is_meta
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    with pytest.raises(CheckpointError, match="load without offload_buffers"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", **options, offload_buffers=True)


def test_plain_save_pretrained_of_a_described_and_of_a_loaded_model(tmp_path):
    model, inputs = dense("llama-tied")
    describe(compressed(model))
    model.save_pretrained(tmp_path / "first", max_shard_size="20KB")
    assert len(list((tmp_path / "first").glob("*.safetensors"))) > 2
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert_same(loaded, model, inputs)
    loaded.save_pretrained(tmp_path / "second")
    assert_same(load_pretrained(tmp_path / "second"), model, inputs)


def test_plain_save_pretrained_brings_the_ranks_up_to_date(tmp_path):
    model, inputs = dense("llama-untied")
    describe(compressed(model, skip=("lm_head", "self_attn")))
    compressed(model, rank=5)  # attention as well now, after the description
    model.save_pretrained(tmp_path / "m")
    loaded = load_pretrained(tmp_path / "m")
    assert loaded.model.layers[0].self_attn.q_proj.rank == 5
    assert_same(loaded, model, inputs)


def test_layers_left_dense_stay_dense(tmp_path):
    model, inputs = dense("llama-untied")
    save_pretrained(compressed(model, skip=("lm_head", "layers.0", "o_proj")), tmp_path / "m")
    loaded = load_pretrained(tmp_path / "m")
    kinds = {type(loaded.get_submodule(f"model.layers.{i}.self_attn.{p}_proj")) for i, p in ((0, "q"), (1, "o"))}
    assert kinds == {nn.Linear}
    assert type(loaded.model.layers[1].mlp.up_proj) is PifaLinear
    assert_same(loaded, model, inputs)


def test_full_rank_layers_have_empty_coefficients(tmp_path):
    model, inputs = dense("llama-untied")
    save_pretrained(compressed(model, skip=("lm_head", "down_proj", "up_proj", "gate_proj"), rank=32), tmp_path / "m")
    loaded = load_pretrained(tmp_path / "m")
    assert loaded.model.layers[0].self_attn.q_proj.coeff.shape == (0, 32)
    assert_same(loaded, model, inputs)


def test_a_replaced_head_is_no_longer_tied(tmp_path):
    model, inputs = dense("llama-tied")
    save_pretrained(compressed(model, skip=()), tmp_path / "m")
    loaded = load_pretrained(tmp_path / "m")
    assert type(loaded.lm_head) is PifaLinear
    assert_same(loaded, model, inputs)


def test_a_body_saved_with_a_head_loads_without_it_and_the_other_way_round(tmp_path, caplog):
    model, inputs = dense("bert")
    save_pretrained(compressed(model), tmp_path / "with")
    body = transformers.BertModel.from_pretrained(tmp_path / "with", add_pooling_layer=False)
    assert_same(body, model.bert, inputs)
    save_pretrained(body, tmp_path / "without")
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path / "without")
    assert_same(loaded.bert, model.bert, inputs)


def test_a_loaded_model_trains_and_casts_like_any_other(tmp_path):
    model, inputs = dense("llama-tied")
    save_pretrained(compressed(model), tmp_path / "m")
    loaded = load_pretrained(tmp_path / "m").train()
    loaded(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert loaded.model.layers[0].mlp.up_proj.coeff.grad.abs().max() > 0
    transformers.trainer_utils.validate_quantization_for_training(loaded)
    assert loaded.double().model.layers[0].mlp.up_proj.pivots.dtype == torch.int32
    assert loaded.half().dtype == torch.float16


@pytest.mark.parametrize("name", ["llama-untied", "gpt2-conv1d"])
def test_no_dense_weight_is_built_while_loading(name, tmp_path):
    model, _ = dense(name)
    save_pretrained(compressed(model, rank=7), tmp_path / "m")
    shapes = {(32, 32), (16, 32), (48, 32), (32, 48), (96, 32), (32, 96), (128, 32), (32, 128)}

    class Watch(TorchDispatchMode):
        built: ClassVar[set] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and not result.is_meta:
                self.built.add(tuple(result.shape))
            return result

    with Watch():
        load_pretrained(tmp_path / "m")
    expected = {tuple(p.shape) for p in model.parameters()}
    assert not (Watch.built & shapes) - expected


def test_a_dense_model_is_not_compressed_by_from_pretrained(tmp_path):
    model, _ = dense("llama-tied")
    model.save_pretrained(tmp_path / "m")
    settings = PifaConfig({"model.layers.0.mlp.up_proj": 4})
    with pytest.raises(CheckpointError, match="wanted a model in PIFA form"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", quantization_config=settings)


LOAD = "import sys, torch; model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval(); " + (
    "ids = torch.arange(14).reshape(2, 7); torch.save(model(input_ids=ids).logits.detach(), sys.argv[2])"
)
ORDERS = {
    "pifa-first": "import pifa_compiler; from transformers import AutoModelForCausalLM; ",
    "models-first": "from transformers import LlamaForCausalLM, AutoModelForCausalLM; import pifa_compiler; ",
}


@pytest.mark.parametrize("order", ORDERS)
def test_from_pretrained_works_in_every_import_order(order, tmp_path):
    model, inputs = dense("llama-tied")
    save_pretrained(compressed(model), tmp_path / "m")
    status, text = run(ORDERS[order] + LOAD, tmp_path / "m", tmp_path / "logits.pt")
    assert status == 0, text
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), output(model, inputs))


def test_import_pifa_compiler_imports_no_transformers_and_leaves_no_trace_in_it():
    code = """
import sys, pifa_compiler
heavy = {"transformers", "safetensors", "triton", "onnx", "onnxscript"} & sys.modules.keys()
assert not heavy, heavy
from pifa_compiler.checkpoint import registration
registration.install()
from transformers.quantizers import auto
assert type(auto.__loader__) is type(sys.modules["json"].__loader__) is type(auto.__spec__.loader)
assert auto.AUTO_QUANTIZER_MAPPING["pifa"].__module__ == "pifa_compiler.checkpoint.quantizer"
registration.install()
"""
    status, text = run(code)
    assert status == 0, text


def test_without_the_package_from_pretrained_refuses_instead_of_making_weights_up(tmp_path):
    model, _ = dense("llama-tied")
    save_pretrained(compressed(model), tmp_path / "ours")
    model.save_pretrained(tmp_path / "plain")
    code = """
import sys
from transformers import AutoModel, AutoModelForCausalLM
for folder in sys.argv[1:]:
    for auto in (AutoModelForCausalLM, AutoModel):
        try:
            auto.from_pretrained(folder)
        except (ValueError, RuntimeError) as error:
            print("REFUSED", type(error).__name__, error)
        else:
            sys.exit("LOADED")
"""
    status, text = run(code, tmp_path / "ours", tmp_path / "plain")
    assert status == 0, text
    refusals = [line for line in text.splitlines() if line.startswith("REFUSED")]
    assert len(refusals) == 4
    assert all("`import pifa_compiler` before from_pretrained" in line for line in refusals[:2])
    assert "Unknown quantization type, got pifa" in text


def test_the_config_is_json_with_ranks_and_versions(tmp_path):
    model, _ = dense("gpt2-conv1d")
    save_pretrained(compressed(model), tmp_path / "m")
    settings = json.loads((tmp_path / "m/config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "pifa"
    assert settings["format_version"] == 1
    assert settings["ranks"]["transformer.h.1.mlp.c_fc"] == 9
    assert settings["versions"]["torch"] == torch.__version__
    assert json.loads(json.dumps(model.config.to_dict()))["quantization_config"]["ranks"] == settings["ranks"]
