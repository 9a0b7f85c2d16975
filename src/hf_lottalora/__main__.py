"""`python -m hf_lottalora` is the command `lottalora`, which starts faster: here the package is imported first."""

from hf_lottalora_cli import main

main()
