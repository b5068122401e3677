"""Why vLLM cannot import the class of a model: one sentence in place of its tracebacks.

vLLM imports each class in a process of its own, logs what that process wrote, and says no more than
"failed to be inspected". Next: diagnosis.py.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

_REGISTRY = "vllm.model_executor.models.registry"
_ARCHITECTURE = re.compile(r"architecture '(\w+)'")
_MISSING = re.compile(r"^ModuleNotFoundError: No module named '(\w+)")
# Where a package is called otherwise than its module.
_PACKAGES = {"PIL": "pillow", "cv2": "opencv-python-headless", "skimage": "scikit-image"}


@contextmanager
def inspection_failures() -> Iterator[list[str]]:
    """Yields the list that gets a sentence for each class that cannot be imported meanwhile."""
    failures: list[str] = []

    def divert(record: logging.LogRecord) -> bool:
        architecture = _ARCHITECTURE.search(record.getMessage())
        if architecture is None or record.exc_info is None:
            return True
        failures.append(_sentence(architecture[1], str(record.exc_info[1])))
        return False

    logger = logging.getLogger(_REGISTRY)
    logger.addFilter(divert)
    try:
        yield failures
    finally:
        logger.removeFilter(divert)


def _sentence(architecture: str, log: str) -> str:
    """What to do about a class, by what the process that imported it wrote last."""
    why = (log.strip().splitlines() or ["no reason"])[-1].strip()
    cure = "install or update what it names"
    if missing := _MISSING.match(why):
        package = _PACKAGES.get(missing[1], missing[1])
        cure = f"install it, in a version that fits the installed torch: pip install {package}"
    return f"vLLM cannot import {architecture}, this model's class: {why}; {cure}"
