"""Shows vLLM the stat logger plugin while compression is on, and only then.

vLLM looks for plugins of the group `vllm.stat_logger_plugins` among the installed distributions,
before it looks at any config, and a plugin found there switches statistics on for a user who passed
--disable-log-stats. Declared in pyproject.toml, ours would do that to everybody who has merely
installed this package. So it belongs to a distribution that exists while it is wanted, through the
extension point that `importlib.metadata` has for that. Next: stat_logger.py.
"""

import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, DistributionFinder
from os import PathLike

_NAME = "rkv-vllm-metrics"
_FILES = {
    "METADATA": f"Metadata-Version: 2.1\nName: {_NAME}\nVersion: 0\n",
    # The name of our general plugin, so that VLLM_PLUGINS allows both or neither.
    "entry_points.txt": (
        "[vllm.stat_logger_plugins]\nrkv = rkv_vllm.frontend.stat_logger:CompressionStatLogger\n"
    ),
}


class _MetricsDistribution(Distribution):
    """Nothing but one entry point."""

    def read_text(self, filename: str) -> str | None:
        return _FILES.get(filename)

    def locate_file(self, path: str | PathLike[str]) -> PathLike[str]:
        raise FileNotFoundError(f"{_NAME} has no files, got {path}")


class _MetricsFinder(DistributionFinder):
    """Finds that distribution and no module."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        return None

    def find_distributions(
        self, context: DistributionFinder.Context | None = None
    ) -> Iterator[Distribution]:
        if context is None or context.name in (None, _NAME):
            yield _MetricsDistribution()


_FINDER = _MetricsFinder()


def show_stat_logger(wanted: bool) -> None:
    """Make vLLM find our stat logger in this process, or not.

    Call it whenever an engine config is made: vLLM looks for plugins right after that.

    Args:
        wanted: compression and vLLM's statistics are both on.
    """
    if wanted and _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)
    elif not wanted and _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
