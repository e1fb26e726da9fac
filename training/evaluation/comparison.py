"""A student beside its teacher and training-free solvers: Fréchet distance, precision, recall, density and coverage.

Every sampler makes the images of the same seeds, and is compared with the same reference. A result is a line of
`metrics.jsonl`; a second run computes only what is not there yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dnnlib import write_text
from dnnlib.progress import say
from models.model import VARIABLE_STEPS, Student
from models.opening import BEST, TRAINING_FREE, ComparedSampler, OpenedSampler, named_students, rivals
from models.registry import ASSETS
from models.sampling import student_sampler
from torch_utils import distributed
from torch_utils.metrics.prdc import precision_recall_density_coverage

from ..options import describe_seeds
from .commands import record_distance
from .extractor import Extractor, Reference
from .figures import as_csv, as_latex, as_markdown, can_draw, draw_comparison
from .records import find_record

#: Results of the embedded teacher and of solvers without training, with what they were computed from: the quickstart's.
SHIPPED = ASSETS / "emoji32-rows.jsonl"
#: Part of what determines a result: one more when images or metrics of the same settings come to be others.
PROTOCOL = 1
#: Numbers of steps at which solvers that need no training are shown.
STEPS = (2, 3, 5)


def samplers(student: OpenedSampler, precision: str, also: Sequence[OpenedSampler] = ()) -> list[ComparedSampler]:
    """The teacher at its best, training-free solvers at few steps, and the students at every NFE that they serve.

    Raises:
        UserError: not a student, one of another teacher, or the teacher is not to be had.
    """
    students = named_students(student, also)
    found = rivals(student, [(solver, steps) for solver in TRAINING_FREE for steps in STEPS])
    for label, opened in students.items():
        model, rate = opened.sampler.model, opened.sampler.plan.guidance_rate
        assert isinstance(model, Student)  # rivals and named_students refuse others
        for n in VARIABLE_STEPS if model.sampling.is_variable else (model.sampling.num_steps,):
            sampler = student_sampler(model, n, rate, opened.sampler.prompts)
            found.append(ComparedSampler(label, sampler, {**opened.identity, "num_steps": n}))
    return [replace(row, identity={**row.identity, "precision": precision}) for row in found]


def compare(
    rows: Sequence[ComparedSampler],
    seeds: Sequence[int],
    reference: Reference,
    nearest_k: int,
    extractor: Extractor,
    out: Path,
    known: Sequence[Path],
) -> list[dict[str, Any]]:
    """Metrics of every row, in the order of the rows.

    Args:
        reference: with features and moments.
        out: JSON lines, one for each row that is computed.
        known: records whose rows are not computed again.
    """
    found, shipped, real = [], 0, reference.features
    facts = {"seeds": describe_seeds(seeds), **reference.facts}
    for row in rows:
        key = {**facts, "sampler": {**row.identity, "nfe": row.sampler.nfe}, "N": len(seeds), "nearest_k": nearest_k}
        key |= {**extractor.detector.identity(), "protocol": PROTOCOL}
        place, result = distributed.on_first_rank(partial(_find, known, key))
        shipped += place == SHIPPED
        if result is None:
            nfe, detector = row.sampler.nfe, extractor.detector
            made = extractor.sampled(row.sampler, seeds, keep=True, desc=f"{row.label}, NFE {nfe}")
            sets = (real.features, made.features, nearest_k, detector.device)
            prdc = distributed.on_first_rank(partial(precision_recall_density_coverage, *sets))
            shown = {"prdc": prdc, "label": row.label, "nfe": nfe}
            result = record_distance(made, real, detector, {**shown, **key}, out)
        found.append(result | {"label": row.label})  # of another comparison it may have had another one
    if shipped:
        say(f"{shipped} of {len(rows)} rows ship with this program; --recompute makes them anew")
    return found


def _find(known: Sequence[Path], key: dict[str, Any]) -> tuple[Path | None, dict[str, Any] | None]:
    """The first of these files that has such a result, and the result."""
    found = ((path, find_record(path, key)) for path in known)
    return next((pair for pair in found if pair[1] is not None), (None, None))


# ------------------------------------------------------------------------------------------------------------------
# Showing


def closed_gap(results: Sequence[dict[str, Any]]) -> str | None:
    """How far the student at its fewest evaluations gets from the best training-free solver there to the teacher."""
    student = min((r for r in results if r["label"] == "student"), key=lambda r: r["nfe"])
    same = [r for r in results if r["label"] in TRAINING_FREE.values() and r["nfe"] == student["nfe"]]
    if not same:
        return None
    start, end = min(same, key=lambda r: r["value"]), next(r for r in results if r["label"] == BEST)
    if start["value"] == end["value"]:
        return None
    share = (start["value"] - student["value"]) / (start["value"] - end["value"])
    return (
        f"At NFE {student['nfe']} the student closes {100 * share:.0f} % of the gap in {student['metric']} between "
        f"{start['label']} and the teacher's {end['nfe']} evaluations."
    )


def write(results: Sequence[dict[str, Any]], outdir: Path, figure: Path) -> list[Path]:
    """`metrics.md`, `.csv` and `.tex`, and the figure where matplotlib is installed; returns what was written."""
    gap = closed_gap(results)
    written = [outdir / f"metrics{suffix}" for suffix in (".md", ".csv", ".tex")]
    tables = [as_markdown(results) + (f"\n{gap}\n" if gap else ""), as_csv(results), as_latex(results)]
    for path, text in zip(written, tables, strict=True):
        write_text(path, text)
    if not can_draw():
        return written
    draw_comparison(results, figure)
    return [*written, figure]
