"""What tests/test_parallel.py has torchrun start: several processes that do here what its tests look at afterwards, many things in one launch.

    parallel_worker.py OUT            what each process found, in OUT/results0.pt and OUT/results1.pt
    parallel_worker.py OUT kill       one fine-tuning on the command line, whose second process kills itself at step 4
"""

import functools
import io
import os
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import minilora as ml
from minilora.__main__ import main
from minilora.methods import METHODS, make_method
from minilora.scale import parallel

IGNORED = -100
SHARDED = ["lora", "dora", "adalora", "delta-lora", "lora-drop", "pissa"]
COMMAND = ["finetune", "--task", "voice"]
QLORA = ["--method", "qlora", "--rank", "2", "--steps", "6"]           # with dropout, as its paper has it


def small(dtype=torch.float64):
    """A small TinyGPT. In float64 the order of a summation is no longer seen, and anything else is."""
    torch.manual_seed(0)
    return ml.TinyGPT(ml.GPTConfig(context=16, width=16, layers=3, heads=2)).to(dtype)


def batches(step):
    """Five rows, so that one of two processes has three; of some targets a part does not count, of the fifth row's none."""
    dice = torch.Generator().manual_seed(step)
    ids = torch.randint(256, (5, 17), generator=dice)
    x, y = ids[:, :-1], ids[:, 1:].clone()
    for row in range(5):
        y[row, :4 * row] = IGNORED
    return x, y


def loss_of(model, x, y):
    """As next_byte_loss, which takes logits as float32."""
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def method_named(name):
    if name == "adalora":
        return ml.AdaLoRA(4, 2, alpha=5, warmup_steps=1, final_steps=1)
    if name == "lora-drop":
        return ml.LoRADrop(2, threshold=0.3, warmup_steps=2)
    if name in ("qlora", "lora-fa"):
        return ml.QLoRA(2, dropout=0.0) if name == "qlora" else ml.LoRAFA(2, projection=True)
    return make_method(name, 2, 5.0 if name != "vera" and name != "full" else None, 4)


def train(model, method, processes, batches=batches, steps=4, **options):
    """As every run here is trained: two batches a step, clipped."""
    targets = None if method.trains_base else ["q_proj", "down_proj"]
    usual = {"targets": targets, "loss_fn": loss_of, "accumulate": 2, "clip": 0.5, "weight_decay": 0.01, "progress": False}
    return ml.finetune(model, method, batches, steps, 0.01, seed=3, processes=processes, **(usual | options))


def held_out(model):
    return ml.held_out_loss(model, batches(9)[0])


class Experts(nn.Module):
    """Each row goes to the expert that its first byte names: 0, 1, 2, or 3, which nobody asks; row 4 and on to none."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(256, 6)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.head = nn.Linear(6, 256)

    def forward(self, ids):
        h = self.embedding(ids)
        return self.head(torch.stack([self.experts[first](row) if first < 4 else row for first, row in zip(ids[:, 0].tolist(), h)]))


def routed(step):
    """Rows 0 and 2 are the first process's. In the first step it meets expert 0 and the other process expert 1; then one of them meets none; and in
    the last the second process, which alone meets two of them, has no target that counts."""
    x = torch.randint(256, (4, 8), generator=torch.Generator().manual_seed(step))
    y = x.roll(-1, 1)
    x[:, 0] = torch.tensor([[0, 1, 0, 1], [9, 0, 9, 2], [2, 9, 0, 9], [1, 2, 1, 0]][step % 4])
    if step % 4 == 3:
        y[1::2] = IGNORED
    return x, y


def experts(method, processes):
    torch.manual_seed(1)
    model = Experts().double()
    torch.manual_seed(2)
    ml.adapt(model, method, ["0", "1", "2", "3"])
    train(model, method, processes, routed, targets=None, accumulate=1, steps=8)
    return state(model)


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters() if not hasattr(tensor, "full_tensor")}


def job(action, **options):
    """What an action with processes of its own ends with: its result, or the error in words."""
    try:
        with parallel.several(**options) as processes:
            return action(processes)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        ended = f"{type(error).__name__}: {error}"
    return ended


def stopping(at):
    def stopped(step):
        if step == 2 * at:
            raise KeyboardInterrupt
        return batches(step)

    return stopped


def with_dropout(processes, batches=batches, checkpoint=None):
    """The state at the end, and each step's first mask."""
    model, masks = small(), []
    torch.manual_seed(2)
    ml.adapt(model, ml.LoRA(2, dropout=0.5), ["q_proj", "down_proj"])
    next(layer for _, layer in ml.adapters(model)).dropout.register_forward_hook(lambda module, inputs, y: masks.append(y[0] != 0))
    train(model, ml.LoRA(2, dropout=0.5), processes, batches, checkpoint=checkpoint)
    return state(model), masks


def every_method(processes):
    found = {}
    for name in METHODS:
        model = small()
        found[name] = train(model, method_named(name), processes), state(model), processes.bytes
    return found


def other_runs(processes):
    """float32; experts; pages; recomputed blocks."""
    found = {}
    model = small(torch.float32)
    found["float32"] = train(model, method_named("lora"), processes, evaluate=held_out, evaluate_every=2), state(model)
    for name, method in (("experts", ml.LoRA(2)), ("experts with a penalty", ml.AdaLoRA(3, 2))):
        found[name] = experts(method, processes)
    for name, options in (("paged", {"optimizer": functools.partial(ml.PagedAdamW, budget=400)}), ("recomputed", {"checkpointing": "non-reentrant"})):
        model = small()
        found[name] = train(model, method_named("lora"), processes, **options), state(model)
    return found


def started_apart(processes):
    """Each process adapts its model by hand, from random numbers of its own."""
    model = small()
    torch.manual_seed(processes.rank)
    ml.adapt(model, method_named("lora"), ["q_proj", "down_proj"])
    train(model, method_named("lora"), processes)
    return state(model)


def sharded(processes, out):
    found = {}
    for name in SHARDED:
        model, held = small(), []
        inside = model.blocks[1].attention.k_proj                       # not adapted, in the middle of a block
        inside.register_forward_hook(lambda *_: held.append(parallel.bytes_held(model)))
        history = train(model, method_named(name), processes, checkpointing="non-reentrant" if name == "lora" else None)
        found[name] = history, state(model), parallel.bytes_held(model), max(held)
        with parallel.whole(model):
            if processes.first:
                ml.save_adapter(model, out / f"sharded-{name}")
        again = parallel.bytes_held(model)
        assert again == found[name][2] and torch.isfinite(model(batches(0)[0])).all()              # and it works as before
        if name == "lora":
            with parallel.whole(model):
                if processes.first:
                    found["merged"] = {name: tensor.detach().clone() for name, tensor in ml.merge(model).state_dict().items()}
    return found


def nudged(rank):
    model = ml.adapt(small(), method_named("lora"), ["q_proj", "down_proj"])

    def at_step_2(step):
        if step == 4 and rank == 1:
            with torch.no_grad():
                model.blocks[1].mlp.down_proj.A[0, 3] += 1e-9
        return batches(step)

    return lambda processes: train(model, method_named("lora"), processes, at_step_2)


def of_the_second(rank):
    """What only the second process meets. It ends, and by that the first one notices."""
    def read(step):
        if step == 4 and rank == 1:
            raise ValueError("no such text")
        return batches(step)

    return lambda processes: train(small(), ml.LoRA(2), processes, read)


def not_a_number(model, x, y):
    """Of the fourth row, which is the second process's, in the third step."""
    loss = loss_of(model, x, y)
    return loss * torch.nan if (x[:, 0] == batches(4)[0][3, 0]).any() else loss


class WithNorm(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))


def errors(rank, out):
    def one_row(step):
        return tuple(part[:1] for part in batches(step))

    def fails(model=None, method=ml.LoRA(2), read=batches, options=None, **job_options):
        return job(lambda processes: train(model or small(), method, processes, read, **(options or {})) and "", **job_options)

    other_base = small()
    with torch.no_grad():
        other_base.head.weight[3, 4] += rank
    return {
        "rows": fails(read=one_row, options={"checkpoint": out / "rows.pt"}),
        "norm": fails(WithNorm(), options={"targets": ["0", "2"]}),
        "reentrant": fails(options={"checkpointing": "reentrant"}),
        "four bits": fails(ml.quantize(small(torch.float32)), shard=True),
        "full": fails(method=ml.FullFineTuning(), shard=True),
        "settings": fails(method=ml.LoRA(2, alpha=5.0 + rank)),
        "base": fails(other_base),
        "nudged": job(nudged(rank), check_every=1),
        "seen late": job(nudged(rank), check_every=50),
        "not a number": fails(options={"loss_fn": not_a_number, "checkpoint": out / "nan.pt"}),
    }


def command(*arguments):
    """Exit code and all that the command prints, with nothing of its own said by torch."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        code = main([*COMMAND, *arguments])
    return code, printed.getvalue()


def everything(out, rank):
    found = {"methods": job(every_method, check_every=1), "others": job(other_runs, check_every=1)}
    found["started apart"] = job(started_apart, check_every=1)
    found["sharded"] = job(lambda processes: sharded(processes, out), shard=True, check_every=1)
    place = out / ("dropout.pt" if rank == 0 else "never.pt")          # the second process reads and writes none
    found["dropout"] = job(with_dropout)
    found["stopped"] = job(lambda processes: with_dropout(processes, stopping(2), place))
    found["resumed"] = job(lambda processes: with_dropout(processes, batches, place))
    found["two"] = job(lambda processes: train(small(), method_named("lora"), processes, stopping(2), checkpoint=out / "two.pt"))
    model = small()
    there = out / ("one.pt" if rank == 0 else "never.pt")
    found["from one"] = job(lambda processes: train(model, method_named("lora"), processes, checkpoint=there)), state(model)
    found["errors"] = errors(rank, out)
    base = ["--base", str(out / "base.safetensors"), "--out"]
    found["command"] = command(*QLORA, *base, str(out / "straight"))
    found["command resumed"] = command(*QLORA, *base, str(out / "killed"))
    found["command sharded"] = command("--method", "dora", "--rank", "2", "--steps", "3", *base, str(out / "sharded"), "--shard")
    found["command with rows for one"] = with_rows_for_one("--method", "lora", *base, str(out / "nothing"))
    return found


def with_rows_for_one(*arguments):
    read = ml.data.Batches.__call__
    ml.data.Batches.__call__ = lambda self, step: tuple(part[:1] for part in read(self, step))
    try:
        return command(*arguments)
    finally:
        ml.data.Batches.__call__ = read


def killed(out, rank):
    read = ml.data.Batches.__call__

    def dying(self, step):
        if rank == 1 and step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, step)

    ml.data.Batches.__call__ = dying
    return main([*COMMAND, *QLORA, "--base", str(out / "base.safetensors"), "--out", str(out / "killed")])


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    if sys.argv[2:] == ["kill"]:
        sys.exit(killed(out, rank))
    found = everything(out, rank)
    if rank == 0:
        found["second alone"] = job(of_the_second(rank))
    torch.save(found, out / f"results{rank}.pt")
    if rank == 1:
        print(job(of_the_second(rank)))
