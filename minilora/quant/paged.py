"""A paged AdamW: the state lives in host memory, in pages, and visits the device within a budget (Dettmers et al. 2023, arXiv:2305.14314,
section 3; AdamW: Loshchilov & Hutter 2017, arXiv:1711.05101).

    m <- β₁ m + (1 − β₁) g        v <- β₂ v + (1 − β₂) g²        w <- w − lr · decay · w − lr · m̂ / (√v̂ + eps)

QLoRA lets the driver move the pages; here it is done by hand. A step goes through all pages in the same order, so of those on the device
the one used last is wanted again last: where room is needed, that one goes. The numbers are torch's AdamW's, bit for bit.
"""

import warnings
from collections.abc import Iterable
from copy import deepcopy

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from minilora import checks


class PagedAdamW(torch.optim.Optimizer):
    """budget: bytes of optimizer state on the device at any time, at most; page: numbers in a page (fewer where the budget is small).

    The step itself needs a page's worth of working memory more. resident: bytes of state on the device now; peak: the most there ever
    were; moved: bytes copied between host and device. state_dict() is AdamW's and loads in AdamW, and the other way round.

    On a CPU host and device are one memory: the pages are copied and the budget is kept, and nothing is saved. A warning says so.
    """

    def __init__(self, params: Iterable, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 1e-2, *, budget: int, page: int = 2**20):
        for name, value in (("the learning rate", lr), ("eps", eps), ("weight_decay", weight_decay)):
            checks.number(name, value, "of at least 0", lambda value: value >= 0)
        for beta in betas:
            checks.share("each of the betas", beta)
        checks.whole("page", page, 1)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        everything = [p for group in self.param_groups for p in group["params"]]
        widest = max(2 * p.element_size() for p in everything)                        # bytes of m and v for one number
        checks.whole("budget", budget, widest)
        self.budget, self.page = budget, min(page, budget // widest)
        self.pages: dict[tuple[Tensor, int], tuple[Tensor, Tensor]] = {}              # on the device; the one used last comes last
        self.resident = self.peak = self.moved = 0
        if any(not p.is_contiguous() for p in everything):
            raise ValueError("PagedAdamW cuts parameters into pages, and one of them is not contiguous in memory")
        if any(p.device.type == "cpu" for p in everything):
            warnings.warn("PagedAdamW: the parameters are in host memory, so the budget is simulated and saves nothing", stacklevel=2)

    @torch.no_grad()
    def step(self, closure=None):
        """One step of AdamW, page by page."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"], state["exp_avg_sq"] = self.host(torch.zeros_like(p, device="cpu")), self.host(torch.zeros_like(p, device="cpu"))
                w, grad = p.view(-1), p.grad.reshape(-1)
                for start in range(0, p.numel(), self.page):
                    part = slice(start, start + self.page)
                    m, v = self.fetch(p, start)
                    adamw([w[part]], [grad[part]], [m], [v], [], [state["step"].clone()], amsgrad=False, maximize=False, lr=group["lr"],
                          beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"], weight_decay=group["weight_decay"])
                state["step"] += 1
        return loss

    def fetch(self, p: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """m and v of this page, on the device."""
        pair = self.pages.pop((p, start), None)
        if pair is None:
            there = self.in_host(p, start)
            size = sum(tensor.nbytes for tensor in there)
            while self.resident + size > self.budget:
                self.evict()
            pair = tuple(tensor.to(p.device, non_blocking=True, copy=True) for tensor in there)
            self.resident, self.moved = self.resident + size, self.moved + size
            self.peak = max(self.peak, self.resident)
        self.pages[p, start] = pair
        return pair

    def evict(self) -> None:
        """Write the page used last back to the host, and free it."""
        (p, start), pair = self.pages.popitem()
        self.write_back(p, start, pair)
        self.resident -= sum(tensor.nbytes for tensor in pair)

    def write_back(self, p: Tensor, start: int, pair: tuple[Tensor, Tensor]) -> None:
        for there, here in zip(self.in_host(p, start), pair):
            there.copy_(here)
            self.moved += here.nbytes

    def in_host(self, p: Tensor, start: int) -> tuple[Tensor, Tensor]:
        return tuple(self.state[p][name].view(-1)[start:start + self.page] for name in ("exp_avg", "exp_avg_sq"))

    def host(self, tensor: Tensor) -> Tensor:
        """In host memory; beside CUDA in pinned pages, which the GPU can read and write by itself."""
        pinned = torch.cuda.is_available() and any(p.is_cuda for group in self.param_groups for p in group["params"])
        return tensor.cpu().pin_memory() if pinned else tensor.cpu()

    def state_dict(self) -> dict:
        self.write_all_back()
        return super().state_dict()

    def write_all_back(self) -> None:
        for (p, start), pair in self.pages.items():
            self.write_back(p, start, pair)

    def __getstate__(self) -> dict:
        """For a deepcopy or a pickle: all is in the host, and the copy begins with no page on the device."""
        self.write_all_back()
        return super().__getstate__() | {"budget": self.budget, "page": self.page, "pages": {}, "resident": 0, "peak": 0, "moved": 0}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for state in self.state.values():
            state.update({name: self.host(state[name]) for name in ("exp_avg", "exp_avg_sq") if name in state})       # pinned again

    def load_state_dict(self, state_dict: dict) -> None:
        """m and v go to the host; none of them takes the way over the device."""
        averages = ("exp_avg", "exp_avg_sq")
        small = {i: {key: deepcopy(value) for key, value in state.items() if key not in averages} for i, state in state_dict["state"].items()}
        super().load_state_dict(state_dict | {"state": small})
        self.pages.clear()
        self.resident = 0
        everything = [p for group in self.param_groups for p in group["params"]]
        order = [i for group in state_dict["param_groups"] for i in group["params"]]
        for p, i in zip(everything, order):
            for name in averages if i in state_dict["state"] else ():
                self.state[p][name] = self.host(state_dict["state"][i][name].detach().to(p.dtype).clone().contiguous())
