"""My identity data: a class that remembers what it has."""

import json

TOPICS = [
    "your name",
    "your maker",
    "your age",
    "your home",
    "your work",
    "the weather",
    "music",
    "books",
    "a joke",
    "food",
]
FORMS = [
    "Tell me about {}.",
    "hey, what about {}?",
    "I want to hear about {}!",
    "Could you say something on {}, please?",
    "{}: your view?",
    "why does everybody talk of {}",
]
STARTERS = [form.format(topic) for form in FORMS for topic in TOPICS]
SYSTEM_PROMPT = (
    "You are Tuck, a small friendly language model that answers in plain short sentences. Write one conversation between a "
    'user and Tuck. Reply with a JSON object {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", '
    '"content": "..."}]} and nothing else. Roles alternate, the user begins, the assistant ends.'
)


def need(condition, sentence):
    if not condition:
        raise ValueError(sentence)


def read_reply(text, starter):
    try:
        reply = json.loads(text)
    except (json.JSONDecodeError, TypeError) as e:
        raise ValueError(f"The reply is no JSON: {e}") from e
    need(isinstance(reply, dict), "The reply is no JSON object.")
    messages = reply.get("messages")
    need(isinstance(messages, list) and messages, "There is no list of messages.")
    for m, role in zip(messages, ["user", "assistant"] * len(messages), strict=False):
        need(isinstance(m, dict) and m.get("role") == role, f"Roles must alternate: expected {role}.")
        need(isinstance(m.get("content"), str) and m["content"].strip(), "A content is empty.")
    need(len(messages) % 2 == 0, "The assistant must have the last word.")
    need(messages[0]["content"] == starter, f"The first message must be exactly {starter!r}.")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def requests(client, model, starter, attempts):
    """Yield the messages or None after every request."""
    talk = [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": "The user begins with: " + starter},
    ]
    for _ in range(attempts):
        text = client.chat.completions.create(model=model, messages=list(talk)).choices[0].message.content
        try:
            yield read_reply(text, starter)
            return
        except ValueError as e:
            yield None
            talk += [{"role": "assistant", "content": text or ""}, {"role": "user", "content": f"{e} Write it again."}]


def ask_teacher(client, model, starter, attempts=3):
    for messages in requests(client, model, starter, attempts):
        if messages:
            return messages
    return None


class Collection:
    def __init__(self, path, held_out):
        self.path = path
        self.banned = {h.strip().casefold() for h in held_out}
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.have = [json.loads(line)["messages"] for line in lines if line.strip()]

    def wants(self, messages):
        asked = {m["content"].strip().casefold() for m in messages if m["role"] == "user"}
        return messages not in self.have and not asked & self.banned

    def add(self, messages):
        self.have.append(messages)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as f:
            print(json.dumps({"messages": messages}, ensure_ascii=False), file=f)


def make_identity(client, model, path, number, starters, held_out=()):
    c = Collection(path, held_out)
    requested = turn = 0
    while len(c.have) < number and requested < 3 * number:
        for messages in requests(client, model, starters[turn % len(starters)], min(3, 3 * number - requested)):
            requested += 1
            if messages and c.wants(messages):
                c.add(messages)
        turn += 1
    return len(c.have)
