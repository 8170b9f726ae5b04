"""Challenge 6: write conversations in which the model learns who it is. Takes seconds with the embedded teacher.

Example: python scripts/make_identity.py --num 400 --out data/my_identity.jsonl

--teacher URL --model NAME asks an endpoint of the OpenAI protocol instead. A rerun continues an unfinished file.
"""

import os

from edu.config.cli import parse, run_script
from edu.config.terminal import printable
from edu.synthetic.identity import IdentityConfig, Summary, make_identity


def main() -> None:
    config = parse(IdentityConfig)
    if config.teacher == "embedded":
        report(config, ask_embedded_teacher(config))
        return
    if config.teacher != "openai" and not config.teacher.startswith(("http://", "https://")):
        raise ValueError(
            f"--teacher {config.teacher}: choose embedded, openai, or an endpoint's URL such as http://host/v1"
        )
    url = os.environ.get("OPENAI_BASE_URL", "") if config.teacher == "openai" else config.teacher
    report(config, make_identity(config, url, os.environ.get("OPENAI_API_KEY", "")))


def ask_embedded_teacher(config: IdentityConfig) -> Summary:
    """Start the embedded teacher's server on this machine and talk to it as to any other."""
    from edu.serving.server import TeacherResponder, make_app, run_in_thread
    from edu.synthetic.persona import load_persona, load_starters
    from edu.synthetic.teacher import Teacher

    if config.model:
        raise ValueError(f"--model {config.model}: name its endpoint with --teacher, or leave the flag out")
    persona = load_persona(config.persona)
    teacher = Teacher(persona, load_starters(config.starters, persona))
    with run_in_thread(make_app(TeacherResponder(teacher))) as base_url:
        return make_identity(config, base_url)


def report(config: IdentityConfig, summary: Summary) -> None:
    cost = (summary.tokens_in * config.price_in + summary.tokens_out * config.price_out) / 1e6
    print(
        f"{config.out}: {summary.found + summary.made} conversations ({summary.found} were there, {summary.made} new)"
    )
    if summary.made or summary.refused:
        print(f"from {summary.model}: {summary.tokens_in:,} tokens sent, {summary.tokens_out:,} received, ${cost:.2f}")
        print(f"{summary.refused} replies refused and asked for again, {len(summary.given_up)} given up")
    if summary.given_up:
        print(
            f"the last problem: {printable(summary.last_problem)}; run the same command to ask for the missing ones again"
        )


if __name__ == "__main__":
    run_script(main)
