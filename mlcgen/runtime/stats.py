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
    """Seconds per page moved to or from the host, and per token of prompts: moving averages of what was measured."""

    WEIGHT = 0.2  # of a new measurement

    def __init__(self) -> None:
        self.page_seconds = 1e-4  # guesses, until there is a measurement
        self.token_seconds = 1e-3

    def moved(self, num_pages: int, seconds: float) -> None:
        self.page_seconds += self.WEIGHT * (seconds / num_pages - self.page_seconds)

    def computed(self, num_tokens: int, seconds: float) -> None:
        """A step with chunks of prompts."""
        self.token_seconds += self.WEIGHT * (seconds / num_tokens - self.token_seconds)
