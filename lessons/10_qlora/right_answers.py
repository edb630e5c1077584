"""Right answers in another style, each of which the tests must accept."""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minilora as ml


def naive_keeps__loop(layers: list[tuple[int, int, bool]], size: int) -> int:
    kept = 0
    for layer in layers:
        kept += math.prod(layer) * size                                    # True is 1, False is 0
    return kept


class FourBitLinearFunction__saved_parts(torch.autograd.Function):
    """Codes and scales go through the books; the rest of Q is put together again in backward."""

    @staticmethod
    def forward(ctx, x: Tensor, Q: ml.NF4Tensor, bias: Tensor | None) -> Tensor:
        scales = Q.stored_scales
        ctx.parts = [scales] if isinstance(scales, Tensor) else [scales.codes, scales.absmax, scales.offset]
        ctx.save_for_backward(Q.codes, *ctx.parts)
        ctx.kind, ctx.about = type(scales), (Q.shape, Q.dtype, Q.block_size)
        del ctx.parts
        y = torch.einsum("...i,oi->...o", x, Q.dequantize(x.dtype))
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        codes, *parts = ctx.saved_tensors
        found = [None, None, None]
        if ctx.needs_input_grad[0]:
            Q = ml.NF4Tensor(codes, parts[0] if issubclass(ctx.kind, Tensor) else ctx.kind(*parts), *ctx.about)
            found[0] = torch.einsum("...o,oi->...i", g, Q.dequantize(g.dtype))
        if ctx.needs_input_grad[2]:
            found[2] = g.sum(dim=list(range(g.dim() - 1))) if g.dim() > 1 else g.clone()
        return tuple(found)


class FourBitLinearFunction__setup_context(torch.autograd.Function):
    """PyTorch's newer form: forward without ctx."""

    @staticmethod
    def forward(x: Tensor, Q: ml.NF4Tensor, bias: Tensor | None) -> Tensor:
        return x @ Q.dequantize(x.dtype).T + (0 if bias is None else bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.Q = inputs[1]

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        dx = torch.matmul(g, ctx.Q.dequantize(g.dtype)) if ctx.needs_input_grad[0] else None
        return dx, None, torch.ones(g.shape[:-1].numel(), dtype=g.dtype) @ g.reshape(-1, g.shape[-1]) if ctx.needs_input_grad[2] else None


class FourBitLinearFunction__einsum(torch.autograd.Function):
    """Where g is one vector, dL/dbias is g itself, seen anew."""

    @staticmethod
    def forward(ctx, x: Tensor, Q: ml.NF4Tensor, bias: Tensor | None) -> Tensor:
        ctx.Q = Q
        return F.linear(x, Q.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        by_x, _, by_bias = ctx.needs_input_grad
        return torch.einsum("...o,oi->...i", g, ctx.Q.dequantize(g.dtype)) if by_x else None, None, torch.einsum("...o->o", g) if by_bias else None


def qlora_bill__state_by_state(model: nn.Module) -> dict[str, int]:
    bill = dict.fromkeys(("frozen", "trained", "gradients", "moments", "passing"), 0)
    for tensor in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values():
        size = tensor.numel() * tensor.element_size()
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            for name, times in (("trained", 1), ("gradients", 1), ("moments", 2)):
                bill[name] += times * size
        else:
            bill["frozen"] += size
    for module in model.modules():
        if isinstance(module, ml.NF4Linear):
            bill["passing"] = max(bill["passing"], module.weight.nbytes)
    return bill


def page_in_page_out__clock(visits: list[int], room: int) -> list[tuple[str, int]]:
    used, log = {}, []
    for now, page in enumerate(visits):
        if page not in used:
            if len(used) >= room:
                newest = max(used, key=used.get)
                del used[newest]
                log += [("out", newest)]
            log += [("in", page)]
        used[page] = now
    return log


def page_in_page_out__ordered(visits: list[int], room: int) -> list[tuple[str, int]]:
    device, log = OrderedDict(), []
    for page in visits:
        if page not in device:
            if len(device) == room:
                log.append(("out", device.popitem(last=True)[0]))
            log.append(("in", page))
        device[page] = True
        device.move_to_end(page)
    return log


def page_in_page_out__the_visit_before(visits: list[int], room: int) -> list[tuple[str, int]]:
    """The page used last is the one of the visit before, and that one is always there."""
    here, log, last = set(), [], None
    for page in visits:
        if page not in here:
            if len(here) == room:
                here.remove(last)
                log.append(("out", last))
            here.add(page)
            log.append(("in", page))
        last = page
    return log


def left_after_merge__flat(W: Tensor, dW: Tensor, block_size: int) -> tuple[float, float]:
    before, after = (ml.quantize_nf4(w, block_size).dequantize(torch.float64).flatten() for w in (W.double(), W.double() + dW.double()))
    d = dW.double().flatten()
    gained = after - before
    return float(torch.dot(gained, d) / torch.dot(d, d)), math.sqrt(float((gained - d).square().sum() / torch.dot(d, d)))


class QLoRALayer__around_minilora_s(nn.Module):
    """W's four bits in buffers of its own, and the package's product."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.add_module("four", ml.NF4Linear(ml.quantize_nf4(linear.weight, 64, double=True),
                                             None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)))
        self.rank, self.alpha = rank, alpha
        bound = linear.in_features ** -0.5
        self.A = nn.Parameter(torch.empty(rank, linear.in_features).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        z = F.linear(x, self.A.to(x.dtype))
        return self.four(x).add(F.linear(z, self.B.to(x.dtype)), alpha=self.alpha / self.rank)

    def merged(self) -> nn.Linear:
        W = self.four.dequantize(torch.float32).addmm(self.B.detach(), self.A.detach(), alpha=self.alpha / self.rank)
        linear = nn.Linear(self.four.in_features, self.four.out_features, bias=self.four.bias is not None).to(self.four.dtype)
        state = {"weight": W.to(self.four.dtype)} | ({} if self.four.bias is None else {"bias": self.four.bias.detach().clone()})
        linear.load_state_dict(state)
        return linear


class QLoRALayer__branch_in_float32(QLoRALayer__around_minilora_s):
    """A and B stay in their type, and x comes to them."""

    def forward(self, x: Tensor) -> Tensor:
        branch = F.linear(F.linear(x.float(), self.A), self.B)
        return (self.four(x).float() + self.alpha / self.rank * branch).to(x.dtype)
