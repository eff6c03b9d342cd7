"""The planner against arithmetic done by hand, and properties that hold for any configuration."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from subspec.config.defaults import MOST_TEXTS
from subspec.config.schema import AccelerateOffloadConfig, Dtype, Placement
from subspec.errors import ConfigError
from subspec.memory.allocator import GIB, MIB, headroom
from subspec.planning.choose import choose, most_texts
from subspec.planning.memory_layout import MemoryLayout, spread
from subspec.targets.planted import SHAPES
from tests.helpers.planning import planned, settings


def by_name(plan):
    return {item.name: item.bytes for item in plan.items}


def test_qwen2_5_7b_in_8_gib_by_hand():
    plan = planned(settings(8.0), link_gb_per_s=25.0)
    found = by_name(plan)
    linears = 2 * 3584 * 3584 + 2 * 512 * 3584 + 3 * 18944 * 3584  # q, o; k, v; gate, up, down
    vectors = 3584 + 2 * 512 + 2 * 3584  # q, k, v biases; two norms
    assert found["substitute"] == 28 * linears * 4.25 / 8  # 3.23 GiB
    assert found["LM head"] == 152064 * 3584 * 2  # 1.02 GiB
    assert found["norms and biases"] == (28 * vectors + 3584) * 2
    assert plan.layer_bytes == (linears + vectors) * 2  # 0.434 GiB; every parameter is a multiple of 256 bytes
    assert found["ring"] == 2 * plan.layer_bytes
    assert found["resident layers"] == 5 * plan.layer_bytes
    # 48 levels of 6 nodes and the root, 289, in 5 x 64 rows; the last level's nodes are never run through the draft.
    drafted = 1 + 47 * 6
    row = 28 * 2 * 4 * 128 * 2  # 56 KiB
    assert plan.prefill_chunk == 1600
    assert found["KV cache"] == (drafted + 2048 + 320) * row
    assert 2 * 320**2 < found["tree"] < 2 * 320**2 + 48 * 320
    logits = 8 * 152064 * 2  # one buffer for all levels, of 8 rows though they have 6
    attention = 4 * (32 * 3584 + 4 * (3584 + 2 * 512))  # float32 parts of one row
    level = logits + 6 * (attention + 2 * 14 * 3584)  # and rows of hidden states, queries and outputs
    assert found["draft level"] == pytest.approx(level + 32 * MIB, rel=0.01)
    prefill = 1600 * (4 * 3584 * 2 + 2048 * 6 + 3 * 18944 * 2)  # hidden states, mask, MLP: 0.2 GiB
    assert found["workspace"] == pytest.approx(prefill, rel=0.05)
    assert prefill > 320 * (152064 + 3584) * 2  # logits of the padded tree
    # To even MiB: runs of 13, 13 and 2 substitute layers of 118.07 (two copies of a run fit into 7 layers), 7 layers of
    # 444.52, LM head, KV cache and workspace. The rest of the level is a third of a segment of 20 MiB, the tree a
    # multiple of 512 bytes.
    rounded = (2 * 1536 + 238) * MIB - found["substitute"] + 7 * (446 * MIB - plan.layer_bytes)
    rounded += 1040 * MIB - found["LM head"] + 146 * MIB - found["KV cache"] + 226 * MIB - found["workspace"]
    rounded += 20 * MIB // 3 + 1 - (found["draft level"] - 32 * MIB) + 423 * 512 - found["tree"]
    assert found["allocator"] == 64 * MIB + rounded
    assert found["cuBLAS"] == 32 * MIB  # for the levels' LM head
    # 0.08 GiB stay free whatever happens; beside them 0.13 are left: less than a sixth layer.
    assert plan.headroom == -(-8 * GIB // 100)
    assert 0 < plan.spare == 8 * GIB - plan.headroom - plan.total(Placement.device) < 0.14 * GIB
    assert plan.embedding is Placement.host
    assert found["embedding table"] == found["LM head"]
    assert found["streamed layers"] == 23 * plan.layer_bytes
    assert plan.resident_layers == (2, 8, 14, 19, 25)  # spread, with streamed layers at both ends
    assert sorted(plan.resident_layers + plan.streamed_layers) == list(range(28))
    assert plan.streamed_bytes_per_pass == 23 * plan.layer_bytes
    assert plan.pass_seconds == pytest.approx(23 * 0.4661 / 25, rel=1e-3)
    assert plan.ceiling(26) == pytest.approx(26 / plan.pass_seconds)
    assert plan.plain_resident == 13
    assert plan.plain_ceiling == pytest.approx(25 / (15 * 0.4661), rel=1e-3)


def test_a_pass_begins_and_ends_with_a_streamed_layer():
    for layers in range(1, 40):
        for count in range(layers + 1):
            chosen = spread(range(layers), count)
            assert len(set(chosen)) == len(chosen) == count
            assert chosen == tuple(sorted(chosen))
            if count <= layers - 2:
                assert min(chosen, default=1) > 0
                assert max(chosen, default=0) < layers - 1


def test_without_a_draft_more_layers_are_resident():
    plan = planned(settings(8.0, "none"))
    assert "substitute" not in by_name(plan)
    assert "draft level" not in by_name(plan)
    assert len(plan.resident_layers) == 13
    assert plan.plain_bytes_per_pass == plan.streamed_bytes_per_pass
    notes = {item.name: item.note for item in plan.items}
    assert notes["KV cache"] == "0 + 2048 + 1 rows"
    assert notes["tree"] == "the root alone"
    assert by_name(plan)["tree"] < 50


def test_a_small_model_of_its_own_by_hand():
    plan = planned(settings(8.0, "small_model", tree=(32, 6)))
    found = by_name(plan)
    linears = 2 * 1536 * 1536 + 2 * 256 * 1536 + 3 * 8960 * 1536
    vectors = 1536 + 2 * 256 + 2 * 1536  # q, k, v biases; two norms
    layer = (linears + vectors) * 2
    # The table is the head as well, with rows for all of the target's tokens.
    assert found["small model"] == 28 * layer + 152064 * 1536 * 2 + 1536 * 2
    drafted = 1 + 31 * 6
    assert found["small model's KV"] == (drafted + 2048 + 256) * 28 * 2 * 2 * 128 * 2
    # No draft region:
    assert found["KV cache"] == (2048 + 256) * 28 * 2 * 4 * 128 * 2
    assert plan.level_read_bytes == 28 * layer + 151936 * 1536 * 2
    assert "substitute" not in found
    assert len(plan.resident_layers) == 6
    assert plan.plain_resident == 13


def test_layers_that_draft_cost_a_level_and_no_weights():
    plain, skipping = planned(settings(8.0, "none")), planned(settings(8.0, "layer_skip", tree=(32, 6)))
    assert set(by_name(skipping)) == {*by_name(plain), "draft level", "cuBLAS"}
    resident = skipping.resident_layers
    assert len(resident) == 13
    assert {0, 27} <= set(resident)
    linears = 2 * 3584 * 3584 + 2 * 512 * 3584 + 3 * 18944 * 3584
    vectors = 3584 + 2 * 512 + 2 * 3584
    assert skipping.level_read_bytes == 13 * (linears + vectors) * 2 + 152064 * 3584 * 2
    everything = planned(settings(24.0, "layer_skip"))
    assert everything.streamed_layers == ()  # then half of the layers draft
    assert everything.level_read_bytes == 14 * (linears + vectors) * 2 + 152064 * 3584 * 2
    with pytest.raises(ConfigError, match=r"resident_layers=1, but draft=layer_skip drafts with 2 layers"):
        planned(settings(8.0, "layer_skip", resident_layers=1))


def test_rows_are_padded_wherever_the_engine_pads_them():
    config = {"decoding": {"max_length": 48, "max_new_tokens": 8}}
    notes = {}
    for depth, width in ((3, 2), (8, 7), (8, 8)):
        plan = planned(settings(8.0, tree=(depth, width), **config))
        notes[depth * width + 1] = {item.name: item.note for item in plan.items}
    for nodes, rows in ((7, 64), (57, 64), (65, 128)):
        assert notes[nodes]["tree"] == f"{nodes} nodes in {rows} rows"
    assert notes[57]["KV cache"] == "50 + 48 + 64 rows"
    assert notes[65]["KV cache"] == "57 + 48 + 128 rows"
    assert notes[57]["workspace"].endswith("64 rows")
    assert notes[65]["workspace"].endswith("128 rows")


@pytest.mark.parametrize(("vram", "free"), [(5.9, 64), (6.5, 67), (15.0, 154)])
def test_a_part_of_the_budget_stays_free(vram, free):
    plan = planned(settings(vram))
    assert free - 1 < plan.headroom / MIB <= free  # 1 %, at least 64 MiB
    assert plan.total(Placement.device) <= plan.budget - plan.headroom
    assert plan.to_dict()["headroom_bytes"] == plan.headroom


def test_when_everything_fits_nothing_is_streamed():
    plan = planned(settings(24.0), link_gb_per_s=25.0)
    assert (plan.streamed_layers, plan.ring_slots, plan.ceiling(26)) == ((), 0, None)
    assert (plan.embedding, plan.prefill_chunk) == (Placement.device, 2048)
    assert any("nothing is streamed" in note for note in plan.notes)


def test_the_embedding_is_on_the_device_where_it_costs_no_layer():
    tight = planned(settings(8.0))
    assert tight.embedding is Placement.host
    assert planned(settings(20.0)).embedding is Placement.device
    there = planned(settings(8.0, embedding=Placement.device))
    assert len(there.resident_layers) < len(tight.resident_layers)


def test_a_tied_table_is_the_lm_head():
    found = by_name(planned(settings(1.0), "tiny_tied"))
    assert "embedding and LM head" in found
    assert not {"LM head", "embedding", "embedding table"} & found.keys()
    with pytest.raises(ConfigError, match="ties its embedding"):
        planned(settings(1.0, embedding=Placement.host), "tiny_tied")


def test_what_the_substitute_keeps_exact_is_a_copy_of_resident_layers_too():
    attention, mlp = (2 * 3584 + 2 * 512) * 3584 * 2, 3 * 3584 * 18944 * 2
    plan = planned(settings(9.0, quant={"skip_layers": [0, 27]}))
    assert {0, 27} <= set(plan.resident_layers)
    assert by_name(plan)["exact substitute"] == 2 * (attention + mlp)
    assert by_name(plan)["substitute"] < by_name(planned(settings(9.0)))["substitute"]
    with pytest.raises(ConfigError, match=r"resident_layers=1, but quant\.skip_layers keeps 2 layers"):
        planned(settings(9.0, quant={"skip_layers": [0, 27]}, resident_layers=1))
    plan = planned(settings(9.0, quant={"modules": ["mlp"]}))
    assert by_name(plan)["exact substitute"] == 28 * attention


def test_a_fixed_number_of_resident_layers_is_kept_or_refused():
    assert len(planned(settings(8.0, resident_layers=1)).resident_layers) == 1
    with pytest.raises(ConfigError, match=r"or set offload\.resident_layers=null$"):
        planned(settings(8.0, resident_layers=9))
    with pytest.raises(ConfigError, match=r"resident_layers=29: the target has 28 layers"):
        planned(settings(80.0, resident_layers=29))
    everything = planned(settings(80.0, resident_layers=27))
    assert everything.ring_slots == 1


def test_the_prefill_chunk_is_a_multiple_of_64_and_shrinks_before_the_run_is_refused():
    for vram in (6.0, 6.1, 7.0, 8.0, 9.0):
        chunk = planned(settings(vram)).prefill_chunk
        assert 256 <= chunk <= 2048
        assert chunk % 64 == 0
    assert planned(settings(2.19, "none")).prefill_chunk < 512 <= planned(settings(7.0)).prefill_chunk
    assert planned(settings(8.0, decoding={"max_length": 200})).prefill_chunk == 200


def test_sampling_and_the_audit_take_more():
    greedy, sampled = planned(settings(11.0)), planned(settings(11.0, sampling={"top_p": 0.9}))
    assert by_name(sampled)["workspace"] > 2.3 * by_name(greedy)["workspace"]
    audited = replace(settings(11.0), audit=True)
    assert by_name(planned(audited))["audit"] > by_name(greedy)["KV cache"] / 2


def test_float32_doubles_the_layers():
    config = settings(16.0)
    double = replace(config, target=replace(config.target, dtype=Dtype.float32))
    assert planned(double).layer_bytes == 2 * planned(config).layer_bytes


@pytest.mark.parametrize(
    ("offload", "machine", "rate", "source"),
    [
        ({}, {}, None, None),
        ({"card": "RTX 3060"}, {}, 27.4, "RTX 3060 12GB, estimated"),
        ({"card": "RTX 3060"}, {"link_gb_per_s": 20.0}, 20.0, "measured"),
        ({"link_gb_per_s": 5.0}, {"link_gb_per_s": 20.0}, 5.0, "offload.link_gb_per_s"),
    ],
)
def test_the_link_is_the_configured_the_measured_or_the_cards(offload, machine, rate, source):
    plan = planned(settings(8.0, **offload), **machine)
    if rate is None:
        assert plan.link is plan.pass_seconds is plan.ceiling(4) is plan.plain_ceiling is None
    else:
        assert plan.link.source == source
        assert plan.link.gb_per_s == pytest.approx(rate, rel=1e-3)


def test_a_budget_beyond_the_card_is_refused():
    with pytest.raises(ConfigError, match=r"vram_gib=24.* more than the 12 GiB .* RTX 3060 12GB.*at most 11\.1"):
        planned(settings(24.0, card="RTX 3060"))
    planned(settings(11.1, card="RTX 3060"))


def test_host_memory_is_checked_before_anything_swaps():
    with pytest.raises(ConfigError) as refusal:
        planned(settings(8.0), host_free=10 * GIB)
    text = str(refusal.value)
    assert "needs 13.31 GiB: streamed layers 9.98 + loading and process 2.30 + embedding table 1.02" in text
    assert "10.0 GiB are free: free some, raise offload.vram_gib to " in text
    assert "\n" not in text
    enough = float(text.split("vram_gib to ")[1].split()[0])
    planned(settings(enough), host_free=10 * GIB)
    beyond = float(text.split("set offload.ram_gib=")[1].split()[0])
    assert planned(settings(8.0, ram_gib=beyond), host_free=10 * GIB).disk_layers
    with pytest.raises(ConfigError, match=r"2\.0 GiB offload\.ram_gib allows: raise offload\.ram_gib") as refusal:
        planned(settings(8.0, ram_gib=2.0), host_free=64 * GIB)
    least = float(str(refusal.value).split("at least ")[1].split()[0])
    least = planned(settings(8.0, ram_gib=least), host_free=64 * GIB)
    assert least.disk_layers == least.streamed_layers
    planned(settings(8.0, ram_gib=64.0, card="RTX 3090"), host_free=1 * GIB)  # another machine's memory


@pytest.mark.parametrize(
    ("config", "remedy"),
    [
        (settings(5.45), "offload.ring_slots=1"),
        (settings(5.58, decoding={"prefill_chunk": 1024}), "decoding.prefill_chunk=256"),
        (settings(5.54), "decoding.max_length="),
        (settings(6.0, embedding=Placement.device, quant={"bits": 4}), "offload.embedding=host"),
        (settings(6.0, ring_slots=6), "offload.ring_slots=2"),
        (settings(6.22, tree=(160, 6), sampling={"top_p": 0.9}), "tree.depth="),
        (settings(4.0), "draft=none"),
    ],
)
def test_a_refusal_shows_the_arithmetic_and_a_change_that_fits(config, remedy):
    with pytest.raises(ConfigError) as refusal:
        planned(config)
    text = str(refusal.value)
    assert text.count("\n") == 0
    assert f"offload.vram_gib={config.offload.vram_gib:g} cannot hold this run" in text
    assert "LM head 1.02 + " in text
    assert f"or set {remedy}" in text
    needed = float(text.split("at least ")[1].split(",")[0])
    shown = text.split("GiB: ")[1].split(";")[0]
    assert sum(float(part.rsplit(" ", 1)[1]) for part in shown.split(" + ")) == pytest.approx(needed, abs=0.1)
    assert "kept free 0." in shown
    planned(replace(config, offload=replace(config.offload, vram_gib=needed)))
    with pytest.raises(ConfigError):
        planned(replace(config, offload=replace(config.offload, vram_gib=needed - 0.01)))


def test_a_budget_that_nothing_saves_says_so():
    with pytest.raises(ConfigError, match="no other single change is enough"):
        planned(settings(0.5))


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(ConfigError, match=r"quant\.group_size=104 does not divide the 3584 inputs of self_attn"):
        planned(settings(8.0, quant={"group_size": 104}))
    accelerate = replace(settings(8.0), offload=AccelerateOffloadConfig(name="accelerate"))
    with pytest.raises(ConfigError, match="set offload=stream"):
        planned(accelerate)


def test_the_plan_is_json():
    plan = planned(settings(8.0, card="H200"), "qwen2_5_7b")
    again = json.loads(json.dumps(plan.to_dict()))
    assert again["device_bytes"] == plan.total(Placement.device)
    assert again["embedding"] == "host"
    assert again["resident_layers"] == [2, 8, 14, 19, 25]
    assert again["link"] == {"gb_per_s": 55.5, "source": "H200, measured on one"}
    assert again["ceiling_tokens_per_s"]["26"] == plan.ceiling(26)


# ------------------------------------------------------------------------------------------ properties


@effort(max_examples=25, deadline=None)
@given(
    vram=st.integers(2 * 1024, 24 * 1024),
    more=st.integers(0, 2048),
    length=st.sampled_from([16, 200, 2048, 8192]),  # every length and tree is traced once
    longer=st.sampled_from([0, 1, 2048]),
    tree=st.sampled_from([(1, 1), (16, 4), (48, 6), (32, 12)]),
    draft=st.sampled_from(["subspec", "none", "small_model", "layer_skip"]),
    quant=st.sampled_from([{}, {"bits": 2}, {"modules": ["mlp"]}, {"skip_layers": [1, 4]}, {"bits": 8}]),
    ring=st.integers(1, 8),
)
def test_any_plan_keeps_its_budget_and_is_monotone(vram, more, length, longer, tree, draft, quant, ring):
    layout, longest_layout = (
        MemoryLayout(
            settings(
                decoding={"max_length": own, "max_new_tokens": 8}, tree=tree, draft=draft, quant=quant, ring_slots=ring
            ),
            SHAPES["qwen2_5_7b"](),
        )
        for own in (length, length + longer)
    )
    decision, longest = choose(layout, vram * MIB), choose(longest_layout, vram * MIB)
    larger = choose(layout, (vram + more) * MIB)
    if decision is None:
        assert longest is None, "a longer text fits where a shorter one does not"
        return
    items = layout.allocations(decision)
    assert layout.device_bytes(decision) + headroom(vram * MIB) <= vram * MIB
    assert all(item.bytes > 0 for item in items)
    assert min(length, 256) <= decision.chunk <= length
    assert layout.ring_slots(decision.resident) == min(ring, 28 - decision.resident)
    assert len(layout.spread(decision.resident)) == decision.resident
    assert larger is not None, "more memory is never refused"
    assert larger.resident >= decision.resident
    assert longest is None or longest.resident <= decision.resident


def test_residents_grow_with_the_budget_one_by_one():
    layout = MemoryLayout(settings(), SHAPES["qwen2_5_7b"]())
    decisions = [choose(layout, vram * MIB) for vram in range(5 * 1024, 20 * 1024, 256)]
    counts = [-1 if decision is None else decision.resident for decision in decisions]
    assert counts == sorted(counts)
    assert set(counts) >= {-1, 0, 1, 5, 20, 28}


def test_texts_side_by_side_take_memory_from_resident_layers():
    plans = [planned(settings(8.0, decoding={"texts": texts}), link_gb_per_s=25.0) for texts in (1, 4, 8)]
    items = [by_name(plan) for plan in plans]
    for one, four, eight in zip(*(own.items() for own in items), strict=False):
        if one[0] in ("substitute", "ring", "LM head"):
            assert one == four == eight
    rows = [own["KV cache"] / texts for own, texts in zip(items, (1, 4, 8), strict=True)]
    assert rows[0] == rows[1] == rows[2]
    residents = [len(plan.resident_layers) for plan in plans]
    assert residents[0] > residents[1] > residents[2] > 0
    assert [plan.texts for plan in plans] == [1, 4, 8]


@pytest.mark.parametrize(
    ("draft", "gib", "texts"), [("subspec", 8.0, 8), ("none", 4.0, 8), ("subspec", 24.0, 8), ("subspec", 5.9, None)]
)
def test_as_many_texts_as_pay(draft, gib, texts):
    plan = planned(settings(gib, draft, decoding={"texts": "auto"}), link_gb_per_s=25.0)
    assert plan.texts == texts or (texts is None and 1 <= plan.texts < 8)
    assert f"decoding.texts=auto: {plan.texts}" in plan.notes


def test_more_texts_do_not_pay_if_nearly_all_layers_leave_the_device():
    assert most_texts({1: 0, 2: 0, 3: 2, 4: 6}.get) == 2
    assert most_texts({1: 3, 2: 4}.get) == 2
    assert most_texts(lambda texts: 10 + texts) == MOST_TEXTS


def test_a_refusal_proposes_fewer_texts():
    with pytest.raises(ConfigError, match=r"set decoding\.texts=[14]"):
        planned(settings(5.9, decoding={"texts": 8}), link_gb_per_s=25.0)
