"""``python -m subspec.run``: see :mod:`subspec.cli.run`."""

from subspec.cli.run import main

if __name__ == "__main__":
    main()
