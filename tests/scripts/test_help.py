"""Help texts: headings, defaults, exit codes, and examples that run as printed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from test_export import latent_student
from test_export import published as ms_coco  # noqa: F401  # a fixture
from tiny import ROOT, flags, invoke, student, teacher, write_images

import fid
import prdc
import sample
import train
from dnnlib.options import EXIT_CODES_HELP, TEXTS, Command, Group, Real, Whole, section
from models import prefetch
from models.export import __main__ as export
from models.registry import ROWS
from models.registry import __main__ as registry
from models.sampling import TeacherOptions
from training import bench, dataset_tool, plot, pretrain
from training.config import DistillConfig
from training.evaluation.figures import PRDC
from training.pretrainer import PretrainConfig

SCRIPTS = {
    "train.py": train.main, "sample.py": sample.main, "fid.py": fid.main, "prdc.py": prdc.main,
    "training.pretrain": pretrain.main, "training.plot": plot.main, "training.bench": bench.main,
    "training.dataset_tool": dataset_tool.main,
    "models.export": export.main, "models.prefetch": prefetch.main, "models.registry": registry.main,
}  # fmt: skip


def leaves() -> Iterator[tuple[str, click.Command]]:
    """`fid.py calc` and its command, for every command that does something."""
    for script, main in SCRIPTS.items():
        if isinstance(main, click.Group):
            yield from ((f"{script} {name}", command) for name, command in main.commands.items())
        else:
            yield script, main


COMMANDS = dict(leaves())


@functools.cache
def help_of(name: str, width: int = 200) -> str:
    script, *rest = name.split()
    return CliRunner().invoke(SCRIPTS[script], [*rest, "--help"], terminal_width=width, max_content_width=width).output


def examples(command: click.Command) -> list[str]:
    return re.findall(r"^ *((?:python|torchrun) .+)$", command.help or "", re.M)


def sections(name: str) -> dict[str, dict[str, str]]:
    """Heading → option → what is said of it, as printed."""
    found: dict[str, dict[str, str]] = {}
    for line in help_of(name).splitlines():
        if match := re.fullmatch(r"(\S.*):", line):
            entries = found.setdefault(match[1], {})
        elif found and (match := re.match(r"  (?:-\w, )?(--[\w-]+)(?: \S+)*(?:  +(.+))?$", line)):
            option = match[1]
            assert option not in entries
            entries[option] = match[2] or ""
        elif found and line.strip() and not line.lstrip()[0].isdecimal():
            entries[option] += " " + line.strip()
    return found


def long_name(param: click.Option) -> str:
    return max(param.opts, key=len)


def default_of(param: click.Option) -> Any:
    return param.to_info_dict()["default"]  # None where there is none, in every version of click


# --- What is printed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_one_section_with_its_default(name):
    command, found = COMMANDS[name], sections(name)
    assert found.pop("Exit codes") == {} and found.pop("Help").keys() == {"--help"}
    options = {long_name(param): param for param in command.params if isinstance(param, click.Option)}
    printed = {option: text for entries in found.values() for option, text in entries.items()}
    assert sum(map(len, found.values())) == len(printed) and printed.keys() == options.keys()
    for option, param in options.items():
        assert param.help and getattr(param, "section", None) in found
        if default_of(param) is not None and not param.is_flag:
            shown = re.search(r"\[default: ([^;\]]+)", printed[option])
            assert shown and shown[1] == str(default_of(param)), option


@pytest.mark.parametrize("name", {**COMMANDS, **SCRIPTS})
def test_help_ends_with_the_exit_codes(name):
    lines = [line.split(maxsplit=1) for line in help_of(name).splitlines()[-5:]]
    assert [tuple(line) for line in lines] == EXIT_CODES_HELP and [code for code, _ in lines] == [
        "0",
        "1",
        "2",
        "75",
        "130",
    ]


def test_sections_are_headings_of_the_options_below_them():
    @click.command(cls=Command)
    @click.option("--free")
    @section("First")
    @click.option("--a", default=3)
    @section("Second")
    @click.option("--b")
    @click.option("--c")
    def main() -> None:
        """Words."""

    headings = [line for line in CliRunner().invoke(main, ["-h"]).output.splitlines() if line.endswith(":")]
    assert headings == ["Help:", "First:", "Second:", "Exit codes:"]  # without a heading: beside --help
    output = CliRunner().invoke(main, ["-h"]).output
    assert (
        output.index("First:")
        < output.index("--a")
        < output.index("Second:")
        < output.index("--b")
        < output.index("--c")
    )


def test_wide_terminals_are_used(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("train.py", "fid.py calc"):
        script, *rest = name.split()
        widest = max(map(len, CliRunner().invoke(SCRIPTS[script], [*rest, "--help"]).output.splitlines()))
        assert 100 < widest <= 120


# --- Defaults, said more than once -----------------------------------------------------------------------------------


def test_defaults_are_those_of_the_settings():
    options = {param.name: param for param in train.main.params}
    for field in fields(DistillConfig):
        if field.name not in ("dataset_name", "precision", "teacher_sha256"):  # required; by device; found out
            assert default_of(options[field.name.lower()]) == field.default, field.name
    names = {"snap": "snap_kimg"}
    defaults = {field.name: field.default for field in fields(PretrainConfig)}
    compared = {p.name: default_of(p) for p in pretrain.main.params if names.get(p.name, p.name) in defaults}
    del compared["data"], compared["precision"]
    assert compared.pop("ema") == "0.05" and defaults["ema"] == (0.05,)
    (lr,) = (param for param in pretrain.main.params if param.name == "lr")  # by architecture, as its help says
    assert compared.pop("lr") is None and float(re.search(r"default: (\S+),", lr.help)[1]) == defaults["lr"]
    assert len(compared) == 11 and compared == {name: defaults[names.get(name, name)] for name in compared}


def test_defaults_of_a_teacher_are_in_the_help_of_its_options():
    for field in fields(TeacherOptions):
        value = field.default
        if value is not None:
            (param,) = (param for param in sample.main.params if param.name == field.name)
            shown = f"{value:g}" if type(value) is float else str(value)
            shown = {"denoise_to_zero": "with heun"}.get(field.name, shown)
            assert default_of(param) is None and re.search(rf"default:? {shown}$", param.help or ""), field.name


def test_the_page_of_flags_is_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    make_flags = importlib.import_module("make_flags")
    assert {name.removeprefix("-m ") for name in make_flags.COMMANDS} == SCRIPTS.keys()
    page = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    assert page == make_flags.document(), "run python docs/make_flags.py"
    for name, command in COMMANDS.items():
        section = re.search(rf"^## python (?:-m )?{re.escape(name)}\n(.*?)(?=^## |\Z)", page, re.M | re.S)[1]
        listed = re.findall(r"^\| `(--[\w-]+)`", section, re.M)
        assert listed == [long_name(param) for param in command.params if isinstance(param, click.Option)], name


def test_every_number_has_a_range_which_its_help_states():
    """And which excludes what is no number, infinite, or absurd."""
    seen = 0
    for name, command in COMMANDS.items():
        for param in command.params:
            if not isinstance(param.type, (click.types.IntParamType, click.types.FloatParamType)):
                continue
            seen += 1
            assert isinstance(param.type, (Whole, Real)), (name, param.name)
            assert param.type._describe_range() in " ".join(help_of(name).split()), (name, param.name)
            for value in ("nan", "inf", "-inf", "1e306", "1e23", "9" * 23, "9" * 5000, "-1e306", ""):
                with pytest.raises(click.BadParameter) as refused:
                    param.type.convert(value, param, None)
                assert len(refused.value.format_message()) < 200
    assert seen > 40


# --- Examples --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where all that the examples name is there: two runs, images, a teacher."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFD_CACHE", str(tmp_path / "src"))
    for number, kind in enumerate(("plain", "variable")):
        shutil.copytree(student(kind), tmp_path / "exps" / f"{number:05d}-{student(kind).name[6:]}")
    result = {"metric": "FD(x)", "value": 3.0, "label": "student", "nfe": 2, "prdc": dict.fromkeys(PRDC, 0.5)}
    (next(tmp_path.glob("exps/00000-*")) / "metrics.jsonl").write_text(json.dumps(result) + "\n")
    for name in ("my-images", "samples", "data"):
        write_images(tmp_path / name, 8)
    for name in ("my-images", "samples", "my-dataset", "cifar10-32x32"):
        shutil.make_archive(str(tmp_path / name), "zip", tmp_path / "data")
    (tmp_path / "teachers" / "mine").mkdir(parents=True)
    shutil.copy(teacher(), tmp_path / "teachers" / "mine" / "teacher.safetensors")
    return tmp_path


EXAMPLES = [(name, example) for name, command in COMMANDS.items() for example in examples(command)]


def test_every_command_has_examples_of_itself():
    assert {name for name, _ in EXAMPLES} == COMMANDS.keys()
    for name, example in EXAMPLES:
        assert re.search(rf"^python (-m )?{name}( |$)|^torchrun .*{name}( |$)", example), example
        assert f"    {example}\n" in help_of(name)


@pytest.mark.parametrize("name, example", EXAMPLES, ids=[example for _, example in EXAMPLES])
def test_example_runs_as_printed(name, example, folder, monkeypatch, request):
    """Long ones up to where a dry run stops, and what would be downloaded up to what is missing."""
    words = shlex.split(example)
    if words[0] == "torchrun":
        monkeypatch.setenv("WORLD_SIZE", re.search(r"--nproc_per_node=(\d+)", example)[1])
    at = words.index(name.split()[0])
    script, arguments = words[at].removesuffix(".py"), words[at + 1 :]
    if "-n" in {opt for param in COMMANDS[name].params for opt in param.opts}:
        before = sorted(folder.rglob("*"))
        assert "{" in invoke(script, *arguments, "-n").ok().output
        assert sorted(folder.rglob("*")) == before
    elif script == "models.prefetch":
        output = invoke(script, *arguments, "--offline").refused("not everything is there; missing: ").output
        assert all(f"{argument}: missing: " in output for argument in arguments)
    elif script == "models.export":
        if "diffusers" in arguments:
            request.getfixturevalue("ms_coco")
            shutil.rmtree("exps")
            Path("exps/00000-ms_coco").mkdir(parents=True)
            latent_student(Path("exps/00000-ms_coco/network-snapshot-000000.safetensors"))
        result = invoke(script, *arguments)
        if example.endswith(".onnx") and importlib.util.find_spec("onnx") is None:
            result.refused("ONNX needs onnx")
        else:
            assert Path(result.ok() and arguments[-1].removeprefix("--dest=")).exists()
    else:
        if script == "training.plot":
            pytest.importorskip("matplotlib")
        monkeypatch.setattr(registry, "ROWS", {"emoji32": ROWS["emoji32"]})  # counting operations takes seconds
        assert invoke(script, *arguments).ok().output


def test_long_commands_have_a_dry_run():
    short = {"training.plot", "models.export diffusers", "models.export program", "models.export half",
             "models.prefetch",
             "models.registry"}  # fmt: skip
    for name, command in COMMANDS.items():
        assert any(param.name == "dry_run" for param in command.params) == (name not in short), name


# --- Dry runs --------------------------------------------------------------------------------------------------------


def plan(script: str, *arguments: object) -> dict:
    return json.loads(invoke(script, *arguments, "--dry-run", "--device=cpu").ok().output)


def test_dry_runs_say_how_many_evaluations_an_image_takes(folder):
    for given, nfe in (
        (dict(model_path=0), 2),
        (dict(model_path=student("variable"), num_steps=6), 4),
        (dict(model_path="teacher", dataset_name="cifar10"), 35),
        (dict(model_path="teacher", dataset_name="cifar10", solver="euler", num_steps=5, denoise_to_zero=True), 5),
        (dict(model_path="teacher", dataset_name="ms_coco", solver="dpmpp", num_steps=11), 20),
        (dict(model_path="teacher", dataset_name="ms_coco", solver="dpmpp", num_steps=11, guidance_rate=1), 10),
        (dict(model_path=teacher(), solver="dpmpp", num_steps=4, afs=True), 2),
        (dict(model_path=7), None),
    ):
        assert plan("sample", *flags(given, seeds="0-9"))["nfe"] == nfe, given
        assert plan("fid", "gen", *flags(given, seeds="0-9", ref="cifar10"))["nfe"] == nfe, given
    invoke("sample", "--model_path=teacher", "--dataset_name=cifar10", "--num_steps=1", "-n").refused(
        "1 is not in the range 2<=x"
    )


def test_the_planned_evaluations_are_those_of_the_sampler(folder):
    for given in (dict(model_path=0), dict(model_path=teacher(), solver="dpm", num_steps=3, denoise_to_zero=True)):
        planned = plan("sample", *flags(given, seeds="0"))["nfe"]
        assert (
            f"NFE {planned}, 1 images"
            in invoke("sample", *flags(given, seeds="0", outdir="x", device="cpu")).ok().output
        )
        shutil.rmtree("x")


def test_dry_runs_check_what_they_print(folder):
    assert plan("training.pretrain", "--data=my-images", "--outdir=x", "--mult=1,2", "--attn=4")["images"] == 8
    invoke("training.pretrain", "--data=my-images", "--outdir=x", "--mult=1,1,1,1,1", "-n").refused("cannot be halved")
    assert plan("training.bench", "--batch=7", "--json=a/b.json")["batch"] == 7
    invoke("training.bench", "--dataset_name=imagenet65", "-n").refused("unknown dataset_name")
    assert not Path("x").exists() and not Path("a").exists()


def test_groups_name_their_commands():
    for main in (fid.main, prdc.main, export.main):
        assert isinstance(main, Group)
        output = CliRunner().invoke(main, ["--help"]).output
        assert all(re.search(rf"^  {name} ", output, re.M) for name in main.commands)


@pytest.mark.parametrize(
    "script, arguments, words",
    [
        ("sample", [], "Missing option '--model_path'"),
        ("train", ["--no_such_flag"], "No such option"),
        ("train", ["--batch=x"], "Invalid value for '--batch'"),
        ("fid", [], "Missing command"),
        ("fid", ["calc"], "Missing option"),
    ],
)
def test_a_wrong_command_line_is_one_line_that_names_the_help(script, arguments, words):
    result = invoke(script, *arguments).refused(f"{words}.*See `.*{script}.* --help`")
    assert result.code == 2


@pytest.mark.slow
def test_exit_codes_of_the_shell(tmp_path):
    """0 and 1 and 2; tests/training/test_faults.py has those of signals."""
    for arguments, code in (
        (["--help"], 0),
        (["--model_path=0", "-n"], 0),
        (["--model_path=0"], 1),
        (["--no-such-flag"], 2),
    ):
        done = subprocess.run([sys.executable, ROOT / "sample.py", *arguments], cwd=tmp_path, capture_output=True)
        assert done.returncode == code, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_no_path_or_name_may_be_empty(name):
    """As where a variable of the shell is not set: an empty path would be the current directory."""
    command = COMMANDS[name]
    options = [p for p in command.params if isinstance(p, click.Option) and not p.is_flag and p.metavar not in TEXTS]
    for option in (opt for param in options for opt in param.opts if opt.startswith("--")):
        for arguments in ([f"{option}="], [option, ""]):
            with pytest.raises(click.UsageError, match=rf"{option} is empty; is a variable not set"):
                command.make_context(name, arguments)


@pytest.mark.parametrize("run", ["²", "٣", "9" * 5000, "-5", "x" * 300])
def test_what_is_no_number_of_a_run_is_one_line(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for script, arguments in (("training.plot", ["--", run]), ("fid", ["curve", "--ref=empty", "--", run])):
        assert invoke(script, *arguments).refused("is no run|does not exist|File name too long").code == 1
