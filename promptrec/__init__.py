"""promptrec: recover the prompt that made a language model rewrite a text.

Nothing heavy is imported here: each module imports the framework it needs itself.
"""

__version__ = "0.1.0"
