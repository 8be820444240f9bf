"""What all pictures have in common: colors, titles, labels, how they are kept, a panel for every GPU."""

import itertools
import platform

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib import ft2font

from .files import FIGURES, replacing, say_where

BLUE, ORANGE, GREEN, RED = (sns.color_palette("colorblind")[i] for i in (0, 1, 2, 3))
SCORES = sns.light_palette(BLUE, as_cmap=True)

# Nothing of a machine: its settings, or fonts that not every one has. Matplotlib ships DejaVu Sans.
plt.rcdefaults()
sns.set_theme(style="whitegrid", palette="colorblind", font="DejaVu Sans", font_scale=0.95)
plt.rcParams.update({"figure.dpi": 100, "savefig.dpi": 150, "axes.titleweight": "bold", "axes.titlelocation": "left"})

# What pixels hang on besides the tables: what draws them, and the text that some are of, which comes with Python.
MADE_WITH = {
    "Software": f"Matplotlib {matplotlib.__version__}, FreeType {ft2font.__freetype_version__}",
    "Source": f"Python {platform.python_version()}",
}


def write_figure(figure, name):
    """Keeps the picture as a file."""
    say_where()
    FIGURES.mkdir(parents=True, exist_ok=True)
    with replacing(FIGURES / f"{name}.png") as partial:
        figure.savefig(partial, format="png", bbox_inches="tight", metadata=MADE_WITH)


def save_figure(figure, name):
    """Keeps the picture as a file; the notebook shows it as well."""
    write_figure(figure, name)
    plt.show()


def panel_for_each_gpu(rows, width, height):
    count = rows.gpu.nunique()
    figure, panels = plt.subplots(1, count, figsize=(width * count, height), squeeze=False)
    return figure, panels[0]


def finish(figure):
    for axes in figure.axes:
        sns.despine(ax=axes)
    figure.tight_layout()
    return figure


def finish_labeled(figure):
    """`finish`, and the lines' labels beside them instead of a legend."""
    for axes in finish(figure).axes:
        label_lines(axes)
    return figure


def fixed(rows):
    """What is the same in all rows of a table, for a title: GPU, tokens, N, k, dtype."""
    forms = {"gpu": "{}", "num_tokens": "{:,} tokens", "num_expert_sqrt": "N = {}", "k": "k = {}", "dtype": "{}"}
    same = {column: form for column, form in forms.items() if column in rows and rows[column].nunique() == 1}
    return ", ".join(form.format(rows[column].iloc[0]) for column, form in same.items())


def label_lines(axes, size=8.5):
    """Writes the label of each line beside one of its points, where it covers no line and no other label: the last
    points are tried first. For when the layout is done."""
    figure = axes.figure
    figure.canvas.draw()
    point = figure.dpi / 72
    lines = [line for line in axes.lines if not line.get_label().startswith("_")]
    drawn = {line: line.get_transform().transform(line.get_xydata()) for line in lines}
    markers = 4 * point * np.mgrid[-1:1:3j, -1:1:3j].reshape(2, -1).T
    covered = [(line_places[:, None] + markers).reshape(-1, 2) for line_places in drawn.values()]
    covered = np.concatenate([*covered, *map(_along, drawn.values())])
    frame = axes.get_window_extent()
    margin = 60 * point if axes is figure.axes[-1] else 0  # at the right, where no other axes are
    for line in lines:
        text = axes.annotate(line.get_label(), (0, 0), (0, 0), "figure pixels", "offset points", fontsize=size,
                             color=line.get_color(), ha="center", va="center", annotation_clip=False,
                             bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5})  # fmt: skip
        extent = text.get_window_extent(figure.canvas.get_renderer())
        half, best = np.array([extent.width, extent.height]) / 2, None
        for place in _along(drawn[line], 4)[::-1]:
            for side in np.array([(0, 1), (0, -1), (1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1), (-1, 0)]):
                centre = place + side * (half + 6 * point)
                low, high = centre - half - point, centre + half + point
                outside = (low < frame.min).sum() + (high > frame.max + (margin, 0)).sum()
                cost = 1000 * outside + ((covered > low) & (covered < high)).all(1).sum()
                if best is None or cost < best[0]:
                    best = cost, place, centre
            if best[0] == 0:
                break
        _, place, centre = best
        text.xy, text.xycoords = line.get_transform().inverted().transform(place), line.get_transform()
        text.set_position((centre - place) / point)
        covered = np.concatenate([covered, centre + half * np.mgrid[-1:1:12j, -1:1:5j].reshape(2, -1).T])
    return figure


def _along(places, count=60):
    """The points of a line and `count` more on each of its segments, in order."""
    if len(places) == 1:
        return places
    steps = np.linspace(0, 1, count, endpoint=False)[:, None]
    parts = [before + (after - before) * steps for before, after in itertools.pairwise(places)]
    return np.concatenate([*parts, places[-1:]])
