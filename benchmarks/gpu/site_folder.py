"""A folder from which Python takes this package as if installed, for machines without pip."""

import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def make_site_folder(site: Path) -> Path:
    """Copy the package to `site`, with its entry points and the tests' helpers beside it.

    Args:
        site: a new folder; put it on PYTHONPATH.

    Returns:
        `site`.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "rkv_vllm", site / "rkv_vllm", ignore=ignore)
    shutil.copytree(ROOT / "kernels", site / "rkv_vllm" / "kernels", ignore=ignore)
    # Of the checkout itself the path must hold nothing: its rkv_vllm has no kernels inside.
    shutil.copytree(ROOT / "tests", site / "tests", ignore=ignore)
    metadata = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = []
    for group, entries in project["entry-points"].items():
        lines.append(f"[{group}]")
        lines.extend(f"{name} = {target}" for name, target in entries.items())
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return site
