"""`python -m mlxlora_cli`."""

from . import main

main()
