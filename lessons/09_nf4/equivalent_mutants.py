"""Mutants of the solutions that are no mistakes: (exercise, the line as changed by machine): why it does the same."""

EQUIVALENT = {
    ("normal_levels", "return _cut(torch.cat([below, above]) / above[-1])"): "levels that are made of two numbers have no gradient to cut",
}
