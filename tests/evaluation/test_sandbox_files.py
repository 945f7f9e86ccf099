"""Programs that try to read and write what is not theirs, at every level that isolates."""

import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from attacking import ISOLATING, attack, sandbox_or_skip, zygotes

from branchmerge.evaluation.sandbox import Sandbox, isolation

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", params=ISOLATING)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with sandbox_or_skip(request.param) as made:
        yield made


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder in which everybody may do everything, so that only the sandbox stands in the way."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as made:
        Path(made).chmod(0o777)
        yield Path(made)


READ = """
def read(path):
    try:
        with open(path, 'rb') as file:
            print(len(file.read()), path)
    except OSError:
        pass
"""


@pytest.mark.parametrize("path", ["/etc/passwd", "/etc/hostname", "/proc/self/environ", "/proc/cpuinfo", "/dev/mem"])
def test_files_of_the_system_cannot_be_read(sandbox: Sandbox, path: str) -> None:
    outcome = attack(sandbox, f"{READ}\nread({path!r})")
    assert (outcome.status, outcome.stdout) == ("ok", b"")


def test_environment_and_memory_of_others_cannot_be_read(sandbox: Sandbox) -> None:
    pids = [os.getpid(), os.getppid(), *zygotes()]
    assert Path(f"/proc/{os.getpid()}/environ").read_bytes()
    code = f"""
{READ}
import os
for pid in [*{pids}, os.getppid(), os.getpid(), 1, 2, 3, 'self', 'thread-self']:
    for name in ('environ', 'mem', 'maps', 'cmdline', 'root/etc/passwd', 'cwd/pyproject.toml'):
        read(f'/proc/{{pid}}/{{name}}')
for pid in [*{pids}, os.getppid(), 1]:
    for number in range(40):
        read(f'/proc/{{pid}}/fd/{{number}}')
"""
    outcome = attack(sandbox, code)
    assert (outcome.status, outcome.stdout) == ("ok", b"")


@pytest.mark.parametrize("write", ["open(path, 'w').write('x')", "os.mkdir(path)", "os.symlink('/', path)"])
def test_nothing_is_written_outside_the_folder(sandbox: Sandbox, open_folder: Path, write: str) -> None:
    name = f"left-{secrets.token_hex(4)}"
    places = ["/", "/tmp", "/var/tmp", "/dev/shm", "/dev", "..", "/usr/lib", sys.base_prefix + "/lib", *sys.path]
    places += [str(open_folder), str(Path.home())]
    code = f"""
import os
for place in {places}:
    path = place + '/{name}'
    try:
        {write}
        print(path)
    except OSError:
        pass
"""
    outcome = attack(sandbox, code)
    assert (outcome.status, outcome.stdout) == ("ok", b"")
    assert not [place for place in places if os.path.lexists(f"{place}/{name}")]


def state(file: Path) -> tuple[object, ...]:
    status = file.stat()
    return file.read_bytes(), status.st_mode, status.st_uid, status.st_nlink, status.st_mtime_ns, os.listxattr(file)


@pytest.mark.parametrize(
    "change",
    [
        "os.open(path, os.O_RDONLY | os.O_TRUNC)",
        "os.truncate(path, 0)",
        "open(path, 'a').write('x')",
        "os.remove(path)",
        "os.rename(path, 'mine')",
        "os.link(path, 'mine') or open('mine', 'w').write('x')",
        "os.symlink(path, 'mine') or open('mine', 'w').write('x')",
        "os.chmod(path, 0)",
        "os.chmod(path, 0o4777)",
        "os.utime(path, (0, 0))",
        "os.setxattr(path, 'user.x', b'y')",
        "shutil.rmtree(os.path.dirname(path))",
    ],
)
def test_file_of_the_user_stays_as_it_is(sandbox: Sandbox, open_folder: Path, change: str) -> None:
    file = open_folder / "file"
    file.write_text("precious")
    file.chmod(0o666)
    before = state(file)
    attack(sandbox, f"import os, shutil\npath = {str(file)!r}\n{change}")
    assert state(file) == before


def test_packages_stay_as_they_are(sandbox: Sandbox) -> None:
    target = Path(psutil.__file__)
    before = state(target)
    code = f"""
import os
for attempt in (lambda p: os.open(p, os.O_RDONLY | os.O_TRUNC), lambda p: os.chmod(p, 0), lambda p: os.utime(p, (0, 0)),
                lambda p: os.truncate(p, 0), lambda p: os.fchmod(os.open(p, os.O_RDONLY), 0)):
    try:
        attempt({str(target)!r})
        print('done')
    except OSError:
        pass
"""
    assert attack(sandbox, code).stdout == b""
    assert state(target) == before


def test_links_in_the_folder_lead_nowhere(sandbox: Sandbox, open_folder: Path) -> None:
    (open_folder / "file").write_text("secret")
    code = f"""
import os
targets = ['/etc/passwd', {str(open_folder)!r}, {str(open_folder / "file")!r}, '/proc/self/environ', '..']
for number, target in enumerate(targets):
    for link in (os.symlink, os.link):
        try:
            link(target, f'{{link.__name__}}{{number}}')
        except OSError:
            pass
for name in os.listdir():
    try:
        print(open(name).read() if not os.path.isdir(name) else os.listdir(name))
    except OSError:
        pass
print('end', os.getcwd())
"""
    outcome = attack(sandbox, code)
    assert outcome.status == "ok"
    assert b"secret" not in outcome.stdout
    assert b"root:" not in outcome.stdout
    assert (open_folder / "file").read_text() == "secret"
    assert not Path(outcome.stdout.split()[-1].decode()).exists()


def test_expected_output_is_nowhere(sandbox: Sandbox, open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = secrets.token_hex(8)
    monkeypatch.setenv("EXPECTED", secret)
    (open_folder / "expected.txt").write_text(secret)
    libraries = ("/usr/lib", "/lib", sys.base_prefix, "/usr/share/zoneinfo", str(Path(isolation.__file__).parent))
    libraries += tuple(path for path in sys.path if "site-packages" in path)
    code = f"""
import os
print(dict(os.environ))
for number in range(256):
    try:
        print(os.read(number, 1 << 20)) if number != 1 and number != 2 else None
    except OSError:
        pass
for folder, folders, files in os.walk('/'):
    folders[:] = [name for name in folders if not os.path.join(folder, name).startswith({libraries})]
    for name in files:
        path = os.path.join(folder, name)
        try:
            if os.path.isfile(path):
                print(open(path, 'rb').read())
        except OSError:
            pass
for path in ({str(open_folder / "expected.txt")!r}, {str(ROOT / "pyproject.toml")!r}):
    try:
        print(open(path, 'rb').read())
    except OSError:
        pass
"""
    with (open_folder / "expected.txt").open() as held:
        held.fileno()
        outcome = attack(sandbox, code)
    assert outcome.status == "ok"
    assert secret.encode() not in outcome.stdout
    assert b"[project]" not in outcome.stdout


def test_unix_sockets_are_out_of_reach(sandbox: Sandbox, open_folder: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(open_folder / "socket"))
        (open_folder / "socket").chmod(0o777)
        server.setblocking(False)
        code = f"""
import socket
for make in (lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
             lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0],
             lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)[0]):
    try:
        make().sendto(b'hello', {str(open_folder / "socket")!r})
        print('sent')
    except OSError:
        pass
"""
        assert attack(sandbox, code).stdout == b""
        with pytest.raises(BlockingIOError):
            server.recv(10)
