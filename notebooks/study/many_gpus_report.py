"""Notebook 06's tables and pictures of what many_gpus.py has measured."""

import matplotlib.pyplot as plt

from . import pictures, reports
from .many_gpus import LINK, LINKS, SPREAD, TARGETS
from .pictures import BLUE, GREEN, ORANGE


def targets_table(rows):
    """What became of the targets, of one GPU's last run."""
    lines, times = [], rows.drop_duplicates(["case", "num_expert_sqrt", "rival"], keep="last")
    times = times.set_index(["case", "num_expert_sqrt", "rival"]).us
    for case, n, ours, other, reach, stretch in TARGETS:
        if (case, n, ours) in times.index and (case, n, other) in times.index:
            us, other_us = times[case, n, ours], times[case, n, other]
            lines.append((case, str(n), ours, reports.microseconds(us), other, reports.microseconds(other_us),
                          reports.number(us / other_us, ".2f"), str(reach), str(stretch or "")))  # fmt: skip
    return reports.markdown(["case", "N", "", "µs", "over", "µs", "times", "reach", "stretch"], lines)


def link_table(rows):
    """What travels between two GPUs, and how fast."""
    rows = rows[rows.case.eq(LINKS) | rows.rival.isin([LINK, SPREAD])]
    lines = []
    for row in rows.itertuples():
        speeds = f"{1e3 * row.megabytes / row.us:.3g}"
        lines.append((row.rival, f"{1e6 * row.megabytes:,.0f}", reports.microseconds(row.us), speeds, row.check))
    return reports.markdown(["", "a GPU sends, bytes", "µs", "GB/s, each way", "result"], lines)


def draw_targets(rows):
    """Pairs of bars, what is compared and what with, and how many times the one is the other; a panel for each GPU."""
    figure, panels = pictures.panel_for_each_gpu(rows, width=9, height=5)
    for axes, (_, group) in zip(panels, rows.groupby("gpu", sort=False), strict=True):
        times = group.drop_duplicates(["case", "num_expert_sqrt", "rival"], keep="last")
        times, labels = times.set_index(["case", "num_expert_sqrt", "rival"]).us, []
        for case, n, ours, other, reach, _ in TARGETS:
            if (case, n, ours) not in times.index or (case, n, other) not in times.index:
                continue
            place = len(labels)
            for offset, name, color in ((-0.2, ours, GREEN), (0.2, other, ORANGE)):
                axes.barh(place + offset, times[case, n, name], height=0.38, color=color)
                axes.text(times[case, n, name], place + offset, f" {name}", va="center", fontsize=8)
            ratio = times[case, n, ours] / times[case, n, other]
            labels.append(f"{case}, N = {n}\n{ratio:.2f}×, to reach {reach}×")
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.set(xscale="log", xlabel="µs", title=pictures.fixed(group), xlim=(times.min() / 2, times.max() * 20))
        axes.invert_yaxis()
        axes.grid(False, axis="y")
    return pictures.finish(figure)


def draw_link(rows):
    """The time of a message against its size, and what becomes of it when something else travels too."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for gpu, group in rows.groupby("gpu", sort=False):
        messages = group[group.case == LINKS].sort_values("megabytes")
        axes.plot(messages.megabytes, messages.us, marker="o", color=BLUE, label=f"all-to-all, {gpu}")
        for name, color, marker in ((LINK, ORANGE, "s"), (SPREAD, GREEN, "D")):
            points = group[group.rival == name]
            axes.scatter(points.megabytes, points.us, color=color, marker=marker, label=f"{name}, {gpu}", zorder=3)
    axes.set(xscale="log", yscale="log", xlabel="MB that a GPU sends to the other", ylabel="µs")
    axes.legend(fontsize=8)
    return pictures.finish(figure)
