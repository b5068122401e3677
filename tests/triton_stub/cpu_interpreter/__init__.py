"""A Triton backend named "cpu" that compiles nothing.

vLLM's CPU build switches Triton off unless it finds a backend of that name, and without Triton
there is no V2 model runner. With this folder on `sys.path` and `TRITON_INTERPRET=1` the kernels run
in Triton's interpreter. Triton finds the backend by the entry point of the folder beside this one,
so child processes need nothing but `PYTHONPATH`.
"""
