"""``conf/`` as a whole: every option composes, validates, is described, and is what the schema says."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import LlamaConfig

from subspec.config.checks import RANGES, check_keys, quantizes
from subspec.config.defaults import fill_tree
from subspec.config.effective import effective
from subspec.config.help_text import (
    FILES,
    GROUPS,
    description,
    help_on,
    help_text,
    option_keys,
    options,
    schema_of,
    top_level_keys,
)
from subspec.config.schema import (
    SCHEMAS,
    Config,
    ServeConfig,
    SmallModelDraftConfig,
    register_schemas,
    to_config,
    to_plain,
)
from subspec.drafts.check_config import check_against_target, check_config
from subspec.errors import ConfigError
from subspec.utils.paths import conf_dir

CONF = conf_dir()
OPTIONS = [(group, name) for group in GROUPS for name, _ in options(CONF, group)]
NEEDS = {
    ("draft", "eagle3"): ["draft.path=ORG/HEAD"],
    ("draft", "block_head"): ["draft.path=ORG/HEAD"],
    ("target", "hub"): ["target.path=ORG/NAME"],
    ("quant", "none"): ["draft=none"],
    ("draft", "small_model"): ["draft.path=planted:tiny_draft"],
    ("draft", "pard"): ["draft.path=planted:tiny_draft"],
}
"""What an option cannot do without."""


def composed(*overrides):
    register_schemas()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", [*overrides, "run_dir=somewhere"])


def large_model(**changes):
    """A configuration that rules nothing out."""
    return LlamaConfig(**{"vocab_size": 150_000, "max_position_embeddings": 131_072, "num_hidden_layers": 80} | changes)


@pytest.fixture(scope="module")
def help_lines():
    return help_text(CONF).splitlines()


def test_the_groups_are_the_folders_of_conf():
    folders = {path.name for path in CONF.iterdir() if path.is_dir()} - {"hydra", "local"}
    assert folders <= set(GROUPS)
    assert set(GROUPS) <= {field.name for field in dataclasses.fields(Config)}


def validated(*overrides):
    """The configuration, which passes every check."""
    cfg = composed(*overrides)
    check_keys(cfg)
    config = to_config(cfg)
    check_config(config)
    if not (isinstance(config.draft, SmallModelDraftConfig) and "/" in (config.draft.path or "")):
        check_against_target(config, large_model())  # a small model's own configuration lies on the hub
    json.dumps(to_plain(cfg))
    return config


@pytest.mark.parametrize(("group", "name"), [one for one in OPTIONS if one[0] != "experiment"], ids=str)
def test_every_option_composes_and_validates(group, name):
    """Experiments: tests/test_experiments.py."""
    config = validated(f"{group}={name}", *NEEDS.get((group, name), []))
    if (group, name) != ("target", "hub") and group not in FILES:
        assert getattr(config, group).name == name


@pytest.mark.parametrize(
    ("overrides", "depth", "width"),
    [
        (["device=cpu"], 16, 1),
        (["device=cuda"], 16, 4),
        (["device=cpu", "tree.width=2", "tree.depth=3"], 3, 2),
        (["device=cpu", "tree=beam"], 16, 4),
        (["offload=accelerate", "device=cuda"], 16, 4),
        (["offload=stream"], 48, 6),
        (["offload=stream_uncoded"], 48, 6),
        (["offload=stream", "tree=beam"], 48, 6),
        (["offload=stream", "draft=small_model"], 32, 6),
        (["offload=stream", "draft=eagle2"], 16, 4),
        (["offload=stream", "device=cpu"], 16, 4),
        (["offload=stream", "draft=layer_skip"], 16, 4),
        (["offload=stream", "tree.depth=9"], 9, 6),
        (["offload=stream", "tree=chain"], 8, 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_the_default_tree_depends_on_where_the_target_is(overrides, depth, width):
    cfg = composed(*overrides)
    fill_tree(cfg, to_plain(cfg)["device"])
    tree = to_config(cfg).tree
    assert (tree.depth, getattr(tree, "width", 1)) == (depth, width)
    assert tree.name == next((text[5:] for text in overrides if text.startswith("tree=")), "adaptive")
    assert to_plain(cfg)["tree"]["depth"] == depth  # records have the number, not the rule
    assert to_plain(cfg)["tree"].get("width", 1) == width


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], 5),
        (["benchmark.per_category=9"], None),
        (["benchmark.per_category=9", "benchmark.max_samples=30"], 30),
        (["benchmark.per_category=9", "experiment=smoke"], 2),
    ],
)
def test_the_default_number_of_samples_does_not_limit_categories(overrides, expected):
    cfg = composed("benchmark=mt_bench", "benchmark.categories=[math,stem]", *overrides)
    assert to_config(cfg).benchmark.max_samples == to_plain(cfg)["benchmark"]["max_samples"] == expected
    assert to_config(cfg).benchmark.categories == ["math", "stem"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("benchmark.per_category=0", r"benchmark\.per_category"),
        ("benchmark.categories=[]", r"benchmark\.categories"),
        ("decoding.texts=0", r"decoding\.texts=0 must be"),
        ("decoding.texts=many", r"decoding\.texts=many must be"),
        ("decoding.texts=2 offload=accelerate draft=none", "but offload=accelerate"),
        ("decoding.texts=2 draft=subspec draft.proposer=prompt_lookup", r"but draft\.proposer=prompt_lookup"),
        ("offload=stream draft.proposer=small_model", r"^draft\.proposer=small_model: .*set draft\.proposer=eagle2"),
        (
            "offload=stream device=cpu draft.proposer=small_model",
            r"^draft\.proposer=small_model: .*set draft\.proposer",
        ),
        ("draft.kernel=int4_mma draft=subspec offload=none", r"draft\.kernel=int4_mma .* offload=stream"),
        *((f"audit_margin={value}", r"audit_margin=.*finite") for value in ("inf", "nan", "-1")),
    ],
)
def test_contradictions_are_refused(overrides, message):
    """Most of them: tests/cli/test_bad_input.py."""
    with pytest.raises(ConfigError, match=message):
        check_config(to_config(composed(*overrides.split())))


@pytest.mark.parametrize("draft", ["none", "subspec", "small_model", "eagle2", "layer_skip", "prompt_lookup"])
def test_other_drafts_serve_several_texts(draft):
    for texts in (3, "auto"):
        check_config(to_config(composed(f"draft={draft}", f"decoding.texts={texts}")))


def test_every_file_begins_with_a_description():
    short = [file.name for file in CONF.rglob("*.yaml") if len(description(file).split()) < 2]
    assert not short, "these need a comment that says what they are"


def test_every_option_is_explained_by_help(help_lines):
    for group, name in OPTIONS:
        start = help_lines.index(f"{group}: {GROUPS[group]}")
        section = help_lines[start + 1 : help_lines.index("", start)]
        assert any(re.match(rf"  [* ] {re.escape(name)} +\S", line) for line in section), (group, name)
    assert max(map(len, help_lines)) <= 120


def test_every_key_of_every_option_is_explained():
    for group, name in OPTIONS:
        rows = option_keys(CONF, group, name)
        assert [entry for entry, text in rows if not text] == [], (group, name)
        if group not in FILES:
            keys = {entry.partition("=")[0].partition(".")[0] for entry, _ in rows}
            schema = schema_of(CONF, group, name)
            assert schema in {SCHEMAS[key] for key in SCHEMAS if key.startswith(f"{group}/")}
            assert keys | {"name"} == {field.name for field in dataclasses.fields(schema)}


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["draft"], ["draft: the draft", r"draft=none: Plain", r"    draft\.temperature=0\.2 +sharpens"]),
        (
            ["tree=adaptive"],
            [r"tree=adaptive \(default\): ", r"    tree\.depth=16", r"    tree\.width=null +4, or 1 on a CPU"],
        ),
        (["tree.width=3"], [r"tree=adaptive \(default\)", r"    tree\.width=10 +children"]),
        (["quant.bits_by.mlp"], [r"    quant\.bits_by\.mlp=null +Bits of"]),
        (["experiment=smoke"], ["experiment=smoke: ", "# @package _global_"]),
        (["seed", "logger=none"], [r"seed: 0 +prompt", "logger=none: Only"]),
    ],
)
def test_help_on_a_group_an_option_or_a_key(words, lines):
    text = help_on(CONF, words)
    for line in lines:
        assert re.search(rf"^{line}", text, re.MULTILINE), (line, text)
    assert "tree=chain" not in text or words == ["tree"], "options without the key are left out"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("drat", r"--help drat: .*did you mean draft"),
        ("tree=beem", r"tree=beem: .*did you mean beam\?\); tree has adaptive, beam"),
        ("tree.bits", r"tree\.bits: no option of tree has this key"),
    ],
)
def test_help_on_what_is_not_there(word, message):
    with pytest.raises(ConfigError, match=message):
        help_on(CONF, [word])


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("draft=none quant.bits=4 tree.depth=3", "draft=none quant=higgs tree=chain", True),
        ("draft=eagle2 quant.bits=4", "draft=eagle2 quant.bits=3", True),
        ("draft=small_model quant.bits=4", "draft=small_model quant.bits=3", True),
        (SMALL := "draft=small_model draft.quantize=true", f"{SMALL} quant.bits=3", False),
        (CODED := "draft=none offload=stream offload.codec=substitute", f"{CODED} quant.bits=3", False),
        ("draft=none seed=0", "draft=none seed=1", False),
        ("offload=stream offload.vram_gib=8", "offload=stream offload.vram_gib=8.0", True),
        ("offload=stream", "offload=stream offload.vram_counts=device", False),
        ("draft.proposed=8", "draft.proposed=9", True),
        ("draft.proposer=eagle2 draft.proposed=8", "draft.proposer=eagle2 draft.proposed=9", False),
        ("draft=subspec quant.bits=4", "draft=subspec quant.bits=3", False),
        ("draft=subspec", "draft=subspec quant.modules=[attention,mlp]", True),
        ("draft=subspec quant=higgs offload=stream", "quant=higgs quant.modules=[attention,mlp] offload=stream", True),
        ("draft=subspec offload=stream", "draft=subspec offload=stream quant.modules=[attention,mlp]", False),
        ("draft=eagle2 tree.depth=3", "draft=eagle2 tree.depth=4", False),
    ],
)
def test_groups_without_effect(first, second, same):
    found = [effective(to_plain(composed(*text.split()))) for text in (first, second)]
    assert (found[0] == found[1]) == same


@pytest.mark.parametrize("draft", sorted(key.partition("/")[2] for key in SCHEMAS if key.startswith("draft/")))
def test_quant_has_an_effect_where_it_is_checked(draft):
    config = composed(f"draft={draft}", *NEEDS.get(("draft", draft), []))
    assert ("quant" in effective(to_plain(config))) == quantizes(to_config(config))


def test_the_environment_names_the_project_of_wandb(monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    assert to_config(composed("logger=wandb")).logger.project == "subspec"
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert to_config(composed("logger=wandb")).logger.project == "mine"


def test_folders_of_the_same_second_differ():
    register_schemas()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        first, second = (compose("config") for _ in range(2))
    assert first.run_dir == first.run_dir  # resolved once
    assert re.fullmatch(r"outputs/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d-\d{6}", first.run_dir)
    assert first.run_dir != second.run_dir


def test_help_marks_the_defaults(help_lines):
    marked = {line.split()[1] for line in help_lines if line.startswith("  * ")}
    config = to_config(composed())
    expected = {getattr(config, group).name for group in GROUPS if group not in FILES}
    assert marked == expected


def test_every_key_of_a_run_is_set_and_explained_in_config_yaml():
    explained = {entry.partition(":")[0]: text for entry, text in top_level_keys(CONF)}
    for field in dataclasses.fields(Config):
        assert field.name in GROUPS or len(explained[field.name].split()) >= 2, field.name


@pytest.mark.parametrize("key", SCHEMAS)
def test_every_schema_is_used_by_a_file_of_its_group(key):
    group = key.partition("/")[0]
    files = [file for file in (CONF / group).rglob("*.yaml") if f"/schema/{key}@_here_" in file.read_text()]
    assert files
    cfg = composed(f"{group}={files[0].stem}", *NEEDS.get((group, files[0].stem), []))
    assert OmegaConf.get_type(cfg, group) is SCHEMAS[key]
    assert set(cfg[group]) == {field.name for field in dataclasses.fields(SCHEMAS[key])}


def test_every_range_is_of_a_key_that_exists():
    schemas = SCHEMAS | {"/run": Config, "serve/serve": ServeConfig}
    for key, _, _ in RANGES:
        group, _, name = key.rpartition(".")
        nodes = [node for path, node in schemas.items() if path.startswith(f"{group}/")]
        assert any(name in {field.name for field in dataclasses.fields(node)} for node in nodes), key


def test_targets_of_the_hub_name_a_repository():
    for file in (CONF / "target").glob("*.yaml"):
        if "/schema/target/hub@" in (text := file.read_text()) and file.stem != "hub":
            assert re.search(r"^path: [\w.-]+/[\w.-]+$", text, re.MULTILINE), file.name


def test_a_plus_sign_does_not_get_past_the_schema():
    check_keys(composed("++tree.depth=3"))
    with pytest.raises(ConfigError, match=r"tree\.dept: no such key \(did you mean depth\?\)"):
        check_keys(composed("+tree.dept=3"))


def test_the_checks_of_the_target_look_at_its_configuration():
    config = to_config(composed("tree.width=6", "quant.skip_layers=[3]"))
    check_against_target(config, large_model(vocab_size=6, num_hidden_layers=4))
    with pytest.raises(ConfigError, match=r"tree\.width=6 .* vocabulary of 5"):
        check_against_target(config, large_model(vocab_size=5, num_hidden_layers=4))
    with pytest.raises(ConfigError, match=r"quant\.skip_layers: no layer 3"):
        check_against_target(config, large_model(num_hidden_layers=3))
    with pytest.raises(ConfigError, match=r"decoding\.max_length=2048 exceeds the 2047 positions"):
        check_against_target(config, large_model(max_position_embeddings=2047))
    config = to_config(composed("quant.modules=[lm_head]"))
    with pytest.raises(ConfigError, match=r"quant\.group_size=64 .*331 groups of lm_head"):
        check_against_target(config, large_model(vocab_size=331, hidden_size=64, num_attention_heads=1))
    config = to_config(composed("draft=none", "tree.width=6", "quant.skip_layers=[3]"))
    check_against_target(config, large_model(vocab_size=5, num_hidden_layers=2))


def test_help_is_read_from_the_files(tmp_path: Path):
    (tmp_path / "tree").mkdir()
    (tmp_path / "config.yaml").write_text("defaults:\n  - tree: bush\n\nseed: 3   # of everything\n")
    (tmp_path / "tree" / "bush.yaml").write_text("# A bush:\n# many short branches.\nname: bush\n")
    text = help_text(tmp_path)
    assert re.search(r"\* bush +A bush: many short branches\.", text)
    assert re.search(r"seed: 3 +of everything", text)
