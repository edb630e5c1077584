"""minilora's four bits beside bitsandbytes' CPU path: times as ratios, the two interleaved; and the most memory that quantizing takes.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/quantization.py [--size 4096 --width 2048 --rows 1024 --rounds 15] [--device cuda]

A ratio below 1 is in our favour; the layer's is to a frozen dense nn.Linear, and bitsandbytes' own ratio to that stands beside it.
bitsandbytes is C++ with AVX-512 and we are plain torch. Needs requirements-peers.txt.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import bitsandbytes as bnb
import torch
from torch import nn

import minilora as ml


def timed(action: Callable[[], object], device: str) -> float:
    began = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def ratio(ours: Callable, theirs: Callable, rounds: int, device: str) -> str:
    """Median of ours / theirs and the middle half; who goes first alternates, and the first three rounds warm up."""
    ratios = []
    for turn in range(rounds + 3):
        took = {who: timed((ours, theirs)[who], device) for who in ((0, 1) if turn % 2 else (1, 0))}
        if turn >= 3:
            ratios.append(took[0] / took[1])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def step(layer: nn.Module, x: torch.Tensor) -> None:
    """Forward, and the gradient of x."""
    x.grad = None
    layer(x).backward(torch.ones(1, device=x.device).expand(len(x), layer.out_features))


PEAK = """
import torch, minilora as ml
def resident(line):
    return 1024 * next(int(row.split()[1]) for row in open("/proc/self/status") if row.startswith(line))
w = torch.randn({size}, {size})
ml.quantize_nf4(w[:128], double=True)
open("/proc/self/clear_refs", "w").write("5")           # the peak counts from here
before = resident("VmRSS")
ml.quantize_nf4(w, double=True)
print(1 + (resident("VmHWM") - before) / w.nbytes)
"""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--size", 4096), ("--width", 2048), ("--rows", 1024), ("--rounds", 15)):
        arguments.add_argument(name, type=int, default=default)
    arguments.add_argument("--device", default="cpu")
    given = arguments.parse_args()
    device = given.device
    w = torch.randn(given.size, given.size, generator=torch.Generator().manual_seed(0)).to(device)

    def compared(name: str, ours: Callable, theirs: Callable) -> None:
        print(f"{name:>34}: {ratio(ours, theirs, given.rounds, device)}", flush=True)

    print(f"{given.size} × {given.size}, ours / bitsandbytes")
    for double in (False, True):
        suffix = " and its scales" if double else ""
        compared(f"quantize{suffix}", lambda: ml.quantize_nf4(w, double=double),
                 lambda: bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=double))
        Q, (codes, state) = ml.quantize_nf4(w, double=double), bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=double)
        compared(f"dequantize{suffix}", lambda: Q.dequantize(), lambda: bnb.functional.dequantize_4bit(codes, state))

    dense = nn.Linear(given.width, given.width, bias=False, device=device).requires_grad_(False)
    ours = ml.NF4Linear.of(dense)
    theirs = bnb.nn.Linear4bit(given.width, given.width, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    theirs.weight = bnb.nn.Params4bit(dense.weight.data.clone(), requires_grad=False, quant_type="nf4")
    theirs = theirs.to(device)
    x = torch.randn(given.rows, given.width, device=device, requires_grad=True)
    print(f"forward and backward, {given.rows} rows of width {given.width}, in float32")
    compared("NF4Linear / dense", lambda: step(ours, x), lambda: step(dense, x))
    compared("bitsandbytes / dense", lambda: step(theirs, x), lambda: step(dense, x))

    if device == "cpu":
        peak = subprocess.run([sys.executable, "-c", PEAK.format(size=given.size)], capture_output=True, text=True, check=True).stdout
        print(f"most memory while quantizing, weight included: {float(peak):.2f} × the dense weight")


if __name__ == "__main__":
    main()
