import json
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subspec.decoding.result import FinishReason
from subspec.records.metrics import PER_TURN_FIGURES, LinkInfo, ratio, speedup, summarise, turn_metrics
from subspec.runs.turn import prompt_digest, skipped_record, turn_record
from subspec.utils.files import json_line
from tests.helpers.records import CONTEXT, record, result

PER_TURN_FIELDS = {
    "prompt_tokens", "new_tokens", "iterations", "tau", "tau_published", "accept_rate_by_depth", "prefill_s",
    "decode_s", "tokens_per_s", "tokens_per_s_total", "draft_s", "verify_s", "transfer_s", "bytes_streamed",
    "link_gb_per_s", "roofline_tokens_per_s", "roofline_share", "link_busy_share", "peak_vram_gib", "device_vram_gib",
    "peak_ram_gib", "finish_reason",
}  # fmt: skip


def test_every_field_of_the_design_by_hand() -> None:
    generation = result(draft_s=1.2, verify_s=0.7, transfer_s=1.5, bytes_streamed=40_000_000_000)
    link = LinkInfo(gb_per_s=20.0, bytes_per_pass=10_000_000_000)
    metrics = turn_metrics(generation, link=link, peak_vram_gib=7.5, device_vram_gib=8.4, peak_ram_gib=20.0)
    assert set(metrics) >= PER_TURN_FIELDS
    assert metrics["prompt_tokens"] == 30
    assert metrics["new_tokens"] == 13
    assert metrics["iterations"] == 4
    assert metrics["tau"] == 12 / 4
    assert metrics["tau_published"] == 13 / 5
    assert metrics["accept_rate_by_depth"] == [1.0, 0.75, 0.5]
    assert metrics["tokens_per_s"] == 12 / 2.0
    assert metrics["tokens_per_s_total"] == 13 / 2.5
    # A pass streams 10 GB at 20 GB/s: two passes a second, three tokens each.
    assert metrics["roofline_tokens_per_s"] == pytest.approx(6.0)
    assert metrics["roofline_share"] == pytest.approx(1.0)
    assert metrics["link_busy_share"] == pytest.approx(1.5 / 2.5)
    assert (metrics["draft_s"], metrics["verify_s"], metrics["transfer_s"]) == (1.2, 0.7, 1.5)
    assert [metrics[f"{name}_gib"] for name in ("peak_vram", "device_vram", "peak_ram")] == [7.5, 8.4, 20.0]
    assert metrics["finish_reason"] == "eos"


def test_the_speed_up_is_of_the_turns_behind_which_plain_passes_were_timed() -> None:
    fast = turn_metrics(result(verified=12, decode_s=2.0), plain=(4, 2.0))
    slow = turn_metrics(result(verified=12, decode_s=6.0), plain=(2, 1.0))
    other = turn_metrics(result(verified=12, decode_s=100.0))
    assert [metrics["speedup_over_plain"] for metrics in (fast, slow, other)] == [3.0, 1.0, None]
    totals = summarise([record(0) | fast, record(1) | slow, record(2) | other])["totals"]
    assert (totals["plain_tokens"], totals["plain_s"]) == (6, 3.0)
    assert totals["speedup_over_plain"] == pytest.approx((24 / 8) / (6 / 3))
    assert summarise([record(2) | other])["totals"]["speedup_over_plain"] is None


def test_acceptance_and_block_times_by_hand() -> None:
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


def test_percentiles_and_histograms_are_pooled_and_old_records_have_no_new_figures() -> None:
    quick = record(0) | turn_metrics(result(block_s=(0.1,) * 98, draft_passes=7))
    slow = record(1) | turn_metrics(result(block_s=(1.0,) * 2, accepted=(2,), reached=(4, 2)))
    totals = summarise([quick, slow])["totals"]
    assert totals["accepted_histogram"] == [2, 3, 2, 1]
    assert totals["conditional_accept_rate_by_depth"] == [6 / 8, 3 / 6, 1 / 2]
    assert (totals["block_p50_s"], totals["block_p99_s"]) == pytest.approx((0.1, 1.0))
    assert totals["draft_acceptance_rate"] == 10 / 40
    assert totals["draft_passes"] == 7
    new = ("block_s", "reached_by_depth", "draft_passes")
    old = {key: value for key, value in slow.items() if key not in new}
    mixed = summarise([quick, old])["totals"]
    assert [mixed[name] for name in ("block_p50_s", "conditional_accept_rate_by_depth", "draft_passes")] == [None] * 3
    assert mixed["accepted_histogram"] == totals["accepted_histogram"], "follows from older fields"


def test_categories_are_grouped_and_pooled() -> None:
    def turn(index: int, category: str | None, benchmark: str = "spec_bench") -> dict:
        return {**record(index), "benchmark": benchmark, "category": category}

    records = [turn(0, "writing"), turn(1, "stem"), turn(2, "rag"), turn(3, None)]
    found = summarise(records)["categories"]
    assert {name: one["samples"] for name, one in found.items()} == {"multi-turn": 2, "rag": 1}
    assert (found["multi-turn"]["accuracy"], found["rag"]["accuracy"]) == (0.5, None)
    assert found["rag"]["tau"] == records[2]["tau"]
    assert set(summarise([turn(0, "writing", "mt_bench")])["categories"]) == {"writing"}


def test_without_offloading_the_link_figures_are_null() -> None:
    metrics = turn_metrics(result())
    names = ("link_gb_per_s", "bytes_per_pass", "roofline_tokens_per_s", "roofline_share", "link_busy_share")
    assert {metrics[name] for name in names} == {None}
    assert metrics["peak_vram_gib"] is None


def test_a_text_that_ended_with_the_first_token_has_no_rates() -> None:
    metrics = turn_metrics(
        result(verified=0, iterations=0, drafted=(), accepted=(), decode_s=0.0), link=LinkInfo(20.0, 10)
    )
    assert metrics["new_tokens"] == 1
    names = ("tau", "tau_published", "tokens_per_s", "roofline_tokens_per_s", "roofline_share")
    assert [metrics[name] for name in names] == [None] * 5
    assert metrics["tokens_per_s_total"] == 1 / 0.5
    assert metrics["accept_rate_by_depth"] == []


def test_everything_resident_has_no_roofline() -> None:
    assert turn_metrics(result(), link=LinkInfo(20.0, 0))["roofline_tokens_per_s"] is None


def test_depths_never_accepted_and_never_drafted() -> None:
    rates = turn_metrics(result(drafted=(4, 4, 0), accepted=(2,)))["accept_rate_by_depth"]
    assert rates == [0.5, 0.0, None]


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.0), (None, 1.0), (1.0, None), (1.0, -1.0)])
def test_ratio_is_none_rather_than_infinite(a: float | None, b: float | None) -> None:
    assert ratio(a, b) is None


# ------------------------------------------------------------------------------------------------ records


def test_a_record_is_strict_json_and_keeps_no_prompt() -> None:
    made = record(1)
    assert json.loads(json_line(made)) == made
    assert "question" not in json_line(made).decode()
    assert len(made["prompt_sha256"]) == 64
    assert made["audit"]["max_gap"] == 0.001
    assert (made["benchmark"], made["source"], made["target"], made["draft"]) == ("gsm8k", "file", "tiny", "subspec")


def test_the_prompt_digest_tells_prompts_apart() -> None:
    one, two = [{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]
    assert prompt_digest(one) == prompt_digest([{"content": "a", "role": "user"}])
    assert prompt_digest(one) != prompt_digest(two)


def test_an_unchecked_turn_has_null_answers() -> None:
    made = turn_record(CONTEXT, result(), sample_id="a", sample_index=0)
    assert (made["correct"], made["audit"]) == (None, None)


# ------------------------------------------------------------------------------------------------ summary


def test_totals_are_all_tokens_over_all_seconds() -> None:
    slow = record(0) | turn_metrics(result(verified=10, iterations=5, decode_s=10.0, prefill_s=1.0))
    fast = record(1) | turn_metrics(result(verified=90, iterations=10, decode_s=10.0, prefill_s=2.0))
    summary = summarise([slow, fast])
    totals, per_turn = summary["totals"], summary["per_turn"]
    assert totals["tokens_per_s"] == 100 / 20
    assert totals["tokens_per_s_total"] == 102 / 23
    assert totals["tau"] == 100 / 15
    assert totals["tau_published"] == 102 / 17
    assert totals["prefill_s"] == 3.0
    assert per_turn["tau"]["mean"] == (2 + 9) / 2, "a mean of ratios is not the ratio of sums"
    assert per_turn["tau"]["sd"] == pytest.approx(statistics.stdev([2, 9]))
    assert per_turn["tokens_per_s"] == {"n": 2, "mean": 5.0, "sd": pytest.approx(math.sqrt(32)), "median": 5.0}


def test_acceptance_is_pooled_over_iterations_not_averaged_over_turns() -> None:
    one = record(0) | turn_metrics(result(drafted=(10, 10), accepted=(10, 5)))
    two = record(1) | turn_metrics(result(drafted=(2,), accepted=(0,)))
    totals = summarise([one, two])["totals"]
    assert totals["accept_rate_by_depth"] == [10 / 12, 5 / 10]
    assert totals["drafted_by_depth"] == [12, 10]


def test_counts_skips_answers_and_audit() -> None:
    records = [record(index) for index in range(4)] + [record(3, turn=1, correct=None, finish_reason="length")]
    records[2]["audit"] = None
    records[1]["audit"]["mismatch"] = 2
    records += [
        skipped_record(CONTEXT, sample_id=f"long{n}", sample_index=9 + n, reason="prompt_too_long", prompt_tokens=5000)
        for n in range(2)
    ]
    summary = summarise(records)
    assert summary["counts"] == {
        "samples": 4,
        "turns": 5,
        "skipped": {"prompt_too_long": 2},
        "finish_reasons": {"eos": 4, "length": 1},
    }
    assert summary["accuracy"] == {"correct": 2, "checked": 3, "accuracy": 2 / 3, "unfinished": 1}
    expected = {
        "exact": 40,
        "near_tie": 4,
        "mismatch": 2,
        "max_gap": 0.003,
        "margin": 0.01,
        "turns": 4,
        "bitwise": 0,
        "errors": 2,
    }
    assert summary["audit"] == expected
    assert summary["peak_ram_gib"] == 4.0
    assert summary["peak_vram_gib"] is None


def test_only_texts_cut_before_their_answer() -> None:
    cut = record(0, correct=None, finish_reason="length")
    assert summarise([cut])["accuracy"] == {"correct": 0, "checked": 0, "accuracy": None, "unfinished": 1}


def test_nothing_checked_and_nothing_run() -> None:
    summary = summarise([])
    assert summary["accuracy"] is None
    assert summary["audit"] is None
    assert summary["totals"]["tokens_per_s"] is None
    assert summary["totals"]["accept_rate_by_depth"] == []
    assert json.loads(json_line(summary)) == summary


def test_the_pooled_roofline_is_that_of_one_long_turn() -> None:
    link = LinkInfo(gb_per_s=20.0, bytes_per_pass=10_000_000_000)
    streamed = {"transfer_s": 1.0, "bytes_streamed": 5}
    turns = [
        record(0) | turn_metrics(result(verified=10, iterations=5, decode_s=4.0, **streamed), link=link),
        record(1) | turn_metrics(result(verified=90, iterations=10, decode_s=8.0, **streamed), link=link),
    ]
    together = turn_metrics(
        result(verified=100, iterations=15, prefill_s=1.0, decode_s=12.0, transfer_s=2.0), link=link
    )
    totals = summarise(turns)["totals"]
    for name in ("roofline_tokens_per_s", "roofline_share", "link_busy_share", "link_gb_per_s", "bytes_per_pass"):
        assert totals[name] == pytest.approx(together[name]), name


def test_context_names_what_records_disagree_on() -> None:
    context = summarise([record(0), record(1, source="sample")])["context"]
    assert context["source"] == ["file", "sample"]
    assert context["planted"] is False
    assert context["seed"] == 3


@given(st.randoms(use_true_random=False), st.lists(st.integers(0, 60), max_size=12, unique=True))
def test_the_summary_depends_on_the_records_only(shuffler: random.Random, indices: list[int]) -> None:
    """Not on their order, and not on whether they come from memory or from disk: a resumed run has the same one."""
    link = LinkInfo(25.0, 13_000_000_000)
    records = [record(index, link=link if index % 2 else None) for index in indices]
    reordered = [json.loads(json_line(made)) for made in records]
    shuffler.shuffle(reordered)
    assert summarise(records) == summarise(reordered)
    assert set(summarise(records)["per_turn"]) == set(PER_TURN_FIGURES)


def test_speedup_over_a_named_baseline() -> None:
    ours = summarise([record(0) | turn_metrics(result(verified=60, decode_s=2.0, prefill_s=1.0))])
    plain = summarise([record(0, draft="none") | turn_metrics(result(verified=20, decode_s=2.0, prefill_s=1.0))])
    gain = speedup(ours, plain, "plain offloading")
    assert gain["baseline"] == "plain offloading"
    assert gain["tokens_per_s"] == pytest.approx(3.0)
    assert gain["tokens_per_s_total"] == pytest.approx(61 / 21)
    assert gain["differences"] == [], "the draft is what is being compared"


def test_texts_together_are_measured_by_the_loop() -> None:
    """The shares of texts side by side add up to the loop's seconds; those of earlier records are the text's own."""
    side = [record(n, texts=2, texts_beside=0.75, loop_s=1.5) for n in range(3)]
    many, one = summarise(side), summarise([record(n) for n in range(3)])
    tokens = sum(one["new_tokens"] for one in side)
    assert (many["totals"]["loop_s"], many["totals"]["tokens_per_s_together"]) == (4.5, tokens / 4.5)
    assert many["per_turn"]["texts_beside"]["mean"] == 0.75
    assert one["totals"]["tokens_per_s_together"] == one["totals"]["tokens_per_s_total"]
    assert (many["context"]["texts"], one["context"]["texts"]) == (2, 1)
    gain = speedup(many, one, "one")
    assert (gain["tokens_per_s"], gain["tokens_per_s_total"]) == (None, None)
    expected = many["totals"]["tokens_per_s_together"] / one["totals"]["tokens_per_s_total"]
    assert gain["tokens_per_s_together"] == pytest.approx(expected)
    assert gain["differences"] == ["texts: 2 against 1"]
    assert summarise([record(0, texts=2)])["totals"]["tokens_per_s_together"] is None


def test_speedup_says_what_else_differs() -> None:
    ours = summarise([record(0), record(1)])
    other = summarise([record(0, benchmark="mt_bench")])
    differences = speedup(ours, other, "b")["differences"]
    assert "benchmark: gsm8k against mt_bench" in differences
    assert "samples: 2 against 1" in differences
    assert speedup(ours, summarise([]), "empty")["tokens_per_s"] is None


def test_finish_reasons_are_the_plain_words() -> None:
    assert [turn_metrics(result(finish=reason))["finish_reason"] for reason in FinishReason] == [
        "eos",
        "stop",
        "length",
    ]
