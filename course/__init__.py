"""Exercises: ten chapters to do yourself, and the graders that run their laws on what you wrote."""
