"""Lesson 12: which method, at what price? Replace each `raise NotImplementedError` and run `pytest lessons/12_scoreboard`.

Scores are bits per byte: lower is better. A seed means the same batches for every method. n runs give n paired differences d₁ … dₙ, with mean
d̄ and standard deviation s (divided by n − 1). Everything here is plain lists and dicts, as they stand in minilora/evidence/published.json.
"""

from minilora.evidence.compare import Entry


def rank_at_budget(trained: dict[int, int], budget: int) -> int | None:
    """The rank whose number of trained parameters is nearest to `budget`; of two equally near the higher one. None where even that one is
    more than a tenth of the budget away: then the method stays out of the comparison.

    trained: {rank: trained parameters}, at least one, in any order
    """
    raise NotImplementedError


def pareto_front(points: dict[str, tuple[float, ...]]) -> list[str]:
    """The names that nobody beats, in the order of `points`. Every coordinate is a price: lower is better, and there may be any number of them.

    One point beats another if it is nowhere higher and somewhere lower; two equal points do not beat each other. A point with a nan in it (a run
    that diverged) is not on the front, and beats nobody.
    """
    raise NotImplementedError


def forgotten_at_equal_learning(one: list[list[float]], other: list[list[float]]) -> tuple[float, float]:
    """What each of two runs had forgotten when both had learned as much: (of `one`, of `other`).

    A curve is [[score, forgotten], …], one point a moment of the run. It may go up and down, and the two may have different numbers of points.
    As much: as the one that learned less, so the level is the higher of the two lowest scores. A run is at the level when its score first comes
    down to it, on the straight line between the two moments around. Both begin above the level.
    """
    raise NotImplementedError


def bootstrap_interval(values: list[float], share: float = 0.95, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """The percentile bootstrap's interval of the mean: draw n of the n values with replacement, take their mean, do so `draws` times; between the
    two ends returned lies the middle `share` of these means.

    Drawn from a generator of its own with this seed: the same seed gives the same interval, and the random state of torch, numpy and `random`
    is left as it was. In double precision.
    """
    raise NotImplementedError


def enough_seeds(pilot: list[float], reach: float) -> int:
    """The fewest seeds, from 3 to 50, whose 95 % interval d̄ ± t s/√n reaches no further than `reach` to either side, when the differences
    spread as those of a pilot do.

    t is Student's 0.975 quantile for n − 1 degrees of freedom, `minilora.evidence.scoreboard.student_t(0.975, n - 1)`, n the seeds planned.
    Raises ValueError where 50 are too few: then the measure is too noisy, and more runs are no cure.
    """
    raise NotImplementedError


def believe(p_values: list[float], rate: float = 0.05) -> list[bool]:
    """Which of m tests to believe, so that of those believed a share of `rate` at most is expected to be wrong (Benjamini and Hochberg 1995).

    Order the p-values; find the largest k for which the k-th smallest is at most rate · k / m; believe the k smallest. None may be, and m may be 0.
    The answers stand in the order of `p_values`.
    """
    raise NotImplementedError


def verdict(runs: list[dict], task: str, one: Entry, other: Entry, line: float, worth: float, others: list[float], rate: float = 0.05) -> str:
    """From the records to "shown", "contradicted" or "open": is `one` better than `other` by more than `line` on this task?

    runs: records {"method": …, "base": …, "rank": …, "task": …, "seed": …, "scores": {"bits_per_byte": …, …}, …}; Entry.of(record) tells whose it is
    d: for each seed that both have, other's bits per byte less one's. A run that diverged has None: with such a run in a pair the claim is open.
    Two one-sided t-tests, `minilora.evidence.scoreboard.above(values, c)` being the p-value of "the mean is above c": is d̄ above `line`; is it
    below `worth`. Both are judged together with `others`, the p-values of all other tests at this table, by Benjamini and Hochberg's rule
    (`minilora.evidence.scoreboard.discoveries(p_values, rate)`). "shown" if the first is believed, else "contradicted" if the second is.
    """
    raise NotImplementedError
