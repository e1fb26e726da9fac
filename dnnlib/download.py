"""Fetching published files: mirrors, resuming, checksums, and one download for all who ask at the same time.

A file is downloaded to `NAME.part` beside its destination, verified, synced and renamed, so its own name never holds
half a file. Where no checksum is published, the one of the first download is recorded in `checksums.json` in the cache
directory, and the file must have it from then on.

Environment: `SFD_CACHE` (cache directory, default `./src`), `SFD_OFFLINE=1`, `HF_ENDPOINT` (replaces
https://huggingface.co), `RANK` (only rank 0 prints), and the proxy variables that requests knows.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

from .checksums import cache_dir, is_there, locked, mismatch, recorded_digest, write_record
from .errors import UserError
from .files import parse_json, sha256_of, write_text
from .progress import is_first_process, progress, say

__all__ = ["HUB", "cache_dir", "derive", "fetch", "is_offline"]

HUB = "https://huggingface.co/"
TIMEOUTS = (15, 60)  # seconds to connect, and between two pieces of data
ATTEMPTS = 5
BACKOFF = 1.0  # seconds before the second attempt; they double
#: An attempt that brings this many new bytes starts the count anew: large files survive bad connections.
PROGRESS = 1 << 20
CHUNK = 1 << 16
#: A piece of `CHUNK` bytes that takes longer ends the attempt, a file that takes longer is given up.
PIECE_SECONDS, MAX_SECONDS = 60.0, 24 * 3600.0
#: Of a file whose size is not known. The largest that is has 4.3 GB.
MAX_SIZE = 32 << 30
RETRIED_STATUS = (408, 429, 500, 502, 503, 504)


class _Failed(Exception):
    """A mirror does not give the file, and another attempt would not help. The message says why."""


class _Interrupted(Exception):
    """An attempt ended early, and another one may help."""


def fetch(
    urls: Sequence[str],
    dest: str | os.PathLike,
    sha256: str | None = None,
    size: int | None = None,
) -> Path:
    """Make sure that a published file is at `dest`, and return that path.

    Args:
        urls: http(s) addresses of the file, tried in order.
        dest: where it belongs; directories are made.
        sha256: its published checksum, or the first digits of it (at least 8); None if none is published.
        size: its bytes, where they are known; else at most `MAX_SIZE` are taken.

    Raises:
        UserError: the file is neither there nor to be had, or it is not the expected one.
    """
    dest = Path(dest)
    if isinstance(urls, str) or not urls or not all(url.startswith(("https://", "http://")) for url in urls):
        raise ValueError(f"urls is {urls!r}, expected a list of http(s) addresses")
    if sha256 is not None and not re.fullmatch(r"[0-9a-f]{8,64}", sha256):
        raise ValueError(f"sha256 is {sha256!r}, expected 8 to 64 lower-case hexadecimal digits")
    urls = [_via_endpoint(url) for url in urls]
    with _one_line_errors(f"fetch {_shown(urls[0])}", dest):
        if is_there(dest, sha256):
            return dest
        if is_offline():
            raise UserError(
                f"offline, and {dest} is not there; get it from {_shown(urls[0])} and put it there, "
                "or run without --offline and SFD_OFFLINE"
            )
        dest.parent.mkdir(parents=True, exist_ok=True)
        with locked(dest, "fetching"):
            if not is_there(dest, sha256):
                _download(urls, dest, sha256, size)
    return dest


def derive(dest: str | os.PathLike, make: Callable[[], object]) -> Path:
    """Make sure that a file made from a fetched one (unpacked, say) is at `dest`, and return that path.

    `make` writes it, all or nothing, once for all processes that ask. From then on it is verified like a download.

    Raises:
        UserError: it cannot be made, or has changed since.
    """
    dest = Path(dest)
    with _one_line_errors(f"make {dest}", dest):
        if is_there(dest, None):
            return dest
        dest.parent.mkdir(parents=True, exist_ok=True)
        with locked(dest, "making"):
            if not is_there(dest, None):
                make()
                is_there(dest, None)
    return dest


def is_offline() -> bool:
    """Whether `SFD_OFFLINE` forbids the network."""
    return os.environ.get("SFD_OFFLINE", "").lower() not in ("", "0", "false", "no", "off")


@contextmanager
def _one_line_errors(attempt: str, dest: Path) -> Iterator[None]:
    """Say what a full disk or an unwritable place prevented."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot {attempt}: {error.filename or dest}: {error.strerror or error}; "
            f"make {dest} writable, put the file there by hand, or let SFD_CACHE name another directory"
        ) from None


def _via_endpoint(url: str) -> str:
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    return f"{endpoint}/{url.removeprefix(HUB)}" if endpoint and url.startswith(HUB) else url


def _shown(url: str) -> str:
    """A URL on one line, without the password that the endpoint of an institution may have in it."""
    return ascii(re.sub(r"//[^/@]*@", "//", url))[1:-1]


# ------------------------------------------------------------------------------------------------------------------
# Downloads


class _Part:
    """The unfinished download of `dest`, and a note of where it is from: URL, version and size of the whole file."""

    def __init__(self, dest: Path) -> None:
        self.path = dest.with_name(f"{dest.name}.part")
        self._note = dest.with_name(f"{dest.name}.part.json")

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def origin(self) -> dict[str, Any]:
        try:
            origin = parse_json(self._note.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return origin if isinstance(origin, dict) else {}

    def begin(self, origin: dict[str, Any]) -> None:
        """Start from nothing with a file from `origin`."""
        self.discard()
        write_text(self._note, json.dumps(origin))

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)

    def finish(self, dest: Path) -> None:
        with open(self.path, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(self.path, dest)
        self.discard()


def _download(urls: Sequence[str], dest: Path, sha256: str | None, size: int | None) -> None:
    """Try the mirrors in order until one gives the expected file."""
    failures = []
    for url in urls:
        try:
            digest = _download_from(url, dest, sha256, size)
        except _Failed as error:
            failures.append(f"{_shown(url)}: {error}")
            if len(failures) < len(urls):
                say(f"{failures[-1]}; trying the next address")
            continue
        write_record(dest, digest)
        return
    raise UserError(
        f"cannot fetch {dest.name} ({'; '.join(failures)}); put the file by hand at {dest}, "
        "or let SFD_CACHE name another directory"
    )


def _download_from(url: str, dest: Path, sha256: str | None, size: int | None) -> str:
    """Download from one mirror → the checksum of the file, which is then at `dest`."""
    part = _Part(dest)
    has_checksum = sha256 is not None or recorded_digest(dest, sha256) is not None
    # What a checksum will judge may be continued from anywhere.
    if not has_checksum and (part.origin.get("url") != url or not _has_version(part.origin)):
        part.discard()
    is_inherited, best, attempts, end = part.size > 0, part.size, 0, time.monotonic() + MAX_SECONDS
    while True:
        try:
            _transfer(url, part, has_checksum, size, end)
        except _Interrupted as error:
            attempts, best = (0, part.size) if part.size >= best + PROGRESS else (attempts + 1, best)
            if attempts == ATTEMPTS or time.monotonic() > end:
                raise _Failed(f"{error}; gave up after {part.size} bytes and {attempts or 1} attempts") from None
            say(f"{_shown(url)}: {error}; trying again")
            time.sleep(BACKOFF * 2 ** max(attempts - 1, 0))
            continue
        digest = sha256_of(part.path)
        difference = mismatch(digest, dest, sha256)
        if difference is None:
            part.finish(dest)
            return digest
        part.discard()
        if not is_inherited:
            raise _Failed(f"wrong content, {difference}")
        is_inherited, best = False, 0  # its beginning may have been of another file: once more


def _transfer(url: str, part: _Part, has_checksum: bool, known: int | None, end: float) -> None:
    """One request for what `part` lacks, or for everything if the server cannot continue it.

    It ends at the time `end` at the latest, and with more bytes than are `known` of the file.
    """
    if part.size and part.size == part.origin.get("size"):
        return
    # Compressed on the way, neither length nor range would be those of the file.
    headers = {"Accept-Encoding": "identity"}
    if part.size:
        headers["Range"] = f"bytes={part.size}-"
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUTS) as response:
            size = _begin(url, part, response, has_checksum)
            if known is not None and size not in (None, known):
                part.discard()
                raise _Failed(f"announces {size:,} bytes, the published file has {known:,}")
            with _Pace(response, end) as pace:
                _append(part, response, size, known or MAX_SIZE, pace)
    except (requests.exceptions.SSLError, requests.TooManyRedirects, ValueError) as error:  # ValueError: a useless URL
        raise _Failed(_cause(error)) from None
    except requests.RequestException as error:
        raise _Interrupted(_cause(error)) from None
    if size is not None and part.size != size:
        raise _Interrupted(f"{part.size} bytes arrived, {size} were announced")
    if part.size == 0:
        raise _Failed("sends an empty file")


def _begin(url: str, part: _Part, response: requests.Response, has_checksum: bool) -> int | None:
    """Check an answer's head, and make `part` end where its body begins → the file's size, None if it is not told."""
    status, head = response.status_code, response.headers
    if status == 416:
        part.discard()
        raise _Interrupted("the server cannot continue the file")
    if status not in (200, 206):
        kind = _Interrupted if status in RETRIED_STATUS else _Failed
        raise kind(f"{status} {_shown(response.reason or '')}".strip())
    if head.get("Content-Encoding", "identity") != "identity":
        raise _Failed(f"sends the file as {_shown(head['Content-Encoding'])}")
    if not has_checksum and head.get("Content-Type", "").startswith("text/html"):
        raise _Failed("answers with a web page")
    hops = [hop.url for hop in (*response.history, response)]  # anybody on the way could have changed an answer
    if not has_checksum and url.startswith("https:") and not all(hop.startswith("https:") for hop in hops):
        raise _Failed("redirects to an unencrypted address, and no checksum is published")

    content_range = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})", head.get("Content-Range", ""))
    length = content_range[2] if status == 206 and content_range else head.get("Content-Length", "")
    size = int(length) if re.fullmatch(r"\d{1,18}", length) else None
    origin = {"url": url, "etag": head.get("ETag"), "modified": head.get("Last-Modified"), "size": size}
    if status == 206:
        is_same = has_checksum or (_has_version(origin) and part.origin == origin)
        if not content_range or int(content_range[1]) != part.size or not is_same:
            part.discard()
            raise _Interrupted("the file has changed on the server")
    else:
        is_framed = head.get("Transfer-Encoding", "").lower() == "chunked"
        if size is None and not is_framed and not has_checksum:
            raise _Failed("does not tell the length of the file")
        part.begin(origin)
    needed, free = (size or 0) - part.size, shutil.disk_usage(part.path.parent).free
    if needed > free:
        raise _Failed(f"{needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
    return size


def _has_version(origin: dict[str, Any]) -> bool:
    """Whether the server told what distinguishes this version of the file from the next."""
    return bool(origin.get("etag") or origin.get("modified"))


class _Pace:
    """Ends an answer whose pieces come too slowly, or that takes too long in all.

    Timeouts of sockets do not: a server that sends a byte a second never meets one, and a read waits for all of its
    bytes. So another thread looks at the clock, and shuts the connection down.
    """

    def __init__(self, response: requests.Response, end: float) -> None:
        self._end = end
        self._socket = socket.socket(fileno=os.dup(response.raw.fileno()))
        self._ended, self.reason = threading.Event(), ""
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.piece()

    def piece(self) -> None:
        """Another one has come."""
        self._deadline = time.monotonic() + PIECE_SECONDS

    def _watch(self) -> None:
        while not self._ended.wait(PIECE_SECONDS / 60):
            now = time.monotonic()
            if now > self._end:
                self.reason = f"takes more than {MAX_SECONDS / 3600:g} hours"
            elif now > self._deadline:
                self.reason = f"sends less than {CHUNK / PIECE_SECONDS / 1000:.2g} kB a second"
            if self.reason:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
                return

    def __enter__(self) -> _Pace:
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._ended.set()
        self._thread.join()
        self._socket.close()
        if self.reason and (error is None or isinstance(error, requests.RequestException)):
            raise _Interrupted(self.reason) from None


def _append(part: _Part, response: requests.Response, size: int | None, limit: int, pace: _Pace) -> None:
    """Write what comes; what has filled the disk, or is more than the `limit`, is removed."""
    name = part.path.name[: -len(".part")]
    shown = progress(size, "B", part.size, name, is_first_process(), unit_scale=True)
    total = part.size
    try:
        with open(part.path, "ab") as file, shown as bar:
            for chunk in response.iter_content(CHUNK):
                pace.piece()
                total += len(chunk)
                if total > limit:
                    part.discard()
                    raise _Failed(f"sends more than {limit:,} bytes")
                file.write(chunk)
                bar.update(len(chunk))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            part.discard()
        raise


def _cause(error: BaseException) -> str:
    """What the system said, from under the wrappings of requests and urllib3."""
    wrapped = [error]
    for inner in wrapped:  # grows while it is walked
        if isinstance(inner, OSError) and inner.strerror:
            return _shown(inner.strerror)
        links = (*inner.args, getattr(inner, "reason", None), inner.__cause__, inner.__context__)
        wrapped += [link for link in links if isinstance(link, BaseException) and link not in wrapped]
    if "timed out" in str(error):
        return "no answer in time"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke off"
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()
