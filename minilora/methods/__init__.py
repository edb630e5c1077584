"""One file a method. METHODS is what `--method` on the command line may name."""

from minilora.methods.full import FullFineTuning
from minilora.methods.lora import LoRA

METHODS = {"full": FullFineTuning, "lora": LoRA}
