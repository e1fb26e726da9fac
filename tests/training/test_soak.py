"""Three thousand iterations: memory and open files stay where they were after the warm-up."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from unittest import mock

import pytest
from tiny import STATS, invoke, only_run, teacher, train_flags

from training.distill import Distiller

WARM_UP, TOTAL = 500, 3000


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory and handles are read from /proc")
def test_memory_and_handles_stay_flat(tmp_path):
    """With a status line and a state every 50 iterations, a student and a picture every 250."""
    seen, original, calls = {}, Distiller.iterate, itertools.count(1)

    def iterate(distiller, *args):
        states = original(distiller, *args)
        iteration = next(calls)
        if iteration % 50 == 25:  # away from what ticks allocate for a moment
            seen[iteration] = (resident(), handles())
        return states

    changes = {"batch": 2, "total_kimg": 0.002 * TOTAL, "tick": 0.1, "snap": 5, "dump": 1, "M": 0, "num_steps": 3}
    with mock.patch.object(Distiller, "iterate", iterate):
        invoke("train", *train_flags(teacher(), outdir=tmp_path, **changes)).ok()
    assert len((only_run(tmp_path) / STATS).read_text().splitlines()) == TOTAL // 50
    assert json.loads((only_run(tmp_path) / STATS).read_text().splitlines()[-1])["skipped"] == 0
    warm = {iteration: both for iteration, both in seen.items() if iteration >= WARM_UP}
    (first, files), (last, _) = warm[min(warm)], warm[max(warm)]
    growth = last / first - 1
    print(f"resident {first / 2**20:.1f} → {last / 2**20:.1f} MiB ({growth:+.2%}), {files} handles")
    assert growth < 0.01 and {count for _, count in warm.values()} == {files}
