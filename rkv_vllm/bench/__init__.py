"""`rkv-vllm bench`: stock vLLM against compression, in processes of their own that take turns.

The command line is `rkv_vllm/cli/bench.py`. From there in reading order: `workload.py` what is
asked of every side, `sides.py` what sets them apart and who runs when, `offline.py` and `served.py`
one run each, `checks.py` what forbids a ratio, `report.py` and `plot.py` what is shown. Importing
these modules imports neither torch nor vLLM, but for `offline_side.py`, the child of `offline.py`.
"""
