"""`python -m msae`."""

from msae.cli import main

main()
