"""The learning rate comes to its end with the steps, or with the minutes."""

import pytest

from pifa_compiler.distillation.config import DistillConfig
from pifa_compiler.distillation.schedule import Schedule


def test_it_rises_falls_and_ends_at_zero() -> None:
    schedule = Schedule(DistillConfig(steps=100, learning_rate=1.0, warmup=0.1), 1)
    rates = [schedule.learning_rate(schedule.share(step, 0.0), 0.01) for step in range(100)]
    assert max(rates) == pytest.approx(1.0, abs=0.01)
    assert rates.index(max(rates)) == 10
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[0] == pytest.approx(0.05)
    assert 0 < rates[-1] < 1e-3
    assert schedule.share(100, 0.0) == 1


def test_the_rate_follows_the_tokens_of_a_step_by_the_root_within_bounds() -> None:
    rates = [Schedule(DistillConfig(steps=100), tokens / 8).highest for tokens in (1, 1024, 4096, 16384)]
    assert rates == pytest.approx([1e-4, 1e-4, 2e-4, 3e-4])
    assert Schedule(DistillConfig(steps=100, batches_per_step=2), 2048).highest == pytest.approx(2e-4)


def test_a_student_near_its_teacher_starts_with_a_smaller_rate() -> None:
    rates = []
    for config in (DistillConfig(steps=100), DistillConfig(steps=100, learning_rate=1e-3)):
        for divergence in (3.0, 1.0, 0.2):
            schedule = Schedule(config, 128)
            schedule.start(divergence)
            rates.append(schedule.highest)
    assert rates == pytest.approx([1e-4, 1e-4, 2e-5, 1e-3, 1e-3, 1e-3])


def test_by_the_clock_it_leaves_time_for_the_last_evaluation() -> None:
    schedule = Schedule(DistillConfig(minutes=2), 1)
    assert schedule.share(7, 60) == 0.5
    schedule.reserve = 20
    assert schedule.share(7, 50) == 0.5
    assert schedule.share(7, 100) == schedule.share(7, 500) == 1


@pytest.mark.parametrize(
    ("tokens", "seconds", "batches"),
    [(512, 10, 8), (512, 40, 3), (512, 400, 2), (2048, 400, 1), (64, 400, 8)],
    ids=["all fit", "some fit", "1024 tokens", "one batch", "short batches"],
)
def test_minutes_that_hold_few_updates_get_smaller_ones(tokens: float, seconds: float, batches: int) -> None:
    schedule = Schedule(DistillConfig(minutes=60), tokens)
    schedule.reserve = seconds  # for 8 batches: 100 steps of n batches take 25 n seconds for every one of these
    schedule.fit(8)
    assert schedule.batches == batches
    assert schedule.highest == Schedule(DistillConfig(steps=100, batches_per_step=batches), tokens).highest


def test_steps_and_batches_that_are_given_stay() -> None:
    for config, batches in ((DistillConfig(steps=3), 8), (DistillConfig(minutes=60, batches_per_step=6), 6)):
        schedule = Schedule(config, 512)
        schedule.reserve = 400
        schedule.fit(8)
        assert schedule.batches == batches
