"""Hostile programs, run in a sandbox's container as its own user. Prints one JSON object: probe -> what it got.

A probe that gets what it wants returns words about it; one that is refused returns None or raises. Standard library.
"""

import contextlib
import ctypes
import json
import mmap
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

PROBES = {}
LIBC = ctypes.CDLL(None, use_errno=True)
COMMANDS = {
    int(pid): pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    for pid in os.listdir("/proc")
    if pid.isdigit()
}
SERVER = next(pid for pid, words in COMMANDS.items() if words[0].endswith(b"/python") and b"backends.server" in words)


def text(path):
    return pathlib.Path(path).read_text(encoding="utf-8")


def write(path, content):
    pathlib.Path(path).write_text(content, encoding="utf-8")


def probe(function):
    PROBES[function.__name__] = function
    return function


def system(number, *arguments):
    """A system call that ought to be refused."""
    if LIBC.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return f"system call {number} was let through"


def reach(family, address, request=b""):
    with socket.socket(family) as connection:
        connection.settimeout(2)
        connection.connect(address)
        if request:
            connection.sendall(request)
            return f"{address} answers {connection.recv(100)!r}"
        return f"{address} lets in"


# The host
@probe
def host_files():
    names = ("/host", "/mnt", "/media", "/home", "/root/.pyenv", "/var/lib/docker", "/etc/shadow-host")
    return [path for path in names if pathlib.Path(path).exists() and os.listdir(path)] or None


@probe
def host_root_by_proc():
    return os.listdir("/proc/1/root/var/lib/docker")


@probe
def host_processes():
    others = [pid for pid in os.listdir("/proc") if pid.isdigit() and int(pid) > 1]
    commands = {pathlib.Path(f"/proc/{pid}/cmdline").read_bytes() for pid in others if os.path.exists(f"/proc/{pid}")}
    return [command.decode() for command in commands if b"dockerd" in command or b"containerd" in command] or None


@probe
def mount_a_disk():
    if LIBC.mount(b"none", b"/tmp", b"tmpfs", 0, None) < 0:
        raise OSError(ctypes.get_errno(), "mount")
    return "mounted"


@probe
def remount_root_writable():
    if LIBC.mount(None, b"/", None, 32 | 4096, None) < 0:
        raise OSError(ctypes.get_errno(), "remount")
    return "remounted"


@probe
def new_user_namespace():
    if LIBC.unshare(0x10000000 | 0x00020000) < 0:
        raise OSError(ctypes.get_errno(), "unshare")
    return "a namespace of its own"


@probe
def join_a_namespace():
    with open("/proc/1/ns/net", "rb") as namespace:
        if LIBC.setns(namespace.fileno(), 0) < 0:
            raise OSError(ctypes.get_errno(), "setns")
    return "joined"


@probe
def make_a_device():
    os.mknod("/tmp/sda", 0o600 | 0o060000, os.makedev(254, 0))
    with open("/tmp/sda", "rb") as disk:
        return f"the host's disk begins with {disk.read(16)!r}"


@probe
def raw_disk():
    with open("/dev/vda", "rb") as disk:
        return disk.read(16).hex()


@probe
def kernel_memory():
    with open("/dev/mem", "rb") as memory:
        return memory.read(16).hex()


@probe
def kernel_settings():
    write("/proc/sys/kernel/core_pattern", "|/tmp/x")
    return "core_pattern is ours"


@probe
def sysrq():
    write("/proc/sysrq-trigger", "h")
    return "sysrq"


@probe
def control_group():
    bounds = {"memory.limit_in_bytes", "memory.max", "pids.max", "release_agent"}
    paths = [path for path in pathlib.Path("/sys/fs/cgroup").rglob("*") if path.name in bounds]
    found = [str(path) for path in paths if os.access(path, os.W_OK)]
    return found or None


@probe
def bpf():
    return system(321, 0, 0, 0)


@probe
def keyctl():
    return system(250, 0, -3, 0)


@probe
def performance_counters():
    return system(298, 0, 0, -1, -1, 0)


@probe
def load_a_module():
    return system(313, 0, b"", 0)


@probe
def reboot():
    return system(169, 0xFEE1DEAD, 672274793, 0)


@probe
def set_the_clock():
    time.clock_settime(time.CLOCK_REALTIME, time.time())
    return "the clock is ours"


# Privileges
@probe
def become_root():
    os.setuid(0)
    return "root"


@probe
def capabilities():
    status = text("/proc/self/status")
    held = {line.split()[0]: int(line.split()[1], 16) for line in status.splitlines() if line.startswith("Cap")}
    return {name: hex(value) for name, value in held.items() if value} or None


@probe
def new_privileges():
    status = text("/proc/self/status")
    return None if "NoNewPrivs:\t1" in status else "privileges may be gained by exec"


@probe
def setuid_program():
    with open("/tmp/sh", "wb") as program:
        program.write(pathlib.Path(sys.executable).read_bytes())
    os.chmod("/tmp/sh", 0o4755)
    done = subprocess.run(["/tmp/sh", "-c", "import os; print(os.geteuid())"], capture_output=True, text=True)
    return done.stdout.strip() or None


# Network
@probe
def internet():
    return reach(socket.AF_INET, ("1.1.1.1", 53))


@probe
def metadata_address():
    return reach(socket.AF_INET, ("169.254.169.254", 80), b"GET / HTTP/1.0\r\n\r\n")


@probe
def bridge():
    return reach(socket.AF_INET, ("172.17.0.1", 22))


@probe
def names():
    return socket.getaddrinfo("example.com", 80)[0][4]


@probe
def interfaces():
    return [name for _, name in socket.if_nameindex() if name not in {"lo", "tunl0", "sit0", "ip6tnl0"}] or None


@probe
def raw_socket():
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()
    return "packets"


@probe
def abstract_sockets():
    return [line for line in text("/proc/net/unix").splitlines() if "@" in line and "containerd" in line] or None


# The wire, the daemon, siblings
@probe
def docker_socket():
    for path in ("/var/run/docker.sock", "/run/docker.sock", "/run/containerd/containerd.sock"):
        with contextlib.suppress(OSError):
            return reach(socket.AF_UNIX, path, b"GET /containers/json HTTP/1.0\r\n\r\n")
    return None


@probe
def wire_socket():
    return reach(socket.AF_UNIX, "/run/rollout/orchestrator", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")


@probe
def write_to_the_mount():
    write("/run/rollout/x", "x")
    return "written"


@probe
def siblings_sockets():
    return [name for name in os.listdir("/run/rollout/..") if name not in {"rollout", "lock"}] or None


@probe
def token_of_the_server():
    found = []
    for name in ("environ", "cmdline"):
        with contextlib.suppress(OSError):
            found += [name] if b"oken" in pathlib.Path(f"/proc/{SERVER}/{name}").read_bytes() else []
    return found or None


@probe
def memory_of_the_server():
    with open(f"/proc/{SERVER}/mem", "rb") as memory, open(f"/proc/{SERVER}/maps", "rb") as maps:
        memory.seek(int(maps.readline().split(b"-")[0], 16))
        return memory.read(16).hex()


@probe
def trace_the_server():
    if LIBC.ptrace(16, SERVER, 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "ptrace")
    LIBC.ptrace(17, SERVER, 0, 0)
    return "attached"


@probe
def files_of_the_server():
    return [os.readlink(f"/proc/{SERVER}/fd/{name}") for name in os.listdir(f"/proc/{SERVER}/fd")]


# The grader and the truth
@probe
def change_the_grader():
    for path in pathlib.Path("/opt/rollout/stage").rglob("*.py"):
        write(path, "")
        return str(path)


@probe
def change_the_bytecode():
    for path in pathlib.Path("/opt/rollout/bytecode").rglob("*.pyc"):
        path.write_bytes(b"")
        return str(path)


@probe
def plant_a_module():
    for folder in ("/opt/rollout/stage", "/opt/rollout/venv/lib", "/usr/local/lib", "/etc", "/usr/local/bin"):
        with contextlib.suppress(OSError):
            write(f"{folder}/sitecustomize.py", "")
            return folder
    return None


# Resources
@probe
def fill_the_disk():
    written = 0
    try:
        for folder in ("/tmp", "/dev/shm", "/var/tmp", "/run", "/"):
            with contextlib.suppress(OSError), open(f"{folder}/ballast", "wb") as ballast:
                while written < 512 << 20:
                    written += ballast.write(b"x" * (1 << 20))
    finally:
        for folder in ("/tmp", "/dev/shm"):
            pathlib.Path(folder, "ballast").unlink(missing_ok=True)
    return f"{written >> 20} MiB" if written > 128 << 20 else None


@probe
def fork_bomb():
    children = []
    try:
        for _ in range(5000):
            child = os.fork()
            if child == 0:
                time.sleep(30)
                os._exit(0)
            children.append(child)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return f"{len(children)} processes"


@probe
def thread_bomb():
    done = threading.Event()
    threads = []
    try:
        for _ in range(5000):
            threads.append(threading.Thread(target=done.wait))
            threads[-1].start()
    finally:
        done.set()
    return f"{len(threads)} threads"


@probe
def open_files():
    held = []
    try:
        held.extend(os.open("/dev/null", os.O_RDONLY) for _ in range(5000))
    finally:
        for number in held:
            os.close(number)
    return f"{len(held)} files"


@probe
def raise_limits():
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (1 << 20, 1 << 20))
    return "limits are ours"


@probe
def memory_beyond_the_bound():
    child = os.fork()
    if child == 0:
        with contextlib.suppress(MemoryError):
            held = mmap.mmap(-1, 3 << 30)
            for offset in range(0, 3 << 30, 4096):
                held[offset] = 1
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    return "3 GiB" if status == 0 else None


def attempt(function):
    try:
        return function()
    except (OSError, RuntimeError, MemoryError, ValueError):
        return None


sys.stdout.write(json.dumps({name: attempt(function) for name, function in PROBES.items()}, default=str) + "\n")
