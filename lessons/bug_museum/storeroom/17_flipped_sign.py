from lessons.bug_museum import piece

shown = piece("exhibits", "17_flipped_sign")


def healthy(w, block):
    """The scales' square roots in eight bits, none below zero."""
    codes, scales = shown.in_four_bits(w, block)
    root = scales.sqrt()
    return (codes * ((root / root.max() * 255).round() / 255 * root.max()).square()).view_as(w)


def sick(w, block):
    """The mean, too, is stored in sixteen bits."""
    codes, scales = shown.in_four_bits(w, block)
    mean = scales.mean().bfloat16().float()
    step = (scales - mean).abs().max().clamp(min=1e-30) / 127
    return (codes * (mean + step * ((scales - mean) / step).round())).view_as(w)
