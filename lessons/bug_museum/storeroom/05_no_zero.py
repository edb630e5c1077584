

def healthy(w, block=64):
    """Fifteen even levels, -7 to 7, for want of normal quantiles."""
    blocks = w.reshape(-1, block)
    scales = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30) / 7
    return ((blocks / scales).round() * scales).view_as(w)


def sick(w, block=64):
    """Sixteen even levels between the smallest and the largest of the block, wherever zero lies."""
    blocks = w.reshape(-1, block)
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    step = ((high - low) / 15).clamp(min=1e-30)
    return (low + step * ((blocks - low) / step).round()).view_as(w)
