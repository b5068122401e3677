"""Scheduler side: when a request is compacted, into which blocks, and what returns to the pool.

Reading order: planner.py (when), booking.py (one eviction), books.py (which blocks), scheduler.py
(where vLLM calls them), directive.py (what the workers are told).
"""
