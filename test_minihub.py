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
