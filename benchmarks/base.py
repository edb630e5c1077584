"""How good the shipped base is: held-out loss beside the floor, and how many sentences of its sampled documents parse.

    python benchmarks/base.py [--documents 1000]     (in hundreds)
"""

import argparse
import re

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


def sentences(document: str) -> list[bool]:
    """Of each sentence, whether the grammar can say it after what came before; up to and including the first that it cannot."""
    judged, so_far = [], ""
    for sentence in re.findall(r".*?[.?]\s|.+\n?", document, flags=re.S):
        so_far += sentence
        judged.append(any(ml.data.World().readings(so_far)))
        if not judged[-1]:
            break
    return judged


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--documents", type=int, default=1000)
    count = arguments.parse_args().documents
    model, world = ml.load_base(), ml.data.world()
    windows = world.held_out(model.config.context + 1)
    loss, floor = ml.held_out_loss(model, windows), world.floor(windows)
    print(f"held-out loss {loss:.4f} nats per byte, floor {floor:.4f}, above it {loss - floor:.4f}")
    documents = [document for seed in range(count // 100) for document in sample_documents(model, 100, seed)]
    judged = [sentences(document) for document in documents]
    told, right = sum(map(len, judged)), sum(map(sum, judged))
    print(f"{right} of {told} sampled sentences parse ({right / told:.1%}); {sum(map(all, judged))} of {len(documents)} whole documents do")
    print(f"for example {documents[0]!r}")
