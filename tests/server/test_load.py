"""Many requests at once: nothing is lost, places are freed, and no request harms another."""

import asyncio
from itertools import cycle

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("openai")
import httpx
import openai

from tests.helpers.cli import until
from tests.server.servers import serving

PROMPTS = ["The quick brown fox", "a", "There are 12 eggs", "def add(first, second):"]
BODIES = [
    {"prompt": prompt, "max_tokens": tokens, **extra}
    for prompt, tokens in zip(PROMPTS * 2, (3, 14, 1, 6, 20, 5, 2, 9), strict=True)
    for extra in ({"temperature": 0}, {"temperature": 0.8, "top_p": 0.9, "seed": tokens})
]
MALFORMED = [{"prompt": "a", "max_tokens": 0}, {"prompt": [9999]}, {"prompt": "a" * 999}, {"messages": 1}, {}]


def test_two_hundred_requests(tiny):
    """A third goes away in the middle, an eighth is malformed; the others' texts are those of single runs."""
    expected = [tiny.single(body).text for body in BODIES]
    with serving(tiny, texts=4, queue=200) as server:
        kinds = [kind for kind, _ in zip(cycle("wsgwsgmw"), range(200), strict=False)]

        async def whole(client, number):
            answer = await client.completions.create(model=server.model, **BODIES[number])
            return answer.choices[0].text == expected[number]

        async def stream(client, number):
            chunks = await client.completions.create(model=server.model, stream=True, **BODIES[number])
            return "".join([chunk.choices[0].text async for chunk in chunks]) == expected[number]

        async def gone(client, number):
            body = {"model": server.model, **BODIES[number], "max_tokens": 60}
            if number % 3 == 0:  # while it waits, or is read
                with pytest.raises(openai.APITimeoutError):
                    await client.completions.create(**body, timeout=0.05)
                return True
            async for _ in (chunks := await client.completions.create(**body, stream=True)):
                await chunks.close()
                break
            return True

        async def malformed(client, number):
            with pytest.raises(openai.BadRequestError):
                await client.post("/completions", body=MALFORMED[number % len(MALFORMED)], cast_to=object)
            return True

        async def all_of_them():
            calls = {"w": whole, "s": stream, "g": gone, "m": malformed}
            options = {"base_url": f"{server.url}/v1", "api_key": "none", "max_retries": 0, "timeout": 120}
            async with openai.AsyncOpenAI(**options) as client:
                tasks = (calls[kind](client, number % len(BODIES)) for number, kind in enumerate(kinds))
                return await asyncio.gather(*tasks)

        assert all(asyncio.run(all_of_them()))
        until(lambda: server.service.taken == 0 and server.server.worker.scheduler.idle)
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_full_queue_refuses_and_a_client_that_leaves_frees_its_place(tiny):
    with serving(tiny, texts=1, queue=1) as server:
        create = server.client.completions.create
        long = {"model": server.model, "prompt": "a", "stream": True, "extra_body": {"ignore_eos": True}}
        running = create(**long)
        next(iter(running))
        waiting = create(**long)
        with pytest.raises(openai.InternalServerError) as refused:
            create(model=server.model, prompt="a", max_tokens=1)
        assert (refused.value.status_code, refused.value.code) == (503, "queue_full")
        assert int(refused.value.response.headers["Retry-After"]) >= 1
        waiting.close()
        running.close()
        until(lambda: server.service.taken == 0)
        assert create(model=server.model, prompt="a", max_tokens=1).usage.completion_tokens == 1
        page = httpx.get(f"{server.url}/metrics").text
        assert 'finished_reason="abort"} 2.0' in page
        assert 'request_refused_total{status="503"} 1.0' in page


def test_a_text_that_fails_ends_alone(tiny, monkeypatch):
    """Before its answer has begun with status 500, and later as an event of the stream."""
    with serving(tiny) as server:
        add = server.server.worker.scheduler.add

        def failing(*, on_tokens, **arguments):
            def tell(tokens, text):
                on_tokens(tokens, text)
                if arguments["seed"] == 13:
                    raise ValueError("broken")

            return add(on_tokens=tell, **arguments)

        monkeypatch.setattr(server.server.worker.scheduler, "add", failing)
        create = server.client.completions.create
        with pytest.raises(openai.InternalServerError):
            create(model=server.model, prompt="a", max_tokens=5, seed=13)
        with pytest.raises(openai.APIError):
            list(create(model=server.model, prompt="a", max_tokens=5, seed=13, stream=True))
        assert create(model=server.model, prompt="a", max_tokens=5).usage.completion_tokens == 5


def test_an_engine_that_fails_ends_the_server(tiny, monkeypatch):
    with serving(tiny) as server:
        monkeypatch.setattr(server.server.worker.scheduler, "step", lambda: 1 / 0)
        monkeypatch.setattr("threading.excepthook", lambda _: None)
        with pytest.raises(openai.InternalServerError):
            server.client.completions.create(model=server.model, prompt="a", max_tokens=5)
        assert httpx.get(f"{server.url}/health").status_code == 503
        with pytest.raises(openai.InternalServerError) as refused:
            server.client.completions.create(model=server.model, prompt="a", max_tokens=5)
        assert refused.value.status_code == 503
