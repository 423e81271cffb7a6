"""Images for the tests and benchmarks of the container: a base made with debootstrap, built by buildah, run in namespaces."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGES = "python3,python3-venv,ca-certificates"
SUITE = "bookworm"

# Root read-only, /tmp and the kept folder writable: what `podman run --read-only --tmpfs /tmp -v …` does.
ENTER = r"""
set -e
root=$1; settings=$2; state=$3; shift 3
mount --make-rprivate /
mount --bind "$root" "$root"
touch "$root/etc/hosts"
mount -o remount,bind,ro "$root"
mount --bind /etc/hosts "$root/etc/hosts"
mount -t tmpfs tmpfs "$root/tmp"
mount --rbind /proc "$root/proc"
mount --rbind /dev "$root/dev"
[ -z "$settings" ] || mount --bind "$settings" "$root/etc/ekiben"
[ -z "$state" ] || mount --bind "$state" "$root/var/lib/ekiben"
exec env -i "$(command -v chroot)" --userspec=10001:10001 --groups=10001 "$root" "$@"
"""


def why_not() -> str:
    """Return why no image can be built here; empty when one can."""
    if os.geteuid() != 0:
        return "a file system of its own needs root"
    missing = [name for name in ("buildah", "debootstrap", "unshare", "chroot") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} is not installed"
    probe = subprocess.run(["unshare", "--mount", "mount", "--make-rprivate", "/"], capture_output=True, check=False)
    return "" if probe.returncode == 0 else "no namespace of mounts can be made"


@dataclass(frozen=True)
class Store:
    """A storage of images in a folder of its own, and the environment in which buildah uses it."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """What names it, beside the storage driver and the isolation that work without a container runtime."""
        return {
            "CONTAINERS_STORAGE_CONF": str(self.folder / "storage.conf"),
            "STORAGE_DRIVER": "vfs",
            "BUILDAH_ISOLATION": "chroot",
            "TMPDIR": str(self.folder / "tmp"),
        }

    def make(self) -> Store:
        """Lay it out."""
        (self.folder / "tmp").mkdir(parents=True)
        places = {"graphroot": self.folder / "graph", "runroot": self.folder / "run"}
        lines = ["[storage]", 'driver = "vfs"', *(f'{name} = "{place}"' for name, place in places.items()), ""]
        (self.folder / "storage.conf").write_text("\n".join(lines))
        return self

    def buildah(self, *arguments: str) -> str:
        """Run buildah; return what it prints."""
        ran = subprocess.run(
            ["buildah", *arguments], capture_output=True, text=True, check=False, env={**os.environ, **self.environment}
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.strip()

    def make_base(self, name: str) -> str:
        """Make an image of a minimal Debian with Python."""
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            root = Path(scratch) / "root"
            command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(root)]
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
            assert ran.returncode == 0, ran.stdout[-2000:]
            shutil.rmtree(root / "var" / "cache" / "apt", ignore_errors=True)
            container = self.buildah("from", "scratch")
            self.buildah("add", "--quiet", container, str(root), "/")
            self.buildah("commit", "--quiet", "--rm", container, name)
        return name

    def describe(self, image: str) -> dict:
        """Return an image's configuration, in Docker's form."""
        return json.loads(self.buildah("inspect", "--type", "image", image))["Docker"]

    @contextlib.contextmanager
    def mounted(self, image: str) -> Iterator[Path]:
        """Give the folder of a container's root."""
        container = self.buildah("from", image)
        try:
            yield Path(self.buildah("mount", container))
        finally:
            self.buildah("rm", container)

    def remove(self) -> None:
        """Give back the disk."""
        subprocess.run(
            ["buildah", "rm", "--all"], capture_output=True, check=False, env={**os.environ, **self.environment}
        )
        shutil.rmtree(self.folder, ignore_errors=True)


def start_image(
    root: Path,
    config: dict,
    *,
    settings: Path | None = None,
    state: Path | None = None,
    env: Mapping[str, str] | None = None,
    command: Sequence[str] = (),
    output: int | None = subprocess.PIPE,
) -> subprocess.Popen[str]:
    """Start an image's entry point, or a command, as its user on a read-only root; the process is the service itself."""
    told = dict(line.split("=", 1) for line in config["Env"]) | dict(env or {})
    line = [f"{name}={text}" for name, text in told.items()]
    what = [*(command or config["Entrypoint"])]
    return subprocess.Popen(
        ["unshare", "--mount", "bash", "-c", ENTER, "enter", str(root), str(settings or ""), str(state or ""), "env", *line, *what],
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str], patience_s: float = 60.0) -> int:
    """End a started image as its runtime does: ask, wait, then kill all of it."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(patience_s)
    except subprocess.TimeoutExpired:
        return -1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
