"""What the doctor writes down. A finding is true of what was looked at, and carries the number that shows it.

    B is zero         all 24 layers: the adapter changes nothing. …
    name              evidence, with its number                and what to do
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

INDENT = "  "
WIDTH = 155 - len(INDENT)      # of what stands behind it on a line


@dataclass(frozen=True)
class Finding:
    """name: of the confusion; evidence: what shows it, with a number; fix: what to do about it."""

    name: str
    evidence: str
    fix: str

    def __str__(self) -> str:
        line = f"{self.name:<17} {self.evidence}. {self.fix}"
        return line if len(line) <= WIDTH else line[:WIDTH - 1] + "…"


@dataclass
class Report:
    """seen: what was looked at; findings; notes: what is worth knowing and nothing to mend. Printed, or shown by a notebook, it is a few lines."""

    seen: str
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def __bool__(self) -> bool:
        return bool(self.findings)

    def __str__(self) -> str:
        found = [f"{INDENT}{finding}" for finding in self.findings] or [f"{INDENT}nothing found"]
        return "\n".join([self.seen, *(f"{INDENT}{note}" for note in self.notes), *found])

    __repr__ = __str__


def count(n: int, of: int, what: str) -> str:
    """"all 24 layers", "3 of 24 layers"."""
    return f"all {of} {what}" if n == of and n > 1 else f"{n} of {of} {what}"


def short(name: str, most: int = 44) -> str:
    """The end of a long name: its beginning is what all have in common."""
    return name if len(name) <= most else "…" + name[1 - most:].lstrip(".")
