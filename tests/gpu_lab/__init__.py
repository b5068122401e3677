"""A pretended H100, on which the host's side of the GPU path runs without a GPU.

CUDA's runtime, driver, cuBLAS and NVML are replaced by a few hundred lines of C++: device memory is
host memory, kernels are launched and do nothing. All else is real: torch's CUDA build, Triton's
compiler and launcher, vLLM's GPU worker, graph capture, compilation, asynchronous scheduling. So it
shows recompilations, waits, what may not happen during a capture and what the host's work costs;
it says nothing of results or device time. `make gpu-lab` installs it into .gpu-lab.
"""
