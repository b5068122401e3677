"""A refused start ends with our message as its last line, in place of a traceback of vLLM.

The error stays an ordinary exception, which whoever embeds a server can catch; only what Python
prints of it, when nobody does, is changed, and only for this one error.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType


@contextmanager
def refusals_as_last_line(*, wanted: bool) -> Iterator[None]:
    """Makes a ValueError out of the block, if it ends the program, print nothing but its message.

    Args:
        wanted: whether the program is a server; in a script the traceback says which call it was.
    """
    try:
        yield
    except ValueError as error:
        if wanted:
            _print_only(error)
        raise


def _print_only(refusal: ValueError) -> None:
    others = sys.excepthook

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if error is refusal:
            print(f"vllm: error: {error}", file=sys.stderr, flush=True)
        else:
            others(kind, error, traceback)

    sys.excepthook = hook
