"""Make what ships of the embedded students: `python assets/make_student.py [--teacher=teachers/emoji32-cond]`.

One command, whose parts go on where they were stopped; repeat it until it says what it wrote. It trains the students of
the presets `emoji32` (2 NFE), `emoji32-v` (SFD-v, 2 to 5) and `emoji32-1nfe` (from the latter) and writes, beside this
file:

- with `--teacher`, `emoji32-cond-teacher.safetensors`, in half precision;
- `emoji32-student.safetensors`, `emoji32-v-student.safetensors` and `emoji32-1nfe-student.safetensors`, in half
  precision, with their settings;
- `emoji32-rows.jsonl`: metrics of the teacher and of training-free solvers on it, in bf16 and fp32, with what they were
  computed from, so that the quickstart need not compute them;
- `metrics.md`, `metrics.png`, `compare.md`, `compare.png`: the students beside all of these;

and the students' distances and minutes into `training/presets.yaml` and the README's table. Students and rows belong to
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

TEACHER = ASSETS / "emoji32-cond-teacher.safetensors"
#: What ships of each preset, and how comparisons call it where the first is compared with the others.
STUDENTS = {
    "emoji32": (ASSETS / "emoji32-student.safetensors", "student"),
    "emoji32-v": (ASSETS / "emoji32-v-student.safetensors", "student, SFD-v"),
    "emoji32-1nfe": (ASSETS / "emoji32-1nfe-student.safetensors", "student, second stage"),
}
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


def with_result(presets: str, name: str, distances: Sequence[float], minutes: float) -> str:
    """The text of the presets with what the students of one of them have come to, by NFE."""
    line = re.compile(rf"^(  {name}: \{{.*?)(, fd: [^,]*, minutes: \d+)?\}}$", re.M)
    shared, section, own = presets.partition("\npresets:\n")  # teachers among the shared have the same names
    return (
        shared
        + section
        + line.sub(rf"\1, fd: {'/'.join(f'{fd:.1f}' for fd in distances)}, minutes: {minutes:.0f}}}", own)
    )


def write_results(records: Sequence[dict[str, Any]], folders: dict[str, Path]) -> None:
    """The distance and the minutes of every student into the presets."""
    text = PRESETS.read_text(encoding="utf-8")
    for name, (_, label) in STUDENTS.items():
        by_nfe = {record["nfe"]: record["value"] for record in records if record["label"] == label}
        seconds = read_records(folders[name] / "stats.jsonl")[-1]["seconds"]
        text = with_result(text, name, [by_nfe[nfe] for nfe in sorted(by_nfe)], seconds / 60)
    write_text(PRESETS, text)


@click.command()
@click.option("--teacher", help="Run of training.pretrain, or its file, to ship as the teacher; default: the one that "
              "ships", metavar="PATH", type=click.Path(exists=True))  # fmt: skip
@click.option(
    "--seeds", help="Seeds of the evaluation, as the quickstart has them", default="0-1999", show_default=True
)
@click.argument("flags", nargs=-1)
def main(teacher: str | None, seeds: str, flags: tuple[str, ...]) -> None:
    """Train the students that ship, and replace all that belongs to them; FLAGS after -- go to train.py."""
    if teacher is not None:
        run("-m", "models.export", "half", f"--model_path={Path(teacher).resolve()}", f"--dest={TEACHER}")
    folders = {name: ROOT / "exps" / f"{name}-{sha256_of(TEACHER)[:8]}" for name in STUDENTS}
    for name, (student, _) in STUDENTS.items():
        source = [f"--model_path={folders['emoji32-v']}"] if name == "emoji32-1nfe" else []
        run("train.py", f"--preset={name}", "--device=cpu", *source, *flags, f"--outdir={folders[name]}", "--nosubdir")
        run("-m", "models.export", "half", f"--model_path={folders[name]}", f"--dest={student}")
    first, variable, single = (path for path, _ in STUDENTS.values())
    folder = folders["emoji32"]
    records = read_records(SHIPPED) if SHIPPED.exists() else []
    for precision in PRECISIONS:
        out = folder / precision
        run("fid.py", "compare", f"--model_path={first}", f"--also={variable}", f"--also={single}", f"--seeds={seeds}",
            "--ref=emoji32", "--device=cpu", "--detector=efficientnet-lite0", f"--precision={precision}",
            f"--outdir={out}")  # fmt: skip
        records += read_records(out / "metrics.jsonl")
    run("sample.py", f"--model_path={first}", f"--also={single}", "--seeds=0-11", "--compare=True", "--device=cpu",
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
    write_results(read_records(shown / "metrics.jsonl"), folders)
    run("-m", "training.presets", "--write")
    click.echo(f"\nWrote {len(STUDENTS)} students, {len(rows)} rows, the pictures and the tables; see `git status`")


if __name__ == "__main__":
    one_line_errors(main)()
