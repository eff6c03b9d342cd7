"""Drafts that know nothing, everything, or lie: the engine's output must not depend on them."""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from subspec.decoding.draft import Draft
from subspec.decoding.engine import Engine
from subspec.decoding.hidden import FINAL_HIDDEN
from subspec.decoding.kv_cache import KVCache
from subspec.decoding.sampling import Sampling
from subspec.decoding.target_model import TargetModel
from subspec.decoding.text_loop import _Judged
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import TreePolicy
from subspec.drafts.substitute import SubstituteDraft, share_parameters
from subspec.quant.hqq import HqqQuantizer
from subspec.quant.quantize_model import quantize_model

CPU = torch.device("cpu")


class RandomDraft(Draft):
    """Proposes noise, and with ``broken`` > 0 that share of each of NaN, +infinity and -infinity."""

    def __init__(self, vocab_size: int, seed: int = 0, broken: float = 0.0) -> None:
        super().__init__(1.0)
        self.vocab_size, self.broken = vocab_size, broken
        self.generator = torch.Generator().manual_seed(seed)

    def begin(self, cache: KVCache) -> None:
        pass

    def expand(self, tree: Tree, frontier: Tensor) -> Tensor:
        logits = torch.randn(frontier.numel(), self.vocab_size, generator=self.generator) * 3
        chance = torch.rand(logits.shape, generator=self.generator)
        for index, value in enumerate((torch.nan, torch.inf, -torch.inf)):
            logits[(index * self.broken <= chance) & (chance < (index + 1) * self.broken)] = value
        return logits

    def commit(self, tree: Tree, path: Tensor, hidden: Tensor | None) -> None:
        pass


class OracleDraft(RandomDraft):
    """Proposes the next tokens of a given text, and remembers the features it was shown."""

    wants = FINAL_HIDDEN

    def __init__(self, vocab_size: int, future: list[int]) -> None:
        super().__init__(vocab_size)
        self.future = future
        self.position = 0
        self.features: list[Tensor] = []

    def observe(self, tokens: Tensor, hidden: Tensor | None) -> None:
        assert hidden is not None
        self.features.append(hidden)

    def expand(self, tree: Tree, frontier: Tensor) -> Tensor:
        at = self.position + tree.levels + 1
        logits = torch.zeros(frontier.numel(), self.vocab_size)
        if at < len(self.future):
            logits[:, self.future[at]] = 20.0
        return logits

    def commit(self, tree: Tree, path: Tensor, hidden: Tensor | None) -> None:
        assert hidden is not None
        assert hidden.shape[0] == path.numel()
        self.features.append(hidden)
        self.position += path.numel()


def substitute_of(
    model: PreTrainedModel, *, bits: int = 4, group_size: int = 32, unpack: bool = True
) -> PreTrainedModel:
    """A quantized substitute sharing ``model``'s parameters."""
    substitute = share_parameters(model)
    quantizer = HqqQuantizer(bits=bits, group_size=group_size, compute_dtype=torch.float32, device=CPU, unpack=unpack)
    quantize_model(substitute, quantizer, modules=["attention", "mlp"], skip_layers=[])
    return substitute


def engine_for(
    model: PreTrainedModel,
    policy: TreePolicy | None = None,
    *,
    bits: int = 4,
    sampling: Sampling | None = None,
    **options: object,
) -> Engine:
    """Plain decoding without a policy, else drafting with a substitute."""
    draft = SubstituteDraft(substitute_of(model, bits=bits)) if policy is not None else None
    options = {"max_length": 256, "prefill_chunk": 16, **options}
    return Engine(TargetModel(model), draft, policy, sampling=sampling, **options)


def begin(engine: Engine, prompt: list[int], texts: int = 1) -> Tensor:
    """The first token (int64 [1]) behind ``prompt``, which the engine reads in place of an earlier one.

    Args:
        texts: number of texts that begin with it.
    """
    engine.running.clear()
    for _ in range(texts):
        engine.admit(engine.text(prompt))
    engine._read_prompts()
    root = engine.running[0].root
    assert root is not None
    return root


def grow(engine: Engine, root: Tensor, most_levels: int) -> None:
    """Draft a tree from ``root`` behind the text that :func:`begin` has read."""
    engine.running[0].root = root
    engine._grow(engine.running, most_levels)


def all_verified(engine: Engine) -> list[_Judged]:
    """A target pass over the whole trees of all running texts, and what it accepts of each."""
    found: list[_Judged] = []
    for group in engine._pass.groups(engine._pass.run(engine.running, [])):
        found += engine._judge(group, *engine._pass.logits(group))
    return found


def verified(engine: Engine) -> _Judged:
    """As :func:`all_verified`, of the one text that runs."""
    return all_verified(engine)[-1]


def hf_greedy(model: PreTrainedModel, prompt: list[int], count: int, eos: int | None = None) -> list[int]:
    """transformers' own greedy text: the independent reference, generated once for each prompt."""
    known = GREEDY.setdefault(model, {})
    text = known.get((*prompt, eos), [])
    if len(text) < count and (not text or text[-1] != eos):
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=eos, pad_token_id=0
        )
        text = known[*prompt, eos] = output[0, len(prompt) :].tolist()
    return text[:count]


GREEDY: WeakKeyDictionary[PreTrainedModel, dict[tuple[int | None, ...], list[int]]] = WeakKeyDictionary()
"""Longest greedy text of each model by prompt and end of text."""
