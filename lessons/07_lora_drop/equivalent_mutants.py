"""Mutants of this lesson's solutions that do the same as they do, and why: {(exercise, the changed line): reason}."""

EQUIVALENT = {
    ("share_until", "continue"): "once the threshold is reached it stays reached: the rest is passed over instead of left",
    ("drop_count", "return sum((rank * (out + into) * min(layers, kept + 1) for out, into, layers, kept in kinds))"): "min takes its numbers in any order",
}
