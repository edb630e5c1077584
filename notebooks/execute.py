"""Run notebooks from top to bottom and save them with their outputs: python notebooks/execute.py [NAME ...]

Warnings (stderr) are left out: they name folders of the machine that made them. So is what a run writes about itself (times, versions).
"""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def execute(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    began = time.monotonic()
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}, record_timing=False).execute()
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                         "language_info": {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"}}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.validate(notebook)
    nbformat.write(notebook, path)
    print(f"{path.name}: {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    names = sys.argv[1:] or sorted(path.stem for path in HERE.glob("[0-9]*.ipynb"))
    for name in names:
        execute(HERE / f"{Path(name).stem}.ipynb")
