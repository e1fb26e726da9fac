"""Build `assets/emoji-32x32.zip` from a font: `python assets/make_emoji32.py --font=NotoColorEmoji.ttf`.

The font is Debian's package fonts-noto-color-emoji (SIL Open Font License 1.1, see LICENSE-noto-emoji.txt beside this
file). Each bitmap of its CBDT table (136×128, transparent) is centred on a white square, reduced to 32×32 RGB with a
Hamming window (no halos), and stored in the layout of EDM's data sets: `00000/img00000000.png`, … and `dataset.json`,
in glyph order. The same font and Pillow version give the same bytes. Needs fonttools (`pip install fonttools`).

The class of an image is the group in Unicode's list of emoji (emoji-test.txt, Debian's package unicode-data) of the
sequence that the font draws with that glyph. Glyphs that no sequence of the list leads to have a class as well:

- a sequence of the font that is newer than the list, or a flag outside of it: the group of its first character;
- what is only part of other sequences (skin tones, hair, letters of flags, digits of keycaps): the group that most of
  these have.
"""

import io
import json
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from PIL import Image

DATASET = str(Path(__file__).with_name("emoji-32x32.zip"))
#: Unicode's groups in the order of its list; the class index is the place here. `Component` is no class.
CLASSES = (
    "Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities",
    "Objects", "Symbols", "Flags",
)  # fmt: skip
PRESENTATION = 0xFE0F
#: A sequence of glyphs, and the one glyph that is drawn instead.
Ligatures = dict[tuple[str, ...], str]


def open_font(font_path: str) -> Any:
    """The font, as fonttools reads it."""
    try:
        from fontTools.ttLib import TTFont, TTLibError
    except ImportError:
        raise click.ClickException("fonttools is missing; install it: pip install fonttools") from None
    try:
        font = TTFont(font_path)
        font["CBDT"], font["GSUB"]
    except (TTLibError, KeyError):
        raise click.ClickException(
            f"{font_path} has no CBDT bitmaps; use NotoColorEmoji.ttf of Debian's package"
        ) from None
    return font


def read_bitmaps(font: Any) -> Iterator[tuple[str, Image.Image]]:
    """Yield name and bitmap of every glyph in the font's largest strike, in glyph order."""
    for glyph, bitmap in max(font["CBDT"].strikeData, key=len).items():
        yield glyph, Image.open(io.BytesIO(bitmap.imageData)).convert("RGBA")


def compose(bitmap: Image.Image, resolution: int) -> Image.Image:
    """Centre `bitmap` on a white square and reduce it to `resolution`."""
    side = max(bitmap.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(bitmap, ((side - bitmap.width) // 2, (side - bitmap.height) // 2))
    return square.convert("RGB").resize((resolution, resolution), Image.Resampling.HAMMING)


def read_groups(list_path: str) -> Iterator[tuple[list[int], str]]:
    """Yield the code points and the group of every line in Unicode's emoji-test.txt."""
    group = ""
    for line in Path(list_path).read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.removeprefix("# group:").strip()
        elif ";" in line and not line.startswith("#"):
            yield [int(code, 16) for code in line.split(";")[0].split()], group


def read_ligatures(font: Any) -> Ligatures:
    """The font's sequences; an earlier lookup counts before a later one."""
    found: Ligatures = {}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable if lookup.LookupType == 4 else ():
            for first, ligatures in table.ligatures.items():
                for ligature in ligatures:
                    found.setdefault((first, *ligature.Component), ligature.LigGlyph)
    return found


def label_glyphs(glyphs: list[str], groups: dict[tuple[str, ...], str], ligatures: Ligatures) -> list[int]:
    """The class of each glyph, by the rules above.

    Args:
        glyphs: names, in the order of the font.
        groups: the group of each sequence of glyphs that Unicode lists.
        ligatures: see `read_ligatures`; sequences joined by U+200D are there in both directions.

    Raises:
        click.ClickException: a glyph is neither listed, nor a sequence or part of what is listed.
    """
    place = {glyph: index for index, glyph in enumerate(glyphs)}
    found = {ligatures.get(parts, parts[0]): name for parts, name in groups.items() if name in CLASSES}
    listed = dict(found)
    firsts: dict[str, set[str]] = {}
    for parts, glyph in ligatures.items():
        firsts.setdefault(glyph, set()).add(parts[0])
    for glyph in firsts.keys() - listed.keys():
        known = [first for first in firsts[glyph] if first in listed]
        # Read backwards, a sequence begins with what specifies the emoji: a sign such as an arrow or ♀.
        known.sort(key=lambda first: (listed[first] == "Symbols", place.get(first, len(place))))
        if known:
            found[glyph] = listed[known[0]]
    for glyph in place.keys() - found.keys():
        uses = Counter(found[whole] for parts, whole in ligatures.items() if glyph in parts and whole in found)
        if not uses:
            raise click.ClickException(f"glyph {glyph} is not in Unicode's list; use the one of the font's own year")
        found[glyph] = min(uses, key=lambda name: (-uses[name], CLASSES.index(name)))
    return [CLASSES.index(found[glyph]) for glyph in glyphs]


def glyph_classes(font: Any, list_path: str, glyphs: list[str]) -> list[int]:
    """The class of each glyph of the font, by Unicode's list in `list_path`."""
    characters = font.getBestCmap()
    groups = {}
    for codes, group in read_groups(list_path):
        parts = tuple(characters[code] for code in codes if code != PRESENTATION and code in characters)
        if parts:
            groups[parts] = group
    return label_glyphs(glyphs, groups, read_ligatures(font))


@click.command()
@click.option("--font", help="Path of NotoColorEmoji.ttf", metavar="TTF", type=click.Path(exists=True), required=True)
@click.option("--groups", help="Path of Unicode's list of emoji", metavar="TXT", type=click.Path(exists=True),
              default="/usr/share/unicode/emoji/emoji-test.txt", show_default=True)  # fmt: skip
@click.option("--dest", help="Archive to write; default: the one beside this file", metavar="ZIP", default=DATASET)
@click.option("--resolution", help="Height and width", metavar="INT", default=32, show_default=True)
def main(font: str, groups: str, dest: str, resolution: int) -> None:
    """Write the embedded data set from the emoji font."""
    opened = open_font(font)
    temporary = Path(f"{dest}.tmp")
    names, glyphs = [], []
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for index, (glyph, bitmap) in enumerate(read_bitmaps(opened)):
            png = io.BytesIO()
            compose(bitmap, resolution).save(png, "PNG", optimize=True)
            glyphs.append(glyph)
            names.append(f"{index // 1000:05d}/img{index:08d}.png")
            # A fixed date keeps the archive the same from run to run.
            archive.writestr(zipfile.ZipInfo(names[-1]), png.getvalue())
        labels = list(zip(names, glyph_classes(opened, groups, glyphs)))
        archive.writestr(zipfile.ZipInfo("dataset.json"), json.dumps({"labels": labels, "class_names": CLASSES}))
    temporary.replace(dest)
    click.echo(f"{dest}: {len(names)} images, {Path(dest).stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
