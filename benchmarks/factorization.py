"""Time of `factorize` beside the published way: a full pivoted QR of the weight, then least squares for the other rows.

    python benchmarks/factorization.py --size 4096 --rank 2048

Both are given the same low-rank weight in float64, `factorize` as its factors U V and the published way as their
product, and both are checked against it before times are printed. Needs scipy for LAPACK's pivoted QR (geqp3).
"""

import argparse
from collections.abc import Callable
from time import perf_counter

import scipy.linalg
import torch
from torch import Tensor

from pifa_compiler.bench.rows import provenance
from pifa_compiler.factors import factorize


def main() -> None:
    """Times both by turns and prints the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    u = torch.randn(options.size, options.rank, dtype=torch.float64)
    v = torch.randn(options.rank, options.size, dtype=torch.float64)
    weight = u @ v

    ways: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "LU and maxvol (factorize)": lambda: by_factorize(u, v, options.rank),
        "pivoted QR and least squares": lambda: by_pivoted_qr(weight, options.rank),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, way in ways.items():
            before = perf_counter()
            pivots, coeff = way()
            times[name].append(perf_counter() - before)
            check(weight, pivots, coeff, name)
    print(provenance())
    print(f"[{options.size}, {options.size}] of rank {options.rank}, float64, {options.threads} threads")
    medians = {name: float(torch.tensor(taken).median()) for name, taken in times.items()}
    for name, taken in medians.items():
        print(f"{name:30} {taken:8.2f} s, median of {options.repeats}")
    ours, published = medians.values()
    print(f"published / ours               {published / ours:8.1f}")


def by_factorize(u: Tensor, v: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Pivot rows and coefficients by `factorize`."""
    factors = factorize((u, v), rank=rank)
    return factors.pivots, factors.coeff


def by_pivoted_qr(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Pivot rows and coefficients as arXiv 2501.19090 has it: QR with column pivoting of W^T, then W_n = C W_p."""
    _, _, order = scipy.linalg.qr(weight.T.numpy(), mode="economic", pivoting=True, check_finite=False)
    pivots = torch.from_numpy(order[:rank]).long().sort().values
    others = torch.ones(weight.shape[0], dtype=torch.bool)
    others[pivots] = False
    coeff = torch.linalg.lstsq(weight[pivots].T, weight[others].T, driver="gels").solution.T
    return pivots, coeff


def check(weight: Tensor, pivots: Tensor, coeff: Tensor, name: str) -> None:
    """Refuses a result that does not give the weight back: errors are of float64, times the coefficients' size."""
    others = torch.ones(weight.shape[0], dtype=torch.bool)
    others[pivots] = False
    error = float((coeff @ weight[pivots] - weight[others]).norm() / weight[others].norm())
    assert error < 1e-9, f"{name}: relative error {error:.2g}"


if __name__ == "__main__":
    main()
