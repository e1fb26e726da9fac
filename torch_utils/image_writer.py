"""Writing images beside the computation, into a folder or an uncompressed zip archive."""

from __future__ import annotations

import json
import re
import shutil
import struct
import zipfile
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib import UserError, check_regular, first_line, make_folder, parse_json, replacing, write_text
from dnnlib.locks import hold

from . import distributed
from .device import own_cores
from .images import to_pil

OPTIONS, LOCK = "sampling_options.json", ".lock"
IMAGE_NAME = r"(img)?\d{6,}\.png"
#: Pictures that this program writes for people; an evaluation would count them among the samples of a folder.
PICTURES = ("grid.png", "compare.png", "metrics.png")
PENDING_PER_THREAD = 64
#: What the format of zip archives allows.
MAX_COMMENT = 65535


def refuse_samples(folder: Path) -> None:
    """Refuse to write a picture among samples."""
    if (folder / OPTIONS).exists():
        raise UserError(f"{folder} holds samples, and would count a picture among them; choose another place", "outdir")


class ImageWriter:
    """Images named by their seed; a name appears only when the image is whole.

    A folder gets `000042.png`, or `000000/000042.png` with `subdirs`. `x.zip` becomes an archive in the layout of EDM's
    data sets; until it is complete its images wait in the folder `.x.zip.parts`, so that a killed run can go on. Its
    comment says how they were made, so that a repeated run finds them there.

    Args:
        dest: folder, or name ending in `.zip`.
        subdirs: a folder for every 1000 seeds.
        options: what determines the images; a destination with other options is refused. Rank 0 writes it down.
    """

    def __init__(self, dest: str | Path, subdirs: bool, options: dict[str, Any]) -> None:
        self.dest, self.subdirs = Path(dest), subdirs
        self.zipped = self.dest.suffix == ".zip"
        self.folder = self.dest.with_name(f".{self.dest.name}.parts") if self.zipped else self.dest
        threads = min(own_cores(), 8)
        self._pool = ThreadPoolExecutor(threads)
        self._pending: deque[Future] = deque()
        self._limit = threads * PENDING_PER_THREAD
        self._held = ExitStack()
        self._options = json.dumps(options, indent=2) + "\n"
        #: Names in an archive that is complete already; None where there is none.
        self._complete: list[str] | None = distributed.on_first_rank(lambda: self._claim(options))

    def _claim(self, options: dict[str, Any]) -> list[str] | None:
        """Make sure that what is already there was made with the same options; the images of a complete archive.

        A folder can have several writers at a time, but one after the other they look at its options and write theirs.
        An archive has one writer, from its first image to its last.
        """
        if self.zipped and self.dest.exists():
            check_regular(self.dest)
            return self._read_archive()
        make_folder(self.folder, "outdir")
        with ExitStack() as held:
            try:
                held.enter_context(hold(self.folder / LOCK, wait=not self.zipped))
            except BlockingIOError:
                raise UserError(
                    f"{self.dest} is being written by another process; wait for it, or choose another place", "outdir"
                ) from None
            if self.zipped and self.dest.exists():  # it was completed while we looked
                names = self._read_archive()
                held.close()
                shutil.rmtree(self.folder, ignore_errors=True)
                return names
            self._check_options(options)
            if self.zipped:
                self._held = held.pop_all()
        return None

    @property
    def is_complete(self) -> bool:
        """Whether there was such an archive already, so that nothing is written."""
        return self._complete is not None

    def _read_archive(self) -> list[str]:
        """Names of the images in an archive that is there; its comment says how they were made."""
        try:
            with zipfile.ZipFile(self.dest) as archive:
                same = archive.comment == self._comment()
                names = archive.namelist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
            raise UserError(f"{self.dest} is no readable archive ({first_line(error)}); remove it", "outdir") from None
        if not same:
            raise UserError(
                f"{self.dest} already exists, made otherwise than asked for; remove it, or choose another place",
                "outdir",
            )
        return [name for name in names if name.endswith(".png")]

    def _comment(self) -> bytes:
        return self._options.encode()[:MAX_COMMENT]

    def _check_options(self, options: dict[str, Any]) -> None:
        """Refuse images of other options, and write down ours."""
        path = self.folder / OPTIONS
        if path.exists():
            try:
                saved = parse_json(path.read_text(encoding="utf-8"))
                changed = [k for k in sorted({*options, *saved}) if saved.get(k) != options.get(k)]
            except (ValueError, AttributeError, TypeError):
                raise UserError(f"{path} is not readable; choose another place", "outdir") from None
            if changed and self._has_images():
                raise UserError(
                    f"{self.folder} holds images made with another {', '.join(changed)}; choose another place", "outdir"
                )
        elif self._has_images():
            raise UserError(f"{self.folder} holds images that were not sampled here; choose another place", "outdir")
        picture = next((name for name in PICTURES if (self.folder / name).exists()), None)
        if picture is not None:
            raise UserError(
                f"{self.folder} holds {picture}, which would count as a sample; choose another place",
                "outdir",
            )
        write_text(path, self._options)

    def _has_images(self) -> bool:
        return any(re.fullmatch(IMAGE_NAME, path.name) for path in self.folder.rglob("*.png"))

    def path(self, seed: int) -> Path:
        if self.zipped:
            return self.folder / f"{seed // 1000:05d}" / f"img{seed:08d}.png"
        parent = self.folder / f"{seed - seed % 1000:06d}" if self.subdirs else self.folder
        return parent / f"{seed:06d}.png"

    def missing(self, seeds: Iterable[int]) -> list[int]:
        """The seeds whose image is not there yet.

        Raises:
            UserError: an archive is complete, with other images.
        """
        if self._complete is not None:
            asked = {path.relative_to(self.folder).as_posix() for path in map(self.path, seeds)}
            if asked != set(self._complete):
                raise UserError(
                    f"{self.dest} already exists, with {len(self._complete)} images, others than the {len(asked)} "
                    "asked for; remove it, or choose another place",
                    "outdir",
                )
            return []
        return [seed for seed in seeds if not self.path(seed).exists()]

    def write(self, seeds: Sequence[int], images: np.ndarray) -> None:
        """Queue uint8 images `[N, H, W, C]`; waits only when far more are queued than the threads can take."""
        for seed, image in zip(seeds, images):
            self._pending.append(self._pool.submit(self._save, self.path(seed), image))
        while len(self._pending) > self._limit:
            self._pending.popleft().result()

    @staticmethod
    def _save(path: Path, image: np.ndarray) -> None:
        try:
            path.parent.mkdir(exist_ok=True)
            with replacing(path, sync=False) as temporary:
                to_pil(image).save(temporary, "PNG")
        except OSError as error:  # Pillow's own say nothing on a full disk
            reason = error.strerror or "is the disk full?"
            raise UserError(
                f"{path} cannot be written ({reason}); make room and repeat the command, it goes on from there"
            ) from None

    def flush(self) -> None:
        """Wait for every image of this process."""
        while self._pending:
            self._pending.popleft().result()

    def close(self, seeds: Sequence[int], labels: Mapping[int, int] | None = None) -> None:
        """Wait for every image; every rank calls it, and rank 0 then completes an archive of `seeds`.

        Args:
            labels: class of each of them, for the archive's `dataset.json`.
        """
        self.flush()
        self._pool.shutdown()
        distributed.barrier()
        if self.zipped and not self.is_complete:
            distributed.on_first_rank(lambda: self._archive(seeds, labels))
        self._held.close()

    def _archive(self, seeds: Sequence[int], labels: Mapping[int, int] | None) -> None:
        names = {seed: self.path(seed).relative_to(self.folder).as_posix() for seed in sorted(seeds)}
        pairs = None if labels is None else [[name, labels[seed]] for seed, name in names.items()]
        with replacing(self.dest) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for name in names.values():
                archive.write(self.folder / name, name)
            archive.writestr("dataset.json", json.dumps({"labels": pairs}))
            archive.comment = self._comment()
        shutil.rmtree(self.folder)
