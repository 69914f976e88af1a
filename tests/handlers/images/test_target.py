"""What an image's URL may be, and which addresses its host may have."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.errors import ImageFetchFailed
from handlers.images import ImageProblem
from handlers.images.target import AllowedPrivate, Target, is_public, parse_target

NOT_PUBLIC = """
0.0.0.0 0.1.2.3 10.0.0.1 100.64.0.1 100.100.100.200 127.0.0.1 127.255.255.254 169.254.169.254
169.254.170.2 172.16.0.1 192.0.0.8 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 198.51.100.1
203.0.113.1 224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255 168.63.129.16 :: ::1 ::2 ::127.0.0.1
::8.8.8.8 ::ffff:127.0.0.1 ::ffff:169.254.169.254 ::ffff:0:127.0.0.1 64:ff9b::7f00:1
64:ff9b::a9fe:a9fe 64:ff9b:1::808:808 100::1 2001::1 2001:0:4136:e378:8000:63bf:3fff:fdd2
2001:db8::1 2002:7f00:1::1 2002:a9fe:a9fe:: 2002:0a00:0001::1 3fff::1 5f00::1 fc00::1 fd00:ec2::254
fe80::1 fe80::1%2 2606:4700::1111%2 fec0::1 ff02::1 ff0e::1
"""


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"],
)
def test_public_addresses(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize("address", NOT_PUBLIC.split())
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ip_address(address))


def test_exceptions_are_hosts_addresses_or_networks() -> None:
    allowed = AllowedPrivate(["10.1.0.0/16", "192.168.0.7", "Images.Internal.", "[fd00::1]"])
    assert allowed.admits("any", ip_address("10.1.2.3"))
    assert allowed.admits("any", ip_address("::ffff:10.1.2.3"))
    assert allowed.admits("any", ip_address("192.168.0.7"))
    assert allowed.admits("images.internal", ip_address("172.16.0.1"))
    assert allowed.admits("any", ip_address("fd00::1"))
    assert not allowed.admits("any", ip_address("10.2.0.1"))
    assert not allowed.admits("sub.images.internal", ip_address("172.16.0.1"))
    with pytest.raises(ValueError, match=r"\*\.internal"):
        AllowedPrivate(["*.internal"])


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("http://a.b", Target("http", "a.b", 80, "/")),
        ("HTTPS://A.B./x#part", Target("https", "a.b", 443, "/x")),
        ("http://a.b:8080?q=a b", Target("http", "a.b", 8080, "/?q=a%20b")),
        ("http://a/b c/%20/é?x=%41&y=[1]", Target("http", "a", 80, "/b%20c/%20/%C3%A9?x=%41&y=%5B1%5D")),
        ("http://bücher.example/", Target("http", "xn--bcher-kva.example", 80, "/")),
        ("http://１２７.0.0.1/", Target("http", "127.0.0.1", 80, "/")),
        ("http://[::0:1]:81/", Target("http", "::1", 81, "/")),
        ("http://a_b.c/", Target("http", "a_b.c", 80, "/")),
        ("http://a\n.b/\tc", Target("http", "a.b", 80, "/c")),
    ],
)
def test_a_url_is_read_once_for_checking_and_for_asking(url: str, target: Target) -> None:
    assert parse_target(url) == target


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "URL is empty"),
        ("file:///etc/passwd", "file: URLs are refused"),
        ("FILE:/etc/passwd", "file: URLs are refused"),
        ("ftp://a/b.png", "ftp: URLs are refused"),
        ("gopher://a/", "gopher: URLs are refused"),
        ("javascript:alert(1)", "javascript: URLs are refused"),
        ("/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAgGBgcGBQgHBwcJ", "write data:image/jpeg;base64, in front"),
        ("images/cat.png", "no scheme"),
        ("//a/b.png", "no scheme"),
        ("http:", "names no host"),
        ("http:///x", "names no host"),
        ("http:a", "names no host"),
        ("http://:80/", "names no host"),
        ("http://user@a/", "user name or password"),
        ("http://user:secret@a/", "user name or password"),
        ("http://a\\@b/", "user name or password"),
        ("http://@a/", "user name or password"),
        ("http://a\\b/", "host name is malformed"),
        ("http://a b/", "host name is malformed"),
        ("http://a..b/", "malformed"),
        ("http://.a/", "malformed"),
        ("http://%31%32%37.0.0.1/", "percent sign"),
        ("http://[fe80::1%25eth0]/", "percent sign"),
        ("http://[::1/", "malformed"),
        ("http://[zz]/", "malformed"),
        ("http://a:0/", "port 0"),
        ("http://a:99999/", "malformed"),
        ("http://a:x/", "malformed"),
        ("http://" + "a" * 64 + "/", "host name is malformed"),
        ("http://" + "a." * 200 + "/", "host name is malformed"),
        ("http://a/\ud800", "malformed"),
        ("http://\ud800/", "malformed"),
        ("http://a/" + "x" * 9000, "longer than 8192"),
    ],
)
def test_refused_urls(url: str, reason: str) -> None:
    with pytest.raises(ImageProblem) as caught:
        parse_target(url)
    assert reason in caught.value.reason
    assert "secret" not in caught.value.reason


@given(st.text(max_size=60), st.sampled_from(["", "http://", "https://[", "http://a:", "http://a/?"]))
def test_any_text_is_read_or_refused(text: str, start: str) -> None:
    try:
        target = parse_target(start + text)
    except ImageProblem:
        return
    assert target.host.isascii()
    assert target.path.startswith("/")
    assert all("!" <= character <= "~" for character in target.path + target.authority)


def test_redirects_are_relative_to_where_they_came_from() -> None:
    here = Target("https", "a.b", 8443, "/x/y?z")
    assert here.follow("../c") == Target("https", "a.b", 8443, "/c")
    assert here.follow("//d/e") == Target("https", "d", 443, "/e")
    assert here.follow("https://[::1]:8443/") == Target("https", "::1", 8443, "/")
    assert here.follow("https://[::1]:8443/").follow("/q") == Target("https", "::1", 8443, "/q")


@pytest.mark.parametrize("location", ["http://a.b/", "file:///etc/passwd", "//[x", "data:,x", "https://u:p@a/"])
def test_refused_redirects_are_the_hosts_fault(location: str) -> None:
    with pytest.raises(ImageProblem) as caught:
        Target("https", "a.b", 443, "/").follow(location)
    assert caught.value.error is ImageFetchFailed
