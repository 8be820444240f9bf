"""What measures two GPUs runs in two processes on the CPU; its rows are those that targets, pictures and paper read."""

import importlib
import itertools
import pathlib
import sys

import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

from omni_kernels import sharded

pytest.importorskip("seaborn")
pd = pytest.importorskip("pandas")
plt, text = (pytest.importorskip(f"matplotlib.{name}") for name in ("pyplot", "text"))
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "notebooks"))
many_gpus, many_gpus_report, tables, traffic, traffic_pictures = (
    importlib.import_module(f"study.{name}")
    for name in ("many_gpus", "many_gpus_report", "tables", "traffic", "traffic_pictures")
)

LAYER = traffic.Layer(num_expert_sqrt=16384, k=16, hidden=1024, num_tokens=16384)


@pytest.fixture
def rows():
    """A time for everything that has a target, on two GPUs, and messages of 50 µs and 200 GB/s."""
    found = {}
    for case, n, ours, other, *_ in many_gpus.TARGETS:
        for rival, us in ((ours, 30.0), (other, 100.0)):
            found[case, n, rival] = {
                "us": us,
                "check": "equal",
                "megabytes": 1.5 if case == many_gpus.EXPERTS else None,
            }
    for size, us in ((8, 50.0), (1 << 28, (1 << 28) / 2e5)):
        found[many_gpus.LINKS, 0, f"{size} bytes"] = {"us": us, "check": "equal", "megabytes": size / 1e6}
    names = "case", "num_expert_sqrt", "rival"
    run = {"torch": "2.0", "triton": "3.0", "commit": "abc", "date": "2030-01-02"}
    return pd.DataFrame(
        [
            {"gpu": gpu, **dict(zip(names, of, strict=True)), **row, **run}
            for gpu in ("A GPU", "B GPU")
            for of, row in found.items()
        ]
    )


@pytest.fixture
def drawn():
    yield
    plt.close("all")


def texts(figure):
    return " ".join(part.get_text() for part in figure.findobj(text.Text))


def test_two_processes_measure_all_that_has_a_target(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rows = pd.DataFrame(many_gpus.rows_of(many_gpus.SMALL, "gloo"))
    assert set(rows.check) == {"equal", "near"} and (rows.us > 0).all()
    targets = {(case, rival) for case, _, *rivals, _, _ in many_gpus.TARGETS for rival in rivals}
    on_gpus = {(case, rival) for case, rival in targets if rival.endswith(many_gpus.KERNEL)}
    assert targets - on_gpus <= set(zip(rows.case, rows.rival, strict=True))
    messages = rows[rows.case == many_gpus.LINKS]
    assert (1e6 * messages.megabytes).round().tolist() == list(many_gpus.SMALL.messages)


def test_measuring_says_why_it_does_not(monkeypatch, tmp_path):
    def fail(*_):
        raise ProcessRaisedException("\n\n-- Process 1 terminated\nTraceback\nRuntimeError: no link\n", 1, 1)

    monkeypatch.setattr(tables, "DATA", tmp_path)
    monkeypatch.setattr(many_gpus, "rows_of", fail)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert many_gpus.measure(again=True) == "not measured: fewer than two GPUs here"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert many_gpus.measure(again=True) == "not measured: RuntimeError: no link"
    assert list(tmp_path.iterdir()) == []


def test_targets_compare_the_last_run():
    of = {"case": many_gpus.FACTORS, "num_expert_sqrt": 4096}
    rows = [{**of, "rival": many_gpus.GATHER, "us": us} for us in (9.0, 100.0)]
    table = many_gpus_report.targets_table(pd.DataFrame([*rows, {**of, "rival": many_gpus.EXCHANGE, "us": 30.0}]))
    assert len(table.splitlines()) == 3 and "| 0.30 | 0.35 | 0.2 |" in table


def moved(mesh, k, n):
    """A function as a notebook would define it."""
    from study.many_gpus import Sent
    from torch import zeros
    from torch.distributed.tensor import DTensor, Shard

    from omni_kernels import sharded_router

    logits = [DTensor.from_local(zeros(5, n // mesh.size()), mesh, [Shard(1)], run_check=False) for _ in "xy"]
    with Sent() as sent:
        sharded_router(*logits, k)
    return {"rank": mesh.get_rank(), "bytes": sent.bytes / 5}


def test_functions_run_together_and_send_what_the_rule_counts(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for n, exchanges in ((34, True), (32, False)):
        ranks = many_gpus.together(moved, 2, n)
        assert [found["rank"] for found in ranks] == [0, 1]
        assert traffic.pays(n, 2, 2) is exchanges
        want = traffic.exchanged(2, 2, size=4) if exchanges else traffic.gathered(n, 2, size=4)
        assert [found["bytes"] for found in ranks] == [want] * 2


def fails(mesh):
    raise ValueError(f"nothing on rank {mesh.get_rank()}")


def test_a_failure_in_a_process_is_raised():
    with pytest.raises(ProcessRaisedException, match="nothing on rank"):
        many_gpus.together(fails)


@pytest.mark.parametrize(("k", "num_ranks"), [(1, 2), (16, 2), (16, 8), (64, 3)])
def test_candidates_are_exchanged_where_they_are_a_part_of_the_bytes(k, num_ranks):
    least = traffic.break_even(k, num_ranks)
    assert [traffic.pays(n, k, num_ranks) for n in (least - 1, least, 2 * least)] == [False, True, True]
    for size in (2, 4):
        moved = traffic.exchanged(k, num_ranks, size)
        gathered = [traffic.gathered(n, num_ranks, size) / sharded.WORTH for n in (least - 1, least)]
        assert gathered[0] <= moved * (1 + 1e-12) and moved < gathered[1]


@pytest.mark.parametrize(("k", "num_ranks"), [(1, 2), (3, 2), (4, 3)])
def test_a_token_visits_the_ranks_of_its_experts(k, num_ranks):
    """Of all ways to choose k ranks: those other than rank 0."""
    choices = list(itertools.product(range(num_ranks), repeat=k))
    want = sum(len(set(choice) - {0}) for choice in choices) / len(choices)
    assert traffic.visited(k, num_ranks) == pytest.approx(want)
    assert traffic.spread(k, num_ranks, 10, size=2) == pytest.approx(want * 10 * (2 + 4))


def test_latency_and_bandwidth_are_those_of_the_last_run(rows):
    assert traffic.link_of(pd.DataFrame()) == traffic.link_of(rows[rows.case == many_gpus.TOKENS]) == traffic.EXAMPLE
    again = rows[rows.gpu == "A GPU"].assign(us=lambda found: 2 * found.us)
    link = traffic.link_of(pd.concat([rows, again]))
    assert (link.latency_us, link.gbs) == pytest.approx((100.0, 100.0)) and "A GPU" in link.source


def test_paper_has_both_ways_and_what_a_rank_owns():
    link = traffic.Link(10.0, 100.0, "")
    assert traffic.milliseconds(1e6, 2, 3, link) == pytest.approx((0.04, 0.04))
    assert traffic.milliseconds(1e6, 8, 1, link) == pytest.approx((0.02, 0.08))
    least, most = traffic.milliseconds(1e6, 15, 1, link)  # half of it from the other host, at 50 GB/s
    assert (least, most) == pytest.approx((0.02, 0.15))
    *_, eight, many = traffic.paper(LAYER, (8, 4096), link).splitlines()
    assert eight.count("0.875, exchange") == 2 and eight.endswith("| 137 |")
    assert many.startswith("| 4096 | 64, gather |") and "0.875, exchange" in many


def test_measured_pictures_show_every_target_and_message(rows, drawn):
    figure = many_gpus_report.draw_targets(rows)
    assert [len(axes.patches) for axes in figure.axes] == [2 * len(many_gpus.TARGETS)] * 2
    assert "0.30×, to reach 0.35×" in texts(figure)
    (axes,) = many_gpus_report.draw_link(rows).axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[50.0, (1 << 28) / 2e5]] * 2
    assert len(axes.collections) == 4
    assert "| 268,435,456 | 1,342 | 200 | equal |" in many_gpus_report.link_table(rows[rows.gpu == "A GPU"])


def test_drawn_bytes_are_those_of_the_formulas(drawn):
    said = texts(traffic_pictures.draw_shardings(LAYER))
    assert all(part in said for part in ("nothing", "32 keys each way,\n128 bytes", "2048 bytes", "4096 bytes"))
    left, right = traffic_pictures.draw_break_even(1024, 16, [2, 4, 8], (8, 16)).axes
    candidates, logits, chosen = (line.get_ydata().tolist() for line in left.lines)
    assert candidates == [128, 384, 896] and logits == [2048, 3072, 3584] and chosen == [128, 384, 3584]
    assert [line.get_ydata().tolist() for line in right.lines] == [[129, 257, 513], [257, 513, 1025]]
    (axes,) = traffic_pictures.draw_paper(LAYER, [8, 4096]).axes
    spread, logits, candidates = (line.get_ydata().tolist() for line in axes.lines[:3])
    assert candidates[0] < spread[0] < logits[0] and logits[1] < spread[1] < candidates[1]
