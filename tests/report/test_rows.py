import pytest

from subspec.errors import SubspecError
from subspec.records.metrics import LinkInfo
from subspec.report.baseline import make_rows
from subspec.report.run_data import collect
from subspec.report.tables import audit_text, methods_table, number

from .runs import config_of, plain_run, rows_below, turns, write_run

OURS, PLAIN = (30.0, 20.0, 24.0), (10.0, 8.0, 12.0)
METHOD = "subspec hqq4, beam 3x2"


def compared(folder, baseline=None):
    """Rows by method, and notes."""
    rows, notes = make_rows(collect([folder]), baseline)
    return {row.method: row for row in rows}, notes


def by_folder(folder):
    """Rows by the name of their first run's folder."""
    return {row.runs[0].folder.name: row for row in rows_below(folder)}


@pytest.fixture
def pair(tmp_path):
    """A run and its plain decoding, on the same prompts."""
    plain_run(tmp_path / "plain", PLAIN)
    write_run(tmp_path / "ours", turns(OURS), facts={"substitute": {"bits_per_weight": 4.5}})
    return tmp_path


# --------------------------------------------------------------------------------------------- one row


def test_figures_recomputed_from_the_records(pair):
    rows, notes = compared(pair)
    assert notes == []
    ours = rows[METHOD]
    passes = [10, 11, 12]
    tokens = [3 * count for count in passes]
    seconds = [count / speed for count, speed in zip(tokens, OURS, strict=True)]
    total = sum(tokens) / sum(seconds)
    assert ours.speed.value == pytest.approx(total) == pytest.approx(ours.totals["tokens_per_s"])
    assert ours.totals["tau"] == pytest.approx(3.0)
    plain_total = sum(passes) / sum(count / speed for count, speed in zip(passes, PLAIN, strict=True))
    assert ours.baseline.label == "plain decoding"
    assert ours.baseline.speedup.value == pytest.approx(total / plain_total)
    assert ours.baseline.speedup.paired
    assert ours.baseline.differences == ()
    assert rows["plain decoding"].baseline.speedup is None
    assert ours.iteration == pytest.approx(
        {"draft": 0.25 * sum(seconds) / 33, "target": 0.5 * sum(seconds) / 33, "other": 0.25 * sum(seconds) / 33}
    )
    assert (ours.bits, ours.nominal_bits) == (4.5, 4)
    assert (ours.planted, ours.sample) == (False, False)


def test_ceilings_of_plain_and_of_coded_weights(tmp_path):
    link = LinkInfo(50.0, 5_000_000_000)
    plan = {"resident_layers": [1], "streamed_layers": [0, 2], "plain_bytes_per_pass": 12e9, "plain_resident": 0}
    write_run(tmp_path / "coded", turns([10.0], link=link), plan=plan)
    write_run(tmp_path / "plain", turns([10.0], link=link), config_of(seed=1))
    rows = by_folder(tmp_path)
    assert rows["plain"].ceilings == [("plain weights", pytest.approx(0.1))]
    # Two of three layers stream, each 4 GB uncoded.
    assert rows["coded"].ceilings == [("coded weights", pytest.approx(0.1)), ("plain weights", pytest.approx(8 / 50))]
    # Loading kept fewer layers than planned.
    write_run(tmp_path / "fewer", turns([10.0], link=link), config_of(seed=2), plan=plan, facts={"resident_layers": []})
    assert dict(by_folder(tmp_path)["fewer"].ceilings)["plain weights"] == pytest.approx(12 / 50)


@pytest.mark.parametrize(
    ("audit", "text"),
    [
        ({}, "passed: 30 exact, 2 near-tie(s) (gap 0.06)"),
        ({"mismatch": 1}, "FAILED: 30 exact, 2 near-tie(s) (gap 0.06), 1 mismatch(es)"),
        (None, "not run"),
    ],
)
def test_audits(tmp_path, audit, text):
    good = {"exact": 30, "near_tie": 2, "mismatch": 0, "max_gap": 0.06, "margin": 0.5}
    write_run(tmp_path / "run", turns([10.0], audit=None if audit is None else good | audit))
    (row,) = rows_below(tmp_path)
    assert audit_text(row) == text


def test_an_edited_configuration_does_not_end_the_report(tmp_path):
    broken = config_of() | {"draft": None, "tree": "beam", "quant": 3, "offload": []}
    write_run(tmp_path / "run", turns([10.0]), broken)
    (row,) = rows_below(tmp_path)
    assert row.method == "unknown draft"


# ------------------------------------------------------------------------------------- repeats, and labels


def test_repeats_are_pooled_and_shown(tmp_path):
    write_run(tmp_path / "first", turns([10.0, 10.0]), config_of(run_dir="a", logger={"name": "wandb"}))
    write_run(tmp_path / "second", turns([20.0, 20.0]), config_of(run_dir="b"))
    (row,) = rows_below(tmp_path)
    assert len(row.runs) == 2
    assert row.repeats == pytest.approx((10.0, 20.0))
    assert row.speed.value == pytest.approx(2 / (1 / 10 + 1 / 20)), "all tokens over all seconds"
    assert row.speed.samples == 2, "the same prompt twice is one sample"


def test_other_settings_and_other_machines_are_other_rows_with_other_names(tmp_path):
    write_run(tmp_path / "0", turns([10.0]))
    write_run(tmp_path / "1", turns([10.0]), config_of(draft={"name": "subspec", "temperature": 1.0}))
    write_run(tmp_path / "2", turns([10.0], device="cuda"), gpu="H200")
    rows, _ = compared(tmp_path)
    assert len(rows) == 3
    assert any("draft.temperature=1.0" in method for method in rows)
    assert any("on=H200" in method for method in rows)


def test_plain_decoding_does_not_depend_on_a_quantizer_it_does_not_have(tmp_path):
    for bits in (4, 3):
        plain_run(tmp_path / str(bits), config=config_of("none", quant={"name": "hqq", "bits": bits}))
    (row,) = rows_below(tmp_path)
    assert (len(row.runs), row.nominal_bits) == (2, None)


def test_plain_decoding_of_coded_weights_depends_on_the_quantizer_that_codes_them(tmp_path):
    """At other bits other bytes are streamed: no repeats of one another, and each the baseline of its own bits."""
    stream = {"name": "stream", "vram_gib": 8.0, "codec": "substitute"}

    def run(name, draft, bits, **changes):
        quant, facts = {"name": "hqq", "bits": bits}, {"codec": "substitute", "substitute": {"bits_per_weight": bits}}
        records = turns((10.0, 8.0), draft=draft, tau=1 if draft == "none" else 3)
        write_run(tmp_path / name, records, config_of(draft, quant=quant, offload=stream, **changes), facts=facts)

    for bits in (4, 8):
        run(f"plain{bits}", "none", bits)
        run(f"ours{bits}", "subspec", bits)
    run("again", "none", 4, tree={"name": "chain"})  # another tree is nothing to plain decoding: a repeat
    rows, notes = compared(tmp_path)
    plain = {bits: f"plain decoding, stream coded 8 GiB (quant.bits={bits})" for bits in (4, 8)}
    assert {name: len(row.runs) for name, row in rows.items() if row.draft == "none"} == {plain[4]: 2, plain[8]: 1}
    assert {row.nominal_bits: row.baseline.label for row in rows.values() if row.draft == "subspec"} == plain
    assert notes == []


def test_a_budget_is_labelled_by_what_it_came_to_and_what_it_counts(tmp_path):
    for counts in ("allocator", "device"):
        stream = {"name": "stream", "vram_gib": "auto", "vram_counts": counts}
        write_run(tmp_path / counts, turns(OURS), config_of(offload=stream), facts={"vram_gib": 6.9})
    assert {row.method.partition("stream ")[2] for row in rows_below(tmp_path)} == {"6.9 GiB", "6.9 GiB with CUDA"}


def test_other_weights_under_the_same_name_are_no_repeats(tmp_path):
    plain_run(tmp_path / "plain", facts={"weights": {"target": "a" * 64}})
    for weights in ("a", "b"):
        write_run(tmp_path / weights, turns(OURS), facts={"weights": {"target": weights * 64}})
    assert {row.method: row.baseline.differences for row in rows_below(tmp_path)} == {
        "plain decoding": (),
        f"{METHOD} (weights.target=aaaaaaaa)": (),
        f"{METHOD} (weights.target=bbbbbbbb)": ("weights of the target",),
    }


# -------------------------------------------------------------------------------------------- baselines


def test_only_the_same_prompts_of_the_same_target_compare(tmp_path):
    plain_run(tmp_path / "plain", benchmark="aime")
    plain_run(tmp_path / "sample", source="sample")
    write_run(tmp_path / "ours", turns(OURS))
    write_run(tmp_path / "theirs", turns(OURS, benchmark="aime", target="another"))
    rows, notes = make_rows(collect([tmp_path]))
    assert [row.baseline for row in rows if row.draft == "subspec"] == [None, None]
    assert notes == [
        "another on aime: no run of plain decoding (draft=none), so no speed-up",
        "some_target on gsm8k: no run of plain decoding (draft=none), so no speed-up",
    ]


@pytest.mark.parametrize("name", ["subspec", METHOD, "folder", "run"])
def test_a_baseline_by_draft_label_folder_or_name(pair, name):
    named = {"folder": str(pair / "ours"), "run": f"{pair.name}/ours"}.get(name, name)
    rows, _ = compared(pair, named)
    assert rows["plain decoding"].baseline.label == METHOD
    assert rows["plain decoding"].baseline.speedup.value < 1


def test_a_baseline_that_is_not_there_or_is_several(pair):
    with pytest.raises(SubspecError, match=r"--baseline nope: no such run; give a folder, or one of none; "):
        compared(pair, "nope")
    for temperature in (0.5, 1.0):
        draft = {"name": "subspec", "temperature": temperature}
        write_run(pair / str(temperature), turns(OURS), config_of(draft=draft))
    with pytest.raises(SubspecError, match="has several such rows"):
        compared(pair, "subspec")


def test_the_closest_plain_run_is_the_baseline(tmp_path):
    stream = {"name": "stream", "vram_gib": 8.0}
    plain_run(tmp_path / "whole")
    plain_run(tmp_path / "streamed", config=config_of("none", offload=stream))
    write_run(tmp_path / "ours", turns(OURS), config_of(offload=stream))
    assert by_folder(tmp_path)["ours"].baseline.label == "plain decoding, stream 8 GiB"


def test_streamed_runs_compare_with_plain_streaming_however_their_weights_are_kept(tmp_path):
    link = LinkInfo(50.0, 5_000_000_000)
    other, uncoded, coded = ({"name": n, "vram_gib": 8.0} for n in ("accelerate", "stream_uncoded", "stream"))
    plain_run(tmp_path / "accelerate", config=config_of("none", offload=other))
    plain_run(tmp_path / "streamed", config=config_of("none", offload=uncoded), link=link)
    write_run(tmp_path / "ours", turns(OURS, link=link), config_of(offload=coded))
    base = by_folder(tmp_path)["ours"].baseline
    assert base.label == "plain decoding, stream_uncoded 8 GiB"
    assert "offloading or budget" in base.differences


def test_what_else_differs_from_the_baseline_is_said(tmp_path):
    plain_run(tmp_path / "plain", PLAIN[:2], config=config_of("none", decoding={"name": "sampling"}))
    write_run(tmp_path / "ours", turns(OURS, device="cuda"), gpu="H200")
    said = by_folder(tmp_path)["ours"].baseline.differences
    assert said == ("device: H200 against a CPU, 2 thread(s)", "decoding settings", "samples: 3 against 2")


def test_other_prompts_of_one_benchmark_are_a_difference(tmp_path):
    plain_run(tmp_path / "plain")
    write_run(tmp_path / "ours", turns(OURS, prompt_sha256="other"))
    base = by_folder(tmp_path)["ours"].baseline
    assert base.differences == ("prompts",)
    assert not base.speedup.paired


def test_figures_of_several_texts_at_a_time_stay_apart(tmp_path):
    """A row of their own, marked; a speed-up needs a baseline of the same number, and prefers it to the machine's."""
    company = {"texts": 4, "texts_beside": 2.5, "loop_s": 0.5}
    decoding = {"name": "greedy", "texts": 4}
    plain_run(tmp_path / "plain", PLAIN)
    write_run(tmp_path / "old", turns(OURS))  # of a version without the key
    write_run(tmp_path / "one", turns(OURS, texts=1), config_of(decoding={"name": "greedy", "texts": 1}))
    write_run(tmp_path / "four", turns(OURS, **company), config_of(decoding=decoding))
    rows, notes = compared(tmp_path)
    assert notes == []
    one, four = rows[METHOD], rows[f"{METHOD}, 4 texts"]
    assert (one.texts, len(one.runs), four.texts, len(four.runs)) == ("1", 2, "4", 1)
    assert one.baseline.speedup is not None
    assert one.baseline.differences == ()
    assert four.baseline.speedup is None
    assert four.baseline.differences == ("texts: 4 against 1",)
    assert four.baseline.same_texts + len(four.baseline.other_texts) == 3
    together = four.totals["new_tokens"] / 1.5
    assert four.totals["tokens_per_s_together"] == pytest.approx(together)
    page = methods_table([one, four])
    for cell in ("texts at a time: tokens/s together", f"4: {number(together)}", "- [differs: texts: 4 against 1]"):
        assert f"| {cell} |" in page
    assert "texts at a time" not in methods_table([one])
    records = turns(PLAIN, draft="none", tau=1, **company)
    write_run(tmp_path / "plain4", records, config_of("none", decoding=decoding), gpu="another")
    base = by_folder(tmp_path)["four"].baseline
    assert base.label == "plain decoding, 4 texts"
    assert base.speedup is not None


def test_categories_have_their_own_speed_ups(tmp_path):
    """Two samples of one category and one of another, which gains less."""
    for name, draft, speeds, tau in (("plain", "none", PLAIN, 1), ("ours", "subspec", OURS, 3)):
        records = turns(speeds, draft=draft, tau=tau, benchmark="spec_bench")
        for one, category in zip(records, ("writing", "rag", "stem"), strict=True):
            one["category"] = category
        write_run(tmp_path / name, records, config_of(draft))
    base, row = rows_below(tmp_path)
    found = row.categories
    assert list(found) == ["multi-turn", "rag", "Overall"]
    assert [one["samples"] for one in found.values()] == [2, 1, 3]
    assert found["rag"]["speedup"].value == pytest.approx(20 / 8)
    multi_turn = (66 / (30 / 30 + 36 / 24)) / (22 / (10 / 10 + 12 / 12))
    assert found["multi-turn"]["speedup"].value == pytest.approx(multi_turn)
    assert found["Overall"]["speedup"] == row.baseline.speedup
    assert {one["speedup"] for one in base.categories.values()} == {None}
    assert rows_below(tmp_path / "ours")[0].categories["rag"]["speedup"] is None


def test_texts_are_compared_with_the_baseline(tmp_path):
    for draft, other in (("none", None), ("subspec", None), ("eagle2", 1)):
        records = turns(OURS, draft=draft)
        for index, one in enumerate(records):
            one["token_ids"] = [1, 2, 3 + (index == other)]
        write_run(tmp_path / draft, records, config_of(draft))
    bases = {row.draft: row.baseline for row in rows_below(tmp_path)}
    assert {draft: (base.same_texts, base.other_texts) for draft, base in bases.items()} == {
        "none": (0, ()),
        "subspec": (3, ()),
        "eagle2": (2, (("s1", 0),)),
    }
