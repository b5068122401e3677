"""What `rkv-vllm trace` records of one request, and the page it makes of it.

In reading order: `record.py` is what a trace holds, `recorder.py` looks on while a compactor works,
`capture.py` runs one prompt in an engine of this process, `pieces.py` finds the text of each token,
`page.py` writes one HTML file from it and from `assets/`.
"""
