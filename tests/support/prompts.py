"""Prompts of different kinds, languages and lengths."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

_LONG = (
    "The harbour of the small town had been built for fishing boats, and when the ferries came "
    "there was hardly room to turn. Every summer the council promised a new pier, and every "
    "winter the money went to the roof of the school. "
)

PROMPTS: list[str] = [
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a haiku about autumn rain.",
    "List five fruits that are rich in vitamin C.",
    "Translate to German: The train leaves at nine o'clock.",
    "Who wrote Pride and Prejudice?",
    "What is 17 times 23?",
    "Give me a recipe for pancakes.",
    "Write a Python function that reverses a string.",
    "def fibonacci(n):\n    ",
    "SELECT name, COUNT(*) FROM orders WHERE",
    '{"name": "Ada", "born": 1815, "known_for": [',
    "Why do cats purr?",
    "Summarise the plot of Romeo and Juliet.",
    "What are the main differences between TCP and UDP?",
    "Tell me a joke about penguins.",
    "Once upon a time in a village by the sea",
    "How do I tie a bow tie?",
    "Write an email asking for a day off.",
    "What causes the tides?",
    "Quelle est la plus grande ville du Canada ?",
    "¿Cómo se hace una tortilla de patatas?",
    "Was ist der Unterschied zwischen Wetter und Klima?",
    "Qual è la capitale d'Italia?",
    "日本の首都はどこですか。",
    "北京有哪些著名的景点？",
    "Какая самая длинная река в мире?",
    "😀😃 What do these emoji mean? 🎉🚀",
    "naïve café façade: explain where these words come from.",
    "   leading spaces and\ttabs\n\nand blank lines",
    "Compare a bicycle with a car in a table.",
    "What is the boiling point of water at sea level in Fahrenheit?",
    "Name three planets with rings.",
    "Explain recursion to a child.",
    "Write a limerick about a programmer.",
    "What should I pack for a week in Norway in March?",
    "How does a refrigerator work?",
    "for (int i = 0; i < n; i++) {",
    "# Title\n\n## Introduction\n\n",
    "Give three arguments for and three against remote work.",
    "What is the meaning of the word 'serendipity'?",
    "Finish the sentence: The early bird",
    "Convert 100 kilometres to miles.",
    "Describe the water cycle.",
    "Who was Marie Curie?",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "1, 1, 2, 3, 5, 8, 13,",
    "Is a tomato a fruit or a vegetable? Explain.",
    _LONG * 4 + "Summarise the text above in one sentence.",
    _LONG * 10 + "What does the council promise?",
]
assert len(PROMPTS) == 50

_TASKS = ("Explain", "Describe", "Summarise", "List the advantages of", "Write a poem about")
_SUBJECTS = (
    "glaciers", "public libraries", "sourdough bread", "the printing press", "night trains",
    "coral reefs", "double-entry bookkeeping", "the violin", "weather balloons", "tea",
)  # fmt: skip
GENERATED = [f"{task} {subject}." for task in _TASKS for subject in _SUBJECTS]
FILE = "FASTSERVE_TEST_PROMPTS"


def hundred_prompts() -> list[str]:
    """Our own, or the first hundred of the file that `FASTSERVE_TEST_PROMPTS` names: one JSON
    object with a `prompt` per line."""
    name = os.environ.get(FILE)
    if not name:
        return [*PROMPTS, *GENERATED]
    with Path(name).open(encoding="utf-8") as file:
        found = [str(json.loads(line)["prompt"]) for line in itertools.islice(file, 100)]
    assert len(found) == 100, f"{name} has only {len(found)} prompts"
    return found
