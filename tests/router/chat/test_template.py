from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from router.chat.messages import Message, Part, template_messages
from router.chat.prompt import load_prompts
from router.chat.template import ChatTemplate, load_template
from router.chat.tokenizer import TokenizerError
from router.generation import ModelInfo
from router.refusal import Refusal
from tests.router.tiny_model import CHATML

MODEL = ModelInfo("m", 4096, 401)
CHAT = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": "Größe? 🙂\n"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "{{ 1 + 1 }}"},
]
LOOPS = (
    "{%- for message in messages %}\n    {%- if message.role == 'system' %}{% continue %}{% endif %}\n"
    "    {% generation %}[{{ message.content | tojson }}]{% endgeneration %}\n{%- endfor %}\n"
    "{{ eos_token }}{{ {'b': 1, 'a': 'é<'} | tojson(indent=2, sort_keys=true) }}{{ strftime_now('%Y') }}"
    "{% if tools is none %}{{ messages[0]['content'].split('&')[0] | trim }}{% endif %}"
)


@pytest.mark.parametrize("source", [CHATML, LOOPS])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_renders_as_transformers_does(
    byte_level_path: Path, source: str, add_generation_prompt: bool
) -> None:
    theirs = AutoTokenizer.from_pretrained(byte_level_path)
    ours = ChatTemplate(source, {"bos_token": theirs.bos_token, "eos_token": theirs.eos_token})
    assert ours.render(CHAT, add_generation_prompt=add_generation_prompt) == theirs.apply_chat_template(
        CHAT, chat_template=source, tokenize=False, add_generation_prompt=add_generation_prompt
    )


async def test_prompt_ids_are_those_of_transformers(byte_level_path: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(byte_level_path)
    prompts = load_prompts(byte_level_path)
    messages = [Message(**message) for message in CHAT]
    ids = await prompts.of_chat(messages, MODEL)
    assert ids == theirs.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    long = [Message(role="user", content="turbine " * 2000)]  # encoded in a thread
    assert (
        await prompts.of_chat(long, MODEL)
        == (
            theirs.apply_chat_template(
                [{"role": "user", "content": "turbine " * 2000}], add_generation_prompt=True
            )["input_ids"]
        )
    )


def test_sources_of_the_template(tmp_path: Path) -> None:
    assert load_template(tmp_path, {}) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one"}))
    assert load_template(tmp_path, {}).render([]) == "one"  # type: ignore[union-attr]
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "two"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert load_template(tmp_path, {}).render([]) == "two"  # type: ignore[union-attr]
    (tmp_path / "chat_template.jinja").write_text("three")
    assert load_template(tmp_path, {}).render([]) == "three"  # type: ignore[union-attr]
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(TokenizerError, match="does not compile"):
        load_template(tmp_path, {})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].nothing.here }}", "no attribute"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for i in range(1000000) %}x{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}", "more than 1000 characters"),
    ],
)
def test_what_a_template_may_not_do_is_the_requests_error(source: str, message: str) -> None:
    with pytest.raises(Refusal, match=message) as refused:
        ChatTemplate(source, {}).render([{"role": "user", "content": "hi"}], max_chars=1000)
    assert refused.value.status == 400
    assert refused.value.param == "messages"


def test_rendering_ends_in_time() -> None:
    slow = "{% for i in range(99999) %}{% for j in range(99999) %}{{ '' }}.{% endfor %}{% endfor %}"
    with pytest.raises(Refusal, match="takes more than"):
        ChatTemplate(slow, {}).render([], max_chars=10**12, timeout_s=0.05)


def test_text_parts_are_joined() -> None:
    message = Message(role="user", content=[Part("text", "a"), Part("text", "b")])
    assert template_messages([message], 10) == [{"role": "user", "content": "a\nb"}]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (Message(role="user", content=[Part("text", "a"), Part("image_url")]), "messages[0].content[1].type"),
        (Message(role="user", content=[Part("text")]), "messages[0].content[0].text"),
        (Message(role="user"), "messages[0].content"),
        (Message(role="user", content=[]), "messages[0].content"),
        (Message(role="king", content="x"), "messages[0].role"),
        (Message(role="tool", content="x"), "messages[0].role 'tool'"),
        (Message(role="assistant", content="x", tool_calls=[{}]), "messages[0].tool_calls"),
    ],
)
def test_refusals_name_the_field(message: Message, param: str) -> None:
    with pytest.raises(Refusal) as refused:
        template_messages([message], 10)
    assert refused.value.param == param
    assert param in refused.value.message


async def test_what_cannot_fit_is_refused_before_it_is_encoded(byte_level_path: Path) -> None:
    prompts = load_prompts(byte_level_path)
    with pytest.raises(Refusal, match=r"at least \d{5} tokens") as refused:
        await prompts.of_text("a" * 10**6, ModelInfo("m", 100, 401), "prompt")
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(Refusal, match="messages cannot fit"):
        await prompts.of_chat([Message(role="user", content="")] * 101, ModelInfo("m", 100, 401))
