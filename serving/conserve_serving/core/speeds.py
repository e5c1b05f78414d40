"""What an engine's own reports teach about its speed. Used in every cost comparison.

A profile's figures are the starting point and count as a little evidence; reports outweigh them
as they come in, and old reports fade, so that a throttled or a mis-described engine is found out.
"""

from __future__ import annotations

from conserve_serving.core.events import StepTimes
from conserve_serving.core.types import EngineSpeeds, Link

# Share of the old evidence that survives one report with news.
_KEEP = 0.9
# How much the prior is worth against decode reports: a second or so of steps.
_PRIOR_DECODE_STEPS = 64.0
# ... and against prefill reports: one long prompt.
_PRIOR_PREFILL_TOKENS = 8192.0
# Share of that which a mere guess is worth: nothing, as soon as there is anything else.
_GUESS = 1e-6
# Prompts from this length on say what a token costs, shorter ones what a turn costs.
_LONG_PROMPT_TOKENS = 1024
# Hand-offs and mixed steps are learned by a plain moving average of this weight.
_ALPHA = 0.2


class LearnedSpeeds:
    """Prefill speed, decode step time and interference of one engine, learned online.

    Prefill is a cost for each turn plus a cost for each uncached token: a turn that appends 67
    tokens takes a whole step, which says little about 15,000, so long prompts teach the one and
    short ones the other. Beside decodes, too: there long prompts teach how much the two slow
    each other down, short ones what a turn costs. Decode is a line over the KV tokens a step
    reads (it is bound by memory bandwidth), fitted by least squares with forgetting; its slope
    stays at the prior until the reports have seen batches that differ enough to tell it.

    Args:
        prior: what is believed before any report.
        guessed: the prior is nobody's figure: the first report outweighs it.
    """

    __slots__ = (
        "_base_s",
        "_believed",
        "_mixed",
        "_n",
        "_prior",
        "_seen",
        "_slope_s",
        "_tokens",
        "_tokens_s",
        "_turn_s",
        "_x",
        "_xx",
        "_xy",
        "_y",
    )

    def __init__(self, prior: EngineSpeeds, *, guessed: bool = False) -> None:
        self._prior = self._believed = prior
        trust = _GUESS if guessed else 1.0
        self._tokens = trust * _PRIOR_PREFILL_TOKENS
        self._tokens_s = self._tokens / prior.prefill_tokens_per_s
        self._turn_s = 0.0
        self._n = trust * _PRIOR_DECODE_STEPS
        self._x = self._xx = self._xy = 0.0
        self._y = self._n * prior.decode_step_s
        self._mixed = prior.mixed_slowdown
        self._seen = False  # a decode step
        self._base_s, self._slope_s = self._fit_decode()

    def observe(self, steps: StepTimes, *, prefilled_turns: int = 1) -> None:
        """Learn from one report's sums.

        Args:
            steps: what the engine did since its previous report.
            prefilled_turns: turns whose prompts it finished since then.
        """
        tokens = steps.prefill_tokens + steps.mixed_prefill_tokens
        turns = max(1, prefilled_turns) / tokens if tokens else 0.0
        if steps.prefill_tokens > 0 and steps.prefill_s > 0:
            self._observe_prefill(turns * steps.prefill_tokens, steps)
        if steps.decode_steps > 0 and steps.decode_s > 0:
            self._seen = True
            n = float(steps.decode_steps)
            x, y = steps.decode_kv_tokens / n, steps.decode_s / n
            self._n = self._n * _KEEP + n
            self._x = self._x * _KEEP + n * x
            self._y = self._y * _KEEP + n * y
            self._xx = self._xx * _KEEP + n * x * x
            self._xy = self._xy * _KEEP + n * x * y
            self._base_s, self._slope_s = self._fit_decode()
        if steps.mixed_steps > 0 and steps.mixed_s > 0:
            self._observe_mixed(turns * steps.mixed_prefill_tokens, steps)

    def _observe_mixed(self, turns: float, steps: StepTimes) -> None:
        mean_kv = steps.mixed_kv_tokens / steps.mixed_steps
        decode_s = steps.mixed_steps * self.decode_step_s(mean_kv)
        tokens = steps.mixed_prefill_tokens
        if tokens < _LONG_PROMPT_TOKENS * turns:
            # On a busy decoder appends are never computed alone: what a turn costs shows here.
            rest_s = max(0.0, steps.mixed_s / self._mixed - decode_s - tokens * self.token_s)
            self._turn_s += _ALPHA * (rest_s / turns - self._turn_s)
        else:
            parts_s = decode_s + self._prefill_s(turns, tokens)
            self._mixed += _ALPHA * (max(1.0, steps.mixed_s / parts_s) - self._mixed)

    def _observe_prefill(self, turns: float, steps: StepTimes) -> None:
        tokens, seconds = steps.prefill_tokens, steps.prefill_s
        if tokens < _LONG_PROMPT_TOKENS * turns:
            rest_s = max(0.0, seconds - tokens * self.token_s) / turns
            self._turn_s += _ALPHA * (rest_s - self._turn_s)
        else:
            self._tokens = self._tokens * _KEEP + tokens
            self._tokens_s = self._tokens_s * _KEEP + max(seconds - turns * self._turn_s, 0.0)

    @property
    def token_s(self) -> float:
        """Seconds each uncached token of a long prompt takes."""
        return self._tokens_s / self._tokens

    @property
    def prefill_tokens_per_s(self) -> float:
        """Uncached tokens per second within a long prompt."""
        return self._tokens / self._tokens_s

    @property
    def mixed_slowdown(self) -> float:
        """Step time with prefill in the step over the sum of its parts."""
        return self._mixed

    def prefill_s(self, tokens: float) -> float:
        """Seconds to prefill a turn of ``tokens`` uncached tokens with the engine to itself."""
        return self._prefill_s(1.0, tokens) if tokens else 0.0

    def _prefill_s(self, turns: float, tokens: float) -> float:
        return turns * self._turn_s + tokens * self.token_s

    def decode_step_s(self, kv_tokens: float) -> float:
        """Seconds of one decode step that reads ``kv_tokens`` of KV."""
        return self._base_s + self._slope_s * kv_tokens

    def decode_bias(self, kv_tokens: float) -> float | None:
        """Step time as observed over what was believed at first; None: no step was observed."""
        if not self._seen:
            return None
        prior = self._believed
        believed_s = prior.decode_step_s + prior.decode_step_s_per_kv_token * kv_tokens
        return self.decode_step_s(kv_tokens) / believed_s

    def liken(self, seen: LearnedSpeeds) -> LearnedSpeeds:
        """What is to be believed of this engine once another of its kind has been seen at work.

        What was believed at first stays on record, so that nobody corrects the new figures by the
        error of the old ones a second time.
        """
        likened = LearnedSpeeds(seen.snapshot(), guessed=True)
        likened._believed, likened._seen = self._believed, seen._seen
        return likened

    def snapshot(self) -> EngineSpeeds:
        """What is believed now, in the form it was first given."""
        return EngineSpeeds(
            prefill_tokens_per_s=self.prefill_tokens_per_s,
            decode_step_s=self._base_s,
            decode_step_s_per_kv_token=self._slope_s,
            mixed_slowdown=self._mixed,
        )

    def _fit_decode(self) -> tuple[float, float]:
        mean_x, mean_y = self._x / self._n, self._y / self._n
        variance = self._xx / self._n - mean_x * mean_x
        slope = self._prior.decode_step_s_per_kv_token
        # A spread below a tenth of the mean says nothing about a slope.
        if variance > (0.1 * mean_x) ** 2 and variance > 0:
            slope = max(0.0, (self._xy / self._n - mean_x * mean_y) / variance)
        # A step never costs less than a tenth of the mean observed one, whatever the line says.
        return max(mean_y - slope * mean_x, 0.1 * mean_y), slope


class LearnedLink:
    """Time of a hand-off: the link's bandwidth as given, its set-up time learned from hand-offs."""

    __slots__ = ("_per_token_s", "_setup_s")

    def __init__(self, prior: Link) -> None:
        self._setup_s = prior.setup_s
        self._per_token_s = prior.kv_bytes_per_token / prior.bytes_per_s

    def observe(self, tokens: int, duration_s: float) -> None:
        """Learn from one hand-off, acknowledgement included."""
        residual_s = max(0.0, duration_s - tokens * self._per_token_s)
        self._setup_s += _ALPHA * (residual_s - self._setup_s)

    def handoff_s(self, tokens: float) -> float:
        """Seconds to hand ``tokens`` of KV over."""
        return self._setup_s + tokens * self._per_token_s
