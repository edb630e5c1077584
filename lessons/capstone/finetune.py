"""Your own answers fine-tune the tiny GPT on a text of yours. Each `my.…` is an exercise that you wrote, each `ml.…` is the package's:
    .venv/bin/python lessons/capstone/finetune.py my.txt --out runs/capstone
"""

import torch
from safetensors.torch import load, save

import minilora as ml
from lessons.capstone import stage
from minilora.adapter import put                                                         # put(model, name, layer): model.name = layer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
RANK, ALPHA, LR, RATIO = 4, 8, 5e-3, 4                                                   # A learns at LR, B at RATIO · LR


def finetune(my, task: ml.data.Task, steps: int, show: stage.Show) -> None:
    model, batches, held_out = ml.load_base(), task.batches(rows=4), task.held_out(128)  # held_out: (N, 128), the end of the text

    @torch.no_grad()
    def bits() -> float:
        return my.bits_per_byte(my.next_byte_nats(model(held_out), held_out).item(), "b")        # nats of one byte: any text of one byte will do

    show.before(model, my.parameter_count(model.config), my.training_bytes(model), bits())
    my.inject_lora(model, TARGETS, RANK, ALPHA)
    rates = {p: group["lr"] for group in my.lora_plus_groups(model, LR, RATIO) for p in group["params"]}
    layers = {}
    for name, theirs in list(ml.adapters(model)):                                        # lesson 01 let you inject the package's LoRALinear:
        layers[name] = layer = my.LoRALayer(theirs.base, RANK, ALPHA)                    # your own layer goes there now,
        layer.A, layer.B = theirs.A, theirs.B                                            # with the same A and B, which `rates` knows
        put(model, name, layer)
    trained = {f"base_model.model.{name}.lora_{f}.weight": getattr(layer, f) for name, layer in layers.items() for f in "AB"}      # PEFT's names
    count = my.lora_parameter_count([tuple(layer.base.weight.shape) for layer in layers.values()], RANK)
    show.adapter(len(layers), count, my.training_bytes(model), my.adapter_bytes(save(trained)))

    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in rates}
    for step in range(steps):
        ids, _ = batches(step)                                                           # (4, 128)
        loss = my.next_byte_nats(model(ids), ids)
        loss.backward()
        with torch.no_grad():
            for p, lr in rates.items():
                new, *moments[p] = my.adamw_step(p, p.grad, *moments[p], step + 1, lr * (1 - step / steps))
                p.copy_(new).grad = None
        show.step(step, loss.item())
    show.after(model, bits())

    by_branch, merged, file = ml.load_base(), ml.load_base(), save(trained)              # two more models, from the base and the file alone
    for name in layers:
        A, B = (load(file)[f"base_model.model.{name}.lora_{f}.weight"] for f in "AB")
        by_branch.get_submodule(name).register_forward_hook(lambda _, x, y, A=A, B=B: y + my.lora_branch(*x, A, B, ALPHA, RANK))
        W = merged.get_submodule(name).weight
        W.data = my.merge_lora(W.data, A, B, ALPHA, RANK)
    show.ways(held_out, {"LoRALayer": model, "lora_branch": by_branch, "merge_lora": merged}, file, {"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS})
    for name, layer in layers.items():
        put(model, name, layer.base)                                                     # your layers out again
    show.the_end(model, merged)


if __name__ == "__main__":
    stage.perform(finetune)
