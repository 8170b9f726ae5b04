"""The environment: proxies, certificates, endpoints and other exported variables do what their owner means, or are one line."""

import contextlib
import os
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from fault_server import Plan, serve

from edu.config.cli import prepare_environment
from edu.config.network import http_client
from edu.data.download import Retry
from edu.data.shards import ShardError, download_shard
from edu.data.sources import find_source

ROOT = Path(__file__).parents[1]
SELF_SIGNED = Path(__file__).parent / "data" / "self_signed.pem"
ELSEWHERE = "https://example.invalid/shard_{index:05d}.parquet"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:1", r"SOCKS .*pip install"),
        ("HTTPS_PROXY", "http://me:secret@127.0.0.1:1", r"through the proxy 127\.0\.0\.1:1 .*HTTPS_PROXY"),
        ("HTTPS_PROXY", "127.0.0.1:1", r"through the proxy 127\.0\.0\.1:1"),
        ("HTTPS_PROXY", "ftp://me:secret@127.0.0.1:1", "HTTPS_PROXY or ALL_PROXY is not the URL of a proxy"),
        ("ALL_PROXY", "http://me:secret@host:port", "HTTPS_PROXY or ALL_PROXY is not the URL of a proxy"),
        ("SSL_CERT_FILE", "/nowhere/ca.pem", "SSL_CERT_FILE=/nowhere/ca.pem is no file of certificates"),
        ("SSL_CERT_FILE", str(ROOT / "pyproject.toml"), "pyproject.toml is no file of certificates"),
    ],
)
def test_wrong_proxy_and_certificate_settings_are_one_line_without_secrets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str, words: str
) -> None:
    monkeypatch.setenv(name, value)
    start = time.monotonic()
    with pytest.raises(ShardError, match=words) as caught:  # at once: no retry helps
        download_shard(0, tmp_path, find_source(ELSEWHERE))
    assert time.monotonic() - start < 5
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def tls() -> Iterator[str]:
    """A server on this machine whose certificate nobody has signed."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/slow.parquet":  # headers that never end
                with contextlib.suppress(OSError):
                    while True:
                        self.wfile.write(b"x")
                        time.sleep(0.02)
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(SELF_SIGNED)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"https://localhost:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_unknown_certificate_is_one_line_at_once_and_honored_once_it_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tls: str
) -> None:
    start = time.monotonic()
    with pytest.raises(ShardError, match=r"certificate is not trusted \(self-signed certificate\): set SSL_CERT_FILE"):
        download_shard(0, tmp_path, find_source(f"{tls}/shard_{{index:05d}}.parquet"))
    assert time.monotonic() - start < 5
    environment = {"REQUESTS_CA_BUNDLE": str(SELF_SIGNED)}
    prepare_environment(environment)
    monkeypatch.setenv("SSL_CERT_FILE", environment["SSL_CERT_FILE"])
    with http_client(tls) as client:
        assert client.get(tls).text == "ok"


def test_headers_that_trickle_in_have_a_time_limit_with_tls_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tls: str
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(SELF_SIGNED))
    start = time.monotonic()
    with pytest.raises(ShardError, match="stalled"):
        download_shard(0, tmp_path, find_source(f"{tls}/slow.parquet"), retry=Retry(attempts=1, window=0.3))
    assert time.monotonic() - start < 5


def test_servers_on_this_machine_are_reached_whatever_proxy_is_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "socks5://me:secret@127.0.0.1:1")
    content = (Path(__file__).parent / "data" / "old_run" / "data" / "shard_00000.parquet").read_bytes()
    with serve(Plan({"/shard_00000.parquet": content})) as plan:
        source = find_source(f"{plan.url}/shard_{{index:05d}}.parquet", val_index=7)
        assert download_shard(0, tmp_path, source).read_bytes() == content


def test_the_environment_is_completed_and_nothing_of_it_is_overruled() -> None:
    ours = {"NO_PROXY": "example.com", "HF_ENDPOINT": "mirror.example.com", "CURL_CA_BUNDLE": "/a.pem"}
    prepare_environment(ours)
    assert ours["NO_PROXY"] == ours["no_proxy"] == "example.com,127.0.0.1,localhost,::1"
    assert ours["HF_ENDPOINT"] == "https://mirror.example.com"
    assert ours["SSL_CERT_FILE"] == "/a.pem"
    before = {
        "no_proxy": "*",
        "HF_ENDPOINT": "http://mirror",
        "SSL_CERT_FILE": "/b.pem",
        "REQUESTS_CA_BUNDLE": "/a.pem",
    }
    after = dict(before)
    prepare_environment(after)
    assert after == before | {"MPLBACKEND": "agg"}


DOWNLOAD = ("scripts/download_shards.py", "--source", "org/name", "--val-index", "1", "--num-shards", "1", "--out")
CHAT = ("scripts/chat.py", "--model", "org/name", "-p", "hi", "--system")


@pytest.mark.parametrize(
    ("command", "variables", "words"),
    [
        (DOWNLOAD, {"ALL_PROXY": "socks5://127.0.0.1:1"}, "a SOCKS proxy is set"),
        (DOWNLOAD, {"HTTPS_PROXY": "http://me:secret@127.0.0.1:1"}, "no connection through the proxy 127.0.0.1:1"),
        (DOWNLOAD, {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        (DOWNLOAD, {"HF_ENDPOINT": "example.invalid", "HTTPS_PROXY": "127.0.0.1:1"}, "through the proxy"),
        (CHAT, {"ALL_PROXY": "socks5://127.0.0.1:1"}, "a SOCKS proxy is set"),
        (CHAT, {"HTTPS_PROXY": "http://me:secret@127.0.0.1:1"}, "no connection through the proxy 127.0.0.1:1"),
    ],
)
def test_a_script_that_cannot_reach_the_hub_says_why_in_one_line(
    tmp_path: Path, command: tuple[str, ...], variables: dict[str, str], words: str
) -> None:
    environment = os.environ | {"HF_HOME": str(tmp_path)} | variables
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path / "data")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (1, 2)
    said = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "missing: "))]
    assert said
    assert all(words in line for line in said), done.stderr
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        ((), 0, "from embedded-teacher: "),
        (("--teacher", "http://127.0.0.1:9/v1", "--model", "m"), 2, "no answer from http://127.0.0.1:9/v1"),
        (("--teacher", "gpt"), 2, "--teacher gpt: choose embedded, openai"),
        (("--model", "m"), 2, "name its endpoint with --teacher"),
    ],
)
def test_credentials_select_no_teacher_and_a_flag_does(
    tmp_path: Path, flags: tuple[str, ...], status: int, words: str
) -> None:
    environment = os.environ | {"OPENAI_API_KEY": "secret", "OPENAI_BASE_URL": "http://127.0.0.1:1/v1"}
    command = [sys.executable, "scripts/make_identity.py", "--num", "2", "--out", str(tmp_path / "x.jsonl"), *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert words in done.stdout + done.stderr
    assert "secret" not in done.stdout + done.stderr


def test_the_tests_pass_whatever_is_exported(tmp_path: Path) -> None:
    """A few that read the environment, under one that is wrong in all that they may read."""
    names = "http_proxy HTTPS_PROXY ALL_PROXY HF_ENDPOINT HF_TOKEN HF_HOME OPENAI_API_KEY OPENAI_BASE_URL WANDB_MODE"
    names += " SSL_CERT_FILE REQUESTS_CA_BUNDLE MPLBACKEND TIKTOKEN_CACHE_DIR TMPDIR RECIPE LAUNCH TERM EDU_FAST"
    hostile = dict.fromkeys(names.split(), "nonsense") | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    hostile |= {"ACCELERATE_MIXED_PRECISION": "fp8", "ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "3", "RANK": "1"}
    hostile |= {"ALL_PROXY": "socks5://nowhere:1", "NO_PROXY": "nowhere", "LANG": "C", "LC_ALL": "C", "COLUMNS": "20"}
    hostile |= {"PYTHONWARNINGS": "always", "NUMBA_DISABLE_JIT": "1", "NO_COLOR": "1", "TORCH_LOGS": "+dynamo"}
    sensitive = [
        "test_01_shards.py::test_the_token_goes_to_the_hub_and_to_nobody_else",
        "test_01_shards.py::test_hf_endpoint_is_respected_by_a_fresh_process",
        "test_03_setup.py::test_an_unknown_precision_is_named",
        "test_06_identity.py::test_an_unreachable_endpoint_loses_nothing",
        "test_hub.py::test_a_push_that_cannot_work_says_what_to_do",
        "test_hub.py::test_our_own_loading_takes_a_hub_id",
        "test_serve.py::test_settings_reach_the_responder",
    ]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        f"--basetemp={tmp_path / 'b'}",
    ]
    done = subprocess.run(
        [*command, *(f"tests/{name}" for name in sensitive)],
        cwd=ROOT,
        env=os.environ | hostile,
        umask=0o077,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{len(sensitive)} passed" in done.stdout


@pytest.mark.parametrize(
    ("command", "variables"),
    [
        (
            (
                "scripts/download_shards.py",
                "--source",
                "http://me:s3cret@127.0.0.1:1/a.parquet?key=s3cret",
                "--out",
                "OUT",
            ),
            {},
        ),
        (("scripts/download_shards.py", "--source", "http://me:s3cret@127.0.0.1:1/a.zip", "--out", "OUT"), {}),
        (("scripts/download_shards.py", "--source", "http://me:s3cret@127.0.0.1:1/{x}", "--out", "OUT"), {}),
        (("scripts/download_shards.py", "--source", "ftp://me:s3cret@127.0.0.1:1/a.parquet", "--out", "OUT"), {}),
        (
            ("scripts/download_shards.py", "--source", "me/mine", "--out", "OUT"),
            {"HF_ENDPOINT": "http://me:s3cret@127.0.0.1:1"},
        ),
        (
            ("scripts/make_identity.py", "--teacher", "openai", "--model", "x", "--out", "OUT"),
            {"OPENAI_BASE_URL": "http://me:s3cret@127.0.0.1:1/v1"},
        ),
        (("scripts/chat.py", "-p", "hi", "--model", "me/mine"), {"HF_ENDPOINT": "http://me:s3cret@127.0.0.1:1"}),
        (("scripts/chat.py", "-p", "hi", "--model", "http://me:s3cret@127.0.0.1:1/mine"), {}),
    ],
)
def test_passwords_in_urls_are_never_printed(
    tmp_path: Path, command: tuple[str, ...], variables: dict[str, str]
) -> None:
    words = [str(tmp_path / "out") if word == "OUT" else word for word in command]
    code = "import runpy, sys; from edu.data.download import Retry; Retry.backoff = lambda *_: 0.0; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=ROOT,
        env=os.environ | {"HF_HOME": str(tmp_path), "OPENAI_API_KEY": "k"} | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (1, 2), done.stderr
    assert "127.0.0.1:1" in done.stderr or "me/mine" in done.stderr
    assert "Traceback" not in done.stderr
    assert "s3cret" not in done.stderr + done.stdout
    assert not any(b"s3cret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
