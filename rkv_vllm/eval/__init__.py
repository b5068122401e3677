"""`rkv-vllm eval`: what a budget costs in accuracy, measured in the serving engine beside stock.

Problems: `problems.py`, judged by `grade.py`; numbers: `statistics.py`; shown by `report.py` and
`plot.py`.
"""
