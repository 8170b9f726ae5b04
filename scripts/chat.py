"""Talk to a checkpoint. Example: python scripts/chat.py --model runs/tiny/rl -p "What is your name?"

Without -p a conversation: /new begins another one, /system TEXT too, with that system message; /help, /quit.
"""

import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from edu.config.cli import parse, run_script
from edu.config.terminal import printable

if TYPE_CHECKING:
    from edu.data.tokenizer import Tokenizer
    from edu.inference.engine import Engine


@dataclass(frozen=True)
class Args:
    model: str = "runs/tiny/rl"
    """Folder or Hub id of a checkpoint."""
    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None
    """Say this, print the answer and leave; without it, a conversation."""
    system: str | None = None
    """A system message to begin with."""
    temperature: float = 0.7
    """0 is greedy."""
    top_k: int | None = 50
    """Sample among the k likeliest tokens."""
    seed: int | None = None
    """Of the sampling; another one each time unless it is given."""
    max_new_tokens: int = 128
    """The longest answer; the rest of the context is left to the history."""
    show_tools: bool = False
    """Show calls of the calculator, as <<7*7=49>>."""


HELP = """\
/new            begin a new conversation
/system TEXT    begin a new one with this system message (none: without)
/quit           leave, as quit, exit and Ctrl-D do"""


def answer(engine: "Engine", tokenizer: "Tokenizer", messages: list[Any], args: Args) -> list[dict[str, Any]]:
    """Print the assistant's turn as it is sampled; return it as messages. ValueError if the question is too long."""
    from edu.chat.chat_format import calculator_tool, cut_to_context, parse_completion, render_prompt, stream_text
    from edu.inference.params import SamplingParams

    context = engine.config.max_position_embeddings
    room = max(context - args.max_new_tokens, context // 2)
    prompt = render_prompt(cut_to_context(messages, tokenizer, room), tokenizer)
    tokens: list[int] = []

    def sampled() -> Iterator[int]:
        stream = engine.stream(
            prompt,
            SamplingParams(args.max_new_tokens, args.temperature, args.top_k, stop_tokens=[tokenizer.assistant_end]),
            seed=secrets.randbits(62) if args.seed is None else args.seed + len(messages),
            tool=calculator_tool(tokenizer),
        )
        for token in stream:
            tokens.append(token)
            yield token

    for text in stream_text(sampled(), tokenizer, args.show_tools):
        print(printable(text), end="", flush=True)
    print()
    return parse_completion(tokens, tokenizer)


def converse(engine: "Engine", tokenizer: "Tokenizer", messages: list[Any], args: Args) -> None:
    """Read, answer, repeat, until the end of input. An exchange that cannot be part of a conversation is forgotten."""
    from edu.chat.chat_format import check_messages

    with suppress(ImportError):  # line editing and history for input(); Windows' console has its own
        import_module("readline")
    print("Ask something. /help lists the commands.")
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            return
        command, _, text = said.partition(" ")
        match command:
            case "":
                continue
            case "/quit" | "quit" | "exit" if not text:
                return
            case "/new":
                messages = messages[:1] if messages and messages[0]["role"] == "system" else []
            case "/system":
                messages = [{"role": "system", "content": text}] if text else []
            case _ if command.startswith("/"):
                print(HELP)
            case _:
                asked = [*messages, {"role": "user", "content": said}]
                try:
                    messages = check_messages([*asked, *answer(engine, tokenizer, asked, args)])
                except ValueError as error:
                    print(f"(not kept: {printable(error)})")


def main() -> None:
    args = parse(Args)
    from edu.inference.engine import Engine
    from edu.model.load import load_model, load_tokenizer
    from edu.training.accelerator import autodetect_device_type

    tokenizer = load_tokenizer(args.model)
    engine = Engine(load_model(args.model, autodetect_device_type()).eval())
    messages = [{"role": "system", "content": args.system}] if args.system else []
    if args.prompt is None:
        converse(engine, tokenizer, messages, args)
    else:
        answer(engine, tokenizer, [*messages, {"role": "user", "content": args.prompt}], args)


if __name__ == "__main__":
    run_script(main)
