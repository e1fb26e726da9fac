"""The classes of the embedded data set: rules for glyphs, Unicode's list, and the archive that ships."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from pathlib import Path

import click
import numpy as np
import pytest
from tiny import ROOT

from torch_utils.metrics.image_set import ImageDataset

SPEC = importlib.util.spec_from_file_location("make_emoji32", ROOT / "assets" / "make_emoji32.py")
make_emoji32 = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make_emoji32)
CLASSES = make_emoji32.CLASSES
FONT, LIST = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"), Path("/usr/share/unicode/emoji/emoji-test.txt")

GLYPHS = [
    "one",
    "keycap",
    "letterA",
    "letterB",
    "arrow",
    "heart",
    "runner",
    "tone",
    "runner-right",
    "runner-tone",
    "flag",
    "one-keycap",
]
LIGATURES = {
    ("one", "keycap"): "one-keycap",
    ("letterA", "letterB"): "flag",
    ("runner", "tone"): "runner-tone",
    ("runner", "zwj", "arrow"): "runner-right",
    ("arrow", "zwj", "runner"): "runner-right",  # the same, read from the other end
}
GROUPS = {
    ("one", "keycap"): "Symbols", ("letterA", "letterB"): "Flags", ("arrow",): "Symbols", ("heart",): "Smileys & Emotion",
    ("runner",): "People & Body", ("runner", "tone"): "People & Body", ("tone",): "Component",
}  # fmt: skip


def test_each_kind_of_glyph_has_its_class():
    found = make_emoji32.label_glyphs(GLYPHS, GROUPS, LIGATURES)
    names = dict(zip(GLYPHS, (CLASSES[i] for i in found)))
    assert names["heart"] == "Smileys & Emotion" and names["arrow"] == "Symbols"  # one character
    assert names["flag"] == "Flags" and names["one-keycap"] == "Symbols"  # a listed sequence
    assert names["runner-right"] == "People & Body"  # not listed: its first character, and no sign
    assert names["letterA"] == "Flags" and names["one"] == names["keycap"] == "Symbols"  # parts
    assert names["tone"] == "People & Body"  # a component has the class of what it is part of


def test_a_glyph_without_any_relation_is_refused():
    with pytest.raises(click.ClickException, match=r"glyph stray is not in Unicode's list"):
        make_emoji32.label_glyphs([*GLYPHS, "stray"], GROUPS, LIGATURES)


def test_unicodes_list_is_read(tmp_path):
    text = "# about\n# group: Flags\n# subgroup: x\n1F1E6 1F1E8 ; fully-qualified # E2.0 flag: x\n\n# group: Symbols\n2764 FE0F;unqualified # y\n#EOF\n"
    (tmp_path / "list.txt").write_text(text)
    assert list(make_emoji32.read_groups(str(tmp_path / "list.txt"))) == [
        ([0x1F1E6, 0x1F1E8], "Flags"),
        ([0x2764, 0xFE0F], "Symbols"),
    ]


def test_the_archive_has_a_class_for_every_image():
    dataset = ImageDataset(make_emoji32.DATASET)
    with zipfile.ZipFile(make_emoji32.DATASET) as archive:
        assert json.loads(archive.read("dataset.json"))["class_names"] == list(CLASSES)
    counts = np.bincount(dataset.labels)
    assert len(dataset) == counts.sum() == 3926 and dataset.label_dim == len(CLASSES) == 9
    assert counts.argmax() == CLASSES.index("People & Body") and counts.min() >= 80
    # Faces are yellow, flags and signs mostly are not.
    images = dataset.load_all()[..., 8:24, 8:24].astype(float)
    yellow = ((images[:, 0] > 200) & (images[:, 1] > 130) & (images[:, 2] < 130)).mean((1, 2))
    by_class = [yellow[dataset.labels == i].mean() for i in range(9)]
    assert np.argmax(by_class) == CLASSES.index("Smileys & Emotion")


@pytest.mark.slow
@pytest.mark.skipif(
    not (FONT.exists() and LIST.exists() and importlib.util.find_spec("fontTools")),
    reason="needs the font, the list and fonttools",
)
def test_the_font_gives_the_images_and_labels_that_ship(tmp_path):
    make_emoji32.main.main([f"--font={FONT}", f"--dest={tmp_path / 'again.zip'}"], standalone_mode=False)
    old, new = ImageDataset(make_emoji32.DATASET), ImageDataset(tmp_path / "again.zip")
    assert old.names == new.names and np.array_equal(old.load_all(), new.load_all())
    assert old.labels.tolist() == new.labels.tolist()
