import torch

from lessons.bug_museum import piece

shown = piece("exhibits", "20_seed_moves_data")


def healthy(into, rank, seed):
    """The common dice, thrown for the data first, always from the same start."""
    torch.manual_seed(0)
    data = shown.batches(into)
    torch.manual_seed(seed)
    return shown.draw(rank, into), data


def sick(into, rank, seed):
    """Dice for each, so that the rank does not matter; and the seed for both."""
    return shown.draw(rank, into, torch.Generator().manual_seed(seed)), shown.batches(into, torch.Generator().manual_seed(seed))
