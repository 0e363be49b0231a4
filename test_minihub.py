"""Tests of minihub, under the same banners as the file they test. Run them with: python -m pytest

What a test is about is real in it: gunicorn, processes, jupyterhub-singleuser, Chromium. All else is webtest, in process.
A part that is missing on the machine makes its tests skip, with the command that installs it; with CI set, it fails them.
"""

########################################################################################################
# 1. Imports, and what the tests share
########################################################################################################

from __future__ import annotations

import ast
import contextlib
import functools
import http.client
import http.server
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import socket
import socketserver
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
import wsgiref.simple_server
from datetime import timedelta
from pathlib import Path
from urllib.parse import parse_qs, quote, urlencode, urljoin, urlsplit

import pytest
import requests
import webtest
import yaml

import minihub
from minihub import Hub, Settings

HERE = Path(__file__).parent
SINGLEUSER = shutil.which("jupyterhub-singleuser", path=os.pathsep.join([str(Path(sys.executable).parent), os.defpath]))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

needs_singleuser = pytest.mark.skipif(not SINGLEUSER, reason="pip install '.[classroom]'")
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="apt-get install chromium")


class NoSkips:
    """A plugin for pytest: a test that skips has failed."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        report = yield
        if report.skipped and not hasattr(report, "wasxfail"):
            report.outcome, report.longrepr = "failed", f"With CI set, nothing may skip. {report.longrepr[2]}"
        return report


def pytest_generate_tests(metafunc):
    """The one hook that pytest calls in a test module, and before any test runs."""
    plugins = metafunc.config.pluginmanager
    if os.environ.get("CI") and not plugins.has_plugin("no-skips"):
        plugins.register(NoSkips(), "no-skips")


def wait_for(condition, seconds=20, message="it did not happen"):
    """What the condition returns once that is true; fails the test if it does not come true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    pytest.fail(f"{message} within {seconds} s")


class Answering(http.server.BaseHTTPRequestHandler):
    """Says 200 to everything: what the hub sees of a healthy server."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args):
        """Not a word."""


@pytest.fixture(scope="session")
def answering():
    """The address of an HTTP server in this process."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class FakeSpawner(minihub.Spawner):
    """Servers that are entries in a dict, which answer at once, unless a test wants it otherwise."""

    def __init__(self, address):
        self.address = address
        self.running = {}          # launch id -> Launch
        self.exits = {}            # launch id -> exit status
        self.launches = []
        self.answers = True        # False: nobody listens where the servers should
        self.stubborn = False      # True: servers do not end when they are asked to
        self.problem = None        # an exception that start() raises
        self.exits_at_once = None  # an exit status with which every server ends while it starts

    def start(self, server):
        if self.problem:
            raise self.problem
        self.launches.append(server)
        self.running[server.id] = server
        if self.exits_at_once is not None:
            self.end(server.id, self.exits_at_once)
        address = self.address if self.answers else f"http://127.0.0.1:{server.port}"
        return {"target": f"{address}/{server.id}", "launch": server.id}

    def poll(self, state):
        return None if state["launch"] in self.running else self.exits.get(state["launch"], 0)

    def stop(self, state, now=False):
        if now or not self.stubborn:
            self.end(state["launch"], -signal.SIGINT)
        return state

    def log_tail(self, state):
        return "Traceback\nImportError: no module named antigravity"

    def end(self, launch, status=0):
        """The process ends."""
        self.running.pop(launch, None)
        self.exits[launch] = status

    def end_all(self, status=1):
        """All processes end, as if killed from outside."""
        for launch in list(self.running):
            self.end(launch, status)


class Api:
    """A client of a hub in this process, with a token: `api("POST", "/users/ada")`."""

    def __init__(self, hub, token=None, **environ):
        self.hub, self.token = hub, token
        self.app = webtest.TestApp(hub, extra_environ={"REMOTE_ADDR": "127.0.0.1", **environ}, lint=True)

    def __call__(self, method, path, body=None, status=200, headers=(), raw=None):
        """The response to a JSON request, which must have that status."""
        headers = {**({"Authorization": f"token {self.token}"} if self.token else {}), **dict(headers)}
        content = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
        return self.app.request(f"/hub/api{path}", method=method, body=content, status=status, headers=headers)


STRONG_SCRYPT = dict(minihub.SCRYPT)


@pytest.fixture(autouse=True, scope="session")
def quick_hashes():
    """Passwords that are hashed weakly, because the tests hash so many."""
    minihub.SCRYPT["n"] = 2
    yield
    minihub.SCRYPT.update(STRONG_SCRYPT)


@pytest.fixture
def spawner(answering):
    return FakeSpawner(answering)


@pytest.fixture
def make_hub(spawner, tmp_path):
    """Makes hubs on a database of their own, whose ticker only runs when it is told to."""
    def make(**settings):
        hub = Hub(**{"database": "sqlite:///:memory:", "spawner": spawner, "tick_interval": 0, "process_variables": {},
                     "homes": str(tmp_path / "homes"), "run_dir": str(tmp_path / "run"), **settings})
        hubs.append(hub)
        return hub

    hubs = []
    yield make
    for hub in hubs:
        hub.disconnect()


@pytest.fixture
def hub(make_hub):
    """A hub with the users root (an admin), ada and bob, whose password is their name twice."""
    return people(make_hub())


def people(hub):
    """The hub with its three people."""
    with hub.connected():
        for name in ("root", "ada", "bob"):
            user = hub.create_user(name, admin=name == "root")
            user.password = hashed_password_of(name)
            user.save()
    return hub


def password_of(name):
    return f"{name} {name} secret"


@functools.cache
def hashed_password_of(name):
    return minihub.hash_password(password_of(name))


def token_for(hub, name, **columns):
    """A new API token of the user's."""
    with hub.connected():
        return hub.create_token(hub.find_user(name), **columns)[0]


def api_of(hub, name):
    return Api(hub, token_for(hub, name) if name else None)


@pytest.fixture
def root(hub):
    """The API as the admin sees it."""
    return api_of(hub, "root")


@pytest.fixture
def ada(hub):
    """The API as the student ada sees it."""
    return api_of(hub, "ada")


@pytest.fixture
def bob(hub):
    """The API as the student bob sees it."""
    return api_of(hub, "bob")


@pytest.fixture
def nobody(hub):
    """The API as nobody sees it."""
    return Api(hub)


#: A single-user server for the tests of the proxy: plain tornado, which jupyterhub-singleuser brings along. It asks
#: nobody who they are. `{port}` and the prefix come as they do for the real one.
ECHO_SERVER = '''
import asyncio, hashlib, json, os, sys
from urllib.parse import urlsplit
import tornado.web, tornado.websocket, tornado.iostream

url = urlsplit(os.environ["JUPYTERHUB_SERVICE_URL"])

class Api(tornado.web.RequestHandler):
    def get(self):
        self.write({"version": "echo", "pid": os.getpid()})

class Echo(tornado.web.RequestHandler):
    """Tells what has reached the server."""
    def prepare(self):
        self.set_header("Set-Cookie", "jupyterhub-hub-login=stolen; Path=/")
        self.add_header("Set-Cookie", "mine=1; Path=/user/")
        self.write({"method": self.request.method, "uri": self.request.uri, "version": self.request.version,
                    "headers": sorted(self.request.headers.get_all()), "body": self.request.body.decode("latin-1"),
                    "environ": dict(os.environ)})
        self.finish()

@tornado.web.stream_request_body
class Upload(tornado.web.RequestHandler):
    """Counts and hashes what it is sent."""
    def prepare(self):
        self.request.connection.set_max_body_size(1 << 40)
        self.count, self.hash = 0, hashlib.sha256()
    def data_received(self, chunk):
        self.count += len(chunk)
        self.hash.update(chunk)
    def post(self):
        self.write({"count": self.count, "sha256": self.hash.hexdigest()})
    put = post

class Download(tornado.web.RequestHandler):
    """`?size=` bytes, `?pause=` seconds between pieces, `?length=1` to say the length before."""
    async def get(self):
        size, piece = int(self.get_argument("size")), int(self.get_argument("piece", "65536"))
        if self.get_argument("length", ""):
            self.set_header("Content-Length", str(size))
        while size:
            self.write(b"x" * min(size, piece))
            size -= min(size, piece)
            await self.flush()
            await asyncio.sleep(float(self.get_argument("pause", "0")))

class Events(tornado.web.RequestHandler):
    """An event every `pause` seconds, `count` times."""
    async def get(self):
        self.set_header("Content-Type", "text/event-stream")
        for number in range(int(self.get_argument("count"))):
            self.write(f"data: {number}\\n\\n")
            await self.flush()
            await asyncio.sleep(float(self.get_argument("pause")))

class Socket(tornado.websocket.WebSocketHandler):
    def check_origin(self, origin):
        return True
    def on_message(self, message):
        self.write_message(message, isinstance(message, bytes))

async def main():
    prefix = url.path
    tornado.web.Application([(prefix + "api", Api), (prefix + "echo.*", Echo), (prefix + "upload", Upload),
        (prefix + "download", Download), (prefix + "events", Events), (prefix + "socket", Socket),
        ]).listen(url.port, "127.0.0.1")
    await asyncio.Event().wait()

asyncio.run(main())
'''


class LiveHub:
    """A gunicorn with `minihub:app` in a folder of its own."""

    def __init__(self, folder, *options, **settings):
        self.folder = folder
        self.port = minihub.free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.options, self.settings = options, settings
        self.log = folder / "hub.log"
        self.process = None

    @property
    def environ(self):
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MINIHUB_")}
        named = {f"MINIHUB_{name.upper()}": str(value) for name, value in self.settings.items()}
        return {**kept, "PYTHONPATH": str(HERE), **named}

    def start(self):
        """Start it, and wait until it answers."""
        with open(self.log, "ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gunicorn", "minihub:app", "--bind", f"127.0.0.1:{self.port}", "--no-control-socket",
                 *self.options],
                cwd=self.folder, env=self.environ, stdout=output, stderr=output, start_new_session=True)
        wait_for(self.is_up, message=f"gunicorn did not start: {self.log.read_text()}")
        return self

    def is_up(self):
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.request("GET", "/hub/health").status == 200

    def request(self, method, path, body=None, headers=(), timeout=30):
        """The response, read to its end; `.body` is what it held."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        with contextlib.closing(connection):
            connection.request(method, path, body, dict(headers))
            response = connection.getresponse()
            response.body = response.read()
            return response

    def api(self, method, path, token, body=None):
        """The status and the JSON (or None) of an API request."""
        content = None if body is None else json.dumps(body)
        response = self.request(method, f"/hub/api{path}", content, {"Authorization": f"token {token}"})
        is_json = response.body and "json" in (response.getheader("Content-Type") or "")
        return response.status, json.loads(response.body) if is_json else None

    def command(self, *words):
        """What `python -m minihub ...` prints."""
        return subprocess.run([sys.executable, "-m", "minihub", *words], cwd=self.folder, env=self.environ, check=True,
                              capture_output=True, text=True).stdout.strip()

    def start_server(self, name, token, path="server"):
        """Start a user's server and wait until it is ready."""
        assert self.api("POST", f"/users/{name}/{path}", token)[0] in (201, 202)
        return wait_for(lambda: self.api("GET", f"/users/{name}", token)[1]["servers"].get(path.partition("/")[2], {})
                        .get("ready"), 60, "the server is not ready")

    def facts(self, key):
        """What the hub's database remembers under that key."""
        with contextlib.closing(sqlite3.connect(self.folder / "minihub.sqlite")) as database:
            return json.loads(database.execute("SELECT value FROM settings WHERE key = ?", [key]).fetchone()[0])

    def rows(self, query):
        """The first column of a query's answer out of the hub's database."""
        with contextlib.closing(sqlite3.connect(self.folder / "minihub.sqlite")) as database:
            return [row[0] for row in database.execute(query)]

    def workers(self):
        """The process ids of gunicorn's workers."""
        found = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True).stdout
        return [int(pid) for pid in found.split()]

    def stop(self, how=signal.SIGTERM):
        """End gunicorn. Servers go on."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait(30)

    def stop_all(self):
        """End gunicorn and whatever it has started."""
        self.stop()
        for supervisor in (self.folder / "run").rglob("*.pid"):
            with contextlib.suppress(OSError, ValueError):
                os.killpg(int(supervisor.read_text().split()[0]), signal.SIGKILL)


@pytest.fixture
def live(tmp_path):
    """Starts gunicorns, one after the other in the same folder, with `live("-w", "2", admins="root")`."""
    def start(*options, **settings):
        hub = LiveHub(tmp_path, *options, **settings)
        hubs.append(hub)
        return hub.start()

    hubs = []
    yield start
    for hub in hubs:
        hub.stop_all()


@pytest.fixture
def echo(live, tmp_path):
    """A gunicorn with one sync worker, and in it ada's server, which is the echo server; `echo.token` is ada's."""
    return start_echo(live, tmp_path)


def start_echo(live, folder, *options, **settings):
    """A gunicorn whose servers are echo servers, with ada's running."""
    pytest.importorskip("tornado", reason="pip install '.[classroom]'")
    (folder / "echo.py").write_text(ECHO_SERVER)
    hub = live(*options, cmd=f"{sys.executable} {folder / 'echo.py'}", admins="root", **settings)
    hub.command("link", "ada")
    hub.token = hub.command("token", "ada")
    hub.start_server("ada", hub.token)
    return hub


CHP = shutil.which("configurable-http-proxy")
needs_chp = pytest.mark.skipif(not CHP, reason="npm install -g configurable-http-proxy")


def is_open(port):
    """Whether somebody listens there."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True


########################################################################################################
# 2. Settings
########################################################################################################


WRONG_SETTINGS = {
    "base_url": ("lab", "must start with a slash, not 'lab'"),
    "public_url": ("example.org", "must look like https://host, not 'example.org'"),
    "hub_url": ("localhost:8000", "must look like https://host, not 'localhost:8000'"),
    "authenticator": ("oauth", "must be password, dummy or package.module:Class, not 'oauth'"),
    "spawner": ("no_such_module:Spawner", "cannot be imported (No module named 'no_such_module'), not"
                " 'no_such_module:Spawner'"),
    "proxy": ("json:JSONDecoder", "must be a kind of Proxy, not <class 'json.decoder.JSONDecoder'>"),
    "cmd": (" ", "must name a command, not ' '"),
    "admins": (["a/b"], "must hold names that users can have, not 'a/b'"),
    "trusted_proxies": (["here"], "must be an IP address or network, not 'here'"),
    "env_keep": ("PATH", "must be a list of strings, not 'PATH'"),
    "start_timeout": (-1, "must be a number, 0 or more, not -1"),
    "named_servers": ("yes", "must be true or false, not 'yes'"),
    "homes": (5, "must be a string, not 5"),
    "database": ("nonsense", "cannot be used (Unrecognized or unsupported scheme: \"\".), not 'nonsense'"),
}


@pytest.mark.parametrize(("setting", "value", "problem"), [(name, *row) for name, row in WRONG_SETTINGS.items()])
def test_a_wrong_setting_stops_the_hub_with_one_sentence_that_names_it(make_hub, setting, value, problem):
    with pytest.raises(minihub.SettingError) as raised:
        make_hub(**{setting: value})
    assert str(raised.value) == f"Setting {setting} (MINIHUB_{setting.upper()}) {problem}"
    assert raised.value.setting == setting


@pytest.mark.parametrize(("setting", "value"), [
    ("start_timeout", float("nan")), ("start_timeout", float("inf")), ("start_timeout", True), ("start_timeout", "60"),
    ("named_server_limit", None), ("public_url", "https://"), ("public_url", "ftp://example.org"),
    ("hub_url", "http://127.0.0.1:99999"), ("hub_url", "http://[::1"), ("cmd", "jupyterhub-singleuser 'unfinished"),
    ("admins", "root"), ("admins", [1]), ("authenticator", "dummy"), ("authenticator", "json:nothing_there"),
    ("spawner", object()), ("database", "postgresql://me:secret@127.0.0.1:1/hub"), ("database", "sqlite:////no/where/hub")])
def test_a_setting_that_cannot_be_right_is_refused(make_hub, setting, value):
    with pytest.raises(minihub.SettingError) as raised:
        make_hub(**{setting: value})
    assert raised.value.setting in (setting, "password")
    assert "\n" not in str(raised.value) and "secret" not in str(raised.value)


def test_a_file_that_is_no_database_is_refused(make_hub, tmp_path):
    (tmp_path / "hub.sqlite").write_text("Once upon a time" * 100)
    with pytest.raises(minihub.SettingError, match=r"Setting database .* \(file is not a database\), not 'sqlite:///.*'"):
        make_hub(database=f"sqlite:///{tmp_path}/hub.sqlite")


@pytest.mark.parametrize(("setting", "value", "kept"), [
    ("base_url", "/", "/"), ("base_url", "/lab", "/lab/"), ("base_url", "/lab/", "/lab/"),
    ("public_url", "https://hub.example.org/", "https://hub.example.org"), ("hub_url", "http://[::1]:8000", "http://[::1]:8000"),
    ("admins", ["root"], ("root",)), ("trusted_proxies", ["10.0.0.0/8"], ("10.0.0.0/8",)), ("start_timeout", 0, 0),
    ("cmd", "jupyter-labhub --port {port}", "jupyter-labhub --port {port}")])
def test_a_setting_that_is_right_is_kept(setting, value, kept):
    assert getattr(Settings(**{setting: value}), setting) == kept


def test_a_keyword_that_is_no_setting_is_refused():
    with pytest.raises(TypeError, match="nonsense"):
        Hub(nonsense=1)


@pytest.mark.parametrize(("name", "text", "value"), [
    ("admins", " root, ada ,,", ("root", "ada")), ("admins", "", ()), ("named_servers", "off", False),
    ("named_servers", "Yes", True), ("named_server_limit", "3", 3), ("start_timeout", "1.5", 1.5),
    ("cmd", "'my lab' {port}", "'my lab' {port}"), ("authenticator", "dummy_auth:Open", "dummy_auth:Open")])
def test_a_variable_sets_what_it_names(name, text, value):
    assert getattr(Settings.from_environ({f"MINIHUB_{name.upper()}": text}), name) == value


@pytest.mark.parametrize(("name", "text", "problem"), [
    ("named_servers", "maybe", "must be true or false, not 'maybe'"), ("named_server_limit", "1.5", "must be a number, not '1.5'"),
    ("start_timeout", "soon", "must be a number, not 'soon'"), ("start_timeout", "nan", "must be a number, 0 or more, not nan"),
    ("trusted_proxies", "10.0.0.0/8, here", "must be an IP address or network, not 'here'")])
def test_a_variable_with_a_wrong_value_is_refused(name, text, problem):
    with pytest.raises(minihub.SettingError) as raised:
        Settings.from_environ({f"MINIHUB_{name.upper()}": text})
    assert str(raised.value) == f"Setting {name} (MINIHUB_{name.upper()}) {problem}"


@pytest.mark.parametrize("name", ["MINIHUB_ADMIN", "MINIHUB_", "MINIHUB_PROCESS_VARIABLES"])
def test_an_unknown_variable_is_warned_of(name):
    with pytest.warns(UserWarning, match=f"{name} is not a setting of minihub {re.escape(minihub.__version__)}"):
        assert Settings.from_environ({name: "x", "ADMINS": "root"}) == Settings()


def test_a_server_inherits_only_what_is_allowed():
    variables = {"PATH": "/bin", "LC_ALL": "C.UTF-8", "TZ": "UTC", "CLASS": "7b", "MINIHUB_PASSWORD": "x", "AWS_SECRET": "x"}
    inherited = Settings(process_variables=variables, env_keep=["CLASS"]).inherited_variables()
    assert inherited == {"PATH": f"{Path(sys.executable).parent}:/bin", "LC_ALL": "C.UTF-8", "TZ": "UTC", "CLASS": "7b"}


@pytest.mark.parametrize("services, sentence", [
    ("x", "must be a list"), (["x"], "each with a name"), ([{"name": "a", "colour": 1}], "no other keys"),
    ([{"name": "a/b"}], "letters, digits"), ([{"name": "a", "api_token": "short"}], "at least 8 characters"),
    ([{"name": "a", "admin": "yes"}], "a bool as admin of a"), ([{"name": "a"}, {"name": "a"}], "different names"),
    ([{"name": "a", "url": "nowhere"}], "http://host:port"), ([{"name": "a", "command": 7}], "words as command"),
    ([{"name": "a", "environment": {"A": 1}}], "strings in command and environment")])
def test_a_wrong_service_stops_the_hub_with_a_sentence(services, sentence):
    with pytest.raises(minihub.SettingError, match=sentence):
        Settings(services=services)


########################################################################################################
# 3. Errors, time, secrets, names
########################################################################################################


class Like:
    """Equal to every string of a pattern."""

    def __init__(self, pattern):
        self.pattern = pattern

    def __eq__(self, other):
        return isinstance(other, str) and bool(re.fullmatch(self.pattern, other, re.DOTALL))

    def __repr__(self):
        return f"Like({self.pattern!r})"


#: A moment and a secret as the API writes them.
MOMENT = Like(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{6})?Z")
SECRET = Like(r"[0-9a-f]{32}")


def error(status, message):
    """The body of every error of the API's."""
    return {"status": status, "message": message}


@pytest.fixture
def pass_time(monkeypatch):
    """`pass_time(60)`: it is a minute later, as far as the hub knows."""
    def later(seconds):
        skipped.append(seconds)

    clock, stamp, skipped = minihub.now, minihub.itsdangerous.TimestampSigner.get_timestamp, []
    monkeypatch.setattr(minihub, "now", lambda: clock() + timedelta(seconds=sum(skipped)))
    monkeypatch.setattr(minihub.itsdangerous.TimestampSigner, "get_timestamp", lambda signer: stamp(signer) + int(sum(skipped)))
    return later


@pytest.mark.parametrize(("text", "written"), [
    ("2026-11-23T03:23:16.453194Z", "2026-11-23T03:23:16.453194Z"), ("2026-11-23T03:23:16Z", "2026-11-23T03:23:16Z"),
    ("2026-11-23T03:23:16", "2026-11-23T03:23:16Z"), ("2026-11-23T03:23:16+05:30", "2026-11-22T21:53:16Z"),
    ("2026-11-23T03:23:16.5Z", "2026-11-23T03:23:16.500000Z"), (" 2026-11-23 03:23 ", "2026-11-23T03:23:00Z"),
    ("2026-11-23T03:23:16.123456789Z", "2026-11-23T03:23:16.123456Z"), ("2026-11-23", "2026-11-23T00:00:00Z")])
def test_a_time_is_read_in_any_form_and_written_in_one(text, written):
    assert minihub.isoformat(minihub.parse_time(text)) == written


@pytest.mark.parametrize("text", [
    "", "yesterday", "2026-13-01", "2026-11-23T25:00:00Z", "0001-01-01T00:00:00Z", "0001-01-01T00:00:00+23:59",
    "9999-12-31T23:59:59-23:59", "1969-12-31T23:59:59Z", "2026-11-23\0", "١٩٧٠", 1700000000, None, True, [], {}, "9" * 10000])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(minihub.BadRequest, match="^Not a valid timestamp: ") as raised:
        minihub.parse_time(text)
    assert len(raised.value.message) < 300


def test_no_time_is_written_as_none():
    assert minihub.isoformat(None) is None


def test_tokens_are_128_random_bits():
    first, second = minihub.new_token(), minihub.new_token()
    assert first == SECRET and second == SECRET and first != second


@pytest.mark.parametrize("password", ["correct horse", "пароль", "x" * 1000, "nul\0nul", ""])
def test_a_password_is_known_by_its_hash(password):
    hashed = minihub.hash_password(password)
    assert hashed == Like(r"scrypt\$[0-9a-f]{32}\$[0-9a-f]{128}") and minihub.check_password(password, hashed)
    assert not minihub.check_password(password + "!", hashed)


def test_two_hashes_of_one_password_differ():
    assert minihub.hash_password("same") != minihub.hash_password("same")


def test_without_a_password_none_is_right():
    assert not minihub.check_password("", None)
    assert not minihub.check_password("\udcff", None)


@pytest.mark.parametrize(("typed", "name"), [
    ("Ada", "ada"), ("ＡＤＡ", "ada"), ("ADA.Lovelace@example.org", "ada.lovelace@example.org"), ("ÅSA", "åsa"),
    ("A\N{COMBINING RING ABOVE}sa", "åsa"), ("İnci", "i̇nci"), ("/", "/")])
def test_all_ways_to_type_a_name_are_one(typed, name):
    assert minihub.normalize_name(typed) == name == minihub.normalize_name(name)


@pytest.mark.parametrize("name", ["ada", "a b", "a@b.example", "åsa", "李", "x" * 255, "-", "...", "%2f", "a\\b", "<b>", "a;b", "\N{GRINNING FACE}"])
def test_a_name_can_be_used(name):
    assert minihub.is_valid_name(name)


@pytest.mark.parametrize("name", [
    "", " ", "ada ", " ada", "a/b", "/", ".", "..", "a\0b", "a\nb", "\x7f", "a\tb", "x" * 256, "\u202eada", "\u200b", "\ud800"])
def test_a_name_cannot_be_used(name):
    assert not minihub.is_valid_name(name)


@pytest.mark.parametrize("typed", ["．．", "ａ／ｂ", "․"])
def test_a_name_that_only_looks_harmless_cannot_be_used(typed):
    assert minihub.is_valid_name(typed) and not minihub.is_valid_name(minihub.normalize_name(typed))


@pytest.mark.parametrize("name", ["", "gpu", "a-b_c.d~e", "9", "x" * 63, "My.Project"])
def test_a_server_can_bear_the_name(name):
    assert minihub.check_server_name(name) == name


@pytest.mark.parametrize("name", ["a b", "a/b", ".", "..", "-a", "a-", "x" * 64, "é", "a\0", "a\n", "a%20b", "api", "LAB", "oauth_callback"])
def test_a_server_cannot_bear_the_name(name):
    with pytest.raises(minihub.BadRequest, match=f"^Invalid server_name: {re.escape(repr(name))}"):
        minihub.check_server_name(name)


@pytest.mark.parametrize(("name", "quoted"), [
    ("ada", "ada"), ("a@b~c", "a@b~c"), ("a b", "a%20b"), ("a/b", "a%2Fb"), ("é?#%", "%C3%A9%3F%23%25"), (";a&b", "%3Ba%26b")])
def test_a_name_is_one_segment_of_a_path(name, quoted):
    assert minihub.quote_name(name) == quoted


ODD_NAMES = [".hidden", "%2Ehidden", "a b", "a%20b", "-rf", "x" * 255, "x" * 254 + "y", "\N{GRINNING FACE}" * 255, "a\\b", "c:", "*", "~root"]


def test_every_name_has_a_folder_of_its_own(tmp_path):
    folders = [minihub.folder_name(name) for name in ODD_NAMES]
    for folder in folders:
        (tmp_path / folder).mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(folders)
    assert not [folder for folder in folders if folder.startswith(".")]


########################################################################################################
# 4. Models
########################################################################################################


def test_the_database_is_for_the_hubs_user_only(make_hub, tmp_path):
    hub = make_hub(database=f"sqlite:///{tmp_path}/hub.sqlite")
    with hub.connected():
        hub.create_user("ada")
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("hub.sqlite*")}
    assert modes == dict.fromkeys(("hub.sqlite", "hub.sqlite-wal", "hub.sqlite-shm"), 0o600)


def test_sqlite_is_set_up_for_several_processes(hub):
    with hub.connected():
        pragmas = [hub.database.execute_sql(f"PRAGMA {name}").fetchone()[0]
                   for name in ("journal_mode", "foreign_keys", "busy_timeout")]
    assert pragmas == ["wal", 1, 15000]


def test_a_database_of_a_newer_minihub_is_refused(make_hub, tmp_path):
    url = f"sqlite:///{tmp_path}/hub.sqlite"
    hub = make_hub(database=url)
    with hub.connected():
        minihub.store("schema_version", minihub.SCHEMA_VERSION + 1)
    with pytest.raises(minihub.SettingError, match="written by a newer minihub"):
        make_hub(database=url)


def test_a_database_of_the_same_minihub_is_opened_again(make_hub, tmp_path):
    url = f"sqlite:///{tmp_path}/hub.sqlite"
    people(make_hub(database=url))
    again = make_hub(database=url)
    with again.connected():
        assert [user.name for user in again.list_users()[0]] == ["root", "ada", "bob"]


@pytest.mark.parametrize(("model", "row"), [
    (minihub.User, {"name": "ada", "folder": "other"}), (minihub.User, {"name": "other", "folder": "ada"}),
    (minihub.Server, {"name": "", "user": 1}), (minihub.Server, {"name": "x", "user": 1, "status": "asleep"}),
    (minihub.Server, {"name": "x", "user": 99}), (minihub.Token, {"hashed": "x", "user": 99}),
    (minihub.Membership, {"user": 1, "group": 99})])
def test_the_database_refuses_a_row_that_cannot_be(hub, model, row):
    with hub.connected(), pytest.raises(minihub.pw.IntegrityError):
        model.create(**row)


def test_a_user_takes_what_is_theirs_along(hub):
    with hub.connected():
        ada = hub.find_user("ada")
        hub.create_token(ada)
        minihub.Membership.create(user=ada, group=minihub.Group.create(name="class"))
        hub.delete_user(ada, 0)
        assert [model.select().count() for model in (minihub.Token, minihub.Membership, minihub.Group)] == [0, 0, 1]


def test_a_moment_comes_back_as_it_went_in(hub):
    moment = minihub.parse_time("2026-11-23T03:23:16.453194+05:30")
    with hub.connected():
        minihub.User.update(last_activity=moment).where(minihub.User.name == "ada").execute()
        found = hub.find_user("ada").last_activity
    assert found == moment and found.utcoffset() == timedelta(0)


@pytest.mark.parametrize("value", [None, {}, [], 0, "", "\0", {"a": [1.5, None, {"é": "\N{GRINNING FACE}"}]}])
def test_json_comes_back_as_it_went_in(hub, value):
    with hub.connected():
        minihub.Server.update(user_options=value).execute()
        assert hub.find_server(hub.find_user("ada"), "").user_options == value


def test_a_fact_is_remembered_until_another_is_stored(hub):
    with hub.connected():
        facts = [minihub.remember("fact", 1), minihub.remember("fact", 2)]
        minihub.store("fact", 3)
        assert [*facts, minihub.remember("fact", 4)] == [1, 1, 3]


########################################################################################################
# 5. Authenticators
########################################################################################################


@pytest.mark.parametrize(("credentials", "name"), [
    ({"username": "ada", "password": password_of("ada")}, "ada"), ({"username": "ADA", "password": password_of("ada")}, "ada"),
    ({"username": "ada", "password": password_of("bob")}, None), ({"username": "ada", "password": ""}, None),
    ({"username": "ada"}, None), ({"password": password_of("ada")}, None), ({}, None), ({"username": "eve", "password": ""}, None),
    ({"username": "new", "password": ""}, None), ({"username": "../ada", "password": password_of("ada")}, None),
    ({"username": ["ada"], "password": {}}, None), ({"username": "ada\0", "password": "\udcff"}, None)])
def test_a_password_proves_who_somebody_is(hub, credentials, name):
    with hub.connected():
        hub.create_user("new")  # who has no password yet
        assert hub.authenticator.authenticate(credentials, {}) == name


def test_a_guess_costs_16_mib():
    assert 128 * STRONG_SCRYPT["n"] * STRONG_SCRYPT["r"] * STRONG_SCRYPT["p"] == 16 * 2 ** 20


@pytest.mark.parametrize("username", ["ada", "new", "eve", "not/a/name"])
def test_a_wrong_password_takes_as_long_for_everybody(hub, monkeypatch, username):
    rounds, scrypt = [], minihub.hashlib.scrypt
    monkeypatch.setattr(minihub.hashlib, "scrypt", lambda *args, **options: rounds.append(options) or scrypt(*args, **options))
    with hub.connected():
        hub.create_user("new")
        assert hub.authenticator.authenticate({"username": username, "password": "wrong"}, {}) is None
    assert [(options["n"], options["r"], options["p"]) for options in rounds] == [tuple(minihub.SCRYPT.values())]


@pytest.mark.parametrize(("credentials", "name"), [
    ({"username": "Eve", "password": "class secret"}, "Eve"), ({"username": "Eve", "password": "class secre"}, None),
    ({"username": "Eve"}, None), ({}, None), ({"username": "Eve", "password": "\udcff"}, None)])
def test_the_dummy_lets_in_who_knows_the_one_password(make_hub, credentials, name):
    hub = make_hub(authenticator="dummy", password="class secret")
    assert hub.authenticator.authenticate(credentials, {}) == name
# 6. Spawners
########################################################################################################


@pytest.fixture
def processes(tmp_path):
    """Makes SubprocessSpawners, all of whose processes are gone afterwards: `processes("sleep 60")`."""
    def make(cmd, kind=minihub.SubprocessSpawner, **settings):
        spawner = kind()
        spawner.settings = Settings(**{"cmd": cmd, "homes": str(tmp_path / "homes"), "run_dir": str(tmp_path / "run"),
                                       "process_variables": {"PATH": os.defpath}, **settings})
        return spawner

    yield make
    for supervisor in (tmp_path / "run").glob("*/*.pid"):
        with contextlib.suppress(OSError):
            os.killpg(int(supervisor.read_text().split()[0]), signal.SIGKILL)


def launch_of(name="ada", server_name="", options=None, port=12345, **variables):
    """What a hub would tell a spawner."""
    user = minihub.User(name=name, folder=minihub.folder_name(name))
    prefix = minihub.Mount("/", "").server_prefix(name, server_name)
    return minihub.Launch(minihub.new_token(), user, server_name, options, prefix, port, variables)


def script(folder, *lines):
    """The path of a shell script."""
    path = folder / f"script-{minihub.new_token()}"
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o700)
    return str(path)


def ends_with(spawner, state):
    """The exit status of a process that is about to end."""
    return wait_for(lambda: [spawner.poll(state)] if spawner.poll(state) is not None else None)[0]


def log_of(spawner, state, line):
    """Waits until the server has written that line."""
    wait_for(lambda: line in spawner.log_tail(state).splitlines(), message=f"no {line}")


def is_in_proc(pid):
    """Whether the kernel knows such a process, be it a zombie."""
    return Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("server_name, place, client", [
    ("", "/user/a@b%20c/", "jupyterhub-user-a%40b%20c"), ("n1", "/user/a@b%20c/n1/", "jupyterhub-user-a%40b%20c-n1")])
def test_a_server_gets_the_variables_of_both_generations(hub, root, spawner, processes, server_name, place, client):
    root("POST", "/users/a@b c", status=201)
    root("POST", f"/users/a@b c/servers/{server_name}", status=201)
    launch = spawner.launches[0]
    variables = processes("server").environment(launch)
    token = variables["JUPYTERHUB_API_TOKEN"]
    access = [f"access:servers!server=a@b c/{server_name}", "access:servers!user=a@b c"]
    assert json.loads(variables.pop("JUPYTERHUB_OAUTH_ACCESS_SCOPES")) == access
    assert json.loads(variables.pop("JUPYTERHUB_OAUTH_SCOPES")) == access
    home = str(Path(processes("server").settings.homes) / "a@b c")
    assert re.fullmatch("[0-9a-f]{32}", token)
    assert variables == {
        "JUPYTERHUB_API_TOKEN": token, "JPY_API_TOKEN": token, "JUPYTERHUB_CLIENT_ID": client, "JUPYTERHUB_HOST": "",
        "JUPYTERHUB_OAUTH_CALLBACK_URL": f"{place}oauth_callback", "JUPYTERHUB_USER": "a@b c",
        "JUPYTERHUB_SERVER_NAME": server_name, "JUPYTERHUB_API_URL": "http://127.0.0.1:80/hub/api",
        "JUPYTERHUB_ACTIVITY_URL": "http://127.0.0.1:80/hub/api/users/a@b%20c/activity", "JUPYTERHUB_BASE_URL": "/",
        "JUPYTERHUB_SERVICE_PREFIX": place, "JUPYTERHUB_ADMIN_ACCESS": "1",
        "JUPYTERHUB_SERVICE_URL": f"http://127.0.0.1:{launch.port}{place}",
        "JUPYTERHUB_OAUTH_CLIENT_ALLOWED_SCOPES": "[]", "JUPYTERHUB_PUBLIC_URL": "", "JUPYTERHUB_PUBLIC_HUB_URL": "",
        "JUPYTERHUB_COOKIE_HOST_PREFIX_ENABLED": "0", "HOME": home, "USER": "a@b c", "LOGNAME": "a@b c",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.defpath])}


def test_a_server_does_not_learn_of_admin_access_where_admins_have_none(make_hub, spawner):
    hub = people(make_hub(admin_access=False))
    api_of(hub, "ada")("POST", "/users/ada/server", status=201)
    assert "JUPYTERHUB_ADMIN_ACCESS" not in spawner.launches[0].variables


def test_a_server_is_told_the_public_address(make_hub, spawner):
    hub = people(make_hub(public_url="https://lab.example.org"))
    api_of(hub, "ada")("POST", "/users/ada/server", status=201)
    variables = spawner.launches[0].variables
    assert variables["JUPYTERHUB_PUBLIC_URL"] == "https://lab.example.org/user/ada/"
    assert variables["JUPYTERHUB_PUBLIC_HUB_URL"] == "https://lab.example.org/hub/"


def test_a_server_inherits_only_what_is_on_the_list(processes):
    outside = {"MINIHUB_PASSWORD": "secret", "MINIHUB_SERVICES": "secret", "AWS_SECRET_ACCESS_KEY": "secret",
               "PGPASSWORD": "secret", "HOME": "/root", "LANG": "C.UTF-8", "LC_ALL": "C", "COURSE": "algebra"}
    variables = processes("server", process_variables=outside, env_keep=["COURSE"]).environment(launch_of())
    assert "secret" not in variables.values()
    assert variables.keys() == {"LANG", "LC_ALL", "COURSE", "PATH", "HOME", "USER", "LOGNAME", "JUPYTERHUB_SERVICE_URL"}


def test_the_hub_has_the_last_word_on_what_a_server_inherits(processes):
    outside = {"JUPYTERHUB_API_TOKEN": "stale", "HOME": "/root"}
    spawner = processes("server", process_variables=outside, env_keep=list(outside))
    variables = spawner.environment(launch_of(JUPYTERHUB_API_TOKEN="fresh"))
    assert (variables["JUPYTERHUB_API_TOKEN"], variables["HOME"]) == ("fresh", str(spawner.home(launch_of())))


@pytest.mark.parametrize("cmd, words", [
    ("server", ["server", "--port=12345"]),
    ("server -p {port}", ["server", "-p", "12345"]),
    ("server '{username} & co' {prefix}", ["server", "a'b; {port} & co", "/user/a%27b%3B%20%7Bport%7D/", "--port=12345"]),
    ("server --config='{\"a\": 1}'", ["server", '--config={"a": 1}', "--port=12345"])])
def test_the_command_is_split_as_a_shell_would_and_then_filled_in(processes, cmd, words):
    assert processes(cmd).command(launch_of("a'b; {port}")) == words


def test_only_jupyters_own_command_gets_jupyters_options(processes):
    settings = {"notebook_dir": "~/work", "default_url": "/tree"}
    as_root = ["--allow-root"] if os.geteuid() == 0 else []
    home = processes("other").home(launch_of())
    assert processes("/opt/bin/jupyterhub-singleuser", **settings).command(launch_of()) == [
        "/opt/bin/jupyterhub-singleuser", "--port=12345", *as_root, f"--notebook-dir={home}/work",
        "--SingleUserNotebookApp.default_url=/tree"]
    assert processes("other", **settings).command(launch_of()) == ["other", "--port=12345"]


@pytest.mark.parametrize("notebook_dir, folder", [
    ("~", "HOME"), ("~/work", "HOME/work"), ("work/{username}", "HOME/work/~root"), ("{username}", "HOME/~root"),
    ("/srv/{username}", "/srv/~root")])
def test_the_notebook_folder_is_seen_from_the_users_home(processes, notebook_dir, folder):
    spawner = processes("server", notebook_dir=notebook_dir, default_url="/tree")
    variables = spawner.environment(launch_of("~root"))
    assert variables["JUPYTERHUB_ROOT_DIR"] == folder.replace("HOME", str(spawner.home(launch_of("~root"))))
    assert variables["JUPYTERHUB_DEFAULT_URL"] == "/tree"


LEGAL_NAMES = ["ada", "a b", ".hidden", "...", "~root", "-rf", "a\\b", "$(reboot)", "%2e%2e", "ünï名", "x" * 255, "名" * 255]


@pytest.mark.parametrize("name", LEGAL_NAMES, ids=range(len(LEGAL_NAMES)))
def test_a_home_is_private_and_safe_for_every_legal_name(processes, tmp_path, name):
    assert minihub.is_valid_name(name)
    spawner, launch = processes(script(tmp_path, r'printf "%s\n" "$HOME" "$(pwd)" "$USER"')), launch_of(name)
    state = spawner.start(launch)
    assert ends_with(spawner, state) == 0
    home = spawner.home(launch)
    assert spawner.log_tail(state).splitlines() == [str(home), str(home), name]
    assert home.resolve().parent == tmp_path / "homes" and not home.name.startswith(".")
    assert home.stat().st_mode & 0o777 == 0o700


def test_two_names_never_share_a_home(processes):
    names = [*LEGAL_NAMES, "x" * 254, "x" * 254 + "y", "%2ehidden", "a%20b", "a+b", "%25"]
    assert len({processes("server").home(launch_of(name)) for name in names}) == len(names)


def test_what_a_server_says_is_private_and_its_secrets_are_on_no_command_line(processes):
    spawner = processes("sleep 60 {port}")
    state = spawner.start(launch_of(JUPYTERHUB_API_TOKEN="5ec4e7"))
    log_file = Path(state["run"].rpartition("@")[0] + ".log")
    assert log_file.stat().st_mode & 0o777 == 0o600 and log_file.parent.stat().st_mode & 0o777 == 0o700
    assert "5ec4e7" not in minihub.command_line(state["pid"])
    assert "sleep" in minihub.command_line(state["pid"])


def test_a_new_start_keeps_the_log_of_the_one_before(processes, tmp_path):
    spawner = processes(script(tmp_path, "echo $$"))
    first = spawner.start(launch_of())
    ends_with(spawner, first)
    said = spawner.log_tail(first)
    second = spawner.start(launch_of())
    ends_with(spawner, second)
    files = {file.name: file.read_text() for file in Path(second["run"]).parent.glob("*.log*")}
    assert files == {"server.log": spawner.log_tail(second) + "\n", "server.log.old": said + "\n"}
    assert not list(Path(first["run"]).parent.glob(Path(first["run"]).name + "*"))


def test_the_tail_of_a_log_is_short_and_text_whatever_was_written(processes, tmp_path):
    spawner = processes(script(tmp_path, "seq 100000", r"printf '\377\n'"))
    state = spawner.start(launch_of())
    ends_with(spawner, state)
    assert spawner.log_tail(state).splitlines() == [*map(str, range(99972, 100001)), "\ufffd"]


def test_a_log_that_is_gone_is_no_error(processes):
    assert processes("server").log_tail({"run": "/nowhere/server@1"}) == "(its log cannot be read: No such file or directory)"


def test_a_server_has_a_session_of_its_own(processes):
    spawner = processes("sleep 60 {port}")
    pid = spawner.start(launch_of())["pid"]
    assert os.getsid(pid) == os.getpgid(pid) == pid != os.getsid(0)


@pytest.mark.parametrize("line, status", [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", -15), ("kill -KILL $$", -9),
                                          ("no-such-command", 127)])
def test_the_exit_status_is_known_to_every_worker(processes, tmp_path, line, status):
    cmd = script(tmp_path, line)
    state = processes(cmd).start(launch_of())
    assert ends_with(processes(cmd), json.loads(json.dumps(state))) == status


def test_what_a_server_has_started_ends_with_it_and_nothing_stays_a_zombie(processes, tmp_path):
    spawner = processes(script(tmp_path, "sleep 60 &", "echo $!", "exit 3"))
    state = spawner.start(launch_of())
    assert ends_with(spawner, state) == 3
    child = int(spawner.log_tail(state))
    wait_for(lambda: not is_in_proc(state["pid"]), message="a zombie stays")
    wait_for(lambda: minihub.process_identity(child) is None, message="its child lives on")


#: Says which signals it gets, and heeds them or not.
SIGNALLED = '''
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.signal(2, signal.SIG_IGN);"
                          "signal.signal(15, signal.SIG_IGN); print('ready', flush=True); signal.pause()"])
def heard(number, frame):
    print(signal.Signals(number).name, flush=True)
    if sys.argv[1] == "polite":
        os._exit(0)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, heard)
while True:
    time.sleep(60)
'''


@pytest.mark.parametrize("manners, signals, status", [("polite", ["SIGINT"], 0), ("stubborn", ["SIGINT", "SIGTERM"], -9)])
def test_a_server_is_asked_and_asked_again_and_then_killed_with_all_it_has_started(processes, tmp_path, manners, signals,
                                                                                   status):
    (tmp_path / "server.py").write_text(SIGNALLED)
    spawner = processes(f"{sys.executable} {tmp_path / 'server.py'} {manners}")
    spawner.ladder = ((0, signal.SIGINT), (0.3, signal.SIGTERM), (0.6, signal.SIGKILL))
    state = spawner.start(launch_of())
    log_of(spawner, state, "ready")

    def is_stopped():
        nonlocal state
        if spawner.poll(state) is None:
            state = json.loads(json.dumps(spawner.stop(state)))
        return spawner.poll(state) is not None

    wait_for(is_stopped)
    assert spawner.log_tail(state).splitlines() == ["ready", *signals]
    assert spawner.poll(state) == status
    wait_for(lambda: not has_group(state["pid"]), message="something it started lives on")


def has_group(pid):
    """Whether any process is left in that process group."""
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_with_now_a_server_is_killed_at_once(processes):
    spawner = processes("sleep 60 {port}")
    state = spawner.start(launch_of())
    spawner.stop(state, now=True)
    assert ends_with(spawner, state) == -9


@pytest.mark.parametrize("identity", ["another boot:12345", None])
def test_a_process_id_that_is_somebody_elses_by_now_is_never_signalled(processes, identity):
    spawner = processes("sleep 60 {port}")
    stranger = spawner.start(launch_of())
    stale = {**stranger, "identity": identity, "run": "/nowhere/server@1"}
    assert spawner.poll(stale) == -9
    spawner.stop(stale, now=True)
    spawner.stop(stale)
    assert spawner.poll(stranger) is None


def test_a_process_is_told_from_others_of_its_number_by_boot_and_start_time():
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with subprocess.Popen(["sleep", "60"]) as process:
        identity = minihub.process_identity(process.pid)
        assert re.fullmatch(rf"{boot}:\d+", identity) and identity != minihub.process_identity(os.getpid())
        process.kill()
        wait_for(lambda: minihub.process_identity(process.pid) is None, message="a zombie counts as alive")


def test_where_there_is_no_proc_ps_tells_the_same():
    with subprocess.Popen(["sleep", "60"]) as process:
        assert minihub._identity_from_ps(process.pid)
        assert minihub._ask_ps(process.pid, "command=").strip() == "sleep 60"
        process.kill()
    assert minihub._identity_from_ps(process.pid) is None


def test_a_start_that_was_interrupted_is_found_again(processes):
    spawner, launch = processes("sleep 60 {port}"), launch_of()
    assert spawner.find(launch) is None
    state = spawner.start(launch)
    assert wait_for(lambda: spawner.find(launch)) == state
    assert spawner.find(launch_of()) is None


def test_an_interrupted_start_that_has_ended_since_is_found_ended(processes, tmp_path):
    spawner, launch = processes(script(tmp_path, "exit 5")), launch_of()
    ends_with(spawner, spawner.start(launch))
    assert spawner.poll(spawner.find(launch)) == 5


def test_an_interrupted_start_is_not_taken_for_the_stranger_who_has_its_process_id_by_now(processes):
    spawner, launch = processes("sleep 60 {port}"), launch_of()
    stranger = spawner.start(launch_of("bob"))
    spawner._run_file(launch).parent.mkdir()
    Path(f"{spawner._run_file(launch)}.pid").write_text(f"{stranger['pid']} http://127.0.0.1:1\n")
    found = spawner.find(launch)
    assert spawner.poll(found) == -9
    spawner.stop(found, now=True)
    assert spawner.poll(stranger) is None


def test_a_start_fails_where_no_folder_can_be_made(processes, tmp_path):
    (tmp_path / "homes").write_text("a file")
    with pytest.raises(OSError):
        processes("sleep 60 {port}").start(launch_of())


def threaded(hub):
    """The hub as a WSGI host with many threads runs it, where a start may be waited for."""
    return lambda environ, start_response: hub({**environ, "wsgi.multithread": True}, start_response)


class ChoosySpawner(minihub.SubprocessSpawner):
    """What teachers write: a server that depends on what the user asked for."""

    def command(self, server):
        return ["/bin/sh", "-c", "echo $COURSE; pwd; exit 1", server.user_options["kernel"]]

    def environment(self, server):
        return {**super().environment(server), "COURSE": f"{server.user_options['kernel']} for {server.user.name}{server.name}"}


def test_command_and_environment_see_what_the_user_asked_for(make_hub):
    hub = people(make_hub(spawner=ChoosySpawner))
    ada = Api(threaded(hub), token_for(hub, "ada"))
    answer = ada("POST", "/users/ada/servers/n1", {"kernel": "R"}, status=500)
    assert "R for adan1\n" in answer.json["message"]


def test_a_server_that_ends_early_fails_its_start_at_once_with_its_last_words(make_hub, tmp_path):
    cmd = script(tmp_path, "echo ImportError: no antigravity >&2", "exit 7")
    hub = people(make_hub(spawner="subprocess", cmd=cmd, start_timeout=3600))
    ada = Api(threaded(hub), token_for(hub, "ada"))
    words = "The server ended while it started [status=7]. Its last words:\nImportError: no antigravity"
    assert words in ada("POST", "/users/ada/server", status=500).json["message"]
    events = ada("GET", "/users/ada/server/progress").text
    assert json.loads(events.removeprefix("data: ")) == {"progress": 100, "failed": True, "message": f"Spawn failed: {words}"}
    assert ada("GET", "/users/ada").json["servers"] == {}


def test_a_command_that_does_not_exist_says_so(make_hub):
    hub = people(make_hub(spawner="subprocess", cmd="/no/such/server"))
    ada = Api(threaded(hub), token_for(hub, "ada"))
    assert "/no/such/server: not found" in ada("POST", "/users/ada/server", status=500).json["message"]


@pytest.mark.parametrize("words", ["OSError: [Errno 98] Address already in use", "listen EADDRINUSE: 127.0.0.1:{port}",
                                   "ERROR: the port {port} is already in use"])
def test_a_server_whose_port_was_taken_meanwhile_gets_another(make_hub, tmp_path, words):
    cmd = script(tmp_path, 'echo $1 >>ports', 'if [ -e tried ]; then', f"exec {sys.executable} -m http.server "
                 '--bind 127.0.0.1 "$1"', "fi", "touch tried", f'echo "{words}"; exit 1')
    hub = people(make_hub(spawner="subprocess", cmd=cmd + " {port}"))
    ada = Api(threaded(hub), token_for(hub, "ada"))
    ada("POST", "/users/ada/server", status=201)
    ports = (tmp_path / "homes" / "ada" / "ports").read_text().split()
    assert len(set(ports)) == 2
    with hub.connected():
        server = hub.find_server(hub.find_user("ada"), "")
        assert (server.attempts, server.target) == (2, f"http://127.0.0.1:{ports[1]}")
        hub.spawner.stop(server.state, now=True)


def test_a_server_that_finds_every_port_taken_is_given_up(make_hub, tmp_path):
    cmd = script(tmp_path, 'echo $1 >>ports', "echo Address already in use; exit 1")
    hub = people(make_hub(spawner="subprocess", cmd=cmd + " {port}"))
    ada = Api(threaded(hub), token_for(hub, "ada"))
    assert "No free port was found" in ada("POST", "/users/ada/server", status=500).json["message"]
    assert len((tmp_path / "homes" / "ada" / "ports").read_text().split()) == 3
SKIPPING = """
import pytest
from test_minihub import pytest_generate_tests

@pytest.mark.skipif(True, reason="apt-get install nothing")
def test_marked(): pass

def test_passes(): pass

def test_skips_itself(): pytest.skip("pip install nothing")

@pytest.mark.xfail(strict=True)
def test_fails_as_expected(): assert False
"""


@pytest.mark.parametrize("ci, outcome", [
    ("", "1 passed, 2 skipped, 1 xfailed"),
    ("true", "1 failed, 1 passed, 1 xfailed, 1 error"),  # the error: a mark skips before the test begins
])
def test_with_ci_set_nothing_may_skip(tmp_path, ci, outcome):
    (tmp_path / "test_skipping.py").write_text(SKIPPING)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:warnings",
                           "test_skipping.py"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "CI": ci, "PYTHONPATH": str(HERE)})
    assert outcome in done.stdout


########################################################################################################
# 7. Proxies
########################################################################################################


@pytest.fixture
def chp(live, tmp_path):
    """A gunicorn that runs a real configurable-http-proxy, `chp.front` is its port, and has ada's echo server behind it."""
    front, api = minihub.free_port(), minihub.free_port()
    hub = start_echo(live, tmp_path, proxy="chp", chp_command=f"{CHP} --ip 127.0.0.1 --port {front}",
                     chp_api_url=f"http://127.0.0.1:{api}", services='[{"name": "ops", "admin": true, "api_token": "ops-token"}]')
    hub.front, hub.chp_api = front, api
    wait_for(lambda: through(hub, "/user/ada/api") == 200, message="the proxy has no route to ada's server")
    return hub


def through(hub, path):
    """The status of a page that is asked for through the proxy, None if that does not answer."""
    connection = http.client.HTTPConnection("127.0.0.1", hub.front, timeout=5)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", path)
        return connection.getresponse().status


def proxy_process(hub):
    """The state of the proxy's process."""
    return hub.facts("proxy_process")


@needs_chp
def test_a_real_proxy_carries_the_hub_and_its_servers(chp):
    assert through(chp, "/hub/login") == 200
    routes = chp.api("GET", "/proxy", "ops-token")[1]
    assert routes["/user/ada/"]["data"]["user"] == "ada" and routes["/user/ada/"]["data"]["last_activity"]
    assert routes["/"]["data"]["hub"] is True and routes["/"]["target"] == chp.url


@needs_chp
def test_a_proxy_that_is_killed_comes_back_with_all_its_routes(chp):
    os.killpg(proxy_process(chp)["pid"], signal.SIGKILL)
    wait_for(lambda: through(chp, "/user/ada/api") is None)
    assert chp.api("GET", "/proxy", "ops-token")[0] in (200, 503)
    wait_for(lambda: through(chp, "/user/ada/api") == 200, 30)


@needs_chp
def test_routes_that_are_not_the_hubs_survive(chp):
    token = chp.facts("proxy")["auth_token"]
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", chp.chp_api, timeout=5)) as connection:
        connection.request("POST", "/api/routes/foreign", json.dumps({"target": "http://127.0.0.1:9"}),
                           {"Authorization": f"token {token}"})
        assert connection.getresponse().read() == b""
    assert chp.api("POST", "/proxy", "ops-token")[0] == 200
    assert through(chp, "/foreign") == 503 and "/foreign/" not in chp.api("GET", "/proxy", "ops-token")[1]


@needs_chp
def test_the_hub_moves_to_another_proxy(chp, tmp_path):
    front, api = minihub.free_port(), minihub.free_port()
    other = subprocess.Popen([CHP, "--ip", "127.0.0.1", "--port", str(front), "--api-ip", "127.0.0.1", "--api-port", str(api)],
                             env={**os.environ, "CONFIGPROXY_AUTH_TOKEN": "another-secret"}, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: is_open(api))
        reply = chp.api("PATCH", "/proxy", "ops-token", {"port": str(api), "auth_token": "another-secret"})
        assert reply == (200, None)
        chp.front = front
        wait_for(lambda: through(chp, "/user/ada/api") == 200)
    finally:
        other.kill()
        other.wait()
    status, body = chp.api("GET", "/proxy", "ops-token")
    assert status == 503 and "does not answer" in body["message"]


########################################################################################################
# 8. The hub's operations
########################################################################################################


def test_an_idle_server_is_stopped_and_not_deleted(make_hub, spawner):
    hub = people(make_hub(idle_timeout=600))
    ada = api_of(hub, "ada")
    ada("POST", "/users/ada/servers/gpu", status=201)
    report(ada, "gpu", minutes_ago=11)
    tick(hub)
    assert ada("GET", "/users/ada").json["servers"] == {} and not spawner.running
    ada("DELETE", "/users/ada/servers/gpu", {"remove": True}, status=204)


def test_a_busy_server_stays_and_says_when_it_would_be_stopped(make_hub):
    hub = people(make_hub(idle_timeout=600))
    ada = api_of(hub, "ada")
    ada("POST", "/users/ada/server", status=201)
    report(ada, "", minutes_ago=9)
    tick(hub)
    server = ada("GET", "/users/ada").json["servers"][""]
    idle = minihub.parse_time(server["stops_at"]) - minihub.parse_time(server["last_activity"])
    assert idle == timedelta(seconds=600)


def test_a_server_that_never_reports_activity_is_not_idle(make_hub):
    hub = people(make_hub(idle_timeout=0.001))
    ada = api_of(hub, "ada")
    ada("POST", "/users/ada/server", status=201)
    tick(hub)
    assert ada("GET", "/users/ada").json["servers"][""]["ready"]


def test_a_server_that_is_too_old_is_stopped(make_hub):
    hub = people(make_hub(max_age=0.001))
    ada = api_of(hub, "ada")
    ada("POST", "/users/ada/server", status=201)
    tick(hub)
    assert ada("GET", "/users/ada").json["servers"] == {}


def report(api, server, minutes_ago):
    moment = minihub.isoformat(minihub.now() - timedelta(minutes=minutes_ago))
    api("POST", "/users/ada/activity", {"servers": {server: {"last_activity": moment}}})


def tick(hub):
    """Everything that a ticker does, at once."""
    hub._next_poll = hub._next_check = hub._next_purge = 0
    with hub.connected():
        assert hub.tick()


#: A service with pages and people: it says who asks, by token (HubAuth) or after a sign-in (HubOAuth).
WHO_SERVICE = '''
import os
from urllib.parse import urlsplit
import tornado.httpserver, tornado.ioloop, tornado.web
from jupyterhub.services.auth import HubOAuthCallbackHandler, HubOAuthenticated

class Who(HubOAuthenticated, tornado.web.RequestHandler):
    @tornado.web.authenticated
    def get(self):
        self.write({"name": self.get_current_user()["name"], "pid": os.getpid()})

prefix = os.environ["JUPYTERHUB_SERVICE_PREFIX"]
tornado.web.Application([(prefix, Who), (prefix + "oauth_callback", HubOAuthCallbackHandler)], cookie_secret=os.urandom(32),
                        ).listen(urlsplit(os.environ["JUPYTERHUB_SERVICE_URL"]).port, "127.0.0.1")
tornado.ioloop.IOLoop.current().start()
'''


@pytest.fixture
def who(live, tmp_path):
    """A gunicorn that runs the service `who`, and knows ada; `who.token` is her token."""
    pytest.importorskip("jupyterhub", reason="pip install '.[classroom]'")
    (tmp_path / "who.py").write_text(WHO_SERVICE)
    hub = live(admins="root", services=json.dumps([
        {"name": "who", "url": f"http://127.0.0.1:{minihub.free_port()}", "command": [sys.executable, str(tmp_path / "who.py")]},
        {"name": "ops", "admin": True, "api_token": "ops-token"}]))
    hub.link, hub.token = hub.command("link", "ada"), hub.command("token", "ada")
    wait_for(lambda: hub.request("GET", "/services/who/").status == 302, message="the service does not answer")
    return hub


def who_is(hub, token):
    response = hub.request("GET", "/services/who/", headers={"Authorization": f"token {token}"})
    return json.loads(response.body)["name"] if response.status == 200 else response.status


@needs_singleuser
def test_a_service_knows_people_by_their_tokens(who):
    assert who_is(who, who.token) == "ada"
    assert who_is(who, "nonsense") in (302, 403)


@needs_singleuser
def test_a_service_knows_people_after_they_have_signed_in(who):
    with requests.Session() as browser:
        secret = {"password": "ada ada secret", "again": "ada ada secret"}
        assert browser.post(who.link, secret).url == f"{who.url}/hub/home"
        question = browser.get(f"{who.url}/services/who/")
        assert "/oauth2/authorize" in question.url and "the service who" in question.text
        answer = browser.post(question.url, {"_xsrf": re.search('name=_xsrf value="(.*?)"', question.text)[1]})
        assert answer.json()["name"] == "ada"


@needs_singleuser
def test_a_service_that_dies_is_started_again(who):
    first = service_pid(who)
    os.killpg(first, signal.SIGKILL)
    wait_for(lambda: service_pid(who) not in (0, first))
    wait_for(lambda: who_is(who, who.token) == "ada")


@needs_singleuser
def test_a_service_outlives_a_hub_that_is_killed_and_is_found_again(who):
    first = service_pid(who)
    os.killpg(who.process.pid, signal.SIGKILL)
    who.process.wait()
    who.start()
    assert service_pid(who) == first and who_is(who, who.token) == "ada"


def service_pid(hub):
    return hub.api("GET", "/services/who", "ops-token")[1]["pid"]


def test_a_service_ends_when_there_is_no_hub_any_more(tmp_path):
    beat = tmp_path / "heartbeat"
    beat.touch()
    state = minihub.start_process(tmp_path / "service@1", ["sleep", "60"], str(beat), minihub.SUPERVISE_SERVICE)
    assert minihub.poll_process(state) is None
    os.utime(beat, (0, 0))
    wait_for(lambda: minihub.poll_process(state) == -signal.SIGTERM)


@needs_singleuser
def test_the_idle_culler_stops_the_idle_and_leaves_the_busy(live, tmp_path):
    pytest.importorskip("jupyterhub_idle_culler", reason="pip install jupyterhub-idle-culler")
    command = [sys.executable, "-m", "jupyterhub_idle_culler", "--timeout=600", "--cull-every=1"]
    hub = start_echo(live, tmp_path, services=json.dumps([{"name": "culler", "admin": True, "command": command}]))
    hub.command("link", "bob")
    root = hub.command("token", "root")
    hub.start_server("bob", root)
    for name, ago in (("bob", 0), ("ada", 3600)):
        moment = minihub.isoformat(minihub.now() - timedelta(seconds=ago))
        hub.api("POST", f"/users/{name}/activity", root, {"servers": {"": {"last_activity": moment}}})
    wait_for(lambda: hub.api("GET", "/users/ada", root)[1]["servers"] == {}, 30)
    assert hub.api("GET", "/users/bob", root)[1]["servers"][""]["ready"]


def test_nbgrader_manages_the_students_of_a_course(live, monkeypatch):
    plugin_class = pytest.importorskip("nbgrader.auth.jupyterhub", reason="pip install nbgrader").JupyterHubAuthPlugin
    hub = live(admins="root")
    hub.command("link", "ada")
    for name, value in (("USER", "root"), ("API_TOKEN", hub.command("token", "root")), ("API_URL", f"{hub.url}/hub/api")):
        monkeypatch.setenv(f"JUPYTERHUB_{name}", value)
    plugin = plugin_class()
    plugin.add_student_to_course("ada", "course101")
    plugin.add_student_to_course("ada", "course101")
    assert plugin.get_student_courses("ada") == ["course101"]
    plugin.remove_student_from_course("ada", "course101")
    assert plugin.get_student_courses("ada") == [] == plugin.get_student_courses("*")


def test_a_shutdown_ends_gunicorn_and_the_servers_it_is_told_to(live, tmp_path):
    hub = start_echo(live, tmp_path, "-w", "2")
    assert hub.api("POST", "/shutdown", hub.command("token", "root"), {"servers": True})[0] == 202
    assert hub.process.wait(30) == 0
    wait_for(lambda: "stopped" in hub.rows("SELECT status FROM servers JOIN users ON user_id = users.id WHERE users.name = 'ada'"))


########################################################################################################
# 10. REST resources
########################################################################################################


GROUP = {"kind": "group", "name": "class", "users": []}


def test_groups_are_made_listed_and_deleted(root):
    assert root("POST", "/groups/class", status=201).json == GROUP
    assert root("GET", "/groups").json == [GROUP]
    root("DELETE", "/groups/class", status=204)
    root("GET", "/groups/class", status=404)


@pytest.mark.parametrize("body, status", [
    (None, 201), ({}, 201), ({"users": ["ada", "Bob"]}, 201), ({"name": "ignored"}, 201),
    ([], 400), ({"users": ["nobody"]}, 400), ({"users": "ada"}, 400), ({"users": [1]}, 400), ({"color": "red"}, 400)])
def test_making_a_group_takes_or_refuses_bodies(root, body, status):
    root("POST", "/groups/class", body, status=status)
    root("GET", "/groups/class", status=200 if status == 201 else 404)


def test_a_group_is_made_once(root):
    root("POST", "/groups/class", status=201)
    assert root("POST", "/groups/class", status=409).json == {"status": 409, "message": "Group class already exists"}


def test_several_groups_are_made_at_once(root):
    made = root("POST", "/groups", {"groups": ["a", "b"], "users": ["ada"]}, status=201).json
    assert made == [{"kind": "group", "name": name, "users": ["ada"]} for name in "ab"]


@pytest.mark.parametrize("body, status", [
    (None, 400), ({}, 400), ({"groups": []}, 400), ({"groups": "ab"}, 400), ({"groups": ["new", "old"]}, 409),
    ({"groups": ["new", "a/b"]}, 400), ({"groups": ["new"], "users": ["nobody"]}, 400), ({"groups": ["new"], "x": 1}, 400)])
def test_several_groups_are_made_all_or_none(root, body, status):
    root("POST", "/groups/old", status=201)
    root("POST", "/groups", body, status=status)
    assert [group["name"] for group in root("GET", "/groups").json] == ["old"]


def test_members_come_and_go(root, ada):
    root("POST", "/groups/class", status=201)
    assert root("POST", "/groups/class/users", {"users": ["ADA", "bob", "ada"]}).json["users"] == ["ada", "bob"]
    assert ada("GET", "/user").json["groups"] == ["class"]
    assert root("DELETE", "/groups/class/users", {"users": ["bob", "root"]}).json["users"] == ["ada"]


@pytest.mark.parametrize("method", ["POST", "DELETE"])
@pytest.mark.parametrize("body, message", [
    (None, "Invalid JSON data: None"), ({}, "Must specify users to "), ({"users": ["bob", "nobody"]}, "No such user: nobody"),
    ({"users": "ada"}, "group.users must be <class 'list'>")])
def test_members_change_all_or_none(root, method, body, message):
    root("POST", "/groups/class", {"users": ["ada"]}, status=201)
    assert message in root(method, "/groups/class/users", body, status=400).json["message"]
    assert root("GET", "/groups/class").json["users"] == ["ada"]


def test_members_of_no_group(root):
    assert root("POST", "/groups/none/users", {"users": []}, status=404).json["message"] == "No such group: none"
    root("GET", "/groups/none/users", status=405)


@pytest.fixture
def served(make_hub):
    """A hub with an admin's service and one without rights."""
    return people(make_hub(services=[
        {"name": "boss", "api_token": "boss-token", "admin": True, "url": "http://127.0.0.1:9", "info": {"a": 1}},
        {"name": "ada", "api_token": "ada-token-of-a-service"}]))


def test_services_are_listed_by_name(served):
    services = Api(served, "boss-token")("GET", "/services").json
    assert services["boss"] == {"name": "boss", "admin": True, "url": "http://127.0.0.1:9", "prefix": "/services/boss/",
                                "command": [], "pid": 0, "info": {"a": 1}, "display": True}
    assert services["ada"]["prefix"] == ""


def test_a_service_sees_itself_and_an_admin_sees_it(served):
    service = Api(served, "ada-token-of-a-service")
    assert service("GET", "/services/ada").json["name"] == "ada"
    service("GET", "/services/boss", status=403)
    service("GET", "/services/none", status=403)
    assert api_of(served, "root")("GET", "/services/none", status=404).json["message"] == "No such service: none"
    api_of(served, "ada")("GET", "/services/ada", status=403)
    service("GET", "/services", status=403)


def test_a_service_is_identified(served):
    me = Api(served, "boss-token")("GET", "/user").json
    assert (me["kind"], me["name"], me["admin"]) == ("service", "boss", True)
    assert Api(served, "ada-token-of-a-service")("GET", "/authorizations/token/boss-token").json["kind"] == "service"


def test_a_service_that_bears_a_users_name_is_not_that_user(served):
    service = Api(served, "ada-token-of-a-service")
    service("GET", "/users/ada", status=403)
    service("POST", "/users/ada/tokens", status=403)


def test_an_admin_service_acts_for_users(served):
    boss = Api(served, "boss-token")
    note = boss("POST", "/users/ada/tokens", status=201).json["note"]
    assert note == "Requested via api by service boss"
    boss("DELETE", "/users/ada", status=204)


def test_a_service_that_is_no_longer_in_the_settings_is_gone(make_hub, tmp_path):
    database = f"sqlite:///{tmp_path}/hub.sqlite"
    people(make_hub(database=database, services=[{"name": "old", "api_token": "old-token"}]))
    hub = make_hub(database=database)
    Api(hub, "old-token")("GET", "/user", status=403)


def test_pages_of_users_are_cut_for_clients_that_know_of_pages(root):
    first = root("GET", "/users?limit=2", headers={"Accept": minihub.PAGE_TYPE}).json
    assert [user["name"] for user in first["items"]] == ["root", "ada"]
    assert first["_pagination"] == {"offset": 0, "limit": 2, "total": 3, "next": {
        "offset": 2, "limit": 2, "url": "http://localhost:80/hub/api/users?limit=2&offset=2"}}
    last = root("GET", "/users?limit=2&offset=2", headers={"Accept": minihub.PAGE_TYPE}).json
    assert [user["name"] for user in last["items"]] == ["bob"] and last["_pagination"]["next"] is None


def test_other_clients_get_the_whole_list(root):
    root("POST", "/users", {"usernames": [f"u{number}" for number in range(300)]}, status=201)
    assert len(root("GET", "/users").json) == 303
    assert len(root("GET", "/users", headers={"Accept": minihub.PAGE_TYPE}).json["items"]) == minihub.PAGE_LENGTH


@pytest.mark.parametrize("query, names", [
    ("name_filter=b", ["bob"]), ("sort=name", ["ada", "bob", "root"]), ("sort=-name", ["root", "bob", "ada"]),
    ("sort=-id&limit=1", ["bob"]), ("offset=1", ["ada", "bob"]), ("state=ready", ["ada"]), ("state=active", ["ada"]),
    ("state=inactive", ["root", "bob"]), ("name_filter=%25", [])])
def test_users_are_filtered_and_sorted(root, ada, query, names):
    ada("POST", "/users/ada/server", status=201)
    assert [user["name"] for user in root("GET", f"/users?{query}").json] == names


@pytest.mark.parametrize("query", ["state=x", "sort=age", "limit=0", "limit=-1", "offset=-1", "limit=x", "offset=1e99",
                                   "include_stopped_servers=maybe"])
def test_filters_that_make_no_sense_are_refused(root, query):
    assert root("GET", f"/users?{query}", status=400).json["status"] == 400


def test_stopped_servers_are_shown_on_request(root):
    assert root("GET", "/users").json[1]["servers"] == {}
    assert root("GET", "/users?include_stopped_servers=1").json[1]["servers"][""]["stopped"] is True


def test_the_routing_table_has_the_hub_and_its_servers(root, ada):
    ada("POST", "/users/ada/server", status=201)
    root("POST", "/proxy")
    routes = root("GET", "/proxy").json
    assert routes["/"]["data"]["hub"] is True
    assert routes["/user/ada/"]["data"] == {"user": "ada", "server_name": "", "last_activity": None}
    assert routes["/user/ada/"]["routespec"] == "/user/ada/" and routes["/user/ada/"]["target"].startswith("http://127.")


def test_a_lost_route_comes_back_and_a_stray_one_goes(hub, root, ada):
    ada("POST", "/users/ada/server", status=201)
    with hub.connected():
        hub.proxy.delete_route("/user/ada/")
        hub.proxy.add_route("/user/eve/", "http://127.0.0.1:9", {"user": "eve", "server_name": ""})
    root("POST", "/proxy")
    assert set(root("GET", "/proxy").json) == {"/", "/user/ada/"}


def test_the_embedded_proxy_cannot_be_moved(root):
    assert "MINIHUB_PROXY" in root("PATCH", "/proxy", {"port": "9"}, status=400).json["message"]
    assert root("PATCH", "/proxy", status=400).json["message"] == "need JSON body"
    assert root("PATCH", "/proxy", [], status=400).json["message"] == "Request body must be JSON dict"
    root("PATCH", "/proxy", {"color": "red"})


@pytest.mark.parametrize("body, message", [
    ({"proxy": "x"}, "proxy must be true or false, got 'x'"), ({"servers": []}, "servers must be true or false, got []"),
    ([1], "Body must be a JSON dict or empty")])
def test_a_shutdown_that_makes_no_sense_is_refused(root, body, message):
    assert root("POST", "/shutdown", body, status=400).json["message"] == message


def test_a_mounted_hub_shuts_down_by_calling_its_site(make_hub, spawner):
    over = threading.Event()
    hub = people(make_hub(on_shutdown=over.set))
    api_of(hub, "ada")("POST", "/users/ada/server", status=201)
    reply = api_of(hub, "root")("POST", "/shutdown", {"servers": True}, status=202)
    assert reply.json == {"message": "Shutting down Hub"} and over.wait(10) and not spawner.running


def test_a_shutdown_leaves_servers_running_unless_told(make_hub, spawner):
    over = threading.Event()
    hub = people(make_hub(on_shutdown=over.set))
    api_of(hub, "ada")("POST", "/users/ada/server", status=201)
    api_of(hub, "root")("POST", "/shutdown", status=202)
    assert over.wait(10) and len(spawner.running) == 1


CONTRACT = HERE.parent / "shared" / "rest-api-1.2-as-built.yml"
needs_contract = pytest.mark.skipif(not CONTRACT.exists(), reason="needs the API's description, as ../shared/" + CONTRACT.name)


def operations():
    """Every (method, path) of the contract."""
    paths = yaml.safe_load(CONTRACT.read_text())["paths"]
    return [(method.upper(), path) for path, item in paths.items() for method in item if method != "parameters"]


@needs_contract
def test_every_operation_of_the_contract_has_a_responder(hub):
    missing = []
    for method, path in operations():
        filled = re.sub(r"\{.*?\}", "x", minihub.API + path)
        found = hub._falcon._router.find(filled)
        if not found or method not in found[1] or found[1][method].__name__.startswith("method_not_allowed"):
            missing.append((method, path))
    assert len(operations()) == 35 and not missing


@contextlib.contextmanager
def over_http(app):
    """The URL of an application that a threaded wsgiref serves for a while."""
    class Threaded(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
        daemon_threads = True

    class Quiet(wsgiref.simple_server.WSGIRequestHandler):
        def log_message(self, *args):
            """Not a word."""

    with wsgiref.simple_server.make_server("127.0.0.1", 0, app, Threaded, Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


#: Who may do what: the operations that are not for admins only, and for whom they are. `self` is the user in the path.
OPEN_TO = {
    ("GET", "/"): "all", ("POST", "/oauth2/token"): "all", ("GET", "/oauth2/authorize"): "all",
    ("GET", "/user"): "any", ("GET", "/users/{name}"): "self", ("POST", "/users/{name}/activity"): "self",
    ("POST", "/users/{name}/server"): "self", ("DELETE", "/users/{name}/server"): "self",
    ("POST", "/users/{name}/servers/{server_name}"): "self", ("DELETE", "/users/{name}/servers/{server_name}"): "self",
    ("GET", "/users/{name}/tokens"): "self", ("POST", "/users/{name}/tokens"): "self",
    ("GET", "/users/{name}/tokens/{token_id}"): "self", ("DELETE", "/users/{name}/tokens/{token_id}"): "self",
    ("POST", "/authorizations/token"): "any", ("GET", "/authorizations/token/{token}"): "any",
    ("GET", "/authorizations/cookie/{cookie_name}/{cookie_value}"): "any"}

LETS_IN = {"nobody": {"all"}, "bob": {"all", "any"}, "ada": {"all", "any", "self"}, "root": {"all", "any", "self", "admins"}}


@needs_contract
@pytest.mark.parametrize("who", LETS_IN)
def test_the_contracts_operations_are_open_to_whom_they_should_be(make_hub, who):
    wrong = []
    for method, path in operations():
        hub = people(make_hub(on_shutdown=lambda: None))
        filled = path.replace("/users/{name}", "/users/ada")
        filled = re.sub(r"\{.*?\}", "x", filled)
        response = api_of(hub, None if who == "nobody" else who)(method, filled, status="*")
        allowed = OPEN_TO.get((method, path), "admins") in LETS_IN[who]
        if (response.status_int != 403) != allowed:
            wrong.append((method, path, response.status))
    assert not wrong


SCHEMATHESIS_CHECK = '''
import schemathesis
from schemathesis.specs.openapi.checks import content_type_conformance

@schemathesis.check
def right_content_type(ctx, response, case):
    """As documented; an answer without a body has no type."""
    if response.status_code != 204:
        return content_type_conformance(ctx, response, case)
'''


@needs_contract
@pytest.mark.parametrize(("who", "examples"), [("boss", 15), ("ada", 3), ("nobody", 3)])
def test_answers_to_random_requests_are_as_the_contract_says(make_hub, tmp_path, who, examples):
    pytest.importorskip("schemathesis", reason="pip install schemathesis")
    hub = people(make_hub(services=[{"name": "boss", "api_token": "boss-token", "admin": True}], on_shutdown=lambda: None))
    token = {"boss": "boss-token", "ada": token_for(hub, "ada"), "nobody": "nonsense"}[who]
    (tmp_path / "hooks.py").write_text(SCHEMATHESIS_CHECK)
    with over_http(hub) as url:
        done = subprocess.run(
            [str(Path(sys.executable).with_name("schemathesis")), "run", str(CONTRACT), "--url", f"{url}/hub/api",
             "--header", f"Authorization: token {token}", "--max-examples", str(examples), "--seed", "1", "--no-color",
             "--phases", "examples,coverage,fuzzing", "--checks", "not_a_server_error,response_schema_conformance,right_content_type"],
            cwd=tmp_path, env={**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


########################################################################################################
# 11. OAuth2 provider
########################################################################################################


def test_an_oauth_service_identifies_people(served):
    browser = sign_in(served, "ada")
    page = browser.get("/hub/api/oauth2/authorize?client_id=service-boss&response_type=code&state=s", status=200)
    back = page.forms[0].submit(status=302).location
    assert back.startswith("/services/boss/oauth_callback?code=") and back.endswith("&state=s")
    reply = browser.post("/hub/api/oauth2/token", {
        "client_id": "service-boss", "client_secret": "boss-token", "grant_type": "authorization_code",
        "code": parse_qs(urlsplit(back).query)["code"][0], "redirect_uri": "/services/boss/oauth_callback"}).json
    who = Api(served, reply["access_token"])("GET", "/user").json
    assert who["name"] == "ada" and "access:services!service=boss" in who["scopes"]


def sign_in(hub, name, **environ):
    """A browser without JavaScript in which somebody has signed in."""
    browser = webtest.TestApp(hub, extra_environ={"REMOTE_ADDR": "127.0.0.1", **environ})
    form = browser.get("/hub/login").forms[0]
    form["username"], form["password"] = name, password_of(name)
    form.submit(status=302)
    return browser
