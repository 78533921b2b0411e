"""What `--decoder` may name, and what jobs must know of each before any decoder exists."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A value of `--decoder`.

    Attributes:
        conversion: what makes RGB of samples: "swscale", PyAV's, to the byte; or a name of its own, whose features do
            not go together with others. The decoder's class says the same.
        may_crash: on a CPU too it runs foreign code in this process, so that extraction runs in a child.
    """

    conversion: str = "swscale"
    may_crash: bool = False


KINDS = {"auto": Kind(), "pyav": Kind(), "nvdec": Kind(), "dali": Kind("dali", may_crash=True)}
