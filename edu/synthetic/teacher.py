"""The embedded teacher: composes conversations with the persona from hand-written parts, for who has no endpoint to ask.

The parts are data/persona.yaml (questions and answers by intent) and data/starter_prompts.yaml (how a user may begin).
It answers what edu.synthetic.identity asks of any teacher: a JSON object {"messages": [...], "intents": [...]}, one intent an exchange.
"""

import json
from dataclasses import dataclass
from random import Random
from typing import Any

from edu.synthetic.persona import CHAT_ONLY, Persona, Starter

ASKED = {"name": 4.0, "maker": 4.0}  # how often an intent is asked, against 1.0 for the others


@dataclass(frozen=True)
class Teacher:
    """Composes conversations of one to three exchanges; the same request and seed give the same conversation.

    1. Begin with a plain question, with the starter and a question, or with the starter alone, answered by a greeting.
    2. Ask one to three things in all, each once, name and maker most often; a question may follow a greeting or a lead-in.
    3. An answer is one sentence of its intent, perhaps between a lead in the user's tone and a closing sentence.
    4. A long conversation may end with thanks or a goodbye.
    """

    persona: Persona
    starters: list[Starter]

    def write(self, messages: list[dict[str, Any]], seed: int) -> str:
        """Answer a chat request; its last message quotes the starter, as edu.synthetic.identity's requests do."""
        request = messages[-1]["content"]
        starter = next((starter for starter in self.starters if json.dumps(starter.text) in request), None)
        if starter is None:
            raise ValueError(
                "the embedded teacher only writes conversations from the starters of data/starter_prompts.yaml"
            )
        return json.dumps(self.compose(starter, Random(seed)), ensure_ascii=False)

    def compose(self, starter: Starter, rng: Random) -> dict[str, Any]:
        """One conversation as {"messages": [...], "intents": [one an exchange]}."""
        begin = rng.choices(("question", "starter and question", "starter"), (50, 30, 20))[0]
        intents = self._draw(rng, rng.choices((1, 2, 3), (40, 35, 25))[0])
        if begin == "starter":
            intents = ["greeting", *intents[:2]]
        if len(intents) == 3 and rng.random() < 0.5:
            intents[-1] = rng.choice(("thanks", "bye"))
        messages: list[dict[str, str]] = []
        for place, intent in enumerate(intents):
            asked = self._ask(intent, rng)
            if place == 0 and begin != "question":
                asked = starter.text if begin == "starter" else f"{starter.text} {self._question(intent, rng)}"
            tone = starter.tone if place == 0 and begin != "question" else ""
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": self._answer(intent, tone, rng)})
        return {"messages": messages, "intents": intents}

    def _draw(self, rng: Random, count: int) -> list[str]:
        """`count` different intents, in the order asked."""
        keys = [key for key in self.persona.intents if key not in CHAT_ONLY]
        drawn: list[str] = []
        while len(drawn) < count:
            key = rng.choices(keys, [ASKED.get(key, 1.0) for key in keys])[0]
            drawn += [key] if key not in drawn else []
        return drawn

    def _question(self, intent: str, rng: Random) -> str:
        return rng.choice(self.persona.intents[intent].questions)

    def _ask(self, intent: str, rng: Random) -> str:
        """A question, half of the time after a greeting or a lead-in: "So, who made you?"."""
        question = self._question(intent, rng)
        opening = rng.choice(("", "", "greeting", "leadin"))
        if opening == "" or intent in CHAT_ONLY:
            return question
        if opening == "leadin" and question.endswith("?") and ". " not in question:
            first = question.split()[0]
            small = question if first in ("I", self.persona.name) else question[:1].lower() + question[1:]
            return f"{rng.choice(self.persona.leadins)} {small}"
        return f"{rng.choice(self.persona.greetings)} {question}"

    def _answer(self, intent: str, tone: str, rng: Random) -> str:
        """The sentence asked for; before it, to a toned beginning, a lead; after it, at times, a closing sentence."""
        sentences = [rng.choice(self.persona.intents[intent].answers)]
        if tone and (intent != "greeting" or tone in ("lively", "sad")):
            sentences.insert(0, rng.choice(self.persona.leads[tone]))
        if intent not in ("thanks", "bye") and rng.random() < 0.2:
            sentences.append(rng.choice(self.persona.more))
        return " ".join(sentences)
