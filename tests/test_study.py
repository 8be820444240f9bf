"""The study keeps what it records whatever happens meanwhile, and notebooks stay as they are when they are opened."""

import ast
import concurrent.futures
import contextlib
import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest
import triton

pytest.importorskip("seaborn")
pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
NOTEBOOKS = pathlib.Path(__file__).parents[1] / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))
compiling, configurations, faults, files, notebooks, pictures, tables = (
    importlib.import_module(f"study.{name}")
    for name in ("compiling", "configurations", "faults", "files", "notebooks", "pictures", "tables")
)

PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
MODULES = sorted((NOTEBOOKS / "study").glob("*.py"))
NO_FOLDER = pathlib.Path("/dev/null/folder")  # that nobody can make, not even root
FULL = OSError(28, "No space left on device")
SETTING = {"gpu": "A GPU", "torch": "2.0", "triton": "3.0", "commit": "abc", "date": "2030-01-02"}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Where the table `speed` of a GPU is kept, in a folder of its own."""
    for name in ("DATA", "RECORDED"):
        monkeypatch.setattr(tables, name, tmp_path)
    monkeypatch.setattr(tables, "setting", lambda: SETTING)
    return tmp_path / "a-gpu" / "speed.csv"


# Notebooks and modules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_opening_a_notebook_does_not_change_it(path):
    """It has what JupyterLab would write: its kernel's name as ipykernel gives it, and nothing of a run but outputs."""
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    assert nbformat.writes(notebook) + "\n" == text
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}
        assert set(cell.metadata.get("tags", ())) <= {"nbval-ignore-output", "nbval-skip", "raises-exception"}
        assert "NBVAL_" not in cell.source  # tags say it


def test_the_study_is_one_package_of_short_modules():
    modules = {path.relative_to(NOTEBOOKS).parts[0] for path in NOTEBOOKS.rglob("*.py")}
    assert modules <= {"study", "ladder"}
    assert [path.name for path in MODULES if len(path.read_text(encoding="utf-8").splitlines()) > 400] == []


def imports_of(tree):
    """The modules that are imported anywhere in it; those of the package by their names in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from [node.module.split(".")[0]] if node.module else (alias.name for alias in node.names)


def test_what_measures_does_not_draw():
    imports = {path.stem: set(imports_of(ast.parse(path.read_text(encoding="utf-8")))) for path in MODULES}
    draws = {name for name, found in imports.items() if {"matplotlib", "seaborn"} & found} - {"__main__"}
    measures = {path.stem for path in MODULES if "tables.append(" in path.read_text(encoding="utf-8")} | {"autotune"}
    assert {"speed", "training", "first_calls"} < measures
    assert {"speed_report", "pictures"} < draws
    reached = set(measures)
    while reached != (more := reached.union(*(imports[name] & imports.keys() for name in reached))):
        reached = more
    assert reached & draws == set()


def opens_text(call):
    """Whether a call reads or writes text, of a file or of another process."""
    function, arguments = ast.unparse(call.func), [ast.unparse(part) for part in [*call.args, *call.keywords]]
    if function.endswith(".open") or function == "open":
        return function != "os.open" and not any(part in ("'rb'", "'wb'") for part in arguments)
    return function.endswith((".read_text", ".write_text", ".to_csv")) or "text=True" in arguments


def test_every_file_is_read_and_written_as_utf_8():
    sources = [path.read_text(encoding="utf-8") for path in MODULES]
    for path in PATHS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources += ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    calls = [ast.unparse(node) for node in nodes if isinstance(node, ast.Call) and opens_text(node)]
    assert len(calls) > 5
    assert [call for call in calls if "encoding='utf-8'" not in call] == []


def test_what_a_progress_bar_leaves_is_no_output(tmp_path, monkeypatch):
    new = nbformat.v4
    printed, cleared = (new.new_output("stream", text=text) for text in ("found\n", "\r   \r"))
    data = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "compiling: 0%"}
    left = [printed, cleared, new.new_output("display_data", data), new.new_output("display_data", {"text/plain": "1"})]
    nbformat.write(new.new_notebook(cells=[new.new_code_cell("1")]), tmp_path / "source.ipynb")
    client = notebooks.nbclient.NotebookClient
    monkeypatch.setattr(client, "setup_kernel", lambda self: contextlib.nullcontext())
    monkeypatch.setattr(client, "execute_cell", lambda self, cell, index: cell.update(outputs=left))
    notebooks.execute(tmp_path / "source.ipynb", tmp_path / "executed.ipynb")
    (cell,) = nbformat.read(tmp_path / "executed.ipynb", as_version=4).cells
    assert cell.outputs == [left[0], left[3]]


# Triton's cache -------------------------------------------------------------------------------------------------------


def test_an_unusable_cache_stops_the_study_in_one_line(tmp_path):
    environment = os.environ | {"OMNI_FIGURES": str(tmp_path / "figures"), "TRITON_CACHE_DIR": str(NO_FOLDER)}
    command = [sys.executable, NOTEBOOKS / "study", "--compile"]
    run = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert (run.returncode, run.stdout) == (1, "")
    (line,) = run.stderr.splitlines()
    assert "Triton's cache cannot be written to: Not a directory" in line and line.endswith(f"'{NO_FOLDER}'")
    assert not (tmp_path / "figures").exists()


def test_a_cache_that_becomes_unusable_is_no_result_of_a_configuration(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(NO_FOLDER))
    problem = configurations.COMPILED_PROBLEMS[0]
    job = problem, configurations.every_config(problem.kernel)[0], compiling.TARGETS["cuda:sm90"]
    with pytest.raises(NotADirectoryError, match="Triton's cache cannot be written to"):
        list(compiling.compile_jobs([job]))


def raising(error, cause=None):
    def function():
        raise error from cause

    return function


def test_a_fault_of_the_machine_is_no_row(monkeypatch):
    monkeypatch.setattr(faults.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(faults, "check_cache", lambda: None)
    for function in (raising(FULL), raising(RuntimeError("no kernel"), cause=FULL)):
        with pytest.raises(OSError, match="No space left"):
            faults.attempt(function)
    assert faults.attempt(raising(OSError("libx.so: cannot open"))) == {"error": "OSError: libx.so: cannot open"}
    assert faults.attempt(raising(ValueError("too many"))) == {"error": "ValueError: too many"}

    monkeypatch.setattr(faults, "interpreting", lambda: False)
    monkeypatch.setattr(faults, "check_cache", raising(FULL))
    with pytest.raises(OSError, match="No space left"):
        faults.attempt(raising(ValueError("ptxas failed, for reasons that it does not tell")))


def test_a_notebook_that_fails_keeps_no_other_from_running_but_for_a_full_cache(tmp_path, monkeypatch, capsys):
    failed = raising(notebooks.nbclient.exceptions.DeadKernelError("no more"))
    monkeypatch.setattr(notebooks, "output_folder", lambda: tmp_path)
    monkeypatch.setattr(notebooks, "execute", lambda path, _: failed() if path.stem == "a" else None)
    monkeypatch.setattr(notebooks, "check_cache", lambda: None)
    paths = [tmp_path / "a.ipynb", tmp_path / "b.ipynb"]
    assert notebooks.execute_all(paths, tmp_path) == 1
    assert "a.ipynb failed in the cell above" in capsys.readouterr().err
    monkeypatch.setattr(notebooks, "check_cache", raising(FULL))
    with pytest.raises(OSError, match="No space left"):
        notebooks.execute_all(paths, tmp_path)


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_full_disk_takes_no_figure(tmp_path, monkeypatch):
    def fail(path, **_):
        path.write_text("half of a", encoding="utf-8")
        raise FULL

    monkeypatch.setattr(pictures, "FIGURES", tmp_path)
    monkeypatch.setattr(pictures.plt, "show", lambda: None)
    figure = pictures.plt.figure()
    pictures.save_figure(figure, "one")
    before = (tmp_path / "one.png").read_bytes()
    assert before.startswith(b"\x89PNG")
    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*one\.png'"):
        pictures.save_figure(figure, "one")
    pictures.plt.close(figure)
    assert (tmp_path / "one.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["one.png"]


def test_writers_of_one_table_lose_no_rows(table):
    """In threads; a lock of one process looks the same to another."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: tables.append("speed", [{"rival": number}]), range(40)))
    assert sorted(tables.read("speed").rival) == list(range(40))
    assert [path.name for path in table.parent.iterdir()] == ["speed.csv"]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda text: b"", "empty"),
        (lambda text: text[:-3], "cut"),
        (lambda text: text[: text.rindex(b",2.0")] + b"\n", "row of the table is cut"),
        (lambda text: text.replace(b"gpu", b"cpu"), "no table"),
        (lambda text: text.replace(b"second", b"s,e,c"), "no table"),
        (lambda text: text.replace(b"second", b"\xff"), "no table"),
    ],
    ids=["empty", "cut", "cut row", "other columns", "more fields", "not UTF-8"],
)
def test_a_broken_table_is_named(table, fault, said):
    tables.append("speed", [{"rival": "first"}, {"rival": "second²"}])
    assert tables.read("speed").rival.tolist() == ["first", "second²"]
    broken = fault(table.read_bytes())
    table.write_bytes(broken)
    for call in (lambda: tables.read("speed"), lambda: tables.append("speed", [{"rival": "third"}])):
        with pytest.raises(OSError, match=rf"{said}.*speed\.csv"):
            call()
    assert table.read_bytes() == broken


def test_a_checkout_that_cannot_be_written_to_has_its_figures_elsewhere(monkeypatch, capsys):
    assert files.can_be_written(pathlib.Path("/tmp/one/two")) and not files.can_be_written(NO_FOLDER)
    monkeypatch.setattr(files, "OWN_OUTPUT", NO_FOLDER)
    found = files.output_folder.__wrapped__()
    assert files.can_be_written(found)
    monkeypatch.setattr(files, "FIGURES", found / "figures")
    files.say_where.__wrapped__()
    assert capsys.readouterr().out == f"{NO_FOLDER} cannot be written to. Figures go to {found / 'figures'}\n"
    found.rmdir()


def test_torch_compile_changes_no_assembler():
    """PyTorch names its own only where none is named."""
    code = "import os, study; print(os.environ['TRITON_PTXAS_PATH'])"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_PTXAS_PATH"}
    for named in ({}, {"TRITON_PTXAS_PATH": "another"}):
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment | named | {"PYTHONPATH": str(NOTEBOOKS)},
            capture_output=True, encoding="utf-8", check=True,
        )  # fmt: skip
        own = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
        assert run.stdout.strip() == named.get("TRITON_PTXAS_PATH", str(own))


def test_nothing_is_kept_in_a_home_that_cannot_be_written_to():
    code = (
        "import os, study; print(*{os.path.isdir(os.environ[name]) for name in ('MPLCONFIGDIR', 'TRITON_CACHE_DIR')})"
    )
    unset = {name: value for name, value in os.environ.items() if name not in ("MPLCONFIGDIR", "TRITON_CACHE_DIR")}
    environment = unset | {"HOME": str(NO_FOLDER), "PYTHONPATH": str(NOTEBOOKS)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, encoding="utf-8")
    assert (run.stdout, run.stderr) == ("True\n", "")
    run = subprocess.run(
        [sys.executable, "-c", "import os, study; print('TRITON_CACHE_DIR' in os.environ)"],
        env=unset | {"PYTHONPATH": str(NOTEBOOKS)}, capture_output=True, encoding="utf-8",
    )  # fmt: skip
    assert (run.stdout, run.stderr) == ("False\n", "")


def test_jupyterlab_opens_copies_and_keeps_those_that_were_changed(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(notebooks, "output_folder", lambda: tmp_path)
    monkeypatch.setattr(notebooks.os, "execve", lambda *arguments: opened.append(arguments))
    monkeypatch.setattr(notebooks.os, "geteuid", lambda: 0)
    copy = tmp_path / "lab" / PATHS[0].name
    notebooks.open_lab()
    assert {path.name: path.read_bytes() for path in copy.parent.iterdir()} == {p.name: p.read_bytes() for p in PATHS}
    copy.write_text("changed", encoding="utf-8")
    monkeypatch.setattr(notebooks.os, "geteuid", lambda: 1000)
    notebooks.open_lab()
    assert copy.read_text(encoding="utf-8") == "changed"
    (_, as_root, environment), (_, as_user, _) = opened
    assert as_user == [sys.executable, "-m", "jupyterlab", str(copy.parent)]
    assert as_root == [*as_user, "--allow-root"]
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(NOTEBOOKS)
