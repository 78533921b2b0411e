"""The command line: choosing a command, and what its user sees of a mistake."""

import os
import subprocess
import sys
import types

import pytest
from conftest import ROOT

from fastvid import __version__, cli

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}


@pytest.fixture
def command(monkeypatch):
    """Install a stand-in for the command `train` whose main is the function given."""
    monkeypatch.setattr(sys, "argv", ["fastvid"])
    monkeypatch.delenv("FASTVID_TRACEBACK", raising=False)

    def install(main):
        module = types.ModuleType("fastvid.train")
        module.main = main
        monkeypatch.setitem(sys.modules, "fastvid.train", module)

    return install


def code_of(function, *arguments):
    with pytest.raises(SystemExit) as exit:
        function(*arguments)
    return exit.value.code


def raising(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command(argv, capsys):
    assert code_of(cli.main, argv) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (_, line) in cli.COMMANDS.items():
        assert any(text.split()[:1] == [name] and text.endswith(line) for text in lines)


def test_help_imports_nothing_heavy():
    script = (
        "import sys\nfrom fastvid.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'av', 'yaml'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)


def test_convert_does_not_load_torch():
    script = "import sys\nimport fastvid.convert\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, check=True)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, capsys):
    assert code_of(cli.main, [name, "--help"]) == 0
    assert f"usage: fastvid {name} " in capsys.readouterr().out


def test_version(capsys):
    assert code_of(cli.main, ["--version"]) == 0
    assert capsys.readouterr().out == f"fastvid {__version__}\n"


@pytest.mark.parametrize("typed, hint", [("trian", "did you mean train?"), ("qqq", "lists the commands")])
def test_unknown_command(typed, hint, capsys):
    assert code_of(cli.main, [typed]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fastvid: error: unknown command {typed}; ") and hint in error
    assert error.count("\n") == 1


CLOSED = """
import os, sys, types
from fastvid import cli
def main(argv):
    print("lost")
    print("lost", file=sys.stderr)
    import faulthandler
    faulthandler.enable(sys.__stderr__)
    return 0 if os.open(os.devnull, os.O_RDONLY) > 2 and os.get_inheritable(2) else 3
sys.modules["fastvid.train"] = types.ModuleType("fastvid.train")
sys.modules["fastvid.train"].main = main
cli.run("train", [])
"""


@pytest.mark.parametrize("closing", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_a_command_runs_without_streams(closing):
    """As daemons start them; no file that is opened later becomes one of them."""
    shell = f'exec "$0" -c "$1" {closing}'
    done = subprocess.run(["sh", "-c", shell, sys.executable, CLOSED], env=ENVIRONMENT, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("code", [0, 1, 143])
def test_the_code_of_a_command_is_the_exit_code(command, code):
    command(lambda argv: code)
    assert code_of(cli.run, "train", []) == code


@pytest.mark.parametrize(
    "error, code",
    [
        (ValueError("--data_path x.json: no such file"), 2),
        (FileNotFoundError(2, "No such file", "x.json"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_a_mistake_is_one_line(command, error, code, capsys):
    command(raising(error))
    assert code_of(cli.run, "train", []) == code
    text = capsys.readouterr().err
    assert text == ("" if code == 130 else f"fastvid train: error: {error}\n")


def test_a_defect_keeps_its_traceback(command):
    command(raising(RuntimeError("ours")))
    with pytest.raises(RuntimeError):
        cli.run("train", [])


def test_traceback_on_request(command, monkeypatch):
    command(raising(ValueError("where from?")))
    monkeypatch.setenv("FASTVID_TRACEBACK", "1")
    with pytest.raises(ValueError, match="where from"):
        cli.run("train", [])


def test_flags_reach_the_command(command, monkeypatch):
    seen = []
    command(lambda argv: seen.append((argv, sys.argv[0])))
    code_of(cli.main, ["train", "--bf16", "True"])
    monkeypatch.setattr(sys, "argv", ["scripts/train.py", "--tf32", "True"])
    code_of(cli.run, "train")
    assert seen == [(["--bf16", "True"], "fastvid train"), (["--tf32", "True"], "fastvid train")]


def test_a_reader_that_leaves_is_no_error():
    script = "from fastvid import cli, doctor; doctor.main = lambda argv: print('x' * 10**6); cli.run('doctor', [])"
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["-m", "fastvid.convert"],
        ["-m", "fastvid.cli", "convert"],
        ["scripts/convert_instruction_json_to_training_format.py"],
    ],
)
def test_ways_to_start_a_command(command, tmp_path):
    arguments = ["--input_json_file", str(tmp_path / "missing.json"), "--output_json_file", str(tmp_path / "out.json")]
    result = subprocess.run(
        [sys.executable, *command, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.startswith("fastvid convert: error: ") and "missing.json" in result.stderr
    assert result.stderr.count("\n") == 1


def test_names_that_are_no_text_can_be_printed():
    script = r"from fastvid import cli, doctor; doctor.main = lambda argv: print('a\udcff.mp4'); cli.run('doctor', [])"
    result = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "a\\udcff.mp4\n", "")


@pytest.mark.parametrize("rank", [{}, {"RANK": "1"}], ids=["alone", "a rank of torchrun's"])
def test_a_rank_leaves_without_taking_the_interpreter_down(rank):
    """Threads of gloo may still hold tensors then, and would abort a run that has done all its work."""
    program = (
        "import atexit, sys, types; atexit.register(print, 'taken down'); module = types.ModuleType('t')\n"
        "module.main = lambda argv: print('done') or 3\nsys.modules['fastvid.train'] = module\n"
        "from fastvid.cli import run; run('train', [])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**ENVIRONMENT, **rank})
    assert found.returncode == 3 and found.stdout.split("\n")[0] == "done"
    assert ("taken down" in found.stdout) == (not rank)


@pytest.mark.parametrize(
    "error, kept",
    [
        (ValueError("--version v9"), True),
        (FileNotFoundError(2, "No such file", "x.json"), True),
        (ConnectionError("rank 1 lost rank 0"), False),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_what_a_restart_does_not_mend_is_kept_for_it(command, error, kept, tmp_path, monkeypatch, capsys):
    file = tmp_path / "mistake"
    monkeypatch.setenv("FASTVID_MISTAKE", str(file))
    command(raising(error))
    assert code_of(cli.run, "train", []) == 2
    line = f"fastvid train: error: {error}\n"
    assert capsys.readouterr().err == line and file.exists() == kept
    assert not kept or file.read_text() == line
    command(lambda argv: pytest.fail("tried again") if kept else 0)
    assert code_of(cli.run, "train", []) == (2 if kept else 0)
    assert capsys.readouterr().err == ""


def test_of_a_mistake_that_all_ranks_make_one_is_told(command, tmp_path, monkeypatch, capsys):
    file = tmp_path / "mistake"
    monkeypatch.setenv("FASTVID_MISTAKE", str(file))

    def main(argv):
        file.write_text("another rank's")
        raise ValueError("--version v9")

    command(main)
    assert code_of(cli.run, "train", []) == 2
    assert capsys.readouterr().err == "" and file.read_text() == "another rank's"


@pytest.mark.parametrize("argv, code, word", [(["--help"], 0, "usage: "), (["--learning_rat", "1"], 2, "did you mean")])
def test_flags_are_looked_at_before_anything_heavy_is_imported(argv, code, word):
    script = (
        "import sys\nfrom fastvid.cli import main\n"
        f"try:\n    main(['train', *{argv}])\nexcept SystemExit as exit:\n    assert exit.code == {code}\n"
        "heavy = {'torch', 'transformers', 'numpy', 'av'} & set(sys.modules)\nassert not heavy, heavy"
    )
    found = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True)
    assert found.returncode == 0 and word in found.stdout + found.stderr
