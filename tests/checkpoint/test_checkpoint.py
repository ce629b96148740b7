"""Refusals and the all-or-nothing writing of saved models; what a sound folder gives is in test_quantizer.py."""

import errno
import json
import os
import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import pifa_compiler
from pifa_compiler import checkpoint, drafts
from pifa_compiler.checkpoint import load_pretrained, quantizer
from pifa_compiler.checkpoint import save_pretrained as save
from pifa_compiler.checkpoint.format import FORMAT_VERSION, read_report, read_settings
from pifa_compiler.errors import CheckpointError
from pifa_compiler.factors import factorize
from pifa_compiler.files import atomic_folder, check_destination
from pifa_compiler.linear import PifaLinear
from pifa_compiler.report import LayerReport, Report

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

UP = "model.layers.0.mlp.up_proj"
RANK, D_OUT, D_IN = 7, 48, 32


@pytest.fixture(scope="module")
def model():
    """A two-layer Llama whose MLPs are in PIFA form."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=D_IN, intermediate_size=D_OUT, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "mlp" in name:
            model.set_submodule(name, PifaLinear.from_factors(factorize(module.weight.data, rank=RANK)))
    return model


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "m"
    save(model, folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of a sound folder, to be damaged."""
    return shutil.copytree(saved, tmp_path / "m")


def edit_config(folder, **changes):
    """Sets entries of the config's `quantization_config`; a value of None takes the entry out."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    settings = config["quantization_config"] | changes
    config["quantization_config"] = {key: value for key, value in settings.items() if value is not None}
    path.write_text(json.dumps(config))


def edit_tensors(folder, **changes):
    """Sets tensors of the first `up_proj`; a value of None takes the tensor out."""
    path = folder / "model.safetensors"
    tensors = safetensors_torch.load_file(path) | {f"{UP}.{part}": tensor for part, tensor in changes.items()}
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    safetensors_torch.save_file(kept, path, metadata={"format": "pt"})


def assert_refused(folder, message):
    """By our loader and by transformers' own."""
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(folder)
    with pytest.raises(CheckpointError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def ascending(*rows):
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("w_pivot", torch.zeros(RANK + 1, D_IN), r"up_proj\.w_pivot: wanted \[7, 32\] for rank 7 .* got \[8, 32\]"),
        ("w_pivot", torch.zeros(RANK * D_IN), r"up_proj\.w_pivot: wanted \[7, 32\]"),
        ("w_pivot", None, r"up_proj\.w_pivot is missing"),
        ("coeff", torch.zeros(D_OUT - RANK, RANK - 1), r"up_proj\.coeff: wanted \[41, 7\] .* got \[41, 6\]"),
        ("coeff", None, r"up_proj\.coeff is missing"),
        ("pivots", None, r"up_proj\.pivots is missing"),
        ("pivots", ascending(1, 2, 3), r"up_proj\.pivots: wanted \[7\]"),
        ("pivots", ascending(0, 1, 2, 3, 4, 5, D_OUT), r"up_proj\.pivots: wanted 7 ascending .* got 0\.\.48"),
        ("pivots", ascending(-1, 1, 2, 3, 4, 5, 6), r"up_proj\.pivots: .* got -1\.\.6"),
        ("pivots", ascending(0, 1, 2, 2, 4, 5, 6), r"up_proj\.pivots: .* unsorted or repeated"),
        ("pivots", ascending(0, 2, 1, 3, 4, 5, 6), r"up_proj\.pivots: .* unsorted or repeated"),
        ("pivots", torch.arange(7.0), r"up_proj\.pivots: .* got torch.float32"),
        ("pivots", torch.arange(7), r"up_proj\.pivots: .* got torch.int64"),
        ("bias", torch.zeros(D_OUT), r"up_proj\.bias: the model has none, the file one"),
    ],
)
def test_hostile_or_damaged_tensors_are_refused(part, tensor, message, folder):
    edit_tensors(folder, **{part: tensor})
    assert_refused(folder, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"format_version": FORMAT_VERSION + 1},
            f"format {FORMAT_VERSION + 1} is newer than this pifa-compiler, which reads up to {FORMAT_VERSION}; "
            "install a newer",
        ),
        ({"format_version": None}, "wanted a format_version"),
        ({"format_version": "1"}, "wanted a format_version"),
        ({"ranks": None}, "wanted `ranks`"),
        ({"ranks": {}}, "wanted `ranks`"),
        ({"ranks": [UP]}, "wanted `ranks`"),
        ({"ranks": {UP: 0}}, "up_proj: wanted a rank of 1 or more, got 0"),
        ({"ranks": {UP: True}}, "up_proj: wanted a rank of 1 or more, got True"),
        ({"ranks": {UP: "7"}}, "up_proj: wanted a rank of 1 or more, got '7'"),
        ({"ranks": {UP: D_IN + 1}}, r"up_proj: the config says rank 33, wanted 1\.\.32"),
        ({"ranks": {UP: 7}}, "in PIFA form in the config or in the file, not in both"),
        ({"ranks": {"model.layers.2.mlp.up_proj": 7}}, r"names the layer model\.layers\.2\.mlp\.up_proj, which Llama"),
        ({"ranks": {"model.norm": 7}}, "says that this is a linear layer, the model has a LlamaRMSNorm"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(changes, message, folder):
    edit_config(folder, **changes)
    assert_refused(folder, message)


def test_a_rank_unlike_the_tensors_is_refused(folder):
    edit_config(folder, ranks=read_settings(folder)["ranks"] | {UP: RANK - 1})
    assert_refused(folder, r"up_proj\.w_pivot: wanted \[6, 32\]")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00", b'{"x": ' + b"[" * 100_000])
def test_an_unreadable_config_is_refused(content, folder):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json.*copy or save"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3}, "cannot be loaded"),
        ({"head_dim": 0}, "cannot be loaded"),
        ({"hidden_act": 7}, "cannot be loaded"),
        ({"hidden_size": "32"}, "cannot be loaded"),
        ({"architectures": 7}, "transformers has no class ''"),
        ({"architectures": [7]}, "transformers has no class ''"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000, the files hold 34 tensors"),
        ({"num_hidden_layers": 900}, "more than 1544 modules, its files hold 34 tensors"),
        ({"vocab_size": 10**12}, "a model of .* numbers, its files hold"),
        ({"_attn_implementation": "owner/kernel"}, "code that would be fetched and run"),
        ({"text_config": {"attn_implementation": "owner/kernel"}}, "code that would be fetched and run"),
    ],
    ids=str,
)
def test_a_config_of_another_model_is_refused(changes, message, folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(folder)


@pytest.mark.parametrize(
    "changes", [{"versions": True}, {"versions": {"torch": 2}}, {"method": ["svd"]}, {"density": "0.5"}], ids=str
)
def test_odd_facts_about_a_model_are_refused(changes, folder):
    edit_config(folder, **changes)
    assert_refused(folder, "it is damaged")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "huge"])
def test_what_is_no_file_of_a_model_is_refused(kind, name, folder):
    path = folder / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, 1 << 40)  # holes take no room
    with pytest.raises(CheckpointError, match=name):
        load_pretrained(folder)


def test_a_config_without_pifa_is_refused(folder):
    edit_config(folder, quant_method="gptq")
    with pytest.raises(CheckpointError, match="is not a PIFA model; load it with transformers"):
        load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        load_pretrained(folder)


def test_an_unknown_class_is_refused_without_running_code(folder):
    path = folder / "config.json"
    code = folder / "modeling_evil.py"
    code.write_text("raise SystemExit('ran')")
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps(config | {"architectures": ["Evil"], "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}})
    )
    with pytest.raises(CheckpointError, match="transformers has no class 'Evil'"):
        load_pretrained(folder)
    path.write_text(json.dumps(config | {"architectures": ["pipeline"]}))
    with pytest.raises(CheckpointError, match="transformers has no class 'pipeline'"):
        load_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(keep, folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match="truncated or no safetensors file"):
        load_pretrained(folder)


def test_a_missing_dense_tensor_is_refused(folder):
    path = folder / "model.safetensors"
    tensors = safetensors_torch.load_file(path)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    safetensors_torch.save_file(tensors, path, metadata={"format": "pt"})
    assert_refused(folder, r"tensor model\.layers\.1\.self_attn\.q_proj\.weight is missing")  # not filled at random


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("name", ["model.norm.weight", f"{UP}.w_pivot"])
def test_tensors_that_no_layer_computes_with_are_refused(name, dtype, folder):
    path = folder / "model.safetensors"
    tensors = safetensors_torch.load_file(path)
    tensors[name] = tensors[name].to(dtype)
    safetensors_torch.save_file(tensors, path, metadata={"format": "pt"})
    assert_refused(folder, f"{name}: wanted one of F64, F32, F16, BF16")


def test_a_flipped_bit_is_found_where_it_is_looked_for(model, folder):
    assert torch.equal(load_pretrained(folder, verify=True).lm_head.weight, model.lm_head.weight)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    content[8 + size + json.loads(content[8 : 8 + size])["model.norm.weight"]["data_offsets"][0]] ^= 1
    path.write_bytes(content)
    load_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"1 of 34 tensors are not what was saved, model\.norm\.weight first"):
        load_pretrained(folder, verify=True)
    (folder / "pifa_checksums.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no pifa_checksums\.json"):
        load_pretrained(folder, verify=True)


def test_a_dense_tensor_of_another_shape_is_refused(folder):
    path = folder / "model.safetensors"
    tensors = safetensors_torch.load_file(path)
    tensors["model.norm.weight"] = torch.ones(5)
    safetensors_torch.save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_pretrained(folder)


def test_missing_and_misnamed_shards_are_refused(model, tmp_path):
    folder = tmp_path / "m"
    quantizer.describe(model)
    model.save_pretrained(folder, max_shard_size="20KB")
    assert load_pretrained(folder).dtype == torch.float32
    shard = sorted(folder.glob("*.safetensors"))[1]
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for metadata in (None, [], "x"):
        index.write_text(json.dumps(content | {"metadata": metadata}))
        with pytest.raises(CheckpointError, match="no table `metadata`"):
            load_pretrained(folder)
    index.write_text(json.dumps(content))
    shard.rename(tmp_path / shard.name)
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        load_pretrained(folder)
    for name in (f"../{shard.name}", "pytorch_model.bin"):
        content["weight_map"]["model.norm.weight"] = name
        index.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match="wanted safetensors files beside it"):
            load_pretrained(folder)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="no table `weight_map`"):
        load_pretrained(folder)
    index.unlink()
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor"):
        load_pretrained(folder)


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "model.pkl"])
def test_a_pickle_is_never_loaded(name, folder, tmp_path):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    assert_refused(folder, rf"{name} is a pickle .* wanted model\.safetensors")
    with pytest.raises(CheckpointError, match="is a pickle, which is never loaded"):
        load_pretrained(folder / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["nothing-here", "/nothing/here", "./a/b", "a/b/c", ""])
def test_a_folder_that_does_not_exist_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"does not exist"):
        load_pretrained(name)


def test_save_refuses_what_it_cannot_save(model, tmp_path):
    with pytest.raises(CheckpointError, match="wanted a Hugging Face model, got Linear"):
        save(nn.Linear(2, 2), tmp_path / "m")
    small = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=9, hidden_size=16, num_attention_heads=2, num_hidden_layers=0)
    )
    with pytest.raises(CheckpointError, match="no layer of this model is in PIFA form"):
        save(small, tmp_path / "m")
    with torch.device("meta"):
        small.lm_head = PifaLinear(16, 9, 3)
    with pytest.raises(CheckpointError, match=r"lm_head\.w_pivot has no values"):
        save(small, tmp_path / "m")
    small.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(CheckpointError, match="quantized by another method"):
        save(small, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_an_existing_folder_unless_told_to_replace_it(model, folder):
    (folder / "mine.txt").write_text("x")
    with pytest.raises(CheckpointError, match="exists already; choose another name, or say overwrite"):
        save(model, folder)
    assert (folder / "mine.txt").exists()
    save(model, folder, overwrite=True)
    assert not (folder / "mine.txt").exists()
    assert os.listdir(folder.parent) == [folder.name]
    load_pretrained(folder)


def test_overwrite_does_not_replace_what_no_save_has_written(model, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(CheckpointError, match=r"holds no saved model.*no config\.json.*not replaced"):
        save(model, tmp_path / "thesis", overwrite=True)
    with pytest.raises(CheckpointError, match="is a file"):
        save(model, tmp_path / "thesis" / "chapter.tex", overwrite=True)
    with pytest.raises(CheckpointError, match=r"chapter\.tex"):
        save(model, tmp_path / "thesis" / "chapter.tex" / "m")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "x"


def test_an_empty_folder_and_a_link_to_a_folder_are_written_into(model, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").exists()


def test_a_place_that_is_not_writable_is_refused_before_anything_is_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(CheckpointError, match="is not writable"):
        save(model, tmp_path / "new" / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_with_too_little_room_is_refused_before_anything_is_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"needs [\d,]{5,} bytes and 1,000 are free"):
        save(model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(params=["writer", "weights", "card", "rename"])
def failing(request, monkeypatch):
    """Makes saving fail with a given error at one of four places; returns how."""

    def arm(error):
        def fail(*args, **kwargs):
            raise error

        if request.param == "writer":
            monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", fail)
        elif request.param == "weights":
            written = safetensors_torch.save_file

            def write_and_fail(*args, **kwargs):
                written(*args, **kwargs)
                raise error

            monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", write_and_fail)
        elif request.param == "card":
            monkeypatch.setattr(checkpoint, "_model_card", fail)
        else:
            rename = type(checkpoint.Path()).rename

            def fail_on_the_last(path, target):
                if path.parent.name == "new":
                    raise error
                return rename(path, target)

            monkeypatch.setattr(drafts, "_renameat2", lambda *_: errno.ENOSYS)
            monkeypatch.setattr(type(checkpoint.Path()), "rename", fail_on_the_last)

    return arm


@pytest.mark.parametrize("exists", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), CheckpointError, "no space left on the disk"),
        (PermissionError(errno.EACCES, "Permission denied"), CheckpointError, "Permission denied.*permissions"),
        (KeyboardInterrupt("now"), KeyboardInterrupt, "now"),
    ],
    ids=["full", "denied", "interrupt"],
)
def test_a_save_that_fails_leaves_everything_as_it_was(
    error, raised, message, exists, failing, model, folder, tmp_path
):
    target = folder if exists else tmp_path / "new"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    failing(error)
    with pytest.raises(raised, match=message):
        save(model, target, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert os.listdir(tmp_path) == [folder.name]


def test_the_disk_runs_full_inside_the_safetensors_writer(model, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    safetensors = pytest.importorskip("safetensors")
    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", fail)
    with pytest.raises(CheckpointError, match="no space left on the disk"):
        save(model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_atomic_folder_appears_only_when_complete(tmp_path):
    with atomic_folder(tmp_path / "a" / "b") as partial:
        (partial / "x").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "x").read_text() == "1"
    assert os.listdir(tmp_path / "a") == ["b"]


def test_a_model_that_was_to_be_replaced_when_the_process_was_killed_is_loaded(model, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    draft, lock = drafts._new_draft(folder.parent)
    (draft.new / folder.name).mkdir(parents=True)
    draft.old.mkdir()
    draft._moving.write_text(json.dumps([folder.name]))
    folder.rename(draft.old / folder.name)
    with pytest.raises(CheckpointError, match="does not exist"):  # the process may still go on
        load_pretrained(folder)
    os.close(lock)
    with pytest.warns(UserWarning, match="is as it was before: a process that was replacing it was killed"):
        load_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(folder.parent) == [folder.name]


def test_check_destination_accepts_what_can_be_written(tmp_path, folder):
    check_destination(tmp_path / "new" / "deep")
    check_destination(folder, overwrite=True)
    assert not (tmp_path / "new").exists()


def test_the_report_goes_into_the_config_and_beside_it(model, tmp_path):
    layer = LayerReport(UP, (D_OUT, D_IN), RANK, None, True, D_OUT * D_IN, 700, error=0.25)
    report = Report("mpifa", 0.5, [layer], params_before=10, params_after=7)
    save(model, tmp_path / "m", report=report)
    assert read_report(tmp_path / "m") == json.loads(json.dumps(report.to_dict()))
    settings = read_settings(tmp_path / "m")
    assert (settings["method"], settings["density_requested"]) == ("mpifa", 0.5)
    assert settings["density"] == report.density
    assert settings["ranks"] == {name: RANK for name in settings["ranks"]}
    assert len(settings["ranks"]) == 6
    loaded = load_pretrained(tmp_path / "m")
    loaded.save_pretrained(tmp_path / "again")
    assert read_settings(tmp_path / "again") == settings
    assert read_report(tmp_path / "again") is None
    card = (tmp_path / "m" / "README.md").read_text()
    for words in ("import pifa_compiler", "LlamaForCausalLM", "mpifa", "asked for: 0.5", f"{report.density:.4f}"):
        assert words in card


def test_the_tokenizer_is_saved_beside_the_model(model, tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    save(model, tmp_path / "m", tokenizer=Tokenizer())
    assert (tmp_path / "m" / "tokenizer.json").exists()


class PairsConfig(transformers.PretrainedConfig):
    model_type = "model_of_pairs"

    def __init__(self, width=24, **options):
        super().__init__(**options)
        self.width = width


class Chain(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.v, self.u = nn.Linear(width, 4, bias=False), nn.Linear(4, width)

    def forward(self, x):
        return self.u(self.v(x))


class ModelOfPairs(transformers.PreTrainedModel):
    """A model whose own class holds pairs: by name, in a sequence, and as a module that is nothing else."""

    config_class = PairsConfig
    main_input_name = "x"

    def __init__(self, config):
        super().__init__(config)
        self.q_v, self.q_u = nn.Linear(config.width, 4, bias=False), nn.Linear(4, config.width)
        self.sequence = nn.Sequential(nn.Linear(config.width, 4, bias=False), nn.Linear(4, config.width))
        self.chain, self.head = Chain(config.width), nn.Linear(config.width, config.width)
        self.post_init()

    @property
    def dummy_inputs(self):
        return {"x": torch.ones(2, self.config.width)}

    def forward(self, x):
        return self.head(self.chain(torch.relu(self.sequence(torch.tanh(self.q_u(self.q_v(x)))))))


transformers.AutoConfig.register("model_of_pairs", PairsConfig)
transformers.AutoModel.register(PairsConfig, ModelOfPairs)


def compacted_pairs():
    torch.manual_seed(0)
    model = ModelOfPairs(PairsConfig()).eval()
    report = pifa_compiler.compact(model)
    assert [layer.name for layer in report.factorized] == ["q_v", "sequence", "chain"]
    assert all(type(layer) is PifaLinear for layer in (model.q_v, model.sequence, model.chain))
    return model


@torch.no_grad()
@pytest.mark.parametrize("load", [load_pretrained, ModelOfPairs.from_pretrained])
def test_a_class_that_holds_pairs_is_saved_and_loaded_bit_for_bit(tmp_path, load):
    model, x = compacted_pairs(), torch.randn(3, 24)
    model.save_pretrained(tmp_path / "plain")
    save(model, tmp_path / "ours")
    settings = read_settings(tmp_path / "ours")
    assert (settings["pairs"], settings["format_version"]) == ({"q_v": "q_u"}, 2)
    for folder in ("ours",) if load is load_pretrained else ("ours", "plain"):
        loaded = load(tmp_path / folder)
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
        assert torch.equal(loaded(x), model(x))
        save(loaded, tmp_path / "again", overwrite=True)
        assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "ours" / "config.json").read_bytes()


@pytest.mark.parametrize(
    "pairs",
    [["q_v"], {"q_v": 3}, {"head": "q_u"}, {"q_v": "sequence"}, {"q_v": "other.q_u"}, {"q_v": "head"}, {"q_v": "gone"}],
)
def test_hostile_pairs_are_refused(tmp_path, pairs):
    save(compacted_pairs(), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"]["pairs"] = pairs
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        load_pretrained(tmp_path / "model")


def test_a_folder_that_nobody_could_load_is_not_written(tmp_path):
    model = ModelOfPairs(PairsConfig()).eval()
    model.head = nn.Sequential(nn.Linear(24, 4, bias=False), nn.Linear(4, 8))  # the class has a linear [24, 24] there
    pifa_compiler.compact(model)
    assert type(model.head) is PifaLinear
    with pytest.raises(CheckpointError, match=r"could not be loaded again.*head"):
        save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
