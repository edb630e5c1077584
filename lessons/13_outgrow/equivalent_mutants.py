"""Mutants of the solutions that are no mistakes: (exercise, the line as changed by machine): why it does the same."""

WHOLE = "whole numbers carry no gradient"
DATA = "batches are data: no gradient is asked of them"

EQUIVALENT = {
    ("shard_batches", "return _cut((x[process::processes], y[process::processes]))"): DATA,
    ("shard_batches", "return _cut(share)"): DATA,
    ("peak_of_loading", "peak = max(there, peak)"): "the higher of two is the same in either order",
    ("many_adapters", "scale = scales[which] * (which >= 0) ** 2"): "it is 0 or 1",
    ("many_adapters", "scale = scales[which.detach()] * (which >= 0)"): WHOLE,
    ("many_adapters", "scale = scales[which] * (which.detach() >= 0)"): WHOLE,
    ("many_adapters", "z = torch.bmm(x, A[which.detach()].mT)"): WHOLE,
    ("many_adapters", "return x @ W.T + scale[:, None, None] * torch.bmm(z, B[which.detach()].mT)"): WHOLE,
    ("diagnose", "W, A, B = (layer['W'], layer['B'], layer['A'])"): "every question treats A and B alike",
    ("diagnose", "usual = (layer['alpha'] / math.sqrt(layer['rank']), layer['alpha'] / layer['rank'])"): "either of the two is usual",
    ("diagnose", "return 'healthy' if any((math.isclose(value, layer['scale']) for value in usual)) else 'odd scale'"): "isclose is symmetric",
}
