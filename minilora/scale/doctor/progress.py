"""What a run's numbers tell: loss at each step, learning rate at each step, held-out loss now and then.

A fifth of the steps is compared with a fifth: single steps are noise. Below twenty steps nothing is said.
"""

import math
from itertools import pairwise

import torch

from minilora.scale.doctor.findings import Finding

ENOUGH = 20                    # steps
WARMUP = "It should end in the first tenth of the run"
RISE = 0.05                    # of what the held-out loss had fallen: less is the noise of single steps


def check_numbers(history: dict) -> None:
    """Raises ValueError where it is not what finetune writes."""
    def numbers(values: object) -> bool:
        return isinstance(values, list) and all(isinstance(value, int | float) for value in values)

    evaluated = history.get("evaluated")
    if not (numbers(history.get("loss")) and numbers(history.get("lr")) and isinstance(evaluated, list)
            and all(isinstance(pair, list) and len(pair) == 2 and numbers(pair) for pair in evaluated)):
        raise ValueError("loss, lr and evaluated are not the lists of numbers that finetune writes there")


def judge(history: dict, steps: int) -> list[Finding]:
    """steps: of the whole run. Raises ValueError where the history is none."""
    check_numbers(history)
    return [finding for finding in (_loss(history["loss"], max(history["lr"], default=0.0)), _warmup(history["lr"], steps),
                                    _overfitting(history["loss"], history["evaluated"])) if finding]


def _loss(loss: list[float], lr: float) -> Finding | None:
    bad = next((step for step, value in enumerate(loss) if not math.isfinite(value)), None)
    if bad is not None:
        return Finding("diverged", f"the loss of step {bad} is {loss[bad]}", f"Start anew with a lower rate than {lr:g}, or with --clip 1")
    if len(loss) < ENOUGH:
        return None
    first, last = (torch.tensor(part, dtype=torch.float64) for part in (loss[:len(loss) // 5], loss[-(len(loss) // 5):]))
    if last.min() > first.max():                             # every late step is worse than every early one
        return Finding("diverged", f"loss {first.mean():.3f} in the first fifth, {last.mean():.3f} in the last",
                       f"The rate is too high: less than {lr:g}, a warm-up, or --clip 1")
    error = ((first.var() / len(first)) + (last.var() / len(last))).sqrt()
    if first.mean() - last.mean() < error:
        return Finding("loss never fell", f"{first.mean():.4f} in the first fifth, {last.mean():.4f} in the last (± {error:.4f})",
                       "Try three and ten times the rate, and look at one batch")
    return None


def _warmup(lr: list[float], steps: int) -> Finding | None:
    if len(lr) > 1 and len(lr) >= steps and all(a < b for a, b in pairwise(lr)):
        return Finding("warm-up too long", f"the rate still rises at the last of {steps} steps, from {lr[0]:.2g} to {lr[-1]:.2g}",
                       WARMUP)
    return None


def _overfitting(loss: list[float], evaluated: list[list[float]]) -> Finding | None:
    if len(evaluated) < 3:
        return None
    (_, start), (best_step, best), (end, last) = evaluated[0], min(evaluated, key=lambda pair: pair[1]), evaluated[-1]
    window = max(1, len(loss) // 10)
    then, now = loss[max(0, int(best_step) - window):int(best_step)] or loss[:window], loss[-window:]
    if last - best > max(RISE * (start - best), 0.01) and sum(now) / len(now) < sum(then) / len(then):
        return Finding("overfitting", f"held-out loss {best:.3f} at step {best_step:g}, {last:.3f} at step {end:g}, while the training loss fell",
                       "Fewer steps, a lower rank, dropout, or more text")
    return None
