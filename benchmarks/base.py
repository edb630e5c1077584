"""How good the shipped base is: held-out loss beside the floor, and how many of 1,000 sampled documents parse.

    python benchmarks/base.py [--samples 1000]     (in hundreds)
"""

import argparse

import torch

import minilora as ml


@torch.no_grad()
def sample_documents(model: ml.TinyGPT, count: int, seed: int = 0) -> list[str]:
    """`count` documents at temperature 1, each begun after a newline and ended by the next one."""
    dice = torch.Generator().manual_seed(seed)
    ids = torch.full((count, 1), ord("\n"))
    for _ in range(model.config.context - 1):
        logits = model(ids)[:, -1]                                            # (count, 256)
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=dice)], dim=1)
        if (ids[:, 1:] == ord("\n")).any(1).all():
            break                                                             # every document has ended
    return [bytes(row[1:]).decode(errors="replace").partition("\n")[0] + "\n" for row in ids.tolist()]


def parses(document: str) -> bool:
    return any(ml.data.World().readings(document))


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--samples", type=int, default=1000)
    samples = arguments.parse_args().samples
    model, world = ml.load_base(), ml.data.world()
    windows = world.held_out(model.config.context + 1)
    loss, floor = ml.held_out_loss(model, windows), world.floor(windows)
    print(f"held-out loss {loss:.4f} nats per byte, floor {floor:.4f}, above it {loss - floor:.4f}")
    documents = [document for seed in range(samples // 100) for document in sample_documents(model, 100, seed)]
    print(f"{sum(map(parses, documents))} of {len(documents)} sampled documents parse, for example {documents[0]!r}")
