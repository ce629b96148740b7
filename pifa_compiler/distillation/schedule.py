"""`Schedule`: how far a run has come, by steps or by the clock, and the learning rate there."""

import math

from .config import DistillConfig


class Schedule:
    """Of a run of so many steps, or minutes.

    Attributes:
        reserve: seconds that the last evaluation will take, which the clock has to leave.
    """

    def __init__(self, config: DistillConfig) -> None:
        self.config = config
        self.reserve = 0.0

    def share(self, step: int, seconds: float) -> float:
        """How much of the run is done, in [0, 1], after so many steps and seconds."""
        if self.config.minutes is None:
            assert self.config.steps is not None  # noqa: S101  as the config checked
            return min(step / self.config.steps, 1.0)
        return min(seconds / max(60 * self.config.minutes - self.reserve, 1e-9), 1.0)

    def learning_rate(self, share: float, length: float) -> float:
        """Of a step that begins where `share` of the run is done, and takes `length` of it; from the middle of it."""
        at, warmup = min(share + length / 2, 1.0), self.config.warmup
        if at < warmup:
            return self.config.learning_rate * at / warmup
        return self.config.learning_rate * (1 + math.cos(math.pi * (at - warmup) / (1 - warmup))) / 2
