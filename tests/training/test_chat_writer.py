"""Conversations side by side: each row is what the target would have written alone."""

import pytest
import torch
from training.chat_writer import ChatFrame, ChatWriter, Start

from subspec.errors import SubspecError
from tests.helpers.tiny import END_ID, START_ID, tiny_model, tiny_tokenizer

FAMILIES = ["llama", "qwen2", "qwen3"]


def writer_and_starts(family="llama", *, length=80, rows=4, **options):
    tokenizer, model = tiny_tokenizer(), tiny_model(family, seed=3)
    frame = ChatFrame.of(tokenizer)
    texts = ["Why?", "Write a much longer first message than the others do.", "Name two eggs."]
    asked = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True).input_ids
        for text in texts
    ]
    starts = [Start(tuple(ids), True) for ids in asked] + [Start(frame.opening, False)] * (rows - 3)
    return ChatWriter(model, frame, rows=rows, length=length, **options), starts, model


def test_the_frame_rebuilds_the_chat_template():
    tokenizer = tiny_tokenizer()
    frame = ChatFrame.of(tokenizer)

    built, messages = [*frame.opening], []
    turns = (("user", "one", "to_assistant"), ("assistant", "two", "to_user"), ("user", "3", "to_assistant"))
    for role, said, then in turns:
        built += [*tokenizer(said, add_special_tokens=False)["input_ids"], frame.end, *getattr(frame, then)]
        messages.append({"role": role, "content": said})
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(built) == text
    assert frame.end == END_ID
    assert START_ID in frame.forbidden


def test_a_tokenizer_without_template_is_refused():
    with pytest.raises(SubspecError, match="chat template"):
        ChatFrame.of(tiny_tokenizer(chat_template=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_rows_are_what_the_model_writes_alone(family):
    writer, starts, model = writer_and_starts(family)
    ids, learn = writer.write(starts, [0.0] * 4, seed=0)
    for row in range(3):
        assert learn[row].any()
        # Every learnt token is the argmax after everything before it, in a plain forward pass of the row alone.
        best = model(input_ids=ids[row : row + 1]).logits[0].argmax(dim=-1)
        at = learn[row].nonzero()[:, 0]
        assert torch.equal(ids[row][at], best[at - 1])
        # The prompt was given, and the answer begins right behind it.
        given = len(starts[row].ids)
        assert ids[row, :given].tolist() == list(starts[row].ids)
        assert not learn[row, :given].any()
        assert learn[row, given]
    generated = model.generate(ids[:1, : len(starts[0].ids)], max_new_tokens=8, do_sample=False)[0]
    assert torch.equal(ids[0, : len(generated)], generated)


def test_turns_alternate_and_long_ones_are_cut():
    writer, starts, _ = writer_and_starts(length=120, max_answer=5, max_question=7)
    frame = writer.frame
    ids, learn = writer.write(starts, [0.0, 0.0, 1.0, 1.0], seed=1)
    for row in range(4):
        text, mask = ids[row].tolist(), learn[row].tolist()
        at, assistant, turns = len(starts[row].ids), starts[row].assistant, 0
        while True:
            most = 5 if assistant else 7
            end = next((i for i in range(at, len(text)) if text[i] == frame.end), None)
            if end is None:
                assert mask[at:] == [assistant] * (len(text) - at)
                break
            assert end - at <= most
            assert mask[at:end] == [assistant] * (end - at)
            # An end that was forced is nothing to learn.
            assert mask[end] == (assistant and end - at < most)
            follow = list(frame.to_user if assistant else frame.to_assistant)[: len(text) - end - 1]
            assert text[end + 1 : end + 1 + len(follow)] == follow
            assert not any(mask[end + 1 : end + 1 + len(follow)])
            at, assistant, turns = end + 1 + len(follow), not assistant, turns + 1
            if at >= len(text):
                break
        assert turns >= 4
    assert not learn[:, :1].any()


def test_only_the_seed_decides_and_users_write_no_special_tokens():
    writer, starts, _ = writer_and_starts(length=110, max_question=40)
    first = writer.write(starts, [0.9] * 4, seed=5)
    again = writer.write(starts, [0.9] * 4, seed=5)
    other = writer.write(starts, [0.9] * 4, seed=6)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    # The row that starts with the user: no special token before the turn ends.
    text = first[0][3].tolist()[len(starts[3].ids) :]
    said = text[: text.index(END_ID)]
    assert said
    assert not set(said) & set(writer.frame.forbidden)


def test_samples_follow_the_temperature():
    # One step of many rows: the frequencies are the softmax of the logits at that temperature.
    model, tokenizer = tiny_model(seed=2, std=0.05), tiny_tokenizer()
    frame, rows = ChatFrame.of(tokenizer), 2000
    start = Start((5, 6, 7), True)
    writer = ChatWriter(model, frame, rows=rows, length=4)
    for warmth in (0.3, 1.0):
        ids, _ = writer.write([start] * rows, [warmth] * rows, seed=0)
        counts = torch.bincount(ids[:, 3], minlength=320).float()
        expected = torch.softmax(model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1] / warmth, -1) * rows
        large = expected > 5
        chi = ((counts - expected)[large] ** 2 / expected[large]).sum()
        degrees = int(large.sum()) - 1
        assert chi < degrees + 5 * (2 * degrees) ** 0.5
