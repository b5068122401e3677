"""`python -m rkv_vllm.cli`: the same as the `rkv-vllm` command."""

from rkv_vllm.cli import main

main()
