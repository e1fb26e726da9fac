"""Precision, recall, density and coverage of two sets of features (Naeem et al. 2020, eqs. 1 to 6).

Around each feature lies a ball that reaches to its k-th nearest neighbour in its own set. Precision is the share of
fake features in at least one real ball, recall the share of real ones in at least one fake ball; density is the mean
number of real balls that hold a fake feature, divided by k; coverage is the share of real balls that hold one.
Comparisons are strict: a feature on the surface is outside.

Squared distances come from float32 matrix products in square tiles, with a bound on their rounding error. Where a
comparison is closer than the bound, the distance is computed again from differences in float64, so that results are
exact also for ties and duplicates, and the full matrix is never held. Within a set each pair is computed once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from numpy.typing import ArrayLike
from torch import Tensor

#: Side of a tile of the distance matrix; a handful of arrays of this size are alive at a time.
TILE = 2048
#: Elements of the differences that are formed at a time; small enough for a cache.
EXACT_BLOCK = 1 << 18
#: Candidates kept beyond the k nearest. Where more are too close to tell apart, all distances of the row are looked at.
SPARE = 8
#: Dimensions in one matrix product. Sums of few terms have a small bound, whatever order the library adds them in.
TERMS = 256


@dataclass(frozen=True)
class _Points:
    """One set: the features as given, and a centred float32 copy with its squared norms `[N]`."""

    exact: Tensor
    centred: Tensor
    norms: Tensor

    def __len__(self) -> int:
        return len(self.exact)


def _prepare(features: Tensor, centre: Tensor, device: torch.device) -> _Points:
    centred = torch.empty(features.shape, device=device)
    norms = torch.empty(len(features), device=device)
    for start in range(0, len(features), 256):
        rows = slice(start, start + 256)
        block = features[rows].to(device).double() - centre
        centred[rows], norms[rows] = block.float(), block.square().sum(1).float()
    return _Points(features, centred, norms)


def _approximate(x: _Points, rows: slice | Tensor, y: _Points, columns: slice) -> Tensor:
    """Squared distances of a tile in float32, up to `_bound`."""
    distances = x.norms[rows, None] + y.norms[columns]
    for start in range(0, x.centred.shape[1], TERMS):
        terms = slice(start, start + TERMS)
        distances.addmm_(x.centred[rows, terms], y.centred[columns, terms].T, alpha=-2)
    return distances


def _bound(x: _Points, rows: slice | Tensor, y: _Points) -> Tensor:
    """Largest error of `_approximate` in each row, `[rows, 1]`: (TERMS + 2 P + 16) u (|x|² + max |y|²), u = 2⁻²⁴.

    Each of the P products is off by at most TERMS u |xₚ| |yₚ| and each sum by u times its terms (to first order, and
    2 |x| |y| ≤ |x|² + |y|²); the rest covers the rounding of norms and of centred features.
    """
    products = -(-x.centred.shape[1] // TERMS)
    return 1.01 * (TERMS + 2 * products + 16) * 2.0**-24 * (x.norms[rows, None] + y.norms.max())


def _exact(x: _Points, y: _Points, i: Tensor, j: Tensor) -> Tensor:
    """Squared distances of the pairs (i, j), float64, from differences."""
    device = x.norms.device
    step = max(EXACT_BLOCK // x.exact.shape[1], 1)
    found = torch.empty(len(i), dtype=torch.float64, device=device)
    for start in range(0, len(i), step):
        part = slice(start, start + step)
        a, b = x.exact[i[part].to(x.exact.device)], y.exact[j[part].to(y.exact.device)]
        difference = a.to(device).double().sub_(b.to(device))
        found[part] = difference.square_().sum(1)
    return found


def _slices(count: int, step: int = TILE) -> list[slice]:
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


class _Nearest:
    """The nearest features of each row so far: approximate squared distances and indices, `[N, keep]`, ascending."""

    def __init__(self, count: int, keep: int, device: torch.device) -> None:
        self.values = torch.full([count, keep], torch.inf, device=device)
        self.indices = torch.zeros([count, keep], dtype=torch.int64, device=device)

    def add(self, rows: slice, tile: Tensor, first_column: int) -> None:
        values, indices = tile.topk(min(self.values.shape[1], tile.shape[1]), dim=1, largest=False)
        values = torch.cat([self.values[rows], values], dim=1)
        indices = torch.cat([self.indices[rows], indices + first_column], dim=1)
        self.values[rows], order = values.topk(self.values.shape[1], dim=1, largest=False)
        self.indices[rows] = indices.gather(1, order)


def _squared_radii(x: _Points, k: int) -> Tensor:
    """Squared distance of each feature to its k-th neighbour, itself not counted: float64 `[N]`."""
    device = x.norms.device
    nearest = _Nearest(len(x), min(k + 1 + SPARE, len(x)), device)
    slices = _slices(len(x))
    for a, rows in enumerate(slices):
        for columns in slices[a:]:
            tile = _approximate(x, rows, x, columns)
            nearest.add(rows, tile, columns.start)
            if columns is not rows:
                nearest.add(columns, tile.T.contiguous(), rows.start)
    # Every one of the k + 1 nearest is within two errors of the approximate (k + 1)-th.
    limits = nearest.values[:, k, None] + 2 * _bound(x, slice(None), x)
    i, column = (nearest.values <= limits).nonzero(as_tuple=True)
    radii = _select(i, _exact(x, x, i, nearest.indices[i, column]), k, len(x))
    if nearest.values.shape[1] < len(x):
        crowded = (nearest.values[:, -1] <= limits[:, 0]).nonzero()[:, 0]
        for part in crowded.split(TILE // 8):
            close = torch.cat([_approximate(x, part, x, columns) <= limits[part] for columns in slices], dim=1)
            i, j = close.nonzero(as_tuple=True)
            radii[part] = _select(i, _exact(x, x, part[i], j), k, len(part))
    return radii


def _select(rows: Tensor, values: Tensor, k: int, count: int) -> Tensor:
    """The (k + 1)-th smallest value of each row `[count]`; `rows` is ascending and holds each row more than k times."""
    order = values.argsort()
    order = order[rows[order].argsort(stable=True)]
    sizes = torch.bincount(rows, minlength=count)
    return values[order][sizes.cumsum(0) - sizes + k]


def _prdc(real: _Points, fake: _Points, nearest_k: int) -> dict[str, float]:
    real_radii, fake_radii = _squared_radii(real, nearest_k), _squared_radii(fake, nearest_k)
    device = real_radii.device
    hits = torch.zeros(len(fake), dtype=torch.int64, device=device)  # real balls that hold each fake feature
    covered, recalled = (torch.zeros(len(real), dtype=torch.bool, device=device) for _ in range(2))
    for rows in _slices(len(real)):
        for columns in _slices(len(fake)):
            tile = _Tile(real, rows, fake, columns)
            i, j = tile.below(real_radii[rows, None])
            hits[columns] += torch.bincount(j, minlength=columns.stop - columns.start)
            covered[i + rows.start] = True
            recalled[tile.below(fake_radii[None, columns])[0] + rows.start] = True
    return {
        "precision": int((hits > 0).sum()) / len(fake),
        "recall": int(recalled.sum()) / len(real),
        "density": 1 / nearest_k * (int(hits.sum()) / len(fake)),
        "coverage": int(covered.sum()) / len(real),
    }


class _Tile:
    """Squared distances of some features of `x` to some of `y`, for exact comparisons."""

    def __init__(self, x: _Points, rows: slice, y: _Points, columns: slice) -> None:
        self.x, self.rows, self.y, self.columns = x, rows, y, columns
        self.approximate = _approximate(x, rows, y, columns)
        self.bound = _bound(x, rows, y).max()

    def below(self, limits: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column indices of the squared distances below their limits (float64, one a row or one a column)."""
        slack = self.bound + limits.float() * 2.0**-22
        i, j = (self.approximate <= limits.float() + slack).nonzero(as_tuple=True)
        limits, slack = (t.expand(self.approximate.shape)[i, j] for t in (limits, slack))
        keep = torch.ones(len(i), dtype=torch.bool, device=i.device)
        unsure = (self.approximate[i, j] >= limits.float() - slack).nonzero()[:, 0]
        exact = _exact(self.x, self.y, i[unsure] + self.rows.start, j[unsure] + self.columns.start)
        keep[unsure] = exact < limits[unsure]
        return i[keep], j[keep]


@torch.no_grad()
def precision_recall_density_coverage(
    real: ArrayLike, fake: ArrayLike, nearest_k: int = 5, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """The four numbers for feature sets `[N, D]` and `[M, D]`; all but density are in [0, 1].

    Beyond the features it takes a float32 copy of them and a few hundred MiB, whatever N and M are.

    Args:
        real, fake: float32 or float64; kept where they are.
        nearest_k: neighbours that a ball reaches to; both sets need at least nearest_k + 1 features.
        device: where to compute.

    Raises:
        ValueError: shapes that do not fit, too few features, or numbers that are not finite.
    """
    sets = [torch.as_tensor(features) for features in (real, fake)]
    device = torch.device("cpu" if torch.device(device).type == "mps" else device)  # mps has no float64
    if any(s.ndim != 2 for s in sets) or sets[0].shape[1] != sets[1].shape[1]:
        raise ValueError(f"feature sets are {[list(s.shape) for s in sets]}; expected [N, D] and [M, D]")
    if nearest_k < 1 or min(map(len, sets)) <= nearest_k:
        raise ValueError(f"nearest_k={nearest_k} needs at least {nearest_k + 1} features; got {[len(s) for s in sets]}")
    if not all(bool(s.isfinite().all()) for s in sets):
        raise ValueError("features hold a number that is not finite")
    centre = sum(s.mean(0, dtype=torch.float64) for s in sets).to(device) / 2
    return _prdc(*(_prepare(s, centre, device) for s in sets), nearest_k)
