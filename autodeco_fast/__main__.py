"""`python -m autodeco_fast`."""

from autodeco_fast.cli import main

main()
