"""Mutants of this lesson's solutions that do the same as they do, and why: {(exercise, the changed line): reason}."""

ONCE = "what is detached already can be detached again"

EQUIVALENT = {
    ("lora_in_disguise", "return ((1 + delta_ratio) * alpha, 1 ** 2 / (1 + delta_ratio))"): "1 squared is 1",
    ("delta_lora_forward", "moved = x @ A.detach().detach().T @ B.detach().T - x @ A_K.detach().T @ B_K.detach().T"): ONCE,
    ("delta_lora_forward", "moved = x @ A.detach().T @ B.detach().detach().T - x @ A_K.detach().T @ B_K.detach().T"): ONCE,
    ("delta_lora_forward", "moved = x @ A.detach().T @ B.detach().T - x @ A_K.detach().detach().T @ B_K.detach().T"): ONCE,
    ("delta_lora_forward", "moved = x @ A.detach().T @ B.detach().T - x @ A_K.detach().T @ B_K.detach().detach().T"): ONCE,
    ("delta_lora_forward", "return F.linear(x, W_0.detach().detach()) + scale * lora + delta_ratio * scale * moved"): ONCE,
}
