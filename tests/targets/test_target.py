"""The facts a target tells about its model, and prompts."""

import dataclasses

import pytest
import torch
from transformers import MistralConfig, Qwen2Config, Qwen3Config

from subspec.errors import SubspecError
from subspec.targets import Target
from subspec.targets.target import attention_window
from tests.helpers.tiny import END_ID, FAMILIES, START_ID, tiny_model, tiny_tokenizer


def make(family="llama", *, chat_template=True, **model):
    return Target(
        name="tiny",
        model=tiny_model(family, **model),
        tokenizer=tiny_tokenizer(chat_template=chat_template),
        eos_token_ids=(END_ID,),
        dtype=torch.float32,
        device=torch.device("cpu"),
        source="made here",
        identity="made here",
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_facts_follow_the_model(family):
    target = make(family, layers=3, hidden_size=64, max_positions=256)
    assert target.family == family
    assert (target.num_layers, target.hidden_size, target.max_positions) == (3, 64, 256)
    assert target.vocab_size == 320 == target.model(torch.tensor([[1]])).logits.shape[-1]
    assert target.weight_bytes == 4 * target.num_parameters
    assert target.attention_window is None
    assert not target.planted


def test_tied_weights_count_once():
    tied, untied = make(tie=True), make(tie=False)
    assert tied.tied_embeddings
    assert not untied.tied_embeddings
    assert untied.num_parameters - tied.num_parameters == 320 * 64


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
    ids = target.chat_ids(
        [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "three"},
        ]
    )
    text = target.tokenizer.decode(ids)
    assert "assistant\ntwo<|im_end|>\n<|im_start|>user\nthree" in text


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


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (MistralConfig(sliding_window=128), 128),
        (MistralConfig(sliding_window=None), None),
        (Qwen2Config(use_sliding_window=False, sliding_window=64), None),
        (Qwen2Config(use_sliding_window=True, sliding_window=64, max_window_layers=2), 64),
        (Qwen3Config(use_sliding_window=True, sliding_window=64, max_window_layers=99), None),
    ],
)
def test_attention_window(config, window):
    assert attention_window(config) == window


def test_a_target_can_be_replaced_field_by_field():
    target = make()
    assert dataclasses.replace(target, planted=True).planted
