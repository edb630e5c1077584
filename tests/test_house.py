"""The house: arrows between the package's rooms point one way, its command line is small, and nothing in it knows lessons or notebooks."""

import ast
from pathlib import Path

import pytest

import minilora

PACKAGE = Path(minilora.__file__).parent
FLOORS = [{"safety.encodings", "safety.beside", "safety.conv1d"}, {"safety.targets"}, {"checks", "gpt", "data", "plots", "safety.watch", "safety.memory"}, {"adapter"}, {"quant"}, {"methods"}, {"formats"},
          {"safety.configuration"}, {"storage"}, {"safety.runs", "safety.recompute"}, {"training"}, {"evidence"}, {"scale"}, {"commands"}, {"__main__"}]      # each file of safety has a floor of its own
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def room(dotted: str) -> str:
    """minilora.methods.lora -> methods; of the wing `safety` each file is a room of its own."""
    parts = dotted.removeprefix("minilora.").split(".")
    return ".".join(parts[:2]) if parts[0] == "safety" else parts[0]


def imports(file: Path) -> set[str]:
    """The rooms that a file imports from, wherever in it. `import minilora` is the whole package: only commands may say so."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module in ("minilora", "minilora.safety"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names if not alias.name.startswith("__")}          # not __version__
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {room(name) for name in found if name.split(".")[0] in {"minilora", "lessons", "notebooks"}}


FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if file not in (PACKAGE / "__init__.py", PACKAGE / "safety" / "__init__.py")]


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(PACKAGE)) for file in FILES])
def test_arrows_point_one_way(file):
    here = room(".".join(file.relative_to(PACKAGE).with_suffix("").parts))
    for there in imports(file) - {here}:
        if there == "minilora":
            assert here == "commands", f"{file.name} imports the whole package"
        else:
            assert FLOOR.get(there, len(FLOORS)) < FLOOR[here], f"{file.name} ({here}) imports {there}: the arrow points upwards"


def test_the_command_line_is_small():
    lines = {file.name: len(file.read_text(encoding="utf-8").splitlines()) for file in (PACKAGE / "commands").glob("*.py")}
    assert len((PACKAGE / "__main__.py").read_text(encoding="utf-8").splitlines()) < 60 and max(lines.values()) <= 200, lines
