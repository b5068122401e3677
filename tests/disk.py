"""A disk as small as a test wants, to fill: a tmpfs where root may mount one.

Works without the package.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """Mounts a disk of so many bytes, whole pages, and skips the test where that is forbidden.

    Args:
        folder: an empty folder.
        num_bytes: that it holds.
    """
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("nobody may mount a disk here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def enlarge(disk: Path, num_bytes: int) -> None:
    """Make room on a small disk."""
    subprocess.run(["mount", "-o", f"remount,size={num_bytes}", str(disk)], check=True)


def fill(disk: Path) -> None:
    """Leave no room on a small disk."""
    with (disk / "filling").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return
