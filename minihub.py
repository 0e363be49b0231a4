"""minihub: a notebook hub in one file, as a WSGI application.

It speaks the JupyterHub REST API 1.2, starts real single-user Jupyter servers, carries their traffic,
is their OAuth2 provider, and has the pages people click. Run it by itself:

    gunicorn minihub:app

or mount it in any WSGI site:

    from minihub import Hub
    from werkzeug.middleware.dispatcher import DispatcherMiddleware

    site.wsgi_app = DispatcherMiddleware(site.wsgi_app, {"/lab": Hub(database="sqlite:///lab.sqlite")})

Contents:  1 imports   2 settings   3 errors, time, secrets, names   4 models   5 authenticators
           6 spawners   7 proxies   8 the hub's operations   9 who is asking   10 REST resources
           11 OAuth2 provider   12 pages   13 the WSGI application   14 command line
"""

########################################################################################################
# 1. Imports
########################################################################################################

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import hmac
import html
import http.client
import importlib
import ipaddress
import itertools
import json
import logging
import math
import os
import re
import resource
import secrets
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import string
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import falcon
import itsdangerous
import peewee as pw
from playhouse.db_url import connect as database_from_url

__version__ = "0.1.0"
__all__ = ["Hub", "Settings", "HubError", "Authenticator", "PasswordAuthenticator", "DummyAuthenticator",
           "RemoteUserAuthenticator", "Spawner", "SubprocessSpawner", "Launch", "Proxy", "EmbeddedProxy", "app"]

#: The JupyterHub release whose API this is: clients compare it (idle-culler asks for `state` from 1.3 on), and
#: jupyterhub-singleuser 6 exits at once when the header does not parse as PEP 440.
API_VERSION = "1.5.1"

log = logging.getLogger("minihub")


########################################################################################################
# 2. Settings
########################################################################################################


#: What Flask, Django, PHP, Java, Express and Laravel call theirs.
SITE_COOKIES = ("session", "remember_token", "sessionid", "csrftoken", "PHPSESSID", "JSESSIONID", "connect.sid", "laravel_session")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything a hub can be told, as keywords of `Hub(...)` or as `MINIHUB_*` variables of `minihub.app`.

    Durations are seconds. Paths are relative to the folder the hub was started in. Raises SettingError,
    naming the setting, for a value that cannot be right.
    """

    database: str = "sqlite:///minihub.sqlite"  # a peewee database URL; sqlite:///:memory: ends with the process
    admins: tuple[str, ...] = ()                # users who are admins as soon as they exist
    authenticator: Any = "password"             # password | dummy | remote-user | package.module:Class | an Authenticator
    password: str = ""                          # the dummy authenticator's one password for the whole class
    remote_user_variable: str = "REMOTE_USER"   # remote-user: the WSGI variable with the name of the host site's user
    identify: Any = None                        # remote-user: or what asks the site, called with the WSGI environment
    login_url: str = ""                         # remote-user: the site's sign-in page, which gets ?next=
    logout_url: str = ""                        # remote-user: where people go when they have signed out of the hub
    spawner: Any = "subprocess"                 # subprocess | package.module:Class | a Spawner
    proxy: Any = "embedded"                     # embedded | chp | package.module:Class | a Proxy
    services: tuple[dict, ...] = ()             # as JupyterHub's c.JupyterHub.services; in the environment a JSON list
    cmd: str = "jupyterhub-singleuser"          # the single-user command; {port}, {username}, {prefix} are filled in
    homes: str = "homes"                        # the folder that holds a home per user
    run_dir: str = "run"                        # server logs and process ids
    notebook_dir: str = ""                      # what Jupyter shows as its root; {username} is filled in
    default_url: str = ""                       # where Jupyter opens, for example /lab/tree/start.ipynb
    env_keep: tuple[str, ...] = ()              # further variables of the hub's that servers inherit
    base_url: str = "/"                         # put before every path, below the mount point if there is one
    public_url: str = ""                        # https://host where browsers find the hub, for links that are printed
    user_url: str = ""                          # https://host or https://{username}.host for users' servers; see Limits
    hub_url: str = ""                           # http://host:port where servers reach the hub; default: its own address
    trusted_proxies: tuple[str, ...] = ("127.0.0.1", "::1")  # whose X-Forwarded-* headers are believed
    site_cookies: tuple[str, ...] = SITE_COOKIES  # cookies of the site around the hub, which no user's server is to see
    admin_access: bool = True                   # admins may open the servers of others
    named_servers: bool = True                  # users may have servers besides their default one
    named_server_limit: int = 0                 # how many of those each, 0 = any number
    concurrent_spawn_limit: int = 100           # how many servers may be starting at once, 0 = any number
    active_server_limit: int = 0                # how many servers may be running at once, 0 = any number
    start_timeout: float = 60                   # a server that has not answered by then has failed
    slow_spawn_timeout: float = 10              # how long a threaded host waits for a start before it answers 202
    slow_stop_timeout: float = 10               # the same for a stop
    activity_resolution: float = 30             # activity of a token, server or user is written at most this often
    token_lifetime: float = 0                   # the longest life of a new API token, 0 = may live for ever
    cookie_lifetime: float = 14 * 24 * 3600     # how long a sign-in lasts
    link_lifetime: float = 7 * 24 * 3600        # how long a sign-in link can be used
    idle_timeout: float = 0                     # a server that reports no activity for so long is stopped, 0 = never
    max_age: float = 0                          # a server older than this is stopped, 0 = never
    chp_api_url: str = "http://127.0.0.1:8001"  # the API of the configurable-http-proxy, for proxy = chp
    chp_auth_token: str = ""                    # its CONFIGPROXY_AUTH_TOKEN; default: made up, where the hub starts it
    chp_command: str = ""                       # starts it, for example configurable-http-proxy --port=8000
    stop_with_hub: bool = False                 # servers end within about a minute of the hub's last worker
    cleanup_servers: bool = False               # POST /shutdown also stops the servers, unless its body says otherwise
    cleanup_proxy: bool = True                  # POST /shutdown also stops a proxy that the hub has started
    on_shutdown: Any = None                     # called, without arguments, in place of ending the WSGI server
    on_user_created: Any = None                 # called after the fact with (user_name)
    on_server_started: Any = None               # called when it is ready with (user_name, server_name, url)
    on_server_stopped: Any = None               # called with (user_name, server_name, why); why is "" if it was asked to
    proxy_idle_timeout: float = 3600            # a proxied connection without a byte for so long is closed, 0 = never
    tick_interval: float = 1                    # pause between two rounds of the ticker, 0 = call hub.tick() yourself
    process_variables: Any = None               # the variables that env_keep chooses from; default: this process's

    def __post_init__(self):
        for field in dataclasses.fields(self):
            self._check_type(field)
        _demand(self.base_url.startswith("/"), "base_url", "must start with a slash", self.base_url)
        object.__setattr__(self, "base_url", self.base_url.rstrip("/") + "/")
        for name in ("homes", "run_dir"):
            object.__setattr__(self, name, os.path.abspath(getattr(self, name)))  # the site may change its folder later
        for name in ("public_url", "hub_url"):
            value = getattr(self, name)
            _demand(not value or _is_address(value), name, "must look like https://host", value)
            object.__setattr__(self, name, value.rstrip("/"))
        object.__setattr__(self, "user_url", self.user_url.rstrip("/"))
        if self.user_url:
            self._check_user_url()
        _demand(self.authenticator != "dummy" or self.password, "password",
                "must be set, because the dummy authenticator lets everybody in who knows it", self.password)
        _demand(self.remote_user_variable and not self.remote_user_variable.upper().startswith("HTTP_"),
                "remote_user_variable", "must be set by the site, and no header of the client's", self.remote_user_variable)
        _demand(not self.identify or self.authenticator not in ("password", "dummy", "pam"), "identify",
                "needs the setting authenticator to be remote-user", self.identify)
        for name in ("login_url", "logout_url"):
            value = getattr(self, name)
            _demand(not value or value.startswith("/") or _is_address(value), name, "must be a path or https://host/path", value)
        for name in CALLABLES:
            value = getattr(self, name)
            _demand(value is None or callable(value), name, "must be something to call", value)
        words = _parse("cmd", shlex.split, self.cmd, "a command line with matching quotes")
        _demand(words, "cmd", "must name a command", self.cmd)
        specs = [ServiceSpec.of(value) for value in self.services]
        _demand(len({spec.name for spec in specs}) == len(specs), "services", "must have different names",
                [spec.name for spec in specs])
        object.__setattr__(self, "services", tuple(specs))
        for value in self.trusted_proxies:
            _parse("trusted_proxies", ipaddress.ip_network, value, "an IP address or network")

    def _check_user_url(self):
        """Servers must be where browsers take them for strangers to the hub, and where no server looks for the hub."""
        def demand(condition, problem):
            _demand(condition, "user_url", problem, self.user_url)

        demand(USER_URL.fullmatch(self.user_url), "must look like https://host or https://{username}.host")
        demand(not re.search(r"\.[0-9]+(:[0-9]+)?$", self.user_url),
               "must be a host's name: at its IP address servers reach the hub")
        demand(self.public_url, "needs public_url, where the hub's own pages are")
        anywhere = re.sub(":[0-9]+$", "", self.user_url)  # cookies know no ports (RFC 6265, 8.5)
        demand(not is_host_of(anywhere, urlsplit(self.public_url).hostname)
               and not is_host_of(self.user_url, urlsplit(self.hub_url).netloc),
               "must be another host than public_url's and hub_url's")

    def _check_type(self, field):
        value, kind = getattr(self, field.name), field.type
        if kind == "tuple[str, ...]":
            _demand(not isinstance(value, str) and all(isinstance(item, str) for item in value), field.name,
                    "must be a list of strings", value)
            object.__setattr__(self, field.name, tuple(value))
        elif kind == "tuple[dict, ...]":
            _demand(isinstance(value, (list, tuple)), field.name, "must be a list of objects", value)
        elif kind == "int":
            _demand(type(value) is int and value >= 0, field.name, "must be a whole number, 0 or more", value)
        elif kind == "float":
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            _demand(number and value >= 0, field.name, "must be a number, 0 or more", value)
        elif kind == "bool":
            _demand(isinstance(value, bool), field.name, "must be true or false", value)
        elif kind == "str":
            _demand(isinstance(value, str), field.name, "must be a string", value)

    @classmethod
    def from_environ(cls, environ=None) -> Settings:
        """The settings that the variables `MINIHUB_*` of `environ` (default: this process's) spell out.

        Warns of a `MINIHUB_*` name that is no setting.
        """
        environ = os.environ if environ is None else environ
        fields = {field.name: field.type for field in dataclasses.fields(cls) if field.name not in NOT_IN_ENVIRON}
        given = {name[8:].lower(): text for name, text in environ.items() if name.startswith("MINIHUB_")}
        for name in given.keys() - fields:
            warnings.warn(f"MINIHUB_{name.upper()} is not a setting of minihub {__version__}", stacklevel=3)
        return cls(**{name: _from_text(name, kind, given[name]) for name, kind in fields.items() if name in given})

    def inherited_variables(self) -> dict[str, str]:
        """The variables a server gets from the hub's own environment; an allow-list, so that no secret leaks."""
        variables = os.environ if self.process_variables is None else self.process_variables
        kept = {name: value for name, value in variables.items()
                if name in INHERITED_VARIABLES or name in self.env_keep or name.startswith("LC_")}
        # A hub started as venv/bin/gunicorn finds jupyterhub-singleuser beside the Python that runs it.
        kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
        return kept


SERVER_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.~-]{0,61}[A-Za-z0-9])?")  # and a service's

USER_URL = re.compile(r"https?://(\{username\}\.)?[A-Za-z0-9.-]+(:[0-9]+)?")

CALLABLES = ("identify", "on_shutdown", "on_user_created", "on_server_started", "on_server_stopped")
NOT_IN_ENVIRON = ("process_variables", *CALLABLES)  # Python objects

INHERITED_VARIABLES = frozenset(
    "PATH LANG LANGUAGE TZ SHELL TMPDIR VIRTUAL_ENV CONDA_ROOT CONDA_DEFAULT_ENV CONDA_PREFIX PYTHONPATH"
    " LD_LIBRARY_PATH HOME USER SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE JUPYTERHUB_SINGLEUSER_APP"
    " JUPYTERHUB_SINGLEUSER_EXTENSION JUPYTERHUB_ACTIVITY_INTERVAL".split())


@dataclass(frozen=True, kw_only=True)
class ServiceSpec:
    """An entry of the setting `services`, with the keys JupyterHub knows. With a `command` the hub runs it itself."""

    name: str
    admin: bool = False
    url: str = ""                   # http://host:port where it listens; it is then reached under /services/NAME/
    api_token: str = ""             # what it proves itself with; default: a new one at each start of the command
    command: tuple[str, ...] = ()
    cwd: str = ""
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    user: str = ""                  # the system user to run the command as
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    display: bool = True
    oauth_no_confirm: bool = False
    oauth_client_id: str = ""       # default: service-NAME
    oauth_redirect_uri: str = ""    # default: /services/NAME/oauth_callback

    @classmethod
    def of(cls, value: Any) -> ServiceSpec:
        """The entry, checked. Raises SettingError with what is wrong in it."""
        if isinstance(value, cls):
            return value
        _demand(isinstance(value, dict) and isinstance(value.get("name"), str), "services",
                "must be a list of objects, each with a name", value)
        words = value.get("command", [])
        _demand(isinstance(words, (str, list, tuple)), "services", f"must have words as command of {value['name']}", words)
        if isinstance(words, str):
            words = _parse("services", shlex.split, words, f"words with matching quotes as command of {value['name']}")
        value = {**value, "command": tuple(words)}
        kinds = {field.name: field.type.partition("[")[0] for field in dataclasses.fields(cls)}
        unknown = sorted(value.keys() - kinds)
        _demand(not unknown, "services", f"must have no other keys than {', '.join(kinds)}", unknown)
        for key, item in value.items():
            _demand(type(item).__name__ == kinds[key], "services", f"must have a {kinds[key]} as {key} of {value['name']}", item)
        spec = cls(**value)
        spec._check_values()
        return spec

    def _check_values(self):
        _demand(SERVER_NAME.fullmatch(self.name), "services", "must have names of letters, digits and -_.~", self.name)
        _demand(not self.url or _is_address(self.url), "services", f"must have http://host:port as url of {self.name}", self.url)
        _demand(not self.oauth_client_id.startswith("jupyterhub-user-"), "services",
                f"must not have the OAuth client id of a server for {self.name}", self.oauth_client_id)
        _demand(not self.api_token or len(self.api_token) >= 8, "services",
                f"must have an api_token of at least 8 characters for {self.name}", "a shorter one")
        texts = (*self.command, *self.environment, *self.environment.values())
        _demand(all(isinstance(text, str) for text in texts), "services",
                f"must have strings in command and environment of {self.name}", texts)

    @property
    def target(self) -> str:
        """Where the proxy sends what is for it, '' for a service without pages."""
        return "{0.scheme}://{0.netloc}".format(urlsplit(self.url)) if self.url else ""

    @property
    def client_id(self) -> str:
        """Its OAuth client id, '' for a service that people do not sign in to."""
        return self.oauth_client_id or (f"service-{self.name}" if self.url or self.oauth_redirect_uri else "")


class SettingError(ValueError):
    """A setting that cannot be right; `setting` is its name."""

    def __init__(self, setting, problem, value):
        super().__init__(f"Setting {setting} (MINIHUB_{setting.upper()}) {problem}, not {value!r}")
        self.setting = setting


def _demand(condition, setting, problem, value):
    if not condition:
        raise SettingError(setting, problem, value)


def is_host_of(url: str, host: str) -> bool:
    """Whether a Host header asks for `url`'s host and port; `{username}` in it stands for anybody's."""
    scheme, _, place = url.partition("://")
    usual = ":443" if scheme == "https" else ":80"
    pattern = re.escape(place.removesuffix(usual)).replace(re.escape("{username}"), "[a-z0-9-]+")
    return bool(re.fullmatch(f"{pattern}({usual})?", host, re.IGNORECASE))


def _is_address(value):
    try:
        parts = urlsplit(value)
        plain = re.fullmatch(r"[\x21-\x7e]+", value)
        return bool(plain and parts.hostname) and parts.scheme in ("http", "https") and parts.port != 0
    except ValueError:
        return False


def _parse(setting, convert, value, expected):
    try:
        return convert(value)
    except (ValueError, TypeError):
        raise SettingError(setting, f"must be {expected}", value) from None


def _from_text(name, kind, text):
    if kind == "bool":
        words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
        return _parse(name, lambda word: words.get(word.strip().lower(), word), text, "true or false")
    if kind in ("int", "float"):
        return _parse(name, int if kind == "int" else float, text, "a number")
    if kind == "tuple[dict, ...]":
        return _parse(name, json.loads, text or "[]", "a JSON list")
    if kind == "tuple[str, ...]":
        return tuple(item.strip() for item in text.split(",") if item.strip())
    return text


def _load(setting, choice, builtin, base):
    """The object behind a setting that names a hook: a built-in's name, `package.module:Class`, a class, an object."""
    if isinstance(choice, str) and choice in builtin:
        choice = builtin[choice]
    elif isinstance(choice, str):
        module, colon, name = choice.partition(":")
        _demand(colon and name, setting, f"must be {', '.join(builtin)} or package.module:Class", choice)
        try:
            choice = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise SettingError(setting, f"cannot be imported ({error})", choice) from None
    made = choice() if isinstance(choice, type) else choice
    _demand(isinstance(made, base), setting, f"must be a kind of {base.__name__}", choice)
    return made


########################################################################################################
# 3. Errors, time, secrets, names
########################################################################################################


class HubError(Exception):
    """What the hub refuses on purpose: `status` (HTTP), `message` (for people), `retry_after` (seconds or None)."""

    status = 500
    retry_after = None

    def __init__(self, message, retry_after=None):
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after


class BadRequest(HubError):
    """400: the request cannot be right, whoever makes it."""

    status = 400


class Forbidden(HubError):
    """403: not for whoever is asking. JupyterHub never answers 401, and its clients fail on one."""

    status = 403

    def __init__(self, message="Forbidden"):
        super().__init__(message)


class NotFound(HubError):
    """404: the thing named does not exist."""

    status = 404

    def __init__(self, message="Not Found"):
        super().__init__(message)


class Conflict(HubError):
    """409: the thing named exists already."""

    status = 409


class TooLarge(HubError):
    """413: the body is longer than any the hub has a use for."""

    status = 413


class OAuthError(HubError):
    """What the token endpoint refuses: `error` is the code of RFC 6749, section 5.2."""

    def __init__(self, error, message, status=400):
        super().__init__(message)
        self.error, self.status = error, status


class TooMany(HubError):
    """429: later; `retry_after` says when, if that is known."""

    status = 429


class SpawnFailed(HubError):
    """500: a server did not start; the message ends with the last lines of its log."""


class Misdirected(HubError):
    """421: users' servers have a host name of their own, and this request has come to the wrong one."""

    status = 421


class NotPossible(HubError):
    """501: not with the WSGI host that this hub runs in."""

    status = 501


class Unavailable(HubError):
    """503: something the hub needs does not answer just now; nothing was lost."""

    status = 503


def now() -> datetime:
    """The time, aware and in UTC."""
    return datetime.now(timezone.utc)


def isoformat(moment: datetime | None) -> str | None:
    """ISO 8601 as JupyterHub writes it: UTC, `Z`, microseconds unless they are 0."""
    return moment and moment.astimezone(timezone.utc).isoformat().replace("+00:00", "Z")


def parse_time(text: Any) -> datetime:
    """The moment that an ISO 8601 text names (no offset: UTC). Raises BadRequest."""
    try:
        # Python before 3.11 knows neither Z nor a fraction of other than 3 or 6 digits.
        plain = re.sub(r"(\.\d{1,6})\d*", lambda match: match[1].ljust(7, "0"), text.strip().replace("Z", "+00:00"))
        moment = datetime.fromisoformat(plain)
        moment = moment.replace(tzinfo=moment.tzinfo or timezone.utc).astimezone(timezone.utc)
    except (ValueError, TypeError, AttributeError, OverflowError):
        raise BadRequest(f"Not a valid timestamp: {shortened(text)}") from None
    if moment.year < 1970:  # and the year 1 has no yesterday
        raise BadRequest(f"Not a valid timestamp: {shortened(text)}")
    return moment


def shortened(value: Any) -> str:
    """A value as a message can quote it, however much a client has sent."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def storable(text: str) -> str:
    """`text` without what a database refuses: PostgreSQL a NUL, every one a lone surrogate."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def new_token() -> str:
    """128 random bits in hex, the form of JupyterHub's tokens."""
    return secrets.token_hex(16)


def hash_token(token: str) -> str:
    """What is stored of a token. Its 128 bits cannot be guessed, so one round and no salt are enough."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


SCRYPT = {"n": 2 ** 14, "r": 8, "p": 1}  # 16 MiB and some 50 ms a guess


def hash_password(password: str) -> str:
    """`scrypt$salt$key`, both in hex, with a salt of its own."""
    salt = secrets.token_bytes(16)
    return f"scrypt${salt.hex()}${hashlib.scrypt(password.encode(), salt=salt, **SCRYPT).hex()}"


#: Checked for users who do not exist or have no password, so that they take as long as the others.
NO_PASSWORD = f"scrypt${'00' * 16}${'00' * 64}"


def check_password(password: str, hashed: str | None) -> bool:
    """Whether `password` is the one hashed; takes equally long either way."""
    _, salt, key = (hashed or NO_PASSWORD).split("$")
    found = hashlib.scrypt(password.encode("utf-8", "surrogateescape"), salt=bytes.fromhex(salt), **SCRYPT)
    return hmac.compare_digest(found.hex(), key) and hashed is not None


NAME_LENGTH = 255  # the width of JupyterHub's column
#: First path segments of Jupyter's own pages: a server of that name would hide the page of the default server.
RESERVED_SERVER_NAMES = frozenset(
    "api custom edit doc files hub kernelspecs lab login logout metrics nbconvert nbextensions notebooks"
    " oauth_callback static terminals tree view voila".split())


def normalize_name(name: str) -> str:
    """One spelling for all the ways people type a name; JupyterHub lower-cases too."""
    return unicodedata.normalize("NFKC", name).lower()


def is_valid_name(name: str) -> bool:
    """Whether a user or group may bear the name: printable, no slash, no outer blanks, not a step in a path."""
    return (0 < len(name) <= NAME_LENGTH and name.isprintable() and name == name.strip()
            and "/" not in name and name not in (".", ".."))


def check_server_name(name: str) -> str:
    """`name`, if a server may bear it in its URL. Raises BadRequest."""
    if name and (not SERVER_NAME.fullmatch(name) or name.lower() in RESERVED_SERVER_NAMES):
        raise BadRequest(f"Invalid server_name: {name!r}. Use up to 63 letters, digits, '-', '_', '.' and '~', and no"
                         " word that Jupyter's own pages use")
    return name


def quote_name(name: str) -> str:
    """A name as a URL's path segment, with the characters that JupyterHub leaves alone left alone."""
    return quote(name, safe="@~")


def folder_name(name: str) -> str:
    """A name as a file's name: readable, never hidden, never a path, never longer than a file system takes."""
    plain = quote(name, safe="@~+,= ")
    plain = re.sub(r"^\.", "%2E", plain)
    if len(plain) <= 100:
        return plain
    return f"{plain[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def host_label(name: str) -> str:
    """A name as a part of a host name (RFC 1123); for one that cannot be, a part that is no name's."""
    return name if re.fullmatch(r"[a-z0-9]{1,63}", name) else f"u-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


########################################################################################################
# 4. Models
########################################################################################################

#: What takes a database from one schema version to the next: the first from version 1 to version 2, and so on.
MIGRATIONS: tuple[Callable[[pw.Database], None], ...] = ()

_current_database: contextvars.ContextVar[pw.Database | None] = contextvars.ContextVar("minihub_database", default=None)


class CurrentDatabase(pw.DatabaseProxy):
    """The database of the hub at work in this thread, so that several hubs can share one process."""

    obj = property(lambda self: _current_database.get(), lambda self, value: None)


class MomentField(pw.DateTimeField):
    """An aware UTC datetime, stored without its offset."""

    def db_value(self, value):
        return value and super().db_value(value.astimezone(timezone.utc).replace(tzinfo=None))

    def python_value(self, value):
        value = super().python_value(value)
        return value and value.replace(tzinfo=timezone.utc)


class JSONField(pw.TextField):
    """Any JSON value; the column's NULL and JSON's null are both None."""

    def db_value(self, value):
        return None if value is None else json.dumps(value)

    def python_value(self, value):
        return None if value is None else json.loads(value)


class Row(pw.Model):
    """The base of all models.

    What goes through rows and writes meanwhile makes a list of them first: SQLite, where a query is still open, does not
    wait for another writer but says at once that the database is locked.
    """

    class Meta:
        """Every table lives in the current hub's database; its name is the class's, in the plural."""

        database = CurrentDatabase()
        table_function = staticmethod(lambda model: f"{model.__name__.lower()}s")


class Setting(Row):
    """A fact about the hub itself: the schema's version, the cookie secret, where it was last reached."""

    key = pw.CharField(primary_key=True)
    value = JSONField(null=True)


class Lease(Row):
    """Who does a job that one worker at a time may do, and until when."""

    job = pw.CharField(primary_key=True)
    holder = pw.CharField()
    expires = MomentField()


class Failure(Row):
    """Failed sign-ins in a row, by name, by address and by both; `until` is when they are forgotten."""

    key = pw.CharField(primary_key=True, max_length=512)
    count = pw.IntegerField()
    until = MomentField()


class User(Row):
    """A person. `folder` names the home and stays when the name changes; `session_key` is in every cookie and
    link, so that a new one ends them all."""

    name = pw.CharField(unique=True)
    admin = pw.BooleanField(default=False)
    password = pw.CharField(null=True)
    folder = pw.CharField(unique=True)
    session_key = pw.CharField(default=new_token)
    auth_state = JSONField(null=True)
    created = MomentField(default=now)
    last_activity = MomentField(null=True)


class Group(Row):
    """A named set of users."""

    name = pw.CharField(unique=True)


class Membership(Row):
    """That a user is in a group."""

    user = pw.ForeignKeyField(User, backref="memberships", on_delete="CASCADE")
    group = pw.ForeignKeyField(Group, backref="memberships", on_delete="CASCADE")

    class Meta:
        """Once in each group."""

        indexes = ((("user", "group"), True),)


class Server(Row):
    """A user's single-user server, the default one when `name` is empty.

    `status` goes stopped -> spawning -> ready -> stopping -> stopped; `changed` is when it last did. `launch` is new
    for every start, so that a late word about an earlier one changes nothing. `failure` says why the last one ended.
    """

    user = pw.ForeignKeyField(User, backref="servers", on_delete="CASCADE")
    name = pw.CharField(default="")
    status = pw.CharField(default="stopped", constraints=[
        pw.Check("status IN ('stopped', 'spawning', 'ready', 'stopping')")], index=True)
    launch = pw.CharField(default="")
    attempts = pw.IntegerField(default=0)
    state = JSONField(null=True)
    target = pw.CharField(null=True, unique=True)  # http://host:port; unique, so that two servers never share a port
    prefix = pw.TextField(default="")
    user_options = JSONField(null=True)
    failure = pw.TextField(default="")
    forget = pw.BooleanField(default=False)        # delete the row once the server has stopped
    changed = MomentField(default=now)
    started = MomentField(null=True)
    last_activity = MomentField(null=True)

    class Meta:
        """Names are unique for each user."""

        indexes = ((("user", "name"), True),)

    @property
    def label(self) -> str:
        """`ada` or `ada:gpu`, as JupyterHub's messages name a server."""
        return f"{self.user.name}:{self.name}" if self.name else self.user.name


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
    """Who may ask for OAuth codes: a user's server (one registration a launch) or a service."""

    identifier = pw.TextField(unique=True)  # holds the user's name, quoted, and so up to twelve times as long
    secret = pw.CharField()
    redirect_uri = pw.TextField()
    description = pw.TextField()
    server = pw.ForeignKeyField(Server, null=True, backref="clients", on_delete="CASCADE")
    service = pw.ForeignKeyField(Service, null=True, backref="clients", on_delete="CASCADE")


class Token(Row):
    """An API token of a user or a service, or, with a `client`, an OAuth access token. `server` is set on the token a
    server runs with."""

    hashed = pw.CharField(unique=True)
    user = pw.ForeignKeyField(User, null=True, backref="tokens", on_delete="CASCADE")
    service = pw.ForeignKeyField(Service, null=True, backref="tokens", on_delete="CASCADE")
    client = pw.ForeignKeyField(OAuthClient, null=True, backref="tokens", on_delete="CASCADE")
    server = pw.ForeignKeyField(Server, null=True, backref="tokens", on_delete="CASCADE")
    parent = pw.ForeignKeyField("self", null=True, on_delete="CASCADE")  # the token this one stands in for
    session_id = pw.CharField(default="", index=True)
    note = pw.TextField(default="")
    created = MomentField(default=now)
    last_activity = MomentField(null=True)
    expires_at = MomentField(null=True)

    class Meta:
        """It acts for somebody, and for one only."""

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
    """Where the embedded proxy sends what lies below a prefix, and whose that is."""

    prefix = pw.TextField(primary_key=True)
    target = pw.CharField()
    data = JSONField()


MODELS = (Setting, Lease, Failure, User, Group, Membership, Server, Service, OAuthClient, Token, OAuthCode, Route)

#: What a database that is gone, locked, full or read-only raises.
DatabaseTrouble = (pw.OperationalError, pw.InterfaceError, pw.InternalError)

#: What a row raises when another request deletes, in this moment, what it belongs to.
Overtaken = (pw.DoesNotExist, pw.IntegrityError)


def open_database(url: str) -> pw.Database:
    """A database that opens a connection per thread, and never by accident. Raises SettingError."""
    if not url.startswith("sqlite:"):
        try:
            return database_from_url(url, autoconnect=False)
        except (RuntimeError, ValueError, pw.ImproperlyConfigured) as error:
            raise SettingError("database", f"cannot be used ({error})", url.partition(":")[0]) from None
    path = url.removeprefix("sqlite:///")
    try:
        # Created here, because SQLite itself would let everybody read it; its WAL takes over the mode.
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise SettingError("database", f"cannot be opened ({error.strerror})", url) from None
    pragmas = {"journal_mode": "wal", "synchronous": "normal", "foreign_keys": 1}
    return pw.SqliteDatabase(path, pragmas=pragmas, timeout=15, lock_type="IMMEDIATE", autoconnect=False)


def prepare_schema(database: pw.Database) -> None:
    """Create what is missing and upgrade what is older, in one transaction, after a copy has been set aside (SQLite).

    Raises SettingError for a database of a newer minihub.
    """
    newest = len(MIGRATIONS) + 1
    with database.atomic():
        if isinstance(database, pw.PostgresqlDatabase):
            database.execute_sql("SELECT pg_advisory_xact_lock(%s)", (0x6d696e69,))  # workers start at the same moment
        known = Setting.get_or_none(Setting.key == "schema_version") if Setting.table_exists() else None
        version = known.value if known else newest
        _demand(version <= newest, "database", f"must be of schema version {newest} or older"
                f" (it was written by a newer minihub than {__version__})", version)
        if version < newest and isinstance(database, pw.SqliteDatabase):
            copy = Path(f"{database.database}.version-{version}")
            copy.unlink(missing_ok=True)  # of an upgrade that failed
            copy_database(database, str(copy))
        for migrate in MIGRATIONS[version - 1:]:
            migrate(database)
        database.create_tables(MODELS, safe=True)
        if not known or version < newest:
            store("schema_version", newest)
            log.info("database: schema version %s%s", newest, f", upgraded from {version}" if version < newest else "")


def copy_database(database: pw.Database, path: str) -> None:
    """A consistent copy of an SQLite database in a new file, while it is in use. Raises BadRequest."""
    if not isinstance(database, pw.SqliteDatabase):
        raise BadRequest("Only an SQLite database is copied this way. For PostgreSQL use pg_dump")
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
    except OSError as error:
        raise BadRequest(f"The copy {path} cannot be made: {error.strerror}") from None
    try:
        with contextlib.closing(sqlite3.connect(database.database)) as source, contextlib.closing(sqlite3.connect(path)) as copy:
            source.backup(copy)
    except sqlite3.Error as error:
        os.unlink(path)
        raise BadRequest(f"The copy {path} cannot be made: {error}") from None


def upsert(key: pw.Field, which: Any, /, **columns: Any) -> None:
    """Give the row whose unique `key` is `which` those columns, whether it exists or not."""
    changed = [getattr(key.model, name) for name in columns]
    (key.model.insert(**{key.name: which}, **columns)
     .on_conflict(conflict_target=[key], preserve=changed).execute())


def remember(key: str, value: Any) -> Any:
    """The hub's fact `key`, which becomes `value` if it is not known yet."""
    Setting.insert(key=key, value=value).on_conflict_ignore().execute()
    return Setting.get_by_id(key).value


def store(key: str, value: Any) -> None:
    """Make `value` the hub's fact `key`."""
    upsert(Setting.key, key, value=value)


@contextlib.contextmanager
def in_passing() -> Iterator[None]:
    """What is written here is written if that can be done: while the disk is full, what only reads goes on."""
    try:
        yield
    except DatabaseTrouble as error:
        log.error("the database does not take notes: %s", error)


########################################################################################################
# 5. Authenticators
########################################################################################################


class Authenticator:
    """Who people are. Subclasses must implement `authenticate`, or `identify`, or both.

    `settings` is the hub's Settings, set before the first call. Methods run inside a request, with the database open.
    """

    settings: Settings
    has_form = True  # whether people sign in on the hub's page; False: only where `identify` looks
    logout_url = ""  # where people go when they have signed out; "": to the sign-in page

    def authenticate(self, credentials: dict[str, Any], environ: dict[str, Any]) -> str | None:
        """The name of whoever these credentials prove, or None.

        `credentials` is the login form or the API's JSON object, usually with `username` and `password`; `environ` is
        the WSGI environment. A name the hub does not know becomes a user.
        """
        return None

    def identify(self, environ: dict[str, Any]) -> str | tuple[str, dict[str, Any]] | None:
        """The name of whoever the host site has signed in already, or None.

        `(name, {"admin": True, "groups": ["algebra"]})` says, too, what they are from now on: an admin or not, and in no
        other groups. What is left out stays as it is.
        """
        return None

    def normalize(self, name: str) -> str:
        """The one spelling of a name, however it was typed."""
        return normalize_name(name)


class PasswordAuthenticator(Authenticator):
    """Each user's own password, chosen through a one-time link that an admin or `minihub link NAME` hands out."""

    def authenticate(self, credentials, environ):
        """The user of that name, if the password is theirs. Takes equally long for names that do not exist."""
        name = self.normalize(str(credentials.get("username") or ""))
        user = User.get_or_none(User.name == name) if is_valid_name(name) else None
        right = check_password(str(credentials.get("password") or ""), user and user.password)
        return name if right else None


class DummyAuthenticator(Authenticator):
    """Any name with the one password of the class, the setting `password`."""

    def authenticate(self, credentials, environ):
        """The name as given, if the password is the class's."""
        given = str(credentials.get("password") or "").encode("utf-8", "surrogateescape")
        right = hmac.compare_digest(given, self.settings.password.encode())
        return str(credentials.get("username") or "") if right else None


class RemoteUserAuthenticator(Authenticator):
    """Whoever the host site has signed in: in the WSGI variable `remote_user_variable`, or as `identify` says."""

    has_form = False

    @property
    def logout_url(self):
        """The setting."""
        return self.settings.logout_url

    def identify(self, environ):
        """What the site says at this very request; nothing is remembered of an earlier one."""
        if self.settings.identify:
            return self.settings.identify(environ)
        name = environ.get(self.settings.remote_user_variable) or ""
        with contextlib.suppress(UnicodeError):  # WSGI spells bytes as Latin-1 (PEP 3333), but sites also set plain text
            name = name.encode("latin-1").decode()
        return name or None


AUTHENTICATORS = {"password": PasswordAuthenticator, "dummy": DummyAuthenticator, "remote-user": RemoteUserAuthenticator}


########################################################################################################
# 6. Spawners
########################################################################################################


@dataclass(frozen=True)
class Launch:
    """What a spawner is told about the server it is to start."""

    id: str                     # new for every start of every server
    user: User                  # .name, .admin, .folder
    name: str                   # the server's, "" for the default one
    user_options: Any           # the JSON body the start was asked for with, or None
    prefix: str                 # the path it must serve under, /user/ada/
    port: int                   # free on this machine a moment ago, for a server that listens here
    variables: dict[str, str]   # JUPYTERHUB_*: what it needs to work with this hub


class Spawner:
    """How servers run. Subclasses must implement `start`, `poll` and `stop`.

    Between the calls nothing is remembered but `state`, a JSON dict of the spawner's choosing with at least `target`,
    the http://host:port where the server will answer: any worker must be able to poll or stop what another has started.
    `settings` is the hub's Settings, set before the first call. An exception fails the start with its text.
    """

    settings: Settings

    def start(self, server: Launch) -> dict[str, Any]:
        """Start the server, without waiting until it answers, and return its state."""
        raise NotImplementedError

    def find(self, server: Launch) -> dict[str, Any] | None:
        """The state of what an earlier `start` of the same launch left running when its worker was killed, or None."""
        return None

    def poll(self, state: dict[str, Any]) -> int | None:
        """None while the server lives, else its exit status (negative: the signal that ended it)."""
        raise NotImplementedError

    def stop(self, state: dict[str, Any], now: bool = False) -> dict[str, Any]:
        """Ask the server to end, or with `now` end it, and return the new state. Does not wait.

        Called again every other second until `poll` says that the server has ended, so it can grow less polite.
        """
        raise NotImplementedError

    def log_tail(self, state: dict[str, Any]) -> str:
        """The last lines the server wrote: what people are shown when it fails."""
        return ""


#: Runs a command ("$@"), so that its exit status is on disk for any worker to read, and nothing outlives it in its
#: process group. `set -C` makes the first of two starts of one launch win. The traps keep the shell alive over the
#: signals meant for the command; a trapped signal, unlike an ignored one, is back at its default in the command.
#: If there is a heartbeat file ("$2"), everything ends when nobody has touched that for a minute.
SUPERVISE = """
set -C; echo "$$ $1" >"$0.pid" || exit 125
beat=$2; shift 2
trap : INT TERM HUP
if [ -n "$beat" ]; then (
    trap '' INT TERM HUP
    while [ -n "$(find "$beat" -mmin -1 2>/dev/null)" ]; do sleep 5; done
    kill -TERM 0; sleep 10; kill -KILL 0
) & fi
"$@"
echo $? >"$0.exit"
kill -KILL 0
"""


def start_process(run: Path, words: Iterable[str], note: str, beat: Path | None = None, **options: Any) -> dict[str, Any]:
    """Run a command in a session of its own, and return what tells any other worker about it.

    `run` is a path without its suffix, for what is to be known of it: .pid (with the `note` after it) and .exit. Its log
    is the same path up to the @. With a `beat` it ends soon after that file is no longer touched. Raises OSError.
    """
    log_file = log_of(run)
    for name in run.parent.glob(log_file.name.removesuffix(".log") + "@*"):  # of earlier starts
        name.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        log_file.replace(log_file.with_suffix(".log.old"))
    with open(os.open(log_file, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600), "wb") as output, no_signals_blocked():
        process = subprocess.Popen(["/bin/sh", "-c", SUPERVISE, str(run), note, str(beat or ""), *words], stdin=subprocess.DEVNULL,
                                   stdout=output, stderr=output, start_new_session=True, **options)
    state = process_state(run, process.pid)  # before anybody waits, and the number can be somebody else's
    # The kernel keeps a zombie until somebody waits for it.
    threading.Thread(target=process.wait, name=f"minihub-wait-{process.pid}", daemon=True).start()
    return state


@contextlib.contextmanager
def no_signals_blocked() -> Iterator[None]:
    """What is started here gets every signal: a process inherits what its parent's thread blocks, in uWSGI all of them."""
    before = signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def heartbeat(settings: Settings) -> Path:
    """The file, touched just now, whose age tells processes whether there still is a hub."""
    folder = Path(settings.run_dir)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / "heartbeat").touch()
    return folder / "heartbeat"


def process_state(run: Path, pid: int) -> dict[str, Any]:
    """What there is to know of a supervised process."""
    return {"pid": pid, "identity": process_identity(pid), "run": str(run)}


def is_process_running(state: dict[str, Any]) -> bool:
    """Whether it lives: not just its number, which may be somebody else's by now."""
    return state["identity"] is not None and process_identity(state["pid"]) == state["identity"]


def poll_process(state: dict[str, Any]) -> int | None:
    """None while it lives, else the exit status that its supervisor has written; -9 if that was killed itself."""
    if is_process_running(state):
        return None
    try:
        status = int(Path(f"{state['run']}.exit").read_text())
    except (OSError, ValueError):
        return -signal.SIGKILL
    return 128 - status if status > 128 else status  # how a shell spells the signal that ended a command


def stop_process(state: dict[str, Any], ladder: tuple, now: bool = False) -> dict[str, Any]:
    """The next signal of the ladder, to the whole process group, if its time has come; returns the new state."""
    asked = state.get("asked_to_stop") or time.time()
    sent = state.get("signals_sent", 0)
    due = len(ladder) if now else sum(time.time() >= asked + after for after, _ in ladder)
    if due > sent and is_process_running(state):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(state["pid"], ladder[due - 1][1])
    return {**state, "asked_to_stop": asked, "signals_sent": max(due, sent)}


def log_of(run: Path) -> Path:
    """The log of what is run there."""
    return run.with_name(run.name.rpartition("@")[0] + ".log")


def last_lines(run: Path, lines: int = 30) -> str:
    """The end of a log."""
    try:
        with open(log_of(run), "rb") as log_file:
            log_file.seek(-min(8192, os.fstat(log_file.fileno()).st_size), os.SEEK_END)
            return "\n".join(log_file.read().decode("utf-8", "replace").splitlines()[-lines:])
    except OSError as error:
        return f"(its log cannot be read: {error.strerror})"


class SubprocessSpawner(Spawner):
    """Servers as processes of the hub's own system user, in sessions of their own that outlive the hub."""

    ladder = ((0, signal.SIGINT), (5, signal.SIGTERM), (10, signal.SIGKILL))  # seconds after the stop, and the signal

    def command(self, server: Launch) -> list[str]:
        """The words of the command line."""
        words = [self._fill(word, server) for word in shlex.split(self.settings.cmd)]
        if "{port}" not in self.settings.cmd:
            words.append(f"--port={server.port}")  # jupyterhub-singleuser 1.x knows no other way
        if Path(words[0]).name in ("jupyterhub-singleuser", "jupyter-labhub"):
            words += self._singleuser_options(server)
        return words

    def _singleuser_options(self, server):
        """What 1.x reads on the command line and nowhere else, and the word that Jupyter wants to hear from root."""
        options = ["--allow-root"] if os.geteuid() == 0 else []
        if self.settings.notebook_dir:
            options.append(f"--notebook-dir={self._notebook_dir(server)}")
        if self.settings.default_url:
            options.append(f"--SingleUserNotebookApp.default_url={self.settings.default_url}")
        return options

    def environment(self, server: Launch) -> dict[str, str]:
        """All the variables the server starts with."""
        variables = {**self.settings.inherited_variables(), **server.variables,
                     "HOME": str(self.home(server)), "USER": server.user.name, "LOGNAME": server.user.name,
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
        """Start the process. Raises OSError if its folders or its log cannot be made."""
        run = self._run_file(server)
        for folder in (self.home(server), run.parent):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.settings.notebook_dir:
            self._notebook_dir(server).mkdir(parents=True, exist_ok=True)
        target = f"http://127.0.0.1:{server.port}"
        beat = heartbeat(self.settings) if self.settings.stop_with_hub else None
        state = start_process(run, self.command(server), target, beat, cwd=self.home(server), env=self.environment(server))
        return {**state, "target": target}

    def find(self, server):
        """The state of a process whose start was interrupted: its supervisor has written down who it is."""
        run = self._run_file(server)
        try:
            number, target = run.with_name(f"{run.name}.pid").read_text().split()
            pid = int(number)
        except (OSError, ValueError):
            return None
        state = {**process_state(run, pid), "target": target}
        # The number may be somebody else's by now; the supervisor's command line holds the name of this launch.
        return state if str(run) in command_line(state["pid"]) else {**state, "identity": None}

    def poll(self, state):
        """The exit status that the supervisor has written, negative for a signal; -9 if it was killed itself."""
        return poll_process(state)

    def stop(self, state, now=False):
        """The next signal of the ladder."""
        return stop_process(state, self.ladder, now)

    def log_tail(self, state):
        """The last 30 lines of the server's log."""
        return last_lines(Path(state["run"]))

    def _run_file(self, server):
        folder = Path(self.settings.run_dir) / server.user.folder
        return folder / f"server{'-' if server.name else ''}{server.name}@{server.id}"

    def _notebook_dir(self, server):
        folder = re.sub(r"^~(/|$)", "", self.settings.notebook_dir)  # the user's home, not the hub's
        return self.home(server) / self._fill(folder, server)

    def _fill(self, text, server):
        """`text` with its placeholders filled in; not str.format, because commands may hold other braces."""
        for name, value in (("port", server.port), ("username", server.user.name), ("prefix", server.prefix)):
            text = text.replace(f"{{{name}}}", str(value))
        return text


SPAWNERS = {"subprocess": SubprocessSpawner}


def free_port() -> int:
    """A TCP port of this machine that nobody listens on just now."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def process_identity(pid: int) -> str | None:
    """What tells a process from a later one of the same number: when it started, in which boot. None: it has ended."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return None if sys.platform == "linux" else _identity_from_ps(pid)
    return None if after_name[0] in "ZX" else f"{boot}:{after_name[19]}"  # proc(5): fields 3 and 22


def _identity_from_ps(pid):
    words = _ask_ps(pid, "stat=,lstart=").split()
    return None if not words or words[0].startswith("Z") else " ".join(words[1:])


def command_line(pid: int) -> str:
    """The words a process was started with, or "" if there is none of that number."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return "" if sys.platform == "linux" else _ask_ps(pid, "command=")


def _ask_ps(pid, columns):
    return subprocess.run(["ps", "-ww", "-o", columns, "-p", str(pid)], capture_output=True, text=True).stdout


########################################################################################################
# 7. Proxies
########################################################################################################


class Proxy:
    """Where requests for servers go. Subclasses must implement `add_route`, `delete_route` and `get_all_routes`.

    A prefix begins and ends with a slash (JupyterHub calls it routespec) and is percent-encoded, as URLs are.
    `settings` is the hub's Settings and `splicer` its thread for connections, both set before the first call.
    """

    settings: Settings
    splicer: Splicer

    def add_route(self, prefix: str, target: str, data: dict[str, Any]) -> None:
        """Send what lies below `prefix` to `target` (http://host:port); `data` says whose it is. Replaces."""
        raise NotImplementedError

    def delete_route(self, prefix: str) -> None:
        """Forget a route; one that does not exist is forgotten already."""
        raise NotImplementedError

    def get_all_routes(self) -> dict[str, dict[str, Any]]:
        """Every route by its prefix, as {"routespec": prefix, "target": ..., "data": {...}}."""
        raise NotImplementedError

    def check_routes(self, wanted: dict[str, dict[str, Any]], actual: dict[str, dict[str, Any]]) -> None:
        """Make the routes those that are `wanted`; both are of the form that `get_all_routes` returns."""
        for prefix in actual.keys() - wanted.keys():
            self.delete_route(prefix)
        for prefix, route in wanted.items():
            if actual.get(prefix, {}).get("target") != route["target"]:
                self.add_route(prefix, route["target"], route["data"])


# The text of HTTP/1.1 (RFC 9112), without any I/O.

TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2: what a header's name is made of
LINE_BREAKS = re.compile(r"[\r\n\0]")               # RFC 9110, 5.5: what no header's value may hold
#: RFC 3986, 6.2.2.2: letters, digits, - and _ have one spelling, so that /h%75b is recognised as /hub.
NEEDLESSLY_ENCODED = re.compile(r"%(?:[46][1-9A-Fa-f]|[57][0-9Aa]|3[0-9]|2[Dd]|5[Ff])")
HEAD_LIMIT = 64 * 1024  # bytes of a response head; tornado's own limit
CHUNK = 64 * 1024       # bytes moved at a time, so also what a connection can hold in memory
SPOOL_LIMIT = 2 ** 30   # bytes of a body that comes in chunks, and so has to be put on the disk
FILES_ENOUGH = 65536    # open files and sockets, for a process that is let have even more
STARVED_AFTER = 3       # seconds that a thread waits for a server before it looks whether another one is free
CONNECT_TIMEOUT = 10    # seconds for a server on this machine to accept a connection

#: RFC 9110, 7.6.1: these speak of one connection, so they are not passed on.
HOP_BY_HOP = frozenset("connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer"
                       " transfer-encoding upgrade".split())

#: Written anew for every request: what a client says of itself here is not to be believed.
REWRITTEN = frozenset("host content-length expect x-forwarded-for x-forwarded-proto x-forwarded-host x-forwarded-port"
                      " x-forwarded-prefix x-scheme x-real-ip forwarded".split())

#: Ask a web server in front of the hub for a file that it keeps to itself.
SENDS_FILE = frozenset(("x-accel-redirect", "x-sendfile", "x-lighttpd-send-file"))

#: Speak for everything at the hub's address, not for one server, and some outlast the visit: a service worker for / would
#: stand between people and the hub's pages from then on.
ORIGIN_WIDE = frozenset("service-worker-allowed clear-site-data strict-transport-security alt-svc nel report-to".split())

LOGIN_COOKIE = "jupyterhub-hub-login"
SERVICES_COOKIE = "jupyterhub-services"
SESSION_COOKIE = "jupyterhub-session-id"  # in plain text, on every path: single-user servers key their caches by it
HUB_COOKIES = frozenset((LOGIN_COOKIE, SERVICES_COOKIE))  # which no user's server may see or set


@dataclass(frozen=True)
class Client:
    """The browser's side of a request: its address, and the scheme and host it used."""

    address: str
    scheme: str
    host: str

    @classmethod
    def of(cls, environ: dict[str, Any], trusted: Iterable[str]) -> Client:
        """Who made this request, told by X-Forwarded-* if they come from one of the `trusted` addresses."""
        peer = environ.get("REMOTE_ADDR", "")
        scheme, host = environ["wsgi.url_scheme"], environ.get("HTTP_HOST") or environ["SERVER_NAME"]
        networks = [parsed_network(value) for value in trusted]
        if not is_within(peer, networks):
            return cls(peer, scheme, host)
        said = [part.strip() for part in environ.get("HTTP_X_FORWARDED_FOR", "").split(",") if part.strip()]
        strangers = [address for address in said if not is_within(address, networks)]
        nearest = strangers[-1] if strangers else said[0] if said else peer
        return cls(nearest if parsed_address(nearest) else peer,
                   last_said(environ, "HTTP_X_FORWARDED_PROTO", ("http", "https")) or scheme,
                   last_said(environ, "HTTP_X_FORWARDED_HOST") or host)


def is_within(address: str, networks: Iterable) -> bool:
    """Whether the address lies in one of the networks; a unix socket's peer, which has none, does."""
    parsed = parsed_address(address)
    return not address or (parsed is not None and any(parsed in network for network in networks))


parsed_network = functools.cache(ipaddress.ip_network)  # of the settings' few


@functools.lru_cache(1024)  # every request asks
def parsed_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address that a text is, or None; ::ffff:127.0.0.1, how a [::] socket sees it, is 127.0.0.1."""
    try:
        parsed = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(parsed, "ipv4_mapped", None) or parsed


def neighbourhood(address: str) -> str:
    """All the addresses that whoever has this one has: of IPv6 a whole /64."""
    parsed = parsed_address(address)
    return str(ipaddress.ip_network((parsed, 64), strict=False)) if parsed and parsed.version == 6 else address


def last_said(environ, name, allowed=None):
    """The nearest proxy's word in a forwarding header, or ''."""
    value = environ.get(name, "").rpartition(",")[2].strip()
    return value if allowed is None or value in allowed else ""


def target_below(environ: dict[str, Any], above: str) -> str:
    """What the client sent after the mount point and a path that is as long as `above`, whichever way it spelled these.

    WSGI decodes the path; most hosts keep the original as well, and it is used where it says the same.
    """
    script = environ.get("SCRIPT_NAME", "")
    path = script + environ["PATH_INFO"]
    sent = environ.get("RAW_URI") or environ.get("REQUEST_URI") or ""
    raw = NEEDLESSLY_ENCODED.sub(lambda match: unquote(match[0]), sent.partition("?")[0])
    if unquote(raw, "latin-1") != path or not re.fullmatch(r"[\x21-\x7e]+", raw):
        raw = quote(path, safe="/@~!$&'()*+,;=:", encoding="latin-1")
    below = re.sub(f"^(?:%[0-9A-Fa-f]{{2}}|.){{0,{len(script + above)}}}", "", raw)
    query = environ.get("QUERY_STRING", "")
    return f"{below}?{quote(query, safe=string.punctuation, encoding='latin-1')}" if query else below


def request_target(environ: dict[str, Any]) -> str:
    """Path and query as the client sent them, percent-encoding and all; only the mount point is in the hub's own spelling."""
    return quote(environ.get("SCRIPT_NAME", ""), safe="/@~", encoding="latin-1") + target_below(environ, "")


def is_websocket(environ: dict[str, Any]) -> bool:
    """Whether the request asks to become a websocket."""
    return ("upgrade" in environ.get("HTTP_CONNECTION", "").lower()
            and environ.get("HTTP_UPGRADE", "").lower() == "websocket")


def request_head(environ: dict[str, Any], client: Client, length: int | None, protocol: str) -> bytes:
    """The head of the request as the user's server gets it. Raises BadRequest for headers that are no headers."""
    nominated = {name.strip().lower() for name in environ.get("HTTP_CONNECTION", "").split(",")}
    headers = [("Host", client.host)]
    for key, value in environ.items():
        name = key[5:].replace("_", "-").lower()
        if key.startswith("HTTP_") and name not in HOP_BY_HOP | REWRITTEN | nominated:
            headers.append((name.title(), value))
    if environ.get("CONTENT_TYPE"):
        headers.append(("Content-Type", environ["CONTENT_TYPE"]))
    if length is not None:
        headers.append(("Content-Length", str(length)))
    chain = environ.get("HTTP_X_FORWARDED_FOR") if client.address != environ.get("REMOTE_ADDR") else None
    headers += [("X-Forwarded-For", ", ".join(filter(None, (chain, environ.get("REMOTE_ADDR"))))),
                ("X-Forwarded-Proto", client.scheme), ("X-Forwarded-Host", client.host)]
    if is_websocket(environ):
        headers += [("Connection", "Upgrade"), ("Upgrade", "websocket")]
    else:
        headers.append(("Connection", "close"))
    protocol = "HTTP/1.0" if protocol == "HTTP/1.0" else "HTTP/1.1"
    lines = [f"{environ['REQUEST_METHOD']} {request_target(environ)} {protocol}"]
    lines += [f"{name}: {value}" for name, value in headers]
    if not all(TOKEN.fullmatch(name) for name, _ in headers):
        raise BadRequest("A header's name contains what no name may")
    if any(LINE_BREAKS.search(line) for line in lines):
        raise BadRequest("A header contains a line break")
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")


def strip_cookies(header: str, names: Iterable[str]) -> str:
    """A Cookie header without those cookies. WSGI hosts join two such headers with a comma."""
    def is_kept(part):
        return all(cookie.partition("=")[0].strip() not in names for cookie in part.split(","))

    return ";".join(filter(is_kept, header.split(";"))).strip()


@dataclass(frozen=True)
class ResponseHead:
    """A response's status and headers, as its server sent them."""

    status: int
    reason: str
    headers: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, raw: bytes) -> ResponseHead:
        """Raises ValueError for what is not HTTP, or could be read in two ways."""
        status_line, *lines = raw.decode("latin-1").split("\r\n")
        match = re.fullmatch(r"HTTP/1\.[0-9] ([1-9][0-9][0-9])(?: (.*))?", status_line)
        if match is None or any(LINE_BREAKS.search(line) for line in (status_line, *lines)):
            raise ValueError(f"not an HTTP/1 response: {shortened(status_line)}")
        pairs = [line.partition(":")[::2] for line in lines]
        if not all(TOKEN.fullmatch(name) for name, _ in pairs):
            raise ValueError("a header that is none")
        head = cls(int(match[1]), (match[2] or "").strip(), tuple((name, value.strip()) for name, value in pairs))
        head._check_length()
        return head

    def _check_length(self):
        lengths = {value for name, value in self.headers if name.lower() == "content-length"}
        if len(lengths) > 1 or not all(re.fullmatch(r"[0-9]{1,18}", length) for length in lengths):
            raise ValueError("no one Content-Length")

    def get(self, name: str) -> str:
        """The first header of that name, or ''."""
        return next((value for key, value in self.headers if key.lower() == name), "")

    def passed_on(self) -> list[tuple[str, str]]:
        """The headers that are for the client: no word about this connection or the whole site or to a web server in front,
        no cookie of the hub's."""
        dropped = HOP_BY_HOP | SENDS_FILE | ORIGIN_WIDE | {name.strip().lower() for name in self.get("connection").split(",")}
        if self.get("transfer-encoding"):
            dropped |= {"content-length"}  # RFC 9112, 6.3: it is overridden, and must not be passed on
        return [(name, value) for name, value in self.headers
                if name.lower() not in dropped and not (name.lower() == "set-cookie" and is_hub_cookie(value))]

    def encode(self) -> bytes:
        """The head as the client gets it. The connection ends with the response: the next request on it may be for
        somebody else's server."""
        framing = [("Transfer-Encoding", self.get("transfer-encoding"))] if self.get("transfer-encoding") else []
        ending = [("Connection", "Upgrade"), ("Upgrade", self.get("upgrade"))] if self.status == 101 else [
            ("Connection", "close")]
        lines = [f"HTTP/1.1 {self.status} {self.reason}"]
        lines += [f"{name}: {value}" for name, value in self.passed_on() + framing + ending]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def body_length(self, method: str) -> int | None:
        """How many bytes follow, or None where the end of the connection (or the last chunk) says so."""
        if method == "HEAD" or self.status in (204, 304):
            return 0
        return None if self.get("transfer-encoding") or not self.get("content-length") else int(
            self.get("content-length"))


def is_hub_cookie(text: str) -> bool:
    """Whether a Set-Cookie header sets a cookie of the hub's; a browser sends `=name=value` back as `name=value`."""
    return text.lstrip("= \t").partition(";")[0].partition("=")[0].strip() in HUB_COOKIES


def plain_response(status: str, content_type: str, body: str) -> bytes:
    """A whole response for a client whose socket has been taken over."""
    content = body.encode()
    return (f"HTTP/1.1 {status}\r\nContent-Type: {content_type}; charset=utf-8\r\nContent-Length: {len(content)}\r\n"
            f"X-JupyterHub-Version: {API_VERSION}\r\nConnection: close\r\n\r\n").encode() + content


# The client's socket, taken out of the WSGI server's hands.


class Handover:
    """A client's connection that is ours from now on; iterated over, it is the WSGI server's own empty response.

    The server goes on with one end of a socket pair in place of the client, whose other end is closed. What it reads
    ends at once, so that reading `wsgi.input` gives just the bytes it had buffered and never waits for the client. What
    it writes fails as if the client had gone, so that it closes, and never serves a request pipelined behind this one.
    """

    def __init__(self, environ: dict[str, Any], number: int):
        self._input = environ["wsgi.input"]
        self.client = socket.socket(fileno=os.dup(number))
        self._near_end, self._far_end = socket.socketpair()
        os.dup2(self._near_end.fileno(), number, inheritable=False)
        self._prepare()

    def _prepare(self):
        self._near_end.close()
        self._far_end.close()

    def buffered(self, length: int) -> bytes:
        """Those of the body's next `length` bytes that the server has read already."""
        return self._input.read(length) if length else b""

    def respond(self, start_response) -> Handover:
        """The response that the WSGI server is to believe in."""
        start_response("200 OK", [("Content-Length", "0")])
        return self

    def __iter__(self):
        return iter((b"",))


class HandoverFromUWSGI(Handover):
    """The same for uWSGI, which loses what it had buffered of a body that ends early, and logs every write that fails.

    So it is given as much to read as it asks for, and what it writes is taken and forgotten. It closes in any case.
    """

    def _prepare(self):
        """Both ends stay open until uWSGI has made its response."""

    def buffered(self, length):
        """Those bytes that were read before any of the padding was: as many as are left of that."""
        received = b""
        while len(received) < length:
            size = min(length - len(received), 4096)  # what any socket pair holds
            self._far_end.sendall(bytes(size + 1))  # one more, so that there always is something left
            data = self._input.read(size)
            count = len(self._near_end.recv(size + 1)) - 1
            received += data[:count]
            if count < size:
                break
        return received

    def close(self):
        """uWSGI has made its response."""
        self._near_end.close()
        self._far_end.close()


def take_over(environ: dict[str, Any], number: int) -> Handover:
    """The handover that suits the WSGI server."""
    return (HandoverFromUWSGI if "uwsgi.version" in environ else Handover)(environ, number)


def uwsgi_socket_number(environ: dict[str, Any]) -> int | None:
    """What uWSGI says is the client's socket. Behind its HTTP router, or a web server that speaks uWSGI's protocol, it is
    a connection to that, which is for this request alone and takes the same answer."""
    uwsgi = sys.modules["uwsgi"]
    if "x-wsgiorg.fdevent.readable" in environ or {"https-socket", "suwsgi-socket"} & uwsgi.opt.keys():
        return None  # its requests are no threads, as with gevent, or come over TLS
    if is_websocket(environ) and "UWSGI_ROUTER" in environ and not {"http-websockets", "http-raw-body"} & uwsgi.opt.keys():
        return None  # the router would pass on the answer, and then nothing that the client says
    return uwsgi.connection_fd()


def client_socket_number(environ: dict[str, Any]) -> int | None:
    """The file descriptor of the client's plain TCP or unix socket, where the WSGI server lets it be had."""
    if environ["SERVER_PROTOCOL"] not in ("HTTP/1.0", "HTTP/1.1"):
        return None  # an HTTP/2 connection carries other requests too
    if "gevent.monkey" in sys.modules and environ.get("wsgi.multithread"):
        return None  # under gevent sockets and threads are greenlets, which must not share a socket with a real thread
    if "uwsgi.version" in environ:
        return uwsgi_socket_number(environ)
    found = environ.get("gunicorn.socket") or environ.get("werkzeug.socket")
    if found is not None:
        return found.fileno() if type(found) is socket.socket else None  # a TLS socket is another type
    with contextlib.suppress(AttributeError, OSError, ValueError):
        number = environ["wsgi.input"].fileno()
        if stat.S_ISSOCK(os.fstat(number).st_mode):
            return number
    return None


class Splicer:
    """One asyncio thread that carries all connections which WSGI workers have handed over."""

    def __init__(self, idle_timeout: float):
        self.idle_timeout = idle_timeout
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._owner = 0
        self._thread: threading.Thread | None = None
        self._tasks: dict[asyncio.Task, Connection] = {}

    @property
    def is_full(self) -> bool:
        """Whether one more connection, of two sockets, would take what the process needs for other things."""
        return 2 * len(self._tasks) >= 0.8 * resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    def carry(self, connection: Connection) -> None:
        """Run the connection to its end."""
        self._running_loop().call_soon_threadsafe(self._start, connection)

    def _running_loop(self):
        """The loop, started on first use and anew after a fork, over which threads do not live."""
        with self._lock:
            if self._loop is None or self._owner != os.getpid():
                self._loop, self._owner, self._tasks = asyncio.new_event_loop(), os.getpid(), {}
                open_files_wide()
                self._thread = threading.Thread(target=self._run, args=(self._loop,), name="minihub-splicer", daemon=True)
                self._thread.start()
            return self._loop

    def _run(self, loop):
        asyncio.set_event_loop(loop)
        if self.idle_timeout:
            loop.call_later(self._sweep_interval, self._close_idle)
        try:
            loop.run_forever()
            loop.run_until_complete(loop.shutdown_default_executor())
        finally:
            loop.close()

    def close(self) -> None:
        """End all connections, and the thread. The next connection starts another."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None and self._owner == os.getpid():
            asyncio.run_coroutine_threadsafe(self._end_all(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join()

    async def _end_all(self):
        carried = dict(self._tasks)
        for task in carried:
            task.cancel()
        await asyncio.gather(*carried, return_exceptions=True)
        for connection in carried.values():  # a task that is cancelled before it has begun closes nothing
            connection.client.close()

    @property
    def _sweep_interval(self):
        return max(0.1, self.idle_timeout / 10)

    def _start(self, connection):
        task = asyncio.get_running_loop().create_task(connection.run())
        self._tasks[task] = connection  # asyncio itself holds tasks weakly
        task.add_done_callback(self._tasks.pop)

    def _close_idle(self):
        for task, connection in list(self._tasks.items()):
            if time.monotonic() - connection.last_byte > self.idle_timeout:
                task.cancel()
        asyncio.get_running_loop().call_later(self._sweep_interval, self._close_idle)


def open_files_wide() -> None:
    """Let this process have as many files and sockets open as it may: the usual 1,024 are some 400 connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, FILES_ENOUGH)), hard))


class Connection:
    """A client's socket in the splicer's hands. Subclasses must implement `serve`."""

    def __init__(self, client: socket.socket):
        self.client = client
        self.last_byte = time.monotonic()

    async def serve(self) -> None:
        """Everything that is to happen on the connection, until it can be closed."""
        raise NotImplementedError

    async def run(self) -> None:
        """Serve, and close whatever happens."""
        try:
            self.client.setblocking(False)
            notice_dead_peer(self.client)
            await self.serve()
        except OSError as error:
            log.debug("a proxied connection ended: %s", error)
        finally:
            await self._close_client()

    async def send(self, sink: socket.socket, data: bytes) -> None:
        """Write it all; waits for a slow reader, so no more than this is held for it."""
        self.last_byte = time.monotonic()
        await asyncio.get_running_loop().sock_sendall(sink, data)

    async def receive(self, source: socket.socket, size: int = CHUNK) -> bytes:
        """What has arrived, b"" at the end."""
        data = await asyncio.get_running_loop().sock_recv(source, size)
        self.last_byte = time.monotonic()
        return data

    async def copy(self, source: socket.socket, sink: socket.socket, count: int | None = None) -> None:
        """Move `count` bytes, or all until the end."""
        while count is None or count > 0:
            data = await self.receive(source, CHUNK if count is None else min(CHUNK, count))
            if not data:
                return
            await self.send(sink, data)
            count = count and count - len(data)

    async def discard(self, source: socket.socket) -> None:
        """Read until the client is gone. What it sends after its request is never passed on."""
        while await self.receive(source):
            continue

    async def _close_client(self):
        """Close so that the last bytes arrive: closing over unread input would make TCP throw them away."""
        with contextlib.closing(self.client), contextlib.suppress(OSError, asyncio.TimeoutError):
            self.client.shutdown(socket.SHUT_WR)
            await asyncio.wait_for(self.discard(self.client), 1)


def notice_dead_peer(connection: socket.socket) -> None:
    """Let the kernel find out within two minutes that the other side has vanished without a word."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4), ("TCP_NODELAY", 1)):
        with contextlib.suppress(AttributeError, OSError):  # not every system has each, and unix sockets have none
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


@dataclass(frozen=True)
class Exchange:
    """One request for a user's server, ready to be sent."""

    target: tuple[str, int]     # host and port of the server
    method: str
    websocket: bool
    head: bytes                 # the request's head as the server gets it, and what has been read of the body
    spool: Any                  # or a file with the whole body
    body_left: int              # how many bytes of the body the client is still to send
    unavailable: Callable[[], bytes]  # writes the whole response for when the server does not answer

    def after(self, received: bytes) -> Exchange:
        """The same exchange with more of its body received."""
        return dataclasses.replace(self, head=self.head + received, body_left=self.body_left - len(received))


class Forward(Connection):
    """One request on its way to a user's server and its response on the way back, or a websocket both ways."""

    def __init__(self, client: socket.socket, exchange: Exchange):
        super().__init__(client)
        self.exchange = exchange
        self.upgraded = asyncio.Event()

    async def serve(self):
        """Both directions at once; either end closes both."""
        with self.exchange.spool or contextlib.nullcontext():
            await self._exchange()

    async def _exchange(self):
        try:
            upstream = await self._connect()
        except (OSError, asyncio.TimeoutError):
            return await self._apologize()
        with contextlib.closing(upstream):
            directions = [asyncio.ensure_future(self._to_server(upstream)),
                          asyncio.ensure_future(self._to_client(upstream))]
            try:
                await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for direction in directions:
                    direction.cancel()
                await asyncio.gather(*directions, return_exceptions=True)

    async def _connect(self):
        upstream = socket.socket(socket.AF_INET6 if ":" in self.exchange.target[0] else socket.AF_INET)
        try:
            upstream.setblocking(False)
            notice_dead_peer(upstream)
            await asyncio.wait_for(asyncio.get_running_loop().sock_connect(upstream, self.exchange.target), CONNECT_TIMEOUT)
        except BaseException:
            upstream.close()
            raise
        return upstream

    async def _to_server(self, upstream):
        """Returns when the client has gone."""
        try:
            await self._send_request(upstream)
        except (BrokenPipeError, ConnectionResetError):  # it has read enough, and may have said why
            return await self.discard(self.client)
        if not self.exchange.websocket:
            return await self.discard(self.client)
        if early := await self.receive(self.client):  # also tells when the client goes before there is an answer
            await self.upgraded.wait()
            await self.send(upstream, early)
            await self.copy(self.client, upstream)

    async def _send_request(self, upstream):
        await self.send(upstream, self.exchange.head)
        while self.exchange.spool and (data := self.exchange.spool.read(CHUNK)):
            await self.send(upstream, data)
        await self.copy(self.client, upstream, self.exchange.body_left)

    async def _to_client(self, upstream):
        """Returns when the response is complete."""
        try:
            head, rest = await self._response_head(upstream)
        except (OSError, ValueError) as error:
            log.warning("the server at %s:%s answered no HTTP: %s", *self.exchange.target, error)
            return await self._apologize()
        await self.send(self.client, head.encode() + rest)
        if head.status == 101:
            self.upgraded.set()
        length = None if head.status == 101 else head.body_length(self.exchange.method)
        await self.copy(upstream, self.client, length if length is None else max(0, length - len(rest)))

    async def _response_head(self, upstream):
        """The final response's head and what came along with it; interim ones (1xx) are for us and are skipped."""
        received = b""
        while True:
            while b"\r\n\r\n" not in received:
                data = await self.receive(upstream)
                if not data or len(received) > HEAD_LIMIT:
                    raise ValueError("its response has no end of headers")
                received += data
            raw, _, received = received.partition(b"\r\n\r\n")
            head = ResponseHead.parse(raw)
            if head.status >= 200 or (head.status == 101 and self.exchange.websocket):
                return head, received

    async def _apologize(self):
        head, end, body = self.exchange.unavailable().partition(b"\r\n\r\n")
        await self.send(self.client, head + end + (b"" if self.exchange.method == "HEAD" else body))


def content_length(environ: dict[str, Any]) -> int | None:
    """The length of the request's body, None if it has none. Raises BadRequest."""
    length = environ.get("CONTENT_LENGTH") or None
    if length and not re.fullmatch(r"[0-9]{1,18}", length):
        raise BadRequest("Content-Length is not a number")
    return length and int(length)


def spooled_body(environ: dict[str, Any]):
    """A file with the whole of a chunked body, None for others: where the next chunk starts only the worker knows."""
    if not environ.get("HTTP_TRANSFER_ENCODING"):
        return None
    if environ.get("wsgi.input_terminated"):
        read = functools.partial(environ["wsgi.input"].read, CHUNK)
    elif "uwsgi.version" in environ and not environ.get("CONTENT_LENGTH"):
        read = sys.modules["uwsgi"].chunked_read
    else:
        raise BadRequest("This server needs a Content-Length, it cannot read a body that comes in chunks")
    with contextlib.ExitStack() as opened:
        spool = opened.enter_context(tempfile.SpooledTemporaryFile(max_size=1024 * 1024))
        try:
            while data := read():
                spool.write(data)
                if spool.tell() > SPOOL_LIMIT:
                    raise TooLarge("The body is too long for one that comes in chunks. Send it with a Content-Length")
        except OSError:  # gunicorn's parse errors are kinds of it
            raise BadRequest("The body's chunks are broken, or end too early") from None
        opened.pop_all()
        return spool


def file_length(file) -> int:
    """How much has been written to a file, which is rewound for reading."""
    length = file.tell()
    file.seek(0)
    return length


def check_host_can_carry(environ: dict[str, Any]) -> None:
    """Raises NotPossible or Unavailable for what cannot go through the worker itself."""
    if is_websocket(environ):
        raise NotPossible("This web server does not let the hub carry websockets, which notebooks need. Run the hub"
                          " with gunicorn, or with uWSGI and its --http-socket, without TLS in the worker, or set"
                          " MINIHUB_PROXY to an external proxy")
    if not environ["wsgi.multithread"] and not environ["wsgi.multiprocess"]:
        raise Unavailable("This web server has a single thread, which a notebook server would need while it keeps it"
                          " busy. Run the hub with gunicorn, or with more threads")


def upstream_protocol(environ: dict[str, Any], number: int | None) -> str:
    """HTTP/1.0, so that the response does not come in chunks, where a WSGI server frames it, or a web server that has
    spoken uWSGI's protocol."""
    plain = number is None or ("uwsgi.version" in environ and not is_websocket(environ))
    return "HTTP/1.0" if plain else environ["SERVER_PROTOCOL"]


def read_head(response) -> ResponseHead:
    """The head that a file with the response to an HTTP/1.0 request begins with. Raises ValueError."""
    raw = b""
    for line in iter(functools.partial(response.readline, HEAD_LIMIT), b"\r\n"):
        raw += line
        if not line or len(raw) > HEAD_LIMIT:
            raise ValueError("its response has no end of headers")
    head = ResponseHead.parse(raw.removesuffix(b"\r\n"))
    if head.get("transfer-encoding"):
        raise ValueError("it answers HTTP/1.0 with chunks")
    return head


def stream_through(environ, start_response, exchange: Exchange, idle_timeout: float) -> Iterable[bytes]:
    """Carry an exchange in the worker's own thread, where the WSGI host lends nobody its sockets."""
    with contextlib.ExitStack() as opened:
        opened.enter_context(exchange.spool or contextlib.nullcontext())
        upstream = opened.enter_context(socket.create_connection(exchange.target, CONNECT_TIMEOUT))
        upstream.settimeout(idle_timeout or None)
        notice_dead_peer(upstream)
        upstream.sendall(exchange.head)
        while exchange.spool and (data := exchange.spool.read(CHUNK)):
            upstream.sendall(data)
        left = exchange.body_left
        while left and (data := environ["wsgi.input"].read(min(CHUNK, left))):
            upstream.sendall(data)
            left -= len(data)
        wait_for_response(upstream, environ["minihub.mount"], idle_timeout)
        response = opened.enter_context(upstream.makefile("rb"))
        head = read_head(response)
        start_response(f"{head.status} {head.reason}", head.passed_on())
        return Streamed(opened.pop_all(), response, head.body_length(exchange.method))


def wait_for_response(upstream: socket.socket, mount: Mount, idle_timeout: float) -> None:
    """Wait until the server answers. Raises Unavailable if meanwhile nobody is left to answer what it may have to ask the hub.

    Where every thread waits for a server, and every server for the hub, they would wait for ever.
    """
    deadline = time.monotonic() + (idle_timeout or math.inf)
    upstream.settimeout(min(STARVED_AFTER, idle_timeout or math.inf))
    while True:
        try:
            upstream.recv(1, socket.MSG_PEEK)
            break
        except TimeoutError:
            if time.monotonic() >= deadline:
                raise
            if is_starved(mount):
                raise Unavailable("More people than this web server has threads are asking their servers for something. Try"
                                  " again in a moment, or run the hub with more threads", retry_after=5) from None
    upstream.settimeout(idle_timeout or None)


def is_starved(mount: Mount) -> bool:
    """Whether the WSGI host takes up no request, as it does while all its threads are busy."""
    parts = urlsplit(mount.address)
    try:
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        with socket.create_connection((parts.hostname, port), STARVED_AFTER) as connection:
            connection.sendall(f"GET {mount.hub}health HTTP/1.0\r\nHost: {parts.netloc}\r\n\r\n".encode())
            connection.recv(1)  # where it speaks TLS, this is the end of the connection
    except TimeoutError:
        return True
    except OSError:
        return False
    return False


class Streamed:
    """A response's body as the WSGI server asks for it; closes the connection when that is done or given up."""

    def __init__(self, opened, response, length):
        self._opened, self._response, self._left = opened, response, length

    def __iter__(self):
        while self._left != 0 and (data := self._response.read1(min(CHUNK, self._left or CHUNK))):
            self._left = self._left and self._left - len(data)
            yield data

    def close(self):
        """The client has all of it, or is gone."""
        self._opened.close()


class EmbeddedProxy(Proxy):
    """The hub's own proxy. Its routes are rows, so every worker has them; its traffic is carried beside the workers."""

    def add_route(self, prefix, target, data):
        """Write the route down, for all workers at once."""
        upsert(Route.prefix, prefix, target=target, data=data)

    def delete_route(self, prefix):
        """Strike the route out, for all workers at once."""
        Route.delete().where(Route.prefix == prefix).execute()

    def get_all_routes(self):
        """The table, ordered by prefix."""
        return {row.prefix: {"routespec": row.prefix, "target": row.target, "data": row.data}
                for row in Route.select().order_by(Route.prefix)}

    def forward(self, environ, start_response, target: str, client: Client,
                unavailable: Callable[[], bytes]) -> Iterable[bytes]:
        """Answer the request with what the server at `target` answers; `unavailable` writes the response if it does not.

        Raises BadRequest, and Unavailable or NotPossible where this WSGI host cannot carry such a request.
        """
        number = client_socket_number(environ)
        if number is None:
            check_host_can_carry(environ)
        spool = spooled_body(environ)
        length = file_length(spool) if spool else content_length(environ)
        head = request_head(environ, client, length, upstream_protocol(environ, number))
        exchange = Exchange((urlsplit(target).hostname, urlsplit(target).port), environ["REQUEST_METHOD"],
                            is_websocket(environ), head, spool, 0 if spool else length or 0, unavailable)
        if number is None:
            try:
                return stream_through(environ, start_response, exchange, self.settings.proxy_idle_timeout)
            except (OSError, ValueError):
                raise Unavailable("The server does not answer") from None
        if self.splicer.is_full:
            raise Unavailable("The hub has as many connections as it can carry. Close some notebooks, or raise the limit of open"
                              " files (ulimit -n) of the hub's process", retry_after=5)
        handover = take_over(environ, number)
        self.splicer.carry(Forward(handover.client, exchange.after(handover.buffered(exchange.body_left))))
        return handover.respond(start_response)


class ConfigurableHTTPProxy(Proxy):
    """JupyterHub's own proxy, a program beside the hub, driven through its REST API. People then reach the hub through it.

    Where its API is and with which token is a fact of the database: `PATCH /proxy` moves all workers at once.
    """

    def place(self) -> dict[str, str]:
        """Where the proxy's API is now: `api_url` and `auth_token`."""
        return remember("proxy", {"api_url": self.settings.chp_api_url.rstrip("/"),
                                  "auth_token": self.settings.chp_auth_token or secrets.token_hex(32)})

    def move(self, changes: dict[str, Any]) -> None:
        """Drive another proxy from now on. `ip`, `port`, `protocol`, `api_url` and `auth_token` are what may change.

        Raises BadRequest for an address that is none.
        """
        place = self.place()
        api_url = changes.get("api_url") or place["api_url"]
        if _is_address(api_url):
            api_url = self._changed_address(urlsplit(api_url), changes)
        if not _is_address(api_url):
            raise BadRequest(f"The proxy's API must be at an address like http://127.0.0.1:8001, not {shortened(api_url)}")
        store("proxy", {"api_url": api_url, "auth_token": changes.get("auth_token") or place["auth_token"]})

    def _changed_address(self, parts, changes):
        host, port = changes.get("ip") or parts.hostname, changes.get("port") or parts.port
        host = f"[{host}]" if ":" in host else host
        scheme = (changes.get("protocol") or parts.scheme).rstrip(":/")
        return f"{scheme}://{host}{f':{port}' if port else ''}{parts.path.rstrip('/')}"

    def keep_running(self, hub: str) -> None:
        """Start the proxy if it is ours to run and does not; `hub` is the URL of the hub's pages, for its error pages."""
        place, api = self.place(), urlsplit(self.settings.chp_api_url)
        state = remember("proxy_process", None)
        ours = self.settings.chp_command and place["api_url"] == self.settings.chp_api_url.rstrip("/")
        if not ours or (state and poll_process(state) is None):
            return
        run = Path(self.settings.run_dir) / f"proxy@{secrets.token_hex(4)}"
        run.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        words = [*shlex.split(self.settings.chp_command), "--api-ip", api.hostname, "--api-port", str(api.port or 80),
                 "--error-target", f"{hub}error"]
        variables = {**self.settings.inherited_variables(), "CONFIGPROXY_AUTH_TOKEN": place["auth_token"]}
        store("proxy_process", start_process(run, words, "proxy", env=variables))
        log.info("proxy: started at %s", self.settings.chp_api_url)

    def stop_running(self) -> None:
        """End the proxy, if it was ours to run."""
        state = remember("proxy_process", None)
        if state:
            store("proxy_process", stop_process(state, ((0, signal.SIGTERM),)))
            log.info("proxy: stopped")

    def add_route(self, prefix, target, data):
        """Tell the proxy. Raises Unavailable."""
        self._request("POST", prefix, {**data, "target": target, "jupyterhub": True})

    def delete_route(self, prefix):
        """Tell the proxy. Raises Unavailable."""
        self._request("DELETE", prefix)

    def get_all_routes(self):
        """The routes that are the hub's; others may have some of their own. Raises Unavailable."""
        routes = {}
        for path, entry in (self._request("GET", "/") or {}).items():
            if entry.pop("jupyterhub", False):
                prefix = quote(path.rstrip("/"), safe="/@~") + "/"
                routes[prefix] = {"routespec": prefix, "target": entry.pop("target"), "data": entry}
        return routes

    def _request(self, method, prefix, body=None):
        place = self.place()
        parts = urlsplit(place["api_url"])
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname, parts.port, timeout=CONNECT_TIMEOUT)
        try:
            with contextlib.closing(connection):
                connection.request(method, f"{parts.path.removesuffix('/api/routes')}/api/routes{prefix.rstrip('/') or '/'}",
                                   json.dumps(body), {"Authorization": f"token {place['auth_token']}"})
                response = connection.getresponse()
                content = response.read()
                if response.status >= 400 and (method, response.status) != ("DELETE", 404):
                    raise Unavailable(f"The proxy at {place['api_url']} refuses to {method} a route: {response.status}")
                return json.loads(content) if content and method == "GET" else None
        except (OSError, ValueError, http.client.HTTPException):
            raise Unavailable(f"The proxy at {place['api_url']} does not answer") from None


PROXIES = {"embedded": EmbeddedProxy, "chp": ConfigurableHTTPProxy}


########################################################################################################
# 8. The hub's operations
########################################################################################################


@dataclass(frozen=True)
class Mount:
    """Where the hub is reached: by browsers below the path `base`, by its servers at `address` (http://host:port)."""

    base: str
    address: str

    @property
    def hub(self) -> str:
        """The path of the hub's own pages."""
        return f"{self.base}hub/"

    def server_prefix(self, user_name: str, server_name: str) -> str:
        """The path of a user's server."""
        return f"{self.base}user/{quote_name(user_name)}/" + (f"{quote_name(server_name)}/" if server_name else "")


@dataclass(frozen=True)
class Identity:
    """Who is asking, and by what right. A token with a `client` (OAuth) serves only to be identified by."""

    kind: str                                   # "user" or "service"
    name: str
    admin: bool
    user_id: int | None
    created: datetime
    last_activity: datetime | None
    token_id: int | None = None
    token_last_activity: datetime | None = None
    client: str | None = None                   # the OAuth client's id
    client_server: str | None = None            # what that client is: `ada/gpu`,
    client_service: str | None = None           # or the name of a service
    server_id: int | None = None                # the server that runs with this token
    session_id: str = ""


class CompiledQuery:
    """A query whose SQL is written once: peewee takes some 230 us to write one, SQLite 7 us to answer it."""

    def __init__(self, query: pw.Query):
        self._query = query
        self._sql: dict[str, str] = {}

    def run(self, database: pw.Database, *values: Any):
        """A cursor over the answer, with `values` in place of those the query was written with."""
        sql = self._sql.get(database.param) or self._sql.setdefault(database.param, self._query.sql()[0])
        return database.execute_sql(sql, values)


to_moment = MomentField().python_value
to_stored = MomentField().db_value

Owner, Caller = User.alias(), Service.alias()
TOKEN_BY_HASH = CompiledQuery(
    Token.select(User.name, User.admin, User.id, User.created, User.last_activity, Caller.name, Caller.admin,
                 Caller.created, Token.id, Token.last_activity, OAuthClient.identifier, Owner.name, Server.name,
                 Service.name, Token.server, Token.session_id, Token.expires_at)
    .join(User, pw.JOIN.LEFT_OUTER).join(Caller, pw.JOIN.LEFT_OUTER, on=(Caller.id == Token.service))
    .join(OAuthClient, pw.JOIN.LEFT_OUTER, on=(OAuthClient.id == Token.client))
    .join(Server, pw.JOIN.LEFT_OUTER, on=(Server.id == OAuthClient.server))
    .join(Owner, pw.JOIN.LEFT_OUTER, on=(Owner.id == Server.user))
    .join(Service, pw.JOIN.LEFT_OUTER, on=(Service.id == OAuthClient.service))
    .where(Token.hashed == ""))
GROUPS_OF_USER = CompiledQuery(
    Group.select(Group.name).join(Membership).where(Membership.user == 0).order_by(Group.name))
_ACTIVE_SERVERS = Server.select(Server.user, Server.name, Server.status, Server.state, Server.user_options,
                                Server.started, Server.last_activity).order_by(Server.name)
ACTIVE_SERVERS = CompiledQuery(_ACTIVE_SERVERS.where(Server.status != ""))
ACTIVE_SERVERS_OF_USER = CompiledQuery(_ACTIVE_SERVERS.where((Server.user == 0) & (Server.status != "")))
ROUTE_BY_PREFIX = CompiledQuery(
    Route.select(Route.prefix, Route.target, Route.data).where(Route.prefix.in_(["", ""])))


def _activity_update(model):
    return CompiledQuery(model.update(last_activity=now()).where(
        (model.id == 0) & (model.last_activity.is_null() | (model.last_activity < now()))))


ACTIVITY_UPDATES = {model: _activity_update(model) for model in (Token, User, Server)}

ACTIVE = ("spawning", "ready", "stopping")
PENDING = {"spawning": "spawn", "stopping": "stop"}  # in the API's words
PORT_TAKEN = re.compile(r"address already in use|EADDRINUSE|port \S+ is (?:already in use|not available)", re.IGNORECASE)
INTERRUPTED_AFTER = 10    # seconds after which a start without a process was its worker's last act
POLL_READY_AFTER = 10     # seconds between two looks of the ticker at a server that runs
PURGE_AFTER = 60          # seconds between two clean-ups
CODE_LIFETIME = 300       # seconds an OAuth code can be redeemed
CHALLENGE = re.compile(r"[A-Za-z0-9_-]{43}")  # RFC 7636: the unpadded base64url of a SHA-256
LEASE = 5                 # seconds after which another worker ticks if this one has stopped to
STEADY_AFTER = 60         # seconds after which a service that still runs has not died at once
CHECK_ROUTES_AFTER = 5    # seconds between two comparisons of the proxy's routes with those wanted
MAX_ATTEMPTS = 3          # starts of a server whose port somebody else has taken
#: Who may fail how often. An address holds no blank, so that no name can be spelled to count as something else.
FAILURES = (("address {address} name {name}", 5), ("name {name}", 50), ("address {address}", 200))
FAILURES_FORGOTTEN = 300  # seconds for which they count; a whole class can sit behind one address


class HubCore:
    """Everything a hub does, free of HTTP. Methods expect to run inside `connected()`, as those of `Hub` do."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self._databases: dict[int, pw.Database] = {}
        self._mount: Mount | None = None
        self._looked_at: dict[int, float] = {}
        self._waiting = threading.BoundedSemaphore(2)
        self._holder = secrets.token_hex(8)
        self._proxy_is_down = False
        self._remove_database: Callable[[], Any] = lambda: None  # a database that is in memory does
        self._next_poll = self._next_purge = self._next_check = 0.0
        self.authenticator = _load("authenticator", settings.authenticator, AUTHENTICATORS, Authenticator)
        self.spawner = _load("spawner", settings.spawner, SPAWNERS, Spawner)
        self.proxy = _load("proxy", settings.proxy, PROXIES, Proxy)
        _demand(not settings.user_url or isinstance(self.proxy, EmbeddedProxy), "user_url", "needs the hub's own proxy",
                settings.user_url)
        for hook in (self.authenticator, self.spawner, self.proxy):
            hook.settings = settings
        self.proxy.splicer = self.splicer = Splicer(settings.proxy_idle_timeout)
        self._prepare_database()
        self.disconnect()  # a fork must not inherit the connection

    # The database

    def _prepare_database(self):
        """Raises SettingError for a database that cannot be used: no server there, a file of another kind, read-only."""
        try:
            with self.connected():
                prepare_schema(self.database)
                self.secret = remember("cookie_secret", secrets.token_hex(32))
        except (pw.DatabaseError, pw.ImproperlyConfigured, BadRequest) as error:
            # A URL can hold a password, a file's name is not secret.
            shown = re.sub(r"//[^/]*@", "//...@", self.settings.database)
            raise SettingError("database", f"cannot be used ({str(error).splitlines()[0]})", shown) from None

    @property
    def database(self) -> pw.Database:
        """This process's database. What was opened before a fork is kept, unused: closing it would hurt the parent."""
        process = os.getpid()
        if process not in self._databases:
            self._databases.setdefault(process, open_database(self._database_url))  # of several threads, the first one's
        return self._databases[process]

    @functools.cached_property
    def _database_url(self):
        """The setting, or a file that ends with the hub: each thread has a connection of its own, and SQLite would give
        each a memory of its own."""
        url = self.settings.database
        if url not in ("sqlite:///:memory:", "sqlite://:memory:", "sqlite:///"):
            path = url.removeprefix("sqlite:").removeprefix("///").partition("?")[0]
            return f"sqlite:///{os.path.abspath(path)}" if url.startswith("sqlite:") else url
        folder = tempfile.mkdtemp(prefix="minihub-")
        self._remove_database = weakref.finalize(self, remove_folder, folder, os.getpid())
        return f"sqlite:///{folder}/memory.sqlite"

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Make this hub the one at work in this thread, with its connection to the database open."""
        database = self.database
        token = _current_database.set(database)
        try:
            database.connect(reuse_if_open=True)
            yield
        finally:
            _current_database.reset(token)

    def disconnect(self) -> None:
        """Close this thread's connection; the next request opens another."""
        if not self.database.is_closed():
            self.database.close()

    def check_health(self) -> None:
        """Raises one of DatabaseTrouble if the database does not answer."""
        self.database.execute_sql("SELECT 1")

    # What the site that the hub is mounted in wants to know

    def _tell(self, event, *facts):
        """Call the site back, which can neither stop what has happened nor break the hub."""
        callback = getattr(self.settings, event)
        if callback is None:
            return
        try:
            callback(*facts)
        except Exception:  # a hook that somebody else wrote
            log.exception("%s failed", event)

    # Where the hub is

    def arrive(self, mount: Mount) -> None:
        """Note where a request has reached the hub, for the ticker and the command line, which have no request."""
        if mount != self._mount:
            self._mount = mount
            with in_passing():
                store("mount", dataclasses.asdict(mount))

    @property
    def mount(self) -> Mount:
        """Where the hub was reached last."""
        if self._mount is None:
            known = Setting.get_or_none(Setting.key == "mount")
            self._mount = Mount(**known.value) if known else self.guess_mount()
        return self._mount

    def guess_mount(self) -> Mount:
        """Where a hub that has had no request yet is likely to be."""
        return Mount(quote(self.settings.base_url, safe="/@~"),
                     self.settings.hub_url or listening_address() or "http://127.0.0.1:8000")

    def public_link(self, path: str, site: str = "") -> str:
        """A link for people, to `path` below the hub's pages; `site` is https://host where the one who asks sees them."""
        return f"{self.settings.public_url or site or self.mount.address}{self.mount.hub}{path}"

    def users_site(self, user_name: str) -> str:
        """https://host of a user's servers; '' where they are below the hub's own address."""
        return self.settings.user_url and self.settings.user_url.replace("{username}", host_label(user_name))

    def url_of(self, user_name: str, server_name: str) -> str:
        """Where browsers find a server: a path, or a whole URL if servers have a host name of their own."""
        return self.users_site(user_name) + self.mount.server_prefix(user_name, server_name)

    # People

    def normalize(self, name: str) -> str:
        """The one spelling of a user's or group's name. Raises BadRequest for what can be no name."""
        normal = self.authenticator.normalize(name)
        if not is_valid_name(normal):
            raise BadRequest(f"Invalid username: {name}")
        return normal

    def get_user(self, name: str) -> User | None:
        """The user of that name, however it is spelled."""
        normal = self.authenticator.normalize(name)
        return User.get_or_none(User.name == normal) if is_valid_name(normal) else None

    def find_user(self, name: str) -> User:
        """The user of that name. Raises NotFound."""
        user = self.get_user(name)
        if user is None:
            raise NotFound(f"No such user: {name}")
        return user

    def create_user(self, name: str, admin: bool = False) -> User:
        """A new user. Raises BadRequest for an invalid name, Conflict if there is one of that name."""
        user = self._create_user(name, admin)
        self._tell("on_user_created", user.name)
        return user

    def _create_user(self, name, admin):
        name = self.normalize(name)
        try:
            with self.database.atomic():
                return self._insert_users([name], admin)[0]
        except pw.IntegrityError:
            raise Conflict(f"User {name} already exists") from None

    def create_users(self, names: list[str], admin: bool = False) -> list[User]:
        """Those of the users who are new, in one transaction: all or nothing.

        Raises BadRequest, naming every invalid name, and Conflict if none is new.
        """
        normal = {name: self.authenticator.normalize(name) for name in names}
        invalid = [name for name in names if not is_valid_name(normal[name])]
        if invalid:
            raise BadRequest(f"Invalid username{'s' if len(invalid) > 1 else ''}: {', '.join(invalid)}")
        wanted = list(dict.fromkeys(normal.values()))
        try:
            users = self._insert_new_users(wanted, admin)
        except pw.IntegrityError:  # somebody else has made one of them in this moment
            users = self._insert_new_users(wanted, admin)
        for user in users:
            self._tell("on_user_created", user.name)
        return users

    def _insert_new_users(self, wanted, admin):
        with self.database.atomic():
            existing = {row.name for part in pw.chunked(wanted, 500)  # SQLite takes only so many values at once
                        for row in User.select(User.name).where(User.name.in_(part))}
            new = [name for name in wanted if name not in existing]
            if not new:
                raise Conflict(f"All {len(wanted)} users already exist")
            return self._insert_users(new, admin)

    def find_or_create_user(self, name: str) -> User:
        """The user whom the authenticator vouches for, who may be new. Raises BadRequest for an invalid name."""
        user = self.get_user(name)
        if user is None:
            with contextlib.suppress(Conflict):  # another of the browser's first requests was faster
                self.create_user(name)
            user = self.find_user(name)
        return user

    def admit(self, name: str, facts: dict[str, Any]) -> User:
        """The user whom the host site has signed in, now with the `admin` flag and the `groups` that it gives them.

        Writes only what has changed, and leaves out names that no group may bear. Raises BadRequest for an invalid name.
        """
        user = self.find_or_create_user(name)
        admin = bool(facts.get("admin", user.admin)) or user.name in self._admin_names
        if admin != user.admin:
            self.change_user(user, {"admin": admin})
        if "groups" in facts:
            self._put_into_groups(user, {group for group in facts["groups"] if is_valid_name(group)})
        return user

    def _put_into_groups(self, user, names):
        if names == {name for name, in GROUPS_OF_USER.run(self.database, user.id)}:
            return
        with self.database.atomic():
            for name in sorted(names):
                Group.insert(name=name).on_conflict_ignore().execute()
            groups = list(Group.select().where(Group.name.in_(names)))
            Membership.delete().where((Membership.user == user) & Membership.group.not_in(groups)).execute()
            for group in groups:
                Membership.insert(user=user, group=group).on_conflict_ignore().execute()
        log.info("user %s is now in groups: %s", user.name, ", ".join(sorted(names)))

    def _insert_users(self, names, admin):
        """Rows for users who are new, and for their default servers, in as few statements as a database takes."""
        users = []
        for part in pw.chunked(names, 50):
            folders = {name: folder_name(name) for name in part}
            taken = {row.folder for row in User.select(User.folder).where(User.folder.in_(list(folders.values())))}
            User.insert_many([{"name": name, "admin": admin or name in self._admin_names,
                               "folder": f"{folder}-{secrets.token_hex(4)}" if folder in taken else folder}  # renamed since
                              for name, folder in folders.items()]).execute()
            users.extend(User.select().where(User.name.in_(part)).order_by(User.id))
            Server.insert_many([{"user": user} for user in users[-len(part):]]).execute()
        log.info("users created%s: %s", ", as admins" if admin else "", shortened(", ".join(names)))
        return users

    @property
    def _admin_names(self):
        return {self.authenticator.normalize(name) for name in self.settings.admins}

    def _admit_configured_admins(self):
        for name in self._admin_names:
            _demand(is_valid_name(name), "admins", "must hold names that users can have", name)
            with contextlib.suppress(Conflict):
                self.create_user(name)
        if self._admin_names:
            User.update(admin=True).where(User.name.in_(self._admin_names)).execute()

    def change_user(self, user: User, changes: dict[str, Any]) -> None:
        """Write new values of `name`, `admin` or `auth_state`. Raises BadRequest."""
        if "name" in changes:
            changes = {**changes, "name": self.normalize(changes["name"])}
        renamed = changes.get("name", user.name) != user.name
        try:
            with self.database.atomic():
                self._hold(user)
                if renamed and user.servers.where(Server.status.in_(ACTIVE)).exists():
                    raise BadRequest(f"Stop the servers of {user.name} before giving them another name")
                if changes:
                    User.update(**changes).where(User.id == user.id).execute()
        except pw.IntegrityError:
            raise BadRequest(f"User {changes['name']} already exists, username must be unique") from None
        for key, value in changes.items():
            setattr(user, key, value)
        if changes:
            log.info("user %s changed: %s", user.name, ", ".join(changes))

    def delete_user(self, user: User, wait: float) -> None:
        """Stop the user's servers, then forget the user; the home stays. Raises BadRequest while one is stopping."""
        for server in self._all_servers(user):
            self.stop(server)
        self.wait_until(lambda: not self.active_servers(user), wait)
        with self.database.atomic():
            self._hold(user)
            if user.servers.where(Server.status.in_(ACTIVE)).exists():
                raise BadRequest(f"{user.name}'s server is in the process of stopping, please wait.")
            user.delete_instance()
        log.info("user %s deleted", user.name)

    def active_servers(self, user: User) -> list[Server]:
        """The user's servers that are not stopped, each observed just now."""
        return [server for server in self._all_servers(user) if self.observe(server).status in ACTIVE]

    # Groups

    def list_groups(self) -> list[Group]:
        """All groups, in the order they were made."""
        return list(Group.select().order_by(Group.id))

    def find_group(self, name: str) -> Group:
        """The group of that name. Raises NotFound."""
        group = Group.get_or_none(Group.name == name) if is_valid_name(name) else None
        if group is None:
            raise NotFound(f"No such group: {name}")
        return group

    def create_groups(self, names: list[str], members: list[str]) -> list[Group]:
        """New groups with the same members, all or none. Raises BadRequest and, if there is one already, Conflict."""
        try:
            with self.database.atomic():
                groups = [self._create_group(name) for name in names]
                for group in groups:
                    self.add_members(group, members)
        except pw.IntegrityError:
            raise Conflict(f"Group {', '.join(names)} already exists") from None
        log.info("groups created: %s", ", ".join(names))
        return groups

    def _create_group(self, name):
        if not is_valid_name(name):
            raise BadRequest(f"Invalid group name: {name}")
        return Group.create(name=name)

    def delete_group(self, group: Group) -> None:
        """Forget the group; its members stay users."""
        group.delete_instance()
        log.info("group %s deleted", group.name)

    def add_members(self, group: Group, names: list[str]) -> None:
        """Add users to the group, all or none; who is in it already stays so. Raises BadRequest for an unknown one."""
        with self.database.atomic():
            for user in self._known_users(names):
                Membership.insert(user=user, group=group).on_conflict_ignore().execute()

    def remove_members(self, group: Group, names: list[str]) -> None:
        """Take users out of the group, all or none; who is not in it stays out. Raises BadRequest for an unknown one."""
        with self.database.atomic():
            known = self._known_users(names)
            Membership.delete().where((Membership.group == group) & Membership.user.in_(known)).execute()

    def _known_users(self, names):
        users = [self.get_user(name) for name in names]
        if None in users:
            raise BadRequest(f"No such user: {names[users.index(None)]}")
        return users

    def group_models(self, groups: list[Group]) -> list[dict[str, Any]]:
        """The API's list of groups, in one query however many they are."""
        members = {}
        rows = (Membership.select(Membership.group, User.name).join(User)
                .where(Membership.group.in_(groups)).order_by(Membership.id).tuples())
        for group_id, name in rows:
            members.setdefault(group_id, []).append(name)
        return [{"kind": "group", "name": group.name, "users": members.get(group.id, [])} for group in groups]

    # Signing in

    def sign_in(self, credentials: dict[str, Any], environ: dict[str, Any], address: str,
                known_only: bool = False) -> User | None:
        """The user these credentials prove, made now if the authenticator vouches for a new one, unless `known_only`.

        Raises TooMany when the name or the address has failed too often.
        """
        name = storable(self.authenticator.normalize(str(credentials.get("username") or ""))[:NAME_LENGTH])
        keys = {template.format(name=name, address=neighbourhood(address)): limit for template, limit in FAILURES}
        self._check_failures(keys)
        found = self.authenticator.authenticate(credentials, environ)
        if found is None or not is_valid_name(self.authenticator.normalize(found)):
            self._count_failure(keys)
            log.info("sign-in failed: %r from %s", name, address)  # a name that is none can hold a line break
            return None
        narrowest, *_ = keys
        Failure.delete().where(Failure.key == narrowest).execute()
        user = self.get_user(found) if known_only else self.find_or_create_user(found)
        if user is None:
            return None
        self.note_visit(user)
        log.info("user %s signed in from %s", user.name, address)
        return user

    def _check_failures(self, keys):
        for row in Failure.select().where(Failure.key.in_(list(keys)) & (Failure.until > now())):
            if row.count >= keys[row.key]:
                wait = math.ceil((row.until - now()).total_seconds())
                raise TooMany(f"Too many failed sign-ins. Try again in {wait} seconds", retry_after=wait)

    def _count_failure(self, keys):
        until = now() + timedelta(seconds=FAILURES_FORGOTTEN)
        with self.database.atomic():
            Failure.delete().where(Failure.key.in_(list(keys)) & (Failure.until <= now())).execute()
            for key in keys:
                (Failure.insert(key=key, count=1, until=until)
                 .on_conflict(conflict_target=[Failure.key], update={Failure.count: Failure.count + 1}).execute())

    def user_of_session(self, user_id: int, session_key: str) -> User | None:
        """The user to whom a cookie was given, unless they have signed out everywhere since."""
        return User.get_or_none((User.id == user_id) & (User.session_key == session_key))

    def set_password(self, user: User, password: str) -> None:
        """Give the user a new password, which ends all sign-ins, to servers too, and links. Raises BadRequest for a weak one."""
        if len(password) < 8 or len(password) > 1000 or password.strip().lower() == user.name:
            raise BadRequest("Choose a password of at least 8 characters that is not your name")
        user.password, user.session_key = hash_password(password), new_token()
        with self.database.atomic():
            user.save(only=[User.password, User.session_key])
            OAuthCode.delete().where(OAuthCode.user == user).execute()
            Token.delete().where((Token.user == user) & Token.client.is_null(False)).execute()
        log.info("user %s has a new password", user.name)

    def _link_signer(self):
        return itsdangerous.URLSafeTimedSerializer(self.secret, salt="minihub-link")

    def link_for(self, user: User, site: str = "") -> str:
        """A one-time link with which the user chooses a password. Raises BadRequest where the host signs people in."""
        self._check_form()
        return self.public_link("link/" + self._link_signer().dumps([user.id, user.session_key]), site)

    def first_admin_link(self) -> str:
        """The link with which the first admin chooses name and password; good until there is one."""
        return self.public_link("link/" + self._link_signer().dumps(["first admin"]))

    def _check_form(self):
        if not self.authenticator.has_form:
            raise BadRequest("People sign in at the site that this hub is a part of, and not with a link")

    def open_link(self, token: str) -> User | None:
        """Whose link this is; None: the first admin's, who is still to be made. Raises Forbidden and BadRequest."""
        self._check_form()
        try:
            meant = self._link_signer().loads(token, max_age=self.settings.link_lifetime)
        except itsdangerous.BadSignature:
            raise Forbidden("This link is not valid any more. Ask for a new one") from None
        if meant == ["first admin"]:
            if self.has_admin():
                raise Forbidden("This link has been used already. Sign in, or ask an admin for a link of your own")
            return None
        user = self.user_of_session(*meant)
        if user is None:
            raise Forbidden("This link has been used already. Ask for a new one")
        return user

    def use_link(self, token: str, name: str, password: str) -> User:
        """Set the password of whoever the link is for, making the first admin. Raises Forbidden and BadRequest."""
        with self.database.atomic():
            store("last_link", isoformat(now()))  # on PostgreSQL, too, the next one waits here until this one is done
            user = self.open_link(token)
            is_new = user is None and self.get_user(name) is None
            if user is None:
                user = self._create_user(name, True) if is_new else self.find_user(name)
                self.change_user(user, {"admin": True})
            self.set_password(user, password)
        if is_new:
            self._tell("on_user_created", user.name)
        return user

    def has_admin(self) -> bool:
        """Whether there is an admin who can sign in."""
        return User.select().where(User.admin & User.password.is_null(False)).exists()

    def announce_first_admin(self) -> None:
        """Print, once in the life of a database, the link for the first admin."""
        if not isinstance(self.authenticator, PasswordAuthenticator) or self.has_admin():
            return
        if Setting.insert(key="first_admin_announced", value=True).on_conflict_ignore().as_rowcount().execute():
            log.warning("minihub has no admin yet. Open this link, within a week, to become the first one:\n\n    %s\n",
                        self.first_admin_link())

    # Tokens

    def create_token(self, user: User, note: str = "", expires_in: float | None = None, **columns: Any) -> tuple[str, Token]:
        """A new token of the user's and its row; the token itself is not kept. `expires_in` is in seconds."""
        if self.settings.token_lifetime and "client" not in columns and "server" not in columns:
            expires_in = min(expires_in or math.inf, self.settings.token_lifetime)
        token = new_token()
        expires_at = None if expires_in is None else now() + timedelta(seconds=expires_in)
        row = Token.create(hashed=hash_token(token), user=user, note=note, expires_at=expires_at, **columns)
        return token, row

    def identify_token(self, token: str) -> Identity | None:
        """Whose token it is, unless it has expired."""
        row = TOKEN_BY_HASH.run(self.database, hash_token(token)).fetchone()
        if row is None:
            return None
        (name, admin, user_id, created, active, caller, caller_admin, caller_created, token_id, token_active, client,
         owner, server_name, client_service, server_id, session_id, expires_at) = row
        if expires_at is not None and to_moment(expires_at) <= now():
            return None
        who = ("user", name, bool(admin), user_id, to_moment(created), to_moment(active)) if caller is None else (
            "service", caller, bool(caller_admin), None, to_moment(caller_created), to_moment(token_active))
        return Identity(*who, token_id, to_moment(token_active), client, owner and f"{owner}/{server_name}", client_service,
                        server_id, session_id)

    def exchange_token(self, token: str, identity: Identity, data: dict[str, Any]) -> str:
        """What the server that a route's `data` names may see of a token: one that proves the same identity, but only
        to that server, and ends with the token; or '' for an identity that may not enter. An OAuth token opens what it
        was given for and no more: the server or service that has it could go on to all others in its owner's name."""
        if identity.client:
            return ""
        owner = self.get_user(data.get("user", ""))
        client = owner and OAuthClient.select().join(Server).where(
            (Server.user == owner) & (Server.name == data["server_name"])).first()
        if not client or not self.may_enter(identity, owner.id):
            return ""
        derived = hmac.new(self.secret.encode(), f"exchange:{token}:{client.id}".encode(), hashlib.sha256).hexdigest()[:32]
        if self.identify_token(derived) is None:  # the first time; a write for every request would be too many
            parent = Token.get_by_id(identity.token_id)
            (Token.insert(hashed=hash_token(derived), user=parent.user_id, service=parent.service_id, client=client,
                          parent=parent, expires_at=parent.expires_at).on_conflict_ignore().execute())
        return derived

    def may_enter(self, identity: Identity, owner_id: int | None) -> bool:
        """Whether this identity may open the servers of that user (None: a service, which is open to all)."""
        return owner_id is None or identity.user_id == owner_id or (identity.admin and self.settings.admin_access)

    def scopes_of(self, identity: Identity) -> list[str]:
        """JupyterHub 2's words for what its clients ask about: which servers this identity may enter.

        Fully expanded, because singleuser 6 fails on `!user` alone, and unfiltered for admins only, because it looks at
        nothing else. Source: jupyterhub.scopes.
        """
        me = f"!{identity.kind}={identity.name}"
        scopes = [f"read:{identity.kind}s:name{me}", f"read:{identity.kind}s:groups{me}"]
        if identity.client_server:
            own = (identity.kind, identity.name) == ("user", identity.client_server.partition("/")[0])
            may_enter = own or (identity.admin and self.settings.admin_access)  # still, as people cease to be admins
            return [f"access:servers!server={identity.client_server}"] * may_enter + scopes
        if identity.client_service:
            return [f"access:services!service={identity.client_service}", *scopes]
        everywhere = ["access:servers"] if identity.admin and self.settings.admin_access else []
        return [*everywhere, f"access:servers{me}", "access:services", *scopes, f"users:activity{me}",
                f"read:users:activity{me}", f"read:servers{me}", f"servers{me}", f"tokens{me}"]

    def find_token(self, user: User, public_id: str) -> Token:
        """The user's token by the id the API gives it, `a1` or `o1`. Raises NotFound."""
        match = re.fullmatch(r"([ao])([0-9]{1,15})", public_id)
        row = match and Token.get_or_none((Token.id == int(match[2])) & (Token.user == user)
                                          & (Token.client.is_null() if match[1] == "a" else Token.client.is_null(False))
                                          & (Token.expires_at.is_null() | (Token.expires_at > now())))
        if not row:
            raise NotFound(f"No such token {public_id} for user {user.name}")
        return row

    def tokens_of(self, user: User) -> list[Token]:
        """The user's tokens that are still good, least recently used first."""
        Token.delete().where((Token.user == user) & (Token.expires_at <= now())).execute()
        rows = Token.select(Token, OAuthClient).join(OAuthClient, pw.JOIN.LEFT_OUTER).where(Token.user == user)
        tokens = sorted(rows, key=lambda row: row.last_activity or row.created)
        for token in tokens:
            token.user = user
        return tokens

    def delete_token(self, token: Token) -> None:
        """Revoke a token; an OAuth token goes with all of the user's for the same client."""
        same = (Token.client == token.client) if token.client_id else (Token.id == token.id)
        Token.delete().where(same & (Token.user == token.user_id)).execute()
        log.info("a token of user %s revoked", token.user.name)

    def sign_out(self, user_id: int, session_id: str) -> None:
        """End what a browser session has been given: its OAuth tokens and codes, so that notebook pages ask again."""
        if session_id:
            with self.database.atomic():
                for model in (OAuthCode, Token):
                    model.delete().where((model.user == user_id) & (model.session_id == session_id)).execute()

    # OAuth

    def find_client(self, identifier: str) -> OAuthClient:
        """The registered OAuth client. Raises BadRequest."""
        client = OAuthClient.get_or_none(OAuthClient.identifier == storable(identifier))
        if client is None:
            raise BadRequest("No such OAuth client. Its server may have been stopped: start it again")
        return client

    def redirect_uri_of(self, client: OAuthClient) -> str:
        """The only address codes for this client are sent to."""
        return client.redirect_uri or f"{self.mount.base}services/{client.service.name}/oauth_callback"

    def check_client(self, identifier: str, secret: str) -> OAuthClient:
        """The client who knows that secret. Raises OAuthError."""
        client = OAuthClient.get_or_none(OAuthClient.identifier == storable(identifier))
        if client is None or not hmac.compare_digest(client.secret, hash_token(secret)):
            raise OAuthError("invalid_client", "No such client, or not its secret", 401)
        return client

    def create_code(self, client: OAuthClient, user: User, session_id: str, challenge: str) -> str:
        """A code that the client can turn into a token, once and soon, if it meets the PKCE challenge (may be '')."""
        code = new_token()
        OAuthCode.create(hashed=hash_token(code), client=client, user=user, session_id=session_id, challenge=challenge,
                         expires_at=now() + timedelta(seconds=CODE_LIFETIME))
        return code

    def redeem_code(self, client: OAuthClient, code: str, redirect_uri: str | None, verifier: str) -> tuple[str, Identity]:
        """An access token for the code, which is used up, and what it proves. Raises OAuthError, using up nothing."""
        row = OAuthCode.get_or_none((OAuthCode.hashed == hash_token(code)) & (OAuthCode.client == client)
                                    & (OAuthCode.expires_at > now()))
        if row is None:
            raise OAuthError("invalid_grant", "The code is not valid")
        if redirect_uri not in (None, self.redirect_uri_of(client)):
            raise OAuthError("invalid_request", "Mismatching redirect URI.")
        if row.challenge and not verifier:
            raise OAuthError("invalid_request", "code_verifier is missing")
        if row.challenge and not hmac.compare_digest(row.challenge, challenge_of(verifier)):
            raise OAuthError("invalid_grant", "code_verifier is wrong")
        with self.database.atomic():
            if not OAuthCode.delete().where(OAuthCode.id == row.id).execute():
                raise OAuthError("invalid_grant", "The code has been used")
            token, _ = self.create_token(row.user, expires_in=self.settings.cookie_lifetime, client=client,
                                         session_id=row.session_id)
        return token, self.identify_token(token)

    # Activity

    def note_use(self, identity: Identity) -> None:
        """Note that a token was used by its owner; what a server does by itself with its token does not count."""
        if identity.server_id is None:
            with in_passing():  # after one that fails none is tried: each can wait 15 seconds, and gunicorn kills after 30
                self.note_activity(Token, identity.token_id, identity.token_last_activity)
                if identity.kind == "user":
                    self.note_activity(User, identity.user_id, identity.last_activity)

    def note_visit(self, user: User) -> None:
        """Note that a user was here in person."""
        with in_passing():
            self.note_activity(User, user.id, user.last_activity)

    def note_activity(self, model: type[Row], row_id: int, before: datetime | None, at: datetime | None = None) -> None:
        """Note that a token, user or server was used at `at` (default: now), unless the last note is recent or later."""
        at = at or now()
        newest = at - timedelta(seconds=self.settings.activity_resolution)
        if before is None or before < newest:
            ACTIVITY_UPDATES[model].run(self.database, to_stored(at), row_id, to_stored(newest))

    def record_activity(self, user: User, at: datetime | None, servers: dict[str, datetime]) -> None:
        """What a server reports of itself and its user. Raises BadRequest for a server that does not exist."""
        rows = {server.name: server for server in user.servers}
        for name in servers:
            if name not in rows:
                raise BadRequest(f"No such server '{name}' for user {user.name}")
        with self.database.atomic():
            latest = max([moment for moment in (at, *servers.values()) if moment])
            self.note_activity(User, user.id, user.last_activity, latest)
            for name, moment in servers.items():
                self.note_activity(Server, rows[name].id, rows[name].last_activity, moment)

    # Servers

    def servers_of(self, user: User) -> list[Server]:
        """The user's servers, each observed just now, the default one first."""
        return [self.observe(server) for server in self._all_servers(user)]

    def running_servers(self) -> dict[int, list[Server]]:
        """All servers that are not stopped, by the id of their user."""
        found = {}
        for server in Server.select(Server, User).join(User).where(Server.status.in_(ACTIVE)).order_by(Server.name):
            found.setdefault(server.user_id, []).append(server)
        return found

    def get_server(self, user: User, name: str) -> Server | None:
        """The user's server of that name; the default one, named "", has existed as long as the user."""
        server = Server.get_or_none((Server.user == user) & (Server.name == storable(name)))
        if server:
            server.user = user  # who may be deleted in this moment
        return server

    def _all_servers(self, user):
        servers = list(user.servers.order_by(Server.name))
        for server in servers:
            server.user = user
        return servers

    def find_server(self, user: User, name: str) -> Server:
        """The user's server of that name. Raises NotFound."""
        server = self.get_server(user, name)
        if server is None:
            raise NotFound(f"{user.name} has no server named '{name}'")
        return server

    def get_or_plan_server(self, user: User, name: str) -> Server:
        """The user's server of that name, or what it would be: its row is made by its start. Raises BadRequest."""
        return self.get_server(user, check_server_name(name)) or Server(user=user, name=name)

    def find_or_create_server(self, user: User, name: str) -> Server:
        """The user's server of that name, made on its first use. Raises BadRequest over the limit of named servers."""
        try:
            with self.database.atomic():
                server = self.get_server(user, check_server_name(name))
                limit = self.settings.named_server_limit
                if server is None and limit and user.servers.where(Server.name != "").count() >= limit:
                    raise BadRequest(f"User {user.name} already has the maximum of {limit} named servers.  One must be"
                                     " deleted before a new server can be created")
                return server or Server.create(user=user, name=name)
        except pw.IntegrityError:  # somebody else has made it in this moment, or has deleted the user
            return self.find_server(user, name)

    def check_named_servers(self) -> None:
        """Raises BadRequest if the hub is set to give each user one server only."""
        if not self.settings.named_servers:
            raise BadRequest("Named servers are not enabled.")

    def start(self, server: Server, options: Any = None, keep_options: bool = True) -> None:
        """Start a server that is stopped; one that is starting goes on. `keep_options` takes those of the last start.

        Returns at once; `observe` tells how it went. Raises BadRequest if it runs or is stopping, TooMany at a limit.
        """
        self._looked_at.pop(server.id, None)  # whoever wants to start it may know that it has just ended
        self.observe(server)
        if server.status == "spawning":
            return
        if server.status == "stopping":
            raise BadRequest(f"{server.label} is pending stop")
        if server.status == "ready":
            raise BadRequest(f"{server.label} is already running")
        if server.status == "deleted":
            raise NotFound(f"{server.label} has been deleted")
        self._check_spawn_limits()
        changes = {} if keep_options else {"user_options": options}
        prefix = self.mount.server_prefix(server.user.name, server.name)
        with self.database.atomic():
            self._hold(server.user)
            moved = self._move(server, "spawning", launch=new_token(), attempts=1, failure="", prefix=prefix, started=now(),
                               last_activity=None, **changes)
        if moved:
            log.info("server %s: starting", server.label)
            self._launch(server)
        elif server.status != "spawning":
            self.start(server, options, keep_options)

    def _hold(self, user):
        """Keep others from renaming or deleting the user until this transaction ends. Raises NotFound if they have."""
        if not User.update(name=user.name).where((User.id == user.id) & (User.name == user.name)).execute():
            raise NotFound(f"No such user: {user.name}")

    def _check_spawn_limits(self):
        limit = self.settings.concurrent_spawn_limit
        if limit and Server.select().where(Server.status == "spawning").count() >= limit:
            raise TooMany("Too many servers are starting just now. Try again in a moment", retry_after=10)
        limit = self.settings.active_server_limit
        if limit and Server.select().where(Server.status.in_(ACTIVE)).count() >= limit:
            raise TooMany(f"The hub runs {limit} servers already, which is its limit. Stop one first")

    def _move(self, server, status, **changes):
        """Change the row if it is still as `server` shows it. False: somebody else was faster; `server` shows how."""
        if status != server.status:
            changes["changed"] = now()
        same = (Server.id == server.id) & (Server.status == server.status) & (Server.launch == server.launch)
        if Server.update(status=status, **changes).where(same).execute():
            for key, value in {"status": status, **changes}.items():
                setattr(server, key, value)
            return True
        self._reload(server)
        return False

    def _reload(self, server):
        """Make `server` what its row is now; its status is "deleted" if there is none any more."""
        fresh = Server.get_or_none(Server.id == server.id)
        if fresh is None:
            server.status = "deleted"
        else:
            server.__data__.update(fresh.__data__)

    def _launch(self, server):
        """Give the server its credentials, then start its process."""
        with self.database.atomic():
            launch = self._new_launch(server)
        try:
            state = self.spawner.start(launch)
            target = state["target"]
        except Exception as error:  # a hook that somebody else wrote
            log.exception("server %s: the spawner failed", server.label)
            self._end(server, f"{type(error).__name__}: {error}")
            return
        self._adopt(server, state, target)

    def _new_launch(self, server):
        self._revoke(server)
        note = f"Server at {server.prefix}"
        token, _ = self.create_token(server.user, note, server=server)
        owner = quote(server.user.name).replace("-", "%2D")  # or ada's server gpu would take the place of ada-gpu's
        client_id = f"jupyterhub-user-{owner}" + (f"-{quote(server.name)}" if server.name else "")
        callback = f"{self.users_site(server.user.name)}{server.prefix}oauth_callback"
        OAuthClient.create(identifier=client_id, secret=hash_token(token), redirect_uri=callback, description=note,
                           server=server)
        return Launch(server.launch, server.user, server.name, server.user_options, server.prefix, free_port(),
                      self._server_variables(server, token, client_id, callback))

    def _server_variables(self, server, token, client_id, callback):
        """What jupyterhub-singleuser reads, 1.x and 6.x at once (protocol: JupyterHub's Spawner.get_env)."""
        user = server.user
        base = server.prefix.removesuffix(Mount("", "").server_prefix(user.name, server.name))
        api_url = f"{self.settings.hub_url or self.mount.address}{base}hub/api"
        access = json.dumps([f"access:servers!server={user.name}/{server.name}", f"access:servers!user={user.name}"])
        public_url, users_site = self.settings.public_url, self.users_site(user.name)
        variables = {
            "JUPYTERHUB_API_TOKEN": token, "JPY_API_TOKEN": token, "JUPYTERHUB_CLIENT_ID": client_id,
            "JUPYTERHUB_HOST": users_site and public_url, "JUPYTERHUB_OAUTH_CALLBACK_URL": callback,
            "JUPYTERHUB_USER": user.name, "JUPYTERHUB_SERVER_NAME": server.name, "JUPYTERHUB_API_URL": api_url,
            "JUPYTERHUB_ACTIVITY_URL": f"{api_url}/users/{quote_name(user.name)}/activity", "JUPYTERHUB_BASE_URL": base,
            "JUPYTERHUB_SERVICE_PREFIX": server.prefix, "JUPYTERHUB_OAUTH_ACCESS_SCOPES": access,
            "JUPYTERHUB_OAUTH_SCOPES": access, "JUPYTERHUB_OAUTH_CLIENT_ALLOWED_SCOPES": "[]",
            "JUPYTERHUB_PUBLIC_URL": public_url and (users_site or public_url) + server.prefix,
            "JUPYTERHUB_PUBLIC_HUB_URL": public_url and f"{public_url}{base}hub/",
            "JUPYTERHUB_COOKIE_HOST_PREFIX_ENABLED": "0"}
        return {**variables, "JUPYTERHUB_ADMIN_ACCESS": "1"} if self.settings.admin_access else variables

    def _adopt(self, server, state, target):
        """Write down the process of a start; if that start has been overtaken, end the process."""
        launch = server.launch
        try:
            kept = self._move(server, "spawning", state=state, target=target)
        except pw.IntegrityError:  # another server was given the same port in the same moment
            self.spawner.stop(state, now=True)
            self._try_again(server)
            return
        if not kept and not (server.launch == launch and server.status in ("spawning", "ready")):  # else another found it, too
            self.spawner.stop(state, now=True)
        if server.status == "stopping" and server.launch == launch:  # it was given up, and whoever did that waits for this
            self._end(server, "")

    def _try_again(self, server):
        """Start once more with another port, unless that has been tried often enough."""
        if server.attempts >= MAX_ATTEMPTS:
            self._end(server, "No free port was found for the server")
        elif self._move(server, "spawning", launch=new_token(), attempts=server.attempts + 1, state=None,
                        target=None, changed=now()):
            log.info("server %s: starting again, with another port", server.label)
            self._launch(server)

    def observe(self, server: Server) -> Server:
        """Look at the server's process, and at its port while it starts, and move the row on; returns the same row."""
        look = {"spawning": self._observe_spawning, "ready": self._observe_ready, "stopping": self._observe_stopping}
        if server.status in look:
            look[server.status](server)
        return server

    def _poll(self, server):
        """The exit status of a server that has ended, None while it lives, and while nobody can tell."""
        return self._ask(server, self.spawner.poll, server.state, otherwise=None)

    def _ask(self, server, question, *values, otherwise, **options):
        """What the spawner answers. One that fails is asked again at the next look, and spoils nobody's list of users."""
        try:
            return question(*values, **options)
        except Exception:  # a hook that somebody else wrote
            log.exception("server %s: the spawner failed", server.label)
            return otherwise

    def _observe_spawning(self, server):
        if server.state is None:
            self._recover(server)
            return
        status = self._poll(server)
        if status is not None:
            self._ended_early(server, status)
        elif answers_http(server.target, server.prefix):
            self._become_ready(server)
        elif seconds_since(server.changed) > self.settings.start_timeout:
            self._end(server, f"The server did not answer within {self.settings.start_timeout:g} seconds"
                      + self._log_tail(server))

    def _recover(self, server):
        """Finish a start whose worker was killed between the row and the process."""
        self._reload(server)  # whoever waits for this has an old copy of the row
        if server.status != "spawning" or server.state or seconds_since(server.changed) < INTERRUPTED_AFTER:
            return
        state = self._ask(server, self.spawner.find, self._launch_of(server), otherwise={})
        if state == {}:
            return  # nobody can tell whether it runs
        if state:
            self._adopt(server, state, state["target"])
        elif self._move(server, "spawning", launch=new_token(), changed=now()):
            log.warning("server %s: its start was interrupted and begins again", server.label)
            self._launch(server)

    def _launch_of(self, server):
        """The start that is under way, to find its process by."""
        return Launch(server.launch, server.user, server.name, None, server.prefix, 0, {})

    def _ended_early(self, server, status):
        tail = self._log_tail(server)
        if PORT_TAKEN.search(tail):
            self._try_again(server)
        else:
            self._end(server, f"The server ended while it started [status={status}]{tail}")

    def _log_tail(self, server):
        tail = self._ask(server, self.spawner.log_tail, server.state, otherwise="").strip() if server.state else ""
        return f". Its last words:\n{tail}" if tail else ""

    def _become_ready(self, server):
        if self._move(server, "ready"):
            self.add_route(server)
            log.info("server %s: ready at %s", server.label, server.target)
            self._tell("on_server_started", server.user.name, server.name, self.users_site(server.user.name) + server.prefix)

    def add_route(self, server: Server) -> None:
        """Let the proxy send what is for the server to it; a proxy that does not answer is told by the ticker later."""
        try:
            self.proxy.add_route(server.prefix, server.target, {"user": server.user.name, "server_name": server.name})
        except Unavailable as error:
            log.error("server %s has no route yet: %s", server.label, error)

    def _delete_route(self, server):
        try:
            self.proxy.delete_route(server.prefix)
        except Unavailable as error:
            log.error("server %s still has a route: %s", server.label, error)

    def _observe_ready(self, server):
        if time.monotonic() - self._looked_at.get(server.id, -math.inf) < 1:
            return
        self._looked_at[server.id] = time.monotonic()
        status = self._poll(server)
        if status is not None:
            self._end(server, f"The server ended unexpectedly [status={status}]{self._log_tail(server)}")

    def stop(self, server: Server, forget: bool = False) -> None:
        """Stop a server, or give up its start; `forget` deletes a named one once it has stopped.

        Returns at once; `observe` tells when it is done. A server that is stopped stays so.
        """
        self.observe(server)
        forget = forget or server.forget
        if server.status in ("spawning", "ready"):
            if not self._move(server, "stopping", forget=forget):
                return self.stop(server, forget)
            self._delete_route(server)
            log.info("server %s: stopping", server.label)
            self._observe_stopping(server)
        elif server.status == "stopping":
            self._move(server, "stopping", forget=forget)
        elif forget:
            self._delete_stopped(server)

    def _observe_stopping(self, server):
        if server.state is None and not self._find_stopping(server):
            return
        if server.state is None or self._poll(server) is not None:
            self._end(server, "")
            return
        state = self._ask(server, self.spawner.stop, server.state, otherwise=server.state)
        if state != server.state:
            self._move(server, "stopping", state=state)

    def _find_stopping(self, server):
        """Look for the process of a start that was given up before its worker could write it down. False: it may yet come."""
        state = self._ask(server, self.spawner.find, self._launch_of(server), otherwise={})
        if state == {}:
            return False
        if state:
            return self._move(server, "stopping", state=state, target=state["target"])
        return seconds_since(server.changed) > INTERRUPTED_AFTER

    def _end(self, server, failure):
        """The server is no more: its process, route and credentials go, the row stays, with the reason if it is a bad one."""
        if server.state and self._poll(server) is None:
            if not self._move(server, server.status):
                return  # `server` was an old copy of the row: its process may be doing well
            self._ask(server, self.spawner.stop, server.state, now=True, otherwise=None)
        with self.database.atomic():
            if not self._move(server, "stopped", state=None, target=None, failure=storable(failure)):
                return
            self._revoke(server)
            if server.forget:
                self._delete_stopped(server)
        self._delete_route(server)
        self._looked_at.pop(server.id, None)
        log.info("server %s: stopped%s", server.label, failure and f": {failure.splitlines()[0]}")
        self._tell("on_server_stopped", server.user.name, server.name, failure)

    def _revoke(self, server):
        """The credentials of a launch end with it, and with them all sign-ins to that server."""
        OAuthClient.delete().where(OAuthClient.server == server).execute()
        Token.delete().where(Token.server == server).execute()

    def _delete_stopped(self, server):
        if Server.delete().where((Server.id == server.id) & (Server.status == "stopped")).execute():
            log.info("server %s: deleted", server.label)
        server.status = "deleted"

    # Services

    def apply_settings(self) -> None:
        """Make the admins and services of the settings the hub's; what a hub that serves does first."""
        self._admit_configured_admins()
        with self.database.atomic():
            for service in list(Service.select().where(Service.name.not_in([spec.name for spec in self.settings.services]))):
                self._stop_service(service)
                service.delete_instance()
            for spec in self.settings.services:
                self._register_service(spec)

    def _register_service(self, spec):
        upsert(Service.name, spec.name, admin=spec.admin,
               spec=dataclasses.asdict(dataclasses.replace(spec, api_token="")))
        service = Service.get(Service.name == spec.name)
        if spec.api_token:
            self._set_service_token(service, spec, spec.api_token)
        elif not spec.command:
            self._set_service_token(service, spec, new_token())  # one that nobody knows

    def _set_service_token(self, service, spec, token):
        """Make this the token of the service, and the secret of its OAuth client."""
        hashed = hash_token(token)
        Token.delete().where((Token.service == service) & Token.client.is_null() & (Token.hashed != hashed)).execute()
        (Token.insert(hashed=hashed, service=service, note=f"Service {spec.name}")
         .on_conflict_ignore().execute())
        if spec.client_id:
            upsert(OAuthClient.identifier, spec.client_id, secret=hashed, redirect_uri=spec.oauth_redirect_uri,
                   description=f"Service {spec.name}", service=service)

    def list_services(self) -> list[Service]:
        """All services, by name."""
        return list(Service.select().order_by(Service.name))

    def find_service(self, name: str) -> Service:
        """The service of that name. Raises NotFound."""
        service = Service.get_or_none(Service.name == name)
        if service is None:
            raise NotFound(f"No such service: {name}")
        return service

    def service_model(self, service: Service) -> dict[str, Any]:
        """The API's Service."""
        spec = ServiceSpec.of(service.spec)
        running = service.state and poll_process(service.state) is None
        return {"name": service.name, "admin": service.admin, "url": spec.url, "command": list(spec.command),
                "prefix": f"{self.mount.base}services/{service.name}/" if spec.url else "",
                "pid": service.state["pid"] if running else 0, "info": spec.info, "display": spec.display}

    def _supervise_services(self):
        """Start the services that are the hub's to run and do not; later and later when they die again at once."""
        for service in list(Service.select()):
            spec = ServiceSpec.of(service.spec)
            if not spec.command:
                continue
            heartbeat(self.settings)
            alive = service.state and poll_process(service.state) is None
            if alive and service.restarts and seconds_since(service.next_start) > STEADY_AFTER:
                Service.update(restarts=0).where(Service.id == service.id).execute()
            if not alive and service.next_start <= now():
                self._start_service(service, spec)

    def _start_service(self, service, spec):
        next_start = now() + timedelta(seconds=min(60, 2 ** service.restarts))
        mine = (Service.id == service.id) & (Service.next_start == service.next_start)
        if not Service.update(next_start=next_start, restarts=Service.restarts + 1).where(mine).execute():
            return
        configured = next((known.api_token for known in self.settings.services if known.name == spec.name), "")
        token = configured or new_token()
        with self.database.atomic():
            self._set_service_token(service, spec, token)
        run = Path(self.settings.run_dir) / f"service-{spec.name}@{secrets.token_hex(4)}"
        try:
            state = start_process(run, spec.command, "service", heartbeat(self.settings), cwd=spec.cwd or None,
                                  env=self._service_variables(spec, token), user=spec.user or None)
        except (OSError, KeyError, ValueError) as error:
            log.error("service %s cannot be started: %s", spec.name, error)
            return
        Service.update(state=state).where(Service.id == service.id).execute()
        log.info("service %s: started, pid %s", spec.name, state["pid"])

    def _service_variables(self, spec, token):
        """What HubAuth and HubOAuth of the package jupyterhub read (protocol: JupyterHub's Service.start)."""
        base, prefix = self.mount.base, f"{self.mount.base}services/{spec.name}/"
        variables = {
            "JUPYTERHUB_SERVICE_NAME": spec.name, "JUPYTERHUB_API_TOKEN": token, "JPY_API_TOKEN": token,
            "JUPYTERHUB_CLIENT_ID": spec.client_id, "JUPYTERHUB_HOST": "", "JUPYTERHUB_USER": spec.user,
            "JUPYTERHUB_OAUTH_CALLBACK_URL": spec.oauth_redirect_uri or f"{prefix}oauth_callback",
            "JUPYTERHUB_SERVER_NAME": "", "JUPYTERHUB_BASE_URL": base, "JUPYTERHUB_COOKIE_HOST_PREFIX_ENABLED": "0",
            "JUPYTERHUB_API_URL": f"{self.settings.hub_url or self.mount.address}{base}hub/api",
            "JUPYTERHUB_OAUTH_ACCESS_SCOPES": json.dumps([f"access:services!service={spec.name}"]),
            "JUPYTERHUB_OAUTH_SCOPES": json.dumps([f"access:services!service={spec.name}"]),
            "JUPYTERHUB_OAUTH_CLIENT_ALLOWED_SCOPES": "[]",
            "JUPYTERHUB_PUBLIC_URL": self.settings.public_url and self.settings.public_url + prefix,
            "JUPYTERHUB_PUBLIC_HUB_URL": self.settings.public_url and f"{self.settings.public_url}{base}hub/"}
        if spec.url:
            variables |= {"JUPYTERHUB_SERVICE_URL": spec.url, "JUPYTERHUB_SERVICE_PREFIX": prefix}
        return {**self.settings.inherited_variables(), **variables, **spec.environment}

    def _stop_service(self, service):
        if service.state and poll_process(service.state) is None:
            stop_process(service.state, ((0, signal.SIGTERM),))
            log.info("service %s: stopped", service.name)

    # Routes

    def wanted_routes(self) -> dict[str, dict[str, Any]]:
        """The routes that there should be: to the hub, to the servers that are ready, to the services with pages."""
        routes = [(self.mount.base, self.mount.address, {"hub": True})]
        routes += [(server.prefix, server.target, {"user": server.user.name, "server_name": server.name})
                   for server in Server.select(Server, User).join(User).where(Server.status == "ready")]
        routes += [(f"{self.mount.base}services/{spec.name}/", spec.target, {"service": spec.name})
                   for spec in self.settings.services if spec.target]
        return {prefix: {"routespec": prefix, "target": target, "data": data} for prefix, target, data in routes}

    def check_routes(self) -> None:
        """Make the proxy's routes those that there should be, and learn from it who was active. Raises Unavailable."""
        actual = self.proxy.get_all_routes()  # first, so that no route is struck out that has come in between
        self.proxy.check_routes(self.wanted_routes(), actual)
        for route in actual.values():
            data = route["data"]
            user = self.get_user(data["user"]) if data.get("user") and data.get("last_activity") else None
            if user:
                with contextlib.suppress(BadRequest):  # its server is gone
                    self.record_activity(user, None, {data["server_name"]: parse_time(data["last_activity"])})

    def move_proxy(self, changes: dict[str, Any]) -> None:
        """Work with another proxy, in all workers, and give it its routes. Raises BadRequest and Unavailable."""
        if changes and not isinstance(self.proxy, ConfigurableHTTPProxy):
            raise BadRequest("This hub carries the traffic itself. Set MINIHUB_PROXY to chp to work with another proxy")
        for key, value in changes.items():
            if not isinstance(value, str) and not (key == "port" and type(value) is int):
                raise BadRequest(f"{key} must be a string")
        if changes:
            self.proxy.move(changes)
            log.info("proxy: now %s", self.proxy.place()["api_url"])
        self.check_routes()

    def routes_model(self) -> dict[str, dict[str, Any]]:
        """The API's routing table: the proxy's, with what the hub knows of activity where the proxy keeps no account."""
        routes = self.proxy.get_all_routes()
        active = {server.prefix: server.last_activity for server in Server.select().where(Server.status == "ready")}
        for prefix, route in routes.items():
            route["data"].setdefault("last_activity", isoformat(active.get(prefix)))
        return routes

    # Waiting

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Whether the condition comes true in time. At most two threads of a process wait, so that others can serve."""
        if seconds <= 0 or not self._waiting.acquire(blocking=False):
            return condition()
        try:
            deadline = time.monotonic() + seconds
            while not condition():
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.05)
            return True
        finally:
            self._waiting.release()

    def progress_of(self, server: Server) -> dict[str, Any] | None:
        """The event with which the progress of a start ends, None while it goes on. Raises BadRequest if none is."""
        self._reload(server)
        self.observe(server)
        if server.status == "spawning":
            return None
        if server.status == "ready":
            url = self.url_of(server.user.name, server.name)
            return {"progress": 100, "ready": True, "message": f"Server ready at {url}",
                    "html_message": f'Server ready at <a href="{html.escape(url)}">{html.escape(url)}</a>', "url": url}
        if server.failure:
            return {"progress": 100, "failed": True, "message": f"Spawn failed: {server.failure}"}
        raise BadRequest(f"{server.label} is not starting...")

    # What the API shows

    def user_model(self, user: Identity | User, servers: bool = True, state: bool = False) -> dict[str, Any]:
        """The API's User. `servers`: with those that are active; `state`: with what only admins may see of them."""
        user_id = user.user_id if isinstance(user, Identity) else user.id
        groups = [name for name, in GROUPS_OF_USER.run(self.database, user_id)]
        rows = ACTIVE_SERVERS_OF_USER.run(self.database, user_id, "stopped").fetchall()
        return self._user_model(user, groups, [row[1:] for row in rows], servers, state)

    def identity_model(self, identity: Identity) -> dict[str, Any]:
        """The API's answer to "who is this?": the user, and what JupyterHub 2 and later say of the token."""
        kind = "o" if identity.client else "a"
        who = self.user_model(identity, servers=False) if identity.kind == "user" else {
            "kind": "service", "name": identity.name, "admin": identity.admin}
        return {**who, "scopes": self.scopes_of(identity),
                "session_id": identity.session_id or None, "token_id": identity.token_id and f"{kind}{identity.token_id}"}

    def user_models(self, users: list[User], stopped: bool = False) -> list[dict[str, Any]]:
        """The API's list of users, as admins see it, in three queries however many they are; `stopped`: with all servers."""
        groups, servers = {}, {}
        for user_id, name in Membership.select(Membership.user, Group.name).join(Group).order_by(Group.name).tuples():
            groups.setdefault(user_id, []).append(name)
        for row in ACTIVE_SERVERS.run(self.database, "" if stopped else "stopped"):
            servers.setdefault(row[0], []).append(row[1:])
        return [self._user_model(user, groups.get(user.id, []), servers.get(user.id, []), True, True) for user in users]

    def list_users(self, state: str | None = None, name_filter: str = "", sort: str = "id", offset: int = 0,
                   limit: int | None = None) -> tuple[list[User], int]:
        """Users from `offset` on, and how many there are in all: everybody, or those with an active, a ready or no active
        server, whose name contains `name_filter`; `sort` is id, name or last_activity, with - for the other way round.

        Raises BadRequest for another `state` or `sort`.
        """
        statuses = {None: (), "active": ACTIVE, "inactive": ACTIVE, "ready": ("ready",)}.get(state)
        columns = {"id": User.id, "name": User.name, "last_activity": User.last_activity}
        if statuses is None:
            raise BadRequest("state must be one of active, ready, inactive")
        if sort.removeprefix("-") not in columns:
            raise BadRequest("sort must be one of id, name, last_activity, with or without a leading -")
        column = columns[sort.removeprefix("-")]
        query = User.select().order_by(column.desc() if sort.startswith("-") else column, User.id)
        if state:
            busy = User.id.in_(Server.select(Server.user).where(Server.status.in_(statuses)))
            query = query.where(~busy if state == "inactive" else busy)
        if name_filter:
            query = query.where(User.name.contains(name_filter))
        return list(query.offset(offset).limit(limit)), query.count()

    def observe_pending(self, user: User | None = None) -> None:
        """Observe what is on its way from one state to another: what every list does first."""
        pending = Server.select(Server, User).join(User).where(Server.status.in_(("spawning", "stopping")))
        for server in list(pending.where(Server.user == user) if user else pending):
            with contextlib.suppress(NotFound):
                self.observe(server)

    def _user_model(self, user, groups, rows, servers, state):
        models = {row[0]: self._server_model(user.name, state, *row) for row in rows}
        default = models.get("", {})
        return {"kind": "user", "name": user.name, "admin": bool(user.admin), "groups": groups,
                "server": default.get("url") if default.get("ready") else None, "pending": default.get("pending"),
                "created": isoformat(user.created), "last_activity": isoformat(user.last_activity),
                "servers": models if servers else None}

    def _server_model(self, user_name, show_state, name, status, state, user_options, started, last_activity):
        quoted = quote_name(user_name)
        place = f"servers/{quote_name(name)}" if name else "server"
        started, last_activity = to_moment(started), to_moment(last_activity)
        stops_at = self.stop_time(started, last_activity) if status == "ready" else None
        extra = {"stops_at": isoformat(stops_at)} if stops_at else {"stopped": True} if status == "stopped" else {}
        return {**extra, "name": name, "last_activity": isoformat(last_activity), "started": isoformat(started),
                "pending": PENDING.get(status), "ready": status == "ready",
                "state": json.loads(state) if show_state and state else None,
                "url": self.url_of(user_name, name),
                "user_options": json.loads(user_options) if user_options else {},
                "progress_url": f"{self.mount.hub}api/users/{quoted}/{place}/progress"}

    # What goes on by itself

    def tick(self) -> bool:
        """Do what is due: observe servers, clean up. False if another worker is at it (it has the lease)."""
        if not self._take_lease("ticker", LEASE):
            return False
        self.announce_first_admin()
        self.observe_pending()
        if time.monotonic() >= self._next_poll:
            self._next_poll = time.monotonic() + POLL_READY_AFTER
            for server in list(Server.select(Server, User).join(User).where(Server.status == "ready")):
                with contextlib.suppress(NotFound):
                    self.observe(server)
                    self._cull(server)
        if self.settings.stop_with_hub:
            heartbeat(self.settings)
        self._supervise_services()
        self._supervise_proxy()
        if time.monotonic() >= self._next_purge:
            self._next_purge = time.monotonic() + PURGE_AFTER
            self._purge()
        return True

    def stop_time(self, started: datetime | None, last_activity: datetime | None) -> datetime | None:
        """When a server that stays idle will be stopped, if it will. One that never reports activity is not idle."""
        limits = [last_activity and self.settings.idle_timeout and last_activity + timedelta(seconds=self.settings.idle_timeout),
                  started and self.settings.max_age and started + timedelta(seconds=self.settings.max_age)]
        return min(filter(None, limits), default=None)

    def _cull(self, server):
        """Stop a server whose time is over. Nothing is deleted."""
        due = self.stop_time(server.started, server.last_activity)
        if server.status == "ready" and due and due <= now():
            log.info("server %s: idle or too old", server.label)
            self.stop(server)

    def _supervise_proxy(self):
        if isinstance(self.proxy, ConfigurableHTTPProxy):
            self.proxy.keep_running(f"{self.settings.hub_url or self.mount.address}{self.mount.hub}")
        if time.monotonic() < self._next_check:
            return
        try:
            self.check_routes()
        except Unavailable as error:
            if not self._proxy_is_down:
                log.warning("%s; its routes will be brought up to date when it does", error)
            self._proxy_is_down = True
        else:
            self._proxy_is_down = False
            self._next_check = time.monotonic() + CHECK_ROUTES_AFTER

    def _take_lease(self, job, seconds):
        """Whether this hub may do the job for so long: nobody else has it, or their time is over."""
        expires = now() + timedelta(seconds=seconds)
        mine_or_over = (Lease.job == job) & ((Lease.holder == self._process) | (Lease.expires < now()))
        if Lease.update(holder=self._process, expires=expires).where(mine_or_over).execute():
            return True
        return bool(Lease.insert(job=job, holder=self._process, expires=expires)
                    .on_conflict_ignore().as_rowcount().execute())

    def _end_lease(self, job):
        """Leave the job to whoever is next."""
        Lease.delete().where((Lease.job == job) & (Lease.holder == self._process)).execute()

    @property
    def _process(self):
        """This hub in this process: the children of a fork are others."""
        return f"{self._holder}-{os.getpid()}"

    def _purge(self):
        Token.delete().where(Token.expires_at <= now()).execute()
        OAuthCode.delete().where(OAuthCode.expires_at <= now()).execute()
        Failure.delete().where(Failure.until <= now()).execute()


def remove_folder(path: str, maker: int) -> None:
    """Delete a folder, if the process that made it is the one that asks: its forks end earlier, and live in it, too."""
    if os.getpid() == maker:
        shutil.rmtree(path, ignore_errors=True)


def challenge_of(verifier: str) -> str:
    """The S256 challenge that a PKCE verifier meets (RFC 7636, 4.2)."""
    digest = hashlib.sha256(verifier.encode("utf-8", "surrogateescape")).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def seconds_since(moment: datetime) -> float:
    """How long ago that was."""
    return (now() - moment).total_seconds()


def answers_http(target: str, prefix: str) -> bool:
    """Whether a server answers requests, whatever it answers short of an internal error."""
    parts = urlsplit(target)
    try:
        with socket.create_connection((parts.hostname, parts.port), timeout=1) as connection:
            connection.sendall(f"GET {prefix}api HTTP/1.0\r\nHost: {parts.netloc}\r\n\r\n".encode())
            return re.match(rb"HTTP/1\.[01] [1-4]", connection.recv(64)) is not None
    except OSError:
        return False


def listening_address() -> str | None:
    """http://host:port of the first TCP socket this process listens on, None if it does not or cannot tell."""
    try:
        numbers = sorted(int(name) for name in os.listdir("/dev/fd"))
    except OSError:
        return None
    for number in numbers:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as candidate:
            if candidate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and candidate.family != socket.AF_UNIX:
                return local_address(*candidate.getsockname()[:2])
    return None


@functools.lru_cache(16)  # every request asks
def local_address(host: str, port: int | str, scheme: str = "http") -> str:
    """http://host:port as seen from this machine, for a host that may be a name or every address."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return f"{scheme}://127.0.0.1:{port}"
    if address.is_unspecified:
        address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    return f"{scheme}://[{address}]:{port}" if address.version == 6 else f"{scheme}://{address}:{port}"


########################################################################################################
# 9. Who is asking
########################################################################################################

AUTHORIZATION = re.compile(r"(?:token|bearer)\s+(\S+)\s*", re.IGNORECASE)


def cookie_signer(hub: HubCore, cookie: str) -> itsdangerous.URLSafeTimedSerializer:
    """Signs a cookie's value together with its name."""
    return itsdangerous.URLSafeTimedSerializer(hub.secret, salt=cookie)


def user_of_cookie(hub: HubCore, cookie: str, value: str) -> User | None:
    """The user who was given this cookie, unless it is too old or they have signed out everywhere since.

    Nobody's where the host signs people in: a cookie would outlive that.
    """
    if not hub.authenticator.has_form:
        return None
    try:
        user_id, session_key = cookie_signer(hub, cookie).loads(value, max_age=hub.settings.cookie_lifetime)
    except (itsdangerous.BadSignature, ValueError, TypeError):
        return None
    return hub.user_of_session(user_id, session_key)


def identity_of(user: User, session_id: str = "") -> Identity:
    """The user as somebody who asks without a token."""
    return Identity("user", user.name, user.admin, user.id, user.created, user.last_activity, session_id=session_id)


def token_in(header: str | None) -> str | None:
    """The token in an Authorization header of either scheme that JupyterHub knows."""
    match = AUTHORIZATION.fullmatch(header or "")
    return match and match[1]


def session_user(req: falcon.Request, hub: HubCore) -> User | None:
    """Who is signed in in this browser, by the hub's cookie or at the host site."""
    if not hasattr(req.context, "user"):
        req.context.user = None  # for the page that says so, should the next line fail
        req.context.user = user_of_cookie(hub, LOGIN_COOKIE, req.cookies.get(LOGIN_COOKIE, "")) or host_user(req, hub)
    return req.context.user


def host_user(req: falcon.Request, hub: HubCore) -> User | None:
    """Who is signed in at the host site, as it has them now."""
    found = hub.authenticator.identify(req.env)
    name, facts = found if isinstance(found, tuple) else (found, {})
    return hub.admit(name, facts) if name else None


def session_id_of(req: falcon.Request) -> str:
    """The browser session's id, or ''."""
    value = req.cookies.get(SESSION_COOKIE, "")
    return value if re.fullmatch(r"[0-9a-f]{32}", value) else ""


def set_hub_cookie(req: falcon.Request, resp: falcon.Response, name: str, value: str, path: str, max_age: int | None = None):
    """A cookie as all of the hub's are: for HTTP only, for this site only, over TLS only if the browser uses it."""
    resp.set_cookie(name, value, path=path, max_age=max_age, http_only=True, same_site="Lax",
                    secure=req.env["minihub.client"].scheme == "https")


def ensure_session_id(req: falcon.Request, resp: falcon.Response) -> str:
    """The browser session's id, which begins now if there was none."""
    session_id = session_id_of(req)
    if not session_id:
        session_id = req.cookies[SESSION_COOKIE] = secrets.token_hex(16)
        set_hub_cookie(req, resp, SESSION_COOKIE, session_id, req.env["minihub.mount"].base)
    return session_id


def xsrf_token(req: falcon.Request, hub: HubCore) -> str:
    """What a form must carry to prove that it came from the hub's pages, in this browser session, for this user."""
    user = session_user(req, hub)
    text = f"xsrf:{session_id_of(req)}:{user.session_key if user else ''}"
    return hmac.new(hub.secret.encode(), text.encode(), hashlib.sha256).hexdigest()


def is_from_hub_page(req: falcon.Request, hub: HubCore) -> bool:
    """Whether a request made by cookie was made by the hub's own pages (JupyterHub asks for such a Referer, too)."""
    if req.method not in ("GET", "HEAD", "OPTIONS"):
        given = req.get_header("X-XSRFToken") or ""
        return bool(session_id_of(req)) and hmac.compare_digest(given.encode(), xsrf_token(req, hub).encode())
    try:
        referer = urlsplit(req.get_header("Referer") or "")
    except ValueError:
        return False
    return referer.netloc == req.env["minihub.client"].host and referer.path.startswith(req.env["minihub.mount"].hub)


def is_from_another_site(req: falcon.Request) -> bool:
    """Whether a browser says that a page of another site makes this request; programs say nothing of the kind."""
    client = req.env["minihub.client"]
    return req.get_header("Origin") not in (None, f"{client.scheme}://{client.host}")


def identify(req: falcon.Request, hub: HubCore) -> Identity | None:
    """Who makes this API request: the token's owner, or else whoever is signed in in the browser."""
    token = token_in(req.get_header("Authorization"))
    identity = hub.identify_token(token) if token else None
    if identity:
        hub.note_use(identity)
        return identity
    user = session_user(req, hub)
    if user is None or not is_from_hub_page(req, hub):
        return None
    hub.note_visit(user)
    return identity_of(user, session_id_of(req))


def require(condition: Any, message: str = "Forbidden") -> None:
    """Raises Forbidden unless the condition holds."""
    if not condition:
        raise Forbidden(message)


def needs_any(req, resp, resource, params):
    """For everybody the hub can identify, even by an OAuth token."""
    req.context.identity = identify(req, resource.hub)
    require(req.context.identity, "Missing or invalid credentials.")


def needs_full(req, resp, resource, params):
    """For everybody with more than an OAuth token, which is good for being identified only."""
    needs_any(req, resp, resource, params)
    require(req.context.identity.client is None)


def needs_admin(req, resp, resource, params):
    """For admins."""
    needs_full(req, resp, resource, params)
    require(req.context.identity.admin)


def needs_self_or_admin(req, resp, resource, params):
    """For the user the path names, and for admins. Others learn nothing, not even whether there is such a user."""
    needs_full(req, resp, resource, params)
    identity = req.context.identity
    own = identity.kind == "user" and resource.hub.authenticator.normalize(params["name"]) == identity.name
    require(identity.admin or own)  # a service that bears a user's name is not that user


def needs_api_token(req, resp, resource, params):
    """For services and servers that ask about others: an API token, neither a cookie nor an OAuth token."""
    needs_full(req, resp, resource, params)
    require(req.context.identity.token_id)


def needs_login(req, resp, resource, params):
    """For people signed in in the browser; others are sent to sign in and come back."""
    if session_user(req, resource.hub) is None:
        # A form's own address is no page to come back to.
        here = f"?{urlencode({'next': request_target(req.env)})}" if req.method in ("GET", "HEAD") else ""
        raise falcon.HTTPFound(f"{req.env['minihub.mount'].hub}login{here}")
    resource.hub.note_visit(req.context.user)


def needs_own_pages(req, resp, resource, params):
    """For the person the path names (nobody: whoever is signed in), and for admins."""
    needs_login(req, resp, resource, params)
    user = req.context.user
    name = resource.hub.authenticator.normalize(params.get("name", user.name))
    require(user.admin or name == user.name, "This page belongs to somebody else")
    req.context.owner = user if name == user.name else resource.hub.find_user(name)


def needs_admin_login(req, resp, resource, params):
    """For admins signed in in the browser."""
    needs_login(req, resp, resource, params)
    require(req.context.user.admin, "This page is for admins")


TOO_LATE = "This page was open for too long, or cookies are switched off."


def is_own_form(req: falcon.Request, hub: HubCore, form: dict[str, str]) -> bool:
    """Whether a form was filled in on a page of the hub's that this browser session was shown."""
    given = form.get("_xsrf", "")
    return bool(session_id_of(req)) and hmac.compare_digest(given.encode(), xsrf_token(req, hub).encode())


def needs_xsrf(req, resp, resource, params):
    """For forms of the hub's own pages. Comes after the hook that says who is signed in."""
    req.context.form = read_form(req)
    require(is_own_form(req, resource.hub, req.context.form), f"{TOO_LATE} Go back, reload it and try again")


def without_hub_secrets(hub: HubCore, environ: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """The request as the server that the route's `data` names may see it.

    The cookies of the hub and of the site around it go. So does a token of the hub's, which a student's server could keep:
    it is replaced by one that says who is asking and is good for this server only, or by nothing where its owner may not
    enter. Others stay. A service is the admin's own program: it gets the tokens it is sent, and the cookie that is meant
    for it.
    """
    hidden = {LOGIN_COOKIE} if "service" in data else HUB_COOKIES.union(hub.settings.site_cookies)
    environ = {**environ, "HTTP_COOKIE": strip_cookies(environ.get("HTTP_COOKIE", ""), hidden)}
    if not environ["HTTP_COOKIE"]:
        del environ["HTTP_COOKIE"]
    if "service" in data:
        return environ
    token = token_in(environ.get("HTTP_AUTHORIZATION"))
    if not token and not hub.authenticator.has_form:
        environ.pop("HTTP_AUTHORIZATION", None)  # the password for the host's site, if that asks for it the simple way
    if token and (identity := hub.identify_token(token)) and not is_for_server(identity, data):
        del environ["HTTP_AUTHORIZATION"]
        if exchanged := hub.exchange_token(token, identity, data):
            environ["HTTP_AUTHORIZATION"] = f"token {exchanged}"
    if "token=" in environ.get("QUERY_STRING", ""):
        _exchange_in_query(hub, environ, data)
    return environ


def _exchange_in_query(hub, environ, data):
    pairs = parse_qsl(environ["QUERY_STRING"], keep_blank_values=True)
    known = {value: hub.identify_token(value) for name, value in pairs if name == "token"}
    changed = [(name, hub.exchange_token(value, known[value], data)
                if name == "token" and known[value] and not is_for_server(known[value], data) else value)
               for name, value in pairs]
    if changed != pairs:
        environ["QUERY_STRING"] = urlencode(changed)


def is_for_server(identity: Identity, data: dict[str, Any]) -> bool:
    """Whether this is an OAuth token for just the server that a route's `data` names, which has it already."""
    return identity.client_server == f"{data.get('user')}/{data.get('server_name')}"


########################################################################################################
# 10. REST resources
########################################################################################################

BODY_LIMIT = 4 * 1024 * 1024  # bytes: some 100,000 user names
KEPT_LIMIT = 64 * 1024  # characters of a start's options or a token's note, which many lists show
DEPTH_LIMIT = 100  # lists and objects in one another; Python reads some 900 but may then fail to write them
NEVER = 100 * 365 * 24 * 3600  # seconds; a longer life than that is no number worth adding to a date


def read_body(req: falcon.Request) -> bytes:
    """The request's body. Raises TooLarge."""
    stream = req.stream if req.get_header("Transfer-Encoding") else req.bounded_stream
    body = stream.read(BODY_LIMIT + 1)
    if len(body) > BODY_LIMIT:
        raise TooLarge(f"The body is longer than {BODY_LIMIT} bytes")
    return body


def read_json(req: falcon.Request) -> Any:
    """The request's body as JSON, whatever its type claims (curl -d sends a form's); None if empty. Raises BadRequest."""
    body = read_body(req)
    if not body.strip():
        return None
    try:
        value = json.loads(body, parse_constant=_no_constant)
        # A lone surrogate is no text, and 1e999 is read as an infinity.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise BadRequest("Invalid JSON in body of request") from None
    if is_deeper(value, DEPTH_LIMIT):
        raise BadRequest("Invalid JSON in body of request: it is nested too deeply")
    return value


def _no_constant(name):
    raise ValueError(f"{name} is not JSON")


def is_deeper(value: Any, levels: int) -> bool:
    """Whether a JSON value has lists and objects in one another, more than so many levels deep."""
    if not isinstance(value, (list, dict)):
        return False
    return levels == 0 or any(is_deeper(item, levels - 1) for item in (value.values() if isinstance(value, dict) else value))


def read_object(req: falcon.Request, owner: str, allowed: dict[str, type], required: bool = False) -> dict[str, Any]:
    """The body as an object of those keys and types; without a body, `{}` unless one is `required`. Raises BadRequest."""
    value = read_json(req)
    if value is None and not required:
        return {}
    if not isinstance(value, dict):
        raise BadRequest(f"Invalid JSON data: {shortened(value)}")
    return check_keys(value, owner, allowed)


def check_keys(value: dict[str, Any], owner: str, allowed: dict[str, type]) -> dict[str, Any]:
    """`value`, if it has only keys and types that are allowed. Raises BadRequest."""
    unknown = value.keys() - allowed.keys()
    if unknown:
        raise BadRequest(f"Invalid JSON keys: {', '.join(sorted(unknown))}")
    for key, item in value.items():
        if type(item) is not allowed[key]:
            raise BadRequest(f"{owner}.{key} must be {allowed[key]}, not: {type(item)}")
    return value


def read_names(value: Any, key: str) -> list[str]:
    """A list of strings out of a body. Raises BadRequest."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise BadRequest(f"{key} must be a list of strings")
    return value


def read_form(req: falcon.Request) -> dict[str, str]:
    """A form's fields, the last one of each name. Raises BadRequest for more than any of the hub's forms has."""
    body = read_body(req).decode("utf-8", "replace")
    try:
        return dict(parse_qsl(body, keep_blank_values=True, max_num_fields=1000))
    except ValueError:
        raise BadRequest("The form has too many fields") from None


def patience(req: falcon.Request, seconds: float) -> float:
    """How long a worker may wait: not at all where nobody else could serve what it waits for."""
    return seconds if req.env["wsgi.multithread"] else 0


PAGE_TYPE = "application/jupyterhub-pagination+json"
PAGE_LENGTH, LONGEST_PAGE = 50, 200  # JupyterHub's, for clients that know of pages; others get everything


class Paging:
    """The part of a list that a client asks for, and the form it wants it in."""

    def __init__(self, req: falcon.Request):
        self._req = req
        self._paged = PAGE_TYPE in (req.get_header("Accept") or "")
        self.offset = req.get_param_as_int("offset", min_value=0, max_value=2 ** 31, default=0)
        self.limit = req.get_param_as_int("limit", min_value=1, max_value=2 ** 31, default=PAGE_LENGTH if self._paged else None)
        if self._paged:
            self.limit = min(self.limit, LONGEST_PAGE)

    def model(self, items: list[Any], total: int) -> Any:
        """The plain list, or, for clients that know of pages, an object that says where the next one is."""
        if not self._paged:
            return items
        more = self.offset + len(items) < total
        return {"items": items, "_pagination": {"offset": self.offset, "limit": self.limit, "total": total,
                                                "next": self._next(self.offset + len(items)) if more else None}}

    def _next(self, offset):
        client, query = self._req.env["minihub.client"], {**self._req.params, "offset": offset, "limit": self.limit}
        path = self._req.env["minihub.mount"].base[:-1] + quote(self._req.path)
        return {"offset": offset, "limit": self.limit, "url": f"{client.scheme}://{client.host}{path}?{urlencode(query)}"}


USER_KEYS = {"name": str, "admin": bool, "groups": list, "auth_state": dict}


class Resource:
    """A path of the API, or a page."""

    def __init__(self, hub: HubCore):
        self.hub = hub


class VersionResource(Resource):
    """`/`: who is there."""

    def on_get(self, req, resp):
        """Open to all: clients look here before they have a token."""
        resp.media = {"version": API_VERSION}


class InfoResource(Resource):
    """`/info`: what the hub is made of."""

    @falcon.before(needs_admin)
    def on_get(self, req, resp):
        """Versions and the hooks in use."""
        resp.media = {"version": API_VERSION, "python": sys.version, "sys_executable": sys.executable,
                      "authenticator": class_model(self.hub.authenticator), "spawner": class_model(self.hub.spawner)}


def class_model(hook: Any) -> dict[str, str]:
    """A hook's class and the version of the package it comes from."""
    module = type(hook).__module__
    version = getattr(sys.modules.get(module.partition(".")[0]), "__version__", "unknown")
    return {"class": f"{module}.{type(hook).__qualname__}", "version": version}


class UsersResource(Resource):
    """`/users`."""

    @falcon.before(needs_admin)
    def on_get(self, req, resp):
        """Every user, with servers, or those that the filters of JupyterHub 1.3 to 5 leave."""
        self.hub.observe_pending()
        page = Paging(req)
        users, total = self.hub.list_users(
            req.get_param("state"), req.get_param("name_filter", default=""), req.get_param("sort", default="id"),
            page.offset, page.limit)
        stopped = req.get_param_as_bool("include_stopped_servers", default=False)
        resp.media = page.model(self.hub.user_models(users, stopped), total)

    @falcon.before(needs_admin)
    def on_post(self, req, resp):
        """Create those of the users who are new: all or none."""
        body = read_json(req)
        if not isinstance(body, dict) or not body.get("usernames"):
            raise BadRequest("Must specify at least one user to create")
        names = read_names(body.pop("usernames"), "usernames")
        admin = check_keys(body, "user", USER_KEYS).get("admin", False)
        users = self.hub.create_users(names, admin)
        resp.status, resp.media = 201, [self.hub.user_model(user, servers=False) for user in users]


class UserResource(Resource):
    """`/users/{name}`."""

    @falcon.before(needs_self_or_admin)
    def on_get(self, req, resp, name):
        """The user, with servers; for admins with what only they may see."""
        user = self.hub.find_user(name)
        self.hub.active_servers(user)
        admin = req.context.identity.admin
        model = self.hub.user_model(user, state=admin)
        resp.media = {**model, "auth_state": user.auth_state} if admin else model

    @falcon.before(needs_admin)
    def on_post(self, req, resp, name):
        """Create the user."""
        body = read_object(req, "user", USER_KEYS)
        user = self.hub.create_user(name, body.get("admin", False))
        resp.status, resp.media = 201, self.hub.user_model(user, servers=False)

    @falcon.before(needs_admin)
    def on_patch(self, req, resp, name):
        """Rename the user, or change what they are."""
        user = self.hub.find_user(name)
        changes = read_object(req, "user", {key: kind for key, kind in USER_KEYS.items() if key != "groups"}, required=True)
        self.hub.change_user(user, changes)
        resp.media = {**self.hub.user_model(user, servers=False), "auth_state": user.auth_state}

    @falcon.before(needs_admin)
    def on_delete(self, req, resp, name):
        """Stop the user's servers and forget the user."""
        user = self.hub.find_user(name)
        if user.id == req.context.identity.user_id:
            raise BadRequest("Cannot delete yourself!")
        self.hub.delete_user(user, patience(req, self.hub.settings.slow_stop_timeout))
        resp.status = 204


class ActivityResource(Resource):
    """`/users/{name}/activity`."""

    @falcon.before(needs_self_or_admin)
    def on_post(self, req, resp, name):
        """What a single-user server says, every five minutes, of when it was last used."""
        user = self.hub.find_user(name)
        self.hub.record_activity(user, *read_activity(req))
        resp.content_type, resp.text = falcon.MEDIA_JSON, ""


def read_activity(req: falcon.Request) -> tuple[datetime | None, dict[str, datetime]]:
    """When the user was active, and when each of the servers was. Raises BadRequest."""
    body = read_json(req)
    if not isinstance(body, dict):
        raise BadRequest("body must be a json dict")
    if not body.keys() & {"last_activity", "servers"}:
        raise BadRequest("body must contain at least one of `last_activity` or `servers`")
    servers = body.get("servers") or {}
    if not isinstance(servers, dict) or not all(
            isinstance(entry, dict) and entry.get("last_activity") for entry in servers.values()):
        raise BadRequest("servers must be a dict of the form {server_name: {last_activity: timestamp}}")
    if not servers and not body.get("last_activity"):
        raise BadRequest("body must contain at least one of `last_activity` or `servers`")
    at = read_past(body["last_activity"]) if body.get("last_activity") else None
    return at, {name: read_past(entry["last_activity"]) for name, entry in servers.items()}


def read_past(text: Any) -> datetime:
    """A moment that has been, give or take the clocks of two machines. Raises BadRequest."""
    moment = parse_time(text)
    if moment > now() + timedelta(minutes=59):
        raise BadRequest(f"Rejecting activity from more than an hour in the future: {isoformat(moment)}")
    return moment


class ServerResource(Resource):
    """`/users/{name}/server` and `/users/{name}/servers/{server_name}`."""

    @falcon.before(needs_self_or_admin)
    def on_post(self, req, resp, name, server_name=""):
        """Start the server. 201: it is ready, 202: it is on its way, 500: it has failed already."""
        user, options = self.hub.find_user(name), read_options(req)
        if server_name:
            self.hub.check_named_servers()
        server = self.hub.find_or_create_server(user, server_name)
        self.hub.start(server, options, keep_options=options is None)
        self.hub.wait_until(lambda: self.hub.observe(server).status != "spawning",
                            patience(req, self.hub.settings.slow_spawn_timeout))
        if server.status == "stopped" and server.failure:
            raise SpawnFailed(f"{server.label}'s server failed to start. {server.failure}")
        resp.status = 201 if server.status == "ready" else 202
        resp.content_type, resp.text = falcon.MEDIA_TEXT, ""

    @falcon.before(needs_self_or_admin)
    def on_delete(self, req, resp, name, server_name=""):
        """Stop the server, and forget it if the body says `remove`. 204: done, 202: it is still stopping."""
        user = self.hub.find_user(name)
        if server_name:
            self.hub.check_named_servers()
        server = self.hub.find_server(user, server_name)
        remove = read_object(req, "server", {"remove": bool}).get("remove", False)
        if remove and not server.name:
            raise BadRequest("Cannot delete the default server")
        if self.hub.observe(server).status == "spawning":
            raise BadRequest(f"{server.label} is pending spawn, please wait")
        self.hub.stop(server, forget=remove)
        stopped = self.hub.wait_until(lambda: self.hub.observe(server).status not in ACTIVE,
                                      patience(req, self.hub.settings.slow_stop_timeout))
        resp.status = 204 if stopped else 202
        if not stopped:
            resp.content_type, resp.text = falcon.MEDIA_TEXT, ""


def read_options(req: falcon.Request) -> dict[str, Any] | None:
    """The options of a start, None for those of the last one. Raises BadRequest."""
    options = read_json(req)
    if options is not None and not isinstance(options, dict):
        raise BadRequest("The options of a start must be a JSON object")
    if len(json.dumps(options)) > KEPT_LIMIT:
        raise BadRequest(f"The options of a start must not be longer than {KEPT_LIMIT} characters")
    return options


PROGRESS_SO_FAR = ({"progress": 0, "message": "Server requested"}, {"progress": 50, "message": "Spawning server..."})


class ProgressResource(Resource):
    """`/users/{name}/server/progress` and `/users/{name}/servers/{server_name}/progress`."""

    @falcon.before(needs_self_or_admin)
    def on_get(self, req, resp, name, server_name=""):
        """How a start is going, as server-sent events."""
        server = self.hub.find_server(self.hub.find_user(name), server_name)
        last = self.hub.progress_of(server)
        events = [last] if last else PROGRESS_SO_FAR
        resp.content_type, resp.cache_control = "text/event-stream", ["no-cache"]
        number = client_socket_number(req.env)
        if last or number is None or self.hub.splicer.is_full:
            # Whoever asks with an EventSource comes again in a second.
            resp.text = "".join(map(sse, events)) + ("" if last else "retry: 1000\n\n")
            return
        handover = take_over(req.env, number)
        self.hub.splicer.carry(ProgressStream(handover.client, self.hub, server))
        resp.content_length, resp.stream = 0, handover


def sse(event: dict[str, Any]) -> str:
    """One server-sent event, as JupyterHub writes them: neither `event:` nor `id:`."""
    return f"data: {json.dumps(event)}\n\n"


class ProgressStream(Connection):
    """A client that watches a start until it has ended, without a worker's time."""

    def __init__(self, client: socket.socket, hub: HubCore, server: Server):
        super().__init__(client)
        self.hub, self.server = hub, server

    async def serve(self):
        """The events, and a blank line every 8 seconds to show that there is still somebody there."""
        await self.send(self.client, ("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
                                      f"X-JupyterHub-Version: {API_VERSION}\r\nConnection: close\r\n\r\n\n\n"
                                      + "".join(map(sse, PROGRESS_SO_FAR))).encode())
        gone = asyncio.ensure_future(self.discard(self.client))
        try:
            for turn in itertools.count(1):
                last = await asyncio.get_running_loop().run_in_executor(None, self._look)
                if last:
                    await self.send(self.client, sse(last).encode())
                    return
                if (await asyncio.wait({gone}, timeout=0.5))[0]:
                    return
                if turn % 16 == 0:
                    await self.send(self.client, b"\n\n")
        finally:
            gone.cancel()

    def _look(self):
        try:
            with self.hub.connected():
                return self.hub.progress_of(self.server)
        except HubError as error:
            return {"progress": 100, "failed": True, "message": f"Spawn failed: {error.message}"}
        except DatabaseTrouble:
            return None  # for now


class TokensResource(Resource):
    """`/users/{name}/tokens`."""

    @falcon.before(needs_self_or_admin)
    def on_get(self, req, resp, name):
        """The user's tokens, without their secrets."""
        tokens = self.hub.tokens_of(self.hub.find_user(name))
        resp.media = {"api_tokens": [token_model(token) for token in tokens if not token.client_id],
                      "oauth_tokens": [token_model(token) for token in tokens if token.client_id]}

    def on_post(self, req, resp, name):
        """A new token. Open to all, because the body itself may say who is asking."""
        body = read_json(req)
        if body is None:
            body = {}
        if not isinstance(body, dict):
            raise BadRequest("Body must be a JSON dict or empty")
        note, expires_in = read_token_wishes(body)
        identity = identify(req, self.hub)
        require(not identity or not identity.client)
        user = self._signed_in_by(body, req, name) if identity is None else self._meant(identity, name)
        by = f" by {identity.kind} {identity.name}" if identity and identity.user_id != user.id else ""
        token, row = self.hub.create_token(user, note or f"Requested via api{by}", expires_in)
        log.info("user %s has a new token%s", user.name, by)
        resp.status, resp.media = 201, {**token_model(row), "token": token}

    def _meant(self, identity, name):
        """Whose token an identified client asks for."""
        own = identity.kind == "user" and self.hub.authenticator.normalize(name) == identity.name
        require(own or identity.admin, "Only admins can request tokens for other users")
        return self.hub.find_user(name)

    def _signed_in_by(self, body, req, name):
        """Whose token a client asks for that has nothing but credentials: its own, if the hub knows it."""
        require(isinstance(body.get("auth"), dict), "Missing or invalid credentials.")
        user = self.hub.sign_in(body["auth"], req.env, req.env["minihub.client"].address, known_only=True)
        require(user and user.name == self.hub.authenticator.normalize(name), "Invalid username or password")
        return user


def read_token_wishes(body: dict[str, Any]) -> tuple[str, float | None]:
    """The note and the life in seconds (None: without end) that a new token is to have. Raises BadRequest."""
    note, expires_in = body.get("note") or "", body.get("expires_in")
    if not isinstance(note, str) or "\0" in note or len(note) > KEPT_LIMIT:
        raise BadRequest(f"note must be a string of at most {KEPT_LIMIT} characters")
    if expires_in is not None:
        if isinstance(expires_in, bool) or not isinstance(expires_in, (int, float)) or not 0 < expires_in < NEVER:
            raise BadRequest("expires_in must be a number of seconds greater than 0")
    return note, expires_in


def token_model(token: Token) -> dict[str, Any]:
    """The API's Token."""
    kind = {"id": f"o{token.id}", "kind": "oauth", "oauth_client": token.client.description} if token.client_id else {
        "id": f"a{token.id}", "kind": "api_token", "note": token.note}
    return {"user": token.user.name, **kind, "created": isoformat(token.created),
            "last_activity": isoformat(token.last_activity), "expires_at": isoformat(token.expires_at)}


class TokenResource(Resource):
    """`/users/{name}/tokens/{token_id}`."""

    @falcon.before(needs_self_or_admin)
    def on_get(self, req, resp, name, token_id):
        """One token, without its secret."""
        resp.media = token_model(self.hub.find_token(self.hub.find_user(name), token_id))

    @falcon.before(needs_self_or_admin)
    def on_delete(self, req, resp, name, token_id):
        """Revoke a token, even the one this request was made with."""
        self.hub.delete_token(self.hub.find_token(self.hub.find_user(name), token_id))
        resp.status = 204


class CurrentUserResource(Resource):
    """`/user`: the question every single-user server 2.x and later asks about every visitor."""

    @falcon.before(needs_any)
    def on_get(self, req, resp):
        """Who is asking, and what they may enter."""
        resp.media = self.hub.identity_model(req.context.identity)


GROUP_KEYS = {"name": str, "users": list}


class GroupsResource(Resource):
    """`/groups`."""

    @falcon.before(needs_admin)
    def on_get(self, req, resp):
        """Every group with its members."""
        page, groups = Paging(req), self.hub.list_groups()
        shown = groups[page.offset:][:page.limit]
        resp.media = page.model(self.hub.group_models(shown), len(groups))

    @falcon.before(needs_admin)
    def on_post(self, req, resp):
        """Create several groups with the same members: all or none."""
        body = read_object(req, "groups", {"groups": list, "users": list})
        if not body.get("groups"):
            raise BadRequest("Must specify at least one group to create")
        groups = self.hub.create_groups(read_names(body["groups"], "groups"), read_names(body.get("users", []), "users"))
        resp.status, resp.media = 201, self.hub.group_models(groups)


class GroupResource(Resource):
    """`/groups/{name}`."""

    @falcon.before(needs_admin)
    def on_get(self, req, resp, name):
        """The group with its members."""
        resp.media = self.hub.group_models([self.hub.find_group(name)])[0]

    @falcon.before(needs_admin)
    def on_post(self, req, resp, name):
        """Create the group, with members if the body names some."""
        body = read_object(req, "group", GROUP_KEYS)
        groups = self.hub.create_groups([name], read_names(body.get("users", []), "users"))
        resp.status, resp.media = 201, self.hub.group_models(groups)[0]

    @falcon.before(needs_admin)
    def on_delete(self, req, resp, name):
        """Forget the group."""
        self.hub.delete_group(self.hub.find_group(name))
        resp.status = 204


class GroupUsersResource(Resource):
    """`/groups/{name}/users`."""

    @falcon.before(needs_admin)
    def on_post(self, req, resp, name):
        """Add users: all or none."""
        self._change(req, resp, name, self.hub.add_members, "add")

    @falcon.before(needs_admin)
    def on_delete(self, req, resp, name):
        """Take users out, named in the body, as strange as that is for DELETE."""
        self._change(req, resp, name, self.hub.remove_members, "delete")

    def _change(self, req, resp, name, change, verb):
        group = self.hub.find_group(name)
        body = read_object(req, "group", GROUP_KEYS, required=True)
        if "users" not in body:
            raise BadRequest(f"Must specify users to {verb}")
        change(group, read_names(body["users"], "users"))
        resp.media = self.hub.group_models([group])[0]


class ServicesResource(Resource):
    """`/services`."""

    @falcon.before(needs_admin)
    def on_get(self, req, resp):
        """Every service, by name: an object, whatever the contract says, because that is what clients read."""
        resp.media = {service.name: self.hub.service_model(service) for service in self.hub.list_services()}


class ServiceResource(Resource):
    """`/services/{name}`."""

    @falcon.before(needs_full)
    def on_get(self, req, resp, name):
        """The service, for admins and for itself."""
        identity = req.context.identity
        require(identity.admin or (identity.kind == "service" and identity.name == name))
        resp.media = self.hub.service_model(self.hub.find_service(name))


PROXY_KEYS = ("ip", "port", "protocol", "api_url", "auth_token")


class ProxyResource(Resource):
    """`/proxy`."""

    @falcon.before(needs_admin)
    def on_get(self, req, resp):
        """The routing table."""
        resp.media = self.hub.routes_model()

    @falcon.before(needs_admin)
    def on_post(self, req, resp):
        """Bring the proxy's table up to date."""
        self.hub.check_routes()
        resp.content_type, resp.text = falcon.MEDIA_JSON, ""

    @falcon.before(needs_admin)
    def on_patch(self, req, resp):
        """Work with another proxy from now on, in all workers."""
        body = read_json(req)
        if body is None:
            raise BadRequest("need JSON body")
        if not isinstance(body, dict):
            raise BadRequest("Request body must be JSON dict")
        self.hub.move_proxy({key: body[key] for key in PROXY_KEYS if key in body})
        resp.content_type, resp.text = falcon.MEDIA_JSON, ""


class ShutdownResource(Resource):
    """`/shutdown`."""

    @falcon.before(needs_admin)
    def on_post(self, req, resp):
        """End the hub, and with it the servers and the proxy if the body or else the settings say so."""
        body = read_json(req) or {}
        if not isinstance(body, dict):
            raise BadRequest("Body must be a JSON dict or empty")
        for key, value in body.items():
            if key in ("proxy", "servers") and value not in (True, False, 0, 1):
                raise BadRequest(f"{key} must be true or false, got {value!r}")
        settings = self.hub.settings
        self.hub.shut_down(bool(body.get("servers", settings.cleanup_servers)),
                           bool(body.get("proxy", settings.cleanup_proxy)), req.env)
        resp.status, resp.media = 202, {"message": "Shutting down Hub"}


class AuthorizeTokenResource(Resource):
    """`/authorizations/token[/{token}]`: the question single-user servers 1.x ask."""

    @falcon.before(needs_api_token)
    def on_get_token(self, req, resp, token):
        """Whose token that is. An OAuth token proves nothing to a server it was not given to."""
        asker, identity = req.context.identity, self.hub.identify_token(token)
        owner = identity and identity.client_server and identity.client_server.partition("/")[0]
        if identity is None or (owner and owner != asker.name and not asker.admin):
            raise NotFound("No such token, or it has expired")
        self.hub.note_use(identity)
        resp.media = self.hub.identity_model(identity)

    def on_post(self, req, resp):
        """A new token, deprecated in favour of POST /users/{name}/tokens. Open, because the body may hold a password."""
        body = read_json(req) or {}
        if not isinstance(body, dict):
            raise BadRequest("Body must be a JSON dict or empty")
        identity = identify(req, self.hub)
        require(not identity or not identity.client)
        if identity is None:
            user = self.hub.sign_in(body, req.env, req.env["minihub.client"].address)
            require(user, "Invalid username or password")
            if not is_from_another_site(req):  # which could sign people in under a name of its choice
                sign_in_browser(req, resp, self.hub, user)
        else:
            user = self._meant(identity, body.get("username"))
        token, _ = self.hub.create_token(user, "Requested via deprecated api")
        resp.media = {"token": token, "user": self.hub.user_model(user, servers=False),
                      "warning": "/authorizations/token is deprecated in favour of /users/:name/tokens"}

    def _meant(self, identity, name):
        if not name:
            if identity.kind == "service":
                raise BadRequest("A service must say whose token it wants, as username")
            return self.hub.find_user(identity.name)
        own = identity.kind == "user" and self.hub.authenticator.normalize(str(name)) == identity.name
        require(own or identity.admin, "Only admins can request tokens for other users.")
        user = self.hub.get_user(str(name))
        if user is None:
            raise BadRequest(f"No such user '{name}'")
        return user


class AuthorizeCookieResource(Resource):
    """`/authorizations/cookie/{cookie_name}[/{cookie_value}]`."""

    @falcon.before(needs_api_token)
    def on_get(self, req, resp, cookie_name, cookie_value=""):
        """Whose cookie that is; the value may also come as the body."""
        value = cookie_value or read_body(req).decode("utf-8", "replace")
        user = cookie_name in HUB_COOKIES and user_of_cookie(self.hub, cookie_name, unquote(value.strip().strip('"')))
        if not user:
            raise NotFound("No such cookie, or it has expired")
        resp.media = self.hub.identity_model(identity_of(user))


def sign_in_browser(req: falcon.Request, resp: falcon.Response, hub: HubCore, user: User) -> None:
    """Give the browser the cookies of somebody who has signed in."""
    value = cookie_signer(hub, LOGIN_COOKIE).dumps([user.id, user.session_key])
    set_hub_cookie(req, resp, LOGIN_COOKIE, value, req.env["minihub.mount"].hub, int(hub.settings.cookie_lifetime))
    if any(spec.target for spec in hub.settings.services):  # HubAuth of JupyterHub 1.x knows people by this cookie
        value = cookie_signer(hub, SERVICES_COOKIE).dumps([user.id, user.session_key])
        set_hub_cookie(req, resp, SERVICES_COOKIE, value, f"{req.env['minihub.mount'].base}services",
                       int(hub.settings.cookie_lifetime))
    ensure_session_id(req, resp)
    req.context.user = user


########################################################################################################
# 11. OAuth2 provider
########################################################################################################

SERVER_WARNING = (" What you change there, you change for them. Open it only if you trust them: their pages can do here whatever"
                  " you can.")


class AuthorizeResource(Resource):
    """`/oauth2/authorize`: a page, in spite of its path, through which browsers pass on their way into a server."""

    @falcon.before(needs_login)
    def on_get(self, req, resp):
        """Into one's own server at once; into somebody else's after a question."""
        client = self._check_wish(req)
        own = client.server and client.server.user_id == req.context.user.id
        if own or (client.service and client.service.spec["oauth_no_confirm"]):
            self._grant(req, resp, client)
        else:
            what, whose, warning = ("server", client.server.user.name, SERVER_WARNING) if client.server else (
                "service", client.service.name, "")
            show(req, resp, self.hub, f"Open this {what}?", markup(
                '<form method=post class=card>{xsrf}<p>This is the {what} {of}<b>{whose}</b>. Programs there will learn your name.'
                '{warning}</p><div class=actions><button>Open it</button><a class="button quiet" href="{home}">Not now</a></div>'
                '</form>', what=what, of="of " if client.server else "", whose=whose, warning=warning,
                home=hub_path(req, "home"), xsrf=xsrf_field(req, resp, self.hub)))

    @falcon.before(needs_login)
    @falcon.before(needs_xsrf)
    def on_post(self, req, resp):
        """The person has said yes."""
        self._grant(req, resp, self._check_wish(req))

    def _check_wish(self, req):
        """The client that asks. Raises BadRequest, Forbidden, or HTTPFound back to a client whose address is sure."""
        client = self.hub.find_client(req.get_param("client_id", default=""))
        if req.get_param("redirect_uri") not in (None, self.hub.redirect_uri_of(client)):
            raise BadRequest("Mismatching redirect URI.")
        if req.get_param("response_type") != "code":
            raise falcon.HTTPFound(self._answer(req, client, error="unsupported_response_type"))
        challenge = req.get_param("code_challenge", default="")
        if challenge and not (req.get_param("code_challenge_method") == "S256" and CHALLENGE.fullmatch(challenge)):
            raise falcon.HTTPFound(self._answer(req, client, error="invalid_request"))
        owner = client.server and client.server.user
        require(self.hub.may_enter(identity_of(req.context.user), owner and owner.id),
                f"You may not open the server of {owner and owner.name}")
        return client

    def _grant(self, req, resp, client):
        code = self.hub.create_code(client, req.context.user, ensure_session_id(req, resp),
                                    req.get_param("code_challenge", default=""))
        resp.status, resp.location = 302, self._answer(req, client, code=code)

    def _answer(self, req, client, **parameters):
        query = urlencode({**parameters, **({"state": req.get_param("state")} if req.get_param("state") else {})})
        place = self.hub.redirect_uri_of(client)
        return f"{place}{'&' if '?' in place else '?'}{query}"


class OAuthTokenResource(Resource):
    """`/oauth2/token`: a single-user server turns a code into a token."""

    def on_post(self, req, resp):
        """Open, because the client's secret comes in the form (RFC 6749, 2.3.1)."""
        form = read_form(req)
        if form.get("grant_type") != "authorization_code":
            raise OAuthError("unsupported_grant_type", "grant_type must be authorization_code")
        client = self.hub.check_client(form.get("client_id", ""), form.get("client_secret", ""))
        token, identity = self.hub.redeem_code(client, form.get("code", ""), form.get("redirect_uri"),
                                               form.get("code_verifier", ""))
        resp.cache_control = ["no-store"]
        resp.set_header("Pragma", "no-cache")
        resp.media = {"access_token": token, "token_type": "Bearer", "scope": " ".join(self.hub.scopes_of(identity)),
                      "expires_in": int(self.hub.settings.cookie_lifetime)}


########################################################################################################
# 12. Pages
########################################################################################################


class Markup(str):
    """Text that is HTML already."""


def markup(template: str, **values: Any) -> Markup:
    """The template with its `{names}` filled in, and everything escaped and quoted that is not Markup."""
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
<style nonce="{nonce}">{style}</style>
</head>
<body>
<header><a href="{hub}home">{logo}<span>minihub</span></a><nav>{nav}</nav></header>
<main><h1>{title}</h1>{body}</main>
{script}
</body>
</html>
"""

LOGO = Markup('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32" width="28" height="28" aria-hidden="true">'
              '<rect width="32" height="32" rx="8" fill="#2456d6"/><g stroke="#fff" stroke-width="2.5">'
              '<path d="M16 16 8 9M16 16l8-7M16 16v9"/></g><g fill="#fff"><circle cx="16" cy="16" r="4.5"/>'
              '<circle cx="8" cy="9" r="2.8"/><circle cx="24" cy="9" r="2.8"/><circle cx="16" cy="25" r="2.8"/></g></svg>')

STYLE = Markup("""
:root { color-scheme: light dark; --ink: #1c2433; --soft: #5b6577; --paper: #f5f6f9; --card: #fff; --line: #d9dde6;
  --edge: #858ea0; --main: #2456d6; --on-main: #fff; --bad: #b3261e; --good: #1b7f4b }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaf1; --soft: #a3adc0; --paper: #12161f; --card: #1b2130;
  --line: #353e51; --edge: #717c93; --main: #7ea2ff; --on-main: #10141d; --bad: #ff9a91; --good: #6fd6a3 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
header { display: flex; justify-content: space-between; align-items: center; flex-wrap: wrap; gap: .5rem 1rem;
  padding: .6rem 1rem; background: var(--card); border-bottom: 1px solid var(--line) }
header a { display: inline-flex; align-items: center; gap: .5rem; color: inherit; text-decoration: none }
header > a { font-weight: 650 }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; color: var(--soft) }
nav a:hover { color: var(--main) }
main { max-width: 46rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 1.2rem }
h2 { font-size: 1.1rem; margin: 0 0 .6rem }
p { margin: 0 0 .8rem }
a { color: var(--main) }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1.2rem; margin: 0 0 1rem }
label { display: block; font-weight: 600; margin: 0 0 .9rem }
input[type=text], input[type=password], textarea { display: block; width: 100%; margin-top: .25rem; padding: .6rem .7rem;
  font: inherit; font-weight: 400; color: inherit; background: var(--paper); border: 1px solid var(--edge); border-radius: 8px }
input[readonly] { color: var(--soft); border-color: var(--line) }
::placeholder { color: var(--soft); opacity: 1 }
button, .button { display: inline-block; padding: .5rem .95rem; font: inherit; font-weight: 600; cursor: pointer;
  color: var(--on-main); background: var(--main); border: 1px solid var(--main); border-radius: 8px; text-decoration: none }
.quiet { color: var(--main); background: none }
button:focus-visible, a:focus-visible, input:focus-visible, textarea:focus-visible {
  outline: 3px solid var(--main); outline-offset: 2px }
form { margin: 0 }
.row { display: flex; flex-wrap: wrap; align-items: center; gap: .6rem }
.row > :first-child { flex: 1 1 7rem; min-width: 0; overflow-wrap: anywhere }
.row > :first-child input { margin-top: 0 }
.row + .row { margin-top: .8rem; padding-top: .8rem; border-top: 1px solid var(--line) }
.row + .below { margin: .5rem 0 0 1rem; padding: 0; border: 0 }
.actions { display: flex; flex-wrap: wrap; gap: .5rem }
.state { color: var(--soft); font-size: .9rem; display: block }
.state.ready { color: var(--good) }
.problem { border-left: 4px solid var(--bad); padding: .6rem .9rem; background: var(--card); margin: 0 0 1rem;
  overflow-wrap: anywhere }
pre, code { font: .85rem/1.45 ui-monospace, monospace; overflow-wrap: anywhere; white-space: pre-wrap }
pre { margin: .6rem 0 0 }
code { user-select: all }
label small { font-weight: 400; color: var(--soft) }
label + .state, .card > :last-child { margin-bottom: 0 }
progress { width: 100%; height: 1rem; margin-bottom: .8rem; accent-color: var(--main) }
""")

RELOAD = Markup("<noscript><meta http-equiv=refresh content=2></noscript>")

PROGRESS_SCRIPT = Markup("""
const box = document.getElementById("progress"), events = new EventSource(box.dataset.events);
const leave = (ready) => { events.close(); location.replace(ready ? box.dataset.next : location.href); };
events.onmessage = (event) => {
  const news = JSON.parse(event.data);
  if (news.ready || news.failed) leave(news.ready);
};
events.onerror = () => { if (events.readyState === EventSource.CLOSED) setTimeout(leave, 2000); };
""")


def hub_path(req: falcon.Request, path: str = "") -> str:
    """The URL path of one of the hub's pages."""
    return req.env["minihub.mount"].hub + path


def xsrf_field(req: falcon.Request, resp: falcon.Response, hub: HubCore) -> Markup:
    """The hidden field without which no form of the hub's is accepted."""
    ensure_session_id(req, resp)
    return markup('<input type=hidden name=_xsrf value="{token}">', token=xsrf_token(req, hub))


def page(mount: Mount, title: str, body: Markup, nonce: str, user: User | None = None, script: str = "") -> str:
    """A whole page; `user` is who is signed in. One with a script reloads itself where scripts do not run."""
    links = [("home", "Home")] + ([("admin", "People")] if user and user.admin else []) + [
        ("token", "Tokens"), ("logout", f"Sign out {user.name}")] if user else []
    nav = [markup('<a href="{href}">{text}</a>', href=mount.hub + path, text=text) for path, text in links]
    script = script and markup('<script nonce="{nonce}">{script}</script>', nonce=nonce, script=script)
    return markup(LAYOUT, title=title, hub=mount.hub, nonce=nonce, style=STYLE, logo=LOGO, nav=nav, body=body,
                  script=script, reload=script and RELOAD)


def show(req: falcon.Request, resp: falcon.Response, hub: HubCore, title: str, body: Markup, script: str = "",
         status: int = 200) -> None:
    """Answer with a page that runs no script but its own, and that nobody else's page can frame or keep."""
    nonce = secrets.token_urlsafe(12)
    resp.status, resp.content_type = status, falcon.MEDIA_HTML
    resp.text = page(req.env["minihub.mount"], title, body, nonce, session_user(req, hub), script)
    resp.set_header("Content-Security-Policy", "default-src 'none'; img-src 'self'; connect-src 'self'; base-uri 'none';"
                    f" style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; frame-ancestors 'self'")
    resp.set_header("Referrer-Policy", "same-origin")
    resp.cache_control = ["no-store"]


def problem(message: str) -> Markup:
    """What went wrong, on a page that is otherwise as usual; a log's lines stay lines."""
    head, _, log_lines = message.partition("\n")
    tail = markup("<pre>{lines}</pre>", lines=log_lines) if log_lines else ""
    return markup('<div class=problem role=alert>{head}{tail}</div>', head=head, tail=tail) if message else Markup("")


def error_body(mount: Mount, message: str) -> Markup:
    """The body of a page that can only say what went wrong, and lead away."""
    return markup('{problem}<p><a class="button quiet" href="{home}">To the home page</a></p>',
                  problem=problem(message), home=f"{mount.hub}home")


def safe_next(req: falcon.Request) -> str:
    """Where to go after signing in: a path of this very site, or home. Browsers read `\\` as `/` and skip controls."""
    target = req.get_param("next", default="")
    return target if re.fullmatch(r"/(?![/\\])[^\\\x00-\x20\x7f]*", target) else hub_path(req, "home")


class RootPage(Resource):
    """`/`, `/hub` and `/hub/`."""

    def on_get(self, req, resp):
        """Open: on to the hub."""
        resp.status, resp.location = 302, hub_path(req)

    def on_get_bare(self, req, resp):
        """Open: the same with its slash."""
        resp.status, resp.location = 301, hub_path(req)

    def on_get_hub(self, req, resp):
        """Open: home, or first to sign in."""
        resp.status, resp.location = 302, hub_path(req, "home" if session_user(req, self.hub) else "login")


class LoginPage(Resource):
    """`/hub/login`: works without JavaScript."""

    def on_get(self, req, resp):
        """Open to all; who is signed in goes on."""
        login_url = self.hub.settings.login_url
        if session_user(req, self.hub):
            resp.status, resp.location = 302, safe_next(req)
        elif self.hub.authenticator.has_form:
            self._form(req, resp)
        elif login_url:
            joint = "&" if "?" in login_url else "?"
            resp.status, resp.location = 302, f"{login_url}{joint}{urlencode({'next': safe_next(req)})}"
        else:
            show(req, resp, self.hub, "Sign in", AT_THE_SITE)

    def on_post(self, req, resp):
        """Open to all. A wrong password shows the form again, as JupyterHub does, with 200."""
        if not self.hub.authenticator.has_form:
            return self.on_get(req, resp)
        form = read_form(req)
        name = form.get("username", "")
        if not is_own_form(req, self.hub, form):
            return self._form(req, resp, name, f"{TOO_LATE} Please sign in again.")
        try:
            user = self.hub.sign_in(form, req.env, req.env["minihub.client"].address)
        except TooMany as error:
            resp.set_header("Retry-After", str(error.retry_after))
            return self._form(req, resp, name, error.message, 429)
        if user is None:
            return self._form(req, resp, name, "Wrong name or password.")
        sign_in_browser(req, resp, self.hub, user)
        resp.status, resp.location = 302, safe_next(req)

    def _form(self, req, resp, name="", message="", status=200):
        show(req, resp, self.hub, "Sign in", markup(
            '{problem}<form method=post class=card>{xsrf}'
            '<label>Name <input type=text name=username value="{name}" autocomplete=username autocapitalize=none'
            ' spellcheck=false required {focus_name}></label>'
            '<label>Password <input type=password name=password autocomplete=current-password required {focus_word}>'
            '</label><button>Sign in</button></form>'
            '<p class=state>No password yet, or forgotten it? Ask your teacher for a sign-in link.</p>',
            problem=problem(message), xsrf=xsrf_field(req, resp, self.hub), name=name,
            focus_name="" if name else "autofocus", focus_word="autofocus" if name else ""), status=status)


AT_THE_SITE = Markup("<p class=card>Sign in at the site that this hub is a part of, then come back here.</p>")
STILL_AT_THE_SITE = Markup("<p class=card>You are signed out of your servers, but not of the site that this hub is a part of: sign"
                           " out there, too.</p>")


class LogoutPage(Resource):
    """`/hub/logout`: where JupyterLab's menu leads."""

    def on_get(self, req, resp):
        """Open, because it does nothing for those who are not signed in."""
        user = session_user(req, self.hub)
        if user:
            self.hub.sign_out(user.id, session_id_of(req))
            base = req.env["minihub.mount"].base
            for name, path in ((LOGIN_COOKIE, hub_path(req)), (SESSION_COOKIE, base), (SERVICES_COOKIE, f"{base}services")):
                resp.unset_cookie(name, path=path)
            log.info("user %s signed out", user.name)
        if user and not self.hub.authenticator.has_form and not self.hub.authenticator.logout_url:
            show(req, resp, self.hub, "Signed out", STILL_AT_THE_SITE)
        else:
            resp.status, resp.location = 302, self.hub.authenticator.logout_url or hub_path(req, "login")


class LinkPage(Resource):
    """`/hub/link/{token}`: where people choose their password."""

    def on_get(self, req, resp, token):
        """Open to whoever has the link."""
        self._form(req, resp, self.hub.open_link(token))

    def on_post(self, req, resp, token):
        """Open to whoever has the link; the link is the proof that this is meant."""
        form = read_form(req)
        try:
            if not is_own_form(req, self.hub, form):  # or another site could sign people in with a link of its own
                raise BadRequest(f"{TOO_LATE} Please try again.")
            require_same(form.get("password"), form.get("again"))
            user = self.hub.use_link(token, form.get("username", ""), form.get("password", ""))
        except BadRequest as error:
            return self._form(req, resp, self.hub.open_link(token), form.get("username", ""), error.message)
        sign_in_browser(req, resp, self.hub, user)
        resp.status, resp.location = 303, hub_path(req, "home")

    def _form(self, req, resp, user, name="", message=""):
        name = user.name if user else name
        attributes = "readonly" if user else "required" if name else "required autofocus"
        field = markup('<input type=text name=username autocomplete=username autocapitalize=none spellcheck=false'
                       ' value="{name}" {attributes}>', name=name, attributes=attributes)
        intro = f"Welcome, {user.name}. From now on you sign in with this name and the password you choose here." if user else (
            "This hub has no admin yet. Choose the name and the password you will sign in with.")
        show(req, resp, self.hub, "Choose your password", markup(
            '{problem}<form method=post class=card>{xsrf}<p>{intro}</p><label>Name {field}</label>'
            '<label>New password <small>at least 8 characters</small><input type=password name=password'
            ' autocomplete=new-password minlength=8 required {focus}></label>'
            '<label>Once more <input type=password name=again autocomplete=new-password minlength=8 required></label>'
            '<button>Save and sign in</button></form>', problem=problem(message), intro=intro, field=field,
            xsrf=xsrf_field(req, resp, self.hub), focus="autofocus" if name else ""), status=400 if message else 200)


def require_same(password: str | None, again: str | None) -> None:
    """Raises BadRequest unless the password was typed twice alike."""
    if password != again:
        raise BadRequest("The two passwords are not the same")


STATE_WORDS = {"ready": "running", "spawning": "starting", "stopping": "stopping", "stopped": "not running",
               "deleted": "deleted"}


class HomePage(Resource):
    """`/hub/home`: one's servers."""

    @falcon.before(needs_own_pages)
    def on_get(self, req, resp):
        """The default server, and named ones if the hub has them."""
        servers = self.hub.servers_of(req.context.owner)
        if any(server.status == "stopping" for server in servers):
            resp.set_header("Refresh", "2")
        body = [server_card(req, resp, self.hub, servers)]
        if self.hub.settings.named_servers:
            body.append(markup(
                '<form method=post action="{action}" class=card>{xsrf}<h2>Another server</h2><p class=state>It runs beside'
                ' the first one and has the same files.</p><div class=row><div><input type=text name=server_name'
                ' aria-label="Name of the new server" placeholder="a name, like project" title="Letters, digits, - _ . and ~"'
                ' pattern="[A-Za-z0-9][A-Za-z0-9_.~\\-]*" maxlength=63 autocapitalize=none required></div>'
                '<button class=quiet>Start</button></div></form>', xsrf=xsrf_field(req, resp, self.hub),
                action=hub_path(req, f"spawn/{quote_name(req.context.owner.name)}")))
        show(req, resp, self.hub, f"Hello, {req.context.owner.name}", markup("{body}", body=body))


def server_card(req, resp, hub, servers) -> Markup:
    """Servers, each with what can be done to it, and above them what has gone wrong with the last ones."""
    problems = [problem(f"{server.name}: {server.failure}" if server.name else server.failure)
                for server in servers if server.failure]
    rows = [server_line(req, resp, hub, server) for server in servers]
    return markup("{problems}<section class=card>{rows}</section>", problems=problems, rows=rows)


def server_line(req, resp, hub, server, style="") -> Markup:
    """A server, how it is, and the buttons for what can be done to it."""
    return markup('<div class="row {style}"><div><b>{name}</b><span class="state {status}">{words}</span></div>'
                  '<div class=actions>{actions}</div></div>', style=style, name=server.name or whose_server(req, server),
                  status=server.status, words=server_words(hub, server), actions=server_actions(req, resp, hub, server))


def server_words(hub, server) -> str:
    """How a server is, and until when, if the settings end idle or old ones."""
    stops_at = hub.stop_time(server.started, server.last_activity) if server.status == "ready" else None
    if stops_at:
        return f"running; as things stand it will be stopped at {day(isoformat(stops_at))}"
    return "failed" if server.failure else STATE_WORDS[server.status]


def whose_server(req, server) -> str:
    """A server as whoever looks at the page calls it."""
    return "Your server" if server.user_id == req.context.user.id else f"{server.user.name}'s server"


def server_actions(req, resp, hub, server) -> list[Markup]:
    """The buttons for a server in its state."""
    url = hub.url_of(server.user.name, server.name)
    opens = markup('<a class=button href="{url}">Open</a>', url=url)
    watch = markup('<a class=button href="{url}">Watch</a>', url=server_page(req, "spawn-pending", server))
    start, stop, delete = (server_button(req, resp, hub, server, *what) for what in (
        ("spawn", "Start"), ("stop", "Stop", "quiet"), ("delete", "Delete", "quiet")))
    return {"stopped": [start, delete] if server.name and server.id else [start], "spawning": [watch, stop], "ready": [opens, stop],
            "stopping": [], "deleted": []}[server.status]


def server_button(req, resp, hub, server, action, text, style="") -> Markup:
    """A form that is a button, which does something to the server."""
    return markup('<form method=post action="{action}">{xsrf}<button class="{style}">{text}</button></form>', text=text,
                  action=server_page(req, action, server), xsrf=xsrf_field(req, resp, hub), style=style)


def server_page(req, action, server) -> str:
    """The URL of a page about a server, which does not forget where in the server its visitor is going."""
    follow = req.get_param("next", default=req.context.get("going_to", ""))
    place = quote_name(server.user.name) + (f"/{quote_name(server.name)}" if server.name else "")
    return hub_path(req, f"{action}/{place}") + (f"?{urlencode({'next': follow})}" if follow else "")


def server_url(req, hub, server) -> str:
    """Where a server is opened: the place in it that its visitor is going to, or else its front page."""
    path, follow = req.env["minihub.mount"].server_prefix(server.user.name, server.name), safe_next(req)
    return hub.users_site(server.user.name) + (follow if follow.startswith(path) else path)


def show_server(req, resp, hub, server, status=200) -> None:
    """Answer with a page that says how a server is, and offers what can be done to it."""
    words = "has failed" if server.failure else f"is {STATE_WORDS[server.status]}"
    show(req, resp, hub, f"{whose_server(req, server)} {words}", server_card(req, resp, hub, [server]), status=status)


class SpawnPage(Resource):
    """`/hub/spawn[/{name}[/{server_name}]]`: where JupyterLab's "restart my server" leads."""

    @falcon.before(needs_own_pages)
    def on_get(self, req, resp, name="", server_name=""):
        """On to the server if it runs or starts, else a button: nothing starts by following a link."""
        if server_name:
            self.hub.check_named_servers()
        server = self.hub.get_or_plan_server(req.context.owner, server_name)
        if self.hub.observe(server).status in ("ready", "spawning"):
            resp.status, resp.location = 302, self._place(req, server)
        else:
            show_server(req, resp, self.hub, server)

    @falcon.before(needs_own_pages)
    @falcon.before(needs_xsrf)
    def on_post(self, req, resp, name="", server_name=""):
        """Start it, and show how that goes."""
        server_name = server_name or req.context.form.get("server_name", "")
        if server_name:
            self.hub.check_named_servers()
        server = self.hub.find_or_create_server(req.context.owner, server_name)
        if self.hub.observe(server).status == "stopped":
            self.hub.start(server)
        resp.status, resp.location = 303, self._place(req, server)

    def _place(self, req, server):
        return server_url(req, self.hub, server) if server.status == "ready" else server_page(req, "spawn-pending", server)


class SpawnPendingPage(Resource):
    """`/hub/spawn-pending/{name}[/{server_name}]`: a start under way."""

    @falcon.before(needs_own_pages)
    def on_get(self, req, resp, name, server_name=""):
        """Into the server when it is ready; why not, if it has failed. Without JavaScript it reloads itself."""
        server = self.hub.observe(self.hub.find_server(req.context.owner, server_name))
        if server.status == "ready":
            resp.status, resp.location = 302, server_url(req, self.hub, server)
        elif server.status != "spawning":
            show_server(req, resp, self.hub, server)
        else:
            place = f"servers/{quote_name(server.name)}" if server.name else "server"
            show(req, resp, self.hub, f"{whose_server(req, server)} is starting", markup(
                '<section class=card id=progress data-events="{events}" data-next="{target}">'
                '<p>This takes a few seconds. The server opens here as soon as it is ready.</p>'
                '<progress aria-label="starting"></progress>{cancel}</section>', target=server_url(req, self.hub, server),
                cancel=server_button(req, resp, self.hub, server, "stop", "Cancel", "quiet"),
                events=hub_path(req, f"api/users/{quote_name(server.user.name)}/{place}/progress")),
                script=PROGRESS_SCRIPT)


class StopPage(Resource):
    """`/hub/stop/{name}[/{server_name}]` and `/hub/delete/{name}/{server_name}`."""

    @falcon.before(needs_own_pages)
    @falcon.before(needs_xsrf)
    def on_post(self, req, resp, name, server_name=""):
        """Stop the server."""
        self.hub.stop(self.hub.find_server(req.context.owner, server_name))
        self._back(req, resp)

    @falcon.before(needs_own_pages)
    @falcon.before(needs_xsrf)
    def on_post_delete(self, req, resp, name, server_name):
        """Stop a named server and forget it."""
        self.hub.stop(self.hub.find_server(req.context.owner, server_name), forget=True)
        self._back(req, resp)

    def _back(self, req, resp):
        resp.status = 303
        resp.location = hub_path(req, "home" if req.context.owner == req.context.user else "admin")


class TokenPage(Resource):
    """`/hub/token`: one's API tokens."""

    @falcon.before(needs_own_pages)
    def on_get(self, req, resp):
        """What programs can act in one's name, and a form for another one."""
        self._show(req, resp)

    @falcon.before(needs_own_pages)
    @falcon.before(needs_xsrf)
    def on_post(self, req, resp):
        """Make a token, which is shown this once, or revoke the one named in `revoke`."""
        if "revoke" in req.context.form:
            self.hub.delete_token(self.hub.find_token(req.context.user, req.context.form["revoke"]))
            resp.status, resp.location = 303, hub_path(req, "token")
            return
        note, _ = read_token_wishes({"note": req.context.form.get("note", "")[:200]})
        token, _ = self.hub.create_token(req.context.user, note or "Requested on the token page")
        self._show(req, resp, token)

    def _show(self, req, resp, token=""):
        xsrf = xsrf_field(req, resp, self.hub)
        new = markup('<section class=card role=status><h2>Your new token</h2><p><code>{token}</code></p><p class=state>Copy it'
                     ' now: it is not shown again.</p></section>', token=token) if token else Markup("")
        # The token that a server runs with ends with the server, and is not to be taken from it.
        tokens = [token_model(token) for token in self.hub.tokens_of(req.context.user) if token.server_id is None]
        rows = [markup('<div class=row><div>{what}<span class=state>made {made}, last used {used}</span></div><form method=post>'
                       '{xsrf}<button class=quiet name=revoke value="{id}">Revoke</button></form></div>', xsrf=xsrf,
                       what=model.get("note") or f"Browser signed in: {model.get('oauth_client')}",
                       made=day(model["created"]), used=day(model["last_activity"]), id=model["id"]) for model in tokens]
        listing = markup("<section class=card>{rows}</section>", rows=rows) if rows else Markup("")
        show(req, resp, self.hub, "Tokens", markup(
            '<p>A token lets a program do in your name whatever you can do here. Keep it like a password.</p>{new}'
            '<form method=post class=card>{xsrf}<h2>New token</h2><div class=row><div><input type=text name=note maxlength=200'
            ' aria-label="What it is for" placeholder="what it is for"></div><button>Make a token</button></div></form>{listing}',
            new=new, xsrf=xsrf, listing=listing))


def day(moment: str | None) -> str:
    """A moment of the API's, for people."""
    return moment[:16].replace("T", " ") + " UTC" if moment else "never"


LINK_HINT = " Whoever has lost their link or password gets a new sign-in link here."


class AdminPage(Resource):
    """`/hub/admin`: the people of the hub."""

    @falcon.before(needs_admin_login)
    def on_get(self, req, resp):
        """Everybody, what their servers do, and a form to add more people."""
        self._show(req, resp)

    @falcon.before(needs_admin_login)
    @falcon.before(needs_xsrf)
    def on_post(self, req, resp):
        """Add the people named in the form, one a line, and show a sign-in link for each."""
        names = [name.strip() for name in req.context.form.get("names", "").splitlines() if name.strip()]
        try:
            if not names:
                raise BadRequest("Write at least one name")
            users = self.hub.create_users(names)
        except (BadRequest, Conflict) as error:
            return self._show(req, resp, problem(error.message), req.context.form.get("names", ""), error.status)
        known = dict.fromkeys(map(self.hub.normalize, names)).keys() - {user.name for user in users}
        self._show(req, resp, self._links(req, users, known))

    @falcon.before(needs_admin_login)
    @falcon.before(needs_xsrf)
    def on_post_link(self, req, resp, name):
        """A new sign-in link for somebody who has lost the old one, or the password."""
        self._show(req, resp, self._links(req, [self.hub.find_user(name)]))

    def _links(self, req, users, known=()):
        others = markup("<p>Here already: {names}</p>", names=", ".join(sorted(known))) if known else ""
        if not self.hub.authenticator.has_form:
            return markup("<section class=card role=status><h2>Added</h2><p>{names}</p>{others}</section>", others=others,
                          names=", ".join(user.name for user in users))
        client = req.env["minihub.client"]
        rows = [markup("<div class=row><b>{name}</b><code>{link}</code></div>", name=user.name,
                       link=self.hub.link_for(user, f"{client.scheme}://{client.host}")) for user in users]
        return markup("<section class=card role=status><h2>Sign-in links</h2><p>Give each person their own link. It can be used"
                      " once, to choose a password. Links are not shown again, but you can always make new ones.</p>"
                      "{others}{rows}</section>", others=others, rows=rows)

    def _show(self, req, resp, news=Markup(""), names="", status=200):
        self.hub.observe_pending()
        running = self.hub.running_servers()
        people = [self._person(req, resp, user, running.get(user.id, ())) for user in self.hub.list_users()[0]]
        show(req, resp, self.hub, "People", markup(
            '{news}<form method=post class=card action="{action}">{xsrf}<h2>Add people</h2><label>Names, one a line'
            '<textarea name=names rows=4 spellcheck=false autocapitalize=none required>{names}</textarea></label>'
            '<button>Add</button></form><section class=card><h2>Everybody</h2><p class=state>A name leads to its server.'
            '{hint}</p>{people}</section>', news=news, names=names, hint=LINK_HINT if self.hub.authenticator.has_form else "",
            xsrf=xsrf_field(req, resp, self.hub), people=people, action=hub_path(req, "admin")), status=status)

    def _person(self, req, resp, user, servers):
        seen = f"last seen {day(isoformat(user.last_activity))}" if user.last_activity else "not seen yet"
        link = markup('<form method=post action="{link}">{xsrf}<button class=quiet>Sign-in link</button></form>',
                      link=hub_path(req, f"admin/link/{quote_name(user.name)}"), xsrf=xsrf_field(req, resp, self.hub))
        line = markup('<div class=row><div><a href="{spawn}"><b>{name}</b></a>{role}<span class=state>{seen}</span></div>{link}</div>',
                      spawn=hub_path(req, f"spawn/{quote_name(user.name)}"), name=user.name, seen=seen,
                      role=" (admin)" if user.admin else "", link=link if self.hub.authenticator.has_form else "")
        return [line, *(server_line(req, resp, self.hub, server, "below") for server in servers)]


class UserUrlPage(Resource):
    """`/user/...` and `/hub/user/...`: a server's address without a server."""

    def on_fallback(self, req, resp, rest=""):
        """Open: programs are told that nothing runs there; people go on to the hub, which knows who they are."""
        name, _, path = rest.partition("/")
        if is_for_programs(req, path):
            raise Unavailable(f"JupyterHub server no longer running at {req.env['minihub.mount'].base}user/{rest}. Restart the"
                              f" server at {self.hub.settings.public_url}{hub_path(req, f'spawn/{quote_name(name)}')}")
        place = hub_path(req, "user/") + target_below(req.env, "/user/")
        resp.status, resp.location = 302, place

    @falcon.before(needs_login)
    def on_explain(self, req, resp, rest=""):
        """One's own: start it? An admin may start everybody's. Who follows somebody else's link lands at home's like."""
        name, _, path = rest.partition("/")
        user, mount = req.context.user, req.env["minihub.mount"]
        own = self.hub.authenticator.normalize(name) == user.name
        if not own and not user.admin:
            resp.status, resp.location = 302, f"{self.hub.url_of(user.name, '')}{quote(path)}"
            return
        owner = self.hub.find_user(name)
        server = self._server(owner, path)
        above = "/".join(req.env["PATH_INFO"].split("/")[:4])  # /hub/user/NAME, which routes may spell otherwise
        here = mount.server_prefix(owner.name, "") + target_below(req.env, f"{above}/")
        if server.status == "ready":
            self.hub.add_route(server)  # or this could go round for ever
            resp.status, resp.location = 302, self.hub.users_site(server.user.name) + here
        elif is_for_programs(req, path):
            raise Unavailable(f"JupyterHub server no longer running at {here}")
        else:
            req.context.going_to = here
            show_server(req, resp, self.hub, server, status=503)

    def _server(self, user, path):
        named = self.hub.get_server(user, path.partition("/")[0])
        return self.hub.observe(named or self.hub.find_server(user, ""))


def is_for_programs(req: falcon.Request, path: str) -> bool:
    """Whether a request for a server comes from a program, which can do nothing with a page (JupyterHub's rule)."""
    accept = req.get_header("Accept") or ""
    prefers_json = "application/json" in accept and "text/html" not in accept
    return req.method not in ("GET", "HEAD") or "api" in path.split("/") or prefers_json or is_websocket(req.env)


class UserRedirectPage(Resource):
    """`/hub/user-redirect/{rest}`: a link that leads everybody to their own server."""

    @falcon.before(needs_login)
    def on_get(self, req, resp, rest=""):
        """To the same path on one's own server."""
        place = target_below(req.env, "/hub/user-redirect/")
        resp.status, resp.location = 302, self.hub.url_of(req.context.user.name, "") + place


class HealthPage(Resource):
    """`/hub/health`."""

    def on_get(self, req, resp):
        """Open: 200 and nothing else, when the hub and its database answer."""
        self.hub.check_health()
        resp.text = ""


ERROR_TITLES = {403: "Not allowed", 404: "Nothing here", 503: "Not just now"}


class ErrorPage(Resource):
    """`/hub/error/{code}`: what configurable-http-proxy shows when a server does not answer."""

    def on_get(self, req, resp, code):
        """Open: a page, with 200, because the proxy puts the status on it."""
        show(req, resp, self.hub, ERROR_TITLES.get(code, "That did not work"), problem(
            "Nothing answers at this address just now." if code in (404, 503) else f"The proxy reports error {code}."))


class LogoPage(Resource):
    """`/hub/logo`, which single-user servers 1.x show, too."""

    def on_get(self, req, resp):
        """Open: a picture."""
        resp.content_type, resp.text = "image/svg+xml", LOGO
        resp.cache_control = ["max-age=86400"]


class CspReportPage(Resource):
    """`/hub/security/csp-report`: where the policy of single-user servers tells browsers to complain."""

    def on_post(self, req, resp):
        """Open: noted, for whoever looks."""
        log.debug("content security policy: %s", read_body(req)[:1000])
        resp.status = 204


########################################################################################################
# 13. The WSGI application
########################################################################################################


class NonEmptyConverter(falcon.routing.BaseConverter):
    """A path segment that is there: `/users/` is not the user with the empty name."""

    def convert(self, value):
        """The segment, or None for no match."""
        return value or None


API = "/hub/api"
USER = API + "/users/{name:text}"

#: Every path: its pattern, its resource, and the suffix of the responders' names.
ROUTES = (
    (API, VersionResource, None),
    (API + "/", VersionResource, None),
    (API + "/info", InfoResource, None),
    (API + "/users", UsersResource, None),
    (USER, UserResource, None),
    (USER + "/activity", ActivityResource, None),
    (USER + "/server", ServerResource, None),
    (USER + "/server/progress", ProgressResource, None),
    (USER + "/servers/", ServerResource, None),
    (USER + "/servers/{server_name:text}", ServerResource, None),
    (USER + "/servers/{server_name:text}/progress", ProgressResource, None),
    (USER + "/tokens", TokensResource, None),
    (USER + "/tokens/{token_id:text}", TokenResource, None),
    (API + "/user", CurrentUserResource, None),
    (API + "/groups", GroupsResource, None),
    (API + "/groups/{name:text}", GroupResource, None),
    (API + "/groups/{name:text}/users", GroupUsersResource, None),
    (API + "/services", ServicesResource, None),
    (API + "/services/{name:text}", ServiceResource, None),
    (API + "/proxy", ProxyResource, None),
    (API + "/authorizations/token", AuthorizeTokenResource, None),
    (API + "/authorizations/token/{token:text}", AuthorizeTokenResource, "token"),
    (API + "/authorizations/cookie/{cookie_name:text}", AuthorizeCookieResource, None),
    (API + "/authorizations/cookie/{cookie_name:text}/{cookie_value:text}", AuthorizeCookieResource, None),
    (API + "/oauth2/authorize", AuthorizeResource, None),
    (API + "/oauth2/token", OAuthTokenResource, None),
    (API + "/shutdown", ShutdownResource, None),
    ("/", RootPage, None),
    ("/hub", RootPage, "bare"),
    ("/hub/", RootPage, "hub"),
    ("/hub/login", LoginPage, None),
    ("/hub/logout", LogoutPage, None),
    ("/hub/link/{token:text}", LinkPage, None),
    ("/hub/home", HomePage, None),
    ("/hub/spawn", SpawnPage, None),
    ("/hub/spawn/{name:text}", SpawnPage, None),
    ("/hub/spawn/{name:text}/{server_name:text}", SpawnPage, None),
    ("/hub/spawn-pending/{name:text}", SpawnPendingPage, None),
    ("/hub/spawn-pending/{name:text}/{server_name:text}", SpawnPendingPage, None),
    ("/hub/stop/{name:text}", StopPage, None),
    ("/hub/stop/{name:text}/{server_name:text}", StopPage, None),
    ("/hub/delete/{name:text}/{server_name:text}", StopPage, "delete"),
    ("/hub/token", TokenPage, None),
    ("/hub/admin", AdminPage, None),
    ("/hub/admin/link/{name:text}", AdminPage, "link"),
    ("/hub/user-redirect/{rest:path}", UserRedirectPage, None),
    ("/hub/error/{code:int}", ErrorPage, None),
    ("/hub/health", HealthPage, None),
    ("/hub/logo", LogoPage, None),
    ("/hub/security/csp-report", CspReportPage, None),
)


def own_scheme(environ: dict[str, Any]) -> str:
    """http or https, whichever the WSGI host itself speaks: wsgi.url_scheme can be a proxy's word, in uWSGI any client's."""
    if "gunicorn.socket" in environ:
        return "https" if isinstance(environ["gunicorn.socket"], ssl.SSLSocket) else "http"
    if "uwsgi.version" in environ:
        return "https" if environ.get("HTTPS") else "http"
    return environ["wsgi.url_scheme"]


#: gunicorn takes this header for the mount point when a proxy on its own machine passes it on, as configurable-http-proxy does.
NO_SCRIPT_NAME = "The header SCRIPT_NAME is not believed. To have the hub below a path, set MINIHUB_BASE_URL"
NO_THREADS = "uWSGI runs no threads of Python's, which the hub needs. Start it with --enable-threads"
NO_DATABASE = "The hub's database does not answer just now. Nothing is lost; try again in a moment."


class Hub(HubCore):
    """A notebook hub as a WSGI application. Takes the fields of `Settings` as keywords; raises SettingError."""

    def __init__(self, **settings: Any):
        super().__init__(Settings(**settings))
        with self.connected():
            self.apply_settings()
        self.disconnect()
        self._falcon = self._make_falcon()
        self._tick_lock = threading.Lock()
        self._ticking: threading.Event | None = None  # set: that ticker is to end
        self._ticker_owner = 0
        self._owns_host = False  # true for minihub.app, which is all that its WSGI server runs

    def __call__(self, environ, start_response):
        """Answer a request: from a user's server if there is one for its path, else from the hub's own pages and API."""
        try:
            with self.connected():
                environ = self._below_base(environ)
                if refusal := self._refusal(environ):
                    return self._falcon({**environ, "minihub.error": refusal}, start_response)
                self.arrive(environ["minihub.mount"])
                self.start_ticker()
                route = self._find_route(environ["minihub.mount"], environ["PATH_INFO"])
                if route is None:
                    return self._falcon(environ, start_response)
                return self._forward(environ, start_response, *route)
        except DatabaseTrouble as error:
            log.error("the database does not answer: %s", error)
            with contextlib.suppress(DatabaseTrouble):
                self.disconnect()  # the next request may have more luck with another connection
            is_for_program = API in environ.get("PATH_INFO", "")
            kind = falcon.MEDIA_JSON if is_for_program else falcon.MEDIA_TEXT
            text = json.dumps({"status": 503, "message": NO_DATABASE}) if is_for_program else NO_DATABASE
            start_response("503 Service Unavailable", [("Content-Type", kind), ("Retry-After", "5"),
                                                       ("X-JupyterHub-Version", API_VERSION)])
            return [text.encode()]

    def _below_base(self, environ):
        """The request as seen from inside the hub: base_url belongs to the mount point, and who asks is worked out."""
        client = Client.of(environ, self.settings.trusted_proxies)
        script, path = environ.get("SCRIPT_NAME", ""), environ.get("PATH_INFO") or "/"
        above = self._base_in_wsgi.rstrip("/")
        base = quote((script + above).encode("latin-1"), safe="/@~") + "/"
        is_inside = f"{path}/".startswith(f"{above}/")
        if is_inside:
            script, path = script + above, path[len(above):] or "/"
        address = self.settings.hub_url or self._own_address(environ)
        return {**environ, "SCRIPT_NAME": script, "PATH_INFO": path, "minihub.client": client,
                "minihub.mount": Mount(base, address), "minihub.is_inside": is_inside}

    def _refusal(self, environ):
        """What to answer a request that has come to the wrong place, or in a way in which none can be served; else None."""
        if "HTTP_SCRIPT_NAME" in environ:
            return BadRequest(NO_SCRIPT_NAME)
        if "uwsgi.version" in environ and not sys.modules["uwsgi"].has_threads:
            return Unavailable(NO_THREADS)
        return self._misplaced(environ) or self._outside(environ)

    def _misplaced(self, environ):
        """What to answer where servers have a host name of their own and this is not the one for the path, or None."""
        if not self.settings.user_url:
            return None
        host, (_, kind, name, *_) = environ["minihub.client"].host, f"{environ['PATH_INFO']}//".split("/")
        if kind == "user" and name:
            # Not normalized: a route is for one spelling of a name, and belongs on one host.
            right = self.users_site(name.encode("latin-1").decode("utf-8", "replace"))
        else:
            right = self.settings.public_url if is_host_of(self.settings.user_url, host) else ""
        if not right or is_host_of(right, host):
            return None
        place = right + request_target(environ)
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD") or is_websocket(environ):
            return Misdirected(f"This is to be found at {place} only")
        return falcon.HTTPFound(place)

    def _outside(self, environ):
        """What to answer outside of base_url, or None: JupyterHub, too, leads from there to the same path among its pages."""
        if environ["minihub.is_inside"]:
            return None
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return NotFound(f"The hub is below {self.settings.base_url}")
        return falcon.HTTPFound(environ["minihub.mount"].hub + target_below(environ, "/"))

    def _own_address(self, environ):
        """Where servers on this machine reach the WSGI host: at what it listens on, whichever of the machine's addresses a
        client has used. On a unix socket gunicorn takes it from the Host header, which is only a client's word."""
        client = environ.get("gunicorn.socket")
        if client is not None and client.family == socket.AF_UNIX:
            return self._mount.address if self._mount else self.guess_mount().address
        if "mod_wsgi.version" in environ:  # there SERVER_NAME and SERVER_PORT are the Host header
            return local_address(environ["mod_wsgi.listener_host"], environ["mod_wsgi.listener_port"], own_scheme(environ))
        return local_address(environ["SERVER_NAME"], environ["SERVER_PORT"], own_scheme(environ))

    def wrap(self, application: Callable) -> Callable:
        """A WSGI application that is this hub for the hub's own paths, hub/, user/ and services/ below `base_url`, and
        `application` for all others."""
        return lambda environ, start_response: (self if self._is_mine(environ) else application)(environ, start_response)

    def _is_mine(self, environ):
        path = environ.get("PATH_INFO", "")
        if self.settings.user_url and is_host_of(self.settings.user_url, Client.of(environ, self.settings.trusted_proxies).host):
            return True  # the site's pages are not to be had where students' are
        above, kind, below = path.partition(self._base_in_wsgi)
        return not above and bool(kind) and below.partition("/")[0] in ("hub", "user", "services")

    @functools.cached_property
    def _base_in_wsgi(self):
        """`base_url` as PATH_INFO spells it: its bytes as Latin-1 (PEP 3333)."""
        return self.settings.base_url.encode().decode("latin-1")

    # Requests for servers

    def _find_route(self, mount, path):
        """Target and data of the longest route above the path, or None. A named server's lies below the default one's."""
        if not path.startswith(("/user/", "/services/")) or not isinstance(self.proxy, EmbeddedProxy):
            return None
        _, kind, name, below, *_ = (path.encode("latin-1").decode("utf-8", "replace") + "//").split("/")
        shorter = f"{mount.base}{kind}/{quote_name(name)}/"
        rows = ROUTE_BY_PREFIX.run(self.database, shorter, f"{shorter}{quote_name(below)}/").fetchall()
        _, target, data = max(rows, key=lambda row: len(row[0]), default=(None, None, None))
        return target and (target, json.loads(data))

    def _forward(self, environ, start_response, target, data):
        """Pass the request on, or what is left of it when the hub's secrets are taken out."""
        environ = without_hub_secrets(self, environ, data)
        try:
            return self.proxy.forward(environ, start_response, target, environ["minihub.client"],
                                      functools.partial(self._unavailable, environ))
        except HubError as error:
            return self._falcon({**environ, "minihub.error": error}, start_response)

    def _unavailable(self, environ):
        """The whole response for a server that does not answer; written without the database, beside the workers."""
        message = "This server does not answer just now. It may be busy, or about to stop. Try again in a moment."
        if is_for_programs(falcon.Request(environ), environ["PATH_INFO"]):
            return plain_response("503 Service Unavailable", "application/json",
                                  json.dumps({"status": 503, "message": message}))
        nonce = secrets.token_urlsafe(12)
        return plain_response("503 Service Unavailable", "text/html", page(
            environ["minihub.mount"], "No answer", error_body(environ["minihub.mount"], message), nonce))

    # The hub's own pages and API

    def _make_falcon(self):
        application = falcon.App(middleware=[self])
        application.router_options.converters["text"] = NonEmptyConverter
        resources = {kind: kind(self) for _, kind, _ in ROUTES}
        for path, kind, suffix in ROUTES:
            application.add_route(path, resources[kind], suffix=suffix)
        fallback = UserUrlPage(self)
        application.add_sink(fallback.on_fallback, r"/user/(?P<rest>.*)")
        application.add_sink(fallback.on_explain, r"/hub/user/(?P<rest>.*)")
        for kind in (HubError, falcon.HTTPError, *DatabaseTrouble, Exception):
            application.add_error_handler(kind, self._on_error)
        return application

    def process_request(self, req, resp):
        """Falcon's hook before routing: answer with an error that arose on the way here."""
        if "minihub.error" in req.env:
            raise req.env["minihub.error"]

    def process_response(self, req, resp, resource, req_succeeded):
        """Falcon's hook after everything: the headers that every answer has."""
        resp.set_header("X-JupyterHub-Version", API_VERSION)
        resp.set_header("X-Content-Type-Options", "nosniff")
        if is_api(req):
            resp.set_header("Access-Control-Allow-Headers", "accept, content-type, authorization")
            resp.set_header("Content-Security-Policy", "frame-ancestors 'self'; default-src 'none';"
                            f" report-uri {hub_path(req, 'security/csp-report')}")

    def _on_error(self, req, resp, error, params):
        """Say what went wrong: JSON to programs, a page to people; never what is inside."""
        status, message = self._explain(req, error)
        resp.status = status
        if getattr(error, "retry_after", None):
            resp.set_header("Retry-After", str(error.retry_after))
        if isinstance(error, falcon.HTTPError):
            resp.set_headers(error.headers or {})
        if isinstance(error, OAuthError):
            resp.media = {"error": error.error, "error_description": message}
        elif is_api(req) or (req.path.startswith("/user/") and is_for_programs(req, req.path)):
            resp.media = {"status": status, "message": message}
        else:
            if isinstance(error, falcon.HTTPNotFound):
                message = "There is no page at this address"
            show(req, resp, self, ERROR_TITLES.get(status, "That did not work"), error_body(req.env["minihub.mount"], message),
                 status=status)

    def _explain(self, req, error):
        if isinstance(error, HubError):
            return error.status, error.message
        if isinstance(error, falcon.HTTPError):
            return error.status_code, error.description or error.title.removeprefix(f"{error.status_code} ")
        req.context.user = None  # who is signed in is in the database
        if isinstance(error, DatabaseTrouble):
            log.error("the database does not answer: %s", error)
            self.disconnect()
            return 503, NO_DATABASE
        if isinstance(error, Overtaken):
            log.warning("%s %r was overtaken by another request", req.method, req.path, exc_info=error)
            return 409, "Somebody else has changed this in the same moment. Look at it again"
        log.error("%s %r failed", req.method, req.path, exc_info=error)
        return 500, "Internal Server Error"

    # The end

    def shut_down(self, servers: bool, proxy: bool, environ: dict[str, Any]) -> None:
        """End the hub once this request is answered: services, on demand servers and proxy, then the WSGI server.

        Only a gunicorn or uWSGI that runs `minihub:app` is ended, with all its workers. Somebody else's application is never
        killed: the setting `on_shutdown` is called instead.
        """
        log.warning("shutting down%s%s", ", with all servers" if servers else "", ", with the proxy" if proxy else "")
        if servers:
            for running in self.running_servers().values():
                for server in running:
                    self.stop(server)
        for service in self.list_services():
            self._stop_service(service)
            Service.update(next_start=now() + timedelta(seconds=60)).where(Service.id == service.id).execute()
        if proxy and isinstance(self.proxy, ConfigurableHTTPProxy):
            self.proxy.stop_running()
        threading.Thread(target=self._end_host, args=(servers, environ), name="minihub-shutdown").start()

    def _end_host(self, servers, environ):
        """Wait for servers that are to end, as only this hub grows less polite to them, then end what runs the hub."""
        deadline = time.monotonic() + 20
        with self.connected():
            while servers and time.monotonic() < deadline and self.running_servers():
                self.observe_pending()
                time.sleep(0.1)
        self.disconnect()
        if self.settings.on_shutdown:
            self.settings.on_shutdown()
        elif self._owns_host and "gunicorn.socket" in environ:
            os.kill(os.getppid(), signal.SIGTERM)
        elif self._owns_host and "uwsgi.version" in environ:
            os.kill(sys.modules["uwsgi"].masterpid() or os.getpid(), signal.SIGINT)  # a SIGTERM may only restart it
        else:
            log.warning("the WSGI server goes on: the hub cannot end it, and the setting on_shutdown is not set")

    # For the site that the hub is mounted in: these work anywhere, also where there is no request

    def start_server(self, name: str, server_name: str = "", options: dict[str, Any] | None = None) -> str:
        """Start a user's server and return at once where it will be, as `url_of`; `on_server_started` tells when it is ready.

        Without `options` it gets those of its last start. One that is starting goes on. Raises NotFound for an unknown
        user, BadRequest if it runs or is stopping, TooMany at a limit. Where the hub is mounted it learns from its first
        request: before that, the path is below `base_url`.
        """
        with self.connected():
            server = self.find_or_create_server(self.find_user(name), server_name)
            self.start(server, options, keep_options=options is None)
            return self.users_site(server.user.name) + server.prefix

    def stop_server(self, name: str, server_name: str = "") -> None:
        """Stop a user's server, without waiting; `on_server_stopped` tells when it has ended. Raises NotFound."""
        with self.connected():
            self.stop(self.find_server(self.find_user(name), server_name))

    def create_users(self, names: list[str], admin: bool = False) -> list[User]:
        """Those of the users who are new, in one transaction: all or nothing.

        Raises BadRequest, naming every invalid name, and Conflict if none is new.
        """
        with self.connected():
            return super().create_users(names, admin)

    def tick(self) -> bool:
        """Do what is due: observe servers, clean up. False if another worker is at it (it has the lease)."""
        with self.connected():
            return super().tick()

    def close(self) -> None:
        """End this process's threads of the hub, its connections and, if the database is in memory, that.

        Servers and services go on, as they do when the process ends. A later request starts the threads again. Not for
        callbacks, which the threads themselves may run.
        """
        with self._tick_lock:  # not in the middle of a round
            if self._ticking:
                self._ticking.set()
            self._ticking, self._ticker_owner = None, 0
        self.splicer.close()
        with contextlib.suppress(DatabaseTrouble), self.connected():
            self._end_lease("ticker")
        self.disconnect()
        self._remove_database()

    # The ticker

    def start_ticker(self) -> None:
        """See to it that this process has a thread that ticks, if the settings want one."""
        if self._ticker_owner == os.getpid() or not self.settings.tick_interval:
            return
        with self._tick_lock:
            if self._ticker_owner != os.getpid():
                self._ticker_owner, self._ticking = os.getpid(), threading.Event()
                threading.Thread(target=self._run_ticker, args=(self._ticking,), name="minihub-ticker", daemon=True).start()

    def tick_in_workers(self) -> None:
        """See to it that this process ticks, or its workers if it has some."""
        self.tick_across_forks()
        uwsgi = sys.modules.get("uwsgi")
        if uwsgi is None or uwsgi.worker_id():
            self.start_ticker()
        else:  # it forks behind Python's back, so that a thread's locks would stay locked
            uwsgi.post_fork_hook = self.start_ticker

    def tick_across_forks(self) -> None:
        """Leave the ticking to the children of this process, if it turns out to be the parent of workers.

        A fork waits until the ticker is between two rounds, because what it holds would stay locked in the child.
        """
        os.register_at_fork(before=self._tick_lock.acquire, after_in_parent=self._rest_in_parent,
                            after_in_child=self._tick_in_child)

    def _rest_in_parent(self):
        if self._ticking:
            self._ticking.set()
        self._ticker_owner = 0
        self._tick_lock.release()

    def _tick_in_child(self):
        self._tick_lock.release()
        self.start_ticker()

    def _run_ticker(self, over):
        while not over.wait(self.settings.tick_interval):
            with self._tick_lock:
                try:
                    if not over.is_set():
                        self.tick()
                except DatabaseTrouble as error:
                    log.error("the database does not answer: %s", error)
                    self.disconnect()
                except Exception:  # out of a hook that somebody else wrote
                    log.exception("the ticker failed, and will try again")
        self.disconnect()


def is_api(req: falcon.Request) -> bool:
    """Whether the answer is for programs. The authorize endpoint is a page in the API's clothes."""
    return req.path.startswith(API) and not req.path.startswith(f"{API}/oauth2/authorize")


_app_lock = threading.Lock()


def __getattr__(name):
    """`minihub.app`, made from the `MINIHUB_*` variables when it is first asked for."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _app_lock:
        if "app" not in globals():
            settings = Settings.from_environ()
            hub = Hub(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)})
            hub._owns_host = True
            hub.tick_in_workers()
            globals()["app"] = hub
        return globals()["app"]


########################################################################################################
# 14. Command line
########################################################################################################


def main(arguments: list[str] | None = None) -> int:
    """`python -m minihub`: what an admin does at the machine itself. Uses the `MINIHUB_*` variables, as the hub does."""
    parser = argparse.ArgumentParser(prog="minihub", description="A notebook hub. Run it with: gunicorn minihub:app")
    parser.add_argument("--version", action="version", version=f"minihub {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    link = commands.add_parser("link", help="print a one-time link with which NAME chooses a (new) password")
    link.set_defaults(run=print_link)
    link.add_argument("name", metavar="NAME")
    link.add_argument("--admin", action="store_true", help="and make NAME an admin")
    token = commands.add_parser("token", help="print a new API token for NAME")
    token.set_defaults(run=print_token)
    token.add_argument("name", metavar="NAME")
    token.add_argument("--note", default="Requested on the command line", help="what it is for")
    backup = commands.add_parser("backup", help="copy the database (SQLite) into the new FILE, while the hub runs")
    backup.set_defaults(run=make_backup)
    backup.add_argument("file", metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        hub = HubCore(Settings.from_environ())
        with hub.connected():
            options.run(hub, options)
    except (HubError, SettingError) as error:
        print(f"minihub: {error}", file=sys.stderr)
        return 1
    return 0


def print_link(hub: HubCore, options: argparse.Namespace) -> None:
    """`minihub link NAME`, for users old and new."""
    user = hub.get_user(options.name) or hub.create_user(options.name)
    if options.admin:
        hub.change_user(user, {"admin": True})
    print(hub.link_for(user))


def print_token(hub: HubCore, options: argparse.Namespace) -> None:
    """`minihub token NAME`."""
    print(hub.create_token(hub.find_user(options.name), options.note)[0])


def make_backup(hub: HubCore, options: argparse.Namespace) -> None:
    """`minihub backup FILE`."""
    copy_database(hub.database, options.file)


if __name__ == "__main__":
    from minihub import main as main_of_the_module  # the module of that name, whose classes hooks derive from

    sys.exit(main_of_the_module())
