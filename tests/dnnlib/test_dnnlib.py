"""The small helpers: one-line errors, whole files, formatting, the log."""

from __future__ import annotations

import io
import os

import click
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dnnlib import Logger, UserError, format_count, format_duration, one_line_errors, replacing, write_text


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
    with pytest.raises(OSError):
        write_text(tmp_path / "folder", "x")
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
    Logger(None, io.StringIO())("x")
