"""The program `pifa`, also `python -m pifa_compiler`: the command line, or what to install for it."""

import sys


def main() -> None:
    """Runs the command line on the arguments of the program; exit code 1 where its packages are not installed."""
    try:
        from .cli import main as run
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in ("typer", "rich"):
            raise
        sys.exit(f"error: the command line needs {package}; pip install 'pifa-compiler[hf]'")
    run()


if __name__ == "__main__":
    main()
