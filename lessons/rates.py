"""The search for a learning rate that the lessons' experiments share."""

from collections.abc import Callable


def best_power(score: Callable[[int], float], start: int = 0) -> int:
    """The power with the lowest score: `start` and its two neighbours, and on beyond an end for as long as the best one stands there."""
    tried = {power: score(power) for power in (start - 1, start, start + 1)}
    while (best := min(tried, key=tried.get)) in (min(tried), max(tried)):
        beyond = best - 1 if best == min(tried) else best + 1
        tried[beyond] = score(beyond)
    return best
