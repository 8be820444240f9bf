"""Tables and pictures of what calls.py and first_calls.py have measured: calls from Python, and first calls."""

import math

import numpy as np

from . import pictures, reports, rivals
from .calls import ADD, CASE, COMPILED, FACTORED, OMNI, PUBLIC, RATIOS, TOPK
from .pictures import BLUE, GREEN, ORANGE, RED


def calls_table(rows):
    """Every call of one GPU."""
    return _table(rows[rows.kind == "call"], "call")


def parts_table(rows):
    """The parts of a call of one GPU."""
    return _table(rows[rows.kind == "part"], "part")


def _table(rows, kind):
    lines = [(f"`{row.rival}`" if row.rival in (ADD, TOPK) else row.rival,
              row.error if isinstance(row.error, str) else reports.microseconds(row.us),
              f"{reports.microseconds(row.us_10)} to {reports.microseconds(row.us_90)}")
             for row in rows.itertuples()]  # fmt: skip
    return reports.markdown([kind, "µs", "10% to 90% of the rounds"], lines)


def ratios_table(rows):
    """omni_router beside what PyTorch takes, of one GPU, and how many times that it is."""
    times = rows.set_index("rival").us
    lines = [(ours, reports.microseconds(times[ours]), other, reports.microseconds(times[other]),
              reports.number(times[ours] / times[other], ".2f"))
             for ours, other in RATIOS.items()]  # fmt: skip
    of = f"a call, {CASE.num_tokens} tokens, N = {CASE.num_expert_sqrt}, k = {CASE.k}, {CASE.dtype}"
    return reports.markdown([of, "µs", "over", "µs", "times"], lines)


def cpu_table(rows):
    """omni_router beside the composition that people write, on one CPU."""
    lines = []
    for case, group in rows.groupby(rivals.CASE, sort=False):
        times = group.set_index("rival").us
        lines.append((*case, reports.microseconds(times[OMNI]), reports.microseconds(times[FACTORED]),
                      reports.number(times[OMNI] / times[FACTORED], ".2f")))  # fmt: skip
    return reports.markdown(["tokens", "N", "k", "dtype", f"`{OMNI}`, µs", f"{FACTORED}, µs", "times"], lines)


def draw_calls(rows):
    """A bar for every call; a panel for every GPU."""
    rows = rows[rows.kind == "call"].dropna(subset="us")
    figure, panels = pictures.panel_for_each_gpu(rows, width=7.5, height=6.2)
    colors = {OMNI: GREEN, COMPILED: GREEN, FACTORED: ORANGE, PUBLIC: RED}
    for axes, (_, group) in zip(panels, rows.groupby("gpu", sort=False), strict=True):
        places = np.arange(len(group))
        families = group.rival.map(lambda name: name.rsplit(", ", 1)[0])
        axes.barh(places, group.us, color=[colors.get(name, BLUE) for name in families], height=0.75)
        for place, us in zip(places, group.us, strict=True):
            axes.text(us, place, f" {reports.microseconds(us)}", va="center", fontsize=9)
        axes.set(
            xlabel="µs a call, as the host issues it", title=pictures.fixed(group), xlim=(0, group.us.max() * 1.12)
        )
        axes.set_yticks(places, group.rival)
        axes.invert_yaxis()
        axes.grid(False, axis="y")
    return pictures.finish(figure)


# --- first calls ---


def first_calls_table(rows):
    """First calls of one GPU with an empty and with a warm cache on disk, and what another token count costs after the
    first of them: at once, and when what the first has left to the background is compiled."""
    lines = []
    for (name, *case), group in rows.groupby(["rival", *rivals.CASE], sort=False):
        by_cache = group.set_index("cache").reindex(["cold", "warm"])
        cold, warm = by_cache.loc["cold"], by_cache.loc["warm"]
        if isinstance(cold.error, str):
            lines.append((name, *case, cold.error, *"–" * 4))
            continue
        first, again, at_once, later = map(_duration, (cold.first_s, warm.first_s, cold.other_s, warm.later_s))
        lines.append((name, *case, first, again, reports.number(cold.other_tokens, ".0f"), at_once, later))
    return reports.markdown(["rival", "tokens", "N", "k", "dtype", "empty cache", "warm cache", "then with tokens",
                           "at once", "later"], lines)  # fmt: skip


def _duration(seconds):
    if math.isnan(seconds):
        return "–"
    return f"{1e3 * seconds:.2g} ms" if seconds < 0.1 else f"{seconds:.3g} s"
