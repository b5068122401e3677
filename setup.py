"""Where the packages lie; everything else about the project stands in pyproject.toml.

The kernels know nothing of vLLM, so they have a folder of their own at the top of the tree, yet
they install as `rkv_vllm.kernels`. pyproject.toml alone cannot say both "this folder has
another name" and "find its subpackages", hence this file. The C++ kernels for CPUs are built when a
compiler is there; without one the build says so and goes on, and torch serves in their place.
"""

from setuptools import Extension, find_packages, setup

PACKAGE_DIRS = {"rkv_vllm": "rkv_vllm", "rkv_vllm.kernels": "kernels"}


def packages() -> list[str]:
    found = []
    for name, folder in PACKAGE_DIRS.items():
        found.append(name)
        found.extend(f"{name}.{subpackage}" for subpackage in find_packages(folder))
    return found


# Loaded through ctypes (kernels/native.py), hence no Python in it. Without errno and traps the
# compiler may vectorise square roots and comparisons; results stay those of IEEE arithmetic.
CPU_KERNELS = Extension(
    "rkv_vllm.kernels._csrc",
    sources=[f"csrc/cpu/{name}.cpp" for name in ("observe", "rkv", "vase", "select", "compact")],
    depends=["csrc/cpu/paged.h", "csrc/cpu/heads.h"],
    language="c++",
    extra_compile_args=["-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"],
    extra_link_args=["-fopenmp"],
    optional=True,
)

setup(packages=packages(), package_dir=PACKAGE_DIRS, ext_modules=[CPU_KERNELS])
