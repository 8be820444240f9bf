"""What the notebooks measure, tell and draw. `python notebooks/study --help` says what it does by itself."""

from .files import keep_caches_elsewhere

keep_caches_elsewhere()  # before anything imports Matplotlib
