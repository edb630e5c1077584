"""The doctor: the usual confusions, named from evidence. What it cannot know it does not claim.

    diagnose(model, optimizer, base, batch)   in memory: nothing trains · W is trained · B is zero · no gradient · optimizer · scale · targets ·
                                              tied weights · head not saved · merged already · wrong base · lost in rounding
    examine([paths], base)                    on disk: the same, as far as files tell · merged twice · wrapper in keys · saved adapted ·
                                              a pickle · loss never fell · diverged · warm-up too long · overfitting · unfinished
    machine()                                 versions, device, threads

live.py, ondisk.py, symptoms.py, merged.py and progress.py say what counts as evidence, each with its thresholds and their reasons.
"""

import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor, nn

from minilora.gpt import load_base
from minilora.scale.doctor import live
from minilora.scale.doctor.findings import Finding, Report
from minilora.scale.doctor.ondisk import examine
from minilora.storage import base_fingerprint
from minilora.training import next_byte_loss

__all__ = ["Finding", "Report", "diagnose", "examine", "machine"]


def diagnose(model: nn.Module, optimizer: torch.optim.Optimizer | list | None = None, base: nn.Module | None = None, batch: object = None,
             loss_fn: Callable[..., Tensor] = next_byte_loss) -> Report:
    """What is wrong with a model in memory, with adapters of ours or of PEFT's. Print it, or let the notebook show it.

    optimizer: that is to train it, or several.     base: the original model, to see whether W is still its own, and what a merge has lost.
    batch: (x, y) or a dict, as finetune takes them: one forward and backward pass is made, and everything put back as it was. Without it only
    the gradients that are there are looked at. Raises ValueError where the optimizer or the base is none.
    """
    optimizers = [] if optimizer is None else list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
    for one in optimizers:
        if not hasattr(one, "param_groups"):
            raise ValueError(f"optimizer must be a torch optimizer or a list of them, got a {type(one).__name__}")
    for name, given in (("model", model), ("base", base)):
        if not isinstance(given, nn.Module) and not (name == "base" and given is None):
            raise ValueError(f"{name} must be a model in memory, got a {type(given).__name__}; examine([path]) looks at what is on disk")
    return live.diagnose(model, optimizers, base, batch, loss_fn)


def machine() -> list[str]:
    """What runs here: versions, the device, threads, and the shipped base's fingerprint."""
    if torch.cuda.is_available():
        free, whole = torch.cuda.mem_get_info()
        device = f"CUDA: {torch.cuda.get_device_name()}, {free / 2**30:.1f} of {whole / 2**30:.1f} GiB free"
    else:
        device = "MPS" if torch.backends.mps.is_available() else "CPU"
    base = load_base()
    return [f"python {platform.python_version()}, torch {torch.__version__}",
            f"device: {device}",
            f"threads: {torch.get_num_threads()} of {os.cpu_count()} cores",
            *(f"{name}: {_version(name)}" for name in ("transformers", "peft", "safetensors", "bitsandbytes")),
            f"the shipped base: {sum(p.numel() for p in base.parameters()):,} parameters, fingerprint {base_fingerprint(base)[:12]}"]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
