"""minilora: the LoRA family from scratch on a tiny GPT. The names below are in the order the course meets them."""

from minilora.gpt import GPTConfig, TinyGPT, load_base
from minilora.adapter import Adapter, Method, adapt, adapters, check_gradients, disabled, merge, trainable_parameters, unload
from minilora.methods.full import FullFineTuning
from minilora.methods.lora import LoRA, LoRALinear
from minilora.methods.lora_plus import LoRAPlus
from minilora.methods.lora_fa import LoRAFA
from minilora.methods.vera import VeRA, VeRALinear
from minilora.methods.delta_lora import DeltaLoRA, DeltaLoRALinear
from minilora.methods.lora_drop import LoRADrop, LoRADropLinear
from minilora.methods.adalora import AdaLoRA, AdaLoRALinear
from minilora.methods.dora import DoRA, DoRALinear
from minilora.methods.pissa import PiSSA, PiSSALinear
from minilora.quant.nf4 import NF4Tensor, quantize_nf4
from minilora.quant.linear import NF4Linear, merge_nf4, quantize
from minilora.quant.autopsy import Autopsy, merge_autopsy, survival
from minilora.quant.paged import PagedAdamW
from minilora.methods.qlora import QLoRA
from minilora.methods.loftq import LoftQ, LoftQLinear, QPiSSA
from minilora.training import answer_loss, exact_match, finetune, held_out_loss, next_byte_loss
from minilora.storage import load_adapter, save_adapter
from minilora import data

__version__ = "0.1.0"
