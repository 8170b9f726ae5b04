"""The server: the OpenAI protocol as the real client sees it, before a fake responder and before a tiny model of ours."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import given, settings, strategies

from edu.data.tokenizer import Tokenizer
from edu.inference.params import SamplingParams
from edu.serving.protocol import ChatRequest, Reply
from edu.serving.server import ModelResponder, listen, make_app, run_in_thread, until_stop


class Fake:
    """Says its last message again, two characters a piece; notes what it was asked, and how many replies overlapped."""

    name, structured = "fake", False

    def __init__(self) -> None:
        self.requests: list[ChatRequest] = []
        self.together, self.most = 0, 0

    def respond(self, request: ChatRequest) -> Reply:
        self.requests.append(request)
        text = str(request.messages[-1].content)
        if text == "impossible":
            raise ValueError("the prompt is too long")
        reply = Reply(iter(()), prompt_tokens=7)
        reply.pieces = self.speak(text, reply)
        return reply

    def speak(self, text: str, reply: Reply) -> Iterator[str]:
        self.together += 1
        self.most = max(self.most, self.together)
        try:
            for at in range(0, len(text), 2):
                reply.completion_tokens += 1
                yield text[at : at + 2]
            reply.finish_reason = "length"
        finally:
            self.together -= 1


@pytest.fixture(scope="module")
def fake() -> Fake:
    return Fake()


@pytest.fixture(scope="module")
def url(fake: Fake) -> Iterator[str]:
    with run_in_thread(make_app(fake)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=url, api_key="none", max_retries=0, http_client=httpx2.Client(trust_env=False)
    ) as client:
        yield client


def say(client: openai.OpenAI, text: str, **options: Any) -> Any:
    return client.chat.completions.create(model="fake", messages=[{"role": "user", "content": text}], **options)


def test_a_whole_reply_has_text_reason_and_usage(client: openai.OpenAI) -> None:
    reply = say(client, "Hello 🙂!")
    assert reply.choices[0].message.content == "Hello 🙂!"
    assert reply.choices[0].finish_reason == "length"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (7, 4, 11)
    assert (reply.object, reply.model) == ("chat.completion", "fake")


def test_a_streamed_reply_is_the_whole_one_in_pieces(client: openai.OpenAI) -> None:
    chunks = list(say(client, "Hello 🙂!", stream=True, stream_options={"include_usage": True}))
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert texts == ["", "He", "ll", "o ", "🙂!", None]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices] == [None] * 5 + ["length"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.total_tokens == 11
    assert len({chunk.id for chunk in chunks}) == 1


def test_stop_texts_cut_the_reply_and_do_not_leak(client: openai.OpenAI, fake: Fake) -> None:
    assert say(client, "one, two, three", stop=["three", "two"]).choices[0].message.content == "one, "
    chunks = say(client, "one, two, three", stop="two", stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one, "
    assert fake.together == 0, "what made a reply that was cut has not ended"


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_what_looked_like_a_stop_is_given_back(size: int) -> None:
    text = "EN END? no: ENd ENEND tail"
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    assert "".join(until_stop(Reply(iter(pieces), 0), ["STOP"])) == text
    assert "".join(until_stop(Reply(iter(pieces), 0), ["NEND", "ENDS"])) == "EN END? no: ENd E"


def test_settings_reach_the_responder(client: openai.OpenAI, fake: Fake) -> None:
    say(client, "x", temperature=0.0, top_p=0.5, max_tokens=3, seed=-1, user="me")
    request = fake.requests[-1]
    assert (request.temperature, request.top_p, request.max_tokens, request.drawn_seed) == (0.0, 0.5, 3, 2**63 - 1)
    say(client, "x", max_completion_tokens=4)
    assert fake.requests[-1].max_completion_tokens == 4
    assert fake.requests[-1].drawn_seed != fake.requests[-1].drawn_seed  # drawn by chance, each time


def test_messages_in_parts_and_calls_are_made_plain(url: str, fake: Fake) -> None:
    function = {"name": "calculator", "arguments": '{"expression": "7*7"}'}
    messages = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]},
        {"role": "tool", "content": "49", "tool_call_id": "1"},
    ]
    assert post(url, {"model": "fake", "messages": messages})[0] == 200
    plain = fake.requests[-1].conversation()
    assert [message["role"] for message in plain] == ["system", "user", "assistant", "tool"]
    assert plain[1]["content"] == "ab"
    assert plain[2]["tool_calls"][0]["function"]["arguments"] == {"expression": "7*7"}


def test_models_and_health_are_listed(client: openai.OpenAI, url: str) -> None:
    assert [model.id for model in client.models.list()] == ["fake"]
    with httpx2.Client(trust_env=False) as plain:
        assert plain.get(url.removesuffix("/v1") + "/health").json()["status"] == "ok"


def post(url: str, body: Any, path: str = "/chat/completions") -> tuple[int, dict[str, Any]]:
    with httpx2.Client(trust_env=False) as plain:
        content = body if isinstance(body, bytes) else None
        reply = plain.post(url + path, content=content, json=None if content is not None else body)
        return reply.status_code, reply.json()


USER = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"model": "gpt-7"}, 404, "gpt-7"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, 400, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, 400, "content"),
        ({"messages": [{"role": "user", "content": "impossible"}]}, 400, "too long"),
        ({"temperature": 3}, 400, "temperature"),
        ({"top_p": -0.1}, 400, "top_p"),
        ({"model": "m" * 1000}, 400, "model"),
        ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop"),
        ({"stop": "x" * 257}, 400, "stop"),
        ({"stop": ["x" * 257]}, 400, "stop"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"messages": [*USER, {"role": "assistant", "tool_calls": [{"function": None}]}]}, 400, "tool_calls"),
        ({"messages": [*USER, {"role": "assistant", "tool_calls": [1]}]}, 400, "tool_calls"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"n": 2}, 400, "n:"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"stream": True, "messages": [{"role": "user", "content": "impossible"}]}, 400, "too long"),
    ],
)
def test_a_bad_request_gets_an_error_of_the_protocol(
    url: str, changes: dict[str, Any], status: int, words: str
) -> None:
    got, body = post(url, {"model": "fake", "messages": USER} | changes)
    assert got == status
    assert words in body["error"]["message"]
    assert set(body["error"]) == {"message", "type", "param", "code"}


def test_neutral_options_are_no_error(url: str) -> None:
    options = {"frequency_penalty": 0, "logprobs": False, "user": "me", "response_format": {"type": "text"}, "n": 1}
    options |= {"tool_choice": "none", "tools": [], "parallel_tool_calls": True, "top_p": 0, "modalities": ["text"]}
    assert post(url, {"model": "fake", "messages": USER} | options)[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "fake", "messages": [' + b"1," * 400_000 + b"1]}",
        b'{"model": "fake", "messages": [{"role": "user", "content": [' + b"1," * 400_000 + b"1]}]}",
        b'{"model": "fake", "messages": [' + b'{"role": "wizard"},' * 40_000 + b"1]}",
        b'{"model": "fake", "messages": ' + b"[" * 400_000,
        b'{"model": "fake", "messages": [{"role": "user", "content": "hi"}], "x": ' + b'{"a":' * 100_000,
        json.dumps({"model": "fake", "messages": USER} | {f"k{i}": 1 for i in range(50_000)}).encode(),
        json.dumps({"model": "fake", "messages": USER, "\ud800": 1}).encode(),
        json.dumps({"model": "\ud800", "messages": [{"role": "\ud800"}]}).encode(),
        b"\xff" * 900_000,
        b'{"model": "' + b"x" * 900_000 + b'"}',
    ],
    ids=[
        "wrong messages",
        "wrong parts",
        "wrong roles",
        "nested",
        "nested unknown",
        "unknown",
        "half a character",
        "half characters",
        "bytes",
        "model",
    ],
)
def test_the_answer_to_a_wrong_body_is_small_and_quick(url: str, body: bytes) -> None:
    start = time.monotonic()
    with httpx2.Client(trust_env=False, timeout=20) as plain:
        reply = plain.post(url + "/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]
    assert len(reply.content) < 2000
    assert time.monotonic() - start < 5


def test_a_body_announced_as_too_large_is_refused_before_it_is_sent(url: str) -> None:
    port = int(url.split(":")[2].split("/")[0])
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000001\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(head.encode())
        answer = ""
        while "}}" not in answer:
            answer += connection.recv(10_000).decode()
    assert answer.startswith("HTTP/1.1 413 ")
    assert "larger than 1,000,000 bytes" in answer


def test_a_body_of_unknown_length_is_refused(url: str) -> None:
    with httpx2.Client(trust_env=False) as plain:
        reply = plain.post(url + "/chat/completions", content=iter([b"{", b"}"]))
    assert reply.status_code == 411
    assert "Content-Length" in reply.json()["error"]["message"]


def test_a_wrong_method_is_told_the_right_one(url: str) -> None:
    with httpx2.Client(trust_env=False) as plain:
        reply = plain.get(url + "/chat/completions")
    assert (reply.status_code, reply.headers["Allow"]) == (405, "POST")


def test_a_stop_in_the_last_allowed_token_is_the_reason_it_ended(client: openai.OpenAI) -> None:
    assert say(client, "one, two", stop="two").choices[0].finish_reason == "stop"
    *_, last = say(client, "one, two", stop="two", stream=True)
    assert last.choices[0].finish_reason == "stop"


def test_no_json_and_no_such_page_are_errors_of_the_protocol(url: str) -> None:
    assert post(url, b"{broken")[0] == 400
    status, body = post(url, {}, "/embeddings")
    assert status == 404
    assert "error" in body


def test_the_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="too long"):
        say(client, "impossible")
    with pytest.raises(openai.NotFoundError, match="gpt-7"):
        client.chat.completions.create(model="gpt-7", messages=[{"role": "user", "content": "hi"}])


def test_replies_are_made_one_after_the_other_and_many_waiting_do_not_block(client: openai.OpenAI, fake: Fake) -> None:
    def ask(number: int) -> str:
        if number % 2:
            return say(client, f"number {number}").choices[0].message.content
        return "".join(chunk.choices[0].delta.content or "" for chunk in say(client, f"number {number}", stream=True))

    fake.most = 0
    with ThreadPoolExecutor(50) as pool:  # more than the server has threads
        assert list(pool.map(ask, range(60))) == [f"number {number}" for number in range(60)]
    assert fake.most == 1


def test_a_client_that_leaves_frees_its_turn(client: openai.OpenAI) -> None:
    stream = say(client, "long " * 2000, stream=True)
    next(iter(stream))
    stream.close()
    done = threading.Event()
    threading.Thread(target=lambda: (say(client, "next"), done.set()), daemon=True).start()
    assert done.wait(10)


def test_a_taken_port_is_a_clear_error() -> None:
    with listen("127.0.0.1", 0) as listener, pytest.raises(OSError, match="choose another --port"):
        listen("127.0.0.1", listener.getsockname()[1])


def test_serve_does_not_import_torch() -> None:
    code = "import sys, edu.serving.server, edu.synthetic.identity, edu.synthetic.teacher; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parent.parent).returncode == 0


# Our own models


class Scripted:
    """An engine that says given tokens, and notes what it was asked."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.options = tokens, {}

    def stream(self, prompt: list[int], params: SamplingParams, **options: Any) -> Iterator[int]:
        self.options = vars(params) | options | {"prompt": prompt}
        return iter(self.tokens[: params.max_new_tokens])


def responder(tokenizer: Tokenizer, tokens: Iterable[int], context: int = 64) -> ModelResponder:
    engine: Any = Scripted(list(tokens))
    return ModelResponder("ours", engine, tokenizer, context)


def ask(responder: ModelResponder, *messages: str, **options: Any) -> tuple[str, Reply]:
    """Users and assistant in turns."""
    body = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
    reply = responder.respond(ChatRequest.model_validate({"model": "ours", "messages": body} | options))
    return "".join(reply.pieces), reply


def test_a_models_reply_is_its_text_up_to_the_end_token(tokenizer: Tokenizer) -> None:
    ours = responder(tokenizer, [*tokenizer.encode("Où? 🙂"), tokenizer.assistant_end])
    text, reply = ask(ours, "Hi", temperature=0.0, seed=3)
    options = ours.engine.options  # pyright: ignore[reportAttributeAccessIssue]
    assert text == "Où? 🙂"
    assert reply.finish_reason == "stop"
    assert reply.prompt_tokens == len(options["prompt"])
    assert reply.completion_tokens == len(tokenizer.encode("Où? 🙂")) + 1
    assert (options["temperature"], options["seed"], options["stop_tokens"]) == (0.0, 3, {tokenizer.assistant_end})
    assert options["prompt"][-1] == tokenizer.assistant_start


def test_a_reply_cut_at_its_limit_says_so(tokenizer: Tokenizer) -> None:
    tokens = [*tokenizer.encode("one two three four"), tokenizer.assistant_end]
    assert ask(responder(tokenizer, tokens), "Hi", max_tokens=2)[1].finish_reason == "length"
    assert ask(responder(tokenizer, tokens), "Hi", max_completion_tokens=len(tokens))[1].finish_reason == "stop"
    assert ask(responder(tokenizer, tokens * 99), "Hi")[1].finish_reason == "stop"


def test_old_turns_are_cut_and_prompt_and_reply_fit_the_context(tokenizer: Tokenizer) -> None:
    ours = responder(tokenizer, [1] * 999)
    _, reply = ask(ours, *["x" * 20] * 9)
    assert reply.prompt_tokens + reply.completion_tokens <= 64
    assert reply.completion_tokens >= 16
    with pytest.raises(ValueError, match="48"):
        ask(ours, "x y " * 99)


def test_messages_are_heeded_or_refused_and_never_dropped(tokenizer: Tokenizer) -> None:
    """Whatever is accepted is in the prompt, even if older turns are cut for room."""
    ours = responder(tokenizer, [1] * 999, context=200)
    hi, hello = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "HELLO"}
    turns = [{"role": "user", "content": "x" * 20}, {"role": "assistant", "content": "y" * 20}] * 40
    system, refused = {"role": "system", "content": "ONE"}, []
    for messages in (
        [system, {"role": "system", "content": "TWO"}, hi],
        [system, {"role": "system", "content": "TWO"}, *turns, hi],
        [hello, hi],
        [hello, *turns, hi],
        [{"role": "system", "content": ""}, hi],
        [hi, {"role": "assistant", "content": ""}, hi],
        [hi, hello],
        [hi, {"role": "assistant", "content": None, "tool_calls": []}, hi],
        [{"role": "developer", "content": [{"type": "text", "text": "O"}, {"type": "text", "text": "NE"}]}, hi],
    ):
        try:
            ours.respond(ChatRequest.model_validate({"model": "ours", "messages": messages}))
        except ValueError as error:
            refused.append((messages, str(error)))
            continue
        prompt = tokenizer.decode(ours.engine.options["prompt"])  # pyright: ignore[reportAttributeAccessIssue]
        words = [m["content"] for m in messages if m["role"] == "system" or m is hello]
        assert all(word in prompt for word in words), messages
    assert all("message" in complaint for _, complaint in refused)


def test_an_empty_reply_may_be_sent_back_and_tool_calls_as_the_protocol_writes_them(tokenizer: Tokenizer) -> None:
    ours = responder(tokenizer, [1] * 999, context=200)
    hi = {"role": "user", "content": "Hi"}
    function = {"name": "calculator", "arguments": '{"expression": "7*7"}'}
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}
    output = {"role": "tool", "content": [{"type": "text", "text": "49"}], "tool_call_id": "1"}
    ours.respond(ChatRequest.model_validate({"model": "ours", "messages": [hi, call, output]}))
    prompt = ours.engine.options["prompt"]  # pyright: ignore[reportAttributeAccessIssue]
    assert "7*7" in tokenizer.decode(prompt)
    assert "49" in tokenizer.decode(prompt)
    deep = {"name": "calculator", "arguments": "[" * 100_000}
    call["tool_calls"][0]["function"] = deep
    with pytest.raises(ValueError, match="arguments"):
        ours.respond(ChatRequest.model_validate({"model": "ours", "messages": [hi, call, output]}))


JSON = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | strategies.text(),
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(strategies.text(), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["model", "messages", "stream", "stream_options", "temperature", "top_p", "max_tokens", "stop", "seed", "n"]
FIELDS += ["response_format", "tools", "tool_choice", "logit_bias", "user"]
MESSAGE_FIELDS = ["role", "content", "tool_calls", "weight", "name", "tool_call_id"]


def fuzz(tokenizer: Tokenizer, examples: int) -> None:
    """Ask with right requests of which one field of the body and one of a message are anything."""
    with run_in_thread(make_app(responder(tokenizer, [1] * 99, context=400))) as url:

        @settings(max_examples=examples, deadline=None)
        @given(
            strategies.sampled_from(FIELDS), JSON, strategies.sampled_from(MESSAGE_FIELDS), JSON, strategies.booleans()
        )
        def check(field: str, value: Any, message_field: str, message_value: Any, outer: bool) -> None:
            function = {"name": "calculator", "arguments": '{"expression": "7*7"}'}
            messages: list[dict[str, Any]] = [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]},
                {"role": "tool", "content": "49"},
            ]
            messages[len(message_field) % 3][message_field] = message_value
            body = {"model": "ours", "messages": messages, "max_tokens": 4}
            if outer:
                body[field] = value
            headers = {"Content-Type": "application/json"}
            reply = plain.post(f"{url}/chat/completions", content=json.dumps(body).encode(), headers=headers)
            seen.add(reply.status_code)
            assert reply.status_code in (200, 400, 404), body
            assert len(reply.content) < 3000, body

        seen = set[int]()
        with httpx2.Client(trust_env=False) as plain:
            check()
    assert seen >= {200, 400}


def test_no_request_makes_the_server_fail(tokenizer: Tokenizer) -> None:
    fuzz(tokenizer, 50)


@pytest.mark.slow
def test_no_request_of_many_makes_the_server_fail(tokenizer: Tokenizer) -> None:
    fuzz(tokenizer, 1000)


@pytest.mark.parametrize("options", [{"temperature": 1e-40}, {"temperature": 1e-7}, {"top_p": 0}, {"top_p": 1e-300}])
def test_the_least_temperature_and_top_p_are_greedy(tokenizer: Tokenizer, options: dict[str, float]) -> None:
    import torch

    from edu.inference.engine import Engine
    from edu.model.gpt import GPT, GPTConfig

    torch.manual_seed(0)
    model = GPT(GPTConfig.tiny(vocab_size=tokenizer.vocab_size)).eval()
    torch.nn.init.normal_(model.lm_head.weight)
    ours = ModelResponder("ours", Engine(model), tokenizer, model.config.max_position_embeddings)
    greedy, _ = ask(ours, "Hi", temperature=0, max_tokens=8)
    assert ask(ours, "Hi", seed=5, max_tokens=8)[0] != greedy
    assert ask(ours, "Hi", seed=5, max_tokens=8, **options)[0] == greedy


def test_a_tiny_model_answers_over_the_wire(tokenizer: Tokenizer) -> None:
    import torch

    from edu.inference.engine import Engine
    from edu.model.gpt import GPT, GPTConfig

    torch.manual_seed(0)
    model = GPT(GPTConfig.tiny(vocab_size=tokenizer.vocab_size)).eval()
    context = model.config.max_position_embeddings
    ours = ModelResponder("ours", Engine(model), tokenizer, context)
    with run_in_thread(make_app(ours)) as url:
        plain = httpx2.Client(trust_env=False)
        with openai.OpenAI(base_url=url, api_key="none", http_client=plain) as client:
            options: Any = {"model": "ours", "messages": USER, "max_tokens": 8, "temperature": 1.0}
            first, again, other = (client.chat.completions.create(**options, seed=seed) for seed in (1, 1, 2))
            pieces = client.chat.completions.create(**options, seed=1, stream=True)
            streamed = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
    texts = [reply.choices[0].message.content for reply in (first, again, other)]
    assert texts[0] == texts[1] == streamed
    assert texts[0] != texts[2]
    assert first.usage.completion_tokens <= 8
