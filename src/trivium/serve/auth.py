"""The one gate before every route: is the host ours, is the origin ours, is the key right.

Keys are kept and compared as SHA-256 digests, in constant time, all of them every time.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable, Sequence

from trivium.base.errors import ConfigError
from trivium.serve.errors import ApiError

_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_ANYWHERE = ("0.0.0.0", "::", "")
_KEY_BYTES = (8, 4096)
_SCHEME = b"bearer "

Headers = Sequence[tuple[bytes, bytes]]


class Gate:
    """Who may pass. Without keys everyone may who speaks to an allowed host from an allowed origin."""

    def __init__(self, *, host: str, keys: Iterable[str] = (), hosts: Iterable[str] = ()) -> None:
        """``host`` is what the server binds; ``hosts`` are further names under which clients may address it.

        Raises:
            ConfigError: a key that is too short, or a server open to the network without one.
        """
        found = [key.encode() for key in keys]
        for index, key in enumerate(found):
            if not _KEY_BYTES[0] <= len(key) <= _KEY_BYTES[1] or key != key.strip():
                raise ConfigError(
                    f"API key {index + 1} has {len(key)} bytes: expected {_KEY_BYTES[0]} to {_KEY_BYTES[1]}, "
                    "without blanks around it"
                )
        if not found and not is_loopback(host):
            raise ConfigError(
                f"--host {host} can be reached from the network and no key is set: either set one "
                "(--api-key-file FILE, or TRIVIUM_API_KEY), or stay on this machine (--host 127.0.0.1)"
            )
        self._digests = [hashlib.sha256(key).digest() for key in found]
        named = {_bare(name).lower() for name in hosts}
        self._hosts = None if host in _ANYWHERE and not named else {*_LOOPBACK, _bare(host).lower(), *named}

    @property
    def keyed(self) -> bool:
        """Whether a key is asked for."""
        return bool(self._digests)

    def check_place(self, headers: Headers) -> None:
        """The Host must be one of ours, and the Origin, where there is one, the Host's own.

        Raises:
            ApiError: 421 for a foreign or absent host, 403 for a foreign origin.
        """
        host = _single(headers, b"host")
        if host is None:
            raise ApiError(421, "host_not_allowed", "the Host header is missing or stands twice", close=True)
        name = _without_port(host).lower()
        if self._hosts is not None and name not in self._hosts:
            message = "this server is not addressed by that Host; --allowed-host adds a name"
            raise ApiError(421, "host_not_allowed", message, close=True)
        origins = [value for key, value in headers if key == b"origin"]
        if any(value.decode("latin-1").lower() not in (f"http://{host}".lower(), f"https://{host}".lower())
               for value in origins):  # fmt: skip
            raise ApiError(403, "origin_not_allowed", "requests from other origins are not allowed")
        told = {key: value for key, value in headers if key.startswith(b"sec-fetch-")}
        if told.get(b"sec-fetch-site") == b"cross-site" and told.get(b"sec-fetch-mode") != b"navigate":  # not a link
            raise ApiError(403, "origin_not_allowed", "requests from other origins are not allowed")

    def key_of(self, headers: Headers) -> int:
        """The index of the key that came (−1 where none is asked for).

        Raises:
            ApiError: 401, the same for every way of being wrong.
        """
        if not self._digests:
            return -1
        given = [value for name, value in headers if name == b"authorization"]
        value = given[0] if len(given) == 1 else b""
        scheme, key = value[: len(_SCHEME)].lower(), value[len(_SCHEME) :].strip(b" ")
        digest = hashlib.sha256(key).digest()
        found = -1
        for index, mine in enumerate(self._digests):
            if hmac.compare_digest(mine, digest):
                found = index
        if found < 0 or scheme != _SCHEME:
            raise ApiError(
                401,
                "invalid_api_key",
                "a valid API key is needed: send the header 'Authorization: Bearer KEY'",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return found


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    bare = host.strip("[]").lower()
    if bare == "localhost":
        return True
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return False  # a name may lead anywhere, however it begins


def _single(headers: Headers, name: bytes) -> str | None:
    values = [value for key, value in headers if key == name]
    return values[0].decode("latin-1") if len(values) == 1 and values[0] else None


def _bare(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.rpartition(":")[0] if host.count(":") == 1 else host
