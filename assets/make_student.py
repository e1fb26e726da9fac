"""Make what ships of the embedded student: `python assets/make_student.py [--teacher=teachers/emoji32-cond]`.

One command, whose parts go on where they were stopped; repeat it until it says what it wrote. It trains the student of
the preset `emoji32` and writes, beside this file:

- with `--teacher`, `emoji32-cond-teacher.safetensors`, in half precision;
- `emoji32-student.safetensors`, in half precision, with its settings;
- `emoji32-rows.jsonl`: metrics of the teacher and of training-free solvers on it, in bf16 and fp32, with what they were
  computed from, so that the quickstart need not compute them;
- `metrics.md`, `metrics.png`, `compare.md`, `compare.png`: the student beside all of these;

and the student's distance and minutes into `training/presets.yaml` and the README's table. Student and rows belong to
one teacher: a student of another one is refused by every comparison, rows of another one are not used.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

ASSETS = Path(__file__).resolve().parent
ROOT = ASSETS.parent
sys.path.insert(0, str(ROOT))

from dnnlib import one_line_errors, sha256_of, write_text  # noqa: E402
from training.evaluation.comparison import PROTOCOL, SHIPPED  # noqa: E402
from training.evaluation.records import read_records  # noqa: E402

TEACHER, STUDENT = ASSETS / "emoji32-cond-teacher.safetensors", ASSETS / "emoji32-student.safetensors"
PRESETS = ROOT / "training" / "presets.yaml"
#: What `--precision=auto` comes to on CPUs, with and without bfloat16; the first is what is shown.
PRECISIONS = ("bf16", "fp32")


def run(*command: str | Path) -> None:
    """A command of this program, in its folder; ends this one where it fails."""
    click.echo(f"\n== python {' '.join(map(str, command))}")
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)


def rows_of(teacher_sha256: str, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest row of each sampler that needs no student, of this teacher and as this version computes it."""
    found = {}
    for record in records:
        sampler = record.get("sampler", {})
        if record.get("protocol") == PROTOCOL and sampler.get("sha256") == teacher_sha256 and "solver" in sampler:
            found[record["label"], record["nfe"], sampler["precision"]] = record
    return [found[key] for key in sorted(found, key=lambda key: PRECISIONS.index(key[2]))]


def with_result(presets: str, fd: float, minutes: float) -> str:
    """The text of the presets with what the student of `emoji32` has come to."""
    line = re.compile(r"^(  emoji32: \{use: emoji32 nfe2, total_kimg: [\d.]+).*\}$", re.M)
    return line.sub(rf"\1, fd: {fd:.1f}, minutes: {minutes:.0f}}}", presets)


@click.command()
@click.option("--teacher", help="Run of training.pretrain, or its file, to ship as the teacher; default: the one that "
              "ships", metavar="PATH", type=click.Path(exists=True))  # fmt: skip
@click.option(
    "--seeds", help="Seeds of the evaluation, as the quickstart has them", default="0-1999", show_default=True
)
@click.argument("flags", nargs=-1)
def main(teacher: str | None, seeds: str, flags: tuple[str, ...]) -> None:
    """Train the student that ships, and replace all that belongs to it; FLAGS after -- go to train.py."""
    if teacher is not None:
        run("-m", "models.export", "half", f"--model_path={Path(teacher).resolve()}", f"--dest={TEACHER}")
    folder = ROOT / "exps" / f"emoji32-{sha256_of(TEACHER)[:8]}"
    run("train.py", "--preset=emoji32", "--device=cpu", *flags, f"--outdir={folder}", "--nosubdir")
    run("-m", "models.export", "half", f"--model_path={folder}", f"--dest={STUDENT}")
    records = read_records(SHIPPED) if SHIPPED.exists() else []
    for precision in PRECISIONS:
        out = folder / precision
        run("fid.py", "compare", f"--model_path={STUDENT}", f"--seeds={seeds}", "--ref=emoji32", "--device=cpu",
            "--detector=efficientnet-lite0", f"--precision={precision}", f"--outdir={out}")  # fmt: skip
        records += read_records(out / "metrics.jsonl")
    run("sample.py", f"--model_path={STUDENT}", "--seeds=0-11", "--compare=True", "--device=cpu",
        f"--outdir={folder / 'pictures'}")  # fmt: skip
    rows = rows_of(sha256_of(TEACHER), records)
    write_text(SHIPPED, "".join(json.dumps(row) + "\n" for row in rows))
    shown = folder / PRECISIONS[0]
    made = [
        shown / "metrics.md",
        shown / "metrics.png",
        folder / "pictures/compare.md",
        folder / "pictures/compare.png",
    ]
    for path in made:
        shutil.copy(path, ASSETS)
    own = next(r for r in reversed(read_records(shown / "metrics.jsonl")) if r["label"] == "student")
    seconds = read_records(folder / "stats.jsonl")[-1]["seconds"]
    write_text(PRESETS, with_result(PRESETS.read_text(encoding="utf-8"), own["value"], seconds / 60))
    run("-m", "training.presets", "--write")
    click.echo(f"\nWrote {STUDENT.name} ({STUDENT.stat().st_size / 1e6:.2f} MB), {len(rows)} rows, the pictures and "
               "the tables; see `git status`")  # fmt: skip


if __name__ == "__main__":
    one_line_errors(main)()
