"""Tile sizes of the Triton kernels: the short lists that autotuning tries, and the fixed choice without tuning.

A list depends on the width of the dtype, for a tile is limited by its bytes: `block_k` spans 64 to 128 bytes of a row
wherever the product runs on tensor cores. AMD's compute units hold 64 KiB of shared memory where NVIDIA's hold 163 KiB
and more; so they have lists of their own (`hip`), with fewer stages.

NVIDIA's lists for two-byte dtypes hold the tiles that were fastest on an H200 in bf16 at r = d/2, d = 2048, 4096 and
8192 (`benchmarks/results/gpu_tiles.csv`), but for those that spill on another chip. Its float32 lists and AMD's have
not been timed. `fixed_prefill_tile` and `fixed_decode_tile` say which tile is taken without tuning.

`benchmarks/kernel_figures.py` compiles every tile of every list for every chip; `resident` is what it holds the
registers and the shared memory against.
"""

from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class Tile:
    """What one program computes.

    Attributes:
        block_m, block_n: tokens and weight rows of a tile of the result.
        block_k: columns multiplied between two loads.
        warps: of 32 threads, on AMD of 64.
        stages: loads in flight; the software pipeline's depth.
        resident: programs that one SM or compute unit is assumed to hold at a time.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    resident: int = 1

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}x{self.block_k}-w{self.warps}-s{self.stages}"

    def constants(self) -> dict[str, int]:
        """The kernel's tile parameters."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}

    def launch_options(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {**self.constants(), "num_warps": self.warps, "num_stages": self.stages}

    def config(self) -> triton.Config:
        """What `triton.autotune` takes."""
        return triton.Config(self.constants(), num_warps=self.warps, num_stages=self.stages)


def prefill_tiles(itemsize: int, hip: bool) -> tuple[Tile, ...]:
    """Tiles of the two GEMMs over more than 16 tokens."""
    if itemsize == 2:
        if hip:
            return (
                Tile(128, 128, 64, warps=8, stages=2, resident=2),
                Tile(256, 128, 32, warps=8, stages=2),
                Tile(128, 64, 64, warps=4, stages=2, resident=2),
                Tile(64, 64, 64, warps=4, stages=2, resident=2),
            )
        return (
            Tile(64, 32, 128, warps=4, stages=4),
            Tile(64, 128, 64, warps=4, stages=4),
            Tile(128, 256, 64, warps=8, stages=3),
            Tile(64, 128, 128, warps=4, stages=3),
            Tile(64, 256, 64, warps=4, stages=4),
            Tile(64, 64, 64, warps=4, stages=4, resident=2),
            Tile(128, 128, 64, warps=8, stages=3),
        )
    if hip:
        return (
            Tile(64, 64, 16, warps=4, stages=2, resident=2),
            Tile(64, 64, 32, warps=4, stages=2, resident=2),
            Tile(128, 64, 32, warps=8, stages=2),
        )
    return (
        Tile(64, 64, 16, warps=4, stages=3, resident=2),
        Tile(64, 64, 32, warps=4, stages=3, resident=2),
    )


def fixed_prefill_tile(bucket: int, itemsize: int, hip: bool) -> Tile:
    """The tile without tuning, for a bucket of tokens (`tokens_bucket`): smaller ones where there are few tokens."""
    tiles = prefill_tiles(itemsize, hip)
    if itemsize != 2 or hip:
        return tiles[0]
    return tiles[0 if bucket <= 128 else 1 if bucket <= 1024 else 2]


def decode_tiles(itemsize: int, block_m: int, hip: bool) -> tuple[Tile, ...]:
    """Tiles of the two products over one token (`block_m` 1) or 2 to 16 (`block_m` 16)."""
    wide = 4 // itemsize  # elements in four bytes
    if block_m == 1:
        if hip:  # 128 threads, each of which loads 16 bytes of x when block_k spans 2 KiB
            return (
                Tile(1, 4, 512 * wide, warps=2, stages=1, resident=4),
                Tile(1, 8, 512 * wide, warps=2, stages=1, resident=3),
                Tile(1, 8, 256 * wide, warps=1, stages=1, resident=6),
            )
        return (
            Tile(1, 2, 1024 * wide, warps=4, stages=1, resident=4),
            Tile(1, 4, 1024 * wide, warps=4, stages=1, resident=3),
            Tile(1, 4, 1024 * wide, warps=8, stages=1, resident=2),
            Tile(1, 4, 512 * wide, warps=4, stages=1, resident=4),
            Tile(1, 2, 512 * wide, warps=2, stages=1, resident=8),
        )
    if hip:
        first = Tile(16, 32, 64 * wide, warps=4, stages=2, resident=2)
        # Loads of x would be narrower in the second one in float32.
        return (first,) if itemsize == 4 else (first, Tile(16, 16, 64 * wide, warps=4, stages=2, resident=2))
    first = Tile(16, 32, 64 * wide, warps=4, stages=4, resident=2)
    if itemsize == 4:
        return first, Tile(16, 64, 32, warps=4, stages=4, resident=2)
    return (
        first,
        Tile(16, 16, 128, warps=2, stages=6),
        Tile(16, 32, 256, warps=4, stages=4),
    )


def fixed_decode_tile(rows: int, itemsize: int, block_m: int, hip: bool) -> Tile:
    """The tile without tuning, for a weight of `rows` rows: fewer rows to a program where there are few."""
    many = block_m == 1 and not hip and rows >= 4096
    return decode_tiles(itemsize, block_m, hip)[1 if many else 0]


_SPILLING_WITH_SIBLINGS = {(4, "64x64x16-w4-s3"), (4, "1x4x1024-w4-s1"), (2, "16x32x256-w4-s4")}
"""By itemsize: tiles whose registers do not hold the choice of a sibling as well, on one of the chips."""


def siblings_tiles(itemsize: int, block_m: int, hip: bool) -> tuple[Tile, ...]:
    """Tiles of the products of siblings over one token (`block_m` 1), 2 to 16 (`block_m` 16) or more (above)."""
    tiles = prefill_tiles(itemsize, hip) if block_m > 16 else decode_tiles(itemsize, block_m, hip)
    return tuple(tile for tile in tiles if hip or (itemsize, str(tile)) not in _SPILLING_WITH_SIBLINGS)


def fixed_siblings_tile(rows: int, bucket: int, itemsize: int, hip: bool) -> Tile:
    """The tile without tuning, for weights of at most `rows` rows and a bucket of tokens: that of one linear if it can.

    Its time with siblings is not known.
    """
    few = bucket <= 16
    alone = fixed_decode_tile(rows, itemsize, bucket, hip) if few else fixed_prefill_tile(bucket, itemsize, hip)
    tiles = siblings_tiles(itemsize, bucket, hip)
    return alone if alone in tiles else tiles[0]


def tokens_bucket(tokens: int) -> int:
    """The largest number of tokens that is tuned together with `tokens`; each bucket is compiled once."""
    return next((bucket for bucket in (1, 16, 128, 1024) if tokens <= bucket), 2**31)


DEPENDENT_LAUNCH = False
"""Whether launches of decode overlap, where the chip can (`linear_triton_dependent`); not timed, so it is off."""

LAST_ADDS = False
"""Whether the last program of a shared sum of decode's second product adds up the parts, in place of a launch for that.

Not timed, so it is off; never on AMD, where Triton's barrier does not wait for what the other waves of a program store.
"""

SPLITS = 4
"""The most programs that share one sum: what was best for 16 tokens at all three d."""

PROGRAMS = 512
"""Programs that keep any of today's chips (108 to 304 compute units) reading; fewer are split along the sum."""

MIN_CHUNK = 512
"""The fewest terms of a sum that are worth a program of their own."""


def chunk_of_sum(rows: int, terms: int, tile: Tile) -> int:
    """How many of the `terms` of every sum one program of the decode kernel adds; a multiple of `block_k`."""
    tiles = max(1, -(-rows // tile.block_n))
    splits = max(1, min(SPLITS, PROGRAMS // tiles))
    unit = max(MIN_CHUNK, tile.block_k)
    chunk: int = max(1, -(-terms // (splits * unit))) * unit
    return chunk
