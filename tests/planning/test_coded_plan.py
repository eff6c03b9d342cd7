"""Plans of targets that are coded by their substitute."""

from dataclasses import replace

import pytest

from subspec.config.enums import Codec, Dtype, Kernel, Proposer
from subspec.config.schema import (
    BitsByModule,
    HiggsConfig,
    NoQuantConfig,
    Placement,
    PlantedTargetConfig,
    SubstituteDraftConfig,
)
from subspec.errors import ConfigError
from subspec.memory.allocator import GIB
from tests.helpers.planning import DRAFTS, planned, settings

AUTO, CODED = Codec.auto, Codec.substitute
WITHOUT_HEAD = {"modules": ["attention", "mlp"]}


def higgs(config, **quant):
    return replace(config, quant=HiggsConfig(name="higgs", **quant))


def item(plan, name):
    return next((item.bytes for item in plan.items if item.name == name), 0)


def test_qwen2_5_7b_in_8_gib_by_hand():
    plan, plain = planned(settings(8.0, codec=AUTO)), planned(settings(8.0))
    linears = 3584 * (3584 + 2 * 512) + 3584 * 3584 + 3 * 3584 * 18944
    vectors = 2 * (2 * 3584 + 3584 + 2 * 512)
    assert plan.codec is CODED
    assert plan.layer_bytes == pytest.approx(linears * 7.1 / 8 + vectors, abs=5 * 256)
    assert plain.layer_bytes / plan.layer_bytes == pytest.approx(16 / 7.1, rel=0.01)
    gate_and_up = 2 * 6400 * 3584 * 2  # three slices, whole tiles of 128 rows
    assert item(plan, "restored weights") == pytest.approx(gate_and_up + vectors, abs=5 * 256)
    assert item(plain, "restored weights") == 0
    assert item(plan, "resident layers") == len(plan.resident_layers) * plan.layer_bytes
    assert item(plan, "ring") == 2 * plan.layer_bytes
    assert len(plan.resident_layers) >= 2 * len(plain.resident_layers)
    assert plan.streamed_bytes_per_pass < plain.streamed_bytes_per_pass / 2.5
    assert plan.total(Placement.device) + plan.headroom <= plan.budget
    assert item(plan, "streamed layers") == len(plan.streamed_layers) * plan.layer_bytes
    assert plan.to_dict()["codec"] == "substitute"


@pytest.mark.parametrize(
    ("kind", "quant", "expected"),
    [
        ("hqq", {"bits": 2}, 9.55),
        ("hqq", {"bits": 3}, 8.25),
        ("hqq", {"bits": 4}, 7.1),
        ("hqq", {"bits": 8}, 3.7),
        ("higgs", {}, 7.5),
        ("higgs", {"vector_dim": 1}, 7.64),
        ("higgs", {"bits": 3}, 8.46),
        ("higgs", {"bits": 2, "group_size": 64, "hadamard_size": 64}, 9.39),
    ],
)
def test_what_a_layer_takes_depends_on_what_the_substitute_knows(kind, quant, expected):
    config = settings(16.0, codec=CODED)
    plan = planned(higgs(config, **quant) if kind == "higgs" else settings(16.0, codec=CODED, quant=quant))
    linears = 3584 * (3584 + 2 * 512) + 3584 * 3584 + 3 * 3584 * 18944
    assert 8 * plan.layer_bytes / linears == pytest.approx(expected, rel=0.001)


def test_linears_that_stay_exact_are_streamed_as_they_are():
    whole = planned(settings(8.0, codec=CODED))
    part = planned(settings(16.0, codec=CODED, quant={"modules": ["attention"]}))
    mlp = 3 * 3584 * 18944
    assert part.layer_bytes - whole.layer_bytes == pytest.approx(mlp * (16 - 7.1) / 8, rel=0.001)


@pytest.mark.parametrize("draft", ["subspec", "none"])
@pytest.mark.parametrize("modules", [["lm_head"], ["q_proj", "up_proj"]])
def test_where_no_linear_of_a_layer_is_quantized_none_is_coded(modules, draft):
    """q, k and v are one Linear of the substitute: one exact part keeps the whole of it exact."""
    assert planned(settings(20.0, draft, codec=AUTO, quant={"modules": modules})).codec is Codec.none
    with pytest.raises(ConfigError, match=r"offload\.codec=substitute .*quant\.modules.*offload\.codec=none"):
        planned(settings(20.0, draft, codec=CODED, quant={"modules": modules}))


def test_plain_decoding_does_not_look_at_a_quantizer_that_nobody_uses():
    assert planned(settings(8.0, "none", codec=AUTO, quant={"modules": []})).codec is Codec.none


def test_skipped_layers_are_resident_and_plain():
    plan = planned(settings(9.0, codec=CODED, quant={"skip_layers": [0, 27]}))
    assert {0, 27} <= set(plan.resident_layers)
    exact = 2 * (3584 * (2 * 3584 + 2 * 512) + 3 * 3584 * 18944)
    coded = len(plan.resident_layers) - 2
    assert item(plan, "resident layers") == pytest.approx(2 * exact + coded * plan.layer_bytes, rel=0.001)


def test_auto_codes_where_the_substitute_is_there_anyway():
    config = settings(8.0, codec=AUTO)
    assert planned(config).codec is planned(higgs(config)).codec is CODED
    gemlite = SubstituteDraftConfig(name="subspec", kernel=Kernel.gemlite)
    for draft in (DRAFTS["none"], DRAFTS["small_model"], gemlite):
        assert planned(replace(config, draft=draft)).codec is Codec.none


def test_auto_leaves_everything_plain_where_everything_fits():
    plan = planned(settings(24.0, codec=AUTO))
    assert plan.codec is Codec.none
    assert not plan.streamed_layers
    assert planned(settings(24.0, codec=CODED)).codec is CODED
    between = planned(settings(14.0, codec=AUTO))  # coded it fits, and nothing is streamed
    assert between.codec is CODED
    assert not between.streamed_layers
    assert between.ring_slots == 0


def test_plain_decoding_holds_the_substitute_only_to_decode():
    plan, plain = planned(settings(8.0, "none", codec=CODED)), planned(settings(8.0, "none"))
    assert item(plan, "substitute") == item(planned(settings(8.0)), "substitute")
    assert item(plan, "draft level") == 0
    assert plan.streamed_bytes_per_pass < plain.streamed_bytes_per_pass / 1.5
    assert plan.plain_bytes_per_pass == plain.streamed_bytes_per_pass


def test_what_is_for_a_better_draft_is_not_asked_of_a_substitute_that_only_decodes():
    """An exact layer could not be coded, and nothing drafts with a head of its own."""
    hqq, other = (planned(one(settings(8.0, "none", codec=CODED))) for one in (lambda config: config, higgs))
    assert item(other, "substitute") == item(planned(higgs(settings(8.0, codec=CODED))), "substitute")
    assert item(other, "substitute") < item(hqq, "substitute")
    better = {"modules": ["attention", "mlp", "lm_head"], "skip_layers": [0, 27]}
    assert planned(higgs(settings(8.0, "none", codec=CODED), **better)) == other
    better["bits_by"] = BitsByModule(lm_head=8)
    assert planned(settings(8.0, "none", codec=CODED, quant=better)) == hqq


@pytest.mark.parametrize("gib", [8.0, 14.0])
def test_host_memory_holds_resident_layers_while_loading(gib):
    """They go to the device last, when nothing is quantized there any more."""
    plan = planned(settings(gib, codec=CODED, quant={"skip_layers": [3]}))
    exact = item(planned(settings(8.0)), "streamed layers") // len(planned(settings(8.0)).streamed_layers)
    coded = (len(plan.resident_layers) - 1 + len(plan.streamed_layers)) * plan.layer_bytes
    assert item(plan, "streamed layers") + item(plan, "loading and process") == coded + 3 * exact + GIB
    assert f"{len(plan.resident_layers) - 1} coded" in next(
        item.note for item in plan.items if item.name == "loading and process"
    )


def test_a_refusal_for_host_memory_does_not_move_coded_layers_to_the_device():
    with pytest.raises(ConfigError, match=r"host memory cannot hold") as refusal:
        planned(settings(8.0, codec=CODED), host_free=7 * GIB)
    assert "vram_gib" not in str(refusal.value)
    assert "resident_layers" not in str(refusal.value)


def test_auto_streams_plainly_where_the_restored_layer_is_what_does_not_fit():
    """With one slot a plain ring takes one layer, a coded one almost half of one and the restored layer."""
    slot = {"ring_slots": 1, "embedding": Placement.host, "decoding": {"bitwise": False}, "quant": WITHOUT_HEAD}
    with pytest.raises(ConfigError):
        planned(settings(5.21, codec=CODED, **slot))
    assert planned(settings(5.21, codec=AUTO, **slot)).codec is Codec.none
    with pytest.raises(ConfigError, match=r"needs 5\.2 GiB"):  # plainly, not the 5.37 that decoding takes
        planned(settings(5.01, codec=AUTO, **slot))


def test_a_refusal_knows_that_a_coded_target_holds_the_substitute_without_a_draft():
    with pytest.raises(ConfigError, match=r"or set offload\.codec=none$"):
        planned(settings(4.5, "none", codec=CODED))
    with pytest.raises(ConfigError, match=r"or set draft=none and offload\.codec=none \(plain decoding\)$"):
        planned(settings(4.5, codec=CODED))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"draft": DRAFTS["small_model"]}, "set draft=subspec"),
        ({"quant": NoQuantConfig(name="none"), "draft": DRAFTS["none"]}, "set quant=hqq"),
        ({"target": PlantedTargetConfig(name="p", dtype=Dtype.float16)}, "set target.dtype=bfloat16"),
        (
            {"draft": SubstituteDraftConfig(name="subspec", kernel=Kernel.gemlite)},
            "int4_mma, lut_mma, not of draft.kernel=gemlite: set draft.kernel=auto",
        ),
    ],
)
def test_what_cannot_be_coded_is_refused(change, words):
    with pytest.raises(ConfigError, match=r"offload\.codec=substitute") as refusal:
        planned(replace(settings(8.0, codec=CODED), **change))
    assert words in str(refusal.value)
    assert "or offload.codec=none" in str(refusal.value)


WITH_HEAD = {"modules": ["attention", "mlp", "lm_head"]}
TABLE = 152064 * 3584


@pytest.mark.parametrize(("bits", "expected", "more"), [(4, 7.4, 2), (8, 4.0, 1), (3, 8.55, 1)])
def test_the_exact_head_is_coded_by_the_drafts_own(bits, expected, more):
    quant = WITH_HEAD | {"bits_by": BitsByModule(lm_head=bits)}
    plan, plain = (planned(settings(8.0, codec=codec, quant=quant)) for codec in (CODED, Codec.none))
    shared = planned(settings(8.0, codec=CODED, quant=WITHOUT_HEAD))
    assert item(plan, "LM head") == plan.coded_head_bytes == int(TABLE * expected / 8) + 12 * 512  # slices
    assert item(plain, "LM head") == item(shared, "LM head") == 2 * TABLE
    assert plain.coded_head_bytes == shared.coded_head_bytes == 0
    kept = next(item for item in plan.items if item.name == "substitute")
    own = kept.bytes - item(shared, "substitute")
    assert own == pytest.approx(TABLE * {4: 4.25, 8: 8.5, 3: 4.25}[bits] / 8, rel=0.001)
    assert item(plan, "LM head") + own < 2 * TABLE
    assert len(plan.resident_layers) == len(shared.resident_layers) + more
    assert plan.total(Placement.device) + plan.headroom <= plan.budget
    assert plan.to_dict()["coded_head_bytes"] == plan.coded_head_bytes
    assert next(item.note for item in plan.items if item.name == "LM head") == "152064 x 3584, coded"
    assert plan.level_read_bytes < shared.level_read_bytes


def changed(group, **values):
    """The default settings, coded, with other values in one group."""
    config = settings(8.0, codec=CODED)
    return replace(config, **{group: replace(getattr(config, group), **values)})


def test_the_draft_has_a_head_of_eight_bits_where_that_pays():
    plan = planned(settings(8.0, codec=CODED))
    asked = planned(settings(8.0, codec=CODED, quant=WITH_HEAD | {"bits_by": BitsByModule(lm_head=8)}))
    assert plan.coded_head_bytes == asked.coded_head_bytes > 0
    assert plan.items == asked.items
    assert planned(settings(8.0, codec=AUTO)).items == plan.items
    without = planned(settings(8.0, codec=CODED, quant=WITHOUT_HEAD))
    assert len(plan.resident_layers) > len(without.resident_layers)
    assert plan.level_read_bytes < without.level_read_bytes


@pytest.mark.parametrize(
    "config",
    [
        settings(8.0),
        settings(8.0, "none", codec=CODED),
        settings(8.0, codec=CODED, quant=WITHOUT_HEAD),
        higgs(settings(8.0, codec=CODED)),
        changed("decoding", texts=4),
        changed("draft", proposer=Proposer.prompt_lookup, proposed=11),
        changed("draft", vocab=32768),
    ],
    ids=["not coded", "nothing drafts", "said so", "higgs", "several texts", "17 rows", "some ids"],
)
def test_elsewhere_it_drafts_with_the_exact_head(config):
    plan = planned(config)
    assert plan.coded_head_bytes == 0
    assert item(plan, "LM head") == 2 * TABLE


def test_a_cascade_of_few_rows_keeps_its_own_head():
    plan = planned(changed("draft", proposer=Proposer.prompt_lookup))
    assert plan.coded_head_bytes > 0
    assert len(plan.resident_layers) == len(planned(settings(8.0, codec=CODED)).resident_layers)


@pytest.mark.parametrize(
    ("config", "workspaces"),
    [
        (settings(8.0, "none"), 0),
        (settings(8.0, codec=CODED), 0),
        (settings(8.0), 1),  # the levels' exact LM head
        (changed("draft", proposer=Proposer.prompt_lookup), 0),
        (changed("draft", proposer=Proposer.eagle2, proposer_path="planted"), 1),
        (changed("draft", proposer=Proposer.eagle2, proposer_path="planted", proposed=32), 2),
        (higgs(settings(8.0, codec=CODED)), 2),  # rotations while it loads
        (changed("decoding", bitwise=False), 1),
    ],
)
def test_cublas_has_a_workspace_for_every_stream_it_multiplies_on(config, workspaces):
    config = replace(config, target=PlantedTargetConfig(name="planted_qwen2_5_7b", shape="qwen2_5_7b"))
    found = [item.bytes for item in planned(config).items if item.name == "cuBLAS"]
    assert found == [workspaces * 2**25] * (workspaces > 0)


def test_a_tied_head_stays_exact():
    plan = planned(settings(8.0, codec=CODED), "qwen2_5_1_5b")
    assert plan.coded_head_bytes == 0
    assert "lm_head" not in next(item.note for item in plan.items if item.name == "substitute")


def test_higgs_codes_the_head_too():
    plan = planned(higgs(settings(8.0, codec=CODED), **WITH_HEAD))
    assert plan.coded_head_bytes == pytest.approx(TABLE * 7.8 / 8, rel=0.001)


@pytest.mark.parametrize(
    "change",
    [{"draft": "none"}, {"quant": WITH_HEAD | {"skip_layers": list(range(28))}, "vram_gib": 30.0}],
    ids=["nothing drafts", "no layer is coded"],
)
def test_a_head_that_cannot_be_coded_is_on_the_device_as_it_is(change):
    change = {"draft": "subspec", "quant": WITH_HEAD, "vram_gib": 8.0, **change}
    draft = change.pop("draft")
    plan = planned(settings(draft=draft, codec=CODED, **change))
    assert plan.codec is CODED
    assert plan.coded_head_bytes == 0
    assert item(plan, "LM head") == 2 * TABLE


@pytest.mark.parametrize("shape", ["tiny", "tiny_tied"])
def test_a_tied_head_is_not_coded_for_tokens_are_looked_up_there(shape):
    plan = planned(settings(1.0, codec=CODED, quant=WITH_HEAD), shape)
    assert (plan.coded_head_bytes == 0) == (shape == "tiny_tied")
    assert plan.codec is CODED


def test_auto_codes_the_head_where_it_codes_layers():
    plan = planned(settings(8.0, codec=AUTO, quant=WITH_HEAD))
    assert plan.codec is CODED
    assert plan.coded_head_bytes > 0
    whole = planned(settings(30.0, codec=AUTO, quant=WITH_HEAD))
    assert whole.codec is Codec.none
    assert whole.coded_head_bytes == 0
