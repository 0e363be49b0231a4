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
# 2. Settings
########################################################################################################


README = (HERE / "README.md").read_text()


def settings_table():
    """The README's table of settings, as the dataclass and its comments have it."""
    source = Path(minihub.__file__).read_text()
    meanings = dict(re.findall(r"^    (\w+): [^#\n]+# (.+)$", source[:source.index("def __post_init__")], re.MULTILINE))
    rows = [(f"`{field.name}`", "" if field.name == "process_variables" else f"`MINIHUB_{field.name.upper()}`",
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
    variables = {f"MINIHUB_{field.name.upper()}": written(field.default) for field in dataclasses.fields(Settings)}
    del variables["MINIHUB_PROCESS_VARIABLES"]
    assert Settings.from_environ(variables) == Settings()


def readme_example(name):
    """What the README's Python example with that name in it defines."""
    example = next(text for text in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if name in text)
    defined = {}
    exec(example, defined)
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
# 12. Pages
########################################################################################################


def browser(hub, name=None, **environ):
    """A browser without JavaScript, in which that user has signed in."""
    pages = webtest.TestApp(hub, extra_environ={"REMOTE_ADDR": "127.0.0.1", **environ}, lint=True)
    if name:
        sign_in(pages, name)
    return pages


def sign_in(pages, name, password=None, url="/hub/login", status=302):
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


# Signing in and out

def test_signing_in_leads_home(hub):
    pages = browser(hub)
    assert sign_in(pages, "ada").headers["Location"] == "/hub/home"
    assert pages.get("/hub/home", status=200).html.h1.text == "Hello, ada"


def test_a_name_can_be_typed_in_any_case(hub):
    pages = browser(hub)
    sign_in(pages, "ADA", password_of("ada"))
    assert pages.get("/hub/home", status=200).html.h1.text == "Hello, ada"


@pytest.mark.parametrize("name, password", [("ada", "wrong"), ("ada", ""), ("eve", "eve eve secret"), ("", ""), ("a/b", "x"),
                                            ("<b>", "x"), ("ada\0", "x"), ("\udcff", "\udcff")])
def test_wrong_credentials_show_the_form_again_with_the_name_kept(hub, name, password):
    pages = browser(hub)
    form = {"_xsrf": xsrf_of(pages, "/hub/login"), "username": name.encode("utf-8", "surrogateescape"),
            "password": password.encode("utf-8", "surrogateescape")}
    response = pages.post("/hub/login", form, status=200)
    assert alert_of(response) == ["Wrong name or password."]
    assert response.form["username"].value == name.replace("\udcff", "\ufffd")
    assert response.form["password"].value == ""
    assert not is_signed_in(pages)


@pytest.mark.parametrize("given", [None, "", "wrong", "é"])
def test_signing_in_without_the_forms_token_loses_nothing_but_the_password(hub, given):
    pages = browser(hub)
    pages.get("/hub/login")
    form = {"username": "ada", "password": password_of("ada"), **({} if given is None else {"_xsrf": given})}
    response = pages.post("/hub/login?next=/hub/token", form, status=200)
    assert alert_of(response) == ["The page was open for too long, or cookies are off. Please sign in again."]
    assert response.form["username"].value == "ada"
    assert not is_signed_in(pages)
    response.form["password"] = password_of("ada")
    assert response.form.submit(status=302).headers["Location"] == "/hub/token"


def test_the_token_of_another_browser_signs_nobody_in(hub):
    token, pages = xsrf_of(browser(hub), "/hub/login"), browser(hub)
    pages.get("/hub/login")
    pages.post("/hub/login", {"username": "ada", "password": password_of("ada"), "_xsrf": token}, status=200)
    assert not is_signed_in(pages)


def test_too_many_wrong_passwords_are_throttled_on_the_page(hub):
    pages = browser(hub)
    for _ in range(5):
        sign_in(pages, "ada", "wrong", status=200)
    response = sign_in(pages, "ada", status=429)
    assert re.fullmatch(r"Too many failed sign-ins\. Try again in (299|300) seconds", alert_of(response)[0])
    assert response.headers["Retry-After"] in ("299", "300")
    assert response.form["username"].value == "ada"
    assert sign_in(pages, "bob").headers["Location"] == "/hub/home"


def test_a_throttled_name_can_sign_in_when_the_failures_are_forgotten(hub):
    pages = browser(hub)
    for _ in range(5):
        sign_in(pages, "ada", "wrong", status=200)
    with hub.connected():
        minihub.Failure.update(until=minihub.now()).execute()
    assert sign_in(pages, "ada").headers["Location"] == "/hub/home"


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
    assert given_cookies(browser(hub)) == HTTP_COOKIES


def test_cookies_of_a_mounted_hub_stay_below_its_mount_point(hub):
    cookies = given_cookies(browser(hub, SCRIPT_NAME="/lab"), "/lab")
    assert {name: [part for part in parts if part.startswith("Path=")] for name, parts in cookies.items()} == {
        "jupyterhub-hub-login": ["Path=/lab/hub/"], "jupyterhub-session-id": ["Path=/lab/"]}


def test_cookies_are_secure_where_the_browser_uses_https(hub):
    cookies = given_cookies(browser(hub, **{"wsgi.url_scheme": "https"}))
    assert cookies == {name: parts | {"Secure"} for name, parts in HTTP_COOKIES.items()}


@pytest.mark.parametrize("address, secure", [("127.0.0.1", True), ("203.0.113.9", False)])
def test_only_a_trusted_proxys_word_for_https_counts(hub, address, secure):
    pages = browser(hub, REMOTE_ADDR=address, HTTP_X_FORWARDED_PROTO="https")
    assert ("Secure" in pages.get("/hub/login").headers["Set-Cookie"]) == secure


@pytest.mark.parametrize("cookie", ["", "nonsense", "WzEsIngiXQ.aaaaaa.bbbbbb"])
def test_a_forged_cookie_is_nobodys(hub, cookie):
    pages = browser(hub)
    pages.set_cookie("jupyterhub-hub-login", cookie)
    assert not is_signed_in(pages)


@pytest.mark.parametrize("age, valid", [(14 * 24 * 3600 - 60, True), (14 * 24 * 3600 + 60, False)])
def test_a_sign_in_lasts_two_weeks(hub, monkeypatch, age, valid):
    pages = browser(hub, "ada")
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
    pages = browser(hub)
    assert sign_in(pages, "ada", url=place).headers["Location"] == target
    assert pages.get(place, status=302).headers["Location"] == target


@pytest.mark.parametrize("target", EVIL_NEXT)
def test_signing_in_never_leads_off_the_site(hub, target):
    place = f"/hub/login?{urlencode({'next': target})}"
    pages = browser(hub)
    assert sign_in(pages, "ada", url=place).headers["Location"] == "/hub/home"
    assert pages.get(place, status=302).headers["Location"] == "/hub/home"


@pytest.mark.parametrize("target, location", [
    ("/user/ada/lab/tree/x.ipynb", "/user/ada/lab/tree/x.ipynb"),
    ("/user/bob/", "/user/ada/"), ("https://evil.example/", "/user/ada/"), ("//evil.example/user/ada/", "/user/ada/")])
def test_a_start_leads_on_into_the_server_only(hub, target, location):
    pages = browser(hub, "ada")
    place = f"/hub/spawn/ada?{urlencode({'next': target})}"
    pending = pages.get(place).form.submit(status=303)
    assert pending.follow(status=302).headers["Location"] == location


PRIVATE_PAGES = ["/hub/home", "/hub/spawn", "/hub/spawn/ada", "/hub/spawn/ada/project", "/hub/spawn-pending/ada", "/hub/token",
                 "/hub/admin", "/hub/user/ada/lab?x=a%20b", "/hub/user-redirect/lab/tree", "/hub/api/oauth2/authorize?client_id=x"]


@pytest.mark.parametrize("path", PRIVATE_PAGES)
def test_who_is_not_signed_in_is_asked_to_and_comes_back(hub, path):
    response = browser(hub).get(path, status=302)
    assert response.headers["Location"] == f"/hub/login?{urlencode({'next': path})}"


@pytest.mark.parametrize("path", ["/hub/spawn/ada", "/hub/stop/ada", "/hub/delete/ada/project", "/hub/token", "/hub/admin",
                                  "/hub/admin/link/ada"])
def test_a_form_sent_after_signing_out_leads_home_in_the_end(hub, path):
    pages = browser(hub)
    response = pages.post(path, {"_xsrf": "old"}, status=302)
    assert response.headers["Location"] == "/hub/login"
    assert sign_in(pages, "root", url=response.headers["Location"]).headers["Location"] == "/hub/home"


def test_signing_out_ends_the_session(hub):
    pages = browser(hub, "ada")
    response = pages.get("/hub/logout", status=302)
    assert response.headers["Location"] == "/hub/login"
    assert pages.cookies == {}
    assert not is_signed_in(pages)


def test_signing_out_ends_the_browser_sessions_tokens_and_no_others(hub, ada):
    pages = browser(hub, "ada")
    here, elsewhere = (token_for(hub, "ada", session_id=session_id) for session_id in
                       (pages.cookies["jupyterhub-session-id"], "0" * 32))
    pages.get("/hub/logout", status=302)
    Api(hub, here)("GET", "/user", status=403)
    Api(hub, elsewhere)("GET", "/user")
    ada("GET", "/user")


def test_signing_out_twice_leads_to_the_sign_in_page(hub):
    assert browser(hub).get("/hub/logout", status=302).headers["Location"] == "/hub/login"


# Sign-in links

def submit_password(pages, link, password="a new password", again=None, status=303, **fields):
    """The response to the form behind a sign-in link."""
    form = pages.get(link, status=200).form
    for field, value in {"password": password, "again": again or password, **fields}.items():
        form[field] = value
    return form.submit(status=status)


def test_a_sign_in_link_gives_a_password_and_signs_in(hub):
    pages = browser(hub)
    assert submit_password(pages, link_of(hub, "ada")).headers["Location"] == "/hub/home"
    assert is_signed_in(pages)
    assert sign_in(browser(hub), "ada", "a new password").headers["Location"] == "/hub/home"


def test_looking_at_a_sign_in_link_does_not_use_it_up(hub):
    link = link_of(hub, "ada")
    assert browser(hub).get(link, status=200).form["username"].value == "ada"
    assert browser(hub).get(link, status=200).form["username"].value == "ada"


def test_a_used_sign_in_link_works_no_more(hub):
    link, pages = link_of(hub, "ada"), browser(hub)
    form = pages.get(link).form
    submit_password(browser(hub), link)
    assert alert_of(form.submit(status=403)) == ["This link has been used already. Ask for a new one"]
    assert alert_of(pages.get(link, status=403)) == ["This link has been used already. Ask for a new one"]


def test_a_new_password_ends_sign_in_links_and_sessions(hub):
    link, pages = link_of(hub, "ada"), browser(hub, "ada")
    submit_password(browser(hub), link_of(hub, "ada"))
    assert not is_signed_in(pages)
    assert alert_of(pages.get(link, status=403)) == ["This link has been used already. Ask for a new one"]


@pytest.mark.parametrize("age, status", [(7 * 24 * 3600 - 60, 200), (7 * 24 * 3600 + 60, 403)])
def test_a_sign_in_link_is_good_for_a_week(hub, monkeypatch, age, status):
    link = link_of(hub, "ada")
    let_links_and_cookies_age(monkeypatch, age)
    browser(hub).get(link, status=status)


@pytest.mark.parametrize("change", [lambda link: link[:-1] + ("A" if link[-1] != "A" else "B"), lambda link: link + "x",
                                    lambda link: "/hub/link/nonsense", lambda link: "/hub/link/" + "é"])
def test_a_forged_sign_in_link_is_refused(hub, change):
    response = browser(hub).get(quote(change(link_of(hub, "ada")), safe="/"), status=403)
    assert alert_of(response) == ["This link is not valid any more. Ask for a new one"]


@pytest.mark.parametrize("password, again, message", [
    ("a new password", "a new passwort", "The two passwords are not the same"),
    ("short", "short", "Choose a password of at least 8 characters that is not your name"),
    ("x" * 1001, "x" * 1001, "Choose a password of at least 8 characters that is not your name")])
def test_a_bad_new_password_is_refused_and_the_link_goes_on_working(hub, password, again, message):
    link, pages = link_of(hub, "ada"), browser(hub)
    response = submit_password(pages, link, password, again, status=400)
    assert alert_of(response) == [message]
    assert response.form["username"].value == "ada"
    assert sign_in(browser(hub), "ada").headers["Location"] == "/hub/home"
    submit_password(pages, link)


def test_a_sign_in_link_cannot_be_used_for_another_name(hub):
    submit_password(browser(hub), link_of(hub, "ada"), username="bob")
    assert sign_in(browser(hub), "bob").headers["Location"] == "/hub/home"
    assert sign_in(browser(hub), "ada", "a new password").headers["Location"] == "/hub/home"


@pytest.fixture
def first_link(make_hub):
    """The first admin's link, on a hub without users."""
    hub = make_hub()
    with hub.connected():
        return hub, urlsplit(hub.first_admin_link()).path


def test_the_first_admin_chooses_name_and_password(first_link):
    hub, link = first_link
    pages = browser(hub)
    assert submit_password(pages, link, username="Teacher").headers["Location"] == "/hub/home"
    assert "teacher (admin)" in pages.get("/hub/admin", status=200).text.replace("</b>", "").replace("</a>", "")


def test_there_is_one_first_admin_only(first_link):
    hub, link = first_link
    form = browser(hub).get(link).form
    submit_password(browser(hub), link, username="teacher")
    form["username"], form["password"], form["again"] = "eve", "a new password", "a new password"
    message = "This link has been used already. Sign in, or ask an admin for a link of your own"
    assert alert_of(form.submit(status=403)) == [message]
    with hub.connected():
        assert hub.get_user("eve") is None


@pytest.mark.parametrize("name, message", [("a/b", "Invalid username: a/b"), ("", "Invalid username: ")])
def test_a_first_admin_without_a_proper_name_is_asked_again(first_link, name, message):
    hub, link = first_link
    response = submit_password(browser(hub), link, username=name, status=400)
    assert alert_of(response) == [message.strip()] or alert_of(response) == [message]
    assert response.form["username"].value == name
    with hub.connected():
        assert not hub.has_admin() and not hub.list_users()


# Forms prove that they come from the hub's own pages

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
    pages = browser(class_at_work, "root")
    before = facts_of(class_at_work)
    pages.post(path, {"_xsrf": xsrf_of(pages), **fields}, status=(200, 302, 303))
    assert facts_of(class_at_work) != before


@pytest.mark.parametrize("path, fields", [*FORMS, ("/hub/admin/link/ada", {})])
@pytest.mark.parametrize("forge", [lambda hub, pages: {}, lambda hub, pages: {"_xsrf": "0" * 64}, lambda hub, pages: {"_xsrf": "é"},
                                   lambda hub, pages: {"_xsrf": xsrf_of(browser(hub, "ada"))}],
                         ids=["none", "wrong", "no ascii", "another user's"])
def test_a_form_of_another_site_changes_nothing(class_at_work, forge, path, fields):
    pages = browser(class_at_work, "root")
    fields, before = {**fields, **forge(class_at_work, pages)}, facts_of(class_at_work)
    response = pages.post(path, fields, status=403)
    assert "Go back, reload it and try again" in alert_of(response)[0]
    assert facts_of(class_at_work) == before


def test_a_forms_token_ends_with_the_session(hub):
    pages = browser(hub, "ada")
    token = xsrf_of(pages)
    pages.get("/hub/logout")
    sign_in(pages, "ada")
    pages.post("/hub/spawn/ada", {"_xsrf": token}, status=403)


# Home, and the way into a server

@pytest.mark.parametrize("status, words, buttons", [
    ("stopped", "not running", ["Start"]), ("spawning", "starting", ["Watch", "Stop"]),
    ("ready", "running", ["Open", "Stop"]), ("stopping", "stopping", [])])
def test_home_offers_what_can_be_done_to_a_server(make_hub, spawner, status, words, buttons):
    hub = people(make_hub(named_servers=False))
    pages, spawner.answers, spawner.stubborn = browser(hub, "ada"), status != "spawning", True
    if status != "stopped":
        pages.get("/hub/home").form.submit(status=303)
    if status == "stopping":
        pages.get("/hub/home").form.submit(status=303)
    response = pages.get("/hub/home", status=200)
    assert response.html.select_one(".state").text == words
    assert buttons_of(response) == buttons
    assert server_row(hub, "ada").status == status


def test_home_looks_again_while_a_server_is_stopping(hub, spawner):
    pages, spawner.stubborn = browser(hub, "ada"), True
    pages.post("/hub/spawn/ada", {"_xsrf": xsrf_of(pages)}, status=303).follow()
    assert "Refresh" not in pages.get("/hub/home").headers
    pages.post("/hub/stop/ada", {"_xsrf": xsrf_of(pages)}, status=303)
    assert pages.get("/hub/home").headers["Refresh"] == "2"


def test_start_leads_through_the_waiting_page_into_the_server(hub, spawner):
    pages, spawner.answers = browser(hub, "ada"), False
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
    pages, spawner.answers = browser(hub, "ada"), False
    waiting = pages.get("/hub/spawn/ada").form.submit(status=303).follow(status=200)
    stopped = waiting.form.submit(status=303)
    assert stopped.headers["Location"] == "/hub/home"
    assert buttons_of(stopped.follow(status=200))[0] == "Start"
    assert server_row(hub, "ada").status == "stopped"


def test_following_a_link_starts_nothing(hub):
    response = browser(hub, "ada").get("/hub/spawn", status=200)
    assert buttons_of(response) == ["Start"]
    assert server_row(hub, "ada").status == "stopped"


@pytest.mark.parametrize("answers, location", [(True, "/user/ada/"), (False, "/hub/spawn-pending/ada")])
def test_the_start_page_of_a_started_server_leads_on(hub, spawner, answers, location):
    pages, spawner.answers = browser(hub, "ada"), answers
    pages.get("/hub/spawn/ada").form.submit(status=303).follow()
    assert pages.get("/hub/spawn", status=302).headers["Location"] == location


def test_a_failed_start_shows_the_last_lines_of_its_log(hub, spawner):
    pages, spawner.exits_at_once = browser(hub, "ada"), 3
    response = pages.get("/hub/spawn/ada").form.submit(status=303).follow(status=200)
    assert response.html.h1.text == "Your server has failed"
    assert alert_of(response)[0].startswith("The server ended while it started [status=3]")
    assert response.html.pre.text == "Traceback\nImportError: no module named antigravity"
    assert buttons_of(response) == ["Start"]
    assert pages.get("/hub/home").html.pre.text == response.html.pre.text


def test_the_page_tells_which_of_several_servers_has_failed(hub, spawner):
    pages, spawner.exits_at_once = browser(hub, "ada"), 3
    start_named(pages, "project").follow()
    assert alert_of(pages.get("/hub/home"))[0].startswith("project: The server ended while it started [status=3]")


def test_the_log_on_the_page_cannot_be_html(hub, spawner, monkeypatch):
    monkeypatch.setattr(spawner, "log_tail", lambda state: "<script>alert(1)</script>")
    pages, spawner.exits_at_once = browser(hub, "ada"), 1
    response = pages.get("/hub/spawn/ada").form.submit(status=303).follow(status=200)
    assert response.html.pre.text == "<script>alert(1)</script>"
    assert response.html.script is None


def test_a_spawner_that_fails_says_so_on_the_page(hub, spawner):
    pages, spawner.problem = browser(hub, "ada"), RuntimeError("no more room")
    response = pages.get("/hub/spawn/ada").form.submit(status=303).follow(status=200)
    assert alert_of(response) == ["RuntimeError: no more room"]


def test_a_waiting_page_without_a_start_says_so(hub):
    response = browser(hub, "ada").get("/hub/spawn-pending/ada", status=200)
    assert response.html.h1.text == "Your server is not running"
    assert buttons_of(response) == ["Start"]


def start_named(pages, name, status=303):
    """The response to home's form for another server."""
    form = next(form for form in pages.get("/hub/home").forms.values() if "server_name" in form.fields)
    form["server_name"] = name
    return form.submit(status=status)


def test_another_server_is_started_by_name(hub):
    pages = browser(hub, "ada")
    response = start_named(pages, "project")
    assert response.headers["Location"] == "/hub/spawn-pending/ada/project"
    assert response.follow(status=302).headers["Location"] == "/user/ada/project/"
    assert server_row(hub, "ada").status == "stopped"


@pytest.mark.parametrize("name", ["a b", "../x", "lab", "é", "<b>", "x" * 64])
def test_a_server_name_that_cannot_be_is_refused(hub, name):
    assert alert_of(start_named(browser(hub, "ada"), name, status=400))[0].startswith("Invalid server_name")
    assert server_row(hub, "ada", name) is None


def test_the_limit_of_servers_is_explained(make_hub):
    hub = people(make_hub(named_server_limit=1))
    pages = browser(hub, "ada")
    start_named(pages, "one")
    assert "already has the maximum of 1 named servers" in alert_of(start_named(pages, "two", status=400))[0]


def test_without_named_servers_there_is_no_form_for_them(make_hub):
    hub = people(make_hub(named_servers=False))
    pages = browser(hub, "ada")
    assert "server_name" not in pages.get("/hub/home").text
    response = pages.post("/hub/spawn/ada", {"_xsrf": xsrf_of(pages), "server_name": "two"}, status=400)
    assert alert_of(response) == ["Named servers are not enabled."]


def test_a_named_server_can_be_deleted_when_it_is_stopped(hub):
    pages = browser(hub, "ada")
    start_named(pages, "project").follow()
    pages.post("/hub/stop/ada/project", {"_xsrf": xsrf_of(pages)}, status=303)
    assert "Delete" in buttons_of(pages.get("/hub/home"))
    pages.post("/hub/delete/ada/project", {"_xsrf": xsrf_of(pages)}, status=303)
    assert server_row(hub, "ada", "project") is None


def test_a_named_server_is_deleted_once_it_has_stopped(hub, spawner):
    pages, spawner.stubborn = browser(hub, "ada"), True
    start_named(pages, "project").follow()
    pages.post("/hub/delete/ada/project", {"_xsrf": xsrf_of(pages)}, status=303)
    assert server_row(hub, "ada", "project").status == "stopping"
    spawner.end_all()
    pages.get("/hub/home", status=200)
    assert "project" not in pages.get("/hub/home", status=200).html.main.section.text


def test_the_default_server_cannot_be_deleted(hub):
    pages = browser(hub, "ada")
    pages.post("/hub/delete/ada", {"_xsrf": xsrf_of(pages)}, status=404)
    pages.post("/hub/delete/ada/", {"_xsrf": xsrf_of(pages)}, status=404)
    assert server_row(hub, "ada")


@pytest.mark.parametrize("method, path", [("GET", "/hub/spawn/ada"), ("GET", "/hub/spawn/ada/new"), ("GET", "/hub/spawn-pending/ada"),
                                          ("POST", "/hub/spawn/ada"), ("POST", "/hub/stop/ada"), ("POST", "/hub/delete/ada/x"),
                                          ("GET", "/hub/spawn/nobody"), ("POST", "/hub/spawn/nobody")])
def test_a_student_gets_to_no_page_of_another(hub, method, path):
    pages = browser(hub, "bob")
    response = pages.request(path, method=method, POST={"_xsrf": xsrf_of(pages)} if method == "POST" else None, status=403)
    assert alert_of(response) == ["This page belongs to somebody else"]
    assert server_row(hub, "ada").status == "stopped" and server_row(hub, "ada", "new") is None


def test_an_admin_starts_and_stops_a_students_server(hub):
    pages = browser(hub, "root")
    response = pages.get("/hub/spawn/ada", status=200)
    assert "ada" in response.html.h1.text
    assert response.form.submit(status=303).follow(status=302).headers["Location"] == "/user/ada/"
    stopped = pages.post("/hub/stop/ada", {"_xsrf": xsrf_of(pages)}, status=303)
    assert stopped.headers["Location"] == "/hub/admin"
    assert "/hub/stop/ada" not in stopped.follow(status=200).text
    assert server_row(hub, "ada").status == "stopped"


def test_an_admin_is_told_of_a_user_who_does_not_exist(hub):
    assert alert_of(browser(hub, "root").get("/hub/spawn/eve", status=404)) == ["No such user: eve"]


# The address of a server that does not run

def test_the_address_of_a_stopped_server_offers_to_start_it(hub):
    response = browser(hub, "ada").get("/user/ada/lab?x=1", status=302)
    assert response.headers["Location"] == "/hub/user/ada/lab?x=1"
    page = response.follow(status=503)
    assert page.html.h1.text == "Your server is not running"
    assert buttons_of(page) == ["Start"]
    started = page.form.submit(status=303)
    assert started.follow(status=302).headers["Location"] == "/user/ada/lab?x=1"


def test_the_address_of_anothers_stopped_server_leads_to_ones_own(hub):
    assert browser(hub, "bob").get("/hub/user/ada/lab", status=302).headers["Location"] == "/user/bob/lab"


def test_the_address_of_a_stopped_server_lets_an_admin_start_it(hub):
    response = browser(hub, "root").get("/hub/user/ada/lab", status=503)
    assert "ada" in response.html.h1.text
    assert urlsplit(response.form.action).path == "/hub/spawn/ada"


def test_the_address_of_a_server_that_runs_leads_back_to_it(hub):
    pages = browser(hub, "ada")
    pages.get("/hub/spawn/ada").form.submit(status=303).follow()
    assert pages.get("/hub/user/ada/lab/a%20b?x=1", status=302).headers["Location"] == "/user/ada/lab/a%20b?x=1"


@pytest.mark.parametrize("method, path, accept", [("GET", "/user/ada/api/contents", "*/*"), ("POST", "/user/ada/lab", "text/html"),
                                                  ("GET", "/user/ada/lab", "application/json"), ("GET", "/user/eve/api", "*/*")])
def test_programs_are_told_that_a_server_does_not_run(hub, method, path, accept):
    response = browser(hub).request(path, method=method, headers={"Accept": accept}, status=503)
    name = path.split("/")[2]
    assert response.json == {"status": 503, "message": f"JupyterHub server no longer running at {path}. Restart the server at"
                                                       f" /hub/spawn/{name}"}


def test_a_link_for_everybody_leads_to_ones_own_server(hub):
    response = browser(hub, "ada").get("/hub/user-redirect/lab/tree/a%20b.ipynb?x=1", status=302)
    assert response.headers["Location"] == "/user/ada/lab/tree/a%20b.ipynb?x=1"


# Tokens

def test_the_token_page_makes_a_token_that_works_and_shows_it_once(hub):
    pages = browser(hub, "ada")
    form = pages.get("/hub/token").form
    form["note"] = "grading"
    response = form.submit(status=200)
    token = response.html.code.text
    assert Api(hub, token)("GET", "/user").json["name"] == "ada"
    page = pages.get("/hub/token")
    assert "grading" in page.text and token not in page.text


def test_the_token_page_revokes_a_token(hub):
    pages, token = browser(hub, "ada"), token_for(hub, "ada")
    response = pages.get("/hub/token").forms[1].submit("revoke", status=303)
    assert response.headers["Location"] == "/hub/token"
    Api(hub, token)("GET", "/user", status=403)


def test_the_token_page_revokes_nobody_elses_token(hub, root):
    pages = browser(hub, "ada")
    pages.post("/hub/token", {"_xsrf": xsrf_of(pages), "revoke": "a1"}, status=404)
    root("GET", "/user")


def test_the_token_a_server_runs_with_is_not_on_the_page(hub):
    pages = browser(hub, "ada")
    pages.get("/hub/spawn/ada").form.submit(status=303).follow()
    assert buttons_of(pages.get("/hub/token")) == ["Make a token"]


# People

def add_people(pages, names, status=200):
    """The response to the form of the People page."""
    form = form_to(pages.get("/hub/admin"), "/hub/admin")
    form["names"] = names
    return form.submit(status=status)


def test_people_are_added_and_each_gets_a_link(hub):
    response = add_people(browser(hub, "root"), "Carla\n\n  Dan \nADA\n")
    rows = response.html.select("[role=status] .row")
    assert "Here already: ada" in response.html.select_one("[role=status]").text
    assert [row.b.text for row in rows] == ["carla", "dan"]
    submit_password(browser(hub), urlsplit(rows[0].code.text).path)
    assert sign_in(browser(hub), "carla", "a new password").headers["Location"] == "/hub/home"


@pytest.mark.parametrize("settings, site", [({}, "http://class.example:8080"),
                                            ({"public_url": "https://hub.example"}, "https://hub.example")])
def test_links_on_the_people_page_lead_to_where_the_teachers_browser_is(make_hub, settings, site):
    pages = browser(people(make_hub(**settings)), "root", HTTP_HOST="class.example:8080")
    assert add_people(pages, "carla").html.code.text.startswith(f"{site}/hub/link/")


@pytest.mark.parametrize("names, status, message", [
    ("carla\na/b\n..\n", 400, "Invalid usernames: a/b, .."), ("ada\nBOB", 409, "All 2 users already exist"),
    (" \n", 400, "Write at least one name")])
def test_people_who_cannot_be_added_stay_in_the_form(hub, names, status, message):
    response = add_people(browser(hub, "root"), names, status)
    assert alert_of(response) == [message]
    assert form_to(response, "/hub/admin")["names"].value.split() == names.split()
    with hub.connected():
        assert [user.name for user in hub.list_users()] == ["root", "ada", "bob"]


def test_a_lost_password_is_replaced_through_a_new_link(hub):
    pages = browser(hub, "root")
    response = form_to(pages.get("/hub/admin"), "/hub/admin/link/ada").submit(status=200)
    submit_password(browser(hub), urlsplit(response.html.code.text).path)
    assert sign_in(browser(hub), "ada", "a new password").headers["Location"] == "/hub/home"


def test_the_people_page_shows_the_servers_that_run(hub):
    browser(hub, "ada").get("/hub/spawn/ada").form.submit(status=303).follow()
    pages = browser(hub, "root")
    assert [form.action for form in pages.get("/hub/admin").forms.values()] == [
        "/hub/admin", "/hub/admin/link/root", "/hub/admin/link/ada", "/hub/stop/ada", "/hub/admin/link/bob"]


@pytest.mark.parametrize("method, path", [("GET", "/hub/admin"), ("POST", "/hub/admin"), ("POST", "/hub/admin/link/root"),
                                          ("POST", "/hub/admin/link/ada")])
def test_the_people_page_is_for_admins(hub, method, path):
    pages = browser(hub, "ada")
    form = {"_xsrf": xsrf_of(pages), "names": "eve"} if method == "POST" else None
    assert alert_of(pages.request(path, method=method, POST=form, status=403)) == ["This page is for admins"]
    assert "/hub/admin" not in pages.get("/hub/home").text
    with hub.connected():
        assert hub.get_user("eve") is None


# All pages

@pytest.mark.parametrize("path, status, location", [("/", 302, "/hub/"), ("/hub", 301, "/hub/"), ("/hub/", 302, "/hub/login")])
def test_the_root_leads_to_the_hub(hub, path, status, location):
    assert browser(hub).get(path, status=status).headers["Location"] == location


def test_the_root_leads_home_who_is_signed_in(hub):
    assert browser(hub, "ada").get("/hub/", status=302).headers["Location"] == "/hub/home"


def test_health_is_an_empty_answer(hub):
    assert browser(hub).get("/hub/health", status=200).text == ""


def test_health_fails_with_the_database(hub, monkeypatch):
    monkeypatch.setattr(hub, "check_health", lambda: hub.database.execute_sql("SELECT 1 FROM nowhere"))
    assert "database does not answer" in browser(hub).get("/hub/health", status=503).text


def test_the_logo_is_a_picture(hub):
    assert browser(hub).get("/hub/logo", status=200).content_type == "image/svg+xml"


def test_browsers_may_report_what_a_policy_has_blocked(hub):
    browser(hub).post("/hub/security/csp-report", b"{}", content_type="application/csp-report", status=204)


def test_a_page_that_does_not_exist_says_so_and_leads_home(hub):
    response = browser(hub, "ada").get("/hub/nowhere", status=404)
    assert alert_of(response) == ["There is no page at this address"]
    assert response.html.main.a["href"] == "/hub/home"


def test_a_failing_page_shows_nothing_of_what_is_inside(hub, monkeypatch):
    def fail(user):
        raise RuntimeError("a secret")

    pages = browser(hub, "ada")
    monkeypatch.setattr(hub, "servers_of", fail)
    response = pages.get("/hub/home", status=500)
    assert alert_of(response) == ["Internal Server Error"] and "a secret" not in response.text


ALL_PAGES = ["/hub/login", "/hub/home", "/hub/spawn/ada", "/hub/spawn-pending/ada", "/hub/spawn-pending/bob", "/hub/token", "/hub/admin",
             "/hub/user/ada/lab", "/hub/nowhere", AUTHORIZE, "link"]


@pytest.fixture(params=ALL_PAGES)
def any_page(request, class_at_work, spawner):
    """Each of the pages as the admin sees it, of a hub mounted at /lab."""
    hub, spawner.answers = class_at_work, False
    pages = browser(hub, SCRIPT_NAME="/lab")
    path = link_of(hub, "ada") if request.param == "link" else request.param
    if path.startswith("/hub/link") or path.endswith("/login"):
        return pages.get(f"/lab{path}", status=200)
    sign_in(pages, "root", url="/lab/hub/login")
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
    pages = browser(hub, "root")
    add_people(pages, '<img src=x>"\'&')
    page = pages.get("/hub/admin")
    assert [b.text for b in page.html.select(".card .row b")][-1] == '<img src=x>"\'&'
    assert page.html.img is None
    assert pages.get(f"/hub/spawn/{quote('<img src=x>')}%22'&", status=200).html.img is None


# The real thing: Chromium, gunicorn with one sync worker, and JupyterLab

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
