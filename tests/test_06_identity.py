"""Challenge 6: identity data from any endpoint, the embedded teacher, the persona's held-out questions and its grades."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse

from edu.serving.server import TeacherResponder, make_app, run_in_thread
from edu.synthetic.identity import IdentityConfig, find_overlap, make_identity, normalise, read_reply
from edu.synthetic.persona import (
    Persona,
    expansions,
    grade,
    load_identity_eval,
    load_persona,
    load_starters,
    neutral_sentences,
)
from edu.synthetic.teacher import Teacher

DATA = Path(__file__).parent.parent / "data"
PERSONA = load_persona(DATA / "persona.yaml")
STARTERS = load_starters(DATA / "starter_prompts.yaml", PERSONA)
HELD_OUT = load_identity_eval(DATA / "identity_eval.yaml", PERSONA)
TEACHER = Teacher(PERSONA, STARTERS)


@pytest.fixture(scope="module")
def teacher_url() -> Iterator[str]:
    with run_in_thread(make_app(TeacherResponder(TEACHER))) as url:
        yield url


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DATA.parent)


def config(folder: Path, **changes: Any) -> IdentityConfig:
    return IdentityConfig(**{"out": folder / "identity.jsonl", "num": 12} | changes)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextmanager
def endpoint(*replies: str, status: int = 200) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An endpoint that says each of the replies in turn, then the last for ever; gives its URL and the bodies it got."""
    app, bodies = FastAPI(), []

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> JSONResponse:
        bodies.append(await request.json())
        if status != 200:
            return JSONResponse({"error": {"message": "the lab is closed"}}, status)
        text = replies[min(len(bodies), len(replies)) - 1]
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        head = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
        return JSONResponse(head | {"choices": [choice], "usage": usage})

    with run_in_thread(app) as url:
        yield url, bodies


def reply_of(seed: int) -> str:
    return json.dumps(TEACHER.compose(STARTERS[seed % len(STARTERS)], Random(seed)))


# The hand-written parts


def test_the_persona_has_enough_wordings() -> None:
    counts = {key: len({normalise(text) for text in part.questions}) for key, part in PERSONA.intents.items()}
    assert counts["name"] >= 40
    assert counts["maker"] >= 40
    assert min(counts.values()) >= 20
    assert len(STARTERS) >= 60


def test_every_answer_holds_what_its_intent_must_say_and_the_name() -> None:
    for part in PERSONA.intents.values():
        for answer in part.answers:
            assert all(words.lower() in answer.lower() for words in (*part.must_say, PERSONA.name)), answer


def test_there_are_enough_held_out_questions() -> None:
    intents = [question.intent for question in HELD_OUT]
    assert len({normalise(question.question) for question in HELD_OUT}) == len(HELD_OUT) >= 160
    assert min(intents.count("name"), intents.count("maker")) >= 50


def test_no_held_out_wording_is_in_the_hand_written_data() -> None:
    parts = PERSONA.intents.values()
    texts = [text for part in parts for text in (*part.questions, *part.answers)]
    texts += [*PERSONA.facts, *PERSONA.more, *neutral_sentences(PERSONA), *(starter.text for starter in STARTERS)]
    assert find_overlap(HELD_OUT, texts) == []


def test_an_overlap_is_found_inside_a_text_and_across_punctuation() -> None:
    question = HELD_OUT[0].question
    assert find_overlap(HELD_OUT, [f"So, I ask... {question.upper()} Hm?"]) == [question]
    assert find_overlap(HELD_OUT, [question[:-2]]) == []


def test_held_out_questions_use_words_of_the_training_questions() -> None:
    known = {word for part in PERSONA.intents.values() for text in part.questions for word in normalise(text).split()}
    words = {word for question in HELD_OUT for word in normalise(question.question).split()}
    assert words <= known, words - known


def test_choices_multiply() -> None:
    assert expansions("[a|b|] {name} [c|d]", {"name": "x"}) == ["a x c", "a x d", "b x c", "b x d", "x c", "x d"]


def test_a_broken_persona_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "persona.yaml"
    text = (DATA / "persona.yaml").read_text()
    for broken, message in (
        ("name: [", "not YAML"),
        ("name: Pico", "no 'maker'"),
        (text.replace("{name} is perfect", "{nmae}").replace("Is {name} perfect?", "Is {nmae} perfect?"), "no 'nmae'"),
        (text.replace("{name} is tiny and can be wrong.", "{name} says hello!"), "stands under"),
    ):
        path.write_text(broken)
        with pytest.raises(ValueError, match=message) as caught:
            load_persona(path)
        assert str(path) in str(caught.value)


# Grading


@pytest.mark.parametrize("intent", [key for key in PERSONA.intents if key != "more"])
def test_an_answer_is_right_for_its_own_intent_alone(intent: str) -> None:
    for answer in PERSONA.intents[intent].answers:
        for asked in PERSONA.intents:
            graded = grade(answer, asked, PERSONA)
            assert graded.names_itself
            assert graded.well_formed
            assert graded.right_intent == (asked == intent), (answer, asked)


@pytest.mark.parametrize(
    ("answer", "intent", "names_itself", "well_formed", "right_intent"),
    [
        ("Hello! My name is Pico. How can I help you?", "name", True, True, True),
        ("My name is Pico. The Tiny Lab made Pico.", "maker", True, True, True),
        ("The Tiny Lab made Pico. My name is Pico.", "name", True, True, False),
        ("The Tiny Lab made Pico. Pico likes short words.", "maker", True, True, False),
        ("I am Pico, a tiny chat12/12/7", "name", True, False, False),
        ("I am Pico, a tiny chat12/12/7 = 12/71.", "what", True, False, False),
        ("I am Pico, and the Tiny Lab made me", "maker", True, False, False),
        ("I am Pico and the the Tiny Lab.", "maker", True, False, False),
        ("Pico Pico Pico the Tiny Lab made me.", "maker", True, False, False),
        ("My name is Pico. My name is Pico.", "name", True, False, True),
        ("my name is pico.", "name", False, False, False),
        ("My name is not Pico.", "name", True, False, False),
        ("Pico did not make the Tiny Lab.", "maker", True, False, False),
        ("I am Picolo.", "name", False, False, False),
        ("It is nice to meet you.", "name", False, True, False),
        ("The sky is blue.", "name", False, False, False),
        ("...", "name", False, False, False),
        ("", "name", False, False, False),
    ],
)
def test_garbled_and_misplaced_answers_fail_the_count_they_should(
    answer: str, intent: str, names_itself: bool, well_formed: bool, right_intent: bool
) -> None:
    graded = grade(answer, intent, PERSONA)
    assert (graded.names_itself, graded.well_formed, graded.right_intent) == (names_itself, well_formed, right_intent)


def test_no_constant_answer_is_right_on_names_and_makers() -> None:
    for part in PERSONA.intents.values():
        for answer in part.answers:
            assert not (grade(answer, "name", PERSONA).right_intent and grade(answer, "maker", PERSONA).right_intent)


# The embedded teacher, end to end


def test_three_hundred_distinct_conversations_over_all_starters(teacher_url: str, tmp_path: Path) -> None:
    summary = make_identity(config(tmp_path, num=330), teacher_url)
    made = rows(tmp_path / "identity.jsonl")
    texts = {json.dumps(row["messages"]) for row in made}
    assert summary.made == len(made) == len(texts) >= 300
    begun = {starter.text for starter in STARTERS for row in made if starter.text in row["messages"][0]["content"]}
    assert len({row["starter"] for row in made}) >= 60
    assert len(begun) >= 60
    assert {len(row["messages"]) for row in made} == {2, 4, 6}
    assert {intent for row in made for intent in row["intents"]} == set(PERSONA.intents)
    assert find_overlap(HELD_OUT, [m["content"] for row in made for m in row["messages"]]) == []
    for row in made:
        for intent, answer in zip(row["intents"], row["messages"][1::2], strict=True):
            graded = grade(answer["content"], intent, PERSONA)
            assert graded.names_itself
            assert graded.well_formed
            assert graded.right_intent, answer


def test_the_same_seed_gives_the_same_file_for_any_concurrency(teacher_url: str, tmp_path: Path) -> None:
    for name, concurrency, seed in (("a", 1, 0), ("b", 8, 0), ("c", 8, 1)):
        make_identity(config(tmp_path, out=tmp_path / name, num=24, concurrency=concurrency, seed=seed), teacher_url)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_an_interrupted_file_is_completed_to_the_same_bytes(teacher_url: str, tmp_path: Path) -> None:
    make_identity(config(tmp_path), teacher_url)
    out = tmp_path / "identity.jsonl"
    whole = out.read_bytes()
    for cut in (len(whole) // 2, len(whole) - 1, 0):  # within a line, only the line's end missing, nothing
        out.write_bytes(whole[:cut])
        summary = make_identity(config(tmp_path), teacher_url)
        assert out.read_bytes() == whole
        assert summary.found + summary.made == 12
    make_identity(config(tmp_path, num=20), teacher_url)
    assert out.read_bytes().startswith(whole)
    assert len(rows(out)) == 20


def test_a_finished_file_needs_no_endpoint(teacher_url: str, tmp_path: Path) -> None:
    make_identity(config(tmp_path), teacher_url)
    summary = make_identity(config(tmp_path), "http://127.0.0.1:9/v1")
    assert (summary.found, summary.made) == (12, 0)


def test_a_file_of_another_seed_or_of_no_json_is_refused_untouched(teacher_url: str, tmp_path: Path) -> None:
    make_identity(config(tmp_path), teacher_url)
    out = tmp_path / "identity.jsonl"
    before = out.read_bytes()
    with pytest.raises(ValueError, match="row 1: made under another"):
        make_identity(config(tmp_path, seed=5), teacher_url)
    assert out.read_bytes() == before
    out.write_bytes(b"{}\n" + before)
    with pytest.raises(ValueError, match="row 1: not a line"):
        make_identity(config(tmp_path), teacher_url)


def test_the_teacher_refuses_a_request_that_is_not_for_it() -> None:
    with pytest.raises(ValueError, match="only writes conversations"):
        TEACHER.write([{"role": "user", "content": "Write a poem."}], 0)


# Endpoints that misbehave


def test_malformed_replies_are_counted_and_asked_for_again(tmp_path: Path) -> None:
    with endpoint("Sure! Here you are:", '{"messages": 5}', "```json\n" + reply_of(3) + "\n```") as (url, bodies):
        summary = make_identity(config(tmp_path, num=1, model="m"), url)
    assert (summary.made, summary.refused, summary.tokens_in, summary.tokens_out) == (1, 2, 300, 30)
    assert len({body["seed"] for body in bodies}) == 3
    assert bodies[0]["response_format"]["json_schema"]["strict"] is True
    assert PERSONA.maker in bodies[0]["messages"][0]["content"]


def test_repeated_replies_are_given_up_and_what_was_made_is_kept(tmp_path: Path) -> None:
    with endpoint(reply_of(3)) as (url, _):
        summary = make_identity(config(tmp_path, num=3, model="m"), url)
    assert (summary.made, summary.given_up, summary.refused) == (1, [1, 2], 6)
    assert "again" in summary.last_problem
    assert len(rows(tmp_path / "identity.jsonl")) == 1


def test_an_endpoint_that_only_gives_rubbish_is_an_error(tmp_path: Path) -> None:
    with (
        endpoint("I cannot do that.") as (url, _),
        pytest.raises(ValueError, match=r"no usable reply.*OPENAI_BASE_URL"),
    ):
        make_identity(config(tmp_path, model="m"), url)


def test_an_endpoint_without_structured_output_is_asked_without(tmp_path: Path) -> None:
    class Plain(TeacherResponder):
        structured = False

    with run_in_thread(make_app(Plain(TEACHER))) as url:
        assert make_identity(config(tmp_path), url).made == 12


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (401, ValueError, "OPENAI_API_KEY"),
        (404, ValueError, "--model"),
        (400, ValueError, "closed"),
        (500, OSError, "Rerun"),
    ],
)
def test_a_refusing_endpoint_is_one_clear_error(tmp_path: Path, status: int, error: type, words: str) -> None:
    with endpoint("", status=status) as (url, _), pytest.raises(error, match=words) as caught:
        make_identity(config(tmp_path, model="m"), url, max_retries=0)
    assert "OPENAI_BASE_URL" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unreachable_endpoint_loses_nothing(teacher_url: str, tmp_path: Path) -> None:
    make_identity(config(tmp_path), teacher_url)
    before = (tmp_path / "identity.jsonl").read_bytes()
    with pytest.raises(OSError, match="OPENAI_BASE_URL"):
        make_identity(config(tmp_path, num=20), "http://127.0.0.1:9/v1", max_retries=0)
    assert (tmp_path / "identity.jsonl").read_bytes() == before


def test_a_full_disk_names_the_file_and_a_rerun_completes_it(teacher_url: str, tmp_path: Path) -> None:
    make_identity(config(tmp_path, out=tmp_path / "whole"), teacher_url)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"identity\.jsonl: .*rerun"):
            make_identity(config(tmp_path), teacher_url)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "identity.jsonl").stat().st_size == 2000
    make_identity(config(tmp_path), teacher_url)
    assert (tmp_path / "identity.jsonl").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_web_page_is_no_endpoint(tmp_path: Path) -> None:
    app = FastAPI()

    @app.post("/chat/completions")
    def page() -> HTMLResponse:
        return HTMLResponse("<html>Welcome</html>")

    with run_in_thread(app) as url, pytest.raises(ValueError, match="does not speak"):
        make_identity(config(tmp_path, model="m"), url.removesuffix("/v1"))


def test_several_models_must_be_chosen_from(tmp_path: Path) -> None:
    app = FastAPI()

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"data": [{"id": name, "object": "model", "created": 0, "owned_by": "x"} for name in ("a", "b")]}

    with run_in_thread(app) as url, pytest.raises(ValueError, match="--model"):
        make_identity(config(tmp_path), url)


def conversation(**changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Pico."}]
    return {"messages": messages, "intents": ["name"]} | changes


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"messages": conversation()["messages"][::-1]}, "take turns"),
        ({"messages": conversation()["messages"][:1]}, "take turns"),
        ({"intents": ["name", "maker"]}, "take turns"),
        ({"messages": [], "intents": []}, "take turns"),
        ({"intents": ["weather"]}, "unknown intent"),
        ({"intents": ["maker"]}, "without 'the Tiny Lab'"),
        ({"messages": [conversation()["messages"][0], {"role": "assistant", "content": " ! "}]}, "empty"),
        (
            {"messages": [conversation()["messages"][0], {"role": "assistant", "content": "Pico " * 80}]},
            "300 characters",
        ),
        ({"messages": [{"role": "user", "content": "<|bos|> Who?"}, conversation()["messages"][1]]}, "special token"),
        ({"messages": [{"role": "user", "content": HELD_OUT[0].question}, conversation()["messages"][1]]}, "held-out"),
        ({"messages": [{"role": "user", "content": 5}, conversation()["messages"][1]]}, "JSON asked for"),
    ],
)
def test_an_invalid_conversation_is_refused_with_its_problem(changes: dict[str, Any], problem: str) -> None:
    persona: Persona = PERSONA
    assert read_reply(json.dumps(conversation()), persona, HELD_OUT)["intents"] == ["name"]
    with pytest.raises(ValueError, match=problem):
        read_reply(json.dumps(conversation(**changes)), persona, HELD_OUT)
