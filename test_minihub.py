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
        for supervisor in (self.folder / "run").glob("*/*.pid"):
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
    ("named_servers", "maybe", "must be true or false, not 'maybe'"),
    ("named_server_limit", "1.5", "must be a number, not '1.5'"),
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


@pytest.mark.parametrize("name", ["ada", "a b", "a@b.example", "åsa", "李", "x" * 255, "-", "...", "%2f", "a\\b", "<b>", "a;b",
                                  "\N{GRINNING FACE}"])
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


@pytest.mark.parametrize("name", ["a b", "a/b", ".", "..", "-a", "a-", "x" * 64, "é", "a\0", "a\n", "a%20b", "api", "LAB",
                                  "oauth_callback"])
def test_a_server_cannot_bear_the_name(name):
    with pytest.raises(minihub.BadRequest, match=f"^Invalid server_name: {re.escape(repr(name))}"):
        minihub.check_server_name(name)


@pytest.mark.parametrize(("name", "quoted"), [
    ("ada", "ada"), ("a@b~c", "a@b~c"), ("a b", "a%20b"), ("a/b", "a%2Fb"), ("é?#%", "%C3%A9%3F%23%25"), (";a&b", "%3Ba%26b")])
def test_a_name_is_one_segment_of_a_path(name, quoted):
    assert minihub.quote_name(name) == quoted


ODD_NAMES = [".hidden", "%2Ehidden", "a b", "a%20b", "-rf", "x" * 255, "x" * 254 + "y", "\N{GRINNING FACE}" * 255, "a\\b", "c:",
             "*", "~root"]


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
        if not isinstance(hub.database, minihub.pw.SqliteDatabase):
            pytest.skip("about SQLite")
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
    ({"username": "ada"}, None), ({"password": password_of("ada")}, None), ({}, None),
    ({"username": "eve", "password": ""}, None),
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


########################################################################################################
# 8. The hub's operations
########################################################################################################


@pytest.fixture
def opened(hub):
    """The hub, with its database open in this thread."""
    with hub.connected():
        yield hub


def server_of(hub, name="ada", server_name=""):
    """A user's server, made if it is a named one."""
    return hub.find_or_create_server(hub.find_user(name), server_name)


def running(hub, name="ada", server_name=""):
    """A user's server, started and ready."""
    server = server_of(hub, name, server_name)
    hub.start(server)
    assert hub.observe(server).status == "ready"
    return server


def in_threads(count, action):
    """What `action(number)` returns in so many threads that begin at the same moment."""
    def work(number):
        barrier.wait()
        results[number] = action(number)

    barrier, results = threading.Barrier(count), [None] * count
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


LOG_TAIL = ". Its last words:\nTraceback\nImportError: no module named antigravity"


def test_a_server_is_starting_until_it_is_seen_to_answer(opened, spawner):
    server = server_of(opened)
    opened.start(server)
    assert (server.status, opened.proxy.get_all_routes()) == ("spawning", {})
    assert opened.observe(server).status == "ready"
    assert opened.proxy.get_all_routes() == {"/user/ada/": {
        "routespec": "/user/ada/", "target": server.target, "data": {"user": "ada", "server_name": ""}}}


def test_a_server_that_does_not_answer_is_starting_until_its_time_is_over(opened, spawner, pass_time):
    spawner.answers = False
    server = server_of(opened)
    opened.start(server)
    pass_time(opened.settings.start_timeout - 1)
    assert opened.observe(server).status == "spawning"
    pass_time(2)
    assert opened.observe(server).status == "stopped"
    assert server.failure == "The server did not answer within 60 seconds" + LOG_TAIL
    assert not spawner.running


def test_a_server_that_ends_while_it_starts_has_failed(opened, spawner):
    spawner.exits_at_once = 3
    server = server_of(opened)
    opened.start(server)
    assert (opened.observe(server).status, server.failure) == (
        "stopped", "The server ended while it started [status=3]" + LOG_TAIL)
    assert (server.state, server.target, list(minihub.OAuthClient.select()), list(server.tokens)) == (None, None, [], [])


@pytest.mark.parametrize(("problem", "failure"), [
    (RuntimeError("no room"), "RuntimeError: no room"), (OSError(2, "No such file", "jup\udcff\0"),
     "FileNotFoundError: [Errno 2] No such file: 'jup\\udcff\\x00'"), (ValueError("nul\0 \udcff"), "ValueError: nul\ufffd ?")])
def test_a_spawner_that_raises_fails_the_start(opened, spawner, problem, failure):
    spawner.problem = problem
    server = server_of(opened)
    opened.start(server)
    assert (server.status, server.failure, minihub.OAuthClient.select().count()) == ("stopped", failure, 0)


def raising(*args, **options):
    """What a hook does when the engine behind it does not answer."""
    raise ConnectionError("the engine does not answer")


def test_a_spawner_that_cannot_tell_spoils_nothing(opened, spawner, root, pass_time, monkeypatch):
    ready, starting, stopping = running(opened, "ada"), server_of(opened, "bob"), running(opened, "root")
    spawner.stubborn, spawner.answers = True, False
    opened.start(starting)
    opened.stop(stopping)
    for hook in ("poll", "stop", "log_tail"):
        monkeypatch.setattr(spawner, hook, raising)
    assert [len(model["servers"]) for model in root("GET", "/users").json] == [1, 1, 1] and opened.tick()
    assert [opened.observe(row).status for row in (ready, starting, stopping)] == ["ready", "spawning", "stopping"]
    pass_time(61)
    assert (opened.observe(starting).status, starting.failure) == ("stopped", "The server did not answer within 60 seconds")
    monkeypatch.undo()
    spawner.end_all()
    assert opened.observe(stopping).status == "stopped"


def test_a_failure_is_forgotten_at_the_next_start(opened, spawner):
    spawner.problem = RuntimeError("no room")
    server = server_of(opened)
    opened.start(server)
    spawner.problem = None
    opened.start(server)
    assert (opened.observe(server).status, server.failure) == ("ready", "")


def test_a_port_that_somebody_took_is_replaced(opened, spawner):
    spawner.exits_at_once, spawner.log_tail = 1, lambda state: "OSError: [Errno 98] Address already in use"
    server = server_of(opened)
    opened.start(server)
    spawner.exits_at_once = None
    assert opened.observe(opened.observe(server)).status == "ready"
    assert [launch.name for launch in spawner.launches] == ["", ""] and len({launch.id for launch in spawner.launches}) == 2


def test_a_port_is_replaced_only_so_often(opened, spawner):
    spawner.exits_at_once, spawner.log_tail = 1, lambda state: "OSError: [Errno 98] Address already in use"
    server = server_of(opened)
    opened.start(server)
    for _ in range(minihub.MAX_ATTEMPTS):
        opened.observe(server)
    assert (server.status, server.failure, len(spawner.launches)) == (
        "stopped", "No free port was found for the server", minihub.MAX_ATTEMPTS)


def test_two_servers_never_share_a_port(opened, spawner, monkeypatch):
    other, start = running(opened, "bob"), spawner.start
    monkeypatch.setattr(spawner, "start", lambda launch: {
        **start(launch), **({"target": other.target} if len(spawner.launches) == 2 else {})})
    server = running(opened, "ada")
    assert (server.target != other.target, len(spawner.launches), len(spawner.running)) == (True, 3, 2)


def test_a_server_that_dies_is_noticed(opened, spawner):
    server = running(opened)
    spawner.end_all(status=-9)
    assert (opened.observe(server).status, server.failure) == (
        "stopped", "The server ended unexpectedly [status=-9]" + LOG_TAIL)
    assert (opened.proxy.get_all_routes(), minihub.OAuthClient.select().count(), server.tokens.count()) == ({}, 0, 0)


def test_a_server_that_runs_is_looked_at_once_a_second(opened, spawner, monkeypatch):
    server, looks, poll = running(opened), [], spawner.poll
    monkeypatch.setattr(spawner, "poll", lambda state: looks.append(state) or poll(state))
    opened.observe(opened.observe(server))
    assert len(looks) == 1


def test_a_server_that_has_just_died_can_be_started(opened, spawner):
    server = opened.observe(running(opened))
    spawner.end_all()
    opened.start(server)
    assert (opened.observe(server).status, len(spawner.launches)) == ("ready", 2)


def test_a_server_that_runs_is_not_started_again(opened, spawner):
    with pytest.raises(minihub.BadRequest, match="^ada is already running$"):
        opened.start(running(opened))
    assert len(spawner.launches) == 1


def test_a_server_is_asked_to_stop_and_then_seen_to_have_stopped(opened, spawner):
    server = running(opened)
    opened.stop(server)
    assert (server.status, opened.proxy.get_all_routes()) == ("stopping", {})
    assert (opened.observe(server).status, server.failure, server.state, spawner.running) == ("stopped", "", None, {})
    assert (minihub.OAuthClient.select().count(), server.tokens.count()) == (0, 0)


def test_a_stubborn_server_is_stopping_until_it_ends(opened, spawner):
    spawner.stubborn = True
    server = running(opened)
    opened.stop(server)
    assert opened.observe(server).status == "stopping"
    with pytest.raises(minihub.BadRequest, match="^ada is pending stop$"):
        opened.start(server)
    spawner.end_all()
    assert opened.observe(server).status == "stopped"


def test_a_stopped_server_stays_stopped(opened, spawner):
    server = server_of(opened)
    opened.stop(server)
    assert (server.status, opened.get_server(server.user, "").status) == ("stopped", "stopped")


def test_a_start_can_be_given_up(opened, spawner):
    spawner.answers = False
    server = server_of(opened)
    opened.start(server)
    opened.stop(server)
    assert (opened.observe(server).status, server.failure, spawner.running) == ("stopped", "", {})


def test_a_start_that_was_given_up_meanwhile_leaves_no_process(opened, spawner, monkeypatch):
    server, start = server_of(opened), spawner.start
    monkeypatch.setattr(spawner, "start", lambda launch: opened.stop(server_of(opened)) or start(launch))
    opened.start(server)
    assert (server.status, spawner.running, opened.proxy.get_all_routes()) == ("stopped", {}, {})
    assert len(spawner.launches) == 1


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_named_server_can_be_forgotten(opened, spawner, stubborn):
    spawner.stubborn = stubborn
    server = running(opened, server_name="gpu")
    opened.stop(server, forget=True)
    opened.stop(server)
    spawner.end_all()
    opened.observe(server)
    assert (server.status, opened.get_server(server.user, "gpu")) == ("deleted", None)


def test_a_named_server_that_is_only_stopped_is_kept(opened):
    server = running(opened, server_name="gpu")
    opened.stop(server)
    assert opened.observe(server).status == opened.get_server(server.user, "gpu").status == "stopped"


def test_a_server_deleted_meanwhile_is_not_started(opened):
    server = running(opened, server_name="gpu")
    opened.stop(server_of(opened, server_name="gpu"), forget=True)
    with pytest.raises((minihub.NotFound, minihub.BadRequest)):
        opened.start(server)
    assert not opened.proxy.get_all_routes()


def interrupted(hub, seconds):
    """ada's server, whose worker was killed so long ago, after it had written the row and before it started a process."""
    server = server_of(hub)
    minihub.Server.update(status="spawning", launch="first", prefix="/user/ada/", state=None,
                          changed=minihub.now() - timedelta(seconds=seconds)).where(minihub.Server.id == server.id).execute()
    return server_of(hub)


def test_a_start_that_was_interrupted_begins_again(opened, spawner):
    server = interrupted(opened, minihub.INTERRUPTED_AFTER + 1)
    opened.observe(server)
    assert (opened.observe(server).status, [launch.name for launch in spawner.launches]) == ("ready", [""])
    assert server.launch == spawner.launches[0].id != "first"


def test_a_start_that_may_still_be_under_way_is_left_alone(opened, spawner):
    server = interrupted(opened, minihub.INTERRUPTED_AFTER - 2)
    assert (opened.observe(server).status, server.launch, spawner.launches) == ("spawning", "first", [])


def test_a_process_that_an_interrupted_start_left_is_taken_over(opened, spawner):
    def find(launch):
        assert (launch.id, launch.user.name, launch.name, launch.prefix) == ("first", "ada", "", "/user/ada/")
        spawner.running["first"] = launch
        return {"target": f"{spawner.address}/first", "launch": "first"}

    spawner.find = find
    server = interrupted(opened, minihub.INTERRUPTED_AFTER + 1)
    opened.observe(server)
    assert (opened.observe(server).status, server.launch, spawner.launches) == ("ready", "first", [])


def test_an_interrupted_start_can_be_given_up(opened, spawner):
    server = interrupted(opened, 1)
    opened.stop(server)
    assert (server.status, spawner.launches) == ("stopped", [])


def test_many_who_start_a_server_at_once_start_it_once(hub, spawner):
    def start(number):
        with hub.connected():
            server = server_of(hub)
            with contextlib.suppress(minihub.BadRequest):  # it runs already
                hub.start(server)
            status = hub.observe(server).status
        hub.disconnect()
        return status

    assert set(in_threads(8, start)) <= {"spawning", "ready"}
    assert len(spawner.launches) == len(spawner.running) == 1


def test_many_who_see_an_interrupted_start_finish_it_once(hub, spawner):
    def observe(number):
        with hub.connected():
            hub.observe(server_of(hub))
        hub.disconnect()

    with hub.connected():
        interrupted(hub, minihub.INTERRUPTED_AFTER + 1)
    in_threads(8, observe)
    assert len(spawner.launches) == len(spawner.running) == 1


def test_many_who_use_a_name_first_make_one_server(hub):
    def find_or_create(number):
        with hub.connected():
            server = server_of(hub, server_name="gpu")
        hub.disconnect()
        return server.id

    assert len(set(in_threads(8, find_or_create))) == 1


def test_many_who_create_users_make_each_of_them_once(hub):
    def create(number):
        with hub.connected():
            try:
                return [user.name for user in hub.create_users([f"user{number}" for number in range(20)])]
            except minihub.Conflict as error:
                return error.message
            finally:
                hub.disconnect()

    answers = in_threads(4, create)
    assert sorted(map(str, answers)) == ["All 20 users already exist"] * 3 + [str([f"user{number}" for number in range(20)])]


def test_a_server_starts_with_all_that_jupyterhub_singleuser_reads(make_hub, spawner):
    hub = people(make_hub(public_url="https://hub.example", hub_url="http://10.0.0.1:8000", base_url="/lab"))
    with hub.connected():
        hub.arrive(minihub.Mount("/lab/", "http://10.0.0.1:8000"))
        hub.start(server_of(hub, hub.create_user("a@b c").name, "gpu"))
        token = spawner.launches[0].variables["JUPYTERHUB_API_TOKEN"]
        assert hub.check_client("jupyterhub-user-a%40b%20c-gpu", token).redirect_uri == "/lab/user/a@b%20c/gpu/oauth_callback"
        assert hub.identify_token(token).name == "a@b c"
    access = '["access:servers!server=a@b c/gpu", "access:servers!user=a@b c"]'
    assert spawner.launches[0].variables == {
        "JUPYTERHUB_API_TOKEN": SECRET, "JPY_API_TOKEN": token, "JUPYTERHUB_CLIENT_ID": "jupyterhub-user-a%40b%20c-gpu",
        "JUPYTERHUB_HOST": "", "JUPYTERHUB_OAUTH_CALLBACK_URL": "/lab/user/a@b%20c/gpu/oauth_callback",
        "JUPYTERHUB_USER": "a@b c", "JUPYTERHUB_SERVER_NAME": "gpu",
        "JUPYTERHUB_API_URL": "http://10.0.0.1:8000/lab/hub/api",
        "JUPYTERHUB_ACTIVITY_URL": "http://10.0.0.1:8000/lab/hub/api/users/a@b%20c/activity",
        "JUPYTERHUB_BASE_URL": "/lab/", "JUPYTERHUB_SERVICE_PREFIX": "/lab/user/a@b%20c/gpu/",
        "JUPYTERHUB_OAUTH_ACCESS_SCOPES": access, "JUPYTERHUB_OAUTH_SCOPES": access,
        "JUPYTERHUB_OAUTH_CLIENT_ALLOWED_SCOPES": "[]", "JUPYTERHUB_ADMIN_ACCESS": "1",
        "JUPYTERHUB_PUBLIC_URL": "https://hub.example/lab/user/a@b%20c/gpu/",
        "JUPYTERHUB_PUBLIC_HUB_URL": "https://hub.example/lab/hub/", "JUPYTERHUB_COOKIE_HOST_PREFIX_ENABLED": "0"}


def test_a_server_is_not_told_of_admins_who_may_not_enter(make_hub, spawner):
    hub = people(make_hub(admin_access=False))
    with hub.connected():
        running(hub)
    assert "JUPYTERHUB_ADMIN_ACCESS" not in spawner.launches[0].variables


def test_the_credentials_of_a_server_are_new_at_every_start(opened, spawner):
    server = running(opened)
    opened.stop(server)
    opened.start(server)
    first, second = [launch.variables["JUPYTERHUB_API_TOKEN"] for launch in spawner.launches]
    assert (opened.identify_token(first), opened.identify_token(second).name) == (None, "ada")


@pytest.mark.parametrize("name", ["x" * 255, "\N{GRINNING FACE}" * 255])
def test_a_very_long_name_starts_a_server_too(opened, name):
    opened.create_user(name)
    assert running(opened, name).prefix == f"/user/{quote(name)}/"


def test_a_user_is_not_renamed_under_a_running_server(opened):
    server = running(opened)
    with pytest.raises(minihub.BadRequest, match="^Stop the servers of ada before giving them another name$"):
        opened.change_user(server.user, {"name": "lovelace"})
    assert opened.find_user("ada").id == server.user_id


def test_a_renamed_user_starts_under_the_new_name_in_the_old_home(opened, spawner):
    ada = opened.find_user("ada")
    opened.change_user(ada, {"name": "Lovelace"})
    running(opened, "lovelace")
    assert (spawner.launches[0].prefix, spawner.launches[0].user.folder) == ("/user/lovelace/", "ada")
    assert opened.create_user("ada").folder == Like("ada-[0-9a-f]{8}")


def test_a_user_is_deleted_with_all_servers(opened, spawner):
    for name in ("", "gpu", "cpu"):
        running(opened, server_name=name)
    opened.delete_user(opened.find_user("ada"), 0)
    assert (opened.get_user("ada"), spawner.running, opened.proxy.get_all_routes()) == (None, {}, {})


def test_a_user_whose_server_will_not_stop_is_not_deleted_yet(opened, spawner):
    running(opened), running(opened, server_name="gpu")
    spawner.stubborn = True
    with pytest.raises(minihub.BadRequest, match=r"^ada's server is in the process of stopping, please wait\.$"):
        opened.delete_user(opened.find_user("ada"), 0)
    assert [server.status for server in opened.find_user("ada").servers] == ["stopping", "stopping"]
    spawner.end_all()
    opened.delete_user(opened.find_user("ada"), 0)
    assert opened.get_user("ada") is None


def test_only_two_wait_at_a_time(hub):
    for _ in range(2):
        hub._waiting.acquire()
    began = time.monotonic()
    assert hub.wait_until(lambda: False, 60) is False and time.monotonic() - began < 5


def test_whoever_waits_hears_when_it_has_happened(hub):
    answers = iter([False, False, True])
    assert hub.wait_until(lambda: next(answers), 60) is True


def test_whoever_waits_is_told_when_it_takes_too_long(hub):
    assert hub.wait_until(lambda: False, 0.06) is False


def test_configured_admins_are_there_from_the_start(make_hub, tmp_path):
    url = f"sqlite:///{tmp_path}/hub.sqlite"
    people(make_hub(database=url))
    hub = make_hub(database=url, admins=["Ada", "Grace"])
    with hub.connected():
        assert {user.name: user.admin for user in hub.list_users()} == {"root": True, "ada": True, "bob": False, "grace": True}
        assert not hub.create_user("eve").admin


def test_one_worker_ticks_at_a_time(make_hub, tmp_path, pass_time):
    hubs = [make_hub(database=f"sqlite:///{tmp_path}/hub.sqlite") for _ in range(2)]

    def tick(hub):
        with hub.connected():
            return hub.tick()

    assert [tick(hub) for hub in (*hubs, *hubs)] == [True, False, True, False]
    pass_time(11)
    assert [tick(hub) for hub in reversed(hubs)] == [True, False]


def test_the_ticker_sees_what_nobody_looks_at(opened, spawner):
    starting, dead = server_of(opened, "bob"), running(opened, "ada")
    opened.start(starting)
    spawner.end(dead.launch)
    opened.tick()
    assert [server_of(opened, name).status for name in ("ada", "bob")] == ["stopped", "ready"]


def test_the_ticker_throws_away_what_has_expired(opened, pass_time):
    client = minihub.OAuthClient.create(identifier="c", secret="", redirect_uri="/", description="")
    ada = opened.find_user("ada")
    for life in (60, 3600):
        opened.create_token(ada, str(life), expires_in=life)
    opened.create_token(ada, "for ever")
    opened.create_code(client, ada, "", "")
    opened._count_failure({"ada": 1})
    pass_time(301)
    opened.tick()
    assert [token.note for token in opened.tokens_of(ada)] == ["3600", "for ever"]
    assert (minihub.OAuthCode.select().count(), minihub.Failure.select().count()) == (0, 0)


def test_a_fresh_hub_says_once_how_to_become_its_admin(make_hub, tmp_path, caplog):
    for _ in range(2):
        hub = make_hub(database=f"sqlite:///{tmp_path}/hub.sqlite")
        with hub.connected():
            hub.announce_first_admin()
    links = re.findall(r"http://\S+/hub/link/\S+", caplog.text)
    assert len(links) == 1
    with hub.connected():
        user = hub.use_link(links[0].rpartition("/")[2], "Grace", "a good password")
        assert (user.name, user.admin, hub.has_admin()) == ("grace", True, True)
        with pytest.raises(minihub.Forbidden, match="^This link has been used already. Sign in, or ask an admin for a link of"):
            hub.use_link(links[0].rpartition("/")[2], "eve", "another password")


@pytest.mark.parametrize("settings", [{"authenticator": "dummy", "password": "x"}, {}])
def test_a_hub_that_needs_no_first_admin_says_nothing(make_hub, caplog, settings):
    hub = make_hub(**settings)
    with hub.connected():
        if not settings:
            hub.set_password(hub.create_user("root", admin=True), "a good password")
        caplog.clear()
        hub.announce_first_admin()
    assert caplog.text == ""


def test_a_link_sets_a_password_once(opened):
    link = opened.link_for(opened.find_user("ada")).rpartition("/")[2]
    assert opened.use_link(link, "bob", "a new password").name == "ada"
    assert opened.authenticator.authenticate({"username": "ada", "password": "a new password"}, {}) == "ada"
    with pytest.raises(minihub.Forbidden, match="^This link has been used already. Ask for a new one$"):
        opened.open_link(link)


def test_a_link_ends_after_a_while(opened, pass_time):
    link = opened.link_for(opened.find_user("ada")).rpartition("/")[2]
    pass_time(opened.settings.link_lifetime - 5)
    assert opened.open_link(link).name == "ada"
    pass_time(10)
    with pytest.raises(minihub.Forbidden, match="^This link is not valid any more. Ask for a new one$"):
        opened.open_link(link)


@pytest.mark.parametrize("link", ["", "x", "W10.x.y", "é", "\0"])
def test_a_made_up_link_opens_nothing(opened, link):
    with pytest.raises(minihub.Forbidden, match="^This link is not valid any more. Ask for a new one$"):
        opened.open_link(link)


@pytest.mark.parametrize("password", ["", "short", "x" * 1001, "Long Name", "long name "])
def test_a_weak_password_is_refused(opened, password):
    user = opened.create_user("long name")
    with pytest.raises(minihub.BadRequest, match="^Choose a password of at least 8 characters that is not your name$"):
        opened.set_password(user, password)
    assert opened.find_user("long name").password is None


def sign_in(hub, name, password, address="10.0.0.1"):
    """The name of whoever has signed in, or what the hub says instead."""
    try:
        user = hub.sign_in({"username": name, "password": password}, {}, address)
    except minihub.TooMany as error:
        return error.message
    return user and user.name


def test_too_many_failed_sign_ins_stop_one_address_for_a_while(opened, pass_time):
    tries = [sign_in(opened, "ADA", "wrong") for _ in range(6)]
    assert tries == [None] * 5 + [Like(r"Too many failed sign-ins\. Try again in (299|300) seconds")]
    assert sign_in(opened, "ada", password_of("ada")) == Like("Too many failed sign-ins.*")
    assert sign_in(opened, "bob", password_of("bob")) == "bob"
    assert sign_in(opened, "ada", password_of("ada"), "10.0.0.2") == "ada"
    pass_time(minihub.FAILURES_FORGOTTEN + 1)
    assert sign_in(opened, "ada", password_of("ada")) == "ada"


def test_failed_sign_ins_are_forgotten_after_a_good_one(opened):
    for _ in range(2):
        assert [sign_in(opened, "ada", "wrong") for _ in range(4)] == [None] * 4
        assert sign_in(opened, "ada", password_of("ada")) == "ada"


@pytest.mark.parametrize(("key", "limit", "refused", "let_in"), [
    ("ada", 50, ("ada", "10.9.9.9"), ("bob", "10.9.9.9")), ("10.0.0.1", 200, ("bob", "10.0.0.1"), ("bob", "10.9.9.9"))])
def test_many_failures_stop_a_name_or_an_address(opened, key, limit, refused, let_in):
    for _ in range(limit):
        opened._count_failure({key: limit})
    assert sign_in(opened, refused[0], password_of(refused[0]), refused[1]) == Like("Too many failed sign-ins.*")
    assert sign_in(opened, let_in[0], password_of(let_in[0]), let_in[1]) == let_in[0]


@pytest.mark.parametrize("name", ["\0", "x" * 1000, "\ud800", "\N{GRINNING FACE}" * 300])
def test_odd_names_cannot_sign_in(opened, name):
    assert sign_in(opened, name, "wrong") is None
    assert max(len(row.key) for row in minihub.Failure.select()) <= 255 + len(" 10.0.0.1")


def test_whoever_the_authenticator_vouches_for_becomes_a_user(make_hub):
    hub = make_hub(authenticator="dummy", password="class secret")
    with hub.connected():
        assert sign_in(hub, "Eve", "class secret") == "eve" == hub.find_user("EVE").name
        assert sign_in(hub, "a/b", "class secret") is None
        assert hub.sign_in({"username": "new", "password": "class secret"}, {}, "", known_only=True) is None
        assert [user.name for user in hub.list_users()] == ["eve"]


def test_two_hubs_in_one_process_share_nothing(make_hub):
    first, second = people(make_hub()), make_hub()
    token = token_for(first, "ada")
    Api(second, token)("GET", "/user", status=403)
    with first.connected(), second.connected():
        second.create_user("eve")
        assert [user.name for user in second.list_users()] == ["eve"]
    with first.connected():
        assert first.get_user("eve") is None
    assert Api(first, token)("GET", "/user").json["name"] == "ada"
    assert first.secret != second.secret


def test_each_thread_has_a_connection_of_its_own(hub):
    def connection(number):
        with hub.connected():
            found = hub.database.connection()
            assert hub.database.connection() is found
        hub.disconnect()
        return id(found), found

    assert len({number for number, _ in in_threads(3, connection)}) == 3


FORKING = """
import os, sys, minihub
hub = minihub.Hub(database="sqlite:///hub.sqlite", tick_interval=0)
with hub.connected():
    hub.create_user("parent")
    mine = hub.database.connection()
    child = os.fork()
    if child == 0:
        with hub.connected():
            assert hub.database.connection() is not mine
            hub.create_user("child")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert hub.database.connection() is mine
    print([user.name for user in hub.list_users()])
"""


def run_python(code, folder, **environ):
    """What a fresh Python prints."""
    return subprocess.run([sys.executable, "-B", "-c", code], cwd=folder, capture_output=True, text=True, check=True,
                          timeout=60, env={"PYTHONPATH": str(HERE), "PATH": os.defpath, **environ}).stdout.strip()


def test_a_forked_child_has_a_connection_of_its_own(tmp_path):
    assert run_python(FORKING, tmp_path) == "['parent', 'child']"


def test_a_forked_child_leaves_the_memory_of_its_parent_alone(tmp_path):
    assert run_python(FORKING.replace("hub.sqlite", ":memory:").replace("os._exit(0)", "sys.exit(0)"), tmp_path,
                      TMPDIR=str(tmp_path)) == "['parent', 'child']"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("host", "port", "address"), [
    ("127.0.0.1", 8000, "http://127.0.0.1:8000"), ("0.0.0.0", "80", "http://127.0.0.1:80"), ("::", 8000, "http://[::1]:8000"),
    ("10.0.0.5", 8000, "http://10.0.0.5:8000"), ("fe80::1", 1, "http://[fe80::1]:1"),
    ("localhost", 8000, "http://127.0.0.1:8000")])
def test_the_hub_is_reached_where_it_listens(host, port, address):
    assert minihub.local_address(host, port) == address


########################################################################################################
# 9. Who is asking
########################################################################################################


class Browser:
    """A browser at a hub, signed in unless `name` is None: `browser.app` is webtest's, with its cookies."""

    def __init__(self, hub, name=None):
        self.app = webtest.TestApp(hub, extra_environ={"REMOTE_ADDR": "127.0.0.1", "HTTP_HOST": "localhost:80"}, lint=True)
        form = self.app.get("/hub/login", status=200).form
        if name:
            form["username"], form["password"] = name, password_of(name)
            form.submit(status=302)

    @property
    def xsrf(self):
        """What the hub's pages have in their forms."""
        return self.app.get("/hub/home", status=200).forms[0]["_xsrf"].value

    def api(self, method, path, status=200, **headers):
        """The response to a request made by a script."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.app.request(f"/hub/api{path}", method=method, headers=named, status=status)


@pytest.fixture
def browser(hub):
    """A browser in which ada has signed in."""
    return Browser(hub, "ada")


OWN_PAGE = "http://localhost:80/hub/home"


@pytest.mark.parametrize("scheme", ["token", "Token", "bearer", "BEARER", "token  "])
def test_a_token_is_taken_in_every_form_of_the_header(hub, scheme):
    header = {"Authorization": f"{scheme} {token_for(hub, 'ada')}"}
    assert Api(hub)("GET", "/user", headers=header).json["name"] == "ada"


@pytest.mark.parametrize("header", ["token", "token ", "{}", "Basic {}", "token {} more", "token x{}", "token: {}", "token \xff",
                                    "token {}\xe9"])
def test_other_headers_are_refused(hub, header):
    header = {"Authorization": header.format(token_for(hub, "ada"))}
    assert Api(hub)("GET", "/user", status=403, headers=header).json == error(403, "Missing or invalid credentials.")


def test_a_token_in_the_address_is_no_proof(hub, nobody):
    nobody("GET", f"/user?token={token_for(hub, 'ada')}", status=403)


def test_a_token_ends_when_its_time_is_over(hub, pass_time):
    api = Api(hub, token_for(hub, "ada", expires_in=60))
    assert api("GET", "/user").json["name"] == "ada"
    pass_time(61)
    assert api("GET", "/user", status=403).json == error(403, "Missing or invalid credentials.")


def test_a_token_ends_with_its_user(root, ada):
    root("DELETE", "/users/ada", status=204)
    assert ada("GET", "/user", status=403).json == error(403, "Missing or invalid credentials.")
    root("POST", "/users/ada", status=201)
    ada("GET", "/user", status=403)


def test_a_cookie_ends_with_its_user(root, browser):
    root("DELETE", "/users/ada", status=204)
    root("POST", "/users/ada", status=201)
    browser.api("GET", "/user", status=403, Referer=OWN_PAGE)


@pytest.mark.parametrize("referer", [OWN_PAGE, "https://localhost:80/hub/", "http://localhost:80/hub/token?x=/"])
def test_the_hubs_own_pages_read_by_cookie(browser, referer):
    assert browser.api("GET", "/user", Referer=referer).json["name"] == "ada"


@pytest.mark.parametrize("headers", [
    {}, {"Referer": "http://evil.example/hub/"}, {"Referer": "http://localhost:80/user/bob/hub/"},
    {"Referer": "http://localhost/hub/"},
    {"Referer": "/hub/"}, {"Referer": "http://localhost:80.evil.example/hub/"}, {"Referer": "http://[/hub/"}])
def test_other_pages_do_not_read_by_cookie(browser, headers):
    assert browser.api("GET", "/user", status=403, **headers).json == error(403, "Missing or invalid credentials.")


def test_the_hubs_own_pages_write_by_cookie(browser):
    assert browser.api("POST", "/users/ada/tokens", status=201, X_XSRFToken=browser.xsrf).json["user"] == "ada"


@pytest.mark.parametrize("given", ["", "x", "é", "of another session"])
def test_other_pages_do_not_write_by_cookie(hub, browser, given):
    given = Browser(hub, "ada").xsrf if given == "of another session" else given
    browser.api("DELETE", "/users/ada/server", status=403, X_XSRFToken=given, Referer=OWN_PAGE)


def test_a_wrong_token_does_not_keep_a_cookie_from_counting(browser):
    assert browser.api("GET", "/user", Referer=OWN_PAGE, Authorization="token wrong").json["name"] == "ada"


def test_a_right_token_counts_before_a_cookie(hub, browser):
    headers = {"Authorization": f"token {token_for(hub, 'bob')}"}
    assert browser.api("GET", "/user", Referer=OWN_PAGE, **headers).json["name"] == "bob"


def test_a_cookie_ends_after_two_weeks(browser, pass_time):
    pass_time(14 * 24 * 3600 - 5)
    browser.api("GET", "/user", status=200, Referer=OWN_PAGE)
    pass_time(10)
    browser.api("GET", "/user", status=403, Referer=OWN_PAGE)


def test_a_new_password_ends_all_cookies(hub, browser):
    with hub.connected():
        hub.set_password(hub.find_user("ada"), "a new password")
    browser.api("GET", "/user", status=403, Referer=OWN_PAGE)


def test_a_cookie_is_good_under_its_own_name_only(hub, browser):
    value = browser.app.cookies["jupyterhub-hub-login"].strip('"')
    with hub.connected():
        assert minihub.user_of_cookie(hub, "jupyterhub-hub-login", value).name == "ada"
        assert minihub.user_of_cookie(hub, "jupyterhub-services", value) is None
        assert minihub.user_of_cookie(hub, "jupyterhub-hub-login", value[:-1]) is None


def test_the_hubs_cookies_are_kept_from_scripts_and_other_sites(hub):
    app = Browser(hub).app
    form = app.get("/hub/login").form
    form["username"], form["password"] = "ada", password_of("ada")
    cookies = form.submit(status=302).headers.getall("Set-Cookie")
    assert cookies == [Like('jupyterhub-hub-login=[^;]+; HttpOnly; Max-Age=1209600; Path=/hub/; SameSite=Lax')]


def test_over_tls_the_hubs_cookies_are_for_tls_only(hub):
    cookies = webtest.TestApp(hub).get("/hub/login", headers={"X-Forwarded-Proto": "https"}, extra_environ={
        "REMOTE_ADDR": "127.0.0.1"}).headers.getall("Set-Cookie")
    assert cookies == [Like("jupyterhub-session-id=[0-9a-f]{32}; HttpOnly; Path=/; SameSite=Lax; Secure")]


def oauth_token(hub, name, owner=None):
    """An access token that a user got for a running server."""
    with hub.connected():
        server = server_of(hub, owner or name)
        if server.status == "stopped":
            hub.start(server)
        client = server.clients.get()
        return hub.create_token(hub.find_user(name), client=client, session_id="5" * 32)[0]


def example_path(pattern):
    """A path of a route, with ada's things in it."""
    examples = {"name": "ada", "server_name": "gpu", "token_id": "a1"}
    return re.sub(r"\{(\w+):\w+\}", lambda match: examples.get(match[1], "x"), pattern)


def responders():
    """Every path of the route table with every method it answers."""
    for pattern, resource, suffix in minihub.ROUTES:
        for method in ("GET", "POST", "PATCH", "PUT", "DELETE"):
            name = f"on_{method.lower()}" + (f"_{suffix}" if suffix else "")
            if hasattr(resource, name):
                yield method, pattern


#: Where nobody gets something else than a 403 or the way to sign in, and what.
OPEN_TO_ALL = {
    ("GET", "/hub/api"): 200, ("GET", "/hub/api/"): 200, ("POST", "/hub/api/oauth2/token"): 400, ("GET", "/"): 302,
    ("GET", "/hub"): 301, ("GET", "/hub/"): 302, ("GET", "/hub/login"): 200, ("POST", "/hub/login"): 200,
    ("GET", "/hub/logout"): 302, ("GET", "/hub/health"): 200, ("GET", "/hub/logo"): 200,
    ("POST", "/hub/security/csp-report"): 204}


@pytest.mark.parametrize(("method", "pattern"), list(responders()))
def test_nobody_gets_in(hub, method, pattern):
    response = webtest.TestApp(hub).request(example_path(pattern), method=method, status="*")
    if (method, pattern) in OPEN_TO_ALL:
        assert response.status_int == OPEN_TO_ALL[method, pattern]
    elif pattern.startswith("/hub/api/") and "authorize" not in pattern or pattern.startswith("/hub/link/"):
        assert response.status_int == 403
    else:
        assert (response.status_int, urlsplit(response.location).path) == (302, "/hub/login")
        assert parse_qs(urlsplit(response.location).query) == {"next": [example_path(pattern)]}


def test_the_list_of_what_is_open_names_only_what_there_is():
    assert OPEN_TO_ALL.keys() <= set(responders())


@pytest.mark.parametrize(("method", "pattern"), [
    (method, pattern) for method, pattern in responders() if pattern.startswith("/hub/api/") and "oauth2" not in pattern
    and pattern not in ("/hub/api/", "/hub/api/user")])
def test_an_oauth_token_is_refused(hub, method, pattern):
    api = Api(hub, oauth_token(hub, "root", owner="ada"))
    assert api(method, example_path(pattern).removeprefix("/hub/api"), status=403).json == error(403, "Forbidden")


def test_an_oauth_token_is_good_for_being_identified(hub):
    model = Api(hub, oauth_token(hub, "ada"))("GET", "/user").json
    assert {key: model[key] for key in ("kind", "name", "admin", "groups", "scopes", "session_id", "token_id")} == {
        "kind": "user", "name": "ada", "admin": False, "groups": [], "session_id": "5" * 32, "token_id": Like("o[0-9]+"),
        "scopes": ["access:servers!server=ada/", "read:users:name!user=ada", "read:users:groups!user=ada"]}


def test_the_scopes_of_an_api_token_are_its_owners(hub, root, ada):
    own = [text.format(me="ada") for text in (
        "access:servers!user={me}", "read:users:name!user={me}", "read:users:groups!user={me}", "users:activity!user={me}",
        "read:users:activity!user={me}", "read:servers!user={me}", "servers!user={me}", "tokens!user={me}")]
    assert ada("GET", "/user").json["scopes"] == own
    assert root("GET", "/user").json["scopes"] == ["access:servers", *(text.replace("ada", "root") for text in own)]


def test_an_admin_who_may_not_enter_has_no_scope_for_it(make_hub):
    hub = people(make_hub(admin_access=False))
    assert "access:servers" not in api_of(hub, "root")("GET", "/user").json["scopes"]


def activity(hub, name):
    """When a user, and the newest of the user's tokens, was last seen."""
    with hub.connected():
        user = hub.find_user(name)
        return user.last_activity, user.tokens.order_by(minihub.Token.id.desc()).get().last_activity


def test_using_a_token_is_activity(hub, ada, pass_time):
    assert activity(hub, "ada") == (None, None)
    ada("GET", "/user")
    first = activity(hub, "ada")
    pass_time(20)
    ada("GET", "/user")
    assert activity(hub, "ada") == first and None not in first
    pass_time(20)
    ada("GET", "/user")
    assert all(after - before > timedelta(seconds=39) for before, after in zip(first, activity(hub, "ada")))


def test_what_a_server_does_with_its_own_token_is_no_activity(hub, spawner):
    with hub.connected():
        running(hub)
    Api(hub, spawner.launches[0].variables["JUPYTERHUB_API_TOKEN"])("GET", "/users/ada")
    assert activity(hub, "ada") == (None, None)


def seen_by_server(hub, token):
    """What ada's server sees of a request with that token, in the header and in the address."""
    environ = {"HTTP_AUTHORIZATION": f"Bearer {token}", "QUERY_STRING": f"token={token}&x=1",
               "HTTP_COOKIE": "jupyterhub-hub-login=x; mine=1; jupyterhub-services=x; jupyterhub-session-id=y"}
    seen = minihub.without_hub_secrets(hub, environ, {"user": "ada", "server_name": ""})
    return seen["HTTP_AUTHORIZATION"], seen["QUERY_STRING"], seen["HTTP_COOKIE"]


@pytest.mark.parametrize("name", ["ada", "root"])
def test_a_server_sees_a_token_that_is_good_for_itself_only(opened, name):
    running(opened)
    token, row = opened.create_token(opened.find_user(name))
    authorization, query, cookies = seen_by_server(opened, token)
    other = authorization.removeprefix("token ")
    assert (other, query, cookies) == (SECRET, f"token={other}&x=1", "mine=1; jupyterhub-session-id=y") and other != token
    identity = opened.identify_token(other)
    assert (identity.name, identity.client_server) == (name, "ada/")
    assert seen_by_server(opened, token)[0] == authorization
    opened.delete_token(row)
    assert opened.identify_token(other) is None


def test_a_server_sees_no_token_of_those_who_may_not_enter(opened):
    running(opened)
    token, _ = opened.create_token(opened.find_user("bob"))
    assert seen_by_server(opened, token)[:2] == ("token ", "token=&x=1")


def test_a_server_sees_tokens_that_are_not_the_hubs(opened):
    running(opened)
    assert seen_by_server(opened, "its-own")[:2] == ("Bearer its-own", "token=its-own&x=1")


########################################################################################################
# 10. REST resources
########################################################################################################


def user(name, /, **others):
    """The API's User, as far as it is not said otherwise."""
    return {"kind": "user", "name": name, "admin": False, "groups": [], "server": None, "pending": None, "created": MOMENT,
            "last_activity": None, "servers": None, **others}


def server(name="", owner="ada", **others):
    """The API's Server, ready if it is not said otherwise."""
    place, below = (f"servers/{name}", f"{name}/") if name else ("server", "")
    return {"name": name, "last_activity": MOMENT, "started": MOMENT, "pending": None, "ready": True, "state": None,
            "url": f"/user/{owner}/{below}", "user_options": {},
            "progress_url": f"/hub/api/users/{owner}/{place}/progress", **others}


def api_token(**others):
    """The API's Token, one asked for through the API if it is not said otherwise."""
    return {"user": "ada", "id": Like("a[0-9]+"), "kind": "api_token", "note": "Requested via api", "created": MOMENT,
            "last_activity": None, "expires_at": None, **others}


MISSING = error(403, "Missing or invalid credentials.")
FORBIDDEN = error(403, "Forbidden")
NOT_FOUND = error(404, "Not Found")
BAD_JSON = error(400, "Invalid JSON in body of request")

LONG = "x" * 256

#: Requests that are refused and change nothing: who asks for what, with which body, and the answer.
REFUSED = [
    ("ada", "GET", "/info", None, FORBIDDEN),
    ("ada", "GET", "/users", None, FORBIDDEN),
    ("root", "GET", "/users?state=asleep", None, error(400, "state must be one of active, ready, inactive")),
    ("ada", "POST", "/users", {"usernames": ["eve"]}, FORBIDDEN),
    *(("root", "POST", "/users", body, error(400, "Must specify at least one user to create"))
      for body in (None, {}, [], ["eve"], "eve", 1, {"usernames": []}, {"usernames": ""}, {"usernames": None},
                   {"names": ["eve"]})),
    *(("root", "POST", "/users", {"usernames": names}, error(400, "usernames must be a list of strings"))
      for names in ("eve", ["eve", 1], [None], [["eve"]], {"eve": 1}, 5, True)),
    ("root", "POST", "/users", {"usernames": ["eve"], "nonsense": 1}, error(400, "Invalid JSON keys: nonsense")),
    ("root", "POST", "/users", {"usernames": ["eve"], "admin": 1},
     error(400, "user.admin must be <class 'bool'>, not: <class 'int'>")),
    ("root", "POST", "/users", {"usernames": ["eve", "a/b"]}, error(400, "Invalid username: a/b")),
    ("root", "POST", "/users", {"usernames": ["", "eve", "x\0", LONG]}, error(400, f"Invalid usernames: , x\0, {LONG}")),
    ("root", "POST", "/users", {"usernames": ["ADA", "bob", "ada"]}, error(409, "All 2 users already exist")),
    ("ada", "GET", "/users/bob", None, FORBIDDEN),
    ("ada", "GET", "/users/eve", None, FORBIDDEN),
    ("root", "GET", "/users/eve", None, error(404, "No such user: eve")),
    ("root", "GET", "/users/%00", None, error(404, "No such user: \0")),
    ("root", "GET", f"/users/{LONG}", None, error(404, f"No such user: {LONG}")),
    ("root", "GET", "/users/", None, NOT_FOUND),
    ("root", "GET", "/users/a%2Fb", None, NOT_FOUND),
    ("ada", "POST", "/users/eve", None, FORBIDDEN),
    ("ada", "POST", "/users/ada", None, FORBIDDEN),
    ("root", "POST", "/users/ADA", None, error(409, "User ada already exists")),
    ("root", "POST", "/users/eve", {"nonsense": 1, "more": 2}, error(400, "Invalid JSON keys: more, nonsense")),
    ("root", "POST", "/users/eve", {"admin": "yes"}, error(400, "user.admin must be <class 'bool'>, not: <class 'str'>")),
    ("root", "POST", "/users/eve", {"groups": "x"}, error(400, "user.groups must be <class 'list'>, not: <class 'str'>")),
    ("root", "POST", "/users/eve", ["admin"], error(400, "Invalid JSON data: ['admin']")),
    ("root", "POST", "/users/eve%0A", None, error(400, "Invalid username: eve\n")),
    ("root", "POST", f"/users/{LONG}", None, error(400, f"Invalid username: {LONG}")),
    ("root", "POST", "/users/..", None, error(400, "Invalid username: ..")),
    ("ada", "PATCH", "/users/ada", {"admin": True}, FORBIDDEN),
    ("root", "PATCH", "/users/eve", {}, error(404, "No such user: eve")),
    ("root", "PATCH", "/users/ada", None, error(400, "Invalid JSON data: None")),
    ("root", "PATCH", "/users/ada", [], error(400, "Invalid JSON data: []")),
    ("root", "PATCH", "/users/ada", {"nonsense": 1}, error(400, "Invalid JSON keys: nonsense")),
    ("root", "PATCH", "/users/ada", {"groups": []}, error(400, "Invalid JSON keys: groups")),
    ("root", "PATCH", "/users/ada", {"admin": 1}, error(400, "user.admin must be <class 'bool'>, not: <class 'int'>")),
    ("root", "PATCH", "/users/ada", {"auth_state": None},
     error(400, "user.auth_state must be <class 'dict'>, not: <class 'NoneType'>")),
    ("root", "PATCH", "/users/ada", {"name": 5}, error(400, "user.name must be <class 'str'>, not: <class 'int'>")),
    ("root", "PATCH", "/users/ada", {"name": "Bob", "admin": True},
     error(400, "User bob already exists, username must be unique")),
    ("root", "PATCH", "/users/ada", {"name": "", "admin": True}, error(400, "Invalid username: ")),
    ("root", "PATCH", "/users/ada", {"name": "a/b"}, error(400, "Invalid username: a/b")),
    ("ada", "DELETE", "/users/bob", None, FORBIDDEN),
    ("ada", "DELETE", "/users/ada", None, FORBIDDEN),
    ("root", "DELETE", "/users/eve", None, error(404, "No such user: eve")),
    ("root", "DELETE", "/users/ROOT", None, error(400, "Cannot delete yourself!")),
    ("nobody", "GET", "/user", None, MISSING),
    ("ada", "GET", "/users/bob/tokens", None, FORBIDDEN),
    ("root", "GET", "/users/eve/tokens", None, error(404, "No such user: eve")),
    *(("ada", "POST", "/users/ada/tokens", body, error(400, "Body must be a JSON dict or empty"))
      for body in ([], "x", 5, False)),
    ("ada", "POST", "/users/bob/tokens", None, error(403, "Only admins can request tokens for other users")),
    ("ada", "POST", "/users/eve/tokens", None, error(403, "Only admins can request tokens for other users")),
    ("root", "POST", "/users/eve/tokens", None, error(404, "No such user: eve")),
    *(("ada", "POST", "/users/ada/tokens", {"expires_in": value},
       error(400, "expires_in must be a number of seconds greater than 0"))
      for value in (0, -1, -0.5, "60", True, [], {}, 10 ** 30, 1e300)),
    *(("ada", "POST", "/users/ada/tokens", {"note": value}, error(400, "note must be a string"))
      for value in (5, ["x"], {"a": 1}, "\0")),
    ("nobody", "POST", "/users/ada/tokens", None, MISSING),
    *(("nobody", "POST", "/users/ada/tokens", {"auth": value}, MISSING) for value in (None, [], "ada", 1)),
    *(("nobody", "POST", "/users/ada/tokens", {"auth": value}, error(403, "Invalid username or password")) for value in (
        {}, {"username": "ada"}, {"username": "ada", "password": "wrong"}, {"username": "eve", "password": "x"},
        {"username": "bob", "password": password_of("bob")}, {"username": ["ada"], "password": [password_of("ada")]})),
    ("ada", "GET", "/users/ada/tokens/", None, NOT_FOUND),
    *(("ada", method, f"/users/ada/tokens/{token}", None, error(404, f"No such token {token} for user ada"))
      for method in ("GET", "DELETE") for token in ("x1", "a0", "a99", "o1", "1", "a", "a" + "9" * 400, "a-1", "a1x", "a1.0")),
    ("ada", "GET", "/users/ada/tokens/a%C2%B2", None, error(404, "No such token a² for user ada")),
    ("bob", "GET", "/users/ada/tokens/a1", None, FORBIDDEN),
    ("bob", "DELETE", "/users/ada/tokens/a1", None, FORBIDDEN),
    ("root", "DELETE", "/users/eve/tokens/a1", None, error(404, "No such user: eve")),
    ("bob", "POST", "/users/ada/server", None, FORBIDDEN),
    ("root", "POST", "/users/eve/server", None, error(404, "No such user: eve")),
    ("ada", "GET", "/users/ada/server", None, error(405, "Method Not Allowed")),
    ("ada", "GET", "/users/ada/servers/gpu", None, error(405, "Method Not Allowed")),
    ("bob", "DELETE", "/users/ada/server", None, FORBIDDEN),
    ("root", "DELETE", "/users/eve/server", None, error(404, "No such user: eve")),
    ("ada", "DELETE", "/users/ada/server", {"remove": True}, error(400, "Cannot delete the default server")),
    ("ada", "DELETE", "/users/ada/servers/", {"remove": True}, error(400, "Cannot delete the default server")),
    ("ada", "DELETE", "/users/ada/servers/gpu", None, error(404, "ada has no server named 'gpu'")),
    ("ada", "DELETE", "/users/ada/servers/%00", None, error(404, "ada has no server named '\0'")),
    ("ada", "DELETE", "/users/ada/server", {"remove": "yes"},
     error(400, "server.remove must be <class 'bool'>, not: <class 'str'>")),
    ("ada", "DELETE", "/users/ada/server", {"nonsense": 1}, error(400, "Invalid JSON keys: nonsense")),
    ("ada", "POST", "/users/ada/servers/n%201", None,
     error(400, Like(r"Invalid server_name: 'n 1'\. Use up to 63 letters, .*"))),
    ("ada", "POST", "/users/ada/servers/%00", None, error(400, Like(r"Invalid server_name: '\\x00'\. Use .*"))),
    ("bob", "GET", "/users/ada/server/progress", None, FORBIDDEN),
    ("root", "GET", "/users/eve/server/progress", None, error(404, "No such user: eve")),
    ("ada", "GET", "/users/ada/servers/gpu/progress", None, error(404, "ada has no server named 'gpu'")),
    ("ada", "GET", "/users/ada/server/progress", None, error(400, "ada is not starting...")),
    ("bob", "POST", "/users/ada/activity", {"last_activity": "2026-01-01"}, FORBIDDEN),
    ("root", "POST", "/users/eve/activity", {"last_activity": "2026-01-01"}, error(404, "No such user: eve")),
    *(("ada", "POST", "/users/ada/activity", body, error(400, "body must be a json dict")) for body in (None, [], "x", 1)),
    *(("ada", "POST", "/users/ada/activity", body, error(400, "body must contain at least one of `last_activity` or `servers`"))
      for body in ({}, {"activity": "2026-01-01"}, {"servers": {}}, {"last_activity": None}, {"last_activity": ""})),
    *(("ada", "POST", "/users/ada/activity", {"servers": value}, error(
        400, "servers must be a dict of the form {server_name: {last_activity: timestamp}}"))
      for value in (["x"], "x", {"": "2026-01-01"}, {"": {}}, {"": {"last_activity": None}}, {"": None}, {"": [1]})),
    ("ada", "POST", "/users/ada/activity",
     {"servers": {"": {"last_activity": "2026-01-01"}, "gpu": {"last_activity": "2026-01-01"}}},
     error(400, "No such server 'gpu' for user ada")),
    *(("ada", "POST", "/users/ada/activity", {"last_activity": value}, error(400, f"Not a valid timestamp: {value!r}"))
      for value in ("yesterday", 1700000000, True, ["2026-01-01"], "0001-01-01T00:00:00Z")),
    ("ada", "POST", "/users/ada/activity", {"last_activity": "2026-01-01", "servers": {"": {"last_activity": "soon"}}},
     error(400, "Not a valid timestamp: 'soon'")),
    ("ada", "POST", "/users/ada/activity", {"last_activity": "9999-12-31T23:59:59Z"},
     error(400, "Rejecting activity from more than an hour in the future: 9999-12-31T23:59:59Z")),
    ("nobody", "GET", "/authorizations/token/x", None, MISSING),
    ("ada", "GET", "/authorizations/token/x", None, error(404, "No such token, or it has expired")),
    ("ada", "GET", "/authorizations/token/%00%FF", None, error(404, "No such token, or it has expired")),
    ("ada", "GET", "/authorizations/token", None, error(405, "Method Not Allowed")),
    ("nobody", "POST", "/authorizations/token", None, error(403, "Invalid username or password")),
    ("nobody", "POST", "/authorizations/token", {"username": "ada", "password": "wrong"},
     error(403, "Invalid username or password")),
    ("nobody", "POST", "/authorizations/token", ["ada"], error(400, "Body must be a JSON dict or empty")),
    ("ada", "POST", "/authorizations/token", {"username": "bob"}, error(403, "Only admins can request tokens for other users.")),
    ("ada", "POST", "/authorizations/token", {"username": "eve"}, error(403, "Only admins can request tokens for other users.")),
    ("root", "POST", "/authorizations/token", {"username": "eve"}, error(400, "No such user 'eve'")),
    ("root", "POST", "/authorizations/token", {"username": ["ada"]}, error(400, "No such user '['ada']'")),
    ("nobody", "GET", "/authorizations/cookie/jupyterhub-hub-login/x", None, MISSING),
    ("ada", "GET", "/authorizations/cookie/jupyterhub-hub-login/x", None, error(404, "No such cookie, or it has expired")),
    ("ada", "GET", "/authorizations/cookie/jupyterhub-hub-login", None, error(404, "No such cookie, or it has expired")),
    ("ada", "GET", "/authorizations/cookie/%FF/%FF", None, error(404, "No such cookie, or it has expired")),
    ("nobody", "GET", "/nothing/here", None, NOT_FOUND),
    ("root", "GET", "/nothing/here", None, NOT_FOUND),
    ("nobody", "POST", "/", None, error(405, "Method Not Allowed")),
    ("root", "PUT", "/users/ada", None, error(405, "Method Not Allowed")),
    ("root", "DELETE", "/users", None, error(405, "Method Not Allowed")),
]


def everything(hub):
    """All that the hub knows, except when who was last seen."""
    with hub.connected():
        return {model: [{key: value for key, value in row.items() if key != "last_activity"}
                        for row in model.select().order_by(model._meta.primary_key).dicts()]
                for model in (minihub.User, minihub.Server, minihub.Token, minihub.OAuthClient, minihub.Route)}


@pytest.mark.parametrize(("who", "method", "path", "body", "answer"), REFUSED)
def test_a_request_is_refused_and_changes_nothing(hub, spawner, who, method, path, body, answer):
    api = api_of(hub, None if who == "nobody" else who)
    before = everything(hub)
    response = api(method, path, body, status=answer["status"])
    assert (response.json, response.content_type) == (answer, "application/json")
    assert (everything(hub), spawner.launches) == (before, [])


NO_JSON = [b"{", b"\xff", b"nonsense", b"NaN", b'{"admin": Infinity}', b'{"x": 1e999}', b'"\\ud800"', b"1" * 5000,
           b"[" * 100_000,
           b"{} {}", b"\0", b"admin=1"]


@pytest.mark.parametrize(("method", "path"), [
    ("POST", "/users"), ("POST", "/users/eve"), ("PATCH", "/users/ada"), ("POST", "/users/ada/server"),
    ("DELETE", "/users/ada/server"),
    ("POST", "/users/ada/tokens"), ("POST", "/users/ada/activity"), ("POST", "/authorizations/token")])
def test_what_is_no_json_is_refused(root, method, path):
    assert [root(method, path, raw=raw, status="*").json for raw in NO_JSON] == [BAD_JSON] * len(NO_JSON)


def test_deeply_nested_json_is_refused(root, ada):
    nested = functools.reduce(lambda inner, _: [inner], range(minihub.DEPTH_LIMIT), 0)
    ada("POST", "/users/ada/server", nested, status=201)
    assert root("GET", "/users").json[1]["servers"][""]["user_options"] == nested
    ada("DELETE", "/users/ada/server", status=204)
    assert ada("POST", "/users/ada/server", [nested], status=400).json == error(
        400, "Invalid JSON in body of request: it is nested too deeply")


def test_a_huge_body_is_refused(ada):
    options = '"' + "x" * (minihub.BODY_LIMIT - 2)
    ada("POST", "/users/ada/server", raw=f'{options}"'.encode(), status=201)
    assert ada("POST", "/users/ada/server", raw=f'{options}x"'.encode(), status=413).json == error(
        413, f"The body is longer than {minihub.BODY_LIMIT} bytes")


@pytest.mark.parametrize("kind", ["application/json", "application/x-www-form-urlencoded", "text/plain", "nonsense"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_is_read_whatever_it_is_called(root, kind, encoding):
    root("POST", "/users/eve", raw='{"admin": true}'.encode(encoding), status=201, headers={"Content-Type": kind})
    assert root("GET", "/users/eve").json["admin"] is True


@pytest.mark.parametrize("path", ["", "/"])
def test_everybody_can_ask_for_the_version(nobody, path):
    assert nobody("GET", path).json == {"version": "1.5.1"}


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/", 200), ("GET", "/users", 403), ("GET", "/nothing", 404), ("POST", "/", 405), ("POST", "/oauth2/token", 400),
    ("OPTIONS", "/users", 200), ("HEAD", "/users", 405)])
def test_every_answer_of_the_api_has_its_headers(nobody, method, path, status):
    headers = nobody(method, path, status=status).headers
    names = ("X-JupyterHub-Version", "Access-Control-Allow-Headers", "Content-Security-Policy")
    assert {name: headers[name] for name in names} == {
        "X-JupyterHub-Version": "1.5.1", "Access-Control-Allow-Headers": "accept, content-type, authorization",
        "Content-Security-Policy": "frame-ancestors 'self'; default-src 'none'; report-uri /hub/security/csp-report"}


def test_options_are_empty(nobody):
    assert nobody("OPTIONS", "/users/ada/server").body == b""


def test_what_went_wrong_inside_stays_inside(hub, root, monkeypatch):
    monkeypatch.setattr(hub, "list_users", lambda state: 1 / 0)
    response = root("GET", "/users", status=500)
    assert (response.json, response.headers["X-JupyterHub-Version"]) == (error(500, "Internal Server Error"), "1.5.1")


def test_a_database_that_does_not_answer_is_not_the_end(hub, root, monkeypatch):
    def locked(state):
        raise minihub.pw.OperationalError("database is locked: SELECT secret FROM users")

    monkeypatch.setattr(hub, "list_users", locked)
    assert root("GET", "/users", status=503).json == error(503, minihub.NO_DATABASE)
    monkeypatch.undo()
    root("GET", "/users", status=200)


def test_admins_see_what_the_hub_is_made_of(root):
    assert root("GET", "/info").json == {
        "version": "1.5.1", "python": sys.version, "sys_executable": sys.executable,
        "authenticator": {"class": "minihub.PasswordAuthenticator", "version": minihub.__version__},
        "spawner": {"class": f"{FakeSpawner.__module__}.FakeSpawner", "version": "unknown"}}


def test_admins_see_everybody_with_their_servers(hub, root, spawner):
    with hub.connected():
        running(hub, "ada"), running(hub, "ada", "gpu")
        spawner.answers = False
        hub.start(server_of(hub, "bob"), {"cpu": 2}, keep_options=False)
    states = {launch.user.name + launch.name: {"target": Like("http://.*"), "launch": launch.id} for launch in spawner.launches}
    assert root("GET", "/users").json == [
        user("root", admin=True, servers={}, last_activity=MOMENT),
        user("ada", server="/user/ada/", servers={
            "": server(state=states["ada"]), "gpu": server("gpu", state=states["adagpu"])}),
        user("bob", pending="spawn", servers={"": server(
            owner="bob", state=states["bob"], ready=False, pending="spawn", last_activity=None, user_options={"cpu": 2})})]


@pytest.mark.parametrize(("state", "names"), [
    ("active", ["ada", "bob"]), ("ready", ["ada"]), ("inactive", ["root"])])
def test_admins_can_ask_for_users_by_the_state_of_their_servers(hub, root, spawner, state, names):
    with hub.connected():
        running(hub, "ada", "gpu")
        spawner.answers = False
        hub.start(server_of(hub, "bob"))
    assert [model["name"] for model in root("GET", f"/users?state={state}").json] == names


def test_unknown_questions_about_users_are_ignored(root):
    assert len(root("GET", "/users?limit=1&offset=1&nonsense").json) == 3


def test_many_users_are_created_at_once(root):
    created = root("POST", "/users",
                   {"usernames": ["Eve", "ada", "åsa", "eve"], "admin": True, "name": "x", "groups": []}, status=201)
    assert created.json == [user("eve", admin=True), user("åsa", admin=True)]
    assert root("GET", "/users/ada").json["admin"] is False


def test_more_users_than_sqlite_takes_values_are_created_at_once(hub, root):
    with hub.connected():
        if isinstance(hub.database, minihub.pw.SqliteDatabase):
            hub.database.connection().setlimit(9, 600)  # SQLITE_LIMIT_VARIABLE_NUMBER
    assert len(root("POST", "/users", {"usernames": [f"user{number}" for number in range(700)]}, status=201).json) == 700


def test_a_user_is_seen_by_themselves_and_by_admins(hub, root, ada, spawner):
    with hub.connected():
        running(hub)
    state = {"target": Like("http://.*"), "launch": spawner.launches[0].id}
    assert ada("GET", "/users/ada").json == user("ada", server="/user/ada/", servers={"": server()}, last_activity=MOMENT)
    assert root("GET", "/users/ADA").json == user(
        "ada", server="/user/ada/", servers={"": server(state=state)}, last_activity=MOMENT, auth_state=None)


def test_a_user_is_created(root):
    assert root("POST", "/users/Eve", status=201).json == user("eve")
    assert root("POST", "/users/grace", {"admin": True, "name": "x", "groups": [], "auth_state": {}}, status=201).json == user(
        "grace", admin=True)


@pytest.mark.parametrize("name", ["a b", "a@b.example", "李", "a;b=c", "x" * 255, "%", "\N{GRINNING FACE}" * 255])
def test_a_user_can_bear_an_unusual_name(root, name):
    assert root("POST", f"/users/{quote(name, safe='')}", status=201).json["name"] == name
    root("POST", f"/users/{quote(name, safe='')}/server", status=201)
    assert root("GET", f"/users/{quote(name, safe='')}").json["server"] == f"/user/{quote(name, safe='@~')}/"
    root("DELETE", f"/users/{quote(name, safe='')}", status=204)


@pytest.mark.parametrize(("changes", "changed"), [
    ({}, {}), ({"name": "ada"}, {}), ({"name": "Lovelace"}, {"name": "lovelace"}), ({"admin": True}, {"admin": True}),
    ({"auth_state": {"é": [1]}}, {"auth_state": {"é": [1]}})])
def test_a_user_is_changed(root, changes, changed):
    expected = user("ada", **{"auth_state": None, **changed})
    assert root("PATCH", "/users/ada", changes).json == expected
    assert root("GET", f"/users/{expected['name']}").json == {**expected, "servers": {}}


def test_an_admin_can_step_down(root):
    assert root("PATCH", "/users/root", {"admin": False}).json["admin"] is False
    root("GET", "/users", status=403)


def test_a_token_follows_its_user_to_another_name(root, ada):
    root("PATCH", "/users/ada", {"name": "lovelace"})
    assert ada("GET", "/users/lovelace").json["name"] == "lovelace"
    ada("GET", "/users/ada", status=403)


def test_a_user_with_a_running_server_keeps_the_name(root, ada):
    ada("POST", "/users/ada/server", status=201)
    assert root("PATCH", "/users/ada", {"name": "lovelace"}, status=400).json == error(
        400, "Stop the servers of ada before giving them another name")
    assert root("PATCH", "/users/ada", {"admin": True, "name": "ada"}).json["admin"] is True


def test_a_user_is_deleted_with_the_servers(hub, root, spawner):
    root("POST", "/users/ada/server", status=201)
    root("POST", "/users/ada/servers/gpu", status=201)
    assert root("DELETE", "/users/ada", status=204).body == b""
    assert (spawner.running, root("GET", "/users/ada", status=404).json) == ({}, error(404, "No such user: ada"))


def test_a_user_whose_server_is_slow_to_stop_is_deleted_later(root, spawner):
    root("POST", "/users/ada/servers/gpu", status=201)
    spawner.stubborn = True
    assert root("DELETE", "/users/ada", status=400).json == error(
        400, "ada's server is in the process of stopping, please wait.")
    spawner.end_all()
    root("DELETE", "/users/ada", status=204)


def test_everybody_can_ask_who_they_are(ada):
    ada("GET", "/user")
    assert ada("GET", "/user").json == {**user("ada", last_activity=MOMENT), "scopes": [
        "access:servers!user=ada", "read:users:name!user=ada", "read:users:groups!user=ada", "users:activity!user=ada",
        "read:users:activity!user=ada", "read:servers!user=ada", "servers!user=ada", "tokens!user=ada"],
        "session_id": None, "token_id": Like("a[0-9]+")}


def test_a_user_sees_their_tokens(hub, ada, pass_time):
    with hub.connected():
        hub.create_token(hub.find_user("ada"), "short", expires_in=60)
        hub.create_token(hub.find_user("ada"), "long", expires_in=3600)
    oauth_token(hub, "ada")
    pass_time(61)
    ada("GET", "/user")
    tokens = ada("GET", "/users/ada/tokens").json
    assert tokens == {
        "api_tokens": [api_token(note="long", expires_at=MOMENT), api_token(note="Server at /user/ada/"),
                       api_token(note="", last_activity=MOMENT)],
        "oauth_tokens": [{"user": "ada", "id": Like("o[0-9]+"), "kind": "oauth", "oauth_client": "Server at /user/ada/",
                          "created": MOMENT, "last_activity": None, "expires_at": None}]}


def test_a_token_of_ones_own_is_made_and_works(hub, ada):
    made = ada("POST", "/users/ADA/tokens", status=201).json
    assert made == api_token(token=SECRET)
    assert Api(hub, made["token"])("GET", f"/users/ada/tokens/{made['id']}").json == api_token(
        id=made["id"], last_activity=MOMENT)


@pytest.mark.parametrize(("body", "token"), [
    ({"note": "for my phone"}, {"note": "for my phone"}), ({"note": "é" * 5000}, {"note": "é" * 5000}), ({"note": ""}, {}),
    ({"note": None, "expires_in": None, "nonsense": []}, {}), ({"expires_in": 60}, {"expires_at": MOMENT}),
    ({"expires_in": 0.5}, {"expires_at": MOMENT}), ({"expires_in": 10 ** 9}, {"expires_at": MOMENT})])
def test_a_token_is_made_as_wished(ada, body, token):
    assert ada("POST", "/users/ada/tokens", body, status=201).json == api_token(**token, token=SECRET)


def test_a_token_lives_as_long_as_wished(hub, ada, pass_time):
    short = Api(hub, ada("POST", "/users/ada/tokens", {"expires_in": 60}, status=201).json["token"])
    pass_time(59)
    short("GET", "/user")
    pass_time(2)
    short("GET", "/user", status=403)


@pytest.mark.parametrize("body", [None, {"expires_in": 10 ** 9}])
def test_no_token_lives_longer_than_is_set(make_hub, pass_time, body):
    hub = people(make_hub(token_lifetime=3600))
    api = Api(hub, token_for(hub, "ada"))
    made = Api(hub, api("POST", "/users/ada/tokens", body, status=201).json["token"])
    pass_time(3590)
    made("GET", "/user")
    pass_time(20)
    made("GET", "/user", status=403)


def test_an_admin_makes_tokens_for_others(hub, root):
    made = root("POST", "/users/ada/tokens", status=201).json
    assert made == api_token(note="Requested via api by user root", token=SECRET)
    assert Api(hub, made["token"])("GET", "/user").json["name"] == "ada"


def test_a_token_is_made_for_a_password(nobody):
    body = {"auth": {"username": "Ada", "password": password_of("ada")}, "note": "from home"}
    assert nobody("POST", "/users/ada/tokens", body, status=201).json == api_token(note="from home", token=SECRET)


def test_a_password_makes_no_token_for_whom_the_hub_does_not_know(make_hub):
    hub = people(make_hub(authenticator="dummy", password="class secret"))
    body = {"auth": {"username": "eve", "password": "class secret"}}
    assert Api(hub)("POST", "/users/eve/tokens", body, status=403).json == error(403, "Invalid username or password")
    with hub.connected():
        assert hub.get_user("eve") is None


@pytest.mark.parametrize(("path", "body"), [
    ("/users/ada/tokens", lambda password: {"auth": {"username": "ada", "password": password}}),
    ("/authorizations/token", lambda password: {"username": "ada", "password": password})])
def test_passwords_cannot_be_tried_without_end(nobody, pass_time, path, body):
    for _ in range(5):
        nobody("POST", path, body("wrong"), status=403)
    response = nobody("POST", path, body(password_of("ada")), status=429)
    assert response.json == error(429, Like(r"Too many failed sign-ins\. Try again in (299|300) seconds"))
    assert response.headers["Retry-After"] in ("299", "300")
    pass_time(301)
    nobody("POST", path, body(password_of("ada")), status="2*")


def test_a_token_is_revoked(hub, ada):
    made = ada("POST", "/users/ada/tokens", status=201).json
    assert ada("DELETE", f"/users/ada/tokens/{made['id']}", status=204).body == b""
    Api(hub, made["token"])("GET", "/user", status=403)
    assert ada("DELETE", f"/users/ada/tokens/{made['id']}", status=404).json == error(
        404, f"No such token {made['id']} for user ada")


def test_a_token_can_revoke_itself(ada):
    own = ada("GET", "/user").json["token_id"]
    ada("DELETE", f"/users/ada/tokens/{own}", status=204)
    ada("GET", "/user", status=403)


@pytest.mark.parametrize("who", ["bob", "root"])
def test_a_token_belongs_to_its_user(hub, ada, who):
    token = ada("GET", "/user").json["token_id"]
    path = f"/users/{who}/tokens/{token}"
    assert api_of(hub, who)("DELETE", path, status=404).json == error(404, f"No such token {token} for user {who}")
    assert ada("GET", f"/users/ada/tokens/{token}").json["id"] == token


def test_an_expired_token_is_no_token(hub, ada, pass_time):
    made = ada("POST", "/users/ada/tokens", {"expires_in": 60}, status=201).json
    ada("GET", f"/users/ada/tokens/{made['id']}")
    pass_time(61)
    ada("GET", f"/users/ada/tokens/{made['id']}", status=404)
    ada("GET", f"/authorizations/token/{made['token']}", status=404)


def test_revoking_an_oauth_token_revokes_all_for_that_server(hub, root, ada):
    adas, more, roots = oauth_token(hub, "ada"), oauth_token(hub, "ada"), oauth_token(hub, "root", owner="ada")
    other = oauth_token(hub, "ada", owner="bob")
    ada("DELETE", f"/users/ada/tokens/{Api(hub, adas)('GET', '/user').json['token_id']}", status=204)
    statuses = [Api(hub, token)("GET", "/user", status="*").status_int for token in (adas, more, roots, other)]
    assert statuses == [403, 403, 200, 200]


def patient(hub, name="ada"):
    """The API on a host with threads, where a request may wait."""
    return Api(lambda environ, start_response: hub({**environ, "wsgi.multithread": True}, start_response), token_for(hub, name))


def test_a_server_is_started_and_stopped(ada, spawner):
    started = ada("POST", "/users/ada/server", {"cpu": 2}, status=201)
    assert (started.body, started.content_type, spawner.launches[0].user_options) == (b"", "text/plain", {"cpu": 2})
    assert ada("POST", "/users/ada/server", status=400).json == error(400, "ada is already running")
    assert ada("DELETE", "/users/ada/server", status=204).body == b""
    ada("DELETE", "/users/ada/server", status=204)
    assert ada("GET", "/users/ada").json["servers"] == {}


def test_an_admin_starts_and_stops_the_servers_of_others(root, spawner):
    root("POST", "/users/Ada/server", status=201)
    root("DELETE", "/users/Ada/server", status=204)
    assert [launch.user.name for launch in spawner.launches] == ["ada"]


def test_a_start_that_takes_long_goes_on(ada, spawner):
    spawner.answers = False
    response = ada("POST", "/users/ada/server", status=202)
    assert (response.body, response.content_type) == (b"", "text/plain")
    ada("POST", "/users/ada/server", status=202)
    assert (len(spawner.launches), ada("GET", "/users/ada").json["pending"]) == (1, "spawn")
    assert ada("DELETE", "/users/ada/server", status=400).json == error(400, "ada is pending spawn, please wait")


def test_a_host_with_threads_waits_for_a_start(hub, monkeypatch):
    answers = iter([False, False, True])
    monkeypatch.setattr(minihub, "answers_http", lambda target, prefix: next(answers))
    patient(hub)("POST", "/users/ada/server", status=201)


def test_a_host_with_threads_does_not_wait_for_ever(make_hub, spawner):
    spawner.answers = False
    hub = people(make_hub(slow_spawn_timeout=0.06))
    patient(hub)("POST", "/users/ada/server", status=202)


def test_a_host_with_threads_says_why_a_start_failed(hub, spawner, monkeypatch):
    exits, spawner.answers = iter([None, None, 7]), False
    monkeypatch.setattr(spawner, "poll", lambda state: next(exits, 7))
    assert patient(hub)("POST", "/users/ada/server", status=500).json == error(
        500, "ada's server failed to start. The server ended while it started [status=7]" + LOG_TAIL)


@pytest.mark.parametrize(("spoil", "why"), [
    ({"exits_at_once": 1}, "The server ended while it started [status=1]" + LOG_TAIL),
    ({"problem": OSError("disk full")}, "OSError: disk full")])
def test_a_start_that_fails_at_once_is_reported_at_once(ada, spawner, spoil, why):
    vars(spawner).update(spoil)
    assert ada("POST", "/users/ada/server", status=500).json == error(500, f"ada's server failed to start. {why}")
    assert events(ada, "/users/ada/server/progress") == [{"progress": 100, "failed": True, "message": f"Spawn failed: {why}"}]


def test_many_requests_start_one_server(hub, spawner):
    spawner.answers, token = False, token_for(hub, "ada")

    def start(number):
        status = Api(hub, token)("POST", "/users/ada/server", status="*").status_int
        hub.disconnect()
        return status

    assert in_threads(8, start) == [202] * 8
    assert len(spawner.launches) == 1


def test_a_server_that_has_died_is_started_again(ada, spawner):
    ada("POST", "/users/ada/server", status=201)
    ada("GET", "/users/ada")
    spawner.end_all()
    ada("POST", "/users/ada/server", status=201)
    assert len(spawner.launches) == 2


def test_a_stop_that_takes_long_goes_on(ada, spawner):
    ada("POST", "/users/ada/server", status=201)
    spawner.stubborn = True
    response = ada("DELETE", "/users/ada/server", status=202)
    assert (response.body, response.content_type) == (b"", "text/plain")
    ada("DELETE", "/users/ada/server", status=202)
    assert ada("GET", "/users/ada").json["pending"] == "stop"
    assert ada("POST", "/users/ada/server", status=400).json == error(400, "ada is pending stop")
    spawner.end_all()
    ada("DELETE", "/users/ada/server", status=204)
    assert ada("GET", "/users/ada").json["pending"] is None


def test_a_host_with_threads_waits_for_a_stop(hub, spawner, monkeypatch):
    patient(hub)("POST", "/users/ada/server", status=201)
    exits, spawner.stubborn = iter([None, None, None]), True
    monkeypatch.setattr(spawner, "poll", lambda state: next(exits, 0))
    patient(hub)("DELETE", "/users/ada/server", status=204)


@pytest.mark.parametrize(("first", "then", "seen"), [
    ({"cpu": 2}, None, {"cpu": 2}), ({"cpu": 2}, {}, {}), ({"cpu": 2}, [1], [1]), (None, None, None),
    ({"é": "\0"}, None, {"é": "\0"})])
def test_options_are_kept_until_others_are_given(ada, spawner, first, then, seen):
    ada("POST", "/users/ada/server", first, status=201)
    ada("DELETE", "/users/ada/server", status=204)
    ada("POST", "/users/ada/server", then, status=201)
    assert spawner.launches[1].user_options == seen
    assert ada("GET", "/users/ada").json["servers"][""]["user_options"] == (seen or {})


def test_only_so_many_servers_start_at_once(make_hub, spawner):
    spawner.answers = False
    hub = people(make_hub(concurrent_spawn_limit=1))
    api_of(hub, "ada")("POST", "/users/ada/server", status=202)
    response = api_of(hub, "bob")("POST", "/users/bob/server", status=429)
    assert response.json == error(429, "Too many servers are starting just now. Try again in a moment")
    assert response.headers["Retry-After"] == "10"
    api_of(hub, "ada")("POST", "/users/ada/server", status=202)


def test_only_so_many_servers_run(make_hub):
    hub = people(make_hub(active_server_limit=1))
    api_of(hub, "ada")("POST", "/users/ada/server", status=201)
    response = api_of(hub, "bob")("POST", "/users/bob/server", status=429)
    assert response.json == error(429, "The hub runs 1 servers already, which is its limit. Stop one first")
    assert "Retry-After" not in response.headers
    api_of(hub, "ada")("DELETE", "/users/ada/server", status=204)
    api_of(hub, "bob")("POST", "/users/bob/server", status=201)


def test_a_named_server_is_started_stopped_and_removed(ada, spawner):
    ada("POST", "/users/ada/servers/gpu", {"gpu": 1}, status=201)
    assert ada("GET", "/users/ada").json["servers"] == {"gpu": server("gpu", user_options={"gpu": 1})}
    ada("DELETE", "/users/ada/servers/gpu", status=204)
    ada("DELETE", "/users/ada/servers/gpu", status=204)
    ada("DELETE", "/users/ada/servers/gpu", {"remove": True}, status=204)
    assert ada("DELETE", "/users/ada/servers/gpu", status=404).json == error(404, "ada has no server named 'gpu'")


def test_a_running_named_server_is_stopped_before_it_is_removed(ada, spawner):
    ada("POST", "/users/ada/servers/gpu", status=201)
    spawner.stubborn = True
    ada("DELETE", "/users/ada/servers/gpu", {"remove": True}, status=202)
    spawner.end_all()
    ada("DELETE", "/users/ada/servers/gpu", status=204)
    ada("DELETE", "/users/ada/servers/gpu", status=404)


def test_an_empty_name_means_the_default_server(ada):
    ada("POST", "/users/ada/servers/", status=201)
    assert list(ada("GET", "/users/ada").json["servers"]) == [""]
    ada("DELETE", "/users/ada/servers/", status=204)


def test_a_user_has_only_so_many_named_servers(make_hub):
    hub = people(make_hub(named_server_limit=1))
    ada = api_of(hub, "ada")
    ada("POST", "/users/ada/servers/one", status=201)
    ada("DELETE", "/users/ada/servers/one", status=204)
    assert ada("POST", "/users/ada/servers/two", status=400).json == error(
        400, "User ada already has the maximum of 1 named servers.  One must be deleted before a new server can be created")
    ada("POST", "/users/ada/servers/one", status=201)
    ada("POST", "/users/ada/server", status=201)
    api_of(hub, "bob")("POST", "/users/bob/servers/two", status=201)


@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_a_hub_can_do_without_named_servers(make_hub, method):
    hub = people(make_hub(named_servers=False))
    assert api_of(hub, "ada")(method, "/users/ada/servers/gpu", status=400).json == error(400, "Named servers are not enabled.")
    api_of(hub, "ada")("POST", "/users/ada/servers/", status=201)


def events(api, path):
    """The events of a progress stream, of which webtest sees what is known at once."""
    response = api("GET", path)
    assert (response.content_type, response.headers["Cache-Control"]) == ("text/event-stream", "no-cache")
    return [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: ")]


@pytest.mark.parametrize(("place", "url"), [("server", "/user/ada/"), ("servers/gpu", "/user/ada/gpu/")])
def test_the_progress_of_a_server_that_runs_is_complete(ada, place, url):
    ada("POST", f"/users/ada/{place}", status=201)
    assert events(ada, f"/users/ada/{place}/progress") == [{
        "progress": 100, "ready": True, "message": f"Server ready at {url}",
        "html_message": f'Server ready at <a href="{url}">{url}</a>', "url": url}]


def test_the_progress_of_a_server_that_starts_is_asked_for_again(ada, spawner):
    spawner.answers = False
    ada("POST", "/users/ada/server", status=202)
    assert events(ada, "/users/ada/server/progress") == [
        {"progress": 0, "message": "Server requested"}, {"progress": 50, "message": "Spawning server..."}]
    assert ada("GET", "/users/ada/server/progress").text.endswith("\n\nretry: 1000\n\n")


def test_a_server_that_was_stopped_makes_no_progress(ada):
    ada("POST", "/users/ada/server", status=201)
    ada("DELETE", "/users/ada/server", status=204)
    assert ada("GET", "/users/ada/server/progress", status=400).json == error(400, "ada is not starting...")


def last_seen(api):
    """When ada and her servers were last active."""
    model = api("GET", "/users/ada").json
    return {"user": model["last_activity"], **{name: found["last_activity"] for name, found in model["servers"].items()}}


def test_a_server_reports_activity(hub, root, spawner):
    with hub.connected():
        running(hub), running(hub, server_name="gpu")
    its_own = Api(hub, spawner.launches[0].variables["JUPYTERHUB_API_TOKEN"])
    soon = [minihub.isoformat(minihub.now() + timedelta(minutes=minutes)) for minutes in (10, 20, 30)]
    body = {"last_activity": soon[2], "servers": {"": {"last_activity": soon[0]}, "gpu": {"last_activity": soon[1]}}}
    response = its_own("POST", "/users/ada/activity", body)
    assert (response.body, response.content_type) == (b"", "application/json")
    assert last_seen(root) == {"user": soon[2], "": soon[0], "gpu": soon[1]}


def test_activity_only_moves_forward(hub, root, ada):
    with hub.connected():
        running(hub)
        hub.note_visit(hub.find_user("ada"))
    before = last_seen(root)
    old = {"last_activity": "2020-01-01T00:00:00Z"}
    root("POST", "/users/ada/activity", {**old, "servers": {"": old}})
    assert last_seen(root) == before


@pytest.mark.parametrize(("text", "seen"), [
    ("2020-01-01", "2020-01-01T00:00:00Z"), ("2020-01-01T12:00:00", "2020-01-01T12:00:00Z"),
    ("2020-01-01T12:00:00.25+02:00", "2020-01-01T10:00:00.250000Z")])
def test_activity_without_a_zone_is_utc(root, text, seen):
    root("POST", "/users/ada/activity", {"last_activity": text})
    assert root("GET", "/users/ada").json["last_activity"] == seen


def test_a_server_that_never_ran_can_report_activity(ada):
    ada("POST", "/users/ada/activity", {"servers": {"": {"last_activity": "2026-01-01"}}})


def test_clocks_may_differ_by_almost_an_hour(ada, pass_time):
    at = minihub.isoformat(minihub.now() + timedelta(minutes=59, seconds=30))
    assert ada("POST", "/users/ada/activity", {"last_activity": at}, status=400).json == error(
        400, f"Rejecting activity from more than an hour in the future: {at}")
    pass_time(60)
    ada("POST", "/users/ada/activity", {"last_activity": at})


@pytest.mark.parametrize("who", ["bob", "a server"])
def test_whose_a_token_is_can_be_asked_with_any_token(hub, spawner, who):
    with hub.connected():
        running(hub, "bob")
    asking = Api(hub, spawner.launches[0].variables["JUPYTERHUB_API_TOKEN"]) if who == "a server" else api_of(hub, who)
    token = token_for(hub, "ada")
    model = asking("GET", f"/authorizations/token/{token}").json
    assert model == {**user("ada"), "scopes": Api(hub, token)("GET", "/user").json["scopes"], "session_id": None,
                     "token_id": Like("a[0-9]+")}
    assert asking("GET", f"/authorizations/token/{oauth_token(hub, 'ada')}").json["name"] == "ada"
    assert activity(hub, "ada")[0] is not None


def test_whose_a_token_is_cannot_be_asked_by_cookie(hub, browser):
    browser.api("GET", f"/authorizations/token/{token_for(hub, 'ada')}", status=403, Referer=OWN_PAGE)


@pytest.mark.parametrize(("who", "body", "name"), [
    ("ada", None, "ada"), ("ada", {}, "ada"), ("ada", {"username": "ADA"}, "ada"), ("root", {"username": "Ada"}, "ada"),
    ("root", None, "root"),
    (None, {"username": "Ada", "password": password_of("ada")}, "ada")])
def test_the_old_way_to_a_token_still_leads_to_one(hub, who, body, name):
    response = api_of(hub, who)("POST", "/authorizations/token", body)
    last_activity = response.json["user"]["last_activity"]
    assert response.json == {"token": SECRET, "user": user(name, admin=name == "root", last_activity=last_activity),
                             "warning": "/authorizations/token is deprecated in favour of /users/:name/tokens"}
    assert Api(hub, response.json["token"])("GET", "/user").json["name"] == name
    cookies = [cookie.partition("=")[0] for cookie in response.headers.getall("Set-Cookie")]
    assert cookies == ([] if who else ["jupyterhub-hub-login", "jupyterhub-session-id"])


def test_the_old_way_makes_a_user_of_whom_the_authenticator_vouches_for(make_hub):
    hub = people(make_hub(authenticator="dummy", password="class secret"))
    response = Api(hub)("POST", "/authorizations/token", {"username": "Eve", "password": "class secret"})
    assert response.json["user"]["name"] == "eve"


@pytest.mark.parametrize("by_body", [False, True])
def test_whose_a_cookie_is_can_be_asked_with_any_token(browser, bob, by_body):
    value = browser.app.cookies["jupyterhub-hub-login"]
    path = "/authorizations/cookie/jupyterhub-hub-login"
    response = bob("GET", path, raw=value.encode()) if by_body else bob("GET", f"{path}/{quote(value, safe='')}")
    assert (response.json["name"], response.json["kind"]) == ("ada", "user")


def test_whose_a_cookie_is_depends_on_its_name(browser, bob):
    value = quote(browser.app.cookies["jupyterhub-hub-login"], safe="")
    assert bob("GET", f"/authorizations/cookie/jupyterhub-services/{value}", status=404).json == error(
        404, "No such cookie, or it has expired")


########################################################################################################
# 11. OAuth2 provider
########################################################################################################


VERIFIER = "v" * 43
CHALLENGE = minihub.challenge_of(VERIFIER)
PKCE = {"code_challenge": CHALLENGE, "code_challenge_method": "S256"}


class Client:
    """ada's server, as an OAuth client: what it sends browsers to ask, and what it asks itself."""

    def __init__(self, hub, spawner, owner="ada"):
        with hub.connected():
            running(hub, owner)
        variables = spawner.launches[-1].variables
        self.api = Api(hub)
        self.identifier, self.secret = variables["JUPYTERHUB_CLIENT_ID"], variables["JUPYTERHUB_API_TOKEN"]
        self.redirect_uri = variables["JUPYTERHUB_OAUTH_CALLBACK_URL"]

    def authorize(self, **wishes):
        """The path to which a browser is sent; None leaves a parameter out."""
        wishes = {"client_id": self.identifier, "redirect_uri": self.redirect_uri,
                  "response_type": "code", "state": "s", **wishes}
        return f"/oauth2/authorize?{urlencode({name: value for name, value in wishes.items() if value is not None})}"

    def code(self, browser, **wishes):
        """The code that a browser brings back."""
        return answer_of(browser.api("GET", self.authorize(**wishes), status=302))["code"]

    def redeem(self, code, status=200, **fields):
        """The answer to the request for a token."""
        fields = {"client_id": self.identifier, "client_secret": self.secret, "grant_type": "authorization_code", "code": code,
                  "redirect_uri": self.redirect_uri, **fields}
        form = urlencode({name: value for name, value in fields.items() if value is not None})
        return self.api("POST", "/oauth2/token", raw=form.encode(), status=status, headers={
            "Content-Type": "application/x-www-form-urlencoded", "Authorization": f"token {self.secret}"})


@pytest.fixture
def client(hub, spawner):
    return Client(hub, spawner)


def answer_of(response):
    """The parameters with which a browser is sent back to the client."""
    return {name: value for name, [value] in parse_qs(urlsplit(response.location).query).items()}


def test_a_browser_gets_into_its_own_server_at_once(hub, browser, client):
    response = browser.api("GET", client.authorize(**PKCE), status=302)
    assert urlsplit(response.location).path == "/user/ada/oauth_callback"
    assert answer_of(response) == {"code": SECRET, "state": "s"}
    answer = client.redeem(answer_of(response)["code"], code_verifier=VERIFIER)
    scopes = ["access:servers!server=ada/", "read:users:name!user=ada", "read:users:groups!user=ada"]
    assert answer.json == {"access_token": SECRET, "token_type": "Bearer", "expires_in": 1209600, "scope": " ".join(scopes)}
    assert (answer.headers["Cache-Control"], answer.headers["Pragma"]) == ("no-store", "no-cache")
    model = Api(hub, answer.json["access_token"])("GET", "/user").json
    assert (model["name"], model["scopes"], model["session_id"]) == ("ada", scopes, browser.app.cookies["jupyterhub-session-id"])


def test_who_is_not_signed_in_signs_in_first(hub, client):
    browser = Browser(hub)
    response = browser.api("GET", client.authorize(), status=302)
    assert urlsplit(response.location).path == "/hub/login"
    form = browser.app.get(response.location).form
    form["username"], form["password"] = "ada", password_of("ada")
    assert urlsplit(form.submit(status=302).location)._replace(scheme="", netloc="").geturl() == f"/hub/api{client.authorize()}"


def test_an_admin_is_asked_before_entering_somebody_elses_server(hub, client):
    browser = Browser(hub, "root")
    page = browser.api("GET", client.authorize())
    assert (page.content_type, "ada" in page.text) == ("text/html", True)
    response = page.form.submit(status=302)
    answer = client.redeem(answer_of(response)["code"]).json
    assert answer["scope"].split() == ["access:servers!server=ada/", "read:users:name!user=root", "read:users:groups!user=root"]
    assert Api(hub, answer["access_token"])("GET", "/user").json["name"] == "root"


def test_a_yes_must_come_from_the_hubs_own_page(hub, client):
    browser = Browser(hub, "root")
    page = browser.api("GET", client.authorize())
    page.form["_xsrf"] = "forged"
    assert page.form.submit(status=403).content_type == "text/html"


def test_nobody_gets_into_the_server_of_another_student(hub, client):
    for method in ("GET", "POST"):
        response = Browser(hub, "bob").api(method, client.authorize(), status=403)
        assert (response.content_type, response.location) == ("text/html", None)
    assert minihub_rows(hub, minihub.OAuthCode) == 0


def minihub_rows(hub, model):
    with hub.connected():
        return model.select().count()


def test_an_admin_stays_outside_where_that_is_set(make_hub, spawner):
    hub = people(make_hub(admin_access=False))
    client = Client(hub, spawner)
    assert Browser(hub, "root").api("GET", client.authorize(), status=403).content_type == "text/html"
    assert client.code(Browser(hub, "ada")) == SECRET


@pytest.mark.parametrize("wishes", [
    {"client_id": "jupyterhub-user-eve"}, {"client_id": None}, {"client_id": "\0"},
    {"redirect_uri": "/user/ada/oauth_callback/"},
    {"redirect_uri": "/user/ADA/oauth_callback"}, {"redirect_uri": "https://evil.example/user/ada/oauth_callback"},
    {"redirect_uri": ""},
    {"redirect_uri": "/user/ada/oauth_callback?x=1"}])
def test_a_browser_is_never_sent_to_an_unknown_address(browser, client, wishes):
    response = browser.api("GET", client.authorize(**wishes), status=400)
    assert (response.content_type, response.location) == ("text/html", None)


@pytest.mark.parametrize(("wishes", "why"), [
    ({"response_type": "token"}, "unsupported_response_type"), ({"response_type": None}, "unsupported_response_type"),
    ({**PKCE, "code_challenge_method": "plain"}, "invalid_request"), ({"code_challenge": CHALLENGE}, "invalid_request"),
    ({**PKCE, "code_challenge": "short"}, "invalid_request"), ({**PKCE, "code_challenge": "\0" * 43}, "invalid_request")])
def test_a_client_that_asks_wrongly_is_told(browser, client, wishes, why):
    response = browser.api("GET", client.authorize(**wishes), status=302)
    assert urlsplit(response.location).path == "/user/ada/oauth_callback"
    assert answer_of(response) == {"error": why, "state": "s"}


@pytest.mark.parametrize("state", ["eyJ1dWlkIjogIngifQ==", "a b&c=d+e/%", "é\r\nSet-Cookie: x=1", "x" * 2000])
def test_the_state_comes_back_untouched(browser, client, state):
    response = browser.api("GET", client.authorize(state=state), status=302)
    assert answer_of(response) == {"code": SECRET, "state": state}


def test_what_is_not_said_is_not_answered(browser, client):
    path = client.authorize(state=None, redirect_uri=None, scope="nonsense")
    assert answer_of(browser.api("GET", path, status=302)) == {"code": SECRET}


def test_a_code_is_good_once(browser, client):
    code = client.code(browser)
    client.redeem(code)
    assert client.redeem(code, status=400).json == {"error": "invalid_grant", "error_description": "The code is not valid"}


def test_a_code_is_good_for_five_minutes(browser, client, pass_time):
    codes = [client.code(browser), client.code(browser)]
    pass_time(295)
    client.redeem(codes[0])
    pass_time(10)
    assert client.redeem(codes[1], status=400).json["error"] == "invalid_grant"


@pytest.mark.parametrize(("fields", "status", "why"), [
    ({"client_id": "jupyterhub-user-eve"}, 401, "invalid_client"), ({"client_id": None}, 401, "invalid_client"),
    ({"client_id": "\0"}, 401, "invalid_client"), ({"client_secret": "wrong"}, 401, "invalid_client"),
    ({"client_secret": None}, 401, "invalid_client"), ({"code": "wrong"}, 400, "invalid_grant"),
    ({"code": None}, 400, "invalid_grant"),
    ({"redirect_uri": "/user/ada/"}, 400, "invalid_request"), ({"redirect_uri": ""}, 400, "invalid_request"),
    ({"grant_type": "password"}, 400, "unsupported_grant_type"), ({"grant_type": None}, 400, "unsupported_grant_type"),
    ({"code_verifier": None}, 400, "invalid_request"), ({"code_verifier": ""}, 400, "invalid_request"),
    ({"code_verifier": "w" * 43}, 400, "invalid_grant"), ({"code_verifier": "é\0"}, 400, "invalid_grant")])
def test_a_wrong_try_does_not_use_up_the_code(browser, client, fields, status, why):
    code = client.code(browser, **PKCE)
    answer = client.redeem(**{"code": code, "code_verifier": VERIFIER, **fields}, status=status)
    assert answer.json == {"error": why, "error_description": Like(".+")}
    assert client.redeem(code, code_verifier=VERIFIER).json["access_token"] == SECRET


def test_a_wrong_address_is_named(browser, client):
    assert client.redeem(client.code(browser), redirect_uri="/x", status=400).json == {
        "error": "invalid_request", "error_description": "Mismatching redirect URI."}


def test_a_client_without_a_challenge_needs_no_verifier(browser, client):
    client.redeem(client.code(browser))
    client.redeem(client.code(browser), code_verifier=VERIFIER)


def test_a_code_is_good_for_its_client_only(hub, spawner, browser, client):
    code = client.code(browser)
    assert Client(hub, spawner, "bob").redeem(code, status=400).json["error"] == "invalid_grant"
    client.redeem(code)


def test_one_of_many_redeems_a_code(hub, browser, client):
    code = client.code(browser)

    def redeem(number):
        status = client.redeem(code, status="*").status_int
        hub.disconnect()
        return status

    assert sorted(in_threads(4, redeem)) == [200, 400, 400, 400]


def test_a_form_with_too_many_fields_is_refused(browser, client):
    code = client.code(browser)
    client.redeem(code, status=400, **{f"field{number}": "x" for number in range(1000)})
    client.redeem(code, **{f"field{number}": "x" for number in range(900)})


def test_the_token_endpoint_is_for_posts(nobody):
    assert nobody("GET", "/oauth2/token", status=405).json == error(405, "Method Not Allowed")


def test_what_a_sign_in_gave_ends_when_the_server_stops(hub, ada, browser, client):
    token, code = client.redeem(client.code(browser)).json["access_token"], client.code(browser)
    ada("DELETE", "/users/ada/server", status=204)
    assert ada("GET", f"/authorizations/token/{token}", status=404).json == error(404, "No such token, or it has expired")
    assert client.redeem(code, status=401).json["error"] == "invalid_client"
    assert browser.api("GET", client.authorize(), status=400).content_type == "text/html"


def test_what_a_sign_in_gave_ends_with_signing_out(hub, ada, browser, client):
    token, code = client.redeem(client.code(browser)).json["access_token"], client.code(browser)
    elsewhere = client.redeem(client.code(Browser(hub, "ada"))).json["access_token"]
    browser.app.get("/hub/logout", status=302)
    Api(hub, token)("GET", "/user", status=403)
    assert client.redeem(code, status=400).json["error"] == "invalid_grant"
    assert Api(hub, elsewhere)("GET", "/user").json["name"] == ada("GET", "/user").json["name"] == "ada"


def test_signing_out_of_nowhere_ends_nothing(hub, browser, client):
    token = client.redeem(client.code(browser)).json["access_token"]
    stranger = Browser(hub)
    stranger.app.set_cookie("jupyterhub-session-id", browser.app.cookies["jupyterhub-session-id"])
    stranger.app.get("/hub/logout", status=302)
    assert Api(hub, token)("GET", "/user").json["name"] == "ada"


def test_a_named_server_is_a_client_of_its_own(hub, spawner, ada, browser):
    ada("POST", "/users/ada/servers/gpu", status=201)
    variables = spawner.launches[-1].variables
    location = browser.api("GET", "/oauth2/authorize?" + urlencode({
        "client_id": "jupyterhub-user-ada-gpu", "response_type": "code"}), status=302).location
    assert urlsplit(location).path == variables["JUPYTERHUB_OAUTH_CALLBACK_URL"] == "/user/ada/gpu/oauth_callback"


########################################################################################################
# 13. The WSGI application
########################################################################################################


SOURCE = Path(minihub.__file__).read_text()


def section_of(line):
    """The number of the section that a line of minihub.py is in."""
    banners = [(number, re.match(r"# (\d+)\. ", text)) for number, text in enumerate(SOURCE.splitlines(), 1)]
    return [int(banner[1]) for number, banner in banners if banner and number <= line][-1]


def sections_using(name):
    """The numbers of the sections in which a name, or a module's attribute, occurs."""
    found = [node for node in ast.walk(ast.parse(SOURCE))
             if isinstance(node, (ast.Name, ast.Attribute)) and ast.unparse(node) == name]
    return {section_of(node.lineno) for node in found}


@pytest.mark.parametrize(("name", "sections"), [
    ("os.environ", {2}), ("os.getenv", set()), ("subprocess", {6}), ("falcon", {9, 10, 11, 12, 13}), ("pw", {4, 8}),
    ("print", {14})])
def test_a_layer_keeps_to_itself(name, sections):
    assert sections_using(name) == sections


def test_every_responder_says_who_may_ask():
    responders = [node for node in ast.walk(ast.parse(SOURCE))
                  if isinstance(node, ast.FunctionDef) and node.name.startswith("on_")]
    unguarded = [node for node in responders if "needs_" not in "".join(map(ast.unparse, node.decorator_list))]
    silent = [f"{node.name} in line {node.lineno}" for node in unguarded if "Open" not in ast.get_docstring(node)]
    assert responders and silent == []


def test_the_table_of_contents_is_the_files():
    contents = re.findall(r"\b(\d+) ([\w',]+(?: [\w',]+)*)", minihub.__doc__.partition("Contents:")[2])
    banners = re.findall(r"^# (\d+)\. (.+)$", SOURCE, re.MULTILINE)
    assert [(number, title.lower()) for number, title in contents] == [(number, title.lower()) for number, title in banners]
    mine = re.findall(r"^# (\d+)\. (.+)$", Path(__file__).read_text(), re.MULTILINE)
    assert set(mine[1:]) <= set(banners[1:]) and mine == sorted(mine, key=lambda banner: int(banner[0]))


IMPORTING = """
import os, sys, threading
import asyncio, falcon, falcon.routing, itsdangerous, peewee, playhouse.db_url
events, threads = [], threading.active_count()
sys.addaudithook(lambda event, arguments: events.append((event, arguments[:2])))

class Environ(dict):
    def __getitem__(self, key):
        events.append(("environ", key))
        return super().__getitem__(key)
    get = __contains__ = items = __getitem__

os.environ = Environ(os.environ)
import minihub
telling = ("environ", "socket.connect", "socket.bind", "sqlite3.connect", "subprocess.Popen", "os.fork", "os.mkdir")
touched = [(event, arguments) for event, arguments in events
           if event in telling or event == "open" and arguments[1] not in ("r", "rb", None)]
print(touched, threading.active_count() - threads, "app" in vars(minihub))
"""


def test_importing_minihub_does_nothing(tmp_path):
    assert run_python(IMPORTING, tmp_path, MINIHUB_DATABASE="nonsense") == "[] 0 False"
    assert list(tmp_path.iterdir()) == []


APP = """
import minihub
assert minihub.app is minihub.app and isinstance(minihub.app, minihub.Hub)
print(minihub.app.settings.database, minihub.app.settings.admins, hasattr(minihub, "nonsense"))
"""


def test_the_app_is_made_of_variables_when_it_is_asked_for(tmp_path):
    printed = run_python(APP, tmp_path, MINIHUB_DATABASE="sqlite:///my.sqlite", MINIHUB_ADMINS="root")
    assert printed == "sqlite:///my.sqlite ('root',) False"
    assert (tmp_path / "my.sqlite").exists()


def mounted(hub, prefix):
    """The hub below a path of another site, as any WSGI dispatcher does it."""
    def site(environ, start_response):
        assert environ["PATH_INFO"].startswith(prefix)
        return hub({**environ, "SCRIPT_NAME": prefix, "PATH_INFO": environ["PATH_INFO"][len(prefix):]}, start_response)

    return webtest.TestApp(site, extra_environ={"REMOTE_ADDR": "127.0.0.1"}, lint=True)


@pytest.fixture(params=["mounted", "base_url"])
def below(request, make_hub):
    """A hub below /lab, and the site that it is in."""
    hub = people(make_hub(base_url="/lab/" if request.param == "base_url" else "/"))
    return hub, mounted(hub, "/lab") if request.param == "mounted" else webtest.TestApp(hub, lint=True)


def test_a_hub_below_a_path_stays_there(below, spawner):
    hub, site = below
    headers = {"Authorization": f"token {token_for(hub, 'ada')}"}
    site.post("/lab/hub/api/users/ada/server", headers=headers, status=201)
    assert site.get("/lab/hub/api/users/ada", headers=headers, status=200).json == user(
        "ada", server="/lab/user/ada/", last_activity=MOMENT,
        servers={"": server(url="/lab/user/ada/", progress_url="/lab/hub/api/users/ada/server/progress")})
    variables = spawner.launches[0].variables
    assert [variables[f"JUPYTERHUB_{name}"] for name in ("BASE_URL", "SERVICE_PREFIX", "API_URL", "OAUTH_CALLBACK_URL")] == [
        "/lab/", "/lab/user/ada/", "http://127.0.0.1:80/lab/hub/api", "/lab/user/ada/oauth_callback"]
    with hub.connected():
        assert list(hub.proxy.get_all_routes()) == ["/user/ada/"]


def test_a_hub_below_a_path_sends_browsers_there(below):
    hub, site = below
    response = site.get("/lab/hub/home", status=302)
    assert urlsplit(response.location)._replace(scheme="", netloc="").geturl() == "/lab/hub/login?next=%2Flab%2Fhub%2Fhome"
    form = response.follow(status=200).form
    form["username"], form["password"] = "ada", password_of("ada")
    response = form.submit(status=302)
    assert urlsplit(response.location).path == "/lab/hub/home"
    assert re.findall(r"Path=[^;]+", response.headers["Set-Cookie"]) == ["Path=/lab/hub/"]
    assert site.get("/lab/hub/home", status=200).text.count('action="/lab/hub/') > 0


def test_a_servers_way_to_the_hub_is_not_a_clients_to_choose(hub, ada, spawner):
    ada("POST", "/users/ada/server", status=201, headers={"Host": "evil.example", "X-Forwarded-Host": "evil.example"})
    assert spawner.launches[0].variables["JUPYTERHUB_API_URL"] == "http://127.0.0.1:80/hub/api"


@pytest.mark.parametrize("path", ["/nothing", "/hub/nothing", "/hub/users/", "/%FF", "/hub//login"])
def test_people_get_a_page_when_there_is_nothing(hub, path):
    response = webtest.TestApp(hub).get(path, status=404)
    assert (response.content_type, response.headers["X-JupyterHub-Version"]) == ("text/html", "1.5.1")
    assert "Nothing here" in response.text


def test_people_get_a_page_when_the_hub_fails(hub, browser, monkeypatch):
    monkeypatch.setattr(hub, "servers_of", lambda user: 1 / 0)
    response = browser.app.get("/hub/home", status=500)
    assert (response.content_type, "ZeroDivisionError" in response.text) == ("text/html", False)


@pytest.mark.parametrize(("path", "kind", "text"), [
    ("/hub/api/user", "application/json", json.dumps(error(503, minihub.NO_DATABASE))),
    ("/hub/home", "text/plain", minihub.NO_DATABASE)])
def test_without_its_database_the_hub_says_so(hub, monkeypatch, path, kind, text):
    def gone(self):
        raise minihub.pw.OperationalError("could not connect: password=secret")

    monkeypatch.setattr(Hub, "database", property(gone))
    response = webtest.TestApp(hub).get(path, status=503)
    monkeypatch.undo()
    assert (response.content_type, response.text) == (kind, text)
    assert (response.headers["Retry-After"], response.headers["X-JupyterHub-Version"]) == ("5", "1.5.1")


def test_a_hub_ticks_by_itself_after_its_first_request(make_hub, spawner):
    hub = people(make_hub(tick_interval=0.01))
    Api(hub, token_for(hub, "ada"))("POST", "/users/ada/server", status=201)
    spawner.end_all()
    hub._looked_at.clear()

    def is_noticed():
        with hub.connected():
            return hub.get_server(hub.find_user("ada"), "").status == "stopped"

    wait_for(is_noticed)
    hub._ticking.set()


def test_a_hub_that_is_told_to_does_not_tick(hub, nobody):
    before = threading.active_count()
    nobody("GET", "/")
    assert (hub._ticking, threading.active_count()) == (None, before)


########################################################################################################
# 14. Command line
########################################################################################################


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Runs `minihub ...` on a database in the test's folder: the exit status, what it printed, what it complained of."""
    def run(*words):
        status = minihub.main(list(words))
        return (status, *(text.strip() for text in capsys.readouterr()))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIHUB_PUBLIC_URL", "https://hub.example")
    return run


def hub_of(command, make_hub, tmp_path):
    """The hub on the command line's database."""
    return make_hub(database=f"sqlite:///{tmp_path}/minihub.sqlite")


def test_a_link_for_somebody_new_makes_a_user(command, make_hub, tmp_path):
    status, link, complaint = command("link", "Ada")
    assert (status, link, complaint) == (0, Like(r"https://hub\.example/hub/link/\S+"), "")
    hub = hub_of(command, make_hub, tmp_path)
    with hub.connected():
        user = hub.open_link(link.rpartition("/")[2])
        assert (user.name, user.admin) == ("ada", False)


def test_a_link_can_make_an_admin(command, make_hub, tmp_path):
    command("link", "ada")
    assert command("link", "ada", "--admin")[0] == 0
    with (hub := hub_of(command, make_hub, tmp_path)).connected():
        assert hub.find_user("ada").admin


def test_the_command_line_makes_a_token(command, make_hub, tmp_path):
    command("link", "ada")
    status, token, complaint = command("token", "ADA", "--note", "for the backup")
    assert (status, token, complaint) == (0, SECRET, "")
    hub = hub_of(command, make_hub, tmp_path)
    assert Api(hub, token)("GET", "/users/ada/tokens").json["api_tokens"] == [
        api_token(note="for the backup", last_activity=MOMENT)]


@pytest.mark.parametrize(("words", "complaint"), [
    (("token", "eve"), "minihub: No such user: eve"), (("link", "a/b"), "minihub: Invalid username: a/b"),
    (("link", ""), "minihub: Invalid username:")])
def test_the_command_line_says_what_cannot_be(command, words, complaint):
    assert command(*words) == (1, "", complaint)


def test_the_command_line_says_what_is_set_wrong(command, monkeypatch):
    monkeypatch.setenv("MINIHUB_START_TIMEOUT", "soon")
    assert command("link", "ada") == (
        1, "", "minihub: Setting start_timeout (MINIHUB_START_TIMEOUT) must be a number, not 'soon'")


@pytest.mark.parametrize("words", [(), ("nonsense",), ("link",), ("token", "ada", "--nonsense")])
def test_the_command_line_explains_itself(command, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        command(*words)
    assert capsys.readouterr().err.startswith("usage: minihub ")


def test_the_module_is_the_command(tmp_path):
    assert run_python("import runpy, sys; sys.argv[1:] = ['--version']; runpy.run_module('minihub', run_name='__main__')",
                      tmp_path) == f"minihub {minihub.__version__}"
