"""Runs the study: executes the notebooks in order and keeps each executed copy, with the figures beside it.

python notebooks/study.py             writes to study-output/; committed notebooks and figures stay as they are
python notebooks/study.py --update    writes over the committed notebooks and figures
"""

import argparse
import logging
import os
import pathlib
import sys

import nbclient
import nbformat
from tqdm import tqdm

NOTEBOOKS = pathlib.Path(__file__).resolve().parent
REPOSITORY = NOTEBOOKS.parent
OUTPUT = REPOSITORY / "study-output"


def execute(path, destination):
    """Executes a notebook in its own folder, showing progress; what was executed is written even if a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(NOTEBOOKS)}},
        record_timing=False,
        shutdown_kernel="immediate",
        coalesce_streams=True,
    )
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    try:
        with client.setup_kernel():
            for index, cell in enumerate(tqdm(notebook.cells, desc=path.stem, unit="cell")):
                client.execute_cell(cell, index)
    except BaseException:
        destination = OUTPUT / path.name  # never over a committed notebook
        raise
    finally:
        nbformat.write(notebook, destination)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write over the committed notebooks and figures")
    update = parser.parse_args().update
    copies, figures = (NOTEBOOKS, REPOSITORY / "figures") if update else (OUTPUT, OUTPUT / "figures")
    os.environ["OMNI_FIGURES"] = str(figures)  # the notebooks' kernels inherit it
    OUTPUT.mkdir(exist_ok=True)
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        try:
            execute(path, copies / path.name)
        except nbclient.exceptions.CellExecutionError as error:
            sys.exit(f"{error}\n{path.name} failed in the cell above; what ran is in {OUTPUT / path.name}")
        except KeyboardInterrupt:
            logging.disable()  # nothing more about the cell that was cut short
            sys.exit(f"\nStopped in {path.name}; what ran is in {OUTPUT / path.name}")
    print(f"The executed notebooks are in {copies}, their figures in {figures}")


if __name__ == "__main__":
    main()
