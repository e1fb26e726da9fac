"""Figures and tables of results, for papers: one order of names, what is better, how many images, which reference.

A figure is a PNG, PDF or SVG by the suffix of its name. matplotlib is needed for figures and nothing else.
"""

from __future__ import annotations

import csv
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from dnnlib import UserError, first_line, make_folder, replacing
from models.opening import BEST

INSTALL_MATPLOTLIB = "pip install matplotlib"
SUFFIXES = (".png", ".pdf", ".svg")
PRDC = ("precision", "recall", "density", "coverage")
PANEL = 3.2  # inches
#: The length of a run in a record, its unit, and what an axis calls it.
LENGTHS = (("kimg", 1, "kimg"), ("training_seconds", 60, "minutes of training"),
           ("training_flops", 1e15, "PFLOP of training"))  # fmt: skip


def check_suffix(path: Path, about: str | None = None) -> Path:
    """Refuse a figure of another format."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} is no figure; choose a name ending in {', '.join(SUFFIXES)}", about)
    return path


def need_matplotlib() -> Any:
    """matplotlib's Figure, or one clear line; no pyplot, so no display and no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"figures need matplotlib ({first_line(error)}); run: {INSTALL_MATPLOTLIB}") from None
    return Figure


def can_draw() -> bool:
    """Whether there is matplotlib; without it a command that draws at its end says so, and is content."""
    found = importlib.util.find_spec("matplotlib") is not None
    if not found:
        click.echo(f"No plot: matplotlib is not installed; for one, {INSTALL_MATPLOTLIB} and run this again", err=True)
    return found


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches."""
    return need_matplotlib()(figsize=(width, height), layout="constrained")


def panels(columns: int, rows: int = 1) -> Any:
    """An empty figure for so many panels."""
    return new_figure(PANEL * 1.3 * max(columns, 2), PANEL * max(rows, 1.2))


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure in the format of its suffix, all or nothing."""
    import matplotlib

    check_suffix(path)
    make_folder(path.parent)
    with replacing(path) as temporary, matplotlib.rc_context({"pdf.fonttype": 42, "svg.fonttype": "none"}):
        figure.savefig(temporary, format=path.suffix[1:], dpi=150)


def better(metric: str) -> str:
    """The metric with an arrow to where it is better."""
    return f"{metric} {'↑' if metric in PRDC else '↓'}"


def in_order(labels: Sequence[str]) -> list[str]:
    """Names in the order of every legend: the teacher, training-free solvers, students."""
    return sorted(dict.fromkeys(labels), key=lambda label: (label != BEST, label.startswith("student"), label))


def conditions(record: dict[str, Any]) -> str:
    """How many images were compared with what, as far as the record says."""
    shown = [f"{record['N']:,} images"] if isinstance(record.get("N"), int) else []
    if record.get("reference"):
        of = f" ({record['reference_N']:,})" if isinstance(record.get("reference_N"), int) else ""
        shown.append(f"reference {Path(str(record['reference'])).name}{of}")
    return ", ".join(shown)


# ------------------------------------------------------------------------------------------------------------------
# Figures


def draw_comparison(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Every metric of `fid.py compare` against NFE; the teacher's as a line across."""
    figure = new_figure(12, 4.4)
    large, *small = figure.subplot_mosaic([["fd", "precision", "recall"], ["fd", "density", "coverage"]],
                                          width_ratios=[2, 1, 1]).values()  # fmt: skip
    for axes, name in zip([large, *small], ["value", *PRDC], strict=True):
        for index, label in enumerate(in_order([r["label"] for r in results])):
            group = [r for r in results if r["label"] == label]
            values = [r["value"] if name == "value" else r["prdc"][name] for r in group]
            if label == BEST:
                axes.axhline(values[0], color="gray", linestyle="--", label=f"{label}, NFE {group[0]['nfe']}")
            else:
                axes.plot([r["nfe"] for r in group], values, "o-", color=f"C{index}", label=label)
        axes.set_title(better(results[0]["metric"] if name == "value" else name), fontsize=10)
        axes.set_xticks(sorted({r["nfe"] for r in results if r["label"] != BEST}))
        axes.grid(alpha=0.3)
    large.set_xlabel(", ".join(filter(None, ["network evaluations per image (NFE)", conditions(results[0])])))
    large.legend()
    save_figure(figure, path)


def draw_by_kimg(records: Sequence[dict[str, Any]], path: Path) -> None:
    """A distance against kimg, a line for every series of snapshots; with several trials their mean and deviation.

    Where all records say what training took, also against its seconds and operations.
    """
    shown = [scale for scale in LENGTHS if all(scale[0] in record for record in records)]
    figure = panels(len(shown))
    grid = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for axes, (name, unit, label) in zip(grid, shown, strict=True):
        for series in in_order([record["series"] for record in records]):
            group = [record for record in records if record["series"] == series]
            errors = [record.get("std", 0.0) for record in group]
            values = [record.get("mean", record["value"]) for record in group]
            lengths = [record[name] / unit for record in group]
            if any(errors):
                axes.errorbar(lengths, values, errors, fmt="o-", capsize=3, label=series)
            else:
                axes.plot(lengths, values, "o-", label=series)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    grid[0].set_ylabel(better(records[0]["metric"]))
    grid[0].legend(fontsize=7)
    if shown_of := conditions(records[0]):
        grid[0].set_title(shown_of, fontsize=8)
    save_figure(figure, path)


# ------------------------------------------------------------------------------------------------------------------
# Tables


def _cells(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Of every table: a line for each sampler, in the order of the results."""
    shares = [[f"{r['prdc'][name]:.3f}" for name in PRDC] for r in results]
    return [[r["label"], str(r["nfe"]), f"{r['value']:.4g}", *share] for r, share in zip(results, shares, strict=True)]


def as_markdown(results: Sequence[dict[str, Any]]) -> str:
    head = ["sampler", "NFE", results[0]["metric"], *PRDC]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in _cells(results))]) + "\n"


def as_csv(results: Sequence[dict[str, Any]]) -> str:
    """With all digits, and what the numbers belong to."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["sampler", "nfe", "metric", "value", *PRDC, "N", "seeds", "reference", "reference_N", "detector"])
    for r in results:
        facts = [r.get(name) for name in ("N", "seeds", "reference", "reference_N", "detector")]
        writer.writerow([r["label"], r["nfe"], r["metric"], r["value"], *(r["prdc"][name] for name in PRDC), *facts])
    return file.getvalue()


def as_latex(results: Sequence[dict[str, Any]]) -> str:
    """A tabular for the package booktabs; the best value of each column in bold, the teacher's left out of it."""
    rows = _cells(results)
    rivals = [i for i, r in enumerate(results) if r["label"] != BEST]
    for column, name in enumerate(["value", *PRDC], start=2):
        values = {i: results[i]["value"] if name == "value" else -results[i]["prdc"][name] for i in rivals}
        best = min(values.values(), default=None)
        for i in rivals:
            if values[i] == best:
                rows[i][column] = rf"\textbf{{{rows[i][column]}}}"
    names = (results[0]["metric"], *PRDC)
    heads = [_tex(name) + (r" $\uparrow$" if name in PRDC else r" $\downarrow$") for name in names]
    lines = [
        f"% {conditions(results[0])}",
        rf"\begin{{tabular}}{{lr{'r' * len(heads)}}}",
        r"\toprule",
        " & ".join(["sampler", "NFE", *heads]) + r" \\",
        r"\midrule",
        *(" & ".join([_tex(row[0]), *row[1:]]) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _tex(text: str) -> str:
    for character in "\\&%$#_{}":
        text = text.replace(character, rf"\{character}" if character != "\\" else "/")
    return text
