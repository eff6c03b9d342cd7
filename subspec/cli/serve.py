"""``python -m subspec.serve``: a target behind the OpenAI API.

Modules that import torch are imported after the command line has been checked.
"""

import os
import sys
from collections.abc import Sequence
from ipaddress import ip_address
from typing import TYPE_CHECKING

from subspec.config.guard import guarded
from subspec.errors import ConfigError, SubspecError

if TYPE_CHECKING:
    from subspec.config.schema import ServeConfig

HELP = """\
Serve a model: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics.

usage: python -m subspec.serve [KEY=VALUE ...]

  python -m subspec.serve
  python -m subspec.serve target=hub target.path=FOLDER offload=stream offload.vram_gib=8 decoding.texts=8
  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
       -d '{"messages": [{"role": "user", "content": "What is a tree?"}]}'

  serve.host=127.0.0.1   address to listen at; 0.0.0.0: all of this machine's
  serve.port=8000        0: any free port
  serve.queue=64         requests that may wait beside those that run; others are refused with status 503
  serve.api_key=KEY      that requests must bring; better in the environment, as SUBSPEC_API_KEY

Groups and keys of target, draft, quant, tree, offload and decoding are those of `python -m subspec.run` (its --help
lists them). decoding.texts run at a time (default here: auto). decoding.max_new_tokens, stop, temperature, top_p and
top_k count where a request names none (max_new_tokens is null here: until decoding.max_length). Ctrl-C finishes what
runs and refuses what is new; a second Ctrl-C ends at once.
"""

INSTALL = "pip install 'subspec[serve]'; in a checkout: pip install -c constraints.txt -e '.[serve]'"
KEY_VARIABLE = "SUBSPEC_API_KEY"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m subspec.serve``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(guarded(lambda: _main(arguments)))


def serve_config(arguments: Sequence[str]) -> "ServeConfig":
    """The keys of ``serve``, which a run does not have.

    Raises:
        ConfigError: a value out of range. OmegaConfBaseException: no such key, or another type.
    """
    from omegaconf import OmegaConf

    from subspec.config.checks import check_ranges
    from subspec.config.schema import ServeConfig

    cfg = OmegaConf.create({"serve": OmegaConf.structured(ServeConfig)})
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ConfigError(f"{key}: give it a value, {key}=VALUE")
        OmegaConf.update(cfg, key, None if value == "null" else value)  # as typed: a key of digits is a text
    serve = OmegaConf.to_object(cfg)["serve"]
    check_ranges({"serve": serve})
    serve.api_key = serve.api_key or os.environ.get(KEY_VARIABLE) or None
    return serve


def _main(arguments: list[str]) -> None:
    if "--help" in arguments or "-h" in arguments:
        print(HELP, end="")
        return
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    own = [argument for argument in arguments if argument.startswith("serve.")]
    serve = serve_config(own)
    from subspec.cli.compose import compose_config, loaded_target

    others = [argument for argument in arguments if argument not in own]
    cfg = compose_config(others, ["decoding.max_new_tokens=null", "decoding.texts=auto"])
    from subspec.quant.optional_package import import_problem

    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if problem := import_problem(package, INSTALL, package):
            raise SubspecError(problem)
    from subspec.decoding.scheduler import Scheduler
    from subspec.runs.console import RunConsole
    from subspec.server.server import Server, listen
    from subspec.server.worker import Worker

    console = RunConsole()
    with listen(serve) as listening, loaded_target(cfg, console, any_sampling=True) as (config, loaded):
        engine = loaded.assembly.engine
        scheduler = Scheduler(engine, engine.texts)
        server = Server(loaded.target, Worker(scheduler), config.decoding, serve)
        host, port, *_ = listening.getsockname()
        console.note(f"{loaded.target.name}, {loaded.target.source}")
        if serve.api_key is None and not ip_address(host.partition("%")[0]).is_loopback:
            console.warn(f"serve.host={serve.host} without serve.api_key: anybody may use the model")
        console.note(f"listening: http://{f'[{host}]' if ':' in host else host}:{port}/v1; Ctrl-C ends")
        server.run(listening, console.note)
