"""The command line: what it prints, its exit codes, and optimum-cli's copy of it."""

import importlib
import subprocess
import sys
import types
from importlib.metadata import entry_points, version

import pytest

from transformers_commvq import ConfigError, cli


@pytest.fixture
def command(monkeypatch):
    """Puts one command, ``try``, in place of all; returns a function that sets what it does."""
    module = types.ModuleType("transformers_commvq.cli.attempt")
    module.NAME, module.HELP = "attempt", "a command for this test"
    module.add_arguments = lambda parser: parser.add_argument("--count", type=int, default=1)
    monkeypatch.setitem(sys.modules, "transformers_commvq.cli.attempt", module)
    monkeypatch.setattr(cli, "COMMANDS", ("attempt",))

    def does(run):
        module.run = run

    return does


NAMES = [importlib.import_module(f"transformers_commvq.cli.{module}").NAME for module in cli.COMMANDS]


def test_every_command_has_help(capsys):
    for name in NAMES:
        with pytest.raises(SystemExit) as done:
            cli.main([name, "--help"])
        assert done.value.code == 0
        assert f"transformers-commvq {name}" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out.strip() == version("transformers-commvq")


def test_no_command_shows_help(capsys):
    assert cli.main([]) == 2
    assert "demo" in capsys.readouterr().err


def test_exit_code_is_the_commands(command):
    command(lambda args: args.count)
    assert cli.main(["attempt"]) == 1
    assert cli.main(["attempt", "--count", "0"]) == 0


def test_explained_errors_are_one_line(command, capsys):
    def run(args):
        raise ConfigError("bits=99: too many. Fix: use 2.")

    command(run)
    assert cli.main(["attempt"]) == 2
    assert capsys.readouterr().err == "transformers-commvq attempt: error: bits=99: too many. Fix: use 2.\n"


def test_other_errors_are_not_hidden(command):
    def run(args):
        raise ZeroDivisionError

    command(run)
    with pytest.raises(ZeroDivisionError):
        cli.main(["attempt"])


def test_interrupt(command, capsys):
    def run(args):
        raise KeyboardInterrupt

    command(run)
    assert cli.main(["attempt"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_wrong_arguments_exit_2(command):
    command(lambda args: 0)
    with pytest.raises(SystemExit) as done:
        cli.main(["attempt", "--count", "many"])
    assert done.value.code == 2


def test_console_script_is_installed():
    (script,) = entry_points(group="console_scripts", name="transformers-commvq")
    assert script.load() is cli.main


def optimum_cli(*arguments):
    program = "import sys; from optimum.commands.optimum_cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_optimum_cli_lists_the_commands():
    pytest.importorskip("optimum.commands.optimum_cli", reason="optimum is not installed")
    done = optimum_cli("commvq", "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: optimum-cli commvq" in done.stdout
    for name in NAMES:
        assert name in done.stdout


def test_optimum_cli_runs_a_command_and_returns_its_code(tmp_path):
    pytest.importorskip("optimum.commands.optimum_cli", reason="optimum is not installed")
    assert "usage: optimum-cli commvq inspect" in optimum_cli("commvq", "inspect", "--help").stdout
    done = optimum_cli("commvq", "inspect", str(tmp_path / "nothing"))
    assert done.returncode == 2
    # What other libraries log while they are imported (torchao does) may stand before it.
    assert done.stderr.splitlines()[-1].startswith("optimum-cli commvq inspect: error: ")
    assert "Traceback" not in done.stderr


def test_optimum_stays_light_for_other_commands():
    pytest.importorskip("optimum.commands.optimum_cli", reason="optimum is not installed")
    program = (
        "import sys; from optimum.commands.optimum_cli import load_optimum_namespace_cli_commands as load; load();"
        "assert 'optimum.commands.register.register_commvq' in sys.modules; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"
