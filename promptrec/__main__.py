"""`python -m promptrec`: what torchrun and accelerate launch start as a module."""

from promptrec.cli import main

main()
