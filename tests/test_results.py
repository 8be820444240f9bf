"""README's results are those of the recorded tables, and what the tables and their arithmetic say is right."""

import contextlib
import importlib
import pathlib
import sys

import pytest
import torch
from cases import run_python
from conftest import DEVICE

from omni_kernels import brute_force_router, factored_router

pytest.importorskip("seaborn")
pd = pytest.importorskip("pandas")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "notebooks"))
speed, tables, timing = (importlib.import_module(name) for name in ("speed_study", "tables", "timing"))

MAIN, SMALL = speed.MAIN, speed.Case(7, 8, 4, "fp32")
LIMITS = {"bandwidth_gbs": 3000.0, "empty_us": 1.5}


@pytest.fixture
def no_tables(tmp_path, monkeypatch):
    """Tables are written to and read from an empty folder."""
    monkeypatch.setattr(tables, "DATA", tmp_path)
    monkeypatch.setattr(tables, "RECORDED", tmp_path)


@pytest.fixture
def recorded_tables(monkeypatch):
    """Only the committed tables are read."""
    monkeypatch.setattr(tables, "DATA", tables.RECORDED)


def add_run(monkeypatch, gpu, source, table, *rows):
    run = {"gpu": gpu, "torch": "2.0", "triton": "3.0", "source": source, "commit": "abc", "date": "2030-01-02"}
    monkeypatch.setattr(tables, "setting", lambda: run)
    tables.append(table, rows)


def row(case, rival, us, **more):
    limits = {"floor_us": speed.floor_us(case, 3000.0), **LIMITS}
    return {"rival": rival, **case._asdict(), "us": us, "check": "equal", "error": None, **limits, **more}


def test_readme_holds_the_recorded_results(recorded_tables):
    text = speed.README.read_text()
    assert speed.with_results(text) == text, "run notebooks/study.py --readme"


@pytest.mark.parametrize("table", speed.TIMED)
def test_recorded_rows_are_sound(table, recorded_tables):
    wrong = []
    for found in speed.latest(table).itertuples():
        floor = speed.floor_us(speed.Case(*(getattr(found, size) for size in speed.CASE)), found.bandwidth_gbs)
        if found.rival == speed.OMNI:
            sound = found.check == "equal"
        else:
            sound = found.check in ("equal", "ties", "inexact") or isinstance(found.error, str)
        if not sound or abs(found.floor_us / floor - 1) > 1e-6:
            wrong.append(found)
    assert wrong == []


def test_the_floor_is_the_bytes_over_the_bandwidth():
    assert speed.num_bytes(MAIN) == 65536 * (2 * 256 * 2 + 16 * (2 + 4))
    assert speed.num_bytes(MAIN._replace(dtype="fp32")) == 65536 * (2 * 256 * 4 + 16 * (4 + 4))
    assert speed.floor_us(MAIN, 3004) == pytest.approx(24.43, abs=0.01)


def test_what_each_family_looks_at():
    looked_at = {name: speed.examined(name, 256, 16) for name in (speed.ORIGINAL, speed.FACTORED, speed.OMNI)}
    assert looked_at == {speed.ORIGINAL: 65536, speed.FACTORED: 512 + 256, speed.OMNI: 512 + 50}
    assert speed.examined(speed.OMNI, 2, 3) == 4 + 3  # ranks that a factor of two does not have are no candidates


def test_readme_without_a_table(no_tables):
    filled = speed.with_results(f"before\n{speed.MARKS[0]}\nold\n{speed.MARKS[1]}\nafter\n")
    assert filled == f"before\n{speed.MARKS[0]}\n\n{speed.NO_RESULTS}\n\n{speed.MARKS[1]}\nafter\n"


def test_results_are_of_the_last_run_of_each_gpu_h100_first(no_tables, monkeypatch):
    add_run(monkeypatch, "A GPU", "new", "targets", row(MAIN, speed.OMNI, 500.0), row(MAIN, speed.QUACK, 1500.0))
    add_run(monkeypatch, "An H100", "old", "targets", row(SMALL, speed.OMNI, 1.0))
    add_run(monkeypatch, "An H100", "new", "targets", row(MAIN, speed.OMNI, 99.0))
    failed = row(MAIN, speed.FACTORED, None, check=None, error="OutOfMemoryError")
    add_run(
        monkeypatch, "An H100", "new", "targets", row(MAIN, speed.OMNI, 50.0), row(MAIN, speed.QUACK, 160.0), failed
    )
    lines = speed.told("targets", speed.targets_table).splitlines()
    described, cases = lines[::6], [line for line in lines if line.startswith("| 65536")]
    assert described == [f"{gpu}, PyTorch 2.0, Triton 3.0, 2030-01-02, commit abc:" for gpu in ("An H100", "A GPU")]
    assert cases == [
        "| 65536 | 256 | 16 | bf16 | 24.5 | 50 | 49% | equal | QuACK top-k, compiled, 3.2× |",
        "| 65536 | 256 | 16 | bf16 | 24.5 | 500 | 4.9% | equal | QuACK top-k, compiled, 3× |",
    ]


def test_ladder_compares_each_rung_with_the_last_that_ran(no_tables, monkeypatch):
    failed = row(MAIN, speed.QUACK, None, check=None, error="not installed: quack")
    rows = row(MAIN, speed.FACTORED, 2000.0), failed, row(MAIN, speed.OMNI, 50.0)
    add_run(monkeypatch, "A GPU", "new", "ladder", *rows)
    cells = [
        [cell.strip() for cell in line.split("|")] for line in speed.told("ladder", speed.ladder_table).splitlines()
    ]
    assert [line[1:6] for line in cells[4:]] == [
        [speed.FACTORED, "2,000", "–", "1.2%", "equal"],
        [speed.QUACK, "–", "–", "–", "not installed: quack"],
        [speed.OMNI, "50", "40×", "49%", "equal"],
    ]


def test_losses_are_told(no_tables, monkeypatch):
    rows = row(MAIN, speed.FACTORED, 40.0), row(MAIN, speed.OMNI, 50.0)
    add_run(monkeypatch, "A GPU", "new", "ladder", *rows)
    guide = speed.Case(1024, 64, 16, "bf16")
    times = {speed.ORIGINAL: 52.0, speed.OPTIMIZED: 50.0, speed.OMNI: 3.0}
    add_run(monkeypatch, "A GPU", "new", "guide", *(row(guide, name, us) for name, us in times.items()))
    slower, rung, gain = speed.losses()
    assert slower == "A GPU, 65536 256 16 bf16: omni_router takes 1.25 times the time of “PyTorch, factored”"
    assert rung == "A GPU: “omni_router” is slower than “PyTorch, factored”, the rung before it"
    assert gain == "A GPU: the optimized kernels gain less than the guide expects at 64×64, k = 16"


def test_results_are_told_apart():
    x, y = torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    want = brute_force_router(x, y, 2)
    assert speed.compare(want, want, x, y) == "equal"
    for experts, verdict in (((1, 0), "ties"), ((0, 0), "inexact"), ((0, 2), "inexact"), ((0, 9), "inexact")):
        assert speed.compare((want[0], torch.tensor([experts]).int()), want, x, y) == verdict
    assert speed.compare((want[0] + 1, want[1]), want, x, y) == "inexact"


@pytest.mark.parametrize("name", [speed.ALL_SUMS, speed.FACTORED, speed.ORIGINAL, speed.OPTIMIZED, speed.OMNI])
def test_rivals_route(name, device):
    x, y = speed.logits(SMALL)
    assert speed.compare(speed.RIVALS[name].route(x, y, 4), factored_router(x, y, 4), x, y) in ("equal", "ties")


def test_slices_of_all_sums_are_joined(monkeypatch, device):
    monkeypatch.setattr(speed, "SUMS_AT_ONCE", 2 * 8 * 8)
    x, y = speed.logits(SMALL)
    assert speed.compare(speed.pytorch_all_sums(x, y, 4), brute_force_router(x, y, 4), x, y) in ("equal", "ties")


def test_a_rival_that_fails_is_a_row(monkeypatch, device):
    def broken(x, y, k):
        raise ValueError("too many\nlines")

    def missing(x, y, k):
        raise ModuleNotFoundError("no", name="quack")

    routes = {"right": factored_router, "broken": broken, "missing": missing}
    monkeypatch.setattr(speed, "RIVALS", {name: speed.Rival(route, "", "") for name, route in routes.items()})
    monkeypatch.setattr(speed, "limits", lambda: LIMITS)
    monkeypatch.setattr(speed, "time_us", lambda call, method: [2.0, 1.0, 3.0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    right, *failed = speed.timed_rows([(SMALL, list(routes))])
    assert right == {
        "rival": "right", **SMALL._asdict(), "method": "graph", "us": 2.0, "us_10": 1.0, "us_90": 3.0, "check": "equal",
        "error": None, "floor_us": 7 * (2 * 8 * 4 + 4 * 8) / 3e6, **LIMITS,
    }  # fmt: skip
    assert [(row["error"], row["us"]) for row in failed] == [
        ("ValueError: too many", None),
        ("not installed: quack", None),
    ]


def test_layouts_hold_the_same_logits():
    logits = torch.arange(12.0).view(4, 3)
    views = {name: lay_out(logits) for name, lay_out in speed.LAYOUTS.items()}
    assert all(torch.equal(view, logits) for view in views.values())
    assert {name: view.stride() for name, view in views.items()} == {
        "rows": (3, 1), "rows of a wider matrix": (6, 1), "columns": (1, 4),
    }  # fmt: skip


def test_layouts_are_told(no_tables, monkeypatch):
    monkeypatch.setattr(speed, "timed", lambda *_: {"us": 50.0, "check": "equal"})
    monkeypatch.setattr(speed, "limits", lambda: LIMITS)
    add_run(monkeypatch, "A GPU", "new", "layouts", *speed.layout_rows([(SMALL, list(speed.LAYOUTS))]))
    lines = speed.told("layouts", speed.layouts_table).splitlines()[4:]
    assert [line.split(" | ")[0] for line in lines] == [f"| {name}" for name in speed.LAYOUTS]


def test_a_full_disk_takes_no_table_and_is_told_with_its_path(no_tables, tmp_path, monkeypatch):
    add_run(monkeypatch, "A GPU", "new", "ladder", row(MAIN, speed.OMNI, 50.0))

    def fail(table, path, **_):
        path.write_text("half of a")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*ladder\.csv'"):
        tables.append("ladder", [row(MAIN, speed.OMNI, 40.0)])
    assert tables.read("ladder").us.tolist() == [50.0]
    assert [path.name for path in tmp_path.rglob("*.*")] == ["ladder.csv"]


def test_a_full_disk_takes_no_notebook(tmp_path, monkeypatch):
    nbformat, study = (importlib.import_module(name) for name in ("nbformat", "study"))
    source, destination = tmp_path / "source.ipynb", tmp_path / "kept.ipynb"
    nbformat.write(nbformat.v4.new_notebook(), source)
    destination.write_text("as it was")

    def fail(notebook, path):
        path.write_text("half of a")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nbformat, "write", fail)
    monkeypatch.setattr(study.nbclient.NotebookClient, "setup_kernel", lambda self: contextlib.nullcontext())
    with pytest.raises(OSError, match="No space"):
        study.execute(source, destination)
    assert destination.read_text() == "as it was"
    assert {path.name for path in tmp_path.iterdir()} == {"source.ipynb", "kept.ipynb"}


def test_a_hash_that_looks_like_a_number_stays_one(no_tables, monkeypatch):
    for source in ("001234567890", "589312e34567"):
        add_run(monkeypatch, "A GPU", source, "ladder", row(MAIN, speed.OMNI, 50.0))
        assert tables.measured_here("ladder").source.tolist() == [source]


def test_the_source_of_a_row_is_code_and_not_the_lists_for_tuning(tmp_path, monkeypatch):
    package = tmp_path / "omni_kernels"
    package.mkdir()
    monkeypatch.setattr(tables, "REPOSITORY", tmp_path)

    def source(text):
        (package / "configs.py").write_text(text)
        return tables.setting.__wrapped__()["source"]

    before = source('A_SPACE = {\n    "fwd": ([1], [2]),\n}\nSPACES = {"a": A_SPACE}\n\nB = 1\n')
    wider = 'A_SPACE = {\n    "fwd": ([1, 2], [2]),\n}\nSPACES = {"a": A_SPACE, "b": {}}\n\nB = '
    assert source(f"# Wider.\n{wider}1\n") == before
    assert source(f"{wider}2\n") != before


def test_a_folder_named_from_where_one_stands_is_the_same_folder():
    """The recorded tables are read once, not twice."""
    code = "import tables; print(tables.DATA == tables.RECORDED)"
    environment = {"OMNI_FIGURES": "../figures"}
    assert run_python("-c", code, folder=pathlib.Path(tables.__file__).parent, **environment) == "True\n"


def test_what_is_measured_is_not_measured_again(no_tables, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(speed, "_compile_ahead", compiled.append)
    for function in ("timed_rows", "layout_rows", "memory_rows"):
        monkeypatch.setattr(speed, function, lambda work: [row(MAIN, speed.OMNI, 50.0)])
    add_run(monkeypatch, "A GPU", "new", "ladder", row(MAIN, speed.OMNI, 50.0))
    done = speed.measure(again=False)
    assert done.pop("compiled ahead").startswith("in ")
    assert done.pop("ladder") == "measured before"
    assert all(what.startswith("measured now") for what in done.values())
    assert len(compiled[0]) == sum(
        len(work) for table, work in speed.TABLES.items() if table not in ("ladder", "layouts")
    )
    assert set(speed.measure(again=False).values()) == {"measured before"}
    again = speed.measure(again=True)
    assert set(again) == {"compiled ahead", *speed.TABLES}
    assert all(again[table].startswith("measured now") for table in speed.TABLES)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU would measure")
def test_without_a_gpu_nothing_is_measured():
    assert set(speed.measure(again=True).values()) == {"not measured: no GPU here"}


@pytest.mark.parametrize("name", [speed.RUNGS[0], speed.RUNGS[-1]])
def test_rungs_launch_their_own_kernel(name, device):
    x, y = speed.logits(SMALL._replace(dtype="fp16"))
    assert speed.compare(speed.RIVALS[name].route(x, y, 4), factored_router(x, y, 4), x, y) == "equal"


def test_a_rung_of_another_kernel_than_its_own_fails(monkeypatch, device):
    monkeypatch.setattr(speed.factored, "factored_forward", lambda x, y, k: None)
    with pytest.raises(RuntimeError, match="another kernel"):
        speed.RIVALS["one kernel"].route(*speed.logits(SMALL), 4)


def test_rungs_change_the_constants_they_name_and_nothing_else(monkeypatch, device):
    launches = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **constants: launches.append({"programs": grid[0], **constants})

    for name, value in (("interpreting", False), ("compares_doubles", True)):
        monkeypatch.setattr(speed.lanes, name, lambda *_, value=value: value)
    monkeypatch.setattr(speed.lanes, "kernel_input", lambda logits: logits)
    monkeypatch.setattr(speed.lanes, "lanes_kernel", Kernel())
    for name in speed.RUNGS[speed.RUNGS.index("a row a lane") :]:
        speed.RIVALS[name].route(*speed.logits(speed.Case(1024, 256, 15, "bf16")), 15)  # a case of this test alone
    *changed, own = launches
    changed = [{name: launch[name] for name in own if launch[name] != own[name]} for launch in changed]
    kept = {"PRIORITY": "evict_normal"}
    straight = kept | {"ADDED": False, "LOOPED": False}
    one_warp = straight | {"programs": 64, "TILE_M": 32, "num_warps": 1}
    assert (own["programs"], own["LANES"]) == (32, 2)
    long_pairs = one_warp | {"NARROW": False}
    assert changed == [
        long_pairs | {"TILE_N": 0, "CHUNK": 1, "VECTOR": 0, "STAGED": False, "FP64": False},
        long_pairs | {"CHUNK": 1, "STAGED": False, "FP64": False},
        long_pairs | {"CHUNK": 1, "FP64": False},
        long_pairs | {"FP64": False},
        long_pairs,
        one_warp,
        straight,
        kept | {"ADDED": False},
        kept,
    ]


# For a process whose Triton is no interpreter, and a GPU that is not there.
COMPILE_RUNGS = """
import autotune_study, speed_study, torch, triton
from omni_kernels import lanes


class Kernel:
    def __getitem__(self, grid):
        return lambda *args, **constants: lanes_kernel.warmup(*args, grid=(1,), **constants)


triton.runtime.driver.set_active(autotune_study._NoDevice(autotune_study.TARGETS["cuda:sm90"]))
lanes_kernel, lanes.lanes_kernel, lanes.compares_doubles = lanes.lanes_kernel, Kernel(), lambda device: True
x, y = torch.randn(2, 5, 64).bfloat16()
for name in speed_study.RUNGS[speed_study.RUNGS.index("a row a lane") :]:
    speed_study.RIVALS[name].route(x, y, 4)
    print(name)
"""


def test_rungs_of_lanes_compile_without_a_gpu():
    assert run_python("-c", COMPILE_RUNGS).splitlines() == speed.RUNGS[speed.RUNGS.index("a row a lane") :]


def test_a_table_that_cannot_be_measured_keeps_no_other_from_it(no_tables, monkeypatch):
    def broken(work):
        raise RuntimeError("no more")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(speed, "_compile_ahead", broken)
    add_run(monkeypatch, "A GPU", "new", "nothing", {})
    rows = [row(MAIN, speed.OMNI, 50.0)]
    for function in ("timed_rows", "memory_rows"):
        monkeypatch.setattr(speed, function, lambda work: rows)
    monkeypatch.setattr(speed, "layout_rows", broken)
    done = speed.measure(again=True)
    assert done.pop("compiled ahead") == done.pop("layouts") == "RuntimeError: no more"
    assert all(what.startswith("measured now") for what in done.values())
    assert tables.read("layouts").empty
    assert len(tables.read("memory")) == 1


@pytest.mark.parametrize(("memory", "buffer"), [(80 << 30, 2 << 30), (4 << 30, 1 << 29)])
def test_the_host_is_given_time_by_a_large_buffer_and_only_meanwhile(memory, buffer, monkeypatch):
    class Driver:
        def get_empty_cache_for_benchmark(self):
            return "256 MiB"

    driver = Driver()
    monkeypatch.setattr(timing.triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: size * dtype.itemsize)
    device = type("Device", (), {"total_memory": memory})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: device)
    monkeypatch.setattr(
        timing.triton.testing, "do_bench", lambda call, rep: (driver.get_empty_cache_for_benchmark(), call, rep)
    )
    assert timing.do_bench("call", rep=3) == (buffer, "call", 3)
    assert driver.get_empty_cache_for_benchmark() == "256 MiB"
