"""One file a method. METHODS is what `--method` on the command line may name."""

from functools import partial

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
