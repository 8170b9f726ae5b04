"""Templates to sentences: slots and choices, which is all the grammar that the tables in data/*.yaml need.

    {animal}              an entry of the table `animal`, drawn once per document: the same entry wherever it is named again
    {animal2}             another entry of the same table
    {animal.eats}         a field of that entry
    {a animal}            with its article: a cow, an owl
    {he}                  no table of that name: a field of the entry {name}
    {Animal}, {A animal}  with a capital letter
    [red|dark blue|]      one of these, or nothing; may hold slots and further choices

An entry of a table is a word, or fields (`it` is the word itself), or words that share fields: {each: fields, of: [words]}.
An entry's text may be a template in its turn.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import yaml

Row = Mapping[str, str]
Bound = dict[str, Row]

DATA = Path(__file__).resolve().parents[3] / "data"
CHOICE = re.compile(r"\[([^\[\]]*)\]")
SLOT = re.compile(r"\{([aA] )?([A-Za-z_]+)(\d?)(?:\.(\w+))?\}")


@lru_cache
def read_yaml(name: str) -> dict[str, Any]:
    """The hand-written file `data/<name>`, read once: treat it as constant."""
    return yaml.safe_load((DATA / name).read_text(encoding="utf-8"))


def rows(entries: Iterable[Any]) -> list[Row]:
    """
    >>> rows(["cow", {"it": "owl", "says": "hoot"}, {"each": {"he": "she"}, "of": ["Anna", "Lily"]}])
    [{'it': 'cow'}, {'it': 'owl', 'says': 'hoot'}, {'he': 'she', 'it': 'Anna'}, {'he': 'she', 'it': 'Lily'}]
    """
    table: list[Row] = []
    for entry in entries:
        if isinstance(entry, str):
            table.append({"it": entry})
        elif "of" in entry:
            table += [{**entry["each"], **row} for row in rows(entry["of"])]
        else:
            table.append(entry)
    return table


def capital(text: str) -> str:
    """
    >>> capital("the sky is blue.")
    'The sky is blue.'
    """
    return text[:1].upper() + text[1:]


def with_article(word: str) -> str:
    """
    >>> with_article("owl"), with_article("cow")
    ('an owl', 'a cow')
    """
    return f"an {word}" if word[0].lower() in "aeiou" else f"a {word}"


@dataclass(frozen=True)
class Grammar:
    """Expands templates over named tables.

    >>> grammar = Grammar({"animal": rows(["owl"]), "name": rows([{"it": "Anna", "he": "she"}])})
    >>> grammar.expand("{A animal} saw [{name}]. {He} saw the {animal}.", Random(0))
    'An owl saw Anna. She saw the owl.'
    """

    tables: Mapping[str, list[Row]]

    def expand(self, template: str, rng: Random, bound: Bound | None = None) -> str:
        """One sentence or text. `bound` holds what slots stand for; what is drawn here is added to it.

        Raises ValueError naming the template when a slot has neither table nor field.
        """
        bound = {} if bound is None else bound
        text = template
        try:
            while "[" in text or "{" in text:
                text, choices = CHOICE.subn(lambda match: rng.choice(match[1].split("|")), text)  # the innermost
                if not choices:
                    text = SLOT.sub(lambda match: self._fill(match, rng, bound), text)
        except KeyError as error:
            raise ValueError(f"no table or field {error} in the template {template!r}") from None
        return re.sub(" +", " ", text).strip()

    def draw(self, table: str, rng: Random, bound: Bound) -> Row:
        """An entry of the table that no other slot of the same table stands for (`name` and `name2` are two people)."""
        taken = [row for slot, row in bound.items() if slot.rstrip("23456789") == table]
        while (row := rng.choice(self.tables[table])) in taken:
            pass
        return row

    def _fill(self, match: re.Match[str], rng: Random, bound: Bound) -> str:
        article, table, number, field = match.groups()
        key = table.lower() + number
        if key not in bound and table.lower() not in self.tables:
            key, field = "name", key
        if key not in bound:
            bound[key] = self.draw(key.rstrip("23456789"), rng, bound)
        text = bound[key][field or "it"]
        text = with_article(text) if article else text
        return capital(text) if match[0][1].isupper() else text
