"""Serve a checkpoint by the OpenAI protocol. Example: python scripts/serve.py --model runs/tiny/rl --port 8000"""

from dataclasses import dataclass

from edu.config.cli import parse, run_script


@dataclass(frozen=True)
class Args:
    model: str = "runs/tiny/rl"
    """The checkpoint's folder."""
    host: str = "127.0.0.1"
    """The address to listen on; 0.0.0.0 lets other machines in."""
    port: int = 8000
    """The port to listen on."""


def main() -> None:
    args = parse(Args)
    from edu.serving.server import listen, load_responder, make_app, run_forever

    responder = load_responder(args.model)
    listener = listen(args.host, args.port)
    url = f"http://{args.host}:{listener.getsockname()[1]}/v1"
    body = f'{{"model": "{responder.name}", "messages": [{{"role": "user", "content": "Who are you?"}}]}}'
    print(f"model {responder.name} at {url}; Ctrl-C ends. Try:")
    print(f"curl {url}/chat/completions -H 'Content-Type: application/json' -d '{body}'", flush=True)
    run_forever(make_app(responder), listener)


if __name__ == "__main__":
    run_script(main)
