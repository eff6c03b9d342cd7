"""Refusals: the API's own form, the parameter's name, and no harm to others."""

import json
import re

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("openai")
import httpx
import openai

from tests.server.servers import serving

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
SAID = {"messages": [{"role": "user", "content": "a"}]}


def post(served, path, body, **headers):
    headers |= {"Content-Type": "application/json"}
    return httpx.post(f"{served.url}{path}", content=json.dumps(body), headers=headers, timeout=60)


def error_of(response, status):
    """The error of a response with ``status``, which has the API's form."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "Traceback" not in error["message"]
    return error


WRONG = {
    "max_tokens": (0, "5", 1.5, True),
    "max_completion_tokens": (-1,),
    "temperature": (-0.1, 2.5, float("nan"), "hot", 1e-9),
    "stop": ("", [1], ["a"] * 33, "a<|im_end|>"),
    "messages": ([], "a", None),
    "messages[0].role": ([{"role": "tool", "content": "a"}],),
    "messages[0].content": (
        [{"role": "user"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": "\ud800"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
    ),
    "stream_options.include_usage": ({"include_usage": 3},),
    "chat_template_kwargs": ({"enable_thinking": False},),
}
WRONG |= {"top_p": (0, 1.1), "top_k": (-1,), "seed": (-1, 0.5), "n": (2,), "stream": ("yes",), "min_p": (0.1,)}
WRONG |= {"presence_penalty": (0.5,), "frequency_penalty": (-1,), "logprobs": (True,), "logit_bias": ({"5": 1},)}
WRONG |= {"tools": ([{"type": "function"}],), "response_format": ({"type": "json_object"},)}


@pytest.mark.parametrize(("param", "value"), [(param, value) for param, values in WRONG.items() for value in values])
def test_a_wrong_value_names_its_parameter(served, param, value):
    error = error_of(post(served, CHAT, SAID | {re.split(r"\W", param)[0]: value}), 400)
    assert error["param"] == param
    assert param in error["message"]
    assert error["type"] == "invalid_request_error"


PROMPTS = (["a", "b"], [], "", {"a": 1}, [1.5], None, [9999], [-1], "\ud800")
OTHERS = {"best_of": 2, "echo": True, "suffix": "z", "logprobs": 0}


@pytest.mark.parametrize(("param", "value"), [*(("prompt", value) for value in PROMPTS), *OTHERS.items()])
def test_so_does_one_of_a_completion(served, param, value):
    assert error_of(post(served, COMPLETION, {"prompt": "a", param: value}), 400)["param"] == param


def test_values_without_effect_are_accepted(served):
    idle = {"user": "me", "n": 1, "stop": None, "seed": None, "logit_bias": {}, "tools": [], "presence_penalty": 0.0}
    idle |= {"logprobs": False, "response_format": {"type": "text"}, "metadata": {"a": "b"}, "stream": False}
    answer = post(served, CHAT, SAID | {"max_tokens": 1} | idle)
    assert answer.status_code == 200, answer.text


def test_a_prompt_that_is_too_long_says_so(served):
    long = {"messages": [{"role": "user", "content": "a b" * 600}]}
    for path, body, param in ((CHAT, long, "messages"), (COMPLETION, {"prompt": [5] * 160}, "prompt")):
        error = error_of(post(served, path, body), 400)
        assert (error["code"], error["param"]) == ("context_length_exceeded", param)
        assert "decoding.max_length" in error["message"]


def test_an_unknown_model(served):
    with pytest.raises(openai.NotFoundError) as refused:
        served.client.chat.completions.create(model="gpt-9", **SAID)
    assert (refused.value.param, refused.value.code) == ("model", "model_not_found")


def test_bodies_that_are_none(served):
    url, json_type = f"{served.url}{CHAT}", {"Content-Type": "application/json"}
    for body in (b"{", b"[]", b"", b"\xff", b"5", b"[" * 100_000):
        error_of(httpx.post(url, content=body, headers=json_type), 400)
    assert "application/json" in error_of(httpx.post(url, data={"a": "b"}), 400)["message"]
    assert error_of(httpx.get(url), 405)
    assert error_of(httpx.get(f"{served.url}/v2"), 404)
    large = (b" " * 2**20 for _ in range(6))
    assert error_of(httpx.post(url, content=large, headers=json_type), 413)


def test_an_api_key(tiny):
    with serving(tiny, api_key="sécret") as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        wrong = [{}, {"Authorization": "Bearer sécre"}, {"Authorization": "sécret"}, {"Authorization": "Basic sécret"}]
        for headers in wrong:
            headers = {name: value.encode() for name, value in headers.items()}
            for path in (CHAT, COMPLETION):
                response = httpx.post(f"{server.url}{path}", json=SAID, headers=headers)
                assert error_of(response, 401)["code"] == "invalid_api_key"
        given = {"Authorization": "Bearer sécret".encode()}
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert httpx.get(f"{server.url}/v1/models", headers=given).status_code == 200
