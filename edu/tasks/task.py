"""Tasks: problems with a checkable answer.

A task is any object with `len(task)`, `task.get_example(i)` and `task.reward(example, completion)`. An example is a dict:
`messages` (the conversation to complete), `answer` (the ground truth), and whatever else its source holds (kind, steps, ...).
The reward is a function of text alone; `edu.tasks.score` makes text of a sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Example = dict[str, Any]


class Task(Protocol):
    def __len__(self) -> int: ...

    def get_example(self, index: int) -> Example: ...

    def reward(self, example: Example, completion: str) -> float: ...


@dataclass(frozen=True)
class Subset:
    """A task made of some examples of another, in the order given."""

    task: Task
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def get_example(self, index: int) -> Example:
        return self.task.get_example(self.indices[index])

    def reward(self, example: Example, completion: str) -> float:
        return self.task.reward(example, completion)
