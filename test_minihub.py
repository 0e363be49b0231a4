"""Tests of minihub, under the same banners as the file they test. Run them with: python -m pytest

The subject of a test is real: gunicorn, processes, jupyterhub-singleuser, Chromium. All else is webtest, in process.
Tests skip, with the command to install it, if a part is missing on the machine; with CI set, they fail.
"""

########################################################################################################
# 1. Imports, and helpers that the tests share
########################################################################################################

from __future__ import annotations

import ast
import base64
import builtins
import contextlib
import dataclasses
import functools
import hashlib
import http.client
import http.server
import itertools
import io
import json
import math
import os
import re
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
import symtable
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

import minihub
from minihub import Hub, Settings

HERE = Path(__file__).parent
SOURCE = Path(minihub.__file__).read_text()
README = (HERE / "README.md").read_text()
SINGLEUSER = shutil.which("jupyterhub-singleuser", path=os.pathsep.join([str(Path(sys.executable).parent), os.defpath]))
OPENSSL = shutil.which("openssl")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHP = shutil.which("configurable-http-proxy")

needs_singleuser = pytest.mark.skipif(not SINGLEUSER, reason="pip install '.[classroom]'")
needs_chp = pytest.mark.skipif(not CHP, reason="npm install -g configurable-http-proxy")


NOT_HERE = "not possible on this machine"  # such as accounts, where they cannot run the tests' Python


class NoSkips:
    """A plugin of pytest's, in use where CI is set: a test that skips has failed, unless no package could help."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        report = yield
        if report.skipped and not hasattr(report, "wasxfail") and NOT_HERE not in report.longrepr[2]:
            report.outcome, report.longrepr = "failed", f"With CI set, nothing may skip. {report.longrepr[2]}"
        return report


def pytest_generate_tests(metafunc):
    """The one hook that pytest calls in a test module, and before any test runs."""
    plugins = metafunc.config.pluginmanager
    if os.environ.get("CI") and not plugins.has_plugin("no-skips"):
        plugins.register(NoSkips(), "no-skips")
    if "make_database" in metafunc.fixturenames:
        metafunc.parametrize("make_database", databases_for(metafunc), indirect=True)


#: The sections whose SQL PostgreSQL could answer differently.
ON_BOTH_DATABASES = (4, 9, 10, 11, 12)


def databases_for(metafunc):
    """The kinds of database for a test: both in some sections, unless the marker `database` names others."""
    section = section_of(metafunc.function.__code__.co_firstlineno, Path(metafunc.module.__file__).read_text())
    marker = metafunc.definition.get_closest_marker("database")
    kinds = marker.args if marker else ("sqlite", "postgres") if section in ON_BOTH_DATABASES else ("sqlite",)
    return [pytest.param(kind, marks=[needs_postgres] if kind == "postgres" else []) for kind in kinds]


@functools.cache
def banners_of(source):
    """The line and the number of each banner."""
    banners = [(number, re.match(r"# (\d+)\. ", text)) for number, text in enumerate(source.splitlines(), 1)]
    return [(number, int(banner[1])) for number, banner in banners if banner]


def section_of(line, source):
    """The number of the section that a line is in."""
    return [section for number, section in banners_of(source) if number <= line][-1]


def wait_for(condition, seconds=20, message="it did not happen"):
    """The first true value of the condition; fails the test if there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    pytest.fail(f"{message() if callable(message) else message} within {seconds} s")


def in_threads(count, action):
    """The results of `action(number)` in so many threads that begin at the same moment."""
    def work(number):
        barrier.wait()
        results[number] = action(number)

    barrier, results = threading.Barrier(count), [None] * count
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def run_python(code, folder, **environ):
    """The output of a fresh Python."""
    return subprocess.run([sys.executable, "-B", "-c", code], cwd=folder, capture_output=True, text=True, check=True,
                          timeout=60, env={"PYTHONPATH": str(HERE), "PATH": os.defpath, **environ}).stdout.strip()


def children_of(pid):
    """The ids of the processes that a process has started."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(child) for child in found.stdout.split()]


def is_open(port):
    """Whether somebody listens there."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True


def find_postgres(program):
    """The path of a program of Debian's PostgreSQL, or of one on the PATH."""
    folders = [os.environ.get("PATH", os.defpath), *Path("/usr/lib/postgresql").glob("*/bin")]
    return shutil.which(program, path=os.pathsep.join(map(str, folders)))


needs_postgres = pytest.mark.skipif(not find_postgres("initdb"), reason="apt-get install postgresql")


class Postgres:
    """A PostgreSQL server of the tests' own, without what makes it slow and safe. It refuses to be root."""

    def __init__(self, folder):
        self.folder, self.port = folder, minihub.free_port()
        if os.geteuid() == 0:
            shutil.chown(folder, "nobody")
        self.run("initdb", "--auth=trust", "--no-sync", "--username=minihub", "--locale=C", "--encoding=UTF8")
        self.start()
        self.ask("CREATE DATABASE hub")
        Hub(database=self.url("hub"), tick_interval=0).close()

    def start(self):
        options = (f"-F -p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories=''"
                   " -c full_page_writes=off -c max_connections=300")
        self.run("pg_ctl", "--wait", "--log=log", f"--options={options}", "start")

    def stop(self):
        self.run("pg_ctl", "--mode=immediate", "stop")

    def send(self, number):
        """Send a signal to all of its processes."""
        postmaster = int((Path(self.folder) / "data" / "postmaster.pid").read_text().split()[0])
        for pid in (postmaster, *children_of(postmaster)):
            os.kill(pid, number)

    def run(self, program, *words):
        """Run one of PostgreSQL's programs."""
        user = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}
        done = subprocess.run([find_postgres(program), "--pgdata=data", *words], cwd=self.folder, text=True,
                              stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **user)
        assert done.returncode == 0, done.stderr

    def url(self, name):
        """The setting `database` for a database."""
        return f"postgresql://minihub@127.0.0.1:{self.port}/{name}"

    def ask(self, query, name="postgres"):
        """The first column of the answer that a database gives to a query."""
        with contextlib.closing(minihub.database_from_url(f"{self.url(name)}?application_name=tests")) as database:
            cursor = database.execute_sql(query)
            return [row[0] for row in cursor.fetchall()] if cursor.description else []

    def end_hubs(self, name):
        """End all connections of hubs to a database, and return how many there were."""
        return len(self.ask("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                            " WHERE datname = current_database() AND application_name <> 'tests'", name))


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL server."""
    pytest.importorskip("psycopg2", reason="pip install '.[postgres]'")
    with tempfile.TemporaryDirectory(prefix="minihub-postgres-") as folder:  # where its user may go, unlike tmp_path
        server = Postgres(folder)
        yield server
        server.stop()


@pytest.fixture
def make_database(request, tmp_path):
    """Makes the URL of a new database, of the kind that `pytest_generate_tests` says: PostgreSQL's is one that a hub
    has been in, or, from "template0", an empty one."""
    def make(template="hub"):
        name = f"hub_{secrets.token_hex(4)}"
        if request.param == "sqlite":
            return f"sqlite:///{tmp_path}/{name}.sqlite"
        postgres.ask(f"CREATE DATABASE {name} TEMPLATE {template}")
        made.append(name)
        return postgres.url(name)

    made = []
    postgres = request.getfixturevalue("postgres") if request.param == "postgres" else None
    yield make
    for name in made:
        postgres.ask(f"DROP DATABASE {name} WITH (FORCE)")


class Answering(http.server.BaseHTTPRequestHandler):
    """Answers everything with 200, as a healthy server does."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args):
        """Silent."""


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

    __slots__ = ("settings",)  # a hook's own, while everything else is shared with those that `again` makes

    def __init__(self, address):
        self.settings = None
        self.address = address
        self.running = {}          # launch id -> Launch
        self.exits = {}            # launch id -> exit status
        self.launches = []
        self.answers = True        # False: nobody listens where the servers should
        self.stubborn = False      # True: servers do not end when they are asked to
        self.problem = None        # an exception that start() raises
        self.exits_at_once = None  # an exit status with which every server ends while it starts

    def again(self):
        """Another hook with the same servers, for another hub on the same database: a hook belongs to one hub."""
        hook = FakeSpawner(self.address)
        hook.__dict__ = self.__dict__
        return hook

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


STRONG_SCRYPT, GLANCE_SECONDS = dict(minihub.SCRYPT), minihub.GLANCE_SECONDS


@pytest.fixture(autouse=True, scope="session")
def weak_hashes_and_patient_glances():
    """Passwords are hashed weakly, because the tests hash so many, and a busy machine may take its time to answer."""
    minihub.SCRYPT["n"], minihub.GLANCE_SECONDS = 2, 5
    yield
    minihub.SCRYPT.update(STRONG_SCRYPT)


@pytest.fixture
def spawner(answering):
    return FakeSpawner(answering)


@pytest.fixture
def make_hub(spawner, tmp_path, make_database):
    """Makes hubs on a database of their own, whose ticker only runs when it is told to."""
    def make(**settings):
        hook = spawner if spawner.settings is None else spawner.again()
        hub = Hub(**{"database": settings.get("database") or make_database(), "spawner": hook, "tick_interval": 0,
                     "isolation": "none", "homes": str(tmp_path / "homes"), "run_dir": str(tmp_path / "run"),
                     **settings})
        hubs.append(hub)
        return hub

    hubs = []
    yield make
    for hub in hubs:
        hub.close()


@pytest.fixture
def hub(make_hub):
    """A hub with the users root (an admin), ada and bob."""
    return people(make_hub())


@pytest.fixture
def opened(hub):
    """The hub, with its database open in this thread."""
    with hub.store.connected():
        yield hub


def people(hub):
    """The hub with its three people."""
    with hub.store.connected():
        for name in ("root", "ada", "bob"):
            user = hub.people.create(name, admin=name == "root")
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
    with hub.store.connected():
        return hub.tokens.create(hub.people.find(name), **columns)[0]


def server_of(hub, name="ada", server_name=""):
    """A user's server, made if it is a named one."""
    return hub.servers.find_or_create(hub.people.find(name), server_name)


def running(hub, name="ada", server_name=""):
    """A user's server, started and ready."""
    server = server_of(hub, name, server_name)
    hub.servers.start(server)
    assert hub.servers.observe(server).status == "ready"
    return server


def let_tick(hub):
    """Do the ticker's work once, as a real hub does it every second."""
    if isinstance(hub, Hub) and not hub.settings.tick_interval:
        with contextlib.suppress(*minihub.DatabaseTrouble):
            hub.tick()


class Api:
    """A client of the REST API of a hub in this process, with a token: `api("POST", "/users/ada")`.

    Before each request the hub ticks, unless `ticks` is false: lists show rows, which the ticker keeps up to date.
    """

    ticks = True

    def __init__(self, hub, token=None, **environ):
        self.hub, self.token = hub, token
        self.app = webtest.TestApp(hub, extra_environ={"REMOTE_ADDR": "127.0.0.1", **environ}, lint=True)

    def __call__(self, method, path, body=None, status=200, headers=(), raw=None):
        """The response to a JSON request, which must have that status."""
        if self.ticks:
            let_tick(self.hub)
        headers = {**({"Authorization": f"token {self.token}"} if self.token else {}), **dict(headers)}
        content = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
        return self.app.request(f"/hub/api{path}", method=method, body=content, status=status, headers=headers)


class Browser:
    """A browser without JavaScript at a hub, or a site with one, in this process; signed in if it is given a name.

    `app` is webtest's, with the cookies; its methods (get, post, request, set_cookie...) are also the browser's.
    """

    def __init__(self, site, name=None, **environ):
        self.app = webtest.TestApp(site, extra_environ={"REMOTE_ADDR": "127.0.0.1", **environ}, lint=True)
        if name:
            self.sign_in(name)

    def __getattr__(self, name):
        return getattr(self.app, name)

    def sign_in(self, name, password=None, url="/hub/login", status=302):
        """The response to the sign-in form."""
        form = self.app.get(url, status=200).form
        form["username"], form["password"] = name, password or password_of(name)
        return form.submit(status=status)

    def is_signed_in(self, home="/hub/home"):
        """Whether the browser gets to see the home page."""
        return self.app.get(home, status=(200, 302)).status_int == 200

    def xsrf_at(self, url):
        """The token in the forms of a page."""
        return re.search(r'name=_xsrf value="(\w+)"', self.app.get(url).text)[1]

    @property
    def xsrf(self):
        """The token in the forms of the home page."""
        return self.xsrf_at("/hub/home")

    def api(self, method, path, status=200, **headers):
        """The response to a request of a script on a page: `api("GET", "/user", Referer=...)`."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.app.request(f"/hub/api{path}", method=method, headers=named, status=status)


def api_of(hub, name):
    """The API as that user sees it, or nobody."""
    return Api(hub, token_for(hub, name) if name else None)


def api_fixture(name):
    """A fixture with that API."""
    return pytest.fixture(lambda hub: api_of(hub, name))


root, ada, bob, nobody = map(api_fixture, ("root", "ada", "bob", None))


@pytest.fixture
def browser(hub):
    """A browser in which ada has signed in."""
    return Browser(hub, "ada")


#: A single-user server for the tests of the proxy, in plain tornado, which jupyterhub-singleuser depends on. It asks
#: nobody to sign in. Port and prefix come as they do for the real one.
ECHO_SERVER = '''
import asyncio, hashlib, json, os, sys
from urllib.parse import urlsplit
import tornado.web, tornado.websocket, tornado.iostream

url = urlsplit(os.environ["JUPYTERHUB_SERVICE_URL"])

class Api(tornado.web.RequestHandler):
    def get(self):
        self.write({"version": "echo", "pid": os.getpid(), "sockets": Socket.open_now})

class Echo(tornado.web.RequestHandler):
    """Answers with everything that has reached the server."""
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
    """Counts and hashes an upload."""
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
    """`?size=` bytes, `?pause=` seconds between pieces, `?length=1` for a Content-Length."""
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
    """Echoes; "close" closes it, "vanish" ends the connection without a closing handshake."""
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


GUNICORN = str(Path(sys.executable).with_name("gunicorn"))  # the script, which can start itself again at USR2


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
        return {**kept, "PYTHONPATH": str(HERE), "MINIHUB_ISOLATION": "none", **named}  # tests of uid say so

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
        """The response, whose content is in `.body`."""
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
        """The output of `python -m minihub ...`."""
        return subprocess.run([sys.executable, "-m", "minihub", *words], cwd=self.folder, env=self.environ, check=True,
                              capture_output=True, text=True).stdout.strip()

    def start_server(self, name, token, path="server"):
        """Start a user's server and wait until it is ready."""
        assert self.api("POST", f"/users/{name}/{path}", token)[0] in (201, 202)
        return wait_for(lambda: self.api("GET", f"/users/{name}", token)[1]["servers"].get(path.partition("/")[2], {})
                        .get("ready"), 60, "the server is not ready")

    def facts(self, key):
        """The fact that the hub's database holds under that key."""
        return json.loads(self.rows(f"SELECT value FROM settings WHERE key = '{key}'")[0])

    def table(self, query):
        """The answer that the hub's database gives to a query."""
        url = self.settings.get("database", f"sqlite:///{self.folder}/minihub.sqlite")
        with contextlib.closing(minihub.database_from_url(url)) as database:
            return database.execute_sql(query).fetchall()

    def rows(self, query):
        """The first column of that."""
        return [row[0] for row in self.table(query)]

    def workers(self):
        """The process ids of gunicorn's workers."""
        return children_of(self.process.pid)

    def stop(self, how=signal.SIGTERM):
        """End gunicorn. Servers go on running."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait(60)  # gunicorn gives a worker that it forked in this moment 30 s before it kills it

    def stop_all(self):
        """End gunicorn and everything that it has started."""
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


########################################################################################################
# 2. Settings
########################################################################################################


@pytest.mark.parametrize(("settings", "message"), [
    *[({setting: value}, f"{setting}: {problem} (got {value!r})") for setting, values, problem in [
        ("base_url", ["lab"], "must start with a slash"),
        ("public_url", ["example.org", "https://", "ftp://example.org"], "must look like https://host"),
        ("hub_url", ["localhost:8000", "http://127.0.0.1:99999", "http://[::1"], "must look like https://host"),
        ("login_url", ["login", "javascript:x"], "must be a path or look like https://host/path"),
        ("authenticator", ["oauth"],
         "must be password, dummy, remote-user or package.module:Class: No module named 'oauth'"),
        ("spawner", ["json:a"], "must be subprocess or package.module:Class: module 'json' has no attribute 'a'"),
        ("spawner", [minihub, object], "must be a kind of Spawner"),
        ("cmd", [" ", "", "jupyterhub-singleuser 'unfinished"], "must be a command line with matching quotes"),
        ("admins", ["root", [1], None], "must be a list of strings"),
        ("start_timeout", [-1, float("nan"), float("inf"), True, "60"], "must be a number, 0 or more"),
        ("named_server_limit", [None, 1.5, 2.0, -1, True], "must be a whole number, 0 or more"),
        ("named_servers", ["yes", 1], "must be true or false"),
        ("homes", [5], "must be a string"),
        ("on_shutdown", [1, "site.stop"], "must be callable"),
        ("remote_user_variable", ["http_x", ""],
         "must be a variable that the site sets, not a header that clients send")] for value in values],
    ({"authenticator": "dummy"},
     "password: must be set for the dummy authenticator, which lets in everybody who knows it (got '')"),
    ({"identify": print}, "identify: needs remote-user as the setting authenticator (got 'password')"),
    ({"admins": ["ada", "a/b"]}, "admins: must hold names that users can have (got 'a/b')"),
    ({"trusted_proxies": ["::1", "here"]}, "trusted_proxies: must be IP addresses or networks (got 'here')"),
    ({"proxy": "json:JSONDecoder"}, "proxy: must be a kind of Proxy (got 'json:JSONDecoder')")])
def test_a_wrong_setting_stops_the_hub_with_one_sentence_that_names_it(make_hub, settings, message):
    with pytest.raises(minihub.SettingError) as raised:
        make_hub(**settings)
    assert (str(raised.value), raised.value.setting) == (message, message.partition(":")[0])


@pytest.mark.parametrize("url", [
    "postgresql://me:secret@127.0.0.1:1/", "postgresql://me:secret@127.0.0.1:x/hub", "sqlite:////no/where/hub",
    "nonsense", "odd://host/hub", "sqlite:///{tmp_path}/essay.txt", "sqlite:///{tmp_path}"])
def test_a_database_that_cannot_be_opened_stops_the_hub_and_its_password_is_not_shown(make_hub, tmp_path, url):
    (tmp_path / "essay.txt").write_text("Once upon a time" * 100)
    with pytest.raises(minihub.SettingError, match=r"^database: must be .* \(got '.*'\)$") as raised:
        make_hub(database=url.format(tmp_path=tmp_path))
    assert "\n" not in str(raised.value) and "secret" not in str(raised.value)


@pytest.mark.parametrize(("settings", "problem"), [
    *[({"user_url": url}, "must look like https://host or https://{username}.host") for url in (
        "nb.example", "https://nb.example/a", "https://{name}.example", "https://nb.{username}", "ftp://nb.example",
        "https://{USERNAME}.example", "http://127.0.0.1:8000", "http://10.0.0.1", "http://{username}.10.0.0.1")],
    ({"user_url": "https://nb.example", "public_url": ""}, "needs public_url, the address of the hub's own pages"),
    *[({"user_url": url, "hub_url": "http://nb.example"}, "must be another host than those of public_url and hub_url")
      for url in ("https://hub.example", "https://{username}.example:443", "https://HUB.example:8443",
                  "http://nb.example:80")],
    ({"user_url": "https://nb.example", "proxy": "chp"}, "needs the hub's own proxy")])
def test_a_user_url_that_cannot_be_the_servers_own_stops_the_hub(make_hub, settings, problem):
    with pytest.raises(minihub.SettingError, match=f"^user_url: {re.escape(problem)}"):
        make_hub(**{"public_url": "https://hub.example", **settings})


@pytest.mark.parametrize(("url", "own", "others"), [
    ("https://nb.example", "nb.example NB.example:443", "nb.example:80 nbxexample a.nb.example nb.example."),
    ("https://nb.example:443", "nb.example", ""), ("http://nb.example", "nb.example:80", ""),
    ("https://nb.example:8443", "nb.example:8443", "nb.example"),
    ("https://{username}.nb.example", "ada.nb.example", "nb.example a.b.nb.example")])
def test_a_host_header_is_compared_with_a_url(url, own, others):
    assert [host for host in [*own.split(), *others.split(), ""] if minihub.is_host_of(url, host)] == own.split()


@pytest.mark.parametrize(("setting", "value", "kept"), [
    ("base_url", "/", "/"), ("base_url", "/lab", "/lab/"), ("base_url", "/lab/", "/lab/"),
    ("public_url", "https://hub.example.org/", "https://hub.example.org"),
    ("user_url", "https://nb.example:8443/", "https://nb.example:8443"),
    ("hub_url", "http://[::1]:8000", "http://[::1]:8000"), ("admins", ["root"], ("root",)),
    ("trusted_proxies", ["10.0.0.0/8"], ("10.0.0.0/8",)), ("start_timeout", 0, 0), ("homes", "/srv/../homes", "/homes"),
    ("cmd", "jupyter-labhub --port {port}", "jupyter-labhub --port {port}"), ("on_shutdown", print, print)])
def test_a_valid_setting_is_kept_in_its_normal_form(setting, value, kept):
    settings = Settings(**{"public_url": "https://hub.nb.example", setting: value})
    assert getattr(settings, setting) == kept
    assert dataclasses.replace(settings) == settings


def test_an_unknown_keyword_is_refused():
    with pytest.raises(TypeError, match="nonsense"):
        Hub(nonsense=1)


@pytest.mark.parametrize(("name", "text", "value"), [
    ("admins", " root, ada ,,", ("root", "ada")), ("admins", "", ()), ("named_servers", "off", False),
    ("named_servers", "Yes", True), ("named_server_limit", "3", 3), ("start_timeout", "1.5", 1.5), ("services", "", ()),
    ("cmd", "'my lab' {port}", "'my lab' {port}"), ("authenticator", "dummy_auth:Open", "dummy_auth:Open")])
def test_a_setting_is_read_from_its_variable(name, text, value):
    assert getattr(Settings.from_environ({f"MINIHUB_{name.upper()}": text}), name) == value


@pytest.mark.parametrize(("name", "text", "message"), [
    ("named_servers", "maybe", "must be true or false (got 'maybe')"),
    ("named_server_limit", "1.5", "must be a whole number, 0 or more (got '1.5')"),
    ("start_timeout", "soon", "must be a number, 0 or more (got 'soon')"),
    ("services", "[", "must be a list of objects (got '[')"), ("services", "{}", "must be a list of objects (got {})")])
def test_a_variable_with_a_wrong_value_is_refused(name, text, message):
    with pytest.raises(minihub.SettingError) as raised:
        Settings.from_environ({f"MINIHUB_{name.upper()}": text})
    assert str(raised.value) == f"{name}: {message}"


@pytest.mark.parametrize("name", ["MINIHUB_ADMIN", "MINIHUB_", "MINIHUB_CLEANUP_PROXY", "MINIHUB_ON_SHUTDOWN"])
def test_a_warning_names_an_unknown_variable(name):
    with pytest.warns(UserWarning, match=f"{name} is not a setting of minihub {minihub.__version__}"):
        assert Settings.from_environ({name: "x", "ADMINS": "root"}) == Settings()


def test_a_server_inherits_only_variables_on_the_list():
    variables = {"PATH": "/bin", "LC_ALL": "C", "TZ": "UTC", "CLASS": "7b", "MINIHUB_PASSWORD": "x", "PGPASSWORD": "x"}
    inherited = Settings(env_keep=["CLASS"]).inherited_variables(variables)
    assert inherited == {"PATH": f"{Path(sys.executable).parent}:/bin", "LC_ALL": "C", "TZ": "UTC", "CLASS": "7b"}


@pytest.mark.parametrize(("services", "problem"), [
    ("x", "must be a list of objects (got 'x')"),
    *[([entry], f"must be a list of objects, each with a name of letters, digits and -_.~ (got {name!r})")
      for entry, name in (("x", None), ({}, None), ({"name": 1}, 1), ({"name": "a/b"}, "a/b"))],
    ([{"name": "a", "x": 1}], "a must have no other keys than name, admin, url, api_token, command, cwd, environment,"
     " user, info, display, oauth_no_confirm, oauth_client_id, oauth_redirect_uri (got ['x'])"),
    ([{"name": "a"}, {"name": "a"}], "must have different names (got ['a', 'a'])"),
    ([{"name": "a", "api_token": "short"}], "api_token of a must have at least 8 characters (got 5)"),
    *[([{"name": "a", key: value}], f"{key} of a {problem} (got {value!r})") for key, value, problem in (
        ("admin", "yes", "must be true or false"), ("info", [], "must be an object"),
        *[("url", url, "must look like http://host") for url in ("nowhere", "http://[::1", "http://a:99999")],
        ("command", 7, "must be a list of strings"), ("command", "x 'y", "must have matching quotes"),
        ("environment", {"A": 1}, "must be an object whose values are strings"),
        ("oauth_client_id", "jupyterhub-user-ada", "must not be one that a server can have"))]])
def test_a_wrong_service_stops_the_hub_with_a_sentence(services, problem):
    with pytest.raises(minihub.SettingError) as raised:
        Settings(services=services)
    assert str(raised.value) == f"services: {problem}"


@pytest.mark.parametrize(("entry", "command", "target", "client_id"), [
    ({}, (), "", ""), ({"command": "x 'y z'"}, ("x", "y z"), "", ""), ({"command": ["x"]}, ("x",), "", ""),
    ({"url": "http://10.0.0.1:80/below"}, (), "http://10.0.0.1:80", "service-a"),
    ({"oauth_redirect_uri": "https://a.example/"}, (), "", "service-a"), ({"oauth_client_id": "mine"}, (), "", "mine")])
def test_a_service_has_a_command_a_target_and_a_client_id(entry, command, target, client_id):
    spec, = Settings(services=[{"name": "a", **entry}]).services
    assert (spec.command, spec.target, spec.client_id) == (command, target, client_id)
    assert minihub.ServiceSpec.of(json.loads(json.dumps(dataclasses.asdict(spec)))) == spec


@pytest.mark.parametrize(("setting", "kind"), [
    ("authenticator", minihub.PasswordAuthenticator), ("spawner", minihub.SubprocessSpawner),
    ("proxy", minihub.EmbeddedProxy)])
def test_a_hook_object_belongs_to_one_hub_while_a_class_makes_one_for_each(make_hub, setting, kind):
    hook = kind()
    hub = make_hub(**{setting: hook})
    with pytest.raises(minihub.SettingError) as raised:
        make_hub(**{setting: hook})
    assert str(raised.value) == f"{setting}: must be an object of its own for each hub (got {hook!r})"
    assert hook.settings is hub.settings
    assert [make_hub(**{setting: kind}).settings for _ in range(2)] and kind.settings is None


def written(default):
    """A default, written as in a variable."""
    if isinstance(default, bool):
        return str(default).lower()
    return ",".join(default) if isinstance(default, tuple) else "" if default is None else f"{default}"


#: The variable of each setting but functions, which no variable can hold.
VARIABLES = {field.name: f"MINIHUB_{field.name.upper()}" for field in dataclasses.fields(Settings)
             if "Callable" not in field.type}


def test_the_readmes_table_has_every_setting():
    meanings = dict(re.findall(r"^    (\w+): [^#\n]+# (.+)$", SOURCE[:SOURCE.index("def __post_init__")], re.MULTILINE))
    rows = [(name, VARIABLES.get(name, ""), written(getattr(Settings, name)), meanings[name].replace("|", "\\|"))
            for name in Settings.__dataclass_fields__]
    table = ["| keyword | variable | default | meaning |", "| --- | --- | --- | --- |",
             *["| `{}` | `{}` | `{}` | {} |".format(*row).replace("``", "") for row in rows]]
    assert "\n".join(table) in README


def test_every_default_in_the_table_can_be_written_as_a_variable():
    variables = {variable: written(getattr(Settings, name)) for name, variable in VARIABLES.items()}
    assert Settings.from_environ(variables) == Settings()


def readme_text(words, kind="python"):
    """The README's example of that kind that contains those words."""
    return next(text for text in re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL) if words in text)


def readme_example(name, words=None):
    """The object that the README's Python example containing that name, or those words, defines under the name."""
    defined = {}
    exec(readme_text(words or name), defined)
    return defined[name]


def test_the_readmes_authenticator_believes_the_site(make_hub):
    pages = Browser(make_hub(authenticator=readme_example("SiteUsers")), REMOTE_USER="ada")
    assert pages.get("/hub/home", status=200).html.h1.text == "Hello, ada"
    assert pages.get("/hub/logout", status=302).headers["Location"] == "/logout"
    pages.get("/hub/home", status=302, extra_environ={"REMOTE_USER": ""})


@pytest.mark.parametrize("options, folder", [
    (None, "/opt/python-course"), ({"course": "statistics"}, "/opt/statistics-course")])
def test_the_readmes_spawner_gives_each_course_its_environment(options, folder):
    spawner = readme_example("CourseSpawner")()
    spawner.settings = Settings()
    launch = launch_of(options=options, port=1234)
    assert spawner.command(launch) == [f"{folder}/bin/jupyterhub-singleuser", "--port=1234"]
    assert spawner.environment(launch)["OMP_NUM_THREADS"] == "2"


def test_the_readmes_proxy_lists_what_runs(make_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    proxy = readme_example("ListingProxy")()
    hub = make_hub(proxy=proxy)
    with hub.store.connected():
        for name in ("ada", "bob"):
            proxy.add_route(f"/user/{name}/", "http://127.0.0.1:1", {})
        proxy.delete_route("/user/ada/")
    assert Path("running.txt").read_text() == "/user/bob/"


def test_the_readmes_calls_work_outside_of_requests(spawner, monkeypatch):
    monkeypatch.setattr(minihub, "Hub", functools.partial(
        Hub, database="sqlite:///:memory:", spawner=spawner, tick_interval=0))
    hub = readme_example("lab", "lab.start_server")
    with hub.store.connected():
        assert [user.name for user in hub.people.list()[0]] == ["ada"]  # grace has been deleted
    assert ([launch.user_options for launch in spawner.launches], spawner.running) == ([{"course": "statistics"}], {})


def test_the_readmes_mount_sends_only_its_own_paths_to_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    application = readme_example("application")
    application.__globals__["site"] = wsgiref.simple_server.demo_app
    pages = Browser(application)
    with contextlib.closing(application.__globals__["lab"]):
        assert pages.get("/lab/hub/login", status=200).html.h1.text == "Sign in"
        assert pages.get("/lab", status=302).headers["Location"] == "/lab/hub/"
        assert pages.get("/laboratory", status=200).text.startswith("Hello world!")


########################################################################################################
# 3. Errors, time, secrets, names
########################################################################################################


class Like:
    """Equal to every string that matches a pattern."""

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
    """The body of each error of the API."""
    return {"status": status, "message": message}


@pytest.fixture
def pass_time(monkeypatch):
    """`pass_time(60)` puts the hub's clock forward by a minute."""
    signer, clock, skipped = minihub.itsdangerous.TimestampSigner, minihub.now, []
    stamp = signer.get_timestamp
    monkeypatch.setattr(minihub, "now", lambda: clock() + timedelta(seconds=sum(skipped)))
    monkeypatch.setattr(signer, "get_timestamp", lambda self: stamp(self) + int(sum(skipped)))
    return skipped.append


@pytest.mark.parametrize(("text", "written"), [
    ("2026-11-23T03:23:16.453194Z", "2026-11-23T03:23:16.453194Z"), ("2026-11-23T03:23:16Z", "2026-11-23T03:23:16Z"),
    ("2026-11-23T03:23:16", "2026-11-23T03:23:16Z"), ("2026-11-23T03:23:16+05:30", "2026-11-22T21:53:16Z"),
    ("2026-11-23T03:23:16.5Z", "2026-11-23T03:23:16.500000Z"), (" 2026-11-23 03:23 ", "2026-11-23T03:23:00Z"),
    ("2026-11-23T03:23:16.123456789Z", "2026-11-23T03:23:16.123456Z"), ("2026-11-23", "2026-11-23T00:00:00Z")])
def test_a_timestamp_is_read_in_many_forms_and_written_in_one(text, written):
    assert minihub.isoformat(minihub.parse_time(text)) == written


@pytest.mark.parametrize("text", [
    "", "yesterday", "2026-13-01", "2026-11-23T25:00:00Z", "0001-01-01T00:00:00Z", "0001-01-01T00:00:00+23:59",
    "9999-12-31T23:59:59-23:59", "1969-12-31T23:59:59Z", "2026-11-23\0", "١٩٧٠", 1700000000, None, [], {}, "9" * 10000])
def test_an_invalid_timestamp_is_refused(text):
    with pytest.raises(minihub.BadRequest, match="^Not a valid timestamp: ") as raised:
        minihub.parse_time(text)
    assert len(raised.value.message) < 300


def test_a_pkce_challenge_is_that_of_the_rfc():  # RFC 7636, appendix B
    challenge = minihub.challenge_of("dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk")
    assert challenge == "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"


def test_tokens_are_128_random_bits():
    assert minihub.new_token() == SECRET and minihub.new_token() != minihub.new_token()


@pytest.mark.parametrize("password", ["correct horse", "пароль", "x" * 1000, "nul\0nul", ""])
def test_a_password_matches_its_hash_and_no_other_does(password):
    hashed = minihub.hash_password(password)
    assert hashed == Like(r"scrypt\$[0-9a-f]{32}\$[0-9a-f]{128}") and minihub.check_password(password, hashed)
    assert not minihub.check_password(password + "!", hashed) and not minihub.check_password(password, None)
    assert hashed != minihub.hash_password(password) and not minihub.check_password("\udcff", None)


@pytest.mark.parametrize(("typed", "name"), [
    ("Ada", "ada"), ("ＡＤＡ", "ada"), ("ADA.Lovelace@example.org", "ada.lovelace@example.org"), ("ÅSA", "åsa"),
    ("A\N{COMBINING RING ABOVE}sa", "åsa"), ("İnci", "i̇nci"), ("/", "/"),
    ("\u0130\u0316", "i\u0316\u0307"), ("\u1d2c\u0300", "\u00e0"), ("x" * 255, "x" * 255)])
def test_a_name_has_one_spelling_however_it_is_typed(typed, name):
    assert minihub.normalize_name(typed) == name == minihub.normalize_name(name)


def test_normalizing_any_character_twice_changes_nothing_more():
    typed = [letter + mark for letter in map(chr, range(0x3000)) for mark in ("", "\u0307", "\u0345")]
    names = [minihub.normalize_name(name) for name in typed]
    assert all(names) and [minihub.normalize_name(name) for name in names] == names


@pytest.mark.parametrize("typed", ["x" * 256, "A\u0301" * 150, "a" + "\u0315\u0300" * 50_000, "\ufdfa" * 255])
def test_a_name_that_is_too_long_costs_nothing_and_stays_invalid(typed):
    started = time.process_time()
    name = minihub.normalize_name(typed)
    assert time.process_time() - started < 0.1
    assert not minihub.is_valid_name(name) and minihub.normalize_name(name) == name


def test_a_name_is_valid_unless_it_is_a_path_or_hard_to_see():
    valid = ["ada", "a b", "a@b.example", "åsa", "李", "x" * 255, "-", "...", "%2f", "a\\b", "<b>", "\N{GRINNING FACE}"]
    invalid = ["", " ", "ada ", " ada", "a/b", ".", "..", "a\0b", "a\nb", "\x7f", "a\tb", "x" * 256, "\u202eada",
               "\u200b", "\ud800"]
    assert [name for name in valid + invalid if minihub.is_valid_name(name)] == valid
    assert not any(minihub.is_valid_name(minihub.normalize_name(lookalike)) for lookalike in ("．．", "ａ／ｂ", "․"))


@pytest.mark.parametrize("name", ["", "gpu", "a-b_c.d~e", "9", "x" * 63, "My.Project"])
def test_a_valid_server_name(name):
    assert minihub.check_server_name(name) == name


@pytest.mark.parametrize("name", [
    "a b", "a/b", ".", "..", "-a", "a-", "x" * 64, "é", "a\0", "a\n", "a%20b", "api", "LAB", "oauth_callback"])
def test_an_invalid_server_name(name):
    with pytest.raises(minihub.BadRequest, match=f"^Invalid server_name: {re.escape(repr(name))}"):
        minihub.check_server_name(name)


def test_a_name_is_quoted_as_one_segment_of_a_path():
    assert minihub.quote_name("ada a@b~c/é?#%;a&b") == "ada%20a@b~c%2F%C3%A9%3F%23%25%3Ba%26b"


#: Legal names that are awkward as a file's or host's.
ODD_NAMES = [".hidden", "%2Ehidden", "%2ehidden", "a b", "a%20b", "a+b", "-rf", "x" * 255, "x" * 254 + "y", "名" * 255,
             "\N{GRINNING FACE}" * 255, "a\\b", "c:", "*", "~root", "...", "$(reboot)", "ada#deleted-20261124-0000"]


def test_every_name_has_a_folder_of_its_own(tmp_path):
    folders = [minihub.folder_name(name) for name in ODD_NAMES]
    for folder in folders:
        (tmp_path / folder).mkdir()
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == sorted(folders)


@pytest.mark.parametrize(("name", "label"), [
    ("ada", "ada"), ("9", "9"), ("x" * 63, "x" * 63),
    *[(name, Like("u-[0-9a-f]{16}")) for name in ("x" * 64, "Ada", "ada-b", "a.b", "é", "ada\n")]])
def test_a_name_has_a_label_in_host_names(name, label):
    assert minihub.host_label(name) == label == minihub.host_label(name)


def test_no_two_names_have_one_label():
    names = [*ODD_NAMES, "ada", "Ada", "u-ada", minihub.host_label("Ada")]
    assert len({minihub.host_label(name) for name in names}) == len(names)


########################################################################################################
# 4. Models and the store
########################################################################################################


@pytest.mark.database("sqlite")
def test_the_database_is_for_the_hubs_user_only(make_hub, tmp_path):
    hub = make_hub(database=f"sqlite:///{tmp_path}/hub.sqlite")
    with hub.store.connected():
        hub.people.create("ada")
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("hub.sqlite*")}
    assert modes == dict.fromkeys(("hub.sqlite", "hub.sqlite-wal", "hub.sqlite-shm"), 0o600)


@pytest.mark.database("sqlite")
def test_sqlite_is_set_up_for_several_processes(opened):
    pragmas = [opened.store.database.execute_sql(f"PRAGMA {name}").fetchone()[0]
               for name in ("journal_mode", "foreign_keys", "busy_timeout")]
    assert pragmas == ["wal", 1, 15000]


def test_the_first_threads_after_a_fork_share_one_database(hub, monkeypatch):
    """Those of a new worker start at the same moment."""
    both, open_database = threading.Barrier(2), minihub.open_database

    def open_at_once(url):
        both.wait(10)
        return open_database(url)

    def use(number):
        with hub.store.connected():
            hub.store.fact("x")
            return hub.store.database

    monkeypatch.setattr(minihub, "open_database", open_at_once)
    hub.store._databases.clear()  # as in a child, which has another process id
    first, second = in_threads(2, use)
    assert first is second is hub.store.database


def test_each_thread_has_a_connection_of_its_own(hub):
    def connection(number):
        with hub.store.connected():
            connection = hub.store.database.connection()
            assert hub.store.database.connection() is connection
        hub.store.disconnect()
        return id(connection), connection  # kept, so that its id is not used again

    assert len({number for number, _ in in_threads(3, connection)}) == 3


FORKING = """
import os, sys, minihub
hub = minihub.Hub(database="sqlite:///hub.sqlite", tick_interval=0)
with hub.store.connected():
    hub.people.create("parent")
    mine = hub.store.database.connection()
    child = os.fork()
    if child == 0:
        with hub.store.connected():
            assert hub.store.database.connection() is not mine
            hub.people.create("child")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert hub.store.database.connection() is mine
    print([user.name for user in hub.people.list()[0]])
"""


def test_a_forked_child_has_a_connection_of_its_own(tmp_path):
    assert run_python(FORKING, tmp_path) == "['parent', 'child']"


def test_a_forked_child_leaves_the_in_memory_database_of_its_parent_alone(tmp_path):
    assert run_python(FORKING.replace("hub.sqlite", ":memory:").replace("os._exit(0)", "sys.exit(0)"), tmp_path,
                      TMPDIR=str(tmp_path)) == "['parent', 'child']"
    assert [path.name for path in tmp_path.iterdir() if path.name != "homes"] == []


@pytest.mark.parametrize(("model", "row"), [
    (minihub.User, {"name": "ada", "folder": "other"}), (minihub.User, {"name": "other", "folder": "ada"}),
    (minihub.Server, {"name": "", "user": 1}), (minihub.Server, {"name": "x", "user": 99}),
    (minihub.Token, {"hashed": "x"}), (minihub.Token, {"hashed": "x", "user": 99}),
    (minihub.Membership, {"user": 1, "group": 99})])
def test_the_database_refuses_an_inconsistent_row(opened, model, row):
    with pytest.raises(minihub.pw.IntegrityError):
        model.create(**row)


def test_a_moment_comes_back_as_it_went_in(opened):
    moment = minihub.parse_time("2026-11-23T03:23:16.453194+05:30")
    minihub.User.update(last_activity=moment).where(minihub.User.name == "ada").execute()
    read = opened.people.find("ada").last_activity
    assert read == moment and read.utcoffset() == timedelta(0)


@pytest.mark.parametrize("value", [None, {}, [], 0, "", "\0", {"a": [1.5, None, {"é": "\N{GRINNING FACE}"}]}])
def test_json_comes_back_as_it_went_in(opened, value):
    minihub.Server.update(user_options=value).execute()
    assert server_of(opened).user_options == value


def test_a_fact_is_claimed_once_and_set_at_any_time(opened):
    store = opened.store
    facts = [store.fact("x"), store.fact("x", "default"), store.claim_fact("x", 1), store.claim_fact("x", 2)]
    store.set_fact("x", 3)
    assert [*facts, store.fact("x", "default"), store.claim_fact("x", 4)] == [None, "default", 1, 1, 3, 3]


def test_a_compiled_query_answers_as_the_query_itself(opened):
    query = minihub.CompiledQuery(minihub.User.select().where(minihub.User.name == ""), who=minihub.User.name,
                                  is_admin=minihub.User.admin, created=minihub.User.created)
    row, = query.run(opened.store.database, "root")
    assert (row.who, row.is_admin, row.created) == ("root", True, opened.people.find("root").created)
    assert query.run(opened.store.database, "eve") == []


def test_a_database_of_a_newer_minihub_is_refused(make_hub, make_database):
    hub = make_hub(database=make_database())
    with hub.store.connected():
        hub.store.set_fact("schema_version", minihub.SCHEMA_VERSION + 1)
    with pytest.raises(minihub.SettingError, match="written by a newer minihub"):
        make_hub(database=hub.settings.database)


@pytest.mark.database("postgres")
@pytest.mark.parametrize(("change", "problem"), [
    (("hub_", "no_hub_"), 'database "no_hub_.*" does not exist'), (("minihub@", "eve@"), 'role "eve" does not exist'),
    (("minihub@", "locked:secret@"), "password authentication failed")])
def test_a_postgresql_that_refuses_the_hub_stops_it_with_a_sentence(make_hub, make_database, postgres, change, problem):
    rules = Path(postgres.folder) / "data" / "pg_hba.conf"
    trust = rules.read_text()
    rules.write_text(f"host all locked 127.0.0.1/32 scram-sha-256\n{trust}")
    postgres.ask("SELECT pg_reload_conf()")
    url = make_database().replace(*change)
    try:
        with pytest.raises(minihub.SettingError, match=f"^database: must be usable: .*{problem}") as raised:
            wait_for(lambda: make_hub(database=url).close())  # until the rules have been read again
    finally:
        rules.write_text(trust)
    assert "secret" not in str(raised.value)


class Unwell(LiveHub):
    """A gunicorn that counts as started although its hub answers with 503."""

    def health(self):
        """The status of /hub/health, None if nobody answers."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.request("GET", "/hub/health").status

    def is_up(self):
        return self.health() in (200, 503)


@pytest.mark.parametrize("options", [["-w", "1"], ["--threads", "4"]], ids=" ".join)
@pytest.mark.database("postgres")
def test_a_hub_whose_postgresql_is_away_or_hangs_says_so_and_lives_on(live, make_database, postgres, options):
    url = make_database("template0")
    postgres.stop()
    try:
        hub = live(*options, kind=Unwell, database=url, admins="root")
        workers = hub.workers()
        assert hub.health() == 503
    finally:
        postgres.start()
    wait_for(lambda: hub.health() == 200)
    token = hub.command("token", "root")  # whom the first request that found the database well has made an admin
    postgres.send(signal.SIGSTOP)
    try:
        begin, asked = time.monotonic(), 8
        answers = at_once(*[functools.partial(hub.api, "GET", "/users", token) for _ in range(asked)])
        assert [status for status, _ in answers] == [503] * asked
        assert time.monotonic() - begin < minihub.ANSWER_WAIT + minihub.CONNECT_WAIT + 3
    finally:
        postgres.send(signal.SIGCONT)
    wait_for(lambda: hub.api("GET", "/users", token)[0] == 200)
    assert hub.workers() == workers and "Traceback" not in hub.log.read_text()


def test_a_hub_starts_though_its_database_is_locked_and_then_makes_its_admins(live, tmp_path):
    Hub(database=f"sqlite:///{tmp_path}/minihub.sqlite", tick_interval=0).close()
    with contextlib.closing(sqlite3.connect(tmp_path / "minihub.sqlite", isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        hub = live("-w", "2", kind=Unwell, admins="root")
        assert hub.health() == 503
    wait_for(lambda: hub.health() == 200)
    assert hub.rows("SELECT name FROM users WHERE admin") == ["root"]


@pytest.mark.database("sqlite")
def test_a_hub_starts_though_the_disk_is_full_and_then_makes_its_admins(make_hub, make_database, monkeypatch):
    def token_of_first():
        with contextlib.suppress(*minihub.DatabaseTrouble):  # nobody tries again at once
            return token_for(hub, names[0])

    def open_full(url):
        database = open_database(url)
        database._pragmas.append(("max_page_count", 1))  # not one page more than there are
        return database

    url, open_database = make_database(), minihub.open_database
    make_hub(database=url).close()
    monkeypatch.setattr(minihub, "open_database", open_full)
    names = [f"admin{number}" for number in range(500)]
    hub = make_hub(database=url, admins=names)
    assert Api(hub)("GET", "/user", status=503).json == error(503, minihub.NO_DATABASE)
    monkeypatch.undo()
    hub.store._databases.clear()
    assert len(Api(hub, wait_for(token_of_first))("GET", "/users").json) == 500


@pytest.mark.parametrize("options", [["-w", "2"], ["-w", "2", "--threads", "4", "--preload"]], ids=" ".join)
def test_a_database_file_that_is_deleted_or_replaced_is_noticed_and_not_made_anew(live, tmp_path, options):
    hub, path, aside = live(*options, admins="root"), tmp_path / "minihub.sqlite", tmp_path / "aside"
    token = hub.command("token", "root")

    def is_said_by_all():
        answers = [hub.api("GET", "/users", token) for _ in range(20)]
        assert {status for status, _ in answers} == {503}
        assert {body["message"] for _, body in answers} == {minihub.REPLACED}
        return True

    path.rename(aside)
    assert is_said_by_all()
    old = hub.workers()
    os.kill(old[0], signal.SIGKILL)
    wait_for(lambda: len(hub.workers()) == 2 and old[0] not in hub.workers())
    wait_for(lambda: hub.api("GET", "/users", token)[0] == 503 and is_said_by_all())
    assert not path.exists()
    shutil.copy(aside, path)
    assert is_said_by_all()
    failed = subprocess.run([sys.executable, "-m", "minihub", "token", "root"], cwd=tmp_path, env=hub.environ,
                            capture_output=True, text=True)
    assert (failed.returncode, failed.stdout) == (1, "") and minihub.REPLACED in failed.stderr
    assert 2 <= hub.log.read_text().count(minihub.REPLACED) <= 6  # once for each worker, not for each request
    aside.replace(path)
    wait_for(lambda: {hub.api("GET", "/users", token)[0] for _ in range(20)} == {200})
    hub.stop()
    path.unlink()
    hub.start()
    assert hub.api("GET", "/users", token)[0] == 403  # a hub that starts may begin anew


def test_while_sqlite_is_locked_requests_that_only_read_are_answered_at_once(live, tmp_path):
    hub = start_mocked(live, tmp_path, activity_resolution=0)  # so that each request tries to record activity
    hub.start_server("ada", hub.token)
    with contextlib.closing(sqlite3.connect(tmp_path / "minihub.sqlite", isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        begin = time.monotonic()
        for _ in range(5):
            assert hub.api("GET", "/users/ada", hub.token)[0] == 200
            assert hub.request("GET", "/user/ada/").body == b"mock"
        report = {"last_activity": minihub.isoformat(minihub.now())}
        assert hub.api("POST", "/users/ada/activity", hub.token, report)[0] == 503  # it will be sent again
        assert time.monotonic() - begin < 5


#: The tables of minihub 0.1.0, their unique indexes, and rows in all of them; OLD_TYPES spells out what is short here.
VERSION_1 = """
CREATE TABLE failures (key VARCHAR(512) NOT NULL PRIMARY KEY, count INTEGER NOT NULL, until TIME NOT NULL);
CREATE TABLE leases (job STRING PRIMARY KEY, holder STRING, expires TIME NOT NULL);
CREATE TABLE settings (key STRING PRIMARY KEY, value TEXT);
CREATE TABLE routes (prefix TEXT NOT NULL PRIMARY KEY, target STRING, data TEXT NOT NULL);
CREATE TABLE groups (id SERIAL, name STRING);
CREATE TABLE users (id SERIAL, name STRING, admin BOOL NOT NULL, password VARCHAR(255), folder STRING,
  session_key STRING, auth_state TEXT, created TIME NOT NULL, last_activity TIME);
CREATE TABLE memberships (id SERIAL, user_id ID OF users NOT NULL, group_id ID OF groups NOT NULL);
CREATE TABLE servers (id SERIAL, user_id ID OF users NOT NULL, name STRING,
  "status" STRING CHECK (status IN ('stopped', 'spawning', 'ready', 'stopping')), launch STRING,
  attempts INTEGER NOT NULL, state TEXT, target VARCHAR(255), prefix TEXT NOT NULL, user_options TEXT,
  failure TEXT NOT NULL, forget BOOL NOT NULL, changed TIME NOT NULL, started TIME, last_activity TIME);
CREATE TABLE services (id SERIAL, name STRING, admin BOOL NOT NULL, spec TEXT NOT NULL, state TEXT,
  restarts INTEGER NOT NULL, next_start TIME NOT NULL, created TIME NOT NULL);
CREATE TABLE oauthclients (id SERIAL, identifier TEXT NOT NULL, secret STRING, redirect_uri TEXT NOT NULL,
  description TEXT NOT NULL, server_id ID OF servers, service_id ID OF services);
CREATE TABLE oauthcodes (id SERIAL, hashed STRING, client_id ID OF oauthclients NOT NULL, user_id ID OF users NOT NULL,
  session_id STRING, challenge STRING, expires_at TIME NOT NULL);
CREATE TABLE tokens (id SERIAL, hashed STRING, user_id ID OF users, service_id ID OF services,
  client_id ID OF oauthclients, server_id ID OF servers, parent_id ID OF tokens, session_id STRING, note TEXT NOT NULL,
  created TIME NOT NULL, last_activity TIME, expires_at TIME, CHECK ((user_id IS NULL) <> (service_id IS NULL)));
CREATE UNIQUE INDEX group_name ON groups (name); CREATE UNIQUE INDEX user_name ON users (name);
CREATE UNIQUE INDEX user_folder ON users (folder); CREATE UNIQUE INDEX server_target ON servers (target);
CREATE UNIQUE INDEX service_name ON services (name); CREATE UNIQUE INDEX server_user_id_name ON servers (user_id, name);
CREATE UNIQUE INDEX oauthcode_hashed ON oauthcodes (hashed); CREATE UNIQUE INDEX token_hashed ON tokens (hashed);
CREATE UNIQUE INDEX membership_user_id_group_id ON memberships (user_id, group_id);
CREATE UNIQUE INDEX oauthclient_identifier ON oauthclients (identifier);
INSERT INTO settings VALUES ('schema_version', '1'), ('cookie_secret', '"a secret"');
INSERT INTO failures VALUES ('name ada', 3, '2026-01-01 00:00:00');
INSERT INTO leases VALUES ('ticker', 'a worker', '2026-01-01 00:00:00');
INSERT INTO users (name, admin, password, folder, session_key, created) VALUES
  ('root', TRUE, 'x', 'root', 'k0', '2026-01-01 00:00:00.000001'),
  ('ada', FALSE, NULL, 'ada', 'k1', '2026-01-02 00:00:00');
INSERT INTO groups (name) VALUES ('class');
INSERT INTO memberships (user_id, group_id) VALUES (2, 1);
INSERT INTO servers (user_id, name, status, launch, attempts, state, target, prefix, failure, forget, changed) VALUES
  (1, '', 'stopped', '', 0, NULL, NULL, '', 'no luck', FALSE, '2026-01-01 00:00:00'),
  (2, '', 'ready', 'first', 1, '{"launch": "first"}', '{target}/first', '/user/ada/', '', FALSE, '2026-01-02 00:00:00');
INSERT INTO services (name, admin, spec, restarts, next_start, created) VALUES
  ('ops', TRUE, '{"name": "ops"}', 0, '2026-01-01 00:00:00', '2026-01-01 00:00:00');
INSERT INTO oauthclients (identifier, secret, redirect_uri, description, server_id) VALUES
  ('jupyterhub-user-ada', 's', '/user/ada/oauth_callback', 'Server at /user/ada/', 2);
INSERT INTO oauthcodes (hashed, client_id, user_id, session_id, challenge, expires_at) VALUES
  ('c', 1, 2, 's', '', '2026-01-01 00:00:00');
INSERT INTO routes VALUES ('/user/ada/', '{target}/first', '{"user": "ada", "server_name": ""}');
INSERT INTO tokens (hashed, user_id, service_id, client_id, server_id, parent_id, session_id, note, created) VALUES
  ('{hashed}', 2, NULL, NULL, NULL, NULL, '', 'hers', '2026-01-02 00:00:00'),
  ('t2', NULL, 1, NULL, NULL, NULL, '', 'the service''s', '2026-01-01 00:00:00'),
  ('t3', 2, NULL, NULL, 2, NULL, '', 'the server''s', '2026-01-02 00:00:00'),
  ('t4', 2, NULL, 1, NULL, 1, '', 'exchanged', '2026-01-02 00:00:00')
"""

#: Rows that a worker of 0.1.0, which does not know the new columns, goes on to write.
WRITES_OF_VERSION_1 = """
INSERT INTO users (name, admin, folder, session_key, created) VALUES ('eve', FALSE, 'eve', 'k2', '2026-01-03 00:00:00');
INSERT INTO groups (name) VALUES ('course');
INSERT INTO memberships (user_id, group_id) VALUES (3, 2);
INSERT INTO servers (user_id, name, status, launch, attempts, prefix, failure, forget, changed) VALUES
  (3, '', 'spawning', 'l', 1, '/user/eve/', '', FALSE, '2026-01-03 00:00:00');
INSERT INTO tokens (hashed, user_id, session_id, note, created) VALUES ('t5', 3, '', '', '2026-01-03 00:00:00')
"""

OLD_TYPES = {
    "sqlite": {r"\bSERIAL": "INTEGER NOT NULL PRIMARY KEY", r"\bBOOL\b": "INTEGER", r"\bTIME\b": "DATETIME"},
    "postgresql": {r"\bSERIAL": "SERIAL PRIMARY KEY", r"\bBOOL\b": "BOOLEAN", r"\bTIME\b": "TIMESTAMP"},
    "both": {r"\bSTRING\b": "VARCHAR(255) NOT NULL", r"ID OF (\w+)": r"INTEGER REFERENCES \1 (id) ON DELETE CASCADE"}}


@pytest.fixture
def old(make_database, answering):
    """The database of a minihub 0.1.0, where ada's server runs: its URL, and the connection of a worker of 0.1.0."""
    url = make_database("template0")
    script = VERSION_1.replace("{target}", answering).replace("{hashed}", minihub.hash_token("hers"))
    for short, long in {**OLD_TYPES[url.partition(":")[0]], **OLD_TYPES["both"]}.items():
        script = re.sub(short, long, script)
    with contextlib.closing(minihub.open_database(url)) as database:
        database.connect()
        for statement in script.split(";"):
            database.execute_sql(statement)
        tables = sorted(database.get_tables())
        columns = {table: [column.name for column in database.get_columns(table)] for table in tables}
        yield types.SimpleNamespace(url=url, database=database, rows=lambda: {
            table: database.execute_sql(f"SELECT {', '.join(names)} FROM {table} ORDER BY 1").fetchall()
            for table, names in columns.items()})


def shape_of(database):
    """The columns and indexes of a database."""
    return {model._meta.table_name: (
        sorted((column.name, column.null) for column in database.get_columns(model._meta.table_name)),
        sorted((index.name, index.unique) for index in database.get_indexes(model._meta.table_name)))
        for model in minihub.MODELS}


def test_a_database_of_version_1_is_upgraded_with_everything_in_it(old, make_hub):
    before = old.rows()
    minihub.Store(old.url).close()
    after = old.rows()
    assert after.pop("settings") == [*before.pop("settings")[:1], ("schema_version", "2")]
    assert after == before and all(before.values())
    with make_hub().store.connected():
        assert shape_of(old.database) == shape_of(minihub.User._meta.database)


def test_a_server_and_a_token_of_version_1_are_good_after_the_upgrade(old, make_hub, spawner):
    spawner.running["first"] = None
    hub = make_hub(database=old.url)
    with hub.store.connected():
        assert hub.servers.observe(server_of(hub)).status == "ready"
        assert hub.tokens.identify("hers").name == "ada"
        minihub.Server.update(status="queued").execute()  # 0.1.0 had a CHECK against statuses that it did not know
        hub.people.find("ada").delete_instance()
        models = (minihub.Server, minihub.OAuthClient, minihub.Membership)
        assert [model.select().count() for model in models] == [1, 0, 0]


def test_a_worker_of_version_1_goes_on_writing_after_the_upgrade(old, make_hub):
    hub = make_hub(database=old.url)
    for statement in WRITES_OF_VERSION_1.split(";"):
        old.database.execute_sql(statement)
    with hub.store.connected():
        eve = hub.people.find("eve")
        assert (eve.display_name, eve.leaving, hub.people.details("eve").groups) == ("", False, ["course"])
        assert hub.people.details("eve").servers[0].status == "spawning"


@pytest.mark.database("sqlite")
def test_a_copy_of_the_database_is_set_aside_before_the_upgrade(old):
    before = old.rows()
    minihub.Store(old.url).close()
    copy = Path(old.database.database + ".version-1")
    assert copy.stat().st_mode & 0o777 == 0o600
    with contextlib.closing(sqlite3.connect(copy)) as database:
        assert {table: database.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall() for table in before} == before


def test_an_upgrade_that_fails_changes_nothing_and_can_be_tried_again(old, monkeypatch):
    def fail(store):
        upgrade(store)
        store.database.execute_sql("nonsense")

    before, upgrade = old.rows(), minihub.Store._upgrade_from_version_1
    monkeypatch.setattr(minihub.Store, "_upgrade_from_version_1", fail)
    with pytest.raises(minihub.SettingError, match="nonsense"):
        minihub.Store(old.url)
    assert (old.rows(), old.database.table_exists("sessions")) == (before, False)
    monkeypatch.undo()
    minihub.Store(old.url).close()
    assert old.database.table_exists("sessions")


def test_workers_that_start_at_the_same_moment_upgrade_once(old, caplog):
    caplog.set_level("INFO")
    in_threads(2, lambda number: minihub.Store(old.url).close())
    assert caplog.text.count("upgraded from") == 1
    minihub.Store(old.url).close()


########################################################################################################
# 5. Authenticators and isolation
########################################################################################################


@pytest.mark.parametrize(("credentials", "name"), [
    ({"username": "ada", "password": password_of("ada")}, "ada"),
    ({"username": "ADA", "password": password_of("ada")}, "ada"),
    ({"username": "ada", "password": password_of("bob")}, None), ({"username": "ada", "password": ""}, None),
    ({"username": "ada"}, None), ({"password": password_of("ada")}, None), ({}, None),
    ({"username": "eve", "password": ""}, None), ({"username": "new", "password": ""}, None),
    ({"username": "../ada", "password": password_of("ada")}, None), ({"username": ["ada"], "password": {}}, None),
    ({"username": "ada\0", "password": "\udcff"}, None)])
def test_a_password_proves_who_a_user_is(opened, credentials, name):
    opened.people.create("new")  # a user who has no password yet
    assert minihub.PasswordAuthenticator().authenticate(credentials, {}) == name


@pytest.mark.parametrize("username", ["ada", "new", "eve", "not/a/name"])
def test_a_wrong_password_takes_as_long_for_every_name(opened, monkeypatch, username):
    rounds, scrypt = [], minihub.hashlib.scrypt
    monkeypatch.setattr(minihub.hashlib, "scrypt", lambda word, **how: rounds.append(how) or scrypt(word, **how))
    opened.people.create("new")
    assert minihub.PasswordAuthenticator().authenticate({"username": username, "password": "wrong"}, {}) is None
    assert [{name: options[name] for name in minihub.SCRYPT} for options in rounds] == [minihub.SCRYPT]
    assert 128 * STRONG_SCRYPT["n"] * STRONG_SCRYPT["r"] * STRONG_SCRYPT["p"] == 16 * 2 ** 20  # bytes per guess


@pytest.mark.parametrize(("credentials", "name"), [
    ({"username": "Eve", "password": "class secret"}, "Eve"), ({"username": "Eve", "password": "class secre"}, None),
    ({"username": "Eve"}, None), ({}, None), ({"username": "Eve", "password": "\udcff"}, None)])
def test_the_dummy_accepts_any_name_with_the_one_password(credentials, name):
    authenticator = minihub.DummyAuthenticator()
    authenticator.settings = Settings(authenticator="dummy", password="class secret")
    assert authenticator.authenticate(credentials, {}) == name


@pytest.fixture
def make_site(make_hub):
    """Makes a hub that trusts the site around it, and a browser of whom that says `{"REMOTE_USER": "ada"}`."""
    def make(environ, **settings):
        hub = make_hub(authenticator="remote-user", **settings)
        return hub, Browser(hub, HTTP_HOST="localhost:80", **environ)

    return make


def greeted_as(site):
    return site.get("/hub/home", status=200).html.h1.text.removeprefix("Hello, ")


@pytest.mark.parametrize("variable", ["REMOTE_USER", "AUTH_USER"])
@pytest.mark.parametrize(("given", "name"), [("Ada", "ada"), ("zo\u00eb", "zo\u00eb"), ("zo\u00c3\u00ab", "zo\u00eb")])
def test_the_sites_user_is_the_hubs(make_site, variable, given, name):
    hub, site = make_site({"REMOTE_USER": "eve", variable: given}, remote_user_variable=variable)
    assert (greeted_as(site), greeted_as(site)) == (name, name)
    with hub.store.connected():
        assert [user.name for user in hub.people.list()[0]] == [name]


@pytest.mark.parametrize("environ", [
    {}, {"REMOTE_USER": ""}, {"HTTP_REMOTE_USER": "root"}, {"HTTP_X_REMOTE_USER": "root"}, {"AUTH_USER": "root"}])
def test_a_visitor_whom_the_site_has_not_signed_in_is_nobody(make_site, environ):
    hub, site = make_site(environ)
    assert urlsplit(site.get("/hub/home", status=302).location).path == "/hub/login"
    site.api("GET", "/user", Referer="http://localhost:80/hub/home", status=403)
    with hub.store.connected():
        assert hub.people.list() == ([], 0)


def test_admins_and_groups_follow_the_site_at_each_visit(make_site):
    facts = {}
    hub, site = make_site({}, identify=lambda environ: ("ada", facts))
    greeted_as(site)
    ada = api_of(hub, "ada")
    for said, admin, groups in (
            ({"admin": True, "groups": ["b", "a"]}, True, ["a", "b"]), ({}, True, ["a", "b"]),
            ({"groups": ["b", "a/b"]}, True, ["b"]), ({"admin": False}, False, ["b"]), ({"groups": []}, False, [])):
        facts.clear()
        facts.update(said)
        greeted_as(site)
        model = ada("GET", "/user").json
        assert (model["admin"], model["groups"]) == (admin, groups)
    with hub.store.connected():
        assert sorted(group.name for group in minihub.Group.select()) == ["a", "b"]


def test_an_admin_of_the_settings_stays_one_whatever_the_site_says(make_site):
    hub, site = make_site({}, identify=lambda environ: ("root", {"admin": False}), admins=["root"])
    assert "People" in site.get("/hub/home", status=200).text


def test_a_visit_that_changes_nothing_writes_nothing(make_site):
    hub, site = make_site({}, identify=lambda environ: ("ada", {"admin": True, "groups": ["a"]}))
    greeted_as(site)
    with hub.store.connected():
        before = hub.store.database.connection().total_changes
        greeted_as(site)
        assert hub.store.database.connection().total_changes == before


def test_the_first_requests_of_a_new_visitor_may_come_all_at_once(make_site):
    hub, _ = make_site({}, identify=lambda environ: ("ada", {"admin": True, "groups": ["a", "b"]}))
    assert in_threads(8, lambda number: Browser(hub).get("/hub/home", status="*").status_int) == [200] * 8
    assert [user["groups"] for user in api_of(hub, "ada")("GET", "/users").json] == [["a", "b"]]


@pytest.mark.parametrize(("identify", "status", "message"), [
    (lambda environ: ("a/b", {}), 400, "Invalid username: a/b"), (lambda environ: 1 / 0, 500, "Internal Server Error")])
def test_a_visitor_is_told_of_an_invalid_name_and_of_no_details_of_a_failure(make_site, identify, status, message):
    _, site = make_site({}, identify=identify)
    assert site.get("/hub/home", status=status).html.find(role="alert").text == message


def test_where_the_site_signs_people_in_the_hub_has_no_form(make_site):
    _, site = make_site({})
    page = site.get("/hub/login", status=200)
    assert not page.forms and "Sign in at the site that this hub is a part of" in page.text
    assert not site.post("/hub/login", {"username": "root", "password": "x"}, status=200).forms
    site.post_json("/hub/api/authorizations/token", {"username": "root", "password": "x"}, status=403)


@pytest.mark.parametrize(("login_url", "location"), [
    ("/login", "/login?next=%2Fhub%2Ftoken"),
    ("https://sso.example/?a=b", "https://sso.example/?a=b&next=%2Fhub%2Ftoken")])
def test_the_sites_login_page_is_told_the_way_back(make_site, login_url, location):
    _, site = make_site({}, login_url=login_url)
    assert site.get("/hub/token", status=302).follow(status=302).location == location


def test_a_cookie_of_the_hubs_does_not_outlive_the_sites_sign_in(hub, browser, make_hub):
    site = make_hub(database=hub.settings.database, authenticator="remote-user")
    same = Browser(site)
    same.app.cookiejar = browser.app.cookiejar
    assert (browser.is_signed_in(), same.is_signed_in()) == (True, False)


def test_without_a_logout_url_the_hub_asks_to_sign_out_at_the_site(make_site):
    _, site = make_site({"REMOTE_USER": "ada"})
    assert "sign out there, too" in " ".join(site.get("/hub/logout", status=200).html.main.text.split())


def test_signing_out_ends_the_tokens_of_the_session_and_leads_to_the_site(make_site):
    hub, site = make_site({"REMOTE_USER": "ada"}, logout_url="/goodbye")
    page = site.get("/hub/home", status=200)
    token = token_for(hub, "ada", session_id=site.cookies["jupyterhub-session-id"])
    with hub.store.connected():
        assert page.forms and hub.tokens.identify(token)
        assert site.get("/hub/logout", status=302).location == "/goodbye"
        assert hub.tokens.identify(token) is None


@pytest.mark.parametrize(("headers", "status"), [
    ({}, 403), ({"Referer": "http://evil.example/hub/home"}, 403), ({"Referer": "http://localhost:80/user/bob/"}, 403),
    ({"Referer": "http://localhost:80/hub/home"}, 200)])
def test_only_the_hubs_pages_read_the_api_for_a_site_user(make_site, headers, status):
    _, site = make_site({"REMOTE_USER": "ada"})
    site.api("GET", "/user", status, **headers)


@pytest.mark.parametrize(("is_right", "status"), [(True, 201), (False, 403)])
def test_only_the_hubs_pages_write_to_the_api_for_a_site_user(make_site, is_right, status):
    _, site = make_site({"REMOTE_USER": "ada"})
    headers = {"X-XSRFToken": site.xsrf if is_right else "x", "Referer": "http://localhost:80/hub/home"}
    site.api("POST", "/users/ada/tokens", status, **headers)


def test_the_people_page_has_no_sign_in_links_where_the_site_signs_people_in(make_site):
    hub, site = make_site({}, identify=lambda environ: ("root", {"admin": True}))
    form = next(form for form in site.get("/hub/admin").forms.values() if "names" in form.fields)
    form["names"] = "ada"
    page = form.submit(status=200)
    assert "Added" in page.text and "ink" not in page.html.main.text
    with hub.store.connected(), pytest.raises(minihub.BadRequest, match="People sign in at the site"):
        hub.sign_in.link_for(hub.people.find("ada"))


def test_an_old_sign_in_link_is_invalid_where_the_site_signs_people_in(hub, make_hub):
    with hub.store.connected():
        path = urlsplit(hub.sign_in.link_for(hub.people.find("ada"))).path
    page = Browser(make_hub(database=hub.settings.database, authenticator="remote-user")).get(path, status=400)
    assert "People sign in at the site that this hub is a part of" in page.html.find(role="alert").text


HUB_ACCOUNT = 59999  # the system user of the hubs that are not root's, and nobody else's
STUDENTS = 70000
RIGHTS = "-all,+setuid,+setgid,+setpcap,+chown,+kill"  # those of the README's systemd unit

#: How a hub is started whose servers are kept apart, and the isolation that it then finds to be the best.
AS_ORDINARY_USER = ["setpriv", f"--reuid={HUB_ACCOUNT}", f"--regid={HUB_ACCOUNT}", "--clear-groups"]
WITH_CAPABILITIES = [*AS_ORDINARY_USER, f"--inh-caps={RIGHTS}", f"--ambient-caps={RIGHTS}", f"--bounding-set={RIGHTS}"]
WAYS = {"root": ([], "uid"), "capabilities": (WITH_CAPABILITIES, "uid"), "sandbox": (AS_ORDINARY_USER, "bubblewrap")}

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="run the tests as root")


@pytest.fixture
def open_folder():
    """A folder where all users may pass, unlike tmp_path."""
    with tempfile.TemporaryDirectory(prefix="minihub-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def chosen(folder, **settings):
    """The isolation that a hub in this folder would choose."""
    return minihub.choose_isolation(Settings(**{"cmd": "/bin/sh", "homes": f"{folder}/homes",
                                                "run_dir": f"{folder}/run", **settings}))


@needs_root
def test_the_best_isolation_that_works_is_chosen_by_trying_it(open_folder):
    isolation = chosen(open_folder)
    assert (isolation.name, isolation.notice) == (
        "uid", "isolation: uid. Each user's servers run as a system account of the user's own")
    assert [path.name for path in open_folder.rglob("*")] == ["homes", ".run", "70000"]


@needs_root
@pytest.mark.parametrize("spoil, settings, reason", [
    (lambda folder, patch: folder.chmod(0o700), {}, "{folder} is closed to the users' accounts (chmod o+x {folder})"),
    (lambda folder, patch: None, {"cmd": "{folder}/closed/program"},
     "the users' accounts cannot run {folder}/closed/python: {folder}/closed is closed to them (chmod o+x, or install"),
    (lambda folder, patch: patch.setattr(minihub, "is_mapped", lambda number: number < 65536), {},
     "this container has no account 70001: set first_uid to a number that is in /proc/self/uid_map and in"),
    (lambda folder, patch: None, {"first_uid": 65534}, "the account 65534 is in use: set first_uid to a number of"),
    (lambda folder, patch: patch.setattr(minihub, "tool", {"prlimit": "/bin/prlimit"}.get), {},
     "setpriv is missing: install util-linux"),
    (lambda folder, patch: patch.setattr(minihub.os, "chown", refuse_chown), {},
     "[Errno 1] Operation not permitted. If the homes are on NFS: export them with no_root_squash, or keep them on a"),
    (lambda folder, patch: None, {"homes": "{folder}/" + "x" * 40}, "homes must be a path of at most 40 characters"),
    (lambda folder, patch: None, {"open_file_limit": 2 ** 40}, "prlimit: failed to set the NOFILE resource limit")])
def test_where_accounts_do_not_work_the_start_says_what_to_do(open_folder, monkeypatch, spoil, settings, reason):
    (open_folder / "closed").mkdir(mode=0o700)
    (open_folder / "closed" / "program").write_text(f"#!{open_folder}/closed/python\n")
    (open_folder / "closed" / "program").chmod(0o755)
    settings = {name: value.format(folder=open_folder) if isinstance(value, str) else value
                for name, value in settings.items()}
    spoil(open_folder, monkeypatch)
    reason = reason.format(folder=open_folder)
    with pytest.raises(minihub.SettingError, match="^isolation: must be possible on this machine. uid is not possible: "
                       + re.escape(reason)):
        chosen(open_folder, isolation="uid", **settings)
    if "open_file_limit" not in settings:
        isolation = chosen(open_folder, **settings)
        assert isolation.name == "none" and f". uid is not possible: {reason}" in isolation.notice


def refuse_chown(*args, **options):
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.parametrize("settings, problem", [
    ({"isolation": "chroot"}, "isolation: must be auto, uid, bubblewrap or none (got 'chroot')"),
    ({"mem_limit": "much"}, "mem_limit: must be a number with K, M, G or T behind it (got 'much')"),
    ({"mem_limit": "2"}, "mem_limit: must be a number with K, M, G or T behind it (got '2')"),
    ({"cpu_priority": 20}, "cpu_priority: must be 0 to 19 (got 20)"),
    ({"isolation": "none", "process_limit": 9, "spawner": "subprocess"},
     "isolation: must be possible on this machine. none is not possible: process_limit needs isolation uid or"
     " bubblewrap (got 'none')")])
def test_a_limit_that_cannot_be_kept_stops_the_hub(make_hub, settings, problem):
    with pytest.raises(minihub.SettingError) as raised:
        make_hub(**settings)
    assert str(raised.value) == problem


@pytest.mark.parametrize("size, count", [
    ("", 0), ("512M", 2 ** 29), ("1.5g", 3 * 2 ** 29), ("4K", 4096), ("1T", 2 ** 40)])
def test_a_size_is_read(size, count):
    assert minihub.bytes_of(size) == count


@pytest.mark.parametrize("path, value, remedy", [
    ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1", "AppArmor forbids it, as in Ubuntu 24.04. Give"),
    ("/proc/sys/kernel/unprivileged_userns_clone", "0", "Allow it: sysctl kernel.unprivileged_userns_clone=1"),
    ("/proc/sys/user/max_user_namespaces", "0", "Allow it: sysctl user.max_user_namespaces=15000"),
    ("/nowhere", "", "In Docker: --security-opt seccomp=unconfined --security-opt systempaths=unconfined")])
def test_where_sandboxes_are_forbidden_the_remedy_is_named(monkeypatch, tmp_path, path, value, remedy):
    files = {path: value, "/proc/sys/user/max_user_namespaces": "9", **{path: value}}
    monkeypatch.setattr(minihub.Path, "read_text", lambda self: files.get(str(self), "?"))
    isolation = minihub.BubblewrapIsolation(Settings(isolation="bubblewrap"))
    said = "bwrap: setting up uid map: Permission denied"
    assert isolation._remedy(said).startswith(f"{said}. {remedy}")


@needs_root
def test_an_account_that_somebody_has_is_not_given(open_folder, monkeypatch):
    isolation = minihub.UidIsolation(Settings(first_uid=61200, homes=f"{open_folder}/homes"))
    assert isolation.free_uid(0) == 65536
    (open_folder / "homes").mkdir()
    (open_folder / "homes" / "old").mkdir()
    os.chown(open_folder / "homes" / "old", 65537, 65537)
    monkeypatch.setattr(minihub, "is_account", lambda number: number == 65536)
    assert isolation.free_uid(0) == 65538
    monkeypatch.setattr(minihub, "is_mapped", lambda number: number < 65536)
    with pytest.raises(RuntimeError, match="There are no more accounts for users: 65538 is none in this container"):
        isolation.free_uid(65538)


@pytest.mark.parametrize("name, login", [
    ("ada", "ada"), ("ada@school.example", "ada_school.example"), ("9b", "_9b"), ("-x", "_-x"), ("ünï 名", "_n___")])
def test_a_login_name_is_a_short_word(name, login):
    isolation = minihub.UidIsolation(Settings())
    assert isolation.login_name(minihub.User(name=name)) == login
    assert len(isolation.login_name(minihub.User(name="x" * 200))) == 32


@needs_root
def test_a_program_that_may_ask_nobody_who_comes_is_refused_where_users_are_kept_apart(processes, open_folder):
    folders = {"homes": f"{open_folder}/homes", "run_dir": f"{open_folder}/run"}
    spawner, launch = processes("sleep 60 {port}", isolation="uid", **folders), launch_of()
    launch.user.uid = 70001
    with pytest.raises(RuntimeError, match="^sleep may not ask visitors who they are, and every user's programs can"):
        spawner.start(launch)
    assert not (open_folder / "homes" / "ada").exists()


@needs_root
def test_a_home_of_another_account_is_not_handed_over(processes, open_folder):
    folders = {"homes": f"{open_folder}/homes", "run_dir": f"{open_folder}/run"}
    spawner, launch = processes("sleep 60 {port}", isolation="uid", cmd_has_sign_in=True, **folders), launch_of()
    launch.user.uid = 70001
    home = spawner.home(launch)
    home.mkdir(parents=True)
    os.chown(home, 70009, 70009)
    with pytest.raises(RuntimeError, match="belongs to the account 70009, not to ada's own, 70001. If it is ada's"):
        spawner.start(launch)


UNIT = re.search(r"```ini\n(.*?)```", README, re.DOTALL)[1]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="apt-get install systemd")
def test_the_readmes_systemd_unit_is_valid(tmp_path):
    unit = tmp_path / "minihub.service"
    program = "/srv/minihub/.venv/bin/gunicorn"
    assert program in UNIT
    unit.write_text(UNIT.replace(program, "/bin/true").replace("User=minihub", "User=daemon"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "minihub" in line]) == (0, [])


def test_the_readmes_systemd_unit_has_the_capabilities_of_the_tests_and_no_more():
    rights = {f"CAP_{name[1:].upper()}" for name in RIGHTS.split(",")[1:]}
    lines = dict(line.split("=", 1) for line in UNIT.splitlines() if "=" in line and "Environment" not in line)
    assert set(lines["AmbientCapabilities"].split()) == set(lines["CapabilityBoundingSet"].split()) == rights


@needs_root
def test_a_service_of_another_user_has_that_users_groups_and_no_capability():
    words = minihub.as_system_user("nobody")
    status = subprocess.run([*words, "cat", "/proc/self/status"], capture_output=True, text=True, check=True).stdout
    fields = dict(re.findall(r"(\w+):[ \t]*(.*)", status))
    assert [fields[name].split() for name in ("Uid", "Gid", "Groups")] == [["65534"] * 4, ["65534"] * 4, ["65534"]]
    assert [fields[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Amb")] == ["0" * 16] * 4
    with pytest.raises(KeyError):
        minihub.as_system_user("no such user")


########################################################################################################
# 6. Spawners
########################################################################################################


@pytest.fixture
def processes(tmp_path):
    """Makes SubprocessSpawners, all of whose processes are gone afterwards: `processes("sleep 60")`."""
    def make(cmd, **settings):
        spawner, folders = minihub.SubprocessSpawner(), {"homes": f"{tmp_path}/homes", "run_dir": f"{tmp_path}/run"}
        spawner.settings = Settings(**{"cmd": cmd, "isolation": "none", **folders, **settings})
        return spawner

    yield make
    for supervisor in (tmp_path / "run").glob("*/*.pid"):
        with contextlib.suppress(OSError, IndexError):  # one that has not written its id yet
            os.killpg(int(supervisor.read_text().split()[0]), signal.SIGKILL)


def launch_of(name="ada", server_name="", options=None, port=12345, **variables):
    """A Launch as a hub makes it."""
    user = minihub.User(name=name, folder=minihub.folder_name(name))
    prefix = minihub.Mount("/", "").server_prefix(name, server_name)
    return minihub.Launch(minihub.new_token(), user, server_name, options, prefix, port, variables)


def script(folder, *lines):
    """The path of a new shell script."""
    path = folder / f"script-{minihub.new_token()}"
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o700)
    return str(path)


def ends_with(spawner, state):
    """The exit status of a process that is about to end."""
    return wait_for(lambda: [spawner.poll(state)] if spawner.poll(state) is not None else None)[0]


def test_a_server_has_the_hubs_variables_its_own_and_a_home(processes, monkeypatch):
    for name in list(os.environ):
        monkeypatch.delenv(name)
    for name, value in {"LANG": "C.UTF-8", "COURSE": "algebra", "HOME": "/root", "PGPASSWORD": "x",
                        "JUPYTERHUB_API_TOKEN": "stale"}.items():
        monkeypatch.setenv(name, value)
    spawner = processes("server", env_keep=["COURSE", "JUPYTERHUB_API_TOKEN"])
    assert spawner.environment(launch_of("a@b c", "n1", JUPYTERHUB_API_TOKEN="5ec4e7")) == {
        "LANG": "C.UTF-8", "COURSE": "algebra", "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.defpath]),
        "HOME": f"{spawner.settings.homes}/a@b c", "USER": "a@b c", "LOGNAME": "a@b c",
        "JUPYTERHUB_API_TOKEN": "5ec4e7", "JUPYTERHUB_SERVICE_URL": "http://127.0.0.1:12345/user/a@b%20c/n1/"}


@pytest.mark.parametrize("cmd, words", [
    ("server", ["server", "--port=12345"]), ("server -p {port}", ["server", "-p", "12345"]),
    ("server '{username} &' {prefix}", ["server", "a'b; {port} &", "/user/a%27b%3B%20%7Bport%7D/", "--port=12345"]),
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
def test_the_notebook_folder_is_relative_to_the_home(processes, notebook_dir, folder):
    spawner = processes("server", notebook_dir=notebook_dir, default_url="/tree")
    variables = spawner.environment(launch_of("~root"))
    assert variables["JUPYTERHUB_ROOT_DIR"] == folder.replace("HOME", str(spawner.home(launch_of("~root"))))
    assert variables["JUPYTERHUB_DEFAULT_URL"] == "/tree"


@pytest.mark.parametrize("name", ["ada", "ünï名", *ODD_NAMES], ids=itertools.count())
def test_a_home_is_private_and_safe_for_every_valid_name(processes, tmp_path, name):
    spawner, launch = processes(script(tmp_path, r'printf "%s\n" "$HOME" "$(pwd)" "$USER"')), launch_of(name)
    state = spawner.start(launch)
    assert minihub.is_valid_name(name) and ends_with(spawner, state) == 0
    home = spawner.home(launch)
    assert spawner.log_tail(state).splitlines() == [str(home), str(home), name]
    assert home.resolve().parent == tmp_path / "homes" and home.stat().st_mode & 0o777 == 0o700


def test_a_new_user_does_not_inherit_the_home_of_a_deleted_one(processes, tmp_path):
    spawner, user = processes("touch essay-{port}"), launch_of().user
    spawner.forget_user(user)  # who has no home yet
    for port in (1, 2):
        ends_with(spawner, spawner.start(launch_of(port=port)))
        assert [file.name for file in (tmp_path / "homes" / "ada").iterdir()] == [f"essay-{port}"]
        spawner.forget_user(user)
        spawner.forget_user(user)  # idempotent
    essays = sorted(str(file.relative_to(tmp_path / "homes")) for file in tmp_path.glob("homes/*/*"))
    assert essays == [Like(r"ada#deleted-\d{8}-[0-9a-f]{4}/essay-\d")] * 2


def test_forgetting_a_user_whose_home_is_a_link_leaves_its_target_alone(processes, tmp_path):
    target, homes = tmp_path / "target", tmp_path / "homes"
    target.mkdir()
    homes.mkdir()
    (homes / "ada").symlink_to(target)
    processes("server").forget_user(launch_of().user)
    assert [home.readlink() for home in homes.iterdir()] == [target] and target.is_dir()


def test_a_log_is_private_and_no_secret_is_on_a_command_line(processes):
    spawner = processes("sleep 60 {port}")
    state = spawner.start(launch_of(JUPYTERHUB_API_TOKEN="5ec4e7"))
    log_file = Path(state["run"].rpartition("@")[0] + ".log")
    assert log_file.stat().st_mode & 0o777 == 0o600 and log_file.parent.stat().st_mode & 0o777 == 0o700
    line = wait_for(Path(f"/proc/{state['pid']}/cmdline").read_bytes)  # empty for a moment, until the exec is done
    assert b"sleep" in line and b"5ec4e7" not in line


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


def test_the_tail_of_a_log_is_short_and_valid_text(processes, tmp_path):
    spawner = processes(script(tmp_path, "seq 100000", r"printf '\377\n'"))
    state = spawner.start(launch_of())
    ends_with(spawner, state)
    assert spawner.log_tail(state).splitlines() == [*map(str, range(99972, 100001)), "\ufffd"]


def test_a_server_has_a_session_of_its_own(processes):
    pid = processes("sleep 60 {port}").start(launch_of())["pid"]
    assert os.getsid(pid) == os.getpgid(pid) == pid != os.getsid(0)


@pytest.mark.parametrize("line, status", [
    ("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", -15), ("kill -KILL $$", -9), ("no-such-command", 127)])
def test_every_worker_can_read_the_exit_status(processes, tmp_path, line, status):
    cmd = script(tmp_path, line)
    state = processes(cmd).start(launch_of())
    assert ends_with(processes(cmd), json.loads(json.dumps(state))) == status


def test_child_processes_end_with_the_server_and_none_stays_a_zombie(processes, tmp_path):
    spawner = processes(script(tmp_path, "sleep 60 &", "echo $!", "exit 3"))
    state = spawner.start(launch_of())
    assert ends_with(spawner, state) == 3
    child = int(spawner.log_tail(state))
    wait_for(lambda: not Path(f"/proc/{state['pid']}").exists(), message="a zombie stays")
    wait_for(lambda: minihub.process_identity(child) is None, message="its child lives on")


#: Logs the signals it gets, and ends at the first one or ignores them.
SIGNALLED = '''
import os, signal, subprocess, sys, time
def heard(number, frame):
    print(signal.Signals(number).name, flush=True)
    if sys.argv[1] == "polite":
        os._exit(0)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, heard)
subprocess.Popen([sys.executable, "-c", "import signal; signal.signal(2, signal.SIG_IGN);"
                  "signal.signal(15, signal.SIG_IGN); print('ready', flush=True); signal.pause()"])
while True:
    time.sleep(60)
'''


@pytest.mark.parametrize("manners, signals, status", [
    ("polite", ["SIGINT"], 0), ("stubborn", ["SIGINT", "SIGTERM"], -9)])
def test_a_stop_escalates_until_the_whole_process_group_is_gone(processes, tmp_path, manners, signals, status):
    (tmp_path / "server.py").write_text(SIGNALLED)
    spawner = processes(f"{sys.executable} {tmp_path / 'server.py'} {manners}")
    spawner.ladder = ((0, signal.SIGINT), (0.3, signal.SIGTERM), (0.6, signal.SIGKILL))
    state = spawner.start(launch_of())
    wait_for(lambda: "ready" in spawner.log_tail(state))

    def is_stopped():
        nonlocal state
        if spawner.poll(state) is None:
            state = json.loads(json.dumps(spawner.stop(state)))
        return spawner.poll(state) is not None

    wait_for(is_stopped)
    assert spawner.log_tail(state).splitlines() == ["ready", *signals]
    assert spawner.poll(state) == status
    wait_for(lambda: subprocess.run(["pgrep", "-g", str(state["pid"])]).returncode == 1, message="a child lives on")


def test_signals_blocked_in_the_starting_thread_reach_the_server(processes, tmp_path, monkeypatch):
    monkeypatch.setattr(minihub, "PREPARE", minihub.PREPARE.replace("/bin/sh", "/bin/bash"))  # /bin/sh may unblock them
    (tmp_path / "server.py").write_text(SIGNALLED)
    spawner = processes(f"{sys.executable} {tmp_path / 'server.py'} polite")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        state = spawner.start(launch_of())
        assert {signal.SIGINT, signal.SIGTERM} <= signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    wait_for(lambda: "ready" in spawner.log_tail(state))
    assert ends_with(spawner, spawner.stop(state)) == 0


@pytest.mark.parametrize("identity", ["another boot:12345", None])
def test_a_reused_process_id_is_never_signalled(processes, identity):
    spawner = processes("sleep 60 {port}")
    stranger = spawner.start(launch_of())
    stale = {**stranger, "identity": identity, "run": "/nowhere/server@1"}
    assert spawner.poll(stale) == -9
    spawner.stop(spawner.stop(stale, now=True))
    assert spawner.poll(stranger) is None


def test_a_process_is_identified_by_boot_and_start_time():
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with subprocess.Popen(["sleep", "60"]) as process:
        identity = minihub.process_identity(process.pid)
        assert re.fullmatch(rf"{boot}:\d+", identity) and identity != minihub.process_identity(os.getpid())
        process.kill()
        wait_for(lambda: minihub.process_identity(process.pid) is None, message="a zombie counts as alive")


def test_an_interrupted_start_is_found_again(processes):
    spawner, launch = processes("sleep 60 {port}"), launch_of()
    assert spawner.find(launch) is None
    state = spawner.start(launch)
    assert wait_for(lambda: spawner.find(launch)) == state and spawner.find(launch_of()) is None


def test_an_interrupted_start_whose_process_has_ended_is_not_found(processes, tmp_path):
    spawner, launch = processes(script(tmp_path, "exit 5")), launch_of()
    ends_with(spawner, spawner.start(launch))
    assert spawner.find(launch) is None


@pytest.mark.parametrize("content", ["", "x http://127.0.0.1:1", "0 http://127.0.0.1:1", "-1 http://127.0.0.1:1",
                                     "1 http://127.0.0.1:1", "9" * 30 + " http://127.0.0.1:1", "1 2 3", "\0", None])
def test_a_process_id_that_a_student_has_forged_is_not_believed(processes, tmp_path, content):
    spawner = processes("sleep 60 {port}", run_dir=str(tmp_path / "forged"))  # where the fixture will not clean up
    launch = launch_of()
    path = Path(spawner.settings.run_dir, "ada", f"server@{launch.id}.pid")
    path.parent.mkdir(parents=True)
    path.mkdir() if content is None else path.write_text(content)
    assert spawner.find(launch) is None


@pytest.mark.parametrize("make", [lambda path: path.write_text("x"), lambda path: path.mkdir(), lambda path: None])
def test_with_now_a_server_is_killed_at_once_which_needs_no_readable_exit_status(processes, make):
    spawner, launch = processes("sleep 60 {port}"), launch_of()
    state = spawner.start(launch)
    make(Path(f"{state['run']}.exit"))
    spawner.stop(state, now=True)
    assert ends_with(spawner, state) == -9


def test_a_server_that_ends_early_fails_its_start_with_the_end_of_its_log(make_hub, tmp_path):
    cmd = script(tmp_path, "echo ImportError: no antigravity >&2", "exit 7")
    hub = people(make_hub(spawner="subprocess", cmd=cmd, start_timeout=3600))
    ada = api_of(hub, "ada")
    failure = "The server ended while it started [status=7]. Its last words:\nImportError: no antigravity"
    with hub.store.connected():
        server = server_of(hub)
        hub.servers.start(server)
        wait_for(lambda: hub.servers.observe(server).failure == failure)
    event = json.loads(ada("GET", "/users/ada/server/progress").text.removeprefix("data: "))
    assert (event["progress"], event["failed"]) == (100, True) and failure in event["message"]
    assert ada("GET", "/users/ada").json["servers"] == {}


@pytest.mark.parametrize("line", ["OSError: [Errno 98] Address already in use", "listen EADDRINUSE: 127.0.0.1:{port}",
                                  "ERROR: the port {port} is already in use"])
def test_a_server_whose_port_has_been_taken_gets_another(make_hub, tmp_path, line):
    cmd = script(tmp_path, "echo $1 >>ports", "if [ -e tried ]; then", f"exec {sys.executable} -m http.server "
                 '--bind 127.0.0.1 "$1"', "fi", "touch tried", f'echo "{line}"; exit 1')
    hub = people(make_hub(spawner="subprocess", cmd=cmd + " {port}"))
    with hub.store.connected():
        server = server_of(hub)
        hub.servers.start(server)
        wait_for(lambda: hub.servers.observe(server).status == "ready")
        minihub.SubprocessSpawner().stop(server.state, now=True)
    ports = (tmp_path / "homes" / "ada" / "ports").read_text().split()
    assert (len(set(ports)), server.attempts, server.target) == (2, 2, f"http://127.0.0.1:{ports[1]}")


def test_the_shipped_ladder_of_signals_ends_in_a_kill(processes, tmp_path, monkeypatch):
    (tmp_path / "server.py").write_text(SIGNALLED)
    spawner = processes(f"{sys.executable} {tmp_path / 'server.py'} stubborn")
    state, monotonic = spawner.start(launch_of()), time.monotonic
    wait_for(lambda: "ready" in spawner.log_tail(state))
    for passed in (0, 6, 11):
        monkeypatch.setattr(minihub.time, "monotonic", lambda: monotonic() + passed)
        state = spawner.stop(state)
    assert ends_with(spawner, state) == -9


def test_a_stop_escalates_whatever_clock_its_beginning_was_noted_by(processes, tmp_path):
    (tmp_path / "server.py").write_text(SIGNALLED)
    spawner = processes(f"{sys.executable} {tmp_path / 'server.py'} polite")
    state = {**spawner.start(launch_of()), "asked_to_stop": time.time() + 7200}  # as 0.1.0 did
    wait_for(lambda: "ready" in spawner.log_tail(state))
    assert ends_with(spawner, spawner.stop(state)) == 0


#: A spawner for whose processes a minute takes three seconds, as every other wait for somebody else is shorter.
HASTY_SPAWNER = """
import minihub
from minihub import SubprocessSpawner as Spawner

minihub.SUPERVISE = minihub.SUPERVISE.replace("sleep 5", "sleep .25").replace("sleep 10", "sleep 1")
minihub.SQLITE_WAIT = 1
"""
#: A command that does not mind SIGTERM.
STUBBORN = [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"]


def start_hasty(live, folder, *options, **settings):
    """A gunicorn with that spawner, where ada's server and the service `idle` run, and the process ids of the two."""
    (folder / "hasty.py").write_text(HASTY_SPAWNER)
    services = json.dumps([{"name": "idle", "command": STUBBORN}])
    hub = start_mocked(live, folder, *options, **{"spawner": "hasty:Spawner", "services": services, **settings})
    hub.start_server("ada", hub.token)
    return hub, [pid_of(hub), wait_for(lambda: hub.api("GET", "/services/idle", hub.token)[1]["pid"])]


def are_running(pids):
    return [minihub.process_identity(pid) is not None for pid in pids]


@pytest.mark.parametrize("options", [["-w", "2"], ["--threads", "4"]], ids=" ".join)
def test_servers_and_services_end_with_the_hub_and_not_with_its_database(live, tmp_path, options):
    hub, pids = start_hasty(live, tmp_path, *options, stop_with_hub="yes")
    with contextlib.closing(sqlite3.connect(tmp_path / "minihub.sqlite", isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        end = time.monotonic() + 7  # two of their minutes
        while time.monotonic() < end:
            os.utime(tmp_path / "run" / "heartbeat", (0, 0))  # as when the machine has slept, or the clock was set
            time.sleep(0.7)
            assert are_running(pids) == [True, True]
    kill_all(hub)
    wait_for(lambda: are_running(pids) == [False, False])


@functools.cache
def obstacle(way):
    """Why servers cannot be kept apart in this way on the machine that runs the tests, "" if they can."""
    if os.geteuid():
        return "run the tests as root"
    if way == "sandbox" and not shutil.which("bwrap"):
        return "apt-get install bubblewrap"
    script = 'test -r "$1" && "$0" -c ""'  # by a shell: setpriv itself still has its rights when it runs that
    words = [*AS_ORDINARY_USER, "sh", "-c", script, sys.executable, f"{HERE}/minihub.py"]
    if subprocess.run(words, capture_output=True, cwd="/").returncode:
        return f"let ordinary users read {sys.executable} and {HERE}"
    sandbox = [*AS_ORDINARY_USER, "bwrap", "--unshare-user", "--unshare-pid", "--ro-bind", "/", "/", "--proc", "/proc"]
    if way == "sandbox" and subprocess.run([*sandbox, "true"], capture_output=True).returncode:
        return "this machine forbids user namespaces"
    return ""


#: A server that runs what it gets, as a terminal would: `POST` with a shell script.
SHELL_SERVER = """
import http.server, json, os, subprocess, sys
os.dup2(1, 9)
class Shell(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        script = self.rfile.read(int(self.headers["Content-Length"]))
        done = subprocess.run(["/bin/sh"], input=script, capture_output=True, timeout=60, pass_fds=[9])
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps([done.returncode, (done.stdout + done.stderr).decode(errors="replace")]).encode())
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Shell).serve_forever()
"""


class ApartHub(LiveHub):
    """A gunicorn whose servers are kept apart, in a folder that is its own."""

    def __init__(self, folder, way, *options, **settings):
        shell = f"{sys.executable} -c {shlex.quote(SHELL_SERVER)} {{port}}"
        super().__init__(folder, *options, **{"isolation": "auto", "admins": "root", "cmd": shell,
                                              "cmd_has_sign_in": "yes", **settings})
        self.prefix_words, self.kind = WAYS[way]
        self.tokens = {}
        folder.chmod(0o711)
        self.log.touch(0o600)
        if self.prefix_words:
            os.chown(self.log, HUB_ACCOUNT, HUB_ACCOUNT)
            os.chown(folder, HUB_ACCOUNT, HUB_ACCOUNT)

    @property
    def words(self):
        return [*self.prefix_words, *super().words]

    def command(self, *words):
        return subprocess.run([*self.prefix_words, sys.executable, "-m", "minihub", *words], cwd=self.folder, text=True,
                              env=self.environ, check=True, capture_output=True).stdout.strip()

    def admit(self, name, server=""):
        """Start a server of a user, who is new at the first."""
        if name not in self.tokens:
            self.command("link", name)
            self.tokens[name] = self.command("token", name)
        self.start_server(name, self.tokens[name], f"servers/{server}" if server else "server")

    def run(self, name, script, server=""):
        """The exit status and the output of a script that a student runs in a terminal."""
        path = f"/user/{name}/{server}/" if server else f"/user/{name}/"
        answer = self.request("POST", path, script, {"Authorization": f"token {self.tokens[name]}"})
        assert answer.status == 200, answer.body
        return json.loads(answer.body)

    def account(self, name):
        """The user's numeric account, None for one who has none."""
        return self.rows(f"SELECT uid FROM users WHERE name = '{name}'")[0]

    def state(self, name, server=""):
        """What the hub knows of a server's process."""
        return json.loads(self.rows("SELECT servers.state FROM servers JOIN users ON users.id = user_id"
                                    f" WHERE users.name = '{name}' AND servers.name = '{server}'")[0])

    def stop_server(self, name, server=""):
        """Stop a server, and wait until it has ended."""
        self.api("DELETE", f"/users/{name}/{f'servers/{server}' if server else 'server'}", self.tokens[name])
        wait_for(lambda: server not in self.api("GET", f"/users/{name}", self.tokens[name])[1]["servers"], 30,
                 "it does not stop")


@contextlib.contextmanager
def starting_apart(way):
    """Starts hubs, one after the other in the same folder, whose servers are kept apart in this way."""
    if problem := obstacle(way):
        pytest.skip(f"{NOT_HERE}: {problem}")
    hubs = []

    def start(*options, **settings):
        hubs.append(ApartHub(Path(folder), way, *options, **settings))
        return hubs[-1].start()

    with tempfile.TemporaryDirectory(prefix="minihub-") as folder:  # where others may pass, unlike tmp_path
        yield start
        for hub in hubs:
            hub.stop_all()
        for pid in processes_of(*STUDENT_ACCOUNTS, HUB_ACCOUNT):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(params=WAYS, scope="module")
def apart(request):
    """A hub whose servers are kept apart, the same one for all tests; each has users of its own."""
    with starting_apart(request.param) as start:
        yield start(stop_with_hub="yes")


STUDENT_ACCOUNTS = range(STUDENTS + 1, STUDENTS + 10)


def processes_of(*accounts):
    """The processes of these accounts."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{pid}").st_uid in accounts and minihub.process_identity(pid):
                found.append(pid)
    return found


def marked(word):
    """The processes with that word on their command line."""
    found = subprocess.run(["pgrep", "-f", word], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split() if minihub.process_identity(int(pid))]


#: What a student tries, each of which must fail; {bob}, {hub} and {guard}, her own supervisor, are process ids.
ATTACKS = {
    "read a neighbour's file": "cat {folder}/homes/bob/diary", "list a neighbour's home": "ls {folder}/homes/bob",
    "write there": "echo x >>{folder}/homes/bob/diary", "make a file there": "touch {folder}/homes/bob/new",
    "list the homes": "ls {folder}/homes | grep .bob", "replace her home": "mv {folder}/homes/ada {folder}/homes/eve",
    "read the database": "cat {folder}/minihub.sqlite",
    "write the database": "dd if=/dev/null conv=nocreat of={folder}/minihub.sqlite",
    "read the hub's log": "cat {folder}/hub.log", "see the logs": "ls {folder}/run/ada",
    "forge an exit status": "echo 0 >{folder}/run/ada/server@1.exit",
    "touch the heartbeat": "touch {folder}/run/heartbeat",
    "signal the neighbour": "kill -0 {bob}", "signal the hub": "kill -0 {hub}",
    "signal her supervisor": "kill -0 {guard}", "kill her supervisor": "kill -KILL {guard}",
    "read the neighbour's environment": "cat /proc/{bob}/environ", "read the hub's": "cat /proc/{hub}/environ",
    "read her supervisor's": "cat /proc/{guard}/environ", "see the neighbour's files": "ls /proc/{bob}/fd/",
    "read the neighbour's memory": "head -c 1 /proc/{bob}/mem", "go home by the neighbour": "ls /proc/{bob}/root/",
    "trace the neighbour": '{python} -c "import ctypes; exit(ctypes.CDLL(None).ptrace(16, {bob}, 0, 0) != 0)"',
    "become root": "setpriv --reuid=0 true", "become the neighbour": "setpriv --reuid={neighbour} true",
    "raise a limit": "prlimit --nofile=1000000:1000000 true",
}


def test_a_student_with_a_terminal_gets_at_nothing_of_a_neighbour_or_the_hub(apart):
    hub = apart
    for name in ("ada", "bob"):
        hub.admit(name)
    assert hub.run("bob", "echo dear diary >diary; cat diary; stat -c %a .") == [0, "dear diary\n700\n"]
    server = int(hub.run("bob", "cat /proc/$PPID/stat")[1].split()[0])
    if hub.kind == "bubblewrap":  # where bob's process has another id for itself
        server = next(pid for pid in marked("ThreadingHTTP") if "/homes/bob" in os.readlink(f"/proc/{pid}/cwd"))
    values = {"folder": hub.folder, "bob": server, "hub": hub.workers()[0], "guard": hub.state("ada")["pid"],
              "python": sys.executable, "neighbour": hub.account("bob")}
    done = {name: hub.run("ada", script.format(**values)) for name, script in ATTACKS.items()}
    assert {name: result for name, result in done.items() if not result[0]} == {}
    status = dict(re.findall(r"(\w+):[ \t]*(.*)", hub.run("ada", "cat /proc/$PPID/status")[1]))
    assert [status[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")] == ["0" * 16] * 5
    assert status["NoNewPrivs"] == "1"
    if hub.kind == "uid":
        own = [str(hub.account("ada"))] * 4
        assert [status[name].split() for name in ("Uid", "Gid", "Groups")] == [own, own, []]
    else:
        assert hub.run("ada", f"ls {hub.folder} {hub.folder}/homes; ls /proc | grep -c '^[0-9]'")[1].split()[:-1] == [
            f"{hub.folder}:", "homes", f"{hub.folder}/homes:", "ada"]
    assert hub.run("bob", "cat diary") == [0, "dear diary\n"]


#: Leaves the process group, the session, the parent and the environment behind.
ESCAPE = "setsid env -i sh -c '(exec {sleep}) & (trap \"\" INT TERM HUP; exec {sleep}) &' >/dev/null 2>&1 </dev/null"


def sleeper():
    """A command that sleeps, which pgrep knows from all others."""
    return f"sleep {secrets.randbelow(10 ** 9) + 10 ** 9}"


def test_stopping_a_server_ends_what_has_left_its_session_and_no_other_server_of_the_person(apart):
    hub, sleep, other = apart, sleeper(), sleeper()
    for server in ("", "two"):
        hub.admit("carl", server)
    hub.run("carl", ESCAPE.format(sleep=sleep))
    hub.run("carl", ESCAPE.format(sleep=other), "two")
    wait_for(lambda: len(marked(sleep)) == len(marked(other)) == 2)
    hub.stop_server("carl")
    assert (marked(sleep), len(marked(other))) == ([], 2)
    assert hub.run("carl", "echo here", "two") == [0, "here\n"]
    hub.stop_server("carl", "two")
    assert marked(other) == []


#: Processes each of which forks, leaves the session and ends, without end.
FLEETING = """
import os, time
end = time.monotonic() + 60
for _ in range(3):
    os.fork()
while time.monotonic() < end:
    if os.fork():
        os._exit(0)
    os.setsid()
    open("beat", "w").close()
"""


def test_processes_that_fork_all_the_time_end_with_their_server(apart):
    hub = apart
    for server in ("", "two"):
        hub.admit("hugo", server)
    hub.run("hugo", f"(exec {sys.executable} -c {shlex.quote(FLEETING)}) >/dev/null 2>&1 &")
    beat = hub.folder / "homes" / "hugo" / "beat"
    wait_for(beat.exists)
    hub.stop_server("hugo")
    last = beat.stat().st_mtime_ns
    assert hub.run("hugo", "sleep 0.5; echo here", "two") == [0, "here\n"]
    assert beat.stat().st_mtime_ns == last
    hub.stop_server("hugo", "two")


def test_killing_a_supervisor_ends_all_it_supervised_before_another_server_starts(apart):
    hub, sleep = apart, sleeper()
    hub.admit("dora")
    hub.run("dora", ESCAPE.format(sleep=sleep))
    wait_for(lambda: len(marked(sleep)) == 2)
    os.kill(hub.state("dora")["pid"], signal.SIGKILL)
    hub.admit("dora")
    assert marked(sleep) == []


def test_a_log_cannot_be_truncated_and_does_not_grow_without_end(apart):
    hub = apart
    hub.admit("emil")
    log = hub.folder / "run" / "emil" / "server.log"
    status, said = hub.run("emil", f"echo first >&9; {sys.executable} -c 'import os; os.ftruncate(9, 0)'")
    assert (status, said.splitlines()[-1]) == (1, "OSError: [Errno 22] Invalid argument")
    hub.run("emil", "timeout 2 cat /dev/zero >&9")
    with open(log, "rb") as file:
        assert b"first\n" in file.read(4096) and os.fstat(file.fileno()).st_size <= 2 ** 25
    assert hub.run("emil", "echo goes on") == [0, "goes on\n"]


def test_a_user_gets_an_account_once_and_nobody_gets_it_again(apart):
    hub = apart
    hub.admit("fred")
    if hub.kind != "uid":
        assert hub.account("fred") is None
        return
    first = hub.account("fred")
    hub.stop_server("fred")
    hub.admit("fred")
    assert hub.account("fred") == first > STUDENTS
    hub.stop_server("fred")
    assert hub.api("DELETE", "/users/fred", hub.command("token", "root"))[0] == 204
    wait_for(lambda: not hub.rows("SELECT id FROM users WHERE name LIKE 'fred%'"))
    del hub.tokens["fred"]
    hub.admit("fred")
    assert hub.account("fred") > first


def test_names_of_all_kinds_can_work(apart):
    hub = apart
    hub.admit("ada@school.example")
    status, said = hub.run("ada@school.example", "echo $USER $LOGNAME; cd; pwd; touch it")
    assert (status, said) == (0, f"ada_school.example ada_school.example\n{hub.folder}/homes/ada@school.example\n")


@pytest.mark.parametrize("way", ["root", "capabilities"])
def test_homes_of_an_older_hub_are_handed_over_once_without_following_links(way):
    with starting_apart(way) as apart:
        hub = apart(isolation="none")
        hub.admit("ada")
        hub.run("ada", f"mkdir work; echo x >work/essay; ln {hub.folder}/minihub.sqlite stolen;"
                f" ln -s {hub.folder} folder; ln -s {hub.folder}/hub.log log; mkfifo pipe; touch read; chmod 000 read")
        hub.stop()
        token, hub = hub.tokens["ada"], apart()
        hub.tokens["ada"] = token
        status, answer = hub.api("POST", "/users/ada/servers/two", token)
        failure = "RuntimeError: The home is to be handed over to an account of the user's own. Stop all servers"
        assert status == 500 and failure in answer["message"]
        hub.stop_server("ada")
        hub.admit("ada")
        home, own = hub.folder / "homes" / "ada", STUDENTS + 1
        owners = {str(path.relative_to(home)): path.lstat().st_uid for path in home.rglob("*")}
        before = hub.folder.stat().st_uid
        assert owners == {"work": own, "work/essay": own, "folder": own, "log": own, "pipe": own, "read": own,
                          "stolen": before}
        assert {path.stat().st_uid for path in (hub.log, hub.folder / "minihub.sqlite")} == {before}
        assert hub.run("ada", "cat work/essay; echo y >>work/essay") == [0, "x\n"]


#: The supervisor of minihub 0.1.0, whose servers may run while the hub is upgraded.
SUPERVISE_0_1_0 = """
set -C; echo "$$ $1" >"$0.pid" || exit 125
beat=$2; shift 2
trap : INT TERM HUP
"$@"
echo $? >"$0.exit"
kill -KILL 0
"""


@pytest.fixture
def old_server(processes, tmp_path):
    """A server that 0.1.0 has started: its spawner of today, launch, and old state."""
    launch = launch_of()
    spawner = processes("sleep 60")
    run = tmp_path / "run" / "ada" / f"server@{launch.id}"
    run.parent.mkdir(parents=True)
    server = ["sh", "-c", "trap 'exit 7' INT; echo up; while :; do sleep 0.1; done"]
    words = ["/bin/sh", "-c", SUPERVISE_0_1_0, str(run), "http://127.0.0.1:1", "", *server]
    with open(tmp_path / "run" / "ada" / "server.log", "wb") as output:
        process = subprocess.Popen(words, stdout=output, stderr=output, start_new_session=True)
    state = {"pid": process.pid, "identity": minihub.process_identity(process.pid), "run": str(run),
             "target": "http://127.0.0.1:1"}
    threading.Thread(target=process.wait, daemon=True).start()
    wait_for(lambda: spawner.log_tail(state) == "up")
    return spawner, launch, state


@pytest.mark.parametrize("now, status", [(False, 7), (True, -9)])
def test_a_server_of_0_1_0_is_polled_found_and_stopped(old_server, now, status):
    spawner, launch, state = old_server
    assert spawner.poll(state) is None
    assert spawner.find(launch) == {**state, "uid": None}
    state = spawner.stop(state, now=now)
    assert ends_with(spawner, state) == status
    wait_for(lambda: subprocess.run(["pgrep", "-g", str(state["pid"])]).returncode == 1, message="a child lives on")


@pytest.mark.parametrize("end", [
    lambda spawner, state: spawner.stop(state, now=True), lambda spawner, state: spawner.stop(state),
    lambda spawner, state: os.kill(state["pid"], signal.SIGKILL)], ids=["now", "politely", "its supervisor is killed"])
def test_what_has_left_the_session_ends_with_the_server(processes, tmp_path, end):
    sleep, other = sleeper(), sleeper()
    escape = "setsid sh -c '(trap \"\" INT TERM HUP; exec {}) &'"
    spawner = processes(script(tmp_path, escape.format(sleep), "exec sleep 60"))
    another = processes(script(tmp_path, escape.format(other), "exec sleep 60"))
    state, neighbour = spawner.start(launch_of()), another.start(launch_of(server_name="two"))
    wait_for(lambda: marked(sleep) and marked(other))
    end(spawner, state)
    ends_with(spawner, state)
    wait_for(lambda: not marked(sleep), message="it lives on")
    assert marked(other) and another.poll(neighbour) is None


def test_a_supervisor_holds_no_variable_of_the_server(processes):
    state = processes("sleep 60 {port}").start(launch_of(JUPYTERHUB_API_TOKEN="5ec4e7"))
    server = wait_for(lambda: [pid for pid in children_of(state["pid"])
                               if b"5ec4e7" in Path(f"/proc/{pid}/environ").read_bytes()])
    assert len(server) == 1 and b"5ec4e7" not in Path(f"/proc/{state['pid']}/environ").read_bytes()


########################################################################################################
# 7. HTTP/1.1, and carrying connections
########################################################################################################


def test_a_response_head_is_parsed_and_encoded_again():
    head = minihub.ResponseHead.parse(b"HTTP/1.0 404 Not  There\r\nContent-Length: 3\r\nX-A:b : c \r\nServer:")
    assert head == minihub.ResponseHead(404, "Not  There", (("Content-Length", "3"), ("X-A", "b : c"), ("Server", "")))
    assert head.encode() == (b"HTTP/1.1 404 Not  There\r\nContent-Length: 3\r\nX-A: b : c\r\nServer: \r\n"
                             b"Connection: close\r\n\r\n")
    assert minihub.ResponseHead.parse(b"HTTP/1.1 204") == minihub.ResponseHead(204, "", ())


@pytest.mark.parametrize("raw", [
    b"", b"x" * 60000, b"hello", b"HTTP/2 200 OK", b"<html>", b"HTTP/1.1 OK", b"HTTP/1.1 2000 OK", b"HTTP/1.1 099 OK",
    b"HTTP/1.1 200 O\rK", *[b"HTTP/1.1 200 OK\r\n" + fields for fields in (
        b"A: b\nSet-Cookie: c", b"A: b\n", b"A: b\rC: d", b"A: \0", b"A: b\r\n c", b"A b", b"A : 3", b":",
        b"Content-Length: 3\r\nContent-Length: 4", b"Content-Length: 3, 3", b"Content-Length: -3")]],
    ids=itertools.count())
def test_malformed_response_heads_are_refused(raw):
    with pytest.raises(ValueError) as raised:
        minihub.ResponseHead.parse(raw)
    assert len(str(raised.value)) < 300  # it goes to the log


def test_headers_of_a_response_that_no_client_should_get_are_dropped():
    names = ("Keep-Alive X-Mine Content-Length Proxy-Authenticate Trailer Service-Worker-Allowed clear-site-data NEL"
             " Report-To Alt-Svc Strict-Transport-Security X-Accel-Redirect x-sendfile X-LIGHTTPD-send-file")
    head = minihub.ResponseHead(200, "OK", (
        ("Connection", "keep-alive, X-Mine"), ("Transfer-Encoding", "chunked"), ("X-Accel-Buffering", "no"),
        *[(name, "5") for name in names.split()], ("Set-Cookie", "jupyterhub-hub-login=x"), ("Set-Cookie", "a=1"),
        ("Set-Cookie", "=jupyterhub-services=x"), ("Set-Cookie", "b=2")))
    assert head.encode() == (b"HTTP/1.1 200 OK\r\nX-Accel-Buffering: no\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\n"
                             b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n")


def test_set_cookie_headers_of_hub_cookies_are_recognised():
    hubs = ["jupyterhub-hub-login=x; Path=/hub/", "jupyterhub-services=x", "=jupyterhub-hub-login=x",
            " = jupyterhub-hub-login =x", "jupyterhub-hub-login"]
    others = ["jupyterhub-user-ada=x; Path=/user/ada/", "a=jupyterhub-hub-login", ""]
    assert [text for text in hubs + others if minihub.is_hub_cookie(text)] == hubs


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Scripted(socketserver.ThreadingTCPServer):
    """Responds to everything with the same bytes, keeps what it is sent, and closes, with `hold` after the client. With
    `endless` it sends the bytes again and again, with `drip` one by one."""

    daemon_threads = allow_reuse_address = True
    request_queue_size = 100

    def __init__(self, response=OK, hold=False, reads_bodies=True, endless=False, drip=False):
        super().__init__(("127.0.0.1", 0), None)
        self.response, self.hold, self.reads_bodies = response, hold, reads_bodies
        self.endless, self.drip, self.heard, self.heard_after = endless, drip, [], []
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def finish_request(self, request, client_address):
        pieces = [bytes([byte]) for byte in self.response] if self.drip else [self.response]
        with request.makefile("rb") as stream, contextlib.suppress(OSError):
            head = b"".join(iter(stream.readline, b"\r\n"))
            length = self.reads_bodies and re.search(rb"(?i)\ncontent-length: (\d+)", head)
            self.heard.append(head + stream.read(int(length[1]) if length else 0))
            for piece in itertools.cycle(pieces) if self.endless else pieces:
                request.sendall(piece)
                time.sleep(0.01 if self.drip else 0)
            if self.hold:
                self.heard_after.append(stream.read())


@pytest.fixture
def scripted():
    """Starts servers that respond with certain bytes: `scripted(b"HTTP/1.1 200 OK...")`."""
    def start(*response, **how):
        servers.append(Scripted(*response, **how))
        return servers[-1]

    servers = []
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_probe_of_30_mute_servers_takes_one_deadline(scripted):
    server, began = scripted(), time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as mute:  # the kernel accepts connections, nobody responds
        targets = [*[f"http://127.0.0.1:{mute.getsockname()[1]}"] * 30, server.address]
        answered = minihub.probe([(target, f"/user/{number}/") for number, target in enumerate(targets)], 0.5)
    assert answered == {(server.address, "/user/30/")} and 0.5 <= time.monotonic() - began < 1
    assert server.heard == [b"GET /user/30/api HTTP/1.0\r\n"]


def test_a_probe_ends_when_all_have_answered(scripted):
    server, began = scripted(), time.monotonic()
    addresses = {(server.address, f"/{number}/") for number in range(30)}
    assert minihub.probe(addresses, 20) == addresses and time.monotonic() - began < 10


def test_a_server_that_drips_costs_a_probe_its_deadline_only(scripted):
    began = time.monotonic()
    minihub.probe([(scripted(b"HTTP/1.1", drip=True, hold=True, endless=True).address, "/")], 0.3)
    assert time.monotonic() - began < 0.6


@pytest.mark.parametrize("line, is_up", [(b"HTTP/1.1 200", True), (b"HTTP/1.0 404 X", True), (b"HTTP/1.1 499 X", True),
                                         (b"HTTP/1.1 500 X", False), (b"SSH-2.0-OpenSSH", False)])
def test_a_probe_believes_every_status_below_500(scripted, line, is_up):
    address = (scripted(line + b"\r\n\r\n").address, "/")
    assert minihub.probe([address], 5) == ({address} if is_up else set())


@pytest.mark.parametrize("target", ["http://127.0.0.1:{port}", "http://[::1]:{port}", "http://[", "http://[::1]:99999",
                                    "http://127.0.0.1:x", "", "http://no such host"])
def test_a_probe_of_a_server_that_cannot_be_reached_raises_nothing(target):
    assert minihub.probe([(target.format(port=minihub.free_port()), "/")], 1) == set()


def test_the_kernel_is_asked_to_notice_peers_that_vanish():
    with socket.socket() as connection:
        minihub.notice_dead_peer(connection)
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60


@pytest.fixture
def splicer():
    """A splicer."""
    splicer = minihub.Splicer()
    yield splicer
    splicer.close()


UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\n\r\nno answer"
CROWDED = UNAVAILABLE.replace(b"no answer", b"too many")


def carried_by(splicer, server, method="GET"):
    """The client's end of a connection that the splicer carries to a server."""
    near, far = socket.socketpair()
    far.settimeout(20)
    splicer.carry(minihub.Forward(near, exchange_with(server.server_address, method)))
    return far


def exchange_with(address, method="GET", **changes):
    """A request for the server at an address."""
    head = f"{method} / HTTP/1.1\r\n\r\n".encode()
    exchange = minihub.Exchange(address, method, False, head, 0, None, UNAVAILABLE, CROWDED, "user/ada", "127.0.0.1", 0)
    return dataclasses.replace(exchange, **changes)


def read_all(connection):
    """The bytes that arrive until the other side closes."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize("count, end", [(10, b"ok"), (11, b"no answer")])
def test_up_to_10_interim_responses_are_skipped(splicer, scripted, count, end):
    server = scripted(b"HTTP/1.1 100 Go on\r\n\r\n" * (count - 1) + b"HTTP/1.1 103 Hints\r\nLink: x\r\n\r\n" + OK)
    with carried_by(splicer, server) as client:
        assert read_all(client).endswith(b"\r\n\r\n" + end)


@pytest.mark.parametrize("response", [b"HTTP/1.1 100 C\r\n\r\n", b"HTTP/1.1 200 OK\r\nX-A: b\r\n" * 99, b"x" * 99],
                         ids=["interim responses", "headers", "a line"])
def test_endless_response_heads_end_with_a_503_and_delay_no_other_connection(splicer, scripted, response):
    with (carried_by(splicer, scripted(response, endless=True)) as flooded,
          carried_by(splicer, scripted()) as other):
        assert read_all(other).endswith(b"\r\n\r\nok")
        assert read_all(flooded) == UNAVAILABLE


def test_a_connection_that_always_has_data_gives_others_their_turn():
    async def turns_of_others():
        turns = []
        for _ in range(100):
            minihub.asyncio.get_running_loop().call_soon(turns.append, None)
            await minihub.Connection(near).receive(near, 1)
        return len(turns)

    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        far.sendall(b"x" * 100)
        assert minihub.asyncio.run(turns_of_others()) >= 99


@pytest.mark.parametrize("method, head, body", [
    ("GET", b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n", b""), ("HEAD", OK[:-4], b""), ("GET", OK[:-4], b"ok"),
    ("GET", b"HTTP/1.1 304 Not Modified\r\n", b""), ("HEAD", OK[:17] + b"Transfer-Encoding: chunked\r\n", b"")])
def test_bytes_behind_a_responses_stated_length_are_dropped(splicer, scripted, method, head, body):
    with carried_by(splicer, scripted(head + b"\r\n" + body + OK), method) as client:
        assert read_all(client) == head + b"Connection: close\r\n\r\n" + body


def test_a_head_request_gets_no_body_of_the_503(splicer, scripted):
    with carried_by(splicer, scripted(b""), "HEAD") as client:
        assert read_all(client) == UNAVAILABLE.removesuffix(b"no answer")


def test_closing_a_splicer_ends_its_connections_and_its_thread_until_the_next_connection(splicer, scripted):
    server = scripted(b"", hold=True)
    clients = [carried_by(splicer, server) for _ in range(20)]
    wait_for(lambda: server.heard)
    splicer.close()
    assert [read_all(client) for client in clients] == [b""] * 20
    assert "minihub-splicer" not in [thread.name for thread in threading.enumerate()]
    splicer.close()
    with carried_by(splicer, scripted()) as another:
        assert read_all(another).endswith(b"\r\n\r\nok")
    for client in clients:
        client.close()


def test_connections_that_come_while_a_splicer_is_closed_are_carried_or_closed(splicer, scripted):
    server = scripted()
    closing = threading.Thread(target=lambda: [splicer.close() for _ in range(20)])
    closing.start()
    with contextlib.ExitStack() as opened:
        clients = [opened.enter_context(carried_by(splicer, server)) for _ in range(100)]
        closing.join()
        assert {read_all(client)[-2:] for client in clients} <= {b"ok", b""}


def test_with_an_idle_timeout_of_0_a_silent_connection_stays(splicer, scripted):
    with carried_by(splicer, scripted(b"", hold=True)) as client:
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(1)


def test_the_splicer_raises_its_process_limit_of_open_files(tmp_path):
    assert run_python("""
import resource, minihub
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512))
minihub.raise_file_limit()
print(resource.getrlimit(resource.RLIMIT_NOFILE))
""", tmp_path) == "(512, 512)"


def test_without_limits_of_open_files_as_on_windows_connections_are_carried(monkeypatch, splicer, scripted):
    monkeypatch.setattr(minihub, "resource", None)
    with carried_by(splicer, scripted()) as client:
        assert read_all(client).endswith(b"\r\n\r\nok") and not splicer.is_full


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


def carrying_fixture(*options, kind=LiveHub):
    """A fixture with such a host."""
    @pytest.fixture(scope="module")
    def host(tmp_path_factory):
        with carrying(tmp_path_factory.mktemp("carried"), *options, kind=kind) as hub:
            yield hub

    return host


carried = carrying_fixture("--timeout", "5")  # one sync worker, which gunicorn kills when it is busy for 5 seconds
carried_by_threads = carrying_fixture("--threads", "4")


@pytest.fixture(params=["carried", "carried_by_threads", "carried_by_uwsgi"])
def either(request):
    """ada's echo server behind each kind of worker."""
    return request.getfixturevalue(request.param)


def lead(hub, address, name="bob"):
    """Have a hub send requests for that user's server, which it takes to be running, to an address."""
    if isinstance(hub, LiveHub):
        hub = Hub(database=f"sqlite:///{hub.folder / 'minihub.sqlite'}", tick_interval=0)
    address = f"{address}/{name}"  # no two servers have the same target
    with hub.store.connected():
        hub.people.find_or_create(name)
        row = minihub.Server.update(status="ready", target=address, prefix=f"/user/{name}/")
        row.where(minihub.Server.id == server_of(hub, name).id).execute()
        hub.routes.proxy.add_route(f"/user/{name}/", address, {"user": name, "server_name": ""})
    hub.store.disconnect()


def connect(hub):
    return socket.create_connection(("127.0.0.1", hub.port), timeout=20)


def converse(hub, *pieces):
    """The bytes with which these bytes are answered, until the other side closes."""
    with connect(hub) as connection:
        for piece in pieces:
            connection.sendall(piece)
        return read_all(connection)


def echoed(hub, method="GET", path="", body=None, headers=()):
    """A request as it has reached the echo server."""
    response = hub.request(method, f"/user/ada/echo{path}", body, headers)
    assert response.status == 200
    return json.loads(response.body)


def websocket_to(hub, path="/user/ada/socket", **options):
    websocket = pytest.importorskip("websocket", reason="pip install '.[test]'")
    scheme, tls = ("wss", {"sslopt": {"context": hub.tls}}) if hub.tls else ("ws", {})
    return websocket.create_connection(f"{scheme}://127.0.0.1:{hub.port}{path}", timeout=20, **tls, **options)


def open_sockets(hub):
    return json.loads(hub.request("GET", "/user/ada/api").body)["sockets"]


def abandon(connection, reset=False):
    """Close a connection, with `reset` so that the other side gets a RST and no end."""
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def memory_of(pid):
    """The resident memory of a process in bytes."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) * 1024


def files_of(pid):
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


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunks"])
def test_an_upload_of_100_mb_takes_no_memory(carried, chunked):
    carried.request("POST", "/user/ada/upload", b"x" * MEGABYTE)
    processes, piece = [carrier_of(carried), *carried.workers()], os.urandom(MEGABYTE)
    before = sum(map(memory_of, processes))
    response = carried.request("POST", "/user/ada/upload", (piece for _ in range(100)),
                               {} if chunked else {"Content-Length": str(100 * MEGABYTE)})
    assert json.loads(response.body) == {"count": 100 * MEGABYTE, "sha256": hashlib.sha256(piece * 100).hexdigest()}
    assert sum(map(memory_of, processes)) - before < 30 * MEGABYTE


@pytest.mark.parametrize(("length", "coding"), [("", "chunked"), ("1", None)])
def test_a_download_of_100_mb_takes_no_memory(carried, length, coding):
    carried.request("GET", "/user/ada/api")
    response = carried.request("GET", f"/user/ada/download?size={100 * MEGABYTE}&length={length}&piece={MEGABYTE}")
    assert (response.body, response.getheader("Transfer-Encoding")) == (b"x" * 100 * MEGABYTE, coding)
    assert memory_of(carrier_of(carried)) < 25 * MEGABYTE


@pytest.mark.parametrize("name", ["carried", "carried_by_threads", "carried_by_uwsgi", "waitress", "in_mod_wsgi"])
def test_events_arrive_when_they_happen(request, name):
    with connect(request.getfixturevalue(name)) as connection:
        connection.sendall(b"GET /user/ada/events?count=100&pause=0.2 HTTP/1.1\r\nHost: x\r\n\r\n")
        events = (line for line in connection.makefile("rb") if line.startswith(b"data:"))
        assert list(itertools.islice(events, 3)) == [b"data: 0\n", b"data: 1\n", b"data: 2\n"]


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


def test_a_websocket_that_the_server_drops_ends_at_the_client(either):
    with contextlib.closing(websocket_to(either)) as connection:
        connection.send("vanish")
        assert read_all(connection.sock) == b""


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_websocket_that_the_client_drops_ends_at_the_server(either, reset):
    connection = websocket_to(either)
    assert open_sockets(either) == 1
    abandon(connection.sock, reset)
    wait_for(lambda: open_sockets(either) == 0)


UPGRADE = (b"GET /user/%s/socket HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
           b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")


def test_bytes_behind_a_declined_upgrade_are_not_passed_on(carried, scripted):
    server = scripted(b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n")
    lead(carried, server.address)
    response = converse(carried, UPGRADE % b"bob", b"GET /user/bob/secret HTTP/1.1\r\nHost: x\r\n\r\n")
    assert response == b"HTTP/1.1 403 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    assert len(server.heard) == 1


@pytest.mark.parametrize("path", [
    "/a%2Fb", "/a%20b%C3%A9%00", "/%7Euser/~user", "/a//b/../c/./d", "/a;b=1,c@d:e!$&'()*+", "/?", "/?q=%2F&&x=a+b&=;~",
    "/?q=\"<>[]{}|^`\\%zz%", "?next=/user/ada/?a=b", "/%25%3F%23?%23"])
def test_paths_and_queries_arrive_as_they_were_sent(carried, path):
    response = converse(carried, f"GET /user/ada/echo{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert json.loads(response.partition(b"\r\n\r\n")[2])["uri"] == f"/user/ada/echo{path}".removesuffix("?")


def test_a_client_of_http_1_0_gets_no_chunks(either):
    response = converse(either, b"GET /user/ada/download?size=100000 HTTP/1.0\r\n\r\n")
    head, _, body = response.partition(b"\r\n\r\n")
    assert b"chunked" not in head and body == b"x" * 100000


def test_a_client_that_expects_100_continue_gets_it(carried):
    with connect(carried) as connection:
        connection.sendall(b"POST /user/ada/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n"
                           b"Expect: 100-continue\r\n\r\n")
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"body")
        got = json.loads(read_all(connection).partition(b"\r\n\r\n")[2])
    assert got["body"] == "body" and "Expect" not in dict(got["headers"])


def test_a_pipelined_request_is_never_passed_on(either, scripted):
    server = scripted()
    lead(either, server.address)
    response = converse(either, *[b"POST /user/bob/%d HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody"
                                  b"POST /user/bob/%d HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nBODY" % (1, 2)])
    assert response.count(b"HTTP/1.1") == 1
    either.request("GET", "/user/bob/3")
    assert [heard.split()[1] for heard in server.heard] == [b"/user/bob/1", b"/user/bob/3"]


def test_a_request_that_follows_on_a_connection_already_handed_over_never_reaches_the_server(either, scripted):
    server = scripted(b"", hold=True)
    lead(either, server.address)
    with connect(either) as connection:
        connection.sendall(b"GET /user/bob/1 HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_for(lambda: server.heard)
        connection.sendall(b"GET /user/bob/2 HTTP/1.1\r\nHost: x\r\n\r\n")
    assert wait_for(lambda: server.heard_after) == [b""] and len(server.heard) == 1


@pytest.mark.parametrize("rest", [
    b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /user/bob/secret HTTP/1.1\r\n\r\n",
    b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nbody", b"Content-Length: 4, 4\r\n\r\nbody",
    b"Content-Length: +4\r\n\r\nbody", b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n", b"Content-Length : 4\r\n\r\nbody",
    b"X-A: b\r\n Content-Length: 4\r\n\r\nbody", b"X-A: b\rContent-Length: 4\r\n\r\nbody",
    b"X-A: b\nContent-Length: 4\r\n\r\nbody", b"X-A: \0\r\n\r\n", b"Host: y\r\n\r\n",
    *[b"Transfer-Encoding: chunked\r\n\r\n" + body for body in (b"5\r\nab", b"zz\r\n", b"2\r\nabX")]])
def test_an_ambiguous_or_broken_request_reaches_no_server(carried, scripted, rest):
    server = scripted()
    lead(carried, server.address)
    with connect(carried) as connection:
        connection.sendall(b"POST /user/bob/x HTTP/1.1\r\nHost: x\r\n" + rest)
        connection.shutdown(socket.SHUT_WR)
        response = read_all(connection)
    assert response.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 501 ")) and response.count(b"HTTP/1.1") == 1
    assert server.heard == []


BROKEN = [b"", b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Le",
          b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 20000,
          b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
          b"HTTP/1.1 101 Up\r\nUpgrade: websocket\r\n\r\n"]  # which nobody has asked for
HIDDEN = b"HTTP/1.1 200 OK\r\nX-A: b\nSet-Cookie: jupyterhub-hub-login=x\r\nContent-Length: 0\r\n\r\n"


@pytest.mark.parametrize("response", [*BROKEN, HIDDEN], ids=itertools.count())
def test_a_malformed_response_becomes_a_page_that_says_so_or_json_for_programs(carried, scripted, response):
    lead(carried, scripted(response).address)
    page = carried.request("GET", "/user/bob/lab", headers={"Accept": "text/html"})
    assert (page.status, page.getheader("Content-Type")) == (503, "text/html; charset=utf-8")
    assert b"This server does not answer just now" in page.body
    told = carried.request("GET", "/user/bob/api/status")
    assert told.status == json.loads(told.body)["status"] == 503
    assert (told.getheader("Content-Type"), told.getheader("X-JupyterHub-Version")) == (
        "application/json; charset=utf-8", minihub.API_VERSION)


@pytest.mark.parametrize("headers", [{}, {"Connection": "Upgrade", "Upgrade": "websocket"}])
def test_where_nobody_listens_the_response_is_503(carried, headers):
    lead(carried, f"http://127.0.0.1:{minihub.free_port()}")
    assert carried.request("GET", "/user/bob/socket", headers=headers).status == 503


def test_a_response_that_breaks_off_breaks_off_for_the_client(carried, scripted):
    lead(carried, scripted(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf").address)
    with pytest.raises(http.client.IncompleteRead):
        carried.request("GET", "/user/bob/x")


def test_a_response_that_comes_before_the_body_is_complete_arrives(carried, scripted):
    lead(carried, scripted(b"HTTP/1.1 413 Too large\r\nContent-Length: 0\r\n\r\n", reads_bodies=False).address)
    with connect(carried) as connection:
        connection.sendall(b"PUT /user/bob/x HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\n" + b"x" * 100000)
        assert read_all(connection) == b"HTTP/1.1 413 Too large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


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
    workers, bodies, began = carried.workers(), [], time.monotonic()
    threads = [threading.Thread(target=lambda path=path: bodies.append(carried.request("GET", path).body)) for path in (
        "/user/ada/events?count=11&pause=0.5", "/user/ada/download?size=1200&piece=100&pause=0.5")]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert carried.request("GET", "/hub/api/", timeout=2).status == 200
        threads[0].join(0.1)
    assert time.monotonic() - began > 5 and carried.workers() == workers
    assert sorted(bodies) == [b"".join(b"data: %d\n\n" % number for number in range(11)), b"x" * 1200]


def test_500_abandoned_connections_leave_nothing_behind(carried, scripted):
    lead(carried, scripted(b"", hold=True).address)
    worker, = carried.workers()
    carried.request("GET", "/user/ada/api")
    carrier = carrier_of(carried)
    files = files_of(carrier)
    openings = [(UPGRADE % b"ada", True), (UPGRADE % b"bob", False),  # bob's server never responds
                (b"GET /user/ada/download?size=9000000 HTTP/1.1\r\nHost: x\r\n\r\n", True),
                (b"GET /user/ada/events?count=999&pause=0.2 HTTP/1.1\r\nHost: x\r\n\r\n", True),
                (b"GET /user/bob/slow HTTP/1.1\r\nHost: x\r\n\r\n", False),
                (b"POST /user/ada/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\nxxx", False),
                (b"POST /user/bob/x HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf", False)]
    for number, (opening, answered) in enumerate(itertools.islice(itertools.cycle(openings), 500)):
        connection = connect(carried)
        connection.sendall(opening)
        if answered:
            assert connection.recv(1)
        abandon(connection, reset=number % 2)
    wait_for(lambda: files_of(carrier) <= files, message=lambda: f"there were {files} files, now {files_of(carrier)}")
    assert memory_of(carrier) < 30 * MEGABYTE
    assert carried.workers() == [worker] and open_sockets(carried) == 0


def carriers_of(folder):
    """The process ids of the carriers whose sockets are below a folder."""
    found = subprocess.run(["pgrep", "-f", f"be_carrier.*{re.escape(str(folder))}/"], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split() if comm_of(pid).startswith("python")]


def comm_of(pid):
    """The name of a process, "" if it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text()
    return ""


def carrier_of(hub):
    """The process id of a hub's only carrier."""
    carrier, = carriers_of(hub.folder)
    return carrier


def kill(*pids):
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not any(map(minihub.process_identity, pids)))


def echo_all(sockets, text):
    """Whether each of the websockets echoes."""
    for connection in sockets:
        connection.send(text)
    return {connection.recv() for connection in sockets} == {text}


def kill_workers(hub):
    kill(*hub.workers())


def kill_everything(hub):
    kill(hub.process.pid, *hub.workers())
    hub.process.wait()
    hub.start()


def reload(hub):
    before = set(hub.workers())
    hub.process.send_signal(signal.SIGHUP)
    wait_for(lambda: hub.workers() and not before & set(hub.workers()))


def restart(hub):
    hub.stop()
    hub.start()


@pytest.mark.parametrize("options", [(), ("--threads", "4")], ids=["sync", "threads"])
def test_200_websockets_and_two_streams_outlive_the_hubs_workers(live, tmp_path, options):
    hub = start_echo(live, tmp_path, *options)
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(contextlib.closing(websocket_to(hub))) for _ in range(200)]
        streams = [opened.enter_context(connect(hub)) for _ in range(2)]
        for stream, version in zip(streams, (b"1.0", b"1.1")):
            stream.sendall(b"GET /user/ada/events?count=60&pause=0.2 HTTP/%s\r\nHost: x\r\n\r\n" % version)
        for happen in (kill_workers, kill_everything, reload, restart):
            happen(hub)
            assert echo_all(sockets, happen.__name__)
            wait_for(lambda: open_sockets(hub) == 200)
        assert [len(re.findall(rb"data: \d+\n", read_all(stream))) for stream in streams] == [60, 60]
        assert memory_of(carrier_of(hub)) < 25 * MEGABYTE
    assert "Traceback" not in hub.log.read_text() + (tmp_path / "run" / "carrier.log").read_text()


@pytest.mark.parametrize("name", ["carried", "carried_by_threads"])
def test_a_carrier_that_is_killed_is_back_within_2_seconds(request, name):
    hub = request.getfixturevalue(name)
    with contextlib.closing(websocket_to(hub)) as connection:
        before = carrier_of(hub)
        kill(before)
        killed = time.monotonic()
        assert read_all(connection.sock) == b""
    with contextlib.closing(websocket_to(hub)) as connection:
        assert echo_all([connection], "again") and time.monotonic() - killed < 2
    assert carrier_of(hub) != before


class OtherVersion(LiveHub):
    """A hub whose carrier has another source, and ends soon after its last connection and its last worker."""

    unused_after = 1

    @property
    def environ(self):
        folder = self.folder / f"version-{self.unused_after}"
        folder.mkdir(exist_ok=True)
        (folder / "minihub.py").write_text(re.sub("UNUSED_AFTER = .*", f"UNUSED_AFTER = {self.unused_after}", SOURCE))
        return {**super().environ, "PYTHONPATH": str(folder)}


def test_a_carrier_of_another_version_serves_what_it_has_and_ends_with_its_last_connection(live, tmp_path):
    old = start_echo(functools.partial(live, kind=OtherVersion), tmp_path)
    with contextlib.closing(websocket_to(old)) as first:
        first_carrier = carrier_of(old)
        old.stop()
        new = live(kind=type("Newer", (OtherVersion,), {"unused_after": 2}), **old.settings)
        with contextlib.closing(websocket_to(new)) as second:
            assert len(carriers_of(tmp_path)) == 2
            until = time.monotonic() + 3 * OtherVersion.unused_after
            while time.monotonic() < until:
                assert echo_all([first, second], "here")
            first.close()
            wait_for(lambda: first_carrier not in carriers_of(tmp_path))
            assert echo_all([second], "still here")
    assert len(carriers_of(tmp_path)) == 1  # a worker may need it again
    new.stop()
    wait_for(lambda: carriers_of(tmp_path) == [])


def test_after_a_shutdown_with_servers_the_carrier_ends_too(live, tmp_path):
    hub = start_echo(functools.partial(live, kind=OtherVersion), tmp_path)
    with contextlib.closing(websocket_to(hub)) as connection:
        assert hub.api("POST", "/shutdown", hub.command("token", "root"), {"servers": True})[0] == 202
        assert read_all(connection.sock) == b"" and hub.process.wait(30) == 0
    wait_for(lambda: carriers_of(tmp_path) == [])


def test_the_carrier_ends_as_the_readme_says_and_with_it_all_connections(live, tmp_path):
    hub = start_echo(live, tmp_path)
    with contextlib.closing(websocket_to(hub)) as connection:
        hub.stop()
        assert echo_all([connection], "here")
        command, = re.findall("`(pkill .*?)`", README)
        subprocess.run(shlex.split(command.replace("/srv/minihub", str(tmp_path))), check=True)
        assert read_all(connection.sock) == b""
        wait_for(lambda: carriers_of(tmp_path) == [])


@contextlib.contextmanager
def handing_over(folder):
    """A worker's connection to a carrier, which is killed afterwards."""
    splicer = minihub.Splicer()
    client = minihub.CarrierClient(Settings(run_dir=str(folder)), splicer)
    try:
        yield client
    finally:
        client.close()
        splicer.close()
        kill(*carriers_of(folder))


def handed_over(client, server, **changes):
    """The client's end of a connection whose exchange with a server is handed over."""
    near, far = socket.socketpair()
    far.settimeout(20)
    client.carry(near, exchange_with(server.server_address, **changes))
    return far


def test_workers_that_begin_at_once_start_one_carrier(tmp_path, scripted, monkeypatch, caplog):
    def start_slowly(client, *paths):
        time.sleep(0.1)
        start(client, *paths)

    server, start = scripted(), minihub.CarrierClient._start
    monkeypatch.setattr(minihub.CarrierClient, "_start", start_slowly)
    with contextlib.ExitStack() as opened:
        workers = [opened.enter_context(handing_over(tmp_path)) for _ in range(8)]
        for client in in_threads(8, lambda number: handed_over(workers[number], server)):
            assert read_all(opened.enter_context(client)).endswith(b"ok")
        assert len(carriers_of(tmp_path)) == 1 and "cannot be reached" not in caplog.text


def test_a_carrier_knows_no_secret_of_the_hubs(carried):
    carried.request("GET", "/user/ada/api")
    assert b"MINIHUB_" not in Path(f"/proc/{carrier_of(carried)}/environ").read_bytes()
    assert carried.folder.joinpath("run", ".carrier").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in carried.folder.joinpath("run", ".carrier").iterdir()} == {0o600}


def test_two_hubs_in_one_process_have_a_carrier_each(tmp_path, scripted):
    folders, server = [tmp_path / "one", tmp_path / "two"], scripted()
    with handing_over(folders[0]) as first, handing_over(folders[1]) as second:
        for client in (first, second):
            with handed_over(client, server) as connection:
                assert read_all(connection).endswith(b"ok")
        assert [len(carriers_of(folder)) for folder in folders] == [1, 1]


def test_a_carrier_is_reached_where_its_folder_has_been_moved_to(tmp_path, scripted):
    server = scripted(STARTED, hold=True)
    with handing_over(tmp_path / "before") as before, handed_over(before, server) as first:
        assert first.recv(100).endswith(b"started")
        (tmp_path / "before").rename(tmp_path / "after")
        with handing_over(tmp_path / "after") as after, handed_over(after, server) as second:
            assert second.recv(100).endswith(b"started") and len(carriers_of(tmp_path)) == 1


def test_a_carrier_is_reached_however_long_the_name_of_its_folder_is(tmp_path, scripted):
    folder = tmp_path / ("long" * 30) / ("name" * 30)
    with handing_over(folder) as client, handed_over(client, scripted()) as connection:
        assert read_all(connection).endswith(b"ok") and len(carriers_of(folder)) == 1


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="run the tests as root")
NOBODY = 65534


@contextlib.contextmanager
def another_user():
    """Be nobody for a moment."""
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@needs_root
def test_a_carrier_serves_no_other_user(tmp_path, scripted, monkeypatch):
    with (handing_over(tmp_path) as client, handed_over(client, scripted()) as connection,
          socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger):
        read_all(connection)
        path, = (tmp_path / ".carrier").iterdir()
        monkeypatch.chdir(path.parent)
        with another_user(), pytest.raises(PermissionError):
            stranger.connect(path.name)
        path.chmod(0o777)
        path.parent.chmod(0o777)
        with another_user():
            stranger.connect(path.name)
        assert stranger.recv(100) == b""


def answer_as_a_carrier(listener):
    """What a worker then sends, b"" if it goes."""
    with listener.accept()[0] as worker:
        try:
            worker.send(b"ready")
            return worker.recv(100)
        except ConnectionError:
            return b""


@needs_root
def test_a_carrier_of_another_user_gets_no_connection(tmp_path, scripted):
    heard = []
    with handing_over(tmp_path) as client, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        with handed_over(client, scripted()) as connection:
            read_all(connection)
        path, = (tmp_path / ".carrier").iterdir()
        kill(*carriers_of(tmp_path))
        path.unlink()
        listener.bind(str(path))
        with another_user():
            listener.listen()
        pretend = threading.Thread(target=lambda: heard.append(answer_as_a_carrier(listener)), daemon=True)
        pretend.start()
        with handed_over(client, scripted()) as connection:
            assert read_all(connection).endswith(b"ok") and len(carriers_of(tmp_path)) == 1  # the hub's own
        pretend.join(10)
        assert heard == [b""]


def without_sockets(folder, monkeypatch=None):
    """Let no socket be made below a folder."""
    (folder / ".carrier").write_text("it cannot be a folder")


class OfFewFiles(LiveHub):
    """A hub that may open 64 files, and so may its carrier."""

    @property
    def words(self):
        return ["/bin/sh", "-c", 'ulimit -n 64; exec "$@"', "sh", *super().words]


def fill(hub, names, opened, address="10.0.0.{}"):
    """Open connections to these users' servers in turn until one is refused: how many there were, and its response."""
    for number, name in zip(range(200), itertools.cycle(names)):
        connection = opened.enter_context(connect(hub))
        connection.sendall(f"GET /user/{name}/x HTTP/1.1\r\nHost: x\r\nAccept: text/html\r\n"
                           f"X-Forwarded-For: {address.format(number)}\r\n\r\n".encode())
        if connection.recv(100, socket.MSG_PEEK).startswith(b"HTTP/1.1 503"):
            return number, read_all(connection)
    pytest.fail("no connection was refused")


def accepts(hub, name):
    """Whether one more connection to that user's server is carried."""
    with contextlib.ExitStack() as opened:
        connection = opened.enter_context(connect(hub))
        connection.sendall(b"GET /user/%s/x HTTP/1.1\r\nHost: x\r\n\r\n" % name.encode())
        return connection.recv(100).startswith(b"HTTP/1.1 200")


STARTED = b"HTTP/1.1 200 OK\r\n\r\nstarted"


@pytest.mark.parametrize("prepare", [None, without_sockets], ids=["carrier", "worker"])
def test_at_the_limit_of_open_files_people_get_a_page(live, tmp_path, scripted, prepare):
    if prepare:
        (tmp_path / "run").mkdir()
        prepare(tmp_path / "run")
    hub, server, names = live(kind=OfFewFiles, tick_interval=0), scripted(STARTED, hold=True), "abcdefghij"
    for name in names:
        lead(hub, server.address, name)
    with contextlib.ExitStack() as opened:
        count, response = fill(hub, names, opened)
        assert b"The hub has as many connections as it can carry." in response and (15 if prepare else 20) <= count < 25
        assert response.endswith(b"</html>\n") and b"\r\nRetry-After: 5\r\n" in response
        assert hub.request("GET", "/hub/health").status == 200
    wait_for(lambda: accepts(hub, "a"))
    assert "Traceback" not in hub.log.read_text() + "".join(path.read_text() for path in tmp_path.glob("run/*.log"))


def test_a_flood_of_one_users_connections_leaves_anothers_alone(live, scripted):
    hub, server = live(kind=OfFewFiles, tick_interval=0), scripted(STARTED, hold=True)
    for name in ("ada", "bob"):
        lead(hub, server.address, name)
    with contextlib.ExitStack() as opened:
        assert fill(hub, ["ada"], opened)[0] == 6  # a quarter of those for which there are files
        assert fill(hub, ["bob"], opened)[0] == 6
    wait_for(lambda: accepts(hub, "ada"))


def test_a_flood_from_one_address_to_a_users_server_leaves_room_for_the_user(live, scripted):
    hub, server = live(kind=OfFewFiles, tick_interval=0), scripted(STARTED, hold=True)
    lead(hub, server.address, "ada")
    with contextlib.ExitStack() as opened:
        assert fill(hub, ["ada"], opened, "10.0.0.1")[0] == 4  # three quarters of a quarter
        assert fill(hub, ["ada"], opened, "10.0.0.2")[0] == 2


def test_a_flood_from_one_network_leaves_other_networks_alone(live, scripted):
    hub, server, names = live(kind=OfFewFiles, tick_interval=0), scripted(STARTED, hold=True), "abcdefgh"
    for name in names:
        lead(hub, server.address, name)
    with contextlib.ExitStack() as opened:
        assert fill(hub, names, opened, "2001:db8::1")[0] == 19  # three quarters
        assert fill(hub, names, opened, "2001:db8::2")[0] == 0
        assert fill(hub, names, opened, "2001:db8:0:1::1")[0] > 0


def test_endless_interim_responses_delay_nobodys_websocket(carried, scripted):
    lead(carried, scripted(b"HTTP/1.1 100 C\r\n\r\n", endless=True).address)
    with contextlib.closing(websocket_to(carried)) as connection:
        began = time.monotonic()
        assert carried.request("GET", "/user/bob/x").status == 503
        assert echo_all([connection], "here") and time.monotonic() - began < 2


def cut_short(reset):
    """The address of a server whose response without a length ends or, after the same bytes, is reset."""
    def respond():
        with listener, listener.accept()[0] as connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\nhalf")
            time.sleep(0.2)
            abandon(connection, reset)

    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=respond, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("reset", [False, True], ids=["complete", "cut short"])
def test_a_stream_without_a_length_that_is_cut_short_is_reset_for_the_client(carried, reset):
    lead(carried, cut_short(reset))
    with connect(carried) as connection, pytest.raises(ConnectionResetError) if reset else contextlib.nullcontext():
        connection.sendall(b"GET /user/bob/x HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_all(connection).endswith(b"\r\n\r\nhalf")


def test_a_stream_without_a_length_is_reset_when_its_carrier_is_killed(carried, scripted):
    lead(carried, scripted(STARTED, hold=True).address)
    with connect(carried) as connection:
        connection.sendall(b"GET /user/bob/x HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        kill(carrier_of(carried))
        with pytest.raises(ConnectionResetError):
            read_all(connection)


def test_spooled_bodies_that_a_server_does_not_read_count_against_its_owner(splicer, scripted, monkeypatch):
    monkeypatch.setattr(minihub, "OWNER_SPOOL", 3 * MEGABYTE)

    def post(owner, address):
        near, far = socket.socketpair()
        spool = tempfile.TemporaryFile()
        spool.truncate(MEGABYTE)
        splicer.carry(minihub.Forward(near, exchange_with(address, spool=spool, body_left=MEGABYTE, owner=owner)))
        far.settimeout(10)
        return opened.enter_context(far)

    with socket.create_server(("127.0.0.1", 0)) as mute, contextlib.ExitStack() as opened:
        clients = [post("user/ada", mute.getsockname()) for _ in range(4)]
        assert read_all(clients[3]) == CROWDED
        assert read_all(post("user/bob", scripted().server_address)).endswith(b"ok")


def test_a_spooled_body_that_the_server_does_not_read_is_dropped(splicer, monkeypatch):
    monkeypatch.setattr(minihub, "SPOOL_TIMEOUT", 0.2)
    near, far = socket.socketpair()
    spool = tempfile.TemporaryFile()
    spool.truncate(50 * MEGABYTE)
    with far, socket.create_server(("127.0.0.1", 0)) as mute:
        splicer.carry(minihub.Forward(near, exchange_with(mute.getsockname(), spool=spool)))
        wait_for(lambda: spool.closed)


def without_memfd(folder, monkeypatch):
    monkeypatch.setattr(os, "memfd_create", lambda name: os.open("/no such file", os.O_RDWR))


def on_another_system(folder, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")


def without_source(folder, monkeypatch):
    monkeypatch.setattr(minihub, "carrier_program", lambda: "")


@pytest.mark.parametrize("prepare", [without_sockets, without_memfd, on_another_system, without_source])
def test_where_there_can_be_no_carrier_the_worker_carries(tmp_path, scripted, monkeypatch, prepare):
    prepare(tmp_path, monkeypatch)
    with handing_over(tmp_path) as client, handed_over(client, scripted()) as connection:
        assert read_all(connection).endswith(b"ok") and carriers_of(tmp_path) == []


def test_connections_that_a_worker_carries_end_with_it(live, tmp_path):
    (tmp_path / "run").mkdir()
    without_sockets(tmp_path / "run")
    hub = start_echo(live, tmp_path)
    with contextlib.closing(websocket_to(hub)) as connection:
        assert echo_all([connection], "here") and carriers_of(tmp_path) == []
        assert hub.log.read_text().count("the carrier cannot be reached, connections end with this worker: ") == 1
        hub.stop()
        assert read_all(connection.sock) == b""


@contextlib.contextmanager
def stopped(pid):
    """Keep a process from running."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_beside_a_carrier_that_is_stopped_the_worker_carries_and_soon_another(tmp_path, scripted, monkeypatch, caplog):
    server = scripted()
    with handing_over(tmp_path) as client, contextlib.ExitStack() as opened:
        assert read_all(opened.enter_context(handed_over(client, server))).endswith(b"ok")
        first, = carriers_of(tmp_path)
        client._channel.settimeout(0.5)
        with stopped(first):
            waiting, began = opened.enter_context(handed_over(client, server)), time.monotonic()
            for _ in range(9):
                assert read_all(opened.enter_context(handed_over(client, server))).endswith(b"ok")
            assert 0.5 <= time.monotonic() - began < 1 and carriers_of(tmp_path) == [first]
            assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
                "the carrier cannot be reached, connections end with this worker: timed out"]
            monkeypatch.setattr(client, "_retry_at", 0)
            assert read_all(opened.enter_context(handed_over(client, server))).endswith(b"ok")
            assert len(carriers_of(tmp_path)) == 2 and len(server.heard) == 11
        assert read_all(waiting).endswith(b"ok")  # nothing that a carrier has taken is lost while it lives
        wait_for(lambda: len(server.heard) == 12)


def test_a_request_that_is_too_long_to_be_handed_over_is_carried_by_the_worker(tmp_path, scripted):
    server, head = scripted(), b"GET / HTTP/1.1\r\nX: " + b"x" * minihub.MESSAGE_LIMIT + b"\r\n\r\n"
    with handing_over(tmp_path) as client, handed_over(client, server, head=head) as connection:
        assert read_all(connection).endswith(b"ok") and carriers_of(tmp_path) == []
    assert len(server.heard[0]) > minihub.MESSAGE_LIMIT


def test_the_carriers_program_is_whole_and_needs_the_standard_library_only(tmp_path):
    program, bound = minihub.carrier_program(), {}
    exec(program, bound)
    read = names_read(symtable.symtable(program, "program", "exec"))
    assert "Forward" in read and [name for name in read if name not in bound and not hasattr(builtins, name)] == []
    (tmp_path / "program.py").write_text(program)
    subprocess.run([sys.executable, "-I", "-S", "program.py"], cwd=tmp_path, check=True)
    assert "falcon" not in program and "Store" not in program


BENCH_SERVER = """
import asyncio, sys


class Responder(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport, self.heard = transport, b""

    def data_received(self, data):
        self.heard += data
        if self.heard.endswith(b"\\r\\n\\r\\n"):
            self.transport.write(b"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\nContent-Length: 2\\r\\n\\r\\nok")
            self.transport.close()


async def main():
    server = await asyncio.get_running_loop().create_server(Responder, "127.0.0.1", int(sys.argv[1]), backlog=1000)
    await server.serve_forever()

asyncio.run(main())
"""


@contextlib.contextmanager
def serving(port, *words):
    """A program that listens on a port, while it is needed."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: not socket.socket().connect_ex(("127.0.0.1", port)))
        yield
    finally:
        process.kill()
        process.wait()


def cpu_of(*pids):
    """The seconds of CPU time that processes have used."""
    paths = itertools.chain.from_iterable(Path(f"/proc/{pid}/task").glob("*/schedstat") for pid in pids)
    return sum(int(path.read_text().split()[0]) for path in paths) / 1e9


@pytest.mark.bench
@needs_chp
@pytest.mark.skipif(not shutil.which("ab"), reason="apt-get install apache2-utils")
def test_requests_for_a_server_beside_configurable_http_proxy(tmp_path, capsys):
    def rate(port, connections):
        words = ["ab", "-q", "-c", str(connections), "-n", "2000", f"http://127.0.0.1:{port}/user/ada/api"]
        output = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        assert "Non-2xx" not in output and re.search(r"Failed requests: +0\n", output)
        return float(re.search(r"Requests per second: +([\d.]+)", output)[1])

    def server():
        """The port of a server: one for each proxy, as the number of connections between two addresses is limited."""
        port = minihub.free_port()
        opened.enter_context(serving(port, sys.executable, "-c", BENCH_SERVER, str(port)))
        return port

    with contextlib.ExitStack() as opened:
        front, api = minihub.free_port(), minihub.free_port()
        opened.enter_context(serving(front, CHP, "--ip", "127.0.0.1", "--port", str(front), "--api-port", str(api),
                                     "--default-target", f"http://127.0.0.1:{server()}"))
        hubs = []
        for workers in (1, 2):
            (tmp_path / str(workers)).mkdir()
            hubs.append(LiveHub(tmp_path / str(workers), "-w", str(workers), tick_interval=0).start())
            opened.callback(hubs[-1].stop_all)
            lead(hubs[-1], f"http://127.0.0.1:{server()}", "ada")
        ports = {"configurable-http-proxy": front, "1 worker": hubs[0].port, "2 workers": hubs[1].port}
        figures = {name: [max(rate(port, count) for _ in range(2)) for count in (1, 16, 64)]
                   for name, port in ports.items()}
        before = cpu_of(*hubs[0].workers()), cpu_of(carrier_of(hubs[0]))
        rate(hubs[0].port, 16)
        after = cpu_of(*hubs[0].workers()), cpu_of(carrier_of(hubs[0]))
    with capsys.disabled():
        print("\nrequests/s with so many connections    1     16     64")
        for name, rates in figures.items():
            print(f"{name:32}", *(f"{figure:6.0f}" for figure in rates))
        print("ms of CPU for a request: worker {:.2f}, carrier {:.2f}".format(
            *((end - begin) / 2 for begin, end in zip(before, after))))


@pytest.mark.bench
def test_600_idle_websockets_and_the_echoes_of_200(live, tmp_path, capsys):
    def times(count):
        for _ in range(count):
            for connection in sockets[:200]:
                begin = time.perf_counter()
                connection.send("x")
                connection.recv()
                yield time.perf_counter() - begin

    hub = start_echo(live, tmp_path)
    with contextlib.ExitStack() as opened, capsys.disabled():
        sockets = [opened.enter_context(contextlib.closing(websocket_to(hub))) for _ in range(200)]
        echoes = sorted(times(10))
        print(f"\nan echo of one of 200 websockets: p50 {echoes[1000] * 1000:.2f} ms, p99 {echoes[1980] * 1000:.2f} ms")
        sockets += [opened.enter_context(contextlib.closing(websocket_to(hub))) for _ in range(400)]
        carrier = carrier_of(hub)
        before = cpu_of(carrier)
        time.sleep(10)
        used, memory = cpu_of(carrier) - before, memory_of(carrier) / MEGABYTE
        print(f"600 idle websockets: {memory:.1f} MB, {used * 10:.2f} % CPU")
        assert memory < 25


########################################################################################################
# 8. WSGI hosts and proxies
########################################################################################################


def request_environ(**more):
    """The environ of a request to ada's server, as gunicorn makes it."""
    return {"REQUEST_METHOD": "GET", "SCRIPT_NAME": "", "PATH_INFO": "/user/ada/x", "QUERY_STRING": "",
            "SERVER_PROTOCOL": "HTTP/1.1", "SERVER_NAME": "127.0.0.1", "SERVER_PORT": "8000", "HTTP_HOST": "lab:8000",
            "REMOTE_ADDR": "10.9.8.7", "wsgi.url_scheme": "http", "wsgi.multithread": False, "wsgi.multiprocess": False,
            "wsgi.input": io.BytesIO(), **more}


def head_of(length=None, protocol="HTTP/1.1", trusted=("127.0.0.1",), **more):
    """The lines of the head that the user's server gets."""
    environ = request_environ(**more)
    head = minihub.request_head(environ, minihub.Client.of(environ, trusted), length, protocol)
    assert head.endswith(b"\r\n\r\n")
    return head.decode("latin-1")[:-4].split("\r\n")


FORWARDED = ["X-Forwarded-For: 10.9.8.7", "X-Forwarded-Proto: http", "X-Forwarded-Host: lab:8000"]


def test_a_request_is_passed_on_with_its_headers_and_closes_its_connection():
    assert head_of(5, REQUEST_METHOD="POST", HTTP_ACCEPT="*/*", HTTP_X_XSRFTOKEN="a", CONTENT_TYPE="text/plain") == [
        "POST /user/ada/x HTTP/1.1", "Host: lab:8000", "Accept: */*", "X-Xsrftoken: a", "Content-Type: text/plain",
        "Content-Length: 5", *FORWARDED, "Connection: close"]


def test_hop_by_hop_and_forwarding_headers_of_the_client_are_dropped():
    names = ("CONNECTION KEEP_ALIVE PROXY_CONNECTION PROXY_AUTHENTICATE PROXY_AUTHORIZATION TE TRAILER"
             " TRANSFER_ENCODING UPGRADE EXPECT CONTENT_LENGTH X_FORWARDED_PORT X_FORWARDED_PREFIX X_SCHEME X_REAL_IP"
             " FORWARDED")
    assert head_of(**{f"HTTP_{name}": "said by the client" for name in names.split()}) == [
        "GET /user/ada/x HTTP/1.1", "Host: lab:8000", *FORWARDED, "Connection: close"]


@pytest.mark.parametrize(("name", "value"), [
    *[("HTTP_X_A", value) for value in ("1\r\nX-B: 2", "1\nX-B: 2", "1\rX-B: 2", "1\0")],
    *[(name, "1") for name in ("HTTP_CONTENT_LENGTH ", "HTTP_X_A:", "HTTP_X\tA", "HTTP_X_\u00e9")],
    *[(name, "a\nb") for name in ("HTTP_HOST", "HTTP_COOKIE", "CONTENT_TYPE", "REQUEST_METHOD")]])
def test_no_header_can_hold_another(name, value):
    with pytest.raises(minihub.BadRequest):
        head_of(**{name: value})


@pytest.mark.parametrize("path, raw, query, target", [
    *[("/user/ada/x", raw, "", "/user/ada/x") for raw in ("/user/ada/x", "http://lab/user/ada/x", "/user/bob/x")],
    ("/user/ada/a/b c\xc3\xa9", "/user/ada/a%2Fb%20c%C3%A9?q=1", "q=1", "/user/ada/a%2Fb%20c%C3%A9?q=1"),
    ("/user/ada/a b", "", "", "/user/ada/a%20b"), ("/user/ada/\xc3\xa9", None, "", "/user/ada/%C3%A9"),
    ("/user/ada/x-y%/..", "/us%65r/%61da/x%2Dy%25/%2e%2e", "", "/user/ada/x-y%25/%2e%2e"),
    ("/user/ada/x y", "/user/ada/x y", "", "/user/ada/x%20y"),
    ("/user/ada/\r\nX: 1", "/user/ada/%0D%0AX:%201", "", "/user/ada/%0D%0AX:%201"),
    ("/user/ada/~!$&'()*+,;=:@", None, "", "/user/ada/~!$&'()*+,;=:@"),
    ("/user/ada/x", "/user/ada/x", "a=%2F&b=+&&c=;~*'()\"<>[]{}|^`\\", "/user/ada/x?a=%2F&b=+&&c=;~*'()\"<>[]{}|^`\\"),
    ("/user/ada/x", "/user/ada/x", "a= \r\nX: 1", "/user/ada/x?a=%20%0D%0AX:%201")])
def test_the_request_target_is_what_the_client_sent(path, raw, query, target):
    more = {} if raw is None else {"RAW_URI": raw}
    assert minihub.request_target(request_environ(PATH_INFO=path, QUERY_STRING=query, **more)) == target


@pytest.mark.parametrize("script, raw, target", [
    ("/lab", "/lab/user/ada/x", "/lab/user/ada/x"), ("/lab", "/la%62/user/ada/x", "/lab/user/ada/x"),
    ("/\xc3\xbc/b", "/%c3%bc/b/user%2fada/%78", "/%C3%BC/b/user%2fada/x"),
    ("/\xc3\xbc/b", "/%c3%bc%2Fb/user/ada/x", "/%C3%BC/b/user/ada/x"),
    ("/a+b@c", "/a+b%40c/user/ada/x", "/a%2Bb@c/user/ada/x"), ("/a+b", "", "/a%2Bb/user/ada/x")])
def test_the_mount_point_in_the_request_target_has_one_spelling(script, raw, target):
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
    (("127.0.0.1",), "::ffff:127.0.0.1", {"FOR": "6.6.6.6"}, ("6.6.6.6", "http", "lab:8000")),
    (("::1",), "::1", {"FOR": "2001:db8::1"}, ("2001:db8::1", "http", "lab:8000")),
    (("127.0.0.1",), "", {"FOR": "6.6.6.6"}, ("6.6.6.6", "http", "lab:8000")),
    (("127.0.0.1",), "no address", {"FOR": "6.6.6.6"}, ("no address", "http", "lab:8000"))])
def test_forwarding_headers_are_believed_from_trusted_proxies_only(trusted, peer, forwarded, client):
    said = {f"HTTP_X_FORWARDED_{key}": value for key, value in forwarded.items()}
    assert minihub.Client.of(request_environ(REMOTE_ADDR=peer, **said), trusted) == minihub.Client(*client)


def test_a_server_hears_of_the_client_from_a_trusted_proxy_and_of_the_peer_from_others():
    said = {"HTTP_X_FORWARDED_FOR": "6.6.6.6", "HTTP_X_FORWARDED_PROTO": "https", "HTTP_X_FORWARDED_HOST": "good"}
    assert head_of(trusted=["10.9.8.7"], **said)[1:] == [
        "Host: good", "X-Forwarded-For: 6.6.6.6", "X-Forwarded-Proto: https", "X-Forwarded-Host: good",
        "Connection: close"]
    assert head_of(trusted=[], **said)[1:] == ["Host: lab:8000", *FORWARDED, "Connection: close"]


@pytest.mark.parametrize("header, left", [
    ("a=1; jupyterhub-hub-login=s; b=2", "a=1; b=2"), ("jupyterhub-hub-login=s", ""), ("", ""),
    ("jupyterhub-services=s;a=1", "a=1"), (" jupyterhub-hub-login = s", ""), ("a=1,jupyterhub-hub-login=s; b=2", "b=2"),
    ("jupyterhub-session-id=1; jupyterhub-user-ada=t", "jupyterhub-session-id=1; jupyterhub-user-ada=t"),
    ("my-jupyterhub-hub-login=1; a=jupyterhub-hub-login", "my-jupyterhub-hub-login=1; a=jupyterhub-hub-login")])
def test_cookies_of_the_hub_are_stripped(header, left):
    assert minihub.strip_cookies(header, minihub.HUB_COOKIES) == left


@pytest.mark.parametrize("length", ["-1", "+5", "5, 5", "0x5", "\u0665", "9" * 19, "5 "])
def test_a_content_length_that_is_no_number_is_refused(length):
    with pytest.raises(minihub.BadRequest):
        minihub.content_length(request_environ(CONTENT_LENGTH=length))


def test_a_chunked_body_without_an_end_and_one_that_is_too_long_are_refused(monkeypatch):
    host = minihub.host_of(request_environ(HTTP_TRANSFER_ENCODING="chunked"))
    with pytest.raises(minihub.BadRequest):
        minihub.spooled_body(host)
    monkeypatch.setattr(minihub, "SPOOL_LIMIT", 10)
    host.environ.update({"wsgi.input_terminated": True, "wsgi.input": io.BytesIO(b"x" * 21)})
    with pytest.raises(minihub.TooLarge):
        minihub.spooled_body(host)


def test_a_server_gets_the_clients_headers_but_those_for_one_connection_or_with_underscores(carried):
    got = echoed(carried, headers={
        "Connection": "keep-alive, Upgrade, X-Mine", "Keep-Alive": "5", "X-Mine": "1", "TE": "trailers",
        "Upgrade": "h2c", "Proxy-Authorization": "x", "X-Yours": "2", "X_Forwarded_For": "6.6.6.6",
        "Content_Length": "5", "Transfer_Encoding": "chunked", "X_Theirs": "3"})
    assert dict(got["headers"]) == {
        "Host": f"127.0.0.1:{carried.port}", "Accept-Encoding": "identity", "X-Yours": "2", "Connection": "close",
        "X-Forwarded-For": "127.0.0.1", "X-Forwarded-Proto": "http", "X-Forwarded-Host": f"127.0.0.1:{carried.port}"}


def test_the_hubs_and_the_sites_cookies_do_not_reach_a_server_and_it_cannot_set_them(either):
    secrets = "".join(f"{name}=secret; " for name in (*minihub.SITE_COOKIES, *minihub.HUB_COOKIES))
    cookies = {"Cookie": f"{secrets}jupyterhub-session-id=1; _xsrf=1"}
    response = either.request("GET", "/user/ada/echo", headers=cookies)
    headers = json.loads(response.body)["headers"]
    assert dict(headers)["Cookie"] == "jupyterhub-session-id=1; _xsrf=1" and "secret" not in json.dumps(headers)
    assert response.headers.get_all("Set-Cookie") == ["mine=1; Path=/user/"]


def test_a_token_of_the_hubs_reaches_a_server_as_one_that_is_good_for_this_server_only(carried):
    got = echoed(carried, path=f"?a=1&token={carried.token}", headers={"Authorization": f"token {carried.token}"})
    seen = dict(got["headers"])["Authorization"].split()[1]
    assert carried.token not in json.dumps(got) and got["uri"] == f"/user/ada/echo?a=1&token={seen}"
    assert carried.api("GET", "/user", seen)[1]["name"] == "ada" and carried.api("GET", "/users/ada", seen)[0] == 403


#: Each starts a WSGI server in this process, and returns its port, and how to run and to end it.
def wsgiref_server(app):
    quiet = type("Quiet", (wsgiref.simple_server.WSGIRequestHandler,), {"log_message": lambda *args: None})
    server = wsgiref.simple_server.make_server("127.0.0.1", 0, app, handler_class=quiet)
    return server.server_port, lambda: server.serve_forever(0.02), lambda: (server.shutdown(), server.server_close())


def werkzeug_server(app):
    serving = pytest.importorskip("werkzeug.serving", reason="pip install werkzeug")
    quiet = type("Quiet", (serving.WSGIRequestHandler,), {"log": lambda *args: None})
    server = serving.make_server("127.0.0.1", 0, app, threaded=True, request_handler=quiet)
    return server.port, lambda: server.serve_forever(0.02), lambda: (server.shutdown(), server.server_close())


def waitress_server(app):
    waitress = pytest.importorskip("waitress.server", reason="pip install waitress")
    server = waitress.create_server(app, host="127.0.0.1", port=0, threads=4, clear_untrusted_proxy_headers=False)
    return server.effective_port, server.run, lambda: (server.close(), server.task_dispatcher.shutdown())


def cheroot_server(app):
    wsgi = pytest.importorskip("cheroot.wsgi", reason="pip install cheroot")
    server = wsgi.Server(("127.0.0.1", 0), app, numthreads=4)
    server.prepare()
    return server.bind_addr[1], server.serve, server.stop


@contextlib.contextmanager
def in_process(make_server, hub):
    """The hub in one of these servers."""
    def run():
        with contextlib.suppress(OSError):  # waitress is closed while it waits
            serve()

    port, serve, end = make_server(hub)
    threading.Thread(target=run, daemon=True).start()
    host = types.SimpleNamespace(port=port, tls=None)
    host.request = functools.partial(LiveHub.request, host)
    try:
        yield host
    finally:
        end()


def readme_command(name):
    """The words of the README's command line with that name, whose files are those of this Python."""
    line, = re.findall(rf"^    {name} .*$", README, re.MULTILINE)
    name, *words = shlex.split(line)
    return shutil.which(name, path=Path(sys.executable).parent), words  # Debian's uWSGI lacks its Python plugin


class InUWSGI(LiveHub):
    """The hub in uWSGI, started as the README says. Options are added."""

    listens = "--http-socket"

    @property
    def words(self):
        program, words = readme_command("uwsgi")
        if not program:
            pytest.skip("pip install pyuwsgi")
        assert words[:2] == ["--http-socket", "127.0.0.1:8000"]
        address = f"127.0.0.1:{self.port}"
        return [program, self.listens, address, *words[2:], "--binary-path", sys.executable, *self.options]


class InUWSGIBehindItsRouter(InUWSGI):
    """The same, but with another process of uWSGI's between clients and workers."""

    listens = "--http"


carried_by_uwsgi = carrying_fixture(kind=InUWSGI)


class InModWSGI(LiveHub):
    """The hub in Apache, started as the README says. Apache refuses to be root, but may read and write like root."""

    @property
    def words(self):
        program, words = readme_command("mod_wsgi-express")
        if not program:
            pytest.skip("apt-get install apache2 apache2-dev gcc python3-dev && pip install mod_wsgi")
        (self.folder / "hub.conf").write_text(readme_text("WSGIPassAuthorization", "apache"))
        words[words.index("8000")] = str(self.port)
        not_root = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=+dac_override",
                    "--ambient-caps=+dac_override"] if os.geteuid() == 0 else []
        folder = str(self.folder / "apache")
        return [*not_root, program, *words, "--server-root", folder, "--log-to-terminal", *self.options]


in_mod_wsgi = carrying_fixture(kind=InModWSGI)


def make_certificate(folder):
    """Put a certificate for this machine, which nobody trusts yet, and its key into a folder: tls.pem and tls.key."""
    if not OPENSSL:
        pytest.skip("apt-get install openssl")
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout tls.key -out tls.pem -addext".split()
    subprocess.run([OPENSSL, *words, "subjectAltName=DNS:localhost,IP:127.0.0.1"], cwd=folder, check=True,
                   capture_output=True)


class WithTLS(LiveHub):
    """A gunicorn that ends TLS itself, with a certificate for this machine that its servers are told to trust."""

    def __init__(self, folder, *options, **settings):
        make_certificate(folder)
        files = ("--keyfile", "tls.key", "--certfile", "tls.pem")
        super().__init__(folder, *files, *options, env_keep="SSL_CERT_FILE", **settings)
        self.tls = ssl.create_default_context(cafile=folder / "tls.pem")

    @property
    def environ(self):
        return {**super().environ, "SSL_CERT_FILE": str(self.folder / "tls.pem")}


@pytest.fixture(scope="module")
def at_home(tmp_path_factory):
    """A hub in this process with ada's echo server, which closes connections that are silent for half a second."""
    pytest.importorskip("tornado", reason="pip install '.[classroom]'")
    folder = tmp_path_factory.mktemp("at_home")
    (folder / "echo.py").write_text(ECHO_SERVER)
    hub = people(Hub(database=f"sqlite:///{folder / 'hub.sqlite'}", cmd=f"{sys.executable} {folder / 'echo.py'}",
                     homes=str(folder / "homes"), run_dir=str(folder / "run"), tick_interval=0, proxy_idle_timeout=0.5))
    with hub.store.connected():
        server = server_of(hub)
        hub.servers.start(server)
        wait_for(lambda: hub.servers.observe(server).status == "ready")
    yield hub
    with hub.store.connected():
        minihub.SubprocessSpawner.stop(hub.servers.life_cycle.spawner, server.state, now=True)
    hub.close()


#: The README's name of each host, and how to run a hub with ada's echo server in it.
HOSTS = {
    "gunicorn, sync workers": lambda hub, folder: carrying(folder),
    "gunicorn, `--threads` (gthread)": lambda hub, folder: carrying(folder, "--threads", "4"),
    "gunicorn, `--worker-class gevent`": lambda hub, folder: carrying(folder, "--worker-class", "gevent"),
    "waitress": lambda hub, folder: in_process(waitress_server, hub),
    "wsgiref (one thread)": lambda hub, folder: in_process(wsgiref_server, hub),
    "werkzeug's server (Flask's development server)": lambda hub, folder: in_process(werkzeug_server, hub),
    "cheroot": lambda hub, folder: in_process(cheroot_server, hub),
    "uWSGI, `--http-socket`": lambda hub, folder: carrying(folder, kind=InUWSGI),
    "uWSGI, `--http`": lambda hub, folder: carrying(folder, kind=InUWSGIBehindItsRouter),
    "mod_wsgi (mod_wsgi-express)": lambda hub, folder: carrying(folder, kind=InModWSGI),
    "gunicorn, `--threads` and TLS (`--certfile`)": lambda hub, folder: carrying(folder, "--threads=4", kind=WithTLS),
}


def carries_websockets(host):
    """Whether a websocket echoes; if not, the response must say why and what to do."""
    import websocket

    try:
        with contextlib.closing(websocket_to(host)) as connection:
            connection.send("hello")
            return connection.recv() == "hello"
    except websocket.WebSocketBadStatusException as error:
        assert error.status_code == 501 and b"carry websockets, which notebooks need. Run the hub" in error.resp_body
        return False


def hosts_in_the_readme():
    """The README's table of hosts: whether each has the API, pages, servers over HTTP, and websockets."""
    table = re.search(r"^\| server \| API .*\n.*\n((?:\|.*\n)+)", README, re.MULTILINE)[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {name: [cell == "yes" for cell in cells] for name, *cells in rows}


@pytest.mark.parametrize("name", HOSTS)
def test_the_readmes_table_of_hosts_is_what_was_measured(name, at_home, tmp_path):
    if "gevent" in name:
        pytest.importorskip("gevent", reason="pip install gevent")
    assert hosts_in_the_readme().keys() == HOSTS.keys()
    with HOSTS[name](at_home, tmp_path) as host:
        assert hosts_in_the_readme()[name] == [
            b"version" in host.request("GET", "/hub/api/").body, b"Sign in" in host.request("GET", "/hub/login").body,
            host.request("GET", "/user/ada/download?size=3000000").body == b"x" * 3000000
            and b'"count": 300000,' in host.request("POST", "/user/ada/upload", b"x" * 300000).body,
            carries_websockets(host)]


def test_the_router_of_uwsgi_carries_websockets_if_told_to(tmp_path):
    with carrying(tmp_path, "--http-websockets", kind=InUWSGIBehindItsRouter) as hub:
        assert carries_websockets(hub)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 65536, 3 * MEGABYTE])
def test_uwsgi_passes_on_uploads_of_any_length(carried_by_uwsgi, size):
    body = os.urandom(size)
    response = json.loads(carried_by_uwsgi.request("POST", "/user/ada/upload", body).body)
    assert response == {"count": size, "sha256": hashlib.sha256(body).hexdigest()}
    assert not re.search("error|broken pipe|sigpipe", carried_by_uwsgi.log.read_text(), re.IGNORECASE)


def test_an_upload_that_uwsgi_has_read_already_arrives_whole(tmp_path):
    with carrying(tmp_path, "--post-buffering", "10000", kind=InUWSGI) as hub:
        for size in (5000, 20000):
            assert json.loads(hub.request("POST", "/user/ada/upload", b"x" * size).body)["count"] == size


def test_in_uwsgi_no_response_is_chunked_as_nginx_would_pass_on_the_chunks(carried_by_uwsgi):
    response = carried_by_uwsgi.request("GET", "/user/ada/download?size=100000")
    assert (response.getheader("Transfer-Encoding"), response.body) == (None, b"x" * 100000)


@pytest.fixture
def uwsgi(monkeypatch):
    """The module that a program in a uWSGI worker imports."""
    module = types.SimpleNamespace(opt={}, has_threads=1, connection_fd=lambda: 7)
    module.worker_id, module.masterpid = lambda: 1, lambda: 5
    monkeypatch.setitem(sys.modules, "uwsgi", module)
    monkeypatch.setattr(os, "register_at_fork", lambda **hooks: None)  # hooks cannot be unregistered
    return module


@pytest.mark.parametrize(("options", "more", "number"), [
    ("", {}, 7), ("http", {"UWSGI_ROUTER": "http"}, 7), ("https-socket", {}, None), ("suwsgi-socket", {}, None),
    ("gevent", {"x-wsgiorg.fdevent.readable": print}, None), ("", {"SERVER_PROTOCOL": "HTTP/2.0"}, None),
    *[(options, {"HTTP_CONNECTION": "Upgrade", "HTTP_UPGRADE": "websocket", "UWSGI_ROUTER": "http"}, number)
      for options, number in (("http", None), ("http http-websockets", 7), ("http http-raw-body", 7))]])
def test_uwsgi_lends_plain_sockets_of_requests_that_are_threads_but_not_if_its_router_stops_listening(
        uwsgi, options, more, number):
    uwsgi.opt = dict.fromkeys(options.split(), True)
    assert minihub.host_of(request_environ(**{"uwsgi.version": b"2.0", **more})).socket_number() == number


class TLSSocket(ssl.SSLSocket):
    """One that is not connected."""

    __init__, family = object.__init__, socket.AF_INET


def test_nothing_but_a_plain_socket_for_one_request_is_lent(tmp_path):
    with open(tmp_path / "body", "w+b") as body, socket.socket() as plain:
        assert minihub.host_of(request_environ(**{"gunicorn.socket": plain})).socket_number() == plain.fileno()
        for environ in ({"gunicorn.socket": TLSSocket()}, {"wsgi.input": body}, {"wsgi.input": None},
                        {"gunicorn.socket": plain, "SERVER_PROTOCOL": "HTTP/2.0"}):
            assert minihub.host_of(request_environ(**environ)).socket_number() is None


UNIX = types.SimpleNamespace(family=socket.AF_UNIX)
APACHE = {"mod_wsgi.version": (5, 0), "mod_wsgi.listener_host": "", "mod_wsgi.listener_port": "8080"}


@pytest.mark.parametrize("more, address", [
    ({}, "http://127.0.0.1:8000"), ({"SERVER_NAME": "::", "wsgi.url_scheme": "https"}, "https://[::1]:8000"),
    ({"gunicorn.socket": UNIX}, None), ({"gunicorn.socket": TLSSocket()}, "https://127.0.0.1:8000"),
    ({"gunicorn.socket": types.SimpleNamespace(family=2), "wsgi.url_scheme": "https"}, "http://127.0.0.1:8000"),
    ({"uwsgi.version": b"2.0", "wsgi.url_scheme": "https"}, "http://127.0.0.1:8000"),
    ({"uwsgi.version": b"2.0", "HTTPS": "on"}, "https://127.0.0.1:8000"),
    ({**APACHE, "SERVER_NAME": "evil", "SERVER_PORT": "1"}, "http://127.0.0.1:8080")])
def test_each_host_knows_the_address_that_servers_reach_it_at(uwsgi, more, address):
    assert minihub.host_of(request_environ(**more)).own_address == address


@pytest.mark.parametrize("more", [{}, {"werkzeug.socket": UNIX}, APACHE])
def test_other_hosts_than_gunicorn_and_uwsgi_cannot_be_ended(more):
    assert minihub.host_of(request_environ(**more)).end() is False


def test_a_listening_address_is_found(tmp_path):
    assert run_python("""
import minihub, socket
before = minihub.listening_address()
with socket.create_server(("0.0.0.0", 0)) as server:
    print(before, minihub.listening_address() == f"http://127.0.0.1:{server.getsockname()[1]}")
""", tmp_path) == "None True"


def json_post(path, rest, authorization=""):
    """The beginning of a POST, with what is sent of its body."""
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{authorization}".encode() + rest


HALF_BODY, HALF_CHUNK = b"Content-Length: 99\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n5\r\n{"
SIGN_IN = "/hub/api/authorizations/token"

#: What clients send before they fall silent, or send a byte from time to time.
HALF_REQUESTS = {
    "half a head": b"GET /hub/health HTTP/1.1\r\nHost: x\r\nA: ", "half a body": json_post(SIGN_IN, HALF_BODY),
    "half a body that nobody reads": json_post("/hub/api/users", HALF_BODY),
    "half a chunk": json_post(SIGN_IN, HALF_CHUNK), "half an upload": json_post("/user/ada/upload", HALF_CHUNK)}


class Impatient(LiveHub):
    """A gunicorn that waits for its clients for half a second."""

    app = "impatient:app"

    def start(self):
        code = "import minihub\nminihub.CLIENT_PATIENCE = 0.5\nfrom minihub import app"
        (self.folder / "impatient.py").write_text(code)
        return super().start()

    def delay(self):
        """How long a client waits for its response, in seconds."""
        began = time.monotonic()
        assert self.request("GET", "/hub/health").status == 200
        return time.monotonic() - began


@contextlib.contextmanager
def silent_clients(hub, beginnings, drips=False):
    """Connections on which no more than that is sent, or now and then a byte."""
    def drip():
        while not done.wait(0.1):
            for client in clients:
                with contextlib.suppress(OSError):
                    client.send(b"a")

    with contextlib.ExitStack() as opened:
        clients, done = [opened.enter_context(connect(hub)) for _ in beginnings], threading.Event()
        opened.callback(done.set)
        for client, beginning in zip(clients, beginnings):
            client.sendall(beginning)
        if drips:
            threading.Thread(target=drip, daemon=True).start()
        yield clients


@pytest.mark.parametrize("options", ["--preload", "--threads 4"])
def test_clients_that_fall_silent_delay_others_by_a_deadline_each_and_harm_no_worker_and_no_notebook(tmp_path, options):
    threads = 4 if "threads" in options else 1
    with carrying(tmp_path, *options.split(), kind=Impatient) as hub, contextlib.closing(websocket_to(hub)) as notebook:
        workers, beginnings = hub.workers(), list(HALF_REQUESTS.values())
        with silent_clients(hub, [b""] * 40):
            assert hub.delay() < 0.4
        steady = (time.sleep(0.1) or bytes(20000) for _ in range(12))
        assert json.loads(hub.request("POST", "/user/ada/upload", steady).body)["count"] == 240000
        for drips in (False, True):
            with silent_clients(hub, beginnings, drips):
                assert hub.delay() < math.ceil(len(beginnings) / threads) + 1
        notebook.send("hello")
        assert notebook.recv() == "hello" and hub.workers() == workers
        log = hub.log.read_text()
        assert log.count("keeps the hub waiting: ('127.0.0.1'") >= 4 and "Traceback" not in log


def test_a_client_that_is_too_slow_with_its_body_is_told_so(tmp_path, live):
    hub = live(kind=Impatient)
    for beginning in (json_post(SIGN_IN, HALF_BODY), json_post(SIGN_IN, HALF_CHUNK)):
        with silent_clients(hub, [beginning], drips=True) as (client,):
            head, _, body = read_all(client).partition(b"\r\n\r\n")
        message = "The request's body did not arrive in time. One that takes long needs a Content-Length"
        assert head.startswith(b"HTTP/1.1 408 ") and json.loads(body) == {"status": 408, "message": message}


def test_one_half_request_costs_others_at_most_five_seconds(live):
    hub = live()
    for beginning in (HALF_REQUESTS["half a head"], HALF_REQUESTS["half a body"]):
        with silent_clients(hub, [beginning]):
            began = time.monotonic()
            hub.request("GET", "/hub/health")
            assert 3 < time.monotonic() - began < 5


def test_clients_that_do_not_close_their_connections_do_not_keep_gunicorn_from_others(live):
    hub = live("--threads", "4", kind=Impatient)
    with silent_clients(hub, [b"GET /hub/health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"] * 10):
        assert hub.delay() < 8  # gunicorn alone: 2 s for each


def test_a_connection_that_is_kept_alive_may_be_idle_for_longer(live):
    hub = live("--threads", "4", "--keep-alive", "20", kind=Impatient)
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", hub.port)) as connection:
        for pause in (1.2, 0):
            connection.request("GET", "/hub/health")
            connection.getresponse().read()
            time.sleep(pause)
    assert "waiting" not in hub.log.read_text()


def test_a_client_that_does_not_read_is_cut_off_and_one_that_reads_slowly_is_not(live):
    hub = live(kind=Impatient, admins="root")
    hub.command("link", "root", "--admin")
    token, workers = hub.command("token", "root"), hub.workers()
    names = [f"{number:0>250}" for number in range(10000)]  # 4 MB: the kernel's buffers take 2.6
    assert hub.api("POST", "/users", token, {"usernames": names})[0] == 201
    request = f"GET /hub/api/users HTTP/1.1\r\nHost: x\r\nAuthorization: token {token}\r\n\r\n".encode()

    def ask(opened):
        client = opened.enter_context(socket.socket())
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", hub.port))
        client.sendall(request)
        return client

    with contextlib.ExitStack() as opened:
        for _ in range(2):
            ask(opened)
        assert hub.delay() < 4
        client, began = ask(opened), time.monotonic()
        received = b"".join(iter(lambda: time.sleep(0.001) or client.recv(65536), b""))
        assert time.monotonic() - began > 1 and len(json.loads(received.partition(b"\r\n\r\n")[2])) == 10001
    assert hub.log.read_text().count("waiting") == 2 and hub.workers() == workers


def test_broken_chunks_are_refused_without_a_traceback(live):
    hub = live()
    with connect(hub) as client:
        client.sendall(json_post(SIGN_IN, b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello, you\r\n0\r\n\r\n"))
        assert b'{"status": 400, "message": "The body\'s chunks are broken, or end too early"}' in read_all(client)
    assert "Traceback" not in hub.log.read_text()


@pytest.mark.parametrize("options", ["", "--threads 4"])
def test_a_gunicorn_on_a_unix_socket_gives_up_silent_clients_too(tmp_path, options):
    class OnUnixSocket(Impatient):
        words = property(lambda self: [
            GUNICORN, self.app, "--bind=unix:hub.sock", "--no-control-socket", *self.options])

        def is_up(self):
            with contextlib.suppress(OSError):
                return self.ask()

        def ask(self, text=b"GET /hub/health HTTP/1.0\r\n\r\n"):
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(10)
                client.connect(str(tmp_path / "hub.sock"))
                client.sendall(text)
                return read_all(client)

    hub = OnUnixSocket(tmp_path, *options.split())
    try:
        hub.start()
        assert hub.ask(HALF_REQUESTS["half a head"]) == b""
        assert hub.ask(HALF_REQUESTS["half a body"]).startswith(b"HTTP/1.1 408 ")
        assert hub.ask().startswith(b"HTTP/1.0 200 OK")
    finally:
        hub.stop_all()


SITE = '''
import minihub, os, socket, threading, time
minihub.CLIENT_PATIENCE = 0.5
hub = minihub.Hub(base_url="/lab/")

def site(environ, start_response):
    time.sleep(1)
    start_response("200 OK", [("Content-Type", "text/plain")])
    options = [sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT) for _, sock in minihub.own_sockets()
               if sock.family == socket.AF_INET]
    return [repr((options, [thread.name for thread in threading.enumerate() if "watch" in thread.name])).encode()]

app = hub.wrap(site)
'''


@pytest.mark.parametrize("options", ["", "--threads 4"])
def test_a_sites_own_sockets_are_left_alone_though_the_hubs_bodies_have_a_deadline(live, tmp_path, options):
    (tmp_path / "site_with_hub.py").write_text(SITE)
    hub = live(*options.split(), kind=type("Site", (LiveHub,), {"app": "site_with_hub:app", "prefix": "/lab"}))
    with silent_clients(hub, [b"GET / HTTP/1.1\r\nHost: x\r\n"]) as (client,):
        time.sleep(1.2)
        client.sendall(b"Connection: close\r\n\r\n")
        assert b"([0, 0], [])" in read_all(client)
    with silent_clients(hub, [json_post(f"/lab{SIGN_IN}", HALF_BODY)]) as (client,):
        assert read_all(client).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("make_server", [wsgiref_server, werkzeug_server])
def test_bodies_have_a_deadline_in_every_host_that_lends_its_sockets(at_home, monkeypatch, make_server):
    monkeypatch.setattr(minihub, "CLIENT_PATIENCE", 0.3)
    with in_process(make_server, at_home) as host, silent_clients(host, [json_post(SIGN_IN, HALF_BODY)]) as (client,):
        assert b" 408 Request Timeout\r\n" in read_all(client)


def test_bodies_have_a_deadline_in_uwsgi(carried_by_uwsgi):
    with silent_clients(carried_by_uwsgi, [json_post(SIGN_IN, HALF_BODY)]) as (client,):
        assert read_all(client).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("threads, rate, accepted", [(True, 50, True), (True, 200, False), (False, 50, False)])
def test_a_chunked_upload_may_take_longer_as_long_as_it_goes_on_and_others_have_threads(
        monkeypatch, threads, rate, accepted):
    monkeypatch.setattr(minihub, "CLIENT_PATIENCE", 0.2)
    monkeypatch.setattr(minihub, "LONGEST_WAIT", 0.4)
    monkeypatch.setattr(minihub, "SLOWEST_UPLOAD", rate)
    near, far = socket.socketpair()

    def send():
        for _ in range(10):
            time.sleep(0.1)
            with contextlib.suppress(OSError):
                far.sendall(bytes(10))
        far.close()

    sender = threading.Thread(target=send)
    with near, far, near.makefile("rb", buffering=0) as body:
        environ = {"werkzeug.socket": near, "wsgi.input": body, "wsgi.input_terminated": True}
        host = minihub.host_of(request_environ(
            HTTP_TRANSFER_ENCODING="chunked", **{**environ, "wsgi.multithread": threads}))
        sender.start()
        with contextlib.nullcontext() if accepted else pytest.raises(minihub.TooSlow):
            with minihub.spooled_body(host) as spool:
                assert spool.tell() == 100
        sender.join()


def test_a_deadline_shuts_no_other_socket_that_has_got_the_same_number(caplog):
    near, far = socket.socketpair()
    deadline = minihub.Deadline(near.fileno(), 0)
    number = near.detach()
    with far, socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as other:
        os.dup2(other.fileno(), number)
        deadline.enforce()
        assert deadline.is_over and not caplog.records
        os.close(number)
        deadline.is_over = False
        deadline.enforce()


def test_mod_wsgi_passes_on_what_apache_keeps_by_default(in_mod_wsgi):
    basic = {"Authorization": "Basic YWRhOnNlY3JldA=="}
    got = echoed(in_mod_wsgi, "POST", "/a%2Fb%20c?d=%2F", iter([b"bo", b"dy"]), basic)
    assert (got["uri"], got["body"]) == ("/user/ada/echo/a%2Fb%20c?d=%2F", "body")
    assert dict(got["headers"])["Authorization"] == basic["Authorization"]


@pytest.fixture(scope="module", params=[wsgiref_server, werkzeug_server, waitress_server, cheroot_server])
def host(request, at_home):
    """The hub in each kind of WSGI server."""
    with in_process(request.param, at_home) as host:
        yield host


@pytest.fixture(scope="module")
def waitress(at_home):
    """The hub in a WSGI server that does not lend the client's socket."""
    with in_process(waitress_server, at_home) as host:
        yield host


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_other_hosts_carry_every_method_without_cookies_of_the_hub(host, method):
    cookies = {"Cookie": "jupyterhub-hub-login=x; mine=1"}
    response = host.request(method, "/user/ada/echo/a%20b?c=%2F", b"body", cookies)
    got = json.loads(response.body)
    assert (got["method"], got["uri"], got["body"]) == (method, "/user/ada/echo/a%20b?c=%2F", "body")
    assert dict(got["headers"])["Cookie"] == "mine=1"
    assert response.headers.get_all("Set-Cookie") == ["mine=1; Path=/user/"]


def test_other_hosts_pass_on_lengths_and_responses_without_a_body(host):
    head = host.request("HEAD", "/user/ada/echo")
    assert (head.status, head.body, head.getheader("Content-Type")) == (200, b"", "application/json; charset=UTF-8")
    assert [host.request("GET", f"/user/ada/status?code={code}").status for code in (204, 304, 418)] == [204, 304, 418]
    assert host.request("GET", "/user/ada/download?size=9&length=1").getheader("Content-Length") == "9"


@pytest.mark.parametrize(("response", "is_silent"), [
    *[(response, False) for response in (
        *BROKEN, b"HTTP/1.1 103 Hints\r\n\r\n" + OK, b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n")],
    (b"", True), (b"HTTP/1.1 200 OK\r\n", True)], ids=itertools.count())
def test_a_host_that_lends_no_socket_says_if_a_server_does_not_answer(waitress, at_home, scripted, response, is_silent):
    lead(at_home, scripted(response, hold=is_silent).address)
    assert waitress.request("GET", "/user/bob/lab", timeout=10).status == 503


def test_a_host_that_lends_no_socket_drops_hub_cookies_behind_a_bare_lf(waitress, at_home, scripted):
    lead(at_home, scripted(HIDDEN).address)
    response = waitress.request("GET", "/user/bob/api")
    assert (response.status, response.getheader("X-A"), response.getheader("Set-Cookie")) == (200, "b", None)


CHUNK = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n"


@pytest.mark.parametrize(("response", "is_silent"), [
    (CHUNK, False), (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", True)], ids=["broken off", "stopped"])
def test_a_host_that_lends_no_socket_breaks_off_with_the_response(waitress, at_home, scripted, response, is_silent):
    lead(at_home, scripted(response, hold=is_silent).address)
    with pytest.raises(http.client.IncompleteRead):
        waitress.request("GET", "/user/bob/lab", timeout=10)


@pytest.mark.parametrize("path, kind", [("/user/ada/lab", "text/html"), ("/user/ada/api", "application/json")])
def test_a_host_that_lends_no_socket_needs_several_threads_or_processes(at_home, path, kind):
    response = webtest.TestApp(at_home).get(path, status=503)
    assert response.content_type == kind and "Run the hub with gunicorn, or with more threads" in response.text
    webtest.TestApp(at_home).get(path, status=(200, 404), extra_environ={"wsgi.multiprocess": True})


that_lends_sockets = pytest.mark.parametrize("host", [wsgiref_server, werkzeug_server], indirect=True)


@that_lends_sockets
def test_a_host_that_lends_its_sockets_carries_websockets_with_a_single_thread(host, capsys):
    with contextlib.closing(websocket_to(host)) as one, contextlib.closing(websocket_to(host)) as other:
        for connection in (one, other, one):
            connection.send(b"\x00hello", 2)
            assert connection.recv() == b"\x00hello"
        assert host.request("GET", "/hub/api/").status == 200
    assert capsys.readouterr().err == ""  # the host finds no fault with its sockets taken away


@that_lends_sockets
def test_a_connection_that_is_silent_for_too_long_is_closed_and_one_that_is_not_stays(host):
    with contextlib.closing(websocket_to(host)) as silent, contextlib.closing(websocket_to(host)) as busy:
        began = time.monotonic()
        while time.monotonic() - began < 1:
            busy.send("hello")
            assert busy.recv() == "hello"
        assert read_all(silent.sock) == b""
        busy.send("still here")
        assert busy.recv() == "still here"


def test_routes_are_added_replaced_and_deleted(opened):
    proxy = opened.routes.proxy
    for target in ("http://h:1", "http://h:2"):
        proxy.add_route("/user/a%20b/", target, {"user": "a b"})
    assert proxy.get_all_routes() == {
        "/user/a%20b/": {"routespec": "/user/a%20b/", "target": "http://h:2", "data": {"user": "a b"}}}
    for _ in range(2):
        proxy.delete_route("/user/a%20b/")
        assert proxy.get_all_routes() == {}


def test_checking_the_routes_makes_them_the_wanted_ones(opened):
    proxy = opened.routes.proxy
    for prefix in ("/user/ada/", "/user/bob/", "/user/eve/"):
        proxy.add_route(prefix, "http://h:1", {})
    wanted = {prefix: {"routespec": prefix, "target": target, "data": {}} for prefix, target in (
        ("/user/ada/", "http://h:1"), ("/user/bob/", "http://h:2"), ("/user/new/", "http://h:2"))}
    proxy.check_routes(wanted, proxy.get_all_routes())
    assert proxy.get_all_routes() == wanted


@pytest.fixture
def chp(live, tmp_path):
    """A gunicorn that runs a real configurable-http-proxy, at the port `front`, and ada's echo server behind it."""
    front, api = minihub.free_port(), minihub.free_port()
    hub = start_echo(live, tmp_path, proxy="chp", chp_command=f"{CHP} --ip 127.0.0.1 --port {front}",
                     chp_api_url=f"http://127.0.0.1:{api}",
                     services='[{"name": "ops", "admin": true, "api_token": "ops-token"}]')
    hub.front, hub.chp_api = front, api
    wait_for(lambda: through(hub, "/user/ada/api") == 200 == through(hub, "/hub/login"), message="it has no routes")
    return hub


def through(hub, path):
    """The status of a page that is asked for through the proxy, None if that does not answer."""
    connection = http.client.HTTPConnection("127.0.0.1", hub.front, timeout=5)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", path)
        return connection.getresponse().status


def proxy_process(hub):
    return hub.facts("proxy_process")


@needs_chp
def test_a_real_proxy_carries_the_hub_and_routes_of_others_and_comes_back_when_it_is_killed(chp):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", chp.chp_api, timeout=5)) as connection:
        connection.request("POST", "/api/routes/foreign", json.dumps({"target": "http://127.0.0.1:9"}),
                           {"Authorization": f"token {chp.facts('proxy')['auth_token']}"})
        assert connection.getresponse().read() == b""
    assert chp.api("POST", "/proxy", "ops-token")[0] == 200 and through(chp, "/foreign") == 503
    routes = chp.api("GET", "/proxy", "ops-token")[1]
    assert routes.keys() == {"/", "/user/ada/"}
    assert routes["/user/ada/"]["data"]["user"] == "ada" and routes["/user/ada/"]["data"]["last_activity"]
    assert routes["/"]["data"]["hub"] is True and routes["/"]["target"] == chp.url
    assert carries_websockets(types.SimpleNamespace(port=chp.front, tls=None))
    os.killpg(proxy_process(chp)["pid"], signal.SIGKILL)
    wait_for(lambda: through(chp, "/user/ada/api") is None)
    assert chp.api("GET", "/proxy", "ops-token")[0] in (200, 503)
    wait_for(lambda: through(chp, "/user/ada/api") == 200, 30)


@needs_chp
def test_the_hub_moves_to_another_proxy(chp, tmp_path):
    front, api = minihub.free_port(), minihub.free_port()
    words = f"{CHP} --ip 127.0.0.1 --port {front} --api-ip 127.0.0.1 --api-port {api}".split()
    other = subprocess.Popen(words, env={**os.environ, "CONFIGPROXY_AUTH_TOKEN": "another-secret"},
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
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


def test_a_proxy_that_does_not_answer_loses_nothing(make_hub, spawner):
    hub = people(make_hub(proxy="chp", chp_api_url=f"http://127.0.0.1:{minihub.free_port()}"))
    root = api_of(hub, "root")
    root("POST", "/users/ada/server", status=201)
    for method in ("GET", "POST"):
        assert "does not answer" in root(method, "/proxy", status=503).json["message"]
    assert root("GET", "/users/ada").json["servers"][""]["ready"] and len(spawner.running) == 1
    root("DELETE", "/users/ada/server", status=204)


@pytest.mark.parametrize("given, added", [
    ("", ["--api-ip", "127.0.0.1", "--api-port", "7777", "--error-target", "http://hub/hub/error"]),
    ("--api-port=7777 --api-ip 127.0.0.1", ["--error-target", "http://hub/hub/error"]),
    ("--error-target http://other --api-port 7777", ["--api-ip", "127.0.0.1"])])
def test_the_proxys_command_gets_only_the_options_that_it_lacks(make_hub, tmp_path, given, added):
    program = tmp_path / "proxy.py"
    program.write_text("import sys\nopen(sys.argv[1], 'w').write(' '.join(sys.argv[2:]))")
    command = f"{sys.executable} {program} {tmp_path / 'words'} {given}"
    hub = make_hub(proxy="chp", chp_command=command, chp_api_url="http://127.0.0.1:7777")
    with hub.store.connected():
        hub.routes.proxy.keep_running("http://hub/hub/")
    assert wait_for(lambda: (tmp_path / "words").exists() and (tmp_path / "words").read_text()).split() == [
        *given.split(), *added]


########################################################################################################
# 9. The site and its people
########################################################################################################


@pytest.mark.database("sqlite")
@pytest.mark.parametrize(("host", "port", "address"), [
    ("127.0.0.1", 8000, "http://127.0.0.1:8000"), ("0.0.0.0", "80", "http://127.0.0.1:80"),
    ("::", 8000, "http://[::1]:8000"), ("10.0.0.5", 8000, "http://10.0.0.5:8000"), ("fe80::1", 1, "http://[fe80::1]:1"),
    ("localhost", 8000, "http://127.0.0.1:8000")])
def test_the_hub_is_reached_where_it_listens(host, port, address):
    assert minihub.local_address(host, port) == address


@pytest.mark.database("sqlite")
def test_links_made_before_the_first_request_lead_below_the_base_url(make_hub):
    hub = people(make_hub(base_url="/\u00fcben/", public_url="https://school.example"))
    with hub.store.connected():
        assert hub.sign_in.link_for(hub.people.find("ada")).startswith("https://school.example/%C3%BCben/hub/link/")


def test_the_mount_outlives_the_process_that_has_seen_it(make_hub, make_database):
    hub = make_hub(database=make_database())
    with hub.store.connected():
        hub.site.arrive(minihub.Mount("/lab/", "http://10.0.0.1:80"))
    again = make_hub(database=hub.settings.database)
    with again.store.connected():
        assert again.site.mount.base == "/lab/"


def test_configured_admins_are_there_from_the_start(make_hub, make_database):
    url = make_database()
    people(make_hub(database=url))
    hub = make_hub(database=url, admins=["Ada", "Grace"])
    with hub.store.connected():
        assert {user.name: user.admin for user in hub.people.list()[0]} == {
            "root": True, "ada": True, "bob": False, "grace": True}
        assert not hub.people.create("eve").admin


def test_one_of_several_requests_creates_the_users(hub):
    names = [f"user{number}" for number in range(20)]

    def create(number):
        with hub.store.connected():
            try:
                return [user.name for user in hub.people.create_many(names)]
            except minihub.Conflict as error:
                return error.message
            finally:
                hub.store.disconnect()

    answers = in_threads(4, create)
    assert sorted(map(str, answers)) == ["All 20 users already exist"] * 3 + [str(names)]


def test_a_user_is_not_renamed_under_a_running_server(opened):
    server = running(opened)
    with pytest.raises(minihub.BadRequest, match="^Stop the servers of ada before giving them another name$"):
        opened.people.change(server.user, {"name": "lovelace"})
    assert opened.people.find("ada").id == server.user_id


def test_a_renamed_user_starts_under_the_new_name_in_the_old_home(opened, spawner):
    opened.people.change(opened.people.find("ada"), {"name": "Lovelace"})
    running(opened, "lovelace")
    assert (spawner.launches[0].prefix, spawner.launches[0].user.folder) == ("/user/lovelace/", "ada")
    assert opened.people.create("ada").folder == Like("ada-[0-9a-f]{8}")


@pytest.fixture
def classes(opened):
    """A hub in which ada is in two groups and has three servers, two of which are active; bob has neither."""
    opened.groups.create(["math", "art"], ["ada"])
    running(opened), running(opened, server_name="gpu"), server_of(opened, server_name="cpu")
    return opened


def summary_of(details):
    return details.name, details.groups, [(server.name, server.status) for server in details.servers]


def test_the_details_of_a_user_name_each_group_and_each_server_once(classes):
    assert summary_of(classes.people.details("ADA")) == ("ada", ["art", "math"], [("", "ready"), ("gpu", "ready")])
    *_, servers = summary_of(classes.people.details("ada", stopped=True))
    assert servers == [("", "ready"), ("cpu", "stopped"), ("gpu", "ready")]
    assert summary_of(classes.people.details("bob")) == ("bob", [], [])
    with pytest.raises(minihub.NotFound, match="^No such user: eve$"):
        classes.people.details("eve")


@pytest.mark.parametrize("stopped", [False, True])
def test_the_details_of_several_users_are_those_of_each(classes, stopped):
    users, total = classes.people.list(sort="-name", limit=2)
    details = classes.people.details_of(users, stopped)
    assert (total, [user.name for user in details]) == (3, ["root", "bob"])
    everybody = classes.people.details_of(classes.people.list()[0], stopped)
    assert everybody == [classes.people.details(name, stopped) for name in ("root", "ada", "bob")]


def last_activity(hub, name="ada", server_name=""):
    return hub.people.find(name).last_activity, server_of(hub, name, server_name).last_activity


def test_activity_moves_forward_only(opened, pass_time):
    stale, first = opened.people.find("ada"), minihub.now()
    for moment in (first, first - timedelta(days=1), first + timedelta(seconds=1)):
        opened.people.record_activity(opened.people.find("ada"), moment, {"": moment})
    assert last_activity(opened) == (first, first)  # the last one is within the resolution
    opened.people.record_activity(stale, first - timedelta(days=1), {"": first - timedelta(days=1)})
    assert last_activity(opened) == (first, first)


def test_activity_of_a_server_is_its_users_only_if_the_report_says_so(opened):
    moment = minihub.now() - timedelta(hours=1)
    opened.people.record_activity(opened.people.find("ada"), None, {"": moment})
    assert last_activity(opened) == (None, moment)


def test_activity_of_an_unknown_server_is_refused(opened):
    with pytest.raises(minihub.BadRequest, match="^No such server 'gpu' for user ada$"):
        opened.people.record_activity(opened.people.find("ada"), minihub.now(), {"gpu": minihub.now()})
    assert last_activity(opened) == (None, None)


########################################################################################################
# 10. Tokens and OAuth
########################################################################################################


def oauth_token(hub, name, owner=None):
    """An access token that a user got for a running server."""
    with hub.store.connected():
        server = server_of(hub, owner or name)
        if server.status == "stopped":
            hub.servers.start(server)
        return hub.tokens.create(hub.people.find(name), client=server.clients.get(), session_id="5" * 32)[0]


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


def test_the_scopes_of_an_api_token_are_its_owners(root, ada):
    own = [text.format(me="ada") for text in (
        "access:servers!user={me}", "access:services", "read:users:name!user={me}", "read:users:groups!user={me}",
        "users:activity!user={me}", "read:users:activity!user={me}", "read:servers!user={me}", "servers!user={me}",
        "tokens!user={me}")]
    assert ada("GET", "/user").json["scopes"] == own
    assert root("GET", "/user").json["scopes"] == ["access:servers", *(text.replace("ada", "root") for text in own)]


def test_an_admin_who_may_not_enter_has_no_scope_for_it(make_hub):
    hub = people(make_hub(admin_access=False))
    assert "access:servers" not in api_of(hub, "root")("GET", "/user").json["scopes"]


def test_an_oauth_token_identifies_its_owner(hub):
    expected = {"kind": "user", "name": "ada", "session_id": "5" * 32, "token_id": Like("o[0-9]+"), "scopes": [
        "access:servers!server=ada/", "read:users:name!user=ada", "read:users:groups!user=ada"]}
    model = Api(hub, oauth_token(hub, "ada"))("GET", "/user").json
    assert {key: model[key] for key in expected} == expected


@pytest.mark.parametrize(("admin", "scopes"), [
    (True, ["access:servers!server=ada/", "read:users:name!user=bob", "read:users:groups!user=bob"]),
    (False, ["read:users:name!user=bob", "read:users:groups!user=bob"])])
def test_an_oauth_token_opens_a_server_only_as_long_as_its_owner_may(hub, root, admin, scopes):
    root("PATCH", "/users/bob", {"admin": True})
    token = oauth_token(hub, "bob", owner="ada")
    root("PATCH", "/users/bob", {"admin": admin})
    assert Api(hub, token)("GET", "/user").json["scopes"] == scopes


def activity(hub, name):
    """The last activity of a user, and of the newest of the user's tokens."""
    with hub.store.connected():
        user = hub.people.find(name)
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


def test_the_requests_of_a_server_with_its_own_token_are_no_activity(hub, spawner, pass_time):
    with hub.store.connected():
        started = running(hub).started
    pass_time(60)
    Api(hub, spawner.launches[0].variables["JUPYTERHUB_API_TOKEN"])("GET", "/users/ada")
    assert activity(hub, "ada") == (started, None)


OF_ADAS = {"user": "ada", "server_name": ""}  # the data of the route to her server


def passage_of(hub):
    """What stands between clients and users' servers."""
    return minihub.Passage(hub.settings, hub.tokens, hub.sign_in.has_form)


def seen_by_server(hub, token, **environ):
    """What ada's server sees of a request with that token: the header, the query, the cookies."""
    environ = {"HTTP_AUTHORIZATION": f"Bearer {token}", "QUERY_STRING": f"token={token}&x=1", **environ,
               "HTTP_COOKIE": "jupyterhub-hub-login=x; mine=1; jupyterhub-services=x; jupyterhub-session-id=y"}
    seen = passage_of(hub).clear(environ, OF_ADAS)
    return seen.get("HTTP_AUTHORIZATION"), seen["QUERY_STRING"], seen["HTTP_COOKIE"]


@pytest.mark.parametrize("name", ["ada", "root"])
def test_a_server_sees_a_token_that_is_good_for_itself_only(opened, name):
    running(opened)
    token, row = opened.tokens.create(opened.people.find(name))
    authorization, query, cookies = seen_by_server(opened, token)
    other = authorization.removeprefix("Bearer ")
    assert other == SECRET and other != token
    assert (query, cookies) == (f"token={other}&x=1", "mine=1; jupyterhub-session-id=y")
    identity = opened.tokens.identify(other)
    assert (identity.name, identity.client_server) == (name, "ada/")
    assert seen_by_server(opened, token)[0] == authorization
    opened.tokens.delete(row)
    assert opened.tokens.identify(other) is None


def test_an_exchanged_token_ends_with_the_launch_even_if_the_ids_of_rows_are_used_again(opened):
    token, _ = opened.tokens.create(opened.people.find("root"))
    server = running(opened)
    client = server.clients.get().id
    other = opened.tokens.exchange(token, OF_ADAS)
    opened.servers.stop(server)
    opened.servers.observe(server)
    bobs = running(opened, "bob")
    minihub.OAuthClient.update(id=client).where(minihub.OAuthClient.server == bobs).execute()
    again = opened.tokens.exchange(token, {"user": "bob", "server_name": ""})
    assert opened.tokens.identify(other) is None and again != other
    assert opened.tokens.identify(again).client_server == "bob/"


@pytest.mark.parametrize("spelled", [
    {"QUERY_STRING": "%74oken={token}"}, {"QUERY_STRING": "x=1&token={coded}"}, {"QUERY_STRING": "anything={token}"},
    {"HTTP_AUTHORIZATION": "token x,token {token}"}, {"HTTP_AUTHORIZATION": "token {token}, Bearer {token}"},
    {"HTTP_AUTHORIZATION": "TOKEN\t{token}"}, {"HTTP_REFERER": "http://x/user/ada/?token={token}"}])
@pytest.mark.database("sqlite")
def test_no_spelling_brings_a_token_through_to_a_server(opened, spelled):
    running(opened)
    token, _ = opened.tokens.create(opened.people.find("ada"))
    coded = "".join(f"%{ord(letter):02x}" for letter in token)
    environ = {key: value.format(token=token, coded=coded) for key, value in spelled.items()}
    seen = passage_of(opened).clear({"QUERY_STRING": "", **environ}, OF_ADAS)
    assert token not in str(seen) and coded not in str(seen)


@pytest.mark.parametrize(("query", "kept"), [
    ("token={token}", ""), ("a=b%20c&token={token}&d=", "?a=b%20c&d="), ("%74oken={token}&x", "?x")])
@pytest.mark.database("sqlite")
def test_a_page_opened_with_a_token_is_redirected_to_its_address_without_it(hub, query, kept):
    with hub.store.connected():
        running(hub)
    page = f"/user/ada/lab?{query.format(token=token_for(hub, 'ada'))}"
    assert Browser(hub).get(page, headers={"Accept": "text/html"}, status=302).location == f"/user/ada/lab{kept}"


def test_an_address_with_another_programs_token_is_passed_on_as_it_is(opened):
    running(opened)
    assert seen_by_server(opened, "its-own-token")[:2] == ("Bearer its-own-token", "token=its-own-token&x=1")
    environ = {"REQUEST_METHOD": "GET", "HTTP_ACCEPT": "text/html", "QUERY_STRING": "token=its-own-token"}
    assert passage_of(opened).redirect_of(environ, OF_ADAS) is None


def test_a_server_sees_no_token_of_those_who_may_not_enter(opened):
    running(opened)
    token, _ = opened.tokens.create(opened.people.find("bob"))
    assert seen_by_server(opened, token)[:2] == (None, "token=&x=1")


def test_an_oauth_token_is_passed_on_to_no_other_server_than_the_one_it_is_for(hub):
    good, foreign = oauth_token(hub, "root", owner="ada"), oauth_token(hub, "root", owner="bob")
    with hub.store.connected():
        assert seen_by_server(hub, good)[:2] == (f"Bearer {good}", f"token={good}&x=1")
        assert seen_by_server(hub, foreign)[:2] == (None, "token=&x=1")  # or bob's server could go on to ada's


@pytest.mark.database("sqlite")
@pytest.mark.parametrize(("settings", "data", "cookies"), [
    ({}, OF_ADAS, "my_site=2"), ({"site_cookies": []}, OF_ADAS, "session=1; my_site=2"),
    ({"site_cookies": ["my_site"]}, OF_ADAS, "session=1"),
    ({"site_cookies": ["my_site"]}, {"service": "wiki"}, "session=1; my_site=2; jupyterhub-services=3")])
def test_the_sites_and_the_hubs_cookies_are_withheld_from_servers(make_hub, settings, data, cookies):
    environ = {"HTTP_COOKIE": "session=1; my_site=2; jupyterhub-services=3; jupyterhub-hub-login=4"}
    assert passage_of(make_hub(**settings)).clear(environ, data)["HTTP_COOKIE"] == cookies


@pytest.mark.database("sqlite")
@pytest.mark.parametrize(("authenticator", "header"), [("remote-user", None), ("password", "Basic YWRhOnNlY3JldA==")])
def test_the_password_for_the_site_does_not_reach_a_server(make_hub, authenticator, header):
    hub = make_hub(authenticator=authenticator)
    with hub.store.connected():
        seen = passage_of(hub).clear({"HTTP_AUTHORIZATION": "Basic YWRhOnNlY3JldA=="}, OF_ADAS)
    assert seen.get("HTTP_AUTHORIZATION") == header


def test_what_has_expired_is_purged(opened, pass_time):
    client = minihub.OAuthClient.create(identifier="c", secret="", redirect_uri="/", description="")
    ada = opened.people.find("ada")
    for life in (60, 3600, None):
        opened.tokens.create(ada, str(life), expires_in=life)
    opened.tokens.create_code(client, ada, "", "")
    sign_in(opened, "ada", "wrong")
    pass_time(301)
    opened.tick()
    assert [token.note for token in ada.tokens.order_by(minihub.Token.id)] == ["3600", "None"]
    assert (minihub.OAuthCode.select().count(), minihub.Failure.select().count()) == (0, 0)


def test_a_token_knows_its_user_even_when_they_are_deleted(opened):
    ada = opened.people.find("ada")
    opened.tokens.create(ada)
    token, = opened.tokens.of(ada)
    opened.servers.delete_user(opened.people.find("ada"))
    assert token.user.name == "ada"


########################################################################################################
# 11. Signing in
########################################################################################################


def sign_in(hub, name, password, address="10.0.0.1"):
    """The name of whoever has signed in, or the message of the rate limit."""
    try:
        user = hub.sign_in.sign_in({"username": name, "password": password}, {}, address)
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


def test_failures_and_sign_ins_of_the_future_are_of_a_clock_that_was_set_back(opened, pass_time):
    pass_time(7200)
    for _ in range(5):
        sign_in(opened, "ada", "wrong")
    link = link_token(opened.sign_in.link_for(opened.people.find("ada")))
    cookie = opened.sign_in.cookie_value(minihub.LOGIN_COOKIE, opened.people.find("ada"))
    pass_time(-7200)
    assert sign_in(opened, "ada", password_of("ada")) == "ada"
    assert opened.sign_in.user_of_cookie(minihub.LOGIN_COOKIE, cookie).name == "ada"
    assert opened.sign_in.open_link(link).name == "ada"


def test_failed_sign_ins_are_forgotten_after_a_good_one(opened):
    for _ in range(2):
        assert [sign_in(opened, "ada", "wrong") for _ in range(4)] == [None] * 4
        assert sign_in(opened, "ada", password_of("ada")) == "ada"


@pytest.mark.parametrize(("key", "limit", "refused", "let_in"), [
    ("name ada", 50, ("ada", "10.9.9.9"), ("bob", "10.9.9.9")),
    ("address 10.0.0.1", 200, ("bob", "10.0.0.1"), ("bob", "10.9.9.9"))])
def test_many_failures_stop_a_name_or_an_address(opened, key, limit, refused, let_in):
    minihub.Failure.create(key=key, count=limit, until=minihub.now() + timedelta(minutes=5))
    assert sign_in(opened, refused[0], password_of(refused[0]), refused[1]) == Like("Too many failed sign-ins.*")
    assert sign_in(opened, let_in[0], password_of(let_in[0]), let_in[1]) == let_in[0]


@pytest.mark.parametrize("name", [
    "\0", "x" * 1000, "\ud800", "\N{GRINNING FACE}" * 300, "a\nuser root signed in from ::1\x1b[2J"])
def test_odd_names_cannot_sign_in(opened, caplog, name):
    caplog.set_level("INFO")
    assert sign_in(opened, name, "wrong") is None
    assert max(len(row.key) for row in minihub.Failure.select()) < 300
    assert caplog.messages == [Like("sign-in failed: '.*' from 10.0.0.1")] and caplog.messages[0].isprintable()


@pytest.mark.database("sqlite")
@pytest.mark.parametrize("name", ["ada 10.0.0.1", "10.0.0.1 ada", "10.0.0.1", "name ada", "ada"])
def test_failures_elsewhere_under_a_similar_name_keep_nobody_out(opened, name):
    for number in range(5):
        assert sign_in(opened, name, "wrong", f"10.1.1.{number}") is None
    for _ in range(4):
        assert sign_in(opened, name, "wrong", "10.2.2.2") is None
    assert sign_in(opened, "ada", password_of("ada")) == "ada"


def test_an_ipv6_network_counts_as_one_address(opened):
    tries = [sign_in(opened, "ada", "wrong", f"2001:db8::{number}") for number in range(6)]
    assert tries == [None] * 5 + [Like("Too many failed sign-ins.*")]
    assert sign_in(opened, "ada", "wrong", "2001:db8:0:1::1") is None


def test_whoever_the_authenticator_vouches_for_becomes_a_user(make_hub):
    hub = make_hub(authenticator="dummy", password="class secret")
    with hub.store.connected():
        assert sign_in(hub, "Eve", "class secret") == "eve" == hub.people.find("EVE").name
        assert sign_in(hub, "a/b", "class secret") is None
        credentials = {"username": "new", "password": "class secret"}
        assert hub.sign_in.sign_in(credentials, {}, "", known_only=True) is None
        assert [user.name for user in hub.people.list()[0]] == ["eve"]


def test_a_cookie_is_good_under_its_own_name_and_as_it_was_given_only(opened):
    value = opened.sign_in.cookie_value("jupyterhub-hub-login", opened.people.find("ada"))
    assert opened.sign_in.user_of_cookie("jupyterhub-hub-login", value).name == "ada"
    assert opened.sign_in.user_of_cookie("jupyterhub-services", value) is None
    assert opened.sign_in.user_of_cookie("jupyterhub-hub-login", value[:-1]) is None


def test_a_new_password_ends_what_browsers_were_given_and_no_api_token(hub, ada):
    with hub.store.connected():
        cookie = hub.sign_in.cookie_value("x", hub.people.find("ada"))
        tokens = oauth_token(hub, "ada"), oauth_token(hub, "root", owner="ada")
        hub.sign_in.set_password(hub.people.find("ada"), "a new password")
        assert hub.sign_in.user_of_cookie("x", cookie) is None
    Api(hub, tokens[0])("GET", "/user", status=403)
    assert Api(hub, tokens[1])("GET", "/user").json["name"] == "root"
    assert ada("GET", "/user").json["name"] == "ada"


@pytest.mark.parametrize("password", ["", "short", "x" * 1001, "Long Name", "long name "])
def test_a_weak_password_is_refused(opened, password):
    user = opened.people.create("long name")
    with pytest.raises(minihub.BadRequest, match="^Choose a password of at least 8 characters that is not your name$"):
        opened.sign_in.set_password(user, password)
    assert opened.people.find("long name").password is None


def link_token(link):
    return link.rpartition("/")[2]


def test_a_link_sets_a_password_once(opened):
    link = link_token(opened.sign_in.link_for(opened.people.find("ada")))
    assert opened.sign_in.use_link(link, "bob", "a new password").name == "ada"
    assert sign_in(opened, "ada", "a new password") == "ada"
    with pytest.raises(minihub.Forbidden, match="^This link has been used already. Ask for a new one$"):
        opened.sign_in.open_link(link)


def test_a_link_ends_after_a_while(opened, pass_time):
    link = link_token(opened.sign_in.link_for(opened.people.find("ada")))
    pass_time(opened.settings.link_lifetime - 5)
    assert opened.sign_in.open_link(link).name == "ada"
    pass_time(10)
    with pytest.raises(minihub.Forbidden, match="^This link is not valid any more. Ask for a new one$"):
        opened.sign_in.open_link(link)


@pytest.mark.database("sqlite")
@pytest.mark.parametrize("link", ["", "x", "W10.x.y", "é", "\0"])
def test_a_made_up_link_opens_nothing(opened, link):
    with pytest.raises(minihub.Forbidden, match="^This link is not valid any more. Ask for a new one$"):
        opened.sign_in.open_link(link)


def announced(caplog, hub):
    """The first admin's links that the hub logs when it starts."""
    caplog.clear()
    with hub.store.connected():
        hub.sign_in.announce_first_admin()
    return re.findall(r"http://\S+/hub/link/\S+", caplog.text)


def test_a_hub_says_at_every_start_how_to_become_its_admin_until_there_is_one(make_hub, make_database, caplog):
    url = make_database()
    hubs = [make_hub(database=url) for _ in range(3)]
    links = [*announced(caplog, hubs[0]), *announced(caplog, hubs[1])]
    assert len(links) == 2
    with hubs[1].store.connected():
        hubs[1].sign_in.use_link(link_token(links[0]), "Grace", "a good password")
        assert hubs[1].people.find("grace").admin
    assert announced(caplog, hubs[2]) == []


@pytest.mark.parametrize("afterwards", ["nothing", "no password", "no admin", "nobody"])
def test_the_first_admins_link_works_once_whatever_happens_later(make_hub, caplog, afterwards):
    hub = make_hub()
    link, = announced(caplog, hub)
    with hub.store.connected():
        grace = hub.sign_in.use_link(link_token(link), "Grace", "a good password")
        changes = {"no password": {"password": None}, "no admin": {"admin": False}}.get(afterwards)
        if changes:
            minihub.User.update(**changes).execute()
        elif afterwards == "nobody":
            hub.servers.delete_user(grace)
        with pytest.raises(minihub.Forbidden, match="^This link has been used already. Sign in, or ask an admin"):
            hub.sign_in.use_link(link_token(link), "eve", "another password")
        assert hub.people.get("eve") is None
    assert announced(caplog, hub) == []


@pytest.mark.parametrize("settings", [
    {"authenticator": "dummy", "password": "x"}, {"authenticator": "remote-user"}, {}])
def test_a_hub_that_needs_no_first_admin_announces_none(make_hub, caplog, settings):
    hub = make_hub(**settings) if settings else people(make_hub())
    assert announced(caplog, hub) == []


########################################################################################################
# 12. Servers and routes
########################################################################################################


LOG_TAIL = ". Its last words:\nTraceback\nImportError: no module named antigravity"


def credentials_of(server):
    """How many OAuth clients and tokens a server has."""
    return server.clients.count(), server.tokens.count()


def test_a_server_is_starting_until_it_is_seen_to_answer(opened, spawner):
    server = server_of(opened)
    opened.servers.start(server)
    assert (server.status, opened.routes.proxy.get_all_routes()) == ("spawning", {})
    assert opened.servers.observe(server).status == "ready"
    assert opened.routes.proxy.get_all_routes() == {"/user/ada/": {
        "routespec": "/user/ada/", "target": server.target, "data": {"user": "ada", "server_name": ""}}}


def test_a_server_that_does_not_answer_is_starting_until_its_time_is_over(make_hub, spawner, pass_time):
    spawner.answers, hub = False, people(make_hub(start_timeout=0.2))
    with hub.store.connected():
        server = server_of(hub)
        hub.servers.start(server)
        hub.tick()
        pass_time(7200)  # somebody has set the clock, or no worker was there to look
        assert hub.servers.observe(server).status == "spawning"
        wait_for(lambda: hub.tick() and server_of(hub).status == "stopped")
        assert server_of(hub).failure == "The server did not answer within 0.2 seconds" + LOG_TAIL
    assert not spawner.running


def test_a_server_that_ends_while_it_starts_has_failed(opened, spawner):
    spawner.exits_at_once = 3
    server = server_of(opened)
    opened.servers.start(server)
    assert (opened.servers.observe(server).status, server.failure) == (
        "stopped", "The server ended while it started [status=3]" + LOG_TAIL)
    assert (server.state, server.target, *credentials_of(server)) == (None, None, 0, 0)


@pytest.mark.parametrize(("problem", "failure"), [
    (RuntimeError("no room"), "RuntimeError: no room"), (ValueError("nul\0 \udcff"), "ValueError: nul\ufffd ?"),
    (OSError(2, "No such file", "jup\udcff\0"), "FileNotFoundError: [Errno 2] No such file: 'jup\\udcff\\x00'")])
def test_a_spawner_that_raises_fails_the_start(opened, spawner, caplog, problem, failure):
    caplog.set_level("CRITICAL", "minihub")  # pytest-xdist cannot hand on a log with a lone surrogate
    spawner.problem = problem
    server = server_of(opened)
    opened.servers.start(server)
    assert (server.status, server.failure, minihub.OAuthClient.select().count()) == ("stopped", failure, 0)


def test_a_spawner_that_does_not_say_where_the_server_is_has_failed(root, spawner, monkeypatch):
    monkeypatch.setattr(spawner, "start", lambda server: {})
    assert root("POST", "/users/ada/server", status=500).json["message"].endswith("KeyError: 'target'")


def raising(*args, **options):
    """A hook whose engine does not answer."""
    raise ConnectionError("the engine does not answer")


def test_a_spawner_that_cannot_tell_spoils_nothing(opened, spawner, root, monkeypatch):
    ready, starting, stopping = running(opened, "ada"), server_of(opened, "bob"), running(opened, "root")
    spawner.stubborn, spawner.answers = True, False
    opened.servers.start(starting)
    opened.servers.stop(stopping)
    for hook in ("poll", "stop", "log_tail"):
        monkeypatch.setattr(spawner, hook, raising)
    assert [len(model["servers"]) for model in root("GET", "/users").json] == [1, 1, 1] and opened.tick()
    statuses = [opened.servers.observe(row).status for row in (ready, starting, stopping)]
    assert statuses == ["ready", "spawning", "stopping"]
    opened.servers.life_cycle.give_up(starting)
    assert (starting.status, starting.failure) == ("stopped", "The server did not answer within 60 seconds")
    monkeypatch.undo()
    spawner.end_all()
    assert opened.servers.observe(stopping).status == "stopped"


def test_a_port_that_somebody_took_is_replaced(opened, spawner):
    spawner.exits_at_once, spawner.log_tail = 1, lambda state: "OSError: [Errno 98] Address already in use"
    server = server_of(opened)
    opened.servers.start(server)
    spawner.exits_at_once = None
    assert opened.servers.observe(opened.servers.observe(server)).status == "ready"
    assert len({launch.id for launch in spawner.launches}) == len(spawner.launches) == 2


def test_a_port_is_replaced_only_so_often(opened, spawner):
    spawner.exits_at_once, spawner.log_tail = 1, lambda state: "OSError: [Errno 98] Address already in use"
    server = server_of(opened)
    opened.servers.start(server)
    for _ in range(minihub.MAX_ATTEMPTS):
        opened.servers.observe(server)
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
    assert (opened.servers.observe(server).status, server.failure) == (
        "stopped", "The server ended unexpectedly [status=-9]" + LOG_TAIL)
    assert (opened.routes.proxy.get_all_routes(), *credentials_of(server)) == ({}, 0, 0)


def test_a_server_that_has_just_died_can_be_started(opened, spawner):
    server = opened.servers.observe(running(opened))
    spawner.end_all()
    opened.servers.start(server)
    assert (opened.servers.observe(server).status, len(spawner.launches)) == ("ready", 2)


def test_a_start_and_a_stop_are_activity_of_the_server_and_its_user(opened, pass_time):
    moments = []
    for action in (opened.servers.start, opened.servers.observe, opened.servers.stop):
        pass_time(3600)
        action(server_of(opened))
        user, server = opened.people.find("ada").last_activity, server_of(opened).last_activity
        moments.append((user == server, round((minihub.now() - user).total_seconds(), -2)))
    assert moments == [(True, 0), (True, 3600), (True, 0)]


def test_a_server_is_asked_to_stop_and_then_seen_to_have_stopped(opened, spawner):
    server = running(opened)
    opened.servers.stop(server)
    assert (server.status, opened.routes.proxy.get_all_routes()) == ("stopping", {})
    assert (opened.servers.observe(server).status, server.failure, server.state) == ("stopped", "", None)
    assert (spawner.running, *credentials_of(server)) == ({}, 0, 0)


def test_a_stubborn_server_is_stopping_until_it_ends(opened, spawner):
    spawner.stubborn = True
    server = running(opened)
    opened.servers.stop(server)
    assert opened.servers.observe(server).status == "stopping"
    with pytest.raises(minihub.BadRequest, match="^ada is pending stop$"):
        opened.servers.start(server)
    spawner.end_all()
    assert opened.servers.observe(server).status == "stopped"


def test_a_start_can_be_given_up(opened, spawner):
    spawner.answers = False
    server = server_of(opened)
    opened.servers.start(server)
    opened.servers.stop(server)
    assert (opened.servers.observe(server).status, server.failure, spawner.running) == ("stopped", "", {})


def test_a_start_that_was_given_up_meanwhile_leaves_no_process(opened, spawner, monkeypatch):
    server, start = server_of(opened), spawner.start
    monkeypatch.setattr(spawner, "start", lambda launch: opened.servers.stop(server_of(opened)) or start(launch))
    opened.servers.start(server)
    assert (server.status, spawner.running, opened.routes.proxy.get_all_routes()) == ("stopped", {}, {})
    assert len(spawner.launches) == 1


def test_a_stale_copy_of_a_row_ends_no_server_that_runs(make_hub, spawner):
    hub = people(make_hub())
    with hub.store.connected():
        server = server_of(hub)
        hub.servers.start(server)
        stale = server_of(hub)
        assert (hub.servers.observe(server).status, stale.status) == ("ready", "spawning")
        hub.servers.life_cycle.give_up(stale)
        assert stale.status == "ready" and len(spawner.running) == 1


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_named_server_can_be_forgotten(opened, spawner, stubborn):
    spawner.stubborn = stubborn
    server = running(opened, server_name="gpu")
    opened.servers.stop(server, forget=True)
    opened.servers.stop(server)
    spawner.end_all()
    opened.servers.observe(server)
    assert (server.is_deleted, opened.servers.get(server.user, "gpu")) == (True, None)


def test_a_server_deleted_meanwhile_is_not_started_nor_another_that_has_its_id_now(opened, spawner):
    stale = server_of(opened, server_name="gpu")
    opened.servers.stop(server_of(opened, server_name="gpu"), forget=True)
    other = server_of(opened, "bob", "gpu")  # SQLite uses the id again
    with pytest.raises(minihub.NotFound, match="^ada:gpu has been deleted$"):
        opened.servers.start(stale)
    assert (opened.servers.observe(other).status, spawner.launches) == ("stopped", [])


def interrupted(hub, seconds):
    """ada's server, whose worker was killed so long ago, between the row and the start of a process."""
    changed = minihub.now() - timedelta(seconds=seconds)
    (minihub.Server.update(status="spawning", launch="first", prefix="/user/ada/", state=None, changed=changed)
     .where(minihub.Server.id == server_of(hub).id).execute())
    return server_of(hub)


def test_a_start_that_was_interrupted_begins_again(opened, spawner):
    server = interrupted(opened, minihub.INTERRUPTED_AFTER + 1)
    opened.servers.observe(server)
    assert (opened.servers.observe(server).status, [launch.name for launch in spawner.launches]) == ("ready", [""])
    assert server.launch == spawner.launches[0].id != "first"


def test_a_start_that_was_interrupted_before_the_clock_was_set_back_begins_again(opened, spawner):
    server = interrupted(opened, -7200)
    opened.servers.observe(server)
    assert (opened.servers.observe(server).status, len(spawner.launches)) == ("ready", 1)


def test_a_start_that_may_still_be_under_way_is_left_alone(opened, spawner):
    server = interrupted(opened, minihub.INTERRUPTED_AFTER - 2)
    assert (opened.servers.observe(server).status, server.launch, spawner.launches) == ("spawning", "first", [])


def test_a_process_that_an_interrupted_start_left_is_taken_over(opened, spawner):
    def find(launch):
        assert (launch.id, launch.user.name, launch.name, launch.prefix) == ("first", "ada", "", "/user/ada/")
        spawner.running["first"] = launch
        return {"target": f"{spawner.address}/first", "launch": "first"}

    spawner.find = find
    server = interrupted(opened, minihub.INTERRUPTED_AFTER + 1)
    opened.servers.observe(server)
    assert (opened.servers.observe(server).status, server.launch, spawner.launches) == ("ready", "first", [])


def test_an_interrupted_start_waits_for_an_engine_that_does_not_answer(opened, root, spawner):
    spawner.find = raising
    interrupted(opened, minihub.INTERRUPTED_AFTER + 1)
    assert root("GET", "/users").json[1]["pending"] == "spawn" and not spawner.launches
    del spawner.find
    root("GET", "/users")
    assert len(spawner.launches) == 1


def test_an_interrupted_start_can_be_given_up(opened, spawner, pass_time):
    server = interrupted(opened, 1)
    opened.servers.stop(server)
    assert (server.status, spawner.launches) == ("stopping", [])  # its process may still be about to begin
    pass_time(minihub.INTERRUPTED_AFTER + 1)
    assert (opened.servers.observe(server).status, spawner.launches) == ("stopped", [])


def test_a_stale_copy_of_an_interrupted_start_shows_how_it_went_on(opened):
    server = interrupted(opened, 1)
    minihub.Server.update(status="stopped", failure="no luck").where(minihub.Server.id == server.id).execute()
    opened.servers.observe(server)
    assert (server.status, server.failure) == ("stopped", "no luck")


def test_two_who_find_the_process_of_an_interrupted_start_both_let_it_live(opened, spawner):
    def find(launch):
        if "first" not in spawner.running:
            spawner.running["first"] = launch
            opened.servers.observe(opened.servers.observe(server_of(opened)))
        return {"target": f"{spawner.address}/first", "launch": "first"}

    spawner.find = find
    server = interrupted(opened, minihub.INTERRUPTED_AFTER + 1)
    assert (opened.servers.observe(server).status, list(spawner.running)) == ("ready", ["first"])


def test_a_process_that_an_interrupted_start_left_ends_with_a_start_that_is_given_up(opened, spawner):
    spawner.running["first"] = "a process in no row"
    spawner.find = lambda launch: {"target": f"{spawner.address}/first", "launch": launch.id}
    server = interrupted(opened, 1)
    opened.servers.stop(server)
    assert (opened.servers.observe(server).status, spawner.running) == ("stopped", {})


def test_several_requests_start_a_server_once(hub, spawner):
    def start(number):
        with hub.store.connected():
            server = server_of(hub)
            with contextlib.suppress(minihub.BadRequest):  # it runs already
                hub.servers.start(server)
            status = hub.servers.observe(server).status
        hub.store.disconnect()
        return status

    assert set(in_threads(8, start)) <= {"spawning", "ready"}
    assert len(spawner.launches) == len(spawner.running) == 1


def test_several_requests_finish_an_interrupted_start_once(hub, spawner):
    def observe(number):
        with hub.store.connected():
            hub.servers.observe(server_of(hub))
        hub.store.disconnect()

    with hub.store.connected():
        interrupted(hub, minihub.INTERRUPTED_AFTER + 1)
    in_threads(8, observe)
    assert len(spawner.launches) == len(spawner.running) == 1


def test_several_requests_for_a_new_name_make_one_server(hub):
    def find_or_create(number):
        with hub.store.connected():
            server = server_of(hub, server_name="gpu")
        hub.store.disconnect()
        return server.id

    assert len(set(in_threads(8, find_or_create))) == 1


def test_a_server_starts_with_all_that_jupyterhub_singleuser_reads(make_hub, spawner):
    hub = people(make_hub(public_url="https://hub.example", hub_url="http://10.0.0.1:8000", base_url="/lab"))
    with hub.store.connected():
        hub.site.arrive(minihub.Mount("/lab/", "http://10.0.0.1:8000"))
        hub.servers.start(server_of(hub, hub.people.create("a@b c").name, "gpu"))
        token = spawner.launches[0].variables["JUPYTERHUB_API_TOKEN"]
        client = hub.tokens.check_client("jupyterhub-user-a%40b%20c-gpu", token)
        assert client.redirect_uri == "/lab/user/a@b%20c/gpu/oauth_callback"
        assert hub.tokens.identify(token).name == "a@b c"
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


def test_no_two_servers_have_the_same_oauth_client(opened, spawner):
    opened.people.create_many(["ada-gpu", "ada-gpu-x"])
    for names in (("ada", "gpu"), ("ada-gpu",), ("ada", "gpu-x"), ("ada-gpu", "x"), ("ada-gpu-x",)):
        running(opened, *names)
    assert [launch.variables["JUPYTERHUB_CLIENT_ID"] for launch in spawner.launches] == [
        f"jupyterhub-user-{name}" for name in ("ada-gpu", "ada%2Dgpu", "ada-gpu-x", "ada%2Dgpu-x", "ada%2Dgpu%2Dx")]


def test_a_server_is_not_told_of_admins_who_may_not_enter(make_hub, spawner):
    hub = people(make_hub(admin_access=False))
    with hub.store.connected():
        running(hub)
    assert "JUPYTERHUB_ADMIN_ACCESS" not in spawner.launches[0].variables


def test_the_credentials_of_a_server_are_new_at_every_start(opened, spawner):
    server = running(opened)
    opened.servers.stop(server)
    opened.servers.start(server)
    first, second = [launch.variables["JUPYTERHUB_API_TOKEN"] for launch in spawner.launches]
    assert (opened.tokens.identify(first), opened.tokens.identify(second).name) == (None, "ada")


@pytest.mark.parametrize("name", ["x" * 255, "\N{GRINNING FACE}" * 255])
def test_a_very_long_name_starts_a_server_too(opened, name):
    opened.people.create(name)
    assert running(opened, name).prefix == f"/user/{quote(name)}/"


def count_of_rows():
    models = (minihub.User, minihub.Server, minihub.Token, minihub.Membership, minihub.Group)
    return [model.select().count() for model in models]


def test_a_user_is_deleted_with_everything_of_theirs(opened, spawner):
    before = count_of_rows()
    opened.people.create("eve")
    for name in ("", "gpu", "cpu"):
        running(opened, "eve", name)
    opened.groups.create(["class"], ["eve"])
    opened.tokens.create(opened.people.find("eve"))
    opened.servers.delete_user(opened.people.find("eve"))
    tick_all(opened)
    assert count_of_rows() == [*before[:-1], 1]
    assert (spawner.running, list(opened.routes.proxy.get_all_routes())) == ({}, ["/"])


def test_a_deleted_user_is_hidden_at_once_and_gone_when_the_last_server_has_stopped(opened, root, ada, spawner):
    running(opened), running(opened, server_name="gpu")
    spawner.stubborn = True
    root("POST", "/groups/class", {"users": ["ada"]}, status=201)
    root("DELETE", "/users/ada", status=204)
    assert [user["name"] for user in root("GET", "/users").json] == ["root", "bob"]
    assert root("GET", "/groups/class").json["users"] == []
    root("GET", "/users/ada", status=404), root("DELETE", "/users/ada", status=404), ada("GET", "/user", status=403)
    assert sign_in(opened, "ada", password_of("ada")) is None
    assert list(opened.routes.proxy.get_all_routes()) == ["/"] and len(spawner.running) == 2
    assert root("POST", "/users/ada", status=201).json["name"] == "ada"
    spawner.end_all()
    tick_all(opened)
    assert minihub.User.select().where(minihub.User.leaving).count() == 0
    assert root("GET", "/users/ada?include_stopped_servers=1").json["servers"][""]["stopped"]


def test_the_route_of_a_deleted_users_dead_server_goes_at_once(opened, spawner):
    running(opened)
    spawner.end_all()
    opened.servers.delete_user(opened.people.find("ada"))
    assert opened.routes.proxy.get_all_routes() == {}


def test_a_spawner_is_told_of_a_deleted_user_once_the_last_server_has_stopped(opened, spawner):
    forgotten = []
    spawner.stubborn, spawner.forget_user = True, lambda user: forgotten.append((user.folder, len(spawner.running)))
    running(opened)
    opened.servers.delete_user(opened.people.find("ada"))
    tick_all(opened)
    assert forgotten == []
    spawner.end_all()
    tick_all(opened)
    assert forgotten == [("ada", 0)]


def test_no_server_starts_for_a_user_who_is_deleted_or_renamed_meanwhile(opened, spawner):
    adas, bobs = server_of(opened), server_of(opened, "bob")
    opened.servers.delete_user(opened.people.find("ada"))
    opened.people.change(opened.people.find("bob"), {"name": "grace"})
    for server, name in ((adas, "ada"), (bobs, "bob")):
        with pytest.raises(minihub.NotFound, match=f"^No such user: {name}$"):
            opened.servers.start(server)
    assert (server_of(opened, "grace").status, spawner.launches) == ("stopped", [])


def tick_all(hub):
    """A round in which all jobs are due."""
    hub.ticker.due = dict.fromkeys(hub.ticker.due, 0)
    assert hub.tick()


def test_the_ticker_looks_at_servers_and_lists_do_not(opened, root, spawner, monkeypatch):
    root.ticks = False
    spawner.answers = False
    running_one, starting = server_of(opened, "bob"), server_of(opened, "ada")
    opened.servers.start(starting)
    spawner.answers = True
    opened.servers.start(running_one)
    with monkeypatch.context() as patched:
        patched.setattr(minihub, "probe", raising), patched.setattr(spawner, "poll", raising)
        models = {user["name"]: user for user in root("GET", "/users").json}
        assert [models[name]["pending"] for name in ("ada", "bob")] == ["spawn", "spawn"]
        root("GET", "/users/ada")
    spawner.end(starting.launch)
    tick_all(opened)
    assert [server_of(opened, name).status for name in ("ada", "bob")] == ["stopped", "ready"]


def test_a_look_at_thirty_mute_servers_takes_one_deadline(make_hub, spawner, monkeypatch):
    hub, names = make_hub(concurrent_spawn_limit=30), [f"student{number}" for number in range(30)]
    with hub.store.connected():
        hub.people.create_many(names)
        look_at_mute(hub, spawner, monkeypatch, names)


def look_at_mute(opened, spawner, monkeypatch, names):
    with socket.create_server(("127.0.0.1", 0)) as mute:  # the kernel accepts, nobody answers
        spawner.address = f"http://127.0.0.1:{mute.getsockname()[1]}"
        for name in names:
            opened.servers.start(server_of(opened, name))
        begin = time.monotonic()
        opened.servers.observe_pending()
        assert time.monotonic() - begin < minihub.PROBE_SECONDS + 1
        monkeypatch.setattr(minihub, "GLANCE_SECONDS", GLANCE_SECONDS)
        begin = time.monotonic()
        assert opened.servers.observe(server_of(opened, names[0])).status == "spawning"
        assert time.monotonic() - begin < GLANCE_SECONDS + 0.3
    assert minihub.Server.select().where(minihub.Server.status == "spawning").count() == 30


@pytest.fixture
def narrow(make_hub, spawner):
    """A hub that starts one server at a time, with its database open, and with the students carl and dora."""
    hub = people(make_hub(concurrent_spawn_limit=1))
    with hub.store.connected():
        hub.people.create_many(["carl", "dora"])
        yield hub


def line_of(hub):
    """The servers that are queued, in their order, each with what people are told."""
    return [f"{server.label} is {hub.servers.place_of(server)}" for server in hub.servers.line()]


def start_all(hub, *labels):
    """Start servers, named like `ada:gpu`, in that order; returns their rows."""
    servers = [server_of(hub, *label.split(":")) for label in labels]
    for server in servers:
        hub.servers.start(server)
    return servers


def test_a_start_without_room_waits_and_goes_on_when_there_is_room(narrow, spawner):
    adas, bobs = start_all(narrow, "ada", "bob")
    assert (adas.status, bobs.status, line_of(narrow)) == ("spawning", "queued", ["bob is 1st in line"])
    spawner.answers = False
    narrow.servers.start(bobs)
    assert (bobs.status, bobs.state, narrow.servers.observe(bobs).status, len(spawner.launches)) == (
        "queued", None, "queued", 1)
    narrow.tick()
    assert [server_of(narrow, name).status for name in ("ada", "bob")] == ["ready", "spawning"]
    assert [launch.id for launch in spawner.launches] == [adas.launch, bobs.launch]


def test_everybodys_first_start_comes_before_anybodys_second(narrow, spawner):
    start_all(narrow, "ada", "ada:a", "ada:b", "bob:x", "bob", "carl", "dora")
    assert line_of(narrow) == ["bob:x is 1st in line", "carl is 2nd in line", "dora is 3rd in line",
                               "ada:a is 4th in line", "bob is 5th in line", "ada:b is 6th in line"]
    for _ in range(7):
        narrow.tick()
    assert [f"{launch.user.name}:{launch.name}" for launch in spawner.launches] == [
        "ada:", "bob:x", "carl:", "dora:", "ada:a", "bob:", "ada:b"]
    assert {server.status for server in narrow.servers.running()} == {"ready"}


@pytest.mark.parametrize("number, words", [
    (1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (12, "12th"), (13, "13th"), (21, "21st"),
    (102, "102nd"), (111, "111th")])
def test_places_in_line_are_said_as_people_say_them(hub, number, words):
    line = [minihub.Server(id=row_id) for row_id in range(1, 200)]
    assert hub.servers.place_of(minihub.Server(id=number), line) == f"{words} in line"


def test_the_further_starts_of_one_user_leave_half_of_the_room_to_others(make_hub, spawner):
    hub, spawner.answers = people(make_hub(concurrent_spawn_limit=4)), False
    with hub.store.connected():
        start_all(hub, "ada", "ada:a", "ada:b")
        hub.tick()
        assert line_of(hub) == ["ada:b is 1st in line"]
        assert [server.status for server in start_all(hub, "bob", "root")] == ["spawning", "spawning"]
        spawner.end(server_of(hub, "bob").launch), spawner.end(server_of(hub, "root").launch)
        hub.tick()
        assert line_of(hub) == ["ada:b is 1st in line"]
        spawner.end(server_of(hub).launch)
        hub.tick()
    assert [launch.name for launch in spawner.launches if launch.user.name == "ada"] == ["", "a", "b"]


@pytest.mark.parametrize("cores, count", [(1, 4), (3, 6)])
def test_the_machines_cores_say_how_many_start_at_once(make_hub, spawner, monkeypatch, cores, count):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    hub, names, spawner.answers = make_hub(), [f"student{number}" for number in range(10)], False
    with hub.store.connected():
        hub.people.create_many(names)
        start_all(hub, *names)
        hub.tick()
        assert (len(spawner.launches), len(hub.servers.line())) == (count, 10 - count)


@pytest.mark.parametrize("options", [{}, {"forget": True}])
def test_a_start_that_waits_is_stopped_at_once(narrow, spawner, options):
    adas, bobs, carls = start_all(narrow, "ada", "bob:gpu", "carl")
    narrow.servers.stop(bobs, **options)
    assert (bobs.status, bobs.failure, bobs.is_deleted) == ("stopped", "", "forget" in options)
    assert line_of(narrow) == ["carl is 1st in line"]
    narrow.tick(), narrow.tick()
    assert [launch.user.name for launch in spawner.launches] == ["ada", "carl"]


def test_a_start_that_waits_goes_with_its_user(narrow, spawner):
    start_all(narrow, "ada", "bob")
    with pytest.raises(minihub.BadRequest, match="^Stop the servers of bob before giving them another name$"):
        narrow.people.change(narrow.people.find("bob"), {"name": "grace"})
    narrow.servers.delete_user(narrow.people.find("bob"))
    assert (narrow.people.get("bob"), narrow.servers.line()) == (None, [])
    narrow.tick()
    assert [launch.user.name for launch in spawner.launches] == ["ada"]


def test_a_stop_that_races_the_turn_of_a_start_leaves_nothing_running(narrow, spawner):
    stale = start_all(narrow, "ada", "bob")[1]
    narrow.tick()
    narrow.servers.stop(stale)
    assert (narrow.servers.observe(stale).status, list(spawner.running)) == ("stopped", [server_of(narrow).launch])


def test_the_time_of_a_start_begins_when_it_is_launched(make_hub, spawner):
    hub, spawner.answers = people(make_hub(concurrent_spawn_limit=1, start_timeout=0.2)), False
    with hub.store.connected():
        adas, bobs = start_all(hub, "ada", "bob")
        wait_for(lambda: hub.tick() and server_of(hub).status == "stopped")  # while bob's waits for the same time
        hub.tick()
        assert server_of(hub, "bob").status == "spawning"
        wait_for(lambda: hub.tick() and server_of(hub, "bob").status == "stopped")
        assert server_of(hub, "bob").failure.startswith("The server did not answer within 0.2 seconds")


def test_workers_start_no_more_servers_at_once_than_there_is_room_for_and_none_twice(make_hub, spawner):
    hub, names, spawner.answers = make_hub(concurrent_spawn_limit=2), [f"student{number}" for number in range(8)], False
    with hub.store.connected():
        hub.people.create_many(names)

    def start(number):
        with hub.store.connected():
            start_all(hub, names[number])
        tick(number)

    def tick(number):
        with hub.store.connected():
            hub.servers.observe_pending()
            hub.servers.launch_queued()
        hub.store.disconnect()

    in_threads(8, start)
    assert len(spawner.launches) == 2
    for count in (4, 6, 8):
        spawner.end_all()
        in_threads(4, tick)
        assert len({launch.user.name for launch in spawner.launches}) == len(spawner.launches) == count


@pytest.mark.parametrize(("settings", "reports", "seconds", "stays"), [
    ({"idle_timeout": 600}, True, 590, True), ({"idle_timeout": 600}, True, 601, False),
    ({"idle_timeout": 600}, False, 999, True),
    ({"max_age": 600}, True, 590, True), ({"max_age": 600}, True, 601, False)])
def test_an_idle_or_old_server_is_stopped_and_not_deleted(make_hub, pass_time, settings, reports, seconds, stays):
    hub = people(make_hub(**settings))
    ada = api_of(hub, "ada")
    ada("POST", "/users/ada/servers/gpu", status=201)
    pass_time(60 if "idle_timeout" in settings else 0)
    if reports:
        report = {"last_activity": minihub.isoformat(minihub.now())}
        ada("POST", "/users/ada/activity", {"servers": {"gpu": report}})
    pass_time(seconds)
    tick_all(hub)
    servers = ada("GET", "/users/ada?include_stopped_servers=1").json["servers"]
    assert servers["gpu"]["ready"] is stays and ("stops_at" in servers["gpu"]) is (stays and reports)


def test_activity_that_a_proxy_has_seen_is_that_of_users_and_servers(hub, root, ada, monkeypatch):
    ada("POST", "/users/ada/server", status=201)
    seen = minihub.isoformat(minihub.now() + timedelta(minutes=5))
    with hub.store.connected():
        routes = hub.routes.wanted()
    routes["/user/ada/"]["data"]["last_activity"] = seen
    monkeypatch.setattr(hub.routes.proxy, "get_all_routes", lambda: routes)
    root("POST", "/proxy")
    model = root("GET", "/users/ada").json
    assert model["servers"][""]["last_activity"] == seen


#: A single-user server that starts in milliseconds and answers 200 to everything. Its arguments: the port, then the
#: seconds that it takes to start, `stubborn` if it ignores SIGINT, `mute` if it accepts and never answers.
MOCK_SERVER = """
import signal, socket, sys, time
port, *words = sys.argv[1:]
signal.signal(signal.SIGINT, signal.SIG_IGN if "stubborn" in words else signal.SIG_DFL)
time.sleep(sum(float(word) for word in words if word[0].isdigit()))
listener, kept = socket.create_server(("127.0.0.1", int(port))), []
while True:
    connection, _ = listener.accept()
    if "mute" in words:
        kept.append(connection)
        continue
    with connection:
        try:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\nContent-Length: 4\\r\\n\\r\\nmock")
        except OSError:
            pass
"""


def start_mocked(live, folder, *options, words="", **settings):
    """A gunicorn whose servers are mock servers, with the admin root and the student ada; `.token` is root's."""
    (folder / "mock.py").write_text(MOCK_SERVER)
    command = f"{sys.executable} -IS {folder / 'mock.py'} {{port}} {words}"
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
    processes = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent, group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            command = (folder / "cmdline").read_text().replace("\0", " ")
            processes[int(folder.name)] = (int(parent), int(group), state, command)
    return processes


def groups_in(folder):
    """The process groups of the servers that run there, each with the commands in it."""
    groups = {}
    for _, group, state, command in all_processes().values():
        if state != "Z" and f"{folder}/" in command and not re.search(r"gunicorn|/\.carrier/", command):
            groups.setdefault(group, []).append(command)
    return groups


def zombies_of(hub):
    """The zombies among the children of gunicorn and its workers."""
    family = {hub.process.pid, *hub.workers()}
    return [pid for pid, (parent, _, state, _) in all_processes().items() if parent in family and state == "Z"]


def status_of(hub, name="ada", server_name=""):
    """The row's status, None if there is no such server."""
    statuses = hub.rows("SELECT status FROM servers JOIN users ON users.id = user_id"
                        f" WHERE users.name = '{name}' AND servers.name = '{server_name}'")
    return statuses[0] if statuses else None


def pid_of(hub, name="ada"):
    """The process id of a user's default server."""
    return hub.api("GET", f"/users/{name}", hub.token)[1]["servers"][""]["state"]["pid"]


def at_once(*actions):
    """The results of actions that begin at the same moment, each in a thread of its own."""
    return in_threads(len(actions), lambda number: actions[number]())


def discrepancies(hub):
    """Where rows, processes and routes do not agree, when all is quiet."""
    rows = hub.table("SELECT users.name, servers.name, status, state, prefix, target, servers.id"
                     " FROM servers JOIN users ON users.id = user_id")
    routes = dict(hub.table("SELECT prefix, target FROM routes"))
    ready = [row for row in rows if row[2] == "ready"]
    owners = sorted(row[6] for row in ready)
    groups = groups_in(hub.folder)
    wrong = {
        "pending": [row for row in rows if row[2] in ("queued", "spawning", "stopping")],
        "leaving": hub.rows("SELECT name FROM users WHERE leaving"),
        "prefixes": [row for row in ready if row[4] != f"/user/{row[0]}/" + (f"{row[1]}/" if row[1] else "")],
        "states": [row for row in rows if row[2] == "stopped" and (row[3] or row[5])],
        "routes": {route for route in routes.items() if route[0] != "/"} ^ {(row[4], row[5]) for row in ready},
        "processes": groups.keys() ^ {json.loads(row[3])["pid"] for row in ready},
        "doubles": [commands for commands in groups.values()  # beside the supervisor and its logger
                    if len([command for command in commands if not command.startswith("/bin/sh ")]) != 1],
        "tokens": sorted(hub.rows("SELECT server_id FROM tokens WHERE server_id IS NOT NULL")) != owners,
        "clients": sorted(hub.rows("SELECT server_id FROM oauthclients WHERE server_id IS NOT NULL")) != owners,
        "zombies": zombies_of(hub)}
    return {kind: items for kind, items in wrong.items() if items}


def chaos(hub, random, is_over, answers):
    """A client that makes random requests until it is over, and notes the answers."""
    names = [f"student{number}" for number in range(12)]
    while not is_over.is_set():
        name, path = random.choice(names), random.choice(["server", "servers/a", "servers/b"])
        user = f"/users/{name}"
        method, path, body = random.choice([
            ("POST", f"{user}/{path}", None), ("POST", f"{user}/{path}", {"size": 1}), ("POST", user, None),
            ("POST", "/users", {"usernames": random.sample(names, 3)}), ("DELETE", f"{user}/{path}", None),
            ("DELETE", f"{user}/servers/a", {"remove": True}), ("PATCH", user, {"name": random.choice(names)}),
            ("DELETE", user, None), ("POST", f"{user}/tokens", {"note": "x"}), ("GET", f"{user}/tokens", None),
            ("GET", "/users", None), ("GET", user, None), ("GET", "/user", None), ("POST", "/proxy", None)])
        try:
            answers.append((hub.api(method, path, hub.token, body)[0], method, path))
        except (OSError, http.client.HTTPException):  # its worker was killed, or there is none
            answers.append((0, method, path))


@pytest.mark.parametrize(("options", "share"), [("-w 4", 1 / 2), ("-w 2 --threads 4 --preload", 1 / 4)])
def test_in_chaos_nothing_is_lost(live, tmp_path, make_database, options, share):
    seconds = max(6, float(os.environ.get("CHAOS_SECONDS") or (60 if os.environ.get("CI") else 10)) * share)
    hub = start_mocked(live, tmp_path, *options.split(), start_timeout=20, database=make_database())
    hub.start_server("ada", hub.token)
    kept, is_over, answers, random = pid_of(hub), threading.Event(), [], Random(4)
    clients = [threading.Thread(target=chaos, args=(hub, Random(number), is_over, answers)) for number in range(6)]
    for client in clients:
        client.start()
    begin = time.monotonic()
    for restart_at in (seconds / 3, seconds * 2 / 3, seconds):
        while time.monotonic() - begin < restart_at:
            is_over.wait(random.uniform(0.2, 1.5))
            with contextlib.suppress(OSError, http.client.HTTPException):
                hub.request("GET", "/user/ada/")  # which a carrier carries
            with contextlib.suppress(ProcessLookupError, IndexError):  # there may be none just now
                os.kill(random.choice([*hub.workers(), *carriers_of(tmp_path)]), signal.SIGKILL)
        if restart_at < seconds:
            kill_all(hub)
            hub.start()
    is_over.set()
    for client in clients:
        client.join(60)
    with contextlib.suppress(pytest.fail.Exception):
        wait_for(lambda: not discrepancies(hub), 40)
    assert discrepancies(hub) == {}
    assert [answer for answer in answers if answer[0] >= 500] == []
    assert pid_of(hub) == kept and hub.request("GET", "/user/ada/").body == b"mock"
    done = {f"{method} {path}" for status, method, path in answers if 200 <= status < 300}
    for request in ("POST .*/server.*", "DELETE .*/server.*", "PATCH .*", r"DELETE /users/\w+", "POST .*/tokens"):
        assert any(re.fullmatch(request, answer) for answer in done), f"too little has happened: {request}"


@pytest.fixture
def crowd(live, tmp_path):
    """A gunicorn with two workers of eight threads each, whose servers are mock servers."""
    return start_mocked(live, tmp_path, "-w", "2", "--threads", "8")


def test_a_start_against_a_stop_ends_with_one_of_them(crowd):
    start, stop = [functools.partial(crowd.api, method, "/users/ada/server", crowd.token)
                   for method in ("POST", "DELETE")]
    for _ in range(5):
        statuses = [answer[0] for answer in at_once(start, stop, start, stop)]
        assert set(statuses) <= {201, 202, 204, 400}
        wait_for(lambda: status_of(crowd) in ("ready", "stopped") and not discrepancies(crowd))


@pytest.mark.parametrize(("method", "body", "done"), [
    ("DELETE", None, {204}), ("PATCH", {"name": "grace"}, {200, 400})])
def test_a_start_against_the_end_of_a_name_ends_with_one_of_them(crowd, method, body, done):
    for _ in range(5):
        assert crowd.api("POST", "/users/ada", crowd.token)[0] in (201, 409)
        started, ended = at_once(lambda: crowd.api("POST", "/users/ada/server", crowd.token)[0],
                                 lambda: crowd.api(method, "/users/ada", crowd.token, body)[0])
        assert started in (201, 202, 404) and ended in done
        wait_for(lambda: not discrepancies(crowd))
        assert status_of(crowd) == ("ready" if ended == 400 else None)
        for name in ("ada", "grace"):
            crowd.api("DELETE", f"/users/{name}", crowd.token)
    wait_for(lambda: groups_in(crowd.folder) == {} and not discrepancies(crowd))


#: A spawner whose hub takes its time between the check of the limits and the start.
DAWDLING_SPAWNER = """
import time
import minihub
from minihub import SubprocessSpawner as Spawner

hold = minihub.People.hold
minihub.People.hold = lambda self, user: time.sleep(0.02) or hold(self, user)
"""


def test_thirty_starts_at_once_on_three_workers_keep_to_the_limit(live, tmp_path):
    (tmp_path / "dawdling.py").write_text(DAWDLING_SPAWNER)
    hub = start_mocked(live, tmp_path, "-w", "3", "--threads", "4", active_server_limit=5, spawner="dawdling:Spawner")
    names = [f"student{number}" for number in range(30)]
    hub.api("POST", "/users", hub.token, {"usernames": names})
    statuses = at_once(*[functools.partial(hub.api, "POST", f"/users/{name}/server", hub.token) for name in names])
    assert [status for status, _ in statuses].count(429) == 25
    assert len(hub.rows("SELECT id FROM servers WHERE status <> 'stopped'")) == 5
    wait_for(lambda: len(groups_in(tmp_path)) == 5)


def test_starts_that_wait_outlive_the_hub_and_keep_their_order(live, tmp_path):
    hub = start_mocked(live, tmp_path, "-w", "2", words="{username}", concurrent_spawn_limit=1)
    hub.api("POST", "/users", hub.token, {"usernames": ["mute", "bob"]})
    for name in ("mute", "bob", "ada"):
        assert hub.api("POST", f"/users/{name}/server", hub.token)[0] == 202
    kill_all(hub)
    hub.start()
    assert [status_of(hub, name) for name in ("mute", "bob", "ada")] == ["spawning", "queued", "queued"]
    os.killpg(*groups_in(tmp_path), signal.SIGKILL)
    wait_for(lambda: [status_of(hub, name) for name in ("mute", "bob", "ada")] == ["stopped", "ready", "ready"])
    bob, ada = [hub.rows(f"SELECT changed FROM servers JOIN users ON users.id = user_id WHERE users.name = '{name}'")
                for name in ("bob", "ada")]
    assert bob < ada and not discrepancies(hub)


def test_a_user_with_a_running_server_is_deleted_by_a_single_sync_worker(live, tmp_path):
    hub = start_mocked(live, tmp_path, "-w", "1")
    hub.start_server("ada", hub.token)
    assert hub.api("DELETE", "/users/ada", hub.token) == (204, None)
    assert hub.api("GET", "/users/ada", hub.token)[0] == 404
    wait_for(lambda: hub.rows("SELECT name FROM users") == ["root"] and groups_in(tmp_path) == {})


def test_thirty_mute_servers_keep_nobody_waiting(live, tmp_path):
    def seconds_of(path, **headers):
        begin = time.monotonic()
        assert hub.request("GET", path, headers=headers).status == 200
        return time.monotonic() - begin

    hub = start_mocked(live, tmp_path, "-w", "1", words="mute", authenticator="dummy", password="class secret",
                       concurrent_spawn_limit=30)
    names = [f"student{number}" for number in range(30)]
    hub.api("POST", "/users", hub.token, {"usernames": names})
    assert {hub.api("POST", f"/users/{name}/server", hub.token)[0] for name in names} == {202}
    ports = [urlsplit(target).port for target in hub.rows("SELECT target FROM servers WHERE target <> ''")]
    wait_for(lambda: all(map(is_open, ports)), 60)
    with requests.Session() as browser:
        form = re.search('name=_xsrf value="(.*?)"', browser.get(f"{hub.url}/hub/login").text)[1]
        browser.post(f"{hub.url}/hub/login", {"username": "root", "password": "class secret", "_xsrf": form})
        cookies = "; ".join(f"{name}={value}" for name, value in browser.cookies.items())
    token = f"token {hub.token}"
    paths = {"/hub/api/users": {"Authorization": token}, "/hub/admin": {"Cookie": cookies}, "/hub/health": {}}
    seconds = {path: [] for path in paths}
    end = time.monotonic() + 3 * minihub.PROBE_SECONDS + 2  # three rounds of the ticker, or more
    while time.monotonic() < end:
        for path, headers in paths.items():
            seconds[path].append(seconds_of(path, **headers))
    assert len(hub.rows("SELECT id FROM servers WHERE status = 'spawning'")) == 30
    assert max(statistics.quantiles(values, n=20)[-1] for values in seconds.values()) < 0.3, seconds


#: A spawner whose first start takes very long, before or after there is a process.
SLOW_SPAWNER = """
import time
from pathlib import Path
import minihub

if Path("slow").exists():
    minihub.INTERRUPTED_AFTER = 1

def dawdle():
    if not Path("slow").exists():
        Path("slow").touch()
        time.sleep(60)

class Before(minihub.SubprocessSpawner):
    def start(self, server):
        dawdle()
        return super().start(server)

class After(minihub.SubprocessSpawner):
    def start(self, server):
        state = super().start(server)
        dawdle()
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


WORKERS = [["-w", "4"], ["--threads", "8"], ["-w", "2", "--preload"], ["-w", "2", "--threads", "4", "--preload"]]


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
    assert pid_of(hub) == process and {hub.request("GET", "/user/ada/").body for _ in range(8)} == {b"mock"}
    hub.api("DELETE", "/users/ada/server", hub.token)
    wait_for(lambda: status_of(hub) == "stopped" and not discrepancies(hub))


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


@pytest.fixture
def real(make_hub, tmp_path):
    """A hub whose servers are real processes, mock servers; nothing of them is left afterwards."""
    (tmp_path / "mock.py").write_text(MOCK_SERVER)
    yield people(make_hub(spawner="subprocess", cmd=f"{sys.executable} -IS {tmp_path / 'mock.py'} {{port}}"))
    for group in groups_in(tmp_path):
        os.killpg(group, signal.SIGKILL)


@pytest.mark.database("sqlite")
def test_a_new_user_of_a_deleted_users_name_gets_an_empty_home_and_the_old_one_is_kept(real, tmp_path):
    root, home = api_of(real, "root"), tmp_path / "homes" / "ada"
    root("POST", "/users/ada/server", status=(201, 202))
    (home / "essay.txt").write_text("ada's")
    root("DELETE", "/users/ada", status=204)
    root("POST", "/users/ada", status=201)
    wait_for(lambda: root("GET", "/users") and not home.exists())
    root("POST", "/users/ada/server", status=(201, 202))
    homes = {path.name: [file.name for file in path.iterdir()] for path in (tmp_path / "homes").iterdir()}
    kept, = homes.keys() - {path for path, files in homes.items() if not files}
    assert (kept, homes[kept]) == (Like(r"ada#deleted-\d{8}-\w+"), ["essay.txt"])


@pytest.mark.database("sqlite")
@pytest.mark.parametrize("obstacle", ["homes", "run", "run/ada", "run/ada/server.log/x"])
def test_a_server_without_room_for_its_files_says_so_and_starts_later(real, tmp_path, obstacle):
    root, path = api_of(real, "root"), tmp_path / obstacle
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("in the way")
    if path.name == "x":
        (tmp_path / "run/ada/server.log.old/y").mkdir(parents=True)
    message = root("POST", "/users/ada/server", status=500).json["message"]
    assert re.match(r"ada's server failed to start. (OSError|(FileExists|(NotA|IsA)Directory)Error): ", message)
    shutil.rmtree(tmp_path / "run", ignore_errors=True) if obstacle.startswith("run/") else path.unlink()
    wait_for(lambda: root("POST", "/users/ada/server", status=(201, 202, 400)).status_int in (201, 400))


########################################################################################################
# 13. Services and the ticker
########################################################################################################


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
handlers = [(prefix, Who), (prefix + "oauth_callback", HubOAuthCallbackHandler)]
tornado.web.Application(handlers, cookie_secret=os.urandom(32)).listen(
    urlsplit(os.environ["JUPYTERHUB_SERVICE_URL"]).port, "127.0.0.1")
tornado.ioloop.IOLoop.current().start()
'''


@pytest.fixture
def who(live, tmp_path):
    """A gunicorn that runs the service `who`, and knows ada; `who.token` is her token."""
    pytest.importorskip("jupyterhub", reason="pip install '.[classroom]'")
    (tmp_path / "who.py").write_text(WHO_SERVICE)
    command = [sys.executable, str(tmp_path / "who.py")]
    hub = live(admins="root", services=json.dumps([
        {"name": "who", "url": f"http://127.0.0.1:{minihub.free_port()}", "command": command},
        {"name": "ops", "admin": True, "api_token": "ops-token"}]))
    hub.link, hub.token = hub.command("link", "ada"), hub.command("token", "ada")
    wait_for(lambda: hub.request("GET", "/services/who/").status == 302, message="the service does not answer")
    return hub


def who_is(hub, token):
    response = hub.request("GET", "/services/who/", headers={"Authorization": f"token {token}"})
    return json.loads(response.body)["name"] if response.status == 200 else response.status


def service_pid(hub):
    return hub.api("GET", "/services/who", "ops-token")[1]["pid"]


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


@needs_singleuser
def test_a_shutdown_stops_the_services(who):
    pid = service_pid(who)
    assert who.api("POST", "/shutdown", "ops-token")[0] == 202
    wait_for(lambda: minihub.process_identity(pid) is None)


def test_a_service_ends_when_there_is_no_hub_any_more(tmp_path, monkeypatch):
    monkeypatch.setattr(minihub, "SUPERVISE", minihub.SUPERVISE.replace("sleep 5", "sleep .1"))
    state = minihub.start_process(tmp_path / "service@1", ["sleep", "60"], "service", tmp_path / "heartbeat")
    assert minihub.poll_process(state) is None
    wait_for(lambda: minihub.poll_process(state) == -signal.SIGTERM)


@pytest.fixture
def idle(make_hub, make_database, request):
    """Makes hubs on one database that run the service `idle`; ends its processes."""
    url, services = make_database(), [{"name": "idle", "command": ["sleep", "600"]}]
    hubs = []

    def make(**settings):
        hubs.append(make_hub(**{"database": url, "services": services, **settings}))
        return hubs[-1]

    yield make
    for pid in copies_of_idle(hubs[0]):
        os.killpg(pid, signal.SIGKILL)


def copies_of_idle(hub):
    """The process ids of all supervisors of the service."""
    return [pid for pid, (_, _, state, command) in all_processes().items()
            if f"{hub.settings.run_dir}/service-idle@" in command and command.startswith("/bin/sh") and state != "Z"
            and os.getsid(pid) == pid]


def row_of_idle(hub, **changes):
    """The service's row, changed."""
    with hub.store.connected():
        if changes:
            minihub.Service.update(**changes).execute()
        return hub.services.find("idle")


def supervise(hub):
    with hub.store.connected():
        hub.services.supervise()


def test_two_workers_start_a_service_once(idle, monkeypatch):
    hubs, both, poll = [idle(), idle()], threading.Barrier(2), minihub.Services._is_running

    def is_running(*values):
        answer = poll(*values)
        both.wait(10)  # both have seen that it does not run
        return answer

    starts, start_process = [], minihub.start_process
    monkeypatch.setattr(minihub.Services, "_is_running", is_running)
    monkeypatch.setattr(minihub, "start_process",
                        lambda *values, **options: starts.append(values) or start_process(*values, **options))
    in_threads(2, lambda number: supervise(hubs[number]))
    assert len(wait_for(lambda: copies_of_idle(hubs[0]))) == 1 == len(starts)


def test_the_restarts_of_a_steady_service_are_forgotten(idle):
    hub, before = idle(), minihub.now() - timedelta(seconds=minihub.LONGEST_BACKOFF + 1)
    row_of_idle(hub, restarts=5, next_start=before)
    supervise(hub)
    row = row_of_idle(hub)
    assert (row.restarts, minihub.poll_process(row.state)) == (1, None)
    assert minihub.seconds_since(row.next_start) > -2


@pytest.mark.parametrize(("seconds", "starts"), [(7200, 1), (30, 0), (-5, 1)])
def test_a_service_starts_when_it_is_due_even_after_the_clock_was_set_back(idle, seconds, starts):
    hub = idle()
    row_of_idle(hub, next_start=minihub.now() + timedelta(seconds=seconds))
    supervise(hub)
    assert (row_of_idle(hub).state is not None) == starts


class Killed(BaseException):
    """What ends a worker in the middle."""


@pytest.mark.parametrize("has_started", [True, False])
def test_a_service_whose_worker_was_killed_around_its_start_runs_once(idle, monkeypatch, has_started):
    def start_and_die(*values, **options):
        if has_started:
            start_process(*values, **options)
        raise Killed

    start_process, first = minihub.start_process, idle()
    monkeypatch.setattr(minihub, "start_process", start_and_die)
    with pytest.raises(Killed):
        supervise(first)
    monkeypatch.undo()
    if has_started:
        wait_for(lambda: list(Path(first.settings.run_dir).glob("service-idle@*.pid")))
    other = idle()
    row_of_idle(other, next_start=minihub.now() - timedelta(seconds=1))
    supervise(other)
    assert len(copies_of_idle(other)) == has_started  # the worker could still be about to start it
    row_of_idle(other, next_start=minihub.now() - timedelta(seconds=minihub.INTERRUPTED_AFTER + 1))
    supervise(other)
    copies = wait_for(lambda: copies_of_idle(other))
    assert copies == [row_of_idle(other).state["pid"]]


def test_a_service_that_another_worker_has_started_meanwhile_is_ended_by_the_slower_one(idle, monkeypatch):
    def start_too_late(*values, **options):
        monkeypatch.undo()
        row_of_idle(slow, next_start=minihub.now() - timedelta(seconds=minihub.INTERRUPTED_AFTER + 1))
        supervise(quick)
        return start_process(*values, **options)

    start_process, slow, quick = minihub.start_process, idle(), idle()
    monkeypatch.setattr(minihub, "start_process", start_too_late)
    supervise(slow)
    wait_for(lambda: copies_of_idle(slow) == [row_of_idle(quick).state["pid"]])


def test_a_service_that_is_not_in_the_settings_any_more_is_killed_if_it_does_not_mind_a_signal(live, tmp_path):
    hub, (_, pid) = start_hasty(live, tmp_path, "-w", "2")
    hub.stop()
    hub.settings["services"] = "[]"
    hub.start()
    assert hub.api("GET", "/services", hub.token) == (200, {})
    wait_for(lambda: minihub.process_identity(pid) is None)
    assert are_running([pid_of(hub)]) == [True]


@needs_singleuser
def test_the_idle_culler_stops_the_idle_and_leaves_the_busy(live, tmp_path):
    pytest.importorskip("jupyterhub_idle_culler", reason="pip install jupyterhub-idle-culler")
    command = [sys.executable, "-m", "jupyterhub_idle_culler", "--timeout=3", "--cull-every=1"]
    hub = start_echo(live, tmp_path, activity_resolution=0,
                     services=json.dumps([{"name": "culler", "admin": True, "command": command}]))
    hub.command("link", "bob")
    root = hub.command("token", "root")
    hub.start_server("bob", root)

    def bob_works_until_ada_is_culled():
        moment = minihub.isoformat(minihub.now())
        hub.api("POST", "/users/bob/activity", root, {"servers": {"": {"last_activity": moment}}})
        return hub.api("GET", "/users/ada", root)[1]["servers"] == {}

    wait_for(bob_works_until_ada_is_culled, 40)
    assert hub.api("GET", "/users/bob", root)[1]["servers"][""]["ready"]


def test_nbgrader_manages_the_students_of_a_course(live, monkeypatch):
    plugin_class = pytest.importorskip("nbgrader.auth.jupyterhub", reason="pip install nbgrader").JupyterHubAuthPlugin
    hub = live(admins="root")
    hub.command("link", "ada")
    monkeypatch.setenv("JUPYTERHUB_USER", "root")
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", hub.command("token", "root"))
    monkeypatch.setenv("JUPYTERHUB_API_URL", f"{hub.url}/hub/api")
    plugin = plugin_class()
    plugin.add_student_to_course("ada", "course101")
    plugin.add_student_to_course("ada", "course101")
    assert plugin.get_student_courses("ada") == ["course101"]
    plugin.remove_student_from_course("ada", "course101")
    assert plugin.get_student_courses("ada") == [] == plugin.get_student_courses("*")


def test_a_job_of_the_ticker_runs_when_it_is_due(opened, monkeypatch):
    clock, done = [100.0], []
    jobs = {"always": 0, "now and then": 10, "once": float("inf")}
    table = [(jobs[name], functools.partial(done.append, name)) for name in jobs]
    ticker = minihub.Ticker(opened.store, 1, table, Path("/nowhere"))
    monkeypatch.setattr(minihub.time, "monotonic", lambda: clock[0])
    for clock[0] in (100, 109, 110):
        ticker.tick()
    assert done == ["always", "now and then", "once", "always", "always", "now and then"]


@pytest.mark.database("sqlite", "postgres")
def test_one_worker_ticks_at_a_time_and_another_when_it_has_stopped(make_hub, make_database, pass_time):
    url = make_database()
    hubs = [make_hub(database=url) for _ in range(2)]
    assert [hub.tick() for hub in (*hubs, *hubs)] == [True, False, True, False]
    pass_time(11)
    assert [hub.tick() for hub in reversed(hubs)] == [True, False]
    pass_time(-7200)  # the clock is set back
    assert [hub.tick() for hub in hubs] == [True, False]


def test_a_hub_ticks_by_itself_after_its_first_request(make_hub, spawner):
    hub = people(make_hub(tick_interval=0.01))
    spawner.answers = False
    Api(hub, token_for(hub, "ada"))("POST", "/users/ada/server", status=202)
    spawner.end_all()
    with hub.store.connected():
        wait_for(lambda: server_of(hub).status == "stopped")


def test_a_hub_that_is_told_to_does_not_tick(nobody):
    nobody.ticks, before = False, threading.active_count()
    nobody("GET", "/")
    assert threading.active_count() == before


@pytest.mark.database("postgres")
def test_the_ticker_gets_over_the_end_of_its_connection(make_hub, spawner, postgres):
    hub = people(make_hub(tick_interval=0.01))
    spawner.answers = False
    Api(hub, token_for(hub, "ada"))("POST", "/users/ada/server", status=202)
    name = hub.settings.database.rpartition("/")[2]
    assert postgres.end_hubs(name) >= 1
    spawner.end_all()
    wait_for(lambda: "spawning" not in postgres.ask("SELECT status FROM servers", name))


#: A spawner that records which process polls a server.
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
        """Who has polled since the last call, three times or more, so that a second one would have had its turn."""
        (tmp_path / "polls").unlink(missing_ok=True)
        wait_for(lambda: (tmp_path / "polls").exists() and (tmp_path / "polls").read_text().count("\n") >= 3, 15)
        return {int(pid) for pid in (tmp_path / "polls").read_text().split()}

    (tmp_path / "watching.py").write_text(WATCHING_SPAWNER)
    hub = start_mocked(live, tmp_path, *options, words="50", spawner="watching:Spawner")
    for _ in range(30):  # until every worker has had a request, and so a ticker
        hub.request("GET", "/hub/health")
    assert hub.api("POST", "/users/ada/server", hub.token)[0] == 202
    first, = tickers()
    assert first in hub.workers()
    os.kill(first, signal.SIGKILL)
    second, = tickers()
    assert second != first


@pytest.mark.parametrize("kind", [LiveHub, InUWSGI])
def test_a_shutdown_ends_the_wsgi_server_and_the_servers_it_is_told_to(tmp_path, kind):
    with carrying(tmp_path, "--workers", "2", kind=kind) as hub:
        assert hub.api("POST", "/shutdown", hub.command("token", "root"), {"servers": True})[0] == 202
        assert hub.process.wait(30) == 0
        wait_for(lambda: status_of(hub) == "stopped")


########################################################################################################
# 14. Visits: who is asking
########################################################################################################


OWN_PAGE = "http://localhost:80/hub/home"


@pytest.mark.parametrize("scheme", ["token", "Token", "bearer", "BEARER", "token  "])
def test_a_token_is_taken_in_every_form_of_the_header(hub, scheme):
    header = {"Authorization": f"{scheme} {token_for(hub, 'ada')}"}
    assert Api(hub)("GET", "/user", headers=header).json["name"] == "ada"


@pytest.mark.parametrize("header", [
    "token", "token ", "{}", "Basic {}", "token {} more", "token x{}", "token: {}", "token \xff", "token {}\xe9"])
def test_other_headers_are_refused(hub, header):
    header = {"Authorization": header.format(token_for(hub, "ada"))}
    assert Api(hub)("GET", "/user", status=403, headers=header).json == error(403, "Missing or invalid credentials.")


def test_a_token_in_the_query_is_not_taken(hub, nobody):
    nobody("GET", f"/user?token={token_for(hub, 'ada')}", status=403)


@pytest.mark.parametrize("referer", [OWN_PAGE, "https://localhost:80/hub/", "http://localhost:80/hub/token?x=/"])
def test_the_hubs_own_pages_read_by_cookie(browser, referer):
    assert browser.api("GET", "/user", Referer=referer).json["name"] == "ada"


@pytest.mark.parametrize("referer", [
    "", "http://evil.example/hub/", "http://localhost:80/user/bob/hub/", "/hub/", "http://[/hub/",
    "http://localhost/hub/", "http://localhost:80.evil.example/hub/"])
def test_other_pages_do_not_read_by_cookie(browser, referer):
    response = browser.api("GET", "/user", status=403, Referer=referer)
    assert response.json == error(403, "Missing or invalid credentials.")


def test_the_hubs_own_pages_write_by_cookie(browser):
    assert browser.api("POST", "/users/ada/tokens", status=201, X_XSRFToken=browser.xsrf).json["user"] == "ada"


@pytest.mark.parametrize("given", ["", "x", "é", "of another session"])
def test_other_pages_do_not_write_by_cookie(hub, browser, given):
    given = Browser(hub, "ada").xsrf if given == "of another session" else given
    browser.api("DELETE", "/users/ada/server", status=403, X_XSRFToken=given, Referer=OWN_PAGE)


def test_a_good_token_takes_precedence_over_a_cookie_and_a_wrong_one_does_not(hub, browser):
    for token, name in ((token_for(hub, "bob"), "bob"), ("wrong", "ada")):
        assert browser.api("GET", "/user", Referer=OWN_PAGE, Authorization=f"token {token}").json["name"] == name


def test_a_cookie_ends_after_two_weeks(browser, pass_time):
    pass_time(14 * 24 * 3600 - 5)
    browser.api("GET", "/user", status=200, Referer=OWN_PAGE)
    pass_time(10)
    browser.api("GET", "/user", status=403, Referer=OWN_PAGE)


def test_a_cookie_ends_with_its_user(root, browser):
    root("DELETE", "/users/ada", status=204)
    root("POST", "/users/ada", status=201)
    browser.api("GET", "/user", status=403, Referer=OWN_PAGE)


@pytest.mark.parametrize(("scheme", "secure"), [("http", ""), ("https", "; Secure")])
def test_the_hubs_cookies_are_kept_from_scripts_other_sites_and_plain_http(hub, scheme, secure):
    browser = Browser(hub, **{"wsgi.url_scheme": scheme})
    responses = [browser.get("/hub/login"), browser.sign_in("ada")]
    cookies = [cookie for response in responses for cookie in response.headers.getall("Set-Cookie")]
    assert cookies == [Like(f"jupyterhub-session-id=[0-9a-f]{{32}}; HttpOnly; Path=/; SameSite=Lax{secure}"),
                       Like(f"jupyterhub-hub-login=[^;]+; HttpOnly; Max-Age=1209600; Path=/hub/; SameSite=Lax{secure}")]


def example_path(pattern):
    """A path of a route, with ada's things in it."""
    examples = {"name": "ada", "server_name": "gpu", "token_id": "a1", "code": "503"}
    return re.sub(r"\{(\w+):\w+\}", lambda match: examples.get(match[1], "x"), pattern)


def responders():
    """Every path of the route table with every method it answers."""
    for pattern, kind, suffix in minihub.ROUTES:
        for method in ("GET", "POST", "PATCH", "PUT", "DELETE"):
            if hasattr(kind, f"on_{method.lower()}" + (f"_{suffix}" if suffix else "")):
                yield method, pattern


#: Where nobody gets something else than a 403 or the way to sign in, with the status.
OPEN_TO_ALL = {
    ("GET", "/hub/api"): 200, ("GET", "/hub/api/"): 200, ("POST", "/hub/api/oauth2/token"): 400, ("GET", "/"): 302,
    ("GET", "/hub"): 302, ("GET", "/hub/"): 302, ("GET", "/hub/login"): 200, ("POST", "/hub/login"): 200,
    ("GET", "/hub/logout"): 302, ("GET", "/hub/error/{code:int}"): 200, ("GET", "/hub/health"): 200,
    ("GET", "/hub/logo"): 200}


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


@pytest.mark.parametrize(("method", "pattern"), [
    (method, pattern) for method, pattern in responders() if pattern.startswith("/hub/api/") and "oauth2" not in pattern
    and pattern not in ("/hub/api/", "/hub/api/user")])
def test_an_oauth_token_is_refused(hub, method, pattern):
    api = Api(hub, oauth_token(hub, "root", owner="ada"))
    assert api(method, example_path(pattern).removeprefix("/hub/api"), status=403).json == error(403, "Forbidden")


@pytest.mark.parametrize("pattern", [pattern for method, pattern in responders() if method == "GET"])
def test_head_answers_as_get_does_without_a_body(hub, root, spawner, pattern):
    root("POST", "/users/ada/servers/gpu", status=201)
    path, headers = example_path(pattern), {"Authorization": f"token {root.token}"}
    browser = Browser(hub, "root")
    get, head = (browser.request(path, method=method, headers=headers, status="*") for method in ("GET", "HEAD"))
    assert (head.status_int, head.content_type, head.body) == (get.status_int, get.content_type, b"")
    assert get.status_int != 405


########################################################################################################
# 15. REST resources
########################################################################################################


def user(name, /, **others):
    """The API's User; without others one who has never been active."""
    return {"kind": "user", "name": name, "admin": False, "groups": [], "server": None, "pending": None,
            "created": MOMENT, "last_activity": None, "servers": None, **others}


def server(name="", owner="ada", **others):
    """The API's Server; without others one that is ready."""
    path, below = (f"servers/{name}", f"{name}/") if name else ("server", "")
    return {"name": name, "last_activity": MOMENT, "started": MOMENT, "pending": None, "ready": True, "state": None,
            "url": f"/user/{owner}/{below}", "user_options": {},
            "progress_url": f"/hub/api/users/{owner}/{path}/progress", **others}


def api_token(**others):
    """The API's Token; without others one that ada has asked for."""
    return {"user": "ada", "id": Like("a[0-9]+"), "kind": "api_token", "note": "Requested via api", "created": MOMENT,
            "last_activity": None, "expires_at": None, **others}


def group(name="class", users=(), **properties):
    """The API's Group."""
    return {"kind": "group", "name": name, "users": list(users), "properties": properties}


NO_ADMIN_RIGHTS = error(403, "Only admins can request tokens for other users")
BAD_LOGIN = error(403, "Invalid username or password")
NO_GPU = error(404, "ada has no server named 'gpu'")
NO_TOKEN = error(404, "No such token, or it has expired")
NO_COOKIE = error(404, "No such cookie, or it has expired")
LONG = "x" * 256

#: Requests that are refused and change nothing: who makes which, with which body, and the answer.
REFUSED = [
    *(("ada", line, None, error(403, "Forbidden")) for line in (
        "GET /users/eve", "POST /users/ada", "PATCH /users/ada", "DELETE /users/ada")),
    *(("nobody", line, None, error(403, "Missing or invalid credentials.")) for line in (
        "GET /user", "POST /users/ada/tokens", "GET /authorizations/token/x")),
    *(("root", line, {}, error(404, "No such user: eve")) for line in (
        "GET /users/eve", "PATCH /users/eve", "DELETE /users/eve", "GET /users/eve/tokens", "POST /users/eve/tokens",
        "DELETE /users/eve/tokens/a1", "POST /users/eve/server", "DELETE /users/eve/server",
        "GET /users/eve/server/progress", "POST /users/eve/activity")),
    *(("root", line, None, error(404, "Not Found")) for line in ("GET /no/thing", "GET /users/", "GET /users/a%2Fb")),
    *(("root", line, None, error(405, "Method Not Allowed")) for line in (
        "POST /", "DELETE /users", "GET /users/ada/server", "GET /authorizations/token", "GET /oauth2/token")),
    *(("root", line, body, error(400, f"The body must be a JSON object, not {body!r}"))
      for body in ([], "x", False) for line in (
          "POST /users", "POST /users/eve", "PATCH /users/ada", "POST /users/ada/tokens", "POST /users/ada/server",
          "POST /users/ada/activity", "POST /authorizations/token", "POST /groups/new", "POST /shutdown")),
    *(("root", line, None, error(400, "The body must be a JSON object, not None")) for line in (
        "PATCH /users/ada", "PATCH /proxy")),
    *(("root", line, {"b": 1, "a": 2}, error(400, "Invalid JSON keys: a, b")) for line in (
        "POST /users", "POST /users/eve", "PATCH /users/ada", "DELETE /users/ada/server", "POST /groups",
        "POST /groups/new")),
    *(("root", f"GET /users{query}", None, error(400, Like(".+"))) for query in (
        "?state=x", "?sort=age", "?limit=0", "?offset=-1", "?offset=1e99", "/ada?include_stopped_servers=maybe")),
    *(("root", "POST /users", body, error(400, "Must specify at least one user to create"))
      for body in (None, {"admin": True}, {"usernames": []})),
    *(("root", line, body, error(400, f"{key} must be <class '{kind}'>, not: <class '{given}'>"))
      for line, body, key, kind, given in (
          ("POST /users", {"usernames": ["eve"], "admin": 1}, "user.admin", "bool", "int"),
          ("POST /users/eve", {"groups": "x"}, "user.groups", "list", "str"),
          ("PATCH /users/ada", {"auth_state": None}, "user.auth_state", "dict", "NoneType"),
          ("DELETE /users/ada/server", {"remove": "yes"}, "server.remove", "bool", "str"))),
    ("root", "POST /users", {"usernames": ["eve", 1]}, error(400, "usernames must be a list of strings")),
    ("root", "POST /users", {"usernames": ["", "eve", "x\0", LONG]}, error(400, f"Invalid usernames: , x\0, {LONG}")),
    ("root", "POST /users", {"usernames": ["ADA", "bob", "ada"]}, error(409, "All 2 users already exist")),
    *(("root", f"GET /users/{quote(name)}", None, error(404, f"No such user: {name}")) for name in ("\0", LONG)),
    ("root", "POST /users/ADA", None, error(409, "User ada already exists")),
    *(("root", f"POST /users/{quote(name)}", None, error(400, f"Invalid username: {name}")) for name in ("x\n", LONG)),
    ("root", "PATCH /users/ada", {"name": "a/b", "admin": True}, error(400, "Invalid username: a/b")),
    ("root", "PATCH /users/ada", {"groups": []}, error(400, "Invalid JSON keys: groups")),
    ("root", "PATCH /users/ada", {"name": "Bob"}, error(400, "User bob already exists, username must be unique")),
    ("root", "DELETE /users/ROOT", None, error(400, "Cannot delete yourself!")),
    *(("ada", f"POST /users/{name}/tokens", None, NO_ADMIN_RIGHTS) for name in ("bob", "eve")),
    *(("ada", "POST /users/ada/tokens", {"expires_in": value}, error(
        400, "expires_in must be a number of seconds greater than 0")) for value in (0, -0.5, "60", True, 10 ** 30)),
    *(("ada", "POST /users/ada/tokens", {"note": value}, error(400, "note must be a string of at most 1000 characters"))
      for value in (5, "\0", "x" * 1001)),
    ("nobody", "POST /users/ada/tokens", {"auth": []}, error(403, "Missing or invalid credentials.")),
    *(("nobody", "POST /users/ada/tokens", {"auth": value}, BAD_LOGIN) for value in (
        {}, {"username": "ada", "password": "wrong"}, {"username": "eve", "password": "x"},
        {"username": "bob", "password": password_of("bob")}, {"username": ["ada"], "password": [password_of("ada")]})),
    *(("ada", f"{method} /users/ada/tokens/{quote(token)}", None, error(404, f"No such token {token} for user ada"))
      for method in ("GET", "DELETE") for token in ("x1", "a99", "o1", "1", "a", "a" + "9" * 400, "a-1", "a1x", "a²")),
    ("ada", "POST /users/ada/server", {"x": "x" * 65_530},
     error(400, "The options of a start must not be longer than 65536 characters")),
    *(("ada", f"DELETE /users/ada/{path}", {"remove": True}, error(400, "Cannot delete the default server"))
      for path in ("server", "servers/")),
    *(("ada", line, None, NO_GPU) for line in ("DELETE /users/ada/servers/gpu", "GET /users/ada/servers/gpu/progress")),
    *(("ada", f"POST /users/ada/servers/{name}", None, error(400, Like(r"Invalid server_name: .*\. Use up to 63 .*")))
      for name in ("n%201", "%00")),
    ("ada", "GET /users/ada/server/progress", None, error(400, "ada is not starting...")),
    *(("ada", "POST /users/ada/activity", body, error(
        400, "body must contain at least one of `last_activity` or `servers`")) for body in (
        None, {"activity": "2026-01-01"}, {"servers": {}}, {"last_activity": ""})),
    *(("ada", "POST /users/ada/activity", {"servers": value}, error(
        400, "servers must be a dict of the form {server_name: {last_activity: timestamp}}")) for value in (
        ["x"], {"": "2026-01-01"}, {"": {}}, {"": {"last_activity": None}})),
    ("ada", "POST /users/ada/activity", {"servers": {name: {"last_activity": "2026-01-01"} for name in ("", "gpu")}},
     error(400, "No such server 'gpu' for user ada")),
    *(("ada", "POST /users/ada/activity", {"last_activity": value}, error(400, f"Not a valid timestamp: {value!r}"))
      for value in ("yesterday", 1700000000, ["2026-01-01"], "0001-01-01T00:00:00Z")),
    *(("ada", f"GET /authorizations/token/{token}", None, NO_TOKEN) for token in ("x", "%00%FF")),
    *(("nobody", "POST /authorizations/token", body, BAD_LOGIN) for body in (
        None, {"username": "ada", "password": "wrong"})),
    *(("ada", "POST /authorizations/token", {"username": name}, NO_ADMIN_RIGHTS) for name in ("bob", "eve")),
    *(("root", "POST /authorizations/token", {"username": name}, error(400, f"No such user '{name}'"))
      for name in ("eve", ["ada"])),
    *(("ada", f"GET /authorizations/cookie/{path}", None, NO_COOKIE) for path in (
        "jupyterhub-hub-login/x", "jupyterhub-hub-login", "%FF/%FF")),
    *(("root", line, {}, error(404, "No such group: none")) for line in (
        "POST /groups/none/users", "DELETE /groups/none/users", "PUT /groups/none/properties", "DELETE /groups/none")),
    *(("root", "POST /groups", body, error(400, "Must specify at least one group to create"))
      for body in (None, {"groups": []})),
    ("root", "POST /groups", {"groups": ["new", "a/b"]}, error(400, "Invalid group name: a/b")),
    *(("root", line, {**body, "users": ["eve"]}, error(400, "No such user: eve")) for line, body in (
        ("POST /groups", {"groups": ["new"]}), ("POST /groups/new", {}))),
    ("root", "POST /groups/new", {"users": [1]}, error(400, "users must be a list of strings")),
    ("root", "PATCH /proxy", {"port": "9"}, error(400, Like(".*Set MINIHUB_PROXY to chp.*"))),
    ("root", "POST /shutdown", {"proxy": "x"}, error(400, "proxy must be true or false, got 'x'")),
]


def everything(hub):
    """All that the hub's database holds, except when somebody was last seen."""
    models = (minihub.User, minihub.Server, minihub.Token, minihub.OAuthClient, minihub.Route, minihub.Group)
    with hub.store.connected():
        return {model: [{key: value for key, value in row.items() if key != "last_activity"}
                        for row in model.select().order_by(model._meta.primary_key).dicts()] for model in models}


@pytest.mark.parametrize(("who", "request_line", "body", "answer"), REFUSED)
def test_a_request_is_refused_and_changes_nothing(hub, spawner, who, request_line, body, answer):
    api, before = api_of(hub, None if who == "nobody" else who), everything(hub)
    api.ticks = False
    response = api(*request_line.split(" ", 1), body, status=answer["status"])
    assert (response.json, response.content_type) == (answer, "application/json")
    assert (everything(hub), spawner.launches) == (before, [])


#: What is not for admins or for one user alone, and what has tests of its own.
FOR_ALL = ("/hub/api/", "/hub/api/user", "/hub/api/authorizations/", "/hub/api/oauth2/")


@pytest.mark.parametrize(("method", "pattern"), [
    (method, pattern) for method, pattern in responders()
    if pattern.startswith("/hub/api/") and not (pattern in FOR_ALL or pattern.startswith(FOR_ALL[2:]))])
def test_a_student_may_do_nothing_to_others(hub, bob, method, pattern):
    before, bob.ticks = everything(hub), False
    refused = bob(method, example_path(pattern).removeprefix("/hub/api"), {}, status=403).json
    assert refused in (error(403, "Forbidden"), NO_ADMIN_RIGHTS) and everything(hub) == before


NO_JSON = [b"{", b"\xff", b"nonsense", b"NaN", b'{"admin": Infinity}', b'{"x": 1e999}', b'"\\ud800"', b"1" * 5000,
           b"[" * 100_000, b"{} {}", b"\0", b"admin=1"]


@pytest.mark.parametrize("path", ["/users", "/users/eve", "/users/ada/server", "/authorizations/token"])
def test_an_invalid_json_body_is_refused(root, path):
    refused = error(400, "Invalid JSON in body of request")
    assert [root("POST", path, raw=raw, status="*").json for raw in NO_JSON] == [refused] * len(NO_JSON)


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


@pytest.mark.parametrize("content_type", ["application/json", "application/x-www-form-urlencoded", "nonsense"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_is_read_whatever_its_content_type(root, content_type, encoding):
    body = '{"admin": true}'.encode(encoding)
    root("POST", "/users/eve", raw=body, status=201, headers={"Content-Type": content_type})
    assert root("GET", "/users/eve").json["admin"] is True


def test_everybody_sees_the_version_and_admins_those_of_the_hooks(root, nobody):
    assert [nobody("GET", path).json for path in ("", "/")] == [{"version": "1.5.1"}] * 2
    assert root("GET", "/info").json == {
        "version": "1.5.1", "python": sys.version, "sys_executable": sys.executable,
        "authenticator": {"class": "minihub.PasswordAuthenticator", "version": minihub.__version__},
        "spawner": {"class": f"{FakeSpawner.__module__}.FakeSpawner", "version": "unknown"}}


@pytest.mark.parametrize(("method", "path", "status"), [
    ("HEAD", "/", 200), ("GET", "/users", 403), ("GET", "/x", 404), ("POST", "/", 405), ("OPTIONS", "/users", 200)])
def test_every_response_of_the_api_has_its_headers(nobody, method, path, status):
    headers = nobody(method, path, status=status).headers
    names = ("X-JupyterHub-Version", "Access-Control-Allow-Headers", "Content-Security-Policy")
    assert {name: headers[name] for name in names} == {
        "X-JupyterHub-Version": "1.5.1", "Access-Control-Allow-Headers": "accept, content-type, authorization",
        "Content-Security-Policy": "frame-ancestors 'self'; default-src 'none'"}


def test_an_error_inside_tells_nothing(hub, root, monkeypatch):
    monkeypatch.setattr(hub.people, "list", lambda **filters: 1 / 0)
    response = root("GET", "/users", status=500)
    assert (response.json, response.headers["X-JupyterHub-Version"]) == (error(500, "Internal Server Error"), "1.5.1")


def test_an_admin_sees_everybody_with_their_servers(opened, root, spawner):
    running(opened, "ada"), running(opened, "ada", "gpu")
    spawner.answers = False
    opened.servers.start(server_of(opened, "bob"), {"cpu": 2})
    states = [{"target": Like("http://.*"), "launch": launch.id} for launch in spawner.launches]
    assert root("GET", "/users").json == [
        user("root", admin=True, servers={}, last_activity=MOMENT),
        user("ada", server="/user/ada/", last_activity=MOMENT, servers={
            "": server(state=states[0]), "gpu": server("gpu", state=states[1])}),
        user("bob", pending="spawn", last_activity=MOMENT, servers={"": server(
            owner="bob", state=states[2], ready=False, pending="spawn", user_options={"cpu": 2})})]


@pytest.mark.parametrize(("query", "names"), [
    ("name_filter=b", ["bob"]), ("name_filter=%25", []), ("sort=name", ["ada", "bob", "root"]),
    ("sort=-name", ["root", "bob", "ada"]), ("sort=-id&limit=1", ["bob"]), ("offset=1", ["ada", "bob"]),
    ("state=ready", ["ada"]), ("state=active", ["ada", "bob"]), ("state=inactive", ["root"]),
    ("colour=red&nonsense", ["root", "ada", "bob"])])
def test_users_are_filtered_and_sorted(root, spawner, query, names):
    root("POST", "/users/ada/servers/gpu", status=201)
    spawner.answers = False
    root("POST", "/users/bob/server", status=202)
    assert [model["name"] for model in root("GET", f"/users?{query}").json] == names


@pytest.mark.parametrize(("query", "servers"), [
    ("", []), ("?include_stopped_servers=1", [""]), ("?include_stopped_servers=false", [])])
def test_stopped_servers_are_shown_on_request(root, query, servers):
    in_list, alone = root("GET", f"/users{query}").json[1], root("GET", f"/users/ada{query}").json
    assert [list(model["servers"]) for model in (in_list, alone)] == [servers, servers]
    assert all(model["servers"][""]["stopped"] is True for model in (in_list, alone) if servers)


def test_lists_are_paged_for_clients_that_accept_pagination(root):
    root("POST", "/users", {"usernames": [f"u{number}" for number in range(60)]}, status=201)
    accept = {"Accept": minihub.PAGE_TYPE}
    first = root("GET", "/users", headers=accept).json
    assert (len(first["items"]), first["_pagination"]) == (50, {"offset": 0, "limit": 50, "total": 63, "next": {
        "offset": 50, "limit": 50, "url": "http://localhost:80/hub/api/users?offset=50&limit=50"}})
    last = root("GET", "/users?limit=50&offset=62", headers=accept).json
    assert [model["name"] for model in last["items"]] == ["u59"] and last["_pagination"]["next"] is None
    assert len(root("GET", "/users").json) == 63
    root("POST", "/users", {"usernames": [f"v{number}" for number in range(200)]}, status=201)
    capped = root("GET", "/users?limit=1000", headers=accept).json
    assert (len(capped["items"]), capped["_pagination"]["limit"], capped["_pagination"]["total"]) == (200, 200, 263)
    root("POST", "/groups", {"groups": ["a", "b"]}, status=201)
    groups = root("GET", "/groups?limit=1", headers=accept).json
    assert (groups["items"], groups["_pagination"]["total"]) == ([group("a")], 2)


def test_several_users_are_created_at_once(root):
    body = {"usernames": ["Eve", "ada", "åsa", "eve"], "admin": True, "name": "x", "groups": []}
    assert root("POST", "/users", body, status=201).json == [user("eve", admin=True), user("åsa", admin=True)]
    assert root("GET", "/users/ada").json["admin"] is False


def test_more_users_than_sqlite_takes_values_are_created_at_once(hub, root):
    with hub.store.connected():
        if hasattr(hub.store.database.connection(), "setlimit"):  # from Python 3.11 on
            hub.store.database.connection().setlimit(9, 600)  # SQLITE_LIMIT_VARIABLE_NUMBER
    names = [f"user{number}" for number in range(700)]
    assert len(root("POST", "/users", {"usernames": names}, status=201).json) == 700


def test_a_user_is_seen_by_themselves_and_by_admins(root, ada, spawner):
    ada("POST", "/users/ada/server", status=201)
    state = {"target": Like("http://.*"), "launch": spawner.launches[0].id}
    expected = user("ada", server="/user/ada/", servers={"": server()}, last_activity=MOMENT)
    assert ada("GET", "/users/ada").json == expected
    assert root("GET", "/users/ADA").json == {**expected, "servers": {"": server(state=state)}, "auth_state": None}


@pytest.mark.parametrize("name", ["a b", "a@b.example", "李", "a;b=c", "x" * 255, "%", "\N{GRINNING FACE}" * 255])
def test_a_user_can_have_an_unusual_name(root, name):
    path = f"/users/{quote(name, safe='')}"
    assert root("POST", path, status=201).json["name"] == name
    root("POST", f"{path}/server", status=201)
    assert root("GET", path).json["server"] == f"/user/{quote(name, safe='@~')}/"
    root("DELETE", path, status=204)


@pytest.mark.parametrize(("changes", "changed"), [
    ({}, {}), ({"name": "ada"}, {}), ({"name": "Lovelace"}, {"name": "lovelace"}), ({"admin": True}, {"admin": True}),
    ({"auth_state": {"é": [1]}}, {"auth_state": {"é": [1]}})])
def test_a_user_is_changed(root, changes, changed):
    expected = user("ada", **{"auth_state": None, **changed})
    assert root("PATCH", "/users/ada", changes).json == expected
    assert root("GET", f"/users/{expected['name']}").json == {**expected, "servers": {}}


def test_groups_are_created_all_or_none_listed_and_deleted(root):
    body = {"groups": ["a", "b"], "users": ["ada", "Bob"]}
    groups = [group("a", ["ada", "bob"]), group("b", ["ada", "bob"])]
    assert root("POST", "/groups", body, status=201).json == groups
    assert root("POST", "/groups/class", {"name": "x"}, status=201).json == group()
    assert root("POST", "/groups/a", status=409).json == error(409, "Group a already exists")
    assert root("POST", "/groups", {"groups": ["c", "a"]}, status=409).json == error(409, "Group c, a already exists")
    assert root("GET", "/groups").json == [*groups, group()]
    root("DELETE", "/groups/class", status=204)
    root("GET", "/groups/class", status=404)


def test_members_are_added_and_removed(root, ada):
    root("POST", "/groups/class", status=201)
    assert root("POST", "/groups/class/users", {"users": ["ADA", "bob", "ada"]}).json == group(users=["ada", "bob"])
    assert ada("GET", "/user").json["groups"] == ["class"]
    assert root("DELETE", "/groups/class/users", {"users": ["bob", "root"]}).json == group(users=["ada"])


@pytest.mark.parametrize(("method", "body", "message"), [
    ("POST", {}, "Must specify users to add"), ("DELETE", {}, "Must specify users to delete"),
    *((method, {"users": ["bob", "nobody"]}, "No such user: nobody") for method in ("POST", "DELETE")),
    ("POST", {"users": "ada"}, "group.users must be <class 'list'>, not: <class 'str'>")])
def test_members_change_all_or_none(root, method, body, message):
    root("POST", "/groups/class", {"users": ["ada"]}, status=201)
    assert root(method, "/groups/class/users", body, status=400).json == error(400, message)
    assert root("GET", "/groups/class").json == group(users=["ada"])


def test_a_group_has_properties(root):
    root("POST", "/groups/class", {"users": ["ada"]}, status=201)
    assert root("PUT", "/groups/class/properties", {"room": "é", "seats": [1]}).json == group(
        users=["ada"], room="é", seats=[1])
    root("PUT", "/groups/class/properties", {"colour": "red"})
    assert root("PUT", "/groups/class/properties", [], status=400).json == error(
        400, "The body must be a JSON object, not []")
    assert root("GET", "/groups").json == [group(users=["ada"], colour="red")]


@pytest.fixture
def served(make_hub):
    """A hub with an admin's service and one without rights."""
    return people(make_hub(services=[
        {"name": "boss", "api_token": "boss-token", "admin": True, "url": "http://127.0.0.1:9", "info": {"a": 1}},
        {"name": "ada", "api_token": "ada-token-of-a-service"}]))


def test_services_are_listed_by_name(served):
    ada = {"name": "ada", "admin": False, "url": "", "prefix": "", "command": [], "pid": 0, "info": {}, "display": True}
    boss = {"name": "boss", "admin": True, "url": "http://127.0.0.1:9", "prefix": "/services/boss/", "info": {"a": 1}}
    assert Api(served, "boss-token")("GET", "/services").json == {"ada": ada, "boss": {**ada, **boss}}


def test_a_service_is_seen_by_itself_and_by_admins_and_is_no_user_of_its_name(served):
    service = Api(served, "ada-token-of-a-service")
    assert service("GET", "/services/ada").json["name"] == "ada"
    assert service("GET", "/authorizations/token/boss-token").json["kind"] == "service"
    me = service("GET", "/user").json
    assert (me["kind"], me["name"], me["admin"]) == ("service", "ada", False)
    for path in ("/services", "/services/boss", "/services/none", "/users/ada"):
        service("GET", path, status=403)
    assert api_of(served, "root")("GET", "/services/none", status=404).json == error(404, "No such service: none")
    api_of(served, "ada")("GET", "/services/ada", status=403)
    assert service("POST", "/users/ada/tokens", status=403).json == NO_ADMIN_RIGHTS
    assert service("POST", "/authorizations/token", {"username": "ada"}, status=403).json == NO_ADMIN_RIGHTS


def test_an_admin_service_acts_for_users(served):
    boss = Api(served, "boss-token")
    assert boss("POST", "/users/ada/tokens", status=201).json["note"] == "Requested via api by service boss"
    assert boss("POST", "/authorizations/token", {"username": "ada"}).json["user"]["name"] == "ada"
    boss("POST", "/authorizations/token", status=400)
    boss("DELETE", "/users/ada", status=204)


def test_a_user_sees_their_tokens(hub, ada, pass_time):
    with hub.store.connected():
        hub.tokens.create(hub.people.find("ada"), "short", expires_in=60)
        hub.tokens.create(hub.people.find("ada"), "long", expires_in=3600)
    oauth_token(hub, "ada")
    pass_time(61)
    ada("GET", "/user")
    assert ada("GET", "/users/ada/tokens").json == {
        "api_tokens": [api_token(note="long", expires_at=MOMENT), api_token(note="Server at /user/ada/"),
                       api_token(note="", last_activity=MOMENT)],
        "oauth_tokens": [{"user": "ada", "id": Like("o[0-9]+"), "kind": "oauth", "oauth_client": "Server at /user/ada/",
                          "created": MOMENT, "last_activity": None, "expires_at": None}]}


@pytest.mark.parametrize(("who", "note"), [("ada", "Requested via api"), ("root", "Requested via api by user root")])
def test_a_token_works_for_its_user_whoever_has_made_it(hub, who, note):
    made = api_of(hub, who)("POST", "/users/ADA/tokens", status=201).json
    assert made == api_token(note=note, token=SECRET)
    its_own = Api(hub, made["token"])("GET", f"/users/ada/tokens/{made['id']}").json
    assert its_own == api_token(id=made["id"], note=note, last_activity=MOMENT)


@pytest.mark.parametrize(("body", "token"), [
    ({"note": "é" * 1000}, {"note": "é" * 1000}), ({"note": "", "expires_in": 0.5}, {"expires_at": MOMENT}),
    ({"note": None, "expires_in": None, "nonsense": []}, {}), ({"expires_in": 10 ** 9}, {"expires_at": MOMENT})])
def test_a_token_is_made_as_requested(ada, body, token):
    assert ada("POST", "/users/ada/tokens", body, status=201).json == api_token(**token, token=SECRET)


@pytest.mark.parametrize("body", [None, {"expires_in": 10 ** 9}])
def test_no_token_lives_longer_than_the_setting_allows(make_hub, pass_time, body):
    hub = people(make_hub(token_lifetime=3600))
    made = Api(hub, api_of(hub, "ada")("POST", "/users/ada/tokens", body, status=201).json["token"])
    pass_time(3590)
    made("GET", "/user")
    pass_time(20)
    made("GET", "/user", status=403)


def test_a_password_makes_a_token(nobody):
    body = {"auth": {"username": "Ada", "password": password_of("ada")}, "note": "from home"}
    assert nobody("POST", "/users/ada/tokens", body, status=201).json == api_token(note="from home", token=SECRET)


def test_a_password_makes_no_token_for_an_unknown_user(make_hub):
    hub = people(make_hub(authenticator="dummy", password="class secret"))
    body = {"auth": {"username": "eve", "password": "class secret"}}
    assert Api(hub)("POST", "/users/eve/tokens", body, status=403).json == BAD_LOGIN


@pytest.mark.parametrize(("path", "body"), [
    ("/users/ada/tokens", lambda password: {"auth": {"username": "ada", "password": password}}),
    ("/authorizations/token", lambda password: {"username": "ada", "password": password})])
def test_sign_ins_through_the_api_have_a_rate_limit(nobody, pass_time, path, body):
    for _ in range(5):
        nobody("POST", path, body("wrong"), status=403)
    response = nobody("POST", path, body(password_of("ada")), status=429)
    assert response.json == error(429, Like(r"Too many failed sign-ins\. Try again in (299|300) seconds"))
    assert response.headers["Retry-After"] in ("299", "300")
    pass_time(301)
    nobody("POST", path, body(password_of("ada")), status="2*")


def test_a_token_is_revoked_even_by_itself(hub, ada):
    made = ada("POST", "/users/ada/tokens", status=201).json
    assert ada("DELETE", f"/users/ada/tokens/{made['id']}", status=204).body == b""
    Api(hub, made["token"])("GET", "/user", status=403)
    ada("DELETE", f"/users/ada/tokens/{made['id']}", status=404)
    ada("DELETE", f"/users/ada/tokens/{ada('GET', '/user').json['token_id']}", status=204)
    ada("GET", "/user", status=403)


def test_a_token_is_found_under_its_own_user_only(root, ada):
    token = ada("GET", "/user").json["token_id"]
    assert root("DELETE", f"/users/root/tokens/{token}", status=404).json == error(
        404, f"No such token {token} for user root")
    assert ada("GET", f"/users/ada/tokens/{token}").json["id"] == token


def test_revoking_an_oauth_token_revokes_all_of_the_user_for_that_server(hub, ada):
    revoked = oauth_token(hub, "ada"), oauth_token(hub, "ada")
    kept = oauth_token(hub, "root", owner="ada"), oauth_token(hub, "ada", owner="bob")
    ada("DELETE", f"/users/ada/tokens/{Api(hub, revoked[0])('GET', '/user').json['token_id']}", status=204)
    statuses = [Api(hub, token)("GET", "/user", status="*").status_int for token in revoked + kept]
    assert statuses == [403, 403, 200, 200]


def test_a_server_is_started_and_stopped(ada, spawner):
    started = ada("POST", "/users/ada/server", {"cpu": 2}, status=201)
    assert (started.body, started.content_type, spawner.launches[0].user_options) == (b"", "text/plain", {"cpu": 2})
    assert ada("POST", "/users/ada/server", status=400).json == error(400, "ada is already running")
    assert ada("DELETE", "/users/ada/server", status=204).body == b""
    ada("DELETE", "/users/ada/server", status=204)
    assert ada("GET", "/users/ada").json["servers"] == {}


def test_a_slow_start_goes_on(ada, spawner):
    spawner.answers = False
    response = ada("POST", "/users/ada/server", status=202)
    assert (response.body, response.content_type) == (b"", "text/plain")
    ada("POST", "/users/ada/server", status=202)
    assert (len(spawner.launches), ada("GET", "/users/ada").json["pending"]) == (1, "spawn")
    assert ada("DELETE", "/users/ada/server", status=400).json == error(400, "ada is pending spawn, please wait")


def test_a_start_that_fails_at_once_is_reported_at_once(ada, spawner):
    spawner.exits_at_once, why = 1, "The server ended while it started [status=1]" + LOG_TAIL
    assert ada("POST", "/users/ada/server", status=500).json == error(500, f"ada's server failed to start. {why}")
    assert events(ada, "/users/ada/server/progress") == [
        {"progress": 100, "failed": True, "message": f"Spawn failed: {why}"}]


def test_a_slow_stop_goes_on(ada, spawner):
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


@pytest.mark.parametrize(("first", "then", "used"), [
    ({"cpu": 2}, None, {"cpu": 2}), ({"cpu": 2}, {}, {}), (None, None, None), ({"é": "\0"}, None, {"é": "\0"})])
def test_options_are_kept_until_others_are_given(ada, spawner, first, then, used):
    ada("POST", "/users/ada/server", first, status=201)
    ada("DELETE", "/users/ada/server", status=204)
    ada("POST", "/users/ada/server", then, status=201)
    assert spawner.launches[1].user_options == used
    assert ada("GET", "/users/ada").json["servers"][""]["user_options"] == (used or {})


def test_the_number_of_servers_that_run_or_wait_is_limited(make_hub, spawner):
    hub, spawner.answers = people(make_hub(active_server_limit=2, concurrent_spawn_limit=1)), False
    api_of(hub, "ada")("POST", "/users/ada/server", status=202)
    api_of(hub, "root")("POST", "/users/root/server", status=202)
    assert api_of(hub, "bob")("POST", "/users/bob/server", status=429).json == error(
        429, "The hub runs 2 servers already, which is its limit. Stop one first")
    hub.stop_server("root")
    api_of(hub, "bob")("POST", "/users/bob/server", status=202)


def test_a_start_that_waits_for_room_is_pending_and_can_be_stopped(make_hub, spawner):
    hub, spawner.answers = people(make_hub(concurrent_spawn_limit=1)), False
    ada, bob = api_of(hub, "ada"), api_of(hub, "bob")
    ada("POST", "/users/ada/server", status=202)
    for _ in range(2):
        bob("POST", "/users/bob/server", {"cpu": 2}, status=202)
    model = bob("GET", "/users/bob").json
    assert (model["pending"], model["server"]) == ("spawn", None)
    assert model["servers"] == {"": server(owner="bob", pending="spawn", ready=False, user_options={"cpu": 2})}
    assert [user["name"] for user in api_of(hub, "root")("GET", "/users?state=active").json] == ["ada", "bob"]
    assert events(bob, "/users/bob/server/progress") == [
        {"progress": 0, "message": "Server requested"}, {"progress": 10, "message": "1st in line"}]
    bob("DELETE", "/users/bob/server", status=204)
    assert (bob("GET", "/users/bob").json["servers"], len(spawner.launches)) == ({}, 1)


def test_one_user_has_three_starts_pending_at_most(make_hub, spawner):
    hub, spawner.answers = people(make_hub(named_server_limit=0)), False
    ada, bob = api_of(hub, "ada"), api_of(hub, "bob")
    answers = [ada("POST", f"/users/ada/servers/{number}", status="*") for number in range(40)]
    assert [answer.status_int for answer in answers] == [202] * 3 + [429] * 37
    assert (answers[3].json, answers[3].headers["Retry-After"]) == (
        error(429, "3 servers of ada are starting. Wait for one"), "10")
    bob("POST", "/users/bob/server", status=202)
    assert [launch.user.name for launch in spawner.launches] == ["ada", "ada", "bob"]
    spawner.end_all()
    hub.tick()
    ada("POST", "/users/ada/server", status=202)


def test_a_named_server_is_started_stopped_and_removed(ada):
    ada("POST", "/users/ada/servers/gpu", {"gpu": 1}, status=201)
    assert ada("GET", "/users/ada").json["servers"] == {"gpu": server("gpu", user_options={"gpu": 1})}
    ada("DELETE", "/users/ada/servers/gpu", status=204)
    ada("DELETE", "/users/ada/servers/gpu", status=204)
    ada("DELETE", "/users/ada/servers/gpu", {"remove": True}, status=204)
    assert ada("DELETE", "/users/ada/servers/gpu", status=404).json == NO_GPU


def test_the_number_of_named_servers_is_limited(make_hub):
    hub = people(make_hub(named_server_limit=1))
    ada = api_of(hub, "ada")
    ada("POST", "/users/ada/servers/one", status=201)
    ada("DELETE", "/users/ada/servers/one", status=204)
    assert ada("POST", "/users/ada/servers/two", status=400).json == error(
        400, Like("User ada already has the maximum of 1 named servers.  One must be deleted before .*"))
    ada("POST", "/users/ada/servers/one", status=201)
    ada("POST", "/users/ada/server", status=201)
    api_of(hub, "bob")("POST", "/users/bob/servers/two", status=201)


def test_a_user_has_ten_named_servers_unless_the_settings_say_otherwise(ada):
    statuses = []
    for number in range(11):
        statuses.append(ada("POST", f"/users/ada/servers/{number}", status="*").status_int)
    assert statuses == [201] * 10 + [400]
    ada("POST", "/users/ada/server", status=201)


@pytest.mark.parametrize("path, body", [
    ("/users/ada/tokens", {"auth": {"username": "ada", "password": password_of("ada")}}),
    ("/authorizations/token", {"username": "ada", "password": password_of("ada")})])
def test_one_user_has_a_hundred_api_tokens_at_most(hub, nobody, bob, path, body):
    tokens = [token_for(hub, "ada") for _ in range(99)]
    token_for(hub, "ada", expires_in=-1)
    with hub.store.connected():
        running(hub)  # whose token does not count
    nobody("POST", path, body, status="20*")
    assert nobody("POST", path, body, status=429).json == error(
        429, "User ada already has 100 API tokens. Revoke one first")
    bob("POST", "/users/bob/tokens", status=201)
    ada = Api(hub, tokens[0])
    ada("DELETE", f"/users/ada/tokens/{ada('GET', '/users/ada/tokens').json['api_tokens'][-1]['id']}", status=204)
    nobody("POST", path, body, status="20*")


def test_named_servers_can_be_switched_off(make_hub):
    ada = api_of(people(make_hub(named_servers=False)), "ada")
    assert ada("POST", "/users/ada/servers/gpu", status=400).json == error(400, "Named servers are not enabled.")
    ada("POST", "/users/ada/servers/", status=201)


def events(api, path):
    """The events of a progress stream; webtest lends no socket, and so gets those so far."""
    response = api("GET", path)
    assert (response.content_type, response.headers["Cache-Control"]) == ("text/event-stream", "no-cache")
    return [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: ")]


@pytest.mark.parametrize(("path", "url"), [("server", "/user/ada/"), ("servers/gpu", "/user/ada/gpu/")])
def test_the_progress_of_a_running_server_is_complete(ada, path, url):
    ada("POST", f"/users/ada/{path}", status=201)
    assert events(ada, f"/users/ada/{path}/progress") == [{
        "progress": 100, "ready": True, "message": f"Server ready at {url}",
        "html_message": f'Server ready at <a href="{url}">{url}</a>', "url": url}]


def test_progress_is_read_from_the_row_that_the_ticker_changes(ada, spawner):
    spawner.answers = False
    ada("POST", "/users/ada/server", status=202)
    spawner.end_all()
    ada.ticks = False
    assert events(ada, "/users/ada/server/progress") == [
        {"progress": 0, "message": "Server requested"}, {"progress": 50, "message": "Spawning server..."}]
    assert ada("GET", "/users/ada/server/progress").text.endswith("\n\nretry: 1000\n\n")
    ada.hub.tick()
    assert [event["failed"] for event in events(ada, "/users/ada/server/progress")] == [True]


@pytest.mark.parametrize("options", [(), ("--threads", "4")], ids=["sync", "threads"])
def test_progress_is_streamed_while_the_hub_goes_on_answering(live, tmp_path, options):
    pytest.importorskip("tornado", reason="pip install '.[classroom]'")
    (tmp_path / "echo.py").write_text(ECHO_SERVER)
    command = f"while [ ! -e {tmp_path}/go ]; do sleep 0.1; done; exec {sys.executable} {tmp_path}/echo.py"
    hub = live(*options, cmd=f"sh -c '{command}'")
    hub.command("link", "ada")
    token = hub.command("token", "ada")
    assert hub.api("POST", "/users/ada/server", token)[0] == 202
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", hub.port, timeout=30)) as connection:
        connection.request("GET", "/hub/api/users/ada/server/progress", headers={"Authorization": f"token {token}"})
        response = connection.getresponse()
        assert response.getheader("Content-Type").startswith("text/event-stream")
        lines = (json.loads(line[6:]) for line in response if line.startswith(b"data: "))
        assert [next(lines)["progress"], next(lines)["progress"]] == [0, 50]
        assert hub.request("GET", "/hub/health", timeout=5).status == 200
        (tmp_path / "go").touch()
        assert [(line["progress"], line["url"]) for line in lines] == [(100, "/user/ada/")]


class Stream:
    """A client that reads a user's progress stream with root's token, or another, in a thread of its own."""

    def __init__(self, hub, name, token=None):
        self.events, self.times = [], []
        self._connection = http.client.HTTPConnection("127.0.0.1", hub.port, timeout=60)
        headers = {"Authorization": f"token {token or hub.token}"}
        self._connection.request("GET", f"/hub/api/users/{name}/server/progress", headers=headers)
        response = self._connection.getresponse()
        self.status, self._socket = response.status, response.fp.raw._sock
        self._thread = threading.Thread(target=self._read, args=(response,), daemon=True)
        self._thread.start()

    def _read(self, response):
        with contextlib.suppress(OSError, ValueError):
            for line in response:
                if line.startswith(b"data: "):
                    self.times.append(time.monotonic())
                    self.events.append(json.loads(line[6:]))

    def messages(self):
        return [event["message"] for event in self.events]

    def close(self):
        with contextlib.suppress(OSError):  # if it has ended
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._connection.close()


def start_half_mute(live, folder, *options, **settings):
    """A gunicorn with the students ada, bob and mute, whose server starts and never answers; `.token` is root's."""
    hub = start_mocked(live, folder, *options, words="{username}", **settings)
    hub.api("POST", "/users", hub.token, {"usernames": ["mute", "bob"]})
    assert hub.api("POST", "/users/mute/server", hub.token)[0] == 202
    wait_for(lambda: groups_in(folder))
    return hub


@pytest.mark.parametrize("options", [(), ("-w", "2", "--threads", "4")], ids=["sync", "threads"])
def test_progress_tells_the_place_in_line(live, tmp_path, options):
    hub = start_half_mute(live, tmp_path, *options, concurrent_spawn_limit=1)
    (mute,) = groups_in(tmp_path)
    for name in ("ada", "bob"):
        assert hub.api("POST", f"/users/{name}/server", hub.token)[0] == 202
    with contextlib.closing(Stream(hub, "bob")) as stream:
        wait_for(lambda: stream.messages() == ["Server requested", "2nd in line"], message=stream.messages)
        assert hub.api("DELETE", "/users/ada/server", hub.token)[0] == 204
        wait_for(lambda: stream.messages()[2:] == ["1st in line"], message=stream.messages)
        os.killpg(mute, signal.SIGKILL)
        wait_for(lambda: stream.events[-1].get("ready"), message=stream.messages)
    assert [event["progress"] for event in stream.events if event["progress"] != 50] == [0, 10, 10, 100]
    assert (status_of(hub), status_of(hub, "bob")) == ("stopped", "ready")


def test_150_progress_streams_delay_nobodys_ready_by_more_than_a_second(live, tmp_path):
    hub = start_half_mute(live, tmp_path, "--threads", "4")
    with contextlib.ExitStack() as opened:
        crowd = [opened.enter_context(contextlib.closing(Stream(hub, "mute"))) for _ in range(150)]
        assert hub.api("POST", "/users/ada/server", hub.token)[0] == 202
        stream = opened.enter_context(contextlib.closing(Stream(hub, "ada")))
        wait_for(lambda: status_of(hub) == "ready")
        ready = time.monotonic()
        wait_for(lambda: stream.events and stream.events[-1]["progress"] == 100)
        assert {stream.status for stream in crowd} == {200} and stream.times[-1] - ready < 1.5
        os.killpg(json.loads(hub.rows("SELECT state FROM servers WHERE status = 'spawning'")[0])["pid"], signal.SIGKILL)
        wait_for(lambda: all(stream.events[-1].get("failed") for stream in crowd))


def test_progress_streams_share_one_look_at_the_database_each_half_second(make_hub, spawner, monkeypatch):
    hub, spawner.answers, looks = people(make_hub()), False, []
    progress = hub.servers.progress
    monkeypatch.setattr(hub.servers, "progress", lambda servers: looks.append(len(servers)) or time.sleep(0.1)
                        or progress(servers))
    with hub.store.connected(), contextlib.ExitStack() as opened:
        servers = start_all(hub, "ada", "bob", "root")
        streams, clients = minihub.ProgressStreams(hub.store, hub.servers), []
        for number in range(150):
            near, far = socket.socketpair()
            far.settimeout(20)
            clients.append(opened.enter_context(far))
            hub.splicer.carry(minihub.ProgressStream(near, streams, servers[number % 3], {"progress": 50}, None))
        begin = time.monotonic()
        wait_for(lambda: len(looks) == 3)
        assert time.monotonic() - begin > 3 * 0.5 and looks == [150] * 3
        spawner.end(servers[0].launch)
        hub.tick()
        failed = [far for number, far in enumerate(clients) if number % 3 == 0]
        assert all(b'"failed": true' in read_all(far) for far in failed)
        wait_for(lambda: looks[-1] == 100)


def test_one_user_has_twenty_progress_streams_at_most_and_admins_have_more(live, tmp_path):
    hub = start_half_mute(live, tmp_path)
    token = hub.command("token", "mute")
    with contextlib.ExitStack() as opened:
        streams = [opened.enter_context(contextlib.closing(Stream(hub, "mute", token))) for _ in range(20)]
        admins = [opened.enter_context(contextlib.closing(Stream(hub, "mute"))) for _ in range(21)]
        assert {stream.status for stream in streams + admins} == {200}
        assert hub.api("GET", "/users/mute/server/progress", token) == (
            429, error(429, "User mute already has 20 progress streams. Close one first"))
        streams[0].close()
        wait_for(lambda: opened.enter_context(contextlib.closing(Stream(hub, "mute", token))).status == 200)


@pytest.mark.database("postgres")
def test_progress_goes_on_when_the_database_comes_back(make_hub, spawner, postgres):
    hub, spawner.answers = people(make_hub()), False
    api_of(hub, "ada")("POST", "/users/ada/server", status=202)
    near, far = socket.socketpair()
    far.settimeout(20)
    with far:
        with hub.store.connected():
            streams, server = minihub.ProgressStreams(hub.store, hub.servers), server_of(hub)
        hub.splicer.carry(minihub.ProgressStream(near, streams, server, {"progress": 50}, None))
        wait_for(lambda: far.recv(65536) == b"\n\n" and postgres.end_hubs(urlsplit(hub.settings.database).path[1:]))
        hub.store.disconnect()
        hub.delete_user("ada")
        assert b'"failed": true' in read_all(far)


def in_minutes(minutes):
    return minihub.isoformat(minihub.now() + timedelta(minutes=minutes))


def test_a_server_reports_activity(opened, root, spawner):
    running(opened), running(opened, server_name="gpu")
    its_own = Api(opened, spawner.launches[0].variables["JUPYTERHUB_API_TOKEN"])
    times = [in_minutes(10), in_minutes(20), in_minutes(30)]
    body = {"last_activity": times[2], "servers": {"": {"last_activity": times[0]}, "gpu": {"last_activity": times[1]}}}
    response = its_own("POST", "/users/ada/activity", body)
    assert (response.body, response.content_type) == (b"", "application/json")
    model = root("GET", "/users/ada").json
    assert [seen["last_activity"] for seen in (model["servers"][""], model["servers"]["gpu"], model)] == times


def test_clocks_may_differ_by_almost_an_hour(ada, pass_time):
    at = in_minutes(59.5)
    assert ada("POST", "/users/ada/activity", {"last_activity": at}, status=400).json == error(
        400, f"Rejecting activity from more than an hour in the future: {at}")
    pass_time(60)
    ada("POST", "/users/ada/activity", {"last_activity": at})


@pytest.mark.parametrize("who", ["bob", "a server"])
def test_any_api_token_may_ask_for_the_owner_of_a_token(hub, spawner, who):
    with hub.store.connected():
        running(hub, "bob")
    asking = Api(hub, spawner.launches[0].variables["JUPYTERHUB_API_TOKEN"]) if who == "a server" else api_of(hub, who)
    token = token_for(hub, "ada")
    model = asking("GET", f"/authorizations/token/{token}").json
    assert activity(hub, "ada")[0] is not None
    assert model == {**user("ada", last_activity=MOMENT), "session_id": None, "token_id": Like("a[0-9]+"),
                     "scopes": model["scopes"]} == Api(hub, token)("GET", "/user").json
    assert asking("GET", f"/authorizations/token/{oauth_token(hub, 'ada', owner='bob')}").json["name"] == "ada"


def test_an_oauth_token_proves_nothing_to_another_server_or_to_a_browser(hub, root, ada, bob, browser):
    path = f"/authorizations/token/{oauth_token(hub, 'ada')}"
    assert [api("GET", path).json["name"] for api in (root, ada)] == ["ada", "ada"]
    assert bob("GET", path, status=404).json == NO_TOKEN
    browser.api("GET", path, status=403, Referer=OWN_PAGE)


@pytest.mark.parametrize(("who", "body", "name"), [
    ("ada", None, "ada"), ("ada", {}, "ada"), ("ada", {"username": "ADA"}, "ada"), ("root", {"username": "Ada"}, "ada"),
    ("root", None, "root"), (None, {"username": "Ada", "password": password_of("ada")}, "ada")])
def test_the_deprecated_endpoint_makes_a_token(hub, who, body, name):
    response = api_of(hub, who)("POST", "/authorizations/token", body)
    last_activity = response.json["user"]["last_activity"]
    assert response.json == {"token": SECRET, "user": user(name, admin=name == "root", last_activity=last_activity),
                             "warning": "/authorizations/token is deprecated in favour of /users/:name/tokens"}
    assert Api(hub, response.json["token"])("GET", "/user").json["name"] == name
    cookies = [cookie.partition("=")[0] for cookie in response.headers.getall("Set-Cookie")]
    assert sorted(cookies) == ([] if who else ["jupyterhub-hub-login", "jupyterhub-session-id"])


@pytest.mark.parametrize(("origin", "cookies"), [
    ("http://localhost:80", 2), ("http://evil.example", 0), ("https://localhost:80", 0), ("null", 0)])
def test_a_form_of_another_site_signs_nobody_in(nobody, origin, cookies):
    response = nobody("POST", "/authorizations/token", {"username": "ada", "password": password_of("ada")},
                      headers={"Origin": origin, "Content-Type": "text/plain"})
    assert len(response.headers.getall("Set-Cookie")) == cookies


@pytest.mark.parametrize("by_body", [False, True])
def test_any_api_token_may_ask_for_the_owner_of_a_cookie_under_its_own_name(hub, browser, bob, by_body):
    value, path = browser.cookies["jupyterhub-hub-login"], "/authorizations/cookie/jupyterhub-hub-login"
    response = bob("GET", path, raw=value.encode()) if by_body else bob("GET", f"{path}/{quote(value, safe='')}")
    assert (response.json["name"], response.json["kind"]) == ("ada", "user")
    assert bob("GET", path.replace("hub-login", "services"), raw=value.encode(), status=404).json == NO_COOKIE
    link = f"/authorizations/cookie/minihub-link/{link_of(hub, 'ada').rpartition('/')[2]}"
    assert bob("GET", link, status=404).json == NO_COOKIE  # the cookies and the links are signed with the same key


def test_a_lost_route_comes_back_and_a_stale_one_goes(opened, root, ada):
    ada("POST", "/users/ada/server", status=201)
    opened.routes.proxy.delete_route("/user/ada/")
    opened.routes.proxy.add_route("/user/eve/", "http://127.0.0.1:9", {"user": "eve", "server_name": ""})
    root("POST", "/proxy")
    routes = root("GET", "/proxy").json
    assert (set(routes), routes["/"]["data"]["hub"]) == ({"/", "/user/ada/"}, True)
    assert routes["/user/ada/"] == {"routespec": "/user/ada/", "target": Like("http://127.0.0.1:.*"), "data": {
        "user": "ada", "server_name": ""}}


@pytest.mark.parametrize("change", [
    {"api_url": "http://x:99999"}, {"api_url": "file:///etc"}, {"port": "x"}, {"ip": "a b"}, {"protocol": "gopher"}])
def test_a_proxy_is_not_moved_to_an_invalid_address(make_hub, change):
    hub = people(make_hub(proxy="chp"))
    message = api_of(hub, "root")("PATCH", "/proxy", change, status=400).json["message"]
    assert message.startswith("The proxy's API must be at an address like http://127.0.0.1:8001")
    with hub.store.connected():
        assert hub.routes.proxy.api()["api_url"] == "http://127.0.0.1:8001"


@pytest.mark.parametrize(("body", "left", "proxies"), [
    (None, 1, 1), ({"servers": False, "proxy": True}, 1, 1), ({"servers": 1, "proxy": 0}, 0, 0)])
def test_a_shutdown_of_a_mounted_hub_calls_its_site(make_hub, spawner, monkeypatch, body, left, proxies):
    over, stopped = threading.Event(), []
    hub = people(make_hub(on_shutdown=over.set))
    monkeypatch.setattr(hub.routes, "stop_proxy", lambda: stopped.append("proxy"))
    api_of(hub, "ada")("POST", "/users/ada/server", status=201)
    response = api_of(hub, "root")("POST", "/shutdown", body, status=202)
    assert response.json == {"message": "Shutting down Hub"}
    assert over.wait(10) and (len(spawner.running), len(stopped)) == (left, proxies)


CONTRACT = HERE.parent / "shared" / "rest-api-1.2-as-built.yml"
SCHEMATHESIS_CHECK = '''
import schemathesis
from schemathesis.specs.openapi.checks import content_type_conformance

@schemathesis.check
def right_content_type(ctx, response, case):
    if response.status_code != 204:  # which has no body, and so no content type
        return content_type_conformance(ctx, response, case)
'''


@pytest.mark.skipif(not CONTRACT.exists(), reason=f"needs ../shared/{CONTRACT.name}")
@pytest.mark.parametrize(("who", "examples"), [("boss", 15), ("ada", 3)])
def test_answers_to_random_requests_are_as_the_contract_says(served, tmp_path, who, examples):
    pytest.importorskip("schemathesis", reason="pip install schemathesis")
    token = "boss-token" if who == "boss" else token_for(served, "ada")
    (tmp_path / "hooks.py").write_text(SCHEMATHESIS_CHECK)
    checks = "not_a_server_error,response_schema_conformance,right_content_type"
    with in_process(werkzeug_server, served) as server:
        done = subprocess.run(
            [str(Path(sys.executable).with_name("schemathesis")), "run", str(CONTRACT), "--seed", "1", "--no-color",
             "--url", f"http://127.0.0.1:{server.port}/hub/api", "--header", f"Authorization: token {token}",
             "--max-examples", str(examples), "--phases", "examples,coverage,fuzzing", "--checks", checks],
            cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


########################################################################################################
# 16. The skeleton of pages
########################################################################################################


@pytest.mark.parametrize("template, values, text", [
    ("<b>{name}</b>", {"name": "<i>\"'&"}, "<b>&lt;i&gt;&quot;&#x27;&amp;</b>"),
    ("{rows}", {"rows": [minihub.Markup("<p>"), "<p>"]}, "<p>&lt;p&gt;"), ("{count}", {"count": 3}, "3"),
    ("{one}", {"one": "{two}", "two": 2}, "{two}"), ("{ color: red }", {}, "{ color: red }")])
def test_everything_in_a_page_is_escaped_but_markup(template, values, text):
    assert minihub.markup(template, **values) == text


@pytest.mark.parametrize("message, box", [
    ("", ""), ("<No>", "<div class=problem role=alert>&lt;No&gt;</div>"),
    ("It failed\n1\n<2>", "<div class=problem role=alert>It failed<pre>1\n&lt;2&gt;</pre></div>")])
def test_the_lines_of_a_log_stay_lines(message, box):
    assert minihub.problem(message) == box


def buttons_of(response):
    """The buttons and button-like links of a page, from top to bottom."""
    return [element.get_text() for element in response.html.select("button, a[class*=button]")]


def form_to(response, action):
    """The page's form that is sent to that path."""
    return next(form for form in response.forms.values() if form.action == action)


def alert_of(response):
    """The problems that a page shows."""
    return [element.get_text() for element in response.html.find_all(role="alert")]


def server_row(hub, name, server_name=""):
    """The row of a user's server."""
    with hub.store.connected():
        return hub.servers.get(hub.people.find(name), server_name)


def link_of(hub, name):
    """The path of a new sign-in link of the user's."""
    with hub.store.connected():
        return urlsplit(hub.sign_in.link_for(hub.people.find(name))).path


AUTHORIZE = "/hub/api/oauth2/authorize?client_id=jupyterhub-user-bob&response_type=code"
FORMS = [("/hub/spawn/ada", {}), ("/hub/stop/bob", {}), ("/hub/delete/bob/project", {}), ("/hub/token", {"note": "x"}),
         ("/hub/token", {"revoke": "a1"}), ("/hub/admin", {"names": "eve"}), (AUTHORIZE, {}),
         ("/hub/admin/link/ada", {})]


@pytest.fixture
def class_at_work(hub, root):
    """A hub where bob's server runs and he has another; the first token, a1, is root's."""
    with hub.store.connected():
        running(hub, "bob")
        server_of(hub, "bob", "project")
    return hub


def facts_of(hub):
    """Everything that the forms can change."""
    with hub.store.connected():
        return [list(query.order_by(query.model.id).tuples()) for query in (
            minihub.User.select(minihub.User.name, minihub.User.password, minihub.User.session_key),
            minihub.Server.select(minihub.Server.name, minihub.Server.status, minihub.Server.launch),
            minihub.Token.select(minihub.Token.hashed), minihub.OAuthCode.select(minihub.OAuthCode.hashed))]


@pytest.mark.parametrize("path, fields", FORMS)
def test_a_form_works_on_the_hubs_own_pages_and_on_no_other_site(class_at_work, path, fields):
    browser, anothers = Browser(class_at_work, "root"), Browser(class_at_work, "ada").xsrf
    before = facts_of(class_at_work)
    for forged in ({}, {"_xsrf": "0" * 64}, {"_xsrf": "é"}, {"_xsrf": anothers}):
        response = browser.post(path, {**fields, **forged}, status=403)
        assert "Go back, reload it and try again" in alert_of(response)[0]
    assert facts_of(class_at_work) == before
    browser.post(path, {**fields, "_xsrf": browser.xsrf}, status=(200, 302, 303))
    assert (facts_of(class_at_work) == before) == ("/link/" in path)  # links are signed, not stored


def test_an_xsrf_token_ends_with_the_session(browser):
    token = browser.xsrf
    browser.get("/hub/logout")
    browser.sign_in("ada")
    browser.post("/hub/spawn/ada", {"_xsrf": token}, status=403)


def test_a_page_that_does_not_exist_says_so_and_leads_home(browser):
    response = browser.get("/hub/nowhere", status=404)
    assert (alert_of(response), response.html.main.a["href"]) == (["There is no page at this address"], "/hub/home")


def test_a_failing_page_shows_no_internals(hub, browser, monkeypatch):
    monkeypatch.setattr(hub.servers, "of", lambda user: {}["a secret"])
    response = browser.get("/hub/home", status=500)
    assert alert_of(response) == ["Internal Server Error"] and "a secret" not in response.text


ALL_PAGES = ["/hub/login", "/hub/home", "/hub/spawn/ada", "/hub/spawn-pending/ada", "/hub/spawn-pending/bob",
             "/hub/token", "/hub/admin", "/hub/user/ada/lab", "/hub/nowhere", AUTHORIZE, "link"]


@pytest.fixture(params=ALL_PAGES)
def any_page(request, class_at_work, spawner):
    """Each of the pages as the admin sees it, of a hub mounted at /lab."""
    hub, spawner.answers = class_at_work, False
    browser = Browser(hub, SCRIPT_NAME="/lab")
    path = link_of(hub, "ada") if request.param == "link" else request.param
    if path.startswith("/hub/link") or path.endswith("/login"):
        return browser.get(f"/lab{path}", status=200)
    browser.sign_in("root", url="/lab/hub/login")
    if path.endswith("pending/bob"):
        browser.post("/lab/hub/stop/bob", {"_xsrf": browser.xsrf_at("/lab/hub/home")}, status=303)
        hub.tick()
        browser.post("/lab/hub/spawn/bob", {"_xsrf": browser.xsrf_at("/lab/hub/home")}, status=303)
    return browser.get(f"/lab{path}", status="*")


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
    urls = [element[key] for key in ("href", "action", "src", "data-events") for element in
            any_page.html.select(f"[{key}]")]
    assert urls and not [url for url in urls if not url.startswith("/lab/")]


def csp_source(element):
    """The source that allows this one inline element in a Content-Security-Policy."""
    digest = element and hashlib.sha256(element.string.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'" if digest else "'none'"


def test_no_page_runs_another_script_than_its_own_or_stays_in_a_cache(any_page):
    page = any_page.html
    assert any_page.headers["Content-Security-Policy"] == (
        "default-src 'none'; img-src 'self'; connect-src 'self'; base-uri 'none';"
        f" style-src {csp_source(page.style)}; script-src {csp_source(page.script)}; frame-ancestors 'self'")
    assert not re.search(r"<[^>]+\s(?:on\w+|style)=", any_page.text)
    assert [any_page.headers[name] for name in ("Cache-Control", "Referrer-Policy", "X-Content-Type-Options")] == [
        "no-store", "same-origin", "nosniff"]


########################################################################################################
# 17. OAuth2 endpoints
########################################################################################################

VERIFIER = "v" * 43
CHALLENGE = minihub.challenge_of(VERIFIER)
PKCE = {"code_challenge": CHALLENGE, "code_challenge_method": "S256"}


class Client:
    """A user's server as an OAuth client: where it sends browsers, and what it asks the hub."""

    def __init__(self, hub, spawner, owner="ada"):
        with hub.store.connected():
            running(hub, owner)
        variables = spawner.launches[-1].variables
        self.api = Api(hub)
        self.identifier, self.secret = variables["JUPYTERHUB_CLIENT_ID"], variables["JUPYTERHUB_API_TOKEN"]
        self.redirect_uri = variables["JUPYTERHUB_OAUTH_CALLBACK_URL"]

    def authorize(self, **parameters):
        """The path to which a browser is sent; None leaves a parameter out."""
        parameters = {"client_id": self.identifier, "redirect_uri": self.redirect_uri, "response_type": "code",
                      "state": "s", **parameters}
        return f"/oauth2/authorize?{urlencode({key: value for key, value in parameters.items() if value is not None})}"

    def code(self, browser, **parameters):
        """The code that a browser brings back."""
        return answer_of(browser.api("GET", self.authorize(**parameters), status=302))["code"]

    def redeem(self, code, status=200, **fields):
        """The response to the request for a token."""
        fields = {"client_id": self.identifier, "client_secret": self.secret, "grant_type": "authorization_code",
                  "code": code, "redirect_uri": self.redirect_uri, **fields}
        form = urlencode({key: value for key, value in fields.items() if value is not None})
        return self.api("POST", "/oauth2/token", raw=form.encode(), status=status, headers={
            "Content-Type": "application/x-www-form-urlencoded", "Authorization": f"token {self.secret}"})


def answer_of(response):
    """The parameters with which a browser is sent back to the client."""
    return {name: value for name, [value] in parse_qs(urlsplit(response.location).query).items()}


@pytest.fixture
def client(hub, spawner):
    """ada's server."""
    return Client(hub, spawner)


@pytest.mark.database("sqlite", "postgres")
def test_a_browser_gets_into_its_own_server_at_once(hub, browser, client):
    response = browser.api("GET", client.authorize(**PKCE), status=302)
    assert urlsplit(response.location).path == "/user/ada/oauth_callback"
    assert answer_of(response) == {"code": SECRET, "state": "s"}
    answer = client.redeem(answer_of(response)["code"], code_verifier=VERIFIER)
    scopes = ["access:servers!server=ada/", "read:users:name!user=ada", "read:users:groups!user=ada"]
    assert answer.json == {
        "access_token": SECRET, "token_type": "Bearer", "expires_in": 1209600, "scope": " ".join(scopes)}
    assert (answer.headers["Cache-Control"], answer.headers["Pragma"]) == ("no-store", "no-cache")
    model = Api(hub, answer.json["access_token"])("GET", "/user").json
    session_id = browser.cookies["jupyterhub-session-id"]
    assert (model["name"], model["scopes"], model["session_id"]) == ("ada", scopes, session_id)


def test_a_visitor_signs_in_first(hub, client):
    browser = Browser(hub)
    login = browser.api("GET", client.authorize(), status=302).location
    assert urlsplit(login).path == "/hub/login"
    back = urlsplit(browser.sign_in("ada", url=login).location)
    assert f"{back.path}?{back.query}" == f"/hub/api{client.authorize()}"


def test_an_admin_consents_before_entering_somebody_elses_server(hub, client):
    page = Browser(hub, "root").api("GET", client.authorize())
    assert (page.content_type, "the server of <b>ada</b>" in page.text) == ("text/html", True)
    response = page.form.submit(status=302)
    answer = client.redeem(answer_of(response)["code"]).json
    assert answer["scope"].split() == [
        "access:servers!server=ada/", "read:users:name!user=root", "read:users:groups!user=root"]
    assert Api(hub, answer["access_token"])("GET", "/user").json["name"] == "root"


def test_nobody_gets_into_the_server_of_another_student(hub, client):
    browser = Browser(hub, "bob")
    form = {"_xsrf": browser.xsrf}
    for response in (browser.api("GET", client.authorize(), status=403),
                     browser.post(f"/hub/api{client.authorize()}", form, status=403)):
        assert (response.content_type, response.location) == ("text/html", None)
    with hub.store.connected():
        assert minihub.OAuthCode.select().count() == 0


def test_an_admin_without_admin_access_is_refused(make_hub, spawner):
    hub = people(make_hub(admin_access=False))
    client = Client(hub, spawner)
    assert Browser(hub, "root").api("GET", client.authorize(), status=403).content_type == "text/html"
    assert client.code(Browser(hub, "ada")) == SECRET


@pytest.mark.parametrize("skips", [False, True])
def test_a_service_identifies_people_after_their_consent_unless_it_skips_that(make_hub, skips):
    hub = people(make_hub(services=[{"name": "boss", "api_token": "boss-token", "url": "http://127.0.0.1:9",
                                     "oauth_no_confirm": skips}]))
    browser, wish = Browser(hub, "ada"), "/oauth2/authorize?client_id=service-boss&response_type=code&state=s"
    response = browser.api("GET", wish, status=302 if skips else 200)
    if not skips:
        assert "the service <b>boss</b>" in response.text
        response = response.form.submit(status=302)
    assert urlsplit(response.location).path == "/services/boss/oauth_callback"
    assert answer_of(response) == {"code": SECRET, "state": "s"}
    answer = browser.post("/hub/api/oauth2/token", {
        "client_id": "service-boss", "client_secret": "boss-token", "grant_type": "authorization_code",
        "code": answer_of(response)["code"], "redirect_uri": "/services/boss/oauth_callback"}).json
    model = Api(hub, answer["access_token"])("GET", "/user").json
    assert model["name"] == "ada" and "access:services!service=boss" in model["scopes"]


@pytest.mark.parametrize("parameters", [
    {"client_id": "jupyterhub-user-eve"}, {"client_id": None}, {"client_id": "\0"}, {"redirect_uri": ""},
    {"redirect_uri": "/user/ada/oauth_callback/"}, {"redirect_uri": "/user/ADA/oauth_callback"},
    {"redirect_uri": "https://evil.example/user/ada/oauth_callback"}, {"redirect_uri": "/user/ada/oauth_callback?x=1"}])
def test_a_browser_is_never_sent_to_an_unknown_address(browser, client, parameters):
    response = browser.api("GET", client.authorize(**parameters), status=400)
    assert (response.content_type, response.location) == ("text/html", None)


@pytest.mark.parametrize(("parameters", "code"), [
    ({"response_type": "token"}, "unsupported_response_type"), ({"response_type": None}, "unsupported_response_type"),
    *(({**PKCE, **change}, "invalid_request") for change in (
        {"code_challenge_method": "plain"}, {"code_challenge_method": None}, {"code_challenge": "short"},
        {"code_challenge": "\0" * 43}))])
def test_an_invalid_request_is_reported_to_the_client(browser, client, parameters, code):
    response = browser.api("GET", client.authorize(**parameters), status=302)
    assert urlsplit(response.location).path == "/user/ada/oauth_callback"
    assert answer_of(response) == {"error": code, "state": "s"}


@pytest.mark.parametrize("optional", [
    {"state": "a b&c=d+e/%=="}, {"state": "é\r\nSet-Cookie: x=1"}, {"state": "x" * 2000}, {}])
def test_state_and_redirect_uri_are_optional_and_the_state_comes_back_untouched(browser, client, optional):
    path = client.authorize(**{"state": None, "redirect_uri": None, "scope": "nonsense", **optional})
    assert answer_of(browser.api("GET", path, status=302)) == {"code": SECRET, **optional}


def test_a_code_is_valid_once_and_for_five_minutes(browser, client, pass_time):
    code, late = client.code(browser), client.code(browser)
    pass_time(295)
    client.redeem(code)
    pass_time(10)
    for used in (code, late):
        assert client.redeem(used, status=400).json == {
            "error": "invalid_grant", "error_description": "The code is not valid"}


@pytest.mark.parametrize(("fields", "status", "code"), [
    ({"client_id": None}, 401, "invalid_client"), ({"client_id": "\0"}, 401, "invalid_client"),
    ({"client_secret": "wrong"}, 401, "invalid_client"), ({"client_secret": None}, 401, "invalid_client"),
    ({"code": "wrong"}, 400, "invalid_grant"), ({"code": None}, 400, "invalid_grant"),
    ({"redirect_uri": "/user/ada/"}, 400, "invalid_request"), ({"grant_type": None}, 400, "unsupported_grant_type"),
    ({"code_verifier": None}, 400, "invalid_request"), ({"code_verifier": ""}, 400, "invalid_request"),
    ({"code_verifier": "w" * 43}, 400, "invalid_grant"), ({"code_verifier": "é\0"}, 400, "invalid_grant")])
def test_a_failed_attempt_does_not_use_up_the_code(browser, client, fields, status, code):
    valid = {"code": client.code(browser, **PKCE), "code_verifier": VERIFIER}
    answer = client.redeem(**{**valid, **fields}, status=status)
    assert answer.json == {"error": code, "error_description": Like(".+")}
    assert client.redeem(**valid).json["access_token"] == SECRET


def test_a_client_without_a_challenge_needs_no_verifier(browser, client):
    client.redeem(client.code(browser))
    client.redeem(client.code(browser), code_verifier=VERIFIER)


def test_a_code_is_valid_for_its_client_only(hub, spawner, browser, client):
    code = client.code(browser)
    assert Client(hub, spawner, "bob").redeem(code, status=400).json["error"] == "invalid_grant"
    client.redeem(code)


@pytest.mark.database("sqlite", "postgres")
def test_one_of_many_redeems_a_code(hub, browser, client):
    def redeem(number):
        status = client.redeem(code, status="*").status_int
        hub.store.disconnect()
        return status

    code, client.api.ticks = client.code(browser), False
    assert sorted(in_threads(4, redeem)) == [200, 400, 400, 400]


def test_a_form_with_too_many_fields_is_refused(browser, client):
    code = client.code(browser)
    client.redeem(code, status=400, **{f"field{number}": "x" for number in range(1000)})
    client.redeem(code, **{f"field{number}": "x" for number in range(900)})


def test_tokens_and_codes_end_when_the_server_stops(ada, browser, client):
    token, code = client.redeem(client.code(browser)).json["access_token"], client.code(browser)
    ada("DELETE", "/users/ada/server", status=204)
    assert ada("GET", f"/authorizations/token/{token}", status=404).json == NO_TOKEN
    assert client.redeem(code, status=401).json["error"] == "invalid_client"
    assert browser.api("GET", client.authorize(), status=400).content_type == "text/html"


def test_tokens_and_codes_end_when_the_browser_signs_out(hub, ada, browser, client):
    token, code = client.redeem(client.code(browser)).json["access_token"], client.code(browser)
    elsewhere = client.redeem(client.code(Browser(hub, "ada"))).json["access_token"]
    browser.get("/hub/logout", status=302)
    Api(hub, token)("GET", "/user", status=403)
    assert client.redeem(code, status=400).json["error"] == "invalid_grant"
    assert Api(hub, elsewhere)("GET", "/user").json["name"] == ada("GET", "/user").json["name"] == "ada"


def test_signing_out_without_being_signed_in_ends_nothing(hub, browser, client):
    token = client.redeem(client.code(browser)).json["access_token"]
    stranger = Browser(hub)
    stranger.set_cookie("jupyterhub-session-id", browser.cookies["jupyterhub-session-id"])
    stranger.get("/hub/logout", status=302)
    assert Api(hub, token)("GET", "/user").json["name"] == "ada"


########################################################################################################
# 18. Pages of students
########################################################################################################


@pytest.mark.parametrize("name, password", [
    ("ada", "wrong"), ("eve", "eve eve secret"), ("", ""), ("<b>", "x"), ("ada\0", "x"), ("\udcff", "\udcff")])
def test_wrong_credentials_show_the_form_again_with_the_name_kept(hub, name, password):
    browser = Browser(hub)
    form = {"_xsrf": browser.xsrf_at("/hub/login"), "username": name.encode("utf-8", "surrogateescape"),
            "password": password.encode("utf-8", "surrogateescape")}
    response = browser.post("/hub/login", form, status=200)
    assert alert_of(response) == ["Wrong name or password."]
    assert [response.form[field].value for field in ("username", "password")] == [name.replace("\udcff", "\ufffd"), ""]
    assert not browser.is_signed_in()


@pytest.mark.parametrize("given", [None, "", "wrong", "é"])
def test_signing_in_without_an_xsrf_token_loses_only_the_password(hub, given):
    browser = Browser(hub)
    browser.get("/hub/login")
    form = {"username": "ada", "password": password_of("ada"), **({} if given is None else {"_xsrf": given})}
    response = browser.post("/hub/login?next=/hub/token", form, status=200)
    assert alert_of(response) == ["This page was open for too long, or cookies are switched off. Please sign in again."]
    assert (response.form["username"].value, browser.is_signed_in()) == ("ada", False)
    response.form["password"] = password_of("ada")
    assert response.form.submit(status=302).headers["Location"] == "/hub/token"


def test_the_rate_limit_of_sign_ins_is_explained_on_the_page(hub):
    browser = Browser(hub)
    for _ in range(5):
        browser.sign_in("ada", "wrong", status=200)
    response = browser.sign_in("ada", status=429)
    assert alert_of(response) == [Like(r"Too many failed sign-ins\. Try again in (299|300) seconds")]
    assert (response.headers["Retry-After"], response.form["username"].value) == (Like("299|300"), "ada")
    assert browser.sign_in("bob").headers["Location"] == "/hub/home"


def test_the_sign_in_page_says_where_to_find_the_first_admins_link(first_link):
    hub, link = first_link
    assert Browser(hub).get("/hub/login").html.select_one(".state").text == (
        "This hub has no admin yet. The link for the first one is in the log, in the hub's terminal."
        " The command minihub link NAME --admin makes one, too.")
    submit_password(Browser(hub), link, username="teacher")
    assert minihub.LINK_HINT in Browser(hub).get("/hub/login").text


def test_the_sign_in_page_of_a_hub_without_passwords_promises_no_link_for_an_admin(make_hub):
    assert "no admin" not in Browser(make_hub(authenticator="dummy", password="x")).get("/hub/login").text


SAFE_NEXT = ["/hub/token", "/user/ada/lab?path=a%20b&x=1", "/user/ada/lab/tree/a%20b.ipynb#cell", "/",
             "/%2F%2Fevil.example", "/user/ada/?next=https://evil.example"]
EVIL_NEXT = ["", "//evil.example", "///evil.example", "https://evil.example/", "https:evil.example",
             "javascript:alert(1)", "/\\evil.example", "\\\\evil.example", "/\t/evil.example", "\t//evil.example",
             "/ /evil.example", "/\0/evil.example", "/\x7f/evil.example", "%2F%2Fevil.example", "/hub\\token", "@evil"]


@pytest.mark.parametrize("target, location", [*((target, target) for target in SAFE_NEXT),
                                              *((target, "/hub/home") for target in EVIL_NEXT)])
def test_signing_in_leads_to_a_path_on_this_site_only(hub, target, location):
    url, browser = f"/hub/login?{urlencode({'next': target})}", Browser(hub)
    assert browser.sign_in("ada", url=url).headers["Location"] == location
    assert browser.get(url, status=302).headers["Location"] == location


@pytest.mark.parametrize("query, location", [
    ("", "/hub/home"), ("?next=/hub/token", "/hub/token"), ("?next=/hub/token&x=1", "/hub/token"),
    ("?x=a%20b&y=%C3%BC", "/hub/home?x=a+b&y=%C3%BC"), ("?next=//evil.example&x=1", "/hub/home?x=1")])
@pytest.mark.parametrize("path", ["/", "/hub", "/hub/"])
def test_the_query_survives_on_the_way_through_the_root_and_signing_in(hub, path, query, location):
    browser = Browser(hub)
    response = browser.get(path + query, status=302)
    if path != "/hub/":
        assert response.headers["Location"] == f"/hub/{query}"
        response = response.follow(status=302)
    assert response.headers["Location"] == f"/hub/login?{urlencode({'next': f'/hub/{query}'})}"
    response = browser.sign_in("ada", url=response.headers["Location"])
    assert response.headers["Location"] == f"/hub/{query}"
    assert response.follow(status=302).headers["Location"] == location


@pytest.mark.parametrize("target, location", [
    ("/user/ada/lab/tree/x.ipynb", "/user/ada/lab/tree/x.ipynb"),
    ("/user/bob/", "/user/ada/"), ("https://evil.example/", "/user/ada/"), ("//evil.example/user/ada/", "/user/ada/")])
def test_a_start_leads_on_into_the_server_only(browser, target, location):
    pending = browser.get(f"/hub/spawn/ada?{urlencode({'next': target})}").form.submit(status=303)
    assert pending.follow(status=302).headers["Location"] == location


def test_signing_out_ends_the_session(browser):
    response = browser.get("/hub/logout", status=302)
    assert (response.headers["Location"], browser.cookies, browser.is_signed_in()) == ("/hub/login", {}, False)


def submit_password(browser, link, password="a new password", again=None, status=303, **fields):
    """The response to the form behind a sign-in link."""
    form = browser.get(link, status=200).form
    for field, value in {"password": password, "again": again or password, **fields}.items():
        form[field] = value
    return form.submit(status=status)


def test_a_new_password_ends_sign_in_links_and_sessions(hub, browser, pass_time):
    link = link_of(hub, "ada")
    form = Browser(hub).get(link).form
    pass_time(5)
    submit_password(Browser(hub), link_of(hub, "ada"))
    assert [alert_of(page) for page in (form.submit(status=403), browser.get(link, status=403))] == [
        ["This link has been used already. Ask for a new one"]] * 2
    assert not browser.is_signed_in()


@pytest.mark.parametrize("password, again, message", [
    ("a new password", "a new passwort", "The two passwords are not the same"),
    ("short", "short", "Choose a password of at least 8 characters that is not your name")])
def test_a_bad_new_password_is_refused_and_the_link_goes_on_working(hub, password, again, message):
    link, browser = link_of(hub, "ada"), Browser(hub)
    response = submit_password(browser, link, password, again, status=400)
    assert (alert_of(response), response.form["username"].value) == ([message], "ada")
    assert Browser(hub).sign_in("ada").headers["Location"] == "/hub/home"
    submit_password(browser, link)


def test_a_sign_in_link_is_not_used_by_another_sites_form(hub):
    link = link_of(hub, "ada")
    page = Browser(hub).post(link, {"password": "a new password", "again": "a new password"}, status=400)
    assert "open for too long" in page.text
    assert submit_password(Browser(hub), link).headers["Location"] == "/hub/home"


@pytest.fixture
def first_link(make_hub):
    """A hub without users, and the path of the first admin's link."""
    hub = make_hub()
    with hub.store.connected():
        return hub, urlsplit(hub.sign_in.first_admin_link()).path


def test_the_first_admin_chooses_name_and_password(first_link):
    browser = Browser(first_link[0])
    assert submit_password(browser, first_link[1], username="Teacher").headers["Location"] == "/hub/home"
    assert "teacher (admin)" in browser.get("/hub/admin", status=200).html.main.text


@pytest.mark.parametrize("name", ["a/b", ""])
def test_a_first_admin_without_a_valid_name_is_asked_again(first_link, name):
    hub, link = first_link
    response = submit_password(Browser(hub), link, username=name, status=400)
    assert (alert_of(response), response.form["username"].value) == ([f"Invalid username: {name}"], name)
    with hub.store.connected():
        assert hub.people.list() == ([], 0)


@pytest.mark.parametrize("status, words, buttons", [
    ("stopped", "not running", ["Start"]), ("spawning", "starting", ["Watch", "Stop"]),
    ("ready", "running", ["Open", "Stop"]), ("stopping", "stopping", [])])
def test_home_offers_what_can_be_done_to_a_server(make_hub, spawner, status, words, buttons):
    hub = people(make_hub(named_servers=False))
    browser, spawner.answers, spawner.stubborn = Browser(hub, "ada"), status != "spawning", True
    if status != "stopped":
        browser.get("/hub/home").form.submit(status=303)
        hub.tick()
    if status == "stopping":
        browser.get("/hub/home").form.submit(status=303)
    response = browser.get("/hub/home", status=200)
    assert (response.html.select_one(".state").text, buttons_of(response)) == (words, buttons)
    assert response.headers.get("Refresh") == ("2" if status == "stopping" else None)
    assert server_row(hub, "ada").status == status


def test_pages_tell_the_place_in_line(make_hub, spawner):
    hub, spawner.answers = people(make_hub(concurrent_spawn_limit=1)), False
    hub.start_server("bob"), hub.start_server("root")
    browser, teacher = Browser(hub, "ada"), Browser(hub, "root")
    waiting = browser.get("/hub/spawn").form.submit(status=303).follow(status=200)
    assert (waiting.html.h1.text, waiting.html.select_one("output").text) == ("Your server is starting", "2nd in line")
    assert waiting.html.noscript.meta["http-equiv"] == "refresh"
    home = browser.get("/hub/home")
    assert (home.html.select_one(".state").text, buttons_of(home)[:2]) == ("2nd in line", ["Watch", "Stop"])
    rows = [row.text for row in teacher.get("/hub/admin").html.select(".below .state")]
    assert rows == ["1st in line", "2nd in line", "starting"]
    assert browser.get("/hub/user/ada/", status=503).html.h1.text == "Your server is in line"
    browser.get("/hub/spawn").form.submit(status=303)
    assert (server_row(hub, "ada").status, len(spawner.launches)) == ("stopped", 1)
    spawner.end_all(), hub.tick()
    assert teacher.get("/hub/spawn").html.select_one("output").text == ""


def test_too_many_tokens_or_starts_are_refused_on_a_page_that_says_so(hub, browser, spawner):
    for _ in range(100):
        token_for(hub, "ada")
    response = browser.post("/hub/token", {"_xsrf": browser.xsrf}, status=429)
    assert alert_of(response) == ["User ada already has 100 API tokens. Revoke one first"]
    spawner.answers = False
    for name in "abc":
        start_named(browser, name)
    assert alert_of(start_named(browser, "d", status=429)) == ["3 servers of ada are starting. Wait for one"]


def test_start_leads_through_the_waiting_page_into_the_server(hub, browser, spawner):
    spawner.answers = False
    pending = browser.get("/hub/spawn/ada").form.submit(status=303)
    assert pending.location == "/hub/spawn-pending/ada"
    for waiting in (pending.follow(status=200), browser.get("/hub/spawn", status=200)):
        assert waiting.html.h1.text == "Your server is starting"
        assert waiting.html.select_one("#progress")["data-events"] == "/hub/api/users/ada/server/progress"
        assert waiting.html.noscript.meta["http-equiv"] == "refresh"
    with hub.store.connected():
        minihub.Server.update(target=f"{spawner.address}/here").where(minihub.Server.status == "spawning").execute()
    assert [response.location for response in (pending.follow(status=302), browser.get("/hub/spawn", status=302))] == [
        "/user/ada/"] * 2


def test_a_waiting_page_can_cancel_the_start(hub, browser, spawner):
    spawner.answers = False
    waiting = browser.get("/hub/spawn/ada").form.submit(status=303).follow(status=200)
    stopped = waiting.form.submit(status=303)
    hub.tick()
    assert (stopped.location, buttons_of(stopped.follow(status=200))[0]) == ("/hub/home", "Start")
    assert server_row(hub, "ada").status == "stopped"


@pytest.mark.parametrize("path", ["/hub/spawn", "/hub/spawn-pending/ada"])
def test_following_a_link_starts_nothing(hub, browser, path):
    response = browser.get(path, status=200)
    assert (response.html.h1.text, buttons_of(response)) == ("Your server is not running", ["Start"])
    assert server_row(hub, "ada").status == "stopped"


def test_a_failed_start_shows_the_last_lines_of_its_log(browser, spawner):
    spawner.exits_at_once = 3
    response = browser.get("/hub/spawn/ada").form.submit(status=303).follow(status=200)
    assert response.html.h1.text == "Your server has failed"
    assert alert_of(response)[0].startswith("The server ended while it started [status=3]")
    assert (response.html.pre.text, buttons_of(response)) == (
        "Traceback\nImportError: no module named antigravity", ["Start"])
    assert browser.get("/hub/home").html.pre.text == response.html.pre.text


def test_home_tells_which_of_several_servers_has_failed(browser, spawner):
    spawner.exits_at_once = 3
    start_named(browser, "project").follow()
    assert alert_of(browser.get("/hub/home"))[0].startswith("project: The server ended while it started [status=3]")


@pytest.mark.parametrize("settings, words", [({}, "running"), (
    {"idle_timeout": 3600}, "running; as things stand it will be stopped at 2026-01-01 13:00 UTC")])
def test_home_says_when_an_idle_server_will_be_stopped(make_hub, settings, words):
    hub = people(make_hub(**settings))
    with hub.store.connected():
        running(hub)
        minihub.Server.update(started=minihub.parse_time("2026-01-01T11:00:00Z"),
                              last_activity=minihub.parse_time("2026-01-01T12:00:00Z")).execute()
    assert Browser(hub, "ada").get("/hub/home").html.select_one(".state.ready").text == words


def start_named(browser, name, status=303):
    """The response to home's form for another server."""
    form = next(form for form in browser.get("/hub/home").forms.values() if "server_name" in form.fields)
    form["server_name"] = name
    return form.submit(status=status)


def test_another_server_is_started_by_name(hub, browser):
    response = start_named(browser, "project")
    assert response.headers["Location"] == "/hub/spawn-pending/ada/project"
    assert response.follow(status=302).headers["Location"] == "/user/ada/project/"
    assert server_row(hub, "ada").status == "stopped"


@pytest.mark.parametrize("name", ["../x", "lab", "<b>", "x" * 64])
def test_an_invalid_server_name_is_refused(hub, browser, name):
    for response in (start_named(browser, name, status=400), browser.get("/hub/spawn/ada/lab", status=400)):
        assert alert_of(response)[0].startswith("Invalid server_name")
    assert server_row(hub, "ada", name) is None


def test_the_page_of_a_named_server_creates_none_before_it_is_started(hub, browser):
    page = browser.get("/hub/spawn/ada/project", status=200)
    assert (buttons_of(page), server_row(hub, "ada", "project")) == (["Start"], None)
    assert page.form.submit(status=303).headers["Location"] == "/hub/spawn-pending/ada/project"
    assert server_row(hub, "ada", "project").status == "spawning"


def test_without_named_servers_there_is_no_form_for_them(make_hub):
    browser = Browser(people(make_hub(named_servers=False)), "ada")
    assert "server_name" not in browser.get("/hub/home").text
    responses = [browser.post("/hub/spawn/ada", {"_xsrf": browser.xsrf, "server_name": "two"}, status=400),
                 browser.get("/hub/spawn/ada/two", status=400)]
    assert [alert_of(response) for response in responses] == [["Named servers are not enabled."]] * 2


def test_a_named_server_can_be_deleted_when_it_is_stopped(hub, browser):
    start_named(browser, "project").follow()
    browser.post("/hub/stop/ada/project", {"_xsrf": browser.xsrf}, status=303)
    hub.tick()
    assert "Delete" in buttons_of(browser.get("/hub/home"))
    browser.post("/hub/delete/ada/project", {"_xsrf": browser.xsrf}, status=303)
    assert server_row(hub, "ada", "project") is None


@pytest.mark.parametrize("method, path", [
    ("GET", "/hub/spawn/ada"), ("GET", "/hub/spawn/ada/new"), ("GET", "/hub/spawn-pending/ada"),
    ("POST", "/hub/spawn/ada"), ("POST", "/hub/stop/ada"), ("POST", "/hub/delete/ada/x"), ("GET", "/hub/spawn/nobody")])
def test_a_student_gets_to_no_page_of_another(hub, method, path):
    browser = Browser(hub, "bob")
    form = {"_xsrf": browser.xsrf} if method == "POST" else None
    response = browser.request(path, method=method, POST=form, status=403)
    assert alert_of(response) == ["This page belongs to somebody else"]
    assert server_row(hub, "ada").status == "stopped" and server_row(hub, "ada", "new") is None


def test_the_address_of_a_stopped_server_offers_to_start_it(browser):
    response = browser.get("/user/ada/lab?x=1", status=302)
    assert response.location == "/hub/user/ada/lab?x=1"
    page = response.follow(status=503)
    assert (page.html.h1.text, buttons_of(page)) == ("Your server is not running", ["Start"])
    assert page.form.submit(status=303).follow(status=302).headers["Location"] == "/user/ada/lab?x=1"


def test_the_address_of_a_stopped_server_begins_a_session_for_its_form(make_hub):
    browser = Browser(make_hub(authenticator="remote-user"), REMOTE_USER="ada")
    page = browser.get("/hub/user/ada/lab", status=503)
    assert page.form.submit(status=303).headers["Location"] == "/hub/spawn-pending/ada?next=%2Fuser%2Fada%2Flab"


@pytest.mark.parametrize("base_url, mount", [("/", ""), ("/\u00fcben/", "/%C3%BCben")])
@pytest.mark.parametrize("path, sent, location", [
    ("/hub/user/ada/lab/a b", None, "/user/ada/lab/a%20b"), ("/hub/user/Ada", None, "/user/ada/"),
    ("/hub/user/ADA/lab/a/b", "/hub/user/ADA/lab/a%2Fb", "/user/ada/lab/a%2Fb"),
    ("/hub/user/\uff41da/lab/a/b", "/hub/user/%EF%BD%81da/lab/a%2Fb", "/user/ada/lab/a%2Fb"),
    ("/hub/user/aDa/lab/a/b", "/hub/user/a%44a/lab/a%2Fb", "/user/ada/lab/a%2Fb"),
    ("/hub/user/ada/lab", "/%68%75%62/%75ser/ada/lab", "/user/ada/lab"),
    ("/hub/user/ada/lab/a b", "/hub/user/ada/lab/%61%20b", "/user/ada/lab/a%20b"),
    ("/hub/user/ada/lab/a/b", "/hub%2Fuser/ada/lab/a%2fb", "/user/ada/lab/a%2fb"),
    ("/hub/user-redirect/lab/a/b", "/hub/user-redirect%2Flab/a%2Fb", "/user/ada/lab/a%2Fb"),
    ("/hub/user-redirect/lab/a b", "/hub/user-redirect/lab/a%20b", "/user/ada/lab/a%20b"),
    ("/user/bob/lab/a/b", "/user%2Fbob/lab/a%2Fb", "/hub/user/bob/lab/a%2Fb")])
def test_no_spelling_of_an_address_leads_astray(make_hub, base_url, mount, path, sent, location):
    browser = Browser(people(make_hub(base_url=base_url)))
    browser.sign_in("ada", url=f"{mount}/hub/login")
    browser.get(f"{mount}/hub/spawn/ada").form.submit(status=303).follow()
    environ = {"RAW_URI": mount.replace("%C3%BC", "%c3%bc") + sent} if sent else {}
    response = browser.get(f"{mount}{quote(path)}?x=1", extra_environ=environ, status=302)
    assert response.location == f"{mount}{location}?x=1"


@pytest.mark.parametrize("method, path, accept", [
    ("GET", "/user/ada/api/contents", "*/*"), ("POST", "/user/ada/lab", "text/html"),
    ("GET", "/user/ada/lab", "application/json"), ("GET", "/user/eve/api", "*/*")])
def test_programs_are_told_that_a_server_does_not_run(hub, method, path, accept):
    response = Browser(hub).request(path, method=method, headers={"Accept": accept}, status=503)
    spawn = f"/hub/spawn/{path.split('/')[2]}"
    assert response.json == error(503, f"JupyterHub server no longer running at {path}. Restart the server at {spawn}")


def test_the_token_page_makes_a_token_that_works_and_shows_it_once(hub, browser):
    form = browser.get("/hub/token").form
    form["note"] = "grading"
    response = form.submit(status=200)
    token = response.html.code.text
    assert Api(hub, token)("GET", "/user").json["name"] == "ada"
    page = browser.get("/hub/token")
    assert "grading" in page.text and token not in page.text


def test_the_token_page_revokes_a_token_and_nobody_elses(hub, browser, root):
    browser.post("/hub/token", {"_xsrf": browser.xsrf, "revoke": root("GET", "/user").json["token_id"]}, status=404)
    root("GET", "/user")
    token = token_for(hub, "ada")
    response = browser.get("/hub/token").forms[1].submit("revoke", status=303)
    assert response.headers["Location"] == "/hub/token"
    Api(hub, token)("GET", "/user", status=403)


def test_a_servers_own_token_is_not_on_the_page(browser):
    browser.get("/hub/spawn/ada").form.submit(status=303).follow()
    assert buttons_of(browser.get("/hub/token")) == ["Make a token"]


def test_health_is_an_empty_answer_and_the_logo_a_picture(hub):
    assert Browser(hub).get("/hub/health", status=200).text == ""
    assert Browser(hub).get("/hub/logo", status=200).content_type == "image/svg+xml"


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
    """Open a sign-in link and fill in its form."""
    page.goto(link)
    for name, value in {**fields, "password": PASSWORD, "again": PASSWORD}.items():
        page.fill(f"[name={name}]", value)
    page.click("text=Save and sign in")
    page.wait_for_url("**/hub/home")


def class_of(hub, chromium, *names):
    """Pages of the first admin, who comes by the link in the log, and of new students, who come by the admin's."""
    teacher = chromium()
    link = wait_for(lambda: re.search(r"http://\S+/hub/link/\S+", hub.log.read_text()), message="no link was logged")[0]
    choose_password(teacher, link, username="Teacher")
    teacher.goto(f"{hub.url}/hub/admin")
    teacher.fill("[name=names]", "\n".join(names))
    teacher.click("text=Add >> nth=-1")
    pages = [chromium() for _ in names]
    for page, link in zip(pages, teacher.locator("code").all_text_contents(), strict=True):
        choose_password(page, link)
    return teacher, *pages


def start_lab(page):
    """From home into JupyterLab."""
    page.click("button:has-text('Start') >> nth=0")
    page.wait_for_url("**/user/*/lab**")
    page.wait_for_selector(".jp-LauncherCard")


def run_cell(page, code):
    """The output of a new notebook's first cell."""
    page.click(".jp-LauncherCard[data-category=Notebook] >> nth=0")
    page.wait_for_selector("#jp-main-statusbar >> text=/Idle/")
    page.click(".jp-Notebook .cm-content")
    page.keyboard.type(code)
    page.keyboard.press("Shift+Enter")
    return page.wait_for_selector(".jp-OutputArea-output").inner_text().strip()


def run_last_cell(page, code, output):
    """Wait for the output of the last cell of a notebook that is open."""
    page.click(".jp-Notebook .cm-content >> nth=-1")
    page.keyboard.type(code)
    page.keyboard.press("Shift+Enter")
    page.wait_for_selector(f".jp-OutputArea-output:has-text('{output}')")


def sign_in_page(page, name):
    """Fill in the sign-in form."""
    page.fill("[name=username]", name)
    page.fill("[name=password]", PASSWORD)
    page.click("main button")


@needs_singleuser
def test_a_class_works_in_jupyterlab_behind_one_sync_worker(live, chromium):
    hub = live()
    teacher, ada, bob = class_of(hub, chromium, "ada", "bob")
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
def test_jupyterlab_notices_no_restart_and_finds_its_kernel_again_when_the_carrier_is_killed(live, chromium):
    hub = live(authenticator="dummy", password=PASSWORD)
    ada, lost = chromium(), []
    ada.goto(f"{hub.url}/hub/login")
    sign_in_page(ada, "ada")
    ada.on("websocket", lambda opened: opened.on("close", lambda closed: lost.append(closed)))
    start_lab(ada)
    assert run_cell(ada, "x = 42; print(x)") == "42"
    lost.clear()  # JupyterLab has closed some itself
    kill_everything(hub)
    run_last_cell(ada, "print(x + 1)", "43")
    assert lost == []
    carrier = carrier_of(hub)
    kill(carrier)
    run_last_cell(ada, "print(x + 2)", "44")
    assert lost and carrier_of(hub) != carrier


@needs_singleuser
def test_a_class_works_in_jupyterlab_on_host_names_of_its_own(live, chromium):
    """The students' servers have other origins than the hub; browsers find every `.localhost` on this machine."""
    port = minihub.free_port()
    urls = {"public_url": f"http://localhost:{port}", "user_url": f"http://{{username}}.localhost:{port}"}
    hub = live("--bind", f"127.0.0.1:{port}", **urls)
    hub.url = urls["public_url"]
    teacher, ada = class_of(hub, chromium, "ada")
    server = f"http://ada.localhost:{port}/user/ada/lab"
    start_lab(ada)
    assert ada.url == server
    assert run_cell(ada, "print(6*7)") == "42"
    cookies = {cookie["name"]: cookie["domain"] for cookie in ada.context.cookies()}
    assert cookies["jupyterhub-hub-login"] == "localhost"
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
    for path in ("/lab/hub/logout", "/lab/user/ada/lab"):
        ada.goto(f"{site.url}{path}")
        assert urlsplit(ada.url).path == "/login"


def test_no_secret_reaches_a_server_in_the_readmes_django_site(live_site, tmp_path):
    pytest.importorskip("django", reason="pip install '.[test]'")
    for words in ("django startproject school .", "manage migrate",
                  "manage createsuperuser --noinput --username ada --email ada@school.example"):
        subprocess.run([sys.executable, "-m", *words.split()], cwd=tmp_path, check=True, capture_output=True,
                       env={**os.environ, "DJANGO_SUPERUSER_PASSWORD": PASSWORD})
    (tmp_path / "echo.py").write_text(ECHO_SERVER)
    hub = f"Hub(isolation='none', cmd='{sys.executable} {tmp_path}/echo.py', "
    (tmp_path / "school" / "wsgi.py").write_text(readme_text("django").replace("Hub(", hub))
    django_site = live_site("school.wsgi:application")
    with requests.Session() as browser:
        made_up = {"Cookie": "sessionid=made-up", "Referer": f"{django_site.url}/lab/hub/home"}
        assert django_site.request("GET", "/lab/hub/api/user", headers=made_up).status == 403
        page = browser.get(f"{django_site.url}/lab/hub/home")
        assert urlsplit(page.url)._replace(scheme="", netloc="").geturl() == "/admin/login/?next=%2Flab%2Fhub%2Fhome"
        page = browser.post(page.url, {"username": "ada", "password": PASSWORD, "next": "/lab/hub/home",
                                       "csrfmiddlewaretoken": browser.cookies["csrftoken"]})
        assert "Hello, ada" in page.text and "People" in page.text
        xsrf = re.search(r'name=_xsrf value="(\w+)"', page.text)[1]
        tokens = f"{django_site.url}/lab/hub/api/users/ada/tokens"
        token = browser.post(tokens, headers={"X-XSRFToken": xsrf}).json()["token"]
        django_site.start_server("ada", token)
        got = browser.get(f"{django_site.url}/lab/user/ada/echo", headers={"Authorization": f"token {token}"}).json()
        headers = dict(got["headers"])
        exchanged = headers["Authorization"].split()[1]
        secrets = [token, browser.cookies["sessionid"], browser.cookies["csrftoken"]]
        assert not [secret for secret in secrets if secret in json.dumps(got)]
        assert headers["Cookie"] == f"jupyterhub-session-id={browser.cookies['jupyterhub-session-id']}"
        assert [django_site.api("GET", path, exchanged)[0] for path in ("/user", "/users")] == [200, 403]
        assert urlsplit(browser.get(f"{django_site.url}/lab/hub/logout").url).path == "/admin/"
        browser.post(f"{django_site.url}/admin/logout/", {"csrfmiddlewaretoken": browser.cookies["csrftoken"]})
        assert urlsplit(browser.get(f"{django_site.url}/lab/hub/home").url).path == "/admin/login/"


@pytest.mark.parametrize("scripts", [True, False])
def test_the_place_in_line_moves_on_the_waiting_page_with_and_without_javascript(live, tmp_path, chromium, scripts):
    hub = start_half_mute(live, tmp_path, concurrent_spawn_limit=1, authenticator="dummy", password=PASSWORD)
    hub.api("POST", "/users/bob/server", hub.token)
    page = chromium(java_script_enabled=scripts)
    page.goto(f"{hub.url}/hub/spawn")
    sign_in_page(page, "ada")
    page.click("main button")
    assert page.inner_text("output") == "2nd in line"
    assert hub.api("DELETE", "/users/bob/server", hub.token)[0] == 204
    page.wait_for_selector("output:text-is('1st in line')")
    os.killpg(*groups_in(tmp_path), signal.SIGKILL)
    page.wait_for_url("**/user/ada/")
    assert page.inner_text("body") == "mock"


@pytest.mark.parametrize("scripts", [True, False])
def test_pages_work_with_and_without_javascript_and_show_why_a_start_has_failed(live, tmp_path, chromium, scripts):
    pytest.importorskip("tornado", reason="pip install '.[classroom]'")
    (tmp_path / "echo.py").write_text(ECHO_SERVER)
    command = (f"sleep 1; [ -e {tmp_path}/tried ] && exec {sys.executable} {tmp_path}/echo.py;"
               f" touch {tmp_path}/tried; echo No module named antigravity; exit 3")
    hub = live(authenticator="dummy", password=PASSWORD, cmd=f"sh -c '{command}'")
    page = chromium(java_script_enabled=scripts)
    page.goto(f"{hub.url}/user/ada/echo")
    sign_in_page(page, "ada")
    assert page.inner_text("h1") == "Your server is not running"
    assert page.eval_on_selector("button", "element => getComputedStyle(element).borderRadius") == "8px"
    page.click("main button")
    assert page.inner_text("h1") == "Your server is starting"
    assert page.wait_for_selector("pre").inner_text() == "No module named antigravity"
    assert page.inner_text("h1") == "Your server has failed"
    page.goto(f"{hub.url}/user/ada/echo")
    page.click("main button")
    page.wait_for_url("**/user/ada/echo")
    assert json.loads(page.inner_text("body"))["uri"] == "/user/ada/echo"
    page.goto(f"{hub.url}/hub/home")
    assert page.get_attribute("text=Open", "href") == "/user/ada/"
    page.click("text=Stop")
    page.wait_for_selector("text=not running")


@needs_singleuser
@pytest.mark.parametrize("way", ["root", "sandbox"])
def test_a_runaway_cell_is_an_error_in_its_own_notebook_and_a_neighbour_works_on(way, chromium):
    with starting_apart(way) as apart:
        hub = apart(cmd=SINGLEUSER, cmd_has_sign_in="no", mem_limit="2G", process_limit="250", open_file_limit="4096")
        _, ada, bob = class_of(hub, chromium, "ada", "bob")
        for page in (ada, bob):
            start_lab(page)
        assert "MemoryError" in run_cell(ada, "len(bytearray(10**10))")
        listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        accounts = STUDENT_ACCOUNTS if hub.kind == "uid" else [HUB_ACCOUNT]
        ports = {line[1] for line in listening if line[3] == "0A" and int(line[7]) in accounts}
        others = [port for port in ports if int(port.partition(":")[2], 16) != hub.port]
        assert len(others) == 2  # the servers', which ask who comes, and none of a kernel's
        ada.goto(ada.url.partition("/lab/")[0] + "?reset")
        ada.wait_for_selector(".jp-LauncherCard")
        assert "BlockingIOError" in run_cell(
            ada, "import os, signal; [os.fork() or signal.pause() for _ in range(9999)]")
        assert run_cell(bob, "print(6*7)") == "42"


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
    run_last_cell(ada, "print(x + 1)", "43")


########################################################################################################
# 19. Pages of teachers
########################################################################################################


@pytest.fixture
def teacher(hub):
    """A browser in which the admin root has signed in."""
    return Browser(hub, "root")


def test_an_admin_starts_and_stops_a_students_server(hub, teacher):
    response = teacher.get("/hub/spawn/ada", status=200)
    assert response.html.h1.text == "ada's server is not running"
    assert response.form.submit(status=303).follow(status=302).headers["Location"] == "/user/ada/"
    stopped = teacher.post("/hub/stop/ada", {"_xsrf": teacher.xsrf}, status=303)
    assert stopped.headers["Location"] == "/hub/admin"
    hub.tick()
    assert "/hub/stop/ada" not in stopped.follow(status=200).text
    assert server_row(hub, "ada").status == "stopped"


def test_the_address_of_a_stopped_server_lets_an_admin_start_it(teacher):
    response = teacher.get("/hub/user/ada/lab", status=503)
    assert response.html.h1.text == "ada's server is not running"
    assert response.form.action == "/hub/spawn/ada?next=%2Fuser%2Fada%2Flab"
    assert alert_of(teacher.get("/hub/user/eve/lab", status=404)) == ["No such user: eve"]


def add_people(browser, names, status=200):
    """The response to the form of the People page."""
    form = form_to(browser.get("/hub/admin"), "/hub/admin")
    form["names"] = names
    return form.submit(status=status)


def test_people_are_added_and_each_gets_a_link(hub, teacher):
    response = add_people(teacher, "Carla\n\n  Dan \nADA\n")
    rows = response.html.select("[role=status] .row")
    assert "Here already: ada" in response.html.select_one("[role=status]").text
    assert [row.b.text for row in rows] == ["carla", "dan"]
    submit_password(Browser(hub), urlsplit(rows[0].code.text).path)
    assert Browser(hub).sign_in("carla", "a new password").headers["Location"] == "/hub/home"


@pytest.mark.parametrize("settings, site", [({}, "http://class.example:8080"),
                                            ({"public_url": "https://hub.example"}, "https://hub.example")])
def test_links_on_the_people_page_lead_to_where_the_teachers_browser_is(make_hub, settings, site):
    browser = Browser(people(make_hub(**settings)), "root", HTTP_HOST="class.example:8080")
    assert add_people(browser, "carla").html.code.text.startswith(f"{site}/hub/link/")


@pytest.mark.parametrize("names, status, message", [
    ("carla\na/b\n..\n", 400, "Invalid usernames: a/b, .."), ("ada\nBOB", 409, "All 2 users already exist"),
    (" \n", 400, "Write at least one name")])
def test_people_who_cannot_be_added_stay_in_the_form(hub, teacher, names, status, message):
    response = add_people(teacher, names, status)
    assert alert_of(response) == [message]
    assert form_to(response, "/hub/admin")["names"].value.split() == names.split()
    with hub.store.connected():
        assert [user.name for user in hub.people.list()[0]] == ["root", "ada", "bob"]


def test_names_cannot_be_html(teacher):
    add_people(teacher, '<img src=x>"\'&')
    page = teacher.get("/hub/admin")
    assert [b.text for b in page.html.select(".card .row b")][-1] == '<img src=x>"\'&'
    assert page.html.img is None
    assert teacher.get(f"/hub/spawn/{quote('<img src=x>')}%22'&", status=200).html.img is None


def test_a_lost_password_is_replaced_through_a_new_link(hub, teacher):
    browser, response = Browser(hub), form_to(teacher.get("/hub/admin"), "/hub/admin/link/ada").submit(status=200)
    submit_password(browser, urlsplit(response.html.code.text).path)
    assert browser.is_signed_in()
    assert Browser(hub).sign_in("ada", "a new password").headers["Location"] == "/hub/home"


def test_the_people_page_shows_the_servers_that_run(teacher, browser):
    browser.get("/hub/spawn/ada").form.submit(status=303).follow()
    assert [form.action for form in teacher.get("/hub/admin").forms.values()] == [
        "/hub/admin", "/hub/admin/link/root", "/hub/admin/link/ada", "/hub/stop/ada", "/hub/admin/link/bob"]


@pytest.mark.parametrize("path, name", [("/hub/admin", "root"), ("/hub/home", "ada")])
def test_lists_of_servers_show_what_the_ticker_has_seen_and_ask_no_server(hub, spawner, path, name):
    browser = Browser(hub, name)
    with hub.store.connected():
        running(hub, "ada")
    spawner.end_all()
    assert browser.get(path).html.select_one(".state.ready").text == "running"
    hub.tick()
    assert browser.get(path).html.select_one(".state.ready") is None


@pytest.mark.parametrize("method, path", [
    ("GET", "/hub/admin"), ("POST", "/hub/admin"), ("POST", "/hub/admin/link/ada")])
def test_the_people_page_is_for_admins(hub, browser, method, path):
    form = {"_xsrf": browser.xsrf, "names": "eve"} if method == "POST" else None
    assert alert_of(browser.request(path, method=method, POST=form, status=403)) == ["This page is for admins"]
    assert "/hub/admin" not in browser.get("/hub/home").text
    with hub.store.connected():
        assert hub.people.get("eve") is None


########################################################################################################
# 20. The WSGI application
########################################################################################################


def names_read(table):
    """The names that code reads and has not bound itself, of its symbol table; annotations are left out."""
    names = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global() and symbol.is_referenced()}
    return names.union(*map(names_read, table.get_children()))


def symbols_of(statement):
    """The symbol table of a statement of the module."""
    return symtable.symtable(f"from __future__ import annotations\n{ast.unparse(statement)}", "minihub.py", "exec")


TREE = ast.parse(SOURCE)
SECTIONS = [section for _, section in banners_of(SOURCE)]
TABLES = [(symbols_of(node), section_of(node.lineno, SOURCE)) for node in TREE.body[1:]]
USES = [(name, section) for table, section in TABLES for name in names_read(table)]
BOUND = {symbol.get_name(): section for table, section in TABLES for symbol in table.get_symbols()
         if symbol.is_assigned()}


def test_a_section_uses_only_sections_above_it():
    below = [(name, section) for name, section in USES if BOUND.get(name, 0) > section]
    assert BOUND["Hub"] == 20 and below == []


def test_a_name_with_an_underscore_is_used_in_its_own_section_only():
    private = {name: section for name, section in BOUND.items() if re.match("_[a-zA-Z]", name)}
    elsewhere = [(name, section) for name, section in USES if private.get(name) not in (None, section)]
    assert private and elsewhere == []


def sections_using(*modules):
    """The sections that use something of a module, whatever it is imported as."""
    names = set()
    for node in ast.walk(TREE):
        for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
            if (getattr(node, "module", None) or alias.name).partition(".")[0] in modules:
                names.add(alias.asname or alias.name.partition(".")[0])
    return {section for name, section in USES if name in names}


@pytest.mark.parametrize(("modules", "sections"), [
    (["peewee", "playhouse"], range(4, 14)), (["falcon"], range(14, 21)), (["subprocess"], (5, 6, 13))])
def test_a_module_is_used_in_its_own_sections_only(modules, sections):
    used = sections_using(*modules)
    assert used and used <= set(sections)


def test_rows_are_read_and_written_by_collaborators_only():
    queries = {"select", "insert", "where", "execute", "save", "delete_instance", "get_or_none", "execute_sql"}
    models = {model.__name__ for model in minihub.MODELS}
    lines = [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.Attribute) and node.attr in queries]
    sections = {section for name, section in USES if name in models}
    assert lines and sections and {*sections, *(section_of(line, SOURCE) for line in lines)} <= set(range(4, 14))


def test_the_environment_is_read_in_the_settings_only():
    readers = ("os.environ", "os.environb", "os.getenv", "os.putenv")
    lines = [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.Attribute) and ast.unparse(node) in readers]
    assert {section_of(line, SOURCE) for line in lines} == {2}


def test_a_hub_has_no_other_public_names_than_the_documented_ones():
    assert {name for name in vars(Hub) if not name.startswith("_")} == {
        "create_users", "start_server", "stop_server", "delete_user", "tick", "close", "wrap"}
    assert Hub.__mro__ == (Hub, object)


def test_no_class_and_no_section_is_too_long():
    methods = {node.name: sum(isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) for child in node.body)
               for node in ast.walk(TREE) if isinstance(node, ast.ClassDef)}
    lines = [line for line, _ in banners_of(SOURCE)] + [len(SOURCE.splitlines())]
    sections = {number: end - begin for number, begin, end in zip(SECTIONS, lines, lines[1:])}
    assert {name: count for name, count in methods.items() if count > 25} == {}
    assert {number: length for number, length in sections.items() if length > 650} == {}


@pytest.mark.parametrize("path", [minihub.__file__, __file__], ids=["minihub.py", "test_minihub.py"])
def test_no_line_is_longer_than_120_characters(path):
    assert [number for number, line in enumerate(Path(path).read_text().splitlines(), 1) if len(line) > 120] == []


def test_every_responder_says_who_may_ask():
    responders = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef) and node.name.startswith("on_")]
    unguarded = [node for node in responders if "needs_" not in "".join(map(ast.unparse, node.decorator_list))]
    silent = [f"{node.name} in line {node.lineno}" for node in unguarded if "Open" not in ast.get_docstring(node)]
    assert responders and silent == []


def test_the_table_of_contents_and_the_tests_have_the_files_sections():
    contents = re.findall(r"(?<!\S)(\d+) (\S+(?: \S+)*)", minihub.__doc__.partition("Contents:")[2].lower())
    banners = re.findall(r"^# (\d+)\. (.+)$", SOURCE, re.MULTILINE)
    mine = re.findall(r"^# (\d+)\. (.+)$", Path(__file__).read_text(), re.MULTILINE)
    assert contents == [(number, title.lower()) for number, title in banners]
    assert mine[1:] == banners[1:]


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


#: A Python on another system, as far as minihub can see, and a hub in it: it answers with a spawner of one's own.
ELSEWHERE = """
import builtins, os, signal, socket, sys, wsgiref.util
import asyncio, falcon, itsdangerous, peewee, playhouse.db_url
import_module = builtins.__import__

def import_elsewhere(name, globals=None, *rest):
    if globals and globals.get("__name__") == "minihub" and name in ("resource", "fcntl", "pwd", "grp", "termios"):
        raise ModuleNotFoundError(name)
    return import_module(name, globals, *rest)

builtins.__import__ = import_elsewhere
for module, names in ((os, "fork register_at_fork geteuid getuid killpg getpgid setsid"), (signal, "SIGKILL SIGHUP"),
                      (socket, "AF_UNIX SO_REUSEPORT")):
    for name in names.split():
        delattr(module, name)
sys.platform = "win32"
import minihub

environ, statuses = {"PATH_INFO": "/hub/login", "REMOTE_ADDR": "127.0.0.1"}, []
wsgiref.util.setup_testing_defaults(environ)
hub = minihub.Hub(database="sqlite:///hub.sqlite", spawner=minihub.Spawner, tick_interval=0)
page = b"".join(hub(environ, lambda status, headers: statuses.append(status)))
print(statuses, b"Sign in" in page, hub.tick())
try:
    minihub.Hub(database="sqlite:///hub.sqlite")
except minihub.SettingError as error:
    print(error)
"""


def test_on_other_systems_the_pages_work_and_the_subprocess_spawner_is_refused(tmp_path):
    answer, refusal = run_python(ELSEWHERE, tmp_path).splitlines()
    assert answer == "['200 OK'] True True"
    assert refusal.startswith("spawner: must be ") and "Linux" in refusal


APP = """
import minihub
assert minihub.app is minihub.app and isinstance(minihub.app, minihub.Hub)
print(minihub.app.settings.database, minihub.app.settings.admins, hasattr(minihub, "nonsense"))
"""


def test_the_app_is_made_of_variables_when_it_is_asked_for(tmp_path):
    printed = run_python(APP, tmp_path, MINIHUB_DATABASE="sqlite:///my.sqlite", MINIHUB_ADMINS="root")
    assert printed == "sqlite:///my.sqlite ('root',) False"
    assert (tmp_path / "my.sqlite").exists()


def test_gunicorns_log_tells_who_started_and_stopped_what_and_how_to_become_the_admin(live, tmp_path):
    hub = start_mocked(live, tmp_path, "-w", "2")
    link = f"{hub.url}/hub/link/"
    wait_for(lambda: hub.log.read_text().count(link) == 1)
    hub.stop()
    hub.start()
    wait_for(lambda: hub.log.read_text().count(link) == 2)
    assert "in the log" in hub.request("GET", "/hub/login").body.decode()
    hub.start_server("root", hub.token)
    hub.api("DELETE", "/users/root/server", hub.token)
    wait_for(lambda: status_of(hub, "root") == "stopped")
    states = [f"server root: {state}" for state in ("starting", "ready at", "stopping", "stopped")]
    wait_for(lambda: [hub.log.read_text().count(f"[INFO] {state}") for state in states] == [1, 1, 1, 1])


def mounted(hub, prefix):
    """The hub below a path of another site, as any WSGI dispatcher does it."""
    def site(environ, start_response):
        assert environ["PATH_INFO"].startswith(prefix)
        return hub({**environ, "SCRIPT_NAME": prefix, "PATH_INFO": environ["PATH_INFO"][len(prefix):]}, start_response)

    return site


TWO_HOSTS = {"public_url": "https://hub.example", "user_url": "https://{username}.nb.example"}


@pytest.fixture
def on_two_hosts(make_hub):
    """A hub whose servers have host names of their own; `.at(host, name)` is a browser that asks for that host."""
    hub = people(make_hub(**TWO_HOSTS))
    hub.at = lambda host, name=None: Browser(hub, name, **{"HTTP_HOST": host, "wsgi.url_scheme": "https"})
    return hub


@pytest.mark.parametrize(("host", "path", "location"), [
    ("hub.example", "/user/ada/lab?a=b%2F", "https://ada.nb.example/user/ada/lab?a=b%2F"),
    ("127.0.0.1:8000", "/user/ada/", "https://ada.nb.example/user/ada/"),
    ("bob.nb.example", "/user/ada/", "https://ada.nb.example/user/ada/"),
    ("nb.example", "/user/Ada/", f"https://{minihub.host_label('Ada')}.nb.example/user/Ada/"),
    ("hub.example", "/user/a.b/", f"https://{minihub.host_label('a.b')}.nb.example/user/a.b/"),
    *[(host, path, f"https://hub.example{path}") for host, path in (
        ("ada.nb.example", "/hub/login"), ("ada.nb.example", "/hub/api/user"), ("ada.nb.example", "/user/"),
        ("ada.nb.example", "/services/x/"), ("ADA.nb.example:443", "/"))],
    *[(host, path, None) for host, path in (("ada.nb.example", "/user/ada"), ("hub.example", "/hub/login"),
                                            ("127.0.0.1:8000", "/hub/api/"), ("nb.example", "/hub/login"))]])
def test_where_servers_have_a_host_each_page_has_its_own(on_two_hosts, host, path, location):
    answer = on_two_hosts.at(host).get(path, status="*")
    assert (answer.location if (answer.location or "").startswith("https:") else None) == location
    assert location is None or answer.status_int == 302


class OnlyPlainNames(minihub.DummyAuthenticator):
    """Keeps capitals, and takes no name that its directory could not hold."""

    def normalize(self, name):
        if not name.isascii():
            raise minihub.BadRequest(f"No name: {name}")
        return name


def test_a_host_is_for_names_as_routes_spell_them_whatever_the_authenticator_says(make_hub, spawner):
    hub = make_hub(**TWO_HOSTS, authenticator=OnlyPlainNames(), password=PASSWORD)
    hub.create_users(["Ada"])
    address = hub.start_server("Ada")
    browser = Browser(hub, HTTP_HOST="hub.example")
    assert urlsplit(address).netloc == f"{minihub.host_label('Ada')}.nb.example"
    assert browser.get("/user/Ada/", status=302).location == address
    assert browser.get("/user/%C3%A9/", status=302).location.endswith(".nb.example/user/%C3%A9/")


def test_a_name_in_capitals_leads_to_the_host_of_its_server(on_two_hosts):
    ada, location = on_two_hosts.at("hub.example", "ada"), "https://hub.example/user/ADA/lab?a=b"
    on_two_hosts.start_server("ada")
    for _ in range(4):
        host, path = re.fullmatch("https://([^/]+)(.*)", location).groups()
        location = urljoin(location, ada.get(path, headers={"Host": host}, status=302).location)
    assert location == "https://ada.nb.example/user/ada/lab?a=b"


@pytest.mark.parametrize(("host", "right", "path", "method", "headers"), [
    ("ada.nb.example", "hub.example", "/hub/login", "POST", {}),
    ("hub.example", "ada.nb.example", "/user/ada/api/contents", "DELETE", {}),
    ("hub.example", "ada.nb.example", "/user/ada/socket", "GET", {"Upgrade": "websocket", "Connection": "Upgrade"})])
def test_a_request_that_cannot_be_redirected_is_refused(on_two_hosts, host, right, path, method, headers):
    answer = on_two_hosts.at(host).request(path, method=method, headers={"Host": host, **headers}, status=421)
    assert f"This is to be found at https://{right}{path} only" in answer.text


def test_a_server_with_a_host_of_its_own_is_told_so(make_hub, spawner):
    hub = people(make_hub(**TWO_HOSTS, base_url="/lab/"))
    assert hub.start_server("ada", "gpu") == "https://ada.nb.example/lab/user/ada/gpu/"
    variables = {
        "HOST": "https://hub.example", "OAUTH_CALLBACK_URL": "https://ada.nb.example/lab/user/ada/gpu/oauth_callback",
        "PUBLIC_URL": "https://ada.nb.example/lab/user/ada/gpu/", "PUBLIC_HUB_URL": "https://hub.example/lab/hub/",
        "SERVICE_PREFIX": "/lab/user/ada/gpu/"}
    assert {name: spawner.launches[0].variables[f"JUPYTERHUB_{name}"] for name in variables} == variables


def test_pages_and_the_api_lead_to_the_servers_host(on_two_hosts):
    address, ada = "https://ada.nb.example/user/ada/", on_two_hosts.at("hub.example", "ada")
    api = Api(on_two_hosts, token_for(on_two_hosts, "ada"))
    api("POST", "/users/ada/server", status=201)
    model = api("GET", "/users/ada").json
    assert (model["server"], model["servers"][""]["url"]) == (address, address)
    assert f'"url": "{address}"' in api("GET", "/users/ada/server/progress").text
    assert ada.get("/hub/home").html.find("a", string="Open")["href"] == address
    locations = {"spawn/ada": "", "spawn/ada?next=/user/ada/tree": "tree", "spawn/ada?next=/user/bob/tree": "",
                 "user-redirect/tree?a=b": "tree?a=b", "user/ada/tree?a=b": "tree?a=b", "user/bob/tree": "tree"}
    assert {path: ada.get(f"/hub/{path}", status=302).location.removeprefix(address) for path in locations} == locations


def test_programs_learn_that_a_server_with_a_host_of_its_own_does_not_run(on_two_hosts):
    answer = on_two_hosts.at("ada.nb.example").get("/user/ada/api/status", status=503)
    assert answer.json["message"].endswith("Restart the server at https://hub.example/hub/spawn/ada")


def test_on_the_servers_host_there_is_nothing_of_the_site_around_the_hub(make_hub):
    site = webtest.TestApp(make_hub(**TWO_HOSTS, base_url="/lab/").wrap(a_page))
    assert site.get("/grades", headers={"Host": "hub.example"}).text == "the site at /grades"
    assert site.get("/grades", headers={"Host": "ada.nb.example"}, status=302).location == "https://hub.example/grades"


@pytest.fixture(params=["mounted:/lab", "base_url:/a/b", "mounted:/\u00fcben/p 2", "base_url:/\u00fcben/p 2"])
def below(request, make_hub):
    """A hub below a path, a browser at the site that it is in, and the path as browsers write it."""
    way, _, path = request.param.partition(":")
    hub = people(make_hub(base_url=f"{path}/" if way == "base_url" else "/"))
    return hub, Browser(mounted(hub, path.encode().decode("latin-1")) if way == "mounted" else hub), quote(path)


def test_a_hub_below_a_path_stays_there(below, spawner):
    hub, site, path = below
    headers = {"Authorization": f"token {token_for(hub, 'ada')}"}
    site.post(f"{path}/hub/api/users/ada/server", headers=headers, status=201)
    model = site.get(f"{path}/hub/api/users/ada", headers=headers, status=200).json
    progress = f"{path}/hub/api/users/ada/server/progress"
    assert (model["server"], model["servers"][""]["url"], model["servers"][""]["progress_url"]) == (
        f"{path}/user/ada/", f"{path}/user/ada/", progress)
    variables = {"BASE_URL": f"{path}/", "API_URL": f"http://127.0.0.1:80{path}/hub/api",
                 "SERVICE_PREFIX": f"{path}/user/ada/", "OAUTH_CALLBACK_URL": f"{path}/user/ada/oauth_callback"}
    assert {name: spawner.launches[0].variables[f"JUPYTERHUB_{name}"] for name in variables} == variables
    with hub.store.connected():
        assert list(hub.routes.proxy.get_all_routes()) == [f"{path}/user/ada/"]


def test_a_hub_below_a_path_sends_browsers_there(below):
    hub, site, path = below
    response = site.get(f"{path}/hub/home", status=302)
    assert response.location == f"{path}/hub/login?{urlencode({'next': f'{path}/hub/home'})}"
    response = site.sign_in("ada", url=response.location)
    assert response.location == f"{path}/hub/home"
    assert re.findall(r"Path=[^;]+", response.headers["Set-Cookie"]) == [f"Path={path}/hub/"]
    assert site.get(f"{path}/hub/home", status=200).text.count(f'action="{path}/hub/') > 0


def test_a_browser_gets_into_a_server_of_a_hub_below_a_path(below, spawner):
    hub, site, path = below
    site.sign_in("ada", url=f"{path}/hub/login")
    hub.start_server("ada")
    variables = spawner.launches[0].variables
    query = urlencode({"client_id": variables["JUPYTERHUB_CLIENT_ID"], "response_type": "code",
                       "redirect_uri": variables["JUPYTERHUB_OAUTH_CALLBACK_URL"]})
    callback = site.get(f"{path}/hub/api/oauth2/authorize?{query}", status=302).location
    assert callback.partition("?")[0] == f"{path}/user/ada/oauth_callback" and "code=" in callback


@pytest.mark.parametrize("more", ["", "/", "?next=/x", "/?a=b"])
def test_the_prefix_alone_leads_to_the_hub(below, more):
    hub, site, path = below
    assert site.get(path + more, status=302).location == f"{path}/hub/{more.removeprefix('/')}"


@pytest.mark.parametrize("script", ["", "/school"])
@pytest.mark.parametrize("path", ["/", "/user/ada/x%20y?z", "/hub/health", "/labs/hub/health", "/x/lab/hub/health"])
def test_a_request_outside_of_base_url_is_led_inside_and_does_not_move_the_hub(make_hub, script, path):
    hub = make_hub(base_url="/lab/")
    assert Browser(hub, SCRIPT_NAME=script).get(f"{script}{path}", status=302).location == f"{script}/lab/hub{path}"
    with hub.store.connected():
        assert hub.site.mount.base == "/lab/"


def test_a_form_outside_of_base_url_is_not_found(make_hub):
    browser = Browser(make_hub(base_url="/lab/"))
    assert browser.post("/hub/api/users/ada", status=404).json == error(404, "The hub is below /lab/")
    assert browser.post("/grades", status=404).html.main.a["href"] == "/lab/hub/home"


def test_a_mount_point_is_not_taken_for_a_base_url_that_is_spelled_alike(make_hub):
    site = Browser(mounted(make_hub(base_url="/lab/"), "/lab"))
    assert site.get("/lab/lab/hub/login", status=200).html.h1.text == "Sign in"
    assert site.get("/lab/hub/login", status=302).location == "/lab/lab/hub/hub/login"


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
    ("/\u00fcben/a/", "/hub/login"), *[("/", path) for path in ("/", "/hubs", "/a/hub/login", "/users/", "//hub")],
    *[("/lab/", path) for path in ("/", "/labs", "/hub/login", "/lab/hubs", "/x/lab/hub/login")]])
def test_a_hub_in_front_of_a_site_leaves_it_all_others(make_hub, base_url, path):
    assert webtest.TestApp(make_hub(base_url=base_url).wrap(a_page)).get(path, status=200).text == f"the site at {path}"


def test_a_hub_in_front_of_a_site_may_be_below_a_mount_point_itself(make_hub):
    site = Browser(make_hub(base_url="/lab/").wrap(a_page), SCRIPT_NAME="/school")
    location = site.get("/school/lab/hub/home", status=302).location
    assert location == f"/school/lab/hub/login?{urlencode({'next': '/school/lab/hub/home'})}"
    assert [site.get(path, status=302).location for path in ("/school/lab", "/school/lab/")] == ["/school/lab/hub/"] * 2
    assert site.get("/school/labs", status=200).text == "the site at /school/labs"


def test_two_hubs_in_one_site_share_nothing(make_hub):
    one, other = people(make_hub(base_url="/one/")), people(make_hub(base_url="/other/"))
    site = Browser(one.wrap(other.wrap(a_page)))
    site.sign_in("ada", url="/one/hub/login")
    assert (site.is_signed_in("/one/hub/home"), site.is_signed_in("/other/hub/home")) == (True, False)
    token = {"Authorization": f"token {token_for(one, 'ada')}"}
    site.post("/one/hub/api/users/ada/server", headers=token, status=201)
    site.get("/other/hub/api/user", headers=token, status=403)
    other.create_users(["eve"])
    with one.store.connected(), other.store.connected():
        assert (other.routes.proxy.get_all_routes(), other.servers.running()) == ({}, [])
        assert other.people.get("eve") and other.store.secret != one.store.secret
    with one.store.connected():
        assert one.people.get("eve") is None


def test_routes_of_an_embedded_proxy_are_ignored_when_there_is_another(make_hub, tmp_path):
    database = f"sqlite:///{tmp_path}/hub.sqlite"
    with (before := people(make_hub(database=database))).store.connected():
        running(before)
    response = Browser(make_hub(database=database, proxy="chp")).get("/user/ada/lab", status=302)
    assert response.location == "/hub/user/ada/lab"


def test_the_hub_is_in_one_place_by_whatever_address_its_machine_is_reached(hub, monkeypatch):
    arrived = []
    monkeypatch.setattr(hub.site, "arrive", arrived.append)
    app = webtest.TestApp(hub, extra_environ={"SERVER_NAME": "0.0.0.0", "SERVER_PORT": "8000"})
    with socket.create_server(("0.0.0.0", 0)) as listener:
        for address in ("127.0.0.1", "127.0.0.2"):
            with socket.create_connection((address, listener.getsockname()[1])), listener.accept()[0] as connection:
                app.get("/hub/health", extra_environ={"gunicorn.socket": connection})
    assert arrived == [minihub.Mount("/", "http://127.0.0.1:8000")] * 2


def test_where_the_hub_is_mounted_is_not_a_clients_to_choose(live):
    hub = live()
    before = hub.facts("mount")
    answer = hub.request("GET", "/evil/hub/api/user", headers={"SCRIPT_NAME": "/evil"})
    assert (answer.status, json.loads(answer.body)["message"]) == (
        400, "The header SCRIPT_NAME is not believed. Set MINIHUB_BASE_URL for a hub below a path")
    assert hub.facts("mount") == before == {"base": "/", "address": hub.url}


def test_a_servers_way_to_the_hub_is_not_a_clients_to_choose(ada, spawner):
    ada("POST", "/users/ada/server", status=201, headers={"Host": "evil.example", "X-Forwarded-Host": "evil.example"})
    assert spawner.launches[0].variables["JUPYTERHUB_API_URL"] == "http://127.0.0.1:80/hub/api"


@pytest.mark.parametrize("path", ["/nothing", "/hub/nothing", "/hub/users/", "/%FF", "/hub//login"])
def test_people_get_a_page_when_there_is_nothing(hub, path):
    response = webtest.TestApp(hub).get(path, status=404)
    assert (response.content_type, response.headers["X-JupyterHub-Version"]) == ("text/html", "1.5.1")
    assert "Nothing here" in response.text


def test_a_request_that_is_overtaken_by_another_says_so(hub, root, monkeypatch):
    def create_too_late(*values, **columns):
        minihub.Membership.create(user=0, group=0)  # whose parents another request has deleted

    monkeypatch.setattr(hub.tokens, "create", create_too_late)
    response = root("POST", "/users/ada/tokens", {}, status=409)
    assert response.json == error(409, "Somebody else has changed this in the same moment. Look at it again")


@pytest.mark.parametrize(("path", "kind", "text"), [
    ("/hub/api/user", "application/json", json.dumps(error(503, minihub.NO_DATABASE))),
    ("/hub/home", "text/html", minihub.NO_DATABASE.partition("'")[2])])
def test_without_its_database_the_hub_says_so(hub, monkeypatch, path, kind, text):
    def gone(self):
        raise minihub.pw.OperationalError("could not connect: password=secret")

    monkeypatch.setattr(minihub.Store, "database", property(gone))
    response = webtest.TestApp(hub).get(path, status=503)
    monkeypatch.undo()
    assert response.content_type == kind and text in response.text and "secret" not in response.text
    assert (response.headers["Retry-After"], response.headers["X-JupyterHub-Version"]) == ("5", "1.5.1")


@pytest.mark.database("postgres")
@pytest.mark.parametrize("path", ["/hub/api/users", "/user/ada/lab", "/hub/health"])
def test_a_connection_that_the_database_has_ended_is_made_anew(hub, root, postgres, path):
    root("GET", "/users")
    assert postgres.end_hubs(hub.settings.database.rpartition("/")[2]) == 1
    root.app.get(path, headers={"Authorization": f"token {root.token}"}, status=503)
    assert len(root("GET", "/users").json) == 3


def test_a_full_disk_is_said_and_got_over(hub, root):
    root("GET", "/users")
    with hub.store.connected():
        pages, = hub.store.database.execute_sql("PRAGMA page_count").fetchone()
        hub.store.database.execute_sql(f"PRAGMA max_page_count = {pages}")
    many = {"usernames": [f"student{number}" for number in range(500)]}
    assert root("POST", "/users", many, status=503).json == error(503, minihub.NO_DATABASE)
    with hub.store.connected():
        assert minihub.User.select().count() == 3
        hub.store.database.execute_sql("PRAGMA max_page_count = 1073741823")
    assert len(root("POST", "/users", many, status=201).json) == 500


def test_a_locked_database_is_said_and_got_over(hub, root, monkeypatch):
    root("GET", "/users")
    monkeypatch.setattr(minihub, "SQLITE_WAIT", 0.05)
    with hub.store.connected():
        hub.store.database.execute_sql("PRAGMA busy_timeout = 50")
        path = hub.store.database.database
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert root("POST", "/users/eve", status=503).json == error(503, minihub.NO_DATABASE)
    root("POST", "/users/eve", status=201)


def test_a_database_that_refuses_writes_can_still_be_read(hub, root, pass_time, caplog):
    root("GET", "/user")
    pass_time(60)  # or the last record of activity is recent enough
    root.ticks = False
    with hub.store.connected():
        hub.store.database.execute_sql("PRAGMA query_only = 1")
    try:
        assert root("GET", "/user").json["name"] == "root"
        assert caplog.text.count("could not record activity: attempt to write a readonly database") == 1
        assert root("POST", "/users/eve", status=503).json == error(503, minihub.NO_DATABASE)
    finally:
        with hub.store.connected():
            hub.store.database.execute_sql("PRAGMA query_only = 0")


@pytest.mark.skipif(not shutil.which("setpriv"), reason="apt-get install util-linux")
def test_a_database_that_cannot_be_written_stops_the_hub_with_a_sentence(tmp_path):
    Hub(database=f"sqlite:///{tmp_path}/hub.sqlite", tick_interval=0).close()
    for path in tmp_path.glob("hub.sqlite*"):
        path.chmod(0o444)
    unprivileged = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []  # modes bind root, too
    environ = {"PYTHONPATH": str(HERE), "PATH": os.defpath, "MINIHUB_DATABASE": "sqlite:///hub.sqlite"}
    done = subprocess.run([*unprivileged, sys.executable, "-m", "minihub", "link", "ada"], cwd=tmp_path, env=environ,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (
        1, "", Like(r"minihub: database: must be usable: attempt to write a readonly database \(got 'sqlite:.*'\)\n"))


def test_an_import_that_is_interrupted_in_the_middle_leaves_nothing(hub, root, monkeypatch):
    insert, calls = minihub.Server.insert_many, itertools.count()
    monkeypatch.setattr(minihub.Server, "insert_many", lambda rows: insert(rows) if next(calls) < 5 else 1 / 0)
    names = {"usernames": [f"student{number}" for number in range(1000)]}
    root("POST", "/users", names, status=500)
    monkeypatch.undo()
    assert [user["name"] for user in root("GET", "/users").json] == ["root", "ada", "bob"]
    assert len(root("POST", "/users", names, status=201).json) == 1000


@pytest.fixture
def statements(hub, monkeypatch):
    """The SQL statements that the hub executes from now on."""
    with hub.store.connected():
        database = hub.store.database
    executed, execute_sql = [], database.execute_sql
    monkeypatch.setattr(database, "execute_sql", lambda sql, *more: executed.append(sql) or execute_sql(sql, *more))
    return executed


def statements_of(statements, api, *request):
    """The statements of a request that has been made before, so that its activity is known."""
    api.ticks = False
    api(*request)
    statements.clear()
    api(*request)
    return statements


@pytest.mark.parametrize(("path", "count"), [("/user", 1), ("/users/ada", 2), ("/users", 4)])
def test_hot_paths_take_few_queries_however_many_users_there_are(hub, root, statements, path, count):
    hub.create_users([f"student{number}" for number in range(200)])
    assert len(statements_of(statements, root, "GET", path)) == count


def test_activity_that_changes_nothing_takes_few_queries_and_writes_nothing(ada, statements):
    ada("POST", "/users/ada/server", status=201)
    moment = minihub.isoformat(minihub.now())
    body = {"last_activity": moment, "servers": {"": {"last_activity": moment}}}
    executed = statements_of(statements, ada, "POST", "/users/ada/activity", body)
    assert len(executed) <= 3 and not [sql for sql in executed if not sql.startswith("SELECT")]


@needs_singleuser
def test_a_kernel_lives_on_over_the_end_of_the_whole_hub(live):
    hub = live("-w", "2", admins="root")
    hub.command("link", "ada")
    token = hub.command("token", "ada")
    hub.start_server("ada", token)
    header = {"Authorization": f"token {token}"}
    kernel = json.loads(hub.request("POST", "/user/ada/api/kernels", "{}", header).body)["id"]
    kill_all(hub)
    hub.start()
    kernels = json.loads(hub.request("GET", "/user/ada/api/kernels", headers=header).body)
    assert [found["id"] for found in kernels] == [kernel]


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


def test_uwsgi_ends_at_once_though_websockets_are_open_and_they_stay(tmp_path):
    with carrying(tmp_path, kind=InUWSGI) as hub, contextlib.closing(websocket_to(hub)) as connection:
        hub.stop()
        assert hub.process.returncode == 0 and echo_all([connection], "here")


@pytest.mark.parametrize(("threads", "status"), [(0, 503), (1, 200)])
def test_uwsgi_needs_to_be_told_to_run_threads(hub, uwsgi, threads, status):
    uwsgi.has_threads = threads
    page = webtest.TestApp(hub, extra_environ={"uwsgi.version": "2.0.21"}).get("/hub/login", status=status)
    assert ("Start it with --enable-threads" in page.text) == (status == 503)


@pytest.mark.parametrize("worker", [0, 1], ids=["in the master", "in a worker"])
def test_in_uwsgi_the_workers_tick_at_once_and_the_master_does_not(make_hub, uwsgi, worker):
    hub, before = make_hub(tick_interval=0.01), threads_of_hubs()
    uwsgi.worker_id = lambda: worker
    hub.ticker.start_in_workers()
    if not worker:
        assert threads_of_hubs() == before
        uwsgi.post_fork_hook()
    assert threads_of_hubs() == sorted([*before, "minihub-ticker"])


#: The command of each web server, how to install it, and its configuration around the README's part.
WEB_SERVERS = {
    "nginx": ("nginx -p {folder} -c {folder}/conf -e {folder}/log", "apt-get install nginx", """
{if_root} user root;
daemon off; pid {folder}/pid; error_log {folder}/log;
events {{}}
http {{
    access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
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
    folder, kind = tmp_path_factory.mktemp("lab"), type("BelowLab", (LiveHub,), {"prefix": "/lab"})
    make_certificate(folder)
    with carrying(folder, kind=kind, authenticator="dummy", password=PASSWORD, base_url="/lab/") as hub:
        yield hub


@pytest.fixture(scope="module", params=WEB_SERVERS)
def behind_a_web_server(request, below_lab, tmp_path_factory):
    """The URL of the hub behind a real web server that is configured as the README has it."""
    command, install, conf = WEB_SERVERS[request.param]
    words = command.split()
    folders = [Path(sys.executable).parent, os.environ.get("PATH", os.defpath), "/usr/sbin"]
    words[0] = shutil.which(words[0], path=os.pathsep.join(map(str, folders)))
    if not words[0]:
        pytest.skip(install)
    folder, port = tmp_path_factory.mktemp(request.param), minihub.free_port()
    readme = readme_text("school.example", request.param)
    for old, new in (("listen 443", f"listen 127.0.0.1:{port}"), ("*:443", f"127.0.0.1:{port}"),
                     ("school.example {", f"localhost:{port} {{"),
                     ("/etc/ssl/school.example", f"{below_lab.folder}/tls"), ("school.example", "localhost"),
                     ("127.0.0.1:8000", f"127.0.0.1:{below_lab.port}")):
        readme = readme.replace(old, new)
    names = ["mpm_event", "authz_core", "proxy", *"".join(re.findall("a2enmod (.*)", readme)).split()]
    modules = "\n".join(f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so" for name in names)
    if_root = "" if os.geteuid() == 0 else "#"
    (folder / "conf").write_text(conf.format(if_root=if_root, folder=folder, port=port, modules=modules, readme=readme))
    environ = {**os.environ, "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    with open(folder / "output", "wb") as output:
        web_server = subprocess.Popen([word.format(folder=folder) for word in words], stdout=output, stderr=output,
                                      start_new_session=True, env=environ)
    try:
        wait_for(lambda: is_open(port) or web_server.poll() is not None)
        assert is_open(port), (folder / "output").read_text()
        yield f"https://localhost:{port}/lab"
    finally:
        os.killpg(web_server.pid, signal.SIGKILL)  # Apache would wait for streams that nobody reads any more
        web_server.wait(30)


@pytest.fixture
def tls_browser(below_lab):
    """A browser that trusts the certificate."""
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
def test_behind_a_web_server_requests_arrive_as_they_were_sent(behind_a_web_server, tls_browser, way_in, path):
    got = tls_browser.get(f"{behind_a_web_server}/user/ada/echo/{path}").json()
    headers = dict(got["headers"])
    assert (got["uri"], headers["Host"], "jupyterhub-hub-login" in headers["Cookie"]) == (
        f"/lab/user/ada/echo/{path}", urlsplit(behind_a_web_server).netloc, False)


def test_behind_a_web_server_servers_get_uploads(behind_a_web_server, tls_browser):
    body = os.urandom(3 * MEGABYTE)
    assert tls_browser.post(f"{behind_a_web_server}/user/ada/upload", body).json() == {
        "count": len(body), "sha256": hashlib.sha256(body).hexdigest()}


def test_behind_a_web_server_events_arrive_when_they_happen(behind_a_web_server, tls_browser):
    url = f"{behind_a_web_server}/user/ada/events?count=2&pause=3600"
    with tls_browser.get(url, stream=True, timeout=10) as stream:
        assert next(stream.iter_content(None)) == b"data: 0\n\n"


def test_behind_a_web_server_websockets_carry_messages(below_lab, behind_a_web_server):
    websocket = pytest.importorskip("websocket", reason="pip install '.[test]'")
    url, tls = behind_a_web_server.replace("https", "wss"), {"ca_certs": below_lab.folder / "tls.pem"}
    connection = websocket.create_connection(f"{url}/user/ada/socket", sslopt=tls, timeout=10)
    with contextlib.closing(connection):
        connection.send("hello")
        assert connection.recv() == "hello"


def test_a_web_server_waits_for_the_rest_of_a_request_instead_of_the_hub(below_lab, behind_a_web_server):
    trusting = ssl.create_default_context(cafile=below_lab.folder / "tls.pem")
    host, port = urlsplit(behind_a_web_server).netloc.split(":")
    with contextlib.ExitStack() as opened:
        for _ in range(3):
            plain = opened.enter_context(socket.create_connection((host, int(port)), 20))
            client = opened.enter_context(trusting.wrap_socket(plain, server_hostname=host))
            client.sendall(json_post(f"/lab{SIGN_IN}", b"Content-Length: 40000\r\n\r\n" + b" " * 20000))
        time.sleep(0.3)
        began = time.monotonic()
        assert below_lab.request("GET", "/lab/hub/health").status == 200
        assert time.monotonic() - began < 2


def test_headers_of_clients_do_not_get_past_a_web_server(behind_a_web_server, tls_browser):
    headers = {"X-Forwarded-Proto": "http", "X-Forwarded-Host": "evil.example", "X_Forwarded_Host": "evil.example"}
    assert "Secure" in tls_browser.get(f"{behind_a_web_server}/hub/login", headers=headers).headers["Set-Cookie"]
    got = dict(tls_browser.get(f"{behind_a_web_server}/user/ada/echo", headers=headers).json()["headers"])
    assert [got[name] for name in ("X-Forwarded-Proto", "X-Forwarded-Host", "Host")] == [
        "https", *[urlsplit(behind_a_web_server).netloc] * 2]


def test_a_forged_client_address_does_not_get_past_a_web_server(below_lab, behind_a_web_server):
    trusting = ssl.create_default_context(cafile=below_lab.folder / "tls.pem")
    connection = http.client.HTTPSConnection(urlsplit(behind_a_web_server).netloc, source_address=("127.0.0.2", 0),
                                             context=trusting)
    with contextlib.closing(connection):
        wrong = {"auth": {"username": "ada", "password": "wrong"}}
        connection.request("POST", "/lab/hub/api/users/ada/tokens", json.dumps(wrong), {"X-Forwarded-For": "6.6.6.6"})
        assert connection.getresponse().status == 403
    keys = below_lab.rows("SELECT key FROM failures")
    assert [address for address in ("127.0.0.2", "6.6.6.6") if any(address in key for key in keys)] == ["127.0.0.2"]


def threads_of_hubs():
    """The names of the threads that hubs run in this process."""
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("minihub-"))


def test_a_site_uses_the_hub_outside_of_requests(hub, spawner):
    assert [user.name for user in hub.create_users(["Ada", "eve"], admin=True)] == ["eve"]
    assert hub.start_server("ada", "gpu", {"course": "python"}) == "/user/ada/gpu/"
    assert hub.tick() is True
    assert hub.start_server("bob") == "/user/bob/"
    assert [(launch.user.name, launch.name, launch.user_options) for launch in spawner.launches] == [
        ("ada", "gpu", {"course": "python"}), ("bob", "", None)]
    hub.stop_server("ada", "gpu")
    assert [launch.user.name for launch in spawner.running.values()] == ["bob"]
    hub.delete_user("Bob")
    with hub.store.connected():
        tick_all(hub)
        assert {user.name: user.admin for user in hub.people.list()[0]} == {"root": True, "ada": False, "eve": True}
    assert spawner.running == {}


@pytest.mark.parametrize(("action", "kind", "sentence"), [
    (lambda hub: hub.start_server("eve"), "NotFound", "No such user: eve"),
    (lambda hub: hub.start_server("ada", "not/a name"), "BadRequest", "Invalid server_name"),
    (lambda hub: hub.stop_server("ada", "none"), "NotFound", "ada has no server named 'none'"),
    (lambda hub: hub.delete_user("eve"), "NotFound", "No such user: eve"),
    (lambda hub: hub.create_users(["ada"]), "Conflict", "All 1 users already exist"),
    (lambda hub: hub.create_users(["a/b"]), "BadRequest", "Invalid username: a/b")])
def test_a_site_is_refused_with_an_error_that_can_be_imported_by_name(hub, action, kind, sentence):
    assert kind in minihub.__all__
    with pytest.raises(getattr(minihub, kind), match=sentence):
        action(hub)


def test_a_start_before_the_first_request_is_below_the_base_url(make_hub):
    hub = people(make_hub(base_url="/lab/", hub_url="http://10.0.0.1:80"))
    assert hub.start_server("ada") == "/lab/user/ada/"


@pytest.fixture
def told(make_hub):
    """A hub, and what it has told its site since it was made."""
    facts = []
    callbacks = {f"on_{event}": lambda *values, event=event: facts.append((event, *values))
                 for event in ("user_created", "server_started", "server_stopped")}
    return make_hub(admins=["root"], **callbacks), facts


def test_a_site_is_told_of_events(told, spawner):
    hub, facts = told
    hub.create_users(["ada", "bob"])
    hub.start_server("ada")
    hub.tick()
    hub.stop_server("ada")
    hub.tick()
    spawner.problem = RuntimeError("no more room")
    hub.start_server("bob", "gpu")
    assert facts == [("user_created", "root"), ("user_created", "ada"), ("user_created", "bob"),
                     ("server_started", "ada", "", "/user/ada/"), ("server_stopped", "ada", "", ""),
                     ("server_stopped", "bob", "gpu", "RuntimeError: no more room")]


def test_a_site_is_told_of_a_first_admin_and_not_of_what_did_not_happen(told, spawner):
    hub, facts = told
    facts.clear()
    with hub.store.connected(), pytest.raises(minihub.BadRequest):
        hub.sign_in.use_link(link_token(hub.sign_in.first_admin_link()), "eve", "weak")
    with pytest.raises(minihub.BadRequest):
        hub.create_users(["ada", "a/b"])
    spawner.answers = False
    hub.start_server("root")
    hub.tick()
    assert facts == []
    with hub.store.connected():
        hub.sign_in.use_link(link_token(hub.sign_in.first_admin_link()), "eve", "a good password")
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
    connection = minihub.Connection(near)
    connection.serve = lambda: connection.discard(near)
    hub.splicer.carry(connection)
    assert len(threads_of_hubs()) == len(before) + 2
    folder = Path(hub.store.database.database).parent
    hub.close()
    wait_for(lambda: threads_of_hubs() == before)
    with far:
        far.settimeout(5)
        assert (far.recv(1), near.fileno(), folder.exists(), hub.store.database.is_closed()) == (b"", -1, False, True)


def test_a_hub_that_is_closed_can_be_used_and_closed_again(make_hub):
    hub, before = people(make_hub(tick_interval=0.01)), threads_of_hubs()
    hub.close()
    for _ in range(2):
        Api(hub, token_for(hub, "ada"))("GET", "/user")
        assert threads_of_hubs() == sorted([*before, "minihub-ticker"])
        hub.close()
        hub.close()
        wait_for(lambda: threads_of_hubs() == before)


def test_a_hub_that_is_closed_leaves_the_ticking_to_others_at_once(make_hub, make_database):
    url = make_database()
    one, other = make_hub(database=url), make_hub(database=url)
    assert (one.tick(), other.tick()) == (True, False)
    other.close()
    assert one.tick()
    one.close()
    assert other.tick()


#: A falcon application that does nothing, as the measure of what a gunicorn with one sync worker can do.
BARE_FALCON = """
import falcon

class Resource:
    def on_get(self, req, resp):
        resp.media = {"name": "ada"}

app = falcon.App()
app.add_route("/hub/health", Resource())
"""


def seconds_of(hub, method, path, token="", body=None, count=200):
    """How long a request takes: the mean of the best of five runs, by a client that costs next to nothing."""
    content = json.dumps(body).encode() if body else b""
    request = (f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: token {token}\r\n"
               f"Content-Length: {len(content)}\r\n\r\n").encode() + content
    assert converse(hub, request).startswith(b"HTTP/1.1 20")

    def run():
        begin = time.perf_counter()
        for _ in range(count):
            converse(hub, request)
        return (time.perf_counter() - begin) / count

    return min(run() for _ in range(5))


@pytest.mark.bench
def test_the_hot_paths_beside_bare_falcon(tmp_path, live, capsys):
    (tmp_path / "bare.py").write_text(BARE_FALCON)
    bare = live(kind=type("Bare", (LiveHub,), {"app": "bare:app"}))
    hub = live(admins="root")
    root = hub.command("token", "root")
    hub.api("POST", "/users", root, {"usernames": ["ada", *(f"student{number}" for number in range(198))]})
    ada, moment = hub.command("token", "ada"), minihub.isoformat(minihub.now())
    report = {"last_activity": moment, "servers": {"": {"last_activity": moment}}}
    floor = seconds_of(bare, "GET", "/hub/health")
    figures = {"bare falcon": floor, "GET /health": seconds_of(hub, "GET", "/hub/health")}
    for method, path, token, body, count in (
            ("GET", "/user", ada, None, 200), ("GET", "/users/ada", ada, None, 200),
            ("POST", "/users/ada/activity", ada, report, 200), ("GET", "/users", root, None, 20),
            ("POST", "/users/ada/tokens", ada, None, 20)):
        figures[f"{method} {path}"] = seconds_of(hub, method, f"/hub/api{path}", token, body, count)
    tokens, begin = hub.rows("SELECT id FROM tokens WHERE note = 'Requested via api'"), time.perf_counter()
    for number in tokens:
        assert hub.api("DELETE", f"/users/ada/tokens/a{number}", ada)[0] == 204
    figures["DELETE /users/ada/tokens/..."] = (time.perf_counter() - begin) / len(tokens)
    with capsys.disabled():
        print(f"\n{'with 200 users':30}{'ms':>8}{'of falcon':>12}")
        for name, figure in figures.items():
            print(f"{name:30}{figure * 1000:8.2f}{floor / figure:12.0%}")


########################################################################################################
# 21. Command line
########################################################################################################


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Runs `minihub ...` in a folder with a hub's database: the exit status, the output, the complaint."""
    def run(*words):
        status = minihub.main(list(words))
        return (status, *(text.strip() for text in capsys.readouterr()))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIHUB_PUBLIC_URL", "https://hub.example")
    minihub.Store("sqlite:///minihub.sqlite").close()
    return run


@pytest.fixture
def its_hub(command, make_hub, tmp_path):
    """The hub on the command line's database."""
    return make_hub(database=f"sqlite:///{tmp_path}/minihub.sqlite")


def test_a_link_for_somebody_new_creates_a_user(command, its_hub):
    status, link, complaint = command("link", "Ada")
    assert (status, link, complaint) == (0, Like(r"https://hub\.example/hub/link/\S+"), "")
    with its_hub.store.connected():
        user = its_hub.sign_in.open_link(link_token(link))
        assert (user.name, user.admin) == ("ada", False)


def test_a_link_can_make_an_admin(command, its_hub):
    command("link", "ada")
    assert command("link", "ada", "--admin")[0] == 0
    with its_hub.store.connected():
        assert its_hub.people.find("ada").admin


def test_the_command_line_makes_a_token(command, its_hub):
    command("link", "ada")
    status, token, complaint = command("token", "ADA")
    assert (status, token, complaint) == (0, SECRET, "")
    made, = Api(its_hub, token)("GET", "/users/ada/tokens").json["api_tokens"]
    assert made["note"] == "Requested on the command line"


def test_the_command_line_leaves_the_services_and_admins_of_the_hub_alone(command, make_hub, tmp_path):
    hub = make_hub(database=f"sqlite:///{tmp_path}/minihub.sqlite", admins=["root"],
                   services=[{"name": "ops", "admin": True, "api_token": "ops-token"}])
    assert command("link", "ada")[0] == 0
    assert Api(hub, "ops-token")("GET", "/user").json["name"] == "ops"


@pytest.mark.parametrize(("words", "complaint"), [
    (("token", "eve"), "minihub: No such user: eve"), (("link", "a/b"), "minihub: Invalid username: a/b"),
    (("link", ""), "minihub: Invalid username:")])
def test_the_command_line_says_what_is_wrong(command, words, complaint):
    assert command(*words) == (1, "", complaint)


@pytest.mark.parametrize("words", [("link", "ada"), ("token", "ada"), ("backup", "copy.sqlite")])
def test_a_folder_without_a_database_is_left_without_one(command, tmp_path, words):
    for path in tmp_path.iterdir():
        path.unlink()
    status, output, complaint = command(*words)
    assert (status, output, complaint) == (1, "", Like("minihub: There is no database .*minihub.sqlite.*"))
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_says_which_setting_is_invalid(command, monkeypatch):
    monkeypatch.setenv("MINIHUB_START_TIMEOUT", "soon")
    assert command("link", "ada") == (1, "", "minihub: start_timeout: must be a number, 0 or more (got 'soon')")


@pytest.mark.parametrize("words", [(), ("nonsense",), ("link",), ("token", "ada", "--nonsense")])
def test_the_command_line_explains_itself(command, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        command(*words)
    assert capsys.readouterr().err.startswith("usage: minihub ")


def test_the_module_is_the_command(tmp_path):
    code = "import runpy, sys; sys.argv[1:] = ['--version']; runpy.run_module('minihub', run_name='__main__')"
    assert run_python(code, tmp_path) == f"minihub {minihub.__version__}"


def test_a_backup_is_made_while_the_hub_runs_and_overwrites_nothing(live, tmp_path):
    hub = live()
    hub.command("link", "ada")
    hub.command("backup", "copy.sqlite")
    hub.command("link", "bob")
    assert (tmp_path / "copy.sqlite").stat().st_mode & 0o777 == 0o600
    with contextlib.closing(sqlite3.connect(tmp_path / "copy.sqlite")) as copy:
        assert [name for name, in copy.execute("SELECT name FROM users")] == ["ada"]
    with pytest.raises(subprocess.CalledProcessError) as raised:
        hub.command("backup", "copy.sqlite")
    assert raised.value.stderr == "minihub: The copy copy.sqlite cannot be made: File exists\n"


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
