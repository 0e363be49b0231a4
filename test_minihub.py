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
import hashlib
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
import statistics
import struct
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
        if hub._temporary:
            hub._temporary.cleanup()


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


########################################################################################################
# 7. Proxies
########################################################################################################

# The text of HTTP


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
    ("/user/ada/x", "/user/bob/x", "", "/user/ada/x"),
    ("/user/ada/x y", "/user/ada/x y", "", "/user/ada/x%20y"),
    ("/user/ada/\r\nX: 1", "/user/ada/%0D%0AX:%201", "", "/user/ada/%0D%0AX:%201"),
    ("/user/ada/~!$&'()*+,;=:@", None, "", "/user/ada/~!$&'()*+,;=:@"),
    ("/user/ada/x", "/user/ada/x", "a=%2F&b=+&&c=;~!*'()\"<>[]{}|^`\\", "/user/ada/x?a=%2F&b=+&&c=;~!*'()\"<>[]{}|^`\\"),
    ("/user/ada/x", "/user/ada/x", "a= \r\nX: 1", "/user/ada/x?a=%20%0D%0AX:%201")])
def test_a_path_goes_on_as_it_was_sent(path, raw, query, target):
    more = {} if raw is None else {"RAW_URI": raw}
    assert minihub.request_target(request_environ(PATH_INFO=path, QUERY_STRING=query, **more)) == target


def test_the_mount_point_is_a_part_of_the_path():
    assert minihub.request_target(request_environ(SCRIPT_NAME="/lab", REQUEST_URI="/lab/user/ada/x")) == "/lab/user/ada/x"


@pytest.mark.parametrize("trusted, peer, forwarded, client", [
    ((), "10.0.0.1", {}, ("10.0.0.1", "http", "lab:8000")),
    ((), "10.0.0.1", {"FOR": "6.6.6.6", "PROTO": "https", "HOST": "evil"}, ("10.0.0.1", "http", "lab:8000")),
    (("10.0.0.1",), "10.0.0.1", {"FOR": "6.6.6.6", "PROTO": "https", "HOST": "good"}, ("6.6.6.6", "https", "good")),
    (("10.0.0.0/8",), "10.0.0.1", {"FOR": "7.7.7.7, 6.6.6.6, 10.0.0.9"}, ("6.6.6.6", "http", "lab:8000")),
    (("10.0.0.0/8",), "10.0.0.1", {"FOR": "10.0.0.8, 10.0.0.9"}, ("10.0.0.8", "http", "lab:8000")),
    (("10.0.0.1",), "10.0.0.1", {"PROTO": "https, http", "HOST": "a, b"}, ("10.0.0.1", "http", "b")),
    (("10.0.0.1",), "10.0.0.1", {"PROTO": "javascript", "FOR": " , "}, ("10.0.0.1", "http", "lab:8000")),
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
    "nothing": b"", "text": b"hello", "http 2": b"HTTP/2 200 OK", "http 0.9": b"<html>", "no status": b"HTTP/1.1 OK",
    "long status": b"HTTP/1.1 2000 OK", "status 0": b"HTTP/1.1 099 OK", "bare LF": b"HTTP/1.1 200 OK\r\nA: b\nSet-Cookie: c",
    "bare CR": b"HTTP/1.1 200 OK\r\nA: b\rC: d", "NUL": b"HTTP/1.1 200 OK\r\nA: \0", "folded": b"HTTP/1.1 200 OK\r\nA: b\r\n c",
    "no colon": b"HTTP/1.1 200 OK\r\nA b", "blank in name": b"HTTP/1.1 200 OK\r\nContent-Length : 3",
    "no name": b"HTTP/1.1 200 OK\r\n: 3", "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4",
    "list of lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 3, 3", "negative": b"HTTP/1.1 200 OK\r\nContent-Length: -3"}


@pytest.mark.parametrize("raw", GARBAGE.values(), ids=GARBAGE)
def test_an_answer_that_is_none_is_recognised(raw):
    with pytest.raises(ValueError):
        minihub.ResponseHead.parse(raw)


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


# Routes


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
        hub.proxy.check_routes(right)
    assert routes_of(hub) == {prefix: route["target"] for prefix, route in right.items()}


def test_a_proxy_of_ones_own_needs_three_methods():
    for call in (lambda proxy: proxy.add_route("/", "", {}), lambda proxy: proxy.delete_route("/"),
                 lambda proxy: proxy.get_all_routes()):
        with pytest.raises(NotImplementedError):
            call(minihub.Proxy())


# Real requests


@contextlib.contextmanager
def carrying(folder, *options, **settings):
    """A gunicorn in front of ada's echo server, for as long as it is needed."""
    hubs = []

    def start(*options, **settings):
        hubs.append(LiveHub(folder, *options, **settings))
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
        yield hub


@pytest.fixture(scope="module")
def carried_by_threads(tmp_path_factory):
    """ada's echo server behind one worker with four threads."""
    with carrying(tmp_path_factory.mktemp("threads"), "--threads", "4") as hub:
        yield hub


@pytest.fixture(params=["carried", "carried_by_threads"])
def either(request):
    """ada's echo server behind each kind of worker."""
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
    return websocket.create_connection(f"ws://127.0.0.1:{hub.port}{path}", timeout=20, **options)


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
    assert events == [b"data: 0\n", b"data: 1\n", b"data: 2\n"]


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
def test_paths_and_queries_arrive_as_they_were_sent(either, path):
    answer = converse(either, f"GET /user/ada/echo{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["uri"] == f"/user/ada/echo{path}".removesuffix("?")


def test_a_client_of_http_1_0_is_served(either):
    answer = converse(either, b"GET /user/ada/download?size=100000 HTTP/1.0\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"chunked" not in head and body == b"x" * 100000


def test_a_client_that_waits_for_leave_to_send_its_body_gets_it(either):
    with connect(either) as connection:
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
    assert (dict(got["headers"])["Authorization"], got["uri"]) == ("token", "/user/ada/echo?token=")


@pytest.mark.parametrize("value", ["token abc", "Bearer abc", "Basic YWRhOnNlY3JldA=="])
def test_credentials_that_are_not_the_hubs_are_passed_on(carried, value):
    got = echoed(carried, path="?token=a%62c", headers={"Authorization": value})
    assert (dict(got["headers"])["Authorization"], got["uri"]) == (value, "/user/ada/echo?token=a%62c")


# Servers that do not answer


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


# Many, slow and careless clients


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


# Other hosts


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

    request = LiveHub.request

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


@pytest.fixture(scope="module", params=[Wsgiref, Werkzeug, Waitress])
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
