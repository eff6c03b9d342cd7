"""Answers of the two endpoints, whole and streamed, against the engine's own."""

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("openai")
import httpx
import openai

from subspec.decoding.result import FinishReason

SAID = [{"role": "user", "content": "How many eggs?"}]
GREEDY, SAMPLED = {"temperature": 0}, {"temperature": 0.9, "top_p": 0.9, "seed": 5}


def streamed(client, kind, **body):
    """The pieces of a stream's text, its finish reason, and its last chunk with a choice."""
    pieces, reason, last = [], None, None
    with kind(client).create(**body, stream=True) as stream:
        for chunk in stream:
            (choice,) = chunk.choices
            pieces.append(choice.text if hasattr(choice, "text") else choice.delta.content or "")
            reason, last = choice.finish_reason or reason, chunk
    return pieces, reason, last


def completions(client):
    return client.completions


def chats(client):
    return client.chat.completions


@pytest.mark.parametrize("body", [GREEDY, SAMPLED, GREEDY | {"stop": ["ed", "qzx"]}], ids=["greedy", "sampled", "stop"])
def test_a_completion_is_the_engines_own(tiny, served, body):
    body = {"prompt": "The quick brown fox", "max_tokens": 40} | body
    own = tiny.single(body)
    answer = served.client.completions.create(model=served.model, **body)
    pieces, reason, last = streamed(served.client, completions, model=served.model, **body)
    (choice,) = answer.choices
    assert choice.text == own.text == "".join(pieces)
    assert len(pieces) > 3
    expected = "stop" if own.finish_reason is FinishReason.stop else "length"
    assert choice.finish_reason == reason == expected
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (own.stats.prompt_tokens, len(own.token_ids))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    for figures in (answer.metrics["speculative_decoding"], last.metrics["speculative_decoding"]):
        assert figures["num_spec_steps"] <= len(own.token_ids) - 1
        assert figures["num_draft_tokens"] >= figures["num_accepted_draft_tokens"] > 0
        assert figures["mean_acceptance_length"] > 1
        assert sum(figures["acceptance_histogram"]) == figures["num_spec_steps"]
        assert 0 < figures["draft_acceptance_rate"] <= 1


def test_a_chat_is_what_the_template_makes_of_it(tiny, served):
    ids = tiny.loaded.target.chat_ids(SAID)
    body = {"model": served.model, "max_completion_tokens": 12, "temperature": 0}
    parts = [{"role": "user", "content": [{"type": "text", "text": SAID[0]["content"]}]}]
    whole = served.client.chat.completions.create(messages=parts, **body)
    by_ids = served.client.completions.create(prompt=ids, model=served.model, max_tokens=12, temperature=0)
    pieces, reason, _ = streamed(served.client, chats, messages=SAID, **body)
    (choice,) = whole.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == by_ids.choices[0].text == "".join(pieces)
    assert choice.finish_reason == reason == "length"
    assert whole.usage.prompt_tokens == len(ids)
    assert whole.id.startswith("chatcmpl-")


def test_a_stream_ends_with_usage_where_it_is_asked_for(served):
    body = {"model": served.model, "messages": SAID, "max_tokens": 5, "stream": True}
    *chunks, last = served.client.chat.completions.create(**body, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage.completion_tokens == 5
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    text = httpx.post(f"{served.url}/v1/chat/completions", json=body).text
    assert text.endswith("data: [DONE]\n\n")
    assert '"usage"' not in text


def test_seeds_repeat_samples(served):
    def text(**body):
        answer = served.client.completions.create(
            model=served.model, prompt="a", max_tokens=12, temperature=1.5, **body
        )
        return answer.choices[0].text

    assert text(seed=1) == text(seed=1)
    assert len({text(seed=1), text(seed=2), text(seed=3)}) > 1
    assert len({text(), text(), text()}) > 1  # without a seed, one is drawn


def test_an_answer_without_a_limit_goes_on_to_the_servers(served):
    answer = served.client.completions.create(
        model=served.model, prompt="ab", temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage.total_tokens == 160
    assert answer.choices[0].finish_reason == "length"


def test_what_a_request_leaves_out_is_the_servers(tiny, served, monkeypatch):
    monkeypatch.setattr(served.service.decoding, "max_new_tokens", 6)
    monkeypatch.setattr(served.service.decoding, "stop", ["q"])
    answer = served.client.completions.create(model=served.model, prompt="The quick brown fox")
    own = tiny.single({"prompt": "The quick brown fox", "max_tokens": 6, "stop": ["q"]})
    assert answer.choices[0].text == own.text


def test_the_model_is_listed(served):
    (card,) = served.client.models.list().data
    assert card.id == served.model == served.client.models.retrieve(served.model).id
    assert card.max_model_len == 160
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("another")


def test_health_and_metrics(served):
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    assert "/v1/chat/completions" in httpx.get(f"{served.url}/openapi.json").json()["paths"]
    before = figures(served)
    served.client.completions.create(model=served.model, prompt="ab", max_tokens=7, temperature=0)
    after = figures(served)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["subspec_generation_tokens_total"] == 7
    assert grown["subspec_prompt_tokens_total"] == 2
    assert grown['subspec_request_success_total{finished_reason="length"}'] == 1
    assert 0 < grown["subspec_spec_decode_num_drafts_total"] <= 6
    assert grown["subspec_spec_decode_num_draft_tokens_total"] > 0
    assert grown["subspec_time_to_first_token_seconds_count"] == 1
    assert after["subspec_num_requests_running"] == after["subspec_num_requests_waiting"] == 0


def figures(served):
    """The values of the page for Prometheus."""
    page = httpx.get(f"{served.url}/metrics").text
    lines = [line.rpartition(" ") for line in page.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}
