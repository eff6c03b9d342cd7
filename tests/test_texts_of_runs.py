"""Whole engines of configurations: texts side by side have the tokens that each has alone, whatever drafts."""

import io

import pytest
import torch
from hydra import compose, initialize_config_dir

from subspec.config.schema import register_schemas
from subspec.decoding.scheduler import Scheduler
from subspec.runs.console import RunConsole
from subspec.runs.loading import load, resolve
from subspec.utils.paths import conf_dir

STREAM = ["offload=stream", "offload.resident_layers=3", "offload.ram_gib=30"]
SMALL = ["draft.path=planted:tiny_draft", "quant=none"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["draft=subspec"],
        ["draft=subspec", *STREAM],
        ["draft=none", *STREAM],
        ["draft=subspec", "quant=higgs", "tree=eagle2", "tree.total_tokens=20"],
        ["draft=layer_skip"],
        ["draft=small_model", *SMALL],
        ["draft=pard", *SMALL, "draft.block=3"],
        ["draft=eagle2", "draft.path=planted", *STREAM],
        ["draft=block_head", "draft.path=planted"],
    ],
    ids=lambda overrides: " ".join(overrides[:2]),
)
def test_a_text_is_what_it_is_alone(overrides):
    register_schemas()
    shape = ["target=planted_tiny", "device=cpu", "decoding.max_length=160", "decoding.texts=3", "tree.depth=4"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", [*shape, "logger=none", "run_dir=none", *overrides])
    console = RunConsole(io.StringIO())
    config, device, _ = resolve(cfg, console)
    loaded = load(config, device, console)
    engine = loaded.assembly.engine
    assert engine.texts == 3
    scheduler, texts = Scheduler(engine, 3), []
    generator = torch.Generator().manual_seed(0)
    for number in range(5):
        prompt = torch.randint(3, 4000, (3 + 9 * number,), generator=generator).tolist()
        texts.append(scheduler.add(prompt, max_new_tokens=6 + 2 * number, ignore_eos=True))
    while not scheduler.idle:
        scheduler.step()
    for text in texts:
        alone = engine.generate(text.prompt, max_new_tokens=len(text.output.token_ids), ignore_eos=True)
        assert text.error is None
        assert text.result.token_ids == alone.token_ids
    assert max(text.beside for text in texts) > 0
    loaded.assembly.close()
