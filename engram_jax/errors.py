"""The two ways in which a command can fail without a bug being to blame."""


class UserError(ValueError):
    """Something that the user can mend; one line: the field, its value, what would be right.

    The command line prints the line and exits with 2.
    """


class MachineError(RuntimeError):
    """Something that the machine refused (disk full, file unreadable); exit code 1."""
