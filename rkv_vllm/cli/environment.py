"""What the commands set in the environment before they import vLLM, which reads it then."""

import os


def quieten_vllm() -> None:
    """Leave standard output to the command, and the network alone."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"
    os.environ["HF_HUB_OFFLINE"] = "1"
