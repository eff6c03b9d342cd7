"""Prompts of a target."""

import pytest
import torch

from subspec.errors import SubspecError
from subspec.targets import Target
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


def test_chat_ids_use_the_template_and_ask_for_an_answer():
    target = make()
    ids = target.chat_ids([{"role": "user", "content": "How many eggs?"}])
    assert all(type(token) is int for token in ids)
    assert target.tokenizer.decode(ids) == (
        "<|im_start|>user\nHow many eggs?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(START_ID) == 2
    assert ids.count(END_ID) == 1


def test_chat_ids_keep_the_turns():
    target = make()
    roles = ("user", "assistant", "user")
    ids = target.chat_ids([{"role": role, "content": f"said {n}"} for n, role in enumerate(roles)])
    assert "assistant\nsaid 1<|im_end|>\n<|im_start|>user\nsaid 2" in target.tokenizer.decode(ids)


def test_chat_ids_without_a_template_join_the_contents():
    target = make(chat_template=False)
    assert not target.has_chat_template
    ids = target.chat_ids([{"role": "user", "content": "one"}, {"role": "user", "content": "two"}])
    assert ids == target.tokenizer("one\n\ntwo")["input_ids"]


def test_chat_ids_want_a_message():
    with pytest.raises(SubspecError, match="at least one message"):
        make().chat_ids([])


def test_a_template_that_refuses_is_one_line():
    target = make()
    target.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(SubspecError, match=r"refuses the roles \[user, user\]: roles must alternate"):
        target.chat_ids([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])


def test_a_template_with_the_date_gives_the_same_prompt_every_day():
    target = make()
    target.tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ date_string }}: {{ messages[0]['content'] }}"
    )
    assert target.tokenizer.decode(target.chat_ids([{"role": "user", "content": "hi"}])) == "26 Jul 2024: hi"
