"""`fid.py clip`: a tiny CLIP model of transformers against its own numbers, captions of files, COCO's captions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_clip_text import write_tokenizer
from tiny import flags, invoke, run_ranks, write_images

from dnnlib import UserError, sha256_of
from models.detectors.clip_score import FILES, ClipScorer, clip_score
from models.prompts import read_prompts
from training.evaluation.clip import match_captions
from training.evaluation.records import read_records

pytestmark = pytest.mark.usefixtures("in_temporary_folder")

transformers = pytest.importorskip("transformers", reason="pip install transformers")
CAPTIONS = ["cat", "a dog on a cat", "do dog cat dog " * 9, "x"]
TEXT = dict(vocab_size=66, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=12, bos_token_id=64, eos_token_id=65, pad_token_id=65)  # fmt: skip
VISION = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=8
)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A CLIP model with random weights in `clip/`, and pictures of eight sizes' aspect in `images/`."""
    root = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)
    write_tokenizer(root / "clip", begin=64, end=65)
    transformers.CLIPModel(config).save_pretrained(root / "clip", safe_serialization=True)
    sizes = {"shortest_edge": 24}, {"height": 24, "width": 24}
    (root / "clip" / "preprocessor_config.json").write_text(json.dumps({
        "do_resize": True, "size": sizes[0], "resample": 3, "do_center_crop": True, "crop_size": sizes[1], "do_normalize": True,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_convert_rgb": True, "image_processor_type": "CLIPImageProcessor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    }))  # fmt: skip
    write_images(root / "images", 4, size=(40, 30), seed=3)
    return root


def clip(files: Path, *more, **changes):
    Path("captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    common = dict(images=files / "images", captions="captions.txt", model=files / "clip", device="cpu", workers=0)
    return invoke("fid", "clip", *flags(common, changes), *more)


def by_transformers(folder: Path, captions: list[str]) -> np.ndarray:
    """Cosines as transformers gives them itself, an image and a caption at a time."""
    model = transformers.CLIPModel.from_pretrained(folder / "clip").eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "clip")
    processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    processor, found = processor.from_pretrained(folder / "clip"), []
    for path, caption in zip(sorted((folder / "images").iterdir()), captions):
        pixels = processor(Image.open(path), return_tensors="pt")["pixel_values"]
        tokens = tokenizer([caption], truncation=True, max_length=12, return_tensors="pt")
        with torch.no_grad():
            out = model(pixel_values=pixels, **tokens)
        found.append(float(out.logits_per_image[0, 0]) / model.logit_scale.exp().item())
    return np.array(found)


def test_the_score_is_that_of_transformers(files):
    expected = by_transformers(files, CAPTIONS)
    assert expected.std() > 1e-3  # or all images would be one
    output = clip(files, batch=3).ok().output
    (record,) = read_records("metrics.jsonl")
    assert record["value"] == pytest.approx(100 * np.maximum(expected, 0).mean(), rel=1e-4)
    assert f"CLIP score {record['value']:g} ± {record['standard_error']:g}" in output
    assert record["metric"] == "CLIP score" and record["N"] == 4 and record["model"] == "clip"
    assert record["model_sha256"] == sha256_of(files / "clip" / "model.safetensors")
    clip(files, batch=1, out="one.jsonl").ok()
    assert read_records("one.jsonl")[0]["value"] == pytest.approx(record["value"], rel=1e-5)


def test_two_processes_give_the_same(files, tmp_path):
    clip(files).ok()
    args = flags(images=files / "images", captions="captions.txt", model=files / "clip", device="cpu", out="two.jsonl")
    run_ranks("fid", ["clip", *args], tmp_path, processes=2).ok()
    assert read_records("two.jsonl")[0]["value"] == pytest.approx(read_records("metrics.jsonl")[0]["value"], rel=1e-6)


def test_an_image_gets_the_caption_that_it_was_sampled_with():
    texts = ["a", "b", "c"]
    assert match_captions(["000001.png", "x/000005.png", "00000/img00000003.png"], texts) == ["b", "c", "a"]
    assert match_captions(["x.png", "y.png", "z1.png"], texts) == texts
    with pytest.raises(UserError, match="3 captions for 2 images that are not named by seeds"):
        match_captions(["x.png", "000001.png"], texts)


def test_a_score_is_clipped_at_zero_and_has_an_error():
    assert clip_score(np.array([0.5, -1.0], np.float32)) == (25.0, pytest.approx(25.0))
    assert clip_score(np.array([0.5])) == (50.0, 0.0)


def test_what_cannot_be_scored_is_one_line(files, tmp_path, monkeypatch):
    clip(files, model="nowhere").refused("--model: nowhere holds no model.safetensors")
    clip(files, captions="nowhere.txt").refused("nowhere.txt does not exist")
    clip(files, images="nowhere").refused("nowhere does not exist")
    clip(files, model="nowhere", out=tmp_path).refused("is no file; choose another name")  # before a model is fetched
    write_images(tmp_path / "named", 2)
    (tmp_path / "named" / "0001.png").rename(tmp_path / "named" / "x.png")
    clip(files, images="named").refused("--captions: there are 4 captions for 2 images")
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in (files / "clip").iterdir():
        (folder / path.name).write_bytes(path.read_bytes() if path.suffix != ".safetensors" else b"none")
    clip(files, model=folder).refused("broken does not hold a usable CLIP model")
    monkeypatch.setenv("SFD_CACHE", str(tmp_path / "cache"))
    clip(files, "--offline", model="clip-vit-large-patch14").refused("offline")
    for name in FILES:
        (tmp_path / "cache" / "clip-vit-large-patch14").mkdir(parents=True, exist_ok=True)
        (tmp_path / "cache" / "clip-vit-large-patch14" / name).write_bytes((files / "clip" / name).read_bytes())
    clip(files, "--offline", model="clip-vit-large-patch14").ok()
    assert "missing" in clip(files, "-n", images="later").ok().output


def test_only_safetensors_are_read(files, tmp_path):
    """A folder with a pickle alone is refused, whatever transformers would do with it."""
    folder = tmp_path / "pickled"
    folder.mkdir()
    for path in (files / "clip").iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    torch.save(ClipScorer(str(files / "clip"), "cpu")._model.state_dict(), folder / "pytorch_model.bin")
    clip(files, model=folder).refused("holds no model.safetensors")


# --- COCO ------------------------------------------------------------------------------------------------------------


def coco(folder: Path) -> Path:
    """Three images of val2014 and their captions, several each and not in order."""
    names = [f"COCO_val2014_{i:012d}.jpg" for i in (42, 73, 74)]
    (folder / "val2014").mkdir()
    for index, name in enumerate(names):
        Image.new("RGB", (30 + index, 20), (60 * index, 0, 0)).save(folder / "val2014" / name)
    entries = [
        (73, 9, "A second one."),
        (42, 5, "A cat\non a mat. "),
        (73, 3, "A dog."),
        (74, 8, "Three."),
        (99, 1, "Other."),
    ]
    content = {
        "images": [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg"} for i in (73, 42, 74, 99)],
        "annotations": [{"image_id": i, "id": n, "caption": text} for i, n, text in entries],
    }
    path = folder / "captions_val2014.json"
    path.write_text(json.dumps(content))
    return path


def test_cocos_captions_go_beside_the_images(files, tmp_path):
    path = coco(tmp_path)
    common = dict(source="val2014", dest="coco.zip", resolution=16, transform="center-crop")
    invoke("training.dataset_tool", *flags(common, captions=path)).ok()
    assert read_prompts("coco.txt") == ["A cat on a mat.", "A dog.", "Three."]
    clip(files, images="coco.zip", captions="coco.txt").ok()
    invoke("training.dataset_tool", *flags(common, dest="two.zip", captions=path, max_images=2)).ok()
    assert read_prompts("two.txt") == ["A cat on a mat.", "A dog."]


@pytest.mark.parametrize("content, words", [
    ("{}", "does not hold COCO's captions"), ("[", "does not hold COCO's captions"), ("[" * 100_000, "does not hold"),
    ('{"images": [{"id": 1}], "annotations": []}', "does not hold"),
    ('{"images": [], "annotations": [{"image_id": 1, "id": 1, "caption": "x"}]}', "does not hold"),
    ('{"images": [], "annotations": []}', "has no caption for 3 of 3 images, first COCO_val2014_000000000042.jpg"),
])  # fmt: skip
def test_files_that_are_no_captions_are_one_line(content, words, tmp_path):
    path = coco(tmp_path)
    path.write_text(content)
    common = dict(source="val2014", dest="coco.zip", resolution=16, transform="center-crop")
    invoke("training.dataset_tool", *flags(common, captions=path)).refused(words)
    assert not Path("coco.zip").exists() and not Path("coco.txt").exists()
    invoke("training.dataset_tool", *flags(common, captions="nowhere.json")).refused("nowhere.json cannot be read")
