"""What a package index offers of one version of a package, and the bytes of a file of it. Nothing is built or
installed.

pip's own settings say where to look (``pip config list``, which knows its files and variables): ``index-url``,
``extra-index-url``, ``no-index``, ``find-links``, ``cert``, ``client-cert``, ``proxy``, ``trusted-host`` and
``timeout``. https://packaging.python.org/en/latest/specifications/simple-repository-api/
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urldefrag, urljoin, urlsplit
from urllib.request import url2pathname

from packaging.tags import sys_tags
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import InvalidVersion, Version

PYPI = "https://pypi.org/simple"
JSON = "application/vnd.pypi.simple.v1+json"
ACCEPT = f"{JSON}, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
MOST_ARCHIVE_BYTES = 4 << 30
MOST_PAGE_BYTES = 256 << 20
CHUNK = 1 << 20


class IndexFailure(ValueError):
    """The index cannot be asked, or does not have what is wanted."""


@dataclass(frozen=True)
class Offered:
    """A wheel or sdist that an index lists; ``sha256`` where it says one."""

    filename: str
    url: str
    sha256: str | None = None


def pip_settings(listing: str) -> dict[str, str]:
    """pip's settings for downloads, from what ``pip config list`` prints:
    variables come before those of the verb, then the global ones.
    """
    settings: dict[str, dict[str, str]] = {}
    for line in listing.splitlines():
        key, mark, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if mark and section:
            settings.setdefault(section, {})[name.replace("_", "-")] = str(ast.literal_eval(value))
    return {
        name: value
        for section in ("global", "install", "download", ":env:")
        for name, value in settings.get(section, {}).items()
    }


class Index:
    """The places that pip would look at; ``settings`` as `pip_settings` reads them."""

    def __init__(self, settings: dict[str, str]) -> None:
        self.settings = settings
        self.indexes = [settings.get("index-url", PYPI), *settings.get("extra-index-url", "").split()]
        if settings.get("no-index", "false").lower() not in ("", "0", "false", "no", "off", "n", "f"):
            self.indexes = []
        self.links = settings.get("find-links", "").split()

    def offered(self, name: str, version: str) -> list[Offered]:
        """All wheels and sdists of a version, in pip's order of preference.
        Raises IndexFailure if an index fails or none has one.
        """
        wanted = (canonicalize_name(name), Version(version))
        listed = [file for place in self.links for file in self._linked(place)]
        listed += [file for index in self.indexes for file in self._page(f"{index.rstrip('/')}/{wanted[0]}/")]
        # ``at`` decides between equal names: the place that is named first
        ranked = sorted(
            ((rank, file.filename, at), file)
            for at, file in enumerate(listed)
            if (rank := _rank(file.filename, *wanted)) is not None
        )
        if not ranked:
            places = ", ".join(map(_shown, (*self.indexes, *self.links))) or "no index at all (no-index is set)"
            raise IndexFailure(f"no wheel and no sdist of version {version} is offered by {places}")
        return [file for _, file in ranked]

    def download(self, file: Offered, into: Path) -> str:
        """Write the file's bytes to ``into``; returns their sha256. Raises IndexFailure."""
        digest, size = hashlib.sha256(), 0
        with into.open("wb") as out:
            for part in self._bytes(file.url):
                size += len(part)
                if size > MOST_ARCHIVE_BYTES:
                    raise IndexFailure(f"{file.filename} has more than {MOST_ARCHIVE_BYTES >> 30} GB")
                digest.update(part)
                out.write(part)
        return digest.hexdigest()

    def _linked(self, place: str) -> list[Offered]:
        path = _local(place)
        if path is not None and path.is_dir():
            return [Offered(file.name, file.absolute().as_uri()) for file in sorted(path.iterdir()) if file.is_file()]
        return self._page(path.absolute().as_uri() if path is not None else place)

    def _page(self, url: str) -> list[Offered]:
        """The files that a page lists; none where there is no such page."""
        path = _local(url)
        if path is not None:
            page = path / "index.html" if path.is_dir() else path
            return _html_files(page.read_text(encoding="utf-8"), url) if page.is_file() else []
        body, kind, url = self._get(url)
        if body is None:
            return []
        return _json_files(body, url) if kind == JSON else _html_files(body.decode("utf-8", "replace"), url)

    def _get(self, url: str) -> tuple[bytes | None, str, str]:
        """(body or None if there is none, content type, address after redirects)."""
        with self._response(url) as response:
            if response.status_code == 404:
                return None, "", url
            self._check(response)
            # counted while it is read: what a server says of the length need not hold
            body = b""
            for part in response.iter_content(CHUNK):
                body += part
                if len(body) > MOST_PAGE_BYTES:
                    raise IndexFailure(f"{_shown(url)} has more than {MOST_PAGE_BYTES >> 20} MB")
            return body, response.headers.get("content-type", "").partition(";")[0].strip(), response.url

    def _bytes(self, url: str) -> Iterator[bytes]:
        import requests

        if (path := _local(url)) is not None:
            with path.open("rb") as file:
                while part := file.read(CHUNK):
                    yield part
            return
        try:
            with self._response(url) as response:
                self._check(response)
                yield from response.iter_content(CHUNK)
        except requests.RequestException as error:
            raise IndexFailure(f"{_shown(url)} cannot be read: {error}") from error

    def _response(self, url: str) -> Any:
        import requests  # heavy, and needed for what is not here yet only

        verify: bool | str = self.settings.get("cert") or True
        if urlsplit(url).hostname in self.settings.get("trusted-host", "").split():
            verify = False
        proxy = self.settings.get("proxy")
        try:
            return requests.get(
                url,
                # identity: hashes are of the file as it is stored
                headers={"Accept": ACCEPT, "Accept-Encoding": "identity"},
                stream=True,
                timeout=float(self.settings.get("timeout") or self.settings.get("default-timeout") or 30),
                verify=verify,
                cert=self.settings.get("client-cert"),
                proxies={"http": proxy, "https": proxy} if proxy else None,
            )
        except requests.RequestException as error:
            raise IndexFailure(f"{_shown(url)} cannot be reached: {error}") from error

    def _check(self, response: Any) -> None:
        if response.status_code != 200:
            raise IndexFailure(f"{_shown(response.url)} answered with status {response.status_code}")


def _rank(filename: str, name: str, version: Version) -> int | None:
    """0 for a wheel that can be installed here, 1 for an sdist, 2 for a wheel of another system;
    None for anything else.
    """
    try:
        if filename.endswith(".whl"):
            wheel_name, known, _, tags = parse_wheel_filename(filename)
            rank = 0 if not tags.isdisjoint(sys_tags()) else 2
        else:
            (wheel_name, known), rank = parse_sdist_filename(filename), 1
    except (InvalidWheelFilename, InvalidSdistFilename, InvalidVersion):
        return None
    return rank if (wheel_name, known) == (name, version) else None


def _local(url: str) -> Path | None:
    """The path of a ``file:`` address or of a plain path; None for any other address."""
    parts = urlsplit(url)
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    return Path(url).expanduser() if "://" not in url else None


def _shown(url: str) -> str:
    """An address without the password that it may hold."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _listed(url: str, page: str, filename: str, sha256: str | None) -> Offered | None:
    """A file of a page; None for one on this machine that a page from elsewhere names."""
    whole, fragment = urldefrag(urljoin(page, url))
    if urlsplit(whole).scheme not in (("file", "http", "https") if _local(page) is not None else ("http", "https")):
        return None
    known = sha256 or (parse_qs(fragment).get("sha256") or [None])[0]  # type: ignore[list-item]
    return Offered(filename, whole, known.lower() if known else None)


def _json_files(body: bytes, page: str) -> list[Offered]:
    import json

    try:
        files = [
            _listed(f["url"], page, str(f["filename"]), f.get("hashes", {}).get("sha256"))
            for f in json.loads(body)["files"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IndexFailure(f"{_shown(page)} is no list of files: {error!r}") from error
    return [file for file in files if file is not None]


def _html_files(text: str, page: str) -> list[Offered]:
    links = _Links()
    links.feed(text)
    base = urljoin(page, links.base) if links.base else page
    files = [_listed(url, base, unquote(urlsplit(url).path.rpartition("/")[2]), None) for url in links.found]
    return [file for file in files if file is not None]


class _Links(HTMLParser):
    """The addresses of all anchors of a page, and its base."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.base = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        address = dict(attrs).get("href")
        if tag == "a" and address:
            self.found.append(address)
        elif tag == "base" and address and not self.base:
            self.base = address
