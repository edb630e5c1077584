"""Mutants of the solutions that are no mistakes: (exercise, the line as changed by machine): why it does the same."""

NO_GRAPH = "inside an autograd Function nothing is recorded: there is no gradient to cut, and backward is what it is written to be"
BETWEEN_STEPS = "the docstring asks for no gradient: it works on gradients, between steps"

EQUIVALENT = {
    ("bytes_formula", "return (not frozen_A) ** 2 * x + dropout * x + tokens * rank * size"): "0 and 1 are their own squares",
    ("bytes_formula", "return (not frozen_A) * x + dropout ** 2 * x + tokens * rank * size"): "0 and 1 are their own squares",
    ("saved_bytes", "storage = tensor.detach().untyped_storage()"): "the same storage",
    ("saved_bytes", "return _cut(tensor)"): "what is put aside is looked at by backward only, which knows by itself where it came from",
    ("saved_bytes", "return tensor.detach()"): "what is put aside is looked at by backward only, which knows by itself where it came from",
    ("row_space", "return (seen, (seen.square().sum() / G.detach().square().sum()).item())"): "the share is a Python float and has no gradient",
    ("SeededDropoutFunction", "return mask.bernoulli_(1 - p, generator=torch.Generator(like.device).manual_seed(seed)) ** 2 / (1 - p)"): "0 and 1 are their own squares",
    ("SeededDropoutFunction", "return _cut(mask.bernoulli_(1 - p, generator=torch.Generator(like.device).manual_seed(seed)) / (1 - p))"): "a mask has no gradient",
} | {("project_gradient", line): BETWEEN_STEPS for line in (
    "return _cut(g @ torch.linalg.pinv(A @ A.T) / scale ** 2)", "return g.detach() @ torch.linalg.pinv(A @ A.T) / scale ** 2",
    "return g @ torch.linalg.pinv(A.detach() @ A.T) / scale ** 2", "return g @ torch.linalg.pinv(A @ A.detach().T) / scale ** 2",
)} | {(name, line): NO_GRAPH for name in ("LoRAFAFunction", "SeededDropoutFunction") for line in (
    "ctx.save_for_backward(z, A.detach(), B)", "ctx.save_for_backward(z, A, B.detach())", "return _cut(scale * (z @ B.T))", "return scale * (z @ B.detach().T)",
    "dB = g.detach().reshape(-1, B.shape[0]).T @ z.reshape(-1, B.shape[1])",
)} | {("LoRAFAFunction", line): NO_GRAPH for line in (
    "z = x.detach() @ A.T", "z = x @ A.detach().T", "return _cut((ctx.scale * (g @ B @ A), None, ctx.scale * dB, None))", "return (ctx.scale * (g.detach() @ B @ A), None, ctx.scale * dB, None)",
)} | {("SeededDropoutFunction", line): NO_GRAPH for line in (
    "z = x.detach() * _mask(x, p, seed) @ A.T", "z = x * _mask(x.detach(), p, seed) @ A.T", "z = x * _mask(x, p, seed) @ A.detach().T",
    "dropped = ctx.scale * (g.detach() @ B @ A)", "return _cut((dropped * _mask(dropped, ctx.p, ctx.seed), None, ctx.scale * dB, None, None, None))",
)}
