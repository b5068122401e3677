"""What bounds a step and a request of one engine, and how far a cache runs ahead of its text.

Scheduler, start check and front end ask the same numbers. Knows vLLM's configuration and lengths,
no blocks. Next: scheduling/admission.py, which reserves with them.
"""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request


class Limits(NamedTuple):
    """What bounds a step and a request of this engine, in tokens.

    Attributes:
        max_model_len: of a request.
        max_step_tokens: that one step computes at most.
        steps_in_flight: steps computed while a compaction waits for the step's output, that step
            included.
        drafts: tokens of a step that may be rejected, at most.
        lookahead: slots behind those of the step that a draft model writes.
    """

    max_model_len: int
    max_step_tokens: int
    steps_in_flight: int
    drafts: int = 0
    lookahead: int = 0

    @classmethod
    def of(cls, vllm_config: "VllmConfig") -> "Limits":
        """Reads the configuration of an engine."""
        scheduler = vllm_config.scheduler_config
        return cls(
            vllm_config.model_config.max_model_len,
            scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens,
            vllm_config.max_concurrent_batches,
            vllm_config.num_speculative_tokens,
            vllm_config.num_lookahead_tokens,
        )

    @property
    def max_advance(self) -> int:
        """Most tokens by which one step takes a decoding request on."""
        return 1 + self.drafts

    @property
    def drafted(self) -> int:
        """Most slots that a request holds for what may never be part of its text.

        Those of all steps under way, those by which it may have overrun the length at which it was
        due, and the draft model's.
        """
        return (self.steps_in_flight + 1) * self.drafts + self.lookahead

    @property
    def in_flight(self) -> int:
        """Most tokens above the length at which a request is due until it has been compacted."""
        return self.steps_in_flight + self.drafted

    def growth(self, num_steps: int) -> int:
        """Most slots by which a decoding request grows within so many steps."""
        return num_steps * self.max_advance + self.lookahead

    def final_len(self, request: "Request") -> int:
        """Most tokens of text that a request can reach."""
        return min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)

    def most_slots(self, request: "Request") -> int:
        """Most slots that a request can hold without compaction."""
        return self.final_slots(self.final_len(request))

    def final_slots(self, final_len: int) -> int:
        """Most slots of a request whose text ends there: its last steps may hold drafts."""
        return min(final_len + self.drafted, self.max_model_len)
