"""The engine: one text from its prompt to its end, and texts for a scheduler."""

import time
from collections.abc import Sequence

import torch

from subspec.decoding.arguments import prompt_list, stop_list, whole_number
from subspec.decoding.draft import Draft
from subspec.decoding.result import GenerationResult, GenerationStats
from subspec.decoding.sampling import Sampler, Sampling
from subspec.decoding.shared_pass import LOGITS_ROWS
from subspec.decoding.stopping import OutputBuffer, TextDecoder
from subspec.decoding.target_model import TargetModel
from subspec.decoding.text import Text, TokenCallback
from subspec.decoding.text_loop import TextLoop
from subspec.decoding.tree_policy import TreePolicy
from subspec.decoding.verify import finite_choice, verify
from subspec.errors import SubspecError
from subspec.utils.rounding import round_up


class Engine(TextLoop):
    """Generates texts with a target model and, optionally, a draft. Reusable.

    :meth:`generate` runs one text; several at a time run through a :class:`~subspec.decoding.scheduler.Scheduler`.

    Args:
        target: the model whose output is reproduced.
        draft, policy: the draft and the shape of its trees; both None for plain decoding.
        sampling: greedy by default.
        max_length: most tokens of prompt and output together.
        prefill_chunk: prompt tokens per target pass.
        eos_token_ids: ids that end a text.
        tokenizer: for text and stop strings; None: ids only.
        texts: most texts that run side by side.

    Attributes:
        sampler: of :meth:`generate`; its distribution is that of texts that name none.
    """

    def __init__(
        self,
        target: TargetModel,
        draft: Draft | None = None,
        policy: TreePolicy | None = None,
        *,
        sampling: Sampling | None = None,
        max_length: int = 2048,
        prefill_chunk: int = 256,
        eos_token_ids: Sequence[int] = (),
        tokenizer: TextDecoder | None = None,
        texts: int = 1,
    ) -> None:
        if (draft is None) != (policy is None):
            raise ValueError("a draft and a tree policy go together")
        if policy is not None and policy.width > target.vocab_size:
            raise ValueError(f"a tree of width {policy.width} is wider than the vocabulary of {target.vocab_size}")
        super().__init__(target, draft, policy, max_length=max_length, prefill_chunk=prefill_chunk, texts=texts)
        self.eos_token_ids = tuple(eos_token_ids)
        self.tokenizer = tokenizer
        self.sampler = Sampler(sampling or Sampling(), target.vocab_size, target.device)

    def reserve(self, texts: int) -> None:
        """Make room for ``texts`` texts side by side, if there is less; no text may be running.

        Raises:
            ConfigError: the draft serves one text at a time.
        """
        if texts > len(self._places):
            self.check_idle()
            self._reserve(texts, self.draft)

    def check_idle(self) -> None:
        """Refuse work that needs the places of running texts.

        Raises:
            SubspecError: texts are running.
        """
        if self.running:
            raise SubspecError(f"the engine is running {len(self.running)} texts of a scheduler")

    @torch.inference_mode()
    def prepare(self, prompt_ids: Sequence[int]) -> None:
        """Run every shape once before anything is timed, to compile, capture and load kernels.

        Otherwise the first deep trees, and the first pass over each number of rows, take tens of milliseconds longer on
        a GPU. Does nothing on a CPU.
        """
        if self.target.device.type != "cuda":
            return
        self.check_idle()
        most, multiple = self.policy.pass_nodes if self.policy is not None else 1, self._pass.row_multiple
        try:
            for _ in self._places:
                self.admit(self.text(prompt_ids))
            self._read_prompts()
            while self.running:
                self._grow(self.running, self.policy.max_depth if self.policy else 0, whole=True)
                most = min(most, self.tree.size)
                # Without rounding there is one kernel for any number of rows.
                first = most if multiple == 1 else multiple
                for rows in range(first, round_up(most, multiple) + 1, multiple):
                    hidden = self._pass.trees([text.own for text in self.running], rows)
                    for piece in hidden.final.split(max(rows, LOGITS_ROWS)):
                        self.target.logits(piece).argmax(dim=-1)
                self.leave(self.running[-1])
        finally:
            self.running.clear()
        torch.cuda.synchronize(self.target.device)

    @torch.inference_mode()
    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        seed: int = 0,
        on_tokens: TokenCallback | None = None,
    ) -> GenerationResult:
        """Continue a prompt.

        Args:
            prompt_ids: at least one token id, fewer than ``max_length``.
            max_new_tokens: most tokens to emit; None: until ``max_length``.
            stop: a string, or strings, that end the text.
            ignore_eos: go on to the length limit.
            seed: of the samples; the same seed gives the same text with any draft.
            on_tokens: called with every emitted block, from the first token on.

        Raises:
            SubspecError: an argument has the wrong type or is out of range (the message names it), the target's logits
                are not finite, or texts of a scheduler are running.
        """
        self.check_idle()
        text = self.text(prompt_ids, max_new_tokens=max_new_tokens, stop=stop, ignore_eos=ignore_eos, seed=seed)
        text.on_tokens, text.sampler = on_tokens, self.sampler
        self.sampler.reseed(seed)
        self.admit(text)
        try:
            while not text.ended:
                self.step()
        finally:
            self.leave(text)
        if text.error is not None:
            raise text.error
        assert text.result is not None
        return text.result

    @torch.inference_mode()
    def time_plain(self, tokens: int) -> tuple[int, float]:
        """Time passes of one row, plain decoding's, behind the last generated text, which they do not change.

        Args:
            tokens: number of timed passes, one token each; fewer if ``max_length`` leaves no room.

        Returns:
            The number of passes and their seconds. One more goes before them: the first of its shape takes longer.
        """
        place = self._places[0]
        tokens = max(0, min(tokens, self.max_length - place.cache.length - 2))
        root, times = place.tree.tokens[:1].clone(), []
        for _ in range(tokens + 1 if tokens else 0):
            path = place.tree.plant(root)
            logits = self.target.logits(self._pass.trees([place], 1).final)  # not rounded up, as a tree's rows are
            chosen = self.sampler.choose(logits, place.cache.length + 1, place.tree.depths[:1], 1)
            root = verify(place.tree, chosen, 0, finite_choice(logits, chosen)).bonus
            place.cache.accept(path)
            root.tolist()  # a text would wait for its token
            times.append(time.perf_counter())
        return tokens, times[-1] - times[0] if times else 0.0

    def text(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] | str = (),
        ignore_eos: bool = False,
        seed: int = 0,
        sampling: Sampling | None = None,
        on_tokens: TokenCallback | None = None,
    ) -> Text:
        """A text that does not run yet; arguments as of :meth:`generate`.

        Args:
            sampling: None: the engine's own.

        Raises:
            SubspecError: as :meth:`generate`.
        """
        prompt_ids = prompt_list(prompt_ids)
        whole_number("seed", seed, least=0)
        output = self.output_buffer(prompt_ids, max_new_tokens=max_new_tokens, stop=stop, ignore_eos=ignore_eos)
        sampler = Sampler(sampling or self.sampler.sampling, self.target.vocab_size, self.target.device)
        sampler.reseed(seed)
        return Text(prompt_ids, output, sampler, on_tokens, GenerationStats(prompt_tokens=len(prompt_ids)))

    def output_buffer(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] | str = (),
        ignore_eos: bool = False,
    ) -> OutputBuffer:
        """The buffer that collects the tokens of a text and ends it; arguments as of :meth:`generate`."""
        if max_new_tokens is not None:
            whole_number("max_new_tokens", max_new_tokens, least=1)
        room = self._room(prompt_ids)
        return OutputBuffer(
            eos_token_ids=() if ignore_eos else self.eos_token_ids,
            max_new_tokens=room if max_new_tokens is None else min(room, max_new_tokens),
            stop=stop_list(stop),
            tokenizer=self.tokenizer,
        )

    def _room(self, prompt_ids: Sequence[int]) -> int:
        """Tokens that may follow the prompt."""
        if len(prompt_ids) >= self.max_length:
            raise SubspecError(
                f"the prompt has {len(prompt_ids)} tokens and decoding.max_length={self.max_length} leaves no room "
                f"for an answer: raise decoding.max_length or shorten the prompt"
            )
        if max(prompt_ids) >= self.target.vocab_size or min(prompt_ids) < 0:
            raise SubspecError(
                f"the prompt holds a token id outside the target's vocabulary of {self.target.vocab_size}: "
                "such tokens were added to its tokenizer, or the prompt was made with another one"
            )
        return self.max_length - len(prompt_ids)
