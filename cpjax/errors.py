"""The one exception that means: the user's input is wrong, and this is how to mend it."""


class InputError(ValueError):
    """Bad input. The message is one line that names the value, the rule and the fix.

    Commands print it without a traceback and exit with 2. It is a `ValueError`, so library users need not know it.
    """
