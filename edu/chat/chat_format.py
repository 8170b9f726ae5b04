"""Conversations and tokens: what the model reads of a chat, what it is trained to say, and the way back to text.

    <|bos|><|user_start|>system\\n\\nquestion<|user_end|><|assistant_start|>answer<|assistant_end|><|user_start|>...

A use of the calculator is three messages, assistant(content, tool_calls), tool(content), assistant(content), and one
assistant turn: `...text<|python_start|>7*7<|python_end|><|output_start|>49<|output_end|>more text<|assistant_end|>`.
chat_template.jinja beside this file says the same to transformers; a test holds the two equal, ids and mask.
"""

import codecs
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edu.chat.calculator import calculate
from edu.data.tokenizer import Tokenizer

Message = Mapping[str, Any]
Conversation = Mapping[str, Any] | Sequence[Message]
"""{"messages": [...]} as a line of a jsonl file holds it, or the messages themselves."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens."""

    ids: list[int]
    """The tokens, BOS first."""
    mask: list[int]
    """1 where the assistant speaks: text, calls with their marks, end token; 0 elsewhere, tool outputs included."""


def render(conversation: Conversation, tokenizer: Tokenizer) -> Rendered:
    """The tokens of a conversation, and which of them to learn. ValueError if its messages are not in order."""
    messages = check_messages(conversation)
    ids, mask = [tokenizer.bos], [0]

    def add(tokens: Sequence[int], learn: int) -> None:
        ids.extend(tokens)
        mask.extend([learn] * len(tokens))

    system, in_turn = "", False
    for message in messages:
        text = message.get("content") or ""
        match message["role"]:
            case "system":
                system = text + "\n\n"
            case "user":
                add([tokenizer.user_start, *tokenizer.encode(system + text), tokenizer.user_end], 0)
                system = ""
            case "tool":
                add([tokenizer.output_start, *tokenizer.encode(text), tokenizer.output_end], 0)
            case _:
                if not in_turn:
                    add([tokenizer.assistant_start], 0)
                add(tokenizer.encode(text), 1)
                in_turn = bool(message.get("tool_calls"))
                if in_turn:
                    add([tokenizer.python_start, *tokenizer.encode(expression_of(message)), tokenizer.python_end], 1)
                else:
                    add([tokenizer.assistant_end], 1)
    return Rendered(ids, mask)


def render_prompt(conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
    """The tokens after which the assistant speaks: the last is assistant_start, or output_end within a tool use."""
    messages = check_messages(conversation)
    ids = render(messages, tokenizer).ids
    match messages[-1]["role"]:
        case "user":
            return [*ids, tokenizer.assistant_start]
        case "tool":
            return ids
        case role:
            raise ValueError(f"message {len(messages) - 1}: a prompt ends with a user or a tool message, not {role}")


def check_messages(conversation: Conversation) -> list[Message]:
    """The messages, if they form a conversation (or the beginning of one); else a ValueError that names the message.

    >>> check_messages([{"role": "user", "content": "Hi"}, {"role": "user", "content": "Hello?"}])
    Traceback (most recent call last):
    ValueError: message 1: role 'user', expected assistant
    """
    messages = conversation.get("messages") if isinstance(conversation, Mapping) else conversation
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError('an empty conversation: expected {"messages": [{"role": "user", "content": "..."}, ...]}')
    expected: tuple[str, ...] = ("system", "user")
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if not isinstance(role, str) or role not in expected:
            raise ValueError(f"message {i}: role {role!r}, expected {' or '.join(expected)}")
        try:
            _check_content(message, may_be_empty=role == "tool" or (i > 0 and messages[i - 1]["role"] == "tool"))
        except ValueError as error:
            raise ValueError(f"message {i}: {error}") from None
        after = {"system": "user", "user": "assistant", "tool": "assistant", "assistant": "user"}
        expected = ("tool",) if message.get("tool_calls") else (after[role],)
    return list(messages)


def _check_content(message: Message, may_be_empty: bool) -> None:
    """ValueError unless the content is text and a tool call, if any, is one of the calculator by the assistant."""
    content, calls = message.get("content"), message.get("tool_calls")
    if not isinstance(content, str) and not (content is None and calls):
        raise ValueError(f"content is {type(content).__name__}, expected a string")
    if not (content or calls or may_be_empty):
        raise ValueError(f"empty content of role {message['role']!r}")
    if calls:
        if message["role"] != "assistant":
            raise ValueError(f"tool_calls of role {message['role']!r}, expected assistant")
        expression_of(message)


def expression_of(message: Message) -> str:
    """The expression of a message's tool call. ValueError if it is not one call of the calculator.

    >>> expression_of(tool_call("", "7*7"))
    '7*7'
    """
    match message["tool_calls"]:
        case [{"function": {"name": "calculator", "arguments": {"expression": str(expression)}}}]:
            return expression
        case calls:
            form = '[{"type": "function", "function": {"name": "calculator", "arguments": {"expression": "7*7"}}}]'
            raise ValueError(f"tool_calls {calls!r:.200}, expected one call of the form {form}")


def tool_call(content: str, expression: str) -> dict[str, Any]:
    """An assistant's message that says `content` and asks the calculator for `expression`."""
    function = {"name": "calculator", "arguments": {"expression": expression}}
    return {"role": "assistant", "content": content, "tool_calls": [{"type": "function", "function": function}]}


def parse_completion(ids: Iterable[int], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """What the model said after assistant_start, as messages: the inverse of `render` on one assistant turn.

    Reads up to assistant_end or the end of ids; a call that never closes, and an output without a call, are left out.
    """
    messages: list[dict[str, Any]] = []
    block: list[int] = []
    content, inside = "", "text"
    for token in ids:
        if token == tokenizer.assistant_end:
            break
        if token == tokenizer.python_start and inside == "text":
            content, inside, block = tokenizer.decode(block), "call", []
        elif token == tokenizer.python_end and inside == "call":
            messages.append(tool_call(content, tokenizer.decode(block)))
            content, inside, block = "", "text", []
        elif token == tokenizer.output_start and inside == "text":
            content, inside, block = content + tokenizer.decode(block), "output", []
        elif token == tokenizer.output_end and inside == "output":
            if messages and messages[-1]["role"] == "assistant" and not content:
                messages.append({"role": "tool", "content": tokenizer.decode(block)})
            inside, block = "text", []
        elif token < tokenizer.bos:
            block.append(token)
    text = content + (tokenizer.decode(block) if inside == "text" else "")
    if text or not messages or messages[-1]["role"] == "tool":
        messages.append({"role": "assistant", "content": text})
    return messages


def stream_text(ids: Iterable[int], tokenizer: Tokenizer, show_tools: bool = False) -> Iterator[str]:
    """The text of a completion as it comes: whole characters only, no special tokens, up to assistant_end.

    Tool calls and their outputs are left out, or shown as GSM8K writes them: `<<7*7=49>>`.
    """
    marks = {tokenizer.python_start: "<<", tokenizer.python_end: "=", tokenizer.output_end: ">>"} if show_tools else {}
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    hidden = False
    for token in ids:
        if token == tokenizer.assistant_end:
            break
        if token >= tokenizer.bos:
            text = decoder.decode(b"", final=True) + marks.get(token, "")
            hidden = not show_tools and token in (tokenizer.python_start, tokenizer.output_start)
        else:
            text = "" if hidden else decoder.decode(tokenizer.decode_bytes([token]))
        if text:
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


def cut_to_context(messages: Sequence[Message], tokenizer: Tokenizer, max_tokens: int) -> list[Message]:
    """Return the messages without their oldest turns, so that the prompt has at most max_tokens tokens.

    The whole list is checked; a system message and the last user turn stay. ValueError if these alone are too long.
    Turns are counted once, from the newest, until they are too many, so a long history takes no more than its check.
    """
    messages = check_messages(messages)
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
