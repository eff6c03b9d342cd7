"""Prompts of a target."""

import pytest
import torch

from subspec.errors import ConfigError, SubspecError
from subspec.targets import Target
from subspec.targets.target import PINNED_DATE
from tests.helpers.tiny import END_ID, START_ID, tiny_model, tiny_tokenizer


def make(*, chat_template=True):
    return Target(
        name="tiny",
        model=tiny_model(),
        tokenizer=tiny_tokenizer(chat_template=chat_template),
        eos_token_ids=(END_ID,),
        dtype=torch.float32,
        device=torch.device("cpu"),
        source="made here",
        identity="made here",
    )


def test_chat_ids_use_the_template_keep_the_turns_and_ask_for_an_answer():
    target = make()
    roles = ("user", "assistant", "user")
    ids = target.chat_ids([{"role": role, "content": f"said {n}"} for n, role in enumerate(roles)])
    assert all(type(token) is int for token in ids)
    said = "".join(f"<|im_start|>{role}\nsaid {n}<|im_end|>\n" for n, role in enumerate(roles))
    assert target.tokenizer.decode(ids) == f"{said}<|im_start|>assistant\n"
    assert (ids.count(START_ID), ids.count(END_ID)) == (4, 3)


def test_chat_ids_without_a_template_join_the_contents():
    target = make(chat_template=False)
    ids = target.chat_ids([{"role": "user", "content": "one"}, {"role": "user", "content": "two"}])
    assert ids == target.tokenizer("one\n\ntwo")["input_ids"]
    with pytest.raises(SubspecError, match="at least one message"):
        target.chat_ids([])


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{% if %}",
        {"rag": "{{ messages }}", "chat": "{{ messages }}"},
    ],
)
def test_a_template_that_fails_is_one_line(template):
    target = make()
    target.tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=r"chat template of tiny fails for the roles \[user, user\]") as error:
        target.chat_ids([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("code", ["%d %b %Y", "%Y-%m-%d %H:%M:%S", "%A, %B %-d", "%I:%M %p", "%j", "%c"])
def test_a_template_with_the_date_gives_the_same_prompt_every_day(code):
    """Wherever the template asks for it: in the middle, in a macro, by keyword."""
    target, expected = make(), PINNED_DATE.strftime(code)
    target.tokenizer.chat_template = (
        f"{{%- set now = strftime_now('{code}') %}}{{% macro again() %}}{{{{ strftime_now(format='{code}') }}}}"
        "{% endmacro %}{{ now }}|{{ again() }}: {{ messages[0]['content'] }}"
    )
    text = target.tokenizer.decode(target.chat_ids([{"role": "user", "content": "hi"}]))
    assert text == f"{expected}|{expected}: hi"
