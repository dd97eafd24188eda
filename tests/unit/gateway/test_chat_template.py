"""Templates as models ship them, and what they may not do."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from fastserve.gateway.chat_template import ChatTemplate, TemplateRefusedError, template_source
from fastserve.gateway.tokenizer import Tokenizer

HI = [{"role": "user", "content": "Hi"}]


def render(source: str, messages: list[dict[str, str]] = HI, **options: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(
        messages, **options
    )


def test_the_default_model(default_model_folder: Path, default_tokenizer: Tokenizer) -> None:
    source = template_source(default_model_folder, {})
    assert source is not None
    messages = [{"role": "system", "content": "Be brief."}, *HI]
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert render(source, messages, add_generation_prompt=False) == expected
    assert render(source, messages) == f"{expected}<|im_start|>assistant\n"

    # The role marks become single tokens: nothing is added, nothing is escaped.
    im_start, im_end = 1, 2
    ids = default_tokenizer.encode_chat(messages)
    assert ids == default_tokenizer.encode(
        f"{expected}<|im_start|>assistant\n", add_special_tokens=False
    )
    assert (ids.count(im_start), ids.count(im_end)) == (3, 2)


def test_text_of_messages_is_data_not_template() -> None:
    text = "{{ bos_token }}{% raise %}<b>&amp;'\"\n"
    assert render("{{ messages[0].content }}", [{"role": "user", "content": text}]) == text


def test_blocks_leave_no_white_space() -> None:
    source = """{{ bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
[{{ message['content'] }}]
    {% endif %}
{% endfor %}
end"""
    assert render(source) == "<s>[Hi]\nend"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ eos_token }}", "</s>"),
        ("{{ unk_token }}", ""),  # this tokenizer has none
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hi"}]'),
        ("{{ '<é>' | tojson }}", '"<é>"'),
        ("{{ '<é>' | tojson(ensure_ascii=true) }}", '"<\\u00e9>"'),
        ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}", '{"a":2,"b":1}'),
        ("{{ [1] | tojson(indent=1) }}", "[\n 1\n]"),
        ("{% generation %}{{ messages[0].role }}{% endgeneration %}", "user"),
        (
            "{% for at in range(9) %}{% if at == 2 %}{% break %}{% endif %}{{ at }}{% endfor %}",
            "01",
        ),
        ("{% if tools is none and documents is none %}none{% endif %}", "none"),
        ("{% if tools %}tools{% else %}no tools{% endif %}", "no tools"),
        ("{% if add_generation_prompt %}go{% endif %}", "go"),
        ("{% set ns = namespace(n=0) %}{% set ns.n = 3 %}{{ ns.n }}", "3"),
    ],
)
def test_what_templates_are_written_for(source: str, expected: str) -> None:
    assert render(source) == expected


def test_date() -> None:
    year = render("{{ strftime_now('%Y') }}")
    assert abs(int(year) - datetime.now().year) <= 1  # the test may run at midnight


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ messages[0].__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ strftime_now.__globals__['datetime'] }}",
        "{{ cycler.__init__.__globals__.os.popen('true') }}",
        "{% include 'tokenizer.json' %}",
    ],
)
def test_templates_cannot_leave_the_sandbox(source: str) -> None:
    with pytest.raises(TemplateRefusedError):
        render(source)


def test_a_template_cannot_change_the_messages_of_the_request() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(TemplateRefusedError):
        render("{{ messages[0].clear() }}", messages)
    assert messages == HI


def test_the_template_says_why_it_refuses() -> None:
    source = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    with pytest.raises(TemplateRefusedError, match=r"^system first$"):
        render(source)
    assert render(source, [{"role": "system", "content": ""}]) == ""


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[5].content }}",
        "{{ messages[0].missing.deeper }}",
        "{{ 1 + messages[0].content }}",
        "{{ 1 / 0 }}",
        "{{ range(10 ** 9) | length }}",
        "{{ messages | map('nothing') | list }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ 'x'.encode('no such codec') }}",
        "{{ strftime_now(5) }}",
    ],
)
def test_templates_that_fail_on_messages_refuse_them(source: str) -> None:
    with pytest.raises(TemplateRefusedError):
        render(source)


@pytest.mark.parametrize("source", ["{% if %}", "{{ x", "{% nothing %}", "{{ x | nothing }}"])
def test_a_broken_template_is_refused_at_once(source: str) -> None:
    with pytest.raises(ValueError, match="template is broken"):
        ChatTemplate(source, {})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"chat_template": "plain"}, "plain"),
        (
            {
                "chat_template": [
                    {"name": "tool_use", "template": "tools"},
                    {"name": "default", "template": "of several"},
                ]
            },
            "of several",
        ),
        ({"chat_template": [{"name": "tool_use", "template": "tools"}]}, None),
    ],
)
def test_where_the_template_is(tmp_path: Path, config: dict[str, Any], expected: str) -> None:
    assert template_source(tmp_path, config) == expected
    (tmp_path / "chat_template.jinja").write_text("a file é", encoding="utf-8")
    assert template_source(tmp_path, config) == "a file é"


def test_special_tokens_come_from_the_folder(tmp_path: Path, default_model_folder: Path) -> None:
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).symlink_to(default_model_folder / name)
    config = {
        "bos_token": {"content": "<|im_start|>", "lstrip": False},
        "eos_token": "<|im_end|>",
        "chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode_chat(HI) == [1, *tokenizer.encode("Hi"), 2]
