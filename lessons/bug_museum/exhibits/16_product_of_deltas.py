"""16 · The product of the deltas

The piece: Delta-LoRA's update of W, after a step has moved the factors from A, B to A2, B2.
The promise: code(W, A, B, A2, B2, scale) is a new matrix, W + scale · (B2 A2 − B A): W gets what the product has gained.
W (out, in)   A, A2 (rank, in)   B, B2 (out, rank)
"""

import torch


def healthy(W, A, B, A2, B2, scale):
    return W + scale * (B2 @ A2 - B @ A)               # the delta of the product


def sick(W, A, B, A2, B2, scale):
    return W + scale * (B2 - B) @ (A2 - A)             # the product of the deltas: small times small


def cost():
    torch.manual_seed(0)
    W, A, B = torch.zeros(30, 20, dtype=torch.float64), torch.randn(4, 20, dtype=torch.float64), torch.randn(30, 4, dtype=torch.float64)
    A2, B2 = A + 1e-3 * torch.randn(4, 20, dtype=torch.float64), B + 1e-3 * torch.randn(30, 4, dtype=torch.float64)
    gain = [kind(W, A, B, A2, B2, 1.0).norm().item() for kind in (healthy, sick)]
    return f"with steps of a thousandth W moves {float(f'{gain[0] / gain[1]:.2g}'):,.0f} times too little: plain LoRA under a longer name"
