"""Plausible mistakes in lesson 10, each of which the tests must reject with the message named here."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minilora as ml
from lessons import provokes


@provokes("a layer whose x needs no gradient is counted")
def naive_keeps__every_layer(layers: list[tuple[int, int, bool]], size: int) -> int:
    return size * sum(out * into for out, into, _ in layers)


@provokes("these are numbers, not bytes")
def naive_keeps__numbers(layers: list[tuple[int, int, bool]], size: int) -> int:
    return sum(out * into for out, into, asked in layers if asked)


@provokes("these are the codes")
def naive_keeps__codes(layers: list[tuple[int, int, bool]], size: int) -> int:
    return sum(out * into for out, into, asked in layers if asked) // 2


@provokes("that is the largest alone")
def naive_keeps__one_at_a_time(layers: list[tuple[int, int, bool]], size: int) -> int:
    return size * max([out * into for out, into, asked in layers if asked], default=0)


@provokes("it is the other way round")
def naive_keeps__the_others(layers: list[tuple[int, int, bool]], size: int) -> int:
    return size * sum(out * into for out, into, asked in layers if not asked)


@provokes("a dense weight is still there when forward is over")
class FourBitLinearFunction__keeps_the_dense_weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, Q: ml.NF4Tensor, bias: Tensor | None) -> Tensor:
        W = Q.dequantize(x.dtype)
        ctx.save_for_backward(W)
        return F.linear(x, W, bias)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        W, = ctx.saved_tensors
        by_x, _, by_bias = ctx.needs_input_grad
        return g @ W if by_x else None, None, g.reshape(-1, g.shape[-1]).sum(0) if by_bias else None


@provokes("a dense weight is still there when forward is over")
class FourBitLinearFunction__a_cache(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, Q: ml.NF4Tensor, bias: Tensor | None) -> Tensor:
        if "dense" not in vars(Q):
            object.__setattr__(Q, "dense", Q.dequantize(x.dtype))
        ctx.Q = Q
        return F.linear(x, Q.dense.to(x.dtype), bias)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        by_x, _, by_bias = ctx.needs_input_grad
        return g @ ctx.Q.dense.to(g.dtype) if by_x else None, None, g.reshape(-1, g.shape[-1]).sum(0) if by_bias else None


@provokes("x is still held")
class FourBitLinearFunction__keeps_x(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, Q: ml.NF4Tensor, bias: Tensor | None) -> Tensor:
        ctx.Q = Q
        ctx.save_for_backward(x)
        return F.linear(x, Q.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        by_x, _, by_bias = ctx.needs_input_grad
        return g @ ctx.Q.dequantize(g.dtype) if by_x else None, None, g.reshape(-1, g.shape[-1]).sum(0) if by_bias else None


@provokes("dL/dx is None")
class FourBitLinearFunction__frozen_so_none(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, Q: ml.NF4Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, Q.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        return None, None, g.reshape(-1, g.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None


@provokes("W̃ was made in backward all the same")
class FourBitLinearFunction__always_asked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, Q: ml.NF4Tensor, bias: Tensor | None) -> Tensor:
        ctx.Q = Q
        return F.linear(x, Q.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        dx, dbias = g @ ctx.Q.dequantize(g.dtype), g.reshape(-1, g.shape[-1]).sum(0)
        return dx if ctx.needs_input_grad[0] else None, None, dbias if ctx.needs_input_grad[2] else None


@provokes("dL/dbias is the sum over all rows, not their mean")
class FourBitLinearFunction__mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, Q: ml.NF4Tensor, bias: Tensor | None) -> Tensor:
        ctx.Q = Q
        return F.linear(x, Q.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        by_x, _, by_bias = ctx.needs_input_grad
        return g @ ctx.Q.dequantize(g.dtype) if by_x else None, None, g.reshape(-1, g.shape[-1]).mean(0) if by_bias else None


@provokes("must have the same dtype")
class FourBitLinearFunction__the_stored_type(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, Q: ml.NF4Tensor, bias: Tensor | None) -> Tensor:
        ctx.Q = Q
        return F.linear(x, Q.dequantize(), bias)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        by_x, _, by_bias = ctx.needs_input_grad
        return g @ ctx.Q.dequantize() if by_x else None, None, g.reshape(-1, g.shape[-1]).sum(0) if by_bias else None


@provokes("there .view fails, .reshape does not")
class FourBitLinearFunction__a_view(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, Q: ml.NF4Tensor, bias: Tensor | None) -> Tensor:
        ctx.Q = Q
        return F.linear(x, Q.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        by_x, _, by_bias = ctx.needs_input_grad
        return g @ ctx.Q.dequantize(g.dtype) if by_x else None, None, g.view(-1, g.shape[-1]).sum(0) if by_bias else None


@provokes("the rounding errors of float32")
class FourBitLinearFunction__in_float32(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, Q: ml.NF4Tensor, bias: Tensor | None) -> Tensor:
        ctx.Q = Q
        return F.linear(x.float(), Q.dequantize(torch.float32), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        by_x, _, by_bias = ctx.needs_input_grad
        return g @ ctx.Q.dequantize(g.dtype) if by_x else None, None, g.reshape(-1, g.shape[-1]).sum(0) if by_bias else None


@provokes("dL/dx has the rounding errors of float32")
class FourBitLinearFunction__backward_in_float32(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, Q: ml.NF4Tensor, bias: Tensor | None) -> Tensor:
        ctx.Q = Q
        return F.linear(x, Q.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        by_x, _, by_bias = ctx.needs_input_grad
        return (g.float() @ ctx.Q.dequantize(torch.float32)).to(g.dtype) if by_x else None, None, g.reshape(-1, g.shape[-1]).sum(0) if by_bias else None


@provokes("all dense weights are counted")
def qlora_bill__all_dense(model: nn.Module) -> dict[str, int]:
    everything = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    dense = sum(m.weight.nbytes for m in model.modules() if isinstance(m, ml.NF4Linear))
    return {"frozen": everything - trained, "trained": trained, "gradients": trained, "moments": 2 * trained, "passing": dense}


@provokes("the buffers are missing")
def qlora_bill__no_buffers(model: nn.Module) -> dict[str, int]:
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    dense = max((m.out_features * m.in_features * m.compute_dtype.itemsize for m in model.modules() if isinstance(m, ml.NF4Linear)), default=0)
    return {"frozen": sum(p.nbytes for p in model.parameters() if not p.requires_grad), "trained": trained, "gradients": trained, "moments": 2 * trained, "passing": dense}


@provokes("AdamW keeps two numbers for each that is trained")
def qlora_bill__one_moment(model: nn.Module) -> dict[str, int]:
    everything = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    dense = max((m.out_features * m.in_features * m.compute_dtype.itemsize for m in model.modules() if isinstance(m, ml.NF4Linear)), default=0)
    return {"frozen": everything - trained, "trained": trained, "gradients": trained, "moments": trained, "passing": dense}


@provokes("what is trained is counted under frozen too")
def qlora_bill__twice(model: nn.Module) -> dict[str, int]:
    everything = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    dense = max((m.out_features * m.in_features * m.compute_dtype.itemsize for m in model.modules() if isinstance(m, ml.NF4Linear)), default=0)
    return {"frozen": everything, "trained": trained, "gradients": trained, "moments": 2 * trained, "passing": dense}


@provokes("passing: that is the packed weight")
def qlora_bill__packed(model: nn.Module) -> dict[str, int]:
    everything = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    packed = max((m.codes.nbytes for m in model.modules() if isinstance(m, ml.NF4Linear)), default=0)
    return {"frozen": everything - trained, "trained": trained, "gradients": trained, "moments": 2 * trained, "passing": packed}


@provokes("ask each layer's compute_dtype")
def qlora_bill__always_float32(model: nn.Module) -> dict[str, int]:
    everything = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    dense = max((m.out_features * m.in_features * 4 for m in model.modules() if isinstance(m, ml.NF4Linear)), default=0)
    return {"frozen": everything - trained, "trained": trained, "gradients": trained, "moments": 2 * trained, "passing": dense}


@provokes("a shared tensor counts once")
def qlora_bill__module_by_module(model: nn.Module) -> dict[str, int]:
    trained = frozen = dense = 0
    for m in model.modules():
        trained += sum(p.nbytes for p in m.parameters(recurse=False) if p.requires_grad)
        frozen += sum(p.nbytes for p in m.parameters(recurse=False) if not p.requires_grad) + sum(b.nbytes for b in m.buffers())
        dense = max(dense, m.out_features * m.in_features * m.compute_dtype.itemsize if isinstance(m, ml.NF4Linear) else 0)
    return {"frozen": frozen, "trained": trained, "gradients": trained, "moments": 2 * trained, "passing": dense}


@provokes("AdamW's step counters are counted")
def qlora_bill__counters(model: nn.Module) -> dict[str, int]:
    everything = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    parameters = [p for p in model.parameters() if p.requires_grad]
    trained = sum(p.nbytes for p in parameters)
    dense = max((m.out_features * m.in_features * m.compute_dtype.itemsize for m in model.modules() if isinstance(m, ml.NF4Linear)), default=0)
    return {"frozen": everything - trained, "trained": trained, "gradients": trained, "moments": 2 * trained + 4 * len(parameters), "passing": dense}


@provokes("gradients: four bytes a number are counted")
def qlora_bill__gradients_in_float32(model: nn.Module) -> dict[str, int]:
    everything = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    parameters = [p for p in model.parameters() if p.requires_grad]
    trained, numbers = sum(p.nbytes for p in parameters), sum(p.numel() for p in parameters)
    dense = max((m.out_features * m.in_features * m.compute_dtype.itemsize for m in model.modules() if isinstance(m, ml.NF4Linear)), default=0)
    return {"frozen": everything - trained, "trained": trained, "gradients": 4 * numbers, "moments": 2 * trained, "passing": dense}


@provokes("moments: four bytes a number are counted")
def qlora_bill__moments_in_float32(model: nn.Module) -> dict[str, int]:
    everything = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    parameters = [p for p in model.parameters() if p.requires_grad]
    trained, numbers = sum(p.nbytes for p in parameters), sum(p.numel() for p in parameters)
    dense = max((m.out_features * m.in_features * m.compute_dtype.itemsize for m in model.modules() if isinstance(m, ml.NF4Linear)), default=0)
    return {"frozen": everything - trained, "trained": trained, "gradients": trained, "moments": 8 * numbers, "passing": dense}


def _log(visits, room, goes):
    """What the wrong logs share. goes: the place of the page that makes room, in the order of use."""
    here, log = [], []
    for page in visits:
        if page in here:
            here.remove(page)
        else:
            if len(here) == room:
                log.append(("out", here.pop(goes)))
            log.append(("in", page))
        here.append(page)
    return log


@provokes("the page used longest ago goes out")
def page_in_page_out__used_longest_ago(visits: list[int], room: int) -> list[tuple[str, int]]:
    return _log(visits, room, 0)


@provokes("the page that came in first goes out")
def page_in_page_out__first_in_first_out(visits: list[int], room: int) -> list[tuple[str, int]]:
    here, log = [], []
    for page in visits:
        if page not in here:
            if len(here) == room:
                log.append(("out", here.pop(0)))
            log.append(("in", page))
            here.append(page)
    return log


@provokes("the page that came in last goes out")
def page_in_page_out__last_in_first_out(visits: list[int], room: int) -> list[tuple[str, int]]:
    here, log = [], []
    for page in visits:
        if page not in here:
            if len(here) == room:
                log.append(("out", here.pop()))
            log.append(("in", page))
            here.append(page)
    return log


@provokes("the page with the highest number goes out")
def page_in_page_out__the_highest_number(visits: list[int], room: int) -> list[tuple[str, int]]:
    here, log = [], []
    for page in visits:
        if page not in here:
            if len(here) == room:
                log.append(("out", max(here)))
                here.remove(max(here))
            log.append(("in", page))
            here.append(page)
    return log


@provokes("a page that comes in is logged before the one that makes room for it")
def page_in_page_out__in_before_out(visits: list[int], room: int) -> list[tuple[str, int]]:
    log = []
    for entry in _log(visits, room, -1):
        log.append(entry)
        if len(log) > 1 and log[-2][0] == "out":
            log[-2:] = log[-1], log[-2]
    return log


@provokes("what goes out is not logged")
def page_in_page_out__in_only(visits: list[int], room: int) -> list[tuple[str, int]]:
    return [entry for entry in _log(visits, room, -1) if entry[0] == "in"]


@provokes("a page that is on the device already moves nothing")
def page_in_page_out__every_visit(visits: list[int], room: int) -> list[tuple[str, int]]:
    return [("in", page) for page in visits]


@provokes("is wanted, got")
def page_in_page_out__a_page_too_few(visits: list[int], room: int) -> list[tuple[str, int]]:
    return _log(visits, max(1, room - 1), -1)


def _nf4(w, block_size):
    return ml.quantize_nf4(w, block_size).dequantize()


@provokes("D's length says nothing about its direction")
def left_after_merge__lengths(W: Tensor, dW: Tensor, block_size: int) -> tuple[float, float]:
    W, dW = W.double(), dW.double()
    D = _nf4(W + dW, block_size) - _nf4(W, block_size)
    return (D.norm() / dW.norm()).item(), ((D - dW).norm() / dW.norm()).item()


@provokes("that is the share of ‖dW‖, not of ‖dW‖²")
def left_after_merge__cosine(W: Tensor, dW: Tensor, block_size: int) -> tuple[float, float]:
    W, dW = W.double(), dW.double()
    D = _nf4(W + dW, block_size) - _nf4(W, block_size)
    return F.cosine_similarity(D.flatten(), dW.flatten(), dim=0).item(), ((D - dW).norm() / dW.norm()).item()


@provokes("dW itself is compared, quantized alone")
def left_after_merge__dW_alone(W: Tensor, dW: Tensor, block_size: int) -> tuple[float, float]:
    dW = dW.double()
    D = _nf4(dW, block_size)
    return ((D * dW).sum() / dW.square().sum()).item(), ((D - dW).norm() / dW.norm()).item()


@provokes("before the merge the layer multiplied by nf4(W)")
def left_after_merge__from_the_original(W: Tensor, dW: Tensor, block_size: int) -> tuple[float, float]:
    W, dW = W.double(), dW.double()
    D = _nf4(W + dW, block_size) - W
    return ((D * dW).sum() / dW.square().sum()).item(), ((D - dW).norm() / dW.norm()).item()


@provokes("the distance is counted in lengths of W")
def left_after_merge__relative_to_W(W: Tensor, dW: Tensor, block_size: int) -> tuple[float, float]:
    W, dW = W.double(), dW.double()
    D = _nf4(W + dW, block_size) - _nf4(W, block_size)
    return ((D * dW).sum() / dW.square().sum()).item(), ((D - dW).norm() / W.norm()).item()


@provokes("the distance is a norm")
def left_after_merge__no_root(W: Tensor, dW: Tensor, block_size: int) -> tuple[float, float]:
    W, dW = W.double(), dW.double()
    D = _nf4(W + dW, block_size) - _nf4(W, block_size)
    return ((D * dW).sum() / dW.square().sum()).item(), ((D - dW).square().sum() / dW.square().sum()).item()


@provokes("hand it block_size")
def left_after_merge__one_block_size(W: Tensor, dW: Tensor, block_size: int) -> tuple[float, float]:
    W, dW = W.double(), dW.double()
    D = _nf4(W + dW, 64) - _nf4(W, 64)
    return ((D * dW).sum() / dW.square().sum()).item(), ((D - dW).norm() / dW.norm()).item()


@provokes("make both float32 or wider first")
def left_after_merge__in_the_types_given(W: Tensor, dW: Tensor, block_size: int) -> tuple[float, float]:
    D = _nf4(W + dW, block_size) - _nf4(W, block_size)
    D, dW = D.double(), dW.double()
    return ((D * dW).sum() / dW.square().sum()).item(), ((D - dW).norm() / dW.norm()).item()


class _Layer(nn.Module):
    """The right layer, of which each wrong one changes a part."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base = ml.NF4Linear.of(linear).requires_grad_(False)
        self.scale = alpha / rank
        self.A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * (x @ self.A.T.to(x.dtype) @ self.B.T.to(x.dtype))

    def dense(self, weight: Tensor) -> nn.Linear:
        linear = nn.Linear(self.base.in_features, self.base.out_features, bias=self.base.bias is not None, dtype=self.base.dtype)
        linear.weight.copy_(weight)
        if self.base.bias is not None:
            linear.bias.copy_(self.base.bias)
        return linear

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        return self.dense(self.base.dequantize(torch.float32) + self.scale * self.B @ self.A)


@provokes("A and B are trained and nothing else")
class QLoRALayer__bias_trained(_Layer):
    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__(linear, rank, alpha)
        self.base.requires_grad_(True)


@provokes("the dense W is still held")
class QLoRALayer__the_original_kept(_Layer):
    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__(linear, rank, alpha)
        self.original = [linear]


@provokes("a dense weight is still alive when forward is over")
class QLoRALayer__naive(_Layer):
    def forward(self, x: Tensor) -> Tensor:
        base = F.linear(x, self.base.dequantize(x.dtype), None if self.base.bias is None else self.base.bias.to(x.dtype))
        return base + self.scale * (x @ self.A.T.to(x.dtype) @ self.B.T.to(x.dtype))


@provokes("the scale is missing")
class QLoRALayer__no_scale(_Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.A.T.to(x.dtype) @ self.B.T.to(x.dtype)


@provokes("the scale is alpha / √rank")
class QLoRALayer__scale_of_rslora(_Layer):
    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__(linear, rank, alpha)
        self.scale = alpha / math.sqrt(rank)


@provokes("bytes, the layer stores")
class QLoRALayer__plain_scales(_Layer):
    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__(linear, rank, alpha)
        self.base = ml.NF4Linear.of(linear, double=False).requires_grad_(False)


@provokes("neither would ever hear a gradient")
class QLoRALayer__both_zero(_Layer):
    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__(linear, rank, alpha)
        nn.init.zeros_(self.A)


@provokes("a dense nn.Linear is wanted")
class QLoRALayer__merged_into_four_bits(_Layer):
    @torch.no_grad()
    def merged(self) -> nn.Linear:
        return ml.NF4Linear.of(self.dense(self.base.dequantize(torch.float32) + self.scale * self.B @ self.A))


@provokes("went through four bits again")
class QLoRALayer__merged_and_rounded_to_levels(_Layer):
    @torch.no_grad()
    def merged(self) -> nn.Linear:
        return self.dense(ml.quantize_nf4(self.base.dequantize(torch.float32) + self.scale * self.B @ self.A, double=True).dequantize())


@provokes("the bias too must be a copy")
class QLoRALayer__bias_shared(_Layer):
    @torch.no_grad()
    def merged(self) -> nn.Linear:
        linear = super().merged()
        linear.bias = self.base.bias
        return linear


@provokes("rounded before adding")
class QLoRALayer__rounded_twice(_Layer):
    @torch.no_grad()
    def merged(self) -> nn.Linear:
        return self.dense(self.base.dequantize() + (self.scale * self.B @ self.A).to(self.base.dtype))


@provokes("A and B are in float32 whatever the linear is")
class QLoRALayer__of_the_linear_s_type(_Layer):
    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__(linear, rank, alpha)
        self.A, self.B = (nn.Parameter(M.detach().to(linear.weight.dtype)) for M in (self.A, self.B))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        return self.dense(self.base.dequantize(torch.float32) + self.scale * self.B.float() @ self.A.float())
