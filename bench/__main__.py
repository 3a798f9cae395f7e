"""`python -m bench`: the figures of the README."""

from bench.main_job import main

main()
