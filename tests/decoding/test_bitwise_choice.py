"""``decoding.bitwise``: what is covered, what is refused, what is recorded."""

import json

import pytest
import torch
from torch import nn

import subspec.decoding.bitwise_choice
from subspec import build_engine
from subspec.decoding.bitwise import altered
from subspec.decoding.bitwise_choice import choose_bitwise, why_not
from subspec.errors import ConfigError
from tests.helpers.cli import cli, tiny_run
from tests.helpers.tiny import tiny_checkpoint, tiny_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch):
    """A device that is not asked for more than its capability."""
    found = {"capability": (8, 6)}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found["capability"])
    return found


def test_what_is_covered(card):
    config = tiny_model("qwen2").config
    for dtype in (torch.bfloat16, torch.float16):
        assert why_not("auto", config, dtype, CUDA) == ""
        assert why_not(True, config, dtype, CUDA) == ""
        assert why_not(False, config, dtype, CUDA) == "decoding.bitwise=false"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"device": CPU}, "cpu"),
        ({"dtype": torch.float32}, "float32"),
        ({"capability": (7, 5)}, "8.0"),
        ({"activation": "gelu"}, "gelu"),
        ({"accelerate": True}, "offload=accelerate"),
    ],
)
def test_what_is_not_covered_is_named_and_refused(card, change, named):
    config = tiny_model("llama").config
    config.hidden_act = change.get("activation", "silu")
    card["capability"] = change.get("capability", (9, 0))
    dtype, device = change.get("dtype", torch.bfloat16), change.get("device", CUDA)
    options = {"accelerate": change.get("accelerate", False)}
    assert named in why_not("auto", config, dtype, device, **options)
    assert why_not(False, config, dtype, device, **options) == "decoding.bitwise=false"
    with pytest.raises(ConfigError, match=rf"decoding\.bitwise=true: .*{named}.*decoding\.bitwise=auto"):
        why_not(True, config, dtype, device, **options)


def test_a_gpu_run_that_is_not_covered_says_so(card):
    notes = []
    chosen = choose_bitwise("auto", tiny_model("llama").config, torch.float32, CUDA, notes.append)
    assert "float32" in notes[0]
    assert chosen.facts() == {"on": False, "reason": chosen.reason, "kernels": {}}
    notes.clear()
    choose_bitwise(False, tiny_model("llama").config, torch.float32, CUDA, notes.append)
    choose_bitwise("auto", tiny_model("llama").config, torch.float32, CPU, notes.append)
    assert not notes  # asked for, and as ever


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("target"), "llama", layers=1, max_positions=4096)


def test_a_run_records_it(tmp_path, checkpoint):
    folder = tmp_path / "run"
    ran = cli(*tiny_run(checkpoint, folder, samples=1), "draft=none")
    assert ran.code == 0, ran.err
    facts = json.loads((folder / "facts.json").read_text())["bitwise"]
    assert facts["on"] is False
    assert "cpu" in facts["reason"]
    assert json.loads((folder / "summary.json").read_text())["run"]["bitwise"] == facts


@pytest.mark.parametrize("value", ["true", "yes", "1", "null", "on"])
def test_values_of_the_command_line(tmp_path, checkpoint, value):
    ran = cli(*tiny_run(checkpoint, tmp_path / "run"), "draft=none", f"decoding.bitwise={value}")
    assert ran.code == 2
    assert "decoding.bitwise" in ran.error
    assert ("cpu" in ran.error) == (value == "true")


def test_the_library(monkeypatch):
    model = tiny_model("llama")
    assert build_engine(model, draft="none").target.bitwise is None
    assert build_engine(model, draft="none", bitwise=False).target.bitwise is None
    with pytest.raises(ConfigError, match="bitwise=true"):
        build_engine(model, draft="none", bitwise=True)
    for value in (None, "yes", 1):
        with pytest.raises(ConfigError, match="bitwise="):
            build_engine(model, draft="none", bitwise=value)
    # A device that is covered, as far as can be told here.
    monkeypatch.setattr(subspec.decoding.bitwise_choice, "uncovered", lambda *arguments: None)
    engine = build_engine(model.to(torch.bfloat16), draft="none")
    assert engine.target.bitwise is not None
    assert engine.target.bitwise.shapes.hidden == model.config.hidden_size


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda model: model.model.layers[1].register_forward_hook(lambda *_: None), "hooks"),
        (lambda model: model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: None), "hooks"),
        (lambda model: setattr(model.model.layers[1].mlp, "up_proj", Adapted(64, 128, bias=False)), "Linear"),
        (lambda model: setattr(model.model.layers[0], "mlp", Own(model.model.layers[0].mlp)), "decoder layer"),
        (lambda model: setattr(model, "lm_head", nn.Linear(64, 320)), "bias"),
        (lambda model: transpose(model.model.layers[0].self_attn.q_proj), "order"),
    ],
)
def test_a_model_that_computes_more_than_its_parameters_say_is_not_covered(card, change, named):
    model = tiny_model("llama")
    model(torch.tensor([[1, 2]]), output_hidden_states=True)  # leaves hooks of transformers' own
    assert altered(model) is None
    change(model)
    assert named in altered(model)
    options = {"dtype": torch.bfloat16, "device": CUDA, "loaded": model}
    assert named in why_not("auto", model.config, **options)
    with pytest.raises(ConfigError, match=named):
        why_not(True, model.config, **options)


class Adapted(nn.Linear):
    """As adapters replace Linears: the weight is the base's."""


class Own(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj


def transpose(linear):
    linear.weight = nn.Parameter(linear.weight.data.t().contiguous().t(), requires_grad=False)


def test_a_model_on_another_card_than_the_current_one_is_not_covered(card):
    reason = why_not("auto", tiny_model("llama").config, torch.bfloat16, torch.device("cuda", 1))
    assert "cuda:1" in reason


def test_a_resumed_run_does_not_mix_what_auto_came_to(tmp_path, checkpoint):
    folder = tmp_path / "run"
    assert cli(*tiny_run(checkpoint, folder, samples=1), "draft=none").code == 0
    records = folder / "records.jsonl"
    (line,) = records.read_text().splitlines()
    assert json.loads(line)["bitwise"] is False
    records.write_text(json.dumps(json.loads(line) | {"bitwise": True}) + "\n")
    again = [*tiny_run(checkpoint, folder, samples=2), "draft=none", "resume=true"]
    cli(*again).refused(2, r"decoding\.bitwise comes to false now.*are of true")
    # A record older than the field is of a run that was not.
    old = {key: value for key, value in json.loads(line).items() if key != "bitwise"}
    records.write_text(json.dumps(old) + "\n")
    assert cli(*again).code == 0
