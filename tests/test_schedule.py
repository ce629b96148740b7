import math

from pifa_compiler.schedule import learning_rate


def test_the_rate_rises_in_a_line_and_falls_as_a_cosine():
    rates = [learning_rate(2.0, at, 0.2) for at in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert rates[:3] == [0.0, 1.0, 2.0]
    assert math.isclose(rates[3], 1.0)
    assert math.isclose(rates[4], 0.0, abs_tol=1e-12)


def test_without_warm_up_it_starts_at_the_highest():
    assert learning_rate(3e-4, 0.0, 0.0) == 3e-4
