"""Where the study keeps what it makes, and how: a file is replaced whole, and two that add to one table take turns."""

import atexit
import contextlib
import fcntl
import functools
import os
import pathlib
import shutil
import signal
import tempfile

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
NOTEBOOKS = REPOSITORY / "notebooks"
COMMITTED = REPOSITORY / "figures"  # pictures, and tables in data/
OWN_OUTPUT = REPOSITORY / "study-output"


def can_be_written(folder):
    """Whether a folder, or the one that it would be made in, can be written to."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


@functools.cache
def output_folder():
    """study-output/, or a temporary folder where that cannot be written to."""
    return OWN_OUTPUT if can_be_written(OWN_OUTPUT) else pathlib.Path(tempfile.mkdtemp(prefix="study-output-"))


# `--update` points this at figures/; anything else leaves the committed pictures and tables alone.
FIGURES = pathlib.Path(os.environ.get("OMNI_FIGURES") or output_folder() / "figures").resolve()


@functools.cache
def say_where():
    """Once: where things go that cannot go to where they belong."""
    if FIGURES != COMMITTED and not can_be_written(OWN_OUTPUT):
        print(f"{OWN_OUTPUT} cannot be written to. Figures go to {FIGURES}")


def keep_caches_elsewhere():
    """Where HOME cannot be written to, Matplotlib would complain and Triton fail: their caches get a temporary folder,
    unless the environment has one for them."""
    if not can_be_written(pathlib.Path.home()):
        folder = tempfile.mkdtemp(prefix="study-caches-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        for name in ("MPLCONFIGDIR", "TRITON_CACHE_DIR"):
            os.environ.setdefault(name, folder)


def check_room(folder):
    """Makes a folder.

    Raises:
        OSError: it cannot be made, or no MiB can be written to it; the message names the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 20))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


@contextlib.contextmanager
def replacing(path):
    """A path to write to, beside another one. At the end the new file takes the other's place; if something is raised,
    the other is as it was.

    Raises:
        OSError: the file cannot be written; the message names `path`.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder):
    """Inside, no other process or thread is inside for the same folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def ctrl_c_ignored():
    """Lets nothing be cut short."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
