"""`DistillConfig`: how long a compressed model is trained, on what of it, and how."""

import math
from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError
from ..memory import parse_bytes

LossName = Literal["logits", "hidden-states"]


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What `distill` is asked to do. How long is said by `steps` or by `minutes`, one of the two.

    Attributes:
        steps: updates of the weights.
        minutes: of wall time, evaluations included; the learning rate comes to its end with them.
        learning_rate: of AdamW, the highest; it rises over the share `warmup` of the run and falls to 0 as a cosine.
            None takes 1e-4 for steps of 1024 tokens or fewer, and for larger ones more, by the root, 3e-4 at most;
            of students whose predictions are less than a nat away from the teacher's, that part of it.
        warmup: in [0, 1).
        batches_per_step: whose gradients are added up for one step. None takes 8; of runs by `minutes` fewer where 100
            steps would not fit otherwise, as the first evaluation shows, but no less than 1024 tokens.
        clip: the largest norm of a step's gradient; longer ones are shortened.
        train: what is trained: "factors" (of layers in PIFA form), "norms" (parameters of modules whose class is called
            so), "biases", or `fnmatch` patterns of parameter names.
        keep_zeros: whether numbers that are 0 stay so: those of pruned weights.
        loss: "logits", the Kullback-Leibler divergence of the model's predictions from the teacher's, or
            "hidden-states", the squared error of the last hidden states over their own square. None takes the first for
            models that predict the next token, and the second for others.
        temperature: both models' logits are divided by it, and their divergence multiplied by its square.
        text_share: in [0, 1], how much of the loss is the cross entropy of the text's own next tokens.
        top_k: of the teacher's logits so many at each token are written to disk once, and the teacher runs no more; all
            others count together as one. None has the teacher run at every step.
        evaluations: how often the held-out batches are looked at; the best state counts at the end.
        patience: after so many evaluations without a better one the run stops.
        bfloat16: whether products run in bfloat16 where the device has units for it; weights stay in float32.
        memory: what models, gradients, the optimizer and one batch may take, as "8GiB" or in bytes; a batch's values
            are computed twice instead of being kept where that is needed for it. None keeps them.
        shard: whether the weights of both models are spread over the processes of a run (FSDP2), for models that one
            device does not hold.
        save_minutes: between two states on disk, for `resume`.
        seed: of the order of the batches.

    Raises:
        ConfigError: an option is unknown or outside its range.
    """

    steps: int | None = None
    minutes: float | None = None
    learning_rate: float | None = None
    warmup: float = 0.2
    batches_per_step: int | None = None
    clip: float = 1.0
    train: tuple[str, ...] = ("factors", "norms", "biases")
    keep_zeros: bool = False
    loss: LossName | None = None
    temperature: float = 1.0
    text_share: float = 0.0
    top_k: int | None = None
    evaluations: int = 10
    patience: int = 5
    bfloat16: bool = True
    memory: str | int | None = None
    shard: bool = False
    save_minutes: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ConfigError(f"say how long: steps or minutes, one of them; got {self.steps!r} and {self.minutes!r}")
        for name in ("steps", "batches_per_step", "top_k", "evaluations", "patience"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{name} must be an integer of 1 or more, got {value!r}")
        for name in ("minutes", "learning_rate", "clip", "temperature", "save_minutes"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value < math.inf):
                raise ConfigError(f"{name} must be a number above 0, got {value!r}")
        if not (_is_number(self.warmup) and 0 <= self.warmup < 1):
            raise ConfigError(f"warmup must be a number in [0, 1), got {self.warmup!r}")
        if not (_is_number(self.text_share) and 0 <= self.text_share <= 1):
            raise ConfigError(f"text_share must be a number in [0, 1], got {self.text_share!r}")
        if self.loss not in (None, "logits", "hidden-states"):
            raise ConfigError(f'loss must be "logits", "hidden-states" or None, got {self.loss!r}')
        train: object = self.train
        if isinstance(train, str) or not self.train:
            raise ConfigError(f'train must be a tuple of names or patterns such as ("factors",), got {self.train!r}')
        if self.memory is not None:
            parse_bytes(self.memory)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
