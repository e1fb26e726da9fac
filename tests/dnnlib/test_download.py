"""Downloads against a local server that behaves as badly as real ones do."""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import requests
from conftest import ROOT

from dnnlib import UserError, checksums, download
from dnnlib.download import cache_dir, derive, fetch
from dnnlib.options import offline_option

BODY = bytes(range(256)) * 4000  # about 1 MB: many chunks
SHA = hashlib.sha256(BODY).hexdigest()
OTHER = b"x" + BODY[1:-1] + b"x"


class Handler(BaseHTTPRequestHandler):
    """Serves `BODY` under every path, in the manner that the path names."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        seen = self.server.requests
        seen.append((self.path, self.headers.get("Range"), self.headers.get("Accept-Encoding")))
        count = sum(path == self.path for path, _, _ in seen)
        getattr(self, parts[0].replace("-", "_"))(count, *parts[1:])

    def log_message(self, *args):
        pass

    def answer(self, body=BODY, status=200, send=None, etag='"v1"', ranges=True, length=True, **headers):
        """Send `body` (only `send` bytes of it, then hang up), or the range that was asked for."""
        start = 0
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if match and ranges and status == 200:
            start = int(match[1])
            if start >= len(body):
                status, headers["Content-Range"], body = 416, f"bytes */{len(body)}", b""
            else:
                status, headers["Content-Range"] = 206, f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.send_response(status)
        for name, value in {"ETag": etag, **headers}.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        if length and "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:] if send is None else body[start : start + send])
        if send is not None or not length or "Content_Length" in headers:
            self.close_connection = True

    def good(self, count, *name):
        self.answer()

    def slow(self, count):
        time.sleep(0.5)
        self.answer()

    def drops(self, count):
        self.answer(send=300_000)

    def drops_at_once(self, count):
        self.answer(send=0)

    def drops_without_version(self, count):
        self.answer(send=300_000 if count == 1 else None, etag=None)

    def drops_and_ignores_range(self, count):
        self.answer(send=600_000 if count == 1 else None, ranges=False)

    def drops_then_changes(self, count):
        self.answer(**dict(send=600_000) if count == 1 else dict(body=OTHER, etag='"v2"'))

    def drops_then_wrong_range(self, count):
        if self.headers.get("Range"):
            self.send_response(206)
            self.send_header("Content-Range", f"bytes 0-{len(BODY) - 1}/{len(BODY)}")
            self.send_header("Content-Length", str(len(BODY)))
            self.send_header("ETag", '"v1"')
            self.end_headers()
            self.wfile.write(BODY)
        else:
            self.answer(send=600_000 if count == 1 else None)

    def too_long(self, count):
        self.answer(Content_Length=len(BODY) + 1000)

    def too_short(self, count):
        self.answer(Content_Length=len(BODY) - 1000)

    def endless(self, count):
        self.answer(Content_Length=10**17)

    def without_end(self, count):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while True:  # until the client hangs up
            self.wfile.write(f"{len(BODY):x}\r\n".encode() + BODY + b"\r\n")

    def trickle(self, count, in_chunks="", begin="0"):
        """`begin` bytes at once, then a byte each tenth of a second."""
        self.send_response(200)
        self.send_header("ETag", '"v1"')
        self.send_header(*(("Transfer-Encoding", "chunked") if in_chunks else ("Content-Length", str(len(BODY)))))
        self.end_headers()
        self.wfile.write(f"{len(BODY):x}\r\n".encode() if in_chunks else b"")
        self.wfile.write(BODY[: int(begin)])
        for i in range(int(begin), len(BODY)):
            time.sleep(0.1)
            self.wfile.write(BODY[i : i + 1])

    def no_length(self, count):
        self.answer(length=False)

    def empty(self, count):
        self.answer(b"")

    def chunked(self, count, body=BODY):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for start in range(0, len(body), 100_000):
            piece = body[start : start + 100_000]
            self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def chunked_empty(self, count):
        self.chunked(count, b"")

    def gzip(self, count):
        self.answer(Content_Encoding="gzip")

    def page(self, count):
        self.answer(b"<html>please log in</html>", Content_Type="text/html; charset=utf-8")

    def labelled_as_page(self, count):
        self.answer(Content_Type="text/html")

    def wrong(self, count):
        self.answer(OTHER)

    def missing(self, count):
        self.answer(b"no", status=404)

    def forbidden(self, count):
        self.answer(b"no", status=403)

    def busy(self, count):
        self.answer(b"later", status=503) if count < 3 else self.answer()

    def broken(self, count):
        self.answer(b"later", status=500)

    def redirect(self, count, *target):
        self.answer(b"", status=302, Location="/" + "/".join(target))

    def garbage(self, count):
        self.wfile.write(b"\x00\xff not http\r\n\r\n")
        self.close_connection = True

    def circle(self, count):
        self.answer(b"", status=302, Location="/circle")

    def to_a_file(self, count):
        self.answer(b"", status=302, Location="file:///etc/hostname")


class Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """A client that hangs up is part of these tests."""


@pytest.fixture(scope="module")
def server():
    httpd = Server(("127.0.0.1", 0), Handler)
    httpd.requests = []
    threading.Thread(target=lambda: httpd.serve_forever(poll_interval=0.01), daemon=True).start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{httpd.server_port}/", requests=httpd.requests)
    httpd.shutdown()


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch, server):
    for name in ("SFD_OFFLINE", "HF_ENDPOINT", "RANK", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SFD_CACHE", str(tmp_path / "src"))
    monkeypatch.setattr(download, "BACKOFF", 0.001)
    server.requests.clear()


@pytest.fixture
def dest(tmp_path):
    return tmp_path / "src" / "cifar10" / "net.pkl"


def record():
    return json.loads((cache_dir() / "checksums.json").read_text())


def error_of(*args, **kwargs):
    """The one line that a failing `fetch` ends with."""
    with pytest.raises(UserError) as caught:
        fetch(*args, **kwargs)
    assert "\n" not in caught.value.message
    return caught.value.message


def only_files(dest):
    """Names beside `dest` that a user would see."""
    return sorted(path.name for path in dest.parent.iterdir() if not path.name.startswith("."))


def test_fetch_records_and_remembers(server, dest, monkeypatch):
    assert fetch([server.url + "good"], dest) == dest
    assert dest.read_bytes() == BODY and only_files(dest) == ["net.pkl"]
    entry = record()["cifar10/net.pkl"]
    assert entry == {"sha256": SHA, "size": len(BODY), "mtime_ns": dest.stat().st_mtime_ns}
    assert server.requests == [("/good", None, "identity")]
    # From then on: no request, and no reading of gigabytes.
    monkeypatch.setattr(download, "sha256_of", None)
    for sha256 in (None, SHA[:10], SHA):
        assert fetch([server.url + "good"], dest, sha256) == dest
    assert len(server.requests) == 1


def test_cache_dir(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "src"
    monkeypatch.delenv("SFD_CACHE")
    assert cache_dir() == Path("src")


def test_a_file_outside_of_the_cache(server, tmp_path):
    dest = tmp_path / "elsewhere" / "net.pkl"
    fetch([server.url + "good"], dest)
    assert list(record()) == [str(dest)]


@pytest.mark.parametrize("sha256", [SHA, SHA[:10]])
def test_published_checksum(server, dest, sha256):
    fetch([server.url + "good"], dest, sha256)
    assert dest.read_bytes() == BODY and record()["cifar10/net.pkl"]["sha256"] == SHA


@pytest.mark.parametrize("sha256", [SHA, SHA[:10]])
def test_wrong_body(server, dest, sha256):
    message = error_of([server.url + "wrong"], dest, sha256)
    assert f"{server.url}wrong: wrong content, its sha256 is {hashlib.sha256(OTHER).hexdigest()[:16]}" in message
    assert f"put the file by hand at {dest}, or let SFD_CACHE" in message
    assert only_files(dest) == [] and len(server.requests) == 1
    fetch([server.url + "wrong", server.url + "good"], dest, sha256)
    assert dest.read_bytes() == BODY


def test_changed_file_is_refused(server, dest):
    fetch([server.url + "good"], dest)
    dest.write_bytes(OTHER)
    message = error_of([server.url + "good"], dest)
    assert f"{dest} is not the expected file" in message and "delete it" in message
    # A complete published checksum is the last word; a file that has it replaces the record.
    fetch([server.url + "good"], dest, hashlib.sha256(OTHER).hexdigest())
    assert record()["cifar10/net.pkl"]["sha256"] == hashlib.sha256(OTHER).hexdigest()
    assert "the published one" in error_of([server.url + "good"], dest, SHA)


def test_first_use_is_compared_from_then_on(server, dest):
    fetch([server.url + "good"], dest)
    dest.unlink()
    assert f"recorded in {cache_dir() / 'checksums.json'}" in error_of([server.url + "wrong"], dest)
    fetch([server.url + "wrong", server.url + "redirect/good"], dest)
    assert dest.read_bytes() == BODY


def test_touched_file_is_read_again(server, dest):
    fetch([server.url + "good"], dest)
    os.utime(dest, (1, 1))
    fetch([server.url + "good"], dest)
    assert record()["cifar10/net.pkl"]["mtime_ns"] == 10**9 and len(server.requests) == 1


def test_file_put_by_hand(server, dest, monkeypatch):
    monkeypatch.setenv("SFD_OFFLINE", "1")
    dest.parent.mkdir(parents=True)
    dest.write_bytes(BODY)
    assert fetch([server.url + "missing"], dest, SHA) == dest
    assert record()["cifar10/net.pkl"]["sha256"] == SHA and not server.requests


def test_directory_in_the_way(server, dest):
    dest.mkdir(parents=True)
    assert f"{dest} is not a file" in error_of([server.url + "good"], dest)


def test_damaged_record(server, dest):
    cache_dir().mkdir()
    for text in ("{", "[]", '{"x": 1}', '{"x": {"sha256": 1}}', "[" * 100_000):
        (cache_dir() / "checksums.json").write_text(text)
        dest.parent.mkdir(exist_ok=True)
        dest.write_bytes(BODY)
        assert "checksums.json is damaged" in error_of([server.url + "good"], dest)


def test_record_that_cannot_be_written(server, dest, monkeypatch, capsys):
    """A shared cache that somebody else has filled can be used."""

    def refuse(path, text):
        raise PermissionError(13, "Permission denied", str(path))

    dest.parent.mkdir(parents=True)
    dest.write_bytes(BODY)
    monkeypatch.setattr(checksums, "write_text", refuse)
    assert fetch([server.url + "good"], dest, SHA) == dest
    assert "cannot record the checksum" in capsys.readouterr().err


def test_offline_flag_of_a_command(server, dest, monkeypatch):
    monkeypatch.setenv("SFD_OFFLINE", "")  # so that it is restored

    @click.command()
    @offline_option
    def command():
        fetch([server.url + "good"], dest)

    with pytest.raises(UserError, match=f"offline, and {dest} is not there; get it from {server.url}good"):
        command.main(["--offline"], standalone_mode=False)
    assert os.environ["SFD_OFFLINE"] == "1" and not server.requests
    monkeypatch.setenv("SFD_OFFLINE", "off")
    command.main([], standalone_mode=False)
    assert dest.read_bytes() == BODY


@pytest.mark.parametrize("value", ["1", "true"])
def test_offline(server, dest, monkeypatch, value):
    monkeypatch.setenv("SFD_OFFLINE", value)
    message = error_of([server.url + "good", server.url + "slow"], dest)
    assert str(dest) in message and server.url + "good" in message and "offline" in message
    assert not server.requests and not dest.parent.exists()
    monkeypatch.setenv("SFD_OFFLINE", "0")
    assert fetch([server.url + "good"], dest) == dest


def test_mirrors_in_order(server, dest, capsys):
    fetch([server.url + path for path in ("missing", "forbidden", "good", "wrong")], dest)
    assert [path for path, *_ in server.requests] == ["/missing", "/forbidden", "/good"]
    said = capsys.readouterr().err
    assert f"{server.url}missing: 404 Not Found; trying the next address\n" in said and "forbidden: 403" in said


def test_all_mirrors_fail(server, dest):
    message = error_of([server.url + "missing", server.url + "broken"], dest)
    assert f"{server.url}missing: 404 Not Found;" in message
    assert f"{server.url}broken: 500 Internal Server Error; gave up" in message
    assert f"put the file by hand at {dest}, or let SFD_CACHE" in message
    assert [path for path, *_ in server.requests] == ["/missing"] + ["/broken"] * download.ATTEMPTS


def test_busy_server_is_asked_again(server, dest, capsys):
    fetch([server.url + "busy"], dest)
    assert dest.read_bytes() == BODY and len(server.requests) == 3
    assert capsys.readouterr().err.count(f"{server.url}busy: 503 Service Unavailable; trying again\n") == 2


@pytest.mark.parametrize("sha256", [None, SHA])
def test_dropped_connections_are_resumed(server, dest, sha256):
    fetch([server.url + "drops"], dest, sha256)
    assert dest.read_bytes() == BODY and only_files(dest) == ["net.pkl"]
    ranges = [asked for _, asked, _ in server.requests]
    assert ranges[0] is None and 4 <= len(ranges) <= 5
    starts = [int(asked[6:-1]) for asked in ranges[1:]]
    assert starts == sorted(set(starts)) and 200_000 < starts[0] <= 300_000


def test_no_progress_ends(server, dest):
    message = error_of([server.url + "drops-at-once"], dest)
    assert "gave up" in message and len(server.requests) == download.ATTEMPTS


def test_progress_renews_the_attempts(server, dest, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    assert "gave up" in error_of([server.url + "drops"], dest, SHA)
    dest.with_name("net.pkl.part").unlink()
    monkeypatch.setattr(download, "PROGRESS", 200_000)
    fetch([server.url + "drops"], dest, SHA)
    assert dest.read_bytes() == BODY


def test_next_run_resumes(server, dest, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    error_of([server.url + "drops"], dest)
    assert sorted(only_files(dest)) == ["net.pkl.part", "net.pkl.part.json"]
    left = dest.with_name("net.pkl.part").stat().st_size
    monkeypatch.setattr(download, "ATTEMPTS", 5)
    fetch([server.url + "drops"], dest)
    assert server.requests[1][1] == f"bytes={left}-" and dest.read_bytes() == BODY


def test_crash_before_renaming(server, dest):
    """A part that is complete needs no request, only its checksum."""
    dest.parent.mkdir(parents=True)
    dest.with_name("net.pkl.part").write_bytes(BODY)
    dest.with_name("net.pkl.part.json").write_text(json.dumps({"url": "old", "size": len(BODY)}))
    fetch([server.url + "missing"], dest, SHA)
    assert dest.read_bytes() == BODY and only_files(dest) == ["net.pkl"] and not server.requests


def test_part_of_unknown_origin(server, dest):
    """Without a checksum nothing is continued that might be of another file; with one it is tried."""
    for sha256, note, asked in ((None, None, [None]), (None, "{", [None]), (SHA, None, ["bytes=3-", None])):
        dest.parent.mkdir(parents=True, exist_ok=True)
        dest.with_name("net.pkl.part").write_bytes(b"bad")
        if note is not None:
            dest.with_name("net.pkl.part.json").write_text(note)
        fetch([server.url + "good"], dest, sha256)
        assert dest.read_bytes() == BODY and [asked for _, asked, _ in server.requests] == asked
        server.requests.clear()
        dest.unlink()
        (cache_dir() / "checksums.json").unlink()


def test_part_of_another_file_and_a_mirror_that_is_wrong_too(server, dest):
    dest.parent.mkdir(parents=True)
    dest.with_name("net.pkl.part").write_bytes(b"bad")
    assert "wrong content" in error_of([server.url + "wrong"], dest, SHA)
    assert [asked for _, asked, _ in server.requests] == ["bytes=3-", None]


def test_part_longer_than_the_file(server, dest):
    dest.parent.mkdir(parents=True)
    dest.with_name("net.pkl.part").write_bytes(BODY + b"more")
    fetch([server.url + "good"], dest, SHA)
    assert dest.read_bytes() == BODY


def test_another_mirror_continues_what_a_checksum_will_judge(server, dest, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    fetch([server.url + "drops", server.url + "good"], dest, SHA)
    assert server.requests[1][0] == "/good" and server.requests[1][1] is not None and dest.read_bytes() == BODY


def test_another_mirror_begins_anew_without_checksum(server, dest, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    fetch([server.url + "drops", server.url + "good"], dest)
    assert server.requests[1] == ("/good", None, "identity") and dest.read_bytes() == BODY


@pytest.mark.parametrize("name", ["drops-and-ignores-range", "drops-then-wrong-range", "drops-without-version"])
def test_servers_that_cannot_resume(server, dest, name):
    fetch([server.url + name], dest)
    assert dest.read_bytes() == BODY


def test_file_that_changes_meanwhile(server, dest):
    fetch([server.url + "drops-then-changes"], dest)
    assert dest.read_bytes() == OTHER
    dest.unlink()
    server.requests.clear()
    assert "wrong content" in error_of([server.url + "drops-then-changes"], dest, SHA)


def test_announced_length_that_does_not_come(server, dest):
    message = error_of([server.url + "too-long"], dest)
    assert "gave up" in message and not dest.exists()


def test_length_is_checked_whatever_the_http_library_does(server, dest, monkeypatch):
    monkeypatch.setattr(requests.Response, "iter_content", lambda self, size: iter([BODY[:1000]]))
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    assert f"1000 bytes arrived, {len(BODY)} were announced" in error_of([server.url + "good"], dest)


def test_announced_length_that_is_too_short(server, dest):
    assert "wrong content" in error_of([server.url + "too-short"], dest, SHA)


def test_length_is_not_told(server, dest):
    assert "does not tell the length" in error_of([server.url + "no-length"], dest)
    fetch([server.url + "no-length"], dest, SHA)
    assert dest.read_bytes() == BODY


def test_chunked(server, dest):
    fetch([server.url + "chunked"], dest)
    assert dest.read_bytes() == BODY


def test_useless_answers(server, dest):
    assert "gave up" in error_of([server.url + "garbage"], dest)
    assert "sends the file as gzip" in error_of([server.url + "gzip"], dest)
    for name in ("empty", "chunked-empty"):
        assert "sends an empty file" in error_of([server.url + name], dest)


def test_web_page_instead_of_the_file(server, dest):
    assert "answers with a web page" in error_of([server.url + "page"], dest)
    assert "wrong content" in error_of([server.url + "page"], dest, SHA)
    fetch([server.url + "labelled-as-page"], dest, SHA)
    assert dest.read_bytes() == BODY


def test_redirects(server, dest):
    fetch([server.url + "redirect/redirect/drops"], dest)
    assert dest.read_bytes() == BODY and len(server.requests) >= 10
    dest.unlink()
    assert "too many redirects" in error_of([server.url + "circle"], dest)
    assert "invalid schema" in error_of([server.url + "to-a-file"], dest)


def test_redirect_to_an_unencrypted_address(server, dest, monkeypatch):
    get = requests.get
    monkeypatch.setattr(requests, "get", lambda url, **kwargs: get(url.replace("https:", "http:"), **kwargs))
    url = server.url.replace("http:", "https:") + "good"
    assert "redirects to an unencrypted address" in error_of([url], dest)
    fetch([url], dest, SHA)
    assert dest.read_bytes() == BODY


def test_redirect_by_way_of_an_unencrypted_address(dest):
    """Where it ends says nothing about who sent one there."""
    hops = [SimpleNamespace(url=url) for url in ("https://a/x", "http://b/x")]
    head = requests.structures.CaseInsensitiveDict({"Content-Length": "5"})
    dest.parent.mkdir(parents=True)
    for history in (hops[:1], hops):
        response = SimpleNamespace(status_code=200, headers=head, history=history, url="https://c/x", reason="")
        part = download._Part(dest)
        if history == hops:
            with pytest.raises(download._Failed, match="unencrypted"):
                download._begin("https://a/x", part, response, has_checksum=False)
        else:
            assert download._begin("https://a/x", part, response, has_checksum=False) == 5


def test_nobody_there(dest):
    message = error_of(["http://127.0.0.1:9/net.pkl"], dest)
    assert "http://127.0.0.1:9/net.pkl: Connection refused" in message
    message = error_of(["http://user:secret@127.0.0.1:9/net.pkl"], dest)
    assert "secret" not in message


def test_silent_server_times_out(server, dest, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUTS", (1, 0.05))
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    assert "no answer in time" in error_of([server.url + "slow"], dest)


def test_hub_endpoint_and_proxy(server, dest, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    fetch(["https://huggingface.co/good/a/resolve/main/net.pkl"], dest)
    assert server.requests[0][0] == "/good/a/resolve/main/net.pkl"
    dest.unlink()
    monkeypatch.setenv("http_proxy", server.url)
    # Another host whose name begins alike is not the Hub; a proxy is asked for the whole address.
    monkeypatch.setattr(Handler, "http:", lambda self, count, *rest: self.answer(), raising=False)
    fetch(["http://huggingface.co.example/good"], dest)
    assert server.requests[-1][0] == "http://huggingface.co.example/good"


def test_no_room(server, dest, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    message = error_of([server.url + "good"], dest)
    assert "GB needed" in message and "SFD_CACHE" in message


def test_absurd_length_is_no_reason_to_give_up_other_mirrors(server, dest):
    message = error_of([server.url + "endless"], dest)
    assert "GB needed" in message and only_files(dest) == ["net.pkl.part.json"]
    fetch([server.url + "endless", server.url + "good"], dest)
    assert dest.read_bytes() == BODY and only_files(dest) == ["net.pkl"]


@pytest.mark.parametrize("path", ["trickle", "trickle/chunks", "trickle//300000"])
def test_a_server_that_trickles_is_left(server, dest, monkeypatch, path):
    """No timeout of a socket ends it: something comes all the time. Nor does it keep the other mirrors from being asked."""
    monkeypatch.setattr(download, "PIECE_SECONDS", 0.6)
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    start = time.monotonic()
    message = error_of([server.url + path], dest, SHA)
    assert "sends less than" in message and time.monotonic() - start < 20
    fetch([server.url + path, server.url + "good"], dest, SHA)
    assert dest.read_bytes() == BODY


def test_a_download_has_a_time_in_which_to_end(server, dest, monkeypatch):
    monkeypatch.setattr(download, "MAX_SECONDS", 0.7)
    start = time.monotonic()
    message = error_of([server.url + "trickle"], dest)
    assert "takes more than" in message and "gave up" in message and time.monotonic() - start < 10


def test_a_file_without_end_is_left_and_removed(server, dest, monkeypatch):
    monkeypatch.setattr(download, "MAX_SIZE", 3 * len(BODY))
    assert f"sends more than {3 * len(BODY):,} bytes" in error_of([server.url + "without-end"], dest)
    assert only_files(dest) == []
    assert f"sends more than {len(BODY):,} bytes" in error_of([server.url + "without-end"], dest, SHA, size=len(BODY))
    assert only_files(dest) == []


def test_a_known_size_is_compared_before_anything_comes(server, dest):
    message = error_of([server.url + "good"], dest, size=len(BODY) + 1)
    assert f"announces {len(BODY):,} bytes, the published file has {len(BODY) + 1:,}" in message
    assert only_files(dest) == []
    fetch([server.url + "good"], dest, size=len(BODY))
    assert dest.read_bytes() == BODY


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_what_filled_the_disk_is_removed(server, dest, monkeypatch, number):
    class Full:
        """A file that takes one piece and no more."""

        def __init__(self, file):
            self.file, self.taken = file, 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.taken += 1
            if self.taken > 1:
                raise OSError(number, os.strerror(number))
            self.file.write(data)

    monkeypatch.setattr(
        download, "open", lambda path, mode: Full(open(path, mode)) if mode == "ab" else open(path, mode), raising=False
    )
    message = error_of([server.url + "good"], dest)
    assert os.strerror(number) in message and only_files(dest) == []


def test_directory_that_cannot_be_made(server, tmp_path):
    (tmp_path / "file").write_text("")
    message = error_of([server.url + "good"], tmp_path / "file" / "net.pkl")
    assert server.url in message and ("Not a directory" in message or "File exists" in message)


MISTAKES = [([], None), (["file:///etc/passwd"], None), ("http://x", None), (["http://x"], "ABC")]


@pytest.mark.parametrize("urls, sha256", MISTAKES)
def test_mistakes_of_the_caller(dest, urls, sha256):
    with pytest.raises(ValueError, match="expected"):
        fetch(urls, dest, sha256)


def test_progress_is_shown_by_the_first_rank_only(server, dest, monkeypatch, capsys):
    monkeypatch.setattr("dnnlib.progress.INTERVAL", 0)
    fetch([server.url + "good"], dest)
    assert f"net.pkl: {len(BODY)} of {len(BODY)} " in capsys.readouterr().err
    dest.unlink()
    monkeypatch.setenv("RANK", "1")
    fetch([server.url + "good"], dest)
    assert capsys.readouterr().err == ""


def test_processes_that_fetch_at_once_download_once(server, dest):
    code = "import sys; from dnnlib.download import fetch; fetch([sys.argv[1]], sys.argv[2])"
    command = [sys.executable, "-c", code, server.url + "slow", str(dest)]
    ranks = [
        subprocess.Popen(command, cwd=ROOT, env={**os.environ, "RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in ("0", "0", "1")
    ]
    errors = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], errors
    assert len(server.requests) == 1 and dest.read_bytes() == BODY and errors[2] == ""


def test_derived_file_is_made_once_and_verified(tmp_path):
    dest, calls = tmp_path / "src" / "ldm" / "model.ckpt", []

    def make():
        calls.append(1)
        dest.write_bytes(BODY)

    threads = [threading.Thread(target=derive, args=(dest, make)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [1] and derive(dest, make) == dest and record()["ldm/model.ckpt"]["sha256"] == SHA
    dest.write_bytes(OTHER)
    with pytest.raises(UserError, match="not the expected file.*recorded in"):
        derive(dest, make)


def test_derived_file_that_cannot_be_made(tmp_path):
    dest = tmp_path / "src" / "model.ckpt"

    def make():
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=f"cannot make {dest}: .*No space left on device; make"):
        derive(dest, make)
    assert not dest.exists()


def test_waiting_is_announced(server, dest, capsys):
    dest.parent.mkdir(parents=True)
    with download.locked(dest, "fetching"):
        other = threading.Thread(target=fetch, args=([server.url + "good"], dest))
        other.start()
        deadline = time.time() + 10
        text = ""
        while "waiting" not in text and time.time() < deadline:
            time.sleep(0.01)
            text += capsys.readouterr().err
        assert f"another process is fetching {dest}; waiting for it" in text and not server.requests
    other.join(10)
    assert dest.read_bytes() == BODY


def test_records_of_several_files_do_not_overwrite_each_other(server, dest):
    threads = [
        threading.Thread(target=fetch, args=([server.url + "good"], dest.with_name(f"net{i}.pkl"))) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(record()) == 8
