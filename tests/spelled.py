"""The spellings in which a text may reach an output, for tests that none of them does."""

from __future__ import annotations

import base64
import html
import json
import shlex
from collections.abc import Callable
from urllib.parse import quote, quote_plus


def json_of(text: str) -> str:
    return json.dumps(text)[1:-1]


def lower_hex_quote(text: str) -> str:
    quoted = quote(text, safe="")
    return "".join(c.lower() if i and "%" in quoted[max(0, i - 2) : i] else c for i, c in enumerate(quoted))


ENCODINGS: dict[str, Callable[[str], str]] = {
    "raw": str,
    "repr": lambda s: repr(s)[1:-1],
    "repr in a list": lambda s: repr([s, "'"]),
    "repr of a repr": lambda s: repr(repr(s)),
    "repr with both quotes": lambda s: repr(s + "'\"")[1:-4],
    "ascii": lambda s: ascii(s)[1:-1],
    "repr of bytes": lambda s: repr(s.encode())[2:-1],
    "json": json_of,
    "json, not ascii": lambda s: json.dumps(s, ensure_ascii=False)[1:-1],
    "json in json": lambda s: json.dumps(json.dumps({"key": s})),
    "json in json, not ascii": lambda s: json.dumps(json.dumps(s, ensure_ascii=False), ensure_ascii=False),
    "json in json in json": lambda s: json.dumps(json.dumps(json.dumps(s))),
    "repr of json": lambda s: repr(json.dumps(s)),
    "url": quote,
    "url, all of it": lambda s: quote(s, safe=""),
    "url, lower hex": lower_hex_quote,
    "url, plus": quote_plus,
    "url, twice": lambda s: quote(quote(s, safe=""), safe=""),
    "url of json": lambda s: quote(json.dumps({"key": s}), safe=""),
    "url of a repr": lambda s: quote_plus(repr(s)),
    "html": html.escape,
    "html, no quotes": lambda s: html.escape(s, quote=False),
    "html of html": lambda s: html.escape(html.escape(s)),
    "html of json": lambda s: html.escape(json.dumps(s)),
    "html of a repr": lambda s: html.escape(repr(s)),
    "html by numbers": lambda s: s.encode("ascii", "xmlcharrefreplace").decode(),
    "json for javascript": lambda s: json.dumps(s).replace("/", "\\/").replace("<", "\\u003c").replace("&", "\\u0026"),
    "shell": shlex.quote,
    "hex": lambda s: s.encode().hex(),
    "hex, upper": lambda s: s.encode().hex().upper(),
    "hex with colons": lambda s: s.encode().hex(":"),
    "hex escapes": lambda s: "".join(f"\\x{b:02x}" for b in s.encode()),
    "base64": lambda s: base64.b64encode(s.encode()).decode(),
    "base64, bare": lambda s: base64.b64encode(s.encode()).decode().rstrip("="),
    "base64 for urls": lambda s: base64.urlsafe_b64encode(s.encode()).decode(),
    "base64 in a url": lambda s: quote(base64.b64encode(s.encode()).decode(), safe=""),
    "base64 in json": lambda s: json.dumps(base64.encodebytes(s.encode()).decode()),
}
