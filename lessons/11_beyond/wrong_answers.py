"""Plausible mistakes in lesson 11, each of which the tests must reject with the message named here."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lessons import provokes


@provokes("rsLoRA divides by √rank")
def rslora_scale__never(alpha: float, rank: int, rslora: bool) -> float:
    return alpha / rank


@provokes("without rslora it is alpha / rank")
def rslora_scale__always(alpha: float, rank: int, rslora: bool) -> float:
    return alpha / math.sqrt(rank)


@provokes("and then by √rank")
def rslora_scale__twice(alpha: float, rank: int, rslora: bool) -> float:
    scale = alpha / rank
    return scale / math.sqrt(rank) if rslora else scale


@provokes("the root was taken of the whole")
def rslora_scale__of_the_whole(alpha: float, rank: int, rslora: bool) -> float:
    return math.sqrt(alpha / rank) if rslora else alpha / rank


@provokes("this is floored")
def rslora_scale__floored(alpha: float, rank: int, rslora: bool) -> float:
    return alpha / math.sqrt(rank) if rslora else alpha // rank


@provokes("√rank was rounded")
def rslora_scale__whole_root(alpha: float, rank: int, rslora: bool) -> float:
    return alpha / (math.isqrt(rank) if rslora else rank)


def _stretched(x, V, bias, factor):
    """What the wrong forwards share: factor (out) times V's rows."""
    return F.linear(x, factor[:, None] * V, bias)


@provokes("columns of V, one for each input")
def dora_forward__columns(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> Tensor:
    V = W + scale * B @ A
    return F.linear(x, magnitude[:, None] * V / V.norm(dim=0).detach(), bias)


@provokes("n is the length of W's rows")
def dora_forward__norm_of_w(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> Tensor:
    return _stretched(x, W + scale * B @ A, bias, magnitude / W.norm(dim=1))


@provokes("n is not a constant")
def dora_forward__norm_not_held(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> Tensor:
    V = W + scale * B @ A
    return _stretched(x, V, bias, magnitude / V.norm(dim=1))


@provokes("no gradient reaches A")
def dora_forward__too_much_held(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> Tensor:
    V = (W + scale * B @ A).detach()
    return _stretched(x, V, bias, magnitude / V.norm(dim=1))


@provokes("the bias is scaled too")
def dora_forward__bias_scaled(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> Tensor:
    V = W + scale * B @ A
    return (magnitude / V.norm(dim=1).detach()) * F.linear(x, V, bias)


@provokes("n is missing")
def dora_forward__no_norm(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> Tensor:
    return _stretched(x, W + scale * B @ A, bias, magnitude)


@provokes("n is squared")
def dora_forward__norm_squared(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> Tensor:
    V = W + scale * B @ A
    return _stretched(x, V, bias, magnitude / V.square().sum(1).detach())


@provokes("s is missing")
def dora_forward__no_scale(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> Tensor:
    V = W + B @ A
    return _stretched(x, V, bias, magnitude / V.norm(dim=1).detach())


@provokes("only W is stretched")
def dora_forward__update_beside(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> Tensor:
    n = (W + scale * B @ A).norm(dim=1).detach()
    return _stretched(x, W, bias, magnitude / n) + scale * (x @ A.T) @ B.T


@provokes("a row may turn round")
def dora_forward__positive(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> Tensor:
    V = W + scale * B @ A
    return _stretched(x, V, bias, magnitude.abs() / V.norm(dim=1).detach())


@provokes("bias may be None")
def dora_forward__needs_a_bias(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> Tensor:
    V = W + scale * B @ A
    return (magnitude / V.norm(dim=1).detach()) * (x @ V.T) + bias


def _parts(W, A, B, scale):
    V = W + scale * B @ A
    return V, V.norm(dim=1)


@provokes("is LoRA's: the factor m / n of each row is missing")
def dora_gradient__loras(G: Tensor, W: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    V, n = _parts(W, A, B, scale)
    return (G * V).sum(1) / n, scale * B.T @ G, scale * G @ A.T


@provokes("goes through the norm as well")
def dora_gradient__not_held(G: Tensor, W: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    V, n = _parts(W, A, B, scale)
    direction = V / n[:, None]
    to_V = (magnitude / n)[:, None] * (G - (G * direction).sum(1, keepdim=True) * direction)
    return (G * direction).sum(1), scale * B.T @ to_V, scale * to_V @ A.T


@provokes("dL/dm is not divided by n")
def dora_gradient__m_not_divided(G: Tensor, W: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    V, n = _parts(W, A, B, scale)
    to_V = (magnitude / n)[:, None] * G
    return (G * V).sum(1), scale * B.T @ to_V, scale * to_V @ A.T


@provokes("dL/dm is taken with W")
def dora_gradient__m_of_w(G: Tensor, W: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    V, n = _parts(W, A, B, scale)
    to_V = (magnitude / n)[:, None] * G
    return (G * W).sum(1) / W.norm(dim=1), scale * B.T @ to_V, scale * to_V @ A.T


@provokes("dL/dm is ⟨G, W⟩ / n")
def dora_gradient__m_with_w(G: Tensor, W: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    V, n = _parts(W, A, B, scale)
    to_V = (magnitude / n)[:, None] * G
    return (G * W).sum(1) / n, scale * B.T @ to_V, scale * to_V @ A.T


@provokes("autograd recorded this")
def dora_gradient__by_autograd(G: Tensor, W: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers are right, and the exercise is not done."""
    with torch.enable_grad():
        a, b, m = (t.detach().clone().requires_grad_() for t in (A, B, magnitude))
        V = W + scale * b @ a
        return torch.autograd.grad(((m / V.detach().norm(dim=1))[:, None] * V * G).sum(), (m, a, b))


@provokes("lacks s")
def dora_gradient__no_scale(G: Tensor, W: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    V, n = _parts(W, A, B, scale)
    to_V = (magnitude / n)[:, None] * G
    return (G * V).sum(1) / n, B.T @ to_V, to_V @ A.T


@provokes("n is the length of W's rows")
def dora_gradient__norm_of_the_start(G: Tensor, W: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    V, n = _parts(W, A, B, scale)
    to_V = (magnitude / W.norm(dim=1))[:, None] * G
    return (G * V).sum(1) / n, scale * B.T @ to_V, scale * to_V @ A.T


@provokes("B: shape (7, 2) is wanted")
def dora_gradient__b_transposed(G: Tensor, W: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    V, n = _parts(W, A, B, scale)
    to_V = (magnitude / n)[:, None] * G
    return (G * V).sum(1) / n, scale * B.T @ to_V, scale * A @ to_V.T


def _cut(W, rank):
    U, S, Vt = torch.linalg.svd(W.double(), full_matrices=False)
    return U[:, :rank], S[:rank], Vt[:rank]


@provokes("is s times too large")
def pissa_split__scale_forgotten(W: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vt = _cut(W, rank)
    A, B = S.sqrt()[:, None] * Vt, U * S.sqrt()
    return A.to(W), B.to(W), (W - scale * B @ A).to(W)


@provokes("all of S lies on this side")
def pissa_split__one_sided(W: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vt = _cut(W, rank)
    A, B = (S / scale)[:, None] * Vt, U
    return A.to(W), B.to(W), (W - scale * B @ A).to(W)


@provokes("the directions come smallest first")
def pissa_split__reversed(W: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vt = (part.flip(dim) for part, dim in zip(_cut(W, rank), (1, 0, 0)))
    A, B = (S / scale).sqrt()[:, None] * Vt, U * (S / scale).sqrt()
    return A.to(W), B.to(W), (W - scale * B @ A).to(W)


@provokes("these are the smallest singular values")
def pissa_split__smallest(W: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vt = torch.linalg.svd(W.double(), full_matrices=False)
    root = (S[-rank:] / scale).sqrt()
    A, B = root[:, None] * Vt[-rank:], U[:, -rank:] * root
    return A.to(W), B.to(W), (W - scale * B @ A).to(W)


@provokes("rest is W minus B A; s belongs there too")
def pissa_split__rest_without_scale(W: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vt = _cut(W, rank)
    A, B = (S / scale).sqrt()[:, None] * Vt, U * (S / scale).sqrt()
    return A.to(W), B.to(W), (W - B @ A).to(W)


@provokes("shapes: A is (rank, in)")
def pissa_split__exchanged(W: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vt = _cut(W, rank)
    A, B = U * (S / scale).sqrt(), (S / scale).sqrt()[:, None] * Vt
    return A.to(W), B.to(W), (W - scale * A @ B).to(W)


@provokes("rounded once to")
def pissa_split__rounded_twice(W: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vt = _cut(W, rank)
    A, B = ((S / scale).sqrt()[:, None] * Vt).to(W), (U * (S / scale).sqrt()).to(W)
    return A, B, W - scale * B @ A


@provokes("that were rounded before")
def pissa_split__rest_of_the_rounded(W: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vt = _cut(W, rank)
    A, B = ((S / scale).sqrt()[:, None] * Vt).to(W), (U * (S / scale).sqrt()).to(W)
    return A, B, (W.double() - scale * B.double() @ A.double()).to(W)


@provokes("digits, as float32 is")
def pissa_split__in_float32(W: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vt = torch.linalg.svd(W.float(), full_matrices=False)
    root = (S[:rank] / scale).sqrt()
    A, B = root[:, None] * Vt[:rank], U[:, :rank] * root
    return A.to(W), B.to(W), (W - scale * B @ A).to(W)


@provokes("and so must all three be")
def pissa_split__left_in_float64(W: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vt = _cut(W, rank)
    A, B = (S / scale).sqrt()[:, None] * Vt, U * (S / scale).sqrt()
    return A, B, W - scale * B @ A


@provokes("this is QPiSSA")
def loftq_alternate__svd_first(W: Tensor, rank: int, iterations: int, scale: float, quantize: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    if iterations < 1:
        raise ValueError("no round")
    Q = torch.zeros_like(W)
    for _ in range(iterations):
        U, S, Vt = _cut(W - Q, rank)
        A, B = (S / scale).sqrt()[:, None] * Vt, U * (S / scale).sqrt()
        Q = quantize(W - scale * B @ A)
    return Q, A, B


@provokes("B A is the best part of W itself")
def loftq_alternate__of_w(W: Tensor, rank: int, iterations: int, scale: float, quantize: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    if iterations < 1:
        raise ValueError("no round")
    U, S, Vt = _cut(W, rank)
    return quantize(W), (S / scale).sqrt()[:, None] * Vt, U * (S / scale).sqrt()


@provokes("round 2 quantizes W - B A; s is missing")
def loftq_alternate__scale_forgotten_in_q(W: Tensor, rank: int, iterations: int, scale: float, quantize: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    if iterations < 1:
        raise ValueError("no round")
    BA = torch.zeros_like(W)
    for _ in range(iterations):
        Q = quantize(W - BA)
        U, S, Vt = _cut(W - Q, rank)
        A, B = (S / scale).sqrt()[:, None] * Vt, U * (S / scale).sqrt()
        BA = B @ A
    return Q, A, B


@provokes("is s times too large")
def loftq_alternate__as_the_reference(W: Tensor, rank: int, iterations: int, scale: float, quantize: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The reference code's rule: the factors are not divided by s."""
    if iterations < 1:
        raise ValueError("no round")
    BA = torch.zeros_like(W)
    for _ in range(iterations):
        Q = quantize(W - BA)
        U, S, Vt = _cut(W - Q, rank)
        A, B = S.sqrt()[:, None] * Vt, U * S.sqrt()
        BA = B @ A
    return Q, A, B


@provokes("quantize was called 1 time in 2 rounds")
def loftq_alternate__one_round(W: Tensor, rank: int, iterations: int, scale: float, quantize: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    if iterations < 1:
        raise ValueError("no round")
    Q = quantize(W)
    U, S, Vt = _cut(W - Q, rank)
    return Q, (S / scale).sqrt()[:, None] * Vt, U * (S / scale).sqrt()


@provokes("Q was made once more after the factors")
def loftq_alternate__one_more_q(W: Tensor, rank: int, iterations: int, scale: float, quantize: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    if iterations < 1:
        raise ValueError("no round")
    Q = quantize(W)
    for _ in range(iterations):
        U, S, Vt = _cut(W - Q, rank)
        A, B = (S / scale).sqrt()[:, None] * Vt, U * (S / scale).sqrt()
        Q = quantize(W - scale * B @ A)
    return Q, A, B


@provokes("round 2 quantizes W - Q, what is left")
def loftq_alternate__rest_of_the_rest(W: Tensor, rank: int, iterations: int, scale: float, quantize: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    if iterations < 1:
        raise ValueError("no round")
    left = W
    for _ in range(iterations):
        Q = quantize(left)
        left = W - Q
        U, S, Vt = _cut(left, rank)
        A, B = (S / scale).sqrt()[:, None] * Vt, U * (S / scale).sqrt()
    return Q, A, B


@provokes("there is no Q to give back")
def loftq_alternate__at_least_once(W: Tensor, rank: int, iterations: int, scale: float, quantize: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    BA = torch.zeros_like(W)
    for _ in range(max(1, iterations)):
        Q = quantize(W - BA)
        U, S, Vt = _cut(W - Q, rank)
        A, B = (S / scale).sqrt()[:, None] * Vt, U * (S / scale).sqrt()
        BA = scale * B @ A
    return Q, A, B


@provokes("raise ValueError; AssertionError came")
def loftq_alternate__asserts(W: Tensor, rank: int, iterations: int, scale: float, quantize: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    assert iterations >= 1
    return loftq_alternate__at_least_once(W, rank, iterations, scale, quantize)


@provokes("this is the Q of round")
def loftq_alternate__the_nearest_round(W: Tensor, rank: int, iterations: int, scale: float, quantize: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    if iterations < 1:
        raise ValueError("no round")
    BA, best = torch.zeros_like(W), None
    for _ in range(iterations):
        Q = quantize(W - BA)
        U, S, Vt = _cut(W - Q, rank)
        A, B = (S / scale).sqrt()[:, None] * Vt, U * (S / scale).sqrt()
        BA = scale * B @ A
        if best is None or (W - Q - BA).norm() < best[0]:
            best = (W - Q - BA).norm(), Q, A, B
    return best[1:]


@provokes("the best part of W - Q - s · B A")
def loftq_alternate__of_what_is_left(W: Tensor, rank: int, iterations: int, scale: float, quantize: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    if iterations < 1:
        raise ValueError("no round")
    BA = torch.zeros_like(W)
    for _ in range(iterations):
        Q = quantize(W - BA)
        U, S, Vt = _cut(W - Q - BA, rank)
        A, B = (S / scale).sqrt()[:, None] * Vt, U * (S / scale).sqrt()
        BA = scale * B @ A
    return Q, A, B


def _lefts(W, dW):
    return tuple(torch.linalg.svd(M, full_matrices=False).U for M in (W, W + dW))


@provokes("so take |cosine|")
def intruders__signed(W: Tensor, dW: Tensor, top: int, threshold: float) -> int:
    U, new = _lefts(W, dW)
    return int(((U.T @ new[:, :top]).amax(0) < threshold).sum())


@provokes("these are V's columns")
def intruders__right(W: Tensor, dW: Tensor, top: int, threshold: float) -> int:
    V, new = (torch.linalg.svd(M, full_matrices=False).Vh for M in (W, W + dW))
    return int(((V @ new[:top].T).abs().amax(0) < threshold).sum())


@provokes("compared with the one of the same number")
def intruders__same_place(W: Tensor, dW: Tensor, top: int, threshold: float) -> int:
    U, new = _lefts(W, dW)
    return int(((U * new).sum(0)[:top].abs() < threshold).sum())


@provokes("only the first of W's directions were asked")
def intruders__old_top_only(W: Tensor, dW: Tensor, top: int, threshold: float) -> int:
    U, new = _lefts(W, dW)
    return int(((U[:, :top].T @ new[:, :top]).abs().amax(0) < threshold).sum())


@provokes("only the count was cut at")
def intruders__all(W: Tensor, dW: Tensor, top: int, threshold: float) -> int:
    U, new = _lefts(W, dW)
    return min(top, int(((U.T @ new).abs().amax(0) < threshold).sum()))


@provokes("whether they are still there")
def intruders__who_is_displaced(W: Tensor, dW: Tensor, top: int, threshold: float) -> int:
    """Asks for W's directions whether they are still there: the other question."""
    U, new = _lefts(W, dW)
    return int(((U[:, :top].T @ new).abs().amax(1) < threshold).sum())


@provokes("a full square U")
def intruders__full_basis(W: Tensor, dW: Tensor, top: int, threshold: float) -> int:
    U, new = (torch.linalg.svd(M).U for M in (W, W + dW))
    return int(((U.T @ new[:, :min(top, *W.shape)]).abs().amax(0) < threshold).sum())


@provokes("dW makes W's weakest direction the strongest")
def intruders__of_the_update(W: Tensor, dW: Tensor, top: int, threshold: float) -> int:
    """The directions of dW itself, which need not come through in W + dW."""
    U, own = (torch.linalg.svd(M, full_matrices=False).U for M in (W, dW))
    rank = int(torch.linalg.matrix_rank(dW)) if dW.any() else 0
    return int(((U[:, :-1].T @ own[:, :min(top, rank)]).abs().amax(0) < threshold).sum())


@provokes("the length of all cosines together")
def intruders__length_of_the_projection(W: Tensor, dW: Tensor, top: int, threshold: float) -> int:
    """How much of a new direction lies in the span of all old ones."""
    U, new = _lefts(W, dW)
    return int(((U.T @ new[:, :top]).norm(dim=0) < threshold).sum())


@provokes("over the wrong axis")
def intruders__wrong_axis(W: Tensor, dW: Tensor, top: int, threshold: float) -> int:
    U, new = _lefts(W, dW)
    return int(((U.T @ new[:, :top]).abs().amax(1) < threshold).sum())


@provokes("these are the directions of dW alone")
def intruders__dw_alone(W: Tensor, dW: Tensor, top: int, threshold: float) -> int:
    U, own = (torch.linalg.svd(M, full_matrices=False).U for M in (W, dW))
    return int(((U.T @ own[:, :top]).abs().amax(0) < threshold).sum())


@provokes("these are the rows of U")
def intruders__rows(W: Tensor, dW: Tensor, top: int, threshold: float) -> int:
    U, new = _lefts(W, dW)
    return int(((U[:top] @ new[:top].T).abs().amax(0) < threshold).sum())


@provokes("an intruder is below the threshold")
def intruders__the_known(W: Tensor, dW: Tensor, top: int, threshold: float) -> int:
    U, new = _lefts(W, dW)
    return int(((U.T @ new[:, :top]).abs().amax(0) >= threshold).sum())
