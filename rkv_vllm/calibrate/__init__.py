"""What `rkv-vllm calibrate` measures on a model: run over a text, by transformers.

`forward.py` runs the text and shows every layer's attention to whoever looks on; `query_sums.py`
makes the statistics of `methods/query_statistics.py` of it, `layer_importance.py` and `kvsharer.py`
the files of layer budgets and of shared caches. Knows no vLLM.
"""
