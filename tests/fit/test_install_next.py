"""`make next` gets vLLM's sdist from the index that pip is set to, and no other file than that."""

import functools
import hashlib
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from scripts import install_next
from scripts.install_next import SDIST, fetch


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index in a folder, which pip is set to."""
    (tmp_path / "index" / "vllm").mkdir(parents=True)
    (tmp_path / "next").mkdir()
    handler = functools.partial(Quiet, directory=str(tmp_path / "index"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(install_next, "NEXT", tmp_path / "next")
        yield tmp_path / "index"
        server.shutdown()
        thread.join()


def publish(index, content, link=SDIST):
    """A page as indexes have it, with the hash of b"right" behind the link."""
    (index / SDIST).write_bytes(content)
    digest = hashlib.sha256(b"right").hexdigest()
    page = f'<a href="../files/vllm-0.1.whl">a</a><a href="../{link}#sha256={digest}">b</a>'
    (index / "vllm" / "index.html").write_text(page)


def test_sdist_comes_from_the_index_of_pip_once(index, tmp_path):
    publish(index, b"right")
    fetch(None)
    assert (tmp_path / "next" / SDIST).read_bytes() == b"right"
    (index / SDIST).unlink()
    fetch(None)


def test_sdist_with_another_hash_is_not_kept(index, tmp_path):
    publish(index, b"wrong")
    with pytest.raises(SystemExit, match=r"sha256 is .*, wanted .*; try again"):
        fetch(None)
    assert list((tmp_path / "next").iterdir()) == []


def test_index_without_the_release_and_no_index_are_named_with_the_way_out(index, monkeypatch):
    publish(index, b"right", link="vllm-0.32.0.tar.gz")
    with pytest.raises(
        SystemExit, match=rf"/vllm/ lists no {SDIST}; get it elsewhere and pass --sd"
    ):
        fetch(None)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    with pytest.raises(SystemExit, match=rf"refused; get {SDIST} elsewhere and pass --sdist"):
        fetch(None)


def test_given_file_must_be_the_sdist_and_is_copied(index, tmp_path):
    with pytest.raises(SystemExit, match=rf"--sdist: got .*other, wanted a file called {SDIST}"):
        fetch(tmp_path / "other")
    (tmp_path / SDIST).write_bytes(b"given")
    fetch(tmp_path / SDIST)
    assert (tmp_path / "next" / SDIST).read_bytes() == b"given"
