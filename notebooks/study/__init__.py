"""What the notebooks measure, tell and draw. `python notebooks/study --help` says what it does by itself."""

import importlib.util
import os
import pathlib

from .files import keep_caches_elsewhere

keep_caches_elsewhere()  # before anything imports Matplotlib

# Once torch.compile has compiled something, PyTorch has Triton use the assembler of PyTorch's wheel, unless one is
# named. What is measured shall not depend on what ran before: it is Triton's own throughout.
_triton = pathlib.Path(importlib.util.find_spec("triton").origin).parent
os.environ.setdefault("TRITON_PTXAS_PATH", str(_triton / "backends" / "nvidia" / "bin" / "ptxas"))
