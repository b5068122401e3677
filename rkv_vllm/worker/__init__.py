"""Worker side: record queries, and carry out the scheduler's directives on the cache.

Reading order: flush.py (what a flush does), group.py with layer_set.py (on what), runner.py (when),
runner_v1.py and runner_v2.py with lengths.py (where lengths become physical), attention_hook.py
with query_ring.py (recording), cache_views.py (layouts).
"""
