"""Challenge 6: synthetic identity data, asked from any OpenAI-compatible endpoint.

1. Each request has the persona as system prompt, one starter prompt, a JSON schema and a seed of its own.
2. Requests run concurrently; answers are taken in order of number, so the file does not depend on who was quicker.
3. An answer that is no valid conversation, holds a held-out question or repeats another is asked for again.
4. A conversation is appended, one line, as soon as its turn comes; a rerun asks for the missing numbers only.
"""

import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from edu.synthetic.llm_client import ADVICE, Endpoint, Reply
from edu.synthetic.persona import (
    IdentityQuestion,
    Persona,
    Starter,
    find_overlap,
    load_identity_eval,
    load_persona,
    load_starters,
    normalise,
)

T = TypeVar("T")
MAX_EXCHANGES, MAX_MESSAGE, MAX_CONVERSATION = 4, 300, 800  # the last two in characters: 800 are about 250 tiny tokens


@dataclass(frozen=True)
class IdentityConfig:
    """Settings of scripts/make_identity.py."""

    num: int = 400
    """Number of conversations."""
    out: Path = Path("data/my_identity.jsonl")
    """The file to write, or to continue."""
    persona: Path = Path("data/persona.yaml")
    """File of the persona: the model's name, maker and manner."""
    starters: Path = Path("data/starter_prompts.yaml")
    """File of starter prompts, with which conversations begin."""
    held_out: Path = Path("data/identity_eval.yaml")
    """Questions kept for measuring: a conversation that holds one is refused."""
    teacher: str = "embedded"
    """Writer of the conversations: embedded; openai (at OPENAI_BASE_URL, if set); or an endpoint's URL. The key is in OPENAI_API_KEY."""
    model: str = ""
    """The endpoint's model; may be left out where the endpoint has only one."""
    concurrency: int = 8
    """Requests under way at once."""
    seed: int = 0
    """Another seed asks for other conversations."""
    attempts: int = 3
    """Attempts at a conversation, until its answer is valid and new."""
    price_in: float = 0.0
    """Dollars per million tokens sent, to show the cost."""
    price_out: float = 0.0
    """Dollars per million tokens received."""

    def __post_init__(self) -> None:
        for flag in ("num", "concurrency", "attempts"):
            if getattr(self, flag) < 1:
                raise ValueError(f"--{flag} {getattr(self, flag)}: must be at least 1")


@dataclass(frozen=True)
class Job:
    """One conversation to ask for; the same number, seed and persona are the same job in any run."""

    number: int
    starter: Starter
    system: str
    user: str
    seed: int

    @property
    def mark(self) -> str:
        """A fingerprint of the request, kept with the answer: resuming under another persona or seed is refused."""
        return f"{zlib.crc32(f'{self.system}{self.user}{self.seed}'.encode()):08x}"


@dataclass
class Summary:
    """Counts of a run: conversations found in the file, made, replies refused (malformed, invalid, repeated), numbers given up."""

    model: str
    found: int = 0
    made: int = 0
    refused: int = 0
    given_up: list[int] = field(default_factory=list)
    tokens_in: int = 0
    tokens_out: int = 0
    last_problem: str = ""


def system_prompt(persona: Persona) -> str:
    """The persona, the sentences that it answers with, and the form of the reply, for any teacher."""
    answers = "\n".join(f"- {key}: {' / '.join(part.answers)}" for key, part in persona.intents.items())
    return (
        f"You write short conversations from which a very small model learns to be {persona.name}.\n"
        + "\n".join(f"- {fact}" for fact in persona.facts)
        + f"\n{persona.name} is {', '.join(persona.traits)}.\n"
        f"The user asks in many different wordings. {persona.name} answers with one of these sentences, by intent:\n{answers}\n"
        f"Before it may stand one of: {' / '.join(sum(persona.leads.values(), ()))}\nAfter it: {' / '.join(persona.more)}\n"
        'Reply with JSON only: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], '
        '"intents": ["name"]}. Users and assistant take turns, the assistant is last; one intent an exchange.'
    )


def user_prompt(number: int, starter: Starter) -> str:
    """One request to the teacher."""
    return (
        f"Conversation {number}: one to three exchanges in short and simple words, most often about the name or the maker. "
        f"The tone of the user is {starter.tone}, the topic {starter.topic}; the user may begin with {json.dumps(starter.text)}"
    )


def reply_schema(persona: Persona) -> dict[str, Any]:
    """The JSON schema of a reply, strict as OpenAI defines it: every key required, no other key."""

    def record(**properties: Any) -> dict[str, Any]:
        return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}

    message = record(role={"type": "string", "enum": ["user", "assistant"]}, content={"type": "string"})
    intents = {"type": "array", "items": {"type": "string", "enum": list(persona.intents)}}
    return record(messages={"type": "array", "items": message}, intents=intents)


def read_reply(text: str, persona: Persona, held_out: list[IdentityQuestion]) -> dict[str, Any]:
    """The conversation in a reply (code fences around the JSON are forgiven); ValueError says what is wrong with it."""
    try:
        reply = json.loads(text[text.find("{") : text.rfind("}") + 1])
        messages = [{"role": str(m["role"]), "content": m["content"].strip()} for m in reply["messages"]]
        intents = [str(intent) for intent in reply["intents"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not the JSON asked for ({type(error).__name__}: {error}): {text[:80]!r}") from None
    roles = [message["role"] for message in messages]
    contents = [message["content"] for message in messages]
    if roles != ["user", "assistant"] * len(intents) or not 1 <= len(intents) <= MAX_EXCHANGES:
        raise ValueError(f"roles {roles} for {len(intents)} intents: they must take turns, one intent an exchange")
    if not all(normalise(text) for text in contents) or max(map(len, contents)) > MAX_MESSAGE:
        raise ValueError(f"a message is empty or over {MAX_MESSAGE} characters")
    if sum(map(len, contents)) > MAX_CONVERSATION or any("<|" in text for text in contents):
        raise ValueError(f"over {MAX_CONVERSATION} characters, or a special token in a text")
    for intent, answer in zip(intents, contents[1::2], strict=True):
        if intent not in persona.intents:
            raise ValueError(f"unknown intent {intent!r}")
        lacking = [words for words in persona.intents[intent].must_say if words.lower() not in answer.lower()]
        if lacking:
            raise ValueError(f"an answer about {intent} without {lacking[0]!r}: {answer[:80]!r}")
    if overlap := find_overlap(held_out, contents):
        raise ValueError(f"holds the held-out question {overlap[0]!r}")
    return {"messages": messages, "intents": intents}


def plan(config: IdentityConfig, persona: Persona, starters: list[Starter]) -> list[Job]:
    """The jobs of a run, in order: the starters in turn, each job with a seed of its own."""
    system = system_prompt(persona)
    return [
        Job(number, starter, system, user_prompt(number, starter), zlib.crc32(f"{config.seed} {number}".encode()))
        for number in range(config.num)
        for starter in [starters[number % len(starters)]]
    ]


def read_made(path: Path, jobs: list[Job]) -> dict[int, str]:
    """Read what a file already holds: number -> normalized text. A last line that was cut off is removed from the file.

    Raises ValueError naming file and row on a broken line elsewhere, or one made under another persona or seed.
    """
    made: dict[int, str] = {}
    marks = {job.number: job.mark for job in jobs}
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        os.truncate(path, sum(map(len, lines[:-1])))
        lines.pop()
    for row, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            number, mark, text = record["id"], record["request"], text_of(record)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, row {row}: not a line of this script ({error!r}); choose another --out"
            ) from None
        if marks.get(number, mark) != mark:
            raise ValueError(
                f"{path}, row {row}: made under another persona, starters or --seed; remove it or choose another --out"
            )
        made[number] = text
    return made


def text_of(conversation: dict[str, Any]) -> str:
    """A conversation's words, by which repetitions are known."""
    return " / ".join(normalise(message["content"]) for message in conversation["messages"])


def make_identity(config: IdentityConfig, base_url: str = "", api_key: str = "", max_retries: int = 3) -> Summary:
    """Ask for the conversations that `config.out` lacks and append them, in order of number.

    Raises ValueError or OSError with what to do when the endpoint cannot be used; what was written before stays.
    """
    persona = load_persona(config.persona)
    held_out = load_identity_eval(config.held_out, persona)
    jobs = plan(config, persona, load_starters(config.starters, persona))
    made = read_made(config.out, jobs)
    missing = [job for job in jobs if job.number not in made]
    summary = Summary(config.model, found=len(jobs) - len(missing))
    if missing:
        with closing(Endpoint(base_url, api_key, config.model, max_retries)) as endpoint:
            summary.model = endpoint.choose_model()
            _Run(config, persona, held_out, endpoint, set(made.values()), summary).write(missing)
    return summary


@dataclass
class _Run:
    """The requests of one run, and what they share."""

    config: IdentityConfig
    persona: Persona
    held_out: list[IdentityQuestion]
    endpoint: Endpoint
    seen: set[str]
    summary: Summary

    def write(self, jobs: list[Job]) -> None:
        """Ask concurrently, take the replies in order, append each conversation as one line."""
        self.config.out.parent.mkdir(parents=True, exist_ok=True)
        pool = ThreadPoolExecutor(self.config.concurrency)
        try:
            for job, reply in bar(zip(jobs, pool.map(self.ask, jobs), strict=True), len(jobs)):
                if conversation := self.accept(job, reply):
                    line = conversation | {"id": job.number, "starter": job.starter.text, "request": job.mark}
                    append_line(self.config.out, json.dumps(line, ensure_ascii=False))
                    self.summary.made += 1
        finally:
            pool.shutdown(cancel_futures=True)

    def ask(self, job: Job, attempt: int = 0) -> Reply:
        seed = zlib.crc32(f"{job.seed} {attempt}".encode())
        return self.endpoint.ask(job.system, job.user, seed, reply_schema(self.persona))

    def accept(self, job: Job, reply: Reply) -> dict[str, Any] | None:
        """The first valid and new conversation of the job's attempts, or None when all failed.

        Raises ValueError when no reply of a whole first round was of use: then the endpoint or model is the wrong one.
        """
        summary = self.summary
        for attempt in range(1, self.config.attempts + 1):
            summary.tokens_in += reply.tokens_in
            summary.tokens_out += reply.tokens_out
            try:
                conversation = read_reply(reply.text, self.persona, self.held_out)
                text = text_of(conversation)
                if text in self.seen:
                    raise ValueError("the same conversation again")
                self.seen.add(text)
                return conversation
            except ValueError as error:
                summary.refused += 1
                summary.last_problem = str(error)
            if attempt < self.config.attempts:
                reply = self.ask(job, attempt)
        summary.given_up.append(job.number)
        if not self.seen and len(summary.given_up) == min(8, self.config.num):
            where = f"in {summary.refused} from {self.endpoint.model} at {self.endpoint.url}"
            raise ValueError(f"no usable reply {where}; the last: {summary.last_problem}. {ADVICE}")
        return None


def append_line(path: Path, line: str) -> None:
    """Add a line; OSError naming the file when the disk is full: `read_made` removes what was half written."""
    try:
        with path.open("ab") as file:
            file.write(line.encode() + b"\n")
    except OSError as error:
        raise OSError(f"{path}: {error.strerror}; the lines before are kept, rerun the command to continue") from None


def bar(items: Iterable[T], total: int) -> Iterator[T]:
    """The items, with a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return iter(track(items, "conversations", total, console=console, disable=not sys.stderr.isatty()))
