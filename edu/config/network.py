"""Proxies and certificates of the environment: honored, except for this machine's own servers; their faults are one line.

Every client of ours is made by `http_client`. Code that retries or reports a failed request asks `settings_fault` first:
where it returns text, no retry helps, and the text is the message to raise.
"""

import os
import re
from typing import TYPE_CHECKING, Any
from urllib.request import getproxies, proxy_bypass

if TYPE_CHECKING:
    import httpx2

_CERTIFICATE = "set SSL_CERT_FILE to a PEM file with the certificate of your proxy or server"
_PROXIES = "HTTP_PROXY, HTTPS_PROXY or ALL_PROXY"


def is_loopback(url: str) -> bool:
    """Check if a URL names this very machine, which is never reached through a proxy.

    >>> is_loopback("http://127.0.0.1:8000/v1"), is_loopback("http://localhost.example.com"), is_loopback("http://[::1]")
    (True, False, True)
    """
    return re.match(r"\w+://([^/@]*@)?(localhost|127(\.\d+){3}|\[::1\])(:\d*)?(/|$)", url) is not None


def http_client(url: str, **options: Any) -> "httpx2.Client":
    """Return a client for requests to `url`; ConnectionError with the cure if proxy or certificate settings are unusable."""
    import httpx2

    local = is_loopback(url)
    try:
        if local and url.startswith("https:"):  # without the environment's proxies, but with its certificates
            options["verify"] = httpx2.create_ssl_context()
        return httpx2.Client(trust_env=not local, **options)
    except (ValueError, OSError, ImportError, httpx2.InvalidURL) as error:
        raise ConnectionError(settings_fault(error) or str(error)) from error


def settings_fault(error: BaseException | None) -> str:
    """Return one line with the cure if an error (or its cause) is due to proxy, certificate or offline settings, else ""."""
    if error is None:
        return ""
    # By names and texts: this file loads neither httpx2 nor the Hub's client, and SOCKS is an ImportError.
    text, kinds = str(error), {kind.__name__ for kind in type(error).__mro__}
    certificates, proxy = os.environ.get("SSL_CERT_FILE", ""), _proxy_of(getattr(error, "_request", None))
    if "ImportError" in kinds and "socks" in text.lower():
        return "a SOCKS proxy is set (ALL_PROXY or another): run `pip install 'httpx2[socks]'`, or unset it"
    if "OfflineModeIsEnabled" in f"{kinds} {text}":
        return "HF_HUB_OFFLINE is set, so nothing is fetched from the Hub: unset it"
    if "CERTIFICATE_VERIFY_FAILED" in text:
        reason = text.partition("verify failed: ")[2].partition(" (_ssl")[0]
        return f"the certificate is not trusted ({reason}): {_CERTIFICATE}"
    unnamed = isinstance(error, FileNotFoundError) and error.errno and not error.filename  # as ssl raises it
    if certificates and ("SSLError" in kinds or unnamed):
        return f"SSL_CERT_FILE={certificates} is no file of certificates: {_CERTIFICATE}"
    if "for proxy URL" in text or ("InvalidURL" in kinds and getproxies().keys() - {"no"}):
        return f"{_PROXIES} is not the URL of a proxy, such as http://host:3128: correct it, or unset it"
    if "ProxyError" in kinds and not text.startswith("5"):  # 502 to 504: the proxy has no connection right now
        return f"the proxy refuses ({text}): correct the user and password in {_PROXIES}, or unset it"
    if {"ConnectError", "ConnectTimeout"} & kinds and proxy:
        return f"no connection through the proxy {proxy} ({text}): correct {_PROXIES}, or unset it"
    return settings_fault(error.__cause__ or error.__context__)


def _proxy_of(request: Any) -> str:
    """Name the proxy that a request goes through, without user and password; "" if it goes directly."""
    if request is None or is_loopback(str(request.url)) or proxy_bypass(request.url.host):
        return ""
    proxies = getproxies()
    return (proxies.get(request.url.scheme) or proxies.get("all", "")).rpartition("@")[2]


def public_url(text: str) -> str:
    """Return a URL, or text that holds some, without what may be secret: user and password, and what follows a "?".

    >>> public_url("https://me:key@host/a.parquet?signature=x")
    'https://host/a.parquet'
    >>> public_url("HF_ENDPOINT=http://me:p@ss@host: no answer")
    'HF_ENDPOINT=http://host: no answer'
    """
    return re.sub(r"(://)(?:[^/\s]*@)?([^\s?]*)(\?\S*)?", r"\1\2", text)
