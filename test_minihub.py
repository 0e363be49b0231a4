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
import dataclasses
import functools
import hashlib
import http.client
import http.server
import itertools
import io
import json
import os
import re
import resource
import secrets
import shlex
import shutil
import signal
import socket
import socketserver
import ssl
import statistics
import struct
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import types
import wsgiref.simple_server
from datetime import timedelta
from pathlib import Path
from random import Random
from urllib.parse import parse_qs, quote, urlencode, urljoin, urlsplit

import pytest
import requests
import webtest
import yaml

import minihub
from minihub import Hub, Settings

HERE = Path(__file__).parent
SINGLEUSER = shutil.which("jupyterhub-singleuser", path=os.pathsep.join([str(Path(sys.executable).parent), os.defpath]))
OPENSSL = shutil.which("openssl")
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
    if "make_database" in metafunc.fixturenames:
        metafunc.parametrize("make_database", databases_for(metafunc), indirect=True)


def databases_for(metafunc):
    """The kinds of database that a test of a hub runs with: both, where it is about what the hub does."""
    section = section_of(metafunc.function.__code__.co_firstlineno, Path(metafunc.module.__file__).read_text())
    marker = metafunc.definition.get_closest_marker("database")
    kinds = marker.args if marker else ("sqlite", "postgres") if section in ON_BOTH_DATABASES else ("sqlite",)
    return [pytest.param(kind, marks=[needs_postgres] if kind == "postgres" else []) for kind in kinds]


ON_BOTH_DATABASES = (4, 8, 10, 11)


@functools.cache
def banners_of(source):
    """The line and the number of each banner."""
    banners = [(number, re.match(r"# (\d+)\. ", text)) for number, text in enumerate(source.splitlines(), 1)]
    return [(number, int(banner[1])) for number, banner in banners if banner]


def wait_for(condition, seconds=20, message="it did not happen"):
    """What the condition returns once that is true; fails the test if it does not come true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    pytest.fail(f"{message() if callable(message) else message} within {seconds} s")


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


def find_postgres(program):
    """Where Debian's PostgreSQL, or one on the PATH, has that program."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: float(folder.parent.name), reverse=True)
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", os.defpath), *map(str, folders)]))


needs_postgres = pytest.mark.skipif(not find_postgres("initdb"), reason="apt-get install postgresql")


class Postgres:
    """A PostgreSQL server of the tests' own, and databases in it that are used again once they are empty."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="minihub-postgres-"))
        self.port = minihub.free_port()
        self.spare = []

    def run(self, program, *words):
        """Run one of PostgreSQL's programs, as somebody else than root, whom it refuses."""
        user = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}
        done = subprocess.run([find_postgres(program), "--pgdata", self.folder / "data", *words], cwd=self.folder,
                              stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **user)
        assert done.returncode == 0, done.stderr

    def start(self):
        """Start it, without what makes it slow and safe."""
        if os.geteuid() == 0:
            shutil.chown(self.folder, "nobody")
        self.run("initdb", "--auth=trust", "--no-sync", "--username=minihub", "--locale=C", "--encoding=UTF8")
        options = (f"-F -p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c full_page_writes=off"
                   " -c max_connections=300")
        self.run("pg_ctl", "--wait", f"--log={self.folder / 'log'}", f"--options={options}", "start")

    def stop(self):
        """End it, and leave nothing."""
        self.run("pg_ctl", "--mode=immediate", "stop")
        shutil.rmtree(self.folder)

    def connect(self, name="postgres"):
        """A connection to a database."""
        connection = pytest.importorskip("psycopg2", reason="pip install '.[postgres]'").connect(
            self.url(name), application_name="tests")
        connection.autocommit = True
        return connection

    def url(self, name):
        """What the setting `database` wants."""
        return f"postgresql://minihub@127.0.0.1:{self.port}/{name}"

    def take(self):
        """The name of a database that nobody else uses and that holds nothing, and a connection to it."""
        if self.spare:
            return self.spare.pop()
        name = f"hub{self.port}_{secrets.token_hex(4)}"
        with contextlib.closing(self.connect()) as connection:
            connection.cursor().execute(f"CREATE DATABASE {name} TEMPLATE template0")
        return name, self.connect(name)

    def give_back(self, name, connection):
        """Empty a database that is not used any more, unless its tables are others now."""
        tables = [model._meta.table_name for model in reversed(minihub.MODELS)]
        end_hubs_of(connection)
        if ask_postgres(connection, "SELECT 1 FROM settings WHERE key = 'schema_version' AND value <> '1'"):
            return
        # TRUNCATE would take twenty times as long
        ask_postgres(connection, "; ".join(f"DELETE FROM {table}" for table in tables)
                  + "; SELECT setval(oid::regclass, 1, false) FROM pg_class WHERE relkind = 'S'")
        self.spare.append((name, connection))


def ask_postgres(connection, query):
    """The rows that a connection to PostgreSQL answers a query with."""
    with connection.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchall()


def end_hubs_of(connection):
    """End all connections of hubs to a PostgreSQL database, and say how many there were."""
    return len(ask_postgres(connection, "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                                        " WHERE datname = current_database() AND application_name <> 'tests'"))


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL server."""
    server = Postgres()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def make_database(request, tmp_path):
    """Makes the address of a new database, of the kind that `pytest_generate_tests` says."""
    def make():
        if request.param == "sqlite":
            return f"sqlite:///{tmp_path}/hub-{secrets.token_hex(4)}.sqlite"
        taken.append(postgres.take())
        return postgres.url(taken[-1][0])

    taken = []
    postgres = request.getfixturevalue("postgres") if request.param == "postgres" else None
    yield make
    for database in taken:
        postgres.give_back(*database)


@pytest.fixture
def make_hub(spawner, tmp_path, make_database):
    """Makes hubs on a database of their own, whose ticker only runs when it is told to."""
    def make(**settings):
        hub = Hub(**{"database": settings.get("database") or make_database(), "spawner": spawner, "tick_interval": 0,
                     "process_variables": {}, "homes": str(tmp_path / "homes"), "run_dir": str(tmp_path / "run"), **settings})
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
        self.write({"version": "echo", "pid": os.getpid(), "sockets": Socket.open_now})

class Echo(tornado.web.RequestHandler):
    """Tells what has reached the server."""
    SUPPORTED_METHODS = (*tornado.web.RequestHandler.SUPPORTED_METHODS, "PROPFIND")
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

class Status(tornado.web.RequestHandler):
    """Answers with the status `?code=`."""
    def get(self):
        self.set_status(int(self.get_argument("code")))

class Socket(tornado.websocket.WebSocketHandler):
    """Says everything back; at "close" closes, at "vanish" ends the connection without a word."""
    open_now = 0
    def check_origin(self, origin):
        return True
    def open(self):
        Socket.open_now += 1
    def on_close(self):
        Socket.open_now -= 1
    def on_message(self, message):
        if message == "close":
            return self.close()
        if message == "vanish":
            return self.ws_connection.stream.close()
        self.write_message(message, isinstance(message, bytes))

async def main():
    prefix = url.path
    tornado.web.Application([(prefix + "api", Api), (prefix + "echo.*", Echo), (prefix + "upload", Upload),
        (prefix + "download", Download), (prefix + "events", Events), (prefix + "socket", Socket),
        (prefix + "status", Status)]).listen(url.port, "127.0.0.1")
    await asyncio.Event().wait()

asyncio.run(main())
'''


GUNICORN = str(Path(sys.executable).with_name("gunicorn"))  # a script, or it could not start itself anew at USR2


class LiveHub:
    """A gunicorn with `minihub:app` in a folder of its own."""

    app, prefix = "minihub:app", ""
    tls = None  # the ssl.SSLContext for one that speaks TLS

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

    @property
    def words(self):
        """The command line."""
        return [GUNICORN, self.app, "--bind", f"127.0.0.1:{self.port}", "--no-control-socket", *self.options]

    def start(self):
        """Start it, and wait until it answers."""
        with open(self.log, "ab") as output:
            self.process = subprocess.Popen(self.words, cwd=self.folder, env=self.environ, stdout=output, stderr=output,
                                            start_new_session=True)
        wait_for(self.is_up, message=lambda: f"the hub did not start: {self.log.read_text()}")
        return self

    def is_up(self):
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.request("GET", f"{self.prefix}/hub/health").status == 200

    def request(self, method, path, body=None, headers=(), timeout=30):
        """The response, read to its end; `.body` is what it held."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        if self.tls:
            connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=timeout, context=self.tls)
        with contextlib.closing(connection):
            connection.request(method, path, body, dict(headers))
            response = connection.getresponse()
            response.body = response.read()
            return response

    def api(self, method, path, token, body=None):
        """The status and the JSON (or None) of an API request."""
        content = None if body is None else json.dumps(body)
        response = self.request(method, f"{self.prefix}/hub/api{path}", content, {"Authorization": f"token {token}"})
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
        return children_of(self.process.pid)

    def stop(self, how=signal.SIGTERM):
        """End gunicorn. Servers go on."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait(60)  # gunicorn gives a worker that it forked in this moment 30 s before it kills it

    def stop_all(self):
        """End gunicorn and whatever it has started."""
        self.stop()
        for supervisor in (self.folder / "run").rglob("*.pid"):
            with contextlib.suppress(OSError, ValueError):  # one that was killed before it had written anything
                os.killpg(int(supervisor.read_text().partition(" ")[0]), signal.SIGKILL)


@pytest.fixture
def live(tmp_path):
    """Starts gunicorns, one after the other in the same folder, with `live("-w", "2", admins="root")`."""
    def start(*options, kind=LiveHub, **settings):
        hub = kind(tmp_path, *options, **settings)
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


def children_of(pid):
    """The ids of the processes that a process has started."""
    return [int(child) for child in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()]


def is_open(port):
    """Whether somebody listens there."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
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
                          env={**os.environ, "CI": ci, "PYTEST_ADDOPTS": "", "PYTHONPATH": str(HERE)})
    assert outcome in done.stdout


########################################################################################################
# 2. Settings
########################################################################################################


WRONG_SETTINGS = {
    "base_url": ("lab", "must start with a slash, not 'lab'"),
    "public_url": ("example.org", "must look like https://host, not 'example.org'"),
    "hub_url": ("localhost:8000", "must look like https://host, not 'localhost:8000'"),
    "authenticator": ("oauth", "must be password, dummy, remote-user or package.module:Class, not 'oauth'"),
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
    ("named_server_limit", None), ("named_server_limit", 1.5), ("concurrent_spawn_limit", 2.0), ("public_url", "https://"), ("public_url", "ftp://example.org"),
    ("hub_url", "http://127.0.0.1:99999"), ("hub_url", "http://[::1"), ("cmd", "jupyterhub-singleuser 'unfinished"),
    ("admins", "root"), ("admins", [1]), ("authenticator", "dummy"), ("authenticator", "json:nothing_there"),
    ("spawner", object()), ("database", "postgresql://me:secret@127.0.0.1:1/hub"), ("database", "sqlite:////no/where/hub")])
def test_a_setting_that_cannot_be_right_is_refused(make_hub, setting, value):
    with pytest.raises(minihub.SettingError) as raised:
        make_hub(**{setting: value})
    assert raised.value.setting in (setting, "password")
    assert "\n" not in str(raised.value) and "secret" not in str(raised.value)


@pytest.mark.parametrize(("settings", "problem"), [
    *[({"user_url": url}, "must look like https://host or https://{username}.host") for url in (
        "nb.example", "https://nb.example/a", "https://{name}.example", "https://nb.{username}", "ftp://nb.example")],
    ({"user_url": "https://nb.example", "public_url": ""}, "needs public_url"),
    ({"user_url": "https://hub.example"}, "must be another host than public_url's and hub_url's"),
    ({"user_url": "https://{username}.example:443"}, "must be another host than public_url's and hub_url's"),
    ({"user_url": "https://HUB.example:8443"}, "must be another host than public_url's and hub_url's"),
    ({"user_url": "http://nb.example:80", "hub_url": "http://nb.example"}, "must be another host than public_url's and hub_url's"),
    ({"user_url": "http://127.0.0.1:8000"}, "must be a host's name: at its IP address servers reach the hub"),
    ({"user_url": "http://10.0.0.1"}, "must be a host's name: at its IP address servers reach the hub"),
    ({"user_url": "https://nb.example", "proxy": "chp"}, "needs the hub's own proxy")])
def test_a_host_for_servers_that_cannot_be_theirs_stops_the_hub(make_hub, settings, problem):
    with pytest.raises(minihub.SettingError, match=f"^Setting user_url .* {re.escape(problem)}"):
        make_hub(**{"public_url": "https://hub.example", **settings})


@pytest.mark.parametrize("places", [
    {"public_url": "https://hub.example", "user_url": "https://nb.example", "hub_url": "http://nb.example:8000"},
    {"public_url": "http://localhost:8000", "user_url": "http://{username}.localhost:8000"},
    {"public_url": "https://hub.nb.example", "user_url": "https://nb.example:8443"}])
def test_a_host_for_servers_needs_only_a_name_of_its_own(places):
    settings = minihub.Settings(**{name: f"{url}/" for name, url in places.items()})
    assert {name: getattr(settings, name) for name in places} == places


@pytest.mark.parametrize(("url", "host", "is_it"), [
    ("https://nb.example", "nb.example", True), ("https://nb.example", "NB.example:443", True), ("https://nb.example:443", "nb.example", True),
    ("http://nb.example", "nb.example:80", True), ("https://nb.example:8443", "nb.example:8443", True), ("https://nb.example", "nb.example:80", False),
    ("https://nb.example", "nbxexample", False), ("https://nb.example", "a.nb.example", False), ("https://nb.example", "nb.example.", False),
    ("https://nb.example:8443", "nb.example", False), ("https://{username}.nb.example", "ada.nb.example", True), ("https://nb.example", "", False),
    ("https://{username}.nb.example", "nb.example", False), ("https://{username}.nb.example", "a.b.nb.example", False)])
def test_a_host_header_asks_for_an_address_or_does_not(url, host, is_it):
    assert minihub.is_host_of(url, host) is is_it


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
    ([{"name": "a", "url": "nowhere"}], "http://host:port"), ([{"name": "a", "url": "http://[::1"}], "http://host:port"),
    ([{"name": "a", "url": "http://a:99999"}], "http://host:port"), ([{"name": "a", "command": "x 'y"}], "matching quotes"), ([{"name": "a", "command": 7}], "words as command"),
    ([{"name": "a", "environment": {"A": 1}}], "strings in command and environment")])
def test_a_wrong_service_stops_the_hub_with_a_sentence(services, sentence):
    with pytest.raises(minihub.SettingError, match=sentence):
        Settings(services=services)


README = (HERE / "README.md").read_text()


def settings_table():
    """The README's table of settings, as the dataclass and its comments have it."""
    source = Path(minihub.__file__).read_text()
    meanings = dict(re.findall(r"^    (\w+): [^#\n]+# (.+)$", source[:source.index("def __post_init__")], re.MULTILINE))
    rows = [(f"`{field.name}`", "" if field.name in minihub.NOT_IN_ENVIRON else f"`MINIHUB_{field.name.upper()}`",
             f"`{written(field.default)}`" if written(field.default) else "", meanings[field.name].replace("|", "\\|"))
            for field in dataclasses.fields(Settings)]
    head = [("keyword", "variable", "default", "meaning"), ("---",) * 4]
    return "\n".join("| " + " | ".join(row) + " |" for row in [*head, *rows])


def written(default):
    """A default as one would write it in a variable."""
    if isinstance(default, bool):
        return str(default).lower()
    return ",".join(default) if isinstance(default, tuple) else "" if default is None else f"{default}"


def test_the_readmes_table_has_every_setting():
    assert settings_table() in README


def test_every_default_in_the_table_can_be_written_as_a_variable():
    variables = {f"MINIHUB_{field.name.upper()}": written(field.default) for field in dataclasses.fields(Settings)
                 if field.name not in minihub.NOT_IN_ENVIRON}
    assert Settings.from_environ(variables) == Settings()


def readme_text(words, kind="python"):
    """The README's example of that kind with those words in it."""
    return next(text for text in re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL) if words in text)


def readme_example(name, words=None):
    """What the README's Python example with that name, or else those words, in it defines under the name."""
    defined = {}
    exec(readme_text(words or name), defined)
    return defined[name]


def test_the_readmes_authenticator_believes_the_site(make_hub):
    pages = webtest.TestApp(make_hub(authenticator=readme_example("SiteUsers")), lint=True)
    assert pages.get("/hub/home", status=200, extra_environ={"REMOTE_USER": "ada"}).html.h1.text == "Hello, ada"
    assert pages.get("/hub/logout", status=302, extra_environ={"REMOTE_USER": "ada"}).headers["Location"] == "/logout"
    pages.get("/hub/home", status=302)


@pytest.mark.parametrize("options, folder", [(None, "/opt/python-course"), ({"course": "statistics"}, "/opt/statistics-course")])
def test_the_readmes_spawner_gives_each_course_its_environment(make_hub, options, folder):
    spawner = make_hub(spawner=readme_example("CourseSpawner")).spawner
    launch = minihub.Launch("id", minihub.User(name="ada", folder="ada"), "", options, "/user/ada/", 1234, {})
    assert spawner.command(launch) == [f"{folder}/bin/jupyterhub-singleuser", "--port=1234"]
    assert spawner.environment(launch)["OMP_NUM_THREADS"] == "2"


def test_the_readmes_proxy_lists_what_runs(make_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = make_hub(proxy=readme_example("ListingProxy"))
    with hub.connected():
        hub.proxy.add_route("/user/ada/", "http://127.0.0.1:1", {})
        hub.proxy.add_route("/user/bob/", "http://127.0.0.1:2", {})
        hub.proxy.delete_route("/user/ada/")
    assert Path("running.txt").read_text() == "/user/bob/"


def test_the_readmes_calls_work_outside_of_requests(spawner, monkeypatch, capsys):
    monkeypatch.setattr(minihub, "Hub", functools.partial(Hub, database="sqlite:///:memory:", spawner=spawner, tick_interval=0))
    hub = readme_example("lab", "lab.start_server")
    with hub.connected():
        assert [user.name for user in hub.list_users()[0]] == ["ada", "grace"]
    assert ([launch.user_options for launch in spawner.launches], spawner.running) == ([{"course": "statistics"}], {})


def test_the_readmes_mount_sends_only_its_own_paths_to_the_hub(tmp_path, monkeypatch):
    def site(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"the site"]

    monkeypatch.chdir(tmp_path)
    application = readme_example("application")
    application.__globals__["site"] = site
    pages, hub = webtest.TestApp(application), application.__globals__["lab"]
    try:
        assert pages.get("/lab/hub/login", status=200).html.h1.text == "Sign in"
        assert pages.get("/lab", status=302).headers["Location"] == "/lab/hub/"
        assert pages.get("/laboratory", status=200).text == "the site"
    finally:
        hub._ticking.set()
        hub.disconnect()


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


@pytest.mark.parametrize(("name", "label"), [
    ("ada", "ada"), ("9", "9"), ("x" * 63, "x" * 63), ("x" * 64, Like("u-[0-9a-f]{16}")), ("Ada", Like("u-[0-9a-f]{16}")),
    ("ada-b", Like("u-[0-9a-f]{16}")), ("a.b", Like("u-[0-9a-f]{16}")), ("é", Like("u-[0-9a-f]{16}")), ("ada\n", Like("u-[0-9a-f]{16}"))])
def test_a_name_has_a_label_in_host_names(name, label):
    assert minihub.host_label(name) == label == minihub.host_label(name)


def test_no_two_names_have_one_label():
    names = [*ODD_NAMES, "ada", "Ada", "u-ada", minihub.host_label("Ada")]
    assert len({minihub.host_label(name) for name in names}) == len(names)


########################################################################################################
# 4. Models
########################################################################################################


@pytest.mark.database("sqlite")
def test_the_database_is_for_the_hubs_user_only(make_hub, tmp_path):
    hub = make_hub(database=f"sqlite:///{tmp_path}/hub.sqlite")
    with hub.connected():
        hub.create_user("ada")
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("hub.sqlite*")}
    assert modes == dict.fromkeys(("hub.sqlite", "hub.sqlite-wal", "hub.sqlite-shm"), 0o600)


@pytest.mark.database("sqlite")
def test_sqlite_is_set_up_for_several_processes(hub):
    with hub.connected():
        pragmas = [hub.database.execute_sql(f"PRAGMA {name}").fetchone()[0]
                   for name in ("journal_mode", "foreign_keys", "busy_timeout")]
    assert pragmas == ["wal", 1, 15000]


def test_the_first_threads_after_a_fork_share_one_database(hub, monkeypatch):
    """Those of a new worker come at the same moment; each was given a database that the next thread's replaced."""
    both, open_database = threading.Barrier(2), minihub.open_database

    def open_at_once(url):
        both.wait(10)
        return open_database(url)

    def use(number):
        with hub.connected():
            hub.check_health()
            return hub.database

    monkeypatch.setattr(minihub, "open_database", open_at_once)
    hub._databases.clear()  # as a child finds it, which has another process id
    first, second = in_threads(2, use)
    assert first is second is hub.database


def test_a_database_of_a_newer_minihub_is_refused(make_hub, make_database):
    url = make_database()
    hub = make_hub(database=url)
    with hub.connected():
        minihub.store("schema_version", len(minihub.MIGRATIONS) + 2)
    with pytest.raises(minihub.SettingError, match="written by a newer minihub"):
        make_hub(database=url)


def test_a_database_of_the_same_minihub_is_opened_again(make_hub, make_database):
    url = make_database()
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


def add_a_column(database):
    """A migration as a later minihub may have one."""
    database.execute_sql("ALTER TABLE groups ADD COLUMN colour VARCHAR(255) NOT NULL DEFAULT 'red'")


def columns_of_groups(hub):
    with hub.connected():
        return [column.name for column in hub.database.get_columns("groups")]


@pytest.mark.database("sqlite")
def test_a_database_of_an_older_minihub_is_upgraded_after_a_copy_was_set_aside(make_hub, tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path}/hub.sqlite"
    people(make_hub(database=url))
    monkeypatch.setattr(minihub, "MIGRATIONS", (add_a_column,))
    assert columns_of_groups(make_hub(database=url)) == ["id", "name", "colour"]
    copy = tmp_path / "hub.sqlite.version-1"
    assert copy.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(minihub, "MIGRATIONS", ())
    old = make_hub(database=f"sqlite:///{copy}")
    with old.connected():
        assert columns_of_groups(old) == ["id", "name"] and old.get_user("ada")


def test_an_upgrade_is_made_once(make_hub, make_database, monkeypatch):
    url = make_database()
    make_hub(database=url)
    monkeypatch.setattr(minihub, "MIGRATIONS", (add_a_column,))
    assert columns_of_groups(make_hub(database=url)) == columns_of_groups(make_hub(database=url))


def test_an_upgrade_that_fails_changes_nothing_and_can_be_tried_again(make_hub, make_database, monkeypatch):
    url = make_database()
    make_hub(database=url)
    monkeypatch.setattr(minihub, "MIGRATIONS", (add_a_column, lambda database: database.execute_sql("nonsense")))
    with pytest.raises(minihub.SettingError, match="nonsense"):
        make_hub(database=url)
    monkeypatch.setattr(minihub, "MIGRATIONS", ())
    assert columns_of_groups(make_hub(database=url)) == ["id", "name"]
    monkeypatch.setattr(minihub, "MIGRATIONS", (add_a_column,))
    assert columns_of_groups(make_hub(database=url)) == ["id", "name", "colour"]


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


@pytest.fixture
def make_site(make_hub):
    """Makes a hub that believes the site it is in, and a browser in which the site says who is there: `{"REMOTE_USER": "ada"}`."""
    def make(environ, **settings):
        hub = make_hub(authenticator="remote-user", **settings)
        return hub, webtest.TestApp(hub, extra_environ={"HTTP_HOST": "localhost:80", **environ}, lint=True)

    return make


def who_is_at(site):
    """The name in the hub's greeting."""
    return site.get("/hub/home", status=200).html.h1.text.removeprefix("Hello, ")


@pytest.mark.parametrize(("given", "name"), [("Ada", "ada"), ("zo\u00eb", "zo\u00eb"), ("zo\u00c3\u00ab", "zo\u00eb")])
def test_the_sites_user_is_the_hubs(make_site, given, name):
    hub, site = make_site({"REMOTE_USER": given})
    assert who_is_at(site) == name
    assert who_is_at(site) == name
    with hub.connected():
        assert [user.name for user in hub.list_users()[0]] == [name]


@pytest.mark.parametrize("environ", [
    {}, {"REMOTE_USER": ""}, {"HTTP_REMOTE_USER": "root"}, {"HTTP_X_REMOTE_USER": "root"}, {"AUTH_USER": "root"}])
def test_a_visitor_whom_the_site_does_not_know_is_nobody(make_site, environ):
    hub, site = make_site(environ)
    assert urlsplit(site.get("/hub/home", status=302).location).path == "/hub/login"
    site.get("/hub/api/user", headers={"Referer": "http://localhost:80/hub/home"}, status=403)
    with hub.connected():
        assert hub.list_users() == ([], 0)


def test_the_sites_variable_can_be_another(make_site):
    _, site = make_site({"REMOTE_USER": "eve", "AUTH_USER": "ada"}, remote_user_variable="AUTH_USER")
    assert who_is_at(site) == "ada"


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"remote_user_variable": "HTTP_X_USER"}, "must be set by the site, and no header of the client's, not 'HTTP_X_USER'"),
    ({"remote_user_variable": "http_x_user"}, "must be set by the site"), ({"remote_user_variable": ""}, "must be set by the site"),
    ({"identify": print, "authenticator": "password"}, "needs the setting authenticator to be remote-user"),
    ({"identify": "site.identify"}, "must be something to call, not 'site.identify'"), ({"on_shutdown": 1}, "must be something to call"),
    ({"login_url": "login"}, "must be a path or https://host/path"), ({"logout_url": "javascript:x"}, "must be a path or")])
def test_settings_about_the_site_that_cannot_be_right_stop_the_hub(settings, sentence):
    with pytest.raises(minihub.SettingError, match=f"^Setting {next(iter(settings))} .* {re.escape(sentence)}"):
        Settings(**{"authenticator": "remote-user", **settings})


def facts_about(site, token):
    """What the API says of the user: admin or not, and in which groups."""
    model = site.get("/hub/api/user", headers={"Authorization": f"token {token}"}, status=200).json
    return model["admin"], model["groups"]


def test_admins_and_groups_follow_the_site_at_each_visit(make_site):
    facts = {}
    hub, site = make_site({"REMOTE_USER": "ada"}, identify=lambda environ: (environ["REMOTE_USER"], facts))
    who_is_at(site)
    token, seen = token_for(hub, "ada"), []
    for said in ({"admin": True, "groups": ["b", "a"]}, {}, {"groups": ["b", "not/a/name"]}, {"admin": False}, {"groups": []}):
        facts.clear()
        facts.update(said)
        who_is_at(site)
        seen.append(facts_about(site, token))
    assert seen == [(True, ["a", "b"]), (True, ["a", "b"]), (True, ["b"]), (False, ["b"]), (False, [])]
    with hub.connected():
        assert [group.name for group in hub.list_groups()] == ["a", "b"]


def test_an_admin_of_the_settings_stays_one_whatever_the_site_says(make_site):
    hub, site = make_site({}, identify=lambda environ: ("root", {"admin": False}), admins=["root"])
    assert "People" in site.get("/hub/home", status=200).text


def test_a_visit_that_changes_nothing_writes_nothing(make_site):
    hub, site = make_site({}, identify=lambda environ: ("ada", {"admin": True, "groups": ["a"]}))
    who_is_at(site)
    with hub.connected():
        before = hub.database.connection().total_changes
        who_is_at(site)
        assert hub.database.connection().total_changes == before


def test_the_first_requests_of_a_new_visitor_may_come_all_at_once(make_hub, tmp_path):
    hub = make_hub(authenticator="remote-user", identify=lambda environ: ("ada", {"admin": True, "groups": ["a", "b"]}),
                   database=f"sqlite:///{tmp_path / 'hub.sqlite'}")
    assert in_threads(8, lambda number: webtest.TestApp(hub).get("/hub/home", status="*").status_int) == [200] * 8
    with hub.connected():
        assert hub.user_models(hub.list_users()[0])[0]["groups"] == ["a", "b"] and hub.list_users()[1] == 1


def test_a_site_user_whose_name_the_hub_cannot_take_is_told(make_site):
    _, site = make_site({"REMOTE_USER": "a/b"})
    response = site.get("/hub/home", status=400)
    assert response.html.find(role="alert").text == "Invalid username: a/b"


def test_a_site_that_cannot_say_who_is_there_shows_nothing_of_what_is_inside(make_site):
    _, site = make_site({}, identify=lambda environ: 1 / 0)
    assert site.get("/hub/home", status=500).html.find(role="alert").text == "Internal Server Error"


def test_where_the_site_signs_people_in_the_hub_has_no_form(make_site):
    hub, site = make_site({})
    page = site.get("/hub/login", status=200)
    assert not page.forms and "Sign in at the site that this hub is a part of" in page.text
    assert not site.post("/hub/login", {"username": "root", "password": "x"}, status=200).forms
    site.post_json("/hub/api/authorizations/token", {"username": "root", "password": "x"}, status=403)


@pytest.mark.parametrize(("login_url", "location"), [
    ("/login", "/login?next=%2Fhub%2Ftoken"), ("https://sso.example/?a=b", "https://sso.example/?a=b&next=%2Fhub%2Ftoken")])
def test_the_way_to_the_sites_login_leads_back(make_site, login_url, location):
    _, site = make_site({}, login_url=login_url)
    assert site.get("/hub/token", status=302).follow(status=302).location == location


def test_a_cookie_of_the_hubs_does_not_outlive_the_sites_sign_in(hub, browser, make_hub, monkeypatch):
    assert is_signed_in(browser.app)
    monkeypatch.setattr(hub, "authenticator", make_hub(authenticator="remote-user").authenticator)
    assert not is_signed_in(browser.app)


def test_signing_out_ends_at_the_site(make_site):
    hub, site = make_site({"REMOTE_USER": "ada"}, logout_url="/goodbye")
    who_is_at(site)
    assert site.get("/hub/logout", status=302).location == "/goodbye"


def test_where_the_site_has_no_page_for_signing_out_the_hub_says_what_is_left_to_do(make_site):
    hub, site = make_site({"REMOTE_USER": "ada"})
    assert "sign out there, too" in " ".join(site.get("/hub/logout", status=200).html.main.text.split())


def test_what_a_site_user_was_given_ends_with_signing_out(make_site):
    hub, site = make_site({"REMOTE_USER": "ada"}, logout_url="/goodbye")
    page = site.get("/hub/home", status=200)
    with hub.connected():
        token, _ = hub.create_token(hub.find_user("ada"), session_id=site.cookies["jupyterhub-session-id"])
        assert page.forms and hub.identify_token(token)
        site.get("/hub/logout", status=302)
        assert hub.identify_token(token) is None


@pytest.mark.parametrize(("headers", "status"), [
    ({}, 403), ({"Referer": "http://evil.example/hub/home"}, 403), ({"Referer": "http://localhost:80/user/bob/"}, 403),
    ({"Referer": "http://localhost:80/hub/home"}, 200)])
def test_the_site_users_own_pages_and_no_others_read_the_api(make_site, headers, status):
    _, site = make_site({"REMOTE_USER": "ada"})
    site.get("/hub/api/user", headers=headers, status=status)


@pytest.mark.parametrize(("right", "status"), [(True, 201), (False, 403)])
def test_the_site_users_own_pages_and_no_others_write_to_the_api(make_site, right, status):
    _, site = make_site({"REMOTE_USER": "ada"})
    xsrf = site.get("/hub/home", status=200).forms[0]["_xsrf"].value
    site.post("/hub/api/users/ada/tokens", headers={"X-XSRFToken": xsrf if right else "x", "Referer": OWN_PAGE}, status=status)


def test_the_people_page_has_no_sign_in_links_where_the_site_signs_people_in(make_site):
    hub, site = make_site({}, identify=lambda environ: ("root", {"admin": True}))
    page = add_people(site, "ada")
    assert "Added" in page.text and "ink" not in page.html.main.text
    with hub.connected(), pytest.raises(minihub.BadRequest, match="People sign in at the site"):
        hub.link_for(hub.find_user("ada"))


def test_a_sign_in_link_of_earlier_days_is_not_good_where_the_site_signs_people_in(hub, make_hub, monkeypatch):
    path = link_of(hub, "ada")
    monkeypatch.setattr(hub, "authenticator", make_hub(authenticator="remote-user").authenticator)
    assert alert_of(pages_of(hub).get(path, status=400)) == [
        "People sign in at the site that this hub is a part of, and not with a link"]


########################################################################################################
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
    line = wait_for(lambda: minihub.command_line(state["pid"]))  # for a moment a new program has none
    assert "sleep" in line and "5ec4e7" not in line


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


def test_a_server_gets_the_signals_that_the_thread_which_started_it_does_not(processes, tmp_path, monkeypatch):
    start = subprocess.Popen  # /bin/sh may unblock them itself, bash does not
    monkeypatch.setattr(minihub.subprocess, "Popen", lambda words, **options: start(["/bin/bash", *words[1:]], **options))
    (tmp_path / "server.py").write_text(SIGNALLED)
    spawner = processes(f"{sys.executable} {tmp_path / 'server.py'} polite")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        state = spawner.start(launch_of())
        assert {signal.SIGINT, signal.SIGTERM} <= signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    log_of(spawner, state, "ready")
    state = spawner.stop(state)
    assert ends_with(spawner, state) == 0


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


@pytest.mark.parametrize("content", ["", "x http://127.0.0.1:1", "0 http://127.0.0.1:1", "-1 http://127.0.0.1:1",
                                     "1 http://127.0.0.1:1", "9" * 30 + " http://127.0.0.1:1", "1 2 3", "\0", None])
def test_nobody_is_signalled_for_a_process_id_that_a_student_has_made_up(processes, monkeypatch, tmp_path, content):
    spawner = processes("sleep 60 {port}", run_dir=str(tmp_path / "planted"))  # where the fixture will not clean up
    launch, signalled = launch_of(), []
    monkeypatch.setattr(os, "killpg", lambda *what: signalled.append(what))
    place = Path(f"{spawner._run_file(launch)}.pid")
    place.parent.mkdir(parents=True)
    place.mkdir() if content is None else place.write_text(content)
    found = spawner.find(launch)
    if found:
        assert spawner.poll(spawner.stop(found, now=True)) == -9
    assert signalled == []


@pytest.mark.parametrize("make", [lambda place: place.write_text("x"), lambda place: place.mkdir(), lambda place: None])
def test_a_process_without_a_readable_exit_status_has_been_killed(processes, make):
    spawner, launch = processes("sleep 60 {port}"), launch_of()
    state = spawner.start(launch)
    spawner.stop(state, now=True)
    make(Path(f"{state['run']}.exit"))
    assert ends_with(spawner, state) == -9


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


def test_servers_end_with_the_hub_where_that_is_set(live, tmp_path):
    hub = start_echo(live, tmp_path, stop_with_hub="yes")
    pid = json.loads(hub.rows("SELECT state FROM servers WHERE status = 'ready'")[0])["pid"]
    hub.stop()
    os.utime(tmp_path / "run" / "heartbeat", (0, 0))
    wait_for(lambda: minihub.process_identity(pid) is None)


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
    wait_for(lambda: through(hub, "/user/ada/api") == 200 == through(hub, "/hub/login"), message="the proxy has no routes")
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


def request_environ(**more):
    """The environ of a request to ada's server, as gunicorn makes it."""
    return {"REQUEST_METHOD": "GET", "SCRIPT_NAME": "", "PATH_INFO": "/user/ada/x", "QUERY_STRING": "",
            "SERVER_PROTOCOL": "HTTP/1.1", "SERVER_NAME": "127.0.0.1", "SERVER_PORT": "8000", "HTTP_HOST": "lab:8000",
            "REMOTE_ADDR": "10.9.8.7", "wsgi.url_scheme": "http", "wsgi.multithread": False, "wsgi.multiprocess": False,
            **more}


def head_of(length=None, protocol="HTTP/1.1", trusted=("127.0.0.1",), **more):
    """The lines of the head that the user's server gets."""
    environ = request_environ(**more)
    head = minihub.request_head(environ, minihub.Client.of(environ, trusted), length, protocol)
    assert head.endswith(b"\r\n\r\n")
    return head.decode("latin-1")[:-4].split("\r\n")


FORWARDED = ["X-Forwarded-For: 10.9.8.7", "X-Forwarded-Proto: http", "X-Forwarded-Host: lab:8000"]


def test_a_request_goes_on_with_its_headers_and_ends_its_connection():
    assert head_of(5, REQUEST_METHOD="POST", HTTP_ACCEPT="*/*", HTTP_X_XSRFTOKEN="a", CONTENT_TYPE="text/plain") == [
        "POST /user/ada/x HTTP/1.1", "Host: lab:8000", "Accept: */*", "X-Xsrftoken: a", "Content-Type: text/plain",
        "Content-Length: 5", *FORWARDED, "Connection: close"]


def test_a_websocket_goes_on_as_one():
    assert head_of(HTTP_CONNECTION="keep-alive, Upgrade", HTTP_UPGRADE="WebSocket", HTTP_SEC_WEBSOCKET_KEY="k") == [
        "GET /user/ada/x HTTP/1.1", "Host: lab:8000", "Sec-Websocket-Key: k", *FORWARDED, "Connection: Upgrade",
        "Upgrade: websocket"]


def test_a_request_of_http_1_0_goes_on_as_one():
    assert head_of(protocol="HTTP/1.0")[0] == "GET /user/ada/x HTTP/1.0"


@pytest.mark.parametrize("header", [
    "CONNECTION", "KEEP_ALIVE", "PROXY_CONNECTION", "PROXY_AUTHENTICATE", "PROXY_AUTHORIZATION", "TE", "TRAILER",
    "TRANSFER_ENCODING", "UPGRADE", "EXPECT", "CONTENT_LENGTH", "X_FORWARDED_PORT", "X_FORWARDED_PREFIX", "X_SCHEME",
    "X_REAL_IP", "FORWARDED"])
def test_what_speaks_of_one_connection_only_stays_here(header):
    assert head_of(**{f"HTTP_{header}": "said by the client"}) == [
        "GET /user/ada/x HTTP/1.1", "Host: lab:8000", *FORWARDED, "Connection: close"]


def test_a_header_that_the_client_ties_to_its_connection_stays_here():
    lines = head_of(HTTP_CONNECTION="close, X-Mine", HTTP_X_MINE="1", HTTP_X_YOURS="2")
    assert "X-Yours: 2" in lines and not any("Mine" in line for line in lines)


@pytest.mark.parametrize("more", [
    {"HTTP_X_A": "1\r\nX-B: 2"}, {"HTTP_X_A": "1\nX-B: 2"}, {"HTTP_X_A": "1\rX-B: 2"}, {"HTTP_X_A": "1\0"},
    {"HTTP_CONTENT_LENGTH ": "5"}, {"HTTP_X_A:": "1"}, {"HTTP_X\tA": "1"}, {"HTTP_X_\u00e9": "1"},
    {"HTTP_HOST": "a\r\nb"}, {"CONTENT_TYPE": "a\nb"}, {"REQUEST_METHOD": "GET\n"}, {"HTTP_COOKIE": "\n"}])
def test_no_header_can_hold_another(more):
    with pytest.raises(minihub.BadRequest):
        head_of(**more)


@pytest.mark.parametrize("path, raw, query, target", [
    ("/user/ada/x", "/user/ada/x", "", "/user/ada/x"),
    ("/user/ada/a/b c\xc3\xa9", "/user/ada/a%2Fb%20c%C3%A9?q=1", "q=1", "/user/ada/a%2Fb%20c%C3%A9?q=1"),
    ("/user/ada/a b", "", "", "/user/ada/a%20b"),
    ("/user/ada/\xc3\xa9", None, "", "/user/ada/%C3%A9"),
    ("/user/ada/x", "http://lab/user/ada/x", "", "/user/ada/x"),
    ("/user/ada/x-y%/..", "/us%65r/%61da/x%2Dy%25/%2e%2e", "", "/user/ada/x-y%25/%2e%2e"),
    ("/user/ada/x", "/user/bob/x", "", "/user/ada/x"),
    ("/user/ada/x y", "/user/ada/x y", "", "/user/ada/x%20y"),
    ("/user/ada/\r\nX: 1", "/user/ada/%0D%0AX:%201", "", "/user/ada/%0D%0AX:%201"),
    ("/user/ada/~!$&'()*+,;=:@", None, "", "/user/ada/~!$&'()*+,;=:@"),
    ("/user/ada/x", "/user/ada/x", "a=%2F&b=+&&c=;~!*'()\"<>[]{}|^`\\", "/user/ada/x?a=%2F&b=+&&c=;~!*'()\"<>[]{}|^`\\"),
    ("/user/ada/x", "/user/ada/x", "a= \r\nX: 1", "/user/ada/x?a=%20%0D%0AX:%201")])
def test_a_path_goes_on_as_it_was_sent(path, raw, query, target):
    more = {} if raw is None else {"RAW_URI": raw}
    assert minihub.request_target(request_environ(PATH_INFO=path, QUERY_STRING=query, **more)) == target


@pytest.mark.parametrize("script, raw, target", [
    ("/lab", "/lab/user/ada/x", "/lab/user/ada/x"), ("/lab", "/la%62/user/ada/x", "/lab/user/ada/x"),
    ("/\xc3\xbc/b", "/%c3%bc/b/user%2fada/%78", "/%C3%BC/b/user%2fada/x"), ("/\xc3\xbc/b", "/%c3%bc%2Fb/user/ada/x", "/%C3%BC/b/user/ada/x"),
    ("/a+b@c", "/a+b%40c/user/ada/x", "/a%2Bb@c/user/ada/x"), ("/a+b", "", "/a%2Bb/user/ada/x")])
def test_the_mount_point_is_a_part_of_the_path_and_spelled_in_one_way(script, raw, target):
    assert minihub.request_target(request_environ(SCRIPT_NAME=script, REQUEST_URI=raw)) == target


@pytest.mark.parametrize("trusted, peer, forwarded, client", [
    ((), "10.0.0.1", {}, ("10.0.0.1", "http", "lab:8000")),
    ((), "10.0.0.1", {"FOR": "6.6.6.6", "PROTO": "https", "HOST": "evil"}, ("10.0.0.1", "http", "lab:8000")),
    (("10.0.0.1",), "10.0.0.1", {"FOR": "6.6.6.6", "PROTO": "https", "HOST": "good"}, ("6.6.6.6", "https", "good")),
    (("10.0.0.0/8",), "10.0.0.1", {"FOR": "7.7.7.7, 6.6.6.6, 10.0.0.9"}, ("6.6.6.6", "http", "lab:8000")),
    (("10.0.0.0/8",), "10.0.0.1", {"FOR": "10.0.0.8, 10.0.0.9"}, ("10.0.0.8", "http", "lab:8000")),
    (("10.0.0.1",), "10.0.0.1", {"PROTO": "https, http", "HOST": "a, b"}, ("10.0.0.1", "http", "b")),
    (("10.0.0.1",), "10.0.0.1", {"PROTO": "javascript", "FOR": " , "}, ("10.0.0.1", "http", "lab:8000")),
    (("10.0.0.1",), "10.0.0.1", {"FOR": "7.7.7.7, unknown"}, ("10.0.0.1", "http", "lab:8000")),
    (("10.0.0.1",), "10.0.0.1", {"FOR": "x" * 1000}, ("10.0.0.1", "http", "lab:8000")),
    (("10.0.0.1",), "10.0.0.1", {"FOR": "<x>, 7.7.7.7"}, ("7.7.7.7", "http", "lab:8000")),
    (("127.0.0.1",), "::ffff:127.0.0.1", {"FOR": "6.6.6.6"}, ("6.6.6.6", "http", "lab:8000")),
    (("::1",), "::1", {"FOR": "2001:db8::1"}, ("2001:db8::1", "http", "lab:8000")),
    (("127.0.0.1",), "", {"FOR": "6.6.6.6"}, ("6.6.6.6", "http", "lab:8000")),
    (("127.0.0.1",), "no address", {"FOR": "6.6.6.6"}, ("no address", "http", "lab:8000"))])
def test_forwarding_headers_are_believed_from_trusted_proxies_only(trusted, peer, forwarded, client):
    environ = request_environ(REMOTE_ADDR=peer, **{f"HTTP_X_FORWARDED_{key}": value for key, value in forwarded.items()})
    assert minihub.Client.of(environ, trusted) == minihub.Client(*client)


def test_a_trusted_proxys_chain_is_continued_and_others_begin_anew():
    said = {"HTTP_X_FORWARDED_FOR": "6.6.6.6", "HTTP_X_FORWARDED_PROTO": "https", "HTTP_X_FORWARDED_HOST": "good"}
    assert head_of(trusted=["10.9.8.7"], **said)[1:] == [
        "Host: good", "X-Forwarded-For: 6.6.6.6, 10.9.8.7", "X-Forwarded-Proto: https", "X-Forwarded-Host: good",
        "Connection: close"]
    assert head_of(trusted=[], **said)[1:] == ["Host: lab:8000", *FORWARDED, "Connection: close"]


@pytest.mark.parametrize("header, left", [
    ("a=1; jupyterhub-hub-login=s; b=2", "a=1; b=2"), ("jupyterhub-hub-login=s", ""), ("", ""),
    ("jupyterhub-services=s;a=1", "a=1"), (" jupyterhub-hub-login = s", ""), ("a=1,jupyterhub-hub-login=s; b=2", "b=2"),
    ("jupyterhub-session-id=1; jupyterhub-user-ada=t", "jupyterhub-session-id=1; jupyterhub-user-ada=t"),
    ("my-jupyterhub-hub-login=1; a=jupyterhub-hub-login", "my-jupyterhub-hub-login=1; a=jupyterhub-hub-login")])
def test_the_hubs_cookies_are_cut_out(header, left):
    assert minihub.strip_cookies(header, minihub.HUB_COOKIES) == left


@pytest.mark.parametrize("header", [
    "Service-Worker-Allowed", "clear-site-data", "NEL", "Report-To", "Alt-Svc", "Strict-Transport-Security"])
def test_a_server_does_not_speak_for_the_whole_site(header):
    head = minihub.ResponseHead.parse(f"HTTP/1.1 200 OK\r\n{header}: x\r\nContent-Security-Policy: y".encode())
    assert head.passed_on() == [("Content-Security-Policy", "y")]


@pytest.mark.parametrize("header", ["X-Accel-Redirect", "x-sendfile", "X-LIGHTTPD-send-file"])
def test_a_server_cannot_make_a_web_server_in_front_send_its_files(header):
    head = minihub.ResponseHead.parse(f"HTTP/1.1 200 OK\r\n{header}: /protected\r\nX-Accel-Buffering: no".encode())
    assert head.passed_on() == [("X-Accel-Buffering", "no")]


@pytest.mark.parametrize("text, hubs", [
    ("jupyterhub-hub-login=x; Path=/hub/", True), ("jupyterhub-services=x", True), ("=jupyterhub-hub-login=x", True),
    (" = jupyterhub-hub-login =x", True), ("jupyterhub-hub-login", True), ("jupyterhub-user-ada=x; Path=/user/ada/", False),
    ("a=jupyterhub-hub-login", False), ("", False)])
def test_the_hubs_cookies_are_recognised_when_a_server_sets_them(text, hubs):
    assert minihub.is_hub_cookie(text) is hubs


@pytest.mark.parametrize("connection, upgrade, websocket", [
    ("Upgrade", "websocket", True), ("keep-alive, upgrade", "WebSocket", True), ("Upgrade", "h2c", False),
    ("close", "websocket", False), ("", "", False)])
def test_a_websocket_is_recognised(connection, upgrade, websocket):
    environ = request_environ(HTTP_CONNECTION=connection, HTTP_UPGRADE=upgrade)
    assert minihub.is_websocket(environ) is websocket


@pytest.mark.parametrize("length, number", [(None, None), ("", None), ("0", 0), ("12", 12)])
def test_a_body_has_the_length_it_says(length, number):
    assert minihub.content_length(request_environ(CONTENT_LENGTH=length)) == number


@pytest.mark.parametrize("length", ["-1", "+5", "5, 5", "0x5", "\u0665", "9" * 19, "5 "])
def test_a_length_that_is_no_number_is_refused(length):
    with pytest.raises(minihub.BadRequest):
        minihub.content_length(request_environ(CONTENT_LENGTH=length))


def test_a_chunked_body_needs_a_host_that_says_where_it_ends():
    with pytest.raises(minihub.BadRequest):
        minihub.spooled_body(request_environ(HTTP_TRANSFER_ENCODING="chunked"))


def test_an_answer_is_read_and_written_again():
    head = minihub.ResponseHead.parse(b"HTTP/1.0 404 Not  There\r\nContent-Length: 3\r\nX-A:b : c \r\nServer:\r\nSet-Cookie: a=1")
    assert head == minihub.ResponseHead(404, "Not  There", (
        ("Content-Length", "3"), ("X-A", "b : c"), ("Server", ""), ("Set-Cookie", "a=1")))
    assert head.encode() == (b"HTTP/1.1 404 Not  There\r\nContent-Length: 3\r\nX-A: b : c\r\nServer: \r\n"
                             b"Set-Cookie: a=1\r\nConnection: close\r\n\r\n")


@pytest.mark.parametrize("line, status, reason", [
    (b"HTTP/1.1 200 OK", 200, "OK"), (b"HTTP/1.1 204", 204, ""), (b"HTTP/1.1 204 ", 204, ""), (b"HTTP/1.0 599 \xe9", 599, "\xe9")])
def test_status_lines_that_are_some(line, status, reason):
    head = minihub.ResponseHead.parse(line)
    assert (head.status, head.reason) == (status, reason)


GARBAGE = {
    "nothing": b"", "much": b"x" * 60000, "text": b"hello", "http 2": b"HTTP/2 200 OK", "http 0.9": b"<html>", "no status": b"HTTP/1.1 OK",
    "long status": b"HTTP/1.1 2000 OK", "status 0": b"HTTP/1.1 099 OK", "bare LF": b"HTTP/1.1 200 OK\r\nA: b\nSet-Cookie: c",
    "bare CR": b"HTTP/1.1 200 OK\r\nA: b\rC: d", "NUL": b"HTTP/1.1 200 OK\r\nA: \0", "folded": b"HTTP/1.1 200 OK\r\nA: b\r\n c",
    "no colon": b"HTTP/1.1 200 OK\r\nA b", "blank in name": b"HTTP/1.1 200 OK\r\nContent-Length : 3",
    "no name": b"HTTP/1.1 200 OK\r\n: 3", "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4",
    "list of lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 3, 3", "negative": b"HTTP/1.1 200 OK\r\nContent-Length: -3"}


@pytest.mark.parametrize("raw", GARBAGE.values(), ids=GARBAGE)
def test_an_answer_that_is_none_is_recognised(raw):
    with pytest.raises(ValueError) as raised:
        minihub.ResponseHead.parse(raw)
    assert len(str(raised.value)) < 300  # it goes to the log


def test_an_answer_loses_what_is_not_for_the_client():
    head = minihub.ResponseHead.parse(
        b"HTTP/1.1 200 OK\r\nConnection: keep-alive, X-Mine\r\nKeep-Alive: 5\r\nX-Mine: 1\r\nX-Yours: 2\r\n"
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\nProxy-Authenticate: x\r\nTrailer: x\r\n"
        b"Set-Cookie: jupyterhub-hub-login=x\r\nSet-Cookie: =jupyterhub-services=x\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2")
    assert head.encode() == (b"HTTP/1.1 200 OK\r\nX-Yours: 2\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\n"
                             b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n")


def test_an_upgrade_is_told_to_the_client():
    head = minihub.ResponseHead.parse(b"HTTP/1.1 101 Up\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: x")
    assert head.encode() == (b"HTTP/1.1 101 Up\r\nSec-WebSocket-Accept: x\r\nConnection: Upgrade\r\n"
                             b"Upgrade: websocket\r\n\r\n")


@pytest.mark.parametrize("method, status, headers, length", [
    ("GET", 200, b"Content-Length: 5", 5), ("GET", 200, b"Server: x", None), ("HEAD", 200, b"Content-Length: 5", 0),
    ("GET", 204, b"Content-Length: 5", 0), ("GET", 304, b"Content-Length: 5", 0), ("POST", 200, b"Content-Length: 0", 0),
    ("GET", 200, b"Content-Length: 5\r\nTransfer-Encoding: chunked", None), ("HEAD", 200, b"Transfer-Encoding: chunked", 0)])
def test_where_an_answer_ends(method, status, headers, length):
    assert minihub.ResponseHead.parse(b"HTTP/1.1 %d OK\r\n%s" % (status, headers)).body_length(method) == length


def test_the_kernel_is_asked_to_notice_peers_that_vanish():
    with socket.socket() as connection:
        minihub.notice_dead_peer(connection)
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
    near, far = socket.socketpair()
    with near, far:
        minihub.notice_dead_peer(near)
        assert near.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def routes_of(hub):
    with hub.connected():
        return {prefix: route["target"] for prefix, route in hub.proxy.get_all_routes().items()}


def test_routes_are_added_replaced_and_deleted(hub):
    with hub.connected():
        hub.proxy.add_route("/user/a@b%20c/", "http://127.0.0.1:1", {"user": "a@b c", "server_name": ""})
        hub.proxy.add_route("/user/bob/", "http://127.0.0.1:2", {"user": "bob", "server_name": ""})
        hub.proxy.add_route("/user/bob/", "http://127.0.0.1:3", {"user": "bob", "server_name": ""})
        assert hub.proxy.get_all_routes() == {
            "/user/a@b%20c/": {"routespec": "/user/a@b%20c/", "target": "http://127.0.0.1:1",
                               "data": {"user": "a@b c", "server_name": ""}},
            "/user/bob/": {"routespec": "/user/bob/", "target": "http://127.0.0.1:3",
                           "data": {"user": "bob", "server_name": ""}}}
        hub.proxy.delete_route("/user/bob/")
        hub.proxy.delete_route("/user/bob/")
    assert routes_of(hub) == {"/user/a@b%20c/": "http://127.0.0.1:1"}


def test_checking_the_routes_makes_them_what_they_should_be(hub):
    with hub.connected():
        for number, name in enumerate(("ada", "bob", "eve")):
            hub.proxy.add_route(f"/user/{name}/", f"http://127.0.0.1:{number}", {})
        right = {f"/user/{name}/": {"target": f"http://127.0.0.1:{number}", "data": {}}
                 for name, number in (("ada", 0), ("bob", 7), ("new", 8))}
        hub.proxy.check_routes(right, hub.proxy.get_all_routes())
    assert routes_of(hub) == {prefix: route["target"] for prefix, route in right.items()}


def test_a_proxy_of_ones_own_needs_three_methods():
    for call in (lambda proxy: proxy.add_route("/", "", {}), lambda proxy: proxy.delete_route("/"),
                 lambda proxy: proxy.get_all_routes()):
        with pytest.raises(NotImplementedError):
            call(minihub.Proxy())


@contextlib.contextmanager
def carrying(folder, *options, kind=LiveHub, **settings):
    """A gunicorn, or another kind of host, in front of ada's echo server, for as long as it is needed."""
    hubs = []

    def start(*options, **settings):
        hubs.append(kind(folder, *options, **settings))
        return hubs[0].start()

    try:
        yield start_echo(start, folder, *options, **settings)
        assert "Traceback" not in hubs[0].log.read_text()
    finally:
        for hub in hubs:
            hub.stop_all()


@pytest.fixture(scope="module")
def carried(tmp_path_factory):
    """ada's echo server behind one sync worker, which gunicorn kills when it is busy for 5 seconds."""
    with carrying(tmp_path_factory.mktemp("carried"), "--timeout", "5") as hub:
        hub.request("GET", "/user/ada/api")  # the first one starts the splicer, which keeps some files open
        yield hub


@pytest.fixture(scope="module")
def carried_by_threads(tmp_path_factory):
    """ada's echo server behind one worker with four threads."""
    with carrying(tmp_path_factory.mktemp("threads"), "--threads", "4") as hub:
        yield hub


@pytest.fixture(scope="module")
def carried_by_uwsgi(tmp_path_factory):
    """ada's echo server behind uWSGI as the README has it."""
    with carrying(tmp_path_factory.mktemp("uwsgi"), kind=InUWSGI) as hub:
        yield hub


@pytest.fixture(params=["carried", "carried_by_threads", "carried_by_uwsgi"])
def either(request):
    """ada's echo server behind each kind of worker."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["carried", "carried_by_threads"])
def either_gunicorn(request):
    """ada's echo server behind each kind of gunicorn's workers, for what uWSGI does otherwise."""
    return request.getfixturevalue(request.param)


class Scripted(socketserver.ThreadingTCPServer):
    """A server that answers everything with the same bytes, then closes or holds on, and notes what it is sent."""

    daemon_threads = allow_reuse_address = True

    def __init__(self, answer, hold=False, reads_bodies=True):
        super().__init__(("127.0.0.1", 0), ScriptedAnswer)
        self.answer, self.hold, self.reads_bodies, self.heard = answer, hold, reads_bodies, []
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class ScriptedAnswer(socketserver.StreamRequestHandler):
    def handle(self):
        head = b"".join(iter(self.rfile.readline, b"\r\n"))
        length = self.server.reads_bodies and re.search(rb"(?i)\ncontent-length: (\d+)", head)
        self.server.heard.append(head + self.rfile.read(int(length[1]) if length else 0))
        with contextlib.suppress(OSError):
            self.wfile.write(self.server.answer)
            if self.server.hold:
                self.rfile.read()


@pytest.fixture
def scripted():
    """Starts servers that answer with certain bytes: `scripted(b"HTTP/1.1 200 OK...")`."""
    def start(answer=b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", **how):
        servers.append(Scripted(answer, **how))
        return servers[-1]

    servers = []
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def lead(live_hub, address, name="bob"):
    """Let a gunicorn send what is for that user's server to an address: routes are rows, so every worker knows at once."""
    hub = Hub(database=f"sqlite:///{live_hub.folder / 'minihub.sqlite'}", tick_interval=0)
    with hub.connected():
        hub.proxy.add_route(f"/user/{name}/", address, {"user": name, "server_name": ""})
    hub.disconnect()


def connect(hub):
    return socket.create_connection(("127.0.0.1", hub.port), timeout=20)


def read_all(connection):
    """What arrives until the other side closes."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def converse(hub, *pieces):
    """The bytes with which these bytes are answered, until the other side closes."""
    with connect(hub) as connection:
        for piece in pieces:
            connection.sendall(piece)
        return read_all(connection)


def echoed(hub, method="GET", path="", body=None, headers=()):
    """What the echo server has got of a request."""
    response = hub.request(method, f"/user/ada/echo{path}", body, headers)
    assert response.status == 200
    return json.loads(response.body)


def websocket_to(hub, path="/user/ada/socket", **options):
    websocket = pytest.importorskip("websocket", reason="pip install '.[test]'")
    scheme, tls = ("wss", {"sslopt": {"context": hub.tls}}) if hub.tls else ("ws", {})
    return websocket.create_connection(f"{scheme}://127.0.0.1:{hub.port}{path}", timeout=20, **tls, **options)


def memory_of(pid):
    """The resident memory of a process in bytes."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) * 1024


def files_of(pid):
    """How many file descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


MEGABYTE = 1024 * 1024


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"])
def test_every_method_arrives_with_its_body(either, method):
    got = echoed(either, method, "/x?y=1", b"b\xf6dy", {"Content-Type": "text/x-mine"})
    assert (got["method"], got["uri"], got["body"]) == (method, "/user/ada/echo/x?y=1", "b\xf6dy")
    assert ["Content-Type", "text/x-mine"] in got["headers"] and ["Content-Length", "4"] in got["headers"]


def test_a_chunked_body_arrives_whole(either):
    got = echoed(either, "POST", body=iter([b"one", b"two" * 100000, b"three"]))
    assert got["body"] == "one" + "two" * 100000 + "three"
    assert ["Content-Length", "300008"] in got["headers"] and "Transfer-Encoding" not in dict(got["headers"])


@pytest.mark.parametrize("body", [b"5\r\nab", b"zz\r\n", b"2\r\nabX"])
def test_a_chunked_body_that_is_broken_reaches_no_server(carried, scripted, body):
    server = scripted()
    lead(carried, server.address)
    with connect(carried) as connection:
        connection.sendall(b"POST /user/bob/api HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
        connection.shutdown(socket.SHUT_WR)
        assert read_all(connection).startswith(b"HTTP/1.1 400")
    assert server.heard == []


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunks"])
def test_an_upload_of_100_mb_takes_no_memory(carried, chunked):
    worker, = carried.workers()
    carried.request("POST", "/user/ada/upload", b"x" * MEGABYTE)
    before, piece = memory_of(worker), os.urandom(MEGABYTE)
    answer = carried.request("POST", "/user/ada/upload", (piece for _ in range(100)),
                             {} if chunked else {"Content-Length": str(100 * MEGABYTE)})
    assert json.loads(answer.body) == {"count": 100 * MEGABYTE, "sha256": hashlib.sha256(piece * 100).hexdigest()}
    assert memory_of(worker) - before < 30 * MEGABYTE


@pytest.mark.parametrize("length", ["", "1"], ids=["chunks", "length"])
def test_a_download_of_100_mb_takes_no_memory(carried, length):
    worker, = carried.workers()
    before = memory_of(worker)
    answer = carried.request("GET", f"/user/ada/download?size={100 * MEGABYTE}&length={length}&piece={MEGABYTE}")
    assert answer.body == b"x" * 100 * MEGABYTE
    assert answer.getheader("Transfer-Encoding") == (None if length else "chunked")
    assert memory_of(worker) - before < 30 * MEGABYTE


def test_head_has_the_headers_of_get_and_no_body(either):
    answer = converse(either, b"HEAD /user/ada/echo HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n") and answer.endswith(b"\r\n\r\n") and answer.count(b"\r\n\r\n") == 1
    assert re.search(rb"\r\nContent-Length: [1-9]", answer)


@pytest.mark.parametrize("code", [204, 304])
def test_an_answer_without_a_body_ends_at_once(either, code):
    answer = converse(either, f"GET /user/ada/status?code={code} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert answer.startswith(f"HTTP/1.1 {code} ".encode()) and answer.endswith(b"Connection: close\r\n\r\n")


def test_events_arrive_when_they_happen(either):
    with connect(either) as connection:
        connection.sendall(b"GET /user/ada/events?count=100&pause=0.2 HTTP/1.1\r\nHost: x\r\n\r\n")
        text = connection.makefile("rb")
        assert b"Content-Type: text/event-stream\r\n" in list(iter(text.readline, b"\r\n"))
        events = [line for line in itertools.islice(text, 12) if line.startswith(b"data:")]
    assert events[:3] == [b"data: 0\n", b"data: 1\n", b"data: 2\n"]


@pytest.mark.parametrize("message", ["caf\u00e9", b"\x00\xff", "x" * MEGABYTE, b"\x00" * MEGABYTE, ""],
                         ids=["text", "bytes", "long text", "long bytes", "nothing"])
def test_websockets_carry_text_and_bytes(either, message):
    with contextlib.closing(websocket_to(either)) as connection:
        connection.send(message, 2 if isinstance(message, bytes) else 1)
        assert connection.recv() == message


def test_a_websocket_that_the_server_closes_closes_at_the_client(either):
    with contextlib.closing(websocket_to(either)) as connection:
        connection.send("close")
        assert connection.recv_data(control_frame=True) == (8, b"")
        assert read_all(connection.sock) == b""
        connection.shutdown()


def test_a_websocket_that_the_server_ends_without_a_word_ends_at_the_client(either):
    with contextlib.closing(websocket_to(either)) as connection:
        connection.send("vanish")
        assert read_all(connection.sock) == b""


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_websocket_that_the_client_ends_ends_at_the_server(either, reset):
    connection = websocket_to(either)
    assert open_sockets(either) == 1
    abandon(connection.sock, reset)
    wait_for(lambda: open_sockets(either) == 0)


def open_sockets(hub):
    """How many websockets ada's server has open."""
    return json.loads(hub.request("GET", "/user/ada/api").body)["sockets"]


def abandon(connection, reset=False):
    """Close a connection, with `reset` so that the other side gets a RST and no end."""
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


UPGRADE = (b"GET /user/%s/socket HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
           b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")


@pytest.mark.parametrize("request_", [UPGRADE % b"bob", b"GET /user/bob/slow HTTP/1.1\r\nHost: x\r\n\r\n",
                                      b"POST /user/bob/x HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf"],
                         ids=["upgrade", "get", "upload"])
def test_a_client_that_leaves_before_it_is_answered_frees_the_server(carried, scripted, request_):
    server = scripted(b"", hold=True)
    lead(carried, server.address)
    worker, = carried.workers()
    before = files_of(worker)
    connection = connect(carried)
    connection.sendall(request_)
    wait_for(lambda: files_of(worker) > before)
    connection.close()
    wait_for(lambda: files_of(worker) == before, message="its connection to the server stays")


def test_what_follows_an_upgrade_is_not_passed_on_when_the_server_declines(carried, scripted):
    server = scripted(b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n")
    lead(carried, server.address)
    answer = converse(carried, UPGRADE % b"bob", b"GET /user/bob/secret HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer == b"HTTP/1.1 403 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    assert len(server.heard) == 1


def test_a_server_that_switches_protocols_unasked_is_not_believed(carried, scripted):
    lead(carried, scripted(b"HTTP/1.1 101 Up\r\nUpgrade: websocket\r\n\r\n").address)
    assert carried.request("GET", "/user/bob/x").status == 503


@pytest.mark.parametrize("path", [
    "/a%2Fb", "/a%20b%C3%A9%00", "/%7Euser/~user", "/a//b/../c/./d", "/a;b=1,c@d:e!$&'()*+", "/?", "/?q=%2F&&x=a+b&=;~",
    "/?q=\"<>[]{}|^`\\%zz%", "?next=/user/ada/?a=b", "/%25%3F%23?%23"])
def test_paths_and_queries_arrive_as_they_were_sent(either_gunicorn, path):
    answer = converse(either_gunicorn, f"GET /user/ada/echo{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["uri"] == f"/user/ada/echo{path}".removesuffix("?")


def test_a_client_of_http_1_0_is_served(either):
    answer = converse(either, b"GET /user/ada/download?size=100000 HTTP/1.0\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"chunked" not in head and body == b"x" * 100000


def test_a_client_that_waits_for_leave_to_send_its_body_gets_it(either_gunicorn):
    with connect(either_gunicorn) as connection:
        connection.sendall(b"POST /user/ada/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"body")
        got = json.loads(read_all(connection).partition(b"\r\n\r\n")[2])
    assert got["body"] == "body" and "Expect" not in dict(got["headers"])


def test_the_connection_ends_with_the_answer(either):
    with connect(either) as connection:
        connection.sendall(b"GET /user/ada/api HTTP/1.1\r\nHost: x\r\nConnection: keep-alive\r\n\r\n")
        assert b"\r\nConnection: close\r\n" in read_all(connection)


def test_a_second_request_on_a_connection_is_never_passed_on(either, scripted):
    server = scripted()
    lead(either, server.address)
    answer = converse(either, *[b"POST /user/bob/%d HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody"
                                b"POST /user/bob/%d HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nBODY" % (1, 2)])
    assert answer.count(b"HTTP/1.1") == 1
    either.request("GET", "/user/bob/3")
    assert [heard.split()[1] for heard in server.heard] == [b"/user/bob/1", b"/user/bob/3"]


SMUGGLED = {
    "both lengths": b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /user/bob/secret HTTP/1.1\r\n\r\n",
    "two lengths": b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nbody",
    "a list of lengths": b"Content-Length: 4, 4\r\n\r\nbody",
    "a signed length": b"Content-Length: +4\r\n\r\nbody",
    "another coding": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "two codings": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "a blank in a name": b"Content-Length : 4\r\n\r\nbody",
    "a folded header": b"X-A: b\r\n Content-Length: 4\r\n\r\nbody",
    "a bare CR": b"X-A: b\rContent-Length: 4\r\n\r\nbody",
    "a bare LF": b"X-A: b\nContent-Length: 4\r\n\r\nbody",
    "a NUL": b"X-A: \0\r\n\r\n",
    "two hosts": b"Host: y\r\n\r\n"}


@pytest.mark.parametrize("rest", SMUGGLED.values(), ids=SMUGGLED)
def test_a_request_that_can_be_read_in_two_ways_reaches_no_server(carried, scripted, rest):
    server = scripted()
    lead(carried, server.address)
    answer = converse(carried, b"POST /user/bob/x HTTP/1.1\r\nHost: x\r\n" + rest)
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 501 ")) and answer.count(b"HTTP/1.1") == 1
    assert server.heard == []


def test_a_header_with_an_underscore_is_not_taken_for_another(carried):
    headers = dict(echoed(carried, headers={
        "X_Forwarded_For": "6.6.6.6", "Content_Length": "5", "Transfer_Encoding": "chunked", "X_Mine": "1"})["headers"])
    assert headers["X-Forwarded-For"] == "127.0.0.1"
    assert not {"X-Mine", "X_mine", "Content-Length", "Transfer-Encoding"} & headers.keys()


def test_what_is_said_of_one_connection_is_not_passed_on(carried):
    headers = dict(echoed(carried, headers={
        "Connection": "keep-alive, X-Mine", "Keep-Alive": "5", "X-Mine": "1", "TE": "trailers", "Upgrade": "h2c",
        "Proxy-Authorization": "x", "X-Yours": "2"})["headers"])
    assert headers == {"Host": f"127.0.0.1:{carried.port}", "Accept-Encoding": "identity", "X-Yours": "2",
                       "X-Forwarded-For": "127.0.0.1", "X-Forwarded-Proto": "http",
                       "X-Forwarded-Host": f"127.0.0.1:{carried.port}", "Connection": "close"}


def test_the_server_learns_from_a_trusted_proxy_who_the_client_is(carried):
    headers = dict(echoed(carried, headers={
        "X-Forwarded-For": "6.6.6.6", "X-Forwarded-Proto": "https", "X-Forwarded-Host": "lab.example.org"})["headers"])
    assert (headers["X-Forwarded-For"], headers["X-Forwarded-Proto"], headers["X-Forwarded-Host"], headers["Host"]) == (
        "6.6.6.6, 127.0.0.1", "https", "lab.example.org", "lab.example.org")


def test_the_hubs_cookies_do_not_reach_a_server_and_it_cannot_set_them(either):
    answer = either.request("GET", "/user/ada/echo", headers={
        "Cookie": "jupyterhub-hub-login=secret; jupyterhub-session-id=1; jupyterhub-services=secret; mine=2"})
    got = json.loads(answer.body)
    assert dict(got["headers"])["Cookie"] == "jupyterhub-session-id=1; mine=2"
    assert answer.headers.get_all("Set-Cookie") == ["mine=1; Path=/user/"]


def test_without_the_hubs_cookies_there_is_no_cookie_header(carried):
    assert "Cookie" not in dict(echoed(carried, headers={"Cookie": "jupyterhub-hub-login=secret"})["headers"])


def test_the_sites_cookies_do_not_reach_a_server(either):
    cookies = [*minihub.SITE_COOKIES, "jupyterhub-hub-login", "jupyterhub-services"]
    got = echoed(either, headers={"Cookie": "; ".join(f"{name}=secret" for name in cookies) + "; _xsrf=1; sessions=2"})
    assert dict(got["headers"])["Cookie"] == "_xsrf=1; sessions=2" and "secret" not in json.dumps(got["headers"])


def test_no_secret_of_the_hubs_is_in_a_servers_environment(carried):
    environ = echoed(carried)["environ"]
    assert not [name for name in environ if name.startswith(("MINIHUB_", "PYTEST"))]
    assert (environ["JUPYTERHUB_USER"], environ["HOME"]) == ("ada", str(carried.folder / "homes" / "ada"))
    assert carried.api("GET", "/user", environ["JUPYTERHUB_API_TOKEN"])[1]["name"] == "ada"


@pytest.mark.parametrize("scheme", ["token", "Bearer"])
def test_a_token_of_the_hubs_is_exchanged_for_one_that_is_good_for_this_server_only(carried, scheme):
    got = echoed(carried, headers={"Authorization": f"{scheme} {carried.token}"})
    seen = dict(got["headers"])["Authorization"].split()[1]
    assert carried.token not in json.dumps(got)
    assert carried.api("GET", "/user", seen)[1]["name"] == "ada"
    assert carried.api("GET", "/users/ada", seen)[0] == 403


def test_a_token_of_the_hubs_in_the_query_is_exchanged_too(carried):
    got = echoed(carried, path=f"?a=1&token={carried.token}&b=%2F")
    match = re.fullmatch(r"/user/ada/echo\?a=1&token=(\w+)&b=%2F", got["uri"])
    assert carried.token not in json.dumps(got) and carried.api("GET", "/user", match[1])[1]["name"] == "ada"


def test_a_token_of_somebody_who_may_not_enter_is_taken_away(carried):
    carried.command("link", "eve")
    token = carried.command("token", "eve")
    got = echoed(carried, path=f"?token={token}", headers={"Authorization": f"token {token}"})
    assert (dict(got["headers"]).get("Authorization"), got["uri"]) == (None, "/user/ada/echo?token=")


@pytest.mark.parametrize("value", ["token abc", "Bearer abc", "Basic YWRhOnNlY3JldA=="])
def test_credentials_that_are_not_the_hubs_are_passed_on(carried, value):
    got = echoed(carried, path="?token=a%62c", headers={"Authorization": value})
    assert (dict(got["headers"])["Authorization"], got["uri"]) == (value, "/user/ada/echo?token=a%62c")


BROKEN = {
    "nothing": b"", "no HTTP": b"SSH-2.0-OpenSSH\r\n\r\n", "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "endless head": b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 20000,
    "hidden header": b"HTTP/1.1 200 OK\r\nX-A: b\nSet-Cookie: jupyterhub-hub-login=x\r\nContent-Length: 0\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok"}


@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN)
def test_a_server_that_answers_no_http_gets_a_page_that_says_so(carried, scripted, answer):
    lead(carried, scripted(answer).address)
    page = carried.request("GET", "/user/bob/lab", headers={"Accept": "text/html"})
    assert (page.status, page.getheader("Content-Type")) == (503, "text/html; charset=utf-8")
    assert b"This server does not answer just now" in page.body


def test_a_program_is_told_in_json(carried, scripted):
    lead(carried, scripted(b"").address)
    answer = carried.request("GET", "/user/bob/api/status")
    assert (answer.status, answer.getheader("Content-Type")) == (503, "application/json; charset=utf-8")
    assert json.loads(answer.body)["status"] == 503 and answer.getheader("X-JupyterHub-Version") == minihub.API_VERSION


def test_a_head_request_is_told_without_a_body(carried, scripted):
    lead(carried, scripted(b"").address)
    answer = converse(carried, b"HEAD /user/bob/lab HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 503 ") and answer.endswith(b"Connection: close\r\n\r\n")


def test_where_nobody_listens_the_answer_is_503(carried):
    lead(carried, f"http://127.0.0.1:{minihub.free_port()}")
    assert carried.request("POST", "/user/bob/x", b"body").status == 503
    assert carried.request("GET", "/user/bob/socket", headers={"Connection": "Upgrade", "Upgrade": "websocket"}).status == 503


def test_an_answer_that_breaks_off_breaks_off_for_the_client_too(carried, scripted):
    lead(carried, scripted(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf").address)
    with pytest.raises(http.client.IncompleteRead):
        carried.request("GET", "/user/bob/x")


def test_interim_answers_are_not_taken_for_the_final_one(carried, scripted):
    lead(carried, scripted(b"HTTP/1.1 100 Go on\r\n\r\nHTTP/1.1 103 Hints\r\nLink: x\r\n\r\n"
                           b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokmore than it said").address)
    assert converse(carried, b"GET /user/bob/x HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n")


def test_an_answer_that_comes_before_the_body_is_complete_arrives(carried, scripted):
    lead(carried, scripted(b"HTTP/1.1 413 Too large\r\nContent-Length: 0\r\n\r\n", reads_bodies=False).address)
    with connect(carried) as connection:
        connection.sendall(b"PUT /user/bob/x HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\n" + b"x" * 100000)
        assert read_all(connection) == b"HTTP/1.1 413 Too large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def test_without_a_server_people_go_to_the_hubs_page_and_programs_get_503(carried):
    page = carried.request("GET", "/user/nemo/lab/tree/a%20b?x=%2F", headers={"Accept": "text/html"})
    assert (page.status, page.getheader("Location")) == (302, "/hub/user/nemo/lab/tree/a%20b?x=%2F")
    for method, path, headers in (("GET", "/user/nemo/api/status", {}), ("POST", "/user/nemo/x", {}),
                                  ("GET", "/user/nemo/x", {"Accept": "application/json"})):
        answer = carried.request(method, path, headers=headers)
        assert answer.status == 503
        assert "JupyterHub server no longer running at /user/nemo/" in json.loads(answer.body)["message"]


def test_a_server_that_is_killed_is_missed_at_once(echo):
    pid = json.loads(echo.request("GET", "/user/ada/api").body)["pid"]
    os.killpg(os.getpgid(pid), signal.SIGKILL)
    wait_for(lambda: minihub.process_identity(pid) is None)
    answers = {echo.request("GET", "/user/ada/lab", headers={"Accept": "text/html"}).status,
               echo.request("GET", "/user/ada/api").status}
    assert answers <= {503, 302}
    wait_for(lambda: echo.api("GET", "/users/ada", echo.token)[1]["servers"] == {})
    wait_for(lambda: not is_in_proc(pid), message="a zombie stays")


def test_servers_outlive_the_hub_and_are_found_again_and_stopped(echo):
    before = json.loads(echo.request("GET", "/user/ada/api").body)["pid"]
    workers = echo.workers()
    echo.process.kill()
    echo.process.wait()
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    assert minihub.process_identity(before)
    echo.start()
    assert echo.api("GET", "/users/ada", echo.token)[1]["servers"][""]["ready"]
    assert json.loads(echo.request("GET", "/user/ada/api").body)["pid"] == before
    assert echo.api("DELETE", "/users/ada/server", echo.token)[0] in (202, 204)
    wait_for(lambda: minihub.process_identity(before) is None, message="the new hub does not stop the old server")
    assert wait_for(lambda: echo.api("GET", "/users/ada", echo.token)[1]["servers"] == {})


def test_200_websockets_leave_a_sync_worker_free(carried):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(contextlib.closing(websocket_to(carried))) for _ in range(200)]
        times = []
        for turn in range(40):
            for number, connection in enumerate(sockets):
                connection.send(f"{turn}.{number}")
            began = time.perf_counter()
            assert carried.request("GET", "/hub/api/").status == 200
            times.append(time.perf_counter() - began)
            assert [connection.recv() for connection in sockets] == [f"{turn}.{number}" for number in range(200)]
        assert open_sockets(carried) == 200
    assert statistics.median(times) < 0.05
    wait_for(lambda: open_sockets(carried) == 0)


def test_streams_longer_than_the_timeout_do_not_hold_a_sync_worker(carried):
    worker, = carried.workers()
    answers = {}

    def fetch(path):
        answers[path] = carried.request("GET", f"/user/ada/{path}").body

    events, download = "events?count=14&pause=0.5", "download?size=1400&piece=100&pause=0.5"
    threads = [threading.Thread(target=fetch, args=(path,)) for path in (events, download)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        asked = time.monotonic()
        assert carried.request("GET", "/hub/api/").status == 200
        assert time.monotonic() - asked < 2
        threads[0].join(0.1)
    assert time.monotonic() - began > 5
    assert answers[events] == b"".join(b"data: %d\n\n" % number for number in range(14))
    assert answers[download] == b"x" * 1400
    assert carried.workers() == [worker]


def test_500_connections_that_are_abandoned_leave_nothing_behind(carried, scripted):
    lead(carried, scripted(b"", hold=True).address)
    worker, = carried.workers()
    carried.request("GET", "/user/ada/api")
    files, memory = files_of(worker), memory_of(worker)
    openings = {"socket": (UPGRADE % b"ada", True), "half-open upgrade": (UPGRADE % b"bob", False),
                "download": (b"GET /user/ada/download?size=9000000 HTTP/1.1\r\nHost: x\r\n\r\n", True),
                "upload": (b"POST /user/ada/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\n" + b"x" * 999, False),
                "events": (b"GET /user/ada/events?count=999&pause=0.2 HTTP/1.1\r\nHost: x\r\n\r\n", True)}
    for number, (opening, answered) in enumerate(itertools.islice(itertools.cycle(openings.values()), 500)):
        connection = connect(carried)
        connection.sendall(opening)
        if answered:
            assert connection.recv(1)
        abandon(connection, reset=number % 2)
    wait_for(lambda: files_of(worker) <= files, message=f"there were {files} files, now {files_of(worker)}")
    assert memory_of(worker) - memory < 30 * MEGABYTE
    assert carried.workers() == [worker] and open_sockets(carried) == 0


def test_a_worker_that_may_open_no_more_sockets_says_so_and_carries_on(tmp_path):
    websocket = pytest.importorskip("websocket", reason="pip install '.[test]'")
    with carrying(tmp_path, "--timeout", "5") as hub, contextlib.ExitStack() as opened:
        worker, = hub.workers()
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (100, 100))
        with pytest.raises(websocket.WebSocketBadStatusException) as refused:
            for _ in range(100):
                opened.enter_context(contextlib.closing(websocket_to(hub)))
        assert refused.value.status_code == 503 and refused.value.resp_headers["retry-after"] == "5"
        assert json.loads(refused.value.resp_body)["message"].startswith("The hub has as many connections as it can carry.")
        assert hub.request("GET", "/hub/health").status == 200 and hub.workers() == [worker]
        opened.close()
        wait_for(lambda: hub.request("GET", "/user/ada/api").status == 200)


def test_the_splicer_lets_its_process_open_all_the_files_it_may(tmp_path):
    told = run_python("""
import resource, socket, minihub
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512))
splicer = minihub.Splicer(0)
near, far = socket.socketpair()
far.close()
splicer.carry(minihub.ProgressStream(near, None, None))
print(resource.getrlimit(resource.RLIMIT_NOFILE))
splicer.close()
""", tmp_path)
    assert told == "(512, 512)"


@pytest.fixture(scope="module")
def at_home(tmp_path_factory):
    """A hub in this process with ada's echo server, which closes connections that are silent for half a second."""
    pytest.importorskip("tornado", reason="pip install '.[classroom]'")
    folder = tmp_path_factory.mktemp("at_home")
    (folder / "echo.py").write_text(ECHO_SERVER)
    hub = people(Hub(database=f"sqlite:///{folder / 'hub.sqlite'}", cmd=f"{sys.executable} {folder / 'echo.py'}",
                     homes=str(folder / "homes"), run_dir=str(folder / "run"), tick_interval=0, process_variables={},
                     proxy_idle_timeout=0.5))
    Api(threaded(hub), token_for(hub, "ada"))("POST", "/users/ada/server", status=201)
    yield hub
    with hub.connected():
        hub.spawner.stop(hub.find_server(hub.find_user("ada"), "").state, now=True)
    hub.disconnect()


class Host:
    """A WSGI server in this process. Subclasses must implement `serve` and `end`."""

    request, tls = LiveHub.request, None

    def __init__(self, app):
        self.app = app
        self.make()
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()


class Quiet(wsgiref.simple_server.WSGIRequestHandler):
    def log_message(self, *args):
        """Not a word."""


class Wsgiref(Host):
    """The standard library's, with a single thread."""

    def make(self):
        self.server = wsgiref.simple_server.make_server("127.0.0.1", 0, self.app, handler_class=Quiet)
        self.port = self.server.server_port

    def serve(self):
        self.server.serve_forever(0.02)

    def end(self):
        self.server.shutdown()
        self.server.server_close()


class Werkzeug(Wsgiref):
    """Flask's and Django's development servers are such."""

    def make(self):
        serving = pytest.importorskip("werkzeug.serving", reason="pip install werkzeug")
        kind = type("Quiet", (serving.WSGIRequestHandler,), {"log": lambda self, *args: None})
        self.server = serving.make_server("127.0.0.1", 0, self.app, threaded=True, request_handler=kind)
        self.port = self.server.port


class Waitress(Host):
    """One that lends nobody its sockets."""

    def make(self):
        waitress = pytest.importorskip("waitress.server", reason="pip install waitress")
        self.server = waitress.create_server(self.app, host="127.0.0.1", port=0, threads=4, clear_untrusted_proxy_headers=False)
        self.port = self.server.effective_port

    def serve(self):
        self.server.run()

    def end(self):
        self.server.close()
        self.server.task_dispatcher.shutdown()


class Cheroot(Host):
    """CherryPy's."""

    def make(self):
        wsgi = pytest.importorskip("cheroot.wsgi", reason="pip install cheroot")
        self.server = wsgi.Server(("127.0.0.1", 0), self.app, numthreads=4)
        self.server.prepare()
        self.port = self.server.bind_addr[1]

    def serve(self):
        self.server.serve()

    def end(self):
        self.server.stop()


@contextlib.contextmanager
def in_process(kind, hub):
    """The hub in a host of that kind."""
    host = kind(hub)
    try:
        yield host
    finally:
        host.end()


def readme_command(name):
    """The words of the README's command line with that name, whose files are those of this Python."""
    line, = re.findall(rf"^    {name} .*$", README, re.MULTILINE)
    name, *words = shlex.split(line)
    return shutil.which(name, path=Path(sys.executable).parent), words  # not Debian's uWSGI, which knows no Python by itself


class InUWSGI(LiveHub):
    """The hub in uWSGI, started as the README says. Options are added."""

    listens = "--http-socket"

    @property
    def words(self):
        program, words = readme_command("uwsgi")
        if not program:
            pytest.skip("pip install pyuwsgi")
        assert words[:2] == ["--http-socket", "127.0.0.1:8000"]
        return [program, self.listens, f"127.0.0.1:{self.port}", *words[2:], "--binary-path", sys.executable, *self.options]


class InUWSGIBehindItsRouter(InUWSGI):
    """The same, but with another process of uWSGI's between clients and workers."""

    listens = "--http"


class InModWSGI(LiveHub):
    """The hub in Apache, started as the README says. Apache refuses to be root, but may read and write all that root can."""

    @property
    def words(self):
        program, words = readme_command("mod_wsgi-express")
        if not program:
            pytest.skip("apt-get install apache2 apache2-dev gcc python3-dev && pip install mod_wsgi")
        (self.folder / "hub.conf").write_text(readme_text("WSGIPassAuthorization", "apache"))
        words[words.index("8000")] = str(self.port)
        not_root = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=+dac_override",
                    "--ambient-caps=+dac_override"] if os.geteuid() == 0 else []
        return [*not_root, program, *words, "--server-root", str(self.folder / "apache"), "--log-to-terminal", *self.options]


def make_certificate(folder):
    """Put a certificate for this machine, which nobody trusts yet, and its key into a folder, as tls.pem and tls.key."""
    if not OPENSSL:
        pytest.skip("apt-get install openssl")
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1"
    files = ["-keyout", folder / "tls.key", "-out", folder / "tls.pem"]
    subprocess.run([OPENSSL, *words.split(), *files], check=True, capture_output=True)


class WithTLS(LiveHub):
    """A gunicorn that ends TLS itself, with a certificate for this machine that its servers are told to trust."""

    def __init__(self, folder, *options, **settings):
        make_certificate(folder)
        super().__init__(folder, "--keyfile", "tls.key", "--certfile", "tls.pem", *options, env_keep="SSL_CERT_FILE", **settings)
        self.tls = ssl.create_default_context(cafile=folder / "tls.pem")

    @property
    def environ(self):
        return {**super().environ, "SSL_CERT_FILE": str(self.folder / "tls.pem")}


#: The README's name of each host, and how to run a hub with ada's echo server in it.
HOSTS = {
    "gunicorn, sync workers": lambda hub, folder: carrying(folder),
    "gunicorn, `--threads` (gthread)": lambda hub, folder: carrying(folder, "--threads", "4"),
    "gunicorn, `--worker-class gevent`": lambda hub, folder: carrying(folder, "--worker-class", "gevent"),
    "waitress": lambda hub, folder: in_process(Waitress, hub),
    "wsgiref (one thread)": lambda hub, folder: in_process(Wsgiref, hub),
    "werkzeug's server (Flask's development server)": lambda hub, folder: in_process(Werkzeug, hub),
    "cheroot": lambda hub, folder: in_process(Cheroot, hub),
    "uWSGI, `--http-socket`": lambda hub, folder: carrying(folder, kind=InUWSGI),
    "uWSGI, `--http`": lambda hub, folder: carrying(folder, kind=InUWSGIBehindItsRouter),
    "mod_wsgi (mod_wsgi-express)": lambda hub, folder: carrying(folder, kind=InModWSGI),
    "gunicorn, `--threads` and TLS (`--certfile`)": lambda hub, folder: carrying(folder, "--threads", "4", kind=WithTLS),
}


def is_there(host, path, status, words):
    """Whether a path answers with that status and those words."""
    answer = host.request("GET", path)
    return answer.status == status and words in answer.body


def carries_websockets(host):
    """Whether a websocket echoes; if not, the answer must say why and what to do."""
    import websocket

    try:
        with contextlib.closing(websocket_to(host)) as connection:
            connection.send("hello")
            return connection.recv() == "hello"
    except websocket.WebSocketBadStatusException as error:
        assert error.status_code == 501 and b"Run the hub with gunicorn" in error.resp_body
        return False


def what_works_in(host):
    """What works in a host, as the README's table says it: API, pages, servers over HTTP, websockets."""
    works = (is_there(host, "/hub/api/", 200, b'{"version"'), is_there(host, "/hub/login", 200, b"Sign in"),
             json.loads(host.request("POST", "/user/ada/upload", b"x" * MEGABYTE).body)["count"] == MEGABYTE
             and host.request("GET", "/user/ada/download?size=3000000").body == b"x" * 3000000, carries_websockets(host))
    return ["yes" if working else "no" for working in works]


def hosts_in_the_readme():
    """The README's table of hosts, a list of words for each."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if line.startswith("|")]
    begin = rows.index(["server", "API", "pages", "notebooks over HTTP", "websockets (kernels, terminals)"]) + 2
    return {name: cells for name, *cells in itertools.takewhile(lambda row: len(row) == len(rows[begin]), rows[begin:])}


@pytest.mark.parametrize("name", HOSTS)
def test_the_readmes_table_of_hosts_is_what_was_measured(name, at_home, tmp_path):
    if "gevent" in name:
        pytest.importorskip("gevent", reason="pip install gevent")
    with HOSTS[name](at_home, tmp_path) as host:
        assert hosts_in_the_readme()[name] == what_works_in(host)


def test_the_readmes_table_of_hosts_names_no_other():
    assert hosts_in_the_readme().keys() == HOSTS.keys()
    assert "not measured" not in README


def test_uwsgis_router_that_is_told_to_carries_websockets(tmp_path):
    with carrying(tmp_path, "--http-websockets", kind=InUWSGIBehindItsRouter) as hub:
        assert carries_websockets(hub)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 65536, 3 * MEGABYTE])
def test_uwsgi_passes_on_uploads_of_any_length(carried_by_uwsgi, size):
    body = os.urandom(size)
    answer = json.loads(carried_by_uwsgi.request("POST", "/user/ada/upload", body).body)
    assert answer == {"count": size, "sha256": hashlib.sha256(body).hexdigest()}


def test_an_upload_that_uwsgi_has_read_already_arrives_whole(tmp_path):
    with carrying(tmp_path, "--post-buffering", "10000", kind=InUWSGI) as hub:
        for size in (5000, 20000):
            assert json.loads(hub.request("POST", "/user/ada/upload", b"x" * size).body)["count"] == size


def test_uwsgi_finds_no_fault_with_its_sockets_taken_away(carried_by_uwsgi):
    for _ in range(2):
        assert carried_by_uwsgi.request("POST", "/user/ada/upload", b"x" * MEGABYTE).status == 200
    assert not re.search("error|broken pipe|sigpipe", carried_by_uwsgi.log.read_text(), re.IGNORECASE)


def test_in_uwsgi_answers_do_not_come_in_chunks_which_nginx_would_pass_on_as_they_are(carried_by_uwsgi):
    answer = carried_by_uwsgi.request("GET", "/user/ada/download?size=100000")
    assert (answer.getheader("Transfer-Encoding"), answer.body) == (None, b"x" * 100000)


@pytest.fixture
def uwsgi(monkeypatch):
    """What a program in a uWSGI worker imports."""
    module = types.SimpleNamespace(opt={}, has_threads=1, connection_fd=lambda: 7, worker_id=lambda: 1)
    monkeypatch.setitem(sys.modules, "uwsgi", module)
    monkeypatch.setattr(os, "register_at_fork", lambda **hooks: None)  # there is no taking them back
    return module


@pytest.mark.parametrize(("options", "more", "number"), [
    ((), {}, 7), (("http",), {"UWSGI_ROUTER": "http"}, 7), (("https-socket",), {}, None), (("suwsgi-socket",), {}, None),
    (("gevent",), {"x-wsgiorg.fdevent.readable": print}, None), ((), {"SERVER_PROTOCOL": "HTTP/2.0"}, None)])
def test_uwsgi_lends_plain_sockets_of_requests_that_are_threads(uwsgi, options, more, number):
    uwsgi.opt = dict.fromkeys(options, True)
    assert minihub.client_socket_number(request_environ(**{"uwsgi.version": b"2.0", **more})) == number


@pytest.mark.parametrize(("options", "number"), [(("http",), None), (("http", "http-websockets"), 7), (("http", "http-raw-body"), 7)])
def test_a_websocket_needs_a_router_of_uwsgis_that_goes_on_listening(uwsgi, options, number):
    uwsgi.opt = dict.fromkeys(options, True)
    upgrade = {"HTTP_CONNECTION": "Upgrade", "HTTP_UPGRADE": "websocket", "UWSGI_ROUTER": "http", "uwsgi.version": b"2.0"}
    assert minihub.client_socket_number(request_environ(**upgrade)) == number


@pytest.fixture(scope="module")
def in_mod_wsgi(tmp_path_factory):
    """ada's echo server behind Apache with mod_wsgi as the README has it."""
    with carrying(tmp_path_factory.mktemp("mod_wsgi"), kind=InModWSGI) as hub:
        yield hub


def test_mod_wsgi_passes_on_what_apache_likes_to_keep(in_mod_wsgi):
    got = echoed(in_mod_wsgi, "POST", "/a%2Fb%20c?d=%2F", iter([b"bo", b"dy"]), {"Authorization": "Basic YWRhOnNlY3JldA=="})
    assert (got["uri"], got["body"]) == ("/user/ada/echo/a%2Fb%20c?d=%2F", "body")
    assert dict(got["headers"])["Authorization"] == "Basic YWRhOnNlY3JldA=="


def test_mod_wsgi_streams(in_mod_wsgi):
    with connect(in_mod_wsgi) as connection:
        connection.sendall(b"GET /user/ada/events?count=100&pause=0.2 HTTP/1.1\r\nHost: x\r\n\r\n")
        events = [line for line in itertools.islice(connection.makefile("rb"), 25) if line.startswith(b"data:")]
    assert events[:2] == [b"data: 0\n", b"data: 1\n"]


@pytest.mark.parametrize("workers", [1, 2])
def test_gunicorns_sync_workers_with_tls_need_to_be_several(tmp_path, workers):
    with carrying(tmp_path, "--workers", str(workers), kind=WithTLS) as hub:
        answer = hub.request("GET", "/user/ada/api")
    assert (answer.status, b"Run the hub with gunicorn, or with more threads" in answer.body) == (
        (200, False) if workers > 1 else (503, True))


@pytest.fixture(scope="module", params=[Wsgiref, Werkzeug, Waitress, Cheroot])
def host(request, at_home):
    """The hub in each kind of host."""
    host = request.param(at_home)
    yield host
    host.end()


@pytest.fixture(scope="module", params=[Wsgiref, Werkzeug])
def lending_host(request, at_home):
    """The hub in each kind of host that lets it have the client's socket."""
    host = request.param(at_home)
    yield host
    host.end()


@pytest.fixture(scope="module")
def waitress(at_home):
    """The hub in a host that does not."""
    host = Waitress(at_home)
    yield host
    host.end()


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_other_hosts_carry_every_method(host, method):
    got = echoed(host, method, "/a%20b?c=%2F", b"body", {"Cookie": "jupyterhub-hub-login=x; mine=1"})
    assert (got["method"], got["body"], dict(got["headers"])["Cookie"]) == (method, "body", "mine=1")
    assert got["uri"] == "/user/ada/echo/a%20b?c=%2F"


def test_other_hosts_carry_uploads_and_downloads(host):
    body = os.urandom(3 * MEGABYTE)
    answer = json.loads(host.request("POST", "/user/ada/upload", body).body)
    assert answer == {"count": len(body), "sha256": hashlib.sha256(body).hexdigest()}
    assert host.request("GET", "/user/ada/download?size=3000000").body == b"x" * 3000000
    assert host.request("GET", "/user/ada/download?size=3000000&length=1").getheader("Content-Length") == "3000000"


def test_other_hosts_carry_answers_without_a_body(host):
    head = host.request("HEAD", "/user/ada/echo")
    assert (head.status, head.body) == (200, b"") and head.getheader("Content-Type") == "application/json; charset=UTF-8"
    assert [host.request("GET", f"/user/ada/status?code={code}").status for code in (204, 304, 418)] == [204, 304, 418]


def test_other_hosts_keep_the_hubs_cookies_to_themselves(host):
    assert host.request("GET", "/user/ada/echo").headers.get_all("Set-Cookie") == ["mine=1; Path=/user/"]


@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN)
def test_a_host_that_lends_no_socket_says_when_a_server_does_not_answer(waitress, at_home, scripted, answer):
    with at_home.connected():
        at_home.proxy.add_route("/user/bob/", scripted(answer).address, {"user": "bob", "server_name": ""})
    assert waitress.request("GET", "/user/bob/lab").status == 503


class Asking(http.server.BaseHTTPRequestHandler):
    """A server that asks the hub something before it answers, as single-user servers do when somebody signs in."""

    def do_GET(self):
        self.server.asked.append(self.path)
        wait_for(lambda: len(self.server.asked) >= 4)
        requests.get(self.server.hub, timeout=60)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args):
        """Not a word."""


def test_threads_that_wait_for_servers_that_wait_for_the_hub_do_not_wait_for_ever(waitress, at_home, monkeypatch):
    monkeypatch.setattr(minihub, "STARVED_AFTER", 0.3)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Asking) as server, at_home.connected():
        server.hub, server.asked = f"http://127.0.0.1:{waitress.port}/hub/health", []
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        at_home.proxy.add_route("/user/bob/", f"http://127.0.0.1:{server.server_port}", {"user": "bob", "server_name": ""})
        answers = at_once(*[lambda: waitress.request("GET", "/user/bob/api")] * 12)
        assert {answer.status for answer in answers} in ({200, 503}, {503})
        assert any(b"run the hub with more threads" in answer.body for answer in answers)
        assert waitress.request("GET", "/user/bob/api").status == 200
        server.shutdown()


@pytest.mark.parametrize(("address", "port"), [("http://hub.example", 80), ("https://hub.example", 443), ("http://hub.example:8000", 8000)])
def test_a_hub_that_does_not_answer_at_its_address_is_starved(monkeypatch, address, port):
    asked = []

    def connect(place, timeout):
        asked.append(place)
        raise TimeoutError

    monkeypatch.setattr(minihub.socket, "create_connection", connect)
    assert minihub.is_starved(minihub.Mount("/", address)) is True
    assert asked == [("hub.example", port)]


def test_other_hosts_say_when_nobody_listens(host, at_home):
    with at_home.connected():
        at_home.proxy.add_route("/user/bob/", f"http://127.0.0.1:{minihub.free_port()}", {"user": "bob", "server_name": ""})
    answer = host.request("GET", "/user/bob/api")
    assert (answer.status, json.loads(answer.body)["status"]) == (503, 503)


def test_a_host_that_lends_its_sockets_carries_websockets_with_a_single_thread(lending_host):
    with contextlib.closing(websocket_to(lending_host)) as one, contextlib.closing(websocket_to(lending_host)) as other:
        for connection in (one, other, one):
            connection.send(b"\x00hello", 2)
            assert connection.recv() == b"\x00hello"
        assert lending_host.request("GET", "/hub/api/").status == 200


def test_a_host_that_lends_its_sockets_finds_no_fault_with_that(lending_host, capsys):
    for _ in range(2):  # the second is taken up when the first is over
        assert lending_host.request("GET", "/user/ada/api").status == 200
    assert capsys.readouterr().err == ""


def test_a_host_that_lends_no_socket_says_that_it_cannot_carry_websockets(waitress):
    answer = waitress.request("GET", "/user/ada/socket", headers={"Connection": "Upgrade", "Upgrade": "websocket"})
    assert answer.status == 501 and "does not let the hub carry websockets" in json.loads(answer.body)["message"]


def test_gunicorn_with_gevent_carries_all_but_websockets(tmp_path):
    pytest.importorskip("gevent", reason="pip install gevent")
    with carrying(tmp_path, "--worker-class", "gevent") as hub:
        assert echoed(hub, "POST", body=iter([b"bo", b"dy"]))["body"] == "body"
        upgrade = hub.request("GET", "/user/ada/socket", headers={"Connection": "Upgrade", "Upgrade": "websocket"})
        assert upgrade.status == 501


def test_a_host_that_lends_no_socket_streams(waitress):
    with connect(waitress) as connection:
        connection.sendall(b"GET /user/ada/events?count=100&pause=0.2 HTTP/1.1\r\nHost: x\r\n\r\n")
        events = [line for line in itertools.islice(connection.makefile("rb"), 25) if line.startswith(b"data:")]
    assert events[:2] == [b"data: 0\n", b"data: 1\n"]


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"])
def test_a_server_that_sends_chunks_to_a_client_of_http_1_0_is_not_passed_on(waitress, at_home, scripted, answer):
    server = scripted(answer)
    with at_home.connected():
        at_home.proxy.add_route("/user/bob/", server.address, {"user": "bob", "server_name": ""})
    assert waitress.request("GET", "/user/bob/api").status == 503
    assert server.heard[0].startswith(b"GET /user/bob/api HTTP/1.0\r\n")


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n"])
def test_a_host_that_lends_no_socket_waits_for_a_silent_server_only_so_long(waitress, at_home, scripted, answer):
    with at_home.connected():
        at_home.proxy.add_route("/user/bob/", scripted(answer, hold=True).address, {"user": "bob", "server_name": ""})
    assert waitress.request("GET", "/user/bob/lab", timeout=10).status == 503


def test_a_host_that_lends_no_socket_ends_a_response_that_has_stopped(waitress, at_home, scripted):
    server = scripted(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", hold=True)
    with at_home.connected():
        at_home.proxy.add_route("/user/bob/", server.address, {"user": "bob", "server_name": ""})
    with pytest.raises(http.client.IncompleteRead):
        waitress.request("GET", "/user/bob/lab", timeout=10)


@pytest.mark.parametrize("path, kind", [("/user/ada/lab", "text/html"), ("/user/ada/api", "application/json")])
def test_a_host_with_a_single_thread_that_lends_no_socket_says_what_to_do(at_home, path, kind):
    answer = webtest.TestApp(at_home).get(path, status=503)
    assert answer.content_type == kind and "Run the hub with gunicorn, or with more threads" in answer.text


def test_a_connection_that_carries_other_requests_too_is_not_taken_over():
    with socket.socket() as connection:
        environ = request_environ(**{"gunicorn.socket": connection})
        assert minihub.client_socket_number(environ) == connection.fileno()
        assert minihub.client_socket_number({**environ, "SERVER_PROTOCOL": "HTTP/2.0"}) is None


def test_a_socket_that_is_no_plain_one_is_not_taken_over(tmp_path):
    (tmp_path / "body").write_bytes(b"")
    with open(tmp_path / "body", "rb") as body:
        for environ in ({"gunicorn.socket": object()}, {"wsgi.input": body}, {"wsgi.input": None}):
            assert minihub.client_socket_number(request_environ(**{"wsgi.input": body, **environ})) is None


def test_a_connection_that_is_silent_for_too_long_is_closed_and_one_that_is_not_stays(lending_host):
    with contextlib.closing(websocket_to(lending_host)) as silent, contextlib.closing(websocket_to(lending_host)) as busy:
        began = time.monotonic()
        while time.monotonic() - began < 1:
            busy.send("hello")
            assert busy.recv() == "hello"
        assert read_all(silent.sock) == b""
        busy.send("still here")
        assert busy.recv() == "still here"


def test_with_an_idle_timeout_of_0_a_silent_connection_stays():
    splicer = minihub.Splicer(0)
    near, far = socket.socketpair()
    with far:
        connection = minihub.Forward(near, None)
        connection.serve = lambda: connection.discard(near)
        splicer.carry(connection)
        far.settimeout(0.3)
        with pytest.raises(TimeoutError):
            far.recv(1)
    wait_for(lambda: near.fileno() == -1, message="the other end stays open")


@needs_chp
def test_a_real_proxy_carries_websockets(chp):
    websocket = pytest.importorskip("websocket", reason="pip install websocket-client")
    connection = websocket.create_connection(f"ws://127.0.0.1:{chp.front}/user/ada/socket", timeout=10)
    with contextlib.closing(connection):
        connection.send("hello")
        assert connection.recv() == "hello"


@needs_chp
def test_a_proxy_that_does_not_answer_loses_nothing(make_hub, spawner):
    hub = people(make_hub(proxy="chp", chp_api_url=f"http://127.0.0.1:{minihub.free_port()}"))
    root = api_of(hub, "root")
    root("POST", "/users/ada/server", status=201)
    for method in ("GET", "POST"):
        assert "does not answer" in root(method, "/proxy", status=503).json["message"]
    assert root("GET", "/users/ada").json["servers"][""]["ready"] and len(spawner.running) == 1
    root("DELETE", "/users/ada/server", status=204)


def test_a_body_in_chunks_that_is_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(minihub, "SPOOL_LIMIT", 10)
    environ = {"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True}
    with minihub.spooled_body({**environ, "wsgi.input": io.BytesIO(b"x" * 10)}) as spool:
        assert spool.tell() == 10
    with pytest.raises(minihub.TooLarge):
        minihub.spooled_body({**environ, "wsgi.input": io.BytesIO(b"x" * 11)})


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
        own_form = re.search('name=_xsrf value="(.*?)"', browser.get(who.link).text)[1]
        secret = {"password": "ada ada secret", "again": "ada ada secret", "_xsrf": own_form}
        assert browser.post(who.link, secret).url == f"{who.url}/hub/home"
        question = browser.get(f"{who.url}/services/who/")
        assert "/oauth2/authorize" in question.url and "Open this service?" in question.text
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
    state = minihub.start_process(tmp_path / "service@1", ["sleep", "60"], "service", beat)
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


@pytest.mark.parametrize("kind", [LiveHub, InUWSGI])
def test_a_shutdown_ends_the_wsgi_server_and_the_servers_it_is_told_to(tmp_path, kind):
    with carrying(tmp_path, "--workers", "2", kind=kind) as hub:
        assert hub.api("POST", "/shutdown", hub.command("token", "root"), {"servers": True})[0] == 202
        assert hub.process.wait(30) == 0
        wait_for(lambda: status_of(hub) == "stopped")
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
def test_a_spawner_that_raises_fails_the_start(opened, spawner, caplog, problem, failure):
    caplog.set_level("CRITICAL", "minihub")  # pytest-xdist cannot hand on a log with a lone surrogate
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


def test_an_interrupted_start_waits_for_an_engine_that_does_not_answer(opened, root, spawner):
    def find(launch):
        raise OSError("the engine is away")

    spawner.find = find
    interrupted(opened, minihub.INTERRUPTED_AFTER + 1)
    assert root("GET", "/users").json[1]["pending"] == "spawn" and not spawner.launches
    del spawner.find
    root("GET", "/users")
    assert len(spawner.launches) == 1


def test_an_interrupted_start_can_be_given_up(opened, spawner, pass_time):
    server = interrupted(opened, 1)
    opened.stop(server)
    assert (server.status, spawner.launches) == ("stopping", [])  # its process may still be about to begin
    pass_time(minihub.INTERRUPTED_AFTER + 1)
    assert (opened.observe(server).status, spawner.launches) == ("stopped", [])


def test_whoever_has_seen_a_start_begin_sees_how_it_goes_on(opened):
    server = interrupted(opened, 1)
    minihub.Server.update(status="stopped", failure="no luck").where(minihub.Server.id == server.id).execute()
    opened.observe(server)
    assert (server.status, server.failure) == ("stopped", "no luck")


def test_two_who_find_the_process_of_an_interrupted_start_both_let_it_live(opened, spawner):
    def find(launch):
        if "first" not in spawner.running:
            spawner.running["first"] = launch
            opened.observe(opened.observe(server_of(opened)))
        return {"target": f"{spawner.address}/first", "launch": "first"}

    spawner.find = find
    server = interrupted(opened, minihub.INTERRUPTED_AFTER + 1)
    assert (opened.observe(server).status, list(spawner.running)) == ("ready", ["first"])


def test_a_process_that_an_interrupted_start_left_ends_with_a_start_that_is_given_up(opened, spawner):
    spawner.running["first"] = "a process that nobody wrote down"
    spawner.find = lambda launch: {"target": f"{spawner.address}/first", "launch": launch.id}
    server = interrupted(opened, 1)
    opened.stop(server)
    assert (opened.observe(server).status, spawner.running) == ("stopped", {})


def test_a_server_knows_its_user_even_when_that_is_deleted(opened):
    server = server_of(opened)
    opened.delete_user(opened.find_user("ada"), 0)
    with pytest.raises(minihub.NotFound, match="^No such user: ada$"):
        opened.start(server)


def test_a_start_for_a_user_who_has_another_name_by_now_is_refused(opened, spawner):
    server = server_of(opened)
    opened.change_user(opened.find_user("ada"), {"name": "grace"})
    with pytest.raises(minihub.NotFound, match="^No such user: ada$"):
        opened.start(server)
    assert (server_of(opened, "grace").status, spawner.launches) == ("stopped", [])


def test_tokens_know_their_user_even_when_that_is_deleted(opened):
    ada = opened.find_user("ada")
    opened.create_token(ada)
    token, = opened.tokens_of(ada)
    opened.delete_user(opened.find_user("ada"), 0)
    assert token.user.name == "ada"


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


def test_a_named_server_takes_nobodys_place(opened, spawner):
    opened.create_user("ada-gpu"), opened.create_user("ada-gpu-x")
    servers = [running(opened, *what) for what in (("ada", "gpu"), ("ada-gpu",), ("ada", "gpu-x"), ("ada-gpu", "x"), ("ada-gpu-x",))]
    assert [server.status for server in servers] == ["ready"] * 5
    assert [launch.variables["JUPYTERHUB_CLIENT_ID"] for launch in spawner.launches] == [
        "jupyterhub-user-ada-gpu", "jupyterhub-user-ada%2Dgpu", "jupyterhub-user-ada-gpu-x", "jupyterhub-user-ada%2Dgpu-x",
        "jupyterhub-user-ada%2Dgpu%2Dx"]


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


def test_configured_admins_are_there_from_the_start(make_hub, make_database):
    url = make_database()
    people(make_hub(database=url))
    hub = make_hub(database=url, admins=["Ada", "Grace"])
    with hub.connected():
        assert {user.name: user.admin for user in hub.list_users()[0]} == {"root": True, "ada": True, "bob": False, "grace": True}
        assert not hub.create_user("eve").admin


def test_one_worker_ticks_at_a_time(make_hub, make_database, pass_time):
    url = make_database()
    hubs = [make_hub(database=url) for _ in range(2)]

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


def test_a_fresh_hub_says_once_how_to_become_its_admin(make_hub, make_database, caplog):
    url = make_database()
    for _ in range(2):
        hub = make_hub(database=url)
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
    ("name ada", 50, ("ada", "10.9.9.9"), ("bob", "10.9.9.9")),
    ("address 10.0.0.1", 200, ("bob", "10.0.0.1"), ("bob", "10.9.9.9"))])
def test_many_failures_stop_a_name_or_an_address(opened, key, limit, refused, let_in):
    for _ in range(limit):
        opened._count_failure({key: limit})
    assert sign_in(opened, refused[0], password_of(refused[0]), refused[1]) == Like("Too many failed sign-ins.*")
    assert sign_in(opened, let_in[0], password_of(let_in[0]), let_in[1]) == let_in[0]


@pytest.mark.parametrize("name", ["\0", "x" * 1000, "\ud800", "\N{GRINNING FACE}" * 300, "a\nuser root signed in from ::1\x1b[2J"])
def test_odd_names_cannot_sign_in(opened, caplog, name):
    caplog.set_level("INFO")
    assert sign_in(opened, name, "wrong") is None
    assert max(len(row.key) for row in minihub.Failure.select()) < 300
    assert caplog.messages == [Like("sign-in failed: '.*' from 10.0.0.1")] and caplog.messages[0].isprintable()


@pytest.mark.parametrize("name", ["ada 10.0.0.1", "10.0.0.1 ada", "10.0.0.1", "name ada", "ada"])
def test_failures_elsewhere_under_a_like_name_keep_nobody_out(opened, name):
    for number in range(5):
        assert sign_in(opened, name, "wrong", f"10.1.1.{number}") is None
    for _ in range(4):
        assert sign_in(opened, name, "wrong", "10.2.2.2") is None
    assert sign_in(opened, "ada", password_of("ada")) == "ada"


def test_who_has_a_whole_network_of_addresses_is_one_who_tries(opened):
    tries = [sign_in(opened, "ada", "wrong", f"2001:db8::{number}") for number in range(6)]
    assert tries == [None] * 5 + [Like("Too many failed sign-ins.*")]
    assert sign_in(opened, "ada", "wrong", "2001:db8:0:1::1") is None


def test_whoever_the_authenticator_vouches_for_becomes_a_user(make_hub):
    hub = make_hub(authenticator="dummy", password="class secret")
    with hub.connected():
        assert sign_in(hub, "Eve", "class secret") == "eve" == hub.find_user("EVE").name
        assert sign_in(hub, "a/b", "class secret") is None
        assert hub.sign_in({"username": "new", "password": "class secret"}, {}, "", known_only=True) is None
        assert [user.name for user in hub.list_users()[0]] == ["eve"]


def test_two_hubs_in_one_process_share_nothing(make_hub):
    first, second = people(make_hub()), make_hub()
    token = token_for(first, "ada")
    Api(second, token)("GET", "/user", status=403)
    with first.connected(), second.connected():
        second.create_user("eve")
        assert [user.name for user in second.list_users()[0]] == ["eve"]
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
    print([user.name for user in hub.list_users()[0]])
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
    ("10.0.0.5", 8000, "http://10.0.0.5:8000"), ("fe80::1", 1, "http://[fe80::1]:1"), ("localhost", 8000, "http://127.0.0.1:8000")])
def test_the_hub_is_reached_where_it_listens(host, port, address):
    assert minihub.local_address(host, port) == address


def test_what_a_proxy_knows_of_activity_flows_into_users_and_servers(hub, root, ada, monkeypatch):
    ada("POST", "/users/ada/server", status=201)
    seen = minihub.isoformat(minihub.now() + timedelta(minutes=5))
    with hub.connected():
        routes = hub.wanted_routes()
    routes["/user/ada/"]["data"]["last_activity"] = seen
    monkeypatch.setattr(hub.proxy, "get_all_routes", lambda: routes)
    root("POST", "/proxy")
    model = root("GET", "/users/ada").json
    assert model["last_activity"] == model["servers"][""]["last_activity"] == seen


@needs_singleuser
def test_a_shutdown_stops_the_services(who):
    pid = service_pid(who)
    assert who.api("POST", "/shutdown", "ops-token")[0] == 202
    wait_for(lambda: minihub.process_identity(pid) is None)


def test_a_spawner_that_does_not_say_where_the_server_is_has_failed(hub, root, spawner, monkeypatch):
    monkeypatch.setattr(spawner, "start", lambda server: {})
    assert root("POST", "/users/ada/server", status=500).json["message"].endswith("KeyError: 'target'")


def test_an_old_copy_of_a_row_ends_no_server_that_runs(make_hub, spawner):
    hub = people(make_hub(start_timeout=0))
    with hub.connected():
        server = server_of(hub)
        hub.start(server)
        old = server_of(hub)
        assert (hub.observe(server).status, old.status) == ("ready", "spawning")
        old.target = f"http://127.0.0.1:{minihub.free_port()}"
        assert hub.observe(old).status == "ready" and len(spawner.running) == 1


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


@pytest.mark.parametrize("header", ["token", "token ", "{}", "Basic {}", "token {} more", "token x{}", "token: {}", "token \xff", "token {}\xe9"])
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
    {}, {"Referer": "http://evil.example/hub/"}, {"Referer": "http://localhost:80/user/bob/hub/"}, {"Referer": "http://localhost/hub/"},
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
    examples = {"name": "ada", "server_name": "gpu", "token_id": "a1", "code": "503"}
    return re.sub(r"\{(\w+):\w+\}", lambda match: examples.get(match[1], "x"), pattern)


def responders():
    """Every path of the route table with every method it answers."""
    for pattern, kind, suffix in minihub.ROUTES:
        for method in ("GET", "POST", "PATCH", "PUT", "DELETE"):
            name = f"on_{method.lower()}" + (f"_{suffix}" if suffix else "")
            if hasattr(kind, name):
                yield method, pattern


#: Where nobody gets something else than a 403 or the way to sign in, and what.
OPEN_TO_ALL = {
    ("GET", "/hub/api"): 200, ("GET", "/hub/api/"): 200, ("POST", "/hub/api/oauth2/token"): 400, ("GET", "/"): 302,
    ("GET", "/hub"): 301, ("GET", "/hub/"): 302, ("GET", "/hub/login"): 200, ("POST", "/hub/login"): 200,
    ("GET", "/hub/error/{code:int}"): 200, ("GET", "/hub/logout"): 302, ("GET", "/hub/health"): 200, ("GET", "/hub/logo"): 200,
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
        back = {"next": [example_path(pattern)]} if method == "GET" else {}  # a form that was sent is not sent again
        assert parse_qs(urlsplit(response.location).query) == back


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
        "access:servers!user={me}", "access:services", "read:users:name!user={me}", "read:users:groups!user={me}", "users:activity!user={me}",
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
    return seen.get("HTTP_AUTHORIZATION"), seen["QUERY_STRING"], seen["HTTP_COOKIE"]


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


@pytest.mark.parametrize(("data", "cookies"), [
    ({"user": "ada", "server_name": ""}, "session=1"), ({"service": "wiki"}, "session=1; my_site=2; jupyterhub-services=3")])
def test_the_site_says_which_cookies_are_its_own_and_hides_them_from_servers_only(make_hub, data, cookies):
    environ = {"HTTP_COOKIE": "session=1; my_site=2; jupyterhub-services=3; jupyterhub-hub-login=4"}
    assert minihub.without_hub_secrets(make_hub(site_cookies=["my_site"]), environ, data)["HTTP_COOKIE"] == cookies


@pytest.mark.parametrize(("authenticator", "header"), [("remote-user", None), ("password", "Basic YWRhOnNlY3JldA==")])
def test_the_password_for_the_site_does_not_reach_a_server(make_hub, authenticator, header):
    hub, environ = make_hub(authenticator=authenticator), {"HTTP_AUTHORIZATION": "Basic YWRhOnNlY3JldA=="}
    seen = minihub.without_hub_secrets(hub, environ, {"user": "ada", "server_name": ""})
    assert seen.get("HTTP_AUTHORIZATION") == header


def test_a_server_sees_no_token_of_those_who_may_not_enter(opened):
    running(opened)
    token, _ = opened.create_token(opened.find_user("bob"))
    assert seen_by_server(opened, token)[:2] == (None, "token=&x=1")


def test_what_a_server_was_given_opens_no_other_server(hub):
    token = oauth_token(hub, "root", owner="bob")  # the admin has been in bob's server, which now goes on to ada's
    with hub.connected():
        running(hub)
        assert seen_by_server(hub, token)[:2] == (None, "token=&x=1")


def test_what_a_server_was_given_is_passed_on_to_that_server(hub):
    token = oauth_token(hub, "root", owner="ada")
    with hub.connected():
        assert seen_by_server(hub, token)[:2] == (f"Bearer {token}", f"token={token}&x=1")


@pytest.mark.parametrize(("admin", "scopes"), [
    (True, ["access:servers!server=ada/", "read:users:name!user=bob", "read:users:groups!user=bob"]),
    (False, ["read:users:name!user=bob", "read:users:groups!user=bob"])])
def test_an_oauth_token_opens_a_server_only_as_long_as_its_owner_may(hub, root, admin, scopes):
    root("PATCH", "/users/bob", {"admin": True})
    token = oauth_token(hub, "bob", owner="ada")
    root("PATCH", "/users/bob", {"admin": admin})
    assert Api(hub, token)("GET", "/user").json["scopes"] == scopes


def test_a_new_password_ends_what_browsers_were_given_and_no_api_token(hub, ada):
    with hub.connected():
        tokens = oauth_token(hub, "ada"), oauth_token(hub, "root", owner="ada")
        hub.set_password(hub.find_user("ada"), "a new password")
    Api(hub, tokens[0])("GET", "/user", status=403)
    assert Api(hub, tokens[1])("GET", "/user").json["name"] == "root"
    assert ada("GET", "/user").json["name"] == "ada"


@pytest.mark.parametrize("settings, seen", [({}, "mine=1"), ({"site_cookies": []}, "sessionid=x; mine=1")])
def test_a_server_does_not_see_the_cookies_of_the_site_around_the_hub(make_hub, settings, seen):
    environ = {"HTTP_COOKIE": "sessionid=x; jupyterhub-hub-login=x; mine=1"}
    data = {"user": "ada", "server_name": ""}
    assert minihub.without_hub_secrets(make_hub(**settings), environ, data)["HTTP_COOKIE"] == seen


def test_a_server_sees_tokens_that_are_not_the_hubs(opened):
    running(opened)
    assert seen_by_server(opened, "its-own")[:2] == ("Bearer its-own", "token=its-own&x=1")


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


def test_a_service_that_is_no_longer_in_the_settings_is_gone(make_hub, make_database):
    url = make_database()
    people(make_hub(database=url, services=[{"name": "old", "api_token": "old-token"}]))
    hub = make_hub(database=url)
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


@pytest.mark.parametrize("change", [{"api_url": "garbage"}, {"api_url": "http://x:99999"}, {"api_url": "file:///etc"},
                                    {"api_url": "http://[::1"}, {"port": "x"}, {"port": "99999"}, {"ip": "a b"}, {"protocol": "gopher"}])
def test_a_proxy_is_not_moved_to_where_none_can_be(make_hub, change):
    hub = people(make_hub(proxy="chp"))
    message = api_of(hub, "root")("PATCH", "/proxy", change, status=400).json["message"]
    assert message.startswith("The proxy's API must be at an address like http://127.0.0.1:8001, not ")
    with hub.connected():
        assert hub.proxy.place()["api_url"] == "http://127.0.0.1:8001"


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


@pytest.mark.database("sqlite")  # takes a minute
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
def user(name, /, **others):
    """The API's User, as far as it is not said otherwise."""
    return {"kind": "user", "name": name, "admin": False, "groups": [], "server": None, "pending": None, "created": MOMENT,
            "last_activity": None, "servers": None, **others}


def server(name="", owner="ada", **others):
    """The API's Server, ready if it is not said otherwise."""
    place, below = (f"servers/{name}", f"{name}/") if name else ("server", "")
    return {"name": name, "last_activity": None, "started": MOMENT, "pending": None, "ready": True, "state": None,
            "url": f"/user/{owner}/{below}", "user_options": {}, "progress_url": f"/hub/api/users/{owner}/{place}/progress", **others}


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
      for body in (None, {}, [], ["eve"], "eve", 1, {"usernames": []}, {"usernames": ""}, {"usernames": None}, {"names": ["eve"]})),
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
    ("root", "PATCH", "/users/ada", {"name": "Bob", "admin": True}, error(400, "User bob already exists, username must be unique")),
    ("root", "PATCH", "/users/ada", {"name": "", "admin": True}, error(400, "Invalid username: ")),
    ("root", "PATCH", "/users/ada", {"name": "a/b"}, error(400, "Invalid username: a/b")),
    ("ada", "DELETE", "/users/bob", None, FORBIDDEN),
    ("ada", "DELETE", "/users/ada", None, FORBIDDEN),
    ("root", "DELETE", "/users/eve", None, error(404, "No such user: eve")),
    ("root", "DELETE", "/users/ROOT", None, error(400, "Cannot delete yourself!")),
    ("nobody", "GET", "/user", None, MISSING),
    ("ada", "GET", "/users/bob/tokens", None, FORBIDDEN),
    ("root", "GET", "/users/eve/tokens", None, error(404, "No such user: eve")),
    *(("ada", "POST", "/users/ada/tokens", body, error(400, "Body must be a JSON dict or empty")) for body in ([], "x", 5, False)),
    ("ada", "POST", "/users/bob/tokens", None, error(403, "Only admins can request tokens for other users")),
    ("ada", "POST", "/users/eve/tokens", None, error(403, "Only admins can request tokens for other users")),
    ("root", "POST", "/users/eve/tokens", None, error(404, "No such user: eve")),
    *(("ada", "POST", "/users/ada/tokens", {"expires_in": value}, error(400, "expires_in must be a number of seconds greater than 0"))
      for value in (0, -1, -0.5, "60", True, [], {}, 10 ** 30, 1e300)),
    *(("ada", "POST", "/users/ada/tokens", {"note": value}, error(400, "note must be a string of at most 65536 characters")) for value in (5, ["x"], {"a": 1}, "\0")),
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
    ("ada", "DELETE", "/users/ada/server", {"remove": "yes"}, error(400, "server.remove must be <class 'bool'>, not: <class 'str'>")),
    ("ada", "DELETE", "/users/ada/server", {"nonsense": 1}, error(400, "Invalid JSON keys: nonsense")),
    ("ada", "POST", "/users/ada/servers/n%201", None, error(400, Like(r"Invalid server_name: 'n 1'\. Use up to 63 letters, .*"))),
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
    ("ada", "POST", "/users/ada/activity", {"servers": {"": {"last_activity": "2026-01-01"}, "gpu": {"last_activity": "2026-01-01"}}},
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
    ("nobody", "POST", "/authorizations/token", {"username": "ada", "password": "wrong"}, error(403, "Invalid username or password")),
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


NO_JSON = [b"{", b"\xff", b"nonsense", b"NaN", b'{"admin": Infinity}', b'{"x": 1e999}', b'"\\ud800"', b"1" * 5000, b"[" * 100_000,
           b"{} {}", b"\0", b"admin=1"]


@pytest.mark.parametrize(("method", "path"), [
    ("POST", "/users"), ("POST", "/users/eve"), ("PATCH", "/users/ada"), ("POST", "/users/ada/server"), ("DELETE", "/users/ada/server"),
    ("POST", "/users/ada/tokens"), ("POST", "/users/ada/activity"), ("POST", "/authorizations/token")])
def test_what_is_no_json_is_refused(root, method, path):
    assert [root(method, path, raw=raw, status="*").json for raw in NO_JSON] == [BAD_JSON] * len(NO_JSON)


def test_deeply_nested_json_is_refused(root, ada):
    nested = functools.reduce(lambda inner, _: {"in": inner}, range(minihub.DEPTH_LIMIT), 0)
    ada("POST", "/users/ada/server", nested, status=201)
    assert root("GET", "/users").json[1]["servers"][""]["user_options"] == nested
    ada("DELETE", "/users/ada/server", status=204)
    assert ada("POST", "/users/ada/server", {"in": nested}, status=400).json == error(
        400, "Invalid JSON in body of request: it is nested too deeply")


def test_a_huge_body_is_refused(ada):
    body = '{"a": "' + "x" * (minihub.BODY_LIMIT - 9)
    ada("POST", "/users/ada/tokens", raw=f'{body}"}}'.encode(), status=201)
    assert ada("POST", "/users/ada/tokens", raw=f'{body}x"}}'.encode(), status=413).json == error(
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
    def locked(*filters):
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
    assert len(root("GET", "/users?colour=red&nonsense").json) == 3


def test_many_users_are_created_at_once(root):
    created = root("POST", "/users", {"usernames": ["Eve", "ada", "åsa", "eve"], "admin": True, "name": "x", "groups": []}, status=201)
    assert created.json == [user("eve", admin=True), user("åsa", admin=True)]
    assert root("GET", "/users/ada").json["admin"] is False


def test_more_users_than_sqlite_takes_values_are_created_at_once(hub, root):
    with hub.connected():
        if hasattr(hub.database.connection(), "setlimit"):  # SQLite's, from Python 3.11 on
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
        "access:servers!user=ada", "access:services", "read:users:name!user=ada", "read:users:groups!user=ada", "users:activity!user=ada",
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
    ({"exits_at_once": 1}, "The server ended while it started [status=1]" + LOG_TAIL), ({"problem": OSError("disk full")}, "OSError: disk full")])
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
    ({"cpu": 2}, None, {"cpu": 2}), ({"cpu": 2}, {}, {}), (None, None, None), ({"é": "\0"}, None, {"é": "\0"})])
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
    root("POST", "/users/ada/activity", {"servers": {"": {"last_activity": "2026-01-01"}}})
    before = last_seen(root)
    root("POST", "/users/ada/activity", {"last_activity": "2020-01-01", "servers": {"": {"last_activity": "2020-01-01T00:00:00Z"}}})
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
    assert asking("GET", f"/authorizations/token/{oauth_token(hub, 'ada', owner='bob')}").json["name"] == "ada"
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


@pytest.mark.parametrize("origin, cookies", [
    ("http://localhost:80", 2), ("http://evil.example", 0), ("https://localhost:80", 0), ("null", 0)])
def test_a_form_of_another_site_signs_nobody_in(hub, origin, cookies):
    response = Api(hub, HTTP_HOST="localhost:80")("POST", "/authorizations/token", {
        "username": "ada", "password": password_of("ada")}, headers={"Origin": origin, "Content-Type": "text/plain"})
    assert len(response.headers.getall("Set-Cookie")) == cookies


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


def test_an_oauth_token_proves_nothing_to_another_server(hub, root, bob):
    token = oauth_token(hub, "ada")
    assert root("GET", f"/authorizations/token/{token}").json["name"] == "ada"
    assert api_of(hub, "ada")("GET", f"/authorizations/token/{token}").json["name"] == "ada"
    bob("GET", f"/authorizations/token/{token}", status=404)


def test_a_sign_in_link_is_no_cookie(hub, root):
    with hub.connected():
        token = hub.link_for(hub.find_user("ada")).rpartition("/")[2]
    root("GET", f"/authorizations/cookie/minihub-link/{token}", status=404)


@pytest.mark.parametrize("options", [(), ("-w", "2"), ("--threads", "4")], ids=["sync", "two workers", "threads"])
def test_progress_is_streamed_while_the_hub_goes_on_answering(live, tmp_path, options):
    pytest.importorskip("tornado", reason="pip install '.[classroom]'")
    (tmp_path / "echo.py").write_text(ECHO_SERVER)
    hub = live(*options, cmd=f"sh -c 'while [ ! -e {tmp_path}/go ]; do sleep 0.1; done; exec {sys.executable} {tmp_path}/echo.py'",
               slow_spawn_timeout=0)
    hub.command("link", "ada")
    token = hub.command("token", "ada")
    assert hub.api("POST", "/users/ada/server", token)[0] == 202
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", hub.port, timeout=30)) as connection:
        connection.request("GET", "/hub/api/users/ada/server/progress", headers={"Authorization": f"token {token}"})
        response = connection.getresponse()
        assert response.getheader("Content-Type").startswith("text/event-stream")
        events = (json.loads(line[6:]) for line in response if line.startswith(b"data: "))
        assert [next(events)["progress"], next(events)["progress"]] == [0, 50]
        assert hub.request("GET", "/hub/health", timeout=5).status == 200
        (tmp_path / "go").touch()
        assert next(events) == {"progress": 100, "ready": True, "message": "Server ready at /user/ada/", "url": "/user/ada/",
                                "html_message": 'Server ready at <a href="/user/ada/">/user/ada/</a>'}
        assert not list(events)


########################################################################################################
# 11. OAuth2 provider
########################################################################################################


def test_an_oauth_service_identifies_people(served):
    browser = pages_of(served, "ada")
    page = browser.get("/hub/api/oauth2/authorize?client_id=service-boss&response_type=code&state=s", status=200)
    back = page.forms[0].submit(status=302).location
    assert back.startswith("/services/boss/oauth_callback?code=") and back.endswith("&state=s")
    reply = browser.post("/hub/api/oauth2/token", {
        "client_id": "service-boss", "client_secret": "boss-token", "grant_type": "authorization_code",
        "code": parse_qs(urlsplit(back).query)["code"][0], "redirect_uri": "/services/boss/oauth_callback"}).json
    who = Api(served, reply["access_token"])("GET", "/user").json
    assert who["name"] == "ada" and "access:services!service=boss" in who["scopes"]


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
        wishes = {"client_id": self.identifier, "redirect_uri": self.redirect_uri, "response_type": "code", "state": "s", **wishes}
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
    {"client_id": "jupyterhub-user-eve"}, {"client_id": None}, {"client_id": "\0"}, {"redirect_uri": "/user/ada/oauth_callback/"},
    {"redirect_uri": "/user/ADA/oauth_callback"}, {"redirect_uri": "https://evil.example/user/ada/oauth_callback"}, {"redirect_uri": ""},
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
    ({"client_secret": None}, 401, "invalid_client"), ({"code": "wrong"}, 400, "invalid_grant"), ({"code": None}, 400, "invalid_grant"),
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
# 12. Pages
########################################################################################################


def pages_of(hub, name=None, **environ):
    """A browser without JavaScript, in which that user has signed in."""
    pages = webtest.TestApp(hub, extra_environ={"REMOTE_ADDR": "127.0.0.1", **environ}, lint=True)
    if name:
        sign_in_at(pages, name)
    return pages


def sign_in_at(pages, name, password=None, url="/hub/login", status=302):
    """The response to the sign-in form."""
    form = pages.get(url, status=200).form
    form["username"], form["password"] = name, password or password_of(name)
    return form.submit(status=status)


def is_signed_in(pages, home="/hub/home"):
    """Whether the browser gets to see the home page."""
    return pages.get(home, status=(200, 302)).status_int == 200


def xsrf_of(pages, url="/hub/home"):
    """The token in the forms of a page."""
    return re.search(r'name=_xsrf value="(\w+)"', pages.get(url).text)[1]


def buttons_of(response):
    """What the page's main part offers to click, from top to bottom."""
    return [re.sub("<[^>]*>", "", text) for text in re.findall(r"(?:<button|<a class=)[^>]*>(.*?)</(?:button|a)>", response.text)]


def form_to(response, action):
    """The page's form that is sent to that path."""
    return next(form for form in response.forms.values() if form.action == action)


def alert_of(response):
    """What the page says has gone wrong."""
    return [element.get_text() for element in response.html.find_all(role="alert")]


def server_row(hub, name, server_name=""):
    """The row of a user's server."""
    with hub.connected():
        return hub.get_server(hub.find_user(name), server_name)


def link_of(hub, name):
    """The path of a new sign-in link of the user's."""
    with hub.connected():
        return urlsplit(hub.link_for(hub.find_user(name))).path

def test_signing_in_leads_home(hub):
    pages = pages_of(hub)
    assert sign_in_at(pages, "ada").headers["Location"] == "/hub/home"
    assert pages.get("/hub/home", status=200).html.h1.text == "Hello, ada"


def test_a_name_can_be_typed_in_any_case(hub):
    pages = pages_of(hub)
    sign_in_at(pages, "ADA", password_of("ada"))
    assert pages.get("/hub/home", status=200).html.h1.text == "Hello, ada"


@pytest.mark.parametrize("name, password", [("ada", "wrong"), ("ada", ""), ("eve", "eve eve secret"), ("", ""), ("a/b", "x"),
                                            ("<b>", "x"), ("ada\0", "x"), ("\udcff", "\udcff")])
def test_wrong_credentials_show_the_form_again_with_the_name_kept(hub, name, password):
    pages = pages_of(hub)
    form = {"_xsrf": xsrf_of(pages, "/hub/login"), "username": name.encode("utf-8", "surrogateescape"),
            "password": password.encode("utf-8", "surrogateescape")}
    response = pages.post("/hub/login", form, status=200)
    assert alert_of(response) == ["Wrong name or password."]
    assert response.form["username"].value == name.replace("\udcff", "\ufffd")
    assert response.form["password"].value == ""
    assert not is_signed_in(pages)


@pytest.mark.parametrize("given", [None, "", "wrong", "é"])
def test_signing_in_without_the_forms_token_loses_nothing_but_the_password(hub, given):
    pages = pages_of(hub)
    pages.get("/hub/login")
    form = {"username": "ada", "password": password_of("ada"), **({} if given is None else {"_xsrf": given})}
    response = pages.post("/hub/login?next=/hub/token", form, status=200)
    assert alert_of(response) == ["This page was open for too long, or cookies are switched off. Please sign in again."]
    assert response.form["username"].value == "ada"
    assert not is_signed_in(pages)
    response.form["password"] = password_of("ada")
    assert response.form.submit(status=302).headers["Location"] == "/hub/token"


def test_the_token_of_another_browser_signs_nobody_in(hub):
    token, pages = xsrf_of(pages_of(hub), "/hub/login"), pages_of(hub)
    pages.get("/hub/login")
    pages.post("/hub/login", {"username": "ada", "password": password_of("ada"), "_xsrf": token}, status=200)
    assert not is_signed_in(pages)


def test_too_many_wrong_passwords_are_throttled_on_the_page(hub):
    pages = pages_of(hub)
    for _ in range(5):
        sign_in_at(pages, "ada", "wrong", status=200)
    response = sign_in_at(pages, "ada", status=429)
    assert re.fullmatch(r"Too many failed sign-ins\. Try again in (299|300) seconds", alert_of(response)[0])
    assert response.headers["Retry-After"] in ("299", "300")
    assert response.form["username"].value == "ada"
    assert sign_in_at(pages, "bob").headers["Location"] == "/hub/home"


def test_a_throttled_name_can_sign_in_when_the_failures_are_forgotten(hub):
    pages = pages_of(hub)
    for _ in range(5):
        sign_in_at(pages, "ada", "wrong", status=200)
    with hub.connected():
        minihub.Failure.update(until=minihub.now()).execute()
    assert sign_in_at(pages, "ada").headers["Location"] == "/hub/home"


HTTP_COOKIES = {"jupyterhub-hub-login": {"HttpOnly", "Max-Age=1209600", "Path=/hub/", "SameSite=Lax"},
                "jupyterhub-session-id": {"HttpOnly", "Path=/", "SameSite=Lax"}}


def given_cookies(pages, home=""):
    """The attributes of the cookies that signing in gives."""
    form = pages.get(f"{home}/hub/login").form
    form["username"], form["password"] = "ada", password_of("ada")
    headers = form.response.headers.getall("Set-Cookie") + form.submit(status=302).headers.getall("Set-Cookie")
    return {name: set(attributes.split("; ")) for name, attributes in
            (re.fullmatch(r"([^=]+)=[^;]+; (.*)", header).groups() for header in headers)}


def test_cookies_are_for_http_and_this_site_only(hub):
    assert given_cookies(pages_of(hub)) == HTTP_COOKIES


def test_cookies_of_a_mounted_hub_stay_below_its_mount_point(hub):
    cookies = given_cookies(pages_of(hub, SCRIPT_NAME="/lab"), "/lab")
    assert {name: [part for part in parts if part.startswith("Path=")] for name, parts in cookies.items()} == {
        "jupyterhub-hub-login": ["Path=/lab/hub/"], "jupyterhub-session-id": ["Path=/lab/"]}


def test_cookies_are_secure_where_the_browser_uses_https(hub):
    cookies = given_cookies(pages_of(hub, **{"wsgi.url_scheme": "https"}))
    assert cookies == {name: parts | {"Secure"} for name, parts in HTTP_COOKIES.items()}


@pytest.mark.parametrize("address, secure", [("127.0.0.1", True), ("203.0.113.9", False)])
def test_only_a_trusted_proxys_word_for_https_counts(hub, address, secure):
    pages = pages_of(hub, REMOTE_ADDR=address, HTTP_X_FORWARDED_PROTO="https")
    assert ("Secure" in pages.get("/hub/login").headers["Set-Cookie"]) == secure


@pytest.mark.parametrize("cookie", ["", "nonsense", "WzEsIngiXQ.aaaaaa.bbbbbb"])
def test_a_forged_cookie_is_nobodys(hub, cookie):
    pages = pages_of(hub)
    pages.set_cookie("jupyterhub-hub-login", cookie)
    assert not is_signed_in(pages)


@pytest.mark.parametrize("age, valid", [(14 * 24 * 3600 - 60, True), (14 * 24 * 3600 + 60, False)])
def test_a_sign_in_lasts_two_weeks(hub, monkeypatch, age, valid):
    pages = pages_of(hub, "ada")
    let_links_and_cookies_age(monkeypatch, age)
    assert is_signed_in(pages) == valid


def let_links_and_cookies_age(monkeypatch, seconds):
    """What has been signed before is so much older now."""
    later = int(time.time()) + seconds
    monkeypatch.setattr("itsdangerous.TimestampSigner.get_timestamp", lambda self: later)


SAFE_NEXT = ["/hub/token", "/user/ada/lab?path=a%20b&x=1", "/user/ada/lab/tree/a%20b.ipynb#cell", "/", "/%2F%2Fevil.example",
             "/user/ada/?next=https://evil.example"]
EVIL_NEXT = ["", "//evil.example", "///evil.example", "https://evil.example/", "https:evil.example", "javascript:alert(1)",
             "/\\evil.example", "\\\\evil.example", "/\t/evil.example", "/\n/evil.example", "\t//evil.example", " //evil.example",
             "/ /evil.example", "/\0/evil.example", "/\x7f/evil.example", "%2F%2Fevil.example", "hub/token", "/hub\\token", "@evil"]


@pytest.mark.parametrize("target", SAFE_NEXT)
def test_signing_in_leads_to_where_one_was_going(hub, target):
    place = f"/hub/login?{urlencode({'next': target})}"
    pages = pages_of(hub)
    assert sign_in_at(pages, "ada", url=place).headers["Location"] == target
    assert pages.get(place, status=302).headers["Location"] == target


@pytest.mark.parametrize("target", EVIL_NEXT)
def test_signing_in_never_leads_off_the_site(hub, target):
    place = f"/hub/login?{urlencode({'next': target})}"
    pages = pages_of(hub)
    assert sign_in_at(pages, "ada", url=place).headers["Location"] == "/hub/home"
    assert pages.get(place, status=302).headers["Location"] == "/hub/home"


@pytest.mark.parametrize("target, location", [
    ("/user/ada/lab/tree/x.ipynb", "/user/ada/lab/tree/x.ipynb"),
    ("/user/bob/", "/user/ada/"), ("https://evil.example/", "/user/ada/"), ("//evil.example/user/ada/", "/user/ada/")])
def test_a_start_leads_on_into_the_server_only(hub, target, location):
    pages = pages_of(hub, "ada")
    place = f"/hub/spawn/ada?{urlencode({'next': target})}"
    pending = pages.get(place).form.submit(status=303)
    assert pending.follow(status=302).headers["Location"] == location


PRIVATE_PAGES = ["/hub/home", "/hub/spawn", "/hub/spawn/ada", "/hub/spawn/ada/project", "/hub/spawn-pending/ada", "/hub/token",
                 "/hub/admin", "/hub/user/ada/lab?x=a%20b", "/hub/user-redirect/lab/tree", "/hub/api/oauth2/authorize?client_id=x"]


@pytest.mark.parametrize("path", PRIVATE_PAGES)
def test_who_is_not_signed_in_is_asked_to_and_comes_back(hub, path):
    response = pages_of(hub).get(path, status=302)
    assert response.headers["Location"] == f"/hub/login?{urlencode({'next': path})}"


@pytest.mark.parametrize("path", ["/hub/spawn/ada", "/hub/stop/ada", "/hub/delete/ada/project", "/hub/token", "/hub/admin",
                                  "/hub/admin/link/ada"])
def test_a_form_sent_after_signing_out_leads_home_in_the_end(hub, path):
    pages = pages_of(hub)
    response = pages.post(path, {"_xsrf": "old"}, status=302)
    assert response.headers["Location"] == "/hub/login"
    assert sign_in_at(pages, "root", url=response.headers["Location"]).headers["Location"] == "/hub/home"


def test_signing_out_ends_the_session(hub):
    pages = pages_of(hub, "ada")
    response = pages.get("/hub/logout", status=302)
    assert response.headers["Location"] == "/hub/login"
    assert pages.cookies == {}
    assert not is_signed_in(pages)


def test_signing_out_ends_the_browser_sessions_tokens_and_no_others(hub, ada):
    pages = pages_of(hub, "ada")
    here, elsewhere = (token_for(hub, "ada", session_id=session_id) for session_id in
                       (pages.cookies["jupyterhub-session-id"], "0" * 32))
    pages.get("/hub/logout", status=302)
    Api(hub, here)("GET", "/user", status=403)
    Api(hub, elsewhere)("GET", "/user")
    ada("GET", "/user")


def test_signing_out_twice_leads_to_the_sign_in_page(hub):
    assert pages_of(hub).get("/hub/logout", status=302).headers["Location"] == "/hub/login"

def submit_password(pages, link, password="a new password", again=None, status=303, **fields):
    """The response to the form behind a sign-in link."""
    form = pages.get(link, status=200).form
    for field, value in {"password": password, "again": again or password, **fields}.items():
        form[field] = value
    return form.submit(status=status)


def test_a_sign_in_link_gives_a_password_and_signs_in(hub):
    pages = pages_of(hub)
    assert submit_password(pages, link_of(hub, "ada")).headers["Location"] == "/hub/home"
    assert is_signed_in(pages)
    assert sign_in_at(pages_of(hub), "ada", "a new password").headers["Location"] == "/hub/home"


def test_looking_at_a_sign_in_link_does_not_use_it_up(hub):
    link = link_of(hub, "ada")
    assert pages_of(hub).get(link, status=200).form["username"].value == "ada"
    assert pages_of(hub).get(link, status=200).form["username"].value == "ada"


def test_a_used_sign_in_link_works_no_more(hub):
    link, pages = link_of(hub, "ada"), pages_of(hub)
    form = pages.get(link).form
    submit_password(pages_of(hub), link)
    assert alert_of(form.submit(status=403)) == ["This link has been used already. Ask for a new one"]
    assert alert_of(pages.get(link, status=403)) == ["This link has been used already. Ask for a new one"]


def test_a_new_password_ends_sign_in_links_and_sessions(hub):
    link, pages = link_of(hub, "ada"), pages_of(hub, "ada")
    submit_password(pages_of(hub), link_of(hub, "ada"))
    assert not is_signed_in(pages)
    assert alert_of(pages.get(link, status=403)) == ["This link has been used already. Ask for a new one"]


@pytest.mark.parametrize("age, status", [(7 * 24 * 3600 - 60, 200), (7 * 24 * 3600 + 60, 403)])
def test_a_sign_in_link_is_good_for_a_week(hub, monkeypatch, age, status):
    link = link_of(hub, "ada")
    let_links_and_cookies_age(monkeypatch, age)
    pages_of(hub).get(link, status=status)


@pytest.mark.parametrize("change", [lambda link: link[:-2] + ("A" if link[-2] != "A" else "B") + link[-1], lambda link: link + "x",
                                    lambda link: "/hub/link/nonsense", lambda link: "/hub/link/" + "é"])
def test_a_forged_sign_in_link_is_refused(hub, change):
    response = pages_of(hub).get(quote(change(link_of(hub, "ada")), safe="/"), status=403)
    assert alert_of(response) == ["This link is not valid any more. Ask for a new one"]


@pytest.mark.parametrize("password, again, message", [
    ("a new password", "a new passwort", "The two passwords are not the same"),
    ("short", "short", "Choose a password of at least 8 characters that is not your name"),
    ("x" * 1001, "x" * 1001, "Choose a password of at least 8 characters that is not your name")])
def test_a_bad_new_password_is_refused_and_the_link_goes_on_working(hub, password, again, message):
    link, pages = link_of(hub, "ada"), pages_of(hub)
    response = submit_password(pages, link, password, again, status=400)
    assert alert_of(response) == [message]
    assert response.form["username"].value == "ada"
    assert sign_in_at(pages_of(hub), "ada").headers["Location"] == "/hub/home"
    submit_password(pages, link)


def test_a_sign_in_link_cannot_be_used_for_another_name(hub):
    submit_password(pages_of(hub), link_of(hub, "ada"), username="bob")
    assert sign_in_at(pages_of(hub), "bob").headers["Location"] == "/hub/home"
    assert sign_in_at(pages_of(hub), "ada", "a new password").headers["Location"] == "/hub/home"


@pytest.fixture
def first_link(make_hub):
    """The first admin's link, on a hub without users."""
    hub = make_hub()
    with hub.connected():
        return hub, urlsplit(hub.first_admin_link()).path


def test_the_first_admin_chooses_name_and_password(first_link):
    hub, link = first_link
    pages = pages_of(hub)
    assert submit_password(pages, link, username="Teacher").headers["Location"] == "/hub/home"
    assert "teacher (admin)" in pages.get("/hub/admin", status=200).text.replace("</b>", "").replace("</a>", "")


def test_there_is_one_first_admin_only(first_link):
    hub, link = first_link
    form = pages_of(hub).get(link).form
    submit_password(pages_of(hub), link, username="teacher")
    form["username"], form["password"], form["again"] = "eve", "a new password", "a new password"
    message = "This link has been used already. Sign in, or ask an admin for a link of your own"
    assert alert_of(form.submit(status=403)) == [message]
    with hub.connected():
        assert hub.get_user("eve") is None


@pytest.mark.parametrize("length, status", [(64 * 1024 - 9, 201), (64 * 1024 - 8, 400)])
def test_options_have_a_limit(ada, length, status):
    response = ada("POST", "/users/ada/server", {"a": "x" * length}, status=status)
    assert status == 201 or response.json == error(400, "The options of a start must not be longer than 65536 characters")


@pytest.mark.parametrize("length, status", [(65536, 201), (65537, 400)])
def test_the_note_of_a_token_has_a_limit(ada, length, status):
    response = ada("POST", "/users/ada/tokens", {"note": "x" * length}, status=status)
    assert status == 201 or response.json == error(400, "note must be a string of at most 65536 characters")


@pytest.mark.parametrize("options", [[], "cpu", 2, True])
def test_options_are_an_object(ada, options):
    assert ada("POST", "/users/ada/server", options, status=400).json == error(400, "The options of a start must be a JSON object")
@pytest.mark.parametrize("name, message", [("a/b", "Invalid username: a/b"), ("", "Invalid username: ")])
def test_a_first_admin_without_a_proper_name_is_asked_again(first_link, name, message):
    hub, link = first_link
    response = submit_password(pages_of(hub), link, username=name, status=400)
    assert alert_of(response) == [message.strip()] or alert_of(response) == [message]
    assert response.form["username"].value == name
    with hub.connected():
        assert not hub.has_admin() and not hub.list_users()[0]

AUTHORIZE = "/hub/api/oauth2/authorize?client_id=jupyterhub-user-bob&response_type=code"
FORMS = [("/hub/spawn/ada", {}), ("/hub/stop/bob", {}), ("/hub/delete/bob/project", {}), ("/hub/token", {"note": "x"}),
         ("/hub/token", {"revoke": "a1"}), ("/hub/admin", {"names": "eve"}), (AUTHORIZE, {})]


@pytest.fixture
def class_at_work(hub, root):
    """A hub where bob's server runs and he has another; the first token, a1, is root's."""
    api_of(hub, "bob")("POST", "/users/bob/server", status=201)
    root("GET", "/users/bob")
    with hub.connected():
        hub.find_or_create_server(hub.find_user("bob"), "project")
    return hub


def facts_of(hub):
    """Everything that the forms can change."""
    with hub.connected():
        return [[tuple(row.values()) for row in model.select(*columns).order_by(model.id).dicts()] for model, columns in (
            (minihub.User, [minihub.User.name, minihub.User.admin, minihub.User.password, minihub.User.session_key]),
            (minihub.Server, [minihub.Server.name, minihub.Server.status, minihub.Server.launch]),
            (minihub.Token, [minihub.Token.hashed]), (minihub.OAuthCode, [minihub.OAuthCode.hashed]))]


@pytest.mark.parametrize("path, fields", FORMS)
def test_a_form_of_the_hubs_own_pages_does_what_it_says(class_at_work, path, fields):
    pages = pages_of(class_at_work, "root")
    before = facts_of(class_at_work)
    pages.post(path, {"_xsrf": xsrf_of(pages), **fields}, status=(200, 302, 303))
    assert facts_of(class_at_work) != before


@pytest.mark.parametrize("path, fields", [*FORMS, ("/hub/admin/link/ada", {})])
@pytest.mark.parametrize("forge", [lambda hub, pages: {}, lambda hub, pages: {"_xsrf": "0" * 64}, lambda hub, pages: {"_xsrf": "é"},
                                   lambda hub, pages: {"_xsrf": xsrf_of(pages_of(hub, "ada"))}],
                         ids=["none", "wrong", "no ascii", "another user's"])
def test_a_form_of_another_site_changes_nothing(class_at_work, forge, path, fields):
    pages = pages_of(class_at_work, "root")
    fields, before = {**fields, **forge(class_at_work, pages)}, facts_of(class_at_work)
    response = pages.post(path, fields, status=403)
    assert "Go back, reload it and try again" in alert_of(response)[0]
    assert facts_of(class_at_work) == before


def test_a_forms_token_ends_with_the_session(hub):
    pages = pages_of(hub, "ada")
    token = xsrf_of(pages)
    pages.get("/hub/logout")
    sign_in_at(pages, "ada")
    pages.post("/hub/spawn/ada", {"_xsrf": token}, status=403)

@pytest.mark.parametrize("status, words, buttons", [
    ("stopped", "not running", ["Start"]), ("spawning", "starting", ["Watch", "Stop"]),
    ("ready", "running", ["Open", "Stop"]), ("stopping", "stopping", [])])
def test_home_offers_what_can_be_done_to_a_server(make_hub, spawner, status, words, buttons):
    hub = people(make_hub(named_servers=False))
    pages, spawner.answers, spawner.stubborn = pages_of(hub, "ada"), status != "spawning", True
    if status != "stopped":
        pages.get("/hub/home").form.submit(status=303)
    if status == "stopping":
        pages.get("/hub/home").form.submit(status=303)
    response = pages.get("/hub/home", status=200)
    assert response.html.select_one(".state").text == words
    assert buttons_of(response) == buttons
    assert server_row(hub, "ada").status == status


def test_home_looks_again_while_a_server_is_stopping(hub, spawner):
    pages, spawner.stubborn = pages_of(hub, "ada"), True
    pages.post("/hub/spawn/ada", {"_xsrf": xsrf_of(pages)}, status=303).follow()
    assert "Refresh" not in pages.get("/hub/home").headers
    pages.post("/hub/stop/ada", {"_xsrf": xsrf_of(pages)}, status=303)
    assert pages.get("/hub/home").headers["Refresh"] == "2"


def test_start_leads_through_the_waiting_page_into_the_server(hub, spawner):
    pages, spawner.answers = pages_of(hub, "ada"), False
    pending = pages.get("/hub/spawn/ada").form.submit(status=303)
    assert pending.headers["Location"] == "/hub/spawn-pending/ada"
    waiting = pending.follow(status=200)
    assert waiting.html.h1.text == "Your server is starting"
    assert waiting.html.select_one("#progress")["data-events"] == "/hub/api/users/ada/server/progress"
    assert waiting.html.noscript.meta["http-equiv"] == "refresh"
    spawner.answers = True
    with hub.connected():
        minihub.Server.update(target=f"{spawner.address}/here").where(minihub.Server.status == "spawning").execute()
    assert pending.follow(status=302).headers["Location"] == "/user/ada/"


def test_a_waiting_page_can_give_up(hub, spawner):
    pages, spawner.answers = pages_of(hub, "ada"), False
    waiting = pages.get("/hub/spawn/ada").form.submit(status=303).follow(status=200)
    stopped = waiting.form.submit(status=303)
    assert stopped.headers["Location"] == "/hub/home"
    assert buttons_of(stopped.follow(status=200))[0] == "Start"
    assert server_row(hub, "ada").status == "stopped"


def test_following_a_link_starts_nothing(hub):
    response = pages_of(hub, "ada").get("/hub/spawn", status=200)
    assert buttons_of(response) == ["Start"]
    assert server_row(hub, "ada").status == "stopped"


@pytest.mark.parametrize("answers, location", [(True, "/user/ada/"), (False, "/hub/spawn-pending/ada")])
def test_the_start_page_of_a_started_server_leads_on(hub, spawner, answers, location):
    pages, spawner.answers = pages_of(hub, "ada"), answers
    pages.get("/hub/spawn/ada").form.submit(status=303).follow()
    assert pages.get("/hub/spawn", status=302).headers["Location"] == location


def test_a_failed_start_shows_the_last_lines_of_its_log(hub, spawner):
    pages, spawner.exits_at_once = pages_of(hub, "ada"), 3
    response = pages.get("/hub/spawn/ada").form.submit(status=303).follow(status=200)
    assert response.html.h1.text == "Your server has failed"
    assert alert_of(response)[0].startswith("The server ended while it started [status=3]")
    assert response.html.pre.text == "Traceback\nImportError: no module named antigravity"
    assert buttons_of(response) == ["Start"]
    assert pages.get("/hub/home").html.pre.text == response.html.pre.text


def test_the_page_tells_which_of_several_servers_has_failed(hub, spawner):
    pages, spawner.exits_at_once = pages_of(hub, "ada"), 3
    start_named(pages, "project").follow()
    assert alert_of(pages.get("/hub/home"))[0].startswith("project: The server ended while it started [status=3]")


def test_the_log_on_the_page_cannot_be_html(hub, spawner, monkeypatch):
    monkeypatch.setattr(spawner, "log_tail", lambda state: "<script>alert(1)</script>")
    pages, spawner.exits_at_once = pages_of(hub, "ada"), 1
    response = pages.get("/hub/spawn/ada").form.submit(status=303).follow(status=200)
    assert response.html.pre.text == "<script>alert(1)</script>"
    assert response.html.script is None


def test_a_spawner_that_fails_says_so_on_the_page(hub, spawner):
    pages, spawner.problem = pages_of(hub, "ada"), RuntimeError("no more room")
    response = pages.get("/hub/spawn/ada").form.submit(status=303).follow(status=200)
    assert alert_of(response) == ["RuntimeError: no more room"]


def test_a_waiting_page_without_a_start_says_so(hub):
    response = pages_of(hub, "ada").get("/hub/spawn-pending/ada", status=200)
    assert response.html.h1.text == "Your server is not running"
    assert buttons_of(response) == ["Start"]


def start_named(pages, name, status=303):
    """The response to home's form for another server."""
    form = next(form for form in pages.get("/hub/home").forms.values() if "server_name" in form.fields)
    form["server_name"] = name
    return form.submit(status=status)


def test_another_server_is_started_by_name(hub):
    pages = pages_of(hub, "ada")
    response = start_named(pages, "project")
    assert response.headers["Location"] == "/hub/spawn-pending/ada/project"
    assert response.follow(status=302).headers["Location"] == "/user/ada/project/"
    assert server_row(hub, "ada").status == "stopped"


@pytest.mark.parametrize("name", ["a b", "../x", "lab", "é", "<b>", "x" * 64])
def test_a_server_name_that_cannot_be_is_refused(hub, name):
    assert alert_of(start_named(pages_of(hub, "ada"), name, status=400))[0].startswith("Invalid server_name")
    assert server_row(hub, "ada", name) is None


def test_the_limit_of_servers_is_explained(make_hub):
    hub = people(make_hub(named_server_limit=1))
    pages = pages_of(hub, "ada")
    start_named(pages, "one")
    assert "already has the maximum of 1 named servers" in alert_of(start_named(pages, "two", status=400))[0]


def test_the_page_of_a_named_server_makes_none_before_it_is_started(hub):
    pages = pages_of(hub, "ada")
    page = pages.get("/hub/spawn/ada/project", status=200)
    assert (buttons_of(page), server_row(hub, "ada", "project")) == (["Start"], None)
    assert page.form.submit(status=303).headers["Location"] == "/hub/spawn-pending/ada/project"
    assert server_row(hub, "ada", "project").status == "spawning"


@pytest.mark.parametrize("settings, name, message", [
    ({"named_servers": False}, "project", "Named servers are not enabled."), ({}, "lab", "Invalid server_name: 'lab'. Use up to 63.*")])
def test_there_is_no_page_for_a_server_that_cannot_be(make_hub, settings, name, message):
    hub = people(make_hub(**settings))
    assert alert_of(pages_of(hub, "ada").get(f"/hub/spawn/ada/{name}", status=400)) == [Like(message)]
    assert server_row(hub, "ada", name) is None


def test_without_named_servers_there_is_no_form_for_them(make_hub):
    hub = people(make_hub(named_servers=False))
    pages = pages_of(hub, "ada")
    assert "server_name" not in pages.get("/hub/home").text
    response = pages.post("/hub/spawn/ada", {"_xsrf": xsrf_of(pages), "server_name": "two"}, status=400)
    assert alert_of(response) == ["Named servers are not enabled."]


def test_a_named_server_can_be_deleted_when_it_is_stopped(hub):
    pages = pages_of(hub, "ada")
    start_named(pages, "project").follow()
    pages.post("/hub/stop/ada/project", {"_xsrf": xsrf_of(pages)}, status=303)
    assert "Delete" in buttons_of(pages.get("/hub/home"))
    pages.post("/hub/delete/ada/project", {"_xsrf": xsrf_of(pages)}, status=303)
    assert server_row(hub, "ada", "project") is None


def test_a_named_server_is_deleted_once_it_has_stopped(hub, spawner):
    pages, spawner.stubborn = pages_of(hub, "ada"), True
    start_named(pages, "project").follow()
    pages.post("/hub/delete/ada/project", {"_xsrf": xsrf_of(pages)}, status=303)
    assert server_row(hub, "ada", "project").status == "stopping"
    spawner.end_all()
    pages.get("/hub/home", status=200)
    assert "project" not in pages.get("/hub/home", status=200).html.main.section.text


def test_the_default_server_cannot_be_deleted(hub):
    pages = pages_of(hub, "ada")
    pages.post("/hub/delete/ada", {"_xsrf": xsrf_of(pages)}, status=404)
    pages.post("/hub/delete/ada/", {"_xsrf": xsrf_of(pages)}, status=404)
    assert server_row(hub, "ada")


@pytest.mark.parametrize("method, path", [("GET", "/hub/spawn/ada"), ("GET", "/hub/spawn/ada/new"), ("GET", "/hub/spawn-pending/ada"),
                                          ("POST", "/hub/spawn/ada"), ("POST", "/hub/stop/ada"), ("POST", "/hub/delete/ada/x"),
                                          ("GET", "/hub/spawn/nobody"), ("POST", "/hub/spawn/nobody")])
def test_a_student_gets_to_no_page_of_another(hub, method, path):
    pages = pages_of(hub, "bob")
    response = pages.request(path, method=method, POST={"_xsrf": xsrf_of(pages)} if method == "POST" else None, status=403)
    assert alert_of(response) == ["This page belongs to somebody else"]
    assert server_row(hub, "ada").status == "stopped" and server_row(hub, "ada", "new") is None


def test_an_admin_starts_and_stops_a_students_server(hub):
    pages = pages_of(hub, "root")
    response = pages.get("/hub/spawn/ada", status=200)
    assert "ada" in response.html.h1.text
    assert response.form.submit(status=303).follow(status=302).headers["Location"] == "/user/ada/"
    stopped = pages.post("/hub/stop/ada", {"_xsrf": xsrf_of(pages)}, status=303)
    assert stopped.headers["Location"] == "/hub/admin"
    assert "/hub/stop/ada" not in stopped.follow(status=200).text
    assert server_row(hub, "ada").status == "stopped"


def test_an_admin_is_told_of_a_user_who_does_not_exist(hub):
    assert alert_of(pages_of(hub, "root").get("/hub/spawn/eve", status=404)) == ["No such user: eve"]

def test_the_address_of_a_stopped_server_offers_to_start_it(hub):
    response = pages_of(hub, "ada").get("/user/ada/lab?x=1", status=302)
    assert response.headers["Location"] == "/hub/user/ada/lab?x=1"
    page = response.follow(status=503)
    assert page.html.h1.text == "Your server is not running"
    assert buttons_of(page) == ["Start"]
    started = page.form.submit(status=303)
    assert started.follow(status=302).headers["Location"] == "/user/ada/lab?x=1"


def test_the_address_of_anothers_stopped_server_leads_to_ones_own(hub):
    assert pages_of(hub, "bob").get("/hub/user/ada/lab", status=302).headers["Location"] == "/user/bob/lab"


def test_the_address_of_a_stopped_server_lets_an_admin_start_it(hub):
    response = pages_of(hub, "root").get("/hub/user/ada/lab", status=503)
    assert "ada" in response.html.h1.text
    assert urlsplit(response.form.action).path == "/hub/spawn/ada"


def test_the_address_of_a_server_that_runs_leads_back_to_it(hub):
    pages = pages_of(hub, "ada")
    pages.get("/hub/spawn/ada").form.submit(status=303).follow()
    assert pages.get("/hub/user/ada/lab/a%20b?x=1", status=302).headers["Location"] == "/user/ada/lab/a%20b?x=1"


@pytest.mark.parametrize("path", ["/hub/user/ADA/lab/a%2Fb?x=1", "/hub/user/%EF%BD%81da/lab/a%2Fb?x=1", "/hub/user/a%44a/lab/a%2Fb?x=1"])
def test_the_address_of_a_server_that_runs_leads_back_to_it_however_its_owner_is_spelled(hub, path):
    pages = pages_of(hub, "ada")
    pages.get("/hub/spawn/ada").form.submit(status=303).follow()
    assert pages.get(path, extra_environ={"RAW_URI": path}, status=302).headers["Location"] == "/user/ada/lab/a%2Fb?x=1"


def test_the_address_of_a_server_that_runs_may_end_with_its_owner(hub):
    pages = pages_of(hub, "ada")
    pages.get("/hub/spawn/ada").form.submit(status=303).follow()
    assert pages.get("/hub/user/Ada?x=1", status=302).headers["Location"] == "/user/ada/?x=1"


@pytest.mark.parametrize("method, path, accept", [("GET", "/user/ada/api/contents", "*/*"), ("POST", "/user/ada/lab", "text/html"),
                                                  ("GET", "/user/ada/lab", "application/json"), ("GET", "/user/eve/api", "*/*")])
def test_programs_are_told_that_a_server_does_not_run(hub, method, path, accept):
    response = pages_of(hub).request(path, method=method, headers={"Accept": accept}, status=503)
    name = path.split("/")[2]
    assert response.json == {"status": 503, "message": f"JupyterHub server no longer running at {path}. Restart the server at"
                                                       f" /hub/spawn/{name}"}


@pytest.mark.parametrize("sent", ["/h%75b/user/ada/lab", "/%68%75%62/user/ada/lab", "/hub/%75ser/ada/lab"])
def test_no_spelling_of_an_address_leads_to_another_site(hub, sent):
    pages = pages_of(hub, "ada")
    pages.get("/hub/spawn/ada").form.submit(status=303).follow()
    response = pages.get("/hub/user/ada/lab", extra_environ={"RAW_URI": sent}, status=302)
    assert response.headers["Location"] == "/user/ada/lab"


@pytest.mark.parametrize("base_url, mount", [("/", ""), ("/\u00fcben/", "/%C3%BCben")])
@pytest.mark.parametrize("path, sent, location", [
    ("/hub/user/ada/lab/a b", "/hub/user/ada/lab/%61%20b", "/user/ada/lab/a%20b"),
    ("/hub/user/ada/lab/a/b", "/hub%2Fuser/ada/lab/a%2fb", "/user/ada/lab/a%2fb"),
    ("/hub/user-redirect/lab/a/b", "/hub/user-redirect%2Flab/a%2Fb", "/user/ada/lab/a%2Fb"),
    ("/user/bob/lab/a/b", "/user%2Fbob/lab/a%2Fb", "/hub/user/bob/lab/a%2Fb")])
def test_no_spelling_of_an_address_leads_astray(make_hub, base_url, mount, path, sent, location):
    hub = people(make_hub(base_url=base_url))
    pages = webtest.TestApp(hub, extra_environ={"REMOTE_ADDR": "127.0.0.1"}, lint=True)
    sign_in_at(pages, "ada", url=f"{mount}/hub/login")
    pages.get(f"{mount}/hub/spawn/ada").form.submit(status=303).follow()
    raw = mount.replace("%C3%BC", "%c3%bc") + sent
    response = pages.get(f"{mount}{quote(path)}", extra_environ={"RAW_URI": raw}, status=302)
    assert response.headers["Location"] == f"{mount}{location}"


def test_a_link_for_everybody_leads_to_ones_own_server(hub):
    response = pages_of(hub, "ada").get("/hub/user-redirect/lab/tree/a%20b.ipynb?x=1", status=302)
    assert response.headers["Location"] == "/user/ada/lab/tree/a%20b.ipynb?x=1"

def test_the_token_page_makes_a_token_that_works_and_shows_it_once(hub):
    pages = pages_of(hub, "ada")
    form = pages.get("/hub/token").form
    form["note"] = "grading"
    response = form.submit(status=200)
    token = response.html.code.text
    assert Api(hub, token)("GET", "/user").json["name"] == "ada"
    page = pages.get("/hub/token")
    assert "grading" in page.text and token not in page.text


def test_the_token_page_revokes_a_token(hub):
    pages, token = pages_of(hub, "ada"), token_for(hub, "ada")
    response = pages.get("/hub/token").forms[1].submit("revoke", status=303)
    assert response.headers["Location"] == "/hub/token"
    Api(hub, token)("GET", "/user", status=403)


def test_the_token_page_revokes_nobody_elses_token(hub, root):
    pages = pages_of(hub, "ada")
    pages.post("/hub/token", {"_xsrf": xsrf_of(pages), "revoke": "a1"}, status=404)
    root("GET", "/user")


def test_the_token_a_server_runs_with_is_not_on_the_page(hub):
    pages = pages_of(hub, "ada")
    pages.get("/hub/spawn/ada").form.submit(status=303).follow()
    assert buttons_of(pages.get("/hub/token")) == ["Make a token"]

def add_people(pages, names, status=200):
    """The response to the form of the People page."""
    form = form_to(pages.get("/hub/admin"), "/hub/admin")
    form["names"] = names
    return form.submit(status=status)


def test_people_are_added_and_each_gets_a_link(hub):
    response = add_people(pages_of(hub, "root"), "Carla\n\n  Dan \nADA\n")
    rows = response.html.select("[role=status] .row")
    assert "Here already: ada" in response.html.select_one("[role=status]").text
    assert [row.b.text for row in rows] == ["carla", "dan"]
    submit_password(pages_of(hub), urlsplit(rows[0].code.text).path)
    assert sign_in_at(pages_of(hub), "carla", "a new password").headers["Location"] == "/hub/home"


@pytest.mark.parametrize("settings, site", [({}, "http://class.example:8080"),
                                            ({"public_url": "https://hub.example"}, "https://hub.example")])
def test_links_on_the_people_page_lead_to_where_the_teachers_browser_is(make_hub, settings, site):
    pages = pages_of(people(make_hub(**settings)), "root", HTTP_HOST="class.example:8080")
    assert add_people(pages, "carla").html.code.text.startswith(f"{site}/hub/link/")


@pytest.mark.parametrize("names, status, message", [
    ("carla\na/b\n..\n", 400, "Invalid usernames: a/b, .."), ("ada\nBOB", 409, "All 2 users already exist"),
    (" \n", 400, "Write at least one name")])
def test_people_who_cannot_be_added_stay_in_the_form(hub, names, status, message):
    response = add_people(pages_of(hub, "root"), names, status)
    assert alert_of(response) == [message]
    assert form_to(response, "/hub/admin")["names"].value.split() == names.split()
    with hub.connected():
        assert [user.name for user in hub.list_users()[0]] == ["root", "ada", "bob"]


def test_a_lost_password_is_replaced_through_a_new_link(hub):
    pages = pages_of(hub, "root")
    response = form_to(pages.get("/hub/admin"), "/hub/admin/link/ada").submit(status=200)
    submit_password(pages_of(hub), urlsplit(response.html.code.text).path)
    assert sign_in_at(pages_of(hub), "ada", "a new password").headers["Location"] == "/hub/home"


def test_the_people_page_shows_the_servers_that_run(hub):
    pages_of(hub, "ada").get("/hub/spawn/ada").form.submit(status=303).follow()
    pages = pages_of(hub, "root")
    assert [form.action for form in pages.get("/hub/admin").forms.values()] == [
        "/hub/admin", "/hub/admin/link/root", "/hub/admin/link/ada", "/hub/stop/ada", "/hub/admin/link/bob"]


@pytest.mark.parametrize("method, path", [("GET", "/hub/admin"), ("POST", "/hub/admin"), ("POST", "/hub/admin/link/root"),
                                          ("POST", "/hub/admin/link/ada")])
def test_the_people_page_is_for_admins(hub, method, path):
    pages = pages_of(hub, "ada")
    form = {"_xsrf": xsrf_of(pages), "names": "eve"} if method == "POST" else None
    assert alert_of(pages.request(path, method=method, POST=form, status=403)) == ["This page is for admins"]
    assert "/hub/admin" not in pages.get("/hub/home").text
    with hub.connected():
        assert hub.get_user("eve") is None

@pytest.mark.parametrize("path, status, location", [("/", 302, "/hub/"), ("/hub", 301, "/hub/"), ("/hub/", 302, "/hub/login")])
def test_the_root_leads_to_the_hub(hub, path, status, location):
    assert pages_of(hub).get(path, status=status).headers["Location"] == location


def test_the_root_leads_home_who_is_signed_in(hub):
    assert pages_of(hub, "ada").get("/hub/", status=302).headers["Location"] == "/hub/home"


def test_health_is_an_empty_answer(hub):
    assert pages_of(hub).get("/hub/health", status=200).text == ""


def test_health_fails_with_the_database(hub, monkeypatch):
    monkeypatch.setattr(hub, "check_health", lambda: hub.database.execute_sql("SELECT 1 FROM nowhere"))
    assert "database does not answer" in pages_of(hub).get("/hub/health", status=503).text


def test_the_logo_is_a_picture(hub):
    assert pages_of(hub).get("/hub/logo", status=200).content_type == "image/svg+xml"


def test_browsers_may_report_what_a_policy_has_blocked(hub):
    pages_of(hub).post("/hub/security/csp-report", b"{}", content_type="application/csp-report", status=204)


def test_a_page_that_does_not_exist_says_so_and_leads_home(hub):
    response = pages_of(hub, "ada").get("/hub/nowhere", status=404)
    assert alert_of(response) == ["There is no page at this address"]
    assert response.html.main.a["href"] == "/hub/home"


def test_a_failing_page_shows_nothing_of_what_is_inside(hub, monkeypatch):
    def fail(user):
        raise RuntimeError("a secret")

    pages = pages_of(hub, "ada")
    monkeypatch.setattr(hub, "servers_of", fail)
    response = pages.get("/hub/home", status=500)
    assert alert_of(response) == ["Internal Server Error"] and "a secret" not in response.text


ALL_PAGES = ["/hub/login", "/hub/home", "/hub/spawn/ada", "/hub/spawn-pending/ada", "/hub/spawn-pending/bob", "/hub/token", "/hub/admin",
             "/hub/user/ada/lab", "/hub/nowhere", AUTHORIZE, "link"]


@pytest.fixture(params=ALL_PAGES)
def any_page(request, class_at_work, spawner):
    """Each of the pages as the admin sees it, of a hub mounted at /lab."""
    hub, spawner.answers = class_at_work, False
    pages = pages_of(hub, SCRIPT_NAME="/lab")
    path = link_of(hub, "ada") if request.param == "link" else request.param
    if path.startswith("/hub/link") or path.endswith("/login"):
        return pages.get(f"/lab{path}", status=200)
    sign_in_at(pages, "root", url="/lab/hub/login")
    if path.endswith("pending/bob"):
        api_of(hub, "root")("DELETE", "/users/bob/server", status=204)
        pages.post("/lab/hub/spawn/bob", {"_xsrf": xsrf_of(pages, "/lab/hub/home")}, status=303)
    return pages.get(f"/lab{path}", status="*")


def test_every_field_has_a_label_and_every_button_a_word(any_page):
    page = any_page.html
    assert page.html["lang"] == "en" and page.title.text and len(page.find_all("h1")) == 1
    for field in page.select("input:not([type=hidden]), textarea"):
        assert field.get("aria-label") or field.find_parent("label").get_text(strip=True)
    for button in page.select("button, a"):
        assert button.get_text(strip=True) or button.get("aria-label")
    identifiers = [element["id"] for element in page.select("[id]")]
    assert len(identifiers) == len(set(identifiers))


def test_every_link_and_form_stays_below_the_mount_point(any_page):
    places = [element[key] for key in ("href", "action", "src", "data-events", "data-next") for element in
              any_page.html.select(f"[{key}]")]
    assert places and not [place for place in places if not place.startswith("/lab/")]


def test_no_page_runs_what_is_not_its_own_or_stays_in_a_cache(any_page):
    nonce = re.search(r"style-src 'nonce-([\w-]+)'", any_page.headers["Content-Security-Policy"])[1]
    assert any_page.headers["Content-Security-Policy"] == (
        "default-src 'none'; img-src 'self'; connect-src 'self'; base-uri 'none';"
        f" style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; frame-ancestors 'self'")
    assert {element.get("nonce") for element in any_page.html.select("style, script")} == {nonce}
    assert not re.search(r"<[^>]+\s(?:on\w+|style)=", any_page.text)
    assert {name: any_page.headers[name] for name in ("Cache-Control", "Referrer-Policy", "X-Content-Type-Options")} == {
        "Cache-Control": "no-store", "Referrer-Policy": "same-origin", "X-Content-Type-Options": "nosniff"}


def test_names_cannot_be_html(hub):
    pages = pages_of(hub, "root")
    add_people(pages, '<img src=x>"\'&')
    page = pages.get("/hub/admin")
    assert [b.text for b in page.html.select(".card .row b")][-1] == '<img src=x>"\'&'
    assert page.html.img is None
    assert pages.get(f"/hub/spawn/{quote('<img src=x>')}%22'&", status=200).html.img is None

CHROMIUM_OPTIONS = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
                    " --disable-component-update --disable-sync").split()
PASSWORD = "correct horse"


@pytest.fixture
def chromium():
    """Opens a page in a browser session of its own: `chromium(java_script_enabled=False)`."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install '.[test]'")
    if not CHROMIUM:
        pytest.skip("apt-get install chromium")
    with playwright.sync_playwright() as driver, contextlib.closing(
            driver.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)) as chrome:
        def open_page(**options):
            context = chrome.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
            context.set_default_timeout(60_000)
            return context.new_page()

        yield open_page


def choose_password(page, link, **fields):
    """Open a sign-in link and do what it asks for."""
    page.goto(link)
    for name, value in {**fields, "password": PASSWORD, "again": PASSWORD}.items():
        page.fill(f"[name={name}]", value)
    page.click("text=Save and sign in")
    page.wait_for_url("**/hub/home")


def first_admin(hub, page):
    """Become the first admin, by the link that the hub has printed."""
    link = wait_for(lambda: re.search(r"http://\S+/hub/link/\S+", hub.log.read_text()), message="no link was printed")[0]
    choose_password(page, link, username="Teacher")
    return page


def students(hub, teacher, chromium, *names):
    """A page each for new students, who have come by the links that the People page shows."""
    teacher.goto(f"{hub.url}/hub/admin")
    teacher.fill("[name=names]", "\n".join(names))
    teacher.click("text=Add >> nth=-1")
    pages = [chromium() for _ in names]
    for page, link in zip(pages, teacher.locator("code").all_text_contents(), strict=True):
        choose_password(page, link)
    return pages


def start_lab(page):
    """From home into JupyterLab."""
    page.click("button:has-text('Start') >> nth=0")
    page.wait_for_url("**/user/*/lab**")
    page.wait_for_selector(".jp-LauncherCard")


def run_cell(page, code):
    """What a new notebook's first cell prints."""
    page.click(".jp-LauncherCard[data-category=Notebook] >> nth=0")
    page.wait_for_selector("#jp-main-statusbar >> text=/Idle/")
    page.click(".jp-Notebook .cm-content")
    page.keyboard.type(code)
    page.keyboard.press("Shift+Enter")
    return page.wait_for_selector(".jp-OutputArea-output").inner_text().strip()


def sign_in_page(page, name):
    """Fill in the sign-in form."""
    page.fill("[name=username]", name)
    page.fill("[name=password]", PASSWORD)
    page.click("main button")


@needs_singleuser
def test_a_class_works_in_jupyterlab_behind_one_sync_worker(live, chromium):
    hub = live()
    teacher = first_admin(hub, chromium())
    ada, bob = students(hub, teacher, chromium, "ada", "bob")
    server = f"{hub.url}/user/ada/lab"

    start_lab(ada)
    assert run_cell(ada, "print(6*7)") == "42"

    assert bob.goto(server).status == 403
    assert bob.inner_text("[role=alert]") == "You may not open the server of ada"

    teacher.goto(server)
    assert teacher.inner_text("h1") == "Open this server?"
    teacher.click("button:has-text('Open it')")
    teacher.wait_for_selector(".jp-LabShell")

    ada.goto(f"{hub.url}/hub/logout")
    ada.goto(server)
    assert ada.inner_text("h1") == "Sign in"
    sign_in_page(ada, "ada")
    ada.wait_for_selector(".jp-LabShell")

    ada.goto(f"{hub.url}/hub/home")
    ada.click("text=Stop")
    ada.wait_for_selector("text=not running")
    ada.click("text=Sign out ada")
    ada.goto(server)
    assert ada.inner_text("h1") == "Sign in"


@needs_singleuser
def test_a_class_works_in_jupyterlab_on_host_names_of_its_own(live, chromium):
    """The students' servers are where nothing of the hub's is; browsers find every `.localhost` on this machine."""
    port = minihub.free_port()
    places = {"public_url": f"http://localhost:{port}", "user_url": f"http://{{username}}.localhost:{port}"}
    hub = live("--bind", f"127.0.0.1:{port}", **places)
    hub.url = places["public_url"]
    teacher = first_admin(hub, chromium())
    ada, = students(hub, teacher, chromium, "ada")
    server = f"http://ada.localhost:{port}/user/ada/lab"

    start_lab(ada)
    assert ada.url == server
    assert run_cell(ada, "print(6*7)") == "42"
    assert {cookie["domain"] for cookie in ada.context.cookies() if cookie["name"].startswith("jupyterhub-hub")} == {"localhost"}

    teacher.goto(f"{hub.url}/user/ada/lab")
    assert urlsplit(teacher.url).netloc == f"localhost:{port}"
    teacher.click("button:has-text('Open it')")
    teacher.wait_for_selector(".jp-LabShell")
    assert teacher.url == server

    ada.goto(f"{hub.url}/hub/home")
    ada.click("text=Stop")
    ada.wait_for_selector("text=not running")
    teacher.goto(server)
    assert (teacher.url, teacher.inner_text("h1")) == (f"{hub.url}/hub/user/ada/lab", "ada's server is not running")


@pytest.fixture
def live_site(live):
    """Starts a site with a hub below /lab, in a gunicorn with one sync worker: `live_site("school:site")`."""
    return lambda app: live(kind=type("LiveSite", (LiveHub,), {"app": app, "prefix": "/lab"}))


@needs_singleuser
def test_a_class_works_in_jupyterlab_in_the_readmes_flask_site(live_site, tmp_path, chromium):
    pytest.importorskip("flask", reason="pip install '.[test]'")
    (tmp_path / "school.py").write_text(readme_text("from flask import Flask, redirect"))
    site, ada, bob = live_site("school:site"), chromium(), chromium()
    for page, name in ((ada, "Ada"), (bob, "bob")):
        page.goto(f"{site.url}/lab/hub/home")
        assert urlsplit(page.url).path == "/login"
        page.fill("[name=name]", name)
        page.click("text=Sign in")
        assert page.inner_text("h1") == f"Hello, {name.lower()}"

    start_lab(ada)
    assert urlsplit(ada.url).path == "/lab/user/ada/lab"
    assert run_cell(ada, "print(6*7)") == "42"
    assert bob.goto(f"{site.url}/lab/user/ada/lab").status == 403

    ada.goto(f"{site.url}/lab/hub/logout")
    assert urlsplit(ada.url).path == "/login"
    ada.goto(f"{site.url}/lab/user/ada/lab")
    assert urlsplit(ada.url).path == "/login"


def start_django_site(live_site, folder, hub="Hub("):
    """The README's Django site, with the superuser ada; `hub` is what its hub is made with before the README's settings."""
    pytest.importorskip("django", reason="pip install '.[test]'")
    environ = {**os.environ, "DJANGO_SUPERUSER_PASSWORD": PASSWORD}
    for words in ("django startproject school .", "manage migrate", "manage createsuperuser --noinput --username ada --email ada@school.example"):
        subprocess.run([sys.executable, "-m", *words.split()], cwd=folder, env=environ, check=True, capture_output=True)
    (folder / "school" / "wsgi.py").write_text(readme_text("django").replace("Hub(", hub))
    return live_site("school.wsgi:application")


@needs_singleuser
def test_a_teacher_works_in_jupyterlab_in_the_readmes_django_site(live_site, tmp_path, chromium):
    site, ada = start_django_site(live_site, tmp_path), chromium()
    ada.goto(f"{site.url}/lab/hub/home")
    assert urlsplit(ada.url).path == "/admin/login/"
    ada.fill("[name=username]", "ada")
    ada.fill("[name=password]", PASSWORD)
    ada.click("[type=submit]")
    assert ada.inner_text("h1") == "Hello, ada"

    start_lab(ada)
    assert urlsplit(ada.url).path == "/lab/user/ada/lab"
    assert run_cell(ada, "print(6*7)") == "42"

    ada.goto(f"{site.url}/lab/hub/logout")
    assert urlsplit(ada.url).path == "/admin/"
    ada.click("text=Log out")
    ada.goto(f"{site.url}/lab/user/ada/lab")
    assert urlsplit(ada.url).path == "/admin/login/"


@pytest.fixture
def django_site(live_site, tmp_path):
    """The README's Django site, whose servers are echo servers."""
    (tmp_path / "echo.py").write_text(ECHO_SERVER)
    cmd = f"{sys.executable} {tmp_path / 'echo.py'}"
    return start_django_site(live_site, tmp_path, f"Hub(cmd={cmd!r}, ")


def test_no_secret_reaches_a_server_in_the_readmes_django_site(django_site):
    with requests.Session() as browser:
        page = browser.get(f"{django_site.url}/lab/hub/home")
        assert urlsplit(page.url)._replace(scheme="", netloc="").geturl() == "/admin/login/?next=%2Flab%2Fhub%2Fhome"
        page = browser.post(page.url, {"username": "ada", "password": PASSWORD, "next": "/lab/hub/home",
                                       "csrfmiddlewaretoken": browser.cookies["csrftoken"]})
        assert "Hello, ada" in page.text and "People" in page.text
        xsrf = re.search(r'name=_xsrf value="(\w+)"', page.text)[1]
        token = browser.post(f"{django_site.url}/lab/hub/api/users/ada/tokens", headers={"X-XSRFToken": xsrf}).json()["token"]
        django_site.start_server("ada", token)
        got = browser.get(f"{django_site.url}/lab/user/ada/echo", headers={"Authorization": f"token {token}"}).json()
        secrets = [token, browser.cookies["sessionid"], browser.cookies["csrftoken"]]
    headers = dict(got["headers"])
    assert not [secret for secret in secrets if secret in json.dumps(got)]
    assert headers["Cookie"] == f"jupyterhub-session-id={browser.cookies['jupyterhub-session-id']}"
    assert django_site.request("GET", "/lab/hub/api/user", headers={"Authorization": headers["Authorization"]}).status == 200
    assert django_site.api("GET", "/users", headers["Authorization"].split()[1])[0] == 403


def test_who_is_not_signed_in_at_the_django_site_is_nobody_at_the_hub(django_site):
    headers = {"Cookie": "sessionid=made-up", "Referer": f"{django_site.url}/lab/hub/home"}
    assert django_site.request("GET", "/lab/hub/api/user", headers=headers).status == 403
    assert django_site.request("GET", "/", headers=headers).status == 200


def class_with_one_password(live, folder, cmd):
    """A hub that lets everybody in with one password, whose servers are that command."""
    pytest.importorskip("tornado", reason="pip install '.[classroom]'")
    (folder / "echo.py").write_text(ECHO_SERVER)
    return live(authenticator="dummy", password=PASSWORD, cmd=cmd.format(python=sys.executable, echo=folder / "echo.py"))


@pytest.mark.parametrize("scripts", [True, False])
def test_pages_work_with_and_without_javascript(live, tmp_path, chromium, scripts):
    hub = class_with_one_password(live, tmp_path, "sh -c 'sleep 1; exec {python} {echo}'")
    page = chromium(java_script_enabled=scripts)
    page.goto(f"{hub.url}/user/ada/echo")
    sign_in_page(page, "ada")
    assert page.inner_text("h1") == "Your server is not running"
    page.click("text=Start")
    assert page.inner_text("h1") == "Your server is starting"
    page.wait_for_url("**/user/ada/echo")
    assert json.loads(page.inner_text("body"))["uri"] == "/user/ada/echo"
    page.goto(f"{hub.url}/hub/home")
    assert page.get_attribute("text=Open", "href") == "/user/ada/"
    page.click("text=Stop")
    page.wait_for_selector("text=not running")


@pytest.mark.parametrize("scripts", [True, False])
def test_a_failed_start_shows_its_log_in_the_browser(live, tmp_path, chromium, scripts):
    hub = class_with_one_password(live, tmp_path, "sh -c 'sleep 1; echo No module named antigravity; exit 3'")
    page = chromium(java_script_enabled=scripts)
    page.goto(f"{hub.url}/hub/login")
    sign_in_page(page, "ada")
    page.click("text=Start >> nth=0")
    assert page.inner_text("h1") == "Your server is starting"
    page.wait_for_selector("pre")
    assert page.inner_text("h1") == "Your server has failed"
    assert page.inner_text("pre") == "No module named antigravity"


@needs_chp
@needs_singleuser
def test_jupyterlab_works_through_a_real_proxy_that_dies_and_comes_back(live, chromium):
    front, api = minihub.free_port(), minihub.free_port()
    hub = live(authenticator="dummy", password=PASSWORD, proxy="chp", chp_api_url=f"http://127.0.0.1:{api}",
               chp_command=f"{CHP} --ip 127.0.0.1 --port {front}")
    hub.front = front
    wait_for(lambda: through(hub, "/hub/login") == 200)
    ada = chromium()
    ada.goto(f"http://127.0.0.1:{front}/hub/login")
    sign_in_page(ada, "ada")
    start_lab(ada)
    assert run_cell(ada, "x = 42; print(x)") == "42"

    os.killpg(proxy_process(hub)["pid"], signal.SIGKILL)
    wait_for(lambda: through(hub, "/user/ada/api") is None)
    wait_for(lambda: through(hub, "/user/ada/api") == 200)
    ada.reload()
    ada.wait_for_selector("#jp-main-statusbar >> text=/Idle/")
    ada.click(".jp-Notebook .cm-content >> nth=-1")
    ada.keyboard.type("print(x + 1)")
    ada.keyboard.press("Shift+Enter")
    ada.wait_for_selector(".jp-OutputArea-output:has-text('43')")


def test_a_link_is_not_used_by_another_sites_form(hub):
    link = link_of(hub, "ada")
    page = pages_of(hub).post(link, {"password": "a new password", "again": "a new password"}, status=400)
    assert "open for too long" in page.text
    assert submit_password(pages_of(hub), link).headers["Location"] == "/hub/home"


@pytest.mark.parametrize("settings, words", [({}, "running"), (
    {"idle_timeout": 3600}, "running; as things stand it will be stopped at 2026-01-01 13:00 UTC")])
def test_home_says_when_an_idle_server_will_be_stopped(make_hub, settings, words):
    hub = people(make_hub(**settings))
    ada = api_of(hub, "ada")
    ada("POST", "/users/ada/server", status=201)
    ada("POST", "/users/ada/activity", {"servers": {"": {"last_activity": "2026-01-01T12:00:00Z"}}})
    assert pages_of(hub, "ada").get("/hub/home").html.select_one(".state.ready").text == words


########################################################################################################
# 13. The WSGI application
########################################################################################################


SOURCE = Path(minihub.__file__).read_text()


def section_of(line, source):
    """The number of the section that a line is in."""
    return [section for number, section in banners_of(source) if number <= line][-1]


def sections_using(name):
    """The numbers of the sections in which a name, or a module's attribute, occurs."""
    found = [node for node in ast.walk(ast.parse(SOURCE))
             if isinstance(node, (ast.Name, ast.Attribute)) and ast.unparse(node) == name]
    return {section_of(node.lineno, SOURCE) for node in found}


@pytest.mark.parametrize(("name", "sections"), [
    ("os.environ", {2}), ("os.getenv", set()), ("subprocess", {6}), ("falcon", {9, 10, 11, 12, 13}), ("pw", {4, 8}), ("print", {14})])
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


TWO_HOSTS = {"public_url": "https://hub.example", "user_url": "https://{username}.nb.example"}


@pytest.fixture
def on_two_hosts(make_hub):
    """A hub whose servers have host names of their own; `.at(host, name)` is a browser that asks for that host."""
    hub = people(make_hub(**TWO_HOSTS))
    hub.at = lambda host, name=None, **environ: pages_of(hub, name, HTTP_HOST=host, **{"wsgi.url_scheme": "https"}, **environ)
    return hub


@pytest.mark.parametrize(("host", "path", "place"), [
    ("hub.example", "/user/ada/lab?a=b%2F", "https://ada.nb.example/user/ada/lab?a=b%2F"), ("127.0.0.1:8000", "/user/ada/", "https://ada.nb.example/user/ada/"),
    ("bob.nb.example", "/user/ada/", "https://ada.nb.example/user/ada/"), ("nb.example", "/user/Ada/", f"https://{minihub.host_label('Ada')}.nb.example/user/Ada/"),
    ("hub.example", "/user/a.b/", f"https://{minihub.host_label('a.b')}.nb.example/user/a.b/"),
    ("ada.nb.example", "/hub/login", "https://hub.example/hub/login"), ("ADA.nb.example:443", "/", "https://hub.example/"),
    ("ada.nb.example", "/hub/api/user", "https://hub.example/hub/api/user"), ("ada.nb.example", "/user/", "https://hub.example/user/"),
    ("ada.nb.example", "/services/x/", "https://hub.example/services/x/"), ("ada.nb.example", "/user/ada", None), ("hub.example", "/hub/login", None),
    ("127.0.0.1:8000", "/hub/api/", None), ("nb.example", "/hub/login", None)])
def test_where_servers_have_a_host_each_page_has_its_own(on_two_hosts, host, path, place):
    answer = on_two_hosts.at(host).get(path, status="*")
    assert (answer.location if (answer.location or "").startswith("https:") else None) == place
    assert place is None or answer.status_int == 302


class OnlyPlainNames(minihub.DummyAuthenticator):
    """Keeps capitals, and takes no name that its directory could not hold."""

    def normalize(self, name):
        if not name.isascii():
            raise minihub.BadRequest(f"No name: {name}")
        return name


def test_a_host_is_for_names_as_routes_spell_them_whatever_the_authenticator_says(make_hub, spawner):
    hub = make_hub(**TWO_HOSTS, authenticator=OnlyPlainNames(), password=PASSWORD)
    with hub.connected():
        hub.create_user("Ada")
    address = hub.start_server("Ada")
    assert urlsplit(address).netloc == f"{minihub.host_label('Ada')}.nb.example"
    assert pages_of(hub, HTTP_HOST="hub.example").get("/user/Ada/", status=302).location == address
    assert pages_of(hub, HTTP_HOST="hub.example").get("/user/%C3%A9/", status=302).location.endswith(".nb.example/user/%C3%A9/")


def test_a_name_in_capitals_leads_to_the_host_of_its_server(on_two_hosts, spawner):
    ada, place = on_two_hosts.at("hub.example", "ada"), "https://hub.example/user/ADA/lab?a=b"
    on_two_hosts.start_server("ada")
    for _ in range(4):
        host, path = re.fullmatch("https://([^/]+)(.*)", place).groups()
        place = urljoin(place, ada.get(path, headers={"Host": host}, status=302).location)
    assert place == "https://ada.nb.example/user/ada/lab?a=b"


@pytest.mark.parametrize(("host", "path", "method", "environ"), [
    ("ada.nb.example", "/hub/login", "POST", {}), ("hub.example", "/user/ada/api/contents", "DELETE", {}),
    ("hub.example", "/user/ada/api/kernels/1/channels", "GET", {"HTTP_UPGRADE": "websocket", "HTTP_CONNECTION": "Upgrade"})])
def test_what_cannot_be_sent_to_the_right_host_is_told_of_it(on_two_hosts, host, path, method, environ):
    answer = on_two_hosts.at(host, **environ).request(path, method=method, headers={"Host": host}, status=421)
    right = {"ada.nb.example": "hub.example", "hub.example": "ada.nb.example"}[host]
    assert f"This is to be found at https://{right}{path} only" in answer.text


def test_a_server_with_a_host_of_its_own_is_told_so(make_hub, spawner):
    hub = people(make_hub(**TWO_HOSTS, base_url="/lab/"))
    assert hub.start_server("ada", "gpu") == "https://ada.nb.example/lab/user/ada/gpu/"
    variables = spawner.launches[0].variables
    assert {name: variables[f"JUPYTERHUB_{name}"] for name in ("HOST", "OAUTH_CALLBACK_URL", "PUBLIC_URL", "PUBLIC_HUB_URL", "SERVICE_PREFIX")} == {
        "HOST": "https://hub.example", "OAUTH_CALLBACK_URL": "https://ada.nb.example/lab/user/ada/gpu/oauth_callback",
        "PUBLIC_URL": "https://ada.nb.example/lab/user/ada/gpu/", "PUBLIC_HUB_URL": "https://hub.example/lab/hub/",
        "SERVICE_PREFIX": "/lab/user/ada/gpu/"}


def test_pages_and_the_api_lead_to_the_servers_host(on_two_hosts, spawner):
    address, ada = "https://ada.nb.example/user/ada/", on_two_hosts.at("hub.example", "ada")
    api = Api(on_two_hosts, token_for(on_two_hosts, "ada"))
    api("POST", "/users/ada/server", status=201)
    model = api("GET", "/users/ada").json
    assert (model["server"], model["servers"][""]["url"]) == (address, address)
    assert f'"url": "{address}"' in api("GET", "/users/ada/server/progress").text
    assert ada.get("/hub/home").html.find("a", string="Open")["href"] == address
    assert ada.get("/hub/spawn/ada", status=302).location == address
    assert ada.get("/hub/spawn/ada?next=/user/ada/tree", status=302).location == f"{address}tree"
    assert ada.get("/hub/spawn/ada?next=/user/bob/tree", status=302).location == address
    assert ada.get("/hub/user-redirect/tree?a=b", status=302).location == f"{address}tree?a=b"
    assert ada.get("/hub/user/ada/tree?a=b", status=302).location == f"{address}tree?a=b"
    assert ada.get("/hub/user/bob/tree", status=302).location == f"{address}tree"


def test_programs_learn_that_a_server_with_a_host_of_its_own_does_not_run(on_two_hosts):
    answer = on_two_hosts.at("ada.nb.example").get("/user/ada/api/status", status=503)
    assert answer.json == error(503, "JupyterHub server no longer running at /user/ada/api/status. Restart the server at"
                                     " https://hub.example/hub/spawn/ada")


def test_on_the_servers_host_there_is_nothing_of_the_site_around_the_hub(make_hub):
    def site(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"the site"]

    application = webtest.TestApp(make_hub(**TWO_HOSTS, base_url="/lab/").wrap(site))
    assert application.get("/grades", headers={"Host": "hub.example"}).text == "the site"
    assert application.get("/grades", headers={"Host": "ada.nb.example"}, status=302).location == "https://hub.example/grades"


@pytest.fixture(params=[("mounted", "/lab"), ("base_url", "/lab"), ("mounted", "/a/b"), ("base_url", "/a/b"),
                        ("mounted", "/\u00fcben/p 2"), ("base_url", "/\u00fcben/p 2")], ids=":".join)
def below(request, make_hub):
    """A hub below a path, the site that it is in, and the path as browsers write it."""
    way, path = request.param
    hub = people(make_hub(base_url=f"{path}/" if way == "base_url" else "/"))
    in_wsgi = path.encode().decode("latin-1")
    return hub, mounted(hub, in_wsgi) if way == "mounted" else webtest.TestApp(hub, lint=True), quote(path)


def test_a_hub_below_a_path_stays_there(below, spawner):
    hub, site, path = below
    headers = {"Authorization": f"token {token_for(hub, 'ada')}"}
    site.post(f"{path}/hub/api/users/ada/server", headers=headers, status=201)
    assert site.get(f"{path}/hub/api/users/ada", headers=headers, status=200).json == user(
        "ada", server=f"{path}/user/ada/", last_activity=MOMENT,
        servers={"": server(url=f"{path}/user/ada/", progress_url=f"{path}/hub/api/users/ada/server/progress")})
    variables = spawner.launches[0].variables
    assert [variables[f"JUPYTERHUB_{name}"] for name in ("BASE_URL", "SERVICE_PREFIX", "API_URL", "OAUTH_CALLBACK_URL")] == [
        f"{path}/", f"{path}/user/ada/", f"http://127.0.0.1:80{path}/hub/api", f"{path}/user/ada/oauth_callback"]
    with hub.connected():
        assert list(hub.proxy.get_all_routes()) == [f"{path}/user/ada/"]


def test_a_hub_below_a_path_sends_browsers_there(below):
    hub, site, path = below
    response = site.get(f"{path}/hub/home", status=302)
    assert response.location == f"{path}/hub/login?{urlencode({'next': f'{path}/hub/home'})}"
    form = response.follow(status=200).form
    form["username"], form["password"] = "ada", password_of("ada")
    response = form.submit(status=302)
    assert response.location == f"{path}/hub/home"
    assert re.findall(r"Path=[^;]+", response.headers["Set-Cookie"]) == [f"Path={path}/hub/"]
    assert site.get(f"{path}/hub/home", status=200).text.count(f'action="{path}/hub/') > 0


def test_a_browser_gets_into_a_server_of_a_hub_below_a_path(below, spawner):
    hub, site, path = below
    site.post(f"{path}/hub/api/users/ada/server", headers={"Authorization": f"token {token_for(hub, 'ada')}"}, status=201)
    sign_in_at(site, "ada", url=f"{path}/hub/login")
    variables = spawner.launches[0].variables
    query = urlencode({"client_id": variables["JUPYTERHUB_CLIENT_ID"], "response_type": "code",
                       "redirect_uri": variables["JUPYTERHUB_OAUTH_CALLBACK_URL"]})
    callback = site.get(f"{path}/hub/api/oauth2/authorize?{query}", status=302).location
    assert callback.partition("?")[0] == f"{path}/user/ada/oauth_callback" and "code=" in callback


def test_a_hub_below_a_path_sends_clients_there_for_the_next_page(below):
    hub, site, path = below
    headers = {"Authorization": f"token {token_for(hub, 'root')}", "Accept": minihub.PAGE_TYPE}
    response = site.get(f"{path}/hub/api/users?limit=1", headers=headers, status=200)
    assert response.json["_pagination"]["next"]["url"] == f"http://localhost:80{path}/hub/api/users?limit=1&offset=1"


def test_the_prefix_without_its_slash_leads_to_the_hub(below):
    hub, site, path = below
    assert site.get(path, status=302).location == f"{path}/hub/"


@pytest.mark.parametrize("script", ["", "/school"])
@pytest.mark.parametrize("path", ["/", "/user/ada/x%20y?z", "/hub/health", "/labs/hub/health", "/x/lab/hub/health"])
def test_a_request_outside_of_base_url_is_led_inside_and_does_not_move_the_hub(make_hub, script, path):
    hub = make_hub(base_url="/lab/")
    response = webtest.TestApp(hub, extra_environ={"SCRIPT_NAME": script}, lint=True).get(f"{script}{path}", status=302)
    assert response.headers["Location"] == f"{script}/lab/hub{path}"
    with hub.connected():
        assert hub.mount.base == "/lab/"


def test_what_cannot_be_led_inside_of_base_url_is_not_found(make_hub):
    response = webtest.TestApp(make_hub(base_url="/lab/"), lint=True).post("/hub/api/users/ada", status=404)
    assert response.json == error(404, "The hub is below /lab/")


def test_a_page_outside_of_base_url_leads_inside(make_hub):
    response = webtest.TestApp(make_hub(base_url="/lab/"), lint=True).post("/grades", status=404)
    assert response.html.main.a["href"] == "/lab/hub/home"


def test_a_mount_point_is_not_taken_for_a_base_url_that_is_spelled_alike(make_hub):
    site = mounted(make_hub(base_url="/lab/"), "/lab")
    assert site.get("/lab/lab/hub/login", status=200).html.h1.text == "Sign in"
    assert site.get("/lab/hub/login", status=302).location == "/lab/lab/hub/hub/login"


def test_links_made_before_the_first_request_lead_below_the_base_url(make_hub):
    hub = people(make_hub(base_url="/\u00fcben/", public_url="https://school.example"))
    with hub.connected():
        assert hub.link_for(hub.find_user("ada")).startswith("https://school.example/%C3%BCben/hub/link/")


def a_page(environ, start_response):
    """A site with one page, which says where it is."""
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"the site at {environ['SCRIPT_NAME']}{environ['PATH_INFO']}".encode("latin-1")]


@pytest.mark.parametrize(("base_url", "path", "title"), [
    ("/", "/hub/login", "Sign in"), ("/", "/hub/api/nothing", None), ("/lab/", "/lab/hub/login", "Sign in"),
    ("/lab/", "/lab/services/none/", "Nothing here"), ("/\u00fcben/a/", "/%C3%BCben/a/hub/login", "Sign in")])
def test_a_hub_in_front_of_a_site_takes_its_own_paths(make_hub, base_url, path, title):
    response = webtest.TestApp(make_hub(base_url=base_url).wrap(a_page)).get(path, status="*")
    assert response.headers["X-JupyterHub-Version"] == "1.5.1" and (title is None or response.html.h1.text == title)


@pytest.mark.parametrize(("base_url", "path"), [
    ("/", "/"), ("/", "/hubs"), ("/", "/a/hub/login"), ("/", "/users/"), ("/", "//hub/login"), ("/lab/", "/lab/"), ("/lab/", "/lab"),
    ("/lab/", "/hub/login"), ("/lab/", "/lab/hubs"), ("/lab/", "/x/lab/hub/login"), ("/\u00fcben/a/", "/hub/login")])
def test_a_hub_in_front_of_a_site_leaves_it_all_others(make_hub, base_url, path):
    assert webtest.TestApp(make_hub(base_url=base_url).wrap(a_page)).get(path, status=200).text == f"the site at {path}"


def test_a_hub_in_front_of_a_site_may_be_below_a_mount_point_itself(make_hub):
    site = webtest.TestApp(make_hub(base_url="/lab/").wrap(a_page), extra_environ={"SCRIPT_NAME": "/school"})
    assert site.get("/school/lab/hub/home", status=302).location == "/school/lab/hub/login?next=%2Fschool%2Flab%2Fhub%2Fhome"
    assert site.get("/school/lab/", status=200).text == "the site at /school/lab/"


def test_two_hubs_in_one_site_share_nothing(make_hub, spawner):
    one, other = people(make_hub(base_url="/one/")), people(make_hub(base_url="/other/"))
    site = webtest.TestApp(one.wrap(other.wrap(a_page)), extra_environ={"REMOTE_ADDR": "127.0.0.1"}, lint=True)
    sign_in_at(site, "ada", url="/one/hub/login")
    assert (is_signed_in(site, "/one/hub/home"), is_signed_in(site, "/other/hub/home")) == (True, False)
    token = {"Authorization": f"token {token_for(one, 'ada')}"}
    site.post("/one/hub/api/users/ada/server", headers=token, status=201)
    site.get("/other/hub/api/user", headers=token, status=403)
    with other.connected():
        assert (other.proxy.get_all_routes(), other.running_servers(), other.secret == one.secret) == ({}, {}, False)


def test_routes_of_an_embedded_proxy_are_nobodys_when_there_is_another(make_hub, tmp_path):
    database = f"sqlite:///{tmp_path}/hub.sqlite"
    with (before := people(make_hub(database=database))).connected():
        running(before)
    response = pages_of(make_hub(database=database, proxy="chp")).get("/user/ada/lab", status=302)
    assert response.headers["Location"] == "/hub/user/ada/lab"


def test_the_hub_is_in_one_place_by_whatever_address_its_machine_is_reached(hub):
    stored = []
    hub.arrive = stored.append
    app = webtest.TestApp(hub, extra_environ={"SERVER_NAME": "0.0.0.0", "SERVER_PORT": "8000"})
    with socket.create_server(("0.0.0.0", 0)) as listener:
        for address in ("127.0.0.1", "127.0.0.2"):
            with socket.create_connection((address, listener.getsockname()[1])), listener.accept()[0] as connection:
                app.get("/hub/health", extra_environ={"gunicorn.socket": connection})
    assert stored == [minihub.Mount("/", "http://127.0.0.1:8000")] * 2


def test_where_the_hub_is_mounted_is_not_a_clients_to_choose(live):
    hub = live()
    before = hub.facts("mount")
    answer = hub.request("GET", "/evil/hub/api/user", headers={"SCRIPT_NAME": "/evil"})
    assert (answer.status, json.loads(answer.body)["message"]) == (
        400, "The header SCRIPT_NAME is not believed. To have the hub below a path, set MINIHUB_BASE_URL")
    assert hub.facts("mount") == before == {"base": "/", "address": hub.url}


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


def test_a_request_that_another_one_overtakes_says_so(hub, root, monkeypatch):
    create_token = hub.create_token

    def create_too_late(user, *values, **columns):
        user.delete_instance()
        return create_token(user, *values, **columns)

    monkeypatch.setattr(hub, "create_token", create_too_late)
    response = root("POST", "/users/ada/tokens", {}, status=409)
    assert response.json == error(409, "Somebody else has changed this in the same moment. Look at it again")


@pytest.mark.parametrize(("path", "kind", "text"), [
    ("/hub/api/user", "application/json", json.dumps(error(503, minihub.NO_DATABASE))), ("/hub/home", "text/plain", minihub.NO_DATABASE)])
def test_without_its_database_the_hub_says_so(hub, monkeypatch, path, kind, text):
    def gone(self):
        raise minihub.pw.OperationalError("could not connect: password=secret")

    monkeypatch.setattr(Hub, "database", property(gone))
    response = webtest.TestApp(hub).get(path, status=503)
    monkeypatch.undo()
    assert (response.content_type, response.text) == (kind, text)
    assert (response.headers["Retry-After"], response.headers["X-JupyterHub-Version"]) == ("5", "1.5.1")


@pytest.mark.database("postgres")
@pytest.mark.parametrize("path", ["/hub/api/users", "/user/ada/lab", "/hub/health"])
def test_a_connection_that_the_database_has_ended_is_made_anew(hub, root, postgres, path):
    root("GET", "/users")
    with contextlib.closing(postgres.connect(hub.database.database)) as connection:
        assert end_hubs_of(connection) == 1
    root.app.get(path, headers={"Authorization": f"token {root.token}"}, status=503)
    assert len(root("GET", "/users").json) == 3


@pytest.mark.database("postgres")
def test_the_ticker_gets_over_the_end_of_its_connection(make_hub, spawner, postgres):
    hub = people(make_hub(tick_interval=0.01))
    Api(hub, token_for(hub, "ada"))("POST", "/users/ada/server", status=201)
    with contextlib.closing(postgres.connect(hub.database.database)) as connection:
        assert end_hubs_of(connection) >= 1
    spawner.end_all()
    with contextlib.closing(postgres.connect(hub.database.database)) as connection:
        wait_for(lambda: ("stopped",) in ask_postgres(connection, "SELECT status FROM servers WHERE user_id = 2"))
    hub._ticking.set()


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


BENCH_TOKEN = "bench-admin-token"

JUPYTERHUB_CONFIG = """
c.JupyterHub.authenticator_class = "dummy"
c.Authenticator.allow_all = True
c.JupyterHub.bind_url = "http://127.0.0.1:{public}"
c.JupyterHub.hub_port = {hub}
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:{proxy}"
c.JupyterHub.services = [{{"name": "bench", "api_token": "{token}"}}]
c.JupyterHub.load_roles = [{{"name": "admin", "services": ["bench"]}}]
c.JupyterHub.log_level = "ERROR"
"""


@contextlib.contextmanager
def serving(folder, port, *command, **environ):
    """A hub that listens on the port; yields the seconds to its first answer, and its process."""
    with open(folder / "log", "wb") as output:
        began = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", *command], cwd=folder, stdout=output, stderr=output,
                                   env={**os.environ, "PYTHONPATH": str(HERE), **environ}, start_new_session=True)
    try:
        wait_for(lambda: answers_health(port), 60, f"{command[0]} does not answer")
        yield time.perf_counter() - began, process
    finally:
        process.terminate()
        process.wait(30)


def answers_health(port):
    with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
        connection.request("GET", "/hub/health")
        return connection.getresponse().status == 200


def measured_minihub(folder):
    """The figures of a gunicorn with one sync worker."""
    port = minihub.free_port()
    services = json.dumps([{"name": "bench", "admin": True, "api_token": BENCH_TOKEN}])
    with serving(folder, port, "gunicorn", "minihub:app", "--bind", f"127.0.0.1:{port}", "--no-control-socket",
                 MINIHUB_SERVICES=services) as (seconds, process):
        return measured(port, seconds, process)


def measured_jupyterhub(folder):
    """The figures of JupyterHub, asked at its hub's own port, which is its quickest."""
    ports = {name: minihub.free_port() for name in ("public", "hub", "proxy")}
    (folder / "config.py").write_text(JUPYTERHUB_CONFIG.format(token=BENCH_TOKEN, **ports))
    with serving(folder, ports["hub"], "jupyterhub", "-f", "config.py") as (seconds, process):
        wait_for(lambda: is_open(ports["public"]), 60, "the proxy does not listen")
        return measured(ports["hub"], seconds, process)


def measured(port, seconds, process):
    """What there is to say of a hub, by what it is."""
    admin = {"Authorization": f"token {BENCH_TOKEN}"}
    answered(port, "POST", "/hub/api/users/ada", admin)
    token = answered(port, "POST", "/hub/api/users/ada/tokens", admin)["token"]
    began = time.perf_counter()
    answered(port, "POST", "/hub/api/users", admin, {"usernames": [f"student{number}" for number in range(1000)]})
    creation = time.perf_counter() - began
    ada = {"Authorization": f"token {token}"}
    return {
        "start to first answer, s": seconds,
        "1,000 users by POST /users, s": creation,
        "GET /user, requests/s": rate(port, "/hub/api/user", ada, reuse=False),
        "GET /user, requests/s, keep-alive": rate(port, "/hub/api/user", ada, reuse=True),
        "GET /health, requests/s": rate(port, "/hub/health", {}, reuse=False),
        "GET /health, requests/s, keep-alive": rate(port, "/hub/health", {}, reuse=True),
        "memory of all its processes, MB": sum(map(memory_of, family_of(process.pid))) / 1e6}


def answered(port, method, path, headers, body=None):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=300)) as connection:
        connection.request(method, path, body and json.dumps(body), headers)
        response = connection.getresponse()
        content = response.read()
        assert response.status in (200, 201), content
        return json.loads(content)


def rate(port, path, headers, reuse, count=500):
    """Requests a second of one client, who may use a connection again, if the hub lets it."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        began = time.perf_counter()
        for _ in range(count):
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            response.read()
            assert response.status == 200
            if not reuse:
                connection.close()
        return count / (time.perf_counter() - began)


def family_of(pid):
    """A process and all that it has started."""
    return [pid, *itertools.chain.from_iterable(map(family_of, children_of(pid)))]


@pytest.mark.bench
def test_how_it_compares_with_jupyterhub(tmp_path, capsys):
    pytest.importorskip("jupyterhub", reason="pip install '.[classroom]'")
    folders = [tmp_path / name for name in ("minihub", "jupyterhub")]
    for folder in folders:
        folder.mkdir()
    ours = measured_minihub(folders[0])
    theirs = measured_jupyterhub(folders[1]) if CHP else {}
    with capsys.disabled():
        print(f"\n{'':36}{'minihub':>10}{'JupyterHub':>12}{'ratio':>8}")
        for what, figure in ours.items():
            other = theirs.get(what)
            print(f"{what:36}{figure:10.1f}" + (f"{other:12.1f}{figure / other:8.2f}" if other else ""))


#: A single-user server that starts in milliseconds and answers 200 to everything. Its arguments: the port, and how many
#: seconds it takes to start; with a third one it does not end when it is interrupted.
MOCK_SERVER = """
import signal, socket, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN if len(sys.argv) > 3 else signal.SIG_DFL)
time.sleep(float(sys.argv[2]))
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while True:
    connection, _ = listener.accept()
    with connection:
        try:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\nContent-Length: 4\\r\\n\\r\\nmock")
        except OSError:
            pass
"""


def start_mocked(live, folder, *options, seconds=0, stubborn="", **settings):
    """A gunicorn whose servers are mock servers, with the admin root and the student ada; `.token` is root's."""
    (folder / "mock.py").write_text(MOCK_SERVER)
    command = f"{sys.executable} -IS {folder / 'mock.py'} {{port}} {seconds} {stubborn}"
    hub = live(*options, **{"cmd": command, "admins": "root", **settings})
    hub.command("link", "ada")
    hub.token = hub.command("token", "root")
    return hub


def kill_all(hub):
    """kill -9 to gunicorn and all its workers at once."""
    os.killpg(hub.process.pid, signal.SIGKILL)
    hub.process.wait(10)


def all_processes():
    """All processes: pid -> (parent, process group, state, command line)."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent, group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            found[int(folder.name)] = (int(parent), int(group), state, (folder / "cmdline").read_text().replace("\0", " "))
    return found


def groups_in(folder):
    """The process groups of the servers that run there, each with the commands in it."""
    found = {}
    for _, group, state, command in all_processes().values():
        if state != "Z" and f"{folder}/" in command and "gunicorn" not in command:
            found.setdefault(group, []).append(command)
    return found


def zombies_of(hub):
    """The dead that gunicorn or its workers have not buried."""
    family = {hub.process.pid, *hub.workers()}
    return [pid for pid, (parent, _, state, _) in all_processes().items() if parent in family and state == "Z"]


def status_of(hub, name="ada", server_name=""):
    """The row's status, None if there is no such server."""
    found = hub.rows("SELECT status FROM servers JOIN users ON users.id = user_id"
                     f" WHERE users.name = '{name}' AND servers.name = '{server_name}'")
    return found[0] if found else None


def pid_of(hub, name="ada"):
    """The process id of a user's default server."""
    return hub.api("GET", f"/users/{name}", hub.token)[1]["servers"][""]["state"]["pid"]


def at_once(*actions):
    """What the actions return that begin at the same moment, each in a thread of its own."""
    return in_threads(len(actions), lambda number: actions[number]())


def chaos(hub, random, over, answers):
    """A client that does what comes into its mind until it is over, and notes what it was answered."""
    names = [f"student{number}" for number in range(12)]
    while not over.is_set():
        name, path = random.choice(names), random.choice(["server", "servers/a", "servers/b"])
        method, path, body = random.choice([
            ("POST", f"/users/{name}/{path}", None), ("POST", f"/users/{name}/{path}", {"size": 1}), ("POST", f"/users/{name}", None),
            ("POST", "/users", {"usernames": random.sample(names, 3)}), ("DELETE", f"/users/{name}/{path}", None),
            ("DELETE", f"/users/{name}/servers/a", {"remove": True}), ("PATCH", f"/users/{name}", {"name": random.choice(names)}),
            ("DELETE", f"/users/{name}", None), ("POST", f"/users/{name}/tokens", {"note": "x"}),
            ("GET", f"/users/{name}/tokens", None), ("GET", "/users", None), ("GET", f"/users/{name}", None),
            ("GET", "/user", None), ("GET", "/proxy", None), ("POST", "/proxy", None)])
        try:
            answers.append((hub.api(method, path, hub.token, body)[0], method, path))
        except (OSError, http.client.HTTPException):  # its worker was killed, or there is none
            answers.append((0, method, path))


def discrepancies(hub):
    """What in rows, processes and routes does not agree, when all is quiet."""
    with contextlib.closing(sqlite3.connect(hub.folder / "minihub.sqlite")) as database:
        rows = database.execute("SELECT users.name, servers.name, status, state, prefix, target, servers.id FROM servers"
                                " JOIN users ON users.id = user_id").fetchall()
        routes = dict(database.execute("SELECT prefix, target FROM routes"))
        tokens = [row[0] for row in database.execute("SELECT server_id FROM tokens WHERE server_id IS NOT NULL")]
        clients = [row[0] for row in database.execute("SELECT server_id FROM oauthclients WHERE server_id IS NOT NULL")]
    ready = [row for row in rows if row[2] == "ready"]
    running = groups_in(hub.folder)
    found = {
        "pending": [row for row in rows if row[2] in ("spawning", "stopping")],
        "prefixes": [row for row in ready if row[4] != f"/user/{row[0]}/" + (f"{row[1]}/" if row[1] else "")],
        "states": [row for row in rows if row[2] == "stopped" and (row[3] or row[5])],
        "routes": {route for route in routes.items() if route[0] != "/"} ^ {(row[4], row[5]) for row in ready},
        "processes": running.keys() ^ {json.loads(row[3])["pid"] for row in ready},
        "doubles": [commands for commands in running.values() if len(commands) != 2],  # the supervisor and its command
        "tokens": sorted(tokens) != sorted(row[6] for row in ready), "clients": sorted(clients) != sorted(row[6] for row in ready),
        "zombies": zombies_of(hub)}
    return {what: wrong for what, wrong in found.items() if wrong}


@pytest.mark.parametrize(("options", "share"), [("-w 4", 1), ("-w 2 --threads 4 --preload", 1 / 4)])
def test_in_chaos_nothing_is_lost(live, tmp_path, options, share):
    seconds = max(6, float(os.environ.get("CHAOS_SECONDS") or (60 if os.environ.get("CI") else 10)) * share)
    hub = start_mocked(live, tmp_path, *options.split(), start_timeout=20)
    hub.start_server("ada", hub.token)
    kept, over, answers, random = pid_of(hub), threading.Event(), [], Random(4)
    clients = [threading.Thread(target=chaos, args=(hub, Random(number), over, answers)) for number in range(6)]
    for client in clients:
        client.start()
    begin = time.monotonic()
    for restart_at in (seconds / 3, seconds * 2 / 3, seconds):
        while time.monotonic() - begin < restart_at:
            over.wait(random.uniform(0.2, 1.5))
            for worker in random.sample(workers := hub.workers(), min(1, len(workers))):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
        if restart_at < seconds:
            kill_all(hub)
            hub.start()
    over.set()
    for client in clients:
        client.join(60)
    with contextlib.suppress(pytest.fail.Exception):
        wait_for(lambda: not discrepancies(hub), 40)
    assert discrepancies(hub) == {}
    assert [answer for answer in answers if answer[0] >= 500] == []
    assert pid_of(hub) == kept and hub.request("GET", "/user/ada/").body == b"mock"
    counts = [sum(1 for status, method, path in answers if status in good and method == verb and re.fullmatch(pattern, path))
              for good, verb, pattern in (((201, 202), "POST", ".*/server.*"), ((202, 204), "DELETE", ".*/server.*"),
                                          ((200,), "PATCH", ".*"), ((204,), "DELETE", r"/users/\w+"), ((200, 201), "POST", ".*/tokens"))]
    assert min(counts) > 0, f"too little has happened: {counts}"


@pytest.fixture
def crowd(live, tmp_path):
    """A gunicorn with two workers of eight threads each, whose servers are mock servers."""
    return start_mocked(live, tmp_path, "-w", "2", "--threads", "8", slow_spawn_timeout=3, slow_stop_timeout=1)


def test_twenty_who_start_a_server_at_once_start_it_once(crowd, tmp_path):
    statuses = at_once(*[lambda: crowd.api("POST", "/users/ada/server", crowd.token)[0]] * 20)
    assert set(statuses) <= {201, 202, 400} and {201, 202} & set(statuses)
    wait_for(lambda: status_of(crowd) == "ready")
    assert list(groups_in(tmp_path)) == [pid_of(crowd)]


def test_a_start_against_a_stop_ends_with_one_of_them(crowd):
    start, stop = (lambda: crowd.api("POST", "/users/ada/server", crowd.token)), (lambda: crowd.api("DELETE", "/users/ada/server", crowd.token))
    for _ in range(5):
        statuses = [answer[0] for answer in at_once(start, stop, start, stop)]
        assert set(statuses) <= {201, 202, 204, 400}
        wait_for(lambda: status_of(crowd) in ("ready", "stopped") and not discrepancies(crowd))


@pytest.mark.parametrize(("method", "body", "done"), [("DELETE", None, 204), ("PATCH", {"name": "grace"}, 200)])
def test_a_start_against_the_end_of_a_name_ends_with_one_of_them(crowd, method, body, done):
    for _ in range(5):
        crowd.api("POST", "/users/ada", crowd.token)
        started, (ended, _) = at_once(lambda: crowd.api("POST", "/users/ada/server", crowd.token)[0],
                                      lambda: crowd.api(method, "/users/ada", crowd.token, body))
        assert started in (201, 202, 404) and ended in (done, 400)
        wait_for(lambda: not discrepancies(crowd))
        assert status_of(crowd) == ("ready" if ended == 400 else None)
        for name in ("ada", "grace"):
            crowd.api("DELETE", f"/users/{name}", crowd.token)
    assert groups_in(crowd.folder) == {}


def test_a_start_goes_on_over_the_end_of_all_workers(live, tmp_path):
    hub = start_mocked(live, tmp_path, "-w", "2", seconds=2)
    assert hub.api("POST", "/users/ada/server", hub.token)[0] == 202
    kill_all(hub)
    process, = groups_in(tmp_path)
    assert status_of(hub) == "spawning"
    hub.start()
    wait_for(lambda: status_of(hub) == "ready")
    assert pid_of(hub) == process and discrepancies(hub) == {}


#: A spawner whose first start takes very long, before or after there is a process.
SLOW_SPAWNER = """
import time
from pathlib import Path
import minihub

if Path("slow").exists():
    minihub.INTERRUPTED_AFTER = 1

class Before(minihub.SubprocessSpawner):
    def start(self, server):
        if not Path("slow").exists():
            Path("slow").touch()
            time.sleep(60)
        return super().start(server)

class After(minihub.SubprocessSpawner):
    def start(self, server):
        state = super().start(server)
        if not Path("slow").exists():
            Path("slow").touch()
            time.sleep(60)
        return state
"""


@pytest.mark.parametrize(("kind", "left_behind"), [("Before", 0), ("After", 1)])
def test_a_start_that_is_interrupted_around_its_process_is_finished(live, tmp_path, kind, left_behind):
    (tmp_path / "slow_spawner.py").write_text(SLOW_SPAWNER)
    hub = start_mocked(live, tmp_path, "--threads", "4", spawner=f"slow_spawner:{kind}")

    def start():
        with contextlib.suppress(OSError, http.client.HTTPException):
            hub.api("POST", "/users/ada/server", hub.token)

    starting = threading.Thread(target=start)
    starting.start()
    wait_for((tmp_path / "slow").exists)
    kill_all(hub)
    starting.join()
    left = list(groups_in(tmp_path))
    assert (status_of(hub), len(left)) == ("spawning", left_behind)
    hub.start()
    wait_for(lambda: status_of(hub) == "ready")
    assert discrepancies(hub) == {} and (not left or left == [pid_of(hub)])


def test_a_stop_goes_on_over_the_end_of_all_workers(live, tmp_path):
    hub = start_mocked(live, tmp_path, stubborn="stubborn")
    hub.start_server("ada", hub.token)
    assert hub.api("DELETE", "/users/ada/server", hub.token)[0] == 202
    kill_all(hub)
    assert (status_of(hub), len(groups_in(tmp_path))) == ("stopping", 1)
    hub.start()
    wait_for(lambda: status_of(hub) == "stopped")
    assert (groups_in(tmp_path), discrepancies(hub)) == ({}, {})


#: A spawner that writes down which process asks after a server.
WATCHING_SPAWNER = """
import os
import minihub

class Spawner(minihub.SubprocessSpawner):
    def poll(self, state):
        with open("polls", "a") as file:
            print(os.getpid(), file=file)
        return super().poll(state)
"""


@pytest.mark.parametrize("options", [["-w", "3"], ["-w", "3", "--preload"]], ids=" ".join)
def test_one_worker_ticks_and_when_it_is_killed_another(live, tmp_path, options):
    def tickers():
        """Who has asked since the last call, three times or more, so that a second one would have had its turn."""
        (tmp_path / "polls").unlink(missing_ok=True)
        wait_for(lambda: (tmp_path / "polls").exists() and (tmp_path / "polls").read_text().count("\n") >= 3, 15)
        return {int(pid) for pid in (tmp_path / "polls").read_text().split()}

    (tmp_path / "watching.py").write_text(WATCHING_SPAWNER)
    hub = start_mocked(live, tmp_path, *options, seconds=50, spawner="watching:Spawner")
    for _ in range(30):  # until every worker has had a request, and so a ticker
        hub.request("GET", "/hub/health")
    assert hub.api("POST", "/users/ada/server", hub.token)[0] == 202
    first, = tickers()
    assert first in hub.workers()
    os.kill(first, signal.SIGKILL)
    second, = tickers()
    assert second != first


#: Kills its process in the middle of an import of many users.
FRAGILE_SPAWNER = """
import os, signal
from pathlib import Path
import minihub

class Spawner(minihub.SubprocessSpawner):
    pass

insert_many, calls = minihub.Server.insert_many, []

def insert(rows):
    calls.append(rows)
    if len(calls) == 5 and not Path("killed").exists():
        Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return insert_many(rows)

minihub.Server.insert_many = insert
"""


def test_an_import_whose_worker_is_killed_in_the_middle_leaves_nothing(live, tmp_path):
    (tmp_path / "fragile.py").write_text(FRAGILE_SPAWNER)
    hub = start_mocked(live, tmp_path, "-w", "2", spawner="fragile:Spawner")
    names = {"usernames": [f"student{number}" for number in range(1000)]}
    with pytest.raises((OSError, http.client.HTTPException)):
        hub.api("POST", "/users", hub.token, names)
    assert hub.rows("SELECT count(*) FROM users WHERE name LIKE 'student%'") == [0]
    assert hub.api("POST", "/users", hub.token, names)[0] == 201
    assert hub.rows("SELECT count(*) FROM users WHERE name LIKE 'student%'") == [1000]


@pytest.mark.bench
def test_others_are_answered_while_a_thousand_users_are_imported(live, tmp_path, capsys):
    def ask():
        begin = time.perf_counter()
        assert hub.request("GET", "/hub/health").status == 200
        return time.perf_counter() - begin

    hub = start_mocked(live, tmp_path, "-w", "2")
    importing = threading.Thread(target=hub.api, args=("POST", "/users", hub.token, {
        "usernames": [f"student{number}" for number in range(1000)]}))
    importing.start()
    seconds = [ask()]
    while importing.is_alive() or len(seconds) < 20:
        seconds.append(ask())
    p95 = statistics.quantiles(seconds, n=20)[-1]
    with capsys.disabled():
        print(f"\nGET /hub/health during an import of 1,000 users: p95 {p95 * 1000:.1f} ms of {len(seconds)}")
    assert p95 < 0.05


@pytest.mark.database("sqlite")
def test_a_full_disk_is_said_and_got_over(hub, root):
    root("GET", "/users")
    with hub.connected():
        pages, = hub.database.execute_sql("PRAGMA page_count").fetchone()
        hub.database.execute_sql(f"PRAGMA max_page_count = {pages}")
    many = {"usernames": [f"student{number}" for number in range(500)]}
    assert root("POST", "/users", many, status=503).json == error(503, minihub.NO_DATABASE)
    with hub.connected():
        assert minihub.User.select().count() == 3
        hub.database.execute_sql("PRAGMA max_page_count = 1073741823")
    assert len(root("POST", "/users", many, status=201).json) == 500


@pytest.mark.database("sqlite")
def test_a_locked_database_is_said_and_got_over(hub, root):
    root("GET", "/users")
    with hub.connected():
        hub.database.execute_sql("PRAGMA busy_timeout = 50")
        path = hub.database.database
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert root("POST", "/users/eve", status=503).json == error(503, minihub.NO_DATABASE)
    root("POST", "/users/eve", status=201)


@pytest.mark.database("sqlite")
def test_a_database_that_takes_no_notes_can_still_be_read(hub, root, pass_time, caplog):
    root("GET", "/user")
    pass_time(60)  # or the last note is good enough
    with hub.connected():
        hub.database.execute_sql("PRAGMA query_only = 1")
    try:
        assert root("GET", "/user").json["name"] == "root"
        assert caplog.text.count("the database does not take notes") == 1  # after which it is not asked to take another
        assert root("POST", "/users/eve", status=503).json == error(503, minihub.NO_DATABASE)
    finally:
        with hub.connected():
            hub.database.execute_sql("PRAGMA query_only = 0")
    assert "the database does not take notes: attempt to write a readonly database" in caplog.text


@pytest.fixture
def real(make_hub, tmp_path):
    """A hub whose servers are real processes, mock servers; nothing of them is left afterwards."""
    (tmp_path / "mock.py").write_text(MOCK_SERVER)
    yield people(make_hub(spawner="subprocess", cmd=f"{sys.executable} -IS {tmp_path / 'mock.py'} {{port}} 0"))
    for group in groups_in(tmp_path):
        os.killpg(group, signal.SIGKILL)


@pytest.mark.database("sqlite")
@pytest.mark.parametrize(("place", "problem"), [
    ("homes", "FileExistsError|NotADirectoryError"), ("run", "FileExistsError|NotADirectoryError"), ("run/ada", "FileExistsError|NotADirectoryError"),
    ("run/ada/server.log/x", "IsADirectoryError")])
def test_a_server_without_room_for_its_files_says_so_and_starts_later(real, tmp_path, place, problem):
    root, obstacle = api_of(real, "root"), tmp_path / place
    obstacle.parent.mkdir(parents=True, exist_ok=True)
    obstacle.write_text("in the way")
    if "x" == obstacle.name:
        (tmp_path / "run/ada/server.log.old").mkdir()
        (tmp_path / "run/ada/server.log.old/y").touch()
    message = root("POST", "/users/ada/server", status=500).json["message"]
    assert re.match(f"ada's server failed to start. ({problem}|OSError): ", message)
    shutil.rmtree(tmp_path / "run", ignore_errors=True) if place.startswith("run/") else obstacle.unlink()
    wait_for(lambda: root("POST", "/users/ada/server", status=(201, 202, 400)).status_int in (201, 400))


@pytest.mark.database("sqlite")
def test_a_home_that_is_gone_is_made_anew(real, tmp_path):
    root = api_of(real, "root")
    shutil.rmtree(tmp_path / "homes", ignore_errors=True)
    assert root("POST", "/users/ada/server", status=(201, 202))
    assert (tmp_path / "homes" / "ada").is_dir()


@pytest.mark.skipif(not shutil.which("setpriv"), reason="apt-get install util-linux")
def test_a_database_that_cannot_be_written_stops_the_hub_with_a_sentence(tmp_path):
    people(Hub(database=f"sqlite:///{tmp_path}/hub.sqlite", tick_interval=0)).disconnect()
    for path in tmp_path.glob("hub.sqlite*"):
        path.chmod(0o444)
    unprivileged = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []  # modes bind root, too
    done = subprocess.run([*unprivileged, sys.executable, "-m", "minihub", "link", "ada"], cwd=tmp_path, capture_output=True, text=True,
                          env={"PYTHONPATH": str(HERE), "PATH": os.defpath, "MINIHUB_DATABASE": "sqlite:///hub.sqlite"})
    assert (done.returncode, done.stdout, done.stderr) == (
        1, "", "minihub: Setting database (MINIHUB_DATABASE) cannot be opened (Permission denied),"
               f" not 'sqlite:///{tmp_path}/hub.sqlite'\n")


WORKERS = [["-w", "4"], ["--threads", "8"], ["-w", "2", "--preload"], ["-w", "2", "--threads", "4", "--preload"]]


@pytest.mark.parametrize("options", WORKERS, ids=" ".join)
def test_workers_of_any_kind_answer_alike(live, tmp_path, options):
    hub = start_mocked(live, tmp_path, *options)
    hub.start_server("ada", hub.token)
    hub.request("POST", "/hub/api/users/ada/tokens", "{}", {"Authorization": f"token {hub.token}"})

    def without_times(model):
        return {key: value for key, value in model.items() if "activity" not in key and key != "servers"}

    answers = at_once(*[lambda: hub.api("GET", "/users", hub.token)] * 16)
    assert {json.dumps((status, [without_times(model) for model in models])) for status, models in answers} == {
        json.dumps((200, [without_times(model) for model in answers[0][1]]))}
    assert {hub.request("GET", "/user/ada/").body for _ in range(8)} == {b"mock"}
    assert discrepancies(hub) == {}


def test_servers_live_on_when_another_gunicorn_takes_over(live, tmp_path):
    hub = start_mocked(live, tmp_path, "-w", "2")
    hub.start_server("ada", hub.token)
    process, workers = pid_of(hub), hub.workers()
    hub.process.send_signal(signal.SIGUSR2)
    successor, = wait_for(lambda: [pid for pid in hub.workers() if pid not in workers and len(children_of(pid)) == 2])
    try:
        hub.stop()
        assert pid_of(hub) == process and hub.request("GET", "/user/ada/").body == b"mock"
        hub.api("DELETE", "/users/ada/server", hub.token)
        wait_for(lambda: status_of(hub) == "stopped" and not groups_in(tmp_path))
    finally:
        os.kill(successor, signal.SIGTERM)
        wait_for(lambda: not is_open(hub.port))


@pytest.mark.parametrize("options", WORKERS, ids=" ".join)
@pytest.mark.parametrize("how", [signal.SIGHUP, signal.SIGTERM, signal.SIGKILL])
def test_servers_live_on_when_gunicorn_does_not(live, tmp_path, options, how):
    hub = start_mocked(live, tmp_path, *options)
    hub.start_server("ada", hub.token)
    process, workers = pid_of(hub), set(hub.workers())
    if how == signal.SIGHUP:
        hub.process.send_signal(how)
        wait_for(lambda: hub.workers() and not workers & set(hub.workers()))
        wait_for(hub.is_up)
    elif how == signal.SIGKILL:
        kill_all(hub)
        hub.start()
    else:
        hub.stop(how)
        hub.start()
    assert pid_of(hub) == process and hub.request("GET", "/user/ada/").body == b"mock"
    hub.api("DELETE", "/users/ada/server", hub.token)
    wait_for(lambda: status_of(hub) == "stopped" and not discrepancies(hub))


@needs_singleuser
def test_a_kernel_keeps_its_variables_over_the_end_of_the_whole_hub(live):
    def run(code):
        """What the kernel prints for a line of Python."""
        socket = websocket.create_connection(f"ws://127.0.0.1:{hub.port}/user/ada/api/kernels/{kernel}/channels", timeout=60,
                                             header=[f"Authorization: token {token}"])
        with contextlib.closing(socket):
            header = {"msg_id": secrets.token_hex(8), "msg_type": "execute_request", "username": "", "session": "s", "version": "5.3"}
            socket.send(json.dumps({"channel": "shell", "header": header, "parent_header": {}, "metadata": {},
                                    "content": {"code": code, "silent": False}, "buffers": []}))
            printed = ""
            for message in iter(lambda: json.loads(socket.recv()), None):
                if message["parent_header"].get("msg_id") != header["msg_id"]:
                    continue
                if message["msg_type"] == "stream":
                    printed += message["content"]["text"]
                if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                    return printed

    websocket = pytest.importorskip("websocket", reason="pip install '.[test]'")
    hub = live("-w", "2", admins="root")
    hub.command("link", "ada")
    token = hub.command("token", "ada")
    hub.start_server("ada", token)
    made = hub.request("POST", "/user/ada/api/kernels", "{}", {"Authorization": f"token {token}"})
    assert made.status == 201
    kernel = json.loads(made.body)["id"]
    assert run("x = 42; import os; print(os.getpid())").strip().isdigit()
    kill_all(hub)
    hub.start()
    assert run("print(x)") == "42\n"


@pytest.mark.parametrize(("scheme", "secure_socket", "address"), [
    ("http", None, "http://127.0.0.1:8443"), ("https", None, "https://127.0.0.1:8443"), ("http", False, "http://127.0.0.1:8443"),
    ("https", False, "http://127.0.0.1:8443"), ("https", True, "https://127.0.0.1:8443")])
def test_servers_reach_the_hub_over_tls_where_that_is_what_it_speaks(make_hub, scheme, secure_socket, address):
    hub = make_hub()
    environ = request_environ(SERVER_NAME="127.0.0.1", SERVER_PORT="8443", **{"wsgi.url_scheme": scheme})
    with socket.create_server(("127.0.0.1", 0)) as plain:
        tls = ssl.create_default_context().wrap_socket(socket.socket(), server_hostname="x", do_handshake_on_connect=False)
        with contextlib.closing(tls):
            if secure_socket is not None:
                environ["gunicorn.socket"] = tls if secure_socket else plain
            assert hub._own_address(environ) == address


@pytest.mark.parametrize(("more", "address"), [
    ({"uwsgi.version": b"2.0", "wsgi.url_scheme": "https"}, "http://127.0.0.1:8000"),
    ({"uwsgi.version": b"2.0", "HTTPS": "on"}, "https://127.0.0.1:8000"),
    ({"mod_wsgi.version": (6, 1), "mod_wsgi.listener_host": "", "mod_wsgi.listener_port": "80"}, "http://127.0.0.1:80"),
    ({"mod_wsgi.version": (6, 1), "mod_wsgi.listener_host": "10.0.0.5", "mod_wsgi.listener_port": "80"}, "http://10.0.0.5:80")])
def test_servers_reach_the_hub_where_the_host_listens_not_where_a_client_says(make_hub, more, address):
    assert make_hub()._own_address(request_environ(SERVER_NAME="school.example", **more)) == address


@pytest.mark.parametrize("kind", [InUWSGI, InModWSGI])
def test_a_client_does_not_decide_where_servers_look_for_the_hub(kind, tmp_path):
    with carrying(tmp_path, kind=kind) as hub:
        hub.api("DELETE", "/users/ada/server", hub.token)
        wait_for(lambda: not hub.api("GET", "/users/ada", hub.token)[1]["servers"])
        lies = {"Host": "evil.example:99", "X-Forwarded-Proto": "https", "Authorization": f"token {hub.token}"}
        assert hub.request("POST", "/hub/api/users/ada/server", headers=lies).status in (201, 202)
        wait_for(lambda: hub.request("GET", "/user/ada/api").status == 200)
        assert echoed(hub)["environ"]["JUPYTERHUB_API_URL"] == f"{hub.url}/hub/api"


@pytest.mark.parametrize(("kind", "reload"), [(InUWSGI, signal.SIGHUP), (InModWSGI, signal.SIGUSR1)])
def test_servers_live_on_when_other_hosts_reload_and_stop(kind, reload, tmp_path):
    with carrying(tmp_path, kind=kind) as hub:
        server, before = json.loads(hub.request("GET", "/user/ada/api").body)["pid"], hub.workers()
        hub.process.send_signal(reload)
        wait_for(lambda: hub.workers() and not set(before) & set(hub.workers()) and hub.is_up())
        hub.stop()
        hub.start()
        assert json.loads(hub.request("GET", "/user/ada/api").body)["pid"] == server
        assert hub.api("DELETE", "/users/ada/server", hub.token)[0] in (202, 204)


def test_uwsgi_ends_at_once_though_websockets_are_open(tmp_path):
    with carrying(tmp_path, kind=InUWSGI) as hub, contextlib.closing(websocket_to(hub)) as connection:
        hub.stop()
        assert (hub.process.returncode, read_all(connection.sock)) == (0, b"")


@pytest.mark.parametrize(("threads", "status"), [(0, 503), (1, 200)])
def test_an_older_uwsgi_needs_to_be_told_to_run_threads(hub, uwsgi, threads, status):
    uwsgi.has_threads = threads
    page = webtest.TestApp(hub, extra_environ={"uwsgi.version": "2.0.21"}).get("/hub/login", status=status)
    assert ("Start it with --enable-threads" in page.text) == (status == 503)


def test_in_uwsgis_master_nothing_ticks_but_in_its_workers_at_once(make_hub, uwsgi):
    hub = make_hub(tick_interval=0.01)
    uwsgi.worker_id = lambda: 0
    hub.tick_in_workers()
    assert hub._ticking is None
    uwsgi.post_fork_hook()
    assert not hub._ticking.is_set()
    hub.close()


def test_a_uwsgi_worker_that_loads_the_hub_itself_ticks_at_once(make_hub, uwsgi):
    hub = make_hub(tick_interval=0.01)
    hub.tick_in_workers()
    assert not hub._ticking.is_set()
    hub.close()


#: What starts each web server, what installs it, and what a whole configuration needs besides the README's part.
WEB_SERVERS = {
    "nginx": ("nginx -p {folder} -c {folder}/conf -e {folder}/log", "apt-get install nginx", """
{if_root} user root;
daemon off; pid {folder}/pid; error_log {folder}/log;
events {{}}
http {{
    access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    {readme}
}}
"""),
    "apache": ("apache2 -D FOREGROUND -d {folder} -f {folder}/conf", "apt-get install apache2", """
{if_root} User www-data
{if_root} Group www-data
PidFile {folder}/pid
DefaultRuntimeDir {folder}
Mutex pthread
ErrorLog {folder}/log
ServerName localhost
Listen 127.0.0.1:{port}
{modules}
{readme}
"""),
    "caddy": ("caddy run --adapter caddyfile --config {folder}/conf", "pip install '.[test]'", """
{{
    admin off
    auto_https disable_redirects
    default_bind 127.0.0.1
    skip_install_trust
}}
{readme}
"""),
}


@pytest.fixture(scope="module")
def below_lab(tmp_path_factory):
    """A gunicorn with ada's echo server, below /lab; in its folder is the certificate for a web server in front."""
    folder = tmp_path_factory.mktemp("lab")
    make_certificate(folder)
    hub = LiveHub(folder, authenticator="dummy", password=PASSWORD, base_url="/lab/", cmd=f"{sys.executable} {folder / 'echo.py'}")
    hub.prefix = "/lab"
    (folder / "echo.py").write_text(ECHO_SERVER)
    try:
        hub.start()
        hub.command("link", "ada")
        hub.start_server("ada", hub.command("token", "ada"))
        yield hub
    finally:
        hub.stop_all()


@pytest.fixture(scope="module", params=WEB_SERVERS)
def behind_a_web_server(request, below_lab, tmp_path_factory):
    """Where browsers find the hub behind a real web server, which does as the README has it."""
    command, install, conf = WEB_SERVERS[request.param]
    words = command.split()
    folders = [Path(sys.executable).parent, os.environ.get("PATH", os.defpath), "/usr/sbin"]
    words[0] = shutil.which(words[0], path=os.pathsep.join(map(str, folders)))
    if not words[0]:
        pytest.skip(install)
    folder, port, readme = tmp_path_factory.mktemp(request.param), minihub.free_port(), readme_text("school.example", request.param)
    for old, new in (("listen 443", f"listen 127.0.0.1:{port}"), ("*:443", f"127.0.0.1:{port}"), ("school.example {", f"localhost:{port} {{"),
                     ("/etc/ssl/school.example", f"{below_lab.folder}/tls"), ("school.example", "localhost"),
                     ("127.0.0.1:8000", f"127.0.0.1:{below_lab.port}")):
        readme = readme.replace(old, new)
    names = ["mpm_event", "authz_core", "proxy", *"".join(re.findall("a2enmod (.*)", readme)).split()]
    modules = "\n".join(f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so" for name in names)
    (folder / "conf").write_text(conf.format(if_root="" if os.geteuid() == 0 else "#", folder=folder, port=port, modules=modules, readme=readme))
    with open(folder / "output", "wb") as output:
        web_server = subprocess.Popen([word.format(folder=folder) for word in words], stdout=output, stderr=output, start_new_session=True,
                                      env={**os.environ, "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)})
    try:
        wait_for(lambda: is_open(port) or web_server.poll() is not None)
        assert is_open(port), (folder / "output").read_text()
        yield f"https://localhost:{port}/lab"
    finally:
        os.killpg(web_server.pid, signal.SIGKILL)  # Apache would wait for streams that nobody reads any more
        web_server.wait(30)


@pytest.fixture
def tls_browser(below_lab):
    """A browser that believes in the certificate."""
    with requests.Session() as browser:
        browser.verify, browser.trust_env = below_lab.folder / "tls.pem", False
        yield browser


@pytest.fixture
def way_in(behind_a_web_server, tls_browser):
    """The responses on the way to ada's home."""
    page = tls_browser.get(f"{behind_a_web_server}/hub/home")
    xsrf = re.search(r'name=_xsrf value="(\w+)"', page.text)[1]
    signed_in = tls_browser.post(page.url, {"username": "ada", "password": PASSWORD, "_xsrf": xsrf})
    return [*page.history, page, *signed_in.history, signed_in]


def test_behind_a_web_server_people_sign_in_and_stay_below_the_prefix(behind_a_web_server, way_in):
    assert [response.url.removeprefix(behind_a_web_server).partition("?")[0] for response in way_in] == [
        "/hub/home", "/hub/login", "/hub/login", "/hub/home"]
    assert "Hello, ada" in way_in[-1].text


@pytest.mark.parametrize("path", ["", "/", "/hub", "/hub/"])
def test_behind_a_web_server_the_prefix_alone_leads_home(behind_a_web_server, tls_browser, way_in, path):
    assert tls_browser.get(f"{behind_a_web_server}{path}").url == f"{behind_a_web_server}/hub/home"


def test_behind_a_web_server_cookies_are_for_tls_and_the_prefix_only(tls_browser, way_in):
    assert {(cookie.name, cookie.path, cookie.secure) for cookie in tls_browser.cookies} == {
        ("jupyterhub-hub-login", "/lab/hub/", True), ("jupyterhub-session-id", "/lab/", True)}


@pytest.mark.parametrize("path", ["x%20y", "a%2Fb", "%C3%BC%25", "a//b", "a:b;c=d,e@f+g", "x?y=%2F+%20&z"])
def test_behind_a_web_server_servers_get_requests_as_the_browser_wrote_them(behind_a_web_server, tls_browser, way_in, path):
    got = tls_browser.get(f"{behind_a_web_server}/user/ada/echo/{path}").json()
    headers = dict(got["headers"])
    assert (got["uri"], headers["Host"], "jupyterhub-hub-login" in headers["Cookie"]) == (
        f"/lab/user/ada/echo/{path}", urlsplit(behind_a_web_server).netloc, False)


def test_behind_a_web_server_servers_get_uploads(behind_a_web_server, tls_browser):
    body = os.urandom(3 * MEGABYTE)
    assert tls_browser.post(f"{behind_a_web_server}/user/ada/upload", body).json() == {
        "count": len(body), "sha256": hashlib.sha256(body).hexdigest()}


def test_behind_a_web_server_events_arrive_when_they_happen(behind_a_web_server, tls_browser):
    place = f"{behind_a_web_server}/user/ada/events?count=2&pause=3600"
    with tls_browser.get(place, stream=True, timeout=10) as stream:
        assert next(stream.iter_content(None)) == b"data: 0\n\n"


def test_behind_a_web_server_websockets_carry_messages(below_lab, behind_a_web_server):
    websocket = pytest.importorskip("websocket", reason="pip install '.[test]'")
    with contextlib.closing(websocket.create_connection(
            f"{behind_a_web_server.replace('https', 'wss')}/user/ada/socket", sslopt={"ca_certs": below_lab.folder / "tls.pem"}, timeout=10)) as connection:
        connection.send("hello")
        assert connection.recv() == "hello"


def test_past_a_web_server_nobody_can_say_how_the_browser_reaches_the_hub(behind_a_web_server, tls_browser):
    headers = {"X-Forwarded-Proto": "http", "X-Forwarded-Host": "evil.example", "X_Forwarded_Host": "evil.example"}
    assert "Secure" in tls_browser.get(f"{behind_a_web_server}/hub/login", headers=headers).headers["Set-Cookie"]
    got = dict(tls_browser.get(f"{behind_a_web_server}/user/ada/echo", headers=headers).json()["headers"])
    assert [got[name] for name in ("X-Forwarded-Proto", "X-Forwarded-Host", "Host")] == [
        "https", *[urlsplit(behind_a_web_server).netloc] * 2]


def test_past_a_web_server_nobody_can_say_where_the_browser_is(below_lab, behind_a_web_server):
    trusting = ssl.create_default_context(cafile=below_lab.folder / "tls.pem")
    connection = http.client.HTTPSConnection(urlsplit(behind_a_web_server).netloc, source_address=("127.0.0.2", 0), context=trusting)
    with contextlib.closing(connection):
        connection.request("POST", "/lab/hub/api/users/ada/tokens", json.dumps({"auth": {"username": "ada", "password": "wrong"}}),
                           {"X-Forwarded-For": "6.6.6.6"})
        assert connection.getresponse().status == 403
    keys = below_lab.rows("SELECT key FROM failures")
    assert [address for address in ("127.0.0.2", "6.6.6.6") if any(address in key for key in keys)] == ["127.0.0.2"]


def threads_of_hubs():
    """The names of the threads that hubs run in this process."""
    return sorted(thread.name for thread in threading.enumerate() if thread.name in ("minihub-ticker", "minihub-splicer"))


def test_a_site_starts_and_stops_servers_outside_of_requests(hub, spawner):
    assert hub.start_server("ada", "gpu", {"course": "python"}) == "/user/ada/gpu/"
    assert hub.tick() is True
    assert hub.start_server("bob") == "/user/bob/"
    assert [(launch.user.name, launch.name, launch.user_options) for launch in spawner.launches] == [
        ("ada", "gpu", {"course": "python"}), ("bob", "", None)]
    hub.stop_server("ada", "gpu")
    assert [launch.user.name for launch in spawner.running.values()] == ["bob"]


@pytest.mark.parametrize(("action", "sentence"), [
    (lambda hub: hub.start_server("eve"), "No such user: eve"), (lambda hub: hub.start_server("ada", "not/a name"), "Invalid server_name"),
    (lambda hub: hub.stop_server("ada", "none"), "ada has no server named 'none'"),
    (lambda hub: hub.create_users(["ada"]), "All 1 users already exist"), (lambda hub: hub.create_users(["a/b"]), "Invalid username: a/b")])
def test_what_a_site_cannot_ask_for_is_an_error_with_a_reason(hub, action, sentence):
    with pytest.raises(minihub.HubError, match=sentence):
        action(hub)


def test_a_site_creates_users_outside_of_requests(hub):
    assert [user.name for user in hub.create_users(["Ada", "eve"], admin=True)] == ["eve"]
    with hub.connected():
        assert (hub.find_user("eve").admin, hub.find_user("ada").admin) == (True, False)


def test_a_start_before_the_first_request_is_below_the_base_url(make_hub):
    hub = people(make_hub(base_url="/lab/", hub_url="http://10.0.0.1:80"))
    assert hub.start_server("ada") == "/lab/user/ada/"


@pytest.fixture
def told(make_hub):
    """A hub, and what it has told its site."""
    facts = []
    callbacks = {name: functools.partial(lambda *values: facts.append(values), name.removeprefix("on_"))
                 for name in ("on_user_created", "on_server_started", "on_server_stopped")}
    return make_hub(admins=["root"], **callbacks), facts


def test_a_site_is_told_what_has_happened(told, spawner):
    hub, facts = told
    hub.create_users(["ada", "bob"])
    hub.start_server("ada")
    hub.tick()
    hub.stop_server("ada")
    hub.tick()
    spawner.problem = RuntimeError("no more room")
    hub.start_server("bob", "gpu")
    assert facts == [("user_created", "root"), ("user_created", "ada"), ("user_created", "bob"), ("server_started", "ada", "", "/user/ada/"),
                     ("server_stopped", "ada", "", ""), ("server_stopped", "bob", "gpu", "RuntimeError: no more room")]


def test_a_site_is_not_told_of_what_did_not_happen(told, spawner):
    hub, facts = told
    facts.clear()
    with hub.connected(), pytest.raises(minihub.BadRequest):
        hub.use_link(urlsplit(hub.first_admin_link()).path.rpartition("/")[2], "eve", "weak")
    with pytest.raises(minihub.BadRequest):
        hub.create_users(["ada", "a/b"])
    spawner.answers = False
    hub.start_server("root")
    hub.tick()
    assert facts == []


def test_the_first_admin_by_link_is_told_once(told):
    hub, facts = told
    facts.clear()
    with hub.connected():
        hub.use_link(urlsplit(hub.first_admin_link()).path.rpartition("/")[2], "eve", "a good password")
        assert hub.find_user("eve").admin
    assert facts == [("user_created", "eve")]


def test_a_callback_that_fails_breaks_nothing(make_hub, caplog):
    hub = make_hub(on_user_created=lambda name: 1 / 0)
    assert [user.name for user in hub.create_users(["ada"])] == ["ada"]
    assert "on_user_created failed" in caplog.text and "ZeroDivisionError" in caplog.text


def test_a_callback_may_use_the_hub(make_hub, spawner):
    hub = make_hub(on_user_created=lambda name: hub.start_server(name))
    hub.create_users(["ada"])
    assert [launch.user.name for launch in spawner.launches] == ["ada"]


def test_a_hub_that_is_closed_leaves_nothing_behind(make_hub):
    before = threads_of_hubs()
    hub = people(make_hub(database="sqlite:///:memory:", tick_interval=0.01))
    Api(hub)("GET", "/")
    near, far = socket.socketpair()
    connection = minihub.Forward(near, None)
    connection.serve = lambda: connection.discard(near)
    hub.splicer.carry(connection)
    assert len(threads_of_hubs()) == len(before) + 2
    folder = Path(hub.database.database).parent
    hub.close()
    wait_for(lambda: threads_of_hubs() == before)
    with far:
        far.settimeout(5)
        assert (far.recv(1), near.fileno(), folder.exists(), hub.database.is_closed()) == (b"", -1, False, True)


def test_a_hub_that_is_closed_can_be_used_again(make_hub, tmp_path):
    hub = people(make_hub(database=f"sqlite:///{tmp_path / 'hub.sqlite'}", tick_interval=0.01))
    for _ in range(2):
        Api(hub, token_for(hub, "ada"))("GET", "/user")
        assert hub._ticking is not None
        hub.close()
        hub.close()


def test_a_hub_that_is_closed_leaves_the_ticking_to_others_at_once(make_hub, make_database):
    url = make_database()
    one, other = make_hub(database=url), make_hub(database=url)
    assert (one.tick(), other.tick()) == (True, False)
    other.close()
    assert one.tick()
    one.close()
    assert other.tick()


def test_a_hub_that_was_never_used_can_be_closed(make_hub):
    make_hub().close()


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


def test_a_backup_is_made_while_the_hub_runs(live, tmp_path):
    hub = live()
    hub.command("link", "ada")
    hub.command("backup", "copy.sqlite")
    hub.command("link", "bob")
    assert (tmp_path / "copy.sqlite").stat().st_mode & 0o777 == 0o600
    with contextlib.closing(sqlite3.connect(tmp_path / "copy.sqlite")) as copy:
        assert [name for name, in copy.execute("SELECT name FROM users")] == ["ada"]


def test_a_backup_is_restored_as_the_readme_says(live, tmp_path):
    hub = live()
    hub.command("link", "ada")
    hub.command("backup", "FILE")
    hub.command("link", "eve")
    hub.stop()
    steps, = re.findall(r"systemctl stop minihub\n(.*?)\n +systemctl start minihub", README, re.DOTALL)
    subprocess.run(steps.replace("chown minihub:", "chown $(id -un):"), shell=True, cwd=tmp_path, check=True)
    hub.start()
    assert hub.rows("SELECT name FROM users") == ["ada"]


def test_a_backup_overwrites_nothing(live, tmp_path):
    hub = live()
    with pytest.raises(subprocess.CalledProcessError) as raised:
        hub.command("backup", "minihub.sqlite")
    assert raised.value.stderr == "minihub: The copy minihub.sqlite cannot be made: File exists\n"
