"""Runs the study: executes the notebooks in order and keeps each executed copy, with the figures beside it.

python notebooks/study.py             writes to study-output/; committed notebooks and figures stay as they are
python notebooks/study.py 03          runs only the notebooks whose names start so
python notebooks/study.py --again     measures again what this GPU has measured before
python notebooks/study.py --update    writes over the committed notebooks and figures, and README's results
python notebooks/study.py --readme    runs nothing, only fills README's results from the recorded tables
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
README = REPOSITORY / "README.md"
MARKS = "<!-- results: filled by notebooks/study.py --readme -->", "<!-- end of results -->"


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
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        cell.outputs, cell.execution_count = [], None
    try:
        with client.setup_kernel():
            for index, cell in enumerate(tqdm(notebook.cells, desc=path.stem, unit="cell")):
                client.execute_cell(cell, index)
    except BaseException:
        destination = OUTPUT / path.name  # never over a committed notebook
        raise
    finally:
        for cell in code:  # what a progress bar leaves behind is no output
            cell.outputs = [output for output in cell.outputs if output.get("text", "none").strip()]
        partial = destination.with_suffix(".partial")  # so that a full disk takes nothing
        try:
            nbformat.write(notebook, partial)
            partial.replace(destination)
        finally:
            partial.unlink(missing_ok=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="what the names of the notebooks to run start with")
    parser.add_argument("--again", action="store_true", help="measure again what this GPU has measured before")
    parser.add_argument("--update", action="store_true", help="write over what is committed")
    parser.add_argument("--readme", action="store_true", help="only fill README's results from the recorded tables")
    options = parser.parse_args()
    paths = [p for p in sorted(NOTEBOOKS.glob("*.ipynb")) if p.name.startswith(tuple(options.names or [""]))]
    if not paths:
        parser.error(f"no notebook's name starts with {' or '.join(options.names)}")
    committed = NOTEBOOKS, REPOSITORY / "figures"
    copies, figures = committed if options.update or options.readme else (OUTPUT, OUTPUT / "figures")
    os.environ["OMNI_FIGURES"] = str(figures)  # the notebooks' kernels inherit it
    if options.readme:
        return fill_readme()
    if options.again:
        os.environ["OMNI_AGAIN"] = "1"
    failed = 0
    for path in paths:
        try:
            OUTPUT.mkdir(exist_ok=True)
            execute(path, copies / path.name)
        except (nbclient.exceptions.CellExecutionError, nbclient.exceptions.DeadKernelError) as error:
            failed += 1  # and the others run
            print(
                f"{error}\n{path.name} failed in the cell above; what ran is in {OUTPUT / path.name}", file=sys.stderr
            )
        except OSError as error:
            sys.exit(f"{path.name} could not be kept: {error}")
        except KeyboardInterrupt:
            logging.disable()  # nothing more about the cell that was cut short
            sys.exit(f"\nStopped in {path.name}; what ran is in {OUTPUT / path.name}")
    if options.update:
        fill_readme()
    print(f"The executed notebooks are in {copies}, their figures in {figures}")
    sys.exit(failed)


def fill_readme():
    README.write_text(with_results(README.read_text()))


def with_results(text):
    """README's text with the results in their place: for every GPU what omni_router takes in each case, what it takes
    inside its layer, what a call of it costs the host, and what came of the guide's expectations."""
    import calls  # here, since these read where the tables are when they are imported
    import layer_study
    import speed_study

    before, rest = text.split(MARKS[0])
    results = (
        speed_study.told("targets", speed_study.targets_table),
        speed_study.told("layer", layer_study.layer_table),
        speed_study.told("calls", calls.ratios_table),
        speed_study.told("guide", speed_study.guide_table),
    )
    results = [text for text in results if text != speed_study.NO_RESULTS] or [speed_study.NO_RESULTS]
    return "\n\n".join([before + MARKS[0], *results, MARKS[1] + rest.split(MARKS[1])[1]])


if __name__ == "__main__":
    main()
