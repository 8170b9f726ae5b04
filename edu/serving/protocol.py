"""Chat requests and replies of the OpenAI protocol: the part that takes effect here, checked by pydantic."""

from collections.abc import Iterator
from dataclasses import dataclass
from secrets import randbits
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, Json, StringConstraints

MAX_STOPS, MAX_STOP_LENGTH = 4, 256
Stop = Annotated[str, StringConstraints(max_length=MAX_STOP_LENGTH)]
GREEDY = 1e-5
"""A temperature or top_p below this is greedy decoding."""

# Fields that change nothing in the reply's text: accepted and passed over.
HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Values of other fields that ask for nothing, as a field that is null, false, zero or empty. All else is an error.
NEUTRAL = {"tool_choice": ("none", "auto"), "parallel_tool_calls": (True,), "modalities": (["text"],)}


class TextPart(BaseModel):
    """Part of a message given as a list."""

    type: Literal["text"]
    text: str


class Function(BaseModel):
    """Name and arguments of a tool call; the arguments are an object, or its JSON."""

    name: str
    arguments: dict[str, Any] | Json[dict[str, Any]]


class ToolCall(BaseModel):
    """Call of the calculator in an earlier message of the assistant."""

    type: Literal["function"] = "function"
    function: Function


class ChatMessage(BaseModel):
    """Message of the conversation so far."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None


class ChatRequest(BaseModel):
    """Body of a chat request: the fields that take effect here, with the protocol's bounds.

    Lists are checked up to their first error (fail_fast): a wrong body of any size is refused quickly, in few words.
    """

    model_config = ConfigDict(extra="allow")

    model: str = Field(max_length=256)
    messages: Annotated[list[ChatMessage], Field(fail_fast=True)] = Field(min_length=1)
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: Literal[1] | None = None
    response_format: dict[str, Any] | None = None

    def conversation(self) -> list[dict[str, Any]]:
        """Return the messages in the form that training reads; ValueError names one that is out of order."""
        from edu.chat.chat_format import check_messages

        return check_messages([message.model_dump() for message in self.messages])

    @property
    def stops(self) -> list[str]:
        """Texts at which the reply is cut."""
        return [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if text]

    @property
    def distribution(self) -> tuple[float, float | None]:
        """Temperature and top_p: 1 unless given, and 0 (greedy decoding) where either is too small to differ from it."""
        if any(value is not None and value < GREEDY for value in (self.temperature, self.top_p)):
            return 0.0, None
        return 1.0 if self.temperature is None else self.temperature, self.top_p

    @property
    def drawn_seed(self) -> int:
        """Seed asked for, as a number of 63 bits, or a random one."""
        return randbits(31) if self.seed is None else self.seed % 2**63

    def check(self, structured: bool) -> None:
        """Raise ValueError if something is asked for that cannot be given."""
        extra = {name: value for name, value in (self.model_extra or {}).items() if value and name not in HARMLESS}
        unknown = sorted(name for name, value in extra.items() if value not in NEUTRAL.get(name, ()))
        if unknown:
            raise ValueError(f"not supported here: {', '.join(unknown)}")
        if self.response_format and self.response_format.get("type") != "text" and not structured:
            raise ValueError("not supported here: response_format other than text; ask in words, and check the reply")


@dataclass
class Reply:
    """Reply under way: its text in pieces; the counts and the reason are final when these are used up."""

    pieces: Iterator[str]
    prompt_tokens: int
    completion_tokens: int = 0
    finish_reason: Literal["stop", "length"] = "stop"


class Responder(Protocol):
    """Model or program that answers chat requests. One reply at a time is drawn from it."""

    name: str
    structured: bool
    """True if it can keep to a JSON schema."""

    def respond(self, request: ChatRequest) -> Reply:
        """Begin a reply; ValueError when the request cannot be answered."""
        ...
