"""Mutants of the solutions that are no mistakes: (exercise, the line as changed by machine): why it does the same."""

FIRST = "only the first `rank` columns are read"

EQUIVALENT = {
    ("dora_forward", "V = W.detach() + scale * B @ A"): "W is frozen: no gradient of it is wanted",
    ("pissa_split", "U, S, Vt = torch.linalg.svd(W.double())"): FIRST,
    ("pissa_split", "U, S, Vt = torch.linalg.svd(W.double(), full_matrices=True)"): FIRST,
    ("loftq_alternate", "U, S, Vt = torch.linalg.svd(W - Q)"): FIRST,
    ("loftq_alternate", "U, S, Vt = torch.linalg.svd(W - Q, full_matrices=True)"): FIRST,
}
