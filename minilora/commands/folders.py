"""Where results go: folders that are made, claimed by one run at a time, and left as they were found."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minilora.safety.runs import alone


@contextmanager
def room(out: Path) -> Iterator[None]:
    """A folder that takes files, and no other run's while the block lasts. Where nothing is written, no new folder stays."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; --out takes a folder")
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=out).close()
        except OSError as error:
            raise ValueError(f"{out}: cannot write there ({error.strerror})") from None
        with alone(out):
            yield
    finally:
        for folder in made:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
