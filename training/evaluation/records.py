"""From a result to a line of `metrics.jsonl`."""

from __future__ import annotations

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


def append_records(path: str | Path, records: Sequence[dict[str, Any]]) -> None:
    """Append a JSON line for each record, with versions and the date: all of them or, on a full disk, none."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    lines = "".join(json.dumps({**record, "versions": versions, "date": date}) + "\n" for record in records)
    with open(path, "ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            if file.write(lines.encode()) < len(lines.encode()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(before)
            raise
