"""A run that may be stopped at any moment: what its checkpoint holds, whose run it is, and who may write there.

    Ctrl-C, kill, a closed terminal    take effect at the end of the step, and a checkpoint is written
    kill -9, a power failure           the checkpoint before stands
    another run in the same place      is refused while this one lives
"""

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn

from minilora.adapter import adapters
from minilora.storage import START_OVER, load_checkpoint, save_checkpoint

try:
    import fcntl
except ImportError:                        # Windows has the other one
    fcntl = None
    import msvcrt

STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
CHECKPOINT_SHARE = 0.05    # of the running time: as often as is nearly free, whatever the model's size


class Run:
    """What a checkpoint holds: what is trained, optimizer, scheduler, random state, step, history; and whose run it is."""

    def __init__(self, model: nn.Module, optimizer, scheduler, path: str | Path | None, identity: dict, data: str, began: str):
        self.model, self.optimizer, self.scheduler, self.path, self.identity, self.data = model, optimizer, scheduler, path, identity, data
        self.began = began                     # fingerprint of a model all of which is trained, as it was before the first step
        self.step = 0
        self.history: dict[str, list] = {"loss": [], "lr": [], "evaluated": []}
        self.digests: dict[int, str] = {}      # of the batches of steps 0, 1, 2, 4, 8, …: they tell whether a resumed run reads the same data
        self.random = _random_state(model)
        self.is_whole = True
        self.started, self.spent_saving = time.monotonic(), 0.0

    def restore(self, state: dict) -> None:
        ours, saved = trained_tensors(self.model), state["trained"]
        if ours.keys() != saved.keys():
            differ = sorted(ours.keys() ^ saved.keys())
            raise ValueError(f"{self.path}: a checkpoint of a run that trained other tensors ({differ[0]}{', …' if differ[1:] else ''}); "
                             f"{START_OVER}")
        for name, tensor in ours.items():
            if tensor.shape != saved[name].shape:                      # fully fine-tuned, a base has no fingerprint that lasts
                raise ValueError(f"{self.path}: a checkpoint of a run on another model: its {name} is {tuple(saved[name].shape)}, here it is "
                                 f"{tuple(tensor.shape)}; {START_OVER}")
        if self.began != state["began"] and not all(torch.equal(tensor.detach().cpu(), saved[name]) for name, tensor in ours.items()):
            raise ValueError(f"{self.path}: a checkpoint of a run on another model: this one is neither what it began with nor what it had made of "
                             f"that; load the model again that it began with, or {START_OVER}")
        self.began = state["began"]
        with torch.no_grad():
            for name, tensor in ours.items():
                tensor.copy_(saved[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step, self.history, self.random, self.digests = (state[key] for key in ("step", "history", "random", "digests"))
        _set_random_state(self.model, self.random)

    @contextmanager
    def whole_step(self, may_save: bool) -> Iterator[None]:
        """Around everything that changes the state: all of it happens, or the checkpoint before it stands. may_save: it has been looked at."""
        with uninterrupted():
            self.is_whole = False
            yield
            self.step += 1
            self.random = _random_state(self.model)
            self.is_whole = True
            if may_save and self.spent_saving <= CHECKPOINT_SHARE * (time.monotonic() - self.started):
                self.save()

    def save(self) -> None:
        if self.path is None or not self.is_whole:
            return
        began = time.monotonic()
        save_checkpoint(self.path, self.identity, {
            "trained": trained_tensors(self.model), "tied": _tied(self.model), "optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict(),
            "random": self.random, "step": self.step, "history": self.history, "data": self.data, "digests": self.digests,
            "began": self.began,
        })
        self.spent_saving += time.monotonic() - began

    def note(self, parts: list) -> None:
        """Remember what this step reads, if it is one of those that a resumed run looks at again."""
        if not self.step & (self.step - 1):
            self.digests[self.step] = digest(parts)

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
    """Ctrl-C and the like inside the block take effect at its end. (Python delivers signals to the main thread only.)"""
    before = {number: signal.getsignal(number) for number in STOPS} if threading.current_thread() is threading.main_thread() else {}
    before = {number: handler for number, handler in before.items() if callable(handler)}
    came = []
    for number in before:
        signal.signal(number, lambda *signal_and_frame: came.append(signal_and_frame))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        before[came[0][0]](*came[0])


@contextmanager
def stoppable() -> Iterator[None]:
    """kill, and the end of a terminal or of a job's time, stop the block as Ctrl-C does, by an exception: SystemExit. Left to itself Python
    would end at once, without a word. A handler of one's own stays."""
    main = threading.current_thread() is threading.main_thread()
    ours = [number for number in STOPS if main and signal.getsignal(number) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _stop(number: int, frame) -> None:
    raise SystemExit(128 + number)             # what a shell reports of a program that a signal ended


@contextmanager
def alone(path: str | Path | None) -> Iterator[None]:
    """One run at a time in `path`, a folder or a checkpoint's file. Raises ValueError where another one is in there.

    The lock is the system's, on a hidden file: of a run that was killed nothing is left but that file, and it locks nothing.
    """
    if path is None:
        yield
        return
    path = Path(path)
    with _locked(lock_of(path), path) as file:
        try:
            yield
        finally:
            if fcntl:                          # removed while it is locked, so that no other's is removed
                Path(file.name).unlink(missing_ok=True)


def lock_of(path: Path) -> Path:
    return path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")


def is_running(path: Path) -> bool:
    """Whether a run lives in `path` now. Nothing is written; a lock file that a killed run has left does not count."""
    try:
        with open(lock_of(path), "rb") as file:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            else:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:                            # no lock file; or a file system without locks
        return False
    return False


def _locked(lock: Path, path: Path) -> IO:
    while True:
        try:
            file = open(lock, "ab")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except (BlockingIOError, PermissionError):
            file.close()
            raise ValueError(f"{path}: another run is writing there; wait for its end, or choose another place") from None
        except OSError:
            pass                               # a file system without locks: as it was before there were any
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(lock), os.fstat(file.fileno())):
                return file
        file.close()                           # the run before removed it in this moment


def saved_state(path: Path, identity: dict, fingerprint: str, parts: Callable[[int], list]) -> dict | None:
    """What the checkpoint holds, if there is one; refused where it belongs to a run with other settings or other data."""
    if not path.exists():
        return None
    state = load_checkpoint(path, identity)
    if state["data"] != fingerprint:
        raise ValueError(f"{path}: a checkpoint of another run, whose data was another: the text has changed since; {START_OVER}")
    for step, seen in state["digests"].items():
        if step < state["step"] and seen != digest(parts(step)):
            which = f"batch of step {step}" if step else "first batch"
            raise ValueError(f"{path}: a checkpoint of another run, whose {which} was another: the data, its seed or the size of its batches has "
                             f"changed; {START_OVER}")
    return state


def digest(parts: list) -> str:
    """SHA-256 of the bits of what a step reads."""
    found = hashlib.sha256()
    for batch in parts:
        for name, part in sorted(batch.items()) if isinstance(batch, Mapping) else enumerate(batch):
            bits = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() if isinstance(part, Tensor) else repr(part).encode()
            found.update(f"{name} {getattr(part, 'shape', '')}\n".encode())
            found.update(bits)
    return found.hexdigest()


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
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


def tie(model: nn.Module, groups: list[list[str]], path: str | Path) -> None:
    """Let layers share as they did in the run that is gone on with."""
    there = _tied(model)
    if there and there != groups:
        raise ValueError(f"{path}: a checkpoint of a run whose layers shared other tensors ({' = '.join((groups or there)[0])}); {START_OVER}")
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
