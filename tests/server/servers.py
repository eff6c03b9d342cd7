"""Servers of a tiny target on the loopback interface, in threads of the test's process."""

import threading
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import openai

from subspec.cli.compose import compose_config, loaded_target
from subspec.config.schema import ServeConfig
from subspec.decoding.sampling import Sampling
from subspec.decoding.scheduler import Scheduler
from subspec.runs.console import RunConsole
from subspec.server.server import Server, listen
from subspec.server.worker import Worker


@contextmanager
def target_of(*overrides):
    """A loaded target, and ``single(body)``: the answer of another engine to the parameters of a request alone."""
    cfg = compose_config(
        [
            *overrides,
            "device=cpu",
            "decoding.max_new_tokens=null",
            "decoding.max_length=160",
            "tree.depth=4",
            "tree.min_depth=1",  # drafts even where plain decoding of so small a target is faster
        ]
    )
    console = RunConsole()
    with loaded_target(cfg, console) as (config, loaded), loaded_target(cfg, console) as (_, other):

        def single(body):
            engine = other.assembly.engine
            engine.sampler.sampling = Sampling(body.get("temperature", 0.0), top_p=body.get("top_p", 1.0))
            return engine.generate(
                other.target.tokenizer(body["prompt"])["input_ids"],
                max_new_tokens=body.get("max_tokens"),
                stop=body.get("stop", ()),
                seed=body.get("seed", 0),
            )

        yield SimpleNamespace(config=config, loaded=loaded, engine=loaded.assembly.engine, single=single)


@contextmanager
def serving(tiny, *, texts=4, queue=64, api_key=None):
    """A server; its ``client`` does not repeat requests that are refused."""
    serve = ServeConfig(port=0, queue=queue, api_key=api_key)
    worker = Worker(Scheduler(tiny.engine, texts))
    server = Server(tiny.loaded.target, worker, replace(tiny.config.decoding), serve)
    listening = listen(serve)
    threads = [threading.Thread(target=worker.run), threading.Thread(target=server.serve_http, args=[listening])]
    for thread in threads:
        thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=api_key or "none", max_retries=0, timeout=60)
    try:
        yield SimpleNamespace(
            url=url, client=client, service=server.service, model=tiny.loaded.target.name, server=server
        )
    finally:
        client.close()
        server.http.should_exit = True
        for thread in threads:
            thread.join(30)
