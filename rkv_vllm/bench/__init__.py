"""`rkv-vllm bench`: stock vLLM against compression, in processes of their own that take turns.

The command line is `rkv_vllm/cli/bench.py`. From there in reading order: `workload.py` what is
asked of every side, `sides.py` what sets them apart and who runs when, `session.py` all runs,
`offline.py` (with `counts.py` and `latencies.py`) and `served.py` one each, `checks.py` and
`expected.py` what forbids a ratio, `report.py` and `plot.py` what is shown. `processes.py` and
`server.py` serve others, too. Importing these modules imports
neither torch nor vLLM.
"""
