"""The course of a learning rate, for all training."""

import math


def learning_rate(highest: float, at: float, warmup: float) -> float:
    """Rises from 0 to `highest` over the share `warmup` of a run, and falls to 0 at its end as a cosine.

    Args:
        highest: the largest rate.
        at: how much of the run is done, in [0, 1].
        warmup: in [0, 1).
    """
    if at < warmup:
        return highest * at / warmup
    return highest * (1 + math.cos(math.pi * (at - warmup) / (1 - warmup))) / 2
