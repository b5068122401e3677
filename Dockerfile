# vLLM for NVIDIA GPUs plus this plugin.
# Not built and not run by the authors so far: the machine it was written on has no running container
# engine and no GPU. The CPU set-up is `make venv`. What has run on a GPU: README.md.
#
#   docker build -t rkv-vllm .
#   docker run --gpus all -p 8000:8000 -e RKV_COMPRESSION=rkv -e RKV_BUDGET=2048 rkv-vllm MODEL
#
# Nothing is compressed without RKV_COMPRESSION or --kv-compression. Every --kv-... flag has such a
# variable (docs/operations.md); a flag behind MODEL holds against it.
FROM vllm/vllm-openai:v0.32.0

WORKDIR /opt/rkv-vllm
COPY setup.py pyproject.toml README.md LICENSE ./
COPY rkv_vllm rkv_vllm
COPY kernels kernels
COPY csrc csrc

# Without requirements: the image's own vLLM and torch must stay as they are, and typer and rich
# come with them. The second line fails the build if a requirement is missing after all.
RUN python3 -m pip install --no-cache-dir --no-deps . \
    && rkv-vllm version
