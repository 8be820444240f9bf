"""Measured tables: a CSV file for each table and GPU, figures/data/<gpu>/<table>.csv, whose rows say what they are of.

The committed tables are the recorded ones. A run adds its own rows beside the executed notebooks, or with
`study.py --update` to the recorded ones; reading sees both. A row's `binary` names the kernels that it is of
(binaries.py), and `commit` and `date` say when they were measured.
"""

import datetime
import functools
import os
import pathlib
import re
import subprocess

import pandas as pd
import torch
import triton

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
RECORDED = REPOSITORY / "figures" / "data"
# study.py --update points this at figures/; anything else leaves the committed pictures and tables alone.
FIGURES = pathlib.Path(os.environ.get("OMNI_FIGURES") or REPOSITORY / "study-output" / "figures").resolve()
DATA = FIGURES / "data"
SETTING = ["gpu", "torch", "triton"]  # what a row was measured on, besides what it is a row of


@functools.cache
def setting():
    """What a row is measured on: the GPU and the versions; and when: the commit and the date."""
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "--short=12", "HEAD"]
    commit = os.environ.get("OMNI_COMMIT")  # for copies that have no history of their own
    if not commit:
        try:
            commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
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
    """All rows of a table, of every GPU, those of this run last. An empty table where nobody measured."""
    folders = dict.fromkeys([RECORDED, DATA])
    paths = [path for folder in folders for path in sorted(folder.glob(f"*/{table}.csv"))]
    return pd.concat(map(_read, paths), ignore_index=True) if paths else pd.DataFrame()


def _read(path):
    return pd.read_csv(path, dtype=dict.fromkeys([*SETTING, "binary", "commit"], str))  # a hash may look like a number


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
    """Add rows (dictionaries) to this run's table of this GPU. The file is replaced whole, so a fault loses nothing.

    `folder` takes the place of the GPU's where no GPU made the rows; all rows have what is `common`.

    Raises:
        OSError: the folder cannot be written to; the message names it.
    """
    gpu = re.sub(r"[^a-z0-9]+", "-", setting()["gpu"].lower()).strip("-")
    path = DATA / (folder or gpu) / f"{table}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    new = pd.DataFrame([{**row, **common, **setting()} for row in rows])
    whole = pd.concat([_read(path), new], ignore_index=True) if path.exists() else new
    partial = path.with_suffix(".partial")
    try:
        whole.to_csv(partial, index=False)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
