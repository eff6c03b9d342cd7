"""``python -m subspec.chat``: see :mod:`subspec.cli.chat`."""

from subspec.cli.chat import main

if __name__ == "__main__":
    main()
