"""my_pipeline.sh: whatever it meets on a machine is settled or said in one line. A stub stands for Python: seconds, no installation."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STUB = """#!/bin/sh
# Notes its arguments; makes a .venv of copies of itself; fails where FAILS names an argument; has the version VERSION.
case "$*" in
*sys.version_info*) exit "${WRONG_VERSION:-0}" ;;
*samefile*) exit "${MOVED:-0}" ;;
esac
echo "$*" >> "$LOG"
for word in $FAILS; do case "$*" in *"$word"*) echo "stub: no $word" >&2; exit 1 ;; esac; done
case "$*" in
"-m venv"*) rm -rf .venv; mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
*report.py*) mkdir -p "$3" && echo '- **36% -> 90%**: math' > "$3/report.md" ;;
esac
"""


class Machine:
    """A folder with the pipeline, and a PATH that has the stub for Python."""

    def __init__(self, folder: Path) -> None:
        self.project, self.bin, self.log = folder / "my project", folder / "bin", folder / "log"
        (self.project / "scripts").mkdir(parents=True)
        self.bin.mkdir()
        for name in ("my_pipeline.sh", "pyproject.toml"):
            shutil.copy(ROOT / name, self.project)
        for tool in ("bash", "sh", "cat", "dirname", "mkdir", "cp", "touch", "rm", "sed"):
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        self.python("python3.12")

    def python(self, name: str) -> Path:
        """Put a stub on the PATH."""
        path = self.bin / name
        path.write_text(STUB)
        path.chmod(0o755)
        return path

    def run(self, *command: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.bin), "LOG": str(self.log), "FAILS": ""} | variables
        return subprocess.run(
            command or ("./my_pipeline.sh",),
            cwd=cwd or self.project,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def calls(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a failure."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert lines[-1].startswith("error: ")
    assert sum(line.startswith("error: ") for line in lines) == 1
    return lines[-1]


def test_a_whole_run_installs_once_and_ends_with_what_was_reached_and_how_to_go_on(machine: Machine) -> None:
    done = machine.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "36% -> 90%  math" in done.stdout
    assert "scripts/serve.py --model runs/tiny/rl" in done.stdout
    assert done.stdout.index("GB") < done.stdout.index("=== setup")
    assert "--teacher" not in machine.calls()
    assert machine.calls().count("-m pip install") == 1
    assert machine.run(TEACHER="http://localhost:9/v1").returncode == 0
    assert machine.calls().count("-m pip install") == 1
    assert "--teacher http://localhost:9/v1" in machine.calls()


@pytest.mark.parametrize("command", [("sh", "my_pipeline.sh"), ("bash", "my_pipeline.sh"), ("./my_pipeline.sh",)])
def test_it_starts_by_any_shell(machine: Machine, command: tuple[str, ...]) -> None:
    assert machine.run(*command).returncode == 0


def test_it_starts_from_any_folder_whatever_cd_is_told(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "my project").mkdir(parents=True)
    done = machine.run("sh", "my project/my_pipeline.sh", cwd=tmp_path, CDPATH=str(tmp_path / "elsewhere"))
    assert done.returncode == 0, done.stderr
    assert (machine.project / ".venv").is_dir()


def test_no_python_and_a_wrong_one_are_named(machine: Machine) -> None:
    assert "no Python 3.11 to 3.13 found" in complaint(machine.run(WRONG_VERSION="1"))
    named = complaint(machine.run(WRONG_VERSION="1", PYTHON="/usr/bin/python2"))
    assert "PYTHON=/usr/bin/python2 is not Python 3.11 to 3.13" in named
    assert not (machine.project / ".venv").exists()


def test_a_python_without_venv_says_what_to_install(machine: Machine) -> None:
    assert "apt install python3-venv" in complaint(machine.run(FAILS="ensurepip"))
    assert not (machine.project / ".venv").exists()


def test_a_half_made_venv_is_made_anew_and_one_of_another_python_is_named(machine: Machine) -> None:
    half = machine.project / ".venv" / "bin"
    half.mkdir(parents=True)
    (half / "python").symlink_to("/nowhere/python3.12")  # its Python has gone
    assert machine.run().returncode == 0
    assert "-m venv --clear .venv" in machine.calls()
    (half.parent / ".installed").unlink()
    assert "rm -r .venv" in complaint(machine.run(WRONG_VERSION="1"))


def test_a_project_that_was_moved_gets_a_new_venv(machine: Machine) -> None:
    """The commands in a .venv begin with the path of their Python."""
    machine.run()
    assert machine.run(MOVED="1").returncode == 0
    assert machine.calls().count("-m venv") == 2
    assert machine.calls().count("-m pip install") == 2


def test_a_broken_installation_is_one_line_and_goes_on(machine: Machine) -> None:
    assert "run this again" in complaint(machine.run(FAILS="install"))
    assert machine.run(PIP_USER="1", PYTHONHOME="/nowhere").returncode == 0


def test_a_developers_installation_brings_its_tools_and_serves_the_pipeline_too(machine: Machine) -> None:
    assert machine.run("./my_pipeline.sh", "--install", RECIPE="huge").returncode == 0
    assert "pip install" in machine.calls()
    assert "-e .[fast,dev,eval]" in machine.calls()
    assert "check_setup" not in machine.calls()
    assert machine.run().returncode == 0
    assert machine.run("./my_pipeline.sh", "--install").returncode == 0
    assert machine.calls().count("-m pip install") == 1


def test_a_users_installation_lacks_a_developers_tools(machine: Machine) -> None:
    machine.run()
    assert machine.run("./my_pipeline.sh", "--install").returncode == 0
    assert machine.calls().count("-m pip install") == 2


def test_wrong_arguments_and_recipes_are_one_line(machine: Machine) -> None:
    assert "--recipe" in complaint(machine.run("./my_pipeline.sh", "--recipe"))
    assert "RECIPE='huge'" in complaint(machine.run(RECIPE="huge"))
    assert not machine.calls(), "something was installed before the settings were read"
    assert "WSL" in machine.run("./my_pipeline.sh", "--help").stdout
