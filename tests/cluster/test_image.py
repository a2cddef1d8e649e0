"""The Dockerfile's commands run one by one in a root that holds only Debian's base system.

No Docker: `debootstrap` makes the root, `chroot` enters it. It takes minutes and gigabytes, root
and a package mirror, and is skipped where debootstrap is not installed. Q3Q_IMAGE_BINDS=DIR:DIR
mounts folders that pip needs (a local index, wheels); pip's and the certificates' variables are
passed on.
"""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LET_IN = re.compile(r"PIP_|.*_proxy$|SSL_CERT|REQUESTS_CA", re.IGNORECASE)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("debootstrap") is None,
        reason="needs root and debootstrap to make a root",
    ),
]


@pytest.fixture
def clean_root(tmp_path):
    folder = tmp_path / "root"
    [release] = re.findall(
        r"^VERSION_CODENAME=(.+)$",
        Path("/etc/os-release").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    subprocess.run(
        ["debootstrap", "--variant=minbase", release, str(folder)],
        check=True,
        capture_output=True,
    )
    for name in ("etc/resolv.conf", "etc/hosts"):
        if Path("/", name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path("/", name), folder / name)
    binds = ["/proc", "/dev", *filter(None, os.environ.get("Q3Q_IMAGE_BINDS", "").split(":"))]
    for path in binds:
        (folder / path.lstrip("/")).mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "--bind", path, str(folder / path.lstrip("/"))], check=True)
    yield folder
    for path in reversed(binds):
        subprocess.run(["umount", str(folder / path.lstrip("/"))], check=True)


class Build:
    """What `docker build` would do with each instruction."""

    def __init__(self, root):
        self.root, self.user, self.folder = root, "root", "/"
        self.env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        self.args = {
            name: self.shown(name, value)
            for name, value in os.environ.items()
            if LET_IN.match(name)
        }

    def shown(self, name, value):
        """A variable that names a file (a bundle of certificates) names a copy of it inside."""
        if not Path(value).is_file():
            return value
        copy = self.root / "opt" / name.lower()
        shutil.copyfile(value, copy)
        copy.chmod(0o644)
        return str(Path("/", copy.relative_to(self.root)))

    def run(self, command):
        settings = {
            **self.args,
            **self.env,
            "HOME": "/root" if self.user == "root" else f"/home/{self.user}",
        }
        inside = ["env", "-i", *(f"{name}={value}" for name, value in settings.items()), *command]
        entered = f"cd {shlex.quote(self.folder)} && exec {shlex.join(inside)}"
        done = subprocess.run(
            ["chroot", f"--userspec={self.user}", str(self.root), "/bin/sh", "-c", entered],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (
            f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        )
        return done.stdout

    def step(self, verb, rest):
        if verb == "RUN":
            self.run(["/bin/sh", "-c", rest])
        elif verb == "ARG":
            name, _, value = rest.partition("=")
            self.args.setdefault(name, value)
        elif verb == "ENV":
            for word in shlex.split(rest):
                name, _, value = word.partition("=")
                self.env[name] = value.replace("$PATH", self.env["PATH"])
        elif verb == "USER":
            self.user = rest
        elif verb == "WORKDIR":
            self.folder = rest
        elif verb == "COPY":
            self.copy(*[word for word in rest.split() if not word.startswith("--")])

    def copy(self, *words):
        *sources, target = words
        into = self.root / self.folder.lstrip("/") / target
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--", *sources],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        left_out = {
            line.strip("/") for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
        }
        for name in filter(None, listed.split("\0")):
            if Path(name).parts[0] in left_out:
                continue
            place = into / (name if sources == ["."] else Path(name).name)
            place.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_file():
                shutil.copyfile(ROOT / name, place)
        home = self.root / self.folder.lstrip("/")
        entry = (self.root / "etc/passwd").read_text(encoding="utf-8")
        [owner] = re.findall(rf"^{self.user}:x:(\d+):(\d+):", entry, re.MULTILINE)
        for path in [home, *home.rglob("*")]:
            os.chown(path, int(owner[0]), int(owner[1]), follow_symlinks=False)


def test_the_images_commands_work_in_a_clean_root(clean_root):
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    joined = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", text))
    build = Build(clean_root)
    for line in filter(str.strip, joined.splitlines()):
        verb, rest = line.split(None, 1)
        build.step(verb, rest.strip())
    assert build.user == "q3q"
    assert "method" in build.run(["python", "launch.py", "--help"])
    trial = [
        "method=rtn",
        "bits=8",
        "evaluation.tasks=[]",
        "evaluation.limit=2",
        "storage=/storage",
    ]
    printed = build.run(["python", "launch.py", *trial])
    assert "COMPLETED" in printed or "perplexity" in printed
    assert list((clean_root / "storage" / "trials").glob("*/record.json"))
    assert not list((clean_root / "home/q3q").glob(".cache/pip"))  # --no-cache-dir
