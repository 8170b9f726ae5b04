"""The model card is written offline, and a push sends the Hugging Face files and nothing else."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard

from edu.hub import push, write_card

FIGURES = {"math": {"greedy": {"accuracy": 0.82, "low": 0.77, "high": 0.86, "n": 300}}, "bpb": {"model": 0.31}}


class FakeHub(BaseHTTPRequestHandler):
    """The few answers of the Hub that a push of small files needs; keeps what was committed."""

    files: dict[str, str]
    revision: str
    refuse = 0

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        host = f"http://{self.headers['Host']}"
        if FakeHub.refuse:
            self.answer({"error": "no"}, FakeHub.refuse)
        elif self.path == "/api/repos/create":
            self.answer({"url": f"{host}/{json.loads(body)['organization']}/{json.loads(body)['name']}"})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]})
        elif "/commit/" in self.path:
            FakeHub.revision = self.path.rsplit("/", 1)[-1]
            lines = [json.loads(line) for line in body.splitlines()]
            sent = [line["value"] for line in lines if line["key"] == "file"]
            FakeHub.files = {f["path"]: base64.b64decode(f["content"]).decode() for f in sent}
            self.answer({"commitOid": "0" * 40, "commitUrl": f"{host}/me/tiny/commit/0"})
        else:
            self.answer({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        self.answer({"id": "me/tiny", "sha": "0" * 40, "siblings": []})

    def answer(self, value: object, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    FakeHub.files, FakeHub.revision, FakeHub.refuse = {}, "", 0
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "secret")
    yield FakeHub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "rl"
    (folder / "state").mkdir(parents=True)
    (folder / "checkpoint-20").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "metrics.jsonl"):
        (folder / name).write_text("{}")
    (folder / "state" / "model.safetensors").write_text("optimizer")
    (folder / "checkpoint-20" / "config.json").write_text("{}")
    write_card(folder, {"stage": "rl", "figures": FIGURES, "settings": {"steps": 120, "lr": 0.3}})
    return folder


def test_card_says_how_to_use_it_what_made_it_and_how_good_it_is(checkpoint: Path) -> None:
    card = ModelCard.load(checkpoint / "README.md")
    assert card.data.license == "mit"
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    for words in (
        'pipeline("text-generation"',
        "82.0% [77.0, 86.0], n=300",
        "| steps | 120 |",
        "## Limits",
        "bpb / model",
    ):
        assert words in card.text
    assert "trust_remote_code" not in card.text


def test_card_of_a_base_model_shows_text_not_chat_and_needs_no_information(tmp_path: Path) -> None:
    text = write_card(tmp_path, {}).read_text()
    assert '"role"' not in text
    assert "## Evaluation" not in text
    assert yaml.safe_load(text.split("---")[1])["tags"] == ["edu-chat", "nanochat", "base"]


def test_push_sends_the_hugging_face_files_only_and_the_card_names_the_repository(
    hub: type[FakeHub], checkpoint: Path
) -> None:
    assert push(checkpoint, "me/tiny").endswith("/commit/0")
    assert set(hub.files) == {"README.md", "config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert hub.files["model.safetensors"] == "{}"
    assert 'model="me/tiny"' in hub.files["README.md"]
    assert hub.revision == "main"
    push(checkpoint, "me/tiny", private=True, revision="dev")
    assert hub.revision == "dev"


def test_refusals_of_the_hub_are_a_users_mistake_with_advice(hub: type[FakeHub], checkpoint: Path) -> None:
    hub.refuse = 403
    with pytest.raises(ValueError, match="hf auth login"):
        push(checkpoint, "other/tiny")
    with pytest.raises(ValueError, match="user/name"):
        push(checkpoint, "tiny")


def test_push_without_token_checkpoint_or_network_says_what_to_do(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="--model"):
        push(tmp_path, "me/tiny")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="hf auth login"):
        push(checkpoint, "me/tiny")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(ConnectionError, match="cannot reach"):
        push(checkpoint, "me/tiny")
