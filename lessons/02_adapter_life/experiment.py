"""The numbers of lesson 02 that need many runs: python lessons/02_adapter_life/experiment.py (some minutes). What is in results.json already is not run again.

    voices/     two adapters of seed 0, the files that the notebook takes apart
    plane       held-out loss in four voices where the two are mixed with weights (u, v): updates added, or factors added
    corners     the same at a few (u, v), three seeds
    peft        how far PEFT's own mixtures of the two files, "cat" and "linear", are from ours (where PEFT is installed)
    resume      training loss from step 100 on, three seeds: resumed from a checkpoint; from the adapter alone; the same with a warm-up
"""

import copy
import json
import math
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

import minilora as ml

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
METHOD, LR, ROWS, CONTEXT, STEPS = ml.LoRA(rank=4, alpha=8), 1e-2, 8, 64, 150
AXIS = [-0.25 + 0.125 * i for i in range(13)]
CORNERS = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 0.5)]
STOP, GO_ON, WARMUP = 100, 40, 20


def joined(text: str) -> str:
    """The_world_without_a_space. Letter by letter, so it can be undone and no probability changes."""
    return text.replace(" ", "_")


def both(text: str) -> str:
    return joined(ml.data.loudly(text))


VOICES = {"plain": ml.data.plainly, "loud": ml.data.loudly, "joined": joined, "both": both}
TASKS = {name: ml.data.world(voice, name) for name, voice in VOICES.items()}


def trained(voice: str, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)                                            # A's start
    model = ml.adapt(ml.load_base(), METHOD)
    ml.finetune(model, METHOD, TASKS[voice].batches(ROWS, CONTEXT, seed), STEPS, LR, seed=seed, schedule="linear", progress=False)
    return model


def parts(model: torch.nn.Module) -> dict:
    return {name: (layer.A.detach(), layer.B.detach(), layer.scale) for name, layer in ml.adapters(model)}


def updates_added(u, A_1, B_1, s_1, v, A_2, B_2, s_2):
    return u * s_1 * B_1 @ A_1 + v * s_2 * B_2 @ A_2


def factors_added(u, A_1, B_1, s_1, v, A_2, B_2, s_2):
    """Each factor carries the root of its weight, so that its own update comes out right; as in PEFT's combination_type="linear"."""
    a, b = (math.copysign(math.sqrt(abs(w)), w) for w in (u * s_1, v * s_2))
    return (abs(a) * B_1 + abs(b) * B_2) @ (a * A_1 + b * A_2)


MIXES = {"updates added": updates_added, "factors added": factors_added}


def losses(loud: dict, join: dict, points: list, windows: int = 16) -> dict:
    """{mix: {voice: [nats per byte at each point]}} on the same held-out documents, told in each voice."""
    model = ml.load_base()
    W = {name: model.get_submodule(name).weight.detach().clone() for name in loud}
    told = {voice: task.held_out(CONTEXT + 1)[:windows] for voice, task in TASKS.items()}
    found = {mix: {voice: [] for voice in VOICES} for mix in MIXES}
    for mix, update in MIXES.items():
        for u, v in points:
            with torch.no_grad():
                for name in W:
                    model.get_submodule(name).weight.copy_(W[name] + update(u, *loud[name], v, *join[name]))
            for voice in VOICES:
                found[mix][voice].append(round(ml.held_out_loss(model, told[voice]), 4))
    return found


def peft_agrees() -> dict:
    """The largest difference of an update from ours, as a share of its largest number, over a few weights."""
    import peft

    model = peft.PeftModel.from_pretrained(ml.load_base(), HERE / "voices" / "loud", adapter_name="loud")
    model.load_adapter(HERE / "voices" / "joined", "joined")
    loud, join = (parts(ml.load_adapter(ml.load_base(), HERE / "voices" / voice)) for voice in ("loud", "joined"))
    found = {"version": peft.__version__, "cat": 0.0, "linear": 0.0}
    for i, (u, v) in enumerate([(1.0, 1.0), (0.5, 0.25), (-0.5, 1.25)]):
        for kind, update in (("cat", updates_added), ("linear", factors_added)):
            model.add_weighted_adapter(["loud", "joined"], [u, v], f"{kind}{i}", combination_type=kind)
            for name in loud:
                ours = update(u, *loud[name], v, *join[name])
                theirs = model.base_model.model.get_submodule(name).get_delta_weight(f"{kind}{i}")
                found[kind] = max(found[kind], ((theirs - ours).abs().max() / ours.abs().max()).item())
    return found


class Stop(Exception):
    """The power fails."""


def resume(seed: int) -> dict:
    """Training loss at the GO_ON steps after the stop, three ways; and at the ten before it."""
    batches = TASKS["loud"].batches(ROWS, CONTEXT, seed)

    def until_the_stop(step):
        if step == STOP:
            raise Stop
        return batches(step)

    def train(model, batches, steps, **options):
        return ml.finetune(model, METHOD, batches, steps, LR, seed=seed, progress=False, **options)["loss"]

    torch.manual_seed(seed)
    model = ml.adapt(ml.load_base(), METHOD)
    start = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint.pt"
        try:
            train(model, until_the_stop, STOP + GO_ON, checkpoint=checkpoint)
        except Stop:
            pass
        bare, warmed = copy.deepcopy(model), copy.deepcopy(model)
        whole = train(start, batches, STOP + GO_ON, checkpoint=checkpoint)
    later = lambda step: batches(step + STOP)
    return {"before": whole[STOP - 10:STOP], "checkpoint": whole[STOP:], "adapter alone": train(bare, later, GO_ON),
            "adapter alone, warm-up": train(warmed, later, GO_ON, warmup=WARMUP)}


def rounded(found: dict) -> dict:
    return {name: [round(loss, 4) for loss in values] for name, values in found.items()}


def main() -> None:
    torch.set_num_threads(1)                                           # so that a second machine has a chance to see the same digits
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {
        "made by": "python lessons/02_adapter_life/experiment.py", "torch": torch.__version__, "axis": AXIS, "corners at": CORNERS,
        "corners": {}, "resume": {}, "plane": {}}

    def note():
        RESULTS.write_text(json.dumps(results) + "\n")

    for seed in range(3):
        if str(seed) not in results["corners"] or (seed == 0 and not results["plane"]):
            loud, join = trained("loud", seed), trained("joined", seed + 100)
            if seed == 0:
                ml.save_adapter(loud, HERE / "voices" / "loud")
                ml.save_adapter(join, HERE / "voices" / "joined")
            results["corners"][str(seed)] = losses(parts(loud), parts(join), CORNERS, windows=64)
            note()
            print("corners", seed, flush=True)
            if seed == 0:
                results["plane"] = losses(parts(loud), parts(join), [(u, v) for v in AXIS for u in AXIS])
                note()
                print("plane", flush=True)
    if "peft" not in results and find_spec("peft"):
        results["peft"] = peft_agrees()
        note()
        print("peft", flush=True)
    for seed in range(3):
        if str(seed) not in results["resume"]:
            results["resume"][str(seed)] = rounded(resume(seed))
            note()
            print("resume", seed, flush=True)


if __name__ == "__main__":
    main()
