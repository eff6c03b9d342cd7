import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subspec.decoding.result import FinishReason
from subspec.records.metrics import PER_TURN_FIGURES, LinkInfo, ratio, speedup, summarise, turn_metrics
from subspec.runs.turn import prompt_digest, skipped_record, turn_record
from subspec.utils.files import json_line
from tests.helpers.records import CONTEXT, record, result

LINK = LinkInfo(gb_per_s=20.0, bytes_per_pass=10_000_000_000)
LINK_FIGURES = ("roofline_tokens_per_s", "roofline_share", "link_busy_share", "link_gb_per_s", "bytes_per_pass")


def turn(index=0, *, link=None, plain=None, fields=None, **raw):
    """A record whose figures are those of ``result(**raw)``."""
    return record(index, **(fields or {})) | turn_metrics(result(**raw), link=link, plain=plain)


def totals(*records):
    return summarise(records)["totals"]


def test_every_field_of_the_design_by_hand():
    generation = result(draft_s=1.2, verify_s=0.7, transfer_s=1.5, bytes_streamed=40_000_000_000)
    metrics = turn_metrics(generation, link=LINK, peak_vram_gib=7.5, device_vram_gib=8.4, peak_ram_gib=20.0)
    expected = {"prompt_tokens": 30, "new_tokens": 13, "iterations": 4, "tau": 12 / 4, "tau_published": 13 / 5}
    expected |= {"tokens_per_s": 12 / 2.0, "tokens_per_s_total": 13 / 2.5, "prefill_s": 0.5, "decode_s": 2.0}
    expected |= {"draft_s": 1.2, "verify_s": 0.7, "transfer_s": 1.5, "bytes_streamed": 40_000_000_000}
    # A pass streams 10 GB at 20 GB/s: two passes a second, three tokens each.
    expected |= {"link_gb_per_s": 20.0, "roofline_tokens_per_s": 6.0, "roofline_share": 1.0}
    expected |= {"link_busy_share": 1.5 / 2.5, "peak_vram_gib": 7.5, "device_vram_gib": 8.4, "peak_ram_gib": 20.0}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert metrics["accept_rate_by_depth"] == [1.0, 0.75, 0.5]
    assert metrics["finish_reason"] == "eos"


def test_the_speed_up_is_of_the_turns_behind_which_plain_passes_were_timed():
    fast, slow = turn(0, decode_s=2.0, plain=(4, 2.0)), turn(1, decode_s=6.0, plain=(2, 1.0))
    other = turn(2, decode_s=100.0)
    assert [made["speedup_over_plain"] for made in (fast, slow, other)] == [3.0, 1.0, None]
    found = totals(fast, slow, other)
    assert (found["plain_tokens"], found["plain_s"]) == (6, 3.0)
    assert found["speedup_over_plain"] == pytest.approx((24 / 8) / (6 / 3))
    assert totals(other)["speedup_over_plain"] is None


def test_acceptance_and_block_times_by_hand():
    """Four passes accept 3, 2, 2 and 1 draft tokens; the adaptive tree of two of them ends at depth 2."""
    metrics = turn_metrics(result(drafted=(4, 4, 2), accepted=(4, 3, 1), reached=(4, 4, 1)))
    assert metrics["accepted_histogram"] == [0, 1, 2, 1]
    assert metrics["conditional_accept_rate_by_depth"] == [1.0, 0.75, 1.0]
    assert (metrics["accepted_nodes"], metrics["draft_acceptance_rate"]) == (8, 8 / 20)
    assert metrics["ttft_s"] == metrics["prefill_s"] == 0.5
    assert metrics["block_s"] == [0.4, 0.5, 0.5, 0.6]
    shares = [metrics[f"block_p{share}_s"] for share in (50, 95, 99)]
    assert shares == pytest.approx([0.5, 0.585, 0.597]), "linear interpolation"
    assert turn_metrics(result(block_s=(0.3,)))["block_p99_s"] == pytest.approx(0.3)
    plain = turn_metrics(result(drafted=(), accepted=(), reached=(), iterations=3, block_s=()))
    assert (plain["accepted_histogram"], plain["block_p50_s"]) == ([3], None)
    rates = turn_metrics(result(drafted=(4, 4, 0), accepted=(2,)))["accept_rate_by_depth"]
    assert rates == [0.5, 0.0, None], "never accepted, never drafted"


def test_percentiles_and_histograms_are_pooled_and_old_records_have_no_new_figures():
    quick = turn(0, block_s=(0.1,) * 98, draft_passes=7)
    slow = turn(1, block_s=(1.0,) * 2, accepted=(2,), reached=(4, 2))
    found = totals(quick, slow)
    assert found["accepted_histogram"] == [2, 3, 2, 1]
    assert found["conditional_accept_rate_by_depth"] == [6 / 8, 3 / 6, 1 / 2]
    assert (found["block_p50_s"], found["block_p99_s"]) == pytest.approx((0.1, 1.0))
    assert (found["draft_acceptance_rate"], found["draft_passes"]) == (10 / 40, 7)
    new = ("block_s", "reached_by_depth", "draft_passes")
    mixed = totals(quick, {key: value for key, value in slow.items() if key not in new})
    assert [mixed[name] for name in ("block_p50_s", "conditional_accept_rate_by_depth", "draft_passes")] == [None] * 3
    assert mixed["accepted_histogram"] == found["accepted_histogram"], "follows from older fields"


def test_categories_are_grouped_and_pooled():
    def one(index, category, benchmark="spec_bench"):
        return record(index, benchmark=benchmark, category=category)

    records = [one(0, "writing"), one(1, "stem"), one(2, "rag"), one(3, None)]
    found = summarise(records)["categories"]
    assert {name: own["samples"] for name, own in found.items()} == {"multi-turn": 2, "rag": 1}
    assert (found["multi-turn"]["accuracy"], found["rag"]["accuracy"]) == (0.5, None)
    assert found["rag"]["tau"] == records[2]["tau"]
    assert set(summarise([one(0, "writing", "mt_bench")])["categories"]) == {"writing"}


def test_figures_without_their_denominator_are_null():
    alone = turn_metrics(result())
    assert {alone[name] for name in (*LINK_FIGURES, "peak_vram_gib")} == {None}
    first_only = turn_metrics(result(verified=0, iterations=0, drafted=(), accepted=(), decode_s=0.0), link=LINK)
    names = ("tau", "tau_published", "tokens_per_s", "roofline_tokens_per_s", "roofline_share")
    assert [first_only[name] for name in names] == [None] * 5
    assert (first_only["new_tokens"], first_only["tokens_per_s_total"]) == (1, 1 / 0.5)
    assert first_only["accept_rate_by_depth"] == []
    assert turn_metrics(result(), link=LinkInfo(20.0, 0))["roofline_tokens_per_s"] is None, "all is resident"
    assert [ratio(*pair) for pair in ((1.0, 0.0), (None, 1.0), (1.0, None), (1.0, -1.0))] == [None] * 4


# ------------------------------------------------------------------------------------------------ records


def test_a_record_is_strict_json_and_keeps_no_prompt():
    made = record(1)
    assert json.loads(json_line(made)) == made
    assert "question" not in json_line(made).decode()
    assert len(made["prompt_sha256"]) == 64
    assert made["audit"]["max_gap"] == 0.001
    assert (made["benchmark"], made["source"], made["target"], made["draft"]) == ("gsm8k", "file", "tiny", "subspec")
    unchecked = turn_record(CONTEXT, result(), sample_id="a", sample_index=0)
    assert (unchecked["correct"], unchecked["audit"]) == (None, None)
    reasons = [turn_metrics(result(finish=reason))["finish_reason"] for reason in FinishReason]
    assert reasons == ["eos", "stop", "length"]


def test_the_prompt_digest_tells_prompts_apart():
    one, two = [{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]
    assert prompt_digest(one) == prompt_digest([{"content": "a", "role": "user"}])
    assert prompt_digest(one) != prompt_digest(two)


# ------------------------------------------------------------------------------------------------ summary


def test_totals_are_all_tokens_over_all_seconds():
    slow = turn(0, verified=10, iterations=5, decode_s=10.0, prefill_s=1.0)
    summary = summarise([slow, turn(1, verified=90, iterations=10, decode_s=10.0, prefill_s=2.0)])
    found, per_turn = summary["totals"], summary["per_turn"]
    expected = {"tokens_per_s": 100 / 20, "tokens_per_s_total": 102 / 23, "tau": 100 / 15, "tau_published": 102 / 17}
    assert {name: found[name] for name in expected} == expected
    assert found["prefill_s"] == 3.0
    assert per_turn["tau"]["mean"] == (2 + 9) / 2, "a mean of ratios is not the ratio of sums"
    assert per_turn["tau"]["sd"] == pytest.approx(statistics.stdev([2, 9]))
    assert per_turn["tokens_per_s"] == {"n": 2, "mean": 5.0, "sd": pytest.approx(math.sqrt(32)), "median": 5.0}


def test_acceptance_is_pooled_over_iterations_not_averaged_over_turns():
    found = totals(turn(0, drafted=(10, 10), accepted=(10, 5)), turn(1, drafted=(2,), accepted=(0,)))
    assert found["accept_rate_by_depth"] == [10 / 12, 5 / 10]
    assert found["drafted_by_depth"] == [12, 10]


def test_counts_skips_answers_and_audit():
    records = [record(index) for index in range(4)] + [record(3, turn=1, correct=None, finish_reason="length")]
    records[2]["audit"] = None
    records[1]["audit"]["mismatch"] = 2
    for n in range(2):
        place = {"sample_id": f"long{n}", "sample_index": 9 + n}
        records.append(skipped_record(CONTEXT, **place, prompt_tokens=5000, limit=400))
    summary = summarise(records)
    counts = {"samples": 4, "turns": 5, "skipped": {"prompt_too_long": 2}, "finish_reasons": {"eos": 4, "length": 1}}
    assert summary["counts"] == counts
    assert summary["accuracy"] == {"correct": 2, "checked": 3, "accuracy": 2 / 3, "unfinished": 1}
    audit = {"exact": 40, "near_tie": 4, "mismatch": 2, "max_gap": 0.003, "margin": 0.01}
    assert summary["audit"] == audit | {"turns": 4, "bitwise": 0, "errors": 2}
    assert (summary["peak_ram_gib"], summary["peak_vram_gib"]) == (4.0, None)


def test_runs_of_which_nothing_was_checked():
    cut = record(0, correct=None, finish_reason="length")
    assert summarise([cut])["accuracy"] == {"correct": 0, "checked": 0, "accuracy": None, "unfinished": 1}
    empty = summarise([])
    assert (empty["accuracy"], empty["audit"]) == (None, None)
    assert (empty["totals"]["tokens_per_s"], empty["totals"]["accept_rate_by_depth"]) == (None, [])
    assert json.loads(json_line(empty)) == empty


def test_the_pooled_roofline_is_that_of_one_long_turn():
    streamed = {"transfer_s": 1.0, "bytes_streamed": 5, "link": LINK}
    first = turn(0, verified=10, iterations=5, decode_s=4.0, **streamed)
    found = totals(first, turn(1, verified=90, iterations=10, decode_s=8.0, **streamed))
    long = result(verified=100, iterations=15, prefill_s=1.0, decode_s=12.0, transfer_s=2.0)
    together = turn_metrics(long, link=LINK)
    assert {name: found[name] for name in LINK_FIGURES} == pytest.approx(
        {name: together[name] for name in LINK_FIGURES}
    )


def test_context_names_what_records_disagree_on():
    context = summarise([record(0), record(1, source="sample")])["context"]
    assert (context["source"], context["planted"], context["seed"]) == (["file", "sample"], False, 3)


@given(st.randoms(use_true_random=False), st.lists(st.integers(0, 60), max_size=12, unique=True))
def test_the_summary_depends_on_the_records_only(shuffler, indices):
    """Not on their order, and not on whether they come from memory or from disk: a resumed run has the same one."""
    records = [record(index, link=LINK if index % 2 else None) for index in indices]
    reordered = [json.loads(json_line(made)) for made in records]
    shuffler.shuffle(reordered)
    assert summarise(records) == summarise(reordered)
    assert set(summarise(records)["per_turn"]) == set(PER_TURN_FIGURES)


def test_speedup_over_a_named_baseline():
    ours = summarise([turn(0, verified=60, decode_s=2.0, prefill_s=1.0)])
    plain = summarise([turn(0, fields={"draft": "none"}, verified=20, decode_s=2.0, prefill_s=1.0)])
    gain = speedup(ours, plain, "plain offloading")
    assert gain["baseline"] == "plain offloading"
    assert gain["tokens_per_s"] == pytest.approx(3.0)
    assert gain["tokens_per_s_total"] == pytest.approx(61 / 21)
    assert gain["differences"] == [], "the draft is what is being compared"
    differences = speedup(summarise([record(0), record(1)]), summarise([record(0, benchmark="mt_bench")]), "b")
    assert {"benchmark: gsm8k against mt_bench", "samples: 2 against 1"} <= set(differences["differences"])
    assert speedup(ours, summarise([]), "empty")["tokens_per_s"] is None


def test_texts_together_are_measured_by_the_loop():
    """The shares of texts side by side add up to the loop's seconds; those of earlier records are the text's own."""
    side = [record(n, texts=2, texts_beside=0.75, loop_s=1.5) for n in range(3)]
    many, one = summarise(side), summarise([record(n) for n in range(3)])
    tokens = sum(made["new_tokens"] for made in side)
    assert (many["totals"]["loop_s"], many["totals"]["tokens_per_s_together"]) == (4.5, tokens / 4.5)
    assert many["per_turn"]["texts_beside"]["mean"] == 0.75
    assert one["totals"]["tokens_per_s_together"] == one["totals"]["tokens_per_s_total"]
    assert (many["context"]["texts"], one["context"]["texts"]) == (2, 1)
    gain = speedup(many, one, "one")
    assert (gain["tokens_per_s"], gain["tokens_per_s_total"]) == (None, None)
    expected = many["totals"]["tokens_per_s_together"] / one["totals"]["tokens_per_s_total"]
    assert gain["tokens_per_s_together"] == pytest.approx(expected)
    assert gain["differences"] == ["texts: 2 against 1"]
    assert totals(record(0, texts=2))["tokens_per_s_together"] is None
