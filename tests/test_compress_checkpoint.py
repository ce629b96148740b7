import copy
import errno
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from stopped_runs import CONFIG, DELETIONS, RENAMES, Stop, is_stopped, run, streamed, tokens
from tiny_models import tiny_llama, tiny_tokenizer
from torch import nn

import pifa_compiler as pc
from pifa_compiler.compress_checkpoint import plan_checkpoint
from pifa_compiler.errors import CheckpointError, ConfigError, OffloadError, PifaError
from pifa_compiler.graph.capture import Captured
from pifa_compiler.graph.weights import Weights, WeightsBesideConstants, WeightsInMemory
from pifa_compiler.hf.stored_model import WeightsInFiles
from pifa_compiler.reconstruction import needs, value_store
from pifa_compiler.reconstruction.value_store import Room

transformers = pytest.importorskip("transformers")

checkpoint_module = sys.modules["pifa_compiler.compress_checkpoint"]  # the name in the package is the function's
MEMORY = "64GiB"


_OF_THE_RUN = ("seconds", "activation_bytes", "planned_bytes")
"""What a report says of the run, and not of the model."""


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()


def opt() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    config = transformers.OPTConfig(**sizes, max_position_embeddings=64, word_embed_proj_dim=32)
    model = transformers.OPTForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def stored(model: nn.Module, folder: Path, *, shards: bool = False) -> Path:
    model.save_pretrained(folder, max_shard_size="20KB" if shards else "5GB")
    return folder


def content(folder: Path) -> dict[str, Any]:
    """What is in the files of a saved model, but for the time it took and the memory of values."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = json.loads(files["pifa_report.json"])
    files["pifa_report.json"] = {key: report[key] for key in report if key not in _OF_THE_RUN}
    return files


def told(report: pc.Report) -> dict[str, Any]:
    return {key: value for key, value in report.to_dict().items() if key not in _OF_THE_RUN}


_CAPTURED: dict[tuple[object, ...], Captured] = {}


@pytest.fixture
def captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has tiny Llamas captured once for all tests: that takes most of the time of a run."""
    usual = checkpoint_module.capture

    def capture(model: nn.Module, calls: list[Any], *, weights: Weights, block_bytes: int, **options: Any) -> Captured:
        key = (model.dtype, model.config.num_hidden_layers, len(calls))
        if key not in _CAPTURED:
            _CAPTURED[key] = usual(model, calls, weights=weights, block_bytes=block_bytes, **options)
        found = _CAPTURED[key]
        own = WeightsBesideConstants(WeightsInMemory(found.graph), weights)
        return replace(found, weights=own, block_bytes=block_bytes)

    monkeypatch.setattr(checkpoint_module, "capture", capture)


def assert_equal_to_compress(model: nn.Module, source: Path, output: Path, config: pc.CompressConfig = CONFIG) -> None:
    report = streamed(source, output, config)
    expected = copy.deepcopy(model)
    assert told(report) == told(pc.compress(expected, tokens(), config))
    loaded = pc.load_pretrained(output)
    assert type(loaded) is type(model)
    assert_same_tensors(loaded, expected)


def assert_same_tensors(model: nn.Module, other: nn.Module) -> None:
    wanted, found = other.state_dict(), model.state_dict()
    assert found.keys() == wanted.keys()
    assert [name for name, tensor in wanted.items() if not torch.equal(tensor, found[name])] == []


@pytest.mark.parametrize(
    ("make", "shards"),
    [(lambda: tiny_llama(tie_word_embeddings=False), False), (tiny_llama, True), (gpt2, True), (opt, False)],
    ids=["llama", "tied-in-shards", "gpt2-in-shards", "opt"],
)
def test_the_result_is_that_of_compress_bit_by_bit(make, shards, tmp_path):
    model = make()
    source = stored(model, tmp_path / "dense", shards=shards)
    assert (len(list(source.glob("*.safetensors"))) > 1) == shards
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    assert_equal_to_compress(model, source, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert sorted(os.listdir(tmp_path)) == ["dense", "out"]


@pytest.mark.parametrize(
    "options",
    [
        {"method": "svd-llm"},
        {"method": "optimal", "pivoting": "qr"},
        {"gradients": False, "allocator": "uniform", "rank_multiple": 4},
        {"ranks": {"*.down_proj": 5, "*.q_proj": 3}, "skip": ("*.v_proj", "*.layers.1.*")},
        {"density": 1.0, "ranks": {"*.o_proj": 4}},
        {"refine": 4},
        {"refine": 4, "method": "svd-llm"},
    ],
    ids=str,
)
@pytest.mark.usefixtures("captured_once")
def test_every_option_does_what_it_does_in_compress(options, tmp_path):
    model = tiny_llama()
    source = stored(model, tmp_path / "dense", shards=True)
    config = pc.CompressConfig(**({"density": 0.6, "rank_multiple": 1} | options))
    assert_equal_to_compress(model, source, tmp_path / "out", config)


def test_a_run_that_changes_nothing_is_refused_and_leaves_nothing(tmp_path):
    source = stored(tiny_llama(), tmp_path / "dense")
    with pytest.raises(CheckpointError, match="no layer of this model is in PIFA form"):
        streamed(source, tmp_path / "out", pc.CompressConfig(density=1.0))
    assert not (tmp_path / "out").exists()


def test_bfloat16_weights_stay_so_and_others_can_be_asked_for(tmp_path):
    source = stored(tiny_llama().bfloat16(), tmp_path / "dense")
    streamed(source, tmp_path / "as-stored")
    streamed(source, tmp_path / "float32", dtype="float32")
    for name, dtype in (("as-stored", torch.bfloat16), ("float32", torch.float32)):
        tensors = load_file(tmp_path / name / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {dtype}
    with pytest.raises(ConfigError, match="unknown dtype 'int8'"):
        streamed(source, tmp_path / "int8", dtype="int8")


def test_values_between_steps_in_files_change_nothing(tmp_path, monkeypatch):
    source = stored(tiny_llama(), tmp_path / "dense")
    streamed(source, tmp_path / "in-memory")
    written: list[Path] = []
    write = value_store.ValueStore._write
    monkeypatch.setattr(value_store, "_SMALL", 64)
    monkeypatch.setattr(
        value_store.ValueStore, "_write", lambda self, value: written.append(self._room.folder) or write(self, value)
    )
    monkeypatch.setattr(checkpoint_module, "Room", lambda limit, folder, device: Room(0, folder, device))
    streamed(source, tmp_path / "in-files", offload=tmp_path / "work")
    assert set(written) == {tmp_path / "work" / "values"}
    assert content(tmp_path / "in-files") == content(tmp_path / "in-memory")
    assert sorted(os.listdir(tmp_path)) == ["dense", "in-files", "in-memory"]


def test_the_weights_of_a_block_are_read_ahead_while_the_one_before_it_is_computed(tmp_path, monkeypatch):
    source = stored(tiny_llama(num_hidden_layers=3), tmp_path / "dense", shards=True)
    expected: Counter[str] = Counter()
    sudden: set[str] = set()
    read, expect = WeightsInFiles.read, WeightsInFiles.expect

    def noted_read(self: WeightsInFiles, name: str) -> torch.Tensor:
        sudden.update({name} - expected.keys())
        return read(self, name)

    def noted_expect(self: WeightsInFiles, names: Iterable[str]) -> None:
        expected.update(names)
        expect(self, names)

    monkeypatch.setattr(WeightsInFiles, "read", noted_read)
    monkeypatch.setattr(WeightsInFiles, "expect", noted_expect)
    streamed(source, tmp_path / "out")
    assert not any(".layers.2." in name for name in sudden)  # only those of the first of four blocks
    assert expected["model.layers.1.mlp.gate_proj.weight"] >= 3  # forward, back, and in the sweep


def test_the_output_is_in_shards_and_loads_by_every_door(tmp_path, monkeypatch):
    source = stored(tiny_llama(), tmp_path / "dense")
    tiny_tokenizer().save_pretrained(source)
    for name in ("notes.md", "pytorch_model.bin", ".hidden"):
        (source / name).write_text("not copied")
    (source / "vocab.txt").write_text("copied")
    monkeypatch.setattr(checkpoint_module, "_LEAST_SHARD", 10_000)
    streamed(source, tmp_path / "out", memory=MEMORY)
    monkeypatch.setattr(checkpoint_module, "_SHARE_OF_BLOCK", 1 << 30)
    streamed(source, tmp_path / "shards", memory=MEMORY)
    shards = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 3
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    sizes = [(tmp_path / "shards" / name).stat().st_size for name in shards]
    assert max(sizes) < 10_000 + 4096  # and the header
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "vocab.txt", "README.md"}
    assert not names & {"notes.md", "pytorch_model.bin", ".hidden"}
    whole = pc.load_pretrained(tmp_path / "out")
    for model in (
        pc.load_pretrained(tmp_path / "shards"),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "shards"),
    ):
        assert_same_tensors(model, whole)


def test_the_plan_is_kept_and_writes_nothing(tmp_path):
    source = stored(tiny_llama(), tmp_path / "dense")
    plan = plan_checkpoint(source, tmp_path / "out", tokens(), CONFIG, memory=MEMORY)
    assert os.listdir(tmp_path) == ["dense"]
    report = streamed(source, tmp_path / "out")
    assert 0 < report.activation_bytes <= plan.needs.values
    stored_bytes = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert stored_bytes == pytest.approx(plan.output, rel=0.25)  # tiny tensors have large headers
    assert plan.seconds > 0


@pytest.mark.usefixtures("captured_once")
def test_the_plan_counts_what_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(needs, "_OF_TRAINED", 240)  # the logits take more than blocks of a tiny model
    source, out = stored(tiny_llama(), tmp_path / "dense"), tmp_path / "out"
    plain = plan_checkpoint(source, out, tokens(), CONFIG, memory=MEMORY).needs
    refined = plan_checkpoint(source, out, tokens(), replace(CONFIG, refine=8), memory=MEMORY).needs
    numbers = sum(weight.numel() for weight in tiny_llama().model.layers[0].mlp.parameters())
    assert refined.block > 240 * numbers > plain.block
    assert refined.products > plain.products


# Stopped runs


@dataclass(frozen=True)
class Whole:
    """A run that was not stopped: its source, what it wrote, how often it wrote, and how long it took."""

    source: Path
    content: dict[str, Any]
    writes: dict[str, int]
    seconds: float


WRITES: dict[str, tuple[Any, str]] = {
    "replace": (Path, "replace"),
    "save": (safetensors.torch, "save_file"),
    "text": (Path, "write_text"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder, writes = tmp_path_factory.mktemp("whole"), dict.fromkeys(WRITES, 0)
    source = stored(tiny_llama(num_hidden_layers=1), folder / "dense", shards=True)

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            writes[name] += 1
            return function(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name, (owner, attribute) in WRITES.items():
            patch.setattr(owner, attribute, counted(name, getattr(owner, attribute)))
        started = time.perf_counter()
        streamed(source, folder / "out")
        seconds = time.perf_counter() - started
    return Whole(source, content(folder / "out"), writes, seconds)


@pytest.fixture
def source(whole: Whole, captured_once: None, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole.source, tmp_path / "dense"))


@pytest.fixture
def uninterrupted(whole: Whole) -> dict[str, Any]:
    return whole.content


def until_done(source: Path, output: Path, stop: Stop) -> int:
    """Resumes a run until one is not killed; how many were."""
    kills = 0
    while (ended := run(source, output, stop=stop)) != (0, ""):
        assert ended == (-signal.SIGKILL, "")
        kills += 1
        assert kills < 100, "no run comes further"
    return kills


def test_a_run_killed_again_and_again_at_durable_writes_ends_as_one_that_was_not(source, uninterrupted, tmp_path):
    output = tmp_path / "out"
    # Every run comes further: it may write the seven linears of a block, which are summed together, and one thing more.
    assert until_done(source, output, Stop(RENAMES, 8)) > 1
    assert content(output) == uninterrupted
    assert sorted(os.listdir(tmp_path)) == ["dense", "out"]


def test_a_run_that_refines_goes_on_with_whole_blocks(source, tmp_path):
    config = replace(CONFIG, refine=4)
    streamed(source, tmp_path / "whole", config)
    wanted, output = content(tmp_path / "whole"), tmp_path / "out"
    # Before groups a description, seven linears and two borders are written, by the first run only; a block has two.
    for at in (11, 3):
        assert run(source, output, config=config, stop=Stop(RENAMES, at)) == (-signal.SIGKILL, "")
    assert run(source, output, config=config) == (0, "")
    assert content(output) == wanted


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_killed_at_any_durable_write_goes_on(source, uninterrupted, tmp_path):
    output, at = tmp_path / "out", 0
    while run(source, output, stop=Stop(RENAMES, at))[0] == -signal.SIGKILL:
        assert not output.exists()
        assert run(source, output) == (0, "")
        assert content(output) == uninterrupted
        assert sorted(os.listdir(tmp_path)) == ["dense", "out"]
        shutil.rmtree(output)
        at += 1
    assert at > 15


@pytest.mark.parametrize("count", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_goes_on(count, source, whole, tmp_path):
    output, generator = tmp_path / "out", random.Random(count)
    kills = 0
    while kills < count or is_stopped(output):
        # A process of its own takes as long again to begin.
        seconds = generator.uniform(0, 2 * whole.seconds) if kills < count else None
        code, said = run(source, output, seconds=seconds)
        assert (code, said) in ((0, ""), (-signal.SIGKILL, ""))
        kills += code != 0
        if code == 0:
            assert content(output) == whole.content
            assert sorted(os.listdir(tmp_path)) == ["dense", "out"]
            shutil.rmtree(output)


@pytest.mark.parametrize("at", [0, 5, 20])
def test_a_run_killed_while_it_cleans_up_is_finished_by_the_next(at, source, uninterrupted, tmp_path):
    output = tmp_path / "out"

    assert run(source, output, stop=Stop(DELETIONS, at, after_renames=1))[0] == -signal.SIGKILL
    assert is_stopped(output)
    with pytest.raises(CheckpointError, match="exists already"):
        streamed(source, output)
    report = streamed(source, output, resume=True)
    assert json.loads(json.dumps(told(report))) == uninterrupted["pifa_report.json"]
    assert content(output) == uninterrupted
    assert sorted(os.listdir(tmp_path)) == ["dense", "out"]


def test_what_was_to_be_replaced_is_put_back_if_the_run_is_killed_between_both_renames(source, tmp_path):
    output = stored(tiny_llama(), tmp_path / "out")
    old = {path.name: path.read_bytes() for path in output.iterdir()}

    stop = Stop(("Path.rename",), 0, after_renames=1, exchanges=False)
    assert run(source, output, stop=stop, overwrite=True)[0] == -signal.SIGKILL
    assert not output.exists()
    with (
        pytest.warns(UserWarning, match="out is as it was before"),
        pytest.raises(CheckpointError, match="exists already"),
    ):
        streamed(source, output, resume=True)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == old
    streamed(source, output, resume=True, overwrite=True)
    pc.load_pretrained(output)
    assert sorted(os.listdir(tmp_path)) == ["dense", "out"]


class Stopped(Exception):  # noqa: N818  nothing is wrong
    """Raised by a test on purpose."""


def stop_after(groups: int) -> Callable[..., None]:
    """Stops a run when so many groups of linears have their factors."""

    def progress(done: int, total: int, what: str) -> None:
        if what != "output gradients" and done == groups:
            raise Stopped

    return progress


@pytest.fixture
def stopped(source, tmp_path) -> Path:
    """The output of a run that was stopped in the middle."""
    output = tmp_path / "out"
    with pytest.raises(Stopped):
        streamed(source, output, progress=stop_after(2))
    assert is_stopped(output)
    assert not output.exists()
    return output


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_was_stopped_does_not_repeat_what_was_done(source, stopped, uninterrupted):
    results = stopped.parent / f".{stopped.name}.run"
    done = {path: path.stat().st_mtime_ns for path in results.rglob("*.safetensors")}
    kept: dict[Path, int] = {}

    def look(*_: object) -> None:
        kept.update({path: path.stat().st_mtime_ns for path in done if path.exists()})

    streamed(source, stopped, resume=True, progress=look)
    assert {path.parent.name for path in done} == {"linears", "blocks", "groups"}
    assert kept == done
    assert content(stopped) == uninterrupted


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda source: {"config": pc.CompressConfig(density=0.5, rank_multiple=1)},
            r"options: density was 0\.6, is 0\.5",
        ),
        (lambda source: {"memory": "63GiB"}, "another memory: was"),
        (lambda source: {"dtype": "bfloat16"}, "another model: config dtype was 'float32', is 'bfloat16'"),
        (
            lambda source: os.utime(next(source.glob("*.safetensors")), (1, 1)) or {},
            r"another files: model-.*safetensors",
        ),
    ],
    ids=["option", "memory", "dtype", "model"],
)
def test_another_run_is_refused_with_the_difference_and_nothing_is_lost(change, words, source, stopped, uninterrupted):
    results = stopped.parent / f".{stopped.name}.run"
    before, times = files_of(results), [(path, path.stat()) for path in source.iterdir()]
    options = change(source)
    with pytest.raises(OffloadError, match=words):
        streamed(source, stopped, resume=True, **options)
    assert files_of(results) == before
    for path, stat in times:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    streamed(source, stopped, resume=True)
    assert content(stopped) == uninterrupted


def test_other_data_and_another_version_are_refused(source, stopped, monkeypatch):
    with pytest.raises(OffloadError, match="another data"):
        pc.compress_checkpoint(source, stopped, tokens()[:2], CONFIG, memory=MEMORY, resume=True)
    monkeypatch.setattr(checkpoint_module, "version", lambda name: "0.0")
    with pytest.raises(OffloadError, match=r"another versions: pifa-compiler was '.*', is '0\.0'"):
        streamed(source, stopped, resume=True)


def test_a_run_is_resumed_only_if_asked_and_only_if_there_is_one(source, stopped, tmp_path):
    with pytest.raises(OffloadError, match=r"holds a run that was stopped; resume it \(--resume\), or delete it"):
        streamed(source, stopped)
    with pytest.raises(OffloadError, match="holds no run to go on with; start one without --resume"):
        streamed(source, tmp_path / "other", resume=True)
    assert sorted(os.listdir(tmp_path)) == [".out.run", "dense"]


# Bad input


def refused(kind: type[PifaError], words: str, source: Path, output: Path, **options: Any) -> str:
    """Asserts that a run is refused in one clear line, and that neither the input nor the folder beside it changes."""
    before = files_of(source)
    with pytest.raises(kind, match=words) as caught:
        streamed(source, output, **options)
    assert files_of(source) == before
    return str(caught.value)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 1], ids=["first", "early", "half", "last"])
@pytest.mark.parametrize("how", WRITES)
def test_a_full_disk_at_any_write_keeps_what_was_done(how, share, source, whole, tmp_path, monkeypatch):
    calls, at = 0, int(share * (whole.writes[how] - 1))

    def full(function: Callable[..., Any], error: Exception) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > at:
                raise error
            return function(*args, **options)

        return call

    error: Exception = OSError(errno.ENOSPC, "No space left on device")
    if how == "save":
        error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    owner, attribute = WRITES[how]
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, full(getattr(owner, attribute), error))
        refused((OffloadError, CheckpointError), "(?i)no space left on device", source, output)
    assert not output.exists()
    assert [name for name in os.listdir(tmp_path) if name not in ("dense", ".out.run")] == []
    streamed(source, output, resume=is_stopped(output))
    assert content(output) == whole.content
    assert sorted(os.listdir(tmp_path)) == ["dense", "out"]


@pytest.mark.parametrize("limit", [1000, 6000, 20_000])
def test_a_limit_of_file_sizes_is_a_full_disk(limit, source, tmp_path):
    output = tmp_path / "out"

    code, said = run(source, output, file_bytes=limit)
    assert code == 1
    assert re.match("(OffloadError|CheckpointError): .*File too large", said)
    assert not output.exists()
    streamed(source, output, resume=is_stopped(output))
    assert sorted(os.listdir(tmp_path)) == ["dense", "out"]


def test_places_that_cannot_be_written_are_refused_at_once(source, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused(CheckpointError, "is a file", source, tmp_path / "file")
    refused(CheckpointError, "is a file", source, tmp_path / "file" / "out")
    refused(OffloadError, "cannot be written", source, tmp_path / "out", offload=tmp_path / "file" / "work")
    refused(OffloadError, "cannot be written", source, tmp_path / "out", offload=tmp_path / "file")
    refused(OffloadError, "lie in each other", source, tmp_path / "out", offload=tmp_path / "out" / "work")
    refused(OffloadError, "lie in each other", source, tmp_path / "out", offload=tmp_path / "out")
    refused(OffloadError, "not empty and no working folder", source, tmp_path / "out", offload=source)
    refused(CheckpointError, "holds the model to compress", source, source, overwrite=True)
    shutil.copy(source / "config.json", tmp_path)
    refused(CheckpointError, "the folder dense", source, tmp_path, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "dense", "file"]


def test_too_little_memory_is_refused_and_the_least_that_is_named_will_do(source, tmp_path):
    said = refused(OffloadError, "do not suffice", source, tmp_path / "out", memory="1KiB")
    assert os.listdir(tmp_path) == ["dense"]
    least = re.search(r"give (.*) or more", said)
    assert least is not None
    streamed(source, tmp_path / "out", memory=least[1])


def test_two_runs_in_one_folder_the_second_is_refused_at_once(source, tmp_path):
    def second(*_: object) -> None:
        nonlocal met
        if not met:
            met = refused(OffloadError, "another process works in", source, tmp_path / "out", resume=True)
            code, said = run(source, tmp_path / "out")
            assert (code, "another process works in" in said) == (1, True)

    met = ""
    streamed(source, tmp_path / "out", progress=second)
    assert met
    assert sorted(os.listdir(tmp_path)) == ["dense", "out"]


@pytest.mark.parametrize("room", ["linears", "blocks", "groups"])
@pytest.mark.parametrize("damage", ["cut", "empty", "other", "pipe"])
def test_damaged_results_are_refused_and_made_again_as_the_message_says(room, damage, source, uninterrupted, tmp_path):
    output, results = tmp_path / "out", tmp_path / ".out.run"
    with pytest.raises(Stopped):
        streamed(source, output, progress=stop_after(2))
    found = sorted((results / room).iterdir())
    path = found[0]
    data = path.read_bytes()
    if damage == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif damage == "other":
        save_file({"x": torch.zeros(2)}, path)
    else:
        path.write_bytes(b"" if damage == "empty" else data[: len(data) // 2])
    said = refused(OffloadError, f"{path} is damaged", source, output, resume=True)
    deleted = re.search(r"; delete (.*), and --resume", said)
    assert deleted is not None
    for each in deleted[1].split(" and "):
        place = path if each == "it" else Path(each)
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    streamed(source, output, resume=True)
    assert content(output) == uninterrupted


def test_a_damaged_description_of_the_run_is_refused(source, stopped):
    (stopped.parent / ".out.run" / "run.json").write_text("{")
    refused(OffloadError, r"run\.json is damaged; delete", source, stopped, resume=True)
