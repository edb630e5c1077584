"""The one training loop. It knows methods only through their hooks, and a run that was stopped goes on bit for bit.

    loss = the mean of loss_fn over `accumulate` batches, + method.penalty(model)
    backward · method.before_step · clip · optimizer.step · method.after_step        AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101)

A GPU works behind the program's back, and to look at a number is to wait for it. So what a step says (its loss, whether all is finite) is looked
at every `read_every` steps only, and a checkpoint is written only after a look.

Batches are a pure function of the step, so all that a checkpoint must carry is: what is trained, the optimizer, the scheduler,
the random state, the step, and the numbers so far (runs.py).
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora import checks
from minilora.adapter import Method, adapt, adapters, check_gradients, disabled, find_targets, put
from minilora.data import placed
from minilora.safety.recompute import KINDS, recomputed, recomputing
from minilora.safety.runs import Run, alone, saved_state, stoppable, tie, uninterrupted
from minilora.storage import base_fingerprint

with warnings.catch_warnings():    # in a notebook without ipywidgets tqdm falls back to text, and need not say so
    warnings.simplefilter("ignore")
    from tqdm.auto import tqdm

READ_EVERY = 10            # steps on a GPU; on a CPU there is nothing to wait for
IGNORED = -100             # a target of this value does not count, in F.cross_entropy and in transformers


def next_byte_loss(model: nn.Module, x: Tensor | Mapping, y: Tensor | None = None) -> Tensor:
    """Mean cross-entropy in nats. x, y: (B, T) int64; targets of -100 do not count. transformers' models work too.

    x a dict (input_ids, attention_mask, labels …): the loss is the model's own. Where it has no labels, and the model is a causal language
    model, they are its input_ids wherever attention_mask is not 0.
    """
    if isinstance(x, Mapping):
        labels = _labels(model, x)
        loss = getattr(model(**x if labels is None else {**x, "labels": labels}), "loss", None)
        if loss is None:
            raise ValueError(f"{type(model).__name__} gives no loss for a batch of {', '.join(x)}: it needs labels, or finetune a loss_fn")
        return loss
    logits = model(x)
    logits = getattr(logits, "logits", logits)                     # (B, T, V)
    return F.cross_entropy(logits.flatten(0, -2).float(), y.flatten())


def finetune(
    model: nn.Module,
    method: Method,
    batches: Callable[[int], tuple[Tensor, ...] | Mapping],
    steps: int,
    lr: float,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    *,
    targets: list[str] | None = None,
    loss_fn: Callable[..., Tensor] = next_byte_loss,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    weight_decay: float = 0.0,
    accumulate: int = 1,
    clip: float | None = None,
    warmup: int = 0,
    schedule: str = "constant",
    evaluate: Callable[[nn.Module], float] | None = None,
    evaluate_every: int = 50,
    autocast: torch.dtype | None = None,
    checkpointing: str | None = None,
    read_every: int | None = None,
    processes: "OneProcess | None" = None,
    progress: bool = True,
) -> dict[str, list]:
    """Train `model` with `method`, in place, and return the history as numbers.

    batches(step) -> (x, y), or a dict as transformers' models take it: a pure function of the step.     loss_fn(model, x, y), or with a
    dict loss_fn(model, batch): a mean over the targets.      lr: the peak rate; `warmup` steps up to it, then by `schedule`:
    "constant", or "linear" or "cosine" down to 0.            targets: as in adapt; a model that is adapted already (by an equal
    method) keeps its own and is trained on.                  optimizer(groups, lr=lr): makes it; for pages
    functools.partial(PagedAdamW, budget=...).                evaluate(model): a number worth following, taken before the first
    step, every `evaluate_every` steps and after the last.    checkpoint: a file; where it exists the run goes on from it and
    prints `resumed at step K`. It is written as often as costs little, when the run is interrupted, and at the end.

    accumulate=k: a step reads k batches, batches(k · step) to batches(k · step + k - 1), one after the other, and makes the move that the
    k together as one batch would make: each counts by its targets, those of -100 left out. The hooks are called once a step, and
    LoRA-drop's warm-up reads single batches.                 clip: the largest length of the gradient over all that is trained, as
    torch.nn.utils.clip_grad_norm_ has it. It sees what the optimizer will: all k batches, after method.before_step.

    autocast=torch.bfloat16: the loss is computed under torch.autocast; what is trained keeps its type, as a rule float32.
    checkpointing: of each of the model's blocks only the input is kept, and backward computes the rest again: "non-reentrant", or "reentrant",
    torch's older way. The same numbers from less memory, in about a third more time.
    read_every: steps between two looks at the loss and at whether all was finite. None: 1 on a CPU, and 10 on a GPU, which is not waited for in
    between. The numbers are the same; that a run diverged is noticed so much later.
    processes: several that share the work, each with this same call (minilora.scale.parallel.several). None: this one alone.

    Which learning rate? Try some for a short while, each on a copy of the model; windows are held out, and not those of the report:

        for lr in (1e-3, 3e-3, 1e-2, 3e-2):
            ml.finetune(trial := copy.deepcopy(model), method, task.batches(), 50, lr)
            print(lr, ml.held_out_loss(trial, windows))

    (task = ml.data.text("my.txt").choosing(), windows = task.held_out(129).) One that is far too high raises FloatingPointError.

    Returns {"loss": [nats, per step, without the penalty], "lr": [per step], "evaluated": [[step, number], ...]}.
    Raises ValueError on bad arguments, a checkpoint of another run, or while another run writes it; FloatingPointError when the loss, a
    gradient or a parameter stops being finite: then the checkpoint holds the last step that was whole.
    """
    _check(next(model.parameters()).dtype, steps, lr, weight_decay, warmup, schedule, evaluate_every, accumulate, clip, autocast, checkpointing, read_every)
    method = method.scheduled(steps)
    processes = processes or OneProcess()
    device = processes.device or next(model.parameters()).device
    read_every = read_every or (1 if device.type == "cpu" else READ_EVERY)
    data = getattr(batches, "fingerprint", "")

    def parts(step: int) -> list:
        return [batches(accumulate * step + part) for part in range(accumulate)]

    with alone(checkpoint if processes.first else None), stoppable(), recomputing(model, checkpointing), processes:
        identity, saved, began = {}, None, ""
        if checkpoint is not None:
            layers = [name for name, _ in adapters(model)] or ([] if method.trains_base else list(find_targets(model, targets)))
            identity = {"method": repr(method), "steps": steps, "lr": lr, "seed": seed, "weight decay": weight_decay, "warmup": warmup,
                        "schedule": schedule, "optimizer": getattr(optimizer, "func", optimizer).__name__, "accumulate": accumulate, "clip": clip,
                        "autocast": autocast and str(autocast), "adapted layers": layers}
            base = base_fingerprint(model)
            identity, began = (identity, base) if method.trains_base else (identity | {"base": base}, "")
            saved = processes.told(saved_state, Path(checkpoint), identity, data, parts)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):     # the caller's random numbers stay what they were
            torch.manual_seed(seed)
            loss_of = Loss(loss_fn, device, lr, autocast, checkpointing)
            with _adapted(model, method, targets):
                loss_of = processes.begin(model, method, loss_of, seed, parts)
                if saved:
                    tie(model, saved["tied"], checkpoint)              # what prepare decided then
                else:
                    method.prepare(model, batches, loss_of, lr)
                optimizer = optimizer(method.parameter_groups(model, lr, weight_decay), lr=lr)
                scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, Schedule(schedule, steps, warmup))
                run = Run(model, optimizer, scheduler, checkpoint if processes.first else None, identity, data, began)
                if saved:
                    run.restore(saved)
                    if processes.first:
                        print(f"resumed at step {run.step}", flush=True)
            trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
            was_training, unread = model.training, []
            model.train()
            bar = tqdm(total=steps, initial=run.step, unit="step", disable=not (progress and processes.first))
            try:
                for step in range(run.step, steps):
                    if evaluate and step % evaluate_every == 0:
                        run.follow(evaluate)
                    read = parts(step)
                    run.note(read)
                    optimizer.zero_grad()                              # before loss_fn, which may make a backward of its own
                    said = loss_of.backward(model, method, read, step)
                    said.ask("the gradient of", {name: p.grad for name, p in trained.items() if p.grad is not None}, step)
                    if read_every == 1:
                        loss_of.look(model, [said], parts)                    # before anything moves
                    look = (step + 1) % read_every == 0 or step + 1 == steps
                    with run.whole_step(may_save=look):                # Ctrl-C waits: a half-made step is never saved
                        method.before_step(model, step)
                        if clip is not None:
                            nn.utils.clip_grad_norm_(trained.values(), clip)
                        optimizer.step()
                        method.after_step(model, step)
                        said.ask("the parameter", trained, step + 1)
                        unread.append(said)
                        if look:
                            run.history["loss"] += loss_of.look(model, unread, parts)
                            unread.clear()
                        run.history["lr"].append(scheduler.get_last_lr()[0])
                        scheduler.step()
                    if look:
                        bar.set_postfix(loss=f"{run.history['loss'][-1]:.3f}", refresh=False)
                    bar.update()
                if evaluate:
                    run.follow(evaluate)
            finally:
                bar.close()
                optimizer.zero_grad()
                model.train(was_training)
                with uninterrupted():
                    if run.is_whole:                                   # stopped between two looks
                        run.history["loss"] += loss_of.look(model, unread, parts)
                    run.save()
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


@dataclass
class Said:
    """What a step has said, on the device and unread. losses: of its batches by their place, as they weigh; asked: (of which tensor, at which
    step) -> whether it is finite."""

    step: int
    losses: dict[int, Tensor] = field(default_factory=dict)
    asked: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def ask(self, what: str, tensors: dict[str, Tensor], step: int) -> None:
        self.asked |= {(f"{what} {name}", step): tensor.isfinite().all() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Loss:
    """loss_fn as the loop calls it: over several batches, and with the reason where it is no finite number."""

    loss_fn: Callable[..., Tensor]
    device: torch.device
    lr: float
    autocast: torch.dtype | None = None
    checkpointing: str | None = None

    def __call__(self, model: nn.Module, *batch: Tensor | Mapping) -> Tensor:
        """For a method's warm-up: it is looked at at once."""
        loss = self.of(model, batch)
        if not loss.isfinite():
            reason = self.reason(model, batch, None)
            if reason != self.advice(None):                            # with a fair batch the method says more itself
                raise FloatingPointError(f"the loss is {loss.item()} in the warm-up: {reason}")
        return loss

    def of(self, model: nn.Module, batch: tuple) -> Tensor:
        with recomputed(model, self.checkpointing), torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            loss = self.loss_fn(model, *batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ValueError(f"loss_fn must give one number as a tensor, the mean over the batch, and it gave {what}")
        return loss

    def backward(self, model: nn.Module, method: Method, read: list, step: int) -> Said:
        """The gradient of the mean over all batches that a step reads, plus the penalty. Says that mean.

        Each batch weighs as much as it has targets that count: then the sum of their means is the mean of all.
        """
        weights = [targets_that_count(model, batch) for batch in read] if len(read) > 1 else [1]
        parts = [i for i, weight in enumerate(weights) if weight] or [0]
        said = Said(step)
        for i in parts:
            loss = self.of(model, placed(read[i], self.device)) * ((weights[i] or 1) / max(1, sum(weights)))
            said.losses[i] = loss.detach()
            if i == parts[-1]:
                loss = loss + method.penalty(model)
            if loss.requires_grad:
                loss.backward()
        self.reached(model)
        return said

    def reached(self, model: nn.Module) -> None:
        if all(parameter.grad is None for parameter in model.parameters()):
            check_gradients(model)                         # which names the adapters, and says why that may be
            raise ValueError("nothing to train on: the loss does not depend on any parameter that is trained")

    def look(self, model: nn.Module, unread: list[Said], parts: Callable[[int], list]) -> list[float]:
        """Look at what steps have said: here a GPU is waited for. Returns their losses. Raises FloatingPointError for the first number that is
        not finite, with the likely reason; parts(step): the batches that it read."""
        losses = iter(self.read([loss for said in unread for loss in said.losses.values()]))
        fine = iter(self.read([answer for said in unread for answer in said.asked.values()]))
        means = []
        for said in unread:
            values = {i: next(losses) for i in said.losses}
            for i, value in values.items():
                if not math.isfinite(value):
                    batch = placed(parts(said.step)[i], self.device)
                    raise FloatingPointError(f"the loss is {value} at step {said.step}: {self.reason(model, batch, said.step)}")
            for what, step in said.asked:
                if not next(fine):
                    raise FloatingPointError(f"{what} is not finite at step {step}: {self.advice(step)}")
            said.asked.clear()
            means.append(sum(values.values()))
        return means

    def read(self, numbers: list[Tensor]) -> list:
        return torch.stack([number.to(self.device) for number in numbers]).tolist() if numbers else []

    def reason(self, model: nn.Module, batch: tuple, step: int | None) -> str:
        values = [value for part in batch for value in (part.values() if isinstance(part, Mapping) else [part]) if isinstance(value, Tensor)]
        if not all(value.numel() for value in values):
            return "its batch is empty"
        if not _counted(_targets(model, batch)):
            return f"all targets of its batch are {IGNORED}, and those do not count, so there is nothing to learn from"
        if not all(value.isfinite().all() for value in values):
            return "its batch holds values that are not finite numbers"
        if any(True for _ in adapters(model)):
            with torch.no_grad(), disabled(model):
                alone = self.loss_fn(model, *batch)
            if not alone.isfinite():
                return "and so it is without the adapters; look at the model and at this batch"
        return self.advice(step)

    def advice(self, step: int | None) -> str:
        return "and nothing was trained before; look at the model and at this batch" if step == 0 else f"a lower learning rate than {self.lr:g} may help"


class OneProcess:
    """What the loop asks of the processes that share its work. Here there is one, and all is its own; scale/parallel.py has several."""

    count = 1
    first = True                                           # it reads, writes and prints, and the others do not
    device: torch.device | None = None                     # None: where the model is

    def told(self, read: Callable, *arguments):
        """read(*arguments), done by the first process and known to all."""
        return read(*arguments)

    def refuse(self, method: Method, rows: int, checkpointing: str | None) -> None:
        """What begin will refuse, as far as it can be told before anything is written.     rows: of a batch."""

    def begin(self, model: nn.Module, method: Method, loss: Loss, seed: int, parts: Callable[[int], list]) -> Loss:
        """The model has its adapters. Returns the loss whose backward() leaves the gradient of the whole step in this process."""
        return loss

    def __enter__(self) -> "OneProcess":
        return self

    def __exit__(self, kind, error, trace) -> None:
        pass


def targets_that_count(model: nn.Module, batch: Sequence[Tensor] | Mapping) -> int:
    return _counted(_targets(model, placed(batch, "cpu")))


def _targets(model: nn.Module, batch: tuple) -> Tensor:
    """What the loss of this batch is a mean over. The labels of a causal language model are its inputs, so the first is nobody's target."""
    if not isinstance(batch[0], Mapping):
        return batch[-1]
    labels = _labels(model, batch[0])
    if labels is None:
        return next(value for value in batch[0].values() if isinstance(value, Tensor))[:, 0]      # one for each row
    return labels[..., 1:] if _is_causal(model) else labels


def _counted(targets: Tensor) -> int:
    return targets.numel() if targets.is_floating_point() else int((targets != IGNORED).sum())


def _labels(model: nn.Module, batch: Mapping) -> Tensor | None:
    if "labels" in batch or "input_ids" not in batch or not _is_causal(model):
        return batch.get("labels")
    padding = batch["attention_mask"] == 0 if "attention_mask" in batch else torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    return batch["input_ids"].masked_fill(padding, IGNORED)


def _is_causal(model: nn.Module) -> bool:
    """Whether a transformers model continues its own input."""
    return hasattr(model, "can_generate") and model.can_generate() and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


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


@contextmanager
def _adapted(model: nn.Module, method: Method, targets: list[str] | None) -> Iterator[None]:
    """Adapt the model, unless it is adapted already by an equal method. Where the block fails, the model is as it was."""
    there = dict(adapters(model))
    other = next((name for name, layer in there.items() if layer.method != method), None)
    before = {} if there or method.trains_base else find_targets(model, targets)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    if not there or method.trains_base:
        adapt(model, method, targets)
    elif other:
        raise ValueError(f"the model is adapted with {there[other].method} at {other}, and was asked to train {method}")
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


def _check(dtype, steps, lr, weight_decay, warmup, schedule, evaluate_every, accumulate, clip, autocast, checkpointing, read_every) -> None:
    for name, value, least in (("steps", steps, 1), ("warmup", warmup, 0), ("evaluate_every", evaluate_every, 1), ("accumulate", accumulate, 1), ("read_every", read_every or 1, 1)):
        checks.whole(name, value, least)
    largest = 1e300 if dtype == torch.float64 else 1e30                # a little below where the type ends, for Adam's own factors
    checks.number("the learning rate", lr, f"above 0 and at most {largest:g}", lambda lr: 0 < lr <= largest)
    checks.number("weight_decay", weight_decay, "of at least 0", lambda decay: decay >= 0)
    if clip is not None:
        checks.number("clip", clip, "above 0", lambda clip: clip > 0)
    if autocast not in (None, torch.bfloat16):
        raise ValueError(f"autocast must be None or torch.bfloat16, got {autocast}; float16 would need its gradients scaled, which finetune does not do")
    if checkpointing not in (None, *KINDS):
        raise ValueError(f"checkpointing must be None, {' or '.join(map(repr, KINDS))}, got {checkpointing!r}")
    if schedule not in ("constant", "linear", "cosine"):
        raise ValueError(f"schedule must be constant, linear or cosine, got {schedule!r}")
    if warmup >= steps:
        peak = Schedule(schedule, steps, warmup)(steps - 1)
        warnings.warn(f"a warm-up of {warmup} steps does not end in {steps} steps of training: the learning rate comes to {peak:.0%} of {lr:g}", stacklevel=3)
