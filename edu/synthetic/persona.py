"""The persona: its file read, and answers graded against it. No torch, no client: edu.synthetic.identity has that.

Everything is written by hand in data/persona.yaml (read there what intents, leads and slots are) and data/identity_eval.yaml.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from edu.config.reading import read_yaml

CHAT_ONLY = ("greeting", "thanks", "bye")  # intents that nobody asks about: they open and close a conversation


@dataclass(frozen=True)
class Intent:
    """A thing that a user may want to know, in all the wordings that data/persona.yaml gives."""

    name: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    """Single sentences, each stating what the intent asks for; a sentence belongs to one intent."""
    must_say: tuple[str, ...]
    """Words without which no answer is accepted, from any teacher."""


@dataclass(frozen=True)
class Persona:
    """The model's identity, as data/persona.yaml says, with every choice written out."""

    name: str
    maker: str
    traits: tuple[str, ...]
    facts: tuple[str, ...]
    intents: dict[str, Intent]
    greetings: tuple[str, ...]
    leadins: tuple[str, ...]
    leads: dict[str, tuple[str, ...]]
    more: tuple[str, ...]


@dataclass(frozen=True)
class Starter:
    """An idea of how a user may begin; `tone` is one of the persona's leads."""

    text: str
    tone: str
    topic: str


def expansions(template: str, slots: dict[str, str]) -> list[str]:
    """Every sentence that a template stands for: `[a|b]` is a choice, `{name}` a slot.

    >>> expansions("[I am|My name is] {name}.", {"name": "Pico"})
    ['I am Pico.', 'My name is Pico.']
    """
    parts = [part.split("|") for part in template.replace("]", "[").split("[")]
    return [" ".join("".join(words).format(**slots).split()) for words in product(*parts)]


def load_persona(path: Path) -> Persona:
    """Read a persona file. Raises ValueError naming the file and what it lacks, or a sentence that two intents share."""
    data = read_yaml(path)
    with _of_the_form_of("data/persona.yaml", path):
        name, maker = _texts([data["name"], data["maker"]])
        slots = {"name": name, "maker": maker, "Maker": maker[:1].upper() + maker[1:]}

        def every(templates: list[str]) -> tuple[str, ...]:
            return tuple(text for template in _texts(templates) for text in expansions(template, slots))

        intents = {
            key: Intent(key, every(part["questions"]), every(part["answers"]), every(part["must_say"]))
            for key, part in data["intents"].items()
        }
        persona = Persona(
            *(name, maker, tuple(_texts(data["traits"])), tuple(_texts(data["facts"])), intents),
            *(every(data["greetings"]), every(data["leadins"])),
            {tone: every(leads) for tone, leads in data["leads"].items()},
            every(data["more"]),
        )
    _check_answers(persona, path)
    return persona


@contextmanager
def _of_the_form_of(example: str, path: Path) -> Iterator[None]:
    """Raise ValueError naming the file where it holds something else than the file of the project that shows the form."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path}: no {error} (a key, or a slot other than name and maker)") from None
    except (TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"{path}: not of the form of {example} ({str(error)[:200]})") from None


def _texts(value: Any) -> list[str]:
    """Return a list of texts, each with something in it; TypeError for anything else."""
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise TypeError(f"expected a list of texts, found {str(value)[:80]!r}")
    return value


def _check_answers(persona: Persona, path: Path) -> None:
    """The intents that questions are graded by exist, and no sentence states what two intents ask for."""
    seen: dict[str, str] = dict.fromkeys(neutral_sentences(persona), "more or leads")
    for intent in persona.intents.values():
        for answer in intent.answers:
            if seen.setdefault(answer, intent.name) != intent.name:
                raise ValueError(f"{path}: {answer!r} stands under {intent.name} and under {seen[answer]}: keep one")
    for key in ("name", "maker", *CHAT_ONLY):
        if key not in persona.intents:
            raise ValueError(f"{path}: no intent {key!r} under intents")


def neutral_sentences(persona: Persona) -> frozenset[str]:
    """The sentences that stand around an answer and state nothing."""
    return frozenset(persona.more).union(*persona.leads.values())


def load_starters(path: Path, persona: Persona) -> list[Starter]:
    """Read the starter prompts; ValueError on a tone that the persona has no leads for, or a prompt given twice."""
    starters: list[Starter] = []
    data = read_yaml(path)
    with _of_the_form_of("data/starter_prompts.yaml", path):
        for row, group in enumerate(data, 1):
            tone, topic = _texts([group["tone"], group["topic"]])
            if tone not in persona.leads:
                raise ValueError(f"group {row} has the tone {tone!r}; known: {', '.join(persona.leads)}")
            texts = [text.format(name=persona.name, maker=persona.maker) for text in _texts(group["prompts"])]
            starters += [Starter(text, tone, topic) for text in texts]
    texts = [starter.text for starter in starters]
    twice = {text for text in texts if texts.count(text) > 1}
    if twice or not starters:
        raise ValueError(f"{path}: {'given twice: ' + ', '.join(sorted(twice))[:200] if twice else 'no prompts'}")
    return starters


@dataclass(frozen=True)
class IdentityQuestion:
    """A held-out question and the intent that its answer must state."""

    question: str
    intent: str


@dataclass(frozen=True)
class Grade:
    """Three counts on which an answer to an identity question is judged."""

    names_itself: bool
    """The name stands in it as a word of its own."""
    well_formed: bool
    """It is one to four different sentences, each a whole sentence of the persona file, and nothing else."""
    right_intent: bool
    """It states what was asked for, and nothing else but the name."""


def load_identity_eval(path: Path, persona: Persona) -> list[IdentityQuestion]:
    """The held-out questions; ValueError naming the file on an intent that the persona lacks."""
    data = read_yaml(path)
    unknown = (
        [str(key)[:80] for key in data if key not in persona.intents] if isinstance(data, dict) else ["no intents"]
    )
    if unknown:
        known = ", ".join(persona.intents)
        raise ValueError(
            f"{path}: expected lists of questions under the intents {known}; found {', '.join(unknown[:3])}"
        )
    slots = {"name": persona.name, "maker": persona.maker}
    with _of_the_form_of("data/identity_eval.yaml", path):
        return [
            IdentityQuestion(text.format(**slots), intent) for intent, texts in data.items() for text in _texts(texts)
        ]


def grade(answer: str, intent: str, persona: Persona) -> Grade:
    """Judge an answer by its sentences, not by its words.

    1. Cut the answer into sentences, after `.`, `!` or `?`; a rest without an end is not one.
    2. Well formed: each is, letter by letter, a sentence that the persona file gives, none twice, at most four.
    3. Each sentence states the one intent that it stands under in the persona file, or nothing. The intent is right when the
       sentences, those that give only the name aside, state the one asked for; a name question must get the name alone.
       So a model that says "I am Pico, and the Tiny Lab made me." to everything is right on makers and wrong on names.

    >>> persona = load_persona(Path("data/persona.yaml"))
    >>> grade("Hello! My name is Pico.", "name", persona)
    Grade(names_itself=True, well_formed=True, right_intent=True)
    >>> grade("I am Pico, a tiny chat12/12/7", "name", persona)
    Grade(names_itself=True, well_formed=False, right_intent=False)
    """
    states = {sentence: key for key, part in persona.intents.items() for sentence in part.answers}
    sentences = [sentence.strip() for sentence in re.findall(r"[^.!?]*[.!?]|[^.!?]+$", answer.strip())]
    known = neutral_sentences(persona).union(states)
    stated = {states[sentence] for sentence in sentences if sentence in states}
    return Grade(
        names_itself=re.search(rf"\b{re.escape(persona.name)}\b", answer) is not None,
        well_formed=1 <= len(sentences) <= 4 and len(set(sentences)) == len(sentences) and known.issuperset(sentences),
        right_intent=stated == {"name"} if intent == "name" else stated - {"name"} == {intent},
    )


def normalise(text: str) -> str:
    """Lower case, no punctuation, single spaces.

    >>> normalise(" What's your  NAME?")
    'whats your name'
    """
    return " ".join("".join(c for c in text.lower() if c.isalnum() or c.isspace()).split())


def find_overlap(questions: Iterable[IdentityQuestion], texts: Iterable[str]) -> list[str]:
    """The held-out questions whose words, in their order and without punctuation, stand in one of the texts."""
    held_out = {f" {normalise(question.question)} ": question.question for question in questions}
    padded = [f" {normalise(text)} " for text in texts]
    return [question for words, question in held_out.items() if any(words in text for text in padded)]
