"""Executes the notebooks, and opens copies of them in JupyterLab."""

import logging
import os
import shutil
import sys

import nbclient
import nbformat

from .faults import check_cache
from .files import NOTEBOOKS, output_folder, replacing
from .progress import tqdm


def execute(path, destination):
    """Executes a notebook in its own folder, showing progress. What was executed is written even if a cell fails, then
    to the output folder."""
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
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        cell.outputs, cell.execution_count = [], None
    try:
        with client.setup_kernel():
            for index, cell in enumerate(tqdm(notebook.cells, desc=path.stem, unit="cell")):
                client.execute_cell(cell, index)
    except BaseException:
        destination = output_folder() / path.name  # never over a committed notebook
        raise
    finally:
        for cell in code:
            cell.outputs = [output for output in cell.outputs if not of_progress(output)]
        with replacing(destination) as partial:
            nbformat.write(notebook, partial)


def of_progress(output):
    """Whether an output is what a progress bar leaves behind: a widget, or a line that was cleared."""
    return (
        "application/vnd.jupyter.widget-view+json" in output.get("data", ()) or not output.get("text", "none").strip()
    )


def execute_all(paths, folder):
    """Executes notebooks one after the other, and keeps them in a folder. One that fails keeps no other from it.

    Returns:
        How many failed.

    Raises:
        OSError: what was executed cannot be kept, or Triton's cache cannot be written to.
    """
    failed, output = 0, output_folder()
    output.mkdir(exist_ok=True)
    for path in paths:
        try:
            execute(path, folder / path.name)
        except (nbclient.exceptions.CellExecutionError, nbclient.exceptions.DeadKernelError) as error:
            check_cache()  # which says it in one line
            failed += 1
            print(
                f"{error}\n{path.name} failed in the cell above; what ran is in {output / path.name}", file=sys.stderr
            )
        except KeyboardInterrupt:
            logging.disable()  # nothing more about the cell that was cut short
            sys.exit(f"\nStopped in {path.name}; what ran is in {output / path.name}")
    return failed


def open_lab():
    """Opens JupyterLab, in place of this process, on copies of the notebooks. Those that are there stay as they are."""
    folder = output_folder() / "lab"
    folder.mkdir(parents=True, exist_ok=True)
    for path in NOTEBOOKS.glob("*.ipynb"):
        if not (folder / path.name).exists():
            with replacing(folder / path.name) as partial:
                shutil.copyfile(path, partial)
    print(f"JupyterLab opens copies, in {folder}. Copies that were there before are as they were left.", flush=True)
    paths = [str(NOTEBOOKS), *filter(None, [os.environ.get("PYTHONPATH")])]  # where the copies find what they import
    command = [sys.executable, "-m", "jupyterlab", str(folder), *["--allow-root"] * (os.geteuid() == 0)]
    os.execve(sys.executable, command, os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
