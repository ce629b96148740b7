"""`Schedule`: how far a run has come, by steps or by the clock, and the learning rate there."""

import math

from ..schedule import learning_rate
from .config import DistillConfig

_RATE, _AT_TOKENS, _HIGHEST_RATE = 1e-4, 1024, 3e-4
"""The first updates are as large as the rate in every number; how much of them is noise, a step's tokens say.

That of a student whose predictions are a nat or more away from the teacher's: see `Schedule.start`.
"""


class Schedule:
    """Of a run of so many steps, or minutes.

    Args:
        config: says how many.
        tokens: that a step's loss is taken over; they say the learning rate where `config` does not.

    Attributes:
        highest: the learning rate after warm-up.
        reserve: seconds that the last evaluation will take, which the clock has to leave.
    """

    def __init__(self, config: DistillConfig, tokens: float) -> None:
        self.config = config
        self.highest = config.learning_rate or min(_RATE * math.sqrt(max(tokens / _AT_TOKENS, 1)), _HIGHEST_RATE)
        self.reserve = 0.0

    def start(self, divergence: float) -> None:
        """Takes a smaller rate where the student starts near its teacher, unless the configuration says the rate.

        What the noise of updates adds to the loss goes with the rate. It is to stay below what is there to be won,
        which is a part of the divergence at the start, in nats.
        """
        if self.config.learning_rate is None:
            self.highest *= min(max(divergence, 0.0), 1.0)

    def share(self, step: int, seconds: float) -> float:
        """How much of the run is done, in [0, 1], after so many steps and seconds."""
        if self.config.minutes is None:
            assert self.config.steps is not None  # noqa: S101  as the config checked
            return min(step / self.config.steps, 1.0)
        return min(seconds / max(60 * self.config.minutes - self.reserve, 1e-9), 1.0)

    def learning_rate(self, share: float, length: float) -> float:
        """Of a step that begins where `share` of the run is done, and takes `length` of it; from the middle of it."""
        return learning_rate(self.highest, min(share + length / 2, 1.0), self.config.warmup)
