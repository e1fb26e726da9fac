"""Progress: a bar on a terminal, whole lines elsewhere."""

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest
from conftest import ROOT

from dnnlib import progress as module
from dnnlib.progress import Lines, progress


@pytest.mark.parametrize("total", [None, 40])
def test_without_a_terminal_there_are_lines_now_and_then(total, monkeypatch, capsys):
    now = iter([0, 10, 61, 70, 125, 130])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    with progress(total, initial=10, desc="things") as bar:
        for _ in range(5):
            bar.update(5)
    lines = capsys.readouterr().err.splitlines()
    if total is None:
        assert lines == ["things: 20 img, 1m 01s", "things: 30 img, 2m 05s"]
    else:
        assert lines == ["things: 20 of 40 img, 1m 01s, eta 2m 02s", "things: 30 of 40 img, 2m 05s, eta 1m 02s"]


def test_a_line_fits_100_columns():
    line = Lines(10**12, "img", 0, "x" * 200)
    line.n = 10**11
    assert len(line.line(1e7)) <= 100


@pytest.mark.parametrize("show, lines", [(False, True), (True, False)])
def test_others_say_nothing(show, lines, monkeypatch, capsys):
    monkeypatch.setattr(module, "INTERVAL", 0)
    with progress(10, show=show, lines=lines) as bar:
        bar.update(10)
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar():
    code = "from dnnlib.progress import progress\nwith progress(10) as bar:\n    bar.update(10)"
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=slave)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(master, 10000):
            shown += part
    os.close(master)
    assert process.wait() == 0 and b"100%" in shown
