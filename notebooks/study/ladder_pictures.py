"""What shows a kernel: the networks it sorts with, who owns which keys, and excerpts of its source."""

import ast
import inspect
import pathlib

import matplotlib.pyplot as plt
import seaborn as sns
from IPython.display import Markdown
from matplotlib.patches import Rectangle

from omni_kernels.factored import networks

from .pictures import BLUE, GREEN, ORANGE

MOST_LINES = 25  # that a reader takes in at once

# --- networks ---


def network_of(kind, count, first=0, k=None):
    """The comparators of a network of the kernels, and the wires where its k best keys are, as networks.py makes them.

    kind: "sort", "merge", "bitonic" or "best of"; "merge best" is what merge_best does with two lists as long as k.
    """
    if kind == "merge best":
        meet, wires = networks._network("best of", count, first, first)
        settle, order = networks._network("bitonic", first, 0, first)
        return meet + [(wires[i], wires[j]) for i, j in settle], [wires[place] for place in order]
    return networks._network(kind, count, first, k or count)


def steps_of(comparators):
    """The step at which each comparator can run, from 0: as soon as both of its wires are free."""
    free, steps = {}, []
    for i, j in comparators:
        steps.append(max(free.get(i, 0), free.get(j, 0)))
        free[i] = free[j] = steps[-1] + 1
    return steps


def draw_network(kind, count, first=0, k=None, axes=None):
    """Keys come in at the left, one a wire; each vertical line leaves the larger of two on the wire with the filled
    end. Comparators of one shade run at the same time."""
    comparators, outputs = network_of(kind, count, first, k)
    axes = axes or plt.subplots(figsize=(9, 0.22 * count + 1))[1]
    steps, place = steps_of(comparators), 0.0
    for step in range(max(steps, default=-1) + 1):
        lanes = []  # the lowest wire that each column of this step has been drawn down to
        pairs = [pair for pair, at in zip(comparators, steps, strict=True) if at == step]
        for i, j in sorted(pairs, key=min):
            column = next((n for n, lowest in enumerate(lanes) if lowest < min(i, j)), len(lanes))
            lanes[column : column + 1] = [max(i, j)]
            x, color = place + 0.35 * column, (BLUE, ORANGE)[step % 2]
            axes.plot([x, x], [i, j], color=color, linewidth=1.4, zorder=2, gid="comparator")
            axes.scatter([x, x], [i, j], s=22, color=[color, "white"], edgecolors=[color], zorder=3)
        place += 0.35 * len(lanes) + 0.5
    axes.hlines(range(count), -0.5, place, color="0.75", linewidth=0.8, zorder=1)
    for rank, wire in enumerate(outputs):
        axes.text(place + 0.1, wire, rank + 1, va="center", fontsize=8, color=GREEN, weight="bold")
    axes.set(xlim=(-0.6, place + 0.7), ylim=(count - 0.3, -0.7), xticks=[], yticks=range(count))
    axes.set_title(f"{kind} {count}: {len(comparators)} comparators in {max(steps, default=-1) + 1} steps")
    axes.grid(False)
    sns.despine(ax=axes, bottom=True, left=True)
    return axes.figure


# --- who owns what ---


def draw_owners(k=16, row_keys=256, lanes=32):
    """The registers of a warp, twice: where its lanes share a row, and where each has a row of its own."""
    figure, (shared, owned) = plt.subplots(1, 2, figsize=(9.6, 4.4), width_ratios=(row_keys // lanes + 4, k + 4))
    tokens = sns.color_palette("husl", lanes)
    _draw_registers(shared, lanes, row_keys // lanes, lambda lane: BLUE)
    shared.set_title(f"Rungs 3 to 5: a row a warp, N = {row_keys}")
    for lane in range(lanes):
        shared.annotate("", (row_keys // lanes + 1, lanes / 2), (row_keys // lanes + 0.1, lane + 0.5),
                        arrowprops={"arrowstyle": "-", "color": ORANGE, "linewidth": 0.6})  # fmt: skip
    shared.text(row_keys // lanes + 1.1, lanes / 2, "each maximum:\nall lanes\ntalk", va="center", fontsize=9)
    shared.set_xlabel(f"{row_keys // lanes} registers: keys of the token's row")
    _draw_registers(owned, lanes, k, lambda lane: tokens[lane])
    owned.set_title(f"Rung 6: a row a lane, k = {k}")
    owned.add_patch(Rectangle((0, 5), k, 1, fill=False, edgecolor="black", linewidth=2))
    owned.text(k + 0.2, 5.5, "a list: the keys\nof lane 5's token", va="center", fontsize=9)
    owned.add_patch(Rectangle((2, 0), 1, lanes, fill=False, edgecolor="black", linewidth=2, linestyle="--"))
    owned.text(2.5, lanes + 0.3, "best[2]: a tensor", ha="center", va="top", fontsize=9)
    owned.set_xlabel(f"\n{k} registers: the best keys so far; shared memory: none")
    figure.tight_layout()
    return figure


def _draw_registers(axes, lanes, registers, color_of):
    for lane in range(lanes):
        for register in range(registers):
            axes.add_patch(Rectangle((register, lane), 1, 1, facecolor=(*color_of(lane), 0.55), edgecolor="white"))
    axes.set(xlim=(-0.2, registers + 4), ylim=(lanes + 1.6, -0.2), xticks=[], ylabel="lane")
    axes.set_yticks([lane + 0.5 for lane in range(0, lanes, 8)], range(0, lanes, 8))
    axes.grid(False)
    sns.despine(ax=axes, bottom=True, left=True)


# --- source ---


def source_of(module_or_path, name, first=1, last=None):
    """The lines of a function or constant of a file, from the first to the last, counted from 1; the file's number of
    the first of them; and the file.

    Raises:
        ValueError: the file has nothing of that name.
    """
    path = inspect.getsourcefile(module_or_path) if inspect.ismodule(module_or_path) else module_or_path
    text = pathlib.Path(path).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        names = [getattr(node, "name", None), *(getattr(target, "id", None) for target in getattr(node, "targets", ()))]
        if name in names:
            start = min([node.lineno, *(part.lineno for part in getattr(node, "decorator_list", ()))])
            lines = text.splitlines()[start - 1 : node.end_lineno]
            return lines[first - 1 : last], start + first - 1, pathlib.Path(path)
    raise ValueError(f"name must be defined in {path}, got {name!r}")


def excerpt(module_or_path, name, first=1, last=None):
    """A function of a file as highlighted code, or its lines from the first to the last, under the place of them.

    Raises:
        ValueError: there are more lines than a reader takes in, or the file has nothing of that name.
    """
    lines, number, path = source_of(module_or_path, name, first, last)
    if len(lines) > MOST_LINES:
        raise ValueError(f"an excerpt must have at most {MOST_LINES} lines, got {len(lines)} of {name}")
    place = f"`{path.parent.name}/{path.name}`, line {number}"
    return Markdown("\n".join([place, "", "```python", *lines, "```"]))
