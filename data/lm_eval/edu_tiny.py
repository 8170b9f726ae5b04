"""How lm-eval grades edu_tiny.yaml: as this project does, which has to be installed for it."""

from typing import Any

from edu.tasks.gsm8k import extract_answer, solves


def grade(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1.0 if the last "#### N" of the answer is right."""
    return {"exact_match": float(solves(results[0], str(extract_answer(doc["answer"]))))}
