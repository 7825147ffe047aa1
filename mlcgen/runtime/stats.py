"""What an engine counts and measures of itself."""

from dataclasses import dataclass

__all__ = ["EngineStats", "Rates"]


@dataclass
class EngineStats:
    """Counts since the engine was made, and what it holds now."""

    num_steps: int = 0
    num_prompt_tokens: int = 0  # of requests that were admitted
    num_cached_tokens: int = 0  # of these, those that were in the cache
    num_generated_tokens: int = 0
    num_preemptions: int = 0  # of requests that have ended
    num_saved: int = 0  # pages copied to the host
    num_loaded: int = 0  # and back
    swap_seconds: float = 0.0  # spent on that
    num_drafted: int = 0  # tokens that were guessed
    num_accepted: int = 0  # and right
    policy_seconds: float = 0.0  # spent in the scheduler
    num_running: int = 0
    num_waiting: int = 0
    num_pages: int = 0
    num_free_pages: int = 0  # can be allocated
    num_idle_pages: int = 0  # of these, those whose contents are kept
    num_saved_pages: int = 0  # in use on the host

    @property
    def hit_rate(self) -> float:
        """Prompt tokens that needed no computation, as a share of all."""
        return self.num_cached_tokens / max(self.num_prompt_tokens, 1)

    @property
    def acceptance(self) -> float:
        """Guessed tokens that were right, as a share of all."""
        return self.num_accepted / max(self.num_drafted, 1)


class Rates:
    """Seconds per page moved to or from the host, and per token of prompts, as measured; older steps count less."""

    DECAY = 0.9  # with each measurement

    def __init__(self) -> None:
        # [units, seconds]: guesses that the first measurements outweigh
        self._pages, self._tokens = [1.0, 1e-4], [1.0, 1e-3]

    @property
    def page_seconds(self) -> float:
        return self._pages[1] / self._pages[0]

    @property
    def token_seconds(self) -> float:
        return self._tokens[1] / self._tokens[0]

    def moved(self, num_pages: int, seconds: float) -> None:
        self._add(self._pages, num_pages, seconds)

    def computed(self, num_tokens: int, seconds: float) -> None:
        """A step with chunks of prompts. Large ones, which tell most, weigh most."""
        self._add(self._tokens, num_tokens, seconds)

    def _add(self, sums: list[float], units: int, seconds: float) -> None:
        sums[0], sums[1] = sums[0] * self.DECAY + units, sums[1] * self.DECAY + seconds
