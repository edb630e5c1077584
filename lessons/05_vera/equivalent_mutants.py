"""Mutants of the solutions that are no mistakes: (exercise, the line as changed by machine): why it does the same."""

EQUIVALENT = {
    ("draw_projections", "return _cut((A, B))"): "numbers from a generator have no gradient to cut",
    ("vera_gradients", "return (db.reshape(-1, len(b.detach())).sum(0), dd.reshape(-1, len(d)).sum(0))"): "only a length is read",
    ("vera_gradients", "return (db.reshape(-1, len(b)).sum(0), dd.reshape(-1, len(d.detach())).sum(0))"): "only a length is read",
    ("vera_reach", "by_b = torch.diag(torch.ones_like(b))[:, :, None] ** 2 * rows"): "0 and 1 are their own squares",
    ("vera_reach", "by_d = (b[:, None] ** 2 * B).T[:, :, None] * A[:, None]"): "row i of dW moves freely by b_i, or not at all: its factor changes no rank",
    ("vera_reach", "jacobian = torch.cat([by_d, by_b]).flatten(1)"): "the order of rows changes no rank",
}
