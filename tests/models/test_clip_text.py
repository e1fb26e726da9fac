"""Captions: recorded conditions, tokens, what is computed and kept, weights of other files, lists of captions."""

from __future__ import annotations

import json
import string
import sys
from pathlib import Path

import pytest
import torch
from golden_files import GOLDEN, Golden
from torch import Tensor

from dnnlib import UserError
from models.networks import clip_text as text
from models.networks.clip_text import CLIP, TOKENIZER_FILES, TextEncoder, find_tokenizer
from models.prompts import read_prompts

#: recommended by the reference
CLOSE = dict(atol=1e-4, rtol=0)
PUBLISHED = GOLDEN / "stable-diffusion-v1.json"
GOLDEN = Golden("clip_text")
SIZES = GOLDEN.meta["net"]
BEGIN, END, TOKENS = SIZES["bos_token_id"], SIZES["eos_token_id"], SIZES["max_position_embeddings"]
POSITIONS = "transformer.text_model.embeddings.position_ids"


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="pip install transformers")


def write_tokenizer(folder: Path, begin: int = BEGIN, end: int = END) -> Path:
    """A vocabulary of letters and two words, in the files of CLIP's tokenizer."""
    letters = list(string.ascii_lowercase)
    tokens = letters + [f"{letter}</w>" for letter in letters] + ["ca", "cat</w>", "do", "dog</w>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({**vocab, "<|startoftext|>": begin, "<|endoftext|>": end}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\nd o\ndo g</w>\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = "<|endoftext|>"
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = {**special, "do_lower_case": True, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def tokenizer(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SFD_CLIP_TOKENIZER", str(tmp_path / "tokenizer"))
    return write_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return {f"transformer.{name}": tensor for name, tensor in GOLDEN.weights("net").items()}


@pytest.fixture
def encoder(transformers, tokenizer, weights) -> TextEncoder:
    return TextEncoder(weights, "cpu", SIZES)


def test_conditions_equal_the_recorded_ones(transformers, tokenizer, weights, monkeypatch):
    def numbers(prompts, **kwargs):
        return {"input_ids": GOLDEN["input_ids"][[int(prompt) for prompt in prompts]]}

    monkeypatch.setattr(text, "_read_tokenizer", lambda folder, vocab_size: numbers)
    encoder = TextEncoder(weights, "cpu", SIZES)
    found = encoder.encode(["2", "0", "1", "0"])
    assert (encoder.tokens, encoder.width) == (TOKENS, 32) and found.dtype == torch.float32
    torch.testing.assert_close(found, GOLDEN["last_hidden_state"][[2, 0, 1, 0]], **CLOSE)


def test_captions_become_begin_tokens_end_and_end_again(encoder, monkeypatch):
    seen, network = [], encoder._network
    monkeypatch.setattr(encoder, "_network", lambda input_ids: seen.append(input_ids) or network(input_ids=input_ids))
    found = encoder.encode(["Cat  DOG", "", "dog " * 40, "cat dog"])
    assert [ids[0, :5].tolist() for ids in seen] == [
        [BEGIN, 53, 55, END, END], [BEGIN, END, END, END, END], [BEGIN, 55, 55, 55, 55], [BEGIN, 53, 55, END, END],
    ]  # fmt: skip
    assert all(ids.shape == (1, TOKENS) and ids[0, -1] == END for ids in seen)
    assert torch.equal(found[0], found[3]) and not torch.equal(found[0], found[1])


def test_each_caption_is_computed_once_and_alone(encoder, monkeypatch):
    asked, compute = [], encoder._compute
    monkeypatch.setattr(encoder, "_compute", lambda prompts: asked.append(prompts) or compute(prompts))
    first = encoder.encode(["cat", "dog", "cat", "a b c"])
    again = encoder.encode(["dog", "cat"])
    assert asked == [["cat"], ["dog"], ["a b c"]]
    assert torch.equal(first[0], first[2]) and torch.equal(again, first[[1, 0]]) and not first.requires_grad


def test_elsewhere_captions_are_computed_together(encoder, monkeypatch):
    asked, prompts = [], ["a", "b", "c", "d", "e"]
    torch.testing.assert_close(encoder._compute(prompts), encoder.encode(prompts), atol=1e-5, rtol=1e-5)
    encoder._captions._kept.clear()
    encoder.device = torch.device("meta")
    monkeypatch.setattr("models.conditions.BATCH", 2)
    monkeypatch.setattr(encoder, "_compute", lambda part: asked.append(part) or torch.zeros(len(part), TOKENS, 32))
    assert encoder.encode(prompts).device == encoder.device
    assert asked == [["a", "b"], ["c", "d"], ["e"]]


def test_only_the_last_conditions_are_kept(encoder, weights, monkeypatch):
    monkeypatch.setattr("models.conditions.KEPT", 2 * encoder.encode(["a"]).nbytes)
    encoder = TextEncoder(weights, "cpu", SIZES)
    encoder.encode(["a", "b"])
    encoder.encode(["a", "c"])  # b was used longest ago
    kept = encoder._captions._kept
    assert list(kept) == ["a", "c"]
    assert encoder.encode(["a", "b", "c", "d"]).shape == (4, TOKENS, 32) and len(kept) == 2
    for row in kept.values():
        assert row.tokens.untyped_storage().nbytes() == row.nbytes


@pytest.mark.parametrize("positions", [torch.arange(TOKENS)[None], torch.arange(TOKENS)[None].float(), None])
def test_files_with_and_without_positions_and_in_half_precision(encoder, weights, positions):
    other = {name: tensor.half() for name, tensor in weights.items()}  # the recorded ones are exact in half precision
    if positions is not None:
        other[POSITIONS] = positions
    assert torch.equal(TextEncoder(other, "cpu", SIZES).encode(["cat"]), encoder.encode(["cat"]))


@pytest.mark.parametrize("change, message", [
    ({"transformer.text_model.final_layer_norm.bias": None}, r"missing transformer\.text_model\.final_layer_norm\.bias"),
    ({"transformer.visual_projection.weight": torch.zeros(2, 2)}, r"unexpected transformer\.visual_projection\.weight"),
    ({"transformer.text_model.final_layer_norm.bias": torch.zeros(3)}, r"bias is \[3\], not \[32\]"),
])  # fmt: skip
def test_other_tensors_are_refused(transformers, tokenizer, weights, change, message):
    weights = {name: tensor for name, tensor in {**weights, **change}.items() if tensor is not None}
    with pytest.raises(UserError, match=f"^v1.ckpt does not fit .*{message}") as error:
        TextEncoder(weights, "cpu", SIZES, source="v1.ckpt")
    assert "\n" not in error.value.message


def test_full_size_has_the_published_names_and_shapes(transformers, tokenizer):
    prefix = "cond_stage_model."
    shapes = json.loads(PUBLISHED.read_text())["tensors"]
    with torch.device("meta"):
        tensors = {n.removeprefix(prefix): torch.zeros(s) for n, s in shapes.items() if n.startswith(prefix)}
    encoder = TextEncoder(tensors, "meta")
    assert (encoder.tokens, encoder.width) == (77, 768)
    sizes = encoder._network.config
    assert (sizes.hidden_act, sizes.num_attention_heads) == ("quick_gelu", 12)


def test_without_transformers_the_error_says_what_to_install(monkeypatch, tokenizer, weights):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="run: pip install transformers") as error:
        TextEncoder(weights, "cpu", SIZES)
    assert "\n" not in error.value.message


# --- The tokenizer's files -------------------------------------------------------------------------------------------


def test_the_files_are_fetched_to_the_cache(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.delenv("SFD_CLIP_TOKENIZER", raising=False)
    monkeypatch.setenv("SFD_CACHE", str(tmp_path))
    monkeypatch.setattr(text, "fetch", lambda urls, dest: asked.update({dest: urls}))
    folder = find_tokenizer()
    assert folder == tmp_path / "clip-vit-large-patch14"
    page = "https://huggingface.co/openai/clip-vit-large-patch14/resolve/main"
    assert asked == {folder / name: [f"{page}/{name}"] for name in TOKENIZER_FILES}


def test_offline_without_the_files_says_where_they_belong(tmp_path, monkeypatch):
    monkeypatch.delenv("SFD_CLIP_TOKENIZER", raising=False)
    monkeypatch.setenv("SFD_CACHE", str(tmp_path))
    monkeypatch.setenv("SFD_OFFLINE", "1")
    with pytest.raises(UserError, match="offline, and .*vocab.json is not there; get it from https://"):
        find_tokenizer()


def test_an_own_directory_must_hold_the_files(tokenizer):
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (tokenizer / name).unlink()
    assert find_tokenizer() == tokenizer
    (tokenizer / "merges.txt").unlink()
    with pytest.raises(UserError, match="SFD_CLIP_TOKENIZER=.* does not hold merges.txt"):
        find_tokenizer()


def test_two_files_are_enough(encoder, tokenizer, weights):
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (tokenizer / name).unlink()
    assert torch.equal(TextEncoder(weights, "cpu", SIZES).encode(["a Cat"]), encoder.encode(["a Cat"]))


def test_a_folder_of_diffusers_has_its_own_tokenizer(encoder, weights, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    write_tokenizer(folder / "tokenizer")
    monkeypatch.delenv("SFD_CLIP_TOKENIZER")
    monkeypatch.setenv("SFD_OFFLINE", "1")
    monkeypatch.setenv("SFD_CACHE", str(tmp_path / "empty"))
    found = TextEncoder(weights, "cpu", SIZES, source=folder)
    assert torch.equal(found.encode(["a Cat"]), encoder.encode(["a Cat"]))
    (folder / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(UserError, match=CLIP):
        TextEncoder(weights, "cpu", SIZES, source=folder)


@pytest.mark.parametrize("name, content, message", [
    ("vocab.json", "{", "not hold a usable tokenizer"),
    ("vocab.json", "[1]", "not hold a usable tokenizer"),
    ("merges.txt", "#version: 0.2\nx\n", "not hold a usable tokenizer"),
    ("tokenizer_config.json", "{", "not hold a usable tokenizer"),
])  # fmt: skip
def test_damaged_files_are_one_line(transformers, tokenizer, weights, name, content, message):
    (tokenizer / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        TextEncoder(weights, "cpu", SIZES)
    assert "\n" not in error.value.message


def test_a_tokenizer_with_more_tokens_than_the_text_model_is_refused(transformers, tokenizer, weights):
    write_tokenizer(tokenizer, begin=98, end=99)
    with pytest.raises(UserError, match="has a token 99, the text model 99 tokens"):
        TextEncoder(weights, "cpu", SIZES)


# --- Lists of captions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, content, expected", [
    ("a.txt", "a cat\r\n\n  a dog \nümläut, \"quoted\"", ["a cat", "a dog", "ümläut, \"quoted\""]),
    ("a.txt", "\ufeffa cat\n", ["a cat"]),
    ("a.TXT", "a cat\n", ["a cat"]),
    ("a.csv", "id,text\n1,a cat\n2,\"a dog, \"\"big\"\"\"\n3,\n4\n", ["a cat", "a dog, \"big\""]),
    ("a.csv", "\ufefftext\r\na cat\r\n", ["a cat"]),
])  # fmt: skip
def test_captions_are_read(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content.encode())
    assert read_prompts(tmp_path / name) == expected


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", b"", "holds no captions"),
    ("a.txt", b" \n\n", "holds no captions"),
    ("a.csv", b"", "has no column text; it has none"),
    ("a.csv", b"text\n", "holds no captions"),
    ("a.csv", b"id,caption\n1,a cat\n", "has no column text; it has id, caption"),
    ("a.csv", b"text\n\"a cat\n", "not a readable .csv"),
    ("a.csv", b"text\n" + b"x" * 200_000, "not a readable .csv"),
    ("a.txt", b"a cat\nb\xe4r\n", "not UTF-8"),
    ("a.txt", None, "does not exist"),
    ("a.json", b"[]", "expected a .txt, or a .csv with a column text"),
])  # fmt: skip
def test_other_lists_are_one_clear_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_prompts(tmp_path / name)
    assert "\n" not in error.value.message and str(tmp_path / name) in error.value.message


def test_a_folder_is_no_list_of_captions(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path / "a.txt")
