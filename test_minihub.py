"""Tests of minihub, under the same banners as the file they test. Run them with: python -m pytest

What a test is about is real in it: gunicorn, processes, jupyterhub-singleuser, Chromium. All else is webtest, in process.
A part that is missing on the machine makes its tests skip, with the command that installs it.
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
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from datetime import timedelta
from pathlib import Path
from urllib.parse import parse_qs, quote, urlencode, urljoin, urlsplit

import pytest
import webtest

import minihub
from minihub import Hub, Settings

HERE = Path(__file__).parent
SINGLEUSER = shutil.which("jupyterhub-singleuser", path=os.pathsep.join([str(Path(sys.executable).parent), os.defpath]))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

needs_singleuser = pytest.mark.skipif(not SINGLEUSER, reason="pip install '.[classroom]'")
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="apt-get install chromium")


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


@pytest.fixture(autouse=True, scope="session")
def quick_hashes():
    """Passwords that are hashed weakly, because the tests hash so many."""
    strong = dict(minihub.SCRYPT)
    minihub.SCRYPT["n"] = 2
    yield
    minihub.SCRYPT.update(strong)


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
        assert [user.name for user in again.list_users()] == ["root", "ada", "bob"]


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


@pytest.mark.parametrize("username", ["ada", "new", "eve", "not/a/name"])
def test_a_wrong_password_takes_as_long_for_everybody(hub, monkeypatch, username):
    rounds, scrypt = [], minihub.hashlib.scrypt
    monkeypatch.setattr(minihub.hashlib, "scrypt", lambda *args, **options: rounds.append(options) or scrypt(*args, **options))
    with hub.connected():
        hub.create_user("new")
        assert hub.authenticator.authenticate({"username": username, "password": "wrong"}, {}) is None
    assert [(options["n"], options["r"], options["p"]) for options in rounds] == [(2 ** 14, 8, 1)]


@pytest.mark.parametrize(("credentials", "name"), [
    ({"username": "Eve", "password": "class secret"}, "Eve"), ({"username": "Eve", "password": "class secre"}, None),
    ({"username": "Eve"}, None), ({}, None), ({"username": "Eve", "password": "\udcff"}, None)])
def test_the_dummy_lets_in_who_knows_the_one_password(make_hub, credentials, name):
    hub = make_hub(authenticator="dummy", password="class secret")
    assert hub.authenticator.authenticate(credentials, {}) == name
