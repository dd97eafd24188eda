"""Prompts of a file, and prompts made to a number of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastserve.bench.load.http import Address, HttpClient
from fastserve.bench.load.plan import Lengths, fit, from_file
from fastserve.bench.load.prompts import (
    WORDS,
    FilePrompt,
    PromptError,
    PromptMaker,
    prompt_maker,
    read_prompts,
    single_tokens,
)
from fastserve.bench.load.target import Asking, Target
from fastserve.bench.sim.types import SimJob
from support.api_server import Answer, running_api_server


async def maker_at(**fields: Any) -> PromptMaker:
    async with running_api_server(**fields) as api:
        http = HttpClient(Address(api.url), {})
        try:
            return await prompt_maker(await Target.find(http, None, Asking()), None)
        finally:
            http.close()


async def test_made_prompts_have_exactly_the_tokens_the_server_counts() -> None:
    """The fake server counts a token per word and one more, as for a beginning of sequence."""
    maker = await maker_at()
    assert "/tokenize" in maker.exact
    rng = np.random.default_rng(0)
    for tokens in (2, 3, 44, 500):
        assert len(maker.make(tokens, rng).split()) + 1 == tokens


async def test_without_tokenize_it_says_that_words_are_counted() -> None:
    maker = await maker_at(tokenize=False)
    assert "words, not tokens" in maker.exact
    assert len(maker.make(44, np.random.default_rng(0)).split()) == 44


async def test_a_server_that_cannot_answer_is_told_before_the_run() -> None:
    with pytest.raises(PromptError, match="no worker"):
        await maker_at(script=lambda body: Answer(status=503, text="no worker"))


async def test_only_words_that_are_one_token_each_are_used() -> None:
    async def count(text: str) -> int:
        """`city` is two tokens, and there is one more at the beginning."""
        return 1 + sum(2 if word == "city" else 1 for word in text.split())

    found = await single_tokens(WORDS, count)
    assert found == [word for word in WORDS if word != "city"]


def test_the_same_seed_gives_the_same_prompts_and_another_one_others() -> None:
    maker = PromptMaker(WORDS, 0, "")
    first, again, other = (maker.make(50, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_lengths_are_fixed_and_cut_to_the_model() -> None:
    jobs = [SimJob(0.0, 10, 20), SimJob(1.0, 90, 50), SimJob(2.0, 200, 5)]
    fitted, cut = fit(jobs, Lengths(longest=100))
    assert [job[1:3] for job in fitted] == [(10, 20), (90, 10), (99, 1)] and cut == 2
    fitted, cut = fit(jobs, Lengths(prompt=44, output=128))
    assert {job[1:3] for job in fitted} == {(44, 128)} and cut == 0


def test_prompts_of_a_file_come_as_often_as_each_other(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "output_tokens": 7}\n\n{"prompt": "b", "more": 1}\n')
    prompts = read_prompts(file)
    assert prompts == [FilePrompt("a", 7), FilePrompt("b", None)]
    jobs = [SimJob(float(at), 1, 1) for at in range(6)]
    requests = from_file(jobs, prompts, None, 128, 0, {})
    assert sorted(request.prompt for request in requests) == ["a"] * 3 + ["b"] * 3
    assert {(r.prompt, r.max_tokens) for r in requests} == {("a", 7), ("b", 128)}
    assert {r.max_tokens for r in from_file(jobs, prompts, 9, 128, 0, {})} == {9}
    assert [request.due_s for request in requests] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "holds no prompt"),
        ("{}\n", "line 1: the field prompt"),
        ('{"prompt": "a"}\nnonsense\n', "line 2 is not JSON"),
        ('{"prompt": "a", "output_tokens": 0}\n', "line 1: output_tokens"),
    ],
)
def test_a_prompt_file_that_cannot_be_used_is_told_with_the_line(
    tmp_path: Path, content: str, why: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    with pytest.raises(PromptError, match=why):
        read_prompts(file)
