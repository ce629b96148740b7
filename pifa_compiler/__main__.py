"""`python -m pifa_compiler`: the same as `pifa`."""

from .cli import main

if __name__ == "__main__":
    main()
