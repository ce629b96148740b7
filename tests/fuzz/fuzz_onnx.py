"""Damages ONNX files at random and has `rewrite_onnx` read them: `python tests/fuzz/fuzz_onnx.py [files] [first seed]`.

Every file has to be rewritten or refused by an `ExportError`, within seconds and without more memory than a small file
needs; what was written has to compute what the damaged file does, if that runs. Half of the damage is done to bytes,
half to fields of the file, which bytes hit seldom. What goes wrong is printed, with its seed.
"""

import collections
import random
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import Message
from onnx import TensorProto, helper

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzzing import asked, limit_memory
from onnx_models import low_rank_file, matrix, save_graph
from pifa_compiler.export import rewrite_onnx, session

from pifa_compiler.errors import ExportError

SECONDS = 10.0
MEMORY = 256 << 20
"""Bytes that the process may take beyond what it has: the files are of some kilobytes."""


def samples(folder: Path) -> list[Path]:
    """Files that are rewritten, of every kind."""
    folder.mkdir()
    gemm = [
        helper.make_node("Gemm", ["x", "V"], ["a"], transB=1),
        helper.make_node("Gemm", ["a", "U", "c"], ["y"], alpha=1.0),
    ]
    shared = [
        helper.make_node("Transpose", ["Vt"], ["V"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "V"], ["a"]),
        helper.make_node("MatMul", ["a", "U"], ["y"]),
        helper.make_node("MatMul", ["a", "W"], ["z"]),
    ]
    constants = [matrix("V", 8, 24), matrix("U", 8, 32), matrix("c", 32)]
    shared_constants = [matrix("Vt", 8, 24), matrix("U", 8, 32), matrix("W", 8, 20)]
    numbers = np.random.default_rng(0).standard_normal(8 * 32).tolist()
    constants[1] = helper.make_tensor("U", TensorProto.FLOAT, (8, 32), numbers)  # in a field, not as bytes
    return [
        low_rank_file(folder / "inside.onnx"),
        low_rank_file(folder / "external.onnx", external=True),
        save_graph(folder / "gemm.onnx", gemm, constants, 24, {"y": 32}),
        save_graph(folder / "shared.onnx", shared, shared_constants, 24, {"y": 32, "z": 20}),
    ]


def damaged(whole: bytes, chance: random.Random) -> bytes:
    """The file with one to some faults."""
    return _bytes_damaged(whole, chance) if chance.random() < 0.5 else _fields_damaged(whole, chance)


def _bytes_damaged(whole: bytes, chance: random.Random) -> bytes:
    data = bytearray(whole)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        place = chance.randrange(min(len(data), chance.choice((300, len(data)))))
        if chance.random() < 0.3:  # the end holds names and shapes of inputs and outputs
            place = len(data) - 1 - place
        size = chance.choice((1, 2, 8))
        change = chance.randrange(4)
        if change == 0:
            data[place] = chance.randrange(256)
        elif change == 1:
            data[place] ^= 1 << chance.randrange(8)
        elif change == 2:
            del data[place : place + size]
        else:
            data[place:place] = chance.randbytes(size)
    return bytes(data)


def _fields_damaged(whole: bytes, chance: random.Random) -> bytes:
    model = onnx.ModelProto.FromString(whole)
    for _ in range(chance.choice((1, 1, 2, 3))):
        messages = list(_messages(model))
        _damage_field(chance.choice(messages), chance, messages)
    return model.SerializeToString()


def _messages(message: Message) -> Any:
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if _is_repeated(message, field) else [value]:
                yield from _messages(inner)


def _is_repeated(message: Message, field: Any) -> bool:
    return hasattr(getattr(message, field.name), "append")


def _damage_field(message: Any, chance: random.Random, messages: list[Any]) -> None:
    fields = list(message.DESCRIPTOR.fields)
    present = [field for field, _ in message.ListFields()]
    field = chance.choice(present if present and chance.random() < 0.8 else fields)
    if chance.random() < 0.15:
        message.ClearField(field.name)
        return
    alike = [other for other in messages if type(other) is type(message)]
    if field.message_type is not None:
        donor = chance.choice(alike)
        values = getattr(donor, field.name)
        if _is_repeated(message, field):
            mine = getattr(message, field.name)
            if len(mine) and chance.random() < 0.5:
                del mine[chance.randrange(len(mine))]
            elif len(values):
                mine.add().CopyFrom(chance.choice(list(values)))
        elif donor is not message:
            getattr(message, field.name).CopyFrom(values)
        return
    value = _other_value(field, chance, alike)
    if not _is_repeated(message, field):
        setattr(message, field.name, value)
        return
    mine = getattr(message, field.name)
    if len(mine) and chance.random() < 0.6:
        mine[chance.randrange(len(mine))] = value
    elif len(mine) and chance.random() < 0.5:
        del mine[chance.randrange(len(mine))]
    else:
        mine.append(value)


def _other_value(field: Any, chance: random.Random, alike: list[Any]) -> Any:
    if field.cpp_type == field.CPPTYPE_STRING:
        taken = getattr(chance.choice(alike), field.name)
        taken = taken if isinstance(taken, (str, bytes)) else "".join(map(str, taken[:1]))
        text = chance.choice(
            ("", "V", "U", "x", "y", "a", "Transpose", "Split", "../x", "a\0b", "9" * 5000, "MatMul", taken)
        )
        if field.type == field.TYPE_BYTES:
            return text if isinstance(text, bytes) else text.encode()
        return text.decode(errors="replace") if isinstance(text, bytes) else text
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return chance.choice((0.0, 2.0, -1.0, 1e30, float("nan"), float("inf")))
    if field.cpp_type == field.CPPTYPE_ENUM:
        return chance.choice([value.number for value in field.enum_type.values])
    if field.cpp_type in (field.CPPTYPE_UINT32, field.CPPTYPE_UINT64):
        return chance.choice((0, 1, 2**31))
    widest = 31 if field.cpp_type == field.CPPTYPE_INT32 else 63
    return chance.choice((0, 1, 2, 7, 8, 10, 11, 16, 24, 32, -1, 2**31 - 1, 2 ** (widest - 1), -(2**widest)))


def run(folder: Path, seeds: range) -> tuple[collections.Counter[str], list[str]]:
    """What became of the files with these seeds, and what went wrong, with its seed."""
    files = samples(folder / "samples")
    outcomes: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    for seed in seeds:
        chance = random.Random(seed)
        sample = chance.choice(files)
        source, target = sample.with_name("damaged.onnx"), folder / "out.onnx"
        source.write_bytes(damaged(sample.read_bytes(), chance))
        started = time.perf_counter()
        try:
            outcome = _rewrite(source, target)
        except Exception:  # noqa: BLE001  that is what is looked for
            outcome = "wrong"
            wrong.append(f"seed {seed} ({sample.name}):\n{traceback.format_exc()}")
        if (seconds := time.perf_counter() - started) > SECONDS:
            wrong.append(f"seed {seed} ({sample.name}) took {seconds:.1f} s")
        outcomes[outcome] += 1
        for left in folder.glob("out.onnx*"):
            left.unlink()
    return outcomes, wrong


def _rewrite(source: Path, target: Path) -> str:
    try:
        rewrite_onnx(source, target)
    except ExportError:
        if target.exists():
            raise ValueError("it was refused, and a file is there") from None
        return "refused"
    try:
        before = session(source, native=False)
    except ExportError:
        return "rewritten, but onnxruntime refuses the file that came"
    after = session(target, native=False)
    feed = {value.name: _random_input(value) for value in before.get_inputs()}
    try:
        wanted = before.run(None, feed)
    except Exception:  # noqa: BLE001  onnxruntime's share no base class
        return "rewritten, but the file that came does not run"
    # Sums of some 30 float32 terms in another order. Outputs of a shared V are rows of one weight, whose error is
    # relative to all of it: a damaged number may dwarf the others.
    largest = max(float(np.nanmax(np.abs(value), initial=0.0)) for value in wanted)
    for result, value in zip(after.run(None, feed), wanted, strict=True):
        np.testing.assert_allclose(result, value, rtol=0, atol=1e-4 * largest)
    return "rewritten"


def _random_input(value: Any) -> np.ndarray[Any, Any]:
    shape = [size if isinstance(size, int) else 3 for size in value.shape]
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


if __name__ == "__main__":
    count, first = asked()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        session(samples(Path(scratch, "first"))[0], native=False)  # so that everything is loaded
        limit_memory(MEMORY)
        found, faults = run(Path(scratch), range(first, first + count))
    print("\n".join(faults))  # noqa: T201
    print(f"seeds {first} to {first + count - 1}: {dict(found)}, {len(faults)} wrong")  # noqa: T201
    sys.exit(bool(faults))
