"""Where results go: folders that are made, claimed and left as they were found."""

import tempfile
from pathlib import Path


def refuse_file(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; --out takes a folder")


def room(out: Path) -> list[Path]:
    """Make sure that the folder is there and takes files. Returns the folders that had to be made."""
    refuse_file(out)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        for folder in filter(Path.exists, made):
            folder.rmdir()
        raise ValueError(f"{out}: cannot write there ({error.strerror})") from None
    return made
