"""What runs in the API server while compression is on.

stat_logger.py shows on /metrics what the engine reports after each step
(scheduling/step_stats.py); discovery.py says when vLLM loads it.
"""
