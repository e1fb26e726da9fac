"""Results as lines of `metrics.jsonl`: one JSON object each, appended all or nothing."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib import UserError, check_regular, parse_json


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a last line that was cut off when a process was killed is left out.

    Raises:
        UserError: no such file, or another line that is not a JSON object.
    """
    check_regular(path)
    try:
        lines = Path(path).read_bytes().splitlines()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; there are no results yet") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            found.append(record)
        elif number < len(lines) or record is not None:
            raise UserError(f"{path}: line {number} is not a JSON object; remove it")
    return found


def find_record(path: str | Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """The last record with all of `key` and a number as its value, if there is one."""
    if not Path(path).exists():
        return None
    records = [r for r in read_records(path) if type(r.get("value")) in (int, float)]
    found = [r for r in records if all(name in r and r[name] == value for name, value in key.items())]
    return found[-1] if found else None


def append_records(path: str | Path, records: Sequence[dict[str, Any]]) -> None:
    """Append a JSON line for each record, with versions and the date: all of them or, on a full disk, none."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    lines = "".join(json.dumps({**record, "versions": versions, "date": date}) + "\n" for record in records)
    with open(path, "ab+", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        if before:
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                lines = "\n" + lines  # the power failed in the middle of a line
        try:
            if file.write(lines.encode()) < len(lines.encode()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):  # a device cannot
                file.truncate(before)
            raise OSError(error.errno, error.strerror, str(path)) from None
