"""Chat format: conversations to tokens with a loss mask, and completions back to messages.

    <|bos|><|user_start|>system\\n\\nquestion<|user_end|><|assistant_start|>answer<|assistant_end|><|user_start|>...

A use of the calculator is three messages, assistant(content, tool_calls), tool(content), assistant(content), and one
assistant turn: `...text<|python_start|>7*7<|python_end|><|output_start|>49<|output_end|>more text<|assistant_end|>`.
chat_template.jinja in edu/data says the same to transformers; a test holds the two equal, ids and mask.
"""

import codecs
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edu.chat.calculator import calculate
from edu.data.tokenizer import Tokenizer

Message = Mapping[str, Any]
Conversation = Mapping[str, Any] | Sequence[Message] | str
"""{"messages": [...]} as a line of a jsonl file holds it, the messages themselves, or their JSON."""

TRAIN_FLAGS = ("weight", "train", "training", "label")
"""Fields of a message or row by which data sets say if it is trained: 0 or false leaves it out of the loss."""


class ConversationError(ValueError):
    """Messages that form no conversation; the text names the message."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens."""

    ids: list[int]
    """Token ids, BOS first."""
    mask: list[int]
    """1 on tokens to learn: the assistant's text, calls with their marks, end token. 0 elsewhere: tool outputs, messages of weight 0."""


def render(conversation: Conversation, tokenizer: Tokenizer) -> Rendered:
    """Return the tokens of a conversation and the mask of those to learn; ConversationError on messages out of order.

    The end token has mask 1: a model that never learned to say it would not stop talking.
    """
    ids, mask = [tokenizer.bos], [0]

    def add(tokens: Sequence[int], learn: int) -> None:
        ids.extend(tokens)
        mask.extend([learn] * len(tokens))

    system, in_turn = "", False
    for message in check_messages(conversation):
        text = message["content"]
        match message["role"]:
            case "system":
                system = text + "\n\n"
            case "user":  # the system message has no marks of its own: it is the beginning of the first user turn
                add([tokenizer.user_start, *tokenizer.encode(system + text), tokenizer.user_end], 0)
                system = ""
            case "tool":  # written by the calculator, so read and never learned
                add([tokenizer.output_start, *tokenizer.encode(text), tokenizer.output_end], 0)
            case _:
                learn = message.get("weight", 1)
                if not in_turn:
                    add([tokenizer.assistant_start], 0)
                add(tokenizer.encode(text), learn)
                in_turn = "tool_calls" in message
                if in_turn:  # the turn goes on after the output
                    call = tokenizer.encode(expression_of(message["tool_calls"]))
                    add([tokenizer.python_start, *call, tokenizer.python_end], learn)
                else:
                    add([tokenizer.assistant_end], learn)
    return Rendered(ids, mask)


def render_prompt(conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens after which the assistant speaks: the last is assistant_start, or output_end within a tool use."""
    messages = check_messages(conversation)
    ids = render(messages, tokenizer).ids
    match messages[-1]["role"]:
        case "user":
            return [*ids, tokenizer.assistant_start]
        case "tool":
            return ids
        case role:
            raise ConversationError(
                f"message {len(messages) - 1}: a prompt ends with a user or a tool message, not {role}"
            )


def check_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """Return the messages in one form, if they make a conversation (or its beginning); ConversationError names the message.

    The form that training, server and chat share: `role` (system first, at most once), `content` (text), `tool_calls` (one
    call of the calculator, its arguments an object), `weight` (0, on an assistant's message that is only read). Read
    besides: text in parts, arguments as JSON, the role "developer", several system messages (joined), an empty one
    (left out), nulls, and any of TRAIN_FLAGS.

    >>> check_messages([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}])
    [{'role': 'user', 'content': 'Hi'}]
    >>> check_messages([{"role": "user", "content": "Hi"}, {"role": "user", "content": "Hello?"}])
    Traceback (most recent call last):
    edu.chat.chat_format.ConversationError: message 1: role 'user', expected assistant
    """
    messages = conversation.get("messages") if isinstance(conversation, Mapping) else conversation
    if isinstance(messages, str):
        messages = _parsed(messages, "messages")
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        form = '{"messages": [{"role": "user", "content": "..."}, ...]}'
        raise ConversationError(f"an empty conversation: expected {form}")
    checked: list[dict[str, Any]] = []
    expected: tuple[str, ...] = ("system", "user")
    for i, message in enumerate(messages):
        try:
            plain = _plain_message(
                message, expected, after_tool=expected == ("assistant",) and checked[-1]["role"] == "tool"
            )
        except ValueError as error:
            raise ConversationError(f"message {i}: {error}") from None
        if plain["role"] != "system":
            checked.append(plain)
            after = {"user": "assistant", "tool": "assistant", "assistant": "user"}
            expected = ("tool",) if "tool_calls" in plain else (after[plain["role"]],)
        elif plain["content"]:
            before = [checked.pop()["content"]] if checked else []
            checked.append({"role": "system", "content": "\n\n".join([*before, plain["content"]])})
    if not checked:
        raise ConversationError("an empty conversation: nothing but an empty system message")
    return checked


def _plain_message(message: Any, expected: tuple[str, ...], after_tool: bool) -> dict[str, Any]:
    """Return a message in the one form; ValueError on another role than expected and on what cannot take effect."""
    role = message.get("role") if isinstance(message, Mapping) else None
    role = "system" if role == "developer" else role
    if not isinstance(role, str) or role not in expected:
        raise ValueError(f"role {role!r}, expected {' or '.join(expected)}")
    content, calls = message.get("content"), message.get("tool_calls") or None
    match content:
        case str(text):
            pass
        case None if calls:
            text = ""
        case list() if all(isinstance(part, Mapping) and part.get("type") == "text" for part in content) and all(
            isinstance(part.get("text"), str) for part in content
        ):
            text = "".join(part["text"] for part in content)
        case _:
            kind = type(content).__name__
            raise ValueError(f"content is {kind}, expected a string or a list of parts of type text: {content!r:.100}")
    plain: dict[str, Any] = {"role": role, "content": text}
    if calls:
        if role != "assistant":
            raise ValueError(f"tool_calls of role {role!r}, expected assistant")
        plain |= tool_call(text, expression_of(calls))
    # An empty turn would teach to say nothing; after a tool's output the assistant may have nothing to add.
    if not (text or calls or after_tool or role in ("system", "tool")):
        raise ValueError(f"empty content of role {role!r}")
    flags = {name: trains(message, name) for name in TRAIN_FLAGS}
    if role != "assistant" and True in flags.values():
        raise ValueError(f"a flag to train role {role!r} ({flags}): only what the assistant says is trained")
    if role == "assistant" and False in flags.values():
        plain["weight"] = 0
    return plain


def trains(fields: Mapping[str, Any], name: str) -> bool | None:
    """Return what a flag of TRAIN_FLAGS says, None where it is not given; ValueError unless it is 0, 1, true or false."""
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, int | float) or value not in (0, 1):
        raise ValueError(f"{name} {value!r:.100}: expected 0 or false (do not train this), or 1 or true")
    return bool(value)


def _parsed(text: str, name: str) -> Any:
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        raise ConversationError(f"{name}: not JSON ({error})") from None


def expression_of(calls: Any) -> str:
    """Return the expression of a message's `tool_calls`; ValueError if they are not one call of the calculator.

    >>> expression_of([{"function": {"name": "calculator", "arguments": '{"expression": "7*7"}'}}])
    '7*7'
    """
    match calls:
        case [{"function": {"name": "calculator", "arguments": arguments}}]:
            given = _parsed(arguments, "arguments") if isinstance(arguments, str) else arguments
            given = {k: v for k, v in given.items() if v is not None} if isinstance(given, Mapping) else {}
            if given.keys() == {"expression"} and isinstance(given["expression"], str):
                return given["expression"]
    form = '[{"type": "function", "function": {"name": "calculator", "arguments": {"expression": "7*7"}}}]'
    raise ValueError(f"tool_calls {calls!r:.200}, expected one call of the form {form}")


def tool_call(content: str, expression: str) -> dict[str, Any]:
    """Return an assistant's message that says `content` and asks the calculator for `expression`."""
    function = {"name": "calculator", "arguments": {"expression": expression}}
    return {"role": "assistant", "content": content, "tool_calls": [{"type": "function", "function": function}]}


def read_blocks(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """Yield what a completion says as it comes, up to assistant_end: (kind, whole characters).

    The kinds are "text", "call", "output", and "mark" for the special tokens around the latter two, written as GSM8K
    does: `<<7*7=49>>`. A block that never closes ends at the next special token, without its closing mark.
    """
    opening = {tokenizer.python_start: ("call", "<<"), tokenizer.output_start: ("output", "")}
    closing = {tokenizer.python_end: ("call", "="), tokenizer.output_end: ("output", ">>")}
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # holds back the first bytes of a character
    kind = "text"
    for token in ids:
        if token == tokenizer.assistant_end:
            break
        special = token >= tokenizer.bos
        yield kind, decoder.decode(b"" if special else tokenizer.decode_bytes([token]), final=special)
        if special:
            closed, mark = closing.get(token, ("", ""))
            if closed == kind:
                yield "mark", mark
            kind, mark = opening.get(token, ("text", ""))
            if mark:
                yield "mark", mark
    yield kind, decoder.decode(b"", final=True)


def stream_text(ids: Iterable[int], tokenizer: Tokenizer, show_tools: bool = False) -> Iterator[str]:
    """Yield the text of a completion as it comes; calls and their outputs are left out, or shown as `<<7*7=49>>`."""
    for kind, text in read_blocks(ids, tokenizer):
        if text and (show_tools or kind == "text"):
            yield text


def parse_completion(ids: Iterable[int], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return a completion as messages: the inverse of `render` on one assistant turn.

    A call that never closes, and an output without a call, are left out.
    """
    messages: list[dict[str, Any]] = []
    said = {"text": "", "call": "", "output": ""}
    last = "text"
    for kind, text in read_blocks(ids, tokenizer):
        if kind != "mark":
            said[kind] = said[kind] + text if kind in ("text", last) else text
        elif text == "=":
            messages.append(tool_call(said["text"], said["call"]))
            said["text"] = ""
        elif text == ">>" and messages and messages[-1]["role"] == "assistant" and not said["text"]:
            messages.append({"role": "tool", "content": said["output"]})
        last = kind
    if said["text"] or not messages or messages[-1]["role"] == "tool":
        messages.append({"role": "assistant", "content": said["text"]})
    return messages


def cut_to_context(history: Sequence[Message], tokenizer: Tokenizer, max_tokens: int) -> list[dict[str, Any]]:
    """Return the messages without their oldest turns, so that the prompt has at most max_tokens tokens.

    The whole list is checked; a system message and the last user turn stay. ValueError if these alone are too long.
    Turns are counted once, from the newest, until they are too many, so a long history takes no more than its check.
    """
    messages = check_messages(history)
    system = messages[:1] if messages[0]["role"] == "system" else []
    turns = [i for i, message in enumerate(messages) if message["role"] == "user"]
    # 1. Add up the turns one by one: an estimate, because the system message joins the text of the first turn.
    length = 2 + sum(len(tokenizer.encode(message["content"])) for message in system)  # BOS, assistant_start
    first, end = len(turns) - 1, len(messages)
    while length <= max_tokens and first >= 0:
        length += len(render(messages[turns[first] : end], tokenizer).ids) - 1
        first, end = first - 1, turns[first]
    # 2. Let the prompt itself decide, from one turn more than the estimate allows.
    for start in turns[first + 1 :]:
        kept = system + messages[start:]
        length = len(render_prompt(kept, tokenizer))
        if length <= max_tokens:
            return kept
    raise ValueError(f"the prompt has {length} tokens, more than the {max_tokens} that the context has room for")


def calculator_tool(tokenizer: Tokenizer) -> Callable[[list[int]], list[int]]:
    """The Engine's tool: after python_end, the tokens of the output block to force; [] at every other place.

    Raises calculate's ValueError for what it refuses: the Engine ends that sample with finish_reason "tool_error".
    """

    def tool(new_tokens: list[int]) -> list[int]:
        if not new_tokens or new_tokens[-1] != tokenizer.python_end:
            return []
        if tokenizer.python_start not in new_tokens:
            raise ValueError("a tool call ends that never began")
        start = len(new_tokens) - new_tokens[::-1].index(tokenizer.python_start)
        result = calculate(tokenizer.decode(new_tokens[start:-1]))
        return [tokenizer.output_start, *tokenizer.encode(result), tokenizer.output_end]

    return tool
