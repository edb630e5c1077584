"""Memory that has run out: torch says so in as many ways as it has devices, and at length. Here it is one line, a MemoryError."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

RAN_OUT = re.compile(r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED")         # CUDA and MPS · Linux · Windows · cuBLAS
SIZE = re.compile(r"tried to allocate ([\d.,]+ \w+)", re.IGNORECASE)


def ran_out(error: BaseException) -> str:
    """The line; "" where the error is another one."""
    if isinstance(error, MemoryError):
        return str(error) or "out of memory"
    if not isinstance(error, RuntimeError) or not RAN_OUT.search(str(error)):
        return ""
    size = SIZE.search(str(error))
    return f"out of memory: no room for {size[1]} more" if size else "out of memory"


@contextmanager
def told(what_needs_less: str = "") -> Iterator[None]:
    """Around a command. Raises MemoryError where memory runs out inside, and says what would need less of it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        raise MemoryError(f"{ran_out(error)}{what_needs_less}") from None
