"""Plausible mistakes in lesson 04. The tests must reject each one, with a message that names it."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lessons import provokes


@provokes("x is still kept")
def bytes_formula__x_always(tokens: int, into: int, rank: int, size: int, frozen_A: bool, dropout: bool) -> int:
    return tokens * (into + dropout * into + rank) * size


@provokes("x Aᵀ is missing")
def bytes_formula__frozen_keeps_nothing(tokens: int, into: int, rank: int, size: int, frozen_A: bool, dropout: bool) -> int:
    return tokens * (dropout * into + (0 if frozen_A else into + rank)) * size


@provokes("the mask is missing")
def bytes_formula__mask_for_free(tokens: int, into: int, rank: int, size: int, frozen_A: bool, dropout: bool) -> int:
    return tokens * ((not frozen_A) * into + rank) * size


@provokes("x is missing")
def bytes_formula__trained_keeps_less(tokens: int, into: int, rank: int, size: int, frozen_A: bool, dropout: bool) -> int:
    return tokens * (frozen_A * into + dropout * into + rank) * size


@provokes("these are numbers, not bytes")
def bytes_formula__numbers(tokens: int, into: int, rank: int, size: int, frozen_A: bool, dropout: bool) -> int:
    return tokens * ((not frozen_A) * into + dropout * into + rank)


@provokes("A is a parameter")
def bytes_formula__with_A(tokens: int, into: int, rank: int, size: int, frozen_A: bool, dropout: bool) -> int:
    return (tokens * ((not frozen_A) * into + dropout * into + rank) + rank * into) * size


@provokes("bytes, got")
def bytes_formula__always_float32(tokens: int, into: int, rank: int, size: int, frozen_A: bool, dropout: bool) -> int:
    return tokens * ((not frozen_A) * into + dropout * into + rank) * 4


@provokes("an int is wanted, got float")
def bytes_formula__a_float(tokens: int, into: int, rank: int, size: int, frozen_A: bool, dropout: bool) -> int:
    return tokens * ((not frozen_A) * into + dropout * into + rank) * size / 1


def _saved(run: Callable[[], Tensor], key: Callable, size: Callable, parameters: Iterable[Tensor]) -> int:
    kept, there = {}, {key(p) for p in parameters}
    aside = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: aside.append(t) or t, lambda t: t):
        run()
    for tensor in aside:
        kept[key(tensor)] = size(tensor)
    return sum(size for place, size in kept.items() if place not in there)


@provokes("W was counted")
def saved_bytes__parameters_too(run: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    return _saved(run, lambda t: t.untyped_storage().data_ptr(), lambda t: t.untyped_storage().nbytes(), [])


@provokes("W was counted")
def saved_bytes__parameters_by_identity(run: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    aside, parameters = [], [id(p) for p in parameters]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: aside.append(t) or t, lambda t: t):
        run()
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in aside if id(t) not in parameters}.values())


@provokes("counted three times")
def saved_bytes__each_tensor(run: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    there = {p.untyped_storage().data_ptr() for p in parameters}
    sizes = []

    def put_aside(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in there:
            sizes.append(t.untyped_storage().nbytes())
        return t

    with torch.autograd.graph.saved_tensors_hooks(put_aside, lambda t: t):
        run()
    return sum(sizes)


@provokes("keeps all ten alive")
def saved_bytes__the_view_only(run: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    return _saved(run, lambda t: t.untyped_storage().data_ptr(), lambda t: t.nbytes, parameters)


@provokes("compare storages, not tensors")
def saved_bytes__by_first_element(run: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    return _saved(run, lambda t: t.data_ptr(), lambda t: t.untyped_storage().nbytes(), parameters)


@provokes("two tensors of equal size")
def saved_bytes__equal_shapes_are_one(run: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    return _saved(run, lambda t: tuple(t.shape), lambda t: t.untyped_storage().nbytes(), parameters)


@provokes("bytes, not numbers")
def saved_bytes__numbers(run: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    return _saved(run, lambda t: t.untyped_storage().data_ptr(), lambda t: len(t.untyped_storage()) // t.element_size(), parameters)


@provokes("run() is called once")
def saved_bytes__runs_twice(run: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    run()
    return _saved(run, lambda t: t.untyped_storage().data_ptr(), lambda t: t.untyped_storage().nbytes(), parameters)


@provokes("what the second hook gives back")
def saved_bytes__spoils_backward(run: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    kept, there = {}, {p.untyped_storage().data_ptr() for p in parameters}

    def put_aside(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(put_aside, lambda t: torch.zeros_like(t)):
        run()
    return sum(size for place, size in kept.items() if place not in there)


class _Branch(torch.autograd.Function):
    """What the wrong branches share; each has one mistake in it."""

    @staticmethod
    def forward(ctx, x, A, B, scale):
        z = x @ A.T
        ctx.save_for_backward(z, A, B)
        ctx.scale = scale
        return scale * (z @ B.T)

    @staticmethod
    def backward(ctx, g):
        z, A, B = ctx.saved_tensors
        dB = g.reshape(-1, B.shape[0]).T @ z.reshape(-1, B.shape[1])
        return ctx.scale * (g @ B @ A), None, ctx.scale * dB, None


@provokes("x is kept")
class LoRAFAFunction__keeps_x(_Branch):
    @staticmethod
    def forward(ctx, x, A, B, scale):
        ctx.save_for_backward(x, A, B)
        ctx.scale = scale
        return scale * (x @ A.T @ B.T)

    @staticmethod
    def backward(ctx, g):
        x, A, B = ctx.saved_tensors
        dB = g.reshape(-1, B.shape[0]).T @ (x @ A.T).reshape(-1, B.shape[1])
        return ctx.scale * (g @ B @ A), None, ctx.scale * dB, None


@provokes("past the books")
class LoRAFAFunction__hangs_x_on_ctx(_Branch):
    @staticmethod
    def forward(ctx, x, A, B, scale):
        ctx.x = x
        return _Branch.forward(ctx, x, A, B, scale)


@provokes("past the books")
class LoRAFAFunction__hangs_z_on_ctx(_Branch):
    @staticmethod
    def forward(ctx, x, A, B, scale):
        ctx.save_for_backward(A, B)
        ctx.z, ctx.scale = x @ A.T, scale
        return scale * (ctx.z @ B.T)

    @staticmethod
    def backward(ctx, g):
        A, B = ctx.saved_tensors
        dB = g.reshape(-1, B.shape[0]).T @ ctx.z.reshape(-1, B.shape[1])
        return ctx.scale * (g @ B @ A), None, ctx.scale * dB, None


_held = []


@provokes("x is still held somewhere")
class LoRAFAFunction__a_list_outside(_Branch):
    @staticmethod
    def forward(ctx, x, A, B, scale):
        _held.append(x)
        return _Branch.forward(ctx, x, A, B, scale)


@provokes("A stands still")
class LoRAFAFunction__trains_A(_Branch):
    @staticmethod
    def backward(ctx, g):
        dx, _, dB, _ = _Branch.backward(ctx, g)
        return dx, torch.zeros_like(ctx.saved_tensors[1]), dB, None


@provokes("dL/dx is None")
class LoRAFAFunction__nothing_for_the_layers_below(_Branch):
    @staticmethod
    def backward(ctx, g):
        return None, None, _Branch.backward(ctx, g)[2], None


@provokes("the scale is missing in dL/dx")
class LoRAFAFunction__no_scale_backwards(_Branch):
    @staticmethod
    def backward(ctx, g):
        z, A, B = ctx.saved_tensors
        return g @ B @ A, None, g.reshape(-1, B.shape[0]).T @ z.reshape(-1, B.shape[1]), None


@provokes("the scale is squared in dL/dB")
class LoRAFAFunction__scale_in_z_and_in_dB(_Branch):
    @staticmethod
    def forward(ctx, x, A, B, scale):
        z = scale * (x @ A.T)
        ctx.save_for_backward(z, A, B)
        ctx.scale = scale
        return z @ B.T


@provokes("not their mean")
class LoRAFAFunction__mean_over_tokens(_Branch):
    @staticmethod
    def backward(ctx, g):
        dx, _, dB, _ = _Branch.backward(ctx, g)
        return dx, None, dB / g.reshape(-1, g.shape[-1]).shape[0], None


@provokes("a matrix of out · in numbers was formed")
class LoRAFAFunction__forms_the_product(_Branch):
    @staticmethod
    def backward(ctx, g):
        z, A, B = ctx.saved_tensors
        return ctx.scale * (g @ (B @ A)), None, _Branch.backward(ctx, g)[2], None


@provokes("g was changed in place")
class LoRAFAFunction__spoils_g(_Branch):
    @staticmethod
    def backward(ctx, g):
        z, A, B = ctx.saved_tensors
        g.mul_(ctx.scale)
        return g @ B @ A, None, g.reshape(-1, B.shape[0]).T @ z.reshape(-1, B.shape[1]), None


@provokes("each layer was asked by itself")
def bytes_freed__layer_by_layer(reads: dict[str, str], sizes: dict[str, int], frozen: set[str], elsewhere: set[str], dropout: bool) -> int:
    return sum(sizes[reads[layer]] for layer in frozen)


@provokes("v's A is still trained")
def bytes_freed__forgets_the_other_readers(reads: dict[str, str], sizes: dict[str, int], frozen: set[str], elsewhere: set[str], dropout: bool) -> int:
    if dropout:
        return sum(sizes[reads[layer]] for layer in frozen)
    return sum(sizes[x] for x in {reads[layer] for layer in frozen} - elsewhere)


@provokes("attention keeps its output")
def bytes_freed__forgets_the_rest_of_the_model(reads: dict[str, str], sizes: dict[str, int], frozen: set[str], elsewhere: set[str], dropout: bool) -> int:
    if dropout:
        return sum(sizes[reads[layer]] for layer in frozen)
    still_read = {x for layer, x in reads.items() if layer not in frozen}
    return sum(sizes[x] for x in set(reads.values()) - still_read)


@provokes("a dropped x of its own")
def bytes_freed__dropout_shares(reads: dict[str, str], sizes: dict[str, int], frozen: set[str], elsewhere: set[str], dropout: bool) -> int:
    still_read = {x for layer, x in reads.items() if layer not in frozen}
    return sum(sizes[x] for x in set(reads.values()) - still_read - elsewhere)


@provokes("one each")
def bytes_freed__nothing_behind_dropout(reads: dict[str, str], sizes: dict[str, int], frozen: set[str], elsewhere: set[str], dropout: bool) -> int:
    return 0 if dropout else bytes_freed__dropout_shares(reads, sizes, frozen, elsewhere, dropout)


@provokes("work on a copy")
def bytes_freed__empties_frozen(reads: dict[str, str], sizes: dict[str, int], frozen: set[str], elsewhere: set[str], dropout: bool) -> int:
    if dropout:
        return sum(sizes[reads[layer]] for layer in frozen)
    for layer, x in reads.items():
        if layer not in frozen:
            elsewhere.add(x)
    return sum(sizes[x] for x in {reads[layer] for layer in frozen} - elsewhere)


@provokes("divided by scale, not by its square")
def project_gradient__scale_once(g: Tensor, A: Tensor, scale: float) -> Tensor:
    return g @ torch.linalg.pinv(A @ A.T) / scale


@provokes("the scale is missing")
def project_gradient__no_scale(g: Tensor, A: Tensor, scale: float) -> Tensor:
    return g @ torch.linalg.pinv(A @ A.T)


@provokes("A Aᵀ where its inverse is wanted")
def project_gradient__not_inverted(g: Tensor, A: Tensor, scale: float) -> Tensor:
    return g @ (A @ A.T) / scale**2


@provokes("take the pseudo-inverse")
def project_gradient__inverse(g: Tensor, A: Tensor, scale: float) -> Tensor:
    return g @ torch.linalg.inv(A @ A.T) / scale**2


@provokes("take the pseudo-inverse")
def project_gradient__a_little_on_the_diagonal(g: Tensor, A: Tensor, scale: float) -> Tensor:
    return g @ torch.linalg.inv(A @ A.T + 1e-13 * torch.eye(len(A), dtype=A.dtype)) / scale**2


@provokes("work on a copy")
def project_gradient__overwrites(g: Tensor, A: Tensor, scale: float) -> Tensor:
    return g.copy_(g @ torch.linalg.pinv(A @ A.T) / scale**2)


@provokes("the inverse of A Aᵀ is missing")
def row_space__no_inverse(G: Tensor, A: Tensor) -> tuple[Tensor, float]:
    seen = G @ A.T @ A
    return seen, (seen.square().sum() / G.square().sum()).item()


@provokes("no root")
def row_space__norms(G: Tensor, A: Tensor) -> tuple[Tensor, float]:
    seen = G @ A.T @ torch.linalg.inv(A @ A.T) @ A
    return seen, (seen.norm() / G.norm()).item()


@provokes("the share that is lost")
def row_space__share_lost(G: Tensor, A: Tensor) -> tuple[Tensor, float]:
    seen = G @ A.T @ torch.linalg.inv(A @ A.T) @ A
    return seen, 1 - (seen.square().sum() / G.square().sum()).item()


@provokes("what A does not see")
def row_space__the_rest(G: Tensor, A: Tensor) -> tuple[Tensor, float]:
    seen = G @ A.T @ torch.linalg.inv(A @ A.T) @ A
    return G - seen, (seen.square().sum() / G.square().sum()).item()


@provokes("this is P itself")
def row_space__P(G: Tensor, A: Tensor) -> tuple[Tensor, float]:
    P = A.T @ torch.linalg.inv(A @ A.T) @ A
    return P, ((G @ P).square().sum() / G.square().sum()).item()


@provokes("a Python float")
def row_space__a_tensor_for_the_share(G: Tensor, A: Tensor) -> tuple[Tensor, float]:
    seen = G @ A.T @ torch.linalg.inv(A @ A.T) @ A
    return seen, seen.square().sum() / G.square().sum()


def _dropped(like: Tensor, p: float, seed: int) -> Tensor:
    dice = torch.Generator(like.device).manual_seed(seed)
    return torch.empty(like.shape, dtype=like.dtype).bernoulli_(1 - p, generator=dice) / (1 - p)


class _Seeded(torch.autograd.Function):
    """What the wrong seeded branches share."""

    @classmethod
    def branch(cls, ctx, x, A, B, scale, p, seed, mask):
        z = x * mask @ A.T
        ctx.save_for_backward(z, A, B)
        ctx.scale, ctx.p, ctx.seed = scale, p, seed
        return scale * (z @ B.T)

    @staticmethod
    def forward(ctx, x, A, B, scale, p, seed):
        return _Seeded.branch(ctx, x, A, B, scale, p, seed, _dropped(x, p, seed))

    @staticmethod
    def backward(ctx, g):
        z, A, B = ctx.saved_tensors
        back = ctx.scale * (g @ B @ A)
        dB = g.reshape(-1, B.shape[0]).T @ z.reshape(-1, B.shape[1])
        return back * _dropped(back, ctx.p, ctx.seed), None, ctx.scale * dB, None, None, None


@provokes("draw the mask anew from the seed")
class SeededDropoutFunction__keeps_the_mask(_Seeded):
    @staticmethod
    def forward(ctx, x, A, B, scale, p, seed):
        mask = _dropped(x, p, seed)
        z = x * mask @ A.T
        ctx.save_for_backward(z, A, B, mask)
        ctx.scale = scale
        return scale * (z @ B.T)

    @staticmethod
    def backward(ctx, g):
        z, A, B, mask = ctx.saved_tensors
        dB = g.reshape(-1, B.shape[0]).T @ z.reshape(-1, B.shape[1])
        return ctx.scale * (g @ B @ A) * mask, None, ctx.scale * dB, None, None, None


@provokes("past the books")
class SeededDropoutFunction__hangs_the_mask_on_ctx(_Seeded):
    @staticmethod
    def forward(ctx, x, A, B, scale, p, seed):
        ctx.mask = _dropped(x, p, seed)
        return _Seeded.forward(ctx, x, A, B, scale, p, seed)


@provokes("whatever the layout of x")
class SeededDropoutFunction__another_mask_backwards(_Seeded):
    @staticmethod
    def backward(ctx, g):
        ctx.seed += 1
        return _Seeded.backward(ctx, g)


@provokes("goes through the mask too")
class SeededDropoutFunction__gradient_past_the_mask(_Seeded):
    @staticmethod
    def backward(ctx, g):
        z, A, B = ctx.saved_tensors
        return ctx.scale * (g @ B @ A), *_Seeded.backward(ctx, g)[1:]


@provokes("must follow its shape")
class SeededDropoutFunction__in_the_layout_of_x(_Seeded):
    @staticmethod
    def forward(ctx, x, A, B, scale, p, seed):
        mask = torch.empty_like(x).bernoulli_(1 - p, generator=torch.Generator().manual_seed(seed)) / (1 - p)
        return _Seeded.branch(ctx, x, A, B, scale, p, seed, mask)


@provokes("torch's common dice were thrown")
class SeededDropoutFunction__seeds_torch(_Seeded):
    @staticmethod
    def forward(ctx, x, A, B, scale, p, seed):
        torch.manual_seed(seed)
        return _Seeded.branch(ctx, x, A, B, scale, p, seed, torch.nn.functional.dropout(torch.ones(x.shape, dtype=x.dtype), p))

    @staticmethod
    def backward(ctx, g):
        z, A, B = ctx.saved_tensors
        back = ctx.scale * (g @ B @ A)
        torch.manual_seed(ctx.seed)
        return back * torch.nn.functional.dropout(torch.ones_like(back), ctx.p), *_Seeded.backward(ctx, g)[1:]


@provokes("p is the probability to be dropped")
class SeededDropoutFunction__keeps_a_share_p(_Seeded):
    @staticmethod
    def forward(ctx, x, A, B, scale, p, seed):
        return _Seeded.forward(ctx, x, A, B, scale, 1 - p, seed)


@provokes("or the branch gets weaker")
class SeededDropoutFunction__not_made_up_for(_Seeded):
    @staticmethod
    def forward(ctx, x, A, B, scale, p, seed):
        return _Seeded.branch(ctx, x, A, B, scale, p, seed, _dropped(x, p, seed) * (1 - p))


@provokes("not each row")
class SeededDropoutFunction__a_row_at_a_time(_Seeded):
    @staticmethod
    def forward(ctx, x, A, B, scale, p, seed):
        return _Seeded.branch(ctx, x, A, B, scale, p, seed, _dropped(x[..., :1], p, seed).expand(x.shape))


@provokes("another seed must give another mask")
class SeededDropoutFunction__one_seed_for_all(_Seeded):
    @staticmethod
    def forward(ctx, x, A, B, scale, p, seed):
        return _Seeded.forward(ctx, x, A, B, scale, p, 0)
