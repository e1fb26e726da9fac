"""Build `assets/emoji-32x32.zip` from a font: `python assets/make_emoji32.py --font=NotoColorEmoji.ttf`.

The font is Debian's package fonts-noto-color-emoji (SIL Open Font License 1.1, see LICENSE-noto-emoji.txt beside this
file). Each bitmap of its CBDT table (136×128, transparent) is centred on a white square, reduced to 32×32 RGB with a
Hamming window (no halos), and stored in the layout of EDM's data sets: `00000/img00000000.png`, … and `dataset.json`,
in glyph order. The same font and Pillow version give the same bytes. Needs fonttools (`pip install fonttools`).
"""

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import click
from PIL import Image

DATASET = str(Path(__file__).with_name("emoji-32x32.zip"))


def read_bitmaps(font_path: str) -> Iterator[Image.Image]:
    """Yield every bitmap of the font's largest strike, in glyph order."""
    try:
        from fontTools.ttLib import TTFont, TTLibError
    except ImportError:
        raise click.ClickException("fonttools is missing; install it: pip install fonttools") from None
    try:
        strikes = TTFont(font_path)["CBDT"].strikeData
    except (TTLibError, KeyError):
        raise click.ClickException(
            f"{font_path} has no CBDT bitmaps; use NotoColorEmoji.ttf of Debian's package"
        ) from None
    for bitmap in max(strikes, key=len).values():
        yield Image.open(io.BytesIO(bitmap.imageData)).convert("RGBA")


def compose(bitmap: Image.Image, resolution: int) -> Image.Image:
    """Centre `bitmap` on a white square and reduce it to `resolution`."""
    side = max(bitmap.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(bitmap, ((side - bitmap.width) // 2, (side - bitmap.height) // 2))
    return square.convert("RGB").resize((resolution, resolution), Image.Resampling.HAMMING)


@click.command()
@click.option("--font", help="Path of NotoColorEmoji.ttf", metavar="TTF", type=click.Path(exists=True), required=True)
@click.option("--dest", help="Archive to write; default: the one beside this file", metavar="ZIP", default=DATASET)
@click.option("--resolution", help="Height and width", metavar="INT", default=32, show_default=True)
def main(font: str, dest: str, resolution: int) -> None:
    """Write the embedded data set from the emoji font."""
    temporary = Path(f"{dest}.tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for index, bitmap in enumerate(read_bitmaps(font)):
            png = io.BytesIO()
            compose(bitmap, resolution).save(png, "PNG", optimize=True)
            # A fixed date keeps the archive the same from run to run.
            archive.writestr(zipfile.ZipInfo(f"{index // 1000:05d}/img{index:08d}.png"), png.getvalue())
        archive.writestr(zipfile.ZipInfo("dataset.json"), json.dumps({"labels": None}))
    temporary.replace(dest)
    click.echo(f"{dest}: {index + 1} images, {Path(dest).stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
