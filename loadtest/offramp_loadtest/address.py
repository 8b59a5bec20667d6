"""Where a server is, and how a request to it is written."""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from offramp_loadtest.errors import LoadTestError
from offramp_loadtest.targets import Request


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is.

    Attributes:
        host: Name or address.
        port: Its port.
        context: For TLS; None for plain HTTP.
        prefix: A path that comes before all paths.
        headers: Sent with each request.
    """

    host: str
    port: int
    context: ssl.SSLContext | None
    prefix: str
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, url: str, headers: Mapping[str, str]) -> "Address":
        """Take an address apart.

        Raises:
            LoadTestError: If it is none of http or https, or a header is not of one line.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
            is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0
        except ValueError:  # a port that is no port
            is_usable = False
        if not is_usable or any(character <= " " for character in url):
            raise LoadTestError(f"url: must be http://host:port or https://host:port; got {url!r}")
        if any(character in text for pair in headers.items() for text in pair for character in "\r\n\0"):
            raise LoadTestError("headers: must be of one line each")
        context = ssl.create_default_context() if parts.scheme == "https" else None
        return cls(str(parts.hostname), port or (443 if context else 80), context, parts.path.rstrip("/"), headers)

    def written(self, request: Request) -> tuple[bytes, bytes]:
        """Give a request's bytes: head and body."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"{request.method} {self.prefix}{request.path} HTTP/1.1", f"host: {host}:{self.port}"]
        lines += [f"{name}: {value}" for name, value in {**self.headers, **request.headers}.items()]
        if request.method == "POST":
            lines.append(f"content-length: {len(request.body)}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"), request.body
