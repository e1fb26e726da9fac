"""The small helpers: one-line errors, whole files, formatting, the log."""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from dnnlib import (
    Logger,
    UserError,
    first_line,
    format_count,
    format_duration,
    need,
    one_line_errors,
    parse_json,
    replacing,
    write_text,
)
from dnnlib.files import remove_leftovers


def outcome(error, monkeypatch, capsys, rank=None):
    @click.command()
    def command():
        if error is not None:
            raise error

    monkeypatch.setattr("sys.argv", ["x"])
    monkeypatch.setenv("RANK", str(rank)) if rank is not None else monkeypatch.delenv("RANK", raising=False)
    try:
        one_line_errors(command)()
        code = 0
    except SystemExit as exit:
        code = exit.code
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    "error, code, text",
    [
        (None, 0, ""),
        (UserError("say what"), 1, "Error: say what\n"),
        (click.exceptions.Abort(), 130, ""),
        (
            FileNotFoundError(2, "No such file or directory", "some/where"),
            1,
            "Error: some/where: No such file or directory\n",
        ),
        (PermissionError(13, "Permission denied", "/x"), 1, "Error: /x: Permission denied\n"),
    ],
)
def test_errors_of_users_are_one_line(error, code, text, monkeypatch, capsys):
    assert outcome(error, monkeypatch, capsys) == (code, text)


def test_full_disk_is_one_line(monkeypatch, capsys):
    """A failing write has no file name: `OSError: [Errno 28] No space left on device`."""
    code, text = outcome(OSError(28, "No space left on device"), monkeypatch, capsys)
    assert code == 1 and text.startswith("Error:") and "No space left on device" in text and text.count("\n") == 1


def test_other_ranks_say_nothing(monkeypatch, capsys):
    assert outcome(UserError("x"), monkeypatch, capsys, rank=1) == (1, "")
    assert outcome(FileNotFoundError(2, "No", "x"), monkeypatch, capsys, rank=1) == (1, "")
    assert outcome(UserError("x"), monkeypatch, capsys, rank=0) == (1, "Error: x\n")


def test_defects_of_the_program_keep_their_traceback(monkeypatch, capsys):
    with pytest.raises(ZeroDivisionError):
        outcome(ZeroDivisionError("x"), monkeypatch, capsys)


def test_a_name_never_holds_half_a_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "first ü")
    assert path.read_text(encoding="utf-8") == "first ü"
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        assert (
            path.read_text(encoding="utf-8") == "first ü"
            and temporary.suffix == ".txt"
            and temporary.parent == tmp_path
        )
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and path.read_text(encoding="utf-8") == "first ü"
    with replacing(path, sync=False) as temporary:
        temporary.write_text("second")
    assert path.read_text() == "second" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_files_are_as_readable_as_the_user_wants(tmp_path):
    mask = os.umask(0)
    os.umask(mask)
    with replacing(tmp_path / "a") as temporary:
        temporary.touch(0o600)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~mask


def test_errors_of_writing_name_the_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught:
        write_text(tmp_path / "file" / "a", "x")
    assert "file" in caught.value.filename
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="no regular file"):
        write_text(tmp_path / "folder", "x")
    with pytest.raises(OSError) as caught, replacing(tmp_path / "full"):
        raise OSError(errno.ENOSPC, "No space left on device")  # as writers of numbers report it
    assert caught.value.filename == str(tmp_path / "full")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0s"), (-3, "0s"), (42.4, "42s"), (59.4, "59s"), (59.6, "1m 00s"), (187, "3m 07s"), (3599.7, "1h 00m 00s"),
     (7509, "2h 05m 09s"), (86399.6, "1d 00h 00m"), (356000, "4d 02h 53m")],
)  # fmt: skip
def test_durations(seconds, text):
    assert format_duration(seconds) == text


@given(st.integers(0, 86399))
@settings(max_examples=100, deadline=None)
def test_durations_keep_every_second(seconds):
    factors = {"h": 3600, "m": 60, "s": 1}
    assert sum(int(part[:-1]) * factors[part[-1]] for part in format_duration(seconds).split()) == seconds


@pytest.mark.parametrize(
    "value, text", [(0, "0"), (812, "812"), (1990000, "1.99 M"), (2.3e9, "2.30 G"), (1000, "1.00 k"), (5e12, "5.00 T")]
)
def test_counts(value, text):
    assert format_count(value) == text


def test_log_keeps_what_was_printed_and_appends(tmp_path):
    for text in ("one", "two"):
        stream = io.StringIO()
        log = Logger(tmp_path / "log.txt", stream)
        log(text + " ü")
        assert (tmp_path / "log.txt").read_text(encoding="utf-8").endswith(text + " ü\n")  # at once, not at the end
        log.close()
        assert stream.getvalue().strip() == text + " ü"
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == "one ü\ntwo ü\n"


def test_a_log_outlives_those_who_read_it(tmp_path):
    """A pipe whose reader has ended, a full device, a closed stream."""
    reader, writer = os.pipe()
    os.close(reader)
    closed = io.StringIO()
    closed.close()
    for stream in (os.fdopen(writer, "w"), open("/dev/full", "w"), closed):
        log = Logger(tmp_path / "log.txt", stream)
        log("one")
        log("two")
        log.close()
        stream.close()
    assert (tmp_path / "log.txt").read_text() == "one\ntwo\n" * 3


def test_errors_stay_one_line_whatever_they_quote(monkeypatch, capsys):
    code, text = outcome(UserError("no \x1b[31mfile\nsecond \x00 line"), monkeypatch, capsys)
    assert code == 1 and text.count("\n") == 1 and "\x1b" not in text and "\x00" not in text


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError(), "ValueError"),
        (ValueError("\n\n"), "ValueError"),
        (ValueError("one\ntwo"), "one"),
        (ValueError("\x1b[1mbold\x07"), "[1mbold"),
        (ValueError("x" * 1000), "x" * 200),
    ],
)
def test_the_first_line_of_an_error(error, line):
    assert first_line(error) == line


def test_a_missing_package_is_named_with_its_installation():
    with pytest.raises(UserError, match="no_such_package is needed .* run: pip install no-such-package"):
        need("no_such_package", "pip install no-such-package")
    assert need("json", "").__name__ == "json"


# --- Signals before and after a command ------------------------------------------------------------------------------


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
@pytest.mark.parametrize("command", [["train.py"], ["-m", "models.prefetch"]])
def test_a_signal_while_torch_is_imported_is_one_line(command, number, code):
    process = subprocess.Popen([sys.executable, "-v", *command, "--help"], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.DEVNULL)  # fmt: skip
    for line in process.stderr:  # `-v` tells what is imported
        if line.startswith("import 'torch._"):
            break
    process.send_signal(number)
    output = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert "Traceback" not in output and f"Stopped by {number.name}; repeat the command" in output


def test_programs_that_import_this_one_keep_their_signals():
    program = "import signal, models; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


# --- Files that must not be replaced ---------------------------------------------------------------------------------


def test_writing_goes_through_links_and_refuses_what_is_no_file(tmp_path):
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    link.symlink_to(real)
    for content in ("one", "two"):  # a link to nothing yet, then to a file
        write_text(link, content)
        assert link.is_symlink() and real.read_text() == content
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(UserError, match="no regular file"):
            write_text(tmp_path / name, "x")
    with pytest.raises(UserError, match="no regular file"):
        write_text(Path(os.devnull), "x")
    assert Path(os.devnull).is_char_device() and sorted(p.name for p in tmp_path.iterdir()) == [
        "link.txt",
        "pipe",
        "real.txt",
    ]


@pytest.mark.parametrize("text, words", [
    ("[" * 100_000, "nested too deeply"), ('{"a":' * 100_000, "nested too deeply"), ("[NaN]", "NaN is no number"),
    ("-Infinity", "-Infinity is no number"), ("[1e999]", "1e999 is beyond float64"), ('{"a": 1, "a": 2}', "it has 'a' twice"),
    ('{"b": {"a": 1, "a": 1}}', "it has 'a' twice"), ("", "Expecting value"), ("9" * 5000, "4300"), (b"\xff\x00\x00", "codec"),
    ('{"a"', "Expecting"),
])  # fmt: skip
def test_texts_that_readers_of_json_take_differently_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        parse_json(text)
    assert parse_json('{"a": [1, 2.5, null, true, "x"], "b": {"a": {}}}') == {
        "a": [1, 2.5, None, True, "x"],
        "b": {"a": {}},
    }


def test_only_names_that_were_made_here_are_removed(tmp_path):
    kept = {".notes.tmp.txt", ".x.tmp.y", ".0123456789ab.tmp.", "0123456789ab.tmp.x", ".0123456789AB.tmp.x"}
    for name in kept | {".0123456789ab.tmp.student.safetensors"}:
        (tmp_path / name).write_text("")
    (tmp_path / ".0123456789ab.tmp.folder").mkdir()
    remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == kept | {".0123456789ab.tmp.folder"}


# --- Collective operations that fail ---------------------------------------------------------------------------------

NCCL = "NCCL error in: /src/NCCLUtils.cpp:94, {kind}, NCCL version 2.27.7\n{code}: {advice}\nLast error:\n{last}"


@pytest.mark.parametrize(
    "text, message",
    [
        (
            NCCL.format(
                kind="invalid usage (run with NCCL_DEBUG=WARN for details)",
                code="ncclInvalidUsage",
                advice="This usually reflects invalid usage of NCCL library.",
                last="Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 18000",
            ),
            r"cannot work together \(Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 18000\)",
        ),
        (
            NCCL.format(
                kind="unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
                code="ncclUnhandledCudaError",
                advice="Call to CUDA function failed.",
                last="Cuda failure 'peer access is not supported between these two devices'",
            ),
            r"cannot work together \(Cuda failure 'peer access",
        ),
        (
            NCCL.format(
                kind="remote process exited or there was a network error",
                code="ncclRemoteError",
                advice="A call failed possibly due to a network error or a remote process exiting prematurely.",
                last="socketPollConnect: connect to 10.0.0.2<40000> returned Connection refused",
            ),
            "ended or does not answer .*Connection refused.*repeat the command",
        ),
        ("NCCL communicator was aborted on rank 1.", "ended or does not answer .*aborted.*repeat the command"),
        (
            "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7) ran for 1800000 milliseconds",
            "ended or does not answer .*repeat the command",
        ),
        (
            "[/src/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:31337",
            "ended or does not answer .*repeat the command",
        ),
        ("[gloo/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv", "ended or does not answer"),
        ("[gloo] Unable to find address for: enp9s0", r"cannot work together .*enp9s0\)"),
    ],
)
def test_the_cause_of_a_failed_collective_operation_is_quoted(text, message, monkeypatch, capsys):
    dist_error = type("DistBackendError", (RuntimeError,), {})
    code, shown = outcome(dist_error(text), monkeypatch, capsys)
    assert code == 1 and shown.count("\n") == 1 and re.search(message, shown), shown
    assert ("repeat the command" in shown) == ("does not answer" in shown)
