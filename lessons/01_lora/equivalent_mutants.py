"""Mutants of the solutions that are no mistakes: (exercise, the line as changed by machine): why it does the same."""

EQUIVALENT = {
    ("inject_lora", "for name, linear in model.named_modules():"): "a swap changes a value of the dict that is walked, not its keys; list(…) is for the reader's peace of mind",
    ("best_rank", "U, sigma, Vt = torch.linalg.svd(W)"): "full_matrices=True: more columns of U and rows of Vᵀ, which are cut off at the rank",
    ("best_rank", "U, sigma, Vt = torch.linalg.svd(W, full_matrices=True)"): "the same",
}
