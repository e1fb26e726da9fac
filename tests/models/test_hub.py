"""Model cards, and a student sent to the Hugging Face Hub: to a stand-in for it on this machine."""

from __future__ import annotations

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from test_export import ADM, edm_student, latent_student
from test_export import published as published  # a fixture
from test_reference_students import make, write
from tiny import NETWORK, ROOT, invoke, same

from dnnlib import sha256_of
from models import load_student
from models.export.card import how_to_sample_program, write_card
from models.export.student import open_student
from torch_utils.checkpoint import read_network, read_settings, save_network


class Hub(BaseHTTPRequestHandler):
    """Of the Hub what a commit asks for; files come inline."""

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, content: Any, code: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.answer({"error": "not here"}, 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        seen = self.server.seen  # type: ignore[attr-defined]
        seen.append((self.path, self.headers.get("Authorization"), body))
        if self.headers.get("Authorization") != "Bearer hf_test":
            self.answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            self.answer({"url": f"{self.server.url}/me/test"})  # type: ignore[attr-defined]
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            self.answer({"commitUrl": f"{self.server.url}/me/test/commit/1", "commitOid": "1"})  # type: ignore[attr-defined]
        else:
            self.answer({"errors": [], "warnings": []})


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in, and a login for it."""
    package = pytest.importorskip("huggingface_hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.url = [], f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    make = package.HfApi
    monkeypatch.setattr(package, "HfApi", lambda: make(endpoint=server.url))  # type: ignore[attr-defined]
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def in_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("SFD_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


def sent(server: Any) -> dict[str, bytes]:
    """The files of the commit."""
    lines = next(body for path, _, body in server.seen if "/commit/" in path).splitlines()
    values = [json.loads(line) for line in lines]
    return {v["value"]["path"]: base64.b64decode(v["value"]["content"]) for v in values if v["key"] == "file"}


def test_a_student_and_its_card_are_sent(hub):
    path = edm_student(Path("student.safetensors"), NETWORK)
    output = invoke("models.export", "hub", f"--model_path={path}", "--repo=me/test", "--private").ok().output
    assert f"Sent: {hub.url}/me/test/commit/1" in output
    files = sent(hub)
    assert files.keys() == {"student.safetensors", "README.md"}
    assert files["student.safetensors"] == path.read_bytes()
    card = files["README.md"].decode()
    assert card.startswith("---\nlicense: other\n") and 'hf_hub_download("me/test", "student.safetensors")' in card
    assert hub.seen[0][0] == "/api/repos/create" and "private" in hub.seen[0][2]


def test_no_folder_of_this_machine_is_sent(hub, tmp_path):
    """Nor is it in what `half` writes, but for the teacher's; the weights stay, also half ones."""
    home = tmp_path / "home" / "me"
    home.mkdir(parents=True)
    path = edm_student(home / "student.safetensors", NETWORK)
    tensors, settings = read_network(path)
    settings["training"] = {"model_path": str(home / "run" / "x.safetensors"), "guide": str(home / "guide.pkl"), "M": 3}
    settings["sampling"] |= {"teacher_path": str(home / "teacher.safetensors"), "guide_path": str(home / "guide.pkl")}
    save_network(path, tensors, settings)
    invoke("models.export", "half", f"--model_path={path}", "--dest=half.safetensors").ok()
    half = read_settings("half.safetensors")
    assert half["training"] == {"model_path": "x.safetensors", "guide": "guide.pkl", "M": 3}
    assert half["sampling"] == settings["sampling"]
    for source in (path, Path("half.safetensors")):
        hub.seen.clear()
        invoke("models.export", "hub", f"--model_path={source}", "--repo=me/test").ok()
        Path("sent.safetensors").write_bytes(sent(hub)["student.safetensors"])
        found = read_settings("sent.safetensors")
        assert str(home) not in json.dumps(found) and found["sampling"]["teacher_path"] == "teacher.safetensors"
        assert same(read_network("sent.safetensors")[0], read_network(source)[0])
        assert abs(Path("sent.safetensors").stat().st_size - source.stat().st_size) < 1000


def test_a_student_of_the_published_code_is_sent_as_one_of_ours(hub):
    path = write(Path("student.pkl"), make())
    invoke("models.export", "hub", f"--model_path={path}", "--repo=me/test").ok()
    Path("sent.safetensors").write_bytes(sent(hub)["student.safetensors"])
    sent_one, own = load_student("sent.safetensors"), load_student(path)
    assert same(sent_one.state_dict(), own.state_dict()) and sent_one.sampling == own.sampling


def test_what_the_hub_refuses_is_one_line(hub, monkeypatch):
    path = edm_student(Path("student.safetensors"), NETWORK)
    arguments = ["hub", f"--model_path={path}", "--repo=me/test"]
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    invoke("models.export", *arguments).refused("me/test was not written .*401")
    invoke("models.export", *arguments[:2], "--repo=test").refused("'test' is no repository; expected NAME/REPOSITORY")
    monkeypatch.setenv("SFD_OFFLINE", "1")
    invoke("models.export", *arguments).refused("offline .*, so nothing is sent to me/test")
    assert not any("/commit/" in path for path, *_ in hub.seen)


def test_a_dry_run_sends_nothing_and_shows_the_card(hub):
    path = edm_student(Path("student.safetensors"), NETWORK)
    output = invoke("models.export", "hub", f"--model_path={path}", "--repo=me/test", "-n").ok().output
    assert '"README.md"' in output and "# Few-step student of tiny" in output and not hub.seen


# --- Cards -----------------------------------------------------------------------------------------------------------


def test_a_card_has_settings_and_the_numbers_of_this_file():
    path = edm_student(Path("student.safetensors"), NETWORK)
    own = {"metric": "FID", "value": 4.53, "N": 50000, "reference": "cifar10", "reference_N": 50000}
    lines = [
        {**own, "sampler": {"sha256": sha256_of(path), "nfe": 2}},
        {**own, "value": 99.0, "sampler": {"sha256": "0" * 64, "nfe": 2}},
        {**own, "value": 98.0},
    ]
    Path("metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{broken")
    card = write_card(open_student(str(path)), "how", "pytorch")
    assert "| FID | 2 | 50000 | cifar10, 50000 images | 4.53 |" in card and "99" not in card and "98" not in card
    for line in ("| network evaluations per image | 2 |", "| timestamps | 4 |", "| analytical first step | yes |",
                 "| schedule | polynomial, rho 7, sigma 80 to 0.006 |", "library_name: pytorch"):  # fmt: skip
        assert line in card, line
    Path("metrics.jsonl").unlink()
    assert "None recorded with this file." in write_card(open_student(str(path)), "how", "pytorch")


def test_a_diffusers_folder_has_a_card(published):
    path = latent_student(Path("student.safetensors"))
    invoke("models.export", "diffusers", f"--model_path={path}", "--dest=sd").ok()
    card = Path("sd/README.md").read_text()
    assert card.startswith(
        "---\nlicense: creativeml-openrail-m\nlibrary_name: diffusers\npipeline_tag: text-to-image\n"
    )
    assert "| guidance in sampling | 7.5 |" in card and 'from_pretrained("sd")' in card
    assert "whose licence is CreativeML OpenRAIL-M" in card


@pytest.mark.parametrize(
    "suffix, network",
    [
        (".pt2", ADM),
        pytest.param(".pt2", NETWORK, marks=pytest.mark.slow),
        pytest.param(".onnx", ADM, marks=pytest.mark.slow),
        pytest.param(".onnx", NETWORK, marks=pytest.mark.slow),
    ],
)
def test_the_code_of_a_programs_card_samples_it(suffix, network):
    if suffix == ".onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    path = edm_student(Path("student.safetensors"), network)
    dest = Path(f"step{suffix}")
    invoke("models.export", "program", f"--model_path={path}", f"--dest={dest}").ok()
    card = dest.with_suffix(".md").read_text()
    code = re.search(r"^```python\n(.+?)^```", card, re.M | re.S)[1]
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["x"].shape == (16, 3, 8, 8) and bool((abs(found["x"]) < 100).all())


def test_the_page_has_the_code_of_the_cards():
    """docs/interchange.md shows it for the embedded teacher's student."""
    page = (ROOT / "docs" / "interchange.md").read_text(encoding="utf-8")
    network = dict(NETWORK, img_resolution=32)
    student = open_student(str(edm_student(Path("student.safetensors"), network)))
    for name in ("step.pt2", "step.onnx"):
        code = re.search(r"^```python\n.+?^```", how_to_sample_program(student, name), re.M | re.S)[0]
        assert code in page, code
