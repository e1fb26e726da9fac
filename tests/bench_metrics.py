"""Speed of the metrics against what is usually used, both in one run and with the same number of threads.

    python tests/bench_metrics.py            # FID at 2048 dimensions, PRDC of 10,000 features
    python tests/bench_metrics.py memory     # peak memory of PRDC for 50,000 features, beyond the features

`scipy.linalg.sqrtm` is what most FID scripts call. PRDC is compared with the definitions on full matrices of
scikit-learn, which uses their symmetry, and with the published prdc package, which builds them in eight parts and does
not; they take turns, and the shortest time of each counts. Features with a decaying spectrum are like those of images;
white ones are the hardest to tell apart.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS = os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", THREADS)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import scipy.linalg  # noqa: E402
import torch  # noqa: E402

from fid import calculate_fid  # noqa: E402
from prdc import compute_prdc  # noqa: E402


def timed(name: str, action: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds, which other programs on the machine lengthen less than the clock's."""
    start, clock = time.process_time(), time.perf_counter()
    result = action()
    seconds, clock = time.process_time() - start, time.perf_counter() - clock
    print(f"  {name:28s} {seconds:8.2f} s ({clock:.2f} s on the clock)", flush=True)
    return seconds, result


def features(count: int, dim: int, seed: int) -> np.ndarray:
    """Normal vectors with a decaying spectrum, as features of images have."""
    rng = np.random.default_rng(seed)
    scale = np.exp(-np.arange(dim) / 200) + 0.02
    found = np.empty([count, dim], dtype=np.float32)
    for rows in np.array_split(found, max(count // 1000, 1)):  # in parts: the peak of memory is measured later
        rows[:] = rng.standard_normal(rows.shape, dtype=np.float32) * scale * (1 + 0.1 * seed) + 0.3
    return found


def bench_fid(dim: int = 2048) -> float:
    print(f"FID of {dim} x {dim} covariances")
    sets = [features(3 * dim, dim, seed).astype(np.float64) for seed in (0, 1)]
    a, b = ((x.mean(0), np.cov(x.T)) for x in sets)

    def by_square_root() -> float:
        root = scipy.linalg.sqrtm(a[1] @ b[1])
        return float(np.square(a[0] - b[0]).sum() + np.trace(a[1] + b[1] - 2 * root.real))

    own, found = timed("calculate_fid", lambda: calculate_fid(*a, *b))
    other, expected = timed("scipy.linalg.sqrtm", by_square_root)
    print(f"  {other / own:.1f} times as fast; relative difference {abs(found / expected - 1):.1e}")
    return other / own


def full_matrices(real: np.ndarray, fake: np.ndarray, k: int) -> dict[str, float]:
    """The definitions on whole matrices of scikit-learn."""
    from sklearn.metrics import pairwise_distances

    real_radii, fake_radii = (np.partition(pairwise_distances(s), k, axis=1)[:, k] for s in (real, fake))
    between = pairwise_distances(real, fake)
    inside = between < real_radii[:, None]
    return {
        "precision": inside.any(0).mean(),
        "recall": (between < fake_radii[None]).any(1).mean(),
        "density": inside.sum(0).mean() / k,
        "coverage": inside.any(1).mean(),
    }


def published_prdc() -> Callable[..., dict[str, float]]:
    """The package has the name of our script, so it is loaded from its file."""
    path = importlib.metadata.distribution("prdc").locate_file("prdc/prdc.py")
    spec = importlib.util.spec_from_file_location("published_prdc", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.compute_prdc


def quiet(action: Callable[[], Any]) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return action()


def bench_prdc(count: int = 10_000, dim: int = 2048, rounds: int = 2) -> None:
    rng = np.random.default_rng(0)
    white = tuple(rng.standard_normal([count, dim], dtype=np.float32) for _ in range(2))
    decaying = features(count, dim, 0), features(count, dim, 1)
    published = published_prdc()
    for name, (real, fake) in {"decaying spectrum": decaying, "white": white}.items():
        print(f"PRDC of {count} features against {count}, {dim} dimensions, {name}")
        actions = {
            "compute_prdc": lambda: compute_prdc(real, fake),
            "scikit-learn, full matrices": lambda: full_matrices(real, fake, 5),
            "prdc package": lambda: quiet(lambda: published(real, fake, 5)),
        }
        runs = [{program: timed(program, action) for program, action in actions.items()} for _ in range(rounds)]
        own, *others = actions
        least = {program: min(run[program][0] for run in runs) for program in actions}
        for other in others:
            found, expected = (runs[0][program][1] for program in (own, other))
            difference = max(abs(found[key] - expected[key]) for key in found)
            print(f"  {least[other] / least[own]:.1f} times as fast as {other}; largest difference {difference:.1e}")


def bench_memory(count: int = 50_000, dim: int = 64) -> float:
    """Peak beyond the features. Only the copies of the features, bfloat16 and at worst float32 too, grow with the
    dimension, so few will do.
    """
    real, fake = features(count, dim, 0), features(count, dim, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    timed(f"{count} features, {dim} dimensions", lambda: compute_prdc(real, fake))
    gib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    more = 2 * count * (2048 - dim) * 6 / 2**30
    print(f"  peak {gib:.2f} GiB beyond the features; with 2048 dimensions at most {gib + more:.2f} GiB")
    return gib + more


if __name__ == "__main__":
    torch.set_num_threads(int(THREADS))
    if sys.argv[1:] == ["memory"]:
        bench_memory()
    else:
        bench_fid()
        bench_prdc()
