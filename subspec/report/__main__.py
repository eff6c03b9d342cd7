"""``python -m subspec.report``: see :mod:`subspec.cli.report`."""

from subspec.cli.report import main

if __name__ == "__main__":
    main()
