"""Build `.next`: the next vLLM's Python code over the compiled libraries of the one in `.venv`.

A release of vLLM has a CPU build days or weeks later, if at all; its sdist is there at once. From
one release to the next little of the C++ changes, so the new `vllm/` runs on the old libraries:
enough for engines and servers on a CPU, no proof of what a GPU does. `.next/venv` falls back on
`.venv` for everything else; packages that only the new release requires are installed into it.

    .venv/bin/python scripts/install_next.py
    .venv/bin/python scripts/install_next.py --sdist vllm-0.33.0.tar.gz

pip cannot fetch an sdist without building it, so the file is read from the index that pip is set
to. A second run with unchanged inputs returns at once.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urldefrag, urljoin

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
NEXT = ROOT / ".next"
STAMP = NEXT / "ready.stamp"
SDIST = "vllm-0.33.0.tar.gz"
RELEASE = SDIST.removeprefix("vllm-").removesuffix(".tar.gz")

PACKAGES = Path("lib", f"python{sys.version_info[0]}.{sys.version_info[1]}", "site-packages")
OLD = VENV / PACKAGES
NEW = NEXT / "venv" / PACKAGES
PYTHON = NEXT / "venv" / "bin" / "python"
PIP = [str(VENV / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]

CHECK = """
import vllm, vllm._custom_ops, rkv_vllm.kernels
from vllm.platforms import current_platform
print(f"vllm {vllm.__version__} from {vllm.__path__[0]}, on {current_platform.device_name}")
"""


def main() -> None:
    """Bring `.next` up to date, or say that it is."""
    parser = argparse.ArgumentParser(description=f"Build .next with vLLM {RELEASE}.")
    parser.add_argument("--sdist", type=Path, help=f"{SDIST}, if it is there already")
    sdist = parser.parse_args().sdist
    stamp = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    stamp += (VENV / "rkv-install.stamp").read_text()
    if STAMP.is_file() and STAMP.read_text() == stamp:
        print(f"{NEXT.name} is up to date")
        return
    NEXT.mkdir(exist_ok=True)
    STAMP.unlink(missing_ok=True)
    steps = {
        f"fetching {SDIST}": lambda: fetch(sdist),
        "virtual environment": make_venv,
        f"vllm {RELEASE}": unpack,
        "libraries of .venv": link_libraries,
        "requirements that .venv lacks": install_missing,
        "check": lambda: run([str(PYTHON), "-c", CHECK]),
    }
    started = time.monotonic()
    for number, (title, step) in enumerate(steps.items(), start=1):
        print(f"[{number}/{len(steps)}] {title} ({time.monotonic() - started:.0f} s)", flush=True)
        step()
    STAMP.write_text(stamp)
    print(f"{NEXT.name} is ready after {time.monotonic() - started:.0f} s")


def run(command: list[str]) -> None:
    """Run a command; a failure ends the script."""
    subprocess.run(command, check=True, cwd=ROOT)


def fetch(given: Path | None) -> None:
    """Copy the sdist into `.next`, or download it and compare its hash with the index's."""
    path = NEXT / SDIST
    if given is not None:
        if not given.is_file() or given.name != SDIST:
            sys.exit(f"--sdist: got {given}, wanted a file called {SDIST}")
        shutil.copyfile(given, path)
    if path.is_file():
        return
    page = f"{index_url().rstrip('/')}/vllm/"
    request = urllib.request.Request(page, headers={"Accept": "text/html"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            links = re.findall(r'href="([^"]+)"', answer.read().decode())
        found = [link for link in links if urldefrag(link).url.endswith(f"/{SDIST}")]
        if not found:
            sys.exit(f"{page} lists no {SDIST}; get it elsewhere and pass --sdist")
        url, fragment = urldefrag(urljoin(page, found[0]))
        with urllib.request.urlopen(url, timeout=300) as answer:
            content = answer.read()
    except URLError as error:
        sys.exit(f"{page}: {error.reason}; get {SDIST} elsewhere and pass --sdist")
    algorithm, _, wanted = fragment.partition("=")
    if wanted and (got := hashlib.new(algorithm, content).hexdigest()) != wanted:
        sys.exit(f"{url}: {algorithm} is {got}, wanted {wanted}; try again")
    path.write_bytes(content)


def index_url() -> str:
    """The index that pip is set to: by the environment, else by its files."""
    listed = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True, check=True)
    settings = dict(line.split("=", 1) for line in listed.stdout.splitlines())
    for name in (":env:.index-url", "site.index-url", "user.index-url", "global.index-url"):
        if name in settings:
            return settings[name].strip("'\"")
    return "https://pypi.org/simple"


def make_venv() -> None:
    """An environment that looks into `.venv` for what it does not have."""
    shutil.rmtree(NEXT / "venv", ignore_errors=True)
    run([sys.executable, "-m", "venv", "--without-pip", str(NEXT / "venv")])
    # Not include-system-site-packages, which means those of the Python that .venv was made with.
    (NEW / "venv.pth").write_text(f"import site; site.addsitedir({str(OLD)!r})\n")


def unpack() -> None:
    """The package from the sdist, and the distribution of which vLLM asks the version."""
    with tarfile.open(NEXT / SDIST) as archive:
        for member in archive:
            member.name = member.name.partition("/")[2]
            if member.name.startswith("vllm/"):
                archive.extract(member, NEW, filter="data")
            elif member.name == "requirements/common.txt":
                archive.extract(member, NEXT, filter="data")
    distribution = NEW / f"vllm-{RELEASE}+cpu.dist-info"
    distribution.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {RELEASE}+cpu\n"
    (distribution / "METADATA").write_text(metadata)


def link_libraries() -> None:
    """What `.venv` has compiled, under the same names."""
    libraries = sorted((OLD / "vllm").rglob("*.so"))
    for library in libraries:
        place = NEW / library.relative_to(OLD)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(library)
    print(f"    {', '.join(library.name for library in libraries)}")


def install_missing() -> None:
    """What the release requires and `.venv` lacks; what it has in another version is only said."""
    missing = []
    for requirement in required():
        try:
            got = version(requirement.name)
        except PackageNotFoundError:
            missing.append(f"{requirement.name}{requirement.specifier}")
            continue
        if not requirement.specifier.contains(got, prereleases=True):
            print(f"    {requirement.name}: .venv has {got}, wanted {requirement.specifier}")
    if missing:
        print(f"    installing {', '.join(missing)}")
        run([*PIP, "install", "--quiet", "--no-deps", "--target", str(NEW), *missing])


def required() -> Iterator[Requirement]:
    """The requirements of every platform that hold here."""
    for line in (NEXT / "requirements" / "common.txt").read_text().splitlines():
        if text := re.split(r"(?:^|\s)#", line)[0].strip():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate():
                yield requirement


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"failed with exit code {error.returncode}: {' '.join(error.cmd)}")
