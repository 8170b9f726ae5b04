"""A chat request and its reply as the OpenAI protocol has them: the part that takes effect here, checked by pydantic."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from secrets import randbits
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

# Fields that change nothing in the reply's text: accepted and passed over. Any other unknown field that is set is an error.
HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}


class TextPart(BaseModel):
    """One part of a message given as a list."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message as the protocol has it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[dict[str, Any]] | None = None

    def plain(self) -> dict[str, Any]:
        """The message as edu.chat.chat_format wants it: content one string, the arguments of a call an object."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.tool_calls:
            message["tool_calls"] = [self._plain_call(call) for call in self.tool_calls]
        return message

    @staticmethod
    def _plain_call(call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function", {})
        arguments = function.get("arguments", {})
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        return {"type": "function", "function": {"name": function.get("name"), "arguments": arguments}}


class ChatRequest(BaseModel):
    """The body of a chat request: the fields that take effect here, with the protocol's bounds."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: Literal[1] | None = None
    response_format: dict[str, Any] | None = None

    @property
    def stops(self) -> list[str]:
        """The texts at which the reply is cut."""
        return [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if text]

    @property
    def drawn_seed(self) -> int:
        """The seed asked for (within 63 bits, not negative), or one by chance."""
        return randbits(31) if self.seed is None else self.seed % 2**63

    def check(self, structured: bool) -> None:
        """ValueError on what is asked for and cannot be given."""
        unknown = sorted(key for key, value in (self.model_extra or {}).items() if value and key not in HARMLESS)
        if unknown:
            raise ValueError(f"not supported here: {', '.join(unknown)}")
        if self.response_format and self.response_format.get("type") != "text" and not structured:
            raise ValueError("not supported here: response_format other than text; ask in words, and check the reply")


@dataclass
class Reply:
    """A reply under way: the text in pieces; the counts and the reason are final when these are used up."""

    pieces: Iterator[str]
    prompt_tokens: int
    completion_tokens: int = 0
    finish_reason: Literal["stop", "length"] = "stop"


class Responder(Protocol):
    """Whatever can answer a chat request. One reply at a time is drawn from it."""

    name: str
    structured: bool
    """Whether it can keep to a JSON schema."""

    def respond(self, request: ChatRequest) -> Reply:
        """Begin a reply; ValueError when the request cannot be answered."""
        ...
