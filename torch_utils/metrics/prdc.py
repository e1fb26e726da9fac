"""Precision, recall, density and coverage of two sets of features (Naeem et al. 2020, eqs. 1 to 6).

Around each feature lies a ball that reaches to its k-th nearest neighbour in its own set. Precision is the share of
fake features in at least one real ball, recall the share of real ones in at least one fake ball; density is the mean
number of real balls that hold a fake feature, divided by k; coverage is the share of real balls that hold one.
Comparisons are strict: a feature on the surface is outside.

All features are centred and scaled together, and copied in a type that the machine multiplies fast: bfloat16 where a
trial shows that it pays, else float32. Square tiles of squared distances |x|² + |y|² − 2 xy come from products of these
copies (within a set each pair once), and the full matrix is never held. The copies stand for the features up to errors
whose lengths are known, so the error of each approximate distance has a bound, which also covers the rounding of the
products (`_margin`). The numbers are exact for this reason: comparisons that differ by more than the bound are certain,
and all others, ties and duplicates among them, are made again with distances from differences in float64, added up in
the same order for every pair. Where bfloat16 leaves too much open (small clusters far apart), float32 takes its place.
Which type is used changes the time, not the result.
"""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass, field

import torch
from numpy.typing import ArrayLike
from torch import Tensor

#: Side of a tile of the distance matrix; a handful of arrays of this size are alive at a time.
TILE = 2048
#: Elements of the differences that are formed at a time; small enough for a cache.
EXACT_BLOCK = 1 << 17
#: Candidates kept beyond the k nearest. Where more are too close to tell apart, all distances of the row are looked at.
SPARE = 16
#: Dimensions in one float32 product. Sums of few terms have a small bound, whatever order the library adds them in.
TERMS = 256
#: Where more than one in so many pairs of a tile, or rows of a set, stay open, float32 is cheaper than deciding them.
OPEN_PAIRS, OPEN_ROWS = 80, 2


@dataclass(frozen=True)
class _Copy:
    """Rounded features `[N, D]` and, as float32 `[N]`: squared lengths of the features, lengths of the rounded ones and
    of what rounding took away.
    """

    values: Tensor
    squares: Tensor
    lengths: Tensor
    errors: Tensor

    def __getitem__(self, rows: slice | Tensor) -> _Copy:
        return _Copy(self.values[rows], self.squares[rows], self.lengths[rows], self.errors[rows])


@dataclass(frozen=True)
class _Points:
    """One set: the features as given, and copies of (features − centre) · scale."""

    features: Tensor
    centre: Tensor
    scale: float
    device: torch.device
    copies: dict[torch.dtype, _Copy] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.features)

    def copy(self, dtype: torch.dtype) -> _Copy:
        if dtype not in self.copies:
            self.copies[dtype] = self._round(dtype)
        return self.copies[dtype]

    def _round(self, dtype: torch.dtype) -> _Copy:
        values = torch.empty(self.features.shape, dtype=dtype, device=self.device)
        squares, lengths, errors = torch.empty([3, len(self)], device=self.device)
        for rows in _slices(len(self), 256):
            block = (self.features[rows].to(self.device).double() - self.centre) * self.scale
            values[rows] = block.to(dtype)
            rounded = values[rows].double()
            squares[rows], lengths[rows] = block.square().sum(1), rounded.square().sum(1).sqrt()
            errors[rows] = rounded.sub_(block).square_().sum(1).sqrt()
        return _Copy(values, squares, lengths, errors)


class _Workspace:
    """Tiles by name, in memory that is used again: that the system clears fresh memory takes as long as filling it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.memory: dict[str, Tensor] = {}

    def tile(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        count = shape[0] * shape[1]
        if name not in self.memory or len(self.memory[name]) < count:
            self.memory[name] = torch.empty(count, dtype=dtype, device=self.device)
        return self.memory[name][:count].view(shape)


def _approximate(x: _Copy, y: _Copy, space: _Workspace) -> Tensor:
    """Squared distances of a tile in float32, exact up to `_margin`; valid until the next call with this workspace."""
    shape = len(x.squares), len(y.squares)
    distances = torch.add(x.squares[:, None], y.squares, out=space.tile("distances", shape))
    if x.values.dtype == torch.bfloat16:
        product = torch.mm(x.values, y.values.T, out=space.tile("product", shape, torch.bfloat16))
        return distances.sub_(product, alpha=2)
    for start in range(0, x.values.shape[1], TERMS):
        terms = slice(start, start + TERMS)
        distances.addmm_(x.values[:, terms], y.values[:, terms].T, alpha=-2)
    return distances


def _margin(x: _Copy, y: _Copy, limits: Tensor) -> Tensor:
    """How far an approximate distance of a row of x to any of y must be from the limit of the row for the exact one to
    be on the same side of it: float64 `[rows]`, as `limits`.

    With x = a + e and y = b + f (rounded values and errors), |xy − ab| ≤ |a||f| + |e||b| + |e||f| (Cauchy-Schwarz). The
    computed ab is off by at most T u |a||b| where T numbers are added up in float32 (u = 2⁻²⁴; counted twice, as units
    for bfloat16 may round less well). Then comes the rounding of squares, of limits, and of the sum of |x|², |y|² and P
    products. A product returned in bfloat16 is off by 2⁻⁸ of itself, which is small where vectors are nearly at right
    angles: for an approximate distance d it is (|x|² + |y|² − d) / 2, and d is replaced by the limit at the cost of a
    factor 1 / (1 − 2⁻⁸), within the 1.01. The last number covers those that underflow, features being scaled into ±1.
    """
    dim, u = x.values.shape[1], 2.0**-24
    narrow = x.values.dtype == torch.bfloat16
    terms, products = (dim, 1) if narrow else (TERMS, -(-dim // TERMS))
    a, e, b, f = x.lengths, x.errors, y.lengths.max(), y.errors.max()
    low, high = x.squares + y.squares.min(), x.squares + y.squares.max()
    error = 2 * (a * f + e * b + e * f) + 4 * terms * u * a * b + (2 * products + 16) * u * (high + limits)
    if narrow:
        error += 2.0**-8 * torch.maximum((low - limits).abs(), (high - limits).abs())
    return 1.01 * error + 2.0**-100


def _exact(x: _Points, y: _Points, i: Tensor, j: Tensor) -> Tensor:
    """Scaled squared distances of the pairs (i, j), float64, from differences."""
    dim = x.features.shape[1]
    step = max(EXACT_BLOCK // dim, 1)
    given = [torch.empty([step, dim], dtype=s.features.dtype, device=s.features.device) for s in (x, y)]
    wide = torch.empty([2, step, dim], dtype=torch.float64, device=x.device)
    found = torch.empty(len(i), dtype=torch.float64, device=x.device)
    for part in _slices(len(i), step):
        count = part.stop - part.start
        for s, index, block, double in zip((x, y), (i, j), given, wide):
            torch.index_select(s.features, 0, index[part].to(block.device), out=block[:count])
            double[:count] = block[:count]
        difference = wide[0, :count].sub_(wide[1, :count])
        found[part] = difference.square_().sum(1)
    return found.mul_(x.scale**2)


def _slices(count: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


@functools.cache
def _fast_type(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor has units for it, shown by a trial; float32 elsewhere, and on any GPU, where
    libraries may add up bfloat16 products in bfloat16.
    """
    if device.type != "cpu":
        return torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones([256, 512], dtype=dtype)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            matrix @ matrix.T
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return torch.bfloat16 if 2 * seconds[torch.bfloat16] < seconds[torch.float32] else torch.float32


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


def _nearest(x: _Copy, keep: int) -> _Nearest:
    nearest = _Nearest(len(x.squares), keep, x.squares.device)
    space, slices = _Workspace(x.squares.device), _slices(len(x.squares), TILE)
    for a, rows in enumerate(slices):
        for columns in slices[a:]:
            tile = _approximate(x[rows], x[columns], space)
            nearest.add(rows, tile, columns.start)
            if columns is not rows:
                nearest.add(columns, space.tile("transposed", tile.T.shape).copy_(tile.T), rows.start)
    return nearest


def _squared_radii(x: _Points, k: int, dtype: torch.dtype) -> Tensor:
    """Scaled squared distance of each feature to its k-th neighbour, itself not counted: float64 `[N]`."""
    copy = x.copy(dtype)
    nearest = _nearest(copy, min(k + 1 + SPARE, len(x)))
    # The largest distance of any k + 1 features limits that of the k + 1 nearest, among which is the row itself.
    first = torch.arange(len(x), device=x.device).repeat_interleave(k + 1)
    values = _exact(x, x, first, nearest.indices[:, : k + 1].flatten())
    limits = values.view(-1, k + 1).amax(1)
    near = nearest.values <= (limits + _margin(copy, copy, limits))[:, None]
    crowded = near.all(1) & (near.shape[1] < len(x))
    if dtype != torch.float32 and int(crowded.sum()) * OPEN_ROWS > len(x):
        return _squared_radii(x, k, torch.float32)
    near[crowded] = False
    near[:, : k + 1] = False
    i, column = near.nonzero(as_tuple=True)
    values = torch.cat([values, _exact(x, x, i, nearest.indices[i, column])])
    radii = _select(torch.cat([first, i]), values, k, len(x))
    for rows in crowded.nonzero()[:, 0].split(TILE // 8):
        i, j = _all_near(x, rows, limits[rows], dtype)
        radii[rows] = _select(i, _exact(x, x, rows[i], j), k, len(rows))
    return radii


def _all_near(x: _Points, rows: Tensor, limits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pairs (position in `rows`, index) among which are all within the limits of the rows."""
    part, copy = x.copy(dtype)[rows], x.copy(dtype)
    distances = _approximate(part, copy, _Workspace(x.device))
    i, j = (distances <= (limits + _margin(part, copy, limits)).float()[:, None]).nonzero(as_tuple=True)
    if dtype != torch.float32 and len(i) * OPEN_PAIRS > distances.numel():
        return _all_near(x, rows, limits, torch.float32)
    return i, j


def _select(rows: Tensor, values: Tensor, k: int, count: int) -> Tensor:
    """The (k + 1)-th smallest value of each row `[count]`; `rows` holds each row more than k times."""
    order = values.argsort()
    order = order[rows[order].argsort(stable=True)]
    sizes = torch.bincount(rows, minlength=count)
    return values[order][sizes.cumsum(0) - sizes + k]


@dataclass(frozen=True)
class _Pairs:
    """Pairs (i, j) of a tile: those certainly below their limits, and those within the error of them."""

    sure: tuple[Tensor, Tensor]
    open: tuple[Tensor, Tensor]


def _compare(distances: Tensor, limits: Tensor, margin: Tensor) -> _Pairs:
    """Compare approximate distances with limits: float64, one a row or one a column, and so is the margin."""
    i, j = (distances <= (limits + margin).float()).nonzero(as_tuple=True)
    sure = distances[i, j] < (limits - margin).float().expand(distances.shape)[i, j]
    return _Pairs((i[sure], j[sure]), (i[~sure], j[~sure]))


class _Counts:
    """What is known of the pairs of real and fake features, a tile at a time."""

    def __init__(self, real: _Points, fake: _Points, real_radii: Tensor, fake_radii: Tensor) -> None:
        self.real, self.fake, self.real_radii, self.fake_radii = real, fake, real_radii, fake_radii
        self.hits = torch.zeros(len(fake), dtype=torch.int64, device=real.device)  # real balls that hold each fake one
        self.covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
        self.recalled = self.covered.clone()
        self.space = _Workspace(real.device)

    def add(self, rows: slice, columns: slice, dtype: torch.dtype) -> None:
        """Count the pairs of a tile."""
        x, y = self.real.copy(dtype)[rows], self.fake.copy(dtype)[columns]
        distances = _approximate(x, y, self.space)
        real_radii, fake_radii = self.real_radii[rows], self.fake_radii[columns]
        inside = _compare(distances, real_radii[:, None], _margin(x, y, real_radii)[:, None])
        around = _compare(distances, fake_radii, _margin(y, x, fake_radii))
        self.recalled[around.sure[0] + rows.start] = True
        i, j = around.open[0] + rows.start, around.open[1] + columns.start
        useful = ~self.recalled[i]  # one fake ball is enough
        i, j = i[useful], j[useful]
        if dtype != torch.float32 and (len(i) + len(inside.open[0])) * OPEN_PAIRS > distances.numel():
            self.add(rows, columns, torch.float32)
            return
        self.recalled[i[_exact(self.real, self.fake, i, j) < self.fake_radii[j]]] = True
        self._hit(inside.sure[0] + rows.start, inside.sure[1] + columns.start)
        i, j = inside.open[0] + rows.start, inside.open[1] + columns.start
        below = _exact(self.real, self.fake, i, j) < self.real_radii[i]
        self._hit(i[below], j[below])

    def _hit(self, i: Tensor, j: Tensor) -> None:
        self.hits += torch.bincount(j, minlength=len(self.hits))
        self.covered[i] = True


def _prdc(real: _Points, fake: _Points, nearest_k: int, dtype: torch.dtype) -> dict[str, float]:
    counts = _Counts(real, fake, *(_squared_radii(s, nearest_k, dtype) for s in (real, fake)))
    for rows in _slices(len(real), TILE):
        for columns in _slices(len(fake), TILE):
            counts.add(rows, columns, dtype)
    return {
        "precision": int((counts.hits > 0).sum()) / len(fake),
        "recall": int(counts.recalled.sum()) / len(real),
        "density": 1 / nearest_k * (int(counts.hits.sum()) / len(fake)),
        "coverage": int(counts.covered.sum()) / len(real),
    }


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
    largest = float(torch.stack([end.double() for s in sets for end in s.aminmax()]).abs().max())  # keeps nan
    if not math.isfinite(largest):
        raise ValueError("features hold a number that is not finite")
    first, second = (s.mean(0, dtype=torch.float64) for s in sets)
    centre = (first + second).to(device) / 2
    scale = 2.0 ** -(math.frexp(largest)[1] + 1)  # centred features are within ±1; exact, for it is a power of two
    real_points, fake_points = (_Points(s, centre, scale, device) for s in sets)
    return _prdc(real_points, fake_points, nearest_k, _fast_type(device))
