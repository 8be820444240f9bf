"""README's results are those of the recorded tables, and what the tables and their arithmetic say is right."""

import contextlib
import importlib
import pathlib
import sys

import pytest
import torch
from cases import run_python
from conftest import DEVICE

from omni_kernels import brute_force_router, factored_router, omni_router

pytest.importorskip("seaborn")
pd = pytest.importorskip("pandas")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "notebooks"))
calls, calls_report, cpu, layer, layer_report, pictures, readme, reports = (
    importlib.import_module(f"study.{name}")
    for name in ("calls", "calls_report", "cpu", "layer", "layer_report", "pictures", "readme", "reports")
)
rivals, speed, speed_report, tables, timing, training, training_report = (
    importlib.import_module(f"study.{name}")
    for name in ("rivals", "speed", "speed_report", "tables", "timing", "training", "training_report")
)
byte_model, learning = (importlib.import_module(f"study.{name}") for name in ("byte_model", "learning"))

MAIN, SMALL = speed.MAIN, rivals.Case(7, 8, 4, "fp32")
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


def add_run(monkeypatch, gpu, torch_version, table, *rows):
    run = {"gpu": gpu, "torch": torch_version, "triton": "3.0", "commit": "abc", "date": "2030-01-02"}
    monkeypatch.setattr(tables, "setting", lambda: run)
    tables.append(table, rows)


def row(case, rival, us, **more):
    limits = {"floor_us": speed.floor_us(case, 3000.0), **LIMITS}
    known = {
        "rival": rival,
        **case._asdict(),
        "us": us,
        "call_us": 70.0,
        "check": "equal",
        "binary": "b",
        "error": None,
    }
    return {**known, **limits, **more}


def test_a_frame_as_a_table():
    frame = pd.DataFrame({"kernel": ["a", "b"], "µs": [1258.46, 0.93457], "gain %": [-98.57, float("nan")]})
    assert reports.of_frame(frame.set_index("kernel")).splitlines() == [
        "| kernel | µs | gain % |",
        "| --- | ---: | ---: |",
        "| a | 1,258 | -98.6 |",
        "| b | 0.935 | – |",
    ]


def test_readme_holds_the_recorded_results(recorded_tables):
    text = readme.README.read_text(encoding="utf-8")
    assert readme.with_results(text) == text, "run notebooks/study --readme"


@pytest.mark.parametrize("table", speed.TIMED)
def test_recorded_rows_are_sound(table, recorded_tables):
    wrong = []
    for found in reports.latest(table).itertuples():
        floor = speed.floor_us(rivals.Case(*(getattr(found, size) for size in rivals.CASE)), found.bandwidth_gbs)
        if found.rival == rivals.OMNI:
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
    looked_at = {name: speed.examined(name, 256, 16) for name in (rivals.ORIGINAL, rivals.FACTORED, rivals.OMNI)}
    assert looked_at == {rivals.ORIGINAL: 65536, rivals.FACTORED: 512 + 256, rivals.OMNI: 512 + 50}
    assert speed.examined(rivals.OMNI, 2, 3) == 4 + 3  # ranks that a factor of two does not have are no candidates


def test_readme_without_a_table(no_tables):
    filled = readme.with_results(f"before\n{readme.MARKS[0]}\nold\n{readme.MARKS[1]}\nafter\n")
    assert filled == f"before\n{readme.MARKS[0]}\n\n{reports.NO_RESULTS}\n\n{readme.MARKS[1]}\nafter\n"


def test_results_are_of_the_last_versions_and_rows_of_each_gpu_h100_first(no_tables, monkeypatch):
    add_run(monkeypatch, "A GPU", "2.0", "targets", row(MAIN, rivals.OMNI, 500.0), row(MAIN, rivals.QUACK, 1500.0))
    add_run(monkeypatch, "An H100", "1.0", "targets", row(SMALL, rivals.OMNI, 1.0))
    add_run(monkeypatch, "An H100", "2.0", "targets", row(MAIN, rivals.OMNI, 99.0))
    failed = row(MAIN, rivals.FACTORED, None, check=None, error="OutOfMemoryError")
    add_run(
        monkeypatch, "An H100", "2.0", "targets", row(MAIN, rivals.OMNI, 50.0), row(MAIN, rivals.QUACK, 160.0), failed
    )
    lines = reports.told("targets", speed_report.targets_table).splitlines()
    described, cases = lines[::6], [line for line in lines if line.startswith("| 65536")]
    assert described == [f"{gpu}, PyTorch 2.0, Triton 3.0, 2030-01-02, commit abc:" for gpu in ("An H100", "A GPU")]
    assert cases == [
        "| 65536 | 256 | 16 | bf16 | 24.5 | 50 | 49% | 70 | equal | QuACK top-k, compiled, 3.2× |",
        "| 65536 | 256 | 16 | bf16 | 24.5 | 500 | 4.9% | 70 | equal | QuACK top-k, compiled, 3× |",
    ]


def test_ladder_compares_each_rung_with_the_last_that_ran(no_tables, monkeypatch):
    failed = row(MAIN, rivals.QUACK, None, check=None, error="not installed: quack")
    rows = row(MAIN, rivals.FACTORED, 2000.0), failed, row(MAIN, rivals.OMNI, 50.0)
    add_run(monkeypatch, "A GPU", "2.0", "ladder", *rows)
    cells = [
        [cell.strip() for cell in line.split("|")]
        for line in reports.told("ladder", speed_report.ladder_table).splitlines()
    ]
    assert [line[1:6] for line in cells[4:]] == [
        [rivals.FACTORED, "2,000", "–", "1.2%", "equal"],
        [rivals.QUACK, "–", "–", "–", "not installed: quack"],
        [rivals.OMNI, "50", "40×", "49%", "equal"],
    ]


def test_a_second_card_is_compared_where_the_machine_code_is_the_same():
    rows = [
        row(case, name, us, method="graph", gpu=gpu, binary=binary, bandwidth_gbs=speed_of_copy)
        for gpu, speed_of_copy, factor, code in (("An H100", 2000.0, 1.0, "b"), ("B", 3000.0, 0.5, "c"))
        for case, name, us, binary in (
            (MAIN, layer.OURS, 30.0 * factor, code),
            (MAIN, layer.BACKWARD, 50.0 * factor, "b"),
            (MAIN._replace(num_tokens=8), layer.BACKWARD, 2.0, "b"),
            (MAIN, layer.GATES, 100.0 * factor, None),
            (MAIN, layer.EAGER, 300.0 * factor, None),
        )
    ]
    table = layer_report.cards_table(pd.DataFrame(rows))
    assert table.splitlines()[2:] == [
        f"| {layer.BACKWARD} | 65,536 | 256 | 50 | 25 | 2.00 | 1.50 |",
        f"| {layer.BACKWARD} | 8 | 256 | 2 | 2 | 1.00 | 1.50 |",
        "| gates | 65,536 | 256 | 100 | 50 | 2.00 | 1.50 |",
    ]


def test_losses_are_told(no_tables, monkeypatch):
    rows = row(MAIN, rivals.FACTORED, 40.0), row(MAIN, rivals.OMNI, 50.0)
    add_run(monkeypatch, "A GPU", "2.0", "ladder", *rows)
    guide = rivals.Case(1024, 64, 16, "bf16")
    times = {rivals.ORIGINAL: 52.0, rivals.OPTIMIZED: 50.0, rivals.OMNI: 3.0}
    add_run(monkeypatch, "A GPU", "2.0", "guide", *(row(guide, name, us) for name, us in times.items()))
    slower, rung, gain = speed_report.losses()
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


@pytest.mark.parametrize("name", [rivals.ALL_SUMS, rivals.FACTORED, rivals.ORIGINAL, rivals.OPTIMIZED, rivals.OMNI])
def test_rivals_route(name, device):
    x, y = speed.logits(SMALL)
    assert speed.compare(rivals.RIVALS[name].route(x, y, 4), factored_router(x, y, 4), x, y) in ("equal", "ties")


def test_slices_of_all_sums_are_joined(monkeypatch, device):
    monkeypatch.setattr(rivals, "SUMS_AT_ONCE", 2 * 8 * 8)
    x, y = speed.logits(SMALL)
    assert speed.compare(rivals.pytorch_all_sums(x, y, 4), brute_force_router(x, y, 4), x, y) in ("equal", "ties")


@pytest.fixture
def timed(monkeypatch):
    """Times that a GPU might give."""
    monkeypatch.setattr(speed, "limits", lambda: LIMITS)
    monkeypatch.setattr(timing, "kernel_us", lambda calls, quantiles: [2.0, 1.0, 3.0])
    monkeypatch.setattr(timing, "call_us", lambda call: 40.0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_a_rival_that_fails_is_a_row(timed, monkeypatch, device):
    def broken(x, y, k):
        raise ValueError("too many\nlines")

    def missing(x, y, k):
        raise ModuleNotFoundError("no", name="quack")

    routes = {"right": factored_router, "broken": broken, "missing": missing}
    monkeypatch.setattr(speed, "RIVALS", {name: rivals.Rival(route, "", "") for name, route in routes.items()})
    right, *failed = speed.rows_of("targets", SMALL, list(routes))
    assert right == {
        "rival": "right", **SMALL._asdict(), "method": "graph", "us": 2.0, "us_10": 1.0, "us_90": 3.0, "call_us": 40.0,
        "check": "equal", "binary": "", "error": None, "floor_us": 7 * (2 * 8 * 4 + 4 * 8) / 3e6, **LIMITS,
    }  # fmt: skip
    assert [(row["error"], row["us"]) for row in failed] == [
        ("ValueError: too many", None),
        ("not installed: quack", None),
    ]


def test_what_cannot_be_in_a_graph_has_the_time_of_a_call(timed, monkeypatch, device):
    def no_graph(calls, quantiles):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(timing, "kernel_us", no_graph)
    (found,) = speed.rows_of("targets", SMALL, [rivals.FACTORED])
    assert [found[name] for name in ("method", "us", "us_10", "us_90", "call_us")] == ["call", *[40.0] * 4]


def test_many_tokens_are_timed_on_copies_that_lie_as_they_do(timed, monkeypatch, device):
    monkeypatch.setattr(speed, "WARM_UP_TO", 6)
    monkeypatch.setattr(timing, "num_copies", lambda num_bytes: {2 * 7 * 8 * 4: 3}[num_bytes])
    for row in speed.rows_of("layouts", SMALL, list(speed.LAYOUTS)):
        assert row["check"] == "equal"
        used = []
        x = speed.LAYOUTS[row["layout"]](torch.randn(7, 8, device=device))
        monkeypatch.setattr(timing, "kernel_us", lambda calls, _, used=used: [used.append([c() for c in calls])] * 3)
        speed.times_us(lambda *tensors: tensors, x, x)
        ((first, *others),) = used
        assert len(others) == 2
        for tensor in [tensor for tensors in others for tensor in tensors]:
            assert tensor.data_ptr() != first[0].data_ptr()
            assert tensor.stride() == x.stride()
            assert torch.equal(tensor, x)


def test_layouts_hold_the_same_logits():
    logits = torch.arange(12.0).view(4, 3)
    views = {name: lay_out(logits) for name, lay_out in speed.LAYOUTS.items()}
    assert all(torch.equal(view, logits) for view in views.values())
    assert {name: view.stride() for name, view in views.items()} == {
        "rows": (3, 1), "rows of a wider matrix": (6, 1), "columns": (1, 4),
    }  # fmt: skip


def test_layouts_are_told(no_tables, timed, monkeypatch, device):
    add_run(monkeypatch, "A GPU", "2.0", "layouts", *speed.rows_of("layouts", SMALL, list(speed.LAYOUTS)))
    lines = reports.told("layouts", speed_report.layouts_table).splitlines()[4:]
    assert [line.split(" | ")[0] for line in lines] == [f"| {name}" for name in speed.LAYOUTS]


def test_a_full_disk_takes_no_table_and_is_told_with_its_path(no_tables, tmp_path, monkeypatch):
    add_run(monkeypatch, "A GPU", "2.0", "ladder", row(MAIN, rivals.OMNI, 50.0))

    def fail(table, path, **_):
        path.write_text("half of a")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*ladder\.csv'"):
        tables.append("ladder", [row(MAIN, rivals.OMNI, 40.0)])
    assert tables.read("ladder").us.tolist() == [50.0]
    assert [path.name for path in tmp_path.rglob("*.*")] == ["ladder.csv"]


def test_a_full_disk_takes_no_notebook(tmp_path, monkeypatch):
    nbformat, notebooks = (importlib.import_module(name) for name in ("nbformat", "study.notebooks"))
    source, destination = tmp_path / "source.ipynb", tmp_path / "kept.ipynb"
    nbformat.write(nbformat.v4.new_notebook(), source)
    destination.write_text("as it was")

    def fail(notebook, path):
        path.write_text("half of a")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nbformat, "write", fail)
    monkeypatch.setattr(notebooks.nbclient.NotebookClient, "setup_kernel", lambda self: contextlib.nullcontext())
    with pytest.raises(OSError, match="No space"):
        notebooks.execute(source, destination)
    assert destination.read_text() == "as it was"
    assert {path.name for path in tmp_path.iterdir()} == {"source.ipynb", "kept.ipynb"}


def test_a_hash_that_looks_like_a_number_stays_one(no_tables, monkeypatch):
    hashes = ["001234567890", "589312e34567"]
    add_run(monkeypatch, "A GPU", "2.0", "ladder", *(row(MAIN, rivals.OMNI, 50.0, binary=binary) for binary in hashes))
    assert tables.of_setting("ladder").binary.tolist() == hashes


def test_rows_keep_their_place_when_they_are_measured_again(no_tables, monkeypatch):
    cases = [MAIN, SMALL, MAIN._replace(k=8)]
    add_run(monkeypatch, "A GPU", "2.0", "targets", *(row(case, rivals.OMNI, 50.0) for case in cases))
    add_run(monkeypatch, "A GPU", "2.0", "targets", row(SMALL, rivals.OMNI, 40.0))
    found = reports.latest("targets")
    assert list(found[rivals.CASE].itertuples(index=False, name=None)) == cases
    assert found.us.tolist() == [50, 40, 50]


def test_a_folder_named_from_where_one_stands_is_the_same_folder():
    """The recorded tables are read once, not twice."""
    code = "from study import tables; print(tables.DATA == tables.RECORDED)"
    environment = {"OMNI_FIGURES": "../figures"}
    assert run_python("-c", code, folder=pathlib.Path(tables.__file__).parents[1], **environment) == "True\n"


def test_a_case_is_measured_again_when_what_is_compiled_changes(no_tables, timed, monkeypatch, device):
    binaries = {rivals.OMNI: "first", rivals.FACTORED: ""}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(speed, "_compile_ahead", lambda work: None)
    monkeypatch.setattr(speed, "compiled_by", lambda name, *_: {"binary": binaries[name]})
    monkeypatch.setattr(speed, "peak_bytes", lambda *_: {"peak_bytes": 5})
    monkeypatch.setattr(speed, "get_device", lambda: torch.device(device))
    some = {table: [(case, list(binaries)) for case in (SMALL, SMALL._replace(k=3))] for table in ("ladder", "memory")}
    monkeypatch.setattr(speed, "TABLES", some | {"layouts": [(SMALL, list(speed.LAYOUTS))]})
    tables_of_run = list(speed.TABLES)
    counts = {"ladder": 2, "memory": 2, "layouts": 1}

    def measured(**options):
        done = speed.measure(**options)
        assert done.pop("compiled ahead").startswith("in ")
        assert list(done) == tables_of_run
        return {table: int(what.split(" of ")[0]) for table, what in done.items()}

    add_run(monkeypatch, "A GPU", "2.0", "nothing", {})
    assert measured(again=False) == counts
    assert measured(again=False) == dict.fromkeys(counts, 0)
    assert measured(again=True) == counts
    for change, binary in enumerate(("second", "first"), start=3):
        binaries[rivals.OMNI] = binary
        assert measured(again=False) == counts
        assert len(tables.read("ladder")) == change * 2 * 2
        assert set(reports.latest("ladder").binary.dropna()) == {binary}  # what was measured last is what is shown
    for table in tables_of_run:
        assert measured(again=False)[table] == 0


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU would measure")
def test_without_a_gpu_nothing_is_measured():
    assert set(speed.measure(again=True).values()) == {"not measured: no GPU here"}


@pytest.mark.parametrize("name", [rivals.RUNGS[0], rivals.RUNGS[-1]])
def test_rungs_launch_their_own_kernel(name, device):
    x, y = speed.logits(SMALL._replace(dtype="fp16"))
    assert speed.compare(rivals.RIVALS[name].route(x, y, 4), factored_router(x, y, 4), x, y) == "equal"


def test_rungs_change_what_they_name_and_nothing_else(monkeypatch):
    plans = []
    monkeypatch.setattr(rivals.lanes, "interpreting", lambda: False)
    own = rivals.lanes.plan_of.__wrapped__(256, 16, torch.bfloat16, torch.bfloat16, 16, False, True, 2)
    monkeypatch.setattr(rivals.lanes, "plan_for", lambda *_, few_tokens: own)
    monkeypatch.setattr(rivals.factored, "run", lambda plan, x, y: plans.append(plan))
    for name in rivals.RUNGS[rivals.RUNGS.index("a row a lane") :]:
        rivals.RIVALS[name].route(*speed.logits(SMALL), 16)
    changed = [{name: plan[name] for name in own if plan[name] != own[name]} for plan in plans]
    kept = {"priority": "evict_normal"}
    straight = kept | {"add_minima": False, "looped": False}
    one_warp = straight | {"num_warps": 1}
    long_pairs = one_warp | {"short_pairs": False}
    assert changed == [
        long_pairs | {"tile_n": 0, "chunk": 1, "vector": 0, "staged": False, "doubles": False},
        long_pairs | {"chunk": 1, "staged": False, "doubles": False},
        long_pairs | {"chunk": 1, "doubles": False},
        long_pairs | {"doubles": False},
        long_pairs,
        one_warp,
        straight,
        kept | {"add_minima": False},
        kept,
        {},
    ]


# For a process whose Triton is no interpreter, and a GPU that is not there.
COMPILE_RUNGS = """
import torch, triton
from study import compiling, rivals
from omni_kernels import configs
from omni_kernels.factored import lanes


def compile_plan(plan, x, y):
    numbers = *x.stride(), *y.stride(), len(x)
    configs.compiled(plan.kernel, x, y, x, torch.int32, None, *numbers, PLAN=plan, num_warps=plan.num_warps)


triton.runtime.driver.set_active(compiling._NoDevice(compiling.TARGETS["cuda:sm90"]))
rivals.factored.run, lanes.compares_doubles = compile_plan, lambda device: True
x, y = torch.randn(2, 5, 64).bfloat16()
for name in rivals.RUNGS[rivals.RUNGS.index("a row a lane") :]:
    rivals.RIVALS[name].route(x, y, 4)
    print(name)
"""


def test_rungs_of_lanes_compile_without_a_gpu():
    assert run_python("-c", COMPILE_RUNGS).splitlines() == rivals.RUNGS[rivals.RUNGS.index("a row a lane") :]


def test_a_table_that_cannot_be_measured_keeps_no_other_from_it(no_tables, monkeypatch):
    def broken(work):
        raise RuntimeError("no more")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(speed, "_compile_ahead", broken)
    monkeypatch.setattr(speed, "TABLES", {"layouts": [()], "memory": [(MAIN, ())]})
    add_run(monkeypatch, "A GPU", "2.0", "nothing", {})
    monkeypatch.setattr(speed, "rows_of", lambda table, case, names, known: [row(case, rivals.OMNI, 50.0)])
    done = speed.measure(again=True)
    assert done["compiled ahead"] == "RuntimeError: no more"
    assert done["layouts"].startswith("ValueError: ")
    assert done["memory"].startswith("1 of 1 cases measured now")
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


def test_a_graph_holds_calls_that_take_turns_for_a_while(monkeypatch):
    called, clock = [], [0]
    samples = iter(
        [70, 9, 9, 9, 70, 12, 12, 12, 70, *range(6, 16)]
    )  # ms; the first replay of each graph does not count

    class Graph:
        def replay(self):
            called.append("replay")
            clock[0] += next(samples)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.ms = clock[0]

        def elapsed_time(self, end):
            return end.ms - self.ms

    for name, value in (("CUDAGraph", Graph), ("graph", contextlib.nullcontext), ("Event", Event)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    times = timing.kernel_us([lambda: called.append("one"), lambda: called.append("two")], quantiles=(0.5, 0.0, 1.0))
    # One round takes 9000 µs, but two take 12000, of which two fill 10000 as well.
    graphs = ["one", "two"] + ["replay"] * 4 + ["one", "two"] * 2 + ["replay"] * 4 + ["one", "two"] * 2
    assert called == ["one", "two", *graphs] + ["replay"] * 11
    assert times == pytest.approx([10500 / 4, 6000 / 4, 15000 / 4])


def test_calls_are_timed_in_turn(monkeypatch):
    """As many calls at once as take a while, and the same number in every round."""
    order, clock = [], [0.0]

    def calling(name, seconds):
        def call():
            order.append(name)
            clock[0] += seconds

        return call

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(timing, "CALLS_US", 200)
    found = timing.rounds_us({"slow": calling("slow", 1e-4), "quick": calling("quick", 2e-5)}, 3)
    assert found == {"slow": pytest.approx([100] * 3), "quick": pytest.approx([20] * 3)}
    before, one_round = 2 * (3 + 1), ["slow"] * 3 + ["quick"] * 11  # each after a call that is not timed
    assert order[before:] == one_round * 3
    assert timing.call_us(calling("slow", 1e-4)) == pytest.approx(100)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU would measure")
def test_calls_without_a_gpu():
    assert calls.measure() == "not measured: no GPU here"


@pytest.fixture
def call_rows(no_tables, monkeypatch, device):
    """All calls and parts, made, and times that are the names' lengths."""
    case = calls.CASE._replace(num_tokens=4, num_expert_sqrt=16)
    times = {}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(calls.speed, "logits", lambda _, make=speed.logits: make(case))

    def rounds(works, num_rounds):
        times.update({name: [float(len(name))] * num_rounds for name in works})
        return times

    monkeypatch.setattr(timing, "rounds_us", rounds)
    add_run(monkeypatch, "A GPU", "2.0", "nothing", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: DEVICE == "cuda")
    rows = calls.rows_of(*speed.logits(case))
    tables.append("calls", rows)
    return {found["rival"]: found for found in rows}


def test_every_call_works_that_can_work_here(call_rows):
    failed = {name for name, found in call_rows.items() if found["error"]}
    public = {name for name in call_rows if name.startswith(calls.PUBLIC)}
    assert failed <= public | {"launch, as the package does it"}  # which needs a GPU
    assert {*calls.RATIOS, *calls.RATIOS.values()} <= set(call_rows) - failed
    assert all(found["us"] == len(name) for name, found in call_rows.items() if name not in failed)


def test_calls_are_told_and_drawn(call_rows, tmp_path, monkeypatch):
    lines = reports.told("calls", calls_report.ratios_table).splitlines()
    assert lines[2] == "| a call, 1024 tokens, N = 256, k = 16, bf16 | µs | over | µs | times |"
    assert lines[4] == "| omni_router, no gradient | 24 | x.topk(16) | 10 | 2.40 |"
    assert len(lines) == 4 + 6
    whole = reports.told("calls", calls_report.calls_table)
    assert "| `x + y` | 5 | 5 to 5 |" in whole
    assert "checks of the arguments" in reports.told("calls", calls_report.parts_table)
    assert "checks of the arguments" not in whole
    monkeypatch.setattr(pictures.plt, "show", lambda: None)
    monkeypatch.setattr(pictures, "FIGURES", tmp_path)
    reports.show("calls", calls_report.draw_calls, "calls")
    assert (tmp_path / "calls.png").exists()


def test_calls_on_a_cpu_are_measured_once_and_told(no_tables, monkeypatch):
    case = rivals.Case(70, 8, 3, "bf16")
    add_run(monkeypatch, "none", "2.0", "nothing", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in {"CASES": [case], "ROUNDS": 3, "cpu_name": lambda: "A CPU"}.items():
        monkeypatch.setattr(cpu, name, value)
    assert cpu.measure(again=False) == "1 cases measured now"
    assert cpu.measure(again=False) == "measured before"
    found = tables.read("cpu")
    assert list(found.rival) == [rivals.OMNI, rivals.FACTORED]
    assert found.result[0] == "equal"
    assert (found.us_10 <= found.us).all() and (found.us <= found.us_90).all() and (found.us > 0).all()
    told = reports.told("cpu", calls_report.cpu_table)
    assert told.startswith("A CPU, ")
    assert "| 70 | 8 | 3 | bf16 |" in told


def test_calls_of_this_commit_are_not_timed_again(no_tables, monkeypatch):
    add_run(monkeypatch, "A GPU", "2.0", "calls", {"rival": "one"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(speed, "logits", lambda case: (None, None))
    monkeypatch.setattr(calls, "rows_of", lambda *_: [{"rival": "one"}])
    assert calls.measure(again=False) == "measured before"
    assert calls.measure(again=True) == "1 calls measured now"
    monkeypatch.setitem(tables.setting(), "commit", "another")
    assert calls.measure(again=False) == "1 calls measured now"


# For a process whose Triton is no interpreter: two kernels of one machine code under two names, and a third.
COMPILE_NAMES = """
import torch, triton
import triton.language as tl
from study import binaries, compiling

@triton.jit
def one(pointer, SIZE: tl.constexpr):
    tl.store(pointer + tl.arange(0, SIZE), tl.load(pointer + tl.arange(0, SIZE)) + 1)

@triton.jit
def same(renamed, SIZE: tl.constexpr):
    # Moved.
    places = renamed + tl.arange(0, SIZE)
    tl.store(places, tl.load(places) + 1)

@triton.jit
def other(pointer, SIZE: tl.constexpr):
    tl.store(pointer + tl.arange(0, SIZE), tl.load(pointer + tl.arange(0, SIZE)) + 2)

triton.runtime.driver.set_active(compiling._NoDevice(compiling.TARGETS["cuda:sm90"]))
compiled = [kernel.warmup(torch.float32, SIZE=128, grid=(1,)) for kernel in (one, same, other)]
print(*(binaries.short_hash(binaries.machine_code(kernel)) for kernel in compiled))

triton.compiler.CompiledKernel.launch_metadata = lambda *_: None  # which takes a GPU

def launching(*grids, kernels=compiled):
    return lambda: [kernel.launch_metadata(grid, 0) for kernel, grid in zip(kernels, grids)]

print(*(binaries.binary_of(call) or "nothing" for call in (
    launching((1, 1, 1)), launching((1,), kernels=compiled[1:]), launching((2, 1, 1)),
    launching((1, 1, 1), (1, 1, 1)), launching((1, 1, 1), (1, 1, 1), (1, 1, 1)), launching())))
"""


def test_a_row_belongs_to_machine_code_whatever_it_is_called(tmp_path):
    (tmp_path / "compile_names.py").write_text(COMPILE_NAMES)
    (one, same, other), found = map(str.split, run_python(tmp_path / "compile_names.py").splitlines())
    assert one == same
    assert one != other
    first, renamed, larger_grid, twice, three, nothing = found
    assert first == renamed == twice  # each kernel counts once
    assert len({first, larger_grid, three, nothing}) == 4
    assert nothing == "nothing"


def test_tables_of_notebook_4_are_measured_when_what_they_launch_changes(no_tables, monkeypatch):
    measured = []

    def measure(binary):
        measured.append(binary)
        tables.append("repeats", [{"rival": "one"}], binary=binary)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(training, "binary_of", lambda probe: probe)
    add_run(monkeypatch, "A GPU", "2.0", "nothing", {})
    for binary in ("first", "first", "second"):
        training.measure_missing("repeats", measure, binary)
    assert measured == ["first", "second"]
    assert len(training_report.recorded("repeats", "rival")) == 1


def test_rows_that_lack_a_column_are_measured_again_and_not_shown(no_tables, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(training, "binary_of", lambda probe: probe)
    add_run(monkeypatch, "A GPU", "2.0", "training_runs", {"rival": "old", "binary": "same"})
    assert training_report.tell("training_runs", len, "rival", "seed") == reports.NO_RESULTS
    measured = []

    def measure(binary):
        measured.append(binary)
        tables.append("training_runs", [{"rival": "new", "seed": 0}], binary=binary)

    for _ in range(2):
        training.measure_missing("training_runs", measure, "same", columns=["seed"])
    assert measured == ["same"]
    assert training_report.recorded("training_runs", "rival", "seed").rival.tolist() == ["new"]


def test_what_cannot_be_measured_is_told(no_tables, monkeypatch, capsys):
    def broken(binary):
        raise ValueError("no more")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    add_run(monkeypatch, "A GPU", "2.0", "nothing", {})
    training.measure_missing("repeats", broken, lambda: None)
    assert capsys.readouterr().out == "repeats: not measured: ValueError: no more\n"


@pytest.mark.parametrize("name", training.BACKWARDS)
def test_backwards_are_timed(name, no_tables, timed, monkeypatch, device):
    monkeypatch.setattr(training, "limits", lambda: LIMITS)
    monkeypatch.setattr(training, "BACKWARDS", {name: training.BACKWARDS[name]})
    add_run(monkeypatch, "A GPU", "2.0", "nothing", {})
    training.measure_backward("b", [SMALL], device)
    (found,) = tables.read("backward").to_dict("records")
    assert (found["rival"], found["us"], found["call_us"], found["binary"]) == (name, 2.0, 40.0, "b")
    assert found["check"] in ("equal", "last bits differ")


def test_rungs_to_read_are_timed_and_told(no_tables, timed, monkeypatch, device):
    names = list(training.TO_READ)
    assert training_report.rung(names[0], 5) == f"{names[0]}: by arithmetic 5 µs; not timed yet"
    for name, value in {"limits": lambda: LIMITS, "READ_CASE": SMALL}.items():
        monkeypatch.setattr(training, name, value)
    add_run(monkeypatch, "A GPU", "2.0", "nothing", {})
    training.measure_rungs("b", device)
    assert [training_report.rung(name, 1234) for name in names] == [
        f"{name}: by arithmetic 1,234 µs; it took 2 µs on an A GPU; its result: equal" for name in names
    ]
    failed = {"rival": names[0], **SMALL._asdict(), "us": None, "check": None, "error": "ValueError: no"}
    add_run(monkeypatch, "A GPU", "2.0", "backward_rungs", failed)
    assert training_report.rung(names[0], 5).endswith("it failed: ValueError: no")


TINY = rivals.Case(8, 8, 5, "fp32")  # a batch of windows


def noisy(grad, indices, num_expert_sqrt, calls=[0]):  # noqa: B006
    """A backward that is not the same in every call, as one by atomics may be, but by more than a last bit."""
    calls[0] += 1
    grad_x, grad_y = training.sequential_sums(grad, indices, num_expert_sqrt)
    return grad_x * (-1 if calls[0] % 3 == 0 else 1), grad_y


def test_a_dense_layer_costs_what_a_layer_of_experts_costs():
    layers = learning.omni_layer(TINY, factored_router), learning.dense_layer(TINY)
    counts = [byte_model.multiply_adds(layer(32), 32) for layer in layers]
    assert counts == [32 * 2 * 8 + 2 * 5 * 32] * 2


def test_trainings_of_one_seed_are_one_and_of_others_are_not(device):
    one, same, other = (
        byte_model.train(learning.omni_layer(TINY, omni_router), 3, 8, device, 16, seed)[1] for seed in (1, 1, 2)
    )
    assert one["losses"] == same["losses"] != other["losses"]
    assert one["test_loss"] == same["test_loss"]
    assert one["parameters"] == 2 * (16 * 16 + 2 * 64 * 16)
    assert all(5 <= count <= 40 for count in one["experts"][-1])


def test_trainings_are_recorded_told_and_drawn(no_tables, monkeypatch, tmp_path, device):
    monkeypatch.setattr(learning, "SEEDS", range(2))
    add_run(monkeypatch, "A GPU", "2.0", "training", {"rival": "of a time before seeds", "step": 5, "loss": 1.0})
    learning.measure_training("b", TINY, device, width=16, num_steps=5, letters=3)
    runs = training_report.recorded("training_runs", "rival", "seed")
    names = [*learning.ROUTERS, learning.DENSE]
    assert list(runs.rival) == names * 2
    assert list(runs.seed) == [seed for seed in range(2) for _ in names]
    assert (runs[runs.rival == learning.OMNI].largest_difference == 0).all()
    told = training_report.tell("training_runs", training_report.training_table, "rival", "seed").splitlines()
    assert [line.split(" | ")[:3] for line in told[4:]] == [[f"| {name}", "5", "2"] for name in names]
    assert "of 2 seeds, by " in training_report.baseline(runs)

    steps = training_report.recorded("training", "rival", "seed", "step")
    assert len(steps) == len(names) * 2
    last = steps[steps.rival == learning.OMNI].experts_1.astype(int)
    said = training_report.experts_in_use(steps)
    assert said.startswith("Of 64 experts, the batch of step 5 (8 tokens, 5 experts each) used ")
    assert f"{last.min()} to {last.max()} in layer 1" in said or f"{last.min()} in layer 1" in said
    curves, same = training_report.curves_of(steps)
    assert [*curves, *same] and set(curves) | set(same) == set(names) and learning.DENSE in curves
    assert all(curve.shape == (1, 2) for curve in curves.values())
    assert len(tables.read("training_sample").text.iloc[0]) > 18
    monkeypatch.setattr(pictures.plt, "show", lambda: None)
    monkeypatch.setattr(pictures, "FIGURES", tmp_path)
    training_report.show("training", training_report.draw_training, "training", "rival", "seed", "step")
    assert (tmp_path / "training.png").exists()


def test_the_same_curve_is_drawn_once():
    rows = [
        {"rival": name, "seed": seed, "step": step, "loss": loss + seed, "experts_1": 3, "experts_2": 4}
        for name, loss in (("first", 1.0), ("same", 1.0), ("other", 2.0))
        for seed in (0, 1)
        for step in (5, 10)
    ]
    curves, same = training_report.curves_of(pd.DataFrame(rows))
    assert (list(curves), same) == (["first", "other"], ["same"])
    left, right = training_report.draw_training(pd.DataFrame(rows)).axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["first\nthe same: same", "other"]
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["layer 1", "layer 2"]


def test_the_first_token_that_chose_otherwise_is_found():
    one = torch.tensor([[3, 1, 2], [7, 5, 6], [9, 8, 4]])
    assert learning.first_difference(one, one.flip(1)) == (0, {})  # the order of a token's experts is no choice
    other = torch.tensor([[1, 2, 3], [6, 0, 7], [4, 8, 1]])
    assert learning.first_difference(one, other) == (2, {"token": 1, "expert": 5, "instead": 0})


def test_pairs_of_runs_are_compared_told_and_drawn(no_tables, monkeypatch, tmp_path, device):
    """Where every run adds in one order, as here, one that does not is made up."""
    monkeypatch.setitem(learning.PAIRS, training.SCATTER, learning.routed(omni_router, noisy))
    add_run(monkeypatch, "A GPU", "2.0", "nothing", {})
    learning.measure_pairs("b", {TINY: 16}, device, num_steps=4)
    curves = training_report.recorded("pairs", "rival", *rivals.CASE, "step")
    assert list(curves.groupby("rival", sort=False).size().items()) == [(name, 4) for name in learning.PAIRS]
    assert (curves.made == 2 * 8).all()
    ours = curves[curves.rival == training.OURS]
    assert (ours[["choices", "loss_difference", "weight_difference"]] == 0).all(axis=None)
    runs = training_report.recorded("pairs_runs", "rival", *rivals.CASE).set_index("rival")
    assert runs.apart[training.SCATTER] == 1
    moved = curves[(curves.rival == training.SCATTER) & (curves.choices > 0)]
    assert runs.step[training.SCATTER] == moved.step.min()
    flip = runs.loc[training.SCATTER]
    assert flip.expert != flip.instead and 0 <= flip.token < 8 and flip.layer in (1, 2)

    told = training_report.tell("pairs_runs", training_report.first_flips, "rival", *rivals.CASE)
    where = f"in step {flip.step:.0f}, layer {flip.layer:.0f}, token {flip.token:.0f} runs expert {flip.expert:.0f}"
    assert where in told and "**shared memory**, N = 8, k = 5: no weight differs after any of 4 steps." in told
    table = training_report.tell("pairs_runs", training_report.pairs_table, "rival", *rivals.CASE)
    assert "| 8 | 5 | shared memory | never | none | 0 of 16 | 0 | 0 |" in table
    monkeypatch.setattr(pictures.plt, "show", lambda: None)
    monkeypatch.setattr(pictures, "FIGURES", tmp_path)
    training_report.show("pairs", training_report.draw_pairs, "pairs", "rival", *rivals.CASE, "step")
    assert (tmp_path / "pairs.png").exists()


@pytest.fixture
def layer_rows(no_tables, timed, monkeypatch, device):
    """The rows of a case of the layer, all parts among them, with times that a GPU might give; recorded."""
    case = layer.MAIN._replace(num_tokens=5, num_expert_sqrt=16, k=4)
    for module in (layer, layer_report):
        monkeypatch.setattr(module, "MAIN", case)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setattr(
        timing, "rounds_us", lambda works, rounds: {name: [float(len(name))] * rounds for name in works}
    )
    rows = layer.rows_of(case)
    add_run(monkeypatch, "A GPU", "2.0", "layer", *rows)
    return {found["rival"]: found for found in rows}


def test_the_layer_is_measured_once_what_is_right(layer_rows):
    assert [found["error"] for found in layer_rows.values()] == [None] * len(layer_rows)
    steps = [f"{name}, {how}" for name in layer.COMPARED for how in (layer.BOTH, layer.ONE_THREAD)]
    assert [layer_rows[name]["us"] for name in steps] == list(map(len, steps))
    others = layer_rows.keys() - set(steps)
    assert {layer_rows[name]["us"] for name in others} == {2.0}
    in_graphs = {f"{name}, {layer.GRAPH}" for name in layer.COMPARED}
    assert {name for names in layer_report.STACKS.values() for name in names} | in_graphs <= others
    assert layer_rows[layer.OURS]["floor_us"] == pytest.approx(5 * (2 * 16 * 2 + 4 * 6) / 3e6)
    assert layer_rows[layer.BACKWARD]["floor_us"] == pytest.approx(5 * (4 * 16 * 2 + 4 * 6) / 3e6)
    known = tables.last_keys(tables.read("layer"), ["rival", *rivals.CASE])
    assert layer.rows_of(layer.MAIN, known) == []


def test_wrong_layers_are_not_timed(no_tables, timed, monkeypatch, device):
    def wrong(x, y, k, *args, normalize=None):
        scores, experts = layer_router(x, y, k, *args, normalize=normalize)
        return (scores * 1.01 if normalize else scores), experts

    layer_router = layer.omni_router
    monkeypatch.setattr(layer, "omni_router", wrong)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setattr(timing, "rounds_us", lambda works, rounds: {name: [1.0] * rounds for name in works})
    rows = {found["rival"]: found for found in layer.rows_of(SMALL)}
    failed = {name: found["error"] for name, found in rows.items() if found["error"]}
    assert failed == {
        layer.OURS: "ValueError: scores differ",
        layer.BACKWARD: "ValueError: gradients differ",
        **{f"{layer.OURS}, {how}": "ValueError: gradients differ" for how in layer_report.WAYS},
    }
    assert [rows[name]["us"] for name in failed] == [None] * 5


@pytest.mark.parametrize("counts", [0, 1, 3])
def test_wrong_counts_are_seen(counts):
    x, y = torch.tensor([[4.0, 0.0]]), torch.tensor([[4.0, 0.0]])
    scores, experts, right = layer.adaptive_router(x, y, 3, top_p=layer.TOP_P)
    layer.check_result((scores, experts, right), omni_router(x, y, 3)[1], x, y)
    wrong = right + 1 if counts == right else torch.tensor([counts])
    with pytest.raises(ValueError, match="counts differ"):
        layer.check_result((scores, experts, wrong), omni_router(x, y, 3)[1], x, y)


def test_the_layer_is_told_and_drawn(layer_rows, tmp_path, monkeypatch):
    want = {
        layer_report.forward_table: ["| 5 | 16 | 0.000147 | 2 | 2 | 1.00 | 2 | 2 | 2 | 1.00 |"],
        layer_report.backward_table: ["| 5 | 16 | 0.000253 | 2 | 0.0% |"],
        layer_report.steps_table: [
            "| 5 | 16 | from Python | 39 | 44 | 54 | 0.89 | 0.72 |",
            "| 5 | 16 | on one thread | 53 | 58 | 68 | 0.91 | 0.78 |",
            "| 5 | 16 | in a CUDA graph | 2 | 2 | 2 | 1.00 | 1.00 |",
        ],
        layer_report.layer_table: ["| 5 | 16 | 2 | 2 | 2 | 2 | 39 | 44 | 54 | 0.72 | 1.00 |"],
    }
    for table, lines in want.items():
        head, rule, *found = reports.told("layer", table).splitlines()[2:]
        assert found == lines
        assert head.count("|") == rule.count("|") == lines[0].count("|")
    monkeypatch.setattr(pictures.plt, "show", lambda: None)
    monkeypatch.setattr(pictures, "FIGURES", tmp_path)
    reports.show("layer", layer_report.draw_layer, "layer")
    assert (tmp_path / "layer.png").exists()
    assert "| 39 |" in readme.with_results("\n".join(readme.MARKS))


def test_adaptive_routing_is_told_and_drawn():
    curve = pd.DataFrame([{"rival": rule, "value": 0.5, "experts": 2.0, "loss": 1.5} for rule in ("top_p", "min_p")])
    assert layer_report.adaptive_table(curve).splitlines()[2:] == [
        f"| {rule} | 0.5 | 2.00 | 1.5000 |" for rule in curve.rival
    ]
    assert [line.get_label() for line in layer_report.draw_adaptive(curve).axes[0].lines] == ["top_p", "min_p"]
    text = [{"layer": 1 + place % 2, "position": place // 2, "byte": byte, "experts": 3}
            for place, byte in enumerate(b"aabb  \n\n")]  # fmt: skip
    panels = layer_report.draw_text(pd.DataFrame(text)).axes
    assert [label.get_text() for label in panels[-1].get_xticklabels()] == list("ab␣↵")
    assert [[bar.get_height() for bar in axes.patches] for axes in panels] == [[3] * 4] * 2


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU would measure")
def test_the_layer_without_a_gpu(no_tables, capsys):
    assert layer.measure() == "not measured: no GPU here"
    assert reports.told("layer", layer_report.layer_table) == reports.NO_RESULTS
    reports.show("layer", layer_report.draw_layer, "layer")
    assert capsys.readouterr().out == f"{reports.NO_RESULTS}\n"


def test_the_layer_is_as_accurate_as_promised(device):
    ours, rival = layer.errors_of(SMALL, 4.0)
    assert (ours["rival"], rival["rival"]) == (layer.OURS, layer.EAGER)
    assert all(ours[column] <= bound for column, bound in layer.PROMISED.items())
    assert 0 < rival["probability_error"] < 1e-5
    head, rule, *lines = layer_report.accuracy_table(pd.DataFrame([ours, rival])).splitlines()
    assert [line.count("|") for line in (head, rule, *lines)] == [8] * 4


def test_recorded_rows_of_the_layer_are_sound(recorded_tables):
    found = reports.latest("layer")
    assert len(found) == 0 or found.error.isna().all()
    accuracy = tables.read("layer_accuracy")
    for column, bound in layer.PROMISED.items() if len(accuracy) else ():
        assert (accuracy[accuracy.rival == layer.OURS][column] <= bound).all()
