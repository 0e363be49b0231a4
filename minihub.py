"""minihub: a notebook hub in one file, as a WSGI application.

It speaks the JupyterHub REST API 1.2, starts real single-user Jupyter servers, carries their traffic, is their OAuth2
provider, and has the pages people click. Run it with `gunicorn minihub:app`, or mount a `Hub(...)` in any WSGI site.

Contents:

   1 imports                               2 settings                  3 errors, time, secrets, names
   4 models and the store                  5 authenticators and isolation  6 spawners
   7 HTTP/1.1, and carrying connections    8 WSGI hosts and proxies    9 the site and its people
  10 tokens and OAuth                     11 signing in               12 servers and routes
  13 services and the ticker              14 visits: who is asking    15 REST resources
  16 the skeleton of pages                17 OAuth2 endpoints         18 pages of students
  19 pages of teachers                    20 the WSGI application     21 command line

Each section uses only sections above it; inside a section the caller comes first and its helpers under it.
"""

########################################################################################################
# 1. Imports
########################################################################################################

from __future__ import annotations

# The carrier, whose program is section 7, imports these, too.
import asyncio
import contextlib
import dataclasses
import logging
import marshal
import os
import re
import selectors
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

# The carrier does without these.
import argparse
import base64
import contextvars
import errno
import functools
import hashlib
import hmac
import html
import http.client
import inspect
import ipaddress
import itertools
import json
import linecache
import math
import pkgutil
import secrets
import shlex
import shutil
import signal
import sqlite3
import ssl
import stat
import string
import subprocess
import sys
import tempfile
import unicodedata
import warnings
import weakref
from collections import namedtuple
from datetime import datetime, timedelta, timezone
from pathlib import Path

import falcon
import itsdangerous
import peewee as pw
from playhouse.db_url import connect as database_from_url, parse as parameters_of_url

try:
    import fcntl
    import grp
    import pwd
    import resource
    import termios
except ImportError:  # Windows
    fcntl = grp = pwd = resource = None

__version__ = "0.2.0"
__all__ = ["Hub", "Settings", "SettingError", "HubError", "BadRequest", "NotFound", "Conflict", "TooMany",
           "Authenticator", "PasswordAuthenticator", "DummyAuthenticator", "RemoteUserAuthenticator", "Spawner",
           "SubprocessSpawner", "Launch", "Proxy", "EmbeddedProxy", "app"]

#: The JupyterHub release whose API this is: clients compare it (idle-culler asks for `state` from 1.3 on), and
#: jupyterhub-singleuser 6 exits at once when the header does not parse as PEP 440.
API_VERSION = "1.5.1"

log = logging.getLogger("minihub")


########################################################################################################
# 2. Settings
########################################################################################################

#: The default session cookies of Flask, Django, PHP, Java, Express and Laravel.
SITE_COOKIES = tuple(
    "session remember_token sessionid csrftoken PHPSESSID JSESSIONID connect.sid laravel_session".split())
SERVER_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.~-]{0,61}[A-Za-z0-9])?")  # and a service's


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a hub: keywords of `Hub(...)`, or `MINIHUB_*` variables of `minihub.app`.

    Durations are in seconds. Paths are relative to the folder the hub is started in. Raises SettingError."""

    database: str = "sqlite:///minihub.sqlite"  # a peewee database URL; sqlite:///:memory: ends with the process
    admins: tuple[str, ...] = ()                # users who are admins as soon as they exist
    authenticator: Any = "password"             # password | dummy | remote-user | package.module:Class | an object
    password: str = ""                          # dummy: the one password of the whole class
    remote_user_variable: str = "REMOTE_USER"   # remote-user: the WSGI variable with the name of the site's user
    identify: Callable[..., Any] | None = None  # remote-user: instead, a function that gets the WSGI environment
    login_url: str = ""                         # remote-user: the site's sign-in page, which gets ?next=
    logout_url: str = ""                        # where people go after they have signed out of the hub
    spawner: Any = "subprocess"                 # subprocess | package.module:Class | an object
    proxy: Any = "embedded"                     # embedded | chp | package.module:Class | an object
    services: tuple[dict, ...] = ()             # as JupyterHub's c.JupyterHub.services; in the environment a JSON list
    cmd: str = "jupyterhub-singleuser"          # the single-user command; {port}, {username}, {prefix} are filled in
    cmd_has_sign_in: bool = False               # cmd asks visitors who they are, as jupyterhub-singleuser does
    isolation: str = "auto"                     # auto | uid | bubblewrap | none: how servers are kept apart
    first_uid: int = 70000                      # uid: users get numeric accounts above this one
    mem_limit: str = ""                         # memory of each process of a server, such as 2G; "" = no limit
    process_limit: int = 0                      # processes and threads of a user at the same time, 0 = no limit
    open_file_limit: int = 0                    # files that each process of a server may open, 0 = the hub's limit
    cpu_priority: int = 0                       # the niceness of servers, 0 to 19: the higher, the later their turn
    homes: str = "homes"                        # the folder of the users' homes
    run_dir: str = "run"                        # the folder of the servers' logs and process ids
    notebook_dir: str = ""                      # Jupyter's root folder, relative to the home; {username} is filled in
    default_url: str = ""                       # the page Jupyter opens, for example /lab/tree/start.ipynb
    env_keep: tuple[str, ...] = ()              # more environment variables that servers inherit from the hub
    base_url: str = "/"                         # the prefix of every path, below the mount point if there is one
    public_url: str = ""                        # https://host where browsers reach the hub, for links
    user_url: str = ""                          # https://host or https://{username}.host for users' servers; see Limits
    hub_url: str = ""                           # http://host:port where servers reach the hub; default: its own address
    trusted_proxies: tuple[str, ...] = ("127.0.0.1", "::1")  # reverse proxies whose X-Forwarded-* headers are believed
    site_cookies: tuple[str, ...] = SITE_COOKIES  # the site's cookies, which are withheld from users' servers
    admin_access: bool = True                   # admins may open the servers of others
    named_servers: bool = True                  # users may have named servers besides their default one
    named_server_limit: int = 10                # named servers per user, 0 = no limit
    concurrent_spawn_limit: int = 0             # servers starting at the same time; 0 = 2 per core, but at least 4
    active_server_limit: int = 0                # servers that run, start or wait at the same time, 0 = no limit
    start_timeout: float = 60                   # a server that does not answer within this time has failed
    activity_resolution: float = 30             # how often activity of a token, server or user is written at most
    token_lifetime: float = 0                   # the longest lifetime of a new API token, 0 = no limit
    cookie_lifetime: float = 14 * 24 * 3600     # how long a sign-in lasts
    link_lifetime: float = 7 * 24 * 3600        # how long a sign-in link is valid
    idle_timeout: float = 0                     # a server whose last report of activity is older is stopped, 0 = never
    max_age: float = 0                          # a server older than this is stopped, 0 = never
    chp_api_url: str = "http://127.0.0.1:8001"  # chp: the API of the configurable-http-proxy
    chp_auth_token: str = ""                    # chp: its CONFIGPROXY_AUTH_TOKEN; default: random, if the hub starts it
    chp_command: str = ""                       # chp: starts it, for example configurable-http-proxy --port=8000
    stop_with_hub: bool = False                 # servers end within about a minute of the hub's last worker
    on_shutdown: Callable[..., Any] | None = None  # called by POST /shutdown instead of ending the WSGI server
    on_user_created: Callable[..., Any] | None = None  # called afterwards with (user_name)
    on_server_started: Callable[..., Any] | None = None  # called when it is ready with (user_name, server_name, url)
    on_server_stopped: Callable[..., Any] | None = None  # called with (user_name, server_name, reason); "" = on request
    proxy_idle_timeout: float = 3600            # a proxied connection silent for this long is closed, 0 = never
    tick_interval: float = 1                    # pause between two rounds of the ticker, 0 = call hub.tick() yourself

    def __post_init__(self):
        for name, kind in _kinds_of(Settings).items():
            demand(kind.is_right(getattr(self, name)), name, kind.must, getattr(self, name))
        self._check_values()
        vars(self).update(  # frozen for everybody else
            base_url=self.base_url.rstrip("/") + "/", services=tuple(map(ServiceSpec.of, self.services)),
            **{name: getattr(self, name).rstrip("/") for name in ("public_url", "hub_url", "user_url")},
            **{name: os.path.abspath(getattr(self, name)) for name in ("homes", "run_dir")},  # a site may call chdir()
            **{name: tuple(getattr(self, name)) for name in ("admins", "env_keep", "trusted_proxies", "site_cookies")})
        if self.user_url:
            self._check_user_url()
        _parse("cmd", lambda line: shlex.split(line)[0], self.cmd, "must be a command line with matching quotes")
        names = [spec.name for spec in self.services]
        demand(len(set(names)) == len(names), "services", "must have different names", names)

    def _check_values(self):
        demand(self.base_url.startswith("/"), "base_url", "must start with a slash", self.base_url)
        for name, value in (("public_url", self.public_url), ("hub_url", self.hub_url)):
            demand(not value or is_address(value), name, "must look like https://host", value)
        for name, value in (("login_url", self.login_url), ("logout_url", self.logout_url)):
            demand(not value or value.startswith("/") or is_address(value), name,
                   "must be a path or look like https://host/path", value)
        for value in self.trusted_proxies:
            _parse("trusted_proxies", ipaddress.ip_network, value, "must be IP addresses or networks")
        demand(self.authenticator != "dummy" or self.password, "password",
               "must be set for the dummy authenticator, which lets in everybody who knows it", self.password)
        demand(self.isolation in ("auto", "uid", "bubblewrap", "none"), "isolation",
               "must be auto, uid, bubblewrap or none", self.isolation)
        _parse("mem_limit", bytes_of, self.mem_limit, "must be a number with K, M, G or T behind it")
        demand(self.cpu_priority <= 19, "cpu_priority", "must be 0 to 19", self.cpu_priority)
        demand(not re.match("HTTP_|$", self.remote_user_variable, re.IGNORECASE), "remote_user_variable",
               "must be a variable that the site sets, not a header that clients send", self.remote_user_variable)
        demand(not self.identify or self.authenticator not in ("password", "dummy"), "identify",
               "needs remote-user as the setting authenticator", self.authenticator)

    def _check_user_url(self):
        """Browsers must see another site there than the hub's, and servers must not look for the hub there."""
        url = self.user_url
        demand(re.fullmatch(r"https?://(\{username\}\.)?[A-Za-z0-9.-]*[A-Za-z][A-Za-z0-9-]*(:[0-9]+)?", url),
               "user_url", "must look like https://host or https://{username}.host, and not be an IP address", url)
        demand(self.public_url, "user_url", "needs public_url, the address of the hub's own pages", self.public_url)
        any_port = re.sub(":[0-9]+$", "", url)  # a cookie is sent to every port of its host (RFC 6265, 8.5)
        demand(not is_host_of(any_port, urlsplit(self.public_url).hostname)
               and not is_host_of(url, urlsplit(self.hub_url).netloc),
               "user_url", "must be another host than those of public_url and hub_url", url)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """The settings from this process's variables `MINIHUB_*`; warns of unknown ones. Raises SettingError."""
        given = {name[8:].lower(): text for name, text in environ.items() if name.startswith("MINIHUB_")}
        kinds = {name: kind for name, kind in _kinds_of(cls).items() if kind.from_text}
        for name in given.keys() - kinds:
            warnings.warn(f"MINIHUB_{name.upper()} is not a setting of minihub {__version__}", stacklevel=3)
        return cls(**{name: _parse(name, kind.from_text, given[name], kind.must) for name, kind in kinds.items()
                      if name in given})

    def inherited_variables(self, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
        """The environment variables that a server inherits from this process. An allow-list: no secret leaks."""
        kept = {name: value for name, value in environ.items()
                if name in INHERITED_VARIABLES or name in self.env_keep or name.startswith("LC_")}
        # A hub started as venv/bin/gunicorn finds jupyterhub-singleuser beside the Python that runs it.
        kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
        return kept


INHERITED_VARIABLES = frozenset(
    "PATH LANG LANGUAGE TZ SHELL TMPDIR VIRTUAL_ENV CONDA_ROOT CONDA_DEFAULT_ENV CONDA_PREFIX PYTHONPATH"
    " LD_LIBRARY_PATH HOME USER SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE JUPYTERHUB_SINGLEUSER_APP"
    " JUPYTERHUB_SINGLEUSER_EXTENSION JUPYTERHUB_ACTIVITY_INTERVAL".split())

#: A type of setting: its check, what the error says, and how a variable's text is read (None: no variable can hold it).
Kind = namedtuple("Kind", "is_right must from_text", defaults=[None])
TRUTH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
KINDS: dict[Any, Kind] = {
    Any: Kind(lambda value: True, "", str),
    str: Kind(lambda value: isinstance(value, str), "must be a string", str),
    bool: Kind(lambda value: type(value) is bool, "must be true or false", lambda text: TRUTH[text.strip().lower()]),
    int: Kind(lambda value: type(value) is int and value >= 0, "must be a whole number, 0 or more", int),
    float: Kind(lambda value: type(value) in (int, float) and math.isfinite(value) and value >= 0,
                "must be a number, 0 or more", float),
    tuple[str, ...]: Kind(
        lambda value: isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(item, str) for item in value),
        "must be a list of strings", lambda text: [item.strip() for item in text.split(",") if item.strip()]),
    tuple[dict, ...]: Kind(lambda value: isinstance(value, (list, tuple)), "must be a list of objects",
                           lambda text: json.loads(text or "[]")),
    dict[str, str]: Kind(
        lambda value: isinstance(value, dict) and all(isinstance(text, str) for pair in value.items() for text in pair),
        "must be an object whose values are strings"),
    dict[str, Any]: Kind(lambda value: isinstance(value, dict), "must be an object"),
    Callable[..., Any] | None: Kind(lambda value: value is None or callable(value), "must be callable"),
}


def _kinds_of(cls):
    return {name: KINDS[hint] for name, hint in get_type_hints(cls).items()}


@dataclass(frozen=True, kw_only=True)
class ServiceSpec:
    """An entry of the setting `services`, with JupyterHub's keys. The hub runs its `command`, if it has one."""

    name: str
    admin: bool = False
    url: str = ""                   # http://host:port where it listens; it is reached under /services/NAME/
    api_token: str = ""             # its API token; default: a new one at each start of the command
    command: tuple[str, ...] = ()
    cwd: str = ""
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    user: str = ""                  # the system user to run the command as
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    display: bool = True
    oauth_no_confirm: bool = False  # skips the consent page
    oauth_client_id: str = ""       # default: service-NAME
    oauth_redirect_uri: str = ""    # default: /services/NAME/oauth_callback

    @classmethod
    def of(cls, value: Any) -> ServiceSpec:
        """The entry, checked. Raises SettingError."""
        if isinstance(value, cls):
            return value
        name = value.get("name") if isinstance(value, dict) else None
        demand(isinstance(name, str) and SERVER_NAME.fullmatch(name), "services",
               "must be a list of objects, each with a name of letters, digits and -_.~", name)
        kinds = _kinds_of(cls)
        unknown = sorted(value.keys() - kinds)
        demand(not unknown, "services", f"{name} must have no other keys than {', '.join(kinds)}", unknown)
        if isinstance(value.get("command"), str):
            words = _parse("services", shlex.split, value["command"], f"command of {name} must have matching quotes")
            value = {**value, "command": words}
        for key, item in value.items():
            demand(kinds[key].is_right(item), "services", f"{key} of {name} {kinds[key].must}", item)
        spec = cls(**{**value, "command": tuple(value.get("command", ()))})
        demand(not spec.url or is_address(spec.url), "services", f"url of {name} must look like http://host", spec.url)
        demand(not spec.oauth_client_id.startswith("jupyterhub-user-"), "services",
               f"oauth_client_id of {name} must not be one that a server can have", spec.oauth_client_id)
        demand(not spec.api_token or len(spec.api_token) >= 8, "services",
               f"api_token of {name} must have at least 8 characters", len(spec.api_token))
        return spec

    @property
    def target(self) -> str:
        """Where the proxy sends its requests, "" for a service without pages."""
        return "{0.scheme}://{0.netloc}".format(urlsplit(self.url)) if self.url else ""

    @property
    def client_id(self) -> str:
        """Its OAuth client id, "" for a service that nobody signs in to."""
        return self.oauth_client_id or (f"service-{self.name}" if self.url or self.oauth_redirect_uri else "")


class SettingError(ValueError):
    """An invalid setting; `setting` is its name."""

    def __init__(self, setting: str, problem: str, value: Any):
        super().__init__(f"{setting}: {problem} (got {value!r})")
        self.setting = setting


def demand(condition: Any, setting: str, problem: str, value: Any) -> None:
    """Raises SettingError unless the condition holds; `problem` says what must hold."""
    if not condition:
        raise SettingError(setting, problem, value)


def _parse(setting, convert, value, problem):
    try:
        return convert(value)
    except (ValueError, TypeError, LookupError):
        raise SettingError(setting, problem, value) from None


def bytes_of(size: str) -> int:
    """The bytes of a size such as 512M or 1.5G; 0 for "". Raises ValueError."""
    number, unit = (size[:-1], size[-1].upper()) if size else ("0", "K")
    return int(float(number) * 1024 ** ("KMGT".index(unit) + 1))


def is_address(value: str) -> bool:
    """Whether it is an absolute http or https URL."""
    try:
        parts = urlsplit(value)
        is_plain = re.fullmatch(r"[\x21-\x7e]+", value)
        return bool(is_plain and parts.hostname) and parts.scheme in ("http", "https") and parts.port != 0
    except ValueError:
        return False


def is_host_of(url: str, host: str) -> bool:
    """Whether a Host header names the host and port of `url`; `{username}` in it matches any label."""
    scheme, _, authority = url.partition("://")
    default_port = ":443" if scheme == "https" else ":80"
    pattern = re.escape(authority.removesuffix(default_port)).replace(re.escape("{username}"), "[a-z0-9-]+")
    return bool(re.fullmatch(f"{pattern}({default_port})?", host, re.IGNORECASE))


def load_hook(setting: str, choice: Any, builtin: dict[str, type], base: type) -> Any:
    """The hook that a setting names (a built-in, `package.module:Class`, a class or an object). Raises SettingError."""
    hook = builtin.get(choice, choice) if isinstance(choice, str) else choice
    if isinstance(hook, str):
        try:
            hook = pkgutil.resolve_name(hook)
        except (ImportError, AttributeError, ValueError) as error:
            problem = f"must be {', '.join(builtin)} or package.module:Class: {error}"
            raise SettingError(setting, problem, choice) from None
    hook = hook() if isinstance(hook, type) else hook
    demand(isinstance(hook, base), setting, f"must be a kind of {base.__name__}", choice)
    demand(hook.settings is None, setting, "must be an object of its own for each hub", choice)
    return hook


########################################################################################################
# 3. Errors, time, secrets, names
########################################################################################################

SCRYPT = {"n": 2 ** 14, "r": 8, "p": 1}  # 16 MiB and about 50 ms a guess
NAME_LENGTH = 255  # the width of JupyterHub's column
#: First path segments of Jupyter's own pages: a server of that name would hide the page of the default server.
RESERVED_SERVER_NAMES = frozenset(
    "api custom edit doc files hub kernelspecs lab login logout metrics nbconvert nbextensions notebooks"
    " oauth_callback static terminals tree view voila".split())


class HubError(Exception):
    """A refusal: `status` (HTTP), `message` (for people), `retry_after` (seconds or None)."""
    status = 500

    def __init__(self, message: str = "", retry_after: float | None = None):
        self.message = message or http.HTTPStatus(self.status).phrase
        self.retry_after = retry_after
        super().__init__(self.message)


class BadRequest(HubError):
    status = 400


class OAuthError(HubError):
    """400 or 401: refused by the token endpoint; `error` is a code of RFC 6749, section 5.2."""

    def __init__(self, error: str, message: str, status: int = 400):
        super().__init__(message)
        self.error, self.status = error, status


class Forbidden(HubError):
    """403: not permitted. JupyterHub never answers 401, and its clients fail on one."""
    status = 403


class NotFound(HubError):
    status = 404


class Conflict(HubError):
    status = 409


class TooSlow(HubError):
    """408: the client does not send the rest of its request."""
    status = 408


class TooLarge(HubError):
    status = 413


class Misdirected(HubError):
    """421: users' servers have a host name of their own, and the request came to the wrong one."""
    status = 421


class TooMany(HubError):
    """429: a rate limit or another limit is reached; `retry_after` says for how long, if that is known."""
    status = 429


class NotPossible(HubError):
    """501: the WSGI server that runs the hub cannot do this."""
    status = 501


class Unavailable(HubError):
    """503: something the hub needs does not answer; the request may be retried."""
    status = 503


def now() -> datetime:
    """The current time, aware, in UTC."""
    return datetime.now(timezone.utc)


def seconds_since(moment: datetime) -> float:
    """The age of a moment, in seconds; negative for one in the future."""
    return (now() - moment).total_seconds()


def isoformat(moment: datetime | None) -> str | None:
    """ISO 8601 as JupyterHub writes it: UTC, `Z`, microseconds unless they are 0."""
    return moment and moment.astimezone(timezone.utc).isoformat().replace("+00:00", "Z")


def parse_time(text: Any) -> datetime:
    """The moment of an ISO 8601 text (without an offset: UTC). Raises BadRequest."""
    with contextlib.suppress(ValueError, TypeError, AttributeError, OverflowError):
        # Python 3.10 parses neither Z nor a fraction of other than 3 or 6 digits.
        plain = re.sub(r"(\.\d{1,6})\d*", lambda match: match[1].ljust(7, "0"), text.strip().replace("Z", "+00:00"))
        moment = datetime.fromisoformat(plain)
        moment = moment.replace(tzinfo=moment.tzinfo or timezone.utc).astimezone(timezone.utc)
        if moment.year >= 1970:  # year 1 overflows when a duration is subtracted
            return moment
    raise BadRequest(f"Not a valid timestamp: {shortened(text)}")


def shortened(value: Any) -> str:
    """The repr of a value, cut to a length that a message can quote."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def storable(text: str) -> str:
    """`text` with NULs (refused by PostgreSQL) and lone surrogates (refused by all databases) replaced."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def new_token() -> str:
    """128 random bits in hex, like JupyterHub's tokens."""
    return secrets.token_hex(16)


def hash_token(token: str) -> str:
    """The hash under which a token is stored. 128 random bits cannot be guessed: one round without a salt is enough."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def challenge_of(verifier: str) -> str:
    """The S256 challenge of a PKCE verifier (RFC 7636, 4.2)."""
    digest = hashlib.sha256(verifier.encode("utf-8", "surrogateescape")).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def hash_password(password: str) -> str:
    """`scrypt$salt$key`, both in hex, with a random salt."""
    salt = secrets.token_bytes(16)
    return f"scrypt${salt.hex()}${hashlib.scrypt(password.encode(), salt=salt, **SCRYPT).hex()}"


def check_password(password: str, hashed: str | None) -> bool:
    """Whether `password` has this hash; False if there is none. Takes the same time in every case."""
    _, salt, key = (hashed or f"scrypt${'00' * 16}${'00' * 64}").split("$")
    computed = hashlib.scrypt(password.encode("utf-8", "surrogateescape"), salt=bytes.fromhex(salt), **SCRYPT)
    return hmac.compare_digest(computed.hex(), key) and hashed is not None


def normalize_name(name: str) -> str:
    """The name in NFKC and lower case. Idempotent. A name that is too long is cut, but stays invalid."""
    for _ in range(4):  # lower case can undo NFKC, which the second round repairs
        if len(name) > NAME_LENGTH:  # NFKC is quadratic in runs of combining marks, and can lengthen a name
            return name[:NAME_LENGTH + 1]
        before, name = name, unicodedata.normalize("NFKC", name).lower()
        if name == before:
            return name
    return ""  # no fixed point, no valid name


def is_valid_name(name: str) -> bool:
    """Whether a user or group may have this name: printable, no slash, no outer blanks, not `.` or `..`."""
    return (0 < len(name) <= NAME_LENGTH and name.isprintable() and name == name.strip()
            and "/" not in name and name not in (".", ".."))


def check_server_name(name: str) -> str:
    """The name, if a server can have it in its URL. Raises BadRequest."""
    if name and (not SERVER_NAME.fullmatch(name) or name.lower() in RESERVED_SERVER_NAMES):
        raise BadRequest(f"Invalid server_name: {name!r}. Use up to 63 letters, digits and -_.~, no word Jupyter uses")
    return name


def quote_name(name: str) -> str:
    """A name as a path segment of a URL; leaves the characters alone that JupyterHub leaves alone."""
    return quote(name, safe="@~")


def folder_name(name: str) -> str:
    """A name as a file name: readable, not hidden, without a slash, short enough. Different for different names."""
    plain = re.sub(r"^\.", "%2E", quote(name, safe="@~+,= "))
    return plain if len(plain) <= 100 else f"{plain[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def host_label(name: str) -> str:
    """A name as a label of a host name (RFC 1123); falls back to a hash that no user name can equal."""
    return name if re.fullmatch(r"[a-z0-9]{1,63}", name) else f"u-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


class Deadline:
    """How long the other end of a socket, known by its file descriptor, may keep a thread waiting: `seconds`, to be
    extended up to `total`. Then the socket is shut, so that the read or write that waits comes to its end."""

    _in_force: set[Deadline] = set()
    _owner = 0  # the process whose thread enforces these: threads do not survive a fork

    def __init__(self, number: int | None, seconds: float, total: float = math.inf):
        self.number, self.seconds = number, seconds
        self.inode = None if number is None else os.fstat(number).st_ino
        self.moment, self.latest = time.monotonic() + seconds, time.monotonic() + total
        self.unsent = 0       # bytes that the other end is to take first
        self.is_over = False

    def extend(self, seconds: float) -> None:
        """Allow some seconds more, but from now on never more than at first."""
        self.moment = min(self.moment + seconds, time.monotonic() + self.seconds, self.latest)

    def enforce(self) -> None:
        """Shut the socket if it is time; only for reading, if the other end would take an answer."""
        if self.is_over or time.monotonic() < self.moment:
            return
        self.is_over = True
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.number)) as duplicate:
            if os.fstat(duplicate.fileno()).st_ino == self.inode:  # else the number is another socket's by now
                log.warning("cut off, as it keeps the hub waiting: %s", duplicate.getpeername() or "a unix socket")
                duplicate.shutdown(socket.SHUT_RDWR if self.unsent else socket.SHUT_RD)

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Within the block, a thread of this process enforces it."""
        cls = Deadline
        if self.number is not None and cls._owner != os.getpid():
            cls._owner, cls._in_force = os.getpid(), set()
            threading.Thread(target=cls._enforce_all, name="minihub-deadlines", daemon=True).start()
        if self.number is not None:
            cls._in_force.add(self)
        try:
            yield
        finally:
            cls._in_force.discard(self)

    @classmethod
    def _enforce_all(cls):
        while True:
            time.sleep(0.1)
            for deadline in cls._in_force.copy():
                deadline.enforce()


########################################################################################################
# 4. Models and the store
########################################################################################################

class CurrentDatabase(pw.DatabaseProxy):
    """The database of the hub at work in this thread, so that several hubs can share one process."""
    current: contextvars.ContextVar[pw.Database | None] = contextvars.ContextVar("minihub_database", default=None)
    obj = property(lambda self: self.current.get(), lambda self, value: None)


class MomentField(pw.DateTimeField):
    """An aware UTC datetime, stored without its offset."""

    def db_value(self, value):
        return value and super().db_value(value.astimezone(timezone.utc).replace(tzinfo=None))

    def python_value(self, value):
        if isinstance(value, str):  # SQLite's; peewee tries one strptime after another
            return datetime.fromisoformat(value + "+00:00")
        return value and value.replace(tzinfo=timezone.utc)


class JSONField(pw.TextField):
    """Any JSON value; the column's NULL and JSON's null are both None."""

    def db_value(self, value):
        return None if value is None else json.dumps(value)

    def python_value(self, value):
        return None if value is None else json.loads(value)


class Row(pw.Model):
    """The base of all models. Call list() on a query before you write while iterating over it: while a query is open,
    SQLite does not wait for another writer, but answers "database is locked" at once."""

    class Meta:
        database = CurrentDatabase()
        table_function = staticmethod(lambda model: f"{model.__name__.lower()}s")


class Fact(Row):
    """A fact about the hub itself, such as the schema's version or the cookie secret."""
    key = pw.CharField(primary_key=True)
    value = JSONField(null=True)

    class Meta:
        table_name = "settings"


class Lease(Row):
    """Who does a job that one worker at a time may do, and until when."""
    job = pw.CharField(primary_key=True)
    holder = pw.CharField()
    expires = MomentField()


class Failure(Row):
    """Failed sign-ins in a row, by name, by address and by both, for the rate limit; forgotten at `until`."""
    key = pw.CharField(primary_key=True, max_length=512)
    count = pw.IntegerField()
    until = MomentField()


class User(Row):
    """A person. One who is `leaving` is deleted: hidden, under a name with a slash, until the last server stops."""
    name = pw.CharField(unique=True)
    display_name = pw.CharField(default="", constraints=[pw.SQL("DEFAULT ''")])
    admin = pw.BooleanField(default=False)
    password = pw.CharField(null=True)
    folder = pw.CharField(unique=True)  # the name of the home; it stays when the name changes
    uid = pw.IntegerField(null=True, unique=True)
    session_key = pw.CharField(default=new_token)  # in every cookie and link: a new one revokes them all
    auth_state = JSONField(null=True)
    leaving = pw.BooleanField(default=False, constraints=[pw.SQL("DEFAULT FALSE")])
    created = MomentField(default=now)
    last_activity = MomentField(null=True)

    @property
    def label(self) -> str:
        return self.name.partition("/")[0]


class Group(Row):
    """A named set of users; `properties` is any JSON object."""
    name = pw.CharField(unique=True)
    properties = JSONField(null=True)


class Membership(Row):
    """A user's membership in a group."""
    user = pw.ForeignKeyField(User, backref="memberships", on_delete="CASCADE")
    group = pw.ForeignKeyField(Group, backref="memberships", on_delete="CASCADE")
    role = pw.CharField(default="member", constraints=[pw.SQL("DEFAULT 'member'")])

    class Meta:
        indexes = ((("user", "group"), True),)


class Server(Row):
    """A user's single-user server, the default one when `name` is empty."""
    user = pw.ForeignKeyField(User, backref="servers", on_delete="CASCADE")
    name = pw.CharField(default="")
    status = pw.CharField(default="stopped", index=True)  # stopped, queued, spawning, ready, stopping, stopped
    launch = pw.CharField(default="")              # new for every start, so that stale writes about earlier ones fail
    attempts = pw.IntegerField(default=0)          # at one start; if queued: how many starts of its user came before
    state = JSONField(null=True)
    target = pw.CharField(null=True, unique=True)  # http://host:port; unique, so that two servers never share a port
    prefix = pw.TextField(default="")
    user_options = JSONField(null=True)
    failure = pw.TextField(default="")             # why the last launch ended, if that was not asked for
    forget = pw.BooleanField(default=False)        # delete the row once the server has stopped
    changed = MomentField(default=now)             # when `status` last did
    started = MomentField(null=True)
    last_activity = MomentField(null=True)
    is_deleted = False                             # no column: set on an object whose row is gone

    class Meta:
        indexes = ((("user", "name"), True),)

    @property
    def label(self) -> str:
        return f"{self.user.label}:{self.name}" if self.name else self.user.label  # as in JupyterHub's messages


class Service(Row):
    """A program beside the hub, as the setting `services` describes it; `state` is its process's if the hub runs it."""
    name = pw.CharField(unique=True)
    admin = pw.BooleanField()
    spec = JSONField()
    state = JSONField(null=True)
    restarts = pw.IntegerField(default=0)
    next_start = MomentField(default=now)
    created = MomentField(default=now)


class OAuthClient(Row):
    """A program that may ask for OAuth codes: a user's server (one registration a launch) or a service."""
    identifier = pw.TextField(unique=True)  # holds the user's name, quoted, and so up to twelve times as long
    secret = pw.CharField()
    redirect_uri = pw.TextField()
    description = pw.TextField()
    server = pw.ForeignKeyField(Server, null=True, backref="clients", on_delete="CASCADE")
    service = pw.ForeignKeyField(Service, null=True, backref="clients", on_delete="CASCADE")


class Token(Row):
    """An API token, or, with a `client`, an OAuth access token. `server` is set on the token a server runs with."""
    hashed = pw.CharField(unique=True)
    user = pw.ForeignKeyField(User, null=True, backref="tokens", on_delete="CASCADE")
    service = pw.ForeignKeyField(Service, null=True, backref="tokens", on_delete="CASCADE")
    client = pw.ForeignKeyField(OAuthClient, null=True, backref="tokens", on_delete="CASCADE")
    server = pw.ForeignKeyField(Server, null=True, backref="tokens", on_delete="CASCADE")
    parent = pw.ForeignKeyField("self", null=True, on_delete="CASCADE")  # the token this one stands in for
    scopes = JSONField(null=True)  # None: it may do whatever its owner may
    session_id = pw.CharField(default="", index=True)
    note = pw.TextField(default="")
    created = MomentField(default=now)
    last_activity = MomentField(null=True)
    expires_at = MomentField(null=True)

    class Meta:
        constraints = [pw.Check("(user_id IS NULL) <> (service_id IS NULL)")]


class OAuthCode(Row):
    """A code on its way from authorize to token: single use, short-lived, bound to client, user and session."""
    hashed = pw.CharField(unique=True)
    client = pw.ForeignKeyField(OAuthClient, on_delete="CASCADE")
    user = pw.ForeignKeyField(User, on_delete="CASCADE")
    session_id = pw.CharField()
    challenge = pw.CharField(default="")
    expires_at = MomentField()


class Route(Row):
    """A route of the embedded proxy: requests below `prefix` go to `target`; `data` says whose that is."""
    prefix = pw.TextField(primary_key=True)
    target = pw.CharField()
    data = JSONField()


class Session(Row):
    """A sign-in of a browser."""
    hashed = pw.CharField(unique=True)
    user = pw.ForeignKeyField(User, backref="sessions", on_delete="CASCADE")
    address = pw.CharField(default="")
    agent = pw.TextField(default="")
    created = MomentField(default=now)
    last_activity = MomentField(default=now)
    expires_at = MomentField(index=True)


class Event(Row):
    """An entry of the record: what happened to `user`, and who did it. It goes with the person it is about."""
    at = MomentField(default=now, index=True)
    kind = pw.CharField()
    user = pw.ForeignKeyField(User, null=True, backref="events", on_delete="CASCADE")
    actor = pw.CharField(default="")
    detail = JSONField(null=True)


SCHEMA_VERSION = 2
MODELS = tuple(Row.__subclasses__())
SPAWN_PENDING = ("queued", "spawning")  # a server is queued until the machine has room for its start
ACTIVE = (*SPAWN_PENDING, "ready", "stopping")
PENDING = {"queued": "spawn", "spawning": "spawn", "stopping": "stop"}  # in the API's words
DatabaseTrouble = (pw.OperationalError, pw.InterfaceError, pw.InternalError)  # it is gone, locked, full or read-only
#: In the message of an OperationalError that does not pass: the setting is wrong.
WRONG = re.compile("authentication failed|does not exist|pg_hba|not permitted|unable to open|readonly|no such|syntax")
REPLACED = ("The file of the hub's database has been deleted or replaced while the hub was running. Put it back, or, if"
            " that was meant, restart the hub.")
SQLITE_WAIT, NOTE_WAIT = 15, 0.1  # seconds that a write waits for another process's, and one that may be left out
ANSWER_WAIT, CONNECT_WAIT = 6, 4  # seconds that PostgreSQL may take for a statement, and for a connection
Overtaken = (pw.DoesNotExist, pw.IntegrityError)  # a concurrent request has deleted the parent row


class CompiledQuery:
    """A query whose SQL is written once: peewee takes some 230 us to write one, SQLite 7 us to answer it. The values it
    was written with are placeholders; `columns` name what a SELECT returns."""

    def __init__(self, query: pw.Query, **columns: pw.Field):
        self._query = query.columns(*columns.values()) if columns else query
        self._row = namedtuple("Row", columns)
        converted = (MomentField, JSONField, pw.BooleanField)  # text and numbers come as they are
        self._converters = [isinstance(field, converted) and field.python_value for field in columns.values()]
        self._sql: dict[str, str] = {}

    def run(self, database: pw.Database, *values: Any) -> list[Any]:
        """The rows of a SELECT, as named tuples of Python values."""
        return [self._row._make([convert(value) if convert else value for convert, value in zip(self._converters, row)])
                for row in self.execute(database, *values).fetchall()]

    def execute(self, database: pw.Database, *values: Any) -> Any:
        """Run the query with these values in place of its own; returns the cursor."""
        sql = self._sql.get(database.param) or self._sql.setdefault(database.param, self._query.sql()[0])
        return database.execute_sql(sql, values)


class Store:
    """The hub's database. Raises SettingError for one that cannot be used; while it is only in trouble (away, locked or
    full), connections raise DatabaseTrouble."""

    def __init__(self, url: str):
        self._databases: dict[int, pw.Database] = {}
        self._remove_folder: Callable[[], Any] = lambda: None
        self._path = self._located(url) if url.startswith("sqlite:") else ""
        self._url = f"sqlite:///{self._path}" if self._path else url
        self._file, self._let_go = "", lambda: None  # which file is at that path, and the end of our claim to it
        self._opening = threading.RLock()
        self._refusal = (0.0, "")  # until when the last failure to connect holds for all threads
        self._trouble = ""         # that was logged last
        self._steps: list[Callable[[], Any]] = []
        self.prepare(self._prepare_schema)

    def prepare(self, step: Callable[[], Any]) -> None:
        """Run this with the database before anything else does: now, or, if it is in trouble, once it is well."""
        self._steps.append(step)
        try:
            with self.connected():
                pass
        except (pw.PeeweeException, RuntimeError, ValueError) as error:
            if not isinstance(error, pw.OperationalError) or WRONG.search(str(error)):
                problem = f"must be usable: {str(error).splitlines()[0]}"
                shown = [re.sub(r"//.*@", "//...@", text) for text in (problem, self._url)]  # a URL can hold a password
                raise SettingError("database", *shown) from None
            self.note_trouble(error)
        self.disconnect()  # a fork must not inherit the connection

    def _located(self, url):
        """The absolute path of SQLite's file, as the site may change its working directory later."""
        path = url.removeprefix("sqlite:").removeprefix("///").partition("?")[0]
        if path.endswith(":memory:"):  # a file that ends with the hub: SQLite has a memory for each thread's connection
            folder = tempfile.mkdtemp(prefix="minihub-")
            self._remove_folder = weakref.finalize(self, _remove_own_folder, folder, os.getpid())
            path = f"{folder}/memory.sqlite"
        return os.path.abspath(path)

    @property
    def database(self) -> pw.Database:
        """This process's database. One opened before a fork is kept, unused: closing it would hurt the parent."""
        process = os.getpid()  # of several threads that are the first, setdefault gives all the same
        return self._databases.get(process) or self._databases.setdefault(process, open_database(self._url))

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Open this thread's connection, and make this database the models' one in this thread."""
        token = CurrentDatabase.current.set(self.database)
        try:
            if self._file and self._file != inode_of(self._path):  # SQLite would go on with it, or make a new one
                raise pw.OperationalError(REPLACED)
            if self._steps or self.database.is_closed():
                with self._opening:
                    self._open()
            yield
        finally:
            CurrentDatabase.current.reset(token)

    def _open(self):
        begin = time.monotonic()
        if begin < self._refusal[0]:
            raise pw.OperationalError(self._refusal[1])
        try:
            if self._path and not self._file and fcntl:
                self._file = self._claim_file()
            self.database.connect(reuse_if_open=True)
            while self._steps:
                with waiting(1):  # gunicorn ends workers that take long to start
                    self._steps[0]()
                self._steps = self._steps[1:]
            self._trouble = ""
        except (pw.PeeweeException, OSError, RuntimeError, ValueError, BadRequest) as error:
            self._refusal = (2 * time.monotonic() - begin, str(error))
            passes = isinstance(error, DatabaseTrouble) or getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT)
            raise (pw.OperationalError if passes else pw.InternalError)(str(error)) from error

    def _claim_file(self):
        """Lock a file beside SQLite's, which says what inode all processes of the hub use; returns that. Only a process
        that is alone makes a new file, or takes another. The lock lasts as long as the descriptor."""
        self._let_go()
        folder, name = os.path.split(self._path)
        claim = os.open(f"{folder}/.{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        self._let_go = weakref.finalize(self, os.close, claim)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            Path(self._path).touch(0o600)  # SQLite itself would let everybody read it; its WAL takes over the mode
            os.pwrite(claim, inode_of(self._path).ljust(64).encode(), 0)  # a full disk has room for that
        fcntl.flock(claim, fcntl.LOCK_SH)
        if (file := os.pread(claim, 64, 0).decode().strip()) != inode_of(self._path):
            raise pw.OperationalError(REPLACED)
        return file

    def note_trouble(self, error: Exception) -> None:
        """Log that the database does not answer, once, and close this thread's connection: another may do better."""
        if self._trouble != str(error):
            self._trouble = str(error)
            log.error("the database does not answer: %s", error)
        with contextlib.suppress(*DatabaseTrouble):
            self.disconnect()

    def disconnect(self) -> None:
        """Close this thread's connection; the next request opens another."""
        self.database.close()

    def transaction(self) -> contextlib.AbstractContextManager:
        """All or nothing. A transaction in another is a part of it."""
        return self.database.atomic()

    def lock(self, job: str) -> None:
        """Make other transactions that lock the same job wait until this one ends. (In SQLite they wait already.)"""
        self.set_fact(f"lock:{job}", None)

    def fact(self, key: str, default: Any = None) -> Any:
        """The value kept under that key."""
        row = Fact.get_or_none(Fact.key == key)
        return default if row is None else row.value

    def set_fact(self, key: str, value: Any) -> None:
        """Keep a value under that key, in place of any other."""
        upsert(Fact.key, key, value=value)

    def claim_fact(self, key: str, value: Any) -> Any:
        """Keep a value under that key unless there is one; returns the one that stands."""
        Fact.insert(key=key, value=value).on_conflict_ignore().execute()
        return self.fact(key)

    def backup(self, path: str) -> None:
        """Write a consistent copy of an SQLite database into a new file, while it is in use. Raises BadRequest."""
        if not isinstance(self.database, pw.SqliteDatabase):
            raise BadRequest("Only an SQLite database is copied this way. For PostgreSQL use pg_dump")
        try:
            Path(path).touch(0o600, exist_ok=False)
            with contextlib.closing(sqlite3.connect(self.database.database)) as connection:
                connection.execute("VACUUM INTO ?", (path,))  # this thread's connection may be in a transaction
        except OSError as error:
            raise BadRequest(f"The copy {path} cannot be made: {error.strerror}") from None
        except sqlite3.Error as error:
            os.unlink(path)
            raise BadRequest(f"The copy {path} cannot be made: {error}") from None

    def close(self) -> None:
        """Close this thread's connection, and delete a database that was in memory."""
        self.disconnect()
        self._let_go()
        self._file = ""
        self._remove_folder()

    def _prepare_schema(self):
        """Create the tables, or upgrade older ones after a copy has been set aside (SQLite), in one transaction."""
        with self.transaction():
            if isinstance(self.database, pw.PostgresqlDatabase):  # workers start at the same moment
                self.database.execute_sql("SELECT pg_advisory_xact_lock(%s)", (0x6d696e69,))
            version = self.fact("schema_version") if Fact.table_exists() else None
            if version == 1:
                self._upgrade_from_version_1()
            elif version not in (None, SCHEMA_VERSION):
                raise RuntimeError(f"it was written by a newer minihub than {__version__}")
            if version != SCHEMA_VERSION:
                self.database.create_tables(MODELS)
                self.set_fact("schema_version", SCHEMA_VERSION)
                log.info("database: schema %s, %s", SCHEMA_VERSION, f"upgraded from {version}" if version else "new")
            self.secret: str = self.claim_fact("cookie_secret", secrets.token_hex(32))

    def _upgrade_from_version_1(self):
        """Add the columns of version 2, and drop the CHECK on a server's status, which allows no new one."""
        # NULL, or with a default of the database's own, because workers of 0.1.0 may still insert rows.
        for field in (User.display_name, User.uid, User.leaving, Group.properties, Membership.role, Token.scopes):
            column = field.ddl(self.database.get_sql_context())
            self.database.execute(pw.NodeList((pw.SQL(f"ALTER TABLE {field.model._meta.table_name} ADD"), column)))
        if isinstance(self.database, pw.PostgresqlDatabase):
            self.database.execute_sql("ALTER TABLE servers DROP CONSTRAINT IF EXISTS servers_status_check")
            return
        copy = f"{self.database.database}.version-1"
        Path(copy).unlink(missing_ok=True)  # of an upgrade that failed
        self.backup(copy)  # sees nothing of this transaction
        # SQLite's documented way to drop a CHECK: rebuilding the table in a transaction deletes all that refers to it.
        check = "CHECK (status IN ('stopped', 'spawning', 'ready', 'stopping'))"
        self.database.execute_sql("PRAGMA writable_schema = ON")
        self.database.execute_sql("UPDATE sqlite_master SET sql = replace(sql, ?, '') WHERE name = 'servers'", (check,))
        self.database.execute_sql("PRAGMA writable_schema = RESET")  # and read it again


def _remove_own_folder(path, maker):
    if os.getpid() == maker:  # its forks end earlier, and use it, too
        shutil.rmtree(path, ignore_errors=True)


def inode_of(path: str) -> str:
    """Device and inode, which tell a file from another at the same path; "" if there is none."""
    with contextlib.suppress(OSError):
        return "{0.st_dev}:{0.st_ino}".format(os.stat(path))
    return ""


def open_database(url: str) -> pw.Database:
    """A database that opens a connection per thread, and never by accident."""
    if url.startswith("sqlite:"):
        pragmas = {"journal_mode": "wal", "synchronous": "normal", "foreign_keys": 1}
        return pw.SqliteDatabase(url.removeprefix("sqlite:///"), pragmas=pragmas, timeout=SQLITE_WAIT,
                                 lock_type="IMMEDIATE", autoconnect=False)
    database = database_from_url(url, autoconnect=False)
    if type(database) is not pw.PostgresqlDatabase:
        return database
    return ImpatientPostgres(**{"connect_timeout": CONNECT_WAIT, "autoconnect": False, **parameters_of_url(url)})


class ImpatientPostgres(pw.PostgresqlDatabase):
    """PostgreSQL that is given up when it does not answer: psycopg2 would wait for ever."""

    def init(self, *values: Any, **options: Any) -> None:
        self._asked = weakref.WeakKeyDictionary()  # connection -> the monotonic time of its last statement
        self._watcher = threading.Thread()
        super().init(*values, **options)

    def cursor(self, *values: Any, **options: Any) -> Any:
        """What peewee runs its next statement with."""
        cursor = super().cursor(*values, **options)
        self._asked[cursor.connection] = time.monotonic()
        if not self._watcher.is_alive():
            self._watcher = threading.Thread(target=self._watch, name="minihub-postgres", daemon=True)
            self._watcher.start()
        return cursor

    def _watch(self):
        while connections := self._asked.keyrefs():
            for connection in filter(None, (reference() for reference in connections)):
                is_late = time.monotonic() > self._asked[connection] + ANSWER_WAIT
                if is_late and connection.info.transaction_status == 1:  # PQTRANS_ACTIVE
                    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as copy:
                        copy.shutdown(socket.SHUT_RDWR)  # to its thread it looks as if PostgreSQL had ended
            connection = None  # which must not live on for this thread
            time.sleep(0.5)


def upsert(key: pw.Field, which: Any, /, **columns: Any) -> None:
    """Give the row whose unique `key` is `which` those columns, whether it exists or not."""
    changed = [getattr(key.model, name) for name in columns]
    key.model.insert(**{key.name: which}, **columns).on_conflict(conflict_target=[key], preserve=changed).execute()


def is_over(moment: pw.Field, longest: float) -> pw.Expression:
    """The condition that a moment is over which was at most `longest` seconds ahead when it was set: it is over, too,
    if it is further ahead now, as the clock was set back since."""
    return (moment <= now()) | (moment > now() + timedelta(seconds=longest))


@contextlib.contextmanager
def waiting(seconds: float) -> Iterator[None]:
    """Wait no longer than this for another process that holds the lock of an SQLite database."""
    database = CurrentDatabase.current.get()
    execute = database.connection().execute if isinstance(database, pw.SqliteDatabase) else lambda sql: None
    execute(f"PRAGMA busy_timeout = {1000 * seconds:.0f}")
    try:
        yield
    finally:
        execute(f"PRAGMA busy_timeout = {1000 * SQLITE_WAIT:.0f}")


@contextlib.contextmanager
def best_effort() -> Iterator[None]:
    """Best-effort write: log and carry on if the database refuses it (disk full), so that reads keep working."""
    try:
        yield
    except DatabaseTrouble as error:
        log.error("could not record activity: %s", error)


########################################################################################################
# 5. Authenticators and isolation
########################################################################################################

class Authenticator:
    """How users prove who they are. Subclasses must implement `authenticate`, or `identify`, or both; they run inside
    a request, with the database open."""
    settings: Settings | None = None  # the hub sets it before the first call
    has_form = True  # whether users sign in on the hub's page; if not, only `identify` signs them in
    logout_url = ""  # where users go after signing out; "": the sign-in page

    def authenticate(self, credentials: dict[str, Any], environ: dict[str, Any]) -> str | None:
        """The name of the user with these credentials, the login form or the API's JSON object, usually with `username`
        and `password`, or None. A new name becomes a new user. `environ` is the WSGI environment."""
        return None

    def identify(self, environ: dict[str, Any]) -> str | tuple[str, dict[str, Any]] | None:
        """The name of the user whom the host site has signed in, or None. `(name, {"admin": True, "groups": ["a"]})`
        also sets whether the user is an admin and all the user's groups. A key that is left out changes nothing."""
        return None

    def normalize(self, name: str) -> str:
        """The canonical spelling of a name. Must be idempotent."""
        return normalize_name(name)


class PasswordAuthenticator(Authenticator):
    """A password for each user, chosen through a one-time link from an admin or from `minihub link NAME`."""

    def authenticate(self, credentials, environ):
        name = self.normalize(str(credentials.get("username") or ""))
        user = User.get_or_none(User.name == name) if is_valid_name(name) else None
        is_right = check_password(str(credentials.get("password") or ""), user and user.password)
        return name if is_right else None


class DummyAuthenticator(Authenticator):
    """Any name, with the one password of the class, the setting `password`."""

    def authenticate(self, credentials, environ):
        given = str(credentials.get("password") or "").encode("utf-8", "surrogateescape")
        is_right = hmac.compare_digest(given, self.settings.password.encode())
        return str(credentials.get("username") or "") if is_right else None


class RemoteUserAuthenticator(Authenticator):
    """The user whom the host site has signed in, from the WSGI variable `remote_user_variable` or from `identify`."""
    has_form = False

    def identify(self, environ):
        if self.settings.identify:
            return self.settings.identify(environ)
        name = environ.get(self.settings.remote_user_variable) or ""
        with contextlib.suppress(UnicodeError):  # PEP 3333 has bytes decoded as Latin-1, but some sites set plain text
            name = name.encode("latin-1").decode()
        return name or None


AUTHENTICATORS = {
    "password": PasswordAuthenticator, "dummy": DummyAuthenticator, "remote-user": RemoteUserAuthenticator}


JUPYTER = ("jupyterhub-singleuser", "jupyter-labhub")

#: The first thing that runs as the user: reads its variables, goes home, and becomes the server ("$@" from "$3" on).
#: The machine, when it runs out of memory, ends a server rather than the hub.
ENTER = """
eval "$(cat)" && exec </dev/null && mkdir -p -m 700 -- "$2" && cd -- "$1" || exit
shift 2
echo 500 >/proc/self/oom_score_adj
exec "$@"
"""
#: Tries it: can the home be written in, can the command's interpreter be run, who is it?
TRIAL = """
: >"$HOME/.trial" && rm "$HOME/.trial" || exit 3
"$0" -c "" || exit 4
cat /proc/self/status
"""


class Isolation:
    """What keeps a server from everything else on its machine: here nothing. Subclasses must implement `_words`, and
    `_rights`, which says why they cannot work."""
    name = "none"
    about = ("All servers run as the hub's own system user. A student with a terminal can read and change everybody's"
             " files and the hub's database, and become anybody")

    def __init__(self, settings: Settings):
        self.settings, self.notice = settings, f"isolation: {self.name}. {self.about}"

    def problem(self) -> str:
        """Why it does not work on this machine, with the remedy; "" if it does. Found out by trying."""
        if self.settings.process_limit:
            return "process_limit needs isolation uid or bubblewrap"
        return self._try(None) if self.settings.mem_limit or self.settings.open_file_limit else ""

    def check_command(self, words: list[str]) -> None:
        """Raises RuntimeError for a program whose pages would be open to all users of the machine."""
        if self.name != "none" and Path(words[0]).name not in JUPYTER and not self.settings.cmd_has_sign_in:
            raise RuntimeError(
                f"{Path(words[0]).name} may not ask visitors who they are, and every user's programs can connect to its"
                " port. If it does ask, set cmd_has_sign_in; if nobody minds, set isolation to none")

    def uid_of(self, user: User) -> int | None:
        """The user's numeric account, None if that is the hub's."""

    def free_uid(self, first: int) -> int | None:
        """The first account from `first` on that a new user can have, None if users share the hub's."""

    def login_name(self, user: User) -> str:
        """The user's name for USER and LOGNAME, which programs expect to be a short word."""
        if self.name == "none":
            return user.name
        return re.sub(r"^(?=[^a-z_])", "_", re.sub("[^a-z0-9_.-]", "_", user.name))[:32]

    def variables(self, home: Path, user: User) -> dict[str, str]:
        """More environment variables for servers that are kept apart in this way."""
        return {}

    def prepare(self, home: Path, user: User, is_at_work: bool) -> None:
        """Make the home of a user, who may have servers already. Raises OSError, RuntimeError with a sentence."""
        home.mkdir(mode=0o700, parents=True, exist_ok=True)

    def words(self, home: Path, uid: int | None, words: list[str]) -> list[str]:
        """The command line that runs such a one within the limits: ENTER's home, notebook folder and command."""
        settings, limits = self.settings, []
        for option, limit in (("data", bytes_of(settings.mem_limit)), ("nproc", settings.process_limit),
                              ("nofile", settings.open_file_limit)):
            limits += [f"--{option}={limit}"] if limit else []
        limits = [tool("prlimit"), *limits] if limits else []
        nice = [tool("nice"), "-n", str(settings.cpu_priority)] if settings.cpu_priority else []
        return [*self._words(home, uid), *nice, *limits, tool("env"), "-i", *self._signals, "/bin/sh", "-c", ENTER,
                "sh", *words]

    _signals = ()

    def _words(self, home, uid):
        return []

    def _rights(self):
        return ""

    def _try(self, uid):
        """Why a trial in a home of its own fails, "" if it does not."""
        if problem := self._rights():
            return problem
        homes, command = Path(self.settings.homes), shlex.split(self.settings.cmd)[0]
        interpreter = interpreter_of(command, self.settings.inherited_variables()["PATH"])
        home = homes / f".trial-{secrets.token_hex(4)}"
        user = User(name="trial", uid=uid)
        try:
            self.prepare(home, user, False)
            words = self.words(home, uid, [str(home), str(home), "/bin/sh", "-c", TRIAL, interpreter or "/bin/sh"])
            done = subprocess.run(words, cwd="/", input=f"export HOME={shlex.quote(str(home))}", timeout=20, text=True,
                                  capture_output=True, env=self.settings.inherited_variables(), errors="replace")
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            return self._remedy(str(error))
        finally:
            with contextlib.suppress(OSError):
                home.rmdir()
        said = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        if done.returncode == 4:
            closed = closed_folder(Path(interpreter))
            return f"the users' accounts cannot run {interpreter}: " + (
                f"{closed} is closed to them (chmod o+x, or install it elsewhere)" if closed else said)
        if done.returncode:
            closed = closed_folder(homes)
            return f"{closed} is closed to the users' accounts (chmod o+x {closed})" if closed else self._remedy(said)
        status = dict(line.split(":\t", 1) for line in done.stdout.splitlines() if ":\t" in line)
        return self._flaw(status, uid)

    def _remedy(self, said):
        return said

    def _flaw(self, status, uid):
        has_rights = any(int(status[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb"))
        if self.name != "none" and (has_rights or status["NoNewPrivs"].strip() != "1"):
            return "a trial came back with capabilities"
        return ""


class UidIsolation(Isolation):
    """Each user's servers run as a numeric account of the user's own, without an entry in /etc/passwd."""
    name = "uid"
    about = "Each user's servers run as a system account of the user's own"

    def problem(self):
        first = self.settings.first_uid
        if first < 1000 or 61184 <= first < 65536 or is_account(first):
            return f"the account {first} is in use: set first_uid to a number of which those above it are free"
        if not is_mapped(first + 1):
            return (f"this container has no account {first + 1}: set first_uid to a number that is in"
                    " /proc/self/uid_map and in /proc/self/gid_map")
        return self._try(first)

    def uid_of(self, user):
        return user.uid

    def free_uid(self, first):
        """None that a user or a group, a user's containers, a unit of systemd's or somebody's old home has."""
        taken = [range(61184, 65536), *(range(home.lstat().st_uid, home.lstat().st_uid + 1)
                                        for home in Path(self.settings.homes).glob("*"))]
        for path in ("/etc/subuid", "/etc/subgid"):
            with contextlib.suppress(OSError, ValueError):
                for _, start, count in (line.split(":") for line in Path(path).read_text().splitlines()):
                    taken.append(range(int(start), int(start) + int(count)))
        number = max(first, self.settings.first_uid + 1)
        while is_mapped(number):
            after = max((numbers.stop for numbers in taken if number in numbers), default=number)
            if after == number and not is_account(number):
                return number
            number = max(after, number + 1)
        raise RuntimeError(f"There are no more accounts for users: {number} is none in this container")

    def variables(self, home, user):
        return {"JUPYTER_RUNTIME_DIR": str(self._sockets(home, user))}

    def prepare(self, home, user, is_at_work):
        """Make the home, and the folder for kernels' sockets, whose paths may have no more than 107 bytes. A home of
        the hub's own is handed over to the user: at the first start with this isolation."""
        home.parent.mkdir(parents=True, exist_ok=True)
        home.parent.chmod(0o711)
        sockets = self._sockets(home, user)
        if len(os.fsencode(sockets)) > 55:
            raise RuntimeError(f"homes must be a path of at most 40 characters, for kernels' sockets: {home.parent}")
        sockets.parent.mkdir(mode=0o711, exist_ok=True)
        for folder in (home, sockets):
            folder.mkdir(mode=0o700, exist_ok=True)
            owner = folder.stat().st_uid
            if owner not in (user.uid, os.geteuid()):
                raise RuntimeError(f"{folder} belongs to the account {owner}, not to {user.name}'s own, {user.uid}."
                                   f" If it is {user.name}'s: chown -hR --from={owner} {user.uid}:{user.uid}")
            if owner != user.uid:
                if is_at_work:
                    raise RuntimeError("The home is to be handed over to an account of the user's own. Stop all servers"
                                       " of the user's first, for once")
                hand_over(folder, user.uid)

    def _sockets(self, home, user):
        return home.parent / ".run" / str(user.uid)  # no user's home: folder_name() makes no name hidden

    def _rights(self):
        if os.geteuid() == 0 or capabilities() >> 7 & 1:  # CAP_SETUID
            return "" if tool("setpriv") and tool("prlimit") else "setpriv is missing: install util-linux"
        return ("the hub may not do that. Run it as root, or with the capabilities of the README's systemd unit:"
                " CAP_SETUID CAP_SETGID CAP_SETPCAP CAP_CHOWN CAP_KILL")

    def _words(self, home, uid):
        return as_account(uid)

    def _remedy(self, said):
        if "Operation not permitted" in said and "setpriv" not in said and "prlimit" not in said:
            return f"{said}. If the homes are on NFS: export them with no_root_squash, or keep them on a local disk"
        return said


class BubblewrapIsolation(Isolation):
    """Servers run in sandboxes of bubblewrap's, for a hub that is an ordinary user."""
    name = "bubblewrap"
    about = "Each server runs in a sandbox: its user's home, a read-only system, nothing of the hub or of others"
    _signals = ("--default-signal=INT,TERM,HUP",)
    system = tuple(
        "/usr /bin /sbin /lib /lib32 /lib64 /libx32 /etc /opt /sys/devices/system /run/systemd/resolve".split())

    def __init__(self, settings):
        super().__init__(settings)
        database = os.path.abspath(settings.database.removeprefix("sqlite:///").partition("?")[0])
        self._hidden = [Path(settings.homes), Path(settings.run_dir), Path.cwd(), Path(database).parent]

    def problem(self):
        return self._try(None)

    def variables(self, home, user):
        return {"JUPYTER_RUNTIME_DIR": "/tmp/jupyter"}  # in the sandbox, and short: a socket's path has 107 bytes

    def _rights(self):
        if os.geteuid() == 0:
            return "the hub must be an ordinary user for that, not root"
        return "" if tool("bwrap") else "bubblewrap is missing: apt-get install bubblewrap"

    def _words(self, home, uid):
        """Folders in others come later: a tmpfs hides the hub's, and the environment and the home may be in that."""
        settings, command = self.settings, shlex.split(self.settings.cmd)[0]
        seen = {Path(path): ("--ro-bind-try", path, path) for path in self.system}
        program = shutil.which(command, path=settings.inherited_variables()["PATH"]) or command
        for folder in self._hidden:
            if any(folder.is_relative_to(path) for path in self.system):
                seen[folder] = ("--tmpfs", str(folder))
        for folder in (sys.prefix, sys.base_prefix, Path(program).parent.parent, Path(program).resolve().parent.parent):
            seen[Path(folder)] = ("--ro-bind-try", str(folder), str(folder))
        mounts = [word for _, words in sorted(seen.items(), key=lambda item: len(item[0].parts)) for word in words]
        ignore = ["/bin/sh", "-c", "trap '' INT TERM HUP; exec \"$@\"", "sh"]  # they are for the server
        return [*ignore, tool("bwrap"), "--die-with-parent", "--unshare-user", "--unshare-pid", "--unshare-ipc",
                "--unshare-uts", "--unshare-cgroup-try", "--tmpfs", "/tmp", *mounts, "--bind", str(home), str(home),
                "--dev", "/dev", "--proc", "/proc"]

    def _remedy(self, said):
        remedies = {
            "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": (
                "1", "AppArmor forbids it, as in Ubuntu 24.04. Give /usr/bin/bwrap an AppArmor profile with `userns,`,"
                " or: sysctl kernel.apparmor_restrict_unprivileged_userns=0"),
            "/proc/sys/kernel/unprivileged_userns_clone": ("0", "Allow it: sysctl kernel.unprivileged_userns_clone=1"),
            "/proc/sys/user/max_user_namespaces": ("0", "Allow it: sysctl user.max_user_namespaces=15000")}
        for path, (value, remedy) in remedies.items():
            with contextlib.suppress(OSError):
                if Path(path).read_text().strip() == value:
                    return f"{said}. {remedy}"
        return f"{said}. In Docker: --security-opt seccomp=unconfined --security-opt systempaths=unconfined"


ISOLATIONS = {kind.name: kind for kind in (UidIsolation, BubblewrapIsolation, Isolation)}


def choose_isolation(settings: Settings) -> Isolation:
    """The isolation of the settings, or the best that works here. Raises SettingError."""
    reasons = []
    for name in ISOLATIONS if settings.isolation == "auto" else [settings.isolation]:
        isolation = ISOLATIONS[name](settings)
        problem = isolation.problem()
        if not problem:
            isolation.notice += "".join(f". {reason}" for reason in reasons if name == "none")
            return isolation
        reasons.append(f"{name} is not possible: {problem}")
    raise SettingError("isolation", f"must be possible on this machine. {'. '.join(reasons)}", settings.isolation)


def as_account(uid: int) -> list[str]:
    """The words that give up all rights, become that account, and run what follows."""
    return [tool("setpriv"), f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--inh-caps=-all",
            "--ambient-caps=-all", "--bounding-set=-all", "--no-new-privs"]


def as_system_user(name: str) -> list[str]:
    """The words that become a user of the system, with its groups, and run what follows. Raises KeyError if there is
    none, OSError if the hub may not do that."""
    user = pwd.getpwnam(name)
    if user.pw_uid == os.geteuid():
        return []
    if os.geteuid() and not capabilities() >> 7 & 1:  # CAP_SETUID
        raise PermissionError(f"the hub may not run programs as {name}")
    return [tool("setpriv"), f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--init-groups", "--inh-caps=-all",
            "--ambient-caps=-all"]


def hand_over(home: Path, uid: int) -> None:
    """Give an account a home of the hub's own, and last the home itself, so that it can be done again. Links are not
    followed, other filesystems not entered, and a file that has a second name, maybe in another place, not given."""
    home = home.resolve()
    device, given, kept = home.stat().st_dev, 0, 0
    for _, names, files, folder in os.fwalk(home, topdown=False):
        for name in names + files:
            entry = os.stat(name, dir_fd=folder, follow_symlinks=False)
            is_only_here = entry.st_dev == device and (entry.st_nlink == 1 or stat.S_ISDIR(entry.st_mode))
            if is_only_here and entry.st_uid == os.geteuid():
                os.chown(name, uid, uid, dir_fd=folder, follow_symlinks=False)
                given += 1
            kept += not is_only_here
    os.chown(home, uid, uid)
    if given or kept:
        log.info("%s: %s files are now the account %s's, %s with other names are not", home, given, uid, kept)


def is_account(number: int) -> bool:
    """Whether a user or a group of the system has that number."""
    for find in (pwd.getpwuid, grp.getgrgid):
        with contextlib.suppress(KeyError):
            return bool(find(number))
    return False


def is_mapped(number: int) -> bool:
    """Whether a user namespace that this process is in has that account."""
    lines = [Path(f"/proc/self/{kind}_map").read_text().splitlines() for kind in ("uid", "gid")]
    return all(any(int(first) <= number < int(first) + int(count) for first, _, count in map(str.split, part))
               for part in lines)


def capabilities() -> int:
    """This process's effective capabilities."""
    return int(re.search(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())[1], 16)


@functools.cache
def tool(name: str) -> str:
    """The path of a program of the system's, "" if it is missing. Not looked for on a PATH of a server's."""
    return shutil.which(name, path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin") or ""


def interpreter_of(command: str, path: str) -> str:
    """The program that runs a command: itself, or what the first line of a script names. "" if it is not found."""
    found = shutil.which(command, path=path) or ""
    with contextlib.suppress(OSError):
        with open(found, "rb") as file:
            first = file.readline(512)
        words = first[2:].decode("utf-8", "replace").split() if first.startswith(b"#!") else [""]
        return shutil.which(words[-1], path=path) or "" if Path(words[0]).name == "env" else words[0]
    return ""


def closed_folder(path: Path) -> Path | None:
    """The first folder on the way to a path that others may not pass."""
    ways = [path, path.resolve()]
    return next((folder for way in ways for folder in reversed(way.parents)
                 if folder.exists() and not folder.stat().st_mode & stat.S_IXOTH), None)


########################################################################################################
# 6. Spawners
########################################################################################################

@dataclass(frozen=True)
class Launch:
    """One start of a server, as a spawner gets it."""
    id: str                     # unique for each start of each server
    user: User                  # .name, .admin, .folder
    name: str                   # the server's, "" for the default one
    user_options: Any           # the JSON body of the start request, or None
    prefix: str                 # the path it must serve under, /user/ada/
    port: int                   # a free port of this machine, for a server that listens here
    variables: dict[str, str]   # JUPYTERHUB_*: environment variables that it needs to work with this hub


class Spawner:
    """How servers run. Subclasses must implement `start`, `poll` and `stop`.

    The only memory between calls is `state`, a JSON dict of the spawner's choosing with at least `target`, the
    http://host:port where the server will answer: any worker must be able to poll or stop a server that another one has
    started. An exception makes the start fail with its text."""
    settings: Settings | None = None  # the hub sets it before the first call
    notice = ""  # what admins should know of how it works here, said at the hub's start and on their pages

    def check(self) -> None:
        """Called once, when the hub starts. Raises SettingError if this spawner cannot work here."""

    def free_uid(self, first: int) -> int | None:
        """The first numeric account from `first` on that a user can have, None if users need none."""
        return None

    def start(self, server: Launch) -> dict[str, Any]:
        """Start the server, without waiting until it answers, and return its state."""
        raise NotImplementedError

    def find(self, server: Launch) -> dict[str, Any] | None:
        """The state of a server whose worker was killed during `start` of the same launch, or None."""
        return None

    def poll(self, state: dict[str, Any]) -> int | None:
        """None while the server runs, else its exit status (negative: the signal that ended it)."""
        raise NotImplementedError

    def stop(self, state: dict[str, Any], now: bool = False) -> dict[str, Any]:
        """Ask the server to end, or with `now` kill it, and return the new state, without waiting for the end. Called
        again every other second until `poll` says that the server has ended, so that it can escalate."""
        raise NotImplementedError

    def log_tail(self, state: dict[str, Any]) -> str:
        """The last lines of the server's log, shown to users when it fails."""
        return ""

    def forget_user(self, user: User) -> None:
        """Called when a user is deleted and all their servers have ended; may be called again. Nothing of theirs may be
        left for a new user of the same name."""


MARK = "MINIHUB_SERVER"  # the variable by which a process is recognised whose supervisor has been killed


class SubprocessSpawner(Spawner):
    """Servers as processes of this machine, kept apart as `isolation` says, which outlive the hub. Linux only."""
    #: Seconds after the stop, and the signal. 9 is SIGKILL, a name that Windows lacks.
    ladder = ((0, signal.SIGINT), (5, signal.SIGTERM), (10, 9))

    def check(self):
        demand(sys.platform == "linux", "spawner", "must be one of your own on systems other than Linux", sys.platform)
        self.notice = self.isolation.notice
        log.log(logging.WARNING if self.isolation.name == "none" else logging.INFO, "%s", self.notice)

    def free_uid(self, first):
        return self.isolation.free_uid(first)

    @functools.cached_property
    def isolation(self) -> Isolation:
        """How servers are kept apart. Raises SettingError if that cannot be done as the settings say."""
        return choose_isolation(self.settings)

    def command(self, server: Launch) -> list[str]:
        """The command line, split into words."""
        words = [self._fill(word, server) for word in shlex.split(self.settings.cmd)]
        if "{port}" not in self.settings.cmd:
            words.append(f"--port={server.port}")  # jupyterhub-singleuser 1.x reads no variable for it
        if Path(words[0]).name in ("jupyterhub-singleuser", "jupyter-labhub"):
            if os.geteuid() == 0 and self.isolation.name == "none":
                words.append("--allow-root")
            if self.settings.notebook_dir:  # 1.x reads no variable for this either
                words.append(f"--notebook-dir={self._notebook_dir(server)}")
            if self.settings.default_url:  # nor for this
                words.append(f"--SingleUserNotebookApp.default_url={self.settings.default_url}")
            if self.isolation.name != "none":  # every user of the machine can connect to a TCP port of a kernel's
                words.append("--KernelManager.transport=ipc")
        return words

    def environment(self, server: Launch) -> dict[str, str]:
        """All environment variables of the server."""
        login = self.isolation.login_name(server.user)
        variables = {**self.settings.inherited_variables(), **server.variables,
                     "HOME": str(self.home(server)), "USER": login, "LOGNAME": login,
                     "JUPYTERHUB_SERVICE_URL": f"http://127.0.0.1:{server.port}{server.prefix}"}
        if self.settings.notebook_dir:
            variables["JUPYTERHUB_ROOT_DIR"] = str(self._notebook_dir(server))
        if self.settings.default_url:
            variables["JUPYTERHUB_DEFAULT_URL"] = self.settings.default_url
        return variables

    def home(self, server: Launch) -> Path:
        """The user's home, which only the hub's system user can read."""
        return Path(self.settings.homes) / server.user.folder

    def start(self, server):
        words, home, run = self.command(server), self.home(server), self._run_file(server)
        self.isolation.check_command(words)
        self.isolation.prepare(home, server.user, has_supervisor(run.parent))
        variables = {**self.environment(server), **self.isolation.variables(home, server.user), MARK: run.name}
        words = self.isolation.words(home, server.user.uid, [str(home), str(self._notebook_dir(server)), *words])
        target = f"http://127.0.0.1:{server.port}"
        beat = heartbeat_of(self.settings) if self.settings.stop_with_hub else None
        with open(os.memfd_create("variables"), "w+b") as file:  # neither on a command line nor in the supervisor
            file.write(os.fsencode("\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items()
                                             if re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name))))
            file.seek(0)
            options = {"stdin": file, "cwd": "/", "env": self.settings.inherited_variables()}
            state = start_process(run, words, target, beat, self.isolation.uid_of(server.user), **options)
        return {**state, "target": target}

    def find(self, server):
        state, target = find_process(self._run_file(server))
        return state and {**state, "target": target, "uid": self.isolation.uid_of(server.user)}

    def poll(self, state):
        return poll_process(state)

    def stop(self, state, now=False):
        return stop_process(state, self.ladder, now)

    def log_tail(self, state):
        with open(log_of(Path(state["run"])), "rb") as log_file:
            log_file.seek(-min(8192, os.fstat(log_file.fileno()).st_size), os.SEEK_END)
            return "\n".join(log_file.read().decode("utf-8", "replace").splitlines()[-30:])

    def forget_user(self, user):
        """Rename the user's home, so that no new user of that name inherits it. Deletes nothing. Raises OSError."""
        home = Path(self.settings.homes) / user.folder
        with contextlib.suppress(FileNotFoundError):  # the user never had a server, or the home is renamed already
            # folder_name() escapes "#": no user can be called like this.
            aside = home.rename(f"{home}#deleted-{now():%Y%m%d}-{secrets.token_hex(2)}")
            log.info("home of the deleted user %s renamed to %s", user.name, aside)

    def _run_file(self, server):
        file_name = f"server-{server.name}@{server.id}" if server.name else f"server@{server.id}"
        return Path(self.settings.run_dir) / server.user.folder / file_name

    def _notebook_dir(self, server):
        folder = re.sub(r"^~(/|$)", "", self.settings.notebook_dir)  # the user's home, not the hub's
        return self.home(server) / self._fill(folder, server)

    def _fill(self, text, server):
        """`text` with its placeholders filled in; not str.format, because commands may hold other braces."""
        for name, value in (("port", server.port), ("username", server.user.name), ("prefix", server.prefix)):
            text = text.replace(f"{{{name}}}", str(value))
        return text


SPAWNERS = {"subprocess": SubprocessSpawner}

#: Runs before the supervisor: orphans become its children (PR_SET_CHILD_SUBREAPER); 4 to 3 is a pipe for the log.
PREPARE = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
for fd, end in zip((13, 14), os.pipe()):
    os.dup2(end, fd)
    os.close(end)
for fd in (3, 4):
    os.dup2(fd + 10, fd)
    os.close(fd + 10)
os.execv("/bin/sh", sys.argv[1:])
"""

#: Supervises a command ("$@"): keeps its log, which the command has no file of, and when it ends kills what it has left
#: running and writes its exit status to disk for any worker to read. `set -C` makes the first of two starts of one
#: launch win. The traps keep the shell alive over the signals meant for the command; a trapped signal, unlike an
#: ignored one, is back at its default in the command.
#: If there is a heartbeat file ("$2"), everything ends when twelve looks have not seen it touched (its age would be
#: misleading after the machine has slept), or when there is a file .stop.
SUPERVISE = """
set -C; echo "$$ $1" >"$0.pid" || exit 125
beat=$2; python=$3; finish=$4; account=$5; shift 5
(trap '' INT TERM HUP XFSZ; ulimit -f 65536; until cat >&2; do sleep 1; done) <&3 3<&- 4>&- >/dev/null &
logger=$!
trap : INT TERM HUP
if [ -n "$beat" ]; then (
    trap '' INT TERM HUP
    seen= same=0
    while [ $same -lt 12 ] && [ ! -e "$0.stop" ]; do
        sleep 5
        now=$(stat -c %y "$beat" 2>/dev/null)
        [ "$now" = "$seen" ] && same=$((same + 1)) || same=0
        seen=$now
    done
    rm -f "$0.stop"; kill -TERM 0; sleep 10; exec "$python" -I -S -c "$finish" $$ $logger "$account"
) 3<&- 4>&- & fi
"$@" >&4 2>&4 3<&- 4>&-
status=$?
trap '' INT TERM HUP
exec "$python" -I -S -c "$finish" $$ $logger "$account" "$0.exit" $status 3<&- 4>&-
"""


def end_descendants(root: int, account: list[str], spared: tuple[int, ...] = ()) -> None:
    """Kill all processes below one. They are stopped first, so that none can fork while it is being looked for: one by
    one, or, with the words that run a command as their `account`, in one moment with all others of that account."""
    def signal_account(name):
        if account:
            subprocess.run([*account, "/bin/sh", "-c", f"kill -{name} -1"], stderr=subprocess.DEVNULL)

    stopped, deadline = set(), time.monotonic() + 10
    while time.monotonic() < deadline:
        signal_account("STOP")
        parents, below, more = {}, set(), {root}
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{name}/stat") as file:
                    state, parent, *_ = file.read().rpartition(")")[2].split()
            except (OSError, ValueError):
                continue
            if state not in "ZX" and int(name) not in spared:
                parents[int(name)] = int(parent)
        while more:
            more = {pid for pid, parent in parents.items() if parent in more}
            below |= more
        if not below:
            break
        fresh = set() if account else below - stopped
        for pid in fresh or below:
            try:
                os.kill(pid, signal.SIGSTOP if fresh else signal.SIGKILL)
            except OSError:
                pass
        stopped = below if fresh else set()
    signal_account("CONT")


#: The last thing that a supervisor does, or its guard of the heartbeat.
FINISH = f"""
import os, signal, subprocess, sys, time
{inspect.getsource(end_descendants)}
root, logger, account, *rest = sys.argv[1:]
end_descendants(int(root), account.split(), (int(logger), os.getpid()))
if rest:
    try:
        os.waitpid(int(logger), 0)
    except OSError:
        pass
    with open(rest[0], "w") as file:
        file.write(rest[1])
"""


def start_process(run: Path, words: Iterable[str], note: str, beat: Path | None = None, uid: int | None = None,
                  **popen: Any) -> dict[str, Any]:
    """Run a command in a session of its own, and return the state by which any worker can find it. Raises OSError.

    `run` is the path, without a suffix, of the files about it: .pid (with the `note` in it) and .exit. Its log is at
    the same path up to the @. With a `beat` it ends soon after that file is no longer touched. `uid` is the account
    that the command changes to, if it does.
    """
    if sys.platform != "linux":
        raise OSError(f"processes can be supervised on Linux only, not on {sys.platform}")
    log_file = log_of(run)
    run.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in run.parent.glob(log_file.name.removesuffix(".log") + "@*.[ep]*"):  # of earlier starts
        name.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        log_file.replace(log_file.with_suffix(".log.old"))
    if beat:
        beat.touch()
    python = sys.executable if "python" in Path(sys.executable or "").name else f"{sys.prefix}/bin/python3"
    words = [python, "-I", "-S", "-c", PREPARE, "/bin/sh", "-c", SUPERVISE, str(run), note, str(beat or ""), python,
             FINISH, " ".join(as_account(uid) if uid else ()), *words]
    mask = signal.pthread_sigmask(signal.SIG_SETMASK, ())  # inherited by the process, and uWSGI blocks all signals
    try:
        with open(os.open(log_file, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600), "wb") as output:
            process = subprocess.Popen(words, **{"stdin": subprocess.DEVNULL, **popen}, stdout=output, stderr=output,
                                       start_new_session=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    identity = process_identity(process.pid)  # before it is waited for: after that its id can be reused
    # The kernel keeps a zombie until somebody waits for it.
    threading.Thread(target=process.wait, name=f"minihub-wait-{process.pid}", daemon=True).start()
    return {"pid": process.pid, "identity": identity, "run": str(run), "uid": uid}


def find_process(run: Path) -> tuple[dict[str, Any] | None, str]:
    """The state of the process that was started as `run`, if it still runs, and the note that it was started with."""
    try:
        number, note = Path(f"{run}.pid").read_text().split()
        words = Path(f"/proc/{int(number)}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None, ""
    if os.fsencode(run) not in words:  # the process id has been reused: the supervisor's words name this launch
        return None, ""
    return {"pid": int(number), "identity": process_identity(int(number)), "run": str(run)}, note


def heartbeat_of(settings: Settings) -> Path:
    """The file that every worker touches, if it is there, to tell processes that the hub is still running."""
    return Path(settings.run_dir) / "heartbeat"


def has_supervisor(folder: Path) -> bool:
    """Whether one of the processes runs whose files are in that folder."""
    return any(find_process(path.with_suffix(""))[0] for path in folder.glob("*.pid"))


def poll_process(state: dict[str, Any]) -> int | None:
    """None while it runs, else the exit status that its supervisor has written; -9 if that was killed itself."""
    if state["identity"] is not None and process_identity(state["pid"]) == state["identity"]:  # no other with its id
        return None
    try:
        status = int(Path(f"{state['run']}.exit").read_text())
    except (OSError, ValueError):
        _end_unsupervised(Path(state["run"]), state.get("uid"))
        return -9
    return 128 - status if status > 128 else status  # a shell adds 128 to the signal that ended a command


#: Kills what has the variable "$0" in its environment.
END_MARKED = """
for round in 1 2; do
    grep -lzsxFe "$0" /proc/[0-9]*/environ | while IFS=/ read -r _ _ pid _; do kill -KILL "$pid"; done
done
"""


def _end_unsupervised(run, uid):
    """Kill what a supervisor that was killed has left running: under an account of the user's own everything, unless
    another server of the user's runs."""
    is_alone = uid and not has_supervisor(run.parent)
    words = ["/bin/sh", "-c", "kill -KILL -1" if is_alone else END_MARKED, f"{MARK}={run.name}"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run([*(as_account(uid) if uid else ()), *words], timeout=20, capture_output=True)


def stop_process(state: dict[str, Any], ladder: tuple, now: bool = False) -> dict[str, Any]:
    """Send the process group the signal of the ladder that is due, once (with `now` the last one is); return the new
    state. `ladder` holds pairs of seconds since the first call and a signal. Signal 9 is also for what has left the
    process group, and first of all for the supervisor, which else might be about to start the command."""
    asked = min(state.get("asked_to_stop", math.inf), time.monotonic())  # since the boot, for all processes alike
    sent = state.get("signals_sent", 0)
    due = len(ladder) if now else sum(time.monotonic() >= asked + after for after, _ in ladder)
    if due > sent and poll_process(state) is None:
        number = ladder[due - 1][1]
        with contextlib.suppress(ProcessLookupError):
            if number == 9:
                os.kill(state["pid"], signal.SIGSTOP)
                end_descendants(state["pid"], as_account(state["uid"]) if state.get("uid") else [])
                with contextlib.suppress(OSError):
                    Path(f"{state['run']}.exit").write_text("137")
            os.killpg(state["pid"], number)
    return {**state, "asked_to_stop": asked, "signals_sent": max(due, sent)}


def log_of(run: Path) -> Path:
    """The path of its log."""
    return run.with_name(run.name.rpartition("@")[0] + ".log")


def process_identity(pid: int) -> str | None:
    """Start time and boot id, which tell a process from a later one with the same id. None if it has ended."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if after_name[0] in "ZX" else f"{boot}:{after_name[19]}"  # proc(5): fields 3 and 22


def free_port() -> int:
    """A TCP port of this machine on which nothing listens at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


########################################################################################################
# 7. HTTP/1.1, and carrying connections
########################################################################################################

# As far as CarrierClient this section needs the standard library only, and is also the program of the carrier.

TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2: the characters of a header's name
LINE_BREAKS = re.compile(r"[\r\n\0]")               # RFC 9110, 5.5: forbidden in a header's value
HEAD_LIMIT = 64 * 1024  # bytes of a response's head, interim responses included; tornado's own limit
INTERIM_LIMIT = 10      # interim responses (1xx) before the final one
CHUNK = 64 * 1024       # bytes moved at a time, so also the bytes that a connection holds in memory
FILES_ENOUGH = 65536    # open files and sockets, for a process that could have even more
CONNECT_TIMEOUT = 10    # seconds for a server on this machine to accept a connection
SPOOL_TIMEOUT = 60      # seconds for a server to read another CHUNK of a spooled body
OWNER_LIMIT = 1000      # connections to the servers of one user, or to one service
OWNER_SHARE = 1 / 4     # the same, as a share of all the connections that the process can carry
OWNER_SPOOL = 2 ** 31   # bytes of spooled bodies that they have not read yet
ADDRESS_SHARE = 3 / 4   # of these and of all, for one client address, which may be a whole class's
FILES_SHARE = 4 / 5     # of the open files that a process may have, for connections
MESSAGE_LIMIT = 128 * 1024  # bytes in which an exchange is handed over, below Linux' limit for one packet
UNUSED_AFTER = 15       # seconds without a connection and without a worker after which a carrier ends
CARRIER_TIMEOUT = 3     # seconds for the carrier to start, and to take an exchange
CARRIER_PAUSE = 10      # seconds until another try after the carrier could not be reached

#: Hop-by-hop headers (RFC 9110, 7.6.1), which are not passed on.
HOP_BY_HOP = frozenset("connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer"
                       " transfer-encoding upgrade".split())

#: The first three make a web server in front of the hub send a file of its own. The others hold for the whole origin,
#: and some outlast the visit: a service worker for / would stand between people and the hub's pages from then on.
OVERREACHING = frozenset("x-accel-redirect x-sendfile x-lighttpd-send-file service-worker-allowed clear-site-data"
                         " strict-transport-security alt-svc nel report-to".split())

LOGIN_COOKIE = "jupyterhub-hub-login"
SERVICES_COOKIE = "jupyterhub-services"
SESSION_COOKIE = "jupyterhub-session-id"  # in plain text, on every path: single-user servers key their caches by it
HUB_COOKIES = frozenset((LOGIN_COOKIE, SERVICES_COOKIE))  # which no user's server may see or set


@dataclass(frozen=True)
class ResponseHead:
    """A response's status and headers, as its server sent them. Raises ValueError if malformed or ambiguous."""

    status: int
    reason: str
    headers: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, raw: bytes) -> ResponseHead:
        """The head in `raw`, which ends before the blank line. Raises ValueError."""
        status_line, *lines = raw.decode("latin-1").split("\r\n")
        match = re.fullmatch(r"HTTP/1\.[0-9] ([1-9][0-9][0-9])(?: (.*))?", status_line)
        if match is None:
            raise ValueError(f"malformed status line: {status_line[:100]!r}")
        headers = tuple((name, value.strip(" \t")) for name, _, value in (line.partition(":") for line in lines))
        return cls(int(match[1]), (match[2] or "").strip(" \t"), headers)

    def __post_init__(self):
        encoded_head(self.reason, list(self.headers))  # raises ValueError for malformed ones
        lengths = {value for name, value in self.headers if name.lower() == "content-length"}
        if len(lengths) > 1 or not all(re.fullmatch(r"[0-9]{1,18}", length) for length in lengths):
            raise ValueError("malformed or conflicting Content-Length")

    def get(self, name: str) -> str:
        """The first header of that name (in lower case), or ''."""
        return next((value for key, value in self.headers if key.lower() == name), "")

    def passed_on(self) -> list[tuple[str, str]]:
        """The headers that the client gets."""
        dropped = HOP_BY_HOP | OVERREACHING | {name.strip().lower() for name in self.get("connection").split(",")}
        if self.get("transfer-encoding"):
            dropped |= {"content-length"}  # RFC 9112, 6.3: it is overridden, and must not be passed on
        return [(name, value) for name, value in self.headers
                if name.lower() not in dropped and not (name.lower() == "set-cookie" and is_hub_cookie(value))]

    def encode(self) -> bytes:
        """The head as the client gets it. It closes the connection: the next request may be for another server."""
        headers = self.passed_on()
        if self.get("transfer-encoding"):
            headers.append(("Transfer-Encoding", self.get("transfer-encoding")))
        upgrade = [("Connection", "Upgrade"), ("Upgrade", self.get("upgrade"))]
        headers += upgrade if self.status == 101 else [("Connection", "close")]
        return encoded_head(f"HTTP/1.1 {self.status} {self.reason}", headers)

    def body_length(self, method: str) -> int | None:
        """The body's length in bytes, None if it ends with its last chunk or with the connection."""
        if method == "HEAD" or self.status in (204, 304):
            return 0
        if self.status == 101 or self.get("transfer-encoding") or not self.get("content-length"):
            return None
        return int(self.get("content-length"))


def is_hub_cookie(text: str) -> bool:
    """Whether a Set-Cookie header sets a cookie of the hub's; a browser sends `=name=value` back as `name=value`."""
    return text.lstrip("= \t").partition(";")[0].partition("=")[0].strip() in HUB_COOKIES


def plain_response(status: str, content_type: str, body: str | None, headers: Iterable[tuple[str, str]] = ()) -> bytes:
    """A response for a connection that has been taken over, which its end ends; `body` may be None, to follow later."""
    fixed = [("Content-Type", f"{content_type}; charset=utf-8"), ("X-JupyterHub-Version", API_VERSION)]
    return encoded_head(f"HTTP/1.1 {status}", [*fixed, *headers, ("Connection", "close")]) + (body or "").encode()


def encoded_head(first_line: str, headers: list[tuple[str, str]]) -> bytes:
    """The head of a request or a response, with the blank line at its end. Raises ValueError for malformed headers."""
    lines = [first_line, *(f"{name}: {value}" for name, value in headers)]
    if any(map(LINE_BREAKS.search, lines)) or not all(TOKEN.fullmatch(name) for name, _ in headers):
        raise ValueError("A header contains a line break, or its name a character that no name may have")
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")


def host_and_port(target: str) -> tuple[str, int]:
    """The socket address of http://host:port. Raises ValueError."""
    parts = urlsplit(target)
    return parts.hostname or "", parts.port or 80


def socket_for(address: tuple[str, int]) -> socket.socket:
    """A new, non-blocking TCP socket to be connected to the address. Raises OSError."""
    connection = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    connection.setblocking(False)
    return connection


def probe(addresses: Iterable[tuple[str, str]], seconds: float) -> set[tuple[str, str]]:
    """The (target, prefix) pairs whose server answers with a status below 500. All share one deadline."""
    deadline = time.monotonic() + seconds
    answered = set()
    with contextlib.ExitStack() as opened, selectors.DefaultSelector() as selector:
        for target, prefix in set(addresses):
            with contextlib.suppress(OSError, ValueError):
                address = host_and_port(target)
                connection = opened.enter_context(socket_for(address))
                connection.connect_ex(address)  # it goes on connecting
                selector.register(connection, selectors.EVENT_WRITE, (target, prefix))
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                selector.unregister(key.fileobj)
                with contextlib.suppress(OSError):
                    if key.events == selectors.EVENT_WRITE:
                        key.fileobj.send(f"GET {key.data[1]}api HTTP/1.0\r\n\r\n".encode())
                        selector.register(key.fileobj, selectors.EVENT_READ, key.data)
                    elif re.match(rb"HTTP/1\.[01] [1-4]", key.fileobj.recv(64)):
                        answered.add(key.data)
    return answered


class Splicer:
    """Carries connections in an asyncio loop: here, in a thread of the process that has taken them over."""

    def __init__(self):
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._owner = 0  # the process it runs in: threads do not survive a fork
        self._ending = asyncio.Event()
        self._tasks: dict[asyncio.Task, Connection] = {}
        self._held = Counter()  # how much of each share is taken

    @property
    def is_full(self) -> bool:
        """Whether another connection, of two sockets, would take files that the process needs for other things."""
        return len(self._tasks) >= most_connections()

    def carry(self, connection: Connection) -> None:
        """Serve the connection to its end, without waiting for that."""
        with self._lock:
            if self._thread is None or self._owner != os.getpid():
                self._start_thread()
            self._loop.call_soon_threadsafe(self._begin, connection)

    def close(self) -> None:
        """End all connections and the thread. The next connection starts another."""
        with self._lock:
            if self._thread and self._owner == os.getpid():
                self._loop.call_soon_threadsafe(self._ending.set)
                self._thread.join()
            self._thread = None

    def _start_thread(self):
        raise_file_limit()
        self._loop, self._ending, self._tasks, self._held = asyncio.new_event_loop(), asyncio.Event(), {}, Counter()
        self._thread = threading.Thread(target=self._run, args=(self._loop,), name="minihub-splicer", daemon=True)
        self._owner = os.getpid()
        self._thread.start()

    def _run(self, loop):
        loop.run_until_complete(self._supervise())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()

    def _begin(self, connection):
        # The kernel gives a new file the lowest free number: at least so many are open.
        is_full = self.is_full or connection.client.fileno() >= 2 * most_connections()
        if is_full or any(self._held[key] + amount > limit for key, amount, limit in connection.shares):
            return connection.turn_away()
        for key, amount, _ in connection.shares:
            self._held[key] += amount
        task = asyncio.get_running_loop().create_task(connection.run())
        self._tasks[task] = connection  # asyncio itself holds tasks weakly
        task.add_done_callback(self._forget)

    def _forget(self, task):
        for key, amount, _ in self._tasks.pop(task).shares:
            self._held[key] -= amount
            if not self._held[key]:
                del self._held[key]

    async def _supervise(self):
        """Close idle connections from time to time, and all at the end."""
        while not self._ending.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._ending.wait(), 1)
            for task, connection in self._tasks.items():
                if self._ending.is_set() or 0 < connection.idle_timeout < time.monotonic() - connection.last_byte:
                    task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Carrier(Splicer):
    """Carries connections in a process of its own, to which the hub's workers hand them over a unix socket. It outlives
    the workers and the hub, and ends by itself soon after the last of its workers and connections."""

    def __init__(self, listener: socket.socket):
        super().__init__()
        self._listener = listener
        self._workers: set[socket.socket] = set()

    async def serve(self) -> None:
        """Carry until nobody has needed it for UNUSED_AFTER seconds."""
        raise_file_limit()
        self._listener.setblocking(False)
        asyncio.get_running_loop().add_reader(self._listener, self._accept)
        supervision = asyncio.ensure_future(self._supervise())
        last_needed = time.monotonic()
        while time.monotonic() - last_needed < UNUSED_AFTER:
            await asyncio.sleep(1)
            if self._workers or self._tasks:
                last_needed = time.monotonic()
        self._listener.close()  # a worker that waits there starts another carrier
        self._ending.set()
        await supervision

    def _accept(self):
        with contextlib.suppress(OSError):  # it has gone meanwhile
            worker, _ = self._listener.accept()
            if not is_own_process(worker):
                return worker.close()
            worker.setblocking(False)
            worker.send(b"ready")
            self._workers.add(worker)
            asyncio.get_running_loop().add_reader(worker, self._receive, worker)

    def _receive(self, worker):
        """Begin one exchange, and leave those that wait for another turn."""
        numbers = []
        with contextlib.suppress(OSError):
            message, numbers, *_ = socket.recv_fds(worker, MESSAGE_LIMIT, 2)
        if not numbers:  # it has ended
            asyncio.get_running_loop().remove_reader(worker)
            self._workers.remove(worker)
            return worker.close()
        spool = open(numbers[1], "rb", buffering=0) if numbers[1:] else None
        self._begin(Forward(socket.socket(fileno=numbers[0]), Exchange(**marshal.loads(message), spool=spool)))
        with contextlib.suppress(OSError):
            worker.send(b"ready")


def be_carrier(number: str) -> None:
    """The carrier's program. `number` is the file descriptor of the socket that it listens on."""
    logging.basicConfig(format="[%(asctime)s] [%(process)d] [%(levelname)s] %(message)s", level=logging.INFO)
    asyncio.run(Carrier(socket.socket(fileno=int(number))).serve())


def is_own_process(channel: socket.socket) -> bool:
    """Whether the other end of a unix socket is a process of this process's user."""
    credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[1] == os.geteuid()


def most_connections() -> float:
    """How many connections, of two sockets, this process carries at most."""
    return FILES_SHARE / 2 * (resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else FILES_ENOUGH)


def raise_file_limit() -> None:
    """Raise this process's limit of open files as far as it may: the usual 1,024 are some 400 connections."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # Windows has no such limit
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, FILES_ENOUGH)), hard))


class Connection:
    """A client's connection in the splicer's hands. Subclasses must implement `serve`."""

    idle_timeout: float = 0  # seconds of silence after which it is closed, 0 = never
    shares: tuple[tuple[str, float, float], ...] = ()  # what it takes: of which share how much, and the share's limit

    def __init__(self, client: socket.socket):
        self.client = client
        self.last_byte = time.monotonic()

    async def serve(self) -> None:
        """Do all that happens on the connection. It is closed afterwards."""
        raise NotImplementedError

    def turn_away(self) -> None:
        """Close it without serving it, because there are too many."""
        self.client.close()

    async def run(self) -> None:
        """Serve, and close whatever happens."""
        with self.client:
            try:
                self.client.setblocking(False)
                notice_dead_peer(self.client)
                await self.serve()
            except OSError as error:
                log.debug("a proxied connection ended: %s", error)

    async def send(self, sink: socket.socket, data: bytes) -> None:
        """Write it all. Waits for a slow reader, so that no more than this is held for it."""
        self.last_byte = time.monotonic()
        await asyncio.get_running_loop().sock_sendall(sink, data)

    async def receive(self, source: socket.socket, size: int = CHUNK) -> bytes:
        """The next bytes that arrive, b"" at the end."""
        if data := await asyncio.get_running_loop().sock_recv(source, size):
            await asyncio.sleep(0)  # reading is immediate while there is data: give the others their turn
        self.last_byte = time.monotonic()
        return data

    async def copy(self, source: socket.socket, sink: socket.socket, count: int | None = None) -> None:
        """Move `count` bytes, or all until the end."""
        left = float("inf") if count is None else count
        while left > 0 and (data := await self.receive(source, min(CHUNK, left))):
            await self.send(sink, data)
            left -= len(data)

    async def discard(self, source: socket.socket) -> None:
        """Read until the end. A request that follows the first on its connection is never passed on."""
        while await self.receive(source):
            continue

    def set_cut(self, is_cut: bool) -> None:
        """Have the connection end with a reset, which says that the response is not complete, even if this process is
        killed; or not."""
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", is_cut, 0))


def notice_dead_peer(connection: socket.socket) -> None:
    """Have the kernel notice within two minutes that a peer has vanished without closing the connection."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4), ("TCP_NODELAY", 1)):
        with contextlib.suppress(AttributeError, OSError):  # not every system has each, and unix sockets have none
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


@dataclass(frozen=True)
class Exchange:
    """One request for a user's server, ready to be sent."""

    target: tuple[str, int]  # host and port of the server
    method: str
    websocket: bool
    head: bytes              # the request's head as the server gets it, and the bytes of its body that have been read
    body_left: int           # how many bytes of the body are left
    spool: Any               # the file with these, or None: the client is still to send them
    unavailable: bytes       # the whole response for when the server does not answer
    crowded: bytes           # the whole response for when there are too many connections
    owner: str               # whose server it is: connections are limited for each
    address: str             # the client's, or its network: connections are limited for each
    idle_timeout: float      # seconds of silence after which the connection is closed, 0 = never


class Forward(Connection):
    """One request on its way to a user's server and its response on the way back, or a websocket both ways."""

    def __init__(self, client: socket.socket, exchange: Exchange):
        super().__init__(client)
        self.exchange: Exchange | None = exchange
        self.websocket, self.idle_timeout = exchange.websocket, exchange.idle_timeout
        limit = min(OWNER_LIMIT, OWNER_SHARE * most_connections())
        self.shares = ((f"owner {exchange.owner}", 1, limit),
                       (f"owner {exchange.owner}, address {exchange.address}", 1, ADDRESS_SHARE * limit),
                       (f"address {exchange.address}", 1, ADDRESS_SHARE * most_connections()),
                       (f"spool {exchange.owner}", exchange.body_left if exchange.spool else 0, OWNER_SPOOL))
        self.upgraded = asyncio.Event()

    async def serve(self) -> None:
        """Carry both directions at once. The end of either closes both."""
        with contextlib.ExitStack() as opened:
            opened.enter_context(self.exchange.spool or contextlib.nullcontext())
            upstream = await self._connect(opened)
            sending = asyncio.ensure_future(self._to_server(upstream))
            receiving = asyncio.current_task()
            sending.add_done_callback(lambda _: receiving.cancel())  # the client has gone
            try:
                if upstream:
                    await self._to_client(upstream)
                else:
                    await self.send(self.client, self._refusal(self.exchange.unavailable))
                self.client.shutdown(socket.SHUT_WR)
                await asyncio.wait([sending], timeout=1)  # closed over unread input, TCP drops what it has not sent
            finally:
                if sending.cancel():
                    await asyncio.wait([sending])  # it must let go of the sockets before they are closed

    async def _connect(self, opened):
        """A connection to the server, None if it does not accept any."""
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            upstream = opened.enter_context(socket_for(self.exchange.target))
            address = self.exchange.target
            if upstream.connect_ex(address) and upstream.connect_ex(address):  # on one machine it is made by now
                await asyncio.wait_for(asyncio.get_running_loop().sock_connect(upstream, address), CONNECT_TIMEOUT)
            notice_dead_peer(upstream)
            return upstream

    def turn_away(self) -> None:
        with self.client, self.exchange.spool or contextlib.nullcontext(), contextlib.suppress(OSError):
            self.client.setblocking(False)
            self.client.send(self._refusal(self.exchange.crowded))
            self.client.shutdown(socket.SHUT_WR)
            self.client.recv(CHUNK)  # see serve()

    def _refusal(self, response):
        head, end, body = response.partition(b"\r\n\r\n")
        return head + end + (b"" if self.exchange.method == "HEAD" else body)

    async def _to_server(self, upstream):
        """Returns when the client has gone."""
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has read enough, and may say why
                if upstream:
                    await self._send_request(upstream)
            if not self.websocket:
                return await self.discard(self.client)
            if early := await self.receive(self.client):  # also tells when the client goes before there is a response
                await self.upgraded.wait()
                await self.send(upstream, early)
                await self.copy(self.client, upstream)

    async def _send_request(self, upstream):
        exchange = self.exchange
        await self.send(upstream, exchange.head)
        if not exchange.spool:
            return await self.copy(self.client, upstream, exchange.body_left)
        with exchange.spool:
            while data := exchange.spool.read(CHUNK):
                await asyncio.sleep(0)  # as in receive()
                await asyncio.wait_for(self.send(upstream, data), SPOOL_TIMEOUT)

    async def _to_client(self, upstream):
        """Returns when the response is complete. Bytes behind its stated length are dropped."""
        try:
            head, rest = await self._response_head(upstream)
        except (OSError, ValueError) as error:
            log.warning("the server at %s:%s sent no valid response: %s", *self.exchange.target, error)
            return await self.send(self.client, self._refusal(self.exchange.unavailable))
        length = head.body_length(self.exchange.method)
        self.exchange = None  # many connections are idle for long, and need little memory
        rest = rest[:length]
        await self.send(self.client, head.encode() + rest)
        if head.status == 101:
            self.upgraded.set()
        elif length is None and not head.get("transfer-encoding"):
            self.set_cut(True)  # until the body's end
        left = None if length is None else length - len(rest)
        del head, rest
        await self.copy(upstream, self.client, left)
        self.set_cut(False)

    async def _response_head(self, upstream):
        """The final response's head, and the bytes that came with it. Interim responses (1xx) are skipped."""
        received, left = b"", HEAD_LIMIT
        for _ in range(INTERIM_LIMIT + 1):
            while b"\r\n\r\n" not in received:
                data = await self.receive(upstream, left) if left else b""
                if not data:
                    raise ValueError("its headers break off, or are too long")
                received += data
                left -= len(data)
            raw, _, received = received.partition(b"\r\n\r\n")
            head = ResponseHead.parse(raw)
            if head.status >= 200 or (head.status == 101 and self.websocket):
                return head, received
        raise ValueError("too many interim responses")


# The carrier does without these.

class CarrierClient:
    """This process's connection to the carrier, which it starts if none of this version answers. Where there can be no
    such process, and while it cannot be reached, `splicer` carries the connections in this one."""

    def __init__(self, settings: Settings, splicer: Splicer):
        self.settings, self.splicer = settings, splicer
        self._program = carrier_program()
        self._lock = threading.Lock()
        self._channel: socket.socket | None = None
        self._retry_at = 0.0 if sys.platform == "linux" and self._program else math.inf

    def carry(self, client: socket.socket, exchange: Exchange) -> None:
        """Carry out the exchange, without waiting for that. The client's socket is no longer the caller's."""
        with self._lock:
            is_handed_over = time.monotonic() >= self._retry_at and self._hand_over(client, exchange)
        if not is_handed_over:
            self.splicer.carry(Forward(client, exchange))

    def close(self) -> None:
        """Disconnect. What has been handed over goes on."""
        if self._channel:
            self._channel.close()
        self._channel = None

    def _hand_over(self, client, exchange):
        facts = {name: value for name, value in vars(exchange).items() if name != "spool"}
        files = [client, *filter(None, [exchange.spool])]
        message = marshal.dumps(facts)  # both ends are the same user's, and the same Python
        if len(message) > MESSAGE_LIMIT:
            return False
        was_connected = self._channel is not None
        try:
            self._channel = self._channel or self._connect()
            if not self._channel.recv(16):  # the carrier is ready when it has taken the exchange before this
                raise ConnectionResetError("it has ended")
            socket.send_fds(self._channel, [message], [file.fileno() for file in files])
        except OSError as error:
            self.close()
            if was_connected and not isinstance(error, TimeoutError):  # it has ended since the last time
                return self._hand_over(client, exchange)
            log.warning("the carrier cannot be reached, connections end with this worker: %s", error)
            self._retry_at = time.monotonic() + CARRIER_PAUSE
            return False
        for file in files:
            file.close()
        return True

    def _connect(self):
        """A channel to the carrier of this version. Raises OSError."""
        version = hashlib.sha256(f"{self._program}{sys.version}".encode()).hexdigest()[:16]
        path = Path(self.settings.run_dir) / ".carrier" / version
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # until it is closed: only one worker starts the carrier
            address = f"/proc/self/fd/{folder}/{version}"  # the path itself may be longer than 107 bytes
            with contextlib.suppress(OSError):
                return channel_to(address)
            path.unlink(missing_ok=True)  # of one that was killed, or hangs: what that has, it keeps
            self._start(address, path)
            return channel_to(address)
        finally:
            os.close(folder)

    def _start(self, address, path):
        run = Path(self.settings.run_dir) / f"carrier@{secrets.token_hex(4)}"
        with (socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
              open(os.memfd_create("minihub-carrier"), "wb") as program, contextlib.ExitStack() as opened):
            listener.bind(address)
            os.chmod(address, 0o600)
            listener.listen(128)
            program.write(self._program.encode())
            program.seek(0)
            # In a host that embeds Python, as uWSGI does, sys.executable is that host.
            python = sys.executable if "python" in Path(sys.executable).name else f"{sys.exec_prefix}/bin/python3"
            # Above those that the supervisor uses itself.
            numbers = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 20) for file in (program, listener)]
            for number in numbers:
                opened.callback(os.close, number)
            words = [python, "-I", "-S", "-c", BE_CARRIER, *map(str, numbers), str(path)]  # the path is for ps
            state = start_process(run, words, "carrier", cwd="/", pass_fds=numbers,
                                  env=self.settings.inherited_variables())
        log.info("carrier: started, pid %s", state["pid"])


#: Without ssl, for which asyncio has no use here, the process is smaller by a fifth.
BE_CARRIER = "import sys; sys.modules['ssl'] = None; exec(open(int(sys.argv[1]), 'rb').read()); be_carrier(sys.argv[2])"


def channel_to(address: str) -> socket.socket:
    """A channel to the carrier that listens there, if it is this user's and answers. Raises OSError."""
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        channel.settimeout(CARRIER_TIMEOUT)
        channel.connect(address)
        if not is_own_process(channel) or not channel.recv(16, socket.MSG_PEEK):
            raise ConnectionResetError("it is another user's, or has ended")
        return channel
    except OSError:
        channel.close()
        raise


@functools.cache
def carrier_program() -> str:
    """The carrier's program: this section as far as here, and its imports; "" if this file cannot be read."""
    source = "".join(linecache.getlines(__file__))
    sections = re.split(r"^#{104}\n# \d+\. .*\n#{104}\n", source, flags=re.MULTILINE)
    rest = re.compile(r"^# The carrier does without these\..*?(?=^try:|\Z)", re.MULTILINE | re.DOTALL)
    return "".join(rest.sub("", section) for section in (*sections[1:2], *sections[7:8]))


########################################################################################################
# 8. WSGI hosts and proxies
########################################################################################################

#: RFC 3986, 6.2.2.2: letters, digits, - and _ have one spelling, so that /h%75b is recognised as /hub.
NEEDLESSLY_ENCODED = re.compile(r"%(?:[46][1-9A-Fa-f]|[57][0-9Aa]|3[0-9]|2[Dd]|5[Ff])")
SPOOL_LIMIT = 2 ** 30  # bytes of a chunked body, which is spooled to the disk
TOO_MANY_CONNECTIONS = ("The hub has as many connections as it can carry. Close some notebooks, of this server above"
                        " all, or raise the limit of open files (ulimit -n) of the hub's process")

CLIENT_PATIENCE = 3.5     # seconds for a client to send the rest of a request, or to take some of the response
SLOWEST_UPLOAD = 100_000  # bytes a second of a chunked body, which may take longer
LONGEST_WAIT = 20         # seconds for all of it, if there is one thread: gunicorn kills a worker after 30
IDLE_TIMEOUT = 600        # seconds for which the kernel keeps a connection on which nothing has been sent
FIN_WAIT = (4, 5)         # Linux's states of a TCP connection that only this side has closed

#: Headers the proxy sets itself; client-supplied values are dropped.
REWRITTEN = frozenset("host content-length expect x-forwarded-for x-forwarded-proto x-forwarded-host x-forwarded-port"
                      " x-forwarded-prefix x-scheme x-real-ip forwarded".split())


def token_in(header: str | None) -> str | None:
    """The token in an Authorization header of either scheme that JupyterHub knows."""
    match = re.fullmatch(r"(?:token|bearer)\s+(\S+)\s*", header or "", re.IGNORECASE)
    return match and match[1]


@dataclass(frozen=True)
class Client:
    """The browser's side of a request: its address, and the scheme and host it used."""

    address: str
    scheme: str
    host: str

    @classmethod
    def of(cls, environ: dict[str, Any], trusted: Iterable[str]) -> Client:
        """The client of this request. X-Forwarded-* headers count if the peer is in one of the `trusted` networks."""
        peer = environ.get("REMOTE_ADDR", "")
        scheme, host = environ["wsgi.url_scheme"], environ.get("HTTP_HOST") or environ["SERVER_NAME"]
        networks = [_parsed_network(text) for text in trusted]
        if not networks or not _is_within(peer, networks):
            return cls(peer, scheme, host)
        chain = [part.strip() for part in environ.get("HTTP_X_FORWARDED_FOR", "").split(",") if part.strip()]
        untrusted = [address for address in chain if not _is_within(address, networks)]
        address = (untrusted or chain[:1] or [peer])[-1]
        said_scheme, said_host = (environ.get(f"HTTP_X_FORWARDED_{name}", "").rpartition(",")[2].strip()
                                  for name in ("PROTO", "HOST"))
        return cls(address if _parsed_address(address) else peer,
                   said_scheme if said_scheme in ("http", "https") else scheme, said_host or host)


def _is_within(address, networks):
    """Whether the address is in one of the networks. The peer of a unix socket has none, and is trusted."""
    parsed = _parsed_address(address)
    return not address or (parsed is not None and any(parsed in network for network in networks))


_parsed_network = functools.cache(ipaddress.ip_network)  # the settings hold a few


@functools.lru_cache(1024)  # for every request
def _parsed_address(text):
    """The text as an IP address, or None; ::ffff:127.0.0.1, as a [::] socket has it, is 127.0.0.1."""
    try:
        parsed = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(parsed, "ipv4_mapped", None) or parsed


def neighbourhood(address: str) -> str:
    """The network that a client is likely to own if it has this address: for IPv6 the /64."""
    parsed = _parsed_address(address)
    return str(ipaddress.ip_network((parsed, 64), strict=False)) if parsed and parsed.version == 6 else address


def target_below(environ: dict[str, Any], above: str) -> str:
    """The raw (percent-encoded) path after the mount point and `len(above)` more decoded characters, with the query."""
    script = environ.get("SCRIPT_NAME", "")
    path = script + environ["PATH_INFO"]
    sent = environ.get("RAW_URI") or environ.get("REQUEST_URI") or ""
    # WSGI decodes the path; most hosts keep the original as well.
    raw = NEEDLESSLY_ENCODED.sub(lambda match: unquote(match[0]), sent.partition("?")[0])
    if unquote(raw, "latin-1") != path or not re.fullmatch(r"[\x21-\x7e]+", raw):
        raw = quote(path, safe="/@~!$&'()*+,;=:", encoding="latin-1")
    below = re.sub(f"^(?:%[0-9A-Fa-f]{{2}}|.){{0,{len(script + above)}}}", "", raw)
    query = environ.get("QUERY_STRING", "")
    return f"{below}?{quote(query, safe=string.punctuation, encoding='latin-1')}" if query else below


def request_target(environ: dict[str, Any]) -> str:
    """Path and query as the client spelled them; only the mount point is in the hub's own spelling."""
    return quote(environ.get("SCRIPT_NAME", ""), safe="/@~", encoding="latin-1") + target_below(environ, "")


def is_websocket(environ: dict[str, Any]) -> bool:
    """Whether the request asks to become a websocket."""
    return ("upgrade" in environ.get("HTTP_CONNECTION", "").lower()
            and environ.get("HTTP_UPGRADE", "").lower() == "websocket")


def request_head(environ: dict[str, Any], client: Client, length: int | None, protocol: str) -> bytes:
    """The head of the request as the user's server gets it. Raises BadRequest for malformed headers."""
    dropped = HOP_BY_HOP | REWRITTEN | {name.strip().lower() for name in environ.get("HTTP_CONNECTION", "").split(",")}
    sent = {key[5:].replace("_", "-").title(): value for key, value in environ.items() if key.startswith("HTTP_")}
    headers = [("Host", client.host), *((name, value) for name, value in sent.items() if name.lower() not in dropped)]
    if environ.get("CONTENT_TYPE"):
        headers.append(("Content-Type", environ["CONTENT_TYPE"]))
    if length is not None:
        headers.append(("Content-Length", str(length)))
    headers += [("X-Forwarded-For", client.address), ("X-Forwarded-Proto", client.scheme),
                ("X-Forwarded-Host", client.host)]
    upgrade = [("Connection", "Upgrade"), ("Upgrade", "websocket")]
    headers += upgrade if is_websocket(environ) else [("Connection", "close")]
    try:
        return encoded_head(f"{environ['REQUEST_METHOD']} {request_target(environ)} {protocol}", headers)
    except ValueError as error:
        raise BadRequest(str(error)) from None


def strip_cookies(header: str, names: set[str] | frozenset[str]) -> str:
    """A Cookie header without those cookies. WSGI hosts join two such headers with a comma."""
    kept = [part for part in header.split(";")
            if names.isdisjoint(cookie.partition("=")[0].strip() for cookie in part.split(","))]
    return ";".join(kept).strip()


def content_length(environ: dict[str, Any]) -> int | None:
    """The length of the request's body, None if it has none. Raises BadRequest."""
    length = environ.get("CONTENT_LENGTH") or None
    if length and not re.fullmatch(r"[0-9]{1,18}", length):
        raise BadRequest("Content-Length is not a number")
    return length and int(length)


@functools.lru_cache(64)  # for every request
def local_address(host: str, port: int | str, scheme: str = "http") -> str:
    """http://host:port as seen from this machine, for a host that may be a name or every address."""
    address = str(_parsed_address(host) or "127.0.0.1")
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
    return f"{scheme}://[{address}]:{port}" if ":" in address else f"{scheme}://{address}:{port}"


def listening_address(from_outside: bool = False) -> str | None:
    """http://host:port where this machine, or others, reach the first TCP socket this process is known to listen on."""
    for _, candidate in own_sockets():
        if candidate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and candidate.family != socket.AF_UNIX:
            host, port, *_ = candidate.getsockname()
            return local_address(own_host() if from_outside and host in ("0.0.0.0", "::") else host, port)
    return None


def own_sockets() -> Iterator[tuple[int, socket.socket]]:
    """This process's sockets: the file descriptor of each, and a duplicate for as long as one looks at it."""
    with contextlib.suppress(OSError):
        for number in sorted(map(int, os.listdir("/dev/fd"))):
            with contextlib.suppress(OSError):
                if stat.S_ISSOCK(os.fstat(number).st_mode):
                    with socket.socket(fileno=os.dup(number)) as duplicate:
                        yield number, duplicate


def own_host() -> str:
    """This machine's IP address in its network, 127.0.0.1 without one."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unsent:
        unsent.connect(("192.0.2.1", 9))  # of RFC 5737; for UDP this only chooses a route
        return unsent.getsockname()[0]
    return "127.0.0.1"


def host_of(environ: dict[str, Any]) -> Host:
    """The WSGI server of a request, recognised by a key in the environ."""
    kinds = {"gunicorn.socket": GunicornHost, "uwsgi.version": UWSGIHost, "mod_wsgi.version": ModWSGIHost}
    return next((kind for key, kind in kinds.items() if key in environ), Host)(environ)


class Host:
    """A WSGI server: this class fits wsgiref, werkzeug, cheroot and waitress, subclasses say how others differ."""

    read_errors: tuple[type[Exception], ...] = (OSError,)  # raised by a body that is broken, or ends too early

    def __init__(self, environ: dict[str, Any]):
        self.environ = environ
        self.socket = environ.get("gunicorn.socket") or environ.get("werkzeug.socket")  # the client's
        self.scheme = environ["wsgi.url_scheme"]  # that the server itself speaks, whatever a client claims
        if self.socket is not None:
            self.scheme = "https" if isinstance(self.socket, ssl.SSLSocket) else "http"

    @property
    def own_address(self) -> str | None:
        """http://host:port at which servers on this machine reach the hub, None on a unix socket: there is none."""
        if self.socket is not None and self.socket.family == getattr(socket, "AF_UNIX", None):  # not on Windows
            return None
        return local_address(self.environ["SERVER_NAME"], self.environ["SERVER_PORT"], self.scheme)

    def check(self) -> None:
        """Raises BadRequest or Unavailable if the hub cannot answer this request."""

    def check_streaming(self) -> None:
        """Raises NotPossible or Unavailable if the worker cannot carry this request in its own thread."""
        if is_websocket(self.environ):
            raise NotPossible("This web server does not let the hub carry websockets, which notebooks need. Run the hub"
                              " with gunicorn, without TLS in the worker, or set MINIHUB_PROXY to an external proxy")
        if not self.environ["wsgi.multithread"] and not self.environ["wsgi.multiprocess"]:
            raise Unavailable("Notebooks need more than one thread. Run the hub with gunicorn, or with more threads")

    def socket_number(self) -> int | None:
        """The file descriptor of the client's plain TCP or unix socket, None if the server does not lend it."""
        if os.name != "posix" or self.environ["SERVER_PROTOCOL"] not in ("HTTP/1.0", "HTTP/1.1"):
            return None  # an HTTP/2 connection carries other requests too
        if "gevent.monkey" in sys.modules and self.environ.get("wsgi.multithread"):
            return None  # gevent's threads are greenlets, which must not share a socket with a real thread
        return self.lent_socket()

    def lent_socket(self) -> int | None:
        """The same, of a request that can be taken over."""
        if self.socket is not None:
            return self.socket.fileno() if type(self.socket) is socket.socket else None  # TLS has another type
        with contextlib.suppress(AttributeError, OSError, ValueError):
            number = self.environ["wsgi.input"].fileno()
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                return number
        return None

    def handling(self) -> contextlib.AbstractContextManager:
        """Within the block, the client waits for the hub, and not the other way round."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def reading(self) -> Iterator[Deadline]:
        """Read the body within the block. Raises BadRequest if that breaks off, and TooSlow if it takes too long, where
        the server lends the socket."""
        number = self.socket.fileno() if self.socket is not None else self.lent_socket()
        total = math.inf if self.environ["wsgi.multithread"] else LONGEST_WAIT
        deadline = Deadline(number if os.name == "posix" else None, CLIENT_PATIENCE, total)
        try:
            with deadline.in_force():
                yield deadline
        except self.read_errors:
            if not deadline.is_over:
                raise BadRequest("The body's chunks are broken, or end too early") from None
        if deadline.is_over:
            raise TooSlow("The request's body did not arrive in time. One that takes long needs a Content-Length")

    def take_over(self, number: int) -> Handover:
        """Take the client's socket out of the server's hands."""
        handover = Handover(self.environ, number)
        handover.close()
        return handover

    def upstream_protocol(self, number: int | None) -> str:
        """The HTTP version of the request to the user's server: the client's, if its response is passed on raw."""
        return "HTTP/1.1" if number is None else self.environ["SERVER_PROTOCOL"]

    def read_chunk(self) -> bytes:
        """The next piece of a chunked body, b"" at its end. Raises BadRequest if the server cannot find that."""
        if not self.environ.get("wsgi.input_terminated"):
            raise BadRequest("This server needs a Content-Length, it cannot read a body that comes in chunks")
        return self.environ["wsgi.input"].read(CHUNK)

    def end(self) -> bool:
        """End the server with all its workers, which run only the hub. False if that is not possible."""
        return False


class GunicornHost(Host):
    """gunicorn. On a unix socket it takes SERVER_NAME from the Host header."""

    _handled: list[int] = []  # the inodes of the sockets of those requests that this process is at work on

    def check(self) -> None:
        if "HTTP_SCRIPT_NAME" in self.environ:  # its mount point, if a reverse proxy on this machine passes it on
            raise BadRequest("The header SCRIPT_NAME is not believed. Set MINIHUB_BASE_URL for a hub below a path")

    @property
    def read_errors(self):
        return OSError, sys.modules["gunicorn.http.errors"].ParseException

    @contextlib.contextmanager
    def handling(self) -> Iterator[None]:
        inode = os.fstat(self.socket.fileno()).st_ino
        self._handled.append(inode)
        try:
            yield
        finally:
            self._handled.remove(inode)

    @classmethod
    def watch_clients(cls) -> None:
        """In gunicorn's workers, limit how long a client keeps a thread waiting. They must run nothing but the hub."""
        if sys.platform != "linux" or "gunicorn.arbiter" not in sys.modules or "gevent.monkey" in sys.modules:
            return  # greenlets cost little

        def start():
            cls._handled.extend(deadline.inode for deadline in cls._clients_waited_for())  # by the parent of a fork
            threading.Thread(target=cls._watch, name="minihub-watchdog", daemon=True).start()

        os.register_at_fork(after_in_child=start)  # with --preload
        start()

    @classmethod
    def _watch(cls):
        clients = {}
        while True:
            time.sleep(0.25)
            before, clients = clients, {}
            for latest in cls._clients_waited_for():
                deadline = clients[latest.inode] = before.get(latest.inode, latest)
                if deadline.unsent != latest.unsent:  # the client takes some of the response
                    deadline.unsent = latest.unsent
                    deadline.extend(CLIENT_PATIENCE)
                deadline.enforce()

    @classmethod
    def _clients_waited_for(cls):
        """A deadline for each client whose request a thread of this process reads, or to whom it writes."""
        names, clients = set(), []
        for number, duplicate in own_sockets():
            is_tcp = duplicate.family in (socket.AF_INET, socket.AF_INET6)
            name = duplicate.getsockname()[1] if is_tcp else duplicate.getsockname()
            if duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                names.add(name)
                if is_tcp:  # have the kernel accept no connection on which nothing has been sent
                    duplicate.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, IDLE_TIMEOUT)
                continue
            with contextlib.suppress(OSError):  # it may just have been closed
                if os.get_blocking(number):  # not where gunicorn waits, in no thread, for the next request
                    clients.append((name, Deadline(number, CLIENT_PATIENCE, LONGEST_WAIT)))
                    unsent = fcntl.ioctl(number, termios.TIOCOUTQ, bytes(4))
                    clients[-1][1].unsent = int.from_bytes(unsent, sys.byteorder)
                elif (is_tcp and duplicate.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] in FIN_WAIT
                      and not duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)):  # that the splicer has set
                    duplicate.shutdown(socket.SHUT_RD)  # gunicorn need not wait for two seconds until the client closes
        return [deadline for name, deadline in clients if name in names and deadline.inode not in cls._handled]

    def end(self) -> bool:
        os.kill(os.getppid(), signal.SIGTERM)
        return True


class UWSGIHost(Host):
    """uWSGI. The socket may be its router's or a web server's, for this request alone: it takes the same response."""

    def __init__(self, environ: dict[str, Any]):
        super().__init__(environ)
        self.uwsgi = sys.modules["uwsgi"]
        self.scheme = "https" if environ.get("HTTPS") else "http"

    def check(self) -> None:
        if not self.uwsgi.has_threads:
            raise Unavailable("uWSGI runs no threads of Python's, which the hub needs. Start it with --enable-threads")

    def lent_socket(self) -> int | None:
        options = self.uwsgi.opt.keys()
        if "x-wsgiorg.fdevent.readable" in self.environ or {"https-socket", "suwsgi-socket"} & options:
            return None  # its requests are no threads, as with gevent, or come over TLS
        is_routed = "UWSGI_ROUTER" in self.environ and not {"http-websockets", "http-raw-body"} & options
        if is_routed and is_websocket(self.environ):
            return None  # the router would pass on the response, and then nothing that the client sends
        return self.uwsgi.connection_fd()

    def take_over(self, number: int) -> Handover:
        return HandoverFromUWSGI(self.environ, number)  # which uWSGI closes

    def upstream_protocol(self, number: int | None) -> str:  # 1.0 has no chunks, which nginx would not decode
        return super().upstream_protocol(number) if is_websocket(self.environ) else "HTTP/1.0"

    def read_chunk(self) -> bytes:
        return super().read_chunk() if self.environ.get("CONTENT_LENGTH") else self.uwsgi.chunked_read()

    def end(self) -> bool:
        os.kill(self.uwsgi.masterpid() or os.getpid(), signal.SIGINT)  # a SIGTERM may only restart it
        return True


class ModWSGIHost(Host):
    """Apache with mod_wsgi. Its SERVER_NAME and SERVER_PORT are the Host header."""

    @property
    def own_address(self) -> str | None:
        host, port = self.environ["mod_wsgi.listener_host"], self.environ["mod_wsgi.listener_port"]
        return local_address(host, port, self.scheme)


def start_after_fork_of_host(start: Callable[[], None]) -> bool:
    """Have uWSGI's workers call `start`: it forks without Python's fork hooks. False where no such fork is to come."""
    uwsgi = sys.modules.get("uwsgi")
    if uwsgi is None or uwsgi.worker_id():
        return False
    uwsgi.post_fork_hook = start
    return True


class Handover:
    """A client's connection that has been taken over; iterated over, it is the empty response of the WSGI server.

    The server goes on with one end of a socket pair. Once the pair is closed, `wsgi.input` gives just the bytes it had
    buffered, and writing fails as if the client had gone, so no request pipelined behind this one is served."""

    def __init__(self, environ: dict[str, Any], number: int):
        self._input = environ["wsgi.input"]
        self.client = socket.socket(fileno=os.dup(number))
        self._near_end, self._far_end = socket.socketpair()
        os.dup2(self._near_end.fileno(), number, inheritable=False)

    def buffered(self, length: int) -> bytes:
        """Those of the body's next `length` bytes that the server has already read."""
        return self._input.read(length) if length else b""

    def respond(self, start_response: Callable) -> Handover:
        """Begin the response that the WSGI server believes it sends."""
        start_response("200 OK", [("Content-Length", "0")])
        return self

    def __iter__(self):
        return iter((b"",))

    def close(self) -> None:
        """Close the pair. The WSGI server, too, calls this after its response."""
        self._near_end.close()
        self._far_end.close()


class HandoverFromUWSGI(Handover):
    """For uWSGI, which loses what it has buffered of a body that ends early, and logs every failing write."""

    def buffered(self, length: int) -> bytes:
        """Those bytes. uWSGI gets as much padding to read as it asks for: what it leaves of that, it had buffered."""
        received = b""
        while len(received) < length:
            size = min(length - len(received), 4096)  # what any socket pair holds
            self._far_end.sendall(bytes(size + 1))  # one more, so that recv() never waits
            data = self._input.read(size)
            count = len(self._near_end.recv(size + 1)) - 1
            received += data[:count]
            if count < size:
                break
        return received


def spooled_body(host: Host) -> Any:
    """A file with the whole of a chunked body, None for other bodies. Raises BadRequest, TooLarge and TooSlow."""
    if not host.environ.get("HTTP_TRANSFER_ENCODING"):
        return None
    with contextlib.ExitStack() as opened:
        spool = opened.enter_context(tempfile.SpooledTemporaryFile(max_size=1024 * 1024))
        with host.reading() as deadline:
            while data := host.read_chunk():
                deadline.extend(len(data) / SLOWEST_UPLOAD)
                spool.write(data)
                if spool.tell() > SPOOL_LIMIT:
                    raise TooLarge("The body is too long for one that comes in chunks. Send it with a Content-Length")
        opened.pop_all()
        return spool


def stream(environ: dict[str, Any], start_response: Callable, exchange: Exchange, timeout: float) -> Iterable[bytes]:
    """Carry an exchange in the worker's own thread. Raises Unavailable if the server does not answer in time."""
    parts = _parts_of_response(host_of(environ), exchange, timeout)
    try:
        head = next(parts)
    except (OSError, ValueError, http.client.HTTPException) as error:
        log.warning("the server at %s:%s sent no valid response: %s", *exchange.target, error)
        raise Unavailable("The server does not answer") from None
    start_response(f"{head.status} {head.reason}", head.passed_on())
    return parts


def _parts_of_response(host, exchange, timeout):
    """First the response's head, then the pieces of its body. The WSGI server may close it in between."""
    with (host.handling(), exchange.spool or contextlib.nullcontext(host.environ["wsgi.input"]) as body,
          socket.create_connection(exchange.target, CONNECT_TIMEOUT) as upstream):
        upstream.settimeout(timeout or None)
        notice_dead_peer(upstream)
        upstream.sendall(exchange.head)
        left = exchange.body_left
        while left and (data := body.read(min(CHUNK, left))):
            upstream.sendall(data)
            left -= len(data)
        with http.client.HTTPResponse(upstream, method=exchange.method) as response:
            response.begin()
            is_unreadable = "Transfer-Encoding" in response.headers and not response.chunked
            if response.status < 200 or response.headers.defects or is_unreadable:
                raise ValueError(f"status {response.status}, with malformed or unexpected headers")
            yield ResponseHead(response.status, response.reason, tuple(response.headers.items()))
            while data := response.read1(CHUNK):
                yield data


class Proxy:
    """Where requests for servers go. Subclasses must implement `add_route`, `delete_route` and `get_all_routes`.

    A prefix begins and ends with a slash (JupyterHub calls it routespec) and is percent-encoded, as URLs are. The hub
    sets `settings`, its `store` and its `carrier` before the first call."""

    settings: Settings | None = None
    store: Store
    carrier: CarrierClient

    def add_route(self, prefix: str, target: str, data: dict[str, Any]) -> None:
        """Send requests below `prefix` to `target` (http://host:port); `data` says whose it is. Replaces a route."""
        raise NotImplementedError

    def delete_route(self, prefix: str) -> None:
        """Forget a route. Idempotent."""
        raise NotImplementedError

    def get_all_routes(self) -> dict[str, dict[str, Any]]:
        """Every route by its prefix, as {"routespec": prefix, "target": ..., "data": {...}}."""
        raise NotImplementedError

    def check_routes(self, wanted: dict[str, dict[str, Any]], actual: dict[str, dict[str, Any]]) -> None:
        """Change the `actual` routes into the `wanted` ones, both in the form that `get_all_routes` returns."""
        for prefix in actual.keys() - wanted.keys():
            self.delete_route(prefix)
        for prefix, route in wanted.items():
            if actual.get(prefix, {}).get("target") != route["target"]:
                self.add_route(prefix, route["target"], route["data"])


class EmbeddedProxy(Proxy):
    """The hub's own reverse proxy. Its routes are rows, so every worker has them; the carrier has its traffic."""

    def add_route(self, prefix, target, data):
        upsert(Route.prefix, prefix, target=target, data=data)

    def delete_route(self, prefix):
        Route.delete().where(Route.prefix == prefix).execute()

    def get_all_routes(self):
        return {row.prefix: {"routespec": row.prefix, "target": row.target, "data": row.data}
                for row in Route.select().order_by(Route.prefix)}

    def forward(self, environ: dict[str, Any], start_response: Callable, target: str, client: Client,
                unavailable: bytes, crowded: bytes) -> Iterable[bytes]:
        """Answer the request with the response of the server at `target`, or with one of these whole responses:
        `unavailable` if there is none, `crowded` if there are too many connections.

        Raises BadRequest and TooLarge, and Unavailable or NotPossible where this WSGI host cannot carry such a request.
        """
        host = host_of(environ)
        number = host.socket_number()
        if number is None:
            host.check_streaming()
        spool = spooled_body(host)
        length = content_length(environ)
        if spool:
            length = spool.tell()
            spool.seek(0)
        head = request_head(environ, client, length, host.upstream_protocol(number))
        exchange = Exchange(host_and_port(target), environ["REQUEST_METHOD"], is_websocket(environ), head, length or 0,
                            spool, unavailable, crowded, "/".join(environ["PATH_INFO"].split("/")[1:3]),
                            neighbourhood(client.address), self.settings.proxy_idle_timeout)
        if number is None:
            return stream(environ, start_response, exchange, self.settings.proxy_idle_timeout)
        try:
            handover = host.take_over(number)
        except OSError:
            raise Unavailable(TOO_MANY_CONNECTIONS, retry_after=5) from None
        if not spool:
            buffered = handover.buffered(exchange.body_left)
            left = exchange.body_left - len(buffered)
            exchange = dataclasses.replace(exchange, head=head + buffered, body_left=left)
        self.carrier.carry(handover.client, exchange)
        return handover.respond(start_response)


class ConfigurableHTTPProxy(Proxy):
    """JupyterHub's own proxy, a program in front of the hub, driven through its REST API. Raises Unavailable."""

    def api(self) -> dict[str, str]:
        """The proxy's `api_url` and `auth_token`: a fact in the database, so that all workers move at once."""
        return self.store.claim_fact("proxy", {"api_url": self.settings.chp_api_url.rstrip("/"),
                                               "auth_token": self.settings.chp_auth_token or secrets.token_hex(32)})

    def move(self, changes: dict[str, Any]) -> None:
        """Drive another proxy: `changes` has its ip, port, protocol, api_url or auth_token. Raises BadRequest."""
        api = self.api()
        url = changes.get("api_url") or api["api_url"]
        if is_address(url):
            parts = urlsplit(url)
            host, port = changes.get("ip") or parts.hostname, changes.get("port") or parts.port
            host = f"[{host}]" if ":" in host else host
            scheme = (changes.get("protocol") or parts.scheme).rstrip(":/")
            url = f"{scheme}://{host}{f':{port}' if port else ''}{parts.path.rstrip('/')}"
        if not is_address(url):
            raise BadRequest(f"The proxy's API must be at an address like http://127.0.0.1:8001, not {shortened(url)}")
        self.store.set_fact("proxy", {"api_url": url, "auth_token": changes.get("auth_token") or api["auth_token"]})

    def keep_running(self, hub_url: str) -> None:
        """Start the proxy if it is the hub's to run and does not run. `hub_url` is that of the hub's pages."""
        api = self.api()
        state = self.store.fact("proxy_process")
        is_ours = self.settings.chp_command and api["api_url"] == self.settings.chp_api_url.rstrip("/")
        if not is_ours or (state and poll_process(state) is None):
            return
        run = Path(self.settings.run_dir) / f"proxy@{secrets.token_hex(4)}"
        variables = {**self.settings.inherited_variables(), "CONFIGPROXY_AUTH_TOKEN": api["auth_token"]}
        self.store.set_fact("proxy_process", start_process(run, self._command(hub_url), "proxy", env=variables))
        log.info("proxy: started at %s", self.settings.chp_api_url)

    def _command(self, hub_url):
        words = shlex.split(self.settings.chp_command)
        given = {word.partition("=")[0] for word in words}
        api = urlsplit(self.settings.chp_api_url)
        options = {"--api-ip": api.hostname, "--api-port": str(api.port or 80), "--error-target": f"{hub_url}error"}
        return words + [word for pair in options.items() if pair[0] not in given for word in pair]

    def stop_running(self) -> None:
        """End the proxy, if the hub has started it."""
        if state := self.store.fact("proxy_process"):
            self.store.set_fact("proxy_process", stop_process(state, ((0, signal.SIGTERM),)))
            log.info("proxy: stopped")

    def add_route(self, prefix, target, data):
        self._request("POST", prefix, {**data, "target": target, "jupyterhub": True})

    def delete_route(self, prefix):
        self._request("DELETE", prefix)

    def get_all_routes(self):
        routes = {}  # others may have made some of their own
        for path, entry in self._request("GET", "/").items():
            if entry.pop("jupyterhub", False):
                prefix = quote(path.rstrip("/"), safe="/@~") + "/"
                routes[prefix] = {"routespec": prefix, "target": entry.pop("target"), "data": entry}
        return routes

    def _request(self, method, prefix, body=None):
        api = self.api()
        parts = urlsplit(api["api_url"])
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        path = f"{parts.path.removesuffix('/api/routes')}/api/routes{prefix.rstrip('/') or '/'}"
        try:
            with contextlib.closing(kind(parts.hostname, parts.port, timeout=CONNECT_TIMEOUT)) as connection:
                connection.request(method, path, json.dumps(body), {"Authorization": f"token {api['auth_token']}"})
                response = connection.getresponse()
                if response.status >= 400 and (method, response.status) != ("DELETE", 404):
                    raise Unavailable(f"The proxy at {api['api_url']} refuses to {method} a route: {response.status}")
                return json.loads(response.read()) if method == "GET" else None
        except (OSError, ValueError, http.client.HTTPException):
            raise Unavailable(f"The proxy at {api['api_url']} does not answer") from None


PROXIES = {"embedded": EmbeddedProxy, "chp": ConfigurableHTTPProxy}


########################################################################################################
# 9. The site and its people
########################################################################################################

DEFAULT_ADDRESS = "http://127.0.0.1:8000"  # gunicorn's


@dataclass(frozen=True)
class Mount:
    """Where the hub is reached: by browsers below the path `base`, by its servers at `address` (http://host:port)."""
    base: str
    address: str

    @property
    def hub(self) -> str:
        return f"{self.base}hub/"

    def server_prefix(self, user_name: str, server_name: str) -> str:
        """The path of a user's server."""
        return f"{self.base}user/{quote_name(user_name)}/" + (f"{quote_name(server_name)}/" if server_name else "")


class Site:
    """The addresses of the hub and of its servers, and where the last request has reached the hub."""

    def __init__(self, settings: Settings, store: Store):
        self.settings, self.store = settings, store
        self._mount: Mount | None = None

    def arrive(self, mount: Mount) -> None:
        """Keep where a request has reached the hub, for the ticker and the command line, which have no request."""
        if mount != self._mount:
            self._mount = mount
            with best_effort(), waiting(NOTE_WAIT):
                self.store.set_fact("mount", dataclasses.asdict(mount))

    @property
    def mount(self) -> Mount:
        """Where the hub was reached last, or, before this process's first request, where it is likely to be."""
        if self._mount is None:
            known = self.store.fact("mount", {})
            base = known.get("base") or quote(self.settings.base_url, safe="/@~")
            address = self.settings.hub_url or listening_address() or known.get("address")
            self._mount = Mount(base, address or DEFAULT_ADDRESS)
        return self._mount

    @property
    def last_address(self) -> str:
        """http://host:port where the hub was reached last, or probably listens, without asking the database."""
        return self._mount.address if self._mount else listening_address() or DEFAULT_ADDRESS

    def public_link(self, path: str, origin: str = "") -> str:
        """A link to `path` below the hub's pages; `origin` is https://host where the person asking sees them."""
        return f"{self.settings.public_url or origin or self.mount.address}{self.mount.hub}{path}"

    def servers_origin(self, user_name: str) -> str:
        """https://host of a user's servers; '' where they are below the hub's own address."""
        return self.settings.user_url and self.settings.user_url.replace("{username}", host_label(user_name))

    def server_url(self, user_name: str, server_name: str) -> str:
        """Where browsers find a server: a path, or a whole URL if servers have a host name of their own."""
        return self.servers_origin(user_name) + self.mount.server_prefix(user_name, server_name)


def tell(settings: Settings, event: str, *facts: str) -> None:
    """Call the site's callback for an event. It can neither undo what has happened nor break the hub."""
    try:
        if callback := getattr(settings, event):
            callback(*facts)
    except Exception:  # a hook that somebody else wrote
        log.exception("%s failed", event)


#: A server as the API shows it; `user` is its user's id.
ServerDetails = namedtuple("ServerDetails", "user name status state user_options started last_activity",
                           defaults=(None, None, None, None))
#: A user as the API shows them, with the names of their groups, and with the ServerDetails of their servers.
UserDetails = namedtuple("UserDetails", "id name admin created last_activity auth_state groups servers")

_USER_COLUMNS = {column: getattr(User, column) for column in UserDetails._fields[:-2]}
USER_BY_NAME = CompiledQuery(User.select().where(User.name == ""), **User._meta.fields)
#: A user's row for each pair of a group and a server whose status is another than the first value.
DETAILS_BY_NAME = CompiledQuery(
    User.select().join(Server, pw.JOIN.LEFT_OUTER, on=(Server.user == User.id) & (Server.status != ""))
    .switch(User).join(Membership, pw.JOIN.LEFT_OUTER).join(Group, pw.JOIN.LEFT_OUTER)
    .where(User.name == "").order_by(Server.name, Group.name),
    **_USER_COLUMNS, group=Group.name, server=Server.name, status=Server.status, state=Server.state,
    user_options=Server.user_options, started=Server.started, server_activity=Server.last_activity)
SERVERS_OF_RANGE = CompiledQuery(
    Server.select().where((Server.status != "") & Server.user.between(0, 0)).order_by(Server.name),
    **{column: getattr(Server, column) for column in ServerDetails._fields})
GROUPS_OF_RANGE = CompiledQuery(
    Membership.select().join(Group).where(Membership.user.between(0, 0)).order_by(Group.name),
    user=Membership.user, group=Group.name)
SERVER_ACTIVITY = CompiledQuery(Server.select().where(Server.user == 0), id=Server.id, name=Server.name,
                                started=Server.started, last_activity=Server.last_activity)
ACTIVITY_UPDATES = {
    model: CompiledQuery(model.update(last_activity=now()).where(
        (model.id == 0) & (model.last_activity.is_null() | (model.last_activity < now()))))
    for model in (Token, User, Server)}


def has_reported(started: datetime | None, last_activity: datetime | None) -> bool:
    """Whether a server has reported activity. Its start counts as activity (as in JupyterHub), but is no report."""
    return bool(last_activity and (started is None or last_activity > started))


class People:
    """Users: who exists, what they are, and when they were last active."""

    def __init__(self, settings: Settings, store: Store, authenticator: Authenticator):
        self.settings, self.store, self.authenticator = settings, store, authenticator
        self.configured_admins = {authenticator.normalize(name) for name in settings.admins}
        for name in self.configured_admins:
            demand(is_valid_name(name), "admins", "must hold names that users can have", name)

    def is_same(self, name: str, user_name: str) -> bool:
        """Whether `name`, as somebody has typed it, is that user's."""
        return self.authenticator.normalize(name) == user_name

    def normalize(self, name: str) -> str:
        """The one spelling of a user's name. Raises BadRequest for an invalid one."""
        normal = self.authenticator.normalize(name)
        if not is_valid_name(normal):
            raise BadRequest(f"Invalid username: {name}")
        return normal

    def get(self, name: str) -> User | None:
        """The user of that name, however it is spelled."""
        normal = self.authenticator.normalize(name)
        rows = USER_BY_NAME.run(self.store.database, normal) if is_valid_name(normal) else ()
        return next((User(**row._asdict()) for row in rows), None)

    def find(self, name: str) -> User:
        """The user of that name. Raises NotFound."""
        if user := self.get(name):
            return user
        raise NotFound(f"No such user: {name}")

    def create(self, name: str, admin: bool = False) -> User:
        """A new user. Raises BadRequest for an invalid name, Conflict if there is one of that name."""
        user = self.insert(name, admin)
        tell(self.settings, "on_user_created", user.name)
        return user

    def insert(self, name: str, admin: bool) -> User:
        """The same, for a transaction that may yet fail: the site is not told."""
        name = self.normalize(name)
        for user in self._insert_new([name], admin):
            return user
        raise Conflict(f"User {name} already exists")

    def create_many(self, names: list[str], admin: bool = False) -> list[User]:
        """Those of the users who are new, all or none. Raises BadRequest for invalid names, Conflict if none is new."""
        normal = {name: self.authenticator.normalize(name) for name in names}
        if invalid := [name for name in names if not is_valid_name(normal[name])]:
            raise BadRequest(f"Invalid username{'s' if len(invalid) > 1 else ''}: {', '.join(invalid)}")
        wanted = list(dict.fromkeys(normal.values()))
        users = self._insert_new(wanted, admin)
        if not users:
            raise Conflict(f"All {len(wanted)} users already exist")
        for user in users:
            tell(self.settings, "on_user_created", user.name)
        return users

    def _insert_new(self, names, admin):
        """Rows for those users who are new, and for their default servers, in as few statements as a database takes."""
        users = []
        with self.store.transaction():
            for part in pw.chunked(names, 50):
                rows = self._new_rows(part, admin)
                User.insert_many(rows).on_conflict_ignore().execute()
                is_new = User.session_key.in_([row["session_key"] for row in rows])  # those who existed have others
                users.extend(User.select().where(User.name.in_(part) & is_new).order_by(User.id))
            for part in pw.chunked(users, 50):
                Server.insert_many([{"user": user} for user in part]).execute()
        if users:
            created = ", ".join(user.name for user in users)
            log.info("users created%s: %s", ", as admins" if admin else "", shortened(created))
        return users

    def _new_rows(self, names, admin):
        folders = {name: folder_name(name) for name in names}
        taken = {user.folder for user in User.select(User.folder).where(User.folder.in_(list(folders.values())))}
        return [{"name": name, "admin": admin or name in self.configured_admins, "session_key": new_token(),
                 "folder": f"{folder}-{secrets.token_hex(4)}" if folder in taken else folder}  # by a user renamed since
                for name, folder in folders.items()]

    def find_or_create(self, name: str) -> User:
        """The user whom the authenticator vouches for, who may be new. Raises BadRequest for an invalid name."""
        with contextlib.suppress(Conflict):  # another of the browser's first requests was faster
            return self.get(name) or self.create(name)
        return self.find(name)

    def admit_configured_admins(self) -> None:
        """Make the admins of the settings admins, as new users where they are unknown."""
        for name in self.configured_admins:
            self.find_or_create(name)
        User.update(admin=True).where(User.name.in_(self.configured_admins)).execute()

    def change(self, user: User, changes: dict[str, Any]) -> None:
        """Write new values of `name`, `admin` or `auth_state`. Raises BadRequest."""
        if "name" in changes:
            changes = {**changes, "name": self.normalize(changes["name"])}
        try:
            with self.store.transaction():
                self.hold(user, **changes)
                active = Server.select().where((Server.user == user) & Server.status.in_(ACTIVE))
                if changes.get("name", user.name) != user.name and active.exists():
                    raise BadRequest(f"Stop the servers of {user.name} before giving them another name")
        except pw.IntegrityError:
            raise BadRequest(f"User {changes['name']} already exists, username must be unique") from None
        user.__data__.update(changes)
        if changes:
            log.info("user %s changed: %s", user.name, ", ".join(changes))

    def hold(self, user: User, **changes: Any) -> None:
        """Change these columns, and keep others from renaming or deleting the user until this transaction ends. Raises
        NotFound if they have."""
        is_same = (User.id == user.id) & (User.name == user.name)
        if not User.update(**{"name": user.name, **changes}).where(is_same).execute():
            raise NotFound(f"No such user: {user.name}")

    def hide(self, user: User) -> None:
        """Take the user's name away, so that nobody finds them, and all that they could sign in with."""
        name = f"{user.name[:NAME_LENGTH - 20]}/{user.id}"
        self.hold(user, name=name, leaving=True, session_key=new_token(), password=None)
        user.name = name
        Membership.delete().where(Membership.user == user).execute()

    def list(self, state: str | None = None, name_filter: str = "", sort: str = "id", offset: int = 0,
             limit: int | None = None) -> tuple[list[UserDetails], int]:
        """Users from `offset` on, still without groups and servers (see `details_of`), and how many there are in all:
        by `state` those with an active, a ready or, if inactive, no active server; `name_filter` is a part of the name;
        `sort` is id, name or last_activity, descending with a leading -. Raises BadRequest."""
        statuses = {None: (), "active": ACTIVE, "inactive": ACTIVE, "ready": ("ready",)}.get(state)
        column = {"id": User.id, "name": User.name, "last_activity": User.last_activity}.get(sort.removeprefix("-"))
        if statuses is None:
            raise BadRequest("state must be one of active, ready, inactive")
        if column is None:
            raise BadRequest("sort must be one of id, name, last_activity, with or without a leading -")
        query = User.select(*_USER_COLUMNS.values()).where(~User.leaving & User.name.contains(storable(name_filter)))
        if state:
            busy = User.id.in_(Server.select(Server.user).where(Server.status.in_(statuses)))
            query = query.where(~busy if state == "inactive" else busy)
        page = query.order_by(column.desc() if sort.startswith("-") else column, User.id).offset(offset).limit(limit)
        users = [UserDetails(*row, groups=[], servers=[]) for row in page.tuples()]
        return users, query.count() if offset or limit else len(users)

    def details(self, name: str, stopped: bool = False) -> UserDetails:
        """The user with groups and with active servers, or all if `stopped`. Raises NotFound."""
        hidden, normal = "" if stopped else "stopped", self.authenticator.normalize(name)
        rows = DETAILS_BY_NAME.run(self.store.database, hidden, normal) if is_valid_name(normal) else ()
        if not rows:
            raise NotFound(f"No such user: {name}")
        groups = dict.fromkeys(row.group for row in rows if row.group is not None)
        servers = {row.server: ServerDetails(row.id, row.server, row.status, row.state, row.user_options, row.started,
                                             row.server_activity) for row in rows if row.server is not None}
        return UserDetails(*rows[0][:len(_USER_COLUMNS)], list(groups), list(servers.values()))

    def details_of(self, users: list[User | UserDetails], stopped: bool = False) -> list[UserDetails]:
        """The same for several users, in two queries however many they are."""
        groups, servers, ids = {}, {}, [user.id for user in users]
        span = (min(ids, default=0), max(ids, default=0))
        for row in GROUPS_OF_RANGE.run(self.store.database, *span):
            groups.setdefault(row.user, []).append(row.group)
        for row in SERVERS_OF_RANGE.run(self.store.database, "" if stopped else "stopped", *span):
            servers.setdefault(row.user, []).append(ServerDetails(*row))
        return [UserDetails(*(getattr(user, column) for column in _USER_COLUMNS), groups.get(user.id, []),
                            servers.get(user.id, [])) for user in users]

    def note_visit(self, user: User) -> None:
        """Record that a user was here in person."""
        with best_effort():
            self.note_activity(User, user.id, user.last_activity)

    def note_activity(self, model: type[Row], row_id: int, before: datetime | None,
                      at: datetime | None = None) -> datetime:
        """Record that a token, user or server was used at `at` (default: now), unless the last record is later, or
        `before`, what the caller knows of it, is too recent for `activity_resolution`. Returns what is known now."""
        at = at or now()
        if before and before >= at - timedelta(seconds=self.settings.activity_resolution):
            return before
        stored = model.last_activity.db_value(at)
        with waiting(NOTE_WAIT):  # it will be noted again
            ACTIVITY_UPDATES[model].execute(self.store.database, stored, row_id, stored)
        return at

    def record_activity(self, user: User | UserDetails, at: datetime | None, servers: dict[str, datetime]) -> None:
        """Record when the user (at `at`) and their servers were last used. A stale report changes nothing. Raises
        BadRequest for a server that does not exist."""
        known = {row.name: row for row in SERVER_ACTIVITY.run(self.store.database, user.id)} if servers else {}
        if unknown := [name for name in servers if name not in known]:
            raise BadRequest(f"No such server '{unknown[0]}' for user {user.name}")
        if at:
            self.note_activity(User, user.id, user.last_activity, at)
        for name, moment in servers.items():
            server = known[name]
            is_first = has_reported(server.started, moment) and not has_reported(server.started, server.last_activity)
            self.note_activity(Server, server.id, None if is_first else server.last_activity, moment)


class Groups:
    """Groups and who is in them."""

    def __init__(self, store: Store, people: People):
        self.store, self.people = store, people

    def list(self) -> list[Group]:
        """All groups, in the order they were created."""
        return list(Group.select().order_by(Group.id))

    def find(self, name: str) -> Group:
        """The group of that name. Raises NotFound."""
        if is_valid_name(name) and (group := Group.get_or_none(Group.name == name)):
            return group
        raise NotFound(f"No such group: {name}")

    def create(self, names: list[str], members: list[str]) -> list[Group]:
        """New groups with the same members, all or none. Raises BadRequest, and Conflict if there is one already."""
        if invalid := [name for name in names if not is_valid_name(name)]:
            raise BadRequest(f"Invalid group name: {invalid[0]}")
        try:
            with self.store.transaction():
                groups = [Group.create(name=name) for name in names]
                for group in groups:
                    self.add_members(group, members)
        except pw.IntegrityError:
            raise Conflict(f"Group {', '.join(names)} already exists") from None
        log.info("groups created: %s", ", ".join(names))
        return groups

    def delete(self, group: Group) -> None:
        """Delete the group; its members stay users."""
        group.delete_instance()
        log.info("group %s deleted", group.name)

    def set_properties(self, group: Group, properties: dict[str, Any]) -> None:
        """Replace the group's properties."""
        group.properties = properties
        group.save(only=[Group.properties])
        log.info("group %s has new properties", group.name)

    def add_members(self, group: Group, names: list[str]) -> None:
        """Add users to the group, all or none. Idempotent. Raises BadRequest for an unknown user."""
        with self.store.transaction():
            for user in self._known_users(names):
                Membership.insert(user=user, group=group).on_conflict_ignore().execute()

    def remove_members(self, group: Group, names: list[str]) -> None:
        """Take users out of the group, all or none. Idempotent. Raises BadRequest for an unknown user."""
        users = self._known_users(names)
        Membership.delete().where((Membership.group == group) & Membership.user.in_(users)).execute()

    def _known_users(self, names):
        users = [self.people.get(name) for name in names]
        if None in users:
            raise BadRequest(f"No such user: {names[users.index(None)]}")
        return users

    def put(self, user: User, names: set[str]) -> None:
        """Make these the user's groups, and create those that are missing. Writes nothing if they are already."""
        if names == set(self.people.details(user.name).groups):
            return
        with self.store.transaction():
            for name in sorted(names):
                Group.insert(name=name).on_conflict_ignore().execute()
            groups = list(Group.select().where(Group.name.in_(names)))
            Membership.delete().where((Membership.user == user) & Membership.group.not_in(groups)).execute()
            for group in groups:
                Membership.insert(user=user, group=group).on_conflict_ignore().execute()
        log.info("user %s is now in groups: %s", user.name, ", ".join(sorted(names)))

    def members_of(self, groups: list[Group]) -> dict[int, list[str]]:
        """The names of the members by the group's id, in one query however many groups there are."""
        members = {}
        rows = Membership.select(Membership.group, User.name).join(User).where(Membership.group.in_(groups))
        for group_id, name in rows.order_by(Membership.id).tuples():
            members.setdefault(group_id, []).append(name)
        return members


########################################################################################################
# 10. Tokens and OAuth
########################################################################################################

TOKENS_PER_USER = 100  # API tokens


@dataclass
class Identity:
    """Who makes a request, and with what. A token with a `client` (OAuth) serves only to identify its owner."""
    kind: str                          # "user" or "service"
    name: str
    admin: bool
    user: User | UserDetails | None    # with a token: the details with no more than the default server
    token_id: int | None = None
    token_last_activity: datetime | None = None
    client: str | None = None          # the OAuth client's id
    client_server: str | None = None   # what that client is: `ada/gpu`,
    client_service: str | None = None  # or the name of a service
    server_id: int | None = None       # the server that runs with this token
    session_id: str = ""

    @classmethod
    def of_user(cls, user: User, session_id: str = "") -> Identity:
        """The user as somebody who asks without a token."""
        return cls("user", user.name, user.admin, user, session_id=session_id)

    @property
    def user_id(self) -> int | None:
        return self.user and self.user.id


_ClientOwner, _Owner, _Default = User.alias(), Service.alias(), Server.alias()
#: A token with its owner's default server, in a row for each of the owner's groups.
TOKEN_BY_HASH = CompiledQuery(
    Token.select().join(User, pw.JOIN.LEFT_OUTER)
    .join(_Default, pw.JOIN.LEFT_OUTER, on=(_Default.user == User.id) & (_Default.name == ""))
    .join(Membership, pw.JOIN.LEFT_OUTER, on=(Membership.user == User.id)).join(Group, pw.JOIN.LEFT_OUTER)
    .join(_Owner, pw.JOIN.LEFT_OUTER, on=(_Owner.id == Token.service))
    .join(OAuthClient, pw.JOIN.LEFT_OUTER, on=(OAuthClient.id == Token.client))
    .join(Server, pw.JOIN.LEFT_OUTER, on=(Server.id == OAuthClient.server))
    .join(_ClientOwner, pw.JOIN.LEFT_OUTER, on=(_ClientOwner.id == Server.user))
    .join(Service, pw.JOIN.LEFT_OUTER, on=(Service.id == OAuthClient.service))
    .where(Token.hashed == "").order_by(Group.name),
    token_id=Token.id, expires_at=Token.expires_at, token_last_activity=Token.last_activity, server_id=Token.server,
    session_id=Token.session_id, user_id=User.id, user=User.name, admin=User.admin, created=User.created,
    last_activity=User.last_activity, status=_Default.status, group=Group.name, service=_Owner.name,
    service_admin=_Owner.admin, client=OAuthClient.identifier, client_owner=_ClientOwner.name,
    client_server=Server.name, client_service=Service.name)


class Tokens:
    """API tokens and the OAuth2 provider: who a token is, what it may do, and how programs get one."""

    def __init__(self, settings: Settings, store: Store, site: Site, people: People):
        self.settings, self.store, self.site, self.people = settings, store, site, people

    def create(self, user: User, note: str = "", expires_in: float | None = None, **columns: Any) -> tuple[str, Token]:
        """A new token of the user's for `expires_in` seconds, and its row, which does not hold it. Raises TooMany."""
        is_own = "client" not in columns and "server" not in columns
        if is_own and self.settings.token_lifetime:
            expires_in = min(expires_in or math.inf, self.settings.token_lifetime)
        expires_at = None if expires_in is None else now() + timedelta(seconds=expires_in)
        token = new_token()
        with self.store.transaction():
            if is_own:
                self.people.hold(user)  # others who make a token of this user's wait
                if sum(not token.client_id and not token.server_id for token in self.of(user)) >= TOKENS_PER_USER:
                    raise TooMany(f"User {user.name} already has {TOKENS_PER_USER} API tokens. Revoke one first")
            return token, Token.create(hashed=hash_token(token), user=user, note=note, expires_at=expires_at, **columns)

    def identify(self, token: str) -> Identity | None:
        """The owner of a token, unless it has expired."""
        rows = TOKEN_BY_HASH.run(self.store.database, "", hash_token(token))
        if not rows or (rows[0].expires_at and rows[0].expires_at <= now()):
            return None
        row = rows[0]
        owner = ("service", row.service, row.service_admin, None)
        if row.service is None:
            user = UserDetails(row.user_id, row.user, row.admin, row.created, row.last_activity, None,
                               [row.group for row in rows if row.group], [ServerDetails(row.user_id, "", row.status)])
            owner = ("user", row.user, row.admin, user)
        client_server = row.client_owner and f"{row.client_owner}/{row.client_server}"
        return Identity(*owner, row.token_id, row.token_last_activity, row.client, client_server, row.client_service,
                        row.server_id, row.session_id)

    def exchange(self, token: str, data: dict[str, Any]) -> str:
        """A token that proves the same identity, but only to one launch of the server that a route's `data` names;
        '' if the owner may not enter. Tokens of others, and those for just that server, stay as they are."""
        identity = self.identify(token)
        if identity is None or identity.client_server == f"{data['user']}/{data['server_name']}":
            return token
        client = (OAuthClient.select(OAuthClient, Server).join(Server).join(User)
                  .where((User.name == data["user"]) & (Server.name == data["server_name"])).first())
        # An OAuth token is not exchanged: the server that has it could go on to all others in its owner's name.
        if identity.client or not client or not self.may_enter(identity, client.server.user_id):
            return ""
        # The client's secret is random and new at every launch, while SQLite uses ids of rows again.
        message = f"exchange:{token}:{client.secret}"
        derived = hmac.new(self.store.secret.encode(), message.encode(), hashlib.sha256).hexdigest()[:32]
        if self.identify(derived) is None:  # the first time; a write for every request would be too many
            with contextlib.suppress(Overtaken):  # by another request, or the end of the token or the launch
                parent = Token.get_by_id(identity.token_id)
                Token.create(hashed=hash_token(derived), user=parent.user_id, service=parent.service_id, client=client,
                             parent=parent, expires_at=parent.expires_at)
        return derived

    def may_enter(self, identity: Identity, owner_id: int | None) -> bool:
        """Whether this identity may open the servers of that user (None: a service, which is open to all)."""
        return owner_id is None or identity.user_id == owner_id or (identity.admin and self.settings.admin_access)

    def scopes_of(self, identity: Identity) -> list[str]:
        """The scopes of JupyterHub 2 (jupyterhub.scopes), expanded, because singleuser 6 fails on a bare `!user`."""
        me = f"!{identity.kind}={identity.name}"
        scopes = [f"read:{identity.kind}s:name{me}", f"read:{identity.kind}s:groups{me}"]
        enters_all = identity.admin and self.settings.admin_access  # at this moment, as people cease to be admins
        if identity.client_server:
            is_own = (identity.kind, identity.name) == ("user", identity.client_server.partition("/")[0])
            return [f"access:servers!server={identity.client_server}"] * (is_own or enters_all) + scopes
        if identity.client_service:
            return [f"access:services!service={identity.client_service}", *scopes]
        unfiltered = ["access:servers"] * enters_all  # singleuser 6 knows admins by nothing else
        return [*unfiltered, f"access:servers{me}", "access:services", *scopes, f"users:activity{me}",
                f"read:users:activity{me}", f"read:servers{me}", f"servers{me}", f"tokens{me}"]

    def find(self, user: User, public_id: str) -> Token:
        """The user's token by the id the API gives it, `a1` or `o1`. Raises NotFound."""
        is_it = Token.id == (int(public_id[1:]) if re.fullmatch("[ao][0-9]{1,18}", public_id) else 0)
        for token in self.of(user, is_it):
            if public_id == f"{'o' if token.client_id else 'a'}{token.id}":
                return token
        raise NotFound(f"No such token {public_id} for user {user.name}")

    def of(self, user: User, *conditions: pw.Expression) -> list[Token]:
        """The user's tokens that are still good, least recently used first."""
        good = (Token.user == user) & (Token.expires_at.is_null() | (Token.expires_at > now()))
        query = Token.select(Token, User, OAuthClient).join(User).switch(Token).join(OAuthClient, pw.JOIN.LEFT_OUTER)
        return list(query.where(good, *conditions).order_by(pw.fn.COALESCE(Token.last_activity, Token.created)))

    def delete(self, token: Token) -> None:
        """Revoke a token; an OAuth token goes with all of the user's for the same client."""
        same = (Token.client == token.client_id) if token.client_id else (Token.id == token.id)
        Token.delete().where(same & (Token.user == token.user_id)).execute()
        log.info("a token of user %s revoked", token.user.name)

    def note_use(self, identity: Identity) -> None:
        """Record in the identity, too, that a token was used; requests of a server that runs with it do not count."""
        if identity.server_id is None:
            with best_effort():  # both in one: each failure can take 15 seconds, and gunicorn kills after 30
                self.people.note_activity(Token, identity.token_id, identity.token_last_activity)
                if user := identity.user:
                    last_activity = self.people.note_activity(User, user.id, user.last_activity)
                    identity.user = user._replace(last_activity=last_activity)

    def launch(self, server: Server) -> tuple[str, OAuthClient]:
        """New credentials for a launch of a server, in place of the last one's: its token, and its OAuth client."""
        self.revoke_launch(server)
        note = f"Server at {server.prefix}"
        token, _ = self.create(server.user, note, server=server)
        owner = quote(server.user.name).replace("-", "%2D")  # or ada's server gpu would have ada-gpu's identifier
        return token, OAuthClient.create(
            identifier=f"jupyterhub-user-{owner}" + (f"-{quote(server.name)}" if server.name else ""),
            redirect_uri=f"{self.site.servers_origin(server.user.name)}{server.prefix}oauth_callback",
            secret=hash_token(token), description=note, server=server)

    def revoke_launch(self, server: Server) -> None:
        """Revoke the credentials of a launch, and with them all sign-ins to that server."""
        OAuthClient.delete().where(OAuthClient.server == server).execute()
        Token.delete().where(Token.server == server).execute()

    def revoke_all(self, user: User) -> None:
        """Revoke everything that acts for the user, or for their servers."""
        self.revoke_sign_ins(user)
        servers = Server.select(Server.id).where(Server.user == user)
        OAuthClient.delete().where(OAuthClient.server.in_(servers)).execute()
        Token.delete().where(Token.user == user).execute()

    def revoke_sign_ins(self, user: User, session_id: str = "") -> None:
        """Revoke OAuth codes and tokens, by which servers and services know the user, of a browser session or all."""
        with self.store.transaction():
            for model in (OAuthCode, Token):
                is_ended = model.session_id == session_id if session_id else model.client.is_null(False)
                model.delete().where((model.user == user) & is_ended).execute()

    def set_service_token(self, service: Service, spec: ServiceSpec, token: str) -> None:
        """Make this the token of the service, and the secret of its OAuth client."""
        hashed = hash_token(token)
        Token.delete().where((Token.service == service) & Token.client.is_null() & (Token.hashed != hashed)).execute()
        Token.insert(hashed=hashed, service=service, note=f"Service {spec.name}").on_conflict_ignore().execute()
        if spec.client_id:
            upsert(OAuthClient.identifier, spec.client_id, secret=hashed, redirect_uri=spec.oauth_redirect_uri,
                   description=f"Service {spec.name}", service=service)

    def find_client(self, identifier: str) -> OAuthClient:
        """The registered OAuth client. Raises BadRequest."""
        client = OAuthClient.get_or_none(OAuthClient.identifier == storable(identifier))
        if client is None:
            raise BadRequest("No such OAuth client. Its server may have been stopped: start it again")
        return client

    def redirect_uri_of(self, client: OAuthClient) -> str:
        """The only address codes for this client are sent to."""
        return client.redirect_uri or f"{self.site.mount.base}services/{client.service.name}/oauth_callback"

    def check_client(self, identifier: str, secret: str) -> OAuthClient:
        """The client with that secret. Raises OAuthError."""
        client = OAuthClient.get_or_none(OAuthClient.identifier == storable(identifier))
        if client is None or not hmac.compare_digest(client.secret, hash_token(secret)):
            raise OAuthError("invalid_client", "No such client, or not its secret", 401)
        return client

    def create_code(self, client: OAuthClient, user: User, session_id: str, challenge: str) -> str:
        """A code that the client can turn into a token, once and soon, if it meets the PKCE challenge (may be '')."""
        code = new_token()
        OAuthCode.create(hashed=hash_token(code), client=client, user=user, session_id=session_id, challenge=challenge,
                         expires_at=now() + timedelta(minutes=5))
        return code

    def redeem_code(self, client: OAuthClient, code: str, uri: str | None, verifier: str) -> tuple[str, Identity]:
        """An access token for a code, and whom it identifies. Uses up the code unless it raises OAuthError."""
        with self.store.transaction():
            row = OAuthCode.get_or_none((OAuthCode.hashed == hash_token(code)) & (OAuthCode.client == client)
                                        & (OAuthCode.expires_at > now()))
            if row is None or not OAuthCode.delete().where(OAuthCode.hashed == row.hashed).execute():
                raise OAuthError("invalid_grant", "The code is not valid")
            if uri not in (None, self.redirect_uri_of(client)):
                raise OAuthError("invalid_request", "Mismatching redirect URI.")
            if row.challenge and not hmac.compare_digest(row.challenge, challenge_of(verifier)):
                raise OAuthError("invalid_grant" if verifier else "invalid_request", "code_verifier is wrong")
            token, _ = self.create(row.user, expires_in=self.settings.cookie_lifetime, client=client,
                                   session_id=row.session_id)
        return token, self.identify(token)

    def purge(self) -> None:
        """Delete what has expired."""
        for model in (Token, OAuthCode):
            model.delete().where(model.expires_at <= now()).execute()


class Passage:
    """Keeps the cookies of the hub and of the site from users' servers, and tokens that they could use elsewhere.

    A hub token is exchanged for one that is good for this server only, or taken out where its owner may not enter.
    A service is the admin's own program: it gets the tokens it is sent, and the cookie that is meant for it."""

    def __init__(self, settings: Settings, tokens: Tokens, has_form: bool):
        self.settings, self.tokens, self.has_form = settings, tokens, has_form
        words = [re.escape(spec.api_token) for spec in settings.services if spec.api_token] + ["[0-9a-f]{32}"]
        self._token = re.compile(f"(?<![0-9A-Za-z])(?:{'|'.join(words)})(?![0-9A-Za-z])")

    def clear(self, environ: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """The WSGI environment as the server that a route's `data` names may see it."""
        hidden = {LOGIN_COOKIE} if "service" in data else HUB_COOKIES.union(self.settings.site_cookies)
        cleared = {**environ, "HTTP_COOKIE": strip_cookies(environ.get("HTTP_COOKIE", ""), hidden)}
        if "service" not in data:
            cleared |= {key: self._exchanged(value, data) for key, value in environ.items()
                        if key.startswith("HTTP_") and key != "HTTP_COOKIE"}
            query = environ.get("QUERY_STRING", "")
            cleared["QUERY_STRING"] = "&".join(self._exchanged(pair, data) for pair in query.split("&"))
            before, after = (token_in(headers.get("HTTP_AUTHORIZATION")) for headers in (environ, cleared))
            if not after and (before or not self.has_form):  # without a form it may hold the password for the site
                cleared["HTTP_AUTHORIZATION"] = ""
        return {key: value for key, value in cleared.items() if value != "" or not key.startswith("HTTP_")}

    def redirect_of(self, environ: dict[str, Any], data: dict[str, Any]) -> str | None:
        """The address without hub tokens if a browser opens a page with one, which every Referer would carry."""
        if environ["REQUEST_METHOD"] != "GET" or "text/html" not in environ.get("HTTP_ACCEPT", "") or "service" in data:
            return None
        pairs = environ.get("QUERY_STRING", "").split("&")
        kept = [pair for pair in pairs if self._exchanged(pair, data) == pair]
        return None if kept == pairs else request_target({**environ, "QUERY_STRING": "&".join(kept)})

    def _exchanged(self, text, data):
        """The text with its hub tokens exchanged, however it is quoted (a Referer quotes a page's `next` once more)."""
        plain = unquote(unquote(text, "latin-1"), "latin-1")
        exchanged = self._token.sub(lambda match: self.tokens.exchange(match[0], data), plain)
        if exchanged == plain:
            return text
        return exchanged if plain == text else quote(exchanged, safe="/?:;@=+,", encoding="latin-1")


########################################################################################################
# 11. Signing in
########################################################################################################

#: The rate limit of sign-ins: failures allowed by key. Addresses hold no blank, so that no name makes another's key.
FAILURES = (("address {address} name {name}", 5), ("name {name}", 50), ("address {address}", 200))
FAILURES_FORGOTTEN = 300  # seconds for which they count; a whole class can sit behind one address
FIRST_ADMIN = ["first admin"]  # the content of the first admin's link


class SignIn:
    """How people prove who they are: passwords, one-time links, cookies, and the site around the hub."""

    def __init__(self, settings: Settings, store: Store, site: Site, people: People, groups: Groups, tokens: Tokens,
                 authenticator: Authenticator):
        self.settings, self.store, self.site = settings, store, site
        self.people, self.groups, self.tokens, self.authenticator = people, groups, tokens, authenticator
        self.has_form = authenticator.has_form      # whether people sign in on the hub's page, or at the site around it
        self.logout_url = authenticator.logout_url or settings.logout_url  # after signing out; "": to the sign-in page

    def sign_in(self, credentials: dict[str, Any], environ: dict[str, Any], address: str,
                known_only: bool = False) -> User | None:
        """The user these credentials prove, who may be new unless `known_only`. Raises TooMany after many failures."""
        name = storable(self.authenticator.normalize(str(credentials.get("username") or ""))[:NAME_LENGTH])
        keys = {template.format(name=name, address=neighbourhood(address)): limit for template, limit in FAILURES}
        self._check_failures(keys)
        proven = self.authenticator.authenticate(credentials, environ)
        if proven is None or not is_valid_name(self.authenticator.normalize(proven)):
            self._count_failure(keys)
            log.info("sign-in failed: %r from %s", name, address)  # an invalid name can hold a line break
            return None
        Failure.delete().where(Failure.key == next(iter(keys))).execute()  # those for this name from this address
        user = self.people.get(proven) if known_only else self.people.find_or_create(proven)
        if user:
            self.people.note_visit(user)
            log.info("user %s signed in from %s", user.name, address)
        return user

    def _check_failures(self, keys):
        for row in Failure.select().where(Failure.key.in_(list(keys)) & ~is_over(Failure.until, FAILURES_FORGOTTEN)):
            if row.count >= keys[row.key]:
                wait = math.ceil(-seconds_since(row.until))
                raise TooMany(f"Too many failed sign-ins. Try again in {wait} seconds", retry_after=wait)

    def _count_failure(self, keys):
        self.purge()
        until = now() + timedelta(seconds=FAILURES_FORGOTTEN)
        (Failure.insert_many([{"key": key, "count": 1, "until": until} for key in keys])
         .on_conflict(conflict_target=[Failure.key], update={Failure.count: Failure.count + 1}).execute())

    def purge(self) -> None:
        """Delete failed sign-ins that do not count any more."""
        Failure.delete().where(is_over(Failure.until, FAILURES_FORGOTTEN)).execute()

    def host_user(self, environ: dict[str, Any]) -> User | None:
        """The user who is signed in at the host site, with the admin flag and the groups (of valid names) that it
        gives them now. Writes only what has changed. Raises BadRequest for an invalid name."""
        identified = self.authenticator.identify(environ)
        name, facts = identified if isinstance(identified, tuple) else (identified, {})
        if not name:
            return None
        user = self.people.find_or_create(name)
        admin = bool(facts.get("admin", user.admin)) or user.name in self.people.configured_admins
        if admin != user.admin:
            self.people.change(user, {"admin": admin})
        if "groups" in facts:
            self.groups.put(user, {group for group in facts["groups"] if is_valid_name(group)})
        return user

    def cookie_value(self, cookie: str, user: User) -> str:
        """The value that makes this cookie the user's, signed together with the cookie's name."""
        return self._signer(cookie).dumps([user.id, user.session_key])

    def user_of_cookie(self, cookie: str, value: str) -> User | None:
        """The user who was given this cookie, unless it is too old or they have signed out everywhere since."""
        if not self.has_form:  # our cookie would outlive the session at the host site
            return None
        try:
            user_id, session_key = _unsigned(self._signer(cookie), value, self.settings.cookie_lifetime)
        except (itsdangerous.BadSignature, ValueError, TypeError):
            return None
        return User.get_or_none((User.id == user_id) & (User.session_key == session_key))

    def xsrf_token(self, session_id: str, user: User | None) -> str:
        """The value by which a form proves that it came from the hub's pages, in this session, for this user."""
        text = f"xsrf:{session_id}:{user.session_key if user else ''}"
        return hmac.new(self.store.secret.encode(), text.encode(), hashlib.sha256).hexdigest()

    def _signer(self, salt):
        return itsdangerous.URLSafeTimedSerializer(self.store.secret, salt=salt)

    def sign_out(self, user: User, session_id: str) -> None:
        """End what the browser session has been given."""
        self.tokens.revoke_sign_ins(user, session_id)
        log.info("user %s signed out", user.name)

    def set_password(self, user: User, password: str) -> None:
        """Set a password, which ends links and sign-ins, to servers too. Raises BadRequest for a weak one."""
        if len(password) < 8 or len(password) > 1000 or password.strip().lower() == user.name:
            raise BadRequest("Choose a password of at least 8 characters that is not your name")
        user.password, user.session_key = hash_password(password), new_token()
        with self.store.transaction():
            user.save(only=[User.password, User.session_key])
            self.tokens.revoke_sign_ins(user)
            if user.admin:
                self.store.set_fact("has_had_admin", True)
        log.info("user %s has a new password", user.name)

    def link_for(self, user: User, origin: str = "") -> str:
        """A one-time link with which the user chooses a password. Raises BadRequest where the host signs people in."""
        return self.site.public_link(f"link/{self._links().dumps([user.id, user.session_key])}", origin)

    def first_admin_link(self) -> str:
        """The link with which the first admin chooses name and password. It works once in the life of a database."""
        origin = listening_address(from_outside=True) or ""
        return self.site.public_link(f"link/{self._links().dumps(FIRST_ADMIN)}", origin)

    def _links(self):
        if not self.has_form:
            raise BadRequest("People sign in at the site that this hub is a part of, and not with a link")
        return self._signer("minihub-link")

    def open_link(self, token: str) -> User | None:
        """The user a link is for; None: the first admin, who is yet to be created. Raises Forbidden and BadRequest."""
        try:
            content = _unsigned(self._links(), token, self.settings.link_lifetime)
        except itsdangerous.BadSignature:
            raise Forbidden("This link is not valid any more. Ask for a new one") from None
        if content == FIRST_ADMIN:
            if not self.needs_first_admin():
                raise Forbidden("This link has been used already. Sign in, or ask an admin for a link of your own")
            return None
        user = User.get_or_none((User.id == content[0]) & (User.session_key == content[1]))
        if user is None:
            raise Forbidden("This link has been used already. Ask for a new one")
        return user

    def use_link(self, token: str, name: str, password: str) -> User:
        """Set the password of the user a link is for, who may be a new admin. Raises Forbidden and BadRequest."""
        with self.store.transaction():
            self.store.lock("link")
            user = self.open_link(token)
            is_new = user is None and self.people.get(name) is None
            if user is None:
                user = self.people.insert(name, True) if is_new else self.people.find(name)
                self.people.change(user, {"admin": True})
            self.set_password(user, password)
        if is_new:
            tell(self.settings, "on_user_created", user.name)
        return user

    def needs_first_admin(self) -> bool:
        """Whether the first admin's link can be used: there never was an admin with a password."""
        if isinstance(self.authenticator, PasswordAuthenticator) and not self.store.fact("has_had_admin"):
            if not User.select().where(User.admin & User.password.is_null(False)).exists():
                return True
            self.store.set_fact("has_had_admin", True)
        return False

    def announce_first_admin(self) -> None:
        """Log the first admin's link, if there is no admin yet."""
        if self.needs_first_admin():
            link = self.first_admin_link()
            log.warning("minihub has no admin yet. Open this link to become the first one:\n\n    %s\n", link)


def _unsigned(signer, text, lifetime):
    """The content, if signed within `lifetime`, or in the future by a clock since set back. Raises BadSignature."""
    content, moment = signer.loads(text, return_timestamp=True)
    if seconds_since(moment) > lifetime:
        raise itsdangerous.BadSignature("too old")
    return content


########################################################################################################
# 12. Servers and routes
########################################################################################################

NO_PORT = "No free port was found for the server"
PORT_TAKEN = re.compile(r"address already in use|EADDRINUSE|port \S+ is (already in use|not available)", re.IGNORECASE)
INTERRUPTED_AFTER = 10  # seconds after which a start without a process was its worker's last act
MAX_ATTEMPTS = 3        # starts whose port somebody else has taken, or which were interrupted
PROBE_SECONDS = 0.8     # the deadline of a round in which the ticker probes all servers that are starting
GLANCE_SECONDS = 0.03   # the deadline of a request that probes the one server it is about
STARTS_PER_USER = 3     # of one user's servers, how many may be starting or waiting for that
STARTS_PER_CORE, LEAST_STARTS = 2, 4  # servers that this machine starts at the same time
UNKNOWN = object()      # the answer of a spawner that raises an exception

ROUTE_BY_PREFIX = CompiledQuery(
    Route.select().where(Route.prefix.in_(["", ""])), prefix=Route.prefix, target=Route.target, data=Route.data)


class Routes:
    """The proxy's routes: to the hub, to the servers that are ready, to the services with pages."""

    def __init__(self, settings: Settings, store: Store, site: Site, people: People, proxy: Proxy):
        self.settings, self.store, self.site = settings, store, site
        self.people, self.proxy = people, proxy
        self._is_down = False

    def find(self, base: str, path: str) -> tuple[str, dict[str, Any]] | None:
        """Target and data of the embedded proxy's longest route above a WSGI path, None if there is none."""
        if not path.startswith(("/user/", "/services/")) or not isinstance(self.proxy, EmbeddedProxy):
            return None
        _, kind, name, below, *_ = (path.encode("latin-1").decode("utf-8", "replace") + "//").split("/")
        shorter = f"{base}{kind}/{quote_name(name)}/"
        # A named server's route lies below that of the default one.
        rows = ROUTE_BY_PREFIX.run(self.store.database, shorter, f"{shorter}{quote_name(below)}/")
        longest = max(rows, key=lambda row: len(row.prefix), default=None)
        return longest and (longest.target, longest.data)

    def add(self, server: Server) -> None:
        """Route requests to the server. If the proxy does not answer, the ticker repeats it later."""
        with contextlib.suppress(Unavailable):  # which the ticker logs
            self.proxy.add_route(server.prefix, server.target, {"user": server.user.name, "server_name": server.name})

    def remove(self, server: Server) -> None:
        """Delete the server's route. If the proxy does not answer, the ticker repeats it later."""
        with contextlib.suppress(Unavailable):
            self.proxy.delete_route(server.prefix)

    def wanted(self) -> dict[str, dict[str, Any]]:
        """The routes that there should be."""
        mount = self.site.mount
        routes = [(mount.base, mount.address, {"hub": True})]
        routes += [(server.prefix, server.target, {"user": server.user.name, "server_name": server.name})
                   for server in _servers(Server.status == "ready")]
        routes += [(f"{mount.base}services/{spec.name}/", spec.target, {"service": spec.name})
                   for spec in self.settings.services if spec.target]
        return {prefix: {"routespec": prefix, "target": target, "data": data} for prefix, target, data in routes}

    def check(self) -> None:
        """Make the proxy's routes those that there should be, and learn from it who was active. Raises Unavailable."""
        actual = self.proxy.get_all_routes()  # first, so that no route is deleted that has come in between
        self.proxy.check_routes(self.wanted(), actual)
        for data in [route["data"] for route in actual.values()]:
            if data.get("user") and data.get("last_activity"):
                with contextlib.suppress(NotFound, BadRequest):  # the user or the server is gone
                    user, moment = self.people.find(data["user"]), parse_time(data["last_activity"])
                    self.people.record_activity(user, None, {data["server_name"]: moment})

    def supervise(self) -> None:
        """Keep an external proxy running if it is ours, and the routes up to date. Logs once when it goes down."""
        if isinstance(self.proxy, ConfigurableHTTPProxy):
            self.proxy.keep_running(f"{self.site.mount.address}{self.site.mount.hub}")
        try:
            self.check()
            self._is_down = False
        except Unavailable as error:
            if not self._is_down:
                log.warning("%s. Its routes will be brought up to date when it is back", error)
            self._is_down = True

    def move(self, changes: dict[str, Any]) -> None:
        """Work with another proxy, in all workers, and give it its routes. Raises BadRequest and Unavailable."""
        if changes and not isinstance(self.proxy, ConfigurableHTTPProxy):
            raise BadRequest("This hub carries the traffic itself. Set MINIHUB_PROXY to chp to work with another proxy")
        for key, value in changes.items():
            if not isinstance(value, str) and not (key == "port" and type(value) is int):
                raise BadRequest(f"{key} must be a string")
        if changes:
            self.proxy.move(changes)
            log.info("proxy: now %s", self.proxy.api()["api_url"])
        self.check()

    def stop_proxy(self) -> None:
        """End an external proxy, if the hub has started it."""
        if isinstance(self.proxy, ConfigurableHTTPProxy):
            self.proxy.stop_running()


class LifeCycle:
    """The transitions of a server, each one guarded UPDATE of its row: who changes no row has lost a race."""

    def __init__(self, settings: Settings, store: Store, site: Site, tokens: Tokens, routes: Routes, spawner: Spawner):
        self.settings, self.store, self.site = settings, store, site
        self.tokens, self.routes, self.spawner = tokens, routes, spawner

    def move(self, server: Server, status: str, **changes: Any) -> bool:
        """Change the row if it is still as `server` shows it. False: somebody else was faster; `server` shows how."""
        if status != server.status or "launch" in changes:
            changes["changed"] = now()
        changes["status"] = status
        same = _row_of(server) & (Server.status == server.status) & (Server.launch == server.launch)
        if not Server.update(**changes).where(same).execute():
            self.reload(server)
            return False
        server.__data__.update(changes)
        return True

    def reload(self, server: Server) -> None:
        """Make `server` what its row is now, or `is_deleted` if it has none any more."""
        fresh = Server.get_or_none(_row_of(server))
        server.is_deleted = fresh is None
        server.__data__.update(fresh.__data__ if fresh else {"status": "stopped"})

    def launch(self, server: Server) -> None:
        """Give a server that is spawning its credentials, then start its process."""
        with self.store.transaction():
            token, client = self.tokens.launch(server)
        variables = server_variables(self.site, server, token, client)
        try:
            self._claim_uid(server.user)
            state = self.spawner.start(launch_of(server, free_port(), variables))
            target = state["target"]
        except Exception as error:  # a hook that somebody else wrote
            log.exception("%s: the spawner failed", server.label)
            self.end(server, f"{type(error).__name__}: {error}")
        else:
            self._adopt(server, state, target)

    def _claim_uid(self, user):
        """Give the user a numeric account at the first start: the next of a counter, never one that somebody had."""
        if user.uid is None and self.spawner.free_uid(0) is not None:
            with self.store.transaction():
                self.store.lock("uid")
                user.uid = User.get_by_id(user.id).uid
                if user.uid is None:
                    user.uid = self.spawner.free_uid(self.store.fact("last_uid", 0) + 1)
                    self.store.set_fact("last_uid", user.uid)
                    User.update(uid=user.uid).where(User.id == user.id).execute()

    def _adopt(self, server, state, target):
        """Record the process of a start; if that start has been overtaken, end the process."""
        launch = server.launch
        try:
            if self.move(server, "spawning", state=state, target=target):
                return
        except pw.IntegrityError:  # another server was given the same port in the same moment
            _ask(server.label, self.spawner.stop, state, now=True)
            self._start_again(server, NO_PORT)
            return
        if server.launch == launch and server.status in ("spawning", "ready"):
            return  # another worker has adopted the same process
        _ask(server.label, self.spawner.stop, state, now=True)
        if server.launch == launch and server.status == "stopping":  # whoever gave the start up waits for this
            self.end(server, "")

    def _start_again(self, server, problem):
        """Begin the start once more, with another port, unless that has been tried often enough."""
        if server.attempts >= MAX_ATTEMPTS:
            self.end(server, problem)
        elif self.move(server, "spawning", launch=new_token(), attempts=server.attempts + 1, state=None, target=None):
            log.warning("server %s: starting again. %s", server.label, problem)
            self.launch(server)

    def look(self, server: Server, answers: bool = False) -> None:
        """Poll the server's process and move the row on; `answers` says whether a starting server answers requests."""
        if server.status in PENDING and server.state is None:
            self._recover(server)
        if server.state is None:
            return
        status = _ask(server.label, self.spawner.poll, server.state)  # None, too, if the spawner cannot tell
        if status is not None:
            self._note_end(server, status)
        elif server.status == "spawning" and answers:
            self._become_ready(server)
        elif server.status == "stopping":
            state = _ask(server.label, self.spawner.stop, server.state, otherwise=server.state)
            if state != server.state:
                self.move(server, "stopping", state=state)

    def _recover(self, server):
        """Go on with a start that has recorded no process: its worker is about to, or was killed before it could."""
        self.reload(server)  # whoever waits for this has an old copy of the row
        is_interrupted = not 0 <= seconds_since(server.changed) <= INTERRUPTED_AFTER  # or the clock was set
        if server.state or not (server.status == "stopping" or (server.status == "spawning" and is_interrupted)):
            return
        state = _ask(server.label, self.spawner.find, launch_of(server), otherwise=UNKNOWN)
        if state is UNKNOWN or not (state or is_interrupted):
            return
        if state and server.status == "stopping":
            self.move(server, "stopping", state=state)
        elif state:
            self._adopt(server, state, state["target"])
        elif server.status == "stopping":
            self.end(server, "")
        else:
            self._start_again(server, "The start of the server was interrupted")

    def _note_end(self, server, status):
        """Go on from the end of the process, which was asked for or not."""
        tail = self._log_tail(server)
        if server.status == "stopping":
            self.end(server, "")
        elif server.status == "ready":
            self.end(server, f"The server ended unexpectedly [status={status}]{tail}")
        elif PORT_TAKEN.search(tail):
            self._start_again(server, NO_PORT)
        else:
            self.end(server, f"The server ended while it started [status={status}]{tail}")

    def _become_ready(self, server):
        if self.move(server, "ready"):
            self.routes.add(server)
            log.info("server %s: ready at %s", server.label, server.target)
            url = self.site.servers_origin(server.user.name) + server.prefix
            tell(self.settings, "on_server_started", server.user.name, server.name, url)

    def give_up(self, server: Server) -> None:
        """End a start that has taken too long."""
        if self.move(server, "spawning"):  # else `server` was a stale copy of the row: its process may be doing well
            tail = self._log_tail(server)
            _ask(server.label, self.spawner.stop, server.state, now=True)
            self.end(server, f"The server did not answer within {self.settings.start_timeout:g} seconds{tail}")

    def _log_tail(self, server):
        tail = (_ask(server.label, self.spawner.log_tail, server.state) or "").strip()
        return f". Its last words:\n{tail}" if tail else ""

    def begin_stop(self, server: Server, **changes: Any) -> None:
        """Ask a server to end, or give up its start, unless somebody else has moved it on."""
        if server.status == "queued":  # there is nothing to wait for
            self.end(server, "")
        elif self.move(server, "stopping", **changes):
            self.routes.remove(server)
            log.info("server %s: stopping", server.label)
            self.look(server)

    def end(self, server: Server, failure: str) -> None:
        """Mark the server stopped; remove its route and credentials; record `failure` if there is one."""
        was_ready = server.status == "ready"
        with self.store.transaction():
            if not self.move(server, "stopped", state=None, target=None, failure=storable(failure)):
                return
            self.tokens.revoke_launch(server)
            log.info("server %s: stopped%s", server.label, failure and f": {failure.splitlines()[0]}")
            self.delete_forgotten(server)
        if was_ready:  # else it has no route: that at its prefix may be a namesake's, if the user has been deleted
            self.routes.remove(server)
        tell(self.settings, "on_server_stopped", server.user.label, server.name, failure)

    def delete_forgotten(self, server: Server) -> None:
        """Delete the row of a server that has stopped, if somebody has asked for that."""
        if Server.delete().where(_row_of(server) & (Server.status == "stopped") & Server.forget).execute():
            server.status, server.is_deleted = "stopped", True
            log.info("server %s: deleted", server.label)


def _servers(condition):
    return list(Server.select(Server, User).join(User).where(condition).order_by(Server.name))


def _row_of(server):
    """The condition for a server's row; SQLite may use the id of a deleted one again."""
    return (Server.id == server.id) & (Server.user == server.user_id) & (Server.name == server.name)


def _ask(label, question, *values, otherwise=None, **options):
    """The spawner's answer. Its errors are logged and treated as "unknown"; the next look retries."""
    try:
        return question(*values, **options)
    except Exception:  # a hook that somebody else wrote
        log.exception("%s: the spawner failed", label)
        return otherwise


def launch_of(server: Server, port: int = 0, variables: dict[str, str] | None = None) -> Launch:
    """The start that is under way, for the spawner to begin it or to find its process by."""
    return Launch(server.launch, server.user, server.name, server.user_options, server.prefix, port, variables or {})


def server_variables(site: Site, server: Server, token: str, client: OAuthClient) -> dict[str, str]:
    """The environment variables that jupyterhub-singleuser reads, 1.x to 6.x (JupyterHub's Spawner.get_env)."""
    settings, user, origin = site.settings, server.user, site.servers_origin(server.user.name)
    access = json.dumps([f"access:servers!server={user.name}/{server.name}", f"access:servers!user={user.name}"])
    return {
        **hub_variables(site, token, client.identifier, access),
        **({"JUPYTERHUB_ADMIN_ACCESS": "1"} if settings.admin_access else {}),
        "JUPYTERHUB_HOST": origin and settings.public_url, "JUPYTERHUB_OAUTH_CALLBACK_URL": client.redirect_uri,
        "JUPYTERHUB_USER": user.name, "JUPYTERHUB_SERVER_NAME": server.name,
        "JUPYTERHUB_ACTIVITY_URL": f"{site.mount.address}{site.mount.hub}api/users/{quote_name(user.name)}/activity",
        "JUPYTERHUB_SERVICE_PREFIX": server.prefix,
        "JUPYTERHUB_PUBLIC_URL": settings.public_url and (origin or settings.public_url) + server.prefix}


def hub_variables(site: Site, token: str, client_id: str, access: str) -> dict[str, str]:
    """The variables that servers and services have in common: where the hub is, and their credentials."""
    mount, public_url = site.mount, site.settings.public_url
    return {
        "JUPYTERHUB_API_TOKEN": token, "JPY_API_TOKEN": token, "JUPYTERHUB_CLIENT_ID": client_id,
        "JUPYTERHUB_API_URL": f"{mount.address}{mount.hub}api", "JUPYTERHUB_BASE_URL": mount.base,
        "JUPYTERHUB_OAUTH_ACCESS_SCOPES": access, "JUPYTERHUB_OAUTH_SCOPES": access,
        "JUPYTERHUB_OAUTH_CLIENT_ALLOWED_SCOPES": "[]", "JUPYTERHUB_COOKIE_HOST_PREFIX_ENABLED": "0",
        "JUPYTERHUB_PUBLIC_HUB_URL": public_url and f"{public_url}{mount.hub}"}


class Servers:
    """Users' servers: their rows, and what people and programs do with them."""

    def __init__(self, settings: Settings, store: Store, site: Site, people: People, tokens: Tokens, life: LifeCycle):
        self.settings, self.store, self.site = settings, store, site
        self.people, self.tokens = people, tokens
        self.life_cycle, self.spawner = life, life.spawner
        cores = len(getattr(os, "sched_getaffinity", lambda process: range(os.cpu_count() or 1))(0))
        self._room = settings.concurrent_spawn_limit or max(LEAST_STARTS, STARTS_PER_CORE * cores)
        self._watched: dict[str, float] = {}  # since when this process has looked at the starts that are under way

    def get(self, user: User, name: str) -> Server | None:
        """The user's server of that name; the default one, named "", has existed as long as the user."""
        return next(iter(_servers((Server.user == user) & (Server.name == storable(name)))), None)

    def find(self, user: User, name: str) -> Server:
        """The user's server of that name. Raises NotFound."""
        if server := self.get(user, name):
            return server
        raise NotFound(f"{user.name} has no server named '{name}'")

    def get_or_plan(self, user: User, name: str) -> Server:
        """The user's server of that name, or what it would be: its row is made by its start. Raises BadRequest."""
        if name and not self.settings.named_servers:
            raise BadRequest("Named servers are not enabled.")
        return self.get(user, check_server_name(name)) or Server(user=user, name=name)

    def find_or_create(self, user: User, name: str) -> Server:
        """The user's server of that name, made on its first use. Raises BadRequest over the limit of named servers."""
        with self.store.transaction():
            self.people.hold(user)  # others who make one of this user's servers wait
            server, limit = self.get_or_plan(user, name), self.settings.named_server_limit
            if not server.id and limit and len(self.of(user)) > limit:  # one of them is the default one
                raise BadRequest(f"User {user.name} already has the maximum of {limit} named servers.  One must be"
                                 " deleted before a new server can be created")
            return server if server.id else Server.create(user=user, name=name)

    def of(self, user: User) -> list[Server]:
        """The user's servers, the default one first."""
        return _servers(Server.user == user)

    def running(self) -> list[Server]:
        """All servers that are not stopped."""
        return _servers(Server.status.in_(ACTIVE))

    def start(self, server: Server, options: Any = None) -> None:
        """Start a server, without waiting, or queue it while too many others are starting; one that is starting goes
        on. Without `options` it gets its last start's.

        Raises BadRequest if it runs or is stopping, NotFound if it has been deleted, TooMany at a limit."""
        self.observe(server)
        while server.status not in SPAWN_PENDING:
            if server.is_deleted:
                raise NotFound(f"{server.label} has been deleted")
            if server.status != "stopped":
                problem = "pending stop" if server.status == "stopping" else "already running"
                raise BadRequest(f"{server.label} is {problem}")
            if self._queue(server, server.user_options if options is None else options):
                is_next = server.status == "spawning"
                log.info("server %s: %s", server.label, "starting" if is_next else self.place_of(server))
                return self.life_cycle.launch(server) if is_next else None

    def _queue(self, server, options):
        moment, prefix = now(), self.site.mount.server_prefix(server.user.name, server.name)
        with self.store.transaction():
            pending = self._check_limits(server)
            self.people.hold(server.user)
            User.update(last_activity=moment).where(User.id == server.user_id).execute()
            is_queued = self.life_cycle.move(
                server, "queued", launch=new_token(), attempts=pending, failure="", forget=False, prefix=prefix,
                started=moment, last_activity=moment, user_options=options)
            return is_queued and (self._take_turn(server) or True)

    def _check_limits(self, server):
        """How many starts of the same user are pending. Raises TooMany if that, or anything else, is too many."""
        self.store.lock("starts")
        active = list(Server.select(Server.user, Server.status).where(Server.status.in_(ACTIVE)).tuples())
        if 0 < (limit := self.settings.active_server_limit) <= len(active):
            raise TooMany(f"The hub runs {limit} servers already, which is its limit. Stop one first")
        pending = sum(owner == server.user_id and status in SPAWN_PENDING for owner, status in active)
        if pending >= STARTS_PER_USER:
            raise TooMany(f"{pending} servers of {server.user.name} are starting. Wait for one", retry_after=10)
        return pending

    def launch_queued(self) -> None:
        """Start servers that are queued, in their order, as far as there is room for them."""
        while server := self._next_in_line():
            self.life_cycle.reload(server)
            if not self._take_turn(server):
                return
            log.info("server %s: starting", server.label)
            self.life_cycle.launch(server)

    def _take_turn(self, server):
        with self.store.transaction():
            self.store.lock("starts")
            return server == self._next_in_line() and self.life_cycle.move(server, "spawning", attempts=1)

    def _next_in_line(self):
        """The first queued server that there is room for. Half of it is for users who have no server starting."""
        starting = [user_id for user_id, in Server.select(Server.user).where(Server.status == "spawning").tuples()]
        return next((server for server in self.line() if len(starting) < (
            self._room // 2 if server.user_id in starting else self._room)), None)

    def line(self) -> list[Server]:
        """The servers that are queued, without most columns, in the order of their starts: first come, first served,
        but everybody's first start before anybody's second."""
        queued = Server.select(Server.id, Server.user, Server.name).where(Server.status == "queued")
        return list(queued.order_by(Server.attempts, Server.changed, Server.id))

    def place_of(self, server: Server, line: list[Server] | None = None) -> str:
        """`4th in line`, for a server that is queued."""
        line = line or self.line()
        number = line.index(server) + 1 if server in line else 1  # if its turn has come meanwhile
        suffix = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
        return f"{number}{suffix} in line"

    def observe(self, server: Server) -> Server:
        """Take a look of a few milliseconds at a server, and move its row on; returns the same row."""
        self._look_at([server], GLANCE_SECONDS)
        return server

    def observe_pending(self) -> None:
        """Look at all servers that are on their way from one state to another, at all at once. Gives up starts that
        this worker has watched for too long, by a clock that nobody sets, and that stops while a laptop sleeps."""
        servers, moment = _servers(Server.status.in_(("spawning", "stopping"))), time.monotonic()
        self._watched = {server.launch: self._watched.get(server.launch, moment) for server in servers}
        self._look_at(servers, PROBE_SECONDS)
        for server in servers:
            watched = moment - self._watched.get(server.launch, moment)
            if server.status == "spawning" and watched > self.settings.start_timeout:
                self.life_cycle.give_up(server)

    def _look_at(self, servers, seconds):
        answering = probe([(server.target, server.prefix) for server in servers
                           if server.status == "spawning" and server.target], seconds)
        for server in servers:
            self.life_cycle.look(server, (server.target, server.prefix) in answering)

    def observe_ready(self) -> None:
        """Poll all servers that run, and stop those that are idle or too old."""
        for server in _servers(Server.status == "ready"):
            self.observe(server)
            due = stop_time(self.settings, server.started, server.last_activity)
            if server.status == "ready" and due and due <= now():
                log.info("server %s: idle or too old", server.label)
                self.life_cycle.begin_stop(server)  # which is no activity of the user's

    def stop(self, server: Server, forget: bool = False) -> None:
        """Stop a server or give up its start, without waiting; `forget` deletes a named one once it has stopped."""
        if forget:
            Server.update(forget=True).where(_row_of(server)).execute()
            self.life_cycle.reload(server)  # a start that was under way may have come before this
        self.observe(server)
        while server.status in (*SPAWN_PENDING, "ready"):
            moment = now()
            User.update(last_activity=moment).where(User.id == server.user_id).execute()
            self.life_cycle.begin_stop(server, last_activity=moment)
        self.life_cycle.delete_forgotten(server)

    def delete_user(self, user: User) -> None:
        """Delete a user: hidden at once, and gone when the last server has stopped. The home is set aside."""
        with self.store.transaction():
            self.people.hide(user)
            self.tokens.revoke_all(user)
        log.info("user %s deleted", user.label)
        self.finish_deletions()

    def finish_deletions(self) -> None:
        """Go on with deleted users whose servers were still running."""
        for user in list(User.select().where(User.leaving)):
            servers = self.of(user)
            for server in servers:
                self.stop(server)
            is_over = all(server.status == "stopped" for server in servers)
            # The row is held until the home has been set aside: no namesake gets that, and none loses a new one.
            with contextlib.suppress(NotFound), self.store.transaction():
                self.people.hold(user)
                if is_over and _ask(user.label, self.spawner.forget_user, user, otherwise=UNKNOWN) is not UNKNOWN:
                    user.delete_instance()

    def progress(self, servers: list[Server]) -> list[dict[str, Any]]:
        """The latest event in the progress of each server's start, whose `progress` is 100 at its end."""
        rows = {(row.id, row.user_id, row.name): row for row in _servers(Server.id.in_({row.id for row in servers}))}
        line = self.line() if any(row.status == "queued" for row in rows.values()) else []
        latest = [rows.get((row.id, row.user_id, row.name), Server(user=row.user, name=row.name)) for row in servers]
        return [self._event(server, line) for server in latest]

    def _event(self, server, line):
        if server.status == "queued":
            return {"progress": 10, "message": self.place_of(server, line)}
        if server.status == "spawning":
            return {"progress": 50, "message": "Spawning server..."}
        if server.status == "ready":
            url = self.site.server_url(server.user.name, server.name)
            return {"progress": 100, "ready": True, "message": f"Server ready at {url}",
                    "html_message": f'Server ready at <a href="{html.escape(url)}">{html.escape(url)}</a>', "url": url}
        problem = server.failure or f"{server.label} is not starting..."
        return {"progress": 100, "failed": True, "message": f"Spawn failed: {problem}"}


def stop_time(settings: Settings, started: datetime | None, last_activity: datetime | None) -> datetime | None:
    """When a server that stays idle will be stopped, if it will. One that never reports activity is never idle."""
    limits = []
    if settings.idle_timeout and has_reported(started, last_activity):
        limits.append(last_activity + timedelta(seconds=settings.idle_timeout))
    if settings.max_age and started:
        limits.append(started + timedelta(seconds=settings.max_age))
    return min(limits, default=None)


########################################################################################################
# 13. Services and the ticker
########################################################################################################

LEASE = 5             # seconds for which one worker is the only one that ticks
LONGEST_BACKOFF = 60  # seconds between two starts of a service that dies at once; one that has run for as long does not


class Services:
    """The programs of the setting `services`: their registration, and the processes of those with a command."""

    def __init__(self, settings: Settings, store: Store, site: Site, tokens: Tokens):
        self.settings, self.store = settings, store
        self.site, self.tokens = site, tokens

    def register(self) -> None:
        """Make the services of the settings the hub's; others are stopped and deleted."""
        with self.store.transaction():
            names = [spec.name for spec in self.settings.services]
            for service in list(Service.select().where(Service.name.not_in(names))):
                self._stop(service)
                service.delete_instance()
            for spec in self.settings.services:
                public = dataclasses.replace(spec, api_token="")
                upsert(Service.name, spec.name, admin=spec.admin, spec=dataclasses.asdict(public))
                if spec.api_token or not spec.command:  # else each start makes a token
                    self.tokens.set_service_token(self.find(spec.name), spec, spec.api_token or new_token())

    def list(self) -> list[Service]:
        """All services, by name."""
        return list(Service.select().order_by(Service.name))

    def find(self, name: str) -> Service:
        """The service of that name. Raises NotFound."""
        if service := Service.get_or_none(Service.name == storable(name)):
            return service
        raise NotFound(f"No such service: {name}")

    def supervise(self) -> None:
        """Start the services with a command that do not run, with exponential backoff if they die at once."""
        specs = {spec.name: spec for spec in self.settings.services if spec.command}
        for service in list(Service.select().where(Service.name.in_(list(specs)))):
            if not self._is_running(service):
                self._start(service, specs[service.name])

    def _is_running(self, service):
        """Whether it runs, or is being started. Takes over a process whose worker was killed before it recorded it."""
        if not service.state or service.state["pid"]:
            return service.state and poll_process(service.state) is None
        state, _ = find_process(Path(service.state["run"]))
        if state:
            Service.update(state=state).where(_same_start(service)).execute()
        return state or -LONGEST_BACKOFF <= seconds_since(service.next_start) <= INTERRUPTED_AFTER

    def _start(self, service, spec):
        """Start the service, unless it is too early or another worker does."""
        restarts = 0 if seconds_since(service.next_start) > LONGEST_BACKOFF else service.restarts
        next_start = now() + timedelta(seconds=min(LONGEST_BACKOFF, 2 ** restarts))
        run = Path(self.settings.run_dir) / f"service-{spec.name}@{secrets.token_hex(4)}"
        state = {"pid": 0, "identity": None, "run": str(run)}  # first, by which the process can be found
        is_due = _same_start(service) & is_over(Service.next_start, LONGEST_BACKOFF)
        if not Service.update(state=state, next_start=next_start, restarts=restarts + 1).where(is_due).execute():
            return
        service.next_start, state = next_start, None
        token = spec.api_token or new_token()
        with self.store.transaction():
            self.tokens.set_service_token(service, spec, token)
        try:
            words = [*(as_system_user(spec.user) if spec.user else ()), *spec.command]
            state = start_process(run, words, "service", heartbeat_of(self.settings), cwd=spec.cwd or None,
                                  env=self._variables(spec, token))
            log.info("service %s: started, pid %s", spec.name, state["pid"])
        except (OSError, KeyError, ValueError) as error:
            log.error("service %s cannot be started: %s", spec.name, error)
        if not Service.update(state=state).where(_same_start(service)).execute() and state:
            self._end(state)  # it is not to run any more, or another worker has been faster

    def _variables(self, spec, token):
        """The environment variables that HubAuth and HubOAuth of the package jupyterhub read."""
        prefix = f"{self.site.mount.base}services/{spec.name}/"
        access = json.dumps([f"access:services!service={spec.name}"])
        pages = {"JUPYTERHUB_SERVICE_URL": spec.url, "JUPYTERHUB_SERVICE_PREFIX": prefix} if spec.url else {}
        return {
            **self.settings.inherited_variables(), **hub_variables(self.site, token, spec.client_id, access),
            "JUPYTERHUB_SERVICE_NAME": spec.name, **pages, "JUPYTERHUB_SERVER_NAME": "",
            "JUPYTERHUB_HOST": "", "JUPYTERHUB_USER": spec.user,
            "JUPYTERHUB_OAUTH_CALLBACK_URL": spec.oauth_redirect_uri or f"{prefix}oauth_callback",
            "JUPYTERHUB_PUBLIC_URL": self.settings.public_url and self.settings.public_url + prefix, **spec.environment}

    def stop_all(self) -> None:
        """Stop the services that run, and start none for a minute: the hub is about to end."""
        Service.update(next_start=now() + timedelta(seconds=60)).execute()
        for service in self.list():
            self._stop(service)

    def _stop(self, service):
        state = service.state and (find_process(Path(service.state["run"]))[0] or service.state)
        if state and poll_process(state) is None:
            self._end(state)
            log.info("service %s: stopped", service.name)

    def _end(self, state):
        Path(f"{state['run']}.stop").touch()  # its supervisor kills it if it ignores the signal, with a hub or without
        stop_process(state, ((0, signal.SIGTERM),))


def _same_start(service):
    return (Service.id == service.id) & (Service.next_start == service.next_start)


class Ticker:
    """The thread that does what goes on by itself, in the one worker at a time that holds the lease.

    A job is a pair of the seconds between two runs (0: it runs in every round) and a function."""

    def __init__(self, store: Store, interval: float, jobs: Iterable[tuple[float, Callable[[], Any]]], heartbeat: Path):
        self.store, self.interval, self.heartbeat = store, interval, heartbeat
        self.due = {job: 0.0 for job in jobs}  # the monotonic time of each job's next run
        self._holder = secrets.token_hex(8)
        self._lock = threading.RLock()  # held during a round, in which a job may fork
        self._owner = 0                 # the process in which the thread runs
        self._over = threading.Event()  # set: the thread ends

    def tick(self) -> bool:
        """Run the jobs that are due. False if another worker holds the lease."""
        with contextlib.suppress(OSError):  # nobody has asked for it
            os.utime(self.heartbeat)  # first, as those who look at it must not die of trouble with the database
        with self.store.connected():
            return self._run_due()

    def _run_due(self):
        is_free = (Lease.holder == self._process) | is_over(Lease.expires, LEASE)
        expires = now() + timedelta(seconds=LEASE)  # then another worker ticks, if this one has stopped to
        lease = Lease.insert(job="ticker", holder=self._process, expires=expires).on_conflict(
            conflict_target=[Lease.job], preserve=[Lease.holder, Lease.expires], where=is_free)
        if not lease.as_rowcount().execute():
            return False
        for interval, run in self.due:
            if time.monotonic() >= self.due[interval, run]:
                self.due[interval, run] = time.monotonic() + interval
                run()
        return True

    @property
    def _process(self):
        return f"{self._holder}-{os.getpid()}"  # the children of a fork are others

    def start(self) -> None:
        """Start this process's thread, unless it runs already or the interval is 0."""
        if self._owner == os.getpid() or not self.interval:
            return
        with self._lock:
            if self._owner != os.getpid():
                self._owner, self._over = os.getpid(), threading.Event()
                threading.Thread(target=self._run, args=(self._over,), name="minihub-ticker", daemon=True).start()

    def start_in_workers(self) -> None:
        """Start the thread in this process, or in its workers if it has some: a forked child starts its own."""
        if not start_after_fork_of_host(self.start):
            on_fork = getattr(os, "register_at_fork", lambda **hooks: None)  # which Windows does not have
            # A fork waits until no round is under way, because whatever that holds would stay locked in the child.
            on_fork(before=self._lock.acquire, after_in_parent=self._end, after_in_child=self._lock.release)
            on_fork(after_in_parent=self._lock.release, after_in_child=self.start)
            self.start()

    def _end(self):
        self._over.set()
        self._owner = 0

    def _run(self, over):
        while not over.wait(self.interval):
            with self._lock:
                try:
                    if not over.is_set():
                        self.tick()
                except DatabaseTrouble as error:
                    self.store.note_trouble(error)
                except Exception:  # out of a hook that somebody else wrote
                    log.exception("the ticker failed, and will try again")
        self.store.disconnect()

    def close(self) -> None:
        """End the thread, after the round that is under way, and the lease."""
        with self._lock:
            self._end()
        with contextlib.suppress(DatabaseTrouble), self.store.connected():
            Lease.delete().where((Lease.job == "ticker") & (Lease.holder == self._process)).execute()


########################################################################################################
# 14. Visits: who is asking
########################################################################################################

API = "/hub/api"
BODY_LIMIT = 4 * 1024 * 1024  # bytes: some 100,000 user names
TOO_LATE = "This page was open for too long, or cookies are switched off."


@dataclass
class Visit:
    """One request to the hub: how it has come in, and, as far as that is known yet, who makes it."""
    client: Client
    mount: Mount
    is_inside: bool                 # of base_url
    session_id: str = ""            # of the browser session
    user: User | None = None        # who is signed in in the browser: use Visitors.user_of
    is_user_known: bool = False
    identity: Identity | None = None  # who makes an API request: set by the access hooks
    owner: User | None = None       # whose pages are asked for: set by needs_own_pages
    form: dict[str, str] = dataclasses.field(default_factory=dict)  # set by needs_xsrf

    def page(self, path: str = "") -> str:
        """The URL path of one of the hub's pages."""
        return self.mount.hub + path

    @property
    def scheme_and_host(self) -> str:
        """https://host as the client has used it."""
        return f"{self.client.scheme}://{self.client.host}"


class HubRequest(falcon.Request):
    """falcon's request, with the Visit that was made of it at the entrance."""
    visit = property(lambda self: self.env["minihub.visit"])


class Redirect(falcon.HTTPStatus):
    """Raised to send the client to another address."""

    def __init__(self, location: str, status: int = 302):
        super().__init__(status, headers={"Location": location})


class Visitors:
    """Who makes a request: by token, by the hub's cookie, or as the site around the hub says."""

    def __init__(self, settings: Settings, people: People, tokens: Tokens, sign_in: SignIn):
        self.settings, self.people, self.tokens, self.sign_in = settings, people, tokens, sign_in

    def user_of(self, req: HubRequest) -> User | None:
        """The user who is signed in in this browser, by the hub's cookie or at the host site."""
        visit = req.visit
        if not visit.is_user_known:
            visit.is_user_known = True  # first, for the error page, should the next line fail
            visit.user = (self.sign_in.user_of_cookie(LOGIN_COOKIE, req.cookies.get(LOGIN_COOKIE, ""))
                          or self.sign_in.host_user(req.env))
        return visit.user

    def identify(self, req: HubRequest) -> Identity | None:
        """Who makes this API request: the token's owner, or else who is signed in in the browser."""
        token = token_in(req.get_header("Authorization"))
        if token and (identity := self.tokens.identify(token)):
            self.tokens.note_use(identity)
            return identity
        user = self.user_of(req)
        if user is None or not self._is_from_hub_page(req):
            return None
        self.people.note_visit(user)
        return Identity.of_user(user, req.visit.session_id)

    def _is_from_hub_page(self, req):
        if req.method not in ("GET", "HEAD", "OPTIONS"):
            return self.is_own_form(req, {})
        _, _, referer = (req.get_header("Referer") or "").partition("://")  # as JupyterHub asks for it
        return referer.startswith(req.visit.client.host + req.visit.page())

    def xsrf_token(self, req: HubRequest) -> str:
        """The token that a form must carry to prove that it came from the hub's pages."""
        return self.sign_in.xsrf_token(req.visit.session_id, self.user_of(req))

    def is_own_form(self, req: HubRequest, form: dict[str, str]) -> bool:
        """Whether a form, or a script by its header, comes from a page that this browser session was shown."""
        token = req.get_header("X-XSRFToken") or form.get("_xsrf", "")
        return bool(req.visit.session_id) and hmac.compare_digest(token.encode(), self.xsrf_token(req).encode())

    def ensure_session(self, req: HubRequest, resp: falcon.Response) -> None:
        """Begin a browser session if there is none."""
        if not req.visit.session_id:
            req.visit.session_id = secrets.token_hex(16)
            self._set_cookie(req, resp, SESSION_COOKIE, req.visit.session_id, req.visit.mount.base)

    def sign_in_browser(self, req: HubRequest, resp: falcon.Response, user: User) -> None:
        """Give the browser the cookies of a user who has signed in."""
        max_age = int(self.settings.cookie_lifetime)
        for name, path in self._login_cookies(req):
            self._set_cookie(req, resp, name, self.sign_in.cookie_value(name, user), path, max_age)
        self.ensure_session(req, resp)
        req.visit.user, req.visit.is_user_known = user, True

    def sign_out_browser(self, req: HubRequest, resp: falcon.Response) -> None:
        """End what the browser session has been given, and take its cookies away."""
        self.sign_in.sign_out(self.user_of(req), req.visit.session_id)
        for name, path in (*self._login_cookies(req), (SESSION_COOKIE, req.visit.mount.base)):
            resp.unset_cookie(name, path=path)

    def _login_cookies(self, req):
        cookies = [(LOGIN_COOKIE, req.visit.page())]
        if any(spec.target for spec in self.settings.services):  # HubAuth of JupyterHub 1.x knows people by this cookie
            cookies.append((SERVICES_COOKIE, f"{req.visit.mount.base}services"))
        return cookies

    def _set_cookie(self, req, resp, name, value, path, max_age=None):
        resp.set_cookie(name, value, path=path, max_age=max_age, http_only=True, same_site="Lax",
                        secure=req.visit.client.scheme == "https")


class Resource:
    """A path of the API, or a page, with the collaborators that it may use."""

    def __init__(self, hub: Any):
        self.settings, self.store, self.site = hub.settings, hub.store, hub.site
        self.people, self.groups, self.tokens, self.sign_in = hub.people, hub.groups, hub.tokens, hub.sign_in
        self.routes, self.servers, self.services = hub.routes, hub.servers, hub.services
        self.visitors, self.splicer, self.shut_down = hub.visitors, hub.splicer, hub.shut_down


def require(condition: Any, message: str = "Forbidden") -> None:
    """Raises Forbidden unless the condition holds."""
    if not condition:
        raise Forbidden(message)


def needs_any(req, resp, resource, params):
    """For everybody the hub can identify, even by an OAuth token."""
    req.visit.identity = resource.visitors.identify(req)
    require(req.visit.identity, "Missing or invalid credentials.")


def needs_full(req, resp, resource, params):
    """For everybody with more than an OAuth token."""
    needs_any(req, resp, resource, params)
    require(req.visit.identity.client is None)  # an OAuth token serves only to identify its owner


def needs_admin(req, resp, resource, params):
    """For admins."""
    needs_full(req, resp, resource, params)
    require(req.visit.identity.admin)


def needs_self_or_admin(req, resp, resource, params):
    """For the user the path names, and for admins. Others learn nothing, not even whether there is such a user."""
    needs_full(req, resp, resource, params)
    identity = req.visit.identity
    require(identity.admin or (identity.kind == "user" and resource.people.is_same(params["name"], identity.name)))


def needs_api_token(req, resp, resource, params):
    """For services and servers that ask about others, with an API token and not a cookie."""
    needs_full(req, resp, resource, params)
    require(req.visit.identity.token_id)


def needs_login(req, resp, resource, params):
    """For people signed in in the browser. Others are sent to sign in and come back."""
    user = resource.visitors.user_of(req)
    if user is None:
        query = urlencode({"next": request_target(req.env)})
        is_page = req.method in ("GET", "HEAD")  # and not the address of a form, to which nobody comes back
        raise Redirect(req.visit.page("login") + (f"?{query}" if is_page else ""))
    resource.people.note_visit(user)


def needs_own_pages(req, resp, resource, params):
    """For the user the path names (without a name: who is signed in), and for admins."""
    needs_login(req, resp, resource, params)
    user = req.visit.user
    is_own = resource.people.is_same(params.get("name", user.name), user.name)
    require(user.admin or is_own, "This page belongs to somebody else")
    req.visit.owner = user if is_own else resource.people.find(params["name"])


def needs_admin_login(req, resp, resource, params):
    """For admins signed in in the browser."""
    needs_login(req, resp, resource, params)
    require(req.visit.user.admin, "This page is for admins")


def needs_xsrf(req, resp, resource, params):
    """For forms of the hub's own pages. Comes after the hook that finds out who is signed in."""
    req.visit.form = read_form(req)
    require(resource.visitors.is_own_form(req, req.visit.form), f"{TOO_LATE} Go back, reload it and try again")


def read_form(req: falcon.Request) -> dict[str, str]:
    """A form's fields, the last one of each name. Raises BadRequest for more than any of the hub's forms has."""
    body = read_body(req).decode("utf-8", "replace")
    try:
        return dict(parse_qsl(body, keep_blank_values=True, max_num_fields=1000))
    except ValueError:
        raise BadRequest("The form has too many fields") from None


def read_body(req: falcon.Request) -> bytes:
    """The request's body. Raises BadRequest, TooLarge and TooSlow."""
    stream = req.stream if req.get_header("Transfer-Encoding") else req.bounded_stream
    with host_of(req.env).reading():
        body = stream.read(BODY_LIMIT + 1)
    if len(body) > BODY_LIMIT:
        raise TooLarge(f"The body is longer than {BODY_LIMIT} bytes")
    return body


def is_for_programs(environ: dict[str, Any], path: str) -> bool:
    """Whether a request for a server comes from a program, which can do nothing with a page (JupyterHub's rule)."""
    accept, method = environ.get("HTTP_ACCEPT", ""), environ["REQUEST_METHOD"]
    prefers_json = "application/json" in accept and "text/html" not in accept
    return method not in ("GET", "HEAD") or "api" in path.split("/") or prefers_json or is_websocket(environ)


def is_api(req: falcon.Request) -> bool:
    """Whether the answer is for programs. The authorize endpoint is a page, despite its path."""
    return req.path.startswith(API) and not req.path.startswith(f"{API}/oauth2/authorize")


########################################################################################################
# 15. REST resources
########################################################################################################

OPTIONS_LIMIT = 64 * 1024  # characters of a start's options, which every list of users shows
DEPTH_LIMIT = 100          # levels of nesting in JSON: Python parses some 900, but may then fail to serialise them
PAGE_TYPE = "application/jupyterhub-pagination+json"
CHANGEABLE_USER_KEYS = {"name": str, "admin": bool, "auth_state": dict}
USER_KEYS = {"groups": list, **CHANGEABLE_USER_KEYS}
GROUP_KEYS = {"name": str, "users": list}
STREAMS_PER_USER = 20      # progress streams in one worker
LOOK_INTERVAL = 0.5        # seconds between two looks at the servers that progress streams are about
REQUESTED = {"progress": 0, "message": "Server requested"}


class VersionResource(Resource):
    """`/`: the API's version, and `/info`: those of all else and the hooks in use."""

    def on_get(self, req, resp):
        """Open to all: clients ask before they have a token."""
        resp.media = {"version": API_VERSION}

    @falcon.before(needs_admin)
    def on_get_info(self, req, resp):
        resp.media = {"version": API_VERSION, "python": sys.version, "sys_executable": sys.executable,
                      "authenticator": class_model(self.people.authenticator),
                      "spawner": class_model(self.servers.spawner)}


class UserResource(Resource):
    """`/users` (a POST creates those who are new, all or none), `/users/{name}` and `/users/{name}/activity`."""

    @falcon.before(needs_admin)
    def on_get_all(self, req, resp):
        page = Paging(req)
        users, total = self.people.list(req.get_param("state"), req.get_param("name_filter", default=""),
                                        req.get_param("sort", default="id"), page.offset, page.limit)
        rows = self.people.details_of(users, req.get_param_as_bool("include_stopped_servers", default=False))
        resp.media = page.model([user_model(self.site, details, state=True) for details in rows], total)

    @falcon.before(needs_admin)
    def on_post_all(self, req, resp):
        body = read_fields(req, "user", {"usernames": list, **USER_KEYS})
        if not body.get("usernames"):
            raise BadRequest("Must specify at least one user to create")
        rows = self.people.details_of(self.people.create_many(body["usernames"], body.get("admin", False)))
        resp.status, resp.media = 201, [user_model(self.site, details, servers=False) for details in rows]

    @falcon.before(needs_self_or_admin)
    def on_get(self, req, resp, name):
        details = self.people.details(name, req.get_param_as_bool("include_stopped_servers", default=False))
        admin = req.visit.identity.admin
        model = user_model(self.site, details, state=admin)
        resp.media = {**model, "auth_state": details.auth_state} if admin else model

    @falcon.before(needs_admin)
    def on_post(self, req, resp, name):
        user = self.people.create(name, read_fields(req, "user", USER_KEYS).get("admin", False))
        resp.status, resp.media = 201, user_model(self.site, self.people.details(user.name), servers=False)

    @falcon.before(needs_admin)
    def on_patch(self, req, resp, name):
        user = self.people.find(name)
        self.people.change(user, read_fields(req, "user", CHANGEABLE_USER_KEYS, required=True))
        details = self.people.details(user.name)
        resp.media = {**user_model(self.site, details, servers=False), "auth_state": details.auth_state}

    @falcon.before(needs_admin)
    def on_delete(self, req, resp, name):
        user = self.people.find(name)
        if user.id == req.visit.identity.user_id:
            raise BadRequest("Cannot delete yourself!")
        self.servers.delete_user(user)
        resp.status = 204

    @falcon.before(needs_self_or_admin)
    def on_post_activity(self, req, resp, name):
        """When the user (`last_activity`) and their servers were last used, as each server reports every 5 minutes."""
        own, body = req.visit.identity.user, read_object(req) or {}
        user = own if own and own.name == name else self.people.find(name)
        at, servers = body.get("last_activity"), body.get("servers") or {}
        if not isinstance(servers, dict) or not all(
                isinstance(entry, dict) and entry.get("last_activity") for entry in servers.values()):
            raise BadRequest("servers must be a dict of the form {server_name: {last_activity: timestamp}}")
        if not at and not servers:
            raise BadRequest("body must contain at least one of `last_activity` or `servers`")
        at = at and parse_time(at)
        moments = {name: parse_time(entry["last_activity"]) for name, entry in servers.items()}
        latest = max(filter(None, [at, *moments.values()]))
        if latest > now() + timedelta(minutes=59):  # clocks differ
            raise BadRequest(f"Rejecting activity from more than an hour in the future: {isoformat(latest)}")
        self.people.record_activity(user, at, moments)


class ServerResource(Resource):
    """`/users/{name}/server[s/{server_name}]` (202: it starts or stops) and its `/progress`, as server-sent events."""

    def __init__(self, hub: Any):
        super().__init__(hub)
        self.streams = ProgressStreams(self.store, self.servers)

    @falcon.before(needs_self_or_admin)
    def on_post(self, req, resp, name, server_name=""):
        user, options = self.people.find(name), read_object(req)
        if len(json.dumps(options)) > OPTIONS_LIMIT:
            raise BadRequest(f"The options of a start must not be longer than {OPTIONS_LIMIT} characters")
        server = self.servers.find_or_create(user, server_name)
        self.servers.start(server, options)
        if self.servers.observe(server).status == "stopped" and server.failure:
            raise HubError(f"{server.label}'s server failed to start. {server.failure}")
        resp.status = 201 if server.status == "ready" else 202
        resp.content_type = falcon.MEDIA_TEXT

    @falcon.before(needs_self_or_admin)
    def on_delete(self, req, resp, name, server_name=""):
        user, remove = self.people.find(name), read_fields(req, "server", {"remove": bool}).get("remove", False)
        server = self.servers.find(user, server_name)
        if remove and not server.name:
            raise BadRequest("Cannot delete the default server")
        if self.servers.observe(server).status == "spawning":
            raise BadRequest(f"{server.label} is pending spawn, please wait")
        self.servers.stop(server, forget=remove)
        resp.status = 204
        if self.servers.observe(server).status == "stopping":
            resp.status, resp.content_type = 202, falcon.MEDIA_TEXT

    @falcon.before(needs_self_or_admin)
    def on_get_progress(self, req, resp, name, server_name=""):
        server = self.servers.find(self.people.find(name), server_name)
        if server.status in ("stopping", "stopped") and not server.failure:
            raise BadRequest(f"{server.label} is not starting...")
        (event,), host = self.servers.progress([server]), host_of(req.env)
        number = host.socket_number()
        if event["progress"] == 100:
            resp.text = _encoded(event)
        elif number is None or self.splicer.is_full or req.method == "HEAD":
            resp.text = f"{_encoded(REQUESTED, event)}retry: 1000\n\n"  # an EventSource reconnects in a second
        else:
            self.streams.check_limit(req.visit.identity)
            handover = host.take_over(number)
            stream = ProgressStream(handover.client, self.streams, server, event, req.visit.identity.user_id)
            self.splicer.carry(stream)
            resp.content_length, resp.stream = 0, handover
        resp.content_type, resp.cache_control = "text/event-stream", ["no-cache"]


def _encoded(*events):
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events)


class ProgressStreams:
    """The progress streams of this process. One look at the database each half second is for all of them."""

    def __init__(self, store: Store, servers: Servers):
        self.store, self.servers = store, servers
        self.open: set[ProgressStream] = set()
        self._next_look = 0.0

    def check_limit(self, identity: Identity) -> None:
        """Raises TooMany if anybody but an admin follows too many starts."""
        number = sum(stream.user_id == identity.user_id for stream in list(self.open))
        if number >= STREAMS_PER_USER and not identity.admin:
            raise TooMany(f"User {identity.name} already has {number} progress streams. Close one first")

    async def look(self) -> None:
        """Give each stream its latest event, unless that was done less than half a second ago."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + 5  # for the others, while this look waits for the database
        await asyncio.get_running_loop().run_in_executor(None, self._look, list(self.open))
        self._next_look = time.monotonic() + LOOK_INTERVAL

    def _look(self, streams):
        try:
            with self.store.connected():
                for stream, event in zip(streams, self.servers.progress([stream.server for stream in streams])):
                    stream.event = event
        except DatabaseTrouble:
            self.store.disconnect()  # they are told in a moment


class ProgressStream(Connection):
    """A client that follows a start until it has ended. `user_id`: whose client it is."""

    def __init__(self, client: socket.socket, streams: ProgressStreams, server: Server, event: dict[str, Any],
                 user_id: int | None):
        super().__init__(client)
        self.streams, self.server, self.event, self.user_id = streams, server, event, user_id
        streams.open.add(self)

    async def serve(self) -> None:
        head = plain_response("200 OK", "text/event-stream", "", [("Cache-Control", "no-cache")])
        event = self.event
        try:
            await self.send(self.client, head + _encoded(REQUESTED, event).encode())
            while event["progress"] < 100:
                await asyncio.sleep(LOOK_INTERVAL)
                await self.streams.look()
                event, last = self.event, event
                news = _encoded(event).encode() if event != last else b"\n\n"
                await self.send(self.client, news)  # which fails once the client is gone
        finally:
            self.streams.open.discard(self)


class TokenResource(Resource):
    """`/users/{name}/tokens[/{token_id}]`, and `/authorizations/token`, which that has replaced."""

    @falcon.before(needs_self_or_admin)
    def on_get_all(self, req, resp, name):
        tokens = self.tokens.of(self.people.find(name))
        resp.media = {"api_tokens": [token_model(token) for token in tokens if not token.client_id],
                      "oauth_tokens": [token_model(token) for token in tokens if token.client_id]}

    def on_post_all(self, req, resp, name):
        """Create a token. Open to all, because the body may hold credentials."""
        body, identity = read_object(req) or {}, self.visitors.identify(req)
        note, expires_in = check_token_request(body)
        if identity:
            user = self._get_owner(identity, name)
        else:
            require(isinstance(body.get("auth"), dict), "Missing or invalid credentials.")
            user = self._sign_in(req, body["auth"], known_only=True)
            require(user == self.people.get(name), "Invalid username or password")
        if user is None:
            raise NotFound(f"No such user: {name}")
        by = f" by {identity.kind} {identity.name}" if identity and identity.user_id != user.id else ""
        token, row = self.tokens.create(user, note or f"Requested via api{by}", expires_in)
        log.info("user %s: new token%s", user.name, by)
        resp.status, resp.media = 201, {**token_model(row), "token": token}

    def on_post_deprecated(self, req, resp):
        """Create a token. Open to all, because the body may hold a password."""
        body, identity = read_object(req) or {}, self.visitors.identify(req)
        name = str(body.get("username") or (identity and identity.name))
        user = self._get_owner(identity, name) if identity else self._sign_in(req, body)
        if user is None:
            raise BadRequest(f"No such user '{name}'")
        if not identity and req.get_header("Origin") in (None, req.visit.scheme_and_host):  # else it is login CSRF
            self.visitors.sign_in_browser(req, resp, user)
        token, _ = self.tokens.create(user, "Requested via deprecated api")
        resp.media = {"token": token, "user": user_model(self.site, self.people.details(user.name), servers=False),
                      "warning": "/authorizations/token is deprecated in favour of /users/:name/tokens"}

    def _get_owner(self, identity, name):
        """The user of that name, or None, if the identity may have a token of theirs."""
        require(identity.client is None)
        user = self.people.get(name)
        is_own = user and user.id == identity.user_id
        require(identity.admin or is_own, "Only admins can request tokens for other users")
        return user

    def _sign_in(self, req, credentials, known_only=False):
        user = self.sign_in.sign_in(credentials, req.env, req.visit.client.address, known_only)
        require(user, "Invalid username or password")
        return user

    @falcon.before(needs_self_or_admin)
    def on_get(self, req, resp, name, token_id):
        resp.media = token_model(self.tokens.find(self.people.find(name), token_id))

    @falcon.before(needs_self_or_admin)
    def on_delete(self, req, resp, name, token_id):
        self.tokens.delete(self.tokens.find(self.people.find(name), token_id))
        resp.status = 204


def check_token_request(body: dict[str, Any]) -> tuple[str, float | None]:
    """The note of a new token and its lifetime in seconds (None: it does not expire). Raises BadRequest."""
    note, expires_in = body.get("note") or "", body.get("expires_in")
    if not isinstance(note, str) or "\0" in note or len(note) > 1000:
        raise BadRequest("note must be a string of at most 1000 characters")
    century = 100 * 365 * 24 * 3600  # a longer lifetime would overflow a date
    if expires_in is not None and not (type(expires_in) in (int, float) and 0 < expires_in < century):
        raise BadRequest("expires_in must be a number of seconds greater than 0")
    return note, expires_in


class IdentityResource(Resource):
    """`/user`, `/authorizations/token/{token}` and `/authorizations/cookie/{cookie_name}[/{cookie_value}]`."""

    @falcon.before(needs_any)
    def on_get_user(self, req, resp):
        """The client's own identity. Single-user servers 2.x and later ask this with every visitor's token."""
        resp.media = self._model(req.visit.identity)

    @falcon.before(needs_api_token)
    def on_get_token(self, req, resp, token):
        """The token's owner. Servers 1.x ask this; an OAuth token is valid only for its own server, and for admins."""
        asker, identity = req.visit.identity, self.tokens.identify(token)
        owner = identity and identity.client_server and identity.client_server.partition("/")[0]
        if identity is None or (owner and owner != asker.name and not asker.admin):
            raise NotFound("No such token, or it has expired")
        self.tokens.note_use(identity)
        resp.media = self._model(identity)

    @falcon.before(needs_api_token)
    def on_get_cookie(self, req, resp, cookie_name, cookie_value=""):
        value = unquote((cookie_value or read_body(req).decode("utf-8", "replace")).strip().strip('"'))
        user = cookie_name in HUB_COOKIES and self.sign_in.user_of_cookie(cookie_name, value)
        if not user:
            raise NotFound("No such cookie, or it has expired")
        resp.media = self._model(Identity.of_user(user))

    def _model(self, identity):
        """The API's model of a user or a service, with the token's facts of JupyterHub 2 and later."""
        if identity.kind == "user":  # whose token was looked up together with the details
            details = identity.user if identity.token_id else self.people.details(identity.name)
            model = user_model(self.site, details, servers=False)
        else:
            model = {"kind": "service", "name": identity.name, "admin": identity.admin}
        return {**model, "scopes": self.tokens.scopes_of(identity), "session_id": identity.session_id or None,
                "token_id": identity.token_id and f"{'o' if identity.client else 'a'}{identity.token_id}"}


class GroupResource(Resource):
    """`/groups` (a POST creates several, all or none), `/groups/{name}`, and its `/users` and `/properties`."""

    @falcon.before(needs_admin)
    def on_get_all(self, req, resp):
        page, groups = Paging(req), self.groups.list()
        resp.media = page.model(group_models(self.groups, groups[page.offset:][:page.limit]), len(groups))

    @falcon.before(needs_admin)
    def on_post_all(self, req, resp):
        body = read_fields(req, "groups", {"groups": list, "users": list})
        if not body.get("groups"):
            raise BadRequest("Must specify at least one group to create")
        groups = self.groups.create(body["groups"], body.get("users", []))
        resp.status, resp.media = 201, group_models(self.groups, groups)

    @falcon.before(needs_admin)
    def on_get(self, req, resp, name):
        resp.media, = group_models(self.groups, [self.groups.find(name)])

    @falcon.before(needs_admin)
    def on_post(self, req, resp, name):
        groups = self.groups.create([name], read_fields(req, "group", GROUP_KEYS).get("users", []))
        resp.status, resp.media = 201, group_models(self.groups, groups)[0]

    @falcon.before(needs_admin)
    def on_delete(self, req, resp, name):
        self.groups.delete(self.groups.find(name))
        resp.status = 204

    @falcon.before(needs_admin)
    def on_post_users(self, req, resp, name):
        self._change_members(req, resp, name, self.groups.add_members, "add")

    @falcon.before(needs_admin)
    def on_delete_users(self, req, resp, name):
        self._change_members(req, resp, name, self.groups.remove_members, "delete")

    @falcon.before(needs_admin)
    def on_put_properties(self, req, resp, name):
        group = self.groups.find(name)
        self.groups.set_properties(group, read_object(req, required=True))
        resp.media, = group_models(self.groups, [group])

    def _change_members(self, req, resp, name, change, verb):
        group, body = self.groups.find(name), read_fields(req, "group", GROUP_KEYS, required=True)
        if "users" not in body:
            raise BadRequest(f"Must specify users to {verb}")
        change(group, body["users"])
        resp.media, = group_models(self.groups, [group])


class ServiceResource(Resource):
    """`/services`, an object, though the contract says a list, as clients expect one, and `/services/{name}`."""

    @falcon.before(needs_full)
    def on_get(self, req, resp, name=None):
        identity = req.visit.identity
        require(identity.admin or (identity.kind, identity.name) == ("service", name))  # which may see itself
        if name:
            resp.media = service_model(self.site, self.services.find(name))
        else:
            resp.media = {service.name: service_model(self.site, service) for service in self.services.list()}


class ProxyResource(Resource):
    """`/proxy`: the routing table. POST brings it up to date, PATCH moves to another proxy, in all workers."""

    @falcon.before(needs_admin)
    def on_get(self, req, resp):
        resp.media = self.routes.proxy.get_all_routes()

    @falcon.before(needs_admin)
    def on_post(self, req, resp):
        self.routes.check()

    @falcon.before(needs_admin)
    def on_patch(self, req, resp):
        keys = ("ip", "port", "protocol", "api_url", "auth_token")
        self.routes.move({key: value for key, value in read_object(req, required=True).items() if key in keys})


class ShutdownResource(Resource):
    """`/shutdown`: the end of the hub, without the servers and with the proxy unless the body says otherwise."""

    @falcon.before(needs_admin)
    def on_post(self, req, resp):
        choices = {"servers": False, "proxy": True, **(read_object(req) or {})}
        for key in ("servers", "proxy"):
            if choices[key] not in (True, False):  # 1 and 0 are equal to these
                raise BadRequest(f"{key} must be true or false, got {choices[key]!r}")
        self.shut_down(bool(choices["servers"]), bool(choices["proxy"]), req.env)
        resp.status, resp.media = 202, {"message": "Shutting down Hub"}


def user_model(site: Site, details: UserDetails, servers: bool = True, state: bool = False) -> dict[str, Any]:
    """The API's User. `servers`: with the servers; `state`: with their state, which is for admins only."""
    default = next((server.status for server in details.servers if not server.name), "stopped")
    shown = {server.name: server_model(site, details.name, server, state) for server in details.servers if servers}
    return {"kind": "user", "name": details.name, "admin": details.admin, "groups": details.groups,
            "server": site.server_url(details.name, "") if default == "ready" else None,
            "pending": PENDING.get(default), "created": isoformat(details.created),
            "last_activity": isoformat(details.last_activity), "servers": shown if servers else None}


def server_model(site: Site, user_name: str, server: ServerDetails, state: bool = False) -> dict[str, Any]:
    """The API's Server; `state`: with its state, which is for admins only."""
    path = f"servers/{quote_name(server.name)}" if server.name else "server"
    model = {"name": server.name, "ready": server.status == "ready", "pending": PENDING.get(server.status),
             "started": isoformat(server.started), "last_activity": isoformat(server.last_activity),
             "url": site.server_url(user_name, server.name), "user_options": server.user_options or {},
             "progress_url": f"{site.mount.hub}api/users/{quote_name(user_name)}/{path}/progress",
             "state": (server.state or None) if state else None}
    if server.status == "stopped":
        model["stopped"] = True
    elif server.status == "ready" and (stops_at := stop_time(site.settings, server.started, server.last_activity)):
        model["stops_at"] = isoformat(stops_at)
    return model


def token_model(token: Token) -> dict[str, Any]:
    """The API's Token."""
    model = {"user": token.user.name, "created": isoformat(token.created),
             "last_activity": isoformat(token.last_activity), "expires_at": isoformat(token.expires_at)}
    if token.client_id:
        return {**model, "id": f"o{token.id}", "kind": "oauth", "oauth_client": token.client.description}
    return {**model, "id": f"a{token.id}", "kind": "api_token", "note": token.note}


def group_models(groups: Groups, shown: list[Group]) -> list[dict[str, Any]]:
    """The API's Groups with their members."""
    members = groups.members_of(shown)
    return [{"kind": "group", "name": group.name, "users": members.get(group.id, []),
             "properties": group.properties or {}} for group in shown]


def service_model(site: Site, service: Service) -> dict[str, Any]:
    """The API's Service."""
    spec = service.spec
    is_running = service.state and poll_process(service.state) is None
    return {"name": service.name, "admin": service.admin, "url": spec["url"], "command": spec["command"],
            "prefix": f"{site.mount.base}services/{service.name}/" if spec["url"] else "",
            "pid": service.state["pid"] if is_running else 0, "info": spec["info"], "display": spec["display"]}


def class_model(hook: Any) -> dict[str, str]:
    """A hook's class and the version of the package it comes from."""
    module = type(hook).__module__
    version = getattr(sys.modules.get(module.partition(".")[0]), "__version__", "unknown")
    return {"class": f"{module}.{type(hook).__qualname__}", "version": version}


class Paging:
    """The part of a list that a client asks for, and whether it accepts JupyterHub's pagination."""

    def __init__(self, req: HubRequest):
        self._req, self._is_accepted = req, PAGE_TYPE in (req.get_header("Accept") or "")
        self.offset = req.get_param_as_int("offset", min_value=0, max_value=2 ** 31, default=0)
        self.limit = req.get_param_as_int("limit", min_value=1, max_value=2 ** 31)
        if self._is_accepted:
            self.limit = min(self.limit or 50, 200)  # JupyterHub's default and maximum

    def model(self, items: list[Any], total: int) -> Any:
        """The plain list, or, for a client that accepts pagination, an object with the address of the next page."""
        if not self._is_accepted:
            return items
        pagination = {"offset": self.offset, "limit": self.limit, "total": total, "next": None}
        if (end := self.offset + len(items)) < total:
            following = {"offset": end, "limit": self.limit}
            url = self._req.visit.scheme_and_host + self._req.visit.mount.base[:-1] + quote(self._req.path)
            pagination["next"] = {**following, "url": f"{url}?{urlencode({**self._req.params, **following})}"}
        return {"items": items, "_pagination": pagination}


def read_fields(req: falcon.Request, owner: str, allowed: dict[str, type], required: bool = False) -> dict[str, Any]:
    """The body as an object of those keys and types, where a list holds strings. Raises BadRequest, naming `owner`."""
    body = read_object(req, required) or {}
    unknown = body.keys() - allowed.keys()
    if unknown:
        raise BadRequest(f"Invalid JSON keys: {', '.join(sorted(unknown))}")
    for key, value in body.items():
        if type(value) is not allowed[key]:
            raise BadRequest(f"{owner}.{key} must be {allowed[key]}, not: {type(value)}")
        if isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise BadRequest(f"{key} must be a list of strings")
    return body


def read_object(req: falcon.Request, required: bool = False) -> dict[str, Any] | None:
    """The body as a JSON object, whatever its content type (curl -d sends a form's), or None. Raises BadRequest."""
    body = read_body(req)
    try:
        value = json.loads(body) if body.strip() else None
        # Python also parses NaN, Infinity and lone surrogates, and reads 1e999 as an infinity.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise BadRequest("Invalid JSON in body of request") from None
    if is_deeper(value, DEPTH_LIMIT):
        raise BadRequest("Invalid JSON in body of request: it is nested too deeply")
    if isinstance(value, dict) or (value is None and not required):
        return value
    raise BadRequest(f"The body must be a JSON object, not {shortened(value)}")


def is_deeper(value: Any, levels: int) -> bool:
    """Whether a JSON value is nested more than `levels` deep."""
    if not isinstance(value, (list, dict)):
        return False
    items = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(is_deeper(item, levels - 1) for item in items)


########################################################################################################
# 16. The skeleton of pages
########################################################################################################

class Page(Resource):
    """The base of pages: HTML for people, with forms that work without JavaScript."""

    wants_session = True  # forms need a browser session, which the middleware begins before the responder

    def show(self, req: HubRequest, resp: falcon.Response, title: str, template: str, script: str = "",
             status: int = 200, **values: Any) -> None:
        """Answer with a page for whoever is signed in: `template` filled in with the values and with `{xsrf}`."""
        body = markup(template, xsrf=self.xsrf_field(req), **values)
        show_page(req, resp, self.visitors.user_of(req), title, body, script, status)

    def xsrf_field(self, req: HubRequest) -> Markup:
        """The hidden field that protects a form from cross-site request forgery."""
        return markup('<input type=hidden name=_xsrf value="{token}">', token=self.visitors.xsrf_token(req))


CSP = ("default-src 'none'; img-src 'self'; connect-src 'self'; base-uri 'none'; style-src {style};"
       " script-src {script}; frame-ancestors 'self'")


def show_page(req: HubRequest, resp: falcon.Response, user: User | None, title: str, body: Markup, script: str = "",
              status: int = 200) -> None:
    """Answer with a page that runs no script but `script`, is framed by no other site and stays in no cache."""
    resp.status, resp.content_type = status, falcon.MEDIA_HTML
    resp.text = render_page(req.visit.mount, title, body, user, script)
    resp.set_header("Content-Security-Policy", CSP.format(style=_csp_source(STYLE), script=_csp_source(script)))
    resp.set_header("Referrer-Policy", "same-origin")
    resp.cache_control = ["no-store"]


def _csp_source(text):
    """The CSP source that allows an inline style or script by its hash; 'none' for ''."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" if text else "'none'"


def render_page(mount: Mount, title: str, body: Markup, user: User | None = None, script: str = "") -> str:
    """A whole page for a signed-in `user` or nobody. A page with a script reloads itself where scripts do not run."""
    links = [("home", "Home")] + ([("admin", "People")] if user and user.admin else []) + [
        ("token", "Tokens"), ("logout", f"Sign out {user.name}")] if user else []
    nav = [markup('<a href="{href}">{text}</a>\n', href=mount.hub + path, text=text) for path, text in links]
    return markup(LAYOUT, title=title, hub=mount.hub, style=Markup(STYLE), logo=LOGO, nav=nav, body=body,
                  script=script and Markup(f"<script>{script}</script>"), reload=script and RELOAD)


def problem(message: str) -> Markup:
    """A box that says what has gone wrong; nothing for ''. The message's further lines are those of a log."""
    head, _, log_lines = message.partition("\n")
    tail = log_lines and markup("<pre>{lines}</pre>", lines=log_lines)
    return markup("<div class=problem role=alert>{head}{tail}</div>", head=head, tail=tail) if message else Markup("")


def error_body(mount: Mount, message: str) -> Markup:
    """The body of an error page, with a way out."""
    return markup('{problem}<p><a class="button quiet" href="{home}">To the home page</a></p>',
                  problem=problem(message), home=f"{mount.hub}home")


def error_title(status: int) -> str:
    """The title of an error page."""
    return {403: "Not allowed", 404: "Nothing here", 503: "Not just now"}.get(status, "That did not work")


class Markup(str):
    """Text that is HTML already."""


def markup(template: str, **values: Any) -> Markup:
    """`template` with its `{names}` filled in. All values are escaped but Markup; lists are joined."""
    return Markup(re.sub(r"\{([a-z_]+)\}", lambda match: _escaped(values[match[1]]), template))


def _escaped(value):
    if isinstance(value, Markup):
        return value
    if isinstance(value, (list, tuple)):
        return "".join(map(_escaped, value))
    return html.escape(str(value))


LAYOUT = """<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<title>{title} - minihub</title>
{reload}
<link rel=icon href="{hub}logo" type=image/svg+xml>
<style>{style}</style>
</head>
<body>
<header>
<a href="{hub}home">{logo}<span>minihub</span></a>
<nav>{nav}</nav></header>
<main>
<h1>{title}</h1>
{body}</main>
{script}
</body>
</html>
"""
RELOAD = Markup("<noscript><meta http-equiv=refresh content=2></noscript>")
LOGO = Markup("""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32" width="28" height="28" aria-hidden="true">
<rect width="32" height="32" rx="8" fill="#2456d6"/>
<path d="M16 16 8 9M16 16l8-7M16 16v9" stroke="#fff" stroke-width="2.5"/>
<g fill="#fff"><circle cx="16" cy="16" r="4.5"/><circle cx="8" cy="9" r="2.8"/>
<circle cx="24" cy="9" r="2.8"/><circle cx="16" cy="25" r="2.8"/></g></svg>""")

STYLE = """
:root { color-scheme: light dark; --ink: #1c2433; --soft: #5b6577; --paper: #f5f6f9; --card: #fff; --line: #d9dde6;
  --edge: #858ea0; --main: #2456d6; --on-main: #fff; --bad: #b3261e; --good: #1b7f4b }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaf1; --soft: #a3adc0; --paper: #12161f; --card: #1b2130;
  --line: #353e51; --edge: #717c93; --main: #7ea2ff; --on-main: #10141d; --bad: #ff9a91; --good: #6fd6a3 } }
* { box-sizing: border-box } p { margin: 0 0 .8rem } a { color: var(--main) }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
header { display: flex; justify-content: space-between; align-items: center; flex-wrap: wrap; gap: .5rem 1rem;
  padding: .6rem 1rem; background: var(--card); border-bottom: 1px solid var(--line) }
header a { display: inline-flex; align-items: center; gap: .5rem; color: inherit; text-decoration: none }
header > a { font-weight: 650 } nav a:hover { color: var(--main) }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; color: var(--soft) }
main { max-width: 46rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 1.2rem } h2 { font-size: 1.1rem; margin: 0 0 .6rem }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1.2rem; margin: 0 0 1rem }
label { display: block; font-weight: 600; margin: 0 0 .9rem } label small { font-weight: 400; color: var(--soft) }
input, textarea { display: block; width: 100%; margin-top: .25rem; padding: .6rem .7rem; font: inherit;
  font-weight: 400; color: inherit; background: var(--paper); border: 1px solid var(--edge); border-radius: 8px }
input[readonly] { color: var(--soft); border-color: var(--line) } ::placeholder { color: var(--soft); opacity: 1 }
button, .button { display: inline-block; padding: .5rem .95rem; font: inherit; font-weight: 600; text-decoration: none;
  color: var(--on-main); background: var(--main); border: 1px solid var(--main); border-radius: 8px; cursor: pointer }
.quiet { color: var(--main); background: none }
:is(button, a, input, textarea):focus-visible { outline: 3px solid var(--main); outline-offset: 2px }
.row { display: flex; flex-wrap: wrap; align-items: center; gap: .6rem }
.row > :first-child { flex: 1 1 7rem; min-width: 0 } .row > :first-child input { margin-top: 0 }
.row + .row { margin-top: .8rem; padding-top: .8rem; border-top: 1px solid var(--line) }
.row + .below { margin: .5rem 0 0 1rem; padding: 0; border: 0 } .actions { display: flex; flex-wrap: wrap; gap: .5rem }
.state { color: var(--soft); font-size: .9rem; display: block } .state.ready { color: var(--good) }
.problem { border-left: 4px solid var(--bad); padding: .6rem .9rem; background: var(--card); margin: 0 0 1rem }
pre, code { font: .85rem/1.45 ui-monospace, monospace; white-space: pre-wrap }
pre { margin: .6rem 0 0 } code { user-select: all } .card > :last-child { margin-bottom: 0 }
progress { width: 100%; height: 1rem; margin-bottom: .8rem; accent-color: var(--main) }
"""


########################################################################################################
# 17. OAuth2 endpoints
########################################################################################################

CONSENT_PAGE = """<form method=post class=card>
{xsrf}
{about}
<div class=actions>
<button>Open it</button>
<a class="button quiet" href="{home}">Not now</a></div></form>"""
ABOUT_SERVER = """<p>This is the server of <b>{name}</b>. Programs there will learn your name. What you change there,
you change for them. Open it only if you trust them: their pages can do here whatever you can.</p>"""
ABOUT_SERVICE = "<p>This is the service <b>{name}</b>. Programs there will learn your name.</p>"


class AuthorizeResource(Page):
    """`/oauth2/authorize`: a page, despite its path; browsers pass through it on their way to a server."""

    @falcon.before(needs_login)
    def on_get(self, req, resp):
        """Grants at once for the user's own server, else shows the consent page."""
        client = self._check_request(req)
        owner = client.server and client.server.user
        if owner.id == req.visit.user.id if owner else client.service.spec["oauth_no_confirm"]:
            raise self._grant(req, client)
        about = markup(ABOUT_SERVER, name=owner.name) if owner else markup(ABOUT_SERVICE, name=client.service.name)
        self.show(req, resp, "Open this server?" if owner else "Open this service?", CONSENT_PAGE, about=about,
                  home=req.visit.page("home"))

    @falcon.before(needs_login)
    @falcon.before(needs_xsrf)
    def on_post(self, req, resp):
        raise self._grant(req, self._check_request(req))

    def _check_request(self, req):
        """The client of a valid request. Raises BadRequest, Forbidden, or Redirect with an error for the client."""
        client = self.tokens.find_client(req.get_param("client_id", default=""))
        if req.get_param("redirect_uri") not in (None, self.tokens.redirect_uri_of(client)):
            raise BadRequest("Mismatching redirect URI.")
        if req.get_param("response_type") != "code":
            raise self._redirect(req, client, error="unsupported_response_type")
        challenge, method = req.get_param("code_challenge"), req.get_param("code_challenge_method")
        if challenge and not (method == "S256" and re.fullmatch(r"[A-Za-z0-9_-]{43}", challenge)):  # RFC 7636
            raise self._redirect(req, client, error="invalid_request")
        owner = client.server and client.server.user
        require(self.tokens.may_enter(Identity.of_user(req.visit.user), owner and owner.id),
                f"You may not open the server of {owner and owner.name}")
        return client

    def _grant(self, req, client):
        code = self.tokens.create_code(client, req.visit.user, req.visit.session_id,
                                       req.get_param("code_challenge", default=""))
        return self._redirect(req, client, code=code)

    def _redirect(self, req, client, **parameters):
        if state := req.get_param("state"):
            parameters["state"] = state
        uri = self.tokens.redirect_uri_of(client)
        return Redirect(f"{uri}{'&' if '?' in uri else '?'}{urlencode(parameters)}")


class OAuthTokenResource(Resource):
    """`/oauth2/token`: a single-user server exchanges a code for an access token."""

    def on_post(self, req, resp):
        """Open to all, because the client's secret is in the form (RFC 6749, 2.3.1)."""
        form = read_form(req)
        if form.get("grant_type") != "authorization_code":
            raise OAuthError("unsupported_grant_type", "grant_type must be authorization_code")
        client = self.tokens.check_client(form.get("client_id", ""), form.get("client_secret", ""))
        token, identity = self.tokens.redeem_code(client, form.get("code", ""), form.get("redirect_uri"),
                                                  form.get("code_verifier", ""))
        resp.set_headers({"Cache-Control": "no-store", "Pragma": "no-cache"})
        resp.media = {"access_token": token, "token_type": "Bearer", "scope": " ".join(self.tokens.scopes_of(identity)),
                      "expires_in": int(self.settings.cookie_lifetime)}


########################################################################################################
# 18. Pages of students
########################################################################################################

class RootPage(Resource):
    """`/`, `/hub` and `/hub/`."""

    def on_get(self, req, resp):
        """Open to all: leads to the hub's pages."""
        raise Redirect(req.visit.page("") + target_below(req.env, req.path))

    @falcon.before(needs_login)
    def on_get_hub(self, req, resp):
        raise Redirect(next_url(req))


def next_url(req: HubRequest) -> str:
    """Where `next` leads, if that is a path on this site (no open redirect), else home with the rest of the query."""
    target = req.get_param("next", default="")
    if re.fullmatch(r"/(?![/\\])[^\\\x00-\x20\x7f]*", target):  # browsers read \ as / and skip control characters
        return target
    query = urlencode([(name, value) for name, value in parse_qsl(req.query_string) if name not in ("next", "_xsrf")])
    return req.visit.page("home") + (query and f"?{query}")


SIGN_IN_FORM = """{problem}
<form method=post class=card>
{xsrf}
<label>Name
<input name=username autocomplete=username autocapitalize=none spellcheck=false required value="{name}" {focus}></label>
<label>Password
<input type=password name=password autocomplete=current-password required {focus_password}></label>
<button>Sign in</button></form>
<p class=state>{hint}</p>"""
LINK_HINT = "No password yet, or forgotten it? Ask your teacher for a sign-in link."
FIRST_ADMIN_HINT = Markup("This hub has no admin yet. The link for the first one is in the log, in the hub's terminal."
                          " The command <code>minihub link NAME --admin</code> makes one, too.")
AT_THE_SITE = Markup("<p class=card>Sign in at the site that this hub is a part of, then come back here.</p>")


class LoginPage(Page):
    """`/hub/login`."""

    def on_get(self, req, resp):
        """Open to all. Those who are signed in go on to `next`."""
        if self.visitors.user_of(req):
            raise Redirect(next_url(req))
        if self.sign_in.has_form:
            return self._show_form(req, resp)
        if url := self.settings.login_url:
            raise Redirect(f"{url}{'&' if '?' in url else '?'}{urlencode({'next': next_url(req)})}")
        self.show(req, resp, "Sign in", AT_THE_SITE)

    def on_post(self, req, resp):
        """Open to all. A wrong password shows the form again, with 200 as in JupyterHub."""
        if not self.sign_in.has_form:
            return self.on_get(req, resp)
        form = read_form(req)
        name = form.get("username", "")
        if not self.visitors.is_own_form(req, form):
            return self._show_form(req, resp, name, f"{TOO_LATE} Please sign in again.")
        try:
            user = self.sign_in.sign_in(form, req.env, req.visit.client.address)
        except TooMany as error:
            resp.set_header("Retry-After", str(error.retry_after))
            return self._show_form(req, resp, name, error.message, error.status)
        if user is None:
            return self._show_form(req, resp, name, "Wrong name or password.")
        self.visitors.sign_in_browser(req, resp, user)
        raise Redirect(next_url(req))

    def _show_form(self, req, resp, name="", message="", status=200):
        self.show(req, resp, "Sign in", SIGN_IN_FORM, status=status, problem=problem(message), name=name,
                  focus="" if name else "autofocus", focus_password="autofocus" if name else "",
                  hint=FIRST_ADMIN_HINT if self.sign_in.needs_first_admin() else LINK_HINT)


STILL_AT_THE_SITE = Markup("<p class=card>You are signed out of your servers, but not of the site that this hub is"
                           " a part of: sign out there, too.</p>")


class LogoutPage(Page):
    """`/hub/logout`: JupyterLab's menu leads here."""

    def on_get(self, req, resp):
        """Open to all, because it does nothing for those who are not signed in."""
        user = self.visitors.user_of(req)
        if user:
            self.visitors.sign_out_browser(req, resp)
        if not user or self.sign_in.has_form or self.sign_in.logout_url:
            raise Redirect(self.sign_in.logout_url or req.visit.page("login"))
        self.show(req, resp, "Signed out", STILL_AT_THE_SITE)


LINK_FORM = """{problem}
<form method=post class=card>
{xsrf}
<p>{intro}</p>
<label>Name
<input name=username autocomplete=username autocapitalize=none spellcheck=false value="{name}" {attributes}></label>
<label>New password <small>at least 8 characters</small>
<input type=password name=password autocomplete=new-password minlength=8 required {focus_password}></label>
<label>Once more
<input type=password name=again autocomplete=new-password minlength=8 required></label>
<button>Save and sign in</button></form>"""
FIRST_ADMIN_INTRO = "This hub has no admin yet. Choose the name and the password you will sign in with."
LINK_INTRO = "Welcome, {name}. From now on you sign in with this name and the password you choose here."


class LinkPage(Page):
    """`/hub/link/{token}`: a sign-in link, with which people choose their password."""

    def on_get(self, req, resp, token):
        """Open to whoever has the link."""
        self._show_form(req, resp, self.sign_in.open_link(token))

    def on_post(self, req, resp, token):
        """Open to whoever has the link, and has filled in the form on this very page."""
        form = read_form(req)
        try:
            if not self.visitors.is_own_form(req, form):  # or another site could sign people in with a link of its own
                raise BadRequest(f"{TOO_LATE} Please try again.")
            if form.get("password") != form.get("again"):
                raise BadRequest("The two passwords are not the same")
            user = self.sign_in.use_link(token, form.get("username", ""), form.get("password", ""))
        except BadRequest as error:
            user = self.sign_in.open_link(token)
            return self._show_form(req, resp, user, form.get("username", ""), error.message, error.status)
        self.visitors.sign_in_browser(req, resp, user)
        raise Redirect(req.visit.page("home"), status=303)

    def _show_form(self, req, resp, user, name="", message="", status=200):
        name = user.name if user else name
        self.show(req, resp, "Choose your password", LINK_FORM, status=status, problem=problem(message), name=name,
                  intro=LINK_INTRO.format(name=name) if user else FIRST_ADMIN_INTRO,
                  attributes="readonly" if user else "required" if name else "required autofocus",
                  focus_password="autofocus" if name else "")


SERVER_ROW = """<div class="row {style}">
<div><b>{name}</b><span class="state {status}">{state}</span></div>
<div class=actions>{actions}</div></div>"""
OPEN = '<a class=button href="{open}">Open</a>'
WATCH = '<a class=button href="{spawn}">Watch</a>'
START = '<form method=post action="{spawn}">{xsrf}<button>Start</button></form>'
STOP = '<form method=post action="{stop}">{xsrf}<button class=quiet>Stop</button></form>'
DELETE = '<form method=post action="{delete}">{xsrf}<button class=quiet>Delete</button></form>'
STATE_WORDS = dict(ready="running", queued="in line", spawning="starting", stopping="stopping", stopped="not running")
ACTIONS = {"ready": (OPEN, STOP), **dict.fromkeys(SPAWN_PENDING, (WATCH, STOP)), "stopping": (), "stopped": (START,)}


class ServersPage(Page):
    """The base of pages that show servers. `going_to` is the URL in a server that its visitor asked for."""

    def _show_server(self, req, resp, server, going_to="", status=200):
        state = "has failed" if server.failure else f"is {STATE_WORDS[server.status]}"
        self.show(req, resp, f"{_server_title(req, server)} {state}", "{card}", status=status,
                  card=self._server_card(req, [server], going_to))

    def _server_card(self, req, servers, going_to=""):
        """Servers with their buttons, and above them why the last ones have failed."""
        problems = [problem(f"{server.name}: {server.failure}" if server.name else server.failure)
                    for server in servers if server.failure]
        rows = [self.server_row(req, server, going_to) for server in servers]
        return markup("{problems}<section class=card>{rows}</section>", problems=problems, rows=rows)

    def server_row(self, req: HubRequest, server: Server, going_to: str = "", style: str = "") -> Markup:
        """A server's name, its state (with its end, if the settings end idle or old ones) and its buttons."""
        state = "failed" if server.failure else STATE_WORDS[server.status]
        stops_at = server.status == "ready" and stop_time(self.settings, server.started, server.last_activity)
        if server.status == "queued":
            state = self.servers.place_of(server)
        if stops_at:
            state = f"running; as things stand it will be stopped at {readable(stops_at)}"
        actions = ACTIONS[server.status]
        if server.status == "stopped" and server.name and server.id and not server.is_deleted:
            actions = (START, DELETE)
        urls = {page: _server_page(req, page, server, going_to) for page in ("spawn", "stop", "delete")}
        buttons = markup("\n".join(actions), open=self.site.server_url(server.user.name, server.name),
                         xsrf=self.xsrf_field(req), **urls)
        return markup(SERVER_ROW, style=style, name=server.name or _server_title(req, server), status=server.status,
                      state=state, actions=buttons)


def _server_title(req, server):
    return "Your server" if server.user_id == req.visit.user.id else f"{server.user.name}'s server"


def _server_page(req, page, server, going_to=""):
    """The URL of a page about a server, which keeps where in the server its visitor is going."""
    going_to = going_to or req.get_param("next", default="")
    path = "/".join([page, quote_name(server.user.name), *([quote_name(server.name)] if server.name else [])])
    return req.visit.page(path) + (f"?{urlencode({'next': going_to})}" if going_to else "")


def readable(moment: datetime | None) -> str:
    """`2026-11-24 13:46 UTC`, or `never`."""
    return f"{moment:%Y-%m-%d %H:%M} UTC" if moment else "never"


NAMED_SERVER_FORM = """<form method=post action="{action}" class=card>
{xsrf}
<h2>Another server</h2>
<p class=state>It runs beside the first one and has the same files.</p>
<div class=row>
<div><input name=server_name aria-label="Name of the new server" placeholder="a name, like project" required
 maxlength=63 autocapitalize=none pattern="[A-Za-z0-9][A-Za-z0-9_.~\\-]*" title="Letters, digits, - _ . and ~"></div>
<button class=quiet>Start</button></div></form>"""


class HomePage(ServersPage):
    """`/hub/home`: the servers of whoever is signed in."""

    @falcon.before(needs_own_pages)
    def on_get(self, req, resp):
        servers = self.servers.of(req.visit.user)
        if any(server.status == "stopping" for server in servers):
            resp.set_header("Refresh", "2")
        template = "{servers}" + (NAMED_SERVER_FORM if self.settings.named_servers else "")
        self.show(req, resp, f"Hello, {req.visit.user.name}", template, servers=self._server_card(req, servers),
                  action=req.visit.page("spawn"))


STARTING = """<section class=card id=progress data-events="{events}">
<p>The server opens here as soon as it is ready, a few seconds after its turn has come.</p>
<p><output>{news}</output></p>
<progress aria-label="starting"></progress>
<form method=post action="{stop}">{xsrf}<button class=quiet>Cancel</button></form></section>"""
#: At the end of the start, the page is loaded again, and then leads to the server or says why it has failed.
PROGRESS_SCRIPT = """
const events = new EventSource(document.getElementById("progress").dataset.events);
const leave = () => { events.close(); location.reload(); };
const show = (last) => last.progress === 100 ? leave() : document.querySelector("output").replaceChildren(last.message);
events.onmessage = (event) => show(JSON.parse(event.data));
events.onerror = () => { if (events.readyState === EventSource.CLOSED) setTimeout(leave, 2000); };
"""


class SpawnPage(ServersPage):
    """`/hub/spawn[/{name}[/{server_name}]]`: JupyterLab's "restart my server" leads here."""

    @falcon.before(needs_own_pages)
    def on_get(self, req, resp, name="", server_name=""):
        """Leads to the server, shows how it starts, or offers to start it: following a link starts nothing."""
        server = self.servers.observe(self.servers.get_or_plan(req.visit.owner, server_name))
        if server.status == "ready":
            prefix, target = req.visit.mount.server_prefix(server.user.name, server.name), next_url(req)
            origin = self.site.servers_origin(server.user.name)
            raise Redirect(origin + (target if target.startswith(prefix) else prefix))
        if server.status not in SPAWN_PENDING:
            return self._show_server(req, resp, server)
        path = f"servers/{quote_name(server.name)}" if server.name else "server"
        events = req.visit.page(f"api/users/{quote_name(server.user.name)}/{path}/progress")
        news = self.servers.place_of(server) if server.status == "queued" else ""
        self.show(req, resp, f"{_server_title(req, server)} is starting", STARTING, PROGRESS_SCRIPT, events=events,
                  news=news, stop=_server_page(req, "stop", server))

    @falcon.before(needs_own_pages)
    @falcon.before(needs_xsrf)
    def on_post(self, req, resp, name="", server_name=""):
        """Start the server, and lead to the page that shows how that goes."""
        server_name = server_name or req.visit.form.get("server_name", "")
        server = self.servers.observe(self.servers.find_or_create(req.visit.owner, server_name))
        if server.status == "stopped":
            self.servers.start(server)
        raise Redirect(_server_page(req, "spawn-pending", server), status=303)


class StopPage(Page):
    """`/hub/stop/{name}[/{server_name}]` and, to stop and delete a named server, `/hub/delete/{name}/{server_name}`."""

    @falcon.before(needs_own_pages)
    @falcon.before(needs_xsrf)
    def on_post(self, req, resp, name, server_name=""):
        self._stop(req, server_name)

    @falcon.before(needs_own_pages)
    @falcon.before(needs_xsrf)
    def on_post_delete(self, req, resp, name, server_name):
        self._stop(req, server_name, forget=True)

    def _stop(self, req, server_name, **options):
        self.servers.stop(self.servers.find(req.visit.owner, server_name), **options)
        raise Redirect(req.visit.page("home" if req.visit.owner == req.visit.user else "admin"), status=303)


NEW_TOKEN = """<section class=card role=status>
<h2>Your new token</h2>
<p><code>{token}</code></p>
<p class=state>Copy it now: it is not shown again.</p></section>"""
TOKEN_FORM = """<p>A token lets a program do in your name whatever you can do here. Keep it like a password.</p>
{new}
<form method=post class=card>
{xsrf}
<h2>New token</h2>
<div class=row>
<div><input name=note maxlength=200 aria-label="What it is for" placeholder="what it is for"></div>
<button>Make a token</button></div></form>
{list}"""
TOKEN_ROW = """<div class=row>
<div>{name}<span class=state>made {made}, last used {used}</span></div>
<form method=post>{xsrf}<button class=quiet name=revoke value="{id}">Revoke</button></form></div>"""


class TokenPage(Page):
    """`/hub/token`: the API tokens of whoever is signed in."""

    @falcon.before(needs_own_pages)
    def on_get(self, req, resp):
        self._show_tokens(req, resp)

    @falcon.before(needs_own_pages)
    @falcon.before(needs_xsrf)
    def on_post(self, req, resp):
        """Make a token, which is shown this once, or revoke the one that `revoke` names."""
        user, form = req.visit.user, req.visit.form
        if "revoke" in form:
            self.tokens.delete(self.tokens.find(user, form["revoke"]))
            raise Redirect(req.visit.page("token"), status=303)
        token, _ = self.tokens.create(user, storable(form.get("note", "")[:200]) or "Requested on the token page")
        self._show_tokens(req, resp, markup(NEW_TOKEN, token=token))

    def _show_tokens(self, req, resp, new=""):
        # A server's own token ends with the server and cannot be revoked here.
        tokens = [(token, token_model(token)) for token in self.tokens.of(req.visit.user) if token.server_id is None]
        rows = [markup(TOKEN_ROW, xsrf=self.xsrf_field(req), id=model["id"], made=readable(token.created),
                       name=model.get("note") or f"Browser signed in: {model.get('oauth_client')}",
                       used=readable(token.last_activity)) for token, model in tokens]
        listing = rows and markup("<section class=card>{rows}</section>", rows=rows)
        self.show(req, resp, "Tokens", TOKEN_FORM, new=new, list=listing)


class UserUrlPage(ServersPage):
    """`/user/...` and `/hub/user/...`: the address of a server that does not run."""

    def on_fallback(self, req, resp, rest=""):
        """Open to all: programs get an error; browsers go to /hub/user/, where they send the hub's cookie."""
        name, _, path = rest.partition("/")
        if is_for_programs(req.env, path):
            raise Unavailable(f"JupyterHub server no longer running at {req.visit.mount.base}user/{rest}. Restart the"
                              f" server at {self.settings.public_url}{req.visit.page(f'spawn/{quote_name(name)}')}")
        raise Redirect(req.visit.page("user/") + target_below(req.env, "/user/"))

    @falcon.before(needs_login)
    def on_explain(self, req, resp, rest=""):
        """Offers users their own server, and admins everybody's. Others go to the same path on their own server."""
        name, _, path = rest.partition("/")
        user = req.visit.user
        if not user.admin and not self.people.is_same(name, user.name):
            raise Redirect(self.site.server_url(user.name, "") + quote(path))
        owner = self.people.find(name)
        server = self.servers.observe(self.servers.get(owner, path.partition("/")[0]) or self.servers.find(owner, ""))
        above = "/".join(req.env["PATH_INFO"].split("/")[:4])  # /hub/user/NAME, however NAME is spelled
        here = req.visit.mount.server_prefix(owner.name, "") + target_below(req.env, f"{above}/")
        if server.status == "ready":
            self.routes.add(server)  # against an endless redirect, should the route be missing
            raise Redirect(self.site.servers_origin(owner.name) + here)
        self.visitors.ensure_session(req, resp)  # the middleware for pages does not see falcon's sinks
        self._show_server(req, resp, server, going_to=here, status=503)


class UserRedirectPage(Resource):
    """`/hub/user-redirect/{rest}`: a link that leads everybody to their own server."""

    @falcon.before(needs_login)
    def on_get(self, req, resp, rest=""):
        raise Redirect(self.site.server_url(req.visit.user.name, "") + target_below(req.env, "/hub/user-redirect/"))


class HealthPage(Resource):
    """`/hub/health`."""

    def on_get(self, req, resp):
        """Open to all: 200 and nothing else when the hub and its database answer."""
        self.store.fact("schema_version")


class ErrorPage(Page):
    """`/hub/error/{code}`: configurable-http-proxy shows it when a server does not answer."""

    def on_get(self, req, resp, code):
        """Open to all. The status is 200, because the proxy sets its own."""
        self.show(req, resp, error_title(code), "{problem}", problem=problem(
            "Nothing answers at this address just now." if code in (404, 503) else f"The proxy reports error {code}."))


class LogoPage(Resource):
    """`/hub/logo`, which single-user servers 1.x show, too."""

    def on_get(self, req, resp):
        """Open to all: a picture."""
        resp.content_type, resp.text = "image/svg+xml", LOGO
        resp.cache_control = ["max-age=86400"]


########################################################################################################
# 19. Pages of teachers
########################################################################################################

PEOPLE = """{news}
<form method=post class=card action="{action}">
{xsrf}
<h2>Add people</h2>
<label>Names, one a line
<textarea name=names rows=4 spellcheck=false autocapitalize=none required>{names}</textarea></label>
<button>Add</button></form>
<section class=card>
<h2>Everybody</h2>
<p class=state>A name leads to its server.{hint}</p>
{rows}</section>
<p class=state>{notice}</p>"""
LOST_LINK_HINT = " Whoever has lost their link or password gets a new sign-in link here."
PERSON_ROW = """<div class=row>
<div><a href="{spawn}"><b>{name}</b></a>{role}<span class=state>{seen}</span></div>
{link}</div>"""
NEW_LINK_FORM = '<form method=post action="{action}">{xsrf}<button class=quiet>Sign-in link</button></form>'
NEWS = """<section class=card role=status>
<h2>{title}</h2>
<p>{text}</p>
{others}
{rows}</section>"""
LINK_ROW = '<div class=row><b>{name}</b><code>{link}</code></div>'
ABOUT_LINKS = """Give each person their own link. It can be used once, to choose a password. Links are not shown again,
but you can always make new ones."""


class AdminPage(ServersPage):
    """`/hub/admin`: the people of the hub."""

    @falcon.before(needs_admin_login)
    def on_get(self, req, resp):
        self._show_people(req, resp)

    @falcon.before(needs_admin_login)
    @falcon.before(needs_xsrf)
    def on_post(self, req, resp):
        """Add the users named in the form, one a line, and show a sign-in link for each."""
        text = req.visit.form.get("names", "")
        names = [name.strip() for name in text.splitlines() if name.strip()]
        try:
            if not names:
                raise BadRequest("Write at least one name")
            users = self.people.create_many(names)
        except (BadRequest, Conflict) as error:
            return self._show_people(req, resp, problem(error.message), text, error.status)
        existing = set(map(self.people.normalize, names)) - {user.name for user in users}
        self._show_people(req, resp, self._news(req, users, existing))

    @falcon.before(needs_admin_login)
    @falcon.before(needs_xsrf)
    def on_post_link(self, req, resp, name):
        """Show a new sign-in link for a user who has lost the old one, or the password."""
        self._show_people(req, resp, self._news(req, [self.people.find(name)]))

    def _news(self, req, users, existing=()):
        others = existing and markup("<p>Here already: {names}</p>", names=", ".join(sorted(existing))) or ""
        if not self.sign_in.has_form:
            return markup(NEWS, title="Added", text=", ".join(user.name for user in users), others=others, rows="")
        links = [(user.name, self.sign_in.link_for(user, req.visit.scheme_and_host)) for user in users]
        rows = [markup(LINK_ROW, name=name, link=link) for name, link in links]
        return markup(NEWS, title="Sign-in links", text=ABOUT_LINKS, others=others, rows=rows)

    def _show_people(self, req, resp, news="", names="", status=200):
        users, _ = self.people.list()
        running = self.servers.running()
        rows = [self._person(req, user, [server for server in running if server.user_id == user.id]) for user in users]
        self.show(req, resp, "People", PEOPLE, status=status, news=news, action=req.visit.page("admin"), names=names,
                  rows=rows, hint=LOST_LINK_HINT if self.sign_in.has_form else "",
                  notice=self.servers.spawner.notice)

    def _person(self, req, user, servers):
        name = quote_name(user.name)
        link = markup(NEW_LINK_FORM, action=req.visit.page(f"admin/link/{name}"), xsrf=self.xsrf_field(req))
        row = markup(PERSON_ROW, spawn=req.visit.page(f"spawn/{name}"), name=user.name,
                     role=" (admin)" if user.admin else "", link=link if self.sign_in.has_form else "",
                     seen=f"last seen {readable(user.last_activity)}" if user.last_activity else "not seen yet")
        return [row, *(self.server_row(req, server, style="below") for server in servers)]


########################################################################################################
# 20. The WSGI application
########################################################################################################

USER = API + "/users/{name:text}"

#: Every path, whose parts in [...] may be left out, with its resource and the suffix of the responders' names.
PATTERNS = (
    (API + "[/]", VersionResource, None),
    (API + "/info", VersionResource, "info"),
    (API + "/users", UserResource, "all"),
    (USER, UserResource, None),
    (USER + "/activity", UserResource, "activity"),
    (USER + "/server", ServerResource, None),
    (USER + "/server/progress", ServerResource, "progress"),
    (USER + "/servers/[{server_name:text}]", ServerResource, None),
    (USER + "/servers/{server_name:text}/progress", ServerResource, "progress"),
    (USER + "/tokens", TokenResource, "all"),
    (USER + "/tokens/{token_id:text}", TokenResource, None),
    (API + "/user", IdentityResource, "user"),
    (API + "/groups", GroupResource, "all"),
    (API + "/groups/{name:text}", GroupResource, None),
    (API + "/groups/{name:text}/users", GroupResource, "users"),
    (API + "/groups/{name:text}/properties", GroupResource, "properties"),
    (API + "/services[/{name:text}]", ServiceResource, None),
    (API + "/proxy", ProxyResource, None),
    (API + "/authorizations/token", TokenResource, "deprecated"),
    (API + "/authorizations/token/{token:text}", IdentityResource, "token"),
    (API + "/authorizations/cookie/{cookie_name:text}[/{cookie_value:text}]", IdentityResource, "cookie"),
    (API + "/oauth2/authorize", AuthorizeResource, None),
    (API + "/oauth2/token", OAuthTokenResource, None),
    (API + "/shutdown", ShutdownResource, None),
    ("/", RootPage, None),
    ("/hub", RootPage, None),
    ("/hub/", RootPage, "hub"),
    ("/hub/login", LoginPage, None),
    ("/hub/logout", LogoutPage, None),
    ("/hub/link/{token:text}", LinkPage, None),
    ("/hub/home", HomePage, None),
    ("/hub/spawn[/{name:text}[/{server_name:text}]]", SpawnPage, None),
    ("/hub/spawn-pending/{name:text}[/{server_name:text}]", SpawnPage, None),
    ("/hub/stop/{name:text}[/{server_name:text}]", StopPage, None),
    ("/hub/delete/{name:text}/{server_name:text}", StopPage, "delete"),
    ("/hub/token", TokenPage, None),
    ("/hub/admin", AdminPage, None),
    ("/hub/admin/link/{name:text}", AdminPage, "link"),
    ("/hub/user-redirect/{rest:path}", UserRedirectPage, None),
    ("/hub/error/{code:int}", ErrorPage, None),
    ("/hub/health", HealthPage, None),
    ("/hub/logo", LogoPage, None),
)
ROUTES = [(path, kind, suffix) for pattern, kind, suffix in PATTERNS
          for path in itertools.accumulate(pattern.rstrip("]").split("["))]

NO_DATABASE = "The hub's database does not answer just now. Nothing is lost; try again in a moment."
NO_ANSWER = "This server does not answer just now. It may be busy, or about to stop. Try again in a moment."


class Hub:
    """A notebook hub as a WSGI application. Takes the fields of `Settings` as keywords; raises SettingError.
    Its attributes are the collaborators that do the work, each of which uses only those before it."""

    def __init__(self, **settings: Any):
        self.settings = settings = Settings(**settings)
        authenticator = load_hook("authenticator", settings.authenticator, AUTHENTICATORS, Authenticator)
        spawner = load_hook("spawner", settings.spawner, SPAWNERS, Spawner)
        proxy = load_hook("proxy", settings.proxy, PROXIES, Proxy)
        demand(not settings.user_url or isinstance(proxy, EmbeddedProxy), "user_url", "needs the hub's own proxy",
               settings.user_url)
        self.store = Store(settings.database)
        for hook in (authenticator, spawner, proxy):
            hook.settings = settings
        self.splicer = Splicer()
        self.carrier = CarrierClient(settings, self.splicer)
        proxy.store, proxy.carrier = self.store, self.carrier
        self.site = Site(settings, self.store)
        self.people = People(settings, self.store, authenticator)
        self.groups = Groups(self.store, self.people)
        self.tokens = Tokens(settings, self.store, self.site, self.people)
        self.sign_in = SignIn(settings, self.store, self.site, self.people, self.groups, self.tokens, authenticator)
        self.routes = Routes(settings, self.store, self.site, self.people, proxy)
        life_cycle = LifeCycle(settings, self.store, self.site, self.tokens, self.routes, spawner)
        self.servers = Servers(settings, self.store, self.site, self.people, self.tokens, life_cycle)
        self.services = Services(settings, self.store, self.site, self.tokens)
        self.ticker = Ticker(self.store, settings.tick_interval, self._jobs(), heartbeat_of(settings))
        self.visitors = Visitors(settings, self.people, self.tokens, self.sign_in)
        self.shut_down = Shutdown(settings, self.store, self.servers, self.services, self.routes)
        self._entrance = Entrance(settings, self.site)
        self._passage = Passage(settings, self.tokens, authenticator.has_form)
        self._envelope = Envelope(self.store, self.visitors)
        self._pages = make_pages(self, self._envelope.make_app())
        self._begin()

    def _jobs(self):
        """The ticker's jobs, each with its interval in seconds."""
        yield 0, self.servers.observe_pending
        yield 1, self.services.supervise
        yield 1, self.servers.finish_deletions
        yield 0, self.servers.launch_queued
        yield 5, self.routes.supervise
        yield 10, self.servers.observe_ready
        yield 60, self.tokens.purge
        yield 60, self.sign_in.purge
        yield math.inf, self.sign_in.announce_first_admin

    def _begin(self):
        self.servers.spawner.check()
        self.store.prepare(self._apply_settings)

    def _apply_settings(self):
        self.people.admit_configured_admins()
        self.services.register()

    def __call__(self, environ: dict[str, Any], start_response: Callable) -> Iterable[bytes]:
        """Answer from the user's server that the path belongs to, else from the hub's own pages and API."""
        environ = self._entrance.enter(environ)
        try:
            with host_of(environ).handling(), self.store.connected():
                self._entrance.check(environ)
                self.site.arrive(environ["minihub.visit"].mount)
                self.ticker.start()
                if route := self.routes.find(environ["minihub.visit"].mount.base, environ["PATH_INFO"]):
                    return self._forward(environ, start_response, *route)
                return self._pages(environ, start_response)
        except (HubError, Redirect, *DatabaseTrouble) as refusal:
            return self._envelope.refuse(refusal, environ, start_response)

    def _forward(self, environ, start_response, target, data):
        """Pass a request on to the server at `target`, without the hub's secrets."""
        if location := self._passage.redirect_of(environ, data):
            raise Redirect(location)
        visit = environ["minihub.visit"]
        is_for_program = is_for_programs(environ, environ["PATH_INFO"])
        refusals = [unavailable_response(visit.mount, is_for_program, why) for why in (NO_ANSWER, TOO_MANY_CONNECTIONS)]
        environ = self._passage.clear(environ, data)
        return self.routes.proxy.forward(environ, start_response, target, visit.client, *refusals)

    def wrap(self, application: Callable) -> Callable:
        """A WSGI application: this hub for `base_url` and hub/, user/ and services/ below it, else `application`."""
        return lambda environ, start_response: (
            self if self._entrance.is_for_hub(environ) else application)(environ, start_response)

    def create_users(self, names: list[str], admin: bool = False) -> list[User]:
        """Create those users who are new, all or none. Raises BadRequest for invalid names, Conflict if none is new."""
        with self.store.connected():
            return self.people.create_many(names, admin)

    def delete_user(self, name: str) -> None:
        """Delete a user and stop their servers, without waiting. The home is set aside. Raises NotFound."""
        with self.store.connected():
            self.servers.delete_user(self.people.find(name))

    def start_server(self, name: str, server_name: str = "", options: dict[str, Any] | None = None) -> str:
        """Start a user's server and return its URL at once; `on_server_started` tells when it is ready. Without
        `options` it gets those of its last start. One that is starting goes on. Until the hub's first request tells its
        mount point, the URL is below `base_url`. Raises NotFound for an unknown user, BadRequest if it runs or is
        stopping, TooMany at a limit."""
        with self.store.connected():
            server = self.servers.find_or_create(self.people.find(name), server_name)
            self.servers.start(server, options)
            return self.site.servers_origin(server.user.name) + server.prefix

    def stop_server(self, name: str, server_name: str = "") -> None:
        """Stop a user's server, without waiting; `on_server_stopped` tells when it has ended. Raises NotFound."""
        with self.store.connected():
            self.servers.stop(self.servers.find(self.people.find(name), server_name))

    def tick(self) -> bool:
        """Do what is due: look at servers, supervise services, clean up. False if another worker holds the lease."""
        return self.ticker.tick()

    def close(self) -> None:
        """End the hub's threads in this process, its connections and a database in memory. Servers and services go on.
        A later request starts the threads again. Not for callbacks, which the threads themselves may run."""
        self.ticker.close()
        self.carrier.close()
        self.splicer.close()
        self.store.close()


class CommandLineHub(Hub):
    def _begin(self):
        """Leave services, admins and processes alone: a shell may lack the settings and rights of the hub that runs."""


class Entrance:
    """The way of a request into the hub: makes its Visit, and refuses it if it has come to the wrong place."""

    def __init__(self, settings: Settings, site: Site):
        self.settings, self.site = settings, site
        self._above = settings.base_url.rstrip("/").encode().decode("latin-1")  # as PATH_INFO spells it (PEP 3333)

    def enter(self, environ: dict[str, Any]) -> dict[str, Any]:
        """The request's environ as seen from inside the hub, below the mount point and base_url, with its Visit."""
        script, path = environ.get("SCRIPT_NAME", ""), environ.get("PATH_INFO") or "/"
        base = quote(f"{script}{self._above}/", safe="/@~", encoding="latin-1")
        is_inside = f"{path}/".startswith(f"{self._above}/")
        if is_inside:
            script, path = script + self._above, path[len(self._above):] or "/"
        address = self.settings.hub_url or host_of(environ).own_address or self.site.last_address
        visit = Visit(Client.of(environ, self.settings.trusted_proxies), Mount(base, address), is_inside)
        return {**environ, "SCRIPT_NAME": script, "PATH_INFO": path, "minihub.visit": visit}

    def check(self, environ: dict[str, Any]) -> None:
        """Raises HubError for a request that cannot be served here, Redirect for one that belongs elsewhere."""
        host_of(environ).check()
        visit, is_read = environ["minihub.visit"], environ["REQUEST_METHOD"] in ("GET", "HEAD")
        origin = self.settings.user_url and self._origin_of(environ["PATH_INFO"], visit.client.host)
        if origin and not is_host_of(origin, visit.client.host):
            location = origin + request_target(environ)
            if not is_read or is_websocket(environ):
                raise Misdirected(f"This is to be found at {location} only")
            raise Redirect(location)
        if not visit.is_inside and not is_read:
            raise NotFound(f"The hub is below {self.settings.base_url}")
        if not visit.is_inside:  # JupyterHub, too, leads to the same path among its pages
            raise Redirect(visit.page() + target_below(environ, "/"))

    def _origin_of(self, path, host):
        """Where a path is to be found: servers on user_url only, the hub's own pages on all hosts but those."""
        _, kind, name, *_ = f"{path}//".split("/")
        if kind == "user" and name:  # not normalized: a route is for one spelling of a name, and belongs on one host
            return self.site.servers_origin(name.encode("latin-1").decode("utf-8", "replace"))
        return self.settings.public_url if is_host_of(self.settings.user_url, host) else ""

    def is_for_hub(self, environ: dict[str, Any]) -> bool:
        """Whether a request to a site that the hub is wrapped around is for the hub."""
        if is_host_of(self.settings.user_url, Client.of(environ, self.settings.trusted_proxies).host):
            return True  # the site's pages must not be found where students' are
        path = f"{environ.get('PATH_INFO', '')}/"
        is_front = self._above != "" and path.rstrip("/") == self._above  # a hub at / leaves the site its front page
        return is_front or path.startswith(tuple(f"{self._above}/{part}/" for part in ("hub", "user", "services")))


class Envelope:
    """What surrounds the hub's own responses: the browser session, the headers, and errors, as JSON for programs and as
    pages for people, without internals."""

    def __init__(self, store: Store, visitors: Visitors):
        self.store, self.visitors = store, visitors

    def make_app(self) -> falcon.App:
        """A falcon application, still without routes."""
        application = falcon.App(middleware=[self], request_type=HubRequest)
        application.add_error_handler((falcon.HTTPError, Exception), self.render)
        return application

    def refuse(self, error: Exception, environ: dict[str, Any], start_response: Callable) -> Iterable[bytes]:
        """Answer with an error a request that has not come to falcon."""
        def fail(req, resp, **params):
            raise error

        environ["minihub.visit"].is_user_known = True  # as nobody: the database may be away
        application = self.make_app()
        application.add_sink(fail)
        return application(environ, start_response)

    def process_request(self, req, resp):
        session_id = req.cookies.get(SESSION_COOKIE, "") if "HTTP_COOKIE" in req.env else ""
        req.visit.session_id = session_id if re.fullmatch(r"[0-9a-f]{32}", session_id) else ""

    def process_resource(self, req, resp, resource, params):
        if getattr(resource, "wants_session", False):
            self.visitors.ensure_session(req, resp)

    def process_response(self, req, resp, resource, req_succeeded):
        resp.set_header("X-JupyterHub-Version", API_VERSION)
        resp.set_header("X-Content-Type-Options", "nosniff")
        if is_api(req):
            resp.set_header("Access-Control-Allow-Headers", "accept, content-type, authorization")
            resp.set_header("Content-Security-Policy", "frame-ancestors 'self'; default-src 'none'")

    def render(self, req: HubRequest, resp: falcon.Response, error: Exception, params: Any) -> None:
        shown = self._as_hub_error(req, error)
        resp.status, resp.retry_after = shown.status, shown.retry_after
        if isinstance(error, falcon.HTTPError):
            resp.set_headers(error.headers or {})
        if isinstance(error, OAuthError):
            resp.media = {"error": error.error, "error_description": error.message}
        elif is_api(req) or (req.path.startswith("/user/") and is_for_programs(req.env, req.path)):
            resp.media = {"status": shown.status, "message": shown.message}
        else:
            body = error_body(req.visit.mount, shown.message)
            show_page(req, resp, self.visitors.user_of(req), error_title(shown.status), body, status=shown.status)

    def _as_hub_error(self, req, error):
        """The error in words for the client; it is logged if it is not the client's."""
        if isinstance(error, HubError):
            return error
        if isinstance(error, falcon.HTTPError):
            shown = HubError(error.description or error.title.removeprefix(f"{error.status_code} "))
            shown.status = error.status_code
            if isinstance(error, falcon.HTTPNotFound) and not is_api(req):
                shown.message = "There is no page at this address"
            return shown
        req.visit.user, req.visit.is_user_known = None, True  # do not ask a database that may be away
        if isinstance(error, DatabaseTrouble):
            self.store.note_trouble(error)
            return Unavailable(REPLACED if str(error) == REPLACED else NO_DATABASE, retry_after=5)
        if isinstance(error, Overtaken):
            log.warning("%s %r was overtaken by another request", req.method, req.path, exc_info=error)
            return Conflict("Somebody else has changed this in the same moment. Look at it again")
        log.error("%s %r failed", req.method, req.path, exc_info=error)
        return HubError("Internal Server Error")


@functools.lru_cache(64)  # every request for a server takes one along
def unavailable_response(mount: Mount, is_for_program: bool, message: str) -> bytes:
    """The whole response for a request that no server answers, sent where there is no worker and no database."""
    content_type, body = "application/json", json.dumps({"status": 503, "message": message})
    if not is_for_program:
        content_type, body = "text/html", render_page(mount, "No answer", error_body(mount, message))
    return plain_response("503 Service Unavailable", content_type, body, [("Retry-After", "5")])


class NonEmptyConverter(falcon.routing.BaseConverter):
    """A path segment that is not empty: `/users/` is not the user with the empty name."""

    def convert(self, value):
        return value or None


def make_pages(hub: Hub, application: falcon.App) -> falcon.App:
    """The application, with the hub's own pages and API. Where there is GET, there is HEAD."""
    application.router_options.converters["text"] = NonEmptyConverter
    resources = {kind: kind(hub) for _, kind, _ in ROUTES}
    for path, kind, suffix in ROUTES:
        tail = f"_{suffix}" if suffix else ""
        if hasattr(kind, f"on_get{tail}"):
            setattr(resources[kind], f"on_head{tail}", getattr(resources[kind], f"on_get{tail}"))
        application.add_route(path, resources[kind], suffix=suffix)
    fallback = UserUrlPage(hub)
    application.add_sink(fallback.on_fallback, r"/user/(?P<rest>.*)")
    application.add_sink(fallback.on_explain, r"/hub/user/(?P<rest>.*)")
    return application


class Shutdown:
    """The end of the hub, by POST /shutdown. Only a server that runs nothing but `minihub:app` is ended, with all its
    workers. Somebody else's application is never killed: the setting `on_shutdown` is called instead."""

    def __init__(self, settings: Settings, store: Store, servers: Servers, services: Services, routes: Routes):
        self.settings, self.store, self.servers, self.services, self.routes = settings, store, servers, services, routes
        self.owns_host = False  # true for minihub.app

    def __call__(self, servers: bool, proxy: bool, environ: dict[str, Any]) -> None:
        """End services, on demand servers and proxy, and, once this request is answered, the WSGI server."""
        log.warning("shutting down%s%s", ", with all servers" if servers else "", ", with the proxy" if proxy else "")
        for server in self.servers.running() if servers else ():
            self.servers.stop(server)
        self.services.stop_all()
        if proxy:
            self.routes.stop_proxy()
        threading.Thread(target=self._end_host, args=(servers, environ), name="minihub-shutdown").start()

    def _end_host(self, servers, environ):
        """Wait for servers that are to end, as only this hub escalates their signals, then end what runs the hub."""
        deadline = time.monotonic() + 20
        with self.store.connected():
            while servers and time.monotonic() < deadline and self.servers.running():
                self.servers.observe_pending()
                time.sleep(0.1)
        self.store.disconnect()
        if self.settings.on_shutdown:
            self.settings.on_shutdown()
        elif not (self.owns_host and host_of(environ).end()):
            log.warning("the WSGI server goes on: the hub cannot end it, and the setting on_shutdown is not set")


def __getattr__(name):
    """`minihub.app`, made from the `MINIHUB_*` variables when it is first asked for."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not log.hasHandlers():  # the program that runs the hub has set up no logging: use gunicorn's format
        text = "[%(asctime)s] [%(process)d] [%(levelname)s] %(message)s"
        logging.basicConfig(format=text, datefmt="%Y-%m-%d %H:%M:%S %z")
        log.setLevel(logging.INFO)
    globals()["app"] = hub = Hub(**vars(Settings.from_environ()))
    hub.shut_down.owns_host = True
    hub.ticker.start_in_workers()
    GunicornHost.watch_clients()
    return hub


########################################################################################################
# 21. Command line
########################################################################################################

def main(arguments: list[str] | None = None) -> int:
    """`python -m minihub`: an admin's commands at the machine itself, with the `MINIHUB_*` variables of the hub."""
    parser = argparse.ArgumentParser(prog="minihub", description="A notebook hub. Run it with: gunicorn minihub:app")
    parser.add_argument("--version", action="version", version=f"minihub {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    link = commands.add_parser("link", help="print a one-time link with which NAME chooses a (new) password")
    link.set_defaults(run=_print_link)
    link.add_argument("name", metavar="NAME")
    link.add_argument("--admin", action="store_true", help="and make NAME an admin")
    token = commands.add_parser("token", help="print a new API token for NAME")
    token.set_defaults(run=lambda hub, options: print(
        hub.tokens.create(hub.people.find(options.name), "Requested on the command line")[0]))
    token.add_argument("name", metavar="NAME")
    backup = commands.add_parser("backup", help="copy the database (SQLite) into the new FILE, while the hub runs")
    backup.set_defaults(run=lambda hub, options: hub.store.backup(options.file))
    backup.add_argument("file", metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        settings = Settings.from_environ()
        path = os.path.abspath(settings.database.removeprefix("sqlite:///").partition("?")[0])
        if settings.database.startswith("sqlite:") and not os.path.exists(path):  # else it would be made, for no hub
            raise NotFound(f"There is no database {path}. Run this in the folder of the hub, or set MINIHUB_DATABASE")
        hub = CommandLineHub(**vars(settings))
        with hub.store.connected():
            options.run(hub, options)
    except (HubError, SettingError, *DatabaseTrouble) as error:
        print(f"minihub: {error}", file=sys.stderr)
        return 1
    return 0


def _print_link(hub, options):
    user = hub.people.get(options.name) or hub.people.create(options.name)
    if options.admin:
        hub.people.change(user, {"admin": True})
    print(hub.sign_in.link_for(user))


if __name__ == "__main__":
    import minihub  # the module of that name, whose classes hooks derive from

    sys.exit(minihub.main())
