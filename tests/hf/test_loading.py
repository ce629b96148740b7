import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from real_model import smollm2, smollm2_file
from tiny_models import WORDS, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from pifa_compiler.errors import CheckpointError, ConfigError
from pifa_compiler.hf.loading import check_vocabulary, load_model, load_tokenizer
from pifa_compiler.hf.perplexity import perplexity
from pifa_compiler.hf.text import evaluation_batches

IDS = torch.tensor([[3, 14, 15, 9, 26]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """A GGUF file of `model` in float32, by the names and conventions of llama.cpp."""
    gguf = pytest.importorskip("gguf")
    config, heads = model.config, {"q": model.config.num_attention_heads, "k": model.config.num_key_value_heads}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_token_list(list(WORDS))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {
        "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
        "up_proj": "ffn_up", "down_proj": "ffn_down", "input_layernorm": "attn_norm", "embed_tokens": "token_embd",
        "post_attention_layernorm": "ffn_norm", "norm": "output_norm",
    }  # fmt: skip
    for name, weight in model.state_dict().items():
        *_, last, _ = name.split(".")
        if last == "lm_head":
            continue  # tied
        block = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
        values = weight.clone()
        if last in ("q_proj", "k_proj"):  # llama.cpp rotates neighbours, transformers halves
            rows = values.view(heads[last[0]], 2, -1, values.shape[1])
            values = rows.transpose(1, 2).reshape(values.shape)
        writer.add_tensor(f"{block}{names[last]}.weight", values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_folder_is_loaded_as_it_was_saved(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    for name in (folder, str(folder)):
        model = load_model(name)
        assert type(model) is LlamaForCausalLM
        assert not model.training
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model(IDS).logits, tiny_llama()(IDS).logits)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("dtype", "stored", "loaded"),
    [
        (None, torch.bfloat16, torch.bfloat16),
        ("auto", torch.float16, torch.float16),
        ("float32", torch.bfloat16, torch.float32),
        ("bfloat16", torch.float32, torch.bfloat16),
        ("float16", torch.float32, torch.float16),
    ],
)
def test_dtype_is_the_one_asked_for(
    tmp_path: Path, dtype: str | None, stored: torch.dtype, loaded: torch.dtype
) -> None:
    tiny_llama().to(stored).save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in load_model(tmp_path, dtype=dtype).parameters()} == {loaded}


def test_an_unknown_dtype_is_refused_before_anything_is_looked_for() -> None:
    with pytest.raises(ConfigError, match="unknown dtype 'int8'; choose one of auto, float32"):
        load_model("nowhere/at/all", dtype="int8")


@pytest.mark.parametrize("dtype", [None, "auto", "bfloat16"])
def test_a_gguf_file_becomes_a_plain_model_that_can_be_saved(
    tmp_path: Path, dtype: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = tiny_llama(rms_norm_eps=1e-5)
    write_gguf(tmp_path / "tiny.gguf", wanted)
    capfd.readouterr()
    model = load_model(tmp_path / "tiny.gguf", dtype=dtype)
    assert capfd.readouterr().out == ""
    assert type(model) is LlamaForCausalLM
    assert not hasattr(model.config, "quantization_config")
    assert model.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert model.generation_config.eos_token_id == 1
    for parameter in wanted.parameters():  # not wanted.to(...), which would round the rotary table as well
        parameter.data = parameter.data.to(model.dtype)
    assert torch.equal(model(IDS).logits, wanted(IDS).logits)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(load_model(tmp_path / "saved")(IDS).logits, model(IDS).logits)


def test_a_pifa_folder_is_given_to_the_checkpoint_loader(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": "pifa"}}))
    asked: list[Any] = []

    def record(*args: object, **options: object) -> torch.nn.Module:
        asked.append((args, options))
        return loaded

    monkeypatch.setattr("pifa_compiler.checkpoint.load_pretrained", record)
    loaded = torch.nn.Linear(1, 1)
    assert load_model(folder, dtype="bfloat16") is loaded
    assert asked == [((folder,), {"dtype": torch.bfloat16})]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no config.json"),
        ({"model.gguf": "x", "b.gguf": "x"}, "name one of them: b.gguf, model.gguf"),
        ({"config.json": "{"}, "config.json cannot be read"),
        ({"config.json": "{}"}, r"no \*.safetensors"),
        ({"config.json": "{}", "pytorch_model.bin": "x"}, "safetensors only"),
        ({"config.json": "{}", "model.pt": "x"}, "safetensors only"),
        ({"config.json": "{}", "model.safetensors": "x"}, "model.safetensors is truncated"),
    ],
)
def test_a_folder_without_a_model_is_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.bin", "safetensors only"),
        ("model.pt", "safetensors only"),
        ("model.safetensors", "the folder that holds config.json"),
        ("broken.gguf", "holds no model"),
    ],
)
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_text("not what the name says")
    with pytest.raises(CheckpointError, match=message):
        load_model(str(tmp_path / name))


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "../nowhere", "a/b/c", "nowhere.gguf", "a/b.bin", ""])
def test_a_missing_path_is_refused_without_asking_the_hub(name: str) -> None:
    for load in (load_model, load_tokenizer):
        with pytest.raises(CheckpointError, match="no model"):
            load(name)


@pytest.mark.parametrize("cut", ["lost", "short"])
def test_incomplete_weights_are_refused(folder: Path, cut: str) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    if cut == "lost":
        weights = load_file(file)
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, file, {"format": "pt"})
    else:
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        CheckpointError, match=r"lacks 1 weights .*layers.1.mlp.up_proj" if cut == "lost" else "is truncated"
    ):
        load_model(folder)


def test_a_model_with_its_own_code_is_refused_unless_trusted(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(settings | own))
    (folder / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(CheckpointError, match="trust_remote_code=True"):
        load_model(folder)


def test_an_unreachable_hub_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for load in (load_model, load_tokenizer):
        with pytest.raises(CheckpointError, match=r"cannot reach the Hugging Face Hub for 'no-such/model'.*its folder"):
            load("no-such/model")


def test_a_tokenizer_is_loaded_from_the_folder(folder: Path) -> None:
    tiny_tokenizer().save_pretrained(folder)
    assert load_tokenizer(folder)("w5 w6")["input_ids"] == [8, 9]


def test_a_missing_tokenizer_is_refused_naming_the_folder(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="tokenizer") as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value)


def test_a_damaged_tokenizer_is_refused(folder: Path) -> None:
    tiny_tokenizer().save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_tokenizer(folder)


def test_a_vocabulary_must_fit_into_the_embedding() -> None:
    check_vocabulary(tiny_llama(vocab_size=64), tiny_tokenizer())
    check_vocabulary(tiny_llama(vocab_size=70), tiny_tokenizer())
    with pytest.raises(ConfigError, match="largest id is 63, but the model has 63 embedding rows"):
        check_vocabulary(tiny_llama(vocab_size=63), tiny_tokenizer())


def test_loading_prints_nothing_to_stdout(folder: Path) -> None:
    tiny_tokenizer().save_pretrained(folder)
    code = "import sys; from pifa_compiler.hf.loading import *; load_model(sys.argv[1]); load_tokenizer(sys.argv[1])"
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    assert (done.stdout, done.stderr) == ("", "")


def test_transformers_settings_are_restored(folder: Path) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(folder)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.slow
def test_smollm2_is_loaded_saved_and_measured(tmp_path: Path) -> None:
    model, tokenizer = smollm2()
    check_vocabulary(model, tokenizer)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert "Paris" in tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0])
    windows = evaluation_batches("pydoc", model, tokenizer, seqlen=512, limit=4)
    assert 5 < perplexity(model, windows).perplexity < 25  # English prose about Python; a broken model has thousands
    assert smollm2_file().suffix == ".gguf"
