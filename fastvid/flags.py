"""The parser of every command: a command line and a YAML file to one of `fastvid.config`'s dataclasses.

``transformers.HfArgumentParser`` reads the flags; ``--config run.yaml`` supplies defaults that the command line
overrides.
"""

import argparse
import dataclasses
import difflib
import sys


class _Store(argparse.Action):
    """Store a value; a list flag that is given again on the command line adds to what it was given before."""

    def __call__(self, parser, namespace, values, option_string=None):
        given = namespace.__dict__.setdefault("_given", set())
        if isinstance(values, list) and self.dest in given:
            values = getattr(namespace, self.dest) + values
        given.add(self.dest)
        setattr(namespace, self.dest, values)


def parse(config_class, argv=None):
    """Fill `config_class` from the command line, with ``--config file.yaml`` underneath.

    Args:
        config_class: a dataclass of `fastvid.config`.
        argv: arguments without the program's name; None reads ``sys.argv``.

    Raises:
        SystemExit: code 2 and one line that names an unknown flag and its nearest known one, or a bad value.
    """
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def add_argument(self, *names, **options):
            return super().add_argument(*names, **{"action": _Store, **options})

    argv = list(sys.argv[1:] if argv is None else argv)
    usage = "%(prog)s [flags]; --help lists them"
    parser = Parser(config_class, allow_abbrev=False, usage=usage, description=config_class.__doc__)
    parser.add_argument("--config", metavar="FILE", help="YAML file of flags; the command line overrides it.")

    flags = {word.partition("=")[0] for word in argv if word.startswith("--")}
    settings = _read_settings(parser, argv) if "--config" in flags else {}
    given = {flag[2:].replace("-", "_") for flag in flags}
    argv = [word for name, value in settings.items() if name not in given for word in _words(name, value)] + argv
    known = list(parser._option_string_actions)
    for flag in (word.partition("=")[0] for word in argv):
        if flag.startswith("--") and flag not in known:
            near = difflib.get_close_matches(flag, known, n=1, cutoff=0.5)
            parser.error(f"unknown flag {flag}{' in the --config file' * (flag[2:] in settings)}"
                         + (f"; did you mean {near[0]}?" if near else "; see --help"))
    found = parser.parse_args(argv)
    return config_class(**{f.name: getattr(found, f.name) for f in dataclasses.fields(config_class)})


def _read_settings(parser, argv):
    """The YAML file behind ``--config``, as a dict of flag names and values."""
    import yaml

    at = next(i for i, word in enumerate(argv) if word.partition("=")[0] == "--config")
    path = argv[at].partition("=")[2] or (argv[at + 1] if at + 1 < len(argv) else "")
    try:
        with open(path, encoding="utf-8") as file:
            settings = yaml.safe_load(file) or {}
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"--config {path} is no YAML file of flags that can be read: {' '.join(str(error).split())}")
    if not isinstance(settings, dict):
        parser.error(f"--config {path}: expected `flag: value` lines, found {type(settings).__name__}")
    return {str(name): value for name, value in settings.items() if value is not None}


def _words(name, value):
    """The command-line words that say what one YAML line says."""
    return [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
