"""Several texts at a time: waiting texts join running ones between passes, and leave when they end."""

from collections import deque
from collections.abc import Sequence

from subspec.decoding.arguments import whole_number
from subspec.decoding.engine import Engine
from subspec.decoding.sampling import Sampling
from subspec.decoding.text import Text, TokenCallback


class Scheduler:
    """Runs texts on an engine, as many at a time as it has places; the others wait in the order of their arrival.

    A text's tokens are those that :meth:`Engine.generate` yields for it alone, in any company. Not thread-safe.

        scheduler = Scheduler(engine, texts=4)
        texts = [scheduler.add(prompt) for prompt in prompts]
        while not scheduler.idle:
            for text in scheduler.step():
                print(text.error or text.result.text)

    Args:
        engine: its :meth:`Engine.generate` is refused while texts run.
        texts: most texts at a time; an engine with fewer places gets more.

    Raises:
        ConfigError: the draft serves one text at a time.
    """

    def __init__(self, engine: Engine, texts: int) -> None:
        self.texts = whole_number("texts", texts, least=1)
        engine.reserve(self.texts)
        self.engine = engine
        self._waiting: deque[Text] = deque()

    @property
    def running(self) -> int:
        """Number of texts that have a place."""
        return len(self.engine.running)

    @property
    def waiting(self) -> int:
        """Number of texts that wait for one."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not self.engine.running and not self._waiting

    def add(
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
        """Queue a text; arguments as of :meth:`Engine.generate`.

        Args:
            sampling: the distribution of this text; None: the engine's own.

        Raises:
            SubspecError: an argument has the wrong type or is out of range (the message names it).
        """
        text = self.engine.text(
            prompt_ids,
            max_new_tokens=max_new_tokens,
            stop=stop,
            ignore_eos=ignore_eos,
            seed=seed,
            sampling=sampling,
            on_tokens=on_tokens,
        )
        self._waiting.append(text)
        return text

    def remove(self, text: Text) -> None:
        """Drop a text that waits or runs, and free its place; nothing happens to one that has ended."""
        if text in self._waiting:
            self._waiting.remove(text)
        else:
            self.engine.leave(text)

    def step(self) -> list[Text]:
        """One pass for all running texts, after waiting ones have joined; returns those that ended.

        ``Text.result`` holds the result, or ``Text.error`` the reason why there is none: logits that are not finite, or
        an exception of ``on_tokens``. Neither ends another text.
        """
        while self._waiting and len(self.engine.running) < self.texts:
            self.engine.admit(self._waiting.popleft())
        return self.engine.step() if self.engine.running else []
