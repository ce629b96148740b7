"""Which tile is taken without tuning, against the times of an H200 in benchmarks/results/gpu_tiles.csv."""

import csv
import itertools
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs the package triton")

from pifa_compiler.kernels.linear_triton_tiles import (
    chunk_of_sum,
    decode_tiles,
    fixed_decode_tile,
    fixed_prefill_tile,
    fixed_siblings_tile,
    prefill_tiles,
    siblings_tiles,
    tokens_bucket,
)

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu_tiles.csv"


def fastest(d: int, tokens: int) -> dict[str, float]:
    """Microseconds of the tiles that were timed, the first being the fastest."""
    with RESULTS.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["d"], row["tokens"]) == (str(d), str(tokens))]
    return {row["what"]: float(row["us"]) for row in reversed(rows) if row["splits"]}


def ratio_to_fastest(tile: object, d: int, tokens: int) -> float:
    times = fastest(d, tokens)
    return times[str(tile)] / min(times.values())


@pytest.mark.parametrize("d", [2048, 4096, 8192])
def test_the_fixed_tile_for_one_token_was_the_fastest(d: int):
    assert ratio_to_fastest(fixed_decode_tile(d // 2, 2, 1, False), d, 1) == 1


@pytest.mark.parametrize(
    ("d", "tokens", "ratio"),
    [
        *[(d, 128, 1) for d in (2048, 4096, 8192)],
        *[(2048, 512, 1.2), (4096, 512, 1.11), (8192, 512, 1.01)],
        *[(2048, 4096, 1), (4096, 4096, 1)],
    ],
)
def test_the_fixed_prefill_tile_was_the_fastest_or_close(d: int, tokens: int, ratio: float):
    assert ratio_to_fastest(fixed_prefill_tile(tokens_bucket(tokens), 2, False), d, tokens) <= ratio


def test_fixed_tiles_are_among_those_that_are_tuned():
    for size, hip in itertools.product((2, 4), (False, True)):
        for bucket in (128, 1024, 2**31):
            assert fixed_prefill_tile(bucket, size, hip) in prefill_tiles(size, hip)
        for bucket, rows in itertools.product((1, 16, 128, 1024, 2**31), (1, 4096)):
            assert fixed_siblings_tile(rows, bucket, size, hip) in siblings_tiles(size, bucket, hip)
        for block_m, rows in itertools.product((1, 16), (1, 4095, 4096, 2**20)):
            assert fixed_decode_tile(rows, size, block_m, hip) in decode_tiles(size, block_m, hip)


@pytest.mark.parametrize(("rows", "terms"), [(1024, 2048), (2048, 4096), (4096, 8192), (8, 2500), (1, 1), (0, 0)])
def test_parts_of_a_sum_cover_it_and_none_is_empty(rows: int, terms: int):
    for size, block_m in itertools.product((2, 4), (1, 16)):
        tile = fixed_decode_tile(rows, size, block_m, False)
        chunk = chunk_of_sum(rows, terms, tile)
        parts = -(-terms // chunk)
        assert chunk % tile.block_k == 0
        assert parts <= 4
        assert (parts - 1) * chunk < max(1, terms) <= max(1, parts) * chunk


def test_several_programs_share_a_sum_as_was_fastest_for_16_tokens():
    tile = fixed_decode_tile(4096, 2, 16, False)
    assert [-(-d // chunk_of_sum(d // 2, d, tile)) for d in (2048, 4096, 8192)] == [4, 4, 4]
