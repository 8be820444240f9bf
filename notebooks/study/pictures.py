"""What all pictures have in common: colors, how they are kept, a panel for every GPU."""

import matplotlib.pyplot as plt
import seaborn as sns

from .files import FIGURES, replacing, say_where

BLUE, ORANGE, GREEN, RED = (sns.color_palette("colorblind")[i] for i in (0, 1, 2, 3))
SCORES = sns.light_palette(BLUE, as_cmap=True)

sns.set_theme(style="whitegrid", palette="colorblind", font_scale=0.95)
plt.rcParams.update({"figure.dpi": 100, "savefig.dpi": 150, "axes.titleweight": "bold", "axes.titlelocation": "left"})


def save_figure(figure, name):
    """Keeps the picture as a file; the notebook shows it as well."""
    say_where()
    FIGURES.mkdir(parents=True, exist_ok=True)
    with replacing(FIGURES / f"{name}.png") as partial:
        figure.savefig(partial, format="png", bbox_inches="tight")
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
