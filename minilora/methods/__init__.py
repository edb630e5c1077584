"""One file a method. METHODS is what `--method` on the command line may name; make_method fits one to the tiny GPT and to a run's length."""

from functools import partial

from minilora.adapter import Method
from minilora.methods.adalora import AdaLoRA
from minilora.methods.delta_lora import DeltaLoRA
from minilora.methods.dora import DoRA
from minilora.methods.full import FullFineTuning
from minilora.methods.loftq import LoftQ, QPiSSA
from minilora.methods.lora import LoRA
from minilora.methods.lora_drop import LoRADrop
from minilora.methods.lora_fa import LoRAFA
from minilora.methods.lora_plus import LoRAPlus
from minilora.methods.pissa import PiSSA
from minilora.methods.qlora import QLoRA
from minilora.methods.vera import VeRA

METHODS = {"full": FullFineTuning, "lora": LoRA, "lora-plus": LoRAPlus, "lora-fa": LoRAFA, "vera": VeRA, "delta-lora": DeltaLoRA,
           "lora-drop": LoRADrop, "adalora": AdaLoRA, "rslora": partial(LoRA, rslora=True), "dora": DoRA, "pissa": PiSSA, "qlora": QLoRA,
           "loftq": LoftQ, "qpissa": QPiSSA}

RATES = {"full": 1e-3, "lora": 1e-2, "lora-plus": 5e-3, "lora-fa": 3e-2, "vera": 1e-1, "delta-lora": 1e-2, "lora-drop": 1e-2, "adalora": 3e-2,
         "rslora": 1e-2, "dora": 3e-2, "pissa": 1e-2, "qlora": 1e-2, "loftq": 3e-2, "qpissa": 3e-2}     # from a sweep of three each on two tasks


def make_method(name: str, rank: int | None = None, alpha: float | None = None, steps: int = 200) -> Method:
    """The method of that name for a run of so many steps; what was not given is the method's own default."""
    fields = {} if name == "full" else {"rank": rank or (64 if name == "vera" else 8)}
    if name == "adalora":                    # the paper's proportions: half as much again at the start; on MNLI a tenth of the steps
        target = fields.pop("rank")          # before the first cut and more than half of them after the last
        fields |= {"initial_rank": round(1.5 * target), "target_rank": target, "warmup_steps": steps // 10, "final_steps": steps // 2}
    if name == "lora-drop":
        fields["warmup_steps"] = min(20, max(1, steps // 10))
    if alpha is not None:
        if name in ("full", "vera"):
            raise ValueError(f"{name} has no alpha")
        fields["alpha"] = alpha
    return METHODS[name](**fields).scheduled(steps)
