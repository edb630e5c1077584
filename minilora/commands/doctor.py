"""doctor: name the usual confusions in a model, an adapter or a run, each with its evidence and its fix; without one, describe the machine."""

import argparse
from pathlib import Path

from minilora.scale.doctor import examine, machine


def add(commands) -> None:
    parser = commands.add_parser("doctor", help="name the usual confusions in a model, an adapter or a run, from evidence")
    parser.add_argument("paths", nargs="*", type=Path, metavar="MODEL|ADAPTER|RUN", help="a safetensors file, or a folder (default: the machine)")
    parser.add_argument("--base", type=Path, metavar="MODEL", help="the original model, to hold the others against")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0: nothing found. 1: findings."""
    if not args.paths:
        if args.base:
            raise ValueError("--base is to hold something against: name a model, an adapter or a run as well")
        print("\n".join(machine()))
        return 0
    reports = examine(args.paths, args.base)
    print("\n\n".join(map(str, reports)))
    return int(any(reports))
