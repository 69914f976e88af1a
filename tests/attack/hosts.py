"""Hosts that serve images, or mean harm, on loopback addresses."""

from __future__ import annotations

import socket
import threading
from types import TracebackType


class Host:
    """Listens on an address and counts its connections. Use as a context manager.

    answer: what each connection is answered with; None for a host that says nothing and keeps connections open.
    """

    def __init__(self, address: str, answer: bytes | None, port: int = 0) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind((address, port))
        self._listener.listen(512)
        self.address, self.port = address, int(self._listener.getsockname()[1])
        self.answer = answer
        self.connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Host:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        for connection in self.connections:
            connection.close()

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.port}/image.png"

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections.append(connection)
            if self.answer is not None:
                try:
                    connection.recv(65536)
                    connection.sendall(self.answer)
                    connection.close()
                except OSError:
                    continue


def reply(body: bytes, content_type: str = "image/png") -> bytes:
    fields = f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\nConnection: close"
    head = f"HTTP/1.1 200 OK\r\n{fields}\r\n\r\n"
    return head.encode() + body


def redirect(url: str) -> bytes:
    head = f"HTTP/1.1 302 Found\r\nLocation: {url}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    return head.encode("utf-8")


def private_urls(port: int) -> list[str]:
    """Spellings of this machine, of its networks and of what is no web address, all with one port."""
    hosts = (
        "127.0.0.1", "localhost", "LOCALHOST", "localhost.", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.1",
        "0177.0.0.1", "017700000001", "127.0.0.1.", "0", "0.0.0.0", "[::]", "[::1]", "[0:0:0:0:0:0:0:1]",
        "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "[64:ff9b::127.0.0.1]", "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]", "[fe80::1]", "[fe80::1%25lo]", "[::1%25lo]", "[fc00::1]", "[ff02::1]", "169.254.169.254",
        "169.254.170.2", "[fd00:ec2::254]", "10.0.0.1", "172.16.0.1", "192.168.0.1", "100.64.0.1", "192.0.0.1",
        "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "127。0。0。1", "①②⑦.⓪.⓪.①",
        "127.0.0.1%2f", "%31%32%37.0.0.1",
        "127.0.0.1\\@example.com", "example.com@127.0.0.1", "user:password@127.0.0.1", "127.0.0.1\t",
        "ℓocalhost", "127.0.0.4",
        "metadata.google.internal", "localhost.localdomain", "ip6-localhost",
    )  # fmt: skip
    urls = [f"http://{host}:{port}/image.png" for host in hosts]
    urls += [
        f"{scheme}://127.0.0.1:{port}/a.png"
        for scheme in ("https", "ftp", "gopher", "dict", "ldap", "unix", "HtTp", "view-source:http")
    ]
    urls += [
        "file:///etc/passwd", "file://localhost/etc/passwd", "FILE:///etc/passwd", "/etc/passwd", "//127.0.0.1/a.png",
        "\\\\127.0.0.1\\a.png", f"http:127.0.0.1:{port}/", f"http:/127.0.0.1:{port}/",
        f"http:///127.0.0.1:{port}/", f"http:\\\\127.0.0.1:{port}",
        f"http://127.0.0.1:{port}#@example.com/", f"http://127.0.0.1:{port}?@example.com/",
        f"http://[::1]:{port}:{port}/",
        f"http://127.0.0.1:{port}\r\nX-A: b/", f"http://127.0.0.1:{port}/\r\n\r\nGET /b HTTP/1.1",
        "http://127.0.0.1:99999/", "http://:80/",
        f"url:http://127.0.0.1:{port}/", f" http://127.0.0.1:{port}/ ", f"\thttp://127.0.0.1:{port}/",
        "jar:http://127.0.0.1!/a", "data:text/html,a",
        "s3://bucket/key", "about:blank", "javascript:1", "http://", "http:", "://",
        "data:", "data:,", "data:;base64,", "data:image/png;base64",
    ]  # fmt: skip
    return urls
