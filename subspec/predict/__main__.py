"""``python -m subspec.predict``: see :mod:`subspec.cli.predict`."""

from subspec.cli.predict import main

if __name__ == "__main__":
    main()
