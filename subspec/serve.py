"""``python -m subspec.serve``: see :mod:`subspec.cli.serve`."""

from subspec.cli.serve import main

if __name__ == "__main__":
    main()
