"""Runs the study: executes the notebooks in order and keeps each executed copy, with the figures beside it.

python notebooks/study               writes to study-output/; committed notebooks and figures stay as they are
python notebooks/study 03            runs only the notebooks whose names start so
python notebooks/study --again       measures again what this GPU has measured before
python notebooks/study --update      writes over the committed notebooks and figures, and README's results
python notebooks/study --readme      runs nothing, only fills README's results from the recorded tables
python notebooks/study --draw        runs nothing, only draws all figures from the recorded tables; needs no GPU
python notebooks/study --lab         opens JupyterLab on copies of the notebooks, in study-output/lab/

Or measures a part of it, alone. Rows go to study-output/figures/data, with --update to figures/data.

python notebooks/study --autotune    times what is not yet timed on this GPU, for five minutes at most
python notebooks/study --verify      times again, and prints how well the recorded order is reproduced
python notebooks/study --compile     asks the compiler alone, for every architecture; needs no GPU
python notebooks/study --calls       times calls from Python
python notebooks/study --profile     asks Nsight Compute (ncu) where the cycles of every rung go
python notebooks/study --cpu         times calls on this CPU; leave it alone meanwhile
python notebooks/study --many-gpus   measures two GPUs, and prints what became of the targets
"""

import argparse
import os
import pathlib
import sys

NOTEBOOKS = pathlib.Path(__file__).resolve().parents[1]
sys.path[0] = str(NOTEBOOKS)  # which is the package's own folder where that is run


def execute(options):
    from study import files, notebooks

    paths = [p for p in sorted(NOTEBOOKS.glob("*.ipynb")) if p.name.startswith(tuple(options.names or [""]))]
    if not paths:
        sys.exit(f"no notebook's name starts with {' or '.join(options.names)}")
    copies = NOTEBOOKS if options.update else files.output_folder()
    os.environ["OMNI_FIGURES"] = str(files.FIGURES)  # the notebooks' kernels inherit it
    failed = notebooks.execute_all(paths, copies)
    if options.update:
        fill_readme(options)
        draw(options)
    print(f"The executed notebooks are in {copies}, their figures in {files.FIGURES}")
    sys.exit(failed)


def fill_readme(_):
    from study import readme

    readme.fill()


def draw(_):
    os.environ.update(CUDA_VISIBLE_DEVICES="", MPLBACKEND="agg")  # the same pictures on every machine
    from study import drawing, files

    drawing.draw_all()
    print(f"The figures are in {files.FIGURES}")


def open_lab(_):
    from study import notebooks

    notebooks.open_lab()


def time_configurations(options):
    import matplotlib.pyplot as plt

    from study import autotune, autotune_pictures, files

    autotune.run_study(options.minutes)
    plt.switch_backend("agg")
    autotune_pictures.draw_here()
    print(f"The figures are in {files.FIGURES}")


def time_configurations_again(options):
    from study import autotune

    autotune.verify(options.minutes)


def compile_configurations(_):
    from study import compiling

    compiling.compile_table()


def measure_calls(options):
    from study import calls

    tell(calls.measure(options.again))


def profile(_):
    from study import profiling

    tell(profiling.measure())


def measure_cpu(options):
    from study import cpu

    tell(cpu.measure(options.again))


def measure_many_gpus(options):
    from study import many_gpus, many_gpus_report, tables

    tell(many_gpus.measure(options.again))
    print(many_gpus_report.targets_table(tables.of_setting("many_gpus")))


def tell(done):
    if done.startswith("not measured"):
        sys.exit(done)
    print(done)


TASKS = {
    "readme": fill_readme,
    "draw": draw,
    "lab": open_lab,
    "autotune": time_configurations,
    "verify": time_configurations_again,
    "compile": compile_configurations,
    "calls": measure_calls,
    "profile": profile,
    "cpu": measure_cpu,
    "many-gpus": measure_many_gpus,
}


def check_cache():
    import triton

    os.environ["TRITON_CACHE_DIR"] = triton.knobs.cache.dir  # no temporary folder takes its place
    from study import faults

    faults.check_cache()


def main():
    parser = argparse.ArgumentParser(
        "python notebooks/study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="what the names of the notebooks to run start with")
    parser.add_argument("--again", action="store_true", help="measure again what this GPU has measured before")
    parser.add_argument("--update", action="store_true", help="write over what is committed")
    parser.add_argument("--minutes", type=float, default=5, help="that --autotune takes, at most (%(default)s)")
    other = parser.add_mutually_exclusive_group()
    for name, task in TASKS.items():
        other.add_argument(f"--{name}", dest="task", action="store_const", const=task, default=execute)
    options = parser.parse_args()
    if options.update or options.task is fill_readme:
        os.environ["OMNI_FIGURES"] = str(NOTEBOOKS.parent / "figures")
    if options.again:
        os.environ["OMNI_AGAIN"] = "1"
    try:
        if options.task not in (fill_readme, draw, open_lab):
            check_cache()
        options.task(options)
    except KeyboardInterrupt:
        sys.exit("\nStopped; what was measured before is kept.")
    except (OSError, RuntimeError) as error:
        sys.exit(f"Stopped; what was recorded is kept. {error}")


if __name__ == "__main__":
    main()
