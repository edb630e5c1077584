"""The one training loop. It knows methods only through their hooks, and a run that was stopped goes on bit for bit.

    loss = loss_fn(model, x, y) + method.penalty(model)
    backward · method.before_step · optimizer.step · method.after_step        AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101)

Batches are a pure function of the step, so all that a checkpoint must carry is: what is trained, the optimizer, the scheduler,
the random state, the step, and the numbers so far.
"""

import hashlib
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora import checks
from minilora.adapter import Method, adapt, adapters, check_gradients, find_targets, put
from minilora.storage import base_fingerprint, load_checkpoint, save_checkpoint

with warnings.catch_warnings():    # in a notebook without ipywidgets tqdm falls back to text, and need not say so
    warnings.simplefilter("ignore")
    from tqdm.auto import tqdm

CHECKPOINT_SHARE = 0.05    # of the running time: as often as is nearly free, whatever the model's size


def next_byte_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy in nats. x, y: (B, T) int64; targets of -100 do not count. transformers' models work too."""
    logits = model(x)
    logits = getattr(logits, "logits", logits)                     # (B, T, V)
    return F.cross_entropy(logits.flatten(0, -2).float(), y.flatten())


def finetune(
    model: nn.Module,
    method: Method,
    batches: Callable[[int], tuple[Tensor, Tensor]],
    steps: int,
    lr: float,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    *,
    targets: list[str] | None = None,
    loss_fn: Callable[[nn.Module, Tensor, Tensor], Tensor] = next_byte_loss,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    weight_decay: float = 0.0,
    warmup: int = 0,
    schedule: str = "constant",
    evaluate: Callable[[nn.Module], float] | None = None,
    evaluate_every: int = 50,
    progress: bool = True,
) -> dict[str, list]:
    """Train `model` with `method`, in place, and return the history as numbers.

    batches(step) -> (x, y): a pure function of the step.     lr: the peak rate; `warmup` steps up to it, then by `schedule`:
    "constant", or "linear" or "cosine" down to 0.            targets: as in adapt; a model that is adapted already (by an equal
    method) keeps its own and is trained on.                  optimizer(groups, lr=lr): makes it; for pages
    functools.partial(PagedAdamW, budget=...).                evaluate(model): a number worth following, taken before the first
    step, every `evaluate_every` steps and after the last.    checkpoint: a file; where it exists the run goes on from it and
    prints `resumed at step K`. It is written as often as costs little, when the run is interrupted, and at the end.

    Returns {"loss": [nats, per step, without the penalty], "lr": [per step], "evaluated": [[step, number], ...]}.
    Raises ValueError on bad arguments or a checkpoint of another run, FloatingPointError when the loss stops being finite.
    """
    _check(steps, lr, weight_decay, warmup, schedule, evaluate_every)
    method = method.scheduled(steps)
    device = next(model.parameters()).device
    identity, saved = {}, None
    if checkpoint is not None:
        layers = [name for name, _ in adapters(model)] or ([] if method.trains_base else list(find_targets(model, targets)))
        identity = {"method": repr(method), "steps": steps, "lr": lr, "seed": seed, "weight decay": weight_decay, "warmup": warmup,
                    "schedule": schedule, "optimizer": getattr(optimizer, "func", optimizer).__name__, "adapted layers": layers,
                    "base": "" if method.trains_base else base_fingerprint(model)}
        saved = _saved_state(Path(checkpoint), identity, batches)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):     # the caller's random numbers stay what they were
        torch.manual_seed(seed)
        with _adapted(model, method, targets):
            if saved:
                _tie(model, saved["tied"], checkpoint)             # what prepare decided then
            else:
                method.prepare(model, batches, loss_fn, lr)
            optimizer = optimizer(method.parameter_groups(model, lr, weight_decay), lr=lr)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, Schedule(schedule, steps, warmup))
            run = Run(model, optimizer, scheduler, checkpoint, identity)
            if saved:
                run.restore(saved)
                print(f"resumed at step {run.step}", flush=True)
        was_training = model.training
        model.train()
        bar = tqdm(total=steps, initial=run.step, unit="step", disable=not progress)
        try:
            for step in range(run.step, steps):
                if evaluate and step % evaluate_every == 0:
                    run.follow(evaluate)
                x, y = batches(step)
                if step == 0:
                    run.first_batch = _digest(x, y)
                loss = loss_fn(model, x.to(device), y.to(device))
                if not math.isfinite(loss.item()):
                    raise FloatingPointError(f"the loss is {loss.item()} at step {step}: a lower learning rate than {lr:g} may help")
                optimizer.zero_grad()
                if not loss.requires_grad:
                    check_gradients(model)                         # which names the adapters; backward() would say "no grad_fn"
                (loss + method.penalty(model)).backward()
                with run.whole_step():                             # Ctrl-C waits: a half-made step is never saved
                    method.before_step(model, step)
                    optimizer.step()
                    method.after_step(model, step)
                    run.history["loss"].append(loss.item())
                    run.history["lr"].append(scheduler.get_last_lr()[0])
                    scheduler.step()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                bar.update()
            if evaluate:
                run.follow(evaluate)
        finally:
            run.save()
            bar.close()
            optimizer.zero_grad()
            model.train(was_training)
    return run.history


@dataclass(frozen=True)
class Schedule:
    """The learning rate's factor at a step: up over `warmup` steps, then constant, or down to 0 at `steps`."""

    shape: str
    steps: int
    warmup: int

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[self.shape]


class Run:
    """What a checkpoint holds: what is trained, optimizer, scheduler, random state, step, history; and whose run it is."""

    def __init__(self, model: nn.Module, optimizer, scheduler, path: str | Path | None, identity: dict):
        self.model, self.optimizer, self.scheduler, self.path, self.identity = model, optimizer, scheduler, path, identity
        self.step = 0
        self.history: dict[str, list] = {"loss": [], "lr": [], "evaluated": []}
        self.first_batch = ""                  # its digest, which tells whether a resumed run reads the same data
        self.random = _random_state(model)
        self.is_whole = True
        self.started, self.spent_saving = time.monotonic(), 0.0

    def restore(self, state: dict) -> None:
        ours, saved = _trained(self.model), state["trained"]
        if ours.keys() != saved.keys():
            differ = sorted(ours.keys() ^ saved.keys())
            raise ValueError(f"{self.path}: a checkpoint of a run that trained other tensors ({differ[0]}{', …' if differ[1:] else ''}); "
                             "remove it to start over")
        with torch.no_grad():
            for name, tensor in ours.items():
                tensor.copy_(state["trained"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step, self.history, self.random, self.first_batch = (state[key] for key in ("step", "history", "random", "first batch"))
        _set_random_state(self.model, self.random)

    @contextmanager
    def whole_step(self) -> Iterator[None]:
        """Around everything that changes the state: all of it happens, or the checkpoint before it stands."""
        with uninterrupted():
            self.is_whole = False
            yield
            self.step += 1
            self.random = _random_state(self.model)
            self.is_whole = True
            if self.spent_saving <= CHECKPOINT_SHARE * (time.monotonic() - self.started):
                self.save()

    def save(self) -> None:
        if self.path is None or not self.is_whole:
            return
        began = time.monotonic()
        save_checkpoint(self.path, self.identity, {
            "trained": _trained(self.model), "tied": _tied(self.model), "optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict(),
            "random": self.random, "step": self.step, "history": self.history, "first batch": self.first_batch,
        })
        self.spent_saving += time.monotonic() - began

    def follow(self, evaluate: Callable[[nn.Module], float]) -> None:
        """Note evaluate(model) for this step, once. It runs in eval mode and cannot move the training's random numbers."""
        evaluated = self.history["evaluated"]
        if not evaluated or evaluated[-1][0] != self.step:
            self.model.eval()
            with torch.no_grad():
                evaluated.append([self.step, float(evaluate(self.model))])
            self.model.train()
            _set_random_state(self.model, self.random)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C inside the block takes effect at its end. (Python delivers signals to the main thread only.)"""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    pressed = []
    signal.signal(signal.SIGINT, lambda *signal_and_frame: pressed.append(signal_and_frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        before(*pressed[0])


@torch.no_grad()
def held_out_loss(model: nn.Module, windows: Tensor, rows: int = 32) -> float:
    """Mean nats per predicted byte. windows: (N, T + 1) int64. Divide by ln 2 for bits per byte."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    total = sum(next_byte_loss(model, part[:, :-1], part[:, 1:]).item() * len(part) for part in windows.to(device).split(rows))
    model.train(was_training)
    return total / len(windows)


@torch.no_grad()
def answers(model: nn.Module, questions: Sequence[tuple[str, str]], rows: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    """What the model says where each question's answer should stand: logits (n, V), and the answer's own n bytes (n,).

    The answer is fed in as it should be, each byte after the one before: one forward pass for `rows` questions, not one a byte.
    """
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        for start in range(0, len(questions), rows):
            part = [(question.encode(), answer.encode()) for question, answer in questions[start:start + rows]]
            longest = max(len(question + answer) for question, answer in part)
            ids = torch.tensor([list((question + answer).ljust(longest, b"\n")) for question, answer in part], device=device)
            logits = model(ids[:, :-1])
            logits = getattr(logits, "logits", logits)                         # (rows, longest - 1, V)
            for row, (question, answer) in enumerate(part):
                asked, end = len(question), len(question + answer)
                yield logits[row, asked - 1:end - 1], ids[row, asked:end]
    finally:
        model.train(was_training)


def exact_match(model: nn.Module, questions: Sequence[tuple[str, str]], rows: int = 64) -> float:
    """The share of questions that greedy decoding answers byte for byte: those where each next byte of the answer is the likeliest."""
    return sum(torch.equal(logits.argmax(-1), answer) for logits, answer in answers(model, questions, rows)) / len(questions)


def answer_loss(model: nn.Module, questions: Sequence[tuple[str, str]], rows: int = 64) -> float:
    """Mean nats per byte of the answers, given their questions. Divide by ln 2 for bits per byte."""
    nats, size = 0.0, 0
    for logits, answer in answers(model, questions, rows):
        nats += F.cross_entropy(logits.float(), answer, reduction="sum").item()
        size += len(answer)
    return nats / size


def _saved_state(path: Path, identity: dict, batches: Callable) -> dict | None:
    """What the checkpoint holds, if there is one; refused where it belongs to a run with other settings or other data."""
    if not path.exists():
        return None
    state = load_checkpoint(path, identity)
    if state["step"] and state["first batch"] != _digest(*batches(0)):
        raise ValueError(f"{path}: a checkpoint of another run, whose first batch was another: the data or its seed has changed")
    return state


@contextmanager
def _adapted(model: nn.Module, method: Method, targets: list[str] | None) -> Iterator[None]:
    """Adapt the model, unless it is adapted already by an equal method. Where the block fails, the model is as it was."""
    there = [layer for _, layer in adapters(model)]
    before = {} if there or method.trains_base else find_targets(model, targets)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    if not there or method.trains_base:
        adapt(model, method, targets)
    elif there[0].method != method:
        raise ValueError(f"the model is adapted with {there[0].method}, and was asked to train {method}")
    elif not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("nothing to train: every parameter is frozen; load_adapter(..., trainable=True) loads an adapter for training")
    try:
        yield
    except BaseException:
        for name, linear in before.items():
            put(model, name, linear)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    for _, layer in adapters(model):
        layer.method = method                  # it now knows the length of training


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """By name: every parameter that is trained or belongs to an adapter, and every buffer but the frozen layers' own: a method keeps its
    state in buffers, and a norm its running means."""
    own = {id(p) for _, layer in adapters(model) for name, p in layer.named_parameters() if not name.startswith("base.")}
    fixed = {id(tensor) for _, layer in adapters(model) for tensor in layer.base.buffers()}
    state = {name: p for name, p in model.named_parameters() if p.requires_grad or id(p) in own}        # a shared one once
    return state | {name: buffer for name, buffer in model.named_buffers() if id(buffer) not in fixed}


def _tied(model: nn.Module) -> list[list[str]]:
    """The names of each parameter of the adapters that has several, because layers share it."""
    names: dict[int, list[str]] = {}
    for prefix, layer in adapters(model):
        for name, p in layer.named_parameters():
            names.setdefault(id(p), []).append(f"{prefix}.{name}")
    return [several for several in names.values() if len(several) > 1]


def _tie(model: nn.Module, groups: list[list[str]], path: str | Path) -> None:
    """Let layers share as they did in the run that is gone on with."""
    there = _tied(model)
    if there and there != groups:
        raise ValueError(f"{path}: a checkpoint of a run whose layers shared other tensors ({' = '.join((groups or there)[0])}); "
                         "remove it to start over")
    for first, *rest in groups:
        for name in rest:
            layer, _, parameter = name.rpartition(".")
            setattr(model.get_submodule(layer), parameter, model.get_parameter(first))


def _random_state(model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    state = {"cpu": torch.get_rng_state()}
    if device.type in ("cuda", "mps"):
        state[device.type] = getattr(torch, device.type).get_rng_state()
    return state


def _set_random_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    device = next(model.parameters()).device.type
    if device in state and device != "cpu":
        getattr(torch, device).set_rng_state(state[device])


def _digest(*batch: Tensor) -> str:
    return hashlib.sha256(b"".join(part.cpu().contiguous().numpy().tobytes() for part in batch)).hexdigest()


def _check(steps, lr, weight_decay, warmup, schedule, evaluate_every) -> None:
    for name, value, least in (("steps", steps, 1), ("warmup", warmup, 0), ("evaluate_every", evaluate_every, 1)):
        checks.whole(name, value, least)
    checks.number("the learning rate", lr, "above 0", lambda lr: lr > 0)
    checks.number("weight_decay", weight_decay, "of at least 0", lambda decay: decay >= 0)
    if schedule not in ("constant", "linear", "cosine"):
        raise ValueError(f"schedule must be constant, linear or cosine, got {schedule!r}")
