"""The autotune study without a GPU: invented times in a temporary folder show that it resumes, records and draws."""

import ast
import math
import os
import pathlib
import sys
import threading
import zlib

import pytest

pd = pytest.importorskip("pandas")
pytest.importorskip("seaborn")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "notebooks"))

import matplotlib.pyplot as plt  # noqa: E402
from study import (  # noqa: E402
    autotune,
    autotune_pictures,
    autotune_report,
    compiling,
    configurations,
    pictures,
    tables,
    training_report,
    tuner,
)
from triton.backends.compiler import GPUTarget  # noqa: E402

GPU = autotune_report.RECORDED_GPU
SETTING = {"gpu": GPU, "torch": "2", "triton": "3", "commit": "c", "date": "2026-01-01"}
PROBLEMS = [configurations.Problem("fwd", 1024, 64, 16), configurations.Problem("bwd", 1024, 64, 16)]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU that compiles and times at once, by a formula; `gpu["stop"]` ends a run after that many timings."""
    plt.switch_backend("agg")
    state = {"setting": dict(SETTING), "timed": [], "compiled": [], "stop": math.inf, "factor": 1.0, "compiler": "one"}
    monkeypatch.setattr(tables, "DATA", tmp_path / "data")
    monkeypatch.setattr(tables, "RECORDED", tmp_path / "recorded")
    monkeypatch.setattr(tables, "setting", lambda: state["setting"])
    monkeypatch.setattr(pictures, "FIGURES", tmp_path / "figures")
    device = {"arch": "cuda:sm90", "multiprocessors": 132}
    monkeypatch.setattr(autotune, "this_gpu", lambda: (device, GPUTarget("cuda", 90, 32)))

    def compile_jobs(jobs, deadline):
        for problem, config, target in reversed(jobs):
            state["compiled"].append(configurations.key_of(problem, config))
            words = (
                f"{state['compiler']} {configurations.label(config)[:2]}"  # the same binary for any number of stages
            )
            yield (
                (problem, config, target),
                {"error": "CompilationError: no"}
                if config.num_warps == 16
                else {"registers": 40, "spills": 0, "shared": 0, "instructions": 100 + len(words), "binary": words},
            )

    def prepare(problem, config, arch):
        if config.kwargs == {"TILE_M": 32, "TILE_K": 64}:
            raise ValueError("does not launch\nand more")
        return problem, config

    def measure(run, best):
        problem, config = run
        if len(state["timed"]) >= state["stop"]:
            raise KeyboardInterrupt
        state["timed"].append(configurations.key_of(problem, config))
        spread = zlib.crc32(str((problem.num_expert_sqrt, configurations.label(config)[:2])).encode()) % 1000
        return [state["factor"] * (10 + spread / 10 + 0.01 * config.num_stages)] * 3

    for name, function in (("compile_jobs", compile_jobs), ("prepare", prepare), ("measure", measure)):
        monkeypatch.setattr(autotune, name, function)
    return state


def test_every_configuration_is_a_job_once():
    jobs = configurations.all_jobs()
    keys = [configurations.key_of(*job) for job in jobs]
    assert len(set(keys)) == len(keys)
    assert keys == [configurations.key_of(*job) for job in configurations.all_jobs()]
    for problem in configurations.PROBLEMS:
        found = {key[4:] for key in keys if key[:4] == problem}
        if problem.kernel in configurations.N2_KERNELS:
            lists = [autotune.configs.get_configs(name, problem.kernel)
                     for name, lists in autotune.configs.SPACES.items() if problem.kernel in lists]  # fmt: skip
        else:
            lists = [autotune.configs.get_configs("factored", problem.kernel)]
        assert found == {configurations.label(config) for configs in lists for config in configs}
    assert {job[0] for job in jobs[: len(configurations.PROBLEMS)]} == set(
        configurations.PROBLEMS
    )  # all problems from the start


def test_a_run_records_every_configuration_and_a_second_adds_nothing(gpu, capsys):
    autotune.run_study(problems=PROBLEMS)
    rows = tables.read("autotune")
    assert configurations.keys_of(rows) == {configurations.key_of(*job) for job in configurations.all_jobs(PROBLEMS)}
    assert len(rows) == 90 + 147
    errors = rows.dropna(subset="error").set_index(configurations.KEY)["error"]
    assert set(errors) == {
        "CompilationError: no",
        "ValueError: does not launch",
    }
    assert rows["time_us"].notna().sum() == len(gpu["timed"]) == len(rows) - len(errors)
    assert (rows["gpu"] == GPU).all()

    timed = len(gpu["timed"])
    autotune.run_study(problems=PROBLEMS)
    assert len(tables.read("autotune")) == len(rows)
    assert len(gpu["timed"]) == timed
    assert f"{GPU}: 0 measured and kept" in capsys.readouterr().out


def test_what_was_measured_before_a_stop_is_kept_and_gone_on_from(gpu, capsys):
    gpu["stop"] = 7
    autotune.run_study(problems=PROBLEMS)
    assert "Stopped." in capsys.readouterr().out
    first = tables.read("autotune")
    assert first["time_us"].notna().sum() == 7
    autotune_pictures.draw_here()
    assert "MEASURED_SPACE = {" in capsys.readouterr().out
    gpu["stop"] = math.inf
    autotune.run_study(problems=PROBLEMS)
    whole = tables.read("autotune")
    assert len(whole) == 237
    assert not whole.duplicated(configurations.KEY).any()
    pd.testing.assert_frame_equal(whole.head(len(first))[list(first)], first, check_dtype=False)


def test_the_time_is_over(gpu):
    autotune.run_study(minutes=0, problems=PROBLEMS)
    assert not gpu["timed"]
    assert tables.read("autotune")["error"].notna().all()  # found by compiling; nothing stands for what was not timed


@pytest.mark.parametrize("changed", ["gpu", "triton"])
def test_another_gpu_or_triton_is_measured_anew_and_not_mixed(gpu, changed):
    autotune.run_study(problems=PROBLEMS[:1])
    gpu["setting"][changed] = "another"
    autotune.run_study(problems=PROBLEMS[:1])
    assert len(tables.read("autotune")) == 2 * 90
    rows = autotune_report.recorded_rows("autotune")
    assert len(rows) == (2 * 90 if changed == "gpu" else 90)
    assert set(rows[changed]) == ({GPU, "another"} if changed == "gpu" else {"another"})


def test_what_compiles_to_another_binary_is_measured_anew(gpu):
    autotune.run_study(problems=PROBLEMS[:1])
    failed = tables.read("autotune")["error"].eq("CompilationError: no").sum()
    gpu["setting"] |= {"torch": "another", "commit": "another"}  # which no kernel is made of
    gpu["compiler"] = "another"
    autotune.run_study(problems=PROBLEMS[:1])
    assert len(tables.read("autotune")) == 2 * 90 - failed
    rows = autotune_report.recorded_rows("autotune")
    assert len(rows) == 90
    assert rows["binary"].dropna().str.startswith("another").all()


def test_a_short_run_of_another_triton_does_not_replace_the_whole_record(gpu):
    autotune.run_study(problems=PROBLEMS[:1])
    gpu["setting"]["triton"], gpu["stop"] = "another", len(gpu["timed"]) + 3
    autotune.run_study(problems=PROBLEMS[:1])
    assert set(autotune_report.recorded_rows("autotune")["triton"]) == {"3"}


def test_no_gpu():
    if autotune.torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RuntimeError, match="PyTorch finds none here"):
        autotune.run_study(problems=PROBLEMS)


def test_a_folder_that_cannot_be_written_to(gpu, monkeypatch):
    def fail(path, *_, **__):
        raise OSError(28, "No space left on device", str(path))

    autotune.run_study(problems=PROBLEMS[:1])
    before = tables.read("autotune")
    monkeypatch.setattr(pd.DataFrame, "to_csv", lambda self, path, **_: fail(path))
    with pytest.raises(OSError, match=r"No space left on device: .*autotune\.csv"):
        autotune.run_study(problems=PROBLEMS)
    pd.testing.assert_frame_equal(tables.read("autotune"), before)


def test_no_folder_to_write_to_is_known_before_anything_is_measured(gpu, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(tables, "DATA", tmp_path / "file" / "data")
    with pytest.raises(NotADirectoryError, match="file"):
        autotune.run_study(problems=PROBLEMS)
    assert not gpu["compiled"]


def test_verifying_prints_the_rank_correlation_and_keeps_nothing(gpu, capsys):
    autotune.run_study(problems=PROBLEMS)
    count = len(tables.read("autotune"))
    gpu["factor"] = 1.5
    autotune.verify()
    printed = capsys.readouterr().out
    assert "backward, 1024 tokens, N = 64                     1.000" in printed
    assert "time again / time on record: median 1.500" in printed
    assert len(tables.read("autotune")) == count


def test_a_host_that_stumbles_is_not_recorded(monkeypatch):
    slow, once_fast = [800.0, 900.0, 850.0, 810.0, 820.0], [900.0, 800.0, 900.0, 7.0, 900.0]
    spread, above, good = [0.1, 0.005, 0.2], [0.05, 0.045, 0.055], [0.006, 0.005, 0.007]
    samples = iter([*once_fast, *once_fast, *slow, *once_fast, *slow, *slow])
    medians = iter([spread, above, good, spread, spread, [0.2, 0.1, 0.3], good])
    monkeypatch.setattr(autotune.timing, "once", lambda run: next(samples))
    monkeypatch.setattr(autotune.timing, "do_bench", lambda run, **_: next(medians))
    assert autotune.measure("run", best=6.0) == [6.0, 5.0, 7.0]
    assert autotune.measure("run", best=6.0) == [200.0, 100.0, 300.0]
    assert autotune.measure("run", best=6.0) == [6.0, 5.0, 7.0]  # after five slow samples in a row
    assert autotune.measure("run", best=6.0) == [800.0] * 3


def test_a_tuner_that_believes_a_busy_host_keeps_another_configuration(gpu, monkeypatch):
    """Two configurations; a benchmark that takes the host's time beside another thread, one that does not."""
    configs = [tuner.configs.get_configs("original", "fwd_split")[index] for index in (0, 1)]
    times = dict(zip(map(configurations.label, configs), (28.0, 10.0), strict=True))

    def is_busy():
        return "python beside" in [thread.name for thread in threading.enumerate()]

    def of_the_host(run, quantiles):
        return [0.1 if is_busy() else run / 1000 for _ in quantiles]

    def of_the_gpu(run, quantiles):
        return [run / 1000 for _ in quantiles]

    monkeypatch.setattr(tuner, "candidates", lambda: configs)
    monkeypatch.setattr(tuner, "prepare", lambda problem, config, arch: times[configurations.label(config)])
    monkeypatch.setattr(tuner.timing, "kernel_us", lambda calls: calls)
    monkeypatch.setattr(tuner, "BENCHMARKS", {"host's": of_the_host, "GPU's": of_the_gpu})
    tuner.record("binary")
    assert not is_busy()
    rows = training_report.recorded("tuner", *tuner.KEYS)
    assert len(rows) == 2 * 2 * 2 and set(rows.kernel) == {"fwd_split"}
    _, _, *lines = autotune_pictures.tuner_table(rows).splitlines()
    kept = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    best, other = ([tile, str(warps)] for tile, warps, _ in map(configurations.label, configs[::-1]))
    assert kept == [
        ["`host's`", "alone", *best, "10", "10", "1.00"],
        ["`GPU's`", "alone", *best, "10", "10", "1.00"],
        ["`host's`", "beside a thread that runs Python", *other, "100", "28", "2.80"],
        ["`GPU's`", "beside a thread that runs Python", *best, "10", "10", "1.00"],
    ]
    assert len(autotune_pictures.draw_tuner(rows).axes) == 2
    plt.close("all")


def test_verifying_without_time_finds_nothing(gpu, capsys):
    autotune.run_study(problems=PROBLEMS)
    autotune.verify(minutes=0)
    assert "all, 0 " in capsys.readouterr().out


class EndsTheProcess:
    """Unpickling it ends the process that does."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_compiler_that_crashes_or_hangs_is_an_error_of_its_configuration(monkeypatch):
    assert [outcome for _, outcome in compiling.compile_jobs([EndsTheProcess()])] == [{"error": "the compiler crashed"}]
    monkeypatch.setattr(compiling, "COMPILE_LIMIT", 0)
    ((job, outcome),) = compiling.compile_jobs([(PROBLEMS[0], None, None)])
    assert job[0] == PROBLEMS[0]
    assert outcome == {"error": "not compiled within 0 s"}
    assert list(compiling.compile_jobs([(PROBLEMS[0], None, None)], deadline=-math.inf)) == []


def test_every_kernel_of_the_study_compiles_without_a_gpu():
    """Also that stages change nothing on NVIDIA GPUs, which is why tuning drops them."""
    few = {}
    for problem in configurations.COMPILED_PROBLEMS:
        own = configurations.every_config(problem.kernel)
        one = own[-1] if problem.kernel == "lanes" else own[0]  # what compiles fast
        few[problem] = [config for config in own if configurations.label(config)[:2] == configurations.label(one)[:2]]
    rows = compiling.compile_table(("cuda:sm90",), only=lambda problem, config: config in few[problem])
    assert "error" not in rows
    assert (rows[["registers", "instructions", "occupancy"]] > 0).all().all()
    binaries = rows.groupby("kernel")["binary"]
    assert binaries.size().to_dict() == {problem.kernel: len(configs) for problem, configs in few.items()}
    assert binaries.size()["fwd"] == 3
    assert (binaries.nunique() == 1).all()

    rows = compiling.compile_table(
        ("hip:gfx942",), [PROBLEMS[0]], only=lambda _, config: config in few[PROBLEMS[0]][:1]
    )
    assert (rows[["registers", "instructions", "occupancy"]] > 0).all(axis=None)


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "num_warps", "programs"),
    [
        ("cuda:sm90", 32, 0, 4, 16),  # 64 warps
        ("cuda:sm86", 32, 0, 1, 16),  # 16 programs
        ("cuda:sm90", 255, 0, 4, 2),  # 65536 registers
        ("cuda:sm80", 33, 0, 4, 12),  # in steps of 256 a warp
        ("cuda:sm120", 32, 50 * 1024, 4, 1),
        ("hip:gfx942", 128, 0, 4, 4),
        ("hip:gfx942", 16, 40 * 1024, 4, 1),
    ],
)
def test_occupancy(arch, registers, shared, num_warps, programs):
    assert compiling.occupancy(arch, registers, shared, num_warps) == programs
    assert math.isnan(compiling.occupancy("cuda:sm75", registers, shared, num_warps))


def test_the_analysis(gpu):
    autotune.run_study()
    rows = autotune_report.of_gpu(autotune_report.recorded_rows("autotune"))
    gains = autotune_report.gains(rows)
    assert len(gains) == sum(problem.kernel in configurations.N2_KERNELS for problem in configurations.PROBLEMS)
    assert (gains["general gain %"] >= 0).all()  # the original lists are a part of the general ones
    assert (gains["pruned µs"] >= gains["general µs"]).all()
    choices = autotune_report.choices(rows)
    assert (choices["time / best"] >= 1).all()
    assert (choices["best µs"] <= gains[["general µs", "architecture µs"]].min(axis=1)).all()  # few warps may be better
    assert autotune_report.tries_table(rows).loc["forward, 1024 tokens, N = 64", "original, tries"].endswith(" of 4")
    rules = autotune_report.rules(rows)
    assert len(rules) == len(configurations.PROBLEMS) - len(gains)
    assert (rules["time / best"].dropna() >= 1).all()
    assert ("–" in set(rules["chosen"])) == autotune.configs.interpreting()  # there tiles are larger than any list has
    assert len(set(rules["chosen"])) > 1
    for problem in autotune_report.problems_of(rows):
        times = autotune_report.times_of(rows, problem)
        curve = autotune_report.regret(times, min(times.values()))
        assert len(curve) == len(times)
        assert curve[-1] == 1
        assert (curve[1:] <= curve[:-1]).all()
    matrix = autotune_report.transfer(rows, "bwd")
    assert [matrix.iloc[i, i] for i in range(len(matrix))] == [1] * len(matrix)
    assert (matrix >= 1).all().all()
    assert len(autotune_report.noise(rows)) > 100
    assert autotune_report.noise(rows).between(1, 1.01).all()
    assert set(autotune_report.noise_table(rows).index) == {"fwd", "fwd_split", "bwd"}
    assert autotune_report.correlations(rows).loc["backward, 1024 tokens, N = 64"].dropna().between(-1, 1).all()
    rule = autotune_report.prediction_rule(rows)
    assert (rule["kept"] <= rule["binaries"]).all()
    assert (rule["best kept / best"] >= 1).all()
    kernels = autotune_report.rule_by_kernel(rows)
    assert kernels["problems"].sum() == len(rule)
    assert kernels["kept"].sum() == rule["kept"].sum()
    assert kernels["best kept / best, at worst"].max() == rule["best kept / best"].max()


@pytest.mark.parametrize("kernel", ["lanes", "fwd"])
def test_what_is_not_on_record_is_not_drawn(gpu, kernel, capsys):
    problems = [next(problem for problem in configurations.PROBLEMS if problem.kernel == kernel)]
    autotune.run_study(problems=problems)
    rows = autotune_report.of_gpu(autotune_report.recorded_rows("autotune"))
    made = {"lanes": ["gains", "choices"], "fwd": ["rules"]}[kernel]
    drawn = {"lanes": ["draw_gains", "draw_distribution"], "fwd": ["draw_transfer"]}[kernel]
    for table in made:
        assert autotune_pictures.told(getattr(autotune_report, table), rows) == autotune_pictures.NOTHING
    capsys.readouterr()
    for name in drawn:
        autotune_pictures.show(getattr(autotune_pictures, name), rows, name=name)
    autotune_pictures.show(autotune_pictures.draw_heat_map, rows, PROBLEMS[1], name="heat")
    autotune_pictures.show(autotune_pictures.draw_regret, rows, [PROBLEMS[1]], name="regret")
    assert capsys.readouterr().out == f"{autotune_pictures.NOTHING}\n" * (len(drawn) + 2)
    for table in (autotune_report.tries_table, autotune_report.prediction_rule):
        assert autotune_pictures.told(table, rows).count("tokens, N =") == 1


def test_the_pasted_lists_hold_a_good_configuration_for_every_problem(gpu, monkeypatch):
    autotune.run_study()
    rows = autotune_report.of_gpu(autotune_report.recorded_rows("autotune"))
    name, lists = autotune_report.paste(rows).split(" = ", 1)
    assert name == "MEASURED_SPACE"
    monkeypatch.setitem(autotune.configs.SPACES, "measured", ast.literal_eval(lists))
    for problem in autotune_report.problems_of(rows):
        candidates = autotune.configs.get_configs("measured", problem.kernel)
        times = autotune_report.times_of(rows, problem, candidates)
        assert min(times.values()) <= 1.02 * min(autotune_report.times_of(rows, problem).values())


def test_the_measured_lists_hold_a_good_configuration_for_every_recorded_problem(monkeypatch):
    monkeypatch.setattr(tables, "DATA", tables.RECORDED)
    held = autotune_report.measured_list(autotune_report.of_gpu(autotune_report.recorded_rows("autotune")))
    assert list(held.index) == [configurations.title(problem) for problem in configurations.PROBLEMS]
    assert (held["configurations"] < held["of"]).all()
    assert held["time / best"].between(1, 1.02).all()
    kernels = autotune_report.measured_by_kernel(autotune_report.of_gpu(autotune_report.recorded_rows("autotune")))
    assert list(kernels.index) == list(configurations.NAMES.values())


def test_an_architecture_without_measured_lists(gpu):
    autotune.run_study(problems=PROBLEMS)
    rows = autotune_report.of_gpu(autotune_report.recorded_rows("autotune")).assign(arch="cuda:sm80")
    assert autotune_report.measured_list(rows).empty


def test_the_pictures(gpu, tmp_path, capsys):
    autotune_pictures.draw_here()
    assert capsys.readouterr().out == f"No times of {GPU} are on record.\n"
    autotune.run_study()
    rows = autotune_report.of_gpu(autotune_report.recorded_rows("autotune"))
    for problem in configurations.COMPILED_PROBLEMS[:1]:
        pictures.save_figure(autotune_pictures.draw_heat_map(rows, problem), f"heat_{problem.kernel}")
    pictures.save_figure(autotune_pictures.draw_regret(rows, autotune_report.problems_of(rows)[:3]), "regret")
    pictures.save_figure(autotune_pictures.draw_correlations(rows), "correlations")
    pictures.save_figure(autotune_pictures.draw_transfer(rows), "transfer")
    autotune_pictures.show(autotune_pictures.draw_gains, rows, name="gains")
    assert "general gain %" in autotune_pictures.told(autotune_report.gains, rows)
    capsys.readouterr()
    autotune_pictures.show(autotune_pictures.draw_gains, rows[:0], name="nothing")
    assert capsys.readouterr().out == f"{autotune_pictures.NOTHING}\n"
    gpu["setting"]["gpu"], gpu["factor"] = "another", 2.0
    autotune.run_study(problems=PROBLEMS)
    autotune_pictures.draw_here()
    drawn = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert drawn == {"heat_fwd", "regret", "correlations", "transfer", "gains", "autotune_here", "autotune_two_gpus"}
    assert "MEASURED_SPACE = {" in capsys.readouterr().out
