"""Progress bars: a widget in a notebook, text in a terminal."""

import warnings

from tqdm import TqdmWarning

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # without ipywidgets a notebook has text, too
    from tqdm.auto import tqdm

__all__ = ["tqdm"]
