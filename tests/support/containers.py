"""Containers for tests, on a machine with no daemon and no registry.

A base image from Debian's packages, the project's image from the Dockerfile, and hardened runs of it. Settings of a
machine (package mirrors, pip settings, certificates) are read from that machine and mounted during a build. An image
contains none of them.

Needs root and the programs in `TOOLS`: `missing_tools` states what is missing. A command that fails raises
CommandFailed, and one that takes too long `subprocess.TimeoutExpired`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

ROOT = Path(__file__).parents[2]
TOOLS = ("buildah", "debootstrap", "podman", "prometheus", "promtool", "runc")
SUITE = "bookworm"
# Packages of the base image beside Debian's minimum: Python 3.11 with venv, and the certificates' folder to mount over.
BASE_PACKAGES = ("ca-certificates", "python3", "python3-venv")

CONTAINERS_CONF = """\
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=20000:20000"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
STORAGE_CONF = """\
[storage]
driver = "overlay"
graphroot = "{root}/storage"
runroot = "{root}/run"
"""


def missing_tools() -> str:
    """Return why these tests cannot run, with the command that installs the missing tools; empty if they can run."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if not missing and os.geteuid() == 0:
        return ""
    if os.geteuid() != 0:
        return "debootstrap and the container tools as they are set up here need root"
    packages = (ROOT / "deploy/ci-packages.txt").read_text().split()
    return f"{', '.join(missing)} not found; apt-get install -y --no-install-recommends {shlex.join(packages)}"


class CommandFailed(AssertionError):
    """A command ended with an error; the message contains the end of its output."""


@dataclass(frozen=True)
class Engine:
    """buildah and podman with separate settings and storage, under one folder."""

    root: Path

    @classmethod
    def at(cls, root: Path) -> Engine:
        """The engine whose settings and images lie in `root`."""
        root.mkdir(parents=True, exist_ok=True)
        (root / "containers.conf").write_text(CONTAINERS_CONF)
        (root / "storage.conf").write_text(STORAGE_CONF.format(root=root))
        return cls(root)

    @property
    def env(self) -> dict[str, str]:
        """The environment that makes the tools use these settings."""
        return os.environ | {
            "CONTAINERS_CONF": str(self.root / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(self.root / "storage.conf"),
        }

    def run(self, *command: str, timeout_s: float = 60) -> str:
        """Runs a command to its end. Returns what it wrote to stdout.

        Raises CommandFailed for another exit code than 0, and subprocess.TimeoutExpired after `timeout_s`.
        """
        done = subprocess.run(
            command, env=self.env, capture_output=True, text=True, timeout=timeout_s, check=False, cwd=ROOT
        )
        if done.returncode:
            tail = (done.stdout + done.stderr)[-4000:]
            raise CommandFailed(f"{shlex.join(command)} ended with {done.returncode}:\n{tail}")
        return done.stdout

    def has_image(self, tag: str) -> bool:
        """Whether the storage holds an image of this name."""
        return bool(self.run("podman", "images", "--quiet", tag).strip())


def debian_mirror() -> str:
    """The Debian mirror that this machine's apt is set to use; else the one of Debian's own."""
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)", "Created-By: Packages"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split("\n")
    mirrors = [line.split()[0] for line in listed if line.endswith(f" {SUITE}")]
    return mirrors[0] if mirrors else "http://deb.debian.org/debian"


def build_base(engine: Engine) -> str:
    """Makes the base image out of Debian's packages, unless the storage has it. Returns its name."""
    contents = hashlib.sha256(" ".join((SUITE, *BASE_PACKAGES)).encode()).hexdigest()
    tag = f"localhost/attnserve-e2e-base:{SUITE}-{contents[:12]}"
    if engine.has_image(tag):
        return tag
    rootfs = engine.root / "rootfs"
    archive = engine.root / "rootfs.tar"
    try:
        include = f"--include={','.join(BASE_PACKAGES)}"
        engine.run("debootstrap", "--variant=minbase", include, SUITE, str(rootfs), debian_mirror(), timeout_s=300)
        left_out = [f"--exclude=./{name}" for name in ("var/cache/apt/*", "var/lib/apt/lists/*", "usr/share/doc/*")]
        engine.run("tar", "-C", str(rootfs), *left_out, "-cf", str(archive), ".", timeout_s=120)
        engine.run("podman", "import", "--quiet", str(archive), tag, timeout_s=120)
    finally:
        shutil.rmtree(rootfs, ignore_errors=True)
        archive.unlink(missing_ok=True)
    return tag


def build_image(engine: Engine, base: str, target: str = "cpu") -> str:
    """Builds the project's Dockerfile on `base`. Returns the image's name."""
    tag = f"localhost/attnserve-e2e:{target}"
    engine.run(
        *("buildah", "bud", "--isolation", "chroot", "--pull-never", "--layers", "--format", "docker"),
        *("--target", target, "--build-arg", f"BASE_IMAGE={base}", "--tag", tag),
        *pip_mounts(engine.root),
        str(ROOT),
        timeout_s=480,
    )
    # Layers of the last builds are the cache of the next one. After a week they only fill the disk.
    engine.run("podman", "image", "prune", "--force", "--filter", "until=168h")
    return tag


def pip_mounts(folder: Path) -> list[str]:
    """The mounts that let pip in a build do what pip does on this machine: settings, certificates, local indexes."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    settings = {}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.partition(".")
        if section in ("global", "install", ":env:"):
            settings[name.strip(".")] = value.strip("'\"").replace("\\n", " ")
    inside = {"cert": "/etc/ssl/certs/ca-certificates.crt"} if "cert" in settings else {}
    written = folder / "pip.conf"
    written.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in (settings | inside).items()))
    mounts = [f"{written}:/etc/pip.conf:ro"]
    if "cert" in settings:
        mounts.append(f"{settings['cert']}:{inside['cert']}:ro")
    mounts += [f"{path}:{path}:ro" for path in sorted(_local_folders(settings))]
    return [part for mount in mounts for part in ("--volume", mount)]


def _local_folders(settings: dict[str, str]) -> Iterable[str]:
    for name in ("index-url", "extra-index-url", "find-links"):
        for value in settings.get(name, "").split():
            path = urlparse(value).path if value.startswith("file:") else value
            if path.startswith("/") and Path(path).is_dir():
                # An index's pages point to files beside them.
                yield str(Path(path).parent if Path(path).name == "simple" else path)


@dataclass(frozen=True)
class Container:
    """A container that runs detached; the caller that started it stops and removes it."""

    engine: Engine
    id: str

    def logs(self) -> str:
        """Return its output so far."""
        done = subprocess.run(
            ["podman", "logs", self.id], env=self.engine.env, capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr

    def running(self) -> bool:
        """Return whether its process runs."""
        return bool(json.loads(self.engine.run("podman", "inspect", "--format", "{{json .State.Running}}", self.id)))

    def exec(self, *command: str) -> str:
        """Runs a command inside. Returns its stdout."""
        return self.engine.run("podman", "exec", self.id, *command)

    def stop(self, grace_s: int) -> int:
        """Sends the image's stop signal, and SIGKILL after `grace_s`. Returns the exit code."""
        self.engine.run("podman", "stop", "--time", str(grace_s), self.id, timeout_s=grace_s + 30)
        return self.exit_code()

    def kill(self) -> int:
        """Sends SIGKILL and waits. Returns the exit code."""
        self.engine.run("podman", "kill", "--signal", "KILL", self.id)
        self.engine.run("podman", "wait", self.id)
        return self.exit_code()

    def exit_code(self) -> int:
        """Return the exit code of its process."""
        return int(self.engine.run("podman", "inspect", "--format", "{{.State.ExitCode}}", self.id))

    def remove(self) -> None:
        """Stop the container, if it runs, and remove it."""
        subprocess.run(
            ["podman", "rm", "--force", "--time", "0", self.id],
            env=self.engine.env,
            capture_output=True,
            check=False,
            timeout=60,
        )


HARDENED = (
    *("--network", "host", "--read-only", "--read-only-tmpfs=false", "--cap-drop", "all"),
    *("--security-opt", "no-new-privileges", "--memory", "2g", "--pids-limit", "256"),
)
"""How the image must be able to run: nothing writable (not even /tmp), no capability, bounded memory and processes."""


def run_hardened(
    engine: Engine,
    image: str,
    *command: str,
    env: dict[str, str],
    volumes: Sequence[str] = (),
    extra: Sequence[str] = (),
) -> Container:
    """Starts the image detached and hardened, as the image's own user."""
    settings = [part for name, value in env.items() for part in ("--env", f"{name}={value}")]
    mounted = [part for volume in volumes for part in ("--volume", volume)]
    name = f"attnserve-e2e-{uuid.uuid4().hex[:12]}"
    options = [*HARDENED, *extra, *settings, *mounted]
    try:
        started = engine.run("podman", "run", "--detach", "--name", name, *options, image, *command)
    except CommandFailed:
        # The container may have been created and not started.
        Container(engine, name).remove()
        raise
    return Container(engine, started.strip().splitlines()[-1])
