"""Grade-school word problems in GSM8K's format, composed from the parts in data/problems.yaml.

A problem is an opening (a number, groups or shares), events that add or take away, and a question. What is measured is kept apart from
what is trained on by one rule on its expressions, a list such as ["7*6", "42-5"]:

    held out   a hash of the list says so: one list in eight (the order of a sum's or product's operands does not matter)
    trainable  neither the list nor any run of its steps is held out

so a held-out problem is stated nowhere in training, not even as a part of a longer one; `states_held_out` holds any text to the rule.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle, islice
from random import Random
from typing import Any
from zlib import crc32

from edu.synthetic.world.templates import Bound, Grammar, capital, read_yaml, rows

ONE_STEP = ("+", "-", "*", "/")
TWO_STEPS = ("++", "+-", "-+", "--", "*+", "*-")
THREE_STEPS = ("+-+", "-+-", "*+-", "*-+")
WORDS = {"plus": "+", "minus": "-", "times": "*", "divided by": "/"}
EXPRESSION = re.compile(rf"(\d+) ?([-+*/]|{'|'.join(WORDS)}) ?(\d+)")
OPENINGS = {"*": "groups", "/": "shares"}  # all else opens with one number, a "start"
EVENTS = {"+": "gain", "-": "loss"}
HELD_OUT_SHARE = 8
LARGEST = 99


def evaluate(expression: str) -> int:
    """
    >>> evaluate("7*6"), evaluate("42/7")
    (42, 6)
    """
    a, operator, b = re.split(r"([-+*/])", expression)
    match operator:
        case "+":
            return int(a) + int(b)
        case "-":
            return int(a) - int(b)
        case "*":
            return int(a) * int(b)
        case _:
            return int(a) // int(b)


def held_out(expressions: Sequence[str]) -> bool:
    """Whether a problem of exactly these steps is for measuring only.

    >>> held_out(["4+13"]), held_out(["13+4"]), held_out(["7*6", "42-5"])
    (False, False, False)
    """
    return crc32(";".join(map(_canonical, expressions)).encode()) % HELD_OUT_SHARE == 0


def trainable(expressions: Sequence[str]) -> bool:
    """Whether these steps may be trained on: no run of them, from one step to all, is held out."""
    ends = range(1, len(expressions) + 1)
    return not any(held_out(expressions[start:end]) for end in ends for start in range(end))


def states_held_out(text: str) -> bool:
    """Whether a text works out something held out; a step continues a chain when it starts from the last result."""
    chain: list[str] = []
    for a, operator, b in EXPRESSION.findall(text):
        if chain and evaluate(chain[-1]) not in (int(a), int(b)):
            chain = []
        chain.append(f"{a}{WORDS.get(operator, operator)}{b}")
        if any(held_out(chain[start:]) for start in range(len(chain))):
            return True
    return False


def _canonical(expression: str) -> str:
    a, operator, b = re.split(r"([-+*/])", expression)
    return operator.join(sorted((a, b))) if operator in "+*" else expression


@dataclass(frozen=True)
class Problem:
    """
    >>> problem = Problem("...", ("7*6", "42-5"), "groups0 loss1")
    >>> problem.answer
    '7*6 = <<7*6=42>>42\\n42-5 = <<42-5=37>>37\\n#### 37'
    """

    question: str
    expressions: tuple[str, ...]
    template: str
    """The parts that it is made of; those of held-out templates start with `held-`."""

    @property
    def kind(self) -> str:
        return "".join(re.sub(r"\d", "", expression) for expression in self.expressions)

    @property
    def answer(self) -> str:
        """GSM8K's format, with calculator annotations."""
        lines = [f"{e} = <<{e}={evaluate(e)}>>{evaluate(e)}" for e in self.expressions]
        return "\n".join([*lines, f"#### {evaluate(self.expressions[-1])}"])

    @property
    def text(self) -> str:
        """Question and worked answer in plain text, for pretraining."""
        return f"{self.question}\n{re.sub('<<.*?>>', '', self.answer)}"

    def record(self) -> dict[str, Any]:
        """A line of the problem files."""
        steps = len(self.expressions)
        return {
            "question": self.question,
            "answer": self.answer,
            "kind": self.kind,
            "template": self.template,
            "steps": steps,
        }


@dataclass(frozen=True)
class Part:
    """A sentence of a problem; `ask` is set where it brings its own question."""

    id: str
    sort: str
    """What it can be said of: any, food, toys."""
    text: str
    ask: str = ""


@lru_cache
def parts(split: str, role: str) -> tuple[Part, ...]:
    """The parts of a split (`train`, `held_out`) that play a role (`start`, `groups`, `shares`, `gain`, `loss`)."""
    lists = read_yaml("problems.yaml")[split][role]
    sorts = lists if isinstance(lists, dict) else {"any": lists}
    entries = [(sort, entry) for sort, texts in sorts.items() for entry in texts]
    prefix = "held-" if split == "held_out" else ""
    return tuple(
        Part(f"{prefix}{role}{i}", sort, *([entry] if isinstance(entry, str) else entry))
        for i, (sort, entry) in enumerate(entries)
    )


@lru_cache
def grammar() -> Grammar:
    """The world's tables and the problems' own."""
    entries = read_yaml("world.yaml")["tables"] | read_yaml("problems.yaml")["tables"]
    return Grammar({name: rows(table) for name, table in entries.items()})


def draw_expressions(kind: str, rng: Random) -> list[str]:
    """Steps with operands 1..20 for + and -, 2..9 for *, divisors 2..9 and quotients 2..20, every number from 0 to 99.

    >>> draw_expressions("*-", Random(1))
    ['4*3', '12-9']
    """
    while True:
        n, m = rng.randint(2, 20 if kind[0] == "/" else 9), rng.randint(2, 9)
        if n * m > LARGEST:
            continue
        expressions = [f"{n}*{m}"] if kind[0] == "*" else [f"{n * m}/{m}"] if kind[0] == "/" else []
        total = evaluate(expressions[0]) if expressions else rng.randint(2, 20)
        for operator in kind[len(expressions) :]:
            number = rng.randint(1, 20)
            expressions.append(f"{total}{operator}{number}")
            total = evaluate(expressions[-1])
            if not 0 <= total <= LARGEST:
                break
        else:
            return expressions


def draw_problem(
    kind: str, rng: Random, split: str = "train", wanted: Callable[[Sequence[str]], bool] = trainable
) -> Problem:
    """A problem of one kind (its operators in order) from the parts of a split, with expressions that are `wanted`."""
    expressions = draw_expressions(kind, rng)
    while not wanted(expressions):
        expressions = draw_expressions(kind, rng)
    steps = [re.findall(r"\d+", expression) for expression in expressions]
    bound: Bound = {slot: {"it": number} for slot, number in zip("nm", steps[0], strict=True)}
    bound["name"] = rng.choice(grammar().tables["name" if split == "train" else "held_out_name"])
    bound["things"] = rng.choice(grammar().tables["things"])

    opening = _draw_part(OPENINGS.get(kind[0], "start"), split, bound, rng, ())
    used, sentences = [opening], [grammar().expand(opening.text, rng, bound)]
    for operator, (_, number) in list(zip(kind, steps, strict=True))[kind[0] in OPENINGS :]:
        event = _draw_part(EVENTS[operator], split, bound, rng, used)
        bound["n"] = {"it": number}
        then = rng.choice(["", "then "]) if len(used) > 1 else ""
        sentences.append(capital(grammar().expand(f"{then}{event.text}.", rng, bound)))
        used.append(event)
    ask = opening.ask or rng.choice(read_yaml("problems.yaml")["ask"][kind[-1]])
    question = " ".join([*sentences, grammar().expand(ask, rng, bound)])
    return Problem(question, tuple(expressions), " ".join(part.id for part in used))


def _draw_part(role: str, split: str, bound: Bound, rng: Random, used: Sequence[Part]) -> Part:
    sorts = ("any", bound["things"]["sort"])
    return rng.choice([part for part in parts(split, role) if part.sort in sorts and part not in used])


def draw_problems(
    counts: dict[tuple[str, ...], int],
    rng: Random,
    taken: set[str],
    split: str = "train",
    wanted: Callable[[Sequence[str]], bool] = trainable,
) -> list[Problem]:
    """So many problems of each group of kinds, evenly over its kinds, shuffled; no question is in `taken`, which grows by them."""
    problems: list[Problem] = []
    for kinds, count in counts.items():
        for kind in islice(cycle(kinds), count):
            while (problem := draw_problem(kind, rng, split, wanted)).question in taken:
                pass
            taken.add(problem.question)
            problems.append(problem)
    rng.shuffle(problems)
    return problems


def problem_files(seed: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The problem files and their lines: RL's training problems, SFT's (mostly one step), and two that are held out."""
    rng, taken = Random(f"problems {seed}"), set[str]()
    groups = (ONE_STEP, TWO_STEPS, THREE_STEPS)
    sizes = {
        "test_templates": ((50, 120, 30), "held_out", held_out),
        "test": ((75, 180, 45), "train", held_out),
        "sft": ((552, 30, 18), "train", trainable),
        "train": ((800, 1920, 480), "train", trainable),
    }
    for name, (counts, split, wanted) in sizes.items():
        problems = draw_problems(dict(zip(groups, counts, strict=True)), rng, taken, split, wanted)
        yield f"problems/{name}.jsonl", [problem.record() for problem in problems]
