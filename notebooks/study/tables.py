"""Measured tables: a CSV file for each table and GPU, figures/data/<gpu>/<table>.csv, whose rows say what they are of.

The committed tables are the recorded ones. A run adds its own rows beside the executed notebooks, or with
`--update` to the recorded ones; reading sees both. A row's `binary` names the kernels that it is of
(binaries.py), and `commit` and `date` say when they were measured.
"""

import datetime
import errno
import functools
import io
import os
import re
import subprocess

import pandas as pd
import torch
import triton

from .files import COMMITTED, FIGURES, REPOSITORY, check_room, ctrl_c_ignored, locked, replacing, say_where

RECORDED = COMMITTED / "data"
DATA = FIGURES / "data"
SETTING = ["gpu", "torch", "triton"]  # what a row was measured on, besides what it is a row of


@functools.cache
def setting():
    """What a row is measured on: the GPU and the versions; and when: the commit and the date."""
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "--short=12", "HEAD"]
    commit = os.environ.get("OMNI_COMMIT")  # for copies that have no history of their own
    if not commit:
        try:
            commit = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            commit = "unknown"
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def read(table):
    """All rows of a table, of every GPU, those of this run last. An empty table where nobody measured.

    Raises:
        OSError: a file is empty, cut or no table; the message names it.
    """
    folders = dict.fromkeys([RECORDED, DATA])
    paths = [path for folder in folders for path in sorted(folder.glob(f"*/{table}.csv"))]
    return pd.concat(map(_read, paths), ignore_index=True) if paths else pd.DataFrame()


def _read(path):
    text = path.read_bytes()
    if not text.endswith(b"\n"):
        raise OSError(errno.EBADMSG, "The table is cut" if text else "The table is empty", str(path))
    try:
        types = dict.fromkeys([*SETTING, "binary", "commit"], str)  # a hash may look like a number
        rows = pd.read_csv(io.BytesIO(text), dtype=types, encoding="utf-8")
        whole = rows[SETTING].notna().all(axis=None)
    except (ValueError, KeyError) as error:
        raise OSError(errno.EBADMSG, f"This is no table: {' '.join(str(error).split())}", str(path)) from error
    if not whole:
        raise OSError(errno.EBADMSG, "A row of the table is cut", str(path))
    return rows


def of_setting(table, columns=SETTING):
    """The rows of a table that were measured on this GPU and with these versions, or what of that `columns` names."""
    rows = read(table)
    for column in columns if len(rows) else ():
        rows = rows[rows[column] == setting()[column]]
    return rows


def key(row, columns):
    """What a row, a dictionary, holds in some columns; nothing of any kind is an empty string."""
    return tuple("" if pd.isna(row.get(column)) else row[column] for column in columns)


def last_keys(rows, case, found=("binary", "error")):
    """What the last row of each case holds in the columns that say what it is of, and in those that say what was found
    there, as keys."""
    last = {key(row, case): key(row, found) for row in rows.to_dict("records")}
    return {of + what for of, what in last.items()}


def append(table, rows, folder=None, **common):
    """Add rows (dictionaries) to this run's table of this GPU. The file is replaced whole, so a fault loses nothing;
    processes take turns, so that none loses another's rows.

    `folder` takes the place of the GPU's where no GPU made the rows; all rows have what is `common`.

    Raises:
        OSError: the table cannot be written, or not be read before; the message names it.
    """
    gpu = re.sub(r"[^a-z0-9]+", "-", setting()["gpu"].lower()).strip("-")
    path = DATA / (folder or gpu) / f"{table}.csv"
    say_where()
    path.parent.mkdir(parents=True, exist_ok=True)
    new = pd.DataFrame([{**row, **common, **setting()} for row in rows])
    with locked(path.parent), replacing(path) as partial:
        whole = pd.concat([_read(path), new], ignore_index=True) if path.exists() else new
        whole.to_csv(partial, index=False, encoding="utf-8")


class recording:
    """Keeps the rows it is called with, and writes them to a table as they come, every few and at the end; so that
    neither Ctrl-C nor an error loses them. To no table where its name is None."""

    def __init__(self, table, folder=None):
        self.table, self.folder, self.rows, self.written = table, folder, [], 0

    def __enter__(self):
        if self.table:
            check_room(DATA)  # raises now what writing would raise after the work
        return self

    def __call__(self, row):
        self.rows.append(row)
        if len(self.rows) - self.written >= 50:
            self.write()

    def __exit__(self, *_):
        with ctrl_c_ignored():
            self.write()

    def write(self):
        if self.table and self.written < len(self.rows):
            append(self.table, self.rows[self.written :], self.folder)
        self.written = len(self.rows)
