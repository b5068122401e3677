"""Worker side: record queries, and carry out the scheduler's directives on the cache.

Reading order: compactor.py (what a flush does), runner_v1.py (when, and where lengths become
physical), attention_hook.py with observation.py (recording), cache_views.py (layouts).
"""
