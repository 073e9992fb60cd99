"""`python -m cpjax`: the same as the command `cpjax`."""

from cpjax.cli import main

main()
