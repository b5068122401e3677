"""Where the packages lie; everything else about the project stands in pyproject.toml.

The kernels know nothing of the plugin, so they have a folder of their own at the top of the tree,
yet they install as `rkv_vllm.kernels`. pyproject.toml alone cannot say both "this folder has
another name" and "find its subpackages", hence this file.
"""

from setuptools import find_packages, setup

PACKAGE_DIRS = {"rkv_vllm": "rkv_vllm", "rkv_vllm.kernels": "kernels"}


def packages() -> list[str]:
    found = []
    for name, folder in PACKAGE_DIRS.items():
        found.append(name)
        found.extend(f"{name}.{subpackage}" for subpackage in find_packages(folder))
    return found


setup(packages=packages(), package_dir=PACKAGE_DIRS)
