"""Compression on vLLM's own /metrics page, counted where it is decided: by the scheduler.

Reading order: step_stats.py (what the engine tells the API servers after each step),
stat_logger.py (what becomes of it on the page), discovery.py (when vLLM loads that).
"""
