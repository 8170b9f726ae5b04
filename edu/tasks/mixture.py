"""Several tasks as one, shuffled by a seed: each example knows where it came from and is graded there."""

from collections.abc import Mapping
from random import Random

from edu.tasks.task import Example, Task


class Mixture:
    """All examples of some named tasks in one shuffled order.

    repeats: how often the examples of a task occur, where that is not once
    """

    def __init__(self, tasks: Mapping[str, Task], repeats: Mapping[str, int] | None = None, seed: int = 0) -> None:
        repeats = repeats or {}
        if unknown := repeats.keys() - tasks.keys():
            raise ValueError(f"repeats name {', '.join(sorted(unknown))}, the tasks are {', '.join(tasks)}")
        self.tasks = dict(tasks)
        self.order = [
            (name, i) for name, task in tasks.items() for i in range(len(task)) for _ in range(repeats.get(name, 1))
        ]
        Random(seed).shuffle(self.order)

    def __len__(self) -> int:
        return len(self.order)

    def get_example(self, index: int) -> Example:
        """The task's own example, and its name as `source`."""
        name, i = self.order[index]
        return {**self.tasks[name].get_example(i), "source": name}

    def reward(self, example: Example, completion: str) -> float:
        return self.tasks[example["source"]].reward(example, completion)
