"""The house: arrows between the package's rooms point one way, its command line is small, and nothing in it knows lessons or notebooks."""

import ast
from pathlib import Path

import pytest

import minilora

PACKAGE = Path(minilora.__file__).parent
FLOORS = [{"encodings"}, {"checks", "gpt", "data", "plots", "beside", "targets"}, {"watch"}, {"adapter"}, {"quant"}, {"methods"}, {"formats"}, {"configuration"}, {"storage"}, {"runs"},
          {"training"}, {"evidence"}, {"commands"}, {"__main__"}]
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> set[str]:
    """The rooms that a file imports from, wherever in it. `import minilora` is the whole package: only commands may say so."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "minilora":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.removeprefix("minilora.").split(".")[0] for name in found if name.split(".")[0] in {"minilora", "lessons", "notebooks", *FLOOR}}


FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if file != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(PACKAGE)) for file in FILES])
def test_arrows_point_one_way(file):
    here = room(file)
    for there in imports(file) - {here}:
        if there == "minilora":
            assert here == "commands", f"{file.name} imports the whole package"
        else:
            assert FLOOR.get(there, len(FLOORS)) < FLOOR[here], f"{file.name} ({here}) imports {there}: the arrow points upwards"


def test_the_command_line_is_small():
    lines = {file.name: len(file.read_text(encoding="utf-8").splitlines()) for file in (PACKAGE / "commands").glob("*.py")}
    assert len((PACKAGE / "__main__.py").read_text(encoding="utf-8").splitlines()) < 60 and max(lines.values()) <= 200, lines
