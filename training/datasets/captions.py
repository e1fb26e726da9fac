"""COCO's captions (`captions_val2014.json`, `captions_val2017.json`), one for each image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from dnnlib import UserError, first_line


def read_coco(path: Path) -> dict[str, str]:
    """The caption of each image by the name of its file: of about five, the one with the lowest number.

    Raises:
        UserError: no such file, or one that does not hold COCO's captions.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = {image["id"]: str(image["file_name"]) for image in content["images"]}
        found: dict[str, tuple[int, str]] = {}
        for entry in content["annotations"]:
            name, number, caption = names[entry["image_id"]], int(entry["id"]), " ".join(entry["caption"].split())
            if caption and (name not in found or number < found[name][0]):
                found[name] = number, caption
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", "captions") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} does not hold COCO's captions ({first_line(error)}); expected captions_val2014.json or another "
            "of its files",
            "captions",
        ) from None
    return {name: caption for name, (_, caption) in found.items()}


def captions_of(names: Sequence[str], captions: dict[str, str], source: Path) -> list[str]:
    """The captions of images by the names of their files, in whatever folder they are.

    Raises:
        UserError: an image without one.
    """
    bare = [PurePosixPath(name).name for name in names]
    missing = [name for name, short in zip(names, bare) if short not in captions]
    if missing:
        raise UserError(
            f"{source} has no caption for {len(missing)} of {len(names)} images, first {missing[0]}; expected the "
            "captions of these images",
            "captions",
        )
    return [captions[short] for short in bare]
