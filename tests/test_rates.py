"""The search that the lessons' experiments share."""

import pytest

from lessons.rates import best_power


@pytest.mark.parametrize("start", [0, 3, -4])
@pytest.mark.parametrize("lowest", [-3, 0, 2])
def test_it_walks_until_the_best_has_a_neighbour_on_both_sides_and_asks_none_twice(lowest, start):
    asked = []

    def score(power):
        asked.append(power)
        return (power - lowest) ** 2

    assert best_power(score, start) == lowest
    assert {lowest - 1, lowest, lowest + 1} <= set(asked) and len(asked) == len(set(asked)) and max(asked) - min(asked) + 1 == len(asked)
