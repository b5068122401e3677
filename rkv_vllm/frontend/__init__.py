"""What runs in the API server while compression is on.

option_check.py refuses bad request options, and request_check.py says which are bad. stat_logger.py
shows on /metrics what the engine reports after each step (scheduling/step_stats.py); discovery.py
says when vLLM loads it.
"""
