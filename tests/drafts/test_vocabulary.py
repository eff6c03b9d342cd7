"""``draft.vocab``: tokens outside it are never drafted, and are emitted all the same."""

from dataclasses import replace

import pytest
import torch

from subspec.config.schema import HqqConfig
from subspec.decoding.tree_policy import Beam
from subspec.drafts.vocabulary import draft_ids, file_digest
from subspec.errors import ConfigError
from tests.helpers.assembled import substitute_beside
from tests.helpers.drafts import hf_greedy
from tests.helpers.planning import planned, settings
from tests.helpers.tiny import tiny_model

PROMPT = [5, 17, 33, 99, 4, 8, 77, 12, 300]
HEAD = {"modules": ["attention", "mlp", "lm_head"]}


def test_ids_are_a_number_a_text_or_a_list(tmp_path):
    (tmp_path / "ids.txt").write_text("7 3\n3\n11\n")
    (tmp_path / "ids.json").write_text("[7, 3, 11]")
    torch.save(torch.tensor([11, 7, 3]), tmp_path / "ids.pt")
    assert draft_ids(None, 320, 4) is None
    assert draft_ids(5, 320, 4) == (0, 1, 2, 3, 4)
    assert draft_ids(320, 320, 4) is None
    names = [str(tmp_path / name) for name in ("ids.txt", "ids.json", "ids.pt")]
    assert {draft_ids(name, 320, 3) for name in names} == {(3, 7, 11)}
    assert len({file_digest(name) for name in names}) == 1
    assert file_digest(5) is None


@pytest.mark.parametrize(
    ("text", "vocab_size", "width"),
    [(None, 320, 1), ("one two", 320, 1), ("[[1], 2]", 320, 1), ("3 320", 320, 1), ("-1 3", 320, 1), ("3 4", 320, 3)],
    ids=["missing", "words", "nested", "too large", "negative", "fewer than the tree is wide"],
)  # fmt: skip
def test_a_file_that_is_no_list_of_ids_is_refused(tmp_path, text, vocab_size, width):
    path = tmp_path / "wrong.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"draft\.vocab"):
        draft_ids(str(path), vocab_size, width)


@pytest.mark.parametrize("wrong", [2, 400, True, 1.5, [1]])
def test_a_wrong_number_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"draft\.vocab"):
        draft_ids(wrong, 320, 4)


def engine_of(model, quant, **draft):
    return substitute_beside(model, HqqConfig(name="hqq", **quant), Beam(3, 3), **draft).engine


@pytest.mark.parametrize("quant", [{}, HEAD], ids=["exact head", "quantized head"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_ids_outside_are_emitted_and_never_drafted(tmp_path, quant, device):
    shape = {"hidden_size": 128, "intermediate_size": 192, "heads": 4, "kv_heads": 2}
    device, dtype = torch.device(device), torch.float32 if device == "cpu" else torch.bfloat16
    model = tiny_model("llama", **shape).to(device, dtype)
    expected = hf_greedy(model, PROMPT, 40) if dtype is torch.float32 else None
    known = sorted(set(range(0, 320, 2)))
    (tmp_path / "even.txt").write_text("\n".join(map(str, known)))
    engine = engine_of(model, quant, vocab=str(tmp_path / "even.txt"))
    drafted, finish = set(), engine.policy.finish

    def record(tree):
        finish(tree)
        drafted.update(tree.tokens[1 : tree.size].tolist())

    engine.policy.finish = record
    result = engine.generate(PROMPT, max_new_tokens=40)
    assert drafted
    assert drafted <= set(known)
    assert expected is None or result.token_ids == expected
    assert set(result.token_ids) - set(known)


def test_modules_are_refused():
    model = tiny_model("llama", hidden_size=128, intermediate_size=192)
    with pytest.raises(ConfigError, match=r"draft\.vocab"):
        engine_of(model, {"axis": 0}, vocab=64)


def test_the_plan_counts_the_rows_of_the_head():
    config = settings()
    whole = planned(config)
    part = planned(replace(config, draft=replace(config.draft, vocab=32000)))
    names = {item.name: item.bytes for item in part.items}
    assert names["draft's LM head"] == 32000 * 3584 * 2
    assert whole.level_read_bytes - part.level_read_bytes == (152064 - 32000) * 3584 * 2
