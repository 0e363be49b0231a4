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
            hub.set_password(hub.create_user(name, admin=name == "root"), password_of(name))
    return hub


def password_of(name):
    return f"{name} {name} secret"


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
