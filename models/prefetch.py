"""Fetch published files ahead of their use: `python -m models.prefetch NAME…`, for machines that go offline later.

A data set of the registry brings what its model needs besides. What is there already is verified, not fetched again.
"""

from __future__ import annotations

import dnnlib.early  # noqa: F401  # Ctrl-C is one line while torch is imported

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import click

from dnnlib import UserError, one_line_errors
from dnnlib.download import cache_dir
from dnnlib.options import Command, offline_option, section

from .detectors import fetch_inception
from .detectors.lpips import fetch_lpips
from .networks.clip_text import find_tokenizer
from .registry import ROWS, fetch_autoencoder, fetch_captions, fetch_weights, known_names

#: What is no data set: from a name to what returns the files, or the directory with them.
OTHERS: dict[str, Callable[[], Path | list[Path]]] = {
    "inception": fetch_inception,
    "lpips": fetch_lpips,
    "captions": fetch_captions,
    "tokenizer": find_tokenizer,
    "sd-vae-ft-mse": fetch_autoencoder,
}
TEXT = ("tokenizer", "captions")


def companions(name: str) -> tuple[str, ...]:
    """What a data set's model needs besides, among `OTHERS`."""
    row = ROWS.get(name)
    if row is None:
        return ()
    return (TEXT if row.text else ()) + ((row.codec,) if row.codec in OTHERS else ())


def expand(names: Sequence[str]) -> list[str]:
    """Every name once, `all` and the companions of text-conditioned models spelled out."""
    unknown = [name for name in names if name not in (*ROWS, *OTHERS, "all")]
    if unknown:
        raise UserError(f"unknown name {unknown[0]!r}; expected all, {known_names()}, {', '.join(OTHERS)}")
    # EDM2's many files are one network in several versions; who wants one names it.
    everything = [*(name for name, row in ROWS.items() if row.loader != "edm2"), *OTHERS]
    wanted: dict[str, None] = {}
    for name in [*names, *everything] if "all" in names else names:
        if name != "all":
            wanted.update(dict.fromkeys((name, *companions(name))))
    return list(wanted)


def prefetch(name: str) -> str:
    """Make sure that the files of one name are there → what was done, in words."""
    before = set(_files([cache_dir()]))
    if name in OTHERS:
        result = OTHERS[name]()
        paths = result if isinstance(result, list) else [result]
    else:
        paths = [fetch_weights(row) for row in (ROWS[name], ROWS[name].guide) if row is not None]
    files = _files(paths)
    done = "fetched" if any(file not in before and file.is_relative_to(cache_dir()) for file in files) else "there"
    size = sum(file.stat().st_size for file in files)
    return f"{done}: {', '.join(map(str, paths))} ({size / 1e6:,.1f} MB)"


def _files(paths: Iterable[Path]) -> list[Path]:
    """The files among `paths` and in directories among them; not those that downloads leave to lock."""
    found = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    return [file for file in found if file.is_file() and not file.name.startswith(".")]


@click.command(cls=Command)
@click.argument("names", nargs=-1, required=True, metavar="NAME…")
@section("Machine")
@offline_option
def main(names: Sequence[str]) -> None:
    """Fetch what NAME… needs, to ./src or the directory SFD_CACHE, and say what is there.

    \b
    A name is a data set of `python -m models.registry`, or one of
      inception  the network of FID
      lpips      the perceptual loss of the second stage
      captions   of MS-COCO, for ms_coco
      tokenizer  of the text encoder, for ms_coco
      sd-vae-ft-mse  decodes the latents of EDM2 at 512×512
      all        everything but EDM2's networks

    \b
    Examples:
      python -m models.prefetch cifar10 inception
      python -m models.prefetch ms_coco
    """
    missing = []
    for name in expand(names):
        try:
            click.echo(f"{name}: {prefetch(name)}")
        except UserError as error:
            click.echo(f"{name}: missing: {error.message}", err=True)
            missing.append(name)
    if missing:
        raise UserError(f"not everything is there; missing: {', '.join(missing)}")


if __name__ == "__main__":
    one_line_errors(main)()
