"""The one exception that means: the input is wrong, not the program.

The command line prints its message as a single line and exits with code 2. The message says
what is wrong, where, and what to do.
"""


class InputError(ValueError):
    """Raised for anything the user gave us that cannot work: a file, a column, a setting, a model path."""
