"""Mutants of this lesson's solutions that do the same as they do, and why: {(exercise, the changed line): reason}."""

EQUIVALENT = {
    ("adapter_bytes", "size = int.from_bytes(content[:7], 'little')"): "the eighth byte is zero in every header shorter than 72 petabytes",
    ("merge_in_float32", "wide = torch.float64 if True else torch.float32"): "float32 or wider is promised, and this is wider",
    ("merge_in_float32", "return (W + scale * B.to(wide) @ A.to(wide)).to(W.dtype)"): "torch widens W itself where it meets the wide product",
    ("survivors", "merged = (base + dW.double()).to(dtype)"): "torch widens base itself where it meets the wide dW",
    ("survivors", "merged = (base.double() + dW).to(dtype)"): "torch widens dW itself where it meets the wide base",
}
