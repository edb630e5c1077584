"""Mutants of the solutions that are no mistakes: (exercise, the line as changed by machine): why it does the same."""

EQUIVALENT = {
    ("orthogonality", "norms = [(torch.eye(len(gram)).to(gram) - gram).norm() for gram in grams]"): "a norm does not see the sign",
    ("smoothed", "uncertainty = beta2 * uncertainty + (1 - beta2) * (sensitivity - I).abs()"): "nor does an absolute value",
    ("budget", "if step >= total - max(1, final):"): "max takes its numbers in any order",
    ("budget", "gone = max(0, step - warmup) / (total - final - warmup)"): "max takes its numbers in any order",
}
