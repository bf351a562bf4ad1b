"""`python -m dit_opt` is the `ditopt` command."""

from dit_opt.cli import main

main()
