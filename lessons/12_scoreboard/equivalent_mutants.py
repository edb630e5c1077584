"""Mutants of the solutions that are no mistakes: (exercise, the line as changed by machine): why it does the same."""

EQUIVALENT = {
    ("rank_at_budget", "rank = min(trained, key=lambda rank: (abs(budget - trained[rank]), -rank))"): "a distance has no sign",
    ("rank_at_budget", "return rank if 10 * abs(budget - trained[rank]) <= budget else None"): "a distance has no sign",
    ("forgotten_at_equal_learning", "level = max((min((score for score, _ in curve)) for curve in (other, one)))"): "the higher of two is the same in either order",
    ("believe", "largest = max((k for k, p in enumerate(sorted(p_values), 1) if p <= rate * k / m), default=1)"):
        "it is asked for only where no p-value is below its line, and then none is below the first line either",
}
