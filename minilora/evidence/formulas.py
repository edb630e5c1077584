"""What each method costs, as closed formulas; ledger.py measures the same on a model that is here.

    n tokens go through a layer  in -> out;  x takes e bytes a number, an adapter's own numbers f bytes (4, or 8 beside float64)

                   trained            bytes alive for backward            FLOPs forward             backward
    full           out·in + out       n·in·e                              2n·in·out                 4n·in·out
    LoRA           r(in + out)        n(in + r)e                          2n·in·out + 2nr(in+out)   2n·in·out + 4nr(in+out)
    the others     see the class of each below: what it adds to this or takes away

A frozen layer keeps nothing for backward, which is why the adapter's own input is most of what LoRA keeps. Dropout keeps x once more.
Where x has 16 bits and the adapter 32, the adapter's matrices are kept a second time, rounded.
"""

from dataclasses import dataclass, fields, replace
from math import prod

from minilora.adapter import Method
from minilora.evidence.shapes import Shape
from minilora.methods.adalora import AdaLoRA
from minilora.methods.delta_lora import DeltaLoRA
from minilora.methods.dora import DoRA
from minilora.methods.full import FullFineTuning
from minilora.methods.loftq import LoftQ, QPiSSA
from minilora.methods.lora import LoRA
from minilora.methods.lora_drop import LoRADrop
from minilora.methods.lora_fa import LoRAFA
from minilora.methods.lora_plus import LoRAPlus
from minilora.methods.pissa import PiSSA
from minilora.methods.qlora import QLoRA
from minilora.methods.vera import VeRA

Tensors = dict[str, tuple[int, ...]]        # name: shape


@dataclass(frozen=True)
class Line:
    """Bytes, but for parameters and FLOPs. One module's, or the sum of all."""

    name: str
    trainable: int = 0                          # parameters
    frozen: int = 0                             # parameters, of a 4-bit weight those it stands for
    trained_bytes: int = 0
    frozen_bytes: int = 0                       # weights and buffers as stored
    gradient_bytes: int = 0
    optimizer_bytes: int = 0                    # AdamW's two means and step
    alive_bytes: int = 0                        # for backward
    forward_flops: int = 0
    backward_flops: int = 0


# One class a method, one question a function; o = out, i = in, n = tokens, e and f = bytes as above.

class LoRACost:
    """LoRA's formulas, which those of the others are written as differences from."""

    keeps_x = True                                              # the gradient of A needs it

    def trained(self, m, o: int, i: int) -> Tensors:
        """What gets a gradient, by its name in the layer."""
        return {"A": (m.rank, i), "B": (o, m.rank)}

    def frozen(self, m, o: int, i: int, f: int) -> int:
        """Bytes that the layer keeps beside what is trained and the base."""
        return 0

    def frozen_parameters(self, m, o: int, i: int) -> int:
        """Of these, frozen parameters; the rest is buffers."""
        return 0

    def shared(self, m, o: int, i: int) -> int:
        """Numbers that all layers keep together; o, i: the tallest and the widest."""
        return 0

    def saved(self, m, o: int, i: int) -> Tensors:
        """What is written to disk, by PEFT's names."""
        return {"lora_A.weight": (m.rank, i), "lora_B.weight": (o, m.rank)}

    def alive(self, m, o: int, i: int, n: int, e: int, f: int) -> int:
        dropped = getattr(m, "dropout", 0) > 0
        x = n * i * e * (self.keeps_x + dropped)                # its input; with dropout the mask too, as large as x
        return x + n * m.rank * e + self.extra(m, o, i, n, e, f) + (self.rounded(m, o, i) * e if e != f else 0)

    def extra(self, m, o: int, i: int, n: int, e: int, f: int) -> int:
        """Bytes alive that LoRA does not have."""
        return 0

    def shared_input(self, m, e: int, f: int) -> int:
        """Bytes of each number of x that layers which read one x keep once between them. With dropout each keeps an x of its own."""
        return e if self.keeps_x and not getattr(m, "dropout", 0) else 0

    def rounded(self, m, o: int, i: int) -> int:
        """Numbers of the adapter that are kept a second time where x has another type."""
        return m.rank * (i + o)

    def flops(self, m, o: int, i: int, n: int) -> tuple[int, int]:
        """Of one layer with its base, forward and backward (to x and to what is trained)."""
        low = 2 * n * m.rank * (i + o)
        return 2 * n * i * o + low, 2 * n * i * o + 2 * low


class LoRAFACost(LoRACost):
    keeps_x = False                                             # A is frozen

    def trained(self, m, o, i):
        return {"B": (o, m.rank)}

    def frozen(self, m, o, i, f):
        return f * m.rank * i

    def frozen_parameters(self, m, o, i):
        return m.rank * i

    def flops(self, m, o, i, n):
        forward, backward = super().flops(m, o, i, n)
        return forward, backward - 2 * n * m.rank * i           # no gradient of A


class LoRADropCost(LoRACost):
    def frozen(self, m, o, i, f):
        return 2                                                # "decided" and "own"


class VeRACost(LoRACost):
    keeps_x = False

    def trained(self, m, o, i):
        return {"d": (m.rank,), "b": (o,)}

    def shared(self, m, o, i):
        return m.rank * (i + o)

    def saved(self, m, o, i):
        return {"vera_lambda_b": (o,), "vera_lambda_d": (m.rank,)}

    def extra(self, m, o, i, n, e, f):
        return n * o * e                                        # what b multiplies

    def rounded(self, m, o, i):
        return m.rank * (i + o) + m.rank + o

    def flops(self, m, o, i, n):
        low = 2 * n * m.rank * (i + o)
        return 2 * n * i * o + low, 2 * n * i * o + low         # nothing for A and B


class DeltaLoRACost(LoRACost):
    """Before start_step too: what is not to count yet is multiplied by zero."""

    def frozen(self, m, o, i, f):
        return f * m.rank * (i + o) + 1                         # the snapshot, and whether it was taken

    def saved(self, m, o, i):
        return {"lora_A.weight": (2 * m.rank, i), "lora_B.weight": (o, 2 * m.rank), "minilora_B_K": (o, m.rank)}

    def extra(self, m, o, i, n, e, f):
        return 2 * m.rank * (i + o) * e                         # [A; A_K] and [B, -B_K]

    def flops(self, m, o, i, n):
        return tuple(flops + 4 * n * m.rank * (i + o) for flops in super().flops(m, o, i, n))


class AdaLoRACost(LoRACost):
    def trained(self, m, o, i):
        return {"P": (o, m.initial_rank), "lam": (m.initial_rank,), "Q": (m.initial_rank, i)}

    def frozen(self, m, o, i, f):
        return f * 2 * m.initial_rank * (i + o + 1) + m.initial_rank      # two running means of each, and the mask

    def saved(self, m, o, i, kept: int | None = None):
        kept = m.target_rank if kept is None else kept
        return {"lora_A": (kept, i), "lora_E": (kept, 1), "lora_B": (o, kept)}

    def alive(self, m, o, i, n, e, f):
        r = m.initial_rank
        x = n * i * e * (1 + (m.dropout > 0))
        return x + n * r * e + r * i * e + (o * r * e if e != f else 0)    # Λ Q, and P rounded

    def flops(self, m, o, i, n):
        low = 2 * n * m.initial_rank * (i + o)
        return 2 * n * i * o + low, 2 * n * i * o + 2 * low


class DoRACost(LoRACost):
    def trained(self, m, o, i):
        return super().trained(m, o, i) | {"magnitude": (o,)}

    def saved(self, m, o, i):
        return super().saved(m, o, i) | {"lora_magnitude_vector": (o,)}

    def extra(self, m, o, i, n, e, f):
        return n * o * e + o * f + o * e                        # what m multiplies, the norms, and m / n

    def flops(self, m, o, i, n):
        forward, backward = super().flops(m, o, i, n)
        return forward + 2 * m.rank * (m.rank * i + i * o + o * m.rank), backward      # the norms, from the factors


class PiSSACost(LoRACost):
    def frozen(self, m, o, i, f):
        return f * m.rank * (i + o)                             # A_0 and B_0

    def saved(self, m, o, i):
        return {"lora_A.weight": (2 * m.rank, i), "lora_B.weight": (o, 2 * m.rank)}

    def rounded(self, m, o, i):
        return 0                                                # backward rounds them again

    def flops(self, m, o, i, n):
        low = 2 * n * m.rank * (i + o)
        return 2 * n * i * o + 2 * low, 2 * n * i * o + 3 * low


class FullCost(LoRACost):
    def trained(self, m, o, i):
        return {"weight": (o, i)}                               # and the bias, which `formula` adds

    def alive(self, m, o, i, n, e, f):
        return n * i * e

    def flops(self, m, o, i, n):
        return 2 * n * i * o, 4 * n * i * o


COSTS: dict[type[Method], LoRACost] = {
    FullFineTuning: FullCost(), LoRA: LoRACost(), LoRAPlus: LoRACost(), QLoRA: LoRACost(), LoftQ: LoRACost(), QPiSSA: LoRACost(), LoRAFA: LoRAFACost(),
    LoRADrop: LoRADropCost(), VeRA: VeRACost(), DeltaLoRA: DeltaLoRACost(), AdaLoRA: AdaLoRACost(), DoRA: DoRACost(), PiSSA: PiSSACost(),
}


def nf4_bytes(o: int, i: int, block_size: int = 64, double: bool = True) -> int:
    """A weight (out, in) in four bits, scales and all."""
    blocks = -(-o * i // block_size)
    return -(-o * i // 2) + (blocks + 4 * -(-blocks // 256) + 4 if double else 4 * blocks)


def formula(name: str, method: Method, o: int, i: int, tokens: int, bias: bool = True, e: int = 4, four_bits: tuple[int, bool] | None = None,
            alone: bool = True) -> Line:
    """What one layer in -> out costs. e: bytes a number of x and the base; four_bits: block size and whether doubly quantized, of a base
    in NF4; alone: whether it has trained tensors of its own, and not another layer's (LoRA-drop)."""
    cost, full = COSTS[type(method)], method.trains_base
    f = e if full else max(e, 4)
    shapes = [*cost.trained(method, o, i).values()] * alone + [(o,)] * (full and bias)
    numbers, in_base = sum(map(prod, shapes)), 0 if full else o * i + o * bias
    stored = in_base * e if four_bits is None else nf4_bytes(o, i, *four_bits) + o * bias * e
    return Line(name, numbers, in_base + cost.frozen_parameters(method, o, i), numbers * f, stored + cost.frozen(method, o, i, f), numbers * f,
                2 * numbers * f + 4 * len(shapes), cost.alive(method, o, i, tokens, e, f), *cost.flops(method, o, i, tokens))


def with_shared(line: Line, method: VeRA, sizes: list[tuple[int, int]], f: int) -> Line:
    """The line of the layer that comes first, with what all share."""
    shared = COSTS[VeRA].shared(method, max(o for o, _ in sizes), max(i for _, i in sizes))
    return replace(line, frozen=line.frozen + shared, frozen_bytes=line.frozen_bytes + shared * f)


SHARED = "shared inputs"


def shared_inputs(method: Method, numbers: int, e: int) -> Line:
    """What layers that read one x, of so many numbers in all, do not keep again."""
    return Line(SHARED, alive_bytes=-numbers * COSTS[type(method)].shared_input(method, e, e if method.trains_base else max(e, 4)))


def with_sum(lines: list[Line]) -> list[Line]:
    """And a last line, the sum of all."""
    return [*lines, Line("all", *(sum(getattr(line, field.name) for line in lines) for field in fields(Line)[1:]))]


def extrapolated(shape: Shape, method: Method, targets: list[str] | None = None, tokens: int = 1024, base: str = "fp16") -> list[Line]:
    """The formulas on a model that is not here: a line for each kind of layer that is adapted, one for the rest, and the sum.

    base: "fp32", "fp16", or "nf4", which puts every linear layer of the blocks in four bits (double quantization) and the rest in 16. A
    method that makes its own 4-bit base (QLoRA, LoftQ, QPiSSA) does so in its own way and only where it adapts, as `adapt` does.
    The last line but two is what layers that read one x do not keep again.
    Raises ValueError where `shape` has no such targets or the method cannot stand on that base.
    """
    if base not in ("fp32", "fp16", "nf4"):
        raise ValueError(f"base must be fp32, fp16 or nf4, got {base!r}")
    if base == "nf4" and isinstance(method, (FullFineTuning, DeltaLoRA)):
        raise ValueError(f"{type(method).__name__} must move W, which four bits cannot; take fp16 or fp32")
    own = hasattr(method, "block_size")
    e, four_bits = 4 if base == "fp32" else 2, (method.block_size, method.double) if own else (64, True) if base == "nf4" else None
    kinds = shape.targets(targets)
    lines = []
    for kind in kinds:
        rank = getattr(method, "initial_rank", getattr(method, "rank", 0))
        if rank > min(kind.out, kind.into) and not isinstance(method, VeRA):
            raise ValueError(f"rank {rank} is above min(in, out) of {kind.name}, {kind.into} -> {kind.out}")
        one = formula(kind.name, method, kind.out, kind.into, tokens, kind.bias, e, four_bits)
        lines.append(Line(kind.name, *(kind.count * getattr(one, field.name) for field in fields(Line)[1:])))
    if isinstance(method, VeRA):
        lines[0] = with_shared(lines[0], method, [(kind.out, kind.into) for kind in kinds], 4)
    left = [kind for kind in shape.kinds if kind not in kinds]
    stored = sum(kind.count * (nf4_bytes(kind.out, kind.into) + kind.out * kind.bias * e) if four_bits and not own else kind.parameters * e for kind in left)
    others = sum(kind.parameters for kind in left) + shape.rest
    full = method.trains_base and not targets
    rest = Line("the rest", *((others, 0, others * e, 0, others * e, 2 * others * e) if full else (0, others, 0, stored + shape.rest * e)))
    return with_sum([*lines, shared_inputs(method, tokens * shape.read_again(kinds), e), rest])
