"""Mutants of the solutions that are no mistakes: (exercise, the line as changed by machine): why it does the same."""

INSIDE = "inside an autograd Function nothing is recorded: its gradients are what its own backward says"
ONCE = "a gradient of the gradient is not promised"

EQUIVALENT = {
    ("FourBitLinearFunction", "return _cut(F.linear(x, Q.dequantize(x.dtype), bias))"): INSIDE,
    ("FourBitLinearFunction", "return F.linear(x.detach(), Q.dequantize(x.dtype), bias)"): INSIDE,
    ("FourBitLinearFunction", "dx = g.detach() @ ctx.Q.dequantize(g.dtype) if by_x else None"): ONCE,
    ("FourBitLinearFunction", "dbias = g.detach().reshape(-1, g.shape[-1]).sum(0) if by_bias else None"): ONCE,
    ("FourBitLinearFunction", "return _cut((dx, None, dbias))"): ONCE,
    ("left_after_merge", "return (((D * dW).sum() / dW.square().sum()).item(), ((dW - D).norm() / dW.norm()).item())"): "a distance is the same from both ends",
}
