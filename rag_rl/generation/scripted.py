"""A generator that says what it was told to say: for tests, docs and dry runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rag_rl.errors import DataError
from rag_rl.generation.prompting import cut_at_stop, prompt_text
from rag_rl.types import Generation, Prompt


class ScriptedGenerator:
    """Replies from a script, in place of a model.

    Args:
        reply: one of

            - a mapping from the prompt's text (for chat turns: ``prompt_text`` of them, or the content of the last
              turn) to the reply;
            - a sequence of replies, used up in order over all calls, ``n`` after each other for a prompt;
            - a function of the prompt's text and the number of the reply, from 0, over all calls.

    Attributes:
        prompts: every prompt that was asked for so far, in order.

    Example:
        >>> generator = ScriptedGenerator({"Who?": "Mira."})
        >>> generator.generate(["Who?"], max_new_tokens=4, temperature=0.0)[0][0].text
        'Mira.'
    """

    def __init__(self, reply: Mapping[str, str] | Sequence[str] | Callable[[str, int], str]) -> None:
        self._reply = reply
        self._replies = 0
        self.prompts: list[Prompt] = []

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> list[list[Generation]]:
        """Looks the replies up; only ``n`` and ``stop`` have an effect.

        Args:
            prompts: B prompts.
            n: replies a prompt, >= 1.
            max_new_tokens: has no effect, there are no tokens here.
            temperature: has no effect.
            top_p: has no effect.
            stop: strings before which a reply is cut.
            seed: has no effect.

        Returns:
            B lists of ``n`` generations, without token ids.

        Raises:
            DataError: the script has no reply for a prompt, or no reply left.
        """
        del max_new_tokens, temperature, top_p, seed
        results = []
        for prompt in prompts:
            self.prompts.append(prompt)
            texts = [self._next(prompt) for _ in range(n)]
            results.append([Generation(text if (cut := cut_at_stop(text, stop)) is None else cut) for text in texts])
        return results

    def _next(self, prompt: Prompt) -> str:
        number, text = self._replies, prompt_text(prompt)
        self._replies += 1
        if isinstance(self._reply, Mapping):
            keys = [text] if isinstance(prompt, str) or not prompt else [text, prompt[-1]["content"]]
            for key in keys:
                if key in self._reply:
                    return self._reply[key]
            raise DataError(f"no reply is scripted for the prompt {text[:80]!r}")
        if callable(self._reply):
            return self._reply(text, number)
        if number >= len(self._reply):
            raise DataError(f"all {len(self._reply)} scripted replies are used up; asked for another by {text[:80]!r}")
        return self._reply[number]
