"""The small world in simple English: documents for pretraining and conversations for SFT, drawn from data/world.yaml.

The tables and templates are there; here is only how they are put together. Everything is a function of a random generator.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, islice
from random import Random
from typing import Any, NamedTuple

from edu.synthetic.world.problems import (
    LARGEST,
    ONE_STEP,
    THREE_STEPS,
    TWO_STEPS,
    WORDS,
    draw_problem,
    grammar,
    states_held_out,
)
from edu.synthetic.world.templates import Bound, Row, read_yaml


class Fact(NamedTuple):
    """One fact: an entry of the table `about`, and the wordings of its kind (`answer`, `key`, `say`, `ask`, `held_out`)."""

    wordings: dict[str, Any]
    row: Row

    def expand(self, template: str, rng: Random) -> str:
        return grammar().expand(template, rng, {self.wordings["about"]: self.row})

    def say(self, rng: Random) -> str:
        return self.expand(rng.choice(self.wordings["say"]), rng)

    def ask(self, rng: Random, wordings: str = "ask") -> str:
        return self.expand(rng.choice(self.wordings[wordings]), rng)

    def answer(self, rng: Random) -> str:
        return self.expand(self.wordings["answer"], rng)


@lru_cache
def world() -> dict[str, Any]:
    return read_yaml("world.yaml")


@lru_cache
def facts() -> list[Fact]:
    """All that is true in the small world."""
    return [Fact(wordings, row) for wordings in world()["facts"] for row in grammar().tables[wordings["about"]]]


# ---------------------------------------------------------------- documents: each function draws one


def story(rng: Random) -> str:
    """One or two chapters about the same hero, sometimes with questions about the last one."""
    plots = rng.sample(world()["stories"], 2 if rng.random() < 0.15 else 1)
    hero = rng.choice(grammar().tables["name"])
    text, bound = "", Bound()
    for chapter, plot in enumerate(plots):
        bound = {"name": hero}
        if chapter:
            bound["when"] = {"it": rng.choice(world()["next_chapter"])}
        text += " " * chapter + grammar().expand(plot["text"], rng, bound)
    if rng.random() < 0.3:
        question, answer = rng.choice(plots[-1]["qa"])
        text += f"\nQuestion: {grammar().expand(question, rng, bound)}\nAnswer: {grammar().expand(answer, rng, bound)}"
    return text


def list_of_facts(rng: Random) -> str:
    """Some statements: about one thing, of one kind, or of any kind."""
    fact = rng.choice(facts())
    related = [other for other in facts() if other.row is fact.row or other.wordings is fact.wordings]
    chosen = rng.sample(rng.choice([related, facts()]), rng.randint(2, 5))
    intro = grammar().expand(rng.choice(world()["fact_intro"]), rng)
    return f"{intro} {' '.join(fact.say(rng) for fact in chosen)}".strip()


def questions_and_answers(rng: Random) -> str:
    """Facts asked for and told: by two people, as an exercise, or as a story."""
    chosen = rng.sample(facts(), rng.choice([1, 2, 2, 3, 4]))
    pairs = [(fact.ask(rng), fact.answer(rng)) for fact in chosen]
    form = rng.random()
    if form < 0.25:
        return "\n".join(f"Question: {question}\nAnswer: {answer}" for question, answer in pairs)
    you, me = (row["it"] for row in rng.sample(grammar().tables["name"], 2))
    if form < 0.45:
        return " ".join(f'{you} asked {me}, "{question}" {me} said, "{answer}"' for question, answer in pairs[:2])
    return "\n".join(chain(*([f"{you}: {question}", f"{me}: {answer}"] for question, answer in pairs)))


def conversation(rng: Random) -> str:
    """Two people, or a person and a made thing, get to know each other: a question about a name gets a name, about a maker a maker."""
    talk, made = world()["talk"], rng.random() < 0.5
    bound: Bound = {"you": rng.choice(grammar().tables["name"])}
    bound["me"] = rng.choice(grammar().tables["robot"]) if made else grammar().draw("name", rng, {"name": bound["you"]})
    bound["name"] = bound["you"]

    def line(speaker: str, templates: Sequence[str]) -> str:
        return f"{bound[speaker]['it']}: {grammar().expand(rng.choice(templates), rng, bound)}"

    lines: list[str] = []
    if rng.random() < 0.4:
        lines.append(grammar().expand(rng.choice(talk["robot_scene" if made else "scene"]), rng, bound))
    if rng.random() < 0.3:
        lines += [line("you", talk["hello"]), line("me", talk["hello_back"])]
    fitting = [intent for intent in world()["intents"] if ("robot" if made else "person") in intent["who"]]
    for intent in rng.sample(fitting, rng.choice([1, 1, 2, 2, 3])):
        lines += [line("you", intent["ask"]), line("me", intent["reply"])]
    if rng.random() < 0.25:
        fact = rng.choice(facts())
        lines += [line("you", [fact.ask(rng)]), line("me", [fact.answer(rng)])]
    if rng.random() < 0.2:
        ask, reply = rng.choice([("thanks", "welcome"), ("bye", "bye_back")])
        lines += [line("you", talk[ask]), line("me", talk[reply])]
    return "\n".join(lines)


def talk_about(rng: Random) -> str:
    """Two people talk about somebody else or about a made thing."""
    made = rng.random() < 0.6
    you, friend, somebody = rng.sample(grammar().tables["name"], 3)
    bound: Bound = {"me": rng.choice(grammar().tables["robot"]) if made else somebody, "name": you, "you": you}
    intro = world()["talk"]["robot_scene" if made else "scene"]
    lines = [grammar().expand(rng.choice(intro), rng, bound)] if made and rng.random() < 0.7 else []
    for question, answer in rng.sample(world()["talk"]["about_robot" if made else "about_person"], rng.randint(1, 3)):
        lines.append(f"{you['it']}: {grammar().expand(question, rng, bound)}")
        lines.append(f"{friend['it']}: {grammar().expand(answer, rng, bound)}")
    return "\n".join(lines)


def word_problem(rng: Random) -> str:
    """A problem with its worked answer."""
    kinds = rng.choices([ONE_STEP, TWO_STEPS, THREE_STEPS], [70, 25, 5])[0]
    return draw_problem(rng.choice(kinds), rng).text


def drill(rng: Random) -> str:
    """Sums, differences, products and quotients as bare lines, in words, or one after the other."""
    form = rng.random()
    if form < 0.3:
        return draw_problem(rng.choice(TWO_STEPS + THREE_STEPS), rng).text.partition("\n")[2]
    operators = rng.sample(ONE_STEP, rng.choice([1, 1, 4]))
    sums = [_sum(rng.choice(operators), rng) for _ in range(rng.randint(3, 6))]
    if form < 0.65:
        return "\n".join(f"{a}{operator}{b} = {result}" for a, operator, b, result in sums)
    words = {operator: word for word, operator in WORDS.items()}
    if form < 0.85:
        return " ".join(f"{a} {words[operator]} {b} is {result}." for a, operator, b, result in sums[:4])
    you, me = (row["it"] for row in rng.sample(grammar().tables["name"], 2))
    asked = [(f"What is {a} {words[operator]} {b}?", f"It is {result}.") for a, operator, b, result in sums[:2]]
    return "\n".join(chain(*([f"{you}: {question}", f"{me}: {answer}"] for question, answer in asked)))


def _sum(operator: str, rng: Random) -> tuple[int, str, int, int]:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    if operator == "*":
        return a, operator, b, a * b
    if operator == "/":
        return a * b, operator, b, a
    a, b = rng.randint(1, 60), rng.randint(1, 20)
    return (a, operator, b, a + b) if operator == "+" else (a + b, operator, b, a)


def counting(rng: Random) -> str:
    """Numbers in order, what comes before and after, which is larger."""
    step = rng.choice([1, 1, 1, 2, 3, 5, 10])
    numbers = list(islice(range(rng.randint(0, 80), LARGEST + 1, step), rng.randint(5, 14)))
    form = rng.random()
    if form < 0.3:
        return f"Count up by {step}: {', '.join(map(str, numbers))}."
    if form < 0.5:
        return f"Count down by {step}: {', '.join(map(str, reversed(numbers)))}."
    n, m = rng.sample(range(1, LARGEST), 2)
    lines = [
        f"After {n} comes {n + 1}.",
        f"Before {m} comes {m - 1}.",
        f"{max(n, m)} is more than {min(n, m)}.",
        f"{min(n, m)} is less than {max(n, m)}.",
        f"What is more, {n} or {m}? {max(n, m)} is more.",
        f"The number between {n - 1} and {n + 1} is {n}.",
    ]
    return " ".join(rng.sample(lines, rng.randint(2, 4)))


MIXTURE: dict[Callable[[Random], str], int] = {
    story: 20,
    list_of_facts: 9,
    questions_and_answers: 17,
    conversation: 15,
    talk_about: 3,
    word_problem: 26,
    drill: 7,
    counting: 3,
}
"""Kinds of documents and their shares in percent."""


def draw_documents(seed: int) -> Iterator[str]:
    """Endless documents, all different, none of which works out a held-out problem."""
    rng = Random(f"documents {seed}")
    seen: set[str] = set()
    while True:
        for kind in rng.choices(list(MIXTURE), list(MIXTURE.values()), k=1_000):
            text = kind(rng)
            if text not in seen and not states_held_out(text):
                seen.add(text)
                yield text


# ---------------------------------------------------------------- conversations with an assistant


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _exchange(question: str, answer: str) -> list[dict[str, str]]:
    return [_user(question), {"role": "assistant", "content": answer}]


def chats(seed: int, about_facts: int = 1_500, small: int = 150, stories: int = 60) -> list[dict[str, Any]]:
    """SFT conversations: questions about every fact equally often, small talk, requests for a story; some of several turns."""
    rng = Random(f"chats {seed}")
    small_talk = world()["chat"]["small_talk"]

    def small_exchange(topic: dict[str, list[str]]) -> list[dict[str, str]]:
        return _exchange(rng.choice(topic["ask"]), rng.choice(topic["reply"]))

    talks: list[list[dict[str, str]]] = []
    order: list[Fact] = []
    for _ in range(about_facts):
        messages = small_exchange(small_talk[0]) if rng.random() < 0.08 else []
        for turn in range(rng.choices([1, 2, 3], [80, 15, 5])[0]):
            order = order or rng.sample(facts(), len(facts()))
            fact = order.pop()
            opening = rng.choice(world()["chat"]["opening"]) if not messages and not turn else ""
            messages += _exchange(opening + fact.ask(rng), fact.answer(rng))
        talks.append(messages + (small_exchange(rng.choice(small_talk[2:4])) if rng.random() < 0.08 else []))
    talks += [list(chain(*map(small_exchange, rng.sample(small_talk, rng.choice([1, 1, 2]))))) for _ in range(small)]
    for _ in range(stories):
        bound: Bound = {}
        request = grammar().expand(rng.choice(world()["chat"]["story"]), rng, bound)
        talks.append(_exchange(request, grammar().expand(rng.choice(world()["stories"])["text"], rng, bound)))
    rng.shuffle(talks)
    return [{"messages": messages} for messages in talks]


def held_out_chats(seed: int, count: int = 150) -> list[dict[str, Any]]:
    """Questions about the facts in wordings that nothing else uses, with the word that a right answer must hold."""
    rng = Random(f"chats_test {seed}")
    lines, asked, order = [], set[str](), list[Fact]()
    while len(lines) < count:
        order = order or rng.sample(facts(), len(facts()))
        fact = order.pop()
        question = rng.choice(world()["chat"]["held_out_opening"]) + fact.ask(rng, "held_out")
        if question not in asked:
            asked.add(question)
            lines.append({"messages": [_user(question)], "answer": fact.expand(fact.wordings["key"], rng)})
    return lines
