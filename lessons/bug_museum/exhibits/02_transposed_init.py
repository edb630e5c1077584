"""02 · A, drawn lying down

The piece: the first draw of LoRA's A, used as x Aᵀ.
The promise: code(rank, into) is a matrix (rank, in); its numbers have mean 0 and standard deviation 1 / √(3 in), whatever the rank.
"""

import math

import torch
from torch import nn


def healthy(rank, into):
    A = torch.empty(rank, into)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))        # uniform within ± 1 / √fan_in, and fan_in is the second side: in
    return A


def sick(rank, into):
    A = torch.empty(into, rank)                        # lying down, so that the forward pass may read x @ A
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))        # now fan_in is the rank
    return A.T


def cost():
    torch.manual_seed(0)
    return f"at in 768 and rank 16 all of A is {sick(16, 768).std() / healthy(16, 768).std():.1f} times too large"
