"""HTTP to a server on this machine, never through a proxy that the environment names."""

from typing import Any

import requests

TIMEOUT_SECONDS = 60


def request(method: str, url: str, **settings: Any) -> requests.Response:
    """Ask a server on this machine.

    Args:
        method: "GET" or "POST".
        url: where.
        settings: as for `requests.request`, with a timeout of `TIMEOUT_SECONDS` by default.

    Raises:
        requests.RequestException: no answer.
    """
    with requests.Session() as session:
        session.trust_env = False
        return session.request(method, url, **{"timeout": TIMEOUT_SECONDS, **settings})


def answer(method: str, url: str, **settings: Any) -> requests.Response:
    """As `request`; an answer that is an error is one here, too.

    Raises:
        requests.RequestException: no answer, or its status is that of an error.
    """
    response = request(method, url, **settings)
    response.raise_for_status()
    return response
