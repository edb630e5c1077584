"""python -m minilora: fine-tune the tiny GPT on a text of your own, let it speak, merge what it learned.

    finetune   --text FILE | --task voice|facts|sums   [--method lora --rank 8 --steps 200 --out DIR …]     --model FOLDER|NAME: a real one
               on several processes or machines: torchrun --nproc-per-node N -m minilora finetune …
               methods: full lora lora-plus lora-fa vera delta-lora lora-drop adalora rslora dora pissa qlora loftq qpissa
    generate   [--model FOLDER|NAME] [--adapter DIR] --prompt TEXT
    merge      [--model FOLDER|NAME] --adapter DIR --out FILE|FOLDER
    compare    [--quick] [--text FILE | --task voice,facts,sums] --out DIR      every method, a table and two pictures
    claims     [--results FILE]                        the papers' headlines, judged by what compare measured
    capacity   --out DIR                               facts remembered against rank; AdaLoRA's ranks as a film
    cost       [--shape chatglm-6b] --method lora …    what a method costs, measured here; on a real model by the same formulas
    doctor     [MODEL|ADAPTER|RUN …] [--base MODEL]    the usual confusions, named from evidence; exit code 1 where there is one
    pretrain   --out FILE                              how the shipped base was made
"""

import argparse
import io
import sys
import warnings

from minilora import __version__
from minilora.commands import compare, cost, doctor, finetune, generate, pretrain
from minilora.commands.arguments import Parser
from minilora.safety import memory
from minilora.safety.runs import stoppable


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0; 1 where doctor finds something; 2 for bad input or too little memory, and one line says what; 130 after
    Ctrl-C, 143 after kill."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")          # a terminal without UTF-8 shows ? and goes on
    args = parser().parse_args(arguments)
    try:
        with warnings.catch_warnings(), stoppable(), memory.told():
            warnings.showwarning = lambda message, *_: print(f"minilora: {message}", file=sys.stderr)
            return args.run(args)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        print(f"minilora: {error}", file=sys.stderr)
        return 2


def parser() -> Parser:
    top = Parser(prog="minilora", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--version", action="version", version=f"minilora {__version__}")
    commands = top.add_subparsers(required=True, metavar="command", parser_class=Parser)
    for command in (finetune, generate, compare, cost, doctor, pretrain):
        command.add(commands)
    return top


if __name__ == "__main__":
    sys.exit(main())
