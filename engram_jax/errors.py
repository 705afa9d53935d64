"""The ways in which a command can end early without a bug being to blame."""

STOPPED = 75  # exit code of a run that was told to stop and can go on: EX_TEMPFAIL of sysexits.h


class UserError(ValueError):
    """Something that the user can mend; one line: the field, its value, what would be right.

    The command line prints the line and exits with 2.
    """


class MachineError(RuntimeError):
    """Something that the machine refused (disk full, file unreadable); exit code 1."""


class Stopped(KeyboardInterrupt):
    """A run was told to stop and did, in good order; exit code `STOPPED`.

    Attributes:
      together: whether all processes of the run stop here.
    """

    def __init__(self, line: str, together: bool = True):
        super().__init__(line)
        self.together = together
