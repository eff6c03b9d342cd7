"""Launches that overlap: what is handed to the driver, and the rule that makes them safe."""

import ast
import ctypes
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from subspec.kernels import launch

CONSTANTS = {"weight", "bias", "inverse_frequency", "q_norm", "k_norm"}
"""Arguments of a level's kernels that no kernel writes."""


def test_the_structures_are_those_of_the_driver():
    """Sizes and places in cuda.h of CUDA 13 on a 64-bit machine."""
    assert ctypes.sizeof(launch._Config) == 56
    assert ctypes.sizeof(launch._Attribute) == 72
    places = [getattr(launch._Config, name).offset for name in ("shared", "stream", "attributes", "count")]
    assert places == [24, 32, 40, 48]
    assert launch._Attribute.value.offset == 8


def test_an_overlapping_launch_says_so_to_the_driver(monkeypatch):
    seen = {}

    def launch_kernel(config, function, pointers, extra):
        config = config._obj
        seen["grid"], seen["block"], seen["shared"] = tuple(config.grid), tuple(config.block), config.shared
        seen["stream"], seen["function"] = config.stream, function
        seen["attributes"] = [(config.attributes[i].id, config.attributes[i].value[0]) for i in range(config.count)]
        seen["pointer"] = ctypes.cast(pointers[0], ctypes.POINTER(ctypes.c_void_p))[0]
        seen["integer"] = ctypes.cast(pointers[1], ctypes.POINTER(ctypes.c_int))[0]
        return 0

    library = SimpleNamespace(cuLaunchKernelEx=launch_kernel)
    monkeypatch.setattr(torch.cuda._utils, "_get_gpu_runtime_library", lambda: library)
    monkeypatch.setattr(launch, "_stream", lambda: 4711)
    tensor = torch.zeros(3)
    kernel = SimpleNamespace(func="function")
    with launch.overlapping(True):
        launch.launch(kernel, (7, 2, 1), 256, [tensor, -5])
    assert not launch.is_overlapping()
    assert seen == {
        "grid": (7, 2, 1),
        "block": (256, 1, 1),
        "shared": 0,
        "stream": 4711,
        "function": "function",
        "attributes": [(6, 1)],  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        "pointer": tensor.data_ptr(),
        "integer": -5,
    }


def test_otherwise_the_launch_is_pytorchs():
    calls = []
    launch.launch(lambda **options: calls.append(options), (3, 1, 1), 64, [1, 2])
    assert calls == [{"grid": (3, 1, 1), "block": (64, 1, 1), "args": [1, 2]}]


def test_a_cpu_overlaps_nothing():
    assert launch.problem(torch.device("cpu")) == "no CUDA device"
    pytest.importorskip("triton")
    from tests.levels.test_captured_draft import fused_draft, model_of

    draft = fused_draft(model_of("llama", "cpu", layers=1), torch.device("cpu"))
    assert not draft.overlap
    assert draft.launches == "in order (no CUDA device)"
    with pytest.raises(ValueError, match="overlapping launches: no CUDA device"):
        type(draft)(draft.model, overlap=True)


def test_levels_overlap_where_the_device_can_unless_they_are_told(monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert launch.how(device) == launch.how(device, True) == "overlapping"
    assert launch.how(device, False) == "in order (switched off)"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert launch.how(device) == "in order (needs compute capability 9.0 (Hopper) or later)"
    assert launch.how(device, False) == "in order (switched off)"
    with pytest.raises(ValueError, match=r"overlapping launches: needs compute capability 9\.0"):
        launch.how(device, True)


def loads_and_stores(function):
    """Lines and pointers' names of a Triton kernel's memory accesses."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = ast.unparse(node.func)
            if name in ("tl.load", "tl.store") or name.startswith("tl.atomic"):
                yield node.lineno, name, {n.id for n in ast.walk(node.args[0]) if isinstance(n, ast.Name)}


def calls_of(function, name):
    return [
        node.lineno
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == f"tl.extra.cuda.{name}"
    ]


def test_every_kernel_of_a_level_waits_before_it_touches_what_others_write():
    source = Path(launch.__file__).with_name("level.py").read_text(encoding="utf-8")
    kernels = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and "OVERLAP" in [argument.arg for argument in node.args.args]
    ]
    assert len(kernels) >= 8
    for kernel in kernels:
        waits = calls_of(kernel, "gdc_wait")
        if kernel.name == "embed_rows":  # the first one, launched the ordinary way
            assert not waits
            continue
        assert len(waits) == 1, kernel.name
        for line, name, pointers in loads_and_stores(kernel):
            assert line > waits[0] or (name == "tl.load" and pointers & CONSTANTS), (kernel.name, line)


@pytest.mark.gpu
def test_a_level_that_overlaps_gives_the_same_tree_and_cache():
    pytest.importorskip("triton")
    from subspec.decoding.engine import Engine
    from subspec.decoding.target_model import TargetModel
    from subspec.decoding.tree_policy import Beam
    from tests.helpers.drafts import begin, grow
    from tests.levels.test_captured_draft import PROMPT, fused_draft, model_of

    device = torch.device("cuda")
    if reason := launch.problem(device):
        pytest.skip(reason)
    model = model_of("qwen2", device, hidden_size=512, intermediate_size=1024, vocab_size=5000)
    policy = Beam(12, 6)
    results = []
    for overlap in (False, True):
        draft = fused_draft(model, device, overlap=overlap)
        engine = Engine(TargetModel(model), draft, policy, max_length=128, prefill_chunk=16)
        with torch.inference_mode():
            root = begin(engine, PROMPT)
            for _ in range(20):  # replays, of which none may differ
                grow(engine, root, 40)
                engine.draft.commit(engine.tree, None, None)
                tree = engine.tree
                parts = [t[: tree.size].clone() for t in (tree.tokens, tree.parents, tree.scores)]
                results.append([*parts, engine.cache.rows[:, :, :, : engine.cache.draft_rows].clone()])
    for result in results[1:]:
        for ours, expected in zip(result, results[0], strict=True):
            assert torch.equal(ours, expected)
