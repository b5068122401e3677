"""One unsupported feature: what users know it by, how it is found, and the cure."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from rkv_vllm.layer_budgets import METHOD
from rkv_vllm.options import CONFIG_KEY

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


class Refusal(NamedTuple):
    """One unsupported feature.

    Attributes:
        feature: what users know it by.
        got: what an engine config has set, None where it does without the feature.
        wanted: what to set instead.
        cure: the way there.
        early: asked of the engine arguments already, which have the same fields: vLLM takes long
            to make a config, and may hide the feature or advise what would be refused next.
    """

    feature: str
    got: "Callable[[VllmConfig], str | None]"
    wanted: str
    cure: str
    early: bool = False

    def find(self, vllm_config: "VllmConfig") -> str | None:
        """Returns the sentence that users read, None where the feature is not in use."""
        got = self.got(vllm_config)
        if got is None:
            return None
        return (
            f"KV cache compression does not support {self.feature}: got {got}, "
            f"wanted {self.wanted}; {self.cure}"
        )


def named(model: "ModelConfig") -> str:
    """A model as messages show it."""
    return f"{', '.join(model.architectures)} ({model.model})"


def pipeline_stages(vllm_config: "VllmConfig") -> str | None:
    """The flag, where a model is cut into stages."""
    number = vllm_config.parallel_config.pipeline_parallel_size
    return f"--pipeline-parallel-size {number}" if number > 1 else None


def layer_budgets(vllm_config: "VllmConfig") -> str | None:
    """The setting, where layers have budgets of their own."""
    options = vllm_config.additional_config[CONFIG_KEY]
    setting = options.get("layer_budgets", METHOD)
    return None if setting == METHOD else setting


def refused_model(
    feature: str,
    is_used: "Callable[[VllmConfig], bool]",
    wanted: str = "a decoder whose attention keeps keys and values of every token",
) -> Refusal:
    """A row about what a checkpoint is, whatever the flags."""

    def got(vllm_config: "VllmConfig") -> str | None:
        return named(vllm_config.model_config) if is_used(vllm_config) else None

    return Refusal(feature, got, wanted, "remove --kv-compression or serve another model")
