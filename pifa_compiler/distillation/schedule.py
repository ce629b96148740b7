"""`Schedule`: how far a run has come, by steps or by the clock, and the learning rate there."""

import math

from ..schedule import learning_rate
from .config import DistillConfig

_RATE, _AT_TOKENS, _HIGHEST_RATE = 1e-4, 1024, 3e-4
"""The first updates are as large as the rate in every number; how much of them is noise, a step's tokens say.

That of a student whose predictions are a nat or more away from the teacher's: see `Schedule.start`.
"""

_BATCHES, _UPDATES, _LEAST_TOKENS = 8, 100, 1024
"""Batches for a step, if the clock leaves room for so many updates: more of them are worth more than larger ones."""

_TRAINED = 2
"""Times that a batch takes to train on over those to look at it: the student's way back is two ways there."""


class Schedule:
    """Of a run of so many steps, or minutes.

    Args:
        config: says how many.
        tokens: that a batch's loss is taken over.

    Attributes:
        batches: whose gradients are added up for one step.
        highest: the learning rate after warm-up.
        reserve: seconds that the last evaluation will take, which the clock has to leave.
    """

    def __init__(self, config: DistillConfig, tokens: float) -> None:
        self.config, self.tokens = config, tokens
        self.batches = config.batches_per_step or _BATCHES
        self.highest = self._highest()
        self.reserve = 0.0

    def fit(self, held_out: int) -> None:
        """Takes fewer batches for a step where the minutes would not do for 100 steps, unless the configuration says.

        Args:
            held_out: batches that an evaluation looks at, in `reserve` seconds.
        """
        if self.config.minutes is None or self.config.batches_per_step is not None:
            return
        left = 60 * self.config.minutes - self.config.evaluations * self.reserve
        fitting = int(left * held_out / max(_UPDATES * _TRAINED * self.reserve, 1e-9))
        self.batches = min(max(fitting, math.ceil(_LEAST_TOKENS / self.tokens)), _BATCHES)
        self.highest = self._highest()

    def start(self, divergence: float) -> None:
        """Takes a smaller rate where the student starts near its teacher, unless the configuration says the rate.

        What the noise of updates adds to the loss goes with the rate. It is to stay below what is there to be won,
        which is a part of the divergence at the start, in nats.
        """
        if self.config.learning_rate is None:
            self.highest = self._highest() * min(max(divergence, 0.0), 1.0)

    def _highest(self) -> float:
        rate = min(_RATE * math.sqrt(max(self.batches * self.tokens / _AT_TOKENS, 1)), _HIGHEST_RATE)
        return self.config.learning_rate or rate

    def share(self, step: int, seconds: float) -> float:
        """How much of the run is done, in [0, 1], after so many steps and seconds."""
        if self.config.minutes is None:
            assert self.config.steps is not None  # noqa: S101  as the config checked
            return min(step / self.config.steps, 1.0)
        return min(seconds / max(60 * self.config.minutes - self.reserve, 1e-9), 1.0)

    def learning_rate(self, share: float, length: float) -> float:
        """Of a step that begins where `share` of the run is done, and takes `length` of it; from the middle of it."""
        return learning_rate(self.highest, min(share + length / 2, 1.0), self.config.warmup)
