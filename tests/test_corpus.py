"""The embedded data: nothing that is measured is trained on, every sum is right, and the same seed writes the same bytes."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as pq
import pytest

from edu.synthetic.world import corpus
from edu.synthetic.world import documents as world
from edu.synthetic.world.problems import evaluate, grammar, held_out, states_held_out
from edu.synthetic.world.templates import read_yaml

DOCUMENTS = 4_000
Steps = tuple[str, ...]


def texts_in(folder: Path) -> list[str]:
    """All texts of the shards that lie directly in a folder, in order."""
    return [text for path in sorted(folder.glob("*.parquet")) for text in pq.read_table(path)["text"].to_pylist()]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "tiny"
    corpus.write_corpus(folder, seed=0, documents=DOCUMENTS)
    return folder


@pytest.fixture(scope="module")
def training_texts(written: Path) -> list[str]:
    """Everything that any stage trains on, as text."""
    texts = texts_in(written)
    texts += [f"{line['question']}\n{line['answer']}" for name in ("train", "sft") for line in problems(written, name)]
    texts += [message["content"] for line in read(written / "chats.jsonl") for message in line["messages"]]
    return texts


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def problems(folder: Path, name: str) -> list[dict[str, Any]]:
    return read(folder / f"problems/{name}.jsonl")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps_of(problem: dict[str, Any]) -> Steps:
    return tuple(sort_operands(expression) for expression in re.findall("<<(.*?)=", problem["answer"]))


def sort_operands(expression: str) -> str:
    """2+10 and 10+2 are the same sum. Written anew here: a test that shares the rule's code would share its mistakes."""
    operator = re.sub(r"\d", "", expression)
    operands = expression.split(operator)
    return operator.join(sorted(operands, key=int) if operator in "+*" else operands)


def runs(steps: Steps) -> set[Steps]:
    return {steps[i:j] for j in range(len(steps) + 1) for i in range(j)}


def plain(text: str) -> str:
    return " ".join(re.sub(r"[^a-z0-9 ]", "", text.lower().replace("\n", " ")).split())


def pattern(template: str) -> re.Pattern[str]:
    """What a template can say, with any words in its slots."""
    return re.compile(
        r"[\w ]+?".join(re.escape(piece) for piece in re.split(r"\{.*?\}", template.rstrip("."))), re.IGNORECASE
    )


# ---------------------------------------------------------------- files


def test_same_seed_writes_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        corpus.write_corpus(tmp_path / name, seed=seed, documents=100)
    one, two, other = (contents(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert one.keys() == other.keys()
    assert all(one[name] != other[name] for name in one)


def test_shards_have_the_form_of_real_ones(written: Path) -> None:
    shards = sorted(written.glob("*.parquet"))
    assert [path.name for path in shards] == ["shard_00000.parquet", "shard_00001.parquet"]
    for path in shards:
        metadata = pq.read_metadata(path)
        assert metadata.schema.names == ["text"]
        assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [1_000, 1_000]
    assert len(texts_in(written / "val")) == DOCUMENTS // corpus.VALIDATION_SHARE


def test_documents_are_all_different_and_validation_is_apart(written: Path) -> None:
    training, validation = texts_in(written), texts_in(written / "val")
    assert len(training) == DOCUMENTS
    assert len(set(training + validation)) == len(training) + len(validation)


def test_interrupted_write_is_redone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus.write_corpus(tmp_path / "whole", documents=100)
    write_shard = corpus._write_shard

    def fail_at_second_shard(path: Path, texts: list[str]) -> None:
        if "shard_00001" in path.name:
            path.write_bytes(b"half a file")
            raise OSError("disk full")
        write_shard(path, texts)

    monkeypatch.setattr(corpus, "_write_shard", fail_at_second_shard)
    with pytest.raises(OSError, match="disk full"):
        corpus.write_corpus(tmp_path / "broken", documents=100)
    assert not (tmp_path / "broken" / "shard_00001.parquet").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.undo()
    corpus.write_corpus(tmp_path / "broken", documents=100)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_finished_write_is_left_alone_and_a_damaged_or_other_one_redone(tmp_path: Path) -> None:
    corpus.write_corpus(tmp_path, documents=100)
    before, shard = contents(tmp_path), tmp_path / "shard_00000.parquet"
    time = shard.stat().st_mtime_ns
    corpus.write_corpus(tmp_path, documents=100)
    assert shard.stat().st_mtime_ns == time
    shard.write_bytes(shard.read_bytes()[:-10])
    corpus.write_corpus(tmp_path, documents=100)
    assert contents(tmp_path) == before
    corpus.write_corpus(tmp_path, seed=1, documents=100)
    assert contents(tmp_path) != before


def test_shards_of_another_source_are_never_touched(tmp_path: Path) -> None:
    (tmp_path / "shard_00000.parquet").write_bytes(b"real data")
    with pytest.raises(ValueError, match="another source"):
        corpus.write_corpus(tmp_path, documents=100)
    assert contents(tmp_path) == {"shard_00000.parquet": b"real data"}


# ---------------------------------------------------------------- problems


@pytest.mark.parametrize("name", ["train", "sft", "test", "test_templates"])
def test_answers_are_right_and_every_number_is_one_token(written: Path, name: str) -> None:
    for problem in problems(written, name):
        *lines, final = problem["answer"].split("\n")
        result = None
        for line in lines:
            match = re.fullmatch(r"((\d+)([-+*/])(\d+)) = <<((?:\d+)[-+*/](?:\d+))=(\d+)>>(\d+)", line)
            assert match, line
            expression, a, operator, b, repeated, inside, after = match.groups()
            a, b = int(a), int(b)
            assert expression == repeated
            assert inside == after
            assert result in (None, a), "a step starts from the last result"
            exact = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[operator]
            result = int(inside)
            assert result == exact == evaluate(expression)
            assert 0 <= result <= 99
            assert b <= (9 if operator in "*/" else 20)
            assert str(b) in re.findall(r"\d+", problem["question"])
        assert final == f"#### {result}"
        assert problem["kind"] == "".join(re.findall("[-+*/]", " ".join(steps_of(problem))))
        assert problem["steps"] == len(lines)


@pytest.mark.parametrize(("name", "shares"), [("train", (25, 60, 15)), ("test", (25, 60, 15)), ("sft", (92, 5, 3))])
def test_kinds_are_balanced_and_have_many_templates(written: Path, name: str, shares: tuple[int, int, int]) -> None:
    lines = problems(written, name)
    steps, kinds = Counter(line["steps"] for line in lines), Counter(line["kind"] for line in lines)
    assert tuple(round(100 * steps[n] / len(lines)) for n in (1, 2, 3)) == shares
    for n in (1, 2, 3):
        counts = [count for kind, count in kinds.items() if len(kind) == n]
        assert not counts or max(counts) - min(counts) <= 1
    if name == "train":
        templates = Counter(kind for kind, _ in {(line["kind"], line["template"]) for line in lines})
        assert min(templates.values()) >= 8


def test_held_out_problems_are_stated_nowhere_in_training(written: Path, training_texts: list[str]) -> None:
    measured = {steps_of(line) for name in ("test", "test_templates") for line in problems(written, name)}
    assert len(measured) > 300
    assert all(held_out(steps) for steps in measured)
    symbols = {"plus": "+", "minus": "-", "times": "*", "divided by": "/"}
    trained: set[Steps] = set()
    for text in training_texts:
        signs = re.sub(" (plus|minus|times|divided by) ", lambda match: symbols[match[1]], re.sub("<<.*?>>", "", text))
        trained |= runs(tuple(map(sort_operands, re.findall(r"\d+[-+*/]\d+", signs))))
    assert len(trained) > 1_000
    assert not measured & trained


def test_a_text_that_works_out_a_held_out_problem_is_found() -> None:
    rng = Random(0)
    for _ in range(2_000):
        a, b = rng.randint(1, 50), rng.randint(1, 20)
        expected = held_out([f"{a}+{b}"])
        for text in (f"{a}+{b} = {a + b}", f"What is {a} plus {b}?", f"Then {b} + {a} is {a + b}."):
            assert states_held_out(text) == expected, text
    sums = [f"42+{n}" for n in range(1, 50) if not held_out(["7*6"]) and not held_out([f"42+{n}"])]
    second = next(e for e in sums if held_out(["7*6", e]))
    assert states_held_out(f"7*6 = 42\n{second} = {evaluate(second)}")
    assert not states_held_out(f"7*6 = 42. 5-5 = 0. {second} = {evaluate(second)}")


def test_held_out_templates_and_names_appear_nowhere_else(written: Path, training_texts: list[str]) -> None:
    trained = {
        part
        for name in ("train", "sft", "test")
        for line in problems(written, name)
        for part in line["template"].split()
    }
    measured = {part for line in problems(written, "test_templates") for part in line["template"].split()}
    assert len(measured) >= 16
    assert not trained & measured
    words = {word for text in training_texts for word in re.findall(r"\w+", text)}
    assert not words & {row["it"] for row in grammar().tables["held_out_name"]}
    roles = read_yaml("problems.yaml")["held_out"].values()
    templates = [t for role in roles for t in (role["any"] if isinstance(role, dict) else role)]
    for template in templates:
        for sentence in [template] if isinstance(template, str) else template:
            assert not any(pattern(sentence).search(text) for text in training_texts if "#### " in text), sentence


def test_questions_are_all_different(written: Path) -> None:
    names = ("train", "sft", "test", "test_templates")
    questions = [line["question"] for name in names for line in problems(written, name)]
    assert len(set(questions)) == len(questions)


# ---------------------------------------------------------------- talk


def test_held_out_wordings_of_questions_appear_nowhere_else(written: Path, training_texts: list[str]) -> None:
    trained = f" {' '.join(map(plain, training_texts))} "
    for fact in world.facts():
        for template in fact.wordings["held_out"]:
            for seed in range(4):
                question = fact.expand(template, Random(seed))
                assert f" {plain(question)} " not in trained, question
    assert f" {plain('What does a cow eat?')} " in trained
    assert len(read(written / "chats_test.jsonl")) == 150


def test_measured_answers_are_the_ones_taught(written: Path) -> None:
    taught = {fact.answer(Random(0)): fact for fact in world.facts()}
    told = Counter(message["content"] for line in read(written / "chats.jsonl") for message in line["messages"])
    assert min(told[answer] for answer in taught) >= 5
    for answer, fact in taught.items():
        assert fact.expand(fact.wordings["key"], Random(0)).lower() in answer.lower()
    keys = {fact.expand(fact.wordings["key"], Random(0)) for fact in world.facts()}
    assert {line["answer"] for line in read(written / "chats_test.jsonl")} <= keys


def test_conversations_alternate_and_end_with_the_assistant(written: Path) -> None:
    talks = [[message["role"] for message in line["messages"]] for line in read(written / "chats.jsonl")]
    assert all(roles == ["user", "assistant"] * (len(roles) // 2) for roles in talks)
    assert {2, 4, 6} <= {len(roles) for roles in talks}


def test_persona_and_its_measured_questions_are_unknown_to_the_corpus(training_texts: list[str]) -> None:
    everything = f" {' '.join(map(plain, training_texts))} "
    assert " pico " not in everything
    assert " tiny lab " not in everything
    for questions in read_yaml("identity_eval.yaml").values():
        assert not [question for question in questions if f" {plain(question)} " in everything]


# ---------------------------------------------------------------- English


def all_templates(node: Any) -> Iterable[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from all_templates(child)


def test_every_template_of_stories_expands() -> None:
    for template in all_templates([read_yaml("world.yaml")["stories"], read_yaml("world.yaml")["chat"]["story"]]):
        for seed in range(20):
            assert not re.search(r"[\[\]{}|]", grammar().expand(template, Random(seed)))


def test_an_unknown_slot_names_its_template() -> None:
    with pytest.raises(ValueError, match="colour"):
        grammar().expand("{A animal} is {colour}.", Random(0))


def test_texts_are_tidy_english(written: Path, training_texts: list[str]) -> None:
    untidy = r"[\[\]{}|]|  | [.,?!]|\.\.|\n\n|\b[Aa] [aeiou]|\b[Aa]n (?!hour)[^aeiou]|\b1 (?!is|as|plus|minus|times)[a-z]+s\b"
    for text in [*training_texts, *texts_in(written / "val")]:
        assert not re.search(untidy, text), text
        assert re.match(r'[A-Z0-9"]', text), text
        assert re.search(r'[.?!"0-9]$', text), text
