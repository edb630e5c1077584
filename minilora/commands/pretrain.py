"""pretrain: make a base model from nothing, as the shipped one was made."""

import argparse
from pathlib import Path

import torch

import minilora as ml
from minilora import data, storage
from minilora.commands.arguments import whole
from minilora.commands.models import on_best_device


def add(commands) -> None:
    parser = commands.add_parser("pretrain", help="make a base model from nothing, as the shipped one was made")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--steps", type=whole(1), default=5500)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    torch.manual_seed(0)
    model = on_best_device(ml.TinyGPT())
    tiny = data.world()
    windows = tiny.held_out(model.config.context + 1)
    checkpoint = args.out.with_suffix(".checkpoint")
    ml.finetune(model, ml.FullFineTuning(), data.pretraining(), args.steps, lr=3e-3, checkpoint=checkpoint, weight_decay=0.01,
                warmup=min(200, args.steps // 10), schedule="cosine", evaluate=lambda model: ml.held_out_loss(model, windows), evaluate_every=250)
    storage.save_model(model, args.out)
    checkpoint.unlink()
    print(f"tiny world, held out: {ml.held_out_loss(model, windows):.4f} nats per byte, floor {tiny.floor(windows):.4f}")
    return 0
