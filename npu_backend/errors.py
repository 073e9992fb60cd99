"""Whose fault it is: the user's input, a rank's, or a link's between two ranks."""


class InputError(ValueError):
    """Bad input. The message is one line that names the value, the rule and the fix. The command exits with 2."""


class RankError(RuntimeError):
    """A rank failed while it computed. The message names the rank, and the ring step where it is known."""


class LinkError(RankError):
    """A transfer between two ranks failed: as a rule the consequence of another rank's failure, seen from outside."""
