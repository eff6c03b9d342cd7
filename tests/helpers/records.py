"""Records and results to test with: deterministic, and with every field of a real one."""

from typing import Any

from subspec.decoding.result import FinishReason, GenerationResult, GenerationStats
from subspec.records.metrics import LinkInfo
from subspec.runs.turn import RunContext, turn_record

CONTEXT = RunContext(
    benchmark="gsm8k", source="file", target="tiny", draft="subspec", device="cpu", planted=False, seed=3
)

CONFIG: dict[str, Any] = {
    "target": {"name": "tiny", "dtype": "float32"},
    "draft": {"name": "subspec", "temperature": 0.2},
    "quant": {"name": "hqq", "bits": 4},
    "tree": {"name": "beam", "depth": 3, "width": 2},
    "benchmark": {"name": "gsm8k", "max_samples": 5},
    "logger": {"name": "none"},
    "experiment": None,
    "seed": 3,
    "run_dir": "somewhere",
    "resume": False,
    "audit": True,
}


def result(
    *,
    verified: int = 12,
    iterations: int = 4,
    drafted: tuple[int, ...] = (4, 4, 2),
    accepted: tuple[int, ...] = (4, 3, 1),
    reached: tuple[int, ...] = (4, 4, 2),
    block_s: tuple[float, ...] = (0.4, 0.5, 0.5, 0.6),
    prefill_s: float = 0.5,
    decode_s: float = 2.0,
    finish: FinishReason = FinishReason.eos,
    **stats: Any,
) -> GenerationResult:
    return GenerationResult(
        token_ids=list(range(100, 101 + verified)),
        text="an answer",
        finish_reason=finish,
        stats=GenerationStats(
            prompt_tokens=stats.pop("prompt_tokens", 30),
            iterations=iterations,
            verified_tokens=verified,
            drafted_by_depth=list(drafted),
            accepted_by_depth=list(accepted),
            reached_by_depth=list(reached),
            block_s=list(block_s),
            drafted_nodes=20,
            prefill_s=prefill_s,
            decode_s=decode_s,
            **stats,
        ),
    )


def record(index: int, turn: int = 0, *, link: LinkInfo | None = None, **fields: Any) -> dict[str, Any]:
    """Turn ``turn`` of sample ``index``, a little different for every index."""
    generation = result(
        verified=10 + index, iterations=3 + index % 3, decode_s=2.0 + index / 7, draft_s=1.1, verify_s=0.8
    )
    made = turn_record(
        CONTEXT,
        generation,
        sample_id=f"s{index}",
        sample_index=index,
        turn=turn,
        messages=[{"role": "user", "content": f"question {index}, «é»"}],
        link=link,
        peak_ram_gib=1.0 + index,
        correct=[True, False, None][index % 3],
        extracted="42",
        reference="42",
        audit={"exact": 10, "near_tie": 1, "mismatch": 0, "max_gap": index / 1000, "margin": 0.01},
    )
    return {**made, **fields}
