"""Several processes, on one machine or on many, train one adapter: each reads its share of the rows, and all make one process's step.

    gradient = Σ_r (n_r / n) ∇ loss_r        loss_r: mean over the n_r targets of process r's rows        n = Σ_r n_r, of all batches of the step

    torchrun --nproc-per-node 2 -m minilora finetune …                                     two processes on this machine
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m minilora finetune …         the same line on two

All this is torch's own: torchrun starts the processes and says in their environment who is who (nothing more is needed for several machines);
DistributedDataParallel averages the gradients, over gloo on CPUs and NCCL on GPUs; with shard=True fully_shard cuts the frozen base, so that a
process keeps 1 / N of it, and whole only the block at work and what stands outside of blocks (embeddings, the head). What is trained, and what
belongs to an adapter, is whole in every process: it is small.

batches(step) is a pure function, so every process makes the whole batch and takes the rows r, r + N, …. The numbers are one process's but for
the order of summation, about 1e-7 of them. LoRA-drop's warm-up is not shared: each process goes through all of it. A router's balance loss is of
each process's own rows. Dropout: each process draws masks of its own, from a seed made of the run's, the step and its rank; so there is no
random state to keep, and a resumed run draws what it would have drawn. On another number of processes, or on one, the masks are others.

What is written, the first process writes. Where another is killed, the job ends with one line that names it; on GPUs, where those that are left
wait inside NCCL and cannot speak, torchrun's own report does. The last checkpoint stands, and any number of processes may go on from it.
"""

import datetime
import hashlib
import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from minilora.adapter import Method, adapters
from minilora.data import placed
from minilora.safety.memory import ran_out
from minilora.safety.runs import digest, trained_tensors, uninterrupted
from minilora.storage import base_fingerprint
from minilora.training import Loss, OneProcess, Said, targets_that_count

ALL_TRAINED = "there is no frozen base to shard: full fine-tuning trains all of the model"
FOUR_BITS = "is in four bits, and those are not cut: their codes are no parameters. Leave sharding out, or shard the dense base"
NOTHING_YET = "no checkpoint was written yet; the same command begins anew"
PATIENCE = 3.0             # seconds in which a process whose neighbour fails says that it is still there
JOBS = itertools.count()   # that this process has taken part in
ERRORS = (ValueError, OSError, FloatingPointError, MemoryError)     # those of which the command line prints the one line


@contextmanager
def several(shard: bool = False, timeout: float = 1800.0, check_every: int = 50) -> Iterator["OneProcess | Processes"]:
    """The processes that torchrun has started, for finetune(..., processes=...); one, where it has not. Inside the block the others than the first
    print nothing.

    shard: cut the frozen base over them.     timeout: seconds after which a silent process counts as gone.     check_every: steps between two
    looks at whether all train the same numbers.
    Raises ValueError where there is no GPU for each, or one process is to shard; at the end of the block, ConnectionError in one process, naming
    those that are gone, and SystemExit in the others.
    """
    if not there_are_several():
        if shard:
            raise ValueError("to shard is to cut the base over several processes, and there is one: torchrun --nproc-per-node 2 -m minilora finetune … "
                             "--shard")
        yield OneProcess()
        return
    device = torch.device("cpu")
    if torch.cuda.is_available():
        here, there = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > there:
            raise ValueError(f"{here} processes on a machine with {there} GPUs: start one for each, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to train on "
                             "the CPU")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    store, rank, count = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"minilora/{next(JOBS)}", store)          # what an earlier job in these processes has written there is none of this one's
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=count,
                            timeout=datetime.timedelta(seconds=timeout), device_id=device if device.type == "cuda" else None)
    try:
        dist.barrier()                                     # all are connected before one may leave
        with ExitStack() as silence:
            if rank:
                nowhere = silence.enter_context(open(os.devnull, "w"))
                silence.enter_context(redirect_stdout(nowhere))
                silence.enter_context(redirect_stderr(nowhere))
            with Processes(rank, count, device, store, shard, check_every) as processes:
                yield processes
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def there_are_several() -> bool:
    """Whether torchrun has started this process and others."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


class Processes(OneProcess):
    """What finetune asks of the processes that share its work. bytes: of gradients that this one has all-reduced in the last step, as counted."""

    def __init__(self, rank: int, count: int, device: torch.device, store: dist.Store, shard: bool, check_every: int):
        self.rank, self.count, self.device, self.store, self.shard, self.check_every = rank, count, device, store, shard, check_every
        self.model: nn.Module | None = None                # while it is trained
        self.average: DistributedDataParallel | None = None
        self.bytes, self.ended = 0, False
        store.set(f"{rank} lives", json.dumps([socket.gethostname(), os.getpid()]))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def told(self, read: Callable, *arguments):
        """read(*arguments), done by the first process and known to all; what it raises, all raise."""
        answer = [None, None]
        if self.first:
            try:
                answer[0] = read(*arguments)
            except ERRORS as error:
                answer[1] = error
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def placed(self, model: nn.Module) -> nn.Module:
        """On this process's device; what is to be cut waits in host memory, where it has room."""
        return model if self.shard else model.to(self.device)

    def gathered(self, mine) -> list:
        """Each process's, by rank."""
        everyone = [None] * self.count
        dist.all_gather_object(everyone, mine)
        return everyone

    def begin(self, model: nn.Module, method: Method, loss: Loss, seed: int, parts: Callable[[int], list]) -> "SharedLoss":
        """The model has its adapters. Returns the loss whose backward() leaves the gradient of the whole step in this process.

        Raises ValueError where there are fewer rows than processes, not all were started alike, or the model cannot be trained so."""
        read = parts(0)
        self.refuse(method, min(map(rows, read)), loss.checkpointing)
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
                raise ValueError(f"{name} is a {type(module).__name__}, which would take its means from each process's own rows; "
                                 "nn.SyncBatchNorm.convert_sync_batchnorm(model) takes them from all")
        self.compare({"method": repr(method), "learning rate": loss.lr, "seed": seed, "first batch": digest(read)[:12],
                      "base": base_fingerprint(model)[:12]})
        if self.shard:
            shard_base(model, self.device, self.count)
        self.model, self.average = model, None
        return SharedLoss(**vars(loss), processes=self, seed=seed)

    def refuse(self, method: Method, rows: int, checkpointing: str | None) -> None:
        if rows < self.count:
            raise ValueError(f"{self.count} processes and a batch of {rows} rows: each needs one at least; start fewer processes, or read larger "
                             "batches")
        if checkpointing == "reentrant":
            raise ValueError("reentrant checkpointing hides from the processes which parameters a step uses; take checkpointing='non-reentrant'")
        if self.shard and method.trains_base:
            raise ValueError(ALL_TRAINED)
        if self.shard and method.four_bits:
            raise ValueError(f"the base of {type(method).__name__} {FOUR_BITS}")

    def compare(self, mine: dict) -> None:
        for rank, theirs in enumerate(self.gathered(mine)):
            for key, value in mine.items():
                if theirs[key] != value:
                    raise ValueError(f"rank {rank} was started with another {key} than rank {self.rank} ({theirs[key]} and {value}): give all the same "
                                     "command")

    def averaging(self, loss: "SharedLoss", model: nn.Module, method: Method, batches: int) -> DistributedDataParallel:
        """The step's loss, and around it what averages the gradients. Made at the first step, when it is settled what is trained."""
        if self.average is None:
            for tensor in trained_tensors(model).values():
                dist.broadcast(tensor.detach(), src=0)     # as the first process begins, which need not be the same kind of machine
            step = Step(loss, model, method, batches)
            frozen = [name for name, p in step.named_parameters() if not p.requires_grad]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(step, frozen + [name for name, _ in step.named_buffers()])
            self.average = DistributedDataParallel(step, find_unused_parameters=True, init_sync=False)
            self.average.register_comm_hook(self, counted_all_reduce)
        return self.average

    @torch.no_grad()
    def check(self, model: nn.Module, when: str) -> None:
        """Raises ValueError where the processes hold other numbers in what is trained, or in a method's buffers. It names the first tensor."""
        mine = {name: digest([(tensor,)]) for name, tensor in trained_tensors(model).items()}
        whole = hashlib.sha256(json.dumps(mine).encode()).hexdigest()
        if len(set(self.gathered(whole))) > 1:
            everyone = self.gathered(mine)
            name = next(name for name in everyone[0] if len({theirs.get(name) for theirs in everyone}) > 1)
            others = [str(rank) for rank, theirs in enumerate(everyone) if theirs.get(name) != everyone[0][name]]
            raise ValueError(f"the processes train different numbers: {when} {name} is not on rank {', '.join(others)} what it is on rank 0. "
                             "Each must do the same but for its rows; going on from the checkpoint starts all of them from rank 0's")

    def __exit__(self, kind, error, trace) -> None:
        """Without an error: all hold the same. With one: only one process speaks of it."""
        if error is None and not self.ended and self.model is not None:
            model, self.model, self.average = self.model, None, None
            self.check(model, "at the end")
        elif error is not None and not self.ended:
            self.ended = True
            with uninterrupted():                          # torchrun stops the others as soon as one is gone
                self.last_words(error)

    def last_words(self, error: BaseException) -> None:
        """Say why this process ends, hear why the others do, and let one of them speak: the first, or if that is gone the second. Who does not
        answer is gone. The others leave at once, so that those notice it that wait for them."""
        broken = isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error)
        kind = "lost" if broken else "stopped" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "failed"
        self.store.set(f"{self.rank} has ended", json.dumps([kind, ran_out(error) or str(error) or type(error).__name__]))
        if kind == "failed":
            if not self.first and (isinstance(error, ERRORS) or ran_out(error)) and (self.device.type == "cpu" or self.heard([0])):
                raise SystemExit(2)
            return
        if self.rank > 1 or self.rank == 1 and (self.heard([0]) or self.lives(0)):
            if kind == "lost":
                raise SystemExit(1)
            return
        ended = self.heard([rank for rank in range(self.count) if rank != self.rank])
        gone = [str(rank) for rank in range(self.count) if rank not in ended and rank != self.rank and not self.lives(rank)]
        failed = {rank: text for rank, (kind, text) in ended.items() if kind == "failed"}
        for rank, text in failed.items():
            raise ConnectionError(f"rank {rank} has ended: {text}")
        if gone:
            raise ConnectionError(f"rank {', '.join(gone)} of {self.count} processes has ended without a word: killed, or its machine is gone")
        if kind == "lost":
            raise ConnectionError("the connection between the processes has broken, and none of them was killed")

    def lives(self, rank: int) -> bool:
        """Whether a process on this machine is known to be there still: it waits, and will hear of it when this one has ended."""
        host, pid = json.loads(self.store.get(f"{rank} lives"))
        if os.name != "posix" or host != socket.gethostname():
            return False
        try:
            os.kill(pid, 0)                                # asks, and does nothing
            return True
        except OSError:
            return False

    def heard(self, ranks: Sequence[int]) -> dict[int, list]:
        """What these have said of their end, as far as they say it within PATIENCE."""
        said, deadline = {}, time.monotonic() + PATIENCE
        while len(said) < len(ranks) and time.monotonic() < deadline:
            for rank in ranks:
                try:
                    if rank not in said and self.store.check([f"{rank} has ended"]):
                        said[rank] = json.loads(self.store.get(f"{rank} has ended"))
                except RuntimeError:                       # the store has gone with its process
                    return said
            time.sleep(0.02)
        return said


@dataclass(frozen=True)
class SharedLoss(Loss):
    """loss_fn over this process's rows, and the gradient over all."""

    processes: Processes | None = None
    seed: int = 0

    def backward(self, model: nn.Module, method: Method, read: list, step: int) -> Said:
        """As Loss.backward. Of the batches of a step only the last is followed by an all-reduce."""
        average = self.processes.averaging(self, model, method, len(read))
        if step % self.processes.check_every == 0:
            self.processes.check(model, f"at step {step}")
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{self.seed}/{step}/{self.processes.rank}".encode()).digest()[:7]))
        counts = [targets_that_count(model, batch) for batch in read]
        parts = [i for i, n in enumerate(counts) if n] or [0]                         # the same in all processes
        losses, self.processes.bytes = average.module.losses, 0
        losses.grad = None
        for i in parts:
            ours, n = share(model, read[i], self.processes.rank, self.processes.count)
            weight = self.processes.count * n / max(1, sum(counts))                   # the average divides by the number of processes
            with nullcontext() if i == parts[-1] else average.no_sync():
                average(placed(ours, self.device), i, weight, i == parts[-1]).backward()
        self.reached(model)
        return Said(step, dict(enumerate(losses.grad)))


class Step(nn.Module):
    """The loss of a step as a module: DistributedDataParallel looks from a module's output for what it has used.

    losses: zeros, one for each batch of a step, each times that batch's loss. So their gradients are the losses, and come back averaged in the same
    message as the others. A process whose rows meet nothing that is trained still has these to take part with.
    """

    def __init__(self, loss: "SharedLoss", model: nn.Module, method: Method, batches: int):
        super().__init__()
        self.loss, self.model, self.method = loss, model, method
        wide = any(p.requires_grad and p.dtype == torch.float64 for p in model.parameters())
        self.losses = nn.Parameter(torch.zeros(batches, device=loss.device, dtype=torch.float64 if wide else torch.float32))
        self.unused = nn.Parameter(torch.zeros((), device=loss.device))               # where all are used, torch warns that one looked for unused ones

    def forward(self, batch: tuple, i: int, weight: float, is_last: bool) -> Tensor:
        loss = weight * self.loss.of(self.model, batch)
        total = loss + self.losses[i] * loss.detach()
        return total + self.method.penalty(self.model) if is_last else total


def counted_all_reduce(processes: Processes, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """torch's own all-reduce of a bucket of gradients, and how many bytes it has."""
    processes.bytes += bucket.buffer().nbytes
    return allreduce_hook(dist.group.WORLD, bucket)


def rows(batch: Sequence[Tensor] | Mapping) -> int:
    return len(next(value for value in (batch.values() if isinstance(batch, Mapping) else batch) if isinstance(value, Tensor)))


def share(model: nn.Module, batch: Sequence[Tensor] | Mapping, rank: int, count: int) -> tuple[tuple | dict, int]:
    """Rows rank, rank + count, … of a batch, and how many of their targets count. Where none does, a row that counts is added: a mean over no
    targets is no number, and at a weight of 0 what those rows use must get a gradient of 0, as it would in one process."""
    n = rows(batch)
    ours = list(range(rank, n, count))
    targets = targets_that_count(model, taken(batch, ours)) if ours else 0
    if not targets:
        ours += [i for i in range(n) if targets_that_count(model, taken(batch, [i]))][:1]
    return taken(batch, ours), targets


def taken(batch: Sequence[Tensor] | Mapping, which: list[int]) -> tuple | dict:
    """These rows. What is not one row for each (a number, a table for all rows) stays as it is."""
    n = rows(batch)

    def own(value):
        return value[which] if isinstance(value, Tensor) and value.dim() and len(value) == n else value

    return {name: own(value) for name, value in batch.items()} if isinstance(batch, Mapping) else tuple(map(own, batch))


def shard_base(model: nn.Module, device: torch.device, count: int) -> None:
    """Cut the frozen parameters over `count` processes, block by block, in place; the whole model may be in host memory before. What is trained,
    and what belongs to an adapter, stays whole and goes to the device.

    Raises ValueError where nothing is frozen, or a base is in four bits."""
    from torch.distributed.device_mesh import init_device_mesh
    try:
        from torch.distributed.fsdp import FSDPModule, fully_shard
    except ImportError:
        raise ValueError(f"sharding needs torch 2.6 or later, and this is {torch.__version__}") from None

    if isinstance(model, FSDPModule):
        return
    for name, module in model.named_modules():
        if "codes" in module._buffers:
            raise ValueError(f"{name} {FOUR_BITS}")
    whole = {p for p in model.parameters() if p.requires_grad}
    whole |= {p for _, layer in adapters(model) for name, p in layer.named_parameters() if not name.startswith("base.")}
    if all(p in whole for p in model.parameters()):
        raise ValueError(ALL_TRAINED)
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    mesh = init_device_mesh(device.type, (count,))
    for part in [*(block for name in outermost for block in model.get_submodule(name)), model]:
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    for p in whole:
        p.data = p.data.to(device)


def bytes_held(model: nn.Module) -> int:
    """Of parameters and buffers in this process: of a sharded one its shard, and while a block works what it has gathered."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(getattr(t, "to_local", t.detach)().nbytes for t in tensors.values())


@contextmanager
def whole(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block the first process has every sharded parameter whole, in host memory: there save_adapter works, and merge.
    All processes must enter it. A model that is not sharded is as it was."""
    from torch.distributed.tensor import DTensor

    shards = [(module, name, p) for module in model.modules() for name, p in module._parameters.items() if isinstance(p, DTensor)]
    ones: dict[int, nn.Parameter | None] = {}
    for _, _, p in shards:
        if id(p) not in ones:                              # a tied one is one
            together = p.detach().full_tensor()
            ones[id(p)] = nn.Parameter(together.cpu(), requires_grad=False) if dist.get_rank() == 0 else None
    try:
        for module, name, p in shards:
            module._parameters[name] = ones[id(p)] if ones[id(p)] is not None else p
        yield model
    finally:
        for module, name, p in shards:
            module._parameters[name] = p


def stands(checkpoint: Path) -> str:
    """What a run that has failed left, in words."""
    if not checkpoint.exists():
        return NOTHING_YET.capitalize()
    step = torch.load(checkpoint, map_location="cpu", weights_only=True)["state"]["step"]
    return f"In {checkpoint.parent} is the checkpoint of step {step}; the same command goes on from there, on as many processes or on another number"
