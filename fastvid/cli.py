"""``fastvid <command> [flags]``: picks the command, nothing else. No heavy package is imported before that."""

import difflib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from fastvid import __version__, flags

# name: (module of fastvid, its line in --help), in the order in which a user meets them
COMMANDS = {
    "doctor": ("doctor", "what this machine has, and what each absence costs"),
    "convert": ("convert", "VideoInstruct JSON to training JSON"),
    "extract": ("extract", "videos to feature files"),
    "validate": ("validate", "check training records and their feature files"),
    "inspect": ("inspection", "what the model will see of each training sample"),
    "train": ("train", "train (several processes: torchrun -m fastvid.train)"),
    "export": ("export", "a checkpoint to mm_projector.bin or a Hugging Face folder"),
    "chat": ("chat", "ask questions about videos"),
    "embed": ("embed", "videos to the rows that a language model reads, for other programs"),
    "serve": ("serve", "answer over HTTP, as OpenAI's chat completions"),
    "demo": ("demo", "a page on this machine to ask about clips"),
    "evaluate": ("evaluate", "answer a benchmark's questions, and have the answers judged"),
}


# What starting the same command again does not mend. Of other OSErrors (a full disk, a lost connection) it may.
_MISTAKES = (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError)


def run(command: str, argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code; the entry point of scripts and of ``python -m fastvid.<module>``.

    Flags are looked at before the command is imported, which takes seconds. A user's mistake (``ValueError``,
    ``OSError``) becomes one line on stderr and code 2, Ctrl-C code 130. ``FASTVID_TRACEBACK=1`` shows where the error
    came from. Where ``FASTVID_MISTAKE`` names a file (scripts/launch_train.sh does so), the first process that meets
    a mistake writes its line there; others keep silent about theirs, and those that torchrun starts again end at once.

    Args:
        command: a name of `COMMANDS`.
        argv: its flags; None reads ``sys.argv``.
    """
    if os.path.exists(os.environ.get("FASTVID_MISTAKE") or ""):
        sys.exit(2)
    _open_closed_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: file names need not be UTF-8
    sys.argv = [f"fastvid {command}", *argv]  # a process that it starts is named after it
    module = f"fastvid.{COMMANDS[command][0]}"
    try:
        if module not in sys.modules:
            flags.parse(flags.config_of(command), argv)
        code = importlib.import_module(module).main(argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of our output left (`| head`): nothing more can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 141
    except (ValueError, OSError) as error:
        if os.environ.get("FASTVID_TRACEBACK") == "1":
            raise
        _tell(f"fastvid {command}: error: {error}", mistake=isinstance(error, _MISTAKES))
        code = 2
    if "RANK" in os.environ:
        # One of torchrun's: threads of gloo may outlive the process group (DTensor's caches hold it), and one that
        # drops its last tensor while the interpreter shuts down aborts the process, whereupon torchrun ends the others.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _open_closed_streams():
    """Open on /dev/null what a daemon starts its programs without: the next file would get the number of stderr."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
                os.set_inheritable(number, True)
            stream = open(number, mode, closefd=False)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def _tell(line, mistake):
    """Print an error; of a mistake that all ranks make, the first one does."""
    path = os.environ.get("FASTVID_MISTAKE")
    if mistake and path:
        try:
            with open(path, "x", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")
        except FileExistsError:
            return
    print(line, file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The console script ``fastvid``."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv else "--help"
    if name in COMMANDS:
        run(name, argv[1:])
    if name in ("-h", "--help", "help"):
        print(_help())
        sys.exit(0)
    if name == "--version":
        print(f"fastvid {__version__}")
        sys.exit(0)
    near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "`fastvid --help` lists the commands"
    print(f"fastvid: error: unknown command {name}; {hint}", file=sys.stderr)
    sys.exit(2)


def _help():
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {line}" for name, (_, line) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastvid <command> [flags]",
            "",
            "Fast training of video-chat models.",
            "",
            *lines,
            "",
            "`fastvid <command> --help` lists a command's flags.",
        ]
    )


if __name__ == "__main__":
    main()
