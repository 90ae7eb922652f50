"""Whether Weights & Biases can take a run now: a key that is stored, a server that answers.

wandb itself asks at the terminal where it finds no key, and waits a minute and a half for a server
that it cannot reach. Here both are known before it is imported. No key is ever shown.
"""

import netrc
import os
import socket
import threading
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

_DEFAULT_URL = "https://api.wandb.ai"
_KEY_VARIABLES = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
_WAIT_SECONDS = 5.0


def has_key() -> bool:
    """True where a key lies in the environment, or in the netrc file for the server."""
    if any(os.environ.get(name) for name in _KEY_VARIABLES):
        return True
    try:
        path = os.environ.get("NETRC") or str(Path.home() / ".netrc")
        stored = netrc.netrc(path).authenticators(urlsplit(_server()).netloc)
    except (OSError, netrc.NetrcParseError):
        return False
    return bool(stored and stored[2])


def why_offline() -> str | None:
    """Why the run will be kept on the disk; None where it can be sent."""
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        return f"WANDB_MODE={mode}"
    if not has_key():
        return "no key: `wandb login` stores one"
    if not _answers():
        return f"{_server()} does not answer"
    return None


def _server() -> str:
    return os.environ.get("WANDB_BASE_URL", _DEFAULT_URL)


def _answers() -> bool:
    """True if the server, or the proxy on the way to it, takes a connection in time."""
    server = urlsplit(_server())
    target = urlsplit(getproxies().get(server.scheme, "")) if server.scheme else server
    target = target if target.hostname else server
    port = target.port or (443 if target.scheme == "https" else 80)
    reached = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((target.hostname, port), _WAIT_SECONDS).close()
        except OSError:
            return
        reached.set()

    # In a thread of its own, as looking up a name knows no time-out.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_WAIT_SECONDS)
    return reached.is_set()
