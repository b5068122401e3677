"""How this package fits vLLM: versions, functions it overrides, features it refuses.

versions.py: which vLLM and which platform; overrides.py: whether vLLM's functions are still what
ours stand in for; refusals.py: which features compression does not support. All is asked only while
compression is switched on, before a model is loaded. Importing any of it imports no vLLM.
"""
